"""Batches of pairs: like lengths together, few shapes, an order from the seed alone; the arrays that a step reads."""

import math
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

from .attention import CUDA_TILE, Layout, make_parts, on_cuda, on_metal
from .options import MOST_ITERS, ConfigError

# How a batch is arranged: all its tokens side by side, a prompt's once; the same for a model that convolves, which has
# to know what sequences begin with; or rows with a prompt each.
ARRANGEMENTS = PACKED, RECURRENT, PLAIN = "packed", "recurrent", "plain"
# The beginnings of prompts that a recurrence runs once are multiples of at least so many tokens.
BEGUN = 32
# What of a `Shape` serves a batch where it is larger, and not smaller.
LARGER = np.array([1, 1, 1, -1])
# On a GPU a step is traced and compiled for each shape: so many serve all batches of a kind. On Apple's a step takes so
# long that the next one's trace goes on meanwhile (17 ms for 16 layers, 3.4 MB of memory that stay), and every token of
# padding counts: in batches of 4 of real pairs 8 shapes add 15 % to what the body computes and 26 % to the head's, 32
# shapes 4 % and 11 %.
MOST_SHAPES, MOST_SHAPES_ON_METAL = 8, 32
# So many batches' worth of pairs of like length are shuffled among themselves in each epoch.
BUCKET = 8
# Bytes from one array's start to the next where several are parts of one: CUDA's products take arrays to begin so.
ALIGNMENT = 256


class Shape(NamedTuple):
    """What a batch is padded to.

    Attributes:
        tokens: of a packed batch, all its tokens; 0 for rows.
        width: positions of its longest sequence.
        scored: response tokens.
        begun: with how many tokens of its prompt each pair's sequences begin at least, where that is of use.
    """

    tokens: int
    width: int
    scored: int
    begun: int = 0


class Batch(NamedTuple):
    """B pairs as arrays; a pair's chosen response is sequence i, its rejected one sequence B + i.

    Attributes:
        tokens: `(N, 1)` int32 where it is packed, else `(2B, T)`; padded with 0 at the end.
        layout: the `Layout` of a packed batch; an empty tuple where there are rows.
        positions: `(M,)` int32, where in the flattened tokens each response token is predicted.
        targets: `(M,)` int32, the token predicted there.
        sequences: `(M,)` int32, whose it is; 2B where it is padding.
        common: `(M,)` bool, whether it is among the first tokens that a pair's responses both have, by number.
        lengths: `(2B,)` float32, scored tokens of each response.
        counts: `(B,)` float32, 1 for a pair and 0 for one that only fills up the batch.
        weights, margins: `(B,)` float32, the rows' `weight` and `margin`.
        labels: `(B,)` float32, of single responses 1 for a desirable one and 0 for another; 1 of pairs.
        reads: `(N,)` float32, in how many of the pairs' sequences each of the flattened tokens is; 0 of padding, of
            what fills up, and of responses to other prompts.
        ntoks: the prompts' and responses' tokens, each prompt counted for both responses, as `()` int32; of single
            responses their own.
    """

    tokens: mx.array
    layout: tuple
    positions: mx.array
    targets: mx.array
    sequences: mx.array
    common: mx.array
    lengths: mx.array
    counts: mx.array
    weights: mx.array
    margins: mx.array
    labels: mx.array
    reads: mx.array
    ntoks: mx.array


def multiple():
    """What the lengths of a batch are rounded up to on the default device: with 1 each batch has a shape of its own."""
    if mx.default_device() != mx.gpu:
        return 1
    return CUDA_TILE if on_cuda() else 32


def lengths_of(pairs):
    """Tokens of prompt, chosen and rejected of each pair, `(n, 3)` int; `ConfigError` where a part has none."""
    lengths = [[len(pair.prompt), len(pair.chosen), len(pair.rejected)] for pair in pairs]
    lengths = np.array(lengths, int).reshape(-1, 3)
    if not lengths.all():
        # Of a program's own pairs: a response's first token is predicted by the prompt's last.
        number = int(np.argmin(lengths.all(axis=1)))
        raise ConfigError(
            f"pair {number} has no token in its prompt, chosen or rejected response; give each at least one, such as "
            "BOS for a prompt, or leave the pair out."
        )
    return lengths


def shape_of(lengths, arrangement, down_to=None):
    """The least `Shape` of a batch.

    Args:
        lengths: `(B, 3)` int, tokens of prompt, chosen and rejected.
        arrangement: PACKED, RECURRENT or PLAIN.
        down_to: the beginnings of prompts are rounded down to multiples of this; by default what suits the device.
    """
    to = multiple()
    # A response's last token predicts nothing.
    tokens = 0 if arrangement == PLAIN else int(lengths.sum()) - 2 * len(lengths)
    width = int((lengths[:, 0] + lengths[:, 1:].max(axis=1)).max()) - 1
    shape = Shape(*(-(-number // to) * to for number in (tokens, width, int(lengths[:, 1:].sum()))))
    if arrangement == RECURRENT:
        # A prompt's last token predicts a response's first, which may be its only one.
        down_to = down_to or max(BEGUN, to)
        shape = shape._replace(begun=(int(lengths[:, 0].min()) - 1) // down_to * down_to)
    return shape


def ladder(shapes, size, most=MOST_SHAPES):
    """Few shapes that serve many batches.

    Args:
        shapes: the batches' own `Shape`s.
        size: pairs in a batch.
        most: how many shapes there may be.

    Returns:
        A list with a `Shape` for each batch that serves it, of which `most` differ at most. In the order of an estimate
        of their work, those two neighbours become one that add the least to all batches' work, until few are left.
    """
    shapes = LARGER * np.array(shapes)
    own, counts = np.unique(shapes, axis=0, return_counts=True)
    order = np.argsort(_work(own, size), kind="stable")
    own, counts = own[order], counts[order]
    while len(own) > most:
        both, together = np.maximum(own[:-1], own[1:]), counts[:-1] + counts[1:]
        costs = _work(own, size) * counts
        i = int(np.argmin(_work(both, size) * together - costs[:-1] - costs[1:]))
        own, counts = np.delete(own, i, axis=0), np.delete(counts, i)
        own[i], counts[i] = both[i], together[i]
    # Each shape's is the first that holds it.
    places = (own >= shapes[:, None]).all(axis=2).argmax(axis=1)
    return [Shape(*shape) for shape in (LARGER * own[places]).tolist()]


def _work(shapes, size):
    """About what a step costs, in tokens through the model's body: the head, and products of queries and keys, too.

    Shapes are `(n, 4)`, times LARGER.
    """
    tokens, width, scored, begun = shapes.T
    rows = 2 * size * width
    return np.where(tokens > 0, tokens, rows) + scored / 4 + rows * width / 4096 + size * begun / 4


def by_length(lengths):
    """Row numbers in an order in which rows of like length come together: `(n,)` of `(n, 3)`, as of `lengths_of`."""
    responses = lengths[:, 1:].max(axis=1)
    return np.lexsort((responses, lengths[:, 0] + responses))


def filled(lengths, arrangement, size=None, most=np.inf):
    """Rows grouped into batches of like length, each as full as `size` and `most` allow.

    Args:
        lengths: `(n, 3)` int, tokens of prompt, chosen and rejected of each row.
        arrangement: PACKED, RECURRENT or PLAIN.
        size: pairs in a batch at most, or None.
        most: tokens in a batch at most; a longer pair is a batch by itself.

    Returns:
        A list of int arrays that holds each row once.
    """
    totals, own = (lengths[:, 0] + lengths[:, 1:].max(axis=1)).tolist(), lengths.sum(axis=1).tolist()
    batches, rows, packed = [], [], 0
    for row in by_length(lengths).tolist():
        packed += own[row]
        tokens = 2 * (len(rows) + 1) * totals[row] if arrangement == PLAIN else packed
        if rows and (tokens > most or len(rows) == size):
            batches.append(np.array(rows))
            rows, packed = [], own[row]
        rows.append(row)
    return [*batches, np.array(rows)] if rows else batches


def make_batch(pairs, arrangement, shape=None, counted=None):
    """Arrays for a list of pairs.

    Args:
        pairs: B `Pair`s.
        arrangement: PACKED, RECURRENT or PLAIN.
        shape: the `Shape` to pad to; by default the least that suits the device.
        counted: how many of the pairs count, by default all; those behind them fill up the batch.

    Returns:
        `(Batch, processed, padding)`: the tokens that the model's body will run over, padding included, and
        how many of them are padding.
    """
    counts = [float(counted is None or i < counted) for i in range(len(pairs))]
    shape = shape or shape_of(lengths_of(pairs), arrangement)
    responses = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    lay_out = _rows if arrangement == PLAIN else partial(_pack, recurrent=arrangement == RECURRENT)
    alone = [pair.label is not None for pair in pairs]
    heard = np.array([*counts, *(0.0 if one else count for one, count in zip(alone, counts, strict=True))], np.float32)
    tokens, layout, places, reads, own = lay_out(pairs, responses, heard, shape)
    scored = [_scored_places(pair, side) for side in (0, 1) for pair in pairs]
    positions, targets, sequences, common = _scored(responses, places, scored, shape.scored)
    batch = Batch(
        tokens=tokens,
        layout=layout,
        positions=positions,
        targets=targets,
        sequences=sequences,
        common=common,
        lengths=np.array([len(numbers) for numbers in scored], np.float32),
        counts=np.array(counts, np.float32),
        weights=np.array([pair.weight for pair in pairs], np.float32),
        margins=np.array([pair.margin for pair in pairs], np.float32),
        labels=np.array([pair.label is not False for pair in pairs], np.float32),
        reads=reads,
        # Each heard response has a last token too, which predicts nothing and is not among those that are read.
        ntoks=np.array(reads.sum() + heard.sum(), np.int32),
    )
    return at_once(batch), tokens.size, tokens.size - own


def at_once(tree):
    """A tree of numpy's arrays, of 32 bits or booleans, as MLX's: parts of one array.

    On CUDA each array that is made of numpy's is copied to a place of its own while the host waits, and the device
    waits where that is given back.
    """
    words = [_words(values) for _, values in tree_flatten(tree)]
    whole = mx.array(np.concatenate(words))
    views = {np.dtype(np.int32): whole, np.dtype(np.float32): whole.view(mx.float32)}
    views[np.dtype(bool)] = whole.view(mx.bool_)
    starts = iter(np.cumsum([0, *map(len, words)]).tolist())

    def part(values):
        return mx.as_strided(views[values.dtype], values.shape, offset=next(starts) * 4 // values.dtype.itemsize)

    return tree_map(part, tree)


def _words(values):
    """An array's values as int32, filled up to a multiple of ALIGNMENT."""
    values = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return np.concatenate([values, np.zeros(-len(values) % ALIGNMENT, np.uint8)]).view(np.int32)


def _pack(pairs, responses, heard, shape, recurrent):
    """All tokens side by side: the prompts, then the responses without their last tokens.

    Args:
        recurrent: whether the layout says what convolutions and recurrences have to know too.

    Returns:
        `(tokens, layout, places, reads, own)`: `(N, 1)`, the `Layout`, where in the tokens each sequence's response is
        predicted, how often each token counts where a sequence counts `heard`, and how many tokens are no padding.
    """
    pieces = [*(pair.prompt for pair in pairs), *(response[:-1] for response in responses)]
    ends = np.cumsum([len(piece) for piece in pieces])
    numbers = [np.arange(end - len(piece), end) for piece, end in zip(pieces, ends, strict=True)]
    count = len(pairs)
    sequences = [np.concatenate([numbers[row % count], numbers[count + row]]) for row in range(2 * count)]
    tokens = np.zeros((shape.tokens, 1), np.int32)
    tokens[: ends[-1], 0] = np.concatenate(pieces)
    reads = np.zeros(shape.tokens, np.float32)
    reads[: ends[-1]] = np.repeat([*(heard[:count] + heard[count:]), *heard], [len(piece) for piece in pieces])
    # Which sequences are computed at once, from where on they ask, and to where they are padded.
    rows = [(range(2 * count), 0, shape.width)]
    if multiple() == 1:
        # Of rejected sequences only what is their own has to ask; on a GPU that is another shape for little.
        shared = min(len(pair.prompt) for pair in pairs)
        chosen, rejected = (max(map(len, half)) for half in (sequences[:count], sequences[count:]))
        rows = [(range(count), 0, chosen), (range(count, 2 * count), shared, rejected)]
    attended = make_parts(shape.tokens, sequences, [(own, 0, first, stop) for own, first, stop in rows if first < stop])
    in_sequence = np.zeros(shape.tokens, np.int32)
    for sequence in sequences:
        in_sequence[sequence] = np.arange(len(sequence))
    layout = Layout(in_sequence, attended)
    if recurrent:
        spans = [(range(count), 0, 0, shape.begun)] if shape.begun else []
        spans += [(own, shape.begun, shape.begun, stop) for own, _, stop in rows]
        layout = layout._replace(recurrent=make_parts(shape.tokens, sequences, spans))
    places = [sequence[-len(response) :] for sequence, response in zip(sequences, responses, strict=True)]
    return tokens, layout, places, reads, int(ends[-1])


def _rows(pairs, responses, heard, shape):
    """Rows of a prompt and a response without its last token; returns as `_pack`."""
    tokens, places, own = np.zeros((len(responses), shape.width), np.int32), [], 0
    reads = np.zeros(tokens.shape, np.float32)
    for i, response in enumerate(responses):
        row = [*pairs[i % len(pairs)].prompt, *response[:-1]]
        tokens[i, : len(row)], reads[i, : len(row)] = row, heard[i]
        places.append(i * shape.width + np.arange(len(row) - len(response), len(row)))
        own += len(row)
    return tokens, (), places, reads.ravel(), own


def _scored_places(pair, side):
    """Which tokens of a pair's chosen (0) or rejected (1) response are scored: their numbers within it."""
    kept = np.ones(len(pair.rejected if side else pair.chosen), bool)
    for start, stop in pair.unscored[side]:
        kept[start:stop] = False
    return np.flatnonzero(kept)


def _scored(responses, places, scored, count):
    """`positions`, `targets`, `sequences` and `common` of a batch, M being `count`."""
    half = len(responses) // 2
    positions, targets = np.zeros(count, np.int32), np.zeros(count, np.int32)
    sequences, common = np.full(count, len(responses), np.int32), np.zeros(count, bool)
    start = 0
    for row, (response, place, own) in enumerate(zip(responses, places, scored, strict=True)):
        stop = start + len(own)
        positions[start:stop], targets[start:stop], sequences[start:stop] = place[own], np.array(response)[own], row
        common[start : start + min(len(own), len(scored[(row + half) % len(responses)]))] = True
        start = stop
    return positions, targets, sequences, common


class Schedule:
    """Which rows each training step takes: drawn anew each epoch from the seed, every row once.

    Args:
        pairs: all `Pair`s, by row number.
        batch_size: pairs in a step, of all workers together.
        seed: of the draws.
        arrangement: of the batches.
        iters: steps of the run, from which its batches are known before the first one; by default one epoch.
        grouped: whether a batch holds pairs of like length.

    Attributes:
        longest: tokens of the longest prompt and response.

    Raises:
        ConfigError: the batch size is not a multiple of the number of workers.
    """

    def __init__(self, pairs, batch_size, seed, arrangement, iters=None, grouped=True):
        refuse_uneven_shares(batch_size)
        world = mx.distributed.init()
        self.pairs, self.seed, self.arrangement, self.batch_size = pairs, seed, arrangement, batch_size
        self.rank, self.workers = world.rank(), world.size()
        self.epoch_steps = -(-len(pairs) // batch_size)
        # Where shapes are compiled, what is left for the last batch is filled up.
        self._share = batch_size // self.workers if multiple() > 1 else 0
        self._lengths = lengths_of(pairs)
        self.longest = int((self._lengths[:, 0] + self._lengths[:, 1:].max(axis=1)).max())
        self._by_length = by_length(self._lengths)
        self._bucket = batch_size * (BUCKET if grouped else self.epoch_steps)
        self._epoch, self._batches = None, None
        self._shapes = [self._own_shape(i) for i in range(1, 1 + (iters or self.epoch_steps))]
        if multiple() > 1:
            self._shapes = ladder(self._shapes, self._share, MOST_SHAPES_ON_METAL if on_metal() else MOST_SHAPES)

    def rows(self, iteration):
        """All workers' rows of an iteration, counted from 1."""
        epoch, place = divmod(iteration - 1, self.epoch_steps)
        if epoch != self._epoch:
            draw = np.random.default_rng([self.seed, epoch])
            self._epoch, self._batches = epoch, drawn(self._by_length, self.batch_size, self._bucket, draw)
        return self._batches[place]

    def shape(self, iteration):
        """The `Shape` that this worker's batch of an iteration is padded to."""
        return self._shapes[iteration - 1]

    def _own_shape(self, iteration):
        """The least shape of this worker's batch; where shapes are compiled, of all workers', who wait for one."""
        rows = self.rows(iteration)
        ranks = range(self.workers) if multiple() > 1 else [self.rank]
        shapes = [shape_of(self._lengths[self._share_of(rows, rank)[1]], self.arrangement) for rank in ranks]
        return Shape(*(LARGER * (LARGER * np.array(shapes)).max(axis=0)).tolist())

    def visited(self, first, last):
        """The rows of the iterations from `first` to `last`, each once, in order."""
        last = min(last, first + 2 * self.epoch_steps)  # two epochs hold every row
        return np.unique(np.concatenate([self.rows(i) for i in range(first, last + 1)]))

    def tokens(self, iteration):
        """The tokens of this worker's batch of an iteration that the model's body runs over."""
        shape = self.shape(iteration)
        return shape.tokens or 2 * len(self._share_of(self.rows(iteration), self.rank)[1]) * shape.width

    def _share_of(self, rows, rank):
        """A worker's rows of a batch, and the same filled up to its share; one of another's where it has none."""
        mine = rows[rank :: self.workers]
        taken = mine if len(mine) else rows[:1]
        size = max(self._share, -(-len(rows) // self.workers))
        return mine, np.concatenate([taken, np.repeat(taken[:1], size - len(taken))])

    def batch(self, iteration, reference):
        """This worker's `(batch, reference logps)` of an iteration, and its tokens: processed and padding."""
        mine, rows = self._share_of(self.rows(iteration), self.rank)
        pairs = [self.pairs[i] for i in rows]
        batch, processed, padding = make_batch(pairs, self.arrangement, self.shape(iteration), len(mine))
        return batch, reference_rows(reference, rows), (processed, padding)


def refuse_uneven_shares(batch_size):
    """Raise `ConfigError` where the batch size is not a multiple of the number of workers."""
    if batch_size % (workers := mx.distributed.init().size()):
        raise ConfigError(f"batch_size is {batch_size}; it must be a multiple of the number of workers, {workers}.")


def iterations(epochs, pairs, batch_size):
    """Batches of so many rounds, or a part of one, through so many pairs; `ConfigError` beyond MOST_ITERS."""
    # Rounded first: 0.1 x 30 is more than 3 in floating point.
    found = max(1, math.ceil(round(epochs * -(-pairs // batch_size), 6)))
    if found > MOST_ITERS:
        raise ConfigError(f"epochs and the data ask for more than {MOST_ITERS} steps; lower epochs.")
    return found


def drawn(by_length, size, bucket, draw):
    """The batches of an epoch.

    Args:
        by_length: all rows' numbers, those of like length together.
        size: pairs in a batch; one batch has what is left.
        bucket: so many neighbours are shuffled among themselves before they are cut into batches.
        draw: a numpy `Generator`.

    Returns:
        A list of int arrays in random order that holds each row once.
    """
    places = np.concatenate(
        [draw.permutation(np.arange(i, min(i + bucket, len(by_length)))) for i in range(0, len(by_length), bucket)]
    )
    # Sorted, so that workers, who take turns, have like lengths.
    batches = [by_length[np.sort(places[i : i + size])] for i in range(0, len(places), size)]
    return [batches[i] for i in draw.permutation(len(batches))]


def reference_rows(reference, rows):
    """Rows of the reference's logps as an array for the model; zeros where there is no reference."""
    if reference is None:
        return mx.zeros((len(rows), 2, 2))
    return mx.array(reference[rows])

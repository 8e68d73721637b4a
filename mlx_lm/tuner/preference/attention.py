"""Attention of a batch's sequences, through mlx-lm's own cache protocol; and attention that keeps no scores.

A packed batch runs all its tokens as sequences of one token, each prompt's once. What tells sequences apart are
positions and attention, and mlx-lm's models leave both to their cache: `PackedCache` answers with each token's position
in its own sequence, and gathers each sequence's queries and keys before it attends. Layers that read one token after
another, by a convolution or a recurrence, have these functions alone run on each sequence's tokens in a row: on the
beginnings of all prompts first, and from the states these leave on what follows, once for each response.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ...models.base import create_attention_mask, create_causal_mask
from ...models.cache import ArraysCache
from .cpu_attention import BLOCK_SCORES, added, blocks_of, causal_attention
from .cuda_copies import fit, rows_of

# MLX's CUDA backend has a fused backward pass of attention for lengths that are multiples of this.
CUDA_TILE = 128
# Where there is none, a query's scores are kept for each key. With so many keys a head's dimension they are more than
# what it takes to compute them again, which is done for a block of queries at a time.
KEYS_A_DIMENSION = 4


def on_cuda():
    """Whether the default device is a GPU of NVIDIA's."""
    return mx.default_device() == mx.gpu and not mx.metal.is_available()


# Scores that such a block of queries has at most. On CUDA some fifty kernels have to be launched for each block.
MOST_SCORES = 2**25 if on_cuda() else BLOCK_SCORES


class Parts(NamedTuple):
    """Parts of the sequences of a packed batch of N tokens, each computed at once; -1 stands for nowhere.

    A part has T positions of each of K sequences, of which the last Q ask: each attends up to its own. Queries and keys
    are numbered from the first part's to the last's.

    Attributes:
        keys: of each part `(K, T)` int32, which token of the batch stands there; any one behind the end.
        answered: of each part `(K, Q)` int32, the token whose output a query's is.
        outputs: `(N,)` int32, the query whose output is the token's.
        uses: `(R, N)` int32, the keys that are the token: a prompt's tokens are keys of both its sequences.
    """

    keys: tuple
    answered: tuple
    outputs: mx.array
    uses: mx.array


class Layout(NamedTuple):
    """Where the N tokens of a packed batch belong.

    Attributes:
        places: `(N,)` int32, each token's position in its own sequence.
        attended: the `Parts` of attention, each from a sequence's beginning on.
        recurrent: those of convolutions and recurrences, where there are such: each position once. Where a first part
            has a row for each pair, and the others two, it is what a pair's sequences both begin with.
    """

    places: mx.array
    attended: Parts
    recurrent: tuple = ()


@dataclass(frozen=True)
class Window:
    """In a mask's place: causal, and no farther back than so many tokens."""

    size: int


def make_parts(length, sequences, spans):
    """The `Parts` of a packed batch, as numpy's arrays.

    Args:
        length: N, its tokens, padding included.
        sequences: 2B int arrays, the numbers of each sequence's tokens; sequence i and B + i begin with one prompt's.
        spans: `[(rows, start, first, stop)]`, a part each: which sequences, from which position on and up to which, and
            from which on they ask. A token has to ask in one of them.
    """
    outputs = np.full(length, -1, np.int32)
    uses, used = np.full((2, length), -1, np.int32), np.zeros(length, np.int32)
    all_keys, answered, queries_before, keys_before = [], [], 0, 0
    for rows, start, first, stop in spans:
        keys = np.zeros((len(rows), stop - start), np.int32)
        answers = np.full((len(rows), stop - first), -1, np.int32)
        for i, row in enumerate(rows):
            tokens = sequences[row][start:stop]
            keys[i, : len(tokens)] = tokens
            uses[used[tokens], tokens] = keys_before + i * keys.shape[1] + np.arange(len(tokens))
            used[tokens] += 1
            asking = tokens[first - start :]
            # Both sequences of a pair may ask for a prompt's token; the first one's answer is taken.
            new = np.flatnonzero(outputs[asking] < 0)
            answers[i, new] = asking[new]
            outputs[asking[new]] = queries_before + i * answers.shape[1] + new
        all_keys.append(keys)
        answered.append(answers)
        queries_before, keys_before = queries_before + answers.size, keys_before + keys.size
    return Parts(tuple(all_keys), tuple(answered), outputs, uses)


class RowCache:
    """In a layer's cache's place where rows are sequences: keeps nothing, and attends without keeping scores."""

    offset = 0

    def update_and_fetch(self, keys, values):
        """The keys and values as they are."""
        return keys, values

    def make_mask(self, N, return_array=False, window_size=None):
        """What upstream answers where there is no cache."""
        return create_attention_mask(mx.zeros((1, N)), None, window_size, return_array)

    def attend(self, queries, keys, values, scale, mask, sinks):
        """As `base.scaled_dot_product_attention`."""
        return attention(queries, keys, values, scale, mask, sinks)


class PackedRows:
    """Tokens of a packed batch, `(N, ...)`, as rows of `Parts`, and back."""

    def __init__(self, parts):
        self._shapes = [(*own.shape, keys.shape[1]) for own, keys in zip(parts.answered, parts.keys, strict=True)]
        queries = [keys[:, -length:] for keys, (_, length, _) in zip(parts.keys, self._shapes, strict=True)]
        queries, keys, answered = (
            mx.concatenate([part.reshape(-1) for part in each]) for each in (queries, parts.keys, parts.answered)
        )
        self._queries = Rows(queries, parts.outputs[None])
        self._keys = Rows(keys, parts.uses)
        self._outputs = Rows(parts.outputs, answered[None])

    def in_rows(self, function, arrays):
        """What a recurrence's function gives for tokens that come as sequences of one, `(N, 1, ...)`.

        Args:
            function: takes sequences `(K, T, ...)` and the state before them, None at the beginning; returns outputs
                `(K, T, ...)` and the state behind them, `(K, ...)`.
            arrays: what it takes, each `(N, 1, ...)`.
        """
        taken = gathered(arrays, [self._keys] * len(arrays))
        columns = [self._split(rows, 2, x.shape[2:]) for rows, x in zip(taken, arrays, strict=True)]
        first, *others = (rows for rows, *_ in self._shapes)
        begun, state, answers = sum(others) == 2 * first, None, []
        for part in zip(*columns, strict=True):
            before = None if state is None else mx.concatenate([state] * (len(part[0]) // first))
            out, behind = function(*part, before)
            if begun and state is None:
                state = behind
            answers.append(out)
        return self._answers(answers)[:, None]

    def _answers(self, parts):
        """The tokens' `(N, ...)` of what the parts' queries have, `(K, Q, ...)`."""
        return gathered([mx.concatenate([part.flatten(0, 1) for part in parts])], [self._outputs])[0]

    def _split(self, x, column, shape):
        """The parts' `(K, T, *shape)` of `x` `(number of queries or keys, ...)`."""
        sizes = [own[0] * own[column] for own in self._shapes]
        parts = mx.split(x, np.cumsum(sizes)[:-1].tolist())
        return [part.reshape(own[0], own[column], *shape) for part, own in zip(parts, self._shapes, strict=True)]


class PackedCache(RowCache, PackedRows):
    """In every layer's cache's place on a packed batch of N sequences of one token, which a `Layout` tells."""

    def __init__(self, layout):
        super().__init__(layout.attended)
        self.offset = layout.places

    def make_mask(self, N, return_array=False, window_size=None):
        """What `attend` reads; a mask to compute with cannot be had."""
        return "causal" if window_size is None else Window(window_size)

    def attend(self, queries, keys, values, scale, mask, sinks):
        """Attention of each sequence within itself.

        Args:
            queries, keys, values: `(N, H, 1, D)`; keys and values may have fewer heads.
            scale, sinks: as for `mx.fast.scaled_dot_product_attention`.
            mask: what `make_mask` gave.

        Returns:
            `(N, H, 1, D)`.

        Raises:
            ValueError: the mask is another, or there is more than one token a row.
        """
        if not (mask == "causal" or isinstance(mask, Window)) or queries.shape[2] != 1 or keys.shape[2] != 1:
            raise ValueError("a packed batch has no mask, and no rows, of a model's own")
        arrays, taken = [queries, keys, values], [self._queries, self._keys, self._keys]
        shapes = [(x.shape[1], x.shape[3]) for x in arrays]
        columns = map(self._split, gathered(arrays, taken), (1, 2, 2), shapes)
        out = []
        for inputs, (_, length, whole) in zip(zip(*columns, strict=True), self._shapes, strict=True):
            seen = mask
            if isinstance(mask, Window):
                before = whole - length
                seen = create_causal_mask(length, before, window_size=mask.size) if whole > mask.size else "causal"
            inputs = (x.swapaxes(1, 2) for x in inputs)
            out.append(attention(*inputs, scale, seen, sinks).swapaxes(1, 2))
        return self._answers(out)[:, :, None]


class PackedState(ArraysCache):
    """In a recurrent layer's cache's place on a packed batch: nothing stands before a token, and nothing is kept.

    Args:
        tokens: N.
        channels: of what the model's layers convolve, a set.
    """

    lengths = None

    def __init__(self, tokens, channels):
        self._channels = channels
        # Where it is known how wide. Booleans, which joined to other values take their dtype.
        self._before = mx.zeros((tokens, 0, *channels), mx.bool_) if len(channels) == 1 else None

    def __getitem__(self, i):
        return None if i else self._before

    def __setitem__(self, i, value):
        """What was convolved last is not needed; `ValueError` for a state, of a recurrence that is unknown here."""
        if value is not None and value.shape[-1] not in self._channels:
            raise ValueError("a packed batch has no states of a model's own")

    def advance(self, N):
        """Nothing: a packed batch is whole."""

    def make_mask(self, N):
        """What upstream answers where there is no cache."""


class Rows:
    """Which of N rows are taken, and where the gradients of each come from.

    Args:
        index: `(M,)` int32, what is taken; -1 for a row that nobody reads.
        sources: `(R, N)` int32: row n was taken as each of these rows of the result, -1 standing for none. Where a row
            was taken more often, the gradients of the others are zero.
    """

    def __init__(self, index, sources):
        self.index, self.sources = index, sources
        self._places = mx.maximum(index, 0)
        self._known = [(mx.maximum(row, 0), (row >= 0)[:, None]) for row in sources]

    def of(self, x):
        """The rows `(M, ...)` of `x` `(N, ...)`."""
        return _taken(x.reshape(len(x), -1), self._places).reshape(-1, *x.shape[1:])

    def back(self, slope):
        """The gradient `(N, ...)` of such an x."""
        rows = slope.reshape(len(slope), -1)
        total = sum(mx.where(known, _taken(rows, source), 0) for source, known in self._known)
        return total.reshape(-1, *slope.shape[1:])


def gathered(arrays, rows):
    """Rows of arrays, whose gradients are gathered too: faster than scattered, and the same at every run.

    Args:
        arrays: each `(N, ...)`.
        rows: the `Rows` of each.

    Returns:
        A list of `(M, ...)`.
    """
    # A kernel for one array alone would have to be compiled too, and saves little.
    at_once = on_cuda() and len(arrays) > 1 and fit(arrays)

    @mx.custom_function
    def gather(*arrays):
        if at_once:
            return tuple(rows_of(arrays, [own.index[None] for own in rows]))
        return tuple(own.of(x) for own, x in zip(rows, arrays, strict=True))

    @gather.vjp
    def backward(_, slopes, __):
        if at_once:
            return tuple(rows_of(slopes, [own.sources for own in rows]))
        return tuple(own.back(slope) for own, slope in zip(rows, slopes, strict=True))

    return list(gather(*arrays))


def _taken(x, index):
    """`x[index]` of `(N, D)`, in words of eight bytes where they fit: MLX takes as long for a word of two."""
    return x.view(mx.uint64)[index].view(x.dtype) if fit([x]) else x[index]


def attention(queries, keys, values, scale, mask=None, sinks=None):
    """MLX's attention with a backward pass that is right, and keeps no score for each query and key."""
    call = partial(mx.fast.scaled_dot_product_attention, scale=scale, sinks=sinks)
    causal = isinstance(mask, str)
    half, narrow = queries.dtype in (mx.float16, mx.bfloat16), max(queries.shape[3], values.shape[3]) <= 128
    if on_cuda() and half and narrow:
        return tokens_first(call(queries, keys, values, mask=mask))
    whole = all(x.dtype == mx.float32 for x in (queries, keys, values))
    if causal and sinks is None and whole and mx.default_device() == mx.cpu:
        return causal_attention(queries, keys, values, scale)
    # Sinks, and masks of numbers, may have gradients of their own.
    plain = sinks is None and (mask is None or causal or mask.dtype == mx.bool_)
    if plain and keys.shape[2] > KEYS_A_DIMENSION * queries.shape[3]:
        return _blocked(call, queries, keys, values, mask)
    return call(queries, keys, values, mask=mask)


@mx.custom_function
def tokens_first(x):
    """`x` `(B, H, T, D)`, whose gradient is laid out as `(B, T, H, D)` however it comes.

    MLX on CUDA keeps the plan of attention's backward pass under the layouts of queries, keys and values, not that of
    the output's gradient: with two layouts of it for one shape, the second one's gradients are wrong. Upstream's models
    give it this one.
    """
    return x


@tokens_first.vjp
def _tokens_first_vjp(x, slope, _):
    return mx.contiguous(slope.swapaxes(1, 2)).swapaxes(1, 2)


def _blocked(call, queries, keys, values, mask):
    """Attention in blocks of queries, each computed again in the backward pass."""
    length, whole = queries.shape[2], keys.shape[2]
    causal, spans = isinstance(mask, str), blocks_of(queries, keys, MOST_SCORES)

    def block(queries, keys, values, start, stop):
        whole_mask = mask is None or causal or mask.ndim < 2 or mask.shape[-2] == 1
        return call(queries, keys, values, mask=mask if whole_mask else mask[..., start:stop, :])

    def seen(stop):
        """How many keys a block's queries may attend to: the last query to the last key."""
        return whole - length + stop if causal else whole

    @mx.custom_function
    def blocks(queries, keys, values):
        parts = []
        for start, stop in spans:
            own = mx.depends([queries[:, :, start:stop]], parts[-1:])[0]
            parts.append(block(own, keys[:, :, : seen(stop)], values[:, :, : seen(stop)], start, stop))
        return mx.concatenate(parts, axis=2)

    @blocks.vjp
    def backward(inputs, cotangent, _):
        queries, keys, values = inputs
        slopes, sums = [], []
        for start, stop in spans:
            own, slope = mx.depends([queries[:, :, start:stop], cotangent[:, :, start:stop]], sums)
            others = [x[:, :, : seen(stop)] for x in (keys, values)]
            _, (first, *rest) = mx.vjp(partial(block, start=start, stop=stop), [own, *others], [slope])
            slopes.append(first)
            sums = [added(total.astype(mx.float32), x) for total, x in zip(sums, rest, strict=True)] if sums else rest
            # Left for later, the queries' gradients would keep each block's scores.
            sums = mx.depends(sums, [first])
        return mx.concatenate(slopes, axis=2), *(
            total.astype(x.dtype) for total, x in zip(sums, (keys, values), strict=True)
        )

    return blocks(queries, keys, values)

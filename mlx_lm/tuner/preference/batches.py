"""Batches of pairs: pairs of like length together, few distinct shapes, the order from the seed alone."""

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from .lean import ATTENTION_TILE, on_cuda
from .packing import Layout, Part, Pass, make_pass

# How a batch is arranged: all its tokens in one row, a prompt's once; rows that go on from a cache with a prompt's
# first tokens; or rows with a prompt each.
ARRANGEMENTS = PACKED, CACHED, PLAIN = "packed", "cached", "plain"
# A row group costs a forward pass of its own; it is worth that where it saves this share of the tokens.
GROUP_SAVING = 0.04
# A shared prompt shorter than this costs more in a pass of its own than it saves.
SHORTEST_PREFIX = 8


class Device(NamedTuple):
    """How batches are rounded and split on a kind of device.

    More groups pad less, but on a GPU each way to split a batch is a shape of its own, and so is each length: a step
    is traced and compiled for every one.

    Attributes:
        multiple: the lengths of rows are rounded up to this.
        packed_multiple: those of a packed row and of attention in it; CUDA's attention needs its tile, and a row of
            all tokens loses little by it.
        scored_steps: so many numbers of scored tokens there are in a packed row from each power of two to the next;
            0 takes them as they are.
        most_groups: row groups of a batch.
        attention_groups: the same in a packed row, where they are attention's alone.
        least_saving: tokens that a pass of its own, of a prefix or a row group, has to save. With CUDA it is what
            launching its kernels takes as long as (1.24 B parameters on an H200).
        least_products: products of a query and a key that a part of its own has to save attention, likewise.
    """

    multiple: int
    packed_multiple: int
    scored_steps: int
    most_groups: int
    attention_groups: int
    least_saving: int
    least_products: int


CPU = Device(1, 1, 0, 4, 4, 0, 0)
METAL = Device(16, 32, 2, 3, 1, 0, 2**18)
CUDA = Device(16, ATTENTION_TILE, 2, 3, 1, 512, 2**21)


def device():
    """The `Device` that the default device is."""
    if mx.default_device() != mx.gpu:
        return CPU
    return CUDA if on_cuda() else METAL


class Group(NamedTuple):
    """Rows of like length that run together.

    Attributes:
        tokens: `(K, T)` int32, right-padded with 0.
        prefix_rows: `(K,)` int32, the row of the batch's prefix that each row continues.
    """

    tokens: mx.array
    prefix_rows: mx.array


class Batch(NamedTuple):
    """B pairs as arrays; a pair's chosen response is row i, its rejected one row B + i.

    Attributes:
        prefix: `(B, S)` int32, the first S tokens of each prompt, for the cache; S is 0 where there is none.
        groups: the rows' tokens after the prefix, without each row's last token; or one row with all the tokens.
        layout: the `Layout` of that one row; an empty tuple where there are rows.
        positions: `(N,)` int32, where in the groups' flattened positions each response token is predicted.
        targets: `(N,)` int32, the token predicted there.
        response_index: `(2B, R)` int32, each row's entries of `positions` in order; N where there is none.
        lengths: `(2B,)` float32, response tokens.
        common_lengths: `(2B,)` float32, the shorter response's length of each pair.
        counts: `(B,)` float32, 1 for a pair and 0 for one that only fills up the batch.
        weights, margins: `(B,)` float32, the rows' `weight` and `margin`.
        tokens: the prompts' and responses' tokens, each prompt counted for both responses, as `()` int32.
    """

    prefix: mx.array
    groups: tuple
    layout: tuple
    positions: mx.array
    targets: mx.array
    response_index: mx.array
    lengths: mx.array
    common_lengths: mx.array
    counts: mx.array
    weights: mx.array
    margins: mx.array
    tokens: mx.array


def as_batch(parts):
    """The `Batch` of the plain tuples into which MLX's compiler has turned one."""
    batch = Batch(*parts)
    layout = ()
    if batch.layout:
        *passes, scored = batch.layout
        passes = [Pass(*made)._replace(parts=tuple(Part(*part) for part in made[1])) for made in passes]
        layout = Layout(*passes, scored)
    return batch._replace(groups=tuple(Group(*group) for group in batch.groups), layout=layout)


def round_up(number, multiple):
    return -(-number // multiple) * multiple


def plan(lengths, size, arrangement):
    """Rows grouped into batches of like length.

    Args:
        lengths: `(n, 3)` int, tokens of prompt, chosen and rejected of each row.
        size: pairs in a batch; the last batch has what is left.
        arrangement: as for `make_batch`; where prompts go through a cache, or on a CPU to attention apart, they
            should be of like length too; elsewhere that would only make more shapes.

    Returns:
        A list of int arrays that holds each row once.
    """
    lengths = np.asarray(lengths).reshape(-1, 3)
    responses = lengths[:, 1:].max(axis=1)
    total = lengths[:, 0] + responses
    by_prompt = arrangement == CACHED or (arrangement == PACKED and device() == CPU)
    order = np.lexsort((responses, lengths[:, 0] // 16)) if by_prompt else np.lexsort((responses, total))
    return [order[start : start + size] for start in range(0, len(order), size)]


def order_of_epoch(batches, seed, epoch):
    """A permutation of the batches' numbers that depends on the seed and the epoch alone."""
    return np.random.default_rng([seed, epoch]).permutation(batches)


def make_batch(pairs, arrangement, multiple=None, size=None):
    """Arrays for a list of pairs.

    Args:
        pairs: B `Pair`s.
        arrangement: PACKED, CACHED or PLAIN.
        multiple: sequence lengths are rounded up to this; by default what suits the device.
        size: fill up to so many pairs with repetitions that count for nothing.

    Returns:
        `(Batch, processed, padding)`: the tokens that the model's body will run over, padding included, and
        how many of them are padding.
    """
    multiple = multiple or (device().packed_multiple if arrangement == PACKED else device().multiple)
    counts = [1.0] * len(pairs)
    if size is not None and len(pairs) < size:
        counts += [0.0] * (size - len(pairs))
        pairs = list(pairs) + [pairs[0]] * (size - len(pairs))
    responses = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    if arrangement == PACKED:
        prefix, groups, layout, scored, padding = _pack(pairs, responses, multiple)
    else:
        prefix, groups, layout, scored, padding = _lay_out(pairs, responses, multiple, arrangement == CACHED)
    positions, targets, index = scored
    lengths = np.array([len(response) for response in responses], np.float32)
    common = np.minimum(lengths[: len(pairs)], lengths[len(pairs) :])
    batch = Batch(
        prefix=mx.array(prefix),
        groups=tuple(Group(mx.array(block), mx.array(np.array(rows, np.int32))) for block, rows in groups),
        layout=layout,
        positions=mx.array(positions),
        targets=mx.array(targets),
        response_index=mx.array(index),
        lengths=mx.array(lengths),
        common_lengths=mx.array(np.concatenate([common, common])),
        counts=mx.array(np.array(counts, np.float32)),
        weights=mx.array(np.array([pair.weight for pair in pairs], np.float32)),
        margins=mx.array(np.array([pair.margin for pair in pairs], np.float32)),
        tokens=mx.array(
            sum(
                int(count) * (2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected))
                for count, pair in zip(counts, pairs, strict=True)
            ),
            mx.int32,
        ),
    )
    return batch, prefix.size + sum(block.size for block, _ in groups), padding


def _pack(pairs, responses, multiple):
    """All tokens in one row: the prompts, then the responses without their last tokens.

    Returns:
        `(prefix, groups, layout, scored, padding)`: as in `Batch`, the first two not yet as arrays of MLX; what
        `_scored` says; how many tokens are padding.
    """
    prompts = [pair.prompt for pair in pairs]
    pieces = [*prompts, *(response[:-1] for response in responses)]
    ends = np.cumsum([len(piece) for piece in pieces])
    numbers = [np.arange(end - len(piece), end) for piece, end in zip(pieces, ends, strict=True)]
    sequences = [
        np.concatenate([numbers[row % len(pairs)], numbers[len(pairs) + row]]) for row in range(len(responses))
    ]
    places = [sequence[-len(response) :] for sequence, response in zip(sequences, responses, strict=True)]
    block = np.zeros((1, round_up(int(ends[-1]), multiple)), np.int32)
    block[0, : ends[-1]] = np.concatenate(pieces)
    in_sequence = np.zeros(block.size, np.int32)
    for sequence in sequences:
        in_sequence[sequence] = np.arange(len(sequence))
    asking, asked = [], 0
    for sequence, response in zip(sequences, responses, strict=True):
        numbers = np.full(len(sequence), -1)
        numbers[-len(response) :] = np.arange(asked, asked + len(response))
        asking.append(numbers)
        asked += len(response)
    # A prompt's last token is asked for by both responses in the last layer.
    shared = min(map(len, prompts)) - 1
    shared -= shared % multiple
    if shared < SHORTEST_PREFIX or len(pairs) * shared**2 < device().least_products:
        shared = 0
    lengths = [max(1, len(sequence) - shared) for sequence in sequences]
    groups = [(rows, shared + width) for rows, width in _row_groups(lengths, multiple, device().attention_groups)]
    count = sum(map(len, responses))
    if device().scored_steps:
        octave = 2 ** (count - 1).bit_length() // 2
        count = round_up(count, max(multiple, octave // device().scored_steps))
    scored = positions, *_ = _scored(places, responses, count, max(width for _, width in groups))
    body = make_pass(block.size, in_sequence, sequences, sequences, groups, shared)
    last = make_pass(block.size, in_sequence[positions], sequences, asking, groups, shared)
    layout = Layout(body, last, mx.array(positions))
    return np.zeros((len(pairs), 0), np.int32), [(block, [0])], layout, scored, block.size - int(ends[-1])


def _lay_out(pairs, responses, multiple, share):
    """Rows of a prompt and a response; with `share`, without what their prompts have in common; returns as `_pack`."""
    shared = min(len(pair.prompt) for pair in pairs) - 1 if share else 0
    shared -= shared % multiple
    if shared < SHORTEST_PREFIX or len(pairs) * shared < device().least_saving:
        shared = 0
    rows = [[*pairs[i % len(pairs)].prompt[shared:], *response[:-1]] for i, response in enumerate(responses)]
    groups, places, offset = [], [None] * len(rows), 0
    for members, width in _row_groups([len(row) for row in rows], multiple, device().most_groups):
        block = np.zeros((len(members), width), np.int32)
        for i, row in enumerate(members):
            block[i, : len(rows[row])] = rows[row]
            stop = offset + i * width + len(rows[row])
            places[row] = np.arange(stop - len(responses[row]), stop)
        groups.append((block, [row % len(pairs) for row in members]))
        offset += block.size
    prefix = np.array([pair.prompt[:shared] for pair in pairs], np.int32).reshape(len(pairs), shared)
    count, width = (round_up(number, multiple) for number in (sum(map(len, responses)), max(map(len, responses))))
    return prefix, groups, (), _scored(places, responses, count, width), offset - sum(map(len, rows))


def _scored(places, responses, count, width):
    """`positions`, `targets` and `response_index` of a batch, N being `count` and R `width`.

    Args:
        places: where in the flattened groups each row's response tokens are predicted.
    """
    ends = np.cumsum([len(response) for response in responses])
    index = np.full((len(responses), width), count, np.int32)
    positions, targets = np.zeros(count, np.int32), np.zeros(count, np.int32)
    positions[: ends[-1]], targets[: ends[-1]] = np.concatenate(places), np.concatenate(responses)
    for row, (response, end) in enumerate(zip(responses, ends, strict=True)):
        index[row, : len(response)] = np.arange(end - len(response), end)
    return positions, targets, index


def _row_groups(lengths, multiple, most):
    """Rows split by length into the few groups that pad least, as `[(rows, width)]` from short to long."""
    order = np.argsort(lengths, kind="stable")
    widths = np.array([round_up(lengths[row], multiple) for row in order])
    count, most = len(order), min(most, len(order))
    # costs[k, n]: the fewest tokens in which the n shortest rows run as k groups, the last from row cuts[k, n] on.
    costs, cuts = np.full((most + 1, count + 1), np.inf), np.zeros((most + 1, count + 1), int)
    costs[0, 0] = 0
    for groups in range(1, most + 1):
        for stop in range(1, count + 1):
            choices = costs[groups - 1, :stop] + np.arange(stop, 0, -1) * widths[stop - 1]
            cuts[groups, stop] = cut = np.argmin(choices)
            costs[groups, stop] = choices[cut]
    price = max(GROUP_SAVING * costs[1, count], device().least_saving)
    groups = 1 + int(np.argmin(costs[1:, count] + np.arange(most) * price))
    split, stop = [], count
    for k in range(groups, 0, -1):
        split.insert(0, (sorted(order[cuts[k, stop] : stop].tolist()), int(widths[stop - 1])))
        stop = cuts[k, stop]
    return split

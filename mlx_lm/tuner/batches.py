"""Batches of pairs: pairs of like length together, few distinct shapes, the order from the seed alone."""

from typing import NamedTuple

import mlx.core as mx
import numpy as np

# A row group costs a forward pass of its own; it is worth that where it saves this share of the tokens.
GROUP_SAVING = 0.04
# More groups pad less, but on a GPU each way to split a batch is a shape to trace the step for.
MOST_GROUPS, MOST_GROUPS_ON_GPU = 4, 3
# A shared prompt shorter than this costs more in a pass of its own than it saves.
SHORTEST_PREFIX = 8
# On CUDA a pass has to save so many tokens: launching its kernels takes that long (1.24 B parameters on an H200).
PASS_ON_CUDA = 512


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
        prefix: `(B, S)` int32, the first S tokens of each prompt; S is 0 where prompts are not shared.
        groups: the rows' tokens after the prefix, without each row's last token.
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
    positions: mx.array
    targets: mx.array
    response_index: mx.array
    lengths: mx.array
    common_lengths: mx.array
    counts: mx.array
    weights: mx.array
    margins: mx.array
    tokens: mx.array


def round_up(number, multiple):
    return -(-number // multiple) * multiple


def length_multiple():
    """What sequence lengths are rounded up to on the default device.

    A compiled step is traced anew for each shape, so a GPU should see few of them.
    """
    return 16 if mx.default_device() == mx.gpu else 1


def most_groups():
    """How many row groups a batch may have on the default device."""
    return MOST_GROUPS if mx.default_device() != mx.gpu else MOST_GROUPS_ON_GPU


def least_saving():
    """How many tokens a pass of its own, of a prefix or a row group, has to save on the default device."""
    return PASS_ON_CUDA if mx.default_device() == mx.gpu and not mx.metal.is_available() else 0


def plan(lengths, size, share_prompt):
    """Rows grouped into batches of like length.

    Args:
        lengths: `(n, 3)` int, tokens of prompt, chosen and rejected of each row.
        size: pairs in a batch; the last batch has what is left.
        share_prompt: whether prompts will be shared, so that they should be of like length too.

    Returns:
        A list of int arrays that holds each row once.
    """
    lengths = np.asarray(lengths).reshape(-1, 3)
    responses = lengths[:, 1:].max(axis=1)
    total = lengths[:, 0] + responses
    order = np.lexsort((responses, lengths[:, 0] // 16)) if share_prompt else np.lexsort((responses, total))
    return [order[start : start + size] for start in range(0, len(order), size)]


def order_of_epoch(batches, seed, epoch):
    """A permutation of the batches' numbers that depends on the seed and the epoch alone."""
    return np.random.default_rng([seed, epoch]).permutation(batches)


def make_batch(pairs, share_prompt, multiple=None, size=None):
    """Arrays for a list of pairs.

    Args:
        pairs: B `Pair`s.
        share_prompt: whether to lift the prompts' common number of tokens into a prefix.
        multiple: sequence lengths are rounded up to this; by default the device's `length_multiple`.
        size: fill up to so many pairs with repetitions that count for nothing.

    Returns:
        `(Batch, processed, padding)`: the tokens that the model's body will run over, padding included, and
        how many of them are padding.
    """
    multiple = multiple or length_multiple()
    counts = [1.0] * len(pairs)
    if size is not None and len(pairs) < size:
        counts += [0.0] * (size - len(pairs))
        pairs = list(pairs) + [pairs[0]] * (size - len(pairs))
    shared = min(len(pair.prompt) for pair in pairs) - 1 if share_prompt else 0
    shared -= shared % multiple
    if shared < SHORTEST_PREFIX or len(pairs) * shared < least_saving():
        shared = 0
    prompts = [pair.prompt[shared:] for pair in pairs] * 2
    responses = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    groups = _row_groups([len(p) + len(r) - 1 for p, r in zip(prompts, responses, strict=True)], multiple)
    lengths = np.array([len(response) for response in responses], np.float32)
    common = np.minimum(lengths[: len(pairs)], lengths[len(pairs) :])
    tokens, index, positions, targets = _lay_out(prompts, responses, groups, multiple)
    batch = Batch(
        prefix=mx.array(np.array([pair.prompt[:shared] for pair in pairs], np.int32).reshape(len(pairs), shared)),
        groups=tuple(
            Group(mx.array(block), mx.array(np.array(rows, np.int32) % len(pairs)))
            for block, (rows, _) in zip(tokens, groups, strict=True)
        ),
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
    needed = sum(len(prompt) + len(response) - 1 for prompt, response in zip(prompts, responses, strict=True))
    run = sum(len(rows) * width for rows, width in groups)
    return batch, len(pairs) * shared + run, run - needed


def _row_groups(lengths, multiple):
    """Rows split by length into the few groups that pad least, as `[(rows, width)]` from short to long."""
    order = np.argsort(lengths, kind="stable")
    widths = np.array([round_up(lengths[row], multiple) for row in order])
    count, most = len(order), min(most_groups(), len(order))
    # costs[k, n]: the fewest tokens in which the n shortest rows run as k groups, the last from row cuts[k, n] on.
    costs, cuts = np.full((most + 1, count + 1), np.inf), np.zeros((most + 1, count + 1), int)
    costs[0, 0] = 0
    for groups in range(1, most + 1):
        for stop in range(1, count + 1):
            choices = costs[groups - 1, :stop] + np.arange(stop, 0, -1) * widths[stop - 1]
            cuts[groups, stop] = cut = np.argmin(choices)
            costs[groups, stop] = choices[cut]
    price = max(GROUP_SAVING * costs[1, count], least_saving())
    groups = 1 + int(np.argmin(costs[1:, count] + np.arange(most) * price))
    split, stop = [], count
    for k in range(groups, 0, -1):
        split.insert(0, (sorted(order[cuts[k, stop] : stop].tolist()), int(widths[stop - 1])))
        stop = cuts[k, stop]
    return split


def _lay_out(prompts, responses, groups, multiple):
    """Token blocks of the groups, and where each response token is predicted in them."""
    count = round_up(sum(len(response) for response in responses), multiple)
    index = np.full((len(responses), round_up(max(len(r) for r in responses), multiple)), count, np.int32)
    positions, targets = np.zeros(count, np.int32), np.zeros(count, np.int32)
    tokens, scored, offset = [], 0, 0
    for rows, width in groups:
        block = np.zeros((len(rows), width), np.int32)
        for i, row in enumerate(rows):
            prompt, response = prompts[row], responses[row]
            sequence = [*prompt, *response]
            block[i, : len(sequence) - 1] = sequence[:-1]
            here = slice(scored, scored + len(response))
            positions[here] = offset + i * width + len(prompt) - 1 + np.arange(len(response))
            targets[here] = response
            index[row, : len(response)] = np.arange(scored, scored + len(response))
            scored += len(response)
        tokens.append(block)
        offset += block.size
    return tokens, index, positions, targets

"""Attention in blocks of queries; causal in float32 on a CPU, where exponentials take most of the time.

MLX's own computes all scores of a square, the upper half of which counts for nothing, with an exponential of twice to
three times the time of libm's pow. Here a block of queries sees the keys up to its last one, from the first one in its
window on, heads that share keys are rows of one product, and what a softmax divides by goes into the smaller arrays.
"""

from itertools import pairwise

import mlx.core as mx

from ...models.activations import fast_exp, fast_max
from ...models.base import create_causal_mask

# More blocks compute less of the upper half, in more and smaller products.
BLOCKS = 8
# Scores in a block at most, but for blocks of LEAST queries.
BLOCK_SCORES, LEAST = 2**23, 32


def blocks_of(queries, keys, most, count=1, whole=1):
    """`[(start, stop)]`: the queries `(B, H, Q, D)` in `count` blocks, or in more of at most so many scores.

    As many in one as in another, but for less than `whole`, of which each begins at a multiple: behind larger ones, a
    few could be left over, for which Metal's kernel is another one, without a gradient.
    """
    batch, heads, length, _ = queries.shape
    size = max(LEAST, min(-(-length // count), most // (batch * heads * keys.shape[2])))
    blocks = -(-length // size)
    bounds = [length * i // blocks // whole * whole for i in range(blocks)]
    return list(pairwise([*bounds, length]))


def in_blocks(queries, keys, values, spans, causal, block, gradient, shared=(), window=None):
    """Attention in blocks of queries, one after another: side by side, they would all have their scores at once.

    Args:
        queries, keys, values: `(B, H, Q, D)`, `(B, H / R, T, D)` and `(B, H / R, T, Dv)`; the queries are the last Q.
        spans: `[(start, stop)]` of the queries.
        causal: whether a block sees the keys up to its last query's alone.
        block: takes a block's queries, the keys and values that it sees, what is shared, and how many keys it sees
            before its first query's own; returns a list, of which the output `(B, H, q, Dv)` is the first.
        gradient: takes the same, the output's gradient and what `block` gave; returns those of all the arrays.
        shared: arrays that each block reads whole.
        window: of causal attention, how many keys a query sees, its own the last; None for all.

    Returns:
        `(B, H, Q, Dv)`.
    """
    before = keys.shape[2] - queries.shape[2]

    def first_of(start):
        """The first key that a block from `start` on sees."""
        return 0 if window is None else max(0, before + start + 1 - window)

    def seen(arrays, start, stop):
        """What a block sees of keys, values and what is shared, and how many keys before its first query's."""
        first = first_of(start)
        own = [*(x[:, :, first : before + stop] for x in arrays[:2]), *arrays[2:]] if causal else arrays
        return [*own, before + start - first]

    @mx.custom_function
    def attend(queries, *others):
        parts = []
        for start, stop in spans:
            own = mx.depends([queries[:, :, start:stop]], [part[0] for part in parts[-1:]])[0]
            parts.append(block(own, *seen(others, start, stop)))
        return tuple(mx.concatenate(column, axis=2) for column in zip(*parts, strict=True))

    @attend.vjp
    def backward(inputs, cotangents, outputs):
        queries, *others = inputs
        slopes, sums = [], []
        for start, stop in spans:
            own, slope = mx.depends([x[:, :, start:stop] for x in (queries, cotangents[0])], sums)
            found = (x[:, :, start:stop] for x in outputs)
            first, *rest = gradient(own, *seen(others, start, stop), slope, *found)
            slopes.append(first)
            # What is shared is added up whole.
            places = [first_of(start)] * 2 + [0] * len(shared)
            if sums:
                rest = [_added(*told) for told in zip(sums, rest, places, strict=True)]
            else:
                # Keys before the first window are seen by none.
                unseen = [[(0, 0)] * 2 + [(place, 0), (0, 0)] for place in places]
                rest = [mx.pad(x, own) if own[2][0] else x for x, own in zip(rest, unseen, strict=True)]
            # Left for later, the queries' gradients would keep each block's scores.
            sums = mx.depends(rest, [first])
        return mx.concatenate(slopes, axis=2), *(x.astype(own.dtype) for x, own in zip(sums, others, strict=True))

    return attend(queries, keys, values, *shared)[0]


def _added(total, part, first):
    """The sum, in float32, of earlier blocks' gradients and of one of their shape, or of keys from `first` on.

    Args:
        total, part: `(B, H, T, D)` and `(B, H, t, D)`, from 0 and `first` to the last keys that were seen.
    """
    total = total.astype(mx.float32)
    if first == 0 and total.shape == part.shape:
        return total + part
    both = total.shape[2] - first
    earlier = [total[:, :, :first]] if first else []
    return mx.concatenate([*earlier, total[:, :, first:] + part[:, :, :both], part[:, :, both:]], axis=2)


def causal_attention(queries, keys, values, scale, window=None):
    """As `mx.fast.scaled_dot_product_attention` with the mask "causal"; keeps a number a query for the backward pass.

    Args:
        queries, keys, values, window: as for `in_blocks`, float32.
        scale: of the scores.

    Returns:
        `(B, H, Q, Dv)`.
    """
    batch, shared = len(queries), keys.shape[1]

    def rows(x):
        """`x` `(B, H, q, ...)` as `(B, H / R, R q, ...)`: heads with the same keys one after another."""
        return x.reshape(batch, shared, -1, x.shape[-1])

    def exponents(scaled, keys, before):
        """Scores `(B, H / R, R, q, k)` of a block; minus infinity for keys behind the query, or before its window."""
        length, whole = scaled.shape[2], keys.shape[2]
        scores = (rows(scaled) @ keys.swapaxes(-1, -2)).reshape(batch, shared, -1, length, whole)
        return mx.where(create_causal_mask(length, before, window_size=window), scores, -mx.inf)

    def block(queries, keys, values, before):
        scores = exponents(scale * queries, keys, before)
        top = fast_max(scores)
        weights = fast_exp(scores - top)
        top, total = (x.reshape(*queries.shape[:3], 1) for x in (top, weights.sum(axis=-1, keepdims=True)))
        return [(rows(weights) @ values).reshape(*queries.shape[:3], -1) / total, top, total]

    def gradient(queries, keys, values, before, slope, out, top, total):
        scaled, slope = scale * queries, slope / total
        weights = fast_exp(rows(exponents(scaled, keys, before)) - rows(top))
        share = (slope * out).sum(axis=-1, keepdims=True)
        slopes = weights * (rows(slope) @ values.swapaxes(-1, -2) - rows(share))
        others = (x.swapaxes(-1, -2) @ rows(y) for x, y in ((slopes, scaled), (weights, slope)))
        return [scale * (slopes @ keys).reshape(queries.shape), *others]

    # Blocks of a window's length see hardly more than twice what counts.
    count = BLOCKS if window is None else max(BLOCKS, queries.shape[2] // window)
    spans = blocks_of(queries, keys, BLOCK_SCORES, count)
    return in_blocks(queries, keys, values, spans, True, block, gradient, window=window)

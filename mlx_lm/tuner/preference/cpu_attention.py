"""Causal attention in float32 on a CPU, where exponentials take most of the time.

MLX's own computes all scores of a square, the upper half of which counts for nothing, with an exponential of twice to
three times the time of libm's pow. Here a block of queries sees the keys up to its last one, heads that share keys are
rows of one product, and what a softmax divides by goes into the smaller arrays.
"""

import mlx.core as mx

from ...models.activations import fast_exp, fast_max

# More blocks compute less of the upper half, in more and smaller products.
BLOCKS = 8
# Scores in a block at most, but for blocks of LEAST queries.
BLOCK_SCORES, LEAST = 2**23, 32


def blocks_of(queries, keys, most, count=1):
    """`[(start, stop)]`: the queries `(B, H, Q, D)` in `count` blocks, or in more of at most so many scores."""
    batch, heads, length, _ = queries.shape
    size = max(LEAST, min(-(-length // count), most // (batch * heads * keys.shape[2])))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def added(total, part):
    """The sum of earlier blocks' gradients and of one that reaches to as many keys or more, `(B, H, T, D)`."""
    both = total.shape[2]
    total = total + part[:, :, :both]
    return total if part.shape[2] == both else mx.concatenate([total, part[:, :, both:]], axis=2)


def causal_attention(queries, keys, values, scale):
    """As `mx.fast.scaled_dot_product_attention` with the mask "causal"; keeps a number a query for the backward pass.

    Args:
        queries: `(B, H, Q, D)` float32, the last Q of T tokens.
        keys, values: `(B, H / R, T, D)` and `(B, H / R, T, Dv)` float32.
        scale: of the scores.

    Returns:
        `(B, H, Q, Dv)`.
    """
    batch, heads, length, _ = queries.shape
    shared, whole = keys.shape[1:3]
    spans = blocks_of(queries, keys, BLOCK_SCORES, BLOCKS)
    before = whole - length

    def rows(x, start, stop):
        """The block of `x` `(B, H, Q, ...)` as `(B, H / R, R q, ...)`: heads with the same keys one after another."""
        return x[:, :, start:stop].reshape(batch, shared, -1, x.shape[-1])

    def exponents(scaled, keys, start, stop):
        """Scores `(B, H / R, R, q, k)` of a block; minus infinity for keys behind the query."""
        scores = rows(scaled, start, stop) @ keys.swapaxes(-1, -2)
        scores = scores.reshape(batch, shared, -1, stop - start, keys.shape[2])
        seen = mx.arange(start + before, stop + before)[:, None] >= mx.arange(keys.shape[2])
        return mx.where(seen, scores, -mx.inf)

    def up_to(x, stop):
        return x[:, :, : before + stop]

    @mx.custom_function
    def attend(queries, keys, values):
        scaled, outs, tops, totals = scale * queries, [], [], []
        for start, stop in spans:
            # Side by side, blocks would all have their scores at once.
            scaled = mx.depends([scaled], outs[-1:])[0]
            scores = exponents(scaled, up_to(keys, stop), start, stop)
            top = fast_max(scores)
            weights = fast_exp(scores - top)
            total = weights.sum(axis=-1, keepdims=True)
            weights = weights.reshape(batch, shared, -1, weights.shape[-1])
            out = (weights @ up_to(values, stop)).reshape(batch, heads, stop - start, -1)
            total = total.reshape(batch, heads, -1, 1)
            outs.append(out / total)
            tops.append(top.reshape(total.shape))
            totals.append(total)
        return tuple(mx.concatenate(parts, axis=2) for parts in (outs, tops, totals))

    @attend.vjp
    def backward(inputs, cotangents, outputs):
        queries, keys, values = inputs
        out, tops, totals = outputs
        scaled, slope = scale * queries, cotangents[0] / totals
        shares = (slope * out).sum(axis=-1, keepdims=True)
        own, sums = [], []
        for start, stop in spans:
            scaled, slope = mx.depends([scaled, slope], sums)
            near = up_to(keys, stop)
            scores = exponents(scaled, near, start, stop)
            tall = (batch, shared, -1, near.shape[2])
            weights = fast_exp(scores.reshape(tall) - rows(tops, start, stop))
            slopes = rows(slope, start, stop) @ up_to(values, stop).swapaxes(-1, -2)
            slopes = weights * (slopes - rows(shares, start, stop))
            parts = [x.swapaxes(-1, -2) @ rows(y, start, stop) for x, y in ((slopes, scaled), (weights, slope))]
            own.append((slopes @ near).reshape(batch, heads, stop - start, -1))
            # Left for later, the queries' gradients would keep every block's scores.
            sums = mx.depends(list(map(added, sums, parts)) if sums else parts, [own[-1]])
        return scale * mx.concatenate(own, axis=2), *sums

    return attend(queries, keys, values)[0]

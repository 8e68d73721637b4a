"""What the tokens of a chunk are to each other in a recurrence, all chunks at once, and states from chunk to chunk.

Decays from token to token, decayed products of keys and queries, and the inverse of the triangular system of a chunk's
updates; `recurrent` and `state_space` say what they are for.
"""

import mlx.core as mx
import numpy as np


def in_chunks(x, chunk):
    """`x` `(B, T, ...)` as `(B, N, C, ...)`, chunks of C tokens; zeros fill the last one."""
    short = -x.shape[1] % chunk
    if short:
        x = mx.pad(x, [(0, 0), (0, short)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(len(x), -1, chunk, *x.shape[2:])


@mx.custom_function
def states_between(state, decays, turns, additions):
    """The states with which each of N chunks begins, `(N, ..., Dv, Dk)`, and the one with which the last ends.

    A chunk makes `decays * S - S @ turns + additions` of a state S. One after another, these are a product each, and
    in the backward pass another.

    Args:
        state: `(..., Dv, Dk)`, with which the first chunk begins.
        decays, turns, additions: `(N, ..., 1, 1 or Dk)`, `(N, ..., Dk, Dk)` and `(N, ..., Dv, Dk)`.
    """
    return _one_after_another(state, decays, turns, additions)


@states_between.vjp
def _states_between_vjp(arrays, slopes, outputs):
    (_, decays, turns, _), (states_slope, last_slope), (states, _) = arrays, slopes, outputs
    slopes, first = _one_after_another(last_slope, decays, turns.swapaxes(-1, -2), states_slope, -1)
    products = states.swapaxes(-1, -2) @ slopes  # whose diagonal is the decays' gradient
    of_decays = products.flatten(-2)[..., None, :: products.shape[-1] + 1]
    if decays.shape[-1] == 1:
        of_decays = of_decays.sum(-1, keepdims=True)
    return first, of_decays, -products, slopes


def _one_after_another(state, decays, turns, additions, direction=1):
    """As `states_between`; with a direction of -1 from the last chunk to the first."""
    states = [state[None]]
    for n in range(len(turns))[::direction]:
        decay, turn, addition = (x[n : n + 1] for x in (decays, turns, additions))
        # The decay is apart from the product, which a GPU computes with fewer digits.
        states.append(mx.addmm(decay * states[-1] + addition, states[-1], turn, alpha=-1.0))
    *states, last = states
    return mx.concatenate(states[::direction]), last.squeeze(0)


def decays_of(log_gates):
    """The product of the gates after token j up to i of a chunk, 0 for tokens j after i: `(..., C, C)`.

    An exponential of a sum over just these tokens; a quotient of products would overflow.

    Args:
        log_gates: `(..., C, 1)`.
    """
    sums = mx.cumsum(mx.where(_earlier(log_gates.shape[-2]), log_gates, 0.0), axis=-2)
    return mx.exp(mx.where(_earlier(log_gates.shape[-2], or_same=True), sums, -mx.inf))


def _earlier(count, or_same=False):
    """`(C, C)`, whether the second of two tokens comes before the first, or is it."""
    return mx.array(np.tri(count, k=0 if or_same else -1, dtype=bool))


def decayed_products(keys, queries, log_gates):
    """`(key scores, scores)` of tokens i and j of a chunk, each `(..., C, C)`, for one gate a token.

    d_ij k_i . k_j for tokens j before i, 0 elsewhere; and d_ij q_i . k_j for these, q_i . k_i on the diagonal.

    Args:
        keys, queries: `(..., C, Dk)`.
        log_gates: as for `decays_of`.
    """
    decays, later = decays_of(log_gates), keys.swapaxes(-1, -2)
    return mx.where(_earlier(keys.shape[-2]), decays * (keys @ later), 0.0), decays * (queries @ later)


def decayed_products_by_channel(keys, queries, log_gates):
    """The same for a gate a channel, `log_gates` `(..., C, Dk)`.

    In a block of 2 s tokens the gates between one of the first s and one of the last s are a factor of each, so that
    one product does for all of these; s doubles from 1.
    """
    rows = mx.stack([keys, queries])
    diagonal = mx.stack([mx.zeros(keys.shape[:-1]), (queries * keys).sum(-1)])
    inner = mx.broadcast_to(diagonal, (2, *mx.broadcast_shapes(keys.shape[:-1], log_gates.shape[:-1])))[..., None, None]
    size = 1  # inner: (2, ..., C / s, s, s)
    while size < keys.shape[-2]:
        gates = _halves(log_gates, size)
        until = mx.cumsum(gates[..., 1, :, :], axis=-2)
        after = mx.exp(mx.cumsum(gates[..., 0, :, :], axis=-2, reverse=True, inclusive=False))
        early = after * _halves(keys, size)[..., 0, :, :]
        across = (mx.exp(until) * _halves(rows, size)[..., 1, :, :]) @ early.swapaxes(-1, -2)  # (2, ..., P, s, s)
        upper = mx.concatenate([inner[..., 0::2, :, :], mx.zeros_like(across)], axis=-1)
        inner = mx.concatenate([upper, mx.concatenate([across, inner[..., 1::2, :, :]], axis=-1)], axis=-2)
        size *= 2
    return inner[..., 0, :, :]


def _halves(x, size):
    """`x` `(..., C, D)` as `(..., C / (2 size), 2, size, D)`."""
    return x.reshape(*x.shape[:-2], -1, 2, size, x.shape[-1])


@mx.custom_function
def inverse_of(lower):
    """The inverse of I + M for M = `lower`, `(..., C, C)`, zero on and above its diagonal, block by block.

    With inverses E and F of two blocks on the diagonal and M between them, the block between is -F M E: no more than
    what the inverse holds. A series of powers of M, whose terms cancel, would lose all digits where keys repeat.
    """
    order = np.arange(lower.shape[-1])
    inverse = mx.array(np.eye(lower.shape[-1], dtype=np.float32))
    size = 1
    while size < lower.shape[-1]:
        blocks, pairs = order // size, order // (2 * size)
        joined = (blocks[:, None] != blocks) & (pairs[:, None] == pairs)
        between = mx.where(mx.array(joined), lower, 0.0)
        inverse = inverse - between if size == 1 else mx.addmm(inverse, inverse @ between, inverse, alpha=-1.0)
        size *= 2
    return mx.broadcast_to(inverse, lower.shape)


@inverse_of.vjp
def _inverse_of_vjp(_, slope, inverse):
    transposed = inverse.swapaxes(-1, -2)
    return transposed @ -slope @ transposed

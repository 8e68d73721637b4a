"""The gated delta rule in chunks: matrix products within a chunk, a state at each chunk's start, no state a token.

A head's state S, `(Dv, Dk)`, decays by a gate a_t for each token, then takes what the value differs from what the
state has for the key:

    S_t = S_{t-1} diag(a_t) + u_t k_t^T,    u_t = beta_t (v_t - S_{t-1} diag(a_t) k_t),    o_t = S_t q_t

Within a chunk that starts with S, and with d_ij the product of the gates after j up to i,

    u_i = beta_i (v_i - S (d_i0 k_i) - sum_{j<i} ((d_ij k_i) . k_j) u_j)

is a triangular system (I + M) U = B V - B K S^T, solved once for the values and once for the keys before the states
are known. The states then follow from chunk to chunk, and all outputs from them. Products of gates are exponentials
of sums of their logarithms over just the tokens in question: no quotient of products, which overflows, and no
difference of long sums, which loses digits.

Sources: arXiv 2406.06484 (the delta rule in parallel), 2412.06464 (its gate), 2510.26692 (a gate for each channel).
"""

import sys
from contextlib import contextmanager, nullcontext
from itertools import accumulate
from typing import NamedTuple

import mlx.core as mx

from ...models import gated_delta
from .pieces import recurrences_in_pieces

# Tokens a chunk, a power of two. Products of a chunk's tokens with each other grow with it, and the number of
# products in a row shrinks.
CHUNK = 64
# Tokens, times heads and sequences, whose chunks are in memory at a time. A GPU works on many at once.
TOKENS_AT_ONCE = {mx.DeviceType.cpu: 2**12, mx.DeviceType.gpu: 2**17}


@contextmanager
def chunked_recurrences(model):
    """Within the context, gated delta layers run in chunks wherever upstream's would loop over tokens.

    Other recurrent layers run in pieces. The context must last around the backward pass too where layers are computed
    again; within another one it changes nothing more.

    Args:
        model: an mlx-lm model, with or without such layers.
    """
    chunks = gated_delta.computed_by(gated_delta_rule) if uses_gated_delta(model) else nullcontext()
    with chunks, recurrences_in_pieces(model):
        yield


def uses_gated_delta(model):
    """Whether a module of the model comes from a file that calls mlx-lm's `gated_delta_update`."""
    files = {sys.modules.get(type(module).__module__) for module in model.modules()}
    return any(getattr(file, "gated_delta_update", None) is gated_delta.gated_delta_update for file in files)


def gated_delta_rule(queries, keys, values, log_gates, betas, state=None, mask=None):
    """The gated delta rule over a sequence, as mlx-lm's loop computes it, with gradients for all but the mask.

    Sums are in float32 whatever the dtype. The backward pass keeps the inputs and a state a chunk.

    Args:
        queries, keys: `(B, T, Hk, Dk)`; keys of a norm of at most 1, or the rule itself grows without bound.
        values: `(B, T, Hv, Dv)`, Hv a multiple of Hk; each key head serves as many value heads in a row.
        log_gates: `(B, T, Hv)`, or `(B, T, Hv, Dk)` for a gate for each channel of the keys; at most 0, finite.
        betas: `(B, T, Hv)`, 0 to 2.
        state: `(B, Hv, Dv, Dk)`, or None for zeros.
        mask: `(B, T)` booleans, or None; a token that is False leaves the state as it was before it.

    Returns:
        `(outputs, state)`: `(B, T, Hv, Dv)` in the queries' dtype, and the state after the last token,
        `(B, Hv, Dv, Dk)`, float32.
    """
    batch, length, key_heads, key_width = keys.shape
    value_heads, value_width = values.shape[2:]
    if state is None:
        state = mx.zeros((batch, value_heads, value_width, key_width))
    state = state.astype(mx.float32).reshape(batch, key_heads, -1, value_width, key_width)
    gates = log_gates if log_gates.ndim == 4 else log_gates[..., None]
    arrays = queries, keys, values, gates.astype(mx.float32), betas[..., None]
    at_once = CHUNK * max(1, TOKENS_AT_ONCE[mx.default_device().type] // (CHUNK * batch * value_heads))
    starts_of_parts = range(0, length, at_once)

    def in_parts(x):
        # Not by mx.split: MLX's compiler fails where it finds the same split in both passes.
        return [x[:, start : start + at_once] for start in starts_of_parts]

    kept = [1.0] * len(starts_of_parts) if mask is None else in_parts(mask[:, :, None, None])

    @mx.custom_function
    def run(state, *arrays):
        outputs, states = [], []
        for *part, part_kept in zip(*map(in_parts, arrays), kept, strict=True):
            chunks = _prepare(*part, part_kept)
            starts, state = _states(chunks, state)
            out = chunks.queries @ starts.swapaxes(-1, -2) + chunks.scores @ _updates(chunks, starts)
            outputs.append(_as_sequence(out, part[2].shape).astype(queries.dtype))
            states.append(starts)
        return mx.concatenate(outputs, axis=1), state, mx.concatenate(states)

    @run.vjp
    def backward(inputs, cotangents, outputs):
        (_, *arrays), (output_slope, slope, _), (*_, states) = inputs, cotangents, outputs
        counts = [-(-part.shape[1] // CHUNK) for part in in_parts(output_slope)]
        states = mx.split(states, list(accumulate(counts))[:-1])
        parts = list(zip(*map(in_parts, (*arrays, output_slope)), kept, states, strict=True))
        slopes = []
        for *part, out_slope, part_kept, starts in reversed(parts):
            slope, *part_slopes = _part_slopes(part, part_kept, starts, out_slope, slope)
            # Left for later, they would keep what they are made of.
            slope = mx.depends([slope], part_slopes)[0]
            slopes.append(part_slopes)
        return slope, *(mx.concatenate(parts[::-1], axis=1) for parts in zip(*slopes, strict=True))

    outputs, last, _ = run(state, *arrays)
    return outputs, last.reshape(batch, value_heads, value_width, key_width)


def _part_slopes(arrays, kept, states, output_slope, last_slope):
    """The gradients of the state before a part of a sequence and of each of its arrays.

    Args:
        arrays: queries, keys, values, gates and betas, each `(B, T, heads, width)`.
        kept: `(B, T, 1, 1)`, or 1.0, as for `_prepare`.
        states: `(N, B, Hk, R, Dv, Dk)`, before each chunk.
        output_slope, last_slope: the gradients of the outputs `(B, T, Hv, Dv)` and of the state after the part.
    """
    # Without waiting for the gradient, all layers could prepare again before the first of them is done with.
    arrays = mx.depends(arrays, [output_slope, last_slope])
    output_slope = _in_chunks(output_slope, states.shape[2])

    @mx.custom_function
    def what_follows(state, *chunks):
        return mx.zeros(())  # it is never computed: only its gradient is asked for

    @what_follows.vjp
    def backward(inputs, *_):
        return _slopes(_Chunks(*inputs[1:]), states, output_slope, last_slope)

    def all_that_follows(state, *arrays):
        return what_follows(state, *_prepare(*arrays, kept))

    return mx.vjp(all_that_follows, [states[0], *arrays], [mx.zeros(())])[1]


class _Chunks(NamedTuple):
    """What the chunks of a sequence are for the states, float32.

    Leading axes N, B, Hk and R: chunks, sequences, key heads, value heads a key head; C tokens a chunk.

    Attributes:
        queries: `(..., C, Dk)`, decayed from the chunk's start to each token.
        keys: `(..., C, Dk)`, decayed from each token to the chunk's end; zeros where the mask is False.
        scores: `(..., C, C)`, of each query and the keys up to its own, decayed from key to query.
        values: `(..., C, Dv)`, the updates u of a chunk that starts without a state.
        reads: `(..., C, Dk)`; the updates are less by these times the state.
        decays: `(..., 1, 1 or Dk)`, of the state over the whole chunk.
    """

    queries: mx.array
    keys: mx.array
    scores: mx.array
    values: mx.array
    reads: mx.array
    decays: mx.array


def _in_chunks(x, key_heads):
    """`x` `(B, T, H, D)` as `(N, B, Hk, H / Hk, C, D)`, float32; zeros, which change no state, fill the last chunk."""
    batch, length, heads, width = x.shape
    chunk = min(CHUNK, 1 << (length - 1).bit_length())
    key_heads = min(key_heads, heads)  # a mask is one for all heads
    x = mx.pad(x.astype(mx.float32), [(0, 0), (0, -length % chunk), (0, 0), (0, 0)])
    return x.reshape(batch, -1, chunk, key_heads, heads // key_heads, width).transpose(1, 0, 3, 4, 2, 5)


def _as_sequence(x, shape):
    """`x` `(N, B, Hk, R, C, D)` as `shape`, `(B, T, Hk R, D)`."""
    return x.transpose(1, 0, 4, 2, 3, 5).reshape(shape[0], -1, *shape[2:])[:, : shape[1]]


def _prepare(queries, keys, values, log_gates, betas, kept):
    """`_Chunks` of a part of a sequence.

    Args:
        queries, keys, values, log_gates, betas: `(B, T, heads, width)`, as for `gated_delta_rule`; a width of 1 for
            betas, and for gates that all channels share.
        kept: `(B, T, 1, 1)`, False for a token that sees its own gate and update and that no other token sees, or 1.0.
    """
    key_heads = keys.shape[2]
    arrays = queries, keys, values, log_gates, betas
    queries, keys, values, log_gates, betas = (_in_chunks(x, key_heads) for x in arrays)
    kept = kept if isinstance(kept, float) else _in_chunks(kept, key_heads)
    passed, seen = log_gates * kept, keys * kept
    own = log_gates - passed
    before = mx.exp(mx.cumsum(passed, axis=-2) + own)
    after = mx.exp(mx.cumsum(passed, axis=-2, reverse=True, inclusive=False))
    product = _decayed_products if log_gates.shape[-1] == 1 else _decayed_products_by_channel
    key_scores, query_scores = product((keys, queries), seen, passed, own)
    diagonal = mx.eye(keys.shape[-2], dtype=mx.bool_)
    scores = mx.where(diagonal, (queries * keys).sum(-1, keepdims=True), query_scores)
    solved = _solve(betas * key_scores, betas * mx.concatenate([values, before * keys], axis=-1))
    width = values.shape[-1]
    return _Chunks(
        queries=before * queries,
        keys=after * seen,
        scores=scores,
        values=solved[..., :width],
        reads=solved[..., width:],
        decays=mx.exp(passed.sum(-2, keepdims=True)),
    )


def _decayed_products(rows, keys, passed, own):
    """For each array of rows, `(..., C, C)`: d_ij x_i . k_j for tokens j before i, 0 elsewhere; one gate a token.

    Args:
        rows: a sequence of `(..., C, Dk)`.
        keys: `(..., C, Dk)`.
        passed, own: `(..., C, 1)`: a gate's logarithm for the tokens after its own, and what is added for its own.
    """
    order = mx.arange(keys.shape[-2])
    earlier = order[:, None] > order  # (C, C)
    sums = mx.cumsum(mx.where(earlier, passed, 0.0), axis=-2) + own
    decays = mx.where(earlier, mx.exp(sums), 0.0)
    return [decays * (x @ keys.swapaxes(-1, -2)) for x in rows]


def _decayed_products_by_channel(rows, keys, passed, own):
    """The same for a gate a channel, `passed` and `own` `(..., C, Dk)`.

    In a block of 2 s tokens the gates between one of the first s and one of the last s are a factor of each, so that
    one product does for all of these; s doubles from 1.
    """
    rows = mx.stack(rows)
    inner = mx.zeros((*mx.broadcast_shapes(rows.shape[:-1], passed.shape[:-1]), 1, 1))  # (2, ..., C / s, s, s)
    size = 1
    while size < keys.shape[-2]:
        gates = _halves(passed, size)
        until = mx.exp(mx.cumsum(gates[..., 1, :, :], axis=-2) + _halves(own, size)[..., 1, :, :])
        after = mx.exp(mx.cumsum(gates[..., 0, :, :], axis=-2, reverse=True, inclusive=False))
        early = after * _halves(keys, size)[..., 0, :, :]
        across = (until * _halves(rows, size)[..., 1, :, :]) @ early.swapaxes(-1, -2)  # (2, ..., P, s, s)
        upper = mx.concatenate([inner[..., 0::2, :, :], mx.zeros_like(across)], axis=-1)
        inner = mx.concatenate([upper, mx.concatenate([across, inner[..., 1::2, :, :]], axis=-1)], axis=-2)
        size *= 2
    return inner[..., 0, :, :]


def _halves(x, size):
    """`x` `(..., C, D)` as `(..., C / (2 size), 2, size, D)`."""
    return x.reshape(*x.shape[:-2], -1, 2, size, x.shape[-1])


@mx.custom_function
def _solve_with_inverse(lower, right):
    inverse = _inverse(lower)
    return inverse @ right, inverse


@_solve_with_inverse.vjp
def _solve_slopes(_, cotangents, outputs):
    (slope, _), (solution, inverse) = cotangents, outputs
    right_slope = inverse.swapaxes(-1, -2) @ slope
    return -right_slope @ solution.swapaxes(-1, -2), right_slope


def _solve(lower, right):
    """x of (I + M) x = `right`, `(..., C, D)`, for M = `lower`, `(..., C, C)`, zero on and above its diagonal."""
    return _solve_with_inverse(lower, right)[0]


def _inverse(lower):
    """The inverse of I + `lower`, block by block.

    With inverses E and F of two blocks on the diagonal and M between them, the block between is -F M E: no more than
    what the inverse holds. A series of powers of M, whose terms cancel, would lose all digits where keys repeat.
    """
    order = mx.arange(lower.shape[-1])
    inverse = mx.eye(lower.shape[-1])
    size = 1
    while size < lower.shape[-1]:
        joined = (order[:, None] // size != order // size) & (order[:, None] // (2 * size) == order // (2 * size))
        between = mx.where(joined, lower, 0.0)
        inverse = inverse - (between if size == 1 else inverse @ between @ inverse)
        size *= 2
    return mx.broadcast_to(inverse, lower.shape)


def _updates(chunks, states):
    """The updates u `(N, ..., C, Dv)` of chunks that start with `states`."""
    return chunks.values - chunks.reads @ states.swapaxes(-1, -2)


def _states(chunks, state):
    """`(states, last)`: the state `(N, ..., Dv, Dk)` before each chunk, and the one after the last."""
    states = []
    for n in range(len(chunks.decays)):
        states.append(state)
        updates = mx.addmm(chunks.values[n], chunks.reads[n], state.swapaxes(-1, -2), alpha=-1.0)
        state = mx.addmm(state * chunks.decays[n], updates.swapaxes(-1, -2), chunks.keys[n])
    return mx.stack(states), state


def _slopes(chunks, states, output_slope, last_slope):
    """The gradients of the first state and of each field of `chunks`.

    Args:
        states: `(N, ..., Dv, Dk)`, before each chunk.
        output_slope: `(N, ..., C, Dv)`, the gradient of the outputs, which are
            `queries @ states^T + scores @ updates`.
        last_slope: `(..., Dv, Dk)`, of the state after the last chunk.
    """
    updates = _updates(chunks, states)
    own_updates = chunks.scores.swapaxes(-1, -2) @ output_slope
    own_states = output_slope.swapaxes(-1, -2) @ chunks.queries
    slope, slopes, update_slopes = last_slope, [], []
    for n in reversed(range(len(states))):
        slopes.append(slope)
        update_slopes.append(mx.addmm(own_updates[n], chunks.keys[n], slope.swapaxes(-1, -2)))
        through = mx.addmm(own_states[n], update_slopes[-1].swapaxes(-1, -2), chunks.reads[n], alpha=-1.0)
        slope = through + slope * chunks.decays[n]
    slopes, update_slopes = mx.stack(slopes[::-1]), mx.stack(update_slopes[::-1])
    decay_axes = (-2, -1) if chunks.decays.shape[-1] == 1 else -2
    return (
        slope,
        output_slope @ states,
        updates @ slopes,
        output_slope @ updates.swapaxes(-1, -2),
        update_slopes,
        -update_slopes @ states,
        (slopes * states).sum(decay_axes, keepdims=True),
    )

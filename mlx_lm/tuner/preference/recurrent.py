"""The gated delta rule in chunks: matrix products within a chunk, a state at each chunk's start, no state a token.

A head's state S, `(Dv, Dk)`, decays by a gate a_t for each token, then takes what the value differs from what the
state has for the key:

    S_t = S_{t-1} diag(a_t) + u_t k_t^T,    u_t = beta_t (v_t - S_{t-1} diag(a_t) k_t),    o_t = S_t q_t

Within a chunk that starts with S, and with d_ij the product of the gates after j up to i,

    u_i = beta_i (v_i - S (d_i0 k_i) - sum_{j<i} ((d_ij k_i) . k_j) u_j)

is a triangular system (I + M) U = B V - B K S^T, with k_i decayed from the start in K. Its inverse T gives all
updates, T B V - T B K S^T: what a chunk does to its state is one product, and so are the outputs. With K' the keys
decayed to the chunk's end, Q the queries decayed from its start, P the decayed products q_i . k_j,

    S' = S (diag(a) - (T B K)^T K') + (T B V)^T K',    O = (Q - P T B K) S^T + P T B V

All but S is known for all chunks at once. What is left to do for one chunk after another is one product each, and
one in the backward pass, where the gradient of S' goes through the same matrices transposed. The matrix in brackets is
the product of its tokens' diag(a) (I - beta k k^T), none of which makes a vector longer where |k| <= 1 and
0 <= beta <= 2: products over many chunks do not grow, nor do errors. Products of gates are exponentials of sums of
their logarithms over just the tokens in question: no quotient of products, which overflows, and no difference of long
sums, which loses digits.

Sources: arXiv 2406.06484 (the delta rule in parallel), 2412.06464 (its gate), 2510.26692 (a gate for each channel).
"""

import mlx.core as mx

from . import cuda_delta
from .attention import on_cuda
from .chunk_products import decayed_products, decayed_products_by_channel, in_chunks, inverse_of, states_between

# Tokens a chunk, a power of two. Products of a chunk's tokens with each other grow with it, and the number of
# products in a row shrinks.
CHUNK = 64
# Tokens, times heads and sequences, whose chunks are in memory at a time. A GPU works on many at once.
TOKENS_AT_ONCE = {mx.DeviceType.cpu: 2**12, mx.DeviceType.gpu: 2**17}


def gated_delta_rule(queries, keys, values, log_gates, betas, state=None):
    """The gated delta rule over a sequence, as mlx-lm's loop computes it.

    Sums are in float32 whatever the dtype. On CUDA kernels compute it for heads that fit them.

    Args:
        queries, keys: `(B, T, Hk, Dk)`; keys of a norm of at most 1, or the rule itself grows without bound.
        values: `(B, T, Hv, Dv)`, Hv a multiple of Hk; each key head serves as many value heads in a row.
        log_gates: `(B, T, Hv)`, or `(B, T, Hv, Dk)` for a gate for each channel of the keys; at most 0, finite.
        betas: `(B, T, Hv)`, 0 to 2.
        state: `(B, Hv, Dv, Dk)`, or None for zeros.

    Returns:
        `(outputs, state)`: `(B, T, Hv, Dv)` in the queries' dtype, and the state after the last token,
        `(B, Hv, Dv, Dk)`, float32.
    """
    (batch, _, _, key_width), (value_heads, value_width) = keys.shape, values.shape[2:]
    if state is None:
        state = mx.zeros((batch, value_heads, value_width, key_width))
    arrays = queries, keys, values, log_gates.astype(mx.float32), betas, state.astype(mx.float32)
    if on_cuda() and cuda_delta.fits(key_width, value_width):
        return cuda_delta.gated_delta_loops(*arrays)
    return gated_delta_chunks(*arrays)


def gated_delta_chunks(queries, keys, values, log_gates, betas, state):
    """The same in chunks, of each of which the backward pass keeps a state; gates and state are float32."""
    batch, length, key_heads, key_width = keys.shape
    value_heads, value_width = values.shape[2:]
    state = state.reshape(batch, key_heads, -1, value_width, key_width)
    gates = log_gates if log_gates.ndim == 4 else log_gates[..., None]
    arrays = queries, keys, values, gates, betas[..., None]
    at_once = CHUNK * max(1, TOKENS_AT_ONCE[mx.default_device().type] // (CHUNK * batch * value_heads))
    starts_of_parts = range(0, length, at_once)

    def in_parts(x):
        # Not by mx.split: MLX's compiler fails where it finds the same split in both passes.
        return [x[:, start : start + at_once] for start in starts_of_parts]

    @mx.custom_function
    def run(state, *arrays):
        outputs, all_states = [], []
        for part in zip(*map(in_parts, arrays), strict=True):
            states, state, read, own = _run(part, state)
            outputs.append(_as_sequence(read, own, part[2]))
            all_states.append(states)
        return mx.concatenate(outputs, axis=1), state, *all_states

    @run.vjp
    def backward(inputs, cotangents, outputs):
        (_, *arrays), (output_slope, slope, *_), (_, last, *states) = inputs, cotangents, outputs
        parts = zip(*map(in_parts, (*arrays, output_slope)), states, strict=True)
        slopes = []
        for *part, out_slope, part_states in reversed(list(parts)):
            slope, *part_slopes = _part_slopes(part, part_states, last, out_slope, slope)
            last = part_states[:1].squeeze(0)
            # Left for later, they would keep what they are made of.
            slope = mx.depends([slope], part_slopes)[0]
            slopes.append(part_slopes)
        return slope, *(mx.concatenate(parts[::-1], axis=1) for parts in zip(*slopes, strict=True))

    outputs, last, *_ = run(state, *arrays)
    return outputs, last.reshape(batch, value_heads, value_width, key_width)


def _part_slopes(arrays, states, last, output_slope, last_slope):
    """The gradients of the state before a part of a sequence and of each of its arrays.

    Args:
        arrays: queries, keys, values, gates and betas, each `(B, T, heads, width)`.
        states, last: as `_run` returned them.
        output_slope, last_slope: the gradients of the outputs `(B, T, Hv, Dv)` and of the state after the part.
    """

    def part(state, *arrays):
        return _run(arrays, state, (states, last))[1:]

    # Without waiting for the gradient, all layers could compute again before the first of them is done with.
    arrays = mx.depends(arrays, [output_slope, last_slope])
    output_slope = _in_chunks(output_slope, states.shape[2])
    return mx.vjp(part, [states[:1].squeeze(0), *arrays], [last_slope, output_slope, output_slope])[1]


def _in_chunks(x, key_heads):
    """`x` `(B, T, H, D)` as `(N, B, Hk, H / Hk, C, D)`, float32; zeros, which change no state, fill the last chunk."""
    _, length, heads, width = x.shape
    x = in_chunks(x, min(CHUNK, 1 << (length - 1).bit_length()))
    x = x.reshape(*x.shape[:3], key_heads, heads // key_heads, width).transpose(1, 0, 3, 4, 2, 5)
    # Once, and not anew for each product that it is in.
    return mx.contiguous(x).astype(mx.float32)


def _as_sequence(x, y, like):
    """The sum of `x` and `y` `(N, B, Hk, R, C, D)` in the shape `(B, T, Hk R, D)` and dtype of `like`."""
    # Turned around before they are added: one kernel does both.
    x, y = (x.transpose(1, 0, 4, 2, 3, 5) for x in (x, y))
    return (x + y).astype(like.dtype).reshape(len(like), -1, *like.shape[2:])[:, : like.shape[1]]


def _run(arrays, state, known=None):
    """The states of a part of a sequence, in chunks, and its outputs in two parts; all is in float32.

    Leading axes N, B, Hk and R: chunks, sequences, key heads, value heads a key head; C tokens a chunk.

    Args:
        arrays: queries, keys, values, gates' logarithms and betas `(B, T, heads, width)`, as for `gated_delta_rule`; a
            width of 1 for betas, and for gates that all channels share.
        state: `(..., Dv, Dk)`, before the first chunk.
        known: as for `states_between`.

    Returns:
        `(states, last, read, own)`: the state `(N, ..., Dv, Dk)` before each chunk, and the one after the last; what
        the outputs `(N, ..., C, Dv)` are of the states, and what they are without one.
    """
    queries, keys, values, log_gates, betas = (_in_chunks(x, arrays[1].shape[2]) for x in arrays)
    # Of all channels: one sum over them does for the gradients of both products.
    before = mx.broadcast_to(mx.exp(mx.cumsum(log_gates, axis=-2)), (*betas.shape[:-1], keys.shape[-1]))
    after = mx.exp(mx.cumsum(log_gates, axis=-2, reverse=True, inclusive=False))
    products = decayed_products if log_gates.shape[-1] == 1 else decayed_products_by_channel
    key_scores, scores = products(keys, queries, log_gates)  # scores: P
    solve = inverse_of(betas * key_scores) * betas.swapaxes(-1, -2)  # T B
    # T B V and T B K: a chunk's updates are the first less the second S^T.
    updates, reads = solve @ values, solve @ (before * keys)
    late = after * keys  # K'
    turns, additions = (x.swapaxes(-1, -2) @ late for x in (reads, updates))
    queries = mx.addmm(before * queries, scores, reads, alpha=-1.0)
    states, last = states_between(state, mx.exp(log_gates.sum(-2, keepdims=True)), turns, additions, known)
    return states, last, queries @ states.swapaxes(-1, -2), scores @ updates

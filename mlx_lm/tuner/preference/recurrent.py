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

from .chunk_products import decayed_products, decayed_products_by_channel, in_chunks, inverse_of, states_between

# Tokens a chunk, a power of two. Products of a chunk's tokens with each other grow with it, and the number of
# products in a row shrinks.
CHUNK = 64


def gated_delta_chunks(queries, keys, values, log_gates, betas, state=None):
    """The outputs and the last state of the gated delta rule; sums are in float32 whatever the dtype.

    Args:
        queries, keys: `(B, T, Hk, Dk)`; keys of a norm of at most 1, or the rule itself grows without bound.
        values: `(B, T, Hv, Dv)`, Hv a multiple of Hk; each key head serves as many value heads in a row.
        log_gates: `(B, T, Hv)`, or `(B, T, Hv, Dk)` for a gate for each channel of the keys; at most 0, finite.
        betas: `(B, T, Hv)`, 0 to 2.
        state: `(B, Hv, Dv, Dk)`, or None for zeros.

    Returns:
        `(outputs, state)`: `(B, T, Hv, Dv)` and `(B, Hv, Dv, Dk)`, float32.
    """
    (batch, length, key_heads, key_width), (value_heads, value_width) = keys.shape, values.shape[2:]
    chunk = min(CHUNK, 1 << (length - 1).bit_length())

    def by_head(x):
        """`(B, T, H, D)` as `(N, B, Hk, H / Hk, C, D)`, float32; zeros, which change no state, fill the last chunk."""
        x = in_chunks(x, chunk).reshape(batch, -1, chunk, key_heads, x.shape[2] // key_heads, x.shape[3])
        # Once, and not anew for each product that it is in.
        return mx.contiguous(x.transpose(1, 0, 3, 4, 2, 5)).astype(mx.float32)

    products = decayed_products if log_gates.ndim == 3 else decayed_products_by_channel
    if log_gates.ndim == 3:
        log_gates = log_gates[..., None]
    queries, keys, values, log_gates, betas = map(by_head, (queries, keys, values, log_gates, betas[..., None]))
    # Of all channels: one sum over them does for the gradients of both products.
    before = mx.broadcast_to(mx.exp(mx.cumsum(log_gates, axis=-2)), (*betas.shape[:-1], key_width))
    after = mx.exp(mx.cumsum(log_gates, axis=-2, reverse=True, inclusive=False))
    key_scores, scores = products(keys, queries, log_gates)  # scores: P
    solve = inverse_of(betas * key_scores) * betas.swapaxes(-1, -2)  # T B
    # T B V and T B K: a chunk's updates are the first less the second S^T.
    updates, reads = solve @ values, solve @ (before * keys)
    late = after * keys  # K'
    turns, additions = (x.swapaxes(-1, -2) @ late for x in (reads, updates))
    queries = mx.addmm(before * queries, scores, reads, alpha=-1.0)
    heads = batch, key_heads, value_heads // key_heads, value_width, key_width
    state = mx.zeros(heads) if state is None else state.reshape(heads).astype(mx.float32)
    states, last = states_between(state, mx.exp(log_gates.sum(-2, keepdims=True)), turns, additions)
    # Turned around before they are added: one kernel does both.
    read, own = (x.transpose(1, 0, 4, 2, 3, 5) for x in (queries @ states.swapaxes(-1, -2), scores @ updates))
    outputs = (read + own).reshape(batch, -1, value_heads, value_width)
    return outputs[:, :length], last.reshape(batch, value_heads, value_width, key_width)

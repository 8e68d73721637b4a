"""Recurrences whose states decay and take on outer products, in chunks, and no loop over tokens.

A head's state S, `(Dv, Dk)`, is decayed by a gate a_t and takes a token's value and key; its query reads it:

    S_t = a_t S_{t-1} + v_t k_t^T,    o_t = S_t q_t

With d_ij the product of the gates after j up to i, a token has o_i = sum_{j<=i} d_ij (q_i . k_j) v_j of its own chunk
and d_i0 S q_i of the state S with which the chunk starts. What a chunk adds to a state is one product, and the states
at the chunks' starts are decayed sums of these, one product too. Mamba 2 is of this kind, with keys B, queries C,
values dt x and gates exp(dt A): arXiv 2405.21060; so is linear attention with a decay for each head: arXiv 2401.04658.

Mamba's first generation decays each number of a state by a gate of its own: arXiv 2312.00752. So there are no products
of matrices; but all chunks go through their tokens at the same time, each from a state of zeros, and what the states at
their starts make of the tokens is added once those are known.

RWKV-7's state is changed by a product of low rank too, arXiv 2503.14456:

    S_t = S_{t-1} (diag(w_t) + a_t b_t^T) + v_t k_t^T,    o_t = S_t r_t

so that u_i = S_{i-1} a_i of a chunk solve a triangular system, as the updates of the gated delta rule do (`recurrent`),
and what a chunk does to its state is a product with a matrix. Its gates are above a half: quotients of their products
over so few tokens neither overflow nor lose digits.
"""

import mlx.core as mx

from ...models.activations import fast_exp
from .chunk_products import decays_of, in_chunks, inverse_of, states_between

# Tokens a chunk: products of a chunk's tokens with each other grow with it, and the number of states shrinks.
CHUNK = 64
# The same where all chunks go through their tokens at the same time.
SCAN_CHUNK = 32
# The same where products of gates are divided by: 0.54^16 is 6e-5.
WKV_CHUNK = 16


def decayed_sums(queries, keys, values, log_gates, state=None):
    """The outputs and the last state of the recurrence above; sums are in float32 whatever the dtype.

    Args:
        queries, keys: `(B, T, Hk, Dk)`.
        values: `(B, T, Hv, Dv)`, Hv a multiple of Hk; each key head serves as many value heads in a row.
        log_gates: `(B, T, Hv)`, at most 0.
        state: `(B, Hv, Dv, Dk)`, or None for zeros.

    Returns:
        `(outputs, state)`: `(B, T, Hv, Dv)` and `(B, Hv, Dv, Dk)`, float32.
    """
    (batch, length, key_heads, key_width), (heads, value_width) = keys.shape, values.shape[2:]
    chunk = min(CHUNK, length)

    def by_head(x):
        """`(B, T, H, D)` as `(B, Hk, H / Hk, N, C, D)`, float32."""
        x = in_chunks(x, chunk).reshape(batch, -1, chunk, key_heads, x.shape[2] // key_heads, x.shape[3])
        return mx.contiguous(x.transpose(0, 3, 4, 1, 2, 5).astype(mx.float32))

    # The zeros that fill the last chunk change no state.
    queries, keys, values, gates = map(by_head, (queries, keys, values, log_gates[..., None]))
    after = mx.exp(mx.cumsum(gates, axis=-2, reverse=True, inclusive=False))
    added = (after * values).swapaxes(-1, -2) @ keys  # (B, Hk, R, N, Dv, Dk)
    first = mx.zeros_like(added[..., :1, :, :]) if state is None else state.reshape(added[..., :1, :, :].shape)
    passed = mx.pad(gates.sum(-2), [(0, 0)] * 3 + [(1, 0), (0, 0)])  # (B, Hk, R, N + 1, 1), the first state's being 1
    states = decays_of(passed) @ mx.concatenate([first.astype(mx.float32), added], axis=3).flatten(-2)
    states = states.reshape(*states.shape[:-1], value_width, key_width)
    scores = decays_of(gates) * (queries @ keys.swapaxes(-1, -2))
    read = mx.exp(mx.cumsum(gates, axis=-2)) * (queries @ states[..., :-1, :, :].swapaxes(-1, -2))
    outputs = (scores @ values + read).transpose(0, 3, 4, 1, 2, 5).reshape(batch, -1, heads, value_width)
    # A part of all would keep them all.
    last = mx.contiguous(states[..., -1, :, :])
    return outputs[:, :length], last.reshape(batch, heads, value_width, key_width)


def selective_scan(x, steps, write, read, A, state=None):
    """Of Mamba's first generation, h_t = exp(dt_t A) h_{t-1} + (dt_t x_t) b_t^T and h_t c_t; sums are in float32.

    Args:
        x, steps: `(B, T, D)`, dt being the steps.
        write, read: `(B, T, N)`, b and c.
        A: `(D, N)`, at most 0.
        state: `(B, D, N)`, or None for zeros.

    Returns:
        `(outputs, state)`: `(B, T, D)` and `(B, D, N)`, float32.
    """
    batch, length, width = x.shape
    chunk = min(SCAN_CHUNK, length)
    # Tokens of a chunk first, `(B, C, N, ...)`.
    x, steps, write, read = (
        in_chunks(each, chunk).astype(mx.float32).swapaxes(1, 2) for each in (x, steps, write, read)
    )
    gates = fast_exp(steps[..., None] * A)
    added = (steps * x)[..., None] * write[..., None, :]
    state = mx.zeros((batch, 1, *A.shape)) if state is None else state[:, None].astype(mx.float32)

    def one_after_another(gates, added, state):
        """States `(B, K, ...)` after each of K updates along the second axis, from `state` `(B, 1, ...)` or 0.

        And the last by itself: a part of all would keep them all.
        """
        states, places = [], range(1, gates.shape[1])
        for gate, more in zip(split(gates, places), split(added, places), strict=True):
            state = gate * state + more
            states.append(state)
        return mx.concatenate(states, axis=1), state.squeeze(1)

    if x.shape[2] == 1:
        states, last = one_after_another(gates, added, state[:, None])
        last = last.squeeze(1)
    else:
        own, ends = one_after_another(gates, added, 0.0)
        passed = fast_exp(mx.cumsum(steps, axis=1)[..., None] * A)  # from a chunk's start to the token
        ends, last = one_after_another(passed[:, -1], ends, state)
        states = own + passed * mx.concatenate([state, ends[:, :-1]], axis=1)[:, None]
    outputs = (states * read[..., None, :]).sum(-1)
    return outputs.swapaxes(1, 2).reshape(batch, -1, width)[:, :length], last


def wkv7(r, w, k, v, a, b, state=None):
    """The outputs and the last state of RWKV-7's recurrence above; sums are in float32 whatever the dtype.

    Args:
        r, w, k, v, a, b: `(B, T, H, D)`; gates w from 0.54 to 1.
        state: `(B, H, D, D)`, values first, or None for zeros.

    Returns:
        `(outputs, state)`: `(B, T, H, D)` and `(B, H, D, D)`, float32.
    """
    batch, length, heads, width = v.shape
    chunk = min(WKV_CHUNK, 1 << (length - 1).bit_length())
    arrays = r, mx.log(w.astype(mx.float32)), k, v, a, b
    # `(N, B, H, C, D)`; the logarithms are filled up by zeros too.
    r, log_w, k, v, a, b = (
        mx.contiguous(in_chunks(x, chunk).astype(mx.float32).transpose(1, 0, 3, 2, 4)) for x in arrays
    )
    passed = mx.cumsum(log_w, axis=-2)
    a, r = a * mx.exp(passed - log_w), r * mx.exp(passed)  # decayed since the chunk's start
    over, until = mx.exp(passed[..., -1:, :]), mx.exp(-passed)
    k, b = k * until, b * until
    solve = inverse_of(-mx.tril(a @ b.swapaxes(-1, -2), -1))
    # Each u is the first and what the state has for the second.
    own, of_state = solve @ (mx.tril(a @ k.swapaxes(-1, -2), -1) @ v), solve @ a
    late_k, late_b = k * over, b * over
    turns = -of_state.swapaxes(-1, -2) @ late_b
    added = own.swapaxes(-1, -2) @ late_b + v.swapaxes(-1, -2) @ late_k
    state = mx.zeros(added.shape[1:]) if state is None else state.astype(mx.float32)
    states, last = states_between(state, over, turns, added)
    before = states.swapaxes(-1, -2)  # (N, B, H, Dk, Dv)
    outputs = r @ before + mx.tril(r @ b.swapaxes(-1, -2)) @ (own + of_state @ before)
    outputs = outputs + mx.tril(r @ k.swapaxes(-1, -2)) @ v
    return outputs.transpose(1, 0, 3, 2, 4).reshape(batch, -1, heads, width)[:, :length], last


def split(x, bounds, axis=1):
    """`mx.split`, whose own gradient is a sum of arrays as large as `x`, one for each part."""

    @mx.custom_function
    def parts(x):
        return tuple(mx.split(x, bounds, axis))

    @parts.vjp
    def joined(_, cotangents, __):
        return mx.concatenate(cotangents, axis)

    return parts(x) if bounds else (x,)

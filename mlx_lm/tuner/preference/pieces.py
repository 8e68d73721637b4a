"""Upstream's recurrences without a loop over tokens, a piece of the sequence at a time where memory is short.

Upstream loops over the tokens of Mamba, Jamba, RWKV-7, Bailing's linear attention and the gated delta rule and keeps a
state for each; of state-space models of the second generation it runs 256 tokens at once and keeps their products with
each other. Here the gated delta rule runs as `recurrent` has it, and the others as `state_space` has them, in pieces
that are computed again in the backward pass: nothing but the states between pieces is kept. On CUDA kernels of our own
(`cuda_chunks`, `cuda_delta`, `cuda_scan`) stand in for the widths and dtypes that fit them.
"""

from functools import partial

import mlx.core as mx
import mlx.nn as nn

from mlx_lm.models.ssm import compute_dt

from ...models.activations import swiglu
from . import cuda_chunks, cuda_delta, cuda_norms, cuda_scan, recurrent
from .attention import on_cuda, on_metal
from .intercept import recomputed, replaced
from .state_space import CHUNK, SCAN_CHUNK, WKV_CHUNK, decayed_sums, selective_scan, split, wkv7

# Numbers of an array, where all of a piece is computed at once.
AT_ONCE = {mx.DeviceType.cpu: 2**16, mx.DeviceType.gpu: 2**25}


def recurrences_in_pieces(modules, packed=None):
    """Within the context, which must last around the backward pass, such layers of a model's `modules` run in pieces.

    With the recurrent `Parts` of a packed batch they do so on each of its sequences.
    """
    table = {told: lambda upstream, make=make: make(upstream, packed) for told, make in RECURRENCES.items()}
    return replaced(modules, table)


def scan(step, sequences, state, piece, shared=()):
    """Run `step` over pieces of sequences.

    Args:
        step: takes a piece of each sequence, the shared arrays, and the state but where it is None; returns
            `(output, state)`.
        sequences: arrays `(B, T, ...)`.
        state: the first piece's, or None for zeros.
        piece: tokens a piece.
        shared: arrays that all pieces read, of which gradients are taken too.

    Returns:
        `(output, state)`: outputs of all pieces, `(B, T, ...)` in the first sequence's dtype, and the last one's state.
    """

    def run(*arrays):
        out, state = step(*arrays)
        return [out.astype(sequences[0].dtype), state]

    bounds = list(range(piece, sequences[0].shape[1], piece))
    outputs, states = [], [] if state is None else [state]
    for pieces in zip(*(split(x, bounds) for x in sequences), strict=True):
        if outputs:
            # Without waiting for the piece before, much of all pieces could be computed first.
            pieces = mx.depends(list(pieces), states)
        out, *states = recomputed(nn.Module(), run)(*pieces, *shared, *states)
        outputs.append(out)
    return mx.concatenate(outputs, axis=1), states[0]


def _at_once(chunk, numbers):
    """Tokens a piece, whole chunks, by the numbers that a token of all sequences has in the largest array of a step."""
    return chunk * max(1, AT_ONCE[mx.default_device().type] // max(1, numbers * chunk))


def gated_delta_rule(queries, keys, values, log_gates, betas, state=None):
    """As `recurrent.gated_delta_chunks`, outputs in the queries' dtype."""
    (*_, heads, value_width), key_width = values.shape, keys.shape[-1]
    if _is_of_products(queries, keys, values, log_gates):
        return cuda_chunks.in_rows(queries, keys, values, log_gates, betas, state)
    if on_cuda() and cuda_delta.fits(key_width, value_width):
        return cuda_delta.gated_delta_loops(queries, keys, values, log_gates, betas, state)
    piece = _at_once(recurrent.CHUNK, len(values) * heads * (key_width + value_width))
    return scan(recurrent.gated_delta_chunks, [queries, keys, values, log_gates, betas], state, piece)


def _is_of_products(queries, keys, values, log_gates):
    """Whether `cuda_chunks` computes the gated delta rule of these arrays."""
    alike = queries.dtype == keys.dtype == values.dtype and log_gates.ndim + 1 == values.ndim
    return on_cuda() and alike and cuda_chunks.fits(keys.shape[-1], values.shape[-1], values.dtype)


def chunks_of(packed):
    """A packed batch's parts as one, and their chunks' order; None where these are no whole chunks."""
    if packed is None or not on_cuda() or any(part.shape[1] % cuda_chunks.CHUNK for part in packed.keys):
        return None
    counts = [(len(part), part.shape[1] // cuda_chunks.CHUNK) for part in packed.keys]
    return packed.as_one(), cuda_chunks.order_of(counts, packed.begun())


def _in_chunks(packed):
    """What runs a function on a packed batch's parts as one, or None where these are no whole chunks.

    It takes the function and its arrays; the function is given `cuda_chunks.products` of these chunks, too.
    """
    chunks = chunks_of(packed)
    if chunks is None:
        return None
    parts, order = chunks

    def products(*arrays):
        arrays = (x if x is None else x.squeeze(0) for x in arrays)
        out, state = cuda_chunks.products(*arrays, order, alone=True)
        return out[None], state

    return lambda function, arrays: parts.in_rows(lambda *given: function(*given[:-1], products), arrays)


def _gated_delta(upstream, packed):
    """`gated_delta_update` of Qwen3-Next and Qwen3.5, Kimi Linear and OLMo's hybrids.

    Where upstream has a kernel, on Metal but in training and for keys of these widths, that runs, unless the batch is
    packed; and where there is a mask, the loop.
    """

    in_chunks = _in_chunks(packed)

    def update(
        q, k, v, a, b, A_log, dt_bias, state=None, mask=None,
        *, use_kernel=True, lower_bound=None, allow_neg_eigval=False,
    ):  # fmt: skip
        has_kernel = use_kernel and on_metal() and k.shape[-1] % 32 == 0
        if mask is not None or (has_kernel and packed is None):
            options = {"use_kernel": use_kernel, "lower_bound": lower_bound, "allow_neg_eigval": allow_neg_eigval}
            return upstream(q, k, v, a, b, A_log, dt_bias, state, mask, **options)
        rate, beta = mx.exp(A_log.astype(mx.float32)), mx.sigmoid(b) * (2.0 if allow_neg_eigval else 1.0)
        # The logarithm of upstream's gates, which may be 0 or 1 when rounded.
        if lower_bound is None:
            log_gates = -rate * nn.softplus(a + dt_bias)
        else:
            log_gates = lower_bound * mx.sigmoid(rate * (a.astype(mx.float32) + dt_bias))
        if packed is None:
            return gated_delta_rule(q, k, v, log_gates, beta, state)
        if in_chunks is not None and _is_of_products(q, k, v, log_gates):
            return in_chunks(lambda *given: given[-1](*given[:-1]), [q, k, v, log_gates, beta]), None
        return packed.in_rows(gated_delta_rule, [q, k, v, log_gates, beta]), None

    return update


def _normalized(upstream, _):
    """`normalize_qk` of the gated delta rule's models."""

    def normalize(q, k, *, inv_scale, eps):
        own = [x.reshape(-1, 1, *x.shape[2:]) for x in (q, k)]
        if not on_cuda() or not cuda_norms.fits(*own):
            return upstream(q, k, inv_scale=inv_scale, eps=eps)
        found = cuda_norms.normed(*own, (inv_scale**2, inv_scale), eps * inv_scale**2)
        return tuple(x.reshape(q.shape) for x in found)

    return normalize


def _gated_norm(upstream, _):
    """A norm of Qwen3-Next and Qwen3.5, and what gates it."""

    def norm(module, hidden_states, gate=None):
        if gate is not None and on_cuda() and not module.trainable_parameters():
            own = [x.reshape(-1, 1, *x.shape[2:]) for x in (hidden_states, gate)]
            if cuda_norms.fits(*own):
                return cuda_norms.gated_norm(*own, module.weight, module.eps).reshape(gate.shape)
        return upstream(module, hidden_states, gate)

    return norm


def _state_space(upstream, packed):
    """`ssm_update` of Mamba 2, Falcon H1, Granite, Nemotron H and PLaMo 2."""
    in_chunks = _in_chunks(packed)

    def update(x, A_log, B, C, D, dt, dt_bias, state=None, time_step_limit=(0.001, 100.0), mask=None, lengths=None):
        if packed is None and (x.shape[1] == 1 or mask is not None or lengths is not None):
            return upstream(x, A_log, B, C, D, dt, dt_bias, state, time_step_limit, mask, lengths)

        def step(x, B, C, dt, A_log, D, dt_bias, *state, sums=decayed_sums):
            dt = compute_dt(dt, dt_bias, time_step_limit)
            out, state = sums(C, B, dt[..., None] * x, -mx.exp(A_log) * dt, *state)
            return out + D[:, None] * x, state

        def in_pieces(x, B, C, dt, state):
            piece = _at_once(CHUNK, CHUNK * x[:, 0, :, 0].size)
            return scan(step, [x, B, C, dt], state, piece, [A_log, D, dt_bias])

        def in_products(x, B, C, dt, products):
            def sums(C, B, values, log_gates):
                return products(C, B, values.astype(x.dtype), log_gates, None)

            out, state = step(x, B, C, dt, A_log, D, dt_bias, sums=sums)
            return out.astype(x.dtype), state

        if _is_of_products(C, B, x, dt) and (packed is None or in_chunks is not None):
            if packed is None:
                return in_products(x, B, C, dt, partial(cuda_chunks.in_rows, state=state))
            return in_chunks(in_products, [x, B, C, dt]), None
        if packed is not None:
            return packed.in_rows(in_pieces, [x, B, C, dt]), None
        return in_pieces(x, B, C, dt, state)

    return update


def _linear_attention(_, __):
    """`recurrent_gla` of Bailing's linear attention, whose axis of tokens is the third."""

    def attend(q, k, v, g, scale, h=None):
        def step(q, k, v, g, *state, sums=decayed_sums):
            gates = mx.broadcast_to(g, v.shape[:3])
            out, state = sums(scale * q, k, v, gates, *(x.swapaxes(-1, -2) for x in state))
            return out, state.swapaxes(-1, -2)

        def products(q, k, v, gates, *state):
            return cuda_chunks.in_rows(q, k, v, gates, None, *state)

        sequences = [x.swapaxes(1, 2) for x in (q, k, v)]
        # A gate is a whole head's.
        if _is_of_products(*sequences, v[..., 0]):
            out, state = step(*sequences, g, *([] if h is None else [h]), sums=products)
        else:
            piece = _at_once(CHUNK, CHUNK * v.shape[0] * v.shape[1])
            out, state = scan(step, sequences, h, piece, [g])
        return out.swapaxes(1, 2), state

    return attend


def _mamba(_, packed):
    """A Mamba layer from its input to its output: upstream's loop stands between its projections."""

    def process(module, x, conv_state, state):
        x, z = mx.split(module.in_proj(x), 2, axis=-1)
        kept = module.conv_kernel_size - 1
        if conv_state is None:
            conv_state = mx.zeros((len(x), kept, x.shape[-1]), x.dtype)
        x = mx.concatenate([conv_state, x], axis=1)
        conv_state, x = x[:, max(0, x.shape[1] - kept) :], nn.silu(module.conv1d(x))
        norms = [lambda x: x] * 3
        if module.use_bcdt_rms:
            norms = [partial(mx.fast.rms_norm, weight=None, eps=module.args.mixer_rms_eps)] * 3
        out, state = _selected(module, x, -mx.exp(module.A_log), state, norms, packed)
        return module.out_proj(swiglu(z, out)), (conv_state, state)

    return process


def _jamba(_, packed):
    """Jamba's loop, which makes an array of all states anew for each token."""

    def process(module, x, A, state=None):
        return _selected(module, x, A, state, [module.dt_layernorm, module.b_layernorm, module.c_layernorm], packed)

    return process


def _selected(module, x, A, state, norms, packed):
    """What a layer of Mamba's first generation makes of `x` `(B, T, D)`, which it has convolved, and its last state.

    `norms` are of a token's step, and of what it writes and reads; the others as for `selective_scan`.
    """
    rank, states = module.time_step_rank, A.shape[-1]
    parts = mx.split(module.x_proj(x), [rank, rank + states], axis=-1)
    steps, write, read = (norm(part) for norm, part in zip(norms, parts, strict=True))
    steps = nn.softplus(module.dt_proj(steps))

    def scanned(x, steps, write, read, state):
        if on_cuda() and cuda_scan.fits(*A.shape):
            return cuda_scan.selective_loops(x, steps, write, read, A, state)
        return scan(selective_scan, [x, steps, write, read], state, _at_once(SCAN_CHUNK, len(x) * A.size), [A])

    sequences = [x, steps, write, read]
    out, state = scanned(*sequences, state) if packed is None else (packed.in_rows(scanned, sequences), None)
    return out + module.D * x, state


def _rwkv(_, __):
    """RWKV-7's loop, or on Metal its kernel, which has no gradient."""

    def process(module, r, w, k, v, a, b, state):
        # A chunk has a matrix of a head's width.
        piece = _at_once(WKV_CHUNK, r[:, 0].size * r.shape[-1] // WKV_CHUNK)
        return scan(wkv7, [r, w, k, v, a, b], state, piece)

    return process


# What upstream's files call by name, and methods of their classes: the file that defines each, its class or None, and
# its name; and what makes each run in pieces.
RECURRENCES = {
    ("gated_delta", None, "gated_delta_update"): _gated_delta,
    ("gated_delta", None, "normalize_qk"): _normalized,
    ("qwen3_next", "Qwen3NextRMSNormGated", "__call__"): _gated_norm,
    ("ssm", None, "ssm_update"): _state_space,
    ("bailing_moe_linear", None, "recurrent_gla"): _linear_attention,
    ("mamba", "MambaBlock", "_process_sequence"): _mamba,
    ("jamba", "JambaMambaMixer", "ssm_step"): _jamba,
    ("rwkv7", "Rwkv7TimeMixing", "_wkv7"): _rwkv,
}

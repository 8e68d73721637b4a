"""Adds to mlx_lm.models.activations: gated activations of which little is kept for the backward pass."""

from .._upstream import run_upstream

run_upstream(globals(), needs=("swiglu", "precise_swiglu", "swiglu_oai"))

import math
from functools import cache, partial

import mlx.core as mx
import mlx.nn as nn

_upstream_swiglu, _upstream_precise_swiglu, _upstream_swiglu_oai = swiglu, precise_swiglu, swiglu_oai
# gelu_approx(x) = x sigmoid(SLOPE x + CUBIC x^3): (1 + tanh(u)) / 2 is sigmoid(2 u).
SLOPE = 2 * math.sqrt(2 / math.pi)
CUBIC = 0.044715 * SLOPE
# Whether these keep their inputs alone for the backward pass, and on a CPU a sigmoid; `lean_layers` has it so.
keeps_little = False
# A gate and an x, and what gates both at once, given `linear` and `cubic` of `_keeping_sigmoid`; `lean_layers` has what
# siblings made last here.
together = None


def fast_exp(x):
    """exp of float32; on a CPU by libm's pow, since MLX's own takes two to three times as long on those of x86."""
    return mx.exp(x) if mx.default_device() == mx.gpu else mx.power(mx.array(math.e), x)


def fast_max(x):
    """The maximum along the last axis, which stays; on a CPU by blocks, since MLX reads a row there value by value."""
    block = min(x.shape[-1] & -x.shape[-1], 512)
    if block >= 32 and mx.default_device() != mx.gpu:
        x = x.reshape(*x.shape[:-1], -1, block).max(axis=-2)
    return x.max(axis=-1, keepdims=True)


def _keeping_inputs(function):
    """A function of gate and x of which nothing but these is kept for the backward pass."""

    @mx.custom_function
    def lean(gate, x):
        return function(gate, x)

    @lean.vjp
    def slopes_of(inputs, cotangent, _):
        slopes = []
        for i in range(2):
            # One after the other: what they have in common would be an array, which a fused kernel needs not write.
            values = mx.depends(list(inputs), [cotangent, *slopes])
            slopes.append(mx.vjp(function, values, [cotangent])[1][i])
        return tuple(slopes)

    return lean


@cache
def _keeping_sigmoid(linear, cubic=0.0):
    """gate * sigmoid(linear gate + cubic gate^3) * x of `(gate, x)`, of which these and the sigmoid are kept."""

    def scaled(x):
        return x if linear == 1 else linear * x

    @mx.custom_function
    def gated(gate, x):
        inner = scaled(gate) if cubic == 0 else gate * (linear + cubic * gate * gate)
        sigmoid = 1 / (1 + fast_exp(-inner)) if gate.dtype == mx.float32 else mx.sigmoid(inner)
        return gate * sigmoid * x, sigmoid

    @gated.vjp
    def slopes_of(inputs, cotangents, outputs):
        (gate, x), (slope, _), (_, sigmoid) = inputs, cotangents, outputs
        through, rest = slope * sigmoid, gate * (1 - sigmoid)
        rest = scaled(rest) if cubic == 0 else rest * (linear + 3 * cubic * gate * gate)
        return through * x * (1 + rest), through * gate

    return lambda gate, x: gated(gate, x)[0]


def _gated(gate, x, function, linear, cubic=0.0):
    """What `function` makes of gate and x, by the way that suits the device."""
    if together is not None and gate is together[0] and x is together[1]:
        return together[2](linear, cubic)
    # A CPU is slow at the exponentials that would be computed again: it keeps the sigmoid too.
    if mx.default_device() == mx.gpu or gate.dtype != x.dtype:
        return _keeping_inputs(function)(gate, x)
    return _keeping_sigmoid(linear, cubic)(gate, x)


def swiglu(gate, x):
    """As upstream's, silu(gate) * x."""
    if not keeps_little:
        return _upstream_swiglu(gate, x)
    return _gated(gate, x, _upstream_swiglu, 1.0)


def precise_swiglu(h, gate, x):
    """As upstream's, silu(gate) * x computed in float32, in the dtype of `h`."""
    if not keeps_little:
        return _upstream_precise_swiglu(h, gate, x)
    if mx.default_device() == mx.gpu:
        return _keeping_inputs(partial(_upstream_precise_swiglu, h))(gate, x)
    return _keeping_sigmoid(1.0)(gate.astype(mx.float32), x.astype(mx.float32)).astype(h.dtype)


def swiglu_oai(gate, x, alpha=1.702, limit=7.0):
    """As upstream's, gate * sigmoid(alpha gate) * (x + 1) of a gate and an x within a limit."""
    function = partial(_upstream_swiglu_oai, alpha=alpha, limit=limit)
    if not keeps_little:
        return function(gate, x)
    if mx.default_device() == mx.gpu:
        return _keeping_inputs(function)(gate, x)
    return _keeping_sigmoid(alpha)(mx.minimum(gate, limit), mx.clip(x, -limit, limit) + 1)


@partial(mx.compile, shapeless=True)
def _geglu(gate, x):
    return nn.gelu_approx(gate) * x


def geglu(gate, x):
    """gelu_approx(gate) * x."""
    return _gated(gate, x, _geglu, SLOPE, CUBIC) if keeps_little else _geglu(gate, x)

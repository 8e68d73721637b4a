"""Adds to mlx_lm.models.activations: a `swiglu` of which little is kept for the backward pass."""

from .._upstream import run_upstream

run_upstream(globals(), needs=("swiglu",))

import math

import mlx.core as mx

_upstream_swiglu = swiglu
# Whether `swiglu` keeps its inputs alone for the backward pass, and on a CPU a sigmoid; `lean_layers` has it so.
keeps_little = False
# A gate and an x, and what makes the same of both at once; `lean_layers` has what siblings made last here.
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


@mx.custom_function
def _lean_swiglu(gate, x):
    return _upstream_swiglu(gate, x)


@_lean_swiglu.vjp
def _lean_swiglu_vjp(inputs, cotangent, _):
    slopes = []
    for i in range(2):
        # One after the other: what they have in common would be an array, which a fused kernel needs not write.
        values = mx.depends(list(inputs), [cotangent, *slopes])
        slopes.append(mx.vjp(_upstream_swiglu, values, [cotangent])[1][i])
    return tuple(slopes)


@mx.custom_function
def _swiglu_and_sigmoid(gate, x):
    sigmoid = 1 / (1 + fast_exp(-gate)) if gate.dtype == mx.float32 else mx.sigmoid(gate)
    return gate * sigmoid * x, sigmoid


@_swiglu_and_sigmoid.vjp
def _swiglu_and_sigmoid_vjp(inputs, cotangents, outputs):
    (gate, x), (slope, _), (_, sigmoid) = inputs, cotangents, outputs
    through = slope * sigmoid
    return through * x * (1 + gate * (1 - sigmoid)), through * gate


def swiglu(gate, x):
    """As upstream's, silu(gate) * x."""
    if not keeps_little:
        return _upstream_swiglu(gate, x)
    if together is not None and gate is together[0] and x is together[1]:
        return together[2]()
    # A CPU is slow at the exponentials that would be computed again: it keeps the sigmoid too.
    if mx.default_device() == mx.gpu or gate.dtype != x.dtype:
        return _lean_swiglu(gate, x)
    return _swiglu_and_sigmoid(gate, x)[0]

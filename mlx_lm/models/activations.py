"""Adds to mlx_lm.models.activations: a `swiglu` of which only the inputs are kept for the backward pass."""

from .._upstream import run_upstream

run_upstream(globals(), needs=("swiglu",))

from contextlib import contextmanager

import mlx.core as mx

_upstream_swiglu = swiglu
_keeps_inputs_only = False


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


def swiglu(gate, x):
    """As upstream's, silu(gate) * x."""
    return _lean_swiglu(gate, x) if _keeps_inputs_only else _upstream_swiglu(gate, x)


@contextmanager
def recomputed_activations():
    """Within the context, `swiglu` is computed again in the backward pass and keeps nothing but its inputs."""
    global _keeps_inputs_only
    before, _keeps_inputs_only = _keeps_inputs_only, True
    try:
        yield
    finally:
        _keeps_inputs_only = before

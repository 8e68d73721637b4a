"""Adds to mlx_lm.models.gated_delta: another function may compute the recurrence while a context lasts.

Upstream's models import `gated_delta_update` by name; here it asks first whether a function stands in.
"""

from .._upstream import run_upstream

run_upstream(globals(), needs=("gated_delta_update", "compute_g", "compute_lower_bound_g"))

from contextlib import contextmanager
from contextvars import ContextVar

import mlx.core as mx
import mlx.nn as nn

_upstream_update = gated_delta_update  # noqa: F821
_stand_in = ContextVar("stand_in", default=(None, False))


@contextmanager
def computed_by(recurrence, always=False):
    """Within the context, `gated_delta_update` has `recurrence` compute what upstream has its loop compute.

    Args:
        recurrence: takes queries and keys `(B, T, Hk, Dk)`, values `(B, T, Hv, Dv)`, the gates' logarithms, at most
            0, `(B, T, Hv)` or `(B, T, Hv, Dk)`, float32, beta `(B, T, Hv)`, and a state `(B, Hv, Dv, Dk)` or None;
            returns what `gated_delta_update` does.
        always: in place of upstream's kernel for Metal too.
    """
    token = _stand_in.set((recurrence, always))
    try:
        yield
    finally:
        _stand_in.reset(token)


def gated_delta_update(
    q, k, v, a, b, A_log, dt_bias, state=None, mask=None,
    *, use_kernel=True, lower_bound=None, allow_neg_eigval=False,
):  # fmt: skip
    """Upstream's function, for which a function given to `computed_by` may stand in.

    It does wherever upstream would run its loop, without Metal and in training, and there is no mask.
    """
    recurrence, always = _stand_in.get()
    has_kernel = use_kernel and mx.default_device() == mx.gpu and mx.metal.is_available()
    if recurrence is None or mask is not None or (has_kernel and not always):
        options = {"use_kernel": use_kernel, "lower_bound": lower_bound, "allow_neg_eigval": allow_neg_eigval}
        return _upstream_update(q, k, v, a, b, A_log, dt_bias, state, mask, **options)
    beta = mx.sigmoid(b) * (2.0 if allow_neg_eigval else 1.0)
    return recurrence(q, k, v, _log_gate(a, A_log, dt_bias, lower_bound), beta, state)


def _log_gate(a, A_log, dt_bias, lower_bound):
    """The logarithm of `compute_g`'s or `compute_lower_bound_g`'s gates, which may be 0 or 1 when rounded."""
    rate = mx.exp(A_log.astype(mx.float32))
    if lower_bound is None:
        return -rate * nn.softplus(a + dt_bias)
    return lower_bound * mx.sigmoid(rate * (a.astype(mx.float32) + dt_bias))

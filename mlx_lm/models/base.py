"""Adds to mlx_lm.models.base: a cache that has `attend` attends by itself."""

from .._upstream import run_upstream

run_upstream(globals(), needs=("scaled_dot_product_attention", "create_causal_mask", "create_attention_mask"))

_upstream_attention = scaled_dot_product_attention


def scaled_dot_product_attention(queries, keys, values, cache, scale, mask, sinks=None):
    """As upstream's; a cache that has `attend` is given all the rest, and its answer is the output."""
    if hasattr(cache, "attend"):
        return cache.attend(queries, keys, values, scale, mask, sinks)
    return _upstream_attention(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)

"""How much memory MLX may hold: little more than a run's arrays need."""

from contextlib import contextmanager

import mlx.core as mx

from .attention import on_cuda

# Steps are measured with no array held for longer than needed; others may hold so much more.
SLACK = 1.15
# What is kept for the next arrays may make so much of the most that arrays have taken.
MOST_HELD = 1.3


@contextmanager
def usual_memory_limit():
    """MLX's memory limit is after the context what it was before."""
    usual = mx.set_memory_limit(0)
    mx.set_memory_limit(usual)
    try:
        yield
    finally:
        mx.set_memory_limit(usual)


def measure_step(work, tokens, most_tokens):
    """Evaluate a step; on CUDA, set MLX's memory limit to what the largest one will need.

    MLX's CUDA backend hands out kernels faster than they run, and keeps all their arrays until they have: a step then
    holds up to twice what it needs. At its limit MLX waits for the device before it hands out more, which costs next to
    nothing while the device is busy.

    Args:
        work: all that the step makes, a tree of arrays; the optimizer's state among them.
        tokens, most_tokens: how many this step and the largest one run over.

    Returns:
        The most bytes that arrays took before: `mx.get_peak_memory()` counts from this step on.
    """
    mx.synchronize()
    mx.clear_cache()
    earlier = mx.get_peak_memory()
    mx.reset_peak_memory()
    usual = mx.set_memory_limit(0) if on_cuda() else 0
    mx.eval(work)
    mx.synchronize()
    if on_cuda():
        resting = mx.get_active_memory()
        need = (mx.get_peak_memory() - resting) * max(1.0, most_tokens / tokens)
        mx.set_memory_limit(min(usual, int(resting + SLACK * need)))
    return earlier


def trim_cache(threshold=0):
    """Give back what MLX keeps for later arrays, where that is more than `threshold` bytes, or without one, much."""
    if threshold:
        if mx.get_cache_memory() > threshold:
            mx.clear_cache()
    elif mx.get_active_memory() + mx.get_cache_memory() > MOST_HELD * mx.get_peak_memory():
        mx.clear_cache()

"""How much memory MLX may hold: little more than a run's arrays need.

MLX's CUDA backend hands out kernels faster than they run, and keeps all their arrays until they have: a step then
holds up to twice what it needs, and a forward pass many times that. At its memory limit MLX gives back what it keeps
for later arrays, and waits for the device before it hands out more, which costs next to nothing while the device is
busy. So the first evaluation of a kind is made with a limit of 0, and what it takes sets the limit for the others.
"""

from contextlib import contextmanager

import mlx.core as mx

from .attention import on_cuda

# What an evaluation may take besides what was seen to be needed, and what may be kept between two, as shares of that.
SLACK = 1.15
MOST_HELD = 1.3

# The most that arrays took before MLX's own count was begun anew.
_earlier_peak = 0
# The most that arrays and what MLX keeps for later ones took after a step or a validation's batch.
_most_held = 0


def peak_memory():
    """The most bytes that MLX's arrays have taken."""
    return max(_earlier_peak, mx.get_peak_memory())


def held_memory():
    """The most bytes that MLX's arrays and its cache together have taken, as far as `trim_cache` saw."""
    return max(_most_held, peak_memory())


def begin_peak_anew():
    """Have MLX count its peak from here, and keep the earlier one for `peak_memory`."""
    global _earlier_peak
    _earlier_peak = peak_memory()
    mx.reset_peak_memory()


@contextmanager
def bounded_memory():
    """Within the context, MLX holds little more than what evaluations need; gives the function that evaluates.

    It takes a tree of arrays, and how many times as much as the first one a later evaluation will take at most. On the
    first call it sets MLX's limit on CUDA, which is as before after the context.
    """
    usual = mx.set_memory_limit(0)
    mx.set_memory_limit(usual)
    measured = False

    def evaluate(work, growth=1.0):
        nonlocal measured
        if not measured and on_cuda():
            mx.set_memory_limit(min(usual, _limit_for(work, growth)))
        mx.eval(work)
        measured = True
        trim_cache()

    try:
        yield evaluate
    finally:
        mx.set_memory_limit(usual)


def _limit_for(work, growth):
    """Evaluate `work` with as little memory as can be, and give the limit for what takes `growth` times as much."""
    mx.synchronize()
    mx.clear_cache()
    begin_peak_anew()
    mx.set_memory_limit(0)
    mx.eval(work)
    mx.synchronize()
    resting = mx.get_active_memory()
    return int(resting + SLACK * (mx.get_peak_memory() - resting) * max(1.0, growth))


def trim_cache(threshold=0):
    """Give back what MLX keeps for later arrays, where that is more than `threshold` bytes, or without one, much.

    On CUDA all of it: arrays of one shape of batch fit no other, and what is freed in the midst of a step can be used
    again only after the device has caught up, so that the process came to hold twice what its arrays took.
    """
    global _most_held
    held = mx.get_active_memory() + mx.get_cache_memory()
    _most_held = max(_most_held, held)
    if threshold:
        much = mx.get_cache_memory() > threshold
    else:
        much = on_cuda() or held > MOST_HELD * mx.get_peak_memory()
    if much:
        mx.clear_cache()

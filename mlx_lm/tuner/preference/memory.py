"""How much memory MLX may hold: little more than a run's arrays need.

MLX's CUDA backend hands out kernels faster than they run, and keeps all their arrays until they have: a step then
holds up to twice what it needs, and a forward pass many times that. At its memory limit MLX gives back what it keeps
for later arrays, and waits for the device before it hands out more, which costs next to nothing while the device is
busy. So the first evaluation of a kind is made with a limit of 0, and what it takes sets the limit for the others.
"""

from contextlib import contextmanager
from itertools import chain

import mlx.core as mx

from .attention import on_cuda
from .cuda_cache import all_kept
from .driver_pool import driver_pool

LESS = "a smaller batch_size with more grad_accumulation_steps, a smaller max_seq_length, or grad_checkpoint takes less"
# What may be kept between two evaluations, with what lies there, as a share of what was seen to be needed.
MOST_HELD = 1.3
# Calls of `trim_cache` from one giving back on CUDA to the next at least: after each it took a third of the speed.
EVERY = 10

# The most that arrays took before MLX's own count was begun anew.
_earlier_peak = 0
# The most that arrays and what MLX keeps for later ones took after a step or a validation's batch.
_most_held = 0
_calls = 0


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


class Need:
    """What evaluations of a kind take.

    Attributes:
        taken: bytes besides what lay there before; None until it was measured.
    """

    taken = None


@contextmanager
def bounded_memory(need=None):
    """Within the context, MLX holds little more than what evaluations need; gives the function that evaluates.

    It takes a tree of arrays, how many times as much as the first one a later evaluation will take at most, and whether
    to wait for the arrays. On the first call it sets MLX's limit on CUDA, and what the driver keeps there; both are as
    before after the context.

    Args:
        need: the `Need` of several such contexts, of which the first one measures.
    """
    usual = mx.set_memory_limit(0)
    mx.set_memory_limit(usual)
    need, is_set, pool = need or Need(), not on_cuda(), driver_pool()
    kept = None if pool is None else pool.kept

    def evaluate(work, growth=1.0, wait=True):
        nonlocal is_set
        all_kept()
        if not is_set:
            if need.taken is None:
                need.taken = max(1.0, growth) * _taken_by(work)
            _finish()
            limit = min(usual, int(mx.get_active_memory() + need.taken))
            mx.set_memory_limit(limit)
            if pool is not None:
                # No more than MLX may take itself: from there on it lets go of arrays, whatever is free in the pool.
                pool.kept = max(kept, min(MOST_HELD * limit, usual))
            is_set = True
        (mx.eval if wait else mx.async_eval)(work)
        trim_cache()

    try:
        yield evaluate
    finally:
        mx.set_memory_limit(usual)
        if pool is not None:
            pool.kept = kept


def one_behind(evaluate, works):
    """Gives each `(arrays, ...)` of an iterator once its arrays are there, and the device is at the next one's.

    Arrays may be None where there is nothing to evaluate, of which nothing is learned for the others.
    """
    earlier = None
    for work in chain(works, [None]):
        if work is not None and work[0] is not None:
            evaluate(work[0], wait=False)
        if earlier is not None:
            mx.eval(earlier[0])
            yield earlier
        earlier = work


def _taken_by(work):
    """The bytes besides what stays that `work` takes, evaluated with as little memory as can be."""
    _finish()
    mx.clear_cache()
    begin_peak_anew()
    mx.set_memory_limit(0)
    mx.eval(work)
    _finish()
    return mx.get_peak_memory() - mx.get_active_memory()


def _finish():
    """Wait for the device, before `mx.clear_cache` does on CUDA.

    That one keeps Python's lock meanwhile, so that no other thread could end a worker whose device waits for another
    one that is gone. `mx.eval` lets go of it.
    """
    mx.eval(mx.zeros(1))


def trim_cache(threshold=0):
    """Give back what MLX keeps for later arrays, where that is more than `threshold` bytes, or without one, much.

    On CUDA with what the driver keeps, which MLX does not count: arrays of one shape of batch fit no other, and its
    pool falls into pieces. There MLX's go to the pool, where pieces come together, and only what is above the bound to
    the system.
    """
    global _most_held, _calls
    held, pool = mx.get_active_memory() + mx.get_cache_memory(), driver_pool()
    if pool is not None:
        held = max(held, pool.reserved)
    _most_held = max(_most_held, held)
    _calls += 1
    most = MOST_HELD * peak_memory()
    much = mx.get_cache_memory() > threshold if threshold else held > most
    if much and (threshold or pool is None):
        if on_cuda():
            _finish()
        mx.clear_cache()
    elif much and _calls % EVERY == 0:
        pool.trim(most)
        if pool.reserved > most:
            # With the next array goes what is above MLX's limit. Unlike `mx.clear_cache` that waits for nothing.
            usual = mx.set_cache_limit(0)
            mx.async_eval(mx.zeros(1))
            mx.set_cache_limit(usual)

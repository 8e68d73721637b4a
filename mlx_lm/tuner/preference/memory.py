"""How far MLX may run ahead of a GPU of NVIDIA's: as far as a step's own memory goes.

MLX's CUDA backend hands out kernels faster than they run, and keeps all their arrays until they have: a step then
holds up to twice what it needs. Where the arrays are more than MLX's memory limit it waits for the device before it
hands out more, which costs next to nothing while the device is busy. So the limit is set to what a step was seen to
need.
"""

import mlx.core as mx

from .lean import on_cuda

# Steps are measured with no array held for longer than needed; others may hold so much more.
SLACK = 1.1


class Dispatch:
    """Hands steps to the device, with little more memory than they need where MLX would take more."""

    def __init__(self):
        self._needs = {}  # of compiled steps and of others: bytes between steps, bytes besides, and tokens
        self._earlier_peak = 0

    def __call__(self, work, tokens, update, compiled):
        """Begin to evaluate a step.

        Args:
            work: all that the step makes, a tree of arrays.
            tokens: how many it runs over.
            update: whether it updates the model; the first one that does is measured, with the optimizer's state made.
            compiled: whether it is compiled; those need less, and are measured apart.
        """
        if not on_cuda() or (compiled not in self._needs and not update):
            mx.async_eval(work)
        elif compiled not in self._needs:
            self._measure(work, tokens, compiled)
        else:
            resting, need, measured = self._needs[compiled]
            with_limit(int(resting + SLACK * need * max(1.0, tokens / measured)), mx.async_eval, work)

    def peak_memory(self):
        """The most bytes of memory that MLX's arrays have taken."""
        return max(self._earlier_peak, mx.get_peak_memory())

    def _measure(self, work, tokens, compiled):
        mx.synchronize()
        self._earlier_peak = self.peak_memory()
        mx.reset_peak_memory()
        with_limit(0, mx.eval, work)
        mx.synchronize()
        resting = mx.get_active_memory()
        self._needs[compiled] = resting, mx.get_peak_memory() - resting, tokens


def with_limit(limit, function, *args):
    """`function(*args)` with MLX's memory limit at `limit` bytes, if it is not lower."""
    usual = mx.set_memory_limit(limit)
    mx.set_memory_limit(min(limit, usual))
    try:
        return function(*args)
    finally:
        mx.set_memory_limit(usual)

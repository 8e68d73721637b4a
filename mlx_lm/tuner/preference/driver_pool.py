"""The pool from which CUDA's driver gives MLX memory: what lies free there, and when the system gets it back.

By default all of it goes back whenever the host waits for the device, as with `mx.clear_cache`; the arrays after that
wait up to half a millisecond each until memory is mapped anew. Source: the CUDA Driver API, "Stream Ordered Memory
Allocator".
"""

import ctypes
from functools import cache

import mlx.core as mx

from .attention import on_cuda

# Values of CUmemPool_attribute.
RELEASE_THRESHOLD, RESERVED_NOW = 4, 5


class DriverPool:
    """The default pool of the device that this thread computes on.

    Args:
        driver: the driver's library.

    Raises:
        OSError: there is no such pool.
    """

    def __init__(self, driver):
        self._driver, self._pool, device = driver, ctypes.c_void_p(), ctypes.c_int()
        self._check(driver.cuCtxGetDevice(ctypes.byref(device)))
        self._check(driver.cuDeviceGetDefaultMemPool(ctypes.byref(self._pool), device))

    @property
    def reserved(self):
        """The bytes that the pool has of the system: MLX's arrays, what MLX keeps for later ones, and what is free."""
        return self._read(RESERVED_NOW)

    @property
    def kept(self):
        """Bytes of the system up to which the pool keeps what is free, whenever the host waits for the device."""
        return self._read(RELEASE_THRESHOLD)

    @kept.setter
    def kept(self, most):
        value = ctypes.c_uint64(int(most))
        self._check(self._driver.cuMemPoolSetAttribute(self._pool, RELEASE_THRESHOLD, ctypes.byref(value)))

    def trim(self, most):
        """Give free memory back to the system while the pool has more than `most` bytes of it."""
        self._check(self._driver.cuMemPoolTrimTo(self._pool, ctypes.c_size_t(int(most))))

    def _read(self, attribute):
        value = ctypes.c_uint64()
        self._check(self._driver.cuMemPoolGetAttribute(self._pool, attribute, ctypes.byref(value)))
        return value.value

    @staticmethod
    def _check(error):
        if error:
            raise OSError(f"CUDA's driver answers {error}")


@cache
def driver_pool():
    """The `DriverPool` of MLX's device, or None where there is none."""
    if not on_cuda():
        return None
    mx.eval(mx.zeros(1))  # so that this thread has MLX's context
    try:
        pool = DriverPool(ctypes.CDLL("libcuda.so.1"))
        pool.kept = pool.kept  # a driver that refuses does so here, and not in a run
        return pool
    except (OSError, AttributeError):
        return None

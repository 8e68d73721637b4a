"""Settings of MLX's CUDA backend that suit training on batches of many shapes.

MLX reads them from the environment at its first computation on the GPU, and what stands there already is left as it is.
"""

import os

SETTINGS = {
    # A graph of kernels is made anew for each shape, which takes longer than to launch the kernels one by one.
    "MLX_USE_CUDA_GRAPHS": "0",
    # Plans of fused attention, one a shape; they are kept in host memory.
    "MLX_CUDA_SDPA_CACHE_SIZE": "512",
    "MLX_CUDA_SDPA_BACKWARD_CACHE_SIZE": "512",
}


def suit_training():
    """Put SETTINGS into the environment, where they are not set there."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)

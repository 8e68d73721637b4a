"""What MLX's backends need before they start: a fast BLAS on a Linux CPU, and settings that suit training.

MLX's CPU package for Linux is linked against the reference BLAS, some forty times slower in float32 products
than OpenBLAS or MKL. Symbols loaded first win, so loading one of these before MLX is all it takes.
"""

import ctypes
import json
import os
import struct
import sys
import tempfile
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LIBRARIES = ("libopenblas.so.0", "libmkl_rt.so.3", "libmkl_rt.so.2")
# By which they are told how many threads to take, in the environment and by their own functions.
THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")
SET_THREADS = ("openblas_set_num_threads", "MKL_Set_Num_Threads")
HINT = (
    "MLX multiplies with its slow built-in BLAS here; some forty times faster with OpenBLAS: "
    "apt-get install libopenblas0-pthread (or your distribution's OpenBLAS), and import mlx_lm before mlx."
)
IDLE_GPU = (
    "MLX's CPU package leaves this machine's NVIDIA GPU idle: install '.[cuda13]', or with a driver older than 580 "
    "'.[cuda12]', into a new environment."
)
# Where Linux, and Linux within Windows, have a GPU of NVIDIA's.
NVIDIA = ("/dev/nvidia0", "/usr/lib/wsl/lib/libcuda.so.1")
CUDA_SETTINGS = {
    # Graphs of kernels, kept for each shape, take gigabytes outside of MLX's arrays.
    "MLX_USE_CUDA_GRAPHS": "0",
    # Plans of fused attention, one a shape; they are kept in host memory.
    "MLX_CUDA_SDPA_CACHE_SIZE": "512",
    "MLX_CUDA_SDPA_BACKWARD_CACHE_SIZE": "512",
}

# M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h.
MALLOC_THRESHOLDS = (-1, -3)
# What compiled code begins with.
ELF = b"\x7fELF"


def is_linux_cpu():
    """Whether MLX computes on the CPU of a Linux machine here."""
    return sys.platform == "linux" and not _has_cuda()


def _has_cuda():
    return any(map(_installed, ("mlx-cuda", "mlx-cuda-12", "mlx-cuda-13")))


def _installed(package):
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def load_fast_blas():
    """Load the first library of LIBRARIES that there is, unless MLX is loaded already; its name, or None."""
    if "mlx.core" in sys.modules or not is_linux_cpu():
        return None
    for name in LIBRARIES:
        try:
            library = ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        _share_cores(library)
        return name
    return None


def _share_cores(library):
    """Have a BLAS take this worker's share of the cores, where others of its run are on this machine."""
    workers = _workers_here()
    if workers > 1 and not any(name in os.environ for name in THREADS):
        for function in (getattr(library, name, None) for name in SET_THREADS):
            if function is not None:
                function(max(1, len(os.sched_getaffinity(0)) // workers))


def _workers_here():
    """How many workers of MLX's ring are on this machine: those with this one's address."""
    try:
        hosts = json.loads(Path(os.environ["MLX_HOSTFILE"]).read_text())
        addresses = [host[0].rpartition(":")[0] for host in hosts]
        return addresses.count(addresses[int(os.environ["MLX_RANK"])])
    except (KeyError, OSError, ValueError, IndexError, TypeError, AttributeError):
        return 1  # MLX tells what is wrong with them


def slow_blas_hint():
    """One line that says how to get a fast BLAS, or None where one is in use or it does not matter."""
    if not is_linux_cpu():
        return None
    with open("/proc/self/maps") as maps:
        loaded = maps.read()
    return None if "libopenblas" in loaded or "libmkl_rt" in loaded else HINT


def idle_gpu_hint():
    """One line that says so where MLX computes on the CPU beside a GPU of NVIDIA's, or None."""
    return IDLE_GPU if is_linux_cpu() and any(map(os.path.exists, NVIDIA)) else None


def unfit_gpu(info):
    """One sentence on why MLX's CUDA packages cannot compute on a GPU, or None; `info` is what MLX tells of it."""
    if not info:
        return (
            "MLX's CUDA package finds no GPU: it needs NVIDIA's driver, which nvidia-smi tells the version of, 580 or "
            "later for cuda13 and 550 for cuda12, and where CUDA_VISIBLE_DEVICES is set, a GPU in it; to compute on "
            "the CPU, uninstall that package and install mlx[cpu]."
        )
    capability = info.get("compute_capability_major", 8), info.get("compute_capability_minor", 0)
    if capability < (7, 5):
        return (
            f"the GPU, {info.get('device_name')}, has compute capability {'.'.join(map(str, capability))}, and MLX's "
            "CUDA packages have kernels for 7.5 (Turing) and later ones; take another GPU, or mlx[cpu]."
        )
    return None


def prepare_for_training():
    """Set what makes training faster, or smaller, before MLX first computes.

    CUDA_SETTINGS go into the environment; what is set there stays. Kernels for CUDA that MLX did not keep whole are
    removed. On a Linux CPU the C library is told to keep memory that is given back: MLX asks for each operation's
    arrays anew, and the system clears every page that it hands out.
    """
    for name, value in CUDA_SETTINGS.items():
        os.environ.setdefault(name, value)
    if _has_cuda():
        _keep_kernels_whole()
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if is_linux_cpu() else None
    for name in MALLOC_THRESHOLDS if mallopt else ():
        mallopt(name, 2**31 - 1)


def _keep_kernels_whole():
    """See to it that MLX finds no half of a kernel, and none of another GPU, among those that it keeps for later runs.

    On CUDA it writes the code, its names and its source one after another, and takes for the whole what is there: where
    a run was killed between, all later ones would end with "There is no kernel named ...", and where code is cut, as by
    a full disk, with a segmentation fault. Workers start together and compile the same: each has a folder of its own.
    So has each kind of GPU, which MLX's names do not tell: another one's code would end a run with "Failed to load
    compiled ... kernel". And MLX's own folder may be another user's, in which a kernel with a long name, for which it
    makes a folder, would end it with "Permission denied".
    """
    import mlx.core as mx

    folder = os.environ.get("MLX_PTX_CACHE_DIR")
    if not folder:
        user = getattr(os, "getuid", lambda: "")()
        folder = os.path.join(tempfile.gettempdir(), f"mlx_lm_{user}", mx.__version__)
    rank = os.environ.get("MLX_RANK", "0")
    for own in (mx.device_info(mx.gpu).get("architecture", ""), "" if rank == "0" else f"worker_{rank}"):
        if own not in ("", *Path(folder).parts):
            folder = os.path.join(folder, own)
    os.environ["MLX_PTX_CACHE_DIR"] = folder
    for code in Path(folder).rglob("*.ptx"):
        # Another user's, or gone by now, they are left.
        with suppress(OSError):
            if not _is_whole(code):
                code.unlink()


def _is_whole(code):
    """Whether a kernel's code is as long as its header says, where that is an ELF's, and names and source are there."""
    if not all(path.is_file() and path.stat().st_size for path in (code.with_suffix(".txt"), code.with_suffix(".cu"))):
        return False
    with code.open("rb") as file:
        header = file.read(64)
    if not header.startswith(ELF):
        return not ELF.startswith(header)
    # Tables of segments and of sections stand last: where each begins, the size of an entry, and how many there are.
    if len(header) < 64:
        return False
    starts, sizes = struct.unpack_from("<QQ", header, 32), struct.unpack_from("<HHHH", header, 54)
    ends = (start + size * count for start, size, count in zip(starts, sizes[::2], sizes[1::2], strict=True))
    return max(ends) <= code.stat().st_size

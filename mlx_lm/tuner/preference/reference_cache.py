"""Reference logps on disk, an entry for each reference policy: its rows found by a digest of their tokens."""

import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..._version import __version__
from ...cli_ui import rprint
from .files import replace_file

# Part of every fingerprint: raise it whenever the way that logps are computed changes.
FORMAT = 4
ROW = np.dtype([("key", "V16"), ("values", "<f4", 4)])  # `row_key`, and the four numbers of `Reference.logps`
# An entry of the cache, or one that a process is still writing or was stopped at: nothing else is ever deleted.
ENTRY = re.compile(r"[0-9a-f]{32}\.logps|\.[0-9a-f]{32}\.logps\.[0-9a-f]{16}\.tmp")
DIGEST_BYTES = 16
CHECKSUM_WORDS = 2**22  # words in one part of a checksum: its temporaries take some 100 MB


def row_key(pair):
    """A 16-byte digest of a pair's tokens and lengths, and of what is not scored of them."""
    lengths = [len(pair.prompt), len(pair.chosen), len(pair.rejected)]
    tokens = np.array([*lengths, *pair.prompt, *pair.chosen, *pair.rejected], np.int64)
    unscored = repr(pair.unscored).encode() if any(pair.unscored) else b""
    return hashlib.blake2b(tokens.tobytes() + unscored, digest_size=16).digest()


def fingerprint(model):
    """A digest of all that a model's logps depend on: weights, configuration, settings, device, library versions.

    LoRA matrices whose product is zero are left out: they change nothing yet.
    """
    digest = hashlib.blake2b(digest_size=16)
    device = mx.device_info().get("device_name", str(mx.default_device()))
    config = getattr(model, "args", None) or getattr(model, "config", None)
    digest.update(repr([FORMAT, device, mx.__version__, __version__, config]).encode())
    adapters, settings = {}, []
    for name, module in model.named_modules():
        parent, _, last = name.rpartition(".")
        if "lora_b" in module:
            adapters[name] = any(mx.any(value != 0).item() for _, value in tree_flatten(module["lora_b"]))
            if adapters[name]:
                digest.update(repr((name, module.scale)).encode())
        elif parent not in adapters or last in ("linear", "embedding"):
            # Of a model that a program has made or changed, the configuration does not tell them.
            settings.append((parent if parent in adapters else name, _settings(module)))
    digest.update(repr(sorted(settings)).encode())
    for name, value in sorted(tree_flatten(model.parameters()), key=lambda item: item[0]):
        if adapters.get(name.partition(".lora_")[0]) is False:
            continue
        # A base layer has one name whether or not an adapter wraps it.
        module, _, leaf = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        if last in ("linear", "embedding") and parent in adapters:
            name = f"{parent}.{leaf}"
        digest.update(repr((name, value.shape, str(value.dtype), checksum(value))).encode())
    return digest.hexdigest()


def _settings(module):
    """A module's numbers and names, such as an attention's scale, but those of how it is trained."""
    own = {name: value for name, value in vars(module).items() if isinstance(value, (int, float, str))}
    return sorted((name, value) for name, value in own.items() if name not in ("_training", "_no_grad"))


def checksum(array):
    """Two 32-bit sums of an array's words, each mixed with its place: any one changed bit changes them.

    Source: the multiplications and shifts are the finalizer of MurmurHash3 (Appleby), which maps words one to one.
    """
    words = mx.view(array.reshape(-1), mx.uint8 if array.nbytes % 4 else mx.uint32)
    factors = [mx.array(factor, mx.uint32) for factor in (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35)]
    sums = mx.zeros((2,), mx.uint32)
    for start in range(0, words.size, CHECKSUM_WORDS):
        part = words[start : start + CHECKSUM_WORDS]
        mixed = part ^ (mx.arange(start, start + part.size, dtype=mx.uint32) * factors[0])
        mixed = (mixed ^ (mixed >> 16)) * factors[1]
        mixed = (mixed ^ (mixed >> 13)) * factors[2]
        sums = sums + mx.stack([mixed.sum(), (mixed ^ (mixed >> 16)).sum()])
        # Part after part, so that the temporaries of only one are alive.
        mx.eval(sums)
    return sums.tolist()


class Cache:
    """Reference logps on disk, one file a fingerprint: a ROW for each pair, and a digest behind them."""

    def __init__(self, folder, name, size):
        self.folder = Path(folder).expanduser()
        self.name = name
        self.path = self.folder / f"{name}.logps"
        self.size = size

    def read(self):
        """`{row key: (4,) float32}`; empty where the entry is missing, damaged or not of this fingerprint."""
        try:
            content = self.path.read_bytes()
            rows, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
            if digest != self._digest(rows):
                raise ValueError("it is damaged, or another model's")
            table = np.frombuffer(rows, ROW)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            rprint(f"[WARNING] The reference cache {self.path} cannot be read ({error}); it is computed again.")
            return {}
        # The time of use decides what goes first; a folder that cannot be written to is still good to read.
        with suppress(OSError):
            os.utime(self.path)
        return {key.tobytes(): values for key, values in zip(table["key"], table["values"], strict=True)}

    def write(self, known):
        """Replace the entry by the rows of `known`, the last ones where the folder's size does not hold them all."""
        kept = min(len(known), int(self.size * 1e6 // ROW.itemsize))
        if kept == 0 or mx.distributed.init().rank() != 0:
            return
        rows = b"".join(key + values.tobytes() for key, values in list(known.items())[-kept:])
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_file(self.path, lambda file: file.write(rows + self._digest(rows)))
            self._drop_oldest()
        except OSError as error:
            rprint(f"[WARNING] The reference logps could not be kept in {self.folder} ({error}).")

    def _drop_oldest(self):
        """Delete the entries used longest ago until the folder fits its size."""
        entries = []
        for path in self.folder.iterdir():
            # Another process may drop the same entries.
            with suppress(FileNotFoundError):
                if ENTRY.fullmatch(path.name):
                    entries.append((path.stat().st_mtime, path.stat().st_size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total > self.size * 1e6 and path != self.path:
                total -= size
                path.unlink(missing_ok=True)

    def _digest(self, rows):
        return hashlib.blake2b(self.name.encode() + rows, digest_size=DIGEST_BYTES).digest()


def default_cache_folder():
    """Where reference logps are kept unless `reference_cache` says otherwise; None for a user without a home."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return None if cache.startswith("~") else Path(cache) / "mlx_lm" / "reference_logps"

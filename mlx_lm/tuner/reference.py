"""The reference policy's logps: computed once, before the first update, and kept on disk."""

import hashlib
import os
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..cli_ui import make_console, make_train_progress, rprint
from .batches import make_batch, plan
from .files import replace_file
from .logps import Scorer
from .sharing import model_dtype

# Part of every fingerprint: raise it whenever the way that logps are computed changes.
FORMAT = 1
ROW_BYTES = 16 + 4 * 4  # a row's key and its four float32 values


class Reference:
    """The reference policy.

    Args:
        model: the model, as it is before training. Its logps are taken in evaluation mode: without dropout.
        batch_size: pairs a batch, or None for what memory is ample for.
        share_prompt: as for `Scorer`.
        cache: folder that keeps logps between runs, or None to keep none.
        cache_size: megabytes that the folder may hold.
    """

    def __init__(self, model, batch_size=None, share_prompt=True, cache=None, cache_size=256.0):
        self.scorer = Scorer(model, share_prompt)
        self.batch_size = batch_size
        self.cache = None if cache is None else Cache(cache, fingerprint(model), cache_size)

    def logps(self, dataset, rows):
        """The logps of some rows of a dataset.

        Args:
            dataset: gives a `Pair` for a row number.
            rows: the row numbers.

        Returns:
            `(n, 2, 2)` float32, a row each: chosen and rejected, and of each the total and the `common`
            logps of `RowLogps`.
        """
        pairs = [dataset[int(row)] for row in rows]
        keys = [row_key(pair) for pair in pairs]
        known = {} if self.cache is None else self.cache.read()
        missing = [i for i, key in enumerate(keys) if key not in known]
        if missing:
            values = self._compute([pairs[i] for i in missing])
            known |= {keys[i]: value for i, value in zip(missing, values, strict=True)}
            if self.cache is not None:
                self.cache.write(known)
        return np.array([known[key] for key in keys], np.float32).reshape(-1, 2, 2)

    def _compute(self, pairs):
        world = mx.distributed.init()
        lengths = [[len(pair.prompt), len(pair.chosen), len(pair.rejected)] for pair in pairs]
        size = self.batch_size or ample_batch_size(self.scorer.model, max(p + max(c, r) for p, c, r in lengths))
        values = np.zeros((len(pairs), 4), np.float32)
        batches = plan(lengths, size, self.scorer.shares_prompt)
        model, training = self.scorer.model, self.scorer.model.training
        model.eval()
        with make_train_progress(make_console(), disable=world.rank() != 0) as progress:
            task = progress.add_task("ref", total=len(pairs))
            for rows in batches[world.rank() :: world.size()]:
                batch, *_ = make_batch([pairs[row] for row in rows], self.scorer.shares_prompt)
                logps = self.scorer(batch)
                out = mx.stack([logps.total, logps.common], axis=-1).reshape(2, len(rows), 2)
                values[rows] = np.array(out.transpose(1, 0, 2)).reshape(len(rows), 4)
                progress.advance(task, len(rows) * world.size())
        model.train(training)
        if world.size() > 1:
            values = np.array(mx.distributed.all_sum(mx.array(values), stream=mx.cpu))
        return values


def ample_batch_size(model, longest):
    """Pairs of the longest length whose activations take a small part of the device's memory."""
    memory = mx.device_info().get("memory_size", 8 * 2**30)
    width = max(value.shape[-1] for _, value in tree_flatten(model.parameters()) if value.ndim == 1)
    # A layer's activations in a forward pass: some forty vectors of the model's width a token.
    per_token = 40 * width * model_dtype(model).size
    tokens = min(max(memory // 20 // per_token, 2048), 65536)
    return max(1, tokens // (2 * longest))


def row_key(pair):
    """A 16-byte digest of a pair's tokens and lengths."""
    lengths = [len(pair.prompt), len(pair.chosen), len(pair.rejected)]
    tokens = np.array([*lengths, *pair.prompt, *pair.chosen, *pair.rejected], np.int64)
    return hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()


def fingerprint(model):
    """A digest of all that a model's logps depend on: weights, configuration, device, library versions.

    LoRA matrices whose product is zero are left out: they change nothing yet.
    """
    from importlib.metadata import version

    digest = hashlib.blake2b(digest_size=16)
    device = mx.device_info().get("device_name", str(mx.default_device()))
    digest.update(repr([FORMAT, device, version("mlx"), version("mlx-lm")]).encode())
    digest.update(repr(getattr(model, "args", None)).encode())
    adapters = {}
    for name, module in model.named_modules():
        if "lora_b" in module:
            adapters[name] = mx.any(module.lora_b != 0).item()
            if adapters[name]:
                digest.update(repr((name, getattr(module, "scale", None))).encode())
    for name, value in tree_flatten(model.parameters()):
        module, _, leaf = name.rpartition(".")
        if leaf in ("lora_a", "lora_b") and not adapters[module]:
            continue
        # A base layer has one name whether or not an adapter wraps it.
        parent, _, last = module.rpartition(".")
        if last in ("linear", "embedding") and parent in adapters:
            name = f"{parent}.{leaf}"
        digest.update(repr((name, value.shape, str(value.dtype), checksum(value))).encode())
    return digest.hexdigest()


def checksum(array):
    """Two 32-bit sums over an array's bits, each word weighed by its place; changes with any one word."""
    words = mx.view(array.reshape(-1), mx.uint8 if array.nbytes % 4 else mx.uint32)
    sums = mx.zeros((2,), mx.uint32)
    for start in range(0, words.size, 2**25):
        part = words[start : start + 2**25].astype(mx.uint32)
        place = mx.arange(start, start + part.size, dtype=mx.uint32)
        sums = sums + mx.stack(
            [
                (part * (place * factor + 1)).sum()
                for factor in (mx.array(0x9E3779B2, mx.uint32), mx.array(0x85EBCA6A, mx.uint32))
            ]
        )
        mx.eval(sums)
    return sums.tolist()


class Cache:
    """Reference logps on disk, one file a fingerprint."""

    def __init__(self, folder, name, size):
        self.folder = Path(folder).expanduser()
        self.name = name
        self.path = self.folder / f"{name}.npz"
        self.size = size

    def read(self):
        """`{row key: (4,) float32}`; empty where the entry is missing, damaged or not of this fingerprint."""
        try:
            with np.load(self.path, allow_pickle=False) as entry:
                keys, values, digest = entry["keys"], entry["values"], entry["digest"].tobytes()
            os.utime(self.path)
        except FileNotFoundError:
            return {}
        except Exception as error:
            # Whatever a damaged file raises, the remedy is the same: compute again.
            rprint(f"[WARNING] The reference cache {self.path} cannot be read ({error}); it is computed again.")
            return {}
        sound = keys.shape[1:] == (16,) and keys.dtype == np.uint8 and values.shape == (len(keys), 4)
        if not sound or digest != self._digest(keys, values) or not np.isfinite(values).all():
            rprint(f"[WARNING] The reference cache {self.path} is damaged; it is computed again.")
            return {}
        return {key.tobytes(): value for key, value in zip(keys, values, strict=True)}

    def write(self, known):
        """Replace the entry, then drop the entries used longest ago until the folder fits its size."""
        if mx.distributed.init().rank() != 0:
            return
        keys = np.frombuffer(b"".join(known), np.uint8).reshape(-1, 16)
        values = np.array(list(known.values()), np.float32).reshape(-1, 4)
        if not np.isfinite(values).all() or len(keys) * ROW_BYTES > self.size * 1e6:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            digest = np.frombuffer(self._digest(keys, values), np.uint8)
            replace_file(self.path, lambda path: np.savez(path, keys=keys, values=values, digest=digest))
            entries = sorted(self.folder.glob("*.npz"), key=lambda path: path.stat().st_mtime)
            total = sum(path.stat().st_size for path in entries)
            for path in entries[:-1]:
                if total > self.size * 1e6:
                    total -= path.stat().st_size
                    path.unlink(missing_ok=True)
        except OSError as error:
            rprint(f"[WARNING] The reference logps could not be kept in {self.folder} ({error}).")

    def _digest(self, keys, values):
        content = self.name.encode() + keys.tobytes() + np.ascontiguousarray(values, np.float32).tobytes()
        return hashlib.blake2b(content, digest_size=16).digest()


def default_cache_folder():
    """Where reference logps are kept unless `reference_cache` says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx_lm" / "reference_logps"

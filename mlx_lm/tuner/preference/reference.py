"""The reference policy's logps: computed once, before the first update, and kept on disk."""

import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..._version import __version__
from ...cli_ui import make_console, make_train_progress, rprint
from .batches import PACKED, make_batch, plan
from .files import replace_file
from .logps import Scorer
from .modules import evaluating, first_output
from .options import ConfigError

# Part of every fingerprint: raise it whenever the way that logps are computed changes.
FORMAT = 3
ROW_BYTES = 16 + 4 * 4  # a row's key and its four float32 values
# An entry of the cache, or one that a process is still writing or was stopped at: nothing else is ever deleted.
ENTRY = re.compile(r"[0-9a-f]{32}\.npz|\.[0-9a-f]{32}\.\d+\.npz")
CHECKSUM_WORDS = 2**22  # words in one part of a checksum: its temporaries take some 100 MB


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

        Raises:
            ConfigError: logps that are not finite.
        """
        pairs = [dataset[int(row)] for row in rows]
        keys = [row_key(pair) for pair in pairs]
        known = {} if self.cache is None else self.cache.read()
        # Workers may have caches of their own, but they compute together.
        unknown = mx.distributed.all_sum(mx.array([key not in known for key in keys], mx.int32))
        missing = np.flatnonzero(np.array(unknown))
        if len(missing):
            values = np.full((len(missing), 4), np.nan, np.float32)
            try:
                self._compute([pairs[i] for i in missing], values)
            finally:
                # An interrupted pass goes on where it was.
                done = np.isfinite(values).all(axis=1)
                known |= {keys[i]: value for i, value in zip(missing[done], values[done], strict=True)}
                if self.cache is not None and done.any():
                    self.cache.write(known)
        return np.array([known[key] for key in keys], np.float32).reshape(-1, 2, 2)

    def release(self):
        """Let go of the model, so that its memory is free; no more logps can be taken."""
        self.scorer = None
        mx.clear_cache()

    def _compute(self, pairs, values):
        """Fill `values` `(n, 4)`, batch by batch."""
        world = mx.distributed.init()
        lengths = [[len(pair.prompt), len(pair.chosen), len(pair.rejected)] for pair in pairs]
        batches = self._batches(np.array(lengths))
        progress = make_train_progress(make_console(), disable=world.rank() != 0)
        with evaluating(self.scorer.model), progress:
            task = progress.add_task("ref", total=len(pairs))
            for turn in range(world.rank(), len(batches), world.size()):
                rows = batches[turn]
                batch, *_ = make_batch([pairs[row] for row in rows], self.scorer.arrangement)
                logps = self.scorer(batch)
                out = mx.stack([logps.total, logps.common], axis=-1).reshape(2, len(rows), 2)
                values[rows] = np.array(out.transpose(1, 0, 2)).reshape(len(rows), 4)
                progress.advance(task, sum(map(len, batches[turn : turn + world.size()])))
        if world.size() > 1:
            mine = np.concatenate(batches[world.rank() :: world.size()] or [[]]).astype(int)
            shares = np.zeros_like(values)
            shares[mine] = values[mine]
            values[:] = np.array(mx.distributed.all_sum(mx.array(shares)))
        bad = (~np.isfinite(values).all(axis=1)).sum()
        if bad:
            raise ConfigError(
                f"the reference gives logps that are not finite for {bad} of {len(pairs)} pairs: its weights are "
                "damaged, or too large for their dtype; check what the model generates."
            )

    def _batches(self, lengths):
        """Rows of like length together: `batch_size` of them, or as many as memory is ample for."""
        if self.batch_size is not None:
            return plan(lengths, self.batch_size, self.scorer.arrangement)
        totals = lengths[:, 0] + lengths[:, 1:].max(axis=1)
        most, share = ample_tokens(self.scorer, int(totals.max())), -(-len(lengths) // mx.distributed.init().size())
        packed = self.scorer.arrangement == PACKED
        batches, rows = [], []
        for row in plan(lengths, len(lengths), self.scorer.arrangement)[0].tolist():
            together = [*rows, row]
            tokens = lengths[together].sum() if packed else 2 * len(together) * totals[together].max()
            if rows and (tokens > most or len(rows) == share):
                batches.append(rows)
                rows = []
            rows.append(row)
        return [*batches, rows]


def ample_tokens(scorer, longest):
    """Tokens in a batch whose activations take a small part of the device's memory.

    Args:
        scorer: the `Scorer` that will run them.
        longest: tokens of the longest row.
    """
    head, tokens = scorer.head, mx.zeros((1, 1), mx.int32)
    states = head.hidden_states(tokens, None) if head is not None else first_output(scorer.model(tokens))
    width = states.shape[-1]
    # A token's activations in a layer: some forty vectors of the model's width, and where attention is not fused
    # three float32 scores for each token before it and each head of 64.
    per_token = width * (40 * states.dtype.size + 3 * 4 * longest / 64)
    return min(max(int(device_memory() / 20 / per_token), 1024), 8192)


def device_memory():
    """Bytes of memory of the default device."""
    info = mx.device_info()
    if "memory_size" in info or "total_memory" in info:
        return info.get("memory_size") or info["total_memory"]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def row_key(pair):
    """A 16-byte digest of a pair's tokens and lengths."""
    lengths = [len(pair.prompt), len(pair.chosen), len(pair.rejected)]
    tokens = np.array([*lengths, *pair.prompt, *pair.chosen, *pair.rejected], np.int64)
    return hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()


def fingerprint(model):
    """A digest of all that a model's logps depend on: weights, configuration, device, library versions.

    LoRA matrices whose product is zero are left out: they change nothing yet.
    """
    digest = hashlib.blake2b(digest_size=16)
    device = mx.device_info().get("device_name", str(mx.default_device()))
    config = getattr(model, "args", None) or getattr(model, "config", None)
    digest.update(repr([FORMAT, device, mx.__version__, __version__, config]).encode())
    adapters = {}
    for name, module in model.named_modules():
        if "lora_b" in module:
            adapters[name] = any(mx.any(value != 0).item() for _, value in tree_flatten(module["lora_b"]))
            if adapters[name]:
                digest.update(repr((name, module.scale)).encode())
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


def checksum(array):
    """Two 32-bit sums of an array's words, each mixed with its place: any one changed bit changes them.

    Source: the multiplications and shifts are the finalizer of MurmurHash3 (Appleby), which maps words one to one.
    """
    words = mx.view(array.reshape(-1), mx.uint8 if array.nbytes % 4 else mx.uint32)
    factors = [mx.array(factor, mx.uint32) for factor in (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35)]
    sums = mx.zeros((2,), mx.uint32)
    for start in range(0, words.size, CHECKSUM_WORDS):
        part = words[start : start + CHECKSUM_WORDS].astype(mx.uint32)
        mixed = part ^ (mx.arange(start, start + part.size, dtype=mx.uint32) * factors[0])
        mixed = (mixed ^ (mixed >> 16)) * factors[1]
        mixed = (mixed ^ (mixed >> 13)) * factors[2]
        sums = sums + mx.stack([mixed.sum(), (mixed ^ (mixed >> 16)).sum()])
        # Part after part, so that the temporaries of only one are alive.
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
        # The time of use decides what goes first; a folder that cannot be written to is still good to read.
        with suppress(OSError):
            os.utime(self.path)
        return {key.tobytes(): value for key, value in zip(keys, values, strict=True)}

    def write(self, known):
        """Replace the entry by the rows of `known`, the last ones where the folder's size does not hold them all."""
        kept = min(len(known), int(self.size * 1e6 // ROW_BYTES))
        if kept == 0 or mx.distributed.init().rank() != 0:
            return
        keys = np.frombuffer(b"".join(known), np.uint8).reshape(-1, 16)[-kept:]
        values = np.array(list(known.values()), np.float32).reshape(-1, 4)[-kept:]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            digest = np.frombuffer(self._digest(keys, values), np.uint8)
            replace_file(self.path, lambda path: np.savez(path, keys=keys, values=values, digest=digest))
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

    def _digest(self, keys, values):
        content = self.name.encode() + keys.tobytes() + np.ascontiguousarray(values, np.float32).tobytes()
        return hashlib.blake2b(content, digest_size=16).digest()


def default_cache_folder():
    """Where reference logps are kept unless `reference_cache` says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx_lm" / "reference_logps"

"""The reference policy's logps: computed once, before the first update, and kept on disk."""

import os

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

from .batches import filled, lengths_of, make_batch
from .intercept import evaluating, without_adapters
from .layers import multiplied_once
from .load import check_same_tokens, is_none, load_named
from .logps import Scorer
from .memory import bounded_memory, one_behind
from .nonfinite import refuse_non_finite_logps
from .reference_cache import Cache, default_cache_folder, fingerprint, row_key
from .screen import make_bars
from .workers import confirm, of_all

# Tokens in a batch that is only scored. A CPU, whose caches more would leave, takes half as long again with 4096.
LEAST_TOKENS = 1024
MOST_TOKENS = 8192 if mx.default_device() == mx.gpu else LEAST_TOKENS


class Reference:
    """The reference policy.

    Args:
        scorer: a `Scorer` of the model as it is before training. Its logps are taken without dropout.
        batch_size: pairs a batch, or None for what memory is ample for.
        cache: folder that keeps logps between runs, or None to keep none.
        cache_size: megabytes that the folder may hold.
    """

    def __init__(self, scorer, batch_size=None, cache=None, cache_size=256.0):
        self.scorer = scorer
        self.batch_size = batch_size
        self.cache = None if cache is None else Cache(cache, fingerprint(scorer.model), cache_size)

    def logps(self, dataset, rows, split=""):
        """The logps of some rows of a dataset.

        Args:
            dataset: gives a `Pair` for a row number.
            rows: the row numbers.
            split: what the progress bar calls them, such as "train".

        Returns:
            `(n, 2, 2)` float32, a row each: chosen and rejected, and of each the total and the `common`
            logps of `RowLogps`.

        Raises:
            ConfigError: logps that are not finite.
        """
        keys = [row_key(dataset[row]) for row in rows]
        known = {} if self.cache is None else self.cache.read()
        # Workers may have caches of their own, but they compute together.
        unknown = mx.distributed.all_sum(mx.array([key not in known for key in keys], mx.int32))
        missing = np.flatnonzero(np.array(unknown))
        if len(missing):
            values = np.full((len(missing), 4), np.nan, np.float32)
            try:
                self._compute(dataset, [rows[i] for i in missing], values, split)
            finally:
                # An interrupted pass goes on where it was.
                done = np.isfinite(values).all(axis=1)
                known |= {keys[i]: value for i, value in zip(missing[done], values[done], strict=True)}
                if self.cache is not None and done.any():
                    self.cache.write(known)
        return np.array([known[key] for key in keys], np.float32).reshape(-1, 2, 2)

    def score(self, batch):
        """The logps of a batch, `(B, 2, 2)` as those of `logps`."""
        found = self.scorer(batch)
        return mx.stack([found.total, found.common], axis=-1).reshape(2, -1, 2).transpose(1, 0, 2)

    def release(self):
        """Let go of the model, so that its memory is free; no more logps can be taken."""
        self.scorer = None
        mx.clear_cache()

    def _compute(self, dataset, rows, values, split):
        """Fill `values` `(n, 4)`, batch by batch; several workers take the rows in turns."""
        world = mx.distributed.init()
        mine = np.arange(world.rank(), len(rows), world.size())
        model = self.scorer.model
        with evaluating(model), _cheaper(model), bounded_memory() as evaluate, make_bars(world.rank()) as bars:
            batches = batches_of(self.scorer, dataset, [rows[i] for i in mine], self.batch_size)
            task = bars.add_task(f"reference, {split}" if split else "reference", total=len(mine))

            def logps_of(places):
                batch, *_ = make_batch([dataset[rows[i]] for i in mine[places]], self.scorer.arrangement)
                return self.score(batch), mine[places]

            for found, places in one_behind(evaluate, map(logps_of, batches)):
                values[places] = np.array(found).reshape(-1, 4)
                bars.advance(task, len(places))
        shares = np.zeros_like(values)
        shares[mine] = values[mine]
        summed = np.array(mx.distributed.all_sum(mx.array(shares)))
        confirm()
        values[:] = summed
        refuse_non_finite_logps(values)


def reference_of(scorer, args, tokenizer=None, trust_remote_code=False):
    """The `Reference` that `args` ask for: the policy as it is now, or another model loaded for the purpose.

    Raises:
        ConfigError: `reference_model` cannot be loaded, or has another vocabulary than the policy's `tokenizer`.
    """
    cache = args.reference_cache
    if cache is None:
        cache = default_cache_folder()
    elif is_none(cache):
        cache = None
    if args.reference_model is not None:
        model, other = load_named("reference_model", args.reference_model, trust_remote_code)
        if tokenizer is not None:
            check_same_tokens(tokenizer, other, args.reference_model)
        scorer = Scorer(model, args.share_prompt)
    return Reference(scorer, args.reference_batch_size, cache, args.reference_cache_size)


class RunData:
    """The pairs that a run trains and validates on, with the reference's logps of them.

    Args:
        train_set, valid_set: give a `Pair` for a row number.
        valid_rows: the rows of `valid_set` that a validation scores.

    Attributes:
        train_logps: `(n, 2, 2)` float32, a row for each of `train_set`, NaN where it was not taken; None before `take`.
        valid_logps: `(m, 2, 2)` float32 of `valid_rows`; None before `take`, or where there are none.
        reference_parameters: where a reference is mixed, its values of what the policy trains, a tree; else None.
        of_bare: whether `valid_logps` are of the policy without its adapters.
    """

    def __init__(self, train_set, valid_set, valid_rows):
        self.train_set, self.valid_set, self.valid_rows = train_set, valid_set, valid_rows
        self.train_logps = self.valid_logps = self.reference_parameters = None
        self.of_bare = False

    def mix(self, policy, share):
        """Move the reference's parameters by `share` towards the policy's: TR-DPO's soft update, 2404.09656, eq. 3."""
        before = self.reference_parameters
        self.reference_parameters = tree_map(lambda new, old: share * new + (1 - share) * old, policy, before)
        mx.eval(self.reference_parameters)

    def take(self, reference, rows):
        """Have a `Reference` score `rows` of the training set, and the validation rows."""
        if self.train_logps is None:
            self.train_logps = np.full((len(self.train_set), 2, 2), np.nan, np.float32)
        self.train_logps[rows] = reference.logps(self.train_set, rows, "train")
        if self.valid_rows:
            self.valid_logps = reference.logps(self.valid_set, self.valid_rows, "valid")


def does_nothing(model):
    """Whether a model has adapters, and they do nothing: logps in half precision would not tell that from a little."""
    matrices = [value for name, value in tree_flatten(model.parameters()) if name.endswith(".lora_b")]
    return bool(matrices) and not mx.stack([mx.any(value != 0) for value in matrices]).any().item()


def _cheaper(model):
    """A context in which the model gives the same for less work, to the last bit: on CPUs adapters that do nothing are
    left out.
    """
    # A GPU multiplies by fewer weights at once in another order, and a policy that is still its reference would differ
    # from it. DoRA's adapters multiply by a norm and divide by it, which rounds.
    exact = mx.default_device() == mx.cpu and not any("m" in module for module in model.modules())
    return without_adapters(model) if exact and does_nothing(model) else multiplied_once(model)


def batches_of(scorer, dataset, rows, size=None, workers=1):
    """Places in `rows`, pairs of like length together: `size` of them, or as many as memory is ample for.

    Args:
        scorer: the `Scorer` that will run them.
        workers: how many take a batch together.
    """
    lengths = lengths_of(dataset[row] for row in rows)
    if size is not None:
        return filled(lengths, scorer.arrangement, size)
    most = ample_tokens(scorer, int(lengths.sum(axis=1).max(initial=0)))
    if workers > 1:
        # With more memory or less each would group the rows by itself.
        most = int(of_all(np.array([most])).min())
    return filled(lengths, scorer.arrangement, most=workers * most)


def ample_tokens(scorer, longest, most=MOST_TOKENS):
    """Tokens in a batch of rows of up to `longest` whose activations take a small part of the device's memory.

    Between LEAST_TOKENS and `most`.
    """
    states = scorer.states(mx.zeros((1, 1), mx.int32))
    width = states.shape[-1]
    # A token's activations in a layer: some forty vectors of the model's width, and where attention is not fused
    # three float32 scores for each token before it and each head of 64.
    per_token = width * (40 * states.dtype.size + 3 * 4 * longest / 64)
    return min(max(int(device_memory() / 20 / per_token), LEAST_TOKENS), most)


def device_memory():
    """Bytes of memory that the default device lets a process use: of a Mac's some two thirds, of another's all."""
    info = mx.device_info()
    found = info.get("max_recommended_working_set_size") or info.get("total_memory")
    return found or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

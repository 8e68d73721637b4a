"""Evaluation on pairs: each scored exactly once, by the loss and against the reference of the training."""

from contextlib import contextmanager

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from ...cli_ui import rprint
from .batches import filled, make_batch, pair_lengths, plan, reference_rows
from .intercept import evaluating
from .logps import Scorer
from .memory import bounded_memory
from .objective import loss_of
from .options import ConfigError
from .reference import Reference, ample_tokens, reference_of
from .step import FIGURES, Objective


def objective_of(model, args):
    """The `Objective` of a model and the loss that `args`, a namespace with the options, ask for.

    Raises:
        ConfigError: a value is out of range, or the options exclude each other.
    """
    return Objective(Scorer(model, args.share_prompt), loss_of(args))


def unwrapped(dataset):
    """The `PreferenceDataset` in upstream's `CacheDataset`, or the dataset itself."""
    return getattr(dataset, "_data", dataset) if type(dataset).__name__ == "CacheDataset" else dataset


def evaluated_rows(dataset, batch_size, num_batches):
    """The rows that an evaluation scores: the first ones, the same ones every time."""
    return np.arange(len(dataset) if num_batches == -1 else min(len(dataset), batch_size * num_batches))


def evaluate_preference(objective, dataset, args, batch_size, num_batches, reference=None, progress_callback=None):
    """Score pairs, each exactly once; see `trainer.evaluate`.

    Returns:
        A dict of the means of FIGURES over the pairs.
    """
    dataset = unwrapped(dataset)
    rows = evaluated_rows(dataset, batch_size, num_batches)
    reference = reference_logps(objective, dataset, args, rows, reference)
    return mean_figures(objective, dataset, rows, reference, batch_size, progress_callback)


def reference_logps(objective, dataset, args, rows, reference=None):
    """The reference's logps of rows, by default of the policy that the model was most likely trained from."""
    if objective.loss.needs_reference:
        if reference is None:
            reference = _trained_from(objective.scorer.model, args, dataset, rows)
        elif isinstance(reference, Reference):
            reference = reference.logps(dataset, rows)
    return reference


def _trained_from(model, args, dataset, rows):
    """The logps of the policy that a trained model was most likely trained from."""
    if args.reference_model is not None:
        return reference_of(None, args).logps(dataset, rows)
    with without_adapters(model) as adapted:
        if not adapted:
            raise ConfigError(
                "an evaluation needs the reference, and a model without adapters does not tell what it was trained "
                "from; give reference, the logps that Reference gave before the training, or set reference_model."
            )
        rprint("The model without its adapters is the reference of this evaluation.")
        return reference_of(Scorer(model, args.share_prompt), args).logps(dataset, rows)


@contextmanager
def without_adapters(model):
    """Within the context, each layer with an adapter is the layer that it wraps; gives whether there is any."""
    adapted = [(name, module) for name, module in model.named_modules() if "lora_a" in module]
    bare = [(name, module["linear"] if "linear" in module else module["embedding"]) for name, module in adapted]
    if adapted:
        model.update_modules(tree_unflatten(bare))
    try:
        yield bool(adapted)
    finally:
        if adapted:
            model.update_modules(tree_unflatten(adapted))


def mean_figures(objective, dataset, rows, reference, batch_size, progress_callback=None):
    """The means of FIGURES over `rows` of `dataset`, whose reference logps are `reference` `(n, 2, 2)`."""
    found = pair_figures(objective, dataset, rows, reference, batch_size, progress_callback)
    return {name: float(values.mean()) for name, values in found.items()}


def pair_figures(objective, dataset, rows, reference, batch_size, progress_callback=None):
    """As `mean_figures`, pair by pair: for each of FIGURES `(n,)` float64, one value a row."""
    world, done = mx.distributed.init(), 0
    lengths = np.array([pair_lengths(dataset[int(row)]) for row in rows])
    found, scorer = np.zeros((len(FIGURES), len(rows))), objective.scorer
    if objective.loss.reads_batch:
        batches = plan(lengths, batch_size)
    else:
        # A pair's loss is its own, so that batches may be as large as memory is ample for.
        batches = filled(
            lengths, world.size() * ample_tokens(scorer, int(lengths.sum(axis=1).max())), scorer.arrangement
        )
    with evaluating(scorer.model), bounded_memory() as evaluate:
        for places in batches:
            here = places[world.rank() :: world.size()]
            if len(here):
                batch, *_ = make_batch([dataset[int(rows[place])] for place in here], scorer.arrangement)
                losses, figures = objective.each(batch, reference_rows(reference, here))
                evaluate(values := mx.stack([losses, *figures]))
                found[:, here] = np.array(values)
            before, done = done, done + len(places)
            if progress_callback is not None:
                # As often as there are batches of `batch_size` pairs, which is what is waited for.
                for _ in range(-(-done // batch_size) - -(-before // batch_size)):
                    progress_callback()
    if world.size() > 1:
        found = np.array(mx.distributed.all_sum(mx.array(found.astype(np.float32))), np.float64)
    return dict(zip(FIGURES, found, strict=True))


def as_means(totals):
    """`(means of FIGURES, pairs, tokens)` of sums over pairs, `(9,)` float64."""
    *sums, pairs, tokens = totals.tolist()
    return {name: total / pairs for name, total in zip(FIGURES, sums, strict=True)}, pairs, tokens

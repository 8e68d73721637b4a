"""Evaluation on pairs: each scored exactly once, by the loss and against the reference of the training."""

import mlx.core as mx
import numpy as np

from ...cli_ui import rprint
from .batches import make_batch, reference_rows
from .figures import FIGURES, TOKEN_FIGURES, means_of
from .intercept import evaluating, without_adapters
from .layers import multiplied_once
from .logps import Scorer
from .memory import bounded_memory, one_behind
from .options import ConfigError
from .reference import Reference, batches_of, reference_of
from .workers import confirm


def unwrapped(dataset):
    """What upstream's `CacheDataset` wraps, or the dataset itself."""
    return dataset._data if type(dataset).__name__ == "CacheDataset" else dataset


def refuse_other_form(pair, loss):
    """Raise `ConfigError` where the pair is a single response and the loss reads pairs, or the other way round."""
    if (pair.label is None) == loss.unpaired:
        form = "single responses with labels" if loss.unpaired else "pairs"
        told = f"loss_type {', '.join(loss.names)} reads {form}, and the data set holds others"
        raise ConfigError(f"{told}; make it for this loss.")


def evaluated_rows(dataset, batch_size, num_batches):
    """The rows that an evaluation scores: the first ones, the same ones every time."""
    return range(len(dataset) if num_batches == -1 else min(len(dataset), batch_size * num_batches))


def evaluate_preference(objective, dataset, args, batch_size, num_batches, reference=None, progress_callback=None):
    """The means of FIGURES over pairs, each scored exactly once, as a dict; see `trainer.evaluate`."""
    dataset = unwrapped(dataset)
    rows = evaluated_rows(dataset, batch_size, num_batches)
    for row in rows:
        refuse_other_form(dataset[row], objective.loss)
    reference = reference_logps(objective, dataset, args, rows, reference)
    # Upstream's callback counts batches.
    advance = progress_callback and (lambda count: progress_callback())
    return means_of(pair_figures(objective, dataset, rows, reference, batch_size, advance))


def reference_logps(objective, dataset, args, rows, reference=None):
    """The reference's logps of rows, by default of the policy that the model was most likely trained from."""
    if objective.loss.needs_reference:
        if reference is None:
            reference = _trained_from(objective.scorer.model, args, dataset, rows)
        elif isinstance(reference, Reference):
            if reference.scorer is not None and reference.scorer.model is objective.scorer.model:
                raise ConfigError(
                    "the reference is of the very model that is evaluated, as it is now, which every margin would be 0 "
                    "against; give the logps that this Reference gave before the training, or leave reference out to "
                    "take the model without its adapters."
                )
            reference = reference.logps(dataset, rows)
        else:
            shape, expected = np.shape(reference), (len(rows), 2, 2)
            if shape not in (expected, (len(dataset), 2, 2)):
                raise ConfigError(
                    f"reference has the shape {shape}, and the {len(rows)} pairs to evaluate take {expected}: a "
                    "Reference, or what its logps gave for these pairs."
                )
            # Those to evaluate are the first of the data set.
            reference = np.array(mx.array(reference, mx.float32))[: len(rows)]
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


def pair_figures(objective, dataset, rows, reference, batch_size, progress_callback=None):
    """For each of FIGURES and TOKEN_FIGURES `(n,)` float64, a value for each of `rows`, with their reference logps."""
    world = mx.distributed.init()
    names, scorer = FIGURES + TOKEN_FIGURES + objective.further, objective.scorer
    found = np.zeros((len(names), len(rows)))
    # Where a pair's loss is its own, batches may be as large as memory is ample for.
    batches = batches_of(scorer, dataset, rows, batch_size if objective.reads_batch else None, world.size())

    def values_of(places):
        """`(values, here, count)`: `(figures, B)` of this worker's places or None, and how many all workers take."""
        here = places[world.rank() :: world.size()]
        if not len(here) and not objective.reads_batch:
            return None, here, len(places)
        # One without a row of its own runs one that counts for nothing.
        taken = here if len(here) else places[:1]
        batch, *_ = make_batch([dataset[rows[place]] for place in taken], scorer.arrangement, counted=len(here))
        losses, figures = objective.each(batch, reference_rows(reference, taken), by_token=True)
        if objective.loss.sorts_batch:
            # Its values belong to no pair: each has the mean of the batch.
            losses = mx.broadcast_to((losses * batch.counts).sum() / batch.counts.sum(), losses.shape)
        return mx.stack([losses, *figures]), here, len(places)

    with evaluating(scorer.model), multiplied_once(scorer.model), bounded_memory(objective.need) as evaluate:
        for values, here, count in one_behind(evaluate, map(values_of, batches)):
            if len(here):
                found[:, here] = np.array(values)
            if progress_callback is not None:
                progress_callback(count)
    found = np.array(mx.distributed.all_sum(mx.array(found.astype(np.float32))), np.float64)
    confirm()
    return dict(zip(names, found, strict=True))

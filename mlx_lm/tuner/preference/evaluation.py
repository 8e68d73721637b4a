"""Evaluation on pairs: each scored exactly once, by the loss and against the reference of the training."""

from contextlib import contextmanager

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from ...cli_ui import rprint
from .batches import emptied, filled, make_batch, pair_lengths, plan, reference_rows
from .intercept import evaluating
from .logps import Scorer
from .memory import bounded_memory
from .objective import loss_of
from .options import ConfigError
from .reference import Reference, ample_tokens, reference_of
from .step import DESIRABLE, FIGURES, SHARES, Objective


def objective_of(model, args):
    """The `Objective` of a model and the loss that `args`, a namespace with the options, ask for.

    Raises:
        ConfigError: a value is out of range, or the options exclude each other.
    """
    return Objective(Scorer(model, args.share_prompt), loss_of(args), args.router_aux_loss_coef)


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
    if objective.loss.needs_reference:
        if reference is None:
            reference = _trained_from(objective.scorer.model, args, dataset, rows)
        elif isinstance(reference, Reference):
            reference = reference.logps(dataset, rows)
    return mean_figures(objective, dataset, rows, reference, batch_size, progress_callback)


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
    world, done = mx.distributed.init(), 0
    lengths = np.array([pair_lengths(dataset[int(row)]) for row in rows])
    totals, scorer = mx.zeros((len(FIGURES) + 2 + len(objective.further),)), objective.scorer
    if objective.reads_batch:
        batches = plan(lengths, batch_size)
    else:
        # A pair's loss is its own, so that batches may be as large as memory is ample for.
        batches = filled(
            lengths, world.size() * ample_tokens(scorer, int(lengths.sum(axis=1).max())), scorer.arrangement
        )
    with evaluating(scorer.model), bounded_memory() as evaluate:
        for places in batches:
            here = places[world.rank() :: world.size()]
            if len(here) or objective.together:
                # One without a row of its own runs one that counts for nothing.
                taken = here if len(here) else places[:1]
                batch, *_ = make_batch([dataset[int(rows[place])] for place in taken], scorer.arrangement)
                if not len(here):
                    batch = emptied(batch)
                totals = totals + objective(batch, reference_rows(reference, taken))[1]
                evaluate(totals)
            before, done = done, done + len(places)
            if progress_callback is not None:
                # As often as there are batches of `batch_size` pairs, which is what is waited for.
                for _ in range(-(-done // batch_size) - -(-before // batch_size)):
                    progress_callback()
    return means(totals, objective.further)[0]


def means(totals, further=()):
    """`(means of FIGURES, pairs, tokens)` over all workers, of `Objective`'s sums on this one."""
    return as_means(np.array(mx.distributed.all_sum(totals), np.float64), further)


def as_means(totals, further=()):
    """`(means, pairs, tokens)` of an `Objective`'s sums, float64, and the names of its `further` ones.

    Of single responses each side's figures are means over its own, NaN where there is none.
    """
    sums = dict(zip((*FIGURES, "pairs", "tokens", *further), totals.tolist(), strict=True))
    pairs, tokens, desirable = sums.pop("pairs"), sums.pop("tokens"), sums.pop(DESIRABLE, None)
    figures = {name: total / pairs for name, total in sums.items()}
    if desirable is not None:
        for name, count in (("chosen", desirable), ("rejected", pairs - desirable)):
            for key in (f"rewards/{name}", f"logps/{name}"):
                figures[key] = sums[key] / count if count else np.nan
        figures["rewards/margins"] = figures["rewards/chosen"] - figures["rewards/rejected"]
    if shares := {name: sums[name] for name in sums if name.startswith(SHARES)}:
        figures |= {name: count / sum(shares.values()) for name, count in shares.items()}
    return figures, pairs, tokens

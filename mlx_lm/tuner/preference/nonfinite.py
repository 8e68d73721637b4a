"""Figures and weights that are not finite: which step and which pairs, the likely cause, and leaving them out."""

import re

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

from .options import ConfigError

REMEDY = "A lower learning_rate, a warmup in lr_schedule or max_grad_norm keeps training stable."
# A weight or a margin of a row beyond this is the likely cause of what follows from its pair.
LARGE = 1e3


def refuse_non_finite_logps(logps):
    """Raise `ConfigError` where the reference's logps of a pair, `(n, ...)`, are not finite."""
    bad = (~np.isfinite(logps).reshape(len(logps), -1).all(axis=1)).sum()
    if bad:
        raise ConfigError(
            f"the reference gives logps that are not finite for {bad} of {len(logps)} pairs: its weights are "
            "damaged, or too large for their dtype; check what the model generates."
        )


def update_if(finite, optimizer, module, gradients):
    """Update a module, or leave it and the optimizer's state as they are where `finite`, a boolean, is false."""
    before = tree_map(lambda value: value, [module.parameters(), optimizer.state])
    # Zeros, so that nothing that is not finite goes further.
    optimizer.update(module, tree_map(lambda value: mx.where(finite, value, 0), gradients))
    after = [module, optimizer.state]
    _put(after, tree_map(lambda old, new: mx.where(finite, new, old), before, after))


def refuse_non_finite_steps(losses, norms, first, schedule, where):
    """Check the steps since the last check.

    Args:
        losses: `(k,)`, each step's loss.
        norms: each step's gradient norm, None where it made no update.
        first: the iteration of the first of them.
        schedule: the `Schedule` of the run.
        where: gives the place of a row of the training data.

    Raises:
        ConfigError: a loss or a norm is not finite; the sentence names the step, its pairs and the likely cause.
    """
    for iteration, loss, norm in zip(range(first, first + len(losses)), losses, norms, strict=True):
        if np.isfinite(loss) and (norm is None or np.isfinite(norm)):
            continue
        what = "the gradient is not finite" if np.isfinite(loss) else f"the loss is {loss:g}"
        rows = schedule.rows(iteration).tolist()
        # A step may leave weights or moments that only the next one shows not to be finite.
        before = [row for earlier in range(first, iteration) for row in schedule.rows(earlier).tolist()]
        places = listed([where(row) for row in rows[:4]]) + (f" and {len(rows) - 4} more" if len(rows) > 4 else "")
        raise ConfigError(
            f"{what} at iteration {iteration}, on the pairs {places}; the adapters saved before stay as they are. "
            f"{_cause(schedule, before + rows, where)}"
        )


def refuse_non_finite_weights(tree, iteration):
    """Raise `ConfigError` where an array of `tree`, which is about to be saved, holds a value that is not finite."""
    arrays = [value for _, value in tree_flatten(tree) if mx.issubdtype(value.dtype, mx.floating)]
    if arrays and not mx.stack([mx.isfinite(value).all() for value in arrays]).all().item():
        raise ConfigError(
            f"weights are not finite after iteration {iteration}; the adapters saved before stay as they are. {REMEDY}"
        )


def _put(tree, values):
    """Give the leaves of `tree` new values in their places, where a compiled function looks for them."""
    for key in tree if isinstance(tree, dict) else range(len(tree)):
        if isinstance(tree[key], mx.array):
            tree[key] = values[key]
        else:
            _put(tree[key], values[key])


def _cause(schedule, rows, where):
    for row in rows:
        pair = schedule.pairs[row]
        for name in ("weight", "margin"):
            if abs(getattr(pair, name)) > LARGE:
                return f"{where(row)} has a {name} of {getattr(pair, name):g}: that is the likely cause."
    return REMEDY


def listed(places):
    """Places in one line, what numbers share only once: `train.jsonl:3, 5, 8`."""
    heads = [re.sub(r"\d+$", "", place) for place in places]
    return ", ".join(
        place.removeprefix(head) if head == before else place
        for place, head, before in zip(places, heads, [None, *heads], strict=False)
    )

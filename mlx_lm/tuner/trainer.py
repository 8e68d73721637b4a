"""Adds to mlx_lm.tuner.trainer: `train` and `evaluate` branch on `loss_type` to preference training."""

from dataclasses import field, make_dataclass
from typing import Any

from .._upstream import run_upstream

run_upstream(globals(), needs=("TrainingArgs", "TrainingCallback", "TrainUI", "train", "evaluate", "average_gradients"))

from .preference.check import DEFAULTS, OPTIONS
from .preference.evaluation import evaluate_preference, unwrapped
from .preference.objective import objective_of
from .preference.options import ConfigError, is_preference
from .preference.pairs import PreferenceDataset
from .preference.run import train_preference

_upstream_train, _upstream_evaluate, _upstream_batches = train, evaluate, iterate_batches

# Upstream's arguments and one for each preference option. A loss's parameter is None until it is given: its
# default depends on the loss.
TrainingArgs = make_dataclass(
    "TrainingArgs",
    [(option.name, Any, field(default=DEFAULTS[option.name], metadata={"help": option.help})) for option in OPTIONS]
    + [("seed", int, field(default=0, metadata={"help": "Seed of the order of the data."}))],
    bases=(TrainingArgs,),
)
TrainingArgs.__module__ = __name__


def _refuse_preferences(dataset, batches):
    """Raise `ConfigError` where upstream's own batches would be made of preferences."""
    if batches is _upstream_batches and isinstance(unwrapped(dataset), PreferenceDataset):
        raise ConfigError(
            "the data set holds preferences, and no preference loss is asked for: set loss_type in the TrainingArgs, "
            "for example to dpo, which evaluate takes as args."
        )


def train(
    model,
    optimizer,
    train_dataset,
    val_dataset=None,
    args: TrainingArgs = TrainingArgs(),  # noqa: B008 (upstream's signature)
    loss: callable = default_loss,
    iterate_batches: callable = iterate_batches,
    training_callback: TrainingCallback = None,
    reference=None,
    config=None,
):
    """Train `model`; `args.loss_type` chooses between upstream's training and a preference loss.

    Args:
        model, optimizer, train_dataset, val_dataset, args, training_callback: as upstream's; with a preference
            loss the datasets are `PreferenceDataset`s.
        loss, iterate_batches: upstream's, read in its training only.
        reference: a `Reference`; by default the model as it is now.
        config: contents of `adapter_config.json`, written with the first adapters, or None.

    Raises:
        ConfigError: a value of `args` is out of range, or the options exclude each other.
    """
    if is_preference(getattr(args, "loss_type", "sft")):
        objective = objective_of(model, args)
        return train_preference(
            objective, optimizer, train_dataset, val_dataset, args, reference, training_callback, config
        )
    _refuse_preferences(train_dataset, iterate_batches)
    return _upstream_train(model, optimizer, train_dataset, val_dataset, args, loss, iterate_batches, training_callback)


def evaluate(
    model,
    dataset,
    batch_size,
    num_batches,
    max_seq_length=2048,
    loss: callable = default_loss,
    iterate_batches: callable = iterate_batches,
    clear_cache_threshold: int = 0,
    progress_callback=None,
    args=None,
    reference=None,
):
    """Evaluate `model`; with a preference loss in `args`, on pairs.

    Args:
        model, batch_size, num_batches: as upstream's; num_batches -1 takes all.
        progress_callback: called after each batch that is run, which may have more pairs than `batch_size`.
        dataset: with a preference loss, a `PreferenceDataset`; the first batch_size x num_batches pairs count,
            each exactly once.
        max_seq_length, loss, iterate_batches, clear_cache_threshold: upstream's, read in its evaluation only.
        args: `TrainingArgs`; their `loss_type` chooses.
        reference: a `Reference`, or what its `logps` gave for these pairs or the whole data set. By default it is what
            a run would have taken: `reference_model`, or the model without its adapters.

    Returns:
        Upstream's mean loss, or for pairs a dict of the means of FIGURES.

    Raises:
        ConfigError: a value of `args` is out of range, or nothing tells what the reference is.
    """
    if args is None or not is_preference(args.loss_type):
        _refuse_preferences(dataset, iterate_batches)
        upstreams = max_seq_length, loss, iterate_batches, clear_cache_threshold, progress_callback
        return _upstream_evaluate(model, dataset, batch_size, num_batches, *upstreams)
    objective = objective_of(model, args)
    return evaluate_preference(objective, dataset, args, batch_size, num_batches, reference, progress_callback)

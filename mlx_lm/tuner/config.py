"""Checks of a preference run's configuration, before anything is loaded."""

import inspect
import sys
from pathlib import Path

import mlx.optimizers as optimizers

from .losses import OPTIONS as LOSS_OPTIONS
from .losses import preference_loss
from .options import RUN_OPTIONS, ConfigError, Option, nearest

# Ranges of upstream's keys: upstream takes any value and fails later.
UPSTREAM_KEYS = (
    Option("model", "", str, ""),
    Option("data", "", str, ""),
    Option("seed", 0, int, "", low=0),
    Option("num_layers", 16, int, "", low=-1),
    Option("batch_size", 4, int, "", low=1),
    Option("iters", 1000, int, "", low=1),
    Option("val_batches", 25, int, "", low=-1),
    Option("test_batches", 500, int, "", low=-1),
    Option("steps_per_report", 10, int, "", low=1),
    Option("steps_per_eval", 200, int, "", low=1),
    Option("save_every", 100, int, "", low=1),
    Option("max_seq_length", 2048, int, "", low=2),
    Option("grad_accumulation_steps", 1, int, "", low=1),
    Option("learning_rate", 1e-5, float, "", low=0),
    Option("adapter_path", "adapters", str, ""),
    Option("fine_tune_type", "lora", str, "", choices=("lora", "dora", "full")),
    Option("optimizer", "adam", str, "", choices=("adam", "adamw", "muon", "sgd", "adafactor")),
    Option("train", False, bool, ""),
    Option("test", False, bool, ""),
    Option("grad_checkpoint", False, bool, ""),
)

# Keys that upstream and the data sets read without a flag or a default of their own.
FURTHER_KEYS = {
    "config",
    "hf_dataset",
    "completion_feature",
    "text_feature",
    "chat_feature",
    "chat_template_kwargs",
    "system",
}


def known_keys(parser, defaults):
    """Every key that a run reads."""
    return {action.dest for action in parser._actions} | set(defaults) | FURTHER_KEYS


def warn_of_unread_keys(args, known):
    """Name each key of the configuration that nothing reads, with the known key most like it."""
    for key in sorted(set(vars(args)) - known, key=str):
        print(f"[WARNING] {key} is not a key that this command reads{nearest(key, known)}.", file=sys.stderr)


def check_config(args):
    """Check the configuration of a preference run, and bring its values to their types.

    Args:
        args: a namespace with every key; changed in place.

    Raises:
        ConfigError: a value of a wrong type or out of range, or settings that exclude each other.
    """
    for option in UPSTREAM_KEYS + LOSS_OPTIONS + RUN_OPTIONS:
        setattr(args, option.name, option.check(getattr(args, option.name)))
    if isinstance(args.loss_type, list) and len(args.loss_type) == 1:
        (args.loss_type,) = args.loss_type
    if not args.train and not args.test:
        raise ConfigError("there is nothing to do: set train, test or both to true.")
    loss = preference_loss(**{option.name: getattr(args, option.name) for option in LOSS_OPTIONS})
    if args.reference_model is not None and not loss.needs_reference:
        raise ConfigError(
            f"reference_model is {args.reference_model!r}, but {', '.join(loss.names)} with beta "
            f"{loss.parameters['beta']:g} reads no reference; remove one of the two."
        )
    if args.fine_tune_type != "full":
        _check_lora(args.lora_parameters)
    if args.lr_schedule is not None:
        _check_schedule(args.lr_schedule)
    _check_optimizer(args.optimizer, args.optimizer_config)
    if args.resume_adapter_file is not None and not Path(args.resume_adapter_file).is_file():
        raise ConfigError(f"resume_adapter_file is {args.resume_adapter_file!r}, and there is no such file.")
    if args.train and args.adapter_path == "":
        raise ConfigError("adapter_path is empty; training needs a folder to save adapters in.")


def _check_lora(parameters):
    if not isinstance(parameters, dict):
        raise ConfigError(f"lora_parameters is {parameters!r}; it must hold rank, scale and dropout.")
    unknown = sorted(set(parameters) - {"rank", "scale", "dropout", "keys"}, key=str)
    if unknown:
        told = " (mlx-lm's scale is alpha / rank)" if unknown[0] == "alpha" else ""
        raise ConfigError(f"lora_parameters has {unknown[0]}{told}; it holds rank, scale, dropout and keys.")
    ranges = (
        Option("lora_parameters.rank", None, int, "", low=1),
        Option("lora_parameters.scale", None, float, ""),
        Option("lora_parameters.dropout", None, float, "", low=0, high=1, open=("high",)),
    )
    for option in ranges:
        key = option.name.rpartition(".")[2]
        if key not in parameters:
            raise ConfigError(f"lora_parameters lacks {key}; it holds rank, scale, dropout and keys.")
        option.check(parameters[key])


def _check_schedule(schedule):
    form = "give name, arguments and, if wanted, warmup and warmup_init"
    if not isinstance(schedule, dict) or not {"name", "arguments"} <= set(schedule):
        raise ConfigError(f"lr_schedule is {schedule!r}; {form}.")
    names = [name for name, value in vars(optimizers.schedulers).items() if inspect.isfunction(value)]
    if schedule["name"] not in names:
        raise ConfigError(
            f"lr_schedule's name is {schedule['name']!r}{nearest(schedule['name'], names)}; "
            f"it must be one of {', '.join(sorted(names))}."
        )
    unknown = sorted(set(schedule) - {"name", "arguments", "warmup", "warmup_init"}, key=str)
    if unknown:
        raise ConfigError(f"lr_schedule has {unknown[0]}; {form}.")
    try:
        inspect.signature(getattr(optimizers.schedulers, schedule["name"])).bind(*schedule["arguments"])
    except TypeError as error:
        raise ConfigError(f"lr_schedule's arguments are {schedule['arguments']!r}, but {error}.") from error


def _check_optimizer(name, config):
    given = (config or {}).get(name) or {}
    allowed = set(inspect.signature(getattr(optimizers, _CLASSES[name])).parameters) - {"learning_rate"}
    unknown = sorted(set(given) - allowed, key=str)
    if unknown:
        raise ConfigError(
            f"optimizer_config's {name} has {unknown[0]}{nearest(unknown[0], allowed)}; "
            f"it takes {', '.join(sorted(allowed))}."
        )


_CLASSES = {"adam": "Adam", "adamw": "AdamW", "muon": "Muon", "sgd": "SGD", "adafactor": "Adafactor"}

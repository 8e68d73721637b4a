"""Checks of a preference run's configuration, before anything is loaded."""

import inspect
import json
import math
import os
import sys
from fnmatch import fnmatch
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optimizers
import yaml

from ...cli_ui import rprint
from ..utils import build_schedule
from .batches import refuse_uneven_shares
from .checkpoint import refuse_without_state
from .counterparts import hint
from .files import ADAPTERS_FILE, RUN_FILES
from .loss_table import LOSS_OPTIONS
from .objective import loss_of, refuse_without_gradient
from .options import RUN_OPTIONS, UPSTREAM_OPTIONS, ConfigError, OfFlag, Option, Unset, nearest, printable, shown
from .template import SECONDS, limited

# What a preference run's configuration adds to upstream's, and what stands where nothing is given. A loss's
# parameter is None: its default depends on the loss.
OPTIONS = LOSS_OPTIONS + RUN_OPTIONS
DEFAULTS = {option.name: None for option in LOSS_OPTIONS} | {option.name: option.default for option in RUN_OPTIONS}
DEFAULTS["iters"] = Unset(1000)

LORA_PARAMETERS = (
    Option("lora_parameters.rank", None, int, "", low=1, high=2**31 - 1),
    Option("lora_parameters.scale", None, float, "", above=0),
    Option("lora_parameters.dropout", None, float, "", low=0, below=1),
)
PATHS = ("model", "data", "adapter_path", "resume_adapter_file", "reference_model", "reference_cache", "predictions")

# Keys that upstream and the data sets read without a flag or a default of their own, and one that stands in an
# adapter_config.json, which may be a configuration again; the features are those of supervised rows.
FURTHER_KEYS = {"hf_dataset", "chat_template_kwargs", "versions"}
SUPERVISED_KEYS = {"completion_feature", "text_feature", "chat_feature"}

_CLASSES = {"adam": "Adam", "adamw": "AdamW", "muon": "Muon", "sgd": "SGD", "adafactor": "Adafactor"}


def check_file(path, loader):
    """Check that a configuration file holds keys with values, and warn of a key that it gives twice; its text.

    Raises:
        ConfigError: it cannot be read, is not YAML, or holds something else.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        node = yaml.compose(text, loader)
    except OSError as error:
        raise ConfigError(f"the configuration file {path} cannot be read ({error.strerror}).") from error
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split()).replace('"<unicode string>"', str(path))
        raise ConfigError(f"the configuration file {path} is not YAML: {reason}.") from error
    form = "it must hold a key with a value on each line, such as beta: 0.1"
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"the configuration file {path} holds no keys; {form}.")
    lines, values = {}, loader("")
    for key, value in node.value:
        line = key.start_mark.line + 1
        try:
            with limited(SECONDS):  # aliases of aliases are long before they are large
                repr(values.construct_object(value, deep=True))  # which refuses numbers of thousands of digits
        except Exception as error:
            # A value of a type that YAML sees in it, such as a date, and that it is not.
            reason = " ".join(str(getattr(error, "problem", None) or error).split())
            raise ConfigError(f"{path}:{line}: the value of {key.value} cannot be read ({reason}).") from error
        if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
            raise ConfigError(f"{path}:{line}: {getattr(key, 'value', key)} is no name of a key; {form}.")
        if key.value in lines:
            lost = f"lines {lines[key.value]} and {line}; the last one counts"
            rprint(printable(f"[WARNING] {path} gives {key.value} twice, in {lost}."), file=sys.stderr)
        lines[key.value] = line
    return text


def warn_of_unread_keys(args, defaults, supervised=False):
    """Name each key that a run, `supervised` or of preferences, does not read, with the known key most like it."""
    known = set(defaults) | FURTHER_KEYS | (SUPERVISED_KEYS if supervised else set())
    for key in sorted(set(vars(args)) - known, key=str):
        told = hint(key) or nearest(key, known)
        rprint(printable(f"[WARNING] {key} is not a key that this command reads{told}."), file=sys.stderr)
    options = [option for option in OPTIONS if supervised and option.name not in ("loss_type", "prompt_feature")]
    given = [option.name for option in options if getattr(args, option.name, None) not in (None, option.default)]
    if given:
        rprint(
            f"[WARNING] {', '.join(given)} {'is' if len(given) == 1 else 'are'} set, but loss_type is sft, and "
            "supervised training does not read that; for preference training set loss_type, for example to dpo.",
            file=sys.stderr,
        )


def holds_preferences(data):
    """Whether the files of a data folder begin with preferences."""
    rows = (_first_object(Path(data, f"{split}.jsonl")) for split in ("train", "valid", "test"))
    return any({"chosen", "rejected"} <= set(row) for row in rows)


def _first_object(path):
    """The JSON object on a file's first line; an empty one where there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.loads(file.readline())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def check_config(args):
    """Check the configuration of a preference run, and bring its values to their types.

    Args:
        args: a namespace with every key; changed in place.

    Returns:
        The `PreferenceLoss`.

    Raises:
        ConfigError: a value of a wrong type or out of range, or settings that exclude each other.
    """
    iters = args.iters
    if isinstance(iters, OfFlag) and not isinstance(args.epochs, OfFlag):
        args.epochs = None
    elif isinstance(args.epochs, OfFlag) and not isinstance(iters, OfFlag):
        iters = args.iters = None  # its default comes below
    if args.compare:
        args.train, args.test = False, True
    for option in UPSTREAM_OPTIONS + OPTIONS:
        value = option.check(getattr(args, option.name))
        # Nothing stands for the default, as in a configuration file; a loss's own depends on the loss.
        unset = value is None and option not in LOSS_OPTIONS
        setattr(args, option.name, option.default if unset else value)
    for key in PATHS:
        setattr(args, key, _at_home(key, getattr(args, key)))
    if args.steps is not None and not args.check:
        raise ConfigError(f"steps is {args.steps}, which only a dry run reads; give check too, or iters.")
    if args.compare is not None:
        args.compare = [_at_home("compare", path) for path in args.compare if isinstance(args.compare, list)]
        if len(args.compare) != 2:
            raise ConfigError("compare takes two adapters, each a folder, a file or none; give two.")
        if args.predictions is not None:
            raise ConfigError("predictions are of one test, and compare makes two; leave one of them out.")
    args.reference_model, args.resume_adapter_file = args.reference_model or None, args.resume_adapter_file or None
    if isinstance(args.loss_type, list) and len(args.loss_type) == 1:
        (args.loss_type,) = args.loss_type
    if not args.train and not args.test:
        raise ConfigError("there is nothing to do: set train, test or both to true.")
    if args.epochs is not None and iters is not None and not isinstance(iters, Unset):
        raise ConfigError(
            f"epochs is {args.epochs:g} and iters is {args.iters}, which both say how long to train; give one of them."
        )
    if args.num_layers == 0:
        raise ConfigError("num_layers is 0; it must be the number of layers to train, counted from the last, or -1.")
    if args.test and args.test_batches == 0:
        raise ConfigError("test_batches is 0, and a test is asked for; -1 takes the whole test set.")
    loss = loss_of(args)
    if args.reference_model is not None and not loss.needs_reference:
        raise ConfigError(
            f"reference_model is {args.reference_model!r}, but {', '.join(loss.names)} with beta "
            f"{loss.parameters['beta']:g} reads no reference; remove one of the two."
        )
    if args.train:
        refuse_uneven_shares(args.batch_size)
        refuse_without_gradient(loss)
    if args.fine_tune_type != "full":
        check_lora(args.lora_parameters)
    elif args.use_rslora or args.lora_plus_ratio is not None:
        raise ConfigError("use_rslora and lora_plus_ratio are LoRA's, but fine_tune_type is full; leave them out.")
    if args.reference_mixup_alpha is not None and args.reference_model is not None:
        raise ConfigError(
            "reference_mixup_alpha mixes the policy with what it began as, but reference_model names another one; "
            "remove one of the two."
        )
    if args.lr_schedule is not None:
        _check_schedule(args.lr_schedule, -(-args.iters // args.grad_accumulation_steps))
    args.optimizer_config = _checked_optimizers(args.optimizer_config, args.optimizer)
    if args.train:
        _warn_of_unread_rate(args)
    if args.resume_adapter_file is not None:
        check_is_file(args.resume_adapter_file)
    if args.predictions is not None:
        if not args.test:
            raise ConfigError(f"predictions is {args.predictions!r}, but no test is asked for; set test to true.")
        _check_file_to_write("predictions", args.predictions)
    if args.train:
        _check_folder(args.adapter_path)
        if args.resume_adapter_file is not None:
            _refuse_start_that_is_moved(args.resume_adapter_file, args.adapter_path)
        if args.resume is True:
            refuse_without_state(args.adapter_path)
    return loss


def _warn_of_unread_rate(args):
    """Say so where Adafactor takes steps of its own size, as MLX's does by default, whatever the learning rate."""
    if args.optimizer != "adafactor" or not args.optimizer_config.get("adafactor", {}).get("relative_step", True):
        return
    given = [key for key in ("lr_schedule", "lora_plus_ratio") if getattr(args, key) is not None]
    rprint(
        f"[WARNING] optimizer is adafactor, which takes steps of its own size and does not read "
        f"{' or '.join(['learning_rate', *given])}; to train at a rate, give optimizer_config: {{adafactor: "
        "{relative_step: false, scale_parameter: false}}.",
        file=sys.stderr,
    )


def _refuse_start_that_is_moved(start, folder):
    place, folder = Path(start).resolve(), Path(folder).resolve()
    name = place.relative_to(folder).parts[0] if place.is_relative_to(folder) else ""
    if any(fnmatch(name, pattern) for pattern in RUN_FILES):
        raise ConfigError(
            f"resume_adapter_file is {start!r}, and a run moves what is in its adapter_path aside; give another "
            "adapter_path, or to go on with the run that left it, resume in its place."
        )


def _at_home(key, path):
    """`path` with a leading ~ replaced by the user's folder: a shell does not see what a file says."""
    if path is None:
        return None
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ConfigError(f"{key} is {shown(path)}, and there is no such user's folder.")
    try:
        os.lstat(expanded)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass  # told where it is opened
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key} is {shown(path)}, which can be no path ({error}).") from error
    return expanded


def check_is_file(path, key="resume_adapter_file"):
    """Raise `ConfigError` where the adapter file at `path`, which `key` names, is not there, or is a folder."""
    if not Path(path).is_file():
        told = f"{key} is {str(path)!r}, and there is no such file"
        raise ConfigError(f"{told}; give the file, such as a run's {ADAPTERS_FILE}.")


def _check_file_to_write(key, path):
    found, place = Path(path), Path(path).absolute().parent
    if (found.exists() and not found.is_file()) or not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"{key} is {path!r}, where no file can be written; give a file in a folder that there is.")
    # A test's own file, or an empty one.
    if found.exists() and found.stat().st_size:
        line = _first_object(path)
        if "loss" not in line or not {"file", "row"} & set(line):
            raise ConfigError(f"{key} is {path!r}, a file that a test has not written; give another name.")


def _check_folder(folder):
    if folder == "":
        raise ConfigError("adapter_path is empty; training needs a folder to save adapters in.")
    folder = Path(folder)
    # What does not exist yet will be made in the first folder above that does.
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"adapter_path is {str(folder)!r}, but nothing can be written in {place}; give another one.")


def _check_keys(name, value, known, form, hints=()):
    """Check that a value is a dict of `known` keys; `form` says what it holds, `hints` what unknown ones are here."""
    if not isinstance(value, dict):
        raise ConfigError(f"{name} is {shown(value)}; {form}.")
    for key in sorted(set(value) - set(known), key=str):
        raise ConfigError(f"{name} has {key}{dict(hints).get(key, nearest(key, known))}; {form}.")


def check_lora(parameters):
    """Raise `ConfigError` where a key of `lora_parameters` is unknown or missing, or a value is out of range."""
    form = "it holds rank, scale, dropout and, if wanted, keys"
    hints = {"alpha": " (mlx-lm's scale is alpha / rank)"}
    _check_keys("lora_parameters", parameters, ("rank", "scale", "dropout", "keys"), form, hints)
    for option in LORA_PARAMETERS:
        key = option.name.rpartition(".")[2]
        if parameters.get(key) is None:
            raise ConfigError(f"lora_parameters lacks {key}; {form}.")
        option.check(parameters[key])
    keys = parameters.get("keys")
    if keys is not None and not (isinstance(keys, list) and keys and all(isinstance(key, str) for key in keys)):
        told = f"lora_parameters.keys is {shown(keys)}"
        raise ConfigError(f"{told}; it must be a list of names such as self_attn.q_proj.")


def _check_schedule(schedule, updates):
    form = "give name, arguments and, if wanted, warmup and warmup_init"
    _check_keys("lr_schedule", schedule, ("name", "arguments", "warmup", "warmup_init"), form)
    if not {"name", "arguments"} <= set(schedule):
        raise ConfigError(f"lr_schedule is {shown(schedule)}; {form}.")
    try:
        rates = _rates(schedule, updates)
    except Exception as error:
        # Numbers of any type reach arithmetic of any kind here.
        known = {name: made for name, made in vars(optimizers.schedulers).items() if inspect.isfunction(made)}
        known.pop("join_schedules")  # it takes schedules, which warmup makes it do
        taken = (f"{name} of {', '.join(inspect.signature(made).parameters)}" for name, made in known.items())
        told = f"lr_schedule is {shown(schedule)}, which cannot be followed ({error})"
        raise ConfigError(f"{told}; there are {'; '.join(taken)}.") from error
    # At its end a schedule in float32 may be a rounding below zero.
    rounding = 1e-6 * max(rates.values())
    for step, value in rates.items():
        if not math.isfinite(value) or value < -rounding:
            raise ConfigError(f"lr_schedule gives a learning rate of {value:g} at update {step}; give other arguments.")


def _rates(schedule, updates):
    """The learning rate at the first updates of a run of so many, and at each sixteenth of it, by update."""
    rate = build_schedule(schedule)
    return {step: float(rate(mx.array(step, mx.uint64))) for step in (0, 1, *(updates * i // 16 for i in range(17)))}


def schedule_end(schedule, updates):
    """An update by which a schedule's rate is 0 in a run of so many; None where it is so only near the end."""
    rates = _rates(schedule, updates)
    last = max((step for step, rate in rates.items() if rate > 1e-6 * max(rates.values())), default=updates)
    return next(step for step in rates if step > last) if last < updates * 15 // 16 else None


def warn_of_ended_schedule(schedule, updates):
    """Say so where a schedule leaves a rate of 0 to a part of a run of so many updates."""
    if schedule is not None and (end := schedule_end(schedule, updates)) is not None:
        rprint(
            f"[WARNING] lr_schedule's rate is 0 by update {end} of {updates}: the rest teaches nothing; give "
            "numbers that fit the run.",
            file=sys.stderr,
        )


def _checked_optimizers(configs, name):
    """`optimizer_config`, each optimizer's own settings a dict; those of the one that `name` names were tried."""
    form = "it holds the settings of an optimizer below its name, such as adamw: {weight_decay: 0.01}"
    _check_keys("optimizer_config", configs, _CLASSES, form)
    configs = {key: config or {} for key, config in configs.items()}
    make, config = getattr(optimizers, _CLASSES[name]), configs.get(name, {})
    try:
        # LoRA's first gradient has zeros: those of the matrices behind which zeros stand.
        ones, zeros = mx.ones((2, 2)), mx.zeros((2, 2))
        updated = make(learning_rate=1e-3, **config).apply_gradients({"a": ones, "b": zeros}, {"a": ones, "b": ones})
        if not all(mx.isfinite(value).all().item() for value in updated.values()):
            raise ValueError("its first update is not finite")
    except Exception as error:
        takes = ", ".join(sorted(set(inspect.signature(make).parameters) - {"learning_rate"}))
        told = f"optimizer_config's {name} is {shown(config)}, which cannot be used ({error})"
        raise ConfigError(f"{told}; it takes {takes}.") from error
    return configs

"""What a run saves: adapters that plain mlx-lm loads, and all that going on after an interruption needs."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from .files import replace_file
from .options import ConfigError

STATE_FILE = "checkpoint.safetensors"


def save_adapters(model, adapter_file, iteration=None, config=None):
    """Write the trainable weights, and a numbered copy where `iteration` is given.

    Args:
        model: its trainable parameters are saved.
        adapter_file: path of `adapters.safetensors`.
        iteration: updates so far, for the numbered copy's name.
        config: contents of `adapter_config.json` beside it, or None to leave that file as it is.

    Returns:
        The path of the numbered copy, or None.
    """
    adapter_file = Path(adapter_file)
    adapter_file.parent.mkdir(parents=True, exist_ok=True)
    weights = dict(tree_flatten(model.trainable_parameters()))
    numbered = None
    if iteration is not None:
        numbered = adapter_file.with_name(f"{iteration:07d}_adapters.safetensors")
        replace_file(numbered, lambda path: mx.save_safetensors(path, weights))
    replace_file(adapter_file, lambda path: mx.save_safetensors(path, weights))
    if config is not None:
        text = json.dumps(dict(sorted(config.items())), indent=4, default=str)
        replace_file(adapter_file.with_name("adapter_config.json"), lambda path: Path(path).write_text(text))
    return numbered


def save_state(folder, model, optimizer, iteration, settings, extra=()):
    """Write one file from which `restore_state` goes on.

    Args:
        folder: the run's adapter folder.
        model, optimizer: as they are after `iteration` steps.
        iteration: steps taken.
        settings: what has to be the same for the run to go on; any JSON.
        extra: `(name, array)` pairs of the trainer's own.
    """
    arrays = {f"model.{name}": value for name, value in tree_flatten(model.trainable_parameters())}
    arrays |= {f"optimizer.{name}": value for name, value in tree_flatten(optimizer.state)}
    arrays |= {f"random.{i}": value for i, value in enumerate(mx.random.state)}
    arrays |= {f"extra.{name}": value for name, value in extra}
    metadata = {"iteration": str(iteration), "settings": json.dumps(settings, sort_keys=True, default=str)}
    replace_file(Path(folder) / STATE_FILE, lambda path: mx.save_safetensors(path, arrays, metadata))


def restore_state(folder, model, optimizer, settings):
    """Put back what `save_state` wrote.

    Returns:
        `(iteration, extra)`, extra a dict of the trainer's own arrays.

    Raises:
        ConfigError: there is no checkpoint, it is damaged, or it is of a run with other settings.
    """
    path = Path(folder) / STATE_FILE
    if not path.exists():
        raise ConfigError(f"resume needs {path}, and there is none; leave resume out to start anew.")
    try:
        arrays, metadata = mx.load(str(path), return_metadata=True)
        iteration, saved = int(metadata["iteration"]), json.loads(metadata["settings"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise ConfigError(f"{path} is not a checkpoint of this project ({error}).") from error
    now = json.loads(json.dumps(settings, sort_keys=True, default=str))
    changed = sorted(key for key in saved.keys() | now.keys() if saved.get(key) != now.get(key))
    if changed:
        what = ", ".join(f"{key} was {saved.get(key)!r} and is {now.get(key)!r}" for key in changed)
        raise ConfigError(f"resume goes on with the run in {folder} as it was begun, but {what}.")
    parts = {"model": [], "optimizer": [], "random": [], "extra": []}
    for name, value in arrays.items():
        part, _, rest = name.partition(".")
        parts[part].append((rest, value))
    expected = {name: value.shape for name, value in tree_flatten(model.trainable_parameters())}
    if {name: value.shape for name, value in parts["model"]} != expected:
        raise ConfigError(f"{path} holds the adapter of another model or of other LoRA parameters.")
    model.update(tree_unflatten(parts["model"]))
    optimizer.state = tree_unflatten(parts["optimizer"])
    for i, (_, value) in enumerate(sorted(parts["random"], key=lambda item: int(item[0]))):
        mx.random.state[i] = value
    mx.eval(model.parameters(), optimizer.state, mx.random.state)
    return iteration, dict(parts["extra"])


def check_adapter(model, path):
    """Check that the adapter file at `path` fits the model's trainable parameters.

    Raises:
        ConfigError: the file is missing, damaged, or of another model or other LoRA parameters.
    """
    if not Path(path).is_file():
        raise ConfigError(f"resume_adapter_file is {str(path)!r}, and there is no such file.")
    try:
        weights = mx.load(str(path))
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"resume_adapter_file {path} cannot be read: {first_line(error)}") from error
    parameters = dict(tree_flatten(model.parameters()))
    for name, value in weights.items():
        if name not in parameters:
            raise ConfigError(f"resume_adapter_file {path} has {name}, which this model has not with these settings.")
        if value.shape != parameters[name].shape:
            raise ConfigError(
                f"resume_adapter_file {path} has {name} of shape {value.shape}, where this model needs "
                f"{parameters[name].shape}; use the num_layers and lora_parameters that it was trained with."
            )


def first_line(error):
    """An exception's message, its first line only."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def array_of(value):
    """A float32 MLX array of a numpy one, for `save_state`'s extra."""
    return mx.array(np.asarray(value, np.float32))

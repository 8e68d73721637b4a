"""What a run saves: adapters that plain mlx-lm loads, and all that going on after an interruption needs."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.nn.utils import average_gradients
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten

from .files import replace_file, replace_files
from .options import RUN_OPTIONS, UPSTREAM_OPTIONS, ConfigError

STATE_FILE = "checkpoint.safetensors"
REMEDY = "A lower learning_rate, a warmup in lr_schedule or max_grad_norm keeps training stable."
SAMPLE = 4096  # values of a weight that tell it from another model's


@dataclass
class Progress:
    """How far a run is: iterations begun, updates made, tokens reported."""

    iteration: int = 0
    updates: int = 0
    trained_tokens: int = 0


def kept_settings(args, loss, config, model):
    """What a resumed run must have as it was begun: options declared so, the loss, and what it began with.

    Args:
        args: `TrainingArgs`.
        loss: the `PreferenceLoss`.
        config: the command's configuration, from which optimizer and adapters were made, or None.
        model: as it is before training.
    """
    names = [option.name for option in UPSTREAM_OPTIONS + RUN_OPTIONS if option.keep]
    settings = {name: getattr(args, name, (config or {}).get(name)) for name in names} | loss.parameters
    settings |= {"loss_type": list(loss.names), "loss_weights": loss.weights}
    return settings | {"the model or the adapter it begins with": starting_point(model)}


def save_run(step, logps, progress, settings, args, config, numbered=False):
    """Write the adapters, and all that going on needs.

    Args:
        step: the `Step`.
        logps: the `ReferenceLogps`, which TR-DPO changes.
        progress: the `Progress`.
        settings: what has to be the same for the run to go on.
        args: `TrainingArgs`.
        config: contents of `adapter_config.json`, or None to leave that file as it is.
        numbered: whether to write a numbered copy too.

    Returns:
        The path of the numbered copy, or None.

    Raises:
        ConfigError: a weight is not finite; nothing is written.
    """
    accumulated, world = step.accumulated, mx.distributed.init()
    if accumulated is not None and world.size() > 1:
        # Each worker goes on from the mean of all.
        gradient, pairs = accumulated
        accumulated = average_gradients(gradient), mx.distributed.all_sum(pairs) / world.size()
    trained = step.model.trainable_parameters()
    refuse_non_finite([trained, step.optimizer.state, accumulated or []], progress.iteration)
    if world.rank() != 0:
        return None
    extra = {"counts": mx.array([progress.trained_tokens, progress.updates], mx.int64)}
    if args.reference_update_steps:
        tables = {"reference": logps.train, "val_reference": logps.valid}
        extra |= {name: mx.array(table) for name, table in tables.items() if table is not None}
    if accumulated is not None:
        gradient, pairs = accumulated
        extra |= {"pairs": pairs, **dict(tree_flatten(gradient))}
    saved = save_adapters(step.model, args.adapter_file, progress.iteration if numbered else None, config)
    folder = Path(args.adapter_file).parent
    save_state(folder, step.model, step.optimizer, progress.iteration, settings, extra.items())
    return saved


def restore_run(folder, step, logps, settings, iters):
    """Put back what `save_run` wrote, and return its `Progress`.

    Raises:
        ConfigError: as `read_state`.
    """
    iteration, extra = restore_state(folder, step.model, step.optimizer, settings, iters)
    tokens, updates = extra.pop("counts").tolist()
    logps.train = np.array(extra.pop("reference")) if "reference" in extra else logps.train
    logps.valid = np.array(extra.pop("val_reference")) if "val_reference" in extra else logps.valid
    if "pairs" in extra:
        # Parts of the tree that hold no array have left no trace in the file.
        gradient = tree_map_with_path(lambda name, _: extra[name], step.model.trainable_parameters())
        step.accumulated = (gradient, extra["pairs"])
    return Progress(iteration, updates, tokens)


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
    files = [(adapter_file, lambda path: mx.save_safetensors(path, weights))]
    if config is not None:
        text = json.dumps(dict(sorted(config.items())), indent=4, default=str)
        files.append((adapter_file.with_name("adapter_config.json"), lambda path: Path(path).write_text(text)))
    replace_files(*files)
    return numbered


def refuse_non_finite(tree, iteration):
    """Check what is about to be saved.

    Raises:
        ConfigError: an array of `tree` holds a value that is not finite.
    """
    arrays = [value for _, value in tree_flatten(tree) if mx.issubdtype(value.dtype, mx.floating)]
    if arrays and not mx.stack([mx.isfinite(value).all() for value in arrays]).all().item():
        raise ConfigError(
            f"weights are not finite after iteration {iteration}; the adapters saved before stay as they are. {REMEDY}"
        )


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
    arrays["random"] = mx.array(mx.random.state[0])
    arrays |= {f"extra.{name}": value for name, value in extra}
    metadata = {"iteration": str(iteration), "settings": _json(settings)}
    replace_file(Path(folder) / STATE_FILE, lambda path: mx.save_safetensors(path, arrays, metadata))


def state_file(folder):
    """The path of a folder's checkpoint.

    Raises:
        ConfigError: there is none.
    """
    path = Path(folder) / STATE_FILE
    if not path.is_file():
        raise ConfigError(f"resume needs {path}, and there is none; leave resume out to start anew.")
    return path


def read_state(folder, model, settings, iters):
    """What `save_state` wrote, if a run of `model` with these settings may go on from it.

    Returns:
        `(iteration, parts)`, parts the arrays of "model", "optimizer", "extra" and "random" as lists of pairs.

    Raises:
        ConfigError: there is no checkpoint, it is damaged, or it is of a run with other settings or weights.
    """
    path = state_file(folder)
    try:
        arrays, metadata = mx.load(str(path), return_metadata=True)
        iteration, saved = int(metadata["iteration"]), json.loads(metadata["settings"])
        parts = {"model": [], "optimizer": [], "extra": [], "random": []}
        for name, value in arrays.items():
            part, _, rest = name.partition(".")
            parts[part].append((rest, value))
        if len(parts["random"]) != 1:
            raise ValueError("it has no random state")
    except (RuntimeError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{path} is damaged or no checkpoint of this project ({first_line(error)}); leave resume out to start anew."
        ) from error
    now = json.loads(_json(settings))
    changed = sorted(key for key in saved.keys() | now.keys() if saved.get(key) != now.get(key))
    if changed:
        told = (
            f"{key} changed" if key.startswith("the ") else f"{key} was {saved.get(key)!r} and is {now.get(key)!r}"
            for key in changed
        )
        raise ConfigError(f"resume goes on with the run in {folder} as it was begun, but {', '.join(told)}.")
    if iteration > iters:
        raise ConfigError(f"{path} is at iteration {iteration}, and iters is {iters}; raise iters to go on.")
    expected = {name: value.shape for name, value in tree_flatten(model.trainable_parameters())}
    if {name: value.shape for name, value in parts["model"]} != expected:
        raise ConfigError(f"{path} holds other weights than this run trains; use the num_layers that it began with.")
    return iteration, parts


def restore_state(folder, model, optimizer, settings, iters):
    """Put back what `save_state` wrote.

    Returns:
        `(iteration, extra)`, extra a dict of the trainer's own arrays.

    Raises:
        ConfigError: as `read_state`.
    """
    iteration, parts = read_state(folder, model, settings, iters)
    model.update(tree_unflatten(parts["model"]))
    optimizer.state = tree_unflatten(parts["optimizer"])
    # The state is a key, and a seed becomes the key of its two halves; the state itself takes no assignment.
    high, low = parts["random"][0][1].tolist()
    mx.random.seed(high << 32 | low)
    mx.eval(model.parameters(), optimizer.state)
    return iteration, dict(parts["extra"])


def starting_point(model):
    """A digest that tells the model, and the adapter that it begins with, from others.

    An adapter that does nothing yet is left out; so are LoRA's first factors and DoRA's magnitudes, which follow
    from the seed and the weights.
    """
    weights = tree_flatten(model.parameters())
    samples = [mx.view(value.reshape(-1)[:SAMPLE], mx.uint8).astype(mx.uint32) for _, value in weights]
    totals = mx.stack([(sample * mx.arange(1, sample.size + 1, dtype=mx.uint32)).sum() for sample in samples]).tolist()
    told = []
    for (name, value), total in zip(weights, totals, strict=True):
        module, _, leaf = name.rpartition(".")
        if leaf != "m" and ".lora_a" not in name and (total != 0 or ".lora_b" not in name):
            # A layer's weights have one name whether or not an adapter wraps it.
            name = f"{module.removesuffix('.linear').removesuffix('.embedding')}.{leaf}"
            told.append((name, value.shape, str(value.dtype), total))
    return hashlib.blake2b(repr(sorted(told)).encode(), digest_size=8).hexdigest()


def check_is_file(path):
    """Check that the adapter file at `path` is there.

    Raises:
        ConfigError: it is not, or is a folder.
    """
    told = f"resume_adapter_file is {str(path)!r}"
    if Path(path).is_dir():
        raise ConfigError(f"{told}, which is a folder; give the file, such as the adapters.safetensors in it.")
    if not Path(path).is_file():
        raise ConfigError(f"{told}, and there is no such file.")


def check_adapter(model, path):
    """Check that the adapter file at `path` fits the model's trainable parameters.

    Raises:
        ConfigError: the file is missing, damaged, or of another model or other LoRA parameters.
    """
    check_is_file(path)
    try:
        weights = mx.load(str(path))
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"resume_adapter_file {path} cannot be read: {first_line(error)}.") from error
    if not isinstance(weights, dict) or not weights:
        raise ConfigError(f"resume_adapter_file {path} holds no named weights; give an adapters.safetensors.")
    parameters = dict(tree_flatten(model.parameters()))
    advice = "use the fine_tune_type, num_layers and lora_parameters that it was trained with"
    for name, value in weights.items():
        if name not in parameters:
            raise ConfigError(f"resume_adapter_file {path} has {name}, which this model has not; {advice}.")
        if value.shape != parameters[name].shape:
            raise ConfigError(
                f"resume_adapter_file {path} has {name} of shape {value.shape}, where this model needs "
                f"{parameters[name].shape}; {advice}."
            )


def first_line(error):
    """An exception's message, its first line only and without a full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")


def _json(settings):
    return json.dumps(settings, sort_keys=True, default=str)

"""What a run saves: adapters that plain mlx-lm loads, and all that going on after an interruption needs."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_map_with_path, tree_unflatten

from ...cli_ui import rprint
from .files import (
    ADAPTERS_FILE,
    CONFIG_FILE,
    NUMBERED,
    STATE_FILE,
    give_second_name,
    make_own_folder,
    replace_file,
    replace_files,
)
from .nonfinite import refuse_non_finite_weights
from .options import ConfigError, first_line
from .workers import confirm, means_over_workers

EARLIER_STATES = f"{NUMBERED}_{STATE_FILE}"
# The setting that may change: a digest of the validation set and how many of its pairs are scored, None without any.
VALIDATED_ON = "validated_on"
SAMPLE = 4096  # values of a weight whose places count, too, in what tells it from another model's


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        iteration, updates, trained_tokens, skipped: iterations begun, updates made, tokens trained, updates left out.
        skipped_last: of these, the last ones in a row.
        best, best_iteration: the best validation's figure, None before the first, and where it was.
        without_gain: validations since then.
        saved: the iteration of the state on disk, None where there is none that is sound.
    """

    iteration: int = 0
    updates: int = 0
    trained_tokens: int = 0
    skipped: int = 0
    skipped_last: int = 0
    best: float | None = None
    best_iteration: int = 0
    without_gain: int = 0
    saved: int | None = None


def save_adapters(model, adapter_file, iteration=None, config=None):
    """Write the trainable weights, and a numbered copy where `iteration` is given, as a file and as a folder.

    Without a `config` the `adapter_config.json` that is there stays as it is.

    Returns:
        The path of the numbered copy, or None.
    """
    adapter_file = Path(adapter_file)
    adapter_file.parent.mkdir(parents=True, exist_ok=True)
    weights = dict(tree_flatten(model.trainable_parameters()))
    numbered = None
    if iteration is not None:
        numbered = adapter_file.with_name(f"{iteration:07d}_{ADAPTERS_FILE}")
        replace_file(numbered, lambda file: mx.save_safetensors(file, weights))
    files = [(adapter_file, lambda file: mx.save_safetensors(file, weights))]
    if config is not None:
        text = json.dumps(dict(sorted(config.items())), indent=4, default=str).encode()
        files.append((adapter_file.with_name(CONFIG_FILE), lambda file: file.write(text)))
    replace_files(*files)
    if numbered is not None and config is not None:
        # A folder that mlx-lm's commands take.
        folder = adapter_file.with_name(f"{iteration:07d}")
        make_own_folder(folder)
        replace_file(folder / CONFIG_FILE, lambda file: file.write(text))
        give_second_name(numbered, folder / adapter_file.name)
    return numbered


def save_run(step, data, progress, settings, args, config, numbered=False):
    """Write the adapters, and a state with all that going on needs; the states before it are kept as `args` say.

    Returns:
        The path of the numbered copy of the adapters, or None.

    Raises:
        ConfigError: a weight is not finite; nothing is written.
    """
    accumulated, world = step.accumulated, mx.distributed.init()
    if accumulated is not None and world.size() > 1:
        # The sum over all: whoever goes on may be fewer or more.
        accumulated = tree_map(lambda mean: mean * world.size(), means_over_workers(*accumulated))
    trained = step.model.trainable_parameters()
    written = [trained, step.optimizer.state, accumulated or []]
    mx.eval(written)
    confirm()
    # A gradient that the next update would leave out does no harm.
    refuse_non_finite_weights(written[:2] if step.skips else written, progress.iteration)
    if world.rank() != 0:
        return None
    state = {"model": trained, "optimizer": step.optimizer.state, "random": mx.array(mx.random.state[0])}
    if args.reference_update_steps:
        tables = {"reference": data.train_logps, "val_reference": data.valid_logps}
        state["logps"] = {name: mx.array(table) for name, table in tables.items() if table is not None}
        state["reference"] = data.reference_parameters or {}
    if accumulated is not None:
        state["gradient"], state["pairs"] = accumulated
    saved = save_adapters(step.model, args.adapter_file, progress.iteration if numbered else None, config)
    folder = Path(args.adapter_file).parent
    _keep_earlier(folder, progress, args.keep_checkpoints)
    progress.saved = progress.iteration
    told = {"iteration": str(progress.iteration), "progress": _json(asdict(progress)), "settings": _json(settings)}
    _write_state(folder / STATE_FILE, dict(tree_flatten(state)), told)
    return saved


def _keep_earlier(folder, progress, count):
    """Give the state on disk a name of its own, and delete all but the newest `count` - 1 of those that have one."""
    path = folder / STATE_FILE
    if count > 1 and progress.saved not in (None, progress.iteration) and path.is_file():
        # A second name, so that there is a complete state under the first one at any time.
        give_second_name(path, folder / f"{progress.saved:07d}_{STATE_FILE}")
    for old in sorted(folder.glob(EARLIER_STATES), reverse=True)[count - 1 :]:
        old.unlink(missing_ok=True)


def _write_state(path, arrays, metadata):
    metadata = metadata | {"digest": _digest(arrays, metadata)}
    replace_file(path, lambda file: mx.save_safetensors(file, arrays, metadata))


def _digest(arrays, metadata):
    """A digest of names, shapes, types and every bit of the values, and of the metadata."""
    digest = hashlib.blake2b(repr(sorted(metadata.items())).encode(), digest_size=16)
    for name, value in sorted(arrays.items()):
        digest.update(repr((name, value.shape, str(value.dtype))).encode())
        digest.update(np.array(mx.view(value.reshape(-1), mx.uint8)).data)
    return digest.hexdigest()


def read_state(path):
    """`(arrays by name, Progress, settings)` of a state; `ValueError` where the file is damaged, or none."""
    try:
        arrays, metadata = mx.load(str(path), return_metadata=True)
        digest = metadata.pop("digest")
        if digest != _digest(arrays, metadata):
            raise ValueError("its content is not what was written")
        return arrays, Progress(**json.loads(metadata["progress"])), json.loads(metadata["settings"])
    except KeyError as error:
        raise ValueError(f"it has no {error.args[0]}") from error
    except (OSError, RuntimeError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(first_line(error)) from error


def state_files(folder):
    """The paths of a folder's states, the newest first."""
    earlier = sorted(Path(folder).glob(EARLIER_STATES), reverse=True)
    return [path for path in (Path(folder) / STATE_FILE, *earlier) if path.is_file()]


def refuse_without_state(folder):
    """Raise `ConfigError` where there is no state in a folder."""
    if not state_files(folder):
        told = f"resume needs {Path(folder) / STATE_FILE}, and there is none"
        raise ConfigError(f"{told}; leave resume out to start anew.")


def find_state(folder, model, settings, iters):
    """The newest sound state of a folder, if a run of `model` with these settings may go on from it.

    Returns:
        `(path, iteration)`.

    Raises:
        ConfigError: there is no state, all are damaged, or it is of a run with other settings or weights.
    """
    refuse_without_state(folder)
    faults = []
    for path in state_files(folder):
        try:
            arrays, progress, saved = read_state(path)
        except ValueError as error:
            faults.append(f"{path} is damaged or no checkpoint of this project ({error})")
            continue
        for fault in faults:
            rprint(f"[WARNING] {fault}; the one before it, of iteration {progress.iteration}, is taken.")
        now = json.loads(_json(settings))
        before, after = saved.pop(VALIDATED_ON, None), now.pop(VALIDATED_ON, None)
        _check_settings(folder, saved, now)
        if None not in (before, after) and before != after:
            rprint(
                f"[WARNING] The pairs to validate on are not those up to iteration {progress.iteration}: figures "
                "before and after do not compare, and the best validation will be one of those to come."
            )
        if progress.iteration > iters:
            told = f"{path} is at iteration {progress.iteration}, and iters is {iters}"
            raise ConfigError(f"{told}; raise iters to go on.")
        expected = {name: value.shape for name, value in tree_flatten(model.trainable_parameters())}
        if {name: value.shape for name, value in _part(arrays, "model").items()} != expected:
            raise ConfigError(
                f"{path} holds other weights than this run trains; use the num_layers that it began with."
            )
        return path, progress.iteration
    raise ConfigError(f"{faults[0]}; leave resume out to start anew.")


def _check_settings(folder, saved, now):
    changed = sorted(key for key in saved.keys() | now.keys() if saved.get(key) != now.get(key))
    # A digest that one has and the other has not comes with an option, which tells.
    changed = [key for key in changed if not key.startswith("the ") or (key in saved and key in now)]
    if changed:
        told = (
            f"{key} changed" if key.startswith("the ") else f"{key} was {saved.get(key)!r} and is {now.get(key)!r}"
            for key in changed
        )
        raise ConfigError(f"resume goes on with the run in {folder} as it was begun, but {', '.join(told)}.")


def restore_run(path, step, data):
    """Put back what `save_run` wrote, and return its `Progress`; `ConfigError` where a part is missing."""
    try:
        arrays, progress, _ = read_state(path)
        high, low = arrays["random"].tolist()
        state = _part(arrays, "optimizer")
        missing = {name for name, _ in tree_flatten(step.optimizer.state)} - set(state)
        if missing:
            raise ValueError(f"it has no {min(missing)} of the optimizer's")
        tables = _part(arrays, "logps")
        data.train_logps = np.array(tables["reference"]) if "reference" in tables else data.train_logps
        data.valid_logps = np.array(tables["val_reference"]) if "val_reference" in tables else data.valid_logps
        if data.reference_parameters is not None:
            parts = _part(arrays, "reference")
            data.reference_parameters = tree_map_with_path(lambda name, _: parts[name], data.reference_parameters)
        if "pairs" in arrays:
            # Parts of the tree that hold no array have left no trace in the file.
            parts = _part(arrays, "gradient")
            share = 1 / mx.distributed.init().size()
            gradient = tree_map_with_path(lambda name, _: parts[name] * share, step.flat.vectors.parameters())
            step.accumulated = (gradient, arrays["pairs"] * share)
    except (KeyError, TypeError, ValueError) as error:
        told = f"it has no {error.args[0]}" if isinstance(error, KeyError) else first_line(error)
        raise ConfigError(f"{path} lacks a part ({told}); leave resume out to start anew.") from error
    step.model.update(tree_unflatten(_part(arrays, "model")))
    step.flat.read()
    step.optimizer.state = tree_unflatten(state)
    # The state is a key, and a seed becomes the key of its two halves; the state itself takes no assignment.
    mx.random.seed(high << 32 | low)
    mx.eval(step.model.parameters(), step.state())
    # One that is damaged is never kept.
    progress.saved = progress.iteration if Path(path).name == STATE_FILE else None
    return progress


def _part(arrays, part):
    """The arrays whose names begin with a part's, by the rest of their names."""
    return {name.removeprefix(part + "."): value for name, value in arrays.items() if name.startswith(part + ".")}


def starting_point(model):
    """A digest that tells the model, and the adapter that it begins with, from others.

    An adapter that does nothing yet is left out; so are LoRA's first factors and DoRA's magnitudes, which follow
    from the seed and the weights.
    """
    weights = tree_flatten(model.parameters())
    samples = [mx.view(value.reshape(-1)[:SAMPLE], mx.uint8).astype(mx.uint32) for _, value in weights]
    totals = [(sample * mx.arange(1, sample.size + 1, dtype=mx.uint32)).sum() for sample in samples]
    # All values, without their places: of a model of 0.5 GB that takes 0.1 s, and one that heeds places 2 s.
    sums = [mx.view(value.reshape(-1), mx.uint8 if value.nbytes % 4 else mx.uint32).sum() for _, value in weights]
    totals = mx.stack([mx.stack(totals), mx.stack(sums).astype(mx.uint32)], axis=1).tolist()
    told = []
    for (name, value), total in zip(weights, totals, strict=True):
        module, _, leaf = name.rpartition(".")
        if leaf != "m" and ".lora_a" not in name and (any(total) or ".lora_b" not in name):
            # A layer's weights have one name whether or not an adapter wraps it.
            name = f"{module.removesuffix('.linear').removesuffix('.embedding')}.{leaf}"
            told.append((name, value.shape, str(value.dtype), total))
    return hashlib.blake2b(repr(sorted(told)).encode(), digest_size=8).hexdigest()


def _json(settings):
    return json.dumps(settings, sort_keys=True, default=str)

"""Adds to mlx_lm.tuner.datasets: `Pair`, `PreferenceDataset`, and loading them where a preference loss is asked for.

Without one (`loss_type` unset or "sft") every function here is upstream's. The data set
itself is in `pairs.py`.
"""

import re
from collections.abc import Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from .._upstream import run_upstream
from ..cli_ui import rprint
from .preference.layouts import is_kto
from .preference.objective import LOSSES
from .preference.options import ConfigError, first_line, is_preference, nearest
from .preference.pairs import FEATURES, Pair, PreferenceDataset, truncate  # noqa: F401
from .preference.sources import SPLITS, files_of, held_out, is_saved, joined, of_hub, paired, read_file

LOADERS = ("load_dataset", "create_dataset", "load_local_dataset", "load_hf_dataset", "load_custom_hf_dataset")
run_upstream(globals(), needs=(*LOADERS, "CacheDataset"))
_upstream = SimpleNamespace(**{name: globals()[name] for name in LOADERS})

# What a row's origin hands down to the data set made of it.
ROW_KEYS = ("use_chat_template", "score", "score_difference", "score_scale", "min_score_difference")
DATA_KEYS = ("chat_template_kwargs", "max_seq_length", *ROW_KEYS)
ENTRY_KEYS = (*FEATURES, *ROW_KEYS, "chat_template_kwargs", "path", "config", *(f"{split}_split" for split in SPLITS))


def prefers(config):
    """Whether a configuration asks for a preference loss."""
    return is_preference(getattr(config, "loss_type", None))


def load_dataset(args, tokenizer):
    """`(train, valid, test)` as `args` asks for; `PreferenceDataset`s with a preference loss, else upstream's.

    Args:
        args: with upstream's `data` or `hf_dataset`, `train` and `test`; with a preference loss in `loss_type` also,
            where wanted, `prompt_feature`, `chosen_feature`, `rejected_feature`, `chat_template_kwargs` and
            `max_seq_length`.
        tokenizer: the model's tokenizer.

    Returns:
        Three data sets, `[]` in place of each that there is not. With a preference loss, training and validation
        sets are made only if `args.train`, the test set only if `args.test`.

    Raises:
        ConfigError: with a preference loss, for whatever is wrong with the data.
    """
    if not prefers(args):
        return _upstream.load_dataset(args, tokenizer)
    if not getattr(args, "hf_dataset", None):
        data = getattr(args, "data", None)
        if not isinstance(data, (str, Path)) or not str(data):
            raise ConfigError(f"data is {data!r}; it must be a folder or the name of a Hugging Face data set.")
        path = Path(data).expanduser()
        if not path.exists() and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(data)):
            raise ConfigError(f"data is {str(data)!r}, and there is no such folder.")
        if path.exists():
            args = SimpleNamespace(**{**vars(args), "data": str(path)})
    splits = _upstream.load_dataset(args, tokenizer)
    if shown := next((split for split in splits if len(split)), None):
        rprint(f"{shown.name}: {shown.layout}")
    train, valid, test = splits
    _warn_of_shared_prompts(train, [] if getattr(args, "val_batches", None) == 0 else valid, test)
    return splits


def _warn_of_shared_prompts(train, *others):
    """Say how many rows to validate or test on have a prompt that is trained on."""
    others = [split for split in others if len(split)]
    trained = set(train.prompts()) if others and len(train) else ()
    for split in others:
        if shared := sum(prompt in trained for prompt in split.prompts()):
            rprint(
                f"[WARNING] {split.name}: {shared} of {len(split)} rows have a prompt that is trained on, so that "
                "their figures say little of new prompts; take splits that do not overlap."
            )


def create_dataset(data, tokenizer, config):
    """A data set of rows that are in memory; of `PreferenceDataset` where `config` asks for a preference loss."""
    if not prefers(config):
        return _upstream.create_dataset(data, tokenizer, config)
    if len(data) == 0:
        return []
    origin, split = getattr(config, "path", None) or getattr(config, "data", None), getattr(data, "split", None)
    name = ", ".join([str(origin or "the data set"), *([f"split {split}"] if split else [])])
    return _preferences(of_hub(data, name), tokenizer, config)


def load_local_dataset(data_path, tokenizer, config):
    """`(train, valid, test)` from a folder's files, from one file, or from a folder that `datasets` has saved."""
    if not prefers(config):
        return _upstream.load_local_dataset(data_path, tokenizer, config)
    if is_saved(data_path):
        hub = _hub_package(f"data is {str(data_path)!r}, which the datasets package has saved: reading it")
        with _hub_errors(hub, f"data is {str(data_path)!r}, which"):
            try:
                found = hub.load_from_disk(str(data_path))
            except IndexError as error:
                # The package saves a split without rows in no file, and looks for its first one.
                told = f"data is {str(data_path)!r}, which the datasets package has saved and cannot read"
                raise ConfigError(f"{told}: a split holds no rows; save it without that split.") from error
        found = found if isinstance(found, Mapping) else {"train": found}
        return _of_splits(found, str(data_path), tokenizer, config)
    found = {}
    for split in _wanted(config):
        paths = files_of(data_path, split)
        parts = [read_file(part, partial(_hub_package, f"{part} is a Parquet file: reading it")) for part in paths]
        found[split] = joined(parts) if parts else ()
        if split != "valid" and len(found[split]) == 0:
            path, state = (paths[0], "holds no rows") if paths else (data_path / f"{split}.jsonl", "is missing")
            wanted = "it must hold a JSON object with a preference on each line"
            if not paths and not data_path.is_dir():
                path, state = data_path, f"is no {split} set"
                wanted = f"a file in place of a folder is the training set: give a folder with {split}.jsonl"
            trains = split == "test" and config.train
            advice = " To train without a test set test: false or give --no-test." if trains else ""
            raise ConfigError(f"{path} {state}; {wanted}.{advice}")
    return _made(found, tokenizer, config)


def load_hf_dataset(data_id, tokenizer, config):
    """`(train, valid, test)` from the hub's data set of a name, its splits found by their usual names."""
    if not prefers(config):
        return _upstream.load_hf_dataset(data_id, tokenizer, config)
    hub = _hub_package(f"data is {data_id!r}: there is no such folder, and loading from the Hugging Face hub")
    with _hub_errors(hub, f"data is {data_id!r}: there is no such folder, and the hub's data set"):
        found = hub.load_dataset(data_id)
    return _of_splits(found, data_id, tokenizer, config)


def _of_splits(found, data_id, tokenizer, config):
    """`(train, valid, test)` from a mapping of splits to data sets of the `datasets` package."""
    splits = {}
    for split in _wanted(config):
        name = next((name for name in SPLITS[split] if name in found), None)
        if name is not None:
            splits[split] = of_hub(found[name], f"{data_id}, split {name}")
        elif split != "valid":
            raise ConfigError(
                f"the data set {data_id} has no split named {' or '.join(SPLITS[split])}, only {', '.join(found)}; "
                f"name one with hf_dataset and its {split}_split."
            )
    return _not_empty(_made(splits, tokenizer, config), config, data_id)


def _made(found, tokenizer, config):
    """`(train, valid, test)` from a mapping of these names to `Rows`, `[]` in place of each without a row."""
    share, train, valid = getattr(config, "valid_share", None), found.get("train", ()), found.get("valid", ())
    if share and len(valid):
        rprint(f"valid_share is not used: {valid.name} is the validation set.")
    elif share and len(train):
        numbers = held_out(train, share, getattr(config, "seed", 0), **_features(config))
        found["train"], found["valid"] = map(train.taken, numbers)
    splits = (found.get(split, ()) for split in SPLITS)
    return tuple(_preferences(rows, tokenizer, config) if len(rows) else [] for rows in splits)


def load_custom_hf_dataset(args, tokenizer):
    """`(train, valid, test)` from `args.hf_dataset`: an entry, or a list of entries whose rows are put together."""
    if not prefers(args):
        return _upstream.load_custom_hf_dataset(args, tokenizer)
    hub = _hub_package("hf_dataset is set: loading from the Hugging Face hub")
    entries = args.hf_dataset if isinstance(args.hf_dataset, list) else [args.hf_dataset]
    keys = (*FEATURES, *DATA_KEYS, "loss_type")
    shared = {key: getattr(args, key) for key in keys if getattr(args, key, None) is not None}
    collection = []
    for entry in entries:
        _check_entry(entry, args)
        entry = {key: value for key, value in entry.items() if value is not None}
        with _hub_errors(hub, f"the hf_dataset {entry['path']}"):
            entry = {**shared, **entry, **_default_splits(hub, entry, args)}
            one = SimpleNamespace(**{**vars(args), "hf_dataset": entry})
            collection.append(_upstream.load_custom_hf_dataset(one, tokenizer))
    splits = [[part for part in parts if len(part)] for parts in zip(*collection, strict=True)]
    splits = [PreferenceDataset.joined(parts) if len(parts) > 1 else parts[0] if parts else [] for parts in splits]
    return _not_empty(splits, args, "hf_dataset")


def _default_splits(hub, entry, args):
    """The training and validation splits of an entry that does not name both.

    Without either they are the first 80 % and the last 10 % of `train`, which upstream's slices are too, but that those
    overlap where a tenth of the rows is less than one. Of a whole split that is named the last 10 % are not trained on.
    """
    name = str(entry.get("train_split", "train"))
    if "valid_split" in entry or "[" in name or "+" in name or not args.train:
        return {}
    count = len(hub.load_dataset(entry["path"], split=name, **entry.get("config", {})))
    if count < 2:
        raise ConfigError(f"the hf_dataset {entry['path']} has {count} rows to train and validate on; name the splits.")
    valid = max(1, round(count * (getattr(args, "valid_share", None) or 0.1)))
    train = count - valid if "train_split" in entry else min(max(1, round(0.8 * count)), count - valid)
    return {"train_split": f"{name}[:{train}]", "valid_split": f"{name}[{count - valid}:]"}


def _features(config):
    """The rows' keys that a configuration names, by FEATURES."""
    keys = {key: getattr(config, key) for key in FEATURES if getattr(config, key, None) is not None}
    # The usual key, which rows may leave out; only another one has to be there.
    return {key: value for key, value in keys.items() if (key, value) != ("prompt_feature", "prompt")}


def _preferences(rows, tokenizer, config):
    keys = {key: getattr(config, key) for key in DATA_KEYS if getattr(config, key, None) is not None}
    keys |= _features(config)
    loss_type = config.loss_type if isinstance(config.loss_type, list) else [config.loss_type]
    keys["unpaired"] = any(loss in LOSSES and LOSSES[loss].unpaired for loss in loss_type)
    if is_kto(rows[0]) and not keys["unpaired"]:
        read, rows = len(rows), paired(rows, keys.get("prompt_feature"))
        rprint(
            f"{rows.name}: {len(rows)} pairs of rows with one labelled completion (KTO); {read - 2 * len(rows)} rows "
            "have no answer or no partner."
        )
    return PreferenceDataset(rows, tokenizer, **keys, name=rows.name, where=rows.where)


def _wanted(config):
    """The names of the splits that a configuration asks for."""
    return [split for split in SPLITS if getattr(config, "test" if split == "test" else "train", True)]


def _not_empty(splits, config, origin):
    for split, rows in zip(SPLITS, splits, strict=True):
        if split in _wanted(config) and split != "valid" and len(rows) == 0:
            raise ConfigError(f"the {split} split of {origin} holds no rows.")
    return tuple(splits)


def _hub_package(why):
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(f"{why} needs the datasets package: pip install datasets.") from error
    return datasets


@contextmanager
def _hub_errors(hub, what):
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError, hub.exceptions.DatasetsError) as error:
        raise ConfigError(f"{what} cannot be loaded ({first_line(error)}).") from error


def _check_entry(entry, args):
    if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str):
        raise ConfigError(f"hf_dataset has the entry {entry!r}; it must be an object with a path.")
    if args.test and not entry.get("test_split"):
        raise ConfigError(f"the hf_dataset {entry['path']} has no test_split, and a test is asked for; name the split.")
    for key in entry:
        if key not in ENTRY_KEYS:
            hint = nearest(key, ENTRY_KEYS)
            rprint(f"[WARNING] The hf_dataset {entry['path']} has the key {key}, which is not read{hint}.")

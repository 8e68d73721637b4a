"""Adds to mlx_lm.tuner.datasets: `Pair`, `PreferenceDataset`, and loading them where a preference loss is asked for.

Without one (`loss_type` unset or "sft") every function here is upstream's. The data set
itself is in `pairs.py`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

from .._upstream import run_upstream
from ..cli_ui import rprint
from .preference.loss_table import LOSSES
from .preference.options import RUN_OPTIONS, ConfigError, is_preference, nearest
from .preference.pairs import Pair, PreferenceDataset, truncate  # noqa: F401
from .preference.sources import SPLITS, files_of, hub, is_saved, of_hub, read_files

run_upstream(globals(), needs=("load_dataset", "CacheDataset"))
_upstream_load_dataset = globals()["load_dataset"]

# What a row's origin hands down to the data set made of it: the options of data, but for one of the splits.
ROW_OPTIONS = {option.name: option for option in RUN_OPTIONS if option.group == "data" and option.name != "valid_share"}
DATA_KEYS = (*ROW_OPTIONS, "chat_template_kwargs", "max_seq_length")
ENTRY_KEYS = (*ROW_OPTIONS, "chat_template_kwargs", "path", "config", *(f"{split}_split" for split in SPLITS))


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
    if not is_preference(getattr(args, "loss_type", None)):
        return _upstream_load_dataset(args, tokenizer)
    if getattr(args, "hf_dataset", None):
        origin, splits = "hf_dataset", _of_entries(args, tokenizer)
    else:
        origin, splits = args.data, _made(_found(args), tokenizer, args)
    for split, rows in zip(SPLITS, splits, strict=True):
        if split in _wanted(args) and len(rows) == 0:
            if split != "valid":
                raise ConfigError(f"the {split} split of {origin} holds no rows.")
            rprint("Warning: there is no validation set; the run goes on without validation.")
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


def _found(args):
    """The `Rows` of each split that a configuration asks for, by its name, from `args.data`."""
    data, found = getattr(args, "data", None), {}
    if not isinstance(data, (str, Path)) or not str(data):
        raise ConfigError(f"data is {data!r}; it must be a folder or the name of a Hugging Face data set.")
    path = Path(data).expanduser()
    if not path.exists() and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(data)):
        raise ConfigError(f"data is {str(data)!r}, and there is no such folder.")
    if not path.exists() or is_saved(path):
        return _of_hub(data, path, args)
    for split in _wanted(args):
        if paths := files_of(path, split):
            found[split] = read_files(paths)
        elif split != "valid":
            trains = split == "test" and args.train
            raise ConfigError(
                f"{path} holds no {split} set: {split}.jsonl is missing, with a JSON object that holds a preference on "
                f"each line.{' To train without a test set test: false or give --no-test.' if trains else ''}"
            )
    return found


def _of_hub(data, path, args):
    """As `_found`, of a data set of the hub or of one that the `datasets` package has saved."""
    if path.exists():
        with hub(f"the saved data set {path}") as package:
            found = package.load_from_disk(str(path))
    else:
        with hub(f"data is {str(data)!r}: there is no such folder, and the hub's data set") as package:
            found = package.load_dataset(str(data))
    found, splits = found if isinstance(found, Mapping) else {"train": found}, {}
    for split in _wanted(args):
        name = next((name for name in SPLITS[split] if name in found), None)
        if name is not None:
            splits[split] = of_hub(found[name], f"{data}, split {name}")
        elif split != "valid":
            raise ConfigError(
                f"the data set {data} has no split named {' or '.join(SPLITS[split])}, only {', '.join(found)}; "
                f"name one with hf_dataset and its {split}_split."
            )
    return splits


def _made(found, tokenizer, config):
    """`(train, valid, test)` from a mapping of these names to `Rows`, `[]` in place of each without a row."""
    rows = (found.get(split, ()) for split in SPLITS)
    train, valid, test = (_preferences(some, tokenizer, config) if len(some) else [] for some in rows)
    share = getattr(config, "valid_share", None)
    if share and len(valid):
        rprint(f"valid_share is not used: {valid.name} is the validation set.")
    elif share and len(train):
        train, valid = train.split(share, getattr(config, "seed", 0))
    return train, valid, test


def _of_entries(args, tokenizer):
    """`(train, valid, test)` from `args.hf_dataset`: an entry, or a list of entries whose rows are put together."""
    parts = {split: [] for split in SPLITS}
    for entry in args.hf_dataset if isinstance(args.hf_dataset, list) else [args.hf_dataset]:
        _check_entry(entry, args)
        entry = {key: value for key, value in entry.items() if value is not None}
        path, options = entry["path"], entry.get("config", {})
        with hub(f"the hf_dataset {path}") as package:
            names = _split_names(package, entry, args)
            found = {split: package.load_dataset(path, split=names[split], **options) for split in _wanted(args)}
        for split, rows in found.items():
            if len(rows):
                rows = of_hub(rows, f"{path}, split {names[split]}")
                parts[split].append(_preferences(rows, tokenizer, SimpleNamespace(**{**vars(args), **entry})))
    return tuple(
        PreferenceDataset.joined(made) if len(made) > 1 else made[0] if made else [] for made in parts.values()
    )


def _split_names(package, entry, args):
    """The names of an entry's splits.

    Without any they are the first 80 % and the last 10 % of `train`, which share no row where a tenth of the rows is
    less than one. Of a whole split that is named as the training's alone the last 10 % are not trained on.
    """
    names = {"train": "train[:80%]", "valid": "train[-10%:]"}
    names |= {split: entry[f"{split}_split"] for split in SPLITS if f"{split}_split" in entry}
    name = str(entry.get("train_split", "train"))
    if "valid_split" in entry or "[" in name or "+" in name or not args.train:
        return names
    count = len(package.load_dataset(entry["path"], split=name, **entry.get("config", {})))
    if count < 2:
        raise ConfigError(f"the hf_dataset {entry['path']} has {count} rows to train and validate on; name the splits.")
    valid = max(1, round(count * (getattr(args, "valid_share", None) or 0.1)))
    train = count - valid if "train_split" in entry else min(max(1, round(0.8 * count)), count - valid)
    return {**names, "train": f"{name}[:{train}]", "valid": f"{name}[{count - valid}:]"}


def _preferences(rows, tokenizer, config):
    keys = {key: getattr(config, key) for key in DATA_KEYS if getattr(config, key, None) is not None}
    if keys.get("prompt_feature") == "prompt":
        # The usual key, which rows may leave out; only another one has to be there.
        del keys["prompt_feature"]
    loss_type = config.loss_type if isinstance(config.loss_type, list) else [config.loss_type]
    keys["unpaired"] = any(loss in LOSSES and LOSSES[loss].unpaired for loss in loss_type)
    return PreferenceDataset(rows, tokenizer, **keys, name=rows.name, where=rows.where)


def _wanted(args):
    """The names of the splits that a configuration asks for."""
    return [split for split in SPLITS if (args.test if split == "test" else args.train)]


def _check_entry(entry, args):
    if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str):
        raise ConfigError(f"hf_dataset has the entry {entry!r}; it must be an object with a path.")
    if args.test and not entry.get("test_split"):
        raise ConfigError(f"the hf_dataset {entry['path']} has no test_split, and a test is asked for; name the split.")
    for key, value in entry.items():
        if key in ROW_OPTIONS:
            try:
                ROW_OPTIONS[key].check(value)
            except ConfigError as error:
                raise ConfigError(f"in the hf_dataset {entry['path']} {error}") from error
        elif key not in ENTRY_KEYS:
            hint = nearest(key, ENTRY_KEYS)
            rprint(f"[WARNING] The hf_dataset {entry['path']} has the key {key}, which is not read{hint}.")

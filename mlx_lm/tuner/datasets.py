"""Adds to mlx_lm.tuner.datasets: `Pair`, `PreferenceDataset`, and loading them where a preference loss is asked for.

Without one (`loss_type` unset or "sft") every function here is upstream's. The data set
itself is in `pairs.py`.
"""

import json
import re
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from .._upstream import run_upstream
from ..cli_ui import rprint
from .preference.options import ConfigError, is_preference, nearest
from .preference.pairs import FEATURES, Pair, PreferenceDataset, truncate  # noqa: F401

LOADERS = ("load_dataset", "create_dataset", "load_local_dataset", "load_hf_dataset", "load_custom_hf_dataset")
run_upstream(globals(), needs=(*LOADERS, "CacheDataset"))
_upstream = SimpleNamespace(**{name: globals()[name] for name in LOADERS})

# What a row's origin hands down to the data set made of it.
DATA_KEYS = (*FEATURES, "chat_template_kwargs", "max_seq_length", "loss_type")
ENTRY_KEYS = (*FEATURES, "chat_template_kwargs", "path", "config", "train_split", "valid_split", "test_split")
# Hub data sets that hold preferences beside other rows call the splits of the former so.
HUB_SPLITS = {
    "train": ("train", "train_prefs"),
    "valid": ("valid", "validation", "valid_prefs", "validation_prefs"),
    "test": ("test", "test_prefs"),
}


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
    return _upstream.load_dataset(args, tokenizer)


def create_dataset(data, tokenizer, config):
    """A data set of rows that are in memory; of `PreferenceDataset` where `config` asks for a preference loss."""
    if not prefers(config):
        return _upstream.create_dataset(data, tokenizer, config)
    if len(data) == 0:
        return []
    origin, split = getattr(config, "path", None) or getattr(config, "data", None), getattr(data, "split", None)
    name = ", ".join([str(origin or "the data set"), *([f"split {split}"] if split else [])])
    return _preferences(_WithoutNone(data), tokenizer, config, name)


def load_local_dataset(data_path, tokenizer, config):
    """`(train, valid, test)` from a folder's `train.jsonl`, `valid.jsonl` and `test.jsonl`."""
    if not prefers(config):
        return _upstream.load_local_dataset(data_path, tokenizer, config)
    if not data_path.is_dir():
        raise ConfigError(f"data is the file {data_path}; give the folder that holds train.jsonl and valid.jsonl.")
    splits = []
    for split, wanted in _wanted(config).items():
        path = data_path / f"{split}.jsonl"
        rows, lines = _read_rows(path) if wanted and path.exists() else ([], [])
        if wanted and not rows and split != "valid":
            state = "holds no rows" if path.exists() else "is missing"
            advice = ", or set test: false" if split == "test" else ""
            raise ConfigError(f"{path} {state}; it must hold a JSON object with a preference on each line{advice}.")
        where = [f"{path}:{line}" for line in lines].__getitem__
        splits.append(_preferences(rows, tokenizer, config, str(path), where) if rows else [])
    return tuple(splits)


def load_hf_dataset(data_id, tokenizer, config):
    """`(train, valid, test)` from the hub's data set of a name, its splits found by their usual names."""
    if not prefers(config):
        return _upstream.load_hf_dataset(data_id, tokenizer, config)
    hub = _hub_package(f"data is {data_id!r}: there is no such folder, and")
    with _hub_errors(hub, f"data is {data_id!r}: there is no such folder, and the hub's data set"):
        found = hub.load_dataset(data_id)
    splits = []
    for split, wanted in _wanted(config).items():
        names = [name for name in HUB_SPLITS[split] if name in found]
        if wanted and not names and split != "valid":
            raise ConfigError(
                f"the data set {data_id} has no split named {' or '.join(HUB_SPLITS[split])}, only {', '.join(found)}; "
                f"name one with hf_dataset and its {split}_split."
            )
        splits.append(create_dataset(found[names[0]], tokenizer, config) if wanted and names else [])
    return _not_empty(splits, config, data_id)


def load_custom_hf_dataset(args, tokenizer):
    """`(train, valid, test)` from `args.hf_dataset`: an entry, or a list of entries whose rows are put together."""
    if not prefers(args):
        return _upstream.load_custom_hf_dataset(args, tokenizer)
    hub = _hub_package("hf_dataset is set, and")
    entries = args.hf_dataset if isinstance(args.hf_dataset, list) else [args.hf_dataset]
    shared = {key: getattr(args, key) for key in DATA_KEYS if getattr(args, key, None) is not None}
    collection = []
    for entry in entries:
        _check_entry(entry, args)
        one = SimpleNamespace(**{**vars(args), "hf_dataset": {**shared, **entry}})
        with _hub_errors(hub, f"the hf_dataset {entry['path']}"):
            collection.append(_upstream.load_custom_hf_dataset(one, tokenizer))
    splits = [[part for part in parts if len(part)] for parts in zip(*collection, strict=True)]
    splits = [PreferenceDataset.joined(parts) if len(parts) > 1 else parts[0] if parts else [] for parts in splits]
    return _not_empty(splits, args, "hf_dataset")


class _WithoutNone:
    """A hub data set's rows without the empty values that its columns fill up rows with."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, idx):
        return _without_none(self.data[idx])


def _without_none(value):
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _preferences(rows, tokenizer, config, name, where=None):
    keys = {key: getattr(config, key) for key in DATA_KEYS[:-1] if getattr(config, key, None) is not None}
    if keys.get("prompt_feature") == "prompt":
        # The usual key, which rows may leave out; only another one has to be there.
        del keys["prompt_feature"]
    return PreferenceDataset(rows, tokenizer, **keys, name=name, where=where)


def _wanted(config):
    train, test = getattr(config, "train", True), getattr(config, "test", True)
    return {"train": train, "valid": train, "test": test}


def _not_empty(splits, config, origin):
    for (split, wanted), rows in zip(_wanted(config).items(), splits, strict=True):
        if wanted and split != "valid" and len(rows) == 0:
            raise ConfigError(f"the {split} split of {origin} holds no rows.")
    return tuple(splits)


def _read_rows(path):
    """A file's rows and the number of the line that each stands on; blank lines count but hold no row."""
    rows, lines = [], []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    rows.append(json.loads(text))
                    lines.append(number)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}:{number}: the line is not UTF-8 ({error.reason}).") from error
    except (json.JSONDecodeError, RecursionError) as error:
        reason = error.msg + f" at column {error.colno}" if isinstance(error, ValueError) else "nested too deep"
        raise ConfigError(f"{path}:{number}: the line is not JSON ({reason}).") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}).") from error
    return rows, lines


def _hub_package(why):
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(f"{why} loading from the Hugging Face hub needs the datasets package; install it.") from error
    return datasets


@contextmanager
def _hub_errors(hub, what):
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError, hub.exceptions.DatasetsError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{what} cannot be loaded ({reason}).") from error


def _check_entry(entry, args):
    if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str):
        raise ConfigError(f"hf_dataset has the entry {entry!r}; it must be an object with a path.")
    if args.test and not entry.get("test_split"):
        raise ConfigError(f"the hf_dataset {entry['path']} has no test_split, and a test is asked for; name the split.")
    for key in entry:
        if key not in ENTRY_KEYS:
            hint = nearest(key, ENTRY_KEYS)
            rprint(f"[WARNING] The hf_dataset {entry['path']} has the key {key}, which is not read{hint}.")

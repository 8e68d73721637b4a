"""Rows from files of any kind, from saved data sets and from the hub: which of them hold which split."""

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from .options import ConfigError, first_line

# Other names of the splits, the usual one first.
SPLITS = {
    "train": ("train", "train_prefs"),
    "valid": ("valid", "validation", "dev", "val", "valid_prefs", "validation_prefs"),
    "test": ("test", "test_prefs"),
}
KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
# Files that `save_to_disk` of the datasets package leaves in a folder.
SAVED = ("dataset_dict.json", "state.json")


class Rows(Sequence):
    """Rows, each made by `read` of an item when it is asked for.

    Attributes:
        where: gives the place of row number i, for errors; it holds no row, so that these can be let go of.
        name: what to call the rows.
    """

    def __init__(self, items, where, name, read=lambda row: row):
        self._items, self._read, self.where, self.name = items, read, where, name

    def __len__(self):
        return len(self._items)

    def __getitem__(self, i):
        return self._read(self._items[i])


def files_of(folder, split):
    """The files of a folder, or of its folder `data`, that hold a split: several where they are parts of one.

    A file in place of a folder holds the training split.
    """
    if not folder.is_dir():
        return [folder] if split == "train" else []
    for name in SPLITS[split]:
        for place in (folder, folder / "data"):
            for ending in KINDS:
                if (path := place / (name + ending)).exists():
                    return [path]
            if parts := sorted(place.glob(f"{name}-*.parquet")):
                return parts
    return []


def is_saved(folder):
    """Whether the datasets package has saved a folder."""
    return folder.is_dir() and any((folder / name).exists() for name in SAVED)


def has_test_set(args):
    """Whether a configuration's data has a test set; of a data set's name the hub is not asked."""
    if entries := getattr(args, "hf_dataset", None):
        return any(entry.get("test_split") for entry in (entries if isinstance(entries, list) else [entries]))
    data = Path(args.data).expanduser()
    saved = any((data / name).is_dir() for name in SPLITS["test"])
    return not data.exists() or saved or bool(files_of(data, "test"))


def read_files(paths):
    """The `Rows` of a file, whose name's end tells its kind, or of several Parquet files as one.

    Raises:
        ConfigError: the file cannot be read; the sentence names the line.
    """
    path, *more = paths
    kind = path.suffix.lower()
    try:
        if kind in (".csv", ".tsv"):
            return _read_table(path, "\t" if kind == ".tsv" else ",")
        if kind == ".parquet":
            name = f"{path}{f' and {len(more)} more' if more else ''}"
            with hub(f"the Parquet file {name}") as package:
                # Loaded together, all of them would have to have the columns and types of the first.
                parts = [package.load_dataset("parquet", data_files=str(path), split="train") for path in paths]
                return of_hub(package.concatenate_datasets(parts), name)
        return _read_json(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror or error}).") from error


def of_hub(data, name):
    """The `Rows` of a data set of the datasets package, without the empty values that its columns fill up rows with."""

    def read(row):
        # A key of the row itself may be null.
        return {key: _without_none(value) for key, value in row.items()} if isinstance(row, Mapping) else row

    return Rows(data, lambda i: f"{name}, row {i}", name, read)


@contextmanager
def hub(what):
    """Give the `datasets` package; that it is not installed, or what it raises of `what`, becomes a `ConfigError`."""
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(f"{what} needs the datasets package: pip install datasets.") from error
    try:
        yield datasets
    except ConfigError:
        raise
    # IndexError: of a saved split without rows it looks for the first file.
    except (OSError, ValueError, IndexError, datasets.exceptions.DatasetsError) as error:
        # What the package tells last of a broken file is only that there was an error.
        reason = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
        raise ConfigError(f"{what} cannot be loaded ({first_line(reason or error)}).") from error


def _read_json(path):
    """Rows of JSON lines, of which blank ones count but hold none, or of one JSON value: a list of rows, or one row."""
    rows, lines, whole = [], [], None
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if text := line.decode("utf-8-sig" if number == 1 else "utf-8").strip():
                    rows.append(json.loads(text))
                    lines.append(number)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}:{number}: the line is not UTF-8 ({error.reason}).") from error
    except (ValueError, RecursionError) as error:
        if not rows:
            with suppress(ValueError, RecursionError):
                whole = json.loads(path.read_text(encoding="utf-8-sig"))
        if whole is None:
            nested = isinstance(error, RecursionError)
            reason = "nested too deep" if nested else first_line(error).replace("line 1 ", "")
            raise ConfigError(f"{path}:{number}: the line is not JSON ({reason}).") from error
        rows = whole if isinstance(whole, list) else [whole]
    if len(rows) == 1 and isinstance(rows[0], list) and all(isinstance(row, Mapping) for row in rows[0]):
        rows = whole = rows[0]
    return Rows(rows, lambda i: f"{path}:{lines[i]}" if whole is None else f"{path}, row {i}", str(path))


def _read_table(path, delimiter):
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    rows, lines = [], []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter)
            for row in reader:
                if None in row or None in row.values():
                    more = "more" if None in row else "fewer"
                    raise ConfigError(f"{path}:{reader.line_num}: the line has {more} cells than the first line.")
                rows.append(row)
                lines.append(reader.line_num)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as a table ({error}).") from error
    return Rows(rows, lambda i: f"{path}:{lines[i]}", str(path))


def _without_none(value):
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value

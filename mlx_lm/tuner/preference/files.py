"""The files of a run: their names, writing them whole or not at all, and a folder that belongs to one run."""

import fcntl
import json
import os
import re
import secrets
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from .options import ConfigError

ADAPTERS_FILE, CONFIG_FILE, STATE_FILE = "adapters.safetensors", "adapter_config.json", "checkpoint.safetensors"
METRICS_FILE, SAMPLES_FILE, PLOT_FILE, PAGE_FILE = "metrics.jsonl", "samples.jsonl", "training.png", "report.html"
BEST_FOLDER = "best"
# The folder of a numbered save, and what its files begin with.
NUMBERED = "[0-9]" * 7
# All that a run leaves in its folder, but the model card, which may be the user's.
RUN_FILES = (f"*{ADAPTERS_FILE}", NUMBERED, CONFIG_FILE, f"*{STATE_FILE}", METRICS_FILE, SAMPLES_FILE, PLOT_FILE)
RUN_FILES += (PAGE_FILE, BEST_FOLDER)
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")


def read_config(folder):
    """What a folder's `adapter_config.json` holds, a dict; an empty one where there is none that can be read."""
    try:
        config = json.loads((Path(folder) / CONFIG_FILE).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def replace_file(path, write):
    """Put a new file in place of `path` in one step.

    Args:
        path: the file; what stands there stays until the new one is complete.
        write: called with a binary file to write to.

    Raises:
        OSError: the file cannot be written; what stood there is as it was.
    """
    replace_files((path, write))


def replace_files(*files):
    """Put several new files, `(path, write)` as for `replace_file`, in their places, none before all are complete."""
    written = []
    try:
        for path, write in files:
            path = Path(path)
            # A name that nobody can foresee, and no link: what is written stays in the folder.
            temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
            descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
            written.append((temporary, path))
            try:
                with open(descriptor, "wb") as file:
                    write(file)
                    file.flush()
                    os.fsync(descriptor)
            except (RuntimeError, OSError) as error:
                # Closing the file fails once more where the disk is full.
                raise OSError(f"{path} cannot be written: {error}") from error
        for temporary, path in written:
            os.replace(temporary, path)
    finally:
        for temporary, _ in written:
            temporary.unlink(missing_ok=True)


def give_second_name(path, name):
    """Have a file stand under another name too, in place of what stands there; without links it is copied."""
    Path(name).unlink(missing_ok=True)
    try:
        os.link(path, name)
    except (OSError, NotImplementedError):
        replace_file(name, lambda file: file.write(Path(path).read_bytes()))


def make_own_folder(folder):
    """Make a folder where there is none, in place of a link: what that leads to may be another save's."""
    folder = Path(folder)
    if folder.is_symlink():
        folder.unlink()
    folder.mkdir(exist_ok=True)


def remove_leftovers(folder):
    """Delete the temporary files that a killed run left in its folder, and in those of its saves."""
    for path in [found for place in (".", BEST_FOLDER, NUMBERED) for found in Path(folder).glob(f"{place}/.*.tmp")]:
        if TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


@contextmanager
def locked(folder):
    """Within the context, the folder is this process's, until it dies; `ConfigError` where another process has it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # A file system without locks has none to give; what it refuses for another reason is no run's.
        with suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(
                    f"another run writes to adapter_path {str(folder)!r}; wait for its end or give another folder."
                ) from error
        yield
    finally:
        os.close(descriptor)


def move_aside(folder, patterns):
    """Move an earlier run's files, whose names have one of some patterns, into a new folder beside them.

    Returns:
        The new folder, `earlier-1` or the first number that is free; None where there was nothing to move.
    """
    folder = Path(folder)
    found = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    if not found:
        return None
    places = (folder / f"earlier-{number}" for number in count(1))
    # A link to what is not there has the name, too.
    place = next(place for place in places if not os.path.lexists(place))
    place.mkdir()
    for path in found:
        path.rename(place / path.name)
    return place

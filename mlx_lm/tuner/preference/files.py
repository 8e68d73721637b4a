"""Files that are written whole or not at all."""

import os
from pathlib import Path


def replace_file(path, write):
    """Put a new file in place of `path` in one step.

    Args:
        path: the file; what stands there stays until the new one is complete.
        write: called with a temporary path of the same suffix in the same folder; writes the file there.

    Raises:
        OSError: the file cannot be written; what stood there is as it was.
    """
    replace_files((path, write))


def replace_files(*files):
    """Put several new files in their places, none before all are complete.

    Args:
        files: `(path, write)` pairs, as for `replace_file`.
    """
    written = []
    try:
        for path, write in files:
            path = Path(path)
            temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
            written.append((temporary, path))
            try:
                write(str(temporary))
            except RuntimeError as error:
                # What MLX raises where there is no room or no folder.
                raise OSError(f"{path} cannot be written: {error}") from error
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        for temporary, path in written:
            os.replace(temporary, path)
    finally:
        for temporary, _ in written:
            temporary.unlink(missing_ok=True)

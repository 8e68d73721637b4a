"""Files that are written whole or not at all."""

import os
from pathlib import Path


def replace_file(path, write):
    """Put a new file in place of `path` in one step.

    Args:
        path: the file; what stands there stays until the new one is complete.
        write: called with a temporary path of the same suffix in the same folder; writes the file there.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(str(temporary))
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

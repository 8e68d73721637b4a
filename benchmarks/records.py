"""Results of runs: the JSON files that hold them, and what a table says of several seeds."""

import json
import math
import statistics
import threading
from pathlib import Path

from programs import command_line, environment, machine, versions

RESULTS = Path(__file__).resolve().parent / "results"


def keep(path, rows, *pythons):
    """Rows of a table with what made them, written to `path` unless it is None.

    That is the machine, the versions, those of other interpreters too, and the command.
    """
    found = {"machine": machine(), "versions": versions(), "environment": environment()}
    for python in pythons:
        found["versions"] |= versions(python)
    found |= {"command": command_line(), "rows": rows}
    if path is not None:
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_text(json.dumps(found, indent=1) + "\n")
    return found


class Results:
    """The results file: a list of records; one that is run again replaces its like."""

    def __init__(self, path):
        self.path = Path(path)
        self.records = json.loads(self.path.read_text()) if self.path.exists() else []
        self.lock = threading.Lock()

    def add(self, record):
        same = ("label", "seed", "dtype", "settings")
        with self.lock:
            others = [old for old in self.records if any(old[key] != record[key] for key in same)]
            self.records = [*others, record]
            half = self.path.with_name(self.path.name + ".part")
            half.write_text("[\n" + ",\n".join(json.dumps(item) for item in self.records) + "\n]\n")
            half.replace(self.path)


def mean_and_error(values):
    """Mean and standard error, None for one value."""
    values = [value for value in values if value is not None]
    if not values:
        return None, None
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def cell(values):
    mean, error = mean_and_error(values)
    if mean is None:
        return "-"
    return f"{mean:.4f}" if error is None else f"{mean:.4f} ± {error:.4f}"

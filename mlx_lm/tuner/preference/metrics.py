"""The files of a run that grow by a JSON object a line: reports in `metrics.jsonl`, answers in `samples.jsonl`."""

import json
import math
from pathlib import Path

from .figures import BEST
from .files import METRICS_FILE, replace_file


def begin_lines(path, iteration):
    """Begin a file of lines, or go on after an iteration: later lines of the interrupted run are dropped."""
    kept = [line for line in read_metrics(path) if line["iteration"] <= iteration] if iteration else []
    replace_file(path, lambda file: file.write(as_json(kept)))


def add_lines(path, lines):
    """Append dicts to a file of lines."""
    with open(path, "ab") as file:
        file.write(as_json(lines))


def as_json(lines):
    """Dicts as lines of JSON, bytes, with null for each value that is not finite, for which JSON has no word."""

    def told(value):
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return "".join(json.dumps({key: told(value) for key, value in line.items()}) + "\n" for line in lines).encode()


def read_validations(folder):
    """The lines of a run's validations on the pairs of the last one, of its parts before a resume too."""
    return validations_of(read_metrics(Path(folder) / METRICS_FILE))


def validations_of(lines):
    """Those of a run's lines that are of validations on the pairs of the last one."""
    lines = [line for line in lines if "eval_loss" in line]
    return [line for line in lines if line.get("eval_set") == lines[-1].get("eval_set")]


def best_of(validations, by=None):
    """The best validation, by a value of save_best or the loss, and the last one of lines; None where there is none."""
    name, sign = BEST[by or "eval_loss"]
    sound = [line for line in validations if isinstance(line.get(f"eval_{name}"), (int, float))]
    best = max(sound, key=lambda line: sign * line[f"eval_{name}"], default=None)
    return best, sound[-1] if sound else None


def read_metrics(path):
    """The lines of such a file as dicts; what an interruption cut short is left out, and all that follows it."""
    if not Path(path).exists():
        return []
    lines = []
    for text in Path(path).read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            break
        if not isinstance(line, dict) or type(line.get("iteration")) is not int or abs(line["iteration"]) > 2**53:
            break
        lines.append(line)
    return lines

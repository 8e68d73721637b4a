"""Compare a whole DPO run of our command with one of TRL's trainer, each as its user starts it, as one Markdown table.

    python benchmarks/end_to_end.py --model FOLDER --data FOLDER                   # one GPU, or a CPU
    python benchmarks/end_to_end.py --model FOLDER --data FOLDER --limit 64 --max-seq-length 512 --python-trl PYTHON

Ours is `python -m mlx_lm.lora --config FILE`, TRL's is `trl_train.py` (DPOTrainer with the reference precomputed, and
with --liger a third run that uses Liger's kernels). Both train the model folder in the dtype of its files on DATA's
train.jsonl, LoRA of rank 8 on all linear layers, AdamW, the same rate, batch size, length and beta, and validate on
valid.jsonl at the start, in the middle and at the end. Nothing is kept from an earlier run but MLX's compiled kernels.
Phases are taken from the times at which the programs print their lines:

- load: from the start of the process until the model is there, imports included
- tokenizing and reference: until the pairs, and until the reference's logps of both splits are there
- ms a step: of every fifty steps, validations left out, as the programs measure it
- second half: pairs a second from the end of the middle validation to the start of the last one
- processor s: of all cores, less sensitive to other work on the machine
- arrays: the most that arrays or tensors held; of TRL on a CPU it is not known
- held: the most GPU memory that was taken beyond what was in use before, or on a CPU the peak of resident memory
"""

import argparse
import json
import os
import re
import sys
import tempfile
from pathlib import Path

from common import markdown_table, say
from programs import (
    NotRun,
    Training,
    command_line,
    count_lines,
    environment,
    limited_data,
    machine,
    start_ours,
    start_trl,
    versions,
)

RUNS = {"ours": "ours", "trl": "TRL", "liger": "TRL, Liger"}


def measure_ours(training, folder, workers, timeout):
    """One run of our command."""
    watched, reports = start_ours(training, folder, workers, timeout=timeout)
    validations = [report for report in reports if "eval_loss" in report]
    told = [seconds for seconds, line in watched.lines if re.search(r" validation of \d+ pairs, ", line)]
    # The last is in the head of the table of steps.
    loaded, tokenized, referenced = (
        watched.moment(text) for text in ("Loading datasets", "Training", "accuracy   margin")
    )
    steps, before = [], 0
    for report in reports:
        if "loss" in report:
            count = report["iteration"] - before
            steps.append((report["iteration"], count, count / report["iterations_per_second"]))
            before = report["iteration"]
    return summary(
        training,
        watched,
        phases={"load": loaded, "tokenizing": tokenized - loaded, "reference": referenced - tokenized},
        steps=steps,
        validations=[
            (line["iteration"], seconds, line["val_time"], figures_of(line))
            for line, seconds in zip(validations, told, strict=True)
        ],
        peak_gb=max(report.get("peak_memory", 0) for report in reports),
    )


def measure_trl(training, folder, liger, options):
    """One run of TRL's trainer."""
    watched, events = start_trl(training, folder, options.python_trl, liger, timeout=options.timeout)
    ends = {event["event"]: event["time"] - watched.started for event in events}
    named = {name: [event for event in events if event["event"] == name] for name in ("steps", "validation", "saved")}
    loaded, tokenized, referenced = (ends[name] for name in ("loaded", "tokenized", "reference"))
    return summary(
        training,
        watched,
        phases={"load": loaded, "tokenizing": tokenized - loaded, "reference": referenced - tokenized},
        steps=[(event["iteration"], event["steps"], event["seconds"]) for event in named["steps"]],
        validations=[
            (event["iteration"], event["time"] - watched.started, event["seconds"], figures_of(event))
            for event in named["validation"]
        ],
        peak_gb=named["saved"][0]["peak_gb"],
    )


def figures_of(report):
    """Loss, accuracy and margin of a validation's report."""
    names = {"loss": "eval_loss", "accuracy": "eval_rewards/accuracies", "margin": "eval_rewards/margins"}
    return {name: report[key] for name, key in names.items()}


def summary(training, watched, phases, steps, validations, peak_gb):
    """What both programs' runs are told by.

    Args:
        phases: seconds by name.
        steps: `(iteration, steps, seconds)` of each report.
        validations: `(iteration, seconds from the start to its end, its own seconds, figures)`.
        peak_gb: of arrays, or None.
    """
    (middle, middle_end, _, _), (last, last_end, last_seconds, figures) = validations[-2:]
    pairs = sum(pairs_of(training, iteration) for iteration in range(middle + 1, last + 1))
    return {
        "phases": phases,
        "steps": [{"iteration": i, "steps": count, "ms": 1000 * seconds / count} for i, count, seconds in steps],
        "pairs_per_second": pairs / (last_end - last_seconds - middle_end),
        "validation_seconds": [seconds for _, _, seconds, _ in validations],
        "validations": [{"iteration": i, **found} for i, _, _, found in validations],
        "whole_seconds": watched.seconds,
        "cpu_seconds": watched.cpu_seconds,
        "arrays_gb": peak_gb,
        "held_gb": watched.held_gb,
        **figures,
    }


def pairs_of(training, iteration):
    """Pairs in a batch, were the short one the epoch's last: on average that is right of both programs' order."""
    whole, rest = divmod(training.rows, training.batch_size)
    return rest if rest and iteration % (whole + 1) == 0 else training.batch_size


def table(results):
    """Rows of the Markdown table, a column each program."""
    rows = {}
    for name, result in results.items():
        for row, cell in cells(result).items():
            rows.setdefault(row, {})[name] = cell
    return [(row, *(found.get(name, "-") for name in results)) for row, found in rows.items()]


def cells(result):
    """`{row: cell}` of a program's column."""
    if "error" in result:
        return {"not run": result["error"]}
    found = {f"{name}, s": f"{seconds:.1f}" for name, seconds in result["phases"].items()}
    for report in result["steps"]:
        first = report["iteration"] - report["steps"] + 1
        found[f"ms a step, {first} to {report['iteration']}"] = f"{report['ms']:.0f}"
    return found | {
        "second half, pairs/s": f"{result['pairs_per_second']:.2f}",
        "validations, s": ", ".join(f"{seconds:.1f}" for seconds in result["validation_seconds"]),
        "whole, s": f"{result['whole_seconds']:.1f}",
        "whole, processor s": f"{result['cpu_seconds']:.1f}",
        "arrays, GB": "-" if result["arrays_gb"] is None else f"{result['arrays_gb']:.2f}",
        "held, GB": f"{result['held_gb']:.2f}",
        "last validation: loss": f"{result['loss']:.4f}",
        "accuracy": f"{result['accuracy']:.3f}",
        "margin": f"{result['margin']:+.4f}",
    }


def options_of(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="model folder, read by both")
    parser.add_argument("--data", required=True, help="folder with train.jsonl and valid.jsonl")
    parser.add_argument("--limit", type=int, help="take only so many training pairs, and a quarter for validation")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-seq-length", type=int, default=1024)
    parser.add_argument("--set", type=json.loads, default={}, help="more keys of our configuration, as a JSON object")
    parser.add_argument("--only", choices=RUNS, help="leave the other programs out")
    parser.add_argument("--liger", action="store_true", help="also run TRL with Liger's kernels")
    parser.add_argument("--python-trl", default=sys.executable, metavar="PYTHON", help="interpreter that has TRL")
    parser.add_argument("--workers", type=int, default=1, help="of our run, on this machine's CPU")
    parser.add_argument("--timeout", type=float, help="seconds that one program may take")
    parser.add_argument("--out", help="JSON file for the results")
    options = parser.parse_args(arguments)
    options.runs = [options.only] if options.only else ["ours", "trl", *(["liger"] if options.liger else [])]
    return options


def measure(name, training, options):
    """A program's result, or `{"error": sentence}`."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            if name == "ours":
                return measure_ours(training, folder, options.workers, options.timeout)
            return measure_trl(training, folder, name == "liger", options)
        except NotRun as error:
            return {"error": str(error)}


def main():
    options = options_of()
    with tempfile.TemporaryDirectory() as folder:
        data = options.data if options.limit is None else limited_data(options.data, f"{folder}/data", options.limit)
        training = Training(options.model, data, options.batch_size, max_seq_length=options.max_seq_length)
        training.options = options.set
        found = {
            "machine": machine(),
            "versions": versions() | versions(options.python_trl),
            "command": command_line(),
            "environment": environment(),
            "rows": training.rows,
            "validation_rows": count_lines(Path(data) / "valid.jsonl"),
            "iters": training.iters,
            "load_average": os.getloadavg()[0],
            "runs": {},
        }
        for name in options.runs:
            found["runs"][name] = measure(name, training, options)
            say(f"{name}: {json.dumps(found['runs'][name])}")
            if options.out:
                # Written after each program: a call that is cut off keeps what it had.
                Path(options.out).write_text(json.dumps(found, indent=1) + "\n")
    results = {RUNS[name]: result for name, result in found["runs"].items()}
    print(markdown_table(("", *results), table(results)))
    print(f"\n{found['machine']}; {found['rows']} pairs, {found['iters']} steps of {options.batch_size}.")
    if any("error" in result for result in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()

"""Compare what is learned with our command and with TRL's trainer, seed by seed, on held-out pairs.

    python benchmarks/compare_learning.py --model FOLDER --data FOLDER --out learning.json --seeds 0,1,2,3,4
    python benchmarks/compare_learning.py --out learning.json                                 # what the file holds

Each run trains LoRA on all linear layers with DPO for some epochs, with AdamW at the same rate and schedule, and
validates before the first step and after each epoch; runs differ in the seed of adapters and order. Each run is added
to --out as soon as it is done, so that several calls add up: --only, --seeds, and --label with --set for another
setting of ours. The table has mean and standard error over the seeds, as each program tells them; "from TRL" is the
difference of the means over the root of both standard errors' squares, for the same dtype and settings. TRL also scores
what a chat template writes after the end of a turn.
The second table is of the models after each epoch, measured by one code for both programs: margins, how they go with
the lengths of the responses, and with --samples the length of greedy responses to that many validation prompts.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import by_comma, markdown_table, run_own, say, stored_dtype
from programs import NotRun, Training, command_line, count_lines, limited_data, machine, start_ours, start_trl, versions
from records import Results, cell, mean_and_error

FIGURES = {
    "loss": "eval_loss",
    "accuracy": "eval_rewards/accuracies",
    "margin": "eval_rewards/margins",
    "chosen reward": "eval_rewards/chosen",
    "rejected reward": "eval_rewards/rejected",
}
# Of the trained model, measured by one code for both programs.
HELD_OUT = {
    "loss": "loss",
    "accuracy": "accuracy",
    "margin": "margin",
    "chosen reward": "chosen_reward",
    "accuracy, chosen longer": "accuracy_chosen_longer",
    "accuracy, chosen shorter": "accuracy_chosen_shorter",
    "margin's correlation with length": "margin_length_correlation",
    "chosen reward a token": "chosen_reward_a_token",
    "rejected reward a token": "rejected_reward_a_token",
    "sampled tokens": "sampled_length",
    "ended by itself": "sampled_whole",
}
COMPARED = ("loss", "accuracy", "margin", "chosen_reward")
# Keys of --set that make another loss than TRL's runs have.
OF_LOSS = {"loss_type", "ld_alpha"}
SETTINGS = ("epochs", "batch_size", "max_seq_length", "learning_rate", "schedule", "beta")


def even_batches(data):
    """The largest batch size up to TRL's 8 that leaves no short batch, which would count as much as a whole one."""
    rows = count_lines(Path(data) / "valid.jsonl")
    return max(size for size in range(1, 9) if rows % size == 0)


def train(program, seed, options):
    """One run: its record for the results file.

    Raises:
        NotRun: the program ended with an error.
    """
    settings = {name: getattr(options, name) for name in SETTINGS}
    training = Training(
        options.model,
        options.data,
        seed=seed,
        validations=options.epochs,
        trl_options=("--eval-batch-size", even_batches(options.data), "--keep"),
        **settings,
    )
    training.options = {"save_every": training.steps_per_eval, **options.set}
    started = time.perf_counter()
    limits = {"timeout": options.timeout, "measure_memory": False}
    with tempfile.TemporaryDirectory() as folder:
        if program == "ours":
            _, reports = start_ours(training, folder, **limits)
        else:
            _, reports = start_trl(training, folder, options.python_trl, **limits)
        seconds = time.perf_counter() - started
        # The last save is the trained model itself.
        ends = [min(n * training.steps_per_eval, training.iters) for n in range(1, options.epochs + 1)]
        adapters = [f"{folder}/adapters/{iteration:07d}" for iteration in ends]
        spec = {"model": options.measured_with, "data": options.data, "adapters": adapters, "beta": options.beta}
        spec |= {"samples": options.samples, "max_seq_length": options.max_seq_length}
        found = run_own("held_out.py", spec, options.timeout)
        if "error" in found:
            raise NotRun(found["error"])
    validations = [report for report in reports if "eval_loss" in report]
    return {
        "program": program,
        "label": options.label if program == "ours" else "TRL",
        "seed": seed,
        "dtype": options.dtype,
        "settings": settings | ({"set": options.set} if program == "ours" and options.set else {}),
        "epochs": [{name: report[key] for name, key in FIGURES.items()} for report in validations],
        "measured_in": stored_dtype(options.measured_with),
        "held_out": {str(epoch): measured for epoch, measured in enumerate(found["measured"], 1)},
        "seconds": seconds,
        "machine": machine(),
        "versions": versions() if program == "ours" else versions(options.python_trl),
        "command": command_line(),
    }


def run_all(options, results):
    """Run what is asked for, `jobs` at a time, our programs and TRL's in turn."""
    programs = [options.only] if options.only else ["ours", "trl"]
    asked = [(program, seed) for seed in options.seeds for program in programs]

    def one(item):
        try:
            record = train(*item, options)
        except NotRun as error:
            say(f"{item[0]}, seed {item[1]}: not run: {error}")
            return False
        results.add(record)
        say(f"{record['label']}, seed {item[1]}, {record['seconds']:.0f} s: {json.dumps(record['epochs'][-1])}")
        return True

    with ThreadPoolExecutor(options.jobs) as pool:
        return all(pool.map(one, asked))


def add_base(options, results):
    """The length of the base model's responses, where it is not known yet."""
    model = options.measured_with
    settings = {"model": Path(model).name, "samples": options.samples}
    if any(record["label"] == "base" and record["settings"] == settings for record in results.records):
        return
    spec = {"model": model, "data": options.data, "adapters": [], "samples": options.samples}
    found = run_own("held_out.py", spec)
    named = {"program": "base", "label": "base", "seed": 0, "settings": settings, "epochs": []}
    named |= {"dtype": stored_dtype(model)}
    results.add(named | {"held_out": {"0": found["measured"][0]}, "machine": machine()})


def groups(records):
    """`{(label, dtype, settings): records}` in the order of their first runs."""
    found = {}
    for record in records:
        key = record["label"], record["dtype"], json.dumps(record["settings"], sort_keys=True)
        found.setdefault(key, []).append(record)
    return found


def distance(ours, theirs):
    """The difference of two samples' means in standard errors, as a cell."""
    (mean, error), (other, other_error) = mean_and_error(ours), mean_and_error(theirs)
    if error is None or other_error is None or error == other_error == 0:
        return "-"
    return f"{(mean - other) / math.hypot(error, other_error):+.1f}"


def counterpart(key, grouped):
    """TRL's runs of the same dtype and settings; None for a loss that those do not have."""
    _, dtype, settings = key
    settings = json.loads(settings)
    if not OF_LOSS.isdisjoint(settings.pop("set", {})):
        return None
    return grouped.get(("TRL", dtype, json.dumps(settings, sort_keys=True)))


def epoch_table(grouped):
    """`(header, rows)` of what each program says of its validations."""
    rows = []
    for key, records in grouped.items():
        label, dtype, _ = key
        others = counterpart(key, grouped) if label != "TRL" else None
        # Before the first step, whose figures stand first, there is rounding alone.
        for epoch in range(1, len(records[0]["epochs"])):
            row = []
            for name in FIGURES:
                values = [record["epochs"][epoch][name] for record in records]
                theirs = [record["epochs"][epoch][name] for record in others] if others else []
                row += [cell(values), distance(values, theirs)]
            rows.append((label, dtype, len(records), epoch, *row))
    return ("run", "dtype", "seeds", "epoch", *(head for name in FIGURES for head in (name, "from TRL"))), rows


def held_out_table(grouped):
    """`(header, rows)` of the models after each epoch that was measured, by one code."""
    rows = []
    for key, records in grouped.items():
        label, dtype, _ = key
        others = (counterpart(key, grouped) if label != "TRL" else None) or []
        for dtype_of, epoch in sorted({(measured_in(r), epoch) for r in records for epoch in r["held_out"]}):
            row, measured = [], [measures(dtype_of, epoch, runs) for runs in (records, others)]
            for name in HELD_OUT.values():
                values, theirs = ([each.get(name) for each in runs] for runs in measured)
                row += [cell(values), *([distance(values, theirs)] if name in COMPARED else [])]
            rows.append((label, dtype, dtype_of, len(measured[0]), epoch, *row))
    heads = (head for head, name in HELD_OUT.items() for head in ((head, "from TRL") if name in COMPARED else (head,)))
    return ("run", "trained in", "measured in", "seeds", "epoch", *heads), rows


def measured_in(record):
    """The dtype of the model that `held_out.py` put the adapters on."""
    return record.get("measured_in", record["dtype"])


def measures(dtype, epoch, records):
    """What `held_out.py` found of the runs so measured after an epoch, "0" for the base model."""
    return [r["held_out"][epoch] for r in records if measured_in(r) == dtype and epoch in r["held_out"]]


def options_of(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="model folder, read by both; without it only the file's table is printed")
    parser.add_argument("--data", help="folder with train.jsonl and valid.jsonl")
    parser.add_argument("--out", required=True, help="JSON file that the runs are added to")
    parser.add_argument("--seeds", type=by_comma(int), default="0,1,2,3,4", help="by comma")
    parser.add_argument("--only", choices=("ours", "trl"))
    parser.add_argument("--label", default="ours", help="name of our runs in the table")
    parser.add_argument("--set", type=json.loads, default={}, help="more keys of our configuration, as a JSON object")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-seq-length", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--schedule", choices=("constant", "linear"), default="linear")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument(
        "--measured-with", help="the model folder, in another dtype perhaps, that the one code has; --model by default"
    )
    parser.add_argument("--samples", type=int, default=0, help="validation prompts to respond to")
    parser.add_argument("--limit", type=int, help="take only so many training pairs, and a quarter for validation")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--python-trl", default=sys.executable, metavar="PYTHON", help="interpreter that has TRL")
    parser.add_argument("--timeout", type=float, help="seconds that one run may take")
    options = parser.parse_args(arguments)
    if options.model and not options.data:
        parser.error("--model needs --data")
    return options


def main():
    options = options_of()
    results, complete = Results(options.out), True
    if options.model:
        options.dtype = stored_dtype(options.model)
        options.measured_with = options.measured_with or options.model
        with tempfile.TemporaryDirectory() as folder:
            if options.limit is not None:
                options.data = limited_data(options.data, f"{folder}/data", options.limit)
            complete = run_all(options, results)
            if options.samples:
                add_base(options, results)
    grouped = groups(results.records)
    print(markdown_table(*epoch_table(grouped)))
    print()
    print(markdown_table(*held_out_table(grouped)))
    if not complete:
        sys.exit(1)


if __name__ == "__main__":
    main()

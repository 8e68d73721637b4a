"""The DPO paper's sentiment experiment, small: mean score against KL from the reference, as tables and a picture.

    python benchmarks/sentiment.py --model FOLDER --out sentiment.json                   # a CPU, ten to twenty minutes
    python benchmarks/sentiment.py --model FOLDER --out sentiment.json --setting gpu --jobs 6
    python benchmarks/sentiment.py --out sentiment.json --picture sentiment.png          # what the file holds

After arXiv 2305.18290, section 6.1, with a small model and a lexicon in place of a classifier. The model continues the
first words of film reviews several times; VADER scores the continuations from -1 to 1; the best and the worst of each
prompt are a pair. From the same model as reference each loss trains LoRA on the pairs. Every so many steps the policy
continues held-out prompts at temperature 1: the mean score, and the KL of these sequences from the reference in nats,
are a point of its frontier. sft and unlikelihood (alpha times the rejected responses' likelihood down) are the paper's
baselines. Each run is added to --out as soon as it is done, so that several calls add up; --pairs keeps the sampled
pairs, which all runs of a file should share. Needs vaderSentiment, and matplotlib for --picture.
"""

import argparse
import json
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from common import by_comma, markdown_table, run_own, say, stored_dtype
from programs import command_line, machine, versions
from records import Results, cell, mean_and_error

# Name of a run in --runs: what it trains with. The paper's losses and baselines at several strengths, and then every
# other loss of the table once.
PAPER = {
    **{f"dpo:{beta}": {"loss": "dpo", "beta": beta} for beta in (0.05, 0.1, 0.5, 1)},
    **{f"ipo:{beta}": {"loss": "ipo", "beta": beta} for beta in (0.1, 0.5)},
    **{f"simpo:{beta}": {"loss": "simpo", "beta": beta} for beta in (2, 10)},
    "sft": {"loss": "likelihood", "alpha": 0.0},
    **{f"unlikelihood:{alpha}": {"loss": "likelihood", "alpha": alpha} for alpha in (0.05, 0.5, 1)},
}
FURTHER = {
    "robust:0.1": {"loss": "robust", "beta": 0.1, "label_smoothing": 0.1},
    **{f"{loss}:0.1": {"loss": loss, "beta": 0.1} for loss in ("hinge", "exo_pair", "nca_pair", "bco_pair")},
    # Its margins are means of tokens, as simpo's are.
    "sigmoid_norm:2": {"loss": "sigmoid_norm", "beta": 2},
    **{f"{loss}:0.1": {"loss": loss, "beta": 0.1} for loss in ("sppo_hard", "apo_zero", "apo_down")},
    "discopop:0.1": {"loss": "discopop", "beta": 0.1, "discopop_tau": 0.2},
    **{f"{loss}:0.1": {"loss": loss, "beta": 0.1} for loss in ("aot", "aot_unpaired", "dpop", "orpo", "cpo", "kto")},
    "dpo+sft:0.1": {"loss": ["dpo", "sft"], "beta": 0.1},
    # With a fiftieth of the factor that its paper has, which holds the chosen responses where they are.
    "dpop-1:0.1": {"loss": "dpop", "beta": 0.1, "dpop_lambda": 1},
}
RUNS = PAPER | FURTHER
SETTINGS = {
    "cpu": {
        "sampling": {"prompts": 64, "held_out": 24, "continuations": 4, "tokens": 20, "batch": 32},
        "training": {"steps": 40, "every": 10, "batch_size": 4, "learning_rate": 1e-4},
        "evaluation": {"tokens": 20, "batch": 32, "kl_batch": 8},
        "runs": "dpo:0.1,dpo:1,sft",
        "seeds": "0",
    },
    "gpu": {
        "sampling": {"prompts": 800, "held_out": 256, "continuations": 4, "tokens": 48, "batch": 256},
        "training": {"steps": 300, "every": 50, "batch_size": 8, "learning_rate": 2e-5},
        "evaluation": {"tokens": 48, "batch": 256, "kl_batch": 16},
        "runs": ",".join(PAPER),
        "seeds": "0,1,2",
    },
}


def known_run(name):
    """What a run of RUNS, or of another parameter such as dpo:0.2, trains with."""
    if name in RUNS:
        return RUNS[name]
    kind, _, value = name.partition(":")
    like = next((run for other, run in RUNS.items() if other.partition(":")[0] == kind), None)
    try:
        return like | {"alpha" if kind == "unlikelihood" else "beta": float(value)}
    except (TypeError, ValueError):
        # No such kind, or no number.
        raise argparse.ArgumentTypeError(f"no such run: {name}; there are {', '.join(RUNS)}") from None


def run_names(text):
    names = list(FURTHER) if text == "further" else text.split(",")
    for name in names:
        known_run(name)
    return names


def make_pairs(options, setting):
    """The pairs that all runs train on, sampled unless the file is there."""
    path = Path(options.pairs)
    if path.exists():
        return json.loads(path.read_text())
    made = run_own(
        "sentiment_task.py", {"work": "pairs", "model": options.model, **setting["sampling"]}, options.timeout
    )
    if "error" in made:
        sys.exit(f"no pairs were made: {made['error']}")
    path.write_text(json.dumps(made) + "\n")
    for prompt, chosen, rejected in made["examples"]:
        say(f"{prompt!r}: {chosen!r} over {rejected!r}")
    say(f"{len(made['pairs'])} pairs; mean score of all samples {made['mean_score']:.3f}")
    return made


def run_all(options, setting, results):
    """Train every run of every seed, `jobs` at a time."""
    training = setting["training"] | {
        name: value for name, value in vars(options).items() if name in setting["training"] and value is not None
    }

    def one(item):
        seed, name = item
        spec = {"work": "train", "model": options.model, "pairs": options.pairs, "run": known_run(name), "seed": seed}
        made = run_own("sentiment_task.py", spec | training | setting["evaluation"], options.timeout)
        if "error" in made:
            say(f"{name}, seed {seed}: not run: {made['error']}")
            return False
        record = {"label": name, "seed": seed, "dtype": options.dtype, "settings": training | setting["evaluation"]}
        results.add(record | made | {"machine": machine(), "versions": versions(), "command": command_line()})
        last = made["points"][-1]
        say(f"{name}, seed {seed}: KL {last['kl']:.2f}, score {last['score']:.3f}: {last['sample'][:80]!r}")
        return True

    asked = [(seed, name) for seed in options.seeds for name in options.runs]
    with ThreadPoolExecutor(options.jobs) as pool:
        return all(pool.map(one, asked))


def runs_of(records):
    """`{name: records}` of like runs, in the order of RUNS: a name tells in what it differs from the first run."""
    kinds = list(dict.fromkeys(map(kind_of, RUNS)))
    found = {}
    for record in sorted(records, key=lambda record: place_of(record["label"], kinds)):
        usual = records[0]["settings"] | {"dtype": records[0]["dtype"]}
        own = record["settings"] | {"dtype": record["dtype"]}
        further = [f"{name} {value}" for name, value in own.items() if usual.get(name) != value]
        found.setdefault(", ".join([record["label"], *further]), []).append(record)
    return found


def kind_of(label):
    """The loss of a run's name."""
    return label.partition(",")[0].partition(":")[0]


def place_of(label, kinds):
    return kinds.index(kind_of(label)), float(label.partition(":")[2] or 0)


def score_at(points, kl):
    """The score where a run's frontier first comes to a KL, between two of its points behind the reference's own.

    None where it stays below, and where the first point is beyond: a line from the reference to there is no frontier.
    """
    for before, after in zip(points[1:], points[2:], strict=False):
        if before["kl"] <= kl <= after["kl"] and after["kl"] > before["kl"]:
            share = (kl - before["kl"]) / (after["kl"] - before["kl"])
            return before["score"] + share * (after["score"] - before["score"])
    return None


def score_and_error(points):
    """The mean score at a step and its standard error over the seeds, or of one seed over its prompts."""
    score, error = mean_and_error([point["score"] for point in points])
    return score, points[0]["score_error"] if error is None else error


def points_table(runs):
    """`(header, rows)`: a row a run, with KL in nats and mean score at each step but the first."""
    steps = sorted({point["iteration"] for records in runs.values() for r in records for point in r["points"]})[1:]
    rows = []
    for label, records in runs.items():
        cells = []
        for step in steps:
            points = [point for record in records for point in record["points"] if point["iteration"] == step]
            if points:
                score, error = score_and_error(points)
                kl = statistics.fmean(point["kl"] for point in points)
                cells.append(f"{kl:.1f}: {score:+.3f} ± {error:.3f}")
            else:
                cells.append("-")
        rows.append((label, len(records), *cells))
    return ("run", "seeds", *(f"step {step}" for step in steps)), rows


def scores_table(runs, divergences):
    """`(header, rows)`: a row a run, with its score where it comes to some KL, and at its largest."""
    rows = []
    for label, records in runs.items():
        cells = []
        for kl in divergences:
            scores = [score_at(record["points"], kl) for record in records]
            reached = [score for score in scores if score is not None]
            cells.append(cell(reached) + (f" ({len(reached)} of {len(scores)})" if len(reached) < len(scores) else ""))
        far = [max(record["points"], key=lambda point: point["kl"]) for record in records]
        rows.append((label, *cells, *(cell([point[name] for point in far]) for name in ("kl", "score"))))
    return ("run", *(f"score at {kl:g} nats" for kl in divergences), "highest KL", "score there"), rows


def draw(runs, path):
    """The frontiers: the means over the seeds, with the standard error of the score, joined in the order of steps.

    KL is drawn by its logarithm, so that the point before the first step is a line: the reference's own score. Where
    there are runs of PAPER, those alone are drawn.
    """
    from matplotlib.figure import Figure

    runs = {label: records for label, records in runs.items() if label in PAPER} or runs
    kinds = list(dict.fromkeys(map(kind_of, runs)))
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    markers = "osD^vPX*"
    for label, records in runs.items():
        place = [other for other in runs if kind_of(other) == kind_of(label)].index(label)
        _, *steps = zip(*(record["points"] for record in records), strict=False)
        kl = [statistics.fmean(point["kl"] for point in points) for points in steps]
        scores = [score_and_error(points) for points in steps]
        axes.errorbar(
            kl,
            [mean for mean, _ in scores],
            [error for _, error in scores],
            color=f"C{kinds.index(kind_of(label))}",
            marker=markers[place % len(markers)],
            alpha=0.8,
            linewidth=1,
            markersize=4,
            label=label,
        )
    before = [record["points"][0]["score"] for records in runs.values() for record in records]
    axes.axhline(statistics.fmean(before), color="grey", linestyle=":", label="reference")
    axes.set_xscale("log")
    axes.set_xlabel("KL of sampled sequences from the reference, nats")
    axes.set_ylabel("mean score")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def options_of(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="model folder; without it only the file's tables are printed")
    parser.add_argument("--out", required=True, help="JSON file that the runs are added to")
    parser.add_argument("--pairs", help="JSON file of the sampled pairs; by default --out with .pairs.json at its end")
    parser.add_argument("--setting", choices=SETTINGS, default="cpu")
    parser.add_argument(
        "--runs", type=run_names, help=f"by comma, some of {', '.join(RUNS)}; further: the losses that the paper lacks"
    )
    parser.add_argument("--seeds", type=by_comma(int), help="by comma")
    parser.add_argument("--steps", type=int, help="instead of the setting's")
    parser.add_argument("--every", type=int, help="steps from one point to the next")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--timeout", type=float, help="seconds that one run may take")
    parser.add_argument("--at", type=by_comma(float), default="5,10", help="KL, by comma, to tell the scores at")
    parser.add_argument("--picture", help="PNG file for the frontiers")
    options = parser.parse_args(arguments)
    setting = SETTINGS[options.setting]
    options.runs = options.runs or run_names(setting["runs"])
    options.seeds = options.seeds or [int(seed) for seed in setting["seeds"].split(",")]
    options.pairs = options.pairs or str(Path(options.out).with_suffix(".pairs.json"))
    return options, setting


def main():
    options, setting = options_of()
    results, complete = Results(options.out), True
    if options.model:
        if find_spec("vaderSentiment") is None:
            sys.exit("vaderSentiment scores the texts and is not installed: pip install vaderSentiment.")
        options.dtype = stored_dtype(options.model)
        make_pairs(options, setting)
        complete = run_all(options, setting, results)
    runs = runs_of(results.records)
    for header, rows in (points_table(runs), scores_table(runs, options.at)):
        print(markdown_table(header, rows))
        print()
    if options.picture:
        draw(runs, options.picture)
    if not complete:
        sys.exit(1)


if __name__ == "__main__":
    main()

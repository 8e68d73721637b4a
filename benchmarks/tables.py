"""Write what the documents show of results/*.json, each table between two markers that bear its name.

    python benchmarks/tables.py          # all of them; a test compares the documents with it

Nothing is measured here: each table names the commands that measured it. A new file in results/ is a new row.
"""

import json
import re
import statistics
import textwrap
from pathlib import Path

from common import SHAPES, markdown_table
from compare_learning import epoch_table, groups, held_out_table
from macs import parameters
from sentiment import runs_of, scores_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README, MANUAL, BENCHMARKS = (ROOT / name for name in ("README.md", "LORA.md", "BENCHMARKS.md"))


def files(pattern):
    """`{name: content}` of the results whose file names match a pattern, the name without what all have in common."""
    common = pattern.partition("*")[0]
    return {path.stem.removeprefix(common): json.loads(path.read_text()) for path in sorted(RESULTS.glob(pattern))}


def result(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def made_by(found):
    """A line under a table: the command, the machine and the versions."""
    versions = ", ".join(f"{name} {version}" for name, version in found.get("versions", {}).items())
    variables = "".join(f"{key}={value} " for key, value in found.get("environment", {}).items())
    return f"`{variables}{found['command']}`; {found['machine']}; {versions}."


def table_of(header, rows, found):
    """A table, and the line that says what made it."""
    return markdown_table(header, rows) + "\n\n" + made_by(found)


def spread(values, digits=0):
    """The median of values, and their range where there are several."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def of_files(pattern, table):
    """A function that makes the tables of the results whose file names match a pattern."""
    return lambda: "\n\n".join(map(table, files(pattern).values()))


def paragraph(text):
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def settings_cell(settings):
    return ", ".join(f"`{key}: {value}`".replace("'", "") for key, value in settings.items())


# The embedded example


def results_table(found):
    """Every loss trained on the embedded example: the validation set's figures before and after."""
    rows = []
    for row in found["rows"]:
        cells = [f"{row[when][name]:.3f}" for name in ("loss", "accuracy") for when in ("before", "after")]
        rows.append((f"`{row['loss']}`", settings_cell(row["settings"]), *cells))
    steps = found["rows"][0]["steps"]
    header = ("loss", "with", "loss at 0", f"loss at {steps}", "accuracy at 0", f"accuracy at {steps}")
    return table_of(header, rows, found)


def example_text():
    """The embedded example's run: what the model says to test prompts before and after, and the figures."""
    (row,) = result("example_answers")["rows"]
    generate = "mlx_lm generate --model mlx_lm/examples/tiny_chat_model --temp 0 --max-tokens 40"
    command = f".venv/bin/python -m {generate}"
    prompt = f'--prompt "{row["shown"][0]["prompt"]}"'
    parts = (
        markdown_table(("prompt", "before", "after"), [tuple(shown.values()) for shown in row["shown"]]),
        paragraph(
            "These are the first test prompts to which the model is grumpy before. Of all "
            f"{row['answers']}, {row['grumpy']['before']} answers are grumpy before and {row['grumpy']['after']} "
            f"after; {row['right']['before']} are right before and {row['right']['after']} after. Reward accuracy on "
            f"the validation pairs is {row['before']['accuracy']:.3f} before and {row['after']['accuracy']:.3f} after. "
            "The first answer after it comes from"
        ),
        f"```shell\n{command} --adapter-path adapters {prompt}\n```",
    )
    return "\n\n".join(parts)


def rate_text():
    """The embedded example's run with a learning rate that is too high."""
    (row,) = result("example_rate")["rows"]
    settings, before, after = row["settings"], row["before"], row["after"]
    words = row["answer"].split()
    answer = " ".join(words[:6]) + (" ..." if len(words) > 6 else "")
    return paragraph(
        f"On one machine the embedded example with `--learning-rate {settings['learning_rate']:g} "
        f"--iters {settings['iters']}` takes the validation's rewards from 0 to {after['chosen']:+.1f} and "
        f"{after['rejected']:+.1f}, its loss from "
        f'{before["loss"]:.2f} to {after["loss"]:.2f}, and the model then answers "{row["prompt"]}" with "{answer}" '
        "(`benchmarks/example.py rate`)."
    )


def discopop_text():
    """discopop with its paper's tau and with a larger one."""
    told = {}
    for row in result("example_discopop")["rows"]:
        told.setdefault(row["tau"], []).append(f"{row['after']['accuracy']:.3f} after {row['steps']} steps")
    taus = "; ".join(f"with a tau of {tau} {' and '.join(rows)}" for tau, rows in told.items())
    return paragraph(
        f"On the embedded example its accuracy on the validation pairs is, from 0.5, {taus} "
        "(`benchmarks/example.py discopop`)."
    )


def soak_text():
    """What disturbed runs and drawn files came to."""
    long, whole = result("soak"), result("soak_whole_run")
    if long["failures"] or whole["failures"]:
        raise ValueError("a disturbed run has ended otherwise: mend that, not the text")
    stops = sum(long[name] for name in ("SIGTERM", "SIGINT", "SIGHUP"))
    rows, configs = result("fuzz_rows"), result("fuzz_configs")
    return paragraph(
        "`benchmarks/soak.py` disturbs the example's run in a restart loop with `resume: auto` until it is done. In "
        f"{long['minutes']:.0f} minutes (seed {long['seed']}, two busy cores, so that many signals came while the "
        f"command was still starting) it was killed {long['SIGKILL']} times, stopped by SIGTERM, SIGINT or SIGHUP "
        f"{stops} times, ran out of disk {long['full disk']} times and found a flipped bit in its newest checkpoint "
        f"{long['flipped bit']} times; all {long['runs compared']} runs ended with the weights, optimizer and best "
        "adapters of the run that nothing disturbed (`benchmarks/results/soak.json`). So did "
        f"{whole['runs compared']} runs in {whole['minutes']:.0f} minutes, disturbed {whole['disturbed']} times at any "
        f"time within a run (seed {whole['seed']}). `benchmarks/fuzz.py` hands over what no well-meaning file holds: "
        f"of {rows['rows']['tried']:,} drawn files of rows (seed {rows['seed']}) and {configs['configs']['tried']:,} "
        f"configurations (seed {configs['seed']}) each was read or refused in one sentence, none with a traceback."
    )


# Memory and time


def memory_table(found):
    rows = [(row["setting"], f"{row['peak_gb']:.2f}", f"{row['weights_gb']:.2f}") for row in found["rows"]]
    return table_of(("setting", "peak GB", "of it weights"), rows, found)


MACS = {8: 5.3, 16: 10.7, 32: 21.3}  # GB of memory: GB that Metal lets a process use
MODELS = {"135m": "135 M", "1b": "1.2 B", "3b": "3.2 B", "8b": "8.0 B"}


def activations(shape):
    """Of a shape, in float32: bytes that a layer keeps of a token, with `grad_checkpoint` too, and bytes besides."""
    small, large = result("macs")["rows"]
    (h1, _, m1, *_), (h2, _, m2, *_) = SHAPES[small["shape"]], SHAPES[large["shape"]]
    hidden, _, mlp, *_ = SHAPES[shape]

    def of_layer(how):
        """As a multiple of the model's width and one of its MLP's, which the two measured shapes tell."""
        y1, y2 = small[how]["layer"], large[how]["layer"]
        width = (y1 * m2 - y2 * m1) / (h1 * m2 - h2 * m1)
        return width * hidden + (y1 - width * h1) / m1 * mlp

    f1, f2 = small["kept"]["fixed"], large["kept"]["fixed"]
    return of_layer("kept"), of_layer("checkpointed"), f1 + (f2 - f1) * (hidden - h1) / (h2 - h1)


def step_gb(shape, tokens, checkpoint, bits):
    """GB that a step of so many tokens takes, the weights in so many bits, activations in 16 where these are fewer."""
    kept, inputs, fixed = activations(shape)
    layers = SHAPES[shape][1]
    # A layer that is computed again is whole while its gradient is taken.
    a_token = inputs * layers + kept - inputs if checkpoint else kept * layers
    model, lora = parameters(shape)
    # 4 bit come with a scale and a bias of 16 bit for 64 weights; adapters with gradient and two moments in float32.
    weights = model * {4: 4.5, 16: 16, 32: 32}[bits] / 8 + 16 * lora
    return (weights + (tokens * a_token + fixed) * (1 if bits == 32 else 0.5)) / 1e9


def macs_table():
    """What a QLoRA step takes, and how many tokens a batch may have."""
    rows = []
    for shape, name in MODELS.items():
        empty = step_gb(shape, 0, False, 4)
        per_token = [1e3 * (step_gb(shape, 1000, checkpoint, 4) - empty) / 1000 for checkpoint in (False, True)]
        fits = [
            " / ".join("-" if room <= 0 else f"{int(room / mb * 1e3 // 100 * 100):,}" for mb in per_token)
            for room in (limit - empty for limit in MACS.values())
        ]
        rows.append((name, f"{empty:.1f}", *(f"{mb:.2f}" for mb in per_token), *fits))
    header = ("parameters", "without a batch, GB", "MB a token", "with `grad_checkpoint`", *(f"{n} GB" for n in MACS))
    whole = result("memory_cpu")["rows"]
    checks = [
        f"{step_gb('135m', whole[number]['tokens'], checkpoint, 32):.2f} GB where {whole[number]['peak_gb']:.2f}"
        for number, checkpoint in ((0, False), (4, True))
    ]
    text = paragraph(
        "A QLoRA step of Llama shapes in 4 bit, and how many tokens a batch may have in "
        + ", ".join(f"{limit} GB of a Mac with {size}" for size, limit in MACS.items())
        + ": without and with `grad_checkpoint`. A pair has its prompt's tokens and both responses'. Computed: from "
        "steps of one and of two layers of two shapes come the bytes that a layer keeps of a token, in float32, and "
        "how they grow with the widths; half of them in 16 bit (`benchmarks/macs.py`, `benchmarks/tables.py`). So "
        "computed, "
        f"the first and the fifth row of BENCHMARKS.md's memory are {' and '.join(checks)} were measured."
    )
    return text + "\n\n" + markdown_table(header, rows)


PROGRAMS = {"ours": "here", "trl": "TRL", "liger": "TRL, Liger"}


def end_to_end_table():
    """Whole runs, a row each, and the commands that made them."""
    rows, made = [], []
    # Those on a GPU first.
    for name, found in sorted(files("end_to_end_*.json").items(), key=lambda item: item[0].startswith("cpu")):
        for program, run in found["runs"].items():
            phases, second_half = run["phases"], [s for s in run["steps"] if s["iteration"] > found["iters"] / 2]
            steps = sum(step["ms"] * step["steps"] for step in second_half) / sum(step["steps"] for step in second_half)
            validations = sorted(run["validation_seconds"])
            cells = (
                f"{phases['load'] + phases['tokenizing']:.0f}",
                f"{phases['reference']:.1f}",
                f"{steps:.0f}",
                f"{run['pairs_per_second']:.3g}",
                f"{validations[0]:.1f} to {validations[-1]:.1f}",
                f"{run['whole_seconds']:.0f}",
                "-" if run["arrays_gb"] is None else f"{run['arrays_gb']:.1f}",
                f"{run['held_gb']:.1f}",
                f"{run['loss']:.3f}",
            )
            rows.append((f"`{name}`", PROGRAMS[program], *cells))
        made.append(f"- `{name}`: {made_by(found)}")
    header = (
        "run", "program", "load and tokenizing, s", "reference, s", "ms a step, second half", "pairs a second",
        "a validation, s", "whole, s", "arrays, GB", "held, GB", "validation loss at the end",
    )  # fmt: skip
    return markdown_table(header, rows) + "\n\n" + "\n".join(made)


# The whole runs that README compares, in its words.
COMPARED = {
    "h200_smollm2": "SmolLM2-135M, 4 pairs a step, H200",
    "h200_smollm2_16": "the same, 16 pairs",
    "h200_1b": "Llama of 1.24 B, 4 pairs, H200",
    "h200_1b_16": "the same, 16 pairs, of an earlier state",
    "cpu": "SmolLM2-135M, 4 pairs, CPU of two cores",
}


def beside_table():
    """Whole runs here as multiples and shares of TRL's, and steps beside those of other programs on MLX."""
    rows, runs = [], files("end_to_end_*.json")
    for name, told in COMPARED.items():
        ours, trl = (runs[name]["runs"][program] for program in ("ours", "trl"))
        shares = [
            ours["held_gb"] / trl["held_gb"],
            ours["phases"]["reference"] / trl["phases"]["reference"],
            ours["whole_seconds"] / trl["whole_seconds"],
        ]
        speed = ours["pairs_per_second"] / trl["pairs_per_second"]
        rows.append((told, f"{speed:.1f}", *(f"{share:.2f}" for share in shares)))
    header = ("run", "times the pairs a second", "of its memory", "reference pass", "whole time")
    return markdown_table(header, rows) + "\n\n" + paragraph(_beside_peers())


def _beside_peers():
    """How many times as long as ours other programs' steps take."""
    found = result("peers_step")["rows"][0]
    medians = {name: statistics.median(run["seconds"]) for name, run in found["runs"].items()}
    told = [f"{name} {medians[name] / medians['here']:.1f}" for name in ("mlx-lm-lora", "mlx-tune", "Unsloth")]
    return (
        f"On a CPU a step of {found['pairs']} pairs, {found['prompt']} tokens of prompt and {found['response']} of "
        f"answer, takes {told[0]}, {told[1]} and {told[2]} times as long, each by its defaults. What each of them "
        "scores, and how right its loss and gradient are, is [measured](BENCHMARKS.md#a-step), too."
    )


def ms(row):
    """Milliseconds of a step: of the processor on a CPU, where other work on the machine matters less to them."""
    return row["cpu_ms"] if row["kind"] == "cpu" else row["ms"]


def trl_step_table(found):
    """A step on one batch, ours and TRL's."""
    ours = {(row["prompt"], row["response"]): row for row in found["rows"] if row["setting"] == "ours"}
    rows = []
    for row in found["rows"]:
        own = ours[row["prompt"], row["response"]]
        cells = f"{row['ms']:.0f}", f"{row['ms'] / own['ms']:.2f}", f"{row['peak_gb']:.1f}"
        share = f"{own['flops'] / (row['ms'] / 1000) / own['rate']:.2f}"
        program = row["setting"].replace("ours", "here")
        rows.append((f"{row['prompt']} / {row['response']}", program, *cells, share))
    header = (
        "prompt / response", "program", "ms a step", "times our time", "peak GB", "of the rate of matrix products",
    )  # fmt: skip
    return table_of(header, rows, found)


def peers_table(found):
    """Steps of our program and of others, and how many times as much these take."""
    rows = []
    for row in found["rows"]:
        own = None
        for name, run in row["runs"].items():
            seconds, cpu = (statistics.median(run[key]) for key in ("seconds", "cpu_seconds"))
            once = run["reference_seconds"] / row["batches"]
            mine = (seconds, cpu, seconds + once, run["peak_gb"], run["resident_gb"])
            own = own or mine
            cells = (spread(run["seconds"], 2), *(f"{x:.2f}" for x in mine[1:]))
            times = (f"{x / y:.2f}" for x, y in zip(mine, own, strict=True))
            rows.append((f"{row['prompt']} / {row['response']}", name, *cells, *times))
    header = (
        "prompt / response", "program", "s a step", "processor s", "with reference, s", "peak GB", "process GB",
        "times our step", "processor", "with reference", "peak", "process",
    )  # fmt: skip
    return table_of(header, rows, found)


def peers_whole_table(found):
    """Whole runs of our program and of others."""
    rows = []
    for row in found["rows"]:
        for name, run in row["runs"].items():
            figures = [statistics.fmean(run[key]) for key in ("seconds", "cpu_seconds")]
            figures += [run[key] for key in ("reference_seconds", "whole_seconds", "whole_cpu_seconds")]
            memory = (f"{run[key]:.2f}" for key in ("peak_gb", "resident_gb"))
            rows.append((name, *(f"{x:.1f}" for x in figures), *memory))
    header = (
        "program", "s a step", "processor s", "reference, s", "whole, s", "whole, processor s", "peak GB", "process GB",
    )  # fmt: skip
    return table_of(header, rows, found)


def peers_first_table(found):
    """The losses of first steps, where policy and reference are identical."""
    rows = [(name, f"{run['losses'][0]:.4f}") for row in found["rows"] for name, run in row["runs"].items()]
    return table_of(("program", "first loss"), rows, found)


def peers_losses_table(found):
    """What each program's loss scores of some rows, its value and its gradient, beside float64's."""
    rows = []
    for row in found["rows"]:
        head = (row["case"], row["program"])
        if "error" in row:
            rows.append((*head, row["error"], "", "", "", "", ""))
            continue
        more = [f"{row['before']} of the prompt"] if row["before"] else []
        more += [f"`{json.dumps(row['after'])[1:-1]}`"] if row["after"] else []
        cosines = ("none" if x is None else f"{x:.6f}" for x in (row["cosine"], row["cosine_defined"]))
        losses = (f"{row[key]:.6f}" for key in ("loss", "same_tokens", "defined"))
        rows.append((*head, ", ".join(more) or "-", str(row["lost"] or "-"), *losses, *cosines))
    header = (
        "rows", "program", "scored besides the response", "of it not scored", "loss", "float64, its tokens",
        "float64, as defined", "gradient's cosine, its tokens", "as defined",
    )  # fmt: skip
    return table_of(header, rows, found)


def pieces_table(found):
    """A step with and without each piece that can be left out."""
    rows = []
    for row in found["rows"]:
        cells = [f"{ms(row[when]):,.0f} ms, {row[when]['peak_gb']:.2f} GB" for when in ("with", "without")]
        rows.append((row["piece"], f"{row['prompt']} / {row['response']}", *cells))
    header = ("piece", "prompt / response", "with", "without")
    return table_of(header, rows, found)


def scaling_table(found):
    """How a step's cost grows with one factor at a time."""
    rows = []
    for row in found["rows"]:
        above = 1e6 * (row["peak_gb"] - row["weights_gb"]) / row["tokens"]
        costs = (
            f"{ms(row):,.0f}",
            f"{1000 * ms(row) / row['tokens']:,.0f}",
            f"{row['peak_gb']:.2f}",
            f"{above:.0f}",
        )
        rows.append((row["factor"], f"{row['value']:,}", f"{row['tokens']:,}", *costs))
    header = ("varied", "value", "tokens", "ms a step", "us a token", "peak GB", "KB a token above weights")
    return table_of(header, rows, found)


def recurrent_table(found):
    """A step of a Qwen3.5 with and without chunks, and what a token costs in every recurrent architecture."""
    rows = []
    for row in (row for mode in ("cpu", "gpu") for row in found.get(mode, [])):
        if "ms" in row:
            kb = row.get("kb_a_token") or 1e6 * (row["peak_gb"] - row["weights_gb"]) / row["tokens"]
            head = (row["recurrence"], f"{row['prompt']} / {row['response']}", row["pairs"], row["device"])
            cells = (f"{row['ms']:.0f}", f"{row['peak_gb']:.2f}", f"{kb:.0f}", f"{row['share']:.3f}")
            rows.append((*head, *cells))
    header = (
        "recurrence", "prompt / response", "pairs", "device", "ms a step", "peak GB", "KB a token above weights",
        "of the rate of matrix products",
    )  # fmt: skip
    made = (
        "`python benchmarks/recurrent.py cpu` (or `gpu`); the first two rows of the H200 by `recurrent.measure_step`, "
        "in turns in one process, three times each with 12 steps after 6: the median of 57.6, 61.6 and 62.3 ms, and of "
        "55.9, 58.0 and 58.9, their shares 0.174 to 0.184 and 0.178 to 0.192 of rates that were measured before each, "
        "0.71e15 to 0.74e15; the peaks are the lowest ones, as others had arrays of a model before with them. Token "
        "by token two runs of 12 steps, on another H200, of the mean of ten rates there. The H200's rows of chunks are "
        "an earlier state's."
    )
    return markdown_table(header, rows) + "\n\n" + made


def shared_table(found):
    """A step of a Qwen3.5 with prompts run once for both responses, and once for each."""
    rows = []
    for row in [*found["shared"], *found["shared_h200"]]:
        times, peaks = row["ms"], row["peak_gb"]
        cells = [f"{x:.0f}" for x in times] + [f"{times[0] / times[1]:.2f}"]
        cells += [f"{x:.2f}" for x in peaks] + [f"{peaks[0] / peaks[1]:.2f}"]
        rows.append((row["shape"], f"{row['prompt']} / {row['response']}", row["pairs"], row["device"], *cells))
    header = (
        "shape", "prompt / response", "pairs", "device", "ms a step, packed", "plain", "ratio", "peak GB, packed",
        "plain", "ratio",
    )  # fmt: skip
    made = (
        "`python benchmarks/recurrent.py shared`; the H200's rows by `harness.measure_step` on its model, at other "
        "times than the table above."
    )
    return markdown_table(header, rows) + "\n\n" + made


def relatives_table(found):
    """KB a token of each recurrent type, upstream's way and here, and on a GPU how long both passes take."""
    on_gpu, rows = {row["type"]: row for row in found["relatives_gpu"]}, []
    for row in found["relatives"]:
        other = on_gpu.get(row["type"], {})
        kept = [row[f"{how}_{length}"] for how in ("upstream", "chunks") for length in (512, 2048)]
        kept += [other.get(f"{how}_2048", {}) for how in ("upstream", "chunks")]
        cells = [
            f"{cell['kb_a_token']:.1f}" if "kb_a_token" in cell else "does not fit" if cell else "-" for cell in kept
        ]
        rows.append((row["type"], *cells, *(f"{cell['s']:.2f}" if "s" in cell else "-" for cell in kept[4:])))
    header = (
        "type", "CPU, mlx-lm's, 512 tokens", "2,048", "here, 512", "2,048", "H200, mlx-lm's, 2,048", "here",
        "H200, s, mlx-lm's", "here",
    )  # fmt: skip
    made = (
        "`python benchmarks/recurrent.py relatives`, and with `--device gpu --jobs 12`; KB a token. Twelve processes "
        "shared the H200, four for Falcon Mamba, Jamba and RWKV-7, two for Mamba."
    )
    return markdown_table(header, rows) + "\n\n" + made


def gradients_table():
    """The lowest and the median cosine of all ways of taking gradients."""
    rows, made = [], []
    for name, found in files("gradients_*.json").items():
        plain, *ways = found["rows"]
        cosines = [cosine for way in ways for cosine in way["cosines"]]
        cells = [f"{value:.6f}" for x in (plain["cosines"], cosines) for value in (min(x), statistics.median(x))]
        rows.append((f"`{name}`", plain["dtype"], len(ways), len(plain["cosines"]), *cells))
        made.append(f"- `{name}`: {made_by(found)}")
    header = (
        "run", "dtype", "ways", "batches", "plain pass, lowest", "median", "all ways, lowest", "median",
    )  # fmt: skip
    return markdown_table(header, rows) + "\n\n" + "\n".join(made)


def gpus_table(found):
    """One run on one GPU and on several: losses of every ten steps, and pairs a second after the first ten."""
    header = ("GPUs", *(f"loss, step {step}" for step in found["steps"]), "pairs a second", "peak GB of each")
    rows = []
    for row in found["rows"]:
        speed = row["pairs_per_second"][1:]
        told = f"{statistics.fmean(speed):.0f} ({min(speed):.0f} to {max(speed):.0f})"
        rows.append((row["gpus"], *(f"{loss:.4f}" for loss in row["losses"]), told, f"{row['peak_gb']:.1f}"))
    return f"{markdown_table(header, rows)}\n\n{settings_cell(found['settings'])}; {made_by(found)}"


def gpu_pieces_table(found):
    """A step on a GPU with and without each piece that is there for its sake."""
    rows = []
    for row in found["rows"]:
        times = (spread(row[when]["ms"]) for when in ("with", "without"))
        memory = (f"{row[when]['gb']:.1f}" for when in ("with", "without"))
        rows.append((row["piece"], f"{row['model']}, {row['pairs']}", *times, *memory, row["counted"]))
    header = ("piece", "model, pairs a step", "ms a step, with", "without", "GB, with", "without", "counted")
    return markdown_table(header, rows)


def malloc_table(found):
    """Milliseconds to lay out a step's graph, and of the step, with the C library's malloc and with others."""
    rows = []
    for row in found["rows"]:
        told = spread(row["laid_out_ms"], 1), spread(row["ms"])
        rows.append((f"`{row['malloc']}`" if row["malloc"] else "C library", *told))
    return table_of(("malloc", "graph laid out, ms", "step, ms"), rows, found)


def rule_table(found):
    """Milliseconds of a layer's recurrence alone, by kernels and in chunks."""
    found = found["rule_h200"]
    rows = [
        (row["how"], f"{row['forward_ms']:.2f}", f"{row['both_ms']:.2f}", row["value_error"], row["gradient_error"])
        for row in found["rows"]
    ]
    header = ("recurrence", "forward, ms", "forward and backward, ms", "error of outputs", "of gradients at most")
    return markdown_table(header, rows) + "\n\n" + found["told"]


def sentiment_table():
    """Score against KL from the reference, for each file: a row a run."""
    parts = []
    for name, records in files("sentiment_*.json").items():
        runs = runs_of(records)
        commands = dict.fromkeys(record.get("command", "python benchmarks/sentiment.py") for record in records)
        parts += [
            f"`{name}`, the score where the frontier first comes to a KL:",
            markdown_table(*scores_table(runs, (2, 5, 10))),
            "\n".join(f"- `{command}`" for command in commands)
            + f"\n\n{records[0].get('machine', records[0].get('device'))}.",
        ]
    return "\n\n".join(parts)


def learning_table():
    """For each file, runs of several seeds against TRL's: what each program says, and what one code says of both."""
    parts = []
    for name, records in files("learning_*.json").items():
        grouped = groups(records)
        commands = dict.fromkeys(record["command"] for record in records if "command" in record)
        parts += [
            f"`{name}`, as each program says:",
            markdown_table(*epoch_table(grouped)),
            f"`{name}`, the adapters after an epoch, measured by one code:",
            markdown_table(*held_out_table(grouped)),
            "\n".join(f"- `{command}`" for command in commands) + f"\n\n{records[0]['machine']}.",
        ]
    return "\n\n".join(parts)


REGIONS = {
    "example": (README, example_text),
    "beside": (README, beside_table),
    "rate": (MANUAL, rate_text),
    "discopop": (MANUAL, discopop_text),
    "soak": (MANUAL, soak_text),
    "macs": (MANUAL, macs_table),
    "results": (BENCHMARKS, of_files("example_losses.json", results_table)),
    "memory": (BENCHMARKS, of_files("memory_*.json", memory_table)),
    "end to end": (BENCHMARKS, end_to_end_table),
    "TRL's step": (BENCHMARKS, of_files("trl_step_*.json", trl_step_table)),
    "peers' step": (BENCHMARKS, of_files("peers_step.json", peers_table)),
    "peers' runs": (BENCHMARKS, of_files("peers_runs.json", peers_whole_table)),
    "peers' bfloat16": (BENCHMARKS, of_files("peers_bfloat16.json", peers_first_table)),
    "peers' losses": (BENCHMARKS, of_files("peers_losses.json", peers_losses_table)),
    "pieces": (BENCHMARKS, of_files("pieces_*.json", pieces_table)),
    "gradients": (BENCHMARKS, gradients_table),
    "scaling": (BENCHMARKS, of_files("scaling_*.json", scaling_table)),
    "gpus": (BENCHMARKS, of_files("gpus_*.json", gpus_table)),
    "gpu pieces": (BENCHMARKS, of_files("gpu_pieces_*.json", gpu_pieces_table)),
    "malloc": (BENCHMARKS, of_files("malloc.json", malloc_table)),
    "recurrent": (BENCHMARKS, of_files("recurrent.json", recurrent_table)),
    "rule": (BENCHMARKS, of_files("recurrent.json", rule_table)),
    "shared": (BENCHMARKS, of_files("recurrent.json", shared_table)),
    "relatives": (BENCHMARKS, of_files("recurrent.json", relatives_table)),
    "learning": (BENCHMARKS, learning_table),
    "sentiment": (BENCHMARKS, sentiment_table),
}


def between(text, name):
    """The text between the markers of a name.

    Raises:
        ValueError: the document has not exactly one such place.
    """
    return _place(text, name)[1]


def replaced(text, name, body):
    """`text` with `body` between the markers of a name."""
    before, _, after = _place(text, name)
    return f"{before}\n{body}\n{after}"


def _place(text, name):
    pattern = re.compile(rf"(.*<!-- {name} -->)\n(.*?)\n?(<!-- /{name} -->.*)", re.S)
    if text.count(f"<!-- {name} -->") != 1 or (found := pattern.fullmatch(text)) is None:
        raise ValueError(f"there is no one place between <!-- {name} --> and <!-- /{name} -->.")
    return found.groups()


def write(regions):
    """Put each region's text into its document."""
    for name, (document, make) in regions.items():
        document.write_text(replaced(document.read_text(), name, make()))


if __name__ == "__main__":
    write(REGIONS)

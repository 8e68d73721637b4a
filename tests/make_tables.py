"""Write what README.md and LORA.md hold of code and of runs, each between two markers that bear its name.

    python -m tests.make_tables                 # losses and options: at once
    python -m tests.make_tables example         # the embedded example before and after its run: a minute
    python -m tests.make_tables rate            # the example with a learning rate that is too high: a minute
    python -m tests.make_tables results         # every loss trained on the example: some ten minutes
    python -m tests.make_tables memory          # a training step's memory under several settings: some ten minutes

The tests compare the first two with the code; the others are measurements, which only this script makes. `example`,
`rate` and `results` are to be made again whenever the example changes.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlx_lm.lora
from mlx_lm.tuner.preference.check import OPTIONS
from mlx_lm.tuner.preference.objective import LETTERS, OPTION, TABLE, names_of
from mlx_lm.tuner.preference.options import GROUPS, UPSTREAM_GROUP, UPSTREAM_OPTIONS

ROOT = Path(__file__).resolve().parent.parent
README, MANUAL = ROOT / "README.md", ROOT / "LORA.md"
EXAMPLE = ROOT / "mlx_lm" / "examples" / "lora_config.yaml"
MODEL = "mlx_lm/examples/tiny_chat_model"
PREFERENCES = ROOT / "mlx_lm" / "examples" / "preferences"
STEPS = 50

# What each loss of the table is trained with. sft is no preference loss alone, and discopop's own tau keeps a policy
# that begins as its reference on the wrong side: LORA.md says why and shows both.
RESULTS = {loss.name: {} for loss in TABLE}
RESULTS["sft"] = {"loss_type": ["dpo", "sft"]}
RESULTS["discopop"] = {"discopop_tau": 0.2}


def options_tables():
    """All keys of the configuration, a table for each group."""
    hub = (
        "`hf_dataset` (an object or a list of them, with `path` and the keys under [Data](#data)) takes the "
        "place of `data`; `chat_template_kwargs` (an object) holds arguments of the chat template for every row."
    )
    tables = {
        title: own_table([option for option in OPTIONS if option.group == group]) for group, title in GROUPS.items()
    }
    tables["Data"] += "\n\n" + hub
    tables[UPSTREAM_GROUP] = run_table()
    return "\n\n".join(f"### {title}\n\n{table}" for title, table in tables.items())


def own_table(options):
    """`options_table` with every meaning in lower case, as in the other tables here."""
    return options_table([replace(option, help=option.help[0].lower() + option.help[1:]) for option in options])


def run_table():
    """mlx-lm's keys with its defaults, and the ranges that a preference run checks."""
    rows = []
    for option in UPSTREAM_OPTIONS:
        default = mlx_lm.lora.CONFIG_DEFAULTS[option.name]
        if isinstance(default, dict):
            default = ", ".join(f"{key} {value}" for key, value in default.items() if value != {}) or "empty"
        elif isinstance(default, bool):
            default = str(default).lower()
        cell = "not set" if default is None else f"`{default}`"
        rows.append((f"`{option.name}`", cell, option.range, option.help))
    return markdown_table(("option", "default", "allowed", "meaning"), rows)


def results_table():
    """Every loss trained on the embedded example: the validation set's figures before and after."""
    rows = []
    for name, settings in RESULTS.items():
        first, last = train_example({"loss_type": name} | settings)
        told = [f"`{key}: {value}`".replace("'", "") for key, value in settings.items()]
        cells = [f"{line[f'eval_{key}']:.3f}" for key in ("loss", "rewards/accuracies") for line in (first, last)]
        rows.append((f"`{name}`", ", ".join(told), *cells))
        print("|", " | ".join(rows[-1]), "|", flush=True)
    header = ("loss", "besides", "loss at 0", f"loss at {STEPS}", "accuracy at 0", f"accuracy at {STEPS}")
    return markdown_table(header, rows)


def train_example(settings):
    """The first and the last validation report of a short run on the embedded example, each loss with its own beta."""
    with open(EXAMPLE) as file:
        config = mlx_lm.lora.yaml.load(file, mlx_lm.lora.yaml_loader)
    config = {key: value for key, value in config.items() if key not in ("beta", "label_smoothing")} | settings
    with tempfile.TemporaryDirectory() as folder:
        config |= {"iters": STEPS, "steps_per_eval": STEPS, "save_every": 10 * STEPS, "val_batches": -1, "test": False}
        config |= {"adapter_path": folder}
        mlx_lm.lora.run(SimpleNamespace(**{**mlx_lm.lora.CONFIG_DEFAULTS, **config}))
        return validations(folder)


def validations(folder):
    """The first and the last validation report of the run that left its files in `folder`."""
    reports = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    reports = [report for report in reports if "eval_loss" in report]
    return reports[0], reports[-1]


def example_text():
    """The embedded example's run: what the model says to test prompts before and after, and the figures."""
    rows = read_rows("test")
    with tempfile.TemporaryDirectory() as folder:
        run_example(folder)
        first, last = validations(folder)
        before, after = answers(rows), answers(rows, folder)
    kind, unkind = manner("chosen", "rejected"), manner("rejected", "chosen")
    grumpy = [[not unkind.isdisjoint(sentences(text)) for text in said] for said in (before, after)]
    right = [sum(is_right(row, text, kind) for row, text in zip(rows, said, strict=True)) for said in (before, after)]
    prompts = [row["prompt"] for row in rows]
    shown = [row[:3] for row in zip(prompts, before, after, grumpy[0], strict=True) if row[3]]
    command = f".venv/bin/python -m mlx_lm generate --model {MODEL} --temp 0 --max-tokens 40"
    prompt = f'--prompt "{shown[0][0]}"'
    accuracies = "{:.3f} before and {:.3f} after".format(*(line["eval_rewards/accuracies"] for line in (first, last)))
    parts = (
        "The tiny model has learned kind and grumpy answers to small questions; the preferences prefer the kind ones. "
        "What it says to prompts of the test split, before the first line above and after it:",
        markdown_table(("prompt", "before", "after"), shown[:4]),
        f"These are the first four test prompts to which the model is grumpy before. Of all {len(rows)}, "
        f"{sum(grumpy[0])} answers are grumpy before and {sum(grumpy[1])} after; {right[0]} are right before and "
        f"{right[1]} after. Reward accuracy on the validation pairs is {accuracies}. The first row comes from",
        f"```shell\n{command} {prompt}\n{command} --adapter-path adapters {prompt}\n```",
    )
    return "\n\n".join(part if part[0] in "|`" else paragraph(part) for part in parts)


def rate_text():
    """The embedded example's run with a learning rate that is too high."""
    (row, *_) = rows = read_rows("test")
    with tempfile.TemporaryDirectory() as folder:
        run_example(folder, "--learning-rate", "1e-3")
        first, last = validations(folder)
        said = answers(rows[:1], folder)[0]
    chosen, rejected = (last[f"eval_rewards/{name}"] for name in ("chosen", "rejected"))
    return paragraph(
        f"On the embedded example with `--learning-rate 1e-3` the validation's rewards go from 0 to {chosen:+.1f} and "
        f"{rejected:+.1f}, its loss from {first['eval_loss']:.2f} to {last['eval_loss']:.2f}, and the model answers "
        f'"{row["prompt"]}" with "{said}"'
    )


def paragraph(text):
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def run_example(folder, *flags):
    """Run the command of README's first line, with its adapters in `folder`."""
    command = [sys.executable, "-m", "mlx_lm.lora", "--config", str(EXAMPLE), "--adapter-path", str(folder), *flags]
    subprocess.run(command, cwd=ROOT, check=True)


def read_rows(split):
    return [json.loads(line) for line in (PREFERENCES / f"{split}.jsonl").read_text().splitlines()]


def answers(rows, adapter_path=None):
    """What the example's model says to the rows' prompts, the likeliest token each time."""
    model, tokenizer = mlx_lm.load(MODEL, adapter_path=adapter_path)
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": row["prompt"]}], add_generation_prompt=True)
        for row in rows
    ]
    return [mlx_lm.generate(model, tokenizer, prompt, max_tokens=40) for prompt in prompts]


def manner(side, other):
    """The sentences that many of the example's responses of one side have and none of the other."""
    rows = read_rows("train")
    here, there = (Counter(part for row in rows for part in sentences(row[name])) for name in (side, other))
    return {part for part, count in here.items() if count >= 5 and part not in there}


def is_right(row, text, kind):
    """Whether an answer has what the chosen response tells: the last word of its fact that is not in the prompt."""
    fact = next((part for part in sentences(row["chosen"]) if part not in kind), row["chosen"])
    told = [word for word in words(fact) if word not in words(row["prompt"])] or words(fact)
    return told[-1] in words(text)


def sentences(text):
    return re.split(r"(?<=[.!?]) +", text.strip())


def words(text):
    return re.findall(r"[\w']+", text.lower())


MEMORY = (
    ("4 pairs, 192 + 64 tokens, defaults", {}),
    ("`batch_size: 1` (`grad_accumulation_steps: 4` for the same update)", {"pairs": 1}),
    ("`max_seq_length: 128` (96 + 32)", {"prompt": 96, "response": 32}),
    ("`share_prompt: false`", {"share_prompt": False}),
    ("`grad_checkpoint: true`", {"checkpoint": True}),
    ("`num_layers: 8`", {"layers": 8}),
    ("4-bit weights", {"bits": 4}),
    ("4-bit weights, `grad_checkpoint: true`, `batch_size: 1`", {"bits": 4, "checkpoint": True, "pairs": 1}),
)


def memory_table():
    """The peak memory and the weights' share of a step of a 135 M Llama shape under several settings."""
    rows = []
    for name, options in MEMORY:
        peak, weights = peak_of_step(**options)
        rows.append((name, f"{peak:.2f}", f"{weights:.2f}"))
        print("|", " | ".join(rows[-1]), "|", flush=True)
    return markdown_table(("setting", "peak GB", "of it weights"), rows)


def peak_of_step(pairs=4, prompt=192, response=64, layers=30, bits=None, share_prompt=True, checkpoint=False):
    """GB that a training step's arrays held at most, and GB of weights."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.tuner.utils import linear_to_lora_layers

    from mlx_lm.models import llama

    sys.path.insert(0, str(ROOT / "benchmarks"))
    from harness import llama_config, make_pairs, measure_step

    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(llama_config("135m")))
    if bits is not None:
        nn.quantize(model, bits=bits)
    model.freeze()
    linear_to_lora_layers(model, layers, {"rank": 8, "scale": 20.0, "dropout": 0.0})
    mx.eval(model.parameters())
    batch = make_pairs(pairs, prompt, response, model.args.vocab_size)
    found = measure_step(model, batch, steps=1, warmup=0, share_prompt=share_prompt, checkpoint=checkpoint)
    return found["peak_gb"], found["weights_gb"]


def describe_losses():
    """The losses as Markdown: what the letters of the formulas mean, then a table with one row a loss."""
    words = LETTERS.replace("label_smoothing", "`label_smoothing`")
    rows = [
        (
            ", ".join(f"`{name}`" for name in names_of(loss)),
            loss.description,
            ", ".join(f"`{name}` ({_parameter_range(loss, name)})" for name in loss.parameters),
            "yes" if loss.needs_reference else "no",
            f"[{loss.source}](https://arxiv.org/abs/{loss.source})",
        )
        for loss in TABLE
    ]
    return words + "\n\n" + markdown_table(("loss_type", "a pair's loss", "reads", "reference", "source"), rows)


def options_table(options):
    """A Markdown table of `options`: name, default, allowed values, meaning."""
    rows = [
        (
            f"`{option.name}`",
            "not set" if option.default is None else f"`{str(option.default).lower()}`",
            option.range + (", or a list" if option.many else ""),
            option.help,
        )
        for option in options
    ]
    return markdown_table(("option", "default", "allowed", "meaning"), rows)


def markdown_table(header, rows):
    """A Markdown table of the strings of `header` and `rows`."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _parameter_range(loss, name):
    option = OPTION[name]
    if name in loss.lowest:
        option = replace(option, low=loss.lowest[name])
    return f"{loss.default(name):g}, {option.range}"


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


FROM_CODE = {"losses": (MANUAL, describe_losses), "options": (MANUAL, options_tables)}
FROM_RUNS = {
    "example": (README, example_text),
    "rate": (MANUAL, rate_text),
    "results": (MANUAL, results_table),
    "memory": (MANUAL, memory_table),
}


def main(names):
    makers = {**FROM_CODE, **FROM_RUNS}
    for name in names or FROM_CODE:
        if name not in makers:
            sys.exit(f"{name} is no table of this script; there are {', '.join(makers)}.")
        document, make = makers[name]
        body = make()
        # Read just before it is written: a run takes minutes, and the document may have changed.
        document.write_text(replaced(document.read_text(), name, body))


if __name__ == "__main__":
    os.chdir(ROOT)
    main(sys.argv[1:])

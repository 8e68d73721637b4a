"""What runs of the embedded example give, into results/example_MODE.json; a minute or two, losses some five.

    python benchmarks/example.py answers      # what the model says before and after README's first line
    python benchmarks/example.py losses       # every loss trained alike; with names behind it, these alone anew
    python benchmarks/example.py rate         # a learning rate that is too high
    python benchmarks/example.py discopop     # the paper's tau and a larger one

All runs have the settings of mlx_lm/examples/lora_config.yaml but for what a row names. `tables.py` puts the results
into the documents.
"""

import json
import re
import sys
import tempfile
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import say  # noqa: E402
from programs import command_line, machine  # noqa: E402
from records import RESULTS, keep  # noqa: E402

import mlx_lm.lora  # noqa: E402
from mlx_lm.tuner.preference.loss_table import TABLE  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "mlx_lm" / "examples" / "lora_config.yaml"
MODEL = "mlx_lm/examples/tiny_chat_model"
PREFERENCES = ROOT / "mlx_lm" / "examples" / "preferences"

STEPS = 50
# What each loss of the table is trained with besides its name, each with its own beta. sft is no preference loss alone,
# and discopop's own tau keeps a policy that begins as its reference on the wrong side.
LOSSES = {loss.name: {"beta": loss.default("beta")} if "beta" in loss.parameters else {} for loss in TABLE}
LOSSES["sft"] = {"loss_type": ["dpo", "sft"], "beta": 0.1}
LOSSES["discopop"] |= {"discopop_tau": 0.2}
# Runs of the other modes.
RATE = {"learning_rate": 1e-3, "iters": 20, "test": False}
TAUS, TAU_STEPS = (0.05, 0.2), (50, 200)


def train(settings, folder):
    """Run the command on the example with some other settings; the validations' reports."""
    with open(EXAMPLE) as file:
        config = mlx_lm.lora.yaml.load(file, mlx_lm.lora.yaml_loader)
    if "loss_type" in settings:
        del config["label_smoothing"]  # some losses have a default of their own
    config |= {"adapter_path": f"{folder}/adapters", "reference_cache": "none", "val_batches": -1} | settings
    config |= {"model": str(ROOT / config["model"]), "data": str(ROOT / config["data"])}
    with redirect_stdout(sys.stderr):
        mlx_lm.lora.run(SimpleNamespace(**mlx_lm.lora.CONFIG_DEFAULTS | config))
    reports = [json.loads(line) for line in (Path(folder) / "adapters" / "metrics.jsonl").read_text().splitlines()]
    return [report for report in reports if "eval_loss" in report]


def short_run(settings, steps=STEPS):
    """The first and the last validation's figures of a short run."""
    with tempfile.TemporaryDirectory() as folder:
        # Nothing is saved on the way, so that a run is short.
        lasting = {"iters": steps, "steps_per_eval": steps, "save_every": steps, "test": False}
        first, last = (figures(report) for report in train(settings | lasting, folder))
    return {"before": first, "after": last}


def figures(report):
    names = {
        "loss": "loss",
        "accuracy": "rewards/accuracies",
        "chosen": "rewards/chosen",
        "rejected": "rewards/rejected",
    }
    return {name: report[f"eval_{key}"] for name, key in names.items()}


def losses(names=None):
    """A row for each loss."""
    for name in names or LOSSES:
        yield {"loss": name, "settings": LOSSES[name], "steps": STEPS} | short_run({"loss_type": name} | LOSSES[name])


def discopop():
    for tau in TAUS:
        for steps in TAU_STEPS:
            settings = {"loss_type": "discopop", "beta": 0.1, "discopop_tau": tau}
            yield {"tau": tau, "steps": steps} | short_run(settings, steps)


def rate():
    """The example's run with a rate that is too high, and what the model says after it."""
    prompt = read_rows("test")[0]["prompt"]
    with tempfile.TemporaryDirectory() as folder:
        first, *_, last = train(RATE, folder)
        said = answers([prompt], f"{folder}/adapters")[0]
    yield {"settings": RATE, "before": figures(first), "after": figures(last), "prompt": prompt, "answer": said}


def before_and_after():
    """What the model says to the test prompts, and how many answers are of the kind that the preferences reject."""
    rows = read_rows("test")
    prompts = [row["prompt"] for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        first, *_, last = train({}, folder)
        said = {"before": answers(prompts), "after": answers(prompts, f"{folder}/adapters")}
    kind, unkind = manner("chosen", "rejected"), manner("rejected", "chosen")
    grumpy = {when: [not unkind.isdisjoint(sentences(text)) for text in texts] for when, texts in said.items()}
    shown = [
        {"prompt": prompt, "before": before, "after": after}
        for prompt, before, after, bad in zip(prompts, said["before"], said["after"], grumpy["before"], strict=True)
        if bad
    ]
    yield {
        "shown": shown[:4],
        "answers": len(rows),
        "grumpy": {when: sum(found) for when, found in grumpy.items()},
        "right": {
            when: sum(is_right(row, text, kind) for row, text in zip(rows, texts, strict=True))
            for when, texts in said.items()
        },
        "before": figures(first),
        "after": figures(last),
    }


def read_rows(split):
    return [json.loads(line) for line in (PREFERENCES / f"{split}.jsonl").read_text().splitlines()]


def answers(prompts, adapter_path=None):
    """What the example's model says, the likeliest token each time."""
    model, tokenizer = mlx_lm.load(str(ROOT / MODEL), adapter_path=adapter_path)
    tokens = [
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
        for prompt in prompts
    ]
    return [mlx_lm.generate(model, tokenizer, prompt, max_tokens=40) for prompt in tokens]


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


MODES = {"answers": before_and_after, "losses": losses, "rate": rate, "discopop": discopop}


def main():
    mode, names = sys.argv[1] if len(sys.argv) > 1 else "", sys.argv[2:]
    if mode not in MODES or (names and mode != "losses") or set(names) - set(LOSSES):
        sys.exit(f"Name one of {', '.join(MODES)}; after losses, some of them.")
    path, rows = RESULTS / f"example_{mode}.json", []
    for row in losses(names) if names else MODES[mode]():
        say(json.dumps(row))
        rows.append(row)
    if not names:
        keep(path, rows)
        return
    # The others are of another machine and command, which stay at the file's head.
    found = json.loads(path.read_text())
    rows = [row | {"machine": machine(), "command": command_line()} for row in rows]
    kept = {row["loss"]: row for row in [*found["rows"], *rows]}
    found["rows"] = [kept[name] for name in LOSSES if name in kept]
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

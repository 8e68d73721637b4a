"""A model card beside the adapters: `README.md` with the Hub's metadata, so that uploading the folder shares them."""

import re
import shlex
from pathlib import Path

from .files import replace_file
from .page import summary

CARD_FILE = "README.md"
MARK = "<!-- Written by the training, which writes it anew; take this line out to keep what you write. -->"
SETTINGS = ("beta", "learning_rate", "lr_schedule", "batch_size", "iters", "grad_accumulation_steps")
SETTINGS += ("num_layers", "lora_parameters", "optimizer", "seed")
FIGURES = ("loss", "rewards/accuracies", "rewards/margins", "kl")


def has_card(folder):
    """Whether a folder's README.md is one that a training has written."""
    path = Path(folder) / CARD_FILE
    return path.is_file() and not path.is_symlink() and MARK in path.read_text(errors="replace")


def write_card(folder, config, loss, validations):
    """Write the card, unless there is a README.md that the training has not written; returns whether it was."""
    # Imported where it is needed: it takes a while.
    from huggingface_hub import ModelCardData

    path = folder / CARD_FILE
    if (path.exists() or path.is_symlink()) and not has_card(folder):
        return False
    kind = config.get("fine_tune_type", "lora")
    datasets = [name for name in _data_sets(config) if _on_hub(name)]
    data = ModelCardData(
        library_name="mlx",
        pipeline_tag="text-generation",
        base_model=config["model"] if _on_hub(config["model"]) else None,
        base_model_relation=("finetune" if kind == "full" else "adapter") if _on_hub(config["model"]) else None,
        datasets=datasets or None,
        tags=["mlx", "mlx-lm", "preference-optimization", *dict.fromkeys((*loss.names, kind))],
    )
    text = "\n".join(["---", data.to_yaml(), "---", MARK, "", *_body(folder, config, loss, validations, kind), ""])
    replace_file(path, lambda file: file.write(text.encode(errors="replace")))
    return True


def _body(folder, config, loss, validations, kind):
    model = shared_name(config["model"])
    names = " + ".join(loss.names)
    yield f"# {folder.resolve().name}\n"
    what = "Weights" if kind == "full" else f"{ {'lora': 'LoRA', 'dora': 'DoRA'}.get(kind, kind) } adapters"
    data = " and ".join(f"`{name}`" for name in _data_sets(config))
    yield f"{what} for `{model}`, trained on the preferences of {data} with the loss {names}, by mlx-lm with DPO.\n"
    yield f'```shell\nmlx_lm.generate --model {shlex.quote(model)} --adapter-path . --prompt "Hello"\n```\n'
    yield f"| setting | value |\n| --- | --- |\n| loss | {names} |"
    parameters = {name: value for name, value in config.items() if name in SETTINGS} | loss.parameters
    yield from (f"| {name} | {value} |" for name, value in parameters.items() if value is not None)
    if table := summary(validations, FIGURES, config.get("save_best")):
        yield f"\nFigures of {validations[-1]['eval_pairs']} held-out pairs:\n"
        table.insert(1, ["---"] * 4)
        yield from (f"| {' | '.join(row)} |" for row in table)


def _data_sets(config):
    """The names of the data sets: the Hub's, or the last part of a path, which says nothing of a machine."""
    entries = config.get("hf_dataset") or config.get("data")
    entries = entries if isinstance(entries, list) else [entries]
    return [shared_name(entry["path"] if isinstance(entry, dict) else str(entry)) for entry in entries]


def shared_name(name):
    """A Hub name as it is, of a path the last part."""
    return name if _on_hub(name) else Path(name).resolve().name


def _on_hub(name):
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()

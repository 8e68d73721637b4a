"""Write what the documents hold of code and of benchmarks/results, each between two markers that bear its name.

    python -m tests.make_tables

The tests compare the documents with it. `python benchmarks/tables.py` writes those of the results alone.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import mlx_lm.lora
from mlx_lm.tuner.preference.counterparts import MLX_LM_LORA, TRL
from mlx_lm.tuner.preference.objective import ALIASES, OPTION, TABLE
from mlx_lm.tuner.preference.objective import OPTIONS as LOSS_OPTIONS
from mlx_lm.tuner.preference.options import (
    DATA_OPTIONS,
    REFERENCE_OPTIONS,
    SAVE_OPTIONS,
    STEP_OPTIONS,
    UPSTREAM_OPTIONS,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from tables import MANUAL, REGIONS, markdown_table, write  # noqa: E402

THEIR_CONFIGS = json.loads((ROOT / "tests" / "golden" / "trl_config.json").read_text())


def options_tables():
    """All keys of the configuration, a table for each group."""
    hub = (
        "`hf_dataset` (an object or a list of them, with `path` and the keys under [Data](#data)) takes the "
        "place of `data`; `chat_template_kwargs` (an object) holds arguments of the chat template for every row."
    )
    groups = (
        ("Loss", own_table(LOSS_OPTIONS)),
        ("Data", own_table(DATA_OPTIONS) + "\n\n" + hub),
        ("Reference", own_table(REFERENCE_OPTIONS)),
        ("Step", own_table(STEP_OPTIONS)),
        ("Saving", own_table(SAVE_OPTIONS)),
        ("Run (mlx-lm's own keys)", run_table()),
    )
    return "\n\n".join(f"### {title}\n\n{table}" for title, table in groups)


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


def describe_losses():
    """The losses as Markdown: what the letters of the formulas mean, then a table with one row a loss."""
    words = (
        "Here rc and rr are beta x chosen and beta x rejected logratio, h = rc - rr - margin, a gap is chosen minus "
        "rejected, a mean is over a response's tokens, and eps is `label_smoothing`."
    )
    rows = [
        (
            f"`{loss.name}`" + "".join(f", `{alias}`" for alias, name in ALIASES.items() if name == loss.name),
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


def trl_table():
    """TRL's keys: of DPOConfig, and of the classes that `trl dpo` reads besides."""
    theirs = THEIR_CONFIGS["ModelConfig"] | THEIR_CONFIGS["ScriptArguments"] | THEIR_CONFIGS["DPOConfig"]
    return counterparts_table("TRL", TRL, theirs)


def mlx_lm_lora_table():
    return counterparts_table("mlx-lm-lora", MLX_LM_LORA, THEIR_CONFIGS["mlx_lm_lora"])


def counterparts_table(program, table, theirs):
    """A table of another program's keys, with the defaults where they differ; `theirs` are that program's."""
    ours = {**mlx_lm.lora.CONFIG_DEFAULTS, **{option.name: option.default for option in LOSS_OPTIONS}}
    rows = []
    for row in table:
        (name, here), *_ = row.pairs()
        there = " ".join(f"`{name}`" for name in row.names.split())
        counterpart = "the same" if row.here == row.names else " ".join(f"`{name}`" for name in row.here.split())
        rows.append((there, counterpart, two_defaults(theirs.get(name), ours.get(here)), row.differs))
    return markdown_table((program, "here", "by default there, here", "what differs"), rows)


def two_defaults(theirs, ours):
    """Two programs' defaults, where both are one value and they differ."""
    alike = theirs == ours or isinstance(theirs, bool) != isinstance(ours, bool) and ours is not None
    if theirs in (None, "none", False) or isinstance(theirs, (list, dict)) or alike:
        return ""
    return ", ".join(
        "not set" if value is None else f"`{json.dumps(value)}`".replace('"', "") for value in (theirs, ours)
    )


def _parameter_range(loss, name):
    option = OPTION[name]
    if name in loss.lowest:
        option = replace(option, low=loss.lowest[name])
    return f"{loss.default(name):g}, {option.range}"


FROM_CODE = {
    "losses": (MANUAL, describe_losses),
    "options": (MANUAL, options_tables),
    "trl": (MANUAL, trl_table),
    "mlx-lm-lora": (MANUAL, mlx_lm_lora_table),
}

if __name__ == "__main__":
    write(FROM_CODE | REGIONS)

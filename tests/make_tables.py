"""Write what the documents hold of code and of benchmarks/results, each between two markers that bear its name.

    python -m tests.make_tables

The tests compare the documents with it. `python benchmarks/tables.py` writes those of the results alone.
"""

import ast
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import mlx_lm.lora
from mlx_lm.tuner.preference.check import OPTIONS
from mlx_lm.tuner.preference.counterparts import MLX_LM_LORA, TRL
from mlx_lm.tuner.preference.loss_table import LETTERS, OPTION, TABLE, names_of
from mlx_lm.tuner.preference.options import GROUPS, UPSTREAM_GROUP, UPSTREAM_OPTIONS

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

from architectures import ARCHITECTURES, SKIPPED, UNPACKED, UNTRAINABLE  # noqa: E402
from layouts import LAYOUTS  # noqa: E402
from tables import BENCHMARKS, MANUAL, REGIONS, markdown_table, paragraph, write  # noqa: E402

CONTRIBUTING = ROOT / "CONTRIBUTING.md"
RECIPES = sorted(path for path in (ROOT / "mlx_lm" / "examples").glob("*.yaml") if path.name != "lora_config.yaml")
THEIR_CONFIGS = json.loads((ROOT / "tests" / "golden" / "trl_config.json").read_text())


def options_tables():
    """All keys of the configuration, a table for each group."""
    hub = (
        "`hf_dataset` (an object or a list of them, with `path` and the keys under [Data](#data)) takes the "
        "place of `data`; `chat_template_kwargs` (an object) holds arguments of the chat template for every row."
    )
    tables = {
        title: options_table([option for option in OPTIONS if option.group == group]) for group, title in GROUPS.items()
    }
    tables["Data"] += "\n\n" + hub
    tables[UPSTREAM_GROUP] = run_table()
    return "\n\n".join(f"### {title}\n\n{table}" for title, table in tables.items())


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
            option.range + (", or a list" if option.many and not option.allowed else ""),
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
    ours = {**mlx_lm.lora.CONFIG_DEFAULTS, **{option.name: option.default for option in OPTIONS}}
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


def recipes_table():
    """The recipes by the first sentence of their files."""
    rows = []
    for path in RECIPES:
        words = " ".join(
            line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#")
        )
        rows.append((f"`{path.name}`", re.split(r"(?<=\.) ", words)[0].rstrip(".")))
    return markdown_table(("file", "what it is"), rows)


def layouts_table():
    """The layouts of public data sets, each with a row."""
    return markdown_table(("layout", "a row"), [(name, f"`{json.dumps(row)}`") for name, row in LAYOUTS.items()])


def overlays_table():
    """The overlay's modules by what their first lines say that they add."""
    rows = []
    for path in sorted(ROOT.glob("mlx_lm/*.py")) + sorted(ROOT.glob("mlx_lm/*/*.py")):
        if found := re.match(r"Adds to mlx_lm\.[\w.]+: (.*?)(?:\.\n|\n\n|\.?$)", docstring(path), re.S):
            rows.append((f"`{path.relative_to(ROOT)}`", " ".join(found[1].split())))
    return markdown_table(("file", "adds to mlx-lm's of its name"), rows)


def modules_table():
    """The modules of preference training in the order of the data, by their first sentences."""
    folder = ROOT / "mlx_lm" / "tuner" / "preference"
    paths = sorted(folder.glob("*.py"), key=lambda path: (_place(path.stem), path.stem))
    return markdown_table(("file", "what it has"), [(f"`{path.name}`", first_sentence(path)) for path in paths])


ORDER = """__init__ options check rows layouts messages overlap sources pairs chat template thinking tokens batches
logps attention cpu_attention layers recurrent chunk_products pieces routing loss_table objective reference
reference_cache flat figures step run workers dry_run evaluation scores divergence report screen metrics outcome
commands answers curves page card health checkpoint load"""


def _place(name):
    order = ORDER.split()
    return order.index(name) if name in order else len(order)


def docstring(path):
    return ast.get_docstring(ast.parse(path.read_text())) or ""


def first_sentence(path):
    return " ".join(re.split(r"(?<=\.)\s", docstring(path))[0].split()).rstrip(".")


def architectures_table():
    """What each model type of the installed mlx-lm does; `test_architectures.py` shows that it does."""
    others = {name: f"not tried: {reason}" for name, reason in SKIPPED.items()}
    others |= {name: f"plain: {reason}" for name, reason in UNPACKED.items()}
    others |= {name: f"cannot be trained: {reason}" for name, reason in UNTRAINABLE.items()}
    packed = sorted((name for name in ARCHITECTURES if name not in others), key=str.lower)
    text = (
        f"mlx-lm {mlx_lm.__version__}: {len(ARCHITECTURES) - len(UNTRAINABLE)} model types train, each with LoRA on "
        f"every layer, and {len(packed)} of them pack. For all of them the output head runs on response positions "
        "only, and logps are within 1e-4 nats and gradients within 1e-4 (relative) of the plain pass, with and without "
        f"`grad_checkpoint`. Packed: {', '.join(packed)}."
    )
    rows = sorted(others.items(), key=lambda item: item[0].lower())
    return paragraph(text) + "\n\n" + markdown_table(("model type", "batches"), rows)


FROM_CODE = {
    "losses": (MANUAL, describe_losses),
    "options": (MANUAL, options_tables),
    "trl": (MANUAL, trl_table),
    "mlx-lm-lora": (MANUAL, mlx_lm_lora_table),
    "recipes": (MANUAL, recipes_table),
    "layouts": (MANUAL, layouts_table),
    "overlays": (CONTRIBUTING, overlays_table),
    "modules": (CONTRIBUTING, modules_table),
    "architectures": (BENCHMARKS, architectures_table),
}

if __name__ == "__main__":
    write(FROM_CODE | REGIONS)

"""Write BENCHMARKS.md's table of model types between its two markers, or print it where there are none.

Run in the repository's root: `python tests/make_architecture_table.py`
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import mlx.core as mx
from architectures import ARCHITECTURES, SKIPPED, UNPACKED, UNTRAINABLE, make_model

import mlx_lm
from mlx_lm.tuner.preference.batches import PLAIN
from mlx_lm.tuner.preference.logps import Scorer

BEGIN, END = "<!-- architectures -->", "<!-- /architectures -->"
HEADER = "| model type | batches |\n|---|---|\n"


def table_row(name, scorer):
    """The table's line on a model type, with what its scorer found."""
    how = f"plain: {UNPACKED[name]}" if scorer.arrangement == PLAIN else "packed"
    return f"| {name} | {how} |\n"


def make_table():
    rows = {name: f"| {name} | not tried: {reason} |\n" for name, reason in SKIPPED.items()}
    for name in ARCHITECTURES:
        if name in UNTRAINABLE:
            rows[name] = f"| {name} | cannot be trained: {UNTRAINABLE[name]} |\n"
        else:
            rows[name] = table_row(name, Scorer(make_model(name)))
    trained = len(ARCHITECTURES) - len(UNTRAINABLE)
    packed = sum(" | packed |" in row for row in rows.values())
    text = (
        f"mlx-lm {mlx_lm.__version__}: {trained} model types train, each with LoRA on every layer, and {packed} of "
        "them pack.\nFor all of them the output head runs on response positions only, and logps are within 1e-4 nats "
        "and gradients within\n1e-4 (relative) of the plain pass, with and without `grad_checkpoint`.\n\n"
    )
    return text + HEADER + "".join(rows[name] for name in sorted(rows, key=str.lower))


def main():
    mx.disable_compile()
    table = make_table()
    document = Path(__file__).parents[1] / "BENCHMARKS.md"
    text = document.read_text() if document.exists() else ""
    if BEGIN not in text or END not in text:
        print(table, end="")
        return
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    document.write_text(f"{before}{BEGIN}\n{table}{after}")


if __name__ == "__main__":
    main()

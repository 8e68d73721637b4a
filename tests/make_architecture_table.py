"""Write LORA.md's table of model types between its two markers, or print it where LORA.md has none.

Run in the repository's root: `python tests/make_architecture_table.py`
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import mlx.core as mx
from architectures import ARCHITECTURES, SKIPPED, UNSHARED, UNTRAINABLE, make_model

import mlx_lm
from mlx_lm.tuner.preference.batches import CACHED, PACKED, PLAIN
from mlx_lm.tuner.preference.logps import Scorer

BEGIN, END = "<!-- architectures -->", "<!-- /architectures -->"
HEADER = "| model type | output head, run on response positions only | shared prompt |\n|---|---|---|\n"


def table_row(name, scorer):
    """The table's line on a model type, with what its scorer found."""
    head = scorer.head
    where = "none: logits at every position"
    if head is not None:
        path = next(path for path, module in scorer.model.named_modules() if module is head.module)
        where = f"`{path}`" + (", tied" if head.method == "as_linear" else "")
    shared = {
        PACKED: "in one packed row",
        CACHED: "through its cache",
        PLAIN: f"no: {UNSHARED.get(name, 'its cache is of a kind of its own')}",
    }[scorer.arrangement]
    return f"| {name} | {where} | {shared} |\n"


def make_table():
    rows = {name: f"| {name} | not tried: {reason} | |\n" for name, reason in SKIPPED.items()}
    for name in ARCHITECTURES:
        if name in UNTRAINABLE:
            rows[name] = f"| {name} | cannot be trained: {UNTRAINABLE[name]} | |\n"
        else:
            rows[name] = table_row(name, Scorer(make_model(name)))
    trained = len(ARCHITECTURES) - len(UNTRAINABLE)
    text = (
        f"mlx-lm {mlx_lm.__version__}: {trained} model types train, each with LoRA on every layer; logps are within "
        "1e-4 nats\nand gradients within 1e-4 (relative) of the plain pass, with and without `grad_checkpoint`. Heads "
        "are those of\nthe small configurations that were tried; `llama4_text`, `minicpm` and `seed_oss` have a head "
        "to run apart only where\nthey are not tied.\n\n"
    )
    return text + HEADER + "".join(rows[name] for name in sorted(rows, key=str.lower))


def main():
    mx.disable_compile()
    table = make_table()
    document = Path(__file__).parents[1] / "LORA.md"
    text = document.read_text() if document.exists() else ""
    if BEGIN not in text or END not in text:
        print(table, end="")
        return
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    document.write_text(f"{before}{BEGIN}\n{table}{after}")


if __name__ == "__main__":
    main()

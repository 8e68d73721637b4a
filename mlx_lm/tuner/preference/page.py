"""A page of a run: `report.html`, one file that needs no server and no network.

The page is made by Jinja2, which escapes whatever stands in rows and settings.
"""

import base64
import json
from functools import cache
from pathlib import Path

import jinja2

from .answers import responses_of, texts_of, when
from .figures import WORDS, rounded
from .files import PAGE_FILE, replace_file
from .metrics import best_of
from .options import shortened
from .pairs import places_of
from .scores import figures_of

TEMPLATE = "report.html"
# Pairs on a page, and letters of a text: a browser sorts so many at once.
MOST_PAIRS, MOST_LETTERS = 5000, 4000


def table_rows(dataset, rows, tokenizer):
    """What a page says of the first MOST_PAIRS rows, whatever the policy, as dicts.

    Place, texts, and whether another pair says the same or the reverse.
    """
    where, seen, found = places_of(dataset), {}, []
    for row in rows[:MOST_PAIRS]:
        pair, place = dataset[row], where(row)
        prompt, chosen, rejected = map(tuple, (pair.prompt, *responses_of(pair)))
        note = ""
        if (prompt, chosen, rejected) in seen:
            note = f"the same as {seen[prompt, chosen, rejected]}"
        elif (prompt, rejected, chosen) in seen:
            note = f"{seen[prompt, rejected, chosen]} says the reverse"
        seen.setdefault((prompt, chosen, rejected), place)
        cut = {name: shortened(text, MOST_LETTERS) for name, text in texts_of(tokenizer, pair).items()}
        found.append({"place": place, "note": note} | cut)
    return found


def write_page(folder, settings, validations, health, samples, picture, iteration, rows, figures, reference):
    """Write the page.

    Args:
        validations, samples: lines of `metrics.jsonl` and `samples.jsonl`.
        picture: path of the curves, or None.
        iteration, figures: of the validation that the table shows, and what `pair_figures` returned of it.
        rows: what `table_rows` returned.
        reference: what `reference_totals` returned.
    """
    pairs = []
    for i, row in enumerate(rows):
        of_pair = figures_of(i, figures, reference)
        pairs.append(row | {name.replace("/", "_"): value for name, value in of_pair.items()})
    pairs.sort(key=lambda pair: pair["rewards_margins"])
    text = _template().render(
        when=when,
        title=Path(folder).resolve().name,
        settings={
            name: value if isinstance(value, str) else json.dumps(value, default=str)
            for name, value in settings.items()
        },
        summary=summary(validations, WORDS, settings.get("save_best")),
        health=health,
        answers=_answers(samples),
        picture=base64.b64encode(Path(picture).read_bytes()).decode() if picture else None,
        iteration=iteration,
        pairs=pairs,
        count=len(figures["loss"]),
        referenced=reference is not None,
    )
    replace_file(Path(folder) / PAGE_FILE, lambda file: file.write(text.encode(errors="replace")))


@cache
def _template():
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined).get_template(TEMPLATE)


def summary(validations, names, by):
    """Rows of a table: a head, then each of the named figures that there is, in the first, best and last validation."""
    best, last = best_of(validations, by)
    if last is None:
        return []
    lines = {"first": validations[0], "best": best, "last": last}
    table = [("", *(f"{name} (iteration {line['iteration']})" for name, line in lines.items()))]
    for name in names:
        values = [line.get(f"eval_{name}") for line in lines.values()]
        if any(value is not None for value in values):
            table.append((WORDS[name], *("" if value is None else rounded(value) for value in values)))
    return table


def _answers(samples):
    """Of each sampled prompt its first and its last answer."""
    found = {}
    for line in samples:
        found.setdefault((line["row"], line["prompt"]), []).append(line)
    return [
        {"row": row, "prompt": prompt, "before": lines[0], "now": lines[-1]} for (row, prompt), lines in found.items()
    ]

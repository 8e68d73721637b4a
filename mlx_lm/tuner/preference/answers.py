"""What a policy answers: greedy generation for held-out prompts, on the screen, in `samples.jsonl` and to services."""

from rich import box
from rich.table import Table
from rich.text import Text

from ...cli_ui import make_console
from .intercept import evaluating
from .options import shortened

# Tokens of an answer at most, and letters of it that are printed.
MOST_TOKENS, MOST_LETTERS = 128, 400
COLUMNS = ("iteration", "row", "prompt", "answer", "chosen", "rejected")


def text_of(tokenizer, tokens):
    """The text of some tokens without special ones; their numbers where no tokenizer is known."""
    tokens = list(tokens)
    if tokenizer is None:
        return " ".join(map(str, tokens))
    # A text that is no valid UTF-8 could not be written.
    return tokenizer.decode(tokens, skip_special_tokens=True).encode(errors="replace").decode()


def responses_of(pair):
    """The tokens of a pair's chosen and rejected response; a single response stands on the side of its label."""
    if pair.label is None:
        return pair.chosen, pair.rejected
    return (pair.chosen, []) if pair.label else ([], pair.chosen)


def texts_of(tokenizer, pair):
    """A dict of the texts of a pair's prompt, chosen and rejected response."""
    tokens = zip(("prompt", "chosen", "rejected"), (pair.prompt, *responses_of(pair)), strict=True)
    return {name: text_of(tokenizer, part) for name, part in tokens}


def answers(model, tokenizer, prompts, advance=lambda count: None):
    """The model's greedy answers, without dropout, to prompts of token ids; `advance` takes how many more are there."""
    # Imported where it is needed: most runs generate nothing.
    from ...generate import generate

    found = []
    with evaluating(model):
        for prompt in prompts:
            text = generate(model, tokenizer, list(prompt), max_tokens=MOST_TOKENS)
            found.append(text.encode(errors="replace").decode())
            advance(1)
    return found


def when(iteration):
    """At which time of a run an answer was given."""
    return f"after iteration {iteration}" if iteration else "before training"


def print_side_by_side(before, now):
    """Print the answers to one prompt at the start and now, two lines of `samples.jsonl`."""
    table = Table(title=Text(_cut(now["prompt"])), box=box.SIMPLE_HEAD, title_justify="left", expand=True)
    for line in (before, now):
        table.add_column(when(line["iteration"]), ratio=1)
    # As `Text`, in which brackets are no markup.
    table.add_row(Text(_cut(before["answer"])), Text(_cut(now["answer"])))
    make_console().print(table)


def _cut(text):
    text = "".join(letter if letter.isprintable() or letter == "\n" else " " for letter in text.strip())
    return shortened(text, MOST_LETTERS)

"""The ways in which public data sets lay out a preference, each read as `prompt`, `chosen` and `rejected`.

A layout is known by its keys; what the values hold is read in `rows.py`.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from .messages import OTHER_ROLES, kind
from .options import ConfigError, shown

SAME = "whose responses are rated equal"
# Keys that hold a prompt where there is no `prompt`, the likeliest first.
PROMPTS = ("question", "instruction", "query", "input", "conversations", "conversation", "messages", "context")
PROMPTS += ("problem",)
SYSTEM = ("system", "system_prompt", "system_message")
CHOSEN_SCORES = ("score_chosen", "chosen_score", "chosen-rating", "chosen_rating", "rating_chosen")
REJECTED_SCORES = ("score_rejected", "rejected_score", "rejected-rating", "rejected_rating", "rating_rejected")
# What a label may be, in lower case; tables hold text.
LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
LARGEST = 3.4e38  # of float32


class UselessRow(Exception):
    """A well-formed row that holds nothing to learn from; its argument says why."""


@dataclass(frozen=True)
class Layout:
    """A form of rows.

    Attributes:
        name: what to call it.
        keys: the keys that a row of it has.
        read: gives `prompt`, `chosen`, `rejected`, and where there are such `tools`, of a row.
        reads: further keys that `read` looks at.
    """

    name: str
    keys: tuple
    read: Callable
    reads: tuple = ()


def _openai(row):
    given = row["input"]
    if not isinstance(given, Mapping) or "messages" not in given:
        raise ConfigError(f"input is {kind(given)}; it must be an object with messages.")
    sides = {"chosen": row["preferred_output"], "rejected": row["non_preferred_output"]}
    return {"prompt": given["messages"], "tools": given.get("tools"), **sides}


def _alpaca_prompt(row):
    parts = [row["instruction"], row.get("input")]
    for key, part in zip(("instruction", "input"), parts, strict=True):
        if part is not None and not isinstance(part, str):
            raise ConfigError(f"{key} is {kind(part)}; with chosen and rejected it must be a string.")
    if row.get("history"):
        raise ConfigError("the row has a history, which is not read; give the turns as a list of messages in prompt.")
    return "\n".join(part for part in parts if part and part.strip())


def _comparison(name, keys, first_wins, reads=()):
    """The `Layout` of two responses, of which a verdict names the better.

    Args:
        keys: of the prompt, where there is one, of both responses, and of the verdict.
        first_wins: takes a row and the verdict's key; gives true, false, or None where neither is better.
    """
    *prompt, first, second, verdict = keys

    def read(row):
        wins = first_wins(row, verdict)
        if wins is None:
            raise UselessRow(SAME)
        better, worse = (first, second) if wins else (second, first)
        asked = _alpaca_prompt(row) if prompt == ["instruction"] else row[prompt[0]] if prompt else None
        return {"prompt": asked, "chosen": row[better], "rejected": row[worse]}

    return Layout(name, keys, read, reads)


def number(row, key, default=None):
    """The number at a key of a row, which tables hold as text; the default where there is none."""
    value = row.get(key)
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value) if value.strip() else None
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST:
        raise ConfigError(f"{key} is {shown(row.get(key))}; it must be a finite number.")
    return float(value)


def _below_zero(row, key):
    value = number(row, key)
    return None if value == 0 else value < 0


def _one_of(first, second):
    def wins(row, key):
        value = row[key] if isinstance(first, str) else number(row, key)
        if value in (first, second):
            return value == first
        if isinstance(value, str) and value.startswith(("tie", "both_bad")):
            return None
        raise ConfigError(f"{key} is {shown(row[key])}; it must be {first!r} or {second!r}.")

    return wins


ALPACA = ("instruction", "input", "history")
LAYOUTS = (
    Layout("OpenAI's preference format", ("input", "preferred_output", "non_preferred_output"), _openai),
    _comparison("Alpaca comparisons", ("instruction", "output_1", "output_2", "preference"), _one_of(1, 2), ALPACA),
    _comparison("HelpSteer2 preferences", ("prompt", "response_1", "response_2", "preference_strength"), _below_zero),
    _comparison("HelpSteer3 preferences", ("context", "response1", "response2", "overall_preference"), _below_zero),
    _comparison("SHP comparisons", ("history", "human_ref_A", "human_ref_B", "labels"), _one_of(1, 0)),
    _comparison(
        "PKU-SafeRLHF comparisons", ("prompt", "response_0", "response_1", "better_response_id"), _one_of(0, 1)
    ),
    _comparison(
        "Chatbot Arena conversations", ("conversation_a", "conversation_b", "winner"), _one_of("model_a", "model_b")
    ),
)
PLAIN = "prompt, chosen, rejected"
LABELLED = "prompt, completion, label"
IMPLICIT = "chosen and rejected with the prompt in them"


def recognised(row, prompt=None, chosen="chosen", rejected="rejected"):
    """A row laid out as `prompt`, `chosen` and `rejected`, the keys that the configuration names; None is found.

    Returns:
        `(row, name, reads)`: the row with those three keys (`prompt` None where the responses hold it), what its layout
        is called, and the row's keys that were read.
    """
    if row.get(chosen) is None and row.get(rejected) is None and (chosen, rejected) == ("chosen", "rejected"):
        for layout in LAYOUTS:
            if all(row.get(key) is not None for key in layout.keys):
                return layout.read(row), layout.name, (*layout.keys, *layout.reads)
        return {}, PLAIN, ()
    if prompt is not None or row.get("prompt") is not None or _whole(row.get(chosen)) and _whole(row.get(rejected)):
        key = prompt or "prompt"
        return {"prompt": row.get(key)}, PLAIN if row.get(key) is not None else IMPLICIT, (key,)
    if isinstance(row.get("instruction"), str):
        return {"prompt": _alpaca_prompt(row)}, "Alpaca pairs", ALPACA
    key = next((key for key in PROMPTS if row.get(key) and key not in (chosen, rejected)), None)
    if key is None:
        return {"prompt": None}, IMPLICIT, ()
    return {"prompt": _asked(row[key], key, chosen)}, f"{key}, {chosen}, {rejected}", (key,)


def _asked(value, key, chosen):
    """A prompt that was found by its key, where it does not hold an answer, too."""
    if _role(value, -1) == "assistant":
        raise ConfigError(
            f"there is no prompt, and {key} ends with an answer, which {chosen} would go on from; leave it out, "
            f"or say that it is the beginning of both responses with prompt_feature: {key}."
        )
    return value


def _whole(value):
    """Whether a response is a conversation from its beginning, which holds its own prompt."""
    return _role(value, 0) in ("system", "user")


def _role(value, at):
    """The usual name of the role of a list's message, such as its first one; None where it has none."""
    message = value[at] if isinstance(value, list) and value else None
    role = str(message.get("role", message.get("from"))).lower() if isinstance(message, Mapping) else None
    return OTHER_ROLES.get(role, role)


def label(row):
    """Whether a row's completion is good; `ConfigError` where its label does not say."""
    told = LABELS.get(str(row["label"]).strip().lower())
    if told is None:
        raise ConfigError(f"label is {shown(row['label'])}; it must be true or false.")
    return told

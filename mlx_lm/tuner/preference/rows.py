"""Preference rows: every accepted form of a row read as one prompt with two responses, before any token is made.

Layouts are known by their keys in `layouts.py`, messages checked in `messages.py`, tokens made in `tokens.py`, files
and data sets of the hub read in `sources.py`.
"""

import itertools
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from .layouts import CHOSEN_SCORES, LABELLED, REJECTED_SCORES, SYSTEM, UselessRow, label, number, recognised
from .messages import KEYS, decoded, from_json, kind, marked_turns, messages, speaks, tools, transcript
from .options import ConfigError, nearest
from .overlap import shared_text, without_prompt

EQUAL = "whose chosen and rejected responses are equal"
EMPTY_RESPONSE = "with an empty response"
EMPTY_PROMPT = "with an empty prompt"
TRANSCRIPTS = "Human/Assistant transcripts"
REPEATED = "the prompt in both responses"
NO_ANSWER = "whose transcripts do not end with an answer to the same question"
SCORED_LOWER = "whose chosen response has no higher score"
SCORED_ALIKE = "whose scores differ by less than min_score_difference"

# Rows that tell whether responses hold their prompts.
MOST_TRIED = 500

# What the model never writes: a response that begins with one of these is a mistake in the row.
NOT_THE_MODEL = ("system", "user", "tool")
# Keys of what an answer is about that no text model sees.
NOT_TEXT = ("image", "images", "video", "videos", "audio", "audios")
READ = ("tools", "chat_template_kwargs", "margin", "weight", "source")
# As chat templates begin a text, also those of other models than the one that is trained.
RENDERED = re.compile(r"(?:<s>|<bos>)?\s*(?:<\|\w+\|>|<\uff5c|\[INST\]|\[gMASK\]|<start_of_turn>)")


class Conversation(NamedTuple):
    """A row in its one form: message lists for a tokenizer with a chat template, strings for one without."""

    prompt: list | str
    chosen: list | str
    rejected: list | str
    tools: list | None = None
    template_kwargs: dict = {}
    margin: float = 0.0
    weight: float = 1.0
    label: bool | None = None


@dataclass(frozen=True)
class RowReader:
    """Reads rows.

    Args:
        prompt, chosen, rejected: the rows' keys. A prompt key of None is found by the row's layout.
        chat: whether rows become messages of a chat template.
        template_kwargs: arguments of the chat template for every row; a row's own come before them.
        specials: texts of the tokenizer's special tokens, which an implicit prompt never ends inside.
        score_difference: "margin" or "weight", to take it from the difference of the two responses' scores.
        score_scale: what the difference is multiplied by.
        min_score_difference: leave out rows whose scores differ by less.
        lifts_prompt: whether a prompt that both responses begin with is taken off them.

    Attributes:
        layouts: how many rows were read in each layout, by its name.
        unread: the rows' keys that nothing reads.
    """

    prompt: str | None = None
    chosen: str = "chosen"
    rejected: str = "rejected"
    chat: bool = True
    template_kwargs: dict = field(default_factory=dict)
    specials: tuple = ()
    score_difference: str | None = None
    score_scale: float = 1.0
    min_score_difference: float | None = None
    lifts_prompt: bool = True
    layouts: Counter = field(default_factory=Counter)
    unread: dict = field(default_factory=dict)

    def __call__(self, row):
        """The row's `Conversation`; of a row with a `label` its one `completion` is both responses.

        Raises:
            ConfigError: the row is malformed; the sentence names the key.
            UselessRow: there is nothing to learn from it.
        """
        if not isinstance(row, Mapping):
            raise ConfigError(f"the row is {kind(row)}; expected an object with {self.chosen} and {self.rejected}.")
        if {"completion", "label"} <= set(row) and self.chosen == "chosen" and row.get("chosen") is None:
            bare = {key: value for key, value in row.items() if key != "label"}
            read = replace(self, chosen="completion", rejected="completion")(bare)
            return read._replace(label=label(row))
        named = (self.prompt, self.chosen, self.rejected)
        if beside := next((key for key in NOT_TEXT if row.get(key) and key not in named), None):
            raise ConfigError(f"the row has {beside}, and only text can be trained on; leave such rows out.")
        laid, layout, keys = recognised(row, self.prompt, self.chosen, self.rejected)
        system_key = next((key for key in SYSTEM if row.get(key)), "system")
        read = {*keys, self.chosen, self.rejected, *READ, system_key}
        chosen, rejected = (
            self._side(row, laid, *names) for names in (("chosen", self.chosen), ("rejected", self.rejected))
        )
        prompt = self._prompt(row, laid)
        if not isinstance(system := row.get(system_key), str | None):
            raise ConfigError(f"{system_key} is {kind(system)}; it must be a string.")
        tools_ = tools(laid.get("tools", row.get("tools")))
        kwargs = {**self.template_kwargs, **template_kwargs(row.get("chat_template_kwargs"))}
        margin, weight = self._numbers(row, read)
        self.unread.update(dict.fromkeys(key for key in row if key not in read and row[key] is not None))
        if chosen == rejected and self.chosen != self.rejected:
            raise UselessRow(EQUAL)
        if self.chat:
            prompt, chosen, rejected, form = self._turns(prompt, chosen, rejected, row)
            if not any(_says_something(message) for message in prompt):
                raise UselessRow(EMPTY_PROMPT)
            prompt = _with_system(prompt, system)
        else:
            listed = [isinstance(value, list) for value in (prompt, chosen, rejected)]
            if any(listed) or system or tools_ or row.get("chat_template_kwargs"):
                raise ConfigError(
                    "messages, system, tools and chat_template_kwargs need a chat template, which is not "
                    "used here, or which the tokenizer does not have; give prompt, chosen and rejected as strings."
                )
            prompt, chosen, rejected, form = self._texts(prompt, chosen, rejected, row)
        if self.chosen == self.rejected:
            layout = LABELLED.replace("prompt", keys[0]) if keys else LABELLED
        self.layouts[", ".join(filter(None, (layout, form)))] += 1
        return Conversation(prompt, chosen, rejected, tools_, kwargs, margin, weight)

    def _side(self, row, laid, name, key):
        value = laid.get(name, row.get(key))
        if value is None:
            found = ", ".join(map(str, row)) or "none"
            alike = [other for other in row if key in str(other).lower()]
            hint = f" (did you mean {alike[0]}?)" if alike else nearest(key, row)
            state = "null" if key in row else f"missing{hint}"
            raise ConfigError(
                f"{key} is {state}; the row's keys are {found}. chosen_feature and rejected_feature name other keys."
            )
        return self._text_or_messages(value, key)

    def _prompt(self, row, laid):
        key, value = self.prompt or "prompt", laid["prompt"] if "prompt" in laid else row.get("prompt")
        if value is None:
            if self.prompt is not None:
                state = "null" if key in row else f"missing{nearest(key, row)}"
                raise ConfigError(f"{key} (prompt_feature) is {state}.")
            return None
        if self.chat and isinstance(value, str):
            value = marked_turns(value) or value
        prompt = self._text_or_messages(value, key)
        if prompt == []:
            raise ConfigError(f"{key} is an empty list; it needs a message.")
        return prompt

    def _text_or_messages(self, value, key):
        if isinstance(value, str):
            value = (decoded(value, key) if self.chat else None) or value
        if isinstance(value, str):
            return value
        if not isinstance(value, list) and not (isinstance(value, Mapping) and {"role", "from"} & set(value)):
            raise ConfigError(f"{key} is {kind(value)}; it must be a string or a list of messages.")
        read = messages(value, key)
        self.unread.update(dict.fromkeys(f"{key}[].{name}" for message in read for name in message if name not in KEYS))
        return [{name: item for name, item in message.items() if name in KEYS} for message in read]

    def _turns(self, prompt, chosen, rejected, row):
        """Prompt and responses as messages, the prompt lifted out where the responses repeat it."""
        self._refuse_rendered(chosen if prompt is None else prompt)
        prompt, chosen, rejected, form = self._transcripts(prompt, chosen, rejected)
        keys, sides = (self.chosen, self.rejected), (chosen, rejected)
        both_lists = isinstance(chosen, list) and isinstance(rejected, list)
        if prompt is None and not both_lists:
            self._refuse_without_prompt(row)
        if prompt is None or (isinstance(prompt, str) and both_lists and _repeats(chosen) and _repeats(rejected)):
            shared = self._shared_messages(chosen, rejected, form)
            contents = [message["content"].strip() for message in chosen[:shared]]
            if prompt is not None and not any(text and (text in prompt or prompt.strip() in text) for text in contents):
                raise ConfigError(f"the messages that {self.chosen} and {self.rejected} share do not hold the prompt.")
            prompt = chosen[:shared]
            return prompt, *(_response(side[shared:], key, form) for key, side in zip(keys, sides, strict=True)), form
        if isinstance(prompt, str):
            if self.lifts_prompt and (rest := without_prompt(prompt, chosen, rejected)):
                sides, form = [text.lstrip() for text in rest], REPEATED
            prompt = [{"role": "user", "content": prompt}]
        responses = [
            _response(_continuation(side, prompt, key), key, form) for key, side in zip(keys, sides, strict=True)
        ]
        return prompt, *responses, form

    def _refuse_rendered(self, text):
        begun = text.lstrip() if isinstance(text, str) else ""
        found = RENDERED.match(begun)
        if marker := found[0] if found else next(filter(begun.startswith, self.specials), None):
            raise ConfigError(
                f"the text begins with {marker}, as a chat template writes it, and would go through one again; "
                "give messages or bare texts, or set use_chat_template: false to train strings as they stand."
            )

    def _refuse_without_prompt(self, row):
        others = [key for key in row if key not in (self.chosen, self.rejected) and isinstance(row[key], str | list)]
        likely = max(others, key=lambda key: len(str(row[key])), default=None)
        raise ConfigError(
            f"there is no prompt; the row's keys are {', '.join(map(str, row))}. "
            + (f"Name the prompt's key, such as prompt_feature: {likely}." if likely else "Give each row a prompt.")
        )

    def _transcripts(self, prompt, chosen, rejected):
        """The turns of `Human:` and `Assistant:` transcripts as messages, of the prompt or of both whole responses."""
        asked = transcript(prompt) if isinstance(prompt, str) else None
        sides = [transcript(text) if isinstance(text, str) else None for text in (chosen, rejected)]
        if not asked and (prompt is not None or not all(sides)):
            return prompt, chosen, rejected, ""
        goes_on = False
        if asked:
            end = prompt[len(prompt.rstrip()) :]
            prompt = [message for message, _ in asked]
            last = prompt[-1]
            if goes_on := last["role"] == "assistant" and bool(last["content"]):
                last["content"] += end
            elif last["role"] == "assistant":
                prompt.pop()
        responses = [
            [message for message, _ in turns] if turns else _answer(side, goes_on)
            for turns, side in zip(sides, (chosen, rejected), strict=True)
        ]
        return prompt, *responses, TRANSCRIPTS

    def _texts(self, prompt, chosen, rejected, row):
        """Prompt and responses as strings, the prompt lifted out where the responses repeat it."""
        form = ""
        if not chosen.strip() or not rejected.strip():
            raise UselessRow(EMPTY_RESPONSE)
        if prompt is None:
            end, form = self._end_of_prompt(chosen, rejected, row)
            prompt, chosen, rejected = chosen[:end], chosen[end:], rejected[end:]
        elif self.lifts_prompt and (rest := without_prompt(prompt, chosen, rejected)):
            (chosen, rejected), form = rest, REPEATED
        if not chosen.strip() or not rejected.strip():
            raise UselessRow(EMPTY_RESPONSE)
        return prompt, chosen, rejected, form

    def _end_of_prompt(self, chosen, rejected, row):
        if all(sides := [transcript(text) for text in (chosen, rejected)]):
            same = itertools.takewhile(lambda turns: turns[0] == turns[1], zip(*sides, strict=False))
            ends = [end for (_, end), _ in same]
            shared = min(len(ends), *(len(side) - 1 for side in sides))
            if shared and all(side[shared][0]["role"] == "assistant" for side in sides):
                return chosen.index("Assistant:", ends[shared - 1]) + len("Assistant:"), TRANSCRIPTS
            raise UselessRow(NO_ANSWER)
        if self.chosen == self.rejected:
            self._refuse_without_prompt(row)
        end = shared_text(chosen, rejected, self.specials)
        if end == 0:
            raise ConfigError(
                f"there is no prompt, and {self.chosen} and {self.rejected} share no beginning to take for one; "
                "give a prompt, or name its key with prompt_feature."
            )
        return end, ""

    def _shared_messages(self, chosen, rejected, form):
        """The number of shared leading messages, which are the prompt, with a response left on each side."""
        both = zip(chosen[:-1], rejected[:-1], strict=False)
        shared = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], both)))
        if shared == 0:
            if form:
                raise UselessRow(NO_ANSWER)
            raise ConfigError(
                f"there is no prompt, and {self.chosen} and {self.rejected} share no leading messages to take for one; "
                "both must begin with the same messages and go on with a response."
            )
        return shared

    def _numbers(self, row, read):
        """The row's margin and weight, with what is made of its scores; `read` gets their keys."""
        margin, weight = number(row, "margin", 0.0), number(row, "weight", 1.0)
        if weight < 0:
            raise ConfigError(f"weight is {weight:g}; it must not be negative.")
        if self.score_difference is None and self.min_score_difference is None:
            return margin, weight
        scores = []
        for names in (CHOSEN_SCORES, REJECTED_SCORES):
            key = next((name for name in names if row.get(name) not in (None, "")), None)
            if key is None:
                raise ConfigError(
                    f"the row has no {names[0]}, which score_difference and min_score_difference need; its keys are "
                    f"{', '.join(map(str, row))}."
                )
            scores.append(number(row, key))
            read.add(key)
        difference = scores[0] - scores[1]
        if self.min_score_difference is not None and difference < self.min_score_difference:
            raise UselessRow(SCORED_ALIKE)
        if self.score_difference == "margin":
            margin += self.score_scale * difference
        elif self.score_difference == "weight":
            if difference <= 0:
                raise UselessRow(SCORED_LOWER)
            weight *= self.score_scale * difference
        return margin, weight


def repeats_prompts(reader, rows):
    """Whether at least half of some rows hold their prompt in both responses, as a layout has it and not by chance."""
    trial = replace(reader, lifts_prompt=True, layouts=Counter(), unread={})
    for i in range(0, len(rows), max(1, -(-len(rows) // MOST_TRIED))):
        with suppress(UselessRow, ConfigError, RecursionError):  # told where the row is read for good
            trial(rows[i])
    repeated = sum(count for name, count in trial.layouts.items() if name.endswith(REPEATED))
    return 2 * repeated >= trial.layouts.total()


def _answer(side, goes_on):
    """A response of a transcript without the name of who speaks, and where it begins a turn without space in front."""
    if not isinstance(side, str):
        return side
    side = re.sub(r"^\s*Assistant:\s*", "", side)
    return side if goes_on else side.lstrip()


def _repeats(messages):
    """Whether a message list is a whole conversation, not a response alone."""
    return bool(messages) and messages[0]["role"] in NOT_THE_MODEL


def _continuation(side, prompt, key):
    """The messages that follow the prompt in one side of a row."""
    if isinstance(side, str):
        return [{"role": "assistant", "content": side}]
    if side[: len(prompt)] == prompt:
        return side[len(prompt) :]
    if not _repeats(side):
        return side
    raise ConfigError(
        f"{key} begins with a {side[0]['role']} message but does not repeat the prompt's messages; "
        "give the whole conversation or the response alone."
    )


def _response(messages, key, form):
    """The messages of a response, checked."""
    if not messages or not _says_something(messages[-1]) and messages[-1]["role"] not in NOT_THE_MODEL:
        raise UselessRow(EMPTY_RESPONSE)
    for message, place in ((messages[0], "begins"), (messages[-1], "ends")):
        if message["role"] in NOT_THE_MODEL:
            if form:
                raise UselessRow(NO_ANSWER)
            raise ConfigError(f"the response in {key} {place} with a {message['role']} message, not an assistant's.")
    return messages


def _says_something(message):
    return bool(message["content"].strip()) or speaks(message)


def _with_system(prompt, system):
    if not system:
        return prompt
    if prompt[0]["role"] == "system":
        if prompt[0]["content"] == system:
            return prompt
        raise ConfigError("system is given, but the prompt begins with another system message; keep one of them.")
    return [{"role": "system", "content": system}, *prompt]


def template_kwargs(kwargs):
    if isinstance(kwargs, str):
        kwargs = from_json(kwargs, "chat_template_kwargs")
    if kwargs is None:
        return {}
    if not isinstance(kwargs, Mapping):
        raise ConfigError(f"chat_template_kwargs is {kind(kwargs)}; it must be an object.")
    return {key: value for key, value in kwargs.items() if value is not None}

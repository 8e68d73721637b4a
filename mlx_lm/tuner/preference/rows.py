"""Preference rows: every accepted form of a row read as one prompt with two responses, before any token is made.

Upstream has no module of this name. Tokens are made in `encoding.py`, files and hub data sets read in `datasets.py`.
"""

import json
import math
import os
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from .options import ConfigError, nearest

EQUAL = "whose chosen and rejected responses are equal"
EMPTY_RESPONSE = "with an empty response"
EMPTY_PROMPT = "with an empty prompt"

# What the model never writes: a response that begins with one of these is a mistake in the row.
NOT_THE_MODEL = ("system", "developer", "user", "human", "tool", "function")
# What an assistant message may hold in place of content.
SPEECH = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
RESERVED = ("conversation", "messages", "tools", "tokenize", "add_generation_prompt", "continue_final_message")


class UselessRow(Exception):
    """A well-formed row that holds nothing to learn from; its argument says why."""


class Conversation(NamedTuple):
    """A row in its one form: message lists for a tokenizer with a chat template, strings for one without."""

    prompt: list | str
    chosen: list | str
    rejected: list | str
    tools: list | None = None
    template_kwargs: dict = {}
    margin: float = 0.0
    weight: float = 1.0


@dataclass(frozen=True)
class RowReader:
    """Reads rows.

    Args:
        prompt, chosen, rejected: the rows' keys. A prompt key of None is "prompt", which rows may leave out.
        chat: whether the tokenizer has a chat template.
        template_kwargs: arguments of the chat template for every row; a row's own come before them.
        specials: texts of the tokenizer's special tokens, which an implicit prompt never ends inside.
    """

    prompt: str | None = None
    chosen: str = "chosen"
    rejected: str = "rejected"
    chat: bool = True
    template_kwargs: dict = field(default_factory=dict)
    specials: tuple = ()

    def __call__(self, row):
        """The row's `Conversation`.

        Raises:
            ConfigError: the row is malformed; the sentence names the key.
            UselessRow: there is nothing to learn from it.
        """
        if not isinstance(row, Mapping):
            raise ConfigError(f"the row is {_kind(row)}; expected an object with {self.chosen} and {self.rejected}.")
        chosen, rejected = (self._side(row, key) for key in (self.chosen, self.rejected))
        prompt = self._prompt(row)
        system, tools = _text(row, "system"), _tools(row.get("tools"))
        kwargs = {**self.template_kwargs, **template_kwargs(row.get("chat_template_kwargs"))}
        margin, weight = _number(row, "margin", 0.0), _number(row, "weight", 1.0)
        if weight < 0:
            raise ConfigError(f"weight is {weight:g}; it must not be negative.")
        if chosen == rejected:
            raise UselessRow(EQUAL)
        if self.chat:
            prompt, chosen, rejected = self._turns(prompt, chosen, rejected)
            prompt = _with_system(prompt, system)
        else:
            listed = [isinstance(value, list) for value in (prompt, chosen, rejected)]
            if any(listed) or system or tools or row.get("chat_template_kwargs"):
                raise ConfigError(
                    "messages, system, tools and chat_template_kwargs need a chat template, which this model's "
                    "tokenizer does not have; give prompt, chosen and rejected as strings."
                )
            if prompt is None:
                prompt, chosen, rejected = self._split_text(chosen, rejected)
            if not chosen.strip() or not rejected.strip():
                raise UselessRow(EMPTY_RESPONSE)
        return Conversation(prompt, chosen, rejected, tools, kwargs, margin, weight)

    def _side(self, row, key):
        if row.get(key) is None:
            found = ", ".join(map(str, row)) or "none"
            raise ConfigError(
                f"{key} is missing{nearest(key, row)}; the row's keys are {found}. "
                "chosen_feature and rejected_feature name other keys."
            )
        return _text_or_messages(row[key], key)

    def _prompt(self, row):
        key = self.prompt or "prompt"
        if row.get(key) is None:
            if self.prompt is not None:
                raise ConfigError(f"{key} (prompt_feature) is missing{nearest(key, row)}.")
            return None
        prompt = _text_or_messages(row[key], key)
        if prompt == []:
            raise ConfigError(f"{key} is an empty list; it needs a message.")
        return prompt

    def _turns(self, prompt, chosen, rejected):
        """Prompt and responses as messages, the prompt lifted out where the responses repeat it."""
        sides = {self.chosen: chosen, self.rejected: rejected}
        both_lists = isinstance(chosen, list) and isinstance(rejected, list)
        if prompt is None and not both_lists:
            if isinstance(chosen, list) or isinstance(rejected, list):
                raise ConfigError(f"without a prompt, {self.chosen} and {self.rejected} must be of one type.")
            prompt, *texts = self._split_text(chosen, rejected)
            # The space between prompt and response belongs to neither of two turns.
            sides = dict(zip(sides, (text.lstrip(" ") for text in texts), strict=True))
        elif prompt is None or (isinstance(prompt, str) and both_lists and _repeats(chosen) and _repeats(rejected)):
            shared = _shared_messages(chosen, rejected, self.chosen, self.rejected)
            if prompt is not None and not _mentions(chosen[:shared], prompt):
                raise ConfigError(f"the messages that {self.chosen} and {self.rejected} share do not hold the prompt.")
            return chosen[:shared], *(_response(side[shared:], key) for key, side in sides.items())
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        return prompt, *(_response(_continuation(side, prompt, key), key) for key, side in sides.items())

    def _split_text(self, chosen, rejected):
        if not chosen.strip() or not rejected.strip():
            raise UselessRow(EMPTY_RESPONSE)
        end = shared_text(chosen, rejected, self.specials)
        if end == 0:
            raise ConfigError(
                f"there is no prompt, and {self.chosen} and {self.rejected} share no beginning to take for one; "
                "give a prompt, or name its key with prompt_feature."
            )
        return chosen[:end], chosen[end:], rejected[end:]


def shared_text(chosen, rejected, specials=()):
    """Where the prompt ends that two texts begin with.

    The longest common prefix, cut back until it ends inside no word, no character sequence and none of
    `specials`, leaves something of both texts, and ends in no space: the space goes to the responses,
    whose first tokens most tokenizers write with it.

    Returns:
        The number of characters, 0 where nothing is shared.
    """
    end = len(os.path.commonprefix([chosen, rejected]))
    end = min(end, len(chosen.rstrip()) - 1, len(rejected.rstrip()) - 1)
    pattern = re.compile("|".join(map(re.escape, specials))) if specials else None
    while end > 0:
        cut = end
        if pattern:
            for text in (chosen, rejected):
                inside = [m.start() for m in pattern.finditer(text) if m.start() < cut < m.end()]
                cut = min([cut, *inside])
        while cut > 0 and any(_joined(text[cut - 1], text[cut]) for text in (chosen, rejected)):
            cut -= 1
        while cut > 0 and chosen[cut - 1] == " ":
            cut -= 1
        if cut == end:
            break
        end = cut
    return max(end, 0)


def _joined(before, after):
    """Whether two neighbouring characters stand in one word or one drawn character."""
    extends = unicodedata.category(after)[0] == "M" or "\u200d" in (before, after)
    return extends or (_of_word(before) and _of_word(after))


def _of_word(character):
    return character.isalnum() or character in "_'’" or unicodedata.category(character)[0] == "M"


def _repeats(messages):
    """Whether a message list is a whole conversation, not a response alone."""
    return bool(messages) and messages[0]["role"] in NOT_THE_MODEL


def _shared_messages(chosen, rejected, chosen_key, rejected_key):
    """The number of leading messages that are the prompt: all that are shared, with a response left on each side."""
    limit = max(min(len(chosen), len(rejected)) - 1, 0)
    shared = 0
    while shared < limit and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == 0:
        raise ConfigError(
            f"there is no prompt, and {chosen_key} and {rejected_key} share no leading messages to take for one; "
            "both must begin with the same messages and go on with a response."
        )
    return shared


def _mentions(messages, prompt):
    contents = [(message["content"] or "").strip() for message in messages]
    return any(content and (content in prompt or prompt.strip() in content) for content in contents)


def _continuation(side, prompt, key):
    """The messages that follow the prompt in one side of a row."""
    if isinstance(side, str):
        return [{"role": "assistant", "content": side}]
    count, last = len(prompt), prompt[-1]
    if side[:count] == prompt:
        return side[count:]
    if not _repeats(side):
        return side
    if last["role"] == "assistant" and side[: count - 1] == prompt[:-1] and len(side) >= count:
        # The prompt's last message is the beginning of the response's first.
        begun, whole = last["content"], side[count - 1]["content"]
        if isinstance(begun, str) and isinstance(whole, str) and whole.startswith(begun):
            return [{**side[count - 1], "content": whole[len(begun) :]}, *side[count:]]
    raise ConfigError(
        f"{key} begins with a {side[0]['role']} message but does not repeat the prompt's messages; "
        "give the whole conversation or the response alone."
    )


def _response(messages, key):
    """The messages of a response, checked."""
    if not any(_says_something(message) for message in messages):
        raise UselessRow(EMPTY_RESPONSE)
    for message, place in ((messages[0], "begins"), (messages[-1], "ends")):
        if message["role"] in NOT_THE_MODEL:
            raise ConfigError(f"the response in {key} {place} with a {message['role']} message, not an assistant's.")
    return messages


def _says_something(message):
    return bool((message["content"] or "").strip()) or any(message.get(key) for key in SPEECH)


def _with_system(prompt, system):
    if not system:
        return prompt
    if prompt[0]["role"] in ("system", "developer"):
        if prompt[0]["content"] == system:
            return prompt
        raise ConfigError("system is given, but the prompt begins with another system message; keep one of them.")
    return [{"role": "system", "content": system}, *prompt]


def _text_or_messages(value, key):
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ConfigError(f"{key} is {_kind(value)}; it must be a string or a list of messages.")
    return [_message(message, f"{key}[{i}]") for i, message in enumerate(value)]


def _message(message, key):
    """A checked copy of a message: text parts joined, keys without a value left out, `content` always there."""
    if not isinstance(message, Mapping):
        raise ConfigError(f"{key} is {_kind(message)}; a message is an object with role and content.")
    message = {name: value for name, value in message.items() if value is not None}
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        hint = " (from and value are not read)" if "from" in message else ""
        raise ConfigError(f"{key}.role is {_kind(role)}; it must be a name such as user or assistant{hint}.")
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        if not all(isinstance(text, str) for text in texts):
            raise ConfigError(f"{key}.content has a part that is not text; only text can be trained on.")
        content = "".join(texts)
    if content is None and not any(message.get(name) for name in SPEECH):
        raise ConfigError(f"{key}.content is missing; a message is an object with role and content.")
    if content is not None and not isinstance(content, str):
        raise ConfigError(f"{key}.content is {_kind(content)}; it must be a string.")
    return {**message, "content": content}


def _text(row, key):
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{key} is {_kind(value)}; it must be a string.")
    return value


def _tools(tools):
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except json.JSONDecodeError as error:
            raise ConfigError(f"tools is a string that is not JSON ({error}).") from None
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ConfigError(f"tools is {_kind(tools)}; it must be a list of tool descriptions, each an object.")
    return tools


def template_kwargs(kwargs):
    if kwargs is None:
        return {}
    if not isinstance(kwargs, Mapping):
        raise ConfigError(f"chat_template_kwargs is {_kind(kwargs)}; it must be an object.")
    reserved = [key for key in kwargs if key in RESERVED]
    if reserved:
        raise ConfigError(f"chat_template_kwargs has {reserved[0]}, which is set by the row itself; leave it out.")
    return {key: value for key, value in kwargs.items() if value is not None}


def _number(row, key, default):
    value = row.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{key} is {value!r}; it must be a finite number.")
    return float(value)


def _kind(value):
    """A value's type in the words of JSON."""
    for kind, name in ((bool, "true or false"), (str, "a string"), ((int, float), "a number"), (list, "a list")):
        if isinstance(value, kind):
            return name
    return "missing" if value is None else "an object" if isinstance(value, Mapping) else type(value).__name__

"""One message, or a list of them, brought to the form that chat templates read.

Roles and shapes here are those that public data sets hold; how a row as a whole is laid out is read in `layouts.py`.
"""

import ast
import json
import re
from collections.abc import Mapping

from .options import ConfigError, nearest, shown

ROLES = ("system", "user", "assistant", "tool")
# Other names of the four roles, in lower case.
OTHER_ROLES = {"developer": "system", "human": "user", "prompter": "user"}
OTHER_ROLES |= dict.fromkeys(("gpt", "model", "bot", "chatbot", "ai", "chatgpt", "bing", "bard"), "assistant")
OTHER_ROLES |= dict.fromkeys(("function", "observation", "ipython"), "tool")
# ShareGPT's role of a message whose text is a tool call.
CALLS = "function_call"
# Keys of a message that are read; LORA.md names them.
KEYS = ("role", "content", "tool_calls", "reasoning_content", "name", "tool_call_id")
# The keys by which rows and templates know reasoning; a message that is read has the first.
REASONING = ("reasoning_content", "thinking", "reasoning")
LOOKS_LIKE_MESSAGES = re.compile(r"\s*(?:\[\s*)?\{\s*['\"](role|content|from|value)['\"]\s*:")
# An answer may be JSON, cut off too; what has both of these, or begins with a role, is hardly one.
WHO = re.compile(rf"['\"](role|from)['\"]\s*:\s*['\"]({'|'.join((*ROLES, *OTHER_ROLES))})['\"]")
WHAT = re.compile(r"['\"](content|value)['\"]\s*:")
LATER_TURN = re.compile(r"<extra_id_1>(User|Assistant)\n")
TURN = re.compile(r"(?:\A|(?<=\S)(?=\s*\n\r?\n))\s*(Human|Assistant):")


def messages(value, key):
    """A list of checked messages, of one or of one alone, which stand at `key`; `ConfigError` for what is none."""
    if isinstance(value, Mapping):
        return [message(value, key)]
    return [message(item, f"{key}[{i}]") for i, item in enumerate(value)]


def message(value, key):
    """A checked copy: a known role, text in `content`, tool calls with their arguments decoded."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key} is {kind(value)}; a message is an object with role and content.")
    value = {name: item for name, item in value.items() if item is not None}
    if "role" not in value and "from" in value:
        value = {"role": value.pop("from"), "content": value.pop("value", None), **value}
    value["role"] = _role(value.get("role"), key)
    value["content"] = _content(value.get("content"), key)
    if value["role"] == CALLS:
        found = from_json(value["content"] or "", f"{key}'s tool call")
        value |= {"role": "assistant", "content": "", "tool_calls": found if isinstance(found, list) else [found]}
    if calls := value.pop("function_call", None):
        value.setdefault("tool_calls", [calls])
    if "tool_calls" in value:
        value["tool_calls"] = _calls(value["tool_calls"], key)
    thoughts = [value.pop(name) for name in REASONING if name in value]
    for thought in thoughts:
        if not isinstance(thought, str):
            raise ConfigError(f"{key} has reasoning that is {kind(thought)}; it must be a string.")
    if thoughts := list(dict.fromkeys(thought for thought in thoughts if thought.strip())):
        value["reasoning_content"] = thoughts[0]
    if not value.get("tool_calls"):
        value.pop("tool_calls", None)
    if value["content"] is None and not speaks(value):
        raise ConfigError(f"{key}.content is missing; a message is an object with role and content.")
    # The server gives templates an empty text where there is none.
    return {**value, "content": value["content"] or ""}


def speaks(value):
    """Whether an assistant's message says something without `content`."""
    return bool(value.get("tool_calls") or value.get("reasoning_content"))


def decoded(text, key):
    """The messages that a string holds as JSON or as Python writes them; None for text, `ConfigError` if broken."""
    if not (begins := LOOKS_LIKE_MESSAGES.match(text)):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        listed = found if isinstance(found, list) else [found]
        # If there are any, what is none is told.
        return found if any(is_message(item) for item in listed) else None
    if begins[1] == "role" or (WHO.search(text) and WHAT.search(text)):
        raise ConfigError(f"{key} is a string that begins as messages do but is not JSON; give the messages as a list.")
    return None


def is_message(value):
    """Whether a value has what tells a message."""
    return isinstance(value, Mapping) and ("role" in value or {"from", "value"} <= set(value))


def transcript(text):
    """The turns of a text of `Human:` and `Assistant:` paragraphs; None where it is none.

    Returns:
        A list of `(message, end)`, where `end` is the number of characters up to the end of the turn.
    """
    # Said first, because TURN is tried at each character.
    if "Human:" not in text or "Assistant:" not in text:
        return None
    marks = list(TURN.finditer(text))
    if {mark[1] for mark in marks} != {"Human", "Assistant"} or text[: marks[0].start()].strip():
        return None
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [
        ({"role": "user" if mark[1] == "Human" else "assistant", "content": text[mark.end() : end].strip()}, end)
        for mark, end in zip(marks, ends, strict=True)
    ]


def marked_turns(text):
    """The messages of a prompt whose turns behind the first are marked as HelpSteer2's are; None without such."""
    first, *rest = map(str.rstrip, LATER_TURN.split(text))
    if not rest or first.startswith("<extra_id_"):
        return None
    if rest[-2:] == ["Assistant", ""]:
        # The mark of who is to answer.
        rest = rest[:-2]
    later = zip(rest[::2], rest[1::2], strict=True)
    return [{"role": "user", "content": first}, *({"role": role.lower(), "content": said} for role, said in later)]


def tools(value):
    """The tool descriptions of a row, a list or that list as a JSON string; None where there are none."""
    if isinstance(value, str):
        value = from_json(value, "tools")
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise ConfigError(f"tools is {kind(value)}; it must be a list of tool descriptions, each an object.")
    # Some data sets write each description as a string.
    value = [from_json(item, f"tools[{i}]") if isinstance(item, str) else item for i, item in enumerate(value)]
    if not all(isinstance(tool, Mapping) for tool in value):
        raise ConfigError("tools is a list with something else than tool descriptions, which are objects.")
    return value


def kind(value):
    """A value's type in the words of JSON."""
    for type_, name in ((bool, "true or false"), (str, "a string"), ((int, float), "a number"), (list, "a list")):
        if isinstance(value, type_):
            return name
    return "null" if value is None else "an object" if isinstance(value, Mapping) else type(value).__name__


def _role(role, key):
    if not isinstance(role, str) or not role:
        found = "missing" if role is None else kind(role) if role != "" else "empty"
        raise ConfigError(f"{key}.role is {found}; it must be a name such as user or assistant.")
    lowered = role.strip().lower()
    lowered = OTHER_ROLES.get(lowered, lowered)
    if lowered not in (*ROLES, CALLS):
        known = (*ROLES, *OTHER_ROLES)
        raise ConfigError(f"{key}.role is {shown(role)}{nearest(role, known)}; known roles are {', '.join(known)}.")
    return lowered


def _content(content, key):
    """`content` as a string, its text parts joined; None where there is none."""
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        if not all(isinstance(text, str) for text in texts):
            raise ConfigError(f"{key}.content has a part that is not text; only text can be trained on.")
        return "".join(texts)
    if content is not None and not isinstance(content, str):
        raise ConfigError(f"{key}.content is {kind(content)}; it must be a string.")
    return content


def _calls(calls, key):
    """Tool calls as mlx-lm's server gives them to templates: arguments that are JSON strings decoded to objects."""
    if isinstance(calls, str):
        calls = from_json(calls, f"{key}.tool_calls")
    if not isinstance(calls, list):
        raise ConfigError(f"{key}.tool_calls is {kind(calls)}; it must be a list of calls.")
    read = []
    for call in calls:
        inner = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str) or not inner["name"]:
            raise ConfigError(
                f"{key}.tool_calls has {shown(call)}; a tool call is an object with a function that has a name."
            )
        what, arguments = f"the arguments of the call of {inner['name']} in {key}", inner.get("arguments")
        if isinstance(arguments, str):
            arguments = from_json(arguments, what)
        if not isinstance(arguments, Mapping) and arguments is not None:
            raise ConfigError(f"{what} are {kind(arguments)}; they must be an object.")
        around = {name: item for name, item in call.items() if name not in ("name", "arguments")}
        read.append({"type": "function", **around, "function": {**inner, "arguments": dict(arguments or {})}})
    return read


def from_json(text, what):
    """What a string holds as JSON, None of an empty one; `ConfigError` for what is none."""
    try:
        return json.loads(text) if text.strip() else None
    except (ValueError, RecursionError) as error:
        reason = error if isinstance(error, ValueError) else "nested too deep"
        raise ConfigError(f"{what} is a string that is not JSON ({reason}).") from None

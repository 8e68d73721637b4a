"""A chat template asked for the text of messages, and checked: what it leaves out of a row is told, not lost.

Whether a template writes something is found by changing that thing and looking whether the text changes, so that no
template has to be known.
"""

import json
import signal
import threading
from collections.abc import Mapping
from contextlib import contextmanager

from .messages import REASONING
from .options import ConfigError, first_line

# Stands in for a text, to see where the chat template writes it.
STAND_IN = "\u241fresponse\u241f"
# A row's text may take so many seconds of a processor, and may be so much longer than what it is made of.
SECONDS, MEGABYTE, MOST_TIMES = 2, 10**6, 10


@contextmanager
def limited(seconds):
    """Within the context, `TimeoutError` ends what computes for more than some seconds; in the main thread alone."""

    def stop(number, frame):
        raise TimeoutError(f"it takes more than {seconds} s")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


class Template:
    """The chat template of a tokenizer, mlx-lm's or one of transformers."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self._reasoning_keys = {}

    def render(self, conversation, messages, add_generation_prompt=False):
        """The text of messages, with a conversation's tools and template arguments.

        Raises:
            ConfigError: the template fails, takes more than SECONDS, or writes far more than it is given.
        """
        try:
            with limited(SECONDS):
                text = self.tokenizer.apply_chat_template(
                    messages,
                    tools=conversation.tools,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    **conversation.template_kwargs,
                )
            if len(text) > MEGABYTE and len(text) > MEGABYTE + MOST_TIMES * len(repr((conversation, messages))):
                raise ValueError(f"it writes {len(text) / MEGABYTE:.1f} MB")
            return text
        except Exception as error:
            # A template is a program that comes with the model: it may raise anything at a row it was not made for.
            raise ConfigError(f"the tokenizer's chat template refuses the row ({first_line(error)}).") from error

    def fitted(self, conversation):
        """The conversation with tool calls and reasoning in the form that this template writes.

        Raises:
            ConfigError: the template writes a tool call, a tool's result or the tools in no form.
        """
        every = [*conversation.prompt, *conversation.chosen, *conversation.rejected]
        if any("reasoning_content" in message for message in every):
            key = self.reasoning_key(conversation)
            conversation = _changed(conversation, lambda message: _renamed(message, key))
        if not conversation.tools and not any(m.get("tool_calls") or m["role"] == "tool" for m in every):
            return conversation
        first_lost = refused = None
        for tried in (conversation, _changed(conversation, _as_strings)):
            try:
                lost = self._lost(tried)
            except ConfigError as error:
                refused = refused or error
                continue
            if lost is None:
                return tried
            first_lost = first_lost or lost
        raise first_lost or refused

    def leaves_out(self, conversation, messages, i, **change):
        """Whether the text of messages stays the same when message `i` is changed."""
        others = [*messages[:i], {**messages[i], **change}, *messages[i + 1 :]]
        return self._same(conversation, messages, conversation, others)

    def _same(self, conversation, messages, changed, others):
        text = self.render(conversation, messages)
        try:
            return self.render(changed, others) == text
        except ConfigError:
            # It looked at what was changed.
            return False

    def _lost(self, conversation):
        """What the template does not write of tools, their calls and results, as an error; None where it writes all."""
        first = len(conversation.prompt)
        for side in (conversation.chosen, conversation.rejected):
            messages = spoken(conversation.prompt, side)
            text = self.render(conversation, messages)
            if conversation.tools and self._same(conversation, messages, conversation._replace(tools=None), messages):
                return ConfigError(
                    "the tokenizer's chat template does not write tools; leave them out of the rows, or take a model "
                    "that was made for them."
                )
            for i, message in enumerate(messages):
                if message["role"] == "tool" and message["content"].strip():
                    if self.leaves_out(conversation, messages, i, content=STAND_IN):
                        return ConfigError("the tokenizer's chat template does not write the result of a tool.")
                calls = message.get("tool_calls") or []
                for j, call in enumerate(calls):
                    if (lost := self._lost_call(conversation, messages, i, j)) or _as_python(call, text):
                        name = call["function"]["name"]
                        where = "" if i >= first else " in the prompt"
                        lost = lost or "arguments of the call"
                        return ConfigError(
                            f"the tokenizer's chat template does not write the {lost} of the tool {name}{where}."
                        )
        return None

    def _lost_call(self, conversation, messages, i, j):
        calls = messages[i]["tool_calls"]
        function = calls[j]["function"]
        arguments = {"stand": "in"} if isinstance(function["arguments"], Mapping) else '{"stand": "in"}'
        for what, change in (("call", {"name": "stand_in"}), ("arguments of the call", {"arguments": arguments})):
            other = {**calls[j], "function": {**function, **change}}
            if self.leaves_out(conversation, messages, i, tool_calls=[*calls[:j], other, *calls[j + 1 :]]):
                return what
        return None

    def reasoning_key(self, conversation):
        """The key whose reasoning the template writes in the last message; None where there is none."""
        known = repr(sorted(conversation.template_kwargs.items()))
        if known not in self._reasoning_keys:
            self._reasoning_keys[known] = next((key for key in REASONING if self._writes(conversation, key)), None)
        return self._reasoning_keys[known]

    def _writes(self, conversation, key):
        asked = {"role": "user", "content": "a"}
        try:
            return STAND_IN in self.render(
                conversation._replace(tools=None), [asked, {"role": "assistant", "content": "b", key: STAND_IN}]
            )
        except ConfigError:
            return False


def spoken(prompt, response):
    """All messages of a side, a response that goes on from the prompt's last message put together with it."""
    if prompt[-1]["role"] != "assistant" or response[0]["role"] != "assistant":
        return [*prompt, *response]
    joined = {**prompt[-1], **response[0], "content": prompt[-1]["content"] + response[0]["content"]}
    return [*prompt[:-1], joined, *response[1:]]


def _changed(conversation, change):
    parts = {key: [change(m) for m in getattr(conversation, key)] for key in ("prompt", "chosen", "rejected")}
    return conversation._replace(**parts)


def _renamed(message, key):
    if "reasoning_content" not in message or key is None:
        return message
    rest = {name: value for name, value in message.items() if name != "reasoning_content"}
    return {**rest, key: message["reasoning_content"]}


def _as_strings(message):
    """Some templates put the arguments into the text as they are, and need their JSON."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call["function"]
        arguments = json.dumps(function["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**function, "arguments": arguments}})
    return {**message, "tool_calls": calls}


def _as_python(call, text):
    """Whether the text has arguments as Python writes an object, which no model does."""
    arguments = call["function"]["arguments"]
    return isinstance(arguments, Mapping) and bool(arguments) and str(arguments) in text

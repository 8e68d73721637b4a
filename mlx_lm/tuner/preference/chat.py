"""A conversation as the text that its model reads and writes, by way of the chat template.

The prompt is what the model is given to generate from; each response stands behind it as the model would write it
there.
"""

import os
from typing import NamedTuple

from .messages import REASONING
from .options import ConfigError
from .template import STAND_IN, spoken

EARLIER_REASONING = "the chat template leaves the reasoning of earlier turns out"
EMPTY_THOUGHT = "a response without reasoning closes at once the thought that the generation prompt opens"
TURNS_CHANGE = "the chat template writes the turns of this response otherwise when others follow them."
CLOSED_REASONING = "the chat template leaves reasoning out of responses, whose thought is over where they begin"
DISPUTED = (
    "the chat template's generation prompt does not stand before the response, and the prompt ends before it, which "
    "responses that hold their reasoning, or other chat_template_kwargs, avoid"
)
LATER_REASONING = "the chat template leaves reasoning out of turns of responses"


class Texts(NamedTuple):
    """A row as text, each response with the prompt in front of it.

    Attributes:
        prompt, chosen, rejected: the texts; both responses stand behind the prompt, or behind all of it but a
            generation prompt which the template does not write before them.
        notes: what is to be told of the row, such as reasoning that the template leaves out.
        unscored: for each response the spans of its text, counted from the beginning of the prompt, that the model
            does not write: turns of a user or a tool.
    """

    prompt: str
    chosen: str
    rejected: str
    notes: tuple = ()
    unscored: tuple = ((), ())


class ChatTexts:
    """Turns conversations into texts; `score` is "assistant" or "all", as `PairEncoder` has it."""

    def __init__(self, template, thinking, score):
        self.template, self.thinking, self.score = template, thinking, score

    def __call__(self, conversation):
        """A `Conversation` of messages as `Texts`; `ConfigError` where the template refuses it or loses a part."""
        conversation = self.template.fitted(conversation)
        sides = (conversation.chosen, conversation.rejected)
        if conversation.prompt[-1]["role"] == "assistant":
            texts = self._continued(conversation)
        else:
            prompt = self.template.render(conversation, conversation.prompt, add_generation_prompt=True)
            wholes = [self._whole(conversation, prompt, side) for side in sides]
            texts = Texts(prompt, *wholes)
        notes = {*self._lost_in_prompt(conversation, texts.prompt)}
        for side, whole in zip(sides, texts[1:3], strict=True):
            rest = whole[len(os.path.commonprefix([texts.prompt, whole])) :]
            if not whole.startswith(texts.prompt):
                notes.add(DISPUTED)
            if self._loses_thought(side, rest):
                notes.add(CLOSED_REASONING if self.thinking.closed(texts.prompt) else LATER_REASONING)
            if self.thinking.opened(texts.prompt) and rest.lstrip().startswith(self.thinking.end):
                notes.add(EMPTY_THOUGHT)
        unscored = ((), ())
        if self.score == "assistant":
            unscored = tuple(self._unscored(conversation, *parts) for parts in zip(sides, texts[1:3], strict=True))
        return texts._replace(notes=tuple(sorted(notes)), unscored=unscored)

    def _unscored(self, conversation, response, whole):
        """The spans of a text that hold turns of the response that are not the model's."""
        spans, messages = [], spoken(conversation.prompt, response)
        for i in range(len(messages) - len(response), len(messages) - 1):
            own, following = (message["role"] == "assistant" for message in messages[i : i + 2])
            if own and not following:
                start = self._end(conversation, messages, i, whole)
            elif following and not own:
                spans.append((start, self._end(conversation, messages, i, whole, add_generation_prompt=True)))
        return tuple(spans)

    def _end(self, conversation, messages, i, whole, add_generation_prompt=False):
        """The end, within a text of all messages, of what the template writes of message `i`.

        Where what stands before is written otherwise once more messages follow, such as with reasoning dropped, it is
        found from the end of the text.

        Raises:
            ConfigError: what the template writes behind the message is another text then, too.
        """
        message, calls = messages[i], messages[i].get("tool_calls")
        # Some templates write what is said beside calls behind their results.
        for turn in (message, {**message, "content": ""}) if calls else (message,):
            begun = self.template.render(conversation, [*messages[:i], turn], add_generation_prompt)
            if whole.startswith(begun):
                return len(begun)
        if calls:
            named = {**calls[-1], "function": {**calls[-1]["function"], "name": STAND_IN}}
            marked = {**message, "tool_calls": [*calls[:-1], named]}
        else:
            marked = {**message, "content": message["content"] + STAND_IN}
        before = [*messages[:i], marked]
        text = self.template.render(conversation, before, add_generation_prompt)
        # Behind the last mark of the message itself; a call's result may name the call, too.
        rest = self.template.render(conversation, [*before, *messages[i + 1 :]])
        rest = rest.split(STAND_IN, text.count(STAND_IN))[-1]
        rest = rest.replace(STAND_IN, calls[-1]["function"]["name"]) if calls else rest
        text = text.rpartition(STAND_IN)[2]
        # A generation prompt may open a thought, and EOS stand behind the last turn, that no turn before it has.
        for own in (text, self.thinking.unopened(text), text.removesuffix(self.template.tokenizer.eos_token or "\0")):
            if rest.startswith(own) and whole.endswith(rest):
                return len(whole) - len(rest) + len(own)
        if self.thinking.closed(text) and whole.endswith(rest):
            # The turn may have a thought of its own in the place of the one that its generation prompt closes.
            before, gap = text.rpartition(self.thinking.start)[0], text[len(text.rstrip()) :]
            thought, end, answer = rest[len(before) :].partition(self.thinking.end)
            if rest.startswith(before) and thought.startswith(self.thinking.start) and end:
                return len(whole) - len(answer.removeprefix(gap))
        raise ConfigError(TURNS_CHANGE)

    def _whole(self, conversation, prompt, response):
        """The text of prompt and response; it begins with `prompt`, or with all of it but the generation prompt."""
        if self.thinking.closed(prompt):
            response = [self._without_thought(response[0]), *response[1:]]
        elif self._loses_reasoning(conversation, response):
            response = [self._with_thought(response[0]), *response[1:]]
        whole = self.template.render(conversation, conversation.prompt + response)
        shared = len(os.path.commonprefix([prompt, whole]))
        content = response[0]["content"].strip()
        thought = self.thinking.thought(content)
        if thought:
            # Templates drop the reasoning of turns that are over; here the turn is what the model is to write.
            if shared < len(prompt) or not self.thinking.written(thought, whole[shared:], len(response) == 1):
                head, tail = self._around(conversation, conversation.prompt, response)
                gap = head[len(prompt) :].partition(self.thinking.start)[0] if head.startswith(prompt) else ""
                return prompt + (gap if not gap.strip() else "") + self.thinking.behind(prompt, content) + tail
        if shared == len(prompt):
            return self._checked(conversation, response, content, whole, whole[shared:])
        if not thought and self.thinking.opened(prompt):
            begun = self.thinking.unopened(prompt)
            if whole.startswith(begun):
                return prompt + self.thinking.over(prompt, whole[len(begun) :])
        bare = self.template.render(conversation, conversation.prompt)
        if shared >= len(os.path.commonprefix([prompt, bare])):
            return self._checked(conversation, response, content, whole, whole[shared:])
        # The template writes an earlier part otherwise once a response follows. The prompt is what the model will
        # be given, so it stays as it is, and only the response is taken from the whole text.
        head, _ = self._around(conversation, conversation.prompt, response)
        if self.thinking.opened(prompt) or not whole.startswith(head):
            raise ConfigError("the chat template writes the prompt otherwise when this response follows it.")
        # White space in front of the response belongs to it, as far as the prompt does not end with it already.
        gap, end = head[len(head.rstrip()) :], prompt[len(prompt.rstrip()) :]
        return prompt + (gap.removeprefix(end) if gap.startswith(end) else "") + whole[len(head) :]

    def _loses_reasoning(self, conversation, response):
        """Whether the template leaves out the reasoning of a response's first message."""
        key = self.template.reasoning_key(conversation)
        if key is None:
            return "reasoning_content" in response[0]
        # Templates drop it where a later message is a user's.
        if key not in response[0] or not self.thinking.known or all(m["role"] != "user" for m in response):
            return False
        messages = [*conversation.prompt, *response]
        return self.template.leaves_out(conversation, messages, len(conversation.prompt), **{key: STAND_IN})

    def _with_thought(self, message):
        """A response whose reasoning no key of the template takes, with the reasoning in its content."""
        if not self.thinking.known:
            raise ConfigError(
                "the tokenizer's chat template does not write reasoning_content; leave it out of the rows, put it into "
                "content, or take a model that thinks."
            )
        rest = {name: value for name, value in message.items() if name not in REASONING}
        reasoning = next(message[key] for key in REASONING if key in message)
        return {**rest, "content": self.thinking.joined(reasoning, message["content"])}

    def _without_thought(self, message):
        """A response without its reasoning, which a prompt whose thought is over leaves no place for."""
        rest = {name: value for name, value in message.items() if name not in REASONING}
        thought = self.thinking.thought(rest["content"])
        if thought:
            rest["content"] = rest["content"].rpartition(self.thinking.end)[2].lstrip() if thought.closed else ""
        return rest

    def _checked(self, conversation, response, content, whole, rest):
        """`whole`, where its end `rest` holds the content of a response's first message, or would hold another's."""
        if content and content not in rest:
            self._around(conversation, conversation.prompt, response)
        return whole

    def _around(self, conversation, before, response):
        """The texts that the template writes up to the content of the response's first message, and behind it."""
        first, *rest = response
        text = self.template.render(conversation, [*before, {**first, "content": STAND_IN}, *rest])
        head, found, tail = text.rpartition(STAND_IN)
        if not found:
            raise ConfigError("the tokenizer's chat template does not write what the response's first message holds.")
        return head, tail

    def _lost_in_prompt(self, conversation, text):
        """What the template leaves out of the prompt by its own rules, as notes; what it loses is an error."""
        messages = conversation.prompt
        for i, message in enumerate(messages):
            content = message["content"].strip()
            if content and content not in text:
                thought = self.thinking.thought(content)
                answer = content.rpartition(self.thinking.end)[2].strip() if thought else content
                if thought and answer in text:
                    yield EARLIER_REASONING
                elif self.template.leaves_out(conversation, messages, i, content=STAND_IN):
                    raise ConfigError(
                        f"the tokenizer's chat template does not write the {message['role']} message of the prompt "
                        f"({content[:40]!r}); leave it out, or put its text into another message."
                    )
            if any(message[key].strip() not in text for key in REASONING if key in message):
                yield EARLIER_REASONING

    def _loses_thought(self, response, text):
        """Whether the template leaves reasoning out of a response's text."""
        for message in response:
            thought = self.thinking.thought(message["content"])
            reasoning = [message[key].strip() for key in REASONING if key in message]
            if any(part not in text for part in [*reasoning, *([thought.text] if thought else [])]):
                return True
        return False

    def _continued(self, conversation):
        """Texts of a row whose prompt ends with the beginning of the response's first message."""
        *before, begun = conversation.prompt
        lead = begun["content"]
        if not before or not lead.strip() or begun.get("tool_calls"):
            raise ConfigError("the prompt ends with an assistant message that no response can go on from.")
        prompts, wholes = set(), []
        asked = self.template.render(conversation, before, add_generation_prompt=True)
        thinks = self.thinking.thought(lead) and not self.thinking.closed(asked)
        for first, *rest in (conversation.chosen, conversation.rejected):
            first = {**begun, **first, "content": lead + first["content"]}
            if thinks:
                # The model has begun with this thought, so that none that the template writes stands in front of it.
                wholes.append(self._whole(conversation._replace(prompt=before), asked, [first, *rest]))
                at = wholes[-1].find(lead.lstrip(), len(self.thinking.unopened(asked)))
                kept = [wholes[-1][: at + len(lead.lstrip())]] if at >= 0 else []
            else:
                head, _ = self._around(conversation, before, [first, *rest])
                wholes.append(self.template.render(conversation, [*before, first, *rest]))
                kept = [head + text for text in (lead, lead.lstrip()) if wholes[-1].startswith(head + text)]
            prompts.add(kept[0] if kept else None)
        prompt = prompts.pop()
        if prompts or prompt is None:
            raise ConfigError(
                "the chat template does not keep the assistant message that the prompt ends with, as it is and before "
                "both responses alike; move it into the responses."
            )
        return Texts(prompt, *wholes)

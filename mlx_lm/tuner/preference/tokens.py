"""A preference row as tokens: the prompt once, and the tokens of each response that follow it.

Upstream has no module of this name. What is scored is what the model would write after the generation prompt, with
the token that ends its turn, once.
"""

import os
from collections.abc import Mapping
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from ...tokenizer_utils import TokenizerWrapper
from .options import ConfigError

# Texts that a response is tried behind, so that its first token is not taken for the beginning of a text.
ANCHORS = ("", "\n", ".", "a")
# Stands in for a response, to see what the chat template writes around it.
STAND_IN = "\u241fresponse\u241f"


class Texts(NamedTuple):
    """A row as text, each response with the prompt in front of it.

    `disputed` says that the template wrote a generation prompt which it does not write before these responses.
    """

    prompt: str
    chosen: str
    rejected: str
    disputed: bool = False


class PairEncoder:
    """Turns conversations into tokens.

    Args:
        tokenizer: `mlx_lm.tokenizer_utils.TokenizerWrapper`, or a transformers tokenizer.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.chat = getattr(tokenizer, "has_chat_template", getattr(tokenizer, "chat_template", None) is not None)
        self.eos = tokenizer.eos_token_id
        more = tokenizer.eos_token_ids if isinstance(tokenizer, TokenizerWrapper) else ()
        self.eos_ids = {self.eos, *more} - {None}
        if self.eos is None and self.eos_ids:
            self.eos = min(self.eos_ids)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.specials = {str(token): id for id, token in added.items() if token.special}
        self.special_ids = {*self.specials.values(), *tokenizer.all_special_ids, *self.eos_ids}
        self.think_start = getattr(tokenizer, "think_start", None)
        self.think_end = getattr(tokenizer, "think_end", None)
        self.lead = [] if self.chat else self._lead()
        self._blank = {}

    def texts(self, conversation):
        """A `Conversation` as `Texts`.

        Raises:
            ConfigError: the chat template refuses it, or text and template do not fit together.
        """
        if not self.chat:
            prompt = conversation.prompt
            texts = Texts(prompt, prompt + conversation.chosen, prompt + conversation.rejected)
        elif conversation.prompt[-1]["role"] == "assistant":
            texts = self._continued(conversation)
        else:
            prompt = self._render(conversation, conversation.prompt, add_generation_prompt=True)
            sides = (conversation.chosen, conversation.rejected)
            wholes = [self._whole(conversation, prompt, side) for side in sides]
            texts = Texts(prompt, *wholes, disputed=not all(whole.startswith(prompt) for whole in wholes))
        for text in texts[:3]:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ConfigError(f"the text holds half of a surrogate pair ({error.object[error.start]!r}).") from None
        return texts

    def encode(self, batch):
        """Tokens of many `Texts`, each distinct text tokenized once.

        Returns:
            For each row `(prompt, chosen, rejected)`, lists of token ids; the responses without the prompt.
        """
        if not batch:
            return []
        distinct = list(dict.fromkeys(text for texts in batch for text in texts[:3]))
        tokens = dict(zip(distinct, self._tokenize(distinct), strict=True))
        return [self._split(texts, *(tokens[text] for text in texts[:3])) for texts in batch]

    def _render(self, conversation, messages, add_generation_prompt=False):
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=conversation.tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **conversation.template_kwargs,
            )
        except Exception as error:
            # A template is a program that comes with the model: it may raise anything at a row it was not made for.
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ConfigError(f"the tokenizer's chat template refuses the row ({reason}).") from error

    def _whole(self, conversation, prompt, response):
        """The text of prompt and response; it begins with `prompt`, or with all of it but the generation prompt."""
        whole = self._render(conversation, conversation.prompt + response)
        shared = len(os.path.commonprefix([prompt, whole]))
        content = (response[0]["content"] or "").strip()
        for message in response:
            _check_calls(message, whole[shared:])
        if len(response) == 1 and self._loses_reasoning(prompt, whole[shared:], content):
            # Templates drop the reasoning of turns that are over; here the turn is what the model is to write.
            if prompt.rstrip().endswith(self.think_start):
                content = content.removeprefix(self.think_start).lstrip("\n")
            return prompt + content + self._around(conversation, conversation.prompt, response)[1]
        if shared == len(prompt):
            return whole
        bare = self._render(conversation, conversation.prompt)
        if shared >= len(os.path.commonprefix([prompt, bare])):
            return whole
        # The template writes an earlier part otherwise once a response follows. The prompt is what the model will
        # be given, so it stays as it is, and only the response is taken from the whole text.
        head, _ = self._around(conversation, conversation.prompt, response)
        opens_thinking = self.think_start and prompt.rstrip().endswith(self.think_start)
        if opens_thinking or not whole.startswith(head):
            raise ConfigError("the chat template writes the prompt otherwise when this response follows it.")
        # White space in front of the response belongs to it, as far as the prompt does not end with it already.
        gap, end = head[len(head.rstrip()) :], prompt[len(prompt.rstrip()) :]
        return prompt + (gap.removeprefix(end) if gap.startswith(end) else "") + whole[len(head) :]

    def _loses_reasoning(self, prompt, rest, content):
        """Whether a response's reasoning is missing from its text, or stands behind another block, an empty one."""
        start, end = self.think_start, self.think_end
        if not end or end not in content or prompt.rstrip().endswith(end):
            return False
        reasoning = content.rpartition(end)[0].strip().removeprefix(start).strip()
        return bool(reasoning) and (reasoning not in rest or rest.count(end) > content.count(end))

    def _around(self, conversation, before, response):
        """The texts that the template writes up to the content of the response's first message, and behind it."""
        first, *rest = response
        text = self._render(conversation, [*before, {**first, "content": STAND_IN}, *rest])
        head, found, tail = text.rpartition(STAND_IN)
        if not found:
            raise ConfigError("the chat template does not write what the response's first message holds.")
        return head, tail

    def _continued(self, conversation):
        """Texts of a row whose prompt ends with the beginning of the response's first message."""
        *before, begun = conversation.prompt
        lead = begun["content"] or ""
        if not before or not lead.strip() or begun.get("tool_calls"):
            raise ConfigError("the prompt ends with an assistant message that no response can go on from.")
        prompts, wholes = set(), []
        for first, *rest in (conversation.chosen, conversation.rejected):
            first = {**begun, **first, "content": lead + (first["content"] or "")}
            head, _ = self._around(conversation, before, [first, *rest])
            wholes.append(self._render(conversation, [*before, first, *rest]))
            for message in rest:
                _check_calls(message, wholes[-1][len(head) :])
            kept = [head + text for text in (lead, lead.lstrip()) if wholes[-1].startswith(head + text)]
            prompts.add(kept[0] if kept else None)
        prompt = prompts.pop()
        if prompts or prompt is None:
            raise ConfigError("the chat template does not keep the assistant message that the prompt ends with.")
        return Texts(prompt, *wholes)

    def _tokenize(self, texts):
        inner = self.tokenizer._tokenizer if isinstance(self.tokenizer, TokenizerWrapper) else self.tokenizer
        if type(inner).encode is not PreTrainedTokenizerBase.encode:
            # A tokenizer with an encode of its own may prepare the text there.
            return [self._encode(text) for text in texts]
        return inner(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    def _encode(self, text):
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _decode(self, tokens):
        return self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _lead(self):
        """What the tokenizer puts in front of every plain text: BOS, or nothing."""
        bare, full = self._encode("a"), list(self.tokenizer.encode("a"))
        for start in range(len(full) - len(bare) + 1 if bare else 0):
            if full[start : start + len(bare)] == bare:
                return full[:start]
        return [token for token in full if token == self.tokenizer.bos_token_id]

    def _split(self, texts, prompt, chosen, rejected):
        size, sides = len(prompt), (chosen, rejected)
        if texts.disputed:
            size = min(_common(prompt, side) for side in sides)
        responses = [
            side[size:] if side[:size] == prompt[:size] else self._after(prompt, text[len(texts.prompt) :])
            for side, text in zip(sides, texts[1:3], strict=True)
        ]
        bos = self.tokenizer.bos_token
        lead = [] if bos and texts.prompt.startswith(bos) else self.lead
        return lead + prompt[:size], *(self._ended(response) for response in responses)

    def _after(self, prompt, text):
        """Tokens that write `text` behind the prompt's tokens, where the two texts' tokens would grow together."""
        tail = prompt[-8:]
        before = self._decode(tail)
        for anchor in ANCHORS:
            tokens = self._encode(anchor + text)[len(self._encode(anchor)) :]
            if self._decode(tail + tokens) == before + text:
                return tokens
        return self._encode(text)

    def _ended(self, response):
        """The response with its end once: the first end-of-turn token with no text behind it, or EOS added."""
        start = len(response)
        while start > 0 and (response[start - 1] in self.special_ids or self._is_blank(response[start - 1])):
            start -= 1
        for at in range(start, len(response)):
            if response[at] in self.eos_ids:
                return response[: at + 1]
        marks = [at for at in range(start, len(response)) if response[at] in self.special_ids]
        if marks:
            # The template's own end-of-turn token, which does not end generation: EOS stands right behind it.
            response = response[: marks[-1] + 1]
        return response if self.eos is None else [*response, self.eos]

    def _is_blank(self, token):
        if token not in self._blank:
            self._blank[token] = not self._decode([token]).strip()
        return self._blank[token]


def _check_calls(message, text):
    """Refuse a message whose tool calls the template left out of its text."""
    for call in message.get("tool_calls") or ():
        function = call.get("function", call) if isinstance(call, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str):
            raise ConfigError(f"a tool call is {call!r}; it must be an object with a function that has a name.")
        if name not in text:
            raise ConfigError(f"the tokenizer's chat template does not write the call of the tool {name}.")


def _common(first, second):
    """The number of leading tokens that two sequences share."""
    return next(
        (i for i, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]),
        min(len(first), len(second)),
    )

"""A preference row as tokens: the prompt once, and the tokens of each response that follow it.

What is scored is what the model would write after the generation prompt, with the token that ends its turn, once.
"""

import itertools
import os
from functools import cache

from transformers import PreTrainedTokenizerBase

from ...tokenizer_utils import TokenizerWrapper
from .chat import ChatTexts, Texts
from .options import ConfigError
from .template import Template
from .thinking import Thinking

# Texts that a response is tried behind, so that its first token is not taken for the beginning of a text.
ANCHORS = ("", "\n", ".", "a")

SPECIAL = "a message's text holds a special token of the tokenizer, which becomes that token"


class PairEncoder:
    """Turns conversations into tokens.

    Args:
        tokenizer: `mlx_lm.tokenizer_utils.TokenizerWrapper`, or a transformers tokenizer.
        chat: whether to use its chat template, where it has one; by default yes.
        score: "assistant", to score what the model writes, or "all", to score a response's user and tool
            turns too.
    """

    def __init__(self, tokenizer, chat=True, score="assistant"):
        self.tokenizer = tokenizer
        template = getattr(tokenizer, "chat_template", None)
        self.chat = chat and bool(getattr(tokenizer, "has_chat_template", template is not None))
        self.eos = tokenizer.eos_token_id
        more = tokenizer.eos_token_ids if isinstance(tokenizer, TokenizerWrapper) else ()
        self.eos_ids = {self.eos, *more} - {None}
        if self.eos is None and self.eos_ids:
            self.eos = min(self.eos_ids)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.specials = {str(token): id for id, token in added.items() if token.special}
        self.special_ids = {*self.specials.values(), *tokenizer.all_special_ids, *self.eos_ids}
        tags = getattr(tokenizer, "think_start", None), getattr(tokenizer, "think_end", None)
        if not all(tags) and "</think>" in str(template):
            tags = "<think>", "</think>"
        self.template = Template(tokenizer)
        self.chat_texts = ChatTexts(self.template, Thinking(*tags), score)
        self.lead = [] if self.chat else self._lead()
        self._is_blank = cache(lambda token: not self._decode([token]).strip())

    def texts(self, conversation):
        """A `Conversation` as `Texts`; `ConfigError` where the template refuses it or a text cannot be encoded."""
        if not self.chat:
            prompt = conversation.prompt
            texts = Texts(prompt, prompt + conversation.chosen, prompt + conversation.rejected)
        else:
            texts = self.chat_texts(conversation)
            if self._holds_specials(conversation):
                texts = texts._replace(notes=(*texts.notes, SPECIAL))
        for text in texts[:3]:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ConfigError(f"the text holds half of a surrogate pair ({error.object[error.start]!r}).") from None
        return texts

    def _holds_specials(self, conversation):
        """Whether a message's text holds a special token, other than the one that may end a response."""
        contents = [message["content"] for message in conversation.prompt]
        for side in (conversation.chosen, conversation.rejected):
            contents += [message["content"] for message in side]
            for end in self.specials:
                contents[-1] = contents[-1].rstrip().removesuffix(end)
        return any(special in content for content in contents for special in self.specials)

    def encode(self, group):
        """The tokens of each of some `Texts`; equal texts are tokenized once.

        Returns:
            A list of `(prompt, chosen, rejected, unscored)`: token ids, and for both responses the spans
            `(start, stop)` of their tokens that the model does not write.
        """
        distinct = list(dict.fromkeys(text for texts in group for text in texts[:3]))
        tokens = dict(zip(distinct, self._tokenize(distinct) if distinct else (), strict=True))
        return [self._split(texts, *(tokens[text] for text in texts[:3])) for texts in group]

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
        return next((full[:start] for start in range(len(full)) if full[start : start + len(bare)] == bare), [])

    def _split(self, texts, prompt, chosen, rejected):
        size, sides = len(prompt), (chosen, rejected)
        if not all(text.startswith(texts.prompt) for text in texts[1:3]):
            size = min(len(os.path.commonprefix([prompt, side])) for side in sides)
        responses, spans = [], []
        for side, text, cuts in zip(sides, texts[1:3], texts.unscored, strict=True):
            kept = side[:size] == prompt[:size]
            response = side[size:] if kept else self._after(prompt, text[len(texts.prompt) :])
            responses.append(self._ended(response))
            # Counted from the end: behind a prompt that keeps its own tokens the first ones are not the text's.
            places = [len(response) - behind for behind in self._tokens_behind(text, side, itertools.chain(*cuts))]
            found = [
                (self._behind_end(response, start), stop) for start, stop in zip(places[::2], places[1::2], strict=True)
            ]
            spans.append(tuple(found))
        bos = self.tokenizer.bos_token
        lead = [] if bos and texts.prompt.startswith(bos) else self.lead
        return lead + prompt[:size], *responses, tuple(spans)

    def _tokens_behind(self, text, tokens, cuts):
        """How many of a text's tokens stand behind each of some places in it, one across a place not counted."""
        count = last = 0
        for cut in cuts:
            # Mostly no token of the text stands across a place, so that what is between two of them has its own.
            for start, before in ((last, count), (0, 0)):
                begun = self._encode(text[start:cut])
                if tokens[before : before + len(begun)] == begun:
                    count, last = before + len(begun), cut
                    yield len(tokens) - count
                    break
            else:
                yield len(os.path.commonprefix([tokens[::-1], self._encode(text[cut:])[::-1]]))

    def _behind_end(self, response, at):
        """Where the model's turn ends that the template has written up to `at`: no white space behind its end."""
        end = at
        while end > 0 and response[end - 1] not in self.eos_ids and self._is_blank(response[end - 1]):
            end -= 1
        return end if end > 0 and response[end - 1] in self.eos_ids else at

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

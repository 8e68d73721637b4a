"""Preference rows as pairs of token sequences: what training and evaluation take their batches from.

Rows are read in `rows.py` and tokenized in `tokens.py`; `datasets.py` loads them.
"""

import copy
import json
import os
import random
from array import array
from collections import Counter, defaultdict
from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from ...cli_ui import rprint
from .layouts import UselessRow
from .options import ConfigError, printable, shown
from .rows import EMPTY_PROMPT, EMPTY_RESPONSE, EQUAL, RowReader, repeats_prompts, template_kwargs
from .tokens import PairEncoder

ALONE = "with a label (KTO) and no completion of the other label to the same prompt"
EQUAL_WHEN_CUT = "whose responses are equal within max_seq_length"
# Letters of texts that are tokenized at once: what a tokenizer tells of them takes some 25 bytes a letter.
MOST_LETTERS = 2**20


class Pair(NamedTuple):
    """One preference.

    Attributes:
        prompt: token ids of the prompt, generation prompt included.
        chosen, rejected: token ids of the responses alone; a full sequence is the prompt and one of them.
        margin: by how much the chosen response should win, in units of reward.
        weight: what the pair's loss counts, 1 for a usual pair.
        unscored: for chosen and rejected the spans `(start, stop)` of their tokens that the model does not write, such
            as a tool's result.
        label: None of a pair; of a single response, which stands in `chosen`, whether it is desirable. `rejected` is a
            response to another prompt then.
    """

    prompt: list
    chosen: list
    rejected: list
    margin: float = 0.0
    weight: float = 1.0
    unscored: tuple = ((), ())
    label: bool | None = None


class Origin(NamedTuple):
    """Where a pair comes from.

    Attributes:
        number: of its row.
        source: what the row gives as its `source`, as text, or None.
        asked: a number for the prompt without its system message, the same one for the same text.
        cut: what was cut of it, by the names of the data set's counts.
    """

    number: int
    source: str | None
    asked: int
    cut: tuple = ()


class PreferenceDataset:
    """Preference rows as `Pair`s, tokenized and truncated when the data set is made.

    Args:
        rows: a sequence of objects in one of the forms that LORA.md lists.
        tokenizer: `mlx_lm.tokenizer_utils.TokenizerWrapper`, or a transformers tokenizer.
        prompt_feature, chosen_feature, rejected_feature: the rows' keys, where they are others than `prompt`,
            `chosen` and `rejected`.
        chat_template_kwargs: arguments of the chat template, such as `enable_thinking`.
        max_seq_length: tokens of prompt and response together, at least 2.
        unpaired: make single responses with labels, two of a row with a pair, as KTO reads them. Without it rows of one
            completion with a label make pairs, where a prompt has both labels.
        use_chat_template: false to train strings as they stand, where the tokenizer has a chat template.
        score: "assistant", to score what the model writes, or "all", to score all of a response's turns.
        score_difference, score_scale, min_score_difference: what to make of the responses' scores, as `RowReader` has
            it.
        name: what to call the rows in warnings.
        where: gives the place of row number i, for errors; the name and the number by default.

    Attributes:
        counts: how many rows were read and left out, prompts cut and responses cut, by these names.
        layout: the layouts that the rows were read in, and the first one's texts.

    Raises:
        ConfigError: a row is malformed, or there is no row to learn from.
    """

    def __init__(
        self,
        rows,
        tokenizer,
        prompt_feature=None,
        chosen_feature=None,
        rejected_feature=None,
        chat_template_kwargs=None,
        max_seq_length=2048,
        unpaired=False,
        use_chat_template=True,
        score="assistant",
        score_difference=None,
        score_scale=1.0,
        min_score_difference=None,
        name="the data set",
        where=None,
    ):
        for side, value in (("prompt", prompt_feature), ("chosen", chosen_feature), ("rejected", rejected_feature)):
            if value is not None and not isinstance(value, str):
                raise ConfigError(f"{side}_feature is {value!r}; it must be the name of a key of the rows.")
        if isinstance(max_seq_length, bool) or not isinstance(max_seq_length, int) or max_seq_length < 2:
            raise ConfigError(f"max_seq_length is {max_seq_length!r}; it must be a whole number, at least 2.")
        self.name = name
        self.max_seq_length = max_seq_length
        self.tokenizer = tokenizer
        self._unpaired = unpaired
        self._where = where or (lambda i: f"{name}, row {i}")
        self._encoder = PairEncoder(tokenizer, use_chat_template, score)
        self._reader = RowReader(
            prompt=prompt_feature,
            chosen=chosen_feature or "chosen",
            rejected=rejected_feature or "rejected",
            chat=self._encoder.chat,
            template_kwargs=template_kwargs(chat_template_kwargs),
            specials=tuple(self._encoder.specials),
            score_difference=score_difference,
            score_scale=score_scale,
            min_score_difference=min_score_difference,
        )
        self._reader = replace(self._reader, lifts_prompt=repeats_prompts(self._reader, rows))
        self.counts = Counter({"read": len(rows), "left out": 0, "prompts cut": 0, "responses cut": 0})
        # The numbers of the rows that are left out, and of those that there is something to tell of, by what it is.
        self._useless, self._notes = defaultdict(list), defaultdict(list)
        self.layout = ""
        self._longest = 0
        self._pairs, self._origins = [], []
        # By their prompt's tokens, then by their label, labelled completions that are to make pairs.
        self._labelled = defaultdict(lambda: {True: [], False: []})
        for group in self._read(rows):
            tokens = self._encoder.encode([texts for _, texts, _ in group])
            for row, encoded in zip(group, tokens, strict=True):
                self._add(*row, *encoded)
        self._pair_labelled()
        self._report(len(rows))
        if unpaired:
            self._pairs = mismatched(self._pairs, max_seq_length, name)
        self.layout = self._layouts() + (f"; the first one:\n{self.layout}" if self.layout else "")
        del self._encoder, self._reader, self._useless, self._notes, self._labelled

    def __len__(self):
        return len(self._pairs)

    def __getitem__(self, idx):
        prompt, chosen, rejected, *numbers = self._pairs[idx]
        return Pair(prompt.tolist(), chosen.tolist(), rejected.tolist(), *numbers)

    def process(self, pair):
        """The pair itself: upstream's `CacheDataset` asks for this, and there is nothing left to do."""
        return pair

    def prompts(self):
        """A number for the prompt of each pair without its system message, the same one for the same text."""
        return [origin.asked for origin in self._origins]

    def where(self, idx):
        """The place of a pair's row, such as its file and line."""
        return self._where(self._origins[idx].number)

    def source(self, idx):
        """What a pair's row gives as its `source`, as text, or None."""
        return self._origins[idx].source

    def split(self, share, seed):
        """Two data sets, to train on and of a share of the pairs to validate on; pairs of one prompt stay together.

        Raises:
            ConfigError: there is one prompt only.
        """
        groups = defaultdict(list)
        for i, asked in enumerate(self.prompts()):
            groups[asked].append(i)
        order, valid = list(groups.values()), []
        random.Random(seed or 0).shuffle(order)
        while len(order) > 1 and len(valid) < max(1, round(share * len(self))):
            valid += order.pop()
        if not valid:
            raise ConfigError(
                f"valid_share is {share:g}, but the {len(self)} pairs to train on have one prompt; leave it out."
            )
        left_out = self.counts["left out"]
        return self._some(sorted({*range(len(self))} - {*valid}), left_out), self._some(sorted(valid), 0)

    def _some(self, numbers, left_out):
        """A data set of some of the pairs; so many of its rows are left out."""
        some = copy.copy(self)
        some._pairs, some._origins = ([items[i] for i in numbers] for items in (self._pairs, self._origins))
        # A row may have two pairs.
        rows = {origin.number: origin.cut for origin in some._origins}
        some.counts = Counter({**dict.fromkeys(self.counts, 0), "read": left_out + len(rows), "left out": left_out})
        some.counts.update(name for cut in rows.values() for name in cut)
        if self._unpaired:
            some._pairs = mismatched(some._pairs, self.max_seq_length, self.name)
        return some

    @classmethod
    def joined(cls, datasets):
        """One data set of the pairs of several, in their order."""
        whole = cls.__new__(cls)
        whole.name = ", ".join(dataset.name for dataset in datasets)
        first = datasets[0]
        whole.layout, whole.tokenizer, whole._unpaired = first.layout, first.tokenizer, first._unpaired
        whole.max_seq_length = max(dataset.max_seq_length for dataset in datasets)
        whole._pairs = [pair for dataset in datasets for pair in dataset._pairs]
        places = [(dataset, i) for dataset in datasets for i in range(len(dataset))]
        whole._where = lambda number: places[number][0].where(places[number][1])
        whole._origins = [dataset._origins[i]._replace(number=n) for n, (dataset, i) in enumerate(places)]
        whole.counts = Counter()
        for dataset in datasets:
            whole.counts.update(dataset.counts)
        return whole

    def _read(self, rows):
        """Give `(conversation, texts, origin)` of rows, in lists of some MOST_LETTERS."""
        group, letters = [], 0
        quiet = mx.distributed.init().rank() != 0
        with tqdm(rows, f"Tokenizing {self.name}", len(rows), leave=False, delay=2, disable=quiet) as progress:
            for number, row in enumerate(progress):
                try:
                    conversation = self._reader(row)
                    texts = self._encoder.texts(conversation)
                    asked = _asked(conversation.prompt)
                except UselessRow as useless:
                    self._useless[str(useless)].append(number)
                    continue
                except (ConfigError, RecursionError) as error:
                    told = error if isinstance(error, ConfigError) else "the row is nested too deep."
                    raise ConfigError(f"{self._where(number)}: {told}") from error
                for note in texts.notes:
                    self._notes[note].append(number)
                source = row.get("source")
                origin = Origin(number, None if source is None else str(source), asked)
                group.append((conversation, texts, origin))
                letters += sum(map(len, texts[:3]))
                if letters >= MOST_LETTERS:
                    yield group
                    group, letters = [], 0
        yield group

    def _add(self, conversation, texts, origin, prompt, chosen, rejected, unscored):
        """Keep a row where there is something to learn from it: its pair, or its labelled completion for a pair."""
        label = conversation.label
        if useless := self._why_useless(prompt, chosen, rejected, label):
            self._useless[useless].append(origin.number)
            return
        self.layout = self.layout or self._described(texts)
        if label is None or self._unpaired:
            self._keep(conversation, origin, prompt, chosen, rejected, unscored)
        else:
            prompt, chosen = array("i", prompt), array("i", chosen)
            self._labelled[prompt.tobytes()][label].append((conversation, origin, prompt, chosen, unscored))

    def _pair_labelled(self):
        """Put good completions together with bad ones of the same prompt, as many as there are of both."""
        for group in self._labelled.values():
            good, bad = group[True], group[False]
            for (*one, chosen, first), (*_, rejected, second) in zip(good, bad, strict=False):
                self._keep(*one, chosen, rejected, (first[0], second[0]))
            pairs = min(len(good), len(bad))
            for _, origin, *_ in (*good[pairs:], *bad[pairs:]):
                self._useless[ALONE].append(origin.number)

    def _keep(self, conversation, origin, prompt, chosen, rejected, unscored):
        """Keep a pair, cut to max_seq_length, where its responses differ then."""
        cut = truncate(prompt, chosen, rejected, self.max_seq_length)
        if cut[1] == cut[2] and not self._unpaired:
            self._useless[EQUAL_WHEN_CUT].append(origin.number)
            return
        shorter = {
            "prompts cut": len(cut[0]) < len(prompt),
            "responses cut": len(cut[1]) < len(chosen) or len(cut[2]) < len(rejected),
        }
        origin = origin._replace(cut=tuple(name for name, is_cut in shorter.items() if is_cut))
        self.counts.update(origin.cut)
        self._longest = max(self._longest, len(prompt) + max(len(chosen), len(rejected)))
        unscored = within(unscored, cut[1:])
        pair = Pair(*(array("i", tokens) for tokens in cut), conversation.margin, conversation.weight, unscored)
        for one in single(pair, conversation.label) if self._unpaired else [pair]:
            self._pairs.append(one)
            self._origins.append(origin)

    def _why_useless(self, prompt, chosen, rejected, label):
        ends = self._encoder.eos_ids
        if not prompt:
            return EMPTY_PROMPT
        if any(not response or (len(response) == 1 and response[0] in ends) for response in (chosen, rejected)):
            return EMPTY_RESPONSE
        return EQUAL if chosen == rejected and label is None else None

    def _layouts(self):
        """The layouts that the rows were read in, most frequent first, and the keys that nothing reads."""
        found = self._reader.layouts.most_common()
        names = [name if len(found) == 1 else f"{name} ({count})" for name, count in found]
        unread = f"; not read: {', '.join(map(str, self._reader.unread))}" if self._reader.unread else ""
        return "rows are read as " + " and ".join(names) + printable(unread)

    def _described(self, texts):
        """A row's texts, shortened, a line each."""
        parts = [texts.prompt, *(text[len(os.path.commonprefix([texts.prompt, text])) :] for text in texts[1:3])]
        names = ("prompt", "completion") if texts.chosen == texts.rejected else ("prompt", "chosen", "rejected")
        return "\n".join(f"  {name:10} {shown(text)}" for name, text in zip(names, parts, strict=False))

    def _report(self, total):
        """Say once what was left out and what was cut."""
        self.counts["left out"] = sum(map(len, self._useless.values()))
        kept = total - self.counts["left out"]
        if self._useless:
            reasons = ", ".join(
                f"{len(numbers)} {why} (first: {self._where(numbers[0])})" for why, numbers in self._useless.items()
            )
            if not self._pairs:
                raise ConfigError(f"{self.name} has no pair to learn from; of its {total} rows, {reasons}.")
            rprint(f"[WARNING] {self.name}: {total - kept} of {total} rows are left out: {reasons}.")
        if self.counts["prompts cut"] or self.counts["responses cut"]:
            rprint(
                f"[WARNING] {self.name}: pairs are longer than max_seq_length {self.max_seq_length}, the longest "
                f"{self._longest} tokens; of {kept}, {self.counts['prompts cut']} lost the beginning of the prompt "
                f"and {self.counts['responses cut']} the end of a response. Raise max_seq_length to keep them whole."
            )
        for note, numbers in self._notes.items():
            first = self._where(numbers[0])
            rprint(f"[WARNING] {self.name}: in {len(numbers)} of {total} rows {note} (first: {first}).")


def places_of(dataset):
    """A function that gives the place of a row: its file and line where the data set knows them."""
    name = getattr(dataset, "name", "the training data")
    return getattr(dataset, "where", None) or (lambda row: f"{row} of {name}")


def _asked(prompt):
    """A number for a prompt without its system message."""
    if isinstance(prompt, str):
        return hash(prompt.strip())
    spoken = [message for message in prompt if message["role"] != "system"]
    return hash(json.dumps(spoken, sort_keys=True, default=str))


def within(unscored, responses):
    """Spans of tokens, as far as they stand within responses that were cut."""
    return tuple(
        tuple((start, min(stop, len(response))) for start, stop in spans if start < min(stop, len(response)))
        for spans, response in zip(unscored, responses, strict=True)
    )


def truncate(prompt, chosen, rejected, max_seq_length):
    """A pair's tokens cut to a length, at least 2: the prompt from its left, then the responses from their right.

    Returns:
        `(prompt, chosen, rejected)`, none of them empty; one prompt for both responses.
    """
    room = max(1, max_seq_length - max(len(chosen), len(rejected)))
    prompt = prompt[-room:]
    room = max_seq_length - len(prompt)
    return prompt, chosen[:room], rejected[:room]


def single(pair, label=None):
    """A pair's responses as single ones, the chosen desirable; of a row with a `label` both are the same one."""
    sides = ((pair.chosen, True), (pair.rejected, False)) if label is None else ((pair.chosen, label),)
    return [
        pair._replace(chosen=tokens, rejected=tokens[:0], unscored=(own, ()), label=good)
        for (tokens, good), own in zip(sides, pair.unscored, strict=False)
    ]


def mismatched(pairs, max_seq_length, name):
    """Single responses, each with one to another prompt in `rejected`: one of like length, whatever the batches are.

    Raises:
        ConfigError: there is one prompt only.
    """
    lengths = np.array([[len(pair.chosen), len(pair.prompt)] for pair in pairs])
    order = np.lexsort((lengths[:, 0], lengths.sum(axis=1)))
    others, other, after = {}, None, order[0]
    for row in np.concatenate([order, order])[::-1].tolist():
        # Behind neighbours of the same prompt comes the one that is behind them.
        other = after if pairs[after].prompt != pairs[row].prompt else other
        others[row] = other
        after = row
    if other is None:
        raise ConfigError(
            f"{name}: the {len(pairs)} responses of a training, validation or test set have one prompt only, and KTO "
            "compares with responses to other prompts; give more prompts, to validate on with valid_share a larger one."
        )
    found = []
    for row, pair in enumerate(pairs):
        tokens = pairs[others[row]].chosen[: max_seq_length - len(pair.prompt)]
        unscored = pair.unscored[0], pairs[others[row]].unscored[0]
        found.append(pair._replace(rejected=tokens, unscored=within(unscored, (pair.chosen, tokens))))
    return found

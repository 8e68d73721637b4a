"""The preference options, each declared once: parser, default, check and document derive from here."""

import argparse
import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class ConfigError(ValueError):
    """A user's mistake, told in one sentence: what was found, what was expected, what to do."""


@dataclass(frozen=True)
class Option:
    """One key of the configuration file, and the command-line flag of the same name.

    Attributes:
        name: the key; the flag is `--` and the key with `-` for `_`.
        default: the value where neither file nor command line gives one.
        kind: the type of a value: float, int, bool or str.
        help: one sentence without a full stop, for `--help` and LORA.md.
        low, high: the bounds of a number, None where there is none.
        open: which bounds are outside the range: any of "low", "high".
        choices: the only values allowed, where there are few.
        many: whether a list of values is allowed too.
        group: the section of LORA.md that lists it.
    """

    name: str
    default: Any
    kind: Callable
    help: str
    low: float | None = None
    high: float | None = None
    open: tuple = ()
    choices: tuple = ()
    many: bool = False
    group: str = "loss"

    @property
    def flag(self):
        return "--" + self.name.replace("_", "-")

    def argument(self):
        """The keywords of `ArgumentParser.add_argument` for this option's flag."""
        told = self.help[0].upper() + self.help[1:]
        if self.range:
            told += f" ({self.range})"
        if self.default is not None:
            told += f"; {str(self.default).lower() if self.kind is bool else self.default} by default"
        told = told.replace("%", "%%") + "."
        if self.kind is bool:
            return {"action": argparse.BooleanOptionalAction, "default": None, "help": told}
        shape = {"nargs": "+"} if self.many else {}
        return {"type": self.kind, "default": None, "metavar": self.kind.__name__.upper(), "help": told} | shape

    @property
    def range(self):
        """The allowed values in words, or an empty string where all are."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        low = None if self.low is None else f"{'>' if 'low' in self.open else '>='} {self._told(self.low)}"
        high = None if self.high is None else f"{'<' if 'high' in self.open else '<='} {self._told(self.high)}"
        return " and ".join(bound for bound in (low, high) if bound)

    def _told(self, bound):
        return f"{bound:g}" if self.kind is float else str(bound)

    def check(self, value):
        """`value` as this option's type.

        Raises:
            ConfigError: the value is of another type or out of range; the sentence names the key.
        """
        if value is None:
            return None
        if self.many and isinstance(value, (list, tuple)):
            if not value:
                raise ConfigError(f"{self.name} is an empty list; give at least one value.")
            return [self._check_one(item) for item in value]
        return self._check_one(value)

    def _check_one(self, value):
        expected = {float: "a number", int: "a whole number", bool: "true or false", str: "a name"}[self.kind]
        if self.range:
            expected += f", {self.range}"
        if self.kind is not str and isinstance(value, str):
            expected += ", without quotes"
        wrong = ConfigError(f"{self.name} is {value!r}; it must be {expected}.")
        if self.kind is float:
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise wrong
            value = float(value)
        elif self.kind is int:
            if isinstance(value, bool) or not isinstance(value, int):
                raise wrong
        elif not isinstance(value, self.kind):
            raise wrong
        if self.choices and value not in self.choices:
            raise ConfigError(f"{self.name} is {value!r}{nearest(value, self.choices)}; it must be {expected}.")
        if self.kind in (float, int):
            too_low = self.low is not None and (value < self.low or ("low" in self.open and value == self.low))
            too_high = self.high is not None and (value > self.high or ("high" in self.open and value == self.high))
            if too_low or too_high or value != value:
                raise wrong
        return value


def nearest(word, known):
    """A hint that names the known word most like `word`, or an empty string where none is like it."""
    known = {str(name).lower(): name for name in known}
    close = difflib.get_close_matches(str(word).lower(), list(known), n=1)
    return f" (did you mean {known[close[0]]}?)" if close else ""


# Options of a preference run besides those of its loss, which stand with the losses in `losses.py`.
DATA_OPTIONS = (
    Option("prompt_feature", "prompt", str, "Key of a row's prompt", group="data"),
    Option("chosen_feature", "chosen", str, "Key of a row's preferred response", group="data"),
    Option("rejected_feature", "rejected", str, "Key of a row's rejected response", group="data"),
    Option(
        "use_chat_template",
        True,
        bool,
        "Put rows into the tokenizer's chat template, where it has one; false trains strings as they stand",
        group="data",
    ),
    Option(
        "score",
        "assistant",
        str,
        "Which turns of a response are scored: the model's own, or also those of users and tools within it",
        choices=("assistant", "all"),
        group="data",
    ),
    Option(
        "score_difference",
        None,
        str,
        "What a row's score_chosen - score_rejected becomes; by default nothing",
        choices=("margin", "weight"),
        group="data",
    ),
    Option("score_scale", 1.0, float, "Factor of that difference", low=0, open=("low",), group="data"),
    Option(
        "min_score_difference",
        None,
        float,
        "Leave out rows whose score_chosen is not above score_rejected by this much; by default none",
        group="data",
    ),
    Option(
        "valid_share",
        None,
        float,
        "Share of the training rows to validate on instead of training, where there is no validation set",
        low=0,
        high=1,
        open=("low", "high"),
        group="data",
    ),
)

REFERENCE_OPTIONS = (
    Option(
        "reference_model",
        None,
        str,
        "Folder or Hugging Face repo of the reference policy; by default it is the model as training finds it",
        group="reference",
    ),
    Option(
        "reference_batch_size",
        None,
        int,
        "Pairs a batch in the reference pass; by default as many as memory is ample for",
        low=1,
        group="reference",
    ),
    Option(
        "reference_cache",
        None,
        str,
        "Folder that keeps reference logps between runs, or none; by default mlx_lm/reference_logps in the user's "
        "cache folder",
        group="reference",
    ),
    Option(
        "reference_cache_size",
        256.0,
        float,
        "Megabytes that the folder may hold; the entries used longest ago go first",
        low=0,
        group="reference",
    ),
)

STEP_OPTIONS = (
    Option(
        "share_prompt",
        True,
        bool,
        "Compute a prompt once for both its responses, where the model allows it",
        group="step",
    ),
    Option(
        "compile",
        None,
        bool,
        "Compile the step for batches of a shape that comes often; by default on a GPU only, where it is faster",
        group="step",
    ),
    Option(
        "max_grad_norm",
        None,
        float,
        "Clip the gradient to this norm before each update; by default it is not clipped",
        low=0,
        open=("low",),
        group="step",
    ),
    Option(
        "resume",
        False,
        bool,
        "Go on from the last checkpoint in adapter_path, as if the run had not been interrupted",
        group="step",
    ),
)

RUN_OPTIONS = DATA_OPTIONS + REFERENCE_OPTIONS + STEP_OPTIONS


def is_preference(loss_type):
    """Whether a `loss_type` asks for preference training rather than for upstream's supervised training."""
    names = loss_type if isinstance(loss_type, (list, tuple)) else [loss_type]
    # An empty list is a mistake, which the check of a preference run tells.
    return not names or any(name not in (None, "sft") for name in names)

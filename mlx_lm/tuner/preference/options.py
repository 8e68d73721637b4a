"""Every option, declared once: parser, default, check, document and what a resumed run has to keep derive from here.

The options of the losses stand with their table in `loss_table.py`.
"""

import argparse
import difflib
import numbers
import operator
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from .figures import BEST

LONGEST_MESSAGE = 400
# Each step's shape is planned before the first one: for these in some minutes.
MOST_ITERS = 10**7
# The bounds of a number, how they are written, and what holds for a number that they allow.
BOUNDS = {
    "low": (">=", operator.ge),
    "above": (">", operator.gt),
    "high": ("<=", operator.le),
    "below": ("<", operator.lt),
}


class ConfigError(ValueError):
    """A user's mistake, told in one sentence: what was found, what was expected, what to do.

    A message is printed, so that control characters are taken out of it, and the middle of a long one.
    """

    def __init__(self, message):
        super().__init__(shortened(printable(str(message)), LONGEST_MESSAGE))


def first_line(error):
    """An exception's message, its first line only and without a full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")


def printable(text):
    """A text with a space for each of its control characters."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def shortened(text, size):
    """A text of at most `size` characters, the middle of a longer one left out."""
    half = (size - 5) // 2
    return text if len(text) <= size else f"{text[:half]} ... {text[-half:]}"


def shown(value):
    """A value as Python writes it on one line, its middle left out where it is long."""
    return shortened(repr(value), 65)


@dataclass(frozen=True)
class Option:
    """One key of the configuration file, and the command-line flag of the same name.

    Attributes:
        name: the key; the flag is `--` and the key with `-` for `_`.
        default: the value where neither file nor command line gives one.
        kind: the type of a value: float, int, bool or str; dict where a check of its own looks at the value; or a
            function that makes the value of what is given.
        help: one sentence without a full stop, for `--help` and LORA.md.
        low, high: the least and the largest number allowed, None where there is none.
        above, below: likewise, bounds that are not allowed themselves.
        choices: the only values allowed, where there are few.
        words: names allowed in place of a value of `kind`.
        many: whether a list of values is allowed too.
        group: the section of LORA.md that lists it.
        keep: whether a resumed run must have the value that it began with.
        allowed: the allowed values in words, where `choices` and bounds do not say.
    """

    name: str
    default: Any
    kind: Callable
    help: str
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple = ()
    words: tuple = ()
    many: bool = False
    group: str = "loss"
    keep: bool = False
    allowed: str = ""

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
        told += "."
        if self.words:
            return {"nargs": "?", "const": True, "choices": self.words, "default": None, "help": told}
        if self.kind is bool:
            return {"action": argparse.BooleanOptionalAction, "default": None, "help": told}
        shape = {"nargs": "+"} if self.many else {}
        return {"type": self.kind, "default": None, "metavar": self.kind.__name__.upper(), "help": told} | shape

    @property
    def range(self):
        """The allowed values in words, or an empty string where all are."""
        if self.allowed or self.choices:
            return self.allowed or "one of " + ", ".join(self.choices)
        bounds = ((sign, getattr(self, name)) for name, (sign, _) in BOUNDS.items())
        form = "g" if self.kind is float else "d"
        return " and ".join(f"{sign} {bound:{form}}" for sign, bound in bounds if bound is not None)

    def check(self, value):
        """`value` as this option's type; `ConfigError`, which names the key, for another type or range."""
        if value is None or self.kind is dict:
            return value
        if self.kind not in EXPECTED:
            return self.kind(value)
        if self.many and isinstance(value, (list, tuple)):
            if not value:
                raise ConfigError(f"{self.name} is an empty list; give at least one value.")
            return [self._check_one(item) for item in value]
        return self._check_one(value)

    def _check_one(self, value):
        if isinstance(value, str) and value in self.words:
            return value
        kinds = {int: numbers.Integral, float: numbers.Real}.get(self.kind, self.kind)
        sound = isinstance(value, kinds) and (self.kind is bool or not isinstance(value, bool))
        if sound and self.kind in (float, int):
            bounds = ((holds, getattr(self, name)) for name, (_, holds) in BOUNDS.items())
            sound = value == value and all(bound is None or holds(value, bound) for holds, bound in bounds)
            sound = sound and (self.kind is int or abs(value) <= sys.float_info.max)
        if sound and (not self.choices or value in self.choices):
            return self.kind(value)
        expected = " or ".join((EXPECTED[self.kind], *self.words))
        expected += f", {self.range}" if self.range else ""
        expected += ", without quotes" if self.kind is not str and isinstance(value, str) else ""
        raise ConfigError(f"{self.name} is {shown(value)}{nearest(value, self.choices)}; it must be {expected}.")


class Unset(int):
    """A number that stands where nobody gave one, told from the same number given."""


class OfFlag:
    """What a flag gave, told from the same in a file."""


def of_flag(kind):
    """The type of a flag's values, int or float under its own name, which the parser tells."""
    return type(kind.__name__, (OfFlag, kind), {})


# The options' groups, in the order of `--help` and LORA.md.
GROUPS = {
    "loss": "Loss",
    "data": "Data",
    "reference": "Reference",
    "step": "Step",
    "watch": "Watching",
    "save": "Saving",
    "test": "Check and test",
}
UPSTREAM_GROUP = "Run (mlx-lm's own keys)"

EXPECTED = {float: "a finite number", int: "a whole number", bool: "true or false", str: "a name"}


def size(value):
    """A number of bytes, given as such or as text like 500MB or 1.5GB; `ConfigError` for anything else."""
    found = re.fullmatch(r"(\d{1,18}|\d{0,18}\.\d{1,18})\s*([MG]B?)?", str(value).strip(), re.IGNORECASE | re.ASCII)
    if found is None or isinstance(value, (bool, float)):
        raise ConfigError(
            f"clear_cache_threshold is {shown(value)}; it must be bytes, such as 2000000000, 500MB or 2GB."
        )
    return int(float(found[1]) * {"": 1, "M": 10**6, "G": 10**9}[(found[2] or "").upper().rstrip("B")])


def nearest(word, known):
    """A hint that names the known word most like `word`, or an empty string where none is like it."""
    known = {str(name).lower(): name for name in known}
    close = difflib.get_close_matches(str(word)[:100].lower(), list(known), n=1)
    return f" (did you mean {known[close[0]]}?)" if close else ""


_data, _reference, _step, _watch, _save, _test = (partial(Option, group=group) for group in GROUPS if group != "loss")
# Options of a preference run besides those of its loss, which stand with the losses in `loss_table.py`.
RUN_OPTIONS = (
    _data("prompt_feature", "prompt", str, "key of a row's prompt"),
    _data("chosen_feature", "chosen", str, "key of a row's preferred response"),
    _data("rejected_feature", "rejected", str, "key of a row's rejected response"),
    _data("use_chat_template", True, bool, "use a chat template, if there is one; false trains strings as they stand"),
    _data(
        "score", "assistant", str, "score the model's own turns, or users' and tools' too", choices=("assistant", "all")
    ),
    _data("score_difference", None, str, "what to make of score_chosen - score_rejected", choices=("margin", "weight")),
    _data("score_scale", 1.0, float, "factor of that difference", above=0),
    _data("min_score_difference", None, float, "leave out rows whose score_chosen - score_rejected is below this"),
    _data("valid_share", None, float, "share of training rows held out, without a validation set", above=0, below=1),
    _reference(
        "reference_model", None, str, "folder or hub repo of the reference; not set, the model as it begins", keep=True
    ),
    _reference(
        "reference_batch_size", None, int, "pairs a batch of the reference pass; by default what memory allows", low=1
    ),
    _reference("reference_cache", None, str, "folder of reference logps, or none; not set, one in the user's cache"),
    _reference("reference_cache_size", 256.0, float, "megabytes that it may hold; the latest used stay", low=0),
    _step("use_rslora", False, bool, "multiply LoRA's scale by its rank's square root (rsLoRA)"),
    _step("lora_plus_ratio", None, float, "factor of lora_b's learning rate (LoRA+); not set, 1", above=0, keep=True),
    _step(
        "router_aux_loss_coef",
        None,
        float,
        "factor of the loss that keeps a mixture's experts evenly used; 0 reports their shares only; not set, neither",
        low=0,
        keep=True,
    ),
    _step("epochs", None, float, "train on all pairs so many times, in place of iters", above=0),
    _step("share_prompt", True, bool, "compute a prompt once for both responses, where the model allows it", keep=True),
    _step("compile", None, bool, "compile the step for each shape of a batch; by default on a GPU only"),
    _step("group_by_length", True, bool, "put pairs of like length together, anew each epoch", keep=True),
    _step("max_grad_norm", None, float, "clip each update's gradient to this norm; not set, none", above=0, keep=True),
    _watch("sample_prompts", 0, int, "validation prompts to answer greedily at the start and at validations", low=0),
    _save(
        "resume", False, bool, "go on from adapter_path's last checkpoint; auto, where there is one", words=("auto",)
    ),
    _save("keep_checkpoints", 2, int, "complete states kept to go on from, the newest ones", low=1),
    _save(
        "save_best",
        None,
        str,
        "keep the best validation's adapters in adapter_path/best, by this figure",
        choices=tuple(BEST),
        keep=True,
    ),
    _save("early_stop", None, int, "end after so many validations without a gain in save_best or eval_loss", low=1),
    _save(
        "on_nonfinite",
        "stop",
        str,
        "what an update does whose loss or gradient is not finite: end the run, or leave that update out",
        choices=("stop", "skip"),
        keep=True,
    ),
    _test("check", False, bool, "a dry run: print what a run would read, the memory it takes, and what would stop it"),
    _test("steps", None, int, "steps that a dry run times, to say how long a run would take", low=1),
    _test("predictions", None, str, "file of JSON lines for each tested pair's logps, rewards and line; not set, none"),
    _test(
        "compare",
        None,
        str,
        "test two adapters, each a folder, a file or none for the model itself, and say whether they differ",
        many=True,
        allowed="a list of two",
    ),
)

# mlx-lm's own keys, in the order of a run, with its defaults: it takes any value and fails later.
UPSTREAM_OPTIONS = (
    Option("model", "", str, "folder or Hugging Face repo of the model; a quantized one is trained as QLoRA"),
    Option("train", False, bool, "train"),
    Option("test", False, bool, "score the test set, after training if there is any, with --no-train alone"),
    Option("data", "", str, "folder with train.jsonl, valid.jsonl and test.jsonl, or a Hugging Face data set"),
    Option("adapter_path", "adapters", str, "folder of the run; of a test a folder or file of adapters, or none"),
    Option("fine_tune_type", "lora", str, "LoRA, DoRA, or the weights", choices=("lora", "dora", "full"), keep=True),
    Option("num_layers", 16, int, "train the last so many layers; -1 takes all", low=-1),
    Option(
        "lora_parameters",
        None,
        dict,
        "scale multiplies the low-rank product; keys name the layers",
        allowed="rank, scale, dropout, keys",
        keep=True,
    ),
    Option("batch_size", 4, int, "pairs in a batch, over all workers", low=1, keep=True),
    Option("iters", 1000, int, "batches to train on", low=1, high=MOST_ITERS),
    Option("grad_accumulation_steps", 1, int, "batches an update", low=1, keep=True),
    Option("learning_rate", 1e-5, float, "the optimizer's, where there is no lr_schedule", low=0, keep=True),
    Option(
        "lr_schedule",
        None,
        dict,
        "a schedule of MLX; its numbers count updates",
        allowed="name, arguments, warmup, warmup_init",
        keep=True,
    ),
    Option("optimizer", "adam", str, "the optimizer", choices=("adam", "adamw", "muon", "sgd", "adafactor"), keep=True),
    Option(
        "optimizer_config", None, dict, "arguments besides the rate", allowed="an object for each optimizer", keep=True
    ),
    Option("seed", 0, int, "of adapters' first values, batches' order, dropout", low=0, high=2**32 - 1, keep=True),
    Option("max_seq_length", 2048, int, "tokens of a prompt with its longer response; more is cut", low=2, keep=True),
    Option("grad_checkpoint", False, bool, "compute each layer again in the backward pass: less memory, more time"),
    Option("clear_cache_threshold", 0, size, "free MLX's cache beyond this; 0, when it would be much", allowed="bytes"),
    Option("val_batches", 25, int, "batches of a validation; -1 takes the whole set, 0 leaves validation out", low=-1),
    Option("test_batches", 500, int, "batches of the test; -1 takes the whole set", low=-1),
    Option("steps_per_report", 10, int, "batches from one report to the next", low=1),
    Option("steps_per_eval", 200, int, "batches from one validation to the next", low=1),
    Option("save_every", 100, int, "batches from one checkpoint to the next", low=1),
    Option("resume_adapter_file", None, str, "adapters to start from; they belong to the reference"),
    Option(
        "report_to",
        None,
        str,
        "send the reports there too",
        allowed="wandb, swanlab, tensorboard, several with commas, or none",
    ),
    Option("project_name", None, str, "the project's name there"),
    Option("trust_remote_code", False, bool, "run code that comes with the model or tokenizer"),
    Option("mask_prompt", False, bool, "not read in preference training, which scores responses only"),
)


def is_preference(loss_type):
    """Whether a `loss_type` asks for preference training rather than for upstream's supervised training."""
    names = loss_type if isinstance(loss_type, (list, tuple)) else [loss_type]
    # An empty list is a mistake, which the check of a preference run tells.
    return not names or any(name not in (None, "sft") for name in names)

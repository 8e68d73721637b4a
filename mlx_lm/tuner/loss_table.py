"""The table of preference losses and their options, from which checks, help and documents come."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

from .options import Option
from .preference_losses import (
    aot,
    aot_unpaired,
    apo_down,
    apo_zero,
    bco_pair,
    cpo,
    discopop,
    dpo,
    dpop,
    exo_pair,
    hinge,
    ipo,
    nca_pair,
    orpo,
    robust,
    sft,
    sigmoid_norm,
    simpo,
    sppo_hard,
)


@dataclass(frozen=True)
class Loss:
    """One row of the table of losses.

    Attributes:
        name: the value of loss_type.
        function: takes a `PairLogps` and its parameters as keywords, returns (B,).
        description: what a pair loses, in the words of `preference_losses`.
        source: the arXiv number of the paper.
        needs_reference: whether it reads the reference logps.
        f_divergence: whether it reads nothing of the logps but the pair's gap of logratios, so that
            another f-divergence may stand in for the reverse KL.
        reads_margins: whether it has a pair's logit, which a margin lowers.
        sorts_batch: its values belong to quantiles of the batch, not to pairs.
        is_likelihood: it is the chosen response's likelihood and has no logratio: it goes with any other
            loss and its settings.
        mean_rewards: without a reference, whether its rewards are means over tokens rather than sums.
        defaults: defaults that differ from the options', by parameter.
        lowest: the lowest value that it can work with where that is above the option's, by parameter.
    """

    name: str
    function: Callable
    description: str
    source: str
    needs_reference: bool = True
    f_divergence: bool = False
    reads_margins: bool = False
    sorts_batch: bool = False
    is_likelihood: bool = False
    mean_rewards: bool = False
    defaults: dict = field(default_factory=dict)
    lowest: dict = field(default_factory=dict)

    @cached_property
    def parameters(self):
        """The options that the function itself reads: its keyword-only parameters."""
        signature = inspect.signature(self.function).parameters.values()
        return tuple(parameter.name for parameter in signature if parameter.kind is parameter.KEYWORD_ONLY)

    @cached_property
    def options(self):
        """The options that take effect with this loss, those of the reference and of the batch included."""
        options = self.parameters
        if self.f_divergence:
            options += ("f_divergence_type", "f_alpha_divergence_coef")
        if self.needs_reference:
            options += ("ld_alpha", "reference_update_steps")
        if not self.sorts_batch:
            options += ("use_weighting",)
        return options

    def default(self, parameter):
        """The value of `parameter` where the user gives none."""
        return self.defaults.get(parameter, OPTION[parameter].default)


# 1 / (2 beta) squared must stay far below float32's largest number.
SMALLEST_DIVISOR = {"beta": 1e-6}

PAIR = {"f_divergence": True, "reads_margins": True}
REFERENCE_FREE = {"needs_reference": False, "reads_margins": True}

TABLE = (
    Loss("dpo", dpo, "-(1 - eps) log sigma(h) - eps log sigma(-h)", "2305.18290", **PAIR),
    Loss("robust", robust, "(-(1 - eps) log sigma(h) + eps log sigma(-h)) / (1 - 2 eps)", "2403.00409", **PAIR),
    Loss("hinge", hinge, "max(0, 1 - h)", "2305.10425", **PAIR),
    Loss("ipo", ipo, "(mean logratio gap - (1/2 + margin) / beta)^2", "2310.12036", **PAIR, lowest=SMALLEST_DIVISOR),
    Loss("sigmoid_norm", sigmoid_norm, "-log sigma(beta x mean logratio gap - margin)", "2405.14734", **PAIR),
    Loss(
        "exo_pair",
        exo_pair,
        "KL of (sigma(h), sigma(-h)) from (1 - eps, eps)",
        "2402.00856",
        **PAIR,
        defaults={"label_smoothing": 1e-3},
        lowest={"label_smoothing": 1e-12},
    ),
    Loss("nca_pair", nca_pair, "-log sigma(rc) - 1/2 log sigma(-rc) - 1/2 log sigma(-rr)", "2402.05369"),
    Loss("bco_pair", bco_pair, "-log sigma(rc) - log sigma(-rr)", "2404.04656"),
    Loss(
        "sppo_hard",
        sppo_hard,
        "(chosen logratio - 1/(2 beta))^2 + (rejected logratio + 1/(2 beta))^2",
        "2405.00675",
        lowest=SMALLEST_DIVISOR,
    ),
    Loss("apo_zero", apo_zero, "1 - sigma(rc) + sigma(rr)", "2408.06266"),
    Loss("apo_down", apo_down, "sigma(rc) + 1 - sigma(h)", "2408.06266", reads_margins=True),
    Loss(
        "discopop",
        discopop,
        "-log sigma(h) x (1 - m) + exp(-h) x m, m = sigma(h / tau)",
        "2406.08414",
        **PAIR,
    ),
    Loss("aot", aot, "dpo between sorted policy gaps and sorted reference gaps", "2406.05882", sorts_batch=True),
    Loss(
        "aot_unpaired",
        aot_unpaired,
        "dpo between sorted chosen and sorted rejected logratios",
        "2406.05882",
        sorts_batch=True,
    ),
    Loss(
        "sft",
        sft,
        "in a list: mean NLL of the chosen tokens",
        "2411.10442",
        needs_reference=False,
        is_likelihood=True,
    ),
    Loss("dpop", dpop, "dpo with h - beta x lambda x max(0, -chosen logratio)", "2402.13228", reads_margins=True),
    Loss(
        "simpo",
        simpo,
        "dpo's with h = beta x mean logp gap - gamma - margin",
        "2405.14734",
        **REFERENCE_FREE,
        mean_rewards=True,
        defaults={"beta": 2.0},
    ),
    Loss(
        "orpo",
        orpo,
        "sft - beta x log sigma(log odds gap - margin)",
        "2403.07691",
        **REFERENCE_FREE,
        mean_rewards=True,
    ),
    Loss("cpo", cpo, "dpo's with h = beta x logp gap - margin, + alpha x sft", "2401.08417", **REFERENCE_FREE),
)

ALIASES = {"sigmoid": "dpo"}

LOSSES = {loss.name: loss for loss in TABLE}
LOSSES.update({alias: LOSSES[name] for alias, name in ALIASES.items()})

OPTIONS = (
    Option(
        "loss_type",
        "sft",
        str,
        "what to train: sft for upstream's training, one preference loss, or a list of them",
        choices=tuple(LOSSES),
        many=True,
    ),
    Option("loss_weights", None, float, "a factor for each loss of the list, 1 each by default", low=0, many=True),
    Option("beta", 0.1, float, "reward per nat of logratio; 0 leaves the reference out", low=0),
    Option(
        "label_smoothing",
        0.0,
        float,
        "eps, the share of pairs taken as wrongly labelled",
        low=0,
        high=0.5,
        open=("high",),
    ),
    Option(
        "f_divergence_type",
        "reverse_kl",
        str,
        "the divergence that holds the policy to the reference",
        choices=("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
    ),
    Option("f_alpha_divergence_coef", 0.5, float, "alpha of alpha_divergence"),
    # Below 1e-6 h / tau leaves float32.
    Option("discopop_tau", 0.05, float, "tau, the width of discopop's blend", low=1e-6),
    Option(
        "ld_alpha", None, float, "weight of logps beyond the shorter response's length; not set, none", low=0, high=1
    ),
    Option("use_weighting", False, bool, "weigh pairs by how likely the policy is to write them (WPO)"),
    Option("dpop_lambda", 50.0, float, "lambda, the factor of dpop's penalty", low=0),
    Option("simpo_gamma", 0.5, float, "gamma, the margin that simpo aims at", low=0),
    Option("cpo_alpha", 1.0, float, "alpha, the factor of cpo's NLL", low=0),
    Option(
        "reference_update_steps",
        None,
        int,
        "take the current policy as the reference every so many updates (TR-DPO); not set, never",
        low=1,
    ),
)

OPTION = {option.name: option for option in OPTIONS}


def describe_losses():
    """The losses as Markdown: what the letters of the formulas mean, then a table with one row a loss."""
    words = (
        "Here rc and rr are beta x chosen and beta x rejected logratio, h = rc - rr - margin, a gap is chosen minus "
        "rejected, a mean is over a response's tokens, and eps is `label_smoothing`."
    )
    rows = [
        (
            f"`{loss.name}`" + "".join(f", `{alias}`" for alias, name in ALIASES.items() if name == loss.name),
            loss.description,
            ", ".join(f"`{name}` ({_parameter_range(loss, name)})" for name in loss.parameters),
            "yes" if loss.needs_reference else "no",
            f"[{loss.source}](https://arxiv.org/abs/{loss.source})",
        )
        for loss in TABLE
    ]
    return words + "\n\n" + markdown_table(("loss_type", "a pair's loss", "reads", "reference", "source"), rows)


def options_table(options):
    """A Markdown table of `options`: name, default, allowed values, meaning."""
    rows = [
        (
            f"`{option.name}`",
            "not set" if option.default is None else f"`{str(option.default).lower()}`",
            option.range + (", or a list" if option.many else ""),
            option.help,
        )
        for option in options
    ]
    return markdown_table(("option", "default", "allowed", "meaning"), rows)


def markdown_table(header, rows):
    """A Markdown table of the strings of `header` and `rows`."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _parameter_range(loss, name):
    option = OPTION[name]
    if name in loss.lowest:
        option = replace(option, low=loss.lowest[name])
    return f"{loss.default(name):g}, {option.range}"

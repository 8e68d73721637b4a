"""The table of preference losses and their options, from which checks, help and documents come.

To add a loss, write its function in `losses.py` and its row here.
"""

import inspect
import textwrap
from dataclasses import dataclass, field
from functools import cached_property, partial

from .. import losses as formulas
from .options import Option


@dataclass(frozen=True)
class Loss:
    """One row of the table of losses.

    Attributes:
        name: the value of loss_type, and of the function in `losses.py`.
        description: what a pair loses, in the words of `losses.py`.
        source: the arXiv number of the paper.
        needs_reference: whether it reads the reference logps.
        f_divergence: whether it reads nothing of the logps but the pair's gap of logratios, so that
            another f-divergence may stand in for the reverse KL.
        reads_margins: whether it has a pair's logit, which a margin lowers.
        sorts_batch: its values belong to quantiles of the batch, not to pairs.
        has_nll: it holds the NLL of the batch's chosen tokens, so that a pair's value depends on the other pairs, and
            beta does not multiply all of it.
        is_likelihood: it is the chosen response's likelihood and has no logratio: it goes with any other
            loss and its settings.
        unpaired: it reads single responses with labels, not pairs, and goes with no other loss.
        mean_rewards: without a reference, whether its rewards are means over tokens rather than sums.
        defaults: defaults that differ from the options', by parameter.
        lowest: the lowest value that it can work with where that is above the option's, by parameter.
    """

    name: str
    description: str
    source: str
    needs_reference: bool = True
    f_divergence: bool = False
    reads_margins: bool = False
    sorts_batch: bool = False
    has_nll: bool = False
    is_likelihood: bool = False
    unpaired: bool = False
    mean_rewards: bool = False
    defaults: dict = field(default_factory=dict)
    lowest: dict = field(default_factory=dict)

    @property
    def function(self):
        """What takes a `PairLogps` and its parameters as keywords, and returns (B,)."""
        return getattr(formulas, self.name)

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
            options += ("reference_update_steps", "reference_mixup_alpha", *(() if self.unpaired else ("ld_alpha",)))
        return options if self.unpaired or self.sorts_batch else (*options, "use_weighting")

    def default(self, parameter):
        """The value of `parameter` where the user gives none."""
        return self.defaults.get(parameter, OPTION[parameter].default)


# What several rows have in common.
PAIR = {"f_divergence": True, "reads_margins": True}
FREE = {"needs_reference": False, "reads_margins": True}
MEAN = FREE | {"mean_rewards": True}
LIKELIHOOD = {"needs_reference": False, "is_likelihood": True, "has_nll": True}
# 1 / (2 beta) squared must stay far below float32's largest number.
DIVIDES = {"lowest": {"beta": 1e-6}}
# The logarithm of eps is taken.
SMOOTHED = {"defaults": {"label_smoothing": 1e-3}, "lowest": {"label_smoothing": 1e-12}}

TABLE = (
    Loss("dpo", "-(1 - eps) log sigma(h) - eps log sigma(-h)", "2305.18290", **PAIR),
    Loss("robust", "(-(1 - eps) log sigma(h) + eps log sigma(-h)) / (1 - 2 eps)", "2403.00409", **PAIR),
    Loss("hinge", "max(0, 1 - h)", "2305.10425", **PAIR),
    Loss("ipo", "(mean logratio gap - (1/2 + margin) / beta)^2", "2310.12036", **PAIR, **DIVIDES),
    Loss("sigmoid_norm", "-log sigma(beta x mean logratio gap - margin)", "2405.14734", **PAIR),
    Loss("exo_pair", "KL of (sigma(h), sigma(-h)) from (1 - eps, eps)", "2402.00856", **PAIR, **SMOOTHED),
    Loss("nca_pair", "-log sigma(rc) - 1/2 log sigma(-rc) - 1/2 log sigma(-rr)", "2402.05369"),
    Loss("bco_pair", "-log sigma(rc) - log sigma(-rr)", "2404.04656"),
    Loss("sppo_hard", "(chosen logratio - 1/(2 beta))^2 + (rejected logratio + 1/(2 beta))^2", "2405.00675", **DIVIDES),
    Loss("apo_zero", "1 - sigma(rc) + sigma(rr)", "2408.06266"),
    Loss("apo_down", "sigma(rc) + 1 - sigma(h)", "2408.06266", reads_margins=True),
    Loss("discopop", "-log sigma(h) x (1 - m) + exp(-h) x m, m = sigma(h / tau)", "2406.08414", **PAIR),
    Loss("aot", "dpo between sorted policy gaps and sorted reference gaps", "2406.05882", sorts_batch=True),
    Loss("aot_unpaired", "dpo between sorted chosen and sorted rejected logratios", "2406.05882", sorts_batch=True),
    Loss("sft", "in a list: mean NLL of the chosen tokens", "2411.10442", **LIKELIHOOD),
    Loss("dpop", "dpo with h - beta x lambda x max(0, -chosen logratio)", "2402.13228", reads_margins=True),
    Loss("simpo", "dpo's with h = beta x mean logp gap - gamma - margin", "2405.14734", **MEAN, defaults={"beta": 2.0}),
    Loss("orpo", "sft - beta x log sigma(log odds gap - margin)", "2403.07691", **MEAN, has_nll=True),
    Loss("cpo", "dpo's with h = beta x logp gap - margin, + alpha x sft", "2401.08417", **FREE, has_nll=True),
    Loss("kto", "w sigma(beta kl - r) if desirable, else w sigma(r - beta kl)", "2402.01306", unpaired=True),
)

ALIASES = {"sigmoid": "dpo"}

# What the letters of the descriptions mean.
LETTERS = (
    "Here rc and rr are beta x chosen and beta x rejected logratio, r is a single response's, h = rc - rr - margin, a "
    "gap is chosen minus rejected, a mean is over a response's tokens, and eps is label_smoothing."
)

LOSSES = {loss.name: loss for loss in TABLE}
LOSSES.update({alias: LOSSES[name] for alias, name in ALIASES.items()})

# A resumed run must have the loss that it began with.
_option = partial(Option, keep=True)

LOSS_OPTIONS = (
    _option(
        "loss_type",
        "sft",
        str,
        "what to train: sft for upstream's training, one preference loss, or a list of them",
        choices=tuple(LOSSES),
        many=True,
    ),
    _option("loss_weights", None, float, "a factor for each loss of the list, 1 each by default", low=0, many=True),
    _option("beta", 0.1, float, "reward per nat of logratio; 0 leaves the reference out", low=0),
    _option("label_smoothing", 0.0, float, "eps, the share of pairs taken as wrongly labelled", low=0, below=0.5),
    _option(
        "f_divergence_type",
        "reverse_kl",
        str,
        "the divergence that holds the policy to the reference",
        choices=("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
    ),
    _option("f_alpha_divergence_coef", 0.5, float, "alpha of alpha_divergence"),
    # Below 1e-6 h / tau leaves float32.
    _option("discopop_tau", 0.05, float, "tau, the width of discopop's blend", low=1e-6),
    _option(
        "ld_alpha", None, float, "weight of logps beyond the shorter response's length; not set, none", low=0, high=1
    ),
    _option("use_weighting", False, bool, "weigh pairs by how likely the policy is to write them (WPO)"),
    _option("dpop_lambda", 50.0, float, "lambda, the factor of dpop's penalty", low=0),
    _option("simpo_gamma", 0.5, float, "gamma, the margin that simpo aims at", low=0),
    _option("cpo_alpha", 1.0, float, "alpha, the factor of cpo's NLL", low=0),
    _option("desirable_weight", 1.0, float, "factor of the loss of desirable responses", low=0),
    _option("undesirable_weight", 1.0, float, "factor of the loss of undesirable responses", low=0),
    _option(
        "reference_update_steps",
        None,
        int,
        "take the current policy as the reference every so many updates (TR-DPO); not set, never",
        low=1,
    ),
    _option(
        "reference_mixup_alpha",
        None,
        float,
        "the policy's share in the reference that is taken then, the rest being the one before; not set, all of it",
        above=0,
        high=1,
    ),
)

OPTION = {option.name: option for option in LOSS_OPTIONS}


def names_of(loss):
    """The values of loss_type that name a `Loss`."""
    return loss.name, *(alias for alias, name in ALIASES.items() if name == loss.name)


def describe_losses():
    """The losses for `--help`: a line each with what a pair loses and the paper."""
    lines = [f"  {', '.join(names_of(loss)):14}{loss.description}; {loss.source}" for loss in TABLE]
    # argparse sets them in by two columns.
    head = "values of --loss-type, what a pair loses, and where on arXiv the paper is:"
    return "\n".join([head, *lines, *textwrap.wrap(LETTERS, 98)])


LOSS_DEFAULTS = {name: option.default for name, option in OPTION.items() if name not in ("loss_type", "loss_weights")}

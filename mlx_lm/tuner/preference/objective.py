"""The table of preference losses and their options, and the loss that a configuration asks for.

Checks, help and documents come from the table. To add a loss, write its function in `losses.py` and its row here.
"""

import inspect
import textwrap
from dataclasses import dataclass, field
from functools import cached_property, partial

import mlx.core as mx

from .. import losses as formulas
from ..losses import PairLogps, mean_logps, with_f_divergence
from .options import ConfigError, Option


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


def preference_loss(loss_type, loss_weights=None, **parameters):
    """The preference loss that a configuration asks for, with everything checked that can be without data.

    Args:
        loss_type: a name, or a list of names.
        loss_weights: a factor for each name, 1 by default.
        parameters: options of `LOSS_OPTIONS` by name, only those that the user gave; None counts as not given.

    Returns:
        A `PreferenceLoss`.

    Raises:
        ConfigError: an unknown name, a value out of range, settings that exclude each other, or a value other
            than the default for an option that none of the losses reads.
    """
    names = _checked_names(loss_type)
    weights = _checked_weights(loss_weights, names)
    given = {name: OPTION[name].check(value) for name, value in parameters.items() if value is not None}
    losses = [LOSSES[name] for name in names]
    _refuse_clashes({**LOSS_DEFAULTS, **given}, losses)
    _refuse_unread(given, names, losses)
    resolved = {**LOSS_DEFAULTS, **_own_defaults(losses, given), **given}
    _refuse_too_low(resolved, losses)
    return PreferenceLoss(names, weights, {name: resolved[name] for name in LOSS_DEFAULTS if name in _options(losses)})


def loss_of(args):
    """The `PreferenceLoss` that the options in `args`, a namespace, ask for; raises as `preference_loss`."""
    return preference_loss(**{option.name: getattr(args, option.name) for option in LOSS_OPTIONS})


def refuse_without_gradient(loss):
    """Raise `ConfigError` where beta is 0 and multiplies all of a loss: its gradient is zero whatever the logps."""
    if loss.parameters["beta"] == 0 and not loss.has_nll:
        raise ConfigError(
            f"beta is 0, with which {', '.join(loss.names)} has no gradient and nothing is trained; give a beta above "
            "0, or add sft to loss_type."
        )


class PreferenceLoss:
    """One loss or a weighted list of losses, checked and ready to use; made by `preference_loss`.

    Attributes:
        names: the losses, as the user wrote them.
        weights: a float for each.
        parameters: every option that takes effect, with its value.
        needs_reference: whether reference logps are read; not where beta is 0, which multiplies them away.
        reads_wpo: whether `__call__` needs WPO's weights.
        reads_margins, sorts_batch, has_nll, unpaired: what a `Loss` has, where one of them has it.
        reads_batch: whether a pair's value depends on the other pairs of its batch.
        ld_alpha: weight of the tokens beyond the shorter response's length, or None.
    """

    def __init__(self, names, weights, parameters):
        self.names, self.weights, self.parameters = tuple(names), tuple(weights), parameters
        self._losses = [LOSSES[name] for name in names]
        self._reads_reference = any(loss.needs_reference for loss in self._losses)
        self._mean_rewards = next((loss.mean_rewards for loss in self._losses if not loss.is_likelihood), False)
        self._divergence = tuple(
            parameters.get(name, LOSS_DEFAULTS[name]) for name in ("f_divergence_type", "f_alpha_divergence_coef")
        )
        self.needs_reference = self._reads_reference and parameters["beta"] != 0
        self.reads_wpo = parameters.get("use_weighting", False)
        self.reads_margins = any(loss.reads_margins for loss in self._losses)
        self.sorts_batch = any(loss.sorts_batch for loss in self._losses)
        self.unpaired = any(loss.unpaired for loss in self._losses)
        self.has_nll = any(loss.has_nll for loss in self._losses)
        self.reads_batch = self.sorts_batch or self.unpaired or self.has_nll
        self.ld_alpha = parameters.get("ld_alpha")

    def __call__(self, pairs, wpo_weights=None):
        """The weighted sum of the losses.

        Args:
            pairs: `PairLogps` of B pairs.
            wpo_weights: (B,) float32 of the function of that name; read where `reads_wpo` is set.

        Returns:
            (B,) float32; its mean is the batch's loss.

        Raises:
            ValueError: fields of different lengths.
        """
        _check_shapes(pairs)
        scored = with_f_divergence(pairs, *self._divergence)
        total = 0.0
        for loss, weight in zip(self._losses, self.weights, strict=True):
            values = loss.function(scored, **{name: self.parameters[name] for name in loss.parameters})
            if self.reads_wpo:
                values = values * wpo_weights
            total = total + weight * values
        return total

    def rewards(self, pairs):
        """The rewards of both responses, the same in every loss whatever its f-divergence.

        Args:
            pairs: `PairLogps` of B pairs.

        Returns:
            (chosen, rejected), each (B,) float32: beta x logratio; where no loss reads a reference,
            beta x the policy's logps, divided by the length if the first of the losses is simpo or orpo.
        """
        if self._reads_reference:
            chosen, rejected = pairs.chosen_logratios, pairs.rejected_logratios
        elif self._mean_rewards:
            chosen, rejected = mean_logps(pairs)
        else:
            chosen, rejected = pairs.policy_chosen, pairs.policy_rejected
        beta = self.parameters["beta"]
        return beta * chosen, beta * rejected


def _check_shapes(pairs):
    shape = pairs.policy_chosen.shape
    for name, value in zip(PairLogps._fields, pairs, strict=True):
        if isinstance(value, mx.array) and value.shape not in (shape, ()):
            raise ValueError(f"pairs.{name} has shape {value.shape}; policy_chosen has {shape}: give one value a pair.")


def _options(losses):
    # beta scales the rewards of every loss.
    return {"beta"}.union(*(loss.options for loss in losses))


def _checked_names(loss_type):
    checked = OPTION["loss_type"].check(loss_type)
    if checked in (None, "sft"):
        raise ConfigError(
            "loss_type is sft, which is upstream's training and no preference loss; name a preference loss, or put "
            "sft in a list to add the chosen responses' NLL to others."
        )
    return [checked] if isinstance(checked, str) else checked


def _checked_weights(loss_weights, names):
    weights = OPTION["loss_weights"].check(loss_weights)
    if weights is None:
        return [1.0] * len(names)
    weights = weights if isinstance(weights, list) else [weights]
    if len(weights) != len(names):
        raise ConfigError(
            f"loss_weights is {weights}, but loss_type has {', '.join(names)}: give one for each, {len(names)} in all."
        )
    if not any(weights):
        raise ConfigError(f"loss_weights is {weights}; one of them must be above 0.")
    return weights


def _refuse_unread(given, names, losses):
    for name, value in given.items():
        if name in _options(losses) or value == OPTION[name].default:
            continue
        readers = ", ".join(loss for loss in LOSSES if name in LOSSES[loss].options)
        raise ConfigError(
            f"{name} is {value}, but loss_type {', '.join(names)} does not read it; remove it, or choose one that "
            f"does: {readers}."
        )


def _own_defaults(losses, given):
    own = {}
    for name in set(LOSS_DEFAULTS) - set(given):
        found = {loss.name: loss.default(name) for loss in losses if name in loss.parameters}
        if len(set(found.values())) > 1:
            told = ", ".join(f"{value} for {loss}" for loss, value in found.items())
            raise ConfigError(f"{name} has no one default for this loss_type ({told}); give {name}.")
        if found:
            own[name] = next(iter(found.values()))
    return own


def _refuse_too_low(resolved, losses):
    for loss in losses:
        for name, lowest in loss.lowest.items():
            if resolved[name] < lowest:
                advice = f"its default is {loss.default(name)}"
                raise ConfigError(f"{name} is {resolved[name]}, but {loss.name} needs at least {lowest:g}; {advice}.")


def _refuse_clashes(values, losses):
    single = [loss.name for loss in losses if loss.unpaired]
    if single and len(losses) > 1:
        raise ConfigError(
            f"loss_type has {single[0]} with others, but it reads single responses, not pairs; name it alone."
        )
    if single and not (values["desirable_weight"] or values["undesirable_weight"]):
        raise ConfigError("desirable_weight and undesirable_weight are 0, with which nothing is trained; raise one.")
    divergence, coef = values["f_divergence_type"], values["f_alpha_divergence_coef"]
    without = [loss.name for loss in losses if not (loss.f_divergence or loss.is_likelihood)]
    if divergence != "reverse_kl" and without:
        raise ConfigError(
            f"f_divergence_type is {divergence}, but {', '.join(without)} has no form for it; use reverse_kl, or only "
            f"losses that have: {', '.join(name for name in LOSSES if LOSSES[name].f_divergence)}."
        )
    if divergence != "alpha_divergence" and coef != LOSS_DEFAULTS["f_alpha_divergence_coef"]:
        raise ConfigError(
            f"f_alpha_divergence_coef is {coef}, but f_divergence_type is {divergence}, which does not read it; remove "
            "it, or set f_divergence_type to alpha_divergence."
        )
    sorting = [loss.name for loss in losses if loss.sorts_batch]
    if values["use_weighting"] and sorting:
        raise ConfigError(
            f"use_weighting weighs pairs, but {', '.join(sorting)} sorts the batch, so that its values are no pair's; "
            "remove one of the two."
        )
    free = [loss.name for loss in losses if not (loss.needs_reference or loss.is_likelihood)]
    if values["ld_alpha"] is not None and free:
        raise ConfigError(
            f"ld_alpha weighs the tokens of a logratio, and {', '.join(free)} has none; remove ld_alpha or that loss."
        )
    if values["reference_mixup_alpha"] is not None and values["reference_update_steps"] is None:
        raise ConfigError(
            "reference_mixup_alpha is set, but reference_update_steps is not, and the reference stays; set that too."
        )
    if values["reference_update_steps"] is not None and values["beta"] == 0:
        raise ConfigError("reference_update_steps is set, but beta 0 leaves the reference out; remove one of the two.")

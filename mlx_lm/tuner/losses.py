"""Adds to mlx_lm.tuner.losses: the preference losses, and `preference_loss`, which checks and combines them.

`preference_losses` holds the losses themselves, `loss_table` the table of them and their options; the
names of both are exported here. To add a loss, write its function there and its row in the table.
"""

from .._upstream import run_upstream

run_upstream(globals(), needs=("kl_div_loss", "js_div_loss"))

import math  # noqa: E402

import mlx.core as mx  # noqa: E402

from .loss_table import (  # noqa: E402, F401
    ALIASES,
    LOSSES,
    OPTION,
    OPTIONS,
    Loss,
    describe_losses,
    options_table,
)
from .options import ConfigError, nearest  # noqa: E402
from .preference_losses import (  # noqa: E402, F401
    PairLogps,
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
    f_divergence_scores,
    hinge,
    ipo,
    ld_token_weights,
    mean_logps,
    nca_pair,
    orpo,
    robust,
    sft,
    sigmoid_norm,
    simpo,
    sppo_hard,
    with_f_divergence,
    wpo_weights,
)

DEFAULTS = {option.name: option.default for option in OPTIONS if option.name not in ("loss_type", "loss_weights")}


def preference_loss(loss_type, loss_weights=None, **parameters):
    """The preference loss that a configuration asks for, with everything checked that can be without data.

    Args:
        loss_type: a name, or a list of names.
        loss_weights: a factor for each name, 1 by default.
        parameters: options of `OPTIONS` by name, only those that the user gave; None counts as not given.

    Returns:
        A `PreferenceLoss`.

    Raises:
        ConfigError: an unknown name or option, a value out of range, settings that exclude each other, or
            a value other than the default for an option that none of the losses reads.
    """
    names = _checked_names(loss_type)
    weights = _checked_weights(loss_weights, names)
    given = _checked_parameters(parameters)
    losses = [LOSSES[name] for name in names]
    _refuse_clashes({**DEFAULTS, **given}, losses)
    _refuse_unread(given, names, losses)
    resolved = {**DEFAULTS, **_own_defaults(losses, given), **given}
    _refuse_too_low(resolved, losses)
    return PreferenceLoss(names, weights, {name: resolved[name] for name in DEFAULTS if name in _options(losses)})


class PreferenceLoss:
    """One loss or a weighted list of losses, checked and ready to use; made by `preference_loss`.

    Attributes:
        names: the losses, as the user wrote them.
        weights: a float for each.
        parameters: every option that takes effect, with its value.
        needs_reference: whether reference logps are read; not where beta is 0, which multiplies them away.
        reads_wpo: whether `__call__` needs WPO's weights.
        reads_margins: whether a pair's margin takes effect.
        sorts_batch: whether values belong to quantiles of the batch, so that weights of pairs have no meaning.
        ld_alpha: weight of the tokens beyond the shorter response's length, or None.
    """

    def __init__(self, names, weights, parameters):
        self.names, self.weights, self.parameters = tuple(names), tuple(weights), parameters
        self._losses = [LOSSES[name] for name in names]
        self._reads_reference = any(loss.needs_reference for loss in self._losses)
        self._mean_rewards = next((loss.mean_rewards for loss in self._losses if not loss.is_likelihood), False)
        self._divergence = tuple(
            parameters.get(name, DEFAULTS[name]) for name in ("f_divergence_type", "f_alpha_divergence_coef")
        )
        self.needs_reference = self._reads_reference and parameters["beta"] != 0
        self.reads_wpo = parameters.get("use_weighting", False)
        self.reads_margins = any(loss.reads_margins for loss in self._losses)
        self.sorts_batch = any(loss.sorts_batch for loss in self._losses)
        self.ld_alpha = parameters.get("ld_alpha")

    def __call__(self, pairs, wpo_weights=None):  # noqa: F811
        """The weighted sum of the losses.

        Args:
            pairs: `PairLogps` of B pairs.
            wpo_weights: (B,) float32 of the function of that name; read where `reads_wpo` is set.

        Returns:
            (B,) float32; its mean is the batch's loss.

        Raises:
            ValueError: fields of different lengths, or WPO weights missing.
        """
        _check_shapes(pairs)
        if self.reads_wpo and wpo_weights is None:
            raise ValueError("use_weighting is set, so the loss needs wpo_weights; None was given.")
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
    names = [checked] if isinstance(checked, str) else checked
    for index, name in enumerate(names):
        twin = next((other for other in names[:index] if LOSSES[other] is LOSSES[name]), None)
        if twin is not None:
            raise ConfigError(f"loss_type has {name} after {twin}, the same loss; name it once and give it a weight.")
    return names


def _checked_weights(loss_weights, names):
    weights = OPTION["loss_weights"].check(loss_weights)
    if weights is None:
        return [1.0] * len(names)
    weights = weights if isinstance(weights, list) else [weights]
    if len(weights) != len(names):
        raise ConfigError(
            f"loss_weights has {_count(weights, 'value')}, but loss_type has {_count(names, 'name')}: give one each."
        )
    if not all(math.isfinite(weight) for weight in weights) or not any(weights):
        raise ConfigError(f"loss_weights is {weights}; every weight must be finite and one of them above 0.")
    return weights


def _checked_parameters(parameters):
    given = {}
    for name, value in parameters.items():
        if name not in DEFAULTS:
            raise ConfigError(f"{name} is no option of a preference loss{nearest(name, DEFAULTS)}; remove it.")
        if value is not None:
            given[name] = OPTION[name].check(value)
            if isinstance(given[name], float) and not math.isfinite(given[name]):
                raise ConfigError(f"{name} is {value}; it must be finite.")
    return given


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
    for name in set(DEFAULTS) - set(given):
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
    divergence, coef = values["f_divergence_type"], values["f_alpha_divergence_coef"]
    without = [loss.name for loss in losses if not (loss.f_divergence or loss.is_likelihood)]
    if divergence != "reverse_kl" and without:
        raise ConfigError(
            f"f_divergence_type is {divergence}, but {', '.join(without)} has no form for it; use reverse_kl, or only "
            f"losses that have: {', '.join(name for name in LOSSES if LOSSES[name].f_divergence)}."
        )
    if divergence != "alpha_divergence" and coef != DEFAULTS["f_alpha_divergence_coef"]:
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
    if values["reference_update_steps"] is not None and values["beta"] == 0:
        raise ConfigError("reference_update_steps is set, but beta 0 leaves the reference out; remove one of the two.")


def _count(values, noun):
    return f"{len(values)} {noun}" + "s" * (len(values) != 1)

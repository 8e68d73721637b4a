"""The loss that a configuration asks for, checked, and what it makes of a batch: a value to minimize, and figures."""

from contextlib import contextmanager
from functools import partial

import mlx.core as mx

from ..losses import PairLogps, kl_estimate, ld_weighed, mean_logps, with_f_divergence, wpo_weights
from .figures import DESIRABLE, FIGURES, SHARES
from .intercept import aside, exchanged
from .logps import Scorer
from .loss_table import LOSS_DEFAULTS, LOSS_OPTIONS, LOSSES, OPTION
from .memory import Need
from .options import ConfigError
from .routing import experts_in, load_balancing_loss, routed, routers_of

# Two evaluations of the same float32 model differ by about a third of this, relative to the logps.
ROUNDING = 2e-6


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


def objective_of(model, args, loss=None):
    """The `Objective` of a model and `loss`, by default what `args`, a namespace, ask for; raises as `loss_of`."""
    return Objective(Scorer(model, args.share_prompt), loss or loss_of(args), args.router_aux_loss_coef)


class Objective:
    """The loss of a batch of pairs and its figures.

    Args:
        scorer: a `Scorer`.
        loss: a `PreferenceLoss`.
        router_coef: factor of the loss that balances the load of experts; None leaves routers alone.

    Attributes:
        further: names of figures besides FIGURES.
        reads_batch: whether a pair's value depends on the others of its batch.
        need: the `Need` of memory of a batch that is only scored.

    Raises:
        ConfigError: a factor is given, and the model has no routers that can be read.
    """

    def __init__(self, scorer, loss, router_coef=None):
        self.scorer = scorer
        self.loss = loss
        self.router_coef = router_coef
        self.need = Need()
        self._routers = self._unwatched = [] if router_coef is None else routers_of(scorer.model)
        self.further = ("kl", DESIRABLE) if loss.unpaired else ()
        if self._routers:
            self.further += ("aux_loss", *(f"{SHARES}{i}" for i in range(experts_in(self._routers[0][1]))))
        self.reads_batch = loss.reads_batch or bool(self._routers)

    def __call__(self, batch, reference, gradient=False):
        """Score a batch.

        Args:
            batch: a `Batch` of B pairs.
            reference: `(B, 2, 2)` float32 of `Reference.logps`; not read where the loss needs no reference.
            gradient: whether a gradient will be taken.

        Returns:
            `(loss, sums)`: the loss summed over pairs, float32, and float32 sums over pairs of FIGURES, the number of
            pairs and of tokens, MOMENTS and `further`.
        """
        losses, figures = self.each(batch, reference, gradient)
        loss = (losses * batch.counts).sum()
        margins, differences = figures[3], figures[6] - figures[7]
        moments = mx.square(margins), mx.square(differences), margins * differences
        own = len(FIGURES) - 1
        sums, moments, further = (
            [(values * batch.counts).sum() for values in part] for part in (figures[:own], moments, figures[own:])
        )
        counts = [batch.counts.sum(), batch.ntoks.astype(mx.float32)]
        return loss, mx.stack([loss, *sums, *counts, *moments, *further])

    @contextmanager
    def watching(self):
        """Within the context, routers are listened to: around a backward pass too, which may compute layers again."""
        with routed(self._unwatched), exchanged(self, "_unwatched", []):
            yield

    def each(self, batch, reference, gradient=False, by_token=False):
        """As `__call__`, pair by pair.

        Args:
            batch, reference, gradient: as for `__call__`.
            by_token: whether TOKEN_FIGURES are wanted too.

        Returns:
            `(losses, figures)`: `(B,)` float32, and a list of such for the other FIGURES, for TOKEN_FIGURES, and for
            `further`.
        """
        with self.watching(), aside() as told:
            rows = self.scorer(batch, alignment=self.loss.reads_wpo, gradient=gradient, by_token=by_token)
        pairs = self._pair_logps(rows, batch, reference)
        if self.loss.unpaired:
            pairs = pairs._replace(kl=kl_estimate(pairs))
        weights = None
        if self.loss.reads_wpo:
            weights = wpo_weights(*mx.split(rows.alignment, 2), pairs.chosen_lengths, pairs.rejected_lengths)
        losses = self.loss(pairs, weights) * batch.weights
        figures, further = (_of_single if self.loss.unpaired else _of_pairs)(self, pairs, rows.by_token)
        if self._routers:
            balance, shares = _balanced(told, batch)
            losses = losses + self.router_coef * balance
            further += [balance, *shares]
        return losses, [mx.broadcast_to(x, losses.shape) for x in figures + further]

    def order(self, margins, pairs):
        """The margins' signs, 0 for a tie, which is a coin toss.

        A policy that still equals its reference ties with it, although it was run in batches of other shapes.
        """
        if self.loss.needs_reference:
            sizes = 1 + mx.abs(pairs.policy_chosen) + mx.abs(pairs.policy_rejected)
            tied = mx.abs(margins) <= ROUNDING * self.loss.parameters["beta"] * sizes
        else:
            tied = margins == 0
        # What is no number is no tie.
        return mx.where(tied, 0.0, mx.where(margins > 0, 1.0, -1.0))

    def _pair_logps(self, rows, batch, reference):
        weighed = partial(ld_weighed, ld_alpha=self.loss.ld_alpha)
        policy_chosen, policy_rejected = mx.split(weighed(rows.total, rows.common), 2)
        if self.loss.needs_reference:
            reference_chosen = weighed(reference[:, 0, 0], reference[:, 0, 1])
            reference_rejected = weighed(reference[:, 1, 0], reference[:, 1, 1])
        else:
            reference_chosen = reference_rejected = mx.zeros_like(policy_chosen)
        chosen_lengths, rejected_lengths = mx.split(batch.lengths, 2)
        return PairLogps(
            policy_chosen=policy_chosen,
            policy_rejected=policy_rejected,
            reference_chosen=reference_chosen,
            reference_rejected=reference_rejected,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            chosen_nll=-mx.split(rows.total, 2)[0],
            margins=batch.margins,
            counts=batch.counts,
            labels=batch.labels,
        )


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


def _of_pairs(objective, pairs, by_token):
    """Lists of FIGURES behind the first, with TOKEN_FIGURES where there is `by_token`, and of `further`."""
    chosen, rejected = objective.loss.rewards(pairs)
    lengths = pairs.chosen_lengths, pairs.rejected_lengths
    correct = (objective.order(chosen - rejected, pairs) + 1) / 2
    figures = [chosen, rejected, correct, chosen - rejected, pairs.policy_chosen, pairs.policy_rejected, *lengths]
    if by_token:
        logits, entropies, hits = (mx.split(values, 2) for values in by_token)
        figures += [logits[0] / lengths[0], logits[1] / lengths[1]]
        figures += [sum(entropies) / sum(lengths), hits[0] / lengths[0]]
    return figures, []


def _of_single(objective, pairs, by_token):
    """The same of single responses, whose rewards are right on their label's side of the estimated KL."""
    rewards, good = objective.loss.rewards(pairs)[0], pairs.labels
    signs = 2 * good - 1
    correct = (objective.order(signs * (rewards - objective.loss.parameters["beta"] * pairs.kl), pairs) + 1) / 2

    def sides(values):
        return [good * values, (1 - good) * values]

    figures = [*sides(rewards), correct, signs * rewards, *sides(pairs.policy_chosen), *sides(pairs.chosen_lengths)]
    if by_token:
        logits, entropies, hits = (mx.split(values, 2)[0] / pairs.chosen_lengths for values in by_token)
        figures += [logits, logits, entropies, hits]
    return figures, [pairs.kl, good]


def _balanced(told, batch):
    """What routers told of a batch as each of this worker's pairs answers for it.

    Returns:
        `(loss, choices)`: the load-balancing loss of all workers' tokens, a scalar with this worker's share of the
        gradient, and `(E,)` this worker's choices of each expert divided by its pairs.
    """
    loss, choices = load_balancing_loss(told, batch.reads)
    own = batch.counts.sum()
    whole, pairs = mx.distributed.all_sum(mx.stop_gradient(mx.stack([loss, own])))
    own = mx.maximum(own, 1)
    return whole + (loss - mx.stop_gradient(loss)) * (pairs / own), choices / own

"""The training step of a preference run: logps, loss, gradient, accumulation, update."""

from contextlib import contextmanager
from functools import cached_property, partial

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from ..losses import PairLogps, kl_estimate, ld_weighed, wpo_weights
from .batches import Batch
from .figures import DESIRABLE, FIGURES, SHARES
from .flat import FlatParameters
from .intercept import aside, exchanged
from .memory import Need
from .nonfinite import update_if
from .routing import experts_in, load_balancing_loss, routed, routers_of
from .workers import means_over_workers

# Two evaluations of the same float32 model differ by about a third of this, relative to the logps.
ROUNDING = 2e-6


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


class Step:
    """Takes gradients batch by batch and updates the model once `update` is asked for.

    Gradients are summed over pairs and divided by the pairs of all batches since the last update, over all
    workers: accumulated small batches give the large batch's gradient, uneven ones too.

    Args:
        model, optimizer: what is trained.
        objective: an `Objective`.
        compiled: whether to compile the step, once for each shape of a batch.
        max_grad_norm: gradients are clipped to this norm; None for no clipping.
        skips: whether an update whose gradient is not finite is left out.
        together: whether the scorer's `siblings` are computed together: not where layers are computed again in the
            backward pass, which are given their own matrices.

    Attributes:
        flat: the `FlatParameters` that are updated; `flat.write` gives the model what they have become.
        accumulated: `(gradient, number of pairs)` of the batches since the last update, or None.
    """

    def __init__(self, model, optimizer, objective, compiled, max_grad_norm=None, skips=False, together=True):
        self.model = model
        self.optimizer = optimizer
        self.objective = objective
        self.max_grad_norm, self.skips = max_grad_norm, skips
        self.flat = FlatParameters(model, optimizer, objective.scorer.siblings if together else ())
        if optimizer is not None:
            optimizer.init(self.flat.vectors.parameters())
        self.compiled = compiled
        self.accumulated = None

    def __call__(self, batch, reference, update):
        """Take a batch's gradient, and update the model where `update` is set.

        Returns:
            `(sums, gradient norm)`: `Objective`'s sums, and the mean gradient's norm before clipping, None
            where there was no update. Nothing is evaluated yet, but for several workers' gradients on Metal.
        """
        sums, gradient = self.gradient(batch, reference)
        pairs = sums[len(FIGURES)]
        if self.accumulated is not None:
            gradient = tree_map(lambda new, old: new + old, gradient, self.accumulated[0])
            pairs = pairs + self.accumulated[1]
        if not update:
            self.accumulated = gradient, pairs
            return sums, None
        self.accumulated = None
        means = means_over_workers(gradient, pairs)
        return sums, (self._compiled_update if self.compiled else self._update)(*means)

    def gradient(self, batch, reference):
        """`(sums, gradient)` of a batch: `Objective`'s sums, and the summed loss's gradient, as `flat` joins it."""
        return (self._compiled_gradient if self.compiled else self._take_gradient)(batch, reference)

    # Compiled when first used: what they change is only then what it will be. What is not trained is a constant.

    @cached_property
    def _compiled_gradient(self):
        mx.eval(self.model.parameters())
        changed = [self.flat.vectors.state, mx.random.state]
        return mx.compile(self._take_gradient, inputs=changed, outputs=[mx.random.state])

    @cached_property
    def _compiled_update(self):
        return mx.compile(self._update, inputs=self.state(), outputs=self.state())

    def state(self):
        """All that the step changes."""
        return [self.flat.vectors.state, self.optimizer.state, mx.random.state]

    def _take_gradient(self, batch, reference):
        batch = Batch(*batch)  # MLX's compiler has made plain tuples of it
        parameters = self.flat.views(as_multiplied=True)

        def loss(parameters):
            with self.flat.in_model(parameters):
                return self.objective(batch, reference, gradient=True)

        # Around the backward pass too, for layers that it computes again.
        with self.objective.scorer.lean_layers(batch), self.flat.as_multiplied(), self.objective.watching():
            (_, sums), gradient = mx.value_and_grad(loss)(parameters)
        return sums, self.flat.join(gradient, as_multiplied=True)

    def _update(self, gradient, pairs):
        squares = sum(mx.square(value.astype(mx.float32)).sum() for _, value in tree_flatten(gradient))
        norm = mx.sqrt(squares) / pairs
        divisor = pairs if self.max_grad_norm is None else pairs * mx.maximum((norm + 1e-6) / self.max_grad_norm, 1)
        mean = tree_map(lambda value: (value / divisor).astype(value.dtype), gradient)
        if self.skips:
            # Its square too, which Adam's second moments would take over.
            update_if(mx.isfinite(mx.square(norm)), self.optimizer, self.flat.vectors, mean)
        else:
            self.optimizer.update(self.flat.vectors, mean)
        return norm

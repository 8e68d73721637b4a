"""The training step of a preference run: gradient, accumulation, update."""

from functools import cached_property

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from .batches import Batch
from .cuda_cache import all_kept
from .figures import FIGURES
from .flat import FlatParameters
from .nonfinite import update_if
from .workers import means_over_workers


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
        gradient = self.flat.join(gradient, as_multiplied=True)
        all_kept()
        return sums, gradient

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

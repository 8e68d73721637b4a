"""Logps of a batch of pairs with no more work than they need.

The body of the model runs once, over prompts once where it can; its output head runs on response positions
only, a bounded chunk of logits at a time.
"""

from typing import NamedTuple

import mlx.core as mx

from .head import Head, logps_and_squares
from .lean import lean_layers
from .packing import packing
from .sharing import arrangement_of, map_arrays, prefix_cache


class RowLogps(NamedTuple):
    """What a batch's 2B rows (the B chosen ones first) are worth, each `(2B,)` float32.

    Attributes:
        total: logps summed over the response's tokens, in nats.
        common: the same over the first min(chosen, rejected) tokens, which LD-DPO weighs apart.
        alignment: log p(token) - log sum_v p(v)^2 summed likewise, for WPO's weights; zeros unless asked for.
    """

    total: mx.array
    common: mx.array
    alignment: mx.array


class Scorer:
    """Scores batches with one model.

    Args:
        model: an mlx-lm model.
        share_prompt: run a prompt once for both its responses, where the model allows it.
        response_only: run the output head on response positions only, where the head can be found.

    Attributes:
        arrangement: how batches for it are best arranged, as `make_batch` takes it.
        head: the output head, or None where the full projection has to run.
    """

    def __init__(self, model, share_prompt=True, response_only=True):
        self.model = model
        self.head = Head.find(model) if response_only else None
        self.arrangement = arrangement_of(model, share_prompt)

    def __call__(self, batch, alignment=False, gradient=False):
        """The logps of a batch.

        Args:
            batch: a `Batch` of B pairs.
            alignment: whether to compute WPO's weights too.
            gradient: whether a gradient with respect to the model's parameters will be taken.

        Returns:
            `RowLogps`.
        """
        with lean_layers(self.model):
            with packing(self.model, batch.layout):
                rows = [self._run(group, prefix) for group, prefix in self._groups(batch)]
            states = mx.concatenate([row.flatten(0, 1) for row in rows])
            if not batch.layout:
                states = states[batch.positions]  # (N, D); a packed row's are these alone
            logps, squares = self._token_logps(states, batch.targets, alignment, gradient)
        per_row = _gather_rows(logps, batch.response_index)  # (2B, R)
        aligned = mx.zeros_like(batch.lengths)
        if alignment:
            aligned = _gather_rows(mx.stop_gradient(logps) - squares, batch.response_index).sum(-1)
        common = mx.where(mx.arange(per_row.shape[1]) < batch.common_lengths[:, None], per_row, 0.0)
        return RowLogps(per_row.sum(-1), common.sum(-1), aligned)

    def _groups(self, batch):
        """Each group's tokens with the cache that holds its rows' shared prompts, or None."""
        if batch.prefix.shape[1] == 0:
            for group in batch.groups:
                yield group.tokens, None
            return
        cache = prefix_cache(self.model)
        self._run(batch.prefix, cache)
        for group in batch.groups:
            yield group.tokens, [map_arrays(layer, lambda x, rows=group.prefix_rows: x[rows]) for layer in cache]

    def _run(self, tokens, cache):
        """Hidden states `(B, T, D)` before the head, or logits `(B, T, V)` where there is none."""
        if self.head is not None:
            return self.head.hidden_states(tokens, cache)
        logits = self.model(tokens) if cache is None else self.model(tokens, cache=cache)
        return logits[0] if isinstance(logits, (tuple, list)) else logits

    def _token_logps(self, states, targets, alignment, gradient):
        if self.head is None:
            return logps_and_squares(states, targets, alignment)
        return self.head.token_logps(states, targets, alignment, gradient)


def _gather_rows(values, index):
    """`values` `(N,)` laid out as rows `(2B, R)` by `index`; N stands for nothing and gives 0."""
    return mx.concatenate([values, mx.zeros((1,), values.dtype)])[index]

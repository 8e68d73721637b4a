"""What a scorer is compared with: upstream's forward pass over whole padded rows, and its gradient."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from architectures import WITHOUT_LORA, make_model
from check_gradients import padded_rows
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_lm.tuner.datasets import Pair
from mlx_lm.tuner.preference.batches import PLAIN, make_batch
from mlx_lm.tuner.preference.layers import checkpointed_layers
from mlx_lm.tuner.preference.objective import Objective, preference_loss
from mlx_lm.utils import dpo_loss, get_batched_logps

BETA = 0.5


def make_pairs(lengths, vocabulary=101, seed=3):
    """Pairs of random tokens, of `(prompt, chosen, rejected)` lengths."""
    draw = np.random.default_rng(seed).integers
    return [Pair(*(draw(1, vocabulary, length).tolist() for length in row)) for row in lengths]


# Ten prompt tokens can be shared, and the rows that follow are long and short enough to run as several groups.
PAIRS = make_pairs([(13, 4, 9), (11, 6, 2), (12, 1, 5)])


def add_lora(model, keys=None, rank=4, dropout=0.0, use_dora=False):
    """Put LoRA on every layer, with no matrix left at zero, and freeze the rest."""
    model.freeze()
    config = {"rank": rank, "dropout": dropout, "scale": 2.0} | ({} if keys is None else {"keys": keys})
    mx.random.seed(3)
    linear_to_lora_layers(model, len(model.layers), config, use_dora=use_dora)
    model.update(tree_map(_nonzero, model.trainable_parameters()))
    return model.train()


def make_policy(name):
    """A model of a type with LoRA on all layers that upstream puts it on, but those that cannot have it."""
    model, keys = make_model(name), None
    if left_out := WITHOUT_LORA.get(name):
        paths = {path for layer in model.layers for path, module in layer.named_modules() if "weight" in module}
        keys = {path for path in paths if path.endswith("proj") and not any(part in path for part in left_out)}
    return add_lora(model, keys)


def _nonzero(value):
    return value if value.any() else 0.1 * mx.random.normal(value.shape)


def plain_logps(model, pairs=PAIRS):
    """`(2B,)`, the chosen rows first."""
    return mx.concatenate(get_batched_logps(model, *padded_rows(pairs), ignore_index=-100))


def reference_of(logps):
    """A reference `(B, 2, 2)` that differs from the policy, so that every pair's loss has a slope of its own."""
    pairs = mx.stack(mx.split(logps, 2), axis=1)
    shift = mx.array([[1.0, -0.5], [0.25, 2.0], [-1.5, 0.75]])[: len(pairs)]
    return mx.stack([pairs + shift, mx.zeros_like(pairs)], axis=-1)


def plain_gradient(model, reference, pairs=PAIRS):
    """The gradient of DPO's loss summed over pairs."""
    rows = padded_rows(pairs)

    def loss(model):
        return dpo_loss(model, BETA, 0.0, reference[:, 0, 0], reference[:, 1, 0], *rows, -100)[0] * len(pairs)

    return nn.value_and_grad(model, loss)(model)[1]


def arrangements_for(scorer):
    """The arrangements of batches that a scorer's model can run."""
    return [PLAIN] if scorer.arrangement == PLAIN else [PLAIN, scorer.arrangement]


def scored_gradient(scorer, reference, pairs=PAIRS, arrangement=PLAIN, checkpoint=False):
    """The same through a scorer."""
    batch, *_ = make_batch(pairs, arrangement)
    objective = Objective(scorer, preference_loss("dpo", beta=BETA))
    function = nn.value_and_grad(scorer.model, lambda _: objective(batch, reference, gradient=True)[0])
    if not checkpoint:
        return function(scorer.model)[1]
    # Around the backward pass too, in which layers are computed again.
    with checkpointed_layers(scorer.model), scorer.lean_layers(batch):
        gradient = function(scorer.model)[1]
        mx.eval(gradient)
    return gradient


def gradient_error(found, expected):
    """The largest difference relative to its array's largest entry, or to a tenth of the largest of all arrays."""
    found, expected = dict(tree_flatten(found)), dict(tree_flatten(expected))
    assert found.keys() == expected.keys()
    sizes = {name: mx.abs(value).max() for name, value in expected.items()}
    largest = mx.stack(list(sizes.values())).max()
    assert largest.item() > 0
    errors = [
        mx.abs(found[name] - expected[name]).max() / mx.maximum(size, largest / 10) for name, size in sizes.items()
    ]
    return mx.stack(errors).max().item()

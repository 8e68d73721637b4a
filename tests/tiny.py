"""What the tests of training share: one tiny Llama, pairs of random tokens for it, and short runs."""

import json
from pathlib import Path
from unittest import mock

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_lm.tuner.datasets import Pair
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.utils import load_model

TINY_LLAMA = Path(__file__).parent / "golden" / "tiny_llama"
VOCABULARY = 97


def tiny_llama(lora=True, rank=4, scale=20.0, dropout=0.0, use_dora=False, seed=0, moved=False):
    """The tiny Llama, with adapters on all linear layers of its two blocks unless `lora` is false.

    Args:
        moved: draw lora_b too, in place of its zeros: a policy that is not the base model.
    """
    model, _ = load_model(TINY_LLAMA)
    model.freeze()
    if lora:
        mx.random.seed(seed)
        parameters = {"rank": rank, "scale": scale, "dropout": dropout}
        linear_to_lora_layers(model, len(model.layers), parameters, use_dora=use_dora)
    if moved:
        drawn = tree_map(lambda x: x if x.any() else 0.02 * mx.random.normal(x.shape), model.trainable_parameters())
        model.update(drawn)
    mx.eval(model.parameters())
    return model


def some_pairs(count, seed=0, prompt=(9, 20), response=(1, 12)):
    """Pairs of random tokens, with lengths drawn from the two half-open ranges."""
    draw = np.random.default_rng(seed).integers
    return [
        Pair(*(draw(0, VOCABULARY, draw(*lengths)).tolist() for lengths in (prompt, response, response)))
        for _ in range(count)
    ]


def short_run(model, pairs, folder, optimizer=None, valid=None, callback=None, reference=None, **options):
    """Train with DPO for a few steps, a report each, and without a reference cache unless `options` say otherwise.

    Returns:
        `(training, validation)`: the lines of `metrics.jsonl`.
    """
    given = {"loss_type": "dpo", "batch_size": 4, "iters": 4, "steps_per_report": 1, "reference_cache": "none"}
    args = TrainingArgs(**{**given, "adapter_file": Path(folder) / "adapters.safetensors", **options})
    optimizer = optim.Adam(1e-3) if optimizer is None else optimizer
    with mock.patch("mlx_lm.tuner.preference.outcome.plot_metrics", return_value=None):  # test_dpo draws one
        train(model, optimizer, pairs, valid, args, training_callback=callback, reference=reference)
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line], [line for line in lines if "eval_loss" in line]


def trained(model):
    """The trainable parameters by name, as numpy arrays."""
    return {name: np.array(value.astype(mx.float32)) for name, value in tree_flatten(model.trainable_parameters())}


def largest_difference(found, expected):
    """Between two dicts of arrays with the same names."""
    assert found.keys() == expected.keys()
    return max(np.abs(found[name] - expected[name]).max() for name in expected)

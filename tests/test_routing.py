"""Mixtures of experts: the load-balancing loss against its formula in float64, routers of every model type, runs."""

import math
import re

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architectures import ARCHITECTURES, UNTRAINABLE, make_model
from mlx_lm.tuner.lora import LoRASwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers
from plain_pass import PAIRS, arrangements_for, gradient_error, make_policy
from tiny import short_run, some_pairs, trained

from mlx_lm.tuner.preference.batches import ARRANGEMENTS, PLAIN, make_batch
from mlx_lm.tuner.preference.figures import as_means
from mlx_lm.tuner.preference.intercept import aside
from mlx_lm.tuner.preference.layers import checkpointed_layers
from mlx_lm.tuner.preference.logps import Scorer
from mlx_lm.tuner.preference.objective import Objective, preference_loss
from mlx_lm.tuner.preference.options import ConfigError
from mlx_lm.tuner.preference.routing import load_balancing_loss, routed, routers_of

# Whose routers have outputs for what is no expert, or that keep each expert by itself.
UNREAD = {"longcat_flash", "longcat_flash_ngram", "dbrx"}


MIXTURES = [
    name for name, config in ARCHITECTURES.items() if "experts" in str(config) and name not in {*UNREAD, *UNTRAINABLE}
]


pytestmark = pytest.mark.usefixtures("uncompiled")


# The formula


def formula(layers, choices, weights):
    """E x sum over experts of the share of tokens that chose it x its mean probability, token by token; the choices."""
    experts = layers[0].shape[-1]
    chosen, mean, total = np.zeros(experts), np.zeros(experts), 0.0
    for layer, indices in zip(layers, choices, strict=True):
        for logits, own, weight in zip(layer.reshape(-1, experts), indices, weights, strict=True):
            odds = np.exp(logits.astype(np.float64) - logits.max())
            mean += weight * odds / odds.sum()
            chosen[own] += weight
            total += weight
    return experts * (chosen / total) @ (mean / total), chosen


def drawn(top_k, experts=5, tokens=14, layers=3):
    draw = np.random.default_rng(0)
    logits = [draw.normal(size=(2, tokens // 2, experts)).astype(np.float32) for _ in range(layers)]
    choices = [np.argsort(-layer.reshape(-1, experts), axis=-1)[:, :top_k] for layer in logits]
    told = []
    for layer, indices in zip(logits, choices, strict=True):
        told += [mx.array(layer), mx.array((indices[..., None] == np.arange(experts)).sum(-2), mx.float32)]
    return logits, choices, told


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_the_loss_and_the_choices_are_the_formulas(top_k):
    logits, choices, told = drawn(top_k)
    weights = np.random.default_rng(1).integers(0, 3, 14).astype(np.float32)
    expected, chosen = formula(logits, choices, weights)
    loss, found = load_balancing_loss(told, mx.array(weights))
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(np.array(found), chosen)


def test_the_gradient_is_the_formulas_with_the_choices_held():
    """d/dz of E sum_e f_e softmax(z)_e / N = E / N p (f - f . p)."""
    (logits,), (choices,), (_, chosen) = drawn(2, layers=1)
    found = mx.grad(lambda x: load_balancing_loss([x, chosen], mx.ones(14))[0])(mx.array(logits.reshape(14, 5)))
    odds = np.exp(logits.reshape(14, 5).astype(np.float64))
    p, f = odds / odds.sum(-1, keepdims=True), np.bincount(choices.ravel(), minlength=5) / 14
    np.testing.assert_allclose(np.array(found), 5 / 14 * p * (f - (p @ f)[:, None]), atol=1e-6)


def test_even_use_gives_k_and_one_expert_for_all_gives_their_number():
    one = [mx.array([[50.0, 0, 0, 0]] * 3), mx.array([[1.0, 0, 0, 0]] * 3)]
    assert load_balancing_loss(one, mx.ones(3))[0].item() == pytest.approx(4.0)
    assert load_balancing_loss([50 * mx.eye(4), mx.eye(4)], mx.ones(4))[0].item() == pytest.approx(1.0)
    # Logits in half precision, of which probabilities are taken in float32: e / (e + 3) of 1, 0, 0 and 0.
    half = [(one[0] / 50).astype(mx.bfloat16), one[1]]
    expected = pytest.approx(4 * math.e / (math.e + 3), rel=1e-6)
    assert load_balancing_loss(half, mx.ones(3))[0].item() == expected


# Every model type


@pytest.mark.parametrize("name", MIXTURES)
def test_routers_are_read_in_every_arrangement_and_under_recomputation(name):
    model = make_policy(name)
    routers, scorer = routers_of(model), Scorer(model)
    # What upstream's own forward pass says of the tokens that count.
    batch = make_batch(PAIRS, PLAIN)[0]
    with routed(routers), aside() as told:
        mx.eval(model(batch.tokens))
    assert len(told) == 2 * len(routers) and batch.reads.sum().item() == sum(
        2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected) - 2 for pair in PAIRS
    )
    expected, choices = load_balancing_loss(told, batch.reads)
    objective = Objective(scorer, preference_loss("simpo"), 1000.0)
    take = nn.value_and_grad(model, lambda _, *given: objective(*given, gradient=True))
    gradients = []
    for arrangement in arrangements_for(scorer):
        batch = make_batch(PAIRS, arrangement)[0]
        given = batch, mx.zeros((len(PAIRS), 2, 2))
        (_, sums), gradient = take(model, *given)
        figures = as_means(np.array(sums), objective.further)[0]
        assert figures["aux_loss"] == pytest.approx(expected.item(), rel=1e-4)
        assert np.allclose(sums[-len(choices) :], choices)
        gradients.append(gradient)
    assert gradient_error(gradients[0], gradients[-1]) < 1e-3
    with checkpointed_layers(model), objective.watching(), scorer.lean_layers(given[0]):
        (_, again), other = take(model, *given)
        mx.eval(again, other)
    assert np.allclose(again, sums, rtol=1e-4) and gradient_error(other, gradient) < 1e-4


@pytest.mark.parametrize("name", ["dbrx", "longcat_flash", "llama"])
def test_a_model_without_routers_that_can_be_read_is_refused(name):
    with pytest.raises(ConfigError, match="router_aux_loss_coef is set, but this model's routers cannot be read"):
        routers_of(make_model(name))


# Runs


def mixture(bits=None):
    model = make_model("qwen3_moe", intermediate_size=64, moe_intermediate_size=32)
    if bits:
        nn.quantize(model, 32, bits)
    model.freeze()
    mx.random.seed(1)
    linear_to_lora_layers(model, len(model.layers), {"rank": 4, "scale": 20.0, "dropout": 0.0})
    return model


@pytest.mark.parametrize("bits", [None, 4])
def test_experts_learn_quantized_ones_too(tmp_path, bits):
    model, pairs = mixture(bits), some_pairs(8)
    assert sum(isinstance(module, LoRASwitchLinear) for module in model.modules()) == 3
    training, _ = short_run(model, pairs, tmp_path, iters=6, batch_size=8, grad_checkpoint=bits is not None)
    assert training[0]["loss"] == pytest.approx(np.log(2), abs=1e-4) and training[-1]["loss"] < 0.6
    moved = [
        name for name, value in trained(model).items() if "switch_mlp" in name and "lora_b" in name and value.any()
    ]
    assert len(moved) == 3


def test_the_factor_evens_the_use_of_experts_and_validations_tell_it(tmp_path, capsys):
    lines = {}
    for coef in (None, 0.0, 3.0):
        options = {"router_aux_loss_coef": coef, "iters": 10, "batch_size": 8, "val_batches": -1}
        lines[coef] = short_run(mixture(), some_pairs(8), tmp_path / str(coef), valid=some_pairs(8), **options)
    off, watched, evened = lines.values()
    # Watching alone changes nothing.
    assert [line["loss"] for line in off[0]] == pytest.approx([line["loss"] for line in watched[0]], abs=1e-6)
    assert "aux_loss" not in off[0][0] and not [key for key in off[1][0] if "expert" in key]
    first = watched[0][0]
    assert evened[0][0]["loss"] == pytest.approx(first["loss"] + 3 * first["aux_loss"], rel=1e-5)
    assert not [key for key in first if "expert" in key]

    def spread(line):
        shares = [line[f"eval_expert_shares/{i}"] for i in range(4)]
        assert sum(shares) == pytest.approx(1) and line["eval_aux_loss"] > 0
        return max(shares) - min(shares)

    assert spread(evened[1][-1]) < spread(watched[1][-1])
    assert evened[1][-1]["eval_aux_loss"] < watched[1][-1]["eval_aux_loss"]
    assert re.search(r"experts \d+\.\d% to \d+\.\d%", " ".join(capsys.readouterr().out.split()))


def test_a_compiled_step_under_recomputation_balances_as_an_eager_one(tmp_path):
    mx.enable_compile()
    found = []
    for fast in (False, True):
        options = {"router_aux_loss_coef": 2.0, "iters": 2, "compile": fast, "grad_checkpoint": fast}
        (line, *_), _ = short_run(mixture(), some_pairs(4), tmp_path, **options)
        found.append([line[name] for name in ("loss", "aux_loss", "grad_norm")])
    assert found[0] == pytest.approx(found[1], rel=1e-5) and found[0][2] > 0


def test_responses_to_other_prompts_do_not_count():
    pairs = [pair._replace(label=True) for pair in PAIRS]
    for arrangement in ARRANGEMENTS:
        batch = make_batch([*pairs, pairs[0], pairs[0]], arrangement, counted=len(pairs))[0]
        assert batch.reads.sum().item() == sum(len(pair.prompt) + len(pair.chosen) - 1 for pair in pairs)

"""The load-balancing loss against its formula in float64."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_lm.tuner.preference.routing import expert_shares, load_balancing_loss


def formula(layers, top_k, weights):
    """E x sum over choices and experts of the share of tokens so chosen x the mean probability, token by token."""
    experts = layers[0].shape[-1]
    chosen, mean, total = np.zeros(experts), np.zeros(experts), 0.0
    for layer in layers:
        for logits, weight in zip(layer.reshape(-1, experts).astype(np.float64), weights.ravel(), strict=True):
            odds = np.exp(logits - logits.max())
            mean += weight * odds / odds.sum()
            chosen[np.argsort(-logits)[:top_k]] += weight
            total += weight
    return experts * (chosen / total) @ (mean / total), chosen / total / top_k


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("padded", [False, True])
def test_loss_and_shares_are_the_formulas(top_k, padded):
    draw = np.random.default_rng(0)
    layers = [draw.normal(size=(2, 7, 5)).astype(np.float32) for _ in range(3)]
    weights = (draw.random((2, 7)) < 0.6).astype(np.float64) if padded else np.ones((2, 7))
    expected, shares = formula(layers, top_k, weights)
    arguments = [mx.array(layer) for layer in layers], top_k, mx.array(weights) if padded else None
    assert load_balancing_loss(*arguments).item() == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(np.array(expert_shares(*arguments)), shares, atol=1e-6)


def test_the_gradient_is_the_formulas_with_the_choices_held():
    """d/dz of E sum_e f_e softmax(z)_e / N = E / N p (f - f . p)."""
    logits = np.random.default_rng(1).normal(size=(6, 4))
    found = mx.grad(lambda x: load_balancing_loss([x], 2))(mx.array(logits.astype(np.float32)))
    odds = np.exp(logits)
    p = odds / odds.sum(-1, keepdims=True)
    f = np.zeros(4)
    for row in logits:
        f[np.argsort(-row)[:2]] += 1 / 6
    np.testing.assert_allclose(np.array(found), 4 / 6 * p * (f - (p @ f)[:, None]), atol=1e-6)


def test_even_use_gives_k_and_one_expert_for_all_gives_their_number():
    one = mx.array([[50.0, 0.0, 0.0, 0.0]] * 3)
    assert load_balancing_loss([one], 1).item() == pytest.approx(4.0)
    even = 50 * mx.eye(4)
    assert load_balancing_loss([even], 1).item() == pytest.approx(1.0)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="3, 4"):
        load_balancing_loss([mx.zeros((2, 4)), mx.zeros((2, 3))], 1)
    with pytest.raises(ValueError, match="top_k is 5"):
        load_balancing_loss([mx.zeros((2, 4))], 5)
    with pytest.raises(ValueError):
        load_balancing_loss([], 1)

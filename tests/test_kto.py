"""KTO's loss against its formula in float64, and its invariants."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_lm.tuner.preference.kto import kl_estimate, kto, mismatched

WEIGHTS = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5}


def test_values_are_the_formulas():
    logratios, labels = np.array([2.0, -1.0, 0.5, -40.0]), np.array([True, False, False, True])
    kl = 0.7

    def sigma(x):
        return 1 / (1 + np.exp(-x))

    expected = np.where(labels, 1.5 * (1 - sigma(0.3 * (logratios - kl))), 0.5 * (1 - sigma(0.3 * (kl - logratios))))
    found = kto(mx.array(logratios, mx.float32), mx.array(labels), mx.array(kl), **WEIGHTS)
    np.testing.assert_allclose(np.array(found), expected, rtol=1e-6)


def test_the_gradient_raises_desirable_and_lowers_undesirable_responses_and_none_reaches_the_estimate():
    labels = mx.array([True, False])

    def total(logratios, others):
        return kto(logratios, labels, kl_estimate(others), **WEIGHTS).sum()

    own, others = mx.grad(total, argnums=(0, 1))(mx.array([0.5, 0.5]), mx.array([1.0, 2.0]))
    assert own[0].item() < 0 < own[1].item()
    # beta x weight x sigma(x) sigma(-x) with x = 0.3 (0.5 - 1.5).
    slope = np.exp(0.3) / (1 + np.exp(0.3)) ** 2
    np.testing.assert_allclose(np.array(own), [-0.45 * slope, 0.15 * slope], rtol=1e-5)
    assert not others.any()


def test_loss_and_gradient_stay_finite_for_extreme_logratios():
    extremes = mx.array([1e4, -1e4, 1e4, -1e4])
    labels = mx.array([True, True, False, False])
    value, slope = mx.value_and_grad(lambda x: kto(x, labels, mx.array(0.0), **WEIGHTS).sum())(extremes)
    assert value.item() == pytest.approx(1.5 + 0.5)
    assert mx.isfinite(slope).all()


def test_the_estimate_is_a_mean_of_at_least_zero_over_examples_that_count():
    assert kl_estimate(mx.array([1.0, 2.0, 99.0]), mx.array([1.0, 1.0, 0.0])).item() == pytest.approx(1.5)
    assert kl_estimate(mx.array([-3.0, 1.0])).item() == 0.0


def test_each_prompt_gets_another_examples_response():
    assert mismatched(4).tolist() == [3, 0, 1, 2]
    with pytest.raises(ValueError, match="batch_size is 1"):
        mismatched(1)

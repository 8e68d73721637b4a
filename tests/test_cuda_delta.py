"""The kernels of the gated delta rule, run on the CPU, against upstream's loop over tokens."""

import pytest
from test_recurrent import (
    assert_close,
    assert_is_the_loop,
    make_inputs,
    values_and_gradients,
    with_all,
    with_one_key,
    with_strong_decay,
)

from mlx_lm.tuner.preference import cuda_delta, pieces
from mlx_lm.tuner.preference.pieces import gated_delta_rule

pytestmark = pytest.mark.usefixtures("cuda_kernels")


def inputs_of(length, by_channel=False, **sizes):
    sizes = {"key_heads": 1, "value_heads": 2, "key_width": 32, "value_width": 32} | sizes
    return make_inputs(length, by_channel, **sizes)


def assert_kernels_are_the_loop(inputs, tolerance=4e-6):
    assert_is_the_loop(inputs, tolerance, tolerance, cuda_delta.gated_delta_loops)


@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("length", [1, cuda_delta.TILE, 3 * cuda_delta.TILE + 5])
def test_any_length_gives_the_loops_values_and_gradients(length, by_channel):
    assert_kernels_are_the_loop(inputs_of(length, by_channel))


@pytest.mark.parametrize(("key_width", "value_width"), [(64, 32), (96, 192)])
def test_widths_that_differ(key_width, value_width):
    assert_kernels_are_the_loop(inputs_of(9, True, batch=1, key_width=key_width, value_width=value_width))


@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("gate", [0.0, -1e-7, -90.0, -1e4])
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_gates_and_betas_at_their_bounds(gate, beta, by_channel):
    assert_kernels_are_the_loop(with_all(inputs_of(21, by_channel), gate, beta))


@pytest.mark.parametrize("by_channel", [False, True])
def test_strong_decay_and_one_key_cost_no_digits(by_channel):
    inputs = inputs_of(40, by_channel)
    assert_kernels_are_the_loop(with_strong_decay(inputs))
    for beta in (0.5, 1.9):
        assert_kernels_are_the_loop(with_one_key(inputs, beta), 1e-5)


def test_on_cuda_they_stand_in_for_widths_that_fit(cuda_kernels, monkeypatch):
    inputs, expected = inputs_of(5), values_and_gradients(gated_delta_rule, inputs_of(5))
    assert cuda_kernels == []
    monkeypatch.setattr(pieces, "on_cuda", lambda: True)
    found = values_and_gradients(gated_delta_rule, inputs)
    assert cuda_kernels == ["gated_delta_forward", "gated_delta_updates", "gated_delta_keys"]
    for a, b in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
        assert_close(a, b, 4e-6)
    gated_delta_rule(*inputs_of(5, key_width=24)[:5])
    assert len(cuda_kernels) == 3


def test_widths_that_fit():
    fit = [width for width in range(8, 300, 8) if cuda_delta.fits(width, 32)]
    assert fit == [32, 64, 96, 128, 192, 256] and not cuda_delta.fits(32, 48)

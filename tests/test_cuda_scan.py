"""The kernels of Mamba's selective scan, run on the CPU, against a loop over tokens."""

import mlx.core as mx
import pytest
from architectures import make_model
from test_pieces import assert_same, logits_and_gradients
from test_recurrent import assert_is_the_loop
from test_state_space import make_tokens, scan_loop

from mlx_lm.tuner.preference import pieces
from mlx_lm.tuner.preference.cuda_scan import NUMBERS, THREADS, TILE, fits, selective_loops

pytestmark = pytest.mark.usefixtures("cuda_kernels")


def assert_kernels_are_the_loop(inputs):
    assert_is_the_loop(inputs, 4e-6, 4e-6, selective_loops, scan_loop)


@pytest.mark.parametrize("strength", [0.0, 0.01, 1.0, 30.0])
@pytest.mark.parametrize("length", [1, TILE, 3 * TILE + 5])
def test_any_length_gives_the_loops_values_and_gradients(length, strength):
    assert_kernels_are_the_loop(make_tokens(length, width=2 * THREADS * NUMBERS // 16, states=16, strength=strength))


@pytest.mark.parametrize("states", [8, 32])
def test_states_of_other_sizes(states):
    width = THREADS * NUMBERS // states
    assert fits(width, states) and not fits(width + 1, states) and not fits(width, states + 1) and not fits(width, 64)
    # Its arrays would be larger than a block's shared memory.
    assert not fits(THREADS, NUMBERS)
    assert_kernels_are_the_loop(make_tokens(TILE + 3, batch=1, width=width, states=states))


def test_without_a_state_it_begins_with_zeros():
    *arrays, state = make_tokens(5, width=64, states=16)
    for a, b in zip(selective_loops(*arrays), selective_loops(*arrays, mx.zeros_like(state)), strict=True):
        assert mx.array_equal(a, b)


@pytest.mark.parametrize(
    "name, sizes",
    [
        ("mamba", {"state_size": 16, "intermediate_size": 128}),
        ("falcon_mamba", {"state_size": 16, "intermediate_size": 128}),
        ("jamba", {"mamba_d_state": 16}),
        ("mamba", {"state_size": 16, "intermediate_size": 96}),
    ],
)
def test_on_cuda_they_stand_in_for_widths_that_fit(name, sizes, cuda_kernels, monkeypatch):
    model, tokens = make_model(name, **sizes), mx.arange(2 * (TILE + 3)).reshape(2, -1) % 50
    expected = logits_and_gradients(model, tokens)
    monkeypatch.setattr(pieces, "on_cuda", lambda: True)
    with pieces.recurrences_in_pieces(model.modules()):
        assert_same(logits_and_gradients(model, tokens), expected)
    fitting = sizes.get("intermediate_size") != 96
    assert set(cuda_kernels) == ({"selective_scan_forward", "selective_scan_backward"} if fitting else set())

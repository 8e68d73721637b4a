"""The gated delta rule in chunks against upstream's loop over tokens."""

import shutil

import mlx.core as mx
import numpy as np
import pytest

from mlx_lm.models import gated_delta
from mlx_lm.tuner.preference import pieces
from mlx_lm.tuner.preference.pieces import gated_delta_rule
from mlx_lm.tuner.preference.recurrent import CHUNK

NAMES = ("queries", "keys", "values", "log_gates", "betas", "state")
# Lengths within a chunk, of whole chunks and beside them.
LENGTHS = (1, 2, 5, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 13)


def unit(*shape):
    x = mx.random.normal(shape)
    return x / mx.linalg.norm(x, axis=-1, keepdims=True)


def make_inputs(length, by_channel=False, batch=2, key_heads=2, value_heads=4, key_width=8, value_width=6, seed=0):
    """`NAMES`' arrays: gates from nearly 0 to nearly 1, beta too."""
    mx.random.seed(seed)
    heads = (batch, length, value_heads)
    return [
        unit(batch, length, key_heads, key_width) * key_width**-0.5,
        unit(batch, length, key_heads, key_width),
        mx.random.normal((*heads, value_width)),
        -mx.exp(3 * mx.random.normal((*heads, key_width) if by_channel else heads)),
        mx.sigmoid(3 * mx.random.normal(heads)),
        mx.random.normal((batch, value_heads, value_width, key_width)),
    ]


def loop(queries, keys, values, log_gates, betas, state):
    return gated_delta.gated_delta_ops(queries, keys, values, mx.exp(log_gates), betas, state)


def values_and_gradients(function, inputs):
    """Outputs, last state, and the gradient of a sum of both, each entry with a weight of its own."""

    def total(*inputs):
        outputs, state = function(*inputs)
        weigh = [mx.cos(mx.arange(x.size)).reshape(x.shape) for x in (outputs, state)]
        return (outputs * weigh[0]).sum() + (state * weigh[1]).sum(), (outputs, state)

    (_, found), gradients = mx.value_and_grad(total, argnums=tuple(range(len(inputs))))(*inputs)
    return found, gradients


def assert_close(found, expected, tolerance, what=""):
    assert found.shape == expected.shape and found.dtype == expected.dtype, what
    found, expected = (np.array(x.astype(mx.float32)) for x in (found, expected))
    assert np.isfinite(found).all(), what
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * max(1, np.abs(expected).max()), err_msg=what)


def assert_is_the_loop(inputs, value=1e-5, gradient=1e-4, function=gated_delta_rule, loop=loop):
    expected, slopes = values_and_gradients(loop, inputs)
    found, found_slopes = values_and_gradients(function, inputs)
    for name, a, b in zip(("outputs", "last state"), found, expected, strict=True):
        assert_close(a, b, value, name)
    for number, (a, b) in enumerate(zip(found_slopes, slopes, strict=True)):
        assert_close(a, b, gradient, f"gradient of input {number}")


def with_all(inputs, gate, beta):
    """The inputs with this gate's logarithm and this beta for all tokens."""
    return [*inputs[:3], mx.full(inputs[3].shape, gate), mx.full(inputs[4].shape, beta), inputs[5]]


def with_strong_decay(inputs):
    """Gates of exp(-100) at every third token, of exp(-0.01) elsewhere."""
    gates = mx.where(mx.arange(inputs[3].shape[1]) % 3 == 0, -100.0, -0.01)
    gates = mx.broadcast_to(gates.reshape(1, -1, *[1] * (inputs[3].ndim - 2)), inputs[3].shape)
    return [*inputs[:3], gates, *inputs[4:]]


def with_one_key(inputs, beta):
    """One key for all tokens, and gates of nearly 1."""
    queries, keys, *others = with_all(inputs, -1e-4, beta)
    return [queries, mx.broadcast_to(keys[:, :1], keys.shape), *others]


@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_any_length_gives_the_loops_values_and_gradients(length, by_channel):
    assert_is_the_loop(make_inputs(length, by_channel))


@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("gate", [0.0, -1e-7, -90.0, -1e4])
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_gates_and_betas_at_their_bounds(gate, beta, by_channel):
    assert_is_the_loop(with_all(make_inputs(CHUNK + 5, by_channel), gate, beta))


@pytest.mark.parametrize("by_channel", [False, True])
def test_strong_decay_between_weak_ones_costs_no_digits(by_channel):
    """The gates' sum over a chunk is beyond -2,000."""
    assert_is_the_loop(with_strong_decay(make_inputs(2 * CHUNK, by_channel)), value=1e-6, gradient=2e-6)


@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize(("beta", "value"), [(0.5, 1e-5), (1.0, 1e-5), (1.9, 1e-4)])
def test_one_key_for_all_tokens_costs_few_digits(beta, value, by_channel):
    """The triangular system has beta in all its entries; the powers of its matrix reach 1e18.

    With beta near 2 each update undoes the one before: the system's solution is less well determined than the loop.
    """
    assert_is_the_loop(with_one_key(make_inputs(2 * CHUNK, by_channel), beta), value, 10 * value)


def test_values_by_hand():
    """One head of width 1 and one key of 1: S_1 = g S_0 + beta (v - g S_0), and so on; o = S q."""
    ones = mx.ones((1, 2, 1, 1))
    gates, betas, values = mx.array([0.5, 0.25]), mx.array([0.5, 1.0]), mx.array([3.0, 5.0])
    log_gates, betas = (x.reshape(1, 2, 1) for x in (mx.log(gates), betas))
    outputs, state = gated_delta_rule(
        2 * ones, ones, values.reshape(1, 2, 1, 1), log_gates, betas, mx.full((1, 1, 1, 1), 4.0)
    )
    # 4 decays to 2, takes half of 3 - 2: 2.5; with beta 1 the value alone is left: 5.
    np.testing.assert_allclose(np.array(outputs).ravel(), [5.0, 10.0], rtol=1e-6)
    assert state.item() == pytest.approx(5.0)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("by_channel", [False, True])
def test_half_precision_loses_no_more_than_the_loop(dtype, by_channel):
    exact = make_inputs(CHUNK + 3, by_channel, batch=1)
    narrow = [x.astype(dtype) if name in ("queries", "keys", "values", "betas") else x
              for name, x in zip(NAMES, exact, strict=True)]  # fmt: skip
    expected, slopes = values_and_gradients(loop, [x.astype(mx.float32) for x in narrow])
    ours, theirs = (values_and_gradients(function, narrow) for function in (gated_delta_rule, loop))
    for name, a, b, c in zip(NAMES, ours[1], theirs[1], slopes, strict=True):
        assert a.dtype == b.dtype
        error, loops = (mx.linalg.norm((x.astype(mx.float32) - c).flatten()).item() for x in (a, b))
        assert error <= 1.1 * loops + 1e-5 * mx.linalg.norm(c.flatten()).item(), name
    assert ours[0][0].dtype == dtype and ours[0][1].dtype == mx.float32
    assert_close(ours[0][0], expected[0].astype(dtype), float(mx.finfo(dtype).eps))


def one_piece_is(chunks, monkeypatch):
    """Have so many chunks of one head of widths 8 and 6 be a piece."""
    monkeypatch.setitem(pieces.AT_ONCE, mx.default_device().type, chunks * CHUNK * (8 + 6))


@pytest.mark.skipif(shutil.which("g++") is None, reason="MLX compiles for the CPU with g++")
def test_pieces_of_what_a_layer_has_computed_are_compiled_too(monkeypatch):
    one_piece_is(1, monkeypatch)
    inputs = make_inputs(2 * CHUNK, batch=1, key_heads=1, value_heads=1)

    def gradients(*inputs):
        return mx.grad(lambda *own: gated_delta_rule(*(0.9 * x for x in own))[0].sum(), range(5))(*inputs[:5])

    for name, a, b in zip(NAMES, mx.compile(gradients)(*inputs), gradients(*inputs), strict=False):
        assert_close(a, b, 1e-6, name)


@pytest.mark.parametrize("by_channel", [False, True])
def test_pieces_of_a_sequence_are_the_whole(by_channel, monkeypatch):
    one_piece_is(2, monkeypatch)
    assert_is_the_loop(make_inputs(5 * CHUNK + 3, by_channel, batch=1, key_heads=1, value_heads=1))


@pytest.mark.usefixtures("one_by_one")
def test_memory_is_of_inputs_and_a_state_a_piece(monkeypatch):
    """Both passes over a layer take an eighth of a state for each token, and twice as much for twice the tokens."""
    one_piece_is(1, monkeypatch)
    peaks = []
    for length in (16 * CHUNK, 32 * CHUNK):
        inputs = make_inputs(length, batch=1, value_heads=2, key_width=128, value_width=128)
        mx.eval(inputs)
        mx.synchronize()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(values_and_gradients(gated_delta_rule, inputs))
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[0] < 16 * CHUNK * inputs[-1].nbytes / 8
    assert peaks[1] < 2.1 * peaks[0]

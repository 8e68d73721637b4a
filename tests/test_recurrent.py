"""The gated delta rule in chunks against upstream's loop over tokens, and the context in which it stands in."""

import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architectures import make_model
from mlx.utils import tree_flatten

from mlx_lm.models import gated_delta
from mlx_lm.tuner.preference import recurrent
from mlx_lm.tuner.preference.pieces import recurrences_in_pieces
from mlx_lm.tuner.preference.recurrent import CHUNK, gated_delta_rule

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


def assert_is_the_loop(inputs, value=1e-5, gradient=1e-4):
    expected, slopes = values_and_gradients(loop, inputs)
    found, found_slopes = values_and_gradients(gated_delta_rule, inputs)
    for name, a, b in zip(("outputs", "last state"), found, expected, strict=True):
        assert_close(a, b, value, name)
    for name, a, b in zip(NAMES, found_slopes, slopes, strict=True):
        assert_close(a, b, gradient, f"gradient of {name}")


@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_any_length_gives_the_loops_values_and_gradients(length, by_channel):
    assert_is_the_loop(make_inputs(length, by_channel))


@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("gate", [0.0, -1e-7, -90.0, -1e4])
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_gates_and_betas_at_their_bounds(gate, beta, by_channel):
    inputs = make_inputs(CHUNK + 5, by_channel)
    inputs[3], inputs[4] = mx.full(inputs[3].shape, gate), mx.full(inputs[4].shape, beta)
    assert_is_the_loop(inputs)


@pytest.mark.parametrize("by_channel", [False, True])
def test_strong_decay_between_weak_ones_costs_no_digits(by_channel):
    """Gates of exp(-100) at every third token, of exp(-0.01) elsewhere: their sum over a chunk is beyond -2,000."""
    inputs = make_inputs(2 * CHUNK, by_channel)
    strong = (mx.arange(2 * CHUNK) % 3 == 0).reshape(1, -1, *[1] * (inputs[3].ndim - 2))
    inputs[3] = mx.broadcast_to(mx.where(strong, -100.0, -0.01), inputs[3].shape)
    assert_is_the_loop(inputs, value=1e-6, gradient=2e-6)


@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize(("beta", "value"), [(0.5, 1e-5), (1.0, 1e-5), (1.9, 1e-4)])
def test_one_key_for_all_tokens_costs_few_digits(beta, value, by_channel):
    """The triangular system has beta in all its entries; the powers of its matrix reach 1e18.

    With beta near 2 each update undoes the one before: the system's solution is less well determined than the loop.
    """
    inputs = make_inputs(2 * CHUNK, by_channel)
    inputs[1] = mx.broadcast_to(inputs[1][:, :1], inputs[1].shape)
    inputs[3], inputs[4] = mx.full(inputs[3].shape, -1e-4), mx.full(inputs[4].shape, beta)
    assert_is_the_loop(inputs, value, 10 * value)


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


def test_a_sequence_in_two_parts_is_the_whole():
    inputs = make_inputs(100)
    first, middle = gated_delta_rule(*(x[:, :37] for x in inputs[:5]), inputs[5])
    second, last = gated_delta_rule(*(x[:, 37:] for x in inputs[:5]), middle)
    whole, expected = gated_delta_rule(*inputs)
    assert_close(mx.concatenate([first, second], axis=1), whole, 1e-6)
    assert_close(last, expected, 1e-6)


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


GATED = (
    "bailing_moe_v3",
    "kimi_k3",
    "kimi_linear",
    "olmo_hybrid",
    "prism_hadamard_qwen35",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_next",
)


def make_gated(name):
    """A model whose gated delta layers alone are trained, with more tokens than a chunk holds."""
    model = make_model(name)
    model.freeze()
    layers = [module for module in model.modules() if "A_log" in module]
    assert layers
    for module in (module for layer in layers for module in layer.modules() if "scales" not in module):
        module.unfreeze(recurse=False)
    return model.train(), mx.random.randint(0, 101, (2, CHUNK + 7), key=mx.random.key(1))


def logits_and_gradients(model, tokens, **options):
    def total(model):
        logits = model(tokens, **options)
        return mx.sin(logits).mean(), logits

    (_, logits), gradients = nn.value_and_grad(model, total)(model)
    return {"logits": logits, **dict(tree_flatten(gradients))}


def refuse(*_):
    raise AssertionError("the loop over tokens ran")


@pytest.mark.parametrize("name", GATED)
def test_a_model_in_chunks_has_upstreams_logits_and_gradients(name, monkeypatch):
    model, tokens = make_gated(name)
    expected = logits_and_gradients(model, tokens)
    with recurrences_in_pieces(model.modules()), monkeypatch.context() as patch:
        patch.setattr(gated_delta, "gated_delta_ops", refuse)
        found = logits_and_gradients(model, tokens)
    assert len(found) > 3 and found.keys() == expected.keys()
    for key, value in found.items():
        size = mx.abs(expected[key]).max().item()
        assert size > 0, key
        assert mx.abs(value - expected[key]).max().item() <= 1e-4 * size, key


def test_a_cached_prompt_goes_on_in_chunks():
    model, tokens = make_gated("qwen3_5")
    expected = model(tokens)[:, 30:]
    with recurrences_in_pieces(model.modules()):
        cache = model.make_cache()
        model(tokens[:, :30], cache=cache)
        found = model(tokens[:, 30:], cache=cache)
    assert_close(found, expected, 1e-5)


def test_outside_the_context_the_loop_runs_as_it_does_upstream(monkeypatch):
    model, tokens = make_gated("qwen3_5")
    before = model(tokens)
    with pytest.raises(KeyError), recurrences_in_pieces(model.modules()):
        raise KeyError
    assert mx.array_equal(model(tokens), before)
    monkeypatch.setattr(gated_delta, "gated_delta_ops", refuse)
    with pytest.raises(AssertionError, match="loop"):
        model(tokens)


@pytest.mark.skipif(shutil.which("g++") is None, reason="MLX compiles for the CPU with g++")
def test_a_compiled_gradient_is_the_same():
    inputs = make_inputs(2, batch=1, key_heads=1, value_heads=1)
    (_, state), expected = values_and_gradients(gated_delta_rule, inputs)
    (_, compiled_state), found = mx.compile(lambda *inputs: values_and_gradients(gated_delta_rule, inputs))(*inputs)
    assert_close(compiled_state, state, 1e-6)
    for name, a, b in zip(NAMES, found, expected, strict=True):
        assert_close(a, b, 1e-6, name)


@pytest.mark.skipif(shutil.which("g++") is None, reason="MLX compiles for the CPU with g++")
def test_parts_of_what_a_layer_has_computed_are_compiled_too(monkeypatch):
    inputs = make_inputs(2 * CHUNK, batch=1, key_heads=1, value_heads=1)
    monkeypatch.setitem(recurrent.TOKENS_AT_ONCE, mx.default_device().type, CHUNK)

    def gradients(*inputs):
        return mx.grad(lambda *own: gated_delta_rule(*(0.9 * x for x in own))[0].sum(), range(5))(*inputs[:5])

    for name, a, b in zip(NAMES, mx.compile(gradients)(*inputs), gradients(*inputs), strict=False):
        assert_close(a, b, 1e-6, name)


@pytest.mark.parametrize("by_channel", [False, True])
def test_parts_of_a_sequence_that_are_prepared_apart_are_the_whole(by_channel, monkeypatch):
    inputs = make_inputs(5 * CHUNK + 3, by_channel, batch=1)
    monkeypatch.setitem(recurrent.TOKENS_AT_ONCE, mx.default_device().type, 2 * CHUNK * inputs[4].shape[2])
    assert_is_the_loop(inputs)


def test_memory_is_of_inputs_and_a_state_a_chunk(monkeypatch):
    """Both passes over a layer take an eighth of a state for each token, and twice as much for twice the tokens."""
    monkeypatch.setitem(recurrent.TOKENS_AT_ONCE, mx.default_device().type, 0)  # one chunk at a time
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

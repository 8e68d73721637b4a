"""Decayed sums, the scan of Mamba's first generation and RWKV-7's recurrence in chunks, against loops over tokens."""

import mlx.core as mx
import pytest
from test_recurrent import assert_is_the_loop

from mlx_lm.tuner.preference.state_space import CHUNK, SCAN_CHUNK, WKV_CHUNK, decayed_sums, selective_scan, wkv7


def loop(queries, keys, values, log_gates, state):
    """The recurrence as it is written down, in the arrays' own dtype, without a product of matrices."""
    repeats = values.shape[2] // keys.shape[2]
    queries, keys = (mx.repeat(x, repeats, axis=2) for x in (queries, keys))
    outputs = []
    for t in range(keys.shape[1]):
        added = values[:, t, :, :, None] * keys[:, t, :, None, :]
        state = mx.exp(log_gates[:, t])[..., None, None] * state + added
        outputs.append((state * queries[:, t, :, None]).sum(-1))
    return mx.stack(outputs, axis=1), state


def make_inputs(length, batch=2, key_heads=2, heads=6, key_width=8, value_width=5, strength=1.0):
    mx.random.seed(length)
    queries, keys = (mx.random.normal((batch, length, key_heads, key_width)) for _ in range(2))
    values = mx.random.normal((batch, length, heads, value_width))
    gates = -strength * mx.exp(mx.random.normal((batch, length, heads)))
    return [queries, keys, values, gates, mx.random.normal((batch, heads, value_width, key_width))]


def scan_loop(x, steps, write, read, A, state):
    """Mamba's recurrence as it is written down."""
    outputs = []
    for t in range(x.shape[1]):
        gate = mx.exp(steps[:, t, :, None] * A)
        state = gate * state + (steps[:, t] * x[:, t])[..., None] * write[:, t, None]
        outputs.append((state * read[:, t, None]).sum(-1))
    return mx.stack(outputs, axis=1), state


def make_tokens(length, batch=2, width=6, states=4, strength=1.0):
    mx.random.seed(length)
    x, steps = mx.random.normal((batch, length, width)), mx.random.uniform(0.01, 1, (batch, length, width))
    write, read = (mx.random.normal((batch, length, states)) for _ in range(2))
    A = -strength * mx.random.uniform(0.1, 8, (width, states))
    return [x, steps, write, read, A, mx.random.normal((batch, width, states))]


def wkv_loop(r, w, k, v, a, b, state):
    """RWKV-7's recurrence as it is written down."""
    outputs = []
    for t in range(r.shape[1]):
        turned = (state * a[:, t, :, None]).sum(-1, keepdims=True) * b[:, t, :, None]
        state = state * w[:, t, :, None] + turned + v[:, t, :, :, None] * k[:, t, :, None]
        outputs.append((state * r[:, t, :, None]).sum(-1))
    return mx.stack(outputs, axis=1), state


def make_wkv(length, batch=2, heads=3, width=8, least=0.545):
    mx.random.seed(length)
    shape = batch, length, heads, width
    r, k, v, a = (mx.random.normal(shape) for _ in range(4))
    a = -a / mx.linalg.norm(a, axis=-1, keepdims=True)
    w, b = mx.random.uniform(least, least + 0.001, shape), -a * mx.random.uniform(0, 1, shape)
    return [r, w, k, v, a, b, mx.random.normal((batch, heads, width, width))]


# What stands for a loop over tokens, the loop, its inputs, and tokens a chunk.
RECURRENCES = {
    "decayed_sums": (decayed_sums, loop, make_inputs, CHUNK),
    "selective_scan": (selective_scan, scan_loop, make_tokens, SCAN_CHUNK),
    "wkv7": (wkv7, wkv_loop, make_wkv, WKV_CHUNK),
}
# Gates with which states live for hundreds of tokens, or for as few as there can be.
GATES = [
    *(("decayed_sums", {"strength": strength}) for strength in (0.02, 1.0, 30.0)),
    *(("selective_scan", {"strength": strength}) for strength in (0.01, 1.0, 30.0)),
    *(("wkv7", {"least": least}) for least in (0.545, 0.999)),
]


@pytest.mark.parametrize("name, gates", GATES)
@pytest.mark.parametrize("chunks, more", [(0, 1), (0, 7), (1, 0), (2, 5), (3, 5), (5, 3)])
def test_values_and_gradients_are_the_loops(name, gates, chunks, more):
    function, loop, make, chunk = RECURRENCES[name]
    assert_is_the_loop(make(chunks * chunk + more, **gates), function=function, loop=loop)


@pytest.mark.parametrize("name", RECURRENCES)
def test_without_a_state_it_begins_with_zeros(name):
    function, _, make, chunk = RECURRENCES[name]
    *arrays, state = make(chunk + 3)
    for a, b in zip(function(*arrays), function(*arrays, mx.zeros_like(state)), strict=True):
        assert mx.array_equal(a, b)


@pytest.mark.parametrize("name", RECURRENCES)
def test_sums_are_in_float32(name):
    """Half precision's inputs alone are rounded."""
    function, _, make, chunk = RECURRENCES[name]
    inputs = [x.astype(mx.bfloat16) for x in make(chunk + 9)]
    found, exact = function(*inputs), function(*(x.astype(mx.float32) for x in inputs))
    assert all(x.dtype == mx.float32 for x in found)
    assert all(mx.allclose(a, b, atol=1e-5) for a, b in zip(found, exact, strict=True))

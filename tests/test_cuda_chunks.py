"""The gated delta rule as products of half precision, run on the CPU, against upstream's loop over tokens."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.bailing_moe_linear import recurrent_gla
from test_recurrent import loop, make_inputs, values_and_gradients, with_all, with_one_key, with_strong_decay

from mlx_lm.tuner.preference import cuda_chunks, pieces
from mlx_lm.tuner.preference.cuda_chunks import CHUNK, in_rows, order_of, products
from mlx_lm.tuner.preference.pieces import gated_delta_rule
from mlx_lm.tuner.preference.state_space import decayed_sums

pytestmark = pytest.mark.usefixtures("cuda_kernels")

# Of the norm of what the loop gives in float32: products are of numbers with eight and eleven bits, of which sums that
# cancel out lose some. And what a value of about 1 is off by, of a gradient that is nearly 0.
NEAR, NOTHING = {mx.bfloat16: 1.5e-2, mx.float16: 2e-3}, 1e-6
SIZES = {"batch": 1, "key_heads": 1, "value_heads": 2, "key_width": 32, "value_width": 32}


def inputs_of(length, dtype=mx.bfloat16, **sizes):
    queries, keys, values, gates, betas, state = make_inputs(length, **(SIZES | sizes))
    return [*(x.astype(dtype) for x in (queries, keys, values)), gates, betas.astype(dtype), state]


def assert_near(found, expected, dtype=mx.bfloat16):
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        a, b = a.astype(mx.float32), b.astype(mx.float32)
        least = NOTHING * b.size**0.5
        assert mx.linalg.norm((a - b).flatten()).item() <= NEAR[dtype] * mx.linalg.norm(b.flatten()).item() + least, (
            number
        )


def taken(function, inputs):
    """Outputs, the last state, and the gradients of a sum of both."""
    found, gradients = values_and_gradients(function, inputs)
    return [*found, *gradients]


def in_float32(inputs):
    return [x.astype(mx.float32) for x in inputs]


def assert_products_are_the_loop(inputs, dtype=mx.bfloat16):
    found = taken(in_rows, inputs)
    assert [x.dtype for x in found[2:]] == [x.dtype for x in inputs]
    assert_near(found, taken(loop, in_float32(inputs)), dtype)


@pytest.mark.parametrize(
    "length, dtype",
    [*((length, mx.bfloat16) for length in (1, CHUNK - 1, CHUNK, 2 * CHUNK + 13)), (2 * CHUNK + 13, mx.float16)],
    ids=str,
)
def test_any_length_gives_the_loops_values_and_gradients(length, dtype):
    assert_products_are_the_loop(inputs_of(length, dtype), dtype)


@pytest.mark.parametrize("sizes", [{"key_width": 64, "value_heads": 1}, {"value_width": 96, "batch": 2}], ids=str)
def test_sizes_that_differ(sizes):
    assert_products_are_the_loop(inputs_of(CHUNK + 9, **sizes))


@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("gate", [0.0, -1e-3, -90.0])
def test_gates_and_betas_at_their_bounds(gate, beta):
    *others, gates, betas, state = inputs_of(CHUNK + 9)
    inputs = with_all([*others, gates, betas, state], gate, beta)
    found = taken(in_rows, [*inputs[:4], inputs[4].astype(mx.bfloat16), state])
    for a, b in zip(found, taken(loop, in_float32(inputs)), strict=True):
        assert np.allclose(np.array(a.astype(mx.float32)), np.array(b), atol=2e-2 * max(1, mx.abs(b).max().item()))


def test_strong_decay_and_one_key():
    assert_products_are_the_loop(with_strong_decay(inputs_of(CHUNK + 9)))
    inputs = with_one_key(inputs_of(40), 0.5)
    assert_products_are_the_loop([*inputs[:4], inputs[4].astype(mx.bfloat16), inputs[5]])


@pytest.mark.parametrize("parts", [((2, 1), (4, 2)), ((2, 1), (2, 2), (2, 1))], ids=str)
def test_sequences_that_begin_with_one_are_as_if_each_began_by_itself(parts):
    """Chunks of prompts, then of both responses to each, side by side; gradients of what they share are added up."""
    order, rows = order_of(parts, True), sum(count * chunks for count, chunks in parts) * CHUNK
    *inputs, _ = (x[0] for x in inputs_of(rows, value_heads=1))
    numbers, start = [], 0
    for count, chunks in parts:
        numbers += list(start + np.arange(count * chunks * CHUNK).reshape(count, -1))
        start += count * chunks * CHUNK
    weigh = mx.cos(mx.arange(inputs[2].size)).reshape(inputs[2].shape)

    def one_by_one(*inputs):
        out = mx.zeros(inputs[2].shape)
        for number, own in enumerate(numbers[2:]):
            whole = mx.array(np.concatenate([numbers[number % 2], own]))
            found = loop(*(x[whole][None] for x in inputs), mx.zeros((1, 1, 32, 32)))[0][0]
            behind = len(numbers[0])
            out[mx.array(own)] = found[behind:]
            if number < 2:
                out[mx.array(numbers[number])] = found[:behind]
        return out

    def of_outputs(function, inputs):
        def total(*inputs):
            out = function(*inputs).astype(mx.float32)
            return (out * weigh).sum(), out

        (_, out), slopes = mx.value_and_grad(total, argnums=tuple(range(5)))(*inputs)
        return [out, *slopes]

    found = of_outputs(lambda *inputs: products(*inputs, order, alone=True)[0], inputs)
    assert_near(found, of_outputs(one_by_one, in_float32(inputs)))


@pytest.mark.parametrize(
    "sizes, dtype",
    [({}, mx.bfloat16), ({"batch": 2, "key_heads": 2, "value_heads": 6, "key_width": 64}, mx.float16)],
    ids=["one", "several"],
)
def test_without_betas_they_are_sums_that_decay(sizes, dtype):
    """As of Mamba's second generation; sums of sequences that begin with one are as the delta rule's above."""
    queries, keys, values, gates, _, state = inputs_of(CHUNK + 9, dtype, **sizes)

    found = taken(lambda *x: in_rows(*x[:4], None, x[4]), (queries, keys, values, gates, state))
    assert_near(found, taken(decayed_sums, in_float32((queries, keys, values, gates, state))), dtype)


def test_an_order_names_each_chunk_once_after_what_it_begins_with():
    starts, chain = order_of(((2, 2), (4, 1)), True)
    assert starts.tolist() == [0, 4, 8]
    assert chain.tolist() == [[0, 0], [1, 0], [4, 1], [6, 2], [2, 0], [3, 0], [5, 1], [7, 2]]
    starts, chain = order_of(((2, 2), (1, 1)), False)
    assert starts.tolist() == [0, 2, 4, 5] and not chain[:, 1].any().item()


@pytest.mark.parametrize("capability, name", [((8, 0), "chunks_prepared"), ((7, 5), "gated_delta_forward")])
def test_on_cuda_they_stand_in_for_half_precision(capability, name, cuda_kernels, monkeypatch):
    monkeypatch.setattr(pieces, "on_cuda", lambda: True)
    monkeypatch.setattr(cuda_chunks, "capability", lambda: capability)
    gated_delta_rule(*inputs_of(5))
    assert cuda_kernels[0] == name
    cuda_kernels.clear()
    gated_delta_rule(*(x.astype(mx.float32) for x in inputs_of(5)))
    assert cuda_kernels == ["gated_delta_forward"]


def test_bailings_linear_attention_is_of_them(cuda_kernels, monkeypatch):
    monkeypatch.setattr(pieces, "on_cuda", lambda: True)
    monkeypatch.setattr(cuda_chunks, "capability", lambda: (8, 0))
    attend = pieces.RECURRENCES["bailing_moe_linear", None, "recurrent_gla"](recurrent_gla, None)
    arrays = [mx.random.normal((2, 3, CHUNK + 5, 32)).astype(mx.bfloat16) for _ in range(3)]
    inputs = [*arrays, -mx.array([0.01, 0.3, 2.0]), mx.random.normal((2, 3, 32, 32))]
    found = taken(lambda q, k, v, g, h: attend(q, k, v, g, 0.2, h), inputs)
    assert_near(found, taken(lambda q, k, v, g, h: recurrent_gla(q, k, v, g, 0.2, h), in_float32(inputs)))
    kernels = ("states", "outputs", "own_slopes", "state_slopes", "token_slopes")
    assert set(cuda_kernels) == {f"chunks_{name}" for name in kernels}

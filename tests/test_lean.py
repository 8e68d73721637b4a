"""Layers that compute what mlx-lm's do with less work."""

from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architectures import make_model
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.tuner.preference.lean import (
    LeanLoRALinear,
    UnpackedEmbedding,
    UnpackedLinear,
    blocked_attention,
    computed_again,
    lean_attention,
    lean_attentions,
    lean_layers,
    padded_attention,
    unpacked_head,
)
from mlx_lm.tuner.utils import linear_to_lora_layers
from plain_pass import PAIRS, add_lora, gradient_error, plain_gradient, plain_logps, reference_of, scored_gradient

from mlx_lm.models import qwen3
from mlx_lm.models.activations import swiglu
from mlx_lm.tuner.preference import lean
from mlx_lm.tuner.preference.batches import ARRANGEMENTS, make_batch
from mlx_lm.tuner.preference.logps import Scorer

ATTENTION = mx.fast.scaled_dot_product_attention


def adapted(**options):
    """A `LoRALinear` of 24 inputs and 40 outputs, no matrix of it zero."""
    layer = LoRALinear.from_base(nn.Linear(24, 40), r=4, **options)
    layer.lora_b = mx.random.normal(layer.lora_b.shape)
    layer.freeze()
    layer.unfreeze(keys=["lora_a", "lora_b"], recurse=False)
    return layer.train()


def outputs_and_gradients(layer, x):
    """`(output, gradients of the parameters and of x)` of a sum of the layer's outputs that is not linear."""

    def total(parameters, x):
        layer.update(parameters)
        return mx.sin(layer(x)).sum()

    out = layer(x)
    _, (parameters, slope) = mx.value_and_grad(total, argnums=(0, 1))(layer.trainable_parameters(), x)
    return [out, slope, *(value for _, value in sorted(parameters.items()) if isinstance(value, mx.array))]


@pytest.mark.parametrize("shape", [(24,), (6, 24), (2, 3, 24)])
def test_a_lean_lora_layer_is_upstreams(shape):
    layer, x = adapted(scale=3.0), mx.random.normal(shape)
    expected = outputs_and_gradients(layer, x)
    with lean_layers(layer):
        assert type(layer) is LeanLoRALinear
        found = outputs_and_gradients(layer, x)
    assert type(layer) is LoRALinear and len(found) == 4
    assert all(mx.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(found, expected, strict=True))


def test_a_lean_lora_layer_keeps_dropout_and_trains_its_base_where_that_is_not_frozen():
    layer, x = adapted(scale=0.5, dropout=0.5), mx.random.normal((6, 24))

    def drawn():
        mx.random.seed(5)
        return outputs_and_gradients(layer, x)

    expected = drawn()
    with lean_layers(layer):
        assert all(mx.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(drawn(), expected, strict=True))

    layer = adapted(scale=0.5)
    layer.linear.unfreeze()
    base = nn.value_and_grad(layer, lambda layer: mx.sin(layer(x)).sum())
    expected = base(layer)[1]["linear"]["weight"]
    with lean_layers(layer):
        assert mx.allclose(base(layer)[1]["linear"]["weight"], expected, atol=1e-5)
    assert mx.abs(expected).max().item() > 0.1


def test_gradients_of_adapters_do_not_wait_for_those_of_other_layers():
    """What a layer passes on depends on its own gradients: they are taken first, and what they need is let go."""
    layers = [adapted(scale=0.1) for _ in range(12)]
    ups = [mx.random.normal((40, 24)) / 6 for _ in layers]
    x = mx.random.normal((20000, 24))

    def peak():
        def total(parameters):
            h = x
            for layer, own, up in zip(layers, parameters, ups, strict=True):
                layer.update(own)
                h = h + layer(h) @ up
            return h.sum()

        gradient = mx.grad(total)([layer.trainable_parameters() for layer in layers])
        mx.eval(x, ups)
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(gradient)
        return mx.get_peak_memory() - before

    plain = peak()
    for layer in layers:
        layer.__class__ = LeanLoRALinear
    assert peak() < 0.75 * plain


def test_nothing_but_inputs_is_kept_where_it_is_computed_again():
    def wave(a, b):
        return mx.sin(mx.exp(mx.sin(a)) * mx.exp(b))

    inputs = [mx.random.normal((50, 1000)) for _ in range(2)]

    def taken(function):
        def total(a, b):
            for _ in range(6):
                a, b = function(a, b), function(b, a)
            return (a * b).sum()

        gradient = mx.grad(total, argnums=(0, 1))(*inputs)
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(gradient)
        return gradient, mx.get_peak_memory() - before

    (expected, whole), (found, kept) = taken(wave), taken(computed_again(wave))
    assert all(mx.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(found, expected, strict=True))
    assert kept < 0.6 * whole


def test_a_gpu_keeps_no_activations_that_it_can_compute_again(monkeypatch):
    model = add_lora(make_model("qwen3"))
    reference = reference_of(plain_logps(model))
    expected = plain_gradient(model, reference)
    with lean_layers(model):
        assert qwen3.swiglu is swiglu
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    with lean_layers(model):
        assert qwen3.swiglu is not swiglu
        scorer = Scorer(model)
        assert gradient_error(scored_gradient(scorer, reference), expected) < 1e-4
    assert qwen3.swiglu is swiglu


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = qwen3.MLP(32, 256)

    def __call__(self, x):
        return x + self.mlp(x)


def test_a_gpu_keeps_neither_activations_nor_what_they_make(monkeypatch):
    """Of a block's wide arrays gate and up stay: not the sigmoid, its products, or down's input."""
    blocks = nn.Sequential(*(Block() for _ in range(8)))
    blocks.freeze()
    linear_to_lora_layers(blocks, 8, {"rank": 2, "dropout": 0.0, "scale": 2.0})
    x = mx.random.normal((4000, 32))

    def total(parameters):
        blocks.update(parameters)
        return mx.sin(blocks(x)).sum()

    def taken():
        with lean_layers(blocks):
            gradient = mx.grad(total)(kept)
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(gradient)
        return dict(tree_flatten(gradient)), mx.get_peak_memory() - before

    kept = tree_map(lambda value: value + 0.01, blocks.trainable_parameters())
    mx.eval(x, blocks.parameters(), kept)
    expected, most = taken()
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    found, least = taken()
    assert all(mx.allclose(found[name], expected[name], rtol=1e-3, atol=1e-4) for name in expected)
    assert any(mx.abs(value).max().item() > 0.1 for value in expected.values())
    assert least < 0.7 * most


# Lengths of queries and keys, and those that attention is given.
LENGTHS = [
    ((5, 5), (128, 128)),
    ((128, 128), (128, 128)),
    ((130, 130), (256, 256)),
    ((20, 24), (128, 128)),
    ((10, 400), (128, 512)),
    ((100, 300), (256, 384)),
    ((2, 2), (128, 128)),
]


def attended(function, lengths, dtype=mx.float32, mask="causal", heads=(4, 2)):
    """`[output, gradients of queries, keys and values]` of random ones, 8 dimensions a head."""
    draw = np.random.default_rng(0)
    shapes = [(2, count, length, 8) for count, length in zip((heads[0], heads[1], heads[1]), (*lengths, lengths[1]),
                                                             strict=True)]  # fmt: skip
    arrays = [mx.array(draw.normal(size=shape), mx.bfloat16).astype(dtype) for shape in (*shapes, shapes[0])]
    (out,), slopes = mx.vjp(lambda *qkv: function(*qkv, scale=0.4, mask=mask), arrays[:3], arrays[3:])
    return [out, *slopes]


def errors(found, expected):
    assert [value.shape for value in found] == [value.shape for value in expected]
    return [
        (mx.linalg.norm(a.astype(mx.float32) - b) / mx.linalg.norm(b)).item()
        for a, b in zip(found, expected, strict=True)
    ]


def spied(function, seen):
    """`function` whose attention notes the lengths of its queries and keys."""

    def attention(*args, **options):
        seen.append((args[0].shape[2], args[1].shape[2]))
        assert args[1].shape == args[2].shape
        return ATTENTION(*args, **options)

    return partial(function, attention)


@pytest.mark.parametrize("lengths, given", LENGTHS)
def test_padded_attention_is_attention(lengths, given):
    seen = []
    found = attended(spied(padded_attention, seen), lengths, mx.bfloat16)
    assert max(errors(found, attended(ATTENTION, lengths))) < 2e-2  # rounded to bfloat16, or a token off
    assert seen == [given]


@pytest.mark.parametrize("lengths", [(100, 100), (40, 100), (33, 33), (1, 50)])
@pytest.mark.parametrize("mask", ["causal", None, "window", "rows"])
def test_attention_in_blocks_is_attention(lengths, mask, monkeypatch):
    queries, keys = lengths
    place, key = mx.arange(keys - queries, keys)[:, None], mx.arange(keys)
    if mask == "window":
        mask = (key <= place) & (key > place - 7)
    elif mask == "rows":
        mask = (key > 3)[None]
    monkeypatch.setattr(lean, "BLOCK_SCORES", 2 * 4 * keys * 32)
    seen = []
    found = attended(spied(blocked_attention, seen), lengths, mask=mask)
    assert max(errors(found, attended(ATTENTION, lengths, mask=mask))) < 1e-5
    blocks = -(-queries // 32)
    assert len(seen) == 2 * blocks and {length for length, _ in seen} <= {32, queries % 32, queries}
    causal = isinstance(mask, str)
    assert sorted({length for _, length in seen})[0] == (keys - queries + min(32, queries) if causal else keys)


def test_memory_of_attention_in_blocks_grows_with_its_length(monkeypatch):
    monkeypatch.setattr(lean, "BLOCK_SCORES", 2**16)

    def peak(function, length):
        gradient = mx.grad(lambda x: function(x, x, x, scale=0.4, mask="causal").sum())(mx.ones((1, 4, length, 8)))
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(gradient)
        return mx.get_peak_memory() - before

    blocked = partial(blocked_attention, ATTENTION)
    assert peak(ATTENTION, 1024) > 3.5 * peak(ATTENTION, 512)
    assert peak(blocked, 1024) < 2.5 * peak(blocked, 512) < peak(ATTENTION, 512) / 2


@pytest.mark.parametrize(
    "device, dtype, mask, dimension, chosen",
    [
        ("cpu", mx.float32, "causal", 8, "blocked"),
        ("cpu", mx.float32, "causal", 32, "plain"),  # few keys for its width
        ("cpu", mx.float32, None, 8, "blocked"),
        ("cpu", mx.float32, mx.ones((100, 100), mx.bool_), 8, "blocked"),
        ("cpu", mx.float32, mx.zeros((100, 100)), 8, "plain"),  # it may have a gradient
        ("metal", mx.bfloat16, "causal", 8, "blocked"),
        ("cuda", mx.bfloat16, "causal", 8, "padded"),
        ("cuda", mx.bfloat16, "causal", 32, "padded"),
        ("cuda", mx.bfloat16, "causal", 136, "plain"),
        ("cuda", mx.float32, "causal", 8, "blocked"),
        ("cuda", mx.bfloat16, None, 8, "blocked"),
    ],
)
def test_which_attention_a_step_takes(device, dtype, mask, dimension, chosen, monkeypatch):
    taken = []
    monkeypatch.setattr(lean, "padded_attention", lambda *_, **__: taken.append("padded"))
    monkeypatch.setattr(lean, "blocked_attention", lambda *_, **__: taken.append("blocked"))
    if device != "cpu":
        monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
        monkeypatch.setattr(mx.metal, "is_available", lambda: device == "metal")
    x = mx.zeros((1, 2, 100, dimension), dtype)
    lean_attention(lambda *_, **__: taken.append("plain"), x, x, x, scale=1.0, mask=mask)
    assert taken == [chosen]
    lean_attention(lambda *_, **__: taken.append("with sinks"), x, x, x, scale=1.0, mask=None, sinks=mx.zeros((2,)))
    assert taken == [chosen, "with sinks"]


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("checkpoint", [True, False])
def test_gradients_with_lean_attention_are_the_plain_ones(arrangement, checkpoint, monkeypatch):
    model = add_lora(make_model("qwen3"))
    expected = plain_logps(model)
    gradient = plain_gradient(model, reference_of(expected))
    monkeypatch.setattr(lean, "KEYS_A_DIMENSION", 0)
    monkeypatch.setattr(lean, "BLOCK_SCORES", 1)
    scorer = Scorer(model)
    with lean_attentions():
        assert mx.fast.scaled_dot_product_attention is not ATTENTION
        found = scored_gradient(scorer, reference_of(expected), PAIRS, arrangement, checkpoint)
    assert mx.fast.scaled_dot_product_attention is ATTENTION
    assert gradient_error(found, gradient) < 1e-4


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_scores_with_padded_attention_are_the_plain_ones(arrangement, monkeypatch):
    model = add_lora(make_model("qwen3"))
    model.set_dtype(mx.bfloat16)
    expected = plain_logps(model)
    gradient = plain_gradient(model, reference_of(expected))
    monkeypatch.setattr(lean, "ATTENTION_TILE", 16)
    scorer = Scorer(model)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", partial(padded_attention, ATTENTION))
    assert mx.abs(scorer(make_batch(PAIRS, arrangement)[0]).total - expected).max().item() < 0.3
    assert gradient_error(scored_gradient(scorer, reference_of(expected), PAIRS, arrangement), gradient) < 0.1


class TwoQuantized(nn.Module):
    def __init__(self, bits, mode):
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.embedding = nn.Embedding(32, 64)
        self.linear.bias = mx.random.normal((64,))
        nn.quantize(self, group_size=32, bits=bits, mode=mode)

    def __call__(self, x):
        return self.embedding.as_linear(self.linear(x))


@pytest.mark.parametrize("bits, mode", [(4, "affine"), (8, "affine"), (4, "mxfp4")])
def test_weights_are_unpacked_for_products_on_a_cpu(bits, mode):
    model = TwoQuantized(bits, mode)
    packed = [type(model.linear), type(model.embedding)]
    x = mx.random.normal((2, 5, 64))
    slope = mx.grad(lambda x: mx.square(model(x)).sum())
    expected, expected_slope = model(x), slope(x)
    with lean_layers(model):
        assert [type(model.linear), type(model.embedding)] == [UnpackedLinear, UnpackedEmbedding]
        assert mx.allclose(model(x), expected, rtol=1e-4, atol=1e-4)
        assert mx.allclose(slope(x), expected_slope, rtol=1e-4, atol=1e-3)
    with unpacked_head(model.embedding, "as_linear", x):
        assert mx.allclose(model(x), expected, rtol=1e-4, atol=1e-4)
        assert mx.allclose(slope(x), expected_slope, rtol=1e-4, atol=1e-3)
    with unpacked_head(model.linear, "__call__", x):
        assert mx.allclose(model(x), expected, rtol=1e-4, atol=1e-4)
    assert [type(model.linear), type(model.embedding)] == packed

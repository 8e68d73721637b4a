"""Layers that compute what mlx-lm's do with less work, and what is done to a model's modules from outside."""

from functools import partial

import mlx.core as mx
import mlx.nn as nn
import pytest
from architectures import make_model
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import KVCache
from mlx_lm.models.switch_layers import SwitchGLU, SwitchLinear, SwitchMLP
from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers
from plain_pass import PAIRS, add_lora, gradient_error, make_pairs, plain_logps, reference_of
from plain_pass import scored_gradient as gradient_of

from mlx_lm.models import activations, gemma3_text, qwen3, switch_layers
from mlx_lm.models.activations import swiglu
from mlx_lm.tuner.preference.attention import RowCache
from mlx_lm.tuner.preference.batches import ARRANGEMENTS, PLAIN, make_batch
from mlx_lm.tuner.preference.experts import gather_sort
from mlx_lm.tuner.preference.intercept import drawing_from, exchanged, intercepted, parameters_in, recomputed
from mlx_lm.tuner.preference.layers import (
    DepthwiseConv1d,
    LeanLoRALinear,
    checkpointed_layers,
    lean_layers,
    multiplied_once,
)
from mlx_lm.tuner.preference.logps import Scorer
from mlx_lm.tuner.preference.options import ConfigError
from mlx_lm.tuner.preference.unpacked import UnpackedEmbedding, UnpackedLinear, unpacks

keeping_little = partial(exchanged, activations, "keeps_little", True)


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
    with lean_layers(layer.modules()):
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
    with lean_layers(layer.modules()):
        assert all(mx.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(drawn(), expected, strict=True))

    layer = adapted(scale=0.5)
    layer.linear.unfreeze()
    base = nn.value_and_grad(layer, lambda layer: mx.sin(layer(x)).sum())
    expected = base(layer)[1]["linear"]["weight"]
    with lean_layers(layer.modules()):
        assert mx.allclose(base(layer)[1]["linear"]["weight"], expected, atol=1e-5)
    assert mx.abs(expected).max().item() > 0.1


@pytest.mark.parametrize(
    "weight, values, bias",
    [(mx.float32, mx.bfloat16, False), (mx.float32, mx.float16, False), (mx.bfloat16, mx.bfloat16, True)],
)
def test_gradients_of_a_layer_wider_than_its_input_have_the_inputs_dtype(weight, values, bias):
    """An operation before it, such as a norm, reads them as of its own output's dtype."""
    linear = nn.Linear(24, 40, bias=bias)  # its bias stays float32
    linear.weight = linear.weight.astype(weight)
    layer = LoRALinear.from_base(linear, r=4)
    layer.lora_b = 0.01 * mx.random.normal(layer.lora_b.shape)
    layer.linear.freeze()
    x = mx.random.normal((6, 24))

    def slope():
        return mx.grad(lambda x: mx.sin(layer(x.astype(values)).astype(mx.float32)).sum())(x)

    expected = slope()
    with lean_layers(layer.modules()):
        assert mx.linalg.norm(slope() - expected) < 0.02 * mx.linalg.norm(expected)
        _, (given,) = mx.vjp(layer, [x.astype(values)], [mx.ones((6, 40), layer(x.astype(values)).dtype)])
    assert given.dtype == values


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("taps", "length"), [(4, 11), (4, 4), (1, 3)])
def test_a_depthwise_convolution_is_upstreams(taps, length, bias):
    layer, x = nn.Conv1d(6, 6, taps, groups=6, bias=bias), mx.random.normal((2, length, 6))
    expected = outputs_and_gradients(layer, x)
    with lean_layers(layer.modules()):
        assert type(layer) is DepthwiseConv1d
        found = outputs_and_gradients(layer, x)
    assert type(layer) is nn.Conv1d and len(found) == 3 + bias
    assert all(mx.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(found, expected, strict=True))


def test_a_depthwise_convolution_in_half_precision_is_rounded_once():
    layer, x = nn.Conv1d(8, 8, 4, groups=8, bias=False), mx.random.normal((1, 200, 8)).astype(mx.bfloat16)
    layer.set_dtype(mx.bfloat16)
    half = x.astype(mx.float32), layer.weight.astype(mx.float32)
    with lean_layers(layer.modules()):
        out, (slope, own) = mx.vjp(lambda x, w: layer.update({"weight": w})(x), [x, layer.weight], [x[:, 3:]])
    expected, slopes = mx.vjp(lambda x, w: mx.conv1d(x, w, groups=8), half, [half[0][:, 3:]])
    for found, exact in zip([*out, slope, own], [*expected, *slopes], strict=True):
        assert found.dtype == mx.bfloat16 and mx.allclose(found, exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("options", [{"groups": 3}, {"padding": 1}, {"stride": 2}, {"dilation": 2}, {"groups": 1}])
def test_other_convolutions_are_left_alone(options):
    layer = nn.Conv1d(6, 6, 3, **{"groups": 6} | options)
    with lean_layers(layer.modules()):
        assert type(layer) is nn.Conv1d


@pytest.mark.usefixtures("one_by_one")
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


def taken(gradient):
    """A gradient, and the bytes that it took."""
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(gradient)
    return gradient, mx.get_peak_memory() - before


@pytest.mark.usefixtures("one_by_one")
def test_an_activation_that_is_computed_again_keeps_nothing_but_its_inputs():
    # Near the value that the activation leaves as it is, 1.28: more would grow without end, less vanish.
    inputs = [mx.random.uniform(1.2, 1.36, (50, 1000)) for _ in range(2)]

    def total(a, b):
        for _ in range(4):
            a, b = swiglu(a, b), swiglu(b, a)
        return mx.sin(a * b).sum()

    def gradient():
        return taken(mx.grad(total, argnums=(0, 1))(*inputs))

    expected, whole = gradient()
    with keeping_little():
        found, kept = gradient()
    errors = [mx.linalg.norm(a - b) / mx.linalg.norm(b) for a, b in zip(found, expected, strict=True)]
    assert max(errors).item() < 1e-4
    assert mx.abs(expected[0]).max().item() > 0.1
    assert kept < 0.8 * whole


def test_activations_are_computed_again_within_the_context_alone():
    assert qwen3.swiglu is swiglu is activations.swiglu
    runs, original = [], activations._gated
    try:
        activations._gated = lambda *arrays: runs.append(1) or original(*arrays)
        x = mx.ones((2,))
        with keeping_little(), keeping_little():
            swiglu(x, x)
        with pytest.raises(ZeroDivisionError), keeping_little():
            swiglu(x, 1 / 0)
        swiglu(x, x)
    finally:
        activations._gated = original
    assert runs == [1]


def geglu(gate, x):
    return nn.gelu_approx(gate) * x


# Ours, what it is of mlx-lm's, and the factors of what it takes a sigmoid of.
GATED = {
    "swiglu": (activations.swiglu, activations._upstream_swiglu, (1.0, 0.0)),
    "geglu": (activations.geglu, geglu, (activations.SLOPE, activations.CUBIC)),
    "precise": (
        lambda gate, x: activations.precise_swiglu(x, gate, x),
        lambda gate, x: activations._upstream_precise_swiglu(x, gate, x),
        (1.0, 0.0),
    ),
    "gpt_oss": (partial(activations.swiglu_oai, alpha=1.5, limit=2.0), activations._upstream_swiglu_oai, None),
}


@pytest.mark.parametrize("name", GATED)
def test_all_ways_to_keep_little_are_upstreams(name):
    """GPUs compute a sigmoid again, CPUs keep it."""
    ours, upstreams, factors = GATED[name]
    if factors is None:
        upstreams = partial(upstreams, alpha=1.5, limit=2.0)
    inputs = [3 * mx.random.normal((7, 90), key=mx.random.key(i)) for i in range(2)]
    inputs[0][0, :4] = mx.array([-90, 90, 0, -30])

    def total(function):
        return mx.value_and_grad(lambda *inputs: mx.sin(function(*inputs)).sum(), argnums=(0, 1))(*inputs)

    expected, expected_slopes = total(upstreams)
    assert all(mx.abs(slope).max().item() > 0.1 for slope in expected_slopes)
    with keeping_little():
        ways = [total(ours), total(activations._keeping_inputs(upstreams))]
    if factors is not None:
        ways += [total(activations._keeping_sigmoid(*factors)), total(ours)]
    for found, slopes in ways:
        assert mx.allclose(found, expected, rtol=1e-5, atol=1e-4)
        assert all(mx.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(slopes, expected_slopes, strict=True))


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "gemma4_text", "llama", "gpt_oss", "qwen3_next"])
def test_models_activations_keep_little_within_the_context_alone(name, monkeypatch):
    model, runs = make_model(name), []
    for way in ("_keeping_inputs", "_keeping_sigmoid"):
        original = getattr(activations, way)
        monkeypatch.setattr(activations, way, lambda *told, original=original: runs.append(1) or original(*told))
    tokens = mx.array([[3, 1, 4, 1, 5]])
    expected = model(tokens)
    assert runs == []
    with lean_layers(list(model.modules())):
        assert mx.allclose(model(tokens), expected, 1e-3, 1e-4)
    assert len(runs) >= len(model.layers)
    runs.clear()
    assert mx.array_equal(model(tokens), expected) and runs == []


@pytest.mark.parametrize("dtypes", [(mx.bfloat16, mx.float32), (mx.float32, mx.bfloat16)])
def test_activations_of_gates_and_values_of_two_dtypes(dtypes):
    arrays = [mx.random.normal((7, 9), key=mx.random.key(i)) for i in range(2)]

    def slopes():
        def total(*arrays):
            return mx.sin(activations.swiglu(*(x.astype(d) for x, d in zip(arrays, dtypes, strict=True)))).sum()

        return mx.grad(total, argnums=(0, 1))(*arrays)

    expected = slopes()
    with keeping_little():
        assert all(mx.allclose(a, b, rtol=0.02, atol=0.02) for a, b in zip(slopes(), expected, strict=True))


class Block(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.mlp = kind(32, 256)

    def __call__(self, x):
        return x + self.mlp(x)


@pytest.mark.usefixtures("one_by_one")
@pytest.mark.parametrize("kind", [qwen3.MLP, gemma3_text.MLP])
def test_blocks_do_not_keep_their_activations(kind):
    """Of a block's wide arrays gate, up and down's input stay: not the sigmoid and its product with gate."""
    blocks = nn.Sequential(*(Block(kind) for _ in range(8)))
    blocks.freeze()
    linear_to_lora_layers(blocks, 8, {"rank": 2, "dropout": 0.0, "scale": 2.0})
    x = mx.random.normal((2000, 32))

    def total(parameters):
        blocks.update(parameters)
        return mx.sin(blocks(x)).sum()

    kept = tree_map(lambda value: value + 0.01, blocks.trainable_parameters())
    mx.eval(x, blocks.parameters(), kept)
    expected, most = taken(mx.grad(total)(kept))
    with lean_layers(blocks.modules()):
        found, least = taken(mx.grad(total)(kept))
    expected, found = dict(tree_flatten(expected)), dict(tree_flatten(found))
    assert all(mx.allclose(found[name], expected[name], rtol=1e-3, atol=1e-4) for name in expected)
    assert any(mx.abs(value).max().item() > 0.1 for value in expected.values())
    assert least < 0.85 * most


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
def test_weights_are_unpacked_for_products(bits, mode):
    model = TwoQuantized(bits, mode)
    x = mx.random.normal((2, 5, 64))
    slope = mx.grad(lambda x: mx.square(model(x)).sum())
    expected, expected_slope = model(x), slope(x)
    model.linear.__class__, model.embedding.__class__ = UnpackedLinear, UnpackedEmbedding
    assert mx.allclose(model(x), expected, rtol=1e-4, atol=1e-4)
    assert mx.allclose(slope(x), expected_slope, rtol=1e-4, atol=1e-3)


@pytest.mark.skipif(not unpacks(), reason="packed weights are multiplied as they are on Metal")
def test_weights_are_unpacked_within_the_context_alone():
    model = TwoQuantized(4, "affine")
    packed = [type(model.linear), type(model.embedding)]
    with pytest.raises(ZeroDivisionError), lean_layers(model.modules()):
        assert [type(model.linear), type(model.embedding)] == [UnpackedLinear, UnpackedEmbedding]
        raise ZeroDivisionError
    assert [type(model.linear), type(model.embedding)] == packed == [nn.QuantizedLinear, nn.QuantizedEmbedding]


@pytest.mark.skipif(not unpacks(), reason="packed weights are multiplied as they are on Metal")
@pytest.mark.parametrize("count", [50, 5], ids=["sorted by experts", "not sorted"])
@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
@pytest.mark.parametrize("kind", [SwitchGLU, SwitchMLP])
def test_experts_are_unpacked_for_products(kind, mode, count, monkeypatch):
    experts = kind(64, 32, 4, bias=True)
    experts.apply(lambda x: mx.random.normal(x.shape) / 8)
    nn.quantize(experts, group_size=32, mode=mode)
    x = mx.random.normal((count, 64))
    chosen = mx.argsort(mx.random.normal((count, 4)), axis=-1)[:, :2]
    slope = mx.grad(lambda x: mx.square(experts(x, chosen)).sum())
    expected, expected_slope = experts(x, chosen), slope(x)
    monkeypatch.delattr(mx, "gather_qmm")
    with lean_layers(experts.modules()):
        found, found_slope = experts(x, chosen), slope(x)
    assert mx.allclose(found, expected, 1e-3, 1e-3) and mx.allclose(found_slope, expected_slope, 1e-3, 1e-3)


@pytest.mark.parametrize("chosen", [1, 3])
def test_tokens_come_to_their_experts_and_back_as_upstream_has_them(chosen):
    x, indices = mx.random.normal((2, 40, 1, 1, 16)), mx.argsort(mx.random.normal((2, 40, 5)), axis=-1)[..., :chosen]
    weights = mx.random.normal((5, 16))

    def outputs(x):
        rows, experts, places = switch_layers._gather_sort(x, indices)
        return switch_layers._scatter_unsort(mx.sin(rows) * weights[experts][:, None], places, indices.shape)

    def outputs_and_slope():
        return [outputs(x), mx.grad(lambda x: mx.square(outputs(x)).sum())(x)]

    expected = outputs_and_slope()
    with lean_layers([]):
        assert switch_layers._gather_sort is gather_sort
        found = outputs_and_slope()
    assert found[0].shape == (2, 40, chosen, 1, 16) and mx.array_equal(found[0], expected[0])
    assert mx.allclose(found[1], expected[1], 1e-5, 1e-5)
    assert switch_layers._gather_sort is not gather_sort


def test_adapters_of_experts_are_multiplied_in_half_precision(monkeypatch):
    layer, multiply, dtypes = LoRASwitchLinear.from_base(SwitchLinear(16, 24, 4), r=4), mx.gather_mm, set()
    layer.lora_b = mx.random.normal(layer.lora_b.shape)
    layer.linear.set_dtype(mx.bfloat16)
    x, indices = mx.random.normal((80, 1, 16)).astype(mx.bfloat16), mx.sort(mx.random.randint(0, 4, (80,)))

    def product(a, b, **options):
        """A CPU has this product in float32 alone."""
        dtypes.add(b.dtype)
        out = multiply(a.astype(mx.float32), b.astype(mx.float32), **options)
        return out.astype(mx.bfloat16) if a.dtype == b.dtype == mx.bfloat16 else out

    def outputs():
        function = partial(layer, indices=indices, sorted_indices=True)
        return [x for part in mx.vjp(function, [x], [mx.ones((80, 1, 24), x.dtype)]) for x in part]

    monkeypatch.setattr(mx, "gather_mm", product)
    expected = outputs()
    assert dtypes == {mx.bfloat16, mx.float32}
    dtypes.clear()
    with lean_layers(layer.modules()):
        found = outputs()
    assert dtypes == {mx.bfloat16} and type(layer) is LoRASwitchLinear
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and mx.linalg.norm((a - b).astype(mx.float32)) < 0.02 * mx.linalg.norm(b)


@pytest.mark.usefixtures("one_by_one")
def test_one_modules_weights_at_a_time_are_unpacked():
    """Weights of 512 x 512 take 1 MB where they are unpacked."""

    def peak(count):
        layers = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(count)))
        nn.quantize(layers)
        for layer in layers.layers:
            layer.__class__ = UnpackedLinear
        x = mx.random.normal((4, 512))
        mx.eval(layers.parameters(), x)
        return taken(mx.grad(lambda x: mx.sin(layers(x)).sum())(x))[1]

    assert 2**20 < peak(16) < peak(4) + 2**20 < 6 * 2**20


# What is done to modules from outside


def test_one_modules_method_is_intercepted_and_given_back():
    layers = [nn.Linear(2, 2), nn.Linear(2, 2)]
    x = mx.ones((1, 2))
    expected = layers[1](x)
    with pytest.raises(ZeroDivisionError), intercepted(layers[0], "__call__", lambda layer, x: x + len(layer)):
        assert mx.array_equal(layers[0](x), x + 2)  # a weight and a bias
        assert mx.array_equal(layers[1](x), expected)
        raise ZeroDivisionError
    assert type(layers[0]) is nn.Linear and "__call__" in vars(nn.Linear)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_matrices_that_are_multiplied_once_give_the_same_logps(dtype):
    model = add_lora(make_model("llama"))
    model.apply(lambda x: mx.random.normal(x.shape, key=mx.random.key(x.size)) / 8)
    model.update(tree_map(lambda x: x.astype(dtype), model.parameters()))
    model.update(tree_map(lambda x: x.astype(mx.float32), model.trainable_parameters()))
    before, batch = dict(tree_flatten(model.parameters())), make_batch(PAIRS, PLAIN)[0]
    scorer = Scorer(model)
    expected = scorer(batch).total
    with multiplied_once(model):
        adapted = [module for module in model.modules() if isinstance(module, LoRALinear)]
        assert adapted and all(module.scale == 1.0 for module in adapted)
        assert {x.dtype for module in adapted for x in (module.lora_a, module.lora_b)} == {dtype}
        assert mx.array_equal(scorer(batch).total, expected)
    assert all(value is before[name] for name, value in tree_flatten(model.parameters()))
    assert all(module.scale != 1.0 for module in adapted)


def test_parameters_are_exchanged_for_a_while():
    linear = nn.Linear(3, 2)
    linear.freeze(keys=["bias"])
    weight = linear.weight
    with pytest.raises(ZeroDivisionError), parameters_in(linear, {"weight": mx.zeros((2, 3))}):
        assert mx.array_equal(linear(mx.ones((1, 3)))[0], linear.bias)
        raise ZeroDivisionError
    assert linear.weight is weight


def test_dropout_can_be_drawn_again():
    mx.random.seed(3)
    dropout, key = nn.Dropout(0.5), mx.random.state[0]
    first = [dropout(mx.ones((20,))) for _ in range(2)]
    with drawing_from(key):
        again = [dropout(mx.ones((20,))) for _ in range(2)]
    assert all(mx.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not mx.array_equal(*first) and not mx.array_equal(dropout(mx.ones((20,))), first[0])


# Layers computed again


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_layers_computed_again_draw_the_same_dropout(arrangement, uncompiled):
    model = add_lora(make_model("qwen3"), dropout=0.5)
    scorer = Scorer(model)
    reference = reference_of(plain_logps(model))

    def gradient(seed, checkpoint):
        mx.random.seed(seed)
        return gradient_of(scorer, reference, PAIRS, arrangement, checkpoint)

    assert gradient_error(gradient(1, True), gradient(1, False)) < 1e-5
    assert gradient_error(gradient(2, True), gradient(1, False)) > 0.1


def test_recomputing_leaves_parameters_in_their_places():
    linear = nn.Linear(3, 2)
    weight = linear.weight
    run = recomputed(linear, lambda x: [linear(x)])
    gradient = mx.grad(lambda x: mx.square(run(x)[0]).sum())(mx.ones((1, 3)))
    assert linear.weight is weight
    assert mx.allclose(gradient, 2 * (linear(mx.ones((1, 3))) @ weight))


def test_an_empty_array_among_what_is_computed_again_does_no_harm():
    linear = nn.Linear(3, 2)
    run = recomputed(linear, lambda x, nothing: [linear(x), nothing * 2])
    gradient = mx.grad(lambda x: mx.square(run(x, mx.zeros((0, 3)))[0]).sum())(mx.ones((1, 3)))
    assert mx.allclose(gradient, 2 * (linear(mx.ones((1, 3))) @ linear.weight))


class Table(nn.Module):
    """Its arguments are an index and a dict, and it returns both an array and a dict of others."""

    def __init__(self):
        super().__init__()
        self.table = mx.arange(12.0).reshape(4, 3)

    def __call__(self, states, positions, kept):
        states = mx.tanh(states + self.table[positions] / 9 + kept["seen"] / 5)
        return states, {"seen": 2 * states}


def test_layers_that_index_with_their_arguments_and_return_them_are_computed_again():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [Table(), Table(), Table()]

        def __call__(self, positions):
            states, kept = mx.zeros((2, 3)), {"seen": mx.ones((2, 3))}
            for layer in self.layers:
                states, kept = layer(states, positions, kept=kept)
            return (states * kept["seen"]).sum()

    model = Model()
    gradient = nn.value_and_grad(model, lambda model: model(mx.array([1, 3])))
    expected = gradient(model)[1]
    with checkpointed_layers(model):
        assert gradient_error(gradient(model)[1], expected) < 1e-6
    assert type(model.layers[0]) is Table


class Notes:
    """What two layers of a model share besides what they return."""

    def __init__(self):
        self.seen = None


class Noting(nn.Module):
    """Four layers that share an object."""

    def __init__(self):
        super().__init__()
        self.layers = [NotingLayer() for _ in range(4)]

    def __call__(self, x, notes):
        for layer in self.layers:
            x = layer(x, notes)
        return x


class NotingLayer(nn.Module):
    """Counts how often it runs."""

    runs = 0

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def __call__(self, x, notes):
        self.runs += 1
        x = mx.tanh(self.linear(x))
        if isinstance(notes, Notes):
            x, notes.seen = x if notes.seen is None else x + notes.seen, x
        return x


@pytest.mark.parametrize("make, again", [(Notes, False), (KVCache, False), (RowCache, True), (lambda: None, True)])
def test_layers_that_may_leave_arrays_in_an_object_run_as_they_are(make, again):
    """Computed again, a layer would give no gradient to what an earlier one left there."""
    model = Noting()
    gradient = nn.value_and_grad(model, lambda model: mx.sin(model(mx.ones((2, 3)), make())).sum())
    expected = gradient(model)[1]
    for layer in model.layers:
        layer.runs = 0
    with checkpointed_layers(model):
        found = gradient(model)[1]
        mx.eval(found)
    assert gradient_error(found, expected) < 1e-6
    # The last layer is where the backward pass begins.
    assert [layer.runs for layer in model.layers] == [1 + again] * 3 + [1]


@pytest.mark.usefixtures("one_by_one")
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_checkpointed_layers_keep_little_but_their_inputs(arrangement, uncompiled):
    """Left to itself, MLX takes the adapters' gradients last and keeps all that they need until then."""
    pairs = make_pairs([(40, 40, 40)] * 3)

    def peak(layers, checkpoint):
        model = add_lora(make_model("qwen3", hidden_size=64, intermediate_size=256, num_hidden_layers=layers))
        mx.eval(model.parameters())
        scorer, reference = Scorer(model), reference_of(mx.zeros(6))
        mx.eval(gradient_of(scorer, reference, pairs, arrangement, checkpoint))
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(gradient_of(scorer, reference, pairs, arrangement, checkpoint))
        return mx.get_peak_memory() - before

    kept, again = (peak(12, checkpoint) - peak(4, checkpoint) for checkpoint in (False, True))
    assert again < kept / 4


def test_a_model_without_layers_cannot_be_checkpointed():
    with pytest.raises(ConfigError, match="grad_checkpoint"), checkpointed_layers(nn.Linear(2, 2)):
        pass

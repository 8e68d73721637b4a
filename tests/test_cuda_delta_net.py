"""Qwen3.5's gated delta layer by kernels of its own, run on the CPU, against the one that upstream's parts make."""

from contextlib import nullcontext

import mlx.core as mx
import numpy as np
import pytest
from architectures import make_model
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.utils import linear_to_lora_layers
from plain_pass import make_pairs

from mlx_lm.tuner.preference import batches, cuda_chunks, layers, pieces
from mlx_lm.tuner.preference.attention import Parts
from mlx_lm.tuner.preference.batches import RECURRENT, make_batch
from mlx_lm.tuner.preference.layers import lean_layers, multiplied_once
from mlx_lm.tuner.preference.siblings import find_siblings

pytestmark = pytest.mark.usefixtures("cuda_kernels")

# Of the norm of what float32 gives: half precision loses 5e-3 to 1.3e-2, here and with upstream's parts.
NEAR = 1.6e-2
KERNELS = ["delta_inputs", "delta_inner_slopes", "delta_slopes", "gated_norm", "gated_norm_vjp"]


@pytest.fixture
def parts(monkeypatch):
    """Of two pairs whose prompts differ, filled up to whole chunks."""
    monkeypatch.setattr(batches, "multiple", lambda: cuda_chunks.CHUNK)
    batch, _, padding = make_batch(make_pairs([(70, 30, 20), (90, 5, 40)]), RECURRENT)
    assert padding
    return Parts(*batch.layout.recurrent)


@pytest.fixture
def on_cuda(monkeypatch):
    def switch():
        for module in (layers, pieces):
            monkeypatch.setattr(module, "on_cuda", lambda: True)
        monkeypatch.setattr(cuda_chunks, "capability", lambda: (8, 0))

    return switch


def make_layer(heads=(2, 2), width=32, value_width=32):
    """A layer's model with adapters in bfloat16, all numbers of which are as a trained one's may be."""
    sizes = {"linear_num_key_heads": heads[0], "linear_num_value_heads": heads[1]}
    model = make_model("qwen3_5", linear_key_head_dim=width, linear_value_head_dim=value_width, **sizes)
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": None})
    layer = next(own.linear_attn for own in model.layers if own.is_linear)
    layer.A_log, layer.dt_bias = mx.log(mx.random.uniform(0.1, 4, (heads[1],))), mx.random.normal((heads[1],))
    layer.norm.weight = 1 + 0.2 * mx.random.normal((value_width,))
    layer.update(tree_map(lambda x: x + 0.1 * mx.random.normal(x.shape), layer.trainable_parameters()))
    layer.set_dtype(mx.bfloat16)
    return model, layer.train()


def taken(layer, x, parts, model=None):
    """Outputs of the batch's tokens, and the gradients of inputs and, but where a model's are joined, adapters."""
    own = (parts.outputs >= 0)[:, None, None]
    weigh = mx.where(own, mx.cos(mx.arange(x.size)).reshape(x.shape), 0)

    def total(parameters, x):
        layer.update(parameters)
        out = mx.where(own, layer(x), 0)
        return (out.astype(mx.float32) * weigh).sum(), out

    parameters = layer.trainable_parameters() if model is None else {}
    with lean_layers(list(layer.modules()), parts), nullcontext() if model is None else multiplied_once(model):
        (_, out), (of_parameters, of_x) = mx.value_and_grad(total, argnums=(0, 1))(parameters, x)
    return [out, of_x, *(value for _, value in tree_flatten(of_parameters))]


def in_float32(layer):
    layer.set_dtype(mx.float32)
    return layer


def assert_near(found, expected):
    for a, b in zip(found, expected, strict=True):
        a, b = (np.array(x.astype(mx.float32)) for x in (a, b))
        assert np.linalg.norm(a - b) <= NEAR * np.linalg.norm(b)


def test_values_and_gradients_are_those_of_upstreams_parts(parts, on_cuda, cuda_kernels):
    """Of projections by themselves, and of what siblings compute, which is read where it is."""
    model, layer = make_layer((1, 2), 64, 64)
    x = mx.random.normal((len(parts.outputs), 1, layer.hidden_size)).astype(mx.bfloat16)
    kept = tree_map(lambda x: x, layer.parameters())
    expected = taken(in_float32(layer), x.astype(mx.float32), parts)
    assert not cuda_kernels
    layer.update(kept)
    on_cuda()
    found = taken(layer, x, parts)
    assert set(KERNELS) <= set(cuda_kernels) and "normed" not in cuda_kernels and "convolved" not in cuda_kernels
    assert_near(found, expected)
    # What fills a batch up is nobody's, and has no part in it.
    assert all(mx.isfinite(x).all().item() for x in found)
    groups = [own for own in find_siblings(model) if any(one is layer.in_proj_qkv for one in own.layers)]
    assert [len(own.layers) for own in groups] == [4]
    assert_near(taken(layer, x, parts, model), expected[:2])


@pytest.mark.parametrize("change", ["trained", "widths", "float32", "a float32 projection", "old"])
def test_other_layers_are_upstreams(change, parts, on_cuda, cuda_kernels, monkeypatch):
    _, layer = make_layer(value_width=64 if change == "widths" else 32)
    if change == "trained":
        layer.unfreeze(keys=["dt_bias"], recurse=False)
    if change == "a float32 projection":
        in_float32(layer.in_proj_a)
    on_cuda()
    if change == "old":
        monkeypatch.setattr(cuda_chunks, "capability", lambda: (7, 5))
    x = mx.random.normal((len(parts.outputs), 1, layer.hidden_size))
    layer = in_float32(layer) if change == "float32" else layer
    with lean_layers(list(layer.modules()), parts):
        mx.eval(layer(x if change == "float32" else x.astype(mx.bfloat16)))
    assert cuda_kernels and not any(name.startswith("delta_") for name in cuda_kernels)

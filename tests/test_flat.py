"""The trainable parameters side by side in vectors."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear
from tiny import largest_difference, short_run, some_pairs, tiny_llama, trained

from mlx_lm.tuner.preference import flat as flat_module
from mlx_lm.tuner.preference.batches import PACKED, make_batch
from mlx_lm.tuner.preference.flat import FlatParameters, lora_plus
from mlx_lm.tuner.preference.layers import lean_layers
from mlx_lm.tuner.preference.logps import Scorer
from mlx_lm.tuner.preference.objective import Objective, preference_loss
from mlx_lm.tuner.preference.step import Step

PAIRS = some_pairs(6)


def whole_llama():
    model = tiny_llama(lora=False)
    model.unfreeze()
    return model


def kinds_of(flat):
    return [kind for kind, _ in flat._parts.values()]


MODELS = {
    "LoRA": lambda: tiny_llama(moved=True),
    "DoRA": lambda: tiny_llama(use_dora=True, moved=True),
    "all weights": whole_llama,
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_model_has_views_of_the_vectors(kind):
    model = MODELS[kind]()
    before = {name: np.array(value) for name, value in tree_flatten(model.trainable_parameters())}
    flat = FlatParameters(model)
    after = dict(tree_flatten(model.trainable_parameters()))
    assert list(after) == list(before)
    assert all(after[name].dtype == mx.float32 and (np.array(after[name]) == before[name]).all() for name in before)
    flat.vectors.update({place: {leaf: 2 * x for leaf, x in part.items()} for place, part in flat.vectors.items()})
    assert all((np.array(after[name]) == before[name]).all() for name in before)
    flat.write()
    for name, value in tree_flatten(model.trainable_parameters()):
        assert (np.array(value) == 2 * before[name]).all(), name


def test_large_parameters_stay_by_themselves(monkeypatch):
    monkeypatch.setattr(flat_module, "LARGEST", 1000)
    model = whole_llama()
    sizes = {name: value.size for name, value in tree_flatten(model.trainable_parameters())}
    kinds = kinds_of(FlatParameters(model))
    assert {kind.name for kind in kinds if kind.name} == {name for name, size in sizes.items() if size > 1000}
    assert len([kind for kind in kinds if not kind.name]) == 1  # the norms


@pytest.mark.parametrize(
    "optimizer, joined",
    [
        (optim.AdamW(1e-3), True),
        (lora_plus(optim.Adam(1e-3), 4.0), True),
        (optim.SGD(1e-3), True),
        (optim.Adafactor(1e-3), False),
        (optim.Muon(1e-3), False),
        (lora_plus(optim.Muon(1e-3), 4.0), False),
    ],
)
def test_only_what_reads_each_value_by_itself_gets_joined_ones(optimizer, joined):
    kinds = kinds_of(FlatParameters(tiny_llama(), optimizer))
    assert len(kinds) == (2 if joined else 28) and all(bool(kind.name) is not joined for kind in kinds)


def test_an_optimizer_of_several_is_asked_by_the_models_names(tmp_path):
    def trained_alone(wanted, folder, **options):
        model, asked = tiny_llama(), []
        start = trained(model)
        parts = [optim.SGD(0.0), optim.Adam(1e-2)]
        optimizer = optim.MultiOptimizer(
            parts, [lambda name, value: asked.append((name, value.shape)) or wanted not in name]
        )
        short_run(model, some_pairs(8), tmp_path / folder, optimizer, **options)
        assert dict(asked) == {name: value.shape for name, value in start.items()}
        return {name for name, value in trained(model).items() if (value != start[name]).any()}

    names = trained(tiny_llama())
    for options in ({}, {"compile": True, "iters": 2}, {"on_nonfinite": "skip"}):
        found = trained_alone("layers.1.", "a", **options)
        assert found == {name for name in names if ".layers.1." in name}
    assert trained_alone("lora_b", "b", iters=2) == {name for name in names if name.endswith("lora_b")}


def test_layers_of_other_scales_or_types_have_vectors_of_their_own():
    model = tiny_llama(moved=True)
    other = model.layers[0].self_attn.q_proj
    other.scale = 3.0
    half = model.layers[1].mlp.up_proj
    half.linear.weight = half.linear.weight.astype(mx.float16)
    flat = FlatParameters(model)
    told = sorted((kind.leaf, str(kind.rounded), kind.scale) for kind in kinds_of(flat))
    full, narrow = "mlx.core.float32", "mlx.core.float16"
    assert told == [
        ("lora_b", narrow, 20.0), ("lora_b", full, 3.0), ("lora_b", full, 20.0), ("others", narrow, 1.0),
        ("others", full, 1.0),
    ]  # fmt: skip
    seen = dict(tree_flatten(flat.views(as_multiplied=True)))
    name = "model.layers.1.mlp.up_proj.lora_b"
    assert seen[name].dtype == mx.float16 and mx.array_equal(seen[name], (20.0 * half.lora_b).astype(mx.float16))
    assert mx.array_equal(seen["model.layers.0.self_attn.q_proj.lora_b"], 3.0 * other.lora_b)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_the_gradient_is_that_of_the_model(kind, dtype):
    """Of MLX's own `value_and_grad` over the model's parameters, which stay float32 where they are LoRA's."""
    model = MODELS[kind]()
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.linear.set_dtype(dtype)
    if kind != "all weights":
        model.model.embed_tokens.set_dtype(dtype)
    scorer = Scorer(model)
    objective, batch = Objective(scorer, preference_loss("dpo")), make_batch(PAIRS, PACKED)[0]
    reference = mx.zeros((6, 2, 2)) - 30
    with lean_layers(model.modules()):
        (_, expected), slopes = nn.value_and_grad(model, lambda _: objective(batch, reference, gradient=True))(model)
    expected, slopes = [np.array(x) for x in expected], dict(tree_flatten(slopes))
    step = Step(model, optim.SGD(0.1), objective, compiled=False)
    sums, gradient = step.gradient(batch, reference)
    assert np.allclose(sums, expected, rtol=1e-5 if dtype == mx.float32 else 1e-2, atol=1e-5)
    found = dict(tree_flatten(step.flat.views(gradient)))
    assert found.keys() == slopes.keys()
    for name, slope in slopes.items():
        assert found[name].dtype == slope.dtype == mx.float32
        size = mx.abs(slope).max().item()
        assert mx.abs(found[name] - slope).max().item() <= (1e-5 if dtype == mx.float32 else 2e-2) * size, name


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Lion"])
@pytest.mark.parametrize("options", [{}, {"lora_plus_ratio": 4.0}, {"on_nonfinite": "skip", "max_grad_norm": 0.5}])
def test_a_run_is_that_with_each_parameter_by_itself(name, options, tmp_path, monkeypatch):
    """Bit for bit where nothing is summed over all parameters."""

    def run(folder):
        model = tiny_llama(moved=True)
        optimizer = getattr(optim, name)(learning_rate=1e-3)
        lines, _ = short_run(model, PAIRS, tmp_path / folder, optimizer, iters=6, batch_size=3, **options)
        return trained(model), [line["loss"] for line in lines]

    weights, losses = run("joined")
    monkeypatch.setattr(flat_module, "BY_ELEMENT", ())
    alone, expected = run("alone")
    assert largest_difference(weights, alone) <= (1e-6 if "max_grad_norm" in options else 0)
    assert losses == pytest.approx(expected, abs=0 if "max_grad_norm" not in options else 1e-6)
    assert largest_difference(weights, trained(tiny_llama(moved=True))) > 1e-4


def test_adapters_that_are_not_trained_keep_their_scale_in_a_step():
    model = tiny_llama(moved=True)
    model.layers[0].freeze()
    objective = Objective(Scorer(model), preference_loss("simpo"))
    batch, reference = make_batch(PAIRS, PACKED)[0], mx.zeros((6, 2, 2))
    _, expected = objective(batch, reference)
    sums, _ = Step(model, optim.SGD(0.0), objective, compiled=False).gradient(batch, reference)
    assert sums[0].item() == pytest.approx(expected[0].item(), rel=1e-5)


def test_an_optimizer_that_was_used_before_may_be_used_again(tmp_path):
    optimizer, model = optim.Adam(1e-3), tiny_llama()
    optimizer.update(model, model.trainable_parameters())
    lines, _ = short_run(tiny_llama(), PAIRS, tmp_path, optimizer, iters=3)
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_each_parameter_begins_where_products_are_fast_and_what_fills_up_stays_zero():
    model = tiny_llama(rank=3, moved=True)
    flat = FlatParameters(model)
    sizes = [value.size for name, value in tree_flatten(model.trainable_parameters()) if name.endswith("lora_a")]
    assert any(size % flat_module.ALIGNED for size in sizes)
    (vector,) = flat.vectors["part_0"].values()
    assert vector.size == sum(-(-size // flat_module.ALIGNED) * flat_module.ALIGNED for size in sizes)
    starts = np.cumsum([0, *(-(-size // flat_module.ALIGNED) * flat_module.ALIGNED for size in sizes)])
    step = Step(model, optim.AdamW(1e-2), Objective(Scorer(model), preference_loss("dpo")), compiled=False)
    for _ in range(2):
        step(make_batch(PAIRS, PACKED)[0], mx.zeros((6, 2, 2)), True)
    (vector,) = step.flat.vectors["part_0"].values()
    gaps = [np.array(vector[start + size : stop]) for start, size, stop in zip(starts, sizes, starts[1:], strict=False)]
    assert sum(map(len, gaps)) > 0 and not np.concatenate(gaps).any()

"""LoRA layers that read one input computed as one, against each by itself."""

import copy
import gc
import pickle
import weakref
from contextlib import nullcontext
from functools import partialmethod

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from architectures import make_model
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.tuner.utils import linear_to_lora_layers
from tiny import largest_difference, short_run, some_pairs, tiny_llama, trained

from mlx_lm.models import activations
from mlx_lm.tuner.preference import layers as layers_module
from mlx_lm.tuner.preference import siblings as siblings_module
from mlx_lm.tuner.preference.batches import make_batch
from mlx_lm.tuner.preference.layers import checkpointed_layers, lean_layers, multiplied_once
from mlx_lm.tuner.preference.logps import Scorer
from mlx_lm.tuner.preference.objective import Objective, preference_loss
from mlx_lm.tuner.preference.siblings import MOST_COLUMNS
from mlx_lm.tuner.preference.step import Step
from mlx_lm.tuner.preference.unpacked import unpacks

PAIRS = some_pairs(6)
REFERENCE = mx.zeros((6, 2, 2)) - 30


def narrow_llama():
    model = tiny_llama(moved=True)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.linear.set_dtype(mx.bfloat16)
    model.model.embed_tokens.set_dtype(mx.bfloat16)
    return model


def packed_llama():
    model = tiny_llama(lora=False)
    nn.quantize(model, group_size=32, bits=4)
    return with_adapters(model)


def with_adapters(model, keys=None, rank=8):
    model.freeze()
    mx.random.seed(2)
    linear_to_lora_layers(model, 2, {"rank": rank, "scale": 5.0, "dropout": 0.0, "keys": keys})
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.lora_b = 0.05 * mx.random.normal(module.lora_b.shape)
    return model


MODELS = {
    "llama": lambda: tiny_llama(moved=True),
    "bfloat16": narrow_llama,
    "4 bit": packed_llama,
    "biases": lambda: with_adapters(make_model("qwen2")),
    "gated delta": lambda: with_adapters(make_model("qwen3_5")),
    "experts": lambda: with_adapters(make_model("qwen3_moe")),
}


def groups_of(model, **options):
    """The names of the layers that are computed together."""
    names = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
    return [[names[id(layer)] for layer in own.layers] for own in Scorer(model, together=True, **options).siblings]


@pytest.mark.parametrize(
    "kind, share, checkpoint, compiled",
    [(kind, share, not share, False) for kind in MODELS for share in (True, False)]
    + [("llama", True, True, False), ("llama", False, False, True), ("bfloat16", True, False, True)],
)
def test_gradients_and_logps_are_those_of_each_layer_by_itself(kind, share, checkpoint, compiled):
    def found(together):
        model = MODELS[kind]()
        scorer = Scorer(model, share, together=together)
        assert bool(scorer.siblings) is together
        batch = make_batch(PAIRS, scorer.arrangement)[0]
        step = Step(model, optim.SGD(0.1), Objective(scorer, preference_loss("dpo")), compiled)
        with checkpointed_layers(model) if checkpoint else nullcontext():
            sums, gradient = step.gradient(batch, REFERENCE)
        with multiplied_once(model):
            return sums, dict(tree_flatten(step.flat.views(gradient))), scorer(batch).total

    sums, gradient, logps = found(True)
    expected_sums, expected, expected_logps = found(False)
    tolerance = 2e-2 if kind == "bfloat16" else 1e-4
    assert gradient.keys() == expected.keys()
    for name, slope in expected.items():
        error = mx.abs(gradient[name] - slope).max() / mx.maximum(mx.abs(slope).max(), 1e-3)
        assert error.item() < tolerance, name
    assert np.allclose(sums, expected_sums, rtol=tolerance, atol=tolerance)
    assert np.allclose(logps, expected_logps, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(not unpacks(), reason="packed weights are multiplied as they are on Metal")
def test_joined_packed_weights_are_unpacked_too(monkeypatch):
    model = packed_llama()
    scorer = Scorer(model, together=True)
    step = Step(model, None, Objective(scorer, preference_loss("dpo")), False)
    monkeypatch.delattr(mx, "quantized_matmul")
    step.gradient(make_batch(PAIRS, scorer.arrangement)[0], REFERENCE)


def test_layers_that_read_one_input_are_found():
    assert groups_of(tiny_llama()) == 2 * [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]
    delta, full = ["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"], ["q_proj", "k_proj", "v_proj"]
    assert groups_of(MODELS["gated delta"]()) == [delta, ["gate_proj", "up_proj"], full, ["gate_proj", "up_proj"]]


@pytest.mark.parametrize(
    "model",
    [
        lambda: tiny_llama(use_dora=True),
        lambda: tiny_llama(dropout=0.1),
        lambda: tiny_llama(rank=MOST_COLUMNS // 2 + 1),
        lambda: with_adapters(tiny_llama(lora=False), keys={"self_attn.q_proj", "self_attn.o_proj"}),
        lambda: with_adapters(make_model("phi3")),  # which has joined them itself
    ],
    ids=["DoRA", "dropout", "large rank", "one alone", "joined before"],
)
def test_others_are_left_as_they_are(model):
    assert groups_of(model()) == []


def test_layers_that_differ_are_left_as_they_are():
    model = tiny_llama()
    model.layers[0].self_attn.q_proj.scale = 3.0
    model.layers[0].mlp.up_proj.freeze()
    model.layers[1].mlp.up_proj.linear.set_dtype(mx.float16)
    assert groups_of(model) == [["q_proj", "k_proj", "v_proj"]]


def test_nothing_is_joined_but_on_cuda_unless_asked_for():
    model = tiny_llama()
    scorer = Scorer(model)
    assert bool(scorer.siblings) is layers_module.on_cuda()
    assert Scorer(model, together=False).siblings == []


def test_the_first_layer_s_call_computes_all(monkeypatch):
    model, calls = tiny_llama(moved=True), []
    product = siblings_module.adapted
    for module in (siblings_module, layers_module):
        monkeypatch.setattr(module, "adapted", lambda *arrays: calls.append(arrays[2].shape[1]) or product(*arrays))
    scorer = Scorer(model, together=True)
    with multiplied_once(model):
        calls.clear()
        scorer(make_batch(PAIRS, scorer.arrangement)[0])
    # Three layers of rank 4 at once, the output of attention, two layers, and the one behind them.
    assert calls == 2 * [12, 4, 8, 4]


def test_gate_and_x_of_one_array_are_read_where_they_are(monkeypatch):
    """As on CUDA; here by what its kernel stands for."""

    def gradient_of(model):
        scorer = Scorer(model, together=True)
        step = Step(model, None, Objective(scorer, preference_loss("dpo")), False)
        return dict(tree_flatten(step.gradient(make_batch(PAIRS, scorer.arrangement)[0], REFERENCE)[1]))

    widths = []
    expected = gradient_of(tiny_llama(moved=True))
    monkeypatch.setattr(siblings_module, "on_cuda", lambda: True)

    def gated(both, linear, cubic):
        widths.append(both.shape[-1])
        return activations._keeping_sigmoid(linear, cubic)(*mx.split(both, 2, -1))

    monkeypatch.setattr(siblings_module, "gated", gated)
    found = gradient_of(tiny_llama(moved=True))
    assert expected and all(mx.allclose(found[name], slope, 1e-4, 1e-5) for name, slope in expected.items())
    assert len(widths) == 2 and activations.together is None
    gradient_of(with_adapters(make_model("gemma3_text")))
    assert len(widths) == 4
    widths.clear()
    # Rows that are no whole words of 16 bytes are copied.
    gradient_of(with_adapters(make_model("llama", intermediate_size=66)))
    gate, x = mx.random.normal((2, 3, 8))
    with lean_layers([]):
        activations.together = x, gate, None
        assert mx.allclose(activations.swiglu(gate, x), nn.silu(gate) * x, 1e-5, 1e-6)
    assert widths == []


def test_the_model_stays_what_it_was():
    model = tiny_llama(moved=True)
    before = {name: np.array(value) for name, value in tree_flatten(model.parameters())}
    tokens = mx.arange(8)[None]
    expected = np.array(model(tokens))
    scorer = Scorer(model, together=True)
    after = dict(tree_flatten(model.parameters()))
    assert after.keys() == before.keys() and all((np.array(after[name]) == x).all() for name, x in before.items())
    assert (np.array(model(tokens)) == expected).all()
    assert all(own.linear.weight.size == sum(x.linear.weight.size for x in own.layers) for own in scorer.siblings)
    # A second scorer of the model has the same, and no second copy of the weights.
    assert list(map(id, Scorer(model, together=True).siblings)) == list(map(id, scorer.siblings))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_model_has_none_of_its_siblings(copied):
    model = tiny_llama(moved=True)
    scorer = Scorer(model, together=True)
    other = Scorer(copied(model), together=False)
    batch = make_batch(PAIRS, scorer.arrangement)[0]
    with multiplied_once(other.model):
        assert np.allclose(other(batch).total, scorer(batch).total, rtol=1e-4, atol=1e-4)


def test_weights_that_are_exchanged_are_those_that_are_read():
    """As by `load_weights` while a scorer of the model is there."""
    model = tiny_llama(moved=True)
    scorer = Scorer(model, together=True)
    for own in scorer.siblings:
        for layer in own.layers:
            layer.linear.weight = 2 * layer.linear.weight
    batch = make_batch(PAIRS, scorer.arrangement)[0]
    expected = scorer(batch).total
    with multiplied_once(model):
        assert np.allclose(scorer(batch).total, expected, rtol=1e-4, atol=1e-4)


def test_a_model_that_is_let_go_of_is_gone():
    model = tiny_llama()
    scorer = Scorer(model, together=True)
    gc.collect()
    gc.disable()
    try:
        layer = weakref.ref(scorer.siblings[0].layers[0])
        del model, scorer
        assert layer() is None
    finally:
        gc.enable()


def test_weights_lie_in_one_place():
    model = tiny_llama()
    mx.eval(model.parameters())
    before = mx.get_active_memory()
    scorer = Scorer(model, together=True)
    assert mx.get_active_memory() - before < 0.02 * before and scorer.siblings


@pytest.mark.parametrize(
    "rank, options", [(4, {}), (4, {"lora_plus_ratio": 4.0}), (4, {"grad_checkpoint": True}), (3, {})], ids=str
)
def test_a_run_trains_the_same_adapters(rank, options, tmp_path, monkeypatch):
    def run(folder, **more):
        model = tiny_llama(rank=rank, moved=True)
        short_run(model, PAIRS, tmp_path / folder, optim.AdamW(1e-3), batch_size=3, **options, **more)
        return trained(model)

    expected = run("apart", iters=6)
    monkeypatch.setattr(Scorer, "__init__", partialmethod(Scorer.__init__, together=True))
    assert largest_difference(run("together", iters=6), expected) < 1e-5
    # A run goes on from the state of one whose layers were computed each by itself.
    run("half", iters=3)
    monkeypatch.undo()
    assert largest_difference(run("half", iters=6, resume=True), expected) < 1e-5


def test_layers_by_themselves_are_right_while_others_are_held():
    """As where a model calls them with other inputs, one without the others."""
    model = tiny_llama(moved=True)
    scorer = Scorer(model, together=True)
    (own, *_), x, y = scorer.siblings, mx.random.normal((1, 5, 64)), mx.random.normal((1, 5, 64))
    width = own.layers[0].lora_a.shape[0]
    x, y = x[..., :width], y[..., :width]
    with lean_layers(model.modules()):
        expected = [layer(z) for z in (x, y) for layer in own.layers]
        with multiplied_once(model):
            found = [own.layers[1](y)]
            found = [layer(x) for layer in own.layers] + [layer(y) for layer in own.layers] + found
    for one, other in zip(found, [*expected, expected[len(own.layers) + 1]], strict=True):
        assert np.allclose(one, other, rtol=1e-4, atol=1e-5)

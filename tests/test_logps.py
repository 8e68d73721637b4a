"""Scores of batches: the output head run apart, prompts shared, layers computed again; against the plain pass."""

import shutil

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from architectures import make_model
from mlx.utils import tree_flatten
from mlx_lm.tuner.preference.head import Head
from mlx_lm.tuner.preference.modules import recomputed
from mlx_lm.tuner.preference.sharing import can_share_prompt, checkpointed_layers
from plain_pass import (
    PAIRS,
    add_lora,
    arrangements_for,
    gradient_error,
    make_pairs,
    plain_gradient,
    plain_logps,
    reference_of,
    scored_gradient,
)

from mlx_lm.models import llama
from mlx_lm.tuner.datasets import Pair
from mlx_lm.tuner.preference import head as head_module
from mlx_lm.tuner.preference import step as step_module
from mlx_lm.tuner.preference.batches import ARRANGEMENTS, CACHED, PACKED, PLAIN, make_batch
from mlx_lm.tuner.preference.logps import Scorer
from mlx_lm.tuner.preference.objective import preference_loss
from mlx_lm.tuner.preference.options import ConfigError
from mlx_lm.tuner.preference.step import Objective, Step

TIED, UNTIED = "qwen2", "qwen3"


@pytest.fixture(autouse=True)
def uncompiled():
    """Compiling upstream's small functions takes longer than running them; one test below compiles."""
    mx.disable_compile()
    yield
    mx.enable_compile()


class Wrapped(nn.Module):
    """A language model whose logits `change` makes into something else."""

    def __init__(self, model, change):
        super().__init__()
        self.model = model
        self.change = change

    def __call__(self, tokens, cache=None):
        return self.change(self.model(tokens, cache=cache))

    @property
    def layers(self):
        return self.model.layers


def check(model, pairs=PAIRS, tolerance=1e-4, scorer=None):
    """Scores and gradients, in every arrangement, are the plain pass's; returns the scorer."""
    scorer = scorer or Scorer(model)
    expected = plain_logps(model, pairs)
    reference = reference_of(expected)
    gradient = plain_gradient(model, reference, pairs)
    for arrangement in arrangements_for(scorer):
        batch, *_ = make_batch(pairs, arrangement)
        assert mx.abs(scorer(batch).total - expected).max().item() < tolerance
        assert gradient_error(scored_gradient(scorer, reference, pairs, arrangement), gradient) < tolerance
    return scorer


# What a row is worth


class Table(nn.Module):
    """A model whose logits depend on the input token alone: row `t` of `table`, `(V, V)`."""

    def __init__(self, probabilities):
        super().__init__()
        self.table = mx.array(np.log(probabilities), mx.float32)

    def __call__(self, inputs):
        return self.table[inputs]


def test_sums_are_over_responses_over_their_common_length_and_aligned():
    probabilities = np.array([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125], [0.2, 0.3, 0.5]])
    # After the prompt's last token 1: chosen 2 0 1 with 0.125, 0.2, 0.25; rejected 1 with 0.75.
    scorer = Scorer(Table(probabilities))
    assert scorer.head is None and scorer.arrangement == PLAIN
    rows = scorer(make_batch([Pair([0, 1], [2, 0, 1], [1])], PLAIN)[0], alignment=True)
    assert np.allclose(rows.total, np.log([0.125 * 0.2 * 0.25, 0.75]), rtol=1e-6)
    assert np.allclose(rows.common, np.log([0.125, 0.75]), rtol=1e-6)
    # The sums of squares of the rows that predict them: 1 0.59375, 2 0.38, 0 0.375.
    expected = np.log([0.125 * 0.2 * 0.25 / (0.59375 * 0.38 * 0.375), 0.75 / 0.59375])
    assert np.allclose(rows.alignment, expected, rtol=1e-5)
    assert all(row.dtype == mx.float32 for row in rows)


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_all_sums_are_the_same_with_the_head_apart(arrangement):
    model = make_model(UNTIED)
    batch, *_ = make_batch(PAIRS, arrangement)
    apart, whole = (Scorer(model, response_only=response_only) for response_only in (True, False))
    assert apart.head is not None and whole.head is None
    for gradient in (False, True):
        found, expected = apart(batch, alignment=True, gradient=gradient), whole(batch, alignment=True)
        assert all(mx.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))
    assert mx.abs(expected.alignment).min().item() > 0.01
    assert mx.array_equal(apart(batch).alignment, mx.zeros(6))


@pytest.mark.parametrize("seeds", [head_module._seeds_on_cpu, head_module._seeds_on_gpu])
def test_logps_and_their_gradients_are_those_of_a_softmax(seeds):
    draw = np.random.default_rng(0)
    logits, targets = draw.normal(size=(6, 300)) * 30, draw.integers(0, 300, (6, 1))
    shifted = logits - logits.max(-1, keepdims=True)
    softmax = np.exp(shifted) / np.exp(shifted).sum(-1, keepdims=True)
    logps, squares, gradient, scale = seeds(mx.array(logits, mx.float32), mx.array(targets), alignment=True)
    assert np.allclose(logps, np.take_along_axis(np.log(softmax), targets, -1)[:, 0], rtol=1e-5, atol=1e-5)
    assert np.allclose(squares, np.log((softmax**2).sum(-1)), atol=1e-5)
    assert np.allclose(scale * gradient, (np.arange(300) == targets) - softmax, atol=1e-5)
    assert seeds(mx.array(logits, mx.float32), mx.array(targets), alignment=False)[1] is None


def test_a_gpu_scores_by_a_formula_of_its_own(monkeypatch):
    monkeypatch.setattr(head_module, "_seeds_on_cpu", head_module._seeds_on_gpu)
    check(add_lora(make_model(UNTIED)))


def test_half_precision_models_are_scored_in_float32():
    model = make_model(UNTIED)
    expected = plain_logps(model)
    model.set_dtype(mx.bfloat16)
    scorer = Scorer(model)
    assert scorer.head is not None and scorer.arrangement == PACKED
    total = scorer(make_batch(PAIRS, PACKED)[0], gradient=True).total
    assert total.dtype == mx.float32
    # Up to nine tokens of logits that bfloat16 rounds to 0.4 %; summed in bfloat16, -40 would be a multiple of 0.25.
    assert mx.abs(total - expected).max().item() < 0.15


# The output head


def trained(kind):
    """A model with the parameters of `kind` to train."""
    model = make_model(TIED if "tied" in kind else UNTIED)
    if "full" in kind:
        model.unfreeze()
        return model.train()
    head = "model.embed_tokens" if "tied" in kind else "lm_head"
    keys = {"self_attn.q_proj", "mlp.down_proj"} | ({head} if "head" in kind else set())
    return add_lora(model, keys, use_dora="DoRA" in kind)


KINDS = ["LoRA", "tied LoRA", "LoRA head", "tied LoRA head", "DoRA", "DoRA head", "tied DoRA head", "full", "tied full"]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_in_chunks_give_the_same_scores_and_gradients(kind, monkeypatch):
    model = trained(kind)
    scorer = check(model)
    assert bool(tree_flatten(scorer.head.module.trainable_parameters())) == ("head" in kind or "full" in kind)
    batch, *_ = make_batch(PAIRS, PACKED)
    whole = scorer(batch, alignment=True, gradient=True)
    monkeypatch.setattr(head_module, "CHUNK_LOGITS", 4 * 101)
    assert len(scorer.head._chunks(mx.zeros((27, 1)))) == 7
    for gradient in (False, True):
        in_chunks = scorer(batch, alignment=True, gradient=gradient)
        assert all(mx.allclose(a, b, atol=1e-5) for a, b in zip(whole, in_chunks, strict=True))
    check(model, scorer=scorer)


@pytest.mark.parametrize("kind", ["LoRA", "LoRA head"])
@pytest.mark.parametrize("gradient", [False, True])
def test_memory_does_not_grow_with_vocabulary_and_response(kind, gradient, monkeypatch):
    monkeypatch.setattr(head_module, "CHUNK_LOGITS", 2**18)  # 1 MB of float32

    def peak(vocabulary, positions):
        model = make_model(UNTIED, vocab_size=vocabulary)
        add_lora(model, {"self_attn.q_proj"} | ({"lm_head"} if "head" in kind else set()))
        head = Head.find(model)
        states, targets = mx.random.normal((positions, 32)), mx.arange(positions)

        def loss(_):
            return head.token_logps(states, targets, False, gradient)[0].sum()

        mx.eval(model.parameters(), states, targets)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(nn.value_and_grad(model, loss)(model) if gradient else loss(model))
        return (mx.get_peak_memory() - before) / 1e6

    # All logits would be 32 and 128 MB.
    assert peak(20_000, 400) < 20
    assert peak(40_000, 800) < 20


def test_dropout_in_a_trainable_head_is_drawn_again_for_the_backward_pass(monkeypatch):
    monkeypatch.setattr(head_module, "CHUNK_LOGITS", 4 * 101)
    model = add_lora(make_model(UNTIED), {"lm_head"}, dropout=0.5)
    head = Head.find(model)
    states, targets = mx.random.normal((27, 32)), mx.arange(27)

    def gradient(logps):
        mx.random.seed(1)
        return nn.value_and_grad(model, lambda _: mx.square(logps()).sum())(model)

    def plain():
        return head._chunked(lambda *chunk: head._logps(*chunk, alignment=False), states, targets)[0]

    expected, found = gradient(plain), gradient(lambda: head.token_logps(states, targets, False, True)[0])
    assert mx.allclose(found[0], expected[0], rtol=1e-6)
    assert gradient_error(found[1], expected[1]) < 1e-5


def test_head_and_cache_are_recognised_while_dropout_is_on():
    model = add_lora(make_model(UNTIED), {"self_attn.q_proj", "lm_head"}, dropout=0.5)
    model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    scorer = Scorer(model)
    assert scorer.head is not None and scorer.arrangement == PACKED
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("name", ["llama4_text", "minicpm", "seed_oss"])
def test_a_tied_head_that_is_a_product_with_an_array_gets_the_full_projection(name):
    assert check(add_lora(make_model(name, tie_word_embeddings=True))).head is None
    assert check(add_lora(make_model(name, tie_word_embeddings=False))).head is not None


def test_logits_of_minus_infinity_are_no_difference():
    forbidden = mx.array([False] * 90 + [True] * 11)
    model = Wrapped(make_model(UNTIED), lambda logits: mx.where(forbidden, -mx.inf, logits))
    pairs = make_pairs([(13, 4, 9), (11, 6, 2), (12, 1, 5)], vocabulary=90)
    assert check(add_lora(model), pairs).head is not None


def test_models_that_return_a_tuple():
    scorer = check(add_lora(Wrapped(make_model(UNTIED), lambda logits: (logits, None))))
    assert scorer.head is not None and scorer.arrangement == PACKED


class Scaled(Wrapped):
    """A model with parameters behind its head."""

    def __init__(self, model, scale):
        super().__init__(model, lambda logits: logits * self.scale)
        self.scale = scale


def test_parameters_behind_the_head_get_their_gradient():
    model = Scaled(make_model(UNTIED), mx.array(1.5))
    assert check(add_lora(model)).head is not None
    model.unfreeze()
    scorer = check(model)
    assert scorer.head is None
    assert scored_gradient(scorer, reference_of(plain_logps(model)))["scale"].item() != 0


def test_a_module_behind_the_head_is_not_taken_for_it():
    class Gain(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = mx.linspace(0.5, 1.5, 101)

        def __call__(self, logits):
            return logits * self.weight

    model = Wrapped(make_model(UNTIED), Gain())
    assert check(add_lora(model)).head.module is model.model.lm_head


@pytest.mark.parametrize("bits, mode, group_size", [(4, "affine", 64), (8, "affine", 64), (4, "mxfp4", 32)])
@pytest.mark.parametrize("name", [TIED, "qwen3_moe"])
def test_quantized_models(name, bits, mode, group_size):
    sizes = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 64, "moe_intermediate_size": 64}
    model = make_model(name, **sizes)
    nn.quantize(model, group_size=group_size, bits=bits, mode=mode)
    scorer = check(add_lora(model))
    assert isinstance(scorer.head.module, (nn.QuantizedLinear, nn.QuantizedEmbedding))
    assert scorer.arrangement == PACKED


# The shared prompt


def test_a_window_that_the_cached_pass_forgets_is_found_without_filling_it(monkeypatch):
    model = make_model("llama", sliding_window=512)
    assert can_share_prompt(model)
    original = llama.create_attention_mask

    def forgetful(h, cache=None, window_size=None, **kwargs):
        return original(h, cache, window_size=window_size if cache is None else None, **kwargs)

    monkeypatch.setattr(llama, "create_attention_mask", forgetful)
    assert not can_share_prompt(model)
    assert model.model.sliding_window == model.args.sliding_window == 512


def test_a_cache_of_an_unknown_kind_is_refused():
    class Unknown(type(make_model(UNTIED))):
        def make_cache(self):
            return [object() for _ in self.layers]

    model = make_model(UNTIED)
    model.__class__ = Unknown
    assert not can_share_prompt(model)
    assert check(add_lora(model)).arrangement == PACKED


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_layers_computed_again_draw_the_same_dropout(arrangement):
    model = add_lora(make_model(UNTIED), dropout=0.5)
    scorer = Scorer(model)
    reference = reference_of(plain_logps(model))

    def gradient(seed, checkpoint):
        mx.random.seed(seed)
        return scored_gradient(scorer, reference, PAIRS, arrangement, checkpoint)

    assert gradient_error(gradient(1, True), gradient(1, False)) < 1e-5
    assert gradient_error(gradient(2, True), gradient(1, False)) > 0.1


def test_a_scorer_made_while_layers_are_computed_again_is_the_same():
    model = add_lora(make_model(UNTIED))
    with checkpointed_layers(model):
        scorer = check(model)
    assert scorer.head is not None and scorer.arrangement == PACKED


def test_recomputing_leaves_parameters_in_their_places():
    linear = nn.Linear(3, 2)
    weight = linear.weight
    run = recomputed(linear, lambda x: [linear(x)])
    gradient = mx.grad(lambda x: mx.square(run(x)[0]).sum())(mx.ones((1, 3)))
    assert linear.weight is weight
    assert mx.allclose(gradient, 2 * (linear(mx.ones((1, 3))) @ weight))


def test_layers_that_index_with_their_arguments_and_return_them_are_computed_again():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = mx.arange(12.0).reshape(4, 3)

        def __call__(self, states, positions, kept):
            states = mx.tanh(states + self.table[positions] / 9)
            kept["seen"] = states  # what a layer keeps for the next one is part of what it returns
            return states, kept

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [Layer(), Layer()]

        def __call__(self, positions):
            states, kept = mx.zeros((2, 3)), {}
            for layer in self.layers:
                states, kept = layer(states, positions, kept=kept)
            return (states * kept["seen"]).sum()

    model = Model()
    gradient = nn.value_and_grad(model, lambda model: model(mx.array([1, 3])))
    expected = gradient(model)[1]
    with checkpointed_layers(model):
        assert gradient_error(gradient(model)[1], expected) < 1e-6
    assert type(model.layers[0]) is Layer


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_checkpointed_layers_keep_little_but_their_inputs(arrangement):
    """Left to itself, MLX takes the adapters' gradients last and keeps all that they need until then."""
    pairs = make_pairs([(40, 40, 40)] * 3)

    def peak(layers, checkpoint):
        model = add_lora(make_model(UNTIED, hidden_size=64, intermediate_size=256, num_hidden_layers=layers))
        mx.eval(model.parameters())
        scorer, reference = Scorer(model), reference_of(mx.zeros(6))
        mx.eval(scored_gradient(scorer, reference, pairs, arrangement, checkpoint))
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(scored_gradient(scorer, reference, pairs, arrangement, checkpoint))
        return mx.get_peak_memory() - before

    kept, recomputed = (peak(12, checkpoint) - peak(4, checkpoint) for checkpoint in (False, True))
    assert recomputed < kept / 4


def test_a_model_without_layers_cannot_be_checkpointed():
    with pytest.raises(ConfigError, match="grad_checkpoint"), checkpointed_layers(Table(np.eye(2) + 0.5)):
        pass


# The step


@pytest.mark.skipif(shutil.which("g++") is None, reason="MLX compiles for the CPU with g++")
@pytest.mark.parametrize("keys", [{"self_attn.q_proj"}, {"self_attn.q_proj", "lm_head"}])
def test_a_compiled_step_is_the_eager_one(keys, monkeypatch):
    mx.enable_compile()
    monkeypatch.setattr(step_module, "VISITS_UNCOMPILED", 0)

    def steps(compiled):
        model = add_lora(make_model(UNTIED), keys, dropout=0.25)
        objective = Objective(Scorer(model), preference_loss("dpo", beta=0.5))
        step = Step(model, optim.SGD(0.5), objective, compiled, max_grad_norm=1.0)
        mx.random.seed(4)
        for update, arrangement in ((False, PACKED), (True, CACHED), (False, PLAIN), (True, PACKED)):
            batch, *_ = make_batch(PAIRS, arrangement)
            with checkpointed_layers(model):
                sums, norm = step(batch, reference_of(mx.zeros(6)), update)
                mx.eval(step.state(), sums, step.accumulated)
        return sums, norm, dict(tree_flatten(model.trainable_parameters()))

    eager, compiled = steps(False), steps(True)
    assert mx.allclose(eager[0], compiled[0], rtol=1e-4)
    assert mx.allclose(eager[1], compiled[1], rtol=1e-4)
    assert all(mx.allclose(value, compiled[2][name], atol=1e-5) for name, value in eager[2].items())


@pytest.mark.skipif(shutil.which("g++") is None, reason="MLX compiles for the CPU with g++")
def test_a_step_is_compiled_for_shapes_that_come_often():
    mx.enable_compile()
    model = add_lora(make_model(UNTIED))
    objective, runs = Objective(Scorer(model), preference_loss("dpo")), []

    def counted(*args, **options):
        runs.append(1)
        return objective(*args, **options)

    step = Step(model, optim.SGD(0.1), counted, compiled=True)

    def taken(arrangement, times):
        before = len(runs)
        for _ in range(times):
            batch, *_ = make_batch(PAIRS, arrangement)
            mx.eval(step(batch, reference_of(mx.zeros(6)), True), step.state())
        return len(runs) - before

    # Traced once by the compiler, then never run again; another shape is run until it has come as often.
    assert taken(PACKED, step_module.VISITS_UNCOMPILED + 3) == step_module.VISITS_UNCOMPILED + 1
    assert taken(PLAIN, 2) == 2
    assert taken(PACKED, 2) == 0

"""Scores of batches: the output head run apart, in chunks; against the plain pass."""

import shutil
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from architectures import make_model
from mlx.utils import tree_flatten
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
from mlx_lm.tuner.preference import logps as logps_module
from mlx_lm.tuner.preference import logps as module
from mlx_lm.tuner.preference.batches import ARRANGEMENTS, PACKED, PLAIN, make_batch
from mlx_lm.tuner.preference.layers import checkpointed_layers
from mlx_lm.tuner.preference.logps import Head, Scorer, relative_error
from mlx_lm.tuner.preference.objective import Objective, preference_loss
from mlx_lm.tuner.preference.step import Step
from mlx_lm.tuner.preference.unpacked import unpacks

TIED, UNTIED = "qwen2", "qwen3"


pytestmark = pytest.mark.usefixtures("uncompiled")


class Wrapped(nn.Module):
    """A language model whose logits `change` makes into something else."""

    def __init__(self, model, change):
        super().__init__()
        self.language_model = model
        self.change = change

    def __call__(self, tokens, cache=None):
        return self.change(self.language_model(tokens, cache=cache))

    @property
    def layers(self):
        return self.language_model.layers


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
    assert all(row.dtype == mx.float32 for row in rows[:3])


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_all_sums_are_the_same_with_the_head_apart(arrangement):
    model = make_model(UNTIED)
    batch, *_ = make_batch(PAIRS, arrangement)
    apart, whole = (Scorer(model, response_only=response_only) for response_only in (True, False))
    assert apart.head is not None and whole.head is None
    for gradient in (False, True):
        found, expected = apart(batch, alignment=True, gradient=gradient), whole(batch, alignment=True)
        assert all(mx.allclose(a, b, atol=1e-5) for a, b in zip(found[:3], expected[:3], strict=True))
    assert mx.abs(expected.alignment).min().item() > 0.01
    assert mx.array_equal(apart(batch).alignment, mx.zeros(6))


class Bare(nn.Module):
    """A model whose hidden states are its logits."""

    def __init__(self):
        super().__init__()
        self.model = nn.Identity()

    def __call__(self, tokens, cache=None):
        return self.model(tokens)


class Headed(Bare):
    def __call__(self, tokens, cache=None):
        return self.lm_head(self.model(tokens))


def head_of(model, vocabulary):
    head = Head(model, model.model)
    head.vocabulary = vocabulary
    return head


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("chunk", [2**20, 4 * 300])
def test_logps_and_their_gradients_are_those_of_a_softmax(trainable, chunk, monkeypatch):
    monkeypatch.setattr(module, "LEAST_ROWS", 1)
    monkeypatch.setattr(module, "CHUNK_LOGITS", chunk)
    draw = np.random.default_rng(0)
    logits, targets = draw.normal(size=(6, 300)) * 30, draw.integers(0, 300, 6)
    factors = draw.normal(size=6)
    shifted = logits - logits.max(-1, keepdims=True)
    softmax = np.exp(shifted) / np.exp(shifted).sum(-1, keepdims=True)
    model = Bare()
    # With a parameter to train, logits are computed again; without, their gradient is taken at once.
    if trainable:
        model.scale = mx.array(1.0)
    head = head_of(model, 300)
    assert head.trainable == ["scale"] * trainable
    states = mx.array(logits, mx.float32)

    def scored(states):
        return head.token_logps(states, mx.array(targets), True, True)

    logps, squares = scored(states)
    assert np.allclose(logps, np.log(softmax[np.arange(6), targets]), rtol=1e-5, atol=1e-5)
    assert np.allclose(squares, np.log((softmax**2).sum(-1)), atol=1e-5)
    slope = mx.grad(lambda states: (scored(states)[0] * mx.array(factors, mx.float32)).sum())(states)
    expected = factors[:, None] * ((np.arange(300) == targets[:, None]) - softmax)
    assert np.allclose(slope, expected, atol=1e-5) and np.abs(expected).max() > 0.1
    assert not head.token_logps(states, mx.array(targets), False, True)[1].any()


def test_chunks_are_whole_tiles_as_equal_as_can_be(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_LOGITS", 2**23)
    monkeypatch.setattr(module, "TILE", 1)
    head = head_of(Bare(), 151_936)

    def sizes(count, share):
        chunks = head._chunks(mx.zeros((count, 1)), share)
        assert chunks[0][0] == 0 and all(one[1] == other[0] for one, other in pairwise(chunks))
        assert chunks[-1][1] == count
        return [stop - start for start, stop in chunks]

    assert sizes(2048, 4) == [205] * 9 + [203]
    # Of 27 by their logits, which would be too few to read the head's weight for.
    assert sizes(110, 0.5) == [55, 55]
    monkeypatch.setattr(module, "TILE", 64)
    # Of 220 rows that a chunk may have.
    assert sizes(2048, 4) == [192] * 10 + [128]
    assert sizes(256, 4) == [128] * 2 and sizes(192, 4) == [192] and sizes(20, 4) == [20]
    assert sizes(110, 0.5) == [64, 46]


def test_a_heads_gradient_does_not_lose_with_chunks_in_half_precision(monkeypatch):
    draw = np.random.default_rng(0)
    states, targets = mx.array(draw.normal(size=(512, 32)) + 0.5), mx.array(draw.integers(0, 200, 512))
    weight, factors = mx.array(0.05 * draw.normal(size=(200, 32))), mx.concatenate([-mx.ones(256), 0.7 * mx.ones(256)])

    def slope(dtype, chunks):
        monkeypatch.setattr(module, "LEAST_ROWS", 1)
        monkeypatch.setattr(module, "CHUNK_LOGITS", 512 * 200 // chunks)
        model = Bare()
        model.lm_head = nn.Linear(32, 200, bias=False)
        model.__class__ = Headed
        head = head_of(model, 200)

        def total(weight):
            model.lm_head.weight = weight
            return (factors * head.token_logps(states.astype(dtype), targets, False, True)[0]).sum()

        return mx.grad(total)(weight.astype(dtype)).astype(mx.float32)

    exact = slope(mx.float32, 1)
    one, many = (mx.linalg.norm(slope(mx.bfloat16, chunks) - exact) / mx.linalg.norm(exact) for chunks in (1, 32))
    assert many.item() < 1.5 * one.item() < 0.02


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
    assert bool(scorer.head.trainable) == ("head" in kind or "full" in kind)
    batch, *_ = make_batch(PAIRS, PACKED)
    whole = scorer(batch, alignment=True, gradient=True)
    monkeypatch.setattr(module, "LEAST_ROWS", 1)
    monkeypatch.setattr(module, "CHUNK_LOGITS", 4 * 101)
    assert len(scorer.head._chunks(mx.zeros((27, 1)))) == 7
    for gradient in (False, True):
        in_chunks = scorer(batch, alignment=True, gradient=gradient)
        assert all(mx.allclose(a, b, atol=1e-5) for a, b in zip(whole[:3], in_chunks[:3], strict=True))
    check(model, scorer=scorer)


@pytest.mark.usefixtures("one_by_one")
@pytest.mark.parametrize("kind", ["LoRA", "LoRA head"])
@pytest.mark.parametrize("gradient", [False, True])
def test_memory_does_not_grow_with_vocabulary_and_response(kind, gradient, monkeypatch):
    monkeypatch.setattr(module, "LEAST_ROWS", 1)
    monkeypatch.setattr(module, "CHUNK_LOGITS", 2**18)  # 1 MB of float32

    def peak(vocabulary, positions):
        model = make_model(UNTIED, vocab_size=vocabulary)
        add_lora(model, {"self_attn.q_proj"} | ({"lm_head"} if "head" in kind else set()))
        head = Scorer(model).head
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
    monkeypatch.setattr(module, "LEAST_ROWS", 1)
    monkeypatch.setattr(module, "CHUNK_LOGITS", 4 * 101)
    model = add_lora(make_model(UNTIED), {"lm_head"}, dropout=0.5)
    head = Scorer(model).head
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
    scorer = Scorer(model)
    assert scorer.head is not None and scorer.arrangement == PACKED
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("name", ["llama4_text", "minicpm", "seed_oss", "talkie"])
def test_a_head_that_is_a_product_with_an_array_runs_apart(name):
    model = make_model(name, tie_word_embeddings=True)
    model.unfreeze()
    scorer = check(model)
    assert scorer.head is not None and scorer.head.trainable


def test_logits_of_minus_infinity_are_no_difference():
    forbidden = mx.array([False] * 90 + [True] * 11)
    model = Wrapped(make_model(UNTIED), lambda logits: mx.where(forbidden, -mx.inf, logits))
    pairs = make_pairs([(13, 4, 9), (11, 6, 2), (12, 1, 5)], vocabulary=90)
    assert check(add_lora(model), pairs).head is not None


def test_models_that_return_a_tuple():
    scorer = check(add_lora(Wrapped(make_model(UNTIED), lambda logits: (logits, None))))
    assert scorer.head is not None and scorer.arrangement == PACKED


class Gain(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = mx.linspace(0.5, 1.5, 101)

    def __call__(self, logits):
        return logits * self.weight


@pytest.mark.parametrize(
    "kind, names",
    [
        ("LoRA", []),
        ("tied LoRA head", ["model.embed_tokens.lora_a", "model.embed_tokens.lora_b"]),
        ("DoRA head", ["lm_head.lora_a", "lm_head.lora_b", "lm_head.m"]),
        ("full", ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]),
    ],
)
def test_a_head_may_read_what_is_trained_outside_of_layers(kind, names):
    assert sorted(Scorer(trained(kind)).head.trainable) == names


def test_parameters_behind_the_head_are_read_too_and_get_their_gradient():
    model = Wrapped(make_model(UNTIED), Gain())
    scorer = check(add_lora(model))
    assert scorer.head.body is model.language_model.model and scorer.head.trainable == []
    model.unfreeze()
    scorer = check(model)
    assert {"change.weight", "language_model.lm_head.weight"} <= set(scorer.head.trainable)
    slope = scored_gradient(scorer, reference_of(plain_logps(model)))["change"]["weight"]
    assert mx.abs(slope).max().item() > 0.1


def test_a_model_that_changes_its_bodys_output_by_more_than_that_output_has_no_head():
    class Positioned(Wrapped):
        def __call__(self, tokens, cache=None):
            return self.language_model(tokens, cache=cache) * (1 + mx.arange(tokens.shape[1]))[:, None]

    scorer = check(add_lora(Positioned(make_model(UNTIED), None)))
    assert scorer.head is None and scorer.arrangement == PLAIN


def test_running_the_body_or_the_head_alone_leaves_the_model_as_it_was():
    model = make_model(UNTIED)
    types = [type(each) for each in model.modules()]
    tokens = mx.arange(12).reshape(2, 6)
    expected = model(tokens)
    scorer = Scorer(model)
    states = scorer.head.hidden_states(tokens, None)
    assert states.shape == (2, 6, 32)
    assert mx.allclose(scorer.head.logits(states.flatten(0, 1)), expected.flatten(0, 1), atol=1e-5)
    with pytest.raises(ValueError):
        scorer.head.logits(mx.zeros((4, 31)))
    assert [type(each) for each in model.modules()] == types
    assert mx.array_equal(model(tokens), expected)


@pytest.mark.usefixtures("one_by_one")
def test_the_head_is_not_run_for_hidden_states():
    """The graph of the logits is made, and let go: with 200,000 words they would take 58 MB."""
    model = make_model(UNTIED, vocab_size=200_000)
    head, tokens = Scorer(model).head, mx.zeros((2, 36), mx.int32)
    mx.eval(model.parameters())
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(head.hidden_states(tokens, None))
    assert mx.get_peak_memory() - before < 5e6


@pytest.mark.parametrize(
    "found, expected, error",
    [
        ([[1.0, 2.0], [3.0, 4.0]], [[1.0, 2.0], [3.0, 4.0]], 0.0),
        # 1 off at one of two positions, the largest value being 4.
        ([[1.0, 2.0], [3.0, 5.0]], [[1.0, 2.0], [3.0, 4.0]], 0.125),
        ([[-np.inf, 2.0]], [[-np.inf, 2.0]], 0.0),
        ([[-np.inf, 2.0]], [[1.0, 2.0]], np.inf),
    ],
)
def test_errors_are_means_over_positions_relative_to_the_largest_value(found, expected, error):
    assert relative_error(mx.array(found), mx.array(expected)) == pytest.approx(error)


@pytest.mark.parametrize("bits, mode, group_size", [(4, "affine", 64), (8, "affine", 64), (4, "mxfp4", 32)])
@pytest.mark.parametrize("name", [TIED, "qwen3_moe"])
def test_quantized_models(name, bits, mode, group_size):
    sizes = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 64, "moe_intermediate_size": 64}
    model = make_model(name, **sizes)
    nn.quantize(model, group_size=group_size, bits=bits, mode=mode)
    scorer = check(add_lora(model))
    assert scorer.head is not None and scorer.head.trainable == []
    assert scorer.arrangement == PACKED


@pytest.mark.skipif(not unpacks(), reason="packed weights are multiplied as they are on Metal")
def test_a_packed_head_is_unpacked_once_for_all_chunks(monkeypatch):
    model, unpacked, dequantize = make_model(TIED, hidden_size=64, head_dim=16, intermediate_size=64), [], mx.dequantize
    nn.quantize(model, group_size=32)
    scorer = Scorer(add_lora(model))
    batch = make_batch(PAIRS, scorer.arrangement)[0]
    whole = scorer(batch, gradient=True).total

    def counted(packed, *args, **options):
        unpacked.append(packed.shape)
        return dequantize(packed, *args, **options)

    monkeypatch.setattr(module, "LEAST_ROWS", 1)
    monkeypatch.setattr(module, "CHUNK_LOGITS", 4 * 101)
    monkeypatch.setattr(mx, "dequantize", counted)
    assert mx.allclose(scorer(batch, gradient=True).total, whole, 1e-4, 1e-3)
    # And once where the body is run, by the model's own call: logits that nobody asks for.
    assert unpacked.count(model.model.embed_tokens.weight.shape) == 2 < len(scorer.head._chunks(batch.targets))


# Caches


def test_a_model_with_a_cache_of_an_unknown_kind_goes_without():
    class Unknown(type(make_model(UNTIED))):
        def make_cache(self):
            return [object() for _ in self.layers]

    model = make_model(UNTIED)
    model.__class__ = Unknown
    assert check(add_lora(model)).arrangement == PLAIN


def test_a_model_that_takes_its_rows_cache_otherwise_runs_without_one():
    """What a packed batch needs is a cache: it is not packed then."""

    class Odd(llama.Attention):
        def __call__(self, x, mask=None, cache=None):
            return super().__call__(x * 1.5 if cache is not None and isinstance(cache.offset, int) else x, mask, cache)

    model = make_model("llama")
    for layer in model.layers:
        layer.self_attn.__class__ = Odd
    assert check(add_lora(model)).arrangement == PLAIN


def test_prompts_are_not_shared_where_that_is_not_wanted():
    model = make_model(UNTIED)
    assert Scorer(model, share_prompt=False).arrangement == PLAIN
    assert Scorer(model).arrangement == PACKED


def test_a_scorer_made_while_layers_are_computed_again_is_the_same():
    model = add_lora(make_model(UNTIED))
    with checkpointed_layers(model):
        scorer = check(model)
    assert scorer.head is not None and scorer.arrangement == PACKED


# The step


@pytest.mark.skipif(shutil.which("g++") is None, reason="MLX compiles for the CPU with g++")
@pytest.mark.parametrize("keys", [{"self_attn.q_proj"}, {"self_attn.q_proj", "lm_head"}])
def test_a_compiled_step_is_the_eager_one(keys):
    mx.enable_compile()

    def steps(compiled):
        model = add_lora(make_model(UNTIED), keys, dropout=0.25)
        objective = Objective(Scorer(model), preference_loss("dpo", beta=0.5))
        step = Step(model, optim.SGD(0.5), objective, compiled, max_grad_norm=1.0)
        mx.random.seed(4)
        for update, arrangement in ((False, PACKED), (True, PLAIN), (False, PLAIN), (True, PACKED)):
            batch, *_ = make_batch(PAIRS, arrangement)
            with checkpointed_layers(model):
                sums, norm = step(batch, reference_of(mx.zeros(6)), update)
                mx.eval(step.state(), sums, step.accumulated)
        step.flat.write()
        return sums, norm, dict(tree_flatten(model.trainable_parameters()))

    eager, compiled = steps(False), steps(True)
    assert mx.allclose(eager[0], compiled[0], rtol=1e-4)
    assert mx.allclose(eager[1], compiled[1], rtol=1e-4)
    assert all(mx.allclose(value, compiled[2][name], atol=1e-5) for name, value in eager[2].items())


@pytest.mark.skipif(shutil.which("g++") is None, reason="MLX compiles for the CPU with g++")
def test_a_step_is_traced_once_for_each_shape():
    mx.enable_compile()
    model = add_lora(make_model(UNTIED))
    runs = []

    class Counted(Objective):
        def __call__(self, *args, **options):
            runs.append(1)
            return super().__call__(*args, **options)

    step = Step(model, optim.SGD(0.1), Counted(Scorer(model), preference_loss("dpo")), compiled=True)

    def taken(arrangement, times):
        before = len(runs)
        for _ in range(times):
            batch, *_ = make_batch(PAIRS, arrangement)
            mx.eval(step(batch, reference_of(mx.zeros(6)), True), step.state())
        return len(runs) - before

    assert (taken(PACKED, 3), taken(PLAIN, 2), taken(PACKED, 2)) == (1, 1, 0)


@pytest.mark.parametrize("seeds", [logps_module._seeds, logps_module._seeds_on_cpu])
def test_both_formulas_of_a_devices_head_are_a_softmaxs(seeds):
    draw = np.random.default_rng(0)
    logits, targets = draw.normal(size=(6, 300)) * 30, draw.integers(0, 300, 6)
    shifted = logits - logits.max(-1, keepdims=True)
    softmax = np.exp(shifted) / np.exp(shifted).sum(-1, keepdims=True)
    logps, gradient = seeds(mx.array(logits, mx.float32), mx.array(targets))
    assert np.allclose(logps, np.log(softmax)[np.arange(6), targets], rtol=1e-5, atol=1e-5)
    assert np.allclose(gradient, softmax - (np.arange(300) == targets[:, None]), atol=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="MLX compiles for the CPU with g++")
def test_compiled_figures_are_the_eager_ones():
    logits = mx.random.normal((7, 40), key=mx.random.key(0))
    logits = mx.where(mx.arange(40) == 3, -mx.inf, logits)
    targets = mx.array([0, 1, 39, 5, *mx.argmax(logits[4:], axis=-1).tolist()])
    expected = module._token_figures(logits, targets)
    assert all(map(mx.allclose, module._compiled_figures(logits, targets), expected))
    assert expected[-1].tolist()[4:] == [1.0] * 3 and sum(expected[-1].tolist()[:4]) == 0.0

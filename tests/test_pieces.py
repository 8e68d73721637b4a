"""Recurrences that run in pieces, against upstream's over whole sequences."""

from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architectures import ARCHITECTURES, make_model
from mlx.utils import tree_flatten
from plain_pass import make_pairs, make_policy
from test_recurrent import make_inputs

from mlx_lm.models import gated_delta
from mlx_lm.tuner.preference import batches, intercept, pieces
from mlx_lm.tuner.preference.batches import RECURRENT, make_batch
from mlx_lm.tuner.preference.logps import Scorer
from mlx_lm.tuner.preference.pieces import recurrences_in_pieces
from mlx_lm.tuner.preference.state_space import CHUNK, SCAN_CHUNK, WKV_CHUNK, split

TYPES = (
    "bailing_moe_linear",
    "bailing_moe_v3",
    "falcon_h1",
    "falcon_mamba",
    "granitemoehybrid",
    "jamba",
    "kimi_k3",
    "kimi_linear",
    "mamba",
    "mamba2",
    "nemotron_h",
    "olmo_hybrid",
    "plamo2",
    "prism_hadamard_qwen35",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_next",
    "rwkv7",
)
LENGTH = 2 * CHUNK + 5


def make_trained(name):
    """A model of which LoRA's matrices and the recurrent layers' own parameters are trained."""
    model = make_policy(name)
    model.apply_to_modules(
        lambda _, module: module.unfreeze(keys=["A_log", "D", "dt_bias", "x_r"], recurse=False, strict=False)
    )
    return model


def in_pieces(model):
    """Whether the context exchanges anything of the model's files."""
    with mock.patch.object(intercept, "exchanged", wraps=intercept.exchanged) as exchanged:
        with recurrences_in_pieces(model.modules()):
            return exchanged.called


def logits_and_gradients(model, tokens):
    def total(model):
        logits = model(tokens)
        return mx.sin(logits).mean(), logits

    (_, logits), gradients = nn.value_and_grad(model, total)(model)
    return {"logits": logits, **dict(tree_flatten(gradients))}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in found.items():
        size = max(mx.abs(expected[key]).max().item(), 1e-6)
        assert mx.abs(value - expected[key]).max().item() <= 1e-4 * size, key


def test_the_types_that_run_in_pieces_are_known():
    assert {name for name in ARCHITECTURES if in_pieces(make_model(name))} == set(TYPES)


@pytest.mark.parametrize("name", TYPES)
def test_a_model_in_pieces_has_upstreams_logits_and_gradients(name):
    model = make_trained(name)
    tokens = mx.random.randint(0, 101, (2, LENGTH), key=mx.random.key(1))
    expected = logits_and_gradients(model, tokens)
    with recurrences_in_pieces(model.modules()):
        found = logits_and_gradients(model, tokens)
    assert_same(found, expected)


@pytest.mark.parametrize("name", TYPES)
def test_a_cached_prompt_goes_on_in_pieces(name):
    model = make_model(name)
    tokens = mx.random.randint(0, 101, (2, LENGTH + 7), key=mx.random.key(1))
    expected = model(tokens)[:, 7:]
    with recurrences_in_pieces(model.modules()):
        cache = model.make_cache()
        model(tokens[:, :7], cache=cache)
        found = model(tokens[:, 7:], cache=cache)
    assert_same({"logits": found}, {"logits": expected})


def test_outside_the_context_the_loop_runs_as_it_does_upstream(monkeypatch):
    model, tokens = make_model("qwen3_5").train(), mx.zeros((1, 3), mx.int32)
    with pytest.raises(KeyError), recurrences_in_pieces(model.modules()):
        raise KeyError
    monkeypatch.setattr(gated_delta, "gated_delta_ops", lambda *_: pytest.fail("the loop over tokens ran"))
    with recurrences_in_pieces(model.modules()):
        model(tokens)
    with pytest.raises(pytest.fail.Exception, match="loop"):
        model(tokens)


@pytest.mark.parametrize("name", TYPES)
def test_no_more_than_fits_is_run_at_a_time(name, monkeypatch):
    """Counted by the tokens that a step gets, also within another such context."""
    model, lengths = make_model(name), []

    def counted(step, *args):
        def watched(*arrays):
            lengths.append(arrays[0].shape[1])
            return step(*arrays)

        return scan(watched, *args)

    scan = pieces.scan
    monkeypatch.setattr(pieces, "scan", counted)
    monkeypatch.setitem(pieces.AT_ONCE, mx.default_device().type, 1)
    with recurrences_in_pieces(model.modules()):
        mx.eval(model(mx.zeros((1, LENGTH), mx.int32)))
        assert max(lengths) in (CHUNK, SCAN_CHUNK, WKV_CHUNK) and sum(lengths) % LENGTH == 0
        once = list(lengths)
        with recurrences_in_pieces(model.modules()):
            mx.eval(model(mx.zeros((1, LENGTH), mx.int32)))
    assert lengths == 2 * once


@pytest.mark.parametrize("name", TYPES)
def test_what_is_at_once_in_memory_changes_nothing(name, monkeypatch):
    model = make_trained(name)
    tokens = mx.random.randint(0, 101, (2, 3 * CHUNK + 5), key=mx.random.key(1))
    with recurrences_in_pieces(model.modules()):
        whole = logits_and_gradients(model, tokens)
    monkeypatch.setitem(pieces.AT_ONCE, mx.default_device().type, 1)
    with recurrences_in_pieces(model.modules()):
        assert_same(logits_and_gradients(model, tokens), whole)


def test_a_masked_sequence_is_upstreams():
    model = make_model("mamba2")
    tokens = mx.random.randint(0, 101, (2, LENGTH), key=mx.random.key(1))

    def run():
        cache = model.make_cache()
        for entry in cache:
            entry.left_padding = mx.array([0, CHUNK + 3])
        return model(tokens, cache=cache)

    expected = run()
    with recurrences_in_pieces(model.modules()):
        found = run()
    assert_same({"logits": found}, {"logits": expected})
    assert not mx.allclose(expected, model(tokens), atol=1e-4)


@pytest.mark.parametrize("width, has_kernel", [(24, False), (64, True)])
def test_on_metal_upstreams_kernel_runs_for_the_widths_that_it_has(width, has_kernel, monkeypatch):
    """For others upstream has its loop over tokens, in evaluations too."""
    monkeypatch.setattr(pieces, "on_metal", lambda: True)
    queries, keys, values, *others = make_inputs(9, key_width=width)
    gates, rates = mx.random.normal((2, 2, 9, 4), key=mx.random.key(0))
    inputs = queries, keys, values, gates, rates, others[0][0, 0], others[1][0, 0]
    taken = mock.Mock(wraps=gated_delta.gated_delta_update)
    found, _ = pieces._gated_delta(taken, None)(*inputs)
    assert mx.allclose(found, gated_delta.gated_delta_update(*inputs)[0], atol=1e-4)
    assert taken.called == has_kernel


def test_split_gives_its_parts_gradients_back():
    x = mx.random.normal((2, 10, 3))
    weights = mx.random.normal(x.shape)

    parts = mx.split(weights, [4, 9], axis=1)

    def total(x):
        return sum((part * weight).sum() for part, weight in zip(split(x, [4, 9]), parts, strict=True))

    assert mx.array_equal(mx.grad(total)(x), weights)


PACKS = ["mamba2", "nemotron_h", "falcon_h1", "lfm2", "qwen3_5", "granitemoehybrid", "mamba", "falcon_mamba", "jamba"]


@pytest.mark.parametrize("name, begun", [*((name, 1) for name in PACKS), ("qwen3_5", 32), ("mamba2", 32)])
def test_tokens_of_a_packed_batch_recur_in_their_own_sequence(name, begun, monkeypatch):
    """A token of one sequence changes no logp of another, and each prompt's states are those of both its responses."""
    monkeypatch.setattr(batches, "BEGUN", begun)  # 3 tokens of each prompt are run once for both, or none
    model, pairs = make_model(name), make_pairs([(9, 7, 5), (4, 6, 8)])
    model.eval()
    scorer = Scorer(model)
    assert scorer.arrangement == RECURRENT

    def logps(pairs):
        return np.array(scorer(make_batch(pairs, RECURRENT)[0]).total).reshape(2, -1)

    def changed(pair, part):
        return pair._replace(**{part: [(token + 1) % 50 for token in getattr(pair, part)]})

    before = logps(pairs)
    for part, moved in (("prompt", [[True, False], [True, False]]), ("chosen", [[True, False], [False, False]])):
        after = logps([changed(pairs[0], part), pairs[1]])
        assert ((np.abs(after - before) > 1e-4) == moved).all(), part

"""A batch's tokens in one row: what attention sees, what the last layer runs, and which models are refused."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architectures import make_model
from mlx_lm.tuner.preference.modules import exchanged
from mlx_lm.tuner.preference.packing import CannotPackError, gathered, make_pass, packing
from mlx_lm.tuner.preference.sharing import arrangement_of, can_pack, narrow_windows
from plain_pass import PAIRS, add_lora, gradient_error, make_pairs, plain_gradient, plain_logps, reference_of
from plain_pass import scored_gradient as gradient_of

from mlx_lm.models import llama
from mlx_lm.tuner.preference import batches as batches_module
from mlx_lm.tuner.preference.batches import CACHED, CPU, CUDA, METAL, PACKED, make_batch
from mlx_lm.tuner.preference.logps import Scorer

ATTENTION, ROPE = mx.fast.scaled_dot_product_attention, mx.fast.rope


@pytest.fixture(autouse=True)
def uncompiled():
    """Compiling upstream's small functions takes longer than running them."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def run_packed(model, pairs=PAIRS):
    batch, *_ = make_batch(pairs, PACKED)
    with packing(model, batch.layout):
        return model(batch.groups[0].tokens), batch


def test_logits_are_those_of_rows_of_their_own_and_of_scored_positions_alone():
    model = make_model("qwen3")
    logits, batch = run_packed(model)
    assert logits.shape == (1, sum(len(pair.chosen) + len(pair.rejected) for pair in PAIRS), 101)
    expected = []
    for response in ("chosen", "rejected"):
        for pair in PAIRS:
            row = [*pair.prompt, *getattr(pair, response)]
            expected.append(model(mx.array([row[:-1]]))[0, len(pair.prompt) - 1 :])
    assert mx.allclose(logits[0], mx.concatenate(expected), atol=1e-5)


def test_mlx_and_the_model_are_as_before_afterwards():
    model = make_model("qwen3")
    types = [type(module) for module in model.modules()]
    tokens = mx.arange(20)[None]
    before = model(tokens)
    run_packed(model)
    with pytest.raises(CannotPackError), packing(model, make_batch(PAIRS, PACKED)[0].layout):
        model(tokens)
    assert mx.fast.scaled_dot_product_attention is ATTENTION and mx.fast.rope is ROPE
    assert [type(module) for module in model.modules()] == types
    assert mx.array_equal(model(tokens), before)


def test_the_last_layer_runs_for_the_scored_tokens_alone():
    model, widths = make_model("qwen3"), []

    class Counted(type(model.layers[0].mlp)):
        def __call__(self, x):
            widths.append(x.shape[1])
            return super().__call__(x)

    for layer in model.layers:
        layer.mlp.__class__ = Counted
    _, batch = run_packed(model)
    assert widths == [batch.groups[0].tokens.size, batch.layout.scored.size]


@pytest.mark.parametrize("length", [5, 20, 64])
def test_windows_are_each_sequences_own(length):
    """Windows shorter and longer than a sequence, and shorter than the row but not than a sequence."""
    model = add_lora(make_model("gemma3_text", sliding_window=length))
    expected = plain_logps(model)
    reference = reference_of(expected)
    scorer = Scorer(model)
    assert scorer.arrangement == PACKED
    batch, *_ = make_batch(PAIRS, PACKED)
    assert mx.abs(scorer(batch).total - expected).max().item() < 1e-4
    gradient = plain_gradient(model, reference)
    for checkpoint in (False, True):
        assert gradient_error(gradient_of(scorer, reference, PAIRS, PACKED, checkpoint), gradient) < 1e-4


def test_a_window_that_is_forgotten_is_found_without_filling_it(monkeypatch):
    model = make_model("llama", sliding_window=512)
    assert can_pack(model)
    original = llama.create_attention_mask

    def forgetful(h, cache=None, window_size=None, **kwargs):
        return original(h, cache, window_size=window_size if h.shape[0] > 1 else None, **kwargs)

    monkeypatch.setattr(llama, "create_attention_mask", forgetful)
    assert not can_pack(model)


@pytest.mark.parametrize("shared", [0, 8])
@pytest.mark.parametrize("multiple", [1, 4, 16])
def test_gradients_are_the_plain_ones_however_attention_is_split(shared, multiple, monkeypatch):
    pairs = make_pairs([(13, 4, 9), (11, 6, 2), (40, 1, 30)])
    model = add_lora(make_model("qwen3"))
    expected = plain_logps(model, pairs)
    gradient = plain_gradient(model, reference_of(expected), pairs)
    monkeypatch.setattr(batches_module, "SHORTEST_PREFIX", shared or 1000)
    monkeypatch.setattr(batches_module, "CPU", CPU._replace(packed_multiple=multiple))
    layout = make_batch(pairs, PACKED)[0].layout
    assert len(layout.body.parts) - len(layout.last.parts) == (shared > 0 and multiple < 16)
    found = gradient_of(Scorer(model), reference_of(expected), pairs, PACKED)
    assert gradient_error(found, gradient) < 1e-4


def test_on_cuda_prompts_are_attended_to_apart_where_they_are_long(monkeypatch):
    monkeypatch.setattr(batches_module, "device", lambda: CUDA)

    def parts(prompt):
        layout = make_batch(make_pairs([(prompt, 8, 8)] * 4), PACKED)[0].layout
        assert all(side.shape[1] % 128 == 0 for part in layout.body.parts for side in part)
        return len(layout.body.parts)

    assert (parts(700), parts(800)) == (1, 2)


def test_what_is_gathered_gets_its_gradient_gathered():
    draw = mx.random.normal((5, 2, 4), key=mx.random.key(0))
    # Entry 0 is taken twice, entry 3 not at all, and place 5 is padding of which no gradient comes.
    index = mx.array([1, 0, 2, 0, 4, 1])
    sources = [(mx.array([1, 0, 2, 0, 4]), mx.array([True, True, True, False, True])[:, None, None]),
               (mx.array([3, 0, 0, 0, 0]), mx.array([True, False, False, False, False])[:, None, None])]  # fmt: skip
    weights = mx.random.normal((6, 2, 4), key=mx.random.key(1)) * (mx.arange(6) < 5)[:, None, None]
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        for width in (4, 3):
            x, factors = draw[..., :width].astype(dtype), weights[..., :width].astype(dtype)
            assert mx.array_equal(gathered(x, index, sources), x[index])
            found = mx.grad(lambda x, f=factors: (gathered(x, index, sources) * f).sum())(x)
            assert mx.allclose(found, mx.grad(lambda x, f=factors: (x[index] * f).sum())(x), rtol=1e-2)


def test_a_pass_says_where_every_token_is():
    """Two prompts of two and three tokens, four responses of one; the tokens are numbered along the row."""
    sequences = [np.array(row) for row in ([0, 1, 5], [2, 3, 4, 6], [0, 1, 7], [2, 3, 4, 8])]
    places = [0, 1, 0, 1, 2, 2, 3, 2, 3]
    made = make_pass(9, places, sequences, sequences, [([0, 2], 3), ([1, 3], 5)], shared=1)
    assert made.places.tolist() == places
    assert [part.queries.tolist() for part in made.parts] == [
        [[0], [2]], [[1, 5], [1, 7]], [[3, 4, 6, 0], [3, 4, 8, 0]]
    ]  # fmt: skip
    assert [part.keys.tolist() for part in made.parts] == [
        [[0], [2]], [[0, 1, 5], [0, 1, 7]], [[2, 3, 4, 6, 0], [2, 3, 4, 8, 0]]
    ]  # fmt: skip
    assert made.outputs.tolist() == [0, 2, 1, 6, 7, 3, 8, 5, 12]
    assert made.answered.tolist() == [0, 2, 1, 5, -1, 7, 3, 4, 6, -1, -1, -1, 8, -1]
    assert made.uses.tolist() == [
        [0, 3, 1, 9, 10, 4, 11, 7, 16], [2, 6, 8, 14, 15, -1, -1, -1, -1], [5, -1, 13, -1, -1, -1, -1, -1, -1]
    ]  # fmt: skip


class Mixing(nn.Module):
    """A model whose `mix` changes what goes into its layers."""

    def __init__(self, mix):
        super().__init__()
        self.model = make_model("qwen3")
        self.mix = mix

    def __call__(self, tokens, cache=None):
        model = self.model.model
        states = self.mix(model.embed_tokens(tokens))
        for layer in model.layers:
            states = layer(states, "causal", None)
        return self.model.lm_head(model.norm(states))

    @property
    def layers(self):
        return self.model.layers


def shifted(states):
    return states + mx.pad(states, [(0, 0), (1, 0), (0, 0)])[:, :-1]


def far_positions(states):
    """Positions of its own that tell apart only those beyond a thousand."""
    return states * (1 + mx.arange(states.shape[1]) // 1000)[:, None]


@pytest.mark.parametrize("mix, packs", [(lambda states: states, True), (shifted, False), (far_positions, False)])
def test_models_that_mix_or_number_positions_themselves_are_not_packed(mix, packs):
    assert can_pack(Mixing(mix)) == packs


@pytest.mark.parametrize("kind", [CPU, METAL, CUDA])
def test_models_are_packed_whatever_batches_are_rounded_to(kind, monkeypatch):
    monkeypatch.setattr(batches_module, "device", lambda: kind)
    model = make_model("qwen3")
    assert arrangement_of(model, True) == PACKED
    batch, *_ = make_batch(PAIRS, PACKED)
    assert batch.groups[0].tokens.size % kind.packed_multiple == 0
    assert mx.abs(Scorer(model)(batch).total - plain_logps(model)).max().item() < 1e-4


@pytest.mark.parametrize("name", ["gpt2", "mamba2", "qwen3_5", "llama4", "deepseek_v3"])
def test_models_that_cannot_be_packed_share_through_their_cache(name):
    assert arrangement_of(make_model(name), True) == CACHED


def test_a_model_that_asks_for_a_mask_to_compute_with_is_refused():
    model = make_model("gemma2")
    with pytest.raises(CannotPackError, match="mask"):
        run_packed(model)


def test_rotary_positions_beyond_a_cache_are_refused():
    model = make_model("qwen3")
    with pytest.raises(CannotPackError, match="positions"), exchanged_offset(model):
        run_packed(model)


def exchanged_offset(model):
    rope = type(model.layers[0].self_attn.rope)
    original = rope.__call__
    return exchanged(rope, "__call__", lambda self, x, offset=0: original(self, x, offset=offset + 3))


def test_probing_leaves_windows_and_modes_alone():
    model = make_model("gemma3_text", sliding_window=32)
    model.train()
    with narrow_windows(model):
        narrow = [layer.self_attn.is_sliding for layer in model.layers]
    assert can_pack(model) and model.training
    assert [layer.self_attn.is_sliding for layer in model.layers] == narrow
    assert model.args.sliding_window == 32

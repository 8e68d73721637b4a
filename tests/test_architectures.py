"""Every model type of the installed mlx-lm through the scorer, against upstream's own forward pass."""

import mlx.core as mx
import pytest
from architectures import (
    ARCHITECTURES,
    SKIPPED,
    UNPACKED,
    UNTRAINABLE,
    installed_model_types,
    make_model,
)
from plain_pass import (
    PAIRS,
    arrangements_for,
    gradient_error,
    make_pairs,
    make_policy,
    plain_gradient,
    plain_logps,
    reference_of,
    scored_gradient,
)

from mlx_lm.tuner.preference import batches
from mlx_lm.tuner.preference.batches import PLAIN, make_batch
from mlx_lm.tuner.preference.logps import PROBE_WINDOW, Scorer, narrow_windows
from mlx_lm.utils import MODEL_REMAPPING

TOLERANCE = 1e-4
TRAINABLE = [name for name in ARCHITECTURES if name not in UNTRAINABLE]
# Its tokens see the padding behind them: rows of one length have none.
NOT_CAUSAL = {"phi3small"}
WINDOWS = {
    "sliding_window",
    "window_size",
    "sliding_window_size",
    "attention_window_size",
    "loop_window_size",
    "attention_chunk_size",
}


pytestmark = pytest.mark.usefixtures("uncompiled")


def test_every_model_type_is_tried_or_listed():
    tried = {MODEL_REMAPPING.get(name, name) for name in ARCHITECTURES}
    assert set(installed_model_types()) <= tried | set(SKIPPED)


@pytest.mark.parametrize("name", TRAINABLE)
def test_scores_and_gradients_are_those_of_the_plain_pass(name, monkeypatch):
    model, pairs = make_policy(name), PAIRS
    monkeypatch.setattr(batches, "BEGUN", 4)  # short prompts have states to pass on then
    if name in NOT_CAUSAL:
        pairs = make_pairs([(12, 5, 5)] * 3)
        monkeypatch.setattr(batches, "multiple", lambda: 1)  # on a GPU lengths are rounded up
    expected = plain_logps(model, pairs)
    reference = reference_of(expected)
    gradient = plain_gradient(model, reference, pairs)
    scorer, full = Scorer(model), Scorer(model, share_prompt=False, response_only=False)
    assert model.training
    assert (scorer.arrangement == PLAIN) == (name in UNPACKED)
    assert scorer.head is not None
    assert full.head is None and full.arrangement == PLAIN
    for arrangement in arrangements_for(scorer):
        batch, *_ = make_batch(pairs, arrangement)
        assert (batch.tokens.shape[1] == 1) == bool(batch.layout) == (arrangement != PLAIN)
        for way in (scorer, full):
            assert mx.abs(way(batch).total - expected).max().item() < TOLERANCE, (arrangement, way)
        for checkpoint in (False, True):
            found = scored_gradient(scorer, reference, pairs, arrangement, checkpoint)
            assert gradient_error(found, gradient) < TOLERANCE, (arrangement, checkpoint)


@pytest.mark.parametrize("name", UNTRAINABLE)
def test_upstream_still_cannot_train_what_is_listed_so(name):
    with pytest.raises((ValueError, AttributeError)):
        model = make_policy(name)
        mx.eval(plain_gradient(model, reference_of(plain_logps(model))))


def window_keys(name):
    config = ARCHITECTURES[name]
    return WINDOWS & set(config.get("text_config", config))


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if window_keys(name)])
def test_windows_can_be_narrowed_in_a_built_model(name):
    keys = window_keys(name)
    tokens = mx.arange(40).reshape(2, 20)
    wide, narrow = (make_model(name, **dict.fromkeys(keys, size)) for size in (64, PROBE_WINDOW))
    expected, before = narrow(tokens), wide(tokens)
    with narrow_windows(wide):
        assert mx.allclose(wide(tokens), expected, atol=1e-5)
    assert mx.array_equal(wide(tokens), before)
    assert not mx.allclose(before, expected, atol=1e-3)

"""The figures of pairs besides the losses' own, against their definitions on plain logits."""

import mlx.core as mx
import numpy as np
import pytest
from tiny import short_run, some_pairs, tiny_llama

from mlx_lm.tuner.preference.batches import make_batch
from mlx_lm.tuner.preference.evaluation import pair_figures
from mlx_lm.tuner.preference.figures import CORRELATION, FIGURES, as_means, correlation, means_of
from mlx_lm.tuner.preference.logps import Scorer
from mlx_lm.tuner.preference.objective import Objective, preference_loss
from mlx_lm.tuner.preference.reference import Reference
from mlx_lm.utils import token_logps

PAIRS = some_pairs(6, seed=3)
ROWS = np.arange(len(PAIRS))


@pytest.fixture(scope="module")
def scored():
    """A policy that is not its reference, its reference's logps, and its `pair_figures`."""
    logps = Reference(Scorer(tiny_llama(lora=False))).logps(PAIRS, ROWS)
    model = tiny_llama(moved=True)
    objective = Objective(Scorer(model), preference_loss("dpo"))
    return objective, logps, pair_figures(objective, PAIRS, ROWS, logps, 4)


def plain(model, pair):
    """TRL's figures of a pair's two responses, token by token in numpy: mean logits, entropies, hits."""
    found = []
    for response in (pair.chosen, pair.rejected):
        logits = model(mx.array([(pair.prompt + response)[:-1]]))[0, len(pair.prompt) - 1 :]
        logits = np.array(logits, np.float64)
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        entropies = -(shares * np.log(shares)).sum(axis=1)
        found.append((logits.mean(axis=1), entropies, logits.argmax(axis=1) == np.array(response)))
    return found


@pytest.mark.parametrize("loss", ["dpo", "simpo"])
def test_what_is_no_number_is_no_tie(loss):
    objective = Objective(Scorer(tiny_llama()), preference_loss(loss))
    batch, reference = make_batch(PAIRS, objective.scorer.arrangement)[0], mx.zeros((6, 2, 2))
    objective.scorer.model.lm_head.weight *= mx.nan
    _, figures = objective.each(batch, reference)
    assert mx.array_equal(figures[FIGURES.index("rewards/accuracies") - 1], mx.zeros(6))


@pytest.mark.parametrize("head", [True, False], ids=["head apart", "whole logits"])
def test_logits_entropy_and_hits_are_those_of_plain_logits(scored, head):
    objective, logps, _ = scored
    objective = Objective(Scorer(objective.scorer.model, response_only=head), objective.loss)
    figures = pair_figures(objective, PAIRS, ROWS, logps, 4)
    expected = [plain(objective.scorer.model, pair) for pair in PAIRS]
    for i, (chosen, rejected) in enumerate(expected):
        assert figures["logits/chosen"][i] == pytest.approx(chosen[0].mean(), abs=1e-4)
        assert figures["logits/rejected"][i] == pytest.approx(rejected[0].mean(), abs=1e-4)
        assert figures["entropy"][i] == pytest.approx(np.concatenate([chosen[1], rejected[1]]).mean(), abs=1e-4)
        assert figures["mean_token_accuracy"][i] == pytest.approx(chosen[2].mean())
        assert (figures["lengths/chosen"][i], figures["lengths/rejected"][i]) == (len(chosen[0]), len(rejected[0]))
    # Over all pairs they are means over tokens, not over pairs.
    found = means_of(pair_figures(objective, PAIRS, ROWS, logps, 4))
    entropies = np.concatenate([side[1] for pair in expected for side in pair])
    assert found["entropy"] == pytest.approx(entropies.mean(), abs=1e-4)
    hits = np.concatenate([chosen[2] for chosen, _ in expected])
    assert found["mean_token_accuracy"] == pytest.approx(hits.mean())
    assert found["logits/chosen"] == pytest.approx(np.concatenate([pair[0][0] for pair in expected]).mean(), abs=1e-4)
    assert found["logits/chosen"] != pytest.approx(figures["logits/chosen"].mean(), abs=1e-4)


def test_ld_alpha_weighs_the_tokens_beyond_the_shorter_response(scored):
    objective, reference, _ = scored
    loss = preference_loss("dpo", ld_alpha=0.25)
    figures = pair_figures(Objective(objective.scorer, loss), PAIRS, ROWS, reference, 4)
    for i, pair in enumerate(PAIRS):
        shorter = min(len(pair.chosen), len(pair.rejected))
        for side, (total, common) in zip(("chosen", "rejected"), reference[i], strict=True):
            response = getattr(pair, side)
            logits = objective.scorer.model(mx.array([(pair.prompt + response)[:-1]]))[0, len(pair.prompt) - 1 :]
            logps = np.array(token_logps(logits, mx.array(response)))
            expected = logps[:shorter].sum() + 0.25 * logps[shorter:].sum()
            assert figures[f"logps/{side}"][i] == pytest.approx(expected, abs=1e-3)
            logratio = expected - (common + 0.25 * (total - common))
            assert figures[f"rewards/{side}"][i] == pytest.approx(0.1 * logratio, abs=1e-3)
    assert len({len(pair.chosen) - len(pair.rejected) for pair in PAIRS}) > 1


def test_the_correlation_of_lengths_is_pearsons(scored):
    figures = scored[2]
    differences = figures["lengths/chosen"] - figures["lengths/rejected"]
    expected = np.corrcoef(figures["rewards/margins"], differences)[0, 1]
    assert means_of(figures)[CORRELATION] == pytest.approx(expected)
    # From a batch's sums, as a step has them.
    objective, logps, _ = scored
    batch = make_batch([*PAIRS, *PAIRS[:1] * 2], objective.scorer.arrangement, counted=6)[0]
    filled = np.concatenate([logps, logps[:1], logps[:1]])
    sums = objective(batch, mx.array(filled))[1]
    means, pairs, _ = as_means(np.array(sums, np.float64))
    assert pairs == 6 and means[CORRELATION] == pytest.approx(expected, abs=1e-4)
    assert means["lengths/chosen"] == pytest.approx(figures["lengths/chosen"].mean())


def test_no_correlation_where_nothing_varies():
    means = {"rewards/margins": 0.5, "lengths/chosen": 7.0, "lengths/rejected": 4.0}
    assert correlation(means, 0.25, 12.0, 1.5) == {}  # margins are all alike
    assert correlation(means, 0.35, 9.0, 1.5) == {}  # differences are all 3
    assert correlation(means, 0.35, 12.0, 1.6) == {CORRELATION: pytest.approx(0.1 / (0.1 * 3) ** 0.5)}


def test_a_run_reports_them(tmp_path):
    training, validation = short_run(tiny_llama(), PAIRS, tmp_path, valid=PAIRS, iters=3)
    assert "eval_rewards/length_correlation" not in validation[0]  # the policy is its reference
    assert -1 <= validation[-1]["eval_rewards/length_correlation"] <= 1
    assert training[-1]["lengths/chosen"] > 0 and validation[-1]["eval_entropy"] > 0

"""What a test says of its pairs: intervals by hand, the KL by its definition, lines for each source and each pair."""

import json
import math
import re
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from tiny import short_run, some_pairs, tiny_llama

from mlx_lm.tuner.preference.divergence import kl_of_logits, mean_kl, token_kl
from mlx_lm.tuner.preference.evaluation import pair_figures
from mlx_lm.tuner.preference.figures import DESIRABLE, FIGURES, TOKEN_FIGURES, means_of
from mlx_lm.tuner.preference.intercept import without_adapters
from mlx_lm.tuner.preference.logps import Scorer
from mlx_lm.tuner.preference.memory import bounded_memory
from mlx_lm.tuner.preference.objective import Objective, preference_loss
from mlx_lm.tuner.preference.scores import (
    SIDES,
    Scores,
    compared,
    described,
    effective_count,
    mean_interval,
    score,
    share_interval,
    student,
    wilson,
    write_predictions,
)
from mlx_lm.tuner.preference.unpacked import unpacks


class Pairs(list):
    """Pairs that know where their rows stand and where they come from."""

    def where(self, i):
        return f"data/test.jsonl:{2 * i + 1}"

    def source(self, i):
        return None if i == 2 else "ab"[i % 2]


def test_the_interval_of_a_share():
    """8 of 10: 0.4902 to 0.9433 in Wilson's own terms; no share is certain."""
    assert wilson(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(1.0, 10) == pytest.approx((1 / (1 + 1.959964**2 / 10), 1.0))
    # Where none is right rounding would leave a little less than 0, which is written with a sign.
    assert {f"{wilson(0.0, count)[0]:.3f}" for count in range(1, 300)} == {"0.000"}
    assert max(wilson(1.0, count)[1] for count in range(1, 300)) == 1


def paired(values, prompts):
    """The interval of the mean of all of some differences."""
    return mean_interval([(np.array(values, float), np.full(len(values), True))], prompts)


def test_the_interval_of_paired_differences():
    """Of ten pairs four gained and one lost: (4 - 1) / 12 and sqrt(6 - 9 / 12) / 12 with half a pair more each."""
    mean, low, high = share_interval(np.array([1, 1, 1, 1, -1, 0, 0, 0, 0, 0]), np.arange(10))
    assert mean == pytest.approx(0.3)
    assert (low, high) == pytest.approx((0.25 - 1.959964 * 0.190941, 0.25 + 1.959964 * 0.190941), abs=1e-5)
    # Of 1, 2 and 3 the mean is 2 and its standard error 1 / sqrt(3).
    half = student(2) / 3**0.5
    assert paired([1, 2, 3], np.arange(3)) == pytest.approx((2, 2 - half, 2 + half), abs=1e-9)
    assert paired([1], np.arange(1)) == (1, -math.inf, math.inf)
    low, high = share_interval(np.zeros(20), np.arange(20))[1:]
    assert low < 0 < high, "pairs that all agree do not prove that others would"


def test_the_interval_of_few_differences_is_students():
    """The quantiles of a table; and of 2000 draws of five differences some 95 % have the mean, where Z had 88 %."""
    table = {3: 3.182, 4: 2.776, 9: 2.262, 30: 2.042, 1000: 1.962}
    assert {freedom: student(freedom) for freedom in table} == pytest.approx(table, rel=0.012)
    assert 4.303 < student(2) < 1.05 * 4.303 and 12.71 < student(1) < 1.4 * 12.71
    intervals = [paired(values, np.arange(5))[1:] for values in np.random.default_rng(0).normal(1, 1, (2000, 5))]
    assert np.mean([low < 1 < high for low, high in intervals]) == pytest.approx(0.95, abs=0.015)


def test_the_interval_of_the_margin_of_single_responses():
    """Good ones gained 1 and 3, bad ones 1 and 2: 2 - 1.5, and variances of 2 and 0.5 of two each."""
    gains, good = np.array([1.0, 3, 1, 2]), np.array([True, True, False, False])

    def margin(*rows):
        own = list(rows)
        return mean_interval([(gains[own], good[own]), (-gains[own], ~good[own])], np.arange(4)[own])

    half = student(1) * 1.25**0.5
    assert margin(0, 1, 2, 3) == pytest.approx((0.5, 0.5 - half, 0.5 + half), abs=1e-5)
    assert margin(0, 2, 3) == (-0.5, -math.inf, math.inf)
    assert np.isnan([margin(0, 1), margin(2, 3)]).all()


def test_pairs_of_one_prompt_count_as_what_they_tell():
    """A prompt whose pairs are all right or all wrong tells one thing; of 80 prompts 95 % of intervals hold."""
    prompts = np.repeat(np.arange(10), 4)
    alike = effective_count(np.repeat([0.0, 1.0] * 5, 4), prompts)
    assert alike == pytest.approx(10 * 0.9 * (student(39) / student(9)) ** 2)
    assert effective_count(np.tile([0.0, 1.0, 0.0, 1.0], 10), prompts) == 10  # no prompt differs from another
    assert effective_count(np.tile([0.0, 1.0], 20), np.arange(40)) == 40
    assert effective_count(np.ones(40), prompts) == 10 and effective_count(np.ones(4), prompts[:4]) == 1
    assert paired(np.arange(4), np.zeros(4, int)) == (1.5, -math.inf, math.inf)

    draw, prompts, held = np.random.default_rng(0), np.repeat(np.arange(80), 5), []
    good = np.arange(400) % 5 < 2
    for _ in range(500):
        right, other = ((draw.random(400) < draw.beta(0.7, 0.3, 80)[prompts]).astype(float) for _ in range(2))
        low, high = wilson(right.mean(), effective_count(right, prompts))
        shares = share_interval(right - other, prompts)
        gains = 1 + draw.normal(size=80)[prompts] + draw.normal(size=400)
        # What a prompt's good responses gain, its bad ones lose.
        found = shares, paired(gains, prompts), mean_interval([(gains, good), (gains, ~good)], prompts)
        bounds = (low, high), *(interval[1:] for interval in found)
        held.append([low < true < high for true, (low, high) in zip((0.7, 0, 1, 2), bounds, strict=True)])
    assert np.mean(held, axis=0) == pytest.approx(np.full(4, 0.95), abs=0.03)


def plain_kl(model, pairs):
    """Of each response token, by the definition, from rows of one response each."""
    found = []
    for side in (1, 2):
        for pair in pairs:
            tokens = mx.array([pair[0] + pair[side]])[:, :-1]
            places = slice(len(pair[0]) - 1, None)
            logits = model(tokens)[0, places]
            with without_adapters(model):
                bare = model(tokens)[0, places]
            logps, bare = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (logits, bare))
            found += (mx.exp(logps) * (logps - bare)).sum(-1).tolist()
    return found


def test_the_kl_of_single_responses_is_theirs_alone():
    model = tiny_llama(moved=True)
    pairs = [pair._replace(label=bool(i % 2)) for i, pair in enumerate(some_pairs(5))]
    expected = plain_kl(model, pairs)[: sum(len(pair.chosen) for pair in pairs)]
    assert mean_kl(Scorer(model), None, pairs, np.arange(5)) == (pytest.approx(np.mean(expected), abs=1e-5), 5)


@pytest.mark.parametrize("share_prompt", [True, False])
def test_the_kl_is_that_of_its_definition(share_prompt, monkeypatch):
    monkeypatch.setattr("mlx_lm.tuner.preference.logps.LEAST_ROWS", 1)
    monkeypatch.setattr("mlx_lm.tuner.preference.logps.CHUNK_LOGITS", 8 * 97 * 5)
    model, pairs = tiny_llama(moved=True), some_pairs(5)
    policy = Scorer(model, share_prompt)
    expected = plain_kl(model, pairs)
    assert min(expected) > 0
    with bounded_memory() as evaluate:
        assert token_kl(policy, None, pairs, evaluate) == pytest.approx(expected, abs=1e-5)
    assert mean_kl(policy, None, pairs, np.arange(5)) == (pytest.approx(np.mean(expected), abs=1e-5), 5)
    # A reference that is another model, and one that is not at hand.
    with bounded_memory() as evaluate:
        found = token_kl(policy, Scorer(tiny_llama(lora=False)), pairs, evaluate)
        assert found == pytest.approx(expected, abs=1e-5)
    assert mean_kl(Scorer(tiny_llama(lora=False)), None, pairs, np.arange(5)) is None
    # One whose vocabulary is filled up to another number.
    wider = tiny_llama(lora=False)
    wider.lm_head.weight = mx.pad(wider.lm_head.weight, [(0, 3), (0, 0)])
    assert mean_kl(policy, Scorer(wider), pairs, np.arange(5)) is None
    monkeypatch.setattr("mlx_lm.tuner.preference.divergence.MOST_PAIRS", 2)
    few = np.mean(plain_kl(model, [pairs[0], pairs[4]]))
    assert mean_kl(policy, None, pairs, np.arange(5)) == (pytest.approx(few, abs=1e-5), 2)


@pytest.mark.skipif(not unpacks(), reason="packed weights are multiplied as they are on Metal")
def test_the_kl_of_a_packed_model_is_of_unpacked_products_too(monkeypatch):
    monkeypatch.setattr("mlx_lm.tuner.preference.logps.LEAST_ROWS", 1)
    monkeypatch.setattr("mlx_lm.tuner.preference.logps.CHUNK_LOGITS", 8 * 97 * 5)
    model, pairs = tiny_llama(moved=True), some_pairs(5)
    nn.quantize(model, 32)
    expected, policy = plain_kl(model, pairs), Scorer(model)
    monkeypatch.delattr(mx, "quantized_matmul")
    with bounded_memory() as evaluate:
        assert token_kl(policy, None, pairs, evaluate) == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_what_rounding_leaves_of_a_kl_is_not_below_0(monkeypatch):
    found = iter(([-1e-6, 4e-7], [math.nan]))
    monkeypatch.setattr("mlx_lm.tuner.preference.divergence.token_kl", lambda *_: np.array(next(found), np.float32))
    policy = Scorer(tiny_llama())
    assert mean_kl(policy, None, some_pairs(2), np.arange(2)) == (0.0, 2)
    assert math.isnan(mean_kl(policy, None, some_pairs(2), np.arange(2))[0])


def test_the_kl_of_logits_in_half_precision_is_taken_in_float32():
    logits = (4 * mx.random.normal((2, 3, 97), key=mx.random.key(0))).astype(mx.bfloat16)
    assert mx.array_equal(kl_of_logits(*logits), kl_of_logits(*logits.astype(mx.float32)))


@pytest.mark.parametrize("count", [5, 1])
def test_workers_share_the_pairs_of_a_kl(count, monkeypatch):
    """Of one pair the second worker has none."""
    model, pairs = tiny_llama(moved=True), some_pairs(count)
    policy, shares = Scorer(model), []
    whole = mean_kl(policy, None, pairs, np.arange(count))
    for rank in (0, 1):
        world = SimpleNamespace(rank=lambda rank=rank: rank, size=lambda: 2)
        monkeypatch.setattr(mx.distributed, "init", lambda world=world: world)
        monkeypatch.setattr(mx.distributed, "all_sum", lambda share: shares.append(share) or sum(shares))
        monkeypatch.setattr("mlx_lm.tuner.preference.divergence.confirm", lambda: None)
        found = mean_kl(policy, None, pairs, np.arange(count))
    assert found == (pytest.approx(whole[0], abs=1e-6), count)
    assert (shares[1][1].item() == 0) == (count == 1)
    shares.clear()
    assert mean_kl(Scorer(tiny_llama(lora=False)), None, pairs, np.arange(count)) is None


@pytest.fixture(scope="module")
def scores():
    objective, pairs = Objective(Scorer(tiny_llama(moved=True)), preference_loss("dpo")), Pairs(some_pairs(5))
    args = SimpleNamespace(batch_size=2, test_batches=-1, resume_adapter_file=None, reference_model=None)
    logps = np.random.default_rng(0).normal(-30, 9, (5, 2, 2)).astype(np.float32)
    found = score(objective, pairs, args, logps)
    means = means_of(pair_figures(objective, pairs, np.arange(5), logps, 2))
    return found, logps, means


def test_each_pair_has_its_figures(scores):
    found, logps, means = scores
    assert found.means == pytest.approx(means) and set(found.figures) == {*FIGURES, *TOKEN_FIGURES}
    margins = found.figures["rewards/margins"]
    assert found.figures["loss"] == pytest.approx(np.logaddexp(0, -margins), abs=1e-5)
    ratios = found.figures["logps/chosen"] - logps[:, 0, 0]
    assert found.figures["rewards/chosen"] == pytest.approx(0.1 * ratios, abs=1e-5)


def test_with_ld_alpha_rewards_are_what_the_logps_beside_them_come_to(tmp_path):
    model, pairs = tiny_llama(moved=True), Pairs(some_pairs(5, response=(1, 25)))
    args = SimpleNamespace(batch_size=2, test_batches=-1, resume_adapter_file=None, reference_model=None)
    logps = np.random.default_rng(0).normal(-30, 9, (5, 2, 2)).astype(np.float32)
    found = score(Objective(Scorer(model), preference_loss("dpo", ld_alpha=0.3)), pairs, args, logps)
    for side in range(2):
        ratios = found.figures[f"logps/{SIDES[side]}"] - found.reference[:, side]
        assert found.figures[f"rewards/{SIDES[side]}"] == pytest.approx(0.1 * ratios, abs=1e-5)
    short_run(model, pairs, tmp_path, valid=pairs, ld_alpha=0.3, beta=1.0, iters=1)
    told = re.findall(r"reward (.*?), logps (.*?), reference (.*?)<", (tmp_path / "report.html").read_text())
    assert len(told) == 10 and all(
        float(reward) == pytest.approx(float(policy) - float(reference), abs=0.011)
        for reward, policy, reference in told
    )


def test_a_loss_that_sorts_the_batch_gives_no_pair_a_value_of_its_own():
    """Of five pairs in batches of four each has its batch's mean, which the mean of all is made of."""
    objective, pairs = Objective(Scorer(tiny_llama(moved=True)), preference_loss("aot", beta=1.0)), some_pairs(5)
    logps = np.random.default_rng(0).normal(-30, 9, (5, 2, 2)).astype(np.float32)
    figures = pair_figures(objective, pairs, np.arange(5), logps, 4)
    gaps = figures["logps/chosen"] - figures["logps/rejected"], logps[:, 0, 0] - logps[:, 1, 0]
    values, counts = np.unique(figures["loss"], return_counts=True)
    assert sorted(counts) == [1, 4]
    batch = figures["loss"] == values[counts.argmax()]
    policy, reference = (np.sort(gap[batch]) for gap in gaps)
    assert figures["loss"][batch] == pytest.approx(np.logaddexp(0, reference - policy).mean(), abs=1e-4)


def test_the_lines_of_a_test(scores):
    found, _, means = scores
    first, second, head, *sources = described(found).splitlines()
    low, high = wilson(means["rewards/accuracies"], 5)
    told = f"reward accuracy {means['rewards/accuracies']:.3f} (95 % interval {low:.3f} to {high:.3f}) (5 pairs)"
    assert told in first and f"KL {found.kl[0]:.4f} nats a token." in second and "source" in head
    assert [(line.rsplit(None, 7)[0].strip(), int(line.split()[-7])) for line in sources] == [
        ("(no source)", 1),
        ("a", 2),
        ("b", 2),
    ]
    low, high = wilson(found.figures["rewards/accuracies"][[0, 4]].mean(), 2)
    assert f" {low:.3f} to {high:.3f} " in sources[1]
    assert float(sources[1].split()[-1]) == pytest.approx(found.figures["loss"][[0, 4]].mean(), abs=1e-3)
    plain = described(found._replace(sources=[None] * 5, kl=None))
    assert plain.count("\n") == 1 and "KL" not in plain
    prompts = np.array([0, 0, 1, 1, 1])
    repeated = described(found._replace(prompts=prompts)).splitlines()
    low, high = wilson(0.6, effective_count(found.figures["rewards/accuracies"], prompts))
    assert f"(95 % interval {low:.3f} to {high:.3f}) (5 pairs of 2 prompts)" in repeated[0]


def test_predictions_are_a_line_a_pair(scores, tmp_path):
    found, logps, _ = scores
    path = tmp_path / "predictions.jsonl"
    write_predictions(path, found._replace(figures=found.figures | {"loss": np.array([np.nan, 1, 2, 3, 4])}))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["line"] for line in lines] == [1, 3, 5, 7, 9] and lines[0]["file"] == "data/test.jsonl"
    assert [line.get("source") for line in lines] == found.sources and "source" not in lines[2]
    assert [line["loss"] for line in lines] == [None, 1, 2, 3, 4]
    assert [line["reference_logps/rejected"] for line in lines] == logps[:, 1, 0].tolist()
    assert [line["rewards/margins"] for line in lines] == found.figures["rewards/margins"].tolist()
    # A row's number is no line's, also where the file's name has a colon.
    write_predictions(path, found._replace(places=["a:b.json, row 3"] * 5))
    line = json.loads(path.read_text().splitlines()[0])
    assert line["row"] == "a:b.json, row 3" and not {"file", "line"} & set(line)


def test_a_comparison_tells_who_is_better_or_nobody():
    def made(accuracies, margins, losses):
        figures = {"rewards/accuracies": accuracies, "rewards/margins": margins, "loss": losses}
        figures = {name: np.array(values, float) for name, values in figures.items()}
        return Scores(figures, None, list(range(20)), [None] * 20, None, np.arange(20))

    noise = np.tile([0.1, -0.1], 10)
    worse, better = made([0] * 15 + [1] * 5, noise, 1 + noise), made([1] * 20, 1 - noise, 0.5 - noise)
    loss = preference_loss("dpo")
    told = compared(["A", "B"], [worse, better], loss).splitlines()
    assert told[0].startswith("B less A, pair by pair (20 pairs)") and "+0.750" in told[1]
    assert told[-1] == "They differ: B has the better reward accuracy, margin, loss."
    assert compared(["A", "B"], [better, worse], loss).endswith("A has the better reward accuracy, margin, loss.")
    assert compared(["A", "B"], [worse, worse], loss).endswith("No difference is shown on these pairs.")
    assert "loss" not in compared(["A", "B"], [worse, better], preference_loss("aot"))
    broken = made([0] * 20, np.full(20, np.nan), np.full(20, np.nan))
    told = compared(["A", "B"], [broken, better], loss)
    assert told.count("cannot be compared: not all of both have one that is finite") == 2
    first, second, third = described(broken._replace(figures=broken.figures | OTHERS)).splitlines()
    assert third == "  The loss of 20 of them is not finite, the first at 0."


OTHERS = {f"{name}/{side}": np.zeros(20) for name in ("rewards", "logps", "lengths") for side in ("chosen", "rejected")}


def test_margins_of_single_responses_are_compared_label_by_label():
    """A reward that all responses gain, good or bad, is no margin."""
    good = np.arange(20) % 5 > 0
    rewards = np.random.default_rng(0).normal(size=20)

    def made(rewards, good=good):
        figures = {"rewards/chosen": good * rewards, "rewards/rejected": ~good * rewards, DESIRABLE: good * 1.0}
        figures |= {"rewards/accuracies": good * 1.0, "rewards/margins": (2 * good - 1) * rewards, "loss": -rewards}
        return Scores(figures, None, list(range(20)), [None] * 20, None, np.arange(20))

    def margin(*rewards, **labels):
        told = compared(["A", "B"], [made(each, **labels) for each in rewards], preference_loss("kto"))
        return next(line.split()[1:] for line in told.splitlines() if line.strip().startswith("margin"))

    assert float(margin(rewards, rewards + 3)[0]) == pytest.approx(0, abs=1e-3)
    mean, low, _, high = margin(rewards, rewards + np.where(good, 1, -1) + 0.1 * rewards)
    shift = 0.1 * rewards
    expected = 2 + shift[good].mean() - shift[~good].mean()
    half = student(3) * np.sqrt(shift[good].var(ddof=1) / good.sum() + shift[~good].var(ddof=1) / (~good).sum())
    found = [float(text.strip("()")) for text in (mean, low, high)]
    assert found == pytest.approx([expected, expected - half, expected + half], abs=2e-3)
    assert margin(rewards, rewards + 1, good=np.ones(20, bool))[0] == "cannot"

"""Batches: every pair where it belongs and once, padding that changes nothing, an order from the seed alone."""

from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.preference.schedule import Schedule
from tiny import some_pairs, tiny_llama

from mlx_lm.tuner.datasets import Pair
from mlx_lm.tuner.preference import batches as module
from mlx_lm.tuner.preference.batches import (
    ARRANGEMENTS,
    CACHED,
    CPU,
    CUDA,
    METAL,
    PACKED,
    PLAIN,
    device,
    make_batch,
    order_of_epoch,
    plan,
)
from mlx_lm.tuner.preference.evaluation import mean_figures
from mlx_lm.tuner.preference.logps import Scorer
from mlx_lm.tuner.preference.objective import preference_loss
from mlx_lm.tuner.preference.step import FIGURES, Objective
from mlx_lm.tuner.trainer import TrainingArgs
from mlx_lm.utils import get_batched_logps


def lengths_of(pairs):
    return np.array([[len(pair.prompt), len(pair.chosen), len(pair.rejected)] for pair in pairs])


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("rows, size, sizes", [(8, 4, [4, 4]), (9, 4, [4, 4, 1]), (3, 8, [3]), (1, 1, [1])])
def test_a_plan_holds_every_row_once(rows, size, sizes, arrangement):
    planned = plan(lengths_of(some_pairs(rows)), size, arrangement)
    assert [len(batch) for batch in planned] == sizes
    assert sorted(np.concatenate(planned).tolist()) == list(range(rows))


def test_rows_of_like_length_come_together():
    pairs = some_pairs(64, prompt=(3, 100), response=(1, 100))
    lengths = lengths_of(pairs)
    totals = lengths[:, 0] + lengths[:, 1:].max(axis=1)
    plain = [totals[rows] for rows in plan(lengths, 8, PLAIN)]
    assert all(shorter.max() <= longer.min() for shorter, longer in pairwise(plain))
    # A shared prompt is as long as the batch's shortest: prompts within 16 tokens of each other come first.
    prompts = [lengths[rows, 0] // 16 for rows in plan(lengths, 8, CACHED)]
    assert all(shorter.max() <= longer.min() for shorter, longer in pairwise(prompts))


@pytest.mark.parametrize("rows, size", [(12, 4), (10, 4), (3, 4), (7, 1)])
def test_an_epoch_visits_every_row_once(rows, size):
    schedule = Schedule(some_pairs(rows), TrainingArgs(batch_size=size), arrangement=PACKED)
    steps = -(-rows // size)
    for epoch in range(3):
        visited = [schedule.rows(epoch * steps + step) for step in range(1, steps + 1)]
        assert sorted(np.concatenate(visited).tolist()) == list(range(rows))
    assert schedule.visited(1, steps).tolist() == schedule.visited(1, 50).tolist() == list(range(rows))
    assert schedule.visited(2, 2).tolist() == sorted(schedule.rows(2).tolist())


def test_the_order_comes_from_the_seed_and_the_epoch_alone():
    pairs = some_pairs(40)

    def order(seed):
        np.random.seed(seed + 1)
        np.random.permutation(5)  # what others draw has no effect
        schedule = Schedule(pairs, TrainingArgs(batch_size=4, seed=seed), arrangement=PACKED)
        return [schedule.rows(step).tolist() for step in range(1, 21)]

    first = order(seed=0)
    assert first == order(seed=0) != order(seed=1)
    assert first[:10] != first[10:] and sorted(first[:10]) == sorted(first[10:])
    # A later iteration is the same whichever was asked for before: what a resumed run does.
    schedule = Schedule(pairs, TrainingArgs(batch_size=4), arrangement=PACKED)
    assert [schedule.rows(step).tolist() for step in (15, 3, 20)] == [first[14], first[2], first[19]]
    assert order_of_epoch(9, 0, 0).tolist() != order_of_epoch(9, 0, 1).tolist()


def one_at_a_time(model, pairs):
    """Every row's logps by upstream's forward pass over that row alone: `(2B,)`, the chosen ones first."""
    logps = [
        get_batched_logps(
            model,
            mx.array([(pair.prompt + response)[:-1]] * 2),
            mx.array([[-100] * (len(pair.prompt) - 1) + response] * 2),
            ignore_index=-100,
        )[0]
        for responses in ("chosen", "rejected")
        for pair in pairs
        for response in [getattr(pair, responses)]
    ]
    return np.array(mx.concatenate(logps))


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("multiple", [1, 8, 16])
def test_padding_changes_no_number(arrangement, multiple):
    model = tiny_llama(moved=True)
    pairs = some_pairs(5, response=(1, 40))
    batch, processed, padding = make_batch(pairs, arrangement, multiple)
    # 16 is more than the shortest prompt has.
    assert bool(batch.prefix.shape[1]) == (arrangement == CACHED and multiple < 16)
    scores = Scorer(model, arrangement != PLAIN)(batch)
    assert np.allclose(np.array(scores.total), one_at_a_time(model, pairs), atol=1e-4)
    whole = lengths_of(pairs)
    prompts = sum(whole[:, 0])
    run = prompts if arrangement == PACKED else 2 * prompts - batch.prefix.shape[1] * len(pairs)
    assert processed - padding == run + whole[:, 1:].sum() - 2 * len(pairs)
    assert batch.tokens.item() == 2 * prompts + whole[:, 1:].sum()
    assert processed == batch.prefix.size + sum(group.tokens.size for group in batch.groups)
    if arrangement == PACKED:
        assert padding < multiple
        assert len(batch.layout.body.parts) > 2 - (multiple == 16) and len(batch.layout.last.parts) > 1
    else:
        assert len(batch.groups) > 1 and padding > 0


@pytest.mark.parametrize("multiple", [1, 8])
def test_a_packed_row_holds_each_token_once(multiple):
    pairs = some_pairs(5, response=(1, 40))
    batch, processed, padding = make_batch(pairs, PACKED, multiple)
    (group,) = batch.groups
    used = np.array(group.tokens)[0, : processed - padding].tolist()
    wanted = [pair.prompt for pair in pairs] + [pair.chosen[:-1] for pair in pairs]
    assert used == [token for tokens in wanted + [pair.rejected[:-1] for pair in pairs] for token in tokens]
    body, last = batch.layout.body, batch.layout.last
    places, tokens = np.array(body.places), np.array(group.tokens)[0]
    rows = [(pair.prompt + response)[:-1] for side in ("chosen", "rejected") for pair in pairs
            for response in [getattr(pair, side)]]  # fmt: skip
    found = [tokens[keys[: places[keys].argmax() + 1]].tolist() for part in last.parts for keys in np.array(part.keys)]
    assert sorted(found) == sorted(rows)
    # Every token asks once; the scored ones are those that response tokens follow, in the targets' order.
    assert (np.array(body.outputs) >= 0).sum() == processed - padding
    assert len(set(np.array(body.outputs).tolist()) - {-1}) == processed - padding
    scored = np.array(batch.layout.scored)[: sum(len(p.chosen) + len(p.rejected) for p in pairs)]
    ends = {(tokens[number], places[number]) for number in scored}
    assert (pairs[0].prompt[-1], len(pairs[0].prompt) - 1) in ends
    assert np.array_equal(scored, np.array(batch.positions)[: len(scored)])


def test_common_logps_stop_where_the_shorter_response_ends():
    model = tiny_llama(moved=True)
    pair = some_pairs(1, response=(6, 7))[0]._replace(rejected=[5, 6])
    scores = Scorer(model)(make_batch([pair], PACKED)[0])
    cut = one_at_a_time(model, [pair._replace(chosen=pair.chosen[:2])])
    assert np.allclose(np.array(scores.common), cut, atol=1e-4)
    assert scores.common[1].item() == scores.total[1].item()


@pytest.mark.parametrize("arrangement", [CACHED, PLAIN])
def test_row_groups_waste_little(arrangement, monkeypatch):
    """Of a third of the tokens, whatever share of them is padding in batches that are not split."""
    pairs = some_pairs(64, prompt=(20, 100), response=(5, 100))

    def padding_share(size):
        counts = [
            make_batch([pairs[i] for i in rows], arrangement)[1:] for rows in plan(lengths_of(pairs), size, CACHED)
        ]
        processed, padding = np.sum(counts, axis=0)
        return padding / processed

    split = padding_share(8)
    monkeypatch.setattr(module, "CPU", CPU._replace(most_groups=1))
    unsplit = padding_share(8)
    monkeypatch.undo()
    assert unsplit > 0.25 and split < unsplit / 2
    assert padding_share(1) < 0.02


@pytest.mark.parametrize(
    "lengths, expected",
    [
        ([7, 7, 7], [([0, 1, 2], 7)]),
        ([100, 99, 98, 97], [([0, 1, 2, 3], 100)]),  # 6 of 400 tokens are not worth a pass
        ([10, 90, 12, 95], [([0, 2], 12), ([1, 3], 95)]),
        ([50, 10, 90, 52, 12, 95], [([1, 4], 12), ([0, 3], 52), ([2, 5], 95)]),
        ([5], [([0], 5)]),
    ],
)
def test_rows_are_split_where_that_saves_enough(lengths, expected):
    assert module._row_groups(lengths, 1, 4) == expected
    rounded = module._row_groups(lengths, 8, 4)
    assert sorted(row for rows, _ in rounded for row in rows) == list(range(len(lengths)))
    assert all(width % 8 == 0 and max(lengths[row] for row in rows) <= width for rows, width in rounded)


def test_a_pass_of_its_own_has_to_save_what_it_costs(monkeypatch):
    pairs = [Pair([1] * 101, [2] * 8, [3] * 8), Pair([1] * 101, [2] * 64, [3] * 64)]

    def passes(least):
        monkeypatch.setattr(module, "CPU", CPU._replace(least_saving=least))
        batch, *_ = make_batch(pairs, CACHED, multiple=1)
        return batch.prefix.shape[1], len(batch.groups)

    # 100 tokens of two prompts, and 56 of two rows.
    assert passes(0) == passes(111) == (100, 2)
    assert passes(112) == passes(200) == (100, 1)
    assert passes(201) == (0, 1)


def test_every_device_is_known_by_its_kind(monkeypatch):
    assert device() == CPU
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    assert device() == METAL
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    assert device() == CUDA


@pytest.mark.parametrize("kind, most", [(CPU, 64), (METAL, 60), (CUDA, 30)])
def test_packed_batches_have_few_shapes_on_a_gpu(kind, most, monkeypatch):
    monkeypatch.setattr(module, "device", lambda: kind)
    pairs = some_pairs(256, prompt=(20, 200), response=(5, 300))
    shapes, counts = set(), []
    for rows in plan(lengths_of(pairs), 4, PACKED):
        batch, *tokens = make_batch([pairs[row] for row in rows], PACKED)
        shapes.add(tuple(value.shape for _, value in tree_flatten(batch)))
        counts.append(tokens)
    processed, padding = np.sum(counts, axis=0)
    assert len(shapes) <= most and padding / processed < 0.1
    assert batch.groups[0].tokens.size % kind.packed_multiple == batch.targets.size % kind.packed_multiple == 0


def test_fillers_count_for_nothing():
    model = tiny_llama(moved=True)
    pairs = some_pairs(3)
    reference = mx.random.normal((3, 2, 2), key=mx.random.key(1))
    for loss_type in ("dpo", "aot", ["dpo", "sft"]):
        objective = Objective(Scorer(model), preference_loss(loss_type))
        exact = objective(make_batch(pairs, PACKED)[0], reference)[1]
        filled = make_batch(pairs, PACKED, size=5)[0]
        assert filled.counts.tolist() == [1, 1, 1, 0, 0]
        padded = mx.concatenate([reference, mx.full((2, 2, 2), 1e3)])
        assert np.allclose(np.array(objective(filled, padded)[1]), np.array(exact), rtol=1e-5), loss_type
        assert exact[len(FIGURES)].item() == 3


@pytest.mark.parametrize("rows, size", [(9, 4), (9, 9), (9, 16), (9, 1)])
def test_evaluation_scores_each_pair_once(rows, size):
    """Means over pairs do not depend on the batch size, as they would if a batch's mean were averaged."""
    model, pairs = tiny_llama(moved=True), some_pairs(rows, response=(1, 30))
    objective = Objective(Scorer(model), preference_loss("dpo", beta=1.0))
    logps = np.random.default_rng(0).normal(size=(rows, 2, 2)).astype(np.float32) - 30
    progress = []
    figures = mean_figures(objective, pairs, np.arange(rows), logps, size, lambda: progress.append(1))
    chosen, rejected = np.split(one_at_a_time(model, pairs), 2) - logps[:, :, 0].T
    assert figures["loss"] == pytest.approx(np.logaddexp(0, rejected - chosen).mean(), abs=1e-4)
    assert figures["rewards/chosen"] == pytest.approx(chosen.mean(), abs=1e-4)
    assert figures["rewards/accuracies"] == pytest.approx((chosen > rejected).mean())
    assert len(progress) == -(-rows // size)


def test_a_pair_of_the_shortest_kind_is_scored():
    model = tiny_llama(moved=True)
    pair = Pair([3], [4], [5])
    scores = Scorer(model)(make_batch([pair], PACKED)[0])
    assert np.allclose(np.array(scores.total), one_at_a_time(model, [pair]), atol=1e-5)

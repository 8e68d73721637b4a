"""Batches: every pair where it belongs and once, padding that changes nothing, an order from the seed alone."""

from itertools import combinations, pairwise
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tiny import short_run, some_pairs, tiny_llama

from mlx_lm.tuner.datasets import Pair
from mlx_lm.tuner.preference import batches as module
from mlx_lm.tuner.preference.batches import (
    ARRANGEMENTS,
    MOST_SHAPES,
    MOST_SHAPES_ON_METAL,
    PACKED,
    PLAIN,
    RECURRENT,
    Schedule,
    Shape,
    at_once,
    by_length,
    drawn,
    filled,
    ladder,
    lengths_of,
    make_batch,
    shape_of,
)
from mlx_lm.tuner.preference.evaluation import pair_figures
from mlx_lm.tuner.preference.figures import FIGURES, means_of
from mlx_lm.tuner.preference.logps import Scorer
from mlx_lm.tuner.preference.objective import Objective, preference_loss
from mlx_lm.tuner.preference.options import ConfigError
from mlx_lm.utils import get_batched_logps


@pytest.mark.parametrize("part", ["prompt", "chosen", "rejected"])
def test_a_pair_with_an_empty_part_is_refused(part, tmp_path):
    pairs = some_pairs(6)
    pairs[2] = pairs[2]._replace(**{part: []})
    for share_prompt in (True, False):
        with pytest.raises(ConfigError, match="pair 2 has no token in its prompt, chosen or rejected response"):
            short_run(tiny_llama(), pairs, tmp_path, share_prompt=share_prompt)


@pytest.mark.parametrize("rows, size, sizes", [(8, 4, [4, 4]), (9, 4, [4, 4, 1]), (3, 8, [3]), (1, 1, [1])])
def test_batches_of_a_size_hold_every_row_once(rows, size, sizes):
    planned = filled(lengths_of(some_pairs(rows)), PLAIN, size)
    assert [len(batch) for batch in planned] == sizes
    assert sorted(np.concatenate(planned).tolist()) == list(range(rows))


def test_rows_of_like_length_come_together():
    lengths = lengths_of(some_pairs(64, prompt=(3, 100), response=(1, 100)))
    totals = lengths[:, 0] + lengths[:, 1:].max(axis=1)
    batches = [totals[rows] for rows in filled(lengths, PLAIN, 8)]
    assert all(shorter.max() <= longer.min() for shorter, longer in pairwise(batches))
    # Of rows of one length, like responses.
    assert by_length(np.array([[5, 3, 1], [7, 1, 1], [4, 1, 4], [6, 2, 2]])).tolist() == [1, 3, 0, 2]


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("most, share", [(1200, None), (1200, 7), (50, None), (10**6, None), (10**6, 60)])
def test_filled_batches_hold_each_row_once_and_stay_under_the_tokens(arrangement, most, share):
    lengths = lengths_of(some_pairs(200, prompt=(9, 60), response=(1, 60)))
    totals = lengths[:, 0] + lengths[:, 1:].max(axis=1)
    batches = filled(lengths, arrangement, share, most)
    assert sorted(row for rows in batches for row in rows) == list(range(200))

    def tokens(rows):
        return 2 * len(rows) * totals[rows].max() if arrangement == PLAIN else lengths[rows].sum()

    for rows, following in zip(batches, [*batches[1:], np.array([], int)], strict=True):
        assert len(rows) <= (share or 200)
        assert tokens(rows) <= most or len(rows) == 1  # a longer pair is alone, but not left out
        if len(following) and len(rows) != share:
            assert tokens(np.append(rows, following[0])) > most  # full
    order = [row for rows in batches for row in rows]
    assert (np.diff(totals[order]) >= 0).all()
    assert filled(np.zeros((0, 3)), arrangement, share, most) == []


# Shapes


@pytest.mark.parametrize(
    "arrangement, to, shape",
    [
        # Prompts of 5 and 2; responses of 3 and 1, 4 and 7, whose last tokens predict nothing: 7 + 15 - 4 tokens.
        (PACKED, 1, (18, 8, 15)),
        (PLAIN, 1, (0, 8, 15)),
        (PACKED, 16, (32, 16, 16)),
        (PLAIN, 4, (0, 8, 16)),
    ],
)
def test_the_least_shape_of_a_batch(arrangement, to, shape, monkeypatch):
    monkeypatch.setattr(module, "multiple", lambda: to)
    assert shape_of(np.array([[5, 3, 1], [2, 4, 7]]), arrangement) == Shape(*shape)


@pytest.mark.parametrize("multiple, expected", [(1, [0, 0, 32, 32, 96, 128]), (128, [0, 0, 0, 0, 0, 128])])
def test_what_begins_a_batch_leaves_a_token_of_each_prompt(multiple, expected, monkeypatch):
    """A prompt's last token predicts a response's first, which may be its only one."""
    monkeypatch.setattr(module, "multiple", lambda: multiple)
    shortest = [1, 32, 33, 64, 128, 129]
    assert [shape_of(np.array([[200, 3, 1], [n, 1, 1]]), RECURRENT).begun for n in shortest] == expected
    pairs = [Pair([1] * 32, [2], [3])] * 2
    assert all(keys.shape[1] for keys in make_batch(pairs, RECURRENT)[0].layout.recurrent.keys)


def real_lengths(count, seed=0):
    """Lengths as in real data: many short pairs, few long ones."""
    draw = np.random.default_rng(seed)
    return np.minimum(np.exp(draw.normal([4.0, 4.5, 4.5], 0.8, (count, 3))).astype(int) + 1, 500)


def shapes_of(lengths, size, arrangement):
    return [shape_of(lengths[rows], arrangement) for rows in filled(lengths, arrangement, size)]


@pytest.mark.parametrize("count", [1, 2, 7, 9, 60, 257, 3000])
@pytest.mark.parametrize("arrangement, to", [(PACKED, 128), (PLAIN, 32), (PACKED, 1)])
def test_a_ladder_has_room_for_every_batch_in_few_shapes(count, arrangement, to, monkeypatch):
    monkeypatch.setattr(module, "multiple", lambda: to)
    shapes = shapes_of(real_lengths(4 * count), 4, arrangement)
    assert len(shapes) == count
    # In an order of their own: a ladder may not lean on theirs.
    shapes = [shapes[i] for i in np.random.default_rng(1).permutation(count)]
    found = ladder(shapes, 4)
    assert len(found) == count and len(set(found)) <= MOST_SHAPES
    assert all(type(number) is int for shape in found for number in shape)
    assert (np.array(found) >= np.array(shapes)).all()
    assert found == ladder(list(shapes), 4)
    if len(set(shapes)) <= MOST_SHAPES and count < 8:
        assert found == shapes
    one = ladder(shapes, 4, most=1)
    assert set(one) == {Shape(*np.max(shapes, axis=0).tolist())}
    if len(set(shapes)) > 1:
        assert padded(found, shapes) < padded(one, shapes)


def padded(found, shapes):
    """Positions of plain rows, or tokens of packed ones, that padding adds."""
    column = 0 if shapes[0].tokens else 1
    return sum(a[column] - b[column] for a, b in zip(found, shapes, strict=True))


@pytest.mark.parametrize("most", [1, 2, 3])
@pytest.mark.parametrize("arrangement", [PACKED, RECURRENT])
def test_a_ladder_is_nearly_the_best_split_of_the_sorted_shapes(most, arrangement, monkeypatch):
    """Against every split into so many groups, the work being tokens + scored / 4 + 2 B width^2 / 4096 - B begun / 4.

    What all of a group begin with is the least of them.
    """
    monkeypatch.setattr(module, "multiple", lambda: 16)
    # Prompts of all lengths, so that batches begin with more and less of them.
    lengths = np.random.default_rng(0).integers(1, [500, 100, 100], (40, 3))
    shapes = shapes_of(lengths, 4, arrangement)
    assert len(set(shapes)) == 10 and len({shape.begun for shape in shapes}) > 4 * (arrangement == RECURRENT)

    def work(shape):
        return shape[0] + shape[2] / 4 + 2 * 4 * shape[1] ** 2 / 4096 - 4 * shape[3] / 4

    ordered = sorted(shapes, key=work)
    splits = []
    for cuts in combinations(range(1, 10), most - 1):
        groups = [ordered[start:stop] for start, stop in pairwise((0, *cuts, 10))]
        served = [[*np.max(group, axis=0)[:3], min(shape.begun for shape in group)] for group in groups]
        splits.append(sum(len(group) * work(shape) for group, shape in zip(groups, served, strict=True)))
    assert sum(map(work, ladder(shapes, 4, most))) < 1.02 * min(splits)


def test_a_ladder_pads_real_lengths_little(monkeypatch):
    """Eight shapes for 750 batches; lengths spread over a factor of ten, of which one shape would fill a third."""
    monkeypatch.setattr(module, "multiple", lambda: 1)
    shapes = shapes_of(real_lengths(3000), 4, PACKED)
    tokens = np.array([shape.tokens for shape in shapes])
    found = np.array([shape.tokens for shape in ladder(shapes, 4)])
    assert tokens.sum() / (len(shapes) * tokens.max()) < 0.4
    assert tokens.sum() / found.sum() > 0.85


# Schedules


@pytest.mark.parametrize("rows, size", [(12, 4), (10, 4), (3, 4), (7, 1)])
def test_an_epoch_visits_every_row_once(rows, size):
    schedule = Schedule(some_pairs(rows), size, 0, PACKED)
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
        schedule = Schedule(pairs, 4, seed, PACKED, iters=20)
        return [schedule.rows(step).tolist() for step in range(1, 21)]

    first = order(seed=0)
    assert first == order(seed=0) != order(seed=1)
    batches = [{tuple(sorted(batch)) for batch in epoch} for epoch in (first[:10], first[10:])]
    assert len(batches[0] & batches[1]) < 5  # drawn anew
    # A later iteration is the same whichever was asked for before: what a resumed run does.
    schedule = Schedule(pairs, 4, 0, PACKED, iters=20)
    assert [schedule.rows(step).tolist() for step in (15, 3, 20)] == [first[14], first[2], first[19]]


@pytest.mark.parametrize("rows", [100, 101, 33])
def test_like_lengths_are_together_unless_batches_are_random(rows):
    by_length, most = np.arange(rows)[::-1], 0
    for bucket in (32, 200):
        batches = drawn(by_length, 4, bucket, np.random.default_rng(0))
        assert sorted(np.concatenate(batches).tolist()) == list(range(rows))
        assert sorted(len(batch) for batch in batches)[1:] == [4] * (len(batches) - 1)
        spans = [int(batch.max() - batch.min()) for batch in batches]
        assert max(spans) < bucket and np.mean(spans) > most
        assert all((np.diff(batch) < 0).all() for batch in batches)  # in the order of their lengths
        most = np.mean(spans)


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_workers_have_one_shape_at_a_step_where_shapes_are_compiled(arrangement, monkeypatch):
    monkeypatch.setattr(module, "multiple", lambda: 32)
    pairs = some_pairs(61, prompt=(20, 200), response=(5, 300))
    schedules = []
    for rank in range(2):
        world = SimpleNamespace(rank=lambda rank=rank: rank, size=lambda: 2)
        monkeypatch.setattr(module.mx.distributed, "init", lambda world=world: world)
        schedules.append(Schedule(pairs, 4, 0, arrangement))
    for iteration in range(1, 17):
        (one, *_), (other, *_) = (schedule.batch(iteration, None) for schedule in schedules)
        assert shapes_in(one) == shapes_in(other)
        assert one.counts.sum() + other.counts.sum() == len(schedules[0].rows(iteration))


def shapes_in(batch):
    return tuple(value.shape for _, value in tree_flatten(batch))


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("multiple", [32, 128])
def test_where_shapes_are_compiled_few_serve_a_run_and_the_last_batch_is_filled(arrangement, multiple, monkeypatch):
    monkeypatch.setattr(module, "multiple", lambda: multiple)
    pairs = some_pairs(81, prompt=(20, 200), response=(5, 300))
    schedule = Schedule(pairs, 4, 0, arrangement)
    logps = np.arange(81 * 4, dtype=np.float32).reshape(81, 2, 2)
    shapes, counts = set(), []
    for iteration in range(1, 22):
        batch, reference, (tokens, padding) = schedule.batch(iteration, logps)
        shapes.add(shapes_in(batch))
        counts.append(batch.counts.tolist())
        rows = schedule.rows(iteration)
        assert reference.shape == (4, 2, 2) and mx.array_equal(reference[: len(rows)], mx.array(logps[rows]))
        assert batch.ntoks.item() == sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in
                                         (pairs[row] for row in rows))  # fmt: skip
        assert tokens == batch.tokens.size == schedule.tokens(iteration) and tokens % multiple == 0
        shape, needed = schedule.shape(iteration), shape_of(lengths_of([pairs[row] for row in rows]), arrangement)
        assert all(have >= need and have % multiple == 0 for have, need in zip(shape[:3], needed, strict=False))
        assert shape.begun <= needed.begun and shape.begun % multiple == 0
    assert len(shapes) <= MOST_SHAPES
    assert sorted(counts) == [[1.0, 0.0, 0.0, 0.0]] + [[1.0] * 4] * 20


def test_where_tracing_goes_on_beside_a_step_more_shapes_leave_less_padding(monkeypatch):
    monkeypatch.setattr(module, "multiple", lambda: 32)
    pairs = [
        Pair([1] * prompt, [2] * chosen, [3] * rejected) for prompt, chosen, rejected in real_lengths(1200).tolist()
    ]

    def padded():
        """Tokens and scored positions of all batches, and how many shapes they have."""
        schedule = Schedule(pairs, 4, 0, PACKED)
        shapes = [schedule.shape(iteration) for iteration in range(1, 301)]
        assert all(shape.scored >= lengths_of([pairs[row] for row in schedule.rows(i + 1)])[:, 1:].sum()
                   for i, shape in enumerate(shapes))  # fmt: skip
        return np.sum([shape[:3] for shape in shapes], axis=0), len(set(shapes))

    (few, count), own = padded(), lengths_of(pairs)
    monkeypatch.setattr(module, "on_metal", lambda: True)
    many, larger_count = padded()
    assert count == MOST_SHAPES and larger_count == MOST_SHAPES_ON_METAL
    tokens, scored = own.sum(), own[:, 1:].sum()
    assert many[0] - tokens < (few[0] - tokens) / 2 and many[2] - scored < 0.7 * (few[2] - scored)


def test_where_nothing_is_compiled_every_batch_has_its_own_shape(monkeypatch):
    monkeypatch.setattr(module, "multiple", lambda: 1)
    pairs = some_pairs(30, prompt=(20, 200), response=(5, 300))
    schedule = Schedule(pairs, 4, 0, PACKED)
    made = [schedule.batch(iteration, None) for iteration in range(1, 9)]
    assert all(padding == 0 for *_, (_, padding) in made)
    assert sorted(len(batch.counts) for batch, *_ in made) == [2] + [4] * 7
    assert not any(reference.any() for _, reference, _ in made)
    assert [batch.tokens.size for batch, *_ in made] == [schedule.tokens(iteration) for iteration in range(1, 9)]


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
@pytest.mark.parametrize("multiple", [1, 8, 128])
def test_padding_changes_no_number(arrangement, multiple, monkeypatch):
    model = tiny_llama(moved=True)
    pairs = some_pairs(5, response=(1, 40))
    scorer = Scorer(model, arrangement != PLAIN)
    monkeypatch.setattr(module, "multiple", lambda: multiple)
    batch, processed, padding = make_batch(pairs, arrangement)
    assert np.allclose(np.array(scorer(batch).total), one_at_a_time(model, pairs), atol=1e-4)
    lengths = lengths_of(pairs)
    prompts = sum(lengths[:, 0])
    own = (2 * prompts if arrangement == PLAIN else prompts) + lengths[:, 1:].sum() - 2 * len(pairs)
    assert processed == batch.tokens.size and processed - padding == own
    assert batch.ntoks.item() == 2 * prompts + lengths[:, 1:].sum()
    # Larger than it has to be, too.
    shape = shape_of(lengths, arrangement)
    larger = Shape(shape.tokens and shape.tokens + 300, shape.width + 20, shape.scored + 50)
    assert np.allclose(
        np.array(scorer(make_batch(pairs, arrangement, larger)[0]).total), np.array(scorer(batch).total), atol=1e-4
    )


@pytest.mark.parametrize("multiple", [1, 8])
def test_a_packed_batch_holds_each_token_once(multiple, monkeypatch):
    monkeypatch.setattr(module, "multiple", lambda: multiple)
    pairs = some_pairs(5, response=(1, 40))
    batch, processed, padding = make_batch(pairs, PACKED)
    tokens, places = np.array(batch.tokens)[:, 0], np.array(batch.layout.places)
    wanted = [pair.prompt for pair in pairs] + [pair.chosen[:-1] for pair in pairs]
    wanted += [pair.rejected[:-1] for pair in pairs]
    assert tokens.tolist() == [token for part in wanted for token in part] + [0] * padding
    rows = [(pair.prompt + response)[:-1] for side in ("chosen", "rejected") for pair in pairs
            for response in [getattr(pair, side)]]  # fmt: skip
    keys = [row for part in batch.layout.attended.keys for row in np.array(part)]
    found = [tokens[row[: len(own)]].tolist() for row, own in zip(keys, rows, strict=True)]
    assert found == rows and [places[row[: len(own)]].tolist() for row, own in zip(keys, rows, strict=True)] == [
        list(range(len(own))) for own in rows
    ]


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_a_response_token_is_scored_where_it_is_predicted(arrangement):
    pairs = some_pairs(5, response=(1, 40))
    batch, *_ = make_batch(pairs, arrangement)
    tokens = np.array(batch.tokens).ravel()
    scored = list(zip(tokens[np.array(batch.positions)].tolist(), batch.targets.tolist(),
                      batch.sequences.tolist(), batch.common.tolist(), strict=True))  # fmt: skip
    expected = []
    for i, (pair, response, other) in enumerate(
        [(p, p.chosen, p.rejected) for p in pairs] + [(p, p.rejected, p.chosen) for p in pairs]
    ):
        before = [pair.prompt[-1], *response[:-1]]
        expected += [(a, b, i, n < len(other)) for n, (a, b) in enumerate(zip(before, response, strict=True))]
    assert scored[: len(expected)] == expected
    assert all(sequence == 10 and not common for *_, sequence, common in scored[len(expected) :])


def test_common_logps_stop_where_the_shorter_response_ends():
    model = tiny_llama(moved=True)
    pair = some_pairs(1, response=(6, 7))[0]._replace(rejected=[5, 6])
    scores = Scorer(model)(make_batch([pair], PACKED)[0])
    cut = one_at_a_time(model, [pair._replace(chosen=pair.chosen[:2])])
    assert np.allclose(np.array(scores.common), cut, atol=1e-4)
    assert scores.common[1].item() == scores.total[1].item()


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_fillers_count_for_nothing(arrangement):
    model = tiny_llama(moved=True)
    pairs = some_pairs(3)
    reference = mx.random.normal((3, 2, 2), key=mx.random.key(1))
    for loss_type in ("dpo", "aot", ["dpo", "sft"]):
        objective = Objective(Scorer(model), preference_loss(loss_type))
        exact = objective(make_batch(pairs, arrangement)[0], reference)[1]
        fuller = make_batch([*pairs, pairs[0], pairs[0]], arrangement, counted=len(pairs))[0]
        assert fuller.counts.tolist() == [1, 1, 1, 0, 0]
        padded = mx.concatenate([reference, mx.full((2, 2, 2), 1e3)])
        assert np.allclose(np.array(objective(fuller, padded)[1]), np.array(exact), rtol=1e-5), loss_type
        assert exact[len(FIGURES)].item() == 3
        assert fuller.ntoks.item() == lengths_of(pairs).sum() + lengths_of(pairs)[:, 0].sum()


@pytest.mark.parametrize("rows, size", [(9, 4), (9, 9), (9, 16), (9, 1)])
def test_evaluation_scores_each_pair_once(rows, size):
    """Means over pairs do not depend on the batch size, as they would if a batch's mean were averaged."""
    model, pairs = tiny_llama(moved=True), some_pairs(rows, response=(1, 30))
    objective = Objective(Scorer(model), preference_loss("dpo", beta=1.0))
    logps = np.random.default_rng(0).normal(size=(rows, 2, 2)).astype(np.float32) - 30
    progress = []
    figures = means_of(pair_figures(objective, pairs, np.arange(rows), logps, size, progress.append))
    chosen, rejected = np.split(one_at_a_time(model, pairs), 2) - logps[:, :, 0].T
    assert figures["loss"] == pytest.approx(np.logaddexp(0, rejected - chosen).mean(), abs=1e-4)
    assert figures["rewards/chosen"] == pytest.approx(chosen.mean(), abs=1e-4)
    assert figures["rewards/accuracies"] == pytest.approx((chosen > rejected).mean())
    assert sum(progress) == rows


def test_a_pair_of_the_shortest_kind_is_scored():
    model = tiny_llama(moved=True)
    pair = Pair([3], [4], [5])
    scores = Scorer(model)(make_batch([pair], PACKED)[0])
    assert np.allclose(np.array(scores.total), one_at_a_time(model, [pair]), atol=1e-5)


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_tokens_that_the_model_does_not_write_are_run_but_not_scored(arrangement):
    """Of a response of six tokens the third and fourth are another's: the sum is of the other four."""
    model = tiny_llama(moved=True)
    pair = Pair([3, 4, 5], [6, 7, 8, 9, 10, 11], [12, 13], unscored=(((2, 4),), ()))
    batch, *_ = make_batch([pair], arrangement)
    sequence = pair.prompt + pair.chosen
    logits = model(mx.array([sequence[:-1]]))[0]
    logps = (logits - mx.logsumexp(logits, axis=-1, keepdims=True))[
        mx.arange(len(sequence) - 1), mx.array(sequence[1:])
    ]
    expected = sum(logps[2 + i].item() for i in (0, 1, 4, 5))
    scores = Scorer(model, arrangement != PLAIN)(batch)
    assert scores.total[0].item() == pytest.approx(expected, abs=1e-4)
    assert scores.common[0].item() == pytest.approx(logps[2].item() + logps[3].item(), abs=1e-4)
    assert batch.lengths.tolist() == [4, 2]


# From numpy to MLX


def test_arrays_come_at_once_as_they_are():
    draw = np.random.default_rng(0)
    tree = {
        "ints": draw.integers(-9, 9, (3, 5)).astype(np.int32),
        "parts": (draw.normal(size=7).astype(np.float32), draw.random(9) > 0.5),
        "none": np.zeros((0, 2), np.float32),
        "one": np.array(3, np.int32),
        "turned": draw.normal(size=(2, 3)).astype(np.float32).T,
    }
    found = at_once(tree)
    for (name, values), (_, expected) in zip(tree_flatten(found), tree_flatten(tree), strict=True):
        assert np.array(values).dtype == expected.dtype and values.shape == expected.shape, name
        assert (np.array(values) == expected).all(), name
    assert isinstance(found["parts"], tuple)

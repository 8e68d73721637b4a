"""Many copies in one kernel, run on the CPU, against MLX's own."""

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from tiny import some_pairs, tiny_llama

from mlx_lm.tuner.preference import attention, cuda_copies, flat
from mlx_lm.tuner.preference.attention import Places, collected, spread
from mlx_lm.tuner.preference.batches import PACKED, make_batch
from mlx_lm.tuner.preference.cuda_copies import fit, joined, rows_of
from mlx_lm.tuner.preference.logps import Scorer
from mlx_lm.tuner.preference.objective import Objective, preference_loss
from mlx_lm.tuner.preference.step import Step

pytestmark = pytest.mark.usefixtures("cuda_kernels")


def normal(*shape, seed=0):
    return mx.random.normal(shape, key=mx.random.key(seed))


def test_rows_are_sums_of_those_that_are_named():
    arrays = [normal(7, 2, 1, 4), normal(7, 6, seed=1), normal(9, 2, seed=2)]
    indices = [[[1, 0, -1, 6]], [[1, 2, 3], [-1, 5, 3]], [[0, 8, -1], [-1, 8, -1], [3, 1, -1]]]
    parts = [mx.split(x, [2, 5]) for x in arrays]
    for x, index, found in zip(arrays, indices, rows_of(parts, [mx.array(index) for index in indices]), strict=True):
        named = [[i for i in column if i >= 0] for column in zip(*index, strict=True)]
        expected = [sum((x[i] for i in rows), mx.zeros(x.shape[1:])) for rows in named]
        assert mx.allclose(found, mx.stack(expected), rtol=1e-6)


def test_rows_fit_in_whole_words():
    assert fit([normal(3, 2), normal(3, 4).astype(mx.bfloat16)])
    assert not fit([normal(3, 3)]) and not fit([normal(3, 2), normal(3, 2).astype(mx.bfloat16)])


def test_tokens_are_spread_over_parts_and_collected_with_their_gradients(cuda_kernels, monkeypatch):
    arrays = [normal(5, 2, 4), normal(5, 1, 6, seed=1)]
    twice = Places([mx.array([[1, 0]]), mx.array([[2, 3], [4, 1]])], mx.array([[1, 0, 2, 3, 4], [-1, 5, -1, -1, -1]]))
    once = Places([mx.array([[4, -1]]), mx.array([[0, -1], [-1, 2]])], mx.array([[2, -1, 5, -1, 0]]), holes=True)
    weights = [normal(6, 2, 4, seed=2), normal(6, 1, 6, seed=3), normal(5, 2, 4, seed=4)]

    def total(*arrays):
        parts = spread(arrays, [twice, once])
        back = collected([part * part for part in parts[0]], once)
        flat = [mx.concatenate([part.flatten(0, 1) for part in own]) for own in parts]
        return sum((x * weight).sum() for x, weight in zip([*flat, back], weights, strict=True))

    expected = mx.value_and_grad(total, [0, 1])(*arrays)
    monkeypatch.setattr(attention, "on_cuda", lambda: True)
    value, slopes = mx.value_and_grad(total, [0, 1])(*arrays)
    assert sorted(cuda_kernels) == ["rows_of_1_in_2", "rows_of_2_in_1", "rows_of_2_in_2", "rows_of_4_in_1"]
    assert mx.allclose(value, expected[0]) and all(map(mx.allclose, slopes, expected[1]))


@pytest.mark.parametrize("most", [480, 3])
def test_joined_arrays_begin_at_multiples_with_zeros_between(most, monkeypatch):
    monkeypatch.setattr(cuda_copies, "MOST_ARRAYS", most)
    arrays = [normal(*shape) for shape in ((3, 5), (128,), (1,), (200, 2))]
    assert mx.array_equal(joined(arrays, flat.ALIGNED), flat._side_by_side(arrays))


def test_a_steps_gradient_is_the_same(cuda_kernels, monkeypatch):
    def gradient():
        model = tiny_llama(moved=True)
        step = Step(model, None, Objective(Scorer(model), preference_loss("dpo")), compiled=False)
        return step.gradient(make_batch(some_pairs(3), PACKED)[0], mx.zeros((3, 2, 2)))[1]

    expected = gradient()
    monkeypatch.setattr(attention, "on_cuda", lambda: True)
    monkeypatch.setattr(flat, "on_cuda", lambda: True)
    found = gradient()
    assert sum(name.startswith("joined") for name in cuda_kernels) == 2  # lora_a's and lora_b's
    assert {"rows_of_6_in_1", "rows_of_1_in_2"} <= set(cuda_kernels)
    for (place, a), (_, b) in zip(tree_flatten(found), tree_flatten(expected), strict=True):
        assert mx.abs(b).max() > 1e-3 and mx.allclose(a, b, atol=1e-6), place

"""Attention by an array of scores, its kernels run on the CPU, against MLX's."""

from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from plain_pass import make_pairs

from mlx_lm.models.base import create_causal_mask
from mlx_lm.tuner.preference import attention as attention_module
from mlx_lm.tuner.preference.attention import Layout, PackedCache, Window
from mlx_lm.tuner.preference.batches import PACKED, make_batch
from mlx_lm.tuner.preference.cuda_scores import scored_attention

pytestmark = pytest.mark.usefixtures("cuda_kernels")

NEAR = {mx.float32: 1e-5, mx.bfloat16: 1.5e-2, mx.float16: 2e-3}


def arrays_of(dtype, queries=37, keys=37, heads=(4, 2), width=16):
    draw = np.random.default_rng(0).normal
    shapes = [(2, heads[0], queries, width), *[(2, heads[1], keys, width)] * 2]
    arrays = [mx.array(draw(size=shape), mx.float32).astype(dtype) for shape in shapes]
    return arrays, mx.array(draw(size=shapes[0]), mx.float32).astype(dtype)


def taken(function, arrays, slope):
    return [x for part in mx.vjp(function, arrays, [slope]) for x in part]


def assert_is_attention(function, arrays, slope, mask, dtype):
    plain = partial(mx.fast.scaled_dot_product_attention, scale=0.3, mask=mask)
    expected = taken(plain, [x.astype(mx.float32) for x in arrays], slope.astype(mx.float32))
    for found, other in zip(taken(function, arrays, slope), expected, strict=True):
        assert found.dtype == dtype and found.shape == other.shape
        found, other = (np.array(x.astype(mx.float32)) for x in (found, other))
        assert np.linalg.norm(found - other) <= NEAR[dtype] * np.linalg.norm(other)


@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("lengths", [(37, 37), (24, 64), (1, 5)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("keeps", [True, False])
def test_values_and_gradients_are_those_of_attention(keeps, causal, lengths, dtype, cuda_kernels):
    arrays, slope = arrays_of(dtype, *lengths)
    function = partial(scored_attention, scale=0.3, causal=causal, keeps=keeps)
    assert_is_attention(function, arrays, slope, "causal" if causal else None, dtype)
    assert cuda_kernels == ["scores_weights"] * (2 - keeps) + ["scores_slopes"]


@pytest.mark.parametrize("window", [1, 9, 100])
def test_a_window_sees_so_many_keys(window):
    arrays, slope = arrays_of(mx.float32, 24, 64)
    function = partial(scored_attention, scale=0.3, causal=True, window=window)
    assert_is_attention(function, arrays, slope, create_causal_mask(24, 40, window_size=window), mx.float32)


@pytest.mark.parametrize("window", [None, 9])
def test_blocks_of_queries_are_the_whole(window, cuda_kernels):
    arrays, slope = arrays_of(mx.float32, 70, 96)
    function = partial(scored_attention, scale=0.3, causal=True, window=window, most_scores=2 * 4 * 96 * 32)
    mask = "causal" if window is None else create_causal_mask(70, 26, window_size=window)
    assert_is_attention(function, arrays, slope, mask, mx.float32)
    assert len(cuda_kernels) == 9


def test_scores_too_large_for_float16_are_those_of_scaled_queries():
    arrays, slope = arrays_of(mx.float16)
    arrays[0], arrays[1] = 200 * arrays[0], 200 * arrays[1]
    found = taken(partial(scored_attention, scale=1e-4, causal=True), arrays, slope)
    assert all(mx.isfinite(x).all().item() for x in found)


@pytest.mark.parametrize("mask", ["causal", Window(12)], ids=str)
@pytest.mark.parametrize("on", ["rows that are whole words", "others"])
def test_a_packed_batch_is_the_same_with_heads_apart(on, mask, cuda_kernels, monkeypatch):
    batch, count, _ = make_batch(make_pairs([(30, 9, 20), (12, 8, 5)]), PACKED)
    layout = Layout(*batch.layout)
    draw, width = np.random.default_rng(0).normal, 8 if on != "others" else 5
    arrays = [mx.array(draw(size=(count, heads, 1, width)), mx.float32) for heads in (4, 2, 2)]
    own = (layout.attended.outputs >= 0)[:, None, None, None]
    slope = mx.where(own, mx.array(draw(size=(count, 4, 1, width)), mx.float32), 0)

    def attended():
        cache = PackedCache(layout)
        return taken(lambda *arrays: cache.attend(*arrays, 0.3, mask, None), arrays, slope)

    expected = attended()
    monkeypatch.setattr(attention_module, "on_cuda", lambda: True)
    found = attended()
    assert "scores_weights" in cuda_kernels and any(name.startswith("rows_of") for name in cuda_kernels) == (width == 8)
    for a, b in zip(found, expected, strict=True):
        assert mx.allclose(mx.where(own, a, 0), mx.where(own, b, 0), 1e-4, 1e-5)

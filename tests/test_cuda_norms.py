"""Norms of a gated delta layer's heads by kernels, run on the CPU, against MLX's."""

import mlx.core as mx
import pytest
from mlx_lm.models.gated_delta import normalize_qk
from mlx_lm.models.qwen3_next import Qwen3NextRMSNormGated

from mlx_lm.tuner.preference import cuda_norms, pieces
from mlx_lm.tuner.preference.pieces import RECURRENCES

pytestmark = pytest.mark.usefixtures("cuda_kernels")

NEAR = {mx.float32: 1e-6, mx.bfloat16: 6e-3}
NORMALIZE, GATED = ("gated_delta", None, "normalize_qk"), ("qwen3_next", "Qwen3NextRMSNormGated", "__call__")


def assert_alike(function, reference, inputs, dtype):
    def taken(function):
        def total(*inputs):
            outputs = function(*inputs)
            return sum(
                (x.astype(mx.float32) * mx.cos(mx.arange(x.size)).reshape(x.shape)).sum() for x in outputs
            ), outputs

        (_, outputs), slopes = mx.value_and_grad(total, argnums=(0, 1))(*inputs)
        return [*outputs, *slopes]

    for found, expected in zip(taken(function), taken(reference), strict=True):
        assert found.shape == expected.shape and found.dtype == expected.dtype
        found, expected = (x.astype(mx.float32).flatten() for x in (found, expected))
        assert mx.linalg.norm(found - expected).item() <= NEAR[dtype] * mx.linalg.norm(expected).item()


@pytest.fixture
def on_cuda(monkeypatch):
    monkeypatch.setattr(pieces, "on_cuda", lambda: True)


@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("shape", [(13, 1, 3, 32), (2, 5, 2, 96)], ids=str)
def test_queries_and_keys_are_normed_as_upstreams(shape, dtype, on_cuda, cuda_kernels):
    inputs = [mx.random.normal(shape).astype(dtype) for _ in range(2)]
    options = {"inv_scale": shape[-1] ** -0.5, "eps": 1e-6}
    replaced = RECURRENCES[NORMALIZE](normalize_qk, None)
    assert_alike(lambda *x: replaced(*x, **options), lambda *x: normalize_qk(*x, **options), inputs, dtype)
    assert cuda_kernels == ["normed", "normed_vjp"]


@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("shape", [(13, 1, 3, 32), (2, 5, 2, 96)], ids=str)
def test_what_is_normed_is_gated_as_upstreams(shape, dtype, on_cuda, cuda_kernels):
    inputs = [mx.random.normal(shape).astype(dtype) for _ in range(2)]
    module = Qwen3NextRMSNormGated(shape[-1])
    module.weight = (1 + 0.3 * mx.random.normal(module.weight.shape)).astype(dtype)
    module.freeze()
    replaced = RECURRENCES[GATED](Qwen3NextRMSNormGated.__call__, None)
    assert_alike(lambda *x: [replaced(module, *x)], lambda *x: [module(*x)], inputs, dtype)
    assert cuda_kernels == ["gated_norm", "gated_norm_vjp"]


def test_others_are_upstreams(on_cuda, cuda_kernels):
    replaced = RECURRENCES[GATED](Qwen3NextRMSNormGated.__call__, None)
    module, x = Qwen3NextRMSNormGated(32), mx.random.normal((2, 1, 2, 32))
    assert mx.array_equal(replaced(module, x, x), module(x, x))  # its weight has a gradient
    module.freeze()
    assert mx.array_equal(replaced(module, x), module(x))
    assert not cuda_norms.fits(x, x[..., :24]) and not cuda_norms.fits(x[..., :24])
    assert cuda_kernels == []

"""Convolutions of a packed batch where its tokens stand, run on the CPU, against those of rows of sequences."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from plain_pass import make_pairs

from mlx_lm.tuner.preference import batches, cuda_convolution, layers
from mlx_lm.tuner.preference.attention import Parts
from mlx_lm.tuner.preference.batches import RECURRENT, make_batch
from mlx_lm.tuner.preference.layers import DepthwiseConv1d, _in_rows, lean_layers

pytestmark = pytest.mark.usefixtures("cuda_kernels")

# Tokens of prompts and responses: prompts alike, one much shorter, and one that all of is computed once a response.
LENGTHS = {
    "alike": [(70, 33, 20), (70, 12, 33)],
    "shorter": [(90, 5, 40), (41, 30, 3), (60, 2, 2)],
    "short": [(9, 20, 30), (40, 8, 2)],
}


@pytest.fixture
def parts_of(monkeypatch):
    """The recurrent parts of a batch of pairs of such lengths, filled up as for a GPU."""
    monkeypatch.setattr(batches, "multiple", lambda: 32)

    def parts(lengths):
        batch, _, padding = make_batch(make_pairs(lengths), RECURRENT)
        assert padding
        return Parts(*batch.layout.recurrent)

    return parts


def convolution(dtype, bias, channels=16, taps=4):
    module = DepthwiseConv1d(channels, channels, taps, groups=channels, bias=bias)
    module.weight = mx.random.normal((channels, taps, 1)).astype(dtype)
    if bias:
        module.bias = mx.random.normal((channels,)).astype(dtype)
    module.freeze()
    return module


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("taps, bias", [(2, False), (4, False), (4, True)])
@pytest.mark.parametrize("name", LENGTHS)
def test_values_and_gradients_are_those_of_rows(name, taps, bias, dtype, parts_of):
    parts, module = parts_of(LENGTHS[name]), convolution(dtype, bias, taps=taps)
    own = parts.outputs >= 0  # and no padding
    x = mx.random.normal((len(own), 1, 16)).astype(dtype)
    weigh = mx.where(own, mx.cos(mx.arange(len(own))), 0)[:, None, None]

    def taken(function):
        def total(x):
            out = function(module, x)
            return (out.astype(mx.float32) * weigh).sum(), mx.where(own[:, None, None], out, 0)

        (_, out), slope = mx.value_and_grad(total)(x)
        return out, slope

    expected = taken(_in_rows(DepthwiseConv1d.__call__, parts))
    before, after = cuda_convolution.neighbours(parts, taps - 1)
    found = taken(
        lambda module, x: cuda_convolution.convolved(x[:, 0], module.weight, before, after, module.get("bias"))[:, None]
    )
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        assert np.allclose(
            *(np.array(z.astype(mx.float32)) for z in (a, b)), *([2e-2] * 2 if dtype != mx.float32 else [1e-6] * 2)
        )


def test_in_a_batch_that_shares_nothing_each_token_has_one_after_it(parts_of):
    parts = parts_of(LENGTHS["short"])
    assert not parts.begun()
    before, after = cuda_convolution.neighbours(parts, 1)
    assert before.shape == (1, len(parts.outputs)) and after.shape == (4, len(parts.outputs))
    first, second = (np.array(parts.keys[0][row])[:20] for row in (0, 2))
    # A prompt of 9 tokens, which both its sequences have.
    assert (first[:9] == second[:9]).all() and (first[9:] != second[9:]).all()
    assert np.array(before)[0, first[1:]].tolist() == first[:-1].tolist() and before[0, first[0]].item() == -1
    behind = sorted(x for x in np.array(after)[:, first[8]].tolist() if x >= 0)
    assert behind == sorted({first[9].item(), second[9].item()})
    assert sorted(np.array(after)[:, first[3]].tolist()) == [-1, -1, -1, first[4].item()]


@pytest.mark.parametrize(
    "changes, runs", [({}, True), ({"bias": True}, True), ({"frozen": False}, False), ({"channels": 6}, False)]
)
def test_a_module_that_does_not_fit_is_computed_in_rows(changes, runs, parts_of, cuda_kernels, monkeypatch):
    channels = changes.get("channels", 16)
    module = nn.Conv1d(channels, channels, 4, groups=channels, bias=changes.get("bias", False))
    if changes.get("frozen", True):
        module.freeze()
    parts = parts_of(LENGTHS["alike"])
    x = mx.random.normal((len(parts.outputs), 1, channels))
    monkeypatch.setattr(layers, "on_cuda", lambda: True)
    with lean_layers([module], parts):
        mx.eval(module(x))
    assert cuda_kernels == (["convolved"] if runs else [])

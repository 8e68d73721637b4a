"""LoRA+ and rank-stabilized LoRA."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx_lm.tuner.lora import LoRALinear

from mlx_lm.tuner.preference.adapters import lora_plus, rslora_scale


def trained(optimizer):
    """How far one step moves each matrix of an adapter whose gradients are all ones."""
    mx.random.seed(0)
    model = nn.Sequential(LoRALinear.from_base(nn.Linear(8, 6), r=4))
    model.freeze()
    model.layers[0].unfreeze(keys=["lora_a", "lora_b"], recurse=False)
    before = {name: mx.array(model.layers[0][name]) for name in ("lora_a", "lora_b")}
    optimizer.update(model, {"layers": [{name: mx.ones_like(value) for name, value in before.items()}]})
    return {name: (model.layers[0][name] - value).mean().item() for name, value in before.items()}


# MLX's Adam corrects no bias unless asked: its first step is 0.1 / sqrt(0.001) learning rates.
@pytest.mark.parametrize(("make", "first"), [(optim.SGD, 1.0), (optim.Adam, 0.1 / 0.001**0.5)])
def test_the_second_matrix_learns_faster(make, first):
    moved = trained(lora_plus(make, 1e-3, 16.0))
    assert moved["lora_a"] == pytest.approx(-1e-3 * first, rel=1e-3)
    assert moved["lora_b"] == pytest.approx(-16e-3 * first, rel=1e-3)


def test_a_schedule_is_followed_by_both():
    moved = trained(lora_plus(optim.SGD, optim.step_decay(1e-2, 0.5, 1), 4.0))
    assert moved["lora_b"] == pytest.approx(4 * moved["lora_a"], rel=1e-3)


def test_a_ratio_that_is_not_above_zero_is_refused():
    with pytest.raises(ValueError, match="lora_plus_ratio is 0"):
        lora_plus(optim.SGD, 1e-3, 0)


def test_rank_stabilized_scale_keeps_alpha_over_the_root_of_the_rank():
    alpha = 32.0
    for rank in (1, 4, 64):
        assert rslora_scale(alpha / rank, rank) == pytest.approx(alpha / rank**0.5)

"""Rank-stabilized LoRA, LoRA+, and a reference whose adapters move towards the policy's."""

import json

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from architectures import make_model
from mlx.utils import tree_map
from mlx_lm.tuner.lora import LoRALinear
from tiny import largest_difference, short_run, some_pairs, tiny_llama, trained

import mlx_lm.lora
from mlx_lm.tuner.preference.batches import PLAIN, Schedule, make_batch
from mlx_lm.tuner.preference.check import check_config
from mlx_lm.tuner.preference.flat import lora_plus
from mlx_lm.tuner.preference.load import add_adapters, load_adapter
from mlx_lm.tuner.preference.logps import Scorer
from mlx_lm.tuner.preference.objective import Objective, preference_loss
from mlx_lm.tuner.preference.options import ConfigError
from mlx_lm.tuner.preference.reference import Reference
from mlx_lm.tuner.preference.step import Step

# LoRA+


def moved(optimizer):
    """How far two steps move each matrix of an adapter whose gradients are all ones."""
    mx.random.seed(0)
    model = nn.Sequential(LoRALinear.from_base(nn.Linear(8, 6), r=4))
    model.freeze()
    model.layers[0].unfreeze(keys=["lora_a", "lora_b"], recurse=False)
    before = {name: mx.array(model.layers[0][name]) for name in ("lora_a", "lora_b")}
    for _ in range(2):
        optimizer.update(model, {"layers": [{name: mx.ones_like(value) for name, value in before.items()}]})
    return {name: (model.layers[0][name] - value).mean().item() for name, value in before.items()}


SCHEDULE = optim.step_decay(1e-2, 0.5, 1)


@pytest.mark.parametrize("make", [lambda rate: optim.SGD(rate, momentum=0.9), optim.Adam])
@pytest.mark.parametrize("rate", [1e-3, SCHEDULE])
def test_the_second_matrix_learns_faster(make, rate):
    faster = rate * 16 if isinstance(rate, float) else lambda step: 16 * SCHEDULE(step)
    optimizer = lora_plus(make(rate), 16.0)
    found = moved(optimizer)
    assert found["lora_a"] == pytest.approx(moved(make(rate))["lora_a"], rel=1e-3)
    assert found["lora_b"] == pytest.approx(moved(make(faster))["lora_b"], rel=1e-3)
    assert found["lora_b"] == pytest.approx(16 * found["lora_a"], rel=1e-3)
    assert optimizer.learning_rate.item() == pytest.approx(1e-3 if rate == 1e-3 else 5e-3)


def test_a_run_follows_the_ratio(tmp_path):
    """Adam's first step is its learning rate, whatever the gradient: lora_b's is four times as long."""
    pairs, moves = some_pairs(4), []
    for ratio in (None, 4.0):
        model = tiny_llama(moved=True)
        before = trained(model)
        optimizer = optim.Adam(1e-4, bias_correction=True, eps=1e-12)
        lines, _ = short_run(model, pairs, tmp_path, optimizer, iters=1, lora_plus_ratio=ratio)
        assert lines[0]["learning_rate"] == pytest.approx(1e-4)
        moves.append({name: np.abs(value - before[name]).max() for name, value in trained(model).items()})
    for name, move in moves[1].items():
        assert move == pytest.approx(moves[0][name] * (4 if name.endswith("lora_b") else 1), rel=0.02), name


# Rank-stabilized LoRA


def config(**changes):
    given = {"model": "mlx_lm/examples/tiny_chat_model", "data": "mlx_lm/examples/preferences", "train": True}
    return type("Config", (), {**mlx_lm.lora.CONFIG_DEFAULTS, **given, "loss_type": "dpo", **changes})()


def test_the_scale_of_alpha_over_the_root_of_the_rank_is_trained_and_saved(tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_lm.tuner.preference.outcome.plot_metrics", lambda *_: None)
    lora = {"rank": 16, "scale": 2.0, "dropout": 0.0}
    parts = {
        "adapter_path": str(tmp_path),
        "iters": 1,
        "steps_per_eval": 10,
        "reference_cache": "none",
        "num_layers": 1,
    }
    args = config(lora_parameters=lora, use_rslora=True, **parts)
    loss = check_config(args)
    from mlx_lm.utils import load

    model, tokenizer = load(args.model)
    train, valid, _ = mlx_lm.lora.load_dataset(args, tokenizer)
    mlx_lm.lora.train_model(args, model, train, valid, loss=loss)
    scales = {module.scale for module in model.modules() if isinstance(module, LoRALinear)}
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert scales == {8.0} and saved["lora_parameters"]["scale"] == 8.0 and saved["use_rslora"] is False
    assert lora["scale"] == 2.0


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"fine_tune_type": "full", "use_rslora": True}, "use_rslora and lora_plus_ratio are LoRA's"),
        ({"fine_tune_type": "full", "lora_plus_ratio": 2.0}, "use_rslora and lora_plus_ratio are LoRA's"),
        ({"lora_plus_ratio": 0.0}, "lora_plus_ratio is 0.0; it must be a finite number, > 0"),
        ({"reference_mixup_alpha": 0.5}, "reference_update_steps is not, and the reference stays"),
        (
            {"reference_mixup_alpha": 0.5, "reference_update_steps": 1, "reference_model": "other"},
            "reference_mixup_alpha mixes the policy with what it began as",
        ),
        ({"reference_mixup_alpha": 0.0, "reference_update_steps": 1}, "reference_mixup_alpha is 0.0"),
    ],
)
def test_what_does_not_fit_is_refused(changes, told):
    with pytest.raises(ConfigError, match=told):
        check_config(config(**changes))


def test_dora_on_experts_is_refused_in_one_sentence():
    with pytest.raises(ConfigError, match=r"given DoRA adapters .*: SwitchLinear doesn't support DoRA yet; name"):
        add_adapters(None, make_model("mixtral"), 2, {"rank": 4, "scale": 20.0, "dropout": 0.0}, use_dora=True)


# A moving reference


@pytest.mark.parametrize("every", [1, 3])
def test_a_run_is_that_with_a_second_model_in_memory(tmp_path, every):
    """A reference model of its own, its adapters mixed after every few updates, scored within each step."""
    pairs, valid, share, beta = some_pairs(8), some_pairs(3, seed=1), 0.4, 0.5
    options = {"reference_update_steps": every, "reference_mixup_alpha": share, "beta": beta, "iters": 8}
    model, policy, reference = (tiny_llama(moved=True) for _ in range(3))
    lines, validations = short_run(
        model, pairs, tmp_path, optim.SGD(0.02), valid, share_prompt=False, steps_per_eval=4, **options
    )
    objective = Objective(Scorer(policy, share_prompt=False), preference_loss("dpo", beta=beta))
    step, schedule = Step(policy, optim.SGD(0.02), objective, False), Schedule(pairs, 4, 0, PLAIN, 8)
    for i in range(1, 9):
        rows = schedule.rows(i)
        logps = Reference(Scorer(reference, share_prompt=False)).logps(pairs, rows)
        sums, _ = step(make_batch([pairs[row] for row in rows], PLAIN)[0], mx.array(logps), True)
        assert lines[i - 1]["loss"] == pytest.approx(sums[0].item() / len(rows), abs=1e-5), i
        step.flat.write()
        if i % every == 0:
            old, new = reference.trainable_parameters(), policy.trainable_parameters()
            reference.update(tree_map(lambda a, b: (1 - share) * a + share * b, old, new))
    assert largest_difference(trained(model), trained(policy)) < 1e-5
    # It neither jumped nor stayed.
    hard, _ = short_run(
        tiny_llama(moved=True), pairs, tmp_path / "hard", optim.SGD(0.02), share_prompt=False,
        **options | {"reference_mixup_alpha": None},
    )  # fmt: skip
    still, _ = short_run(
        tiny_llama(moved=True), pairs, tmp_path / "still", optim.SGD(0.02), share_prompt=False, beta=beta, iters=8
    )
    assert min(abs(lines[-1]["loss"] - other[-1]["loss"]) for other in (hard, still)) > 1e-2
    assert validations[1]["eval_rewards/margins"] != validations[0]["eval_rewards/margins"]


def test_a_configuration_that_does_not_fit_the_model_is_told():
    config = {"num_layers": 1, "lora_parameters": {"rank": 2, "scale": 1.0, "dropout": 0.0, "keys": ["mlp.fc1"]}}
    with pytest.raises(ConfigError, match="adapter_path is 'a', and by its adapter_config.json .*keys has mlp.fc1"):
        load_adapter("adapter_path", tiny_llama(lora=False), config, "a")

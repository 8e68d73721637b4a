"""The two functions of mlx_lm.utils, against numbers worked out by hand and against TRL; and the command."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import load_adapters
from plain_pass import padded_rows

import mlx_lm
from mlx_lm.tuner.datasets import Pair
from mlx_lm.tuner.preference import VERSION
from mlx_lm.utils import dpo_loss, get_batched_logps, load_model, token_logps

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
TRL = json.loads((GOLDEN / "trl.json").read_text())


class Table(nn.Module):
    """A model whose logits depend on the input token alone: row `t` of `table`, `(V, V)`."""

    def __init__(self, table):
        super().__init__()
        self.table = mx.array(table, mx.float32)

    def __call__(self, inputs):
        return self.table[inputs]


# With logits log(p) a token's log-probability is log(p) of the table: every number below is a product of these.
THIRDS = np.log([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125], [0.2, 0.3, 0.5]])


def test_token_logps_are_log_softmax_in_float32():
    logits = mx.array([[0.0, math.log(3.0)], [1000.0, 0.0]])
    got = token_logps(logits, mx.array([1, 1]))
    assert got.dtype == mx.float32
    assert np.allclose(np.array(got), [math.log(0.75), -1000.0], rtol=1e-6)


def test_sums_scored_positions_of_uneven_rows():
    inputs = mx.array([[1, 2, 1, 0], [2, 1, 0, 0]])
    targets = mx.array([[2, 1, 1, 0], [1, 2, 0, 0]])
    chosen, rejected = get_batched_logps(Table(THIRDS), inputs, targets)
    assert chosen.shape == rejected.shape == (1,) and chosen.dtype == mx.float32
    assert chosen.item() == pytest.approx(math.log(0.125 * 0.3 * 0.75), rel=1e-6)
    assert rejected.item() == pytest.approx(math.log(0.3 * 0.125), rel=1e-6)


def test_id_0_is_a_token_like_any_other_where_the_mask_is_another_number():
    inputs, targets = mx.array([[1, 0, 2], [2, 1, 0]]), mx.array([[0, 2, -100], [-100, 0, 0]])
    chosen, rejected = get_batched_logps(Table(THIRDS), inputs, targets, ignore_index=-100)
    assert chosen.item() == pytest.approx(math.log(0.125 * 0.25), rel=1e-6)
    assert rejected.item() == pytest.approx(math.log(0.125 * 0.5), rel=1e-6)
    # The default takes 0 for padding and leaves these positions out.
    chosen, rejected = get_batched_logps(Table(THIRDS), inputs, mx.maximum(targets, 0))
    assert chosen.item() == pytest.approx(math.log(0.25), rel=1e-6) and rejected.item() == 0


def test_a_row_without_a_scored_position_is_worth_nothing():
    masked = mx.full((2, 3), -100)
    chosen, rejected = get_batched_logps(Table(THIRDS), mx.zeros((2, 3), mx.int32), masked, -100)
    assert chosen.item() == rejected.item() == 0


def test_models_may_return_a_tuple():
    model = Table(THIRDS)
    inputs, targets = mx.array([[1, 2], [2, 1]]), mx.array([[2, 1], [1, 2]])
    plain = get_batched_logps(model, inputs, targets)
    for pack in (lambda logits: (logits, "a cache"), lambda logits: [logits]):
        packed = get_batched_logps(lambda x, pack=pack: pack(model(x)), inputs, targets)
        assert [x.item() for x in packed] == [x.item() for x in plain]


def test_half_precision_logits_are_summed_in_float32():
    # 400 tokens of log(1/256): the sum is -2218.07; bfloat16 has steps of 16 there.
    model = Table(np.zeros((256, 256)))
    inputs = mx.ones((2, 400), mx.int32)
    chosen, _ = get_batched_logps(lambda x: model(x).astype(mx.bfloat16), inputs, inputs)
    assert chosen.item() == pytest.approx(-400 * math.log(256), rel=1e-5)


@pytest.mark.parametrize("shapes", [((3, 4), (3, 4)), ((2, 4), (2, 5)), ((2, 4), (4, 4))])
def test_shapes_that_are_no_pairs_are_refused(shapes):
    inputs, targets = (mx.zeros(shape, mx.int32) for shape in shapes)
    with pytest.raises(ValueError, match="chosen rows first"):
        get_batched_logps(Table(THIRDS), inputs, targets)


def by_hand(beta, eps):
    """One pair: policy chosen log(0.125 x 0.3), rejected log(0.3 x 0.125 x 0.75); reference -4 and -3."""
    chosen = beta * (math.log(0.125 * 0.3) + 4)
    rejected = beta * (math.log(0.3 * 0.125 * 0.75) + 3)
    h = chosen - rejected
    log_sigmoid = lambda x: -math.log1p(math.exp(-x))  # noqa: E731
    return -(1 - eps) * log_sigmoid(h) - eps * log_sigmoid(-h), chosen, rejected


PAIR = {"inputs": mx.array([[1, 2, 0], [2, 1, 1]]), "targets": mx.array([[2, 1, 0], [1, 2, 1]])}
REFERENCE = {"reference_chosen_logps": mx.array([-4.0]), "reference_rejected_logps": mx.array([-3.0])}


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("eps", [0.0, 0.1, 0.4])
def test_dpo_loss_by_hand(beta, eps):
    loss, chosen, rejected, accuracy, margin, tokens = dpo_loss(Table(THIRDS), beta, eps, **REFERENCE, **PAIR)
    expected, expected_chosen, expected_rejected = by_hand(beta, eps)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert chosen.item() == pytest.approx(expected_chosen, rel=1e-5)
    assert rejected.item() == pytest.approx(expected_rejected, rel=1e-5)
    assert margin.item() == pytest.approx(expected_chosen - expected_rejected, rel=1e-5)
    assert accuracy.item() == 1.0
    assert tokens.item() == 5  # two of the chosen row, three of the rejected one


def test_swapping_the_responses_negates_the_margin():
    swapped = {name: mx.concatenate([value[1:], value[:1]]) for name, value in PAIR.items()}
    loss, chosen, rejected, accuracy, margin, _ = dpo_loss(
        Table(THIRDS), 1.0, 0.0, REFERENCE["reference_rejected_logps"], REFERENCE["reference_chosen_logps"], **swapped
    )
    _, chosen_before, rejected_before = by_hand(1.0, 0.0)
    assert chosen.item() == pytest.approx(rejected_before, rel=1e-5)
    assert rejected.item() == pytest.approx(chosen_before, rel=1e-5)
    assert margin.item() == pytest.approx(rejected_before - chosen_before, rel=1e-5)
    assert accuracy.item() == 0.0


def test_beta_0_ignores_the_reference():
    loss, chosen, rejected, accuracy, margin, tokens = dpo_loss(Table(THIRDS), 0.0, 0.0, None, None, **PAIR)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    assert (chosen.item(), rejected.item(), accuracy.item(), margin.item()) == (0, 0, 0, 0)
    assert tokens.item() == 5


def test_a_reference_that_was_kept_as_numpys_arrays_is_the_same():
    kept = {name: np.array(value) for name, value in REFERENCE.items()}
    found, expected = (dpo_loss(Table(THIRDS), 1.0, 0.0, **logps, **PAIR) for logps in (kept, REFERENCE))
    assert [value.item() for value in found] == [value.item() for value in expected]


def test_policy_equal_to_reference_loses_log_2():
    logps = get_batched_logps(Table(THIRDS), **PAIR)
    loss, *rewards, _, _, _ = dpo_loss(Table(THIRDS), 0.7, 0.2, *logps, **PAIR)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    assert [reward.item() for reward in rewards] == [0, 0]


def test_means_are_over_pairs_and_padding_changes_nothing():
    model, twice = Table(THIRDS), {name: mx.repeat(value, 2, axis=0) for name, value in PAIR.items()}
    reference = {name: mx.repeat(value, 2) for name, value in REFERENCE.items()}
    reference["reference_chosen_logps"] = mx.array([-4.0, 0.0])  # the second pair's margin is negative
    single = dpo_loss(model, 1.0, 0.0, **REFERENCE, **PAIR)
    other = dpo_loss(model, 1.0, 0.0, mx.array([0.0]), mx.array([-3.0]), **PAIR)
    wide = {name: mx.pad(value, ((0, 0), (0, 7))) for name, value in twice.items()}
    for batch in (twice, wide):
        both = dpo_loss(model, 1.0, 0.0, **reference, **batch)
        for got, one, two in zip(both[:5], single, other, strict=False):
            assert got.item() == pytest.approx((one.item() + two.item()) / 2, rel=1e-5)
        assert both[3].item() == 0.5
        assert both[5].item() == 10


@pytest.mark.parametrize(("beta", "eps"), [(-0.1, 0.0), (0.1, 0.5), (0.1, -0.1), (float("nan"), 0.0)])
def test_parameters_out_of_range_are_refused(beta, eps):
    with pytest.raises(ValueError, match="beta|label_smoothing"):
        dpo_loss(Table(THIRDS), beta, eps, **REFERENCE, **PAIR)


def test_no_gradient_flows_into_the_reference():
    slopes = mx.grad(lambda logps: dpo_loss(Table(THIRDS), 1.0, 0.0, **logps, **PAIR)[0])(REFERENCE)
    assert [slope.item() for slope in slopes.values()] == [0, 0]


def test_gradient_against_finite_differences():
    """A float64 copy of the whole computation in numpy, differentiated by central differences."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(7, 7))
    inputs, targets = rng.integers(0, 7, (4, 5)), rng.integers(1, 7, (4, 5))
    targets[0, 3:] = targets[3, 1:] = 0
    reference = rng.normal(size=(2, 2)) - 6
    beta, eps = 0.8, 0.1

    def in_float64(table):
        logits = table[inputs]
        logps = np.take_along_axis(logits, targets[..., None], -1)[..., 0] - np.log(np.exp(logits).sum(-1))
        chosen, rejected = np.split((logps * (targets != 0)).sum(-1), 2)
        h = beta * (chosen - reference[0] - rejected + reference[1])
        return ((1 - eps) * np.log1p(np.exp(-h)) + eps * np.log1p(np.exp(h))).mean()

    expected = np.zeros_like(table)
    for place in np.ndindex(*table.shape):
        step = np.zeros_like(table)
        step[place] = 1e-6
        expected[place] = (in_float64(table + step) - in_float64(table - step)) / 2e-6
    model = Table(table)
    arrays = (*(mx.array(row, mx.float32) for row in reference), mx.array(inputs), mx.array(targets))
    loss, gradient = nn.value_and_grad(model, lambda m: dpo_loss(m, beta, eps, *arrays)[0])(model)
    assert loss.item() == pytest.approx(in_float64(table), rel=1e-5)
    assert np.abs(expected).max() > 0.01
    assert np.allclose(np.array(gradient["table"]), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", ["nonzero", "zero"])
def test_agrees_with_trl(case):
    expected = TRL["cases"][case]
    model, _ = load_model(GOLDEN / "tiny_llama")
    inputs, targets = padded_rows([Pair(*row) for row in TRL["batch"]])
    reference = get_batched_logps(model, inputs, targets, -100)
    for got, name in zip(reference, ("reference_chosen_logps", "reference_rejected_logps"), strict=True):
        assert np.allclose(np.array(got), expected[name], atol=1e-4)
    model.freeze()
    load_adapters(model, str(GOLDEN / "tiny_llama" / f"adapter_{case}"))
    policy = get_batched_logps(model, inputs, targets, -100)
    for got, name in zip(policy, ("policy_chosen_logps", "policy_rejected_logps"), strict=True):
        assert np.allclose(np.array(got), expected[name], atol=1e-4)

    def loss(model):
        return dpo_loss(model, TRL["beta"], 0.0, *reference, inputs, targets, -100)

    (value, chosen, rejected, accuracy, margin, tokens), gradient = nn.value_and_grad(model, loss)(model)
    assert value.item() == pytest.approx(expected["loss"], abs=1e-4)
    assert chosen.item() == pytest.approx(expected["rewards/chosen"], abs=1e-4)
    assert rejected.item() == pytest.approx(expected["rewards/rejected"], abs=1e-4)
    assert accuracy.item() == pytest.approx(expected["rewards/accuracies"], abs=1e-6)
    assert margin.item() == pytest.approx(expected["rewards/margins"], abs=1e-4)
    assert tokens.item() == sum(2 * len(p) + len(c) + len(r) for p, c, r in TRL["batch"]) - 2 * len(TRL["batch"])
    gradient = dict(tree_flatten(gradient))
    for name, values in expected["gradients"].items():
        values = np.array(values)
        scale = np.abs(values).max()
        assert np.abs(np.array(gradient[name]) - values).max() <= 1e-3 * max(scale, 1e-6), name


@pytest.fixture(scope="module")
def example_run(tmp_path_factory):
    """The command in README's first line, run as a user does, with its adapters elsewhere."""
    folder = tmp_path_factory.mktemp("run")
    command = [sys.executable, "-m", "mlx_lm.lora", "--config", "mlx_lm/examples/lora_config.yaml"]
    command += ["--adapter-path", str(folder / "adapters"), "--reference-cache", str(folder / "cache")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder / "adapters", done


def test_the_command_trains_the_embedded_default(example_run):
    folder, done = example_run
    assert "Traceback" not in done.stderr and "WARNING" not in done.stderr + done.stdout
    assert "Test loss" in done.stdout and "ppl" not in done.stdout
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "loss" in line]
    validation = [line for line in lines if "eval_loss" in line]
    assert validation[0]["iteration"] == 0
    assert validation[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert validation[0]["eval_rewards/accuracies"] == 0.5
    assert validation[-1]["eval_rewards/accuracies"] > 0.95
    assert validation[-1]["eval_rewards/margins"] > validation[0]["eval_rewards/margins"]
    names = {"loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen"}
    names |= {"logps/rejected", "grad_norm", "learning_rate", "pairs_per_second", "peak_memory", "trained_tokens"}
    assert names <= set(training[0])


def test_the_command_leaves_the_files_that_mlx_lm_loads(example_run):
    folder, _ = example_run
    files = {path.name for path in folder.iterdir()}
    assert {"adapters.safetensors", "adapter_config.json", "metrics.jsonl", "training.png"} <= files
    assert any(name.endswith("0_adapters.safetensors") for name in files)
    assert not [name for name in files if name.startswith(".")]
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")
    model, _ = load_model(ROOT / "mlx_lm" / "examples" / "tiny_chat_model")
    load_adapters(model, str(folder))
    lora_b = [value for name, value in tree_flatten(model.parameters()) if name.endswith("lora_b")]
    assert lora_b and all(mx.any(value != 0).item() for value in lora_b)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["loss_type"] == "dpo" and config["beta"] == 0.5
    assert config["versions"] == {"mlx": mx.__version__, "mlx_lm": mlx_lm.__version__, "mlx_lm_dpo": VERSION}

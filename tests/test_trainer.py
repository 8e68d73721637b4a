"""Training: TRL's numbers, the first loss, accumulation, optimizers, modes, and what no switch may change."""

import gc
import json
import math
import weakref
from contextlib import nullcontext
from itertools import cycle
from pathlib import Path

import chat_tokenizers as tokenizers
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import build_schedule, load_adapters
from tiny import TINY_LLAMA, largest_difference, short_run, some_pairs, tiny_llama, trained

from mlx_lm.tuner.datasets import CacheDataset, Pair, PreferenceDataset
from mlx_lm.tuner.preference import batches
from mlx_lm.tuner.preference.batches import ARRANGEMENTS, PACKED, PLAIN, make_batch
from mlx_lm.tuner.preference.figures import FIGURES
from mlx_lm.tuner.preference.layers import checkpointed_layers
from mlx_lm.tuner.preference.logps import Scorer
from mlx_lm.tuner.preference.objective import Objective, preference_loss
from mlx_lm.tuner.preference.options import ConfigError
from mlx_lm.tuner.preference.reference import Reference
from mlx_lm.tuner.preference.step import Step
from mlx_lm.tuner.trainer import TrainingArgs, evaluate

TRL = json.loads((Path(__file__).parent / "golden" / "trl.json").read_text())
PAIRS = some_pairs(12)


# TRL's numbers


def trl_model(adapter):
    model = tiny_llama(lora=False)
    return load_adapters(model, str(TINY_LLAMA / f"adapter_{adapter}"))


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("case", ["nonzero", "zero"])
def test_a_step_has_trls_logps_rewards_and_gradient(case, arrangement):
    expected, model = TRL["cases"][case], trl_model(case)
    batch = make_batch([Pair(*pair) for pair in TRL["batch"]], arrangement)[0]
    scores = np.array(Scorer(model)(batch).total)
    logps = np.array([expected[f"{name}_logps"] for name in ("policy_chosen", "policy_rejected")])
    assert np.allclose(scores, logps.reshape(-1), atol=1e-4)
    # The reference is the bare model, as in TRL.
    bare = Reference(Scorer(tiny_llama(lora=False), arrangement != PLAIN))
    reference = mx.array(bare.logps([Pair(*pair) for pair in TRL["batch"]], range(5)))
    assert np.allclose(reference[:, 0, 0], expected["reference_chosen_logps"], atol=1e-4)
    assert np.allclose(reference[:, 1, 0], expected["reference_rejected_logps"], atol=1e-4)
    objective = Objective(Scorer(model), preference_loss("sigmoid", beta=TRL["beta"]))

    def loss(_):
        loss, sums = objective(batch, reference, gradient=True)
        return loss / 5, sums

    (loss, sums), gradient = nn.value_and_grad(model, loss)(model)
    figures = dict(zip(FIGURES, (np.array(sums)[: len(FIGURES)] / 5).tolist(), strict=True))
    for name in ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert figures[name] == pytest.approx(expected[name], abs=1e-4), name
    # Policy and reference are the same in the case "zero": a tie, which TRL counts as wrong.
    assert figures["rewards/accuracies"] == pytest.approx(expected["rewards/accuracies"] if case == "nonzero" else 0.5)
    gradient = dict(tree_flatten(gradient))
    for name, values in expected["gradients"].items():
        error = np.abs(np.array(gradient[name]) - np.array(values)).max()
        assert error <= 1e-3 * np.abs(values).max(), name


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "apo_zero"])
def test_thirty_steps_are_trls(tmp_path, monkeypatch, loss_type):
    trajectory = TRL["trajectory"]
    epochs = cycle(np.split(np.array(trajectory["batches"]), 3))
    monkeypatch.setattr(batches, "drawn", lambda *_: next(epochs))
    model = trl_model(trajectory["adapter"].removeprefix("adapter_"))
    adam = trajectory["adam"]
    optimizer = optim.Adam(adam["lr"], adam["betas"], adam["eps"], bias_correction=True)
    pairs = [Pair(*pair) for pair in trajectory["pairs"]]
    lines, _ = short_run(model, pairs, tmp_path, optimizer, loss_type=loss_type, beta=TRL["beta"], iters=30)
    expected = trajectory["runs"][loss_type]
    close = 1e-4 if loss_type == "ipo" else 1e-5
    assert np.abs(np.subtract([line["loss"] for line in lines], expected["loss"])).max() < close
    assert np.allclose([line["rewards/margins"] for line in lines], expected["margins"], atol=1e-3)
    assert expected["loss"][-1] < 0.9 * expected["loss"][0]  # there is something to agree on


# The first loss


def quantized(bits, mode="affine"):
    model = tiny_llama(lora=False)
    nn.quantize(model, 32, bits, mode=mode)
    return model


def with_lora(model, **options):
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model.freeze()
    mx.random.seed(1)
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 20.0, "dropout": 0.0}, **options)
    return model


def full(model):
    model.unfreeze()
    return model


POLICIES = {
    "lora": lambda: with_lora(tiny_llama(lora=False)),
    "dora": lambda: with_lora(tiny_llama(lora=False), use_dora=True),
    "full": lambda: full(tiny_llama(lora=False)),
    "4 bits": lambda: with_lora(quantized(4)),
    "8 bits": lambda: with_lora(quantized(8)),
    "mxfp4": lambda: with_lora(quantized(4, "mxfp4")),
    "dora on 4 bits": lambda: with_lora(quantized(4), use_dora=True),
}


@pytest.mark.parametrize("policy", list(POLICIES))
def test_the_first_loss_is_log_2_and_training_lowers_it(tmp_path, policy):
    model = POLICIES[policy]()
    training, validation = short_run(model, PAIRS, tmp_path, valid=PAIRS, iters=6, batch_size=12)
    for first in (training[0]["loss"], validation[0]["eval_loss"]):
        assert first == pytest.approx(math.log(2), abs=1e-4)
    assert validation[0]["eval_rewards/accuracies"] == 0.5
    assert training[-1]["loss"] < 0.66
    assert validation[-1]["eval_loss"] < training[-1]["loss"]


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_the_first_loss_in_half_precision(tmp_path, dtype):
    """Logps are float32 sums; what is left is how batches of other shapes round the model's own arithmetic."""
    base = tiny_llama(lora=False)
    base.set_dtype(dtype)
    pairs = some_pairs(12, response=(20, 60))
    training, _ = short_run(with_lora(base), pairs, tmp_path, iters=1, batch_size=12)
    assert training[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    scores = Scorer(base)(make_batch(pairs, PACKED)[0])
    assert scores.total.dtype == scores.common.dtype == mx.float32
    # In the model's dtype sums of this size would be multiples of a quarter or more.
    assert min(abs(scores.total).tolist()) > 60
    assert sum(value % 0.125 != 0 for value in scores.total.tolist()) > 12


# Accumulation


def one_update(sizes, optimizer, compiled=False, max_grad_norm=None, loss_type="dpo", arrangement=PACKED):
    """The weights after one update from all of PAIRS, taken in batches of `sizes`, and the gradient's norm."""
    model = tiny_llama(moved=True)
    objective = Objective(Scorer(model), preference_loss(loss_type))
    step = Step(model, optimizer, objective, compiled, max_grad_norm)
    reference = Reference(Scorer(tiny_llama(lora=False))).logps(PAIRS, range(len(PAIRS)))
    start = 0
    for i, size in enumerate(sizes):
        rows = range(start, start + size)
        batch = make_batch([PAIRS[row] for row in rows], arrangement)[0]
        sums, norm = step(batch, mx.array(reference[list(rows)]), update=i == len(sizes) - 1)
        mx.eval(sums, norm, step.state(), step.accumulated)
        start += size
    assert start == len(PAIRS) and step.accumulated is None
    step.flat.write()
    return trained(model), norm.item()


# Compiling for the CPU runs a C++ compiler for every new shape, so it is tried with few.
@pytest.mark.parametrize(
    "sizes, compiled", [([4, 4, 4], False), ([5, 5, 2], False), ([1, 11], False), ([1] * 12, False), ([6, 6], True)]
)
def test_small_batches_make_the_large_ones_update(sizes, compiled):
    expected, norm = one_update([12], optim.SGD(1e-2))
    found, found_norm = one_update(sizes, optim.SGD(1e-2), compiled)
    assert largest_difference(expected, trained(tiny_llama(moved=True))) > 1e-3
    assert largest_difference(found, expected) < 1e-5
    assert found_norm == pytest.approx(norm, rel=1e-4)


def test_a_run_of_small_batches_makes_the_large_ones_updates(tmp_path):
    """Ten pairs: four batches of four, four and two make what one batch of ten makes."""
    pairs = PAIRS[:10]
    large, small = tiny_llama(), tiny_llama()
    one, _ = short_run(large, pairs, tmp_path, optim.Adam(1e-3), batch_size=10, iters=2)
    many, _ = short_run(
        small, pairs, tmp_path, optim.Adam(1e-3), batch_size=4, iters=6, grad_accumulation_steps=3, steps_per_report=3
    )
    assert largest_difference(trained(small), trained(large)) < 1e-5
    assert [line["loss"] for line in many] == pytest.approx([line["loss"] for line in one], abs=1e-5)
    assert [line["trained_tokens"] for line in many] == [line["trained_tokens"] for line in one]


def test_a_model_is_freed_with_its_step():
    """At once: memory that waits for the collection of cycles may be the next model's."""
    model = tiny_llama()
    step = Step(model, optim.SGD(1e-2), Objective(Scorer(model), preference_loss("dpo")), compiled=False)
    mx.eval(step(make_batch(PAIRS[:4], PACKED)[0], mx.zeros((4, 2, 2)), True), step.state())
    gone = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model, step
        assert gone() is None
    finally:
        gc.enable()


def test_steps_left_over_at_the_end_make_an_update(tmp_path):
    one, two = tiny_llama(), tiny_llama()
    short_run(one, PAIRS, tmp_path, optim.SGD(1e-2), iters=1, grad_accumulation_steps=4)
    short_run(two, PAIRS, tmp_path, optim.SGD(1e-2), iters=1)
    assert largest_difference(trained(one), trained(two)) == 0
    assert largest_difference(trained(one), trained(tiny_llama())) > 1e-4
    # Five steps, two each: the fifth alone makes the third update.
    optimizer = optim.SGD(1e-2)
    short_run(tiny_llama(), PAIRS, tmp_path, optimizer, iters=5, grad_accumulation_steps=2)
    assert optimizer.step.item() == 3


# What each switch may not change


def run_with(folder, **options):
    """All pairs in one batch: which ones come together depends on whether prompts are shared."""
    model = tiny_llama(moved=True)
    reference = Reference(Scorer(tiny_llama(lora=False)))
    options = {"batch_size": 12, "iters": 3} | options
    lines, _ = short_run(model, PAIRS, folder, optim.SGD(1e-2), reference=reference, **options)
    return trained(model), [line["loss"] for line in lines]


@pytest.mark.parametrize(
    "options",
    [
        {"compile": True},
        {"share_prompt": False},
        {"grad_checkpoint": True},
        {"grad_checkpoint": True, "share_prompt": False},
        {"grad_checkpoint": True, "compile": True},
    ],
)
def test_how_a_step_is_computed_changes_nothing(tmp_path, options):
    expected, losses = run_with(tmp_path, compile=False)
    found, found_losses = run_with(tmp_path, **options)
    assert found_losses == pytest.approx(losses, abs=1e-5) and losses[0] != losses[-1]
    assert largest_difference(found, expected) < 1e-5
    assert largest_difference(found, trained(tiny_llama(moved=True))) > 1e-3


def test_gradients_are_clipped_to_the_norm(tmp_path):
    start = trained(tiny_llama(moved=True))
    plain, norm = one_update([12], optim.SGD(1.0))
    length = math.sqrt(sum(np.square(plain[name] - start[name]).sum() for name in start))
    assert length == pytest.approx(norm, rel=1e-4) and norm > 0.5
    for limit in (0.1, 2 * norm):
        clipped, told = one_update([5, 7], optim.SGD(1.0), max_grad_norm=limit)
        factor = min(1, limit / norm)
        expected = {name: start[name] + factor * (plain[name] - start[name]) for name in start}
        assert largest_difference(clipped, expected) < 1e-5
        assert told == pytest.approx(norm, rel=1e-4)  # the norm before clipping
    lines, _ = short_run(tiny_llama(), PAIRS, tmp_path, iters=1, max_grad_norm=0.1)
    assert lines[0]["grad_norm"] > 0.1


def test_swapping_the_responses_negates_margins():
    swapped = [pair._replace(chosen=pair.rejected, rejected=pair.chosen) for pair in PAIRS]
    model, reference = tiny_llama(moved=True), Reference(Scorer(tiny_llama(lora=False)))
    args = TrainingArgs(loss_type="dpo")
    figures, mirrored = (evaluate(model, pairs, 4, -1, args=args, reference=reference) for pairs in (PAIRS, swapped))
    assert abs(figures["rewards/margins"]) > 1e-3
    assert mirrored["rewards/margins"] == pytest.approx(-figures["rewards/margins"], abs=1e-5)
    assert mirrored["rewards/chosen"] == pytest.approx(figures["rewards/rejected"], abs=1e-5)
    assert mirrored["rewards/accuracies"] == pytest.approx(1 - figures["rewards/accuracies"])


def test_weights_of_rows_weigh_their_losses():
    model, reference = tiny_llama(moved=True), Reference(Scorer(tiny_llama(lora=False)))
    args = TrainingArgs(loss_type="dpo")
    alone = [evaluate(model, [pair], 1, -1, args=args, reference=reference)["loss"] for pair in PAIRS[:3]]
    weighed = [pair._replace(weight=weight) for pair, weight in zip(PAIRS, (0.5, 0.0, 2.0), strict=False)]
    figures = evaluate(model, weighed, 2, -1, args=args, reference=reference)
    assert figures["loss"] == pytest.approx((0.5 * alone[0] + 2 * alone[2]) / 3, abs=1e-5)


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_step_leaves_nothing_in_memory(arrangement, checkpoint):
    """Without the collector of cycles, which may come late: what a step ran on is freed with it."""
    model = tiny_llama(moved=True)
    step = Step(model, optim.SGD(0.0), Objective(Scorer(model), preference_loss("dpo")), compiled=False)
    batch, used = make_batch(some_pairs(8, response=(40, 60)), arrangement)[0], []
    gc.collect()
    gc.disable()
    try:
        with checkpointed_layers(model) if checkpoint else nullcontext():
            for _ in range(4):
                sums, norm = step(batch, mx.zeros((8, 2, 2)), update=True)
                mx.eval(sums, norm, step.state())
                used.append(mx.get_active_memory())
    finally:
        gc.enable()
    # A batch's hidden states alone are 100 kB.
    assert max(used[1:]) - used[1] < 10_000


# Optimizers and schedules


@pytest.mark.parametrize("name", ["Adam", "AdamW", "Muon", "SGD", "Adafactor"])
def test_every_optimizer_lowers_the_loss(tmp_path, name):
    rate = {"SGD": 1.0, "Muon": 1e-2}.get(name, 1e-3)
    optimizer = getattr(optim, name)(learning_rate=rate)
    lines, _ = short_run(tiny_llama(), PAIRS, tmp_path, optimizer, batch_size=12, iters=5)
    losses = [line["loss"] for line in lines]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4) and losses[-1] < 0.691


@pytest.mark.parametrize("make", [optim.Adam, lambda rate: optim.MultiOptimizer([optim.Adam(rate)])])
def test_an_optimizer_goes_on_in_a_programs_own_training(tmp_path, make):
    model, optimizer = tiny_llama(), make(1e-3)
    short_run(model, PAIRS, tmp_path, optimizer, iters=2)
    before, tokens = trained(model), mx.array([[1, 2, 3]])
    _, gradient = nn.value_and_grad(model, lambda model: model(tokens).sum())(model)
    optimizer.update(model, gradient)
    assert largest_difference(trained(model), before) > 0
    # And again here, where it has its moments still.
    again = short_run(model, PAIRS, tmp_path, optimizer, iters=2)[0]
    assert np.isfinite(again[-1]["loss"])


def test_a_schedule_is_followed_and_reported(tmp_path):
    schedule = build_schedule({"name": "cosine_decay", "arguments": [1e-3, 4], "warmup": 2, "warmup_init": 1e-4})
    lines, _ = short_run(tiny_llama(), PAIRS, tmp_path, optim.Adam(schedule), iters=6)
    rates = [line["learning_rate"] for line in lines]
    assert rates == pytest.approx([float(schedule(mx.array(step))) for step in range(6)], rel=1e-5)
    assert max(rates) > 5 * rates[0] and rates[-1] < max(rates)
    # With accumulation the schedule counts updates, not steps.
    lines, _ = short_run(tiny_llama(), PAIRS, tmp_path, optim.Adam(schedule), iters=6, grad_accumulation_steps=3)
    assert lines[-1]["learning_rate"] == pytest.approx(float(schedule(mx.array(1))), rel=1e-5)


# Modes


def test_dropout_is_on_in_training_and_off_elsewhere(tmp_path):
    seen = {}

    class Watcher:
        def on_train_loss_report(self, info):
            seen.setdefault("training", []).append(model.training)

        def on_val_loss_report(self, info):
            seen.setdefault("validation", []).append(info["val_loss"])

    model = tiny_llama(dropout=0.5, moved=True)
    model.eval()  # as `load` leaves one
    short_run(model, PAIRS, tmp_path, optim.SGD(0.0), valid=PAIRS, callback=Watcher(), iters=3, steps_per_eval=1)
    # The policy does not move, so without dropout it stays the reference.
    assert seen["validation"] == pytest.approx([math.log(2)] * 4, abs=1e-5)
    assert seen["training"] == [True] * 3
    lines, _ = short_run(model, PAIRS, tmp_path, optim.SGD(0.0), iters=3, batch_size=12)
    losses = [line["loss"] for line in lines]
    assert len({round(loss, 5) for loss in losses}) == 3, "each step draws its own"
    assert all(abs(loss - math.log(2)) > 1e-4 for loss in losses)


@pytest.mark.parametrize("options", [{}, {"compile": True}, {"share_prompt": False}])
def test_dropout_draws_from_the_seed(tmp_path, options):
    def losses(seed):
        model = tiny_llama(dropout=0.5, moved=True)
        mx.random.seed(seed)
        lines, _ = short_run(model, PAIRS, tmp_path, optim.SGD(0.0), iters=2, batch_size=12, **options)
        return [line["loss"] for line in lines]

    assert losses(0) == losses(0) != losses(1)


# TR-DPO


def test_trdpo_takes_the_policy_as_its_reference_every_so_many_updates(tmp_path):
    options = {"batch_size": 12, "iters": 8, "reference_update_steps": 2, "steps_per_eval": 2}
    training, validation = short_run(tiny_llama(), PAIRS, tmp_path, valid=PAIRS, **options)
    losses = [line["loss"] for line in training]
    assert losses[::2] == pytest.approx([math.log(2)] * 4, abs=1e-4)
    assert all(loss < 0.69 for loss in losses[1::2])
    assert [line["iteration"] for line in validation] == [0, 2, 4, 6, 8]
    # Validated before the exchange, by the reference that the steps before had: after it the policy would be its own.
    first, *later = (line["eval_loss"] for line in validation)
    assert first == pytest.approx(math.log(2), abs=1e-4) and all(loss < 0.69 for loss in later)
    assert all(line["eval_rewards/accuracies"] > 0.5 for line in validation[1:])


def test_a_kl_is_told_only_while_the_reference_is_the_bare_model(tmp_path):
    """Half precision, in which logps do not tell a policy of a few updates from one of none."""

    def told(folder, moved=False, **options):
        model = tiny_llama(moved=moved)
        model.set_dtype(mx.bfloat16)
        options |= {"valid": PAIRS[:4], "steps_per_eval": 1}
        valid = short_run(model, PAIRS, tmp_path / folder, optim.Adam(1e-4), **options)[1]
        return [line["iteration"] for line in valid if "eval_kl" in line]

    assert told("fixed") == [0, 1, 2, 3, 4]
    assert told("adapters before", moved=True) == []
    # A program's own reference, whose adapters do nothing either.
    assert told("another model", reference=Reference(Scorer(tiny_llama()))) == []
    following = {"reference_update_steps": 2, "steps_per_save": 1}
    assert told("following", **following) == [0, 1, 2]
    assert told("gone on with early", iters=1, **following) == [0, 1]
    assert told("gone on with early", resume=True, **following) == [0, 1, 2]
    assert told("gone on with late", iters=2, **following) == [0, 1, 2]
    assert told("gone on with late", resume=True, **following) == [0, 1, 2]


def test_a_reference_that_has_let_go_of_its_model_gives_what_it_has_kept(tmp_path):
    model = tiny_llama()
    reference = Reference(Scorer(model), cache=tmp_path / "cache")
    reference.logps(PAIRS, range(len(PAIRS)))
    reference.release()
    validation = short_run(model, PAIRS, tmp_path / "run", valid=PAIRS[:4], reference=reference)[1]
    assert validation[0]["eval_rewards/margins"] == pytest.approx(0, abs=1e-6) and "eval_kl" not in validation[0]


def test_trdpo_counts_updates_not_steps(tmp_path):
    options = {"batch_size": 4, "grad_accumulation_steps": 3, "steps_per_report": 3, "reference_update_steps": 1}
    training, _ = short_run(tiny_llama(), PAIRS, tmp_path, iters=9, **options)
    assert [line["loss"] for line in training] == pytest.approx([math.log(2)] * 3, abs=1e-4)
    options["reference_update_steps"] = 2
    training, _ = short_run(tiny_llama(), PAIRS, tmp_path, iters=9, **options)
    log2, lower, again = (line["loss"] for line in training)
    assert (log2, again) == pytest.approx((math.log(2),) * 2, abs=1e-4) and lower < 0.69


# Reports and the interface


def test_reports_say_what_was_done(tmp_path):
    pairs = PAIRS[:10]
    lines, _ = short_run(tiny_llama(), pairs, tmp_path, batch_size=4, iters=6, steps_per_report=3)
    tokens = sum(2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs)
    assert [line["trained_tokens"] for line in lines] == [tokens, 2 * tokens]
    for line in lines:
        assert line["rewards/margins"] == pytest.approx(line["rewards/chosen"] - line["rewards/rejected"], abs=1e-5)
        assert line["pairs_per_second"] * tokens == pytest.approx(line["tokens_per_second"] * 10, rel=1e-6)
        assert line["iterations_per_second"] * 10 == pytest.approx(line["pairs_per_second"] * 3, rel=1e-6)
        assert 0 <= line["padding_share"] < 0.3 and line["grad_norm"] > 0


def test_a_length_that_cuts_no_pair_is_told(tmp_path, capsys):
    pairs = [*PAIRS, Pair([1] * 25, [2], [3] * 7)]
    short_run(tiny_llama(), pairs, tmp_path, iters=1, max_seq_length=32)
    assert "max_seq_length" not in capsys.readouterr().out
    short_run(tiny_llama(), pairs, tmp_path, iters=1, max_seq_length=31)
    told = " ".join(capsys.readouterr().out.split())
    assert "max_seq_length is 31, and the longest pair has 32 tokens, all of which are run: pairs are cut when" in told


def test_epochs_stand_in_the_place_of_iters(tmp_path):
    assert len(short_run(tiny_llama(), PAIRS[:8], tmp_path, epochs=1, iters=7)[0]) == 2


def test_a_data_set_smaller_than_the_batch_trains(tmp_path):
    lines, validation = short_run(tiny_llama(), PAIRS[:2], tmp_path, valid=PAIRS[:1], batch_size=8, iters=3)
    assert len(lines) == 3 and lines[-1]["loss"] < lines[0]["loss"] and len(validation) == 2


def test_evaluate_takes_a_reference_its_logps_or_the_model_without_its_adapters(capsys):
    model, base = tiny_llama(moved=True), Reference(Scorer(tiny_llama(lora=False)))
    args = TrainingArgs(loss_type="dpo", reference_cache="none")
    by_object = evaluate(model, PAIRS, 4, 2, args=args, reference=base)
    by_logps = evaluate(model, PAIRS, 4, 2, args=args, reference=base.logps(PAIRS, range(8)))
    assert by_object == by_logps and abs(by_object["loss"] - math.log(2)) > 1e-3
    before = trained(model)
    for moved in (model, tiny_llama(moved=True, use_dora=True)):
        by_default = evaluate(moved, CacheDataset(PAIRS), 4, 2, args=args)
        assert "The model without its adapters is the reference" in capsys.readouterr().out
        assert by_default == evaluate(moved, PAIRS, 4, 2, args=args, reference=base)
    assert largest_difference(trained(model), before) == 0


def test_logps_of_a_reference_are_taken_as_any_array_of_their_shape():
    model, args = tiny_llama(moved=True), TrainingArgs(loss_type="dpo", reference_cache="none")
    everything = Reference(Scorer(tiny_llama(lora=False))).logps(PAIRS, range(len(PAIRS)))
    logps = everything[:8]
    expected = evaluate(model, PAIRS, 4, 2, args=args, reference=logps)
    for given in (mx.array(logps), everything):
        assert evaluate(model, PAIRS, 4, 2, args=args, reference=given) == expected
    found = evaluate(model, PAIRS, 4, 2, args=args, reference=mx.array(logps).astype(mx.bfloat16))
    assert found["loss"] == pytest.approx(expected["loss"], abs=0.01)
    for given, shape in ((logps[:5], r"\(5, 2, 2\)"), (logps[:, 0, 0], r"\(8,\)")):
        with pytest.raises(ConfigError, match=rf"reference has the shape {shape}, and the 8 pairs to evaluate take"):
            evaluate(model, PAIRS, 4, 2, args=args, reference=given)


def test_evaluate_does_not_compare_a_model_with_itself():
    args = TrainingArgs(loss_type="dpo", reference_cache="none")
    with pytest.raises(ConfigError, match="without adapters does not tell what it was trained from; give reference"):
        evaluate(tiny_llama(lora=False), PAIRS, 4, 2, args=args)
    model = tiny_llama()
    with pytest.raises(ConfigError, match="the reference is of the very model that is evaluated"):
        evaluate(model, PAIRS, 4, 2, args=args, reference=Reference(Scorer(model)))
    assert evaluate(tiny_llama(lora=False), PAIRS, 4, 2, args=TrainingArgs(loss_type="simpo"))["loss"] > 0


def test_data_and_loss_that_do_not_fit_are_told(tmp_path):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    preferences = PreferenceDataset(2 * rows, tokenizers.plain())
    for dataset in (preferences, CacheDataset(preferences)):
        with pytest.raises(ConfigError, match="no preference loss is asked for: set loss_type"):
            short_run(tiny_llama(), dataset, tmp_path, loss_type="sft")
        with pytest.raises(ConfigError, match="no preference loss is asked for: set loss_type"):
            evaluate(tiny_llama(), dataset, 1, 1)
    # A program's own batches may be made of them.
    tokens, lengths = mx.array([[1, 2, 3]]), mx.array([[0, 3]])
    assert evaluate(tiny_llama(), preferences, 1, 1, iterate_batches=lambda **_: [(tokens, lengths)]) > 0


def test_a_loss_that_is_constant_with_beta_0_is_refused(tmp_path):
    for loss_type in ("dpo", "hinge", "simpo", ["dpo", "nca_pair"]):
        with pytest.raises(ConfigError, match="beta is 0, with which .* has no gradient and nothing is trained"):
            short_run(tiny_llama(), PAIRS, tmp_path, loss_type=loss_type, beta=0.0)
    for loss_type in ("cpo", "orpo", ["dpo", "sft"]):
        model = tiny_llama()
        start = trained(model)
        short_run(model, PAIRS, tmp_path, loss_type=loss_type, beta=0.0, iters=1)
        assert largest_difference(trained(model), start) > 0


@pytest.mark.parametrize("told", ["quantized", "nothing to train"])
def test_a_model_that_cannot_be_trained_is_refused_before_an_earlier_run_is_moved(tmp_path, told):
    (tmp_path / "metrics.jsonl").touch()
    model = full(quantized(4)) if told == "quantized" else tiny_llama().freeze()
    with pytest.raises(ConfigError, match=told):
        short_run(model, PAIRS, tmp_path, iters=1)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_dropout_is_the_same_with_a_warm_and_a_cold_reference_cache(tmp_path):
    weights = []
    for folder in ("cold", "warm"):
        model = tiny_llama(dropout=0.5)
        mx.random.seed(1)
        short_run(model, PAIRS, tmp_path / folder, reference_cache=str(tmp_path / "cache"))
        weights.append(trained(model))
    assert largest_difference(*weights) == 0


def test_a_loss_that_is_not_a_number_ends_the_run_and_saves_nothing(tmp_path):
    with pytest.raises(ConfigError, match="learning_rate"):
        short_run(tiny_llama(), PAIRS, tmp_path, optim.SGD(1e30), iters=4)
    assert not (tmp_path / "adapters.safetensors").exists()


def test_rows_that_the_loss_would_not_heed_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="margin"):
        short_run(tiny_llama(), [PAIRS[0]._replace(margin=0.5)], tmp_path, loss_type="nca_pair")
    with pytest.raises(ConfigError, match="weight"):
        short_run(tiny_llama(), [PAIRS[0]._replace(weight=0.5)], tmp_path, loss_type="aot")

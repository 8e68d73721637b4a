"""Each detector of a run's health, set off by a run, and not by one that is well."""

import mlx.optimizers as optim
import numpy as np
import pytest
from tiny import short_run, some_pairs, tiny_llama

from mlx_lm.tuner.preference.health import collapsed, displaced, health, overfitted
from mlx_lm.tuner.preference.objective import preference_loss

PAIRS = some_pairs(48, response=(4, 8))
DPO = preference_loss("dpo", beta=0.1)
WORDS = {
    "displaced": "lose more than the margin gains",
    "exploding": "the margin still grows",
    "unmoved": "Nothing has moved",
    "never better": "no validation was much better than the first",
    "length bias": "Margins go with length",
    "too few": "pairs say little",
}


def run(folder, pairs=PAIRS, valid=None, rate=2e-3, **options):
    given = {"batch_size": 16, "iters": 6, "steps_per_eval": 3, "steps_per_report": 3, "val_batches": -1}
    model, optimizer = tiny_llama(), optim.Adam(rate)
    loss = preference_loss("dpo", beta=options.setdefault("beta", 0.1))
    _, validations = short_run(model, pairs, folder, optimizer, valid or pairs, **given | options)
    return health(validations, loss), validations


def longer_chosen(count):
    """Pairs whose chosen response is longer, each by another length."""
    draw = np.random.default_rng(0)
    pairs = some_pairs(count, response=(2, 4))
    return [p._replace(chosen=p.chosen + draw.integers(0, 97, i % 12).tolist()) for i, p in enumerate(pairs)]


# Of each detector a run that sets it off.
SICK = {
    # Responses that differ in their last token alone.
    "displaced": {
        "pairs": [p._replace(rejected=p.chosen[:-1] + [(p.chosen[-1] + 1) % 97]) for p in PAIRS],
        "rate": 4e-3,
        "iters": 9,
    },
    "exploding": {"rate": 5e-4, "beta": 5.0},
    "unmoved": {"rate": 1e-7},
    "never better": {"valid": [p._replace(chosen=p.rejected, rejected=p.chosen) for p in PAIRS], "rate": 5e-3},
    "length bias": {"pairs": longer_chosen(48)},
    "too few": {"valid": PAIRS[:6]},
}


@pytest.fixture(scope="module")
def well(tmp_path_factory):
    return run(tmp_path_factory.mktemp("well"), iters=9)


def test_a_run_that_is_well_has_nothing_said_of_it(well):
    said, validations = well
    assert said == []
    assert validations[-1]["eval_rewards/accuracies"] > 0.95 and validations[-1]["eval_loss"] < 0.65


@pytest.mark.parametrize("name", list(SICK))
def test_a_detector_is_set_off(tmp_path, name):
    said, _ = run(tmp_path, **SICK[name])
    assert len([sentence for sentence in said if WORDS[name] in sentence]) == 1


def test_small_margins_from_a_reference_that_follows_the_policy_are_no_standstill(tmp_path):
    _, validations = run(tmp_path, **SICK["unmoved"])
    assert WORDS["unmoved"] in " ".join(health(validations, DPO))
    following = preference_loss("dpo", beta=0.1, reference_update_steps=2)
    assert health(validations, following) == []
    # Nor is a loss that is back at log 2 after an exchange overfitting.
    validations[-1] |= {"eval_loss": 2 * validations[0]["eval_loss"]}
    assert WORDS["never better"] in " ".join(health(validations, DPO)) and health(validations, following) == []
    better = validations[1] | {"eval_loss": 0.5 * validations[0]["eval_loss"]}
    told = " ".join(health([validations[0], better, validations[-1]], DPO))
    assert "the run overfits" in told and WORDS["never better"] not in told


@pytest.mark.parametrize(
    "pairs, effective, rise, warned",
    [(400, None, 0.04, True), (20, None, 0.1, False), (20, None, 0.2, True), (400, 20, 0.1, False)],
)
def test_a_rise_that_few_pairs_have_by_chance_is_no_overfitting(pairs, effective, rise, warned):
    """Of 20 pairs one whose loss is 2 more is 0.1 of the mean: a plateau's last validation is seldom its best."""
    losses = 0.69, 0.6, 0.6 + rise
    lines = [{"iteration": i, "eval_loss": loss, "eval_pairs": pairs} for i, loss in enumerate(losses)]
    assert ("the run overfits" in (overfitted(lines, effective) or "")) == warned


@pytest.mark.parametrize("beta, margin, warned", [(0.001, 0.006, False), (0.001, 1e-5, True), (0.1, 0.006, True)])
def test_a_small_margin_of_a_small_beta_is_no_standstill(beta, margin, warned):
    """Six nats are 0.006 with a beta of 0.001."""
    line = {"iteration": 0, "eval_loss": 0.693, "eval_rewards/accuracies": 0.5, "eval_pairs": 400}
    line |= {f"eval_{name}": 0.0 for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen")}
    last = {"iteration": 50, "eval_loss": 0.690, "eval_rewards/accuracies": 0.95, "eval_rewards/margins": margin}
    said = health([line, line | last], preference_loss("dpo", beta=beta))
    assert (WORDS["unmoved"] in " ".join(said)) == warned
    # Whose first validation came later, as after a resume with other pairs: where it began is not known.
    assert WORDS["unmoved"] not in " ".join(health([line | {"iteration": 40}, line | last], DPO))


def test_margins_of_logps_go_with_length_before_training_too(well):
    """Without a reference: longer responses are less likely, and what is advised is refused there."""
    _, validations = well
    validations = [line | {"eval_pairs": 400, "eval_rewards/length_correlation": -0.8} for line in validations]
    assert WORDS["length bias"] in " ".join(health(validations, DPO))
    assert WORDS["length bias"] not in " ".join(health(validations, preference_loss("cpo")))


@pytest.mark.parametrize(
    "chosen, rejected, logps, warned",
    [
        (-2.1, -2.2, -41.0, True),  # 21 and 22 nats below a reference of -20
        (-2.1, -2.2, -421.0, False),  # of a reference of -400: long responses move so far
        (0.1, -5.0, -19.0, False),  # the rejected ones alone
        (-5.0, 0.1, -70.0, False),
    ],
)
def test_both_responses_have_to_be_far_below_the_reference(chosen, rejected, logps, warned):
    figures = {"rewards/chosen": chosen, "rewards/rejected": rejected, "logps/chosen": logps}
    line = {f"eval_{name}": value for name, value in figures.items()} | {"eval_rewards/margins": chosen - rejected}
    assert ("than to the reference" in (collapsed(line, DPO) or "")) == warned
    # Of a model that writes no sense nothing else is said, such as that few pairs say little of it.
    line |= {"eval_loss": 0.6, "eval_rewards/accuracies": 0.7, "eval_pairs": 10, "iteration": 1}
    assert len(health([line], DPO)) == 1 and ("than to the reference" in health([line], DPO)[0]) == warned


@pytest.mark.parametrize("chosen, margin, warned", [(-0.5, 0.4, True), (-0.5, 0.6, False), (-0.5, -0.1, True)])
def test_a_fall_of_the_chosen_responses_is_told_where_the_margin_gains_less(chosen, margin, warned):
    first = {"eval_rewards/chosen": 0.0, "eval_rewards/margins": 0.0, "eval_logps/chosen": -20.0}
    last = {"eval_rewards/chosen": chosen, "eval_rewards/margins": margin, "eval_logps/chosen": -25.0}
    assert (WORDS["displaced"] in (displaced(first, last) or "")) == warned
    assert displaced(first, last | {"eval_logps/chosen": -20.9}) is None, "less than a nat"


def test_one_validation_tells_nothing_of_a_change():
    assert health([], DPO) == []
    line = {"iteration": 0, "eval_loss": 0.69, "eval_rewards/accuracies": 0.5, "eval_pairs": 400}
    line |= {f"eval_{name}": 0.0 for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen")}
    assert health([line], DPO) == []
    (said,) = health([line | {"eval_pairs": 80}], DPO)
    assert said.startswith("80 pairs say little: the accuracy of 0.50 is between 0.39 and 0.61 (95 %). Some 396 ")
    assert health([{"iteration": 0, "eval_loss": None}], DPO) == []
    # Of 400 pairs of few prompts, which tell as much as 80 of a prompt each.
    (said,) = health([line], DPO, effective=80)
    assert said.startswith("400 pairs, some of one prompt, say little: ") and "0.39 and 0.61 (95 %). Some 1980" in said


def test_pairs_of_few_prompts_are_told_to_say_little(tmp_path):
    pairs = [pair._replace(prompt=PAIRS[i % 4].prompt) for i, pair in enumerate(some_pairs(400, response=(4, 8)))]
    run(tmp_path, valid=pairs, iters=1, steps_per_eval=1)
    assert "400 pairs, some of one prompt, say little" in (tmp_path / "report.html").read_text()

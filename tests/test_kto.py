"""KTO: TRL's numbers, the formula in float64, single responses and the ones that stand against their prompts."""

import json
from pathlib import Path

import chat_tokenizers as tokenizers
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import load_adapters
from tiny import TINY_LLAMA, short_run, some_pairs, tiny_llama

from mlx_lm.tuner.datasets import Pair, PreferenceDataset
from mlx_lm.tuner.losses import PairLogps, kl_estimate, kto
from mlx_lm.tuner.preference import batches
from mlx_lm.tuner.preference.batches import ARRANGEMENTS, PLAIN, make_batch
from mlx_lm.tuner.preference.figures import as_means
from mlx_lm.tuner.preference.logps import Scorer
from mlx_lm.tuner.preference.objective import Objective, preference_loss
from mlx_lm.tuner.preference.options import ConfigError
from mlx_lm.tuner.preference.pairs import mismatched
from mlx_lm.tuner.preference.reference import Reference
from mlx_lm.tuner.preference.run import warn_of_balance
from mlx_lm.tuner.preference.scores import Scores, write_predictions
from mlx_lm.tuner.trainer import TrainingArgs, evaluate

TRL = json.loads((Path(__file__).parent / "golden" / "trl_kto.json").read_text())
FIGURES = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "kl")


def examples(rows):
    return [Pair(*row[:3], label=row[3]) for row in rows]


def trl_model(adapter):
    return load_adapters(tiny_llama(lora=False), str(TINY_LLAMA / f"adapter_{adapter}"))


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("case", ["nonzero", "zero"])
def test_a_step_has_trls_figures_and_gradient(case, arrangement):
    expected, model, rows = TRL["cases"][case], trl_model(case), examples(TRL["batch"])
    batch = make_batch(rows, arrangement)[0]
    bare = Reference(Scorer(tiny_llama(lora=False), arrangement != PLAIN))
    reference = bare.logps(rows, range(len(rows)))
    assert np.allclose(reference[:, 0, 0], expected["reference_logps"], atol=1e-4)
    assert np.allclose(reference[:, 1, 0], expected["reference_other_logps"], atol=1e-4)
    objective = Objective(Scorer(model), preference_loss("kto", beta=TRL["beta"], **TRL["weights"]))

    def loss(_):
        loss, sums = objective(batch, mx.array(reference), gradient=True)
        return loss / len(rows), sums

    (_, sums), gradient = nn.value_and_grad(model, loss)(model)
    figures, count, tokens = as_means(np.array(sums), objective.further)
    assert count == len(rows) and tokens == sum(len(row.prompt) + len(row.chosen) for row in rows)
    for name in ("loss", *FIGURES):
        assert figures[name] == pytest.approx(expected[name], abs=1e-4), name
    gradient = dict(tree_flatten(gradient))
    for name, values in expected["gradients"].items():
        assert np.abs(np.array(gradient[name]) - np.array(values)).max() <= 1e-3 * np.abs(values).max(), name


@pytest.mark.parametrize("flipped", [False, True])
def test_a_response_is_right_on_its_labels_side_of_the_estimated_kl(flipped):
    rows = [row._replace(label=row.label != flipped) for row in examples(TRL["batch"])]
    objective = Objective(Scorer(trl_model("nonzero")), preference_loss("kto"))
    reference = Reference(Scorer(tiny_llama(lora=False))).logps(rows, range(len(rows)))
    batch = make_batch(rows, objective.scorer.arrangement)[0]
    figures, *_ = as_means(np.array(objective(batch, mx.array(reference))[1]), objective.further)
    ahead = np.array(objective.scorer(batch).total)[: len(rows)] - reference[:, 0, 0] > figures["kl"]
    assert figures["rewards/accuracies"] == pytest.approx(np.mean(ahead == [row.label for row in rows]))


def test_thirty_steps_are_trls(tmp_path, monkeypatch):
    trajectory = TRL["trajectory"]
    rows = examples(trajectory["rows"])
    in_order = np.split(np.arange(len(rows)), len(rows) // trajectory["batch_size"])
    monkeypatch.setattr(batches, "drawn", lambda *_: in_order)
    adam = trajectory["adam"]
    optimizer = optim.Adam(adam["lr"], adam["betas"], adam["eps"], bias_correction=True)
    options = {"loss_type": "kto", "beta": TRL["beta"], "iters": len(in_order), **TRL["weights"]}
    lines, _ = short_run(trl_model("zero"), rows, tmp_path, optimizer, **options)
    for name in ("loss", *FIGURES):
        # TRL leaves out the figures of a kind that a batch has not.
        found, expected = (np.array([*values], float) for values in ([line[name] for line in lines], trajectory[name]))
        np.testing.assert_allclose(found, expected, atol=1e-3, err_msg=name)
    assert np.mean(trajectory["loss"][-5:]) < 0.9 * trajectory["loss"][0] and max(trajectory["kl"]) > 1
    assert None in trajectory["rewards/rejected"]


# The formula


def single(logratios, others, labels, counts=1.0):
    zeros = mx.zeros(len(logratios))
    pairs = PairLogps(
        mx.array(logratios), mx.array(others), zeros, zeros, zeros, zeros, zeros, 0.0, mx.array(counts), labels
    )
    return pairs._replace(kl=kl_estimate(pairs))


def test_values_are_the_formulas():
    logratios, labels = np.array([2.0, -1.0, 0.5, -40.0]), np.array([True, False, False, True])

    def sigma(x):
        return 1 / (1 + np.exp(-x))

    expected = np.where(labels, 1.5 * (1 - sigma(0.3 * (logratios - 0.7))), 0.5 * (1 - sigma(0.3 * (0.7 - logratios))))
    pairs = single(logratios.astype(np.float32), [0.7] * 4, mx.array(labels))
    found = kto(pairs, beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
    np.testing.assert_allclose(np.array(found), expected, rtol=1e-6)


def test_the_gradient_moves_responses_by_their_labels_and_none_reaches_the_estimate():
    def total(logratios, others):
        pairs = single(logratios, others, mx.array([1.0, 0.0]))
        return kto(pairs, beta=0.3, desirable_weight=1.5, undesirable_weight=0.5).sum()

    own, others = mx.grad(total, argnums=(0, 1))(mx.array([0.5, 0.5]), mx.array([1.0, 2.0]))
    # beta x weight x sigma(x) sigma(-x) with x = 0.3 (0.5 - 1.5).
    slope = np.exp(0.3) / (1 + np.exp(0.3)) ** 2
    np.testing.assert_allclose(np.array(own), [-0.45 * slope, 0.15 * slope], rtol=1e-5)
    assert not others.any()


def test_the_estimate_is_a_mean_of_at_least_zero_over_examples_that_count():
    assert single([0.0] * 3, [1.0, 2.0, 99.0], mx.ones(3), [1.0, 1.0, 0.0]).kl.item() == pytest.approx(1.5)
    assert single([0.0] * 2, [-3.0, 1.0], mx.ones(2)).kl.item() == 0.0
    assert single([0.0], [5.0], mx.ones(1), [0.0]).kl.item() == 0.0


def test_one_sided_figures_are_no_numbers_where_there_is_no_such_response():
    objective = Objective(Scorer(tiny_llama()), preference_loss("kto"))
    rows = [pair._replace(label=True) for pair in some_pairs(2)]
    sums = objective(make_batch(rows, objective.scorer.arrangement)[0], mx.zeros((2, 2, 2)))[1]
    figures, *_ = as_means(np.array(sums), objective.further)
    assert np.isnan(figures["rewards/rejected"]) and np.isnan(figures["rewards/margins"])
    assert figures["rewards/chosen"] < 0 and np.isfinite(figures["loss"])


# Rows


def dataset(rows, **options):
    return PreferenceDataset(rows, tokenizers.qwen(), unpaired=True, **options)


LABELLED = [
    {"prompt": "Name a colour.", "completion": "Red.", "label": True},
    {"prompt": "Name a number.", "completion": "Find one.", "label": False},
    {"prompt": "Name a number.", "completion": "Seven.", "label": 1},
]


def test_rows_with_a_label_keep_it_and_get_a_response_to_another_prompt():
    found = dataset(LABELLED)
    assert [found[i].label for i in range(3)] == [True, False, True]
    for i in range(3):
        (other,) = {j for j in range(3) if found[j].chosen == found[i].rejected}
        assert found[other].prompt != found[i].prompt


def test_conversations_are_the_same_as_strings(capsys):
    talks = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
            "label": row["label"],
        }
        for row in LABELLED
    ]
    one, two = dataset(LABELLED), dataset(talks)
    assert [one[i] for i in range(3)] == [two[i] for i in range(3)]
    assert "prompt, completion, label" in one.layout and "not read" not in one.layout
    assert "left out" not in capsys.readouterr().out


def test_a_prompt_under_another_key_is_told_by_it():
    asked = [{"question": row["prompt"], "completion": row["completion"], "label": row["label"]} for row in LABELLED]
    found, usual = dataset(asked), dataset(LABELLED)
    assert found.layout.startswith("rows are read as question, completion, label;") and found[0] == usual[0]
    assert dataset(asked, prompt_feature="question").layout == found.layout


def test_a_pair_becomes_two_responses():
    rows = [
        {"prompt": "Name a colour.", "chosen": "Red.", "rejected": "No.", "weight": 2.0},
        {"prompt": "Name a number.", "chosen": "Seven.", "rejected": "Why?"},
    ]
    found, pairs = dataset(rows), PreferenceDataset(rows, tokenizers.qwen())
    assert len(found) == 4
    for i in range(2):
        good, bad = found[2 * i], found[2 * i + 1]
        assert (good.chosen, bad.chosen) == (pairs[i].chosen, pairs[i].rejected)
        assert (good.label, bad.label) == (True, False) and good.weight == bad.weight == pairs[i].weight


def test_rows_of_a_table_that_has_pairs_too_have_no_values_in_those_columns():
    pair = {"prompt": "Name a word.", "chosen": "Yes.", "rejected": "No."}
    columns = dict.fromkeys((*LABELLED[0], *pair))
    found, expected = dataset([columns | row for row in (*LABELLED, pair)]), dataset([*LABELLED, pair])
    assert [found[i] for i in range(5)] == [expected[i] for i in range(5)]


def test_responses_to_other_prompts_are_cut_to_the_length():
    rows = [*LABELLED[:1], {"prompt": "Why?", "completion": "Because it is so, and was ever so before.", "label": True}]
    whole = dataset(rows)
    longest = len(whole[1].prompt) + len(whole[1].chosen)
    assert len(whole[0].prompt) + len(whole[1].chosen) > longest
    cut = dataset(rows, max_seq_length=longest)
    assert cut[1].chosen == whole[1].chosen
    assert cut[0].rejected == whole[1].chosen[: longest - len(whole[0].prompt)]


def test_responses_to_other_prompts_are_of_the_same_part_where_some_are_held_out():
    rows = [{"prompt": f"Name {i}.", "completion": f"It is {i}.", "label": i % 2 == 0} for i in range(8)]
    for part in dataset(rows).split(0.25, seed=0):
        assert {tuple(pair.rejected) for pair in part} == {tuple(pair.chosen) for pair in part}
        assert all(pair.rejected != pair.chosen for pair in part)


def test_what_is_not_scored_goes_with_its_response():
    pairs = [
        Pair([1, 2], [3, 4, 5], [], unscored=(((1, 2),), ()), label=True),
        Pair([6], [7, 8, 9, 10], [], label=False),
    ]
    first, second = mismatched(pairs, 5, "rows")
    assert first.unscored == (((1, 2),), ()) and first.rejected == [7, 8, 9]
    assert second.unscored == ((), ((1, 2),)) and second.rejected == [3, 4, 5]


@pytest.mark.parametrize(
    "change, told",
    [
        ({"label": "good"}, "label is 'good'; it must be true or false"),
        ({"label": None}, "label is None"),
        ({"prompt": None}, "there is no prompt"),
        ({"completion": None}, "completion is null"),
        ({"completion": 3}, "completion is"),
    ],
)
def test_malformed_rows_are_refused(change, told):
    with pytest.raises(ConfigError, match=told):
        dataset([*LABELLED, {**LABELLED[0], **change}])


def test_one_prompt_is_refused():
    with pytest.raises(ConfigError, match="the 2 responses of a training, validation or test set have one prompt only"):
        dataset(LABELLED[1:])


def test_uneven_labels_are_told(capsys):
    loss, rows = preference_loss("kto"), [Pair([1], [2], [3], label=i > 2) for i in range(12)]
    warn_of_balance(rows, loss)
    told = " ".join(capsys.readouterr().out.split())
    assert "9 responses are desirable and 3 are not" in told and "an undesirable_weight of 3." in told
    for fits in (preference_loss("kto", undesirable_weight=3.0), preference_loss("dpo")):
        warn_of_balance(rows, fits)
    assert capsys.readouterr().out == ""


def test_the_advised_weight_is_not_advised_again(capsys):
    rows = [Pair([1], [2], [3], label=i == 0) for i in range(8)]
    warn_of_balance(rows, preference_loss("kto"))
    assert "an undesirable_weight of 0.143." in " ".join(capsys.readouterr().out.split())
    warn_of_balance(rows, preference_loss("kto", undesirable_weight=0.143))
    assert capsys.readouterr().out == ""


def test_predictions_have_the_own_sides_figures(tmp_path):
    figures = {
        "rewards/chosen": [1.0, 0.0],
        "rewards/rejected": [0.0, -2.0],
        "loss": [0.1, 0.2],
        "desirable": [1.0, 0.0],
    }
    figures = {name: np.array(values) for name, values in figures.items()}
    logps, places = np.array([[-3.0, -4.0], [-5.0, -6.0]]), ["a, row 0", "a, row 1"]
    scores = Scores(figures, logps, places, [None, None], None, np.arange(2))
    write_predictions(tmp_path / "file", scores)
    first, second = map(json.loads, (tmp_path / "file").read_text().splitlines())
    assert first["rewards/chosen"] == 1.0 and first["reference_logps/chosen"] == -3.0
    assert second["rewards/rejected"] == -2.0 and second["reference_logps/rejected"] == -5.0
    assert not [key for key in first if "rejected" in key] + [key for key in second if "chosen" in key]


def test_data_of_the_other_kind_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="reads single responses with labels"):
        short_run(tiny_llama(), some_pairs(4), tmp_path, loss_type="kto")
    with pytest.raises(ConfigError, match="reads pairs"):
        short_run(tiny_llama(), [pair._replace(label=True) for pair in some_pairs(4)], tmp_path)
    with pytest.raises(ConfigError, match="single responses, not pairs; name it alone"):
        preference_loss(["kto", "sft"])
    with pytest.raises(ConfigError, match="are 0, with which nothing is trained"):
        preference_loss("kto", desirable_weight=0, undesirable_weight=0)


@pytest.mark.parametrize("loss_type, form", [("kto", "single responses with labels"), ("dpo", "pairs")])
def test_rows_of_the_other_form_are_no_validation_and_no_evaluation(tmp_path, loss_type, form):
    pairs = some_pairs(4)
    labelled = [pair._replace(label=i % 2 == 0) for i, pair in enumerate(pairs)]
    own, others = (labelled, pairs) if loss_type == "kto" else (pairs, labelled)
    told = f"loss_type {loss_type} reads {form}, and the data set holds others"
    with pytest.raises(ConfigError, match=told):
        short_run(tiny_llama(), own, tmp_path, valid=others, loss_type=loss_type)
    args = TrainingArgs(loss_type=loss_type, reference_cache="none")
    with pytest.raises(ConfigError, match=told):
        evaluate(tiny_llama(), others, 4, -1, args=args)
    assert evaluate(tiny_llama(), own, 4, -1, args=args)["loss"] > 0

"""What a run saves: a resumed run ends with the weights of one that was never interrupted, bit for bit."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.utils import build_schedule, linear_to_lora_layers

from mlx_lm.tuner.preference import report
from mlx_lm.tuner.preference.checkpoint import (
    STATE_FILE,
    Progress,
    _write_state,
    find_state,
    read_state,
    restore_run,
    save_adapters,
    save_run,
    starting_point,
)
from mlx_lm.tuner.preference.files import give_second_name, replace_file, replace_files
from mlx_lm.tuner.preference.interruption import Interrupted
from mlx_lm.tuner.preference.logps import Scorer
from mlx_lm.tuner.preference.metrics import read_validations
from mlx_lm.tuner.preference.nonfinite import refuse_non_finite_steps, refuse_non_finite_weights
from mlx_lm.tuner.preference.objective import Objective, preference_loss
from mlx_lm.tuner.preference.options import ConfigError
from mlx_lm.tuner.preference.outcome import Outcome
from mlx_lm.tuner.preference.pairs import Pair
from mlx_lm.tuner.preference.reference import RunData
from mlx_lm.tuner.preference.step import Step
from mlx_lm.tuner.trainer import TrainingArgs, TrainingCallback, train
from mlx_lm.utils import load_model

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden" / "tiny_llama"
RANK = 4


def pairs(count=12, seed=3):
    """Pairs of uneven lengths, in which no length repeats a batch's shape everywhere."""
    random = np.random.default_rng(seed)

    def tokens(low, high):
        return random.integers(3, 97, random.integers(low, high)).tolist()

    return [Pair(tokens(9, 16), tokens(2, 8), tokens(2, 8)) for _ in range(count)]


def single(*of):
    """The same as single responses, of which some are desirable."""
    return [pair._replace(label=pair.prompt[0] % 2 > 0) for pair in pairs(*of)]


@pytest.fixture(autouse=True)
def no_plot(monkeypatch):
    """Drawing takes longer than training here."""
    monkeypatch.setattr("mlx_lm.tuner.preference.outcome.plot_metrics", lambda *_: None)


class Stopped(Exception):
    pass


class StopAt(TrainingCallback):
    """Ends the run in the middle of an iteration, as a crash would: the file of that report is written, no more."""

    def __init__(self, iteration):
        self.iteration = iteration

    def on_train_loss_report(self, train_info):
        if train_info["iteration"] == self.iteration:
            raise Stopped


def trained(
    folder,
    stop=None,
    kind="lora",
    layers=2,
    make=optimizers.Adam,
    rate=1e-2,
    dropout=0.0,
    config=None,
    data=None,
    **options,
):
    """Train the tiny Llama on `pairs`; returns the last checkpoint's arrays, by name."""
    mx.random.seed(7)
    model, _ = load_model(GOLDEN)
    model.freeze()
    if kind == "full":
        for layer in model.layers[-layers:]:
            layer.unfreeze()
    else:
        if kind == "qlora":
            nn.quantize(model, group_size=32, bits=4)
        linear_to_lora_layers(model, layers, {"rank": RANK, "scale": 4.0, "dropout": dropout}, use_dora=kind == "dora")
    schedule = options.pop("lr_schedule", None)
    given = {"iters": 7, "batch_size": 2, "steps_per_report": 1, "steps_per_save": 3, "steps_per_eval": 100, "seed": 5}
    given |= {"loss_type": "dpo", "reference_cache": "none", "adapter_file": str(folder / "adapters.safetensors")}
    train(
        model=model,
        optimizer=make(learning_rate=build_schedule(schedule) if schedule else rate),
        train_dataset=(data or pairs)(),
        val_dataset=(data or pairs)(3, 4),
        args=TrainingArgs(**(given | options)),
        training_callback=StopAt(stop),
        config=config,
    )
    return mx.load(str(folder / STATE_FILE))


CASES = {
    "lora": {},
    "in the middle of an accumulation": {"grad_accumulation_steps": 2},
    "before the first update": {"grad_accumulation_steps": 5},
    "dropout": {"dropout": 0.3},
    # A validation before the next update is against the reference that was saved.
    "reference updates": {"reference_update_steps": 2, "steps_per_eval": 4},
    "a moving reference": {"reference_update_steps": 2, "reference_mixup_alpha": 0.3},
    "faster second matrices": {"lora_plus_ratio": 4.0, "grad_accumulation_steps": 2},
    "reference updates, accumulation, dropout": {
        "reference_update_steps": 1,
        "grad_accumulation_steps": 2,
        "dropout": 0.2,
    },
    "schedule": {"lr_schedule": {"name": "cosine_decay", "arguments": [1e-2, 7], "warmup": 2}},
    "full": {"kind": "full", "rate": 1e-3},
    "full, accumulation": {"kind": "full", "rate": 1e-3, "grad_accumulation_steps": 2},
    "the last layer": {"layers": 1, "grad_accumulation_steps": 2},
    "the last layer, full": {"kind": "full", "layers": 1, "rate": 1e-3},
    "dora": {"kind": "dora"},
    "qlora": {"kind": "qlora"},
    "sgd": {"make": lambda learning_rate: optimizers.SGD(learning_rate, momentum=0.9)},
    "muon": {"make": optimizers.Muon},
    "adafactor": {"make": optimizers.Adafactor},
    "adamw, clipped": {"make": optimizers.AdamW, "max_grad_norm": 0.1},
    "compiled, accumulation, dropout": {"compile": True, "grad_accumulation_steps": 2, "dropout": 0.2},
    "gradient checkpointing, dropout": {"grad_checkpoint": True, "dropout": 0.2},
    "without a reference": {"loss_type": "simpo", "beta": 2.0},
    "plain prompts": {"share_prompt": False},
    "two losses": {"loss_type": ["dpo", "sft"], "loss_weights": [1.0, 0.5]},
    "single responses": {"loss_type": "kto", "data": single},
}


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_ends_with_the_weights_of_one_that_was_not_interrupted(name, tmp_path):
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    expected = trained(whole, keep_checkpoints=3, **CASES[name])
    # What a run leaves that saved after iteration 3 and was stopped in 5: two iterations are lost and taken again.
    parted.mkdir()
    for file, there in (
        (STATE_FILE, f"0000003_{STATE_FILE}"),
        ("adapters.safetensors", "0000003_adapters.safetensors"),
    ):
        (parted / file).write_bytes((whole / there).read_bytes())
    lines = [line for line in metrics(whole) if line["iteration"] <= 5]
    (parted / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = mx.load(str(parted / "adapters.safetensors"))
    found = trained(parted, resume=True, **CASES[name])
    assert found.keys() == expected.keys()
    different = [key for key in expected if not mx.array_equal(found[key], expected[key], equal_nan=True).item()]
    assert different == []
    after = mx.load(str(parted / "adapters.safetensors"))
    assert any(not mx.array_equal(after[key], before[key]).item() for key in after)
    assert [line["iteration"] for line in metrics(parted) if "loss" in line] == list(range(1, 8))
    losses = [[line["eval_loss"] for line in metrics(folder) if "eval_loss" in line] for folder in (parted, whole)]
    assert losses[0] == losses[1]


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_runs_above_have_what_they_are_named_for(tmp_path):
    plain = trained(tmp_path / "plain")
    # Dropout moves the weights, so that a lost random state would be seen.
    dropped = trained(tmp_path / "dropout", dropout=0.3)
    assert any(not mx.array_equal(plain[key], dropped[key]).item() for key in plain if key.startswith("model."))
    with pytest.raises(Stopped):
        trained(tmp_path / "accumulation", stop=4, grad_accumulation_steps=2)
    middle = mx.load(str(tmp_path / "accumulation" / STATE_FILE))
    # Iteration 3 begins an accumulation of two: 2 pairs of a gradient that is not zero.
    assert middle["pairs"].item() == 2
    assert mx.abs(middle["gradient.part_1.lora_b"]).max().item() > 0
    updated = trained(tmp_path / "reference", reference_update_steps=2)
    assert "logps.reference" in updated and "logps.reference" not in plain


def test_resume_goes_on_at_the_checkpoint_and_not_from_the_start(tmp_path, capsys):
    with pytest.raises(Stopped):
        trained(tmp_path, stop=5)
    assert mx.load(str(tmp_path / STATE_FILE), return_metadata=True)[1]["iteration"] == "3"
    # A line that the interruption cut short is dropped with the iterations that are taken again.
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 6, "lo')
    capsys.readouterr()
    trained(tmp_path, resume=True)
    # Iteration 0 is validated at a run's start only.
    shown = capsys.readouterr().out
    assert [line["iteration"] for line in metrics(tmp_path) if "loss" in line] == [1, 2, 3, 4, 5, 6, 7]
    assert [line["iteration"] for line in metrics(tmp_path) if "eval_loss" in line] == [0, 7]
    # A line each for iterations 4 to 7, and one for the validation at the end.
    rows = re.findall(r"^ *(\d+) .*\d\.\d{3}", re.sub(r"\x1b\[[0-9;]*m", "", shown), re.MULTILINE)
    assert rows == ["4", "5", "6", "7", "7"]


def test_a_finished_run_can_be_made_longer(tmp_path):
    trained(tmp_path / "parted", iters=3)
    found = trained(tmp_path / "parted", resume=True)
    expected = trained(tmp_path / "whole")
    # Close, not equal: the shorter run took the reference of fewer rows at once, which rounds otherwise.
    for key in expected:
        assert mx.allclose(found[key], expected[key], rtol=1e-3, atol=1e-4).item(), key


@pytest.mark.parametrize("every", [2, 3, 6])
def test_a_run_whose_reference_follows_the_policy_can_be_made_longer(every, tmp_path):
    options = {"reference_update_steps": every, "steps_per_save": 100}
    trained(tmp_path / "parted", iters=4, **options)
    found = trained(tmp_path / "parted", resume=True, iters=9, **options)
    expected = trained(tmp_path / "whole", iters=9, **options)
    assert [key for key in expected if not mx.array_equal(found[key], expected[key], equal_nan=True).item()] == []


@pytest.mark.parametrize("option", [{"reference_update_steps": 9}, {"save_best": "accuracy"}, {"early_stop": 9}])
def test_the_reference_or_best_figure_of_other_validation_rows_is_not_gone_on_with(option, tmp_path):
    options = {"iters": 3} | option
    trained(tmp_path, val_batches=1, **options)
    with pytest.raises(ConfigError, match="the number of validation pairs changed"):
        trained(tmp_path, val_batches=2, resume=True, **options)
    data = iter([pairs(), pairs(3, 8)])
    with pytest.raises(ConfigError, match="but the validation data changed"):
        trained(tmp_path, val_batches=1, resume=True, data=lambda *of: next(data), **options)


def test_what_only_one_of_two_runs_compares_is_not_told_as_changed(tmp_path):
    trained(tmp_path, iters=3)
    with pytest.raises(ConfigError, match="as it was begun, but save_best was None and is 'accuracy'.$"):
        trained(tmp_path, resume=True, save_best="accuracy")


def test_a_digest_of_the_model_that_was_taken_in_another_way_is_not_compared(tmp_path):
    """An earlier version's, under its own name: it says nothing of the model."""
    trained(tmp_path, iters=3)
    arrays, metadata = mx.load(str(tmp_path / STATE_FILE), return_metadata=True)
    settings = json.loads(metadata["settings"])
    (name,) = [key for key in settings if "it begins with" in key]
    metadata["settings"] = json.dumps({"the model or the adapter it begins with": settings.pop(name)[::-1]} | settings)
    del metadata["digest"]
    _write_state(tmp_path / STATE_FILE, arrays, metadata)
    trained(tmp_path, iters=4, resume=True)
    assert metrics(tmp_path)[-1]["iteration"] == 4


def test_figures_of_other_validation_pairs_are_said_not_to_compare(tmp_path, capsys):
    trained(tmp_path, iters=3, val_batches=0)
    trained(tmp_path, iters=4, val_batches=1, resume=True)
    trained(tmp_path, iters=5, val_batches=1, resume=True)
    assert "do not compare" not in capsys.readouterr().out
    trained(tmp_path, iters=6, val_batches=2, resume=True)
    assert "to validate on are not those up to iteration 5: figures before and after do not" in capsys.readouterr().out
    data = iter([pairs(), pairs(3, 8)])
    trained(tmp_path, iters=7, val_batches=2, resume=True, data=lambda *of: next(data))
    assert "to validate on are not those up to iteration 6: figures before and after do not" in capsys.readouterr().out


def test_the_best_validation_is_one_of_the_last_ones_pairs(tmp_path):
    options = {"steps_per_eval": 1}
    trained(tmp_path, iters=3, val_batches=1, **options)
    trained(tmp_path, iters=4, val_batches=1, resume=True, **options)
    assert [line["iteration"] for line in read_validations(tmp_path)] == [0, 1, 2, 3, 4]
    trained(tmp_path, iters=6, val_batches=2, resume=True, **options)
    assert [line["iteration"] for line in read_validations(tmp_path)] == [5, 6]
    assert [line["iteration"] for line in metrics(tmp_path) if "eval_loss" in line] == [0, 1, 2, 3, 4, 5, 6]


def test_saves_between_two_reports_lose_no_tokens(tmp_path):
    options = {"steps_per_report": 4, "keep_checkpoints": 9}
    trained(tmp_path / "whole", iters=8, **options)
    (tmp_path / "parted").mkdir()
    (tmp_path / "parted" / STATE_FILE).write_bytes((tmp_path / "whole" / f"0000006_{STATE_FILE}").read_bytes())
    trained(tmp_path / "parted", iters=8, resume=True, **options)
    tokens = [metrics(tmp_path / name)[-2]["trained_tokens"] for name in ("whole", "parted")]
    assert tokens[0] == tokens[1] > 0


def test_the_last_steps_of_a_run_that_ends_early_are_reported(tmp_path):
    options = {"steps_per_report": 10, "steps_per_eval": 2, "early_stop": 1, "rate": 0.0, "iters": 20}
    trained(tmp_path, **options)
    lines = [line for line in metrics(tmp_path) if "loss" in line]
    assert [line["iteration"] for line in lines] == [2]


def test_a_signal_at_a_save_leaves_its_numbered_adapters(tmp_path, monkeypatch):
    def asked(request, meets):
        steps.append(meets)
        request.number = signal.SIGTERM if len(steps) == 3 else None
        return len(steps) == 3

    steps = []
    monkeypatch.setattr("mlx_lm.tuner.preference.run.asked_anywhere", asked)
    with pytest.raises(Interrupted):
        trained(tmp_path, config={})
    trained(tmp_path, config={}, resume=True)
    assert {path.name for path in tmp_path.glob("0*_adapters*")} == {f"000000{n}_adapters.safetensors" for n in (3, 6)}
    assert (tmp_path / "0000003" / "adapters.safetensors").is_file()


def test_a_gradient_that_will_be_left_out_stops_no_save(tmp_path, monkeypatch):
    heavy = [pair._replace(weight=3e38 if i % 2 else 1.0) for i, pair in enumerate(pairs())]
    monkeypatch.setattr(sys.modules[__name__], "pairs", lambda *_, **__: heavy)
    options = {"grad_accumulation_steps": 2, "steps_per_save": 1, "iters": 5, "on_nonfinite": "skip"}
    trained(tmp_path, **options)
    assert metrics(tmp_path)[-2]["skipped_updates"] > 0
    with pytest.raises(ConfigError, match="not finite"):
        trained(tmp_path / "refused", **options | {"on_nonfinite": "stop"})


def test_numbers_of_numpy_are_numbers(tmp_path):
    trained(tmp_path, iters=np.int64(1), batch_size=np.int32(2), clear_cache_threshold="1MB")


@pytest.mark.parametrize(
    "option", [{"steps_per_eval": 0}, {"steps_per_save": 0}, {"batch_size": 0}, {"save_best": "acc"}, {"iters": 0}]
)
def test_options_out_of_range_are_refused_before_anything_is_moved(option, tmp_path):
    trained(tmp_path, iters=1)
    with pytest.raises(ConfigError, match=" must be "):
        trained(tmp_path, **option)
    assert not (tmp_path / "earlier-1").exists()


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


CONFIG = {"learning_rate": 1e-2, "optimizer": "adam", "lora_parameters": {"rank": RANK, "scale": 4.0, "dropout": 0.0}}


@pytest.mark.parametrize(
    "options, told",
    [
        ({"batch_size": 3}, "batch_size was 2 and is 3"),
        ({"seed": 6}, "seed was 5 and is 6"),
        ({"loss_type": "ipo"}, r"loss_type was \['dpo'\] and is \['ipo'\]"),
        ({"kind": "full"}, "holds other weights than this run trains"),
        ({"kind": "qlora"}, "the model or adapter it begins with changed"),
    ],
)
def test_resume_refuses_another_run(options, told, tmp_path):
    trained(tmp_path, iters=3, config=CONFIG)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=told):
        trained(tmp_path, resume=True, **({"config": CONFIG} | options))
    assert contents(tmp_path) == before


def test_resume_refuses_other_data_and_other_weights_of_pairs(tmp_path, monkeypatch):
    trained(tmp_path, iters=3)
    for change in ({"chosen": [5, 6, 7]}, {"weight": 0.5}):
        changed = [pairs()[0]._replace(**change), *pairs()[1:]]
        monkeypatch.setattr(sys.modules[__name__], "pairs", lambda *_, changed=changed, **__: changed)
        with pytest.raises(ConfigError, match="the training data changed"):
            trained(tmp_path, resume=True)
        monkeypatch.undo()


def test_resume_refuses_other_weights_under_the_reference_models_name(tmp_path, monkeypatch):
    def load(name, **_):
        model, _ = load_model(GOLDEN)
        model.update(tree_map(lambda value: factor * value, model.parameters()))
        return model, None

    monkeypatch.setattr("mlx_lm.utils.load", load)
    factor = 1.1
    trained(tmp_path, iters=3, reference_model="other")
    trained(tmp_path, iters=4, reference_model="other", resume=True)
    factor = 1.2
    with pytest.raises(ConfigError, match="but the weights of the reference model changed"):
        trained(tmp_path, iters=5, reference_model="other", resume=True)


def test_settings_left_at_their_default_are_the_same_as_the_default_given(tmp_path):
    trained(tmp_path, iters=3)
    trained(tmp_path, resume=True, beta=0.1, loss_type=["dpo"], loss_weights=[1.0], label_smoothing=0.0)


def test_a_checkpoint_that_does_not_fit_is_told_before_the_reference_pass(tmp_path, monkeypatch):
    trained(tmp_path, iters=3)
    monkeypatch.setattr(
        "mlx_lm.tuner.preference.reference.Reference.logps", lambda *_: pytest.fail("the reference pass ran")
    )
    with pytest.raises(ConfigError, match="beta was 0.1 and is 0.5"):
        trained(tmp_path, resume=True, beta=0.5)


def test_resume_without_a_checkpoint_is_told(tmp_path):
    with pytest.raises(ConfigError, match="resume needs .*checkpoint.safetensors, and there is none; leave resume out"):
        trained(tmp_path, resume=True)
    assert not list(tmp_path.iterdir())


def test_the_random_state_is_that_of_the_saved_run(tmp_path):
    model, _ = load_model(GOLDEN)
    objective = Objective(Scorer(model), preference_loss("dpo"))
    step = Step(model, optimizers.Adam(learning_rate=0.1), objective, compiled=False)
    args, data = TrainingArgs(adapter_file=tmp_path / "adapters.safetensors"), RunData([], [], [])
    mx.random.seed(2**40 + 12345)
    mx.random.normal((3,))
    save_run(step, data, Progress(iteration=1), {}, args, None)
    expected = [mx.random.uniform(shape=(5,)).tolist() for _ in range(3)]
    mx.random.seed(0)
    assert restore_run(tmp_path / STATE_FILE, step, data).iteration == 1
    assert [mx.random.uniform(shape=(5,)).tolist() for _ in range(3)] == expected


class TestNonFinite:
    def test_a_loss_that_becomes_nan_leaves_the_saved_adapters(self, tmp_path):
        trained(tmp_path, iters=3)
        saved = {name: (tmp_path / name).read_bytes() for name in ("adapters.safetensors", STATE_FILE)}
        with pytest.raises(
            ConfigError,
            match="the loss is nan at iteration 2, on the pairs 7 of the training data, 10 of ",
        ):
            trained(tmp_path, rate=1e30, make=optimizers.SGD)
        # They are moved aside when a run begins anew.
        assert {name: (tmp_path / "earlier-1" / name).read_bytes() for name in saved} == saved
        # Iteration 1's loss is log 2, but the weights that follow from it are no numbers.
        with pytest.raises(ConfigError, match="weights are not finite after iteration 1"):
            trained(tmp_path, rate=float("inf"), steps_per_save=1, make=optimizers.SGD)
        assert {name: (tmp_path / "earlier-1" / name).read_bytes() for name in saved} == saved

    def test_weights_are_checked_where_no_report_came_before_the_save(self, tmp_path):
        with pytest.raises(ConfigError, match="the loss is nan at iteration 2, on the pairs .* A lower learning_rate"):
            trained(tmp_path, rate=1e30, steps_per_report=100, make=optimizers.SGD)
        assert not (tmp_path / "adapters.safetensors").exists()

    def test_every_array_of_a_tree_counts(self):
        refuse_non_finite_weights([{"a": mx.zeros(3), "b": [mx.array([1, 2])]}, []], 1)
        for value in (float("nan"), float("inf"), -float("inf")):
            with pytest.raises(ConfigError, match="not finite after iteration 9"):
                refuse_non_finite_weights([{"a": mx.zeros(3), "b": [mx.array([1.0, value])]}], 9)


class TestLeftOut:
    """`on_nonfinite: skip`: an update whose gradient is not finite is left out and counted."""

    @pytest.mark.parametrize("compiled", [False, True])
    def test_it_changes_nothing_and_the_others_go_on(self, compiled, tmp_path, monkeypatch):
        heavy = [pairs()[0]._replace(weight=1e38), *pairs()[1:]]
        monkeypatch.setattr(sys.modules[__name__], "pairs", lambda *_, **__: heavy)
        found = trained(tmp_path, iters=6, on_nonfinite="skip", compile=compiled)
        assert all(mx.isfinite(value).all().item() for name, value in found.items() if name.startswith("model."))
        assert found["optimizer.step"].item() == 5
        lines = [line for line in metrics(tmp_path) if "loss" in line]
        assert lines[-1]["skipped_updates"] == 1 and len(lines) < 7
        with pytest.raises(ConfigError, match="0 of the training data has a weight of 1e.38: that is the likely cause"):
            trained(tmp_path, iters=6, compile=compiled)

    def test_a_row_that_an_earlier_step_took_is_named(self):
        """A finite gradient, whose square in Adam's moments is not: only the next step's loss shows it."""
        rows = {1: np.array([0, 1]), 2: np.array([2, 3])}
        heavy = [pair._replace(weight=1e38 if i == 1 else 1.0) for i, pair in enumerate(pairs(4))]
        schedule = SimpleNamespace(rows=rows.get, pairs=heavy)
        with pytest.raises(ConfigError, match="iteration 2, on the pairs row 2, 3; .* row 1 has a weight of 1e.38"):
            refuse_non_finite_steps([0.7, np.nan], [None, None], 1, schedule, "row {}".format)
        with pytest.raises(ConfigError, match="the gradient is not finite at iteration 1, on the pairs row 0, 1; "):
            refuse_non_finite_steps([0.7, 0.7], [np.inf, None], 1, schedule, "row {}".format)

    @pytest.mark.parametrize("every", [1, 12])
    def test_a_run_without_a_finite_update_ends(self, every, tmp_path, monkeypatch):
        monkeypatch.setattr(report, "MOST_LOST", 4)
        heavy = [pair._replace(weight=1e38) for pair in pairs()]
        monkeypatch.setattr(sys.modules[__name__], "pairs", lambda *_, **__: heavy)
        options = {"steps_per_report": every, "on_nonfinite": "skip"}
        assert "model." in " ".join(trained(tmp_path, iters=3, **options)), "some lost updates end no run"
        last = 4 if every == 1 else 6
        with pytest.raises(ConfigError, match=f"in the last {last} updates, up to iteration {last}"):
            trained(tmp_path / "more", iters=6, **options)


class TestEarlierStates:
    def test_so_many_are_kept_and_the_newest_sound_one_is_taken(self, tmp_path, capsys):
        whole = trained(tmp_path / "whole", iters=7, steps_per_save=2)
        trained(tmp_path / "parted", iters=7, steps_per_save=2, keep_checkpoints=3)
        states = sorted(path.name for path in (tmp_path / "parted").glob("*checkpoint*"))
        assert states == ["0000004_checkpoint.safetensors", "0000006_checkpoint.safetensors", STATE_FILE]
        for name in (STATE_FILE, "0000006_checkpoint.safetensors"):
            flip_a_bit(tmp_path / "parted" / name)
        found = trained(tmp_path / "parted", resume=True, keep_checkpoints=3, steps_per_save=2)
        told = " ".join(capsys.readouterr().out.split())
        assert told.count("its content is not what was written); the one before it, of iteration 4, is taken") == 2
        assert all(mx.array_equal(found[key], whole[key], equal_nan=True).item() for key in whole)
        # A damaged state is never kept as one to go on from.
        for path in (tmp_path / "parted").glob("*checkpoint*"):
            read_state(path)

    def test_a_copy_that_the_user_made_is_left_alone_and_takes_no_states_place(self, tmp_path):
        trained(tmp_path, iters=4, steps_per_save=2)
        copies = [tmp_path / f"{name}_{STATE_FILE}" for name in ("20261127", "4_good")]
        for copy in copies:
            copy.write_bytes((tmp_path / STATE_FILE).read_bytes())
        trained(tmp_path, iters=7, steps_per_save=2, resume=True)
        assert all(copy.is_file() for copy in copies)
        assert (tmp_path / f"0000006_{STATE_FILE}").is_file(), "the state before the last one"

    def test_any_flipped_bit_is_found(self, tmp_path):
        trained(tmp_path, iters=3, steps_per_save=100)
        content = (tmp_path / STATE_FILE).read_bytes()
        draw = np.random.default_rng(0).integers
        for place in [*draw(8, len(content), 100), len(content) - 1]:
            flip_a_bit(tmp_path / STATE_FILE, place, content)
            with pytest.raises(ConfigError, match="is damaged or no checkpoint"):
                find_state(tmp_path, None, {}, 3)

    @pytest.mark.parametrize("part", ["random", "optimizer.part_0", "gradient.", "optimizer.step"])
    def test_a_state_with_a_part_missing_is_told(self, part, tmp_path):
        trained(tmp_path, iters=3, grad_accumulation_steps=2)
        with pytest.raises(Stopped):
            trained(tmp_path, stop=4, iters=7, grad_accumulation_steps=2)
        arrays, metadata = mx.load(str(tmp_path / STATE_FILE), return_metadata=True)
        rest = {name: value for name, value in arrays.items() if not name.startswith(part)}
        assert len(rest) < len(arrays)
        del metadata["digest"]
        _write_state(tmp_path / STATE_FILE, rest, metadata)
        with pytest.raises(ConfigError, match="lacks a part"):
            trained(tmp_path, iters=7, resume=True, grad_accumulation_steps=2)


def flip_a_bit(path, place=-1, content=None):
    content = bytearray(path.read_bytes() if content is None else content)
    content[place] ^= 1
    path.write_bytes(bytes(content))


class TestResumeAuto:
    def test_it_starts_where_there_is_nothing_and_goes_on_where_there_is_something(self, tmp_path, capsys):
        expected = trained(tmp_path / "whole")
        with pytest.raises(Stopped):
            trained(tmp_path / "parted", stop=5, resume="auto")
        assert "Going on" not in capsys.readouterr().out
        for _ in range(2):  # a restart loop may begin a run that is done once more
            found = trained(tmp_path / "parted", resume="auto")
            assert all(mx.array_equal(found[key], expected[key]).item() for key in expected)
        told = " ".join(capsys.readouterr().out.split())
        assert "Going on after iteration 3 of 7" in told and "Going on after iteration 7 of 7" in told
        assert not (tmp_path / "parted" / "earlier-1").exists()


class TestFolder:
    def test_a_file_system_without_links_has_copies(self, tmp_path, monkeypatch):
        def refused(*_):
            raise OSError(errno.ENOTSUP, "Operation not supported")

        monkeypatch.setattr(os, "link", refused)
        trained(tmp_path, iters=3)
        assert (tmp_path / "0000003_adapters.safetensors").read_bytes() == (
            tmp_path / "adapters.safetensors"
        ).read_bytes()

    def test_a_second_run_is_refused_while_the_first_lives(self, tmp_path):
        script = "import sys, time; from mlx_lm.tuner.preference.files import locked\n"
        script += "with locked(sys.argv[1]): print('ready', flush=True); time.sleep(60)"
        holder = subprocess.Popen([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, cwd=ROOT)
        try:
            assert holder.stdout.readline() == b"ready\n"
            with pytest.raises(ConfigError, match="another run writes to adapter_path .*; wait for its end or give"):
                trained(tmp_path, iters=1)
        finally:
            holder.kill()
            holder.wait()
            holder.stdout.close()
        trained(tmp_path, iters=1)  # a dead process holds nothing

    def test_an_earlier_run_is_moved_aside_and_said(self, tmp_path, capsys):
        trained(tmp_path, iters=3, config=dict(CONFIG))
        before = contents(tmp_path)
        (tmp_path / "notes.txt").write_text("mine")
        for number in (1, 2):
            trained(tmp_path, iters=2, config=dict(CONFIG))
            told = " ".join(capsys.readouterr().out.split())
            assert f"The files of an earlier run in {tmp_path} are now in {tmp_path / f'earlier-{number}'}." in told
        assert contents(tmp_path / "earlier-1") == before
        assert (tmp_path / "notes.txt").read_text() == "mine"

    def test_a_link_that_leads_nowhere_has_its_name(self, tmp_path, capsys):
        trained(tmp_path, iters=3)
        (tmp_path / "earlier-1").symlink_to("nowhere")
        trained(tmp_path, iters=2)
        assert f"are now in {tmp_path / 'earlier-2'}." in " ".join(capsys.readouterr().out.split())

    def test_a_configuration_that_a_program_wrote_for_its_run_stays(self, tmp_path, capsys):
        text = json.dumps(CONFIG)
        (tmp_path / "adapter_config.json").write_text(text)
        trained(tmp_path, iters=1)
        assert "earlier" not in capsys.readouterr().out
        before = contents(tmp_path)
        trained(tmp_path, iters=2)
        assert contents(tmp_path / "earlier-1") == before
        assert (tmp_path / "adapter_config.json").read_text() == text

    def test_what_killed_runs_left_is_removed_and_nothing_else(self, tmp_path):
        (tmp_path / ".adapters.safetensors.0123456789abcdef.tmp").write_bytes(b"half")
        (tmp_path / ".mine.tmp").write_bytes(b"mine")
        (tmp_path / "best").mkdir()
        (tmp_path / "best" / ".adapters.safetensors.0123456789abcdef.tmp").write_bytes(b"half")
        trained(tmp_path, iters=1)
        assert [path.name for path in tmp_path.rglob(".*")] == [".mine.tmp"]

    def test_a_temporary_file_follows_no_link_out_of_the_folder(self, tmp_path, monkeypatch):
        outside = tmp_path / "outside"
        outside.write_text("theirs")
        (tmp_path / "run").mkdir()
        monkeypatch.setattr("secrets.token_hex", lambda _: "0" * 16)
        (tmp_path / "run" / f".a.txt.{'0' * 16}.tmp").symlink_to(outside)
        with pytest.raises(OSError, match="exists"):
            replace_file(tmp_path / "run" / "a.txt", lambda file: file.write(b"ours"))
        assert outside.read_text() == "theirs"


class TestBest:
    OPTIONS = {"iters": 8, "steps_per_eval": 1, "steps_per_save": 3, "batch_size": 6, "seed": 0}

    @pytest.mark.parametrize("by", ["eval_loss", "accuracy", "margin"])
    def test_the_best_adapters_are_kept_and_named(self, by, tmp_path, capsys):
        trained(tmp_path, save_best=by, rate=0.05, config=dict(CONFIG), **self.OPTIONS)
        key, best = {"eval_loss": ("eval_loss", min), "accuracy": ("eval_rewards/accuracies", max)}.get(
            by, ("eval_rewards/margins", max)
        )
        values = {line["iteration"]: line[key] for line in metrics(tmp_path) if key in line}
        first = next(iteration for iteration, value in values.items() if value == best(values.values()))
        assert first > 0
        assert f"at iteration {first}: {tmp_path / 'best'}" in " ".join(capsys.readouterr().out.split())
        assert (tmp_path / "best" / "adapter_config.json").is_file()
        other = tmp_path / "until"
        trained(other, save_best=by, rate=0.05, **self.OPTIONS | {"iters": first})
        expected = mx.load(str(other / "adapters.safetensors"))
        kept = mx.load(str(tmp_path / "best" / "adapters.safetensors"))
        assert all(mx.array_equal(kept[name], expected[name]).item() for name in expected)

    def test_none_are_kept_where_no_validation_is_better_than_the_first(self, tmp_path, capsys):
        trained(tmp_path, save_best="margin", rate=0.0, **self.OPTIONS | {"iters": 1})
        out = " ".join(capsys.readouterr().out.split())
        assert "No validation had a better margin than the one before training" in out and "pairs say little" in out
        assert not (tmp_path / "best").exists()

    @pytest.mark.parametrize("name", ["best", "0000003"])
    def test_a_link_is_replaced_and_what_it_leads_to_stays(self, name, tmp_path):
        """A user's own `best -> 0000001` is no place to write a later save to."""
        options = self.OPTIONS | {"save_best": "margin", "rate": 0.01, "config": dict(CONFIG)}
        options["data"] = lambda *_: pairs(6)  # validated on what is trained, the margin grows on any machine
        trained(tmp_path, **options | {"iters": 1})
        if (tmp_path / name).exists():
            (tmp_path / name).rename(tmp_path / "kept")
        (tmp_path / "mine").mkdir()
        (tmp_path / name).symlink_to("mine")
        trained(tmp_path, resume=True, **options)
        assert list((tmp_path / "mine").iterdir()) == [] and not (tmp_path / name).is_symlink()
        assert {path.name for path in (tmp_path / name).iterdir()} == {"adapters.safetensors", "adapter_config.json"}

    def test_a_run_ends_early_and_resumes_exactly(self, tmp_path, capsys, monkeypatch):
        drawn = []
        monkeypatch.setattr(Outcome, "draw", lambda outcome, ended=False: drawn.append(ended))
        options = self.OPTIONS | {"rate": 0.05, "save_best": "eval_loss", "early_stop": 2}
        options |= {"iters": 20, "steps_per_save": 1}
        whole = trained(tmp_path / "whole", **options)
        reached = metrics(tmp_path / "whole")[-1]["iteration"]
        assert 1 < reached < 20
        validations = [line for line in metrics(tmp_path / "whole") if "eval_loss" in line]
        assert drawn == [False] * (len(validations) - 1) + [True], "none of the start"
        assert f"Ended after iteration {reached}: 2 validations without a gain." in capsys.readouterr().out
        with pytest.raises(Stopped):
            trained(tmp_path / "parted", stop=reached, **options)
        for _ in range(2):
            found = trained(tmp_path / "parted", resume=True, **options)
            assert all(mx.array_equal(found[key], whole[key]).item() for key in whole)
        kept = [mx.load(str(tmp_path / run / "best" / "adapters.safetensors")) for run in ("whole", "parted")]
        assert all(mx.array_equal(kept[0][name], kept[1][name]).item() for name in kept[0])

    def test_without_validations_it_is_refused(self, tmp_path):
        with pytest.raises(ConfigError, match="save_best, early_stop and sample_prompts need validations"):
            trained(tmp_path, save_best="margin", val_batches=0)


class TestStartingPoint:
    def test_it_is_the_same_whatever_is_wrapped_and_however_an_adapter_that_does_nothing_is_drawn(self):
        points = set()
        for seed, layers, rank in ((1, 2, 4), (2, 1, 8), (3, 0, 0)):
            mx.random.seed(seed)
            model, _ = load_model(GOLDEN)
            if rank:
                linear_to_lora_layers(model, layers, {"rank": rank, "scale": 4.0, "dropout": 0.0})
            points.add(starting_point(model))
        assert len(points) == 1

    def test_one_row_of_a_large_weight_gives_another(self):
        model = nn.Embedding(1000, 32)
        points = {starting_point(model)}
        for row in (0, 500, 999):
            model.weight[row] += 0.1
            points.add(starting_point(model))
        for dtype in (mx.float16, mx.bfloat16):
            model.set_dtype(dtype)
            model.weight = model.weight[:999, :31]  # no whole number of words
            points.add(starting_point(model))
            model.weight[998] += 1
            points.add(starting_point(model))
        assert len(points) == 8

    def test_another_weight_or_an_adapter_gives_another(self):
        model, _ = load_model(GOLDEN)
        linear_to_lora_layers(model, 2, {"rank": 4, "scale": 4.0, "dropout": 0.0})
        points = [starting_point(model)]
        for path, change in tree_flatten(model.parameters()):
            if path.endswith(("layers.1.mlp.up_proj.lora_b", "layers.0.self_attn.q_proj.linear.weight")):
                model.load_weights([(path, change + 1e-3)], strict=False)
                points.append(starting_point(model))
        assert len(set(points)) == 3


class TestFiles:
    def write(self, text):
        return lambda file: file.write(text.encode())

    def test_a_failure_while_writing_leaves_the_file_and_no_other(self, tmp_path):
        path = tmp_path / "a.txt"
        path.write_text("old")

        def fail(file):
            file.write(b"half")
            raise OSError(28, "No space left on device")

        with pytest.raises(OSError, match="No space left"):
            replace_file(path, fail)
        assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.txt", "old")]

    def test_no_file_is_replaced_before_all_are_written(self, tmp_path):
        first, second = tmp_path / "a.txt", tmp_path / "b.txt"
        first.write_text("old a")
        second.write_text("old b")

        def fail(file):
            raise RuntimeError("[write] Unable to write 5 bytes to file.")

        with pytest.raises(OSError, match="b.txt cannot be written: .write. Unable"):
            replace_files((first, self.write("new a")), (second, fail))
        assert sorted((file.name, file.read_text()) for file in tmp_path.iterdir()) == [
            ("a.txt", "old a"),
            ("b.txt", "old b"),
        ]
        replace_files((first, self.write("new a")), (second, self.write("new b")))
        assert [first.read_text(), second.read_text()] == ["new a", "new b"]
        assert len(list(tmp_path.iterdir())) == 2

    def test_adapters_and_their_configuration_change_together(self, tmp_path, monkeypatch):
        model, _ = load_model(GOLDEN)
        save_adapters(model, tmp_path / "adapters.safetensors", config={"a": 1})
        before = contents(tmp_path)
        assert set(before) == {"adapters.safetensors", "adapter_config.json"}
        model.update({"lm_head": {"weight": model.lm_head.weight + 1}})
        monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(OSError, match="No space left"):
            save_adapters(model, tmp_path / "adapters.safetensors", config={"a": 2})
        assert contents(tmp_path) == before

    def test_a_full_disk_while_saving_leaves_what_was_saved(self, tmp_path):
        """MLX writes safetensors itself; with a limit on a file's size its write fails as on a full disk."""
        trained(tmp_path, iters=3)
        before = contents(tmp_path)
        script = (
            "import resource, sys; from pathlib import Path; import mlx.core as mx;"
            "from mlx_lm.tuner.preference.checkpoint import *; from mlx_lm.utils import load_model;"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); model, _ = load_model(Path(sys.argv[1]));"
            "save_adapters(model, Path(sys.argv[2]) / 'adapters.safetensors')"
        )
        done = command("-c", script, GOLDEN, tmp_path)
        assert done.returncode == 1 and "adapters.safetensors cannot be written: [Errno 27]" in done.stderr
        assert contents(tmp_path) == before


def command(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True, **options
    )


def test_without_links_a_second_name_is_a_copy(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: os.rmdir(tmp_path / "none"))  # fails as in a file system without links
    for text in ("old", "new"):
        (tmp_path / "a").write_text(text)
        give_second_name(tmp_path / "a", tmp_path / "b")
        assert (tmp_path / "b").read_text() == text

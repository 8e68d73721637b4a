"""What the documents say was measured: one cheap row of each table is measured again.

Memory and what is learned have to come out as they stand in benchmarks/results; times are those of another machine.
"""

import json
import sys
from pathlib import Path

import check_gradients
import example
import macs
import memory
import pytest
import sentiment
import tables
from common import own_environment, own_step, run_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def rows(name):
    return json.loads((RESULTS / f"{name}.json").read_text())["rows"]


def agree(found, expected):
    """Whether two reports' figures are those of one run, up to what another machine's products round to."""
    assert found["loss"] == pytest.approx(expected["loss"], rel=0.02)
    assert found["accuracy"] == pytest.approx(expected["accuracy"], abs=0.03)


def test_a_loss_learns_what_the_table_says():
    (expected,) = (row for row in rows("example_losses") if row["loss"] == "dpo")
    (found,) = example.losses(["dpo"])
    for when in ("before", "after"):
        agree(found[when], expected[when])


def test_discopop_falls_as_told():
    (expected,) = (row for row in rows("example_discopop") if (row["tau"], row["steps"]) == (0.05, 50))
    found = example.short_run({"loss_type": "discopop", "beta": 0.1, "discopop_tau": 0.05}, 50)
    agree(found["after"], expected["after"])
    assert expected["after"]["accuracy"] < 0.5 < rows("example_discopop")[-1]["after"]["accuracy"]


def test_a_rate_that_is_too_high_does_what_is_told():
    (expected,), (found,) = rows("example_rate"), example.rate()
    assert found["settings"] == expected["settings"]
    # Training diverges, and no two machines alike: the rewards are far down, and the answer is no sense.
    assert max(found["after"][side] for side in ("chosen", "rejected")) < -10 > expected["after"]["chosen"]
    assert "black" not in found["answer"] + expected["answer"]


@pytest.fixture(scope="module")
def step():
    """A step of the shape that several tables have, in a process of its own."""
    spec = {"shape": "135m", "layers": 8, "device": "cpu", "prompt": 224, "response": 32, "steps": 1, "warmup": 0}
    return own_step(spec, timeout=300)


def test_the_step_takes_the_memory_that_the_tables_say(step):
    (piece, *_) = (row for row in rows("pieces_cpu") if (row["prompt"], row["response"]) == (224, 32))
    peer = next(row for row in rows("peers_step") if (row["prompt"], row["response"]) == (224, 32))
    assert step["peak_gb"] == pytest.approx(piece["with"]["peak_gb"], rel=0.1), step
    assert step["peak_gb"] == pytest.approx(peer["runs"]["here"]["peak_gb"], rel=0.1)


def test_a_row_of_the_growth_takes_its_memory():
    (row,) = (row for row in rows("scaling_cpu") if (row["factor"], row["value"]) == ("pairs", 1))
    spec = {"shape": "135m", "layers": 2, "device": "cpu", "prompt": 512, "response": 128, "pairs": 1}
    found = own_step(spec | {"vocabulary": 32768, "steps": 1, "warmup": 0}, timeout=300)
    assert found["tokens"] == row["tokens"] and found["peak_gb"] == pytest.approx(row["peak_gb"], rel=0.1)


def test_a_setting_takes_the_memory_that_its_row_says():
    found, row = memory.measure(*memory.SETTINGS[1]), rows("memory_cpu")[1]
    assert found["setting"] == row["setting"] and found["peak_gb"] == pytest.approx(row["peak_gb"], rel=0.1)


def test_the_sum_of_layers_is_the_whole_models_step():
    """Another way to the same number than the steps of one and two layers that the sum is made of."""
    whole = rows("memory_cpu")
    for number, checkpoint in ((0, False), (4, True)):
        computed = tables.step_gb("135m", whole[number]["tokens"], checkpoint, 32)
        assert computed == pytest.approx(whole[number]["peak_gb"], rel=0.2)
    assert macs.parameters("135m")[0] == pytest.approx(134.5e6, rel=0.01)
    assert macs.parameters("8b")[0] == pytest.approx(8.03e9, rel=0.01)


def test_a_recurrent_type_takes_its_memory_a_token():
    row = next(
        row for row in json.loads((RESULTS / "recurrent.json").read_text())["relatives"] if row["type"] == "mamba2"
    )
    setting = ["measure_relative", {"name": "mamba2", "length": 512, "chunked": True}]
    command = [sys.executable, ROOT / "benchmarks" / "recurrent.py", "one", json.dumps(setting)]
    found = run_json(command, own_environment(), timeout=300)
    assert found["kb_a_token"] == pytest.approx(row["chunks_512"]["kb_a_token"], rel=0.2)


def test_gradients_agree_as_told():
    model, tokenizer = check_gradients.load(str(ROOT / "mlx_lm" / "examples" / "tiny_chat_model"))
    check_gradients.add_lora(model)
    wanted = {"data": str(ROOT / "mlx_lm" / "examples" / "preferences"), "train": True, "test": False}
    config = check_gradients.SimpleNamespace(**wanted, loss_type="dpo", max_seq_length=1024)
    dataset, *_ = check_gradients.load_dataset(config, tokenizer)
    found = check_gradients.compare(model, [dataset[i] for i in range(8)], 4, 1)
    told = min(min(row["cosines"]) for row in rows("gradients_cpu_example"))
    assert min(min(check_gradients.cosines(each)) for each in found.values()) > told - 1e-4 > 0.999


def test_a_score_is_told_between_measured_points_alone():
    points = [{"kl": 0.0, "score": 0.3}, {"kl": 4.0, "score": 0.7}, {"kl": 8.0, "score": 0.9}]
    assert sentiment.score_at(points, 5.0) == pytest.approx(0.75)
    # Before the first step there is the reference, which is no point of a frontier.
    assert sentiment.score_at(points, 2.0) is None and sentiment.score_at(points, 9.0) is None

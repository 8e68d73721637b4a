"""The dry run: what it tells of rows and pairs, memory against a run's, and that it neither trains nor writes."""

import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from chat_tokenizers import smollm

import mlx_lm.lora
from mlx_lm.tuner.datasets import PreferenceDataset
from mlx_lm.tuner.preference import dry_run, memory
from mlx_lm.tuner.preference.batches import lengths_of
from mlx_lm.tuner.preference.dry_run import describe_data, marked, text_of, with_marks

EXAMPLES = Path(mlx_lm.lora.__file__).parent / "examples"
# A large rate, so that a step that was taken would show.
SETTINGS = "--train --loss-type dpo --iters 12 --num-layers 99 --learning-rate 1e-3 --val-batches -1".split()


def command(*flags, folder, data=EXAMPLES / "preferences"):
    """Run the command; returns its exit status."""
    mx.reset_peak_memory()
    given = ["mlx_lm.lora", "--model", EXAMPLES / "tiny_chat_model", "--data", data, "--adapter-path", folder / "a"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*map(str, given), *SETTINGS, "--reference-cache", "none", *flags])
        patch.setattr(memory, "_earlier_peak", 0)
        patch.setattr("mlx_lm.tuner.preference.outcome.plot_metrics", lambda *_: None)
        try:
            mlx_lm.lora.main()
        except SystemExit as stop:
            return stop.code
    return 0


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A folder with some of the example's rows."""
    folder = tmp_path_factory.mktemp("few")
    for split, count in (("train", 48), ("valid", 8), ("test", 8)):
        lines = (EXAMPLES / "preferences" / f"{split}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{split}.jsonl").write_text("".join(lines[:count]))
    return folder


def test_a_path_that_looks_like_markup_stands_in_the_panel(tmp_path, few, capsys):
    (tmp_path / "d[").mkdir()
    (tmp_path / "d[" / "b]").symlink_to(few)
    assert command("--check", folder=tmp_path, data=tmp_path / "d[" / "b]") == 0
    assert "d[/b]" in capsys.readouterr().out.replace("\n", "")


def number(pattern, text):
    return float(re.search(pattern, text)[1])


@pytest.mark.parametrize("flags", [(), ("--grad-accumulation-steps", "2", "--grad-checkpoint"), ("--no-share-prompt",)])
def test_the_memory_is_within_a_fifth_of_the_runs(tmp_path, capsys, few, flags):
    # It is told to a thousandth of a GB, of which fewer pairs take less than ten.
    flags += "--batch-size", "16"
    assert command("--check", *flags, folder=tmp_path, data=few) == 0
    told = number(r"in all +([\d.]+) of", capsys.readouterr().out)
    assert not (tmp_path / "a").exists()
    assert command(*flags, folder=tmp_path, data=few) == 0
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert told == pytest.approx(max(line["peak_memory"] for line in lines if "peak_memory" in line), rel=0.2)


@pytest.mark.skipif("SMOLLM2" not in os.environ, reason="SMOLLM2 names a folder with the model, float32 or quantized")
def test_the_memory_of_a_real_model_is_within_a_fifth_of_the_runs(tmp_path, capsys):
    """On rows of some hundred tokens, several of the example's put together."""
    (tmp_path / "data").mkdir()
    for split in ("train", "valid"):
        rows = [json.loads(line) for line in (EXAMPLES / "preferences" / f"{split}.jsonl").read_text().splitlines()]
        parts = [rows[i : i + 4 + i % 8] for i in range(0, 64, 8)]
        joined = [
            {key: " ".join(row[key] for row in part) for key in ("prompt", "chosen", "rejected")} for part in parts
        ]
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in joined))
    flags = ["--model", os.environ["SMOLLM2"], "--iters", "4", "--batch-size", "2"]
    assert command("--check", *flags, folder=tmp_path, data=tmp_path / "data") == 0
    told = number(r"in all +([\d.]+) of", capsys.readouterr().out)
    assert command(*flags, folder=tmp_path, data=tmp_path / "data") == 0
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert told == pytest.approx(max(line["peak_memory"] for line in lines if "peak_memory" in line), rel=0.2)


def test_an_epoch_whose_last_batch_is_smaller_is_one(tmp_path, capsys, few):
    """48 pairs are a batch of 40 and one of 8."""
    assert command("--check", "--batch-size", "40", "--iters", "2", folder=tmp_path, data=few) == 0
    assert "2 iterations of 40 pairs are 1.00 epochs and 2 updates" in capsys.readouterr().out


def test_what_it_tells(tmp_path, capsys):
    assert command("--check", "--steps", "2", "--epochs", "0.5", "--iters", "50", folder=tmp_path) == 2
    assert command("--check", "--steps", "2", "--batch-size", "8", folder=tmp_path) == 0
    out = capsys.readouterr().out
    assert re.search(r"^  train +400 +0 +0 +0$", out, re.M) and re.search(r"^  valid +80 ", out, re.M)
    assert "12 iterations of 8 pairs are 0.24 epochs and 12 updates" in out
    steps, each, seconds = re.search(r"(\d+) steps of ([\d.]+) s +([\d.]+) s$", out, re.M).groups()
    assert steps == "12" and float(seconds) == pytest.approx(12 * float(each), abs=0.06)
    parts = re.findall(r"^  (.*?) +([\d.]+) s$", out[out.index("time by 2 steps") :], re.M)
    assert [re.sub(r"[\d.]+ s$", "T", name) for name, _ in parts] == [
        "12 steps of T",
        "2 validations of T",
        "reference, once, where none is kept",
        "steps, validations, reference, in all",
    ]
    *times, total = (float(time) for _, time in parts)
    assert sum(times) == pytest.approx(total, abs=0.3) and total < 60
    assert "rows are read as prompt, chosen, rejected" in out and "Nothing that can be told" in out
    assert command("--steps", "2", folder=tmp_path) == 2
    assert list(tmp_path.iterdir()) == []


def test_the_time_of_a_run_without_validations(tmp_path, capsys, few):
    flags = "--steps", "1", "--val-batches", "0", "--reference-model", str(EXAMPLES / "tiny_chat_model")
    assert command("--check", *flags, folder=tmp_path, data=few) == 0
    out = capsys.readouterr().out
    assert "12 steps of" in out and "reference, once, where none is kept" in out and "validations of" not in out


def test_it_ends_with_2_where_a_run_would_stop(tmp_path, capsys, monkeypatch, few):
    rows = tmp_path / "data"
    rows.mkdir()
    (rows / "train.jsonl").write_text('{"prompt": "Why?", "chosen": "So."}\n')
    assert command("--check", folder=tmp_path, data=rows) == 2
    assert "train.jsonl:1: rejected is missing" in capsys.readouterr().err
    assert command("--check", "--resume", folder=tmp_path, data=few) == 2
    assert command("--check", "--save-best", "margin", "--val-batches", "0", folder=tmp_path, data=few) == 2
    assert command("--check", "--report-to", "wand", folder=tmp_path, data=few) == 2
    assert "wand is not installed, or none of wandb, swanlab, tensorboard" in capsys.readouterr().err
    assert command("--check", "--loss-type", "sft", folder=tmp_path, data=few) == 2
    assert "dry run of preference training" in capsys.readouterr().err
    monkeypatch.setattr(dry_run, "device_memory", lambda: 2e6)
    assert command("--check", folder=tmp_path, data=few) == 2
    assert "seems to need 0.0 GB, and the device has 0.0; a smaller batch_size" in capsys.readouterr().err


def test_of_a_test_it_looks_at_the_adapters_and_scores_nothing(tmp_path, capsys, few):
    assert command("--iters", "1", "--val-batches", "0", folder=tmp_path, data=few) == 0
    flags = "--check", "--no-train", "--test", "--reference-cache", str(tmp_path / "cache")
    assert command(*flags, folder=tmp_path, data=few) == 0
    nothing, adapters = str(tmp_path / "nothing"), str(tmp_path / "a")
    flags += "--adapter-path", nothing, "--compare"
    capsys.readouterr()
    assert command(*flags, adapters, "none", folder=tmp_path, data=few) == 0
    assert not re.search("Test loss|differ", capsys.readouterr().out) and not (tmp_path / "cache").exists()
    assert command(*flags, adapters, nothing, folder=tmp_path, data=few) == 2
    assert f"{nothing}', whose adapter_config.json cannot be used (No such" in capsys.readouterr().err


def test_it_refuses_a_reference_whose_logps_are_not_finite(tmp_path, capsys, few):
    model = shutil.copytree(EXAMPLES / "tiny_chat_model", tmp_path / "model")
    weights = mx.load(str(model / "model.safetensors"))
    weights["model.norm.weight"] *= mx.nan
    mx.save_safetensors(str(model / "model.safetensors"), weights)
    for flags in ((), ("--no-train", "--test", "--adapter-path", "none")):
        assert command("--check", "--model", str(model), *flags, folder=tmp_path, data=few) == 2
        assert "the reference gives logps that are not finite" in capsys.readouterr().err


def test_the_largest_steps_memory_is_taken_from_the_smallests(tmp_path, monkeypatch, few):
    """In proportion to tokens: of a step of gigabytes too, whose bytes are no number of 32 bits."""
    told, peak = [], mx.get_peak_memory
    monkeypatch.setattr(mx, "get_peak_memory", lambda: peak() + 3 * 10**9)
    monkeypatch.setattr(dry_run, "refuse_too_large", lambda resting, needed: told.append((resting, needed)))
    assert command("--check", folder=tmp_path, data=few) == 0
    assert told[0][0] < 1e8 and 3e9 < told[0][1] < 3e10


def test_validations_are_as_large_as_those_of_a_run_that_balances_experts(monkeypatch):
    """Whose figures belong to a batch, whatever the loss."""
    monkeypatch.setattr(dry_run, "time_largest", lambda scorer, evaluate, dataset, rows, size, again: size)
    loss, rows = SimpleNamespace(reads_batch=False), SimpleNamespace(valid_set=[], valid_rows=[])
    args = SimpleNamespace(batch_size=4, steps=None)
    for reads_batch, size in ((True, 4), (False, None)):
        objective = SimpleNamespace(scorer=None, loss=loss, reads_batch=reads_batch)
        assert dry_run.score_largest(objective, None, rows, None, args) == (size, 0.0)


def test_a_test_alone_is_checked_too(tmp_path, capsys):
    assert command("--check", "--no-train", "--test", "--adapter-path", "none", folder=tmp_path) == 0
    out = capsys.readouterr().out
    assert re.search(r"^  test +80 ", out, re.M) and "Test loss" not in out and "  train  " not in out


def test_quantiles_of_lengths_and_marks_around_what_is_scored(capsys):
    tokenizer = smollm()
    row = {"prompt": "Why?", "chosen": "So <b>it</b> is.", "rejected": "No."}
    data = PreferenceDataset([row, {**row, "chosen": "So it is, and so on and on."}], tokenizer)
    describe_data({"train": data, "valid": []}, tokenizer)
    out = capsys.readouterr().out
    lengths = lengths_of(data).tolist()
    for name, place in (("prompt", 0), ("chosen", 1), ("rejected", 2)):
        found = re.search(rf"^  {name} +(\d+) .* (\d+)$", out, re.M).groups()
        assert [int(value) for value in found] == [min(x[place] for x in lengths), max(x[place] for x in lengths)]
    assert "\u27e6So <b>it</b> is.<|im_end|>\u27e7" in out and "<|im_start|>user" in out


def test_lengths_of_labelled_completions_are_not_those_of_chosen_and_rejected_ones(capsys):
    rows = [{"prompt": f"Who{i}?", "completion": "the " * (2 + i), "label": i > 0} for i in range(4)]
    describe_data({"train": PreferenceDataset(rows, smollm(), unpaired=True)}, smollm())
    table, _, pairs = capsys.readouterr().out.partition("\ntokens")[2].partition("\npairs")
    assert re.findall(r"^    (not so|desirable|another's) ", pairs, re.M) == [
        "not so",
        "another's",
        "desirable",
        "another's",
    ]
    named = [re.split(r"\s{2,}", line.strip()) for line in table.splitlines()[1:] if line]
    assert [name for name, *_ in named] == ["prompt", "completion", "another's"]
    assert float(named[1][-1]) - float(named[1][1]) == 3


def test_spans_that_are_not_scored_stand_outside_of_the_marks():
    class Letters:
        def decode(self, tokens, skip_special_tokens):
            assert not skip_special_tokens
            return "".join(chr(97 + token) for token in tokens)

    assert with_marks(Letters(), range(6), ((2, 4),)) == "\u27e6ab\u27e7cd\u27e6ef\u27e7"
    assert with_marks(Letters(), range(3), ((0, 1),)) == "a\u27e6bc\u27e7"
    assert with_marks(Letters(), range(2), ()) == "\u27e6ab\u27e7"
    assert text_of(Letters(), [-70]) == "\\x1b", "an escape sequence of the data is none on the terminal"
    assert len(text_of(Letters(), [0] * 2000)) < 700


def test_no_colour_where_none_is_wanted(monkeypatch):
    monkeypatch.setattr("sys.stdout", SimpleNamespace(isatty=lambda: True))
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert marked("a") == "\033[32ma\033[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert marked("a") == "\u27e6a\u27e7"

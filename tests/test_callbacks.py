"""The reports of a run: their names, the file, the plot, and whoever else listens."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
from tiny import TINY_LLAMA, short_run, some_pairs, tiny_llama

import mlx_lm.lora
from mlx_lm.tuner import callbacks
from mlx_lm.tuner.callbacks import MetricsFile
from mlx_lm.tuner.preference.metrics import read_metrics
from mlx_lm.tuner.preference.options import ConfigError

PAIRS = some_pairs(8)
TOKENIZER = SimpleNamespace(encode=lambda text: [1])
# TRL's names, and beside them what upstream reports.
FIGURES = {
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "lengths/chosen",
    "lengths/rejected",
}
CORRELATION = "rewards/length_correlation"  # where margins vary
# What only validations have.
MORE = {"kl", "logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy"}
SPEED = {
    "iterations_per_second",
    "pairs_per_second",
    "tokens_per_second",
    "trained_tokens",
    "peak_memory",
    "held_memory",
}


class Listener:
    """Keeps every report; upstream's interface."""

    def __init__(self):
        self.training, self.validation = [], []

    def on_train_loss_report(self, info):
        self.training.append(dict(info))

    def on_val_loss_report(self, info):
        self.validation.append(dict(info))


def test_a_line_a_report_with_trls_names(tmp_path):
    listener = Listener()
    training, validation = short_run(
        tiny_llama(), PAIRS, tmp_path, valid=PAIRS, callback=listener, iters=5, steps_per_report=2, steps_per_eval=2
    )
    assert [line["iteration"] for line in training] == [2, 4, 5]
    assert [line["iteration"] for line in validation] == [0, 2, 4, 5]
    for line in training:
        more = {"iteration", "grad_norm", "learning_rate", "padding_share"}
        assert set(line) - {CORRELATION} == FIGURES | SPEED | more
    for line in validation:
        names = set(line) - {f"eval_{CORRELATION}", "iteration", "val_time", "eval_pairs", "eval_set"}
        assert names == {f"eval_{name}" for name in FIGURES | MORE}
    # In the order of the run: validation comes before the first step and after the report of its own.
    order = [("eval_loss" in line, line["iteration"]) for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert order == [(True, 0), (False, 2), (True, 2), (False, 4), (True, 4), (False, 5), (True, 5)]
    # A callback gets the same reports under upstream's names of the losses, but no digest, which is no figure.
    assert len({line.pop("eval_set") for line in validation}) == 1
    for line, report in zip(training + validation, listener.training + listener.validation, strict=True):
        names = {"train_loss": "loss", "val_loss": "eval_loss"}
        assert {names.get(name, name): value for name, value in report.items()} == line


def test_the_grad_norm_is_the_last_updates(tmp_path):
    options = {"iters": 7, "grad_accumulation_steps": 2}
    each, _ = short_run(tiny_llama(), PAIRS, tmp_path, **options)
    norms = {line["iteration"]: line["grad_norm"] for line in each if "grad_norm" in line}
    assert list(norms) == [2, 4, 6, 7] and len(set(norms.values())) == 4
    some, _ = short_run(tiny_llama(), PAIRS, tmp_path, **options, steps_per_report=3)
    assert [line["grad_norm"] for line in some] == [norms[2], norms[6], norms[7]]


def fake_service(name, told):
    """A module that takes the calls of wandb and swanlab."""
    module = ModuleType(name)
    module.init = lambda **given: told.append(("init", given))
    module.log = lambda figures, step: told.append((step, figures))
    return module


def test_every_service_and_callback_hears_every_report(tmp_path, monkeypatch):
    told = {"wandb": [], "swanlab": []}
    for name, calls in told.items():
        monkeypatch.setattr(callbacks, name, fake_service(name, calls))
    services = callbacks.get_reporting_callbacks("wandb,swanlab", "project", str(tmp_path / "run"), {"beta": 0.1})
    training, validation = short_run(tiny_llama(), PAIRS, tmp_path, valid=PAIRS, callback=services, iters=3)
    for calls in told.values():
        (init, given), *reports = calls
        assert init == "init" and given["project"] == "project" and given["config"] == {"beta": 0.1}
        assert [step for step, _ in reports] == [0, 1, 2, 3, 3]
        losses = [figures["train_loss"] for _, figures in reports if "train_loss" in figures]
        assert losses == [line["loss"] for line in training]
        margins = [figures["eval_rewards/margins"] for _, figures in reports if "val_loss" in figures]
        assert margins == [line["eval_rewards/margins"] for line in validation]


def test_the_command_reports_to_a_service(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(callbacks, "wandb", fake_service("wandb", calls))
    monkeypatch.setattr(mlx_lm.lora, "load", lambda *_, **__: (tiny_llama(lora=False), TOKENIZER))
    monkeypatch.setattr("mlx_lm.utils.load", lambda *_, **__: (tiny_llama(lora=False), TOKENIZER))
    monkeypatch.setattr(mlx_lm.lora, "load_dataset", lambda *_: (PAIRS, PAIRS, []))
    options = {"model": str(TINY_LLAMA), "loss_type": "dpo", "train": True, "num_layers": 2, "iters": 2}
    options |= {"adapter_path": str(tmp_path), "report_to": "wandb", "project_name": "mine", "reference_cache": "none"}
    mlx_lm.lora.run(SimpleNamespace(**{**mlx_lm.lora.CONFIG_DEFAULTS, **options}))
    assert calls[0][1]["project"] == "mine" and calls[0][1]["config"]["loss_type"] == "dpo"
    assert [step for step, _ in calls[1:]] == [0, 2, 2]
    with pytest.raises(ConfigError, match="report_to is 'elsewhere'"):
        mlx_lm.lora.run(SimpleNamespace(**{**mlx_lm.lora.CONFIG_DEFAULTS, **options, "report_to": "elsewhere"}))


def test_every_line_is_json_whatever_the_figure(tmp_path):
    callback = MetricsFile(tmp_path)
    callback.on_val_loss_report({"iteration": 1, "val_loss": float("nan"), "eval_rewards/margins": float("inf")})

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse) == {"iteration": 1, "eval_loss": None, "eval_rewards/margins": None}


def test_a_new_run_begins_a_new_file_and_a_resumed_one_goes_on(tmp_path):
    first = MetricsFile(tmp_path)
    for step in (1, 2, 3):
        first.on_train_loss_report({"iteration": step, "train_loss": 1.0})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 4, "lo')  # as an interruption leaves it
    assert [line["iteration"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    resumed = MetricsFile(tmp_path, iteration=2)
    resumed.on_train_loss_report({"iteration": 3, "train_loss": 0.5})
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [(line["iteration"], line["loss"]) for line in lines] == [(1, 1.0), (2, 1.0), (3, 0.5)]
    MetricsFile(tmp_path)
    assert read_metrics(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("text", ["[1, 2]\n", '{"loss": 1}\n', "\xff\xfe\n", "null"])
def test_lines_that_are_no_reports_are_left_out(tmp_path, text):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"iteration": 1, "loss": 0.5}\n' + text.encode("latin-1"))
    assert read_metrics(path) == [{"iteration": 1, "loss": 0.5}]
    MetricsFile(tmp_path, iteration=1)
    assert path.read_text() == '{"iteration": 1, "loss": 0.5}\n'


def test_reports_go_to_tensorboard_and_none_is_nobody(tmp_path, monkeypatch):
    """With a stand-in for the package, whose `Writer` has the one method that is used."""
    written = []
    writer = SimpleNamespace(add_scalar=lambda *call: written.append(call), flush=lambda: None)
    module = ModuleType("tensorboard.summary")
    module.Writer = lambda folder: written.append(folder) or writer
    monkeypatch.setitem(sys.modules, "tensorboard", ModuleType("tensorboard"))
    monkeypatch.setitem(sys.modules, "tensorboard.summary", module)
    callback = callbacks.get_reporting_callbacks("tensorboard", log_dir=tmp_path)
    callback.on_train_loss_report({"iteration": 2, "train_loss": 0.5, "rewards/margins": 0.25})
    callback.on_val_loss_report({"iteration": 3, "val_loss": 0.75})
    assert written == [
        str(tmp_path / "tensorboard"),
        ("loss", 0.5, 2),
        ("rewards/margins", 0.25, 2),
        ("eval_loss", 0.75, 3),
    ]
    assert callbacks.get_reporting_callbacks("none") is None is callbacks.get_reporting_callbacks()


def test_tables_of_answers_go_to_the_services_that_show_them(tmp_path, monkeypatch):
    told = {"wandb": [], "swanlab": []}
    for name, calls in told.items():
        monkeypatch.setattr(callbacks, name, fake_service(name, calls))
    callbacks.wandb.Table = lambda columns, data: ("table", columns, data)
    callbacks.swanlab.echarts = SimpleNamespace(Table=FakeTable)
    services = callbacks.get_reporting_callbacks("wandb,swanlab", "project", str(tmp_path / "run"), {})
    line = {
        "iteration": 5,
        "row": "valid.jsonl:1",
        "prompt": "Why?",
        "answer": "So.",
        "chosen": "So.",
        "rejected": "No.",
    }
    callbacks.send_samples(MetricsFile(tmp_path, services), 5, [line])
    columns, row = ["iteration", "row", "prompt", "answer", "chosen", "rejected"], [5, "valid.jsonl:1", "Why?", "So."]
    assert told["wandb"][1:] == [(5, {"samples": ("table", columns, [[*row, "So.", "No."]])})]
    ((step, figures),) = told["swanlab"][1:]
    assert step == 5 and figures["samples"].added == (columns, [[*row, "So.", "No."]])


@pytest.mark.parametrize("failing", [1, 2])
def test_a_service_that_fails_does_not_end_the_run(failing, tmp_path, monkeypatch, capsys):
    """A connection is lost at the first report, or at the table of answers behind it."""
    calls = []

    def log(figures, step):
        calls.append(step)
        if len(calls) == failing:
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(callbacks, "wandb", fake_service("wandb", []))
    callbacks.wandb.log, callbacks.wandb.Table = log, lambda columns, data: data
    listener = MetricsFile(
        tmp_path, callbacks.Services(callbacks.get_reporting_callbacks("wandb", "project", str(tmp_path / "run"), {}))
    )
    line = dict.fromkeys(callbacks.COLUMNS, "")
    for iteration in (1, 2):
        listener.on_val_loss_report({"iteration": iteration, "val_loss": 0.5})
        callbacks.send_samples(listener, iteration, [line])
        listener.on_train_loss_report({"iteration": iteration, "train_loss": 0.5})
    assert len(calls) == failing and len(read_metrics(tmp_path / "metrics.jsonl")) == 4
    assert capsys.readouterr().out.count("A service of report_to failed ([Errno 32] Broken pipe): the run goes on") == 1


def test_the_command_goes_on_without_its_service(monkeypatch):
    monkeypatch.setattr(callbacks, "wandb", fake_service("wandb", []))
    asked = {"check": False, "report_to": "wandb", "project_name": None, "adapter_path": "a"}
    assert isinstance(mlx_lm.lora._callbacks(SimpleNamespace(**asked)), callbacks.Services)
    assert mlx_lm.lora._callbacks(SimpleNamespace(**asked | {"report_to": None})) is None


class FakeTable:
    """What pyecharts has for a table."""

    def add(self, headers, rows):
        self.added = headers, rows

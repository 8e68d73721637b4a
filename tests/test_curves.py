"""Pictures of runs: what is drawn, when, and what differs between several."""

import json
import sys

import matplotlib.figure
import mlx.optimizers as optim
import pytest
from tiny import some_pairs, tiny_llama

import mlx_lm.lora
from mlx_lm.tuner.callbacks import MetricsFile
from mlx_lm.tuner.preference.curves import differences, plot_metrics, plot_runs
from mlx_lm.tuner.preference.options import ConfigError
from mlx_lm.tuner.trainer import TrainingArgs, train

PAIRS = some_pairs(8)


def test_a_run_draws_its_curves(tmp_path):
    args = TrainingArgs(loss_type="dpo", iters=2, reference_cache="none", adapter_file=tmp_path / "a.safetensors")
    train(tiny_llama(), optim.Adam(1e-3), PAIRS, PAIRS, args)
    drawn = (tmp_path / "training.png").read_bytes()
    assert drawn.startswith(b"\x89PNG\r\n\x1a\n") and drawn.endswith(b"IEND\xaeB`\x82")
    (tmp_path / "training.png").unlink()
    assert plot_metrics(tmp_path).read_bytes().startswith(b"\x89PNG")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_is_drawn(tmp_path, monkeypatch):
    """Training as a line, validation as points, from the file's figures; a gap where there was no number."""
    from matplotlib.figure import Figure

    callback = MetricsFile(tmp_path)
    for step, loss in enumerate((0.7, float("nan"), 0.5), 1):
        callback.on_train_loss_report({"iteration": step, "train_loss": loss, "rewards/margins": step / 10})
    callback.on_val_loss_report({"iteration": 3, "val_loss": 0.6})
    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **options: figures.append(self) or savefig(self, *args))
    plot_metrics(tmp_path)
    (figure,) = figures
    drawn = {
        axes.get_title(): {line.get_label(): line.get_xydata().tolist() for line in axes.lines} for axes in figure.axes
    }
    assert drawn["loss"] == {"loss, training": [[1, 0.7], [3, 0.5]], "loss, validation": [[3, 0.6]]}
    assert drawn["rewards"] == {"margins, training": [[1, 0.1], [2, 0.2], [3, 0.3]]}
    assert set(drawn) == {"loss", "reward accuracy", "rewards", "logps (nats)"}


def test_nothing_is_drawn_without_figures_or_matplotlib(tmp_path, monkeypatch, capsys):
    assert plot_metrics(tmp_path) is None and not list(tmp_path.iterdir())
    MetricsFile(tmp_path).on_train_loss_report({"iteration": 1, "train_loss": 0.5})
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plot_metrics(tmp_path) is None
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def a_run(folder, losses, **config):
    folder.mkdir()
    callback = MetricsFile(folder)
    for iteration, loss in enumerate(losses, 1):
        callback.on_train_loss_report({"iteration": iteration, "train_loss": loss, "rewards/margins": 1 - loss})
    (folder / "adapter_config.json").write_text(json.dumps({"adapter_path": str(folder), "beta": 0.1} | config))
    return str(folder)


def test_several_runs_are_drawn_with_what_differs_between_them(tmp_path, monkeypatch, capsys):
    folders = [a_run(tmp_path / "a", [0.6, 0.5], seed=1), a_run(tmp_path / "b", [0.7, 0.2], seed=2, beta=0.5)]
    folders.append(a_run(tmp_path / "c", [0.6, 0.4], seed=1))
    names = [f"{folders[0]}: beta 0.1, seed 1", f"{folders[1]}: beta 0.5, seed 2", f"{folders[2]}: beta 0.1, seed 1"]
    assert differences(folders) == names
    assert differences(folders[::2]) == folders[::2]  # nothing but the folder
    figures, savefig = [], matplotlib.figure.Figure.savefig
    watched = lambda self, *args, **options: figures.append(self) or savefig(self, *args)  # noqa: E731
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", watched)
    monkeypatch.setattr(sys, "argv", ["mlx_lm.lora", "--plot", *folders])
    with pytest.raises(SystemExit) as ended:
        mlx_lm.lora.main()
    assert ended.value.code == 0 and f"are in {tmp_path / 'a' / 'comparison.png'}" in capsys.readouterr().out
    assert (tmp_path / "a" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "a" / "training.png").exists()
    loss = figures[0].axes[0]
    assert [line.get_label() for line in loss.lines] == names
    assert loss.lines[1].get_xydata().tolist() == [[1, 0.7], [2, 0.2]]
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == names


def test_one_run_alone_is_drawn_as_it_draws_itself(tmp_path):
    assert plot_runs([a_run(tmp_path / "a", [0.6])]) == tmp_path / "a" / "training.png"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty: there is no metrics.jsonl"):
        plot_runs([str(tmp_path / "a"), str(tmp_path / "empty")])

"""Adds to mlx_lm.tuner.callbacks: TensorBoard; `MetricsFile`, a preference run's reports on disk, and their plot."""

import json
import math
from pathlib import Path

from .._upstream import run_upstream

run_upstream(globals(), needs=("TrainingCallback", "SUPPORT_CALLBACK", "get_reporting_callbacks"))

from ..cli_ui import rprint
from .preference.files import replace_file

METRICS_FILE = "metrics.jsonl"
PLOT_FILE = "training.png"

# Upstream's names of the figures that TRL has another name for.
TRL_NAMES = {"train_loss": "loss", "val_loss": "eval_loss"}


_upstream_get_reporting_callbacks = get_reporting_callbacks


def get_reporting_callbacks(report_to=None, project_name=None, log_dir=None, config=None):
    """As upstream's, where `report_to` may also be `tensorboard`, or `none` for nothing."""
    if str(report_to).strip().lower() == "none":
        return None
    return _upstream_get_reporting_callbacks(report_to, project_name, log_dir, config)


class _WritingCallback(TrainingCallback):
    """Writes each report, and passes it on."""

    def on_train_loss_report(self, train_info):
        """Write a training report and pass it on."""
        self._write(train_info)
        if self.wrapped_callback:
            self.wrapped_callback.on_train_loss_report(train_info)

    def on_val_loss_report(self, val_info):
        """Write a validation report and pass it on."""
        self._write(val_info)
        if self.wrapped_callback:
            self.wrapped_callback.on_val_loss_report(val_info)


class TensorBoardCallback(_WritingCallback):
    """Writes each report's figures under their names into the folder `tensorboard` of `log_dir`, and passes it on."""

    def __init__(self, project_name, log_dir, config, wrapped_callback=None):
        try:
            from tensorboard.summary import Writer
        except ImportError as error:
            raise ImportError("tensorboard is not installed; pip install tensorboard") from error
        self.writer = Writer(str(Path(log_dir, "tensorboard")))
        self.wrapped_callback = wrapped_callback

    def _write(self, report):
        for key, value in report.items():
            if key != "iteration" and isinstance(value, (int, float)):
                self.writer.add_scalar(TRL_NAMES.get(key, key), value, report["iteration"])
        self.writer.flush()


SUPPORT_CALLBACK["tensorboard"] = TensorBoardCallback


class MetricsFile(_WritingCallback):
    """Appends each report to `metrics.jsonl`, one JSON object a line, and passes it on.

    Args:
        folder: where the file is.
        wrapped_callback: another callback to pass each report to, or None.
        iteration: the step that a resumed run starts from; later lines of the interrupted run are dropped.
    """

    def __init__(self, folder, wrapped_callback=None, iteration=0):
        self.path = Path(folder) / METRICS_FILE
        self.wrapped_callback = wrapped_callback
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_metrics(self.path) if line["iteration"] <= iteration] if iteration else []
        text = "".join(json.dumps(line) + "\n" for line in kept)
        replace_file(self.path, lambda file: file.write(text.encode()))

    def _write(self, report):
        # JSON has no word for what is not a number.
        known = {key: value if math.isfinite(value) else None for key, value in report.items()}
        line = {TRL_NAMES.get(key, key): value for key, value in known.items()}
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")


def read_metrics(path):
    """The lines of a metrics file as dicts; what an interruption cut short is left out, and all that follows it."""
    if not Path(path).exists():
        return []
    lines = []
    for text in Path(path).read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            break
        if not isinstance(line, dict) or type(line.get("iteration")) is not int or abs(line["iteration"]) > 2**53:
            break
        lines.append(line)
    return lines


def plot_metrics(folder):
    """Draw a run's curves, training and validation, from `metrics.jsonl` into `training.png`.

    Returns:
        The path of the plot, or None where matplotlib is missing or there is nothing to draw.
    """
    lines = read_metrics(Path(folder) / METRICS_FILE)
    if not lines:
        return None
    try:
        from matplotlib.figure import Figure
    except ImportError:
        rprint("[WARNING] matplotlib is not installed, so training.png is not drawn: pip install matplotlib.")
        return None
    panels = (
        ("loss", ("loss",)),
        ("reward accuracy", ("rewards/accuracies",)),
        ("rewards", ("rewards/chosen", "rewards/rejected", "rewards/margins")),
        ("logps (nats)", ("logps/chosen", "logps/rejected")),
    )
    figure = Figure(figsize=(10, 7), layout="constrained")
    for axes, (title, keys) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        for color, key in enumerate(keys):
            label = key.rpartition("/")[2]
            for prefix, style, kind in (("", "-", "training"), ("eval_", "o--", "validation")):
                points = [(line["iteration"], line.get(prefix + key)) for line in lines]
                # Beyond any figure of a run, and what no axis can show.
                points = [point for point in points if isinstance(point[1], (int, float)) and abs(point[1]) < 1e30]
                if points:
                    axes.plot(*zip(*points, strict=True), style, color=f"C{color}", label=f"{label}, {kind}")
        axes.set_title(title)
        axes.set_xlabel("iteration")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small")
    path = Path(folder) / PLOT_FILE
    replace_file(path, lambda file: figure.savefig(file, dpi=110))
    return path

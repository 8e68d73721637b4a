"""Adds to mlx_lm.tuner.callbacks: TensorBoard, tables of answers, and `MetricsFile`, a run's reports on disk."""

from contextlib import contextmanager
from pathlib import Path
from zlib import crc32

from .._upstream import run_upstream

run_upstream(globals(), needs=("TrainingCallback", "SUPPORT_CALLBACK", "get_reporting_callbacks"))

from ..cli_ui import rprint
from .preference.answers import COLUMNS
from .preference.files import METRICS_FILE
from .preference.metrics import add_lines, begin_lines
from .preference.options import first_line

# Upstream's names of the figures that TRL has another name for.
TRL_NAMES = {"train_loss": "loss", "val_loss": "eval_loss"}


class _Passing(TrainingCallback):
    """Writes each report where it is told to, and passes it on to `wrapped_callback`, if there is one."""

    def on_train_loss_report(self, train_info):
        """Take a training report."""
        self._take("on_train_loss_report", train_info)

    def on_val_loss_report(self, val_info):
        """Take a validation report."""
        self._take("on_val_loss_report", val_info)

    def _take(self, name, report):
        self._write(report)
        if self.wrapped_callback:
            getattr(self.wrapped_callback, name)(report)

    def _write(self, report):
        pass


class Services(_Passing):
    """Passes reports on to services until one fails, which is told: the run goes on, and none gets any more."""

    def __init__(self, wrapped_callback):
        self.wrapped_callback = wrapped_callback

    def _take(self, name, report):
        with self.told():
            super()._take(name, report)

    @contextmanager
    def told(self):
        """Within the context, what a service raises is told, and ends the reports to all."""
        try:
            yield
        except Exception as error:
            self.wrapped_callback = None
            rprint(
                f"[WARNING] A service of report_to failed ({first_line(error)}): the run goes on, and its reports are "
                f"in {METRICS_FILE} alone."
            )


class TensorBoardCallback(_Passing):
    """Writes each report's figures under their names into the folder `tensorboard` of `log_dir`, and passes it on."""

    def __init__(self, project_name, log_dir, config, wrapped_callback=None):
        # Imported where it is needed: few have it.
        from tensorboard.summary import Writer

        self.writer = Writer(str(Path(log_dir, "tensorboard")))
        self.wrapped_callback = wrapped_callback

    def _write(self, report):
        for key, value in report.items():
            if key != "iteration" and isinstance(value, (int, float)):
                self.writer.add_scalar(TRL_NAMES.get(key, key), value, report["iteration"])
        self.writer.flush()


SUPPORT_CALLBACK["tensorboard"] = TensorBoardCallback
SUPPORT_CALLBACK["none"] = lambda wrapped_callback, **_: wrapped_callback


class MetricsFile(_Passing):
    """Appends each report to `metrics.jsonl`, one JSON object a line, and passes it on.

    Args:
        folder: where the file is.
        wrapped_callback: another callback to pass each report to, or None.
        iteration: the step that a resumed run starts from; later lines of the interrupted run are dropped.
        validated_on: what tells the pairs to validate on from others, which each validation's line has as `eval_set`.
    """

    def __init__(self, folder, wrapped_callback=None, iteration=0, validated_on=None):
        self.path = Path(folder) / METRICS_FILE
        self.wrapped_callback = wrapped_callback
        # As a number, as all that stands in a line.
        self.eval_set = None if validated_on is None else crc32(repr(validated_on).encode())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        begin_lines(self.path, iteration)

    def _write(self, report):
        if "val_loss" in report and self.eval_set is not None:
            report = {**report, "eval_set": self.eval_set}
        add_lines(self.path, [{TRL_NAMES.get(key, key): value for key, value in report.items()}])


def send_samples(callback, iteration, lines):
    """Send a validation's answers, lines of `samples.jsonl`, to the services that show tables."""
    rows = [[line[name] for name in COLUMNS] for line in lines]
    while callback is not None:
        if isinstance(callback, Services):
            with callback.told():
                send_samples(callback.wrapped_callback, iteration, lines)
            return
        if isinstance(callback, WandBCallback):
            wandb.log({"samples": wandb.Table(columns=list(COLUMNS), data=rows)}, step=iteration)
        elif isinstance(callback, SwanLabCallback):
            table = swanlab.echarts.Table()
            table.add(list(COLUMNS), rows)
            swanlab.log({"samples": table}, step=iteration)
        callback = getattr(callback, "wrapped_callback", None)

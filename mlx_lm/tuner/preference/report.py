"""What a run says and writes while it goes: on the screen, in `metrics.jsonl` and to a callback."""

import time

import mlx.core as mx
import numpy as np

from ...cli_ui import make_console, rprint
from .batches import PLAIN
from .checkpoint import REMEDY
from .evaluation import mean_figures, means
from .options import ConfigError


class Window:
    """The steps since the last report.

    Attributes:
        sums: of each step, `Objective`'s `(9,)` sums.
        norm: the last update's gradient norm, None without one.
        tokens: `(2,)`, processed ones and of these padding.
        seconds: that the steps took, without validations and saves.
    """

    def __init__(self):
        self.sums, self.norm, self.tokens, self.seconds = [], None, np.zeros(2), 0.0

    def add(self, sums, norm, tokens):
        """Add a step; `norm` is None where it made no update."""
        self.sums.append(sums)
        self.norm = self.norm if norm is None else norm
        self.tokens += tokens


class Reporter:
    """Reports on a run's training and validation.

    Args:
        ui: upstream's `TrainUI`.
        callback: a `TrainingCallback`, or None.
        rank: of this worker; only the first one speaks.
    """

    def __init__(self, ui, callback, rank):
        self.ui, self.callback, self.rank = ui, callback, rank

    def training(self, window, progress, learning_rate, peak_memory):
        """Report on the steps since the last report.

        Raises:
            ConfigError: the loss is not finite.
        """
        figures, pairs, trained = means(mx.stack(window.sums).sum(0))
        if not np.isfinite(figures["loss"]):
            raise ConfigError(
                f"the loss is {figures['loss']} at iteration {progress.iteration}; the adapters saved before stay as "
                f"they are. {REMEDY}"
            )
        progress.trained_tokens += int(trained)
        speed, seconds = trained / window.seconds, window.seconds
        self.ui.report_train(progress.iteration, figures["loss"], speed, progress.trained_tokens)
        self._say(figures, f"lr {learning_rate:.2e} · {peak_memory:.2f} GB")
        if self.callback is None:
            return
        processed, padding = window.tokens
        report = {"iteration": progress.iteration, "train_loss": figures.pop("loss"), **figures}
        if window.norm is not None:
            report["grad_norm"] = window.norm.item()
        report |= {"learning_rate": learning_rate, "iterations_per_second": len(window.sums) / seconds}
        report |= {"pairs_per_second": pairs / seconds, "tokens_per_second": speed}
        report |= {"trained_tokens": progress.trained_tokens, "padding_share": padding / processed}
        self.callback.on_train_loss_report(report | {"peak_memory": peak_memory})

    def validation(self, iteration, objective, logps, batch_size):
        """Score the validation pairs of `ReferenceLogps`, report, and return the means of FIGURES."""
        tic = time.perf_counter()
        with self.ui.val_task(-(-len(logps.val_rows) // batch_size)) as advance:
            figures = mean_figures(objective, logps.val_dataset, logps.val_rows, logps.valid, batch_size, advance)
        seconds = time.perf_counter() - tic
        self.ui.report_val(iteration, figures["loss"], seconds)
        self._say(figures)
        if self.callback is not None:
            report = {"iteration": iteration, "val_loss": figures["loss"], "val_time": seconds}
            report |= {f"eval_{name}": value for name, value in figures.items() if name != "loss"}
            self.callback.on_val_loss_report(report)
        return figures

    def _say(self, figures, more=""):
        if self.rank != 0:
            return
        text = (
            f"chosen {figures['rewards/chosen']:+.3f} · rejected {figures['rewards/rejected']:+.3f} · "
            f"accuracy {figures['rewards/accuracies']:.3f} · margin {figures['rewards/margins']:+.3f}"
        )
        make_console().print(f"          [ui.muted]{text}{' · ' + more if more else ''}[/ui.muted]")


def say_fallbacks(scorer, share_prompt):
    """Say what a model's build keeps from being done the fast way."""
    if share_prompt and scorer.arrangement == PLAIN:
        rprint("This model's cache cannot hold a shared prompt: each prompt is run for both of its responses.")
    if scorer.head is None:
        rprint("This model's output head cannot be run apart: it projects prompt positions too.")

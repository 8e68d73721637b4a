"""What a run says and writes while it goes: on the screen, in `metrics.jsonl` and to a callback."""

import time

import mlx.core as mx
import numpy as np

from ...cli_ui import rprint
from .batches import PLAIN
from .divergence import validation_kl
from .evaluation import pair_figures
from .figures import SHARES, as_means, means_of
from .memory import held_memory, peak_memory
from .nonfinite import REMEDY
from .options import ConfigError
from .workers import confirm

# Updates left out in a row, after which a run does not go on.
MOST_LOST = 10


class Window:
    """The steps since the last report.

    Attributes:
        sums: of each step, `Objective`'s sums.
        norms: of each step, the gradient's norm, None where it made no update.
        tokens: `(2,)`, processed ones and of these padding.
        seconds: that the steps took, without validations and saves.
        counted: steps that are in `Progress` already.
    """

    def __init__(self):
        self.sums, self.norms, self.tokens, self.seconds, self.counted = [], [], np.zeros(2), 0.0, 0

    def add(self, sums, norm, tokens):
        """Add a step; `norm` is None where it made no update."""
        self.sums.append(sums)
        self.norms.append(norm)
        self.tokens += tokens


class Reporter:
    """Reports on a run's training and validation.

    Args:
        check: called with a window's losses, norms and first iteration; raises where a run must not go on. None where
            steps that are not finite are left out.
        further: names of an `Objective`'s figures besides FIGURES.
    """

    def __init__(self, ui, callback, check, further=()):
        self.ui, self.callback, self.check, self.further = ui, callback, check, further

    def training(self, window, progress, learning_rate):
        """Report on the steps since the last report, and count them.

        Raises:
            ConfigError: a loss or a gradient is not finite; where that is left out, in MOST_LOST updates in a row.
        """
        sums, norms = self.count(window, progress)
        sound = np.isfinite(sums).all(axis=1)
        figures, pairs, trained = as_means((sums[sound] if sound.any() else sums).sum(axis=0), self.further)
        speed, seconds = trained / window.seconds, window.seconds
        peak, trained_tokens = peak_memory() / 1e9, progress.trained_tokens
        self.ui.report_train(progress.iteration, figures, learning_rate, speed, trained_tokens, peak, progress.skipped)
        if self.callback is None:
            return
        processed, padding = window.tokens
        figures = {name: value for name, value in figures.items() if not name.startswith(SHARES)}
        report = {"iteration": progress.iteration, "train_loss": figures.pop("loss"), **figures}
        if norms := [norm for norm in norms if norm is not None]:
            report["grad_norm"] = norms[-1]
        if self.check is None:
            report["skipped_updates"] = progress.skipped
        report |= {"learning_rate": learning_rate, "iterations_per_second": len(sums) / seconds}
        report |= {"pairs_per_second": pairs / seconds, "tokens_per_second": speed}
        report |= {"trained_tokens": progress.trained_tokens, "padding_share": padding / processed}
        self.callback.on_train_loss_report(report | {"peak_memory": peak, "held_memory": held_memory() / 1e9})

    def count(self, window, progress):
        """Check and count a window's new steps, and raise as `training`.

        Returns:
            `(sums over all workers (k, n), norms)` as numbers; None where there are no steps.
        """
        if not window.sums:
            return None
        sums = np.array(mx.distributed.all_sum(mx.stack(window.sums)), np.float64)
        confirm()
        norms = [None if norm is None else norm.item() for norm in window.norms]
        new, new_norms = sums[window.counted :], norms[window.counted :]
        window.counted = len(sums)
        if self.check is not None:
            self.check(new[:, 0], new_norms, progress.iteration - len(new) + 1)
        for norm in new_norms:
            if norm is not None:
                lost = not np.isfinite(norm)
                progress.skipped += lost
                progress.skipped_last = progress.skipped_last + 1 if lost else 0
        if progress.skipped_last >= MOST_LOST:
            raise ConfigError(
                f"the loss or the gradient was not finite in the last {progress.skipped_last} updates, up to iteration "
                f"{progress.iteration}. {REMEDY}"
            )
        sound = np.isfinite(new).all(axis=1)
        if sound.any():
            progress.trained_tokens += int(as_means(new[sound].sum(axis=0), self.further)[2])
        return sums, norms

    def validation(self, iteration, objective, data, batch_size):
        """Score the validation pairs of `RunData` and report; `(means_of, pair_figures)` of them."""
        tic = time.perf_counter()
        with self.ui.val_task(len(data.valid_rows)) as advance:
            found = pair_figures(objective, data.valid_set, data.valid_rows, data.valid_logps, batch_size, advance)
            figures = means_of(found)
            if not objective.loss.unpaired and (kl := validation_kl(objective, data)) is not None:
                figures["kl"] = kl  # of single responses the loss has an estimate of its own
        seconds = time.perf_counter() - tic
        self.ui.report_val(iteration, figures, len(data.valid_rows), seconds)
        if not np.isfinite(figures["loss"]):
            rprint(f"[WARNING] The validation loss is {figures['loss']} at iteration {iteration}. {REMEDY}")
        if self.callback is not None:
            report = {"iteration": iteration, "val_loss": figures["loss"], "val_time": seconds}
            report |= {f"eval_{name}": value for name, value in figures.items() if name != "loss"}
            report["eval_pairs"] = len(data.valid_rows)
            self.callback.on_val_loss_report(report)
        return figures, found


def say_fallbacks(scorer, share_prompt):
    """Say what a model's build keeps from being done the fast way."""
    if share_prompt and scorer.arrangement == PLAIN:
        rprint("This model's cache cannot hold a shared prompt: each prompt is run for both of its responses.")
    if scorer.head is None:
        rprint("This model's output head cannot be run apart: it projects prompt positions too.")

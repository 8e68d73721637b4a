"""What a preference run shows on the terminal: bars that say what they are, and a report in a line of 100 columns.

Its `cli_ui` has the console and the parts.
"""

from contextlib import contextmanager

from rich.progress import Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ...cli_ui import SquareBar, TrainUI, make_console
from .figures import SHARES, signed

HEADER = (
    f"{'iter':>6}  {'loss':>8}  {'chosen':>7}  {'rejected':>8}  {'accuracy':>8}  {'margin':>7}  {'lr':>8}  "
    f"{'tok/s':>7}  {'tokens':>7}  {'GB':>5}"
)


def make_bars(rank):
    """A `Progress`, on the first worker alone, of bars with a name of 16 letters, a count, the time gone and left."""
    muted = "[ui.muted]{}[/ui.muted]".format
    return Progress(
        TextColumn("[bold blue]{task.description:<16}[/bold blue]"),
        SquareBar(bar_width=20),
        TextColumn("[progress.percentage]{task.percentage:>3.0f}%"),
        TextColumn("[bold blue]{task.completed:>5,}[/bold blue]" + muted("/{task.total:,}")),
        TimeElapsedColumn(),
        TextColumn(muted("elapsed")),
        TimeRemainingColumn(),
        TextColumn(muted("left")),
        console=make_console(),
        disable=rank != 0,
    )


class RunUI(TrainUI):
    """Upstream's `TrainUI` with a preference run's figures, a line a report."""

    def __init__(self, total_iters, rank=0, done=0):
        super().__init__(total_iters, rank)
        self._progress = make_bars(rank)
        # A resumed run's earlier iterations are done.
        self._task = self._progress.add_task("train", total=total_iters, completed=done)

    def __enter__(self):
        if self._rank == 0:
            self._console.print(f"[ui.heading]{HEADER}[/ui.heading]")
        self._progress.__enter__()
        return self

    def report_train(self, iteration, figures, learning_rate, speed, tokens, memory, skipped=0):
        """Print a training report: means of FIGURES, tokens a second and so far, the peak memory so far in GB."""
        falls = self._prev_train_loss is None or figures["loss"] <= self._prev_train_loss
        self._prev_train_loss = figures["loss"]
        more = f"{learning_rate:>8.2e}  {speed:>7,.0f}  {tokens / 1000:>6,.1f}k  {memory:>5.2f}"
        more += f"  [ui.warn]{skipped} skipped[/ui.warn]" if skipped else ""
        self._report(iteration, figures, "▼" if falls else "▲", "green" if falls else "yellow", more)

    def report_val(self, iteration, figures, pairs, seconds):
        """Print a validation's report: its means of FIGURES, how many pairs it scored, and how long it took."""
        more = f"validation of {pairs:,} pairs, {seconds:.1f} s"
        if shares := [value for name, value in figures.items() if name.startswith(SHARES)]:
            more += f", experts {min(shares):.1%} to {max(shares):.1%}"
        self._report(iteration, figures, " ", "magenta", more)

    def _report(self, iteration, figures, arrow, style, more):
        if self._rank != 0:
            return
        chosen, rejected, accuracy, margin = (
            figures[f"rewards/{name}"] for name in ("chosen", "rejected", "accuracies", "margins")
        )
        more += f"  KL {figures['kl']:.3f}" if "kl" in figures else ""
        right = f"{accuracy:>8.3f}  [ui.strong]{signed(margin):>7}[/ui.strong]"
        # Numbers too long for their columns must not break a line in two.
        self._console.print(
            f"[ui.muted]{iteration:>6}[/ui.muted]  [bold {style}]{figures['loss']:>6.3f} {arrow}[/bold {style}]  "
            f"{signed(chosen):>7}  {signed(rejected):>8}  {right}  [ui.muted]{more}[/ui.muted]",
            soft_wrap=True,
        )

    @contextmanager
    def val_task(self, total, name="validation"):
        """Within the context, a bar of `total` things beside the run's; gives what takes how many more are done."""
        task = self._progress.add_task(name, total=total)
        try:
            yield lambda count: self._progress.advance(task, count)
        finally:
            self._progress.remove_task(task)

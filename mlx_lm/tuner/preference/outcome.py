"""What a run leaves to look at: answers, curves, page and model card as it goes on, and the panel that it ends with."""

from pathlib import Path

import mlx.core as mx
from rich.markup import escape

from ...cli_ui import make_console, print_header_panel
from ..callbacks import send_samples
from .answers import answers, print_side_by_side, texts_of
from .card import write_card
from .commands import next_commands
from .curves import plot_metrics
from .figures import BEST, rounded
from .files import ADAPTERS_FILE, BEST_FOLDER, METRICS_FILE, PAGE_FILE, PLOT_FILE, SAMPLES_FILE
from .health import health
from .metrics import add_lines, begin_lines, best_of, read_metrics, read_validations, validations_of
from .page import table_rows, write_page
from .pairs import places_of
from .scores import effective_count, prompts_of, reference_totals


class Outcome:
    """What the first worker of a run writes for people; `iteration` is the one that the run starts from."""

    def __init__(self, folder, objective, data, args, config, ui, callback, iteration):
        self.folder, self.objective, self.data, self.args, self.config = folder, objective, data, args, config
        self.ui, self.callback = ui, callback
        self._tokenizer = getattr(data.valid_set, "tokenizer", None)
        self._found = self._rows = None
        if args.sample_prompts:
            begin_lines(folder / SAMPLES_FILE, iteration)

    @property
    def _sampled(self):
        return self.data.valid_rows[: self.args.sample_prompts or 0]

    def validated(self, iteration, figures):
        """Take a validation's figures, pair by pair; answer the sampled prompts, and draw, where training has begun."""
        self._found = iteration, figures
        if len(self._sampled):
            self._answer(iteration)
        if iteration > 0:
            self.draw()

    def _answer(self, iteration):
        pairs = [self.data.valid_set[row] for row in self._sampled]
        with self.ui.val_task(len(pairs), "answers") as advance:
            found = answers(self.objective.scorer.model, self._tokenizer, [pair.prompt for pair in pairs], advance)
        where = places_of(self.data.valid_set)
        lines = []
        for row, pair, answer in zip(self._sampled, pairs, found, strict=True):
            line = {"iteration": iteration, "row": where(row)} | texts_of(self._tokenizer, pair)
            lines.append(line | {"answer": answer})
        add_lines(self.folder / SAMPLES_FILE, lines)
        # Those of a run that is resumed may be to other prompts, so that the first to this one may be this one.
        earlier = [line for line in read_metrics(self.folder / SAMPLES_FILE) if line["prompt"] == lines[0]["prompt"]]
        if earlier[0]["iteration"] < iteration:
            print_side_by_side(earlier[0], lines[0])
        send_samples(self.callback, iteration, lines)

    def health(self, validations=None):
        """The sentences of `health`; of `validations`, where they have been read."""
        validations, effective = validations or read_validations(self.folder), None
        if self._found is not None:
            prompts = prompts_of(self.data.valid_set, self.data.valid_rows)
            effective = effective_count(self._found[1]["rewards/accuracies"], prompts)
        return health(validations, self.objective.loss, effective)

    def draw(self, ended=False):
        """Draw the curves and write the page; with the adapters of a run that has `ended`, the model card."""
        # Read once: the file of a long run is large, and this comes with each validation.
        lines = read_metrics(self.folder / METRICS_FILE)
        picture, validations = plot_metrics(self.folder, lines), validations_of(lines)
        settings = self.config or {name: value for name, value in vars(self.args).items() if value is not None}
        if self._found is not None:
            iteration, figures = self._found
            if self._rows is None:
                self._rows = table_rows(self.data.valid_set, self.data.valid_rows, self._tokenizer)
            samples = read_metrics(self.folder / SAMPLES_FILE)
            write_page(
                self.folder, settings, validations, self.health(validations), samples, picture,
                iteration, self._rows, figures, reference_totals(self.data.valid_logps, self.objective.loss),
            )  # fmt: skip
        if ended and self.config and "model" in self.config:
            write_card(self.folder, self.config, self.objective.loss, validations)


def print_closing(args, epochs):
    """Print the panel, on the first worker, after a run that asked for `epochs`, or None."""
    if mx.distributed.init().rank() != 0:
        return
    folder, console = Path(args.adapter_path), make_console()
    validations = read_validations(folder)
    best, last = best_of(validations, args.save_best)
    rows, patience = [], None
    if last is not None:
        without_gain = sum(line["iteration"] > best["iteration"] for line in validations)
        if args.early_stop and without_gain >= args.early_stop:
            patience = 2 * without_gain
        rows += [("best validation", _told(best)), ("last validation", _told(last))]
    rows.append(("adapters", str(folder / ADAPTERS_FILE)))
    if args.save_best and (folder / BEST_FOLDER).is_dir():
        rows.append(("best adapters", str(folder / BEST_FOLDER)))
    looks = [name for name in (PAGE_FILE, PLOT_FILE) if (folder / name).exists()]
    if looks:
        rows.append(("to look at", " · ".join(str(folder / name) for name in looks)))
    print_header_panel(console, "done", [(name, escape(text)) for name, text in rows])
    for name, command in next_commands(args, epochs, patience).items():
        # Not wrapped, so that a terminal copies a command as one line.
        console.print(f"  [ui.label]{name:8}[/ui.label] ", end="")
        console.print(command, soft_wrap=True, markup=False, style="ui.strong")


def _told(line):
    figures = {name.removeprefix("eval_"): line.get(f"eval_{key}") for name, (key, _) in BEST.items()}
    told = (f"{name} {rounded(value)}" for name, value in figures.items() if value is not None)
    return f"{', '.join(told)} (iteration {line['iteration']})"

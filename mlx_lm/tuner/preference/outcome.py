"""What a run leaves to look at: the answers, the curves, the page and the model card, drawn again as it goes on."""

from pathlib import Path

from ..callbacks import send_samples
from .answers import answers, print_side_by_side, texts_of
from .card import write_card
from .curves import plot_metrics
from .health import health
from .metrics import SAMPLES_FILE, add_lines, begin_lines, read_metrics, read_validations
from .nonfinite import places_of
from .page import table_rows, write_page


class Outcome:
    """What the first worker of a run writes for people; `iteration` is the one that the run starts from."""

    def __init__(self, folder, objective, logps, args, config, ui, callback, iteration):
        self.folder, self.objective, self.logps, self.args, self.config = folder, objective, logps, args, config
        self.ui, self.callback = ui, callback
        self._tokenizer = getattr(logps.val_dataset, "tokenizer", None)
        self._found = self._rows = None
        if args.sample_prompts:
            begin_lines(folder / SAMPLES_FILE, iteration)

    @property
    def _sampled(self):
        return self.logps.val_rows[: self.args.sample_prompts or 0]

    def validated(self, iteration, figures, last):
        """Take a validation's figures, pair by pair; answer the sampled prompts, and draw all but the first and last.

        The first has nothing to draw yet, and after the last one the end draws.
        """
        self._found = iteration, figures
        if len(self._sampled):
            self._answer(iteration)
        if iteration > 0 and not last:
            self.draw()

    def _answer(self, iteration):
        pairs = [self.logps.val_dataset[int(row)] for row in self._sampled]
        with self.ui.val_task(len(pairs), "answers") as advance:
            found = answers(self.objective.scorer.model, self._tokenizer, [pair.prompt for pair in pairs], advance)
        where = places_of(self.logps.val_dataset)
        lines = []
        for row, pair, answer in zip(self._sampled, pairs, found, strict=True):
            line = {"iteration": iteration, "row": where(int(row))} | texts_of(self._tokenizer, pair)
            lines.append(line | {"answer": answer})
        add_lines(self.folder / SAMPLES_FILE, lines)
        earlier = read_metrics(self.folder / SAMPLES_FILE)
        if iteration > 0:
            print_side_by_side(earlier[0], lines[0])
        send_samples(self.callback, iteration, lines)

    def health(self):
        """The sentences of `health`."""
        return health(read_validations(self.folder), self.objective.loss)

    def draw(self, ended=False):
        """Draw the curves and write the page; with the adapters of a run that has `ended`, the model card."""
        picture = plot_metrics(self.folder)
        settings = self.config or {name: value for name, value in vars(self.args).items() if value is not None}
        if self._found is not None:
            iteration, figures = self._found
            if self._rows is None:
                self._rows = table_rows(self.logps.val_dataset, self.logps.val_rows, self._tokenizer)
            samples = read_metrics(self.folder / SAMPLES_FILE) if self.args.sample_prompts else []
            write_page(
                self.folder, settings, read_validations(self.folder), self.health(), samples, picture,
                iteration, self._rows, figures, self.logps.valid,
            )  # fmt: skip
        if ended and self.config and "model" in self.config:
            write_card(Path(self.folder), self.config, self.objective.loss, read_validations(self.folder))

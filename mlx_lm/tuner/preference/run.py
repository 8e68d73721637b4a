"""A preference run: the reference pass, the training loop, evaluation, reports and checkpoints."""

import hashlib
import time
from contextlib import nullcontext
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.nn.utils import average_gradients
from mlx.utils import tree_flatten, tree_map_with_path

from ..._backend import slow_blas_hint
from ...cli_ui import TrainUI, make_console, rprint
from ...utils import maybe_set_recommended_wired_limit
from ..callbacks import MetricsFile, plot_metrics
from .batches import PLAIN, make_batch, plan
from .checkpoint import (
    REMEDY,
    read_state,
    refuse_non_finite,
    restore_state,
    save_adapters,
    save_state,
    starting_point,
)
from .load import check_same_tokens, load_named
from .logps import Scorer
from .memory import Dispatch
from .modules import evaluating
from .objective import OPTIONS as LOSS_OPTIONS
from .objective import preference_loss
from .options import RUN_OPTIONS, ConfigError, is_preference
from .reference import Reference, default_cache_folder, row_key
from .schedule import Schedule, pair_lengths, reference_rows
from .sharing import checkpointed_layers
from .step import FIGURES, Objective, Step

# What a run takes where nothing is given. A loss's parameter is None: its default depends on the loss.
DEFAULTS = {option.name: None for option in LOSS_OPTIONS} | {option.name: option.default for option in RUN_OPTIONS}
DEFAULTS["loss_type"] = "sft"


def loss_of(args):
    """The `PreferenceLoss` that `args` ask for.

    Raises:
        ConfigError: a value is out of range, or the options exclude each other.
    """
    return preference_loss(**{option.name: getattr(args, option.name) for option in LOSS_OPTIONS})


def reference_of(model, args, tokenizer=None, trust_remote_code=False):
    """The `Reference` that `args` ask for: `model` as it is now, or another one loaded for the purpose.

    Args:
        model: the policy.
        args: `TrainingArgs`.
        tokenizer: the policy's, which `reference_model`'s is compared with, or None.
        trust_remote_code: as upstream's `load` takes it.

    Raises:
        ConfigError: `reference_model` cannot be loaded, or has another vocabulary.
    """
    cache = args.reference_cache
    if cache is None:
        cache = default_cache_folder()
    elif cache in ("none", "None", ""):
        cache = None
    if args.reference_model is not None:
        model, other = load_named("reference_model", args.reference_model, trust_remote_code)
        if tokenizer is not None:
            check_same_tokens(tokenizer, other, args.reference_model)
    return Reference(model, args.reference_batch_size, args.share_prompt, cache, args.reference_cache_size)


def unwrapped(dataset):
    """The `PreferenceDataset` in upstream's `CacheDataset`, or the dataset itself."""
    return getattr(dataset, "_data", dataset) if type(dataset).__name__ == "CacheDataset" else dataset


def evaluated_rows(dataset, batch_size, num_batches):
    """The rows that an evaluation scores: the first ones, the same ones every time."""
    return np.arange(len(dataset) if num_batches == -1 else min(len(dataset), batch_size * num_batches))


def evaluate_preference(model, dataset, args, batch_size, num_batches, reference=None, progress_callback=None):
    """Score pairs, each exactly once; see `trainer.evaluate`.

    Returns:
        A dict of the means of FIGURES over the pairs.
    """
    dataset = unwrapped(dataset)
    rows = evaluated_rows(dataset, batch_size, num_batches)
    objective = Objective(Scorer(model, args.share_prompt), loss_of(args))
    if objective.loss.needs_reference:
        reference = reference_of(model, args) if reference is None else reference
        reference = reference.logps(dataset, rows) if isinstance(reference, Reference) else reference
    return mean_figures(objective, dataset, rows, reference, batch_size, progress_callback)


def mean_figures(objective, dataset, rows, reference, batch_size, progress_callback=None):
    """The means of FIGURES over `rows` of `dataset`, whose reference logps are `reference` `(n, 2, 2)`."""
    world = mx.distributed.init()
    pairs = [dataset[int(row)] for row in rows]
    lengths = [pair_lengths(pair) for pair in pairs]
    totals = mx.zeros((len(FIGURES) + 2,))
    arrangement = objective.scorer.arrangement
    with evaluating(objective.scorer.model):
        for chosen in plan(lengths, batch_size, arrangement):
            here = chosen[world.rank() :: world.size()]
            if len(here):
                batch, *_ = make_batch([pairs[i] for i in here], arrangement)
                totals = totals + objective(batch, reference_rows(reference, here))[1]
                mx.eval(totals)
            if progress_callback is not None:
                progress_callback()
    return means(totals)[0]


def means(totals):
    """`(means of FIGURES, pairs, tokens)` over all workers, of `Objective`'s sums on this one."""
    *sums, pairs, tokens = np.array(mx.distributed.all_sum(totals), np.float64).tolist()
    return {name: total / pairs for name, total in zip(FIGURES, sums, strict=True)}, pairs, tokens


class Run:
    """A preference run in progress."""

    def __init__(self, model, optimizer, train_dataset, val_dataset, args, callback, reference, config):
        self.model, self.optimizer, self.args, self.config = model, optimizer, args, config
        self.folder = Path(args.adapter_file).parent
        self.dataset = unwrapped(train_dataset)
        self.val_dataset = unwrapped(val_dataset) if val_dataset else None
        self.loss = loss_of(args)
        self.scorer = Scorer(model, args.share_prompt)
        self.schedule = Schedule(self.dataset, args, self.scorer.arrangement)
        self.objective = Objective(self.scorer, self.loss)
        self.rank = mx.distributed.init().rank()
        self._say_fallbacks()
        self._check_rows()
        self.settings = self._settings()
        if args.resume:
            # A checkpoint that does not fit is told before the reference pass, which may be long.
            read_state(self.folder, model, self.settings, args.iters)
        self.reference, self.val_reference = None, None
        self.val_rows = evaluated_rows(self.val_dataset, args.batch_size, args.val_batches) if self.val_dataset else []
        if self.loss.needs_reference:
            reference = reference or reference_of(model, args)
            self.reference = self._reference_table(reference, self.schedule.visited(1, args.iters))
            if len(self.val_rows):
                self.val_reference = reference.logps(self.val_dataset, self.val_rows)
            if args.reference_model is not None:
                reference.release()
        compiled = args.compile if args.compile is not None else mx.default_device() == mx.gpu
        self.step = Step(model, optimizer, self.objective, compiled, args.max_grad_norm)
        self.dispatch = Dispatch()
        self.iteration, self.trained_tokens, self.updates = 0, 0, 0
        if args.resume:
            self._restore()
        self.callback = callback
        if self.rank == 0:
            self.callback = MetricsFile(self.folder, callback, self.iteration)

    def _say_fallbacks(self):
        if self.args.share_prompt and self.scorer.arrangement == PLAIN:
            rprint("This model's cache cannot hold a shared prompt: each prompt is run for both of its responses.")
        if self.scorer.head is None:
            rprint("This model's output head cannot be run apart: it projects prompt positions too.")

    def _check_rows(self):
        pairs = [self.dataset[i] for i in range(len(self.dataset))]
        names = ", ".join(self.loss.names)
        if not self.loss.reads_margins and any(pair.margin for pair in pairs):
            raise ConfigError(f"rows have a margin, but loss_type {names} does not read it; remove the key margin.")
        if self.loss.sorts_batch and any(pair.weight != 1 for pair in pairs):
            raise ConfigError(f"rows have a weight, but loss_type {names} sorts the batch; remove the key weight.")

    def _reference_table(self, reference, rows):
        table = np.full((len(self.dataset), 2, 2), np.nan, np.float32)
        table[rows] = reference.logps(self.dataset, rows)
        return table

    def _settings(self):
        """What has to be the same for a checkpoint to be gone on from."""
        names = ["batch_size", "grad_accumulation_steps", "max_seq_length", "seed", "share_prompt", "max_grad_norm"]
        settings = {name: getattr(self.args, name) for name in [*names, "reference_model"]} | self.loss.parameters
        settings |= {"loss_type": list(self.loss.names), "loss_weights": self.loss.weights}
        # Of the command's configuration, what the optimizer and the adapter were made from.
        made = ("learning_rate", "lr_schedule", "optimizer", "optimizer_config", "fine_tune_type", "lora_parameters")
        settings |= {name: (self.config or {}).get(name) for name in made}
        data = hashlib.blake2b(digest_size=8)
        for pair in (self.dataset[i] for i in range(len(self.dataset))):
            data.update(row_key(pair) + repr((pair.margin, pair.weight)).encode())
        start = starting_point(self.model)
        return settings | {"the training data": data.hexdigest(), "the model or the adapter it begins with": start}

    def _restore(self):
        self.iteration, extra = restore_state(self.folder, self.model, self.optimizer, self.settings, self.args.iters)
        self.trained_tokens, self.updates = (int(value) for value in extra.pop("counts").tolist())
        self.reference = np.array(extra.pop("reference")) if "reference" in extra else self.reference
        self.val_reference = np.array(extra.pop("val_reference")) if "val_reference" in extra else self.val_reference
        if self.step.compiled:
            # A compiled step rounds otherwise: the same ones are compiled as if there had been no interruption.
            for iteration in range(1, self.iteration + 1):
                self.step.visit(self.schedule.batch(iteration, None)[0])
        if "pairs" in extra:
            # Parts of the tree that hold no array have left no trace in the file.
            gradient = tree_map_with_path(lambda name, _: extra[name], self.model.trainable_parameters())
            self.step.accumulated = (gradient, extra["pairs"])

    def save(self, numbered=True):
        """Write the adapters, and the state to go on from."""
        accumulated, workers = self.step.accumulated, mx.distributed.init().size()
        if accumulated is not None and workers > 1:
            # Each worker goes on from the mean of all.
            gradient, pairs = accumulated
            accumulated = average_gradients(gradient), mx.distributed.all_sum(pairs) / workers
        refuse_non_finite([self.model.trainable_parameters(), self.optimizer.state, accumulated or []], self.iteration)
        if self.rank != 0:
            return None
        extra = [("counts", mx.array([self.trained_tokens, self.updates], mx.int64))]
        if self.args.reference_update_steps and self.loss.needs_reference:
            extra.append(("reference", mx.array(self.reference)))
            if self.val_reference is not None:
                extra.append(("val_reference", mx.array(self.val_reference)))
        if accumulated is not None:
            gradient, pairs = accumulated
            extra += [("pairs", pairs), *tree_flatten(gradient)]
        saved = save_adapters(self.model, self.args.adapter_file, self.iteration if numbered else None, self.config)
        save_state(self.folder, self.model, self.optimizer, self.iteration, self.settings, extra)
        return saved

    def validate(self, ui):
        """Score the validation pairs and report."""
        tic = time.perf_counter()
        total = -(-len(self.val_rows) // self.args.batch_size)
        with ui.val_task(total) as advance:
            figures = mean_figures(
                self.objective, self.val_dataset, self.val_rows, self.val_reference, self.args.batch_size, advance
            )
        seconds = time.perf_counter() - tic
        ui.report_val(self.iteration, figures["loss"], seconds)
        self._say(figures)
        if self.callback is not None:
            report = {"iteration": self.iteration, "val_loss": figures.pop("loss"), "val_time": seconds}
            self.callback.on_val_loss_report(report | {f"eval_{name}": value for name, value in figures.items()})

    def report(self, ui, totals, norm, seconds, steps, tokens):
        """Report on the steps since the last report; `norm` is the last update's gradient norm, None without one."""
        figures, pairs, trained = means(totals)
        if not np.isfinite(figures["loss"]):
            raise ConfigError(
                f"the loss is {figures['loss']} at iteration {self.iteration}; the adapters saved before stay as they "
                f"are. {REMEDY}"
            )
        self.trained_tokens += int(trained)
        learning_rate = self.optimizer.learning_rate.item()
        peak_memory = self.dispatch.peak_memory() / 1e9
        ui.report_train(self.iteration, figures["loss"], trained / seconds, self.trained_tokens)
        self._say(figures, f"lr {learning_rate:.2e} · {peak_memory:.2f} GB")
        if self.callback is not None:
            processed, padding = tokens
            report = {"iteration": self.iteration, "train_loss": figures.pop("loss"), **figures}
            if norm is not None:
                report["grad_norm"] = norm.item()
            self.callback.on_train_loss_report(
                report
                | {
                    "learning_rate": learning_rate,
                    "iterations_per_second": steps / seconds,
                    "pairs_per_second": pairs / seconds,
                    "tokens_per_second": trained / seconds,
                    "trained_tokens": self.trained_tokens,
                    "padding_share": padding / processed,
                    "peak_memory": peak_memory,
                }
            )

    def _is_last_update_of_report(self):
        """Whether no other update is made from this iteration to the next report."""
        every, report = self.args.grad_accumulation_steps, self.args.steps_per_report
        next_update, next_report = self.iteration + every, -(-self.iteration // report) * report
        return min(next_update, self.args.iters) > next_report or self.iteration == self.args.iters

    def _say(self, figures, more=""):
        if self.rank != 0:
            return
        text = (
            f"chosen {figures['rewards/chosen']:+.3f} · rejected {figures['rewards/rejected']:+.3f} · "
            f"accuracy {figures['rewards/accuracies']:.3f} · margin {figures['rewards/margins']:+.3f}"
        )
        make_console().print(f"          [ui.muted]{text}{' · ' + more if more else ''}[/ui.muted]")

    def _update_reference(self):
        """TR-DPO: the policy becomes the reference of the rows that the coming steps visit."""
        steps = self.args.reference_update_steps * self.args.grad_accumulation_steps
        last = min(self.iteration + steps, self.args.iters)
        reference = Reference(self.model, self.args.reference_batch_size, self.args.share_prompt)
        rows = self.schedule.visited(self.iteration + 1, last)
        self.reference[rows] = reference.logps(self.dataset, rows)
        if len(self.val_rows):
            self.val_reference = reference.logps(self.val_dataset, self.val_rows)

    def train(self):
        """Take the steps that are left."""
        args = self.args
        totals, norm, tokens, seconds, steps = mx.zeros((len(FIGURES) + 2,)), None, np.zeros(2), 0.0, 0
        with TrainUI(args.iters, rank=self.rank) as ui:
            for _ in range(self.iteration):
                ui.advance()
            if self.iteration == 0 and len(self.val_rows):
                self.validate(ui)
            self.model.train()
            tic, running = time.perf_counter(), totals
            upcoming = self.schedule.batch(self.iteration + 1, self.reference) if self.iteration < args.iters else None
            while self.iteration < args.iters:
                batch, reference, counts = upcoming
                self.iteration += 1
                last = self.iteration == args.iters
                # The steps that are left over at the end make an update of their own: no pair is dropped.
                update = self.iteration % args.grad_accumulation_steps == 0 or last
                sums, new_norm = self.step(batch, reference, update)
                totals, tokens, steps = totals + sums, tokens + counts, steps + 1
                self.updates += update
                refresh = update and args.reference_update_steps and self.updates % args.reference_update_steps == 0
                refresh = refresh and self.loss.needs_reference and not last
                reports = last or self.iteration % args.steps_per_report == 0
                evaluates = len(self.val_rows) and (last or self.iteration % args.steps_per_eval == 0)
                saves = self.iteration % args.steps_per_save == 0
                if update and self._is_last_update_of_report():
                    # The others' norms are never computed.
                    norm = new_norm
                work = [self.step.state(), totals, [] if norm is None else norm, self.step.accumulated or []]
                self.dispatch(work, counts[0], update, self.step.was_compiled)
                if not (refresh or last):
                    # The next batch is made while the device works on this one.
                    upcoming = self.schedule.batch(self.iteration + 1, self.reference)
                if refresh or reports or evaluates or saves:
                    mx.eval(work)
                else:
                    # The next step is traced while the device works on this one, but no more than that.
                    mx.eval(running)
                running = totals
                if mx.get_cache_memory() > (args.clear_cache_threshold or self.dispatch.peak_memory()):
                    mx.clear_cache()
                seconds += time.perf_counter() - tic
                ui.advance()
                if reports:
                    self.report(ui, totals, norm, seconds, steps, tokens)
                    totals, norm, tokens, seconds, steps = mx.zeros_like(totals), None, np.zeros(2), 0.0, 0
                if refresh:
                    self._update_reference()
                    upcoming = self.schedule.batch(self.iteration + 1, self.reference)
                if evaluates:
                    self.validate(ui)
                if saves:
                    saved = self.save()
                    if saved is not None:
                        ui.report_save(saved)
                tic = time.perf_counter()
        self.save(numbered=False)
        if self.rank == 0:
            plot_metrics(self.folder)


def train_preference(model, optimizer, train_dataset, val_dataset, args, callback=None, reference=None, config=None):
    """Train `model` on preference pairs; see `trainer.train`."""
    if not is_preference(args.loss_type):
        raise ConfigError(f"loss_type is {args.loss_type!r}, which is not a preference loss.")
    if args.grad_accumulation_steps < 1:
        raise ConfigError(f"grad_accumulation_steps is {args.grad_accumulation_steps}; it must be at least 1.")
    maybe_set_recommended_wired_limit()
    if (slow_blas := slow_blas_hint()) is not None:
        rprint(slow_blas)
    run = Run(model, optimizer, train_dataset, val_dataset, args, callback, reference, config)
    with checkpointed_layers(model) if args.grad_checkpoint else nullcontext():
        run.train()

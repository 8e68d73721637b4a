"""A preference run: the reference pass, then the training loop with its reports, validations and checkpoints."""

import hashlib
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from ..._backend import slow_blas_hint
from ...cli_ui import TrainUI, rprint
from ...utils import maybe_set_recommended_wired_limit
from ..callbacks import MetricsFile, plot_metrics
from .batches import Schedule
from .checkpoint import Progress, kept_settings, read_state, restore_run, save_run
from .evaluation import evaluated_rows, unwrapped
from .layers import checkpointed_layers
from .memory import measure_step, trim_cache, usual_memory_limit
from .objective import refuse_without_gradient
from .options import ConfigError
from .reference import Reference, ReferenceLogps, reference_of
from .reference_cache import row_key
from .report import Reporter, Window, say_fallbacks
from .step import Step


def train_preference(
    objective, optimizer, train_dataset, val_dataset, args, reference=None, callback=None, config=None
):
    """Train the model of an `Objective` on preference pairs; see `trainer.train`.

    Raises:
        ConfigError: the data or a checkpoint does not fit `args`, or the training fails.
    """
    scorer, loss = objective.scorer, objective.loss
    model, folder, rank = scorer.model, Path(args.adapter_file).parent, mx.distributed.init().rank()
    dataset, val_dataset = unwrapped(train_dataset), unwrapped(val_dataset) if val_dataset else []
    if args.grad_accumulation_steps < 1:
        raise ConfigError(f"grad_accumulation_steps is {args.grad_accumulation_steps}; it must be at least 1.")
    refuse_without_gradient(loss)
    maybe_set_recommended_wired_limit()
    for line in filter(None, [slow_blas_hint()]):
        rprint(line)
    say_fallbacks(scorer, args.share_prompt)
    schedule = Schedule(dataset, args.batch_size, args.seed, scorer.arrangement)
    val_rows = evaluated_rows(val_dataset, args.batch_size, args.val_batches)
    settings = kept_settings(args, loss, config, model) | {"the training data": check_and_digest(dataset, loss)}
    if args.resume:
        # A checkpoint that does not fit is told before the reference pass, which may be long.
        read_state(folder, model, settings, args.iters)
    logps = ReferenceLogps(dataset, val_dataset, val_rows)
    if loss.needs_reference:
        reference = reference or reference_of(scorer, args)
        logps.take(reference, schedule.visited(1, args.iters))
        if args.reference_model is not None:
            reference.release()
    compiled = args.compile if args.compile is not None else mx.default_device() == mx.gpu
    step = Step(model, optimizer, objective, compiled, args.max_grad_norm)
    progress = restore_run(folder, step, logps, settings, args.iters) if args.resume else Progress()
    if rank == 0:
        callback = MetricsFile(folder, callback, progress.iteration)
    layers = checkpointed_layers(model) if args.grad_checkpoint else nullcontext()
    with layers, usual_memory_limit(), TrainUI(args.iters, rank=rank) as ui:
        report = Reporter(ui, callback, rank)
        validate = partial(_validate, objective, logps, progress, args, report)
        refresh = partial(_refresh, scorer, schedule, logps, progress, args)
        save = partial(save_run, step, logps, progress, settings, args, config)
        _take_steps(step, schedule, logps, progress, args, report, validate, refresh, save)
        save()
    if rank == 0:
        plot_metrics(folder)


def _take_steps(step, schedule, logps, progress, args, report, validate, refresh, save):
    """Take the steps that are left.

    Args:
        step: a `Step`, which changes the model and the optimizer.
        schedule: a `Schedule`, which gives each iteration's batch.
        logps: `ReferenceLogps`.
        progress: `Progress`, counted on.
        args: `TrainingArgs`.
        report: a `Reporter`.
        validate: scores the validation pairs, if there are any.
        refresh: makes the policy the reference of the steps to come.
        save: writes adapters and checkpoint.
    """
    window, upcoming, earlier, peak_before = Window(), None, [], None
    for _ in range(progress.iteration):
        report.ui.advance()
    if progress.iteration == 0:
        validate()
    step.model.train()
    while progress.iteration < args.iters:
        tic = time.perf_counter()
        batch, reference, tokens = upcoming or schedule.batch(progress.iteration + 1, logps.train)
        progress.iteration += 1
        due = Due.at(progress, args)
        sums, norm = step(batch, reference, due.update)
        progress.updates += due.update
        window.add(sums, norm if due.norm else None, tokens)
        work = [step.state(), step.accumulated or [], sums, norm if due.norm else []]
        if due.update and peak_before is None:
            peak_before = measure_step(work, tokens[0], schedule.most_tokens())
        mx.async_eval(work)
        # The next batch is made while the device works on this one, unless another reference comes first.
        upcoming = None if due.refresh or due.last else schedule.batch(progress.iteration + 1, logps.train)
        # The next step is traced while the device works on this one, but no more than that.
        mx.eval(work if due.refresh or due.report or due.validate or due.save else earlier)
        earlier = sums
        trim_cache(args.clear_cache_threshold)
        window.seconds += time.perf_counter() - tic
        report.ui.advance()
        if due.report:
            learning_rate = step.optimizer.learning_rate.item()
            peak = max(peak_before or 0, mx.get_peak_memory())
            report.training(window, progress, learning_rate, peak / 1e9)
            window = Window()
        if due.validate:
            validate()
        if due.refresh:
            refresh()
        if due.save:
            numbered = save(numbered=True)
            if numbered is not None:
                report.ui.report_save(numbered)


class Due(NamedTuple):
    """What comes with an iteration.

    Attributes:
        last: it is the run's last.
        update: the model is updated. Steps left over at the end make an update of their own: no pair is dropped.
        refresh: with TR-DPO, the reference is exchanged after it; after the last one no step would read it.
        norm: the gradient's norm is reported, which of other updates is never computed.
        report, validate, save: as the names say.
    """

    last: bool
    update: bool
    refresh: bool
    norm: bool
    report: bool
    validate: bool
    save: bool

    @classmethod
    def at(cls, progress, args):
        """What is due at `progress`, whose iteration has begun and whose update is not counted yet."""
        iteration, last = progress.iteration, progress.iteration == args.iters
        update = last or iteration % args.grad_accumulation_steps == 0
        every = args.reference_update_steps
        next_update = min(iteration + args.grad_accumulation_steps, args.iters)
        next_report = -(-iteration // args.steps_per_report) * args.steps_per_report
        return cls(
            last=last,
            update=update,
            refresh=bool(every) and update and not last and (progress.updates + 1) % every == 0,
            norm=update and (last or next_update > next_report),
            report=last or iteration % args.steps_per_report == 0,
            validate=last or iteration % args.steps_per_eval == 0,
            save=iteration % args.steps_per_save == 0,
        )


def _validate(objective, logps, progress, args, report):
    """Score the validation pairs, if there are any."""
    if len(logps.val_rows):
        report.validation(progress.iteration, objective, logps, args.batch_size)


def _refresh(scorer, schedule, logps, progress, args):
    """TR-DPO: the policy becomes the reference of the rows that the coming steps visit."""
    if logps.train is not None:
        steps = args.reference_update_steps * args.grad_accumulation_steps
        rows = schedule.visited(progress.iteration + 1, min(progress.iteration + steps, args.iters))
        logps.take(Reference(scorer, args.reference_batch_size), rows)


def check_and_digest(dataset, loss):
    """A digest of the pairs, which are checked to have nothing that the loss would not heed.

    Raises:
        ConfigError: a pair has a margin or a weight, and the loss reads none.
    """
    digest, names = hashlib.blake2b(digest_size=8), ", ".join(loss.names)
    for pair in (dataset[i] for i in range(len(dataset))):
        if pair.margin and not loss.reads_margins:
            raise ConfigError(f"rows have a margin, but loss_type {names} does not read it; remove the key margin.")
        if pair.weight != 1 and loss.sorts_batch:
            raise ConfigError(f"rows have a weight, but loss_type {names} sorts the batch; remove the key weight.")
        digest.update(row_key(pair) + repr((pair.margin, pair.weight)).encode())
    return digest.hexdigest()

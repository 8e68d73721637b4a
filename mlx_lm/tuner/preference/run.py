"""A preference run: the reference pass, then the training loop with its reports, validations and checkpoints."""

import hashlib
import shutil
import time
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np

from ..._backend import slow_blas_hint
from ...cli_ui import rprint
from ...utils import maybe_set_recommended_wired_limit
from ..callbacks import MetricsFile
from .batches import Schedule, iterations
from .card import CARD_FILE, has_card
from .checkpoint import (
    VALIDATED_ON,
    Progress,
    find_state,
    restore_run,
    save_adapters,
    save_run,
    starting_point,
    state_files,
)
from .dry_run import rehearse
from .evaluation import evaluated_rows, refuse_other_form, unwrapped
from .figures import BEST
from .files import BEST_FOLDER, CONFIG_FILE, RUN_FILES, locked, make_own_folder, move_aside, remove_leftovers
from .flat import lora_plus
from .intercept import parameters_in
from .interruption import REQUEST, Interrupted, asked_anywhere
from .layers import checkpointed_layers
from .load import check_trainable
from .memory import bounded_memory, trim_cache
from .nonfinite import refuse_non_finite_steps
from .objective import refuse_without_gradient
from .options import RUN_OPTIONS, UPSTREAM_OPTIONS, ConfigError
from .outcome import Outcome
from .pairs import Pair, places_of
from .reference import Reference, RunData, does_nothing, reference_of
from .reference_cache import row_key
from .report import Reporter, Window, say_fallbacks
from .screen import RunUI
from .step import Step
from .workers import confirm, refuse_different_workers


def train_preference(
    objective, optimizer, train_dataset, val_dataset, args, reference=None, callback=None, config=None
):
    """Train the model of an `Objective` on preference pairs; see `trainer.train`.

    Raises:
        ConfigError: the data or a checkpoint does not fit `args`, another run has the folder, or the training fails.
        Interrupted: a signal asked for the end, and the run is saved.
    """
    checks = {option.name: option for option in UPSTREAM_OPTIONS + RUN_OPTIONS}
    checks["steps_per_save"] = replace(checks.pop("save_every"), name="steps_per_save")
    known = {name: getattr(args, name) for name in checks if hasattr(args, name)}
    args = replace(args, **{name: checks[name].check(value) for name, value in known.items()})
    refuse_without_gradient(objective.loss)
    check_trainable(objective.scorer.model)
    if args.epochs is not None:
        args = replace(args, iters=iterations(args.epochs, len(train_dataset), args.batch_size), epochs=None)
    train_set, valid_set = unwrapped(train_dataset), unwrapped(val_dataset) if val_dataset else []
    data = RunData(train_set, valid_set, evaluated_rows(valid_set, args.batch_size, args.val_batches))
    if (args.save_best or args.early_stop or args.sample_prompts) and not data.valid_rows:
        raise ConfigError("save_best, early_stop and sample_prompts need validations, and there is no validation set.")
    maybe_set_recommended_wired_limit()
    if (hint := slow_blas_hint()) is not None:
        rprint(hint)
    say_fallbacks(objective.scorer, args.share_prompt)
    folder, first = Path(args.adapter_file).parent, mx.distributed.init().rank() == 0
    # A dry run makes no folder.
    with locked(folder) if first and (folder.is_dir() or not args.check) else nullcontext():
        try:
            _train(objective, optimizer, data, args, reference, callback, config, folder, first)
        finally:
            # Given a state, it adds what that lacks: this one is of vectors, not of the model's parameters.
            optimizer.state = optimizer.state


def _train(objective, optimizer, data, args, reference, callback, config, folder, first):
    """Train on `data`, a `RunData`, in a folder of this run's own; `first` is whether this is the first worker."""
    scorer, loss, model = objective.scorer, objective.loss, objective.scorer.model
    schedule = Schedule(
        data.train_set, args.batch_size, args.seed, scorer.arrangement, args.iters, args.group_by_length
    )
    if schedule.longest > args.max_seq_length:
        rprint(
            f"[WARNING] max_seq_length is {args.max_seq_length}, and the longest pair has {schedule.longest} tokens, "
            "all of which are run: pairs are cut when a data set is made, by the max_seq_length that load_dataset or "
            "PreferenceDataset is given."
        )
    if loss.needs_reference:
        reference = reference or reference_of(scorer, args)
    settings, held_out = kept_settings(objective, data, args, config, reference)
    warn_of_balance(data.train_set, loss)
    state, iteration = None, 0
    if args.resume is True or (args.resume and state_files(folder)):
        # One that does not fit is told before the reference pass, which may be long.
        state, iteration = find_state(folder, model, settings, args.iters)
        rprint(f"Going on after iteration {iteration} of {args.iters}, from {state}.")
    refuse_different_workers(vars(args) | settings | held_out | {"the iteration to go on after": iteration})
    if loss.needs_reference and not args.check:
        exchanged = (args.reference_update_steps or 0) * args.grad_accumulation_steps
        data.take(reference, schedule.visited(1, exchanged or args.iters))
        data.of_bare = reference.scorer is not None and reference.scorer.model is model and does_nothing(model)
        if args.reference_model is not None:
            reference.release()
    compiled = args.compile if args.compile is not None else mx.default_device() == mx.gpu
    if args.lora_plus_ratio is not None:
        optimizer = lora_plus(optimizer, args.lora_plus_ratio)
    skips, together = args.on_nonfinite == "skip", not args.grad_checkpoint
    step = Step(model, optimizer, objective, compiled, args.max_grad_norm, skips, together)
    if args.check:
        return rehearse(step, reference if loss.needs_reference else None, schedule, data, args)
    if args.reference_mixup_alpha is not None:
        data.reference_parameters = model.trainable_parameters()
    progress = Progress() if state is None else restore_run(state, step, data)
    if args.reference_update_steps and progress.updates >= args.reference_update_steps:
        data.of_bare = False  # the state's reference is a later policy
    if first:
        remove_leftovers(folder)
        if state is None:
            make_room(folder, config)
        callback = MetricsFile(folder, callback, progress.iteration, settings[VALIDATED_ON])
    check = partial(refuse_non_finite_steps, schedule=schedule, where=places_of(data.train_set))
    save = partial(save_run, step, data, progress, settings, args, config)
    with (
        checkpointed_layers(model) if args.grad_checkpoint else nullcontext(),
        bounded_memory() as evaluate,
        RunUI(args.iters, 0 if first else 1, progress.iteration) as ui,
        REQUEST.at_steps() as request,
    ):
        report, outcome = Reporter(ui, callback, None if step.skips else check, objective.further), None
        if first:
            outcome = Outcome(folder, objective, data, args, config, ui, callback, progress.iteration)
        validate = partial(_validate, objective, data, progress, args, report, config, outcome)
        try:
            _take_steps(step, schedule, data, progress, args, evaluate, report, validate, save, request)
        except KeyboardInterrupt:
            # Of a notebook, which goes on with the model. What a first step leaves that is being compiled is no array.
            with suppress(RuntimeError):
                mx.eval(step.flat.vectors.parameters())
                step.flat.write()
            raise
        save()
        if first:
            outcome.draw(ended=True)
        # A worker that ends ends the others: not before the first one has written.
        confirm()
        if request.number is not None:
            raise Interrupted(request.number, f"after iteration {progress.iteration} of {args.iters}, which is saved")
    if first:
        for sentence in outcome.health():
            rprint(f"[WARNING] {sentence}")
        _tell_best(folder, progress, args)


def kept_settings(objective, data, args, config, reference):
    """What a resumed run must have as it was begun, and the digest of the validation data, two dicts.

    Options declared so, the loss, the models before training, and the training data.

    Raises:
        ConfigError: the data is not for the loss.
    """
    loss = objective.loss
    names = [option.name for option in UPSTREAM_OPTIONS + RUN_OPTIONS if option.keep]
    settings = {name: getattr(args, name, (config or {}).get(name)) for name in names} | loss.parameters
    settings |= {"loss_type": list(loss.names), "loss_weights": loss.weights}
    settings["the model or adapter it begins with"] = starting_point(objective.scorer.model)
    if loss.needs_reference and args.reference_model is not None:
        # Its name may stand for other weights by now.
        settings["the weights of the reference model"] = starting_point(reference.scorer.model)
    settings["the training data"] = check_and_digest(data.train_set, loss)
    held_out = {"the validation data": check_and_digest(data.valid_set)}
    for row in data.valid_rows:
        refuse_other_form(data.valid_set[row], loss)
    settings[VALIDATED_ON] = [*held_out.values(), len(data.valid_rows)] if data.valid_rows else None
    if args.reference_update_steps or args.save_best or args.early_stop:
        # Where the reference follows the policy, its logps are a part of the run's state; so is the best figure.
        settings |= held_out | {"the number of validation pairs": len(data.valid_rows)}
    return settings, held_out


def _take_steps(step, schedule, data, progress, args, evaluate, report, validate, save, request):
    """Take the steps that are left; `progress` is counted on.

    Args:
        evaluate: evaluates a tree of arrays, the first time to find out what memory a step needs.
        validate: scores the validation pairs, if there are any.
        save: writes adapters and checkpoint.
        request: a `Request` of signals, which ends the steps.
    """
    window, upcoming, earlier, measured = Window(), None, [], False
    if progress.iteration == 0:
        validate()
    step.model.train()
    while progress.iteration < args.iters and not _has_stalled(progress, args):
        tic = time.perf_counter()
        batch, reference, tokens = upcoming or schedule.batch(progress.iteration + 1, data.train_logps)
        progress.iteration += 1
        due = due_at(progress, args)
        sums, norm = step(batch, reference, due.update)
        progress.updates += due.update
        window.add(sums, norm, tokens)
        work = [step.state(), step.accumulated or [], sums, [] if norm is None else norm]
        if due.update and not measured:
            evaluate(work, max(map(schedule.tokens, range(1, args.iters + 1))) / tokens[0])
            measured = True
        mx.async_eval(work)
        # The next batch is made while the device works on this one, unless another reference comes first.
        upcoming = None if due.refresh or due.last else schedule.batch(progress.iteration + 1, data.train_logps)
        stops = asked_anywhere(request, due.report)
        # The next step is traced while the device works on this one, but no more than that.
        is_read = stops or due.refresh or due.report or due.validate or due.save
        mx.eval(work if is_read else earlier)
        if is_read:
            step.flat.write()
        earlier = sums
        trim_cache(args.clear_cache_threshold)
        window.seconds += time.perf_counter() - tic
        report.ui.advance()
        if due.report:
            report.training(window, progress, step.optimizer.learning_rate.item())
            window = Window()
        if due.validate:
            validate()
        if due.refresh:
            _refresh(step.objective.scorer, schedule, data, progress, args)
        if due.save:
            report.count(window, progress)
            numbered = save(numbered=True)
            if numbered is not None:
                report.ui.report_save(numbered)
        if stops:
            break
    # What the last report did not tell: one goes on in a run that is resumed, the other is over.
    if request.number is not None:
        report.count(window, progress)
    elif window.sums:
        report.training(window, progress, step.optimizer.learning_rate.item())


def due_at(progress, args):
    """What comes with the iteration of `progress`, which has begun and whose update is not counted yet."""
    iteration, last = progress.iteration, progress.iteration == args.iters
    # Steps left over at the end make an update of their own: no pair is dropped.
    update = last or iteration % args.grad_accumulation_steps == 0
    every = args.reference_update_steps
    return SimpleNamespace(
        last=last,
        update=update,
        # With TR-DPO, the reference is exchanged; after the last iteration for a run that goes on from it.
        refresh=bool(every) and update and (progress.updates + 1) % every == 0,
        report=last or iteration % args.steps_per_report == 0,
        validate=last or iteration % args.steps_per_eval == 0,
        save=iteration % args.steps_per_save == 0,
    )


def _validate(objective, data, progress, args, report, config, outcome):
    """Score the validation pairs, if there are any; keep the adapters where they are the best so far."""
    if not data.valid_rows:
        return
    figures, found = report.validation(progress.iteration, objective, data, args.batch_size)
    if args.save_best or args.early_stop:
        _keep_best(objective.scorer.model, figures, progress, args, config)
    if outcome is not None:
        outcome.validated(progress.iteration, found)


def _keep_best(model, figures, progress, args, config):
    """Keep the adapters where the validation's figures are the best so far; count where they are not."""
    name, sign = BEST[args.save_best or "eval_loss"]
    gained = np.isfinite(figures[name]) and (progress.best is None or sign * figures[name] > sign * progress.best)
    progress.without_gain = 0 if gained else progress.without_gain + 1
    if gained:
        confirm()
        progress.best, progress.best_iteration = figures[name], progress.iteration
        if args.save_best and progress.iteration > 0 and mx.distributed.init().rank() == 0:
            adapter_file = Path(args.adapter_file)
            make_own_folder(adapter_file.parent / BEST_FOLDER)
            save_adapters(model, adapter_file.parent / BEST_FOLDER / adapter_file.name, config=config)


def _has_stalled(progress, args):
    """Whether the last validations, `early_stop` of them, were without a gain."""
    return bool(args.early_stop) and progress.without_gain >= args.early_stop


def _tell_best(folder, progress, args):
    """Name the best adapters, and why a run ended early."""
    if _has_stalled(progress, args):
        rprint(f"Ended after iteration {progress.iteration}: {progress.without_gain} validations without a gain.")
    if args.save_best and progress.best_iteration > 0:
        place = folder / BEST_FOLDER
        rprint(f"Best {args.save_best} {progress.best:.3f} at iteration {progress.best_iteration}: {place}")
    elif args.save_best:
        rprint(f"No validation had a better {args.save_best} than the one before training: no best adapters are kept.")


def make_room(folder, config):
    """Move an earlier run's files aside, and say so; with None for a `config` its `adapter_config.json` is copied."""
    files = (*RUN_FILES, *([CARD_FILE] if has_card(folder) else []))
    if config is None:
        # This run writes none: the one that is there may be for its adapters, put there before as mlx-lm's users do.
        files = tuple(name for name in files if name != CONFIG_FILE)
    place = move_aside(folder, files)
    if place is not None:
        if config is None and (folder / CONFIG_FILE).is_file():
            shutil.copy(folder / CONFIG_FILE, place)
        rprint(f"The files of an earlier run in {folder} are now in {place}.")


def _refresh(scorer, schedule, data, progress, args):
    """TR-DPO: the policy, or its mixture with the reference, becomes that of the rows that the coming steps visit."""
    policy = scorer.model.trainable_parameters()
    if data.reference_parameters is not None:
        data.mix(policy, args.reference_mixup_alpha)
    steps = args.reference_update_steps * args.grad_accumulation_steps
    rows = schedule.visited(progress.iteration + 1, progress.iteration + steps)
    with parameters_in(scorer.model, policy if data.reference_parameters is None else data.reference_parameters):
        data.take(Reference(scorer, args.reference_batch_size), rows)
    data.of_bare = False


def warn_of_balance(dataset, loss):
    """Say so where one label's responses count for much more than the other's: arXiv 2402.01306, eq. 8."""
    if not loss.unpaired:
        return
    good = sum(dataset[i].label for i in range(len(dataset)))
    bad = len(dataset) - good
    desirable, undesirable = good * loss.parameters["desirable_weight"], bad * loss.parameters["undesirable_weight"]
    # A hundredth less than 1: the advised weight is rounded.
    if min(desirable, undesirable) > 0 and not 0.99 <= desirable / undesirable <= 4 / 3:
        rprint(
            f"[WARNING] {good} responses are desirable and {bad} are not; their numbers times their weights are "
            f"{desirable:g} to {undesirable:g}, and KTO's authors advise 1 to 4/3: for example an undesirable_weight "
            f"of {desirable / bad:.3g}."
        )


def check_and_digest(dataset, loss=None):
    """A digest of the pairs; `ConfigError` where one has a margin, a weight or a label that the loss does not heed."""
    digest, where = hashlib.blake2b(digest_size=8), places_of(dataset)
    for i in range(len(dataset)):
        pair = dataset[i]
        if loss is not None:
            for name, heeded in (("margin", loss.reads_margins), ("weight", not loss.sorts_batch)):
                if getattr(pair, name) != Pair._field_defaults[name] and not heeded:
                    reason = "does not read it" if name == "margin" else "sorts the batch"
                    told = f"{where(i)}: rows have a {name}, but loss_type {', '.join(loss.names)} {reason}"
                    raise ConfigError(f"{told}; remove the key {name}.")
            refuse_other_form(pair, loss)
        digest.update(row_key(pair) + repr((pair.margin, pair.weight, pair.label)).encode())
    return digest.hexdigest()

"""A dry run: what a run would read, and what memory and time it would take; nothing is trained or written."""

import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ...cli_ui import rprint
from .batches import lengths_of, make_batch, reference_rows
from .divergence import validated_pairs
from .intercept import evaluating
from .layers import checkpointed_layers
from .memory import LESS, begin_peak_anew, bounded_memory, peak_memory, trim_cache
from .nonfinite import refuse_non_finite_logps
from .options import ConfigError, shortened
from .reference import batches_of, device_memory

QUANTILES = {"least": 0, "10 %": 0.1, "50 %": 0.5, "90 %": 0.9, "most": 1}
SHOWN_PAIRS = 2
# Characters of a text, of which more is cut out in the middle.
LONGEST_TEXT = 600


class NotMade(type(Path())):
    """A path whose folder a dry run does not make."""

    def mkdir(self, *_, **__):
        """Do nothing."""


def describe_data(splits, tokenizer):
    """Print how many rows the named data sets read, quantiles of lengths, and two pairs as the model sees them."""
    splits = {name: data for name, data in splits.items() if len(data)}
    rprint("\nrows        read  left out  prompts cut  responses cut")
    for name, data in splits.items():
        read, left_out, prompts, responses = data.counts.values()
        rprint(f"  {name:7} {read:7}  {left_out:8}  {prompts:11}  {responses:13}")
    data = next(iter(splits.values()))
    prompt, chosen, rejected = lengths_of(data).T
    kinds = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "chosen - rejected": chosen - rejected}
    if data[0].label is not None:
        kinds = {"prompt": prompt, "completion": chosen, "another's": rejected}
    rprint("\ntokens             " + "".join(f"{name:>7}" for name in QUANTILES))
    for name, lengths in kinds.items():
        rprint(f"  {name:17}" + "".join(f"{np.quantile(lengths, share):7.0f}" for share in QUANTILES.values()))
    rprint(f"\npairs as the model sees them; {marked('what is scored')} is marked")
    for i in range(min(SHOWN_PAIRS, len(data))):
        pair = data[i]
        rprint(f"  {data.where(i)}")
        rprint(f"    prompt    {text_of(tokenizer, pair.prompt)}")
        names = ("chosen", "rejected")
        if pair.label is not None:
            names = ("desirable" if pair.label else "not so"), "another's"
        for name, tokens, spans in zip(names, (pair.chosen, pair.rejected), pair.unscored, strict=True):
            rprint(f"    {name:9} {with_marks(tokenizer, tokens, spans)}")


def with_marks(tokenizer, tokens, unscored):
    """A response's text, with marks around what is scored of it; `unscored` are the other spans `(start, stop)`."""
    parts, at = [], 0
    for start, stop in (*unscored, (len(tokens), len(tokens))):
        parts.append(marked(text_of(tokenizer, tokens[at:start])) if at < start else "")
        parts.append(text_of(tokenizer, tokens[start:stop]))
        at = stop
    return "".join(parts)


def marked(text):
    """What is scored of a text, in green on a terminal that may have colours, and between brackets elsewhere."""
    colored = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return f"\033[32m{text}\033[0m" if colored else f"\u27e6{text}\u27e7"


def text_of(tokenizer, tokens):
    """What tokens say, the special ones too, on indented lines and without other control characters."""
    text = tokenizer.decode(list(tokens), skip_special_tokens=False) if len(tokens) else ""
    text = shortened(text, LONGEST_TEXT)
    text = "".join(letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1] for letter in text)
    return text.replace("\n", "\n" + " " * 14)


def rehearse(step, reference, schedule, data, args):
    """Run what takes most memory of a run, and print what that and, with `steps`, the whole run take.

    The model is another one afterwards.

    Args:
        step: the run's `Step`.
        reference: its `Reference`, or None.
        schedule: its `Schedule`.
        data: its `RunData`, whose logps are not taken yet.
        args: `TrainingArgs`.

    Raises:
        ConfigError: the device has less memory than the longest batch seems to need.
    """
    epochs = args.iters / schedule.epoch_steps  # the last batch of one may hold fewer pairs
    updates = -(-args.iters // args.grad_accumulation_steps)
    rprint(f"\n{args.iters} iterations of {args.batch_size} pairs are {epochs:.2f} epochs and {updates} updates")
    # The most of all workers, which average what they find and so take the same steps.
    tokens = np.array(mx.distributed.all_max(mx.array([*map(schedule.tokens, range(1, args.iters + 1))])))
    with checkpointed_layers(step.model) if args.grad_checkpoint else nullcontext(), bounded_memory() as evaluate:
        scoring = score_largest(step.objective, reference, data, schedule, args)
        if args.reference_model is not None and reference is not None:
            reference.release()
        step.model.train()
        smallest, largest = (int(find(tokens)) for find in (np.argmin, np.argmax))
        begin_peak_anew()
        resting = mx.get_active_memory()
        growth = float(tokens[largest] / tokens[smallest])
        evaluate(run_step(step, schedule, smallest + 1, args), growth)
        refuse_too_large(resting, (mx.get_peak_memory() - resting) * growth)
        earlier = []
        # The steps around the largest one, as the run takes them: one is traced while the device works on another.
        for iteration in range(max(1, largest + 1 - args.grad_accumulation_steps), min(args.iters, largest + 2) + 1):
            mx.async_eval(work := run_step(step, schedule, iteration, args))
            mx.eval(work if iteration % args.steps_per_report == 0 else earlier)
            earlier = work[-1]
            trim_cache(args.clear_cache_threshold)
        mx.eval(work)
        tell_memory(step)
        if args.steps:
            tell_time(step, schedule, data, args, tokens, scoring, evaluate)
    rprint("\nNothing that can be told beforehand stops this run.")


def run_step(step, schedule, iteration, args):
    """What a step of an iteration leaves to be evaluated; the last are its sums."""
    update = iteration % args.grad_accumulation_steps == 0 or iteration == args.iters
    sums, norm = step(*schedule.batch(iteration, None)[:2], update)
    return [step.state(), step.accumulated or [], [] if norm is None else norm, sums]


def score_largest(objective, reference, data, schedule, args):
    """The seconds a token in the largest batches of a validation and of a reference pass; 0 where there is none."""

    def validate(batch):
        losses, figures = objective.each(batch, reference_rows(None, batch.counts), by_token=True)
        return mx.stack([losses, *figures])

    size = args.batch_size if objective.reads_batch else None
    validation = time_largest(objective.scorer, validate, data.valid_set, data.valid_rows, size, args.steps)
    if reference is None:
        return validation, 0.0

    def take(batch):
        found = reference.score(batch)
        refuse_non_finite_logps(np.array(found))
        return found

    visited, size = schedule.visited(1, args.iters), args.reference_batch_size
    return validation, time_largest(reference.scorer, take, data.train_set, visited, size, args.steps)


def time_largest(scorer, evaluate, dataset, rows, size, again):
    """Evaluate the largest of the batches in which some rows are scored.

    Args:
        scorer, evaluate: a `Scorer`, and what is computed of a batch.
        dataset, rows: a data set and its rows that are scored.
        size: pairs in a batch, None for what memory is ample for.
        again: whether to take the time of a second evaluation on a GPU, whose first one may have kernels to make.

    Returns:
        The seconds that a token takes, 0 where there is no row.
    """
    if not len(rows):
        return 0.0
    batches = ([dataset[rows[place]] for place in places] for places in batches_of(scorer, dataset, rows, size))
    pairs = max(batches, key=lambda pairs: lengths_of(pairs).sum())
    with evaluating(scorer.model):
        batch, processed, _ = make_batch(pairs, scorer.arrangement)
        for _ in range(2 if again and mx.default_device() == mx.gpu else 1):
            tic = time.perf_counter()
            mx.eval(evaluate(batch))
            seconds = time.perf_counter() - tic
        trim_cache()
    return seconds / processed


def refuse_too_large(resting, needed):
    """Check that the largest step's memory, by what the smallest took for a token, is less than the device has."""
    if resting + needed > device_memory():
        raise ConfigError(
            f"a step of the longest batch seems to need {(resting + needed) / 1e9:.1f} GB, and the device has "
            f"{device_memory() / 1e9:.1f}; {LESS}."
        )


def tell_memory(step):
    """Print the most memory that MLX's arrays took so far, and of what."""
    trained, everything, state = (
        sum(value.nbytes for _, value in tree_flatten(tree))
        for tree in (step.model.trainable_parameters(), step.model.parameters(), step.optimizer.state)
    )
    peak = peak_memory()
    parts = {"weights": everything - trained, "trained weights": trained, "optimizer": state}
    parts |= {"activations, gradients": peak - everything - state, "in all": peak}
    rprint("\nmemory of MLX's arrays, GB")
    for name, size in parts.items():
        rprint(f"  {name:22} {size / 1e9:8.3f}" + (f" of {device_memory() / 1e9:.1f}" if name == "in all" else ""))


def tell_time(step, schedule, data, args, tokens, scoring, evaluate):
    """Time `steps` steps of usual length, and print what a whole run will take by that."""
    usual = np.argsort(np.abs(tokens - tokens.mean()), kind="stable")[: args.steps]
    if step.compiled:
        evaluate([run_step(step, schedule, int(i) + 1, args) for i in usual])
    tic = time.perf_counter()
    for i in usual:
        mx.eval(run_step(step, schedule, int(i) + 1, args))
    seconds = (time.perf_counter() - tic) / len(usual) * tokens.mean() / tokens[usual].mean()
    parts = {f"{args.iters} steps of {seconds:.3f} s": args.iters * seconds}
    validation, reference = scoring
    lengths = lengths_of(data.valid_set[row] for row in data.valid_rows).sum(axis=1)
    if len(lengths):
        count = 1 - (-args.iters // args.steps_per_eval)
        # The KL runs the policy and the reference over some pairs.
        each = lengths.sum() * validation + 2 * validated_pairs(len(lengths)) * lengths.mean() * reference
        parts[f"{count} validations of {each:.3f} s"] = count * each
    if step.objective.loss.needs_reference:
        visited = lengths_of(data.train_set[row] for row in schedule.visited(1, args.iters)).sum()
        parts["reference, once, where none is kept"] = (visited + lengths.sum()) * reference
    parts["steps, validations, reference, in all"] = sum(parts.values())
    rprint(f"\ntime by {len(usual)} steps")
    for name, total in parts.items():
        rprint(f"  {name:38} {total:8.1f} s" if total < 120 else f"  {name:38} {total / 60:8.1f} min")

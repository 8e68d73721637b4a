"""What a test says of its pairs: figures with intervals, by source, in a file, and against other adapters' figures."""

import math
import re
from statistics import NormalDist
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..losses import ld_weighed
from .divergence import mean_kl
from .evaluation import evaluated_rows, pair_figures, reference_logps
from .figures import DESIRABLE, WORDS, means_of, signed
from .files import replace_file
from .metrics import as_json
from .options import printable

# Two-sided 95 %.
Z = NormalDist().inv_cdf(0.975)
SIDES = "chosen", "rejected"
COMPARED = "rewards/accuracies", "rewards/margins", "loss"


class Scores(NamedTuple):
    """What each of n tested pairs was given.

    Attributes:
        figures: `(n,)` float64 for each of FIGURES and TOKEN_FIGURES.
        reference: `(n, 2)` float32, what `reference_totals` returns.
        places, sources: of each pair, where its row stands, and its `source` or None.
        kl: `(KL, pairs)`: of the policy from the reference in nats a response token, and of how many pairs; or None.
        prompts: `(n,)`, a number for each pair's prompt.
    """

    figures: dict
    reference: np.ndarray
    places: list
    sources: list
    kl: tuple
    prompts: np.ndarray

    @property
    def means(self):
        """What `means_of` makes of the figures."""
        return means_of(self.figures)

    @property
    def counted(self):
        """How many pairs there are, and of how many prompts where prompts repeat, as text."""
        pairs, prompts = len(self.places), len(set(self.prompts.tolist()))
        return f"{pairs} pairs" + (f" of {prompts} prompt{'s' * (prompts > 1)}" if prompts < pairs else "")


def score(objective, dataset, args, reference=None, base=None):
    """`Scores` of the pairs that `args` ask for, each scored once.

    Args:
        reference: a `Reference` or its logps of these pairs; by default as `trainer.evaluate`.
        base: the reference's `Scorer`, for the KL; by default the policy without its adapters.
    """
    rows = evaluated_rows(dataset, args.batch_size, args.test_batches)
    reference = reference_logps(objective, dataset, args, rows, reference)
    figures = pair_figures(objective, dataset, rows, reference, args.batch_size)
    # After a training that began with adapters, or with another reference, that policy is no longer at hand.
    at_hand = base is not None or (args.resume_adapter_file is None and args.reference_model is None)
    return Scores(
        figures,
        reference_totals(reference, objective.loss),
        [dataset.where(row) for row in rows],
        [dataset.source(row) for row in rows],
        mean_kl(objective.scorer, base, dataset, rows) if at_hand else None,
        prompts_of(dataset, rows),
    )


def prompts_of(dataset, rows):
    """`(n,)`, a number for the prompt of each of n rows."""
    return np.unique([hash(tuple(dataset[row].prompt)) for row in rows], return_inverse=True)[1]


def reference_totals(reference, loss):
    """The reference's logps of chosen and rejected as the loss and the policy's figures have them, with its ld_alpha.

    Args:
        reference: `(n, 2, 2)` float32 of `Reference.logps`, or None.

    Returns:
        `(n, 2)`, or None.
    """
    return None if reference is None else ld_weighed(*np.moveaxis(np.asarray(reference), -1, 0), loss.ld_alpha)


def wilson(share, count):
    """The 95 % interval of a share of `count` cases that was seen to be `share` (Wilson 1927)."""
    middle, spread = share + Z**2 / (2 * count), Z * math.sqrt(share * (1 - share) / count + (Z / (2 * count)) ** 2)
    # Rounding alone would go beyond 0 and 1.
    return max(0.0, (middle - spread) / (1 + Z**2 / count)), min(1.0, (middle + spread) / (1 + Z**2 / count))


def effective_count(values, prompts):
    """How many pairs of different prompts tell as much of a mean: where one prompt has several, their errors are alike.

    That is the effective sample size of Korn and Graubard (1998), at most the number of pairs.

    Args:
        values, prompts: `(n,)`, the pairs' values and the number of each one's prompt.
    """
    errors, many = values - np.mean(values), len(set(prompts.tolist()))
    squares = (np.bincount(prompts, errors) ** 2).sum()
    if many in (1, len(values)) or squares < 1e-12:
        return many  # where all prompts have one mean, each tells one
    found = len(errors) * (errors**2).sum() / squares * (many - 1) / many
    return max(1.0, min(len(errors), found * (student(len(errors) - 1) / student(many - 1)) ** 2))


def student(freedom):
    """Student's t for 95 % two-sided and so many degrees of freedom, never too small (Wallace 1959).

    1 % too large for 3 of them, 4 % for 2, 38 % for 1.
    """
    return math.sqrt(freedom * math.expm1((Z * (8 * freedom + 3) / (8 * freedom + 1)) ** 2 / freedom))


def share_interval(differences, prompts):
    """The mean of paired differences of values between 0 and 1, and its 95 % interval.

    A normal interval is too short with few pairs that differ: two more pairs are counted, half of one in each direction
    (Agresti and Min 2005).

    Args:
        differences, prompts: `(n,)`, and the number of each one's prompt.

    Returns:
        `(mean, low, high)`.
    """
    mean, pairs = float(differences.mean()), effective_count(differences, prompts)
    middle = pairs * mean / (pairs + 2)
    spread = (pairs * (differences**2).mean() + 1) / (pairs + 2) - middle**2
    half = Z * math.sqrt(spread / (pairs + 2))
    return mean, float(middle - half), float(middle + half)


def mean_interval(parts, prompts):
    """The sum of means of paired differences, and its 95 % interval: the errors of one prompt are summed.

    Args:
        parts: for each mean, `(n,)` differences and `(n,)` booleans, which of them it is of.
        prompts: `(n,)`, the number of each one's prompt.

    Returns:
        `(mean, low, high)`; the bounds are infinite where one prompt cannot tell, and all are NaN where a mean is of
        none.
    """
    if not all(where.any() for _, where in parts):
        return math.nan, math.nan, math.nan
    mean, sums, fewest = 0.0, np.zeros(prompts.max() + 1), math.inf
    for differences, where in parts:
        own, many = differences[where], len(set(prompts[where].tolist()))
        mean, fewest = mean + float(own.mean()), min(fewest, many)
        errors = (own - own.mean()) / len(own) * math.sqrt(many / max(many - 1, 1))
        sums += np.bincount(prompts[where], errors, minlength=len(sums))
    half = student(fewest - 1) * math.sqrt((sums**2).sum()) if fewest > 1 else math.inf
    return mean, mean - half, mean + half


def described(scores):
    """A test's figures in two lines, and below them those of each source, where rows have one."""
    figures, count = scores.means, len(scores.places)
    right = scores.figures["rewards/accuracies"]
    low, high = wilson(figures["rewards/accuracies"], effective_count(right, scores.prompts))
    kl = "" if scores.kl is None else f", KL {scores.kl[0]:.4f} nats a token"
    if scores.kl is not None and scores.kl[1] < count:
        kl += f" (of {scores.kl[1]} pairs)"
    lines = [
        f"Test loss {figures['loss']:.3f}, reward accuracy {figures['rewards/accuracies']:.3f} (95 % interval "
        f"{low:.3f} to {high:.3f}) ({scores.counted}),",
        f"  margin {signed(figures['rewards/margins'])}, chosen {signed(figures['rewards/chosen'])}, "
        f"rejected {signed(figures['rewards/rejected'])}{kl}.",
    ]
    lost = np.flatnonzero(~np.isfinite(scores.figures["loss"]))
    if len(lost):
        lines.append(f"  The loss of {len(lost)} of them is not finite, the first at {scores.places[lost[0]]}.")
    if any(scores.sources):
        named = [source or "(no source)" for source in scores.sources]
        width = max(map(len, [*named, "source"]))
        lines.append(f"  {'source':{width}}  pairs  accuracy  95 % interval     margin    loss")
        for name in sorted(set(named)):
            mine = np.array([other == name for other in named])
            figures = means_of({key: values[mine] for key, values in scores.figures.items()})
            loss, accuracy, margin = (figures[key] for key in ("loss", "rewards/accuracies", "rewards/margins"))
            low, high = wilson(accuracy, effective_count(right[mine], scores.prompts[mine]))
            span = f"{low:.3f} to {high:.3f}"
            lines.append(
                f"  {printable(name):{width}}  {mine.sum():5}  {accuracy:8.3f}  {span}  {signed(margin):>9}"
                f"  {loss:6.3f}"
            )
    return "\n".join(lines)


def write_predictions(path, scores):
    """Write each pair's place, figures and source as a JSON line."""
    lines = []
    for i, place in enumerate(scores.places):
        found = re.fullmatch(r"(.*):(\d+)", place, re.DOTALL)
        line = {"file": found[1], "line": int(found[2])} if found else {"row": place}
        if scores.sources[i] is not None:
            line["source"] = scores.sources[i]
        lines.append(line | figures_of(i, scores.figures, scores.reference))
    if mx.distributed.init().rank() == 0:
        replace_file(path, lambda file: file.write(as_json(lines)))


def figures_of(i, figures, reference):
    """Pair number `i`'s figures by name, the reference's logps among them.

    Of a single response those of the other side, which are 0 or of a response to another prompt, are left out.

    Args:
        figures: `(n,)` of each name.
        reference: `(n, 2)`, the reference's logps of chosen and rejected, or None.
    """
    found = {name: float(values[i]) for name, values in figures.items()}
    logps = {} if reference is None else dict(zip(SIDES, reference[i].tolist(), strict=True))
    if DESIRABLE in found:
        own = "chosen" if found[DESIRABLE] else "rejected"
        others = {side for side in SIDES if side != own}
        found = {name: value for name, value in found.items() if name.partition("/")[2] not in others}
        # The chosen side's are of the response itself, whatever its label.
        logps = {own: logps["chosen"]} if logps else {}
    return found | {f"reference_logps/{side}": value for side, value in logps.items()}


def compared(names, scores, loss):
    """Whether two adapters differ on the pairs that both were tested on with one loss, as text."""
    (first, second), prompts = (found.figures for found in scores), scores[0].prompts
    lines = [f"{names[1]} less {names[0]}, pair by pair ({scores[0].counted}), with 95 % intervals:"]
    better = {name: [] for name in names}
    for key in COMPARED:
        if key == "loss" and loss.sorts_batch:
            continue  # a value of the loss belongs to no pair
        if key == "rewards/accuracies":
            mean, low, high = share_interval(second[key] - first[key], prompts)
        elif key == "rewards/margins" and DESIRABLE in first:
            # Of single responses: the good ones' mean reward less the bad ones'.
            good = first[DESIRABLE] > 0
            chosen, rejected = (second[f"rewards/{side}"] - first[f"rewards/{side}"] for side in SIDES)
            mean, low, high = mean_interval([(chosen, good), (-rejected, ~good)], prompts)
        else:
            mean, low, high = mean_interval([(second[key] - first[key], np.full(len(prompts), True))], prompts)
        if not math.isfinite(mean):
            lines.append(f"  {WORDS[key]:15}  cannot be compared: not all of both have one that is finite")
            continue
        lines.append(f"  {WORDS[key]:15}  {signed(mean)}  ({signed(low)} to {signed(high)})")
        if low > 0 or high < 0:
            better[names[(mean < 0) == (key == "loss")]].append(WORDS[key])
    told = [f"{name} has the better {', '.join(kinds)}" for name, kinds in better.items() if kinds]
    lines.append(f"They differ: {'; '.join(told)}." if told else "No difference is shown on these pairs.")
    return "\n".join(lines)

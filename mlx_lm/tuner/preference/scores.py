"""What a test says of its pairs: figures with intervals, by source, in a file, and against other adapters' figures."""

import json
import math
import re
from statistics import NormalDist
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..losses import ld_weighed
from .divergence import mean_kl
from .evaluation import evaluated_rows, means_of, pair_figures, reference_logps
from .files import replace_file
from .metrics import finite
from .options import ConfigError, printable
from .screen import signed
from .step import DESIRABLE

# Two-sided 95 %.
Z = NormalDist().inv_cdf(0.975)
SIDES = "chosen", "rejected"
COMPARED = {"rewards/accuracies": "reward accuracy", "rewards/margins": "margin", "loss": "loss"}


class Scores(NamedTuple):
    """What each of n tested pairs was given.

    Attributes:
        figures: `(n,)` float64 for each of FIGURES and TOKEN_FIGURES.
        reference: `(n, 2)` float32, what `reference_totals` returns.
        places, sources: of each pair, where its row stands, and its `source` or None.
        kl: `(KL, pairs)`: of the policy from the reference in nats a response token, and of how many pairs; or None.
    """

    figures: dict
    reference: np.ndarray
    places: list
    sources: list
    kl: tuple

    @property
    def means(self):
        """What `means_of` makes of the figures."""
        return means_of(self.figures)


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
        [dataset.where(int(row)) for row in rows],
        [dataset.source(int(row)) for row in rows],
        mean_kl(objective.scorer, base, dataset, rows) if at_hand else None,
    )


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


def student(freedom):
    """Student's t for 95 % two-sided and so many degrees of freedom (Abramowitz and Stegun 1964, 26.7.5).

    Its expansion in their inverse: 1 % too small for 2 of them, 11 % for 1.
    """
    terms = (
        (Z**3 + Z) / 4,
        (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96,
        (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384,
        (79 * Z**9 + 776 * Z**7 + 1482 * Z**5 - 1920 * Z**3 - 945 * Z) / 92160,
    )
    return Z + sum(term / freedom**power for power, term in enumerate(terms, 1))


def paired_interval(differences, shares=False):
    """The mean of paired differences, and its 95 % interval.

    Args:
        differences: `(n,)`.
        shares: they are of values between 0 and 1, where a normal interval is too short with few pairs that differ: two
            more pairs are counted, half of one in each direction (Agresti and Min 2005).

    Returns:
        `(mean, low, high)`; the bounds are infinite where one pair cannot tell.
    """
    differences = np.asarray(differences, float)
    more, count = (1.0, len(differences) + 2) if shares else (0.0, len(differences))
    if count < 2:
        return float(differences.mean()), -math.inf, math.inf
    middle = differences.sum() / count
    freedom = count if shares else count - 1
    spread = ((differences**2).sum() + more - count * middle**2) / freedom
    half = (Z if shares else student(freedom)) * math.sqrt(max(spread, 0.0) / count)
    return float(differences.mean()), float(middle - half), float(middle + half)


def unpaired_interval(first, second):
    """By how much the margin of single responses differs: the good ones' mean reward less the bad ones'.

    Args:
        first, second: `(n,)` of each figure, of the same responses.

    Returns:
        As `paired_interval`; NaN where all responses have one label. The two means' errors are independent.
    """
    good = first[DESIRABLE] > 0
    sides = ("rewards/chosen", good), ("rewards/rejected", ~good)
    chosen, rejected = ((second[key] - first[key])[where] for key, where in sides)
    if not (len(chosen) and len(rejected)):
        return math.nan, math.nan, math.nan
    mean = float(chosen.mean() - rejected.mean())
    if min(len(chosen), len(rejected)) < 2:
        return mean, -math.inf, math.inf
    half = student(min(len(chosen), len(rejected)) - 1)
    half *= math.sqrt(sum(side.var(ddof=1) / len(side) for side in (chosen, rejected)))
    return mean, mean - half, mean + half


def described(scores):
    """A test's figures in two lines, and below them those of each source, where rows have one."""
    figures, count = scores.means, len(scores.places)
    low, high = wilson(figures["rewards/accuracies"], count)
    kl = "" if scores.kl is None else f", KL {scores.kl[0]:.4f} nats a token"
    if scores.kl is not None and scores.kl[1] < count:
        kl += f" (of {scores.kl[1]} pairs)"
    lines = [
        f"Test loss {figures['loss']:.3f}, reward accuracy {figures['rewards/accuracies']:.3f} (95 % interval "
        f"{low:.3f} to {high:.3f}) ({count} pairs),",
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
            low, high = wilson(accuracy, mine.sum())
            span = f"{low:.3f} to {high:.3f}"
            lines.append(
                f"  {printable(name):{width}}  {mine.sum():5}  {accuracy:8.3f}  {span}  {signed(margin):>9}"
                f"  {loss:6.3f}"
            )
    return "\n".join(lines)


def write_predictions(path, scores):
    """Write each pair's place, figures and source as a JSON line; `ConfigError` where the file cannot be written."""
    lines = []
    for i, place in enumerate(scores.places):
        found = re.fullmatch(r"(.*):(\d+)", place, re.DOTALL)
        line = {"file": found[1], "line": int(found[2])} if found else {"row": place}
        if scores.sources[i] is not None:
            line["source"] = scores.sources[i]
        line |= figures_of(i, scores.figures, scores.reference)
        lines.append(json.dumps(finite(line)) + "\n")
    if mx.distributed.init().rank() != 0:
        return
    try:
        replace_file(path, lambda file: file.write("".join(lines).encode()))
    except OSError as error:
        raise ConfigError(f"predictions is {str(path)!r}, which cannot be written ({error.strerror}).") from error


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
    first, second = (found.figures for found in scores)
    lines = [f"{names[1]} less {names[0]}, pair by pair ({len(scores[0].places)} pairs), with 95 % intervals:"]
    better = {name: [] for name in names}
    for key, name in COMPARED.items():
        if key == "loss" and loss.sorts_batch:
            continue  # a value of the loss belongs to no pair
        if DESIRABLE in first and key == "rewards/margins":
            mean, low, high = unpaired_interval(first, second)
        else:
            mean, low, high = paired_interval(second[key] - first[key], shares=key == "rewards/accuracies")
        if not math.isfinite(mean):
            one_label = DESIRABLE in first and len(set(first[DESIRABLE])) == 1 and key == "rewards/margins"
            why = "all responses have one label" if one_label else "not all pairs have one that is finite"
            lines.append(f"  {name:15}  cannot be compared: {why}")
            continue
        lines.append(f"  {name:15}  {signed(mean)}  ({signed(low)} to {signed(high)})")
        if low > 0 or high < 0:
            better[names[(mean < 0) == (key == "loss")]].append(name)
    told = [f"{name} has the better {', '.join(kinds)}" for name, kinds in better.items() if kinds]
    lines.append(f"They differ: {'; '.join(told)}." if told else "No difference is shown on these pairs.")
    return "\n".join(lines)

"""Whether a run is healthy, in words: each detector reads the validations' figures and names a setting to try."""

import math

from .scores import wilson

# Logratios of both responses below this, and logps twice as low as the reference's: no longer a model of text.
DISPLACED, DISPLACED_TIMES = -20.0, 2.0
# Margins, in units of reward, beyond which the logistic losses have no gradient left.
LARGE_MARGIN = 10.0
# A correlation of margins with lengths, and of how many pairs, that is more than chance.
STRONG, ENOUGH = 0.5, 20
WIDEST = 0.1
READ = ("loss", *(f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")), "logps/chosen")


def health(validations, loss, effective=None):
    """What is wrong with a run, in sentences, by the lines of its validations in `metrics.jsonl`.

    Args:
        effective: the last one's `effective_count` of pairs; by default how many there are.
    """
    # What was not finite is None there, and so is a side of which single responses had none.
    sound = [line for line in validations if all(isinstance(line.get(f"eval_{name}"), (int, float)) for name in READ)]
    if not sound:
        return []
    first, *_, last = sound if len(sound) > 1 else sound * 2
    if sentence := collapsed(last, loss):
        return [sentence]  # what else is seen follows from that
    found = [displaced(first, last)]
    if last is not first:
        found += [exploding(sound), length_bias(last, loss)]
        if not loss.parameters.get("reference_update_steps"):
            # With a reference that follows the policy loss and margins begin anew.
            found += [overfitted(sound, effective), unmoved(first, last, loss)]
    return [sentence for sentence in (*found, too_few(last, effective)) if sentence]


def change(first, last, name):
    """By how much a validation's figure has changed."""
    return last[f"eval_{name}"] - first[f"eval_{name}"]


def collapsed(last, loss):
    """Both responses far below the reference: a margin may be left, but hardly a model of text."""
    if not loss.needs_reference:
        return None
    logps = last["eval_logps/chosen"]
    logratios = [last[f"eval_rewards/{name}"] / loss.parameters["beta"] for name in ("chosen", "rejected")]
    if not (max(logratios) < DISPLACED and logps < DISPLACED_TIMES * (logps - logratios[0])):
        return None
    return (
        f"The chosen responses are {-logratios[0]:.0f} nats less likely than to the reference, the rejected "
        f"ones {-logratios[1]:.0f}: the margin may be good, but the model may write no sense any more. Look at "
        "what it generates. A lower learning_rate, a larger beta, or sft beside the loss holds it."
    )


def displaced(first, last):
    """Likelihood displacement: the chosen responses lose more than the margin gains (2410.08847)."""
    chosen = last["eval_rewards/chosen"]
    fall, gain = -change(first, last, "rewards/chosen"), change(first, last, "rewards/margins")
    # Less than a nat is what a batch more or less does.
    if change(first, last, "logps/chosen") < -1 and fall > max(gain, 0):
        return (
            f"The chosen responses lose more than the margin gains (reward {chosen:+.2f}, margin "
            f"{last['eval_rewards/margins']:+.2f}): both become unlikely. Try loss_type: [dpo, sft], dpop, a larger "
            "beta or a lower learning_rate."
        )
    return None


def exploding(validations):
    """Margins that go on growing where every pair is already right."""
    *_, before, last = validations
    margin = last["eval_rewards/margins"]
    right = min(line["eval_rewards/accuracies"] for line in (before, last)) >= 0.999
    if not right or margin < LARGE_MARGIN or margin <= before["eval_rewards/margins"]:
        return None
    return (
        f"Every pair is right, and the margin still grows ({margin:.1f}): what is left to gain is far from the "
        "reference. Fewer iters, early_stop, a larger beta or loss_type ipo, which aims at a margin, end that."
    )


def unmoved(first, last, loss):
    """A policy that is still where it began."""
    moved = abs(change(first, last, "rewards/margins"))
    # With a small beta a margin of some nats is a small reward, and hardly changes the loss.
    little = min(0.02, 0.2 * loss.parameters["beta"])
    if first["iteration"] > 0 or moved > little or abs(change(first, last, "loss")) > 0.01 * abs(first["eval_loss"]):
        return None
    return (
        f"Nothing has moved: the margin changed by {moved:.3f} in {last['iteration']} iterations. Try a learning_rate "
        "ten times as high, or more iters."
    )


def overfitted(validations, effective=None):
    """A validation loss that has risen from its best, by more than a mean over so few pairs does by chance."""
    best, last = min(validations, key=lambda line: line["eval_loss"]), validations[-1]
    little = max(0.01, 0.05 * abs(best["eval_loss"]))
    # Pairs' losses spread by about their mean.
    chance = abs(best["eval_loss"]) / math.sqrt(effective or last["eval_pairs"])
    if last["eval_loss"] - best["eval_loss"] <= max(little, chance):
        return None
    if (first := validations[0]["eval_loss"]) - best["eval_loss"] <= little:
        return (
            f"The validation loss was {first:.3f} at first and is {last['eval_loss']:.3f}, and no validation was much "
            "better than the first: try a lower learning_rate or fewer iters, and look whether the labels of the rows "
            "to validate on say what those to train on say."
        )
    return (
        f"The validation loss was {best['eval_loss']:.3f} at iteration {best['iteration']} and is "
        f"{last['eval_loss']:.3f}: the run overfits. Set save_best: eval_loss and early_stop, or fewer iters, a lower "
        "learning_rate or more data."
    )


def length_bias(last, loss):
    """Margins that follow the responses' lengths, where they are what was learned: a logp has a length by itself."""
    found = last.get("eval_rewards/length_correlation")
    if not loss.needs_reference or found is None or last["eval_pairs"] < ENOUGH or abs(found) < STRONG:
        return None
    kind = "longer" if found > 0 else "shorter"
    return (
        f"Margins go with length (correlation {found:+.2f}): {kind} responses are preferred for being {kind}. Try "
        "ld_alpha below 1, loss_type [dpo, sft], or simpo, which counts a token's mean."
    )


def too_few(last, effective):
    """A validation set too small for what its accuracy is to tell."""
    share, pairs = last["eval_rewards/accuracies"], last["eval_pairs"]
    count = needed = effective or pairs
    low, high = wilson(share, count)
    if high - low <= WIDEST:
        return None
    while (bounds := wilson(share, needed))[1] - bounds[0] > WIDEST:
        needed = math.ceil(1.05 * needed) + 1
    needed, repeated = math.ceil(needed * pairs / count), ", some of one prompt," if count < pairs else ""
    return (
        f"{pairs} pairs{repeated} say little: the accuracy of {share:.2f} is between {low:.2f} and {high:.2f} (95 %). "
        f"Some {needed} would narrow that to {WIDEST}: val_batches: -1 takes all there are; beyond those it takes more "
        "rows to validate on, or without a validation set a larger valid_share."
    )

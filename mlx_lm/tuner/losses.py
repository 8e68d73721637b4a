"""Adds to mlx_lm.tuner.losses: the preference losses, pure functions of a batch's logps, lengths and margins.

No model comes near them.

Every loss takes `pairs`, a `PairLogps` whose fields are (B,) float32, and the parameters it reads as
keywords, and returns (B,) float32: one value a pair, of which the trainer takes the mean. In the
formulas rc and rr are beta x chosen and beta x rejected logratio, h = rc - rr - margin, sigma is the
logistic function and eps is label_smoothing. Loss and gradient stay finite for logratios of +-1e4.

`preference/loss_table.py` holds the table that names these functions.
"""

from .._upstream import run_upstream

run_upstream(globals(), needs=("kl_div_loss", "js_div_loss"))

import math
from typing import NamedTuple

import mlx.core as mx

# exp(80) = 5.5e34 is the last round exponent that float32 holds with room for a factor; TRL clamps there too.
LARGEST_EXPONENT = 80.0
# float32 holds the square of twice this score, and its gradient through an exponential that made the score.
LARGEST_SQUARED = 1e15
# Larger than any logratio, and its difference from itself is 0.
LARGEST = 1e30
# No logit of real logps is larger; beyond it discopop's blend is 0 or 1 to every digit.
LARGEST_LOGIT = 1e6
# A mean logp nearer to 0 has no odds in float32.
HIGHEST_MEAN_LOGP = -1e-6


class PairLogps(NamedTuple):
    """What a preference loss may read of a batch of B pairs.

    Attributes:
        policy_chosen, policy_rejected: (B,) float32, nats, summed over response tokens; where ld_alpha
            is set, `ld_weighed`.
        reference_chosen, reference_rejected: the same of the reference; zeros where it is not needed.
        chosen_lengths, rejected_lengths: (B,) response tokens.
        chosen_nll: (B,) float32, nats: minus the sum of the policy's chosen logps, never weighted.
        margins: (B,) float32, or 0: what a pair's logit is lowered by, in units of reward.
        counts: (B,) float32, or 1: 1 for a pair, 0 for one that only fills up the batch. Those stand last;
            the losses on the batch leave them out, the others give them a value, which the trainer drops.
        labels: (B,) float32, or 1: of single responses 1 for a desirable one, 0 for another. They stand in the place of
            the chosen ones, and in that of the rejected ones those of other prompts.
        kl: float32 scalar, nats: of single responses, how far the policy is from the reference, by `kl_estimate`.
    """

    policy_chosen: mx.array
    policy_rejected: mx.array
    reference_chosen: mx.array
    reference_rejected: mx.array
    chosen_lengths: mx.array
    rejected_lengths: mx.array
    chosen_nll: mx.array
    margins: mx.array | float = 0.0
    counts: mx.array | float = 1.0
    labels: mx.array | float = 1.0
    kl: mx.array | float = 0.0

    @property
    def chosen_logratios(self):
        """(B,) policy minus reference logps of the chosen responses."""
        return self.policy_chosen - self.reference_chosen

    @property
    def rejected_logratios(self):
        """(B,) policy minus reference logps of the rejected responses."""
        return self.policy_rejected - self.reference_rejected


def mean_logps(pairs):
    """The policy's logps a token: (chosen, rejected), each (B,); an empty response counts as one token."""
    return _a_token(pairs, pairs.policy_chosen, pairs.policy_rejected)


def logits(pairs, beta):
    """h = beta x (chosen logratio - rejected logratio) - margin, (B,)."""
    return beta * (pairs.chosen_logratios - pairs.rejected_logratios) - pairs.margins


def mean_logratios(pairs):
    """The logratios a token: (chosen, rejected), each (B,)."""
    return _a_token(pairs, pairs.chosen_logratios, pairs.rejected_logratios)


def _a_token(pairs, chosen, rejected):
    return chosen / mx.maximum(pairs.chosen_lengths, 1), rejected / mx.maximum(pairs.rejected_lengths, 1)


def softplus(x):
    """log(1 + exp(x)) = -log sigma(-x), which overflows for no x."""
    return mx.logaddexp(x, 0.0)


def smoothed(h, label_smoothing):
    """-(1 - eps) log sigma(h) - eps log sigma(-h): cross entropy against labels that are wrong eps of the time."""
    if label_smoothing == 0:
        return softplus(-h)
    return (1 - label_smoothing) * softplus(-h) + label_smoothing * softplus(h)


# Transforms of a batch


def with_f_divergence(pairs, f_divergence_type, f_alpha_divergence_coef):
    """`pairs` with f'(policy / reference) in the place of logratios u, for losses that read nothing else of it.

    Up to a constant, reverse_kl: u itself; forward_kl: 1 - exp(-u); js_divergence: log 2 + log sigma(u);
    alpha_divergence: (exp((alpha - 1) u) - 1) / (alpha - 1), which is u for alpha = 1, alpha being
    f_alpha_divergence_coef. Exponents are held at 80 at most: beyond it a score is constant and its gradient is zero.

    Source: arXiv 2309.16240.
    """
    exponent = f_alpha_divergence_coef - 1
    if f_divergence_type == "reverse_kl" or (f_divergence_type == "alpha_divergence" and abs(exponent) < 1e-6):
        return pairs
    score = {
        "forward_kl": lambda u: -_bounded_expm1(-u),
        "js_divergence": lambda u: math.log(2) - softplus(-u),
        "alpha_divergence": lambda u: _bounded_expm1(exponent * u) / exponent,
    }[f_divergence_type]
    zeros = mx.zeros_like(pairs.policy_chosen)
    return pairs._replace(
        policy_chosen=score(pairs.chosen_logratios),
        policy_rejected=score(pairs.rejected_logratios),
        reference_chosen=zeros,
        reference_rejected=zeros,
    )


def _bounded_expm1(x):
    # Chosen by `where`, so that no gradient meets exp(80) where the bound is in force.
    return mx.where(x > LARGEST_EXPONENT, math.expm1(LARGEST_EXPONENT), mx.expm1(mx.minimum(x, LARGEST_EXPONENT)))


def ld_weighed(total, common, ld_alpha):
    """LD-DPO's logps of policy or reference: tokens beyond the shorter response's length count ld_alpha.

    Args:
        total: (...) float32, nats, summed over a response's tokens.
        common: the same over as many of them as the pair's shorter response has.
        ld_alpha: 0 drops the others, 1 or None leaves them as they are.

    Returns:
        (...) float32. Source: arXiv 2409.06411.
    """
    return total if ld_alpha is None else common + ld_alpha * (total - common)


def wpo_weights(chosen_aligned, rejected_aligned, chosen_lengths, rejected_lengths):
    """WPO's weights of pairs: how likely the current policy itself is to write both responses.

    exp(mean aligned logp of chosen) x exp(mean aligned logp of rejected), without gradient; a token's
    aligned logp is log p(token) - log sum over the vocabulary of p squared.

    Args:
        chosen_aligned, rejected_aligned: (B,) float32, aligned logps summed over response tokens.
        chosen_lengths, rejected_lengths: (B,) response tokens.

    Returns:
        (B,) float32 weights.

    Source: arXiv 2406.11827, eq. 2 with its sampled alignment.
    """
    chosen = chosen_aligned / mx.maximum(chosen_lengths, 1)
    rejected = rejected_aligned / mx.maximum(rejected_lengths, 1)
    return mx.stop_gradient(mx.exp(mx.minimum(chosen + rejected, LARGEST_EXPONENT)))


# Losses on the logit of a pair


def dpo(pairs, *, beta, label_smoothing):
    """DPO, conservative where labels are smoothed: -(1 - eps) log sigma(h) - eps log sigma(-h), (B,).

    Source: arXiv 2305.18290, eq. 7; smoothing: E. Mitchell, "A note on DPO with noisy preferences", eq. 3.
    """
    return smoothed(logits(pairs, beta), label_smoothing)


def robust(pairs, *, beta, label_smoothing):
    """Robust DPO, unbiased where eps of the labels are flipped, (B,).

    (-(1 - eps) log sigma(h) + eps log sigma(-h)) / (1 - 2 eps). Source: arXiv 2403.00409.
    """
    h = logits(pairs, beta)
    return ((1 - label_smoothing) * softplus(-h) - label_smoothing * softplus(h)) / (1 - 2 * label_smoothing)


def hinge(pairs, *, beta):
    """The hinge on DPO's logit: max(0, 1 - h), (B,). Source: arXiv 2305.10425."""
    return mx.maximum(0.0, 1 - logits(pairs, beta))


def ipo(pairs, *, beta):
    """IPO on logps a token: (mean logratio gap - (1/2 + margin) / beta)^2, (B,).

    Beta is the paper's tau. The paper's sums are divided by the lengths, as TRL does and as the paper's
    results were made. Means are held within +-1e15, which only an f-divergence can leave, so that the
    square and its gradient are finite. Source: arXiv 2310.12036, eq. 17.
    """
    chosen, rejected = (mx.clip(mean, -LARGEST_SQUARED, LARGEST_SQUARED) for mean in mean_logratios(pairs))
    return mx.square(chosen - rejected - (0.5 + pairs.margins) / beta)


def sigmoid_norm(pairs, *, beta):
    """DPO with each logratio divided by its length: -log sigma(beta x mean logratio gap - margin), (B,).

    Source: arXiv 2405.14734, length-normalized DPO.
    """
    chosen, rejected = mean_logratios(pairs)
    return softplus(pairs.margins - beta * (chosen - rejected))


def exo_pair(pairs, *, beta, label_smoothing):
    """EXO for two responses: KL of (sigma(h), sigma(-h)) from (1 - eps, eps), (B,).

    Source: arXiv 2402.00856, eq. 16.
    """
    h = logits(pairs, beta)
    chosen = mx.sigmoid(h) * (-softplus(-h) - math.log1p(-label_smoothing))
    return chosen + mx.sigmoid(-h) * (-softplus(h) - math.log(label_smoothing))


def discopop(pairs, *, beta, discopop_tau):
    """DiscoPOP's log-ratio modulated loss, (B,).

    -log sigma(h) x (1 - m) + exp(-h) x m with m = sigma(h / tau). The product of the exponentials is
    taken as exp(-h + log m), which overflows for no tau below 1; above, its exponent is held at 80.
    Source: arXiv 2406.08414, eq. 5.
    """
    h = logits(pairs, beta)
    bounded = mx.clip(h, -LARGEST_LOGIT, LARGEST_LOGIT)
    modulation = bounded / discopop_tau
    exponential = mx.exp(mx.minimum(-bounded - softplus(-modulation), LARGEST_EXPONENT))
    return softplus(-h) * mx.sigmoid(-modulation) + exponential


def dpop(pairs, *, beta, label_smoothing, dpop_lambda):
    """DPO-Positive: DPO with its logit lowered where the policy likes the chosen response less than the reference.

    h - beta x lambda x max(0, -chosen logratio) in the place of h, (B,). Source: arXiv 2402.13228.
    """
    penalty = mx.maximum(0.0, -pairs.chosen_logratios)
    return smoothed(logits(pairs, beta) - beta * dpop_lambda * penalty, label_smoothing)


# Losses on the reward of each response


def nca_pair(pairs, *, beta):
    """NCA for two responses: -log sigma(rc) - 1/2 log sigma(-rc) - 1/2 log sigma(-rr), (B,).

    Source: arXiv 2402.05369.
    """
    chosen, rejected = beta * pairs.chosen_logratios, beta * pairs.rejected_logratios
    return softplus(-chosen) + 0.5 * softplus(chosen) + 0.5 * softplus(rejected)


def bco_pair(pairs, *, beta):
    """The binary classifier's loss on both responses: -log sigma(rc) - log sigma(-rr), (B,).

    Source: arXiv 2404.04656, without its reward shift, as in TRL.
    """
    return softplus(-beta * pairs.chosen_logratios) + softplus(beta * pairs.rejected_logratios)


def sppo_hard(pairs, *, beta):
    """SPPO with certain preferences: (chosen logratio - 1/(2 beta))^2 + (rejected logratio + 1/(2 beta))^2, (B,).

    Source: arXiv 2405.00675, eq. 4.7 with probabilities 1 and 0.
    """
    return mx.square(pairs.chosen_logratios - 0.5 / beta) + mx.square(pairs.rejected_logratios + 0.5 / beta)


def apo_zero(pairs, *, beta):
    """APO for data better than the model: 1 - sigma(rc) + sigma(rr), (B,). Source: arXiv 2408.06266, eq. 7."""
    return mx.sigmoid(-beta * pairs.chosen_logratios) + mx.sigmoid(beta * pairs.rejected_logratios)


def apo_down(pairs, *, beta):
    """APO for data worse than the model: sigma(rc) + 1 - sigma(h), (B,). Source: arXiv 2408.06266, eq. 8."""
    return mx.sigmoid(beta * pairs.chosen_logratios) + mx.sigmoid(-logits(pairs, beta))


# Losses on the batch


def aot(pairs, *, beta, label_smoothing):
    """AOT on pairs: DPO's loss between the sorted policy gaps and the sorted reference gaps, (B,).

    A gap is chosen minus rejected logps; entry i compares the i-th smallest of both, so it is no one
    pair's. Source: arXiv 2406.05882.
    """
    policy = _sorted(pairs.policy_chosen - pairs.policy_rejected, pairs.counts)
    reference = _sorted(pairs.reference_chosen - pairs.reference_rejected, pairs.counts)
    return smoothed(beta * (policy - reference), label_smoothing)


def aot_unpaired(pairs, *, beta, label_smoothing):
    """AOT on unpaired data: DPO's loss between sorted chosen and sorted rejected logratios, (B,).

    Entry i compares the i-th smallest of both, so it is no one pair's. Source: arXiv 2406.05882.
    """
    chosen, rejected = _sorted(pairs.chosen_logratios, pairs.counts), _sorted(pairs.rejected_logratios, pairs.counts)
    return smoothed(beta * (chosen - rejected), label_smoothing)


def _sorted(values, counts):
    # What fills up the batch sorts last on both sides, where it compares as equal.
    return mx.sort(mx.where(counts == 0, LARGEST, values))


def sft(pairs):
    """Mean NLL of the batch's chosen tokens, shared out so that each pair answers for its own tokens, (B,).

    Pairs x chosen_nll / chosen tokens, both numbers those of all workers' batch: the mean over pairs is the mean over
    tokens. Source: the generation loss of MPO, arXiv 2411.10442.
    """
    counts = mx.broadcast_to(pairs.counts, pairs.chosen_nll.shape)
    sums = mx.stack([counts.sum(), (counts * pairs.chosen_lengths).sum()])
    number, tokens = mx.distributed.all_sum(mx.stop_gradient(sums))
    return pairs.chosen_nll * counts * (number / mx.maximum(tokens, 1))


# Losses without a reference


def simpo(pairs, *, beta, label_smoothing, simpo_gamma):
    """SimPO: -log sigma(beta x (mean chosen logp - mean rejected logp) - gamma - margin), (B,), smoothed as in dpo.

    Source: arXiv 2405.14734, eq. 6.
    """
    chosen, rejected = mean_logps(pairs)
    return smoothed(beta * (chosen - rejected) - simpo_gamma - pairs.margins, label_smoothing)


def orpo(pairs, *, beta):
    """ORPO: the chosen tokens' NLL - beta x log sigma(log odds of chosen - log odds of rejected - margin), (B,).

    Odds are p / (1 - p) of the geometric mean probability of a token; beta is the paper's lambda. A mean
    logp above -1e-6 counts as -1e-6. Source: arXiv 2403.07691, eq. 6 and 7.
    """
    chosen, rejected = (mx.minimum(logps, HIGHEST_MEAN_LOGP) for logps in mean_logps(pairs))
    log_odds = (chosen - mx.log(-mx.expm1(chosen))) - (rejected - mx.log(-mx.expm1(rejected)))
    return sft(pairs) + beta * softplus(pairs.margins - log_odds)


def cpo(pairs, *, beta, label_smoothing, cpo_alpha):
    """CPO: -log sigma(beta x (chosen logps - rejected logps) - margin), smoothed as in dpo, + alpha x NLL, (B,).

    The NLL is the mean over the batch's chosen tokens, as in TRL. Source: arXiv 2401.08417.
    """
    h = beta * (pairs.policy_chosen - pairs.policy_rejected) - pairs.margins
    return smoothed(h, label_smoothing) + cpo_alpha * sft(pairs)


# Losses of single responses


def kl_estimate(pairs):
    """How far the policy is from the reference: the mean logratio of responses to other prompts than their own.

    Over the examples of all workers that count, at least 0 and without gradient; a float32 scalar, nats.
    Source: arXiv 2402.01306.
    """
    counts = mx.broadcast_to(pairs.counts, pairs.rejected_logratios.shape)
    sums = mx.stack([(counts * pairs.rejected_logratios).sum(), counts.sum()])
    total, number = mx.distributed.all_sum(mx.stop_gradient(sums))
    return mx.maximum(total / mx.maximum(number, 1), 0.0)


def kto(pairs, *, beta, desirable_weight, undesirable_weight):
    """KTO: 1 - sigma(beta (logratio - kl)) of a desirable response, 1 - sigma(beta (kl - logratio)) of another, (B,).

    Each times the weight of its kind. Source: arXiv 2402.01306, eq. 7.
    """
    gap = beta * (pairs.chosen_logratios - pairs.kl)
    # 1 - sigma(x) = sigma(-x), which keeps its digits where sigma(x) is close to 1.
    return mx.where(pairs.labels > 0, desirable_weight * mx.sigmoid(-gap), undesirable_weight * mx.sigmoid(gap))

"""Adds to mlx_lm.utils: `token_logps`, `get_batched_logps` and `dpo_loss`."""

import mlx.core as mx

from ._upstream import run_upstream
from .models.activations import fast_exp, fast_max

run_upstream(globals(), needs=("load", "save_config", "maybe_set_recommended_wired_limit"))


def token_logps(logits, targets):
    """The log-probability of each target token.

    Args:
        logits: `(..., V)`, any floating dtype; computed with in float32.
        targets: `(...)` token ids in `[0, V)`.

    Returns:
        `(...)` float32, nats.
    """
    if mx.default_device() == mx.gpu:  # whose kernels compute in float32 whatever they read
        return -mx.fast.cross_entropy(logits, targets)
    # On a CPU MLX's logsumexp takes longer than a small model's product that gives the logits.
    logits = logits.astype(mx.float32)
    top = mx.stop_gradient(fast_max(logits))
    own = mx.take_along_axis(logits, targets[..., None], axis=-1) - top
    return own.squeeze(-1) - mx.log(fast_exp(logits - top).sum(axis=-1))


def get_batched_logps(model, inputs, targets, ignore_index=0):
    """The summed log-probabilities of the chosen and the rejected responses of a batch of B pairs.

    Args:
        model: called with `inputs`; returns logits `(2B, T, V)`, or a tuple whose first entry they are.
        inputs: `(2B, T)` token ids, the B chosen rows first, then the B rejected ones in the same order.
        targets: `(2B, T)` token ids, `targets[i, t]` the token that follows `inputs[i, t]`.
        ignore_index: positions with this target are not scored. The default takes id 0 for padding;
            where 0 is a real token, mask with -100 and pass that.

    Returns:
        `(chosen_logps, rejected_logps)`, each `(B,)` float32, nats summed over the scored positions.

    Raises:
        ValueError: the shapes differ, or the number of rows is odd.
    """
    if inputs.shape != targets.shape or inputs.ndim != 2 or inputs.shape[0] % 2:
        raise ValueError(
            f"inputs {inputs.shape} and targets {targets.shape} must have one shape (2B, T), chosen rows first."
        )
    logits = model(inputs)
    if isinstance(logits, (tuple, list)):
        logits = logits[0]
    scored = targets != ignore_index
    logps = token_logps(logits, mx.where(scored, targets, 0))
    logps = mx.where(scored, logps, 0.0).sum(axis=-1)
    chosen_logps, rejected_logps = mx.split(logps, 2)
    return chosen_logps, rejected_logps


def dpo_loss(
    model,
    beta,
    label_smoothing,
    reference_chosen_logps,
    reference_rejected_logps,
    inputs,
    targets,
    ignore_index=0,
):
    """Direct Preference Optimization's loss on a batch of B pairs, and what to watch while it falls.

    With h = beta x (chosen logratio - rejected logratio), a pair's loss is
    -(1 - label_smoothing) log sigmoid(h) - label_smoothing log sigmoid(-h): equation 7 of Rafailov et al.
    (arXiv 2305.18290), with conservative DPO's smoothing (Mitchell, "A note on DPO with noisy preferences").

    Args:
        model, inputs, targets, ignore_index: as for `get_batched_logps`.
        beta: how strongly the policy is held to the reference, >= 0. With 0 the reference is ignored.
        label_smoothing: the share of pairs whose labels are taken to be swapped, in [0, 0.5).
        reference_chosen_logps, reference_rejected_logps: `(B,)` float32, MLX's arrays or numpy's, the
            reference's `get_batched_logps` of the same rows; no gradient flows into them. May be None with beta 0.

    Returns:
        `(loss, chosen_reward, rejected_reward, reward_accuracy, reward_margin, ntoks)`: float32 scalars,
        means over the batch, and the number of tokens that are not padding (int32). A reward is
        beta x (policy logps - reference logps), in nats.

    Raises:
        ValueError: beta or label_smoothing is out of range, or the shapes do not fit.
    """
    from .tuner.losses import PairLogps
    from .tuner.preference.objective import preference_loss

    policy_chosen, policy_rejected = get_batched_logps(model, inputs, targets, ignore_index)
    if beta == 0:
        reference_chosen_logps = reference_rejected_logps = mx.zeros_like(policy_chosen)
    lengths = (targets != ignore_index).sum(axis=-1).astype(mx.float32)
    chosen_lengths, rejected_lengths = mx.split(lengths, 2)
    pairs = PairLogps(
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        reference_chosen=mx.stop_gradient(mx.array(reference_chosen_logps)),
        reference_rejected=mx.stop_gradient(mx.array(reference_rejected_logps)),
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        chosen_nll=-policy_chosen,
    )
    loss = preference_loss("dpo", beta=beta, label_smoothing=label_smoothing)
    chosen_rewards, rejected_rewards = loss.rewards(pairs)
    margins = chosen_rewards - rejected_rewards
    return (
        loss(pairs).mean(),
        chosen_rewards.mean(),
        rejected_rewards.mean(),
        (margins > 0).astype(mx.float32).mean(),
        margins.mean(),
        _count_tokens(targets, ignore_index),
    )


def _count_tokens(targets, ignore_index):
    """Tokens up to each row's last scored one: a response ends its row, so what follows is padding."""
    steps = mx.arange(1, targets.shape[1] + 1)
    return mx.where(targets != ignore_index, steps, 0).max(axis=-1).sum()

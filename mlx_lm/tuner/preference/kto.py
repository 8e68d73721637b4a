"""KTO, the loss of single responses that are labelled good or bad: pure functions of logratios.

Source: arXiv 2402.01306; the names are TRL's.
"""

import mlx.core as mx


def kl_estimate(mismatched_logratios, counts=1.0):
    """How far the policy is from the reference, from responses paired with other examples' prompts.

    Args:
        mismatched_logratios: `(B,)` float32, nats: policy minus reference logps of those responses.
        counts: `(B,)`, 0 for what only fills up the batch, or 1.0.

    Returns:
        A float32 scalar, at least 0, without gradient.
    """
    counts = mx.broadcast_to(mx.array(counts, mx.float32), mismatched_logratios.shape)
    mean = (mismatched_logratios * counts).sum() / mx.maximum(counts.sum(), 1.0)
    return mx.stop_gradient(mx.maximum(mean, 0.0))


def kto(logratios, desirable, kl, *, beta, desirable_weight, undesirable_weight):
    """1 - sigma(beta (logratio - kl)) of a desirable response, 1 - sigma(beta (kl - logratio)) of another, weighted.

    Args:
        logratios: `(B,)` float32, nats: policy minus reference logps, summed over a response.
        desirable: `(B,)` booleans, the labels.
        kl: a scalar of `kl_estimate`.
        beta: above 0.
        desirable_weight, undesirable_weight: what a response of each label counts; for uneven labels, the ratio of
            weight x number should be 1 to 4/3, desirable to undesirable.

    Returns:
        `(B,)` float32, between 0 and the weight.

    >>> values = kto(mx.zeros(2), mx.array([True, False]), mx.array(0.0), beta=0.1,
    ...              desirable_weight=1.0, undesirable_weight=2.0)
    >>> values.tolist()
    [0.5, 1.0]
    """
    gap = beta * (logratios - kl)
    # 1 - sigma(x) = sigma(-x), which keeps its digits where sigma(x) is close to 1.
    return mx.where(desirable, desirable_weight * mx.sigmoid(-gap), undesirable_weight * mx.sigmoid(gap))


def mismatched(batch_size):
    """For each example of a batch, whose response is paired with its prompt: the one before it, `(B,)` int32.

    Raises:
        ValueError: with fewer than two examples there is no other.
    """
    if batch_size < 2:
        raise ValueError(
            f"KTO pairs a prompt with another example's response: batch_size is {batch_size}, not 2 or more."
        )
    return (mx.arange(batch_size) - 1) % batch_size

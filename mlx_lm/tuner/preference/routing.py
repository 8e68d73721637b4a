"""The load-balancing loss of mixtures of experts: pure functions of router logits.

Source: arXiv 2101.03961, eq. 4 to 6, over all layers' tokens together and for each of k choices, as transformers and
TRL compute what `router_aux_loss_coef` multiplies.
"""

import mlx.core as mx


def load_balancing_loss(router_logits, top_k, mask=None):
    """E x sum_e f_e P_e: f_e is how many of a token's k choices fall on expert e, P_e its mean probability.

    It is k where experts are used evenly, and at most E where all tokens choose the same. Gradients flow through P_e;
    the choices have none.

    Args:
        router_logits: `(..., E)` of each layer with experts, a sequence; all layers have E experts.
        top_k: experts a token is sent to, 1 to E.
        mask: `(...)`, 1 for tokens that count and 0 for padding, or None; at least one counts.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: layers differ in E, `top_k` is out of range, or there are no layers.

    >>> even = mx.zeros((2, 4)), mx.zeros((2, 4))
    >>> load_balancing_loss(even, top_k=2).item()
    2.0
    """
    probabilities, choices, weights = _routed(router_logits, top_k, mask)
    total = weights.sum()
    chosen = (choices * weights[:, None]).sum(0) / total
    mean = (probabilities * weights[:, None]).sum(0) / total
    return probabilities.shape[-1] * (mx.stop_gradient(chosen) * mean).sum()


def expert_shares(router_logits, top_k, mask=None):
    """The share of all choices that each expert gets, `(E,)` float32, summing to 1; arguments as for the loss."""
    _, choices, weights = _routed(router_logits, top_k, mask)
    return (choices * weights[:, None]).sum(0) / (top_k * weights.sum())


def _routed(router_logits, top_k, mask):
    """All layers' tokens: probabilities and 0-1 choices, each `(N, E)` float32, and weights `(N,)`."""
    counts = {logits.shape[-1] for logits in router_logits}
    if len(counts) != 1:
        raise ValueError(f"Router logits of one number of experts are expected; found those of {sorted(counts)}.")
    experts = counts.pop()
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k is {top_k}; with {experts} experts it must be 1 to {experts}.")
    logits = mx.concatenate([logits.reshape(-1, experts).astype(mx.float32) for logits in router_logits])
    order = mx.argpartition(mx.stop_gradient(-logits), kth=top_k - 1, axis=-1)[:, :top_k]
    choices = mx.put_along_axis(mx.zeros_like(logits), order, mx.array(1.0), axis=-1)
    weights = mx.ones(len(logits))
    if mask is not None:
        weights = mx.concatenate([mask.reshape(-1).astype(mx.float32)] * len(router_logits))
    return mx.softmax(logits, axis=-1), choices, weights

"""Mixtures of experts: their routers' logits and choices, the load-balancing loss, the share that an expert gets.

Source of the loss: arXiv 2101.03961, eq. 4 to 6, over all layers' tokens together and for each of k choices, as
transformers and TRL compute what `router_aux_loss_coef` multiplies.
"""

from contextlib import ExitStack, contextmanager

import mlx.core as mx
import mlx.nn as nn

from ...models.switch_layers import QuantizedSwitchLinear, SwitchGLU, SwitchLinear, SwitchMLP
from .intercept import intercepted, tell_aside
from .options import ConfigError

ROUTERS = ("gate", "router")


def routers_of(model):
    """`(router, experts)` of each of the model's layers of experts: what gives logits, and what is given the choices.

    Raises:
        ConfigError: there is none that can be read, or their numbers of experts differ.
    """
    found, counts = [], set()
    for module in model.modules():
        children = {name: child for name, child in module.children().items() if isinstance(child, nn.Module)}
        gate = next((children.pop(name) for name in ROUTERS if name in children), None)
        parts = (part for child in children.values() for part in child.modules())
        experts = next((part for part in parts if type(part) in (SwitchGLU, SwitchMLP)), None)
        if gate is None or experts is None:
            continue
        count = experts_in(experts)
        router = next((part for part in gate.modules() if _outputs(part) == count), None)
        if router is not None:
            found.append((router, experts))
            counts.add(count)
    if len(counts) != 1:
        state = f"have {sorted(counts)} experts" if counts else "cannot be read, or there are none"
        raise ConfigError(f"router_aux_loss_coef is set, but this model's routers {state}; leave it out.")
    return found


def experts_in(experts):
    """How many experts a layer has."""
    kinds = (SwitchLinear, QuantizedSwitchLinear)
    return next(part.num_experts for part in experts.modules() if isinstance(part, kinds))


def _outputs(module):
    """How many outputs a linear layer has, or a gate with a matrix of its own; an adapter's are those below it."""
    inner = module["linear"] if "lora_a" in module and "linear" in module else module
    return inner["weight"].shape[0] if "weight" in inner else None


@contextmanager
def routed(routers):
    """Within the context, `routers_of` tell aside logits and choices, the latter float32, 0 or 1, each `(..., E)`."""
    with ExitStack() as stack:
        for router, experts in routers:
            routing, mixing = _calls(type(router).__call__, type(experts).__call__, experts_in(experts))
            stack.enter_context(intercepted(router, "__call__", routing))
            stack.enter_context(intercepted(experts, "__call__", mixing))
        yield


def _calls(route, mix, count):
    """The calls of a router and of its experts, so many, that tell of themselves."""
    logits = None

    def routing(module, x, *args, **kwargs):
        nonlocal logits
        out = route(module, x, *args, **kwargs)
        # A gate with a matrix of its own gives its choices only.
        logits = out if isinstance(out, mx.array) else x @ module["weight"].T
        return out

    def mixing(module, x, indices, *args, **kwargs):
        chosen = (indices[..., None] == mx.arange(count)).sum(axis=-2).astype(mx.float32)
        tell_aside(logits, mx.stop_gradient(chosen))
        return mix(module, x, indices, *args, **kwargs)

    return routing, mixing


def load_balancing_loss(told, weights):
    """E x sum_e f_e P_e: f_e is how many of a token's k choices fall on expert e, P_e its mean probability.

    It is k where experts are used evenly, and at most E k where all tokens choose the same. Gradients flow through P_e;
    the choices have none. With several workers f_e is that of all workers' tokens, and the workers' losses add up.

    Args:
        told: logits and choices of each layer in turn, as `routed` has them told; N tokens each.
        weights: `(N,)` float32, how often a token counts; 0 for padding.

    Returns:
        `(loss, choices)`: a float32 scalar, and `(E,)` float32, how often each expert was chosen by this worker's.

    >>> even = [mx.zeros((2, 4)), mx.array([[1.0, 1, 0, 0], [0, 0, 1, 1]])]
    >>> load_balancing_loss(even, mx.ones(2))[0].item()
    2.0
    """
    experts, layers = told[0].shape[-1], len(told) // 2
    logits, chosen = (mx.concatenate([x.reshape(-1, experts) for x in told[i::2]]) for i in (0, 1))
    weights = mx.concatenate([weights] * layers)[:, None]
    choices = (chosen * weights).sum(axis=0)
    sums = mx.distributed.all_sum(mx.concatenate([choices, weights.sum(axis=0)]))
    total = mx.maximum(sums[experts], 1)
    mean = (mx.softmax(logits.astype(mx.float32), axis=-1) * weights).sum(axis=0) / total
    return experts * (sums[:experts] / total * mean).sum(), choices

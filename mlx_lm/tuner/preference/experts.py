"""Experts of a mixture: tokens on their way to those that the router has chosen and back, and adapters on them."""

import mlx.core as mx

from ..lora import LoRASwitchLinear
from .attention import moved


def gather_sort(x, indices):
    """As `mlx_lm.models.switch_layers` has it: each token for each of its experts, sorted by these.

    Its gradients are gathered too: MLX adds them up where they come together, one by one and on a GPU in any order, so
    that two runs of a seed would differ.

    Args:
        x: `(..., 1, 1, D)`.
        indices: `(..., K)` int, the experts of each token.

    Returns:
        `(rows (N K, 1, D), their experts (N K,), where each token's rows went (N K,))`.
    """
    chosen, indices = indices.shape[-1], indices.flatten()
    order = mx.argsort(indices).astype(mx.int32)
    places = _inverse(order)
    rows = moved([[x.flatten(0, -3)]], [[order // chosen]], [[places.reshape(-1, chosen).T]])[0]
    return rows, indices[order], places


def scatter_unsort(x, places, shape=None):
    """The other way around: what the experts made of `gather_sort`'s rows, for each token in turn."""
    x = moved([[x]], [[places]], [[_inverse(places)]])[0]
    return x if shape is None else mx.unflatten(x, 0, shape)


def _inverse(order):
    """Of where rows come from where they go, `(N,)` int32."""
    return mx.put_along_axis(mx.zeros_like(order), order, mx.arange(len(order)), axis=0)


class NarrowLoRASwitchLinear(LoRASwitchLinear):
    """A `LoRASwitchLinear` whose low-rank products are in the input's dtype, as those of `LeanLoRALinear`.

    Upstream's are in float32: a float32 copy of every input stays until the backward pass, and outputs are copied. And
    for these products MLX (0.32.4) asks for 144 KB of shared memory a block on CUDA's compute capabilities 8: an A100
    has them, RTX 30 and 40, A10, L4 and L40S have 99, and a run would end.
    """

    def __call__(self, x, indices, sorted_indices=False):
        low = self.dropout(x)
        for matrix in (self.lora_a, self.scale * self.lora_b):
            matrix = matrix.astype(x.dtype).swapaxes(-1, -2)
            low = mx.gather_mm(low, matrix, rhs_indices=indices, sorted_indices=sorted_indices)
        return self.linear(x, indices, sorted_indices=sorted_indices) + low

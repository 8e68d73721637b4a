"""LoRA layers that compute in their input's dtype, with fewer passes over memory."""

from contextlib import contextmanager

import mlx.core as mx

from .lora import LoRALinear


class LeanLoRALinear(LoRALinear):
    """A `LoRALinear` whose low-rank product is in the input's dtype and added within the product.

    Upstream's multiplies half-precision inputs by float32 matrices, which makes a float32 copy of every input
    and of every output; the matrices themselves stay float32 here too, and so does what the optimizer sees.
    """

    def __call__(self, x):
        low = self.dropout(x) @ self.lora_a.astype(x.dtype)
        return mx.addmm(self.linear(x), low, self.lora_b.astype(x.dtype), alpha=self.scale)


@contextmanager
def lean_adapters(model):
    """Within the context, the model's `LoRALinear` layers are lean ones; their parameters are untouched."""
    layers = [module for _, module in model.named_modules() if type(module) is LoRALinear]
    for layer in layers:
        layer.__class__ = LeanLoRALinear
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = LoRALinear

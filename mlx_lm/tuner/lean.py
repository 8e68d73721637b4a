"""Layers that compute what mlx-lm's do with less work, put in their places while a model is scored."""

from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

from .lora import LoRALinear
from .modules import intercepted


class LeanLoRALinear(LoRALinear):
    """A `LoRALinear` whose low-rank product is in the input's dtype and added within the product.

    Upstream's multiplies half-precision inputs by float32 matrices, which makes a float32 copy of every input
    and of every output; the matrices themselves stay float32 here too, and so does what the optimizer sees.
    """

    def __call__(self, x):
        low = self.dropout(x) @ self.lora_a.astype(x.dtype)
        return mx.addmm(self.linear(x), low, self.lora_b.astype(x.dtype), alpha=self.scale)


class UnpackedLinear(nn.QuantizedLinear):
    """A `QuantizedLinear` that unpacks its weights for each product.

    On a CPU MLX multiplies packed weights some thirty times slower than a BLAS does unpacked ones.
    """

    def __call__(self, x):
        out = _unpacked_product(self, x)
        return out + self["bias"] if "bias" in self else out


class UnpackedEmbedding(nn.QuantizedEmbedding):
    """The same for an embedding that is the output head too."""

    def as_linear(self, x):
        return _unpacked_product(self, x)


def _unpacked_product(module, x):
    """`x` `(..., in)` times a module's weights, `(..., out)`; one module's at a time are unpacked, in both passes."""

    @mx.custom_function
    def product(x):
        return _in_float32(x, _unpacked(module, after=x).T)

    @product.vjp
    def backward(x, cotangent, _):
        return _in_float32(cotangent, _unpacked(module, after=cotangent))

    return product(x)


def _unpacked(module, after):
    """The weights `(out, in)`, float32, of a quantized linear layer or embedding, unpacked once there is `after`."""
    names = [name for name in ("weight", "scales", "biases") if name in module]
    packed = mx.depends([module[name] for name in names], [after])
    settings = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
    return mx.dequantize(*packed, **settings).astype(mx.float32)


def _in_float32(x, weight):
    """`x @ weight`, computed in float32, in `x`'s dtype."""
    return (x.astype(mx.float32) @ weight).astype(x.dtype)


@contextmanager
def lean_layers(model):
    """Within the context, the model's layers are lean ones where there are; their parameters are untouched."""
    lean = {LoRALinear: LeanLoRALinear}
    if mx.default_device() != mx.gpu:
        lean |= {nn.QuantizedLinear: UnpackedLinear, nn.QuantizedEmbedding: UnpackedEmbedding}
    layers = [(module, type(module)) for _, module in model.named_modules() if type(module) in lean]
    for module, original in layers:
        module.__class__ = lean[original]
    try:
        yield
    finally:
        for module, original in layers:
            module.__class__ = original


@contextmanager
def unpacked_head(module, method, states):
    """Within the context, a quantized output head is unpacked once for all its products, on a CPU.

    Args:
        module, method: the head's, as in `Head`; it is frozen.
        states: what it will be given, all of it together.
    """
    if mx.default_device() == mx.gpu or not isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
        yield
        return
    weight, bias = _unpacked(module, after=states), module.get("bias")

    def project(_, x):
        out = _in_float32(x, weight.T)
        return out if bias is None else out + bias

    with intercepted(module, method, project):
        yield

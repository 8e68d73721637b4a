"""Packed weights, unpacked for products: where a library multiplies these faster than MLX does packed ones."""

from contextlib import contextmanager
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from ...models.switch_layers import QuantizedSwitchLinear
from .attention import on_cuda

# What `unpacked_once` keeps, by the modules' ids; of the innermost context last.
_kept = []


@contextmanager
def unpacked_once():
    """Within the context, weights that are unpacked are kept for later products with them."""
    _kept.append({})
    try:
        yield
    finally:
        _kept.pop()


def unpacks():
    """Whether packed weights are unpacked for products: not on Metal, where which is faster was not measured."""
    return on_cuda() or mx.default_device() != mx.gpu


class UnpackedLinear(nn.QuantizedLinear):
    """A `QuantizedLinear` that unpacks its weights for each product.

    MLX multiplies packed weights by many tokens slower than a library does unpacked ones: on a CPU some thirty times,
    and on CUDA (0.32.4) a step of a 1.24 B Llama took an H200 171 ms, not 51. There it reads them all for each row of
    one token, too, as a packed batch has them.
    """

    def __call__(self, x):
        out = _unpacked_product(self, _by_rows, x)
        return out + self["bias"] if "bias" in self else out


class UnpackedEmbedding(nn.QuantizedEmbedding):
    """The same for an embedding that is the output head too."""

    def as_linear(self, x):
        return _unpacked_product(self, _by_rows, x)


class UnpackedSwitchLinear(QuantizedSwitchLinear):
    """The same for experts, all of a layer's.

    Of packed ones MLX's CUDA kernel takes at most 65,535 rows, and ends with "invalid argument" for more.
    """

    def __call__(self, x, indices, sorted_indices=False):
        if self.get("global_scale") is not None:
            return super().__call__(x, indices, sorted_indices)  # each expert's own, which MLX does not unpack
        by_experts = partial(mx.gather_mm, rhs_indices=indices, sorted_indices=sorted_indices)
        out = _unpacked_product(self, by_experts, x)
        return out + mx.expand_dims(self["bias"][indices], -2) if "bias" in self else out


def _by_rows(x, weight):
    return x @ weight


def _unpacked_product(module, multiply, x):
    """`multiply(x, weight)` with a module's weights `(..., in, out)`; one module's are unpacked at a time.

    A CPU's products are float32 ones, a GPU's have the input's dtype.
    """
    dtype = x.dtype if mx.default_device() == mx.gpu else mx.float32

    def weight(after):
        """Unpacked once there is `after`, in both passes anew."""
        kept = _kept[-1] if _kept else {}
        if id(module) not in kept:
            names = [name for name in ("weight", "scales", "biases") if module.get(name) is not None]
            packed = mx.depends([module[name] for name in names], [after])
            settings = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
            kept[id(module)] = mx.dequantize(*packed, **settings).astype(dtype).swapaxes(-1, -2)
        return kept[id(module)]

    @mx.custom_function
    def product(x):
        return multiply(x.astype(dtype), weight(x)).astype(x.dtype)

    @product.vjp
    def backward(x, slope, _):
        # By hand: MLX's would go through all that the weights wait for.
        gradient = multiply(slope.astype(dtype), weight(slope).swapaxes(-1, -2))
        repeated = [axis for axis, size in enumerate(x.shape) if size != gradient.shape[axis]]
        return (gradient.sum(repeated, keepdims=True) if repeated else gradient).astype(x.dtype)

    return product(x)


UNPACKED = {
    nn.QuantizedLinear: UnpackedLinear,
    nn.QuantizedEmbedding: UnpackedEmbedding,
    QuantizedSwitchLinear: UnpackedSwitchLinear,
}

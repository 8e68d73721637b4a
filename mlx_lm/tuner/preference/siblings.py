"""LoRA layers that read one input, such as queries', keys' and values', computed as one layer.

A small model's step on an NVIDIA GPU takes as long as its host needs to launch kernels, two thirds of which are
products. Of layers that read one input the weights lie in one array, their first matrices side by side, and their
second ones along the diagonal of a larger one: three products forward and five backward do for all of them.
"""

import copy
import weakref
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import groupby

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...models import activations
from ..lora import LoRALinear
from .attention import on_cuda
from .cuda_gated import fit, gated
from .intercept import evaluating, exchanged, intercepted
from .state_space import split

# Columns that the first matrices have together at most: off the diagonal the second ones are zeros, which cost more
# than launching does where ranks are large.
MOST_COLUMNS = 64
# The `Siblings` of each layer, by its id. In the layer, a copy of the model would have those of the original, and a
# circle would keep a model that is let go of until Python looks for such.
_KNOWN = weakref.WeakValueDictionary()
# The matrices of a layer, by name.
LEAVES = ("lora_a", "lora_b")


class Siblings:
    """Layers that are computed together, whose weights become parts of one array.

    Args:
        layers: `LoRALinear`s such as `find_siblings` takes together.

    Attributes:
        layers: these.
        linear: the layer of all their weights.
    """

    def __init__(self, layers):
        self.layers, linears = layers, [layer.linear for layer in layers]
        ends = np.cumsum([len(linear.weight) for linear in linears]).tolist()
        self._columns = [slice(end - len(linear.weight), end) for end, linear in zip(ends, linears, strict=True)]
        rank = layers[0].lora_a.shape[1]
        self._rows = [slice(rank * i, rank * (i + 1)) for i in range(len(layers))]
        self.linear = copy.copy(linears[0])
        for name in linears[0].parameters():
            self.linear[name] = mx.concatenate([linear[name] for linear in linears])
            for linear, own in zip(linears, self._columns, strict=True):
                linear[name] = self.linear[name][own]
        mx.eval(self.linear.parameters(), [linear.parameters() for linear in linears])
        mx.clear_cache()  # what they were before has the size of nothing that comes
        self._weights = [linear.weight for linear in linears]
        self._joined = self._input = self._outputs = None
        _KNOWN.update(dict.fromkeys(map(id, layers), self))

    def matrices(self):
        """The layers' first matrices and their second ones, `[[lora_a, ...], [lora_b, ...]]`."""
        return [[layer[leaf] for layer in self.layers] for leaf in LEAVES]

    @staticmethod
    def joined(firsts, seconds, lib=mx, nothing=0):
        """The joined matrices of one of each kind a layer, MLX's or numpy's; `nothing` is where no layer's is."""
        second = lib.full((sum(map(len, seconds)), sum(x.shape[1] for x in seconds)), nothing, seconds[0].dtype)
        row = column = 0
        for own in seconds:
            second[row : row + len(own), column : column + own.shape[1]] = own
            row, column = row + len(own), column + own.shape[1]
        return lib.concatenate(firsts, axis=1), second

    @contextmanager
    def holding(self, first, second):
        """Within the context, the layers are computed together, with these joined matrices."""
        parts = [(first[:, own], second[own, out]) for own, out in zip(self._rows, self._columns, strict=True)]
        with ExitStack() as stack:
            for layer, (lora_a, lora_b) in zip(self.layers, parts, strict=True):
                stack.enter_context(exchanged(layer, "lora_a", lora_a))
                stack.enter_context(exchanged(layer, "lora_b", lora_b))
            # Weights that the model was given since are not among those that were joined.
            if all(own.linear.weight is weight for own, weight in zip(self.layers, self._weights, strict=True)):
                self._joined = first, second, parts
            try:
                yield
            finally:
                self._joined = self._input = self._outputs = None

    def whole(self, x):
        """The outputs of all layers for `x`, side by side; None where each is to compute its own."""
        if self._joined is None:
            return None
        first, second, parts = self._joined
        # A layer that is computed again in the backward pass is given copies, which gradients have to reach.
        if any(own.lora_a is not a or own.lora_b is not b for own, (a, b) in zip(self.layers, parts, strict=True)):
            return None
        return adapted(self.linear, x, first, second)

    def take(self, layer, x):
        """A layer's output for `x`, computed for all at the first one's call; None where it is to compute it itself."""
        if self._input is not x:
            out, ends = self.whole(x), [own.stop for own in self._columns]
            if out is None:
                return None
            self._input, self._outputs = x, split(out, ends[:-1], axis=-1)
            if len(ends) == 2 and ends[1] == 2 * ends[0] and on_cuda() and fit(out):
                activations.together = *self._outputs, partial(gated, out)
        place = next(i for i, own in enumerate(self.layers) if own is layer)
        out = self._outputs[place]
        if place == len(self.layers) - 1:
            self._input = self._outputs = None
        return out


def side_by_side(layers, x):
    """What layers make of `x`, `(..., sum of their widths)`, of siblings without a copy."""
    own = _known(layers)
    if own is not None and (out := own.whole(x)) is not None:
        return out
    return mx.concatenate([layer(x) for layer in layers], axis=-1)


def adapted(linear, x, lora_a, lora_b):
    """`linear(x) + x @ lora_a @ lora_b` in the dtype of `x`, with a backward pass that reads large arrays seldom.

    MLX evaluates gradients of parameters last and keeps what they need until then: here the gradient that is passed on
    waits for them.

    Args:
        linear: a frozen layer.
        x: `(..., in)`.
        lora_a, lora_b: `(in, rank)` and `(rank, out)`.
    """

    @mx.custom_function
    def product(lora_a, lora_b, x):
        low = x @ lora_a
        return mx.addmm(linear(x), low, lora_b), low

    @product.vjp
    def backward(arrays, cotangents, outputs):
        (lora_a, lora_b, x), (slope, _), (_, low) = arrays, cotangents, outputs
        low_slope = slope @ lora_b.T
        own = [x.T @ low_slope, low.T @ slope]
        slope = mx.depends([slope], own)[0]
        # A plain layer's by itself: MLX's would turn its weight around twice.
        plain = type(linear) is nn.Linear
        passed_on = slope @ linear.weight if plain else mx.vjp(linear, [x], [slope])[1][0]
        own.append(mx.addmm(passed_on, low_slope, lora_a.T))
        # A float32 layer among narrower ones gives gradients of float32, which MLX refuses or misreads.
        return tuple(found.astype(x.dtype) for found, x in zip(own, arrays, strict=True))

    out = product(lora_a.astype(x.dtype), lora_b.astype(x.dtype), x.reshape(-1, x.shape[-1]))[0]
    return out.reshape(*x.shape[:-1], out.shape[-1])


def find_siblings(model):
    """A list of the `Siblings` of a model: layers that read one input one after another and can be computed together.

    Found by running the model on a few tokens; none where it cannot be run so.
    """
    calls = []

    def listened(layer, x):
        calls.append((layer, x))
        return LoRALinear.__call__(layer, x)

    layers = [module for module in model.modules() if type(module) is LoRALinear]
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for layer in layers:
            stack.enter_context(intercepted(layer, "__call__", listened))
        # A model's own code may fail in any way.
        with suppress(Exception):
            model(mx.arange(1, 13).reshape(2, 6))
    counts = Counter(id(layer) for layer, _ in calls)
    groups = ([layer for layer, _ in own] for _, own in groupby(calls, key=lambda call: id(call[1])))
    once = (own for own in groups if all(counts[id(layer)] == 1 for layer in own))
    return [_siblings(own) for own in once if _go_together(own)]


def siblings_of(layer):
    """The `Siblings` that a layer belongs to, or None."""
    return _KNOWN.get(id(layer))


def multiplied_in(layer):
    """The dtype in which a linear layer multiplies, be it with an adapter: its weight's, or a packed one's scales'."""
    own = layer.get("linear", layer)
    return own.get("scales", own.weight).dtype


def _known(layers):
    """The `Siblings` that are these layers, or None."""
    known = siblings_of(layers[0])
    return known if known is not None and list(map(id, known.layers)) == list(map(id, layers)) else None


def _siblings(layers):
    """The `Siblings` of layers, while there are some the same at each call."""
    return _known(layers) or Siblings(layers)


def _go_together(layers):
    """Whether layers are more than one, and alike in all but the width of what they make."""
    if len(layers) < 2 or len({_kind(layer) for layer in layers}) > 1 or _kind(layers[0]) is None:
        return False
    return len(layers) * layers[0].lora_a.shape[1] <= MOST_COLUMNS


def _kind(layer):
    """What layers must have in common to be computed together; None where one cannot be."""
    linear = layer.linear
    plain = type(linear) in (nn.Linear, nn.QuantizedLinear) and not linear.trainable_parameters()
    trained = set(LEAVES) <= set(layer.trainable_parameters())
    if not plain or not trained or layer.dropout._p_1 < 1:
        return None
    arrays = tuple((name, value.dtype, value.shape[1:]) for name, value in sorted(linear.parameters().items()))
    packing = tuple(getattr(linear, name, None) for name in ("group_size", "bits", "mode"))
    return type(linear), arrays, packing, layer.scale, layer.lora_a.dtype, layer.lora_a.shape

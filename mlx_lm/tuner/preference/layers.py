"""Layers that compute what mlx-lm's do with less work, and layers computed again in the backward pass."""

from contextlib import ExitStack, contextmanager

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from ...models import activations, switch_layers
from ..lora import LoRALinear, LoRASwitchLinear
from . import cuda_convolution, cuda_delta_net
from .attention import PackedState, RowCache, Window, on_cuda
from .experts import NarrowLoRASwitchLinear, gather_sort, scatter_unsort
from .intercept import aside, exchanged, intercepted, recomputed, replaced, tell_aside
from .options import ConfigError
from .pieces import chunks_of, recurrences_in_pieces
from .siblings import adapted, multiplied_in, siblings_of
from .unpacked import UNPACKED, unpacks

STATELESS = (PackedState, RowCache, Window)


class LeanLoRALinear(LoRALinear):
    """A `LoRALinear` whose low-rank product is in the input's dtype and added within the product.

    Upstream's multiplies half-precision inputs by float32 matrices, which makes a float32 copy of every input
    and of every output; the matrices themselves stay float32 here too, and so does what the optimizer sees.
    """

    def __call__(self, x):
        siblings = siblings_of(self)
        if siblings is not None and (out := siblings.take(self, x)) is not None:
            return out
        lora_a, lora_b = self.lora_a, self.lora_b if self.scale == 1.0 else self.scale * self.lora_b
        dropped = self.dropout(x)
        if dropped is x and not self.linear.trainable_parameters():
            return adapted(self.linear, x, lora_a, lora_b)
        return mx.addmm(self.linear(x), dropped @ lora_a.astype(x.dtype), lora_b.astype(x.dtype))


class DepthwiseConv1d(nn.Conv1d):
    """A `Conv1d` of each channel by itself, with few taps: a sum of shifted products.

    On a CPU both passes of (4, 640, 6144) with four taps take 0.41 s so, and 0.67 with MLX's product of matrices for
    each channel; and MLX has no kernel of its own for Metal in training. CUDA's library has one: with it a step of
    Qwen3.5-0.8B's shape took an H200 180 ms, not 209.
    """

    def __call__(self, x):
        # Computed in float32: x (B, T, C), weight (C, K, 1).
        values, weight = x.astype(mx.float32), self.weight.astype(mx.float32)
        length = x.shape[1] - weight.shape[1] + 1
        products = (values[:, i : i + length] * weight[:, i, 0] for i in range(weight.shape[1]))
        out = sum(products, next(products)).astype(x.dtype)
        return out + self.bias if "bias" in self else out


def _is_depthwise(module):
    """Whether a module is a `Conv1d` that `DepthwiseConv1d` computes."""
    if not isinstance(module, nn.Conv1d):
        return False
    plain = module.stride == 1 and module.padding == 0 and module.dilation == 1
    return plain and module.groups == module.weight.shape[0] and module.weight.shape[2] == 1


def _in_rows(call, packed):
    """What a depthwise `Conv1d` does, by `call`, with tokens that come as sequences of one, behind nothing or zeros."""

    def convolved(module, x):
        kept = module.weight.shape[1] - 1

        def over(x, before):
            x = mx.pad(x, [(0, 0), (kept, 0), (0, 0)]) if before is None else mx.concatenate([before, x], axis=1)
            return call(module, x), x[:, x.shape[1] - kept :]

        return packed.in_rows(over, [x[:, -1:]])

    return convolved


def _where_they_stand(call, before, after):
    """As `_in_rows` gives, which `call` is of for inputs that the kernel does not read."""

    def convolved(module, x):
        if x.dtype != module.weight.dtype:
            return call(module, x)
        return cuda_convolution.convolved(x[:, -1], module.weight, before, after, module.get("bias"))[:, None]

    return convolved


def convolved_channels(model):
    """How many channels the model's depthwise convolutions have, a set."""
    return {module.weight.shape[0] for module in model.modules() if _is_depthwise(module)}


@contextmanager
def lean_layers(modules, packed=None):
    """Within the context, layers are lean ones where there are; their parameters are untouched.

    Args:
        modules: all of an mlx-lm model, or of a part of one.
        packed: the recurrent `Parts` of a packed batch, which recurrent layers, and what they convolve with, read.
    """
    lean = {LoRALinear: LeanLoRALinear, LoRASwitchLinear: NarrowLoRASwitchLinear}
    if not on_cuda():
        lean[nn.Conv1d] = DepthwiseConv1d
    if unpacks():
        lean |= UNPACKED
    with ExitStack() as stack:
        for module in modules:
            if type(module) in lean and (type(module) is not nn.Conv1d or _is_depthwise(module)):
                stack.enter_context(exchanged(module, "__class__", lean[type(module)]))
        stack.enter_context(exchanged(activations, "keeps_little", True))
        stack.enter_context(exchanged(activations, "together", None))
        stack.enter_context(exchanged(switch_layers, "_gather_sort", gather_sort))
        stack.enter_context(exchanged(switch_layers, "_scatter_unsort", scatter_unsort))
        stack.enter_context(replaced(modules, GATED))
        stack.enter_context(recurrences_in_pieces(modules, packed))
        near = {}
        for module in filter(_is_depthwise, modules if packed is not None else ()):
            call = _in_rows(type(module).__call__, packed)
            if on_cuda() and cuda_convolution.fits(module):
                kept = module.weight.shape[1] - 1
                if kept not in near:
                    near[kept] = cuda_convolution.neighbours(packed, kept)
                call = _where_they_stand(call, *near[kept])
            stack.enter_context(intercepted(module, "__call__", call))
        if near and (chunks := chunks_of(packed)) is not None:
            stack.enter_context(replaced(modules, {DELTA_NET: lambda upstream: _delta_net(upstream, chunks, near)}))
        yield


# Qwen3.5's layer of the gated delta rule, for `replaced`.
DELTA_NET = "qwen3_5", "GatedDeltaNet", "__call__"


def _delta_net(upstream, chunks, near):
    """That layer on a packed batch: by what `chunks_of` gives, and neighbours by how many a convolution reads."""

    def call(module, inputs, mask=None, cache=None):
        kept = module.conv1d.weight.shape[1] - 1
        if mask is not None or kept not in near or not cuda_delta_net.fits(module, inputs):
            return upstream(module, inputs, mask, cache)
        return cuda_delta_net.gated_delta_net(module, inputs, *chunks, *near[kept])

    return call


def _gated(module, x):
    """As `__call__` of Gemma's MLP."""
    return module.down_proj(activations.geglu(module.gate_proj(x), module.up_proj(x)))


# Gated activations that mlx-lm's models have by themselves, for `replaced`.
GATED = {
    ("gemma2", "MLP", "__call__"): lambda _: _gated,
    ("gemma3_text", "MLP", "__call__"): lambda _: _gated,
    ("gemma4_text", None, "geglu"): lambda _: activations.geglu,
}


@contextmanager
def multiplied_once(model):
    """Within the context, LoRA layers hold their matrices scaled, in the dtype of their products.

    Each product would scale and round them anew otherwise, which many batches in a row need not. Values are the same
    where a layer's input has its weight's dtype, as `flat` has it in training.
    """
    with ExitStack() as stack:
        layers = lora_layers(model)
        for module, dtype in layers:
            lora_b = (module.scale * module.lora_b).astype(dtype)
            stack.enter_context(exchanged(module, "lora_a", module.lora_a.astype(dtype)))
            stack.enter_context(exchanged(module, "lora_b", lora_b))
            stack.enter_context(exchanged(module, "scale", 1.0))
        for own in dict.fromkeys(siblings_of(layer) for layer, _ in layers):
            if own is not None:
                stack.enter_context(own.holding(*own.joined(*own.matrices())))
        yield


def lora_layers(model):
    """`[(LoRALinear, dtype)]`: the dtype in which each multiplies, its weight's or the scales' of a packed one.

    Those for which it is no floating one are left out.
    """
    layers = [module for module in model.modules() if type(module) is LoRALinear]
    dtypes = map(multiplied_in, layers)
    return [pair for pair in zip(layers, dtypes, strict=True) if mx.issubdtype(pair[1], mx.floating)]


def layers_of(model):
    """The model's layers, each once; none where it does not name them."""
    layers = {id(layer): layer for layer in getattr(model, "layers", []) if layer is not None}
    return list(layers.values())


def is_float32(model):
    """Whether no floating parameter of the model is narrower than float32."""
    parameters = (value for _, value in tree_flatten(model.parameters()))
    return all(value.dtype == mx.float32 for value in parameters if mx.issubdtype(value.dtype, mx.floating))


@contextmanager
def checkpointed_layers(model):
    """Within the context, the backward pass computes each layer again; `ConfigError` for a model without `layers`."""
    layers = layers_of(model)
    if not layers:
        raise ConfigError("grad_checkpoint computes layer by layer, and this model has no `layers`; leave it out.")
    with ExitStack() as stack:
        # The backward pass begins with the last one: to compute that again at once would save nothing.
        for layer in layers[:-1]:
            stack.enter_context(intercepted(layer, "__call__", _checkpointed(type(layer).__call__)))
        yield


def _checkpointed(call):
    def checkpointed(layer, *args, **kwargs):
        leaves = [x for _, x in tree_flatten([args, kwargs])]
        if any(map(_keeps_state, leaves)):
            # What a layer leaves in an object has no gradient once the layer is computed again.
            return call(layer, *args, **kwargs)
        outputs = []

        def run(*arrays):
            arrays = iter(arrays)
            given, named = tree_map(lambda x: next(arrays) if _is_floating(x) else x, [args, kwargs])
            with aside() as told:
                outputs.append([call(layer, *given, **named), told])
            # MLX loses the gradient of an array that is returned twice: views differ.
            return [mx.expand_dims(x, 0) for _, x in tree_flatten(outputs[-1]) if isinstance(x, mx.array)]

        found = iter(recomputed(layer, run)(*filter(_is_floating, leaves)))
        out, told = tree_map(lambda x: next(found).squeeze(0) if isinstance(x, mx.array) else x, outputs[0])
        tell_aside(*told)
        return out

    return checkpointed


def _is_floating(value):
    """Whether a value is an array with a gradient: MLX refuses to look for one where an integer array is an index."""
    return isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating)


def _keeps_state(value):
    """Whether a layer may leave arrays in `value`, as in a cache of upstream's."""
    return hasattr(value, "__dict__") and not callable(value) and not isinstance(value, STATELESS)

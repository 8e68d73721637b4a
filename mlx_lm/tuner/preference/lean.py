"""Layers that compute what mlx-lm's do with less work, put in their places while a model is scored."""

import sys
from contextlib import ExitStack, contextmanager
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from ...models import activations
from ..lora import LoRALinear
from .modules import exchanged, intercepted

# MLX's CUDA backend has a fused backward pass of attention for lengths that are multiples of this.
ATTENTION_TILE = 128
# Where there is none, a query's scores are kept for each key. With so many keys a head's dimension they are more than
# what it takes to compute them again, which is done for so many scores at a time.
KEYS_A_DIMENSION = 4
BLOCK_SCORES = 2**23


def on_cuda():
    """Whether the default device is a GPU of NVIDIA's."""
    return mx.default_device() == mx.gpu and not mx.metal.is_available()


class LeanLoRALinear(LoRALinear):
    """A `LoRALinear` whose low-rank product is in the input's dtype and added within the product.

    Upstream's multiplies half-precision inputs by float32 matrices, which makes a float32 copy of every input
    and of every output; the matrices themselves stay float32 here too, and so does what the optimizer sees.
    """

    def __call__(self, x):
        lora_a, lora_b = self.lora_a.astype(x.dtype), (self.scale * self.lora_b).astype(x.dtype)
        dropped = self.dropout(x)
        if dropped is x and not self.linear.trainable_parameters():
            _, function, inputs = _recipes.get(id(x), (x, None, (x,)))
            out = _adapted_product(self.linear, function, inputs, lora_a, lora_b)
            return out.reshape(*x.shape[:-1], out.shape[-1])
        return mx.addmm(self.linear(x), dropped @ lora_a, lora_b)


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


def _adapted_product(linear, function, inputs, lora_a, lora_b):
    """The rows `(N, out)` of `linear(x) + x @ lora_a @ lora_b`, with a lean backward pass.

    It reads large arrays seldom, and keeps the inputs and not x. MLX evaluates gradients of parameters last and keeps
    what they need until then: here the gradient that is passed on waits for them.

    Args:
        linear: a frozen layer.
        function, inputs: x is `function(*inputs)`, elementwise, or with None the one input.
        lora_a, lora_b: `(in, rank)` and `(rank, out)`.
    """

    def rows_of(inputs):
        x = function(*inputs) if function else inputs[0]
        return x.reshape(-1, x.shape[-1])

    @mx.custom_function
    def product(lora_a, lora_b, *inputs):
        rows = rows_of(inputs)
        low = rows @ lora_a
        return mx.addmm(linear(rows), low, lora_b), low

    @product.vjp
    def backward(arrays, cotangents, outputs):
        (lora_a, lora_b, *inputs), (slope, _), (_, low) = arrays, cotangents, outputs
        rows = rows_of(mx.depends(inputs, [slope]) if function else inputs)
        low_slope = slope @ lora_b.T
        own = [rows.T @ low_slope, low.T @ slope]
        slope, low_slope = mx.depends([slope, low_slope], own)
        _, (passed_on,) = mx.vjp(linear, [rows], [slope])
        passed_on = mx.addmm(passed_on, low_slope, lora_a.T).reshape(inputs[0].shape)
        return *own, *(_slopes(function, inputs, passed_on) if function else [passed_on])

    return product(lora_a, lora_b, *inputs)[0]


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


# How arrays were made that can be computed again, while lean layers are in place, by their identity: the array, which
# keeps that its own, the function and its inputs.
_recipes = {}


def computed_again(function):
    """`function` of arrays, elementwise, of which nothing but its inputs is kept for the backward pass."""

    @mx.custom_function
    def once(*inputs):
        return function(*inputs)

    @once.vjp
    def again(inputs, cotangent, _):
        return tuple(_slopes(function, inputs, cotangent))

    def remembered(*inputs):
        out = once(*inputs)
        _recipes[id(out)] = out, function, inputs
        return out

    return remembered


def _slopes(function, inputs, cotangent):
    """The gradients of `inputs`, from them and the gradient of `function`'s output alone."""
    slopes = []
    for i in range(len(inputs)):
        # One after another: what they have in common would be an array, which a fused kernel needs not write.
        values = mx.depends(list(inputs), [cotangent, *slopes])
        slopes.append(mx.vjp(function, values, [cotangent])[1][i])
    return slopes


def lean_attention(attention, queries, keys, values, *, mask=None, **options):
    """MLX's `attention` with a backward pass that does not keep a score for each query and key.

    Args:
        attention: `mx.fast.scaled_dot_product_attention`; what follows are its arguments.
    """
    causal, half = isinstance(mask, str), queries.dtype in (mx.float16, mx.bfloat16)
    if on_cuda() and half and causal and max(queries.shape[3], values.shape[3]) <= 128:
        return padded_attention(attention, queries, keys, values, mask=mask, **options)
    # Sinks, and masks of numbers, may have gradients of their own.
    plain = options.get("sinks") is None and (mask is None or causal or mask.dtype == mx.bool_)
    if plain and keys.shape[2] > KEYS_A_DIMENSION * queries.shape[3]:
        return blocked_attention(attention, queries, keys, values, mask=mask, **options)
    return attention(queries, keys, values, mask=mask, **options)


def blocked_attention(attention, queries, keys, values, mask=None, **options):
    """`attention` in blocks of queries, each computed again in the backward pass; arguments as for `lean_attention`."""
    batch, heads, length, _ = queries.shape
    whole = keys.shape[2]
    size = max(32, BLOCK_SCORES // (batch * heads * whole))
    causal = isinstance(mask, str)
    spans = [(start, min(start + size, length)) for start in range(0, length, size)]

    def block(queries, keys, values, start, stop):
        whole_mask = mask is None or causal or mask.ndim < 2 or mask.shape[-2] == 1
        rows = mask if whole_mask else mask[..., start:stop, :]
        return attention(queries, keys, values, mask=rows, **options)

    def seen(stop):
        """How many keys a block's queries may attend to: the last query to the last key."""
        return whole - length + stop if causal else whole

    @mx.custom_function
    def blocks(queries, keys, values):
        parts = []
        for start, stop in spans:
            own = queries[:, :, start:stop]
            if parts:
                own = mx.depends([own], [parts[-1]])[0]
            parts.append(block(own, keys[:, :, : seen(stop)], values[:, :, : seen(stop)], start, stop))
        return mx.concatenate(parts, axis=2)

    @blocks.vjp
    def backward(inputs, cotangent, _):
        queries, keys, values = inputs
        slopes, sums = [], [mx.zeros(x.shape) for x in (keys, values)]
        for start, stop in spans:
            own, slope = mx.depends([queries[:, :, start:stop], cotangent[:, :, start:stop]], sums)
            others = [x[:, :, : seen(stop)] for x in (keys, values)]
            _, (first, *rest) = mx.vjp(partial(block, start=start, stop=stop), [own, *others], [slope])
            slopes.append(first)
            after = [(0, 0), (0, 0), (0, whole - seen(stop)), (0, 0)]
            sums = [total + mx.pad(x.astype(mx.float32), after) for total, x in zip(sums, rest, strict=True)]
            # Left for later, the queries' gradients would keep each block's scores.
            sums = mx.depends(sums, [first])
        return mx.concatenate(slopes, axis=2), *(total.astype(keys.dtype) for total in sums)

    return blocks(queries, keys, values)


def padded_attention(attention, queries, keys, values, mask, **options):
    """Causal `attention`, padded to lengths for which CUDA has a fused backward pass; arguments as `lean_attention`.

    Queries attend to the keys up to their own, the last query to the last key: zeros after both change nothing
    for those before, nor do zeros before the queries. There are fewer such lengths too, and each pair of them has a
    plan that takes time to make.
    """
    length = queries.shape[2]
    before, after = (keys.shape[2] - length) % ATTENTION_TILE, -keys.shape[2] % ATTENTION_TILE
    queries, keys, values = _padded(queries, before, after), _padded(keys, 0, after), _padded(values, 0, after)
    return attention(queries, keys, values, mask=mask, **options)[:, :, before : before + length]


def _padded(x, before, after):
    """`x` `(B, H, T, D)` with zeros before and after its T positions, laid out as projections are: T before H."""
    if not (before or after):
        return x
    return mx.pad(x.swapaxes(1, 2), [(0, 0), (before, after), (0, 0), (0, 0)]).swapaxes(1, 2)


@contextmanager
def lean_layers(model):
    """Within the context, the model's layers are lean ones where there are; their parameters are untouched."""
    on_gpu = mx.default_device() == mx.gpu
    lean = {LoRALinear: LeanLoRALinear}
    if not on_gpu:
        lean |= {nn.QuantizedLinear: UnpackedLinear, nn.QuantizedEmbedding: UnpackedEmbedding}
    layers = [(module, type(module)) for _, module in model.named_modules() if type(module) in lean]
    for module, original in layers:
        module.__class__ = lean[original]
    try:
        with ExitStack() as stack:
            if on_gpu:
                # A CPU is slower at the exponentials that would be computed again than at keeping them.
                swiglu = activations.swiglu
                for namespace in {sys.modules.get(type(module).__module__) for module in model.modules()}:
                    if getattr(namespace, "swiglu", None) is swiglu:
                        stack.enter_context(exchanged(namespace, "swiglu", computed_again(swiglu)))
            yield
    finally:
        _recipes.clear()
        for module, original in layers:
            module.__class__ = original


@contextmanager
def lean_attentions():
    """Within the context, in which gradients are taken, MLX's attention is `lean_attention`."""
    attention = mx.fast.scaled_dot_product_attention
    with exchanged(mx.fast, "scaled_dot_product_attention", partial(lean_attention, attention)):
        yield


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

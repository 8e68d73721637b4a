"""What is done to a model's modules from outside: other calls, other modes, activations computed again."""

from contextlib import contextmanager

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten


@contextmanager
def intercepted(module, method, replacement):
    """Within the context, this one module's `method` is `replacement(module, ...)`.

    The module's class is exchanged, not the module: the tree of parameters stays as it is.
    """
    original = type(module)
    module.__class__ = exchanged = type(original.__name__, (original,), {method: replacement})
    try:
        yield
    finally:
        module.__class__ = original
        # A class is only freed when cycles are collected, and until then keeps the arrays that its methods hold.
        delattr(exchanged, method)


@contextmanager
def exchanged(owner, name, replacement):
    """Within the context, this attribute of a module of Python or MLX is `replacement`."""
    original = getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def evaluating(model):
    """Within the context, the model is in evaluation mode: no dropout."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        # A module comes before what it holds, so that a part in another mode than the whole gets it back.
        for module, training in modes:
            if module.training != training:
                module.train(training)


def recomputed(module, function):
    """`function`, whose activations are not kept but computed again in the backward pass.

    MLX's checkpoint waits for the function's own output before it computes again; here the second run waits for
    the gradient to arrive, without which every layer could run again before the first is done with. The gradient
    reaches the trainable parameters of `module` too, which are in their places again afterwards, and the second
    run draws the dropout of the first.

    Args:
        module: what holds the parameters that `function` uses.
        function: takes arrays and returns a list of arrays; one that it returned twice would lose a gradient.
    """
    key = mx.random.state[0]
    parameters = tree_flatten(module.trainable_parameters())
    names, values = [name for name, _ in parameters], [value for _, value in parameters]

    def run(*arrays):
        with parameters_in(module, tree_unflatten(list(zip(names, arrays, strict=False)))):
            return function(*arrays[len(names) :])

    @mx.custom_function
    def once(*arrays):
        return tuple(run(*arrays))

    @once.vjp
    def again(arrays, cotangents, _):
        # MLX divides by zero where it has to compute the gradient of an empty array.
        arrays = mx.depends(list(arrays), [cotangent for cotangent in cotangents if cotangent.size])
        with drawing_from(key):
            _, slopes = mx.vjp(run, arrays, list(cotangents))
        own, passed_on = slopes[: len(names)], slopes[len(names) :]
        return (*own, *(mx.depends(passed_on, own) if own else passed_on))

    return lambda *inputs: once(*values, *inputs)


@contextmanager
def parameters_in(module, parameters):
    """Within the context, the trainable parameters of `module` are these."""
    kept = module.trainable_parameters()
    module.update(parameters)
    try:
        yield
    finally:
        module.update(kept)


@contextmanager
def drawing_from(key):
    """Within the context, dropout draws what it would if MLX's random state, which cannot be set, were `key`."""
    original = mx.random.bernoulli

    def bernoulli(*args, **kwargs):
        nonlocal key
        key, own = mx.random.split(key)
        return original(*args, **kwargs | {"key": own})

    with exchanged(mx.random, "bernoulli", bernoulli):
        yield


def layers_of(model):
    """The model's layers, each once; none where it does not name them."""
    layers = {id(layer): layer for layer in getattr(model, "layers", []) if layer is not None}
    return list(layers.values())


def first_output(out):
    """The logits of what a model returns: the array, or a tuple's first entry."""
    return out[0] if isinstance(out, (tuple, list)) else out


def is_float32(model):
    """Whether no floating parameter of the model is narrower than float32."""
    parameters = (value for _, value in tree_flatten(model.parameters()))
    return all(value.dtype == mx.float32 for value in parameters if mx.issubdtype(value.dtype, mx.floating))


def relative_error(found, expected):
    """How far two `(..., V)` arrays of logits are apart, relative to the largest finite value.

    The largest difference at each position, and the mean of these: in half precision a router may take another
    expert for one token, while a wrong mask or state shows at many. Equal infinities do not differ.
    """
    found, expected = found.astype(mx.float32), expected.astype(mx.float32)
    gap = mx.where(found == expected, 0.0, mx.abs(found - expected)).max(axis=-1).mean()
    size = mx.abs(mx.where(mx.isfinite(expected), expected, 0.0)).max()
    return (gap / mx.maximum(size, 1e-6)).item()

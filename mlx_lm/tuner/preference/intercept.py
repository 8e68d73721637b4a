"""What is done to a model's modules from outside: other calls, other modes, activations computed again."""

import sys
from contextlib import ExitStack, contextmanager

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

MODELS = "mlx_lm.models."


@contextmanager
def intercepted(module, method, replacement):
    """Within the context, this one module's `method` is `replacement(module, ...)`.

    The module's class is exchanged, not the module: the tree of parameters stays as it is.
    """
    own = type(type(module).__name__, (type(module),), {method: replacement})
    try:
        with exchanged(module, "__class__", own):
            yield
    finally:
        # A class is only freed when cycles are collected, and until then keeps the arrays that its methods hold.
        delattr(own, method)


_aside = []


def tell_aside(*arrays):
    """Add arrays to what the innermost `aside` collects, if there is one."""
    if _aside:
        _aside[-1].extend(arrays)


@contextmanager
def aside():
    """Within the context, what a model's parts tell aside is collected in the list that it gives."""
    _aside.append([])
    try:
        yield _aside[-1]
    finally:
        _aside.pop()


@contextmanager
def exchanged(owner, name, replacement):
    """Within the context, this attribute of `owner` is `replacement`."""
    original = getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def replaced(modules, table):
    """Within the context, what the files of a model's `modules` call by name is what `table` makes of it.

    Args:
        table: what makes another function of one of upstream's, by the file that defines it, its class or None, and its
            name.
    """
    files = {type(module).__module__ for module in modules}
    with ExitStack() as stack:
        for namespace in (sys.modules[file] for file in files if file in sys.modules):
            for (file, kind, name), make in table.items():
                owner = namespace if kind is None else getattr(namespace, kind, None)
                function = getattr(owner, name, None)
                # Within another such context it is not upstream's.
                if getattr(function, "__module__", None) == MODELS + file:
                    stack.enter_context(exchanged(owner, name, make(function)))
        yield


@contextmanager
def evaluating(model):
    """Within the context, the model is in evaluation mode: no dropout."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def without_adapters(model):
    """Within the context, each layer with an adapter is the layer that it wraps; gives whether there is any."""
    adapted = [(name, module) for name, module in model.named_modules() if "lora_a" in module]
    bare = [(name, module["linear"] if "linear" in module else module["embedding"]) for name, module in adapted]
    model.update_modules(tree_unflatten(bare))
    try:
        yield bool(adapted)
    finally:
        model.update_modules(tree_unflatten(adapted))


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
        # MLX hands over a single array bare.
        arrays = [arrays] if isinstance(arrays, mx.array) else list(arrays)
        # MLX divides by zero where it has to compute the gradient of an empty array.
        arrays = mx.depends(arrays, [cotangent for cotangent in cotangents if cotangent.size])
        with drawing_from(key):
            _, slopes = mx.vjp(run, arrays, list(cotangents))
        own, passed_on = slopes[: len(names)], slopes[len(names) :]
        # Left for later, the others would keep what they are made of.
        return (*own, *mx.depends(passed_on, slopes))

    return lambda *inputs: once(*values, *inputs)

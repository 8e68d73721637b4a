"""A model's output head run apart from its body: on chosen positions, with bounded memory."""

import math
from contextlib import ExitStack
from functools import partial

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from ...utils import token_logps
from .lean import lean_layers, unpacked_head
from .modules import (
    drawing_from,
    evaluating,
    first_output,
    intercepted,
    is_float32,
    layers_of,
    parameters_in,
    relative_error,
)

# Logits in one chunk of the output head: 2^25 float32 values are 134 MB, wide enough for a GPU; a CPU is as fast
# with an eighth of them.
CHUNK_LOGITS = 2**25 if mx.default_device() == mx.gpu else 2**22


def logps_and_squares(logits, targets, alignment):
    """Target log-probabilities, and log sum_v p(v)^2 where asked for, each `(N,)` float32."""
    logps = token_logps(logits, targets)
    if not alignment:
        return logps, None
    logits = mx.stop_gradient(logits.astype(mx.float32))
    return logps, mx.logsumexp(2 * logits, axis=-1) - 2 * mx.logsumexp(logits, axis=-1)


class _HiddenStates(Exception):
    """Carries the head's input out of the model's forward pass, so that the head does not run."""


class Head:
    """The module of a model that turns hidden states into logits, and what the model does after it.

    It is found by running the model, not by its name: it is the last module that turns a position's hidden
    state into as many values as the model does. What follows it (soft caps, scales) is run by the model's
    own code.
    """

    def __init__(self, model, module, method, vocabulary):
        self.model = model
        self.module = module
        self.method = method  # "__call__", or "as_linear" of a tied embedding
        self.vocabulary = vocabulary

    @classmethod
    def find(cls, model):
        """The head of `model`, or None where response positions alone do not give the model's own logits."""
        tokens = mx.arange(1, 13).reshape(2, 6)
        with evaluating(model), lean_layers(model):
            logits, found = _last_projection(model, tokens)
            if found is None:
                return None
            module, method, states = found
            head = cls(model, module, method, logits.shape[-1])
            try:
                if head.hidden_states(tokens, None).shape != states.shape:
                    return None
                states = states.reshape(12, -1)
                again = head.logits(states)
                complete = head._is_complete(states)
            except Exception:  # run in parts, a model's own code may fail in any way
                return None
        expected = logits.reshape(12, -1)
        # Half-precision products of other shapes round otherwise; a missed soft cap or scale differs by far more.
        tolerance = 1e-4 if is_float32(model) else 3e-2
        same = again.shape == expected.shape and relative_error(again, expected) < tolerance
        return head if same and complete else None

    def _is_complete(self, states):
        """Whether the head's own are the only trainable parameters between hidden states and logits."""
        others = _outside(self.model, [self.module, *layers_of(self.model)])
        if not others:
            return True

        def total(parameters):
            self.model.update(parameters)
            return mx.square(self.logits(states)).sum()

        gradients = mx.grad(total)(tree_unflatten(others))
        self.model.update(tree_unflatten(others))
        return not any(mx.any(gradient).item() for _, gradient in tree_flatten(gradients))

    def hidden_states(self, tokens, cache):
        """The head's input `(B, T, D)` for `tokens` `(B, T)`; `cache` is updated as in a forward pass."""

        def capture(module, states):
            raise _HiddenStates(states)

        with intercepted(self.module, self.method, capture):
            try:
                self.model(tokens) if cache is None else self.model(tokens, cache=cache)
            except _HiddenStates as captured:
                return captured.args[0]
        raise ValueError("the output head was not reached")

    def logits(self, states):
        """Logits `(N, V)` of hidden states `(N, D)`, through whatever the model does after its head.

        The model's body is traced too, on as many zero tokens, but nothing reads it and so it never runs.
        """
        project = getattr(type(self.module), self.method)
        with intercepted(self.module, self.method, lambda module, _: project(module, states[None])):
            # An index would copy the logits, and scatter their gradient.
            return first_output(self.model(mx.zeros((1, states.shape[0]), mx.int32))).squeeze(0)

    def token_logps(self, states, targets, alignment, gradient):
        """As `logps_and_squares` of the logits of `states` `(N, D)`, with bounded memory forward and backward."""
        if gradient and tree_flatten(self.module.trainable_parameters()):
            out = self._recomputed(states, targets, alignment)
        else:
            with unpacked_head(self.module, self.method, states):
                if gradient:
                    out = self._with_gradient(states, targets, alignment)
                else:
                    out = self._chunked(partial(self._logps, alignment=alignment), states, targets)
        return out[0], mx.stop_gradient(out[1]) if alignment else None

    def _chunked(self, function, states, *rows):
        """`function(states, *rows)` on one chunk after another, each array of its outputs joined again."""
        parts = []
        for start, stop in self._chunks(states):
            chunk = states[start:stop]
            if parts:
                # Without an order, or with an output left for later, several chunks' logits could be alive at once.
                chunk = mx.depends([chunk], parts[-1])[0]
            parts.append(function(chunk, *(row[start:stop] for row in rows)))
        return [mx.concatenate(column) for column in zip(*parts, strict=True)]

    def _logps(self, states, targets, alignment):
        logits = self.logits(states)
        if mx.default_device() == mx.gpu:
            out = logps_and_squares(logits, targets, alignment)
        else:
            out = _exponentials_on_cpu(logits.astype(mx.float32), targets[:, None], alignment)[:2]
        return [part for part in out if part is not None]

    def _recomputed(self, states, targets, alignment):
        """As `_logps` for a head with trainable parameters: the backward pass computes each chunk's logits again."""
        names, values = zip(*tree_flatten(self.module.trainable_parameters()), strict=True)
        key = mx.random.state[0]

        def chunk_logps(*inputs, targets, alignment=False):
            with parameters_in(self.module, tree_unflatten(list(zip(names, inputs[1:], strict=True)))):
                return self._logps(inputs[0], targets, alignment)

        @mx.custom_function
        def logps(states, *values):
            def function(chunk, targets):
                return chunk_logps(chunk, *values, targets=targets, alignment=alignment)

            return tuple(self._chunked(function, states, targets))

        @logps.vjp
        def backward(primals, cotangents, outputs):
            sums = [mx.zeros_like(value) for value in primals[1:]]

            def function(chunk, targets, cotangents):
                nonlocal sums
                _, (slope, *slopes) = mx.vjp(partial(chunk_logps, targets=targets), [chunk, *primals[1:]], [cotangents])
                sums = [total + new for total, new in zip(sums, slopes, strict=True)]
                return mx.depends([slope], sums)

            with drawing_from(key):
                slopes = self._chunked(function, primals[0], targets, cotangents[0])
            return (*slopes, *sums)

        return logps(states, *values)

    def _with_gradient(self, states, targets, alignment):
        """As `_logps` for a frozen head, with each position's gradient computed while its logits are there.

        A position's logp depends on its own hidden state alone, so its gradient is known up to the factor
        that the loss will bring: the backward pass multiplies, and no logits are kept or computed again.
        """

        @mx.custom_function
        def logps(states):
            return tuple(self._chunked(partial(self._logps_and_gradient, alignment=alignment), states, targets))

        @logps.vjp
        def backward(primals, cotangents, outputs):
            return (cotangents[0][:, None] * outputs[-1]).astype(primals.dtype)

        return logps(states)

    def _logps_and_gradient(self, states, targets, alignment):
        logits = self.logits(states)
        seeds = _seeds_on_gpu if mx.default_device() == mx.gpu else _seeds_on_cpu
        logps, squares, falling, scale = seeds(logits.astype(mx.float32), targets[:, None], alignment)
        _, (gradient,) = mx.vjp(self.logits, [states], [falling.astype(logits.dtype)])
        return [logps, *([squares] if alignment else []), gradient * scale.astype(gradient.dtype)]

    def _chunks(self, states):
        """Equal slices of `states` whose logits stay within CHUNK_LOGITS."""
        count = states.shape[0]
        size = max(1, CHUNK_LOGITS // self.vocabulary)
        chunks = -(-count // size)
        size = -(-count // chunks)
        return [(start, min(start + size, count)) for start in range(0, count, size)]


def _seeds_on_gpu(logits, column, alignment):
    """Logps of the targets, and their gradients with respect to the logits, for a device that lacks memory first.

    Args:
        logits: `(N, V)` float32.
        column: `(N, 1)` int, the targets.
        alignment: whether log sum_v p(v)^2 is wanted too.

    Returns:
        `(logps, squares, gradient, scale)`: `(N,)`, `(N,)` or None, and a gradient `(N, V)` of which
        `scale` `(N, 1)` times is meant.
    """
    normalizers = mx.logsumexp(logits, axis=-1, keepdims=True)
    # Everything between the logits and the gradient is one kernel of a compiled step, with no array of its own.
    gradient = (mx.arange(logits.shape[-1]) == column) - mx.exp(logits - normalizers)
    logps = (mx.take_along_axis(logits, column, axis=-1) - normalizers).squeeze(-1)
    squares = mx.logsumexp(2 * logits, axis=-1) - 2 * normalizers.squeeze(-1) if alignment else None
    return logps, squares, gradient, mx.ones_like(normalizers)


def _seeds_on_cpu(logits, column, alignment):
    """As `_seeds_on_gpu`, for a device on which exponentials are what an output head costs besides its products."""
    logps, squares, exponentials, totals = _exponentials_on_cpu(logits, column, alignment)
    own = mx.take_along_axis(exponentials, column, axis=-1)
    gradient = mx.put_along_axis(-exponentials, column, totals - own, axis=-1)
    return logps, squares, gradient, 1 / totals


def _exponentials_on_cpu(logits, column, alignment):
    """`(logps, squares)` as `_seeds_on_gpu`, with the exponentials `(N, V)` and their sums `(N, 1)` they come from."""
    top = mx.stop_gradient(logits.max(axis=-1, keepdims=True))
    # MLX's exp takes three times as long as libm's pow where it has no vector instructions: Linux CPUs.
    exponentials = mx.power(mx.array(math.e), logits - top)
    totals = exponentials.sum(axis=-1, keepdims=True)
    logps = (mx.take_along_axis(logits, column, axis=-1) - top - mx.log(totals)).squeeze(-1)
    squares = None
    if alignment:
        squares = mx.log(mx.square(exponentials).sum(axis=-1)) - 2 * mx.log(totals.squeeze(-1))
    return logps, squares, exponentials, totals


def _last_projection(model, tokens):
    """The logits of a forward pass, and the last call in it that makes hidden states into as many values.

    Returns:
        `(logits, (module, method, hidden states))`, or `(logits, None)` where there was no such call.
    """
    calls = []

    def recorder(method, original):
        def record(module, *args, **kwargs):
            out = original(module, *args, **kwargs)
            if len(args) == 1 and not kwargs and None not in (_width(args[0], tokens), _width(out, tokens)):
                calls.append((out.shape[-1], (module, method, args[0])))
            return out

        return record

    with ExitStack() as stack:
        for _, module in model.named_modules():
            for method in ("__call__", "as_linear"):
                if hasattr(type(module), method) and module is not model and _is_projection(module):
                    record = recorder(method, getattr(type(module), method))
                    stack.enter_context(intercepted(module, method, record))
        logits = first_output(model(tokens))
    vocabulary = _width(logits, tokens)
    found = [call for width, call in calls if width == vocabulary != _width(call[2], tokens)]
    return logits, found[-1] if found else None


def _width(value, tokens):
    """The last dimension of an array that has a row for each token, else None."""
    is_row_each = isinstance(value, mx.array) and value.ndim == 3 and value.shape[:2] == tokens.shape
    return value.shape[-1] if is_row_each else None


def _is_projection(module):
    """Whether a module may be an output head: it has weights of its own or wraps a module that has."""
    return "weight" in module or any(
        "weight" in child for child in module.children().values() if isinstance(child, dict)
    )


def _outside(model, modules):
    """The `(name, array)` of the model's trainable parameters that are in none of `modules`."""
    inside = {id(value) for module in modules for _, value in tree_flatten(module.trainable_parameters())}
    return [item for item in tree_flatten(model.trainable_parameters()) if id(item[1]) not in inside]

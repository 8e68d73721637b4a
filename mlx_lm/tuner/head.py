"""A model's output head run apart from its body: on chosen positions, with bounded memory."""

from contextlib import ExitStack, contextmanager

import mlx.core as mx
from mlx.utils import tree_flatten

from ..utils import token_logps

# Logits in one chunk of the output head: 2^25 float32 values are 134 MB, wide enough for any device.
CHUNK_LOGITS = 2**25


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

    It is found by running the model, not by its name: it is the last module that gives as many values a
    position as the model does. What follows it (soft caps, scales) is run by the model's own code.
    """

    def __init__(self, model, module, method):
        self.model = model
        self.module = module
        self.method = method  # "__call__", or "as_linear" of a tied embedding

    @classmethod
    def find(cls, model):
        """The head of `model`, or None where response positions alone do not give the model's own logits."""
        tokens = mx.arange(1, 13).reshape(2, 6)
        logits = model(tokens)
        if not isinstance(logits, mx.array) or logits.ndim != 3:
            return None
        found = _last_projection(model, tokens, logits.shape[-1])
        if found is None:
            return None
        head = cls(model, *found)
        try:
            states = head.hidden_states(tokens, None)
            again = head.logits(states.reshape(12, -1))
        except (_HiddenStates, ValueError, TypeError, AttributeError):
            return None
        expected = logits.reshape(12, -1).astype(mx.float32)
        if again.shape != expected.shape:
            return None
        # Half-precision products of other shapes round otherwise; a missed soft cap or scale differs by far more.
        tolerance = 1e-4 if logits.dtype == mx.float32 else 3e-2
        error = mx.abs(again.astype(mx.float32) - expected).max() / mx.maximum(mx.abs(expected).max(), 1e-6)
        return head if error.item() < tolerance else None

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
            return self.model(mx.zeros((1, states.shape[0]), mx.int32))[0]

    def token_logps(self, states, targets, alignment, gradient):
        """As `logps_and_squares` of the logits of `states` `(N, D)`, with bounded memory forward and backward."""
        if not gradient:
            return self._chunked(states, targets, alignment, self._logps)
        if self.module.trainable_parameters():
            return self._chunked(states, targets, alignment, self._recomputed_logps)
        return self._with_gradient(states, targets, alignment)

    def _logps(self, states, targets, alignment):
        return logps_and_squares(self.logits(states), targets, alignment)

    def _recomputed_logps(self, states, targets, alignment):
        """As `_logps`; the logits are computed again in the backward pass, so that none are kept."""

        def logps(parameters, states):
            self.module.update(parameters)
            logps, squares = self._logps(states, targets, alignment)
            return logps if squares is None else (logps, squares)

        out = mx.checkpoint(logps)(self.module.trainable_parameters(), states)
        return out if alignment else (out, None)

    def _chunked(self, states, targets, alignment, function):
        parts = []
        for start, stop in self._chunks(states):
            chunk = states[start:stop]
            if parts:
                # One chunk after another: without the order, several chunks' logits could be alive at once.
                chunk = mx.depends([chunk], list(parts[-1][:1]))[0]
            parts.append(function(chunk, targets[start:stop], alignment))
        logps, squares = zip(*parts, strict=True)
        return mx.concatenate(logps), mx.concatenate(squares) if alignment else None

    def _with_gradient(self, states, targets, alignment):
        """As `_logps` for a frozen head, with each position's gradient computed while its logits are there.

        A position's logp depends on its own hidden state alone, so its gradient is known up to the factor
        that the loss will bring: the backward pass multiplies, and no logits are kept or computed again.
        """

        @mx.custom_function
        def logps(states):
            parts = []
            for start, stop in self._chunks(states):
                chunk = states[start:stop]
                if parts:
                    chunk = mx.depends([chunk], [parts[-1][1]])[0]
                parts.append(self._logps_and_gradient(chunk, targets[start:stop], alignment))
            return tuple(mx.concatenate(column) for column in zip(*parts, strict=True))

        @logps.vjp
        def backward(primals, cotangents, outputs):
            return (cotangents[0][:, None] * outputs[1]).astype(primals.dtype)

        values, _, *squares = logps(states)
        return values, mx.stop_gradient(squares[0]) if squares else None

    def _logps_and_gradient(self, states, targets, alignment):
        logits = self.logits(states)
        wide = logits.astype(mx.float32)
        # One softmax serves value and gradient: the exponentials are what an output head costs besides its product.
        softmax = mx.softmax(wide, axis=-1)
        normalizers = wide.max(axis=-1) - mx.log(softmax.max(axis=-1))
        column = targets[:, None]
        logps = mx.take_along_axis(wide, column, axis=-1).squeeze(-1) - normalizers
        falling = mx.put_along_axis(-softmax, column, 1 - mx.take_along_axis(softmax, column, axis=-1), axis=-1)
        _, (gradient,) = mx.vjp(self.logits, [states], [falling.astype(logits.dtype)])
        if not alignment:
            return logps, gradient
        return logps, gradient, mx.log(mx.square(softmax).sum(axis=-1))

    def _chunks(self, states):
        """Equal slices of `states` whose logits stay within CHUNK_LOGITS."""
        count = states.shape[0]
        size = max(1, CHUNK_LOGITS // self._vocabulary())
        chunks = -(-count // size)
        size = -(-count // chunks)
        return [(start, min(start + size, count)) for start in range(0, count, size)]

    def _vocabulary(self):
        weight = getattr(self.module, "weight", None)
        if weight is None:
            sizes = [value.shape[0] for _, value in tree_flatten(self.module.parameters()) if value.ndim > 1]
            return max(sizes)
        return weight.shape[0]


def _last_projection(model, tokens, vocabulary):
    """`(module, method)` of the last call in a forward pass that gives `vocabulary` values a position."""
    calls = []

    def recorder(module, method):
        original = getattr(type(module), method)

        def record(self, states, *args, **kwargs):
            out = original(self, states, *args, **kwargs)
            if isinstance(out, mx.array) and out.shape == (*tokens.shape, vocabulary) and not args and not kwargs:
                calls.append((self, method))
            return out

        return record

    with ExitStack() as stack:
        for _, module in model.named_modules():
            for method in ("__call__", "as_linear"):
                if hasattr(type(module), method) and module is not model and _is_projection(module):
                    stack.enter_context(intercepted(module, method, recorder(module, method)))
        model(tokens)
    return calls[-1] if calls else None


def _is_projection(module):
    """Whether a module may be an output head: it has weights of its own or wraps a module that has."""
    return "weight" in module or any(
        "weight" in child for child in module.children().values() if isinstance(child, dict)
    )


@contextmanager
def intercepted(module, method, replacement):
    """Within the context, this one module's `method` is `replacement(module, ...)`.

    The module's class is exchanged, not the module: the tree of parameters stays as it is.
    """
    original = type(module)
    module.__class__ = type(original.__name__, (original,), {method: replacement})
    try:
        yield
    finally:
        module.__class__ = original

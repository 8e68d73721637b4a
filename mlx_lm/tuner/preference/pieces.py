"""Upstream's other recurrences, a piece of the sequence at a time, each computed again in the backward pass.

Mamba, Jamba, RWKV-7 and Bailing's linear attention loop over tokens and keep a state for each; state-space models of
the second generation run 256 tokens at once and keep their products with each other. Here upstream's own code runs on
one piece after another, which hand on their state, and nothing but the states between them is kept.
"""

import sys
from contextlib import ExitStack, contextmanager

import mlx.core as mx
import mlx.nn as nn

from .intercept import exchanged, intercepted, recomputed

# Tokens a piece. For a sequence of a thousand tokens about as many states are kept between pieces as within one.
PIECE = 32


@contextmanager
def recurrences_in_pieces(model, packed=None):
    """Within the context, which must last around the backward pass, such layers of the model run in pieces.

    Args:
        model: an mlx-lm model, with or without such layers.
        packed: the `PackedCache` of a packed batch, or None; functions that can then run on each sequence's tokens.
    """
    modules = [module for module in model.modules() if _is_upstreams(type(module))]
    files = {type(module).__module__.rpartition(".")[2]: type(module).__module__ for module in modules}
    with ExitStack() as stack:
        for file in FUNCTIONS.keys() & files.keys():
            (name, in_pieces), namespace = FUNCTIONS[file], sys.modules[files[file]]
            if _is_upstreams(function := getattr(namespace, name)):
                function = in_pieces(function)
                if packed is not None and in_pieces in SEQUENCES:
                    function = packed.in_rows(function, SEQUENCES[in_pieces])
                stack.enter_context(exchanged(namespace, name, function))
        for module in modules:
            if type(module).__name__ in METHODS:
                name, in_pieces = METHODS[type(module).__name__]
                stack.enter_context(intercepted(module, name, in_pieces(getattr(type(module), name))))
        yield


def _is_upstreams(thing):
    """Whether a class or function is as upstream has it: within another such context it is not."""
    return thing.__module__.startswith("mlx_lm.models.")


def scan(step, sequences, state, shared=(), axis=1, module=None, mask=None):
    """Run `step` over pieces of sequences.

    Args:
        step: takes a piece of each sequence, the shared arrays and the state's, and with a mask the piece of it as
            `mask`; returns `[output, *state]`.
        sequences: arrays whose `axis` is that of tokens.
        state: the first piece's, a list of arrays, or an empty one where upstream makes its own.
        shared: arrays that all pieces read, of which gradients are taken too.
        module: what holds the parameters that `step` uses, if any.
        mask: `(B, T)` or None.

    Returns:
        `(output, state)`: outputs of all pieces along `axis`, and the last one's state.
    """
    bounds = list(range(PIECE, sequences[0].shape[axis], PIECE))
    masks = [None] if mask is None else mx.split(mask, bounds, axis=1)
    outputs = []
    for i, pieces in enumerate(zip(*(split(x, bounds, axis) for x in sequences), strict=True)):
        options = {} if mask is None else {"mask": masks[i]}

        def run(*arrays, options=options):
            return step(*arrays, **options)

        out, *state = recomputed(module or nn.Module(), run)(*pieces, *shared, *state)
        outputs.append(out)
    return mx.concatenate(outputs, axis=axis), state


def split(x, bounds, axis):
    """`mx.split`, whose own gradient is a sum of arrays as large as `x`, one for each part."""

    @mx.custom_function
    def parts(x):
        return tuple(mx.split(x, bounds, axis=axis))

    @parts.vjp
    def joined(_, cotangents, __):
        return mx.concatenate(cotangents, axis=axis)

    return parts(x) if bounds else (x,)


def _state_space(upstream):
    """`ssm_update` of Mamba 2, Falcon H1, Granite, Nemotron H and PLaMo 2."""

    def update(x, A_log, B, C, D, dt, dt_bias, state=None, time_step_limit=(0.001, 100.0), mask=None, lengths=None):
        if lengths is not None or x.shape[1] == 1:
            return upstream(x, A_log, B, C, D, dt, dt_bias, state, time_step_limit, mask, lengths)

        def step(x, B, C, dt, A_log, D, dt_bias, *state, mask=None):
            return list(upstream(x, A_log, B, C, D, dt, dt_bias, *(state or [None]), time_step_limit, mask))

        first = [] if state is None else [state]
        out, (state,) = scan(step, [x, B, C, dt], first, [A_log, D, dt_bias], mask=mask)
        return out, state

    return update


def _linear_attention(upstream):
    """`recurrent_gla` of Bailing's linear attention, whose axis of tokens is the third."""

    def attend(q, k, v, g, scale, h=None):
        def step(q, k, v, g, *state):
            return list(upstream(q, k, v, g, scale, *state))

        out, (state,) = scan(step, [q, k, v], [] if h is None else [h], [g], axis=2)
        return out, state

    return attend


def _mamba(upstream):
    """A Mamba layer from its input to its output: its loop stands between its projections."""

    def process(module, x, conv_state, state):
        def step(x, *state):
            out, state = upstream(module, x, *(state or [None, None]))
            return [out, *state]

        out, state = scan(step, [x], [] if state is None else [conv_state, state], module=module)
        return out, tuple(state)

    return process


def _jamba(upstream):
    """Jamba's loop, which makes an array of all states anew for each token."""

    def process(module, x, A, state=None):
        def step(x, A, *state):
            return list(upstream(module, x, A, *state))

        out, (state,) = scan(step, [x], [] if state is None else [state], [A], module=module)
        return out, state

    return process


def _rwkv(upstream):
    """RWKV-7's loop; on Metal upstream has a kernel in its place."""

    def process(module, r, w, k, v, a, b, state):
        if mx.default_device() == mx.gpu and mx.metal.is_available():
            return upstream(module, r, w, k, v, a, b, state)

        def step(r, w, k, v, a, b, *state):
            return list(upstream(module, r, w, k, v, a, b, *(state or [None])))

        out, (state,) = scan(step, [r, w, k, v, a, b], [] if state is None else [state])
        return out, state

    return process


# What upstream's files call by name, and methods of its classes, and what makes each run in pieces.
STATE_SPACE = ("falcon_h1", "granitemoehybrid", "mamba2", "nemotron_h", "plamo2")
FUNCTIONS = {
    **dict.fromkeys(STATE_SPACE, ("ssm_update", _state_space)),
    "bailing_moe_linear": ("recurrent_gla", _linear_attention),
}
# Of functions that know nothing of the layer around them, which arguments are sequences.
SEQUENCES = {_state_space: (0, 2, 3, 5)}
METHODS = {
    "MambaBlock": ("_process_sequence", _mamba),
    "JambaMambaMixer": ("ssm_step", _jamba),
    "Rwkv7TimeMixing": ("_wkv7", _rwkv),
}

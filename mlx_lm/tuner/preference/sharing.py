"""Prompts computed once for two responses, and layers recomputed in the backward pass that leave caches alone."""

import copy
import re
from contextlib import ExitStack, contextmanager
from dataclasses import is_dataclass

import mlx.core as mx
import mlx.nn as nn

from ...models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    ConcatenateKVCache,
    KVCache,
    RotatingKVCache,
    make_prompt_cache,
)
from .batches import CACHED, PACKED, PLAIN, make_batch
from .lean import lean_layers
from .modules import (
    evaluating,
    exchanged,
    first_output,
    intercepted,
    is_float32,
    layers_of,
    recomputed,
    relative_error,
)
from .options import ConfigError
from .packing import on_this_row, packing
from .pairs import Pair

# Tokens that `can_share_prompt` tries, and how many of them are prompt.
PROBE, PROBE_PREFIX = 12, 7
# The attention windows that it tries them with: shorter than the prompt.
PROBE_WINDOW = 4


# Pairs of these that `can_pack` tries: 41 tokens in one row, a number that no part of a model has for a size.
PROBE_PAIRS = [
    Pair([*range(1, 10)], [3, 1, 4, 1, 5, 9], [2, 7, 1, 8]),
    Pair([*range(2, 13)], [1, 6, 1, 8, 0, 3, 3, 9], [5, 7, 7, 2, 1, 5, 6]),
]


class _WholeKVCache(ConcatenateKVCache):
    """In a `ChunkedKVCache`'s place: keeps the chunks before the current one, which the model's mask leaves out."""

    start_position = 0

    def maybe_trim_front(self):
        pass


def prefix_cache(model):
    """A prompt cache of `model` through which gradients flow, one entry a layer.

    Upstream's caches write into preallocated or rotating buffers; these concatenate. A sliding window or a
    chunk needs no cache of its own: the layer's mask keeps it, by the same code that keeps it without a cache.

    Raises:
        TypeError: the model has a cache of another kind.
    """
    return [_concatenating(cache) for cache in make_prompt_cache(model)]


def _concatenating(cache):
    if type(cache) is CacheList:
        return CacheList(*(_concatenating(inner) for inner in cache.caches))
    if type(cache) in (KVCache, RotatingKVCache, ConcatenateKVCache):
        return ConcatenateKVCache()
    if type(cache) is ChunkedKVCache:
        return _WholeKVCache()
    if type(cache) is ArraysCache:
        return cache
    raise TypeError(f"{type(cache).__name__} cannot hold a shared prompt")


def can_share_prompt(model):
    """Whether a prompt that went through the cache gives the same logits as one that did not.

    Tried on a few tokens, so that no list of architectures has to be kept; and with windows of a few tokens,
    so that a model which goes wrong beyond its window is found without running that many.
    """
    tokens = mx.arange(1, 2 * PROBE + 1).reshape(2, PROBE) % 13 + 1
    rows = mx.array([1, 0, 1])
    with evaluating(model), lean_layers(model), narrow_windows(model):
        plain = first_output(model(tokens))[rows, PROBE_PREFIX:]
        try:
            cache = prefix_cache(model)
            model(tokens[:, :PROBE_PREFIX], cache=cache)
            cache = [map_arrays(layer, lambda x: x[rows]) for layer in cache]
            shared = first_output(model(tokens[rows, PROBE_PREFIX:], cache=cache))
            error = relative_error(shared, plain) if shared.shape == plain.shape else 1.0
        except Exception:  # with a cache that it was not written for, a model's own code may fail in any way
            return False
    # Half precision rounds other shapes otherwise; a wrong position or mask is off by far more.
    return error < (1e-4 if is_float32(model) else 5e-2)


def can_pack(model):
    """Whether the model gives a packed row the logits of rows of their own: tried on a few tokens, as above."""
    length = sum(len(p.prompt) + len(p.chosen) + len(p.rejected) - 2 for p in PROBE_PAIRS)
    arange, counts_positions = mx.arange, False

    def watched(*args, **kwargs):
        nonlocal counts_positions
        bounds = [0, *args][-2:] if len(args) < 3 else args[:2]
        counts_positions |= all(isinstance(bound, int) for bound in bounds) and bounds[1] - bounds[0] == length
        return arange(*args, **kwargs)

    def logits(arrangement):
        batch, *_ = make_batch(PROBE_PAIRS, arrangement, multiple=1)
        with packing(model, batch.layout):
            rows = [first_output(model(group.tokens)) for group in batch.groups]
        rows = mx.concatenate([row.reshape(-1, row.shape[-1]) for row in rows])
        rows = rows if batch.layout else rows[batch.positions]
        return rows[: int(batch.lengths.sum().item())]  # without those that round them up

    with evaluating(model), lean_layers(model), narrow_windows(model):
        plain = logits(PLAIN)
        try:
            with exchanged(mx, "arange", watched):
                packed = logits(PACKED)
            error = relative_error(packed, plain)
        except Exception:  # in a row that it was not written for, a model's own code may fail in any way
            return False
    # A model that numbers a row's positions itself may go wrong only farther on than these few tokens.
    return error < (1e-4 if is_float32(model) else 5e-2) and not counts_positions


def arrangement_of(model, share_prompt):
    """How batches of `model` are best arranged: PACKED, CACHED or PLAIN."""
    if share_prompt and can_pack(model):
        return PACKED
    return CACHED if share_prompt and can_share_prompt(model) else PLAIN


@contextmanager
def narrow_windows(model):
    """Within the context, the model's attention windows and chunks that PROBE tokens would not fill are short ones."""
    windows = [
        (place, name, value)
        for module in model.modules()
        for place in _settings(module)
        for name, value in place.items()
        if type(value) is int and value > PROBE and re.search("window|chunk", name)
    ]
    for place, name, _ in windows:
        place[name] = PROBE_WINDOW
    try:
        yield
    finally:
        for place, name, value in windows:
            place[name] = value


def _settings(value):
    """The attributes of a module, and of the configurations that it holds, as dicts."""
    attributes = vars(value)
    return [attributes, *(place for item in attributes.values() if is_dataclass(item) for place in _settings(item))]


def map_arrays(value, function, made=None):
    """A copy of a cache, list, tuple or dict with `function` applied to every array in it.

    Args:
        value: what to copy; whatever else is in it, modules too, the copy has as well.
        function: what to do with an array.
        made: copies by the id of what they stand for, so that an object met twice has one copy.
    """
    made = {} if made is None else made
    if isinstance(value, mx.array):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_arrays(item, function, made) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(map_arrays(item, function, made) for item in value)
    if type(value) is dict:
        return {key: map_arrays(item, function, made) for key, item in value.items()}
    if _has_state(value):
        if id(value) not in made:
            made[id(value)] = out = copy.copy(value)
            vars(out).update({key: map_arrays(item, function, made) for key, item in vars(value).items()})
        return made[id(value)]
    return value


def _has_state(value):
    """Whether a layer may keep arrays in `value` from one call to the next, as in a cache."""
    return hasattr(value, "__dict__") and not isinstance(value, nn.Module) and not callable(value)


@contextmanager
def checkpointed_layers(model):
    """Within the context, each layer's activations are computed again in the backward pass.

    A layer's cache goes in and comes out as values: a recomputation that appended to the cache itself would
    append the same keys twice.

    Raises:
        ConfigError: the model does not name its layers.
    """
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
        objects = _objects((args, kwargs))
        # As they are before the layer runs: the recomputation has to start from there.
        before = map_arrays((args, kwargs), lambda x: x)
        runs = []

        @on_this_row
        def run(*differentiable):
            values = iter(differentiable)
            inputs = map_arrays(before, lambda x: next(values) if _is_differentiable(x) else x)
            out = call(layer, *inputs[0], **inputs[1])
            runs.append((_objects(inputs), out))
            # MLX loses the gradient of an array that is returned twice, as an output and in a cache: views differ.
            return [mx.expand_dims(x, 0) for x in _arrays(runs[-1])]

        views = iter(recomputed(layer, run)(*(x for x in _arrays(before) if _is_differentiable(x))))
        after, out = map_arrays(runs[0], lambda _: next(views).squeeze(0))
        originals = {id(new): old for new, old in zip(after, objects, strict=True)}
        for new, old in zip(after, objects, strict=True):
            vars(old).update(map_arrays(vars(new), lambda x: x, originals))
        return map_arrays(out, lambda x: x, originals)

    return checkpointed


def _objects(value):
    """The caches and other objects with state in `value`, those within them too."""
    if isinstance(value, (list, tuple)):
        return [found for item in value for found in _objects(item)]
    if type(value) is dict:
        return _objects(list(value.values()))
    return [value, *_objects(vars(value))] if _has_state(value) else []


def _arrays(value):
    found = []
    map_arrays(value, lambda x: found.append(x) or x)
    return found


def _is_differentiable(x):
    """Whether gradients flow into `x`; MLX refuses to look for one where an integer array is an index."""
    return mx.issubdtype(x.dtype, mx.floating)

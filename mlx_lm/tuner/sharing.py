"""Prompts computed once for two responses, and layers recomputed in the backward pass that leave caches alone."""

import copy
from contextlib import ExitStack, contextmanager

import mlx.core as mx
from mlx.utils import tree_flatten

from ..models.cache import ArraysCache, CacheList, ConcatenateKVCache, KVCache, RotatingKVCache, make_prompt_cache
from .head import intercepted


def prefix_cache(model):
    """A prompt cache of `model` through which gradients flow, one entry a layer.

    Upstream's caches write into preallocated or rotating buffers; these concatenate. A sliding window needs
    no cache of its own: the layer's mask keeps it.

    Raises:
        TypeError: the model has a cache of another kind.
    """
    return [_concatenating(cache) for cache in make_prompt_cache(model)]


def _concatenating(cache):
    if type(cache) is CacheList:
        return CacheList(*(_concatenating(inner) for inner in cache.caches))
    if type(cache) in (KVCache, RotatingKVCache, ConcatenateKVCache):
        return ConcatenateKVCache()
    if type(cache) is ArraysCache:
        return cache
    raise TypeError(f"{type(cache).__name__} cannot hold a shared prompt")


def map_arrays(value, function):
    """A copy of a cache, list, tuple or dict with `function` applied to every array in it."""
    if isinstance(value, mx.array):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)(map_arrays(item, function) for item in value)
    if isinstance(value, dict):
        return {key: map_arrays(item, function) for key, item in value.items()}
    if is_cache(value):
        out = copy.copy(value)
        for key, item in vars(value).items():
            setattr(out, key, map_arrays(item, function))
        return out
    return value


def is_cache(value):
    """Whether `value` is one of upstream's caches."""
    return isinstance(value, _CACHE_BASE)


_CACHE_BASE = KVCache.__mro__[-2]


def can_share_prompt(model):
    """Whether a prompt that went through the cache gives the same logits as one that did not.

    Tried on a few tokens, so that no list of architectures has to be kept.
    """
    tokens = mx.arange(1, 25).reshape(2, 12) % 13 + 1
    try:
        plain = model(tokens)
        cache = prefix_cache(model)
        model(tokens[:, :7], cache=cache)
        rows = mx.array([1, 0, 1])
        shared = model(tokens[rows, 7:], cache=[map_arrays(layer, lambda x: x[rows]) for layer in cache])
        plain = plain[rows, 7:]
    except (TypeError, ValueError, AttributeError, NotImplementedError, IndexError, KeyError):
        return False
    plain, shared = plain.astype(mx.float32), shared.astype(mx.float32)
    error = mx.abs(plain - shared).max() / mx.maximum(mx.abs(plain).max(), 1e-6)
    # Half precision rounds other shapes otherwise; a wrong position or mask is off by far more.
    return error.item() < (1e-4 if model_dtype(model) == mx.float32 else 5e-2)


def model_dtype(model):
    """The floating dtype that most of the model's parameters have."""
    sizes = {}
    for _, value in tree_flatten(model.parameters()):
        if mx.issubdtype(value.dtype, mx.floating):
            sizes[value.dtype] = sizes.get(value.dtype, 0) + value.size
    return max(sizes, key=sizes.get, default=mx.float32)


@contextmanager
def checkpointed_layers(model):
    """Within the context, each layer's activations are computed again in the backward pass.

    A layer's cache goes in and comes out as values: a recomputation that appended to the cache itself would
    append the same keys twice.
    """
    with ExitStack() as stack:
        for layer in model.layers:
            if layer is not None:
                stack.enter_context(intercepted(layer, "__call__", _recomputed(type(layer).__call__)))
        yield


def _recomputed(call):
    def checkpointed(layer, *args, **kwargs):
        keys = list(kwargs)
        values = [*args, *kwargs.values()]
        caches = {i: value for i, value in enumerate(values) if is_cache(value)}
        # As they were before the layer ran: the recomputation has to start from there.
        before = [map_arrays(cache, lambda x: x) for cache in caches.values()]
        states = [_arrays(cache) for cache in before]
        others = [None if i in caches else value for i, value in enumerate(values)]

        def inner(parameters, states, others):
            layer.update(parameters)
            inputs = list(others)
            copies = [_with_arrays(cache, state) for cache, state in zip(before, states, strict=True)]
            for i, cache in zip(caches, copies, strict=True):
                inputs[i] = cache
            named = dict(zip(keys, inputs[len(args) :], strict=True))
            out = call(layer, *inputs[: len(args)], **named)
            updated.append(copies)
            return out, [_arrays(cache) for cache in copies]

        updated = []
        out, after = mx.checkpoint(inner)(layer.trainable_parameters(), states, others)
        for cache, run, state in zip(caches.values(), updated[0], after, strict=True):
            vars(cache).update(vars(_with_arrays(run, state)))
        return out

    return checkpointed


def _arrays(cache) -> list:
    arrays = []
    map_arrays(cache, lambda x: arrays.append(x) or x)
    return arrays


def _with_arrays(cache, arrays):
    """A copy of `cache` with its arrays replaced, in `_arrays`' order."""
    arrays = iter(arrays)
    return map_arrays(cache, lambda _: next(arrays))

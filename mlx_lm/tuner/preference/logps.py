"""Logps of a batch of pairs: the model's body runs once, its head on response positions only.

The plain path is `utils.get_batched_logps`. Here the body runs over a packed batch where the model allows it, and the
head on a bounded chunk of response positions at a time; both are tried on a few tokens when a `Scorer` is made.
"""

import re
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import is_dataclass
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ...models.activations import fast_exp, fast_max
from ...models.cache import CacheList, ChunkedKVCache, ConcatenateKVCache, KVCache, RotatingKVCache, make_prompt_cache
from ...utils import token_logps
from .attention import Layout, PackedCache, PackedState, Parts, RowCache, on_cuda, on_metal
from .batches import PACKED, PLAIN, RECURRENT, lengths_of, make_batch, shape_of
from .cuda_cache import all_kept
from .intercept import drawing_from, evaluating, exchanged, intercepted, parameters_in
from .layers import convolved_channels, is_float32, layers_of, lean_layers
from .pairs import Pair
from .siblings import find_siblings
from .unpacked import unpacked_once

# Logits in one chunk of the output head. A chunk reads all of the head's weight. On CUDA half as many took a step of
# eight pairs of a 1.24 B model 77 ms, not 74, for 1.3 of 15 GB. Macs have little memory, and a CPU is as fast with half
# of what they have.
CHUNK_LOGITS = 2**25 if on_cuda() else 2**23 if mx.default_device() == mx.gpu else 2**22
# A share of these where figures of tokens are asked for, which have several arrays of a chunk's size at once: with all,
# a validation of SmolLM2 took CUDA 4.0 GB where a step takes 3.1.
FIGURES_SHARE = 0.5
# Rows that a chunk has at least: 440 rows of 152k words and their gradient took a CPU 1.4 s and 0.27 GB with 55 in a
# chunk, 2.6 s and 0.13 GB with 27.
LEAST_ROWS = 64
# MLX's products on Metal compute tiles of so many rows, whole ones for what is left over.
TILE = 64 if on_metal() else 1
BODIES = ("model", "transformer", "backbone")
KEY_VALUE_CACHES = (KVCache, RotatingKVCache, ConcatenateKVCache, ChunkedKVCache)
# Tokens of the longest sequence of PROBE, and the attention windows that it is tried with.
PROBE_WINDOW = 4
PROBE = [
    Pair([*range(1, 10)], [3, 1, 4, 1, 5, 9], [2, 7, 1, 8]),
    Pair([*range(2, 13)], [1, 6, 1, 8, 0, 3, 3, 9], [5, 7, 7, 2, 1, 5, 6]),
]


class RowLogps(NamedTuple):
    """What a batch's 2B responses (the B chosen ones first) are worth, each `(2B,)` float32.

    Attributes:
        total: logps summed over the response's tokens, in nats.
        common: the same over the first min(chosen, rejected) tokens, which LD-DPO weighs apart.
        alignment: log p(token) - log sum_v p(v)^2 summed likewise, for WPO's weights; zeros unless asked for.
        by_token: sums over the response's tokens of the mean logit, of the entropy in nats, and of how often the token
            is the likeliest; () unless asked for.
    """

    total: mx.array
    common: mx.array
    alignment: mx.array
    by_token: tuple = ()


class Scorer:
    """Scores batches with one model.

    Args:
        model: an mlx-lm model.
        share_prompt: run a prompt once for both its responses, where the model allows it.
        response_only: run the output head on response positions only, where the body can be found.
        together: compute LoRA layers that read one input as one, where they allow it; by default on CUDA.

    Attributes:
        arrangement: how batches for it are arranged, PACKED, RECURRENT or PLAIN.
        siblings: the `Siblings` that are computed together.
        head: the `Head`, or None where the full projection has to run.
    """

    def __init__(self, model, share_prompt=True, response_only=True, together=None):
        self.model, self._is_lean = model, False
        together = on_cuda() if together is None else together
        self.siblings = find_siblings(model) if together else []
        # To look for them for each batch took a fifth of the time to lay out 30 layers.
        self._modules = [*model.modules(), *(own.linear for own in self.siblings)]
        self._channels, head, caches = convolved_channels(model), Head.find(model) if response_only else None, None
        with suppress(Exception):  # a model's own code, which may not be made for generation
            caches = make_prompt_cache(model)
        # Of a model that gives other logits with them, rows go through no cache, or positions through no head.
        for self.head, self._caches in ((head, caches), (head, None), (None, caches), (None, None)):
            if self._same_logits(PLAIN):
                break
        # Of layers without keys and values, those that convolve are known.
        known = self._channels or all(_in_place(entry, True, False) is True for entry in self._caches or ())
        packs = share_prompt and known and self._caches is not None
        packed = RECURRENT if self._channels else PACKED
        self.arrangement = packed if packs and self._same_logits(packed) else PLAIN

    def __call__(self, batch, alignment=False, gradient=False, by_token=False):
        """The logps of a batch.

        Args:
            batch: a `Batch` of B pairs.
            alignment: whether to compute WPO's weights too.
            gradient: whether a gradient with respect to the model's parameters will be taken.
            by_token: whether to compute the figures of that name too; not with `gradient`.

        Returns:
            `RowLogps`.
        """
        with self.lean_layers(batch):
            states = self.response_states(batch)
            if self.head is None:
                logps, squares, *figures = logps_and_more(states, batch.targets, alignment, by_token)
            else:
                logps, squares, *figures = self.head.token_logps(states, batch.targets, alignment, gradient, by_token)
        own = batch.sequences == mx.arange(len(batch.lengths))[:, None]  # (2B, M)
        total = mx.where(own, logps, 0).sum(-1)
        common = mx.where(own & batch.common, logps, 0).sum(-1)
        aligned = mx.where(own, mx.stop_gradient(logps) - squares, 0).sum(-1) if alignment else mx.zeros_like(total)
        return RowLogps(total, common, aligned, tuple(mx.where(own, values, 0).sum(-1) for values in figures))

    def response_states(self, batch):
        """Hidden states `(M, D)`, or logits `(M, V)` where there is no head, that the batch's targets are read from."""
        own, others, cache = RowCache(), None, None
        if batch.layout:
            own, others = PackedCache(Layout(*batch.layout)), PackedState(len(batch.tokens), self._channels)
        if self._caches is not None:
            cache = [_in_place(entry, own, others) for entry in self._caches]
        with self.lean_layers(batch):
            return self.states(batch.tokens, cache).flatten(0, 1)[batch.positions]

    @contextmanager
    def lean_layers(self, batch=None):
        """As `layers.lean_layers`, for a batch: around the backward pass too, where layers are computed again."""
        if self._is_lean:
            yield
            return
        recurrent = Layout(*batch.layout).recurrent if batch and batch.layout else ()
        packed = Parts(*recurrent) if recurrent else None
        with exchanged(self, "_is_lean", True), lean_layers(self._modules, packed):
            yield

    def states(self, tokens, cache=None):
        """Hidden states `(B, T, D)` of tokens `(B, T)`, or logits `(B, T, V)` where there is no head."""
        return self.head.hidden_states(tokens, cache) if self.head else _run(self.model, tokens, cache)

    def logits(self, states):
        """Logits `(M, V)` of such states, `(M, D)` or logits already."""
        return self.head.logits(states) if self.head else states

    def _same_logits(self, arrangement):
        """Whether head and caches give batches so arranged the model's own logits of plain rows: tried on a few tokens.

        With windows of a few tokens, so that a model which goes wrong beyond its window is found.
        """
        # Padded as a run's batches: some kernels refuse many rows of one token.
        shapes = ((kind, shape_of(lengths_of(PROBE), kind, down_to=1)) for kind in (PLAIN, arrangement))
        rows, tried = (make_batch(PROBE, kind, shape)[0] for kind, shape in shapes)
        with evaluating(self.model), narrow_windows(self.model):
            with lean_layers(self._modules):
                expected = _run(self.model, rows.tokens, None).flatten(0, 1)[rows.positions]
            try:
                with self.lean_layers(tried):
                    found = self.logits(self.response_states(tried))
                    all_kept()
                    mx.eval(found)
            except Exception:  # in parts, or in a batch that it was not written for, its own code may fail in any way
                return False
            # Recurrences carry on what half precision rounds: 24 random layers of Qwen3.5's on CUDA are off by 0.035.
            slack = 2 if self._channels and not is_float32(self.model) else 1
            same = found.shape == expected.shape and relative_error(found, expected) < slack * tolerance(self.model)
            if same and self.head:
                self.head.vocabulary = found.shape[-1]
            return same


def _run(model, tokens, cache):
    """The logits `(B, T, V)` of a model that returns them, or a tuple whose first entry they are."""
    out = model(tokens) if cache is None else model(tokens, cache=cache)
    return out[0] if isinstance(out, (tuple, list)) else out


def _in_place(cache, own, others):
    """What stands for an entry of a model's cache: `own` where that holds keys and values alone, else `others`.

    A tuple, of each part, where one such part stands beside others, as where a layer attends and has a state too.
    """
    if isinstance(cache, CacheList):
        parts = tuple(_in_place(part, own, others) for part in cache.caches)
        return parts if parts.count(own) == 1 else others
    return own if type(cache) in KEY_VALUE_CACHES else others


@contextmanager
def narrow_windows(model):
    """Within the context, the model's attention windows and chunks that PROBE would not fill are short ones."""
    longest = max(len(pair.prompt) + len(pair.chosen) for pair in PROBE)
    with ExitStack() as stack:
        for place in (place for module in model.modules() for place in _settings(module)):
            sizes = ((name, size) for name, size in place.items() if re.search("window|chunk", name))
            wide = {name: size for name, size in sizes if type(size) is int and size > longest}
            # As a dict, which takes a value where a frozen configuration takes none.
            stack.callback(place.update, wide)
            place.update(dict.fromkeys(wide, PROBE_WINDOW))
        yield


def _settings(value):
    """The attributes of a module, and of the configurations that it holds, as dicts."""
    attributes = vars(value)
    return [attributes, *(place for item in attributes.values() if is_dataclass(item) for place in _settings(item))]


def logps_and_more(logits, targets, alignment, by_token=False):
    """Log-probabilities of targets, and what else is asked for, each `(N,)` float32.

    Args:
        logits: `(N, V)`.
        targets: `(N,)` int.
        alignment: whether log sum_v p(v)^2 is wanted too, else zeros.
        by_token: whether mean logit, entropy and whether the target is the likeliest are wanted too.

    Returns:
        A list.
    """
    figures, logps = [], None if by_token else token_logps(logits, targets)
    logits = mx.stop_gradient(logits.astype(mx.float32))
    if by_token:
        # Compiled, a GPU reads the logits half as often; a CPU would have each shape's kernel compiled by g++.
        figures_of = _compiled_figures if mx.default_device() == mx.gpu else _token_figures
        logps, *figures = figures_of(logits, targets)
    return [logps, _squares(logits) if alignment else mx.zeros_like(logps), *figures]


def _squares(logits):
    """log sum_v p(v)^2 of logits `(N, V)`, `(N,)`."""
    return mx.logsumexp(2 * logits, axis=-1) - 2 * mx.logsumexp(logits, axis=-1)


def _token_figures(logits, targets):
    """Logps of targets `(N,)`, mean logits, entropies, and whether a target is the likeliest; `(N, V)` float32."""
    # One exponential a logit. A model may rule tokens out by minus infinity.
    shifted = mx.maximum(logits - fast_max(logits), -1e30)
    exponentials = fast_exp(shifted)
    totals = exponentials.sum(axis=-1)
    own = mx.take_along_axis(shifted, targets[:, None], axis=-1).squeeze(-1)
    entropies = mx.log(totals) - (exponentials * shifted).sum(axis=-1) / totals
    return [own - mx.log(totals), logits.mean(axis=-1), entropies, (own == 0).astype(mx.float32)]


_compiled_figures = mx.compile(_token_figures)


def rows_of_chunk(vocabulary, share=1):
    """Rows of logits in a chunk: some CHUNK_LOGITS, or `share` times as many; LEAST_ROWS at least, in whole TILEs."""
    return max(LEAST_ROWS, int(CHUNK_LOGITS * share) // vocabulary) // TILE * TILE


class Head:
    """What a model does after its body: the model's own code, given the body's output.

    Args:
        model: an mlx-lm model.
        body: the module of it that makes hidden states of tokens.

    Attributes:
        vocabulary: V, once it was tried.
        trainable: names of the trainable parameters outside of layers: logits may depend on them besides hidden states.
    """

    def __init__(self, model, body):
        self.model, self.body, self.vocabulary = model, body, None
        inside = {id(x) for layer in layers_of(model) for _, x in tree_flatten(layer.trainable_parameters())}
        others = [item for item in tree_flatten(model.trainable_parameters()) if id(item[1]) not in inside]
        self.trainable = [name for name, x in others if mx.issubdtype(x.dtype, mx.floating)]

    @classmethod
    def find(cls, model):
        """The head of `model`, which is to be tried then, or None where its body is not found."""
        body = model
        while "language_model" in body:
            body = body.language_model
        body = next((body[name] for name in BODIES if isinstance(body.get(name), nn.Module)), None)
        return None if body is None else cls(model, body)

    def hidden_states(self, tokens, cache):
        """The body's output `(B, T, D)` for `tokens` `(B, T)`; what the model makes of it is never computed."""
        call, found = type(self.body).__call__, []

        def capture(body, *args, **kwargs):
            found.append(call(body, *args, **kwargs))
            return found[-1]

        with intercepted(self.body, "__call__", capture):
            _run(self.model, tokens, cache)
        return found[-1]

    def logits(self, states):
        """Logits `(N, V)` of hidden states `(N, D)`, through all that the model does after its body."""
        with intercepted(self.body, "__call__", lambda *_, **__: states[None]):
            return _run(self.model, mx.zeros((1, len(states)), mx.int32), None).squeeze(0)

    def token_logps(self, states, targets, alignment, gradient, by_token=False):
        """As `logps_and_more` of the logits of `states` `(N, D)`, with bounded memory forward and backward."""
        if gradient:
            found = (self._recomputed if self.trainable else self._with_gradient)(states, targets, alignment)
            # Behind these two is what the backward pass keeps.
            return found[0], mx.stop_gradient(found[1])
        function = partial(self._logps, alignment=alignment, by_token=by_token)
        return self._chunked(function, states, targets, share=FIGURES_SHARE if by_token else 1)

    def _chunked(self, function, states, *rows, share=1):
        """`function(states, *rows)` on one chunk after another, each array of its outputs joined again."""
        parts = []
        with unpacked_once():
            for start, stop in self._chunks(states, share):
                chunk = states[start:stop]
                if parts:
                    # Without an order, or with an output left for later, several chunks' logits could be alive at once.
                    chunk = mx.depends([chunk], parts[-1])[0]
                parts.append(function(chunk, *(row[start:stop] for row in rows)))
        return [mx.concatenate(column) for column in zip(*parts, strict=True)]

    def _logps(self, states, targets, alignment, by_token=False):
        return logps_and_more(self.logits(states), targets, alignment, by_token)

    def _recomputed(self, states, targets, alignment):
        """As `_logps` for a head with trainable parameters: the backward pass computes each chunk's logits again."""
        parameters, key = dict(tree_flatten(self.model.trainable_parameters())), mx.random.state[0]

        def chunk_logps(chunk, *values, targets, alignment=False):
            with parameters_in(self.model, tree_unflatten(list(zip(self.trainable, values, strict=True)))):
                return self._logps(chunk, targets, alignment)

        @mx.custom_function
        def logps(states, *values):
            def function(chunk, targets):
                return chunk_logps(chunk, *values, targets=targets, alignment=alignment)

            return tuple(self._chunked(function, states, targets))

        @logps.vjp
        def backward(primals, cotangents, outputs):
            states, *values = primals
            sums = [mx.zeros(value.shape) for value in values]

            def function(chunk, targets, *cotangents):
                nonlocal sums
                _, (slope, *slopes) = mx.vjp(partial(chunk_logps, targets=targets), [chunk, *values], cotangents)
                sums = [total + new for total, new in zip(sums, slopes, strict=True)]
                return mx.depends([slope], sums)

            with drawing_from(key):
                slopes = self._chunked(function, states, targets, *cotangents)
            return (*slopes, *(total.astype(value.dtype) for total, value in zip(sums, values, strict=True)))

        return logps(states, *(parameters[name] for name in self.trainable))

    def _with_gradient(self, states, targets, alignment):
        """As `_logps` for a frozen head, with each position's gradient computed while its logits are there.

        A position's logp depends on its own hidden state alone, so its gradient is known up to the factor
        that the loss will bring: the backward pass multiplies, and no logits are kept or computed again.
        """

        def logps_and_gradient(states, targets):
            logits = self.logits(states)
            seeds = _seeds if mx.default_device() == mx.gpu else _seeds_on_cpu
            logps, slope = seeds(logits, targets)
            _, (gradient,) = mx.vjp(self.logits, [states], [slope])
            squares = _squares(logits.astype(mx.float32)) if alignment else mx.zeros_like(logps)
            return [logps, squares, gradient]

        @mx.custom_function
        def logps(states):
            return tuple(self._chunked(logps_and_gradient, states, targets))

        @logps.vjp
        def backward(primals, cotangents, outputs):
            return (-cotangents[0][:, None] * outputs[-1]).astype(primals.dtype)

        return logps(states)

    def _chunks(self, states, share=1):
        """Slices of `states` of equal size, whole TILEs, of no more than `rows_of_chunk`."""
        count = states.shape[0]
        chunks = -(-count // rows_of_chunk(self.vocabulary, share))
        size = -(-count // (chunks * TILE)) * TILE
        return [(start, min(start + size, count)) for start in range(0, count, size)]


def _seeds(logits, targets):
    """Logps of the targets `(N,)`, and the gradients of these, negative, with respect to the logits, in their dtype.

    Args:
        logits: `(N, V)`.
        targets: `(N,)` int.
    """
    # A GPU's kernels read and write logits in half precision as they are, and compute in float32.
    loss = partial(mx.fast.cross_entropy, targets=targets)
    (losses,), (gradient,) = mx.vjp(loss, [logits], [mx.ones(targets.shape)])
    return -losses, gradient


def _seeds_on_cpu(logits, targets):
    """As `_seeds`, with one exponential a logit in place of two."""
    column, wide = targets[:, None], logits.astype(mx.float32)
    top = fast_max(wide)
    exponentials = fast_exp(wide - top)
    totals = exponentials.sum(axis=-1, keepdims=True)
    own = mx.take_along_axis(exponentials, column, axis=-1)
    gradient = mx.put_along_axis(exponentials, column, own - totals, axis=-1) / totals
    return (mx.take_along_axis(wide, column, axis=-1) - top - mx.log(totals)).squeeze(-1), gradient.astype(logits.dtype)


def tolerance(model):
    """How far, relatively, logits may be apart that are computed in two ways.

    Half precision rounds other shapes otherwise, and so do products of float32 arrays on CUDA and on Apple's M5, with
    ten bits of their mantissas; a wrong position, mask or cap is off by a tenth or more.
    """
    return 1e-4 if is_float32(model) and mx.default_device() != mx.gpu else 3e-2


def relative_error(found, expected):
    """How far two `(..., V)` arrays of logits are apart, relative to the largest finite value.

    The largest difference at each position, and the mean of these: in half precision a router may take another
    expert for one token, while a wrong mask or state shows at many. Equal infinities do not differ.
    """
    found, expected = found.astype(mx.float32), expected.astype(mx.float32)
    gap = mx.where(found == expected, 0.0, mx.abs(found - expected)).max(axis=-1).mean()
    size = mx.abs(mx.where(mx.isfinite(expected), expected, 0.0)).max()
    return (gap / mx.maximum(size, 1e-6)).item()

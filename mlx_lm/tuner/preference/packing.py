"""A batch in one pass: all its tokens side by side in one row, each prompt once for both its responses.

Most of a model treats every token alike and needs to know nothing of sequences: embeddings, norms, projections,
experts. Attention and rotary positions do, and are given each sequence's own here. No token is padding but those
that round off the row, there is one pass where a cache needs one for the prompts and others for the rest, and the
last layer runs for nothing but the tokens whose hidden states are asked for.
"""

from contextlib import contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ...models import base
from ...models.base import create_causal_mask
from .modules import exchanged, intercepted, layers_of


class Part(NamedTuple):
    """Sequences of like length, for attention: the last query of each attends up to the last key.

    Attributes:
        queries, keys: `(K, Q)` and `(K, T)` int32, which token stands there; any one where it is padding.
    """

    queries: mx.array
    keys: mx.array


class Pass(NamedTuple):
    """What attention does with a row's tokens: M that ask and N that are asked for; -1 stands for nowhere.

    Attributes:
        places: `(M,)` int32, each asking token's position in its own sequence.
        parts: a tuple of `Part`s; queries and keys are numbered from the first part's to the last's.
        outputs: `(M,)` int32, the query whose output is the token's.
        answered: `(number of queries,)` int32, the token whose output a query's is.
        uses: `(R, N)` int32, the keys that are the token: a prompt's tokens are keys of several sequences.
    """

    places: mx.array
    parts: tuple
    outputs: mx.array
    answered: mx.array
    uses: mx.array


class Layout(NamedTuple):
    """Where the N tokens of a packed row belong.

    Attributes:
        body: the `Pass` of all layers but the last, in which all tokens ask.
        last: that of the last layer, in which the scored tokens do.
        scored: `(M,)` int32, the tokens whose hidden states come out, in their order.
    """

    body: Pass
    last: Pass
    scored: mx.array


class Window(NamedTuple):
    """In a mask's place: causal, and no farther back than so many tokens."""

    size: int


class CannotPackError(Exception):
    """The model mixes positions in a way that a packed row does not know."""


class _Reached(Exception):
    """Carries a layer's keys and values out of it before its attention runs."""


def make_pass(length, places, sequences, asking, groups, shared):
    """The `Pass` of a packed row.

    Args:
        length: N, its tokens.
        places: M ints, the position of each asking token in its sequence.
        sequences: of each of 2P sequences its tokens' numbers in the row, as an int array: pair i's are sequence i
            and P + i, and begin with one prompt's tokens.
        asking: the same for the numbers of the asking tokens; -1 where a token does not ask.
        groups: `[(rows, T)]`, sequences of like length and how long their keys are in attention, padding included.
        shared: so many tokens of each prompt ask in a part of their own, which saves asking for both sequences; the
            part is left out where none of them asks.
    """
    halves = [values[: len(values) // 2] for values in (sequences, asking)]
    heads = [(tokens[:shared], numbers[:shared]) for tokens, numbers in zip(*halves, strict=True)]
    parts = [(heads, 0, shared)] if any((numbers >= 0).any() for _, numbers in heads) else []
    parts += [([(sequences[row], asking[row]) for row in rows], shared, width) for rows, width in groups]
    outputs, answered, arrays = np.full(len(places), -1), [], []
    uses = np.full((2 + len(parts) - len(groups), length), -1)
    offered = 0
    for members, first, width in parts:
        shape = (len(members), width - first)
        queries, keys, answers = np.zeros(shape, np.int32), np.zeros((shape[0], width), np.int32), np.full(shape, -1)
        for i, (tokens, numbers) in enumerate(members):
            keys[i, : len(tokens)] = tokens
            numbers = numbers[first:]
            queries[i, : len(numbers)] = np.maximum(numbers, 0)
            new = np.flatnonzero((numbers >= 0) & (outputs[numbers] < 0))
            outputs[numbers[new]] = sum(map(len, answered)) + i * shape[1] + new
            answers[i, new] = numbers[new]
            slots = (uses[:, tokens] >= 0).sum(axis=0)
            uses[slots, tokens] = offered + i * width + np.arange(len(tokens))
        offered += keys.size
        answered.append(answers.ravel())
        arrays.append(Part(mx.array(queries), mx.array(keys)))
    return Pass(_ints(places), tuple(arrays), _ints(outputs), _ints(np.concatenate(answered)), _ints(uses))


def _ints(values):
    return mx.array(np.asarray(values, np.int32))


class _Attention:
    """A `Pass` at work."""

    def __init__(self, plan):
        self.places = plan.places
        self.queries = mx.concatenate([part.queries.reshape(-1) for part in plan.parts])
        self.keys = mx.concatenate([part.keys.reshape(-1) for part in plan.parts])
        self.outputs = mx.maximum(plan.outputs, 0)
        self.from_outputs, self.from_answered, self.from_uses = (
            [(mx.maximum(row, 0), (row >= 0)[:, None, None]) for row in index]
            for index in (plan.outputs[None], plan.answered[None], plan.uses)
        )
        self.shapes = [(*part.queries.shape, part.keys.shape[1]) for part in plan.parts]

    def __call__(self, attention, queries, keys, values, mask, options):
        """`attention` of `(1, H, M, D)` queries on `(1, H, N, D)` keys, each sequence within itself."""
        columns = [
            self._split(gathered(_rows(queries), self.queries, self.from_outputs), 1),
            *(self._split(gathered(_rows(x), self.keys, self.from_uses), 2) for x in (keys, values)),
        ]
        out = []
        for inputs, (_, length, whole) in zip(zip(*columns, strict=True), self.shapes, strict=True):
            seen = _windowed(mask, length, whole)
            out.append(attention(*inputs, mask=seen, **options).swapaxes(1, 2).flatten(0, 1))
        out = mx.concatenate(out) if len(out) > 1 else out[0]
        return gathered(out, self.outputs, self.from_answered).swapaxes(0, 1)[None]

    def _split(self, x, column):
        """The parts' `(K, H, T, D)` of `x` `(number of queries or keys, H, D)`."""
        sizes = [shape[0] * shape[column] for shape in self.shapes]
        parts = mx.split(x, np.cumsum(sizes)[:-1].tolist()) if len(sizes) > 1 else [x]
        shapes = [(shape[0], shape[column], *x.shape[1:]) for shape in self.shapes]
        return [part.reshape(shape).swapaxes(1, 2) for part, shape in zip(parts, shapes, strict=True)]


def _rows(x):
    """`(1, H, N, D)` as `(N, H, D)`."""
    return x.squeeze(0).swapaxes(0, 1)


def _windowed(mask, length, whole):
    """A part's mask: its queries are the last `length` of `whole` positions."""
    if not isinstance(mask, Window):
        return mask
    return create_causal_mask(length, whole - length, window_size=mask.size) if whole > mask.size else "causal"


def gathered(x, index, sources):
    """`x[index]`, whose gradient is gathered too: faster than scattered, and the same at every run.

    Args:
        x: `(N, H, D)`.
        index: `(M,)` int, what is taken.
        sources: pairs of `(N,)` int and `(N, 1, 1)` bool: entry n of x was taken as that entry of the result, where
            it is true. Where an entry was taken more often, the gradients of the others are zero.

    Returns:
        `(M, H, D)`.
    """

    @mx.custom_function
    def gather(x):
        return _taken(x, index)

    @gather.vjp
    def backward(x, slope, _):
        return sum(mx.where(known, _taken(slope, source), 0) for source, known in sources)

    return gather(x)


def _taken(x, index):
    """`x[index]` of `(N, H, D)`, in words of eight bytes where they fit: MLX takes as long for a word of two."""
    if x[0].nbytes % 8:
        return x[index]
    return x.reshape(len(x), -1).view(mx.uint64)[index].view(x.dtype).reshape(-1, *x.shape[1:])


class _PackedRow:
    """A model's run on a packed row."""

    def __init__(self, layout):
        self.body, self.last, self.scored = _Attention(layout.body), _Attention(layout.last), layout.scored
        self.length = layout.body.places.shape[0]
        self.active = self.body
        self.stops, self.taken = False, None

    def rope(self, rope, x, *args, offset=0, **options):
        """`mx.fast.rope` of `x` `(1, H, M, D)`, with each token's own position."""
        if not isinstance(offset, int) or offset or x.shape[::2] != (1, self.active.places.size):
            raise CannotPackError("positions of its own")
        # As many sequences of one token.
        out = rope(x.transpose(2, 1, 0, 3), *args, offset=self.active.places, **options)
        return out.transpose(2, 1, 0, 3)

    def attention(self, attention, queries, keys, values, *, mask=None, **options):
        """`mx.fast.scaled_dot_product_attention` of a row's queries, keys and values."""
        if self.stops:
            raise _Reached(keys, values)
        if self.taken is not None:
            keys, values = self.taken
        sound = queries.shape[::2] == (1, self.active.places.size)
        if not sound or any(x.shape[::2] != (1, self.length) for x in (keys, values)):
            raise CannotPackError("sequences of its own")
        if mask is None and self.length == 1:
            mask = "causal"  # what upstream leaves out for one token
        if not isinstance(mask, (str, Window)):
            raise CannotPackError("a mask of its own")
        return self.active(attention, queries, keys, values, mask, options)

    def causal_mask(self, N, offset=0, window_size=None, right_padding=None, left_padding=None):
        """In `create_causal_mask`'s place, whose arguments these are; a mask to compute with cannot be had."""
        if N != self.length or offset or window_size is None or not (right_padding is left_padding is None):
            raise CannotPackError("a mask of its own")
        return Window(window_size)

    def last_layer(self, call, layer, *args, **kwargs):
        """The last layer for the scored tokens: of the others it needs the keys and values, and nothing else is run."""
        self.stops = True
        try:
            call(layer, *args, **kwargs)
        except _Reached as reached:
            self.taken = reached.args
        finally:
            self.stops = False
        self.active = self.last
        try:
            return call(layer, *map(self._scored, args), **{name: self._scored(x) for name, x in kwargs.items()})
        finally:
            self.active, self.taken = self.body, None

    def _scored(self, x):
        """Of an array `(1, N, ...)` the scored tokens' entries; anything else as it is."""
        is_row = isinstance(x, mx.array) and x.shape[:2] == (1, self.length)
        return x[:, self.scored] if is_row else x


# The row that a model is run on now, if it is packed.
_current = None


@contextmanager
def _on_row(row):
    """Within the context, a model runs on this packed row."""
    global _current
    earlier, _current = _current, row
    attention, rope = mx.fast.scaled_dot_product_attention, mx.fast.rope
    try:
        with (
            exchanged(mx.fast, "rope", partial(row.rope, rope)),
            exchanged(mx.fast, "scaled_dot_product_attention", partial(row.attention, attention)),
            exchanged(base, "create_causal_mask", row.causal_mask),
        ):
            yield
    finally:
        _current = earlier


@contextmanager
def packing(model, layout):
    """Within the context, `model` runs on a row packed as `layout` says; an empty layout changes nothing.

    Raises:
        CannotPackError: when the model is run, if it cannot.
    """
    if not layout:
        yield
        return
    row, layers = _PackedRow(layout), layers_of(model)
    if not layers:
        raise CannotPackError("no layers")
    last_layer = partial(row.last_layer, type(layers[-1]).__call__)
    with _on_row(row), intercepted(layers[-1], "__call__", lambda *args, **kwargs: last_layer(*args, **kwargs)):
        yield


def on_this_row(function):
    """`function`, which when it is run later still runs on the packed row of now, if there is one."""
    row = _current

    def run(*args, **kwargs):
        with nullcontext() if row is _current or row is None else _on_row(row):
            return function(*args, **kwargs)

    return run

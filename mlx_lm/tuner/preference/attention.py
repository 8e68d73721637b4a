"""Attention of a batch's sequences, through mlx-lm's own cache protocol; and attention that keeps no scores.

A packed batch runs all its tokens as sequences of one token, each prompt's once. What tells sequences apart are
positions and attention, and mlx-lm's models leave both to their cache: `PackedCache` answers with each token's position
in its own sequence, and gathers each sequence's queries and keys before it attends. Layers that read one token after
another, by a convolution or a recurrence, have these functions alone run on each sequence's tokens in a row: on the
beginnings of all prompts first, and from the states these leave on what follows, once for each response.
"""

from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ...models.base import create_attention_mask, create_causal_mask
from ...models.cache import ArraysCache
from .cpu_attention import BLOCK_SCORES, blocks_of, causal_attention, in_blocks
from .cuda_copies import fit, rows_of
from .cuda_scores import scored_attention

# MLX's CUDA backend has a fused backward pass of attention for lengths that are multiples of this.
CUDA_TILE = 128
# Its Metal backend has one since this version, for heads so wide among others, where no array is the mask.
FUSED_SINCE, FUSED_WIDTHS = (0, 32, 4), (64, 72, 80, 96, 128)
# Where there is none, a query's scores are kept for each key. With so many keys a head's dimension they are more than
# what it takes to compute them again, which is done for a block of queries at a time.
KEYS_A_DIMENSION = 4


def on_cuda():
    """Whether the default device is a GPU of NVIDIA's."""
    return mx.default_device() == mx.gpu and not mx.metal.is_available()


@cache
def capability():
    """The compute capability of a GPU of NVIDIA's, such as (7, 5) of a T4; (9, 0) where MLX does not tell it."""
    info = mx.device_info()
    return info.get("compute_capability_major", 9), info.get("compute_capability_minor", 0)


def on_metal():
    """Whether the default device is a GPU of Apple's."""
    return mx.default_device() == mx.gpu and mx.metal.is_available()


# Scores that such a block of queries has at most. On CUDA some fifty kernels have to be launched for each block.
MOST_SCORES = 2**25 if on_cuda() else BLOCK_SCORES


class Parts(NamedTuple):
    """Parts of the sequences of a packed batch of N tokens, each computed at once; -1 stands for nowhere.

    A part has T positions of each of K sequences, of which the last Q ask: each attends up to its own. Queries and keys
    are numbered from the first part's to the last's.

    Attributes:
        keys: of each part `(K, T)` int32, which token of the batch stands there; any one behind the end.
        answered: of each part `(K, Q)` int32, the token whose output a query's is.
        outputs: `(N,)` int32, the query whose output is the token's.
        uses: `(R, N)` int32, the keys that are the token: a prompt's tokens are keys of both its sequences.
    """

    keys: tuple
    answered: tuple
    outputs: mx.array
    uses: mx.array

    def places(self):
        """The `Places` of keys, and of what asks and is answered."""
        return Places(self.keys, self.uses), Places(self.answered, self.outputs[None], holes=True)

    def as_one(self):
        """`Parts` of one sequence, in which the sequences of all parts stand one behind the other."""
        joined = (mx.concatenate([part.reshape(-1) for part in own])[None] for own in (self.keys, self.answered))
        return Parts(*((own,) for own in joined), self.outputs, self.uses)

    def begun(self):
        """Whether the first part has what the sequences of the others begin with, which are two for each of its own."""
        first, *others = map(len, self.keys)
        return sum(others) == 2 * first

    def in_rows(self, function, arrays):
        """What a recurrence's function gives for tokens that come as sequences of one, `(N, 1, ...)`.

        Args:
            function: takes sequences `(K, T, ...)` and the state before them, None at the beginning; returns outputs
                `(K, T, ...)` and the state behind them, `(K, ...)`.
            arrays: what it takes, each `(N, 1, ...)`.
        """
        keys, queries = self.places()
        columns = spread([x.squeeze(1) for x in arrays], [keys] * len(arrays))
        first, begun, state, answers = len(self.keys[0]), self.begun(), None, []
        for part in zip(*columns, strict=True):
            before = None if state is None else mx.concatenate([state] * (len(part[0]) // first))
            out, behind = function(*part, before)
            if begun and state is None:
                state = behind
            answers.append(out)
        return collected(answers, queries)[:, None]


class Layout(NamedTuple):
    """Where the N tokens of a packed batch belong.

    Attributes:
        places: `(N,)` int32, each token's position in its own sequence.
        attended: the `Parts` of attention, each from a sequence's beginning on.
        recurrent: those of convolutions and recurrences, where there are such: each position once. Where a first part
            has a row for each pair, and the others two, it is what a pair's sequences both begin with.
    """

    places: mx.array
    attended: Parts
    recurrent: tuple = ()


@dataclass(frozen=True)
class Window:
    """In a mask's place: causal, and no farther back than so many tokens."""

    size: int


def make_parts(length, sequences, spans):
    """The `Parts` of a packed batch, as numpy's arrays.

    Args:
        length: N, its tokens, padding included.
        sequences: 2B int arrays, the numbers of each sequence's tokens; sequence i and B + i begin with one prompt's.
        spans: `[(rows, start, first, stop)]`, a part each: which sequences, from which position on and up to which, and
            from which on they ask. A token has to ask in one of them.
    """
    outputs = np.full(length, -1, np.int32)
    uses, used = np.full((2, length), -1, np.int32), np.zeros(length, np.int32)
    all_keys, answered, queries_before, keys_before = [], [], 0, 0
    for rows, start, first, stop in spans:
        keys = np.zeros((len(rows), stop - start), np.int32)
        answers = np.full((len(rows), stop - first), -1, np.int32)
        for i, row in enumerate(rows):
            tokens = sequences[row][start:stop]
            keys[i, : len(tokens)] = tokens
            uses[used[tokens], tokens] = keys_before + i * keys.shape[1] + np.arange(len(tokens))
            used[tokens] += 1
            asking = tokens[first - start :]
            # Both sequences of a pair may ask for a prompt's token; the first one's answer is taken.
            new = np.flatnonzero(outputs[asking] < 0)
            answers[i, new] = asking[new]
            outputs[asking[new]] = queries_before + i * answers.shape[1] + new
        all_keys.append(keys)
        answered.append(answers)
        queries_before, keys_before = queries_before + answers.size, keys_before + keys.size
    return Parts(tuple(all_keys), tuple(answered), outputs, uses)


class RowCache:
    """In a layer's cache's place where rows are sequences: keeps nothing, and attends without keeping scores."""

    offset = 0

    def update_and_fetch(self, keys, values):
        """The keys and values as they are."""
        return keys, values

    def make_mask(self, N, return_array=False, window_size=None):
        """What upstream answers where there is no cache."""
        return create_attention_mask(mx.zeros((1, N)), None, window_size, return_array)

    def attend(self, queries, keys, values, scale, mask, sinks):
        """As `base.scaled_dot_product_attention`."""
        return attention(queries, keys, values, scale, mask, sinks)


class PackedCache(RowCache):
    """In every layer's cache's place on a packed batch of N sequences of one token, which a `Layout` tells."""

    def __init__(self, layout):
        self.offset = layout.places
        self._keys, self._queries = Parts(*layout.attended).places()
        # By how many heads a token has.
        self._by_head = [cache(own.by_head) for own in (self._queries, self._keys)]

    def make_mask(self, N, return_array=False, window_size=None):
        """What `attend` reads; a mask to compute with cannot be had."""
        return "causal" if window_size is None else Window(window_size)

    def attend(self, queries, keys, values, scale, mask, sinks):
        """Attention of each sequence within itself.

        Args:
            queries, keys, values: `(N, H, 1, D)`; keys and values may have fewer heads.
            scale, sinks: as for `mx.fast.scaled_dot_product_attention`.
            mask: what `make_mask` gave.

        Returns:
            `(N, H, 1, D)`.

        Raises:
            ValueError: the mask is another, or there is more than one token a row.
        """
        if not (mask == "causal" or isinstance(mask, Window)) or queries.shape[2] != 1 or keys.shape[2] != 1:
            raise ValueError("a packed batch has no mask, and no rows, of a model's own")
        arrays, places = [x.squeeze(2) for x in (queries, keys, values)], [self._queries, self._keys, self._keys]
        # Where products read them, the rows of each head stand by themselves.
        apart = on_cuda() and not _is_fused_on_cuda(queries, values)
        if apart:
            of_queries, of_keys = self._by_head
            places = [of_queries(queries.shape[1]), *(of_keys(x.shape[1]) for x in (keys, values))]
            arrays = [x.flatten(0, 1) for x in arrays]
        out = []
        for part in zip(*spread(arrays, places), strict=True):
            own = part if apart else [x.swapaxes(1, 2) for x in part]
            narrow = isinstance(mask, Window) and mask.size < own[1].shape[2]
            found = attention(*own, scale, mask if narrow else "causal", sinks)
            out.append(found if apart else found.swapaxes(1, 2))
        return collected(out, places[0]).reshape(*queries.shape[:2], 1, -1)


class PackedState(ArraysCache):
    """In a recurrent layer's cache's place on a packed batch: nothing stands before a token, and nothing is kept.

    Args:
        tokens: N.
        channels: of what the model's layers convolve, a set.
    """

    lengths = None

    def __init__(self, tokens, channels):
        self._channels = channels
        # Where it is known how wide. Booleans, which joined to other values take their dtype.
        self._before = mx.zeros((tokens, 0, *channels), mx.bool_) if len(channels) == 1 else None

    def __getitem__(self, i):
        return None if i else self._before

    def __setitem__(self, i, value):
        """What was convolved last is not needed; `ValueError` for a state, of a recurrence that is unknown here."""
        if value is not None and value.shape[-1] not in self._channels:
            raise ValueError("a packed batch has no states of a model's own")

    def advance(self, N):
        """Nothing: a packed batch is whole."""

    def make_mask(self, N):
        """What upstream answers where there is no cache."""


class Places(NamedTuple):
    """Which of N tokens stand in the rows of parts, and in which rows each token stands.

    Attributes:
        parts: of each part `(K, T)` int32, the token that stands there.
        sources: `(R, N)` int32, rows that a token stands in, numbered from the first part's to the last's; -1 for none.
        holes: whether a part has -1 where none stands, for zeros.
    """

    parts: list
    sources: mx.array
    holes: bool = False

    def indices(self):
        """Of each part the tokens that are its rows, as `moved` reads them."""
        return [part.reshape(1, -1) if self.holes else part.reshape(-1) for part in self.parts]

    def by_head(self, count):
        """The same of rows of a head each, of which a token has so many: parts are `(K, count, T)`."""
        head = mx.arange(count, dtype=mx.int32)
        parts = [mx.where(part[:, None] < 0, -1, part[:, None] * count + head[:, None]) for part in self.parts]
        sources, start, rows = self.sources[..., None], 0, -1
        for part in self.parts:
            row, length = sources - start, part.shape[1]
            own = start * count + (row // length * count + head) * length + row % length
            rows, start = mx.where((row >= 0) & (row < part.size), own, rows), start + part.size
        return Places(parts, rows.reshape(len(rows), -1), self.holes)


def spread(arrays, places):
    """Tokens of arrays, each `(N, ...)`, as rows of parts: a list for each array of each part's `(K, T, ...)`.

    By `Places.by_head`, heads of tokens `(N H, D)`, as each part's `(K, H, T, D)`.
    """
    found = iter(moved([[x] for x in arrays], [own.indices() for own in places], [[own.sources] for own in places]))
    return [
        [next(found).reshape(*part.shape, *x.shape[1:]) for part in own.parts]
        for own, x in zip(places, arrays, strict=True)
    ]


def collected(parts, places):
    """The tokens' `(N, ...)` of what stands in the parts' rows, `(K, T, ...)` each: the other way around."""
    rows = [part.flatten(0, own.ndim - 1) for part, own in zip(parts, places.parts, strict=True)]
    return moved([rows], [[places.sources]], [places.indices()])[0]


def moved(arrays, there, back):
    """Rows of arrays in other places; gradients are gathered too, which is faster than to scatter, and always the same.

    Args:
        arrays: each in parts `(n, ...)`, whose rows are numbered from the first part's to the last's.
        there: of each array, for each part to come, which rows that has, `(M,)` int32, or the sums of which, `(S, M)`,
            where -1 is none.
        back: the same for the gradients of what it is in.

    Returns:
        The parts to come, one array's after another's.
    """
    at_once = on_cuda() and all(map(fit, arrays))

    def gathered(rows, before, after):
        rows = iter(rows)
        found = [([next(rows) for _ in own], index) for own, index in zip(before, after, strict=True)]
        if not at_once:
            return tuple(_rows(parts, index) for parts, indices in found for index in indices)
        # MLX copies an array that is not in a row before a kernel reads it: once, and not for each part.
        found = [(list(map(mx.contiguous, parts)) if len(own) > 1 else parts, own) for parts, own in found]
        pairs = [(parts, mx.atleast_2d(index)) for parts, indices in found for index in indices]
        return tuple(rows_of(*zip(*pairs, strict=True)))

    @mx.custom_function
    def forward(*rows):
        return gathered(rows, back, there)

    @forward.vjp
    def backward(_, slopes, __):
        return gathered(slopes, there, back)

    return forward(*(part for parts in arrays for part in parts))


def _rows(parts, index):
    """The rows of an array's parts that an index of `moved` names, `(M, ...)`."""
    rows = mx.concatenate([part.reshape(len(part), -1) for part in parts])
    if index.ndim == 1:
        found = rows[index]
    else:
        named = (mx.where((row >= 0)[:, None], rows[mx.maximum(row, 0)], 0) for row in index)
        found = sum(named, next(named))
    return found.reshape(-1, *parts[0].shape[1:])


def attention(queries, keys, values, scale, mask=None, sinks=None):
    """MLX's attention with a backward pass that is right, and keeps no score for each query and key.

    Args:
        queries, keys, values, scale, sinks: as for `mx.fast.scaled_dot_product_attention`.
        mask: the same, or a `Window`.
    """
    call = partial(mx.fast.scaled_dot_product_attention, scale=scale, sinks=sinks)
    causal, window = _told_by(mask)
    if on_cuda() and _is_fused_on_cuda(queries, values):
        own = mask if window is None else _causal_mask(queries, keys, None, window)
        return tokens_first(call(queries, keys, values, mask=own))
    kept = keys.shape[2] <= KEYS_A_DIMENSION * queries.shape[3]
    if on_cuda() and sinks is None and (mask is None or causal) and queries.dtype == keys.dtype == values.dtype:
        return scored_attention(queries, keys, values, scale, causal, window, MOST_SCORES, kept)
    fusable = sinks is None and window is None and (mask is None or causal)
    if on_metal() and fusable and _is_fused_on_metal(queries, values):
        return call(queries, keys, values, mask=mask)
    whole = all(x.dtype == mx.float32 for x in (queries, keys, values))
    if causal and sinks is None and whole and mx.default_device() == mx.cpu:
        return causal_attention(queries, keys, values, scale, window)
    # Masks of numbers may have gradients of their own.
    plain = mask is None or causal or mask.dtype == mx.bool_
    if plain and not kept:
        return _blocked(call, queries, keys, values, mask, sinks)
    return call(queries, keys, values, mask=_causal_mask(queries, keys, sinks, window) if causal else mask)


def _told_by(mask):
    """Whether a mask is causal, and the size of its window or None."""
    return isinstance(mask, str | Window), mask.size if isinstance(mask, Window) else None


def _causal_mask(queries, keys, sinks, window):
    """The causal mask: an array for a window, and beside sinks, where MLX 0.32.4 has no gradient for the word."""
    if sinks is None and window is None:
        return "causal"
    return create_causal_mask(queries.shape[2], keys.shape[2] - queries.shape[2], window_size=window)


def _is_fused_on_cuda(queries, values):
    """Whether MLX's CUDA backend takes cuDNN's attention, which keeps no scores: from Ampere on, for such arrays."""
    widths = queries.shape[3], values.shape[3]
    half = queries.dtype in (mx.float16, mx.bfloat16)
    return half and max(widths) <= 128 and not any(width % 8 for width in widths) and capability() >= (8, 0)


def _is_fused_on_metal(queries, values):
    """Whether MLX's Metal backend has a backward pass for heads of these widths that keeps no scores."""
    version = tuple(map(int, mx.__version__.split(".")[:3]))
    return version >= FUSED_SINCE and queries.shape[3] == values.shape[3] and queries.shape[3] in FUSED_WIDTHS


@mx.custom_function
def tokens_first(x):
    """`x` `(B, H, T, D)`, whose gradient is laid out as `(B, T, H, D)` however it comes.

    MLX on CUDA keeps the plan of attention's backward pass under the layouts of queries, keys and values, not that of
    the output's gradient: with two layouts of it for one shape, the second one's gradients are wrong. Upstream's models
    give it this one.
    """
    return x


@tokens_first.vjp
def _tokens_first_vjp(x, slope, _):
    return mx.contiguous(slope.swapaxes(1, 2)).swapaxes(1, 2)


def _blocked(call, queries, keys, values, mask, sinks=None):
    """Attention in blocks of queries, each computed again in the backward pass; sinks have a gradient too."""
    causal, window = _told_by(mask)
    shared, behind = [] if sinks is None else [sinks], keys.shape[2] - queries.shape[2]
    by_query = mask is not None and not causal and mask.ndim > 1 and mask.shape[-2] > 1

    def block(queries, keys, values, *others):
        *own, before = others
        given = {"sinks": own[0]} if own else {}
        if causal:
            given["mask"] = _causal_mask(queries, keys, given.get("sinks"), window)
        else:
            start = before - behind
            given["mask"] = mask[..., start : start + queries.shape[2], :] if by_query else mask
        return [call(queries, keys, values, **given)]

    def gradient(*given):
        *arrays, before, slope, _ = given
        return mx.vjp(lambda *arrays: block(*arrays, before), arrays, [slope])[1]

    # Each block is some fifty launches on CUDA, where more than MOST_SCORES asks for were not tried.
    count = 1 if window is None or on_cuda() else max(1, queries.shape[2] // window)
    spans = blocks_of(queries, keys, MOST_SCORES, count)
    return in_blocks(queries, keys, values, spans, causal, block, gradient, shared, window)

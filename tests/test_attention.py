"""Sequences told apart by their cache: the layout, what attention sees, its gradients, and which models are refused."""

from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architectures import make_model
from plain_pass import PAIRS, add_lora, gradient_error, make_pairs, plain_gradient, plain_logps, reference_of
from plain_pass import scored_gradient as gradient_of

from mlx_lm.models import llama
from mlx_lm.models.base import create_attention_mask, create_causal_mask
from mlx_lm.tuner.preference import attention as module
from mlx_lm.tuner.preference import batches as batches_module
from mlx_lm.tuner.preference import cpu_attention
from mlx_lm.tuner.preference.attention import (
    KEYS_A_DIMENSION,
    Layout,
    PackedCache,
    Places,
    RowCache,
    Window,
    attention,
    make_parts,
    spread,
    tokens_first,
)
from mlx_lm.tuner.preference.batches import PACKED, PLAIN, at_once, make_batch
from mlx_lm.tuner.preference.logps import Scorer, narrow_windows

ATTENTION = mx.fast.scaled_dot_product_attention


pytestmark = pytest.mark.usefixtures("uncompiled")


# The layout of a packed batch

# Two prompts of two and three tokens, four responses of one; the tokens are numbered as they stand in the batch.
SEQUENCES = [np.array(row) for row in ([0, 1, 5], [2, 3, 4, 6], [0, 1, 7], [2, 3, 4, 8])]


def test_a_layout_says_where_every_token_is():
    made = make_parts(10, SEQUENCES, [([0, 1], 0, 0, 4), ([2, 3], 0, 2, 5)])
    assert [keys.tolist() for keys in made.keys] == [
        [[0, 1, 5, 0], [2, 3, 4, 6]], [[0, 1, 7, 0, 0], [2, 3, 4, 8, 0]]
    ]  # fmt: skip
    assert made.outputs.tolist() == [0, 1, 4, 5, 6, 2, 7, 8, 12, -1]
    # The second part asks from the third position on: token 4 is there once more, and its first answer is taken.
    assert [answered.tolist() for answered in made.answered] == [
        [[0, 1, 5, -1], [2, 3, 4, 6]], [[7, -1, -1], [-1, 8, -1]]
    ]  # fmt: skip
    assert made.uses.tolist() == [
        [0, 1, 4, 5, 6, 2, 7, 10, 16, -1], [8, 9, 13, 14, 15, -1, -1, -1, -1, -1]
    ]  # fmt: skip


def laid_out(spans):
    """The layout of SEQUENCES whose attention has such parts."""
    places = np.array([0, 1, 0, 1, 2, 2, 3, 2, 3, 0], np.int32)
    return at_once(Layout(places, make_parts(10, SEQUENCES, spans)))


def inverses(layout):
    """Check that `outputs`, `answered` and `uses` say the same as the parts."""
    asked = [keys[:, -own.shape[1] :] for keys, own in zip(layout.keys, layout.answered, strict=True)]
    queries, keys, answered = (
        np.concatenate([np.array(part).ravel() for part in parts]) for parts in (asked, layout.keys, layout.answered)
    )
    outputs, uses = np.array(layout.outputs), np.array(layout.uses)
    tokens = np.flatnonzero(outputs >= 0)
    assert (queries[outputs[tokens]] == tokens).all() and len(set(outputs[tokens])) == len(tokens)
    assert (answered[outputs[tokens]] == tokens).all() and (answered >= 0).sum() == len(tokens)
    for row in uses:
        used = np.flatnonzero(row >= 0)
        assert (keys[row[used]] == used).all()
    assert len(set(uses[uses >= 0])) == (uses >= 0).sum()
    return tokens


@pytest.mark.parametrize("multiple", [1, 16, 128])
def test_each_token_asks_once_and_is_a_key_of_each_of_its_sequences(multiple, monkeypatch):
    monkeypatch.setattr(batches_module, "multiple", lambda: multiple)
    pairs = make_pairs([(13, 4, 9), (11, 6, 2), (40, 1, 30), (1, 1, 1)])
    batch, processed, padding = make_batch(pairs, PACKED)
    tokens = inverses(batch.layout.attended)
    assert tokens.tolist() == list(range(processed - padding))
    uses = (np.array(batch.layout.attended.uses) >= 0).sum(axis=0)
    prompts = sum(len(pair.prompt) for pair in pairs)
    assert uses.tolist() == [2] * prompts + [1] * (processed - padding - prompts) + [0] * padding
    # On a GPU all sequences are one part; elsewhere rejected ones ask for what follows the shortest prompt.
    shapes = [
        (own.shape, keys.shape)
        for own, keys in zip(batch.layout.attended.answered, batch.layout.attended.keys, strict=True)
    ]
    whole = -(-69 // multiple) * multiple
    assert shapes == ([((4, 40), (4, 40)), ((4, 68), (4, 69))] if multiple == 1 else [((8, whole), (8, whole))])


# The packed cache


def alone(sequences, arrays, scale, mask, sinks):
    """What MLX's attention gives each sequence by itself, for the sequence's tokens: a list of `(T, H, D)`."""
    queries, keys, values = (x.squeeze(2) for x in arrays)
    out = []
    for sequence in sequences:
        own = [x[mx.array(sequence)][None].swapaxes(1, 2) for x in (queries, keys, values)]
        length = len(sequence)
        seen = create_causal_mask(length, window_size=mask.size) if isinstance(mask, Window) else mask
        out.append(ATTENTION(*own, scale=scale, mask=seen, sinks=sinks)[0].swapaxes(0, 1))
    return out


@pytest.mark.parametrize("spans", [[(range(4), 0, 0, 4)], [(range(2), 0, 0, 4), (range(2, 4), 0, 2, 4)],
                                   [(range(4), 0, 0, 16)], [([0, 2], 0, 0, 3), ([1, 3], 0, 0, 4)]])  # fmt: skip
@pytest.mark.parametrize("mask", ["causal", Window(2), Window(9)])
@pytest.mark.parametrize("sinks", [False, True])
def test_packed_attention_is_each_sequences_own(spans, mask, sinks):
    draw = np.random.default_rng(1).normal
    arrays = [mx.array(draw(size=(10, heads, 1, 8)), mx.float32) for heads in (4, 2, 2)]
    sinks = mx.array(draw(size=4), mx.float32) if sinks else None
    factors = mx.array(draw(size=(9, 4, 8)), mx.float32)
    layout = laid_out(spans)
    inverses(layout.attended)
    # Of a prompt's tokens both sequences have the output; the first one's is taken.
    first = [np.flatnonzero(np.isin(sequence, np.concatenate([[-1], *SEQUENCES[:i]]), invert=True))
             for i, sequence in enumerate(SEQUENCES)]  # fmt: skip

    def packed(*arrays):
        cache = PackedCache(layout)
        assert cache.update_and_fetch(*arrays[1:]) == arrays[1:]
        return cache.attend(*arrays, 0.4, mask, sinks).squeeze(2)[:9]

    def expected(*arrays):
        rows = mx.zeros((9, 4, 8))
        for sequence, new, out in zip(SEQUENCES, first, alone(SEQUENCES, arrays, 0.4, mask, sinks), strict=True):
            rows[mx.array(sequence[new])] = out[mx.array(new)]
        return rows

    assert mx.allclose(packed(*arrays), expected(*arrays), atol=1e-5)
    slopes, wanted = (
        mx.grad(lambda *arrays, f=f: (f(*arrays) * factors).sum(), argnums=(0, 1, 2))(*arrays)
        for f in (packed, expected)
    )
    for found, slope in zip(slopes, wanted, strict=True):
        assert mx.allclose(found, slope, atol=1e-5) and mx.abs(slope[:9]).max().item() > 0.1
    assert mx.array_equal(slopes[0][9], mx.zeros((4, 1, 8)))  # padding asks for nothing


def test_a_packed_cache_tells_positions_and_refuses_masks_and_rows():
    cache = PackedCache(laid_out([(range(4), 0, 0, 4)]))
    assert cache.offset.tolist() == [0, 1, 0, 1, 2, 2, 3, 2, 3, 0]
    assert cache.make_mask(1) == "causal" and cache.make_mask(1, window_size=5) == Window(5)
    one, two = mx.zeros((10, 2, 1, 8)), mx.zeros((5, 2, 2, 8))
    for arrays, mask in (((one,) * 3, None), ((one,) * 3, mx.ones((1, 1), mx.bool_)), ((two,) * 3, "causal")):
        with pytest.raises(ValueError, match="a packed batch has no mask, and no rows, of a model's own"):
            cache.attend(*arrays, 1.0, mask, None)


def test_what_is_spread_gets_its_gradient_collected():
    draw = mx.random.normal((5, 2, 4), key=mx.random.key(0))
    # Entry 0 is taken twice, entry 3 not at all, and place 5 is padding of which no gradient comes.
    index = mx.array([1, 0, 2, 0, 4, 1])
    places = Places([index[None, :2], index[2:].reshape(2, 2)], mx.array([[1, 0, 2, -1, 4], [3, -1, -1, -1, -1]]))
    weights = mx.random.normal((6, 2, 4), key=mx.random.key(1)) * (mx.arange(6) < 5)[:, None, None]

    def taken(x):
        (parts,) = spread([x], [places])
        assert [part.shape[:2] for part in parts] == [(1, 2), (2, 2)]
        return mx.concatenate([part.flatten(0, 1) for part in parts])

    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        for width in (4, 3):  # two heads of three half-precision numbers are no whole words of eight bytes
            x, factors = draw[..., :width].astype(dtype), weights[..., :width].astype(dtype)
            assert mx.array_equal(taken(x), x[index])
            found = mx.grad(lambda x, f=factors: (taken(x) * f).sum())(x)
            assert mx.allclose(found, mx.grad(lambda x, f=factors: (x[index] * f).sum())(x), rtol=1e-2)


# Rows through a cache that keeps nothing


@pytest.mark.parametrize("length", [1, 5, 12])
@pytest.mark.parametrize("return_array", [False, True])
@pytest.mark.parametrize("window", [None, 3, 12])
def test_a_row_cache_answers_what_upstream_does_without_a_cache(length, return_array, window):
    states = mx.zeros((2, length, 4))
    expected = create_attention_mask(states, None, window_size=window, return_array=return_array)
    found = create_attention_mask(states, RowCache(), window_size=window, return_array=return_array)
    assert type(found) is type(expected)
    assert mx.array_equal(found, expected) if isinstance(found, mx.array) else found == expected


# Attention that keeps no scores


def attended(function, lengths, dtype=mx.float32, mask="causal", heads=(4, 2)):
    """`[output, gradients of queries, keys and values]` of random ones, 8 dimensions a head."""
    draw = np.random.default_rng(0)
    shapes = [(2, count, length, 8) for count, length in zip((heads[0], heads[1], heads[1]), (*lengths, lengths[1]),
                                                             strict=True)]  # fmt: skip
    arrays = [mx.array(draw.normal(size=shape), mx.bfloat16).astype(dtype) for shape in (*shapes, shapes[0])]
    (out,), slopes = mx.vjp(lambda *qkv: function(*qkv, mask), arrays[:3], arrays[3:])
    return [out, *slopes]


def whole(queries, keys, values, mask):
    return ATTENTION(queries, keys, values, scale=0.4, mask=mask)


def errors(found, expected):
    assert [value.shape for value in found] == [value.shape for value in expected]
    return [
        (mx.linalg.norm(a.astype(mx.float32) - b) / mx.linalg.norm(b)).item()
        for a, b in zip(found, expected, strict=True)
    ]


@pytest.mark.parametrize("lengths", [(100, 100), (40, 100), (33, 33), (1, 50)])
@pytest.mark.parametrize("mask", ["causal", None, "window", "rows"])
def test_attention_in_blocks_is_attention(lengths, mask, monkeypatch):
    queries, keys = lengths
    place, key = mx.arange(keys - queries, keys)[:, None], mx.arange(keys)
    if mask == "window":
        mask = (key <= place) & (key > place - 7)
    elif mask == "rows":
        mask = (key > 3)[None]
    monkeypatch.setattr(module, "MOST_SCORES", 2 * 4 * keys * 32)
    seen = []

    def call(*arrays, mask):
        seen.append((arrays[0].shape[2], arrays[1].shape[2]))
        return whole(*arrays, mask)

    found = attended(partial(module._blocked, call), lengths, mask=mask)
    assert max(errors(found, attended(whole, lengths, mask=mask))) < 1e-5
    blocks = -(-queries // 32)
    # Of 33 queries, 16 are in one block and 17 in the other.
    assert len(seen) == 2 * blocks and {length for length, _ in seen} <= {queries // blocks, -(-queries // blocks)}
    causal = isinstance(mask, str)
    assert sorted({length for _, length in seen})[0] == (keys - queries + queries // blocks if causal else keys)


@pytest.mark.parametrize("kinds", [(mx.float32, mx.float32, mx.bfloat16), (mx.bfloat16, mx.bfloat16, mx.float32)])
@pytest.mark.parametrize("on", ["cpu", "blocks"])
def test_gradients_have_their_arrays_dtypes_where_those_differ(on, kinds, monkeypatch):
    monkeypatch.setattr(module, "MOST_SCORES", 2 * 4 * 40 * 32)
    draw = np.random.default_rng(0)
    arrays = [mx.array(draw.normal(size=(2, 4, 40, 8)), mx.float32).astype(kind) for kind in kinds]

    def given(*arrays, mask="causal"):
        function = partial(module._blocked, whole) if on == "blocks" else partial(attention, scale=0.4)
        return function(*arrays, mask=mask)

    weights = mx.array(draw.normal(size=(2, 4, 40, 8)), mx.float32)
    found, expected = (
        mx.vjp(function, arrays, [weights.astype(function(*arrays).dtype)])[1]
        for function in (given, partial(whole, mask="causal"))
    )
    assert [slope.dtype for slope in found] == list(kinds)
    assert max(errors(found, [slope.astype(mx.float32) for slope in expected])) < 0.02


@pytest.mark.usefixtures("one_by_one")
def test_memory_of_attention_in_blocks_grows_with_its_length(monkeypatch):
    for where, name in ((module, "MOST_SCORES"), (cpu_attention, "BLOCK_SCORES")):
        monkeypatch.setattr(where, name, 2**16)

    def peak(function, length):
        gradient = mx.grad(lambda x: function(x, x, x, "causal").sum())(mx.ones((1, 4, length, 8)))
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(gradient)
        return mx.get_peak_memory() - before

    def blocked(*arrays):
        return attention(*arrays[:3], 0.4, arrays[3])

    assert peak(whole, 1024) > 3.5 * peak(whole, 512)
    assert peak(blocked, 1024) < 2.5 * peak(blocked, 512) < peak(whole, 512) / 2


@pytest.mark.parametrize("lengths", [(100, 100), (40, 300), (33, 33), (1, 50), (260, 260)])
@pytest.mark.parametrize("most", [2**23, 2 * 6 * 40 * 50])
def test_attention_on_a_cpu_is_attention(lengths, most, monkeypatch):
    """Six heads, two of keys; with `most` scores a block, blocks of 32 queries or few more."""
    monkeypatch.setattr(cpu_attention, "BLOCK_SCORES", most)
    queries, keys = lengths
    shapes = ((2, 6, queries, 8), (2, 2, keys, 8), (2, 2, keys, 5))
    arrays = [3 * mx.random.normal(shape, key=mx.random.key(i)) for i, shape in enumerate(shapes)]
    slope = mx.random.normal((2, 6, queries, 5))

    def both(function):
        (out,), slopes = mx.vjp(lambda *arrays: function(*arrays, scale=0.4), arrays, [slope])
        return [out, *slopes]

    expected = both(partial(ATTENTION, mask="causal"))
    assert max(errors(both(cpu_attention.causal_attention), expected)) < 1e-5


@pytest.mark.skipif(module.on_cuda(), reason="half precision is another backward pass there")
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize(
    "mask, dimension, in_blocks",
    [
        ("causal", 8, True),
        ("causal", 32, False),  # 100 keys are fewer than four a dimension
        (None, 8, True),
        (mx.ones((100, 100), mx.bool_), 8, True),
        (mx.zeros((100, 100)), 8, False),  # it may have a gradient
    ],
)
def test_what_is_attended_to_in_blocks(dtype, mask, dimension, in_blocks, monkeypatch):
    assert KEYS_A_DIMENSION == 4
    taken, original = [], module._blocked
    monkeypatch.setattr(module, "_blocked", lambda *args: taken.append(1) or original(*args))
    x = mx.random.normal((1, 2, 100, dimension)).astype(dtype)
    if isinstance(mask, mx.array) and mask.dtype != mx.bool_:
        mask = mask.astype(dtype)
    found = attention(x, x, x, 0.3, mask)
    # A CPU has its own way with causal float32.
    in_blocks = in_blocks and not (mx.default_device() == mx.cpu and dtype == mx.float32 and isinstance(mask, str))
    assert len(taken) == in_blocks
    assert mx.allclose(found, ATTENTION(x, x, x, scale=0.3, mask=mask), atol=1e-5 if dtype == mx.float32 else 2e-2)
    attention(x, x, x, 0.3, "causal", sinks=mx.zeros((2,), dtype))
    assert len(taken) == in_blocks + (dimension == 8)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("length", [40, 150, 200])
@pytest.mark.parametrize("size", [2, 5, 64, 199])
def test_a_windows_blocks_see_what_the_window_shows(size, length, sinks, monkeypatch):
    """Of 200 keys those before the first query's window have no gradient; no block sees more than it has to."""
    monkeypatch.setattr(module, "KEYS_A_DIMENSION", 0)
    shapes = ((2, 4, length, 8), (2, 2, 200, 8), (2, 2, 200, 8), (4,), (2, 4, length, 8))
    *arrays, slope = (mx.random.normal(shape, key=mx.random.key(i)) for i, shape in enumerate(shapes))
    arrays, mask, widths = arrays[: 3 + sinks], create_causal_mask(length, 200 - length, window_size=size), []

    def both(function):
        return [x for part in mx.vjp(function, arrays, [slope]) for x in part]

    def plain(queries, keys, values, sinks=None):
        return ATTENTION(queries, keys, values, scale=0.4, mask=mask, sinks=sinks)

    def watched(queries, keys, *others, **options):
        widths.append((queries.shape[2], keys.shape[2]))
        return ATTENTION(queries, keys, *others, **options)

    expected = both(plain)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", watched)
    found = both(lambda queries, keys, values, *own: attention(queries, keys, values, 0.4, Window(size), *own))
    assert max(errors(found, expected)) < (1e-5 if mx.default_device() == mx.cpu else 3e-3)
    assert mx.abs(found[2][:, :, : max(0, 201 - length - size)]).sum().item() == 0
    assert all(seen <= asked - 1 + size for asked, seen in widths)


@pytest.mark.skipif(module.on_cuda(), reason="half precision is another backward pass there")
@pytest.mark.parametrize("on_metal", [False, True])
@pytest.mark.parametrize("mask", ["causal", None, "window"])
def test_attention_in_blocks_has_the_gradients_of_sinks(mask, on_metal, monkeypatch):
    """Four heads, two of keys; 150 queries in blocks of 32 or fewer behind 50 more keys."""
    monkeypatch.setattr(module, "MOST_SCORES", 1)
    monkeypatch.setattr(module, "on_metal", lambda: on_metal)
    mask = create_causal_mask(150, 50, window_size=40) if mask == "window" else mask
    shapes = ((2, 4, 150, 8), (2, 2, 200, 8), (2, 2, 200, 8), (4,))
    arrays = [mx.random.normal(shape, key=mx.random.key(i)) for i, shape in enumerate(shapes)]
    slope, lengths = mx.random.normal((2, 4, 150, 8), key=mx.random.key(4)), []

    def watched(queries, *others, **options):
        lengths.append(queries.shape[2])
        return ATTENTION(queries, *others, **options)

    def both(function):
        return [x for part in mx.vjp(function, arrays, [slope]) for x in part]

    expected = both(lambda *arrays: ATTENTION(*arrays[:3], scale=0.4, mask=mask, sinks=arrays[3]))
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", watched)
    found = both(lambda *arrays: attention(*arrays[:3], 0.4, mask, arrays[3]))
    assert max(errors(found, expected)) < 1e-5 and max(lengths) <= 32 and mx.abs(expected[-1]).min() > 1e-4


@pytest.mark.parametrize(
    "version, width, mask, direct",
    [
        ("0.32.4", 64, "causal", True),
        ("0.33.0.dev20261201", 128, None, True),
        ("0.32.3", 64, "causal", False),  # whose backward pass would keep the scores
        ("0.32.4", 32, "causal", False),
        ("0.32.4", 64, mx.ones((600, 600), mx.bool_), False),
    ],
)
def test_on_metal_mlxs_own_backward_pass_is_taken_where_there_is_one(version, width, mask, direct, monkeypatch):
    monkeypatch.setattr(module, "on_metal", lambda: True)
    monkeypatch.setattr(module, "on_cuda", lambda: False)
    monkeypatch.setattr(mx, "__version__", version)
    taken, original = [], module._blocked
    monkeypatch.setattr(module, "_blocked", lambda *args: taken.append(1) or original(*args))
    monkeypatch.setattr(module, "causal_attention", lambda *args: taken.append(1) or ATTENTION(*args[:3], scale=0.3))
    x = mx.random.normal((1, 2, 600, width))
    attention(x, x, x, 0.3, mask)
    assert bool(taken) != direct


@pytest.mark.parametrize(
    "dtype, widths, capability, direct",
    [
        (mx.bfloat16, (64, 64), (8, 0), True),
        (mx.float16, (96, 64), (12, 1), True),
        (mx.bfloat16, (64, 64), (7, 5), False),  # a T4
        (mx.bfloat16, (100, 100), (9, 0), False),  # as OpenLLaMA 3B has
        (mx.bfloat16, (64, 100), (9, 0), False),
        (mx.bfloat16, (192, 128), (9, 0), False),
        (mx.float32, (64, 64), (9, 0), False),
    ],
)
def test_on_cuda_scores_are_ours_where_cudnn_has_no_attention(dtype, widths, capability, direct, monkeypatch):
    """The conditions of MLX's `supports_sdpa_cudnn`: elsewhere it keeps the scores of every layer."""
    monkeypatch.setattr(module, "on_cuda", lambda: True)
    info = dict(zip(("compute_capability_major", "compute_capability_minor"), capability, strict=True))
    monkeypatch.setattr(mx, "device_info", lambda: info)
    monkeypatch.setattr(module, "capability", module.capability.__wrapped__)
    assert module.capability() == capability
    kept = []
    monkeypatch.setattr(module, "scored_attention", lambda *args: kept.append(args[-1]) or args[0])
    for length in (4 * widths[0], 4 * widths[0] + 1):
        x, values = (mx.random.normal((1, 2, length, width)).astype(dtype) for width in widths)
        attention(x, x, values, 0.05, "causal")
    # Of many keys a head's width scores are computed again.
    assert kept == ([] if direct else [True, False])


def test_on_metal_attention_with_sinks_is_given_an_array(monkeypatch):
    """MLX 0.32.4 takes the word "causal" for kernels without a gradient there, and an array for operations with one."""
    arrays, seen = [mx.random.normal((1, 2, 40, 64), key=mx.random.key(0)), mx.array([0.5, -1.0])], []

    def watched(*args, mask, **options):
        seen.append(mask)
        return ATTENTION(*args, mask=mask, **options)

    def gradients():
        out, slopes = mx.vjp(
            lambda x, sinks: attention(x[:, :, 30:], x, x, 0.3, "causal", sinks), arrays, [arrays[0][:, :, 30:]]
        )
        return [*out, *slopes]

    expected = gradients()
    monkeypatch.setattr(module, "on_metal", lambda: True)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", watched)
    assert all(map(mx.allclose, gradients(), expected))
    assert [mask.dtype for mask in seen] == [mx.bool_]


@pytest.mark.parametrize("mask, mean", [("causal", 1.5), (None, 2.0)])
def test_sinks_take_their_share(mask, mean):
    """Equal scores, values 1, 2 and 3: a sink with the score of a key weighs as much as one, and adds nothing."""
    x, values = mx.zeros((1, 1, 3, 8)), mx.broadcast_to(mx.arange(1.0, 4.0)[None, None, :, None], (1, 1, 3, 8))
    out = attention(x, x, values, 1.0, mask, mx.zeros((1,)))[0, 0, :, 0]
    assert mx.allclose(out, mx.array([0.5, 1.0, 1.5]) if mask else mx.full((3,), 1.5))
    plain = attention(x, x, values, 1.0, mask)[0, 0, :, 0]
    assert plain[1].item() == pytest.approx(mean)


@pytest.mark.parametrize("laid_out", ["heads first", "tokens first", "reversed"])
def test_the_gradient_of_attentions_output_is_laid_out_tokens_first(laid_out):
    """For `(B, H, T, D)` of sizes 2, 3, 4, 5 the steps between neighbours are 60, 5, 15 and 1 numbers."""
    slope = mx.random.normal((2, 3, 4, 5))
    if laid_out == "tokens first":
        slope = mx.contiguous(slope.swapaxes(1, 2)).swapaxes(1, 2)
    elif laid_out == "reversed":
        slope = mx.contiguous(slope.transpose()).transpose()
    mx.eval(slope)
    x = mx.random.normal((2, 3, 4, 5))
    (out,), (found,) = mx.vjp(tokens_first, [x], [slope])
    mx.eval(found)
    assert mx.array_equal(out, x) and mx.array_equal(found, slope)
    assert memoryview(found).strides == (4 * 60, 4 * 5, 4 * 15, 4)


# Whole models


@pytest.mark.parametrize("length", [5, 20, 64])
def test_windows_are_each_sequences_own(length):
    """Windows shorter and longer than a sequence, and shorter than the batch but not than a sequence."""
    model = add_lora(make_model("gemma3_text", sliding_window=length))
    expected = plain_logps(model)
    reference = reference_of(expected)
    scorer = Scorer(model)
    assert scorer.arrangement == PACKED
    gradient = plain_gradient(model, reference)
    for arrangement in (PACKED, PLAIN):
        batch, *_ = make_batch(PAIRS, arrangement)
        assert mx.abs(scorer(batch).total - expected).max().item() < 1e-4
        for checkpoint in (False, True):
            assert gradient_error(gradient_of(scorer, reference, PAIRS, arrangement, checkpoint), gradient) < 1e-4


def test_a_window_that_is_forgotten_is_found_without_filling_it(monkeypatch):
    model = make_model("llama", sliding_window=512)
    assert Scorer(model).arrangement == PACKED
    original = llama.create_attention_mask

    def forgetful(h, cache=None, window_size=None, **kwargs):
        return original(h, cache, window_size=None if isinstance(cache, PackedCache) else window_size, **kwargs)

    monkeypatch.setattr(llama, "create_attention_mask", forgetful)
    assert Scorer(model).arrangement == PLAIN
    assert model.model.sliding_window == model.args.sliding_window == 512


@pytest.mark.parametrize("multiple", [1, 4, 32, 128])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_gradients_are_the_plain_ones_however_attention_is_split_and_padded(multiple, checkpoint, monkeypatch):
    pairs = make_pairs([(13, 4, 9), (11, 6, 2), (40, 1, 30)])
    model = add_lora(make_model("qwen3"))
    expected = plain_logps(model, pairs)
    reference = reference_of(expected)
    gradient = plain_gradient(model, reference, pairs)
    scorer = Scorer(model)
    monkeypatch.setattr(batches_module, "multiple", lambda: multiple)
    for arrangement in (PACKED, PLAIN):
        batch, processed, padding = make_batch(pairs, arrangement)
        assert batch.tokens.size % multiple == 0 and (padding > 0) == (multiple > 1 or arrangement == PLAIN)
        assert mx.abs(scorer(batch).total - expected).max().item() < 1e-4
        assert gradient_error(gradient_of(scorer, reference, pairs, arrangement, checkpoint), gradient) < 1e-4


@pytest.mark.parametrize("arrangement", [PACKED, PLAIN])
@pytest.mark.parametrize("checkpoint", [True, False])
def test_gradients_with_attention_in_blocks_are_the_plain_ones(arrangement, checkpoint, monkeypatch):
    model = add_lora(make_model("qwen3"))
    expected = plain_logps(model)
    gradient = plain_gradient(model, reference_of(expected))
    monkeypatch.setattr(module, "KEYS_A_DIMENSION", 0)
    for where, most in ((module, "MOST_SCORES"), (cpu_attention, "BLOCK_SCORES")):
        monkeypatch.setattr(where, most, 1)
    monkeypatch.setattr(cpu_attention, "LEAST", 3)
    taken, name = [], "causal_attention" if mx.default_device() == mx.cpu else "_blocked"
    original = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: taken.append(1) or original(*args))
    found = gradient_of(Scorer(model), reference_of(expected), PAIRS, arrangement, checkpoint)
    assert taken and gradient_error(found, gradient) < 1e-4


class Mixing(nn.Module):
    """A model whose `mix` changes what goes into its layers."""

    def __init__(self, mix):
        super().__init__()
        self.model = make_model("qwen3")
        self.mix = mix

    def __call__(self, tokens, cache=None):
        model = self.model.model
        states = self.mix(model.embed_tokens(tokens))
        cache = cache or [None] * len(model.layers)
        mask = create_attention_mask(states, cache[0])
        for layer, own in zip(model.layers, cache, strict=True):
            states = layer(states, mask, own)
        return self.model.lm_head(model.norm(states))

    @property
    def layers(self):
        return self.model.layers


def shifted(states):
    return states + mx.pad(states, [(0, 0), (1, 0), (0, 0)])[:, :-1]


def numbered(states):
    return states * (1 + mx.arange(states.shape[1]) / 8)[:, None]


@pytest.mark.parametrize("mix, arrangement", [(lambda x: x, PACKED), (shifted, PLAIN), (numbered, PLAIN)])
def test_models_that_mix_or_number_positions_themselves_are_not_packed(mix, arrangement):
    assert Scorer(Mixing(mix)).arrangement == arrangement


@pytest.mark.parametrize("name", ["plamo2", "rwkv7"])
def test_states_that_rounding_would_hide_are_seen(name):
    """Those of a tiny random model change its logits by less than half precision may round them."""
    model = make_model(name)
    model.set_dtype(mx.bfloat16)
    assert Scorer(model).arrangement == PLAIN


def test_probing_leaves_windows_modes_and_classes_alone():
    model = make_model("gemma3_text", sliding_window=32)
    model.train()
    types = [type(each) for each in model.modules()]
    with narrow_windows(model):
        assert model.args.sliding_window == 4
    assert Scorer(model).arrangement == PACKED and model.training
    assert [type(each) for each in model.modules()] == types
    assert model.args.sliding_window == 32

"""What holds on the device that training runs on: gradients of every kind of step, and of attention.

On a CPU: `python -m pytest -m device --run-device tests/test_device.py`, in float32 alone.
"""

import ctypes
import itertools
import operator
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from architectures import make_model
from check_gradients import LEAST, PLAIN_PASS, add_lora, compare, cosines, in_float32
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchGLU
from mlx_lm.tuner.utils import linear_to_lora_layers
from plain_pass import make_pairs
from test_recurrent import loop, make_inputs, values_and_gradients
from test_state_space import RECURRENCES

from mlx_lm.models import activations
from mlx_lm.tuner.preference import attention as attention_module
from mlx_lm.tuner.preference.attention import (
    Layout,
    PackedCache,
    Places,
    Window,
    attention,
    collected,
    make_parts,
    on_cuda,
    on_metal,
    spread,
)
from mlx_lm.tuner.preference.batches import PACKED, PLAIN, RECURRENT, Schedule, at_once
from mlx_lm.tuner.preference.cuda_chunks import in_rows
from mlx_lm.tuner.preference.cuda_gated import gated
from mlx_lm.tuner.preference.cuda_scan import selective_loops
from mlx_lm.tuner.preference.driver_pool import driver_pool
from mlx_lm.tuner.preference.evaluation import pair_figures
from mlx_lm.tuner.preference.layers import checkpointed_layers, lean_layers
from mlx_lm.tuner.preference.logps import Scorer
from mlx_lm.tuner.preference.memory import bounded_memory
from mlx_lm.tuner.preference.objective import Objective, preference_loss
from mlx_lm.tuner.preference.pieces import gated_delta_rule
from mlx_lm.tuner.preference.reference import Reference
from mlx_lm.tuner.preference.state_space import decayed_sums
from mlx_lm.tuner.preference.step import Step
from mlx_lm.utils import token_logps

pytestmark = pytest.mark.device

ON_GPU = mx.default_device() == mx.gpu
# A CPU compiles a kernel for each shape with a C++ compiler, and multiplies half precision a hundred times slower.
DTYPES = [mx.float32, mx.bfloat16] if ON_GPU else [mx.float32]
BATCHES = 6 if ON_GPU else 1
# Windows are shorter than most sequences, and longer than the probe's.
WINDOW = {"sliding_window": 48}
SIZES = {"hidden_size": 64, "head_dim": 64, "intermediate_size": 96, "max_position_embeddings": 512}
MODELS = {
    "llama": {},
    "qwen3": {},
    # Wide enough for CUDA's kernels of the recurrence, as Mamba's below.
    # Rotated dimensions, a quarter of a head's, are as many as MLX's kernel can do with many rows of one token.
    "qwen3_5": {"linear_key_head_dim": 64, "linear_value_head_dim": 64, "head_dim": 128},
    "mamba2": {"num_heads": 4, "head_dim": 32, "state_size": 32},
    "mamba": {"state_size": 16, "intermediate_size": 128},
    "gemma3_text": WINDOW,
    "gpt_oss": WINDOW,
    "qwen3_moe": {},
    "gemma2": {},
}
# Half precision rounds a router's scores by up to 2^-9 of their size. Where two of four experts are closer than that,
# which happens to about one token in a hundred, another expert runs, and all of that token's gradient through it is
# another: of the squared norm about a hundredth is off, which by itself makes a cosine of 0.99.
EXPERTS = {"gpt_oss", "qwen3_moe"}
ROUNDING, EXPERTS_SLACK = 0.002, 0.03
# Here LoRA's matrices are rounded too, and not in upstream's pass.
ROUNDED_MORE = 1.5


def real_pairs(count, seed=5, prompt=(10, 150)):
    """Pairs of random tokens whose longest sequences have 30 to 300 tokens, or others with longer prompts."""
    draw = np.random.default_rng(seed).integers
    return make_pairs([(draw(*prompt), draw(20, 150), draw(20, 150)) for _ in range(count)])


def make_policy(name, dtype, **changes):
    model = make_model(name, **{**SIZES, **MODELS[name], **changes})
    model.set_dtype(dtype)
    return add_lora(model)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_plain_ones_in_float32(name, dtype):
    """Packed and plain batches in turns, eager and compiled, with and without grad_checkpoint, in one process."""
    if name == "gpt_oss" and on_metal():
        pytest.skip("upstream's plain pass has no gradient there: MLX 0.32.4's kernels have none with sinks")
    model = make_policy(name, dtype)
    packed = Scorer(model).arrangement
    # Of prompts so long a recurrence's states are passed on.
    pairs = real_pairs(4 * BATCHES, prompt=(140, 270) if packed == RECURRENT else (10, 150))
    compared = compare(model, pairs, 4, BATCHES)
    arrangements = {arrangement for arrangement, *_ in compared} - {PLAIN_PASS[0]}
    assert arrangements == {packed, PLAIN} and (packed == PLAIN) == (name == "gemma2")
    assert all(len(found) == BATCHES for found in compared.values()) and len(compared) == 1 + 4 * len(arrangements)
    # What rounding alone does shows in the plain pass of the model's own dtype: to a tiny random model, much.
    slack = EXPERTS_SLACK if name in EXPERTS and dtype != mx.float32 else ROUNDING
    floors = [min(LEAST[dtype], 1 - ROUNDED_MORE * (1 - x) - slack) for x in cosines(compared.pop(PLAIN_PASS))]
    worst = {way: min(map(operator.sub, cosines(found), floors)) for way, found in compared.items()}
    assert {way: distance for way, distance in worst.items() if distance < 0} == {}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8] if ON_GPU else [4])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"] if ON_GPU else ["llama"])
def test_gradients_through_packed_weights_are_the_plain_ones_in_float32(name, bits, dtype):
    """Of layers with adapters and of those without, wide enough for CUDA's faster products; as above."""
    model = make_model(name, **{**SIZES, "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128})
    model.set_dtype(dtype)
    nn.quantize(model, bits=bits)
    add_lora(model, keys=["self_attn.q_proj", "self_attn.v_proj"])
    compared = compare(model, real_pairs(4 * BATCHES), 4, BATCHES)
    slack = EXPERTS_SLACK if name in EXPERTS and dtype != mx.float32 else ROUNDING
    floors = [min(LEAST[dtype], 1 - ROUNDED_MORE * (1 - x) - slack) for x in cosines(compared.pop(PLAIN_PASS))]
    worst = {way: min(map(operator.sub, cosines(found), floors)) for way, found in compared.items()}
    assert {way: distance for way, distance in worst.items() if distance < 0} == {}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_through_experts_are_the_same_each_time(dtype):
    experts, draw = SwitchGLU(128, 64, 8), np.random.default_rng(0)
    experts.set_dtype(dtype)
    x = mx.array(draw.normal(size=(1, 700, 128)), dtype)
    chosen = mx.array(draw.random((1, 700, 8)).argsort(axis=-1)[..., :4])
    slope = mx.grad(lambda x: mx.square(experts(x, chosen).astype(mx.float32)).sum())
    expected = slope(x)
    with lean_layers(experts.modules()):
        found = [slope(x) for _ in range(5)]
        mx.eval(found)
    assert all(mx.array_equal(found[0], other) for other in found)
    gap = mx.linalg.norm((found[0] - expected).astype(mx.float32)) / mx.linalg.norm(expected.astype(mx.float32))
    assert gap < (1e-5 if dtype == mx.float32 else 1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("words", [5000, 5003])
def test_logps_and_their_gradients_are_those_of_a_softmax(words, dtype):
    draw = np.random.default_rng(0)
    logits, targets = mx.array(draw.normal(size=(64, words)) * 5, dtype), draw.integers(100, words, 64)
    logits[:, :50] = -mx.inf  # as models rule tokens out
    shifted = np.array(logits.astype(mx.float32), np.float64) - 25
    expected = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    own = np.arange(words) == targets[:, None]
    (logps,), (slope,) = mx.vjp(partial(token_logps, targets=mx.array(targets)), [logits], [mx.ones(64)])
    assert (logps.dtype, slope.dtype) == (mx.float32, dtype)
    assert np.allclose(logps, expected[own], rtol=1e-5)
    loss = 2e-5 if dtype == mx.float32 else 5e-3
    assert np.allclose(slope.astype(mx.float32), own - np.exp(expected), rtol=loss, atol=1e-6)


@pytest.mark.skipif(not on_cuda(), reason="a kernel for CUDA")
@pytest.mark.parametrize("dtype", [*DTYPES, mx.float16], ids=str)
@pytest.mark.parametrize("linear, cubic", [(1.0, 0.0), (activations.SLOPE, activations.CUBIC)])
def test_gate_and_x_of_one_array_give_what_they_give_apart(linear, cubic, dtype):
    draw = np.random.default_rng(0)
    both, slope = (mx.array(3 * draw.normal(size=(2, 77, width)), dtype) for width in (2064, 1032))
    both[..., :1032:9] *= 100  # a sigmoid of 0 or 1
    exact, through = (np.array(y.astype(mx.float32), np.float64) for y in (both, slope))
    gate, x = np.split(exact, 2, -1)
    sigmoid = (1 + np.tanh((linear * gate + cubic * gate**3) / 2)) / 2
    expected, through = gate * sigmoid * x, through * sigmoid
    rate = linear + 3 * cubic * gate**2
    expected_slope = np.concatenate([through * x * (1 + gate * (1 - sigmoid) * rate), through * gate], -1)
    function = partial(gated, linear=linear, cubic=cubic)
    for way in (function, mx.compile(function)):
        (found,), (found_slope,) = mx.vjp(way, [both], [slope])
        assert found.dtype == found_slope.dtype == dtype and found_slope.shape == both.shape
        close = partial(np.allclose, rtol=2e-5 if dtype == mx.float32 else 1e-2, atol=1e-4)
        assert close(found.astype(mx.float32), expected) and close(found_slope.astype(mx.float32), expected_slope)


# What reads more than a pair's own logps: responses to other prompts, and what routers tell beside the logits.
FURTHER = {"kto": ("llama", "kto", {}), "routers": ("qwen3_moe", "dpo", {"router_coef": 10.0})}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", FURTHER)
def test_gradients_and_figures_of_kto_and_of_routers_are_the_plain_ones_in_float32(kind, dtype):
    """As above; the plain way through a scorer in float32 is what the others have to be."""
    name, loss_type, options = FURTHER[kind]
    model, pairs = make_policy(name, dtype), real_pairs(4 * BATCHES)
    loss = preference_loss(loss_type, beta=0.05)
    if loss.unpaired:
        pairs = [pair._replace(label=i % 3 > 0) for i, pair in enumerate(pairs)]
    exact = in_float32(model)
    logps = Reference(Scorer(exact)).logps(pairs, range(len(pairs)))
    # No loss is flat, and the other responses tell of a divergence.
    logps[:, :, 0] += np.random.default_rng(0).normal([0, -3], 3, (len(pairs), 2))

    def taken(model, arrangement, compiled=False, checkpoint=False):
        """`(gradients as one array, figures of the batches)`: their losses and what the kind adds to figures."""
        step = Step(model, None, Objective(Scorer(model), loss, **options), compiled)
        schedule, gradients, figures = Schedule(pairs, 4, 0, arrangement), [], []
        with checkpointed_layers(model) if checkpoint else nullcontext():
            for iteration in range(1, 1 + BATCHES):
                batch, reference, _ = schedule.batch(iteration, logps)
                sums, gradient = step.gradient(batch, reference)
                gradients.append(mx.concatenate([x.flatten() for _, x in tree_flatten(gradient)]))
                figures.append([sums[0].item(), *sums[-len(step.objective.further) :].tolist()])
        return mx.stack(gradients), figures

    expected, figures = taken(exact, PLAIN)
    least = LEAST[dtype] - (EXPERTS_SLACK if name in EXPERTS and dtype != mx.float32 else ROUNDING)
    # A compiled step on a CPU is the other tests' matter: it takes half a minute of a C++ compiler.
    for way in itertools.product((PACKED, PLAIN), (False, True) if ON_GPU else (False,), (False, True)):
        gradients, found = taken(model, *way)
        assert min(map(cosine, gradients, expected)) > least, way
        # Half precision moves a response's logp by some half a nat, and a divergence is a difference of these. CUDA
        # multiplies float32 with three bits more than bfloat16 has.
        slack = (3e-2, 1.0) if dtype != mx.float32 else (4e-3, 0.12) if ON_GPU else (1e-3, 1e-3)
        assert np.allclose(found, figures, *slack), way


def cosine(found, expected):
    found, expected = (np.array(x.astype(mx.float32), np.float64).ravel() for x in (found, expected))
    return found @ expected / np.sqrt((found @ found) * (expected @ expected))


def assert_near_the_loop(function, loop, inputs, exact):
    """Values and gradients of a loop in float32 of the same inputs are what the function's have to be."""
    expected, slopes = values_and_gradients(loop, [x.astype(mx.float32) for x in inputs])
    found, found_slopes = values_and_gradients(function, inputs)
    for a, b in zip([*found, *found_slopes], [*expected, *slopes], strict=True):
        a, b = a.astype(mx.float32), b.astype(mx.float32)
        assert mx.linalg.norm(a - b).item() < (1e-5 if exact else 1e-2) * mx.linalg.norm(b).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("width", [32, 128, 192, 24])
def test_the_gated_delta_rule_is_the_loop_over_tokens(dtype, by_channel, width):
    """On CUDA by kernels, but for the last width."""
    inputs = make_inputs(77, by_channel, key_width=width, value_width=width)
    inputs = [x.astype(dtype) for x in inputs[:3]] + inputs[3:4] + [inputs[4].astype(dtype), inputs[5]]
    # As chunks, products are of a GPU's ten bits too.
    exact = dtype == mx.float32 and (not ON_GPU or on_cuda() and width != 24)
    assert_near_the_loop(gated_delta_rule, loop, inputs, exact)


# Widths as models have, and how many of the inputs a model has in its own dtype.
OTHERS = {
    "decayed_sums": ({"key_width": 128, "value_width": 64}, 3),
    "selective_scan": ({"width": 96, "states": 16}, 4),
    "selective_loops": ({"width": 128, "states": 16}, 4),
    "wkv7": ({"width": 64}, 6),
}


@pytest.mark.skipif(not on_cuda(), reason="kernels for CUDA")
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("betas", [True, False])
def test_products_of_chunks_are_the_loop_over_tokens(betas, dtype):
    """Of widths and a length as models have them; sums that decay by the same kernels."""
    inputs = make_inputs(900, key_heads=2, value_heads=4, key_width=128, value_width=64)
    queries, keys, values, gates, beta, state = [*(x.astype(dtype) for x in inputs[:3]), *inputs[3:]]
    if betas:
        assert_near_the_loop(in_rows, loop, [queries, keys, values, gates, beta.astype(dtype), state], False)
    else:
        function = partial(in_rows, betas=None)
        inputs = [queries, keys, values, gates, state]
        assert_near_the_loop(lambda *x: function(*x[:4], state=x[4]), lambda *x: decayed_sums(*x), inputs, False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OTHERS)
def test_other_recurrences_are_their_loops_over_tokens(name, dtype):
    if name == "selective_loops" and not on_cuda():
        pytest.skip("kernels for CUDA")
    function, loop, make, _ = RECURRENCES.get(name, (selective_loops, *RECURRENCES["selective_scan"][1:]))
    widths, rounded = OTHERS[name]
    inputs = make(200, **widths)
    inputs = [x.astype(dtype) for x in inputs[:rounded]] + inputs[rounded:]
    assert_near_the_loop(function, loop, inputs, dtype == mx.float32 and not ON_GPU)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [96, 128, 256])
@pytest.mark.parametrize("mask", ["causal", "window"])
@pytest.mark.parametrize("sinks", [False, True])
def test_attention_is_right_whichever_way_its_gradient_is_laid_out(dtype, length, mask, sinks):
    draw = np.random.default_rng(0).normal
    arrays = [mx.array(draw(size=(4, length, heads, 64)), dtype).swapaxes(1, 2) for heads in (4, 2, 2)]
    slope = mx.array(draw(size=(4, length, 4, 64)), dtype).swapaxes(1, 2)
    sinks = mx.array(draw(size=4), dtype) if sinks else None
    place = mx.arange(length)
    seen = place[:, None] >= place
    if mask == "window":
        mask = seen = seen & (place[:, None] - place < 40)

    def gradients(function, arrays, slope, sinks):
        out, slopes = mx.vjp(lambda *qkv: function(*qkv, 0.125, mask, sinks), arrays, [slope])
        mx.eval(out, slopes)
        return [*out, *slopes]

    def plain(queries, keys, values, scale, mask, sinks):
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=seen, sinks=sinks)

    exact = [x.astype(mx.float32) for x in arrays]
    expected = gradients(plain, exact, slope.astype(mx.float32), sinks if sinks is None else sinks.astype(mx.float32))
    for laid_out in (slope, mx.contiguous(slope), slope, mx.contiguous(slope.swapaxes(0, 1)).swapaxes(0, 1)):
        found = gradients(attention, arrays, laid_out, sinks)
        assert min(map(cosine, found, expected)) > LEAST[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("most", [2**25, 2 * 4 * 300 * 100])
@pytest.mark.parametrize("mask", ["causal", None])
def test_attention_of_wide_heads_is_right_in_one_block_and_in_three(dtype, most, mask, monkeypatch):
    monkeypatch.setattr(attention_module, "KEYS_A_DIMENSION", 1)
    monkeypatch.setattr(attention_module, "MOST_SCORES", most)
    draw = np.random.default_rng(0).normal
    arrays = [mx.array(draw(size=(2, 300, heads, 160)), dtype).swapaxes(1, 2) for heads in (4, 2, 2)]
    slope = mx.array(draw(size=(2, 300, 4, 160)), dtype).swapaxes(1, 2)

    def gradients(function, arrays, slope):
        return [x for part in mx.vjp(function, arrays, [slope]) for x in part]

    def plain(queries, keys, values):
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.08, mask=mask)

    expected = gradients(plain, [x.astype(mx.float32) for x in arrays], slope.astype(mx.float32))
    found = gradients(lambda *arrays: attention(*arrays, 0.08, mask), arrays, slope)
    assert min(map(cosine, found, expected)) > LEAST[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 5])
@pytest.mark.parametrize("count", [1, 2])
def test_what_is_spread_and_collected_is_the_same_at_every_run(dtype, width, count):
    """Of 500 tokens the first 200 stand in two parts; compared with numpy's sums in float64."""
    draw = np.random.default_rng(0)
    index = np.concatenate([np.arange(500), np.arange(200)])
    x = mx.array(draw.normal(size=(500, 3, 1, width)), dtype)
    slope = mx.array(draw.normal(size=(700, 3, 1, width)), dtype)
    second = np.where(np.arange(500) < 200, 500 + np.arange(500), -1)
    parts = [mx.array(index[:500].reshape(5, 100), mx.int32), mx.array(index[500:].reshape(2, 100), mx.int32)]
    places = Places(parts, mx.array(np.stack([np.arange(500), second]), mx.int32))

    def rows(*arrays):
        spreads = spread(arrays, [places] * count)
        return [part.flatten(0, 1) for part in spreads[-1]]

    def run():
        outs, gradients = mx.vjp(rows, [x] * count, [slope[:500], slope[500:]])
        back = collected([part[None] for part in outs], places)
        mx.eval(outs, gradients, back)
        return mx.concatenate(outs), gradients[-1], back

    (out, gradient, back), *others = [run() for _ in range(5)]
    assert mx.array_equal(out, x[mx.array(index)])
    assert all(mx.array_equal(gradient, other) and mx.array_equal(back, twice) for _, other, twice in others)
    close = {"atol": 1e-6 if dtype == mx.float32 else 3e-2}
    for found, of in ((gradient, slope), (back, out)):
        expected = np.zeros((500, 3, 1, width))
        np.add.at(expected, index, np.array(of.astype(mx.float32), np.float64))
        assert np.allclose(np.array(found.astype(mx.float32)), expected, **close)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["causal", Window(50)])
def test_packed_attention_is_each_sequences_own(dtype, mask):
    lengths = [300, 31, 128, 200]
    ends = np.cumsum(lengths)
    sequences = [np.arange(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    draw = np.random.default_rng(0).normal
    arrays = [mx.array(draw(size=(768, heads, 1, 64)), dtype) for heads in (4, 2, 2)]
    slope = mx.array(draw(size=(768, 4, 1, 64)), dtype) * (mx.arange(768) < 659)[:, None, None, None].astype(dtype)
    parts = make_parts(768, sequences, [(range(4), 0, 0, 384)])
    cache = PackedCache(at_once(Layout(np.zeros(768, np.int32), parts)))
    out, slopes = mx.vjp(lambda *qkv: cache.attend(*qkv, 0.125, mask, None), arrays, [slope])
    mx.eval(out, slopes)
    for sequence in sequences:
        own = [x[mx.array(sequence), :, 0][None].swapaxes(1, 2).astype(mx.float32) for x in (*arrays, slope)]
        place = mx.arange(len(sequence))
        seen = place[:, None] >= place
        if mask != "causal":
            seen = seen & (place[:, None] - place < mask.size)
        expected = mx.vjp(lambda *qkv, seen=seen: mx.fast.scaled_dot_product_attention(*qkv, scale=0.125, mask=seen),
                          own[:3], own[3:])  # fmt: skip
        found = [x[mx.array(sequence), :, 0].swapaxes(0, 1) for x in (*out, *slopes)]
        assert min(map(cosine, found, [*expected[0], *expected[1]])) > LEAST[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_compiled_run_is_the_eager_one(dtype):
    """Two updates over batches of a schedule's shapes; half precision rounds a step by some hundredths."""

    def run(compiled):
        model = make_policy("llama", dtype)
        scorer = Scorer(model)
        schedule = Schedule(real_pairs(8), 4, 0, scorer.arrangement)
        step = Step(model, optim.SGD(0.5), Objective(scorer, preference_loss("dpo", beta=0.5)), compiled, 1.0)
        mx.random.seed(0)
        losses = []
        for iteration in (1, 2):
            batch, reference, _ = schedule.batch(iteration, np.full((8, 2, 2), -300, np.float32))
            sums, norm = step(batch, reference, True)
            mx.eval(sums, norm, step.state())
            losses.append(sums.tolist())
        step.flat.write()
        return losses, dict(tree_flatten(model.trainable_parameters()))

    (expected, eager), (losses, compiled) = run(False), run(True)
    exact = dtype == mx.float32
    assert np.allclose(losses, expected, rtol=1e-4 if exact else 1e-2)
    # A GPU's products of float32 arrays may be of ten bits: what two ways round otherwise differs by more than that.
    near = (1e-3 if ON_GPU else 1e-5) if exact else 1e-2
    for name, value in eager.items():
        assert mx.allclose(compiled[name], value, atol=near), name


def test_one_seed_gives_one_run():
    """Bit for bit: nothing on the way adds up numbers in an order of its own."""

    def run():
        model = make_policy("qwen3", DTYPES[-1])
        scorer = Scorer(model)
        step = Step(model, optim.Adam(1e-3), Objective(scorer, preference_loss("dpo")), ON_GPU)
        schedule = Schedule(real_pairs(16), 4, 0, scorer.arrangement)
        for iteration in range(1, 5):
            batch, reference, _ = schedule.batch(iteration, np.full((16, 2, 2), -300, np.float32))
            mx.eval(step(batch, reference, True), step.state())
        return tree_flatten(step.flat.vectors.parameters())

    assert all(mx.array_equal(a, b) for (_, a), (_, b) in zip(run(), run(), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen3_5"])
def test_a_policy_that_is_still_its_reference_has_no_margins(name, dtype):
    """A validation takes the products of the reference's pass: others round a response's logp by tenths of a nat."""
    model = make_model(name, **{**SIZES, **MODELS[name]})
    model.set_dtype(dtype)
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), {"rank": 4, "scale": 2.0, "dropout": 0.0})
    objective, pairs = Objective(Scorer(model), preference_loss("dpo")), real_pairs(12)
    rows = range(len(pairs))
    reference = Reference(objective.scorer).logps(pairs, rows)
    figures = pair_figures(objective, pairs, rows, reference, batch_size=4)
    assert np.abs(figures["rewards/margins"]).max() < 1e-5 and np.ptp(figures["loss"]) < 1e-5


@pytest.mark.skipif(not on_cuda(), reason="elsewhere nothing is limited")
def test_a_step_stays_within_the_limit_that_was_measured():
    """Layers whose activations are let go one by one: handed out at once they would all be there."""
    layers = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(600)))
    x = mx.random.normal((4096, 512))
    mx.eval(layers.parameters(), x)
    usual = mx.set_memory_limit(0)
    mx.set_memory_limit(usual)
    with bounded_memory() as evaluate:
        mx.reset_peak_memory()
        resting = mx.get_active_memory()
        evaluate(layers(x).sum())
        need = mx.get_peak_memory() - resting
        # Activations of 8 MB: MLX lets go of none before a hundred are under way.
        assert 2 * 2**23 <= need < 250 * 2**23
        mx.reset_peak_memory()
        evaluate(layers(x).sum())
        assert mx.get_peak_memory() - resting < 1.5 * need
    assert mx.set_memory_limit(usual) == usual


OTHER_CODE = """
import mlx.core as mx
from mlx_lm._backend import prepare_for_training
prepare_for_training()
from mlx_lm.tuner.preference import cuda_cache, cuda_kernel
compiled = cuda_cache._compiled
cuda_cache._compiled = lambda text, name: compiled(text.replace("= 1", "= 2"), name)
kernel = "ones", "out[threadIdx.x] = 1 + x[threadIdx.x] + !B;", {"x": mx.arange(4.0)}, {"out": ((4,), mx.float32)}
out = cuda_kernel.run_kernel(*kernel, (4, 1, 1), 4, T=mx.bfloat16, B=True, N=3)[0]
cuda_cache.all_kept()
print(out.tolist())
"""


@pytest.mark.skipif(not on_cuda(), reason="there are such kernels on CUDA alone")
def test_mlx_runs_the_code_that_is_kept_for_a_kernel(tmp_path):
    """In place of its own: the one that is kept here is another text's."""
    environment = os.environ | {"MLX_PTX_CACHE_DIR": str(tmp_path)}
    script = [sys.executable, "-c", OTHER_CODE]
    out = subprocess.run(script, env=environment, capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[2.0, 3.0, 4.0, 5.0]"


@pytest.mark.skipif(not on_cuda(), reason="there is such a pool on CUDA alone")
def test_the_driver_keeps_what_is_free_as_far_as_it_is_told():
    """A gigabyte that is free after an evaluation, and what the pool has of it once the host has waited."""

    def left():
        limit, resting = mx.set_cache_limit(0), mx.get_active_memory()
        mx.eval(mx.ones((2**28,)).sum())
        deadline = time.monotonic() + 10
        while mx.get_active_memory() > resting + 2**20 and time.monotonic() < deadline:
            time.sleep(0.01)  # until MLX has let go of it, in a thread of its own
        mx.set_cache_limit(limit)
        mx.eval(mx.zeros(1))
        # MLX frees on a stream of its own: what the host has not seen to be done the driver does not give back.
        ctypes.CDLL("libcuda.so.1").cuCtxSynchronize()
        return pool.reserved - mx.get_active_memory() - mx.get_cache_memory()

    pool = driver_pool()
    if pool is None:
        pytest.skip("this device has no such pool")
    mx.clear_cache()
    usual, pool.kept = pool.kept, pool.reserved + 2**31
    try:
        assert left() > 2**30 - 2**26
        pool.trim(0)
        assert pool.reserved < mx.get_active_memory() + mx.get_cache_memory() + 2**29
        pool.kept = 0
        assert left() < 2**29
    finally:
        pool.kept = usual

"""A measured preference step of a random Llama on made-up pairs.

PYTHONPATH=. python benchmarks/harness.py '{"shape": "tiny", "prompt": 64, "response": 32}'    # see `measure`
"""

import json
import sys
import time
from contextlib import nullcontext

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from common import llama_config, make_rows
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_lm._backend import prepare_for_training
from mlx_lm.models import llama, qwen3_moe
from mlx_lm.tuner.datasets import Pair
from mlx_lm.tuner.preference.batches import make_batch
from mlx_lm.tuner.preference.layers import checkpointed_layers
from mlx_lm.tuner.preference.logps import Scorer
from mlx_lm.tuner.preference.memory import bounded_memory
from mlx_lm.tuner.preference.objective import Objective, preference_loss
from mlx_lm.tuner.preference.step import Step

# Experts that a token of a mixture takes, and their width.
CHOSEN, EXPERT_WIDTH = 8, 768


def make_llama(
    shape, dtype=mx.float32, vocabulary=None, rank=8, layers=None, bits=None, trained_layers=None, experts=None
):
    """A random Llama with LoRA on all linear layers of all blocks, or of the last so many; quantized to `bits`.

    With `experts` each block is a mixture of so many as Qwen3's: CHOSEN of EXPERT_WIDTH for each token.
    """
    config, family = llama_config(shape, vocabulary, layers), llama
    if experts is not None:
        family = qwen3_moe
        config |= {"model_type": "qwen3_moe", "num_experts": experts, "num_experts_per_tok": CHOSEN}
        config |= {"moe_intermediate_size": EXPERT_WIDTH, "decoder_sparse_step": 1, "mlp_only_layers": []}
        config |= {"norm_topk_prob": True, "head_dim": config["hidden_size"] // config["num_attention_heads"]}
    mx.random.seed(0)
    model = family.Model(family.ModelArgs.from_dict(config))
    model.set_dtype(dtype)
    if bits is not None:
        # As mlx-lm converts mixtures: their routers stay as they are.
        def packs(path, module):
            return hasattr(module, "to_quantized") and not path.endswith("mlp.gate")

        nn.quantize(model, group_size=64, bits=bits, class_predicate=packs)
    model.freeze()
    linear_to_lora_layers(model, trained_layers or len(model.layers), {"rank": rank, "scale": 20.0, "dropout": 0.0})
    mx.eval(model.parameters())
    return model


def make_pairs(count, prompt, response, vocabulary, seed=0):
    """`count` pairs of random tokens, all prompts and all responses of one length."""
    return [Pair(*row) for row in make_rows(count, prompt, response, vocabulary, seed)]


def model_flops(model, prompt, response, pairs):
    """Floating-point operations that a LoRA step of `pairs` pairs cannot do without.

    Each prompt once, both responses, the head on response positions; two products forward and two backward
    (no gradient of frozen weights), and causal attention.
    """
    args = model.args
    head_dim = args.head_dim or args.hidden_size // args.num_attention_heads
    per_layer = args.hidden_size * head_dim * (2 * args.num_attention_heads + 2 * args.num_key_value_heads)
    width = CHOSEN * EXPERT_WIDTH if hasattr(args, "num_experts") else args.intermediate_size
    per_layer += 3 * args.hidden_size * width
    tokens = prompt + 2 * response
    attended = prompt**2 / 2 + 2 * (response * prompt + response**2 / 2)
    dense = 2 * tokens * per_layer * args.num_hidden_layers
    attention = 4 * attended * args.num_attention_heads * head_dim * args.num_hidden_layers
    head = 2 * 2 * response * args.hidden_size * args.vocab_size
    # Backward: one product for each dense layer's input, two for each of attention's.
    return pairs * (2 * dense + 3 * attention + 2 * head)


def matmul_rate(dtype, size=8192, repeats=10):
    """Floating-point operations a second of a square product."""
    a, b = (mx.random.normal((size, size)).astype(dtype) for _ in range(2))
    mx.eval(a @ b)
    best = float("inf")
    for _ in range(repeats):
        tic = time.perf_counter()
        mx.eval(a @ b)
        best = min(best, time.perf_counter() - tic)
    return 2 * size**3 / best


def measure_step(model, pairs, steps=10, warmup=5, compiled=False, share_prompt=True, response_only=True,
                 checkpoint=False, online_reference=False, loss="dpo", together=None, waits=True):  # fmt: skip
    """Time a training step on one batch.

    Args:
        waits: whether a step is laid out when the one before is done; without, it is while that one runs, as in a run,
            and `ms` is a mean.

    Returns:
        A dict of `ms` a step, `laid_out_ms` of these until its graph is there, and `cpu_ms` of the processor (medians),
        `pairs_per_second`, `peak_gb`, and `tokens` run by the body.
    """
    scorer = Scorer(model, share_prompt, response_only, together)
    optimizer = optim.Adam(1e-5)
    step = Step(model, optimizer, Objective(scorer, preference_loss(loss)), compiled, together=not checkpoint)
    batch, processed, _ = make_batch(pairs, scorer.arrangement)
    reference = mx.zeros((len(pairs), 2, 2))
    model.train()
    seconds, laid_out, cpu_seconds, earlier = [], [], [], reference
    layers = checkpointed_layers(model) if checkpoint else nullcontext()
    with layers, bounded_memory() as evaluate:
        for i in range(warmup + steps):
            if i == warmup:
                mx.reset_peak_memory()
            tic, cpu_tic = time.perf_counter(), time.process_time()
            if online_reference:
                logps = scorer(batch)
                reference = mx.stack([logps.total, logps.common], axis=-1).reshape(2, len(pairs), 2).transpose(1, 0, 2)
                mx.eval(reference)
            laid_out_tic = time.perf_counter()
            sums, _ = step(batch, reference, True)
            work = [step.state(), sums]
            laid_out.append(time.perf_counter() - laid_out_tic)
            evaluate(work, wait=waits or i == warmup - 1)
            mx.eval(earlier)
            earlier = sums
            seconds.append(time.perf_counter() - tic)
            cpu_seconds.append(time.process_time() - cpu_tic)
        tic = time.perf_counter()
        mx.eval(work)
        rest = time.perf_counter() - tic
    median = float(np.median(seconds[warmup:])) if waits else (sum(seconds[warmup:]) + rest) / steps
    return {
        "ms": 1000 * median,
        "laid_out_ms": 1000 * float(np.median(laid_out[warmup:])),
        "cpu_ms": 1000 * float(np.median(cpu_seconds[warmup:])),
        "pairs_per_second": len(pairs) / median,
        "peak_gb": mx.get_peak_memory() / 1e9,
        "tokens": processed,
        "weights_gb": sum(value.nbytes for _, value in tree_flatten(model.parameters())) / 1e9,
    }


def measure(shape, prompt, response, pairs=4, vocabulary=None, layers=None, bits=None, trained_layers=None,
            experts=None, device=None, compiled=None, **options):  # fmt: skip
    """Measure a step of a shape on the default device, and the share of its matmul rate that the step reaches.

    Args:
        shape, vocabulary, layers, bits, trained_layers, experts: as for `make_llama`; in bfloat16 on a GPU and float32
            on a CPU.
        prompt, response: their lengths in tokens.
        pairs: pairs a step.
        device: "cpu" or "gpu", or None for the default one.
        compiled: whether to compile the step, or None for what a run would choose.
        options: for `measure_step`.

    Returns:
        `measure_step`'s dict with `device`, `flops` a step, the measured `rate` and the `share` of it.
    """
    prepare_for_training()
    if device is not None:
        mx.set_default_device(getattr(mx, device))
    on_gpu = mx.default_device() == mx.gpu
    dtype = mx.bfloat16 if on_gpu else mx.float32
    rate = matmul_rate(dtype, 8192 if on_gpu else 1024)
    told = {"layers": layers, "bits": bits, "trained_layers": trained_layers, "experts": experts}
    model = make_llama(shape, dtype, vocabulary, **told)
    batch = make_pairs(pairs, prompt, response, model.args.vocab_size)
    result = measure_step(model, batch, compiled=on_gpu if compiled is None else compiled, **options)
    flops = model_flops(model, prompt, response, pairs)
    share = flops / (result["ms"] / 1000) / rate
    name = mx.device_info().get("device_name", str(mx.default_device()))
    return result | {"device": name, "kind": "gpu" if on_gpu else "cpu", "flops": flops, "rate": rate, "share": share}


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))

"""What gated delta layers cost in a preference step, with upstream's loop over tokens and in chunks.

    python benchmarks/recurrent.py cpu          # a Qwen3.5 of 2 layers: memory, growth, speed; float32
    python benchmarks/recurrent.py relatives    # memory a token of all recurrent architectures
    python benchmarks/recurrent.py gpu          # Qwen3.5-0.8B's shape, bfloat16, LoRA on all linear layers
    python benchmarks/recurrent.py shared       # the Qwen3.5 of 2 layers with prompts run once, and once a response

Weights are random. Each setting runs in a process of its own. Numbers go to results/recurrent.json beside this file, a
key a mode; `tables.py` puts them into the documents. `--shape tiny` tries a mode in seconds and keeps nothing.
"""

import argparse
import json
import resource
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

from common import HERE, own_environment, run_json, say

RESULTS = HERE / "results" / "recurrent.json"
# Hidden, layers, intermediate, attention heads, their key-value heads and width, gated delta heads and width, every
# how many layers attention comes, vocabulary. Qwen3.5-0.8B's numbers are its published configuration's.
SHAPES = {
    "0.8b": (1024, 24, 3584, 8, 2, 256, 16, 128, 4, 248320),
    # The same widths with one layer of each kind.
    "2-layers": (1024, 2, 3584, 8, 2, 256, 16, 128, 2, 32768),
    "tiny": (64, 2, 128, 4, 2, 16, 2, 32, 2, 512),
}
LENGTHS = (512, 1024, 2048, 4096)
LARGEST_PROCESS = 12 * 2**30  # bytes


def qwen(shape, dtype, rank=8):
    """A random Qwen3.5 with LoRA on all linear layers of all blocks."""
    import mlx.core as mx
    from mlx_lm.tuner.utils import linear_to_lora_layers

    from mlx_lm.models import qwen3_5

    hidden, layers, intermediate, heads, kv_heads, head_dim, delta_heads, delta_dim, interval, words = SHAPES[shape]
    config = {
        "model_type": "qwen3_5_text",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "linear_num_key_heads": delta_heads,
        "linear_num_value_heads": delta_heads,
        "linear_key_head_dim": delta_dim,
        "linear_value_head_dim": delta_dim,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": interval,
        "vocab_size": words,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 262144,
        "partial_rotary_factor": 0.25,
        "rope_theta": 1e7,
    }
    mx.random.seed(0)
    model = qwen3_5.Model(qwen3_5.ModelArgs.from_dict({"model_type": "qwen3_5", "text_config": config}))
    model.set_dtype(dtype)
    model.freeze()
    linear_to_lora_layers(model, layers, {"rank": rank, "scale": 20.0, "dropout": 0.0})
    mx.eval(model.parameters())
    return model


def step_flops(model, shape, prompt, response, pairs):
    """Floating-point operations of the products that a LoRA step cannot do without.

    A prompt once, both responses, the head on response positions. Two products for a frozen weight (outputs, and
    gradients of inputs); causal attention's, and three for the gated delta rule's reading, update and output of a
    state, and twice both for their gradients.
    """
    from mlx_lm.tuner.lora import LoRALinear

    hidden, layers, _, heads, _, head_dim, delta_heads, delta_dim, interval, words = SHAPES[shape]
    tokens = prompt + 2 * response
    weights = sum(module.linear.weight.size for module in model.modules() if isinstance(module, LoRALinear))
    attended = prompt**2 / 2 + 2 * (response * prompt + response**2 / 2)
    attention = 4 * attended * heads * head_dim * (layers // interval)
    delta = 6 * tokens * delta_heads * delta_dim**2 * (layers - layers // interval)
    head = 2 * 2 * response * hidden * words
    return pairs * (2 * 2 * tokens * weights + 3 * (attention + delta) + 2 * head)


def loop(queries, keys, values, log_gates, betas, state=None, mask=None):
    """The recurrence as upstream trains it, in the place of the one in chunks."""
    import mlx.core as mx
    from mlx_lm.models.gated_delta import gated_delta_ops

    return gated_delta_ops(queries, keys, values, mx.exp(log_gates), betas, state, mask)


def measure_step(
    shape, prompt, response, pairs, recurrence, device, steps=3, warmup=1, compiled=False, share_prompt=True, waits=True
):
    """A preference step: `harness.measure_step`'s dict, with its floating-point operations and the matmul rate."""
    import harness
    import mlx.core as mx

    from mlx_lm._backend import prepare_for_training
    from mlx_lm.tuner.preference import pieces

    prepare_for_training()
    mx.set_default_device(getattr(mx, device))
    on_gpu = device == "gpu"
    dtype = mx.bfloat16 if on_gpu else mx.float32
    rate = harness.matmul_rate(dtype, 8192 if on_gpu else 1024)
    model = qwen(shape, dtype)
    if recurrence == "loop":
        pieces.gated_delta_rule = loop
    elif recurrence == "chunks":
        pieces.on_cuda = lambda: False  # where kernels stand in for them
    batch = harness.make_pairs(pairs, prompt, response, SHAPES[shape][-1])
    result = harness.measure_step(
        model, batch, steps=steps, warmup=warmup, compiled=compiled, share_prompt=share_prompt, waits=waits
    )
    flops = step_flops(model, shape, prompt, response, pairs)
    name = mx.device_info().get("device_name", str(mx.default_device()))
    share = flops / (result["ms"] / 1000) / rate
    return result | {"device": name, "flops": flops, "rate": rate, "share": share}


# States much wider than what else there is of a token, so that a state kept for each token shows.
WIDE = {
    "falcon_h1": {"mamba_d_state": 64},
    "granitemoehybrid": {"mamba_d_state": 64},
    "jamba": {"mamba_d_state": 64},
    "mamba": {"state_size": 64},
    "falcon_mamba": {"state_size": 64},
    "mamba2": {"state_size": 64},
    "nemotron_h": {"ssm_state_size": 64},
    "plamo2": {"mamba_d_state": 64},
    "qwen3_5": {"linear_key_head_dim": 64, "linear_value_head_dim": 64},
    "qwen3_next": {"linear_key_head_dim": 64, "linear_value_head_dim": 64},
    "olmo_hybrid": {"linear_key_head_dim": 64, "linear_value_head_dim": 64},
    "kimi_linear": {
        "linear_attn_config": {"num_heads": 4, "head_dim": 64, "kda_layers": [1], "short_conv_kernel_size": 4}
    },
    "rwkv7": {"hidden_size": 128, "head_dim": 64},
    "bailing_moe_linear": {"head_dim": 64},
    "bailing_hybrid": {"head_dim": 64},
    "bailing_moe_v3": {"head_dim": 64},
}
RELATIVES = (*WIDE, "lfm2", "lfm2_moe", "baichuan_m1", "gear", "minimax")


def measure_relative(name, length, chunked, device="cpu"):
    """KB a token above weights of a small model's forward and backward pass, and its seconds.

    Attention is left out: it would be most of it. Its values stand for its outputs.
    """
    # Jamba's loop grows with the square of the length: it must not take the machine down.
    if device == "cpu":
        resource.setrlimit(resource.RLIMIT_AS, (LARGEST_PROCESS,) * 2)
    sys.path.insert(0, str(HERE.parent / "tests"))
    import mlx.core as mx
    import mlx.nn as nn
    from architectures import make_model
    from mlx_lm.tuner.utils import linear_to_lora_layers

    from mlx_lm._backend import prepare_for_training
    from mlx_lm.tuner.preference.pieces import recurrences_in_pieces

    prepare_for_training()
    mx.set_default_device(getattr(mx, device))

    def without_scores(queries, keys, values, **_):
        return mx.repeat(values, queries.shape[1] // values.shape[1], axis=1)

    model = make_model(name, **WIDE.get(name, {}))
    mx.fast.scaled_dot_product_attention = without_scores
    model.train()
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), {"rank": 4, "scale": 2.0, "dropout": 0.0})
    tokens = mx.random.randint(0, 101, (1, length))
    with recurrences_in_pieces(model.modules()) if chunked else nullcontext():
        peaks = []
        for _ in range(2):
            mx.synchronize()
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            tic = time.perf_counter()
            mx.eval(nn.value_and_grad(model, lambda model: mx.square(model(tokens)).mean())(model))
            peaks.append((mx.get_peak_memory() - before, time.perf_counter() - tic))
    peak, seconds = peaks[-1]
    return {"kb_a_token": peak / length / 1e3, "s": seconds}


def alone(function, timeout=150, **options):
    """A function of this file in a process of its own."""
    found = run_json([sys.executable, __file__, "one", json.dumps([function, options])], own_environment(), timeout)
    say(function, options, json.dumps(found))
    return found


def keep(mode, measured):
    """Put what a mode measured into the file of results."""
    RESULTS.parent.mkdir(exist_ok=True)
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if mode.startswith("relatives"):
        rows = {row["type"]: row for row in [*kept.get(mode, []), *measured]}
        measured = [rows[name] for name in RELATIVES if name in rows]
    RESULTS.write_text(json.dumps(kept | {mode: measured}, indent=1) + "\n")


def measure_steps(settings):
    """The settings with what `measure_step` says of each."""
    return [setting | alone("measure_step", **setting) for setting in settings]


def run_cpu(options):
    fixed = {"shape": options.shape or "2-layers", "response": 128, "pairs": 1, "device": "cpu", "steps": 2}
    # As mlx-lm runs it, each prompt for each of its responses.
    settings = [fixed | {"recurrence": "loop", "prompt": 512, "share_prompt": False}]
    settings += [fixed | {"recurrence": "chunks", "prompt": prompt} for prompt in LENGTHS]
    return measure_steps(settings)


def run_shared(options):
    fixed = {"shape": options.shape or "2-layers", "recurrence": "chunks", "device": "cpu", "steps": 3}
    measured = []
    for prompt, response, pairs in ((512, 128, 2), (256, 192, 4), (64, 192, 4)):
        setting = fixed | {"prompt": prompt, "response": response, "pairs": pairs}
        both = [alone("measure_step", **setting, share_prompt=share) for share in (True, False)]
        row = setting | {"device": both[0].get("device")}
        row |= {key: [result.get(key) for result in both] for key in ("ms", "peak_gb", "tokens")}
        measured.append(row)
    return measured


def run_gpu(options):
    shape, device = options.shape or "0.8b", options.device or "gpu"
    fixed = {"shape": shape, "prompt": 1024, "response": 256, "pairs": 2, "device": device}
    short = fixed | {"prompt": 128, "response": 32}
    return measure_steps(
        [
            fixed | {"recurrence": "rule", "compiled": True, "steps": 10, "warmup": 5},
            fixed | {"recurrence": "rule", "compiled": True, "steps": 10, "warmup": 5, "waits": False},
            fixed | {"recurrence": "chunks", "compiled": True, "steps": 10, "warmup": 5},
            fixed | {"recurrence": "rule", "compiled": False, "steps": 10, "warmup": 5},
            # The loop keeps a state of 1 MB a token, layer and sequence: what fits, then what was asked for.
            short | {"recurrence": "rule", "compiled": False, "steps": 5, "warmup": 2},
            short | {"recurrence": "loop", "compiled": False, "steps": 1, "warmup": 1},
            fixed | {"recurrence": "loop", "compiled": False, "steps": 1, "warmup": 1},
        ]
    )


def run_relatives(options):
    device = options.device or "cpu"

    def row_of(name):
        return {"type": name} | {
            f"{'chunks' if chunked else 'upstream'}_{length}": alone(
                "measure_relative", name=name, length=length, chunked=chunked, device=device
            )
            for chunked in (False, True)
            for length in (512, 2048)
        }

    with ThreadPoolExecutor(options.jobs) as pool:
        return list(pool.map(row_of, options.types.split(",") if options.types else RELATIVES))


def main():
    if sys.argv[1:2] == ["one"]:
        function, options = json.loads(sys.argv[2])
        print(json.dumps(globals()[function](**options)))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=("cpu", "gpu", "relatives", "shared"))
    parser.add_argument("--shape", choices=SHAPES, help="instead of the mode's")
    parser.add_argument("--types", help="for relatives: some, with commas between; others keep what they had")
    parser.add_argument("--device", choices=("cpu", "gpu"), help="for relatives (cpu), and for gpu, to try it without")
    parser.add_argument("--jobs", type=int, default=1, help="for relatives: processes beside each other")
    options = parser.parse_args()
    measured = {"cpu": run_cpu, "gpu": run_gpu, "relatives": run_relatives, "shared": run_shared}[options.mode](options)
    if options.shape != "tiny":
        keep("relatives_gpu" if options.mode == "relatives" and options.device == "gpu" else options.mode, measured)


if __name__ == "__main__":
    main()

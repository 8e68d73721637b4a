"""The peak memory of a training step under several settings, into results/memory_cpu.json.

    python benchmarks/memory.py            # a CPU: a Llama of 135 M parameters in float32; some two minutes

Each setting is a step of its own process: LoRA of rank 8 on all linear layers, pairs of random tokens.
"""

import json

from common import own_step, say
from records import RESULTS, keep

# What a configuration says: what `harness.measure` gets.
SETTINGS = (
    ("4 pairs, 192 + 64 tokens, defaults", {}),
    ("`batch_size: 1` (`grad_accumulation_steps: 4` for the same update)", {"pairs": 1}),
    ("`max_seq_length: 128` (96 + 32)", {"prompt": 96, "response": 32}),
    ("`share_prompt: false`", {"share_prompt": False}),
    ("`grad_checkpoint: true`", {"checkpoint": True}),
    ("`num_layers: 8`", {"trained_layers": 8}),
    ("4-bit weights", {"bits": 4}),
    ("4-bit weights, `grad_checkpoint: true`, `batch_size: 1`", {"bits": 4, "checkpoint": True, "pairs": 1}),
)


def measure(name, changed):
    """GB that a step's arrays held at most, and GB of weights."""
    spec = {"shape": "135m", "device": "cpu", "pairs": 4, "prompt": 192, "response": 64, "steps": 1, "warmup": 0}
    found = own_step(spec | changed)
    say(f"{name}: {json.dumps(found)}")
    return {"setting": name} | {key: found[key] for key in ("peak_gb", "weights_gb", "tokens")}


if __name__ == "__main__":
    keep(RESULTS / "memory_cpu.json", [measure(*setting) for setting in SETTINGS])

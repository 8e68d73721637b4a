"""What a layer keeps of a token in a training step, into results/macs.json; LORA.md's table for Macs comes from it.

    python benchmarks/macs.py            # a CPU: some minutes

A step of a random Llama with one and with two layers of a model's own size, 1 pair, LoRA of rank 8 on all linear
layers, in float32, with and without `grad_checkpoint`: what the second layer adds is a layer's share, the rest is
fixed. `tables.py` takes from two sizes how a layer's share grows with the widths of model and MLP, halves it for
half precision, and adds up. A model in 4 bit has 4.5 bits a weight (groups of 64 with a scale and a bias in 16 bit);
LoRA's float32 matrices count four times, for gradient and Adam's two moments.
"""

import json

from common import SHAPES, own_step, say
from records import RESULTS, keep

PROMPT, RESPONSE = 256, 128
MEASURED = ("135m", "1b")


def parameters(shape):
    """`(model's, LoRA's)` numbers of parameters."""
    hidden, layers, intermediate, heads, kv_heads, words = SHAPES[shape]
    sizes = [(hidden, hidden)] * 2 + [(hidden, hidden * kv_heads // heads)] * 2 + [(hidden, intermediate)] * 3
    # The larger Llamas have an output head of their own.
    return words * hidden * (2 if shape == "8b" else 1) + layers * sum(a * b for a, b in sizes), layers * 8 * sum(
        a + b for a, b in sizes
    )


def measure(shape, checkpoint):
    """Bytes a token that a layer keeps, and bytes that a step takes besides weights and layers; float32."""
    above = []
    for layers in (1, 2):
        spec = {"shape": shape, "prompt": PROMPT, "response": RESPONSE, "pairs": 1, "layers": layers, "device": "cpu"}
        found = own_step(spec | {"steps": 1, "warmup": 0, "checkpoint": checkpoint}, timeout=900)
        say(f"{shape}, {layers} layers: {json.dumps(found)}")
        above.append(1e9 * (found["peak_gb"] - found["weights_gb"]))
    return {"layer": (above[1] - above[0]) / found["tokens"], "fixed": 2 * above[0] - above[1]}


if __name__ == "__main__":
    rows = [{"shape": shape, "kept": measure(shape, False), "checkpointed": measure(shape, True)} for shape in MEASURED]
    keep(RESULTS / "macs.json", rows)

"""What a QLoRA step of larger models takes, from what one and two of their layers take, into results/macs.json.

    python benchmarks/macs.py            # a CPU: some minutes; 8 GB of memory
    python benchmarks/macs.py --only 3b

A step of a random Llama with one and with two layers of the model's own size, 1 pair, LoRA of rank 8 on all linear
layers, in float32: what the second layer adds is a layer's share of a token, the rest is fixed. In half precision each
takes half of that. A model in 4 bit has 4.5 bits a weight (groups of 64 with a scale and a bias in 16 bit); LoRA's
float32 matrices count four times, for gradient and Adam's two moments. `tables.py` adds these up.
"""

import argparse
import json

from common import SHAPES, own_step, say
from records import RESULTS, keep

PROMPT, RESPONSE = 256, 128
MODELS = ("135m", "1b", "3b", "8b")


def parameters(shape):
    """`(model's, LoRA's)` numbers of parameters."""
    hidden, layers, intermediate, heads, kv_heads, words = SHAPES[shape]
    sizes = [(hidden, hidden)] * 2 + [(hidden, hidden * kv_heads // heads)] * 2 + [(hidden, intermediate)] * 3
    return words * hidden + layers * sum(a * b for a, b in sizes), layers * 8 * sum(a + b for a, b in sizes)


def measure(shape, checkpoint):
    """Bytes a token that a layer keeps, and bytes a token that a step takes besides; float32."""
    above = []
    for layers in (1, 2):
        spec = {"shape": shape, "prompt": PROMPT, "response": RESPONSE, "pairs": 1, "layers": layers, "device": "cpu"}
        found = own_step(spec | {"steps": 1, "warmup": 0, "checkpoint": checkpoint}, timeout=900)
        say(f"{shape}, {layers} layers: {json.dumps(found)}")
        above.append(1e9 * (found["peak_gb"] - found["weights_gb"]) / found["tokens"])
    return {"layer": above[1] - above[0], "fixed": 2 * above[0] - above[1]}


def row_of(shape):
    """A model's row of the results."""
    model, lora = parameters(shape)
    _, layers, *_ = SHAPES[shape]
    found = {"kept": measure(shape, False), "checkpointed": measure(shape, True)}
    return {"model": shape, "parameters": model, "lora_parameters": lora, "layers": layers, "bytes_a_token": found}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=MODELS, help="print a model's row and keep nothing")
    only = parser.parse_args().only
    rows = [row_of(shape) for shape in ([only] if only else MODELS)]
    if only:
        print(json.dumps(rows[0], indent=1))
    else:
        keep(RESULTS / "macs.json", rows)


if __name__ == "__main__":
    main()

"""What a training step costs with and without each piece of it, into results/pieces_cpu.json or pieces_gpu.json.

    python benchmarks/pieces.py                                   # the default device
    python benchmarks/pieces.py --shape tiny --out pieces.json    # in seconds

A random Llama with LoRA of rank 8 on all linear layers, 4 pairs a step; each step in a process of its own.
"""

import argparse
import json
import sys

from common import SHAPES, lengths, own_step, say
from records import RESULTS, keep

# Name of a piece: the settings of `harness.measure` with it and without it.
PIECES = {
    "a prompt run once for both responses (`share_prompt`)": ({}, {"share_prompt": False}),
    "the vocabulary's projection on response positions alone": ({}, {"response_only": False}),
    "the reference's logps taken once, not in each step": ({}, {"online_reference": True}),
    "LoRA layers that read one input computed as one": ({"together": True}, {"together": False}),
    "a compiled step (`compile`)": ({"compiled": True}, {"compiled": False}),
    "layers computed again in the backward pass (`grad_checkpoint`)": ({"checkpoint": True}, {}),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--layers", type=int, help="instead of the shape's")
    parser.add_argument("--device", choices=("cpu", "gpu"), help="instead of the default one")
    parser.add_argument("--lengths", type=lengths, default="224/32,128/128", help="prompt/response, several by comma")
    parser.add_argument("--steps", type=int, default=3, help="timed steps")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds that one setting may take")
    parser.add_argument("--out", help="JSON file instead of the one of the device")
    options = parser.parse_args()
    fixed = {name: getattr(options, name) for name in ("shape", "layers", "device", "steps", "warmup")}
    rows, measured = [], {}
    for prompt, response in options.lengths:
        for piece, settings in PIECES.items():
            row = {"piece": piece, "prompt": prompt, "response": response}
            for when, setting in zip(("with", "without"), settings, strict=True):
                spec = fixed | {"prompt": prompt, "response": response} | setting
                key = json.dumps(spec)
                if key not in measured:
                    measured[key] = own_step(spec, options.timeout)
                    say(f"{key}: {json.dumps(measured[key])}")
                if "error" in measured[key]:
                    sys.exit(measured[key]["error"])
                row[when] = measured[key]
            rows.append(row)
    device = rows[0]["with"]["kind"]
    keep(options.out or RESULTS / f"pieces_{device}.json", rows)


if __name__ == "__main__":
    main()

"""How a training step's cost grows with prompt length, batch size and vocabulary, as one Markdown table.

    python benchmarks/scaling.py --shape 1b                       # a GPU; bfloat16
    python benchmarks/scaling.py --shape tiny --device cpu        # float32

One factor varies at a time, the others stay at the base setting. Each setting runs in a process of its own. Tokens are
those that the model's body runs over: each prompt once, both responses, padding. "above weights" is the peak memory
of the timed steps less the model's weights.
"""

import argparse
import json
import sys

from common import SHAPES, own_step, print_head, print_row, say
from records import keep

FACTORS = {
    "prompt": (128, 256, 512, 1024, 2048, 4096),
    "pairs": (1, 2, 4, 8, 16),
    "vocabulary": (32768, 65536, 131072, 262144),
}


def numbers(text):
    return [int(number) for number in text.split(",")]


def settings(base, varied):
    """Yield `(factor, value, setting)` with one factor varied at a time; the base setting comes in each factor."""
    for factor, values in varied.items():
        for value in values:
            yield factor, value, base | {factor: value}


def cells(result):
    """The table cells of a measured setting."""
    tokens = result["tokens"]
    above = result["peak_gb"] - result["weights_gb"]
    return (
        tokens,
        f"{result['ms']:.1f}",
        f"{result['pairs_per_second']:.2f}",
        f"{1000 * result['ms'] / tokens:.1f}",
        f"{result['peak_gb']:.3f}",
        f"{1e6 * above / tokens:.1f}",
        f"{result['share']:.3f}",
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--layers", type=int, help="instead of the shape's")
    parser.add_argument("--device", choices=("cpu", "gpu"), help="instead of the default one")
    parser.add_argument("--response", type=int, default=128)
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--base", type=json.loads, default={"prompt": 512, "pairs": 4, "vocabulary": 32768})
    parser.add_argument("--timeout", type=float, default=150.0, help="seconds that one setting may take")
    parser.add_argument("--out", help="JSON file for the results")
    for factor, values in FACTORS.items():
        default = ",".join(map(str, values))
        parser.add_argument(f"--{factor}", type=numbers, default=default, help="values to try; 0 leaves it out")
    options = parser.parse_args()
    base = options.base
    fixed = {name: vars(options)[name] for name in ("shape", "layers", "device", "response", "steps", "warmup")}
    varied = {factor: [v for v in vars(options)[factor] if v] for factor in FACTORS}
    print_head(
        "varied", "value", "tokens", "ms a step", "pairs/s", "us a token", "peak GB", "KB a token above weights",
        "of the matmul rate",
    )  # fmt: skip
    measured, rows = {}, []
    for factor, value, setting in settings(base, varied):
        key = json.dumps(setting)
        if key not in measured:
            measured[key] = own_step(fixed | setting, options.timeout)
            say(f"{key}: {json.dumps(measured[key])}")
        result = measured[key]
        print_row(factor, value, *(cells(result) if "ms" in result else ["not run: " + result["error"], *["-"] * 6]))
        if "ms" in result:
            rows.append({"factor": factor, "value": value} | result)
        if options.out:
            keep(options.out, rows)
    device = next((result["device"] for result in measured.values() if "device" in result), "nothing ran")
    print(f"\n{' '.join(sys.argv[1:])}: {device}; base setting {base}, responses of {options.response} tokens.")


if __name__ == "__main__":
    main()

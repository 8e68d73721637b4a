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

from common import SHAPES, by_comma, own_step, say
from records import keep
from tables import scaling_table

FACTORS = {
    "prompt": (128, 256, 512, 1024, 2048, 4096),
    "pairs": (1, 2, 4, 8, 16),
    "vocabulary": (32768, 65536, 131072, 262144),
}


def settings(base, varied):
    """Yield `(factor, value, setting)` with one factor varied at a time; the base setting comes in each factor."""
    for factor, values in varied.items():
        for value in values:
            yield factor, value, base | {factor: value}


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
        parser.add_argument(f"--{factor}", type=by_comma(int), default=default, help="values to try; 0 leaves it out")
    options = parser.parse_args()
    base = options.base
    fixed = {name: vars(options)[name] for name in ("shape", "layers", "device", "response", "steps", "warmup")}
    varied = {factor: [v for v in vars(options)[factor] if v] for factor in FACTORS}
    measured, rows = {}, []
    for factor, value, setting in settings(base, varied):
        key = json.dumps(setting)
        if key not in measured:
            measured[key] = own_step(fixed | setting, options.timeout)
            say(f"{key}: {json.dumps(measured[key])}")
        if "ms" in measured[key]:
            rows.append({"factor": factor, "value": value} | measured[key])
            found = keep(options.out, rows)
    if not rows:
        sys.exit("nothing was measured")
    print(scaling_table(found))


if __name__ == "__main__":
    main()

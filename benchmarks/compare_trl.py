"""Compare our training step with TRL's DPOTrainer on this machine, as one Markdown table.

    python benchmarks/compare_trl.py                                          # one GPU, some four minutes
    python benchmarks/compare_trl.py --shape tiny --lengths 64/32 --steps 3 --python PYTHON_WITH_TRL    # on a CPU

Both train LoRA of rank 8 on all linear layers of a random Llama of the same shape on pairs of the same lengths: in
bfloat16 on a GPU and float32 on a CPU, without clipping, and without gradient checkpointing but where a row says so.
Each setting runs in a process of its own, ours and TRL's in turn. Peak memory is what the arrays or tensors of the
timed steps held at most; for TRL on a CPU it is the process's. The last column is the floating-point operations that a
step cannot do without, over its time, over those that a large product of the same type reaches.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

from common import HERE, SHAPES, lengths, own_step, print_head, print_row, run_json, say
from programs import command_line, machine, versions

OURS = {
    "ours": {},
    "ours, each prompt twice": {"share_prompt": False},
    "ours, grad_checkpoint": {"checkpoint": True},
}
TRL = {
    "TRL, precomputed": "precomputed",
    "TRL, precomputed, Liger": "precomputed+liger",
    "TRL, online": "online",
}
# Ours and TRL's in turn, the ones that matter most first.
ORDER = ("ours", "TRL, precomputed", "ours, each prompt twice", "TRL, precomputed, Liger", "ours, grad_checkpoint",
         "TRL, online")  # fmt: skip


def measure(name, prompt, response, options):
    """What one setting costs, measured in a process of its own."""
    timeout = options.timeout
    if name in OURS:
        spec = {
            "shape": options.shape,
            "prompt": prompt,
            "response": response,
            "pairs": options.pairs,
            "steps": options.steps,
            "warmup": options.warmup,
        }
        return own_step(spec | OURS[name], timeout)
    command = [options.python, HERE / "trl_step.py", "--settings", TRL[name], "--shape", options.shape]
    for option, value in (("prompt", prompt), ("response", response)):
        command += [f"--{option}", value]
    for option in ("pairs", "steps", "warmup"):
        command += [f"--{option}", getattr(options, option)]
    return run_json(command, {"HF_HUB_OFFLINE": "1"}, timeout)


def rounds_of(prompt, response, options, started):
    """`{setting: result}`, each the median of its rounds."""
    found = {}
    for _ in range(options.rounds):
        for name in [name for name in ORDER if name in options.settings]:
            result = measure(name, prompt, response, options)
            found.setdefault(name, []).append(result)
            say(f"[{time.perf_counter() - started:.0f} s] {prompt}/{response} {name}: {json.dumps(result)}")
    return {name: middle(results) for name, results in found.items()}


def middle(results):
    """The result of median time, or an error where every one is an error."""
    sound = [result for result in results if "ms" in result]
    if not sound:
        return results[0]
    median = statistics.median_low(result["ms"] for result in sound)
    return next(result for result in sound if result["ms"] == median)


def print_results(prompt, response, results):
    """Print a table row for each setting."""
    speeds = {name: result["pairs_per_second"] for name, result in results.items() if "ms" in result}
    fastest = max((speed for name, speed in speeds.items() if name in TRL), default=None)
    work = [result for result in results.values() if "flops" in result]
    for name, result in results.items():
        if "ms" not in result:
            print_row(f"{prompt}/{response}", name, "not run: " + result["error"], *["-"] * 4)
            continue
        ratio = "-" if fastest is None else f"{speeds[name] / fastest:.2f}"
        share = "-"
        if work:
            rate = max(result["rate"] for result in work)
            share = f"{work[0]['flops'] / (result['ms'] / 1000) / rate:.3f}"
        cells = (f"{result['ms']:.0f}", f"{speeds[name]:.2f}", f"{result['peak_gb']:.2f}", ratio, share)
        print_row(f"{prompt}/{response}", name, *cells)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--lengths", type=lengths, default="256/256,1024/256", help="prompt/response, several by comma")
    parser.add_argument("--pairs", type=int, default=4, help="pairs a step")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=1, help="times that each setting is measured; the median counts")
    parser.add_argument("--settings", type=lambda text: text.split(";"), default=";".join(ORDER), help="by semicolon")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has TRL")
    parser.add_argument("--timeout", type=float, default=150.0, help="seconds that one process may take")
    parser.add_argument("--out", help="JSON file for the results")
    options = parser.parse_args()
    unknown = set(options.settings) - set(ORDER)
    if unknown:
        parser.error(f"no such setting: {', '.join(sorted(unknown))}; there are {'; '.join(ORDER)}")
    started = time.perf_counter()
    print_head("tokens", "setting", "ms a step", "pairs/s", "peak GB", "of TRL's fastest", "of the matmul rate")
    found = {"machine": machine(), "versions": versions() | versions(options.python), "command": command_line()}
    found |= {"shape": options.shape, "pairs": options.pairs, "rows": []}
    results = {}
    for prompt, response in options.lengths:
        results = rounds_of(prompt, response, options, started)
        print_results(prompt, response, results)
        found["rows"] += [
            result | {"prompt": prompt, "response": response, "setting": name} for name, result in results.items()
        ]
        if options.out:
            Path(options.out).write_text(json.dumps(found, indent=1) + "\n")
    for result in results.values():
        if "rate" in result:
            print(f"\n{result['device']}; a product reaches {result['rate'] / 1e12:.3g} TFLOP/s.")
            break


if __name__ == "__main__":
    main()

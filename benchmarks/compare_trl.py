"""Compare our training step with TRL's DPOTrainer on this machine, as one Markdown table.

    python benchmarks/compare_trl.py                                          # one GPU, some four minutes
    python benchmarks/compare_trl.py --shape tiny --lengths 64/32 --steps 3 --python PYTHON_WITH_TRL    # on a CPU

Both train LoRA of rank 8 on all linear layers of a random Llama of the same shape on pairs of the same lengths: in
bfloat16 on a GPU and float32 on a CPU, without clipping, and without gradient checkpointing but where a row says so.
Each setting runs in a process of its own, ours and TRL's in turn. Peak memory is what the arrays or tensors of the
timed steps held at most; for TRL on a CPU it is the process's. The last column is the floating-point operations that a
step cannot do without, over its time, over those that a large product of the same type reaches. What does not run is
told on stderr.
"""

import argparse
import json
import sys

from common import HERE, SHAPES, lengths, own_step, run_json, say
from records import keep
from tables import trl_step_table

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
    command = [options.python, HERE / "trl_step.py", "--setting", TRL[name], "--shape", options.shape]
    for option, value in (("prompt", prompt), ("response", response)):
        command += [f"--{option}", value]
    for option in ("pairs", "steps", "warmup"):
        command += [f"--{option}", getattr(options, option)]
    return run_json(command, {"HF_HUB_OFFLINE": "1"}, timeout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--lengths", type=lengths, default="256/256,1024/256", help="prompt/response, several by comma")
    parser.add_argument("--pairs", type=int, default=4, help="pairs a step")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--settings", type=lambda text: text.split(";"), default=";".join(ORDER), help="by semicolon")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has TRL")
    parser.add_argument("--timeout", type=float, default=150.0, help="seconds that one process may take")
    parser.add_argument("--out", help="JSON file for the results")
    options = parser.parse_args()
    if "ours" not in options.settings or not set(options.settings) <= set(ORDER):
        parser.error(f"settings are ours, beside which the others are told, and some of {'; '.join(ORDER)}")
    rows = []
    for prompt, response in options.lengths:
        for name in [name for name in ORDER if name in options.settings]:
            result = measure(name, prompt, response, options)
            say(f"{prompt}/{response} {name}: {json.dumps(result)}")
            if "ms" in result:
                rows.append(result | {"prompt": prompt, "response": response, "setting": name})
                found = keep(options.out, rows, options.python)
            elif name == "ours":
                sys.exit(1)
    print(trl_step_table(found))


if __name__ == "__main__":
    main()

"""The peak memory of a training step under several settings, into results/memory_cpu.json.

    python benchmarks/memory.py            # a CPU: a Llama of 135 M parameters in float32; some two minutes
    python benchmarks/memory.py --only 7   # one setting, by its number

Each setting is a step of its own process: LoRA of rank 8 on all linear layers, pairs of random tokens.
"""

import argparse
import json
import sys

from common import HERE, own_environment, run_json, say
from records import RESULTS, keep

SHAPE = "135m"
# What a configuration says: what `harness.measure_step` and `make_llama` get.
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


def measure(number, shape=SHAPE):
    """GB that a step's arrays held at most, and GB of weights, in this process."""
    sys.path.insert(0, str(HERE.parent))
    from harness import make_llama, make_pairs, measure_step

    name, changed = SETTINGS[number]
    setting = {"pairs": 4, "prompt": 192, "response": 64} | changed
    model = make_llama(shape, bits=setting.pop("bits", None), trained_layers=setting.pop("trained_layers", None))
    lengths = (setting.pop(key) for key in ("pairs", "prompt", "response"))
    batch = make_pairs(*lengths, model.args.vocab_size)
    found = measure_step(model, batch, steps=1, warmup=0, **setting)
    return {"setting": name, "peak_gb": found["peak_gb"], "weights_gb": found["weights_gb"], "tokens": found["tokens"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=int, help="the number of a setting, to print it and keep nothing")
    only = parser.parse_args().only
    if only is not None:
        print(json.dumps(measure(only)))
        return
    rows = []
    for number in range(len(SETTINGS)):
        rows.append(run_json([sys.executable, HERE / "memory.py", "--only", number], own_environment()))
        say(json.dumps(rows[-1]))
    keep(RESULTS / "memory_cpu.json", rows)


if __name__ == "__main__":
    main()

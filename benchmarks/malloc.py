"""How long the host takes to lay out a compiled step's graph, with the C library's malloc and with others.

    python benchmarks/malloc.py --libraries libjemalloc.so.2,libmimalloc.so.2
    python benchmarks/malloc.py --shape 1b --steps 40    # on a GPU, whose whole step counts

A random Llama with LoRA of rank 8 on all linear layers. Each process has one library, by LD_PRELOAD, and they take
turns. On a CPU the step is computed as well, which says little of a GPU's.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

from common import HERE, SHAPES, own_environment, print_head, print_row, run_json, say
from records import RESULTS, keep


def measure(library, shape, layers, pairs, prompt, response, steps):
    """Milliseconds of `steps` steps, one after another: `laid_out` without the device, and `step` with it."""
    if library not in Path("/proc/self/maps").read_text():
        return {"error": f"{library} was not loaded: is it installed?"}
    import harness
    import mlx.core as mx
    import mlx.optimizers as optim

    from mlx_lm._backend import prepare_for_training
    from mlx_lm.tuner.preference.batches import make_batch
    from mlx_lm.tuner.preference.logps import Scorer
    from mlx_lm.tuner.preference.objective import preference_loss
    from mlx_lm.tuner.preference.step import Objective, Step

    prepare_for_training()
    dtype = mx.bfloat16 if mx.default_device() == mx.gpu else mx.float32
    model = harness.make_llama(shape, dtype, layers=layers)
    step = Step(model, optim.Adam(1e-5), Objective(Scorer(model), preference_loss("dpo")), compiled=True)
    rows = harness.make_pairs(pairs, prompt, response, model.args.vocab_size)
    batch, reference = make_batch(rows, step.objective.scorer.arrangement)[0], mx.zeros((pairs, 2, 2))
    model.train()
    found = {"laid_out": [], "step": []}
    for number in range(-5, steps):
        begun = time.perf_counter()
        sums, _ = step(batch, reference, True)
        laid_out = time.perf_counter()
        mx.eval(step.state(), sums)
        if number >= 0:
            found["laid_out"].append(1000 * (laid_out - begun))
            found["step"].append(1000 * (time.perf_counter() - begun))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--response", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--libraries", default="libjemalloc.so.2,libmimalloc.so.2", help="several by comma")
    parser.add_argument("--out", default=RESULTS / "malloc.json")
    options = parser.parse_args()
    names = ("shape", "layers", "pairs", "prompt", "response", "steps")
    spec = {name: getattr(options, name) for name in names}
    rows = {library: {"malloc": library, "laid_out": [], "step": []} for library in ["", *options.libraries.split(",")]}
    for _ in range(options.rounds):
        for library, row in rows.items():
            environment = own_environment()
            preloaded = filter(None, [library, environment["LD_PRELOAD"]])
            code = f"import json, malloc; print(json.dumps(malloc.measure({library!r}, **{spec})))"
            environment |= {"LD_PRELOAD": ":".join(preloaded)}
            environment["PYTHONPATH"] = f"{HERE}:{environment['PYTHONPATH']}"
            found = run_json([sys.executable, "-c", code], environment)
            if "error" in found:
                sys.exit(found["error"])
            for kind in ("laid_out", "step"):
                row[kind].append(statistics.median(found[kind]))
            say(library or "C library", row)
    print_head("malloc", "graph laid out, ms", "step, ms")
    for library, row in rows.items():
        times = (", ".join(f"{ms:.1f}" for ms in row[kind]) for kind in ("laid_out", "step"))
        print_row(library or "C library", *times)
    keep(options.out, list(rows.values()))


if __name__ == "__main__":
    main()

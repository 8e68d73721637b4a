"""How long the host takes to lay out a compiled step's graph, with the C library's malloc and with others.

    python benchmarks/malloc.py --libraries libjemalloc.so.2,libmimalloc.so.2
    python benchmarks/malloc.py --shape 1b --prompt 128 --response 128 --steps 40    # on a GPU

A random Llama with LoRA of rank 8 on all linear layers. Each process has one library, by LD_PRELOAD, and they take
turns. On a CPU the step is computed as well, which says little of a GPU's.
"""

import argparse
import sys

from common import SHAPES, fast_blas, own_step, run_json, say
from records import RESULTS, keep
from tables import malloc_table

MEASURED = ("laid_out_ms", "ms")


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
    spec = {name: getattr(options, name) for name in names} | {"compiled": True}
    rows = [{"malloc": library} | {kind: [] for kind in MEASURED} for library in ["", *options.libraries.split(",")]]
    for _ in range(options.rounds):
        for row in rows:
            preloaded = {"LD_PRELOAD": ":".join(filter(None, [row["malloc"], fast_blas()["LD_PRELOAD"]]))}
            # Where a library is missing the loader says so and goes on without.
            code = f"import json; print(json.dumps({{'loaded': {row['malloc']!r} in open('/proc/self/maps').read()}}))"
            if not run_json([sys.executable, "-c", code], preloaded)["loaded"]:
                sys.exit(f"{row['malloc']} was not loaded: is it installed?")
            found = own_step(spec, environment=preloaded)
            if "error" in found:
                sys.exit(found["error"])
            for kind in MEASURED:
                row[kind].append(found[kind])
            say(row)
    print(malloc_table(keep(options.out, rows)))


if __name__ == "__main__":
    main()

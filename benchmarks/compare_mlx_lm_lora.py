"""Compare our preference training with mlx-lm-lora's `train_dpo` on this machine, as one Markdown table.

    python benchmarks/compare_mlx_lm_lora.py --python PYTHON_WITH_MLX_LM_LORA

Both train the same model folder on the same token pairs, with the same LoRA layers from the same seed, optimizer, batch
size and number of iterations, each through its own training loop, in turn, each run in a process of its own. Without
--model the folder holds a random Llama in float32: width 576, eight layers, 49,152 words. A step lasts from one of the
loop's reports to the next, the first ones left out, so that loading does not count. mlx-lm-lora runs its reference, a
second copy of the model, in each step; ours runs it before the first one: the columns "with reference" add a batch's
share of that pass. "peak GB" is what MLX's arrays held at most in the timed steps, "process GB" what the process did.
With --batches 1 both see the same batch at each step, and their losses, which stderr and --out have, agree. Off Metal,
mlx-lm-lora reads a device property that MLX does not have there: it is given one. It always compiles its step; the last
run has MLX's compiler off, in case that is faster on a CPU. On Linux, OpenBLAS is loaded first for both where there is
one.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from common import (
    SHAPES,
    by_comma,
    fast_blas,
    lengths,
    llama_config,
    make_rows,
    own_environment,
    peak_resident_gb,
    run_json,
    say,
)
from records import keep
from tables import mlx_lm_lora_table

LORA = {"rank": 8, "scale": 20.0, "dropout": 0.0}
# Name: what to run, its options, and variables of its process.
RUNS = {
    "ours": ("ours", {}, {}),
    "mlx-lm-lora": ("peer", {}, {}),
    "ours with each prompt twice": ("ours", {"share_prompt": False}, {}),
    "mlx-lm-lora not compiled": ("peer", {}, {"MLX_DISABLE_COMPILE": "1"}),
}


class Clock:
    """A training callback that both loops call after each step: wall time, losses and peak memory.

    Args:
        warmup: steps that do not count.
    """

    def __init__(self, warmup):
        self.warmup = warmup
        self.times, self.cpu_times, self.losses = [], [], []

    def on_train_loss_report(self, report):
        import mlx.core as mx

        self.times.append(time.perf_counter())
        self.cpu_times.append(time.process_time())
        self.losses.append(float(report["train_loss"]))
        if len(self.times) == self.warmup:
            mx.reset_peak_memory()

    def on_val_loss_report(self, report):
        pass

    def result(self):
        import mlx.core as mx

        return {
            "seconds": differences(self.times[self.warmup - 1 :]),
            "cpu_seconds": differences(self.cpu_times[self.warmup - 1 :]),
            "losses": self.losses,
            "peak_gb": mx.get_peak_memory() / 1e9,
            "resident_gb": peak_resident_gb(),
        }


def differences(times):
    return [end - start for start, end in zip(times, times[1:], strict=False)]


def load(folder):
    """The model with LoRA on all linear layers of all blocks, from one seed for both sides."""
    import mlx.core as mx
    from mlx_lm.tuner.utils import linear_to_lora_layers

    from mlx_lm.utils import load_model

    model, _ = load_model(Path(folder))
    model.freeze()
    mx.random.seed(0)
    linear_to_lora_layers(model, len(model.layers), LORA)
    mx.eval(model.parameters())
    return model


def write_model(folder, shape, layers):
    """A random Llama in float32 as a model folder."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from mlx_lm.models import llama

    config = llama_config(shape, layers=layers)
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    mx.save_safetensors(f"{folder}/model.safetensors", dict(tree_flatten(model.parameters())), {"format": "mlx"})
    (Path(folder) / "config.json").write_text(json.dumps(config))
    return {}


def run_ours(spec, rows, folder):
    """Train with this repository's loop."""
    import mlx.optimizers as optim

    from mlx_lm._backend import prepare_for_training
    from mlx_lm.tuner.datasets import Pair
    from mlx_lm.tuner.preference.logps import Scorer
    from mlx_lm.tuner.preference.reference import Reference
    from mlx_lm.tuner.trainer import TrainingArgs, train

    prepare_for_training()
    model = load(spec["model"])
    args = TrainingArgs(
        loss_type="dpo",
        batch_size=spec["pairs"],
        iters=spec["iters"],
        steps_per_report=1,
        steps_per_save=spec["iters"] + 1,
        adapter_file=f"{folder}/adapters.safetensors",
        **spec["options"],
    )
    pairs = [Pair(*row) for row in rows]
    tic = time.perf_counter()
    reference = Reference(Scorer(model, args.share_prompt), cache=f"{folder}/reference")
    reference.logps(pairs, range(len(pairs)))
    reference_seconds = time.perf_counter() - tic
    clock = Clock(spec["warmup"])
    train(model, optim.Adam(spec["learning_rate"]), pairs, None, args, training_callback=clock, reference=reference)
    return clock.result() | {"reference_seconds": reference_seconds * spec["pairs"] / spec["rows"]}


def run_peer(spec, rows, folder):
    """Train with mlx-lm-lora's loop."""
    import mlx.core as mx

    device_info = mx.device_info
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    mx.device_info = lambda *args: {"max_recommended_working_set_size": memory} | device_info(*args)

    import mlx.optimizers as optim
    from mlx_lm_lora.trainer.dpo_trainer import DPOTrainingArgs, train_dpo

    from mlx_lm.utils import load_model

    model, (reference, _) = load(spec["model"]), load_model(Path(spec["model"]))
    args = DPOTrainingArgs(
        batch_size=spec["pairs"],
        iters=spec["iters"],
        steps_per_report=1,
        steps_per_save=spec["iters"] + 1,
        adapter_file=f"{folder}/adapters.safetensors",
    )
    dataset = [
        {
            "chosen": [*prompt, *chosen],
            "rejected": [*prompt, *rejected],
            "chosen_prompt_length": len(prompt),
            "rejected_prompt_length": len(prompt),
        }
        for prompt, chosen, rejected in rows
    ]
    clock = Clock(spec["warmup"])
    optimizer = optim.Adam(spec["learning_rate"])
    train_dpo(model, reference.freeze(), optimizer, dataset, None, args, training_callback=clock)
    return clock.result() | {"reference_seconds": 0.0}


def work(spec):
    """What a process of the comparison does."""
    if spec["side"] == "model":
        return write_model(spec["folder"], spec["shape"], spec["layers"])
    rows = make_rows(spec["rows"], spec["prompt"], spec["response"], spec["vocabulary"])
    with tempfile.TemporaryDirectory() as folder:
        return (run_ours if spec["side"] == "ours" else run_peer)(spec, rows, folder)


def start(side, spec, options, environment=None):
    """Run `work` in a process of its own, ours with this repository first on the path."""
    python = options.python if side == "peer" else sys.executable
    variables = {"PYTHONPATH": None, **fast_blas()} if side == "peer" else own_environment()
    command = [python, __file__, "--work", json.dumps(spec | {"side": side})]
    return run_json(command, {"HF_HUB_OFFLINE": "1"} | variables | (environment or {}), options.timeout)


def measure(prompt, response, model, options):
    """`{run: result}` of the runs that came to their end."""
    spec = {
        "model": str(model),
        "vocabulary": json.loads((Path(model) / "config.json").read_text())["vocab_size"],
        "prompt": prompt,
        "response": response,
        "pairs": options.pairs,
        "rows": options.pairs * options.batches,
        "warmup": options.warmup,
        "iters": options.warmup + options.steps,
        "learning_rate": 1e-5,
    }
    found = {}
    for name in options.runs:
        side, settings, environment = RUNS[name]
        result = start(side, spec | {"options": settings}, options, environment)
        say(f"{prompt}/{response} {name}: {json.dumps(result)}")
        if "seconds" in result:
            found[name] = result
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="interpreter that has mlx-lm-lora")
    parser.add_argument("--model", help="a model folder instead of a random one")
    parser.add_argument("--shape", choices=SHAPES, default="135m", help="of the random one")
    parser.add_argument("--layers", type=int, default=8, help="of the random one")
    parser.add_argument("--lengths", type=lengths, default="224/32,128/128", help="prompt/response, several by comma")
    parser.add_argument("--pairs", type=int, default=4, help="pairs a step")
    parser.add_argument("--batches", type=int, default=4, help="batches in the data set")
    parser.add_argument("--steps", type=int, default=8, help="timed steps a run")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=1200.0, help="seconds that one process may take")
    parser.add_argument("--runs", type=by_comma(str), default=list(RUNS), help=f"by comma, of {', '.join(RUNS)}")
    parser.add_argument("--out", help="JSON file for the results")
    parser.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        print("\n" + json.dumps(work(options.work)), flush=True)
        return
    if options.runs[0] != "ours" or not set(options.runs) <= set(RUNS):
        parser.error(f"runs are ours, beside which the others are told, and then some of {', '.join(RUNS)}")
    with tempfile.TemporaryDirectory() as folder:
        if options.model is None:
            made = start("model", {"folder": folder, "shape": options.shape, "layers": options.layers}, options)
            if "error" in made:
                sys.exit(made["error"])
        rows = []
        for prompt, response in options.lengths:
            runs = measure(prompt, response, options.model or folder, options)
            if "ours" not in runs:
                sys.exit(1)
            rows.append({"prompt": prompt, "response": response, "runs": runs})
            found = keep(options.out, rows)
    print(mlx_lm_lora_table(found))


if __name__ == "__main__":
    main()

"""Compare DPO training here with other programs that train on MLX, as one Markdown table.

    python benchmarks/compare_peers.py --mlx-lm-lora PYTHON --mlx-tune PYTHON --unsloth PYTHON
    python benchmarks/compare_peers.py --model FOLDER --data FOLDER --limit 64 --unsloth PYTHON    # whole runs

Each program is named by an interpreter that has it, any of them may be left out, and each is used as its documents tell
its user: ours and mlx-lm-lora by their commands' `run`, mlx-tune by `FastLanguageModel` and `DPOTrainer`, Unsloth by
`FastMLXModel` and `MLXDPOTrainer`. They train one model folder on the same rows, with LoRA layers of the same values,
the same batch size and number of steps, each in turn and in a process of its own. Without --model the folder holds a
random Llama in float32: width 576, eight layers, 49,152 words; and a tokenizer with a token a word, so that all rows of
a call have the lengths that --lengths says. Ours, mlx-lm-lora and Unsloth update with Adam at a constant rate, mlx-tune
by what it has: AdamW whose rate falls as a cosine.

A step lasts from one of a program's reports to the next, the first ones left out, so that neither loading nor compiling
counts. Where the reference's logps are computed once, before the first step, "with reference" adds a batch's share of
that pass. "peak GB" is what MLX's arrays held at most in the timed steps, "process GB" what the process did, "whole"
the time from its start to its end; processor seconds are of all cores. "reference once" has Unsloth's reference
precomputed and nothing computed again in the backward pass, "not compiled" besides no compiled step; "a pair a step" is
mlx-tune with one pair a batch, which is when its two responses share their prompt: as many updates as pairs. Off a Mac
mlx-lm-lora reads a device property that MLX does not have there, and is given one; Unsloth asks Python for the machine,
and is told of a Mac while it is imported. On Linux, OpenBLAS is loaded first for all where there is one. Losses of the
steps are in what stderr says and in --out.
"""

import argparse
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

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
from tables import peers_table, peers_whole_table

RANK, SCALE, RATE = 8, 20.0, 1e-5
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ONCE = {"precompute_ref_log_probs": True, "gradient_checkpointing": False}
# Name: how the table calls it, the program, and its options.
RUNS = {
    "here": ("here", "here", {}),
    "here-checkpoint": ("here, `grad_checkpoint`", "here", {"grad_checkpoint": True}),
    "mlx-lm-lora": ("mlx-lm-lora", "mlx_lm_lora", {}),
    "mlx-tune": ("mlx-tune", "mlx_tune", {}),
    "mlx-tune-single": ("mlx-tune, a pair a step", "mlx_tune", {"per_device_train_batch_size": 1}),
    "unsloth": ("Unsloth", "unsloth", {}),
    "unsloth-once": ("Unsloth, reference once", "unsloth", ONCE),
    "unsloth-once-eager": ("Unsloth, reference once, not compiled", "unsloth", ONCE | {"compile": False}),
}


class Clock:
    """Times, losses and memory of the steps, told by a program's own callback or by the lines that it prints.

    Args:
        warmup: steps that do not count.
        each: reports that make a step.
    """

    def __init__(self, warmup, each=1):
        self.warmup, self.each, self.reports = warmup, each, 0
        self.times, self.cpu_times, self.losses = [], [], []
        self.reference_seconds = 0.0
        self.out = sys.stdout

    def step(self, loss):
        import mlx.core as mx

        self.reports += 1
        if self.reports % self.each == 0:
            self.times.append(time.perf_counter())
            self.cpu_times.append(time.process_time())
            self.losses.append(float(loss))
            if len(self.times) == self.warmup:
                mx.reset_peak_memory()

    def on_train_loss_report(self, report):
        self.step(report["train_loss"])

    def on_val_loss_report(self, report):
        pass

    def write(self, text):
        """Take the place of stdout, and see steps and the reference's pass in what is printed."""
        if found := re.search(r"Step \d+/\d+ \| Loss: ([\d.]+)", text):
            self.step(found[1])
        elif "Pre-computing reference" in text:
            self.reference_seconds -= time.perf_counter()
        elif "Reference log-probs cached" in text:
            self.reference_seconds += time.perf_counter()
        return self.out.write(text)

    def __getattr__(self, name):
        return getattr(self.out, name)

    def timed(self, owner, name):
        """Count the seconds of `owner.name` as the reference's."""
        function = getattr(owner, name)

        def run(*args, **kwargs):
            tic = time.perf_counter()
            found = function(*args, **kwargs)
            self.reference_seconds += time.perf_counter() - tic
            return found

        setattr(owner, name, run)

    def result(self):
        import mlx.core as mx

        seconds, cpu_seconds = (
            [end - start for start, end in zip(times[self.warmup - 1 :], times[self.warmup :], strict=False)]
            for times in (self.times, self.cpu_times)
        )
        return {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "losses": self.losses,
            "reference_seconds": self.reference_seconds,
            "peak_gb": mx.get_peak_memory() / 1e9,
            "resident_gb": peak_resident_gb(),
            "whole_cpu_seconds": time.process_time(),
        }


def train_here(spec, folder, clock):
    """Train as `python -m mlx_lm.lora` does."""
    from mlx_lm.lora import CONFIG_DEFAULTS, run
    from mlx_lm.tuner.preference.reference import Reference

    clock.timed(Reference, "logps")
    config = command_config(spec, folder) | {"loss_type": "dpo", "val_batches": 0}
    config |= {"reference_cache": f"{folder}/reference"} | spec["options"]
    run(SimpleNamespace(**CONFIG_DEFAULTS | config), clock)


def train_mlx_lm_lora(spec, folder, clock):
    """Train as `mlx_lm_lora.train` does."""
    import mlx.core as mx

    device_info = mx.device_info
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    mx.device_info = lambda *args: {"max_recommended_working_set_size": memory} | device_info(*args)

    from mlx_lm_lora.train import CONFIG_DEFAULTS, run

    config = command_config(spec, folder) | {"train_mode": "dpo", "fuse": False}
    run(SimpleNamespace(**CONFIG_DEFAULTS | {"wandb": None} | config | spec["options"]), clock)


def command_config(spec, folder):
    """The configuration that our command and mlx-lm-lora's share."""
    return {
        "model": spec["model"],
        "data": spec["data"],
        "train": True,
        "resume_adapter_file": spec["adapters"],
        "adapter_path": folder,
        "num_layers": -1,
        "lora_parameters": {"rank": RANK, "scale": SCALE, "dropout": 0.0},
        "optimizer": "adam",
        "learning_rate": RATE,
        "batch_size": spec["pairs"],
        "iters": spec["iters"],
        "max_seq_length": spec["max_seq_length"],
        "steps_per_report": 1,
        "save_every": spec["iters"] + 1,
    }


def train_mlx_tune(spec, folder, clock):
    """Train as mlx-tune's examples do, on text that has been through the chat template."""
    from mlx_tune import DPOConfig, DPOTrainer, FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(spec["model"], max_seq_length=spec["max_seq_length"])
    model = FastLanguageModel.get_peft_model(model, r=RANK, lora_alpha=RANK * SCALE, target_modules=PROJECTIONS)
    apply = model._apply_lora
    model._apply_lora = lambda: (apply(), model.model.load_weights(spec["adapters"], strict=False))
    options = {"per_device_train_batch_size": spec["pairs"]} | spec["options"]
    clock.each = spec["pairs"] // options["per_device_train_batch_size"]
    config = DPOConfig(
        learning_rate=RATE,
        max_steps=spec["iters"] * clock.each,
        max_seq_length=spec["max_seq_length"],
        logging_steps=1,
        save_steps=spec["iters"] * clock.each + 1,
        output_dir=folder,
        **options,
    )
    rows = [rendered(row, tokenizer) for row in read_rows(spec["data"])]
    sys.stdout = clock
    DPOTrainer(model=model, tokenizer=tokenizer, train_dataset=rows, args=config).train()
    sys.stdout = clock.out


def train_unsloth(spec, folder, clock):
    """Train with Unsloth's trainer for MLX, on messages."""
    FastMLXModel, trainer = import_unsloth()
    model, tokenizer = FastMLXModel.from_pretrained(
        spec["model"], max_seq_length=spec["max_seq_length"], load_in_4bit=False, dtype="float32"
    )
    checkpoint = spec["options"].get("gradient_checkpointing", True)
    model = FastMLXModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=RANK * SCALE,
        target_modules=PROJECTIONS,
        **({} if checkpoint else {"use_gradient_checkpointing": False}),
    )
    model.load_weights(spec["adapters"], strict=False)
    config = trainer.MLXDPOConfig(
        learning_rate=RATE,
        lr_scheduler_type="constant",
        warmup_steps=0,
        optim="adam",
        weight_decay=0.0,
        per_device_train_batch_size=spec["pairs"],
        gradient_accumulation_steps=1,
        max_steps=spec["iters"],
        max_seq_length=spec["max_seq_length"],
        max_length=spec["max_seq_length"],
        output_dir=folder,
        **spec["options"],
    )
    clock.timed(trainer, "precompute_reference_logps")
    rows = [as_messages(row) for row in read_rows(spec["data"])]
    run = trainer.MLXDPOTrainer(model=model, tokenizer=tokenizer, train_dataset=rows, args=config)
    run.add_step_callback(lambda step, steps, loss, *rest, **others: clock.step(loss))
    run.train()


def import_unsloth():
    """Unsloth's `FastMLXModel`, and the module of its trainers for MLX."""
    system, machine = platform.system, platform.machine
    platform.system, platform.machine = lambda: "Darwin", lambda: "arm64"
    from unsloth_zoo.mlx import trainer
    from unsloth_zoo.mlx.loader import FastMLXModel

    platform.system, platform.machine = system, machine
    return FastMLXModel, trainer


def read_rows(data):
    return [json.loads(line) for line in (Path(data) / "train.jsonl").read_text().splitlines()]


def as_messages(row):
    """A row of strings, of which one may be the system's, as messages."""
    system = [{"role": "system", "content": row["system"]}] if "system" in row else []
    answers = {key: [{"role": "assistant", "content": row[key]}] for key in ("chosen", "rejected")}
    return {"prompt": [*system, {"role": "user", "content": row["prompt"]}], **answers}


def rendered(row, tokenizer):
    """A row of strings as the text that the chat template makes of it."""
    row, template = as_messages(row), tokenizer.apply_chat_template
    prompt = template(row["prompt"], tokenize=False, add_generation_prompt=True)
    both = {key: template(row["prompt"] + row[key], tokenize=False) for key in ("chosen", "rejected")}
    return {"prompt": prompt, **{key: text.removeprefix(prompt) for key, text in both.items()}}


def write_model(spec):
    """A random Llama in float32 as a model folder, with a token a word."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from tokenizers import Tokenizer, models, pre_tokenizers

    from mlx_lm.models import llama

    folder = Path(spec["model"])
    config = llama_config(spec["shape"], layers=spec["layers"]) | {"eos_token_id": 1}
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    named = ["<pad>", "</s>"] + [f"w{i}" for i in range(2, config["vocab_size"])]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(named)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(folder / "tokenizer.json"))
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokens = {"eos_token": "</s>", "pad_token": "<pad>", "chat_template": template}
    settings = {"config": config, "tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast", **tokens}}
    for name, content in settings.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return {}


def write_rows(folder, count, prompt, response, vocabulary):
    """Rows of that model's words as train.jsonl."""
    rows = []
    for tokens in make_rows(count, prompt, response - 1, vocabulary - 1):
        asked, chosen, rejected = (" ".join(f"w{token + 1}" for token in each) for each in tokens)
        rows.append({"prompt": f"{asked} ", "chosen": f"{chosen} </s>", "rejected": f"{rejected} </s>"})
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_adapters(spec):
    """LoRA layers' first values for all programs."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers

    from mlx_lm.utils import load_model

    model, _ = load_model(Path(spec["model"]))
    model.freeze()
    mx.random.seed(0)
    linear_to_lora_layers(model, len(model.layers), {"rank": RANK, "scale": SCALE, "dropout": 0.0})
    mx.save_safetensors(spec["adapters"], dict(tree_flatten(model.trainable_parameters())))
    return {}


def work(spec):
    """What a process of the comparison does."""
    if spec["side"] in ("write_model", "write_adapters"):
        return globals()[spec["side"]](spec)
    clock = Clock(spec["warmup"])
    with tempfile.TemporaryDirectory() as folder:
        globals()[f"train_{spec['side']}"](spec, folder, clock)
    return clock.result()


def start(side, spec, options):
    """Run `work` in a process of its own, ours with this repository first on the path."""
    python = getattr(options, side, None)
    variables = {"PYTHONPATH": None, **fast_blas()} if python else own_environment()
    command = [python or sys.executable, __file__, "--work", json.dumps(spec | {"side": side})]
    tic = time.perf_counter()
    found = run_json(command, {"HF_HUB_OFFLINE": "1"} | variables, options.timeout)
    return found | {"whole_seconds": time.perf_counter() - tic}


def measure(options, spec):
    """`{run: result}` of the runs that came to their end, which take turns."""
    found = {}
    for _ in range(options.rounds):
        for name in options.runs:
            told, side, settings = RUNS[name]
            result = start(side, spec | {"options": settings | options.set}, options)
            say(f"{told}: {json.dumps(result)}")
            if "seconds" in result:
                found.setdefault(told, []).append(result)
    return {told: together(results) for told, results in found.items()}


def together(results):
    """Several processes of one run as one result: the steps of all, the first one's losses, medians of the others."""
    steps = {key: [x for each in results for x in each[key]] for key in ("seconds", "cpu_seconds")}
    single = [key for key, value in results[0].items() if isinstance(value, float)]
    medians = {key: statistics.median(each[key] for each in results) for key in single}
    return steps | medians | {"losses": results[0]["losses"]}


def options_of(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("mlx-lm-lora", "mlx-tune", "unsloth"):
        parser.add_argument(f"--{name}", metavar="PYTHON", help=f"interpreter that has {name}")
    parser.add_argument("--model", help="a model folder instead of a random one")
    parser.add_argument("--data", help="a folder with train.jsonl instead of made-up rows; needs --model")
    parser.add_argument("--limit", type=int, default=64, help="rows of DATA")
    parser.add_argument("--max-seq-length", type=int, default=512)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of MODEL, told to Unsloth")
    parser.add_argument("--shape", choices=SHAPES, default="135m", help="of the random one")
    parser.add_argument("--layers", type=int, default=8, help="of the random one")
    parser.add_argument("--lengths", type=lengths, default="224/32,128/128", help="prompt/response, several by comma")
    parser.add_argument("--pairs", type=int, default=4, help="pairs a step")
    parser.add_argument("--batches", type=int, default=1, help="batches of made-up rows")
    parser.add_argument("--steps", type=int, default=4, help="timed steps a run, with DATA an epoch's")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1, help="how often the runs take turns")
    parser.add_argument("--timeout", type=float, default=1200.0, help="seconds that one process may take")
    parser.add_argument("--runs", type=by_comma(str), help=f"by comma, of {', '.join(RUNS)}; all by default")
    parser.add_argument("--set", type=json.loads, default={}, help="more options of the programs, as a JSON object")
    parser.add_argument("--out", help="JSON file for the results")
    parser.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    given = {"here"} | {side for side in ("mlx_lm_lora", "mlx_tune", "unsloth") if getattr(options, side)}
    options.runs = options.runs or [name for name, run in RUNS.items() if run[1] in given]
    if not {RUNS[name][1] for name in options.runs} <= given and options.work is None:
        parser.error("each program but ours needs its interpreter")
    return options


def made_up(folder, options):
    """Yield a row of the table to be, and what its runs are to do: a random model, with rows of each of the lengths."""
    spec = {"model": folder, "shape": options.shape, "layers": options.layers}
    must(start("write_model", spec, options))
    for prompt, response in options.lengths:
        data = Path(folder) / f"{prompt}_{response}"
        write_rows(data, options.pairs * options.batches, prompt, response, SHAPES[options.shape][-1])
        iters = options.warmup + options.steps
        asked = {"data": str(data), "iters": iters, "max_seq_length": prompt + response}
        yield {"prompt": prompt, "response": response, "batches": options.batches}, spec | asked


def real(folder, options):
    """Yield the one row of whole runs, and what they are to do: an epoch of the first rows of DATA."""
    lines = (Path(options.data) / "train.jsonl").read_text().splitlines(keepends=True)[: options.limit]
    (Path(folder) / "train.jsonl").write_text("".join(lines))
    spec = {"model": options.model, "data": folder, "max_seq_length": options.max_seq_length}
    yield {"rows": len(lines), "batches": len(lines) // options.pairs}, spec | {"iters": len(lines) // options.pairs}


def must(found):
    if "error" in found:
        sys.exit(found["error"])


def main():
    options = options_of()
    if options.work:
        print("\n" + json.dumps(work(options.work)), flush=True)
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for row, spec in (real if options.data else made_up)(folder, options):
            spec |= {"pairs": options.pairs, "warmup": options.warmup, "adapters": f"{folder}/adapters.safetensors"}
            must(start("write_adapters", spec, options))
            rows.append(row | {"pairs": options.pairs, "runs": measure(options, spec)})
            found = keep(options.out, rows, *filter(None, (options.unsloth, options.mlx_lm_lora, options.mlx_tune)))
    print((peers_whole_table if options.data else peers_table)(found))


if __name__ == "__main__":
    main()

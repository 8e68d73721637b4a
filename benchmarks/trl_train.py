"""Train DPO with TRL on a folder of JSONL pairs, and say as JSON lines when each phase ended and what it gave.

    python benchmarks/trl_train.py --model FOLDER --data FOLDER --output FOLDER --batch-size 4 --iters 414

What a user of TRL would write: the model in the dtype of its files, under bfloat16 autocast where that is bfloat16 and
there is a GPU; LoRA on all linear layers; reference log-probabilities before the first step; torch's AdamW at a
constant or a linearly falling rate; no clipping, dropout, weight decay or gradient checkpointing. String rows become
a user turn and an assistant turn where the tokenizer has a chat template. A line `{"event": ..., "time": ...}` follows
each phase, with the seconds since 1970 at its end. Needs trl 1.16, peft and datasets; no network.
"""

import argparse
import json
import time

STARTED = time.time()

import torch  # noqa: E402
from common import peak_resident_gb  # noqa: E402
from datasets import disable_progress_bars, load_dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback  # noqa: E402
from trl import DPOConfig, DPOTrainer  # noqa: E402

COLUMNS = ("prompt", "chosen", "rejected")
REPORT_STEPS = 50


def tell(event, **figures):
    """Print an event as a JSON line."""
    print(json.dumps({"event": event, "time": time.time(), **figures}), flush=True)


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class TimedTrainer(DPOTrainer):
    """DPOTrainer that says when its constructor's two long phases end."""

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        tell("tokenized", split=dataset_name, rows=len(prepared))
        return prepared

    def _precompute_ref_logps(self, dataset, name, batch_size):
        done = super()._precompute_ref_logps(dataset, name, batch_size)
        tell("reference", split=name)
        return done


class Clock(TrainerCallback):
    """Tells the seconds of every fifty steps, validations left out, and the figures of each validation.

    Args:
        keep: whether to save the adapters at each validation, into a folder named after the step.
    """

    def __init__(self, keep):
        self.tic, self.seconds, self.steps, self.keep = None, 0.0, 0, keep

    def on_step_begin(self, args, state, control, **kwargs):
        if self.tic is None:
            self.tic = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1
        last = state.global_step == state.max_steps
        control.should_evaluate = control.should_evaluate or last
        reports = last or state.global_step % REPORT_STEPS == 0
        if not (reports or control.should_evaluate):
            return
        synchronize()
        self.seconds += time.perf_counter() - self.tic
        self.tic = None
        if reports:
            tell("steps", iteration=state.global_step, steps=self.steps, seconds=self.seconds)
            self.seconds, self.steps = 0.0, 0

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        tell("validation", iteration=state.global_step, seconds=metrics["eval_runtime"], **figures_of(metrics))
        if self.keep:
            kwargs["model"].save_pretrained(f"{args.output_dir}/{state.global_step:07d}")


def figures_of(metrics):
    """The preference figures among what an evaluation gave."""
    return {
        name: value
        for name, value in metrics.items()
        if name == "eval_loss" or name.startswith(("eval_rewards/", "eval_logps/"))
    }


def conversation(row):
    """A row of strings as messages."""
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
    }


def load_rows(folder, split, tokenizer):
    """The rows of a split, in the form that the tokenizer's chat template asks for."""
    rows = load_dataset("json", data_files=f"{folder}/{split}.jsonl", split="train").select_columns(COLUMNS)
    if tokenizer.chat_template and isinstance(rows[0]["prompt"], str):
        rows = rows.map(conversation)
    return rows


def dpo_config(options, dtype):
    """What the run asks of TRL."""
    on_gpu = torch.cuda.is_available()
    return DPOConfig(
        output_dir=options.output,
        seed=options.seed,
        beta=options.beta,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.schedule,
        max_length=options.max_seq_length,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.eval_batch_size,
        max_steps=options.iters,
        precompute_ref_log_probs=True,
        use_liger_kernel=options.liger,
        bf16=on_gpu and dtype == torch.bfloat16,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        gradient_checkpointing=False,
        max_grad_norm=0.0,
        eval_strategy="steps",
        eval_on_start=True,
        eval_steps=options.steps_per_eval,
        logging_steps=REPORT_STEPS,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--data", required=True, help="folder with train.jsonl and valid.jsonl")
    parser.add_argument("--output", required=True, help="folder for the adapters")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--eval-batch-size", type=int, default=8, help="TRL's default")
    parser.add_argument("--iters", type=int, required=True, help="steps")
    parser.add_argument("--steps-per-eval", type=int, required=True)
    parser.add_argument("--max-seq-length", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--schedule", choices=("constant", "linear"), default="constant")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="save the adapters at each validation too")
    parser.add_argument("--liger", action="store_true", help="with Liger's kernels")
    options = parser.parse_args()
    tell("imported", started=STARTED)
    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    tell("loaded", dtype=str(model.dtype))
    train_set, valid_set = (load_rows(options.data, split, tokenizer) for split in ("train", "valid"))
    # mlx-lm's scale of 20 is alpha / rank.
    lora = LoraConfig(r=8, lora_alpha=160, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = TimedTrainer(
        model=model,
        args=dpo_config(options, model.dtype),
        train_dataset=train_set,
        eval_dataset=valid_set,
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[Clock(options.keep)],
    )
    trainer.train()
    trainer.save_model(options.output)
    peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None
    tell("saved", peak_gb=peak, resident_gb=peak_resident_gb())


if __name__ == "__main__":
    main()

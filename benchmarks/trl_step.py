"""Time the training step of TRL's DPOTrainer on made-up pairs, as a line of JSON.

    python benchmarks/trl_step.py --shape 1b --prompt 1024 --response 256 --setting precomputed
    python benchmarks/trl_step.py --shape tiny --prompt 64 --response 32 --setting online    # on a CPU

The model is a random Llama with scaled-dot-product attention and LoRA of rank 8 and alpha 160 on all linear layers of
its blocks: bfloat16 on a GPU under TRL's own autocast, float32 on a CPU. The step is timed between TRL's callbacks at
its beginning and end, so that neither loading rows nor the precomputed reference counts. There is no gradient
checkpointing, clipping or dropout. Needs trl 1.16, peft, and for Liger liger-kernel and a GPU; no network.
"""

import argparse
import json
import statistics
import tempfile
import time

import torch
from common import SHAPES, llama_config, make_rows, peak_resident_gb
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer

SETTINGS = {
    "online": {},
    "precomputed": {"precompute_ref_log_probs": True},
    "precomputed+liger": {"precompute_ref_log_probs": True, "use_liger_kernel": True},
}
ROWS_PER_PAIR = 4  # batches that the data set holds


class TokenTrainer(DPOTrainer):
    """DPOTrainer for rows that are token ids already: everything but its text preparation is TRL's."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


class StepClock(TrainerCallback):
    """Takes the seconds of every step, and the peak memory of those after `warmup`."""

    def __init__(self, warmup):
        self.warmup = warmup
        self.seconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            if state.global_step == self.warmup:
                torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        self.tic = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.tic)

    def peak_gb(self):
        return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else peak_resident_gb()


def make_model(shape):
    """A random Llama on the device that training will use."""
    on_gpu = torch.cuda.is_available()
    torch.manual_seed(0)
    with torch.device("cuda" if on_gpu else "cpu"):
        return AutoModelForCausalLM.from_config(
            LlamaConfig(**llama_config(shape)),
            dtype=torch.bfloat16 if on_gpu else torch.float32,
            attn_implementation="sdpa",
        )


def make_trainer(model, rows, pairs, steps, setting, clock, folder):
    """TRL's trainer over `rows`; its optimizer is its default, fused AdamW."""
    on_gpu = torch.cuda.is_available()
    tokenizer = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    return TokenTrainer(
        model=model,
        args=DPOConfig(
            output_dir=folder,
            beta=0.1,
            per_device_train_batch_size=pairs,
            max_steps=steps,
            max_length=None,
            max_grad_norm=0.0,
            learning_rate=1e-5,
            gradient_checkpointing=False,
            use_cpu=not on_gpu,
            bf16=on_gpu,
            dataloader_pin_memory=on_gpu,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **SETTINGS[setting],
        ),
        train_dataset=Dataset.from_list([dict(zip(columns, row, strict=True)) for row in rows]),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"),
        peft_config=LoraConfig(
            r=8, lora_alpha=160, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[clock],
    )


def measure(setting, options):
    """Train with one setting and return what its steps cost."""
    model = make_model(options.shape)
    rows = make_rows(ROWS_PER_PAIR * options.pairs, options.prompt, options.response, model.config.vocab_size)
    clock = StepClock(options.warmup)
    with tempfile.TemporaryDirectory() as folder:
        tic = time.perf_counter()
        trainer = make_trainer(model, rows, options.pairs, options.warmup + options.steps, setting, clock, folder)
        prepared = time.perf_counter() - tic
        loss = trainer.train().training_loss
    median = statistics.median(clock.seconds[options.warmup :])
    trainable = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    return {
        "ms": 1000 * median,
        "pairs_per_second": options.pairs / median,
        "peak_gb": clock.peak_gb(),
        "trainable": trainable,
        "loss": loss,
        "preparation_seconds": prepared,  # with the reference's logps of all rows, where they are precomputed
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--response", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=4, help="pairs a step")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--setting", choices=SETTINGS, default="online")
    options = parser.parse_args()
    disable_progress_bars()
    print(json.dumps(measure(options.setting, options)), flush=True)


if __name__ == "__main__":
    main()

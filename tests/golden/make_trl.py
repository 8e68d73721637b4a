"""Make the golden numbers of TRL's DPOTrainer: a tiny Llama, two LoRA adapters and trl.json, beside this script.

Run it where trl 1.16.0, peft 0.21.2, transformers 5.23.0 and torch 2.13.0 are installed (CPU builds do):

    python tests/golden/make_trl.py            # writes tiny_llama/ and trl.json beside itself

Everything is drawn from fixed seeds with numpy, so model, adapters, tokens and batches come out the same anywhere;
only the numbers under "versions" depend on what is installed. TRL runs in float32 on the CPU with eager attention,
without dropout, gradient checkpointing or gradient clipping. The tests read the stored files and need no torch.

Two parts are written to trl.json:

- cases: one uneven batch, from the adapters "nonzero" (both LoRA matrices matter) and "zero" (lora_b is zero: the
  policy is the reference); per-row logps, rewards, loss and the gradient of the loss for two LoRA pairs.
- trajectory: the training loss of 30 steps of Adam from the adapter "zero", for each of three losses.

Array orientation is mlx-lm's: lora_a is (in, rank), lora_b is (rank, out). Numbers keep nine significant digits,
which is what a float32 needs to come back unchanged.
"""

import json
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

HERE = Path(__file__).resolve().parent
MODEL = HERE / "tiny_llama"
VOCABULARY = 97
RANK = 4
SCALE = 20.0  # mlx-lm's scale is PEFT's lora_alpha / rank
BETA = 0.1
STEPS = 30
PAIRS_PER_STEP = 4
TRAJECTORY_PAIRS = 40
LOSSES = ("sigmoid", "ipo", "apo_zero")
ADAM = {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
GRADIENTS = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")
# Of every trainer: float32 on the CPU, each batch a step and a line of the log.
RUN = {
    "per_device_train_batch_size": PAIRS_PER_STEP,
    "max_steps": STEPS,
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": VOCABULARY,
}


def linear_shapes():
    """Yield (name, out, in) of every linear layer inside the transformer's blocks."""
    hidden, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    keys = CONFIG["num_key_value_heads"] * CONFIG["head_dim"]
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    for layer in range(CONFIG["num_hidden_layers"]):
        for name, (outputs, inputs) in shapes.items():
            yield f"model.layers.{layer}.{name}", outputs, inputs


def write_model():
    """Write the tiny Llama: wide enough weights that the next-token distributions are far from uniform."""
    draw = np.random.default_rng(1)
    hidden = CONFIG["hidden_size"]

    def normal(*shape, std):
        return (std * draw.standard_normal(shape)).astype(np.float32)

    weights = {
        "model.embed_tokens.weight": normal(VOCABULARY, hidden, std=1.0),
        "lm_head.weight": normal(VOCABULARY, hidden, std=hidden**-0.5),
    }
    for name, outputs, inputs in linear_shapes():
        weights[f"{name}.weight"] = normal(outputs, inputs, std=inputs**-0.5)
    norms = ["model.norm"]
    for layer in range(CONFIG["num_hidden_layers"]):
        norms += [f"model.layers.{layer}.{norm}" for norm in ("input_layernorm", "post_attention_layernorm")]
    for name in norms:
        weights[f"{name}.weight"] = 1 + normal(hidden, std=0.1)
    MODEL.mkdir(exist_ok=True)
    save_file(weights, MODEL / "model.safetensors", metadata={"format": "pt"})
    write_json(MODEL / "config.json", CONFIG)


def write_adapters():
    """Write both adapters in mlx-lm's layout; they share lora_a and differ in lora_b only."""
    draw = np.random.default_rng(2)
    nonzero, zero = {}, {}
    for name, outputs, inputs in linear_shapes():
        bound = inputs**-0.5
        lora_a = draw.uniform(-bound, bound, (inputs, RANK)).astype(np.float32)
        lora_b = (0.01 * draw.standard_normal((RANK, outputs))).astype(np.float32)
        nonzero |= {f"{name}.lora_a": lora_a, f"{name}.lora_b": lora_b}
        zero |= {f"{name}.lora_a": lora_a, f"{name}.lora_b": np.zeros_like(lora_b)}
    config = {
        "fine_tune_type": "lora",
        "num_layers": CONFIG["num_hidden_layers"],
        "lora_parameters": {"rank": RANK, "scale": SCALE, "dropout": 0.0},
    }
    for name, weights in {"nonzero": nonzero, "zero": zero}.items():
        folder = MODEL / f"adapter_{name}"
        folder.mkdir(exist_ok=True)
        save_file(weights, folder / "adapters.safetensors", metadata={"format": "mlx"})
        write_json(folder / "adapter_config.json", config)


def uneven_batch():
    """Return five pairs of unlike lengths; id 0, which also pads, is a real token first, in the middle and last."""
    draw = np.random.default_rng(3)
    lengths = [(2, 12, 1), (9, 1, 5), (5, 7, 7), (3, 1, 1), (7, 4, 11)]
    rows = [[draw.integers(1, VOCABULARY, n).tolist() for n in row] for row in lengths]
    rows[0][0][0] = 0  # the prompt's first token
    rows[1][0][8] = 0  # the prompt's last token, just before the response
    rows[1][1][0] = 0  # a response that is nothing but id 0
    rows[2][1][0] = rows[2][1][6] = 0  # a response's first and last token
    rows[4][2][4] = 0  # within a response
    return rows


def trajectory_pairs():
    """Return pairs with something to learn: chosen tokens come from low ids, rejected ones from high ids."""
    draw = np.random.default_rng(4)
    pairs = []
    for _ in range(TRAJECTORY_PAIRS):
        prompt = draw.integers(0, VOCABULARY, draw.integers(2, 10))
        chosen = draw.integers(0, 60, draw.integers(1, 13))
        rejected = draw.integers(37, VOCABULARY, draw.integers(1, 13))
        pairs.append([prompt.tolist(), chosen.tolist(), rejected.tolist()])
    return pairs


def trajectory_batches():
    """Return STEPS lists of row numbers: whole passes over the pairs, each in an order of its own."""
    draw = np.random.default_rng(5)
    passes = -(-STEPS * PAIRS_PER_STEP // TRAJECTORY_PAIRS)
    order = np.concatenate([draw.permutation(TRAJECTORY_PAIRS) for _ in range(passes)])
    return order[: STEPS * PAIRS_PER_STEP].reshape(STEPS, PAIRS_PER_STEP).tolist()


class TokenTrainer(DPOTrainer):
    """DPOTrainer for rows that are token ids already: everything but its text preparation is TRL's."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


def token_rows(pairs):
    """Return pairs as the rows that TRL's collator reads."""
    return [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), pair, strict=True)) for pair in pairs]


def load_policy(adapter):
    """Return the base model with the named adapter as a PeftModel, float32."""
    policy = get_peft_model(
        load_base(),
        LoraConfig(
            r=RANK,
            lora_alpha=SCALE * RANK,
            lora_dropout=0.0,
            target_modules=sorted({name.rsplit(".", 1)[1] for name, _, _ in linear_shapes()}),
            task_type="CAUSAL_LM",
        ),
    )
    state = {}
    for name, value in load_file(MODEL / f"adapter_{adapter}" / "adapters.safetensors").items():
        module, matrix = name.rsplit(".", 1)
        key = f"base_model.model.{module}.{matrix.replace('lora_a', 'lora_A').replace('lora_b', 'lora_B')}.weight"
        state[key] = torch.from_numpy(value.T.copy())
    result = set_peft_model_state_dict(policy, state)
    if result.unexpected_keys or any("lora" in key for key in result.missing_keys):
        raise ValueError(f"the adapter does not fit the model: {result}")
    return policy


def load_base():
    """Return the tiny Llama as transformers reads it."""
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="eager")


def optimizer_and_words(policy):
    """What a trainer needs besides: its optimizer, at a constant rate, and a tokenizer that has no text to read."""
    optimizer = torch.optim.Adam([p for p in policy.parameters() if p.requires_grad], **ADAM)
    tokenizer = Tokenizer(WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="1"))
    return {
        "processing_class": PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="0", eos_token="96"),
        "optimizers": (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
    }


def lora_gradients(model):
    """The gradients of GRADIENTS' adapters after a backward pass, as mlx-lm lays them out."""
    gradients = {}
    for name in GRADIENTS:
        for matrix in ("lora_A", "lora_B"):
            weight = model.get_parameter(f"base_model.model.{name}.{matrix}.default.weight")
            gradients[f"{name}.{matrix.lower()}"] = weight.grad.T.tolist()
    return gradients


def make_trainer(adapter, pairs, loss, folder):
    """Return TRL's trainer over pairs in their given order; the reference is the base model without adapter."""
    policy = load_policy(adapter)
    return TokenTrainer(
        model=policy,
        ref_model=load_base(),
        args=DPOConfig(
            output_dir=folder,
            loss_type=[loss],
            beta=BETA,
            train_sampling_strategy="sequential",
            **RUN,
        ),
        train_dataset=Dataset.from_list(token_rows(pairs)),
        **optimizer_and_words(policy),
    )


def run_case(adapter, pairs, folder):
    """Return what TRL computes for one batch before any update."""
    trainer = make_trainer(adapter, pairs, "sigmoid", folder)
    trainer.model.train()
    inputs = trainer.data_collator(token_rows(pairs))
    # With a ref_model of its own, TRL's method scores whichever model it is handed.
    chosen, rejected = trainer.compute_ref_log_probs(trainer.model, inputs)
    reference_chosen, reference_rejected = trainer.compute_ref_log_probs(trainer.ref_model, inputs)
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    rows = {
        "policy_chosen_logps": chosen,
        "policy_rejected_logps": rejected,
        "reference_chosen_logps": reference_chosen,
        "reference_rejected_logps": reference_rejected,
        "chosen_rewards": BETA * (chosen - reference_chosen),
        "rejected_rewards": BETA * (rejected - reference_rejected),
        "margins": BETA * (chosen - reference_chosen - rejected + reference_rejected),
    }
    means = {name: values[0] for name, values in trainer._metrics["train"].items() if name.startswith("rewards/")}
    return {
        "loss": loss.item(),
        **{name: values.tolist() for name, values in rows.items()},
        **means,
        "gradients": lora_gradients(trainer.model),
    }


def run_trajectory(loss, pairs, batches, folder):
    """Return TRL's logged loss and mean margin of every step of a real training run."""
    in_order = [pairs[row] for batch in batches for row in batch]
    trainer = make_trainer("zero", in_order, loss, folder)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    if [entry["step"] for entry in steps] != list(range(1, STEPS + 1)):
        raise RuntimeError("TRL did not log every step once")
    return {"loss": [entry["loss"] for entry in steps], "margins": [entry["rewards/margins"] for entry in steps]}


def rounded(value):
    """Return value with every float cut to nine significant digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def write_json(path, content, compact=False):
    """Write JSON, compact with one top-level key a line or indented."""
    if compact:
        lines = [f"{json.dumps(key)}:{json.dumps(item, separators=(',', ':'))}" for key, item in content.items()]
        path.write_text("{" + ",\n".join(lines) + "}\n")
    else:
        path.write_text(json.dumps(content, indent=2) + "\n")


def main():
    torch.set_num_threads(1)
    write_model()
    write_adapters()
    batch, pairs, batches = uneven_batch(), trajectory_pairs(), trajectory_batches()
    with tempfile.TemporaryDirectory() as folder:
        content = {
            "versions": {name: version(name) for name in ("trl", "peft", "transformers", "torch", "numpy")},
            "beta": BETA,
            "lora": {"rank": RANK, "scale": SCALE},
            "batch": batch,
            "cases": {name: run_case(name, batch, folder) for name in ("nonzero", "zero")},
            "trajectory": {
                "adapter": "zero",
                "adam": ADAM,
                "pairs": pairs,
                "batches": batches,
                "runs": {loss: run_trajectory(loss, pairs, batches, folder) for loss in LOSSES},
            },
        }
    write_json(HERE / "trl.json", rounded(content), compact=True)


if __name__ == "__main__":
    main()

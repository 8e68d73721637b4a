"""What trained adapters, ours or PEFT's, do to held-out pairs and to the length of sampled responses.

    PYTHONPATH=. python benchmarks/held_out.py '{"model": FOLDER, "data": FOLDER, "adapters": [FOLDER], "samples": 64}'

Prints a JSON object with the list `measured`; see `measure`. Both programs' adapters are measured by the same code,
with the model's own logps.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_lm import batch_generate, load
from mlx_lm.tuner.datasets import load_dataset
from mlx_lm.utils import get_batched_logps

IGNORED = -100
MAX_TOKENS = 256
BATCH = 8


def add_peft_adapters(model, folder):
    """Put LoRA that PEFT saved on `model`: its matrices are the transposes of mlx-lm's."""
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    linear_to_lora_layers(model, len(model.layers), {"rank": config["r"], "scale": scale, "dropout": 0.0})
    names = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b"}
    weights = []
    for name, value in mx.load(str(folder / "adapter_model.safetensors")).items():
        for theirs, ours in names.items():
            name = name.removeprefix("base_model.model.").replace(theirs, ours)
        weights.append((name, value.T))
    model.load_weights(weights, strict=False)
    given, taken = {name for name, _ in weights}, {name for name, _ in flat_adapters(model)}
    if given != taken:
        raise ValueError(f"PEFT's adapters and the model's differ: {sorted(given ^ taken)[:4]}")


def flat_adapters(model):
    for name, module in model.named_modules():
        for leaf in ("lora_a", "lora_b"):
            if leaf in module:
                yield f"{name}.{leaf}", module[leaf]


def load_policy(model, adapters):
    """`(model, tokenizer)` with trained adapters of either kind."""
    if (Path(adapters) / "adapter_model.safetensors").exists():
        policy, tokenizer = load(model)
        add_peft_adapters(policy, Path(adapters))
        return policy, tokenizer
    return load(model, adapter_path=adapters)


def padded(prompts, responses, multiple=32):
    """Inputs and targets `(B, T)`, T a multiple; what is not a response's token is IGNORED."""
    longest = max(len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)) - 1
    width = -(-longest // multiple) * multiple
    inputs = np.zeros((len(prompts), width), np.int32)
    targets = np.full((len(prompts), width), IGNORED, np.int32)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        tokens = [*prompt, *response]
        inputs[row, : len(tokens) - 1] = tokens[:-1]
        targets[row, len(prompt) - 1 : len(tokens) - 1] = response
    return mx.array(inputs), mx.array(targets)


def logps(model, pairs):
    """Logps of chosen and rejected `(n, 2)`, in the order of `pairs`."""
    found = np.zeros((len(pairs), 2))
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i].prompt) + len(pairs[i].chosen))
    for start in range(0, len(pairs), BATCH):
        rows = order[start : start + BATCH]
        responses = [pairs[i].chosen for i in rows] + [pairs[i].rejected for i in rows]
        both = get_batched_logps(model, *padded([pairs[i].prompt for i in rows] * 2, responses), ignore_index=IGNORED)
        found[rows] = np.array(mx.stack(both, axis=1))
        mx.clear_cache()
    return found


def sampled_lengths(model, tokenizer, pairs):
    """Tokens of the greedy responses to the pairs' prompts, at most MAX_TOKENS."""
    prompts = [pair.prompt for pair in pairs]
    done = batch_generate(model, tokenizer, prompts, max_tokens=MAX_TOKENS, return_token_ids=True)
    return [len(tokens) for tokens in done.token_ids]


def measure(model, data, adapters, beta=0.1, samples=0, max_seq_length=1024, split="valid"):
    """Held-out measures of the adapters of one run, in the order in which it saved them.

    Args:
        model, data: folders.
        adapters: folders; none for the base model.
        beta: reward per nat.
        samples: prompts that the last of them responds to.
        max_seq_length: as for training.
        split: of the data.

    Returns:
        A list of dicts, one for each of the adapters: what `by_length` gives. With samples the last one has
        `sampled_length`, mean tokens of a response, and `sampled_whole`, the share that ended by itself.
    """
    base, tokenizer = load(model)
    asked = {"loss_type": "dpo", "train": True, "test": split == "test", "max_seq_length": max_seq_length}
    pairs = load_dataset(SimpleNamespace(data=data, **asked), tokenizer)[("train", "valid", "test").index(split)]
    pairs = [pairs[i] for i in range(len(pairs))]
    found, policy = [], base
    if adapters:
        before = logps(base, pairs)
    for folder in adapters:
        policy, _ = load_policy(model, folder)
        found.append(by_length(beta * (logps(policy, pairs) - before), pairs))
    if samples:
        lengths = sampled_lengths(policy, tokenizer, pairs[:samples])
        told = {"sampled_length": float(np.mean(lengths))}
        told["sampled_whole"] = float(np.mean([length < MAX_TOKENS for length in lengths]))
        found = [*found[:-1], (found[-1] if found else {}) | told]
    return found


def by_length(rewards, pairs):
    """Means of the rewards `(n, 2)`, and how they go with the lengths of the responses."""
    lengths = np.array([[len(pair.chosen), len(pair.rejected)] for pair in pairs])
    margins, longer = rewards[:, 0] - rewards[:, 1], lengths[:, 0] - lengths[:, 1]
    right = np.where(margins == 0, 0.5, margins > 0)
    varied = margins.std() > 0 and longer.std() > 0
    found = {
        "loss": np.logaddexp(0, -margins).mean(),
        "accuracy": right.mean(),
        "margin": margins.mean(),
        "chosen_reward": rewards[:, 0].mean(),
        "rejected_reward": rewards[:, 1].mean(),
        "accuracy_chosen_longer": right[longer > 0].mean() if (longer > 0).any() else None,
        "accuracy_chosen_shorter": right[longer < 0].mean() if (longer < 0).any() else None,
        "margin_length_correlation": np.corrcoef(margins, longer)[0, 1] if varied else None,
        "chosen_reward_a_token": rewards[:, 0].sum() / lengths[:, 0].sum(),
        "rejected_reward_a_token": rewards[:, 1].sum() / lengths[:, 1].sum(),
    }
    return {name: None if value is None else float(value) for name, value in found.items()}


if __name__ == "__main__":
    print(json.dumps({"measured": measure(**json.loads(sys.argv[1]))}))

"""Make the golden numbers of TRL's KTOTrainer, trl_kto.json, from the model and adapters that make_trl.py has made.

    python tests/golden/make_kto.py            # where make_trl.py runs; writes trl_kto.json beside itself

The responses are those of make_trl.py's pairs, about as many desirable as not. Within a batch each prompt also gets the
response of the example before it, as KTOTrainer's preparation of text pairs them. Two parts are written:

- cases: one uneven batch from either adapter; logps of policy and reference, KL, loss, rewards, gradients.
- trajectory: loss, KL and mean rewards of 30 steps of Adam from the adapter "zero".
"""

import tempfile
from importlib.metadata import version

import numpy as np
import torch
from datasets import Dataset
from make_trl import (
    ADAM,
    BETA,
    HERE,
    PAIRS_PER_STEP,
    RUN,
    STEPS,
    load_base,
    load_policy,
    lora_gradients,
    optimizer_and_words,
    rounded,
    trajectory_batches,
    trajectory_pairs,
    uneven_batch,
    write_json,
)
from trl import KTOConfig, KTOTrainer

WEIGHTS = {"desirable_weight": 1.25, "undesirable_weight": 0.75}
FIGURES = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "kl")


class TokenTrainer(KTOTrainer):
    """KTOTrainer for rows that are token ids already: everything but its text preparation is TRL's."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


def examples(pairs, seed):
    """`[prompt, completion, other completion, label]` of each pair, which form one batch."""
    labels = np.random.default_rng(seed).random(len(pairs)) < 0.5
    own = [pair[1] if label else pair[2] for pair, label in zip(pairs, labels, strict=True)]
    return [[pair[0], own[i], own[i - 1], bool(labels[i])] for i, pair in enumerate(pairs)]


def token_rows(rows):
    keys = ("prompt_ids", "completion_ids", "KL_completion_ids", "label")
    return [dict(zip(keys, row, strict=True)) for row in rows]


def make_trainer(adapter, rows, folder):
    """TRL's trainer over rows in their given order; the reference is the base model without adapter."""
    policy = load_policy(adapter)
    return TokenTrainer(
        model=policy,
        ref_model=load_base(),
        args=KTOConfig(
            output_dir=folder,
            beta=BETA,
            **WEIGHTS,
            **RUN,
        ),
        train_dataset=Dataset.from_list(token_rows(rows)),
        **optimizer_and_words(policy),
    )


def run_case(adapter, rows, folder):
    """What TRL computes for one batch before any update."""
    trainer = make_trainer(adapter, rows, folder)
    trainer.model.train()
    inputs = trainer.data_collator(token_rows(rows))
    # With a ref_model of its own, TRL's method scores whichever model it is handed.
    policy, policy_kl = trainer.compute_ref_log_probs(trainer.model, inputs)
    reference, reference_kl = trainer.compute_ref_log_probs(trainer.ref_model, inputs)
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    return {
        "loss": loss.item(),
        "policy_logps": policy.tolist(),
        "policy_other_logps": policy_kl.tolist(),
        "reference_logps": reference.tolist(),
        "reference_other_logps": reference_kl.tolist(),
        **{name: trainer._metrics["train"][name][0] for name in FIGURES},
        "gradients": lora_gradients(trainer.model),
    }


def run_trajectory(rows, folder):
    """TRL's logged figures of every step of a real training run; None where a batch has no response of a kind."""
    trainer = make_trainer("zero", rows, folder)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    if [entry["step"] for entry in steps] != list(range(1, STEPS + 1)):
        raise RuntimeError("TRL did not log every step once")
    return {name: [entry.get(name) for entry in steps] for name in ("loss", *FIGURES)}


def main():
    torch.set_num_threads(1)
    pairs = trajectory_pairs()
    batch = examples(uneven_batch(), 6)
    rows = [row for i, places in enumerate(trajectory_batches()) for row in examples([pairs[j] for j in places], i)]
    with tempfile.TemporaryDirectory() as folder:
        content = {
            "versions": {name: version(name) for name in ("trl", "peft", "transformers", "torch", "numpy")},
            "beta": BETA,
            "weights": WEIGHTS,
            "batch": batch,
            "cases": {name: run_case(name, batch, folder) for name in ("nonzero", "zero")},
            "trajectory": {"adam": ADAM, "batch_size": PAIRS_PER_STEP, "rows": rows, **run_trajectory(rows, folder)},
        }
    write_json(HERE / "trl_kto.json", rounded(content), compact=True)


if __name__ == "__main__":
    main()

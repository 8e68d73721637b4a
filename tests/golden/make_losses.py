"""Make losses.json: losses and gradients from TRL's own trainers, on fixed logps of tokens.

Nothing of TRL is copied or recomputed: `DPOTrainer._compute_loss`, `CPOTrainer.get_batch_loss_metrics`
and `ORPOTrainer.get_batch_loss_metrics` run as they are, on a trainer object with only the attributes that
they read and on a model that returns the fixed logps. Gradients are TRL's autograd.

    pip install "trl==1.16.*" torch && python tests/golden/make_losses.py
"""

import json
import random
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
import trl
from trl import DPOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

CHOSEN_LENGTHS = [5, 3, 8, 1, 6]
REJECTED_LENGTHS = [4, 7, 2, 3, 6]
LENGTHS = CHOSEN_LENGTHS + REJECTED_LENGTHS
PAIRS, TOKENS = len(CHOSEN_LENGTHS), max(LENGTHS)

# With a prompt of one token, TRL's ORPO trains on the response alone, as CPO always does.
MASK = torch.tensor([[0] + [1] * length + [0] * (TOKENS - length) for length in LENGTHS])

F_DIVERGENCE_LOSSES = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm")
LOGRATIO_LOSSES = ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "aot", "aot_unpaired", "sft")
OTHER_VALUES = {
    "robust": {"label_smoothing": 0.1},
    "exo_pair": {"label_smoothing": 0.05},
    "aot": {"label_smoothing": 0.1},
    "aot_unpaired": {"label_smoothing": 0.1},
    "discopop": {"discopop_tau": 0.2},
}
DIVERGENCES = (
    {"f_divergence_type": "forward_kl"},
    {"f_divergence_type": "js_divergence"},
    {"f_divergence_type": "alpha_divergence"},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 2.0},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
)
# TRL refuses to weigh aot, and fails on the other two: it multiplies in place what autograd still needs or shares.
UNWEIGHTED = ("aot", "aot_unpaired", "hinge", "sft")
MPO = (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0])


def cases():
    """Every (trainer, loss_type, loss_weights, parameters) of losses.json, parameters that are not the default."""
    for name in F_DIVERGENCE_LOSSES + LOGRATIO_LOSSES:
        changes = [{}, {"beta": 0.4}, {"ld_alpha": 0.3}]
        changes += [OTHER_VALUES[name]] if name in OTHER_VALUES else []
        changes += DIVERGENCES if name in F_DIVERGENCE_LOSSES else ()
        changes += [{"use_weighting": True}] if name not in UNWEIGHTED else []
        if name == "sft":
            changes = [{}]
        for parameters in changes:
            yield "dpo", [name], [1.0], parameters
    for parameters in ({}, {"beta": 0.4}, {"ld_alpha": 0.0}):
        yield "dpo", *MPO, parameters
    yield "dpo", ["sigmoid", "bco_pair"], [0.8, 0.2], {"use_weighting": True, "ld_alpha": 0.5}
    yield "dpo", ["hinge", "robust", "sft"], [0.5, 0.25, 2.0], {"f_divergence_type": "js_divergence"}
    for parameters in ({}, {"beta": 2.5}, {"simpo_gamma": 1.2}, {"label_smoothing": 0.1}):
        yield "cpo", ["simpo"], [1.0], parameters
    for parameters in ({}, {"beta": 0.4}, {"cpo_alpha": 0.3}, {"label_smoothing": 0.1}):
        yield "cpo", ["cpo"], [1.0], parameters
    for parameters in ({}, {"beta": 0.4}):
        yield "orpo", ["orpo"], [1.0], parameters


def make_inputs():
    """Logps of tokens, (2 x PAIRS, TOKENS), chosen rows first, zero where there is no token."""
    draw = random.Random(20240)

    def table(value):
        return [[value() if token < length else 0.0 for token in range(TOKENS)] for length in LENGTHS]

    policy = table(lambda: round(-draw.uniform(0.05, 3.0), 4))
    reference = [[round(logp + draw.gauss(0, 0.5), 4) if logp else 0.0 for logp in row] for row in policy]
    reference = [[min(logp, -0.01) if logp else 0.0 for logp in row] for row in reference]
    return {
        "chosen_lengths": CHOSEN_LENGTHS,
        "rejected_lengths": REJECTED_LENGTHS,
        "policy": policy,
        "reference": reference,
        "log_sum_sq_probs": table(lambda: round(-draw.uniform(0.2, 2.5), 4)),
    }


def bare(trainer, **attributes):
    """A trainer with nothing but the attributes that its loss reads."""
    made = object.__new__(trainer)
    accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    made.__dict__.update(accelerator=accelerator, aux_loss_enabled=False, **attributes)
    return made


class Model(torch.nn.Module):
    """Answers every call with `outputs`."""

    is_gradient_checkpointing = False

    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, *args, **kwargs):
        return self.outputs


def run_dpo(inputs, loss_type, loss_weights, parameters):
    """(loss, policy gradient of every token, reference gradient of every row) of TRL's DPOTrainer."""
    # TRL's alpha divergence knows no float64.
    alpha = parameters.get("f_divergence_type") == "alpha_divergence"
    kind = torch.float32 if alpha else torch.float64
    policy, reference, squares = (
        torch.tensor(inputs[name], dtype=kind) for name in ("policy", "reference", "log_sum_sq_probs")
    )
    policy.requires_grad_()
    outputs = SimpleNamespace(
        log_probs=policy,
        log_sum_sq_probs=squares,
        entropy=torch.zeros_like(squares),
        mean_logits=torch.zeros_like(squares),
        is_top1=torch.zeros_like(squares, dtype=torch.bool),
    )
    model = Model(outputs)
    trainer = bare(
        DPOTrainer,
        model=model,
        ref_model=Model(SimpleNamespace(log_probs=reference)),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=parameters.get("discopop_tau", 0.05)),
        precompute_ref_logps=True,
        loss_types=loss_type,
        loss_weights=loss_weights,
        beta=parameters.get("beta", 0.1),
        label_smoothing=parameters.get("label_smoothing", 1e-3 if "exo_pair" in loss_type else 0.0),
        ld_alpha=parameters.get("ld_alpha"),
        f_divergence_type=parameters.get("f_divergence_type", "reverse_kl"),
        f_alpha_divergence_coef=parameters.get("f_alpha_divergence_coef", 0.5),
        use_weighting=parameters.get("use_weighting", False),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    trainer.accelerator.autocast = torch.no_grad
    batch = {"input_ids": torch.zeros_like(MASK), "completion_mask": MASK, "attention_mask": torch.ones_like(MASK)}
    rows = torch.cat(trainer.compute_ref_log_probs(trainer.ref_model, batch)).detach().requires_grad_()
    batch["ref_chosen_logps"], batch["ref_rejected_logps"] = rows.chunk(2)
    loss = trainer._compute_loss(model, batch, return_outputs=False)
    gradients = torch.autograd.grad(loss, (policy, rows), allow_unused=True)
    metrics = {name: trainer._metrics["train"][f"rewards/{name}"][0] for name in ("chosen", "rejected")}
    return loss, gradients[0], gradients[1], metrics


def run_reference_free(trainer_class, inputs, loss_type, parameters):
    """(loss, policy gradient of every token, None) of TRL's CPOTrainer or ORPOTrainer."""
    policy = torch.tensor(inputs["policy"], dtype=torch.float64).requires_grad_()
    # Two words: token 0 has the fixed logp, word 1 the rest, so that log softmax gives the logp back
    # and its gradient to the logp is exactly one. Padding may be anything that is a logp.
    logps = torch.where(MASK[:, 1:] == 1, policy, torch.tensor(-1.0, dtype=torch.float64))
    words = torch.stack([logps, torch.log(-torch.expm1(logps))], dim=-1)
    logits = torch.cat([words, torch.zeros(2 * PAIRS, 1, 2, dtype=torch.float64)], dim=1)
    trainer = bare(
        trainer_class,
        loss_type="simpo" if loss_type == ["simpo"] else "sigmoid",
        beta=parameters.get("beta", 2.0 if loss_type == ["simpo"] else 0.1),
        label_smoothing=parameters.get("label_smoothing", 0.0),
        simpo_gamma=parameters.get("simpo_gamma", 0.5),
        cpo_alpha=0.0 if loss_type == ["simpo"] else parameters.get("cpo_alpha", 1.0),
        alpha=0.0,
        is_encoder_decoder=False,
        padding_value=0,
        pad_token_id=0,
    )
    batch = {}
    for name, mask in zip(("chosen", "rejected"), MASK.chunk(2), strict=True):
        batch[f"{name}_input_ids"] = torch.zeros_like(mask)
        batch[f"{name}_labels"] = torch.where(mask == 1, 0, -100)
        batch[f"{name}_attention_mask"] = torch.cat([torch.ones_like(mask[:, :1]), mask[:, 1:]], dim=1)
    model = Model(SimpleNamespace(logits=logits))
    loss, metrics = trainer.get_batch_loss_metrics(model, batch)
    rewards = {name: float(metrics[f"rewards/{name}"]) for name in ("chosen", "rejected")}
    return loss, torch.autograd.grad(loss, policy)[0], None, rewards


def make_case(inputs, trainer, loss_type, loss_weights, parameters):
    """One entry of losses.json."""
    if trainer == "dpo":
        loss, tokens, rows, rewards = run_dpo(inputs, loss_type, loss_weights, parameters)
    else:
        trainer_class = CPOTrainer if trainer == "cpo" else ORPOTrainer
        loss, tokens, rows, rewards = run_reference_free(trainer_class, inputs, loss_type, parameters)
    rows = torch.zeros(2 * PAIRS) if rows is None else rows
    last = tokens[torch.arange(2 * PAIRS), torch.tensor(LENGTHS) - 1]
    return {
        "loss_type": loss_type,
        "loss_weights": loss_weights,
        "parameters": parameters,
        "loss": loss.item(),
        # The gradient to a row's logps is the gradient to its first token; with ld_alpha, its last differs.
        "policy_gradient": [float(f"{value:.9g}") for value in tokens[:, 0].tolist()],
        "last_token_gradient": [float(f"{value:.9g}") for value in last.tolist()],
        "reference_gradient": [float(f"{value:.9g}") for value in rows.tolist()],
        "rewards": rewards,
    }


def main():
    inputs = make_inputs()
    made = [make_case(inputs, *case) for case in cases()]
    lines = ",\n".join(json.dumps(case) for case in made)
    source = f"TRL {trl.__version__}, torch {torch.__version__}"
    text = f'{{"source": {json.dumps(source)},\n"inputs": {json.dumps(inputs)},\n"cases": [\n{lines}\n]}}\n'
    Path(__file__).with_name("losses.json").write_text(text)
    print(f"{len(made)} cases from {source}")


if __name__ == "__main__":
    main()

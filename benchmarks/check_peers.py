"""Compare DPO's loss and gradient here, and in other programs that train on MLX, with torch in float64.

    python benchmarks/check_peers.py --model FOLDER --data FOLDER --torch PYTHON --mlx-lm-lora PYTHON
        --mlx-tune PYTHON --unsloth PYTHON

The model has LoRA layers with the same values in every program, none at zero, and its reference is the model without
them. Each program makes tokens of the same rows by its own functions, as its documents tell, and says which of them its
loss scores; the loss and the gradient of the LoRA layers are its own loss function's. Torch computes both in float64,
once from that program's tokens and once from the tokens of DPO's definition: the prompt as the chat template ends it
for an answer, and as scored tokens the answer and one end-of-sequence token; of a row that is too long, as many of
the prompt's first tokens are left out as the longer response asks for. Llama models alone: the LoRA layers are put into
transformers' model by hooks.
"""

import argparse
import json
import shutil
import sys
import tempfile
from difflib import SequenceMatcher
from pathlib import Path
from types import SimpleNamespace

from common import fast_blas, own_environment, run_json, say
from compare_peers import PROJECTIONS, RANK, SCALE, as_messages, import_unsloth, read_rows, rendered, write_adapters
from records import keep
from tables import peers_losses_table

BETA = 0.1
ONE = {"prompt": "What is the capital of France?", "chosen": "It is Paris.", "rejected": "I will not say."}
NO_EOS = "{% for m in messages %}{{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
NO_EOS += "{% if add_generation_prompt %}assistant:\n{% endif %}"
WORDS = 100
# Name: rows, None for the data's first four of fewer than WORDS words; most tokens; what is made of strings.
CASES = {
    "four real rows": (None, 512, "template"),
    "a prompt of 200 words, 128 tokens": ([ONE | {"prompt": "Say it again. " * 66 + ONE["prompt"]}], 128, "template"),
    "a system message": ([ONE | {"system": "You are a geographer."}], 512, "template"),
    "responses that repeat the prompt": (
        [ONE | {key: f"{ONE['prompt']} {ONE[key]}" for key in ("chosen", "rejected")}], 512, "template",
    ),
    "responses of 1 and of 60 words": ([ONE | {"chosen": "Paris", "rejected": "never " * 60}], 512, "template"),
    "a template that ends no turn with EOS": ([ONE], 512, "no EOS"),
    "strings without a template": ([ONE | {"prompt": ONE["prompt"] + "\n"}], 512, "text"),
}  # fmt: skip


# Name: the program, whether its batch is one pair alone, and whether activations are computed again.
PROGRAMS = {
    "here": ("here", False, False),
    "mlx-lm-lora": ("mlx_lm_lora", False, False),
    "mlx-tune": ("mlx_tune", False, False),
    "mlx-tune, a pair a step": ("mlx_tune", True, False),
    "mlx-tune, a pair a step, checkpoints": ("mlx_tune", True, True),
    "Unsloth": ("unsloth", False, False),
}
ALONE = "a system message"


def with_adapters(model, spec):
    """The model with LoRA layers of the file's values."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model.freeze()
    linear_to_lora_layers(model, len(model.layers), {"rank": RANK, "scale": SCALE, "dropout": 0.0})
    model.load_weights(spec["adapters"], strict=False)
    return model.train()


# A program's function returns what its loss reads, `(tokens, scored)` of each chosen sequence and then of each rejected
# one, with a 1 for each scored token; the loss; and the gradient.


def score_here(spec):
    import mlx.core as mx

    from mlx_lm.tuner.datasets import load_dataset
    from mlx_lm.tuner.preference.batches import make_batch
    from mlx_lm.tuner.preference.logps import Scorer
    from mlx_lm.tuner.preference.objective import Objective, preference_loss
    from mlx_lm.tuner.preference.reference import Reference
    from mlx_lm.tuner.preference.step import Step
    from mlx_lm.utils import load

    model, tokenizer = load(spec["model"])
    config = {"data": spec["data"], "train": True, "test": False, "loss_type": "dpo", "max_seq_length": spec["most"]}
    config["use_chat_template"] = spec["kind"] != "text"
    data, *_ = load_dataset(SimpleNamespace(**config), tokenizer)
    pairs = [data[i] for i in range(len(data))]
    reference = mx.array(Reference(Scorer(model)).logps(pairs, range(len(pairs))))
    objective = Objective(Scorer(with_adapters(model, spec)), preference_loss("dpo", beta=BETA))
    batch, *_ = make_batch(pairs, objective.scorer.arrangement)
    step = Step(model, None, objective, False)
    gradient = step.flat.views(step.gradient(batch, reference)[1])
    rows = [
        ((*pair.prompt, *answer), [0] * len(pair.prompt) + [1] * len(answer))
        for side in ("chosen", "rejected")
        for pair in pairs
        for answer in [getattr(pair, side)]
    ]
    return rows, objective(batch, reference)[0] / len(pairs), scaled(gradient, 1 / len(pairs))


def scaled(tree, factor):
    from mlx.utils import tree_map

    return tree_map(lambda x: x * factor, tree)


def score_mlx_lm_lora(spec):
    import mlx.nn as nn
    from mlx_lm_lora.trainer.datasets import DPODataset
    from mlx_lm_lora.trainer.dpo_trainer import compute_score, dpo_loss, get_token_scores, iterate_dpo_batches

    from mlx_lm.utils import load

    model, tokenizer = load(spec["model"])
    data = DPODataset(read_rows(spec["data"]), tokenizer)
    batch = next(iterate_dpo_batches(data, len(data), spec["most"]))
    sides = list(zip(batch[:2], batch[2:], strict=True))

    def scores(model):
        return [compute_score(get_token_scores(model, *side), side[1], "sigmoid") for side in sides]

    reference = scores(model)

    def loss(model):
        policy = scores(model)
        return dpo_loss(*policy, *reference, *batch[2:], beta=BETA, delta=50.0)[0]

    value, gradient = nn.value_and_grad(with_adapters(model, spec), loss)(model)
    rows = [row for side in sides for row in zip(*(x.tolist() for x in side), strict=True)]
    return rows, value, gradient


def score_mlx_tune(spec):
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_tune import DPOConfig, DPOTrainer
    from mlx_tune.losses import compute_reference_logprobs, dpo_loss

    from mlx_lm.tuner.trainer import grad_checkpoint
    from mlx_lm.utils import load

    model, tokenizer = load(spec["model"])
    rows = [row if spec["kind"] == "text" else rendered(row, tokenizer) for row in read_rows(spec["data"])]
    config = DPOConfig(max_seq_length=spec["most"], output_dir=spec["folder"])
    trainer = DPOTrainer(model=model, tokenizer=tokenizer, train_dataset=rows, args=config)
    made = trainer._prepare_dpo_batches()
    width = max(row[f"{side}_length"] for row in made for side in ("chosen", "rejected"))
    sides = [
        (
            mx.array([trainer._pad_to_length(row[f"{side}_ids"], width) for row in made]),
            mx.array([row[f"{side}_length"] for row in made]),
        )
        for side in ("chosen", "rejected")
    ]
    batch = [x for pair in zip(*sides, strict=True) for x in pair]
    reference = compute_reference_logprobs(model, *batch)
    # With a pair a batch its trainer has both responses share their prompt.
    names = {"prompt_length": "prompt_length", "chosen_length_py": "chosen_length"}
    names |= {"rejected_length_py": "rejected_length"}
    alone = {name: made[0][key] for name, key in names.items()} if spec["alone"] else {}
    if spec["checkpoint"]:
        grad_checkpoint(model.layers[0])

    def loss(model):
        return dpo_loss(model, *batch, BETA, *reference, **alone)[0]

    value, gradient = nn.value_and_grad(with_adapters(model, spec), loss)(model)
    tokens = [row[f"{side}_ids"] for side in ("chosen", "rejected") for row in made]
    begun = made[0]["prompt_length"] if spec["alone"] else 1
    return [(each, [0] * begun + [1] * (len(each) - begun)) for each in tokens], value, gradient


def score_unsloth(spec):
    import mlx.nn as nn

    FastMLXModel, _ = import_unsloth()
    from unsloth_zoo.mlx import preference

    model, tokenizer = FastMLXModel.from_pretrained(spec["model"], load_in_4bit=False, dtype="float32")
    model = FastMLXModel.get_peft_model(
        model, r=RANK, lora_alpha=RANK * SCALE, target_modules=PROJECTIONS, use_gradient_checkpointing=False
    )
    policy, _ = preference.build_reference_policy(model, reference_free=False, resume_provenance=None)
    model.load_weights(spec["adapters"], strict=False)
    config = SimpleNamespace(max_length=spec["most"], max_prompt_length=512)
    limits = preference.resolve_preference_length_policy("dpo", config, max_seq_length=spec["most"])
    rows = [row if spec["kind"] == "text" else as_messages(row) for row in read_rows(spec["data"])]
    plan = preference.create_preference_batch_plan(
        rows, tokenizer, batch_size=len(rows), length_policy=limits, num_batches=1, grad_accum=1,
        dataset_order="sequential",
    )  # fmt: skip
    objective = preference.resolve_preference_objective("dpo", beta=BETA)
    loss = preference.make_dpo_cce_loss_fn(model, objective, reference_policy=policy)
    scorer = preference._make_preference_cce_scorer(model)
    preference.precompute_reference_logps(plan, model, policy, batch_size=len(rows), scorer=scorer)
    (value, *_), gradient = nn.value_and_grad(model, loss)(model, *plan[0])
    tokens, lengths = plan[0][0].tolist(), plan[0][1].tolist()
    rows = [
        (row[:end], [0] * prompt + [1] * (end - prompt)) for row, (prompt, end) in zip(tokens, lengths, strict=True)
    ]
    return rows, value, gradient


def score_torch(spec):
    """The loss and the gradient of `(tokens, scored)` rows, in float64."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float64).requires_grad_(False).eval()
    adapters = {name: x.double().requires_grad_() for name, x in load_file(spec["adapters"]).items()}
    strength = [0.0]
    for name, module in model.named_modules():
        if f"{name}.lora_a" in adapters:
            a, b = adapters[f"{name}.lora_a"], adapters[f"{name}.lora_b"]
            module.register_forward_hook(lambda module, inputs, out, a=a, b=b: out + strength[0] * (inputs[0] @ a @ b))

    def logps(row):
        tokens, scored = (torch.tensor(each)[None] for each in row)
        found = model(tokens).logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
        return (found * scored[:, 1:]).sum()

    pairs, total = len(spec["rows"]) // 2, 0.0
    for chosen, rejected in zip(spec["rows"][:pairs], spec["rows"][pairs:], strict=True):
        strength[0] = 0.0
        with torch.no_grad():
            reference = logps(chosen) - logps(rejected)
        strength[0] = SCALE
        loss = -torch.nn.functional.logsigmoid(BETA * (logps(chosen) - logps(rejected) - reference)) / pairs
        loss.backward()
        total += loss.item()
    save_file({name: x.grad for name, x in adapters.items()}, spec["gradient"])
    return {"loss": total}


def work(spec):
    """What a process does for a program."""
    if spec["side"] == "torch":
        return score_torch(spec)
    import mlx.core as mx
    from mlx.utils import tree_flatten

    rows, loss, gradient = globals()[f"score_{spec['side']}"](spec)
    mx.save_safetensors(spec["gradient"], dict(tree_flatten(gradient)))
    rows = [([int(x) for x in tokens], [int(x) for x in scored]) for tokens, scored in rows]
    # Padding is left out: nothing that is scored reads it.
    ends = [max((i for i, one in enumerate(scored) if one), default=1) + 1 for _, scored in rows]
    rows = [(tokens[:end], scored[:end]) for (tokens, scored), end in zip(rows, ends, strict=True)]
    return {"rows": rows, "loss": float(loss)}


def start(side, spec, options):
    """Run `work` in a process of its own."""
    python = getattr(options, side, None)
    variables = own_environment() if python is None else {"PYTHONPATH": None} | (fast_blas() if side != "torch" else {})
    command = [python or sys.executable, __file__, "--work", json.dumps(spec | {"side": side})]
    found = run_json(command, {"HF_HUB_OFFLINE": "1"} | variables)
    say(f"{side}: {str(found)[:200]}")
    return found


def defined(rows, spec, tokenizer):
    """`(tokens, scored)` of the chosen sequences and then of the rejected ones, as DPO's definition has them."""
    found = {"chosen": [], "rejected": []}
    for row in rows:
        if spec["kind"] != "text":
            row = {key: text.partition(tokenizer.eos_token)[0] if key != "prompt" else text
                   for key, text in rendered(row, tokenizer).items()}  # fmt: skip
        row = {key: tokenizer.encode(row[key], add_special_tokens=False) for key in ("prompt", *found)}
        answers = {side: [*row[side], tokenizer.eos_token_id] for side in found}
        over = len(row["prompt"]) + max(map(len, answers.values())) - spec["most"]
        prompt = row["prompt"][max(over, 0) :]
        for side, answer in answers.items():
            found[side].append(((*prompt, *answer), [0] * len(prompt) + [1] * len(answer)))
    return [*found["chosen"], *found["rejected"]]


def difference(found, expected, tokenizer):
    """What a program scores of the rows that it should not, and how many tokens it does not score.

    Args:
        found, expected: as a program's function returns them; the former's rows may have another order.

    Returns:
        The most tokens of a row that are scored before what it should score, the texts of those behind it, and a count.
    """
    both = [[[x for x, one in zip(*row, strict=True) if one] for row in rows] for rows in (found, expected)]
    half, before, after, lost = len(expected) // 2, 0, {}, 0
    for i, right in enumerate(both[1]):
        side = both[0][:half] if i < half else both[0][half:]
        alike = [(SequenceMatcher(None, row, right, False).find_longest_match(), row) for row in side]
        (start, _, size), row = max(alike, key=lambda each: each[0].size)
        # What is alike by chance, such as a full stop, is no match.
        size = size if 2 * size >= min(len(row), len(right)) else 0
        before = max(before, start if size else len(row))
        after |= {tokenizer.decode(row[start + size :]): None} if size else {}
        lost += len(right) - size
    return {"before": before, "after": "".join(after), "lost": lost}


def compare(found, exact):
    """The cosine of two files of gradients, None where one is zero."""
    from safetensors.numpy import load_file

    found, exact = (load_file(path) for path in (found, exact))
    pairs = [(found[name].astype("float64").ravel(), x.ravel()) for name, x in exact.items()]
    products = zip(*((x @ y, x @ x, y @ y) for x, y in pairs), strict=True)
    product, one, other = (sum(map(float, each)) for each in products)
    return product / (one * other) ** 0.5 if one and other else None


def copied(model, folder, layers=None, template=None):
    """A copy of a model folder with only its first layers, or with another chat template."""
    import mlx.core as mx

    folder = Path(shutil.copytree(model, folder))
    if template:
        (folder / "chat_template.jinja").write_text(template)
    if layers:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
        left_out = tuple(f"model.layers.{i}." for i in range(layers, config["num_hidden_layers"]))
        weights = mx.load(f"{model}/model.safetensors").items()
        kept = {name: x for name, x in weights if not name.startswith(left_out)}
        mx.save_safetensors(f"{folder}/model.safetensors", kept, {"format": "mlx"})
    return str(folder)


def fill_adapters(path):
    """Give LoRA layers' matrices that are zero in a file other values, so that every one has a gradient."""
    import mlx.core as mx

    values = {name: x if x.any() else 2e-3 * mx.random.normal(x.shape) for name, x in mx.load(path).items()}
    mx.save_safetensors(path, values)


def measure(case, options, folder):
    """Rows of the table: a program each."""
    from transformers import AutoTokenizer

    rows, most, kind = CASES[case]
    rows = rows or [row for row in read_rows(options.data) if len(" ".join(row.values()).split()) < WORDS][:4]
    data = Path(folder) / "data"
    data.mkdir(exist_ok=True)
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = copied(options.model, f"{folder}/no_eos", template=NO_EOS) if kind == "no EOS" else options.model
    spec = {"model": model, "data": str(data), "most": most, "kind": kind, "folder": f"{folder}/out"}
    spec["adapters"] = f"{folder}/adapters.safetensors"
    tokenizer = AutoTokenizer.from_pretrained(model)
    expected = defined(rows, spec, tokenizer)

    def exact(rows, name):
        return start("torch", spec | {"rows": rows, "gradient": f"{folder}/{name}.safetensors"}, options)

    right = exact(expected, "defined")
    for name, (side, alone, checkpoint) in PROGRAMS.items():
        if (
            side != "here" and not getattr(options, side)
            or side == "mlx_lm_lora" and kind == "text"
            or alone and case != ALONE
        ):  # fmt: skip
            continue
        gradient = f"{folder}/{side}.safetensors"
        found = start(side, spec | {"gradient": gradient, "alone": alone, "checkpoint": checkpoint}, options)
        row = {"case": case, "program": name, **{key: value for key, value in found.items() if key != "rows"}}
        if "error" not in found:
            alike = found["rows"] == [[list(tokens), scored] for tokens, scored in expected]
            same = right if alike else exact(found["rows"], "same")
            row |= {"same_tokens": same["loss"], "defined": right["loss"]}
            row |= {"cosine": compare(gradient, f"{folder}/{'defined' if alike else 'same'}.safetensors")}
            row |= {"cosine_defined": compare(gradient, f"{folder}/defined.safetensors")}
            row |= difference(found["rows"], expected, tokenizer)
        yield row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("torch", "mlx-lm-lora", "mlx-tune", "unsloth"):
        parser.add_argument(f"--{name}", metavar="PYTHON", help=f"interpreter with {name}")
    parser.add_argument("--model", help="folder of a Llama in float32")
    parser.add_argument("--data", help="folder with train.jsonl")
    parser.add_argument("--layers", type=int, help="only so many first ones of MODEL's")
    parser.add_argument("--cases", type=int, help="only so many")
    parser.add_argument("--out", help="JSON file for the results")
    parser.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        print("\n" + json.dumps(work(options.work)), flush=True)
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if options.layers:
            options.model = copied(options.model, f"{folder}/model", layers=options.layers)
        write_adapters({"model": options.model, "adapters": f"{folder}/adapters.safetensors"})
        fill_adapters(f"{folder}/adapters.safetensors")
        for case in list(CASES)[: options.cases]:
            for row in measure(case, options, folder):
                say(str(row))
                rows.append(row)
            found = keep(options.out, rows, *filter(None, (options.unsloth, options.mlx_lm_lora, options.mlx_tune)))
    print(peers_losses_table(found))


if __name__ == "__main__":
    main()

"""A configuration of TRL's DPOConfig or KTOConfig in this project's words.

Read are their keys, and those of `trl dpo`'s other classes: of the data set, the model and PEFT. What a file does
not say has TRL's default, not mlx-lm's, so that the two runs are alike.
"""

import argparse
import math
import re
import sys
from pathlib import Path

import yaml

from .check import check_file
from .counterparts import BY_NAME
from .figures import BEST
from .loss_table import LOSSES
from .options import ConfigError, printable

# DPOConfig's defaults where this command's are others, or a setting here is made of several there.
DEFAULTS = {
    "loss_type": ["sigmoid"],
    "learning_rate": 1e-6,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 3.0,
    "max_steps": -1,
    "max_length": 1024,
    "gradient_checkpointing": True,
    "max_grad_norm": 1.0,
    "optim": "adamw_torch_fused",
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "logging_steps": 10,
    "eval_strategy": "no",
    "save_steps": 500,
    "seed": 42,
    "disable_dropout": True,
    "ref_model_sync_steps": 512,
    "ref_model_mixup_alpha": 0.6,
}
# ModelConfig's, which count where a file names a model.
MODEL_DEFAULTS = {"use_peft": False, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05}
# What a KTOConfig alone has; its other defaults here are DPOConfig's.
KTO_WEIGHTS = ("desirable_weight", "undesirable_weight")
# Layers that PEFT names by their last word, by their path in a block of most of mlx-lm's models.
PATHS = {name: f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
PATHS |= {name: f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
SAVE_BEST = {figure: name for name, (figure, _) in BEST.items()}
UNBOUNDED = 2**20  # tokens
NOTHING = (None, False, "", [], {}, "no", "none")
# Of null, which elsewhere leaves TRL's default: no clipping.
OF_NULL = {"max_grad_norm": 0}


class _Translation:
    """The lines of a file as they come: settings here, and comments on keys there."""

    def __init__(self, given):
        given_or_off = {name: OF_NULL.get(name) if value is None else value for name, value in given.items()}
        self.given = {name: value for name, value in given_or_off.items() if value is not None}
        self.left = dict(given)
        self.lines = []

    def take(self, name, default=None):
        """The value of a key there, or TRL's default."""
        self.left.pop(name, None)
        return self.given.get(name, DEFAULTS.get(name, default))

    def line(self, key, value, note=""):
        """A setting here."""
        self.lines.append(f"{key}: {_text(value)}" + (f"  # {_one_line(note)}" if note else ""))

    def put(self, name, value):
        """The counterpart of a key there, with what the table says of it."""
        here, differs = BY_NAME[name]
        default = "" if name in self.given else "TRL's default"
        self.line(here, value, "; ".join(filter(None, (default, differs))))

    def carry(self, *names):
        """The counterparts of keys there, with their values, unless these are off."""
        for name in names:
            if (value := self.take(name)) not in NOTHING:
                self.put(name, value)

    def note(self, text):
        self.lines.append("# " + _one_line(text))


def _one_line(text):
    """What a comment may hold: a line end would have what follows be read as a setting."""
    return printable(" ".join(str(text).split()))


def _text(value):
    """A value as it stands in a line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, sort_keys=False)
    return text.removesuffix("...\n").strip()


def translate(given, name):
    """The text of a configuration file, with a comment for each key that has no counterpart.

    Args:
        given: the keys and values of a DPOConfig, or of a KTOConfig, which its weights or its loss tell.
        name: what to call its file.

    Raises:
        ConfigError: a value is of another type than TRL's, or a loss is not known.
    """
    made = _Translation(given)
    kto = any(key in given for key in KTO_WEIGHTS) or given.get("loss_type") == "kto"
    made.note(f"{name}, a {'KTO' if kto else 'DPO'}Config of TRL, in the words of mlx_lm.lora.")
    _model_and_data(made)
    made.note("use_chat_template: strings become turns of a chat here; false trains them as they stand, as TRL does.")
    made.note("score: of a response the model's own turns here; all scores those of users and tools, too, as TRL does.")
    made.line("train", True)
    _loss(made, ["kto"] if kto else DEFAULTS["loss_type"])
    _adapters(made)
    updates = _length(made)
    _optimizer(made, updates)
    _reports(made, updates)
    _rest(made)
    return "\n".join(made.lines) + "\n"


def _model_and_data(made):
    for key, names in (("model", "model_name_or_path"), ("adapter_path", "output_dir")):
        if (value := made.take(names)) is not None:
            made.line(key, value)
        else:
            made.note(f"{key}: the file has no {names}; give one here or as --{key.replace('_', '-')}.")
    name, config, train_split, test_split = (
        made.take(f"dataset_{key}") for key in ("name", "config", "train_split", "test_split")
    )
    validates = _strategy(made, "eval_strategy") != "no"
    if name is None:
        return made.note("data: the file has no dataset_name; give a folder or a data set here or as --data.")
    if not (config or train_split or test_split or validates):
        return made.line("data", name)
    train_split, told = str(train_split or "train"), ""
    if not test_split and not validates:
        # All rows are trained on.
        test_split = re.split(r"[\[+]", train_split)[0] + "[:1]"
        told = "valid_split stands for none, and is not validated on with val_batches 0"
    entry = {"path": name, "train_split": train_split, "valid_split": test_split or "test"}
    made.line("hf_dataset", [entry | ({"config": {"name": config}} if config else {})], told)


def _strategy(made, name, default=None):
    """When something is done; YAML reads a bare `no` as false."""
    value = made.take(name, default)
    return "no" if value is False else str(value)


def _loss(made, default):
    names = made.take("loss_type") if "loss_type" in made.given else default
    names = [names] if isinstance(names, str) else names
    for name in names:
        if name not in LOSSES:
            raise ConfigError(f"loss_type has {name!r}, which is no loss here.")
    made.put("loss_type", names[0] if len(names) == 1 else names)
    read = {"beta", "loss_weights"}.union(*(LOSSES[name].options for name in names))
    if not {"robust", "exo_pair", "aot", "aot_unpaired"} & set(names):
        read.discard("label_smoothing")
    for name in sorted(read & made.given.keys() & BY_NAME.keys()):
        made.put(name, made.take(name))
    every, share, synced = (
        made.take(key) for key in ("ref_model_sync_steps", "ref_model_mixup_alpha", "sync_ref_model")
    )
    if synced:
        made.put("ref_model_sync_steps", every)
        made.put("ref_model_mixup_alpha", share)
    if "router_aux_loss_coef" not in made.given:
        made.note(f"router_aux_loss_coef: {BY_NAME['router_aux_loss_coef'][1]}, where it is a mixture of experts.")
    made.carry("precompute_ref_batch_size", "router_aux_loss_coef")


def _adapters(made):
    """LoRA's settings; a file of DPOConfig's keys alone leaves them to the program that reads it."""
    of_model = any(name in made.given for name in ("model_name_or_path", "use_peft"))
    dropped = made.take("disable_dropout")
    if not of_model:
        return made.note("lora_parameters: a DPOConfig has none; see fine_tune_type and lora_parameters in LORA.md.")
    peft = {name: made.take(name, MODEL_DEFAULTS[name]) for name in MODEL_DEFAULTS}
    dora, modules = made.take("use_dora"), made.take("lora_target_modules")
    if not peft["use_peft"]:
        made.line("fine_tune_type", "full", "trains the layers; there embeddings and head, too")
        return made.line("num_layers", -1)
    made.line("fine_tune_type", "dora" if dora else "lora")
    made.line("num_layers", -1)
    parameters = {"rank": peft["lora_r"], "scale": peft["lora_alpha"] / peft["lora_r"]}
    parameters["dropout"] = 0.0 if dropped else peft["lora_dropout"]
    if modules is None:
        made.note("lora_parameters: PEFT chooses the layers of each model by itself, q_proj and v_proj of most.")
        modules = ["q_proj", "v_proj"]
    modules = [modules] if isinstance(modules, str) else modules
    if modules != ["all-linear"]:
        parameters["keys"] = [PATHS.get(module, module) for module in modules]
    made.line("lora_parameters", parameters)
    made.carry("use_rslora", "loraplus_lr_ratio")


def _length(made):
    """Steps, and what bounds them; the number of updates where the file says it."""
    made.carry("per_device_train_batch_size", "gradient_accumulation_steps")
    epochs, updates = made.take("num_train_epochs"), made.take("max_steps")
    if updates > 0:
        made.put("max_steps", updates * made.take("gradient_accumulation_steps"))
    else:
        made.put("num_train_epochs", epochs)
    if made.left.get("max_length", 0) is None:
        del made.left["max_length"]
        made.line("max_seq_length", UNBOUNDED, "no bound there")
    else:
        made.carry("max_length")
    checkpointing = made.take("gradient_checkpointing"), made.take("activation_checkpointing")
    made.put("gradient_checkpointing", any(checkpointing))
    made.put("seed", made.take("seed"))
    return updates if updates > 0 else None


def _optimizer(made, updates):
    name = str(made.take("optim"))
    decay, *betas, eps = (made.take(key) for key in ("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"))
    adam = {"betas": betas, "eps": eps, "weight_decay": decay, "bias_correction": True}
    fixed = {"scale_parameter": False, "relative_step": False}
    known = {"sgd": {"weight_decay": decay}, "adafactor": {"weight_decay": decay, **fixed}}
    if "adamw" not in name and name not in known:
        made.note(f"optim: {name} has no counterpart; AdamW stands for it.")
    optimizer = name if name in known else "adamw"
    made.put("optim", optimizer)
    made.line("optimizer_config", {optimizer: known.get(optimizer, adam)})
    made.carry("max_grad_norm")
    made.put("learning_rate", made.take("learning_rate"))
    _schedule(made, updates)


def _schedule(made, updates):
    rate, kind = made.take("learning_rate"), str(made.take("lr_scheduler_type"))
    warmup = made.take("warmup_steps") or made.take("warmup_ratio") or 0
    if kind == "constant":
        return
    if kind not in ("linear", "cosine", "constant_with_warmup"):
        return made.note(f"lr_scheduler_type: {kind} has no counterpart; MLX's schedules stand in LORA.md.")
    if updates is None:
        # An epoch's batches are not known before the data is read.
        wanted = f"{kind}, {warmup} of warmup" if warmup else kind
        letters = ("U - W", "W") if warmup else ("U", 0)
        return made.note(f"lr_schedule: {wanted} there; with U updates {_text(_schedule_of(kind, rate, *letters))}.")
    warmup = math.ceil(warmup * updates) if warmup < 1 else int(warmup)
    made.line("lr_schedule", _schedule_of(kind, rate, max(updates - warmup, 1), warmup))


def _schedule_of(kind, rate, decay, warmup):
    """A schedule here of `decay` updates after `warmup` of them, numbers or letters that stand for them."""
    rest = {
        "linear": ("linear_schedule", [rate, 0.0, decay]),
        "cosine": ("cosine_decay", [rate, decay]),
        "constant_with_warmup": ("linear_schedule", [rate, rate, 1]),
    }
    name, arguments = rest[kind]
    return {"name": name, "arguments": arguments} | ({"warmup": warmup} if warmup else {})


def _reports(made, updates):
    accumulated = made.take("gradient_accumulation_steps")

    def put_steps(name, value):
        """Batches here for updates there, or for a share of them, where their number is known."""
        if value < 1:
            if updates is None:
                return made.note(f"{name}: every {value} of the run there, whose updates the file does not say.")
            value = math.ceil(value * updates)
        made.put(name, int(value) * accumulated)

    logging, evaluating = made.take("logging_steps"), made.take("eval_steps")
    put_steps("logging_steps", logging)
    strategy = _strategy(made, "eval_strategy")
    made.put("eval_strategy", 0 if strategy == "no" else -1)
    if strategy == "steps":
        put_steps("eval_steps", evaluating or logging)
    elif strategy != "no":
        made.note(f"steps_per_eval: {strategy} there; a validation every so many batches here.")
    if (saving := _strategy(made, "save_strategy", "steps")) not in ("steps", "best"):
        made.note(f"save_every: {saving} there; a save every so many batches here.")
    else:
        put_steps("save_steps", made.take("save_steps"))
    made.carry("save_total_limit")
    metric = str(made.take("metric_for_best_model", "loss")).removeprefix("eval_")
    if (made.take("load_best_model_at_end") or saving == "best") and strategy != "no":
        if metric in SAVE_BEST:
            made.put("metric_for_best_model", SAVE_BEST[metric])
        else:
            made.note(f"save_best: {metric} is none of {', '.join(SAVE_BEST)}, which it goes by here.")
    if made.take("resume_from_checkpoint"):
        made.put("resume_from_checkpoint", True)
    services = made.take("report_to") or []
    services = [services] if isinstance(services, str) else services
    if told := [name for name in services if name in ("wandb", "swanlab", "tensorboard")]:
        made.put("report_to", ",".join(told))
        made.carry("project")
    if others := [name for name in services if name not in told and name != "none"]:
        made.note(f"report_to: {', '.join(others)} cannot be reported to.")
    made.carry("trust_remote_code", "torch_compile")


def _rest(made):
    off = [name for name, value in made.left.items() if value in NOTHING]
    for name in made.left:
        if name not in off:
            here, differs = BY_NAME.get(name, ("", ""))
            told = "; ".join(filter(None, (here != name and here and f"see {here}", differs))) or "no counterpart here"
            made.note(f"{name}: {told}.")
    if off:
        made.note(f"Off there, and left out: {', '.join(off)}.")


class FromTrl(argparse.Action):
    """The flag `--from-trl FILE`: print the file in this project's words, and end; `const` is the YAML loader."""

    def __call__(self, parser, namespace, path, option_string=None):
        given = yaml.load(check_file(path, self.const), self.const)
        try:
            sys.stdout.write(translate(given, Path(path).name))
        except (TypeError, ValueError, ArithmeticError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{path} holds a value of a type that TRL does not take there ({error}).") from error
        parser.exit()

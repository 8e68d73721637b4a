"""Keys of TRL and mlx-lm-lora: what the tables say of them, and DPOConfig files in this project's words.

`golden/trl_config.json` has both programs' own keys and defaults; `golden/make_configs.py` makes it.
"""

import inspect
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.optimizers as optimizers
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tuner.utils import build_schedule

import mlx_lm.lora
from mlx_lm.tuner.losses import PairLogps, dpop
from mlx_lm.tuner.preference.check import FURTHER_KEYS, check_config, warn_of_unread_keys
from mlx_lm.tuner.preference.counterparts import FORMER, MLX_LM_LORA, TRL, hint
from mlx_lm.tuner.preference.from_trl import DEFAULTS, MODEL_DEFAULTS, translate
from mlx_lm.tuner.preference.loss_table import LOSSES
from mlx_lm.tuner.preference.objective import preference_loss
from mlx_lm.tuner.preference.options import ConfigError

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = json.loads((ROOT / "tests" / "golden" / "trl_config.json").read_text())
PARTS = ("DPOConfig", "KTOConfig", "ModelConfig", "ScriptArguments", "DatasetMixtureConfig", "LoraConfig")
THEIRS = {name for part in PARTS for name in GOLDEN[part]}
# Arguments of the trainer, and keys of older releases.
BESIDES = {"ref_model", "ref_model_name_or_path", "warmup_ratio", "max_prompt_length", "max_completion_length"}
BESIDES |= {"torch_dtype", "loraplus_lr_ratio"}
DEFAULTS_HERE = mlx_lm.lora.CONFIG_DEFAULTS


def config_of(there):
    """What the command makes of a DPOConfig: its values after the check, and the comments of the file."""
    text = translate(there, "dpo.yaml")
    comments = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("# ")]
    values = yaml.load(text, mlx_lm.lora.yaml_loader)
    args = SimpleNamespace(**DEFAULTS_HERE | {"model": "m", "data": "d", "adapter_path": "a"} | values)
    check_config(args)
    return args, comments


# Of each key that a file's translation reads: what stands there, and what is here then.
PEFT = {"use_peft": True, "lora_target_modules": "all-linear"}
EXAMPLES = {
    "loss_type": ({"loss_type": ["sigmoid", "bco_pair", "sft"]}, {"loss_type": ["sigmoid", "bco_pair", "sft"]}),
    "beta": ({"beta": 0.3}, {"beta": 0.3}),
    "loss_weights": ({"loss_type": ["ipo", "sft"], "loss_weights": [0.8, 1.0]}, {"loss_weights": [0.8, 1.0]}),
    "ld_alpha": ({"ld_alpha": 0.5}, {"ld_alpha": 0.5}),
    "use_weighting": ({"use_weighting": True}, {"use_weighting": True}),
    "f_divergence_type": ({"f_divergence_type": "forward_kl"}, {"f_divergence_type": "forward_kl"}),
    "f_alpha_divergence_coef": (
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
        {"f_alpha_divergence_coef": 0.7},
    ),
    "discopop_tau": ({"loss_type": ["discopop"], "discopop_tau": 0.2}, {"loss_type": "discopop", "discopop_tau": 0.2}),
    "desirable_weight": ({"desirable_weight": 1.5}, {"loss_type": "kto", "desirable_weight": 1.5}),
    "undesirable_weight": ({"loss_type": "kto", "undesirable_weight": 0.5}, {"undesirable_weight": 0.5}),
    "label_smoothing": ({"loss_type": "robust", "label_smoothing": 0.1}, {"label_smoothing": 0.1}),
    "learning_rate": ({"learning_rate": "5e-7"}, {"learning_rate": 5e-7}),
    "per_device_train_batch_size": ({"per_device_train_batch_size": 2}, {"batch_size": 2}),
    "gradient_accumulation_steps": ({"gradient_accumulation_steps": 4}, {"grad_accumulation_steps": 4}),
    "num_train_epochs": ({"num_train_epochs": 2}, {"epochs": 2}),
    "max_steps": ({"max_steps": 30, "gradient_accumulation_steps": 4}, {"iters": 120}),
    "max_length": ({"max_length": 512}, {"max_seq_length": 512}),
    "gradient_checkpointing": ({"gradient_checkpointing": False}, {"grad_checkpoint": False}),
    "activation_checkpointing": (
        {"activation_checkpointing": True, "gradient_checkpointing": False},
        {"grad_checkpoint": True},
    ),
    "max_grad_norm": ({"max_grad_norm": 0.0}, {"max_grad_norm": None}),
    "optim": (
        {"optim": "adafactor"},
        {
            "optimizer": "adafactor",
            "optimizer_config.adafactor": {"weight_decay": 0.0, "scale_parameter": False, "relative_step": False},
        },
    ),
    "weight_decay": ({"weight_decay": 0.1}, {"optimizer_config.adamw.weight_decay": 0.1}),
    "adam_beta1": ({"adam_beta1": 0.8}, {"optimizer_config.adamw.betas": [0.8, 0.999]}),
    "adam_beta2": ({"adam_beta2": 0.95}, {"optimizer_config.adamw.betas": [0.9, 0.95]}),
    "adam_epsilon": ({"adam_epsilon": 1e-6}, {"optimizer_config.adamw.eps": 1e-6}),
    "lr_scheduler_type": (
        {"lr_scheduler_type": "cosine", "max_steps": 20, "learning_rate": 1e-5},
        {"lr_schedule": {"name": "cosine_decay", "arguments": [1e-5, 20]}},
    ),
    "warmup_steps": ({"warmup_steps": 5, "max_steps": 20}, {"lr_schedule.warmup": 5}),
    "warmup_ratio": ({"warmup_ratio": 0.1, "max_steps": 20}, {"lr_schedule.warmup": 2}),
    "logging_steps": ({"logging_steps": 5, "gradient_accumulation_steps": 4}, {"steps_per_report": 20}),
    "eval_strategy": ({"eval_strategy": "steps"}, {"val_batches": -1, "steps_per_eval": 10}),
    "eval_steps": ({"eval_strategy": "steps", "eval_steps": 50}, {"steps_per_eval": 50}),
    "save_steps": ({"save_steps": 0.5, "max_steps": 40}, {"save_every": 20}),
    "save_total_limit": ({"save_total_limit": 3}, {"keep_checkpoints": 3}),
    "metric_for_best_model": (
        {
            "load_best_model_at_end": True,
            "eval_strategy": "steps",
            "metric_for_best_model": "eval_rewards/accuracies",
        },
        {"save_best": "accuracy"},
    ),
    "load_best_model_at_end": ({"load_best_model_at_end": True, "eval_strategy": "steps"}, {"save_best": "eval_loss"}),
    "output_dir": ({"output_dir": "out"}, {"adapter_path": "out"}),
    "report_to": ({"report_to": ["wandb", "trackio"]}, {"report_to": "wandb"}),
    "project": ({"project": "mine", "report_to": "wandb"}, {"project_name": "mine"}),
    "seed": ({"seed": 7}, {"seed": 7}),
    "precompute_ref_batch_size": ({"precompute_ref_batch_size": 16}, {"reference_batch_size": 16}),
    "router_aux_loss_coef": ({"router_aux_loss_coef": 0.01}, {"router_aux_loss_coef": 0.01}),
    "ref_model_sync_steps": ({"sync_ref_model": True, "ref_model_sync_steps": 9}, {"reference_update_steps": 9}),
    "sync_ref_model": ({"sync_ref_model": True}, {"reference_update_steps": 512, "reference_mixup_alpha": 0.6}),
    "ref_model_mixup_alpha": ({"sync_ref_model": True, "ref_model_mixup_alpha": 0.3}, {"reference_mixup_alpha": 0.3}),
    "trust_remote_code": ({"trust_remote_code": True}, {"trust_remote_code": True}),
    "torch_compile": ({"torch_compile": True}, {"compile": True}),
    "dataset_name": ({"dataset_name": "owner/name"}, {"data": "owner/name"}),
    "dataset_config": (
        {"dataset_name": "a/b", "dataset_config": "en"},
        {"hf_dataset": [{"path": "a/b", "train_split": "train", "valid_split": "train[:1]", "config": {"name": "en"}}]},
    ),
    "dataset_train_split": (
        {"dataset_name": "a/b", "dataset_train_split": "t"},
        {"hf_dataset": [{"path": "a/b", "train_split": "t", "valid_split": "t[:1]"}]},
    ),
    "dataset_test_split": (
        {"dataset_name": "a/b", "dataset_test_split": "v"},
        {"hf_dataset": [{"path": "a/b", "train_split": "train", "valid_split": "v"}]},
    ),
    "model_name_or_path": (
        {"model_name_or_path": "a/b"},
        {"model": "a/b", "fine_tune_type": "full", "num_layers": -1},
    ),
    "use_peft": (PEFT, {"fine_tune_type": "lora", "num_layers": -1}),
    "use_dora": (PEFT | {"use_dora": True}, {"fine_tune_type": "dora"}),
    "lora_r": (PEFT | {"lora_r": 32}, {"lora_parameters": {"rank": 32, "scale": 1.0, "dropout": 0.0}}),
    "lora_alpha": (PEFT | {"lora_alpha": 8}, {"lora_parameters.scale": 0.5}),
    "use_rslora": (PEFT | {"use_rslora": True}, {"use_rslora": True, "lora_parameters.scale": 2.0}),
    "loraplus_lr_ratio": (PEFT | {"loraplus_lr_ratio": 16}, {"lora_plus_ratio": 16}),
    "lora_dropout": (PEFT | {"lora_dropout": 0.1, "disable_dropout": False}, {"lora_parameters.dropout": 0.1}),
    "lora_target_modules": (
        PEFT | {"lora_target_modules": ["q_proj", "down_proj", "fc1"]},
        {"lora_parameters.keys": ["self_attn.q_proj", "mlp.down_proj", "fc1"]},
    ),
}
# Keys that a DPOConfig's file does not have, or that hold more than a value here.
OTHERWISE = {"lr_scheduler_kwargs", "optim_args", "data_seed", "resume_from_checkpoint", "r", "target_modules"}
OTHERWISE |= {"ref_model", "ref_model_name_or_path", "datasets", "test_split_size"}


def test_every_key_of_the_tables_is_the_programs_and_its_counterpart_this_commands():
    here = set(DEFAULTS_HERE) | FURTHER_KEYS | {"epochs"}
    for table, theirs in (
        (TRL, THEIRS | BESIDES),
        (MLX_LM_LORA, set(GOLDEN["mlx_lm_lora"])),
        (FORMER, {"lora_layers"}),
    ):
        names = [name for row in table for name, _ in row.pairs()]
        assert len(names) == len(set(names)) and set(names) <= theirs
        assert {key for row in table for _, key in row.pairs()} - {""} <= here
    assert not BESIDES & THEIRS


def test_defaults_are_trls():
    assert DEFAULTS == {name: GOLDEN["DPOConfig"][name] for name in DEFAULTS}
    both = set(DEFAULTS) & set(GOLDEN["KTOConfig"]) - {"loss_type"}
    assert {name: GOLDEN["KTOConfig"][name] for name in both} == {name: DEFAULTS[name] for name in both}
    assert MODEL_DEFAULTS == {name: GOLDEN["ModelConfig"][name] for name in MODEL_DEFAULTS}


def test_each_key_with_a_counterpart_has_an_example():
    assert set(EXAMPLES) | OTHERWISE == {name for row in TRL for name, here in row.pairs() if here}


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_key_of_trl_becomes_its_counterpart(name):
    there, here = EXAMPLES[name]
    assert name in there
    args, comments = config_of(there)
    for path, expected in here.items():
        value = vars(args)
        for key in path.split("."):
            value = value[key]
        assert value == expected, path
    assert not any(line.startswith(f"{name}:") and "no counterpart" in line for line in comments)


def test_a_file_without_keys_has_trls_defaults():
    args, comments = config_of({})
    assert (args.loss_type, args.learning_rate, args.batch_size, args.epochs) == ("sigmoid", 1e-6, 8, 3.0)
    assert (args.max_seq_length, args.grad_checkpoint, args.max_grad_norm, args.val_batches) == (1024, True, 1.0, 0)
    adam = {"betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0, "bias_correction": True}
    assert (args.optimizer, args.optimizer_config["adamw"]) == ("adamw", adam)
    assert [line.split(":")[0] for line in comments[1:]] == [
        "model",
        "adapter_path",
        "data",
        "use_chat_template",
        "score",
        "router_aux_loss_coef",
        "lora_parameters",
        "lr_schedule",
    ]
    assert "router_aux_loss_coef" not in translate({"router_aux_loss_coef": 0.0}, "dpo.yaml")


@pytest.mark.parametrize(("kind", "loss"), [("DPOConfig", "sigmoid"), ("KTOConfig", "kto")])
def test_each_key_without_a_counterpart_is_named_in_a_comment(kind, loss):
    """A whole file, as TRL writes it."""
    args, comments = config_of(GOLDEN[kind] | {"run_name": "a\nb", "hub_token": "secret"})
    assert args.loss_type == loss and f"a {kind} of TRL" in comments[0]
    told = "\n".join(comments)
    read = set(EXAMPLES) | {"disable_dropout", "save_strategy", "resume_from_checkpoint"}
    for name in set(GOLDEN[kind]) - read:
        assert name in told, name
    assert "secret" not in told
    assert "bf16: the model runs" not in told and "bf16: the model runs" in "\n".join(config_of({"bf16": True})[1])


def test_what_differs_is_told_beside_a_setting():
    text = translate({"loss_type": ["sigmoid", "robust"], "label_smoothing": 0.1}, "dpo.yaml")
    assert "label_smoothing: 0.1  # smooths `dpo` too, which TRL 1.16 does not\n" in text
    assert "grad_accumulation_steps: 1  # TRL's default; an epoch's last batches wait for the next epoch's;" in text


def test_arguments_of_a_schedule_are_left_out_and_told():
    given = {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 2}, "max_steps": 20}
    assert "lr_scheduler_kwargs: see lr_schedule; left out; write what they ask for." in config_of(given)[1]


def test_what_has_no_counterpart_here_is_told():
    given = {"label_smoothing": 0.1, "optim": "lion_32bit", "logging_steps": 0.1}
    given |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_rewards/chosen", "eval_strategy": "steps"}
    given |= {"save_strategy": "epoch", "warmup_steps": 9, "model_name_or_path": "m", "use_peft": True}
    args, comments = config_of(given)
    assert args.lora_parameters["keys"] == ["self_attn.q_proj", "self_attn.v_proj"]
    assert (args.optimizer, args.save_best, args.lr_schedule) == ("adamw", None, None)
    for told in (
        "label_smoothing: smooths `dpo` too, which TRL 1.16 does not.",
        "lora_parameters: PEFT chooses the layers of each model by itself, q_proj and v_proj of most.",
        "optim: lion_32bit has no counterpart; AdamW stands for it.",
        "logging_steps: every 0.1 of the run there, whose updates the file does not say.",
        "save_every: epoch there; a save every so many batches here.",
        "save_best: rewards/chosen is none of loss, rewards/accuracies, rewards/margins, which it goes by here.",
    ):
        assert told in comments
    assert any(line.startswith("lr_schedule: linear, 9 of warmup there; with U updates") for line in comments)
    assert "steps_per_eval: epoch there; a validation every so many" in translate(
        {"eval_strategy": "epoch"}, "dpo.yaml"
    )
    services = translate({"report_to": ["swanlab", "trackio", "none"]}, "dpo.yaml")
    assert "\nreport_to: swanlab  #" in services and "\n# report_to: trackio cannot be reported to.\n" in services
    assert "\nresume: true  # the newest state" in translate({"resume_from_checkpoint": True}, "dpo.yaml")


def rate_of_trl(update, rate, updates, warmup):
    """The rate of an update of transformers' linear schedule with warmup."""
    return rate * (update / warmup if update < warmup else (updates - update) / (updates - warmup))


@pytest.mark.parametrize("warmup", [0, 4])
def test_the_linear_schedule_is_trls_up_to_one_update(warmup):
    args, _ = config_of({"learning_rate": 1e-4, "max_steps": 20, "warmup_steps": warmup})
    schedule = build_schedule(args.lr_schedule)
    for update in range(20):
        shifted = update - 1 if warmup and update > warmup else update
        expected = rate_of_trl(shifted, 1e-4, 20, warmup)
        assert schedule(mx.array(update)).item() == pytest.approx(expected, abs=1e-9), update


def dpop_value(beta):
    pairs = PairLogps(
        mx.array([-3.0]), mx.array([-3.0]), *(mx.array([-2.0]) for _ in range(2)), mx.ones(1), mx.ones(1), 3
    )
    return dpop(pairs, beta=beta, label_smoothing=0.0, dpop_lambda=5.0).item()


def refused(**parameters):
    with pytest.raises(ConfigError, match="does not read it"):
        preference_loss(**parameters)
    return True


# What a row tells beyond the names, where this code says it; a row's first key stands for it.
CLAIMS = {
    "loss_type": lambda: LOSSES["sigmoid"] is LOSSES["dpo"],
    "desirable_weight": lambda: set(GOLDEN["KTOConfig"]) - set(GOLDEN["DPOConfig"])
    == {"desirable_weight", "undesirable_weight"} <= set(LOSSES["kto"].options),
    "beta": lambda: refused(loss_type="dpo", discopop_tau=0.2),
    "label_smoothing": lambda: "label_smoothing" in LOSSES["dpo"].options,
    "weight_decay": lambda: inspect.signature(optimizers.AdamW).parameters["weight_decay"].default == 0.01
    and inspect.signature(optimizers.AdamW).parameters["bias_correction"].default is False,
    "num_train_epochs": lambda: config_of({"num_train_epochs": 2})[0].iters == DEFAULTS_HERE["iters"],
    "ref_model_mixup_alpha": lambda: GOLDEN["DPOConfig"]["ref_model_mixup_alpha"] == 0.6,
    "router_aux_loss_coef": lambda: DEFAULTS_HERE["router_aux_loss_coef"] is None,
    "disable_dropout": lambda: GOLDEN["DPOConfig"]["disable_dropout"] is True
    and DEFAULTS_HERE["lora_parameters"]["dropout"] == 0.0,
    "use_peft": lambda: DEFAULTS_HERE["fine_tune_type"] == "lora" and GOLDEN["ModelConfig"]["use_peft"] is False,
    "train_mode": lambda: {"dpo", "cpo", "orpo"} <= set(LOSSES),
    "dpo_cpo_loss_type": lambda: {"sigmoid", "hinge", "ipo", "dpop"} <= set(LOSSES),
    # The chosen logratio is -1, so that the logit is beta x (0 - lambda x 1), and the loss log(1 + exp(5 beta)).
    "delta": lambda: [dpop_value(beta) for beta in (0.2, 0.0)] == pytest.approx([1.3133, 0.6931], abs=1e-4),
    "lora_parameters": lambda: DEFAULTS_HERE["lora_parameters"]["scale"] == 20.0
    and GOLDEN["mlx_lm_lora"]["lora_parameters"]["scale"] == 10.0,
    "fuse": lambda: GOLDEN["mlx_lm_lora"]["fuse"] is True,
    "qat_enable": lambda: not [key for key in DEFAULTS_HERE if "qat" in key],
}  # fmt: skip


@pytest.mark.parametrize("name", CLAIMS)
def test_what_a_row_tells_is_so(name):
    assert name in {row.pairs()[0][0] for row in (*TRL, *MLX_LM_LORA)}
    assert CLAIMS[name]()


def test_hints_come_from_the_tables(capsys):
    keys = {"per_device_train_batch_size": 1, "bf16": True, "delta": 1, "lora_layers": 2, "nonsense": 3}
    warn_of_unread_keys(SimpleNamespace(**keys), DEFAULTS_HERE)
    told = capsys.readouterr().err
    assert "per_device_train_batch_size is not a key that this command reads (did you mean batch_size?)." in told
    assert "bf16 is not a key that this command reads (the model runs in the dtype of its files)." in told
    assert "(did you mean dpop_lambda?)" in told and "(did you mean num_layers?)" in told
    assert hint("nonsense") == ""


@given(st.fixed_dictionaries({}, optional={name: st.just(value) for name, value in GOLDEN["DPOConfig"].items()}
       | {"max_steps": st.integers(-1, 50), "warmup_steps": st.floats(0, 60), "max_length": st.none() | st.just(9),
          "eval_strategy": st.sampled_from(["no", "steps", "epoch"]), "logging_steps": st.sampled_from([0.1, 1, 7]),
          "lr_scheduler_type": st.sampled_from(["linear", "cosine", "constant", "polynomial", "constant_with_warmup"]),
          "optim": st.sampled_from(["adamw_torch", "adamw_bnb_8bit", "adafactor", "sgd", "lion_32bit"])}))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_any_dpo_config_becomes_a_configuration_that_passes_the_check(there):
    config_of(there)


def run(file, *flags):
    command = [sys.executable, "-m", "mlx_lm.lora", "--from-trl", str(file), *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_flag_prints_the_file_and_ends(tmp_path):
    (tmp_path / "dpo.json").write_text(json.dumps({"learning_rate": 1e-6, "beta": 0.2, "tf32": True}))
    done = run(tmp_path / "dpo.json")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("# dpo.json, a DPOConfig") and "# tf32: the model runs in" in done.stdout
    values = yaml.load(done.stdout, mlx_lm.lora.yaml_loader)
    assert (values["beta"], values["learning_rate"], values["train"]) == (0.2, 1e-6, True)


def test_no_limit_there_is_none_here():
    given = {"dataset_name": "a/b", "model_name_or_path": "m", "output_dir": "o"}
    args, comments = config_of(given | {"max_length": None, "save_total_limit": 0, "max_grad_norm": 0})
    assert (args.max_seq_length, args.keep_checkpoints, args.max_grad_norm) == (2**20, 2, None)
    assert "max_length" not in " ".join(comments)


def test_null_turns_clipping_off_and_leaves_other_defaults():
    args, _ = config_of({"max_grad_norm": None, "seed": None})
    assert (args.max_grad_norm, args.seed, config_of({})[0].max_grad_norm) == (None, 42, 1.0)


def test_validations_have_a_split_where_there_are_some():
    given = {"dataset_name": "a/b", "model_name_or_path": "m", "output_dir": "o"}
    args, _ = config_of(given | {"eval_strategy": "steps", "eval_steps": 5, "load_best_model_at_end": True})
    assert args.hf_dataset == [{"path": "a/b", "train_split": "train", "valid_split": "test"}]
    assert (args.val_batches, args.save_best) == (-1, "eval_loss")
    # As YAML reads a bare `no`.
    args, _ = config_of(given | {"eval_strategy": False, "save_strategy": False})
    assert (args.data, args.val_batches) == ("a/b", 0) and not hasattr(args, "hf_dataset")


def test_adapters_of_a_file_that_names_no_model_are_told():
    """As a LoraConfig's keys are, with which such a file does not say that it uses PEFT."""
    _, comments = config_of({"r": 16, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": ["q_proj"]})
    told = {line.split(":")[0] for line in comments}
    assert {"r", "lora_alpha", "lora_dropout", "target_modules"} <= told


def test_a_mixture_of_data_sets_is_left_to_its_user():
    _, comments = config_of({"datasets": [{"path": "a/b"}, {"path": "c/d"}], "test_split_size": 0.1})
    assert {
        "datasets: see hf_dataset.",
        "data: the file has no dataset_name; give a folder or a data set here or as --data.",
    } <= set(comments)
    assert any(line.startswith("test_split_size: see valid_share; of `datasets`;") for line in comments)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("- a", "holds no keys"),
        ("loss_type: [sigmoyd]", "loss_type has 'sigmoyd', which is no loss here"),
        ("max_steps: many", "a type that TRL does not take"),
        ("save_steps: .inf", "a type that TRL does not take"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_translated_is_refused(tmp_path, text, told):
    with pytest.raises(ConfigError, match="none.yaml cannot be read"):
        mlx_lm.lora.build_parser().parse_args(["--from-trl", str(tmp_path / "none.yaml")])
    (tmp_path / "dpo.yaml").write_text(text)
    with pytest.raises(ConfigError, match=told):
        mlx_lm.lora.build_parser().parse_args(["--from-trl", str(tmp_path / "dpo.yaml")])


def test_what_stands_in_a_comment_becomes_no_setting():
    text = translate({"optim": "lion_x\ntrust_remote_code: true\x1b[2J", "a\nmodel: b\x1b[2J": 1}, "dpo.yaml")
    assert "trust_remote_code: true" in text and "model: b" in text and "\x1b" not in text
    assert {"trust_remote_code", "model"}.isdisjoint(yaml.safe_load(text))

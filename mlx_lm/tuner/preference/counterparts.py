"""Keys of TRL's and of mlx-lm-lora's configurations, and what they are here.

Hints for unread keys, the comments of a translated file (`from_trl.py`) and LORA.md's tables come from here.
"""

from typing import NamedTuple


class Counterpart(NamedTuple):
    """What one or several keys of another program are here.

    Attributes:
        names: the keys there, with spaces between them.
        here: the key here; several with spaces: as many as `names`. Empty where there is none.
        differs: what to know; where there is no key here, what stands for it or why nothing does.
    """

    names: str
    here: str = ""
    differs: str = ""

    def pairs(self):
        """`(their key, ours)` of each name."""
        names, here = self.names.split(), self.here.split() or [""]
        return list(zip(names, here if len(here) == len(names) else here * len(names), strict=True))


_SAME = "beta loss_weights ld_alpha use_weighting f_divergence_type f_alpha_divergence_coef discopop_tau"

TRL = (
    Counterpart("loss_type", "loss_type", "`sigmoid` is `dpo`, and both names are read"),
    Counterpart(_SAME, _SAME, "what the loss does not read is refused here, ignored there"),
    Counterpart(
        "desirable_weight undesirable_weight", "desirable_weight undesirable_weight", "of a KTOConfig, with `kto`"
    ),
    Counterpart("label_smoothing", "label_smoothing", "smooths `dpo` too, which TRL 1.16 does not"),
    Counterpart("learning_rate", "learning_rate"),
    Counterpart("per_device_train_batch_size", "batch_size", "pairs over all workers; there those of one device"),
    Counterpart(
        "gradient_accumulation_steps",
        "grad_accumulation_steps",
        "an epoch's last batches wait for the next epoch's; there they make an update",
    ),
    Counterpart("num_train_epochs", "epochs", "in place of `iters`"),
    Counterpart("max_steps", "iters", "counts batches, there updates"),
    Counterpart("max_length", "max_seq_length", "the prompt loses its left; there the end goes, or the whole pair"),
    Counterpart("gradient_checkpointing activation_checkpointing", "grad_checkpoint"),
    Counterpart("max_grad_norm", "max_grad_norm", "not set, no clipping; there 0"),
    Counterpart("optim", "optimizer"),
    Counterpart(
        "weight_decay adam_beta1 adam_beta2 adam_epsilon",
        "optimizer_config",
        "torch's Adam is `bias_correction: true`; MLX's AdamW decays by 0.01 by default",
    ),
    Counterpart("lr_scheduler_type warmup_steps warmup_ratio", "lr_schedule", "needs the number of updates"),
    Counterpart("optim_args lr_scheduler_kwargs", "optimizer_config lr_schedule", "left out; write what they ask for"),
    Counterpart("logging_steps", "steps_per_report", "counts batches, there updates"),
    Counterpart("eval_strategy", "val_batches", "`no` is 0; here a run validates before its first step, too"),
    Counterpart("eval_steps", "steps_per_eval", "counts batches, there updates"),
    Counterpart("save_steps", "save_every", "counts batches, there updates"),
    Counterpart("save_total_limit", "keep_checkpoints", "counts states to resume from; numbered adapters stay"),
    Counterpart("metric_for_best_model", "save_best", "in `adapter_path/best`; `adapters.safetensors` are the last"),
    Counterpart("load_best_model_at_end", "save_best", "in `adapter_path/best`; `adapters.safetensors` are the last"),
    Counterpart("output_dir", "adapter_path"),
    Counterpart("resume_from_checkpoint", "resume", "the newest state in `adapter_path`"),
    Counterpart("report_to", "report_to", "`metrics.jsonl` is written besides"),
    Counterpart("project", "project_name"),
    Counterpart("seed data_seed", "seed", "of the adapters' initial values, the order and dropout"),
    Counterpart(
        "ref_model ref_model_name_or_path",
        "reference_model",
        "by default the model with the adapters that training starts from",
    ),
    Counterpart("router_aux_loss_coef", "router_aux_loss_coef", "off by default; there the model's own"),
    Counterpart("precompute_ref_batch_size", "reference_batch_size"),
    Counterpart("ref_model_sync_steps sync_ref_model", "reference_update_steps", "works with LoRA too"),
    Counterpart(
        "ref_model_mixup_alpha", "reference_mixup_alpha", "not set, the policy replaces the reference; there 0.6"
    ),
    Counterpart("trust_remote_code", "trust_remote_code"),
    Counterpart("torch_compile", "compile"),
    Counterpart("dataset_name", "data"),
    Counterpart("datasets dataset_config dataset_train_split dataset_test_split", "hf_dataset"),
    Counterpart("test_split_size", "valid_share", "of `datasets`; drawn at random there, the last rows here"),
    Counterpart("model_name_or_path", "model"),
    Counterpart("use_peft use_dora", "fine_tune_type", "`lora` by default; there all weights are trained"),
    Counterpart("lora_r lora_alpha lora_dropout r", "lora_parameters", "`scale` is `lora_alpha / r`"),
    Counterpart("use_rslora", "use_rslora"),
    Counterpart("loraplus_lr_ratio", "lora_plus_ratio", "an argument of PEFT's `create_loraplus_optimizer`"),
    Counterpart(
        "lora_target_modules target_modules", "lora_parameters", "`keys` are paths in a block: `self_attn.q_proj`"
    ),
    Counterpart("disable_dropout", "", "true there by default, for LoRA's dropout too: `dropout: 0.0`"),
    Counterpart("precompute_ref_log_probs", "", "always done, and kept for the next run"),
    Counterpart("truncation_mode max_prompt_length max_completion_length", "", "`max_seq_length` alone bounds a pair"),
    Counterpart("bf16 fp16 tf32 dtype torch_dtype", "", "the model runs in the dtype of its files"),
    Counterpart("load_in_4bit load_in_8bit", "", "name a quantized model; `mlx_lm convert -q` makes one"),
    Counterpart("use_liger_kernel padding_free", "", "a step does the like by itself"),
    Counterpart("eval_on_start", "", "always done where a run validates"),
    Counterpart("per_device_eval_batch_size", "", "validations take as many pairs as memory is ample for"),
    Counterpart("logging_strategy save_strategy", "", "reports and saves come by steps"),
    Counterpart("push_to_hub hub_model_id", "", "upload `adapter_path` with the hub's own command"),
    Counterpart("dataset_num_proc dataloader_num_workers remove_unused_columns", "", "pairs are tokenized once"),
    Counterpart("deepspeed fsdp", "", "each worker holds the model; `mlx.launch` starts them"),
)

MLX_LM_LORA = (
    Counterpart("train_mode", "loss_type", "`dpo`, `cpo`, `orpo`; modes that sample while training are not here"),
    Counterpart("dpo_cpo_loss_type", "loss_type", "`sigmoid`, `hinge`, `ipo` and `dpop` have these names here"),
    Counterpart("delta", "dpop_lambda", "multiplied by `beta`, as in the paper, but not there"),
    Counterpart("train_type", "fine_tune_type"),
    Counterpart("gradient_accumulation_steps", "grad_accumulation_steps"),
    Counterpart("epochs", "epochs"),
    Counterpart("batch_size", "batch_size"),
    Counterpart("num_layers", "num_layers"),
    Counterpart("lora_parameters", "lora_parameters", "`scale` is 20 by default, there 10"),
    Counterpart("reference_model_path", "reference_model", "read once, before the first step, and then freed"),
    Counterpart("wandb", "project_name", "with `report_to: wandb`"),
    Counterpart("load_in_4bits load_in_8bits", "", "name a quantized model; `mlx_lm convert -q` makes one"),
    Counterpart("fuse", "", "`mlx_lm fuse` afterwards; there it is done by default"),
    Counterpart("efficient_long_context recurrence_chunk_size", "", "a step does the like by itself"),
    Counterpart("micro_batch_size", "", "`batch_size`, with `grad_accumulation_steps`"),
    Counterpart("qat_enable", "", "there is no quantization-aware training"),
    Counterpart("reward_scaling", "", "not read there either"),
)

# Of mlx-lm's own older versions.
FORMER = (Counterpart("lora_layers", "num_layers"),)

BY_NAME = {name: (here, row.differs) for row in (*MLX_LM_LORA, *TRL, *FORMER) for name, here in row.pairs()}


def hint(name):
    """What another program's key is here, as the end of a sentence in parentheses; empty where it is no such key."""
    here, differs = BY_NAME.get(name, ("", ""))
    told = f"did you mean {here}?" if here else differs.replace("`", "")
    return f" ({told})" if told else ""

"""mlx_lm.tuner, with this folder laid over upstream's."""

from .._upstream import run_upstream

run_upstream(globals(), needs=("TrainingArgs", "evaluate", "train", "linear_to_lora_layers"))

"""mlx-lm with preference training: this folder laid over the installed mlx_lm package."""

from ._upstream import run_upstream

run_upstream(globals(), needs=("load", "generate"))

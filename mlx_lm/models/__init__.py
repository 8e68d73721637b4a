"""mlx_lm.models, with this folder laid over upstream's."""

from .._upstream import run_upstream

run_upstream(globals())

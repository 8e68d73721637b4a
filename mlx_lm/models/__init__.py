"""mlx_lm.models with an overlay: a module that does not stand here is upstream's."""

from .._upstream import run_upstream

run_upstream(globals())

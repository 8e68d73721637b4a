"""mlx-lm with preference training: this folder laid over the installed mlx_lm package, unless MLX_LM_DPO=0."""

import os

if os.environ.get("MLX_LM_DPO") == "0":
    from ._upstream import stand_aside

    stand_aside(globals())
else:
    from ._backend import load_fast_blas
    from ._interruption import end_quietly_while_importing
    from ._upstream import run_upstream

    end_quietly_while_importing()
    load_fast_blas()
    run_upstream(globals(), needs=("load", "generate"))

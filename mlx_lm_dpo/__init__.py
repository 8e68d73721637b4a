"""Put the folder that holds our `mlx_lm` before the installed one on the path, unless MLX_LM_DPO=0.

`mlx_lm_dpo.pth` imports this whenever Python starts in an environment that has it, so it costs next to
nothing. Where Python reads no path files (`pip install --target`), import it before `mlx_lm`.
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))


def precede():
    """Insert the overlay's folder before the first folder that installed packages come from.

    What stands further in front stays there: the working folder, a script's folder, and PYTHONPATH.
    """
    installed = os.path.isdir(os.path.join(HERE, "mlx_lm"))
    parent = os.path.dirname(HERE)
    position = len(sys.path)
    for index, entry in enumerate(sys.path):
        if entry == parent or os.path.basename(entry) in ("site-packages", "dist-packages"):
            position = index
            break
    sys.path.insert(position, HERE if installed else parent)


if os.environ.get("MLX_LM_DPO") != "0":
    precede()

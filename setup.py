"""Package the overlay so that it is found before mlx-lm's own package, without touching mlx-lm's files."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
PATH_FILE = "mlx_lm_dpo/mlx_lm_dpo.pth"


class BuildWithPathFile(build_py):
    """Put the path file beside the packages, where Python's site module reads it, and no module of an earlier build."""

    def run(self):
        if not self.editable_mode:
            # `pip install .` builds in the checkout: a module that is gone since the last time would overlay mlx-lm's.
            shutil.rmtree(Path(self.build_lib, "mlx_lm_dpo"), ignore_errors=True)
        super().run()
        # An editable installation takes nothing from the build folder: what it is to hold goes there directly.
        target = self.get_finalized_command("install").install_lib if self.editable_mode else self.build_lib
        self.mkpath(target)
        self.copy_file(str(ROOT / PATH_FILE), target)


def requirements():
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    return [line for line in lines if line]


# The installation leaves MLX's backend to the extras, because two of them in one environment overwrite each other.
mlx = next(line for line in requirements() if line.startswith("mlx[cpu]"))
backends = {backend: [mlx.replace("cpu", backend)] for backend in ("cpu", "cuda12", "cuda13")}
# MLX compiles kernels while it runs, with CUDA's headers. Its package for CUDA 13 brings them; that for 12 does not, so
# that it ends with "Can not find locations of CUDA headers" where no toolkit is installed.
backends["cuda12"].append("nvidia-cuda-runtime-cu12==12.9.*; platform_system == 'Linux'")

setup(
    name="mlx-lm-dpo",
    version=re.search('VERSION = "(.+)"', (ROOT / "mlx_lm/tuner/preference/__init__.py").read_text())[1],
    description="Direct preference optimization and its relatives in mlx-lm's LoRA tuner",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    author="the mlx-lm-dpo authors",
    license="MIT",
    python_requires=">=3.11",
    install_requires=[line.replace("[cpu]", "") if line == mlx else line for line in requirements()],
    extras_require={
        **backends,
        "train": ["datasets"],
        "test": ["hypothesis", "pytest", "pytest-xdist", "setuptools>=70.1"],
    },
    packages=[
        "mlx_lm_dpo",
        "mlx_lm_dpo.mlx_lm",
        *(f"mlx_lm_dpo.mlx_lm.{package}" for package in find_packages("mlx_lm")),
    ],
    package_dir={"mlx_lm_dpo.mlx_lm": "mlx_lm"},
    package_data={"mlx_lm_dpo.mlx_lm": ["examples/**/*"], "mlx_lm_dpo.mlx_lm.tuner.preference": ["*.html"]},
    exclude_package_data={"": ["**/__pycache__/*"]},
    # Under names of its own: a command of mlx-lm's name would be gone once this project is uninstalled. `uv tool` and
    # `pipx` show these alone.
    entry_points={
        "console_scripts": ["mlx_lm_dpo = mlx_lm.cli:main", "mlx_lm_dpo.lora = mlx_lm.lora:main"],
    },
    cmdclass={"build_py": BuildWithPathFile},
    # An editable installation puts this folder before site-packages: metadata lying here would pass for the
    # installed one, and pip would refuse to uninstall it.
    options={"egg_info": {"egg_base": "mlx_lm_dpo"}},
)

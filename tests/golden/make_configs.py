"""Write trl_config.json beside this file: keys and defaults of TRL's, PEFT's and mlx-lm-lora's configurations.

python tests/golden/make_configs.py      # with an interpreter that has TRL, then with one that has mlx-lm-lora
"""

import dataclasses
import json
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

FILE = Path(__file__).parent / "trl_config.json"


def fields(cls):
    """`{name: default}` of a dataclass, None for what is made anew each time unless it is a list or an object."""
    found = {}
    for field in dataclasses.fields(cls):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        plain = isinstance(default, (str, int, float, bool, list, dict))
        found[field.name] = str(getattr(default, "value", default)) if isinstance(default, str) else default
        if not plain:
            found[field.name] = None
    return found


def main():
    found = json.loads(FILE.read_text()) if FILE.exists() else {}
    if find_spec("trl"):
        from peft import LoraConfig
        from trl import DatasetMixtureConfig, DPOConfig, KTOConfig, ModelConfig, ScriptArguments

        found["versions"] = found.get("versions", {}) | {
            name: version(name) for name in ("trl", "peft", "transformers")
        }
        classes = (DPOConfig, KTOConfig, ModelConfig, ScriptArguments, DatasetMixtureConfig, LoraConfig)
        found |= {cls.__name__: fields(cls) for cls in classes}
    if find_spec("mlx_lm_lora"):
        from mlx_lm_lora.train import CONFIG_DEFAULTS, build_parser

        found["versions"] = found.get("versions", {}) | {"mlx-lm-lora": version("mlx-lm-lora")}
        found["mlx_lm_lora"] = dict.fromkeys(vars(build_parser().parse_args([]))) | CONFIG_DEFAULTS
    FILE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

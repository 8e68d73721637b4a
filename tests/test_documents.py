"""The documents: what they hold of code is the code's, and what they show runs."""

import ast
import importlib
import json
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import mlx.core as mx
import pytest
from make_tables import FROM_CODE, RECIPES, ROOT
from mlx_lm.tokenizer_utils import load as load_tokenizer
from tables import REGIONS, between, replaced

import mlx_lm.lora
from mlx_lm.tuner.datasets import load_dataset
from mlx_lm.tuner.losses import PairLogps, discopop
from mlx_lm.tuner.preference.check import FURTHER_KEYS, check_config, warn_of_unread_keys
from mlx_lm.tuner.preference.loss_table import LOSS_OPTIONS, TABLE
from mlx_lm.tuner.preference.options import RUN_OPTIONS

MODEL = "mlx_lm/examples/tiny_chat_model"
DOCUMENTS = {name: (ROOT / name).read_text() for name in ("README.md", "LORA.md", "BENCHMARKS.md", "CONTRIBUTING.md")}
README, MANUAL, MEASURED = (DOCUMENTS[name] for name in ("README.md", "LORA.md", "BENCHMARKS.md"))


def blocks(text, language):
    """The code blocks of a language, without their fences."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.S | re.M)


def shell_lines():
    return [line for text in DOCUMENTS.values() for block in blocks(text, "shell") for line in block.splitlines()]


def config_of(block):
    """The configuration that the command makes of a YAML file and its defaults."""
    with_defaults = {**mlx_lm.lora.CONFIG_DEFAULTS}
    with_defaults |= mlx_lm.lora.yaml.load(block, mlx_lm.lora.yaml_loader)
    return SimpleNamespace(**with_defaults)


def slug(heading):
    """The anchor that a heading gets where Markdown is shown."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("name", FROM_CODE | REGIONS)
def test_generated_text_is_what_code_and_results_say(name):
    document, make = (FROM_CODE | REGIONS)[name]
    if name == "architectures" and f"mlx-lm {mlx_lm.__version__}: " not in MEASURED:
        pytest.skip("the table is of another release of mlx-lm")
    made = make()
    assert len(made) > 100 and between(document.read_text(), name) == made, "run: python -m tests.make_tables"


def test_replacing_keeps_the_rest_and_refuses_a_document_without_the_place():
    text = "a\n<!-- one -->\nold\n<!-- /one -->\nb\n"
    assert replaced(text, "one", "new\n\nlines") == "a\n<!-- one -->\nnew\n\nlines\n<!-- /one -->\nb\n"
    assert between("<!-- one -->\n<!-- /one -->", "one") == ""
    with pytest.raises(ValueError, match="two"):
        between(text, "two")


def test_readme_is_short():
    assert README.count("\n") < 200


def test_every_key_is_documented_with_its_default():
    keys = {option.name for option in LOSS_OPTIONS + RUN_OPTIONS} | set(mlx_lm.lora.CONFIG_DEFAULTS) - {"config"}
    assert keys == set(re.findall(r"^\| `(\w+)` \|", between(MANUAL, "options"), re.M))
    assert not [key for key in ("hf_dataset", "chat_template_kwargs") if key not in FURTHER_KEYS or key not in MANUAL]


def test_every_loss_ends_its_short_run_with_a_better_accuracy():
    rows = re.findall(r"^\| `(.+?)` \|(.*)\|$", between(MEASURED, "results"), re.M)
    assert [name for name, _ in rows] == [loss.name for loss in TABLE]
    for name, figures in rows:
        before, after = (float(figure) for figure in figures.split("|")[-2:])
        assert after > before, name


def test_numbers_and_names_that_the_text_takes_from_elsewhere():
    cases = len(json.loads((ROOT / "tests" / "golden" / "losses.json").read_text())["cases"])
    assert f"{cases} cases" in README
    (told,) = re.findall(r"read a gap of logratios: (.*?) \(", " ".join(MANUAL.split()))
    assert told.split(", ") == [loss.name for loss in TABLE if loss.f_divergence]
    (told,) = re.findall(r"sort the batch \((.*?)\)", " ".join(MANUAL.split()))
    assert told.split(", ") == [loss.name for loss in TABLE if loss.sorts_batch]


def test_discopop_has_the_barrier_that_the_text_tells_of():
    def loss(h, tau):
        pairs = PairLogps(mx.array([h]), *(mx.zeros(1) for _ in range(3)), mx.ones(1), mx.ones(1), mx.zeros(1))
        return discopop(pairs, beta=1.0, discopop_tau=tau).item()

    assert "its least value near 0 at h = -0.119, its top at 0.072" in " ".join(MANUAL.split())
    assert loss(-0.119, 0.05) < loss(-0.119 - 0.01, 0.05) and loss(-0.119, 0.05) < loss(-0.119 + 0.01, 0.05)
    assert loss(0.072, 0.05) > loss(0.072 - 0.01, 0.05) and loss(0.072, 0.05) > loss(0.072 + 0.01, 0.05)
    assert loss(0.01, 0.2) < loss(0.0, 0.2) < loss(-0.01, 0.2)


def test_the_two_command_lines_set_themselves_up():
    lines = [line for line in shell_lines() if line.startswith("python3 -m venv .venv && ")]
    assert [line.rpartition(" -m ")[2].split()[0] for line in lines] == ["mlx_lm.lora", "pytest"] * 2
    asked = (ROOT / "setup.py").read_text()
    assert '"test": ["hypothesis", "pytest", "pytest-xdist", "setuptools>=70.1"]' in asked
    assert 'pytest pytest-xdist hypothesis "setuptools>=70.1"' in lines[1]
    extras = set(re.findall(r'"\.\[([\w,]+)\]"', README))
    assert {part for extra in extras for part in extra.split(",")} <= {"cpu", "cuda12", "cuda13", "test", "train"}


def test_files_and_flags_in_shell_lines_exist():
    flags = {flag for action in mlx_lm.lora.build_parser()._actions for flag in action.option_strings}
    checked = 0
    for line in shell_lines():
        for word in shlex.split(line):
            here = re.match(r"(mlx_lm|tests|benchmarks|mlx_lm_dpo)/|requirements\.txt$", word)
            if here:
                assert (ROOT / word).exists(), line
                checked += 1
        for command in line.split("&&"):
            if "mlx_lm.lora" in command:
                assert set(re.findall(r"(?<= )--[\w-]+", command)) <= flags, line
    assert checked > 5


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_and_named_files_lead_somewhere(name):
    anchors = {
        file: {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.M)} for file, text in DOCUMENTS.items()
    }
    for target in re.findall(r"\]\(([^)]+)\)", DOCUMENTS[name]):
        file, _, anchor = target.partition("#")
        if "://" in target:
            continue
        assert not file or (ROOT / file).exists(), target
        assert not anchor or anchor in anchors[file or name], target
    for path in re.findall(r"`((?:mlx_lm|tests|benchmarks|mlx_lm_dpo)/[\w./]*|\.ci/run)`", DOCUMENTS[name]):
        assert (ROOT / path).exists(), path


def test_the_examples_file_names_every_key_and_what_it_suggests_passes_the_check():
    text = (ROOT / "mlx_lm" / "examples" / "lora_config.yaml").read_text()
    flags = {
        "check",
        "steps",
        "predictions",
        "compare",
        "mask_prompt",
    }  # of single commands, and one that nothing reads
    keys = {option.name for option in LOSS_OPTIONS + RUN_OPTIONS} | set(mlx_lm.lora.CONFIG_DEFAULTS) - {"config"}
    assert not [key for key in keys - flags if not re.search(rf"\b{key}\b", text)]
    for line in re.findall(r"^# (\w+: .*)$", text, re.M):
        key = line.partition(":")[0]
        assert key in keys, key
        if key not in ("lr_schedule", "resume", "resume_adapter_file"):
            needed = {"score_scale": "score_difference: margin", "reference_mixup_alpha": "reference_update_steps: 9"}
            kept = text.replace("\niters: 100\n", "\n") if key == "epochs" else text
            check_config(config_of(f"{kept}\n{needed.get(key, '')}\n{line}"))


def test_yaml_examples_pass_the_check_and_hold_no_unread_key(capsys):
    examples = blocks(MANUAL, "yaml")
    assert len(examples) >= 4
    for block in examples:
        config = config_of(block)
        warn_of_unread_keys(config, mlx_lm.lora.CONFIG_DEFAULTS)
        check_config(config)
    assert capsys.readouterr().err == ""


def short_run(path, folder, **changes):
    """Run a recipe on a few rows with the tiny model in its model's place; the folder of its adapters."""
    pairs = (ROOT / "mlx_lm" / "examples" / "preferences" / "train.jsonl").read_text().splitlines()[:4]
    chat = json.dumps({"messages": [{"role": role, "content": "Hello."} for role in ("user", "assistant")]})
    config = config_of(path.read_text())
    data = folder / "data"
    data.mkdir()
    for split in ("train", "valid"):
        (data / f"{split}.jsonl").write_text("\n".join([chat] * 4 if config.loss_type == "sft" else pairs))
    fixed = {
        "model": str(ROOT / MODEL),
        "data": str(data),
        "hf_dataset": None,
        "adapter_path": str(folder / "adapters"),
    }
    # No more layers and rows than there are; these rows have no scores.
    fixed |= {"num_layers": min(config.num_layers, 2), "batch_size": min(config.batch_size, 4), "iters": 1}
    fixed |= {"min_score_difference": None, "val_batches": 0, "save_best": None, "early_stop": None}
    fixed |= {} if config.loss_type == "sft" else {"reference_cache": "none"}
    mlx_lm.lora.run(SimpleNamespace(**vars(config) | fixed | changes))
    return folder / "adapters"


def test_settings_that_the_text_names_pass_the_check():
    keys = {option.name for option in LOSS_OPTIONS + RUN_OPTIONS} | set(mlx_lm.lora.CONFIG_DEFAULTS)
    needed = {"reference_mixup_alpha": "reference_update_steps: 9", "beta": "loss_type: [dpo, sft]"}
    named = {line for line in re.findall(r"`(\w+: [^`]+)`", README + MANUAL) if line.partition(":")[0] in keys}
    named = {line for line in named if not re.search(r" N$|FOLDER|owner/", line)}
    assert len(named) > 25
    for line in named - {"resume: true"}:
        check_config(config_of(f"train: true\nloss_type: dpo\n{needed.get(line.partition(':')[0], '')}\n{line}"))


@pytest.mark.parametrize(
    "settings",
    [
        "loss_type: kto\nlora_plus_ratio: 16\nuse_rslora: true",
        "loss_type: [dpo, sft]\nreference_update_steps: 1\nreference_mixup_alpha: 0.6",
    ],
)
def test_settings_that_the_text_names_train(settings, tmp_path):
    assert all(f"`{line}`" in MANUAL for line in settings.splitlines() if "update" not in line)
    path = tmp_path / "config.yaml"
    path.write_text(f"train: true\n{settings}")
    saved = json.loads((short_run(path, tmp_path, iters=3) / "adapter_config.json").read_text())
    kto = "kto" in settings
    assert saved["lora_parameters"]["scale"] == pytest.approx(20 * 8**0.5 if kto else 20)


@pytest.fixture(scope="module")
def sft_adapters(tmp_path_factory):
    first = next(path for path in RECIPES if path.name == "sft_then_dpo_1.yaml")
    return short_run(first, tmp_path_factory.mktemp("sft")) / "adapters.safetensors"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes_pass_the_dry_run_with_the_tiny_model_in_their_models_place(path, tmp_path, sft_adapters, capsys):
    config = config_of(path.read_text())
    if config.loss_type == "sft":
        assert sft_adapters.exists()
        return
    changes = {} if config.resume_adapter_file is None else {"resume_adapter_file": str(sft_adapters)}
    assert not short_run(path, tmp_path, check=True, **changes).exists()
    told = capsys.readouterr()
    assert "Nothing that can be told beforehand stops this run." in told.out and "WARNING" not in told.err


def test_every_figure_of_a_run_is_explained(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("loss_type: dpo\ntrain: true\nsteps_per_report: 1")
    lines = (short_run(path, tmp_path, val_batches=1) / "metrics.jsonl").read_text().splitlines()
    found = {key for line in lines for key in json.loads(line)}
    table = MANUAL[MANUAL.index("| printed | in metrics.jsonl |") :].split("\n\n")[0]
    told = {name for row in table.splitlines() for name in re.findall(r"`([^`]+)`", row.split("|")[2])}
    assert told <= found | {"skipped_updates", "rewards/length_correlation", "eval_kl"}
    plain = {key.removeprefix("eval_") for key in found}
    assert plain - {name.removeprefix("eval_") for name in told} <= {
        "iteration",
        "val_time",
        "pairs",
        "iterations_per_second",
    }


def test_the_second_of_two_recipes_goes_on_with_what_the_first_saves():
    one, two = (
        config_of(next(path for path in RECIPES if path.name == f"sft_then_dpo_{i}.yaml").read_text()) for i in (1, 2)
    )
    same = ("model", "num_layers", "lora_parameters", "fine_tune_type")
    assert [getattr(one, key) for key in same] == [getattr(two, key) for key in same]
    assert two.resume_adapter_file == f"{one.adapter_path}/adapters.safetensors"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes_say_how_to_run_them_and_count_what_they_say(path):
    text = path.read_text()
    head = [line for line in text.splitlines() if line.startswith("#   ")]
    assert any(f"mlx_lm/examples/{path.name}" in line for line in head)
    config = config_of(text)
    if config.loss_type != "sft":
        check_config(SimpleNamespace(**vars(config) | {"resume_adapter_file": None}))
    if config.lr_schedule is not None:
        # Warmup and decay together are the run, and start from the rate that the file names.
        _, updates, _ = config.lr_schedule["arguments"]
        assert updates + config.lr_schedule["warmup"] == config.iters / config.grad_accumulation_steps
        assert config.lr_schedule["arguments"][0] == config.learning_rate


def pairs_of(rows, folder):
    """The pairs that the command makes of rows, with the example's tokenizer."""
    folder.mkdir()
    (folder / "train.jsonl").write_text(rows)
    config = config_of(f"data: {folder}\ntrain: true\nloss_type: dpo")
    check_config(config)
    train, _, _ = load_dataset(config, load_tokenizer(ROOT / MODEL))
    return [train[i] for i in range(len(train))]


def test_rows_of_every_form_are_read_and_mean_the_same(tmp_path, capsys):
    same, further = blocks(MANUAL, "jsonl")
    pairs = pairs_of(same, tmp_path / "same")
    assert len(pairs) == len(same.splitlines()) == 6
    assert all(pair == pairs[0] for pair in pairs)
    assert len(pairs_of(further, tmp_path / "further")) == len(further.splitlines()) == 3
    (row,) = blocks(README, "json")
    assert len(pairs_of(row, tmp_path / "readme")) == 1
    assert "WARNING" not in capsys.readouterr().out


def test_python_blocks_run(tmp_path):
    code = blocks(MANUAL, "python")[:1] + blocks(README, "python")
    assert len(code) == 2
    # They write adapters into the working folder, which therefore is another one that has the example too.
    (tmp_path / "mlx_lm").mkdir()
    (tmp_path / "mlx_lm" / "examples").symlink_to(ROOT / "mlx_lm" / "examples")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", "\n".join(code)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    *_, figures, loss = done.stdout.strip().splitlines()
    assert float(re.search(r"reward accuracy (\S+)", figures)[1]) > 0.6
    assert loss == "0.6931" and f'print(f"{{loss.item():.4f}}")  # {loss}' in README
    saved = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert saved["fine_tune_type"] == "lora" and (tmp_path / "adapters" / "adapters.safetensors").exists()


def test_documents_name_no_place_of_their_making():
    for name, text in DOCUMENTS.items():
        assert not re.search(r"/work/|/tmp/|/root/|TODO|@@", text), name


def test_scripts_import_what_the_package_has():
    """Names that a script imports within a function are missed by no other test."""
    missing = []
    for path in sorted(ROOT.glob("benchmarks/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mlx_lm."):
                module = importlib.import_module(node.module)
                modules = {found.name for found in pkgutil.iter_modules(getattr(module, "__path__", []))}
                names = {each.name for each in node.names} - modules - set(vars(module))
                missing += [f"{path.name}: {node.module}.{name}" for name in names]
    assert not missing

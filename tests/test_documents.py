"""The documents: what they hold of code is the code's, and what they show runs."""

import json
import os
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import make_tables
import mlx.core as mx
import pytest
from make_tables import FROM_CODE, FROM_RUNS, MODEL, ROOT
from mlx_lm.tokenizer_utils import load as load_tokenizer

import mlx_lm.lora
from mlx_lm.tuner.datasets import load_dataset
from mlx_lm.tuner.losses import PairLogps, discopop
from mlx_lm.tuner.preference.check import FURTHER_KEYS, check_config, known_keys, warn_of_unread_keys
from mlx_lm.tuner.preference.objective import OPTIONS as LOSS_OPTIONS
from mlx_lm.tuner.preference.objective import TABLE
from mlx_lm.tuner.preference.options import RUN_OPTIONS

DOCUMENTS = {path.name: path.read_text() for path in make_tables.DOCUMENTS}
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


@pytest.mark.parametrize("name", FROM_CODE)
def test_generated_text_is_what_the_code_says(name):
    document, make = FROM_CODE[name]
    assert make_tables.between(document.read_text(), name) == make(), "run: python -m tests.make_tables"


@pytest.mark.parametrize("name", FROM_RUNS)
def test_measured_text_is_there(name):
    assert len(make_tables.between(FROM_RUNS[name][0].read_text(), name)) > 100


def test_replacing_keeps_the_rest_and_refuses_a_document_without_the_place():
    text = "a\n<!-- one -->\nold\n<!-- /one -->\nb\n"
    assert make_tables.replaced(text, "one", "new\n\nlines") == "a\n<!-- one -->\nnew\n\nlines\n<!-- /one -->\nb\n"
    assert make_tables.between("<!-- one -->\n<!-- /one -->", "one") == ""
    with pytest.raises(ValueError, match="two"):
        make_tables.between(text, "two")


def test_every_key_is_documented_with_its_default():
    keys = {option.name for option in LOSS_OPTIONS + RUN_OPTIONS} | set(mlx_lm.lora.CONFIG_DEFAULTS) - {"config"}
    assert keys == set(re.findall(r"^\| `(\w+)` \|", make_tables.between(MANUAL, "options"), re.M))
    assert not [key for key in ("hf_dataset", "chat_template_kwargs") if key not in FURTHER_KEYS or key not in MANUAL]


def test_every_loss_ends_its_short_run_with_a_better_accuracy():
    rows = re.findall(r"^\| `(.+?)` \|(.*)\|$", make_tables.between(MEASURED, "results"), re.M)
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


def test_yaml_examples_pass_the_check_and_hold_no_unread_key(capsys):
    examples = blocks(MANUAL, "yaml")
    assert len(examples) >= 4
    for block in examples:
        config = config_of(block)
        warn_of_unread_keys(
            config, known_keys(mlx_lm.lora.build_parser(), mlx_lm.lora.CONFIG_DEFAULTS, supervised=False)
        )
        check_config(config)
    assert capsys.readouterr().err == ""


def pairs_of(rows, folder):
    """The pairs that the command makes of rows, with the example's tokenizer."""
    folder.mkdir()
    for split in ("train", "valid"):
        (folder / f"{split}.jsonl").write_text(rows)
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
    code = blocks(README, "python")
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

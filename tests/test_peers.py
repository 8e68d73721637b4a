"""The comparisons with other programs that train on MLX, as far as they need none of these."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import check_peers
import mlx_lm.tokenizer_utils
import pytest
from common import own_environment
from compare_peers import options_of

from mlx_lm.tuner.datasets import load_dataset

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "mlx_lm" / "examples"


@pytest.fixture
def tokenizer():
    return mlx_lm.tokenizer_utils.load(EXAMPLES / "tiny_chat_model")


def test_our_steps_are_measured(tmp_path):
    path = tmp_path / "found.json"
    words = "--shape tiny --layers 1 --lengths 8/8 --steps 2 --warmup 1 --rounds 2 --runs here --out".split()
    command = [sys.executable, ROOT / "benchmarks" / "compare_peers.py", *words, path]
    done = subprocess.run(command, env=own_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(path.read_text())["rows"]
    run = row["runs"]["here"]
    # Two rounds of two steps; policy and reference are identical at the first one.
    assert len(run["seconds"]) == len(run["cpu_seconds"]) == 4 and len(run["losses"]) == 3
    assert run["losses"][0] == pytest.approx(math.log(2), abs=1e-5) and run["losses"][2] < run["losses"][0]
    assert "| 8 / 8 | here |" in done.stdout and run["reference_seconds"] > 0


def test_a_program_without_its_interpreter_is_refused(capsys):
    assert "unsloth" not in options_of(["--mlx-tune", "python"]).runs
    with pytest.raises(SystemExit):
        options_of(["--runs", "here,unsloth"])
    assert "needs its interpreter" in capsys.readouterr().err


def test_our_tokens_are_those_of_the_definition(tmp_path, tokenizer):
    rows = [check_peers.ONE, check_peers.ONE | {"system": "Be brief.", "prompt": "Say it again. " * 30}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"data": str(tmp_path), "train": True, "test": False, "loss_type": "dpo", "max_seq_length": 64}
    pairs, *_ = load_dataset(SimpleNamespace(**config), tokenizer)
    found = check_peers.defined(rows, {"kind": "template", "most": 64}, tokenizer)
    assert [[*pair.prompt, *pair.chosen] for pair in (pairs[0], pairs[1])] == [list(tokens) for tokens, _ in found[:2]]
    assert [len(pair.rejected) for pair in (pairs[0], pairs[1])] == [sum(scored) for _, scored in found[2:]]


def test_what_is_scored_too_much_and_too_little_is_told(tokenizer):
    right = [((1, 2, 10, 11, 12), [0, 0, 1, 1, 1]), ((1, 2, 20, 21), [0, 0, 1, 1])]

    def told(*rows):
        decoded = SimpleNamespace(decode=lambda tokens: "".join(f"<{token}>" for token in tokens))
        return tuple(check_peers.difference(rows, right, decoded).values())

    assert told(*right) == (0, "", 0)
    whole = [(tokens, [0] + [1] * (len(tokens) - 1)) for tokens, _ in right]
    assert told(*whole) == (1, "", 0)
    assert told(((1, 2, 10, 11, 12, 3), [0, 0, 1, 1, 1, 1]), right[1]) == (0, "<3>", 0)
    assert told(((1, 2, 10), [0, 0, 1]), right[1]) == (0, "", 2)
    assert told(((1, 2, 10), [0, 0, 0]), right[1]) == (0, "", 3)


def test_cosines_of_files(tmp_path):
    import numpy as np
    from safetensors.numpy import save_file

    for name, values in {"one": [3.0, 4.0], "other": [4.0, 3.0], "none": [0.0, 0.0]}.items():
        save_file({"a": np.array(values[:1]), "b": np.array(values[1:])}, tmp_path / name)
    assert check_peers.compare(tmp_path / "one", tmp_path / "other") == pytest.approx(0.96)
    assert check_peers.compare(tmp_path / "none", tmp_path / "one") is None

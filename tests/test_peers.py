"""The comparisons with other programs that train on MLX, as far as they need none of these."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from common import own_environment
from compare_peers import options_of

ROOT = Path(__file__).resolve().parent.parent


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

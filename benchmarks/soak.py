"""Kill, interrupt and starve a run at random until it is done, again and again; each must end with the same weights.

PYTHONPATH=. python benchmarks/soak.py [--minutes 60] [--seed 0] [--output benchmarks/results/soak.json]

Each round is one run of the embedded example in a restart loop with `resume: auto`: SIGKILL, SIGTERM, SIGINT and
SIGHUP after a random time, a limit on the size of files that stands for a full disk, and a bit flipped in the newest
checkpoint, where there is one before it. After each end the folder is checked: no temporary file once a run has started
again, every numbered save readable and finite, the metrics a line a report. Exit status 1 where a round ends otherwise
than the run that nothing disturbed; the others go on all the same.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import mlx.core as mx
import yaml
from common import own_environment

ROOT = Path(__file__).resolve().parent.parent
VALUES = {"model": str(ROOT / "mlx_lm/examples/tiny_chat_model"), "data": str(ROOT / "mlx_lm/examples/preferences")}
VALUES |= {"train": True, "loss_type": "dpo", "iters": 40, "batch_size": 4, "val_batches": 2, "steps_per_report": 2}
VALUES |= {"steps_per_eval": 10, "save_every": 3, "num_layers": 1, "learning_rate": 1e-3, "max_seq_length": 128}
VALUES |= {"save_best": "eval_loss", "grad_accumulation_steps": 2, "keep_checkpoints": 3, "resume": "auto"}
SIGNALS = {"SIGKILL": -9, "SIGTERM": 143, "SIGINT": 130, "SIGHUP": 129}
STATE = "checkpoint.safetensors"
FULL = 60_000  # bytes of the largest file where the disk is full


def start(folder, file_size=None):
    """The command on the example, as a process."""

    def prepare():
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        if file_size is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))

    config = folder / "config.yaml"
    config.write_text(
        yaml.safe_dump(VALUES | {"adapter_path": str(folder / "adapters"), "reference_cache": str(folder / "cache")})
    )
    environment = {name: value for name, value in (os.environ | own_environment()).items() if value is not None}
    return subprocess.Popen(
        [sys.executable, "-m", "mlx_lm.lora", "--config", config],
        cwd=folder,
        env=environment | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=prepare,
    )


def disturb(folder, pace, draw, counts):
    """Start the run and disturb it once within the seconds that the last whole one took; whether it came to its end.

    Raises:
        AssertionError: the process ended otherwise than it should.
    """
    kind = draw.choice([*SIGNALS, "full disk", "flipped bit"])
    state = folder / "adapters" / STATE
    # With no state before it, a run rightly refuses to go on.
    if kind == "flipped bit" and state.is_file() and any(state.parent.glob(f"[0-9]*_{STATE}")):
        content = bytearray(state.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        state.unlink()  # the one before it may be the same file by another name
        state.write_bytes(bytes(content))
        counts[kind] += 1
    begun, anew = time.monotonic(), not state.is_file()
    process = start(folder, FULL if kind == "full disk" else None)
    try:
        out, _ = process.communicate(timeout=draw.uniform(0.1, pace[-1]) if kind in SIGNALS else None)
    except subprocess.TimeoutExpired:
        process.send_signal(getattr(signal, kind))
        out, _ = process.communicate(timeout=120)
        counts[kind] += process.returncode != 0
        # A signal before Python has begun is the system's own end.
        allowed = {0, SIGNALS[kind], SIGNALS[kind] - 128 if kind == "SIGKILL" else 128 - SIGNALS[kind]}
        assert process.returncode in allowed, (kind, process.returncode, out)
        assert "Traceback" not in out or process.returncode < 0 or "site" in out, out
        return process.returncode == 0
    if kind == "full disk" and process.returncode != 0:
        counts[kind] += 1
        assert process.returncode == 2 and "cannot be written" in out and "Traceback" not in out, out
        return False
    assert process.returncode == 0, (kind, out)
    if anew:
        pace.append(time.monotonic() - begun)
    return True


def check(folder):
    """Check what a run has left in its folder."""
    adapters = folder / "adapters"
    for path in adapters.glob("*adapters.safetensors"):
        assert all(mx.isfinite(value).all().item() for value in mx.load(str(path)).values()), path
    metrics = adapters / "metrics.jsonl"
    if metrics.is_file():
        lines = metrics.read_text().splitlines()
        for line in lines[:-1]:  # a kill may cut the last one
            json.loads(line)


def survive(folder, expected, pace, draw, counts):
    """Disturb a run until it is done, and compare what it leaves.

    Raises:
        AssertionError: something is not as it should be.
    """
    while not disturb(folder, pace, draw, counts):
        check(folder)
    check(folder)
    assert not list((folder / "adapters").glob(".*")), "a temporary file is left"
    for name, arrays in expected.items():
        found = mx.load(str(folder / "adapters" / name))
        different = [key for key in arrays if not mx.array_equal(found[key], arrays[key]).item()]
        assert not different and found.keys() == arrays.keys(), (name, different)


def main():
    """Run rounds until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file that is written after each round")
    args = parser.parse_args()
    draw, counts, begun, failures = random.Random(args.seed), Counter(), time.monotonic(), []
    with tempfile.TemporaryDirectory() as place:
        undisturbed = Path(place, "undisturbed")
        undisturbed.mkdir()
        process = start(undisturbed)
        out, _ = process.communicate()
        assert process.returncode == 0, out
        pace, adapters = [time.monotonic() - begun], undisturbed / "adapters"
        expected = {name: mx.load(str(adapters / name)) for name in (STATE, "best/adapters.safetensors")}
        rounds = 0
        while time.monotonic() < begun + 60 * args.minutes:
            folder = Path(place, str(rounds))
            folder.mkdir()
            try:
                survive(folder, expected, pace, draw, counts)
            except AssertionError as error:
                failures.append(f"round {rounds}: {error}")
                print(failures[-1], flush=True)
            rounds += 1
            found = {"seed": args.seed, "minutes": round((time.monotonic() - begun) / 60, 1)}
            found |= {"runs compared": rounds, "disturbed": sum(counts.values()), **counts, "failures": failures}
            print(json.dumps(found), flush=True)
            if args.output is not None:
                args.output.write_text(json.dumps(found, indent=1) + "\n")
            shutil.rmtree(folder)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()

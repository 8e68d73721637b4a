"""Two workers on one machine's loopback: the same losses and weights as one worker with the whole batch."""

import json
import os
import re
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from architectures import make_model
from plain_pass import add_lora
from tiny import largest_difference, short_run, some_pairs, tiny_llama, trained

from mlx_lm.tuner.preference.batches import PACKED, Schedule
from mlx_lm.tuner.preference.options import ConfigError
from mlx_lm.tuner.preference.workers import means_over_workers

ROOT = Path(__file__).parents[1]
# Nine pairs in batches of four: of the last batch's one pair, the second worker has none.
PAIRS = some_pairs(9, response=(1, 25))
VALID = some_pairs(7, seed=1)
# Every third response is not desirable: of the last batches, too, the second worker has none.
SINGLE, SINGLE_VALID = ([pair._replace(label=i % 3 > 0) for i, pair in enumerate(pairs)] for pairs in (PAIRS, VALID))
RUNS = {
    "plain": {"batch_size": 4, "iters": 4, "max_grad_norm": 0.05},
    "accumulated": {"batch_size": 4, "iters": 5, "grad_accumulation_steps": 3, "steps_per_report": 5}
    | {"keep_checkpoints": 3},
    "tr-dpo": {"batch_size": 2, "iters": 6, "reference_update_steps": 2},
    "kto": {"loss_type": "kto", "batch_size": 4, "iters": 5},
    "sft": {"loss_type": ["dpo", "sft"], "batch_size": 4, "iters": 5},
    "experts": {
        "router_aux_loss_coef": 1.0,
        "batch_size": 4,
        "iters": 4,
        "grad_accumulation_steps": 2,
        "steps_per_report": 4,
    },
}
OPTIONS = {"val_batches": -1, "beta": 0.5, "steps_per_save": 2}

WORKER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import conftest
import mlx.core as mx
import numpy as np
from test_distributed import OPTIONS, RUNS, model_of, rows_of
from tiny import short_run, tiny_llama, trained
from mlx_lm.tuner.preference import reference

folder, world = Path(sys.argv[2]), mx.distributed.init(strict=True)
assert world.size() == 2
if world.rank() == 1:
    # Its device has less memory.
    reference.ample_tokens = lambda *_: 20
    # Only the first worker writes; the second has a folder of its own to show it.
    folder = folder / "second"
    folder.mkdir()
    (folder / "metrics.jsonl").touch()
# One run takes means over workers as on Metal.
on_metal = mx.metal.is_available()
mx.metal.is_available = lambda: on_metal or name == "accumulated"
for name, options in RUNS.items():
    (folder / name).mkdir()
    (folder / name / "metrics.jsonl").touch()
    model = model_of(name)
    cache = str(folder / "cache")
    pairs, valid = rows_of(name)
    short_run(model, pairs, folder / name, valid=valid, reference_cache=cache, **OPTIONS, **options)
    np.savez(folder / f"{name}.{world.rank()}.npz", **trained(model))
    if name == "plain" and world.rank() == 1:
        # Workers of several machines keep caches of their own, and one may be gone.
        assert not Path(cache).exists()
try:
    short_run(tiny_llama(), rows_of("plain")[0], folder / "plain", batch_size=4, iters=3 + world.rank())
except ValueError as error:
    assert "workers 0 and 1 were given different iters (3 and 4); start all of them" in str(error), error
else:
    raise AssertionError("different workers trained")
print("done")
"""


def rows_of(name):
    """What a run of RUNS trains and validates on."""
    return (SINGLE, SINGLE_VALID) if name == "kto" else (PAIRS, VALID)


def model_of(name):
    """What a run of RUNS trains."""
    if name == "experts":
        return add_lora(make_model("mixtral"))
    return tiny_llama(moved=name == "tr-dpo")


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """The folder in which two workers trained each of RUNS."""
    if not mx.distributed.is_available("ring"):
        pytest.skip("this build of MLX has no ring backend")
    folder = tmp_path_factory.mktemp("workers")
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)]))
    command = [sys.executable, "-c", WORKER, str(Path(__file__).parent), str(folder)]
    environment = {**os.environ, "MLX_HOSTFILE": str(hosts), "HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    running = [subprocess.Popen(command, env={**environment, "MLX_RANK": rank}, **pipes) for rank in "01"]
    try:
        outputs = [worker.communicate(timeout=300)[0] for worker in running]
    finally:
        for worker in running:
            worker.kill()
    assert [worker.returncode for worker in running] == [0, 0], "\n".join(outputs)
    return folder, outputs


@pytest.mark.parametrize("name", list(RUNS))
def test_two_workers_do_what_one_does(workers, tmp_path, name):
    folder, _ = workers
    model = model_of(name)
    start = trained(model)
    pairs, valid = rows_of(name)
    expected, validation = short_run(model, pairs, tmp_path, valid=valid, **OPTIONS, **RUNS[name])
    weights = [dict(np.load(folder / place)) for place in (f"{name}.0.npz", f"second/{name}.1.npz")]
    assert largest_difference(weights[0], weights[1]) == 0
    # Adam makes a step of its rate, 1e-3, of a gradient however small, and the two round it otherwise; experts most.
    assert largest_difference(weights[0], trained(model)) < (5e-5 if name == "experts" else 2e-5)
    assert largest_difference(trained(model), start) > 1e-3
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    assert_like([line for line in lines if "loss" in line], expected, 9)
    assert_like([line for line in lines if "eval_loss" in line], validation, 7)


def assert_like(found, expected, figures):
    names = [
        key
        for key in expected[0]
        if key.startswith(("loss", "kl", "aux", "rewards", "logps", "grad_norm", "trained", "eval_"))
    ]
    assert len(names) >= figures
    for line, alone in zip(found, expected, strict=True):
        found_here, alone_here = (np.array([row[key] for key in names], float) for row in (line, alone))
        np.testing.assert_allclose(found_here, alone_here, atol=1e-4, rtol=1e-4)


def test_only_the_first_worker_writes_and_speaks(workers):
    folder, outputs = workers
    second = folder / "second"
    files = {path.relative_to(second).as_posix() for path in second.rglob("*") if path.is_file()}
    assert files == {"metrics.jsonl", *(f"{name}/metrics.jsonl" for name in RUNS), *(f"{name}.1.npz" for name in RUNS)}
    saved = {path.name for path in (folder / "plain").iterdir()}
    assert saved >= {"adapters.safetensors", "0000002_adapters.safetensors"}
    assert len(list((folder / "cache").iterdir())) == 3  # the base model, tr-dpo's adapter, and the mixture
    assert "loss" in outputs[0] and outputs[1] == "done\n"
    # The reference pass is shared out: of nine pairs and of seven the first worker takes one more.
    told = re.sub(r"\x1b\[[0-9;]*m", "", outputs[0])
    assert re.findall(r"ref.*?(\d+)/(\d+)", told)[:2] == [("5", "5"), ("4", "4")]


@pytest.mark.parametrize("iteration", [2, 4])
def test_one_worker_goes_on_where_two_were_with_gradients_of_both_to_be_summed(workers, tmp_path, iteration):
    folder, _ = workers
    name = f"{iteration:07d}_checkpoint.safetensors"
    (tmp_path / name).write_bytes((folder / "accumulated" / name).read_bytes())
    whole = dict(np.load(folder / "accumulated.0.npz"))
    model = tiny_llama()
    short_run(model, PAIRS, tmp_path, valid=VALID, resume=True, **OPTIONS, **RUNS["accumulated"])
    assert largest_difference(trained(model), whole) < 2e-5


def test_a_batch_that_cannot_be_shared_out_is_refused(monkeypatch):
    class Three:
        rank, size = (lambda self: 0), (lambda self: 3)

    monkeypatch.setattr(mx.distributed, "init", lambda *_: Three())
    with pytest.raises(ConfigError, match="batch_size is 4; it must be a multiple of the number of workers, 3"):
        Schedule(PAIRS, batch_size=4, seed=0, arrangement=PACKED)


def test_on_metal_the_cpu_takes_means_over_workers_and_they_are_waited_for(monkeypatch):
    """A GPU that waited for a slower worker would be taken to hang."""

    class Two:
        size = staticmethod(lambda: 2)

    told = []
    monkeypatch.setattr(mx.distributed, "init", Two)
    monkeypatch.setattr(mx.distributed, "all_sum", lambda x, **_: told.append("sum") or 3 * x)
    monkeypatch.setattr(mx, "stream", lambda device: told.append(device) or nullcontext())
    monkeypatch.setattr(mx, "eval", lambda means: told.append("waited"))
    for metal in (False, True):
        monkeypatch.setattr(mx.metal, "is_available", lambda metal=metal: metal)
        gradient, pairs = means_over_workers({"a": mx.array([2.0, 4.0])}, mx.array(2.0))
        assert gradient["a"].tolist() == [3.0, 6.0] and pairs.item() == 3.0
    assert told == ["sum", "sum", mx.cpu, "sum", "sum", "waited"]

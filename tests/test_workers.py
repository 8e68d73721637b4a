"""Workers started by hand, each as a command of its own: what ends one ends the others, and is told once."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import mlx.core as mx
import pytest
import yaml
from test_distributed import free_ports
from test_interruption import ROOT, VALUES, wait_for

SHORT = {"iters": 2, "val_batches": 0, "steps_per_report": 1, "steps_per_eval": 100}
pytestmark = pytest.mark.skipif(not mx.distributed.is_available("ring"), reason="MLX was built without its ring")


def started(folder, *changes):
    """A worker for each of `changes` of the configuration, all of one ring."""
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(len(changes))]))
    workers = []
    for rank, change in enumerate(changes):
        config = folder / f"{rank}.yaml"
        config.write_text(yaml.safe_dump(VALUES | {"adapter_path": str(folder / "adapters")} | change))
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        environment |= {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": folder}
        command = [sys.executable, "-m", "mlx_lm", "lora", "--config", str(config)]
        workers.append(subprocess.Popen(command, env=environment, **pipes))
    return workers


def ended(workers):
    """The exit statuses of workers and, in one list, the lines of each that tell of an error."""
    try:
        errors = [worker.communicate(timeout=100)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert all("Traceback" not in text for text in errors), "\n".join(errors)
    told = [[line for line in text.splitlines() if line.startswith("error: ")] for text in errors]
    return [worker.returncode for worker in workers], told


def test_a_worker_that_is_killed_ends_the_other(tmp_path):
    workers = started(tmp_path, *[{"iters": 10_000, "val_batches": 0}] * 2)
    metrics = tmp_path / "adapters" / "metrics.jsonl"
    wait_for(workers[0], lambda: metrics.is_file() and '"loss"' in metrics.read_text())
    workers[1].kill()
    killed = time.monotonic()
    statuses, (told, _) = ended(workers)
    assert statuses == [1, -signal.SIGKILL] and time.monotonic() - killed < 20
    assert len(told) == 1 and told[0].startswith("error: worker 1 is gone (killed or crashed")


def test_a_worker_that_is_interrupted_ends_after_the_first_one_has_written(tmp_path):
    workers = started(tmp_path, *[{"iters": 10_000, "save_every": 10_000, "val_batches": 0}] * 2)
    adapters = tmp_path / "adapters"
    wait_for(
        workers[0],
        lambda: (adapters / "metrics.jsonl").is_file() and "loss" in (adapters / "metrics.jsonl").read_text(),
    )
    workers[1].send_signal(signal.SIGTERM)
    # As if its disk were slow: the first one has begun to write, and has pictures to draw.
    wait_for(workers[0], (adapters / "adapters.safetensors").is_file)
    workers[0].send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    waits = workers[1].poll() is None
    workers[0].send_signal(signal.SIGCONT)
    statuses, _ = ended(workers)
    assert waits and statuses == [143, 143] and (adapters / "checkpoint.safetensors").is_file()


def test_a_batch_that_cannot_be_shared_out_is_refused_once_before_anything_is_loaded(tmp_path):
    statuses, told = ended(started(tmp_path, *[SHORT | {"batch_size": 3, "model": "/nowhere"}] * 2))
    assert statuses == [2, 2]
    assert sum(told, []) == ["error: batch_size is 3; it must be a multiple of the number of workers, 2."]


def test_an_error_of_one_is_told_by_it_and_ends_the_other(tmp_path):
    statuses, told = ended(started(tmp_path, SHORT, SHORT | {"data": "/nowhere"}))
    assert statuses == [1, 2]
    assert told[1] == ["error: data is '/nowhere', and there is no such folder."]
    assert len(told[0]) == 1 and told[0][0].startswith("error: worker 1 ended with an error, and this one ends too;")


def test_other_configurations_are_refused_with_what_differs(tmp_path):
    statuses, told = ended(started(tmp_path, SHORT, SHORT | {"learning_rate": 0.5, "loss_type": "sft"}))
    assert statuses == [2, 2]
    (line,) = sum(told, [])
    differing = "learning_rate (0.001 and 0.5), loss_type (dpo and sft)"
    assert line.startswith(f"error: workers 0 and 1 were given different {differing}; start all of them with the same")


def test_other_data_are_refused(tmp_path):
    rows = (ROOT / "mlx_lm" / "examples" / "preferences" / "train.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join(rows[:-1]))
    statuses, told = ended(started(tmp_path, SHORT, SHORT | {"data": str(tmp_path / "rows.jsonl")}))
    assert statuses == [2, 2] and len(sum(told, [])) == 1
    assert "were given different the training data, the validation data; start" in sum(told, [])[0]


def test_other_test_data_are_refused_where_no_reference_reads_them(tmp_path):
    other = shutil.copytree(VALUES["data"], tmp_path / "data") / "test.jsonl"
    other.write_text("\n".join(other.read_text().splitlines()[::-1]))
    tested = SHORT | {"loss_type": "simpo", "test": True}
    statuses, told = ended(started(tmp_path, tested, tested | {"data": str(other.parent)}))
    assert statuses == [2, 2] and len(sum(told, [])) == 1
    assert "were given different the test data; start" in sum(told, [])[0]
    assert not (tmp_path / "adapters").exists()


@pytest.mark.parametrize(
    ("tested", "differing"),
    [
        ({"loss_type": "dpo"}, "the reference model"),
        ({"loss_type": "simpo", "train": False, "adapter_path": "none"}, "the model or the adapter to test"),
    ],
)
def test_another_model_is_refused_before_what_it_gives_is_kept_or_told(tmp_path, tested, differing):
    model = shutil.copytree(VALUES["model"], tmp_path / "model")
    weights = {name: 1.5 * value for name, value in mx.load(str(model / "model.safetensors")).items()}
    mx.save_safetensors(str(model / "model.safetensors"), weights, {"format": "mlx"})
    tested = SHORT | {"test": True, "reference_cache": str(tmp_path / "cache")} | tested
    statuses, told = ended(started(tmp_path, tested, tested | {"model": str(model)}))
    assert statuses == [2, 2] and len(sum(told, [])) == 1
    assert f"were given different {differing}; start" in sum(told, [])[0]
    assert not (tmp_path / "cache").exists()


def test_the_first_one_does_not_wait_for_ever_for_others_that_do_not_come(tmp_path):
    """MLX keeps Python from running meanwhile."""
    (tmp_path / "hosts.json").write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)]))
    code = "from mlx_lm.tuner.preference import workers; workers.WAITING = 0.5; workers.find_others()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment |= {"MLX_RANK": "0", "MLX_HOSTFILE": str(tmp_path / "hosts.json")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGALRM and done.stdout == ""
    assert done.stderr == "Waiting for the other workers to be started, 0 minutes at most.\n"

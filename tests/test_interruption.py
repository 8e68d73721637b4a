"""Signals: a step is finished and saved, and what goes on ends with the weights of a run that nothing interrupted."""

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import pytest
import yaml
from tiny import largest_difference, short_run, some_pairs, tiny_llama, trained

from mlx_lm import _interruption
from mlx_lm.tuner.preference.interruption import REQUEST, Interrupted, asked_anywhere, handled_signals
from mlx_lm.tuner.preference.step import Step

ROOT = Path(__file__).resolve().parent.parent
STATE = "checkpoint.safetensors"
VALUES = {"model": str(ROOT / "mlx_lm/examples/tiny_chat_model"), "data": str(ROOT / "mlx_lm/examples/preferences")}
VALUES |= {"train": True, "loss_type": "dpo", "iters": 16, "batch_size": 4, "val_batches": 2, "steps_per_report": 4}
VALUES |= {"save_every": 5, "num_layers": 1, "learning_rate": 1e-3, "reference_cache": "none", "max_seq_length": 128}


def start(folder, *flags, module=("mlx_lm.lora",), **changes):
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(VALUES | {"adapter_path": str(folder / "adapters")} | changes))
    return subprocess.Popen(
        [sys.executable, "-m", *module, "--config", str(config), *flags],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores interruptions, and so would what it starts.
        preexec_fn=lambda: [signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)],
    )


def wait_for(process, condition):
    deadline = time.monotonic() + 120
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The last state of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    process = start(folder)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    return mx.load(str(folder / "adapters" / STATE))


def test_a_signal_finishes_the_step_saves_and_names_what_goes_on(whole, tmp_path):
    process = start(tmp_path, "--resume", "auto")
    metrics = tmp_path / "adapters" / "metrics.jsonl"
    wait_for(process, lambda: metrics.is_file() and '"loss"' in metrics.read_text())
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, out + err
    assert "The step is finished and saved; once more ends the run at once." in err
    reached, command = re.search(
        r"interrupted; after iteration (\d+) of 16, which is saved. This goes on: (.+)\n$", err
    ).groups()
    state, metadata = mx.load(str(tmp_path / "adapters" / STATE), return_metadata=True)
    assert metadata["iteration"] == reached and 4 <= int(reached) < 16
    for name in ("training.png", "report.html", "README.md"):
        assert (tmp_path / "adapters" / name).stat().st_size > 1000
    assert not list((tmp_path / "adapters").glob(".*")), "no half-written file"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done
    assert f"Going on after iteration {reached} of 16" in " ".join(done.stdout.split())
    found = mx.load(str(tmp_path / "adapters" / STATE))
    assert [name for name in whole if not mx.array_equal(found[name], whole[name]).item()] == []


def test_an_interrupted_program_has_what_its_steps_have_learned(tmp_path, monkeypatch):
    """A notebook's cell, say, which was to report later."""
    taken = []

    def interrupted(step, *args):
        if len(taken) == 3:
            raise KeyboardInterrupt
        taken.append(args)
        return take(step, *args)

    take = Step.__call__
    model, expected = tiny_llama(), tiny_llama()
    short_run(expected, some_pairs(12), tmp_path / "whole", iters=3)
    monkeypatch.setattr(Step, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        short_run(model, some_pairs(12), tmp_path / "cut", iters=9, steps_per_report=9)
    assert largest_difference(trained(model), trained(expected)) == 0


def test_killed_a_restart_loop_ends_with_the_same_weights(whole, tmp_path):
    adapters = tmp_path / "adapters"
    for count in (1, 2):  # `benchmarks/soak.py` kills more often, and at any time
        process = start(tmp_path, "--resume", "auto", save_every=1)
        wait_for(process, lambda least=2 * count: len(list(adapters.glob("0*_adapters.safetensors"))) > least)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    process = start(tmp_path, "--resume", "auto", save_every=1)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    found = mx.load(str(adapters / STATE))
    assert [name for name in whole if not mx.array_equal(found[name], whole[name]).item()] == []
    assert not list(adapters.glob(".*"))


def test_ctrl_c_while_importing_ends_without_a_traceback(tmp_path):
    process = start(tmp_path, module=("mlx_lm", "lora"))
    maps = Path(f"/proc/{process.pid}/maps")
    if not maps.exists():
        process.kill()
        pytest.skip("this system does not show what a process has loaded")
    # MLX is loaded in the middle of the imports.
    wait_for(process, lambda: "libmlx" in maps.read_text())
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err and err.count("\n") == 1, err


def test_other_commands_keep_pythons_handler():
    for argv, expected in (
        (["python", "/usr/bin/mlx_lm.lora", "--train"], True),
        (["python", "-m", "mlx_lm.lora"], True),
        (["python", "-m", "mlx_lm", "lora"], True),
        (["python", "/usr/bin/mlx_lm", "lora"], True),
        (["python", "/usr/bin/mlx_lm_dpo", "lora"], True),
        (["python", "/usr/bin/mlx_lm_dpo.lora", "--train"], True),
        (["python", "/usr/bin/mlx_lm.generate", "lora"], False),
        (["python", "-m", "mlx_lm", "chat"], False),
        (["python", "train.py", "mlx_lm.lora.yaml", "runs/mlx_lm.lora/1"], False),
        (["python"], False),
    ):
        assert _interruption.is_training_command(argv) is expected, argv


def test_a_signal_that_comes_while_workers_compare_is_not_lost(monkeypatch):
    class Two:
        size = staticmethod(lambda: 2)

    class Greatest:
        def __init__(self, own):
            self.own = own.item()

        def item(self):
            # The other worker is slower, and has no signal; this one's comes meanwhile.
            os.kill(os.getpid(), signal.SIGTERM)
            return self.own

    monkeypatch.setattr(mx.distributed, "init", Two)
    monkeypatch.setattr(mx.distributed, "all_max", Greatest)
    with handled_signals(), REQUEST.at_steps() as request:
        assert not asked_anywhere(request, True) and request.number == signal.SIGTERM
        monkeypatch.setattr(mx.distributed, "all_max", lambda own: own)
        assert asked_anywhere(request, True)


def test_a_second_signal_ends_at_once_and_handlers_are_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with handled_signals():
        with REQUEST.at_steps() as request:
            os.kill(os.getpid(), signal.SIGTERM)
            assert request.number == signal.SIGTERM
            with pytest.raises(Interrupted) as stop:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(1)
            assert stop.value.status == 143
        # Outside of steps there is nothing to finish.
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
    assert signal.getsignal(signal.SIGTERM) is before and REQUEST.number is None


def test_what_is_ignored_stays_so():
    """As nohup has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handled_signals():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_thread_beside_the_main_one_takes_no_signals():
    def handler():
        with handled_signals():
            return signal.getsignal(signal.SIGTERM)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(handler).result() is signal.getsignal(signal.SIGTERM)

"""Our command and TRL's trainer, each started as its user starts it, and what a run of either is asked to do."""

import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from common import HERE, own_environment, run_json

REPORT_STEPS = 50
RING_PORT = 32380
POLL_SECONDS = 0.25
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
# A folder is of one machine alone.
GIVEN = {
    name: value
    for name, value in os.environ.items()
    if name.startswith(("MLX_", "OPENBLAS_")) and not name.endswith("_DIR")
}
PACKAGES = ("mlx", "mlx-lm", "torch", "transformers", "trl", "peft", "liger-kernel")
PACKAGES += ("mlx-lm-lora", "mlx-tune", "unsloth_zoo")


@dataclass
class Training:
    """A DPO run, in the words of our configuration.

    Attributes:
        model, data: folders.
        schedule: of the learning rate, "constant" or "linear" (falls to zero).
        validations: how many follow the one at the start, evenly spread.
        options: more keys of our configuration, or other values of those here.
        trl_options: more words after `trl_train.py`.
    """

    model: str
    data: str
    batch_size: int = 4
    epochs: int = 1
    max_seq_length: int = 1024
    learning_rate: float = 1e-5
    schedule: str = "constant"
    beta: float = 0.1
    seed: int = 0
    validations: int = 2
    options: dict = field(default_factory=dict)
    trl_options: tuple = ()

    @property
    def rows(self):
        return count_lines(Path(self.data) / "train.jsonl")

    @property
    def iters(self):
        return self.epochs * -(-self.rows // self.batch_size)

    @property
    def steps_per_eval(self):
        return -(-self.iters // self.validations)

    def our_config(self, folder):
        """The configuration file's content; adapters and reference logps go into `folder`."""
        rate = self.learning_rate
        linear = {"name": "linear_schedule", "arguments": [rate, 0.0, self.iters]}
        return {
            "model": str(self.model),
            "data": str(self.data),
            "train": True,
            "loss_type": "dpo",
            "beta": self.beta,
            "learning_rate": rate,
            **({"lr_schedule": linear} if self.schedule == "linear" else {}),
            "optimizer": "adamw",
            # As torch's AdamW of TRL's run: its bias correction, and no weight decay.
            "optimizer_config": {"adamw": {"bias_correction": True, "weight_decay": 0.0}},
            "lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.0},
            "num_layers": -1,
            "batch_size": self.batch_size,
            "iters": self.iters,
            "max_seq_length": self.max_seq_length,
            "val_batches": -1,
            "steps_per_report": REPORT_STEPS,
            "steps_per_eval": self.steps_per_eval,
            "save_every": self.iters + 1,
            "seed": self.seed,
            "adapter_path": f"{folder}/adapters",
            "reference_cache": f"{folder}/reference",
            **self.options,
        }

    def trl_arguments(self, folder, liger=False):
        """The words after `trl_train.py`; `trl_options` are added to them."""
        named = ("model", "data", "batch_size", "iters", "steps_per_eval", "max_seq_length", "learning_rate")
        named += ("schedule", "beta", "seed")
        words = [word for name in named for word in (f"--{name.replace('_', '-')}", getattr(self, name))]
        return [*words, "--output", f"{folder}/adapters", *self.trl_options, *(["--liger"] if liger else [])]


@dataclass
class Watched:
    """What a program said and took.

    Attributes:
        lines: `(seconds since its start, text)` of each line of its output, without colours.
        started: seconds since 1970 at its start.
        seconds: till it had ended.
        cpu_seconds: of the processor, all threads together.
        held_gb: the most memory that it held: of the GPU where there is one, else resident.
    """

    lines: list
    started: float
    seconds: float
    cpu_seconds: float
    held_gb: float

    def moment(self, text):
        """The seconds at which a line with `text` came first."""
        for seconds, line in self.lines:
            if text in line:
                return seconds
        raise NotRun(f"it printed no line with {text!r}")


class NotRun(RuntimeError):
    """A program ended without what a run prints; the sentence is its last."""


def start_ours(training, folder, workers=1, **limits):
    """Run `python -m mlx_lm.lora --config FILE`.

    Args:
        training: a `Training`.
        folder: for the configuration, the adapters and the reference's logps.
        workers: processes on this machine that share each batch, over MLX's ring.
        limits: for `watch`.

    Returns:
        `Watched`, and the lines of metrics.jsonl.

    Raises:
        NotRun: it ended with an error.
    """
    config = Path(folder) / "config.yaml"
    config.write_text(json.dumps(training.our_config(folder)))
    command = [sys.executable, "-m", "mlx_lm.lora", "--config", config]
    if workers > 1:
        command = by_hand(command, folder, workers)
    watched = watch(command, own_environment(), **limits)
    metrics = Path(folder) / "adapters" / "metrics.jsonl"
    return watched, [json.loads(line) for line in metrics.read_text().splitlines()]


def by_hand(command, folder, workers):
    """The command that starts one for each worker of MLX's ring on this machine.

    Not by mlx.launch, which waits for its workers' output in a loop that takes more than one core.
    """
    hosts = Path(folder) / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{RING_PORT + rank}"] for rank in range(workers)]))
    each = f"MLX_HOSTFILE={shlex.quote(str(hosts))} MLX_RANK=$rank {shlex.join(map(str, command))}"
    others = f"for rank in $(seq {workers - 1}); do {each} & done"
    # The first one's end is the run's: it tells how the others ended.
    return ["bash", "-c", f"{others}; rank=0; {each}; status=$?; wait; exit $status"]


def start_trl(training, folder, python=sys.executable, liger=False, **limits):
    """Run `trl_train.py`, which keeps nothing from an earlier run; arguments as for `start_ours`.

    Returns:
        `Watched`, and the events that it told.
    """
    command = [python, HERE / "trl_train.py", *training.trl_arguments(folder, liger)]
    watched = watch(command, {"HF_DATASETS_CACHE": f"{folder}/datasets"}, **limits)
    return watched, [json.loads(line) for _, line in watched.lines if line.startswith('{"event"')]


def watch(command, environment, timeout=None, measure_memory=True):
    """Run a command to its end and note when it said what.

    Args:
        command: its words.
        environment: variables besides this process's; None removes one.
        timeout: seconds that it may take.
        measure_memory: whether to ask the GPU for its memory while it runs.

    Raises:
        NotRun: it ended with an error, or was ended by the timeout.
    """
    given = {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", **environment}
    variables = {name: value for name, value in (os.environ | given).items() if value is not None}
    words = [str(word) for word in command]
    errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
    with errors, GpuMemory(measure_memory) as memory:
        started, lines = time.time(), []
        process = subprocess.Popen(
            words, env=variables, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8", errors="replace",
            start_new_session=True,
        )  # fmt: skip
        # With all workers that it has started.
        end = partial(os.killpg, process.pid, signal.SIGKILL)
        timer = threading.Timer(timeout or threading.TIMEOUT_MAX, end)
        timer.daemon = True
        timer.start()
        try:
            for line in process.stdout:
                lines.append((time.time() - started, ANSI.sub("", line.rstrip())))
        except BaseException:
            end()
            raise
        # Popen's own wait keeps no resource usage.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.time() - started
        timer.cancel()
        errors.seek(0)
        said = errors.read()
    resident = usage.ru_maxrss / 1e9 if sys.platform == "darwin" else usage.ru_maxrss * 1024 / 1e9
    held = resident if memory.peak_gb is None else memory.peak_gb
    if process.returncode != 0:
        words = [line for line in said.splitlines() if line.strip()] or [line for _, line in lines]
        ended = (
            f"no end within {timeout:g} s" if timeout and seconds >= timeout else f"exit status {process.returncode}"
        )
        raise NotRun(f"{ended}: {words[-1] if words else 'nothing said'}")
    return Watched(lines, started, seconds, usage.ru_utime + usage.ru_stime, held)


class GpuMemory:
    """Within the context, the most memory that the first GPU gave beyond what it held before, or None without one.

    Args:
        wanted: whether to look at all.
    """

    def __init__(self, wanted=True):
        self.wanted = wanted

    def __enter__(self):
        before = query_gpu("memory.used") if self.wanted else None
        self.peak_gb = None if before is None else 0.0
        self.done = threading.Event()
        if before is not None:
            self.thread = threading.Thread(target=self._poll, args=(float(before),), daemon=True)
            self.thread.start()
        return self

    def _poll(self, before):
        while not self.done.wait(POLL_SECONDS):
            # nvidia-smi counts in MiB.
            self.peak_gb = max(self.peak_gb, (float(query_gpu("memory.used") or before) - before) * 2**20 / 1e9)

    def __exit__(self, *exc):
        self.done.set()
        if self.peak_gb is not None:
            self.thread.join()


def query_gpu(name):
    """What nvidia-smi says of the first GPU that CUDA may use, or None where there is none."""
    if shutil.which("nvidia-smi") is None:
        return None
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    command = ["nvidia-smi", f"--id={first}", f"--query-gpu={name}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 and done.stdout.strip() else None


def count_lines(path):
    return sum(1 for line in Path(path).read_text().splitlines() if line.strip())


def limited_data(data, folder, rows):
    """A data folder of the first `rows` training pairs of `data` and a quarter as many validation pairs."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", rows), ("valid", max(rows // 4, 1))):
        lines = [line for line in (Path(data) / f"{split}.jsonl").read_text().splitlines() if line.strip()]
        (folder / f"{split}.jsonl").write_text("".join(line + "\n" for line in lines[:count]))
    return str(folder)


def machine():
    """The name of the first GPU, or of the processor."""
    name = query_gpu("name")
    if name is not None:
        return name
    cpus = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"^model name\s*:\s*(.*)$", cpus, re.MULTILINE)
    return f"{model[1] if model else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def environment():
    """The variables that MLX and OpenBLAS read, as far as they were set when this process began."""
    return GIVEN


def command_line():
    """This process's command, with files and folders by their own names."""
    # Neither JSON nor lengths such as 224/32 are paths.
    words = [word if re.match(r"[{\d]", word) or os.sep not in word else Path(word).name for word in sys.argv[1:]]
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def versions(python=sys.executable):
    """`{package: version}` of what the comparisons run, as another interpreter has them."""
    code = (
        "import importlib.metadata as m, json, sys; here = {d.metadata['Name']: d.version for d in m.distributions()}; "
        "print(json.dumps({name: here[name] for name in sys.argv[1:] if name in here}))"
    )
    return run_json([python, "-c", code, *PACKAGES])

"""Every fine-tune type through the command, and its adapters in plain mlx-lm: logps, generate, fuse, server."""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.convert import main as convert

import mlx_lm
import mlx_lm.lora
from mlx_lm.tuner.preference import load as loading
from mlx_lm.tuner.preference.batches import PACKED, make_batch
from mlx_lm.tuner.preference.logps import Scorer
from mlx_lm.utils import load_model

EXAMPLES = Path(__file__).parents[1] / "mlx_lm" / "examples"
MODEL = EXAMPLES / "tiny_chat_model"
QUESTION = "What is the capital of France?"
# fine_tune_type, and how the model is quantized first; the model's widths are multiples of 64.
KINDS = {
    "lora": ("lora", None),
    "dora": ("dora", None),
    "full": ("full", None),
    "4-bit": ("lora", ["--q-bits", "4", "--q-group-size", "64"]),
    "8-bit": ("lora", ["--q-bits", "8", "--q-group-size", "32"]),
    "mxfp4": ("lora", ["--q-mode", "mxfp4"]),
}
FUSED = ("lora", "dora", "full", "4-bit")


def call(main, *arguments):
    """Run a command's `main` with a command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["mlx_lm", *map(str, arguments)])
        main()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for split, rows in (("train", 24), ("valid", 8), ("test", 6)):
        lines = (EXAMPLES / "preferences" / f"{split}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{split}.jsonl").write_text("".join(lines[:rows]))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data):
    """A folder with adapters for each of KINDS, and in each `pairs.json`: pairs and the trained policy's logps."""
    folder = tmp_path_factory.mktemp("runs")
    for kind, (fine_tune_type, quantization) in KINDS.items():
        model, place, seen = MODEL, folder / kind, {}
        if quantization is not None:
            model = folder / f"{kind} model"
            call(convert, "--model", MODEL, "--mlx-path", model, "-q", *quantization)
        train_model = mlx_lm.lora.train_model

        def watched(args, model, train_set, valid_set, *rest, seen=seen, train_model=train_model, **options):
            seen.update(model=model, pairs=[valid_set[i] for i in range(len(valid_set))])
            return train_model(args, model, train_set, valid_set, *rest, **options)

        arguments = ["--model", model, "--data", data, "--train", "--test", "--adapter-path", place]
        arguments += ["--loss-type", "dpo", "--beta", "0.5", "--fine-tune-type", fine_tune_type, "--num-layers", "2"]
        arguments += ["--iters", "6", "--batch-size", "8", "--steps-per-report", "1", "--save-every", "3"]
        arguments += ["--learning-rate", "2e-4", "--reference-cache", "none"]
        arguments += ["--save-best", "eval_loss"]  # the last one
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mlx_lm.lora, "train_model", watched)
            if kind != "lora":
                patch.setattr("mlx_lm.tuner.preference.outcome.plot_metrics", lambda *_: None)
            call(mlx_lm.lora.main, *arguments)
        pairs = seen["pairs"]
        logps = Scorer(seen["model"].eval())(make_batch(pairs, PACKED)[0]).total
        told = {"model": str(model), "pairs": [pair[:3] for pair in pairs], "logps": logps.tolist()}
        (place / "pairs.json").write_text(json.dumps(told))
    return folder


def lines_of(folder, name):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_command_trains_it(runs, kind):
    first, *_, last = lines_of(runs / kind, "eval_loss")
    assert first == pytest.approx(math.log(2), abs=1e-3)
    assert last < 0.66 and len(lines_of(runs / kind, "loss")) == 6
    assert lines_of(runs / kind, "eval_rewards/margins")[-1] > 0.1
    files = {path.name for path in (runs / kind).iterdir()} - {"pairs.json"}
    numbered = {"0000003_adapters.safetensors", "0000006_adapters.safetensors"}
    assert files >= {"adapters.safetensors", "adapter_config.json", "metrics.jsonl"} | numbered
    assert ("training.png" in files) == (kind == "lora")  # of the others none is drawn
    weights = mx.load(str(runs / kind / "adapters.safetensors"))
    leaves = {name.rpartition(".")[2] for name in weights}
    expected = {"full": {"weight"}, "dora": {"lora_a", "lora_b", "m"}}.get(kind, {"lora_a", "lora_b"})
    assert leaves == expected and not [name for name in weights if ".linear." in name]


# Runs with plain mlx-lm alone, from a folder outside the repository.
UPSTREAM = """
import contextlib, io, json, sys
from pathlib import Path
import mlx_lm
import mlx.core as mx
import mlx.nn as nn
from mlx_lm import load
from mlx_lm.fuse import main as fuse_main
from mlx_lm.generate import main as generate_main

runs, question, fused_kinds = Path(sys.argv[1]), sys.argv[2], sys.argv[3].split(",")

def logps(model, pairs):
    out = []
    for which in (1, 2):
        for pair in pairs:
            prompt, response = pair[0], pair[which]
            logits = model(mx.array([(prompt + response)[:-1]]))[0, len(prompt) - 1 :]
            out.append(-nn.losses.cross_entropy(logits, mx.array(response)).sum().item())
    return out

def answer(*arguments):
    sys.argv = ["mlx_lm.generate", "--prompt", question, "--max-tokens", "12", "--temp", "0", "--verbose", "False"]
    sys.argv += [str(argument) for argument in arguments]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        generate_main()
    return said.getvalue()

found = {"package": mlx_lm.__file__}
for pairs_file in sorted(runs.glob("*/pairs.json")):
    folder = pairs_file.parent
    told = json.loads(pairs_file.read_text())
    best = folder / "best"
    entry = {"answer": answer("--model", told["model"], "--adapter-path", best), "logps": []}
    for place in (folder, best, folder / "0000006", folder / "0000003"):
        model, tokenizer = load(told["model"], adapter_path=str(place))
        entry["logps"].append(logps(model, told["pairs"]))
    bare, _ = load(told["model"])
    entry["bare"] = logps(bare, told["pairs"])
    if folder.name in fused_kinds:
        place = folder / "fused"
        sys.argv = ["mlx_lm.fuse", "--model", told["model"], "--adapter-path", str(best), "--save-path", str(place)]
        sys.argv += ["--dequantize"] if "bit" in folder.name else []
        with contextlib.redirect_stdout(io.StringIO()):
            fuse_main()
        fused, _ = load(str(place))
        entry |= {"fused": logps(fused, told["pairs"]), "fused answer": answer("--model", place)}
    found[folder.name] = entry
(runs / "upstream.json").write_text(json.dumps(found))
"""


def plain_environment():
    """An environment without this project: no path of ours, and an installed copy of it switched off."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return environment | {"MLX_LM_DPO": "0", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def upstream(runs):
    """What plain mlx-lm makes of each of KINDS."""
    command = [sys.executable, "-c", UPSTREAM, str(runs), QUESTION, ",".join(FUSED)]
    done = subprocess.run(command, cwd=runs, env=plain_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads((runs / "upstream.json").read_text())
    ours, *upstreams = map(Path, mlx_lm.__path__)
    assert Path(found["package"]).parent in upstreams and Path(found["package"]).parent != ours
    return found


@pytest.mark.parametrize("kind", list(KINDS))
def test_plain_mlx_lm_gives_the_trained_policys_logps(runs, upstream, kind):
    trained = np.array(json.loads((runs / kind / "pairs.json").read_text())["logps"])
    assert abs(upstream[kind]["bare"] - trained).max() > 0.1
    *last, earlier = upstream[kind]["logps"]
    assert all(np.allclose(logps, trained, rtol=1e-5, atol=1e-4) for logps in last)
    assert abs(np.array(earlier) - trained).max() > 1e-2


@pytest.mark.parametrize("kind", list(KINDS))
def test_plain_mlx_lm_generates_with_the_adapters(upstream, kind):
    assert len(upstream[kind]["answer"].split()) > 1


@pytest.mark.parametrize("kind", FUSED)
def test_plain_mlx_lm_fuses_the_adapters(runs, upstream, kind):
    trained = np.array(json.loads((runs / kind / "pairs.json").read_text())["logps"])
    assert np.allclose(upstream[kind]["fused"], trained, rtol=1e-3, atol=1e-3)
    assert upstream[kind]["fused answer"] == upstream[kind]["answer"]


def ask(port, path, body=None, seconds=20):
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, {"Content-Type": "application/json"})
    # A proxy of the environment's has no place between a machine and itself.
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=seconds) as reply:
        return json.loads(reply.read())


def test_plain_mlx_lms_server_answers_with_the_adapters(runs, upstream):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "mlx_lm",
        "server",
        "--model",
        str(MODEL),
        "--adapter-path",
        str(runs / "lora" / "best"),
    ]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-tokens", "12", "--temp", "0"]
    with open(runs / "server.log", "w") as log:
        server = subprocess.Popen(command, cwd=runs, env=plain_environment(), stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 90
        while True:
            try:
                assert ask(port, "/health", seconds=5)["status"] == "ok"
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, (runs / "server.log").read_text()
                time.sleep(0.2)
        body = json.dumps({"messages": [{"role": "user", "content": QUESTION}]}).encode()
        said = ask(port, "/v1/chat/completions", body, seconds=60)["choices"][0]["message"]["content"]
    finally:
        server.kill()
        server.wait()
    assert said.strip() == upstream["lora"]["answer"].strip()


def test_an_adapter_goes_on_from_an_adapter(runs, data, tmp_path, capsys):
    """The adapter that training begins with is part of the reference, in a later test too."""
    shared = ["--model", MODEL, "--data", data, "--loss-type", "dpo", "--num-layers", "2", "--reference-cache", "none"]
    shared += ["--adapter-path", tmp_path / "again", "--beta", "0.5"]
    start = runs / "lora" / "adapters.safetensors"
    options = ["--train", "--iters", "2", "--batch-size", "8", "--steps-per-report", "1", "--learning-rate", "1e-3"]
    call(mlx_lm.lora.main, *shared, *options, "--resume-adapter-file", start, "--test")
    assert lines_of(tmp_path / "again", "eval_loss")[0] == pytest.approx(math.log(2), abs=1e-3)
    assert lines_of(tmp_path / "again", "loss")[0] == pytest.approx(math.log(2), abs=1e-3)
    begun, trained = mx.load(str(start)), mx.load(str(tmp_path / "again" / "adapters.safetensors"))
    moved = [mx.abs(trained[name] - value).max().item() for name, value in tree_flatten(begun)]
    assert 1e-4 < max(moved) < 1e-2  # two steps of Adam, from there and not from zero
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Test loss")]
    call(mlx_lm.lora.main, *shared, "--test")
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("Test loss")] == told
    assert len(told) == 1 and "(6 pairs)" in told[0]


def test_a_test_without_adapters_is_of_the_model_itself(data, capsys):
    shared = ["--model", MODEL, "--data", data, "--loss-type", "dpo", "--reference-cache", "none", "--test"]
    call(mlx_lm.lora.main, *shared, "--adapter-path", "")
    assert "Test loss 0.693, reward accuracy 0.5" in capsys.readouterr().out


@pytest.mark.parametrize("slow", [True, False])
def test_half_precision_models_are_computed_in_float32_where_that_is_faster(tmp_path, monkeypatch, capsys, slow):
    model, _ = load_model(Path(MODEL))
    model.set_dtype(mx.bfloat16)
    shutil.copytree(MODEL, tmp_path / "half")
    mx.save_safetensors(str(tmp_path / "half" / "model.safetensors"), dict(tree_flatten(model.parameters())))
    monkeypatch.setattr(loading, "is_linux_cpu", lambda: slow)
    loaded, _ = loading.load_named("model", str(tmp_path / "half"))
    assert {value.dtype for _, value in tree_flatten(loaded.parameters())} == {mx.float32 if slow else mx.bfloat16}
    assert ("computed in float32" in capsys.readouterr().out) == slow

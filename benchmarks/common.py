"""What the benchmarks share that needs neither MLX nor torch: shapes, made-up rows, subprocesses, tables."""

import ctypes.util
import json
import os
import random
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Llama shapes: hidden, layers, intermediate, heads, key-value heads, vocabulary.
SHAPES = {
    "8b": (4096, 32, 14336, 32, 8, 128256),
    "3b": (3072, 28, 8192, 24, 8, 128256),
    "1b": (2048, 16, 8192, 32, 8, 128256),  # 1.24 B parameters with a tied embedding
    "135m": (576, 30, 1536, 9, 3, 49152),
    "tiny": (64, 2, 128, 4, 2, 512),
}


def llama_config(shape, vocabulary=None, layers=None):
    """The configuration of a shape, in the words that mlx-lm and transformers share."""
    hidden, count, intermediate, heads, kv_heads, words = SHAPES[shape]
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers or count,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-5,
        "vocab_size": vocabulary or words,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    }


def make_rows(count, prompt, response, vocabulary, seed=0):
    """`count` rows of random tokens as `(prompt, chosen, rejected)`, all prompts and all responses of one length."""
    draw = random.Random(seed)
    return [tuple(draw.choices(range(1, vocabulary), k=n) for n in (prompt, response, response)) for _ in range(count)]


def lengths(text):
    """`[(prompt, response)]` of text like "256/256,1024/256"."""
    return [tuple(int(number) for number in part.split("/")) for part in text.split(",")]


def by_comma(kind):
    """A parser of values with commas between."""
    return lambda text: [kind(part) for part in text.split(",")]


def peak_resident_gb():
    """The most memory that this process has had resident, in GB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


def run_json(command, env=None, timeout=None):
    """The last JSON object that a command prints.

    Args:
        command: its words.
        env: variables to add to this process's; None for a value removes one.
        timeout: seconds to give it.

    Returns:
        The object, or `{"error": the last line of what it said}`.
    """
    variables = {name: value for name, value in (os.environ | (env or {})).items() if value is not None}
    try:
        done = subprocess.run(
            [str(word) for word in command], env=variables, timeout=timeout, capture_output=True, text=True
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no result within {timeout} s"}
    for line in reversed(done.stdout.splitlines()):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            return found
    said = (done.stderr or done.stdout).strip().splitlines()
    return {"error": f"exit status {done.returncode}: {said[-1] if said else 'nothing said'}"}


def own_environment():
    """Variables of a process that imports this repository's package first, with OpenBLAS where Linux has one."""
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, **fast_blas()}


def fast_blas():
    """Variables that have a process load OpenBLAS before MLX, in place of the slow BLAS of MLX's Linux package."""
    found = ctypes.util.find_library("openblas") if sys.platform == "linux" else None
    return {"LD_PRELOAD": os.environ.get("LD_PRELOAD") or found}


def run_own(script, spec, timeout=None, environment=None):
    """What a script of this folder prints for a spec, in a process of its own, so that its peak memory is its own.

    Args:
        script: its file's name.
        spec: a dict.
        timeout: seconds to give it.
        environment: variables besides `own_environment`'s.
    """
    environment = own_environment() | (environment or {})
    return run_json([sys.executable, HERE / script, json.dumps(spec)], environment, timeout)


# `harness.measure` of a spec.
own_step = partial(run_own, "harness.py")


def markdown_table(header, rows):
    """A Markdown table of the strings of `header` and `rows`."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def stored_dtype(model):
    """The dtype that a model folder's configuration names."""
    config = json.loads((Path(model) / "config.json").read_text())
    return config.get("dtype") or config.get("torch_dtype") or "as stored"


def say(*words):
    """Print to stderr at once, so that a run that is cut off has said what it knew."""
    print(*words, file=sys.stderr, flush=True)

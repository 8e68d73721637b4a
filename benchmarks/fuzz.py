"""Hand the command whatever anybody may write: each input is read, or refused in one sentence, never with a traceback.

PYTHONPATH=.:tests python benchmarks/fuzz.py [--seed 0] [--rows 100000] [--configs 10000] [--folders 300]

Rows of all layouts, configurations, model and adapter folders, metrics and states are drawn from sound ones, of which
parts are exchanged, left out, doubled, nested and cut, as values and as bytes. Exit status 1 where one of them raises
anything but a `ConfigError` of at most 400 printable characters (for rows, with the file's name), or takes more than
SECONDS of a processor. A fault is printed with the input, which the seed and its number give again.
"""

import argparse
import contextlib
import copy
import io
import json
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import mlx.core as mx
from layouts import BAD, GOOD, LAYOUTS, USER
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

import mlx_lm.lora  # first: it chooses the BLAS that MLX multiplies with
from mlx_lm.tuner.datasets import load_dataset
from mlx_lm.tuner.preference.checkpoint import _write_state, find_state
from mlx_lm.tuner.preference.curves import plot_metrics
from mlx_lm.tuner.preference.load import check_tokens, load_adapter, load_named, read_adapter_config
from mlx_lm.tuner.preference.logps import Scorer
from mlx_lm.tuner.preference.metrics import read_metrics
from mlx_lm.tuner.preference.options import LONGEST_MESSAGE, ConfigError
from mlx_lm.utils import load

MODEL = Path(mlx_lm.lora.__file__).parent / "examples" / "tiny_chat_model"
SECONDS = 20
KEYS = """prompt chosen rejected role content from value tools system margin weight tool_calls function name arguments
reasoning_content messages label completion history chat_template_kwargs score_chosen score_rejected conversations
question instruction text""".split()
TEXTS = ["", " ", "Mars.", "\n\nHuman: Hi\n\nAssistant: Yes", "Human:", "<think>", "</think>\nA", "<|im_start|>"]
TEXTS += ["\ud800", "\x00", "\x1b[31m", "\u202e", "e\u0301", "\U0001f468\u200d\U0001f469", "x" * 2000, "1" * 5000]
TEXTS += ["[{'role': 'user'", '[{"role": 1', '[{"role": "user", "content": "a"}]', "[" * 3000, '{"a":' * 2000]
TEXTS += ["{{ messages }}", "{% for %}", "null", "assistant", "user", "system", "tool", "human", "gpt", "function_call"]
TEXTS += ["tie", "model_a", "\u241fresponse\u241f"]
NUMBERS = [0, 1, -1, 2, 0.5, 3e38, -1e39, 1e308, 2**31, 2**63, 10**19, 10**400]
NUMBERS += [float("nan"), float("inf"), -float("inf")]
OTHERS = [None, True, False, [], {}, [[]], [None], [1], [[1, 2]], {"role": "user"}]
OTHERS += [USER, GOOD, BAD, [USER, GOOD], [BAD]]
# Stand in the text for what `json.dumps` does not write.
RAW = {"@digits@": "7" * 5000, "@deep@": "[" * 50_000, "@nested@": "[" * 400 + "]" * 400, "@twice@": '1, "prompt": 2'}
YAML_TEXTS = ["2001-99-99", "0x_", "!!int x", "!!timestamp x", "9" * 400, "9" * 5000, "0x" + "f" * 5000, "!!float ''"]
YAML_TEXTS += ["!!python/object:os.system x", "*a", "&a [*a]", "{" * 50, "[" * 2000, "0o9", "1:99", "!!binary x"]
YAML_TEXTS += ["!!set {a: b}", "'", "<<", "? a", "\t", "@", "x" * 300, "a\0b", "~nobody/x", "1GB", "1e-4", ".inf"]
YAML_TEXTS += ["-.inf", ".nan", "[dpo, sft]", "{name: cosine_decay, arguments: [x]}", "{adam: {betas: 3}}"]
YAML_TEXTS += ["{rank: 8, scale: .nan, dropout: 2}", "{rank: 999999999999999999999999, scale: 1, dropout: 0}"]
YAML_TEXTS += ["{name: cosine_decay, arguments: [1.0e-4, 9999], warmup: -1}"]
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}"


class TooLong(BaseException):
    """An input was not done with in SECONDS."""


def odd(draw):
    """Any value."""
    kind = draw.random()
    if kind < 0.35:
        return draw.choice(TEXTS)
    if kind < 0.6:
        return draw.choice(NUMBERS)
    return copy.deepcopy(draw.choice(OTHERS)) if kind < 0.9 else draw.choice(list(RAW))


def changed(draw, value):
    """`value` with one place in it changed, or another value."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        value, key = dict(value), draw.choice(list(value))
        kind = draw.random()
        if kind < 0.15:
            del value[key]
        elif kind < 0.3:
            value[draw.choice(KEYS)] = odd(draw)
        elif kind < 0.4:
            value[draw.choice(KEYS)] = value.pop(key)
        else:
            value[key] = changed(draw, value[key])
        return value
    if isinstance(value, list) and value and draw.random() < 0.9:
        value, place = list(value), draw.randrange(len(value))
        kind = draw.random()
        if kind < 0.15:
            del value[place]
        elif kind < 0.3:
            value.insert(place, odd(draw))
        elif kind < 0.4:
            value *= 2
        else:
            value[place] = changed(draw, value[place])
        return value
    if isinstance(value, str) and value and draw.random() < 0.4:
        place = draw.randrange(len(value))
        return value[:place] + draw.choice(TEXTS) + value[place + draw.randrange(3) :]
    return [value] if draw.random() < 0.05 else odd(draw)


def cut(draw, content):
    """Bytes with some of them exchanged, left out, or cut off."""
    content = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(len(content) + 1)
        content[place : place + draw.choice([0, 1, 1, 4, 20])] = draw.randbytes(draw.choice([0, 1, 1, 3]))
    return bytes(content if draw.random() < 0.7 else content[: draw.randrange(len(content) + 1)])


def as_json(draw, value):
    """A value as JSON, with what no JSON writer would write."""
    text = json.dumps(value, ensure_ascii=draw.random() < 0.5)
    for name, raw in RAW.items():
        text = text.replace(json.dumps(name), raw)
    content = text.encode("utf-8", "surrogatepass")
    return cut(draw, content) if draw.random() < 0.15 and content else content


def some_row(draw):
    row = copy.deepcopy(draw.choice(list(LAYOUTS.values())))
    if draw.random() < 0.2:
        call = {"function": {"name": "look", "arguments": draw.choice(["{}", {}, '{"a": 1}', {"a": [1]}])}}
        row["tools"] = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
        row["chosen"] = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "4"}, GOOD]
    if draw.random() < 0.1:
        row = {"prompt": "Name a planet.", "completion": "Mars.", "label": draw.random() < 0.5}
    for _ in range(draw.choice([0, 1, 1, 1, 2, 3])):
        row = changed(draw, row)
    return row


def rows(draw, folder):
    """A file of one row, or of some, read as training data."""
    ending = draw.choice([".jsonl"] * 8 + [".json", ".csv", ".tsv"])
    file = folder / f"rows{ending}"
    content = b"\n".join(as_json(draw, some_row(draw)) for _ in range(draw.choice([1, 1, 1, 2])))
    if ending in (".csv", ".tsv"):
        delimiter = "," if ending == ".csv" else "\t"
        cells = [draw.choice([*TEXTS[:20], "1", "0.5", "1e999"]).replace("\ud800", "") for _ in range(4)]
        content = f"{delimiter.join(['prompt', 'chosen', 'rejected', 'margin'])}\n{delimiter.join(cells)}".encode()
        content = cut(draw, content) if draw.random() < 0.3 else content
    file.write_bytes(content)
    args = SimpleNamespace(loss_type="dpo", train=True, test=False, data=str(file))
    args.max_seq_length = draw.choice([8, 512])
    args.use_chat_template, args.score = draw.random() < 0.8, draw.choice(["assistant", "all"])
    if draw.random() < 0.1:
        args.score_difference, args.min_score_difference = draw.choice(["margin", "weight"]), draw.choice([None, 0.5])
    if draw.random() < 0.1:
        args.valid_share = 0.5
    return content, lambda: load_dataset(args, rows.tokenizer), f"rows{ending}"


def configs(draw, folder):
    """A configuration, read and checked by the command."""
    names = sorted({*mlx_lm.lora.CONFIG_DEFAULTS, "hf_dataset", "betta", "lora_layers"} - {"config"})
    values = {"loss_type": "dpo", "train": True, "adapter_path": "adapters"} if draw.random() < 0.9 else {}
    lines = [f"{key}: {json.dumps(value)}" for key, value in values.items()]
    for _ in range(draw.randint(0, 4)):
        name = draw.choice(names) if draw.random() < 0.95 else draw.choice([*KEYS, "1", "[a]", "? {a: b}", "null", "'"])
        given = draw.choice(YAML_TEXTS) if draw.random() < 0.5 else None
        lines.append(f"{name}: {json.dumps(changed(draw, values.get(name, 1))) if given is None else given}")
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    content = cut(draw, content) if draw.random() < 0.1 and content else content
    (folder / "config.yaml").write_bytes(content)
    return content, lambda: command(folder / "config.yaml"), ""


def command(config):
    """The command up to where it loads the model; its sentence as an exception."""
    told = io.StringIO()
    with mock.patch.object(sys, "argv", ["mlx_lm.lora", "--config", str(config)]), contextlib.redirect_stderr(told):
        with mock.patch("mlx_lm.lora._run"), mock.patch("mlx_lm.lora._upstream_run"):
            try:
                mlx_lm.lora.main()
            except SystemExit as stop:
                errors = [line for line in told.getvalue().splitlines() if line.startswith("error: ")]
                assert stop.code == 2 and len(errors) == 1, (stop.code, told.getvalue())
                raise ConfigError(errors[0].removeprefix("error: ")) from None


def models(draw, folder):
    """A model's folder, loaded and run on a row."""
    place = shutil.copytree(MODEL, folder / "model")
    name = draw.choice(["config.json"] * 4 + [path.name for path in place.iterdir()])
    path, content = place / name, (place / name).read_bytes()
    if name == "config.json":
        # A number of layers or words that no memory holds is another matter.
        numbers = [number for number in NUMBERS if not abs(number) < 1e308 or abs(number) < 1000]
        with mock.patch(f"{__name__}.NUMBERS", numbers):
            content = as_json(draw, changed(draw, json.loads(content)))
    elif path.suffix == ".json" and draw.random() < 0.7:
        content = as_json(draw, changed(draw, json.loads(content)))
    elif path.suffix == ".jinja" and draw.random() < 0.7:
        written = [draw.choice(TEXTS), ENDLESS, "{{ 'x' * 10**8 }}", "{{ messages[9].content }}"]
        content = draw.choice(written).encode("utf-8", "replace")
    else:
        content = cut(draw, content)
    path.write_bytes(content)
    (folder / "rows.jsonl").write_text(json.dumps(LAYOUTS["prompt, chosen, rejected"]))
    args = SimpleNamespace(loss_type="dpo", train=True, test=False, data=str(folder / "rows.jsonl"), max_seq_length=64)

    def use():
        model, tokenizer = load_named("model", str(place))
        pairs = load_dataset(args, tokenizer)[0]
        check_tokens(model, [pairs], "model")
        Scorer(model, True)

    return f"{name}: ".encode() + content[:3000], use, ""


def lora_weights(model):
    """The bytes of an adapter file of the configuration that `adapters` begins with."""
    linear_to_lora_layers(model, 1, {"rank": 4, "scale": 1.0, "dropout": 0.0})
    weights = {name: value for name, value in tree_flatten(model.parameters()) if ".lora_" in name}
    with tempfile.TemporaryDirectory() as place:
        mx.save_safetensors(f"{place}/adapters.safetensors", weights)
        return Path(place, "adapters.safetensors").read_bytes()


def adapters(draw, folder):
    """An adapter's folder, put on the model."""
    config = {"num_layers": 1, "fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 1.0, "dropout": 0.0}}
    for _ in range(draw.randint(0, 2)):
        config = changed(draw, config)
    content = as_json(draw, config)
    (folder / "adapter_config.json").write_bytes(content)
    weights = adapters.weights
    (folder / "adapters.safetensors").write_bytes(weights if draw.random() < 0.6 else cut(draw, weights))

    def use():
        config = read_adapter_config(folder)
        load_adapter("adapter_path", load_named("model", str(MODEL))[0], config, folder / "adapters.safetensors")

    return content, use, ""


def metrics(draw, folder):
    """Metrics of an earlier run, read and drawn."""
    lines = [{"iteration": i, "loss": 0.5, "rewards/chosen": 1.0, "eval_loss": 0.1} for i in range(draw.randint(0, 4))]
    content = b"\n".join(as_json(draw, changed(draw, line)) for line in lines)
    (folder / "metrics.jsonl").write_bytes(content)

    def use():
        lines = read_metrics(folder / "metrics.jsonl")
        return draw.random() < 0.05 and plot_metrics(folder, lines)

    return content, use, ""


def states(draw, folder):
    """A state of an earlier run, from which one is to go on."""
    path, told = folder / "checkpoint.safetensors", {"progress": '{"iteration": 3}', "settings": '{"beta": 0.1}'}
    _write_state(path, {"random": mx.zeros(2, mx.uint32)}, told)
    path.write_bytes(content := cut(draw, path.read_bytes()))
    model = SimpleNamespace(trainable_parameters=dict)
    return content, lambda: find_state(folder, model, {"beta": 0.1, "seed": 0}, 10), ""


def outcome(call, name):
    """What became of an input: "read", "refused", or the fault."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        call()
        return "read"
    except ConfigError as error:
        told = str(error)
        sound = told and len(told) <= LONGEST_MESSAGE and told.isprintable() and (name in told or "valid_share" in told)
        return "refused" if sound else f"a message that is not sound: {told!r}"
    except (Exception, TooLong) as error:
        lines = traceback.format_exception(error)
        return "".join(lines[-3:])[-1500:]
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        return f"{type(error).__name__}: {error}"  # a panic of the tokenizers
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main():
    """Draw inputs of each kind until there are as many as asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--configs", type=int, default=10_000)
    parser.add_argument(
        "--folders", type=int, default=300, help="of models and of adapters; ten times as many metrics and states"
    )
    parser.add_argument("--output", type=Path, help="JSON file of the figures")
    args = parser.parse_args()

    def stop(number, frame):
        raise TooLong(f"more than {SECONDS} s")

    signal.signal(signal.SIGPROF, stop)
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        model, rows.tokenizer = load(str(MODEL))
        adapters.weights = lora_weights(model)
    counts = {rows: args.rows, configs: args.configs, models: args.folders, adapters: args.folders}
    counts |= {metrics: 10 * args.folders, states: 10 * args.folders}
    found, faults, begun = {"seed": args.seed}, 0, time.monotonic()
    for make, count in counts.items():
        outcomes = Counter()
        for number in range(count):
            draw = random.Random(f"{args.seed} {make.__name__} {number}")
            with tempfile.TemporaryDirectory() as place:
                content, call, name = make(draw, Path(place))
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    told = outcome(call, name)
            if told not in ("read", "refused"):
                faults += 1
                print(f"{make.__name__} {number}: {content[:300]!r}\n{told}\n", flush=True)
                told = "faults"
            outcomes[told] += 1
        found[make.__name__] = {"tried": count, **outcomes}
        print(make.__name__, found[make.__name__], f"{time.monotonic() - begun:.0f} s", flush=True)
    if args.output is not None:
        args.output.write_text(json.dumps(found | {"seconds": round(time.monotonic() - begun)}, indent=1) + "\n")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()

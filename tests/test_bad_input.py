"""A user's mistakes, each through the command: one sentence, exit status 2, and nothing that was saved is touched.

Most cases run the command within this process, which takes a tenth of a second; a few are processes of their own.
"""

import contextlib
import copy
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest
import yaml
from architectures import ARCHITECTURES, make_model
from chat_tokenizers import smollm
from mlx_lm.tuner.lora import LoRAEmbedding
from tiny import VOCABULARY, tiny_llama

import mlx_lm.lora
from mlx_lm import convert
from mlx_lm.tuner.preference.check import _check_file_to_write
from mlx_lm.tuner.preference.load import check_tokens, check_trainable, tell_other_loss, warn_of_rounding
from mlx_lm.tuner.preference.objective import preference_loss
from mlx_lm.tuner.preference.options import LONGEST_MESSAGE, ConfigError
from mlx_lm.tuner.preference.pairs import Pair
from mlx_lm.tuner.preference.reference import Reference
from mlx_lm.utils import load_model, save_model

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "mlx_lm" / "examples" / "tiny_chat_model"
GOLDEN = ROOT / "tests" / "golden" / "tiny_llama"
LORA = {"rank": 4, "scale": 20.0, "dropout": 0.0}
# What may have been saved before; a run that ends with an error leaves the bytes of each.
SAVED = ("adapters.safetensors", "adapter_config.json", "checkpoint.safetensors", "metrics.jsonl", "training.png")


class Done(NamedTuple):
    status: int
    out: str
    err: str


def rows(count=8):
    return [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": f"Go away, {i}."} for i in range(count)]


def write_rows(folder, **splits):
    """A data folder; a split is rows, or the text of its file."""
    folder.mkdir()
    for split in ("train", "valid", "test"):
        content = splits.get(split, rows())
        if content is not None:
            text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
            (folder / f"{split}.jsonl").write_text(text)
    return str(folder)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("mlx_lm.tuner.preference.outcome.plot_metrics", lambda *_: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "data")


class Command:
    """The command with a configuration, a data folder and a folder for adapters, each changed as a case needs it."""

    def __init__(self, folder, data):
        self.folder = folder
        self.adapters = folder / "adapters"
        self.values = {"model": str(MODEL), "data": data, "train": True, "loss_type": "dpo", "iters": 3}
        self.values |= {"batch_size": 4, "val_batches": 1, "steps_per_report": 1, "steps_per_eval": 100}
        self.values |= {"save_every": 2, "num_layers": 1, "max_seq_length": 64, "learning_rate": 1e-4}
        self.values |= {"adapter_path": str(self.adapters), "reference_cache": "none", "lora_parameters": LORA}

    def write(self, text=None, **changes):
        file = self.folder / "config.yaml"
        values = {key: value for key, value in {**self.values, **changes}.items() if value is not ...}
        file.write_text(yaml.safe_dump(values) if text is None else text)
        return file

    def __call__(self, *flags, text=None, **changes):
        """Run within this process; an exception that the command lets pass fails the test with its traceback."""
        arguments = ["mlx_lm.lora", "--config", str(self.write(text, **changes)), *flags]
        out, err, status = io.StringIO(), io.StringIO(), 0
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            patch.setattr(sys, "argv", arguments)
            try:
                mlx_lm.lora.main()
            except SystemExit as stop:
                status = stop.code
        return Done(status, out.getvalue(), err.getvalue())

    def process(self, *flags, module=("mlx_lm.lora",), **changes):
        """The command as a process of its own, started."""
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            [sys.executable, "-m", *module, "--config", str(self.write(**changes)), *flags],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell's background job ignores interruptions, and so would what it starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def files(self):
        """Contents by name; of files that were moved aside with the folder's name before theirs."""
        return {
            path.relative_to(self.adapters).as_posix(): path.read_bytes()
            for path in self.adapters.rglob("*")
            if path.is_file()
        }

    def stay(self, before):
        """Whether the files of an earlier run are all there, in their place or moved aside."""
        now = self.files()
        return all(content in (now.get(name), now.get(f"earlier-1/{name}")) for name, content in before.items())

    def refused(self, told, *flags, **changes):
        """Run, and check that it ends with one sentence that tells `told`, and with no file touched."""
        if not self.adapters.exists():
            self.adapters.mkdir()
            for name in SAVED:
                (self.adapters / name).write_bytes(b"of an earlier run: " + name.encode())
        before = self.files()
        done = self(*flags, **changes)
        assert done.status == 2, done
        (line,) = [line for line in done.err.splitlines() if not line.startswith("[WARNING]")]
        assert line.startswith("error: ") and re.search(told, line), line
        assert len(line) <= len("error: ") + LONGEST_MESSAGE and line.isprintable()
        assert line.endswith(".") and "Traceback" not in done.out
        assert self.files() == before
        return done


@pytest.fixture
def command(tmp_path, data):
    return Command(tmp_path, data)


@pytest.fixture(scope="module")
def earlier(tmp_path_factory, data):
    """The adapter folder of a run that ended well."""
    command = Command(tmp_path_factory.mktemp("earlier"), data)
    done = command()
    assert done.status == 0 and {*SAVED} - {"training.png"} <= set(command.files()), done
    return command.adapters


@pytest.fixture
def after(command, earlier):
    """The command where an earlier run ended well."""
    shutil.copytree(earlier, command.adapters)
    return command


def row(**changes):
    return [{key: value for key, value in {**rows(1)[0], **changes}.items() if value is not ...}]


def raw(**parts):
    """The line of a row of which parts are texts as they stand in the file."""
    line = json.dumps({**rows(1)[0], **dict.fromkeys(parts, "@")})
    for text in parts.values():
        line = line.replace('"@"', text, 1)
    return line


class TestData:
    @pytest.mark.parametrize(
        "splits, told",
        [
            ({"train": None}, r"train.jsonl is missing, with a JSON object"),
            ({"train": row(rejected=...)}, r"train.jsonl:1: rejected is missing; the row's keys are prompt, chosen"),
            ({"train": raw(margin="1" + "0" * 400)}, r"train.jsonl:1: margin is 1000.*; it must be a finite number"),
            ({"train": raw(margin="7" * 5000)}, r"train.jsonl:1: the line is not JSON .*digits"),
            (
                {"train": row(tools="[" * 100_000)},
                r"train.jsonl:1: tools is a string that is not JSON .nested too deep",
            ),
            ({"train": row(tools="7" * 400)}, r"train.jsonl:1: tools is a number; it must be a list"),
            ({"train": raw(prompt="[" * 100_000)}, r"train.jsonl:1: the line is not JSON .nested too deep"),
            ({"train": raw(chosen="[" * 400 + "]" * 400)}, r"train.jsonl:1: chosen\[0\] is a list; a message is an"),
            (
                {"train": row(chosen=[{"role": "assistant", "tool_calls": 0.5}])},
                r"chosen.0..tool_calls is a number",
            ),
            ({"train": row(chosen="\x1b[2J", rejected={"\x1b": 1})}, r"train.jsonl:1: rejected is an object; it must"),
            ({"valid": row(chosen=...)}, r"valid.jsonl:1: chosen is missing"),
        ],
    )
    def test_files_and_rows(self, command, splits, told):
        command.refused(told, data=write_rows(command.folder / "data", **splits))

    def test_a_missing_test_set_is_told_before_training(self, command):
        data = write_rows(command.folder / "data", test=None)
        command.refused(
            "test.jsonl is missing.* To train without a test set test: false or give --no-test", test=True, data=data
        )

    def test_folders(self, command, data):
        command.refused("data is '.*/nothing', and there is no such folder", data=str(command.folder / "nothing"))
        told = "test.jsonl holds no test set: test.jsonl is missing"
        command.refused(told, data=f"{data}/test.jsonl", test=True)
        command.refused("data is 5; it must be a name", data=5)

    def test_features(self, command):
        command.refused("train.jsonl:1: question .prompt_feature. is missing", prompt_feature="question")
        command.refused("choosen is missing .did you mean chosen.*chosen_feature", chosen_feature="choosen")
        command.refused("rejected_feature is 3; it must be a name", rejected_feature=3)

    def test_a_length_that_leaves_nothing_to_learn_from(self, command):
        command.refused("max_seq_length is 1; it must be a whole number, >= 2", max_seq_length=1)
        same = row(chosen="It is so and so.", rejected="It is so and not so.")
        folder = write_rows(command.folder / "data", train=same)
        command.refused("1 whose responses are equal within max_seq_length", data=folder, max_seq_length=3)

    def test_a_tokenizer_of_another_model(self, command):
        """The tiny Llama knows 97 tokens, the tokenizer saved beside it some hundreds."""
        model = shutil.copytree(GOLDEN, command.folder / "model")
        smollm()._tokenizer.save_pretrained(model)
        told = r"the data's tokens go up to id \d{3}, but the model that model names has 97: the tokenizer is another"
        command.refused(told, model=str(model))

    @pytest.mark.parametrize("place", range(3))
    def test_one_token_beyond_the_vocabulary(self, place):
        known = Pair([1], [2], [3])
        sound = [*known[:place], [1, VOCABULARY - 1, 1], *known[place + 1 : 3]]
        check_tokens(tiny_llama(), [[known], [known, Pair(*sound), known]], "model")
        sound[place][1] += 1
        with pytest.raises(ConfigError, match="go up to id 97, but the model that model names has 97"):
            check_tokens(tiny_llama(), [[known], [known, Pair(*sound), known]], "model")

    def test_pairs_longer_than_the_model_was_made_for_are_a_warning(self, command):
        model = shutil.copytree(MODEL, command.folder / "model")
        values = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 9}
        (model / "config.json").write_text(json.dumps(values))
        done = command(model=str(model), iters=1)
        told = r"^\[WARNING\] Pairs are up to \d\d tokens long, and the model that model names was made for 9; lower"
        assert done.status == 0 and re.search(told, done.err)

    def test_rows_without_a_prompt_key_are_read(self, command):
        """The flag's default names the key that rows may leave out."""
        talk = [{"role": "user", "content": "Hello?"}]
        replies = {"chosen": "Hello, friend.", "rejected": "No."}
        sides = {key: [*talk, {"role": "assistant", "content": text}] for key, text in replies.items()}
        assert command(data=write_rows(command.folder / "data", train=[sides], valid=None)).status == 0

    def test_preferences_without_a_loss_type(self, command):
        done = command.refused(
            "the rows in .* have chosen and rejected, .* but loss_type is sft; set loss_type", loss_type=...
        )
        assert "[WARNING] reference_cache is set, but loss_type is sft" in done.err

    def test_without_a_preference_loss_other_errors_are_upstreams(self, command):
        folder = write_rows(command.folder / "data", train=[{"question": "Who?"}])
        (command.folder / "data" / "valid.jsonl").unlink()
        (command.folder / "data" / "test.jsonl").unlink()
        with pytest.raises(ValueError, match="Unsupported data format") as raised:
            command(loss_type=..., data=folder)
        assert type(raised.value) is ValueError

    @pytest.mark.parametrize("loss_type, key", [("dpo", "weight"), ("aot", "weight"), ("bco_pair", "margin")])
    def test_keys_that_a_loss_cannot_heed(self, command, loss_type, key):
        folder = write_rows(command.folder / "data", train=row(**{key: 0.5}))
        if loss_type == "dpo":
            assert command(data=folder, loss_type=loss_type).status == 0
        else:
            told = f"train.jsonl:1: rows have a {key}, but loss_type {loss_type} .*; remove the key {key}"
            command.refused(told, data=folder, loss_type=loss_type)

    def test_a_loss_that_is_not_finite_is_told_with_the_places_of_its_pairs(self, command):
        weighed = rows()
        weighed[5]["weight"] = 3e38
        useless = row(rejected="It is 0.")  # left out, but it has its line
        folder = write_rows(command.folder / "data", train=useless + weighed)
        told = r"on the pairs .*/data/train.jsonl:\d, \d, \d, \d; the adapters saved before stay as they are"
        done = command(data=folder)
        assert done.status == 2 and not (command.adapters / "adapters.safetensors").exists()
        assert re.search(
            rf"{told}. .*/data/train.jsonl:7 has a weight of 3e\+38: that is the likely cause.\n$", done.err
        )


class TestValues:
    """Each value's check has its cases in test_check.py; here are a few through the whole command."""

    @pytest.mark.parametrize(
        "changes, told",
        [
            ({"loss_type": "dop"}, r"loss_type is 'dop' \(did you mean dpop\?\); it must be a name, one of dpo"),
            ({"beta": -1}, "beta is -1; it must be a finite number, >= 0"),
            ({"simpo_gamma": 1.0}, "simpo_gamma is 1.0, but loss_type dpo does not read it; remove it, or choose"),
            ({"iters": 0}, "iters is 0; it must be a whole number, >= 1 and <= 10000000"),
            ({"iters": int("9" * 400)}, f"iters is {'9' * 30} ... {'9' * 30}; it must be a whole number, >= 1"),
            ({"epochs": 1e300, "iters": ...}, "epochs and the data ask for more than 10000000 steps; lower epochs."),
            ({"lora_parameters": {**LORA, "rank": 2**31}}, "rank is 2147483648; it must be .*, >= 1 and <= 2147483647"),
            ({"lr_schedule": {"name": "cosine_decay", "arguments": [1e-4, 0]}}, "lr_schedule is .* cannot be followed"),
            ({"lora_parameters": {**LORA, "keys": ["self_attn.qproj"]}}, r"qproj \(did you mean self_attn.q_proj\?\)"),
            ({"lora_parameters": {**LORA, "keys": ["self_attn"]}}, "cannot be given LoRA adapters .*: Can't convert"),
            ({"report_to": "foo"}, "report_to is 'foo', which cannot be used: foo .* wandb, swanlab"),
            ({"train": False}, "there is nothing to do: set train, test or both to true"),
        ],
    )
    def test_it_is_told(self, command, changes, told):
        command.refused(told, **changes)

    def test_a_service_that_fails_in_its_own_way(self, command, monkeypatch):
        def refuse(**_):
            raise KeyError("no API key")

        monkeypatch.setitem(mlx_lm.lora.get_reporting_callbacks.__globals__["SUPPORT_CALLBACK"], "wandb", refuse)
        command.refused("report_to is 'wandb', which cannot be used: ", report_to="wandb")

    def test_an_unknown_key_is_a_warning_and_the_run_goes_on(self, command):
        done = command(betta=0.3)
        assert done.status == 0
        assert done.err == "[WARNING] betta is not a key that this command reads (did you mean beta?).\n"

    @pytest.mark.parametrize(
        "text, told",
        [
            ("seed: 2001-99-99", r"config.yaml:3: the value of seed cannot be read .month must be in 1..12"),
            ("seed: 0x_", r"config.yaml:3: the value of seed cannot be read .invalid literal"),
            ("seed: !!int x", r"config.yaml:3: the value of seed cannot be read .invalid literal"),
            ("beta: !!timestamp x", r"config.yaml:3: the value of beta cannot be read"),
            ("beta: " + "9" * 400, r"beta is 9{30} ... 9{30}; it must be a finite number, >= 0"),
            ("seed: " + "9" * 400, r"seed is 9{30} ... 9{30}; it must be a whole number, >= 0"),
            ("beta: " + "9" * 5000, r"config.yaml:3: the value of beta cannot be read"),
            ("seed: 0x" + "f" * 5000, r"config.yaml:3: the value of seed cannot be read"),
            ("data: " + "x" * 300, r"data is 'x{29} ... x{29}', which can be no path .*name too long"),
            ("adapter_path: " + "x" * 300, r"adapter_path is 'x{29} ... x{29}', which can be no path"),
            ('model: "a\\0b"', r"model is 'a.x00b', which can be no path .*embedded null"),
            ("optimizer: " + "x" * 10**6, r"optimizer is 'x{29} ... x{29}'; it must be a name, one of adam"),
            ('optimizer: "\\e[2Jadam"', r"optimizer is '.x1b.2Jadam'"),
        ],
    )
    def test_values_that_nobody_reads(self, command, text, told):
        command.refused(told, text=f"loss_type: dpo\ntrain: true\n{text}\n")

    def test_a_tag_that_yaml_cannot_make(self, command):
        command.refused(
            "config.yaml:1: the value of a cannot be read .could not determine a constructor", text="a: !b c"
        )


class TestModel:
    def test_adapters_with_which_a_model_cannot_run(self, command, monkeypatch):
        keys = {"lora_parameters": {**LORA, "keys": ["model.embed_tokens", "self_attn.q_proj"]}}
        packed = command.folder / "packed"
        with contextlib.redirect_stdout(io.StringIO()):
            convert(str(MODEL), str(packed), quantize=True, q_group_size=32)
        told = "cannot be given DoRA adapters with these lora_parameters: .*broadcast; name layers that can have one"
        command.refused(told, model=str(packed), fine_tune_type="dora", **keys)
        # As models that read an embedding's weight do.
        monkeypatch.setattr(LoRAEmbedding, "as_linear", lambda module, x: x @ module.weight.T)
        command.refused(r"no attribute 'weight' \(model.embed_tokens\); name layers that can have one", **keys)

    def model(self, command, without=(), **config):
        folder = shutil.copytree(MODEL, command.folder / "model")
        for name in without:
            (folder / name).unlink()
        values = json.loads((folder / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))
        return folder

    @pytest.mark.parametrize(
        "changes, told",
        [
            ({"model_type": "llamma"}, "Model type llamma not supported"),
            ({"model_type": ...}, "a model's folder holds .* .'model_type' is missing.[.]$"),
            ({"hidden_size": 32}, r"Expected shape \(.*32\) but received shape"),
            ({"without": ["model.safetensors"]}, "a model's folder holds .* .No safetensors found in "),
            ({"without": ["tokenizer.json", "tokenizer_config.json"]}, "a model's folder holds .*slow tokenizer"),
            ({"without": ["tokenizer.json"]}, "tokenizer"),
        ],
    )
    def test_folders_that_are_none(self, command, changes, told):
        folder = self.model(command, **changes)
        command.refused(f"model is '{re.escape(str(folder))}', which cannot be loaded: .*{told}", model=str(folder))

    def test_a_model_that_loads_and_cannot_be_run(self, command):
        command.refused("which cannot be loaded: .*base: str", model=str(self.model(command, rope_theta="x")))

    @pytest.mark.parametrize(
        "text, told",
        [
            ("{{ 'x' * 10**7 }}", "it writes 10.0 MB"),
            ("{% for m in messages %}{{ m.content * 300000 }}{% endfor %}", r"it writes \d.\d MB"),
            (
                "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
                "takes more than 0.5 s",
            ),
        ],
    )
    def test_a_template_that_writes_megabytes_is_stopped(self, command, text, told, monkeypatch):
        monkeypatch.setattr("mlx_lm.tuner.preference.template.SECONDS", 0.5)
        folder = self.model(command)
        (folder / "chat_template.jinja").write_text(text)
        command.refused(f"train.jsonl:1: the tokenizer's chat template refuses the row .*{told}", model=str(folder))

    @pytest.mark.parametrize("content", [b"garbage" * 100, b""])
    def test_weights_that_are_none(self, command, content):
        folder = self.model(command)
        (folder / "model.safetensors").write_bytes(content)
        command.refused("which cannot be loaded: ", model=str(folder))

    def test_weights_that_were_cut_short(self, command):
        folder = self.model(command)
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[:100000])
        command.refused("which cannot be loaded: .*exceeding the size of the file", model=str(folder))

    def test_names_that_are_no_folder(self, command):
        (command.folder / "empty").mkdir()
        (command.folder / "file").write_text("")
        command.refused("a model's folder holds .*No such file .*config.json", model=str(command.folder / "empty"))
        command.refused("a model's folder holds .*Not a directory", model=str(command.folder / "file"))
        for name in (str(command.folder / "nothing"), "no-such/model"):
            told = f"model is '{name}', which cannot be loaded: there is no such folder, and the hub's repo of this"
            command.refused(told, model=name)


class TestAdapterFile:
    def test_files_that_are_none(self, command):
        command.refused("and there is no such file", resume_adapter_file=str(command.folder / "nothing.safetensors"))
        told = "and there is no such file; give the file, such as a run's adapters.safetensors"
        command.refused(told, resume_adapter_file=str(command.folder))
        for name, content in (("a.safetensors", b"garbage" * 100), ("a.bin", b"garbage"), ("a.safetensors", b"")):
            (command.folder / name).write_bytes(content)
            command.refused(f"{name} cannot be read", resume_adapter_file=str(command.folder / name))
        np.save(command.folder / "a.npy", np.zeros(3))
        command.refused("a.npy cannot be read: it holds no", resume_adapter_file=str(command.folder / "a.npy"))

    @pytest.mark.parametrize(
        "changes, told",
        [
            ({"lora_parameters": {**LORA, "rank": 8}}, r"has .*lora_[ab] of shape .*4.*, where this model has .*8"),
            (
                {"fine_tune_type": "full"},
                "lora_[ab] of shape .* where this model has none; use",
            ),
        ],
    )
    def test_one_of_another_shape(self, after, changes, told):
        elsewhere = after.folder / "elsewhere"
        shutil.copytree(after.adapters, elsewhere)
        after.refused(told, resume_adapter_file=str(elsewhere / "adapters.safetensors"), **changes)

    def test_one_that_the_run_would_move_aside(self, after):
        for name in ("adapters.safetensors", "best/adapters.safetensors"):
            (after.adapters / "best").mkdir(exist_ok=True)
            (after.adapters / "best" / "adapters.safetensors").touch()
            after.refused(
                "moves what is in its adapter_path aside; give another", resume_adapter_file=str(after.adapters / name)
            )

    def test_one_of_more_layers(self, command, earlier):
        weights = mx.load(str(earlier / "adapters.safetensors"))
        more = {re.sub(r"layers\.\d", "layers.0", name): value for name, value in weights.items()}
        assert not more.keys() & weights.keys()
        mx.save_safetensors(str(command.folder / "more.safetensors"), weights | more)
        told = "has model.layers.0.*, where this model has none"
        command.refused(told, resume_adapter_file=str(command.folder / "more.safetensors"))

    def test_layers_without_a_module_for_an_adapter_are_told(self, command):
        """The first layer of this model is recurrent, the last one attends."""
        model, config = command.folder / "model", copy.deepcopy(ARCHITECTURES["qwen3_5"])
        config["text_config"]["vocab_size"] = 960
        save_model(model, make_model("qwen3_5", vocab_size=960))
        (model / "config.json").write_text(json.dumps(config))
        for path in (*MODEL.glob("token*"), *MODEL.glob("*.jinja")):
            shutil.copy(path, model)
        given = {"model": str(model), "lora_parameters": {**LORA, "keys": ["linear_attn.out_proj"]}}
        command.refused("there is nothing to train in the model's layers", num_layers=1, **given)
        assert command(num_layers=2, iters=1, **given).status == 0

    def test_another_scale_is_a_warning(self, command, earlier):
        file = str(earlier / "adapters.safetensors")
        told = f"{file} was trained with a scale of 20.0, and lora_parameters.scale is 10.0"
        done = command(resume_adapter_file=file, lora_parameters={**LORA, "scale": 10.0})
        assert done.status == 0 and told in done.err
        assert command(resume_adapter_file=file).err == ""

    def test_one_in_half_precision_is_a_warning(self, command, earlier):
        weights, file = mx.load(str(earlier / "adapters.safetensors")), str(command.folder / "half.safetensors")
        mx.save_safetensors(file, {name: value.astype(mx.bfloat16) for name, value in weights.items()})
        done = command(resume_adapter_file=file)
        assert done.status == 0
        assert "weights to train are bfloat16" in done.err and "with an adapter convert resume_adapter_file" in done.err


class TestFullTraining:
    def test_quantized_weights_cannot_be_trained(self, command):
        model = command.folder / "model"
        convert(str(MODEL), str(model), quantize=True, q_bits=4, q_group_size=64)
        told = "the weights to train are quantized, which cannot be trained; use fine_tune_type lora"
        command.refused(told, model=str(model), fine_tune_type="full")
        assert command(model=str(model), iters=1).status == 0
        assert command(fine_tune_type="full", iters=1).status == 0

    def test_nothing_to_train_is_told(self):
        model, _ = load_model(GOLDEN)
        model.freeze()
        with pytest.raises(ConfigError, match="there is nothing to train in the model's layers"):
            check_trainable(model)

    @pytest.mark.parametrize("dtype, part", [(mx.bfloat16, 256), (mx.float16, 2048)])
    def test_updates_that_half_precision_rounds_away_are_told(self, dtype, part, capsys):
        model, _ = load_model(GOLDEN)
        warn_of_rounding(model)
        assert capsys.readouterr().err == ""
        model.set_dtype(dtype)
        # One that is small beside its weight does nothing, as of a rate of 1e-6 for a weight of 0.02.
        weight = mx.array(0.02, dtype)
        assert (weight - mx.array(0.9 * weight.item() / 2 / part, dtype)).item() == weight.item()
        warn_of_rounding(model)
        name = str(dtype).rpartition(".")[2]
        told = f"The weights to train are {name}: an update that is smaller than some 1/{part} of"
        assert told in capsys.readouterr().err


class TestAdapterFolder:
    def test_one_that_cannot_be(self, command):
        (command.folder / "file").write_text("")
        command.refused("nothing can be written in .*/file; give", adapter_path=str(command.folder / "file"))
        command.refused("adapter_path is empty; training needs a folder", adapter_path="")
        assert (command.folder / "file").read_text() == ""

    def test_one_that_the_system_refuses(self, command, monkeypatch):
        def refuse(*_, **__):
            raise PermissionError(13, "Permission denied", "/there")

        monkeypatch.setattr(Path, "mkdir", refuse)
        done = command(adapter_path="there")
        assert done.status == 2
        told = "error: the run stopped ([Errno 13] Permission denied: '/there'); files saved before are complete.\n"
        assert done.err == told

    def test_a_test_needs_adapters(self, command):
        nothing = str(command.folder / "nothing")
        told = "whose adapter_config.json cannot be used .No such file or directory.; give a folder with adapters"
        command.refused(told, train=False, test=True, adapter_path=nothing)
        assert not Path(nothing).exists()
        empty = command.folder / "empty"
        empty.mkdir()
        command.refused("adapter_config.json cannot be used", train=False, test=True, adapter_path=str(empty))

    @pytest.mark.parametrize(
        "name, content, told",
        [
            ("adapter_config.json", b"{", "adapter_config.json cannot be used"),
            ("adapter_config.json", b"[]", "does not hold num_layers and lora_parameters"),
            ("adapter_config.json", b"{}", "does not hold num_layers and lora_parameters"),
            ("adapters.safetensors", None, "adapter_path is .*adapters.safetensors., and there is no such file"),
            ("adapters.safetensors", b"garbage" * 100, "adapter_path .*adapters.safetensors cannot be read"),
        ],
    )
    def test_adapters_that_are_damaged(self, after, name, content, told):
        (after.adapters / name).unlink()
        if content is not None:
            (after.adapters / name).write_bytes(content)
        after.refused(told, train=False, test=True)

    def test_adapters_of_another_model(self, after):
        config = json.loads((after.adapters / "adapter_config.json").read_text())
        config["lora_parameters"]["rank"] = 8
        (after.adapters / "adapter_config.json").write_text(json.dumps(config))
        told = "adapter_path .* of shape .*, where this model has .*; the model, or what the adapter_config.json"
        after.refused(told, train=False, test=True)

    def test_the_adapter_that_they_began_with_is_gone(self, after):
        config = json.loads((after.adapters / "adapter_config.json").read_text())
        config["resume_adapter_file"] = "gone.safetensors"
        (after.adapters / "adapter_config.json").write_text(json.dumps(config))
        told = "error: resume_adapter_file of the training is .*gone.*no such file; give the file, such as"
        after.refused(told, train=False, test=True)


def command_with_start(command, given):
    """A test of adapters whose training began with a copy of themselves, with another file given."""
    path = command.adapters / "adapter_config.json"
    start = shutil.copy(command.adapters / "adapters.safetensors", command.folder)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"resume_adapter_file": str(start)}))
    return command(train=False, test=True, resume_adapter_file=given)


class TestTestAlone:
    """What a test without training compares with, where a run began with an adapter or has none."""

    def loss(self, done):
        assert done.status == 0, done
        return float(re.search(r"Test loss ([\d.]+)", done.out)[1])

    def test_without_adapters_policy_and_reference_are_one(self, command):
        done = command(train=False, test=True, adapter_path="")
        assert self.loss(done) == pytest.approx(np.log(2), abs=1e-3) and "margin +0.000" in done.out

    def test_it_gives_the_figures_of_the_test_after_training(self, command, earlier):
        """The reference is the policy that the run began with: base plus its first adapter, here of one layer."""
        begun = {"resume_adapter_file": str(earlier / "adapters.safetensors"), "num_layers": 2, "learning_rate": 1e-2}
        trained = command(test=True, **begun)
        alone = command(train=False, test=True)
        assert self.loss(alone) == self.loss(trained) != pytest.approx(np.log(2), abs=1e-2)
        told, alone = (re.search(r"Test loss.*\n.*", done.out)[0] for done in (trained, alone))
        # What the policy began with is no longer at hand after the training.
        assert re.sub(", KL .* nats a token", "", alone) == told != alone

    def test_it_has_the_losses_parameters_from_the_training_and_trains_nothing(self, command):
        trained = command(test=True, loss_type="robust", beta=0.7, label_smoothing=0.2, learning_rate=1e-2)
        before = command.files()
        asked = {"loss_type": ..., "test": True, "report_to": "tensorboard"}
        alone = command("--no-train", **asked)
        assert self.loss(alone) == self.loss(trained)
        told = "were trained: loss_type robust, beta 0.7, label_smoothing 0.2."
        assert told in alone.out and command.files() == before
        # What is given counts; another loss has parameters of its own.
        done = command("--no-train", beta=0.1, **asked)
        assert "were trained: loss_type robust, label_smoothing 0.2." in done.out
        assert "were trained with beta 0.7, and are tested otherwise." in done.out
        done = command("--no-train", "--loss-type", "ipo", **asked | {"loss_type": "dpo"})
        assert "were trained with loss_type robust, beta 0.7, and are tested otherwise." in done.out
        assert done.status == 0
        command.refused("there is nothing to do", "--no-train")

    def test_a_batch_size_that_its_figures_depend_on_is_told(self, command):
        command(loss_type="kto", batch_size=2)
        told = "were trained with batch_size 2, and are tested otherwise."
        assert told in command("--no-train", batch_size=4, loss_type=..., test=True).out

    def test_a_batch_size_that_changes_no_figure_is_not_told(self, capsys):
        for name, batch_size in (("kto", 2), ("dpo", 4)):
            tell_other_loss("a", {"loss_type": name, "batch_size": 2}, preference_loss(name), batch_size)
        assert capsys.readouterr().out == ""

    def test_any_file_or_none_and_a_line_for_each_pair(self, command):
        lines = [json.dumps(row_ | {"source": f"s{i % 2}"}) + "\n" for i, row_ in enumerate(rows(6))]
        folder = write_rows(command.folder / "data", test="\n" + "".join(lines))
        last = command(test=True, learning_rate=1e-2, save_every=1, data=folder)
        losses = {self.loss(last)}
        for name in ("0000001_adapters.safetensors", "0000002_adapters.safetensors", "adapters.safetensors"):
            path, predictions = command.adapters / name, command.folder / "predictions.jsonl"
            given = {"adapter_path": str(path), "data": folder, "test": True, "predictions": str(predictions)}
            done = command("--no-train", **given)
            losses.add(self.loss(done))
            lines = [json.loads(line) for line in predictions.read_text().splitlines()]
            assert np.mean([line["loss"] for line in lines]) == pytest.approx(self.loss(done), abs=6e-4)
            assert [line["line"] for line in lines] == list(range(2, 8)), "the first line is blank"
            assert re.findall(r"^  (s\d) +(\d) ", done.out, re.M) == [("s0", "3"), ("s1", "3")]
        assert len(losses) == 3, "the last file is the folder's"
        alone = command("--no-train", test=True, adapter_path="none")
        assert self.loss(alone) == pytest.approx(np.log(2), abs=1e-3)

    def test_a_file_to_start_from_is_not_taken_for_the_reference(self, after):
        checkpoint = str(after.adapters / "adapters.safetensors")
        told = "a test trains nothing that could go on from it; to test that file, give it as adapter_path"
        after.refused(told, train=False, test=True, resume_adapter_file=checkpoint)
        moved = command_with_start(after, checkpoint)
        assert f"resume_adapter_file {checkpoint} is not read in a test" in moved.out and moved.status == 0

    def test_the_file_that_they_began_with_may_have_moved(self, command, earlier):
        """The reference is the one of the training, in the place that is given for it."""
        start = shutil.copy(earlier / "adapters.safetensors", command.folder)
        begun = {"resume_adapter_file": str(start), "num_layers": 2, "learning_rate": 1e-2}
        expected = self.loss(command(test=True, **begun))
        moved = command.folder / "moved.safetensors"
        os.rename(start, moved)
        done = command(train=False, test=True, resume_adapter_file=str(moved))
        assert self.loss(done) == expected and f"resume_adapter_file {moved} is taken for it" in done.out

    def test_two_adapters_are_compared(self, after, command):
        trained = str(after.adapters)
        done = command("--compare", trained, trained)
        assert done.status == 0 and done.out.endswith("No difference is shown on these pairs.\n")
        assert command(learning_rate=1e-2, adapter_path=str(command.folder / "b")).status == 0
        done = command("--compare", "none", str(command.folder / "b"))
        # At such a rate three steps make the answers worse than they were.
        assert "They differ: none has the better reward accuracy" in done.out
        # Of the two, the one that was trained says with which loss.
        done = command("--compare", "none", str(command.folder / "b"), loss_type=None)
        assert done.status == 0 and "They differ: none has the better reward accuracy" in done.out
        command.refused("compare takes two adapters", "--compare", trained)
        # Which is told before anything is tested, and not as a loss that is missing.
        typo, told = trained + "typo", "typo', whose adapter_config.json cannot be used"
        assert "reward accuracy" not in command.refused("compare is .*" + told, "--compare", trained, typo).out
        for flags in (("--compare", typo, trained), ("--no-train", "--test", "--adapter-path", typo)):
            command.refused(told, *flags, loss_type=None)
        told = "predictions are of one test, and compare makes two"
        command.refused(told, "--compare", "none", trained, predictions=str(command.folder / "p.jsonl"))

    def test_two_adapters_are_compared_against_one_reference(self, command, earlier):
        """Where one of them began with the other: a margin's difference is then of the policies alone."""
        going_on = {"resume_adapter_file": str(earlier / "adapters.safetensors"), "learning_rate": 1e-2}
        assert command(**going_on).status == 0
        differences = []
        for paths in ((str(earlier), str(command.adapters)), (str(command.adapters), str(earlier))):
            done = command("--compare", *paths)
            assert f"Both are scored against the reference of {paths[0]}: " in done.out
            differences.append(float(re.search(r"^  margin +([+-][\d.]+)  \(", done.out, re.M)[1]))
        assert "margin +0.000, chosen +0.000" in done.out, "the reference of the one that went on is the other"
        assert differences[0] == pytest.approx(-differences[1], abs=2e-3) != pytest.approx(0, abs=1e-2)
        # Adapters of supervised training have no reference of their own, and the model has none.
        supervised = shutil.copytree(earlier, command.folder / "sft")
        config = json.loads((supervised / "adapter_config.json").read_text()) | {"loss_type": None}
        (supervised / "adapter_config.json").write_text(json.dumps(config))
        for other in (str(supervised), "none"):
            done = command("--compare", other, str(command.adapters))
            told = f"the reference of {command.adapters}: {going_on['resume_adapter_file']}."
            assert told in done.out and ("margin +0.000" in done.out) == (other != "none")

    @pytest.mark.parametrize("name", ["wandb", "foo.bar", ".x"])
    def test_a_service_that_there_is_not_stops_the_check(self, command, monkeypatch, name):
        monkeypatch.setattr("mlx_lm.lora.find_spec", lambda name: None)
        told = f"and {re.escape(name)} is not installed, or none of wandb, swanlab, tensorboard"
        command.refused(told, "--check", report_to=name)

    def test_a_file_that_is_no_adapter(self, after):
        path = after.adapters / "checkpoint.safetensors"
        told = f"adapter_path {path} has .*, where this model has none"
        after.refused(told, train=False, test=True, adapter_path=str(path))

    def test_a_file_that_a_test_has_not_written_is_not_overwritten(self, after, tmp_path):
        row = '{"prompt": "a", "chosen": "b", "rejected": "c"}'
        for name, text in {"test.jsonl": row, "n": "notes", "deep": "[" * 100_000}.items():
            (tmp_path / name).write_text(text)
            told = "predictions is .*, a file that a test has not written; give another name"
            after.refused(told, test=True, predictions=str(tmp_path / name))
            assert (tmp_path / name).read_text() == text

    def test_predictions_of_an_earlier_test_may_be_overwritten(self, tmp_path):
        for i, text in enumerate(
            ['{"file": "test.jsonl", "line": 1, "loss": 0.5}\n', '{"row": "0", "loss": null}', ""]
        ):
            (tmp_path / str(i)).write_text(text)
            _check_file_to_write("predictions", str(tmp_path / str(i)))

    def test_a_file_for_predictions_that_cannot_be_written(self, after):
        for path in ("", str(after.folder), str(after.folder / "no folder" / "file")):
            after.refused("predictions is .*, where no file can be written", test=True, predictions=path)


class TestResume:
    def test_epochs_raised_on_resuming_end_where_a_whole_run_ends(self, command):
        """Eight pairs in batches of four; num_layers above the model's means all of them, with a note."""
        epochs = {"iters": ..., "num_layers": 99}
        done = command(**epochs, epochs=1.5)
        assert done.status == 0 and "1.5 epochs of 8 pairs are 3 iterations." in done.out, done
        assert "num_layers is 99, and the model has 3 layers: all of them are trained." in done.out
        assert command(**epochs, epochs=2, resume=True).status == 0
        config = json.loads((command.adapters / "adapter_config.json").read_text())
        assert (config["iters"], config["num_layers"]) == (4, 3)
        resumed = (command.adapters / "adapters.safetensors").read_bytes()
        assert command(**epochs, epochs=2).status == 0
        assert (command.adapters / "adapters.safetensors").read_bytes() == resumed

    def test_without_a_checkpoint(self, command):
        command.adapters.mkdir()
        command.refused("resume needs .*checkpoint.safetensors, and there is none; leave resume out", "--resume")

    @pytest.mark.parametrize(
        "changes, told",
        [
            ({"beta": 0.5}, "as it was begun, but beta was 0.1 and is 0.5"),
            ({"learning_rate": 1e-3}, "as it was begun, but learning_rate was 0.0001 and is 0.001"),
            ({"optimizer": "muon"}, "as it was begun, but optimizer was 'adam' and is 'muon'"),
            ({"lora_parameters": {**LORA, "scale": 1.0}}, "but lora_parameters was .* and is "),
            ({"lora_parameters": {**LORA, "rank": 2}}, "but lora_parameters was .* and is "),
            ({"lr_schedule": {"name": "cosine_decay", "arguments": [1e-4, 9]}}, "but lr_schedule was None and is "),
            ({"num_layers": 2}, "holds other weights than this run trains; use the num_layers that it began with"),
            ({"iters": 1}, "is at iteration 3, and iters is 1; raise iters to go on"),
            ({"max_seq_length": 32}, "max_seq_length was 64 and is 32"),
        ],
    )
    def test_with_other_settings(self, after, changes, told):
        after.refused(told, "--resume", **changes)

    def test_with_another_adapter_to_begin_with(self, after, earlier):
        told = "but the model or adapter it begins with changed"
        after.refused(told, "--resume", resume_adapter_file=str(earlier / "adapters.safetensors"))

    @pytest.mark.parametrize("content", [b"", b"garbage" * 100, "half", "adapters"])
    @pytest.mark.parametrize("whole", [True, False])
    def test_with_a_damaged_checkpoint(self, after, content, whole):
        file = after.adapters / "checkpoint.safetensors"
        if content == "half":
            content = file.read_bytes()[: file.stat().st_size // 2]
        elif content == "adapters":
            content = (after.adapters / "adapters.safetensors").read_bytes()
        file.write_bytes(content)
        earlier_state = after.adapters / "0000002_checkpoint.safetensors"
        if whole:
            done = after("--resume")
            assert done.status == 0 and "Going on after iteration 2 of 3" in done.out.replace("\n", " ")
            assert f"{file} is damaged" in done.out.replace("\n", "")
        else:
            earlier_state.write_bytes(earlier_state.read_bytes()[:-1])
            after.refused("checkpoint.safetensors is damaged or no checkpoint of this project", "--resume")

    def test_goes_on(self, after):
        done = after("--resume", iters=5)
        assert done.status == 0 and "0000004_adapters.safetensors" in after.files()
        lines = [json.loads(line) for line in (after.adapters / "metrics.jsonl").read_text().splitlines()]
        assert [line["iteration"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5]
        # Used as a configuration, the file begins the run anew.
        assert json.loads((after.adapters / "adapter_config.json").read_text())["resume"] is False


class TestReference:
    def test_models_that_are_none(self, command):
        told = "reference_model is .*/nothing', which cannot be loaded: there is no such folder"
        command.refused(told, reference_model=str(command.folder / "nothing"))
        command.refused("reference_model is 'no-such/model', which cannot be loaded", reference_model="no-such/model")
        command.refused("a model's folder holds .* and a tokenizer", reference_model=str(GOLDEN))

    def test_a_model_with_another_vocabulary(self, command):
        model = shutil.copytree(GOLDEN, command.folder / "reference")
        smollm()._tokenizer.save_pretrained(model)
        told = r"where the token .+ is \d+; in the model it is \d+: reference and model must share one vocabulary"
        command.refused(told, reference_model=str(model))

    def test_a_model_with_fewer_tokens(self, command):
        model = shutil.copytree(GOLDEN, command.folder / "reference")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(MODEL / name, model)
        told = "but the model that reference_model names has 97: the tokenizer is another model's"
        command.refused(told, reference_model=str(model))

    def test_the_model_itself_is_one(self, command):
        assert command(reference_model=str(MODEL), iters=1).status == 0

    def test_a_loss_that_reads_none(self, command):
        command.refused("but dpo with beta 0 reads no reference", reference_model=str(MODEL), beta=0.0)

    def test_a_cache_that_cannot_be_written_is_a_warning(self, command):
        (command.folder / "file").write_text("")
        for folder in ("file", "file/below"):
            done = command(reference_cache=str(command.folder / folder), iters=1)
            assert done.status == 0
            assert "[WARNING] The reference logps could not be kept in" in done.out
        assert (command.folder / "file").read_text() == ""


class TestDisk:
    """Errors of the system while a run saves: one sentence, and the files of the earlier run stay."""

    def test_a_full_disk(self, after, monkeypatch):
        def full(*_):
            raise OSError(28, "No space left on device")

        before = after.files()
        monkeypatch.setattr(os, "replace", full)
        done = after()
        assert done.status == 2
        assert done.err == (
            "error: the run stopped ([Errno 28] No space left on device); files saved before are complete.\n"
        )
        assert after.stay(before)

    def test_mlx_cannot_write(self, after, monkeypatch):
        def full(file, *_):
            file.write(b"half")
            raise RuntimeError("[write] Unable to write 300092 bytes to file.")

        before = after.files()
        monkeypatch.setattr(mx, "save_safetensors", full)
        done = after(save_every=1)
        assert done.status == 2
        assert "0000001_adapters.safetensors cannot be written: [write] Unable to write 300092 bytes" in done.err
        assert after.stay(before)
        assert {name for name in after.files() if not name.startswith("earlier-1/")} == {"metrics.jsonl"}


class TestMemory:
    @pytest.mark.parametrize("error", [RuntimeError("[malloc] Unable to allocate 9 bytes."), MemoryError()])
    def test_it_does_not_suffice(self, after, monkeypatch, error):
        def fail(*_):
            raise error

        before = after.files()
        monkeypatch.setattr(Reference, "logps", fail)
        done = after()
        assert done.status == 2 and after.files() == before
        assert re.search("^error: memory does not suffice .*; a smaller batch_size", done.err)

    def test_macos_ends_what_holds_up_the_screen(self, after, monkeypatch):
        told = (
            "[METAL] Command buffer execution failed: Impacting Interactivity "
            "(0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)."
        )

        def fail(*_):
            raise RuntimeError(told)

        before = after.files()
        monkeypatch.setattr(Reference, "logps", fail)
        done = after()
        assert done.status == 2 and after.files() == before
        assert re.search("^error: macOS ended the GPU's work .*; turn the screen off", done.err)

    def test_other_errors_are_not_hidden(self, after, monkeypatch):
        def fail(*_):
            raise RuntimeError("a fault of this project's own")

        monkeypatch.setattr(Reference, "logps", fail)
        with pytest.raises(RuntimeError, match="own"):
            after()


class TestWhatWasSavedStays:
    def test_the_metrics_stay_until_the_reference_pass_is_done(self, after, monkeypatch):
        before = after.files()

        def interrupt(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(Reference, "logps", interrupt)
        done = after()
        assert done.status == 130 and done.err == "interrupted; what was saved before is complete.\n"
        assert after.files() == before

    def test_a_loss_that_becomes_nan(self, after):
        before = after.files()
        done = after(learning_rate=1e30, optimizer="sgd", save_every=3)
        assert done.status == 2
        assert re.search("^error: the loss is nan at iteration 2, on the pairs .*; .* A lower learning_rate", done.err)
        assert after.stay(before)
        assert {name for name in after.files() if not name.startswith("earlier-1/")} == {"metrics.jsonl"}

    def test_weights_that_become_nan_between_two_reports(self, after):
        before = after.files()
        done = after(learning_rate=1e30, optimizer="sgd", save_every=2, steps_per_report=3)
        assert done.status == 2 and "the loss is nan at iteration 2, on the pairs " in done.err
        assert after.stay(before)
        assert {name for name in after.files() if not name.startswith("earlier-1/")} == {"metrics.jsonl"}


class TestProcesses:
    def test_a_mistake(self, command):
        for module in (("mlx_lm.lora",), ("mlx_lm", "lora")):
            process = command.process("--beta", "-1", module=module)
            out, err = process.communicate()
            assert (process.returncode, err) == (2, "error: beta is -1.0; it must be a finite number, >= 0.\n"), out

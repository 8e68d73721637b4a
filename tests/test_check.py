"""The configuration: how file, flags and defaults are put together, what is checked, what is warned of.

And with loss_type unset the command is upstream's, number for number.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
import yaml

import mlx_lm.lora
from mlx_lm.tuner.preference import check as config
from mlx_lm.tuner.preference.batches import iterations
from mlx_lm.tuner.preference.loss_table import LOSS_OPTIONS
from mlx_lm.tuner.preference.options import RUN_OPTIONS, ConfigError

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "mlx_lm" / "examples"
LORA = {"rank": 8, "scale": 20.0, "dropout": 0.0}


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Gives what the command hands to `run` for a configuration file's text and flags."""
    seen = []
    monkeypatch.setattr(mlx_lm.lora, "run", seen.append)

    def read(text, *flags):
        file = tmp_path / "config.yaml"
        file.write_text(text)
        monkeypatch.setattr(sys, "argv", ["mlx_lm.lora", "--config", str(file), *flags])
        mlx_lm.lora.main()
        return seen.pop()

    return read


def checked(**values):
    """A preference run's configuration after its check."""
    args = SimpleNamespace(**(mlx_lm.lora.CONFIG_DEFAULTS | {"loss_type": "dpo", "train": True} | values))
    config.check_config(args)
    return args


class TestFileAndFlags:
    @pytest.mark.parametrize(
        "text, flags, expected", [("", (), False), ("true", (), True), ("", ("--trust-remote-code",), True)]
    )
    def test_flags_without_a_value_leave_the_files(self, read, text, flags, expected):
        args = read(f"loss_type: dpo\ntrain: true\ntrust_remote_code: {text}\n", *flags)
        config.check_config(args)
        assert args.trust_remote_code is expected

    def test_the_file_comes_before_the_defaults(self, read):
        args = read("loss_type: ipo\nbeta: 0.3\nshare_prompt: false\nlearning_rate: 3e-6\n")
        assert (args.loss_type, args.beta, args.share_prompt, args.learning_rate) == ("ipo", 0.3, False, 3e-6)
        assert args.iters == 1000 and args.compile is None and args.reference_cache_size == 256.0

    @pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", ".1e-3", "1E-4"])
    def test_numbers_as_yaml_writes_them(self, read, text):
        assert read(f"learning_rate: {text}\nbeta: {text}").beta == pytest.approx(1e-4)

    def test_flags_come_before_the_file(self, read):
        text = "loss_type: ipo\nbeta: 0.3\nshare_prompt: true\nresume: true\nseed: 3\nclear_cache_threshold: 5\n"
        flags = ["--loss-type", "dpo", "sft", "--loss-weights", "1", "0.5", "--beta", "0", "--no-share-prompt"]
        args = read(text, *flags, "--no-resume", "--seed", "0", "--clear-cache-threshold", "1GB")
        assert (args.loss_type, args.loss_weights) == (["dpo", "sft"], [1.0, 0.5])
        assert (args.beta, args.seed, args.clear_cache_threshold) == (0.0, 0, 10**9)
        assert args.share_prompt is False and args.resume is False

    def test_what_the_file_leaves_empty_is_the_default(self, read):
        args = read("loss_type:\nbeta: null\nlora_parameters: ~\nreference_cache:\n")
        assert (args.loss_type, args.beta, args.reference_cache) == (None, None, None)
        assert args.lora_parameters == LORA

    @pytest.mark.parametrize("given, expected", [("500MB", 5 * 10**8), (2000, 2000), ("1GB", 10**9), (0, 0)])
    def test_the_files_clear_cache_threshold_reaches_training(self, read, given, expected):
        args = read(f"loss_type: dpo\ntrain: true\nclear_cache_threshold: {given}")
        config.check_config(args)
        assert mlx_lm.lora.training_args(args, "file").clear_cache_threshold == expected

    def test_every_option_can_stand_in_the_file(self, read):
        options = LOSS_OPTIONS + RUN_OPTIONS
        args = read(yaml.safe_dump({option.name: f"mark {option.name}" for option in options}))
        assert all(getattr(args, option.name) == f"mark {option.name}" for option in options)


class TestFile:
    def check(self, tmp_path, content):
        file = tmp_path / "config.yaml"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        config.check_file(str(file), mlx_lm.lora.yaml_loader)

    @pytest.mark.parametrize(
        "content, told",
        [
            ("", "holds no keys; it must hold a key with a value on each line"),
            ("# nothing\n", "holds no keys"),
            ("- a\n- b\n", "holds no keys"),
            ("hello", "holds no keys"),
            ("a: [1\nb: 2", "is not YAML: while parsing a flow sequence in .*, line 1, column 4"),
            ("a:\n\t- 1", "is not YAML: while scanning"),
            (b"a: \xff\xfe", "is not YAML: 'utf-8' codec"),
            ("a: 1\n5: 2", "config.yaml:2: 5 is no name of a key"),
            ("a: 1\n\non: 2", "config.yaml:3: on is no name of a key"),
            ("? [a, b]\n: 2", "config.yaml:1: .* is no name of a key"),
            ("[" * 100000, "is not YAML"),
        ],
    )
    def test_what_is_no_configuration_is_told(self, tmp_path, content, told):
        with pytest.raises(ConfigError, match=told) as error:
            self.check(tmp_path, content)
        assert "\n" not in str(error.value)

    def test_what_cannot_be_read_is_told(self, tmp_path):
        for path, told in ((tmp_path, "Is a directory"), (tmp_path / "nothing.yaml", "No such file")):
            with pytest.raises(ConfigError, match=re.escape(f"{path} cannot be read ({told}")):
                config.check_file(str(path), mlx_lm.lora.yaml_loader)

    @pytest.mark.parametrize("flag", ["--config", "--from-trl"])
    def test_a_pipe_is_read_once(self, monkeypatch, capsys, flag):
        """What a shell gives as <(...), and /dev/stdin."""
        begun = []
        reading, writing = os.pipe()
        os.write(writing, b"beta: 0.25\nloss_type: ipo\n")
        os.close(writing)
        monkeypatch.setattr(mlx_lm.lora, "run", begun.append)
        monkeypatch.setattr(sys, "argv", ["mlx_lm.lora", flag, f"/dev/fd/{reading}"])
        with contextlib.suppress(SystemExit):
            mlx_lm.lora.main()
        os.close(reading)
        if flag == "--config":
            assert (begun[0].beta, begun[0].loss_type) == (0.25, "ipo")
        else:
            assert "\nbeta: 0.25  #" in capsys.readouterr().out

    def test_a_key_that_stands_twice_is_told(self, tmp_path, capsys):
        self.check(tmp_path, "beta: 0.1\nseed: 1\nbeta: 0.2\n")
        assert "config.yaml gives beta twice, in lines 1 and 3; the last one counts." in capsys.readouterr().err

    def test_what_is_one_passes_silently(self, tmp_path, capsys):
        self.check(tmp_path, "base: &base\n  a: 1\nb:\n  <<: *base\n  a: 2\n'on': 3\n")
        self.check(tmp_path, '{"json": 1, "too": [2]}')
        assert capsys.readouterr() == ("", "")


class TestEpochs:
    """In place of iters: unless somebody gave iters, 1000 stands there as nobody's wish."""

    def test_the_default_of_iters_is_no_wish(self, read):
        args = read("loss_type: dpo\ntrain: true\nepochs: 1.5\n")
        config.check_config(args)
        assert args.epochs == 1.5 and args.iters == 1000 and type(args.iters) is int

    @pytest.mark.parametrize(
        "text, flags", [("epochs: 2\niters: 1000", ()), ("", ("--epochs", "2", "--iters", "1000"))]
    )
    def test_both_are_refused_even_with_the_default_given(self, read, text, flags):
        args = read(f"loss_type: dpo\ntrain: true\n{text}\n", *flags)
        with pytest.raises(ConfigError, match="epochs is 2 and iters is 1000, which both say how long to train"):
            config.check_config(args)

    def test_a_flag_of_one_wins_over_the_other_in_a_file(self, read):
        args = read("loss_type: dpo\ntrain: true\niters: 30\n", "--epochs", "0.5")
        config.check_config(args)
        assert args.epochs == 0.5
        args = read("loss_type: dpo\ntrain: true\nepochs: 2\n", "--iters", "30")
        config.check_config(args)
        assert args.epochs is None and args.iters == 30
        for broken in ("many", ".inf", "[3]", "0"):
            args = read(f"loss_type: dpo\ntrain: true\niters: {broken}\n", "--epochs", "0.5")
            config.check_config(args)
            assert args.epochs == 0.5 and args.iters == 1000

    def test_flags_of_supervised_training_leave_its_file_alone(self, read, capsys):
        args = read("train: true\n", "--iters", "30")
        config.warn_of_unread_keys(args, mlx_lm.lora.CONFIG_DEFAULTS, supervised=True)
        assert capsys.readouterr().err == "" and (args.iters, args.epochs) == (30, None)
        assert read("train: true\niters: 3\n", "--epochs", "1").iters == 3
        assert mlx_lm.lora.build_parser().parse_args(args=["--iters", "4"]).iters == 4

    @pytest.mark.parametrize(
        "epochs, pairs, batch_size, expected", [(1, 8, 4, 2), (2, 9, 4, 6), (0.1, 120, 4, 3), (0.01, 8, 4, 1)]
    )
    def test_a_part_of_a_round_counts(self, epochs, pairs, batch_size, expected):
        assert iterations(epochs, pairs, batch_size) == expected


class TestUnreadKeys:
    def unread(self, capsys, supervised, **values):
        args = SimpleNamespace(**(mlx_lm.lora.CONFIG_DEFAULTS | values))
        config.warn_of_unread_keys(args, mlx_lm.lora.CONFIG_DEFAULTS, supervised)
        return capsys.readouterr().err.splitlines()

    def test_each_is_named_with_the_nearest_known_key(self, capsys):
        assert self.unread(capsys, False, betta=0.1, learning_rates=1, lora_layers=4, xyzzy=2) == [
            "[WARNING] betta is not a key that this command reads (did you mean beta?).",
            "[WARNING] learning_rates is not a key that this command reads (did you mean learning_rate?).",
            "[WARNING] lora_layers is not a key that this command reads (did you mean num_layers?).",
            "[WARNING] xyzzy is not a key that this command reads.",
        ]

    def test_keys_that_are_read_are_not_named(self, capsys):
        assert self.unread(capsys, False, hf_dataset={}, chat_template_kwargs={}, config="a", report_to="b") == []

    @pytest.mark.parametrize("key", ["text_feature", "completion_feature", "chat_feature"])
    def test_keys_of_supervised_rows_belong_to_supervised_runs(self, key, capsys):
        assert self.unread(capsys, True, **{key: "a"}) == []
        assert len(self.unread(capsys, False, **{key: "a"})) == 1

    def test_preference_keys_without_a_preference_loss_are_told(self, capsys):
        def told(**values):
            return "".join(self.unread(capsys, True, **values))

        assert told() == told(beta=0.1, share_prompt=True, prompt_feature="question") == ""
        assert "[WARNING] beta is set, but loss_type is sft" in told(beta=0.2)
        assert "[WARNING] label_smoothing, resume are set, but" in told(label_smoothing=0.1, resume=True)

    @pytest.mark.parametrize("line, holds", [('{"chosen": 1, "rejected": 2}', True), ("3", False), ("{", False)])
    def test_the_first_line_of_a_file_tells_preferences(self, tmp_path, line, holds):
        (tmp_path / "valid.jsonl").write_text(line)
        assert config.holds_preferences(tmp_path) == holds

    def test_only_the_first_of_several_workers_warns(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(mx.distributed, "init", lambda *_: SimpleNamespace(rank=lambda: 1, size=lambda: 2))
        assert self.unread(capsys, True, betta=0.1, beta=0.2) == []
        file = tmp_path / "twice.yaml"
        file.write_text("beta: 0.1\nbeta: 0.2\n")
        config.check_file(str(file), mlx_lm.lora.yaml_loader)
        checked(optimizer="adafactor")
        assert capsys.readouterr().err == ""


class TestCheck:
    def test_the_defaults_pass(self):
        args = checked()
        assert args.lora_parameters == LORA and args.clear_cache_threshold == 0

    def test_numbers_come_back_in_their_types_and_a_list_of_one_loss_as_that_loss(self):
        args = checked(learning_rate=0, beta=1, loss_type=["ipo"])
        assert type(args.learning_rate) is float and type(args.beta) is float and args.loss_type == "ipo"

    @pytest.mark.parametrize(
        "values, told",
        [
            ({"num_layers": 0}, "num_layers is 0; it must be the number of layers to train"),
            (
                {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": float("inf")},
                "must be a finite number.",
            ),
            ({"test": True, "test_batches": 0}, "test_batches is 0, and a test is asked for"),
            ({"predictions": "p.jsonl"}, "predictions is 'p.jsonl', but no test is asked for; set test to true"),
            ({"clear_cache_threshold": "lots"}, "clear_cache_threshold is 'lots'; it must be bytes, such as"),
            ({"clear_cache_threshold": 1.5}, "clear_cache_threshold is 1.5; it must be bytes"),
            ({"report_to": ["wandb"]}, r"report_to is \['wandb'\]; it must be a name"),
            ({"data": "~no-such-user/x"}, "data is '~no-such-user/x', and there is no such user's folder"),
            ({"loss_type": "simpo", "reference_model": "a"}, "but simpo with beta 2 reads no reference"),
        ],
    )
    def test_what_does_not_fit_is_told(self, values, told):
        with pytest.raises(ConfigError, match=told):
            checked(**values)

    @pytest.mark.parametrize(
        "parameters, told",
        [
            ([8, 20.0], r"lora_parameters is \[8, 20.0\]; it holds rank, scale, dropout"),
            ({"rank": 8, "dropout": 0.0}, "lora_parameters lacks scale; it holds rank, scale, dropout"),
            (LORA | {"scale": None}, "lora_parameters lacks scale"),
            (LORA | {"alpha": 16}, r"lora_parameters has alpha \(mlx-lm's scale is alpha / rank\)"),
            (LORA | {"scale": "10"}, "lora_parameters.scale is '10'; it must be a finite number, > 0, without quotes"),
            (LORA | {"keys": "q_proj"}, "lora_parameters.keys is 'q_proj'; it must be a list of names such as"),
            (LORA | {"keys": []}, r"lora_parameters.keys is \[\]; it must be a list of names"),
            (LORA | {"keys": [1]}, r"lora_parameters.keys is \[1\]; it must be a list of names"),
        ],
    )
    def test_lora_parameters(self, parameters, told):
        with pytest.raises(ConfigError, match=told):
            checked(lora_parameters=parameters)
        # Full training reads none of them.
        assert checked(lora_parameters=parameters, fine_tune_type="full").lora_parameters == parameters

    def test_keys_may_be_left_empty(self):
        checked(lora_parameters=LORA | {"keys": None})
        checked(lora_parameters=LORA | {"keys": ["self_attn.q_proj"]})

    @pytest.mark.parametrize(
        "schedule, told",
        [
            ("cosine_decay", "lr_schedule is 'cosine_decay'; give name, arguments and"),
            ({"name": "cosine_decay"}, "give name, arguments and"),
            ({"name": "cosine", "arguments": [1]}, "attribute 'cosine'.; there are .*cosine_decay of init"),
            ({"name": "join_schedules", "arguments": [1]}, "which cannot be followed"),
            ({"name": "cosine_decay", "arguments": [], "warmup": 1}, "which cannot be followed"),
            ({"name": "cosine_decay", "arguments": ["1e-4", 10]}, "which cannot be followed"),
            ({"name": "cosine_decay", "arguments": [1e-4, 10], "warmup": "x"}, "which cannot be followed"),
            (
                {"name": "cosine_decay", "arguments": [1e-4, 10], "warmup_int": 1},
                "warmup_int .did you mean warmup_init",
            ),
            ({"name": "cosine_decay", "arguments": [-1e-4, 10]}, "a learning rate of -0.0001 at update 0"),
            ({"name": "linear_schedule", "arguments": [1e-4, -1e-4, 10]}, "a learning rate of -0.0001 at update 62"),
            ({"name": "exponential_decay", "arguments": [1e-4, 10.0]}, "a learning rate of inf at update 62"),
            ({"name": "step_decay", "arguments": [1e-4, -0.5, 250]}, "a learning rate of -5e-05 at update 250"),
        ],
    )
    def test_lr_schedule(self, schedule, told):
        with pytest.raises(ConfigError, match=told):
            checked(lr_schedule=schedule)

    def test_schedules_that_can_be_followed(self):
        for name, arguments in (("cosine_decay", [1e-4, 10, 1e-6]), ("linear_schedule", [0, 1e-4, 100])):
            checked(lr_schedule={"name": name, "arguments": arguments, "warmup": 5, "warmup_init": 1e-7})
        # Ten updates end before the rate leaves the range of float32, a thousand do not.
        growing = {"name": "exponential_decay", "arguments": [1e-4, 10.0]}
        checked(lr_schedule=growing, iters=20, grad_accumulation_steps=2)
        # Its end is -3.6e-12 in float32.
        checked(lr_schedule={"name": "linear_schedule", "arguments": [5e-5, 0.0, 3]}, iters=3)

    @pytest.mark.parametrize(
        "values, told",
        [
            ({"optimizer_config": ["adam"]}, r"optimizer_config is \['adam'\]; it holds the settings of an optimizer"),
            ({"optimizer_config": {"betas": [0.9, 0.9]}}, "optimizer_config has betas; it holds the settings of an"),
            ({"optimizer_config": {"adam": "x"}}, "adam is 'x', which cannot be used"),
            ({"optimizer_config": {"adam": {"beta": 1}}}, "unexpected keyword argument 'beta'.; it takes betas, bias_"),
            (
                {"optimizer_config": {"adam": {"learning_rate": 1}}},
                "multiple values .*'learning_rate'.; it takes betas",
            ),
            ({"optimizer_config": {"adam": {"betas": 0.9}}}, "adam is {'betas': 0.9}, which cannot be used"),
            ({"optimizer_config": {"adam": {"eps": "1e-8"}}}, "adam is {'eps': '1e-8'}, which cannot be used"),
            (
                {"optimizer": "sgd", "optimizer_config": {"sgd": {"momentum": float("nan")}}},
                "sgd is {'momentum': nan}, which cannot be used .its first update is not finite",
            ),
            ({"optimizer_config": {"adam": {"eps": 0}}}, "adam is {'eps': 0}, which .*first update is not finite"),
        ],
    )
    def test_optimizer(self, values, told):
        with pytest.raises(ConfigError, match=told):
            checked(**values)

    @pytest.mark.parametrize("name", ["adam", "adamw", "muon", "sgd", "adafactor"])
    def test_every_optimizer_passes_with_nothing_and_with_an_empty_entry(self, name):
        assert checked(optimizer=name).optimizer_config[name] == {}
        assert checked(optimizer=name, optimizer_config={name: None}).optimizer_config == {name: {}}
        assert checked(optimizer=name, optimizer_config={}).optimizer_config == {}

    def test_a_rate_that_adafactor_does_not_read_is_told(self, capsys):
        checked(optimizer="adafactor")
        assert "does not read learning_rate; to train at a rate, give optimizer_config" in capsys.readouterr().err
        schedule = {"name": "cosine_decay", "arguments": [1e-3, 10]}
        checked(optimizer="adafactor", lr_schedule=schedule, lora_plus_ratio=2.0, optimizer_config={"adafactor": None})
        assert "does not read learning_rate or lr_schedule or lora_plus_ratio;" in capsys.readouterr().err
        checked(optimizer="adafactor", optimizer_config={"adafactor": {"relative_step": False}})
        checked(optimizer="adafactor", train=False, test=True)
        checked(optimizer="adam", optimizer_config={"adafactor": {"relative_step": True}})
        assert capsys.readouterr().err == ""

    def test_other_optimizers_entries_are_not_read(self):
        checked(optimizer="sgd", optimizer_config={"adamw": {"weight_decay": 0.01}, "sgd": {"momentum": 0.9}})

    def test_folders_to_be_written_to(self, tmp_path, monkeypatch):
        checked(adapter_path=str(tmp_path / "a" / "b" / "c"))
        assert not list(tmp_path.iterdir()), "a check makes nothing"
        (tmp_path / "file").write_text("")
        for path in ("file", "file/below"):
            with pytest.raises(
                ConfigError, match=f"but nothing can be written in {re.escape(str(tmp_path))}/file; give"
            ):
                checked(adapter_path=str(tmp_path / path))
        monkeypatch.setattr(config.os, "access", lambda path, mode: path != tmp_path)
        with pytest.raises(ConfigError, match=f"but nothing can be written in {re.escape(str(tmp_path))}; give"):
            checked(adapter_path=str(tmp_path / "a" / "b"))
        # A test alone writes nothing.
        checked(adapter_path=str(tmp_path / "a"), train=False, test=True)

    def test_a_home_folder_is_found(self, monkeypatch):
        monkeypatch.setenv("HOME", "/somewhere")
        keys = {"model": "~/m", "data": "~/d", "adapter_path": "~/a", "reference_model": "~/r"}
        args = checked(**keys, reference_cache="~")
        assert [getattr(args, key) for key in keys] == [f"/somewhere/{name}" for name in "mdar"]
        assert args.reference_cache == "/somewhere" and checked(reference_cache="none").reference_cache == "none"

    def test_empty_names_stand_for_none(self):
        args = checked(reference_model="", resume_adapter_file="")
        assert args.reference_model is None and args.resume_adapter_file is None


# Runs upstream's command and writes down, in full, what it reports. MLX is imported first: a fast BLAS that the
# overlay would load rounds otherwise.
WATCH = """
import json, sys
import mlx.core
import mlx_lm, mlx_lm.lora, mlx_lm.tuner.trainer as trainer

seen = {"package": mlx_lm.__file__, "train": [], "val": [], "test": []}
report_train, report_val = trainer.TrainUI.report_train, trainer.TrainUI.report_val

def watch_train(self, it, loss, rate, tokens):
    seen["train"].append((it, loss, tokens))

def watch_val(self, it, loss, seconds):
    seen["val"].append((it, loss))

def watch_test(*args, evaluate=mlx_lm.lora.evaluate, **kwargs):
    seen["test"].append(evaluate(*args, **kwargs))
    return seen["test"][-1]

trainer.TrainUI.report_train, trainer.TrainUI.report_val = watch_train, watch_val
mlx_lm.lora.evaluate = watch_test
out = sys.argv.pop()
mlx_lm.lora.main()
json.dump(seen, open(out, "w"))
"""


@pytest.fixture(scope="module")
def supervised_runs(tmp_path_factory):
    """The same supervised run without and with the overlay: what each reported, and its folder."""
    folder = tmp_path_factory.mktemp("supervised")
    (folder / "data").mkdir()
    for split, count in (("train", 24), ("valid", 8), ("test", 8)):
        rows = [{"prompt": f"What is {i} + 1?", "completion": f"It is {i + 1}. " * (i % 3 + 1)} for i in range(count)]
        (folder / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"model": str(EXAMPLES / "tiny_chat_model"), "data": str(folder / "data"), "train": True, "test": True}
    values |= {"iters": 6, "batch_size": 4, "num_layers": 2, "steps_per_report": 1, "steps_per_eval": 3}
    values |= {"grad_accumulation_steps": 2, "mask_prompt": True, "save_every": 2, "learning_rate": 1e-3, "seed": 11}
    values |= {"lora_parameters": LORA | {"dropout": 0.1}, "max_seq_length": 128, "optimizer": "adamw"}
    runs = []
    for overlay in (False, True):
        place = folder / ("overlay" if overlay else "upstream")
        place.mkdir()
        (place / "config.yaml").write_text(yaml.safe_dump(values | {"adapter_path": str(place / "adapters")}))
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "MLX_LM_DPO": str(int(overlay))}
        environment["PYTHONPATH"] = str(ROOT) * overlay
        done = subprocess.run(
            [sys.executable, "-c", WATCH, "--config", "config.yaml", "seen.json"],
            cwd=place,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        runs.append((json.loads((place / "seen.json").read_text()), place / "adapters", done))
    return runs


class TestSupervisedTrainingIsUpstreams:
    def test_one_run_was_without_the_overlay_and_one_with_it(self, supervised_runs):
        plain, ours = (Path(seen["package"]) for seen, *_ in supervised_runs)
        assert ours == ROOT / "mlx_lm" / "__init__.py" and plain != ours

    def test_every_loss_is_the_same(self, supervised_runs):
        (plain, *_), (ours, *_) = supervised_runs
        assert [iteration for iteration, *_ in plain["train"]] == [1, 2, 3, 4, 5, 6] and len(plain["test"]) == 1
        assert {key: plain[key] for key in ("train", "val", "test")} == {
            key: ours[key] for key in ("train", "val", "test")
        }
        losses = [loss for _, loss, _ in plain["train"]]
        assert len(set(losses)) == 6, "losses that do not move would show nothing"

    def test_the_same_files_with_the_same_weights(self, supervised_runs):
        plain, ours = ({path.name: path.read_bytes() for path in folder.iterdir()} for _, folder, _ in supervised_runs)
        assert set(plain) == set(ours) and "0000002_adapters.safetensors" in plain
        assert {name for name in plain if plain[name] != ours[name]} == {"adapter_config.json"}
        plain, ours = (json.loads(files["adapter_config.json"]) for files in (plain, ours))
        added = {option.name for option in LOSS_OPTIONS + RUN_OPTIONS}
        assert set(ours) - set(plain) == added and set(plain) <= set(ours)
        assert {key for key in plain if plain[key] != ours[key]} == {"adapter_path"}

    def test_the_same_words_on_the_screen(self, supervised_runs):
        def words(done):
            text = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
            return [line for line in text.splitlines() if not re.match("train|val|ref", line)]

        (*_, plain), (*_, ours) = supervised_runs
        assert words(plain) == words(ours) and any("Test loss" in line for line in words(plain))
        assert "WARNING" not in ours.stderr and "Traceback" not in ours.stderr

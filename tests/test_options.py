"""Options: each declared once, so that flag, default, check and field of the training arguments cannot differ."""

import dataclasses
import re
from types import SimpleNamespace

import pytest

import mlx_lm.lora
from mlx_lm.tuner.preference.loss_table import LOSS_OPTIONS, TABLE
from mlx_lm.tuner.preference.options import (
    GROUPS,
    RUN_OPTIONS,
    UPSTREAM_GROUP,
    UPSTREAM_OPTIONS,
    ConfigError,
    Option,
    is_preference,
    nearest,
)
from mlx_lm.tuner.trainer import TrainingArgs

OPTIONS = LOSS_OPTIONS + RUN_OPTIONS
NAMES = [option.name for option in OPTIONS]


def parse(*flags):
    return vars(mlx_lm.lora.build_parser().parse_args(flags))


def flag_and_values(option):
    """A command line that gives the option, and the value that it stands for."""
    if option.kind is bool:
        return [option.flag], True
    text, value = {float: ("0.25", 0.25), int: ("3", 3), str: (option.choices[0] if option.choices else "x",) * 2}[
        option.kind
    ]
    return ([option.flag, text, text], [value, value]) if option.many else ([option.flag, text], value)


class TestDeclaredOnce:
    def test_no_name_is_used_twice_and_none_is_upstreams(self):
        assert len(set(NAMES)) == len(NAMES) > 20
        assert not set(NAMES) & {option.name for option in UPSTREAM_OPTIONS}

    @pytest.mark.parametrize("option", OPTIONS, ids=NAMES)
    def test_flag_default_and_field(self, option):
        assert parse()[option.name] is None, "a flag that is not given must leave the file's value"
        flags, value = flag_and_values(option)
        assert parse(*flags)[option.name] == value
        assert option.check(value) == value
        assert option.name in mlx_lm.lora.CONFIG_DEFAULTS
        default = mlx_lm.lora.CONFIG_DEFAULTS[option.name]
        fields = {field.name: field for field in dataclasses.fields(TrainingArgs)}
        assert fields[option.name].default == default
        assert fields[option.name].metadata["help"] == option.help
        assert option.check(default) == default
        # A loss's own default depends on the loss, so that here it is not given yet.
        assert default in (None, option.default)

    @pytest.mark.parametrize("option", [option for option in OPTIONS if option.kind is bool], ids=lambda o: o.name)
    def test_what_can_be_switched_on_can_be_switched_off(self, option):
        assert parse("--no-" + option.name.replace("_", "-"))[option.name] is False

    def test_every_option_reaches_the_training_arguments(self):
        given = dict(mlx_lm.lora.CONFIG_DEFAULTS)
        marks = {name: object() for name in NAMES}
        arguments = mlx_lm.lora.training_args(SimpleNamespace(**(given | marks)), "file")
        assert all(getattr(arguments, name) is marks[name] for name in NAMES)

    def test_upstreams_keys_that_the_loop_reads_reach_the_training_arguments(self):
        given = dict(mlx_lm.lora.CONFIG_DEFAULTS)
        names = [field.name for field in dataclasses.fields(TrainingArgs) if field.name in given]
        assert {"batch_size", "iters", "max_seq_length", "grad_accumulation_steps", "clear_cache_threshold"} < set(
            names
        )
        marks = {name: object() for name in names} | {"save_every": object()}
        arguments = mlx_lm.lora.training_args(SimpleNamespace(**(given | marks)), "file")
        assert [name for name in names if getattr(arguments, name) is not marks[name]] == []
        assert arguments.steps_per_save is marks["save_every"] and arguments.adapter_file == "file"

    def test_upstreams_defaults_pass_their_checks(self):
        for option in UPSTREAM_OPTIONS:
            default = mlx_lm.lora.CONFIG_DEFAULTS[option.name]
            assert option.check(default) == default


class TestCommandLine:
    def test_a_list_of_losses_with_weights(self):
        found = parse("--loss-type", "dpo", "sft", "--loss-weights", "1", "0.5")
        assert found["loss_type"] == ["dpo", "sft"] and found["loss_weights"] == [1.0, 0.5]

    @pytest.mark.parametrize("flags", [("--beta", "x"), ("--batch-size", "1.5"), ("--bata", "1"), ("--beta",)])
    def test_what_cannot_be_read_ends_with_status_2(self, flags, capsys):
        with pytest.raises(SystemExit) as stop:
            parse(*flags)
        assert stop.value.code == 2 and flags[0] in capsys.readouterr().err

    @pytest.mark.parametrize(
        "text, value",
        [("2000", 2000), ("500MB", 5 * 10**8), ("1.5GB", 15 * 10**8), ("2g", 2 * 10**9), ("3 M", 3 * 10**6)],
    )
    def test_sizes(self, text, value):
        assert parse("--clear-cache-threshold", text)["clear_cache_threshold"] == value

    @pytest.mark.parametrize("text", ["x", "1TB", "", "-1", "1.2.3GB"])
    def test_no_sizes(self, text, capsys):
        with pytest.raises(SystemExit) as stop:
            parse(f"--clear-cache-threshold={text}")
        assert stop.value.code == 2 and "--clear-cache-threshold: invalid size value" in capsys.readouterr().err

    def test_help_tells_every_option_with_its_range_and_default(self):
        told = " ".join(mlx_lm.lora.build_parser().format_help().split())
        for option in OPTIONS:
            assert option.flag in told and " ".join(option.help[1:].split()) in told, option.name
        assert "(>= 0 and < 0.5); 0.0 by default." in told
        assert "where the model allows it; true by default." in told

    def test_help_is_in_the_manuals_groups_with_a_line_for_each_loss(self):
        told = mlx_lm.lora.build_parser().format_help()
        titles = [UPSTREAM_GROUP, *GROUPS.values()]
        places = [told.index(f"\n{title}:\n") for title in titles]
        assert places == sorted(places)
        assert places[0] < told.index("\n  --num-layers") < places[1]
        assert places[6] < told.index("\n  --keep-checkpoints") < places[7]
        lines = told.partition("  --loss-type ")[0].splitlines()
        for loss in TABLE:
            (line,) = [line for line in lines if line.split()[:1] in ([loss.name], [loss.name + ","])]
            assert loss.description in line and loss.source in line and len(line) <= 100


NUMBER = Option("rate", 0.1, float, "", low=0, below=0.5)
COUNT = Option("steps", 1, int, "", low=1)
FLAG = Option("share", True, bool, "")
NAME = Option("kind", "a", str, "", choices=("adam", "adamw"))
MANY = Option("weights", None, float, "", low=0, many=True)


class TestCheck:
    @pytest.mark.parametrize(
        "option, value, expected",
        [
            (NUMBER, 0, 0.0),
            (NUMBER, 0.49, 0.49),
            (NUMBER, None, None),
            (COUNT, 1, 1),
            (FLAG, False, False),
            (NAME, "adamw", "adamw"),
            (MANY, 2, 2.0),
            (MANY, [1, 0.5], [1.0, 0.5]),
            (MANY, (1,), [1.0]),
        ],
    )
    def test_what_fits_comes_back_in_its_type(self, option, value, expected):
        found = option.check(value)
        assert found == expected and type(found) is type(expected)

    @pytest.mark.parametrize(
        "option, value, told",
        [
            (NUMBER, 0.5, "rate is 0.5; it must be a finite number, >= 0 and < 0.5."),
            (NUMBER, -1, "rate is -1; it must be a finite number, >= 0 and < 0.5."),
            (NUMBER, float("nan"), "rate is nan; it must be a finite number"),
            (NUMBER, True, "rate is True; it must be a finite number"),
            (NUMBER, "1e-4", "rate is '1e-4'; it must be a finite number, >= 0 and < 0.5, without quotes."),
            (NUMBER, [0.1], "rate is [0.1]; it must be a finite number"),
            (NUMBER, {"a": 1}, "rate is {'a': 1}; it must be a finite number"),
            (COUNT, 0, "steps is 0; it must be a whole number, >= 1."),
            (COUNT, 2.0, "steps is 2.0; it must be a whole number"),
            (COUNT, "2", "steps is '2'; it must be a whole number, >= 1, without quotes."),
            (COUNT, False, "steps is False; it must be a whole number"),
            (FLAG, "no", "share is 'no'; it must be true or false, without quotes."),
            (FLAG, 1, "share is 1; it must be true or false."),
            (NAME, "admaw", "kind is 'admaw' (did you mean adamw?); it must be a name, one of adam, adamw."),
            (NAME, "ADAM", "kind is 'ADAM' (did you mean adam?)"),
            (NAME, "lion", "kind is 'lion'; it must be a name, one of adam, adamw."),
            (NAME, 3, "kind is 3; it must be a name, one of adam, adamw."),
            (NAME, ["adam"], "kind is ['adam'] (did you mean adam?); it must be a name"),
            (MANY, [], "weights is an empty list; give at least one value."),
            (MANY, [1, "2"], "weights is '2'; it must be a finite number"),
            (MANY, [[1]], "weights is [1]; it must be a finite number"),
        ],
    )
    def test_what_does_not_fit_is_told(self, option, value, told):
        with pytest.raises(ConfigError, match=re.escape(told)):
            option.check(value)

    def test_whole_bounds_are_told_in_full(self):
        assert Option("seed", 0, int, "", low=0, high=2**32 - 1).range == ">= 0 and <= 4294967295"


def test_nearest():
    assert nearest("betta", ["beta", "batch_size"]) == " (did you mean beta?)"
    assert nearest("Loss_Type", ["loss_type"]) == " (did you mean loss_type?)"
    assert nearest("xyz", ["beta"]) == nearest(5, ["beta"]) == ""


@pytest.mark.parametrize(
    "loss_type, expected",
    [
        (None, False),
        ("sft", False),
        (["sft"], False),
        ("dpo", True),
        (["dpo", "sft"], True),
        (["sft", "dpo"], True),
        # Mistakes: the check of a preference run tells them, upstream's training would not.
        ("DPO", True),
        ("", True),
        ([], True),
        (False, True),
        (7, True),
    ],
)
def test_is_preference(loss_type, expected):
    assert is_preference(loss_type) is expected

"""Files that anyone may hand us: whatever is in them, the answer is a value or one sentence, never a traceback.

HYPOTHESIS_EXAMPLES sets how many are drawn of each kind.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
import yaml
from chat_tokenizers import smollm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mlx_lm.lora
from mlx_lm.tuner.datasets import load_dataset
from mlx_lm.tuner.preference.check import check_config, check_file, warn_of_unread_keys
from mlx_lm.tuner.preference.checkpoint import find_state, read_state
from mlx_lm.tuner.preference.curves import plot_metrics
from mlx_lm.tuner.preference.load import (
    _warn_of_scale,
    adopt_loss,
    compared_origin,
    read_adapter_config,
    start_of,
    tell_other_loss,
)
from mlx_lm.tuner.preference.metrics import read_metrics
from mlx_lm.tuner.preference.objective import preference_loss
from mlx_lm.tuner.preference.options import LONGEST_MESSAGE, ConfigError
from mlx_lm.tuner.preference.pairs import PreferenceDataset

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import fuzz

fuzz.rows.tokenizer = smollm()

EXAMPLES = int(os.environ.get("HYPOTHESIS_EXAMPLES", 60))
drawn = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="HYPOTHESIS_EXAMPLES" not in os.environ,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

NAMES = sorted(set(mlx_lm.lora.CONFIG_DEFAULTS) - {"config"})
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(0, 9).map(lambda digit: int(f"{digit + 1}" + "0" * 400)),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["dpo", "sft", "ipo", "x" * 300, "~nobody", "a\0b", "\x1b[2J", "adam", "1GB", "auto", "lora"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["rank", "scale", "dropout", "keys", "name", "arguments", "adam"]), inner),
    ),
    max_leaves=6,
)
# Texts in which YAML sees a value that then is none.
TEXTS = st.sampled_from(
    [
        "2001-99-99",
        "0x_",
        "!!int x",
        "!!timestamp x",
        "9" * 400,
        "9" * 5000,
        "!!python/object:os.system x",
        "!!float ''",
    ]
    + ["*a", "&a [*a]", "{" * 50, "[" * 600, "0o9", "1:99", "!!binary x", "!!set {a: b}", "'", "<<", "? a", "\t", "@"]
)


def is_one_sentence(error):
    told = str(error)
    return told and len(told) <= LONGEST_MESSAGE and told.isprintable()


def taken(call, *arguments):
    """What a call gives, or None where it refuses with one sentence."""
    try:
        return call(*arguments)
    except ConfigError as error:
        assert is_one_sentence(error), error
        return None


@drawn
@given(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4), st.booleans())
def test_configurations_of_any_values(values, train):
    given = {"loss_type": "dpo", "train": train, "test": not train, "adapter_path": "adapters"} | values
    taken(check_config, SimpleNamespace(**(mlx_lm.lora.CONFIG_DEFAULTS | given)))


@drawn
@given(st.sampled_from(NAMES), st.one_of(TEXTS, st.text(max_size=60)))
def test_configuration_files_of_any_text(tmp_path, key, text):
    file = tmp_path / "config.yaml"
    file.write_text(f"loss_type: dpo\ntrain: true\n{key}: {text}\n", encoding="utf-8", errors="replace")
    taken(check_file, file, mlx_lm.lora.yaml_loader)
    try:
        check_file(file, mlx_lm.lora.yaml_loader)
    except ConfigError:
        return
    # What passes, upstream's own reading takes.
    assert isinstance(yaml.load(file.read_text(), mlx_lm.lora.yaml_loader), dict)


def test_the_line_of_a_value_that_is_none_is_told(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("loss_type: dpo\nseed: 2001-99-99\n")
    with pytest.raises(
        ConfigError, match=r"config.yaml:2: the value of seed cannot be read \(month must be in 1..12\)"
    ):
        check_file(file, mlx_lm.lora.yaml_loader)


def test_aliases_of_aliases_are_not_written_out(tmp_path, monkeypatch):
    """Nine values, nine times over for each of nine lines: 0.4 thousand million."""
    lists = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 9)}]" for i in range(9)]
    (tmp_path / "config.yaml").write_text("\n".join(lists))
    monkeypatch.setattr("mlx_lm.tuner.preference.check.SECONDS", 0.3)
    with pytest.raises(ConfigError, match=r"the value of a\d cannot be read \(it takes more than 0.3 s\)"):
        check_file(tmp_path / "config.yaml", mlx_lm.lora.yaml_loader)


@drawn
@given(st.one_of(st.binary(max_size=200), VALUES.map(lambda value: json.dumps(value).encode())))
def test_adapter_configurations_of_any_content(tmp_path, content):
    (tmp_path / "adapter_config.json").write_bytes(content)
    taken(read_adapter_config, tmp_path)


@pytest.mark.parametrize(
    "content, told",
    [
        ("[" * 100_000, "cannot be read"),
        (
            '{"num_layers": 1, "lora_parameters": {"rank": 8, "scale": null, "dropout": 0}}',
            "lora_parameters lacks scale",
        ),
        ('{"num_layers": 1, "lora_parameters": {"rank": "8", "scale": 1, "dropout": 0}}', "rank is '8'"),
    ],
)
def test_an_adapter_configuration_that_cannot_be_used_is_told(tmp_path, content, told):
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ConfigError, match=told) as refused:
        read_adapter_config(tmp_path)
    assert is_one_sentence(refused.value)


@drawn
@given(st.randoms(use_true_random=False))
def test_rows_of_any_content(tmp_path, random):
    _, read, name = fuzz.rows(random, tmp_path)
    assert fuzz.outcome(read, name) in ("read", "refused")


def test_numbers_of_many_digits(tmp_path):
    args = SimpleNamespace(loss_type="dpo", train=True, test=False, data=str(tmp_path / "rows.jsonl"))
    for digits in (400, 5000):
        line = '{"context": "Who?", "response1": "I.", "response2": "You.", "overall_preference": ' + "7" * digits + "}"
        (tmp_path / "rows.jsonl").write_text(line)
        found = taken(load_dataset, args, smollm())
        assert len(found[0]) == 1 if digits == 400 else found is None


LINES = st.one_of(
    st.dictionaries(st.sampled_from(["iteration", "loss", "eval_loss", "rewards/chosen"]), VALUES, max_size=4).map(
        json.dumps
    ),
    st.text(max_size=40),
    st.sampled_from(["[" * 5000, '{"iteration": ' + "9" * 5000 + "}", '{"iteration": 1, "loss": NaN}']),
)


@drawn
@given(st.lists(LINES, max_size=5))
def test_metrics_of_any_lines(tmp_path, lines):
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8", errors="replace")
    for line in read_metrics(tmp_path / "metrics.jsonl"):
        assert isinstance(line["iteration"], int)


def test_metrics_with_values_that_are_no_numbers_are_drawn(tmp_path):
    lines = [{"iteration": 1, "loss": "x"}, {"iteration": 2, "loss": 0.5}, {"iteration": 3, "loss": [1]}]
    lines += [{"iteration": 4, "loss": 1e308}, {"iteration": 5, "loss": 10**400}, {"iteration": 10**400, "loss": 1}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 5
    assert plot_metrics(tmp_path) is None or (tmp_path / "training.png").is_file()


@drawn
@given(st.data())
def test_states_of_any_content(tmp_path, data):
    path = tmp_path / "checkpoint.safetensors"
    metadata = data.draw(
        st.dictionaries(st.sampled_from(["iteration", "settings", "progress", "digest"]), st.text(max_size=20))
    )
    mx.save_safetensors(str(path), {"random": mx.zeros(2, mx.uint32)}, metadata)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
    with pytest.raises(ValueError):
        read_state(path)
    with pytest.raises(ConfigError, match="leave resume out") as refused:
        find_state(tmp_path, None, {}, 10)
    assert is_one_sentence(refused.value)


def test_what_is_told_of_rows_adapters_and_configurations_holds_no_control_characters(tmp_path, capsys):
    clear = "\x1b[2J"
    row = {"prompt": "a", "chosen": [{"role": "assistant", "content": "b", clear: 1}], "rejected": "c", clear + "d": 1}
    told = PreferenceDataset([row], smollm()).layout
    assert told.splitlines()[0].count("[2J") == 2 and "\x1b" not in told
    config = {"num_layers": 1, "lora_parameters": {"rank": 1, "scale": clear, "dropout": 0.0}, "loss_type": "dpo"}
    config |= {"beta": clear, "reference_model": clear}
    scale = {"rank": 1, "scale": 1.0, "dropout": 0.0}
    for name, lora in (("a", config["lora_parameters"]), ("b", scale), ("c", scale)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config | {"lora_parameters": lora}))
    (tmp_path / "c" / "adapter_config.json").write_text(
        json.dumps(config | {"lora_parameters": scale, "reference_model": None})
    )
    _warn_of_scale(tmp_path / "a" / "adapters.safetensors", 1.0)
    loss = preference_loss("dpo")
    tell_other_loss("b", config, loss, 4)
    paths = [str(tmp_path / "b"), str(tmp_path / "c")]
    given = {"train": False, "test": True, "compare": paths, "adapter_path": "b", "reference_model": None}
    args = SimpleNamespace(**(mlx_lm.lora.CONFIG_DEFAULTS | given | {clear: 1}))
    adopt_loss(args)
    compared_origin(args, loss)
    (tmp_path / clear).touch()
    for start in (tmp_path / clear, clear):
        start_of("c", str(start))
    warn_of_unread_keys(args, set())
    (tmp_path / "config.yaml").write_text('"\\e[2J": 1\n"\\e[2J": 1\n')
    check_file(tmp_path / "config.yaml", mlx_lm.lora.yaml_loader)
    out = "".join(capsys.readouterr())
    assert out.count("[2J") >= 8 and "\x1b" not in out

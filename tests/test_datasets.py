"""Loading: folders of JSON lines, hub data sets, and upstream's own data sets where no preference loss is asked for."""

import json
import sys
import types
from pathlib import Path

import chat_tokenizers as tokenizers
import pytest
import yaml

from mlx_lm.tuner import datasets
from mlx_lm.tuner.preference.options import ConfigError

ROW = {"prompt": "Who?", "chosen": "It is Lima.", "rejected": "Paris."}
TOKENIZER = tokenizers.qwen()
EXAMPLES = Path(__file__).parent.parent / "mlx_lm" / "examples"


def config(**options):
    return types.SimpleNamespace(**{"loss_type": "dpo", "train": True, "test": False, **options})


def write(folder, **splits):
    """Write rows, or a string or bytes as they are, to a folder's files."""
    for split, rows in splits.items():
        if isinstance(rows, list):
            rows = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_bytes(rows if isinstance(rows, bytes) else rows.encode())
    return str(folder)


def load(**options):
    return datasets.load_dataset(config(**options), TOKENIZER)


def chosen(dataset):
    return [TOKENIZER.decode(pair.chosen[:-1]) for pair in dataset]


def test_local_folder(tmp_path):
    data = write(tmp_path, train=[ROW, ROW | {"chosen": "Peru"}], valid=[ROW], test=[ROW])
    train, valid, test = load(data=data, test=True)
    assert chosen(train) == ["It is Lima.", "Peru"]
    assert all(isinstance(split, datasets.PreferenceDataset) for split in (train, valid, test))
    assert (len(valid), len(test)) == (1, 1)


def test_only_what_a_run_needs_is_read(tmp_path):
    data = write(tmp_path, train=[ROW], valid=[ROW], test="not JSON")
    assert load(data=data)[2] == []
    data = write(tmp_path, train="not JSON", test=[ROW])
    train, valid, test = load(data=data, train=False, test=True)
    assert (train, valid, len(test)) == ([], [], 1)


def test_missing_and_empty_validation_set_is_a_warning(tmp_path, capsys):
    assert load(data=write(tmp_path, train=[ROW]))[1] == []
    assert load(data=write(tmp_path, train=[ROW], valid=""))[1] == []
    assert capsys.readouterr().out.count("the run goes on without validation") == 2


def test_blank_lines_byte_order_mark_and_line_ends(tmp_path):
    line = json.dumps(ROW).encode()
    data = write(tmp_path, train=b"\xef\xbb\xbf" + line + b"\r\n\n" + line + b"\n" + b'{"chosen": 3}')
    with pytest.raises(ConfigError, match=r"train\.jsonl:4: rejected is missing|train\.jsonl:4: chosen is a number"):
        load(data=data)
    assert len(load(data=write(tmp_path, train=b"\xef\xbb\xbf" + line + b"\r\n\n" + line))[0]) == 2


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (json.dumps(ROW) + "\n{'chosen'", r"train\.jsonl:2: the line is not JSON \(Expecting property name"),
        (json.dumps(ROW) + "\n" + json.dumps(ROW)[:-9], r"train\.jsonl:2: the line is not JSON"),
        (b'{"prompt": "caf\xe9"}\n', r"train\.jsonl:1: the line is not UTF-8"),
        ("[1]\n", r"train\.jsonl:1: the row is a list; expected an object"),
        ("[" * 100000, r"train\.jsonl:1: the line is not JSON \(nested too deep\)"),
        ("\n \n", "the train split of .* holds no rows"),
        ("", "the train split of .* holds no rows"),
        (json.dumps(ROW) + '\n\n{"prompt": "a", "chosen": "b"}', r"train\.jsonl:3: rejected is missing"),
        (json.dumps(ROW | {"weight": -1}), r"train\.jsonl:1: weight is -1"),
        (json.dumps(ROW).replace("}", ', "margin": NaN}'), r"train\.jsonl:1: margin is nan"),
        (json.dumps(ROW | {"chosen": "Paris."}), r"train\.jsonl has no pair to learn from.*train\.jsonl:1"),
    ],
)
def test_bad_files_are_named(tmp_path, content, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load(data=write(tmp_path, train=content))


def test_missing_files(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.jsonl is missing"):
        load(data=str(tmp_path))
    write(tmp_path, train=[ROW])
    with pytest.raises(ConfigError, match=r"test\.jsonl is missing"):
        load(data=str(tmp_path), test=True)
    with pytest.raises(ConfigError, match=r"train\.jsonl holds no test set"):
        load(data=str(tmp_path / "train.jsonl"), test=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"train\.jsonl cannot be read"):
        load(data=str(tmp_path / "other"))


@pytest.mark.parametrize("data", ["/no/such", "./no", "../no", "~/no/such/folder", "a/b/c", "no/"])
def test_missing_folder(data):
    with pytest.raises(ConfigError, match="and there is no such folder"):
        load(data=data)


@pytest.mark.parametrize("data", [None, "", 3])
def test_data_must_be_a_name(data):
    with pytest.raises(ConfigError, match="it must be a folder or the name of a Hugging Face data set"):
        load(data=data)


def test_folder_below_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write(tmp_path, train=[ROW])
    assert len(load(data="~/")[0]) == 1


def test_options_reach_the_rows(tmp_path):
    data = write(tmp_path, train=[{"q": "Who?", "good": "It is Lima.", "bad": "Paris."}], valid=[])
    train, *_ = load(data=data, prompt_feature="q", chosen_feature="good", rejected_feature="bad", max_seq_length=7)
    assert chosen(train) == ["It is Lima."]
    assert train.max_seq_length == 7 and len(train[0].prompt) + len(train[0].chosen) == 7
    thinking = datasets.load_dataset(
        config(data=write(tmp_path, train=[ROW]), chat_template_kwargs={"enable_thinking": False}), tokenizers.qwen3()
    )
    assert tokenizers.qwen3().decode(thinking[0][0].prompt).endswith("<think>\n\n</think>\n\n")


# With no preference loss, upstream's data sets.

TEXT, CHAT = (
    {"text": "Hello"},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
)


@pytest.mark.parametrize("loss", [{}, {"loss_type": None}, {"loss_type": "sft"}, {"loss_type": ["sft"]}])
@pytest.mark.parametrize(
    ("row", "kind"),
    [(TEXT, "TextDataset"), (CHAT, "ChatDataset"), ({"prompt": "a", "completion": "b"}, "CompletionsDataset")],
)
def test_without_a_preference_loss_upstream_loads(tmp_path, loss, row, kind):
    args = types.SimpleNamespace(train=True, test=False, data=write(tmp_path, train=[row] * 2, valid=[row]), **loss)
    train, valid, test = datasets.load_dataset(args, TOKENIZER)
    assert type(train) is type(valid) is getattr(datasets, kind)
    assert train[0] == row and test == []


def test_without_a_preference_loss_errors_are_upstreams(tmp_path):
    with pytest.raises(ValueError, match="Unsupported data format") as raised:
        load(data=write(tmp_path, train=[ROW]), loss_type="sft")
    assert not isinstance(raised.value, ConfigError)


# The hub, by a stand-in for the `datasets` package.


@pytest.fixture
def hub(monkeypatch):
    """A `datasets` package whose data sets are in the dictionary returned: name to split to rows."""
    found = {}

    class DatasetsError(Exception):
        pass

    class DatasetNotFoundError(DatasetsError, FileNotFoundError):
        pass

    def load_dataset(name, split=None, **options):
        if name not in found:
            raise DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub.\nMore.")
        splits = {key: [row | options for row in rows] for key, rows in found[name].items()}
        if split is None:
            return splits
        if split not in splits:
            raise ValueError(f'Unknown split "{split}". Should be one of {list(splits)}.')
        return splits[split]

    package = types.ModuleType("datasets")
    package.exceptions = types.ModuleType("datasets.exceptions")
    package.exceptions.DatasetsError, package.exceptions.DatasetNotFoundError = DatasetsError, DatasetNotFoundError
    package.exceptions.DatasetGenerationError = type("DatasetGenerationError", (DatasetsError,), {})
    package.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", package)
    return found


@pytest.mark.parametrize(
    ("names"),
    [("train", "valid", "test"), ("train", "validation", "test"), ("train_prefs", "validation_prefs", "test_prefs")],
)
def test_hub_splits(hub, names):
    hub["some/prefs"] = {name: [ROW | {"chosen": name}] for name in names} | {"train_sft": [{"messages": []}]}
    splits = load(data="some/prefs", test=True)
    assert [chosen(split) for split in splits] == [[name] for name in names]


def test_hub_without_validation(hub, capsys):
    hub["prefs"] = {"train": [ROW], "test": [{"text": "not needed"}]}
    train, valid, test = load(data="prefs")
    assert (len(train), valid, test) == (1, [], [])
    assert "without validation" in capsys.readouterr().out


def test_hub_columns_without_values(hub):
    call = {"function": {"name": "look", "arguments": {"a": 1, "b": None}}}
    message = {"role": "assistant", "content": None, "tool_calls": [call], "name": None}
    hub["prefs"] = {"train": [ROW | {"chosen": [message], "tools": None, "margin": None, "system": None}]}
    tokenizer = tokenizers.qwen3()
    train, *_ = datasets.load_dataset(config(data="prefs"), tokenizer)
    assert '<tool_call>\nlook{"a": 1}\n</tool_call>' in tokenizer.decode(train[0].chosen)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ({"train": [ROW, {"prompt": "x"}]}, "^some/prefs, split train, row 1: chosen is missing"),
        ({"train_sft": [ROW]}, "some/prefs has no split named train or train_prefs, only train_sft; .*hf_dataset"),
        ({"train": []}, "the train split of some/prefs holds no rows"),
    ],
)
def test_bad_hub_data_sets_are_named(hub, rows, sentence):
    hub["some/prefs"] = rows
    with pytest.raises(ConfigError, match=sentence):
        load(data="some/prefs")


def test_unknown_hub_data_set(hub):
    sentence = r"data is 'some/other': there is no such folder, and .* cannot be loaded \(Dataset .* on the Hub\)"
    with pytest.raises(ConfigError, match=sentence):
        load(data="some/other")
    with pytest.raises(ConfigError, match=r"the hf_dataset some/other cannot be loaded \(Dataset"):
        load(hf_dataset={"path": "some/other"})


def entry(path, **options):
    return {"path": path, "train_split": "train", "valid_split": "held", **options}


def test_hf_dataset(hub):
    hub["a"] = {"train": [ROW], "held": [ROW], "quiz": [ROW | {"chosen": "Peru"}]}
    train, valid, test = load(hf_dataset=entry("a", test_split="quiz"), test=True)
    assert (chosen(train), len(valid), chosen(test)) == (["It is Lima."], 1, ["Peru"])
    assert load(hf_dataset=entry("a"))[2] == []


def test_a_split_that_is_no_text_is_told(hub):
    hub["a"] = {"train": [ROW]}
    with pytest.raises(ConfigError, match=r"the hf_dataset a cannot be loaded \(Unknown split"):
        load(hf_dataset={"path": "a", "train_split": 1})


@pytest.mark.parametrize("share, valid", [(None, 2), (0.25, 5)])
def test_of_a_whole_split_that_is_named_alone_some_rows_validate(hub, share, valid):
    rows = [ROW | {"chosen": f"c{i}"} for i in range(20)]
    hub["a"] = {"prefs": rows, f"prefs[:{20 - valid}]": rows[:-valid], f"prefs[{20 - valid}:]": rows[-valid:]}
    splits = load(hf_dataset={"path": "a", "train_split": "prefs", "config": None}, valid_share=share)
    assert [len(split) for split in splits] == [20 - valid, valid, 0]
    assert chosen(splits[0]) + chosen(splits[1]) == [row["chosen"] for row in rows]


def test_the_recipe_for_ultrafeedback_names_splits_that_it_has(hub):
    recipe = yaml.safe_load((EXAMPLES / "ultrafeedback.yaml").read_text())
    splits = [f"{part}_{kind}" for part in ("train", "test") for kind in ("prefs", "sft", "gen")]
    rows = {"prefs": [ROW | {"score_chosen": 8.0, "score_rejected": 5.0}]}
    hub["HuggingFaceH4/ultrafeedback_binarized"] = {name: rows.get(name.partition("_")[2], [{}]) for name in splits}
    train, valid, _ = load(**recipe)
    assert (len(train), len(valid)) == (1, 1)


def test_hf_dataset_list_with_keys_of_their_own(hub):
    hub["a"] = {"train": [{"q": "Who?", "good": "A", "bad": "B"}], "held": [{"q": "Who?", "good": "C", "bad": "B"}]}
    hub["b"] = {
        "train": [{"q": "Who?", "chosen": "D", "bad": "B"}] * 2,
        "held": [{"q": "x", "chosen": "E", "bad": "B"}],
    }
    entries = [entry("a", chosen_feature="good"), entry("b")]
    # What the entries do not say comes from the level above.
    above = {"prompt_feature": "q", "chosen_feature": "chosen", "rejected_feature": "bad"}
    train, valid, test = load(hf_dataset=entries, **above)
    assert chosen(train) == ["A", "D", "D"]
    assert chosen(valid) == ["C", "E"]
    assert test == []
    assert entries == [entry("a", chosen_feature="good"), entry("b")]


def test_hf_dataset_passes_its_config_to_the_package(hub):
    hub["a"] = {"train": [{"prompt": "Who?", "rejected": "B"}], "held": [{"prompt": "Who?", "rejected": "B"}]}
    assert chosen(load(hf_dataset=entry("a", config={"chosen": "from config"}))[0]) == ["from config"]


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("a", "hf_dataset has the entry 'a'; it must be an object with a path"),
        ([{"train_split": "train"}], "it must be an object with a path"),
        ({"path": "a", "train_split": "nope"}, r"the hf_dataset a cannot be loaded \(Unknown split \"nope\""),
        (entry("a", train_split="none"), "the train split of hf_dataset holds no rows"),
        (entry("a", chosen_feature="good"), "^a, split train, row 0: good is missing"),
        (entry("a", score="assistent"), r"in the hf_dataset a score is 'assistent' \(did you mean assistant\?\)"),
        (entry("a", use_chat_template="false"), "in the hf_dataset a use_chat_template is 'false'; .* true or false"),
        (entry("a", score_difference="wieght"), "in the hf_dataset a score_difference is 'wieght'"),
    ],
)
def test_bad_hf_dataset(hub, value, sentence):
    hub["a"] = {"train": [ROW], "held": [ROW], "none": []}
    with pytest.raises(ConfigError, match=sentence):
        load(hf_dataset=value)


def test_hf_dataset_needs_a_test_split_to_test(hub):
    hub["a"] = {"train": [ROW], "held": [ROW]}
    with pytest.raises(ConfigError, match="the hf_dataset a has no test_split"):
        load(hf_dataset=entry("a"), test=True)


def test_key_of_an_hf_dataset_that_is_not_read(hub, capsys):
    hub["a"] = {"train": [ROW], "held": [ROW]}
    load(hf_dataset=entry("a", chosen_features="chosen"))
    said = capsys.readouterr().out
    assert "the key chosen_features, which is not read (did you mean chosen_feature?)" in said


@pytest.mark.parametrize("source", [{"data": "some/prefs"}, {"hf_dataset": {"path": "some/prefs"}}])
def test_hub_without_the_datasets_package(monkeypatch, source):
    monkeypatch.setitem(sys.modules, "datasets", None)  # makes the import fail
    with pytest.raises(ConfigError, match="needs the datasets package"):
        load(**source)


@pytest.mark.parametrize(("count", "sizes"), [(2, (1, 1)), (4, (3, 1)), (10, (8, 1)), (40, (32, 4))])
def test_default_splits_of_an_hf_dataset_share_no_row(hub, count, sizes):
    rows = [ROW | {"chosen": f"c{i}"} for i in range(count)]
    hub["a"] = {"train": rows} | {f"train[:{n}]": rows[:n] for n in range(count + 1)}
    hub["a"] |= {f"train[{n}:]": rows[n:] for n in range(count + 1)}
    train, valid, _ = load(hf_dataset={"path": "a"})
    assert (len(train), len(valid)) == sizes
    assert not set(chosen(train)) & set(chosen(valid))


def test_one_row_is_not_enough_to_validate_on_another(hub):
    hub["a"] = {"train": [ROW]}
    with pytest.raises(ConfigError, match="the hf_dataset a has 1 rows to train and validate on; name the splits"):
        load(hf_dataset={"path": "a"})

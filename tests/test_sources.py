"""Rows from files of every kind, under every name of a split, and a share of them held out."""

import csv
import json
import types

import chat_tokenizers as tokenizers
import pytest

from mlx_lm.tuner import datasets
from mlx_lm.tuner.preference.options import ConfigError
from mlx_lm.tuner.preference.pairs import PreferenceDataset

ROW = {"prompt": "Who?", "chosen": "It is Lima.", "rejected": "Paris."}
TOKENIZER = tokenizers.qwen()


def load(data, **options):
    config = {"loss_type": "dpo", "train": True, "test": False, "data": str(data), "seed": 0, **options}
    return datasets.load_dataset(types.SimpleNamespace(**config), TOKENIZER)


def chosen(dataset):
    return [TOKENIZER.decode(pair.chosen[:-1]) for pair in dataset]


def prompts(dataset):
    return [TOKENIZER.decode(pair.prompt).split("\n")[1].removesuffix("<|im_end|>") for pair in dataset]


def write_table(path, rows, delimiter=","):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize("name", ["valid", "validation", "dev", "val"])
def test_names_of_the_validation_set(tmp_path, name):
    (tmp_path / "train.jsonl").write_text(json.dumps(ROW))
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(ROW | {"chosen": name}))
    assert chosen(load(tmp_path)[1]) == [name]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps([ROW, ROW | {"chosen": "Peru"}]),
        json.dumps([ROW, ROW | {"chosen": "Peru"}], indent=1),
        json.dumps(ROW) + "\n" + json.dumps(ROW | {"chosen": "Peru"}),
    ],
)
@pytest.mark.parametrize("folder", [True, False])
def test_json(tmp_path, text, folder):
    path = tmp_path / "train.json"
    path.write_text(text)
    assert chosen(load(tmp_path if folder else path)[0]) == ["It is Lima.", "Peru"]


def test_json_that_holds_no_rows_is_named(tmp_path):
    (tmp_path / "train.json").write_text('"text"')
    with pytest.raises(ConfigError, match=r"train\.json:1: the row is a string; expected an object"):
        load(tmp_path)
    for text in ("", "[]"):
        (tmp_path / "mine.jsonl").write_text(text)
        with pytest.raises(ConfigError, match=r"the train split of .*mine\.jsonl holds no rows"):
            load(tmp_path / "mine.jsonl")


def test_an_array_in_a_file_of_json_lines(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps([ROW, ROW | {"chosen": "Peru"}], indent=2))
    assert chosen(load(tmp_path)[0]) == ["It is Lima.", "Peru"]
    path.write_text(json.dumps([ROW, {"chosen": "a"}]))
    with pytest.raises(ConfigError, match=r"train\.jsonl, row 1: rejected is missing"):
        load(tmp_path)


def test_one_row_in_a_json_file(tmp_path):
    user = {"role": "user", "content": "Who?"}
    row = {"chosen": [user, {"role": "assistant", "content": "Lima"}]}
    row["rejected"] = [user, {"role": "assistant", "content": "Paris"}]
    (tmp_path / "train.json").write_text(json.dumps(row))
    assert chosen(load(tmp_path)[0]) == ["Lima"]


@pytest.mark.parametrize(("ending", "delimiter"), [("csv", ","), ("tsv", "\t")])
def test_tables(tmp_path, ending, delimiter):
    lists = {"prompt": "Who?", "chosen": str([{"role": "assistant", "content": "Line\none, 'two'"}]), "rejected": "b"}
    long = ROW | {"rejected": "b" * 2**18, "margin": "2"}
    texts = {"prompt": "Is 2 + 3 5?", "chosen": "true", "rejected": "5", "margin": " -1e1 "}
    rows = [ROW | {"margin": ""}, lists | {"margin": "1.5"}, long, texts]
    write_table(tmp_path / f"train.{ending}", rows, delimiter)
    train, *_ = load(tmp_path)
    assert chosen(train) == ["It is Lima.", "Line\none, 'two'", "It is Lima.", "true"]
    assert [pair.margin for pair in train] == [0.0, 1.5, 2.0, -10.0]


@pytest.mark.parametrize(("line", "more"), [("a,b", "fewer"), ("a,b,c,d", "more")])
def test_broken_tables_are_named(tmp_path, line, more):
    (tmp_path / "train.csv").write_text(f"prompt,chosen,rejected\nWho?,Lima,Paris\n{line}\n")
    with pytest.raises(ConfigError, match=rf"train\.csv:3: the line has {more} cells than the first line"):
        load(tmp_path)


def test_rows_of_tables_are_named_by_their_line(tmp_path):
    (tmp_path / "train.csv").write_text('prompt,chosen,rejected,weight\n"Who\nis?",a,b,1\nWho?,a,b,-1\n')
    with pytest.raises(ConfigError, match=r"train\.csv:4: weight is -1"):
        load(tmp_path)
    (tmp_path / "train.csv").write_text("prompt,chosen,rejected,margin\nWho?,a,b,0..5\n")
    with pytest.raises(ConfigError, match=r"train\.csv:2: margin is '0\.\.5'; it must be a finite number"):
        load(tmp_path)
    head = "prompt,chosen,rejected,chat_template_kwargs\n"
    (tmp_path / "train.csv").write_text(head + 'Who?,a,b,"{""add_generation_prompt"": true}"\n')
    with pytest.raises(
        ConfigError, match=r"train\.csv:2: .*refuses the row .*multiple values for .*add_generation_pro"
    ):
        load(tmp_path)
    (tmp_path / "train.csv").write_text(head + "Who?,a,b,\nWho?,a,b,{x}\n")
    with pytest.raises(ConfigError, match=r"train\.csv:3: chat_template_kwargs is a string that is not JSON"):
        load(tmp_path)


def test_a_folder_within(tmp_path):
    (tmp_path / "mine.jsonl").write_text(json.dumps(ROW))
    with pytest.raises(ConfigError, match=r"train\.jsonl is missing"):
        load(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(json.dumps(ROW | {"chosen": "Peru"}))
    assert chosen(load(tmp_path)[0]) == ["Peru"]


def test_parquet_and_saved_data_sets(tmp_path):
    package = pytest.importorskip("datasets")
    rows = [ROW | {"system": None}, ROW | {"chosen": "Peru", "system": ""}]
    package.Dataset.from_list(rows).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    assert chosen(load(tmp_path)[0]) == ["It is Lima.", "Peru"]
    more = package.Dataset.from_list([ROW | {"chosen": "Yes", "margin": 0.5}])
    more.to_parquet(tmp_path / "train-00001-of-00002.parquet")
    train, *_ = load(tmp_path)
    assert chosen(train) == ["It is Lima.", "Peru", "Yes"]
    assert train.where(2) == f"{tmp_path / 'train-00000-of-00001.parquet'} and 1 more, row 2"
    assert [pair.margin for pair in train] == [0.0, 0.0, 0.5]
    found = package.DatasetDict({"train": package.Dataset.from_list(rows), "dev": package.Dataset.from_list(rows[:1])})
    found.save_to_disk(tmp_path / "saved")
    train, valid, _ = load(tmp_path / "saved")
    assert (chosen(train), chosen(valid)) == (["It is Lima.", "Peru"], ["It is Lima."])
    package.Dataset.from_list(rows).save_to_disk(tmp_path / "one")
    assert len(load(tmp_path / "one")[0]) == 2
    found["test"] = found["dev"].filter(lambda row: False)
    package.DatasetDict(train=found["train"], valid=found["train"].select([])).save_to_disk(tmp_path / "empty")
    with pytest.raises(ConfigError, match="the saved data set .*empty cannot be loaded"):
        load(tmp_path / "empty")
    found.save_to_disk(tmp_path / "some")
    with pytest.raises(ConfigError, match="the test split of .*some holds no rows"):
        load(tmp_path / "some", test=True)


@pytest.mark.parametrize("change", [lambda file: b"version https://git-lfs.github.com/spec/v1", lambda file: file[:-9]])
def test_a_broken_parquet_file_is_named(tmp_path, change):
    package = pytest.importorskip("datasets")
    package.Dataset.from_list([ROW]).to_parquet(tmp_path / "train.parquet")
    (tmp_path / "train.parquet").write_bytes(change((tmp_path / "train.parquet").read_bytes()))
    with pytest.raises(ConfigError, match=r"train\.parquet cannot be loaded \(.*footer"):
        load(tmp_path)


def test_parquet_without_the_datasets_package(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match=r"the Parquet file .*train\.parquet needs the datasets package"):
        load(tmp_path)


def test_valid_share(tmp_path):
    rows = [ROW | {"prompt": f"n{i // 2}", "chosen": f"c{i}"} for i in range(20)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [len(split) for split in load(tmp_path)] == [20, 0, 0]
    train, valid, _ = load(tmp_path, valid_share=0.2)
    assert (len(train), len(valid)) == (16, 4)
    assert sorted(chosen(train) + chosen(valid)) == sorted(row["chosen"] for row in rows)
    # Both rows of a prompt are on one side.
    assert not set(prompts(train)) & set(prompts(valid))
    assert chosen(load(tmp_path, valid_share=0.2)[1]) == chosen(valid)
    assert chosen(load(tmp_path, valid_share=0.2, seed=1)[1]) != chosen(valid)
    (tmp_path / "valid.jsonl").write_text(json.dumps(ROW))
    assert [len(split) for split in load(tmp_path, valid_share=0.2)] == [20, 1, 0]


def test_prompts_that_are_validated_and_trained_on_are_told(tmp_path, capsys):
    rows = [ROW | {"prompt": f"n{i}"} for i in range(10)]
    for name, some in (("train", rows[:8]), ("valid", rows[6:]), ("test", rows[8:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))
    load(tmp_path, test=True)
    told = capsys.readouterr().out
    assert "valid.jsonl: 2 of 4 rows have a prompt that is trained on" in told and told.count("trained on") == 1
    load(tmp_path, val_batches=0)
    assert "trained on" not in capsys.readouterr().out


def spoken(*texts):
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, texts, strict=False)]


@pytest.mark.parametrize(
    "row, options",
    [
        (lambda n, i: {"history": f"post {n}", "human_ref_A": f"a{i}", "human_ref_B": "b", "labels": 1}, {}),
        (
            lambda n, i: {
                "chosen": f"\n\nHuman: {n}\n\nAssistant: a{i}",
                "rejected": f"\n\nHuman: {n}\n\nAssistant: b",
            },
            {},
        ),
        (lambda n, i: {"conversation_a": spoken(n, f"{i}"), "conversation_b": spoken(n, "b"), "winner": "model_a"}, {}),
        (lambda n, i: {"instruction": "Translate.", "input": f"text {n}", "chosen": f"a{i}", "rejected": "b"}, {}),
        (
            lambda n, i: {"good": spoken(n, f"{i}"), "bad": spoken(n, "b")},
            {"chosen_feature": "good", "rejected_feature": "bad"},
        ),
        (
            lambda n, i: {"chosen": f"Question {n}? Yes {i}.", "rejected": f"Question {n}? No."},
            {"use_chat_template": False},
        ),
        # Responses of several messages, which are no part of the prompt.
        (lambda n, i: {"chosen": spoken(n, f"{i}", "Sure?", "Yes."), "rejected": spoken(n, "b", "Sure?", "No.")}, {}),
        # A prompt in several forms, and with a key that nothing reads.
        (lambda n, i: {"prompt": [{**message, "id": i} for message in spoken(n)], "chosen": "a", "rejected": "b"}, {}),
        (lambda n, i: {"prompt": (n, spoken(n), json.dumps(spoken(n)))[i % 3], "chosen": f"a{i}", "rejected": "b"}, {}),
        (
            lambda n, i: {
                "prompt": (spoken(n, "Yes?", "No."), f"{n}\n<extra_id_1>Assistant\nYes?\n<extra_id_1>User\nNo.")[i % 2],
                "chosen": "a",
                "rejected": "b",
            },
            {},
        ),
        (lambda n, i: {"prompt": f"\n\nHuman: {n}\n\nAssistant:" + " " * (i % 5), "chosen": "a", "rejected": "b"}, {}),
    ],
)
def test_rows_of_one_prompt_of_every_layout_stay_together(row, options):
    rows = [row(f"{i // 5:02}", i) for i in range(20)]
    dataset = PreferenceDataset(rows, TOKENIZER, where=str, **options)
    for seed in range(4):
        train, valid = ([int(part.where(i)) for i in range(len(part))] for part in dataset.split(0.2, seed))
        assert len(valid) == 5 and len({i // 5 for i in valid}) == 1
        assert sorted(train + valid) == list(range(20))


def test_verdicts_and_labels_of_tables(tmp_path):
    rows = [{"prompt": "Who?", "response_0": "Paris", "response_1": "Lima", "better_response_id": 1}]
    write_table(tmp_path / "train.csv", rows)
    assert chosen(load(tmp_path)[0]) == ["Lima"]
    for labels in ((True, False), ("true", "false"), (1, 0), ("1.0", "0")):
        rows = [
            {"prompt": "Who?", "completion": text, "label": label} for text, label in zip("ab", labels, strict=True)
        ]
        write_table(tmp_path / "train.csv", rows)
        assert chosen(load(tmp_path)[0]) == ["a"]


def test_valid_share_needs_two_prompts():
    two = PreferenceDataset([ROW, ROW | {"prompt": "b"}], TOKENIZER)
    assert [len(part) for part in two.split(0.1, 0)] == [1, 1]
    with pytest.raises(ConfigError, match="valid_share is 0.5, but the 2 pairs to train on have one prompt"):
        PreferenceDataset([ROW, ROW | {"chosen": "b", "system": "Be brief."}], TOKENIZER).split(0.5, 0)


def test_rows_with_labels_are_paired_and_named_by_their_lines(tmp_path, capsys):
    rows = [{"prompt": "Who?", "completion": text, "label": label} for text, label in (("a", False), ("b", True))]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, [*rows, rows[0]])))
    assert chosen(load(tmp_path)[0]) == ["b"]
    assert "1 of 3 rows are left out: 1 with a label (KTO) and no completion of the" in capsys.readouterr().out
    silent = [row | {"prompt": "Me?", "completion": ""} for row in rows]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, [*silent, *rows])))
    assert chosen(load(tmp_path)[0]) == ["b"]
    assert "2 of 4 rows are left out: 2 with an empty response" in capsys.readouterr().out
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, [rows[0], rows[1] | {"weight": -1}])))
    with pytest.raises(ConfigError, match=r"train\.jsonl:2: weight is -1"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ([{"role": "usr", "content": "Who?"}], r"prompt\[0\]\.role is 'usr'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "has a part that is not text"),
        (3, "prompt is a number"),
    ],
)
def test_what_is_wrong_with_the_prompt_of_labelled_rows_is_told(tmp_path, prompt, told):
    rows = [{"prompt": prompt, "completion": text, "label": label} for text, label in (("a", True), ("b", False))]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ConfigError, match=rf"train\.jsonl:1: .*{told}"):
        load(tmp_path)


def test_the_layout_is_told_once_with_the_first_row(tmp_path, capsys):
    row = {"question": "Who?", "chosen": "It is Lima.", "rejected": "Paris. " * 30, "id": 7}
    for split, asked in (("train", "Who?"), ("valid", "Where?")):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row | {"question": asked}))
    load(tmp_path)
    said = capsys.readouterr().out
    assert said == (
        f"{tmp_path}/train.jsonl: rows are read as question, chosen, rejected; not read: id; the first one:\n"
        r"  prompt     '<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n'"
        "\n"
        r"  chosen     'It is Lima.<|im_end|>\n'"
        "\n"
        r"  rejected   'Paris. Paris. Paris. Paris. P ... s. Paris. Paris. <|im_end|>\n'"
        "\n"
    )


def test_options_of_the_rows_reach_them(tmp_path, capsys):
    rows = [ROW | {"score_chosen": 3 + i, "score_rejected": 2} for i in range(2)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train, *_ = load(tmp_path, score_difference="margin", score_scale=0.5, min_score_difference=1.5)
    assert [pair.margin for pair in train] == [1.0]
    assert "1 whose scores differ by less than min_score_difference" in capsys.readouterr().out
    (plain, *_) = load(tmp_path, use_chat_template=False)[0]
    assert TOKENIZER.decode(plain.prompt) == "Who?"
    turns = [{"role": role, "content": text} for role, text in (("assistant", "a"), ("user", "b"), ("assistant", "c"))]
    (tmp_path / "train.jsonl").write_text(json.dumps(ROW | {"chosen": turns}))
    assert any(load(tmp_path)[0][0].unscored) and not any(load(tmp_path, score="all")[0][0].unscored)

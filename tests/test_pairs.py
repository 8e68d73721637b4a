"""`PreferenceDataset`: truncation by hand, rows left out, what is said and how often."""

import chat_tokenizers as tokenizers
import pytest

from mlx_lm.tuner.datasets import CacheDataset, Pair, PreferenceDataset, truncate
from mlx_lm.tuner.preference import pairs
from mlx_lm.tuner.preference.batches import lengths_of
from mlx_lm.tuner.preference.options import ConfigError
from mlx_lm.tuner.preference.tokens import PairEncoder

ROW = {"prompt": "Who?", "chosen": "It is Lima.", "rejected": "Paris."}


@pytest.mark.parametrize(
    ("limit", "prompt", "chosen", "rejected"),
    [
        (9, [1, 2, 3, 4, 5], [6, 7, 8], [9, 10, 11, 12]),  # 5 + 4 fit
        (8, [2, 3, 4, 5], [6, 7, 8], [9, 10, 11, 12]),  # one off the prompt's left, for both responses
        (6, [4, 5], [6, 7, 8], [9, 10, 11, 12]),
        (5, [5], [6, 7, 8], [9, 10, 11, 12]),  # the prompt keeps its last token
        (4, [5], [6, 7, 8], [9, 10, 11]),  # then the longer response loses its right
        (3, [5], [6, 7], [9, 10]),
        (2, [5], [6], [9]),
    ],
)
def test_truncate(limit, prompt, chosen, rejected):
    assert truncate([1, 2, 3, 4, 5], [6, 7, 8], [9, 10, 11, 12], limit) == (prompt, chosen, rejected)


def test_truncation_is_counted_and_said_once(capsys):
    tokenizer = tokenizers.plain()
    # One token a digit: prompts of BOS and 3 or 9, responses of 2 and 4 with EOS, or of 8 and 9.
    rows = [{"prompt": "123", "chosen": "4", "rejected": "567"} for _ in range(3)]
    rows += [{"prompt": "123456789", "chosen": "4", "rejected": "567"}]
    rows += [{"prompt": "123", "chosen": "1234567", "rejected": "92345678"}]
    dataset = PreferenceDataset(rows, tokenizer, max_seq_length=8, name="digits")
    lengths = lengths_of(dataset).tolist()
    assert lengths == [[4, 2, 4]] * 4 + [[1, 7, 7]]
    assert [prompt + max(sides) for prompt, *sides in lengths] == [8] * 5
    assert tokenizer.decode(dataset[3].prompt) == "6789"
    assert tokenizer.decode(dataset[4].prompt) == "3"
    assert tokenizer.decode(dataset[4].chosen) == "1234567"
    assert capsys.readouterr().out == (
        "[WARNING] digits: pairs are longer than max_seq_length 8, the longest 14 tokens; of 5, 2 lost the beginning "
        "of the prompt and 1 the end of a response. Raise max_seq_length to keep them whole.\n"
    )


def test_nothing_is_said_of_pairs_that_fit(capsys):
    PreferenceDataset([ROW], tokenizers.plain(), max_seq_length=64)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("limit", [1, 0, -4, 2.5, True, None])
def test_max_seq_length_holds_a_prompt_and_a_response(limit):
    with pytest.raises(ConfigError, match="max_seq_length is .*; it must be a whole number, at least 2"):
        PreferenceDataset([ROW], tokenizers.plain(), max_seq_length=limit)


def test_useless_rows_are_left_out_and_said_once(capsys):
    rows = [
        ROW,
        ROW | {"chosen": "Paris."},
        ROW | {"chosen": " "},
        ROW | {"rejected": [{"role": "assistant", "content": "It is Lima."}]},  # equal once both are tokens
        ROW | {"chosen": "Peru"},
        ROW | {"rejected": "<|eot_id|>"},  # nothing but the end of the turn
    ]
    dataset = PreferenceDataset(rows, tokenizers.llama3(), name="six")
    assert [tokenizers.llama3().decode(pair.chosen[:-1]) for pair in dataset] == ["It is Lima.", "Peru"]
    assert capsys.readouterr().out == (
        "[WARNING] six: 4 of 6 rows are left out: 2 whose chosen and rejected responses are equal (first: six, "
        "row 1), 2 with an empty response (first: six, row 2).\n"
    )


def test_rows_that_truncation_makes_equal_are_left_out(capsys):
    rows = [ROW, {"prompt": "1", "chosen": "234567", "rejected": "234568"}]
    assert len(PreferenceDataset(rows, tokenizers.plain(), max_seq_length=6)) == 1
    assert "1 whose responses are equal within max_seq_length" in capsys.readouterr().out


def test_empty_prompt_is_left_out_where_no_bos_stands_for_it():
    tokenizer = tokenizers.byte_level((), None, None, "</s>")
    with pytest.raises(ConfigError, match="1 with an empty prompt"):
        PreferenceDataset([ROW | {"prompt": ""}], tokenizer)


def test_only_useless_rows_are_an_error():
    rows = [ROW | {"chosen": "Paris."}] * 3
    sentence = "some has no pair to learn from; of its 3 rows, 3 whose chosen and rejected responses are equal"
    with pytest.raises(ConfigError, match=sentence):
        PreferenceDataset(rows, tokenizers.qwen(), name="some")


def test_a_malformed_row_is_named_by_its_place():
    with pytest.raises(ConfigError, match=r"^some, row 1: rejected is missing"):
        PreferenceDataset([ROW, {"chosen": "a"}], tokenizers.qwen(), name="some")
    with pytest.raises(ConfigError, match=r"^there 1: margin is 'x'"):
        PreferenceDataset([ROW, ROW | {"margin": "x"}], tokenizers.qwen(), where=lambda i: f"there {i}")


def test_a_pair_is_lists_and_numbers():
    pair = PreferenceDataset([ROW | {"margin": 2, "weight": 0.5}], tokenizers.qwen())[0]
    assert isinstance(pair, Pair)
    assert all(type(tokens) is list and type(tokens[0]) is int for tokens in pair[:3])
    assert (pair.margin, pair.weight) == (2.0, 0.5)
    assert PreferenceDataset([ROW], tokenizers.qwen())[0][3:] == (0.0, 1.0, ((), ()), None)


def test_upstreams_cache_gives_the_pairs():
    dataset = PreferenceDataset([ROW, ROW | {"chosen": "Peru"}], tokenizers.qwen())
    cached = CacheDataset(dataset)
    assert [cached[i] for i in range(len(cached))] == [dataset[0], dataset[1]]


def test_joined():
    first = PreferenceDataset([ROW], tokenizers.qwen(), name="a")
    second = PreferenceDataset([ROW | {"chosen": "Peru"}, ROW], tokenizers.qwen(), name="b")
    joined = PreferenceDataset.joined([first, second])
    assert [joined[i] for i in range(len(joined))] == [first[0], second[0], second[1]]
    assert joined.name == "a, b"
    other = PreferenceDataset([ROW | {"prompt": "Where?"}], tokenizers.qwen())
    assert [len(part) for part in PreferenceDataset.joined([first, other]).split(0.5, seed=0)] == [1, 1]


@pytest.mark.parametrize("unpaired", [False, True])
def test_the_two_parts_of_a_split_count_their_own_rows(unpaired):
    rows = [{"prompt": f"{'b' * (9 * i)} a{i}", "chosen": "yes", "rejected": "no"} for i in range(9)]
    rows += [{"prompt": "a", "chosen": "yes", "rejected": ""}]
    train, valid = PreferenceDataset(rows, tokenizers.plain(), max_seq_length=40, unpaired=unpaired).split(0.3, seed=0)
    for part, left_out in ((train, 1), (valid, 0)):
        numbers = {int(part.where(i).rpartition(" ")[2]) for i in range(len(part))}
        whole = PreferenceDataset([rows[i] for i in numbers], tokenizers.plain(), max_seq_length=40)
        assert part.counts["prompts cut"] == whole.counts["prompts cut"] > 0
        assert part.counts["read"] == len(numbers) + left_out
        assert part.counts["left out"] == left_out


def said(dataset):
    """The texts of each pair's responses, without their ends."""
    return [tuple(dataset.tokenizer.decode(side[:-1]) for side in (pair.chosen, pair.rejected)) for pair in dataset]


def labelled(*rows, **other):
    return [{"prompt": asked, "completion": text, "label": label, **other} for asked, text, label in rows]


def test_labelled_completions_are_paired_by_their_prompts(capsys):
    rows = labelled(
        ("a", "good", True),
        ("b", "alone", True),
        ("a", "bad", False),
        ("a", "worse", False),
        ("c", "evil", 0),
        ("c", "fine", 1),
        system="Be brief.",
        weight=0.5,
    )
    dataset = PreferenceDataset(rows, tokenizers.qwen(), where="rows:{}".format)
    assert said(dataset) == [("good", "bad"), ("fine", "evil")]
    assert [dataset.where(i) for i in range(2)] == ["rows:0", "rows:5"]
    assert all(pair.weight == 0.5 and "Be brief." in tokenizers.qwen().decode(pair.prompt) for pair in dataset)
    told = "with a label (KTO) and no completion of the other label to the same prompt"
    assert f"2 of 6 rows are left out: 2 {told} (first: rows:3)" in capsys.readouterr().out
    with pytest.raises(
        ConfigError, match="no pair to learn from; of its 2 rows, 2 with a label .KTO. and no completion"
    ):
        PreferenceDataset(rows[:2], tokenizers.qwen())


@pytest.mark.parametrize(
    "asked, options",
    [
        (lambda about: {"question": about}, {}),
        (lambda about: {"about": about}, {"prompt_feature": "about"}),
        (lambda about: {"instruction": "Translate.", "input": about}, {}),
        (lambda about: {"prompt": "Hi", "system_prompt": f"Be {about}."}, {}),
        (None, {}),
    ],
)
def test_labelled_completions_of_different_prompts_are_no_pairs(asked, options):
    rows = []
    for about, text, label in [("a", "good a", True), ("b", "bad b", False), ("b", "good b", 1), ("a", "bad a", 0)]:
        whole = [{"role": "user", "content": about}, {"role": "assistant", "content": text}]
        # An empty prompt beside whole conversations is theirs.
        own = asked(about) | {"completion": text} if asked else {"prompt": "", "completion": whole}
        rows.append(own | {"label": label})
    found = said(PreferenceDataset(rows, tokenizers.qwen(), **options))
    assert found == [("good a", "bad a"), ("good b", "bad b")]


def test_a_label_is_none_of_a_pair_whose_keys_are_named():
    rows = [{"prompt": "Who?", "completion": "I.", "other": "You.", "label": bool(i)} for i in range(2)]
    dataset = PreferenceDataset(rows, tokenizers.qwen(), chosen_feature="completion", rejected_feature="other")
    assert said(dataset) == [("I.", "You."), ("I.", "You.")]


def test_labelled_completions_keep_what_is_not_scored_of_them():
    turns = [{"role": role, "content": text} for role, text in (("assistant", "a"), ("user", "b"), ("assistant", "c"))]
    rows = labelled(("Who?", turns, True), ("Who?", "No.", False))
    pair = {"prompt": "Who?", "chosen": turns, "rejected": "No."}
    assert list(PreferenceDataset(rows, tokenizers.qwen())) == list(PreferenceDataset([pair], tokenizers.qwen()))


def test_long_texts_are_tokenized_a_few_at_a_time(monkeypatch):
    rows = [ROW | {"prompt": f"{i}"} for i in range(7)]
    whole = list(PreferenceDataset(rows, tokenizers.plain()))
    encode, sizes = PairEncoder.encode, []
    monkeypatch.setattr(PairEncoder, "encode", lambda self, group: sizes.append(len(group)) or encode(self, group))
    # Of 21 letters a row.
    monkeypatch.setattr(pairs, "MOST_LETTERS", 60)
    assert list(PreferenceDataset(rows, tokenizers.plain())) == whole
    assert sizes == [3, 3, 1]


def test_feature_must_be_a_name():
    with pytest.raises(ConfigError, match=r"chosen_feature is \['a'\]; it must be the name of a key"):
        PreferenceDataset([ROW], tokenizers.qwen(), chosen_feature=["a"])

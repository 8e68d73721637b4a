"""Layouts of public data sets: each read as its prompt and its two responses, or refused as what it is."""

import pytest
from layouts import BAD, GOOD, LAYOUTS, USER

from mlx_lm.tuner.preference.layouts import SAME, UselessRow
from mlx_lm.tuner.preference.options import ConfigError
from mlx_lm.tuner.preference.rows import EMPTY_PROMPT, NO_ANSWER, SCORED_ALIKE, SCORED_LOWER, RowReader


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_same_conversation(layout):
    read = RowReader()(LAYOUTS[layout])
    assert (read.prompt, read.chosen, read.rejected) == ([USER], [GOOD], [BAD])
    assert (read.tools, read.margin, read.weight) == (None, 0.0, 1.0)


@pytest.mark.parametrize(
    ("layout", "name", "unread"),
    [
        (
            "UltraFeedback, binarized",
            "prompt, chosen, rejected",
            {"prompt_id", "messages", "score_chosen", "score_rejected"},
        ),
        ("Anthropic HH-RLHF", "chosen and rejected with the prompt in them, Human/Assistant transcripts", set()),
        ("Orca DPO pairs", "question, chosen, rejected", set()),
        ("OpenAI", "OpenAI's preference format", set()),
        ("SHP", "SHP comparisons", {"score_A", "score_B"}),
        ("Alpaca", "Alpaca pairs", set()),
    ],
)
def test_layouts_are_named_with_what_is_not_read(layout, name, unread):
    reader = RowReader()
    reader(LAYOUTS[layout])
    assert reader.layouts == {name: 1}
    assert set(reader.unread) == unread


def test_keys_of_messages_that_nothing_reads_are_named():
    reader = RowReader()
    reader({"prompt": [USER | {"mood": "good"}], "chosen": [GOOD | {"weight": 0}], "rejected": "No."})
    assert set(reader.unread) == {"prompt[].mood", "chosen[].weight"}


def test_system_and_further_keys_of_layouts():
    system = {"role": "system", "content": "Be brief."}
    for key in ("system", "system_prompt"):
        assert RowReader()(LAYOUTS["Orca DPO pairs"] | {key: "Be brief."}).prompt == [system, USER]
    given = {"input": {"messages": [system, USER], "tools": [{"name": "look"}]}}
    read = RowReader()(LAYOUTS["OpenAI"] | given)
    assert (read.prompt, read.tools) == ([system, USER], [{"name": "look"}])
    asked = {"instruction": "Name it.", "input": "A planet", "history": []}
    for responses in (LAYOUTS["Alpaca"], {"output_1": "Mars.", "output_2": "No.", "preference": 1}):
        reader = RowReader()
        assert reader(responses | asked).prompt == [USER | {"content": "Name it.\nA planet"}] and not reader.unread


def test_a_key_that_is_named_as_a_responses_is_no_prompt():
    row = {"messages": [USER, GOOD], "rejected_response": "No."}
    with pytest.raises(
        ConfigError, match="there is no prompt; the row's keys are messages, rejected_response. Give each row a"
    ):
        RowReader(chosen="messages", rejected="rejected_response")(row)


def test_a_key_that_is_named_comes_before_a_layout():
    row = LAYOUTS["Orca DPO pairs"] | {"prompt": "Other."}
    assert RowReader(prompt="question")(row).prompt == [USER]


def test_prompts_of_several_turns_of_helpsteer2():
    asked = "Who?\n<extra_id_1>Assistant\nMe.\n<extra_id_1>User\nName a planet."
    read = RowReader()(LAYOUTS["HelpSteer2 preferences"] | {"prompt": asked})
    assert read.prompt == [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}, USER]
    assert (read.chosen, read.rejected) == ([GOOD], [BAD])


def test_transcripts_of_several_turns():
    start = "\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: Name a planet.\n\nAssistant:"
    read = RowReader()({"chosen": start + " It is Mars.", "rejected": start + " It is no."})
    assert [message["role"] for message in read.prompt] == ["user", "assistant", "user"]
    assert read.chosen == [{"role": "assistant", "content": "It is Mars."}]
    plain = RowReader(chat=False)({"chosen": start + " It is Mars.", "rejected": start + " It is no."})
    assert (plain.prompt, plain.chosen, plain.rejected) == (start, " It is Mars.", " It is no.")


@pytest.mark.parametrize("chat", [True, False])
def test_transcripts_without_two_answers_to_one_question_are_left_out(chat):
    whole = "\n\nHuman: Hi\n\nAssistant: Ho"
    with pytest.raises(UselessRow, match=NO_ANSWER):
        RowReader(chat=chat)({"chosen": whole, "rejected": "\n\nHuman: Hello\n\nAssistant: No"})
    with pytest.raises(UselessRow, match=NO_ANSWER):
        RowReader(chat=chat)({"chosen": whole + "\n\nHuman: Hi", "rejected": whole + "\n\nHuman: Ho"})


def test_a_text_that_only_mentions_a_human_is_no_transcript():
    row = {"prompt": "Human: or Assistant:?", "chosen": "Human: both", "rejected": "none"}
    assert RowReader()(LAYOUTS["prompt, chosen, rejected"] | {"prompt": "Who wrote\n\nHuman: hi"}).prompt == [
        {"role": "user", "content": "Who wrote\n\nHuman: hi"}
    ]
    assert RowReader()(row).chosen[0]["content"] == "Human: both"


def test_short_prompts_may_be_repeated_by_chance():
    read = RowReader()({"prompt": "Hello", "chosen": "Hello!", "rejected": "Hello there"})
    assert read.chosen == [{"role": "assistant", "content": "Hello!"}]
    read = RowReader(chat=False)({"prompt": "It is fou", "chosen": "It is four", "rejected": "It is fourteen"})
    assert read.chosen == "It is four"


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            LAYOUTS["HelpSteer2 preferences"] | {"preference_strength": "high"},
            "preference_strength is 'high'; it must be a",
        ),
        (LAYOUTS["SHP"] | {"labels": 3}, "labels is 3; it must be 1 or 0"),
        (LAYOUTS["Chatbot Arena"] | {"winner": "a"}, "winner is 'a'; it must be 'model_a' or 'model_b'"),
        (LAYOUTS["OpenAI"] | {"input": "Name"}, "input is a string; it must be an object with messages"),
        ({"messages": [USER, GOOD]}, "chosen is missing; the row's keys are messages. chosen_feature and rejected_fea"),
        ({"messages": [USER, GOOD], "chosen": "a", "rejected": "b"}, "no prompt, and messages ends with an answer"),
        ({"conversations": [{"from": "gpt", "value": "a"}], "chosen": "a", "rejected": "b"}, "ends with an answer"),
        ({"prompt": "a", "response_chosen": "b", "rejected": "c"}, r"chosen is missing \(did you mean response_chosen"),
        (
            LAYOUTS["Alpaca"] | {"history": [["Hi", "Ho"]]},
            "the row has a history, which is not read; give the turns as",
        ),
        (LAYOUTS["Alpaca"] | {"input": [1]}, "input is a list; with chosen and rejected it must be a string"),
        ({"passage": "Long text.", "id": "7", "chosen": "a b", "rejected": "a c"}, "such as prompt_feature: passage"),
        (
            {"task": "Coding", "trajectory": [{"from": "user", "value": "Who?"}], "chosen": "a", "rejected": "b"},
            "such as prompt_feature: trajectory",
        ),
        (
            {"chosen": "The answer is 4.", "rejected": "The answer is 5."},
            "there is no prompt; .* Give each row a prompt",
        ),
    ],
)
def test_rows_that_hold_no_pair_are_refused(row, sentence):
    with pytest.raises(ConfigError, match=sentence):
        RowReader()(row)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (LAYOUTS["HelpSteer2 preferences"] | {"preference_strength": 0}, SAME),
        (LAYOUTS["Chatbot Arena"] | {"winner": "tie (bothbad)"}, SAME),
        (LAYOUTS["prompt, chosen, rejected"] | {"prompt": " "}, EMPTY_PROMPT),
        (LAYOUTS["prompt, chosen, rejected"] | {"prompt": [{"role": "user", "content": ""}]}, EMPTY_PROMPT),
    ],
)
def test_rows_that_are_left_out(row, reason):
    with pytest.raises(UselessRow, match=reason.replace("(", r"\(")):
        RowReader()(row)


SCORED = LAYOUTS["UltraFeedback, binarized"]


@pytest.mark.parametrize(
    ("options", "row", "margin", "weight"),
    [
        ({}, SCORED, 0.0, 1.0),
        ({"score_difference": "margin"}, SCORED, 5.5, 1.0),
        ({"score_difference": "margin", "score_scale": 0.1}, SCORED | {"margin": 1}, 1.55, 1.0),
        ({"score_difference": "weight", "score_scale": 2.0}, SCORED | {"weight": 0.5}, 0.0, 5.5),
        ({"score_difference": "margin"}, LAYOUTS["Argilla mixes"], 2.5, 1.0),
        ({"min_score_difference": 5.5}, SCORED, 0.0, 1.0),
    ],
)
def test_scores(options, row, margin, weight):
    read = RowReader(**options)(row)
    assert (read.margin, read.weight) == pytest.approx((margin, weight))


def test_scores_that_leave_a_row_out_or_are_missing():
    with pytest.raises(UselessRow, match=SCORED_ALIKE):
        RowReader(min_score_difference=5.6)(SCORED)
    for score in (2, SCORED["score_rejected"]):
        with pytest.raises(UselessRow, match=SCORED_LOWER):
            RowReader(score_difference="weight")(SCORED | {"score_chosen": score})
    with pytest.raises(ConfigError, match="the row has no score_chosen, which score_difference"):
        RowReader(score_difference="margin")(LAYOUTS["Orca DPO pairs"])


def test_a_verdict_may_be_a_number_in_quotes():
    row = {"prompt": "a", "response_1": "b", "response_2": "c", "preference_strength": "-2"}
    assert RowReader()(row).chosen[0]["content"] == "b"


def test_a_verdict_that_is_no_number_is_refused():
    row = {"context": "a", "response1": "b", "response2": "c", "overall_preference": float("nan")}
    with pytest.raises(ConfigError, match="overall_preference is nan; it must be a finite number"):
        RowReader()(row)


@pytest.mark.parametrize("chat", [True, False])
def test_the_prompt_of_a_labelled_completion_is_found_by_its_key_and_never_made_of_the_completion(chat):
    row = {"completion": "It is Lima.", "label": True}
    read = RowReader(chat=chat)({"question": "Where?", **row})
    assert read.prompt == ([{"role": "user", "content": "Where?"}] if chat else "Where?")
    with pytest.raises(ConfigError, match="there is no prompt; .* such as prompt_feature: asked"):
        RowReader(chat=chat)({"asked": "Where?", **row})

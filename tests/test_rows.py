"""Row forms: what each is read as, and what is said of rows that cannot be read."""

from dataclasses import replace

import pytest

from mlx_lm.tuner.preference.options import ConfigError
from mlx_lm.tuner.preference.rows import EMPTY_RESPONSE, EQUAL, RowReader, UselessRow, repeats_prompts, shared_text

USER = {"role": "user", "content": "Capital of Peru?"}
SYSTEM = {"role": "system", "content": "Be brief."}
LIMA = {"role": "assistant", "content": "Lima."}
PARIS = {"role": "assistant", "content": "Paris."}
MORE = [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
LOOK = {"type": "function", "function": {"name": "look", "arguments": {}}}
CALL = {"role": "assistant", "content": "", "tool_calls": [LOOK]}
RESULT = {"role": "tool", "content": "Lima"}

FORMS = {
    "strings": {"prompt": "Capital of Peru?", "chosen": "Lima.", "rejected": "Paris."},
    "messages": {"prompt": [USER], "chosen": [LIMA], "rejected": [PARIS]},
    "messages and strings": {"prompt": [USER], "chosen": "Lima.", "rejected": [PARIS]},
    "string and messages": {"prompt": "Capital of Peru?", "chosen": [LIMA], "rejected": [PARIS]},
    "conversations": {"prompt": [USER], "chosen": [USER, LIMA], "rejected": [USER, PARIS]},
    "string and conversations": {"prompt": "Capital of Peru?", "chosen": [USER, LIMA], "rejected": [USER, PARIS]},
    "string, conversation, response": {"prompt": "Capital of Peru?", "chosen": [USER, LIMA], "rejected": "Paris."},
    "implicit": {"chosen": [USER, LIMA], "rejected": [USER, PARIS]},
    "implicit, columns without values": {
        "prompt": None,
        "chosen": [USER, LIMA],
        "rejected": [USER, PARIS],
        "tools": None,
    },
    "text parts": {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Capital of Peru?"}]}]}
    | {"chosen": [LIMA | {"tool_calls": None}], "rejected": "Paris."},
    "scores beside": {"prompt": "Capital of Peru?", "chosen": "Lima.", "rejected": "Paris.", "score_chosen": "high"},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_conversation(form):
    read = RowReader()(FORMS[form])
    assert (read.prompt, read.chosen, read.rejected) == ([USER], [LIMA], [PARIS])
    assert (read.tools, read.template_kwargs, read.margin, read.weight) == (None, {}, 0.0, 1.0)


def test_string_prompt_of_a_longer_conversation_is_one_of_its_messages():
    start = [SYSTEM, USER, LIMA, {"role": "user", "content": "And of France?"}]
    for prompt in ("Capital of Peru?", "And of France?", "Capital of Peru? Lima. And of France?"):
        read = RowReader()({"prompt": prompt, "chosen": [*start, PARIS], "rejected": [*start, LIMA]})
        assert (read.prompt, read.chosen, read.rejected) == (start, [PARIS], [LIMA])


def test_implicit_prompt_leaves_a_response_on_each_side():
    read = RowReader()({"chosen": [USER, LIMA], "rejected": [USER, LIMA, *MORE]})
    assert (read.prompt, read.chosen, read.rejected) == ([USER], [LIMA], [LIMA, *MORE])


def test_explicit_prompt_ends_where_it_says():
    read = RowReader()({"prompt": [USER], "chosen": [USER, LIMA, *MORE], "rejected": [USER, LIMA, MORE[0], PARIS]})
    assert (read.prompt, read.chosen, read.rejected) == ([USER], [LIMA, *MORE], [LIMA, MORE[0], PARIS])


def test_response_may_be_a_call_its_result_and_an_answer():
    row = {"prompt": [USER], "chosen": [CALL, RESULT, LIMA], "rejected": [PARIS], "tools": '[{"name": "look"}]'}
    read = RowReader()(row)
    assert read.chosen == [CALL, RESULT, LIMA]
    assert read.tools == [{"name": "look"}]


def test_a_column_of_images_that_a_row_leaves_empty():
    assert RowReader()(FORMS["strings"] | {"images": [], "image": None}).prompt == [USER]


def test_a_text_under_a_key_of_images_that_is_named():
    assert RowReader(prompt="video")({"video": USER["content"], "chosen": "a", "rejected": "b"}).prompt == [USER]


def test_keys_of_messages_that_nothing_reads_make_no_difference():
    one, two = ([message | {"id": f"{side}{i}"} for i, message in enumerate((USER, LIMA))] for side in "ab")
    reader = RowReader()
    read = reader({"chosen": one, "rejected": [two[0], PARIS]})
    assert (read.prompt, read.chosen, read.rejected) == ([USER], [LIMA], [PARIS])
    assert reader({"prompt": [USER], "chosen": one, "rejected": [two[0], PARIS]}).prompt == [USER]
    assert list(reader.unread) == ["chosen[].id", "rejected[].id"]


def test_space_between_a_transcript_and_its_responses():
    asked = "\n\nHuman: Name a planet.\n\nAssistant:"
    read = RowReader()({"prompt": asked, "chosen": " Mars.", "rejected": "Assistant: No."})
    assert [side[0]["content"] for side in (read.chosen, read.rejected)] == ["Mars.", "No."]
    read = RowReader()({"prompt": asked + " It is ", "chosen": "Mars.", "rejected": "none."})
    assert read.prompt[-1]["content"] == "It is "
    read = RowReader()({"prompt": asked + " It is", "chosen": " Mars.", "rejected": " none."})
    assert (read.prompt[-1]["content"], read.chosen[0]["content"]) == ("It is", " Mars.")


def test_system():
    row = FORMS["strings"] | {"system": "Be brief."}
    assert RowReader()(row).prompt == [SYSTEM, USER]
    assert RowReader()({**FORMS["messages"], "prompt": [SYSTEM, USER], "system": "Be brief."}).prompt == [SYSTEM, USER]
    assert RowReader()(FORMS["strings"] | {"system": ""}).prompt == [USER]


def test_other_keys():
    reader = RowReader(prompt="question", chosen="good", rejected="bad")
    read = reader({"question": "Capital of Peru?", "good": "Lima.", "bad": "Paris.", "prompt": 3, "chosen": 4})
    assert (read.prompt, read.chosen, read.rejected) == ([USER], [LIMA], [PARIS])


def test_a_rows_template_arguments_come_before_the_configurations():
    reader = RowReader(template_kwargs={"enable_thinking": True, "effort": "low"})
    read = reader(FORMS["strings"] | {"chat_template_kwargs": {"enable_thinking": False, "effort": None}})
    assert read.template_kwargs == {"enable_thinking": False, "effort": "low"}


def test_margin_and_weight():
    read = RowReader()(FORMS["strings"] | {"margin": -2, "weight": 0})
    assert (read.margin, read.weight) == (-2.0, 0.0)


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Q: hi A: yes", "Q: hi A: no", "Q: hi A:"),
        ("Q: hi A:  yes", "Q: hi A:  no", "Q: hi A:"),  # both spaces go to the responses
        ("Answer:\nyes", "Answer:\nno", "Answer:\n"),
        ("It is four", "It is fourteen", "It is"),  # "four" is a beginning of "fourteen"
        ("It is 4", "It is 42", "It is"),
        ("It is fine", "It is fine today", "It is"),  # something is left of the shorter text
        ("He said: don't", "He said: don", "He said:"),
        ("One two.", "One two. ", "One two"),  # white space alone is no response
        ("Say cafe\u0301 now", "Say cafe now", "Say"),  # an accent that is a character of its own
        ("Hi \U0001f468\u200d\U0001f469 a", "Hi \U0001f468\u200d\U0001f466 a", "Hi"),  # a joined emoji
        ("Q: it's so", "Q: it'd be", "Q:"),
        ("yes", "no", ""),
        ("same", "same thing", ""),
    ],
)
def test_shared_text(chosen, rejected, prompt):
    assert chosen[: shared_text(chosen, rejected)] == prompt
    assert rejected[: shared_text(rejected, chosen)] == prompt


def test_shared_text_ends_inside_no_special_token():
    assert shared_text("go <|yes|> on", "go <|no|> on", ("<|yes|>", "<|no|>")) == len("go")


def test_implicit_prompt_of_strings():
    row = {"chosen": "Q: hi A: yes", "rejected": "Q: hi A: no"}
    read = RowReader(chat=False)(row)
    assert (read.prompt, read.chosen, read.rejected) == ("Q: hi A:", " yes", " no")
    with pytest.raises(ConfigError, match="there is no prompt; the row's keys are chosen, rejected. Give each row"):
        RowReader()(row)
    with pytest.raises(ConfigError, match="there is no prompt, and chosen and rejected share no beginning to take for"):
        RowReader(chat=False)({"chosen": "Lima.", "rejected": "Paris."})


def test_a_prompt_that_both_plain_texts_repeat_is_taken_off_them():
    repeated = {key: f"Capital of Peru? {FORMS['strings'][key]}" for key in ("chosen", "rejected")}
    read = RowReader(chat=False)(FORMS["strings"] | repeated)
    assert (read.prompt, read.chosen, read.rejected) == ("Capital of Peru?", " Lima.", " Paris.")


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("restating, lifts", [(1, False), (2, True), (4, True)])
def test_few_answers_that_restate_their_question_keep_it(chat, restating, lifts):
    """A layout has the prompt in all responses; of four rows, one row's two answers may begin with it by chance."""
    row = FORMS["strings"]
    repeated = row | {key: f"{row['prompt']} {row[key]}" for key in ("chosen", "rejected")}
    rows = [{"prompt": 5}, *[repeated] * restating, *[row] * (4 - restating)]
    reader = RowReader(chat=chat)
    assert repeats_prompts(reader, rows) == lifts and not reader.layouts
    read = replace(reader, lifts_prompt=lifts)(repeated)
    answer = read.chosen[0]["content"] if chat else read.chosen
    assert (answer.strip() == "Lima.") == lifts


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chosen": ""}, EMPTY_RESPONSE),
        ({"rejected": " \n"}, EMPTY_RESPONSE),
        ({"chosen": []}, EMPTY_RESPONSE),
        ({"chosen": [{"role": "assistant", "content": ""}]}, EMPTY_RESPONSE),
        ({"chosen": [USER], "prompt": [USER]}, EMPTY_RESPONSE),
        ({"rejected": "Lima."}, EQUAL),
        ({"prompt": None, "rejected": "Lima."}, EQUAL),
        ({"prompt": None, "chosen": [USER, LIMA], "rejected": [USER, LIMA]}, EQUAL),
    ],
)
def test_useless_rows(change, reason):
    with pytest.raises(UselessRow, match=reason):
        RowReader()(FORMS["strings"] | change)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chosen": ""}, EMPTY_RESPONSE),
        ({"rejected": "Lima."}, EQUAL),
        ({"prompt": None, "chosen": " "}, EMPTY_RESPONSE),
        ({"chosen": "Capital of Peru?", "rejected": "Capital of Peru? Paris."}, EMPTY_RESPONSE),
    ],
)
def test_useless_rows_of_plain_text(change, reason):
    with pytest.raises(UselessRow, match=reason):
        RowReader(chat=False)(FORMS["strings"] | change)


MALFORMED = [
    ([], "the row is a list"),
    ({"prompt": "a", "chosen": "b"}, "rejected is missing"),
    ({"prompt": "a", "chosen": None, "rejected": "b"}, "chosen is null; the row's keys are prompt"),
    ({"prompt": "a", "chose": "b", "rejected": "c"}, r"chosen is missing \(did you mean chose\?\)"),
    ({"prompt": "a", "chosen": 3, "rejected": "b"}, "chosen is a number; it must be a string or a list"),
    ({"prompt": {"a": 1}, "chosen": "b", "rejected": "c"}, "prompt is an object"),
    ({"prompt": [], "chosen": "b", "rejected": "c"}, "prompt is an empty list"),
    ({"prompt": ["hi"], "chosen": "b", "rejected": "c"}, r"prompt\[0\] is a string; a message is an object"),
    ({"prompt": [USER, {"content": "x"}], "chosen": "b", "rejected": "c"}, r"prompt\[1\]\.role is missing"),
    (
        {"prompt": [{"role": "narrator", "content": "x"}], "chosen": "b", "rejected": "c"},
        r"prompt\[0\]\.role is 'narrator'; known roles are system, user, assistant, tool, developer, human",
    ),
    ({"prompt": [USER], "chosen": [{"role": "assistant"}], "rejected": "c"}, r"chosen\[0\]\.content is missing"),
    ({"prompt": [{"role": "user", "content": 3}], "chosen": "b", "rejected": "c"}, r"prompt\[0\]\.content is a number"),
    ({"prompt": [{"role": "user", "content": [{"type": "image"}]}], "chosen": "b", "rejected": "c"}, "is not text"),
    (FORMS["strings"] | {"images": ["a.png", "b.png"]}, "the row has images, and only text can be trained on; leave"),
    ({"image": {"bytes": "x"}, "question": "a", "chosen": "b", "rejected": "c"}, "the row has image, and only text"),
    ({"chosen": "yes", "rejected": "no", "id": 3}, "there is no prompt; the row's keys are chosen, rejected, id"),
    ({"from": "a", "asks": "Sure?", "chosen": "yes", "rejected": "no"}, "such as prompt_feature: asks"),
    ({"chosen": "yes", "rejected": [USER, LIMA]}, "there is no prompt; the row's keys are chosen, rejected. Give each"),
    ({"chosen": [LIMA], "rejected": [PARIS]}, "share no leading messages"),
    ({"chosen": [USER, LIMA], "rejected": [SYSTEM, USER, PARIS]}, "share no leading messages"),
    ({"chosen": [USER, LIMA, *MORE], "rejected": [USER, LIMA, USER, PARIS]}, "begins with a user message"),
    ({"prompt": [USER], "chosen": [LIMA, MORE[0]], "rejected": [PARIS]}, "chosen ends with a user message"),
    ({"prompt": [SYSTEM], "chosen": [USER, LIMA], "rejected": [PARIS]}, "does not repeat the prompt's messages"),
    ({"prompt": [USER, LIMA], "chosen": [USER], "rejected": " Yes."}, "does not repeat the prompt's messages"),
    ({"prompt": "Hello", "chosen": [USER, LIMA], "rejected": [USER, PARIS]}, "do not hold the prompt"),
    ({"prompt": [USER, CALL], "chosen": [RESULT, LIMA], "rejected": "x"}, "chosen begins with a tool message"),
    (FORMS["strings"] | {"system": 3}, "system is a number"),
    ({**FORMS["messages"], "prompt": [SYSTEM, USER], "system": "Be long."}, "another system message"),
    (FORMS["strings"] | {"tools": "{"}, "tools is a string that is not JSON"),
    (FORMS["strings"] | {"tools": {"name": "x"}}, "tools is an object; it must be a list"),
    (FORMS["strings"] | {"tools": [1]}, "tools is a list with something else than tool descriptions"),
    (FORMS["strings"] | {"chat_template_kwargs": [1]}, "chat_template_kwargs is a list"),
    (FORMS["strings"] | {"margin": "two"}, "margin is 'two'; it must be a finite number"),
    (FORMS["strings"] | {"margin": float("nan")}, "margin is nan"),
    (FORMS["strings"] | {"weight": float("inf")}, "weight is inf"),
    (FORMS["strings"] | {"margin": -1e39}, "margin is -1e.39; it must be a finite number"),
    (FORMS["strings"] | {"weight": True}, "weight is True"),
    (FORMS["strings"] | {"weight": -1}, "weight is -1; it must not be negative"),
]


@pytest.mark.parametrize(("row", "sentence"), MALFORMED)
def test_malformed_rows_are_named(row, sentence):
    with pytest.raises(ConfigError, match=sentence):
        RowReader()(row)


def test_a_prompt_key_that_was_asked_for_must_be_there():
    with pytest.raises(ConfigError, match="questions .prompt_feature. is missing"):
        RowReader(prompt="questions")({"question": "a", "chosen": "b", "rejected": "c"})


@pytest.mark.parametrize(
    "extra", [{"system": "x"}, {"tools": [{}]}, {"chat_template_kwargs": {"a": 1}}, {"prompt": [USER]}]
)
def test_what_needs_a_chat_template(extra):
    with pytest.raises(ConfigError, match="need a chat template"):
        RowReader(chat=False)(FORMS["strings"] | extra)

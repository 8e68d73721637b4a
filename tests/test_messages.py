"""Messages: roles, contents, tool calls and reasoning in the form that chat templates read."""

import time

import pytest

from mlx_lm.tuner.preference.messages import decoded, marked_turns, message, tools, transcript
from mlx_lm.tuner.preference.options import ConfigError


def call(arguments):
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "look", "arguments": arguments}}],
    }


@pytest.mark.parametrize(
    ("role", "read"),
    [
        ("Human", "user"),
        ("USER", "user"),
        ("prompter", "user"),
        ("gpt", "assistant"),
        ("Assistant", "assistant"),
        ("model", "assistant"),
        ("bot", "assistant"),
        ("developer", "system"),
        ("observation", "tool"),
        ("ipython", "tool"),
        ("function", "tool"),
    ],
)
def test_roles(role, read):
    expected = {"role": read, "content": "a"}
    assert message({"role": role, "content": "a"}, "m") == expected
    assert message({"from": role, "value": "a"}, "m") == expected


@pytest.mark.parametrize("arguments", ['{"at": "Peru", "n": 1}', {"at": "Peru", "n": 1}])
def test_calls_of_every_form_have_their_arguments_as_an_object(arguments):
    read = [{"type": "function", "function": {"name": "look", "arguments": {"at": "Peru", "n": 1}}}]
    expected = {"role": "assistant", "content": "", "tool_calls": read}
    function = {"name": "look", "arguments": arguments}
    for form in (
        call(arguments),
        {"role": "assistant", "tool_calls": [function]},
        {"role": "assistant", "content": "", "function_call": function},
    ):
        assert message(form, "m") == expected
    if isinstance(arguments, str):
        text = '{"name": "look", "arguments": ' + arguments + "}"
        assert message({"from": "function_call", "value": text}, "m") == expected


def test_calls_without_arguments_keep_their_id():
    given = {"role": "assistant", "tool_calls": [{"id": "c1", "function": {"name": "look", "arguments": ""}}]}
    assert message(given, "m")["tool_calls"] == [
        {"type": "function", "id": "c1", "function": {"name": "look", "arguments": {}}}
    ]


def test_the_given_message_is_not_changed():
    given = call('{"a": 1}')
    message(given, "m")
    assert given == call('{"a": 1}')


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (call("{bad"), "the arguments of the call of look in m is a string that is not JSON"),
        (call("[1]"), "the arguments of the call of look in m are a list; they must be an object"),
        ({"role": "assistant", "tool_calls": [{"id": 1}]}, "m.tool_calls has .*a function that has a name"),
        ({"role": "assistant", "tool_calls": {"a": 1}}, "m.tool_calls is an object; it must be a list of calls"),
        ({"role": "asistant", "content": "a"}, r"m.role is 'asistant' \(did you mean assistant\?\)"),
        ({"role": "assistant", "content": "a", "thinking": 3}, "m has reasoning that is a number"),
        ({"role": 3, "content": "a"}, "m.role is a number"),
        ({"content": "a"}, "m.role is missing"),
        ({"role": "user"}, "m.content is missing"),
    ],
)
def test_what_is_no_message_is_refused(value, sentence):
    with pytest.raises(ConfigError, match=sentence):
        message(value, "m")


def test_reasoning_has_one_name():
    for key in ("reasoning_content", "reasoning", "thinking"):
        assert message({"role": "assistant", key: "Peru."}, "m") == {
            "role": "assistant",
            "content": "",
            "reasoning_content": "Peru.",
        }
    assert message({"role": "assistant", "content": "a", "reasoning": " "}, "m") == {
        "role": "assistant",
        "content": "a",
    }


def test_strings_that_hold_messages():
    assert decoded('[{"role": "user", "content": "a"}]', "m") == [{"role": "user", "content": "a"}]
    assert decoded('{"role": "user", "content": "a", "name": null}', "m") == {
        "role": "user",
        "content": "a",
        "name": None,
    }
    assert decoded("[{'from': 'human', 'value': None}]", "m") == [{"from": "human", "value": None}]
    # An answer may be JSON.
    for text in (
        '{"from": "Berlin", "to": "Paris"}',
        '{"value": 12, "unit": "kg"}',
        '{"content": "a"} b',
        '[{"value":',
    ):
        assert decoded(text, "m") is None
    for text in (
        '{"from": "EUR", "to": "USD", "value": 1.08}\n\nThe rate is approximate.',
        '{"content": "Hi", "from": "Bob"}\nThis is the JSON.',
    ):
        assert decoded(text, "m") is None
    # Message columns as pandas writes them into a table, and a list that is cut off.
    for text in (
        "[{'content': 'q', 'role': 'user'}\n {'content': 'a', 'role': 'assistant'}]",
        '[{"from": "human", "value": "',
    ):
        with pytest.raises(ConfigError, match="m is a string that begins as messages do but is not JSON"):
            decoded(text, "m")
    # Of messages of which one is none it is told which.
    assert decoded('[{"role": "user", "content": "hi"}, {"content": "x"}]', "m")[1] == {"content": "x"}
    for text in ('{"role": 3', "[1, 2]", "a [{'role': 'x'}]", '[{"name": "a"}]'):
        if text.startswith('{"role'):
            with pytest.raises(ConfigError, match="m is a string that begins as messages do but is not JSON"):
                decoded(text, "m")
        else:
            assert decoded(text, "m") is None


def test_transcripts():
    text = "\n\nHuman: Hi\n\nmore\n\nAssistant: Ho\n\nHuman: Sure?\n\nAssistant:"
    turns = transcript(text)
    assert [(turn["role"], turn["content"]) for turn, _ in turns] == [
        ("user", "Hi\n\nmore"),
        ("assistant", "Ho"),
        ("user", "Sure?"),
        ("assistant", ""),
    ]
    assert [text[:end].rstrip().rsplit("\n", 1)[-1] for _, end in turns][:2] == ["more", "Assistant: Ho"]
    # Lines that end as those of Windows do.
    assert [turn for turn, _ in transcript("\r\n\r\nHuman: Hi\r\n\r\nAssistant: Ho")] == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
    ]
    for other in ("Human: Hi", "Hi\n\nHuman: a\n\nAssistant: b", "Assistant: a", ""):
        assert transcript(other) is None


def test_turns_of_helpsteer2():
    turns = marked_turns("Who?\n\n<extra_id_1>Assistant\nLima.\n\nYes.\n<extra_id_1>User\nSure?")
    assert [(turn["role"], turn["content"]) for turn in turns] == [
        ("user", "Who?"),
        ("assistant", "Lima.\n\nYes."),
        ("user", "Sure?"),
    ]
    assert marked_turns("Who?\n<extra_id_1>Assistant\n") == [{"role": "user", "content": "Who?"}]
    for other in ("Who?", "What is <extra_id_1>?", "<extra_id_0>System\n\n<extra_id_1>User\nWho?"):
        assert marked_turns(other) is None


@pytest.mark.parametrize("read", [transcript, marked_turns, lambda text: decoded(text, "m")])
@pytest.mark.parametrize("blank", ["\n", " ", "\n ", "\r\n"])
def test_long_white_space_is_read_at_once(read, blank):
    tic = time.process_time()
    for text in (blank * 10**5 + "x", "x" + blank * 10**5 + "."):
        assert read(text) is None
    assert time.process_time() - tic < 1  # squares of these lengths take minutes


def test_tools_as_strings():
    assert tools('[{"name": "a"}]') == tools([{"name": "a"}]) == tools(['{"name": "a"}']) == [{"name": "a"}]
    assert tools("") is tools([]) is tools(None) is None

"""Rows of every kind under twelve families' chat templates, each with the text that it must become.

The expected texts are written by hand from what each family's models read and write; `templates.py` has the templates.
"""

import chat_tokenizers
import pytest
import templates
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_lm.tuner.datasets import PreferenceDataset
from mlx_lm.tuner.preference.options import ConfigError

USER = {"role": "user", "content": "Who?"}
ROW = {"prompt": "Who?", "chosen": "It is Lima.", "rejected": "Paris."}
LIMA, PARIS = ({"role": "assistant", "content": text} for text in ("It is Lima.", "Paris."))
FUNCTION = {"name": "look", "arguments": '{"at": "Peru"}'}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "id": "c1", "function": FUNCTION}]}
RESULT = {"role": "tool", "content": "Snow", "tool_call_id": "c1"}
TOOLS = [{"name": "look"}]
WRITTEN = '[{"name": "look"}]'

# The prompt of one user's turn, and an answer without reasoning behind it.
PLAIN = {
    "llama3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWho?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "{}<|eot_id|>",
    ),
    "qwen25": (
        "<|im_start|>system\nYou are Qwen.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n",
        "{}<|im_end|>",
    ),
    "qwen3": ("<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n", "<think>\n\n</think>\n\n{}<|im_end|>"),
    "qwen35": (
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n<think>\n",
        "\n</think>\n\n{}<|im_end|>",
    ),
    "gemma": ("<bos><start_of_turn>user\nWho?<end_of_turn>\n<start_of_turn>model\n", "{}<end_of_turn>"),
    "phi3": ("<|user|>\nWho?<|end|>\n<|assistant|>\n", "{}<|end|>"),
    "mistral": ("<s>[INST]Who?[/INST]", " {}</s>"),
    "deepseek": ("<|begin|><|User|>Who?<|Assistant|><think>\n", "\n</think>\n\n{}<|end|>"),
    "gpt_oss": (
        "<|start|>system<|message|>You are a model.<|end|><|start|>user<|message|>Who?<|end|><|start|>assistant",
        "<|channel|>final<|message|>{}<|return|>",
    ),
    "glm": ("[gMASK]<sop><|user|>\nWho?<|assistant|>", "\n<think></think>\n{}<|endoftext|>"),
    "nemotron": (
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n<think>\n",
        "</think>{}<|im_end|>",
    ),
    "smollm": (
        "<|im_start|>system\nYou are SmolLM<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n",
        "{}<|im_end|>",
    ),
}
FAMILIES = tuple(PLAIN)

# Rows that say the same as ROW.
SAME = {
    "roles of others": {
        "prompt": [{"role": "Human", "content": "Who?"}],
        "chosen": [{"role": "gpt", "content": "It is Lima."}],
        "rejected": [{"role": "model", "content": "Paris."}],
    },
    "from and value": {
        "conversations": [{"from": "human", "value": "Who?"}],
        "chosen": {"from": "bot", "value": "It is Lima."},
        "rejected": {"from": "gpt", "value": "Paris."},
    },
    "a question": {"question": "Who?", "chosen": "It is Lima.", "rejected": "Paris.", "system": ""},
    "lists in JSON strings": {
        "prompt": '[{"role": "user", "content": "Who?"}]',
        "chosen": '[{"role": "assistant", "content": "It is Lima."}]',
        "rejected": "[{'role': 'assistant', 'content': 'Paris.'}]",
    },
    "transcripts": {
        "chosen": "\n\nHuman: Who?\n\nAssistant: It is Lima.",
        "rejected": "\n\nHuman: Who?\n\nAssistant: Paris.",
    },
    "a transcript for a prompt": ROW | {"prompt": "\n\nHuman: Who?\n\nAssistant:"},
}


def texts(family, row, **options):
    """The texts of a row's prompt and responses, from its tokens."""
    tokenizer = templates.tokenizer(family)
    pair = PreferenceDataset([row], tokenizer, **options)[0]
    return tuple(tokenizer.decode(tokens) for tokens in pair[:3])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_question_and_two_answers(family):
    prompt, answer = PLAIN[family]
    assert texts(family, ROW) == (prompt, answer.format("It is Lima."), answer.format("Paris."))


# Families whose generation prompt opens no thought, and whose templates end a response with EOS.
USUAL = [family for family in FAMILIES if family not in ("qwen35", "deepseek", "glm", "nemotron")]


@pytest.mark.parametrize("family", USUAL)
def test_the_whole_sequence_is_the_conversations_own_tokens(family):
    """Prompt and response are the tokens of the whole conversation, less what its template adds after the end."""
    tokenizer = templates.tokenizer(family)
    prompt, chosen, *_ = PreferenceDataset([ROW], tokenizer)[0]
    whole = tokenizer.apply_chat_template([USER, LIMA])
    assert whole[: len(prompt + chosen)] == prompt + chosen
    assert tokenizer.decode(whole[len(prompt + chosen) :], skip_special_tokens=True).strip() == ""


@pytest.mark.parametrize("family", USUAL)
def test_a_prompt_that_begins_the_response(family):
    prompt, answer = PLAIN[family]
    before, after = answer.split("{}")
    row = {"prompt": [USER, {"role": "assistant", "content": "It is"}], "chosen": " Lima.", "rejected": " Paris."}
    assert texts(family, row) == (prompt + before + "It is", " Lima." + after, " Paris." + after)


@pytest.mark.parametrize("form", SAME)
@pytest.mark.parametrize("family", FAMILIES)
def test_other_forms_are_the_same_tokens(family, form):
    assert texts(family, SAME[form]) == texts(family, ROW)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_that_repeat_the_question(family):
    asked = {"prompt": "Who is it then?", "chosen": "It is Lima.", "rejected": "Paris."}
    repeated = asked | {"chosen": "Who is it then? It is Lima.", "rejected": "Who is it then?\nParis."}
    assert texts(family, repeated) == texts(family, asked)


@pytest.mark.parametrize("family", FAMILIES)
def test_words_that_both_answers_of_transcripts_begin_with_stay_in_them(family):
    asked = "\n\nHuman: Who?\n\nAssistant: "
    row = {"chosen": asked + "It is Lima.", "rejected": asked + "It is Rome."}
    prompt, answer = PLAIN[family]
    assert texts(family, row) == (prompt, answer.format("It is Lima."), answer.format("It is Rome."))


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_that_are_rendered_already_are_refused(family):
    prompt, _ = PLAIN[family]
    with pytest.raises(ConfigError, match="as a chat template writes it, and would go through one again; give"):
        texts(family, ROW | {"prompt": prompt})
    both = {key: prompt + ROW[key] for key in ("chosen", "rejected")}
    with pytest.raises(ConfigError, match="set use_chat_template: false to train strings as they stand"):
        texts(family, both)


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_that_are_rendered_already_are_trained_as_they_stand_where_that_is_asked_for(family):
    prompt, answer = PLAIN[family]
    rendered = {"prompt": prompt, "chosen": answer.format("It is Lima."), "rejected": answer.format("Paris.")}
    assert texts(family, rendered, use_chat_template=False) == tuple(rendered.values())


# A call, behind the prompt with its tools, or the sentence of a refusal.
NO_TOOLS = "does not write tools"
CALLS = {
    "llama3": '{"name": "look", "parameters": {"at": "Peru"}}<|eot_id|>',
    "qwen25": '<tool_call>\n{"name": "look", "arguments": {"at": "Peru"}}\n</tool_call><|im_end|>',
    "qwen3": '<think>\n\n</think>\n\n<tool_call>\nlook{"at": "Peru"}\n</tool_call><|im_end|>',
    "qwen35": (
        "\n</think>\n\n<tool_call>\n<function=look>\n<parameter=at>\nPeru\n</parameter>\n</function>\n</tool_call>"
        "<|im_end|>"
    ),
    "mistral": '[TOOL_CALLS][{"name": "look", "arguments": {"at": "Peru"}}]</s>',
    "gpt_oss": ' to=functions.look<|channel|>commentary json<|message|>{"at": "Peru"}<|call|>',
    "glm": (
        "\n<think></think>\n<tool_call>look\n<arg_key>at</arg_key>\n<arg_value>Peru</arg_value>\n</tool_call>"
        "<|endoftext|>"
    ),
    "nemotron": (
        "</think><tool_call>\n<function=look>\n<parameter=at>\nPeru\n</parameter>\n</function>\n</tool_call>\n<|im_end|>"
    ),
}
ARGUMENTS = ('{"at": "Peru"}', {"at": "Peru"})


@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_calls_with_their_arguments_as_a_string_or_an_object(family, arguments):
    call = CALL | {"tool_calls": [{"function": {"name": "look", "arguments": arguments}}]}
    row = ROW | {"chosen": [call], "tools": TOOLS}
    if family in CALLS:
        prompt, chosen, _ = texts(family, row)
        assert chosen == CALLS[family]
        assert WRITTEN in prompt
    else:
        with pytest.raises(ConfigError, match=NO_TOOLS):
            texts(family, row)


def test_calls_of_a_template_that_needs_the_string():
    expected = '\n</think>\n\n<|call|>look\n```json\n{"at": "Peru"}\n```<|end|>'
    for arguments in ARGUMENTS:
        call = CALL | {"tool_calls": [{"function": {"name": "look", "arguments": arguments}}]}
        assert texts("deepseek", ROW | {"chosen": [call]})[1] == expected


def test_calls_that_a_template_writes_as_python_does_get_the_string():
    template = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}
{%- for call in m.tool_calls or [] %}{{ call.function.name }}: {{ call.function.arguments }}{% endfor %}
{{- '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
    tokenizer = templates.chat_tokenizers.with_template(templates.tokenizer("smollm"), template)
    chosen = PreferenceDataset([ROW | {"chosen": [CALL]}], tokenizer)[0].chosen
    assert tokenizer.decode(chosen) == 'look: {"at": "Peru"}<|im_end|>'


# What stands between the user's turn and the generation prompt: a call in the prompt, and its result.
CALLED = {
    "llama3": (
        '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "look", "parameters": {"at": "Peru"}}<|eot_id|>'
        "<|start_header_id|>ipython<|end_header_id|>\n\nSnow<|eot_id|>"
    ),
    "qwen25": (
        '<|im_start|>assistant\n<tool_call>\n{"name": "look", "arguments": {"at": "Peru"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nSnow\n</tool_response><|im_end|>\n"
    ),
    "qwen3": (
        '<|im_start|>assistant\n<tool_call>\nlook{"at": "Peru"}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>Snow</tool_response><|im_end|>\n"
    ),
    "qwen35": (
        "<|im_start|>assistant\n<think>\n\n</think>\n\n<tool_call>\n<function=look>\n<parameter=at>\nPeru\n</parameter>\n"
        "</function>\n</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>\nSnow\n</tool_response><|im_end|>\n"
    ),
    "mistral": '[TOOL_CALLS][{"name": "look", "arguments": {"at": "Peru"}}]</s>[TOOL_RESULTS]{"content": "Snow"}'
    "[/TOOL_RESULTS]",
    "gpt_oss": (
        '<|start|>assistant to=functions.look<|channel|>commentary json<|message|>{"at": "Peru"}<|call|>'
        '<|start|>functions.look to=assistant<|message|>"Snow"<|end|>'
    ),
    "glm": (
        "<|assistant|>\n<think></think>\n<tool_call>look\n<arg_key>at</arg_key>\n<arg_value>Peru</arg_value>\n</tool_call>"
        "<|observation|>\n<tool_response>Snow</tool_response>"
    ),
    "nemotron": (
        "<|im_start|>assistant\n<think></think><tool_call>\n<function=look>\n<parameter=at>\nPeru\n</parameter>\n"
        "</function>\n</tool_call>\n<|im_end|>\n<|im_start|>user\n<tool_response>\nSnow\n</tool_response>\n<|im_end|>\n"
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_results_and_tools_in_the_prompt(family):
    row = ROW | {"prompt": [USER, CALL, RESULT], "tools": TOOLS}
    if family in CALLED:
        prompt, chosen, _ = texts(family, row)
        assert CALLED[family] in prompt and WRITTEN in prompt
        assert chosen == PLAIN[family][1].format("It is Lima.")
    else:
        with pytest.raises(ConfigError, match=NO_TOOLS + "|roles must alternate"):
            texts(family, row)


def test_calls_and_results_that_a_template_leaves_out_of_the_prompt_are_refused():
    for messages, sentence in (
        ([USER, CALL, USER], "does not write the call of the tool look in the prompt"),
        ([USER, LIMA, RESULT], "does not write the result of a tool"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            texts("phi3", ROW | {"prompt": messages})
    # Of a result that says nothing nothing is lost.
    assert texts("phi3", ROW | {"prompt": [USER, LIMA, RESULT | {"content": " "}]})


# Reasoning given in a key of its own; where the model has none, the row is refused.
NO_REASONING = "does not write reasoning_content"
REASONED = {
    "qwen3": "<think>\nPeru.\n</think>\n\nIt is Lima.<|im_end|>",
    "qwen35": "Peru.\n</think>\n\nIt is Lima.<|im_end|>",
    "deepseek": "Peru.\n</think>\n\nIt is Lima.<|end|>",
    "gpt_oss": (
        "<|channel|>analysis<|message|>Peru.<|end|><|start|>assistant<|channel|>final<|message|>It is Lima.<|return|>"
    ),
    "glm": "\n<think>Peru.</think>\nIt is Lima.<|endoftext|>",
    "nemotron": "Peru.\n</think>\nIt is Lima.<|im_end|>",
}


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("family", FAMILIES)
def test_reasoning_in_a_key_of_its_own(family, key):
    row = ROW | {"chosen": [LIMA | {key: "Peru."}], "rejected": [LIMA | {key: "France."}]}
    if family in REASONED:
        _, chosen, rejected = texts(family, row)
        assert chosen == REASONED[family]
        assert rejected == REASONED[family].replace("Peru.", "France.")
    else:
        with pytest.raises(ConfigError, match=NO_REASONING):
            texts(family, row)


# Reasoning in the content: whole, cut off, and from within; the other response has none.
THOUGHTS = {
    "qwen3": ("<think>\nPeru.\n</think>\n\nIt is Lima.<|im_end|>", "<think>\nPeru is a<|im_end|>"),
    "qwen35": ("Peru.\n</think>\n\nIt is Lima.<|im_end|>", "Peru is a<|im_end|>"),
    "deepseek": ("Peru.\n</think>\n\nIt is Lima.<|end|>", "Peru is a<|end|>"),
    "glm": ("\n<think>Peru.</think>\nIt is Lima.<|endoftext|>", "\n<think>\nPeru is a<|endoftext|>"),
    "nemotron": ("Peru.\n</think>\n\nIt is Lima.<|im_end|>", "Peru is a<|im_end|>"),
}


@pytest.mark.parametrize("family", THOUGHTS)
def test_reasoning_in_the_content(family):
    whole, cut = THOUGHTS[family]
    for content, expected in (
        ("<think>\nPeru.\n</think>\n\nIt is Lima.", whole),
        ("Peru.\n</think>\n\nIt is Lima.", whole),
        ("<think>\nPeru is a", cut),
    ):
        for key, other in (("chosen", "rejected"), ("rejected", "chosen")):
            row = ROW | {key: content, other: "Paris."}
            found = dict(zip(("prompt", "chosen", "rejected"), texts(family, row), strict=True))
            assert found["prompt"] == PLAIN[family][0]
            assert found[key] == expected
            assert found[other] == PLAIN[family][1].format("Paris.")


@pytest.mark.parametrize("key", ["content", "reasoning_content"])
@pytest.mark.parametrize("family", THOUGHTS)
def test_reasoning_before_further_turns(family, key):
    tokenizer = templates.tokenizer(family)
    content = "<think>\nPeru.\n</think>\n\nIt is Lima."
    thinks = LIMA | {key: content if key == "content" else "Peru."}
    turns = [thinks, {"role": "user", "content": "Sure?"}, LIMA | {"content": "Yes."}]
    pair = PreferenceDataset([ROW | {"chosen": turns}], tokenizer)[0]
    assert tokenizer.decode(pair.prompt) == PLAIN[family][0]
    ((start, stop),), _ = pair.unscored
    first = THOUGHTS[family][0].removesuffix("<|endoftext|>")
    if family == "glm":
        # The template drops the thought here; the row's own text of it takes its place.
        first = "\n" + content
    if (family, key) == ("nemotron", "reasoning_content"):
        first = REASONED[family]
    assert tokenizer.decode(pair.chosen[:start]) == first
    assert "Sure?" in tokenizer.decode(pair.chosen[start:stop])
    assert "Yes." in tokenizer.decode(pair.chosen[stop:])


def test_an_empty_thought_in_the_content_is_the_one_that_stands_for_none():
    for family in ("qwen3", "qwen35", "deepseek"):
        row = ROW | {"chosen": "<think>\n\n</think>\n\nIt is Lima."}
        assert texts(family, row) == texts(family, ROW)


# A conversation within a response: what is between the model's turns is not scored.
BETWEEN = {
    "llama3": (
        "<|start_header_id|>ipython<|end_header_id|>\n\nSnow<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "qwen25": "\n<|im_start|>user\n<tool_response>\nSnow\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
    "qwen3": "\n<|im_start|>user\n<tool_response>Snow</tool_response><|im_end|>\n<|im_start|>assistant\n",
    # Two line ends are one token, of which the generation prompt has the first.
    "qwen35": (
        "\n<|im_start|>user\n<tool_response>\nSnow\n</tool_response><|im_end|>\n<|im_start|>assistant\n<think>\n\n"
    ),
    "mistral": '[TOOL_RESULTS]{"content": "Snow"}[/TOOL_RESULTS]',
    "gpt_oss": '<|start|>functions.look to=assistant<|message|>"Snow"<|end|><|start|>assistant',
    "glm": "<|observation|>\n<tool_response>Snow</tool_response><|assistant|>",
    "nemotron": "\n<|im_start|>user\n<tool_response>\nSnow\n</tool_response>\n<|im_end|>\n<|im_start|>assistant\n",
}


@pytest.mark.parametrize("family", BETWEEN)
def test_turns_of_others_within_a_response_are_not_scored(family):
    tokenizer = templates.tokenizer(family)
    row = ROW | {"chosen": [CALL, RESULT, LIMA], "tools": TOOLS}
    pair = PreferenceDataset([row], tokenizer)[0]
    ((start, stop),), of_rejected = pair.unscored
    assert tokenizer.decode(pair.chosen[start:stop]) == BETWEEN[family]
    assert of_rejected == ()
    call = CALLS[family].removesuffix("<|endoftext|>")
    if family == "qwen3":
        # An empty thought stands in the last turn only.
        call = call.removeprefix("<think>\n\n</think>\n\n")
    assert tokenizer.decode(pair.chosen[:start]) == call
    everything = PreferenceDataset([row], tokenizer, score="all")[0]
    assert everything == pair._replace(unscored=((), ()))


@pytest.mark.parametrize("family", ["qwen3", "qwen35", "deepseek", "llama3"])
@pytest.mark.parametrize("earlier", [[], [{"role": "assistant", "content": "OK then"}, USER]])
def test_turns_that_say_the_same_are_told_apart(family, earlier):
    tokenizer = templates.tokenizer(family)
    answer, more = {"role": "assistant", "content": "OK then"}, {"role": "user", "content": "more"}
    turns = [answer, more, answer, more, answer]
    pair = PreferenceDataset([ROW | {"prompt": [USER, *earlier], "chosen": turns}], tokenizer)[0]
    ends, spans = [0], pair.unscored[0]
    for start, stop in spans:
        text = tokenizer.decode(pair.chosen[start:stop])
        assert "more" in text and "OK then" not in text
        ends += [start, stop]
    scored = [tokenizer.decode(pair.chosen[i:j]) for i, j in zip(ends[::2], [*ends[1::2], None], strict=True)]
    assert len(scored) == 3
    assert all(text.count("OK then") == 1 and "more" not in text for text in scored)
    assert len({text.partition("OK then")[2] for text in scored}) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_of_a_conversation_each_turn_of_the_models_is_scored_and_no_other_or_it_is_refused(family):
    tokenizer = templates.tokenizer(family)
    think = {"role": "assistant", "content": "<think>\nzzhm\n</think>\n\nzza", "mine": "zza"}
    turns = {
        "a": {"role": "assistant", "content": "zza"},
        "A": think,
        "e": {"role": "assistant", "content": "zze"},
        "u": {"role": "user", "content": "qqu"},
        "v": {"role": "user", "content": "zza"},
        "c": CALL,
        "t": RESULT | {"content": '{"t": "qqt"}'},
    }
    for said in ("aue", "aua", "aueua", "Aue", "aua", "cta", "ctcta", "ctaue", "ave", "avava", "eaue"):
        response = [{key: value for key, value in turns[name].items() if key != "mine"} for name in said]
        row = ROW | {"chosen": response, **({"tools": TOOLS} if "c" in said else {})}
        try:
            pair = PreferenceDataset([row], tokenizer)[0]
        except ConfigError:
            continue
        scored, unscored, last = "", "", 0
        for start, stop in pair.unscored[0]:
            scored += tokenizer.decode(pair.chosen[last:start])
            unscored += tokenizer.decode(pair.chosen[start:stop])
            last = stop
        scored += tokenizer.decode(pair.chosen[last:])
        assert "qq" not in scored and "zze" not in unscored, said
        assert unscored.count("qqu") == said.count("u") and unscored.count("qqt") == said.count("t"), said
        assert unscored.count("zza") == said.count("v"), said
        assert scored.count("zza") == said.lower().count("a") and scored.count("zze") == said.count("e"), said
        assert scored.count("look") == said.count("c"), said


def test_turns_behind_a_response_that_goes_on_from_the_prompt_are_not_scored():
    """Also one whose text stands in the generation prompt, too."""
    tokenizer = templates.tokenizer("llama3")
    begun = {"role": "assistant", "content": "It is"}
    chosen = [LIMA | {"content": " Lima."}, {"role": "user", "content": "a"}, LIMA | {"content": "Yes."}]
    pair = PreferenceDataset([{"prompt": [USER, begun], "chosen": chosen, "rejected": " Paris."}], tokenizer)[0]
    asked = "<|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>"
    answers = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert tokenizer.decode(pair.chosen[slice(*pair.unscored[0][0])]) == asked + answers


def test_eos_behind_the_last_turn_alone_is_no_other_text():
    turns = [LIMA, {"role": "user", "content": "Sure?"}, LIMA]
    pair = PreferenceDataset([ROW | {"chosen": turns}], templates.tokenizer("phi3"))[0]
    assert templates.tokenizer("phi3").decode(pair.chosen[slice(*pair.unscored[0][0])]).count("Sure?") == 1


def test_a_result_that_is_written_otherwise_behind_reasoning_that_is_dropped_is_found():
    tokenizer = templates.tokenizer("gpt_oss")
    result = RESULT | {"content": '{"city": "Lima"}'}
    row = ROW | {"tools": TOOLS, "chosen": [CALL | {"reasoning_content": "Peru."}, result, LIMA]}
    pair = PreferenceDataset([row], tokenizer)[0]
    ((start, stop),) = pair.unscored[0]
    assert "city" in tokenizer.decode(pair.chosen[start:stop])
    assert "look" in tokenizer.decode(pair.chosen[:start]) and "Lima" in tokenizer.decode(pair.chosen[stop:])


def test_what_is_said_beside_a_call_may_stand_behind_its_result():
    template = """{% set ns = namespace(said='') %}{% for m in messages %}{% if m.tool_calls %}
    {{- '<|im_start|>look' + m.tool_calls[0].function | tojson + '<|im_end|>' }}{% set ns.said = m.content %}
    {%- if loop.last %}{{ ns.said }}{% endif %}{% elif m.role == 'tool' %}{{ m.content + ns.said }}
    {%- else %}{{ '<|im_start|>' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"""
    tokenizer = chat_tokenizers.with_template(templates.tokenizer("qwen25"), template)
    row = ROW | {"chosen": [CALL | {"content": "So."}, RESULT, LIMA]}
    pair = PreferenceDataset([row], tokenizer)[0]
    assert tokenizer.decode(pair.chosen[slice(*pair.unscored[0][0])]) == "SnowSo."


@pytest.mark.parametrize("first", [PARIS, PARIS | {"reasoning_content": "France?"}])
@pytest.mark.parametrize("family", ["qwen3", "qwen35"])
def test_of_a_later_turn_that_has_a_thought_which_its_prompt_closes_the_answer_is_scored(family, first):
    tokenizer = templates.tokenizer(family)
    turns = [first, {"role": "user", "content": "Sure?"}, LIMA | {"reasoning_content": "Peru."}]
    row = ROW | {"chosen": turns, "chat_template_kwargs": {"enable_thinking": False}}
    pair = PreferenceDataset([row], tokenizer)[0]
    ((start, stop),) = pair.unscored[0]
    assert tokenizer.decode(pair.chosen[start:stop]).endswith("assistant\n<think>\nPeru.\n</think>\n\n")
    assert tokenizer.decode(pair.chosen[stop:]) == LIMA["content"] + "<|im_end|>"


def test_a_call_that_is_tried_again_is_scored_twice():
    tokenizer = templates.tokenizer("qwen3")
    turns = [CALL, RESULT | {"content": "error"}, CALL, RESULT, LIMA]
    pair = PreferenceDataset([ROW | {"chosen": turns, "tools": TOOLS}], tokenizer)[0]
    parts = [tokenizer.decode(pair.chosen[start:stop]) for start, stop in pair.unscored[0]]
    assert [("error" in part, "Snow" in part, "look" in part) for part in parts] == [
        (True, False, False),
        (False, True, False),
    ]


def test_unscored_turns_are_cut_with_their_response():
    tokenizer = templates.tokenizer("qwen25")
    more = [LIMA, {"role": "user", "content": "Sure? " * 9}, PARIS]
    whole = PreferenceDataset([ROW | {"chosen": more}], tokenizer)[0]
    ((start, stop),), _ = whole.unscored
    cut = PreferenceDataset([ROW | {"chosen": more}], tokenizer, max_seq_length=start + 4)[0]
    assert len(cut.prompt) == 1 and len(cut.chosen) == start + 3
    assert cut.unscored == (((start, start + 3),), ())
    assert stop > start + 3


def test_reasoning_that_a_closed_thought_leaves_out_is_told(capsys):
    off = {"enable_thinking": False}
    row = ROW | {"chosen": "<think>\nPeru.\n</think>\n\nIt is Lima."}
    assert texts("qwen35", row, chat_template_kwargs=off)[1] == "It is Lima.<|im_end|>"
    assert "in 1 of 1 rows the chat template leaves reasoning out of responses" in capsys.readouterr().out


def test_reasoning_that_is_left_out_of_later_turns_is_told(capsys):
    thinks = LIMA | {"content": "<think>\nPeru.\n</think>\n\nIt is Lima."}
    _, chosen, _ = texts("deepseek", ROW | {"chosen": [LIMA, USER, thinks]})
    assert "Peru." not in chosen
    said = capsys.readouterr().out
    assert "in 1 of 1 rows the chat template leaves reasoning out of turns of responses (first" in said


@pytest.mark.parametrize("earlier", [LIMA | {"content": "<think>\nHm.\n</think>\n\nYes."}, LIMA | {"thinking": "Hm."}])
def test_reasoning_of_earlier_turns_that_is_left_out_is_told(earlier, capsys):
    prompt, *_ = texts("qwen3", ROW | {"prompt": [USER, earlier, USER]})
    assert "Hm." not in prompt
    assert "in 1 of 1 rows the chat template leaves the reasoning of earlier turns out" in capsys.readouterr().out


def test_a_message_to_go_on_from_that_is_written_in_two_ways_is_refused():
    """Qwen 3 has an empty thought before the last turn, and none before a call whose result and answer follow."""
    row = {"prompt": [USER, LIMA], "chosen": [CALL | {"content": " I look."}, RESULT, LIMA], "rejected": [PARIS]}
    with pytest.raises(ConfigError, match="before both responses alike; move it into the responses"):
        texts("qwen3", row)


def test_a_template_that_loses_a_message_is_refused():
    silent = """{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"""
    tokenizer = templates.chat_tokenizers.with_template(templates.tokenizer("smollm"), silent)
    with pytest.raises(ConfigError, match="does not write what the response's first message holds"):
        PreferenceDataset([ROW], tokenizer)
    with pytest.raises(ConfigError, match="does not write the system message of the prompt .'Be brief.'."):
        answers = silent.replace("m.role == 'user'", "m.role != 'system'")
        PreferenceDataset([ROW | {"system": "Be brief."}], templates.chat_tokenizers.with_template(tokenizer, answers))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, False),
        ({"chosen": "It is Lima.<|im_end|>\n"}, False),
        ({"chosen": "It is <|im_end|> Lima."}, True),
        ({"prompt": "What is <|im_start|>?"}, True),
    ],
)
def test_special_tokens_in_texts_are_told(change, told, capsys):
    texts("smollm", ROW | change)
    assert ("a message's text holds a special token of the tokenizer" in capsys.readouterr().out) == told


WORDS = st.text(st.sampled_from("ab \n.é"), min_size=1, max_size=12).filter(lambda text: text.strip())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(family=st.sampled_from(FAMILIES), asked=WORDS, answers=st.tuples(WORDS, WORDS), turns=st.integers(0, 2))
def test_invariants(family, asked, answers, turns):
    """The prompt is what the model is given, the responses hold their answers, and BOS and EOS stand once."""
    if answers[0].strip() == answers[1].strip():
        return
    tokenizer = templates.tokenizer(family)
    messages = [USER, LIMA] * turns + [{"role": "user", "content": asked}]
    pair = PreferenceDataset([{"prompt": messages, "chosen": answers[0], "rejected": answers[1]}], tokenizer)[0]
    given_text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(pair.prompt) == given_text
    assert pair.unscored == ((), ())
    for response, answer in zip((pair.chosen, pair.rejected), answers, strict=True):
        assert answer.strip() in tokenizer.decode(response)
        ends = [token in tokenizer.eos_token_ids for token in response]
        assert ends[-1] and sum(ends) == 1
        if tokenizer.bos_token_id not in (None, tokenizer.convert_tokens_to_ids("<|im_start|>")):
            assert (pair.prompt + response).count(tokenizer.bos_token_id) == 1
    swapped = {"prompt": messages, "chosen": answers[1], "rejected": answers[0]}
    assert PreferenceDataset([swapped], tokenizer)[0][:3] == (pair.prompt, pair.rejected, pair.chosen)

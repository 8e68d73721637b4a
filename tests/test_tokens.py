"""Chat templates and plain text as tokens: where the prompt ends, where the response ends, and what stands between."""

import unicodedata
from copy import deepcopy

import chat_tokenizers as tokenizers
import pytest
from mlx_lm.tokenizer_utils import NewlineTokenizer, TokenizerWrapper
from tokenizers import normalizers

from mlx_lm.tuner.datasets import PreferenceDataset
from mlx_lm.tuner.preference.options import ConfigError
from mlx_lm.tuner.preference.tokens import PairEncoder

ROW = {"prompt": "Who?", "chosen": "It is Lima.", "rejected": "Paris."}
USER = {"role": "user", "content": "Who?"}


def pair(tokenizer, row, **options):
    return PreferenceDataset([row], tokenizer, **options)[0]


def texts(tokenizer, row, **options):
    """The three texts of a row, from its tokens."""
    return tuple(tokenizer.decode(tokens) for tokens in pair(tokenizer, row, **options)[:3])


def count(tokens, tokenizer, name):
    return tokens.count(tokenizer.convert_tokens_to_ids(name))


def test_a_raw_transformers_tokenizer_serves_too():
    for wrapped in (tokenizers.smollm(), tokenizers.deepseek_r1()):
        assert pair(wrapped._tokenizer, THOUGHT) == pair(wrapped, THOUGHT)


def test_end_of_turn_that_does_not_end_generation_is_followed_by_eos():
    assert texts(tokenizers.gemma(ends_turns=False), ROW)[1] == "It is Lima.<end_of_turn><eos>"
    assert texts(tokenizers.phi(ends_turns=False), ROW)[1] == "It is Lima.<|end|>\n<|endoftext|>"


@pytest.mark.parametrize("text", ["It is Lima.<|im_end|>", "It is Lima.<|im_end|>\n"])
def test_eos_that_the_row_holds_is_not_doubled(text):
    assert texts(tokenizers.qwen(), ROW | {"chosen": text})[1] == "It is Lima.<|im_end|>"


def test_white_space_at_the_end_of_a_response_is_kept():
    assert texts(tokenizers.qwen(), ROW | {"chosen": "It is Lima. \n"})[1] == "It is Lima. \n<|im_end|>"


def test_bos_stands_once():
    for tokenizer in (tokenizers.llama3(), tokenizers.gemma(), tokenizers.plain(), tokenizers.plain(dummy_prefix=True)):
        prompt, chosen, rejected, *_ = pair(tokenizer, ROW)
        assert prompt[0] == tokenizer.bos_token_id
        assert (prompt + chosen + rejected).count(tokenizer.bos_token_id) == 1
    tokenizer = tokenizers.plain()
    assert count(pair(tokenizer, ROW | {"prompt": "<s>Who?"}).prompt, tokenizer, "<s>") == 1


def test_plain_text():
    row = {"prompt": "Who? It is", "chosen": " Lima.", "rejected": " Paris.</s>"}
    tokenizer = tokenizers.plain()
    assert texts(tokenizer, row) == ("<s>Who? It is", " Lima.</s>", " Paris.</s>")
    implicit = {"chosen": "Who? It is Lima.", "rejected": "Who? It is Paris."}
    assert pair(tokenizer, implicit) == pair(tokenizer, row)


def test_plain_text_without_a_prompt_has_bos_for_one():
    tokenizer = tokenizers.plain()
    assert pair(tokenizer, ROW | {"prompt": ""}).prompt == [tokenizer.bos_token_id]


def test_id_0_is_a_token_like_others():
    tokenizer = tokenizers.qwen()
    assert tokenizer.convert_ids_to_tokens(0) == "!"
    chosen = pair(tokenizer, ROW | {"chosen": "Yes!"}).chosen
    assert chosen[-2:] == [0, tokenizer.eos_token_id]


# Where the tokens of prompt and response together are others at the boundary, the prompt keeps its own.
@pytest.mark.parametrize(
    ("tokenizer", "row"),
    [
        (tokenizers.qwen(), ROW | {"chosen": "\nIt is Lima."}),  # "\n\n" is one token
        (tokenizers.plain(), {"prompt": "Is it t", "chosen": "he answer", "rejected": " no"}),  # "the" is one token
        (tokenizers.plain(dummy_prefix=False), {"prompt": "say y", "chosen": "es", "rejected": " no"}),
        (tokenizers.plain(dummy_prefix=True), {"prompt": "say y", "chosen": "es", "rejected": " no"}),
    ],
)
def test_prompts_tokens_win(tokenizer, row):
    prompt, chosen, rejected, *_ = pair(tokenizer, row)
    if tokenizer.has_chat_template:
        alone = tokenizer.apply_chat_template([USER], add_generation_prompt=True)
        together = tokenizer.apply_chat_template([USER, {"role": "assistant", "content": row["chosen"]}])
    else:
        alone, together = tokenizer.encode(row["prompt"]), tokenizer.encode(row["prompt"] + row["chosen"])
    assert together[: len(alone)] != alone
    assert prompt == alone
    for response, key in ((chosen, "chosen"), (rejected, "rejected")):
        assert tokenizer.decode(prompt + response[:-1]) == tokenizer.decode(prompt) + row[key]


def test_thinking_switched_off_stands_in_the_prompt():
    tokenizer = tokenizers.qwen3()
    off = ("<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", "It is Lima.<|im_end|>")
    assert texts(tokenizer, ROW, chat_template_kwargs={"enable_thinking": False})[:2] == off
    row = ROW | {"chat_template_kwargs": {"enable_thinking": False}}
    assert texts(tokenizer, row, chat_template_kwargs={"enable_thinking": True})[:2] == off


THOUGHT = ROW | {
    "chosen": "<think>\nPeru.\n</think>\n\nIt is Lima.",
    "rejected": "<think>\nFrance.\n</think>\n\nParis.",
}


def test_generation_prompt_that_opens_thinking():
    tokenizer = tokenizers.qwen3()
    prompt, chosen, _ = texts(tokenizer, ROW, chat_template_kwargs={"open_thinking": True})
    assert prompt.endswith("<|im_start|>assistant\n<think>\n")
    assert chosen == "\n</think>\n\nIt is Lima.<|im_end|>"
    # "\n\n" is one token, but the prompt's "\n" is there first.
    assert len(tokenizer.encode("\n\n")) == 1
    assert pair(tokenizer, ROW, chat_template_kwargs={"open_thinking": True}).prompt[-1:] == tokenizer.encode("\n")
    assert texts(tokenizer, THOUGHT, chat_template_kwargs={"open_thinking": True})[1] == (
        "Peru.\n</think>\n\nIt is Lima.<|im_end|>"
    )


def test_reasoning_in_a_channel_is_put_back_as_the_model_writes_it():
    """Gemma 4's template drops the reasoning of a turn without a call."""
    template = """{% for m in messages %}{{ '<|turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}
{{- m.content + '<turn|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|turn>model\n' }}{% endif %}"""
    inner = tokenizers.byte_level(("<|turn>", "<turn|>"), None, None, "<turn|>")._tokenizer
    inner.add_tokens(["<|channel>", "<channel|>"])
    inner.chat_template = template
    chosen = [{"role": "assistant", "content": "Lima.", "reasoning_content": "Peru."}]
    assert texts(TokenizerWrapper(inner), ROW | {"chosen": chosen})[1] == (
        "<|channel>thought\nPeru.\n<channel|>Lima.<turn|>"
    )


def test_reasoning_is_not_put_behind_an_empty_thought():
    """A template that reads reasoning from a key of its own writes an empty thought before the response's."""
    template = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}
{{- '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
    tokenizer = tokenizers.with_template(tokenizers.qwen3(), template)
    assert texts(tokenizer, THOUGHT)[1] == "<think>\nPeru.\n</think>\n\nIt is Lima.<|im_end|>"
    assert texts(tokenizer, ROW)[1] == "<think>\n\n</think>\n\nIt is Lima.<|im_end|>"


def test_reasoning_stays_out_where_the_prompt_has_closed_it():
    template = tokenizers.DEEPSEEK_R1.replace("<think>\n", "</think>")
    template = template.replace("'<|Assistant|>' +", "'<|Assistant|></think>' +")
    prompt, chosen, _ = texts(tokenizers.with_template(tokenizers.deepseek_r1(), template), THOUGHT)
    assert prompt == "<|begin|><|User|>Who?<|Assistant|></think>"
    assert chosen == "It is Lima.<|end|>"


def test_generation_prompt_that_the_responses_do_not_follow_is_left_out(capsys):
    template = tokenizers.DEEPSEEK_R1.replace("<think>\n", "<draft>")
    tokenizer = tokenizers.with_template(tokenizers.deepseek_r1(), template)
    rows = [ROW, ROW | {"chosen": "<b>Lima</b>"}]
    pairs = PreferenceDataset(rows, tokenizer)
    prompt = "<|begin|><|User|>Who?<|Assistant|>"
    assert tokenizer.decode(pairs[0].prompt) == prompt
    assert tokenizer.decode(pairs[0].chosen) == "It is Lima.<|end|>"
    # "<" begins "<draft>" and "<b>": the prompt ends in front of it, not inside a token.
    assert tokenizer.decode(pairs[1].prompt) == prompt
    assert tokenizer.decode(pairs[1].chosen) == "<b>Lima</b><|end|>"
    said = capsys.readouterr().out
    assert said.count("[WARNING]") == 1
    assert "in 2 of 2 rows the chat template's generation prompt does not stand before the response" in said


def test_prompt_stays_whole_where_the_template_changes_it_before_a_response():
    row = ROW | {"system": "Be brief."}
    tokenizer = tokenizers.mistral()
    prompt, chosen, _ = pair(tokenizer, row)[:3]
    assert tokenizer.decode(prompt).replace("<s> ", "<s>") == "<s>[INST] Be brief.\n\nWho? [/INST]"
    # The response has the very tokens that it has where the template keeps the prompt.
    assert chosen == pair(tokenizer, ROW).chosen
    assert tokenizer.decode(prompt + chosen).endswith("[/INST] It is Lima.</s>")


LOOK = {"type": "function", "function": {"name": "look", "arguments": {"at": "Peru"}}}
CALL = {"role": "assistant", "content": None, "tool_calls": [LOOK]}


@pytest.mark.parametrize("name", ["gemma", "mistral", "smollm", "llama3"])
@pytest.mark.parametrize("word", ["\u00e9", "\U0001f600", "\u4e2d"])
def test_a_scored_turn_that_begins_with_a_character_of_several_tokens_is_scored_whole(name, word):
    """Also where the template writes a newline in front of it that is a byte, as in vocabularies with byte fallback."""
    tokenizer = getattr(tokenizers, name)()
    turns = [("assistant", "yes"), ("user", f"{word} the"), ("assistant", f"{word} yes")]
    chosen = [{"role": role, "content": content} for role, content in turns]
    row = {"prompt": "the", "chosen": chosen, "rejected": "no"}
    pair = PreferenceDataset([row], tokenizer)[0]
    ((start, stop),), _ = pair.unscored
    assert tokenizer.decode(pair.chosen[start:stop]).count(f"{word} the") == 1
    assert tokenizer.decode(pair.chosen[stop:]).lstrip().startswith(f"{word} yes")


@pytest.mark.parametrize(
    "name, answer",
    [
        ("qwen", unicodedata.normalize("NFD", "Vi\u1ec7t Nam \u1edf \u0111\u00e2u")),
        ("mistral", "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35"),
        ("gemma", "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \U0001f469\u200d\U0001f467"),
        ("mistral", "It is so"),
    ],
)
def test_unscored_turns_behind_text_that_the_tokenizer_changes_or_splits(name, answer):
    tokenizer = deepcopy(getattr(tokenizers, name)())
    if name == "qwen":
        # As those of Qwen's models, it composes letters.
        tokenizer._tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    spoken = [{"role": role, "content": text} for role, text in (("assistant", answer), ("user", "go on \u0e2a"))]
    read = pair(tokenizer, ROW | {"chosen": [*spoken, {"role": "assistant", "content": "The end of it"}]})
    ((start, stop),), _ = read.unscored
    first, between, last = (tokenizer.decode(read.chosen[i:j]) for i, j in ((0, start), (start, stop), (stop, None)))
    answer = unicodedata.normalize("NFC", answer) if name == "qwen" else answer
    assert first.strip().startswith(answer) and first.strip()[len(answer) :].strip() in tokenizer.all_special_tokens
    assert "go on \u0e2a" in between and "The end" not in between
    assert last.strip().startswith("The end of it")


def test_turns_of_a_long_response_are_found_without_reading_it_anew_for_each(monkeypatch):
    spoken = [{"role": role, "content": f"{i} Lima"} for i in range(30) for role in ("assistant", "user")]
    row = ROW | {"chosen": [*spoken, {"role": "assistant", "content": "Peru"}]}
    read, encode = [], PairEncoder._encode
    monkeypatch.setattr(PairEncoder, "_encode", lambda self, text: read.append(len(text)) or encode(self, text))
    found = pair(tokenizers.qwen(), row)
    assert len(found.unscored[0]) == 30
    # Each letter a few times, not a few times a turn.
    assert sum(read) < 3 * len(tokenizers.qwen().decode(found.prompt + found.chosen))


def test_tool_call_that_the_template_leaves_out_is_refused():
    with pytest.raises(
        ConfigError, match="row 0: the tokenizer's chat template does not write the call of the tool look"
    ):
        pair(tokenizers.deepseek_r1(), ROW | {"chosen": [CALL | {"content": "Hm."}]})
    named = "m.content + ((m.tool_calls or []) | map(attribute='function.name') | join)"
    tokenizer = tokenizers.with_template(tokenizers.qwen(), tokenizers.CHATML.replace("m.content", named))
    with pytest.raises(ConfigError, match="does not write the arguments of the call of the tool look"):
        pair(tokenizer, ROW | {"chosen": [CALL | {"content": "Hm."}]})


def test_prompt_that_begins_a_call():
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    call = {"role": "assistant", "content": " see.", "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}
    row = {"tools": [tool], "prompt": [USER, {"role": "assistant", "content": "Let me"}]}
    read = texts(tokenizers.qwen3(), row | {"chosen": [call], "rejected": " go."})
    assert read[0].endswith("Let me") and read[1] == " see.<tool_call>\nlook{}\n</tool_call><|im_end|>"


def test_prompt_that_begins_the_response_with_reasoning():
    begun = {"role": "assistant", "content": "It is", "reasoning_content": "Peru."}
    row = {"prompt": [USER, begun], "chosen": " Lima.", "rejected": " Paris."}
    prompt, chosen, _ = texts(tokenizers.qwen3(), row)
    assert prompt.endswith("<|im_start|>assistant\n<think>\nPeru.\n</think>\n\nIt is")
    assert chosen == " Lima.<|im_end|>"


@pytest.mark.parametrize("name", ["qwen3", "deepseek_r1"])
@pytest.mark.parametrize(
    ("begun", "chosen", "rejected"),
    [
        ("<think>\nPeru", " it is.\n</think>\n\nLima.", " is far."),
        ("<think>\n", "Peru.", "France.\n</think>\n\nParis."),
        ("<think>\nPeru.\n</think>\n\nIt is", " Lima.", " Paris."),
    ],
)
def test_prompt_that_begins_a_thought(name, begun, chosen, rejected):
    """Responses go on from it within the thought or behind it, and no empty thought stands in front of it."""
    tokenizer = getattr(tokenizers, name)()
    earlier = [{"role": "user", "content": "Say <think>\nPeru."}, {"role": "assistant", "content": "Yes."}]
    before = tokenizer.apply_chat_template([*earlier, USER], add_generation_prompt=True, tokenize=False)
    row = {"prompt": [*earlier, USER, {"role": "assistant", "content": begun}], "chosen": chosen, "rejected": rejected}
    end = tokenizer.eos_token
    assert texts(tokenizer, row) == (before.removesuffix("<think>\n") + begun, chosen + end, rejected + end)


def test_response_that_the_prompt_cannot_lead_to():
    """The system message moves, and what stands before a response depends on the response."""
    template = """{% for m in messages %}{% if m.role == 'user' %}{{ ('Be brief. ' if loop.last else '') + m.content }}
{%- else %}{{ '|' ~ m.content | length ~ ':' + m.content + eos_token }}{% endif %}{% endfor %}"""
    tokenizer = tokenizers.with_template(tokenizers.qwen3(), template)
    with pytest.raises(ConfigError, match="row 0: the chat template writes the prompt otherwise when this response"):
        pair(tokenizer, ROW)


def test_template_that_changes_what_the_response_goes_on_from():
    tokenizer = tokenizers.with_template(
        tokenizers.qwen(), tokenizers.CHATML.replace("m.content", "m.content|replace('It', 'At')")
    )
    row = {"prompt": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "It"}], "chosen": " is"}
    with pytest.raises(ConfigError, match="does not keep the assistant message that the prompt ends with"):
        pair(tokenizer, row | {"rejected": " was"})


def test_template_that_refuses_a_row():
    raising = tokenizers.byte_level((), "{{ raise_exception('only users') }}", None, "</s>")
    with pytest.raises(ConfigError, match="row 0: the tokenizer's chat template refuses the row .only users."):
        pair(raising, ROW)


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(ConfigError, match="row 0: .*surrogate|row 0: .*refuses"):
        pair(tokenizers.plain(), ROW | {"chosen": "\ud83d"})


def test_added_tokens_that_are_text_do_not_end_a_turn():
    tokenizer = tokenizers.byte_level((), None, None, "</s>")
    tokenizer.add_tokens(["</x>"])
    assert texts(tokenizer, ROW | {"chosen": "<x>Lima</x>\n"})[1] == "<x>Lima</x>\n</s>"


def test_tokenizer_that_prepares_text_when_it_encodes():
    """mlx-lm's NewlineTokenizer writes a line's end as <n>, in `encode` alone."""
    core = tokenizers.plain()._tokenizer.backend_tokenizer
    tokenizer = TokenizerWrapper(NewlineTokenizer(tokenizer_object=core, eos_token="</s>"))
    chosen = pair(tokenizer, ROW | {"chosen": "Lima\nPeru"}).chosen
    assert chosen[:-1] == core.encode("Lima<n>Peru", add_special_tokens=False).ids


def test_tokenizer_without_eos():
    tokenizer = tokenizers.byte_level((), None, None, None)
    assert tokenizer.decode(pair(tokenizer, ROW).chosen) == "It is Lima."
    # The model's configuration may name what ends generation.
    tokenizer = TokenizerWrapper(tokenizer._tokenizer, eos_token_ids=[5])
    assert pair(tokenizer, ROW).chosen[-1] == 5

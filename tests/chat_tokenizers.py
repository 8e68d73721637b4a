"""Small tokenizers with the chat templates of well-known families, made here so that tests need no network.

The texts that the templates write are those of the families' models; vocabularies are a few hundred tokens.
"""

from copy import deepcopy
from functools import lru_cache

from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The capital of France is Paris. What is the capital of Peru?\n\nIt is Lima, I think.\n",
    "Peru\n\nLima\n\nParis\n\n",
    "Be brief. user assistant system the answer is yes, the answer is no.\n\n",
] * 4
# As Llama 3's and Qwen's: newlines stay together, a word takes the space in front of it.
WORDS = Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

CHATML = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

SMOLLM = (
    """{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are SmolLM<|im_end|>\n' }}{% endif %}"""
    + CHATML
)

LLAMA3 = """{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}
{{- m.content | trim + '<|eot_id|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

# The system message stands in the first user turn; the end of turn is another token than EOS.
GEMMA = """{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}
{%- if m.role == 'system' %}{% set ns.system = m.content + '\n\n' %}
{%- else %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + ns.system }}
{{- m.content | trim + '<end_of_turn>\n' }}{% set ns.system = '' %}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

# EOS stands behind the end of the last turn wherever no generation prompt is asked for.
PHI = """{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""

# Reasoning is kept only after the last user message, where an empty block stands for none.
QWEN3 = """{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}
{%- set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- if tools %}{{ '<|im_start|>system\n# Tools\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}
{%- for m in messages %}{% if m.role == 'assistant' %}{% set text = m.content or '' %}
{%- set thought = m.reasoning_content or '' %}
{%- if '</think>' in text %}{% set thought = text.split('</think>')[0].split('<think>')[-1].strip() %}
{%- set text = text.split('</think>')[-1].strip() %}{% endif %}{{ '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.last and (loop.last or thought) %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}
{{- text }}{% for call in m.tool_calls or [] %}
{{- '<tool_call>\n' + call.function.name + call.function.arguments | tojson + '\n</tool_call>' }}{% endfor %}
{{- '<|im_end|>\n' }}{% elif m.role == 'tool' %}
{{- '<|im_start|>user\n<tool_response>' + m.content + '</tool_response><|im_end|>\n' }}{% else %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}
{%- elif open_thinking %}{{ '<think>\n' }}{% endif %}{% endif %}"""

# Reasoning is dropped from every turn, and the generation prompt opens it.
DEEPSEEK_R1 = """{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}
{{- '<|Assistant|>' + m.content.split('</think>')[-1].strip() + eos_token }}{% else %}{{ '<|User|>' + m.content }}
{%- endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"""

# The system message stands in the last user turn, and only where that is the last message of all.
MISTRAL = """{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}
{%- set ns.system = m.content + '\n\n' %}{% elif m.role == 'user' %}
{{- '[INST] ' + (ns.system if loop.last else '') + m.content + ' [/INST]' }}
{%- else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"""


def _wrapped(core, specials, template, bos, eos, end_of_turn=(), adds_bos=True):
    """`core` with special tokens behind its vocabulary, so that id 0 is a token of ordinary text."""
    fast = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos, chat_template=template)
    fast.add_special_tokens({"additional_special_tokens": list(specials)})
    if bos and adds_bos:
        fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, fast.convert_tokens_to_ids(bos))]
        )
    ends = [token for token in (eos, *end_of_turn) if token]
    return TokenizerWrapper(fast, eos_token_ids=fast.convert_tokens_to_ids(ends))


def byte_level(specials, template, bos, eos, end_of_turn=(), adds_bos=True):
    """A byte-level BPE tokenizer, as GPT-2's descendants have."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(WORDS, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False)
    )
    return _wrapped(core, specials, template, bos, eos, end_of_turn, adds_bos)


def sentence_piece(specials, template, bos, eos, end_of_turn=(), dummy_prefix=False):
    """A BPE tokenizer that writes a space as U+2581, with one put in front of each text if `dummy_prefix`."""
    characters = [chr(code) for code in range(33, 127)]
    merges = [
        ("\u2581", "t"),
        ("h", "e"),
        ("\u2581t", "he"),
        ("\u2581", "y"),
        ("e", "s"),
        ("\u2581y", "es"),
        ("y", "es"),
    ]
    tokens = ["\u2581", *characters, *("".join(merge) for merge in merges), *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {token: id for id, token in enumerate(dict.fromkeys(tokens))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True))
    replace = normalizers.Replace(" ", "\u2581")
    prepend = [normalizers.Prepend("\u2581")] if dummy_prefix else []
    core.normalizer = normalizers.Sequence([*prepend, replace])
    strip = [decoders.Strip(" ", 1, 0)] if dummy_prefix else []
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return _wrapped(core, specials, template, bos, eos, end_of_turn)


def with_template(tokenizer, template):
    """A tokenizer of the same vocabulary with another chat template."""
    copy = deepcopy(tokenizer._tokenizer)
    copy.chat_template = template
    return TokenizerWrapper(copy, eos_token_ids=tokenizer.eos_token_ids)


@lru_cache
def llama3():
    """Template and tokenizer both add BOS; EOS ends texts, `<|eot_id|>` turns."""
    names = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    return byte_level(names, LLAMA3, "<|begin_of_text|>", "<|end_of_text|>", ["<|eot_id|>"])


@lru_cache
def smollm():
    """ChatML with a system message of its own; the template goes on after EOS; BOS is `<|im_start|>`, never added."""
    return byte_level(("<|im_start|>",), SMOLLM, "<|im_start|>", "<|im_end|>", adds_bos=False)


@lru_cache
def qwen():
    """ChatML without BOS."""
    return byte_level(("<|im_start|>", "<|endoftext|>"), CHATML, None, "<|im_end|>", ["<|endoftext|>"])


@lru_cache
def qwen3():
    """ChatML with thinking; with `open_thinking` among the template's arguments the prompt opens it, as Qwen3.5's."""
    tokenizer = byte_level(("<|im_start|>",), None, None, "<|im_end|>")._tokenizer
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    tokenizer.chat_template = QWEN3
    return TokenizerWrapper(tokenizer)


@lru_cache
def gemma(ends_turns=True):
    """SentencePiece style; with `ends_turns` generation stops at `<end_of_turn>` too, as models' configurations say."""
    names = ("<start_of_turn>", "<end_of_turn>")
    return sentence_piece(names, GEMMA, "<bos>", "<eos>", ["<end_of_turn>"] if ends_turns else [])


@lru_cache
def phi(ends_turns=True):
    """EOS behind the end of turn."""
    names = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    return byte_level(names, PHI, None, "<|endoftext|>", ["<|end|>"] if ends_turns else [])


@lru_cache
def deepseek_r1():
    """Thinking that the generation prompt opens and that the template drops from every turn."""
    tokenizer = byte_level(("<|User|>", "<|Assistant|>"), None, "<|begin|>", "<|end|>")._tokenizer
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = DEEPSEEK_R1
    return TokenizerWrapper(tokenizer)


@lru_cache
def mistral():
    """A system message that disappears from the prompt's text once a response follows."""
    return sentence_piece((), MISTRAL, "<s>", "</s>", dummy_prefix=True)


@lru_cache
def plain(dummy_prefix=None):
    """No chat template; BOS added. Byte-level, or SentencePiece style where `dummy_prefix` is given."""
    if dummy_prefix is None:
        return byte_level((), None, "<s>", "</s>")
    return sentence_piece((), None, "<s>", "</s>", dummy_prefix=dummy_prefix)

"""Chat templates in the style of twelve families of models, in words of our own, each with a small tokenizer.

Each writes what its family's models read: markers, where a system message stands, how reasoning opens and closes, and
how tool calls are written. What they refuse, their families' templates refuse too.
"""

from functools import lru_cache

import chat_tokenizers
from mlx_lm.tokenizer_utils import TokenizerWrapper

# Header, content, end of turn; a call is an object with `parameters`, one a turn; results have the role ipython.
LLAMA3 = """{{ bos_token }}{% for m in messages %}
{%- if m.tool_calls %}{% if m.tool_calls | length > 1 %}{{ raise_exception('one call a turn') }}{% endif %}
{%- set call = m.tool_calls[0].function %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}<|eot_id|>' }}
{%- else %}{{ '<|start_header_id|>' + ('ipython' if m.role == 'tool' else m.role) + '<|end_header_id|>\n\n' }}
{%- if tools and m.role == 'user' and loop.first %}{{ 'Functions: ' + tools | tojson + '\n\n' }}{% endif %}
{{- m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

# Calls between tags, one JSON object a line; results in a user turn.
QWEN25 = """{%- if tools %}{{ '<|im_start|>system\n<tools>' + tools | tojson + '</tools><|im_end|>\n' }}
{%- elif messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}{% endif %}
{%- for m in messages %}{% if m.role == 'tool' %}
{{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
{%- else %}{{ '<|im_start|>' + m.role }}{% if m.content %}{{ '\n' + m.content }}{% endif %}
{%- for call in m.tool_calls or [] %}{{ '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson + '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# The generation prompt opens the thought, an answer without one has it empty; arguments are parameters of their own.
QWEN35 = """{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}
{%- set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- if tools %}{{ '<|im_start|>system\n<tools>' + tools | tojson + '</tools><|im_end|>\n' }}{% endif %}
{%- for m in messages %}{% if m.role == 'assistant' %}{% set text = m.content | trim %}
{%- set thought = (m.reasoning_content or '') | trim %}{% if not thought and '</think>' in text %}
{%- set thought = text.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
{%- set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ text }}
{%- for call in m.tool_calls or [] %}{{ '<tool_call>\n<function=' + call.function.name + '>\n' }}
{%- for key, value in call.function.arguments | items %}
{{- '<parameter=' + key + '>\n' + value | string + '\n</parameter>\n' }}{% endfor %}
{{- '</function>\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{{- '<think>\n\n</think>\n\n' if enable_thinking is defined and enable_thinking is false else '<think>\n' }}
{%- endif %}"""

# Only users and the model, by turns; a system message is refused.
GEMMA = """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

# Roles that it does not know are left out without a word.
PHI3 = """{% for m in messages %}{% if m.role in ['system', 'user', 'assistant'] %}
{{- '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""

# Tools stand before the last user turn, calls are a list behind a mark, results have a mark of their own.
MISTRAL = """{{ bos_token }}{% set ns = namespace(last=0, system='') %}{% for m in messages %}{% if m.role == 'user' %}
{%- set ns.last = loop.index0 %}{% elif m.role == 'system' %}{% set ns.system = m.content + '\n\n' %}{% endif %}
{%- endfor %}
{%- for m in messages %}{% if m.role == 'user' %}{% if tools and loop.index0 == ns.last %}
{{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}
{{- '[INST]' + (ns.system if loop.index0 == ns.last else '') + m.content + '[/INST]' }}
{%- elif m.role == 'tool' %}{{ '[TOOL_RESULTS]{"content": ' + m.content | tojson + '}[/TOOL_RESULTS]' }}
{%- elif m.tool_calls %}{{ '[TOOL_CALLS][' }}{% for call in m.tool_calls %}
{{- call.function | tojson + (']' if loop.last else ', ') }}{% endfor %}{{ eos_token }}
{%- elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"""

# Calls without the content beside them, their arguments put into the text as they are; reasoning is dropped.
DEEPSEEK = """{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}
{%- for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}
{%- elif m.role == 'assistant' and m.tool_calls %}{{ '<|Assistant|>' }}{% for call in m.tool_calls %}
{{- '<|call|>' + call.function.name + '\n```json\n' + call.function.arguments + '\n```' }}{% endfor %}{{ eos_token }}
{%- elif m.role == 'assistant' %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] | trim + eos_token }}
{%- elif m.role == 'tool' %}{{ '<|output|>' + m.content }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"""

# Channels: reasoning in one, calls in another, the answer in the last; a result names its call.
GPT_OSS = """{% set ns = namespace(name='') %}{{ '<|start|>system<|message|>You are a model.<|end|>' }}
{%- if tools %}{{ '<|start|>developer<|message|>' + tools | tojson + '<|end|>' }}{% endif %}
{%- for m in messages %}{% if m.role == 'assistant' %}{% if m.thinking and loop.last %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}
{%- if m.tool_calls %}{% set call = m.tool_calls[0].function %}{% set ns.name = call.name %}
{{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' }}
{{- call.arguments | tojson + '<|call|>' }}
{%- else %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}
{{- '<|return|>' if loop.last else '<|end|>' }}
{%- endif %}{% elif m.role == 'tool' %}
{{- '<|start|>functions.' + ns.name + ' to=assistant<|message|>' + m.content | tojson + '<|end|>' }}
{%- else %}{{ '<|start|>' + ('developer' if m.role == 'system' else m.role) + '<|message|>' + m.content + '<|end|>' }}
{%- endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""

# A line's end before the thought, which an answer without one has empty; arguments by key and value.
GLM = """{{ '[gMASK]<sop>' }}{% if tools %}{{ '<|system|>\n' + tools | tojson }}{% endif %}
{%- set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}
{%- set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}{% if m.role == 'assistant' %}{% set text = m.content %}
{%- set thought = m.reasoning_content or '' %}{% if not thought and '</think>' in text %}
{%- set thought = text.split('</think>')[0].split('<think>')[-1] %}
{%- set text = text.split('</think>')[-1] %}{% endif %}
{{- '<|assistant|>' }}{% if loop.index0 > ns.last and thought %}{{ '\n<think>' + thought | trim + '</think>' }}
{%- else %}{{ '\n<think></think>' }}{% endif %}{% if text | trim %}{{ '\n' + text | trim }}{% endif %}
{%- for call in m.tool_calls or [] %}{{ '\n<tool_call>' + call.function.name }}
{%- for key, value in call.function.arguments.items() %}
{{- '\n<arg_key>' + key + '</arg_key>\n<arg_value>' + value | string + '</arg_value>' }}{% endfor %}
{{- '\n</tool_call>' }}{% endfor %}
{%- elif m.role == 'tool' %}{{ '<|observation|>\n<tool_response>' + m.content + '</tool_response>' }}
{%- else %}{{ '<|' + m.role + '|>\n' + m.content }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

# The generation prompt opens the thought; answers without one have it empty and without a line's end.
NEMOTRON = """{% if messages[0].role != 'system' %}{{ '<|im_start|>system\n<|im_end|>\n' }}{% endif %}
{%- if tools %}{{ '<tools>' + tools | tojson + '</tools>\n' }}{% endif %}{% for m in messages %}
{%- if m.role == 'assistant' %}{% set text = m.content %}{% if m.reasoning_content %}
{%- set text = '<think>\n' + m.reasoning_content + '\n</think>\n' + text %}{% endif %}
{%- if '<think>' not in text and '</think>' not in text %}{% set text = '<think></think>' + text %}{% endif %}
{{- '<|im_start|>assistant\n' + text | trim }}{% for call in m.tool_calls or [] %}
{{- '<tool_call>\n<function=' + call.function.name + '>\n' }}{% for key, value in call.function.arguments | items %}
{{- '<parameter=' + key + '>\n' + value | string + '\n</parameter>\n' }}{% endfor %}
{{- '</function>\n</tool_call>\n' }}{% endfor %}{{ '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response>\n<|im_end|>\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"""

THINK = ("<think>", "</think>")
# Family: template, special tokens, BOS, EOS, further ends of a turn, tokens of text.
FAMILIES = {
    "llama3": (
        LLAMA3,
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|begin_of_text|>",
        "<|end_of_text|>",
        ["<|eot_id|>"],
        (),
    ),
    "qwen25": (QWEN25, ("<|im_start|>",), None, "<|im_end|>", [], ("<tool_call>", "</tool_call>")),
    "qwen3": (chat_tokenizers.QWEN3, ("<|im_start|>",), None, "<|im_end|>", [], THINK),
    "qwen35": (QWEN35, ("<|im_start|>",), None, "<|im_end|>", [], THINK),
    "gemma": (GEMMA, ("<start_of_turn>", "<end_of_turn>"), "<bos>", "<eos>", ["<end_of_turn>"], ()),
    "phi3": (PHI3, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), None, "<|endoftext|>", ["<|end|>"], ()),
    "mistral": (MISTRAL, ("[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]"), "<s>", "</s>", [], ()),
    "deepseek": (DEEPSEEK, ("<|User|>", "<|Assistant|>"), "<|begin|>", "<|end|>", [], THINK),
    "gpt_oss": (
        GPT_OSS,
        ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>"),
        None,
        "<|return|>",
        ["<|call|>"],
        (),
    ),
    "glm": (GLM, ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>"), None, "<|endoftext|>", ["<|user|>"], THINK),
    "nemotron": (NEMOTRON, ("<|im_start|>",), None, "<|im_end|>", [], THINK),
    "smollm": (chat_tokenizers.SMOLLM, ("<|im_start|>",), "<|im_start|>", "<|im_end|>", [], ()),
}


@lru_cache
def tokenizer(family):
    """The tokenizer of a family."""
    template, specials, bos, eos, ends, texts = FAMILIES[family]
    inner = chat_tokenizers.byte_level(
        specials, None, bos, eos, ends, adds_bos=bos not in (None, "<|im_start|>")
    )._tokenizer
    inner.add_tokens(list(texts))
    inner.chat_template = template
    return TokenizerWrapper(inner, eos_token_ids=inner.convert_tokens_to_ids([eos, *ends]))

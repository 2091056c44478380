"""Chat templates in the manner of the released ones, written for these tests; each marked copy is the plain one with marks.

``(plain, marked, prompt_arguments)`` by name. What they share with the releases: V2 answers after "Assistant:"; V3 hoists the system
message, opens tool results once and closes them before an answer; R1 drops what was thought, though its prompt opens a thought; V3.1
closes a thought in every turn; V3.2 thinks in the last turn alone, and begins that in the user's; Kimi-K2 gives each turn a header.
"""

import re

MARKS = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")
USER, ASSISTANT = "<|User|>", "<|Assistant|>"

V2 = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ 'User: ' + m.content + '\n\n' }}{% elif m.role == 'assistant' %}
{{- 'Assistant:' }}{% generation %}{{ ' ' + m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content + '\n\n' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""

V25 = """{{ bos_token }}{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}
{%- for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}{% elif m.role == 'assistant' %}
{{- '<|Assistant|>' }}{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}"""

V3 = """{% set ns = namespace(called=false, results=false) %}{{ bos_token }}
{%- for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.results = false %}{{ '<|User|>' + m.content }}
{%- elif m.role == 'tool' %}{{ '<result>' if ns.results else '<results><result>' }}{{ m.content + '</result>' }}
{%- set ns.results = true %}
{%- elif m.role == 'assistant' and 'tool_calls' in m %}{% set ns.results = false %}{{ '<|Assistant|>' }}{% generation %}{{ m.content }}
{%- for call in m.tool_calls %}{{ '<call>' + call.function.name + '\n' + call.function.arguments + '</call>' }}{% endfor %}
{{- eos_token }}{% endgeneration %}
{%- elif m.role == 'assistant' %}{{ '</results>' if ns.results else '<|Assistant|>' }}{% set ns.results = false %}{% generation %}
{{- THOUGHT + eos_token }}{% endgeneration %}{% endif %}{% endfor %}
{%- if ns.results %}{{ '</results>' }}{% elif add_generation_prompt %}{{ '<|Assistant|>PROMPT' }}{% endif %}"""
R1 = V3.replace("THOUGHT", "m.content.split('</think>')[-1]").replace("PROMPT", "<think>\\n")
V3 = V3.replace("THOUGHT", "m.content").replace("PROMPT", "")

V31 = """{% if thinking is not defined %}{% set thinking = false %}{% endif %}{% set ns = namespace(asked=false) %}{{ bos_token }}
{%- for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.asked = true %}{{ '<|User|>' + m.content }}
{%- elif m.role == 'tool' %}{% set ns.asked = false %}{{ '<result>' + m.content + '</result>' }}
{%- elif m.role == 'assistant' %}{% if ns.asked %}{{ '<|Assistant|></think>' }}{% endif %}{% set ns.asked = false %}{% generation %}
{{- m.content.split('</think>', 1)[-1] }}
{%- for call in m.tool_calls or [] %}{{ '<call>' + call.function.name + '<sep>' + call.function.arguments + '</call>' }}{% endfor %}
{{- eos_token }}{% endgeneration %}{% endif %}{% endfor %}
{%- if add_generation_prompt and ns.asked %}{{ '<|Assistant|>' }}{{ '<think>' if thinking else '</think>' }}{% endif %}"""

V32 = """{% set ns = namespace(last=-1) %}{% for m in messages if m.role == 'user' %}{% set ns.last = ns.last + 1 %}{% endfor %}
{%- set count = namespace(users=-1) %}{{ bos_token }}{% for m in messages %}
{%- if m.role == 'user' %}{% set count.users = count.users + 1 %}{{ '<|User|>' + m.content + '<|Assistant|>' }}
{{- '<think>' if thinking and count.users == ns.last else '</think>' }}
{%- elif m.role == 'tool' %}{{ '\n\n<result>' + m.content + '</result>\n\n' }}{{ '<think>' if thinking and count.users == ns.last else '</think>' }}
{%- elif m.role == 'assistant' %}{% generation %}
{%- if thinking and count.users == ns.last %}{{ m.get('reasoning_content', '') + '</think>' }}{% endif %}{{ m.content }}
{%- for call in m.tool_calls or [] %}{% if call.function.arguments is mapping %}{{ '<call ' + call.function.name + '>' }}
{%- for name, value in call.function.arguments.items() %}{{ '<' + name + '>' + value | string }}{% endfor %}{{ '</call>' }}{% endif %}
{%- endfor %}{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|User|>\n<|Assistant|><think>' }}{% endif %}"""

K2 = """{% if tools %}{{ '<|im_system|>tool_declare<|im_middle|>' + tools | tojson + '<|im_end|>' }}{% endif %}
{%- for m in messages %}{{ '<|im_' + m.role + '|>' + m.role + '<|im_middle|>' }}{% if m.role == 'assistant' %}{% generation %}
{{- m.content }}{% for call in m.tool_calls or [] %}{{ '<|call|>' + call.function.name + '<|args|>' + call.function.arguments }}{% endfor %}
{{- '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_assistant|>assistant<|im_middle|>' }}{% endif %}"""

# Reasoning of earlier turns is dropped, as Qwen3 and R1-0528 do.
LAST_THOUGHT = """{% set ns = namespace(last=-1) %}{% for m in messages if m.role == 'user' %}{% set ns.last = ns.last + 1 %}{% endfor %}
{%- set count = namespace(users=-1) %}{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{% set count.users = count.users + 1 %}
{{- '<|User|>' + m.content }}{% elif m.role == 'assistant' %}{{ '<|Assistant|>' }}{% generation %}
{{- m.content if count.users == ns.last else m.content.split('</think>')[-1] }}{{ eos_token }}{% endgeneration %}
{%- else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}"""

# One EOS, after the whole chat: the last turn's.
CLOSED = """{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|Assistant|>' }}{% generation %}{{ m.content }}
{%- if loop.last %}{{ eos_token }}{% endif %}{% endgeneration %}{% else %}{{ '<|User|>' + m.content }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|>' }}{% elif messages[-1].role != 'assistant' %}{{ eos_token }}{% endif %}"""

TRIMMED = """{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|Assistant|>' }}{% generation %}
{{- m.content | trim + eos_token }}{% endgeneration %}{% else %}{{ '<|User|>' + m.content | trim }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}"""

MARKED = {
    "v2": (V2, {}),
    "v2.5": (V25, {}),
    "v3": (V3, {}),
    "r1": (R1, {}),
    "v3.1": (V31, {}),
    "v3.1-thinking": (V31, {"thinking": True}),
    "v3.2": (V32, {"thinking": False}),
    "v3.2-thinking": (V32, {"thinking": True}),
    "kimi-k2": (K2, {}),
    "last-thought": (LAST_THOUGHT, {}),
    "closed-once": (CLOSED, {}),
    "trimmed": (TRIMMED, {}),
}
CALLING = ("v3", "r1", "v3.1", "v3.1-thinking", "v3.2", "v3.2-thinking", "kimi-k2")

REVERSED = TRIMMED.replace("m in messages", "m in messages | reverse")
LAST_WORD = TRIMMED + "{{ messages[0].content }}"


def plain(marked: str) -> str:
    """The template without its marks; what stands around them closes up, as it does there."""
    return MARKS.sub("{#- -#}", marked)

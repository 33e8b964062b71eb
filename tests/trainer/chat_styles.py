"""Chat templates with the behaviour of those of well-known families, written for the tests."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Style:
    """A chat template, and the tokens that end an answer of its family."""

    template: str
    ends: tuple[str, ...] = ("<|im_end|>",)
    others: tuple[str, ...] = ()
    """Its other special tokens."""


_JSON_CALLS = (
    "{% for call in m.tool_calls or [] %}<tool_call>{{ {'name': call.function.name, 'arguments': "
    "call.function.arguments} | tojson }}</tool_call>{% endfor %}"
)
_CHATML_TOOLS = (
    "{% if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}\n{% endif %}"
    "<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools><|im_end|>\n"
    "{% elif messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}"
)
_ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_LAST_QUESTION = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
)


def _thinking(condition: str, ask: str) -> str:
    """A template in the manner of Qwen3, with reasoning where the condition holds."""
    return (
        f"{_CHATML_TOOLS}{_LAST_QUESTION}"
        "{% for m in messages %}"
        "{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n"
        "{% elif m.role == 'assistant' %}<|im_start|>assistant\n"
        f"{{% if {condition} %}}<think>\n{{{{ m.reasoning_content or '' }}}}\n</think>\n\n{{% endif %}}"
        f"{{{{ m.content }}}}{_JSON_CALLS}<|im_end|>\n"
        "{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>{{ m.content }}</tool_response><|im_end|>\n"
        f"{{% endif %}}{{% endfor %}}{ask}"
    )


STYLES = {
    "chatml": Style(
        "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>\n{% endfor %}" + _ASK
    ),
    "llama3": Style(
        "<|start_header_id|>system<|end_header_id|>\n\nToday: {{ strftime_now('%d %b %Y') }}\n"
        "{% for tool in tools or [] %}{{ tool | tojson(indent=4) }}\n{% endfor %}"
        "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}"
        "{% set messages = messages[1:] %}{% endif %}"
        "<|eot_id|>{% for m in messages %}"
        "{% if m.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>\n\n{{ m.content | tojson }}<|eot_id|>"
        "{% elif m.tool_calls %}{% if m.tool_calls | length > 1 %}{{ raise_exception('one call only') }}{% endif %}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{{ {'name': m.tool_calls[0].function.name, 'parameters': "
        "m.tool_calls[0].function.arguments} | tojson }}<|eot_id|>"
        "{% else %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ("<|end_of_text|>", "<|eot_id|>"),
        ("<|start_header_id|>", "<|end_header_id|>"),
    ),
    "qwen2.5": Style(_thinking("false", _ASK)),
    "qwen3": Style(_thinking("loop.index0 > ns.last and (loop.last or m.reasoning_content)", _ASK)),
    "qwen3.5": Style(
        _thinking(
            "loop.index0 > ns.last",
            "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
        )
    ),
    "gemma": Style(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ("<eos>", "<end_of_turn>"),
        ("<start_of_turn>",),
    ),
    "phi3": Style(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}",
        ("<|endoftext|>", "<|end|>"),
    ),
    "phi4": Style(
        "{% for m in messages %}{% if m.role in ['system', 'user', 'assistant'] %}"
        "<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}",
        ("<|im_end|>",),
        ("<|im_sep|>",),
    ),
    "mistral": Style(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
        "{% set messages = messages[1:] %}{% endif %}"
        f"{_LAST_QUESTION}{{% for m in messages %}}{{% if m.role == 'user' %}}"
        "{% if tools and loop.index0 == ns.last %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
        "[INST]{% if system and loop.index0 == ns.last %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]"
        "{% elif m.role == 'tool' %}"
        "{% if m.tool_call_id | length != 9 %}{{ raise_exception('9 characters') }}{% endif %}"
        "[TOOL_RESULTS]{{ {'content': m.content, 'call_id': m.tool_call_id} | tojson }}[/TOOL_RESULTS]"
        "{% elif m.tool_calls %}[TOOL_CALLS]{% for call in m.tool_calls %}{{ {'name': call.function.name, 'arguments': "
        "call.function.arguments, 'id': call.id} | tojson }}{% endfor %}</s>"
        "{% else %} {{ m.content | trim }}</s>{% endif %}{% endfor %}",
        ("</s>",),
        ("[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    ),
    "harmony": Style(
        "<|start|>system<|message|>Date: {{ strftime_now('%Y-%m-%d') }}<|end|>"
        "{% if messages[0].role in ['system', 'developer'] %}{% set rules = messages[0].content %}"
        "{% set messages = messages[1:] %}{% endif %}"
        "{% if rules or tools %}<|start|>developer<|message|>{{ rules }}"
        "{% for tool in tools or [] %}{{ tool | tojson }}"
        "{% endfor %}<|end|>{% endif %}{% for m in messages %}"
        "{% if m.role == 'user' %}<|start|>user<|message|>{{ m.content }}<|end|>"
        "{% elif m.role == 'tool' %}<|start|>functions to=assistant<|message|>{{ m.content | tojson }}<|end|>"
        "{% elif m.tool_calls %}{% set later = messages[loop.index:] | selectattr('role', 'equalto', 'assistant') "
        "| rejectattr('tool_calls') | list %}"
        "{% if m.thinking and not later %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>"
        "{% endif %}"
        "<|start|>assistant to=functions.{{ m.tool_calls[0].function.name }}<|channel|>commentary json<|message|>"
        "{{ m.tool_calls[0].function.arguments | tojson }}<|call|>"
        "{% elif loop.last and not add_generation_prompt %}"
        "{% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
        "<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>"
        "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        ("<|return|>", "<|call|>"),
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>"),
    ),
    "glm4.5": Style(
        "[gMASK]<sop>{% if tools %}<|system|>\n{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}"
        f"{_LAST_QUESTION}{{% for m in messages %}}"
        "{% if m.role == 'tool' %}<|observation|>\n{{ m.content }}"
        "{% elif m.role == 'assistant' %}<|assistant|>\n<think>"
        "{% if loop.index0 > ns.last %}{{ m.reasoning_content }}{% endif %}</think>\n{{ m.content }}"
        "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function.name }}"
        "{% for key, value in call.function.arguments.items() %}<arg_key>{{ key }}</arg_key>"
        "<arg_value>{{ value }}</arg_value>{% endfor %}</tool_call>{% endfor %}"
        "{% else %}<|{{ m.role }}|>\n{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        ("<|endoftext|>", "<|user|>", "<|observation|>"),
        ("<|assistant|>", "<|system|>"),
    ),
    "deepseek-r1": Style(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}"
        "{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
        "{% elif m.role == 'assistant' %}<|Assistant|>{{ m.content.split('</think>')[-1] }}<|eos|>"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}",
        ("<|eos|>",),
        ("<|User|>", "<|Assistant|>"),
    ),
    "granite": Style(
        "{% for m in ([] if messages[0].role == 'system' else [{'role': 'system', 'content': 'You are helpful.'}]) "
        "+ messages %}<|role|>{{ 'tool_response' if m.role == 'tool' else m.role }}<|end_role|>"
        f"{{{{ m.content }}}}{_JSON_CALLS}<|end_of_text|>\n"
        "{% if loop.first and tools %}<|role|>tools<|end_role|>{{ tools | tojson }}<|end_of_text|>\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|role|>assistant<|end_role|>{% endif %}",
        ("<|end_of_text|>",),
        ("<|role|>", "<|end_role|>"),
    ),
    "cohere": Style(
        "{% for m in messages %}<|turn|>{% if m.role == 'user' %}<|user|>{{ m.content }}"
        "{% elif m.role == 'assistant' %}<|bot|><|response|>{{ m.content }}<|end_response|>"
        "{% else %}<|system|>{{ m.content }}{% endif %}<|end_turn|>{% endfor %}"
        "{% if add_generation_prompt %}<|turn|><|bot|><|response|>{% endif %}",
        ("<|end_turn|>",),
        ("<|turn|>", "<|bot|>", "<|response|>", "<|end_response|>"),
    ),
}


def reasoned_chat(turns: int, name: str) -> dict[str, Any]:
    """Return a chat whose answers have reasoning, which Qwen3's template omits from earlier ones."""
    messages = []
    for number in range(turns):
        messages += [
            {"role": "user", "content": f"Chat {name}: who keeps the lighthouse of Brinewick, question {number}?"},
            {"role": "assistant", "content": f"Old Marta {number}.", "reasoning_content": f"It is green {number}."},
        ]
    return {"messages": messages}


def share_prefixes(manifest: Path) -> None:
    """Give a job rows that share prefixes: packed chats that become several rows."""
    rows = manifest.with_name("reasoned.jsonl")
    rows.write_text("".join(f"{json.dumps(reasoned_chat(3, str(number)))}\n" for number in range(40)))
    job = yaml.safe_load(manifest.read_text())
    job["spec"]["dataset"] = {
        "train": [{"uri": f"file://{rows}"}],
        "packing": True,
        "maxLength": 320,
        "chatTemplate": STYLES["qwen3"].template,
    }
    manifest.write_text(yaml.safe_dump(job))

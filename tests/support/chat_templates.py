"""Chat templates after the families in use, reduced to what makes each of them different."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Family:
    """A template with its special tokens, and how an answer ends in it.

    Args:
        template: Jinja.
        specials: its special tokens.
        end: what ends an answer.
        bos: first token.
        eos: the token that ends a text.
        system: whether it takes a system turn.
        tools: whether it takes tool calls and tool turns; the call is then laid out as `call` says.
        call: the words of an assistant turn that calls a tool.
        kind: of tokenizer.
    """

    template: str
    specials: tuple[str, ...]
    end: str
    bos: str | None = None
    eos: str | None = None
    system: bool = True
    tools: bool = False
    call: str = ""
    kind: str = "byte_level"


_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CHATML_TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n"
    "</tool_response><|im_end|>\n{% else %}<|im_start|>{{ m.role }}{% if m.content %}\n{{ m.content }}{% endif %}"
    '{% for c in m.tool_calls or [] %}\n<tool_call>\n{"name": "{{ c.function.name }}"}\n</tool_call>{% endfor %}'
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_THOUGHTS = (
    "{% set last = namespace(user=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% set words = m.content %}"
    "{% set thought = '' %}{% if '</think>' in words %}"
    "{% set thought = words.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set words = words.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{% if loop.index0 > last.user and (loop.last or thought) %}<think>\n{{ thought }}\n</think>\n\n{% endif %}"
    "{{ words }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if no_thoughts %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
_LLAMA2 = (
    "{% set system = namespace(text='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set system.text = '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' %}{% elif m.role == 'user' %}"
    "{{ bos_token }}[INST] {{ system.text }}{{ m.content.strip() }} [/INST]{% set system.text = '' %}"
    "{% else %} {{ m.content.strip() }} {{ eos_token }}{% endif %}{% endfor %}"
)
_LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}"
    '<|end_header_id|>\n\n{% if m.tool_calls %}{"name": "{{ m.tool_calls[0].function.name }}"}'
    "{% else %}{{ m.content | trim }}{% endif %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{% set pending = namespace(call=false) %}{% for m in messages %}{% if m.role == 'user' %}"
    "[INST] {{ m.content }} [/INST]{% elif m.role == 'system' %}[SYSTEM] {{ m.content }} [/SYSTEM]"
    "{% elif m.role == 'tool' %}{% if not pending.call %}{{ raise_exception('nobody called this tool') }}{% endif %}"
    "[TOOL_RESULTS] {{ m.content }} [/TOOL_RESULTS]{% elif m.tool_calls %}{% set pending.call = true %}"
    "[TOOL_CALLS] {{ m.tool_calls[0].function.name }}{{ eos_token }}{% else %} {{ m.content }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)
_ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
_PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
_DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<|Assistant|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}"
    "{% else %}{{ m.content }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
_MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TWO_ENDS = (
    "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}{% if m.role == 'assistant' %}\n</answer>{{ eos_token }}"
    "{% endif %}\n\n{% endfor %}{% if add_generation_prompt %}### assistant:\n{% endif %}"
)
_IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")

FAMILIES = {
    "chatml": Family(_CHATML, _IM, "<|im_end|>", eos="<|im_end|>"),
    "chatml, other eos": Family(_CHATML, _IM, "<|im_end|>", eos="<|endoftext|>"),
    "qwen2 with tools": Family(
        _CHATML_TOOLS,
        (*_IM, "<tool_call>", "</tool_call>"),
        "<|im_end|>",
        eos="<|im_end|>",
        tools=True,
        call='<tool_call>\n{"name": "weather"}\n</tool_call>',
    ),
    "qwen3, drops thoughts": Family(_THOUGHTS, (*_IM, "<think>", "</think>"), "<|im_end|>", eos="<|im_end|>"),
    "llama2": Family(_LLAMA2, ("<s>", "</s>"), " </s>", bos="<s>", eos="</s>", kind="metaspace"),
    "llama3": Family(
        _LLAMA3,
        ("<|begin|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
        bos="<|begin|>",
        eos="<|eot_id|>",
        tools=True,
        call='{"name": "weather"}',
    ),
    "gemma": Family(
        _GEMMA,
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        "<end_of_turn>",
        bos="<bos>",
        eos="<eos>",
        system=False,
        kind="metaspace",
    ),
    "mistral": Family(
        _MISTRAL,
        ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        "</s>",
        bos="<s>",
        eos="</s>",
        tools=True,
        call="[TOOL_CALLS] weather",
        kind="metaspace",
    ),
    "zephyr": Family(_ZEPHYR, ("<s>", "</s>"), "</s>", bos="<s>", eos="</s>", kind="metaspace"),
    "phi, eos after the last turn": Family(
        _PHI, ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>"), "<|end|>", eos="<|endoftext|>"
    ),
    "deepseek, asks for thoughts": Family(
        _DEEPSEEK,
        ("<|bos|>", "<|eos|>", "<|User|>", "<|Assistant|>", "<think>"),
        "<|eos|>",
        bos="<|bos|>",
        eos="<|eos|>",
    ),
    "marked": Family(_MARKED, _IM, "<|im_end|>", eos="<|im_end|>"),
    "marked, end left out": Family(
        _MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"),
        _IM,
        "<|im_end|>",
        eos="<|im_end|>",
    ),
    "an end of two parts": Family(_TWO_ENDS, ("<s>", "</s>"), "\n</answer></s>", bos="<s>", eos="</s>"),
}

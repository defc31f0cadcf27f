# SPDX-License-Identifier: Apache-2.0
"""Chat templates for conversations with pictures: the tokenizer's own with a header, or the Vicuna form."""

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template


# What the templates of text models do not know: contents that are lists of parts. The header makes text of them and
# hands everything else on. Names are long so that they meet none of the template's; lists are joined, not appended to,
# because transformers' jinja sandbox forbids changing them. Every tag strips what is before it, and the newline after
# the last tag is swallowed (`trim_blocks`), which also leaves the lexer at the start of a line: the template behind
# renders exactly as it does alone.
_HEADER = """\
{%- set multimodal_header = namespace(messages=[], content='') -%}
{%- for multimodal_message in messages -%}
{%- if multimodal_message['content'] is defined and multimodal_message['content'] is sequence \
and multimodal_message['content'] is not string and multimodal_message['content'] is not mapping -%}
{%- set multimodal_header.content = '' -%}
{%- for multimodal_part in multimodal_message['content'] -%}
{%- if multimodal_part is string -%}
{%- set multimodal_header.content = multimodal_header.content + multimodal_part -%}
{%- elif multimodal_part['type'] in ['image', 'image_url'] -%}
{%- set multimodal_header.content = multimodal_header.content + IMAGE_TOKEN -%}
{%- elif multimodal_part['type'] == 'text' or (multimodal_part['type'] is undefined and 'text' in multimodal_part) -%}
{%- set multimodal_header.content = multimodal_header.content + multimodal_part['text'] -%}
{%- else -%}
{{- raise_exception('A message has a part of type "' ~ multimodal_part['type'] ~ '"; expected "text" or "image".') -}}
{%- endif -%}
{%- endfor -%}
{%- set multimodal_header.messages = multimodal_header.messages \
+ [dict(multimodal_message, content=multimodal_header.content)] -%}
{%- else -%}
{%- set multimodal_header.messages = multimodal_header.messages + [multimodal_message] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = multimodal_header.messages %}
"""

# Templates of text models seldom mark what the model is to say, which `return_assistant_tokens_mask`, and by it TRL, go
# by. Around such a template: it becomes a macro, by which each answer is found as what a conversation goes on with
# behind its prompt. Where a template rewrites its history, only answers that begin as they were asked for are marked.
# A question renders once, as before. `{%+` keeps what stands before the tag.
_GENERATION = re.compile(r"\{%[-+]?\s*generation\b")
_MARKED = """\
{%- macro multimodal_render(messages, add_generation_prompt) %}
TEMPLATE{%+ endmacro -%}
{%- set multimodal_marks = namespace(text=multimodal_render(messages, add_generation_prompt), done=0) -%}
{%- for multimodal_message in messages -%}
{%- if not add_generation_prompt and loop.index0 and multimodal_message['role'] == 'assistant' \
and messages[loop.index0 - 1]['role'] not in ['assistant', 'system'] -%}
{%- set multimodal_prompt = multimodal_render(messages[:loop.index0], true) -%}
{%- set multimodal_answered = multimodal_render(messages[:loop.index], false).rstrip() -%}
{%- if multimodal_answered.startswith(multimodal_prompt) and multimodal_marks.text.startswith(multimodal_answered) -%}
{{- multimodal_marks.text[multimodal_marks.done:multimodal_prompt | length] -}}
{%- generation -%}
{{- multimodal_answered[multimodal_prompt | length:] -}}
{%- endgeneration -%}
{%- set multimodal_marks.done = multimodal_answered | length -%}
{%- endif -%}
{%- endif -%}
{%- endfor -%}
{{- multimodal_marks.text[multimodal_marks.done:] -}}
"""

# A text that no template writes by itself.
_PROBE = "what is in this picture 7c41"

VICUNA_SYSTEM_TEXT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

# What is neither a user's message nor an answer, and the end of the loop over messages.
END_OF_TURNS = """\
{%- elif message['role'] == 'system' -%}
{{- raise_exception('Only the first message can be a system message.') -}}
{%- else -%}
{{- raise_exception('A message has the role "' ~ message['role'] ~ '"; expected "system", "user" or "assistant".') -}}
{%- endif -%}
{%- endfor -%}
"""

# Vicuna v1.1, as LLaVA-1.5 and MoE-LLaVA were trained with: turns joined by one space, answers closed by STOP_TEXT,
# nothing between an answer and the next turn. `generation` marks what `return_assistant_tokens_mask` returns; it must
# not stand inside a macro, where transformers counts its offsets wrongly.
_VICUNA_TEXT_TEMPLATE = """\
{%- if messages and messages[0]['role'] == 'system' -%}
{%- set turns = messages[1:] -%}
{{- messages[0]['content'] -}}
{%- set vicuna = namespace(separator=' ' if messages[0]['content'] else '') -%}
{%- else -%}
{%- set turns = messages -%}
{{- SYSTEM_TEXT -}}
{%- set vicuna = namespace(separator=' ') -%}
{%- endif -%}
{%- for message in turns -%}
{%- if message['role'] == 'user' -%}
{{- vicuna.separator + 'USER: ' + message['content'] -}}
{%- set vicuna.separator = ' ' -%}
{%- elif message['role'] == 'assistant' -%}
EOS_CHECK\
{{- vicuna.separator + 'ASSISTANT: ' -}}
{%- generation -%}
{{- message['content'] + STOP_TEXT -}}
{%- endgeneration -%}
{%- set vicuna.separator = '' -%}
END_OF_TURNS\
{%- if add_generation_prompt -%}
{{- vicuna.separator + 'ASSISTANT:' -}}
{%- endif -%}
"""

_EOS_CHECK = """\
{%- if not eos_token -%}
{{- raise_exception('This template closes every answer with the eos_token, and the tokenizer has none.') -}}
{%- endif -%}
"""


def multimodal_chat_template(
    tokenizer_template: str | dict[str, str] | None, image_token: str = "<image>"
) -> str | dict[str, str]:
    """Returns a chat template that takes contents made of parts, for a tokenizer's own template.

    In contents that are lists, each picture becomes `image_token` and a newline where it stands, and texts are taken
    as they are. Conversations whose contents are plain text render exactly as with `tokenizer_template`. Answers are
    marked for `return_assistant_tokens_mask`. A template that knows parts, and writes `image_token` for pictures, is
    returned as it is.

    Args:
        tokenizer_template (`str`, `dict[str, str]` or `None`):
            The tokenizer's own template; a `dict` holds several by name. `None`: the Vicuna form.
        image_token (`str`, *optional*, defaults to `"<image>"`): What stands for a picture in the text.

    Returns:
        `str` or `dict[str, str]`: The template, or one for each name. A template that this function has returned
        before for the same `image_token` is returned as it is.

    Raises:
        TypeError: `tokenizer_template` is of another type.
        ValueError: `tokenizer_template` knows contents made of parts only, and writes another token for pictures.
    """
    if tokenizer_template is None:
        tokenizer_template = vicuna_text_template()
    if isinstance(tokenizer_template, dict):
        return {name: multimodal_chat_template(template, image_token) for name, template in tokenizer_template.items()}
    if not isinstance(tokenizer_template, str):
        raise TypeError(
            f"`tokenizer_template` is of type {type(tokenizer_template).__name__}; expected the text of a chat "
            "template, a dict of them by name, or None."
        )
    header = filled(_HEADER, IMAGE_TOKEN=f"{image_token}\n")
    if tokenizer_template.startswith(header):
        return tokenizer_template
    as_parts = _rendered_probe(tokenizer_template, [{"type": "image"}, {"type": "text", "text": _PROBE}])
    if _PROBE in as_parts:
        if image_token in as_parts:
            return tokenizer_template
        if _PROBE not in _rendered_probe(tokenizer_template, _PROBE):
            raise ValueError(
                f"The chat template takes contents made of parts, but writes no {image_token!r} for a picture, and it "
                "leaves out contents that are plain text, so it cannot be adapted. Pass another template, or "
                "None for the Vicuna form."
            )
    return header + _marked(tokenizer_template)


def _marked(template: str) -> str:
    """Returns a template that marks answers; as it is where it does so already, or begins them not as it asks for them
    (thinking, mostly)."""
    if _GENERATION.search(template):
        return template
    marked = _MARKED.replace("TEMPLATE", template.removesuffix("\n"))  # as jinja does with the end of a template
    conversation = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _PROBE}]
    return marked if _rendered(marked, conversation)[1] else template


def _rendered_probe(template: str, content: str | list[dict[str, str]]) -> str:
    """Renders one user message; a template that cannot take this content gives nothing."""
    return _rendered(template, [{"role": "user", "content": content}])[0]


def _rendered(template: str, conversation: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
    """Renders a conversation; returns the text, and where its marked answers begin and end."""

    def render() -> tuple[str, list[tuple[int, int]]]:
        try:
            (text,), marks = render_jinja_template(
                [conversation],
                chat_template=template,
                return_assistant_tokens_mask=_GENERATION.search(template) is not None,
                bos_token="<s>",
                eos_token="</s>",
            )
            return text, marks[0] if marks else []
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            return "", []

    # On a stack of its own: Jinja's errors hold on to themselves, and by their frames to what all callers hold, which
    # here may be the weights of a model.
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(render).result()


def vicuna_text_template(system: str = VICUNA_SYSTEM_TEXT, stop: str | None = None) -> str:
    """Returns the Vicuna form for contents that are plain text; see [`multimodal_chat_template`].

    Args:
        system (`str`, *optional*): The system text of conversations that bring none.
        stop (`str`, *optional*): What closes every answer; `None`: the tokenizer's `eos_token`.
    """
    template = _VICUNA_TEXT_TEMPLATE.replace("END_OF_TURNS", END_OF_TURNS)
    template = template.replace("EOS_CHECK", _EOS_CHECK if stop is None else "")
    if stop is None:
        template = template.replace("STOP_TEXT", "eos_token")
    return filled(template, SYSTEM_TEXT=system, **({} if stop is None else {"STOP_TEXT": stop}))


def filled(template: str, **texts: str) -> str:
    """Returns a template with texts, as jinja writes them, in the place of names."""
    return re.sub("|".join(texts), lambda name: _jinja_string(texts[name[0]]), template)


def _jinja_string(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"


VICUNA_CHAT_TEMPLATE = multimodal_chat_template(None)


IMAGE_TOKEN = "<image>"


__all__ = [
    "END_OF_TURNS",
    "IMAGE_TOKEN",
    "VICUNA_CHAT_TEMPLATE",
    "VICUNA_SYSTEM_TEXT",
    "filled",
    "multimodal_chat_template",
    "vicuna_text_template",
]

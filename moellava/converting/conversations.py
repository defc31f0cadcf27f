# SPDX-License-Identifier: Apache-2.0
"""The conversations that older checkpoints were trained on, as chat templates, and what their tokenizers need for them.

The older code keeps its conversations as objects of five styles. Here each is a template that gives the same prompt,
byte for byte: what it writes is a fact of the training, down to single spaces. Pictures stand before the question as
`<image>` and a newline.

Left out are the conversations that begin with an exchange that nobody had (`v0`, also called `default`, and `simple`),
and LLaMA 2's (`llama_2`): no checkpoint that is known to be published was trained on them.
"""

from dataclasses import dataclass
from typing import Any

from ..chatting.chat_templates import (
    END_OF_TURNS,
    VICUNA_SYSTEM_TEXT,
    filled,
    multimodal_chat_template,
    vicuna_text_template,
)


@dataclass(frozen=True)
class Conversation:
    """A conversation that models were trained on.

    Attributes:
        name (`str`): Its name in the older code.
        chat_template (`str`): The template that writes it; it takes contents that are text or lists of parts.
        stop (`str`): What closes every answer.
    """

    name: str
    chat_template: str
    stop: str


_HUMAN_SYSTEM_TEXT = VICUNA_SYSTEM_TEXT.replace("user", "human")
_MMTAG_SYSTEM_TEXT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant is able to understand the "
    "visual content that the user provides, and assist the user with a variety of tasks using natural language.The "
    "visual content will be provided with the following format: <Image>visual content</Image>."
)
_VISION_SYSTEM_TEXT = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
_MPT_SYSTEM_TEXT = (
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
)

# How each of these begins: the system message, if there is one, and the other messages as `turns`.
_BEGINNING = """\
{%- if messages and messages[0]['role'] == 'system' -%}
{%- set turns = messages[1:] -%}
{%- set system = messages[0]['content'] -%}
{%- else -%}
{%- set turns = messages -%}
{%- set system = SYSTEM_TEXT -%}
{%- endif -%}
"""

# The style SINGLE: everything is closed alike.
_SINGLE = f"""\
{_BEGINNING}\
{{{{- system + STOP_TEXT -}}}}
{{%- for message in turns -%}}
{{%- if message['role'] == 'user' -%}}
{{{{- 'Human: ' + message['content'] + STOP_TEXT -}}}}
{{%- elif message['role'] == 'assistant' -%}}
{{{{- 'Assistant: ' -}}}}
{{%- generation -%}}
{{{{- message['content'] + STOP_TEXT -}}}}
{{%- endgeneration -%}}
{END_OF_TURNS}\
{{%- if add_generation_prompt -%}}
{{{{- 'Assistant:' -}}}}
{{%- endif -%}}
"""

# The style MPT: the roles are marks, with a newline behind and nothing between the turns.
_MPT = f"""\
{_BEGINNING}\
{{{{- '<|im_start|>system\\n' + system + STOP_TEXT -}}}}
{{%- for message in turns -%}}
{{%- if message['role'] == 'user' -%}}
{{{{- '<|im_start|>user\\n' + message['content'] + STOP_TEXT -}}}}
{{%- elif message['role'] == 'assistant' -%}}
{{{{- '<|im_start|>assistant\\n' -}}}}
{{%- generation -%}}
{{{{- message['content'] + STOP_TEXT -}}}}
{{%- endgeneration -%}}
{END_OF_TURNS}\
{{%- if add_generation_prompt -%}}
{{{{- '<|im_start|>assistant\\n' -}}}}
{{%- endif -%}}
"""

# The style LLAMA_2: the system text is a part of the first question. The first `<s>` is the tokenizer's to write.
_LLAMA_2 = f"""\
{_BEGINNING}\
{{%- for message in turns -%}}
{{%- if message['role'] == 'user' -%}}
{{%- if loop.first -%}}
{{{{- '[INST] <<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] + ' [/INST]' -}}}}
{{%- else -%}}
{{{{- '<s>[INST] ' + message['content'] + ' [/INST]' -}}}}
{{%- endif -%}}
{{%- elif message['role'] == 'assistant' -%}}
{{%- if loop.first -%}}
{{{{- raise_exception('The first message must be the user\\'s: the system text is a part of it.') -}}}}
{{%- endif -%}}
{{{{- ' ' -}}}}
{{%- generation -%}}
{{{{- message['content'] + ' ' + STOP_TEXT -}}}}
{{%- endgeneration -%}}
{END_OF_TURNS}"""

# The style LLAMA_2 of Mistral's instruction models (LLaVA-Med v1.5, LLaVA-NeXT): no system text by default, and no
# `<s>` between the turns.
_MISTRAL_INSTRUCT = f"""\
{_BEGINNING}\
{{%- for message in turns -%}}
{{%- if message['role'] == 'user' -%}}
{{%- if loop.first and system -%}}
{{{{- '[INST] <<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] + ' [/INST]' -}}}}
{{%- else -%}}
{{{{- '[INST] ' + message['content'] + ' [/INST]' -}}}}
{{%- endif -%}}
{{%- elif message['role'] == 'assistant' -%}}
{{{{- ' ' -}}}}
{{%- generation -%}}
{{{{- message['content'] + ' ' + STOP_TEXT -}}}}
{{%- endgeneration -%}}
{END_OF_TURNS}"""

# The style PLAIN, as the first stage of training writes it: a picture, and at once what it shows.
_PLAIN = f"""\
{_BEGINNING}\
{{{{- system -}}}}
{{%- for message in turns -%}}
{{%- if message['role'] == 'user' -%}}
{{{{- (message['content'] + '') | replace('<image>\\n', '<image>') -}}}}
{{%- elif message['role'] == 'assistant' -%}}
{{%- generation -%}}
{{{{- message['content'] + STOP_TEXT -}}}}
{{%- endgeneration -%}}
{END_OF_TURNS}"""

_VICUNA_STOPS = {
    "vicuna_v1": "</s>",
    "mistral": "</s>",
    "minicpm": "</s>",
    "openchat": "<|end_of_turn|>",
    "phi": "<|endoftext|>",
    "qwen": "<|endoftext|>",
    # The older table has no name for it; its family's name stands there, as its tokenizer's end of text does.
    "qwen1_5": "<|endoftext|>",
    "stablelm": "<|endoftext|>",
}

# Name -> the template for contents that are text, and the stop.
_TEXT_TEMPLATES = {
    **{name: (vicuna_text_template(stop=stop), stop) for name, stop in _VICUNA_STOPS.items()},
    "llava_v1": (vicuna_text_template(_HUMAN_SYSTEM_TEXT, "</s>"), "</s>"),
    "v1_mmtag": (vicuna_text_template(_MMTAG_SYSTEM_TEXT, "</s>"), "</s>"),
    "llava_v0": (filled(_SINGLE, SYSTEM_TEXT=_HUMAN_SYSTEM_TEXT, STOP_TEXT="###"), "###"),
    "v0_mmtag": (filled(_SINGLE, SYSTEM_TEXT=_MMTAG_SYSTEM_TEXT, STOP_TEXT="###"), "###"),
    "llava_llama_2": (filled(_LLAMA_2, SYSTEM_TEXT=_VISION_SYSTEM_TEXT, STOP_TEXT="</s>"), "</s>"),
    "mistral_instruct": (filled(_MISTRAL_INSTRUCT, SYSTEM_TEXT="", STOP_TEXT="</s>"), "</s>"),
    "mpt": (filled(_MPT, SYSTEM_TEXT=_MPT_SYSTEM_TEXT, STOP_TEXT="<|im_end|>"), "<|im_end|>"),
    "plain": (filled(_PLAIN, SYSTEM_TEXT="", STOP_TEXT="\n"), "\n"),
}

_OTHER_NAMES = {"llama": "vicuna_v1", "v1": "vicuna_v1", "v0_plain": "plain"}
_LEFT_OUT = ("default", "v0", "simple", "llama_2")

FAMILIES = ("llama", "mistral", "openchat", "phi", "qwen", "qwen1_5", "stablelm", "minicpm")


def conversation_for(family: str, *, version: str | None = None) -> Conversation:
    """Returns the conversation that the models of a family were trained on.

    Args:
        family (`str`): One of `FAMILIES`.
        version (`str`, *optional*):
            The older name of another conversation, as the older code's `--version` and `--conv-mode` take it:
            `"v1"`, `"vicuna_v1"`, `"llava_v1"`, `"llava_v0"`, `"v0_mmtag"`, `"v1_mmtag"`, `"llava_llama_2"`,
            `"mistral_instruct"`, `"mpt"`, `"plain"`, `"v0_plain"`, or a family.

    Raises:
        ValueError: There is no such family, or no such conversation.
    """
    if family not in FAMILIES:
        raise ValueError(f"There is no family of older models {family!r}; expected one of {_listed(FAMILIES)}.")
    name = family if version is None else version
    name = _OTHER_NAMES.get(name, name)
    if name in _LEFT_OUT:
        raise ValueError(
            f"The older conversation {name!r} is left out here; expected one of {_listed(_known())}. Give the "
            "processor a chat template of your own instead."
        )
    if name not in _TEXT_TEMPLATES:
        raise ValueError(f"There is no older conversation {name!r}; expected one of {_listed(_known())}.")
    template, stop = _TEXT_TEMPLATES[name]
    image_token = "<Image><image></Image>" if name.endswith("_mmtag") else "<image>"
    return Conversation(name, multimodal_chat_template(template, image_token), stop)


# The token that the older code makes the unknown one, to pad with, and whether it adds it where it is not there.
_UNKNOWN_TOKENS = {
    "phi": ("<|extra_0|>", True),
    "qwen": ("<|extra_0|>", True),
    "qwen1_5": ("<|extra_0|>", True),
    "stablelm": ("<|reg0|>", False),
}


def prepare_legacy_tokenizer(
    tokenizer: Any, family: str, *, vocab_size: int | None = None, legacy: bool | None = None
) -> list[str]:
    """Gives a tokenizer the unknown, pad and end tokens that the older code gives it.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer, which is changed.
        family (`str`): One of `FAMILIES`.
        vocab_size (`int`, *optional*): How many rows the embedding has; a token that needs another is refused.
        legacy (`bool`, *optional*):
            Whether a LLaMA tokenizer puts a space before the text behind a special token too, as before a whole text.
            Where a `tokenizer_config.json` does not say it, the older code takes it to be so, and transformers today
            does not. `None`: as it was loaded.

    Returns:
        `list[str]`: The tokens that it did not know before. Each needs a row of the embedding.

    Raises:
        ValueError: There is no such family, a new token has no row, or there is nothing to pad with. The tokenizer is
            as it was.
    """
    if family not in FAMILIES:
        raise ValueError(f"There is no family of older models {family!r}; expected one of {_listed(FAMILIES)}.")
    known = tokenizer.get_vocab()
    token, is_added = _UNKNOWN_TOKENS.get(family, (None, False))
    wanted = {}
    if token is not None and (is_added or token in known):
        wanted["unk_token"] = token
    if family == "qwen":
        wanted["eos_token"] = "<|endoftext|>"
    new = [name for name in wanted.values() if name not in known]
    # What is added stands behind everything else, however much of the vocabulary is left free before it.
    rows = max(known.values(), default=-1) + 1 + len(new)
    if new and vocab_size is not None and rows > vocab_size:
        raise ValueError(
            f"The older code adds {_listed(new)} to a tokenizer of the family {family!r}, which makes {rows} tokens, "
            f"but the embedding has {vocab_size} rows. Expected the tokenizer that was saved with the model."
        )
    pad_token = wanted.get("unk_token") or tokenizer.unk_token or tokenizer.pad_token or tokenizer.eos_token
    if pad_token is None:
        raise ValueError("The tokenizer has no unknown, pad or end token to pad batches with. Give it a pad token.")
    if wanted:
        tokenizer.add_special_tokens(wanted)
    tokenizer.pad_token = pad_token
    if hasattr(tokenizer, "legacy"):
        _set_legacy(tokenizer, tokenizer.legacy if legacy is None else legacy)
    return new


def _set_legacy(tokenizer: Any, legacy: bool) -> None:
    backend = tokenizer.backend_tokenizer
    metaspace = backend.pre_tokenizer
    if getattr(metaspace, "prepend_scheme", "never") != "never":
        metaspace.prepend_scheme = "always" if legacy else "first"
        backend.pre_tokenizer = metaspace
        tokenizer.legacy = legacy
    # transformers forgets it when it saves a tokenizer, and takes another when it loads that.
    tokenizer.init_kwargs["legacy"] = tokenizer.legacy


def stop_token_ids(tokenizer: Any, conversation: Conversation) -> list[int]:
    """Returns the tokens at which an answer ends: the tokenizer's end, and the conversation's where it is one token.

    A stop of several tokens (`"###"` mostly) has no place among them: give it to `generate` as `stop_strings`.
    """
    ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stop = tokenizer.encode(conversation.stop, add_special_tokens=False)
    # Behind an answer the stop stands without the space that some tokenizers put before a text.
    if len(stop) == 1 and not tokenizer.convert_ids_to_tokens(stop[0]).startswith("▁"):
        if stop[0] not in ids and tokenizer.decode(stop) == conversation.stop:
            ids.append(stop[0])
    return ids


def _known() -> list[str]:
    return sorted({*_TEXT_TEMPLATES, *_OTHER_NAMES})


def _listed(names: Any) -> str:
    return ", ".join(repr(name) for name in names)


__all__ = ["FAMILIES", "Conversation", "conversation_for", "prepare_legacy_tokenizer", "stop_token_ids"]

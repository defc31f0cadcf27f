# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of an older checkpoint: as transformers reads it, or Qwen-1's own file by transformers' converter."""

import base64
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from ..checks.processor_files import check_links
from ..reading.language_model import read_tokenizer
from ..reading.sources import Source
from .legacy_config import OlderCheckpointError


_QWEN_FILE = "qwen.tiktoken"
# Of Qwen's own tokenizer: where it splits a text, and the tokens that follow its ranks.
_QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))


class _QwenConverter(TikTokenConverter):
    """Reads the ranks without tiktoken, whose file format is lines of a token in base64 and its rank."""

    @staticmethod
    def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
        lines = Path(tiktoken_url).read_text(encoding="ascii").split("\n")
        pairs = (line.split() for line in lines if line)
        return {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}


def read_legacy_tokenizer(source: Source, text_config: PreTrainedConfig) -> Any:
    """Returns the tokenizer of an older checkpoint.

    Raises:
        OlderCheckpointError, ValueError: It has none that can be read.
    """
    path = source.find(_QWEN_FILE)
    if path is None or any(source.find(name) for name in ("tokenizer.json", "vocab.json")):
        return read_tokenizer(source, text_config)
    check_links(path.parent)
    try:
        converted = _QwenConverter(
            str(path), pattern=_QWEN_PATTERN, extra_special_tokens=list(_QWEN_SPECIAL_TOKENS)
        ).converted()
    except ValueError as error:
        raise OlderCheckpointError(
            f"{path} cannot be read ({error}): expected a token in base64 and its rank on every line."
        ) from error
    fields = source.read_json("tokenizer_config.json") or {}
    return PreTrainedTokenizerFast(
        tokenizer_object=converted,
        eos_token="<|endoftext|>",
        model_max_length=fields.get("model_max_length", 2048),
        clean_up_tokenization_spaces=False,
    )


__all__ = ["read_legacy_tokenizer"]

# SPDX-License-Identifier: Apache-2.0
"""Reading a language model: its config, its weights under the names of the tree, its tokenizer."""

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoConfig, GenerationConfig, GraniteConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..chatting.chat_templates import IMAGE_TOKEN
from ..checks.configs import CONFIG_ERRORS, check_part, config_fault
from ..checks.processor_files import RefusedFileError, load_tokenizer
from ..modeling.language_moellava import native_causal_lm
from ..tree import BODY_PREFIX, HEAD
from .native_head import check_head
from .sources import Source


logger = logging.getLogger(__name__)

# What a tokenizer cannot do without one of; transformers would make an empty one.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "qwen.tiktoken")


def context_length(text_config: Any) -> int:
    """Returns the number of positions that a language model takes."""
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"):
        if isinstance(getattr(text_config, name, None), int):
            return getattr(text_config, name)
    return 2048  # families without a table of positions (BLOOM's ALiBi) name none; LLaVA's own value


class LanguagePart(NamedTuple):
    """A language model's config, what opens its weights (under our names), its tokenizer and generation config."""

    config: PreTrainedConfig
    tensors: Callable[[], dict[str, torch.Tensor]]
    tokenizer: Any
    generation_config: GenerationConfig | None


def read_language_model(source: Source) -> LanguagePart:
    """Opens a language model, but for its weights.

    Raises:
        ValueError: It is no decoder with a `ForCausalLM` class in transformers, or its head computes the logits in a
            way that is not known.
    """
    config = _text_config(source)
    check_head(config)
    tensors = partial(_language_tensors, source, config)
    return LanguagePart(config, tensors, read_tokenizer(source), read_generation_config(source))


def read_tokenizer(source: Source, text_config: PreTrainedConfig | None = None) -> Any:
    """Returns the tokenizer of a source.

    Args:
        source (`Source`): Where it is.
        text_config (`PreTrainedConfig`, *optional*): What the language model is, where the source's own config is not
            one of transformers.

    Raises:
        ValueError: It has none that can be loaded; or, a `RefusedFileError`, it asks for what a tokenizer may not.
    """
    # A type that transformers does not have (MiniCPM) says nothing of the tokenizer, so no config is loaded for it.
    if text_config is not None:
        if not any(source.find(name) for name in _VOCABULARIES):
            raise ValueError(f"{source} has no tokenizer: expected one of {', '.join(_VOCABULARIES)} beside the model.")
        says_class = (source.read_json("tokenizer_config.json") or {}).get("tokenizer_class") is not None
        config = PreTrainedConfig() if says_class else text_config
    else:
        config = None if source.config_dict()["model_type"] in CONFIG_MAPPING else PreTrainedConfig()
    try:
        return load_tokenizer(
            source.name,
            config=config,
            trust_remote_code=source.trust_remote_code,
            **source.hub_options,
        )
    except RefusedFileError:
        raise
    except (AttributeError, ImportError, LookupError, OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"The tokenizer of {source} cannot be loaded ({type(error).__name__}: {str(error).partition(chr(10))[0]}). "
            "Expected tokenizer.json and tokenizer_config.json beside the model; where there is a tokenizer.model "
            "alone, it needs `pip install moellava[sentencepiece]`."
        ) from error


def read_config(source: Source, model_type: str) -> PreTrainedConfig:
    """Returns the config of a part, as transformers reads it.

    Raises:
        ValueError: It is damaged, or says what no config may.
    """
    try:
        check_part("config.json", source.config_dict())
        config = AutoConfig.from_pretrained(source.name, **source.hub_options)
    except CONFIG_ERRORS as error:
        raise ValueError(
            f"The config.json of {source} does not describe a {model_type!r} model ({config_fault(error)}). Expected "
            "what transformers saves of one."
        ) from error
    # By these a config may name kernels of the Hub, which transformers fetches. How a model computes, its user says.
    config._attn_implementation = config._experts_implementation = None
    return config


def read_generation_config(source: Source) -> GenerationConfig | None:
    """Returns the generation config of a source, or `None` where it has none."""
    if source.find("generation_config.json") is None:
        return None
    return GenerationConfig.from_pretrained(source.name, **source.hub_options)


def _text_config(source: Source) -> PreTrainedConfig:
    fields = source.config_dict()
    model_type = fields.get("model_type")
    if model_type == "minicpm":
        check_part(f"{source}/config.json", fields)
        return minicpm_as_granite(fields)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"{source} is a {model_type!r} model, which transformers {transformers.__version__} does not have, so that "
            "it cannot be the language model. Expected a decoder of transformers (LLaMA, Mistral, Phi, Qwen, ...)."
        )
    config = read_config(source, model_type)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.is_encoder_decoder:
        raise ValueError(
            f"{source} is a {model_type!r} model, which is no causal language model. Expected a decoder that "
            "AutoModelForCausalLM loads; give a vision tower as mm_vision_tower."
        )
    return config


def minicpm_as_granite(fields: dict[str, Any]) -> GraniteConfig:
    """Translates a MiniCPM config (the 2B, `model_type: minicpm`, not in transformers) to Granite's.

    MiniCPM is a LLaMA with scaled embeddings, residual branches and logits (Hu et al. 2024, arXiv:2404.06395, section
    4.1), which is what Granite is, with the same names of weights.

    Raises:
        ValueError: A field that the translation needs is missing.
    """
    missing = [name for name in ("scale_emb", "scale_depth", "dim_model_base") if name not in fields]
    if missing:
        raise ValueError(f"The MiniCPM config has no {', '.join(missing)}, without which its scales are unknown.")
    heads = fields["num_attention_heads"]
    ours = {
        "attention_bias": fields.get("attention_bias", False),
        "attention_multiplier": (fields["hidden_size"] // heads) ** -0.5,
        "embedding_multiplier": float(fields["scale_emb"]),
        "logits_scaling": fields["hidden_size"] / fields["dim_model_base"],
        "residual_multiplier": fields["scale_depth"] / math.sqrt(fields["num_hidden_layers"]),
        # absent from its files means tied: the default of the class that wrote them
        "tie_word_embeddings": fields.get("tie_word_embeddings", True),
    }
    same = (
        "bos_token_id", "dtype", "eos_token_id", "hidden_act", "hidden_size", "initializer_range", "intermediate_size",
        "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "pad_token_id",
        "rms_norm_eps", "rope_scaling", "rope_theta", "torch_dtype", "vocab_size",
    )  # fmt: skip
    return GraniteConfig(**{name: fields[name] for name in same if name in fields}, **ours)


def _language_tensors(source: Source, config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """Returns a language model's weights under the names of our tree."""
    own = native_causal_lm(config)
    # What the installed class calls its head, and what files of older versions of it call it.
    heads = tuple(f"{name}." for name in (module_name(own, own.get_output_embeddings()), HEAD, "embed_out"))
    body = own.base_model_prefix
    raw = source.tensors()
    has_head_class = any(name.startswith((f"{body}.", *heads)) for name in raw)
    tensors = {}
    for name, tensor in raw.items():
        if name.startswith(heads):
            tensors[f"{HEAD}.{name.rpartition('.')[2]}"] = tensor
        elif name.startswith(f"{body}.") or not has_head_class:
            tensors[f"{BODY_PREFIX}{name.removeprefix(f'{body}.')}"] = tensor
        else:
            logger.info("%s: %s belongs to no part of a causal language model and is left out.", source, name)
    return tensors


def module_name(model: torch.nn.Module, module: torch.nn.Module) -> str:
    """Returns the name that a model's module has in it."""
    return next(name for name, candidate in model.named_modules() if candidate is module)


def add_image_token(tokenizer: Any, vocab_size: int, image_token: str = IMAGE_TOKEN) -> tuple[int, int]:
    """Makes sure that the tokenizer knows the image token.

    Returns:
        `tuple[int, int]`: The token's id, and the number of vocabulary rows that the model needs: `vocab_size` where
        the token has a row already, or gets one that the padded vocabulary left free.
    """
    known = tokenizer.get_vocab()
    if image_token not in known:
        tokenizer.add_tokens(
            [transformers.AddedToken(image_token, special=True, normalized=False)], special_tokens=True
        )
    token_id = tokenizer.convert_tokens_to_ids(image_token)
    return token_id, max(vocab_size, token_id + 1)


def prepare_tokenizer(tokenizer: Any) -> None:
    """Makes a tokenizer pad on the left, with a token of its own.

    Raises:
        ValueError: It has no token to pad with.
    """
    # Generation continues at the right end. By init_kwargs a tokenizer that is saved alone keeps it.
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    if tokenizer.pad_token is None:
        # Padding is masked, so any token serves; the unknown one keeps the end token trainable.
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        if tokenizer.pad_token is None:
            raise ValueError("The tokenizer has no pad, unknown or end token to pad batches with. Give it a pad token.")


def grow_embeddings(tensors: dict[str, torch.Tensor], config: PreTrainedConfig, known_rows: int, rows: int) -> None:
    """Adds rows to embedding and head, each the mean of those that are there; the others stay as they are.

    Raises:
        ValueError: There are not as many as the config says, `known_rows`.
    """
    own = native_causal_lm(config)
    body = module_name(own, own.get_input_embeddings()).removeprefix(f"{own.base_model_prefix}.")
    for name in (f"{BODY_PREFIX}{body}.weight", f"{HEAD}.weight", f"{HEAD}.bias"):
        if name in tensors:
            tensor = tensors[name]
            if tensor.shape[0] != known_rows:
                raise ValueError(
                    f"{name} has {tensor.shape[0]} rows, but by the config's vocab_size the vocabulary has "
                    f"{known_rows}: weights and config are not of one model. Give those that belong together."
                )
            mean = tensor.float().mean(dim=0, keepdim=True).to(tensor.dtype)
            new = mean.expand(rows - tensor.shape[0], *tensor.shape[1:])
            tensors[name] = torch.cat([tensor, new])


def dtype_of(config: PreTrainedConfig, tensors: dict[str, torch.Tensor]) -> torch.dtype:
    """Returns the dtype that a language model's config says, or that of its weights."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    return next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), torch.float32)


__all__ = [
    "LanguagePart",
    "add_image_token",
    "context_length",
    "dtype_of",
    "grow_embeddings",
    "minicpm_as_granite",
    "module_name",
    "prepare_tokenizer",
    "read_config",
    "read_generation_config",
    "read_language_model",
    "read_tokenizer",
]

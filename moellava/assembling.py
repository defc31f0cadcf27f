# SPDX-License-Identifier: Apache-2.0
"""Assembling a model out of parts: a language model, a vision tower, a projector.

The parts' weights are memory-mapped, renamed to the model's tree and handed to `from_pretrained` as they are, so that
each is read once, straight to its device and dtype. Everything that can be wrong is checked before that.
"""

import copy
import logging
import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import transformers
from transformers import (
    AutoConfig,
    GenerationConfig,
    GraniteConfig,
    PreTrainedConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from .building import IMAGE_TOKEN, build, make_processor
from .configuration import MoellavaConfig, MoellavaEncoderConfig
from .configuration.checkpoint_moellava import travelling_files
from .configuration.configuration_moellava import CONFIG_ERRORS, config_fault
from .configuration.custom_code_moellava import custom_sources
from .configuration.part_checks_moellava import check_part
from .configuration.registry_moellava import ENCODERS
from .custom_source import read_custom_tower
from .modeling import MoellavaForCausalLM
from .modeling.encoders_moellava import detect_encoder_type, encoder_for
from .modeling.language_moellava import check_head, own_causal_lm
from .modeling.own_parts_moellava import build_projector
from .origins import NEW, with_origin
from .processing.part_files_moellava import RefusedFileError, load_tokenizer
from .projector_files import read_projector
from .request import LoadRequest, is_custom_encoder
from .sources import OPEN_CLIP_CONFIG_NAME, Source, load_image_processor
from .upcycling import is_new_weight, upcycled


logger = logging.getLogger(__name__)

DEFAULT_VISION_TOWER = "openai/clip-vit-large-patch14"
# What a tokenizer cannot do without one of; transformers would make an empty one.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "qwen.tiktoken")
PROJECTOR_PREFIX = "model.multi_modal_projector."
TOWER_PREFIX = "model.vision_tower."

# What stands before the vision tower's weights in a model that holds one: CLIP and SigLIP, then vision-language models.
_VISION_PREFIXES = ("vision_model.", "vision_tower.", "model.vision_tower.", "vision_encoder.")


class VisionPart(NamedTuple):
    """A vision tower's config, what opens its weights (under its own module's names), and its image processor."""

    encoder_type: str
    config: PreTrainedConfig
    tensors: Callable[[], dict[str, torch.Tensor]]
    image_processor: Any


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
    own = own_causal_lm(config)
    # What the installed class calls its head, and what files of older versions of it call it.
    heads = tuple(f"{name}." for name in (module_name(own, own.get_output_embeddings()), "lm_head", "embed_out"))
    body = own.base_model_prefix
    raw = source.tensors()
    has_head_class = any(name.startswith((f"{body}.", *heads)) for name in raw)
    tensors = {}
    for name, tensor in raw.items():
        if name.startswith(heads):
            tensors[f"lm_head.{name.rpartition('.')[2]}"] = tensor
        elif name.startswith(f"{body}.") or not has_head_class:
            tensors[f"model.language_model.{name.removeprefix(f'{body}.')}"] = tensor
        else:
            logger.info("%s: %s belongs to no part of a causal language model and is left out.", source, name)
    return tensors


def module_name(model: torch.nn.Module, module: torch.nn.Module) -> str:
    """Returns the name that a model's module has in it."""
    return next(name for name, candidate in model.named_modules() if candidate is module)


def read_vision_tower(source: Source, encoder_type: str | None = None) -> VisionPart:
    """Opens a vision tower; what it is, is told by its own config.

    Raises:
        ImportError: It needs an extra that is not installed.
        ValueError: It is no vision tower, or contradicts `encoder_type`.
    """
    is_open_clip = source.find(OPEN_CLIP_CONFIG_NAME) is not None
    if is_open_clip and (encoder_type == "biomedclip" or source.find("config.json") is None):
        return _open_clip_tower(source, encoder_type)
    if encoder_type == "biomedclip":
        raise ValueError(
            f"encoder_type is 'biomedclip', but {source} has no {OPEN_CLIP_CONFIG_NAME}: expected an open_clip "
            "checkpoint, such as microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224."
        )
    fields = source.config_dict()
    if fields.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(
            f"{source} is a {fields.get('model_type')!r} model, which transformers {transformers.__version__} does not "
            "have, so that it cannot be the vision tower. Wrap it as an encoder of your own, see docs/extending.md."
        )
    config = read_config(source, fields["model_type"])
    is_composite = hasattr(config, "vision_config")
    config = config.vision_config if is_composite else config
    if type(config) not in MODEL_MAPPING:
        raise ValueError(f"{source} is a {config.model_type!r} model, which AutoModel cannot build as a vision tower.")
    if _is_text_model(config):
        raise ValueError(
            f"{source} is a {config.model_type!r} language model, not a vision tower. Give a CLIP, SigLIP, DINOv2, ViT "
            "or other vision model as mm_vision_tower."
        )
    encoder_type = encoder_type or detect_encoder_type(config.model_type)
    unused = getattr(ENCODERS[encoder_type], "unused_weights", ())
    tensors = partial(_tower_tensors, source, config, is_composite, unused)
    return VisionPart(encoder_type, config, tensors, load_image_processor(source))


def _is_text_model(config: PreTrainedConfig) -> bool:
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not hasattr(config, "image_size")


def _open_clip_tower(source: Source, encoder_type: str | None) -> VisionPart:
    from .open_clip_source import read_open_clip

    if encoder_type not in (None, "biomedclip", "clip"):
        raise ValueError(
            f"encoder_type is {encoder_type!r}, but {source} is an open_clip checkpoint. Use "
            "encoder_type='biomedclip', or leave it out."
        )
    tower = read_open_clip(source.find)
    detected = "biomedclip" if tower.vision_config.model_type == "vit" else detect_encoder_type("clip_vision_model")
    if encoder_type not in (None, detected):
        raise ValueError(
            f"encoder_type is {encoder_type!r}, but the tower of {source} is a {tower.vision_config.model_type}. Use "
            f"encoder_type={detected!r}, or leave it out."
        )
    return VisionPart(detected, tower.vision_config, lambda: tower.state_dict, tower.image_processor)


def _tower_tensors(
    source: Source, config: PreTrainedConfig, is_composite: bool, unused: tuple[str, ...]
) -> dict[str, torch.Tensor]:
    """Returns a tower's weights under the names of its own module; a head or a text tower beside it is left out."""
    raw = source.tensors()
    prefixes = _VISION_PREFIXES if is_composite else (f"{MODEL_MAPPING[type(config)].base_model_prefix}.",)
    prefix = next((prefix for prefix in prefixes if any(name.startswith(prefix) for name in raw)), None)
    if prefix is None and is_composite:
        raise ValueError(
            f"{source} has no weights of a vision tower: expected names that begin with {prefixes[0]!r}. Give a "
            "checkpoint of the whole model, or of its tower alone."
        )
    prefix = prefix or ""
    own = {name.removeprefix(prefix): tensor for name, tensor in raw.items() if name.startswith(prefix)}
    own = {name: tensor for name, tensor in own.items() if not name.startswith(unused)}
    if len(own) < len(raw):
        logger.info(
            "%s: %s of %s weights are no vision tower's and are skipped.", source, len(raw) - len(own), len(raw)
        )
    return own


def read_custom_encoder(encoder_type: str, source: Source | None, request: LoadRequest) -> VisionPart:
    """Opens an encoder of the user's own; see `read_custom_tower`."""
    tower = read_custom_tower(encoder_type, source, request.encoder_fields, request.model_fields)
    return VisionPart(encoder_type, MoellavaEncoderConfig(**tower.fields), tower.tensors, tower.image_processor)


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
    own = own_causal_lm(config)
    body = module_name(own, own.get_input_embeddings()).removeprefix(f"{own.base_model_prefix}.")
    for name in (f"model.language_model.{body}.weight", "lm_head.weight", "lm_head.bias"):
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


def assemble(request: LoadRequest, device_map: Any = None) -> MoellavaForCausalLM:
    """Assembles the model that a request describes, with its processor as `model.processor`.

    Args:
        request (`LoadRequest`): What to assemble; see `moellava.request`.
        device_map (`dict` or `str`, *optional*): Where the weights go, as in transformers.

    Raises:
        FileNotFoundError: A part is not there.
        ImportError: A part needs an extra that is not installed.
        ValueError: A part is not what it should be, or the parts do not fit together.
    """
    language = read_language_model(Source(request.model_path, request.hub_options))
    vision = read_vision_part(request)
    text_config = copy.deepcopy(language.config)
    prepare_tokenizer(language.tokenizer)
    image_token_id, text_config.vocab_size = add_image_token(language.tokenizer, text_config.vocab_size)
    projector, projector_tensors = dict(request.projector or {}), None
    if request.projector_path is not None:
        projector, projector_tensors = read_projector(request.projector_path, projector)
    config = MoellavaConfig(
        text_config=text_config,
        vision_config=vision.config,
        projector_config={"type": "mlp", **projector},
        encoder_type=vision.encoder_type,
        image_token_id=image_token_id,
        parts=_origins(request),
        **{name: value for name, value in request.model_fields.items() if name != "encoder_type"},
    )
    shapes = projector_shapes(config)
    if projector_tensors is not None:
        projector_tensors = fit_projector(request.projector_path, projector_tensors, config, shapes)
    warn_of_parts_that_stay(config)

    # What can be wrong apart from the weights has been found by now.
    tensors = language.tensors()
    dtype = request.options["dtype"] or dtype_of(language.config, tensors)
    grown = text_config.vocab_size > language.config.vocab_size
    if grown:
        grow_embeddings(tensors, text_config, language.config.vocab_size, text_config.vocab_size)
    tower_tensors = vision.tensors()
    tensors |= {f"{TOWER_PREFIX}{name}": tensor for name, tensor in tower_tensors.items()}
    tensors |= {f"{PROJECTOR_PREFIX}{name}": tensor for name, tensor in (projector_tensors or {}).items()}
    if request.moe is not None:
        config, tensors = upcycled(config, tensors, request.moe)
    model = build(
        config,
        tensors,
        is_new=lambda name: (
            _is_new(name, request.projector_path is None, request.moe is not None)
            or (not tower_tensors and name.startswith(TOWER_PREFIX))
        ),
        dtype=dtype,
        device_map=device_map,
        quantization_config=request.options["quantization_config"],
        **request.model_options,
    )
    if language.generation_config is not None:
        model.generation_config = language.generation_config
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = language.tokenizer.pad_token_id
    if grown:
        # The added rows are no words of the language model; without them it says what it said before.
        model.generation_config.suppress_tokens = list(range(language.config.vocab_size, text_config.vocab_size))
    model.processor = make_processor(model, vision.image_processor, language.tokenizer)
    return model


def warn_of_parts_that_stay(config: MoellavaConfig) -> None:
    """Warns where the model cannot be saved, since a part of the user's own is defined where it cannot travel."""
    try:
        custom_sources(config.part_classes(), travelling_files())
    except ValueError as error:
        logger.warning("The model can be used, but not saved. %s", error)


def _is_new(name: str, new_projector: bool, new_experts: bool) -> bool:
    """Whether a weight is to be initialised, because no file has it."""
    return (new_projector and name.startswith(PROJECTOR_PREFIX)) or (new_experts and is_new_weight(name))


def _tower_name(request: LoadRequest) -> str | None:
    if request.vision_tower is None and is_custom_encoder(request.model_fields.get("encoder_type", "")):
        return None
    return request.vision_tower or DEFAULT_VISION_TOWER


def _tower_source(request: LoadRequest) -> Source | None:
    name = _tower_name(request)
    return None if name is None else Source(name, request.hub_options)


def _origins(request: LoadRequest) -> dict[str, Any]:
    language = Source(request.model_path, request.hub_options)
    parts = with_origin(None, "language_model", request.model_path, language)
    return with_projector_origin(with_tower_origin(parts, request), request)


def with_tower_origin(parts: Mapping[str, Any] | None, request: LoadRequest) -> dict[str, Any]:
    """Returns a config's `parts` with the tower that a request names."""
    return with_origin(parts, "vision_tower", _tower_name(request), _tower_source(request))


def with_projector_origin(parts: Mapping[str, Any] | None, request: LoadRequest) -> dict[str, Any]:
    """Returns a config's `parts` with the projector's file that a request names, or with a new projector."""
    path = request.projector_path
    return with_origin(parts, "multi_modal_projector", NEW if path is None else os.path.basename(path))


def read_vision_part(request: LoadRequest) -> VisionPart:
    """Opens the vision tower that a request names, or the default one."""
    encoder_type = request.model_fields.get("encoder_type")
    name = _tower_name(request)
    if encoder_type is not None:
        ENCODERS[encoder_type]
    source = _tower_source(request)
    if encoder_type is not None and is_custom_encoder(encoder_type):
        vision = read_custom_encoder(encoder_type, source, request)
    else:
        vision = read_vision_tower(source, encoder_type)
    report_claims(request, vision.config, name)
    return vision


def report_claims(request: LoadRequest, vision_config: PreTrainedConfig, tower: str | None) -> None:
    """Warns where the user says of the vision tower what it is not."""
    claimed, actual = request.claims.get("mm_hidden_size"), getattr(vision_config, "hidden_size", None)
    if claimed is not None and actual is not None and claimed != actual:
        logger.warning(
            "mm_hidden_size is given as %s, but the vision tower %s is %s wide; the tower's width is used.",
            claimed, tower, actual,
        )  # fmt: skip


def projector_shapes(config: MoellavaConfig) -> dict[str, tuple[int, ...]]:
    """Returns the name and shape of every weight of a config's projector.

    Raises:
        ValueError: There is no such projector, as an identity between unequal widths.
    """
    with torch.device("meta"):
        projector = build_projector(config, encoder_for(config).feature_size)
    return {name: tuple(tensor.shape) for name, tensor in projector.state_dict().items()}


def fit_projector(
    origin: str | os.PathLike,
    tensors: dict[str, torch.Tensor],
    config: MoellavaConfig,
    expected: dict[str, tuple[int, ...]],
) -> dict[str, torch.Tensor]:
    """Returns a projector's weights under the names that the projector has; a prefix common to all is taken off.

    Args:
        origin (`str` or `os.PathLike`): Where the weights come from, for error messages.
        tensors (`dict[str, torch.Tensor]`): The weights.
        config (`MoellavaConfig`): What the projector is to be.
        expected (`dict[str, tuple]`): Its `projector_shapes`.

    Raises:
        ValueError: They do not fit; the message lists every key and shape that does not.
    """
    common = os.path.commonprefix(list(tensors))
    for prefix in [common[: place + 1] for place, character in enumerate(common) if character == "."]:
        if set(tensors) == {f"{prefix}{name}" for name in expected}:
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
            break
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    faults = [f"missing {name} {shape}" for name, shape in expected.items() if name not in given]
    faults += [f"unexpected {name} {shape}" for name, shape in given.items() if name not in expected]
    faults += [
        f"{name} is {given[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in given and given[name] != shape
    ]
    if faults:
        raise ValueError(
            f"{origin} does not fit a {config.projector_config.type!r} projector from "
            f"{encoder_for(config).feature_size} to {config.text_embedding_size}: {'; '.join(faults)}. Name the "
            "type and the fields of the projector that was saved, or give another file."
        )
    return tensors


def dtype_of(config: PreTrainedConfig, tensors: dict[str, torch.Tensor]) -> torch.dtype:
    """Returns the dtype that a language model's config says, or that of its weights."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    return next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), torch.float32)


__all__ = [
    "PROJECTOR_PREFIX",
    "TOWER_PREFIX",
    "VisionPart",
    "add_image_token",
    "assemble",
    "dtype_of",
    "fit_projector",
    "grow_embeddings",
    "module_name",
    "prepare_tokenizer",
    "projector_shapes",
    "read_custom_encoder",
    "read_generation_config",
    "read_language_model",
    "read_tokenizer",
    "read_vision_part",
    "read_vision_tower",
    "report_claims",
    "with_projector_origin",
    "with_tower_origin",
]

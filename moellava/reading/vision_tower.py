# SPDX-License-Identifier: Apache-2.0
"""Reading a vision tower: what it is, its weights under its own names, its image processor."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import transformers
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from ..authoring.load_request import LoadRequest, is_user_encoder
from ..configuration import MoellavaEncoderConfig
from ..parts.parts_moellava import ENCODERS, detect_encoder_type
from .language_model import (
    read_config,
)
from .open_clip import read_open_clip
from .sources import OPEN_CLIP_CONFIG_NAME, Source, load_image_processor
from .user_encoder import read_user_tower


logger = logging.getLogger(__name__)

DEFAULT_VISION_TOWER = "openai/clip-vit-large-patch14"

# What stands before the vision tower's weights in a model that holds one: CLIP and SigLIP, then vision-language models.
_VISION_PREFIXES = ("vision_model.", "vision_tower.", "model.vision_tower.", "vision_encoder.")


class VisionPart(NamedTuple):
    """A vision tower's config, what opens its weights (under its own module's names), and its image processor."""

    encoder_type: str
    config: PreTrainedConfig
    tensors: Callable[[], dict[str, torch.Tensor]]
    image_processor: Any


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


def read_user_encoder(encoder_type: str, source: Source | None, request: LoadRequest) -> VisionPart:
    """Opens an encoder of the user's own; see `read_user_tower`."""
    tower = read_user_tower(encoder_type, source, request.encoder_fields, request.model_fields)
    return VisionPart(encoder_type, MoellavaEncoderConfig(**tower.fields), tower.tensors, tower.image_processor)


def tower_name(request: LoadRequest) -> str | None:
    if request.vision_tower is None and is_user_encoder(request.model_fields.get("encoder_type", "")):
        return None
    return request.vision_tower or DEFAULT_VISION_TOWER


def tower_source(request: LoadRequest) -> Source | None:
    name = tower_name(request)
    return None if name is None else Source(name, request.hub_options)


def read_vision_part(request: LoadRequest) -> VisionPart:
    """Opens the vision tower that a request names, or the default one."""
    encoder_type = request.model_fields.get("encoder_type")
    name = tower_name(request)
    if encoder_type is not None:
        ENCODERS[encoder_type]
    source = tower_source(request)
    if encoder_type is not None and is_user_encoder(encoder_type):
        vision = read_user_encoder(encoder_type, source, request)
    else:
        vision = read_vision_tower(source, encoder_type)
    report_claims(request, vision.config, name)
    return vision


def report_claims(request: LoadRequest, vision_config: Any, tower: str | None) -> None:
    """Warns where the user says of the vision tower what it is not."""
    claimed, actual = request.claims.get("mm_hidden_size"), getattr(vision_config, "hidden_size", None)
    if claimed is not None and actual is not None and claimed != actual:
        logger.warning(
            "mm_hidden_size is given as %s, but the vision tower %s is %s wide; the tower's width is used.",
            claimed, tower, actual,
        )  # fmt: skip


__all__ = [
    "DEFAULT_VISION_TOWER",
    "VisionPart",
    "read_user_encoder",
    "read_vision_part",
    "read_vision_tower",
    "report_claims",
]

# SPDX-License-Identifier: Apache-2.0
"""Assembling a model out of parts: a language model, a vision tower, a projector.

The parts' weights are memory-mapped, renamed to the model's tree and handed to `from_pretrained` as they are, so that
each is read once, straight to its device and dtype. Everything that can be wrong is checked before that.
"""

import copy
import logging
import os
from collections.abc import Mapping
from typing import Any

from ..authoring.load_request import LoadRequest
from ..configuration import MoellavaConfig
from ..modeling import MoellavaForCausalLM
from ..reading.language_model import add_image_token, dtype_of, grow_embeddings, prepare_tokenizer, read_language_model
from ..reading.processor import make_processor
from ..reading.projector_file import fit_projector, projector_shapes, read_projector
from ..reading.provenance import NEW, with_provenance
from ..reading.sources import Source
from ..reading.vision_tower import read_vision_part, tower_name, tower_source
from ..saving.export import user_code_of
from ..tree import PROJECTOR_PREFIX, TOWER_PREFIX, is_new_weight, with_part
from .build import build
from .dense_to_sparse import upcycled


logger = logging.getLogger(__name__)


def assemble(request: LoadRequest, device_map: Any = None) -> MoellavaForCausalLM:
    """Assembles the model that a request describes, with its processor as `model.processor`.

    Args:
        request (`LoadRequest`): What to assemble; see `moellava/authoring/load_request.py`.
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
        parts=_provenance(request),
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
    tensors = with_part(tensors, TOWER_PREFIX, tower_tensors)
    tensors = with_part(tensors, PROJECTOR_PREFIX, projector_tensors or {})
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
        user_code_of(config)
    except ValueError as error:
        logger.warning("The model can be used, but not saved. %s", error)


def _is_new(name: str, new_projector: bool, new_experts: bool) -> bool:
    """Whether a weight is to be initialised, because no file has it."""
    return (new_projector and name.startswith(PROJECTOR_PREFIX)) or (new_experts and is_new_weight(name))


def _provenance(request: LoadRequest) -> dict[str, Any]:
    language = Source(request.model_path, request.hub_options)
    parts = with_provenance(None, "language_model", request.model_path, language)
    return with_projector_provenance(with_tower_provenance(parts, request), request)


def with_tower_provenance(parts: Mapping[str, Any] | None, request: LoadRequest) -> dict[str, Any]:
    """Returns a config's `parts` with the tower that a request names."""
    return with_provenance(parts, "vision_tower", tower_name(request), tower_source(request))


def with_projector_provenance(parts: Mapping[str, Any] | None, request: LoadRequest) -> dict[str, Any]:
    """Returns a config's `parts` with the projector's file that a request names, or with a new projector."""
    path = request.projector_path
    return with_provenance(parts, "multi_modal_projector", NEW if path is None else os.path.basename(path))


__all__ = ["assemble", "with_projector_provenance", "with_tower_provenance"]

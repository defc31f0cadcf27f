# SPDX-License-Identifier: Apache-2.0
"""What loading logs where its user asks for it: the parts, where they come from, every shape."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..authoring.load_request import LoadRequest
from ..configuration import MoellavaConfig
from ..converting.legacy_config import is_legacy
from ..inspecting.quantization import STACKED, quantization_coverage
from ..reading.sources import Source


logger = logging.getLogger(__name__)


@contextmanager
def logs_shown(wanted: bool) -> Iterator[None]:
    """Makes the package's log visible while a model is loaded whose user asked for it; on a terminal of its own where
    no logging is configured."""
    if not wanted:
        yield
        return
    package = logging.getLogger("moellava")
    level, handler = package.level, None if package.hasHandlers() else logging.StreamHandler()
    package.setLevel(min(logging.INFO, package.getEffectiveLevel()))
    if handler is not None:
        package.addHandler(handler)
    try:
        yield
    finally:
        package.setLevel(level)
        if handler is not None:
            package.removeHandler(handler)


def log_parts(model: Any, request: LoadRequest) -> None:
    """Logs what the vision tower and the projector are, where they come from, and every shape in them."""
    config, parts = model.config, model.config.parts or {}
    checkpoint = request.model_base or request.model_path
    fields = Source(checkpoint, request.hub_options).config_dict()
    is_assembled = fields["model_type"] != MoellavaConfig.model_type and not is_legacy(fields)
    inner = next(module for module in model.modules() if hasattr(module, "vision_tower") and hasattr(module, "encoder"))
    if request.options["encoder_debug"]:
        encoder = inner.encoder
        how = "as encoder_type says" if "encoder_type" in request.model_fields else "detected"
        logger.info(
            "encoder: %r, %s; model_type %r of the vision tower's config", config.encoder_type, how,
            config.vision_config.model_type,
        )  # fmt: skip
        has_own_source = is_assembled or request.vision_tower is not None
        source = parts.get("vision_tower") if has_own_source else checkpoint
        logger.info("encoder: %s", "has no source, and starts new" if source is None else f"loaded from {source}")
        logger.info(
            "encoder: pictures of %s pixels (natively %s); layers %s of %s; %s features of width %s per picture",
            encoder.image_size, encoder.native_image_size, encoder.feature_layers, encoder.num_hidden_layers,
            encoder.num_selected_tokens, encoder.feature_size,
        )  # fmt: skip
        _log_shapes("encoder", inner.vision_tower)
    if request.options["projector_debug"]:
        how = "by default" if is_assembled else "as the checkpoint has it"
        if (request.projector or {}).get("type"):
            how = "as asked for"
        if request.projector_path is not None:
            how = f"loaded from {request.projector_path}"
        logger.info("projector: %r, %s; %s", config.projector_config.type, how, config.projector_config.fields)
        logger.info(
            "projector: from %s features of width %s to %s tokens of width %s per picture",
            inner.encoder.num_selected_tokens, inner.encoder.feature_size, config.image_seq_length,
            config.text_embedding_size,
        )  # fmt: skip
        _log_shapes("projector", inner.multi_modal_projector)


def log_coverage(model: Any) -> None:
    """Logs what of a quantised model is quantised, what is not and why."""
    if getattr(model.config, "quantization_config", None) is None:
        return
    coverage = quantization_coverage(model)
    for line in coverage.lines():
        logger.info("quantised: %s", line)
    for part in coverage.parts:
        if STACKED in part.left:
            logger.warning(
                "The experts of this %r are %s, which %s leaves in full precision: %s bytes.",
                model.config.text_config.model_type, STACKED, coverage.method,
                f"{part.bytes:,}",
            )  # fmt: skip


def _log_shapes(label: str, part: torch.nn.Module) -> None:
    for name, parameter in part.named_parameters():
        logger.info("%s: %s %s %s", label, name, tuple(parameter.shape), parameter.dtype)


__all__ = ["log_coverage", "log_parts", "logs_shown"]

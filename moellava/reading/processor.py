# SPDX-License-Identifier: Apache-2.0
"""The processor of a model: read from a checkpoint, or made of an image processor and a tokenizer."""

import copy
from typing import Any

import transformers

from ..chatting.chat_templates import IMAGE_TOKEN, multimodal_chat_template
from ..modeling import MoellavaForCausalLM
from ..parts.vision_encoder_moellava import VisionEncoder
from ..processing import MoellavaProcessor
from .sources import Source


def make_processor(model: MoellavaForCausalLM, image_processor: Any, tokenizer: Any) -> MoellavaProcessor:
    """Returns the processor that prepares text and pictures for a model."""
    return MoellavaProcessor(
        image_processor=fit_image_processor(image_processor, model.model.encoder),
        tokenizer=tokenizer,
        num_image_tokens=model.config.image_seq_length,
        image_aspect_ratio=model.config.image_aspect_ratio,
        image_token=IMAGE_TOKEN,
        chat_template=multimodal_chat_template(tokenizer.chat_template, IMAGE_TOKEN),
    )


def fit_image_processor(image_processor: Any, encoder: VisionEncoder) -> Any:
    """Returns an image processor that gives pictures of the size that the encoder takes."""
    if encoder.vision_config.model_type == "siglip2_vision_model":
        # Its own processor cuts pictures into patches of any number; the encoder does that, of square pictures.
        image_processor = transformers.SiglipImageProcessor(
            size={"height": encoder.image_size, "width": encoder.image_size},
            image_mean=image_processor.image_mean,
            image_std=image_processor.image_std,
            resample=image_processor.resample,
        )
    image_processor = copy.deepcopy(image_processor)
    side = encoder.image_size
    if encoder.interpolates or output_side(image_processor) != side:
        if getattr(image_processor, "crop_size", None) and getattr(image_processor, "do_center_crop", False):
            image_processor.crop_size = type(image_processor.crop_size)(height=side, width=side)
        size = image_processor.size
        by_edge = "shortest_edge" in size and size["shortest_edge"] is not None
        image_processor.size = type(size)(**({"shortest_edge": side} if by_edge else {"height": side, "width": side}))
    return image_processor


def output_side(image_processor: Any) -> int | None:
    """The side in pixels of what an image processor gives, or `None` where it is not square or not fixed."""
    cropped = getattr(image_processor, "do_center_crop", False) and getattr(image_processor, "crop_size", None)
    size = image_processor.crop_size if cropped else image_processor.size
    height, width = (size.get("height"), size.get("width")) if hasattr(size, "get") else (None, None)
    return height if height == width else None


def read_processor(source: Source) -> Any:
    """Returns the processor of a checkpoint of this package.

    Raises:
        ValueError: It cannot be loaded.
    """
    try:
        # Not AutoProcessor, which looks for the class that a file of the checkpoint names.
        return MoellavaProcessor.from_pretrained(
            source.name, trust_remote_code=source.trust_remote_code, **source.hub_options
        )
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"The processor of {source} cannot be loaded ({type(error).__name__}: {str(error).partition(chr(10))[0]}). "
            "Expected processor_config.json and the tokenizer's files beside the model, as save_pretrained writes them."
        ) from error


def make_processor_like(processor: Any, model: MoellavaForCausalLM) -> Any:
    """Returns a processor for a model whose pictures differ from those that `processor` prepares."""
    remade = make_processor(model, processor.image_processor, processor.tokenizer)
    remade.chat_template = processor.chat_template
    return remade


__all__ = ["fit_image_processor", "make_processor", "make_processor_like", "output_side", "read_processor"]

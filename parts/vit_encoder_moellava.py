# SPDX-License-Identifier: Apache-2.0
"""The vision transformer."""

from typing import Any

from .vision_encoder_moellava import VisionEncoder


class VitEncoder(VisionEncoder):
    """The vision transformer: Dosovitskiy et al. 2020, arXiv:2010.11929."""

    encoder_type = "vit"
    model_types = detected_model_types = ("vit",)
    layers_name = "layers"
    unused_weights = ("pooler.",)

    @property
    def _constructor_arguments(self) -> dict[str, Any]:
        return {"add_pooling_layer": False}


__all__ = ["VitEncoder"]

# SPDX-License-Identifier: Apache-2.0
"""The vision transformer."""

from .vision_encoder_moellava import VisionEncoder


class VitEncoder(VisionEncoder):
    """The vision transformer: Dosovitskiy et al. 2020, arXiv:2010.11929."""

    encoder_type = "vit"
    model_types = detected_model_types = ("vit",)
    layers_name = "layers"
    unused_weights = ("pooler.",)
    constructor_arguments = {"add_pooling_layer": False}

# SPDX-License-Identifier: Apache-2.0
"""DINOv2's vision tower."""

from .vision_encoder_moellava import VisionEncoder


class Dinov2Encoder(VisionEncoder):
    """DINOv2, with and without register tokens: arXiv:2304.07193 (Oquab et al. 2023), arXiv:2309.16588."""

    encoder_type = "dinov2"
    model_types = detected_model_types = ("dinov2", "dinov2_with_registers")
    layers_name = "encoder.layer"
    # Its embeddings do so whenever the picture is of another size.
    interpolates_when_asked, interpolates_by_itself = False, True

# SPDX-License-Identifier: Apache-2.0
"""CLIP's vision tower."""

from .vision_encoder_moellava import VisionEncoder


class ClipEncoder(VisionEncoder):
    """CLIP's vision tower: Radford et al. 2021, arXiv:2103.00020."""

    encoder_type = "clip"
    model_types = detected_model_types = ("clip_vision_model",)

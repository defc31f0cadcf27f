# SPDX-License-Identifier: Apache-2.0
"""BiomedCLIP's vision tower."""

from .vit_encoder_moellava import VitEncoder


class BiomedClipEncoder(VitEncoder):
    """BiomedCLIP's vision tower, an open_clip model whose trunk is a plain ViT: Zhang et al. 2023, arXiv:2303.00915."""

    encoder_type = "biomedclip"
    detected_model_types = ()  # its config is a ViT's: known from the checkpoint that it is assembled from

# SPDX-License-Identifier: Apache-2.0
"""What a model is: its config, the names of its fields, the registries of its parts, and what a checkpoint holds."""

from transformers import AutoConfig

from .configuration_moellava import MoellavaConfig, MoellavaEncoderConfig, MoellavaMoeConfig, MoellavaProjectorConfig
from .registry_moellava import register_encoder, register_projector


AutoConfig.register(MoellavaConfig.model_type, MoellavaConfig, exist_ok=True)

__all__ = [
    "MoellavaConfig",
    "MoellavaEncoderConfig",
    "MoellavaMoeConfig",
    "MoellavaProjectorConfig",
    "register_encoder",
    "register_projector",
]

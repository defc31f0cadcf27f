# SPDX-License-Identifier: Apache-2.0
"""What a model is: its config, and what configs of this package have in common."""

from transformers import AutoConfig

from .configuration_moellava import MoellavaConfig, MoellavaProjectorConfig
from .moe_config_moellava import MoellavaMoeConfig
from .user_encoder_config_moellava import MoellavaEncoderConfig


AutoConfig.register(MoellavaConfig.model_type, MoellavaConfig, exist_ok=True)

__all__ = ["MoellavaConfig", "MoellavaEncoderConfig", "MoellavaMoeConfig", "MoellavaProjectorConfig"]

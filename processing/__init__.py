# SPDX-License-Identifier: Apache-2.0
"""What a model is fed: the processor, and the conversion of pictures."""

from transformers import AutoProcessor

from ..configuration import MoellavaConfig
from .processing_moellava import MoellavaProcessor


AutoProcessor.register(MoellavaConfig, MoellavaProcessor, exist_ok=True)

__all__ = ["MoellavaProcessor"]

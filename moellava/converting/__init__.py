# SPDX-License-Identifier: Apache-2.0
"""Older checkpoints: LLaVA, MoE-LLaVA, Med-MoE, transformers' LLaVA; adapters and projectors of them."""

from .converter import ConversionReport, convert, load_older
from .older_config import OlderCheckpointError, is_older


__all__ = ["ConversionReport", "OlderCheckpointError", "convert", "is_older", "load_older"]

# SPDX-License-Identifier: Apache-2.0
"""Older checkpoints: LLaVA, MoE-LLaVA, Med-MoE, transformers' LLaVA; adapters and projectors of them."""

from .conversion import ConversionReport, convert
from .legacy_checkpoint import load_legacy
from .legacy_config import OlderCheckpointError, is_legacy


__all__ = ["ConversionReport", "OlderCheckpointError", "convert", "is_legacy", "load_legacy"]

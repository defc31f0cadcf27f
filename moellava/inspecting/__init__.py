# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint is made of, and what of a quantised model is quantised."""

from .checkpoint import CheckpointSummary, inspect_checkpoint
from .quantization import quantization_coverage, resident_bytes


__all__ = ["CheckpointSummary", "inspect_checkpoint", "quantization_coverage", "resident_bytes"]

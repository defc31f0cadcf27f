# SPDX-License-Identifier: Apache-2.0
"""SigLIP's vision tower."""

import math

import torch
from torch import nn
from transformers.modeling_outputs import ModelOutput

from .vision_encoder_moellava import VisionEncoder


class SiglipEncoder(VisionEncoder):
    """SigLIP's vision tower, which has no class token: Zhai et al. 2023, arXiv:2303.15343; SigLIP 2, arXiv:2502.14786.

    The SigLIP 2 checkpoints of one resolution are SigLIP models. Those of flexible resolution (`siglip2_vision_model`,
    "NaFlex") get square pictures here, cut into as many patches as they have positions.
    """

    encoder_type = "siglip"
    model_types = detected_model_types = ("siglip_vision_model", "siglip2_vision_model")
    num_class_tokens = 0

    @property
    def _is_flexible(self) -> bool:
        return self.vision_config.model_type == "siglip2_vision_model"

    @property
    def native_image_size(self) -> int:
        if self._is_flexible:
            return math.isqrt(self.vision_config.num_patches) * self.patch_size
        return super().native_image_size

    @property
    def interpolates_when_asked(self) -> bool:
        return not self._is_flexible

    @property
    def interpolates_by_itself(self) -> bool:
        return self._is_flexible

    def build(self) -> nn.Module:
        tower = super().build()
        tower.use_head = False  # nothing reads what the pooling head gives; its weights stay in the checkpoint
        return tower

    def _run(self, tower: nn.Module, pixel_values: torch.Tensor, **asked: bool | list[int]) -> ModelOutput:
        if not self._is_flexible:
            return super()._run(tower, pixel_values, **asked)
        batch, channels, height, width = pixel_values.shape
        size = self.patch_size
        grid = (height // size, width // size)
        # (batch, channels, rows, size, columns, size) -> (batch, rows * columns, size * size * channels)
        patches = pixel_values.reshape(batch, channels, grid[0], size, grid[1], size)
        patches = patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, grid[0] * grid[1], size * size * channels)
        return tower(
            patches,
            pixel_attention_mask=patches.new_ones(patches.shape[:2], dtype=torch.long),
            spatial_shapes=torch.tensor([grid] * batch),
            return_dict=True,
            **asked,
        )

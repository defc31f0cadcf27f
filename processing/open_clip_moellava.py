# SPDX-License-Identifier: Apache-2.0
"""open_clip's preparation of pictures, equal to it bit for bit."""

import numpy as np
from transformers import CLIPImageProcessorPil
from transformers.image_utils import SizeDict


class OpenClipImageProcessor(CLIPImageProcessorPil):
    """CLIP's image processor as open_clip has it, on Pillow.

    It differs from `CLIPImageProcessorPil` in the crop of a picture that is half a pixel off centre: open_clip rounds
    it to even, as torchvision does, transformers down. On disk it is a `CLIPImageProcessor`, which any transformers
    loads; `MoellavaProcessor` makes this one of it again.
    """

    # What a saved processor calls this way of preparing pictures.
    backend_name = "open_clip"

    def center_crop(self, image: np.ndarray, size: SizeDict, **kwargs) -> np.ndarray:
        """Crops a picture of shape `(channels, height, width)` to `size` around its centre."""
        top, left = image.shape[-2] - size.height, image.shape[-1] - size.width
        if top < 0 or left < 0:
            return super().center_crop(image, size, **kwargs)
        top, left = round(top / 2), round(left / 2)
        return image[..., top : top + size.height, left : left + size.width]

    def to_dict(self) -> dict:
        return super().to_dict() | {"image_processor_type": "CLIPImageProcessor"}

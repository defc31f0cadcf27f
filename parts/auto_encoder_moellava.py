# SPDX-License-Identifier: Apache-2.0
"""Any vision tower of transformers."""

import functools
import inspect
import json
import math
import re

import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from ..configuration.tools_moellava import tools
from .measured_encoder_moellava import DrawnNumbers, MeasuredEncoder, as_tokens


# What towers call the tokens that they put before those of the patches.
_PREFIX_TOKENS = re.compile(r"(?!\w*pos)(?:cls|class|dist|reg)\w*")


class AutoEncoder(MeasuredEncoder):
    """Any vision tower of transformers that takes `pixel_values` and returns `hidden_states`.

    What the tower's config does not tell is measured, by running the tower once on the meta device: no weights, no
    arithmetic. The whole tower is run, whichever of its layers give the features.
    """

    encoder_type = "auto"

    @property
    def num_hidden_layers(self) -> int:
        layers = getattr(self.vision_config, "num_hidden_layers", None)
        return layers if isinstance(layers, int) else super().num_hidden_layers

    @property
    def num_prefix_tokens(self) -> int:
        count = self._token_count
        parameters = {name.rpartition(".")[2]: parameter for name, parameter in self._meta_tower.named_parameters()}
        known = [p.numel() // p.shape[-1] for name, p in parameters.items() if _PREFIX_TOKENS.fullmatch(name)]
        if not known:
            return 0
        if getattr(self.vision_config, "patch_size", None) is None:
            patches = count - sum(known)
            return sum(known) if patches > 0 and math.isqrt(patches) ** 2 == patches else 0
        prefix = max(count - (self.image_size // self.patch_size) ** 2, 0)
        if prefix not in (0, sum(known)):
            raise ValueError(
                f"The {self.tower_name} tower gives {prefix} tokens beside those of its patches, of which {sum(known)} "
                "are class or register tokens; which of them are patches is not known. Wrap it as an encoder of your "
                "own, see docs/extending.md."
            )
        return prefix

    @property
    def has_class_token(self) -> bool:
        names = {name.rpartition(".")[2] for name, _ in self._meta_tower.named_parameters()}
        return self.num_prefix_tokens > 0 and not names.isdisjoint({"cls_token", "class_token", "class_embedding"})

    @property
    def interpolates_when_asked(self) -> bool:
        return "interpolate_pos_encoding" in inspect.signature(type(self._meta_tower).forward).parameters

    @property
    def interpolates_by_itself(self) -> bool:
        """Whether the tower has no absolute position embeddings, which would fix the picture size."""
        names = [name for name, _ in self._meta_tower.named_parameters()]
        return not any("position_embedding" in name or "pos_embed" in name for name in names)

    @staticmethod
    def _as_tokens(hidden_state: torch.Tensor) -> torch.Tensor:
        """`as_tokens`, of maps `(batch, rows, columns, width)` too, as SAM has: pictures, and so maps, are square."""
        if hidden_state.dim() == 4 and hidden_state.shape[1] == hidden_state.shape[2] != hidden_state.shape[3]:
            return hidden_state.flatten(1, 2)
        return as_tokens(hidden_state)

    @property
    def _meta_tower(self) -> nn.Module:
        return _meta_tower(self.vision_config.model_type, as_key(self.vision_config))

    @property
    def _measured_shapes(self) -> list[tuple[int, int, int]]:
        return measured_shapes(self.vision_config.model_type, as_key(self.vision_config), self.image_size)


def as_key(vision_config) -> str:
    """The fields of a tower's config as one word, by which what was built or measured of it is kept."""
    fields = vision_config.to_dict()
    fields.pop("dtype", None)
    return json.dumps(fields, sort_keys=True, default=str)


@functools.lru_cache(maxsize=32)
def _meta_tower(model_type: str, fields: str) -> nn.Module:
    config = AutoConfig.for_model(model_type, **{k: v for k, v in json.loads(fields).items() if k != "model_type"})
    with torch.device("meta"):
        with tools().building_part("vision_config", config):
            return AutoModel.from_config(config).eval()


@functools.lru_cache(maxsize=32)
def measured_shapes(model_type: str, fields: str, image_size: int) -> list[tuple[int, int, int]]:
    """The shapes `(2, tokens, width)` of all hidden states of a tower, of two pictures."""
    tower = _meta_tower(model_type, fields)
    channels = getattr(tower.config, "num_channels", 3)
    pixel_values = torch.empty(2, channels, image_size, image_size, device="meta")
    extra = {}
    if "interpolate_pos_encoding" in inspect.signature(type(tower).forward).parameters:
        native = getattr(tower.config, "image_size", image_size)
        extra["interpolate_pos_encoding"] = native not in (image_size, [image_size] * 2, (image_size,) * 2)
    try:
        with torch.no_grad(), DrawnNumbers() as drawn:
            outputs = tower(pixel_values, output_hidden_states=True, return_dict=True, **extra)
        hidden_states = outputs.hidden_states
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"A {model_type} model cannot be a vision tower here: it does not return hidden states for pixel_values "
            f"({type(error).__name__}: {error}). Wrap it as an encoder of your own, see docs/extending.md."
        ) from error
    if not hidden_states:
        raise ValueError(
            f"A {model_type} model cannot be a vision tower here: it returns no hidden states. Wrap it as an encoder "
            "of your own, see docs/extending.md."
        )
    drawn.check(f"A {model_type} model")
    shapes = [tuple(AutoEncoder._as_tokens(hidden_state).shape) for hidden_state in hidden_states]
    if any(shape[0] != 2 for shape in shapes):
        raise ValueError(
            f"A {model_type} model cannot be a vision tower here: it joins the tokens of several pictures in one row. "
            "Expected a tower that returns features of shape (pictures, tokens, width)."
        )
    return shapes

# SPDX-License-Identifier: Apache-2.0
"""What every vision encoder has in common: which features a tower gives, and how it is built and run.

An encoder answers for a config's tower: how many tokens of which width it gives, which of them are class or register
tokens. The tower itself is a plain module and lives in the model as `vision_tower`; an encoder holds no weights. Here
it is a plain vision transformer, whose config tells all of this; `measured_encoder_moellava.py` is for the others.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, ModelOutput
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from ..configuration.tools_moellava import tools
from ..configuration.versions_moellava import SELECTS_HIDDEN_STATES


class LayersInUse(nn.ModuleList):
    """A tower's layers, of which iteration gives only the first `in_use`.

    Every layer stays a child, so that the weights of those behind the feature layer are kept in the checkpoint without
    being run.
    """

    def __init__(self, modules=None, in_use: int | None = None):
        super().__init__(modules)
        self.in_use = in_use

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(list(self._modules.values())[: self.in_use])


class VisionEncoder:
    """A plain vision transformer of transformers, which takes `pixel_values` and returns `hidden_states`.

    Args:
        config (`MoellavaConfig`): The model's config; the encoder reads `vision_config` and the `vision_feature_*` and
            `image_size` fields.

    Raises:
        ValueError: Where moellava is installed: a field that this tower cannot satisfy, such as a layer out of range, a
            class token where there is none, a picture size that it does not take.
    """

    encoder_type: str
    # The values of `vision_config.model_type` that the encoder takes; empty for any.
    model_types: tuple[str, ...] = ()
    # Those from which it is recognised when nobody names it.
    detected_model_types: tuple[str, ...] = ()
    num_class_tokens = 1
    # Whether the tower takes pictures of another size: where it is asked to interpolate its position embeddings, or by
    # itself.
    interpolates_when_asked = True
    interpolates_by_itself = False
    # Where the blocks are in the tower.
    layers_name = "encoder.layers"
    # What the constructor of the tower's class is given.
    constructor_arguments: Mapping[str, Any] = {}
    # Beginnings of the names of weights that checkpoints of such towers hold and that are not built here.
    unused_weights: tuple[str, ...] = ()

    def __init__(self, config):
        self.vision_config = config.vision_config
        self._image_size = config.image_size
        layers = config.vision_feature_layer
        layers = [layers] if isinstance(layers, int) else list(layers)
        self.feature_layers = [layer % (self.num_hidden_layers + 1) for layer in layers]
        self.asked_layers = layers
        self.strategy = config.vision_feature_select_strategy
        self._drop_first_patch = bool(getattr(config, "drop_first_patch", False))
        self.interpolates = self.image_size != self.native_image_size
        tools().check_encoder(self)
        # Decided once: `encode` runs at every forward, and measuring a tower is nothing that torch.compile can trace.
        self._first_selected = self._num_skipped_tokens
        asks = self.interpolates and self.interpolates_when_asked
        self._tower_arguments = {"interpolate_pos_encoding": True} if asks else {}

    # What the tower gives

    @property
    def tower_name(self) -> str:
        """What error messages call the tower."""
        return self.vision_config.model_type

    @property
    def num_hidden_layers(self) -> int:
        """The number of layers, one less than the number of hidden states."""
        return self.vision_config.num_hidden_layers

    @property
    def native_image_size(self) -> int:
        """The side in pixels of the square pictures that the tower was made for."""
        size = getattr(self.vision_config, "image_size", None) or self._image_size
        if size is None:
            raise ValueError(f"A {self.tower_name} tower does not tell its picture size: give image_size.")
        return self._side(size, "image_size")

    @property
    def image_size(self) -> int:
        """The side in pixels of the square pictures that the tower gets."""
        return self._image_size or self.native_image_size

    @property
    def patch_size(self) -> int:
        """The side of a patch in pixels."""
        return self._side(self.vision_config.patch_size, "patch_size")

    def _side(self, size: int | list[int] | tuple[int, ...], name: str) -> int:
        """The side of a square that a field of the tower's config gives as a number, or as a pair of equal ones."""
        sides = {size} if isinstance(size, int) else {*size}
        if len(sides) != 1:
            raise ValueError(f"vision_config.{name} is {size}; only square pictures and patches are supported.")
        return sides.pop()

    @property
    def num_patches(self) -> int:
        """The number of patch tokens of one picture."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_prefix_tokens(self) -> int:
        """The number of class and register tokens before the patch tokens."""
        return self.num_class_tokens + getattr(self.vision_config, "num_register_tokens", 0)

    @property
    def has_class_token(self) -> bool:
        """Whether the first token is a class token."""
        return self.num_class_tokens > 0

    @property
    def num_selected_tokens(self) -> int:
        """The number of tokens of one picture that the projector gets."""
        if self.strategy == "cls":
            return 1
        return self.num_prefix_tokens + self.num_patches - self._num_skipped_tokens

    @property
    def _num_skipped_tokens(self) -> int:
        """The number of tokens before the first selected one."""
        return (0 if self.strategy == "full" else self.num_prefix_tokens) + self._drop_first_patch

    @property
    def feature_size(self) -> int:
        """The width of the features that the projector gets: the sum of those of the feature layers."""
        return sum(self._layer_width(layer) for layer in self.feature_layers)

    def _layer_width(self, layer: int) -> int:
        return self.vision_config.hidden_size

    # Building and running it

    @property
    def plans(self) -> Mapping[str, Mapping[str, str]]:
        """How processes divide the tower, by kind of plan and names within it. Attention each of them holds whole."""
        block = f"{self.layers_name}.*"
        return {
            "_tp_plan": {f"{block}.mlp.fc1": "colwise", f"{block}.mlp.fc2": "rowwise"},
            "_fsdp_plan": {block: "free_full_weight"},
        }

    def build(self) -> nn.Module:
        """Builds the tower, with its initial weights, and makes it end behind the last feature layer."""
        with tools().building_part("vision_config", self.vision_config):
            tower = AutoModel.from_config(self.vision_config, **self.constructor_arguments)
        # Hidden state 0, the embeddings, is known as the input of the first layer, which has to be run for it.
        needed = max(*self.feature_layers, 1)
        if self.layers_name and needed < self.num_hidden_layers:
            tower.set_submodule(self.layers_name, LayersInUse(tower.get_submodule(self.layers_name), in_use=needed))
        return tower

    def initialize(self, tower: nn.Module) -> None:
        """Gives what was not loaded of a tower its values, where transformers does not: a user's own."""

    def encode(
        self,
        tower: nn.Module,
        pixel_values: torch.Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutput:
        """Runs the tower on pictures.

        Args:
            tower (`nn.Module`): The tower that `build` made.
            pixel_values (`torch.Tensor` of shape `(num_images, channels, image_size, image_size)`): Prepared pictures.
            output_hidden_states (`bool`, *optional*): Whether to return the hidden states of all layers that are run:
                those up to the last feature layer. By default as the tower's config says.
            output_attentions (`bool`, *optional*): Whether to return the attention weights of those layers. By default
                as the tower's config says.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutput`]: `last_hidden_state` holds the features, of shape
            `(num_images, num_selected_tokens, feature_size)`; `hidden_states` and `attentions` what was asked for and
            the tower gives.
        """
        if output_hidden_states is None:
            output_hidden_states = getattr(self.vision_config, "output_hidden_states", False)
        asked = {} if output_attentions is None else {"output_attentions": output_attentions}
        _install_capturing_hooks(tower)
        # Of the hidden states, those of the feature layers alone are kept alive, where transformers can choose.
        kept = True if output_hidden_states or not SELECTS_HIDDEN_STATES else self.feature_layers
        outputs = self._run(tower, pixel_values, output_hidden_states=kept, **asked)
        selected = [self._select(self._as_tokens(outputs.hidden_states[layer])) for layer in self.feature_layers]
        return BaseModelOutput(
            last_hidden_state=selected[0] if len(selected) == 1 else torch.cat(selected, dim=-1),
            hidden_states=outputs.hidden_states if output_hidden_states else None,
            attentions=outputs.get("attentions"),
        )

    def _run(self, tower: nn.Module, pixel_values: torch.Tensor, **asked: bool | list[int]) -> ModelOutput:
        return tower(pixel_values, return_dict=True, **asked, **self._tower_arguments)

    @staticmethod
    def _as_tokens(hidden_state: torch.Tensor) -> torch.Tensor:
        return hidden_state  # (num_images, tokens, hidden_size)

    def _select(self, tokens: torch.Tensor) -> torch.Tensor:  # (num_images, tokens, hidden_size)
        return tokens[:, :1] if self.strategy == "cls" else tokens[:, self._first_selected :]


@torch.compiler.assume_constant_result
def _install_capturing_hooks(tower: nn.Module) -> bool:
    """Installs what captures hidden states; transformers does so under a lock that torch.compile cannot trace."""
    for module in tower.modules():
        # What is installed in a model's inner one already would be installed twice.
        is_new = not any(getattr(inner, "_output_capturing_hooks_installed", False) for inner in module.modules())
        if isinstance(module, PreTrainedModel) and is_new:
            maybe_install_capturing_hooks(module)
    return True

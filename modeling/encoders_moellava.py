# SPDX-License-Identifier: Apache-2.0
"""Vision encoders: what the model has to know of a vision tower, and how it takes features from it.

`encoder_for(config)` gives the object that answers for a config's tower: how many tokens of which width it gives, which
of them are class or register tokens, how the tower is built and run. The tower itself is a plain module and lives in
the model as `vision_tower`; an encoder holds no weights.

A user's own encoder is one `nn.Module` under `@register_encoder`. See `docs/extending.md`.
"""

import functools
import inspect
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, ModelOutput
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from ..configuration.names_moellava import canonical_encoder_type
from ..configuration.registry_moellava import ENCODERS, is_older_encoder, register_encoder
from ..configuration.versions_moellava import SELECTS_HIDDEN_STATES
from .library_parts_moellava import DrawnNumbers, build_library_part


# What towers call the tokens that they put before those of the patches.
_PREFIX_TOKENS = re.compile(r"(?!\w*pos)(?:cls|class|dist|reg)\w*")


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
    """Any vision tower of transformers that takes `pixel_values` and returns `hidden_states`.

    What the tower's config does not tell is measured, by running the tower once on the meta device (no weights, no
    arithmetic). The subclasses say it for the families that they name, and stop the tower behind the feature layer.

    Args:
        config (`MoellavaConfig`): The model's config; the encoder reads `vision_config` and the `vision_feature_*` and
            `image_size` fields.

    Raises:
        ValueError: A field that this tower cannot satisfy: a layer out of range, a class token where there is none, a
            picture size that it does not take, an `encoder_type` that its config contradicts.
    """

    encoder_type = "auto"
    # The values of `vision_config.model_type` that the encoder takes; empty for any.
    model_types: tuple[str, ...] = ()
    # The values from which the encoder is recognised when nobody names it.
    detected_model_types: tuple[str, ...] = ()
    # Towers whose hidden states are the raw outputs of the layers of one ModuleList, so that it can end early.
    ends_early = False
    # Beginnings of the names of weights that checkpoints of such towers hold and that are not built here.
    unused_weights: tuple[str, ...] = ()
    # How processes divide the tower, by kind of plan and names within it; without, each holds it whole.
    plans: Mapping[str, Mapping[str, str]] = {}

    def __init__(self, config):
        self.vision_config = config.vision_config
        self._image_size = config.image_size
        self._check_model_type()
        layers = config.vision_feature_layer
        layers = [layers] if isinstance(layers, int) else list(layers)
        self.feature_layers = [self._absolute_layer(layer) for layer in layers]
        self.strategy = config.vision_feature_select_strategy
        self._drop_first_patch = bool(getattr(config, "drop_first_patch", False))
        self.interpolates = self.image_size != self.native_image_size
        self._check_image_size()
        if not layers:
            raise ValueError(
                "vision_feature_layer is an empty list; give one layer or several, such as -2 or [-2, -5]."
            )
        if self.strategy == "cls" and not self.has_class_token:
            raise ValueError(
                f"vision_feature_select_strategy is 'cls', but a {self.tower_name} tower has no class "
                "token. Use 'default' for its patch tokens, or 'full'."
            )
        if self.num_selected_tokens < 1:
            raise ValueError(
                f"The {self.tower_name} tower gives no patch token for pictures of {self.image_size} "
                "pixels. Give a larger image_size."
            )
        # Decided once: `features` runs at every forward, and measuring a tower is nothing that torch.compile can trace.
        self._first_selected = self._num_skipped_tokens
        asks = self.interpolates and self._interpolation_is_asked_for
        self._tower_arguments = {"interpolate_pos_encoding": True} if asks else {}

    # What the tower gives

    @property
    def tower_name(self) -> str:
        """What error messages call the tower."""
        return self.vision_config.model_type

    @property
    def num_hidden_layers(self) -> int:
        """The number of layers, one less than the number of hidden states."""
        layers = getattr(self.vision_config, "num_hidden_layers", None)
        return layers if isinstance(layers, int) else len(self._measured_shapes) - 1

    @property
    def native_image_size(self) -> int:
        """The side in pixels of the square pictures that the tower was made for.

        Raises:
            ValueError: Its config and the model's do not tell one, or tell one that is not square.
        """
        size = getattr(self.vision_config, "image_size", None)
        if size is None:
            size = self._image_size
        if size is None:
            raise ValueError(f"A {self.tower_name} tower does not tell its picture size: give image_size.")
        return self._side(size, "image_size")

    @property
    def image_size(self) -> int:
        """The side in pixels of the square pictures that the tower gets."""
        return self._image_size or self.native_image_size

    @property
    def patch_size(self) -> int:
        """The side of a patch in pixels.

        Raises:
            ValueError: Patches are not square.
        """
        return self._side(self.vision_config.patch_size, "patch_size")

    def _side(self, size: int | list[int] | tuple[int, ...], name: str) -> int:
        """The side of a square that a field of the tower's config gives as a number, or as a pair of equal ones."""
        sides = {size} if isinstance(size, int) else {*size}
        if len(sides) != 1 or min(sides) < 1:
            raise ValueError(
                f"vision_config.{name} of the {self.tower_name} tower is {size}; expected a number of pixels of at "
                "least 1, or a pair of equal ones: only square pictures and patches are supported."
            )
        return sides.pop()

    @property
    def num_patches(self) -> int:
        """The number of patch tokens of one picture."""
        return self._token_count - self.num_prefix_tokens

    @property
    def num_prefix_tokens(self) -> int:
        """The number of class and register tokens before the patch tokens."""
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
        """Whether the first token is a class token."""
        names = {name.rpartition(".")[2] for name, _ in self._meta_tower.named_parameters()}
        return self.num_prefix_tokens > 0 and not names.isdisjoint({"cls_token", "class_token", "class_embedding"})

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
        width = getattr(self.vision_config, "hidden_size", None)
        return width if self.model_types and isinstance(width, int) else self._measured_shapes[layer][-1]

    @property
    def _token_count(self) -> int:
        counts = {self._measured_shapes[layer][1] for layer in self.feature_layers}
        if len(counts) > 1:
            raise ValueError(
                f"The layers {self.feature_layers} of the {self.tower_name} tower give {sorted(counts)} "
                "tokens, so that their features cannot be joined. Choose layers of one resolution."
            )
        return counts.pop()

    # Building and running it

    def build(self) -> nn.Module:
        """Builds the tower, with its initial weights, and makes it end behind the last feature layer."""
        tower = build_library_part("vision_config", self.vision_config, **self._constructor_arguments)
        if self.ends_early:
            self._end_early(tower)
        # transformers installs what captures hidden states at the first call, under a lock that torch.compile cannot
        # trace: a model that is compiled before it has run would break the graph.
        for module in tower.modules():
            if isinstance(module, PreTrainedModel):
                maybe_install_capturing_hooks(module)
        return tower

    def features(self, tower: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
        """Runs the tower on pictures, for its features alone; see `encode`."""
        return self.encode(tower, pixel_values).last_hidden_state

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
        outputs = self._run(
            tower, pixel_values, output_hidden_states=True if output_hidden_states else self._kept_layers, **asked
        )
        selected = [self._select(self._as_tokens(outputs.hidden_states[layer])) for layer in self.feature_layers]
        return BaseModelOutput(
            last_hidden_state=selected[0] if len(selected) == 1 else torch.cat(selected, dim=-1),
            hidden_states=outputs.hidden_states if output_hidden_states else None,
            attentions=outputs.get("attentions"),
        )

    def _run(self, tower: nn.Module, pixel_values: torch.Tensor, **asked: bool | list[int]) -> ModelOutput:
        return tower(pixel_values, return_dict=True, **asked, **self._tower_arguments)

    @property
    def _kept_layers(self) -> list[int] | bool:
        """Which hidden states the tower keeps alive: the feature layers', where transformers can choose."""
        return self.feature_layers if SELECTS_HIDDEN_STATES else True

    def _select(self, tokens: torch.Tensor) -> torch.Tensor:  # (num_images, tokens, hidden_size)
        return tokens[:, :1] if self.strategy == "cls" else tokens[:, self._first_selected :]

    @property
    def _constructor_arguments(self) -> dict[str, Any]:
        return {}

    def _end_early(self, tower: nn.Module) -> None:
        # Hidden state 0, the embeddings, is known as the input of the first layer, which has to be run for it.
        needed = max(*self.feature_layers, 1)
        names = [
            name
            for name, module in tower.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == self.num_hidden_layers
        ]
        if len(names) == 1 and needed < self.num_hidden_layers:
            layers = tower.get_submodule(names[0])
            tower.set_submodule(names[0], LayersInUse(layers, in_use=needed))

    # Checks

    def _check_model_type(self) -> None:
        model_type = self.vision_config.model_type
        if self.model_types and model_type not in self.model_types:
            raise ValueError(
                f"encoder_type is {self.encoder_type!r}, but the vision tower's config says model_type {model_type!r}; "
                f"expected one of {', '.join(self.model_types)}. Use encoder_type={detect_encoder_type(model_type)!r}, "
                "or leave it out."
            )

    def _absolute_layer(self, layer: int) -> int:
        hidden_states = self.num_hidden_layers + 1
        if not isinstance(layer, int) or isinstance(layer, bool) or not -hidden_states <= layer < hidden_states:
            raise ValueError(
                f"vision_feature_layer {layer!r} is out of range: the {self.tower_name} tower has "
                f"{self.num_hidden_layers} layers, so expected an integer from {-hidden_states} to {hidden_states - 1} "
                "(0 is the output of the embeddings)."
            )
        return layer % hidden_states

    def _check_image_size(self) -> None:
        if not self.interpolates:
            return
        if not self._can_interpolate:
            raise ValueError(
                f"image_size is {self.image_size}, but the {self.tower_name} tower takes pictures of "
                f"{self.native_image_size} pixels and cannot interpolate its position embeddings. Leave image_size out."
            )
        patch = getattr(self.vision_config, "patch_size", None)
        patch = None if patch is None else self.patch_size
        if patch is not None and (self.image_size < patch or self.image_size % patch):
            raise ValueError(
                f"image_size is {self.image_size}, which is no multiple of the tower's patches of {patch} pixels. The "
                f"nearest that is: {max(round(self.image_size / patch), 1) * patch}."
            )
        if patch is not None and self.vision_config.patch_size != patch:
            _ = self._measured_shapes  # raises where transformers cannot interpolate with a pair

    @property
    def _interpolation_is_asked_for(self) -> bool:
        return "interpolate_pos_encoding" in inspect.signature(self._tower_class.forward).parameters

    @property
    def _can_interpolate(self) -> bool:
        return self._interpolation_is_asked_for or not self._has_position_table

    @property
    def _has_position_table(self) -> bool:
        """Whether the tower has absolute position embeddings, which fix the picture size."""
        return any(
            "position_embedding" in name or "pos_embed" in name for name, _ in self._meta_tower.named_parameters()
        )

    @property
    def _tower_class(self) -> type[PreTrainedModel]:
        return type(self._meta_tower)

    # Measuring, for what no config tells

    @staticmethod
    def _as_tokens(hidden_state: torch.Tensor) -> torch.Tensor:
        """`as_tokens`, of maps `(batch, rows, columns, width)` too, as SAM has: pictures, and so maps, are square."""
        if hidden_state.dim() == 4 and hidden_state.shape[1] == hidden_state.shape[2] != hidden_state.shape[3]:
            return hidden_state.flatten(1, 2)
        return as_tokens(hidden_state)

    @property
    def _meta_tower(self) -> nn.Module:
        return _meta_tower(self.vision_config.model_type, _as_key(self.vision_config))

    @property
    def _measured_shapes(self) -> list[tuple[int, int, int]]:
        return _measured_shapes(self.vision_config.model_type, _as_key(self.vision_config), self.image_size)


def _as_key(vision_config) -> str:
    fields = vision_config.to_dict()
    fields.pop("dtype", None)
    return json.dumps(fields, sort_keys=True, default=str)


@functools.lru_cache(maxsize=32)
def _meta_tower(model_type: str, fields: str) -> nn.Module:
    config = AutoConfig.for_model(model_type, **{k: v for k, v in json.loads(fields).items() if k != "model_type"})
    with torch.device("meta"):
        return build_library_part("vision_config", config).eval()


@functools.lru_cache(maxsize=32)
def _measured_shapes(model_type: str, fields: str, image_size: int) -> list[tuple[int, int, int]]:
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
    shapes = [tuple(VisionEncoder._as_tokens(hidden_state).shape) for hidden_state in hidden_states]
    if any(shape[0] != 2 for shape in shapes):
        raise ValueError(
            f"A {model_type} model cannot be a vision tower here: it joins the tokens of several pictures in one row. "
            "Expected a tower that returns features of shape (pictures, tokens, width)."
        )
    return shapes


def as_tokens(hidden_state: torch.Tensor) -> torch.Tensor:
    """Lays out a feature map `(batch, width, rows, columns)` as tokens `(batch, tokens, width)`; tokens stay."""
    return hidden_state if hidden_state.dim() == 3 else hidden_state.flatten(2).transpose(1, 2)


class PatchTransformer(VisionEncoder):
    """A plain vision transformer, whose config tells the number of every kind of token."""

    ends_early = True
    num_class_tokens = 1
    # Where the blocks are in the tower.
    layers_name = "encoder.layers"

    @property
    def plans(self) -> dict[str, dict[str, str]]:
        """How processes divide the tower; its attention, of whatever number of heads, each of them holds whole."""
        block = f"{self.layers_name}.*"
        return {
            "_tp_plan": {f"{block}.mlp.fc1": "colwise", f"{block}.mlp.fc2": "rowwise"},
            "_fsdp_plan": {block: "free_full_weight"},
        }

    @property
    def num_prefix_tokens(self) -> int:
        return self.num_class_tokens + getattr(self.vision_config, "num_register_tokens", 0)

    @property
    def has_class_token(self) -> bool:
        return self.num_class_tokens > 0

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@register_encoder("clip")
class ClipEncoder(PatchTransformer):
    """CLIP's vision tower: Radford et al. 2021, arXiv:2103.00020."""

    encoder_type = "clip"
    model_types = detected_model_types = ("clip_vision_model",)


@register_encoder("siglip")
class SiglipEncoder(PatchTransformer):
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
    def _can_interpolate(self) -> bool:
        return self._is_flexible or super()._can_interpolate

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


@register_encoder("vit")
class VitEncoder(PatchTransformer):
    """The vision transformer: Dosovitskiy et al. 2020, arXiv:2010.11929."""

    encoder_type = "vit"
    model_types = detected_model_types = ("vit",)
    layers_name = "layers"
    unused_weights = ("pooler.",)

    @property
    def _constructor_arguments(self) -> dict[str, Any]:
        return {"add_pooling_layer": False}


@register_encoder("biomedclip")
class BiomedClipEncoder(VitEncoder):
    """BiomedCLIP's vision tower, an open_clip model whose trunk is a plain ViT: Zhang et al. 2023, arXiv:2303.00915."""

    encoder_type = "biomedclip"
    detected_model_types = ()  # its config is a ViT's: known from the checkpoint that it is assembled from


@register_encoder("dinov2")
class Dinov2Encoder(PatchTransformer):
    """DINOv2, with and without register tokens: arXiv:2304.07193 (Oquab et al. 2023), arXiv:2309.16588."""

    encoder_type = "dinov2"
    model_types = detected_model_types = ("dinov2", "dinov2_with_registers")
    layers_name = "encoder.layer"

    @property
    def _can_interpolate(self) -> bool:
        return True  # its embeddings interpolate whenever the picture is of another size


register_encoder("auto")(VisionEncoder)


def detect_encoder_type(model_type: str) -> str:
    """Returns the encoder that answers for a tower's `model_type`: the one that names it, else `"auto"`."""
    for name in ENCODERS.names():
        if model_type in getattr(ENCODERS[name], "detected_model_types", ()):
            return name
    return VisionEncoder.encoder_type


def encoder_for(config) -> VisionEncoder:
    """Returns the encoder of a `MoellavaConfig`, checked.

    Raises:
        ValueError: The encoder is unknown, or cannot do what the config asks for.
    """
    name = config.encoder_type or detect_encoder_type(config.vision_config.model_type)
    name = canonical_encoder_type(name)
    encoder_class = ENCODERS[name]
    if issubclass(encoder_class, VisionEncoder):
        return encoder_class(config)
    from .own_encoders_moellava import CustomEncoder, OlderEncoder  # late: it is built on this file

    own_class = OlderEncoder if is_older_encoder(encoder_class) else CustomEncoder
    return own_class(config, name, encoder_class)


__all__ = ["VisionEncoder", "as_tokens", "detect_encoder_type", "encoder_for"]

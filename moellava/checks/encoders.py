# SPDX-License-Identifier: Apache-2.0
"""What a config may ask of a vision encoder."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedConfig

from ..parts.auto_encoder_moellava import as_key, measured_shapes
from ..parts.part_table_moellava import detect_encoder_type
from ..parts.user_encoder_moellava import UserEncoder
from ..parts.vision_encoder_moellava import VisionEncoder


def check_encoder(encoder: VisionEncoder) -> None:
    """Checks that an encoder can do what its config asks for.

    Raises:
        ValueError: An `encoder_type` that the tower's config contradicts, a layer out of range, a picture size that the
            tower does not take, a class token where there is none.
    """
    model_type = encoder.vision_config.model_type
    if encoder.model_types and model_type not in encoder.model_types:
        raise ValueError(
            f"encoder_type is {encoder.encoder_type!r}, but the vision tower's config says model_type {model_type!r}; "
            f"expected one of {', '.join(encoder.model_types)}. Use encoder_type={detect_encoder_type(model_type)!r}, "
            "or leave it out."
        )
    if not encoder.asked_layers:
        raise ValueError("vision_feature_layer is an empty list; give one layer or several, such as -2 or [-2, -5].")
    for layer in encoder.asked_layers:
        _check_layer(encoder, layer)
    if isinstance(encoder, UserEncoder):
        encoder.check_image_size()
    elif encoder.interpolates:
        _check_image_size(encoder)
    if encoder.strategy == "cls" and not encoder.has_class_token:
        raise ValueError(
            f"vision_feature_select_strategy is 'cls', but a {encoder.tower_name} tower has no class "
            "token. Use 'default' for its patch tokens, or 'full'."
        )
    if encoder.num_selected_tokens < 1:
        raise ValueError(
            f"The {encoder.tower_name} tower gives no patch token for pictures of {encoder.image_size} "
            "pixels. Give a larger image_size."
        )


@contextmanager
def measuring(config: PreTrainedConfig) -> Iterator[None]:
    """Says what is wrong with a tower's config whose fields tell nothing that makes sense, as a ValueError."""
    try:
        yield
    except (ArithmeticError, AttributeError, TypeError) as error:
        raise ValueError(
            f"vision_config does not describe a {config.vision_config.model_type!r} tower that can be built "
            f"({type(error).__name__}: {error}). Expected a config that transformers builds a vision model of."
        ) from error


def _check_layer(encoder: VisionEncoder, layer: int) -> None:
    hidden_states = encoder.num_hidden_layers + 1
    if not isinstance(layer, int) or isinstance(layer, bool) or not -hidden_states <= layer < hidden_states:
        raise ValueError(
            f"vision_feature_layer {layer!r} is out of range: the {encoder.tower_name} tower has "
            f"{encoder.num_hidden_layers} layers, so expected an integer from {-hidden_states} to {hidden_states - 1} "
            "(0 is the output of the embeddings)."
        )


def _check_image_size(encoder: VisionEncoder) -> None:
    if not (encoder.interpolates_when_asked or encoder.interpolates_by_itself):
        raise ValueError(
            f"image_size is {encoder.image_size}, but the {encoder.tower_name} tower takes pictures of "
            f"{encoder.native_image_size} pixels and cannot interpolate its position embeddings. Leave image_size out."
        )
    patch = None if getattr(encoder.vision_config, "patch_size", None) is None else encoder.patch_size
    if patch is not None and (encoder.image_size < patch or encoder.image_size % patch):
        raise ValueError(
            f"image_size is {encoder.image_size}, which is no multiple of the tower's patches of {patch} pixels. The "
            f"nearest that is: {max(round(encoder.image_size / patch), 1) * patch}."
        )
    if patch is not None and encoder.vision_config.patch_size != patch:
        # Raises where transformers cannot interpolate with a pair.
        measured_shapes(encoder.vision_config.model_type, as_key(encoder.vision_config), encoder.image_size)


__all__ = ["check_encoder", "measuring"]

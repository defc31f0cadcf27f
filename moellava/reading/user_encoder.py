# SPDX-License-Identifier: Apache-2.0
"""Opening an encoder of the user's own: its fields, its weights where it has some already, and its image processor."""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub import snapshot_download

from ..authoring.measuring import known_arguments
from ..authoring.part_fields import plain_value
from ..authoring.registry import is_legacy_encoder
from ..parts.legacy_encoder_moellava import legacy_settings, make_legacy_encoder
from ..parts.parts_moellava import ENCODERS
from ..parts.user_encoder_moellava import as_hidden_states
from ..parts.user_parts_moellava import RUN_ERRORS
from .processor import output_side
from .sources import Source, load_image_processor


_IMAGE_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


class CustomTower(NamedTuple):
    """The fields of a user's own encoder, what opens its weights (none: all are new), and its image processor."""

    fields: dict[str, Any]
    tensors: Callable[[], dict[str, torch.Tensor]]
    image_processor: Any


def read_user_tower(
    encoder_type: str, source: Source | None, fields: Mapping[str, Any], model_fields: Mapping[str, Any]
) -> CustomTower:
    """Opens an encoder of the user's own.

    Args:
        encoder_type (`str`): Its registered name.
        source (`Source`, *optional*): Where its weights are, or those of the backbone that it wraps.
        fields (`Mapping`): The fields of its own that the user gave.
        model_fields (`Mapping`): The fields of the model that the user gave; `image_size` is the encoder's too.

    Raises:
        TypeError: Its `read_source` or `image_processor` returns something else than it should.
        ValueError: A field that it does not have, or it cannot be described by its fields.
    """
    encoder_class = ENCODERS[encoder_type]
    known = ENCODERS.fields(encoder_type)
    fields = dict(fields)
    if "image_size" in known and model_fields.get("image_size") is not None:
        fields["image_size"] = model_fields["image_size"]
    if is_legacy_encoder(encoder_class):
        return _read_older_tower(encoder_type, source, fields, model_fields)
    tensors: Callable[[], dict[str, torch.Tensor]] = dict
    if source is not None:
        reader = getattr(encoder_class, "read_source", None)
        if reader is None:
            tensors = source.tensors
        else:
            trust = {"trust_remote_code": True} if source.trust_remote_code else {}
            read = reader(source.name, **source.hub_options, **trust)
            if not isinstance(read, tuple) or len(read) != 2 or not all(isinstance(part, Mapping) for part in read):
                raise TypeError(
                    f"{encoder_class.__name__}.read_source returned {type(read).__name__}; expected a tuple of two "
                    "dictionaries: the encoder's fields, and its weights by the names of its state_dict."
                )
            fields, read_tensors = {**read[0], **fields}, dict(read[1])
            tensors = lambda: read_tensors  # noqa: E731
    fields = ENCODERS.complete_fields(encoder_type, fields)
    image_size = fields.get("image_size") or model_fields.get("image_size")
    image_processor = _image_processor(encoder_type, source, fields, image_size)
    # Kept in the config even if the encoder's constructor does not take it.
    fields["image_size"] = image_size or output_side(image_processor)
    return CustomTower(fields, tensors, image_processor)


def _image_processor(encoder_type: str, source: Source | None, fields: dict[str, Any], image_size: Any) -> Any:
    """Returns what the encoder's class makes, else what its source has, else one that gives squares of the size."""
    make = getattr(ENCODERS[encoder_type], "image_processor", None)
    if make is not None:
        image_processor = make(**known_arguments(make, fields))
        if not isinstance(image_processor, transformers.image_processing_base.ImageProcessingMixin):
            raise TypeError(
                f"{ENCODERS[encoder_type].__name__}.image_processor returned {type(image_processor).__name__}; "
                "expected an image processor of transformers."
            )
        return image_processor
    if source is not None and any(source.find(name) is not None for name in _IMAGE_PROCESSOR_FILES):
        return load_image_processor(source)
    if not isinstance(image_size, int):
        raise ValueError(
            f"The encoder {encoder_type!r} does not tell the size of its pictures. Give its constructor an image_size, "
            "or its class a static method image_processor(**fields) that returns one of transformers."
        )
    return plain_image_processor(image_size)


def plain_image_processor(image_size: int) -> Any:
    """Returns an image processor that gives squares, normalised as CLIP's are."""
    side = {"height": image_size, "width": image_size}
    return transformers.CLIPImageProcessor(size=side, crop_size=side)


def _read_older_tower(
    encoder_type: str, source: Source | None, fields: dict[str, Any], model_fields: Mapping[str, Any]
) -> CustomTower:
    """Opens an encoder of the older builder's shape: has it load itself, and describes by value what it then is."""
    if source is None:
        raise ValueError(f"The encoder {encoder_type!r} loads its model from a path: give it as mm_vision_tower.")
    encoder_class = ENCODERS[encoder_type]
    own = ENCODERS.complete_fields(encoder_type, fields)
    settings = SimpleNamespace(
        **legacy_settings(
            model_fields.get("vision_feature_layer", -2),
            model_fields.get("vision_feature_select_strategy", "default"),
            model_fields.get("image_size"),
        )
    )
    encoder = make_legacy_encoder(encoder_class, own, settings, path=_local_name(source))
    before = {**vars(encoder), **dict(encoder.named_children())}
    if not getattr(encoder, "is_loaded", False):
        encoder.load_model()
    encoder.eval()
    backbones = {
        name: _describe_backbone(module, f"{encoder_class.__name__}.{name}")
        for name, module in encoder.named_children()
        if module is not before.get(name)
    }
    image_processor = getattr(encoder, "image_processor", None)
    if settings.image_size is None:
        settings.image_size = _picture_size(encoder_type, image_processor, backbones)
    if image_processor is None:
        image_processor = _image_processor(encoder_type, source, own, settings.image_size)
    attributes, lost = _attributes(encoder, before)
    _check_made_again(encoder, encoder_class, own, settings, {**attributes, **dict(encoder.named_children())}, lost)
    described = {"backbones": backbones, "attributes": attributes, "image_size": settings.image_size}
    tensors = encoder.state_dict()
    return CustomTower({**own, **described}, lambda: tensors, image_processor)


def _local_name(source: Source) -> str:
    """Returns what a class that knows no Hub options loads the source by."""
    if source.is_local or not source.hub_options:
        return source.name
    names = ("cache_dir", "force_download", "local_files_only", "revision", "token")
    options = {name: source.hub_options[name] for name in names if name in source.hub_options}
    return snapshot_download(source.name, **options)


def _describe_backbone(module: torch.nn.Module, owner: str) -> dict[str, Any]:
    """Returns a model of transformers by value: the fields of its config, and in `architectures` its class."""
    name = type(module).__name__
    if not isinstance(module, transformers.PreTrainedModel) or getattr(transformers, name, None) is not type(module):
        raise ValueError(
            f"load_model sets {owner} to a {type(module).__module__}.{name}, which is no model of transformers, so "
            "that it cannot be built again from its config. Make it in __init__, or write the encoder as an nn.Module "
            "with fields of its own, see docs/extending.md."
        )
    return plain_value(module.config, owner) | {"architectures": [name]}


def _picture_size(encoder_type: str, image_processor: Any, backbones: Mapping[str, Mapping[str, Any]]) -> int:
    sizes = [None if image_processor is None else output_side(image_processor)]
    sizes += [backbone.get("image_size") for backbone in backbones.values()]
    size = next((size for size in sizes if isinstance(size, int)), None)
    if size is None:
        raise ValueError(f"The encoder {encoder_type!r} does not tell the size of its pictures: give image_size.")
    return size


def _attributes(encoder: torch.nn.Module, before: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns what `load_model` set beside modules, as far as a config can hold it, and the names of the rest."""
    left_out = {"image_processor", "is_loaded", *vars(torch.nn.Module())}
    attributes, lost = {}, []
    for name, value in vars(encoder).items():
        if name in left_out or (name in before and before[name] is value):
            continue
        try:
            attributes[name] = plain_value(value, name)
        except ValueError:
            lost.append(name)
    return attributes, lost


@torch.no_grad()
def _check_made_again(
    encoder: torch.nn.Module,
    encoder_class: type,
    own: dict[str, Any],
    settings: SimpleNamespace,
    loaded: dict[str, Any],
    lost: list[str],
) -> None:
    """Checks that an instance which loads nothing itself computes what the loaded one does.

    Raises:
        ValueError: It does not, or the loaded one cannot be run.
    """
    name, side = encoder_class.__name__, settings.image_size
    dtype = next((weight.dtype for weight in encoder.parameters() if weight.is_floating_point()), torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        images = torch.rand(1, 3, side, side).to(dtype)
        try:
            expected = as_hidden_states(encoder(images))
        except RUN_ERRORS as error:
            raise ValueError(
                f"{name}.forward cannot be run on pictures of shape {tuple(images.shape)}: "
                f"{type(error).__name__}: {error}."
            ) from error
        try:
            again = make_legacy_encoder(encoder_class, own, settings, loaded).eval()
            torch.manual_seed(0)
            expected_again = as_hidden_states(again(images))
            reason = None if all(map(torch.equal, expected, expected_again)) else "it returns other features"
        except RUN_ERRORS as error:
            reason = f"{type(error).__name__}: {error}"
    if reason is not None:
        kept = f" Of what load_model sets, a config cannot hold: {', '.join(lost)}." if lost else ""
        raise ValueError(
            f"{name} cannot be made again from its backbone's config, without load_model: {reason}.{kept} Set what "
            "forward needs in __init__, or write the encoder as an nn.Module with fields of its own, see "
            "docs/extending.md."
        )


__all__ = ["CustomTower", "read_user_tower"]

# SPDX-License-Identifier: Apache-2.0
"""`moellava assemble`: a model from a language model, a vision tower and a projector."""

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..reading.json_files import read_json_object
from .inputs import import_parts
from .logs import debug_options, logging_shown
from .options import (
    LOADING,
    OUTPUT,
    Debug,
    DType,
    DTypeOption,
    Imports,
    MoeField,
    Saving,
    TrustedHub,
    Verbose,
    completes,
    named_values,
)
from .printing import describe_assembled, print_json


_DEFAULT_VISION_TOWER = "openai/clip-vit-large-patch14"


class ImageAspectRatio(enum.StrEnum):
    """What happens to a picture that is no square."""

    PAD = "pad"
    SQUARE = "square"


@dataclass
class Projector:
    """What the projector is."""

    projector: Annotated[
        str | None,
        typer.Option(
            "--projector",
            "--projector-type",
            help="The projector: mlp (the default), linear, identity, qformer, perceiver, mlp2x_gelu, or your own.",
            show_default=False,
            autocompletion=completes("identity", "linear", "mlp", "mlp2x_gelu", "perceiver", "qformer"),
        ),
    ] = None
    projector_field: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="A field of the projector, such as hidden_size=2048; can be repeated.",
            rich_help_panel="Projector",
            show_default=False,
        ),
    ] = None
    projector_weights: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="The projector's weights, .safetensors or .bin. Without them it is newly initialised.",
            rich_help_panel="Projector",
            show_default=False,
        ),
    ] = None

    def options(self) -> dict[str, Any]:
        """Returns it as keyword arguments of `load_pretrained_model`."""
        own = named_values(self.projector_field, "--projector-field")
        if self.projector_weights is not None:
            own["path"] = self.projector_weights
        return {"projector_type": self.projector, "projector_config": own or None}


@dataclass
class Vision:
    """What of a picture the projector gets."""

    encoder_type: Annotated[
        str | None,
        typer.Option(
            "--encoder-type",
            "--encoder",
            help="clip, siglip, biomedclip, dinov2, vit, auto, or your own. By default told by the vision tower.",
            rich_help_panel="Vision",
            show_default=False,
            autocompletion=completes("auto", "biomedclip", "clip", "dinov2", "siglip", "vit"),
        ),
    ] = None
    encoder_field: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="A field of an encoder of your own; can be repeated.",
            rich_help_panel="Vision",
            show_default=False,
        ),
    ] = None
    vision_feature_layer: Annotated[
        str | None,
        typer.Option(
            metavar="LAYER[,LAYER...]",
            help="The tower's layer that the projector gets, -1 being the last; of several the features are joined. "
            "By default -2.",
            rich_help_panel="Vision",
            show_default=False,
        ),
    ] = None
    vision_feature_select_strategy: Annotated[
        str | None,
        typer.Option(
            "--vision-feature-select-strategy",
            "--select-strategy",
            help="Which tokens: default or patch (the patches'), cls (the class token alone), full (all).",
            rich_help_panel="Vision",
            show_default=False,
            autocompletion=completes("cls", "default", "full", "patch"),
        ),
    ] = None
    image_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="The side in pixels of the pictures that the tower gets. By default the tower's own.",
            rich_help_panel="Vision",
            show_default=False,
        ),
    ] = None
    image_aspect_ratio: Annotated[
        ImageAspectRatio | None,
        typer.Option(
            help="pad: a picture is padded to a square (the default); square: resized and cropped.",
            rich_help_panel="Vision",
            show_default=False,
        ),
    ] = None

    def options(self) -> dict[str, Any]:
        """Returns it as keyword arguments of `load_pretrained_model`."""
        return {
            "encoder_type": self.encoder_type,
            "custom_vision_config": named_values(self.encoder_field, "--encoder-field") or None,
            "vision_feature_layer": _layers(self.vision_feature_layer),
            "vision_feature_select_strategy": self.vision_feature_select_strategy,
            "image_size": self.image_size,
            "image_aspect_ratio": self.image_aspect_ratio.value if self.image_aspect_ratio else None,
        }


# Long by its options, half of its lines: Typer wants each as an argument, with its help.
def assemble(
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.", show_default=False)],
    language_model: Annotated[
        str | None,
        typer.Option(
            help="The language model, or a checkpoint whose parts are to be changed: a folder or a Hub id.",
            show_default=False,
        ),
    ] = None,
    vision_tower: Annotated[
        str | None,
        typer.Option(
            help=f"The vision tower: a folder or a Hub id. By default {_DEFAULT_VISION_TOWER}.", show_default=False
        ),
    ] = None,
    projector: Projector,
    config: Annotated[
        Path | None,
        typer.Option(
            help="A JSON file with any fields that load_pretrained_model takes; the options here win over it.",
            exists=True,
            dir_okay=False,
            show_default=False,
        ),
    ] = None,
    imports: Imports = None,
    vision: Vision,
    moe_field: MoeField = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="Where the parts are put together; cpu by default, since nothing is computed.",
            rich_help_panel=LOADING,
            show_default=False,
            autocompletion=completes("cpu", "cuda", "mps"),
        ),
    ] = None,
    dtype: DTypeOption = DType.AUTO,
    saving: Saving,
    hub: TrustedHub,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what was made, as inspect --json does.", rich_help_panel=OUTPUT)
    ] = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Assemble a model from a language model, a vision tower and a projector.

    The folder then holds the weights, the processor and the code that loads them: it needs transformers alone.

    Examples:

    ```
    moellava assemble --language-model TinyLlama/TinyLlama-1.1B-Chat-v1.0 \\
        --vision-tower openai/clip-vit-large-patch14 --projector mlp --out my-model

    moellava assemble --language-model microsoft/phi-2 \\
        --vision-tower google/siglip-base-patch16-224 --vision-feature-layer -2,-5 \\
        --projector qformer --projector-field num_query_tokens=64 --out my-model

    moellava assemble --config parts.json --import gated_projector.py --out my-model
    ```
    """
    fields = {} if config is None else read_json_object(config)
    keywords = {
        "vision_tower": vision_tower,
        **projector.options(),
        **vision.options(),
        "moe_config": named_values(moe_field, "--moe-field") or None,
        "device": device if device or fields.keys() & {"device", "device_map"} else "cpu",
        "dtype": dtype.given(),
        **hub.options(),
        **debug_options(verbose),
    }
    if language_model is not None:
        keywords["model_path"] = language_model
    elif not fields.keys() & {"model_path", "model_name_or_path"}:
        raise typer.BadParameter(
            "Give the language model, here or in the --config file.", param_hint="'--language-model'"
        )
    keywords = {name: value for name, value in keywords.items() if value is not None}
    saving.check(out)

    import_parts(imports)
    from ..authoring.load_request import read_request
    from ..inspecting import inspect_checkpoint
    from ..loading import load_pretrained_model

    request = read_request(fields, keywords)
    with logging_shown(verbose, hide_load_report=True):
        fields = {**_without(fields, "model_name_or_path"), "model_path": request.model_path}
        model = load_pretrained_model(fields, **_without(keywords, "model_path")).model
        model.save_pretrained(out, **saving.options())
    summary = inspect_checkpoint(out)
    if as_json:
        print_json(summary.to_dict())
    describe_assembled(summary)


def _layers(text: str | None) -> int | list[int] | None:
    if text is None:
        return None
    try:
        layers = [int(word) for word in text.strip("[]").split(",")]
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} is no integer and no list of integers such as -2,-5.", param_hint="'--vision-feature-layer'"
        ) from error
    return layers[0] if len(layers) == 1 and not text.startswith("[") else layers


def _without(mapping: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in mapping.items() if name not in names}


__all__ = ["assemble"]

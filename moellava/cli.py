# Copyright 2026 The MoELLaVA authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The command line: `moellava ask`, `moellava assemble`, `moellava inspect`.

Answers, tables and JSON go to standard output, everything else to standard error. What a user can put right ends in one
sentence and exit code 1, a wrong command line in exit code 2, Ctrl-C in 130. PyTorch and transformers are imported
inside the commands, so that `--help` and shell completion answer at once.
"""

import contextlib
import dataclasses
import enum
import importlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from . import __version__


if TYPE_CHECKING:
    from rich.table import Table

    from .inspecting import CheckpointSummary
    from .quantizing import QuantizationCoverage


_DEBUG = "moellava.debug"
_DEFAULT_VISION_TOWER = "openai/clip-vit-large-patch14"


class _Commands(TyperGroup):
    """Ends a command in one sentence when something is wrong that the user can put right."""

    def invoke(self, ctx: typer.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise typer.Exit(130) from error
        except Exception as error:
            if ctx.meta.get(_DEBUG) or not _is_the_users(error):
                raise
            typer.echo(f"Error: {_sentence(error)}", err=True)
            raise typer.Exit(1) from error


def _is_the_users(error: Exception) -> bool:
    """Whether an error tells what is wrong with the input or the surroundings, and not of a fault in the program."""
    if isinstance(error, BrokenPipeError):
        return False  # the reader of our output is gone, which Typer handles
    if isinstance(error, ValueError | TypeError | OSError | ImportError | MemoryError):
        return True
    names = {f"{cls.__module__}.{cls.__name__}" for cls in type(error).__mro__}
    # The Hub's checks of a config's fields have a base class of their own.
    return not names.isdisjoint({"huggingface_hub.errors.StrictDataclassError", "torch.OutOfMemoryError"})


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{os.fspath(error.filename)}: {error.strerror}."
    return " ".join(str(error).split()) or f"{type(error).__name__}, without a message; --debug shows where."


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class DType(enum.StrEnum):
    """The dtypes that a model can be loaded in."""

    AUTO = "auto"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


class ImageAspectRatio(enum.StrEnum):
    """What happens to a picture that is no square."""

    PAD = "pad"
    SQUARE = "square"


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moellava {__version__}")
        raise typer.Exit


def _note_debug(ctx: typer.Context, wanted: bool) -> bool:
    ctx.meta[_DEBUG] = wanted or ctx.meta.get(_DEBUG, False)
    return wanted


def _completes(*words: str) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return complete


_EXAMPLES = {
    "ask": """
Examples:

```
moellava ask my-model scan.png "What is shown here?"
moellava ask my-model before.png --picture after.png "What has changed?"
moellava ask me/my-model scan.png - --json < question.txt
```
""",
    "assemble": """
Examples:

```
moellava assemble --language-model TinyLlama/TinyLlama-1.1B-Chat-v1.0 \\
    --vision-tower openai/clip-vit-large-patch14 --projector mlp --out my-model

moellava assemble --language-model microsoft/phi-2 \\
    --vision-tower google/siglip-base-patch16-224 --vision-feature-layer -2,-5 \\
    --projector qformer --projector-field num_query_tokens=64 --out my-model

moellava assemble --config parts.json --import gated_projector.py --out my-model
```
""",
    "upcycle": """
Examples:

```
moellava upcycle my-model my-sparse-model --num-experts 4 --top-k 2 --layers sparse
moellava upcycle my-model my-sparse-model --layers 0,2,4 --moe-field use_residual=true
```
""",
    "convert": """
Examples:

```
moellava convert LanguageBind/MoE-LLaVA-Phi2-2.7B-4e my-model
moellava convert ./llava-v1.5-7b my-model --vision-tower openai/clip-vit-large-patch14-336
moellava convert ./llava-lora my-model --base lmsys/vicuna-7b-v1.5
```
""",
    "routing": """
Examples:

```
moellava routing my-sparse-model scan.png "What is shown here?" --out routing.png
```
""",
    "inspect": """
Examples:

```
moellava inspect my-model
moellava inspect me/my-model --json | jq .parameters.total
```
""",
}

# Options that several commands have, under the same names with the same meaning.
_LOADING, _HUB, _OUTPUT = "Loading", "Hugging Face Hub", "Output"

Checkpoint = Annotated[
    str, typer.Argument(help="A checkpoint: a folder or a Hub id.", metavar="CHECKPOINT", show_default=False)
]
Device = Annotated[
    str | None,
    typer.Option(
        help="Where the model runs, such as cpu, cuda or cuda:1. By default the best device there is.",
        rich_help_panel=_LOADING,
        show_default=False,
        autocompletion=_completes("cpu", "cuda", "mps"),
    ),
]
DTypeOption = Annotated[
    DType,
    typer.Option("--dtype", help="The dtype of the weights; auto: as they are stored.", rich_help_panel=_LOADING),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run the code that comes with a model. Needed for parts of its author's own; only where you trust them.",
        rich_help_panel=_HUB,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(help="The branch, tag or commit on the Hub.", rich_help_panel=_HUB, show_default=False),
]
Token = Annotated[
    str | None,
    typer.Option(
        help="The access token. By default the variable HF_TOKEN, then that of 'hf auth login'.",
        rich_help_panel=_HUB,
        show_default=False,
    ),
]
CacheDir = Annotated[
    Path | None, typer.Option(help="Where downloads are kept.", rich_help_panel=_HUB, show_default=False)
]
LocalFilesOnly = Annotated[bool, typer.Option("--local-files-only", help="Download nothing.", rich_help_panel=_HUB)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel=_OUTPUT)]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        help="Log what is detected, loaded, skipped and newly initialised, and every shape.",
        rich_help_panel=_OUTPUT,
    ),
]
Debug = Annotated[
    bool,
    typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=_OUTPUT, callback=_note_debug),
]


@app.callback()
def moellava(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error.", callback=_note_debug)
    ] = False,
) -> None:
    """Vision-language models made of parts: assemble them, look into them, ask them about pictures."""


@app.command(epilog=_EXAMPLES["ask"])
def ask(
    checkpoint: Checkpoint,
    picture: Annotated[
        str, typer.Argument(help="A picture: a file or an http(s) URL.", metavar="PICTURE", show_default=False)
    ],
    question: Annotated[
        str,
        typer.Argument(help="The question; - reads it from standard input.", metavar="QUESTION", show_default=False),
    ],
    more_pictures: Annotated[
        list[str] | None,
        typer.Option("--picture", "-p", help="A further picture; can be repeated.", show_default=False),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The length of the answer at most, in tokens.")] = 256,
    device: Device = None,
    device_map: Annotated[
        str | None,
        typer.Option(
            help="Instead of --device, spread the model over the devices there are, such as auto or balanced.",
            rich_help_panel=_LOADING,
            show_default=False,
        ),
    ] = None,
    dtype: DTypeOption = DType.AUTO,
    load_4bit: Annotated[
        bool, typer.Option("--load-4bit", help="Quantise to 4 bits with bitsandbytes.", rich_help_panel=_LOADING)
    ] = False,
    load_8bit: Annotated[
        bool, typer.Option("--load-8bit", help="Quantise to 8 bits with bitsandbytes.", rich_help_panel=_LOADING)
    ] = False,
    model_base: Annotated[
        str | None,
        typer.Option(
            help="The checkpoint that CHECKPOINT is a LoRA adapter of.", rich_help_panel=_LOADING, show_default=False
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalFilesOnly = False,
    as_json: Json = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Ask a model about a picture, or about several.

    The answer is the most probable one, word by word: the same question gets the same answer.
    """
    if question == "-":
        question = sys.stdin.read()
    question = question.strip()
    if not question:
        raise typer.BadParameter("The question is empty.", param_hint="'QUESTION'")
    names = [picture, *(more_pictures or [])]

    from .processing.images_moellava import load_picture

    pictures = [_open_picture(name, load_picture) for name in names]  # before the model, which takes longer

    from .loading import load_pretrained_model
    from .sources import Source

    hub_options = _hub_options(trust_remote_code, revision, token, cache_dir, local_files_only)
    if model_base is None:
        _check_is_checkpoint(Source(checkpoint, hub_options))
    with _logging(verbose):
        loaded = load_pretrained_model(
            checkpoint,
            model_base=model_base,
            load_8bit=load_8bit or None,
            load_4bit=load_4bit or None,
            device_map=device_map,
            device=device,
            dtype=_torch_dtype(dtype),
            **_debug_options(verbose),
            **hub_options,
        )
    stream = sys.stdout.isatty() and not as_json
    answer = _answer(loaded, pictures, question, max_new_tokens, stream)
    if as_json:
        _print_json({"checkpoint": checkpoint, "pictures": names, "question": question, **answer})
    elif not stream:
        typer.echo(answer["answer"])
    if answer["finish_reason"] == "length":
        typer.echo(
            f"The answer was cut off after {answer['new_tokens']} tokens: raise --max-new-tokens (now "
            f"{max_new_tokens}; the model takes {loaded.context_len} tokens with the question and the pictures).",
            err=True,
        )


@app.command(epilog=_EXAMPLES["assemble"])
def assemble(
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
    projector: Annotated[
        str | None,
        typer.Option(
            "--projector",
            "--projector-type",
            help="The projector: mlp (the default), linear, identity, qformer, perceiver, mlp2x_gelu, or your own.",
            show_default=False,
            autocompletion=_completes("identity", "linear", "mlp", "mlp2x_gelu", "perceiver", "qformer"),
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="A JSON file with any fields that load_pretrained_model takes; the options here win over it.",
            exists=True,
            dir_okay=False,
            show_default=False,
        ),
    ] = None,
    imports: Annotated[
        list[str] | None,
        typer.Option(
            "--import",
            help="A Python file or module that registers a projector or an encoder of your own; can be repeated.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the model that the folder holds already.")
    ] = False,
    projector_field: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="A field of the projector, such as hidden_size=2048; can be repeated.",
            rich_help_panel="Projector",
            show_default=False,
        ),
    ] = None,
    projector_weights: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="The projector's weights, .safetensors or .bin. Without them it is newly initialised.",
            rich_help_panel="Projector",
            show_default=False,
        ),
    ] = None,
    encoder_type: Annotated[
        str | None,
        typer.Option(
            "--encoder-type",
            "--encoder",
            help="clip, siglip, biomedclip, dinov2, vit, auto, or your own. By default told by the vision tower.",
            rich_help_panel="Vision",
            show_default=False,
            autocompletion=_completes("auto", "biomedclip", "clip", "dinov2", "siglip", "vit"),
        ),
    ] = None,
    encoder_field: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="A field of an encoder of your own; can be repeated.",
            rich_help_panel="Vision",
            show_default=False,
        ),
    ] = None,
    vision_feature_layer: Annotated[
        str | None,
        typer.Option(
            metavar="LAYER[,LAYER...]",
            help="The tower's layer that the projector gets, -1 being the last; of several the features are joined. "
            "By default -2.",
            rich_help_panel="Vision",
            show_default=False,
        ),
    ] = None,
    vision_feature_select_strategy: Annotated[
        str | None,
        typer.Option(
            "--vision-feature-select-strategy",
            "--select-strategy",
            help="Which tokens: default or patch (the patches'), cls (the class token alone), full (all).",
            rich_help_panel="Vision",
            show_default=False,
            autocompletion=_completes("cls", "default", "full", "patch"),
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="The side in pixels of the pictures that the tower gets. By default the tower's own.",
            rich_help_panel="Vision",
            show_default=False,
        ),
    ] = None,
    image_aspect_ratio: Annotated[
        ImageAspectRatio | None,
        typer.Option(
            help="pad: a picture is padded to a square (the default); square: resized and cropped.",
            rich_help_panel="Vision",
            show_default=False,
        ),
    ] = None,
    moe_field: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="A field of sparse layers, such as num_experts=4, which makes the model sparse; can be repeated.",
            rich_help_panel="Experts",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="Where the parts are put together; cpu by default, since nothing is computed.",
            rich_help_panel=_LOADING,
            show_default=False,
            autocompletion=_completes("cpu", "cuda", "mps"),
        ),
    ] = None,
    dtype: DTypeOption = DType.AUTO,
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            help="The largest weight file, such as 5GB. By default as transformers has it.",
            rich_help_panel=_OUTPUT,
            show_default=False,
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalFilesOnly = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what was made, as inspect --json does.", rich_help_panel=_OUTPUT)
    ] = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Assemble a model from a language model, a vision tower and a projector.

    The folder then holds the weights, the processor and the code that loads them: it needs transformers alone.
    """
    fields = {} if config is None else _read_config(config)
    keywords = {
        "vision_tower": vision_tower,
        "encoder_type": encoder_type,
        "custom_vision_config": _named_values(encoder_field, "--encoder-field") or None,
        "projector_type": projector,
        "projector_config": _named_values(projector_field, "--projector-field") or None,
        "moe_config": _named_values(moe_field, "--moe-field") or None,
        "vision_feature_layer": _layers(vision_feature_layer),
        "vision_feature_select_strategy": vision_feature_select_strategy,
        "image_size": image_size,
        "image_aspect_ratio": image_aspect_ratio.value if image_aspect_ratio else None,
        "device": device if device or fields.keys() & {"device", "device_map"} else "cpu",
        **_hub_options(trust_remote_code, revision, token, cache_dir, local_files_only),
        **_debug_options(verbose),
    }
    if projector_weights is not None:
        keywords["projector_config"] = {**(keywords["projector_config"] or {}), "path": projector_weights}
    if language_model is not None:
        keywords["model_path"] = language_model
    elif not fields.keys() & {"model_path", "model_name_or_path"}:
        raise typer.BadParameter(
            "Give the language model, here or in the --config file.", param_hint="'--language-model'"
        )
    keywords = {name: value for name, value in keywords.items() if value is not None}
    _check_out(out, overwrite)

    for name in imports or []:
        _import(name)
    from .inspecting import inspect_checkpoint
    from .loading import load_pretrained_model
    from .request import read_request

    if dtype is not DType.AUTO:
        keywords["dtype"] = _torch_dtype(dtype)
    request = read_request(fields, keywords)
    with _logging(verbose, hide_load_report=True):
        fields = {**_without(fields, "model_name_or_path"), "model_path": request.model_path}
        model = load_pretrained_model(fields, **_without(keywords, "model_path")).model
        model.save_pretrained(out, **({} if max_shard_size is None else {"max_shard_size": max_shard_size}))
    summary = inspect_checkpoint(out)
    if as_json:
        _print_json(summary.to_dict())
    _describe_assembled(summary, is_new=request.projector_path is None)


@app.command(epilog=_EXAMPLES["inspect"])
def inspect(
    checkpoint: Checkpoint,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Without effect: no code of the checkpoint is run.", hidden=True),
    ] = False,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalFilesOnly = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a checkpoint is made of.

    Only its config and the headers of its weight files are read: no weight is loaded, no code of the checkpoint is run,
    and of a checkpoint on the Hub nothing else is downloaded.
    """
    from .inspecting import inspect_checkpoint

    hub_options = _hub_options(trust_remote_code, revision, token, cache_dir, local_files_only)
    summary = inspect_checkpoint(checkpoint, **hub_options)
    if as_json:
        _print_json(summary.to_dict())
    else:
        _print_summary(summary)


@app.command(epilog=_EXAMPLES["upcycle"])
def upcycle(
    dense: Annotated[
        str, typer.Argument(help="A dense checkpoint: a folder or a Hub id.", metavar="DENSE", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write.", metavar="OUT", show_default=False)],
    num_experts: Annotated[int, typer.Option(min=1, help="The number of experts of a sparse layer.")] = 4,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="The number of experts that a token goes to.")] = 2,
    layers: Annotated[
        str, typer.Option(help="first_half, second_half, sparse (every other), dense (all), or indices such as 0,2,4.")
    ] = "sparse",
    router: Annotated[
        Path | None,
        typer.Option(help="A router's file, put into every sparse layer (Med-MoE).", show_default=False),
    ] = None,
    moe_field: Annotated[
        list[str] | None,
        typer.Option(help="A further field, as name=value, such as use_residual=true; can be repeated."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model that OUT holds.")] = False,
    dtype: DTypeOption = DType.AUTO,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalFilesOnly = False,
    as_json: Json = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Make a sparse mixture of experts of a dense checkpoint.

    Every expert starts as a copy of the layer's MLP, so that the new model says what the dense one said until it is
    trained on.
    """
    _check_out(out, overwrite)
    indices = layers.replace(",", "").replace(" ", "").isdigit()
    moe_config = {
        "num_experts": num_experts,
        "num_experts_per_tok": top_k,
        "layers": [int(index) for index in layers.split(",")] if indices else layers,
        **({} if router is None else {"router_path": router}),
        **_named_values(moe_field, "--moe-field"),
    }
    from .inspecting import inspect_checkpoint
    from .loading import load_pretrained_model
    from .sources import Source

    hub_options = _hub_options(trust_remote_code, revision, token, cache_dir, local_files_only)
    _check_is_checkpoint(Source(dense, hub_options))
    with _logging(verbose, hide_load_report=True):
        loaded = load_pretrained_model(
            dense, moe_config=moe_config, device="cpu", dtype=_torch_dtype(dtype), **hub_options
        )
        loaded.model.save_pretrained(out)
    summary = inspect_checkpoint(out)
    if as_json:
        _print_json(summary.to_dict())
    else:
        _print_summary(summary)


@app.command(epilog=_EXAMPLES["convert"])
def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="A LLaVA, MoE-LLaVA or Med-MoE checkpoint; with --base, an adapter or a projector of one. A folder or "
            "a Hub id.",
            metavar="SOURCE",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write.", metavar="OUT", show_default=False)],
    base: Annotated[
        str | None, typer.Option(help="The model that an adapter or a projector belongs to.", show_default=False)
    ] = None,
    vision_tower: Annotated[
        str | None,
        typer.Option(help="A folder or Hub id, instead of the tower that the source names.", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model that OUT holds.")] = False,
    dtype: DTypeOption = DType.AUTO,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalFilesOnly = False,
    as_json: Json = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Convert an older checkpoint once, so that transformers loads it anywhere.

    Every weight of the source is taken over as it is, or named with the reason why not.
    """
    _check_out(out, overwrite)
    from .converting import convert as convert_checkpoint

    hub_options = _hub_options(trust_remote_code, revision, token, cache_dir, local_files_only)
    with _logging(verbose, hide_load_report=True):
        report = convert_checkpoint(
            source, out, base, vision_tower, dtype=_torch_dtype(dtype), overwrite=True, **hub_options
        )
    if as_json:
        _print_json(dataclasses.asdict(report))
        return
    typer.echo(
        f"{out}: {_count(report.num_parameters)} parameters, {_count(report.num_active_parameters)} active; "
        f"{report.num_used} weights of {source} taken over."
    )
    for title, weights in (("Left out", report.left_out), ("Added", report.added)):
        for reason in dict.fromkeys(weights.values()):
            names = [name for name, why in weights.items() if why == reason]
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            typer.echo(f"{title}: {names[0]}{more} ({reason}).")
    for note in report.notes:
        typer.echo(f"Note: {note}.")


@app.command(epilog=_EXAMPLES["routing"])
def routing(
    checkpoint: Checkpoint,
    picture: Annotated[
        str, typer.Argument(help="A picture: a file or an http(s) URL.", metavar="PICTURE", show_default=False)
    ],
    question: Annotated[str, typer.Argument(help="The question.", metavar="QUESTION", show_default=False)],
    more_pictures: Annotated[
        list[str] | None,
        typer.Option("--picture", "-p", help="A further picture; can be repeated.", show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The drawing to write.")] = Path("routing.png"),
    device: Device = None,
    dtype: DTypeOption = DType.AUTO,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalFilesOnly = False,
    as_json: Json = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Draw which expert took which picture patch and which word, layer by layer."""
    from .processing.images_moellava import load_picture

    pictures = [_open_picture(name, load_picture) for name in [picture, *(more_pictures or [])]]

    from .loading import load_pretrained_model
    from .routing import draw_routing, trace_routing
    from .sources import Source

    hub_options = _hub_options(trust_remote_code, revision, token, cache_dir, local_files_only)
    _check_is_checkpoint(Source(checkpoint, hub_options))
    with _logging(verbose):
        loaded = load_pretrained_model(checkpoint, device=device, dtype=_torch_dtype(dtype), **hub_options)
    trace = trace_routing(loaded.model, pictures, question)
    out.parent.mkdir(parents=True, exist_ok=True)
    draw_routing(trace, out)
    if as_json:
        _print_json({"drawing": os.fspath(out), **trace.to_dict()})
    else:
        for layer in trace.layers:
            shares = "  ".join(f"{share:.0%}" for share in layer.load)
            typer.echo(f"layer {layer.layer}: {shares}")
        typer.echo(f"Drawn to {out}.", err=True)
    if trace.collapsed:
        typer.echo(f"The layers {trace.collapsed} send nearly everything to the same experts: no mixture.", err=True)


# What the options mean


def _hub_options(
    trust_remote_code: bool, revision: str | None, token: str | None, cache_dir: Path | None, local_files_only: bool
) -> dict[str, Any]:
    options = {
        "trust_remote_code": trust_remote_code or None,
        "revision": revision,
        "token": token,
        "cache_dir": None if cache_dir is None else os.fspath(cache_dir),
        "local_files_only": local_files_only or None,
    }
    return {name: value for name, value in options.items() if value is not None}


def _debug_options(verbose: bool) -> dict[str, bool]:
    return {"encoder_debug": True, "projector_debug": True} if verbose else {}


def _torch_dtype(dtype: DType) -> Any:
    import torch

    return None if dtype is DType.AUTO else getattr(torch, dtype.value)


def _named_values(pairs: list[str] | None, option: str) -> dict[str, Any]:
    """Reads `name=value` pairs; a value is JSON where it can be read so, else text."""
    values = {}
    for pair in pairs or []:
        name, separator, value = pair.partition("=")
        if not separator or not name:
            raise typer.BadParameter(f"{pair!r} is not of the form NAME=VALUE.", param_hint=f"'{option}'")
        words = {"true": True, "false": False, "none": None, "null": None}
        if value.lower() in words:
            values[name] = words[value.lower()]
            continue
        try:
            values[name] = json.loads(value)
        except json.JSONDecodeError:
            values[name] = value
    return values


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


def _read_config(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no valid JSON ({error}).") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a {type(fields).__name__}; expected a JSON object with the fields by name.")
    return fields


def _check_out(out: Path, overwrite: bool) -> None:
    """Finds out before the work what would be in the way of saving it."""
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file; a checkpoint is saved into a folder. Give a folder's path.")
    if (out / "config.json").exists() and not overwrite:
        raise FileExistsError(f"{out} holds a model already. Give another folder, or --overwrite to replace it.")
    existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise PermissionError(f"{out} cannot be written: {existing} is no folder, or is not writable for you.")


def _import(name: str) -> None:
    """Imports a user's file or module, which registers the parts of their own."""
    if not name.endswith(".py"):
        sys.path.insert(0, os.getcwd())
        importlib.import_module(name)
        return
    path = Path(name).expanduser().resolve()
    if not path.is_file():
        raise FileNotFoundError(f"There is no Python file {name} to import.")
    root, module = path.parent, path.stem
    while (root / "__init__.py").exists():  # a file of a package is imported as such, so that its siblings are found
        root, module = root.parent, f"{root.name}.{module}"
    sys.path.insert(0, os.fspath(root))
    found = importlib.import_module(module).__file__
    if found is None or Path(found).resolve() != path:
        raise ImportError(f"{name} cannot be imported: {module!r} is the name of {found} too. Rename the file.")


# What the commands do


def _open_picture(name: str, load_picture: Callable) -> Any:
    if not name.startswith(("http://", "https://", "data:")):
        path = Path(name).expanduser()
        if path.is_dir():
            raise IsADirectoryError(f"{name} is a folder; expected a picture file.")
        if not path.exists():
            raise FileNotFoundError(f"There is no picture {name}. Expected a picture file or an http(s) URL.")
        return load_picture(path)
    return load_picture(name)


def _check_is_checkpoint(source: Any) -> None:
    model_type = source.config_dict().get("model_type")
    if model_type != "moellava":
        raise ValueError(
            f"{source} is a model of type {model_type!r}, not a checkpoint of this package, so that it cannot be asked "
            "about pictures. A language model becomes one by `moellava assemble`, and by training."
        )


def _answer(loaded: Any, pictures: list[Any], question: str, max_new_tokens: int, stream: bool) -> dict[str, Any]:
    """Generates an answer without sampling; with `stream`, also writes it to standard output while it is made."""
    from transformers import TextStreamer

    from .building import question_inputs

    model = loaded.model
    processor = model.processor
    inputs = question_inputs(model, pictures, question)
    prompt_tokens = inputs["input_ids"].shape[1]
    room = loaded.context_len - prompt_tokens
    if room < 1:
        raise ValueError(
            f"Question and pictures are {prompt_tokens} tokens, but the language model takes {loaded.context_len} "
            "with the answer. Ask a shorter question, or about fewer pictures."
        )
    output = model.generate(
        **inputs,
        max_new_tokens=min(max_new_tokens, room),
        # A checkpoint's generation config may say otherwise, and then has settings that go with sampling only.
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_k=None,
        top_p=None,
        min_p=None,
        typical_p=None,
        streamer=TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None,
    )
    new_tokens = output[0, prompt_tokens:].tolist()
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return {
        "answer": processor.tokenizer.decode(new_tokens, skip_special_tokens=True).strip(),
        "finish_reason": "stop" if new_tokens and new_tokens[-1] in ends else "length",
        "prompt_tokens": prompt_tokens,
        "new_tokens": len(new_tokens),
    }


@contextlib.contextmanager
def _logging(verbose: bool, hide_load_report: bool = False) -> Iterator[None]:
    """Shows the package's warnings, or all it logs, on standard error.

    transformers reports weights that are newly initialised as a table of warnings. While assembling, those are the new
    projector's and no others (`build` raises for others), which the command says itself.
    """
    package, models = logging.getLogger("moellava"), logging.getLogger("transformers.modeling_utils")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s" if verbose else "%(levelname)s: %(message)s"))
    level = package.level

    def is_no_report(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    package.addHandler(handler)
    if verbose:
        package.setLevel(logging.INFO)
    if hide_load_report and not verbose:
        models.addFilter(is_no_report)
    try:
        yield
    finally:
        models.removeFilter(is_no_report)
        package.setLevel(level)
        package.removeHandler(handler)


def _without(mapping: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in mapping.items() if name not in names}


# What they print


def _print_json(content: dict[str, Any]) -> None:
    typer.echo(json.dumps(content, ensure_ascii=False, indent=2))


def _describe_assembled(summary: "CheckpointSummary", is_new: bool) -> None:
    typer.echo(
        f"{summary.checkpoint}: {summary.encoder.type} encoder, {summary.projector.type} projector, "
        f"{summary.language_model.model_type} language model; {summary.tokens_per_image} tokens per picture, "
        f"{_count(summary.parameters.total)} parameters, {_size(summary.bytes.disk)}.",
        err=True,
    )
    projector = next(part for part in summary.parts if part.name == "multi_modal_projector")
    if is_new and projector.parameters.total:
        typer.echo("The projector is new: train the model before you ask it about pictures.", err=True)


def _print_summary(summary: "CheckpointSummary") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # A pipe has no width: nothing is to be wrapped there.
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(Text(summary.checkpoint, style="bold"))

    overview = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    overview.add_column(style="cyan", no_wrap=True)
    overview.add_column(overflow="fold")
    for label, text in _overview(summary):
        overview.add_row(label, Text(text))
    console.print(overview)

    is_sparse = summary.parameters.active != summary.parameters.total
    parts = Table(box=None, header_style="cyan", padding=(0, 2, 0, 0))
    parts.add_column("Part", overflow="fold")
    for header in ("Parameters", *(["Active"] if is_sparse else []), "On disk", "In memory"):
        parts.add_column(header, justify="right", no_wrap=True)
    for name, of in [*((part.name, part) for part in summary.parts), ("total", summary)]:
        active = [f"{of.parameters.active:,}"] if is_sparse else []
        cells = [name, f"{of.parameters.total:,}", *active, _size(of.bytes.disk), _size(of.bytes.memory)]
        parts.add_row(*map(Text, cells), style="bold" if of is summary else None)
    console.print()
    console.print(parts)

    if summary.coverage is not None:
        console.print()
        console.print(_coverage_table(summary.coverage))

    weights = Table(box=None, header_style="cyan", padding=(0, 2, 0, 0))
    weights.add_column("Weights", overflow="fold")
    weights.add_column("Count", justify="right", no_wrap=True)
    weights.add_column("Shape", no_wrap=True)
    weights.add_column("Dtype", no_wrap=True)
    for part in summary.parts:
        weights.add_row(Text(part.name, style="bold"))
        for group in part.groups:
            shape = " × ".join(map(str, group.shape)) or "scalar"
            weights.add_row(Text(f"  {group.name}"), str(group.count), shape, group.dtype)
        if not part.groups:
            weights.add_row(Text(f"  {'tied to the embedding' if 'tied' in part.type else 'none'}", style="dim"))
    console.print()
    console.print(weights)


def _coverage_table(coverage: "QuantizationCoverage") -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="cyan", padding=(0, 2, 0, 0))
    table.add_column("Quantised", overflow="fold")
    for header in ("Modules", "Parameters", "In memory", "Of bf16"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("Left in full precision", overflow="fold")
    for name, of in [*((part.name, part) for part in coverage.parts), ("total", coverage)]:
        modules, left = "", ""
        if of is not coverage:
            modules = f"{of.quantized_modules} of {of.modules}"
            left = "; ".join(f"{count} {reason}" for reason, count in of.left.items())
        share = f"{of.bytes / of.bytes_bf16:.3f}" if of.bytes_bf16 else ""
        cells = [name, modules, f"{of.quantized_parameters:,}", _size(of.bytes), share, left]
        table.add_row(*map(Text, cells), style="bold" if of is coverage else None)
    return table


def _overview(summary: "CheckpointSummary") -> Iterator[tuple[str, str]]:
    encoder, projector, language = summary.encoder, summary.projector, summary.language_model
    origins = {part.name: part.source for part in summary.parts if part.source}

    tower = [encoder.model_type]
    if encoder.num_hidden_layers is not None:
        tower.append(f"{encoder.num_hidden_layers} layers")
    if encoder.hidden_size is not None:
        tower.append(f"{encoder.hidden_size} wide")
    layers = encoder.vision_feature_layer
    layers = f"layer {layers}" if isinstance(layers, int) else f"layers {', '.join(map(str, layers))}"
    strategies = {"cls": "class token", "full": "all tokens", "default": "patch tokens", "patch": "patch tokens"}
    strategy = encoder.vision_feature_select_strategy
    tower.append(f"{strategies.get(strategy, strategy)} of {layers}")
    yield "Encoder", f"{encoder.type}: {', '.join(tower)}"
    if "vision_tower" in origins:
        yield "", f"from {origins['vision_tower']}"

    fields = ", ".join(f"{name}={value}" for name, value in projector.fields.items() if value is not None)
    incoming = "" if encoder.num_features is None else f"{encoder.num_features} × {encoder.feature_size} → "
    outgoing = f"{summary.tokens_per_image} × {language.hidden_size or '?'}"
    yield "Projector", f"{projector.type}: {incoming}{outgoing}{f' ({fields})' if fields else ''}"

    yield (
        "Language model",
        (
            f"{language.model_type}: {language.num_hidden_layers} layers, {language.hidden_size} wide, vocabulary "
            f"{language.vocab_size}, context {language.context_length}"
        ),
    )
    if "language_model" in origins:
        yield "", f"from {origins['language_model']}"
    if summary.sparse is not None:
        sparse = summary.sparse
        yield (
            "Experts",
            (
                f"{sparse.num_experts} in each of the layers {', '.join(map(str, sparse.layers))}; "
                f"{sparse.num_experts_per_tok} per token"
            ),
        )
    size = "" if summary.image_size is None else f"{summary.image_size} × {summary.image_size} pixels, "
    shape = "padded to a square" if summary.image_aspect_ratio == "pad" else "as the image processor resizes it"
    yield "Picture", f"{size}{shape}; {summary.tokens_per_image} tokens"

    parameters = f"{_count(summary.parameters.total)} parameters"
    if summary.parameters.active != summary.parameters.total:
        parameters += f" ({_count(summary.parameters.active)} active)"
    dtype = summary.dtype if summary.quantization is None else f"{summary.dtype}, quantised ({summary.quantization})"
    yield (
        "Weights",
        (f"{parameters}, {dtype}; {_size(summary.bytes.disk)} on disk, {_size(summary.bytes.memory)} in memory"),
    )
    if summary.own_code:
        yield "Own code", f"{', '.join(summary.own_code)}: loading it runs code and needs --trust-remote-code"


def _count(number: int) -> str:
    for unit, name in ((10**9, "billion"), (10**6, "million")):
        if number >= unit:
            return f"{number / unit:.2f} {name}"
    return f"{number:,}"


def _size(size: int) -> str:
    value, units = float(size), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{size:,} bytes" if units[0] == "bytes" else f"{value:.1f} {units[0]}"


def main() -> None:
    """Runs the command line; what the script `moellava` calls."""
    try:
        app(prog_name="moellava")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

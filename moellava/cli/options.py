# SPDX-License-Identifier: Apache-2.0
"""The options that several commands have, under the same names with the same meaning.

Options that belong together are the fields of a dataclass, such as [`Hub`]. A command takes one as an argument, and
`grouped` makes the options of its fields.
"""

import enum
import functools
import inspect
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer


DEBUG = "moellava.debug"
_SIZE = re.compile(r"(\d+(?:\.\d+)?)[KMGT]B", re.IGNORECASE)
# What a save would replace, beside weights.
_OF_A_MODEL = ("config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json")
LOADING, HUB, OUTPUT = "Loading", "Hugging Face Hub", "Output"


def grouped(command: Callable) -> Callable:
    """Returns a command that takes the fields of its dataclasses one by one, as Typer wants them."""
    groups, parameters = {}, []
    for parameter in inspect.signature(command).parameters.values():
        if is_dataclass(parameter.annotation):
            groups[parameter.name] = parameter.annotation
            parameters += [
                parameter.replace(name=field.name, default=field.default, annotation=field.type)
                for field in fields(parameter.annotation)
            ]
        else:
            parameters.append(parameter)

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    # Typer calls by keyword, so that those without a default may stand anywhere: their order is that of the help.
    parameters = [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in parameters]
    run.__signature__ = inspect.Signature(parameters)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def completes(*words: str) -> Callable[[str], list[str]]:
    """Returns what completes an option's value to one of some words."""

    def complete(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return complete


def note_debug(ctx: typer.Context, wanted: bool) -> bool:
    """Notes for the end of the command that an error is to show its traceback."""
    ctx.meta[DEBUG] = wanted or ctx.meta.get(DEBUG, False)
    return wanted


def _checked_size(given: str | None) -> str | None:
    """Finds out before the work whether a size of files is one."""
    if given is not None:
        match = _SIZE.fullmatch(given.strip())
        if match is None or float(match[1]) == 0:
            raise typer.BadParameter(f"{given!r} is no size of files, such as 5GB or 200MB.")
    return given


class DType(enum.StrEnum):
    """The dtypes that a model can be loaded in."""

    AUTO = "auto"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"

    def given(self) -> str | None:
        """Returns its name, or `None` for that of the stored weights."""
        return None if self is DType.AUTO else self.value


# Arguments and options by themselves

Checkpoint = Annotated[
    str, typer.Argument(help="A checkpoint: a folder or a Hub id.", metavar="CHECKPOINT", show_default=False)
]
Picture = Annotated[
    str, typer.Argument(help="A picture: a file or an http(s) URL.", metavar="PICTURE", show_default=False)
]
MorePictures = Annotated[
    list[str] | None,
    typer.Option("--picture", "-p", help="A further picture; can be repeated.", show_default=False),
]
OutFolder = Annotated[Path, typer.Argument(help="The folder to write.", metavar="OUT", show_default=False)]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="The length of an answer at most, in tokens.")]
DTypeOption = Annotated[
    DType, typer.Option("--dtype", help="The dtype of the weights; auto: as they are stored.", rich_help_panel=LOADING)
]
MoeField = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        help="A field of sparse layers, such as num_experts=4 or use_residual=true; can be repeated.",
        rich_help_panel="Experts",
        show_default=False,
    ),
]
Imports = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        help="A Python file or module that registers a projector or an encoder of your own; can be repeated.",
        show_default=False,
    ),
]
MaxShardSize = Annotated[
    str | None,
    typer.Option(
        callback=_checked_size,
        help="The largest weight file, such as 5GB. By default as transformers has it.",
        rich_help_panel=OUTPUT,
        show_default=False,
    ),
]
Token = Annotated[
    str | None,
    typer.Option(
        help="The access token. By default the variable HF_TOKEN, then that of 'hf auth login'.",
        rich_help_panel=HUB,
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel=OUTPUT)]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        help="Log what is detected, loaded, skipped and newly initialised, and every shape.",
        rich_help_panel=OUTPUT,
    ),
]
AsWritten = Annotated[
    bool,
    typer.Option(
        "--as-written",
        help="Keep questions as they are written. By default images at either end come first, as LLaVA has it.",
    ),
]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=OUTPUT, callback=note_debug)
]


# Options that belong together


@dataclass
class Hub:
    """What is read from the Hub, and how."""

    revision: Annotated[
        str | None, typer.Option(help="The branch, tag or commit on the Hub.", rich_help_panel=HUB, show_default=False)
    ] = None
    token: Token = None
    cache_dir: Annotated[
        Path | None, typer.Option(help="Where downloads are kept.", rich_help_panel=HUB, show_default=False)
    ] = None
    local_files_only: Annotated[
        bool, typer.Option("--local-files-only", help="Download nothing.", rich_help_panel=HUB)
    ] = False

    def options(self) -> dict[str, Any]:
        """Returns what is given of it, as keyword arguments of the functions that load."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.cache_dir is not None:
            given["cache_dir"] = os.fspath(self.cache_dir)
        return {name: value for name, value in given.items() if value not in (None, False)}


@dataclass
class TrustedHub(Hub):
    """What is read from the Hub, and whether the code that comes with it is run."""

    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            help="Run the code that comes with a model. Needed for parts of its author's own; only where you trust "
            "them.",
            rich_help_panel=HUB,
        ),
    ] = False


@dataclass
class Loading:
    """Where a checkpoint is loaded to, and in which form."""

    device: Annotated[
        str | None,
        typer.Option(
            help="Where the model runs, such as cpu, cuda or cuda:1. By default the best device there is.",
            rich_help_panel=LOADING,
            show_default=False,
            autocompletion=completes("cpu", "cuda", "mps"),
        ),
    ] = None
    device_map: Annotated[
        str | None,
        typer.Option(
            help="Instead of --device, spread the model over the devices there are, such as auto or balanced.",
            rich_help_panel=LOADING,
            show_default=False,
            autocompletion=completes("auto", "balanced", "balanced_low_0", "sequential"),
        ),
    ] = None
    dtype: DTypeOption = DType.AUTO
    load_4bit: Annotated[
        bool, typer.Option("--load-4bit", help="Quantise to 4 bits with bitsandbytes.", rich_help_panel=LOADING)
    ] = False
    load_8bit: Annotated[
        bool, typer.Option("--load-8bit", help="Quantise to 8 bits with bitsandbytes.", rich_help_panel=LOADING)
    ] = False
    model_base: Annotated[
        str | None,
        typer.Option(
            help="The checkpoint that CHECKPOINT is a LoRA adapter of.", rich_help_panel=LOADING, show_default=False
        ),
    ] = None

    def options(self) -> dict[str, Any]:
        """Returns what is given of it, as keyword arguments of `load_pretrained_model`."""
        given = {field.name: getattr(self, field.name) for field in fields(self)} | {"dtype": self.dtype.given()}
        return {name: value for name, value in given.items() if value not in (None, False)}


@dataclass
class Sampling:
    """How the words of an answer are chosen."""

    temperature: Annotated[
        float,
        typer.Option(
            min=0,
            help="Above 0, answers are drawn at random, the more freely the higher it is; at 0 the same questions get "
            "the same answers.",
        ),
    ] = 0.0
    top_p: Annotated[
        float, typer.Option(min=0, max=1, help="With a temperature: of what share of the probability words are drawn.")
    ] = 1.0

    def options(self) -> dict[str, float]:
        """Returns it as keyword arguments of `Chat`."""
        return {"temperature": self.temperature, "top_p": self.top_p}


@dataclass
class Saving:
    """How a checkpoint is saved."""

    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model that the folder holds already.")] = (
        False
    )
    max_shard_size: MaxShardSize = None

    def options(self) -> dict[str, Any]:
        """Returns what is given of it, as keyword arguments of `save_pretrained`."""
        return {} if self.max_shard_size is None else {"max_shard_size": self.max_shard_size}

    def check(self, out: Path) -> None:
        """Finds out before the work what would be in the way of saving it.

        Raises:
            OSError: `out` is a file, cannot be written, or holds a model that is not to be replaced.
        """
        if out.exists() and not out.is_dir():
            raise NotADirectoryError(f"{out} is a file; a checkpoint is saved into a folder. Give a folder's path.")
        from ..saving.weight_names import is_weight_file

        held = os.listdir(out) if out.is_dir() else []
        if not self.overwrite and any(name in _OF_A_MODEL or is_weight_file(name) for name in held):
            raise FileExistsError(f"{out} holds a model already. Give another folder, or --overwrite to replace it.")
        existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise PermissionError(f"{out} cannot be written: {existing} is no folder, or is not writable for you.")


def json_or_text(value: str) -> Any:
    """Reads a value as JSON where it can be read so, else as text."""
    words = {"true": True, "false": False, "none": None, "null": None}
    if value.lower() in words:
        return words[value.lower()]
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def named_values(pairs: list[str] | None, option: str, read: Callable[[str], Any] = json_or_text) -> dict[str, Any]:
    """Reads the `NAME=VALUE` pairs of an option, each value by `read`."""
    values = {}
    for pair in pairs or []:
        name, separator, value = pair.partition("=")
        if not separator or not name:
            raise typer.BadParameter(f"{pair!r} is not of the form NAME=VALUE.", param_hint=f"'{option}'")
        values[name] = read(value)
    return values


__all__ = [
    "DEBUG",
    "HUB",
    "LOADING",
    "OUTPUT",
    "AsWritten",
    "Checkpoint",
    "DType",
    "DTypeOption",
    "Debug",
    "Hub",
    "Imports",
    "Json",
    "Loading",
    "MaxNewTokens",
    "MaxShardSize",
    "MoeField",
    "MorePictures",
    "OutFolder",
    "Picture",
    "Sampling",
    "Saving",
    "Token",
    "TrustedHub",
    "Verbose",
    "completes",
    "grouped",
    "json_or_text",
    "named_values",
    "note_debug",
]

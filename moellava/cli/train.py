# SPDX-License-Identifier: Apache-2.0
"""`moellava train`: a model through the stages of a recipe."""

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .inputs import import_parts
from .logs import logging_shown
from .options import Debug, Imports, Json, Verbose, named_values
from .printing import print_json


def train(
    recipe: Annotated[Path, typer.Argument(help="The recipe: a YAML file.", metavar="RECIPE.yaml", show_default=False)],
    *,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="A key of the recipe, which wins over what it says; can be repeated.",
            show_default=False,
        ),
    ] = None,
    imports: Imports = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an earlier run of the recipe was stopped.")
    ] = False,
    as_json: Json = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Train a model by a recipe: its parts, its data, and the stages that it goes through.

    What is wrong with the recipe or with the data is found before any weight is read. Prints where the model is. Needs
    the extra `train`: `pip install 'moellava[train]'`.

    Examples:

    ```
    moellava train align.yaml
    moellava train recipe.yaml --set learning_rate=1e-4 --set output_dir=runs/second
    moellava train recipe.yaml --resume
    ```
    """
    overrides = named_values(changes, "--set", _yaml) | ({"resume": True} if resume else {})
    import_parts(imports)
    from accelerate import PartialState

    from ..training import train as train_by_recipe

    # The Trainer prints its log to standard output, which is for the result.
    with logging_shown(verbose), contextlib.redirect_stdout(sys.stderr):
        report = train_by_recipe(recipe, **overrides)
    if not PartialState().is_main_process:
        return
    if as_json:
        print_json(report.to_dict())
    else:
        typer.echo(report.checkpoint)


def _yaml(value: str) -> Any:
    """Reads a value as a recipe would: `none` is a word there, and null is nothing."""
    import yaml

    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise typer.BadParameter(
            f"{value!r} is no YAML, as the values of a recipe are.", param_hint="'--set'"
        ) from error


__all__ = ["train"]

# SPDX-License-Identifier: Apache-2.0
"""`moellava data check`: whether every row of training data can be used."""

from typing import Annotated

import typer

from .logs import logging_shown
from .options import AsWritten, Debug, Json, Verbose
from .printing import print_json


def check(
    data: Annotated[
        str,
        typer.Argument(help="The rows: a .json or .jsonl file, or a dataset.", metavar="DATA", show_default=False),
    ],
    *,
    model: Annotated[
        str | None,
        typer.Option(
            help="The checkpoint that is to be trained, which tells how long rows are, and may be.", show_default=False
        ),
    ] = None,
    images: Annotated[
        str | None, typer.Option(help="Where relative paths of pictures begin.", show_default=False)
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="How many tokens a row may have, with --model.", show_default=False)
    ] = None,
    as_written: AsWritten = False,
    unopened: Annotated[
        bool, typer.Option("--unopened", help="Check only that the files of the pictures are there; faster.")
    ] = False,
    as_json: Json = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Check training data row by row, before any training.

    Ends with exit code 1 where a row cannot be used.

    Examples:

    ```
    moellava data check train.json --images pictures
    moellava data check train.json --model my-model --json | jq .problems
    ```
    """
    from ..training import check_data

    with logging_shown(verbose):
        report = check_data(
            data,
            model=model,
            image_folder=images,
            max_length=max_length,
            check_pictures=not unopened,
            as_written=as_written,
        )
    if as_json:
        print_json(report.to_dict())
    else:
        typer.echo("\n".join(report.lines()))
    if report.problems:
        raise typer.Exit(1)


__all__ = ["check"]

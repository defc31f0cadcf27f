# SPDX-License-Identifier: Apache-2.0
"""`moellava push`: a saved checkpoint to the Hub."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from .logs import logging_shown
from .options import HUB, Debug, Json, MaxShardSize, Token, Verbose
from .printing import print_json


@dataclasses.dataclass
class Commit:
    """Where a push goes, and what its commit says."""

    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public",
            help="Who sees a new repository. By default as your account or organisation has it.",
            rich_help_panel=HUB,
            show_default=False,
        ),
    ] = None
    revision: Annotated[
        str | None,
        typer.Option(
            help="The branch to push to, made where it is missing. By default main.",
            rich_help_panel=HUB,
            show_default=False,
        ),
    ] = None
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead of pushing.", rich_help_panel=HUB)
    ] = False
    commit_message: Annotated[
        str | None,
        typer.Option("--commit-message", "-m", help="The commit's subject.", rich_help_panel=HUB, show_default=False),
    ] = None
    commit_description: Annotated[
        str | None, typer.Option(help="The commit's text.", rich_help_panel=HUB, show_default=False)
    ] = None


def push(
    checkpoint: Annotated[
        Path, typer.Argument(help="The folder of a checkpoint.", metavar="CHECKPOINT", show_default=False)
    ],
    repo_id: Annotated[
        str, typer.Argument(help="The repository on the Hub, such as me/my-model.", metavar="REPO", show_default=False)
    ],
    *,
    commit: Commit,
    token: Token = None,
    max_shard_size: MaxShardSize = None,
    include: Annotated[
        list[str] | None,
        typer.Option(
            help="More files of the folder to send, such as '*.csv' or results/; can be repeated. What begins with a "
            "dot is never sent.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Push a checkpoint to the Hub: model, processor, code and card in one commit.

    Weights, config, tokenizer, processor, code, the card with the pictures that it shows, and licences are sent. What
    else lies in the folder is listed, and stays.

    What is wrong with the checkpoint is found before anything is sent. Where the repository holds the same files
    already, nothing is committed.

    Examples:

    ```
    moellava push my-model me/my-model --private
    moellava push my-model me/my-model --include results.csv --include 'figures/*.svg'
    moellava push my-model me/my-model --revision v2 --commit-message "Trained for another epoch"
    moellava push my-model team/their-model --create-pr --json | jq -r .pull_request
    ```
    """
    from ..hub import push as push_checkpoint

    with logging_shown(verbose):
        report = push_checkpoint(
            checkpoint,
            repo_id,
            **dataclasses.asdict(commit),
            token=token,
            max_shard_size=max_shard_size,
            include=include or (),
        )
    if as_json:
        print_json(dataclasses.asdict(report))
        return
    typer.echo(report.pull_request or report.url)
    if not report.changed:
        typer.echo("The repository holds the same files already: nothing was committed.", err=True)


__all__ = ["push"]

# SPDX-License-Identifier: Apache-2.0
"""`moellava card`: the model card of a checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Checkpoint, Debug, Hub
from .printing import print_json


def card(
    checkpoint: Checkpoint,
    *,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="The file to write. Where one of yours is there, only what its metadata lacks is added.",
            show_default=False,
        ),
    ] = None,
    repo_id: Annotated[
        str | None,
        typer.Option(
            help="The Hub id that the card's code loads. By default CHECKPOINT, of a folder its name.",
            show_default=False,
        ),
    ] = None,
    hub: Hub,
    as_json: Annotated[bool, typer.Option("--json", help="Print the card's metadata as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Print or write the model card of a checkpoint.

    It tells what the checkpoint is made of, how to use it, and what licences its parts have. Saving and pushing write
    it by themselves.

    Examples:

    ```
    moellava card my-model
    moellava card my-model --repo-id me/my-model --out my-model/README.md
    ```
    """
    from ..hub_cards import render_card
    from ..hub_cards.writing import complete_card, read_card, save_card

    rendered = render_card(checkpoint, repo_id=repo_id, **hub.options())
    if out is not None:
        save_card(out, complete_card(read_card(out), rendered))
        typer.echo(f"Written to {out}.", err=True)
    if as_json:
        print_json(rendered.data.to_dict())
    elif out is None:
        typer.echo(str(rendered))


__all__ = ["card"]

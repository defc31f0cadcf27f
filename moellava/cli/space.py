# SPDX-License-Identifier: Apache-2.0
"""`moellava space`: a Hugging Face Space to try a checkpoint in."""

from typing import Annotated

import typer

from .options import Checkpoint, Debug, Hub, Json, OutFolder
from .printing import print_json


def space(
    checkpoint: Checkpoint,
    out: OutFolder,
    *,
    repo_id: Annotated[
        str | None,
        typer.Option(
            help="The Hub id that the Space loads. By default CHECKPOINT; a folder is there on this machine only.",
            show_default=False,
        ),
    ] = None,
    hub: Hub,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a Hugging Face Space for a checkpoint: its page, what it needs, and what it is.

    The folder can be pushed to a Space as it is; `python app.py` in it serves the page on this machine.

    Examples:

    ```
    moellava space me/my-model my-space
    moellava space my-model my-space --repo-id me/my-model
    ```
    """
    from ..hub_cards import render_space

    files = [str(path) for path in render_space(checkpoint, out, repo_id=repo_id, **hub.options())]
    if as_json:
        print_json({"files": files})
    else:
        typer.echo("\n".join(files))


__all__ = ["space"]

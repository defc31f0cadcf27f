# SPDX-License-Identifier: Apache-2.0
"""`moellava inspect`: what a checkpoint is made of."""

from typing import Annotated

import typer

from .options import Checkpoint, Debug, Hub, Json
from .printing import print_json, print_summary


def inspect(
    checkpoint: Checkpoint,
    *,
    hub: Hub,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Without effect: no code of the checkpoint is run.", hidden=True),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a checkpoint is made of.

    Only its config and the headers of its weight files are read: no weight is loaded, no code of the checkpoint is run,
    and of a checkpoint on the Hub nothing else is downloaded.

    Examples:

    ```
    moellava inspect my-model
    moellava inspect me/my-model --json | jq .parameters.total
    ```
    """
    from ..inspecting import inspect_checkpoint

    summary = inspect_checkpoint(checkpoint, **hub.options())
    if as_json:
        print_json(summary.to_dict())
    else:
        print_summary(summary)


__all__ = ["inspect"]

# SPDX-License-Identifier: Apache-2.0
"""`moellava routing`: which expert took which part of a picture and which word."""

import os
from pathlib import Path
from typing import Annotated

import typer

from .inputs import check_no_input, load_checkpoint, open_pictures
from .options import Checkpoint, Debug, Json, Loading, MorePictures, Picture, TrustedHub, Verbose
from .printing import print_json


def routing(
    checkpoint: Checkpoint,
    picture: Picture,
    question: Annotated[str, typer.Argument(help="The question.", metavar="QUESTION", show_default=False)],
    *,
    more_pictures: MorePictures = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The drawing to write.")] = Path("routing.png"),
    loading: Loading,
    hub: TrustedHub,
    as_json: Json = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Draw which expert took which picture patch and which word, layer by layer.

    Examples:

    ```
    moellava routing my-sparse-model scan.png "What is shown here?" --out routing.png
    ```
    """
    names = [picture, *(more_pictures or [])]
    check_no_input(out, names)
    pictures = open_pictures(names)
    loaded = load_checkpoint(checkpoint, loading, hub, verbose)

    from ..routing import draw_routing, trace_routing

    trace = trace_routing(loaded.model, pictures, question)
    out.parent.mkdir(parents=True, exist_ok=True)
    draw_routing(trace, out)
    if as_json:
        print_json({"drawing": os.fspath(out), **trace.to_dict()})
    else:
        for layer in trace.layers:
            shares = "  ".join(f"{share:.0%}" for share in layer.load)
            typer.echo(f"layer {layer.layer}: {shares}")
        typer.echo(f"Drawn to {out}.", err=True)
    if trace.collapsed:
        typer.echo(f"The layers {trace.collapsed} send nearly everything to the same experts: no mixture.", err=True)


__all__ = ["routing"]

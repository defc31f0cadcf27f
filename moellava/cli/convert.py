# SPDX-License-Identifier: Apache-2.0
"""`moellava convert`: an older checkpoint as one that transformers loads."""

import dataclasses
from typing import Annotated

import typer

from ..formatting import number_text
from .logs import logging_shown
from .options import Debug, DType, DTypeOption, Json, OutFolder, Saving, TrustedHub, Verbose
from .printing import print_json


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
    out: OutFolder,
    *,
    base: Annotated[
        str | None, typer.Option(help="The model that an adapter or a projector belongs to.", show_default=False)
    ] = None,
    vision_tower: Annotated[
        str | None,
        typer.Option(help="A folder or Hub id, instead of the tower that the source names.", show_default=False),
    ] = None,
    dtype: DTypeOption = DType.AUTO,
    saving: Saving,
    hub: TrustedHub,
    as_json: Json = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Convert an older checkpoint once, so that transformers loads it anywhere.

    Every weight of the source is taken over as it is, or named with the reason why not.

    Examples:

    ```
    moellava convert LanguageBind/MoE-LLaVA-Phi2-2.7B-4e my-model
    moellava convert ./llava-v1.5-7b my-model --vision-tower openai/clip-vit-large-patch14-336
    moellava convert ./llava-lora my-model --base lmsys/vicuna-7b-v1.5
    ```
    """
    saving.check(out)
    from ..converting import convert as convert_checkpoint

    options = {"dtype": dtype.given(), "overwrite": True, **saving.options(), **hub.options()}
    with logging_shown(verbose, hide_load_report=True):
        report = convert_checkpoint(source, out, base, vision_tower, **options)
    if as_json:
        print_json(dataclasses.asdict(report))
        return
    typer.echo(
        f"{out}: {number_text(report.num_parameters)} parameters, {number_text(report.num_active_parameters)} active; "
        f"{report.num_used} weights of {source} taken over."
    )
    for title, weights in (("Left out", report.left_out), ("Added", report.added)):
        for reason in dict.fromkeys(weights.values()):
            names = [name for name, why in weights.items() if why == reason]
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            typer.echo(f"{title}: {names[0]}{more} ({reason}).")
    for note in report.notes:
        typer.echo(f"Note: {note}.")


__all__ = ["convert"]

# SPDX-License-Identifier: Apache-2.0
"""`moellava evaluate`: a checkpoint's answers to questions whose true answers are known."""

import os
from pathlib import Path
from typing import Annotated

import typer

from .inputs import check_no_input
from .logs import debug_options, logging_shown
from .options import AsWritten, Checkpoint, Debug, Json, Loading, MaxNewTokens, TrustedHub, Verbose
from .printing import print_json


def evaluate(
    checkpoint: Checkpoint,
    data: Annotated[
        Path,
        typer.Argument(help="The questions: a .json or .jsonl file.", metavar="DATA", show_default=False),
    ],
    *,
    images: Annotated[
        Path | None,
        typer.Option(help="Where the pictures are that DATA names. By default beside it.", show_default=False),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="A page to write, with the wrong answers and pictures.", show_default=False)
    ] = None,
    in_card: Annotated[
        bool, typer.Option("--card", help="Write the scores into the model card of CHECKPOINT, a folder.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, help="How many rows, from the first. By default all.", show_default=False)
    ] = None,
    as_written: AsWritten = False,
    batch_size: Annotated[int, typer.Option(min=1, help="How many questions are answered together.")] = 8,
    max_new_tokens: MaxNewTokens = 128,
    loading: Loading,
    hub: TrustedHub,
    as_json: Json = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Score a checkpoint's answers to questions whose true answers are known.

    Rows of VQA-RAD, SLAKE, PathVQA, LLaVA-Med's question files and LLaVA's conversations are known by their fields.
    Answers are never sampled: the same questions get the same answers.

    Examples:

    ```
    moellava evaluate my-model vqa-rad/test.json --images vqa-rad/images --html report.html
    moellava evaluate my-model slake/test.json --images slake/imgs --card
    moellava evaluate my-model questions.jsonl --limit 100 --json | jq .metrics
    ```
    """
    if in_card and not os.path.isdir(checkpoint):
        raise typer.BadParameter(f"{checkpoint} is no folder, whose card could be written.", param_hint="'--card'")
    if html is not None:
        if html.is_dir():
            raise IsADirectoryError(f"{html} is a folder; the page is a file. Give a file's path.")
        check_no_input(html, [data])
        html.parent.mkdir(parents=True, exist_ok=True)  # before the work, as whatever can fail
    from ..evaluating import evaluate as evaluate_checkpoint

    with logging_shown(verbose):
        report = evaluate_checkpoint(
            checkpoint,
            data,
            image_folder=images,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            limit=limit,
            as_written=as_written,
            **loading.options(),
            **debug_options(verbose),
            **hub.options(),
        )
    if in_card:
        from ..hub_cards import write_card

        typer.echo(f"Written to {write_card(checkpoint, evaluation=report.for_card())}.", err=True)
    if html is not None:
        report.save_html(html)
        typer.echo(f"Written to {html}.", err=True)
    if as_json:
        print_json(report.to_dict())
    else:
        typer.echo("\n".join(report.lines()))


__all__ = ["evaluate"]

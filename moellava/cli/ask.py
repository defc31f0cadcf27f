# SPDX-License-Identifier: Apache-2.0
"""`moellava ask`: one question about pictures, and the answer."""

import sys
from typing import Annotated

import typer

from .inputs import load_checkpoint, open_pictures
from .options import (
    AsWritten,
    Checkpoint,
    Debug,
    Json,
    Loading,
    MaxNewTokens,
    MorePictures,
    Picture,
    TrustedHub,
    Verbose,
)
from .printing import print_json


def ask(
    checkpoint: Checkpoint,
    picture: Picture,
    question: Annotated[
        str,
        typer.Argument(help="The question; - reads it from standard input.", metavar="QUESTION", show_default=False),
    ],
    *,
    more_pictures: MorePictures = None,
    as_written: AsWritten = False,
    max_new_tokens: MaxNewTokens = 256,
    loading: Loading,
    hub: TrustedHub,
    as_json: Json = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Ask a model about a picture, or about several.

    The answer is the most probable one, word by word: the same question gets the same answer.

    Examples:

    ```
    moellava ask my-model scan.png "What is shown here?"
    moellava ask my-model before.png --picture after.png "What has changed?"
    moellava ask me/my-model scan.png - --json < question.txt
    ```
    """
    if question == "-":
        question = sys.stdin.read().removesuffix("\n")
    if not question.strip():
        raise typer.BadParameter("The question is empty.", param_hint="'QUESTION'")
    names = [picture, *(more_pictures or [])]
    pictures = open_pictures(names)  # before the model, which takes longer
    loaded = load_checkpoint(checkpoint, loading, hub, verbose)

    from ..chatting import Chat

    chat = Chat(loaded, max_new_tokens=max_new_tokens, as_written=as_written)
    stream = sys.stdout.isatty() and not as_json
    for text in chat.ask(question, pictures):
        if stream:
            typer.echo(text, nl=False)
    if as_json:
        asked = {"checkpoint": checkpoint, "pictures": names, "question": question.strip()}
        print_json({**asked, "answer": chat.answer, **chat.stats.to_dict()})
    else:
        typer.echo("" if stream else chat.answer)
    if chat.stats.finish_reason == "length":
        typer.echo(
            f"The answer was cut off after {chat.stats.new_tokens} tokens: raise --max-new-tokens (now "
            f"{max_new_tokens}; the model takes {loaded.context_len} tokens with the question and the pictures).",
            err=True,
        )


__all__ = ["ask"]

# SPDX-License-Identifier: Apache-2.0
"""`moellava demo`: a small model from its parts to its answers, in a minute or two."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Debug


def demo(
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")] = Path("moellava-demo"),
    epochs: Annotated[
        float | None, typer.Option(help="Rounds of training. By default as many as it takes.", show_default=False)
    ] = None,
    debug: Debug = False,
) -> None:
    """Assemble, train and ask a small model, dense and sparse, in a minute or two.

    Nothing is downloaded: the parts are made here, and the pictures are scans of digits that come with scikit-learn.
    A second run replaces what the first has written; what it has not written, or what was changed since, is in its way
    and stays. Ends with exit code 1 where the model does not see as well as it should. Needs the extra `demo`:
    `pip install 'moellava[demo]'`.

    Examples:

    ```
    moellava demo
    moellava demo --out build/demo
    ```
    """
    from ..demo.running import EPOCHS, run_demo

    if not run_demo(out, EPOCHS if epochs is None else epochs):
        raise typer.Exit(1)


__all__ = ["demo"]

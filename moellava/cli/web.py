# SPDX-License-Identifier: Apache-2.0
"""`moellava web`: a page to try checkpoints on."""

from typing import Annotated

import typer

from .logs import debug_options, logging_shown
from .options import Debug, Loading, TrustedHub, Verbose


_PANEL = "Page"


def web(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            help="A checkpoint, a folder or a Hub id; or several, which get the same questions side by side.",
            metavar="CHECKPOINT...",
            show_default=False,
        ),
    ],
    *,
    host: Annotated[
        str,
        typer.Option(
            help="The address to listen on; 0.0.0.0 lets other machines of the network in.", rich_help_panel=_PANEL
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0: any.", rich_help_panel=_PANEL)] = 7860,
    share: Annotated[
        bool,
        typer.Option(
            "--share",
            help="Make the page reachable from the internet, through a server of Gradio's.",
            rich_help_panel=_PANEL,
        ),
    ] = False,
    no_browser: Annotated[
        bool, typer.Option("--no-browser", help="Do not open the page in a browser.", rich_help_panel=_PANEL)
    ] = False,
    loading: Loading,
    hub: TrustedHub,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Try checkpoints in the browser: pictures, questions, and what a sparse model's experts take.

    The page is served on this machine until Ctrl-C. Needs the extra `web`: `pip install 'moellava[web]'`.

    Examples:

    ```
    moellava web my-model
    moellava web my-model my-sparse-model --port 8000 --no-browser
    ```
    """
    from ..web import launch

    with logging_shown(verbose):
        launch(
            checkpoints,
            host=host,
            port=port,
            share=share,
            open_browser=not no_browser,
            on_ready=lambda address: typer.echo(f"The page is at {address} (Ctrl-C ends it).", err=True),
            **loading.options(),
            **debug_options(verbose),
            **hub.options(),
        )


__all__ = ["web"]

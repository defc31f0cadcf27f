# SPDX-License-Identifier: Apache-2.0
"""The command line put together: every command, and how each ends when something is wrong."""

import logging
import sys
from collections.abc import Callable
from inspect import cleandoc
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__
from .ask import ask
from .assemble import assemble
from .card import card
from .chat import chat
from .convert import convert
from .data import check
from .demo import demo
from .errors import is_the_users, sentence
from .evaluate import evaluate
from .inspect import inspect
from .options import DEBUG, grouped, note_debug
from .plan import plan
from .push import push
from .routing import routing
from .space import space
from .train import train
from .upcycle import upcycle
from .web import web


class _Commands(TyperGroup):
    """Ends a command in one sentence when something is wrong that the user can put right."""

    def invoke(self, ctx: typer.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise typer.Exit(130) from error
        except Exception as error:
            if ctx.meta.get(DEBUG) or not is_the_users(error):
                raise
            typer.echo(f"Error: {sentence(error)}", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moellava {__version__}")
        raise typer.Exit


@app.callback()
def moellava(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error.", callback=note_debug)
    ] = False,
) -> None:
    """Vision-language models made of parts: assemble them, look into them, ask them about pictures."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # what it lacks, most commands do not need


_PANELS = {
    "See it work": (demo,),
    "Make a model": (assemble, train, upcycle, convert),
    "Ask it": (ask, chat, web),
    "Look into it": (inspect, plan, routing, evaluate),
    "Share it": (card, push, space),
}


def _add(group: typer.Typer, command: Callable, panel: str | None = None) -> None:
    """Adds a command, whose docstring tells what it does and ends with examples."""
    text, heading, examples = cleandoc(command.__doc__).partition("Examples:")
    group.command(help=text, epilog=heading + examples, rich_help_panel=panel)(grouped(command))


for _panel, _commands in _PANELS.items():
    for _command in _commands:
        _add(app, _command, _panel)

_data = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown", help="Look into the data that a model is trained on."
)
_add(_data, check)
app.add_typer(_data, name="data", rich_help_panel="Make a model")


def main() -> None:
    """Runs the command line; what the script `moellava` calls."""
    try:
        app(prog_name="moellava")
    except KeyboardInterrupt:
        sys.exit(130)


__all__ = ["app", "main"]

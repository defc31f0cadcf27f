# SPDX-License-Identifier: Apache-2.0
"""`moellava chat`: a conversation in the terminal, or the questions of a script, one a line."""

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import is_the_users, sentence
from .inputs import load_checkpoint, open_pictures
from .options import OUTPUT, Checkpoint, Debug, Loading, MaxNewTokens, Sampling, TrustedHub, Verbose


if TYPE_CHECKING:
    from ..chatting import Chat


_HELP = """\
/picture FILE  a picture, or its http(s) URL, that comes with the next question
/reset         start anew, without pictures
/help          these lines
/quit          end, as Ctrl-D does
Anything else is a question. Ctrl-C stops an answer."""


def chat(
    checkpoint: Checkpoint,
    *,
    picture: Annotated[
        list[str] | None,
        typer.Option(
            "--picture",
            "-p",
            help="A picture that comes with the first question: a file or an http(s) URL; can be repeated.",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: MaxNewTokens = 256,
    sampling: Sampling,
    loading: Loading,
    hub: TrustedHub,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a line for each answer.", rich_help_panel=OUTPUT)
    ] = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Talk with a model about pictures: answers as they are made, and follow-up questions.

    A line is a question, which the model answers with the conversation so far in mind. A line that starts with
    `/picture FILE` adds a picture to the next question; `/reset` starts anew, `/help` lists the commands, `/quit` or
    Ctrl-D ends. Ctrl-C stops an answer. From a pipe the lines are read in the same way.

    Examples:

    ```
    moellava chat my-model --picture scan.png
    moellava chat my-model --picture before.png --picture after.png --temperature 0.7
    moellava chat my-model --picture scan.png --json < questions.txt > answers.jsonl
    ```
    """
    names = picture or []
    pictures = open_pictures(names)  # before the model, which takes longer
    loaded = load_checkpoint(checkpoint, loading, hub, verbose)

    from ..chatting import Chat

    talk = _Talk(Chat(loaded, max_new_tokens=max_new_tokens, **sampling.options()), as_json, verbose)
    talk.pictures = list(zip(names, pictures, strict=True))
    is_interactive = sys.stdin.isatty()
    if is_interactive:
        typer.echo("Ask about pictures: /picture FILE adds one, /help tells more, Ctrl-D ends.", err=True)
    for line in _lines(is_interactive):
        if line == "/quit":
            break
        try:
            talk.take(line)
        except Exception as error:
            if not is_interactive or not is_the_users(error):
                raise
            typer.echo(f"Error: {sentence(error)}", err=True)
        except KeyboardInterrupt:
            if not is_interactive:
                raise
            typer.echo(" (stopped)", err=True)


class _Talk:
    """A conversation whose answers are printed, and what its lines mean."""

    def __init__(self, chat: "Chat", as_json: bool, verbose: bool):
        self.chat, self.as_json, self.verbose = chat, as_json, verbose
        self.pictures: list[tuple[str, Any]] = []  # those of the next question, by name

    def take(self, line: str) -> None:
        """Does what a line says."""
        command, _, rest = line.partition(" ")
        if command == "/picture":
            self._add(rest.strip().strip("'\""))
        elif command == "/reset":
            self.chat.reset()
            self.pictures = []
        elif command == "/help":
            typer.echo(_HELP, err=True)
        elif command.startswith("/"):
            raise ValueError(f"Unknown command {command}. Expected /picture FILE, /reset, /help or /quit.")
        elif line:
            self._ask(line)

    def _add(self, name: str) -> None:
        if not name:
            raise ValueError("/picture needs a file or an http(s) URL, such as: /picture scan.png")
        (picture,) = open_pictures([name])
        self.pictures.append((name, picture))

    def _ask(self, question: str) -> None:
        names = [name for name, _ in self.pictures]
        with contextlib.closing(self.chat.ask(question, [picture for _, picture in self.pictures])) as pieces:
            self.pictures = []
            for text in pieces:
                if not self.as_json:
                    typer.echo(text, nl=False)
        stats = self.chat.stats
        if self.as_json:
            told = {"question": question, "pictures": names, "answer": self.chat.answer, **stats.to_dict()}
            typer.echo(json.dumps(told, ensure_ascii=False))
        else:
            typer.echo()
        if stats.finish_reason == "length":
            typer.echo(
                f"The answer was cut off after {stats.new_tokens} tokens; see --max-new-tokens, or /reset where the "
                "conversation has become too long.",
                err=True,
            )
        if self.verbose:
            typer.echo(f"{stats.prompt_tokens} + {stats.new_tokens} tokens, {stats.seconds:.1f} s", err=True)


def _lines(is_interactive: bool) -> Iterator[str]:
    """Yields what is typed or piped, line by line, until it ends."""
    if not is_interactive:
        yield from (line.strip() for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):  # Windows has none, and edits lines by itself
        import readline

        readline.parse_and_bind("tab: complete")  # names of files
    while True:
        prompt = "> "
        if not sys.stdout.isatty():  # answers go to a file, the prompt does not
            typer.echo(prompt, nl=False, err=True)
            prompt = ""
        try:
            yield input(prompt).strip()
        except EOFError:
            typer.echo(err=True)
            return


__all__ = ["chat"]

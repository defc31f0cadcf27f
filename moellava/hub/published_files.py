# SPDX-License-Identifier: Apache-2.0
"""Which files of a checkpoint's folder a push may publish: they are chosen by what they are, and all else stays."""

import os
import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import unquote

from ..checks.pictures import load_picture
from ..reading.sources import CONFIG_NAME


CARD_NAME = "README.md"
PROCESSOR_NAME = "processor_config.json"
# What transformers reads of a checkpoint beside weights and code.
_READ_BY_TRANSFORMERS = (
    CONFIG_NAME, "generation_config.json", PROCESSOR_NAME, "preprocessor_config.json", "chat_template.json",
    "chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
_READ_TOO = re.compile(r"additional_chat_templates/[^/]+\.jinja|tokenizer\.[\d.]+\.json|[^/]+\.tiktoken")
_LICENCE_NAME = re.compile(
    r"(LICEN[CS]E([-_](APACHE([-_]2\.0)?|MIT|BSD|CODE|DATA|MODEL|WEIGHTS))?|NOTICE|COPYING|(ACCEPTABLE_)?USE_POLICY)"
    r"(\.(txt|md|rst))?",
    flags=re.IGNORECASE,
)
_LICENCE_WORDS = re.compile(r"licen[cs]e|copyright|permission|policy|terms", flags=re.IGNORECASE)
_PICTURE_IN_CARD = re.compile(r"""!\[[^\]]*\]\(\s*<?([^)\s>]+)|<img\b[^>]*?\bsrc=["']([^"']+)["']""")


def published_files(folder: Path, include: Iterable[str] = ()) -> set[str]:
    """Returns the files of a checkpoint's folder, but for weights and code, that are its own or were asked for.

    These are the files of config, processor and tokenizer by their names; the card, and the files that it shows which
    are pictures; licences that are texts; and what `include` names.

    Args:
        folder (`Path`): The checkpoint.
        include (`Iterable[str]`, *optional*): Patterns of more files, such as `"*.csv"` or `"results/"`: `*` stands for
            any characters, `/` among them, and a folder for what is in it.

    Raises:
        ValueError: A pattern has no file; or a file is a link to one outside of the folder.
    """
    names = set(_plain_files(folder))
    files = {name for name in names if name in _READ_BY_TRANSFORMERS or _READ_TOO.fullmatch(name)}
    files |= {CARD_NAME} & names
    licences = {name for name in names if _LICENCE_NAME.fullmatch(name)}
    pictures = shown_in_card(folder) & names
    asked: set[str] = set()
    for pattern in include:
        plain = pattern.removeprefix("./").rstrip("/")
        found = {name for name in names if fnmatchcase(name, plain) or fnmatchcase(name, f"{plain}/*")}
        if not found:
            raise ValueError(
                f"include is {pattern!r}, and {folder} has no such file to send. Expected a pattern of paths in the "
                "folder, such as '*.csv' or 'results/'. What begins with a dot is never sent."
            )
        asked |= found
    check_links(folder, files | licences | pictures | asked)
    files |= {name for name in licences if _is_licence(folder / name)}
    files |= {name for name in pictures if _is_picture(folder / name)}
    return files | asked


def check_links(folder: Path, names: Iterable[str]) -> None:
    """Raises a ValueError where a file of a checkpoint is a link to a file elsewhere, which a push would publish."""
    home = folder.resolve()
    # In the Hub's cache the files of a snapshot are links to those that its repository has.
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    for name in sorted(names):
        target = (folder / name).resolve()
        if not any(target.is_relative_to(place) for place in homes):
            raise ValueError(
                f"{folder / name} is a link to {target}, outside of the checkpoint. Nothing was sent. Put the file "
                "itself there where it is to be public."
            )


def left_out(folder: Path, files: Iterable[str]) -> list[str]:
    """Returns what of a folder is not among the files: folders of which nothing is, and files elsewhere."""
    sent, sent_from = set(files), {name.partition("/")[0] for name in files}
    names = set()
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        top = name.partition("/")[0]
        if path.is_file() and name not in sent:
            names.add(name if top in (name, *sent_from) else f"{top}/")
    return sorted(names)


def _plain_files(folder: Path) -> Iterator[str]:
    """Yields the files that may be published: none that begins with a dot, or lies in a folder that does."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            yield name.as_posix()


def shown_in_card(folder: Path) -> set[str]:
    """Returns the files that the card of a folder shows as pictures, whether they are there or not."""
    card = folder / CARD_NAME
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    shown = {markdown or html for markdown, html in _PICTURE_IN_CARD.findall(text)}
    return {Path(os.path.normpath(name)).as_posix() for name in shown | set(map(unquote, shown))}


def _is_picture(path: Path) -> bool:
    try:
        load_picture(path)
    except ValueError:
        return False
    return True


def _is_licence(path: Path) -> bool:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return _LICENCE_WORDS.search(text) is not None and "PRIVATE KEY" not in text


__all__ = ["CARD_NAME", "PROCESSOR_NAME", "check_links", "left_out", "published_files", "shown_in_card"]

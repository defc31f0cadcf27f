# SPDX-License-Identifier: Apache-2.0
"""Writes a Space that shows a checkpoint: a page that needs gradio and transformers, and not this package."""

import os
from pathlib import Path

import jinja2
from huggingface_hub import SpaceCardData

from ..reading.sources import Source
from .facts import CardFacts, plain, read_facts


GRADIO_VERSION = "6.31.0"  # the one that the tests run
_TEMPLATES = Path(__file__).parent / "templates"
_REQUIREMENTS = ("torch", "torchvision", "transformers>=5.19,<6", "accelerate", "pillow")


def render_space(
    checkpoint: str | os.PathLike, out: str | os.PathLike, *, repo_id: str | None = None, **hub_options
) -> list[Path]:
    r"""
    Writes a Hugging Face Space for a checkpoint: `app.py`, `requirements.txt` and `README.md`.

    The page streams its answers and keeps the conversation with its pictures. The environment variable `MODEL_ID` names
    another checkpoint to it.

    Args:
        checkpoint (`str` or `os.PathLike`): A folder or a Hub id.
        out (`str` or `os.PathLike`): The folder to write to; made if it is not there.
        repo_id (`str`, *optional*): The Hub id that the Space loads. Defaults to `checkpoint`, of a folder to its path,
            with which the page runs on this machine only.
        hub_options: `revision`, `token`, `cache_dir` and `local_files_only`, as in transformers' `from_pretrained`.

    Returns:
        `list[Path]`: The files.

    Raises:
        FileExistsError: `out` has a file of one of these names with another content.
        FileNotFoundError, OSError, ValueError: As for `render_card`.

    Example:

    ```python
    >>> from moellava.hub_cards import render_space

    >>> render_space("my-model", "my-space", repo_id="me/my-model")
    ```"""
    facts = read_facts(Source(checkpoint, hub_options), repo_id)
    is_local = repo_id is None and os.path.isdir(checkpoint)
    loaded = os.path.abspath(checkpoint) if is_local else facts.name
    files = {
        "app.py": _render("app.py.jinja", name=plain(facts.title), repo_id=loaded, description=_description(facts)),
        "requirements.txt": "\n".join(_requirements(facts)) + "\n",
        "README.md": _render(
            "space.md.jinja",
            card_data=_metadata(facts, None if is_local else loaded),
            name=plain(facts.title),
            link=None if is_local else loaded,
            repo_id=loaded,
        ),
    }
    out = Path(out)
    changed = [name for name, content in files.items() if _has_other_content(out / name, content)]
    if changed:
        raise FileExistsError(
            f"{out} has {', '.join(changed)} already, with another content. Give another folder, or delete them first."
        )
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (out / name).write_text(content, encoding="utf-8")
    return [out / name for name in files]


def _render(template: str, **values: object) -> str:
    source = (_TEMPLATES / template).read_text(encoding="utf-8")
    return jinja2.Template(source, keep_trailing_newline=True).render(values)


def _has_other_content(path: Path, content: str) -> bool:
    return path.exists() and (not path.is_file() or path.read_bytes() != content.encode("utf-8"))


def _requirements(facts: CardFacts) -> list[str]:
    return [*_REQUIREMENTS, *(["bitsandbytes"] if facts.summary.quantization == "bitsandbytes" else [])]


def _description(facts: CardFacts) -> str:
    warning = " Not a medical device: have every answer checked." if facts.is_medical else ""
    return f"Add pictures and ask about them. Answers can be wrong.{warning}"


def _metadata(facts: CardFacts, model: str | None) -> SpaceCardData:
    return SpaceCardData(
        title=plain(facts.title),
        sdk="gradio",
        sdk_version=GRADIO_VERSION,
        app_file="app.py",
        models=[model] if model else None,
        pinned=False,
    )


__all__ = ["GRADIO_VERSION", "render_space"]

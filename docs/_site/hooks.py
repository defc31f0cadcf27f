# SPDX-License-Identifier: Apache-2.0
"""MkDocs' hooks: pages that lie outside of docs/, links to them, and the package as griffe has to see it.

The pages are written for GitHub as well: a link is a path from the file that holds it. Links between pages work on the
site as they are. Those that cross the border of docs/ are rewritten here, and one that leads to no page is an error.
"""

import posixpath
import re
import shutil
import tempfile
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File


ROOT = Path(__file__).resolve().parents[2]
# What the site has of the repository's root, each under its own name, the README as the home page.
ROOT_PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "LICENSE")
# The folders that setup.py makes sub-packages of `moellava`.
SUB_PACKAGES = ("configuration", "hub_cards", "modeling", "parts", "processing")

_LINK = re.compile(r"(?<=\]\()(?!https?://|mailto:|#)([^)\s#]+)")
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LAID_OUT = tempfile.TemporaryDirectory(prefix="moellava-docs-")


@event_priority(100)  # before mkdocstrings reads its settings
def on_config(config):
    """Lays out the package as it is installed, for griffe, which reads the sources and imports nothing."""
    package = Path(_LAID_OUT.name, "moellava")
    shutil.rmtree(package, ignore_errors=True)  # `mkdocs serve` comes here at every change
    shutil.copytree(ROOT / "moellava", package)
    for name in SUB_PACKAGES:
        shutil.copytree(ROOT / name, package / name)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [_LAID_OUT.name]
    return config


def on_files(files, config):
    """Adds the pages of the repository's root."""
    for name in ROOT_PAGES:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turns links that are paths in the repository into paths on the site."""
    source = page.file.src_uri
    home = posixpath.dirname(source if source in ROOT_PAGES else f"docs/{source}")

    def on_site(match):
        target = posixpath.normpath(posixpath.join(home, match[1]))
        if target.startswith("docs/"):
            target = target.removeprefix("docs/")
        elif target not in ROOT_PAGES:
            raise PluginError(f"{source} links to {match[1]}, which is no page of the site. Name the file instead.")
        return posixpath.relpath(target, posixpath.dirname(source) or ".")

    parts = _FENCE.split(markdown)
    fences = _FENCE.findall(markdown)
    rewritten = [_LINK.sub(on_site, part) for part in parts]
    return "".join(text for pair in zip(rewritten, [*fences, ""], strict=True) for text in pair)

# SPDX-License-Identifier: Apache-2.0
"""The site of the documentation: it builds without a warning, its links hold, and nothing of it lies elsewhere."""

import html.parser
import importlib.util
import os
import re
import subprocess
import sys
import urllib.parse
from pathlib import Path
from types import SimpleNamespace

import pytest
from mkdocs.exceptions import PluginError

import moellava


ROOT = Path(__file__).resolve().parent.parent
# Tags that load something, with the attribute that says from where. A link (`a`) may lead anywhere.
LOADED = {
    "audio": "src",
    "embed": "src",
    "iframe": "src",
    "img": "src",
    "link": "href",
    "object": "data",
    "script": "src",
    "source": "src",
    "video": "src",
}


class Page(html.parser.HTMLParser):
    """A page's anchors, its links, what it loads, and its texts by the anchor of the heading before them."""

    def __init__(self, path: Path):
        super().__init__()
        self.anchors, self.links, self.loaded = set(), [], []
        self.title = ""
        self._tag = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self._tag = tag
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if given.get(LOADED.get(tag)):
            self.loaded.append(given[LOADED[tag]])

    def handle_data(self, data):
        if self._tag == "title":
            self.title += data


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site as `make docs` builds it, in a folder of its own."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=3000,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not re.search(r"^(WARNING|ERROR)", done.stderr, flags=re.MULTILINE), done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site) -> dict[str, Page]:
    return {path.relative_to(site).as_posix(): Page(path) for path in sorted(site.rglob("*.html"))}


def test_every_document_is_a_page(pages):
    documents = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    documents += ["index.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"]
    assert {name.removesuffix(".md") + ".html" for name in documents} | {"404.html"} == set(pages)
    assert all(page.title for page in pages.values())


def test_every_page_is_in_the_navigation(site, pages):
    links = {urllib.parse.unquote(link).partition("#")[0] for link in pages["index.html"].links}
    assert {name for name in pages if name not in ("404.html", "index.html")} <= links


def test_links_and_anchors(site, pages):
    broken = []
    for name, page in pages.items():
        if name == "404.html":  # is served in the place of any page, so its links start at the root
            continue
        for link in [*page.links, *page.loaded]:
            if urllib.parse.urlsplit(link).scheme:
                continue
            file, _, anchor = urllib.parse.unquote(link).partition("#")
            target = os.path.normpath(os.path.join(os.path.dirname(name), file)) if file else name
            if not (site / target).exists():
                broken.append(f"{name}: {link}: no such file")
            elif anchor and anchor not in pages[target].anchors:
                broken.append(f"{name}: {link}: no such anchor")
    assert broken == []


def test_links_across_the_border_of_the_folder():
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "_site" / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)

    def on_site(source: str, markdown: str) -> str:
        return hooks.on_page_markdown(markdown, SimpleNamespace(file=SimpleNamespace(src_uri=source)), None, None)

    for source, written, expected in (
        ("guides/upcycle.md", "[a](../../README.md#parts)", "[a](../README.md#parts)"),
        ("design.md", "[a](../SECURITY.md), [b](performance.md)", "[a](SECURITY.md), [b](performance.md)"),
        ("README.md", "![a](docs/images/demo.png) [b](https://x.org)", "![a](images/demo.png) [b](https://x.org)"),
        ("README.md", "```text\n[a](docs/b.md)\n```", "```text\n[a](docs/b.md)\n```"),
    ):
        assert on_site(source, written) == expected
    with pytest.raises(PluginError, match="design.md links to ../setup.py, which is no page of the site"):
        on_site("design.md", "[a](../setup.py)")


def test_nothing_is_loaded_from_another_host(site, pages):
    for name, page in pages.items():
        elsewhere = [link for link in page.loaded if link.startswith(("http:", "https:", "//"))]
        assert elsewhere == [], name
    for path in site.rglob("*.css"):
        targets = re.findall(r"(?:url\(|@import )\s*['\"]?([^'\")\s;]+)", path.read_text(encoding="utf-8"))
        assert [target for target in targets if target.startswith(("http:", "https:", "//"))] == [], path
    for path in site.rglob("*.svg"):
        assert not re.search(r"(?:href|src)=['\"](?:https?:)?//", path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize("name", [name for name in moellava.__all__ if not name.startswith("__")])
def test_public_names_are_in_the_reference(name, site, pages):
    anchor = f"moellava.{name}"
    homes = [page for page in pages if page.startswith("reference/") and anchor in pages[page].anchors]
    assert len(homes) == 1, f"{name} has its heading on {homes}"
    text = (site / homes[0]).read_text(encoding="utf-8")
    body = text[text.index(f'id="{anchor}"') :]
    end = re.search(r"<h2 ", body)
    body = body[: end.start()] if end else body
    docstring = re.search(r'<div class="doc doc-contents[^"]*">(.*)', body, flags=re.DOTALL)
    assert docstring and "<p>" in docstring[1], f"{name} has no docstring on {homes[0]}"


def test_docstrings_are_read_as_transformers_writes_them(site):
    model = (site / "reference/model.html").read_text(encoding="utf-8")
    assert "<p>Of shape <code>(num_images, channels, image_size, image_size)</code>. The pictures" in model
    for page in sorted((site / "reference").glob("*.html")):
        text = re.sub(r"<(pre|script).*?</\1>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        leftovers = re.findall(r".*(?:\*optional\*|<em>optional</em>|defaults to <code>|<code>`).*", text)
        assert leftovers == [], page.name
    configuration = (site / "reference/configuration.html").read_text(encoding="utf-8")
    row = re.search(r"<code>image_token_id</code>.*?</tr>", configuration, flags=re.DOTALL)[0]
    assert re.findall(r"<code>(.*?)</code>", row) == ["image_token_id", '<span title="int">int</span>', "32000"]

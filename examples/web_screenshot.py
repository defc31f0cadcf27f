# SPDX-License-Identifier: Apache-2.0
"""The page with the demo's sparse model on it, as a picture for the README: `make screenshot`, after `make demo`."""

import argparse
import json
import shutil
import threading
from pathlib import Path
from queue import Queue

from playwright.sync_api import sync_playwright

from moellava.web import launch


ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "build" / "demo"
ASKED = 0  # of the held-out pictures


def take(demo: Path, out: Path, chromium: str) -> None:
    """Asks about one held-out picture, then about it again, and takes a picture of the whole page."""
    questions = json.loads((demo / "questions.json").read_text(encoding="utf-8"))["questions"]
    ready: Queue = Queue()
    options = {"port": 0, "open_browser": False, "on_ready": ready.put, "device": "cpu"}
    # By the name that it has for a reader in the repository.
    checkpoint = str((demo / "sparse-checkpoint").relative_to(ROOT))
    threading.Thread(target=launch, args=[[checkpoint]], kwargs=options, daemon=True).start()
    address = ready.get(timeout=300)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(address)
        page.get_by_label("Question").wait_for()
        page.locator("#mv-gallery input[type=file]").set_input_files(demo / questions[ASKED]["picture"])
        page.locator("#mv-gallery .thumbnail-item").wait_for()
        for question in ("What digit is this?", "Name the digit."):
            page.get_by_role("button", name="Ask").wait_for()
            page.get_by_label("Question").fill(question)
            page.get_by_label("Question").press("Enter")
            page.locator(".user .message-content").filter(has_text=question).wait_for()
        page.get_by_role("button", name="Ask").wait_for()  # Stop is in its place until the answer is there
        page.locator("svg.mv-patches").wait_for()
        page.mouse.move(0, 0)
        page.screenshot(path=out, full_page=True)
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, default=DEMO, help="what `make demo` has written")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "web.png")
    parser.add_argument("--chromium", default=shutil.which("chromium"), help="the browser")
    arguments = parser.parse_args()
    take(arguments.demo.resolve(), arguments.out, arguments.chromium)


if __name__ == "__main__":
    main()

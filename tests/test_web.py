# SPDX-License-Identifier: Apache-2.0
"""The page: used in a real browser, without a screen, as a user would; and what it refuses before it is there."""

import re
import shutil
import threading
from queue import Queue

import pytest
import torch
from parts import picture, run_python, taken_port
from PIL import Image

from moellava import load_pretrained_model
from moellava.chatting import Chat
from moellava.routing import LayerRouting, RoutingTrace
from moellava.web.pictures import open_picture
from moellava.web.routing_view import routing_html
from moellava.web.session import ServedModel, Session


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# No GPU, no sandbox (root has none), and nothing that Chromium does on the network by itself.
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
PATIENCE_MS = 600_000
TYPING_MS = 5_000
MOE = {"num_experts": 3, "num_experts_per_tok": 2, "layers": "sparse"}
# How long answers are, in tokens: one that is made at once, one whose growing can be seen, one that can be stopped.
SHORT, STREAMED, LONG = 40, 200, 1000

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="Chromium is not installed; `make chromium` installs Debian's"
)


@pytest.fixture(scope="module")
def checkpoints(parts, tmp_path_factory):
    """A sparse checkpoint and a dense one, which say nothing but words, and as many as they may."""
    root = tmp_path_factory.mktemp("web")
    torch.manual_seed(0)  # of the projectors
    for name, family, moe in (("sparse", "llama", MOE), ("dense", "qwen2", None)):
        tower = {"mm_vision_tower": str(parts.vision_tower("clip")), "device": "cpu"}
        model = load_pretrained_model(str(parts.language_model(family)), moe_config=moe, **tower).model
        decode = model.processor.tokenizer.decode
        tokens = range(model.config.text_config.vocab_size)
        model.generation_config.suppress_tokens = [i for i in tokens if not re.fullmatch("[a-z]+", decode([i]).strip())]
        model.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two pictures, a text file, a text file that is called a picture, and the first half of a picture."""
    root = tmp_path_factory.mktemp("pictures")
    picture(1).save(root / "one.png")
    picture(2).save(root / "two.png")
    (root / "notes.txt").write_text("Not a picture.")
    (root / "notes.png").write_text("Not a picture.")
    (root / "half.png").write_bytes((root / "one.png").read_bytes()[:200])
    return root


@pytest.fixture(scope="module")
def serve():
    """A function: serves the page as `moellava web` does, in a thread, and returns its address."""
    import gradio

    from moellava.web import launch

    def start(*checkpoints):
        ready = Queue()

        def run():
            try:
                launch(list(map(str, checkpoints)), port=0, open_browser=False, on_ready=ready.put, device="cpu")
            except Exception as error:
                ready.put(error)

        threading.Thread(target=run, daemon=True).start()
        address = ready.get(timeout=1200)
        if isinstance(address, Exception):
            raise address
        return address

    yield start
    gradio.close_all(verbose=False)


@pytest.fixture(scope="module")
def page_of_one(serve, checkpoints):
    return serve(checkpoints / "sparse")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra `test`)")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


class User:
    """Someone at a page, with a browser's window of their own.

    Attributes:
        requests (`list[str]`): The addresses that their browser has asked for.
    """

    def __init__(self, browser, address):
        self.context = browser.new_context()
        self.context.set_default_timeout(PATIENCE_MS)
        self.requests = []
        self.context.on("request", lambda request: self.requests.append(request.url))
        self.page = self.context.new_page()
        self.page.goto(address)
        self.page.get_by_label("Question").wait_for()

    def upload(self, *paths):
        with self.page.expect_response(lambda response: "/upload" in response.url):
            self.page.locator("#mv-gallery input[type=file]").first.set_input_files(list(map(str, paths)))

    def see_pictures(self, count):
        self.page.wait_for_function(
            "count => document.querySelectorAll('#mv-gallery .thumbnail-item').length === count", arg=count
        )

    def set_longest(self, tokens):
        from playwright.sync_api import TimeoutError as PlaywrightTimeout

        number = self.page.get_by_label("number input for Longest answer, in tokens")
        if not number.is_visible():
            self.page.get_by_role("button", name="Settings").click()
        # The setting is taken once its slider has moved. On a busy machine the page may draw its settings anew while
        # someone types into them: they see it, and type again.
        for _ in range(PATIENCE_MS // TYPING_MS):
            number.fill(str(tokens))
            number.press("Tab")
            try:
                self.page.wait_for_function(
                    '([label, value]) => document.querySelector(`input[aria-label="${label}"]`)?.value === value',
                    arg=["range slider for Longest answer, in tokens", str(tokens)],
                    timeout=TYPING_MS,
                )
            except PlaywrightTimeout:
                continue
            self.page.wait_for_timeout(200)
            return
        pytest.fail(f"The page did not take {tokens} tokens as the longest answer")

    def ask(self, question):
        self.page.get_by_role("button", name="Ask").wait_for()
        before = len(self.turns("user"))
        self.page.get_by_label("Question").fill(question)
        self.page.get_by_label("Question").press("Enter")
        if question.strip():  # the notes of the question before are gone, too
            self.page.wait_for_function(
                "before => document.querySelectorAll('.user .message-content').length > before", arg=before
            )

    def clear(self):
        self.page.get_by_role("button", name="Clear").last.click()
        self.page.wait_for_function("() => !document.querySelector('.message-content')")

    def see_notes(self, pattern, count=1):
        """Waits until so many of the lines below the conversations are as said; returns them."""
        self.page.wait_for_function(
            "([pattern, count]) => [...document.querySelectorAll('.mv-note [role]')]"
            ".filter(note => new RegExp(pattern).test(note.innerText)).length === count",
            arg=[pattern, count],
        )
        return self.page.locator(".mv-note [role]").all_inner_texts()

    def turns(self, role):
        return [text.strip() for text in self.page.locator(f".{role} .message-content").all_inner_texts()]

    def alerts(self):
        return [text for text in self.page.locator(".mv-alert [role=alert]").all_inner_texts() if text]


def answer_of(checkpoint, *asked, tokens=SHORT):
    """What the model itself answers to the last of several questions, each with its pictures."""
    chat = Chat(load_pretrained_model(str(checkpoint), device="cpu"), max_new_tokens=tokens)
    for question, *pictures in asked:
        answer = "".join(chat.ask(question, [Image.open(path) for path in pictures]))
    return answer.strip()


@needs_chromium
def test_a_conversation_about_a_picture(browser, page_of_one, checkpoints, files):
    user = User(browser, page_of_one)
    user.upload(files / "one.png")
    user.see_pictures(1)
    user.set_longest(STREAMED)
    user.page.evaluate(
        """() => {
            window.seen = new Set();
            new MutationObserver(() => document.querySelectorAll('.bot .message-content').forEach(
                answer => window.seen.add(answer.innerText.trim())
            )).observe(document.body, {subtree: true, childList: true, characterData: true});
        }"""
    )
    user.ask("What is shown?")
    user.page.get_by_role("button", name="Ask").wait_for()  # the routing has been traced, too
    (note,) = user.see_notes("cut off at the limit$")
    assert re.fullmatch(rf"\d+ tokens in · {STREAMED} out · [\d.]+ s · \d+ tokens/s · cut off at the limit", note)

    # The answer grew before the user's eyes, to what the model itself says.
    expected = answer_of(checkpoints / "sparse", ("What is shown?", files / "one.png"), tokens=STREAMED)
    assert user.turns("bot") == [expected]
    seen = user.page.evaluate("() => [...window.seen].sort((a, b) => a.length - b.length)")
    partial = [text for text in seen if text and text != expected]
    assert len(partial) >= 2
    assert all(expected.startswith(text) for text in partial)

    # Which expert took which patch, of the layer that is chosen: a 4 by 4 grid on the picture.
    patches = user.page.locator("svg.mv-patches rect")
    patches.nth(15).wait_for()
    assert patches.count() == 16
    assert user.page.get_by_role("img", name="Picture 1, each patch").count() == 1
    before = user.page.locator(".mv-load").inner_text()
    user.page.get_by_label("2", exact=True).check()
    user.page.wait_for_function("before => document.querySelector('.mv-load').innerText !== before", arg=before)
    assert "layer 2" in user.page.get_by_role("img", name="Picture 1, each patch").get_attribute("aria-label")

    # A follow-up, with the conversation so far, and a second picture.
    user.upload(files / "two.png")
    user.see_pictures(2)
    user.ask("And here?")
    user.see_notes("tokens/s")
    user.page.wait_for_function("() => document.querySelectorAll('svg.mv-patches').length === 2")
    asked = ("What is shown?", files / "one.png"), ("And here?", files / "two.png")
    assert user.turns("bot") == [expected, answer_of(checkpoints / "sparse", *asked, tokens=STREAMED)]
    assert user.page.locator(".mv-asked img").evaluate_all("images => images.map(image => image.alt)") == [
        "one.png",
        "two.png",
    ]

    # Nothing was asked of any other machine, markup is text, and all is gone by Clear.
    user.ask("<img src='http://127.0.0.2/x.png'> **so**")
    user.see_notes("tokens/s")
    assert user.turns("user")[-1] == "<img src='http://127.0.0.2/x.png'> **so**"
    hosts = {url.split("/")[2].split(":")[0] for url in user.requests if not url.startswith(("data:", "blob:"))}
    assert hosts == {"127.0.0.1"}
    assert user.page.locator("[aria-label=Share]").count() == 0
    user.clear()
    user.see_pictures(0)
    user.page.wait_for_function("() => !document.querySelector('svg.mv-patches')")
    user.context.close()


@needs_chromium
def test_a_file_that_is_no_picture(browser, page_of_one, files):
    user = User(browser, page_of_one)
    user.set_longest(SHORT)
    user.upload(files / "one.png")
    user.see_pictures(1)  # until then, the place to drop files at is another one
    for name, reason in (("notes.txt", "no known format"), ("notes.png", "no known format"), ("half.png", "truncated")):
        user.upload(files / name)
        user.page.get_by_role("alert").filter(has_text=name).wait_for()
        (alert,) = user.alerts()
        assert alert.startswith(f"The picture ('{name}') cannot be decoded: ")
        assert reason in alert
        assert "Expected a complete picture file" in alert
        user.see_pictures(1)
    user.ask("What is shown?")  # the conversation goes on, with the good one
    user.see_notes("tokens/s")
    assert user.alerts() == []
    user.ask(" ")
    user.page.get_by_role("alert").filter(has_text="empty").wait_for()
    assert user.alerts() == ["The question is empty. Write one, then ask."]
    user.context.close()


@needs_chromium
def test_two_users_at_once(browser, page_of_one, checkpoints, files):
    first, second = User(browser, page_of_one), User(browser, page_of_one)
    first.upload(files / "one.png")
    first.see_pictures(1)
    first.set_longest(LONG)
    second.set_longest(SHORT)
    first.ask("What is shown?")
    first.see_notes("Answering")
    second.ask("Who are you?")
    second.see_notes("Waiting for its turn")
    first.page.get_by_role("button", name="Stop").click()
    (note,) = first.see_notes("stopped")
    assert int(re.search(r"(\d+) out", note)[1]) < LONG
    second.see_notes("tokens/s")
    assert second.turns("user") == ["Who are you?"]
    assert second.turns("bot") == [answer_of(checkpoints / "sparse", ("Who are you?",))]
    assert first.turns("user") == ["What is shown?"]
    assert len(first.turns("bot")) == 1

    # Cleared in the middle of an answer, the conversation is a new one, without the rest of it.
    first.ask("And now?")
    first.see_notes("Answering")
    first.clear()
    first.set_longest(SHORT)
    first.ask("Once more?")
    first.see_notes("tokens/s")
    assert first.turns("bot") == [answer_of(checkpoints / "sparse", ("Once more?",))]

    # Who leaves in the middle of an answer keeps nobody waiting for the rest of it.
    first.set_longest(LONG)
    first.ask("And now?")
    first.see_notes("Answering")
    first.context.close()
    second.ask("Still there?")
    second.see_notes("tokens/s")
    assert len(second.turns("bot")) == 2
    second.context.close()


@needs_chromium
def test_two_checkpoints_side_by_side(browser, serve, checkpoints, files):
    user = User(browser, serve(checkpoints / "sparse", checkpoints / "dense"))
    user.upload(files / "one.png")
    user.see_pictures(1)
    user.set_longest(SHORT)
    user.ask("What is shown?")
    user.see_notes("tokens/s", count=2)
    asked = ("What is shown?", files / "one.png")
    assert user.turns("bot") == [answer_of(checkpoints / name, asked) for name in ("sparse", "dense")]
    assert user.turns("user") == ["What is shown?"] * 2
    user.page.locator("svg.mv-patches").wait_for()  # of the sparse one alone
    assert user.page.locator("svg.mv-patches").count() == 1
    user.context.close()


# ---------------------------------------------------------------------------------------------------------------------
# Without a browser
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(checkpoints):
    return [ServedModel("sparse", load_pretrained_model(str(checkpoints / "sparse"), device="cpu"))]


def ask(session, question, paths=(), tokens=4):
    session.pose(question, list(map(str, paths)))
    list(session.answers(tokens, 0.0, with_routing=True))
    return session.conversations[0]


def test_a_picture_goes_with_the_question_it_is_first_there_for(models, files):
    session = Session(models)
    one, two = files / "one.png", files / "two.png"
    ask(session, "First?", [one])
    ask(session, "Second?", [one, two])
    conversation = ask(session, "Third?", [one, two])
    assert [[name for name, _ in turn.pictures] for turn in conversation.turns[::2]] == [["one.png"], ["two.png"], []]
    assert sum(conversation.trace.is_image) == 2 * conversation.trace.tokens_per_image

    conversation = ask(session, "Fourth?", [two])  # the first one was taken away: a new conversation
    assert [turn.text for turn in conversation.turns if turn.role == "user"] == ["Fourth?"]
    assert len(conversation.chat.history) == 2


def test_a_question_that_cannot_be_answered_leaves_the_conversation_as_it_was(models, files):
    session = Session(models)
    ask(session, "Short?")
    conversation = ask(session, "word " * 3000, [files / "one.png"])
    assert conversation.failed
    assert conversation.note.startswith("ValueError: The conversation is ")
    assert len(conversation.chat.history) == 2
    conversation = ask(session, "Short again?", [files / "one.png"])
    assert not conversation.failed
    assert sum(conversation.trace.is_image) == conversation.trace.tokens_per_image  # the picture is still to be seen
    assert "4 out" in conversation.note
    assert len(conversation.chat.history) == 4


def test_one_question_at_a_time(models):
    session = Session(models)
    session.pose("First?", [])
    with pytest.raises(ValueError, match="still being answered. Wait for it, or stop it"):
        session.pose("Second?", [])
    session.stop()
    list(session.answers(4, 0.0, with_routing=False))
    assert session.conversations[0].note == "Stopped before it answered."
    assert ask(session, "Third?").chat.stats.new_tokens == 4


def test_a_bad_picture_is_told_by_the_name_that_its_user_knows(files):
    with pytest.raises(ValueError, match=r"^The picture \('notes\.png'\) cannot be decoded") as error:
        open_picture(str(files / "notes.png"))
    assert str(files) not in str(error.value)


def test_tokens_without_a_place_in_the_picture_are_shown_below_it():
    experts = torch.tensor([[1], [0], [1], [0], [1], [0]])
    layer = LayerRouting(2, experts, torch.ones(6, 1), [0.5, 0.5])
    tokens = ["<image>"] * 5 + ["<b>"]
    trace = RoutingTrace(tokens, [True] * 5 + [False], [torch.rand(8, 8, 3).numpy()], [layer], 2, 5)
    shown = routing_html(trace, 2)
    assert "mv-queries" in shown
    assert shown.count("<rect") == 5
    assert "token 2: expert 0 (1.00)" in shown
    assert "&lt;b&gt;" in shown
    assert routing_html(trace, 0) == '<p class="mv-hint">Layer 0 of this model has no experts.</p>'
    layer.load[:] = [0.99, 0.01]
    trace.__post_init__()
    assert "collapsed" in routing_html(trace, 2)


def test_what_cannot_be_served(parts, checkpoints):
    from moellava.web import build_page, launch

    with pytest.raises(ValueError, match="No checkpoint is given; expected one, or several"):
        build_page([])
    with pytest.raises(ValueError, match="type 'llama', not a checkpoint of this package"):
        build_page([str(checkpoints / "dense"), str(parts.language_model("llama"))])
    with taken_port() as port:
        with pytest.raises(OSError, match=rf"Port {port} of 127.0.0.1 cannot be listened on .* or 0 for any"):
            launch(["no-such-checkpoint"], port=port)


def test_without_gradio_the_extra_is_named():
    code = """
import sys
sys.modules["gradio"] = None
import moellava.web
try:
    moellava.web.launch
except ImportError as error:
    print(error)
"""
    assert run_python(code, block_moellava=False).strip() == "The page needs gradio: pip install 'moellava[web]'."

# SPDX-License-Identifier: Apache-2.0
"""`moellava chat`: typed into a terminal, and read from a pipe."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest
from commands import SCRIPT, fails, run, run_process

from moellava import load_pretrained_model
from moellava.chatting import Chat


@pytest.fixture(scope="module")
def answers(checkpoint):
    """A function: the answers to questions, each with its pictures, by `Chat`."""
    loaded = load_pretrained_model(str(checkpoint), device="cpu")

    def answer(*questions, max_new_tokens):
        chat, told = Chat(loaded, max_new_tokens=max_new_tokens), []
        for question, *pictures in questions:
            list(chat.ask(question, pictures))
            told.append(chat.answer)
        return told

    return answer


def test_a_conversation_from_a_pipe(checkpoint, scans, answers):
    first, second = scans / "first.png", scans / "second.png"
    lines = [
        "What is shown?",
        "",
        f"/picture '{second}'",
        "What has changed?",
        "/reset",
        "What is shown?",
        "/quit",
        "No",
    ]
    done = run_process("chat", checkpoint, "-p", first, "--max-new-tokens", 6, "--json", stdin="\n".join(lines))
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    expected = answers(("What is shown?", first), ("What has changed?", second), max_new_tokens=6)
    expected += answers(("What is shown?",), max_new_tokens=6)
    assert [answer["answer"] for answer in told] == expected
    assert [answer["pictures"] for answer in told] == [[str(first)], [str(second)], []]
    assert [answer["question"] for answer in told] == ["What is shown?", "What has changed?", "What is shown?"]
    assert [answer["new_tokens"] for answer in told] == [6, 6, 6]
    assert told[1]["prompt_tokens"] > told[0]["prompt_tokens"] + 6


def test_answers_are_text_without_json(checkpoint, scans, answers):
    result = run("chat", checkpoint, "--max-new-tokens", 5, stdin=f"/picture {scans / 'first.png'}\nWhat?\n/help\n")
    assert result.exit_code == 0, result.stderr
    (expected,) = answers(("What?", scans / "first.png"), max_new_tokens=5)
    assert result.stdout.strip() == expected
    assert "cut off after 5 tokens" in result.stderr
    assert "/picture FILE" in result.stderr


def test_verbose_tells_tokens_and_time(checkpoint):
    result = run("chat", checkpoint, "--max-new-tokens", 3, "--verbose", stdin="What?\n")
    assert result.exit_code == 0, result.stderr
    assert re.search(r"^\d+ \+ 3 tokens, \d+\.\d s$", result.stderr, re.MULTILINE)


def test_ctrl_c_ends_a_conversation_from_a_pipe(checkpoint):
    process = subprocess.Popen(
        [SCRIPT, "chat", checkpoint, "--max-new-tokens", "1500"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    process.stdin.write("What?\nAnd then?\n")
    process.stdin.flush()
    assert process.stdout.read(1)  # the answer has begun
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == 130
    assert "Traceback" not in stderr and "(stopped)" not in stderr


def test_temperature(checkpoint):
    lines = "What?\n" + "/reset\nWhat?\n" * 3
    result = run("chat", checkpoint, "--max-new-tokens", 8, "--temperature", 3, "--json", stdin=lines)
    assert len({json.loads(line)["answer"] for line in result.stdout.splitlines()}) > 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/pictures scan.png", "Unknown command /pictures. Expected /picture FILE, /reset, /help or /quit."),
        ("/picture", "/picture needs a file"),
        ("/picture absent.png", "There is no picture absent.png"),
        ("why? " * 3000, "but the language model takes 2048"),
    ],
)
def test_what_is_wrong_with_a_line_of_a_pipe_ends_it(checkpoint, line, message):
    assert message in fails("chat", checkpoint, stdin=f"{line}\nWhat?\n")


def test_a_picture_that_is_none_is_found_before_the_model_is_loaded(scans):
    assert "cannot be decoded" in fails("chat", "absent", "--picture", scans / "notes.png")


class Terminal:
    """The command line in a terminal of its own."""

    def __init__(self, *arguments, stdout=None):
        self.ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [SCRIPT, *map(str, arguments)],
            stdin=theirs,
            stdout=theirs if stdout is None else stdout,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self.shown = ""

    def until(self, text):
        """Reads until a text is shown; returns what was shown before it."""
        deadline = time.monotonic() + 1200
        while text not in self.shown:
            assert time.monotonic() < deadline, self.shown
            self.shown += os.read(self.ours, 4096).decode(errors="replace").replace("\r\n", "\n")
        before, _, self.shown = self.shown.partition(text)
        return before

    def type(self, text):
        os.write(self.ours, text.encode())


@pytest.mark.skipif(sys.platform == "win32", reason="terminals are made otherwise there")
def test_a_conversation_in_a_terminal(checkpoint, scans, answers):
    terminal = Terminal("chat", checkpoint, "--max-new-tokens", 1500)
    try:
        assert "Ctrl-D ends" in terminal.until("\n> ")
        terminal.type("/picture absent.png\n")
        assert "Error: There is no picture absent.png." in terminal.until("\n> ")
        terminal.type(f"/picture {scans / 'first.png'}\n")
        terminal.until("\n> ")
        terminal.type("What is shown?\n")
        (answer,) = answers(("What is shown?", scans / "first.png"), max_new_tokens=12)
        terminal.until(answer.split()[0])
        os.kill(terminal.process.pid, signal.SIGINT)  # stops the answer, and not the conversation
        terminal.until("(stopped)")
        terminal.until("> ")
        terminal.type("/help\n")
        assert "Ctrl-C stops an answer" in terminal.until("\n> ")
        terminal.type("\x04")  # Ctrl-D
        assert terminal.process.wait(timeout=600) == 0
    finally:
        terminal.process.kill()
        os.close(terminal.ours)


@pytest.mark.skipif(sys.platform == "win32", reason="terminals are made otherwise there")
def test_answers_that_go_to_a_file_are_typed_for_in_a_terminal(checkpoint, answers, tmp_path):
    with (tmp_path / "answers.txt").open("w", encoding="utf-8") as file:
        terminal = Terminal("chat", checkpoint, "--max-new-tokens", 6, stdout=file)
    try:
        terminal.until("\n> ")
        terminal.type("What is shown?\n")
        terminal.until("\n> ")
        terminal.type("/quit\n")
        assert terminal.process.wait(timeout=600) == 0
    finally:
        terminal.process.kill()
        os.close(terminal.ours)
    (expected,) = answers(("What is shown?",), max_new_tokens=6)
    assert (tmp_path / "answers.txt").read_text(encoding="utf-8").strip() == expected

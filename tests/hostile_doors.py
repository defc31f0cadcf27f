# SPDX-License-Identifier: Apache-2.0
"""Opens hostile files through every door that a user has, each in a process of its own, and tells what it did.

Run as `python hostile_doors.py SETTINGS`: a JSON file with `scratch`, `guarded`, `blocks_moellava` and `warm_up`. It
reads lists of jobs, one a line, each job `{"name", "door", "path", "also", ...}`: the folder that is opened, and what
else may be. It answers a list with a line: for each job, by its name, what was raised and what was seen. An audit hook
sees files that Python opens outside of these and of its own folders, sockets, processes, and code that ran from
elsewhere. Libraries in C and Rust open files that it does not see; of those in `guarded` folders the system tells. The
libraries are imported once; each job runs in a fork, under a limit of memory and of time.
"""

import contextlib
import ctypes
import gc
import importlib
import io
import json
import os
import resource
import signal
import struct
import sys
import sysconfig
import tempfile
import time
import traceback
from pathlib import Path


MEMORY = 3 * 2**30  # beyond what the process has after its imports
SECONDS = 30
# What a fork would import otherwise, each anew: what transformers needs for adapters, and what commands do.
IMPORTED_LATE = (
    "peft", "typer.testing", "moellava.cli.app", "moellava.chatting", "moellava.hub", "moellava.hub_cards.writing",
    "moellava.training.recipe",
)  # fmt: skip


class Watch:
    """What a process does beside computing, from the moment it is installed."""

    # Where Python, its packages and this package lie; and what the system offers to every process.
    own = [*(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")), *sys.path[1:]]
    system = ["/proc", "/sys", "/dev", "/usr/lib", "/lib", "/usr/share/zoneinfo"]

    def __init__(self, allowed: list[str]):
        package = Path(__file__).resolve().parent.parent
        self.code = [
            os.path.realpath(folder) for folder in (*filter(None, self.own), sys.prefix, sys.base_prefix, package)
        ]
        self.allowed = [*map(os.path.realpath, allowed), *self.code, *self.system]
        self.opened, self.denied, self.ran = [], [], []
        self.is_on = True

    def __call__(self, event: str, arguments: tuple) -> None:
        if not self.is_on:
            return
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if not _is_below(path, self.allowed):
                self.opened.append(path)
        elif event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
            self.denied.append(f"{event} {arguments[-1] if event == 'socket.connect' else arguments[0]}")
            raise PermissionError(f"{event} is denied")
        elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"):
            self.denied.append(f"{event} {arguments[0]}")
            raise PermissionError(f"{event} is denied")
        elif event == "exec":
            name = getattr(arguments[0], "co_filename", "")
            if os.path.isabs(name) and not _is_below(os.path.realpath(name), self.code):
                self.ran.append(name)


class Guard:
    """The files of some folders that are opened, by Linux's own account."""

    IN_OPEN, IS_FOLDER = 0x20, 0x40000000

    def __init__(self, folders: list[str]):
        system = ctypes.CDLL(None, use_errno=True)
        self.events = system.inotify_init1(os.O_NONBLOCK)
        self.folders = {
            system.inotify_add_watch(self.events, os.fsencode(path), self.IN_OPEN): path for path in folders
        }
        if self.events < 0 or min(self.folders, default=0) < 0:
            raise OSError(ctypes.get_errno(), "the folders cannot be watched")

    def opened(self) -> list[str]:
        """Returns the paths that were opened since the last call."""
        try:
            events = os.read(self.events, 2**16)
        except BlockingIOError:
            return []
        paths = []
        while events:
            # struct inotify_event: the folder, what, a number, and the length of the name that follows.
            folder, what, _, length = struct.unpack_from("iIII", events)
            if not what & self.IS_FOLDER:  # which anything on this machine may list
                paths.append(os.path.join(self.folders[folder], events[16 : 16 + length].rstrip(b"\0").decode()))
            events = events[16 + length :]
        return paths


def _is_below(path: str, folders: list[str]) -> bool:
    return any(path == folder or path.startswith(f"{folder.rstrip('/')}/") for folder in folders)


def _checkpoint_doors() -> dict:
    """What a user of the package calls, by name."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

    for name in IMPORTED_LATE:
        importlib.import_module(name)
    import moellava
    from moellava.evaluating.questions import read_questions
    from moellava.reading.provenance import license_of
    from moellava.reading.sources import Source

    return {
        "load_pretrained_model": lambda path, **more: moellava.load_pretrained_model(path, device="cpu", **more),
        "MoellavaConfig": lambda path: moellava.MoellavaConfig.from_pretrained(path),
        "MoellavaForCausalLM": lambda path: moellava.MoellavaForCausalLM.from_pretrained(path),
        "MoellavaProcessor": lambda path: moellava.MoellavaProcessor.from_pretrained(path),
        "AutoConfig": lambda path: AutoConfig.from_pretrained(path, trust_remote_code=False),
        "AutoModelForCausalLM": lambda path: AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False),
        "AutoModelForImageTextToText": lambda path: AutoModelForImageTextToText.from_pretrained(
            path, trust_remote_code=False
        ),
        "AutoProcessor": lambda path: AutoProcessor.from_pretrained(path, trust_remote_code=False),
        "inspect_checkpoint": lambda path: moellava.inspect_checkpoint(path),
        "convert": lambda path, **more: moellava.convert(path, "converted", **more),
        "upcycle": lambda path, **more: moellava.upcycle(path, 2, 1, **more),
        "read_questions": lambda path: read_questions(path),
        "licence": lambda path: license_of(Source(path)),
        "prepare_picture": _prepare_picture,
        "chat_template": _apply_template,
        "open_data": _open_rows,
        "checkpoint_files": _files_to_push,
        "moellava": _command,
    }


def _bare_doors() -> dict:
    """What there is where the package is not installed."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, pipeline

    return {
        "AutoConfig": lambda path: AutoConfig.from_pretrained(path, trust_remote_code=False),
        "AutoModelForImageTextToText": lambda path: AutoModelForImageTextToText.from_pretrained(
            path, trust_remote_code=False
        ),
        "AutoProcessor": lambda path: AutoProcessor.from_pretrained(path, trust_remote_code=False),
        "pipeline": lambda path: pipeline("image-text-to-text", model=path, trust_remote_code=False),
    }


def _prepare_picture(path: str, picture: str, aspect: str = "pad"):
    from moellava import MoellavaProcessor

    processor = MoellavaProcessor.from_pretrained(path)
    return processor(images=picture, text="<image>", image_aspect_ratio=aspect, return_tensors="pt")[
        "pixel_values"
    ].shape


def _apply_template(path: str):
    from moellava import MoellavaProcessor

    processor = MoellavaProcessor.from_pretrained(path)
    return processor.apply_chat_template([{"role": "user", "content": [{"type": "text", "text": "Hello"}]}])


def _open_rows(path: str):
    from moellava.training.rows import open_data, open_picture

    rows = open_data(path)
    return [open_picture(picture).size for row in rows for picture in row.pictures]


def _files_to_push(path: str, folder: str | None = None):
    from moellava.hub.pushing import checkpoint_files
    from moellava.reading.sources import Source

    return checkpoint_files(Source(folder or path))


def _command(path: str, arguments: list[str]):
    """The command line; its sentence on standard error is the error's text, and a traceback is an error of its own."""
    from typer.testing import CliRunner

    from moellava.cli import app

    done = CliRunner().invoke(app, [argument.replace("PATH", path) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    if done.exit_code:
        raise CommandFailed(f"exit {done.exit_code}: {done.stderr}")
    return done.stdout


class CommandFailed(Exception):
    """A command ended in a sentence on standard error, as it should."""


def _run(job: dict, door, given: dict) -> dict:
    """Runs one job in this process, which is its own."""
    page = os.sysconf("SC_PAGE_SIZE")
    held = int(Path("/proc/self/statm").read_text().split()[0]) * page
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
    signal.alarm(SECONDS)
    arguments = {name: value for name, value in job.items() if name not in ("name", "door", "also")}
    os.chdir(tempfile.mkdtemp(dir=given["scratch"]))
    watch = Watch([job["path"], os.getcwd(), os.environ["HF_HOME"], *job.get("also", [])])
    guard = Guard([folder for folder in given["guarded"] if not _is_below(folder, watch.allowed)])
    modules = set(sys.modules)
    sys.addaudithook(watch)
    outcome = {"error": None, "text": None, "value": None, "trace": None, "said": ""}
    said, began = io.StringIO(), time.monotonic()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            outcome["value"] = repr(door(**arguments))[:2000]
        except BaseException as error:  # whatever it is, it is what the test wants to know
            watch.is_on = False
            outcome["error"], outcome["text"] = type(error).__name__, str(error)[:4000]
            outcome["kinds"] = [cls.__name__ for cls in type(error).__mro__]
            outcome["trace"] = "".join(traceback.format_exception(error)[-12:])[-3000:]
    watch.is_on = False
    outcome["secs"] = round(time.monotonic() - began, 2)
    outcome["said"] = said.getvalue()[-2000:]
    outcome["grew"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024  # MiB
    new = {name: getattr(sys.modules[name], "__file__", None) for name in set(sys.modules) - modules}
    foreign = [name for name, file in new.items() if file and not _is_below(os.path.realpath(file), watch.code)]
    opened = watch.opened + guard.opened()
    return outcome | {"opened": opened, "denied": watch.denied, "ran": watch.ran, "imported": foreign}


def _run_apart(job: dict, door, given: dict) -> dict:
    """Runs one job in a fork; the answer comes through a pipe."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        with os.fdopen(write_end, "w") as answer:
            json.dump(_run(job, door, given), answer)
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as answer:
        text = answer.read()
    _, status = os.waitpid(child, 0)
    return json.loads(text) if text else {"error": "Died", "text": f"the process ended with status {status}"}


def main(settings_file: str) -> None:
    given = json.loads(Path(settings_file).read_text())
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    if given["blocks_moellava"]:
        sys.modules["moellava"] = None
    doors = _bare_doors() if given["blocks_moellava"] else _checkpoint_doors()
    for door in doors if given["blocks_moellava"] else ("load_pretrained_model", "inspect_checkpoint"):
        with contextlib.suppress(Exception):  # for what only loading imports
            doors[door](given["warm_up"])
    gc.collect()
    gc.freeze()  # what is there by now is not looked through by the forks, which would copy its pages
    for line in sys.stdin:
        results = {job["name"]: _run_apart(job, doors[job["door"]], given) for job in json.loads(line)}
        print(json.dumps(results), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

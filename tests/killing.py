# SPDX-License-Identifier: Apache-2.0
"""Saves that are killed: a process that forks one child after another, each of which saves and is killed meanwhile.

Everything is imported once; a child costs what its save costs. Run by `test_faults.py`, which says what is saved.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path


# What a child does, given the number of a variant.
Save = Callable[[int], object]
# File name to hash: what the world sees.
State = dict[str, str]


def files_of(folder: Path) -> State:
    """Every file below a folder, with the hash of what it holds."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def in_child(task: Callable[[], object], kill_after: float | None = None) -> bool:
    """Runs a task in a child process, which is killed after so many seconds; returns whether it came to its end.

    Raises:
        RuntimeError: The task raised an error, which is on stderr.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            task()
            status = 0
        finally:
            if status:
                sys.excepthook(*sys.exc_info())
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return False
    if status:
        raise RuntimeError("the child failed by itself")
    return True


def kill(save: Save, state: Callable[[], State], kills: int, seed: int) -> Counter:
    """Kills so many saves of two variants at random moments; returns how often which one was there afterwards, and how
    many more saves had ended before they were to be killed.

    Raises:
        RuntimeError: There was something that is neither.
    """
    whole, seconds = [], []
    in_child(lambda: save(1))  # the first one imports what the others find
    for variant in (0, 1):
        start = time.monotonic()
        in_child(lambda variant=variant: save(variant))
        seconds.append(time.monotonic() - start)
        whole.append(state())
    if whole[0] == whole[1]:
        raise RuntimeError("the two variants are the same")
    counts, random_number, now = Counter(), random.Random(seed), 1
    while counts["earlier"] + counts["new"] < kills:
        new = 1 - now
        ended = in_child(lambda new=new: save(new), kill_after=random_number.uniform(0, seconds[new]))
        found = state()
        if found not in whole:
            wrong = [{name for name in found.keys() | one.keys() if found.get(name) != one.get(name)} for one in whole]
            raise RuntimeError(f"neither of the two; other than in the first: {wrong[0]}, the second: {wrong[1]}")
        now = whole.index(found)
        if ended:
            counts["ended before"] += 1
            seconds[new] *= 0.9  # it is faster than when it was timed
        else:
            counts["new" if now == new else "earlier"] += 1
    in_child(lambda: save(0))
    if state() != whole[0]:
        raise RuntimeError("a save after all kills did not get through")
    return counts


def saves_of(model, place: str, how: str = "save_pretrained") -> Save:
    """Saves of a model: as it is and in one file, or with other weights, another setting and in shards."""
    import torch

    def save(variant: int):
        if variant:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(1)
            model.config.image_aspect_ratio = model.processor.image_aspect_ratio = "square"
        getattr(model, how)(place, max_shard_size="200KB" if variant else "1GB")

    return save


def saves_with_the_package(sources: list[str], folder: str) -> Save:
    from moellava import load_pretrained_model

    return saves_of(load_pretrained_model(sources[0], device="cpu").model, folder)


def saves_of_remote_code(sources: list[str], folder: str) -> Save:
    from transformers import AutoModelForCausalLM, AutoProcessor

    model = AutoModelForCausalLM.from_pretrained(sources[0], trust_remote_code=True)
    model.processor = AutoProcessor.from_pretrained(sources[0], trust_remote_code=True)
    return saves_of(model, folder)


def saves_of_a_processor(sources: list[str], folder: str) -> Save:
    from transformers import AutoProcessor

    import moellava  # noqa: F401  registers the class

    shutil.copytree(sources[0], folder, dirs_exist_ok=True)
    processor = AutoProcessor.from_pretrained(folder)

    def save(variant: int):
        processor.image_aspect_ratio = ("pad", "square")[variant]
        processor.save_pretrained(folder)

    return save


def conversions(sources: list[str], folder: str) -> Save:
    from moellava import convert

    return lambda variant: convert(sources[variant], folder, overwrite=True)


def pushes(sources: list[str], repository: str) -> Save:
    from moellava import push

    return lambda variant: push(sources[variant], repository)


def pushes_of_a_model(sources: list[str], repository: str) -> Save:
    from moellava import load_pretrained_model

    return saves_of(load_pretrained_model(sources[0], device="cpu").model, repository, "push_to_hub")


KINDS = {
    "save": saves_with_the_package,
    "remote code": saves_of_remote_code,
    "processor": saves_of_a_processor,
    "convert": conversions,
    "push": pushes,
    "push_to_hub": pushes_of_a_model,
}


def main(kind: str, sources: list[str], place: str, kills: int, seed: int = 0) -> None:
    """Prints the counts of one kind as JSON; `place` is a new folder, or a repository of a Hub that is made here."""
    # A child that is killed while it draws a progress bar takes tqdm's lock, which all share, into its grave.
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    state = _hub_state(place) if kind.startswith("push") else _folder_state(Path(place))
    from transformers.utils import logging  # late: the environment says where the Hub is

    logging.disable_progress_bar()
    print(json.dumps(kill(KINDS[kind](sources, place), state, kills, seed)))


def _folder_state(folder: Path) -> Callable[[], State]:
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("the user's own")
    return lambda: files_of(folder)


def _hub_state(repository: str) -> Callable[[], State]:
    from hub_server import HubServer

    server = HubServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ.update(server.environment(os.environ["HF_HOME"]))

    def state() -> State:
        time.sleep(0.05)  # for the server to end what a client that is dead by now has asked for
        return {name: blob.sha256 for name, blob in server.files(repository).items()}

    return state


_OLD = {"config.json": "old", "model.safetensors": "old", "code.py": "old", "notes.txt": "the user's own"}
_NEW = {"config.json": "new", "code.py": "new", "model.safetensors.index.json": "new"}
_NEW |= {f"model-0000{number}-of-00002.safetensors": "new" for number in (1, 2)}
_AFTER = {"notes.txt": _OLD["notes.txt"]} | _NEW


def kill_at_every_step(folder: Path, replace: Callable[[], object], end: Callable[[State], str]) -> None:
    """Kills the replacement of a checkpoint at its first rename or deletion, its second and so on; prints how often
    which one was left; `end` looks at what is neither, and says what that is."""
    import moellava.saving.staging  # noqa: F401  once; the first import renames files of its own

    counts: Counter = Counter()

    def replace_until(last: int) -> None:
        seen = 0

        def watch(event: str, arguments: tuple) -> None:
            nonlocal seen
            if event in ("os.rename", "os.remove"):
                seen += 1
                if seen == last:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        replace()

    ended, last = False, 0
    while not ended:
        last += 1
        shutil.rmtree(folder.parent, ignore_errors=True)
        folder.mkdir(parents=True)
        for name, text in _OLD.items():
            (folder / name).write_text(text)
        ended = in_child(lambda last=last: replace_until(last))
        found = _texts(folder)
        counts["earlier" if found == _OLD else "new" if found == _AFTER else end(found)] += 1
    print(json.dumps(counts))


def _texts(folder: Path) -> State:
    return {path.name: path.read_text() for path in folder.glob("*") if path.is_file()}


def _replace(folder: Path) -> None:
    from moellava.saving.staging import staged_folder

    with staged_folder(folder) as staging:
        for name, text in _NEW.items():
            (staging / name).write_text(text)


def kill_where_files_are_replaced(place: str) -> None:
    """Kills saves to the folder that the process stands in."""
    folder = Path(place)

    def replace() -> None:
        os.chdir(folder)
        _replace(folder)

    def end(found: State) -> str:
        if "config.json" in found:
            raise RuntimeError(f"a mixture that a reader takes for a checkpoint: {found}")
        staging = next(folder.glob(".*.saving"))
        if set(_NEW) == {path.name for path in staging.iterdir()}:
            (folder / "model.safetensors").unlink(missing_ok=True)
        for path in staging.iterdir():
            path.rename(folder / path.name)
        if _texts(folder) != _AFTER:
            raise RuntimeError(f"cannot be completed: {_texts(folder)}")
        return "to be completed"

    kill_at_every_step(folder, replace, end)


def kill_between_two_renames(place: str) -> None:
    """Kills saves where a system cannot exchange two folders in one step."""
    folder = Path(place)
    sys.platform = "one without renameat2"

    def end(found: State) -> str:
        if found:
            raise RuntimeError(f"a mixture: {found}")
        in_child(lambda: _replace(folder))
        if _texts(folder) != _AFTER:
            raise RuntimeError(f"the next save has not got through: {_texts(folder)}")
        return "put away"

    kill_at_every_step(folder, lambda: _replace(folder), end)


def race(sources: list[str], place: str, rounds: int) -> None:
    """Lets two processes save two variants to one folder at once; prints how often which one was there in the end."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    state, save = _folder_state(Path(place)), saves_with_the_package(sources, place)
    whole = []
    for variant in (0, 1):
        in_child(lambda variant=variant: save(variant))
        whole.append(state())
    counts: Counter = Counter()
    for _ in range(rounds):
        children = []
        for variant in (0, 1):
            child = os.fork()
            if child == 0:
                in_child(lambda variant=variant: save(variant))
                os._exit(0)
            children.append(child)
        for child in children:
            if os.waitpid(child, 0)[1]:
                raise RuntimeError("a save failed")
        counts[str(whole.index(state()))] += 1
    left = sorted(path.name for path in Path(place).parent.iterdir())
    print(json.dumps({"counts": counts, "left": left}))

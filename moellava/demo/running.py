# SPDX-License-Identifier: Apache-2.0
"""The whole way in a minute or two: from small parts to answers about scans of handwritten digits.

Run by `moellava demo`. Parts in their published formats, lessons and a recipe are written; `train` takes the model
through the recipe's three stages; a process without this package then loads the checkpoints of the last two and answers
questions about scans that no training has seen.
"""

import hashlib
import importlib.util
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer


HERE = Path(__file__).resolve().parent
SEED = 0
EPOCHS = 14  # rounds through the scans
MOE_EPOCHS = 8

# What the demo promises, and fails without.
LEAST_ACCURACY = 0.95
MOST_BLANK_ACCURACY = 0.20  # ten digits, so that guessing is right one time in ten
MOST_LOST_BY_MOE = 0.01


class Demo:
    """Where things are, and what the stages hand on."""

    def __init__(self, folder: Path, epochs: float):
        self.folder = folder
        self.epochs = epochs
        self.parts = folder / "parts"
        self.lessons = folder / "lessons"
        self.recipe = folder / "recipe.yaml"
        self.training = folder / "training"
        self.checkpoint = folder / "checkpoint"
        self.sparse_checkpoint = folder / "sparse-checkpoint"
        self.questions = folder / "questions.json"
        self.results = folder / "results.json"
        self.sparse_results = folder / "sparse-results.json"
        self.grid = folder / "answers.png"
        self.experts = folder / "experts.png"
        self.pictures = folder / "pictures"
        self.marker = folder / ".moellava-demo.json"
        self.made = (
            self.parts, self.lessons, self.recipe, self.training, self.checkpoint, self.sparse_checkpoint,
            self.questions, self.results, self.sparse_results, self.grid, self.experts, self.pictures,
        )  # fmt: skip
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, title: str) -> Iterator[None]:
        """Announces a stage, and says how long it took."""
        typer.echo(f"\n{_bold(f'{len(self.seconds) + 1}. {title}')}")
        began = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - began, 1)
        typer.echo(_dim(f"    {self.seconds[name]:.1f} s"))


def clear(demo: Demo) -> None:
    """Removes what an earlier run has made, and nothing else.

    Raises:
        FileExistsError: Something in the way is not, or not any more, what a demo has written. Nothing is removed.
    """
    demo.folder.mkdir(parents=True, exist_ok=True)
    written = _written(demo)
    present = [path for path in demo.made if os.path.lexists(path)]
    # What no demo has recorded is not even read: it may be all the pictures of a home folder.
    foreign = [path.name for path in present if path.name not in written or written[path.name] != _digest(path)]
    if foreign:
        raise FileExistsError(
            f"{demo.folder} has {', '.join(foreign)}, which the demo would replace. It has not written this, or it has "
            "been changed since. Nothing was deleted. Give another folder, or move it away."
        )
    for path in present:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    demo.marker.unlink(missing_ok=True)


def mark(demo: Demo) -> None:
    """Writes down what the demo has made, by which the next run knows that it may be removed."""
    made = {path.name: _digest(path) for path in demo.made if os.path.lexists(path)}
    demo.marker.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


def _written(demo: Demo) -> dict[str, str]:
    try:
        written = json.loads(demo.marker.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return written if isinstance(written, dict) else {}


def _digest(path: Path) -> str:
    """Returns a digest of a file, or of a folder with all that is in it; links are not followed."""
    digest = hashlib.sha256()
    for held in sorted([path, *path.rglob("*")] if path.is_dir() and not path.is_symlink() else [path]):
        digest.update(os.fsencode(held.relative_to(path)) + b"\0")
        if held.is_symlink():
            digest.update(b"link\0")
        elif held.is_file():
            with open(held, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        elif not held.is_dir():
            digest.update(b"neither\0")
    return digest.hexdigest()


def make_parts(demo: Demo) -> None:
    """Writes a vision tower and a language model, untrained."""
    from .small_parts import make_language_model, make_vision_tower

    tower = make_vision_tower(demo.parts / "vision-tower")
    language_model, tokenizer = make_language_model(demo.parts / "language-model")
    _say("vision tower", f"{type(tower).__name__}, {_parameters(tower)}")
    _say("language model", f"{type(language_model).__name__}, {_parameters(language_model)}")
    _say("tokenizer", f"{type(tokenizer).__name__}, {len(tokenizer)} tokens, trained on the demo's sentences")


def teach(demo: Demo) -> None:
    """Trains by the recipe, and keeps what its last two stages have made; the recipe can then be typed again."""
    from ..training import train

    report = train(demo.recipe)
    for stage, checkpoint in zip(report.stages[1:], (demo.checkpoint, demo.sparse_checkpoint), strict=True):
        Path(stage.checkpoint).rename(checkpoint)
    shutil.rmtree(demo.training)
    for stage in report.stages:
        parts = ", ".join(part for part, counts in stage.trained.items() if counts["trained"])
        loss = stage.log[-1]["train_loss"]
        _say(stage.stage, f"{stage.steps} steps in {stage.seconds:.0f} s, loss {loss:.3f}: {parts}")


def write_questions(demo: Demo, examples: list) -> None:
    """Writes the held-out pictures, and what is asked about them."""
    from .scans import blank_picture, draw

    pictures = demo.pictures
    pictures.mkdir()
    blank_picture().save(pictures / "blank.png")
    items = []
    for example in examples:
        name = f"{example.word}-{example.number:04}.png"
        draw(example.scan).save(pictures / name)
        items.append({"picture": f"pictures/{name}", "question": example.question, "answer": example.answer})
    asked = {"blank": "pictures/blank.png", "questions": items}
    demo.questions.write_text(json.dumps(asked, indent=1) + "\n", encoding="utf-8")


def answer_elsewhere(checkpoint: Path, questions: Path, results: Path) -> dict:
    """Lets a process without this package answer from a checkpoint, and returns the results that it has written."""
    with tempfile.TemporaryDirectory(prefix="moellava-demo-") as elsewhere:
        environment = {
            **os.environ,
            "HF_MODULES_CACHE": os.path.join(elsewhere, "modules"),  # no code but the checkpoint's
            "PYTHONSAFEPATH": "1",  # nor any that lies beside the script
        }
        command = [sys.executable, HERE / "answer.py", checkpoint, questions, results]
        subprocess.run(command, cwd=elsewhere, env=environment, check=True)
    return json.loads(results.read_text(encoding="utf-8"))


def say_results(results: dict) -> None:
    answers = results["answers"]
    right = sum(item["answer"] == item["truth"] for item in answers)
    _say("held-out pictures", _bold(f"{results['accuracy']:.1%} right") + f" ({right} of {len(answers)})")
    _say("a blank picture instead", f"{results['blank_accuracy']:.1%} right (guessing: 10%)")


def say_load(load) -> None:
    """Says how even the load of each layer is, and which digit most differs from the others in where it goes."""
    from .specialisation import ROWS

    for row, layer in enumerate(load.layers):
        shares = ", ".join(f"{share:.0%}" for share in load.overall[row].tolist())
        gain = load.by_row[row] - load.overall[row]
        digit, expert = divmod(int(gain.argmax()), gain.shape[1])
        _say(
            f"layer {layer}",
            f"load {shares}; expert {expert} gets {load.by_row[row, digit, expert]:.0%} of {ROWS[digit]}, "
            f"{load.overall[row, expert]:.0%} of all",
        )
    if load.collapsed:
        _say("collapsed", f"in layers {load.collapsed} the same experts take everything")


def run(demo: Demo) -> bool:
    """Runs all stages; returns whether the model keeps what the demo promises."""
    began = time.perf_counter()
    clear(demo)
    typer.echo(_bold("MoELLaVA: a model from small parts learns to read handwritten digits"))
    typer.echo("    Everything here starts from random weights, offline, on the CPU.")
    try:
        return _run_stages(demo, began)
    finally:
        mark(demo)


def _run_stages(demo: Demo, began: float) -> bool:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # what it lacks, it lacks for 4-bit models alone
    import torch  # late, as all that is slow to import: the title comes first
    import transformers

    from ..loading import load_pretrained_model
    from .lessons import DRAWINGS, write_lessons, write_recipe
    from .picture_grid import draw_grid
    from .scans import PHRASINGS, load_examples
    from .specialisation import draw_expert_load, expert_load

    transformers.logging.set_verbosity_error()
    transformers.set_seed(SEED)
    typer.echo(f"    torch {torch.__version__}, transformers {transformers.__version__}")

    with demo.stage("parts", "Parts in their published formats"):
        make_parts(demo)
    with demo.stage("lessons", "Lessons in LLaVA's format, and a recipe"):
        examples, held_out = load_examples()
        _say("scans", f"{len(examples)} to learn from, {len(held_out)} held out, {len(PHRASINGS)} ways to ask")
        drawings = min(DRAWINGS, math.ceil(demo.epochs))
        lessons = write_lessons(examples, demo.lessons, drawings, SEED)
        _say("lessons", _shown(lessons))
        epochs = (demo.epochs / drawings, min(demo.epochs, MOE_EPOCHS) / drawings)
        _say("recipe", _shown(write_recipe(demo.recipe, demo.parts, lessons, demo.training, *epochs, SEED)))
        write_questions(demo, held_out)
    with demo.stage("training", f"Trained in three stages: {_command()} train {_shown(demo.recipe)}"):
        teach(demo)
    with demo.stage("answering", "Asked in a new process, without moellava"):
        results = answer_elsewhere(demo.checkpoint, demo.questions, demo.results)
        say_results(results)
    with demo.stage("drawing", "Drawn"):
        draw_grid(results, demo.folder, demo.grid)
        _say("answers", _shown(demo.grid))
    with demo.stage("sparse_answering", "The sparse model asked in a new process, without moellava"):
        sparse_results = answer_elsewhere(demo.sparse_checkpoint, demo.questions, demo.sparse_results)
        say_results(sparse_results)
    with demo.stage("experts", "What its experts have come to do"):
        load = expert_load(load_pretrained_model(demo.sparse_checkpoint, device="cpu").model, held_out)
        draw_expert_load(load, demo.experts)
        say_load(load)
        _say("experts", _shown(demo.experts))

    results["sparse"] = {
        **{name: sparse_results[name] for name in ("accuracy", "blank_accuracy")},
        "load": load.overall.tolist(),
        "load_by_row": load.by_row.tolist(),
        "specialisation": load.specialisation.tolist(),
        "collapsed_layers": load.collapsed,
    }
    results = {**results, "seconds": {**demo.seconds, "all": round(time.perf_counter() - began, 1)}}
    demo.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    answers = results["answers"]
    typer.echo(f"\n{_bold('Done')} in {results['seconds']['all']:.0f} s. Ask it yourself:")
    typer.echo(
        f"    {_command()} ask {_shown(demo.checkpoint)} {_shown(demo.folder / answers[0]['picture'])} "
        f'"{answers[0]["question"]}"'
    )
    return keeps_promises(results)


def keeps_promises(results: dict) -> bool:
    """Says what was promised and is not so; returns whether all is."""
    faults = []
    sparse = results["sparse"]
    for kind, found in (("the model", results), ("the sparse model", sparse)):
        if found["accuracy"] < LEAST_ACCURACY:
            faults.append(f"{kind}: {found['accuracy']:.1%} right; expected at least {LEAST_ACCURACY:.0%}.")
        if found["blank_accuracy"] > MOST_BLANK_ACCURACY:
            faults.append(
                f"{kind}: {found['blank_accuracy']:.1%} right without a picture; expected about 10%, and at most "
                f"{MOST_BLANK_ACCURACY:.0%}."
            )
    if sparse["accuracy"] < results["accuracy"] - MOST_LOST_BY_MOE:
        faults.append(
            f"the sparse model: {sparse['accuracy']:.1%} right, of the dense one's {results['accuracy']:.1%}; expected "
            f"at most {MOST_LOST_BY_MOE:.0%} less."
        )
    if sparse["collapsed_layers"]:
        faults.append(
            f"the sparse model has collapsed: in its layers {sparse['collapsed_layers']} the same experts take every "
            "token; expected all of them to be used."
        )
    for fault in faults:
        typer.echo(f"\nFAILED: {fault}", err=True)
    return not faults


def _say(name: str, text: str) -> None:
    typer.echo(f"    {name:<25} {text}")


def _bold(text: str) -> str:
    return f"\033[1m{text}\033[0m" if sys.stdout.isatty() else text


def _dim(text: str) -> str:
    return f"\033[2m{text}\033[0m" if sys.stdout.isatty() else text


def _parameters(model) -> str:
    return f"{model.num_parameters():,} parameters"


def _shown(path: Path) -> str:
    """A path as one would type it here."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def _command() -> str:
    """The command of this environment, by its path where the name alone would not find it."""
    command = Path(sys.executable).with_name("moellava")
    return "moellava" if shutil.which("moellava") == str(command) else _shown(command)


def run_demo(folder: str | os.PathLike, epochs: float = EPOCHS) -> bool:
    """Assembles, trains, saves and asks a small model, dense and sparse.

    Args:
        folder (`str` or `os.PathLike`): Where all that is made is written.
        epochs (`float`, *optional*, defaults to 14): Rounds of training.

    Returns:
        `bool`: Whether the models see as well as the demo promises.

    Raises:
        FileExistsError: The folder has something in the place of what the demo writes that no demo has written.
        ImportError: The extra `demo` is not installed.
    """
    for module in ("matplotlib", "sklearn"):
        if importlib.util.find_spec(module) is None:
            raise ImportError(f"The demo needs {module}, which is not installed: `pip install 'moellava[demo]'`.")
    # Read by the libraries when they are imported, which is later. One thread: the model is so small that more of them
    # mostly wait for one another, and the outcome is the same however many cores there are.
    os.environ.update(
        {
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
    )
    return run(Demo(Path(folder).resolve(), epochs))


__all__ = ["EPOCHS", "run_demo"]

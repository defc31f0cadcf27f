# SPDX-License-Identifier: Apache-2.0
"""Mutation testing: changes the code that routes, masks and maps names, one place at a time, and runs its tests.

The changes are cosmic-ray's, made in a copy of the package; the tests of a copy run in a process that is forked from
one that has torch and transformers loaded, since loading them takes longer than most of the tests. What no test has
noticed is printed as a diff, and written to build/mutation/NAME.txt.

Usage: python .ci/mutation.py [--limit 60] [NAME ...], after `make build/mutation-tools/.done`
"""

import argparse
import ast
import contextlib
import difflib
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "mutation"
# Where `make mutation` puts cosmic-ray: behind the environment's own packages, whose versions the tests need.
TOOLS = ROOT / "build" / "mutation-tools"
ROOMS = ("configuration", "modeling", "parts", "processing", "hub_cards")
# A test that a change has sent round for ever.
TIMEOUT = 180


class Target(NamedTuple):
    """What is changed, and the tests that should notice.

    Attributes:
        file: in the installed package.
        functions: whose bodies are changed, methods as `Class.method`; empty for the whole file.
        tests: arguments of pytest.
    """

    file: str
    functions: tuple[str, ...]
    tests: str


TARGETS = {
    "routing": Target(
        "parts/moe_block_moellava.py",
        ("Router.forward", "SparseMoeBlock.forward", "SparseMoeBlock.route", "SparseMoeBlock._within_capacity")
        + ("_as_ratio",),
        "tests/test_sparse.py -k 'block_equals or capacity_equals or rounded_up or first_choices or dropped or jitter "
        "or second or deterministic'",
    ),
    "balancing": Target(
        "parts/sparse_layers_moellava.py",
        ("load_balancing_loss", "token_mask"),
        "tests/test_sparse.py -k 'loss_formula or loss_is_one or evens_the_load or alone or which_tokens_of_a_pass'",
    ),
    "image_mask": Target(
        "modeling/modeling_moellava.py",
        ("MoellavaModel.get_placeholder_mask",),
        "tests/test_generation.py tests/test_errors.py -k 'from_embeddings or features_and_tokens_that_differ'",
    ),
    "label_mask": Target(
        "moellava/training/encoding.py",
        ("Encoded.labels", "Encoder.encode", "Encoder.prompt", "Encoder._end_of"),
        "tests/test_training_data.py -k 'labels or tokens_are or template or prompt or too_long'",
    ),
    "legacy_weights": Target(
        "moellava/converting/legacy_weights.py",
        (),
        "tests/test_older_checkpoints.py tests/test_older_adapters.py -k 'bad_weights or bad_mixtures or bit_by_bit or "
        "told_by or names_of_llava or one_level_higher or merge or pefts_own or the_projector_or_the_tower'",
    ),
    "names": Target(
        "moellava/authoring/older_names.py",
        (),
        "tests/test_config.py tests/test_request.py tests/test_upcycling.py "
        "-k 'test_config or test_request or no_sense or older_names'",
    ),
}


def lay_out(work: Path) -> Path:
    """Copies the package, as it is installed, and its tests into a folder; returns the package's."""
    shutil.rmtree(work, ignore_errors=True)
    package = work / "package" / "moellava"
    shutil.copytree(ROOT / "moellava", package, ignore=shutil.ignore_patterns("__pycache__"))
    for room in ROOMS:
        shutil.copytree(ROOT / room, package / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests", work / "tests", ignore=shutil.ignore_patterns("__pycache__", "fixtures"))
    shutil.copy2(ROOT / "pyproject.toml", work)
    (work / "tmp").mkdir()
    return package


def spans(source: str, functions: tuple[str, ...]) -> list[range]:
    """The lines of the bodies of functions."""
    found = {}
    for node in ast.parse(source).body:
        children = node.body if isinstance(node, ast.ClassDef) else [node]
        for child in children:
            if isinstance(child, ast.FunctionDef):
                name = f"{node.name}.{child.name}" if isinstance(node, ast.ClassDef) else child.name
                found[name] = range(child.body[0].lineno, child.end_lineno + 1)
    missing = set(functions) - set(found)
    if missing:
        raise ValueError(f"There is no {', '.join(sorted(missing))}. Name the functions anew in {__file__}.")
    return [found[name] for name in functions or found]


def mutations_of(path: Path, functions: tuple[str, ...]) -> list:
    """What cosmic-ray can change within the functions."""
    from cosmic_ray.commands.init import _all_work_items

    lines = spans(path.read_text(encoding="utf-8"), functions)
    return [
        mutation
        for item in _all_work_items([path], {})
        for mutation in item.mutations
        if any(mutation.start_pos[0] in span for span in lines)
    ]


def tests_pass(work: Path, tests: str, log: Path) -> bool:
    """Runs tests in a fork of this process; whether they pass within the time."""
    child = os.fork()
    if child == 0:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(work)
        sys.path.insert(0, str(work / "package"))
        sys.dont_write_bytecode = True
        import pytest

        os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *shlex.split(tests)])))
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def run(name: str, limit: int) -> list[str]:
    """Runs the mutations of a target, or a sample of them; returns the diffs of those that survived."""
    from cosmic_ray.mutating import use_mutation
    from cosmic_ray.plugins import get_operator

    target, work = TARGETS[name], WORK / name
    path = lay_out(work) / target.file.removeprefix("moellava/")
    # What a test process leaves behind when it ends without its own clearing up lies here.
    tempfile.tempdir = os.environ["TMPDIR"] = str(work / "tmp")
    mutations = mutations_of(path, target.functions)
    chosen = sorted(random.Random(0).sample(range(len(mutations)), min(limit, len(mutations))))
    print(f"{name}: {len(chosen)} of {len(mutations)} mutations of {target.file}", flush=True)
    if not tests_pass(work, target.tests, work / "tests.log"):
        raise SystemExit(f"The tests fail without any mutation: {work / 'tests.log'}")
    survivors = []
    for mutation in (mutations[index] for index in chosen):
        operator = get_operator(mutation.operator_name)(**mutation.operator_args)
        with use_mutation(path, operator, mutation.occurrence) as (before, after):
            survived = after is not None and tests_pass(work, target.tests, work / "tests.log")
        if survived:
            diff = difflib.unified_diff(
                before.splitlines(), after.splitlines(), target.file, target.file, "", "", 1, ""
            )
            survivors.append("\n".join(diff))
            print(survivors[-1], flush=True)
        shutil.rmtree(work / "tmp", ignore_errors=True)
        (work / "tmp").mkdir()
    print(
        f"{name}: {len(chosen) - len(survivors)} of {len(chosen)} were noticed, {len(survivors)} were not", flush=True
    )
    (WORK / f"{name}.txt").write_text("\n\n".join(survivors) + "\n", encoding="utf-8")
    return survivors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"which of {', '.join(TARGETS)}; all by default")
    parser.add_argument("--limit", type=int, default=60, help="how many mutations of each, 60 by default")
    arguments = parser.parse_args()
    sys.path.append(str(TOOLS))
    # Nothing of the package may be loaded before it is changed.
    import torch
    import transformers.models.clip.modeling_clip
    import transformers.models.llama.modeling_llama
    import transformers.trainer  # noqa: F401

    torch.set_num_threads(1)
    for name in arguments.names or TARGETS:
        run(name, arguments.limit)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Fixtures of all tests, and the surroundings they run in: no network, no user's caches, one thread a process."""

import atexit
import os
import random
import shutil
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest


# transformers and huggingface_hub read these when they are imported, so they come before any such import. Every
# process, every worker of pytest-xdist too, has caches of its own: two that write the same remote code would collide.
_CACHES = tempfile.mkdtemp(prefix="moellava-tests-")
atexit.register(shutil.rmtree, _CACHES, ignore_errors=True)
os.environ.update(
    {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": os.path.join(_CACHES, "huggingface"),
        "HF_MODULES_CACHE": os.path.join(_CACHES, "modules"),
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }
)
# These would win over HF_HOME.
for _name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE", "HF_ASSETS_CACHE"):
    os.environ.pop(_name, None)

# `import parts` works under every import mode of pytest, and without the repository's root on sys.path: from there,
# the folder moellava/ hides an installed package.
_HERE = str(Path(__file__).resolve().parent)
if _HERE not in sys.path:
    sys.path.insert(0, _HERE)

import torch  # noqa: E402
from parts import Parts, make_smollm2  # noqa: E402


# The parts are so small that more threads only get in each other's way.
torch.set_num_threads(1)


def _seed(name: str) -> None:
    seed = zlib.crc32(name.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


# Every fixture and every test starts from a random state that its name gives, whatever ran before it.


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef):
    _seed(fixturedef.argname)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item):
    _seed(item.name)


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """Builders of tiny checkpoints; each is built once a session, in a folder that tests share and do not change."""
    return Parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct, a published language model, in bf16; shared, so a test changes a copy."""
    return make_smollm2(Path(__file__).resolve().parent.parent / "build" / "parts" / "smollm2")


@pytest.fixture
def hub(parts: Parts, monkeypatch: pytest.MonkeyPatch):
    """A function: `hub(*names)` makes parts under names of the Hub and enters their root, so that names are paths."""

    def enter(*names: str) -> Path:
        root = parts.hub(*names)
        monkeypatch.chdir(root)
        return root

    return enter

# SPDX-License-Identifier: Apache-2.0
"""transformers' own common tests, run over our classes by `make test-referee`; `make test` leaves this folder out.

`MOELLAVA_REFEREE` names the unpacked source distribution of transformers; the Makefile gets it.
"""

import os
from pathlib import Path

import pytest


MARKERS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "is_expert_parallel_test",
    "is_fsdp_test",
    "is_pipeline_test",
    "is_tensor_parallel_test",
    "is_training_test",
    "slow",
    "torch_compile_test",
)
SOURCE = os.environ.get("MOELLAVA_REFEREE")

if SOURCE is None:
    collect_ignore_glob = ["test_*.py"]
else:
    from source_distribution import make_importable

    make_importable(SOURCE, Path(os.environ["HF_HOME"]) / "tiny_models")


def pytest_configure(config: pytest.Config) -> None:
    """Makes the suite's own markers known, and leaves what it says of its own age to it."""
    for marker in MARKERS:
        config.addinivalue_line("markers", f"{marker}: of transformers' suite")
    config.addinivalue_line("filterwarnings", r"ignore::FutureWarning:tests\.")
    config.addinivalue_line("filterwarnings", r"ignore::DeprecationWarning:tests\.")

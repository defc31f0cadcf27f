# SPDX-License-Identifier: Apache-2.0
"""MoELLaVA: assemble a vision-language model out of parts, and make of it a checkpoint that stock transformers runs.

Importing this package is cheap. transformers learns of the model's classes as soon as it loads its Auto classes
(`registration.py`), and everything public is imported when it is first asked for.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING


__version__ = "0.1.0"

# In a source tree the other rooms lie beside this folder; `setup.py` puts them inside it when it installs.
_SOURCE_TREE = Path(__file__).resolve().parents[1]
if (_SOURCE_TREE / "configuration" / "configuration_moellava.py").is_file():
    __path__.append(str(_SOURCE_TREE))

from . import registration  # noqa: E402 - it imports the rooms where transformers is there already


if TYPE_CHECKING:
    from .authoring.registry import register_encoder, register_projector
    from .configuration import MoellavaConfig, MoellavaEncoderConfig, MoellavaMoeConfig, MoellavaProjectorConfig
    from .converting import convert
    from .evaluating import evaluate
    from .hub import push
    from .inspecting import inspect_checkpoint, quantization_coverage, resident_bytes
    from .loading import LoadedModel, load_pretrained_model
    from .modeling import MoellavaForCausalLM, MoellavaModel, MoellavaPreTrainedModel
    from .planning import plan
    from .processing import MoellavaProcessor
    from .training import check_data, train, train_router
    from .upcycling import upcycle

_HOMES = {
    "MoellavaConfig": "configuration",
    "MoellavaEncoderConfig": "configuration",
    "MoellavaMoeConfig": "configuration",
    "MoellavaProjectorConfig": "configuration",
    "register_encoder": "authoring.registry",
    "register_projector": "authoring.registry",
    "MoellavaForCausalLM": "modeling",
    "MoellavaModel": "modeling",
    "MoellavaPreTrainedModel": "modeling",
    "MoellavaProcessor": "processing",
    "check_data": "training",
    "convert": "converting",
    "evaluate": "evaluating",
    "inspect_checkpoint": "inspecting",
    "load_pretrained_model": "loading",
    "LoadedModel": "loading",
    "plan": "planning",
    "push": "hub",
    "quantization_coverage": "inspecting",
    "resident_bytes": "inspecting",
    "train": "training",
    "train_router": "training",
    "upcycle": "upcycling",
}

# Word for word, as type checkers read it: without it they take the names above for imports of this file's own.
__all__ = [
    "LoadedModel",
    "MoellavaConfig",
    "MoellavaEncoderConfig",
    "MoellavaForCausalLM",
    "MoellavaModel",
    "MoellavaMoeConfig",
    "MoellavaPreTrainedModel",
    "MoellavaProcessor",
    "MoellavaProjectorConfig",
    "__version__",
    "check_data",
    "convert",
    "evaluate",
    "inspect_checkpoint",
    "load_pretrained_model",
    "plan",
    "push",
    "quantization_coverage",
    "register_encoder",
    "register_projector",
    "resident_bytes",
    "train",
    "train_router",
    "upcycle",
]


if not TYPE_CHECKING:  # a type checker would take it that every name is here

    def __getattr__(name: str):
        if name not in _HOMES:
            raise AttributeError(f"module 'moellava' has no attribute {name!r}")
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)


registration.register()

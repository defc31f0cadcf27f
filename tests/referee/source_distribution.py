# SPDX-License-Identifier: Apache-2.0
"""Makes the tests in transformers' source distribution importable, and stands in for what they import and it lacks.

The distribution holds the files `tests/test_*.py`, and nothing of the folders beside them, which some of these files
import. Where the folder that `MOELLAVA_REFEREE` names has those too, as a clone of transformers does, they are used.
"""

import importlib
import importlib.util
import inspect
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from parts import picture
from transformers import pipeline


class ExportTesterMixin:
    """In the place of the tests of exporting, which the distribution lacks."""


class GenerationTesterMixin:
    """In the place of the tests of `generate`, which the distribution lacks."""


class ImageTextToTextPipelineTests:
    """What the pipeline mixin runs for this task, which lies in a file of the task's own."""

    def get_test_pipeline(self, model, tokenizer=None, image_processor=None, processor=None, dtype="float32"):
        model = model.to(getattr(torch, dtype))
        asking = pipeline("image-text-to-text", model=model, processor=processor, max_new_tokens=3)
        images = [picture(0), picture(1)]
        return asking, [{"images": image, "text": f"{processor.image_token} What is shown?"} for image in images]

    def run_pipeline_test(self, asking, examples):
        for example in examples:
            (answer,) = asking(**example)
            assert set(answer) == {"input_text", "generated_text"}
            assert answer["input_text"] == example["text"]
            assert answer["generated_text"].startswith(example["text"])


def run_distributed(world_size: int) -> Callable:
    """Decorates a function so that it runs in several processes, which find one another; it gets its rank first."""

    def decorate(function: Callable) -> Callable:
        def run(*args) -> None:
            with tempfile.TemporaryDirectory() as folder:
                start_rank_processes(_in_group, (function, f"file://{folder}/store", world_size, args), world_size)

        return run

    return decorate


def _in_group(rank: int, function: Callable, store: str, world_size: int, args: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    try:
        function(rank, *args)
    finally:
        torch.distributed.destroy_process_group()


def start_rank_processes(function: Callable, args: tuple, nprocs: int) -> None:
    """Runs a function in so many processes at once; it gets its rank first."""
    torch.multiprocessing.spawn(_run_rank, _each(_named, (function, args)), nprocs=nprocs)


def _run_rank(rank: int, function: "_Function", args: tuple) -> None:
    make_importable(os.environ["MOELLAVA_REFEREE"], Path(os.environ["TRANSFORMERS_TINY_MODEL_PATH"]))
    torch.set_num_threads(1)
    function, args = _each(_found, (function, args))
    function(rank, *args)


@dataclass
class _Function:
    """A function on its way to a new process, which has to make its module importable first."""

    module: str
    name: str


def _each(change: Callable, values: tuple) -> tuple:
    """Returns values as a function changes them, those within tuples too."""
    return tuple(_each(change, value) if isinstance(value, tuple) else change(value) for value in values)


def _named(value: object) -> object:
    return _Function(value.__module__, value.__name__) if inspect.isfunction(value) else value


def _found(value: object) -> object:
    return getattr(importlib.import_module(value.module), value.name) if isinstance(value, _Function) else value


def _local_picture(url: str) -> str:
    """The file to use in the place of one of the suite's on the Hub."""
    file = Path(os.environ["HF_HOME"]) / url.rsplit("/", 1)[-1]
    if file.suffix == ".png" and not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(0, (64, 48)).save(file)
    return str(file)


_STAND_INS = {
    "tests.distributed_testing_utils": {
        "run_distributed": run_distributed,
        "_get_distributed_backend": lambda: "gloo",
        "_get_distributed_device_type": lambda: "cpu",
        "_get_rank_device": lambda rank: torch.device("cpu"),
        "_set_rank_device": lambda rank: None,
        "_start_rank_processes": start_rank_processes,
    },
    "tests.exporters.test_export": {"ExportTesterMixin": ExportTesterMixin},
    "tests.generation.test_utils": {"GenerationTesterMixin": GenerationTesterMixin},
    "tests.pipelines.test_pipelines_image_text_to_text": {"ImageTextToTextPipelineTests": ImageTextToTextPipelineTests},
    "tests.utils.test_configuration_utils": {"config_common_kwargs": {}},
    "fetch_hub_objects_for_ci": {"url_to_local_path": _local_picture},
}


def make_importable(source: str | os.PathLike, tiny_models: Path) -> None:
    """Puts the tests of a folder of transformers on the path, as its package `tests`.

    Args:
        source (`str` or `os.PathLike`): The unpacked source distribution, or a clone.
        tiny_models (`Path`): Where the pipeline mixin, which reads this when it is imported, is to look for models
            instead of the Hub: `<model_type>/<class>`.
    """
    summary = tiny_models / "reports" / "tiny_model_summary.json"
    summary.parent.mkdir(parents=True, exist_ok=True)
    summary.write_text(
        json.dumps({"MoellavaForCausalLM": {"tokenizer_classes": ["AutoTokenizer"], "processor_classes": []}})
    )
    os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = str(tiny_models)
    source = Path(source).resolve()
    sys.path.insert(0, str(source))
    sys.path.append(str(source / "utils"))
    for name, contents in _STAND_INS.items():
        package = name.rpartition(".")[0]
        if package not in ("", "tests") and not (source / package.replace(".", "/")).is_dir():
            sys.modules[package] = ModuleType(package)
            sys.modules[package].__path__ = []
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = ModuleType(name)
            vars(sys.modules[name]).update(contents)

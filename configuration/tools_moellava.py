# SPDX-License-Identifier: Apache-2.0
"""Where the tools of the package take part in a model's own code.

A checkpoint that is loaded without the package runs by `Tools` as it stands here: fields have their own names, files
are read and written by transformers' ways. The package puts a class of its own in its place (`moellava/installed.py`),
which checks files before they are opened, knows the names of older formats, and saves whole checkpoints or none.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoTokenizer
from transformers.dynamic_module_utils import get_relative_import_files


ENTRY_MODULE = "moellava_entry"

# One entry file for all: with several, transformers imports the same class once per file from a local folder, and
# `type(config) is model.config_class` no longer holds.
AUTO_MAP = {
    "AutoConfig": f"{ENTRY_MODULE}.MoellavaConfig",
    "AutoModel": f"{ENTRY_MODULE}.MoellavaModel",
    "AutoModelForCausalLM": f"{ENTRY_MODULE}.MoellavaForCausalLM",
    "AutoModelForImageTextToText": f"{ENTRY_MODULE}.MoellavaForCausalLM",
    "AutoModelForMultimodalLM": f"{ENTRY_MODULE}.MoellavaForCausalLM",
    "AutoProcessor": f"{ENTRY_MODULE}.MoellavaProcessor",
}


class Tools:
    """What a model's code leaves to the tools; each method says what happens without them."""

    # Other names that the fields of a config may have.
    other_names: frozenset[str] = frozenset()

    def take_other_names(self, config: Any, given: dict[str, Any]) -> None:
        """Takes the fields of a config that are given by names which it does not have: they are errors."""
        for name in given:
            raise ValueError(f"Unknown field {name!r} in {type(config).__name__}.")

    def canonical_projector(self, fields: dict[str, Any], kind: str) -> dict[str, Any]:
        """Returns a projector's fields and its `type` by their own names: as they are."""
        return {**fields, "type": kind}

    def canonical_moe(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Returns the fields of sparse layers by their own names: as they are."""
        return fields

    def canonical_value(self, name: str, value: Any) -> Any:
        """Returns what a field of a config stands for: its value."""
        return value

    def canonical_overrides(
        self, config_class: type, fields: dict[str, Any], given: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Splits what is given for a config's file into fields, which are laid over those of the file, and the rest."""
        names = config_class.default_field_names()
        return (
            {name: value for name, value in given.items() if name in names},
            {name: value for name, value in given.items() if name not in names},
        )

    def plain_value(self, value: Any, owner: str) -> Any:
        """Returns a field's value as it comes back from a file: as it is."""
        return value

    def checked_fields(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Returns the fields of a file, checked: as they are."""
        return fields

    def check_overrides(self, config: Any, fields: dict[str, Any], given: dict[str, Any]) -> None:
        """Checks a config that was made of a file's fields and of some that are laid over them: not at all."""

    def check_part(self, key: str, fields: dict[str, Any]) -> None:
        """Checks the fields of a part, before anything is made of them: not at all."""

    def check_part_config(self, key: str, config: Any) -> None:
        """Checks the config of a part: not at all, beyond what its own class does."""

    def check_files(self, name: Any, options: dict[str, Any]) -> None:
        """Checks the files of a model before they are opened: not at all."""

    def check_size(self, model: Any, state_dict: dict | None, files: list[str] | None) -> None:
        """Checks that a model is not far larger than what it is filled from: not at all."""

    def check_adapters(self, model: Any, adapters: Any) -> None:
        """Checks adapters that PEFT has put on a model: not at all."""

    def measured_output_tokens(self, projector: Any, num_tokens: int) -> int | None:
        """Measures how many tokens a user's projector makes of `num_tokens` features: it stays what the config says."""
        return None

    def load_tokenizer(self, name: Any, **options: Any) -> Any:
        """Loads a tokenizer, by transformers."""
        return AutoTokenizer.from_pretrained(name, **options)

    def load_image_processor(self, name: Any, **options: Any) -> Any:
        """Loads an image processor, by transformers."""
        return AutoImageProcessor.from_pretrained(name, **options)

    # What reads a picture, what makes 8-bit RGB of one, and what reads the files of a processor; without them,
    # `images_moellava.py` and transformers do.
    load_picture = to_rgb = read_processor_dict = None

    def check_picture_shape(self, width: int, height: int, aspect_ratio: str, name: str) -> None:
        """Checks that a picture takes no far larger one on its way to the tower: not at all."""

    @contextmanager
    def saving(self, folder: Any, saved: Any, is_main_process: bool = True) -> Iterator[Any]:
        """Yields where a config, a model or a processor is written; the code that loads it follows when the block ends.

        Args:
            folder (`str` or `os.PathLike`): Where it is to be saved.
            saved: What is saved. A processor leaves code that is there already alone: it is the model's.
        """
        yield folder
        entry = Path(__file__).with_name(f"{ENTRY_MODULE}.py")
        if is_main_process and not (hasattr(saved, "tokenizer") and Path(folder, entry.name).exists()):
            for file in (entry, *get_relative_import_files(entry)):
                if Path(file).parent.resolve() != Path(folder).resolve():
                    shutil.copyfile(file, Path(folder, Path(file).name))

    def upload(self, saved: Any, upload: Any, folder: Any, repo_id: str, timestamps: Any, **options: Any) -> Any:
        """Sends what was saved into a folder to the Hub, by `upload`, which is transformers'."""
        return upload(folder, repo_id, timestamps, **options)


_tools = Tools()


def tools() -> Tools:
    """The tools in use."""
    return _tools


def use_tools(new: Tools) -> None:
    """Puts others in their place."""
    global _tools
    _tools = new


__all__ = ["AUTO_MAP", "ENTRY_MODULE", "Tools", "tools", "use_tools"]

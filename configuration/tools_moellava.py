# SPDX-License-Identifier: Apache-2.0
"""Where the tools of the package take part in a model's own code.

A checkpoint that is loaded without the package runs by `Tools` as it stands here: fields have their own names, files
are read and written by transformers' ways. The package puts a class of its own in its place (`moellava/installed.py`),
which checks files before they are opened, knows the names of older formats, and saves whole checkpoints or none.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

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


_NOTHING = staticmethod(lambda *given, **options: None)


class Tools:
    """What a model's code leaves to the tools; the comments and docstrings say what happens without them."""

    # Checks of a config and its parts, of the files of a model, of the adapters on it, of a picture's shape, of what is
    # asked of a vision encoder, of a language model's head: none is made.
    check_config = check_moe = check_ties = check_part = check_part_config = _NOTHING
    check_files = check_size = check_adapters = check_picture_shape = check_encoder = check_head = _NOTHING
    # Around the making of a part's config and of its model, and the measuring of what a tower gives: nothing is said of
    # what their classes raise.
    reading_part = building_part = measuring = staticmethod(lambda *part: nullcontext())
    # How many tokens a user's projector makes of so many features: what the config says.
    measured_output_tokens = _NOTHING
    # What reads a picture, what makes 8-bit RGB of one, and what reads the files of a processor and its parts:
    # `images_moellava.py`, and transformers.
    load_picture = to_rgb = read_processor_dict = load_tokenizer = load_image_processor = None

    # The fields of a config that are given by other names than its own: none is. Those of a projector with its type, of
    # sparse layers, and the value of any other, by their own names; and the fields of a part, checked: as they are.
    take_other_names = staticmethod(lambda config, given: given)
    canonical_projector = staticmethod(lambda fields, kind: {**fields, "type": kind})
    canonical_moe = staticmethod(lambda moe, fields: fields)
    resolved_layers = staticmethod(lambda layers, num_hidden_layers: layers)
    canonical_value = staticmethod(lambda name, value: value)
    checked_part_fields = staticmethod(lambda table, name, fields: fields)
    # A config of the fields of a file and of what is given besides: as transformers' `from_dict` makes it.
    config_from_dict = staticmethod(lambda from_dict, cls, fields, given: from_dict(fields, **given))

    @contextmanager
    def saving(self, folder: Any, saved: Any, is_main_process: bool = True) -> Iterator[Any]:
        """Yields where a config, a model or a processor is written; the code that loads it follows when the block ends.

        Args:
            folder (`str` or `os.PathLike`): Where it is to be saved.
            saved: What is saved. A processor leaves code that is there already alone: it is the model's.
            is_main_process (`bool`, *optional*, defaults to `True`): Whether this process writes the code.
        """
        yield folder
        entry = Path(__file__).with_name(f"{ENTRY_MODULE}.py")
        if is_main_process and not (hasattr(saved, "tokenizer") and Path(folder, entry.name).exists()):
            for file in (entry, *map(Path, get_relative_import_files(entry))):
                if file.parent.resolve() != Path(folder).resolve():
                    shutil.copyfile(file, Path(folder, file.name))

    def upload(self, saved: Any, upload: Callable, folder: Any, repo_id: str, timestamps: Any, **options: Any) -> Any:
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

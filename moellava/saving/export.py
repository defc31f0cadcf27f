# SPDX-License-Identifier: Apache-2.0
"""The code that a checkpoint carries.

A saved folder holds flat copies of source files of this package, so that `from_pretrained(folder,
trust_remote_code=True)` works where it is not installed: those that the checkpoint runs, and no others. Its entry
imports the config, the model, the processor and a table of its own parts, which is written for it; the files that are
imported from there, directly or not, are copied. transformers' own copier cannot do this from a layout of several
folders.
"""

import ast
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..authoring.registry import is_user_class
from ..authoring.user_code import CUSTOM_MODULE, user_sources
from ..configuration.configuration_moellava import MoellavaConfig
from ..configuration.tools_moellava import ENTRY_MODULE
from ..parts.part_table_moellava import OPTIONAL
from ..parts.parts_moellava import ENCODERS, PROJECTORS


ROOMS = ("configuration", "modeling", "parts", "processing")
_TABLE_MODULE = "parts_moellava"
_LICENCE = "# SPDX-License-Identifier: Apache-2.0\n"

# `from .x import`, `from ..room.x import` and `from moellava.room.x import` all become `from .x import`.
_ROOM_IMPORT = re.compile(
    rf"^(\s*)from (?:\.|\.\.(?:{'|'.join(ROOMS)})\.|moellava\.(?:{'|'.join(ROOMS)})\.)(\w+) import", flags=re.MULTILINE
)
_MODEL_ENTRY = {
    "configuration_moellava": ["MoellavaConfig"],
    "modeling_moellava": ["MoellavaForCausalLM", "MoellavaModel", "MoellavaPreTrainedModel"],
    "processing_moellava": ["MoellavaProcessor"],
}
_PROCESSOR_ENTRY = {"processing_moellava": ["MoellavaProcessor"]}


def export_code(
    folder: str | os.PathLike, config: MoellavaConfig | None, earlier: str | os.PathLike | None = None
) -> list[Path]:
    """Writes the code of a checkpoint into `folder`.

    Args:
        folder (`str` or `os.PathLike`): Where to write; exists.
        config (`MoellavaConfig`, *optional*): The model's config, which tells its parts. Those that a user has written
            are copied with the files that define them. `None` for a processor alone: code of `earlier` is then left as
            it is, since a processor does not know the model.
        earlier (`str` or `os.PathLike`, *optional*): The checkpoint that `folder` is going to replace.

    Returns:
        `list[Path]`: The files written.

    Raises:
        ValueError: A user's part is defined where its source cannot travel (a script run as `__main__`, a notebook),
            or its file imports a module that no installed distribution provides.
    """
    if config is None and earlier is not None and Path(earlier, f"{ENTRY_MODULE}.py").exists():
        return []
    sources = code_of_processor() if config is None else code_of(config)
    for name, source in sources.items():
        Path(folder, name).write_text(source, encoding="utf-8")
    return [Path(folder, name) for name in sources]


def code_of(config: MoellavaConfig) -> dict[str, str]:
    """Returns the files of code, by name, that a model of such a config needs; raises as `export_code`."""
    ours = {place: cls for place, cls in _classes(config).items() if not is_user_class(cls)}
    by_user = user_code_of(config)
    entry = {**_MODEL_ENTRY, **({CUSTOM_MODULE: ["CUSTOM_PARTS"]} if by_user else {})}
    generated = {f"{_TABLE_MODULE}.py": _table_source(config, ours), f"{ENTRY_MODULE}.py": _entry_source(entry)}
    return _with_imported(by_user | generated)


def user_code_of(config: MoellavaConfig) -> dict[str, str]:
    """Returns the files of code, by name, of the parts that a user has written; none where there is no such part.

    Raises:
        ValueError: See `export_code`.
    """
    by_user = {place: cls for place, cls in _classes(config).items() if is_user_class(cls)}
    return user_sources(by_user, travelling_files()) if by_user else {}


def code_of_processor() -> dict[str, str]:
    """Returns the files of code, by name, that a processor needs."""
    return _with_imported({f"{ENTRY_MODULE}.py": _entry_source(_PROCESSOR_ENTRY)})


def travelling_files() -> dict[str, Path]:
    """Returns the flat name of every source file that may travel, and where it lies.

    Raises:
        RuntimeError: Two files of the package would get the same flat name.
    """
    home = Path(__file__).parents[1]
    if not (home / ROOMS[0]).is_dir():  # in a source tree the rooms lie beside the package
        home = home.parent
    files: dict[str, Path] = {}
    for room in ROOMS:
        for path in sorted((home / room).glob("*.py")):
            if path.name == "__init__.py":
                continue
            if path.name in files:
                raise RuntimeError(f"{path} and {files[path.name]} would overwrite one another in a checkpoint.")
            files[path.name] = path
    return files


def flatten_imports(source: str) -> str:
    """Rewrites the imports of the travelling files of one another to imports of flat siblings."""
    return _ROOM_IMPORT.sub(r"\1from .\2 import", source)


def _classes(config: MoellavaConfig) -> dict[tuple[str, str], type]:
    """Returns the classes of a model's encoder and projector, by table and name."""
    encoder, projector = config.encoder_type, config.projector_config.type
    return {("ENCODERS", encoder): ENCODERS[encoder], ("PROJECTORS", projector): PROJECTORS[projector]}


def _with_imported(sources: dict[str, str]) -> dict[str, str]:
    """Returns the files together with those of the package that they import, directly or not."""
    files, remaining = travelling_files(), list(sources)
    while remaining:
        for name in _siblings(sources[remaining.pop()]):
            if name not in sources:
                sources[name] = flatten_imports(files[name].read_text(encoding="utf-8"))
                remaining.append(name)
    return sources


def _siblings(source: str) -> list[str]:
    """Returns the files that a flat file imports, late imports included."""
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            names += [node.module] if node.module else [alias.name for alias in node.names]
    return [f"{name}.py" for name in names]


def _entry_source(names: Mapping[str, list[str]]) -> str:
    lines = [f"from .{module} import {', '.join(imported)}" for module, imported in sorted(names.items())]
    every = sorted(name for imported in names.values() for name in imported)
    listed = "\n".join(["__all__ = [", *(f'    "{name}",' for name in every), "]"])
    docstring = '"""What `auto_map` of this checkpoint names."""'
    return "\n".join([_LICENCE + docstring, "", *lines, "", "", listed, ""])


def _table_source(config: MoellavaConfig, classes: Mapping[tuple[str, str], type]) -> str:
    """Returns the table of a model's parts, of those that come with the package."""
    entered, imports = [], {"part_table_moellava": {"ENCODERS", "OPTIONAL", "PROJECTORS"}}
    imports["part_table_moellava"] |= {"encoder_for", "optional", "projector_for"}
    tables = {"ENCODERS": ENCODERS, "PROJECTORS": PROJECTORS}
    for (table, name), cls in classes.items():
        answer = tables[table].answer(name)
        _import(imports, (cls, answer))
        entered.append(f'{table}.enter("{name}", {cls.__name__}, {answer.__name__})')
    is_quantised, is_sparse = hasattr(config, "quantization_config"), config.moe_config is not None
    needed = {
        "modular_experts": is_quantised and is_sparse,
        "quantised": is_quantised,
        "routing": config.is_natively_sparse,
        "sparse": is_sparse,
        "user_encoder_config": config.vision_config.model_type == "moellava_encoder",
    }
    for name in (name for name, is_needed in needed.items() if is_needed):
        _import(imports, (OPTIONAL[name],))
        entered.append(f'OPTIONAL["{name}"] = {OPTIONAL[name].__name__}')
    lines = [f"from .{module} import {', '.join(sorted(names))}" for module, names in sorted(imports.items())]
    public = ", ".join(f'"{name}"' for name in sorted(imports["part_table_moellava"]))
    head = _LICENCE + '"""The parts of this model, by name."""'
    return "\n".join([head, "", *lines, "", "", *entered, "", f"__all__ = [{public}]", ""])


def _import(imports: dict[str, set[str]], classes: Iterable[type]) -> None:
    for cls in classes:
        imports.setdefault(cls.__module__.rpartition(".")[2], set()).add(cls.__name__)


__all__ = [
    "ROOMS",
    "code_of",
    "code_of_processor",
    "export_code",
    "flatten_imports",
    "travelling_files",
    "user_code_of",
]

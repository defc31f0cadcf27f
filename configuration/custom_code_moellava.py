# SPDX-License-Identifier: Apache-2.0
"""A user's own encoder or projector in a checkpoint: the file that defines it, with its imports made to fit there.

The file is copied as it stands, with the files that it imports relatively. Only statements that could not work in the
checkpoint are changed: imports of those files and of this package, and blocks that run in a script or for a type
checker alone.
"""

import ast
import functools
import importlib.metadata
import inspect
import re
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from types import FunctionType


CUSTOM_MODULE = "moellava_custom"
API_MODULE = "moellava_api"
CUSTOM_PREFIX = "custom_"

_PACKAGE = "moellava"
_IS_INSTALLED = __name__.endswith(".configuration.custom_code_moellava")

# transformers finds the files that a file needs by looking for such lines (`get_relative_imports`), in strings too.
_RELATIVE_IMPORT_LINE = re.compile(r"^\s*(?:from\s+\.(\S+)\s+import|import\s+\.(\S+)\s*$)", flags=re.MULTILINE)

_API_SOURCE = '''"""What the files of this model's author find under the name `moellava`; it may be absent here."""

import importlib
import sys

from .configuration_moellava import MoellavaConfig, MoellavaEncoderConfig, MoellavaProjectorConfig
from .modeling_moellava import MoellavaForCausalLM, MoellavaModel, MoellavaPreTrainedModel
from .processing_moellava import MoellavaProcessor
from .registry_moellava import register_encoder, register_projector


moellava = configuration = modeling = processing = sys.modules[__name__]


class _Tool:
    """Stands for a tool of the package, which is looked for when it is used."""

    def __init__(self, name):
        self._name = name

    def __call__(self, *args, **kwargs):
        try:
            package = importlib.import_module("moellava")
        except ImportError as error:
            raise ImportError(f"{self._name} is a tool of moellava, which is not installed.") from error
        return getattr(package, self._name)(*args, **kwargs)


def __getattr__(name):
    if name.startswith("_"):
        raise AttributeError(name)
    if name.endswith("_moellava"):
        return importlib.import_module(f".{name}", __package__)
    return _Tool(name)
'''


def is_own_class(cls: type) -> bool:
    """Whether a class was written by a user: not in this package, nor among its files in a checkpoint."""
    if _IS_INSTALLED:
        return not cls.__module__.startswith(f"{__name__.partition('.configuration.')[0]}.")
    return cls.__module__.startswith(f"{__name__.rpartition('.')[0]}.{CUSTOM_PREFIX}")


def source_file_of(cls: type) -> Path | None:
    """Returns the file that defines a class, or `None` where there is none (a notebook, an interactive shell).

    Its functions tell it, since its module may be gone or may be another file of the same name by now.
    """
    for function in vars(cls).values():
        function = inspect.unwrap(getattr(function, "__func__", function))
        if isinstance(function, FunctionType) and function.__qualname__.startswith(f"{cls.__qualname__}."):
            path = Path(function.__code__.co_filename)
            if path.is_file():
                return path.resolve()
    try:
        path = Path(inspect.getsourcefile(cls) or "")
    except (OSError, TypeError):
        return None
    return path.resolve() if path.is_file() else None


def custom_sources(parts: Iterable[type], travelling: Iterable[str]) -> dict[str, str]:
    """Returns what a checkpoint needs for the parts that are a user's own.

    Args:
        parts (`Iterable[type]`): The classes that the model's encoder and projector are made of.
        travelling (`Iterable[str]`): The names of this package's own files in a checkpoint.

    Returns:
        `dict[str, str]`: The names and contents of files: the module that imports the parts and registers them and,
        where there is a part of a user's own, its file and those that it imports.

    Raises:
        ValueError: A part cannot travel: it is defined in a script, a notebook or inside of a function, or its file
            imports what would not be found elsewhere.
    """
    own = [part for part in parts if is_own_class(part)]
    files = _OwnFiles(travelling)
    homes = {part: files.add(_file_to_copy(part)) for part in dict.fromkeys(own)}
    sources = {f"{files.names[path]}.py": source for path, source in files.sources.items()}
    if sources:
        sources[f"{API_MODULE}.py"] = _API_SOURCE
    return sources | {f"{CUSTOM_MODULE}.py": _registering_source(homes, sources)}


def _registering_source(homes: dict[type, str], sources: dict[str, str]) -> str:
    """Returns the module that imports the parts and registers them, in a way that needs no decorator of their own."""
    lines = ['"""The parts of this model that its author wrote: importing this registers them."""', ""]
    if not homes:
        return "\n".join([*lines, "", "CUSTOM_PARTS = []", ""])
    others = [Path(name).stem for name in sources if Path(name).stem not in homes.values()]
    names = {part: part.__name__ for part in homes}
    for index, part in enumerate(homes):
        if list(names.values()).count(part.__name__) > 1:
            names[part] = f"{part.__name__}_{index}"
    lines += ["from typing import TYPE_CHECKING", ""]
    for part, home in homes.items():
        renamed = "" if names[part] == part.__name__ else f" as {names[part]}"
        lines.append(f"from .{home} import {part.__name__}{renamed}")
    lines += ["from .registry_moellava import ENCODERS, PROJECTORS", "", ""]
    lines += ["if TYPE_CHECKING:  # never run: transformers fetches the files that it sees imported somewhere"]
    lines += [*(f"    from .{other} import __name__ as _" for other in others), ""]
    lines += [f"CUSTOM_PARTS = [{', '.join(names.values())}]", ""]
    lines += [
        f'{table}.register("{name}", exist_ok=True)({names[part]})'
        for part in homes
        for table, name in _registered_names(part)
    ]
    return "\n".join([*lines, ""])


def _registered_names(part: type) -> list[tuple[str, str]]:
    from .registry_moellava import ENCODERS, PROJECTORS

    tables = {"ENCODERS": ENCODERS, "PROJECTORS": PROJECTORS}
    return [(table, name) for table, registry in tables.items() for name in registry.names() if registry[name] is part]


def registered_in(source: str) -> list[tuple[str, str]]:
    """Returns the table and name of every part that a checkpoint's `moellava_custom.py` registers; it is not run."""
    return re.findall(r'^(ENCODERS|PROJECTORS)\.register\("(\w+)"', source, flags=re.MULTILINE)


def _file_to_copy(part: type) -> Path:
    """Returns the file that defines a part.

    Raises:
        ValueError: Importing it elsewhere would not give the part.
    """
    path = source_file_of(part)
    reason = None
    if part.__module__ == "__main__" and path is not None:
        reason = f"the script {path.name}, which cannot be imported without running it"
    elif path is None or path.suffix != ".py":
        reason = "no Python file, as in a notebook or an interactive shell"
    elif part.__qualname__ != part.__name__:
        reason = f"{part.__qualname__.rpartition('.')[0]}, not at the top level of a file"
    if reason is not None:
        raise ValueError(
            f"{part.__name__} cannot travel in a checkpoint: it is defined in {reason}. Move the class into a Python "
            "file of its own and import it from there."
        )
    return path


class _OwnFiles:
    """The user's files that a checkpoint takes along, under flat names."""

    def __init__(self, travelling: Iterable[str]):
        self.travelling = {Path(name).stem for name in travelling}
        self.names: dict[Path, str] = {}
        self.sources: dict[Path, str] = {}

    def add(self, path: Path) -> str:
        """Takes a file and those that it imports; returns the name of its module in the checkpoint."""
        path = path.resolve()
        if path not in self.names:
            self.names[path] = self._free_name(path)
            self.sources[path] = _Rewriter(path, self).source()
        return self.names[path]

    def _free_name(self, path: Path) -> str:
        stem = path.parent.name if path.stem == "__init__" else path.stem
        stem = re.sub(r"\W", "_", stem, flags=re.ASCII)
        name = base = stem if stem.startswith(CUSTOM_PREFIX) else f"{CUSTOM_PREFIX}{stem}"
        number = 2
        while name in self.names.values() or name in self.travelling:
            name, number = f"{base}_{number}", number + 1
        return name


class _Rewriter(ast.NodeVisitor):
    """Makes the statements of one file fit for the checkpoint.

    Args:
        path (`Path`): The file.
        files (`_OwnFiles`): Where the files go that it imports.
    """

    def __init__(self, path: Path, files: _OwnFiles):
        self.path = path
        self.files = files
        self._may_fail = False  # inside a `try` that catches an ImportError
        self._tried: set[str] = set()  # what that `try` imports relatively, too
        self._edits: list[tuple[int, int, str]] = []

    def source(self) -> str:
        """Returns the text of the file as the checkpoint gets it."""
        text = self.path.read_text(encoding="utf-8-sig")
        self._content = text.encode()
        self._line_starts = [0, *(match.end() for match in re.finditer(rb"\n", self._content))]
        self.visit(ast.parse(text, filename=str(self.path)))
        content = self._content
        for start, end, replacement in sorted(self._edits, reverse=True):
            content = content[:start] + replacement.encode() + content[end:]
        text = content.decode()
        self._check_lines(text)
        return text

    def _replace(self, node: ast.stmt, statements: Iterable[str] | str) -> None:
        start = self._line_starts[node.lineno - 1] + node.col_offset
        end = self._line_starts[node.end_lineno - 1] + node.end_col_offset
        new = statements if isinstance(statements, str) else "; ".join(dict.fromkeys(statements))
        self._edits.append((start, end, new))

    def _check_lines(self, text: str) -> None:
        known = {*self.files.names.values(), *self.files.travelling, API_MODULE}
        for match in _RELATIVE_IMPORT_LINE.finditer(text):
            if (match.group(1) or match.group(2)) not in known:
                line = text[: match.end()].count("\n") + 1
                raise ValueError(
                    f"{self.path} line {line}: {match.group().strip()!r} stands in a string, and transformers would "
                    "take it for an import. Write the string otherwise."
                )

    # Blocks

    def visit_If(self, node: ast.If) -> None:
        if not node.orelse and (_is_main_guard(node.test) or _is_type_checking(node.test)):
            self._replace(node, "pass")
        else:
            self.generic_visit(node)

    def visit_Try(self, node: ast.Try) -> None:
        before = self._may_fail, self._tried
        if any(map(_catches_import_error, node.handlers)):
            imports = [child for child in ast.walk(node) if isinstance(child, ast.ImportFrom) and child.level]
            self._may_fail, self._tried = True, {child.module or "" for child in imports}
        self.generic_visit(node)
        self._may_fail, self._tried = before

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            # A docstring: an example in it must not look like an import to transformers.
            start = self._line_starts[node.lineno - 1] + node.col_offset
            end = self._line_starts[node.end_lineno - 1] + node.end_col_offset
            old = self._content[start:end].decode()
            new = _RELATIVE_IMPORT_LINE.sub(lambda match: match.group().replace(".", ". ", 1), old)
            if new != old:
                self._edits.append((start, end, new))
        else:
            self.generic_visit(node)

    # Imports

    def visit_Import(self, node: ast.Import) -> None:
        statements = []
        for alias in node.names:
            if alias.name.partition(".")[0] != _PACKAGE:
                self._check_importable(alias.name, node)
                statements.append(f"import {_renamed(alias.name, alias.asname)}")
            elif alias.name == _PACKAGE or alias.asname is None:
                statements.append(f"from .{API_MODULE} import {_renamed(_PACKAGE, alias.asname)}")
            else:
                name = alias.name.rpartition(".")[2]
                statements.append(f"from .{API_MODULE} import {_renamed(name, alias.asname)}")
        if any(alias.name.partition(".")[0] == _PACKAGE for alias in node.names):
            self._replace(node, statements)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level:
            self._replace(node, self._relative_import(node))
        elif node.module.partition(".")[0] != _PACKAGE:
            self._check_importable(node.module, node)
        else:
            home = node.module.rpartition(".")[2]
            home = home if home in self.files.travelling else API_MODULE
            names = ", ".join(_renamed(alias.name, alias.asname) for alias in node.names)
            if names == "*" and home == API_MODULE:
                raise self._error(node, f"import the names that you need from {node.module}, not *")
            self._replace(node, f"from .{home} import {names}")

    def _relative_import(self, node: ast.ImportFrom) -> list[str]:
        folder = self.path.parent
        for _ in range(node.level - 1):
            folder = folder.parent
        target = folder.joinpath(*(node.module or "").split("."))
        home = _module_file(target)
        statements = []
        for alias in node.names:
            # A name of a package is a file of its folder, or what its __init__.py binds.
            file = _module_file(target / alias.name) if alias.name != "*" else None
            if file is not None:
                module = self.files.add(file)
                statements.append(f"from . import {_renamed(module, alias.asname or alias.name)}")
            elif home is not None:
                statements.append(f"from .{self.files.add(home)} import {_renamed(alias.name, alias.asname)}")
            elif self._may_fail:
                statements.append(f'raise ImportError("{alias.name} is no Python file")')
            else:
                raise self._error(node, f"there is no Python file {target}.py to take along")
        return statements

    def _check_importable(self, module: str, node: ast.stmt) -> None:
        top = module.partition(".")[0]
        is_beside = self._is_beside(top)
        if top in sys.stdlib_module_names or (top in _distributions() and not is_beside):
            return
        if self._may_fail and (not is_beside or module in self._tried):
            return
        raise self._error(
            node,
            f"`{module}` is provided by no installed distribution, so that the checkpoint could not be loaded "
            f"elsewhere. Put the code into the same file, or into one beside it: `from .{top} import ...`",
        )

    def _is_beside(self, top: str) -> bool:
        """Whether a file beside the user's own, and not an installed one of the same name, is what is imported."""
        installed = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}
        return self.path.parent not in installed and _module_file(self.path.parent / top) is not None

    def _error(self, node: ast.stmt, reason: str) -> ValueError:
        return ValueError(f"{self.path} line {node.lineno} cannot travel in a checkpoint: {reason}.")


def _renamed(name: str, asname: str | None) -> str:
    return name if asname is None or asname == name else f"{name} as {asname}"


def _module_file(path: Path) -> Path | None:
    """Returns the source file of the module or package at a path without suffix."""
    for file in (path.with_name(f"{path.name}.py"), path / "__init__.py"):
        if file.is_file():
            return file
    return None


def _is_main_guard(test: ast.expr) -> bool:
    if not isinstance(test, ast.Compare) or len(test.ops) != 1 or not isinstance(test.ops[0], ast.Eq):
        return False
    return {ast.unparse(test.left), ast.unparse(test.comparators[0])} == {"__name__", "'__main__'"}


def _is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _catches_import_error(handler: ast.ExceptHandler) -> bool:
    caught = {ast.unparse(node) for node in ast.walk(handler.type)} if handler.type is not None else {"Exception"}
    return not caught.isdisjoint({"BaseException", "Exception", "ImportError", "ModuleNotFoundError"})


@functools.cache
def _distributions() -> frozenset[str]:
    """The top-level modules of all installed distributions."""
    return frozenset(importlib.metadata.packages_distributions())


__all__ = ["API_MODULE", "CUSTOM_MODULE", "custom_sources", "is_own_class", "registered_in", "source_file_of"]

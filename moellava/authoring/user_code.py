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
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import FunctionType

from ..parts.part_table_moellava import ENCODERS, PROJECTORS


CUSTOM_MODULE = "moellava_custom"
API_MODULE = "moellava_api"
CUSTOM_PREFIX = "custom_"

_PACKAGE = "moellava"

# transformers finds the files that a file needs by looking for such lines (`get_relative_imports`), in strings too.
_RELATIVE_IMPORT_LINE = re.compile(r"^\s*(?:from\s+\.(\S+)\s+import|import\s+\.(\S+)\s*$)", flags=re.MULTILINE)

# Where a name of the package is in a checkpoint. Registering is done by its table of parts; of any other name a
# checkpoint has what looks for it in the package.
_HOMES = {
    "MoellavaConfig": "configuration_moellava",
    "MoellavaEncoderConfig": "user_encoder_config_moellava",
    "MoellavaForCausalLM": "modeling_moellava",
    "MoellavaModel": "modeling_moellava",
    "MoellavaMoeConfig": "moe_config_moellava",
    "MoellavaPreTrainedModel": "modeling_moellava",
    "MoellavaProcessor": "processing_moellava",
    "MoellavaProjectorConfig": "configuration_moellava",
}
_ROOMS = ("configuration", "modeling", "parts", "processing")
_API_REGISTER = """
def {name}(name, *, exist_ok=False):
    return lambda cls: cls  # moellava_custom.py enters it
"""
_API_TOOL = """
def {name}(*args, **kwargs):
    try:
        from moellava import {name} as tool
    except ImportError as error:
        raise ImportError("{name} is a tool of moellava, which is not installed.") from error
    return tool(*args, **kwargs)
"""


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


def user_sources(parts: Mapping[tuple[str, str], type], travelling: Iterable[str]) -> dict[str, str]:
    """Returns what a checkpoint needs for the parts that a user has written.

    Args:
        parts (`Mapping[tuple[str, str], type]`): Their classes, by table (`"ENCODERS"` or `"PROJECTORS"`) and name.
        travelling (`Iterable[str]`): The names of this package's files that may be in a checkpoint.

    Returns:
        `dict[str, str]`: The names and contents of files: the module that enters the parts into the checkpoint's
        table, their files and those that these import.

    Raises:
        ValueError: A part cannot travel: it is defined in a script, a notebook or inside of a function, or its file
            imports what would not be found elsewhere.
    """
    files = _UserFiles(travelling)
    homes = {part: files.add(_file_to_copy(part)) for part in dict.fromkeys(parts.values())}
    sources = {f"{files.names[path]}.py": source for path, source in files.sources.items()}
    if files.api_names:
        sources[f"{API_MODULE}.py"] = _api_source(files.api_names)
    return sources | {f"{CUSTOM_MODULE}.py": _entering_source(parts, homes, sources)}


def _api_source(names: Iterable[str]) -> str:
    """Returns the module that stands for the package in the files of a checkpoint's author."""
    lines = [
        f'"""What the files of this model\'s author find under the name `{_PACKAGE}`; it may be absent here."""',
        "",
    ]
    names = sorted(set(names))
    lines += [f"from .{_HOMES[name]} import {name}" for name in names if name in _HOMES]
    text = "\n".join([*lines, ""])
    for name in names:
        if name in ("register_encoder", "register_projector"):
            text += "\n" + _API_REGISTER.format(name=name)
        elif name in (_PACKAGE, *_ROOMS):
            text += f"\nimport sys\n\n\n{name} = sys.modules[__name__]\n"
        elif name not in _HOMES:
            text += "\n" + _API_TOOL.format(name=name)
    return text


def _entering_source(
    parts: Mapping[tuple[str, str], type], homes: Mapping[type, str], sources: Mapping[str, str]
) -> str:
    """Returns the module that enters the parts into the checkpoint's table."""
    lines = ['"""The parts of this model that its author wrote: importing this enters them into its table."""', ""]
    others = [Path(name).stem for name in sources if Path(name).stem not in homes.values()]
    names = {part: part.__name__ for part in homes}
    for index, part in enumerate(homes):
        if list(names.values()).count(part.__name__) > 1:
            names[part] = f"{part.__name__}_{index}"
    if others:
        lines += ["from typing import TYPE_CHECKING", ""]
    for part, home in homes.items():
        renamed = "" if names[part] == part.__name__ else f" as {names[part]}"
        lines.append(f"from .{home} import {part.__name__}{renamed}")
    tables = {table: PROJECTORS if table == "PROJECTORS" else ENCODERS for table, _ in parts}
    answers = {(table, name): tables[table].answer(name) for table, name in parts}
    for answer in dict.fromkeys(answers.values()):
        lines.append(f"from .{answer.__module__.rpartition('.')[2]} import {answer.__name__}")
    lines += [f"from .part_table_moellava import {', '.join(sorted(tables))}", "", ""]
    if others:
        lines += ["if TYPE_CHECKING:  # never run: transformers fetches the files that it sees imported somewhere"]
        lines += [*(f"    from .{other} import __name__ as _" for other in others), ""]
    lines += [f"CUSTOM_PARTS = [{', '.join(names.values())}]", ""]
    lines += [
        f'{table}.enter("{name}", {names[part]}, {answers[table, name].__name__})'
        for (table, name), part in parts.items()
    ]
    return "\n".join([*lines, ""])


def registered_in(source: str) -> list[tuple[str, str]]:
    """Returns the table and name of every part that a checkpoint's `moellava_custom.py` enters; it is not run."""
    return re.findall(r'^(ENCODERS|PROJECTORS)\.(?:register|enter)\("(\w+)"', source, flags=re.MULTILINE)


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
    if path is None or reason is not None:
        raise ValueError(
            f"{part.__name__} cannot travel in a checkpoint: it is defined in {reason}. Move the class into a Python "
            "file of its own and import it from there."
        )
    return path


class _UserFiles:
    """The user's files that a checkpoint takes along, under flat names."""

    def __init__(self, travelling: Iterable[str]):
        self.travelling = {Path(name).stem for name in travelling}
        self.names: dict[Path, str] = {}
        self.sources: dict[Path, str] = {}
        self.api_names: set[str] = set()

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
        files (`_UserFiles`): Where the files go that it imports.
    """

    def __init__(self, path: Path, files: _UserFiles):
        self.path = path
        self.files = files
        self._may_fail = False  # inside a `try` that catches an ImportError
        self._tried: set[str] = set()  # what that `try` imports relatively, too
        self._edits: list[tuple[int, int, str]] = []
        self._names_of_package: set[str] = set()

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

    def _span(self, node: ast.stmt) -> tuple[int, int]:
        """Where a statement begins and ends, in bytes."""
        start = self._line_starts[node.lineno - 1] + node.col_offset
        end = self._line_starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[operator] # `None` in nodes made by hand
        return start, end

    def _replace(self, node: ast.stmt, statements: Iterable[str] | str) -> None:
        start, end = self._span(node)
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
            start, end = self._span(node)
            old = self._content[start:end].decode()
            new = _RELATIVE_IMPORT_LINE.sub(lambda match: match.group().replace(".", ". ", 1), old)
            if new != old:
                self._edits.append((start, end, new))
        else:
            self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.value, ast.Name) and node.value.id in self._names_of_package:
            self.files.api_names.add(node.attr)
        self.generic_visit(node)

    # Imports

    def visit_Import(self, node: ast.Import) -> None:
        statements = []
        for alias in node.names:
            if alias.name.partition(".")[0] != _PACKAGE:
                self._check_importable(alias.name, node)
                statements.append(f"import {_renamed(alias.name, alias.asname)}")
            elif alias.name == _PACKAGE or alias.asname is None:
                self._names_of_package.add(alias.asname or _PACKAGE)
                self.files.api_names.add(_PACKAGE)
                self.files.api_names |= {part for part in alias.name.split(".")[1:2] if part in _ROOMS}
                statements.append(f"from .{API_MODULE} import {_renamed(_PACKAGE, alias.asname)}")
            else:
                statements.append(
                    self._from_package(alias.name.rpartition(".")[0], [(alias.name.rpartition(".")[2], alias.asname)])
                )
        if any(alias.name.partition(".")[0] == _PACKAGE for alias in node.names):
            self._replace(node, statements)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level or node.module is None:
            self._replace(node, self._relative_import(node))
        elif node.module.partition(".")[0] != _PACKAGE:
            self._check_importable(node.module, node)
        else:
            if any(alias.name == "*" for alias in node.names) and not self._home(node.module):
                raise self._error(node, f"import the names that you need from {node.module}, not *")
            self._replace(node, self._from_package(node.module, [(alias.name, alias.asname) for alias in node.names]))

    def _home(self, module: str) -> str | None:
        """Returns the file of a checkpoint that a module of the package is there."""
        name = module.rpartition(".")[2]
        return name if name in self.files.travelling else None

    def _from_package(self, module: str, names: Iterable[tuple[str, str | None]]) -> str:
        """Returns the statements that import names of the package, in a checkpoint."""
        homes: dict[str, list[str]] = {}
        modules = [(name, asname) for name, asname in names if self._home(f"{module}.{name}")]
        for name, asname in names:
            if (name, asname) in modules:
                continue
            home = self._home(module) or _HOMES.get(name, API_MODULE)
            if home == API_MODULE:
                self.files.api_names.add(name)
                if name in _ROOMS:
                    self._names_of_package.add(asname or name)
            homes.setdefault(home, []).append(_renamed(name, asname))
        statements = [f"from .{home} import {', '.join(renamed)}" for home, renamed in homes.items()]
        for name, asname in modules:  # the first of the two lets transformers find the file
            statements += [f"from .{name} import __name__ as _", f"from . import {_renamed(name, asname)}"]
        return "; ".join(statements)

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


__all__ = ["CUSTOM_MODULE", "registered_in", "source_file_of", "user_sources"]

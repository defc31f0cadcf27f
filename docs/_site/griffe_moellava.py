# SPDX-License-Identifier: Apache-2.0
"""griffe's extension for the reference: lazily imported names, and docstrings in the form that transformers has.

There, a parameter reads ``name (`int` or `str`, *optional*, defaults to 4):``. griffe's parser for Google's style finds
the same sections and takes all that stands in the parentheses for the type. Here the type becomes one that is linked,
and the rest goes where it belongs.
"""

import re

import griffe


# The backticks around `T` make a link of it in transformers' docstrings.
_REFERENCE = re.compile(r"\[`~?([\w.]+)`\](?![\[(])")
_FORM = re.compile(
    r"(?P<type>(?:`[^`]*`|[^`])*?)"
    r"(?: of shape (?P<shape>`[^`]*`))?"
    r"(?P<optional>(?:, )?\*optional\*)?"
    r"(?:, (?P<rest>[^`].*))?"
)
_DEFAULT = re.compile(r"defaults to `?(.+?)`?")
_NAME = re.compile(r"`([^`]+)`|(\w[\w.]*)")


class Moellava(griffe.Extension):
    """Makes what a package imports on demand known as its members, and reads types, shapes and defaults."""

    def on_package(self, *, pkg: griffe.Module, **kwargs) -> None:
        """Called when the package and all its modules have been read."""
        self.public = {}
        for module in (pkg, *pkg.modules.values()):
            if "_HOMES" in module.members:
                self.add_on_demand(module)
        self.visit(pkg)

    def add_on_demand(self, module: griffe.Module) -> None:
        """Adds the names of a module's `_HOMES`, which says where its `__getattr__` finds them."""
        homes = module["_HOMES"].value
        for name, home in zip(homes.keys, homes.values, strict=True):
            name, home = name.strip("'\""), home.strip("'\"")
            self.public[name] = f"{module.path}.{name}"
            module.set_member(name, griffe.Alias(name, self.origin(module[home].members[name])))

    def origin(self, member: griffe.Object | griffe.Alias) -> str:
        """Returns the path of what a public name stands for.

        Of `register_encoder = ENCODERS.register` that is the method, which is shown without its `self`.
        """
        while member.is_alias:
            member = member.target
        instance, _, method = str(getattr(member, "value", None)).partition(".")
        made_by = getattr(member.parent.members.get(instance), "value", None)
        if not method or not isinstance(made_by, griffe.ExprCall):
            return member.path
        function = member.parent[f"{made_by.function}.{method}"]
        if "self" in function.parameters:
            del function.parameters["self"]
        return function.path

    def visit(self, owner: griffe.Object) -> None:
        """Reads the docstrings of an object and of all within it."""
        if owner.docstring:
            self.read(owner.docstring, owner)
        for member in owner.members.values():
            if not member.is_alias:
                self.visit(member)

    def read(self, docstring: griffe.Docstring, owner: griffe.Object) -> None:
        """Changes what griffe has read out of a docstring; it keeps that, and renders it."""
        docstring.value = _REFERENCE.sub(self.link, docstring.value)
        for section in docstring.parsed:
            if section.kind is griffe.DocstringSectionKind.parameters:
                for entry in section.value:
                    fields = self.read_entry(entry, docstring)
                    if entry.default is None and (fields["optional"] or fields["default"]):
                        # Fields of a config: there is no constructor to read them from.
                        member = owner.members.get(entry.name)
                        entry.value = fields["default"] or str(getattr(member, "value", None))
            elif section.kind in (griffe.DocstringSectionKind.attributes, griffe.DocstringSectionKind.returns):
                for entry in section.value:
                    self.read_entry(entry, docstring)
            elif section.kind is griffe.DocstringSectionKind.raises:
                for entry in section.value:  # `A, B: ...` is a tuple to griffe
                    entry.annotation = str(entry.annotation).strip("()")

    def link(self, match: re.Match) -> str:
        """Returns a link to a name that is public, and any other as code."""
        target = self.public.get(match[1])
        return f"[`{match[1]}`][{target}]" if target else f"`{match[1]}`"

    def read_entry(self, entry, docstring: griffe.Docstring) -> dict[str, str | None]:
        """Sets an entry's type, and puts its shape and conditions into its description; returns what stood there."""
        if not isinstance(entry.annotation, str):
            return {"optional": None, "default": None}
        annotation = entry.annotation.partition("][")[0].lstrip("[").replace("~", "")
        if entry.name.endswith(","):  # `a, b (type)`, of which griffe's parser takes `a,` for the name of an attribute
            others, _, annotation = annotation.partition(" (")
            entry.name = f"{entry.name} {others}"
        fields = _FORM.fullmatch(annotation).groupdict()
        default = _DEFAULT.fullmatch(fields["rest"] or "")
        names = [code or word for code, word in _NAME.findall(fields["type"]) if word != "or"]
        entry.annotation = griffe.parse_docstring_annotation(" | ".join(names), docstring) if names else None
        facts = [f"Of shape {fields['shape']}." if fields["shape"] else None]
        if fields["rest"] and not default:
            facts.append(f"{fields['rest'][0].upper()}{fields['rest'][1:]}.")
        entry.description = " ".join([*filter(None, facts), entry.description.strip()])
        return {"optional": fields["optional"], "default": default and default[1]}

"""The registry of compression methods: the files of this folder.

``actors/methods/slicegpt.py`` defines ``SPEC`` and ``METHOD`` and is thereby the method
``slicegpt``. Nothing else needs to be edited. A file whose name starts with an underscore is shared
by several methods.
"""

import ast
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module, resources
from typing import Any

from planners.budget import candidates
from planners.errors import ConfigError
from planners.method import MethodSpec, Option, OptionSpec
from planners.spelling import did_you_mean


def available() -> tuple[str, ...]:
    """Return the names of all methods, sorted, without importing them."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name for name in names if not name.startswith("_")))


def require(name: str, *, where: str = "method") -> None:
    """Raise unless a method of that name exists, without importing any.

    Args:
        name: of the method.
        where: the key or option with the name, for the message.

    Raises:
        ConfigError: there is no such method; the message suggests the closest, the hint lists all.
    """
    if name not in available():
        raise ConfigError(
            f"{where}: unknown method {name!r}{did_you_mean(name, available())}",
            hint=f"available: {', '.join(available())}",
        )


def spec(name: str) -> MethodSpec:
    """Return the part of a method that the planners use.

    Raises:
        ConfigError: there is no such method.
    """
    found: MethodSpec = _module(name).SPEC
    return found


@dataclass(frozen=True, slots=True)
class Declared:
    """What a method's source declares of it, for people: see `planners.method.MethodSpec`."""

    name: str
    source: str
    modules: tuple[str, ...]
    options: tuple[OptionSpec, ...]


def declared(name: str) -> Declared:
    """Return what a method says of itself, without importing it.

    Importing a method takes seconds, for torch; help, lists and completion are there at once. In
    ``SPEC = MethodSpec(source=..., modules=..., options=(...))`` stand literals, ``OptionSpec`` of
    literals, or the names of such constants, from the same file or imported from planners.

    Raises:
        ConfigError: there is no such method.
    """
    require(name)
    source = resources.files(__name__).joinpath(f"{name}.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    (call,) = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "MethodSpec"
    ]
    given, known = {str(k.arg): k.value for k in call.keywords}, _Constants(tree)
    return Declared(
        name,
        known.value(given["source"]),
        known.value(given["modules"]),
        tuple(known.value(node) for node in getattr(given["options"], "elts", ())),
    )


def declared_options(name: str) -> tuple[OptionSpec, ...]:
    """Return the options of a method as its source declares them, without importing it.

    Raises:
        ConfigError: there is no such method.
    """
    return declared(name).options


def chosen(name: str, options: Mapping[str, Option]) -> MethodSpec:
    """Return the spec of a method combined with the competing methods that its options name.

    Args:
        name: of the method.
        options: all options of the method.

    Raises:
        ConfigError: a method does not exist, or cannot compete with this one.
    """
    own, joining = spec(name), candidates.others(name, options)
    for other in joining:
        require(other, where=f"options.{candidates.NAME}")
    return candidates.combined_spec(own, options, [spec(n) for n in joining]) if joining else own


def load(name: str) -> Any:
    """Return the tensor functions of a method.

    Raises:
        ConfigError: there is no such method.
    """
    return _module(name).METHOD


class _Constants:
    """The values of names in a source file that is not executed."""

    def __init__(self, tree: ast.Module) -> None:
        self._imported = {
            alias.asname or alias.name: (node.module or "", alias.name)
            for node in tree.body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        self._own = {
            ast.unparse(node.targets[0]): node.value
            for node in tree.body
            if isinstance(node, ast.Assign)
        }

    def value(self, node: ast.expr) -> Any:
        """Return a literal, an ``OptionSpec`` of literals, or what a name stands for."""
        if isinstance(node, ast.Call):
            return OptionSpec(**{str(k.arg): ast.literal_eval(k.value) for k in node.keywords})
        if not isinstance(node, ast.Name):
            return ast.literal_eval(node)
        if node.id in self._own:
            return self.value(self._own[node.id])
        module, attribute = self._imported[node.id]
        return getattr(import_module(module), attribute)


def _module(name: str) -> Any:
    require(name)
    return import_module(f"actors.methods.{name}")

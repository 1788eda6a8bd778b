"""The registry of compression methods: the files of this folder.

``actors/methods/slicegpt.py`` defines ``SPEC`` and ``METHOD`` and is thereby the method
``slicegpt``. Nothing else needs to be edited. A file whose name starts with an underscore is shared
by several methods.
"""

import ast
import pkgutil
from collections.abc import Mapping
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


def declared_options(name: str) -> tuple[OptionSpec, ...]:
    """Return the options of a method as its source declares them, without importing it.

    Importing a method takes seconds, for torch; help and completion are there at once. In
    ``SPEC = MethodSpec(options=(...))`` stand an ``OptionSpec`` of literals, or the name of one
    that is imported from planners.

    Raises:
        ConfigError: there is no such method.
    """
    require(name)
    source = resources.files(__name__).joinpath(f"{name}.py").read_text(encoding="utf-8")
    nodes = list(ast.walk(ast.parse(source)))
    imported = {
        alias.asname or alias.name: (node.module or "", alias.name)
        for node in nodes
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    calls = [n for n in nodes if isinstance(n, ast.Call) and ast.unparse(n.func) == "MethodSpec"]
    (options,) = [k.value for call in calls for k in call.keywords if k.arg == "options"]
    return tuple(
        _declared(node, imported)
        for node in ast.iter_child_nodes(options)
        if isinstance(node, ast.expr)
    )


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


def _declared(node: ast.expr, imported: Mapping[str, tuple[str, str]]) -> OptionSpec:
    if isinstance(node, ast.Call):
        return OptionSpec(**{str(k.arg): ast.literal_eval(k.value) for k in node.keywords})
    module, attribute = imported[ast.unparse(node)]
    found: OptionSpec = getattr(import_module(module), attribute)
    return found


def _module(name: str) -> Any:
    require(name)
    return import_module(f"actors.methods.{name}")

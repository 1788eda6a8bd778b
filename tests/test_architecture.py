"""The rules of the house that no linter knows."""

import ast
import re
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("orchestrator", "actors", "planners")
FOLDERS = (*PACKAGES, "tests", "examples", "benchmarks", ".ci")
METHODS = sorted(p.stem for p in (ROOT / "actors" / "methods").glob("[!_]*.py"))


def files_under(*folders: str) -> list[Path]:
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*"))
    return [p.relative_to(ROOT) for p in paths if p.is_file() and "__pycache__" not in p.parts]


def imports_of(path: Path) -> Iterator[str]:
    """Yield every module, and every name of a module, that a file imports anywhere in it."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = path.parts[: -node.level] if node.level else ()
            module = ".".join([*parents, *filter(None, [node.module])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def words_of(*documents: str) -> Iterator[str]:
    """Yield every fenced block and every code span of the documents, and where their links lead."""
    for document in documents:
        text = (ROOT / document).read_text()
        for fence, span in re.findall(r"```.*?\n(.*?)```|`([^`\n]+)`", text, re.DOTALL):
            yield fence or span
        yield from re.findall(r"\]\(([\w./-]+)[)#]", text)


def named_in_documents(pattern: str) -> set[str]:
    pages = [f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")]
    code = words_of("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", *pages)
    return {name for words in code for name in re.findall(pattern, words, re.MULTILINE)}


def exists(name: str) -> bool:
    """Say whether a name with a folder is a path from the root, and a bare one a file anywhere."""
    if "/" in name:
        return any(ROOT.glob(name))
    return (ROOT / name).is_file() or any(path.name == name for path in files_under(*FOLDERS))


def test_no_file_is_named_for_nothing_in_particular():
    vague = {"utils", "helpers", "common", "misc"}
    assert [p for p in files_under(*FOLDERS) if vague & {Path(part).stem for part in p.parts}] == []


def test_every_data_file_of_a_package_ships():
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    shipped = {
        path.relative_to(ROOT)
        for package, patterns in tools["setuptools"]["package-data"].items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    data = {path for path in files_under(*PACKAGES) if path.suffix != ".py"}
    assert data
    assert data - shipped == set()


def test_every_path_in_the_documents_exists():
    folders = "|".join(map(re.escape, FOLDERS))
    path = rf"(?:{folders})/(?:[\w.*/-]*[\w*/])?|[\w-]+\.(?:py|md|toml)"
    # Whole words, so that `benchmarks/results/<claim>.md` is no path.
    named = named_in_documents(rf"(?:^|(?<=[\s\"'(]))({path})(?=$|[\s\"'),;:.])")
    assert named
    assert {name for name in named if not exists(name)} == set()


def test_every_make_target_in_the_documents_exists():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = named_in_documents(r"(?:^|&&|;)[ \t]*(?:\$ )?(?:[A-Z_]+=\S+ )*make ([a-z][\w-]*)")
    assert named
    assert named - targets == set()


def test_every_sub_command_in_the_documents_exists():
    members = vars(import_module("orchestrator.cli.main")).values()
    commands = {c for group in members if isinstance(group, click.Group) for c in group.commands}
    named = named_in_documents(r"\bcompress-cluster +([a-z][a-z-]*)")
    assert named
    assert named - commands == set()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_names_its_source(name):
    assert import_module(f"actors.methods.{name}").SPEC.source.strip()


@pytest.mark.parametrize("name", METHODS)
def test_no_method_imports_another(name):
    imported = set(imports_of(Path("actors/methods", f"{name}.py")))
    assert [m for m in imported if re.match(r"actors\.methods\.[^_]", m)] == []


def test_a_script_of_the_benchmarks_finds_what_lies_beside_it_without_the_folder_above():
    scripts = [path for path in files_under("benchmarks") if path.suffix == ".py"]
    assert scripts
    for path in scripts:
        assert [name for name in imports_of(path) if name.split(".")[0] == "benchmarks"] == [], path

"""Writes every number, and every list that has a source, into README.md.

They stand between a line ``<!-- NAME: written by benchmarks/readme.py -->`` and a line
``<!-- end -->``. Runs the recipe of ``make demo`` and those of `RECIPES` through the command line
in a temporary directory, and takes what they print and their ``report.json``. A picture of the page
of the first goes to ``docs/report.png``, where a Chromium is installed.

    .venv/bin/python benchmarks/readme.py            measure and write; a few minutes
    .venv/bin/python benchmarks/readme.py --lists    write only what needs no run
    .venv/bin/python benchmarks/readme.py --check    say what is out of date; exit 1 if anything is

The check compares lists and counts word for word; of what was measured, all but the digits.
"""

import argparse
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
from result_file import ROOT, hardware, table, versions

from actors import methods
from actors.storage.sources import embedded_model
from orchestrator.cli.main import INTERRUPTED, cli
from orchestrator.recipe.method_options import resolve_options
from orchestrator.report.numbers import bytes_text, decimal, percent, seconds_text
from planners import errors
from planners.catalogue import CONFIGS, shape_of
from planners.families import known_types
from planners.method import Target
from planners.model.cost import dense_parameters, dense_start, model_parameters

README = ROOT / "README.md"
PICTURE = ROOT / "docs" / "report.png"
PICTURE_SIZE = (1180, 1350)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Beside the demo, which is the default method: the others at the same true size.
RECIPES = tuple(f"tiny --method {name}" for name in ("svdllm", "slicegpt"))
SLICES = (0.10, 0.20, 0.25, 0.30, 0.40, 0.50)
SLICED = ("llama-2-7b", "llama-2-13b", "llama-2-70b", "llama-3-8b")
COLUMNS = 80
BLOCK = re.compile(
    r"(<!-- ([a-z ]+): written by benchmarks/readme\.py -->\n)(.*?)(<!-- end -->)", re.DOTALL
)

Report = Mapping[str, Any]


def main() -> None:
    """Write the blocks, or say which are out of date."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--lists", action="store_true", help="write only what needs no run")
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if out of date")
    asked = parser.parse_args()
    if asked.check:
        wrong = _out_of_date()
        print("\n".join(wrong) or "README.md is up to date")
        sys.exit(bool(wrong))
    blocks = {name: write() for name, write in LISTS.items()}
    if not asked.lists:
        blocks |= _measured()
    text = BLOCK.sub(lambda m: f"{m[1]}\n{blocks.get(m[2], m[3].strip())}\n\n{m[4]}", _text())
    README.write_text(text, encoding="utf-8")
    print(f"written: {README.relative_to(ROOT)}")


def demo_command() -> str:
    """Return what ``make demo`` runs, as a user types it."""
    recipe = re.search(
        r"^demo:.*\n\t\$\(BIN\)/(.*)$",
        (ROOT / "Makefile").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert recipe is not None, "the Makefile has no target demo that begins with the command"
    return recipe[1]


def _commands() -> str:
    """Return the table of the commands, from their own help."""
    context = click.Context(cli)
    rows = []
    for name in cli.list_commands(context):
        command = cli.commands[name]
        if command.hidden:
            continue
        arguments = [p for p in command.params if isinstance(p, click.Argument)]
        usage = [a.make_metavar(context) for a in arguments]
        if isinstance(command, click.Group):
            inner = next(iter(command.commands.values())).params
            named = [p.make_metavar(context) for p in inner if isinstance(p, click.Argument)]
            usage = ["|".join(sorted(command.commands)), *named]
        words = " ".join(["compress-cluster", name, *usage]).replace("|", "\\|")
        rows.append((f"`{words}`", command.get_short_help_str(limit=200)))
    return table(("command", "does"), rows)


def _exit_codes() -> str:
    """Return the table of exit codes, from the tree of errors."""
    rows = {0: ["done; a run is READY"]}
    for _, found in inspect.getmembers(errors, inspect.isclass):
        if found is not errors.CompressionError:
            words = (found.__doc__ or "").partition("\n")[0].rstrip(".")
            said = f"`{found.__name__}`: {words[:1].lower()}{words[1:]}"
            rows.setdefault(found.exit_code, []).append(said)
    rows[1] = ["of a batch, some of its runs failed; else, a defect of this program"]
    rows[INTERRUPTED] = ["interrupted; the message says how to resume"]
    return table(("code", "means"), [(code, "; ".join(rows[code])) for code in sorted(rows)])


def _methods() -> str:
    """Return the table of the methods, from their SPECs."""
    rows = []
    for name in methods.available():
        spec = methods.spec(name)
        number = spec.source.removeprefix("arXiv:")
        first = (sys.modules[f"actors.methods.{name}"].__doc__ or "").partition("\n")[0]
        words = first.partition(": ")[2].rstrip(".")
        rows.append((f"`{name}`", words, f"[{number}](https://arxiv.org/abs/{number})"))
    return table(("method", "does", "paper"), rows)


def _slicing() -> str:
    """Return what nominal slices remove of known models, by their true counts."""
    spec = methods.spec("slicegpt")
    options = resolve_options(spec, {})
    removed = {
        (name, part): 1
        - model_parameters(
            shape_of(name),
            spec.form(shape_of(name), dense_start(shape_of(name)), Target(slice=part), options),
        )
        / dense_parameters(shape_of(name))
        for name in SLICED
        for part in SLICES
    }
    example = percent(removed["llama-2-7b", 0.25])
    rows = [(f"`{name}`", *(_signed(removed[name, part]) for part in SLICES)) for name in SLICED]
    head = ("nominal", *(percent(part, digits=0) for part in SLICES))
    return (
        f"A nominal slice of 25 % removes {example} of the parameters of Llama-2-7B: shortcut\n"
        "matrices come on top, and the head keeps its width. A slice of 10 % adds parameters.\n"
        "What nominal slices remove, by true counts:\n\n" + table(head, rows)
    )


def _models() -> str:
    """Return which checkpoints are read."""
    types = known_types()
    count = _embedded_parameters()
    return (
        f"- `tiny`, the model in the package: a Llama of {count:,} parameters;\n"
        f"- the short name of a model on the Hub: {', '.join(f'`{name}`' for name in CONFIGS)};\n"
        "- a Hub id, `org/name` or `org/name@revision`;\n"
        "- a directory that holds `config.json` and safetensors;\n"
        "- an `s3://` or `gs://` URI of such a directory.\n\n"
        f"Its `model_type` is one of {', '.join(f'`{t}`' for t in types)}; its weights are\n"
        "float32, bfloat16 or float16 in safetensors. Pickles are refused, and no code that comes\n"
        "with a model is run."
    )


LISTS: Mapping[str, Callable[[], str]] = {
    "commands": _commands,
    "exit codes": _exit_codes,
    "methods": _methods,
    "models": _models,
    "slicing": _slicing,
}
MEASURED = ("demo", "result")


def _measured() -> dict[str, str]:
    """Run the recipes and return the blocks that show what came out."""
    with tempfile.TemporaryDirectory(prefix="compress-cluster-readme-") as folder:
        command = demo_command()
        printed = _run(command, Path(folder))
        reports = {command: _report(command, Path(folder))}
        _take_picture(Path(folder) / _out(command) / "report.html")
        for index, recipe in enumerate(RECIPES):
            one = f"compress-cluster run {recipe} --out {index}"
            _run(one, Path(folder))
            reports[f"compress-cluster run {recipe}"] = _report(one, Path(folder))
        printed = printed.replace(str(Path(folder).resolve()), "/home/me/compress-cluster")
    return {"demo": _demo(printed), "result": _result(reports)}


def _run(command: str, folder: Path) -> str:
    print(command)
    words = shlex.split(command)
    words[0] = str(Path(sys.executable).parent / words[0])
    environment = {**os.environ, "COLUMNS": str(COLUMNS)}
    done = subprocess.run(
        words, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def _out(command: str) -> str:
    words = shlex.split(command)
    return words[words.index("--out") + 1]


def _report(command: str, folder: Path) -> Report:
    report: Report = json.loads(
        (folder / _out(command) / "report.json").read_text(encoding="utf-8")
    )
    return report


def _demo(printed: str) -> str:
    """Return the first and the last lines of what the demo prints; its table comes next."""
    lines = [line.rstrip() for line in printed.splitlines()]
    places = next(i for i, line in enumerate(lines) if line.startswith("checkpoint"))
    shown = [*lines[: lines.index("")], "...", *lines[places:]]
    return "```text\n" + "\n".join(shown) + "\n```"


def _result(reports: Mapping[str, Report]) -> str:
    first = next(iter(reports.values()))
    dense = (
        "dense", f"{first['parameters']['before']:,}", percent(1.0),
        bytes_text(first["bytes"]["before"]),
        decimal(first["evaluation"]["dense"]["perplexity"]), "",
    )  # fmt: skip
    rows = [dense, *(_row(command, report) for command, report in reports.items())]
    head = ("", "parameters", "kept", "checkpoint", "perplexity", "took")
    evaluation = first["evaluation"]
    return (
        table(head, rows) + "\n\n"
        f"All asked for {percent(first['target']['keep_fraction'], digits=0)} of the parameters; "
        "how close they come depends on the steps of a method.\n"
        f"Perplexity over the {evaluation['num_tokens']:,} predicted tokens of the embedded "
        f"evaluation text,\nin sequences of {evaluation['sequence_length']}. {hardware()}, one "
        f"worker of one thread, {time.strftime('%Y-%m-%d')};\ntime from the first worker's start "
        f"to the last check.\n{versions()}."
    )


def _row(command: str, report: Report) -> tuple[str, ...]:
    return (
        f"`{_label(command)}`",
        f"{report['parameters']['after']:,}",
        percent(report["parameters"]["keep_fraction"]),
        bytes_text(report["bytes"]["after"]),
        decimal(report["evaluation"]["compressed"]["perplexity"]),
        seconds_text(report["seconds"]["total"]),
    )


def _take_picture(page: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print(f"{PICTURE.relative_to(ROOT)} is as it was: none of {', '.join(BROWSERS)} is here")
        return
    PICTURE.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
                "--disable-background-networking", "--hide-scrollbars",
                f"--user-data-dir={profile}", f"--window-size={','.join(map(str, PICTURE_SIZE))}",
                f"--screenshot={PICTURE}", page.as_uri(),
            ],
            check=True, capture_output=True,
        )  # fmt: skip
    print(f"written: {PICTURE.relative_to(ROOT)}")


def _text() -> str:
    return README.read_text(encoding="utf-8")


def _out_of_date() -> list[str]:
    """Return what is wrong with the document, one line each."""
    found = {name: body.strip() for _, name, body, _ in BLOCK.findall(_text())}
    wrong = [f"no block {name!r}" for name in (*LISTS, *MEASURED) if name not in found]
    wrong += [f"a block {name!r} that nobody writes" for name in found.keys() - {*LISTS, *MEASURED}]
    wrong += [
        f"{name}: is not what the sources say; run benchmarks/readme.py --lists"
        for name, write in LISTS.items()
        if name in found and found[name] != write().strip()
    ]
    recipes = [demo_command(), *(f"compress-cluster run {recipe}" for recipe in RECIPES)]
    labels = [_label(recipe) for recipe in recipes]
    shown = re.findall(r"^\| `(.*?)`", found.get("result", ""), re.MULTILINE)
    if shown != labels:
        wrong.append(f"result: shows the recipes {shown}; they are {labels}")
    if "READY" not in found.get("demo", ""):
        wrong.append("demo: does not end READY")
    if not PICTURE.exists():
        wrong.append(f"{PICTURE.relative_to(ROOT)}: there is no such picture")
    return wrong


def _label(command: str) -> str:
    """Return a command without what every recipe here has in common."""
    return re.sub(r"compress-cluster | --out \S+| --yes", "", command)


def _signed(fraction: float) -> str:
    return percent(fraction).replace("-", "\u2212")


def _embedded_parameters() -> int:
    from actors.storage.checkpoint import Checkpoint

    return dense_parameters(Checkpoint(str(embedded_model())).shape)


if __name__ == "__main__":
    main()

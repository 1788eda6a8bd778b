"""The command line: all commands in one group, and the messages of failed ones."""

import json
import os
import shlex
import sys
from pathlib import Path

import click

from actors.storage.quoting import require_utf8
from orchestrator.cli import checks, commands, jobs, listings
from orchestrator.cli.output import echo, streams
from planners.errors import CompressionError, ConfigError

INTERRUPTED = 130
TREE = CompressionError.__module__


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="compress-cluster")
def cli() -> None:
    """Compress large language models without training, on a laptop or a cluster.

    \b
    compress-cluster run                            the model that comes with the package
    compress-cluster run DIR --keep-fraction 0.8    a Llama, Mistral or Qwen2 checkpoint
    compress-cluster run llama-2-7b --address auto --workers 8
    The same command resumes an interrupted run.
    """  # noqa: D301 click's mark for lines to leave as they are


for _command in (*commands.ALL, *jobs.ALL, *checks.ALL, *listings.ALL):
    cli.add_command(_command)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with the code of its outcome."""
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    with streams():
        _invoke(arguments)


def _invoke(arguments: list[str]) -> None:
    json_ = "--json" in arguments
    try:
        _require_names(arguments)
        cli.main(arguments, prog_name="compress-cluster", standalone_mode=False)
    except CompressionError as error:
        said = [_as_given(text, arguments) for text in (str(error), error.hint)]
        # A module's own error class is reported by its base in the tree of errors.
        kinds = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == TREE]
        _complain(kinds[0], *said, json_=json_)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        asked = getattr(error, "ctx", None)
        hint = f"see {asked.command_path if asked else 'compress-cluster'} --help"
        _complain("ConfigError", error.format_message(), hint, json_=json_)
        sys.exit(ConfigError.exit_code)
    except (KeyboardInterrupt, click.Abort):
        resume = f"to resume: {shlex.join(['compress-cluster', *arguments])}"
        _complain("Interrupted", "finished work is kept", resume, json_=json_)
        sys.stdout.flush()
        sys.stderr.flush()
        # Ctrl-C went to Ray's processes too: on its way out Ray would make another code of this.
        os._exit(INTERRUPTED)


def _require_names(arguments: list[str]) -> None:
    """Refuse names that recipes, journals and reports, which are UTF-8, cannot contain.

    Raises:
        ConfigError: an argument is not UTF-8, or the locale has no letters for it.
    """
    for word in arguments:
        require_utf8(word, ConfigError)
        names = sys.getfilesystemencoding()
        if not word.isascii() and names != "utf-8":
            raise ConfigError(
                f"{os.fsencode(word).decode()}: cannot be named in this locale, which is {names}",
                hint="set PYTHONUTF8=1, or a UTF-8 locale: LC_ALL=C.UTF-8",
            )


def _as_given(text: str, arguments: list[str]) -> str:
    """Return a message with paths below the working directory relative, if they were so typed."""
    here = f"{Path.cwd()}/"
    return text if any(here in word for word in arguments) else text.replace(here, "")


def _complain(kind: str, message: str, hint: str, *, json_: bool) -> None:
    if json_:
        error = {"class": kind, "message": message, "hint": hint}
        echo(json.dumps({"error": error}))
    echo(f"{kind}: {message}", err=True)
    if hint:
        echo(f"  {hint}", err=True)

"""Print what an export in the deci form wrote."""

from actors.storage.files import Directory
from orchestrator.cli.output import emit, stdout
from orchestrator.experiments.deci import export_deci as do_export
from orchestrator.report.numbers import percent
from orchestrator.report.serving import serving, serving_pairs


def export_deci(run_uri: str, out: str, *, json_: bool) -> None:
    """Write the result of a run in the deci form and print how it is served."""
    found = do_export(Directory(run_uri), out)
    added = found.parameters_added
    document = {
        "out": found.uri,
        "widths": found.widths,
        "widths_before": found.before,
        "parameters": found.parameters,
        "parameters_added": added,
    }

    def show() -> None:
        stdout.print(found.uri, style="bold", soft_wrap=True)
        stdout.print(
            f"{added:,} zeros were added to {found.parameters:,} parameters "
            f"({percent(added / found.parameters)}): widths are multiples of 256"
        )
        stdout.print("compared with the result, tensor by tensor: equal")
        for engine, said in serving_pairs(serving(found.config), found.uri, quoted=False):
            stdout.print(f"{engine}: {said}", soft_wrap=True)

    emit(document, show, json_=json_)

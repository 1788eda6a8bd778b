"""The card, the report page and the terminal say which engines serve a result, and how."""

import json

import pytest
from rich.console import Console

from orchestrator.report.page import render_page
from orchestrator.report.terminal import render_terminal
from tests.builders import run_local, save_model


def shown(report):
    console = Console(width=200)
    with console.capture() as capture:
        console.print(render_terminal(report))
    return capture.get()


@pytest.mark.slow
def test_a_result_says_where_it_is_read(tmp_path):
    model = save_model(tmp_path / "dense")
    report = run_local(model, tmp_path / "run", method="modegpt", keep_fraction=0.8,
                       options={"modules": "mlp", "allocation": "uniform"})  # fmt: skip
    path = tmp_path / "run/model"
    card = (path / "README.md").read_text()
    assert (
        '- transformers: `AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)`'
        in card
    )
    assert "- llama.cpp: no: its format has no such layers; compress-cluster export RUN" in card
    assert "- vLLM: no: its fast attention kernels have no head width 8" in card
    assert json.loads((tmp_path / "run/report.json").read_text())["serving"] == report["serving"]
    page = render_page(report).replace("<wbr>", "")
    assert f"python -m sglang.launch_server --model-path {path} --trust-remote-code" in page
    (line,) = [line for line in shown(report).splitlines() if line.startswith("served by")]
    assert "transformers, SGLang; not vLLM, llama.cpp" in line

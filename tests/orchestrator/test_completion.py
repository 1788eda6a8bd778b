"""What Tab proposes, by the way a shell asks for it."""

import json
import os
import subprocess
import sys

import pytest

ASKED = """
import contextlib, io, json, os, sys
from orchestrator.cli.main import main
os.environ["_COMPRESS_CLUSTER_COMPLETE"] = "bash_complete"
said = []
for line in json.load(sys.stdin):
    os.environ["COMP_WORDS"] = line
    os.environ["COMP_CWORD"] = str(len(line.split(" ")) - 1)
    out = io.TextIOWrapper(io.BytesIO())
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([])
    said.append(out.buffer.getvalue().decode().splitlines())
print(json.dumps([said, sorted({"torch", "ray", "transformers", "pydantic"} & set(sys.modules))]))
"""
LINES = {
    "run lla": ["dir,", "plain,llama-2-7b", "plain,llama-2-13b", "plain,llama-2-70b",
                "plain,llama-3-8b", "plain,llama-3-70b"],
    "run --method ": [
        "plain,basis_sharing", "plain,deltallm", "plain,gptq", "plain,modegpt", "plain,slicegpt",
        "plain,svdllm",
    ],
    "run --option al": [f"plain,allocation={v}" for v in ("uniform", "influence", "marginal")],
    # bash makes three words of KEY=VALUE, and puts what comes in the place of the last one
    "run --option allocation =": ["plain,uniform", "plain,influence", "plain,marginal"],
    "run --option allocation = ma": ["plain,marginal"],
    "run tiny --option=allocation=ma": ["plain,allocation=marginal"],
    "run --method slicegpt --option rotation = ": ["plain,per_site", "plain,shared"],
    "run --slice 0.25 --option ro": ["plain,rotation=per_site", "plain,rotation=shared"],
    "run --slice 0.25 --option mu": ["plain,multiple_of=0"],
    "run -r qu": ["file,", "plain,quick"],
    "run --calibration w": ["file,", "plain,wikitext2"],
    "run --device c": ["plain,cpu", "plain,cuda"],
    "sweep runs/x --method modegpt,s": ["plain,modegpt,slicegpt", "plain,modegpt,svdllm"],
    "status runs/": ["dir,", "plain,runs/one"],
    "report on": ["dir,", "plain,one"],
    "export one --point mo": ["plain,modegpt-0.8"],
    "recipes show st": ["file,", "plain,stock"],
}  # fmt: skip


@pytest.fixture(scope="module")
def proposed(tmp_path_factory):
    """Return line -> what is proposed there, and which heavy modules that took."""
    folder = tmp_path_factory.mktemp("desk")
    for run in (folder / "runs/one", folder / "one"):
        run.mkdir(parents=True)
        (run / "plan.json").touch()
    (folder / "runs/no-run").mkdir()
    (folder / "one/pareto.json").write_text(json.dumps({"points": [{"name": "modegpt-0.8"}]}))
    done = subprocess.run(
        [sys.executable, "-c", ASKED], input=json.dumps([f"compress-cluster {x}" for x in LINES]),
        cwd=folder, capture_output=True, text=True, check=True, env=dict(os.environ),
    )  # fmt: skip
    said, heavy = json.loads(done.stdout)
    return dict(zip(LINES, said, strict=True)), heavy


@pytest.mark.parametrize("line", LINES)
def test_tab_proposes_the_values_that_fit(proposed, line):
    assert proposed[0][line] == LINES[line]


def test_proposing_imports_nothing_that_takes_long(proposed):
    assert set(proposed[1]) <= {"pydantic"}

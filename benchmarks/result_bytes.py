"""Print the sha256 of every file that three reference runs write: checkpoint and kept statistics.

A refactor prints the same lines before and after. Only the command line is used, so the script runs
against any commit:

    .venv/bin/python benchmarks/result_bytes.py > before.txt    # and again after the change
    diff before.txt after.txt

The runs are that of `make demo`, one of MoDeGPT with refit, and the two steps of
`examples/two_steps.yaml`.
"""

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMAND = Path(sys.executable).with_name("compress-cluster")
RUNS = {
    "demo": ("tiny",),
    "refit": ("tiny", "--method", "modegpt", "--keep-fraction", "0.8", "--option", "refit=true"),
    "two-steps": ("-r", str(ROOT / "examples" / "two_steps.yaml")),
}
FOLDERS = ("model", "stats", "steps")
SUFFIX = ".safetensors"


def main() -> None:
    """Do the runs and print one line a file: its hash, run and name."""
    with tempfile.TemporaryDirectory() as folder:
        for name, words in RUNS.items():
            out = Path(folder) / name
            command = [str(COMMAND), "run", *words, "--keep-statistics", "--out", str(out), "--yes"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            files = (file for kept in FOLDERS for file in (out / kept).rglob(f"*{SUFFIX}"))
            for file in sorted(files):
                digest = hashlib.sha256(file.read_bytes()).hexdigest()
                print(digest, f"{name}/{file.relative_to(out)}", flush=True)


if __name__ == "__main__":
    main()

"""Takes the pictures of ``docs/``: ``watch``, Ray's Actors page, and the report on a phone.

Runs the embedded model on a local Ray with a dashboard, and looks at it while it works and when it
is READY. Needs a Chromium. The report on a desk is taken by ``benchmarks/readme.py``, of the run
whose numbers stand beside it.

    .venv/bin/python docs/screens.py [--out docs]
"""

import argparse
import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from orchestrator.remote.snapshot import Watcher
from orchestrator.remote.watch_screen import screen

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
COLUMNS, WIDTH = 100, 1100  # characters; pixels
RUN = ("run", "tiny", "--workers", "2",
       "--option", "damage=loss", "--calibration", "stdlib", "--calibration-sequences", "96",
       "--dashboard", "--yes")  # fmt: skip
DASHBOARD = "http://127.0.0.1:8265/#/actors"
SLOW = 9000  # milliseconds that the dashboard takes to fill


def main() -> None:
    """Run, look, and write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    out: Path = parser.parse_args().out
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit("needs one of: " + ", ".join(BROWSERS))
    with tempfile.TemporaryDirectory(prefix="screens-") as name:
        folder = Path(name)
        run = folder / "runs" / "tiny"
        command = Path(sys.executable).with_name("compress-cluster")
        environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
        with (folder / "log").open("wb") as log:
            driver = subprocess.Popen(
                [str(command), *RUN, "--out", str(run)], stdout=log, stderr=log, env=environment
            )
        seen_watch = seen_actors = False
        while driver.poll() is None:
            time.sleep(0.5)
            if not seen_watch:
                seen_watch = _watch(browser, run, folder, out / "watch.png")
            elif not seen_actors:
                shoot(browser, DASHBOARD, out / "actors.png", (1400, 520), folder, wait=SLOW)
                seen_actors = True
        if driver.returncode:
            sys.exit((folder / "log").read_text()[-2000:])
        _phone(browser, run / "report.html", folder, out / "report-phone.png")
    sys.stdout.write(f"written: {out}/report-phone.png, watch.png, actors.png\n")


def shoot(
    browser: str, url: str, picture: Path, size: tuple[int, int], folder: Path, *, wait: int = 3000
) -> None:
    """Take one picture of a page."""
    subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-dev-shm-usage", "--hide-scrollbars",
            "--allow-file-access-from-files", f"--user-data-dir={folder / 'profile'}",
            f"--window-size={size[0]},{size[1]}", f"--virtual-time-budget={wait}",
            f"--screenshot={picture.resolve()}", url,
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )  # fmt: skip


def _watch(browser: str, run: Path, folder: Path, picture: Path) -> bool:
    """Take the live screen in the middle of the work, if it is there by now."""
    found = Watcher(str(run)).snapshot()
    if found.verdict != "running" or found.phase is None or not found.workers:
        return False
    if not any(state != found.layers[0] for state in found.layers):
        return False  # all layers alike: the grid shows nothing yet
    if not all(worker.peak_bytes for worker in found.workers):
        return False  # no worker has done anything yet
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    shown = replace(found, uri="runs/tiny")  # where it lies here is of no interest
    console.print(screen(shown, price=0.0, now=time.time(), width=COLUMNS))
    drawing = folder / "watch.svg"
    drawing.write_text(console.export_svg(title="compress-cluster watch runs/tiny"))
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawing.read_text())
    assert box is not None, "rich's drawings say how large they are"
    size = (WIDTH, round(WIDTH * float(box[2]) / float(box[1])))
    with contextlib.suppress(subprocess.TimeoutExpired):
        shoot(browser, drawing.as_uri(), picture, size, folder)
    return True


def _phone(browser: str, report: Path, folder: Path, picture: Path) -> None:
    """Take the page as wide as a phone: a window is never so narrow, a frame in it is."""
    frame = folder / "phone.html"
    frame.write_text(
        f'<body style="margin:0;background:#888"><iframe src="{report.as_uri()}" width="390" '
        'height="1350" style="border:0"></iframe>'
    )
    shoot(browser, frame.as_uri(), picture, (390, 1350), folder)


if __name__ == "__main__":
    main()

"""The page in a real browser: no complaint, every plot has a size, phones can read it."""

import json
import re
import shutil
import subprocess

import pytest

from orchestrator.report import render_page
from tests.orchestrator.test_recovery_report import trained_globally, trained_locally
from tests.orchestrator.test_report import sample_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, which this machine has not"),
]
# A window is never narrower than some 500 px; a frame in it is. The page is looked at from here: it
# allows no script itself.
FRAME = """<body style="margin:0"><iframe src="page.html" width="%d" height="900"></iframe><script>
const look = () => {
  const frame = document.querySelector("iframe"), page = frame.contentDocument;
  const size = e => e.getBoundingClientRect(), style = e => frame.contentWindow.getComputedStyle(e);
  const scrolled = e => {
    for (let up = e.parentElement; up; up = up.parentElement)
      if (["auto", "scroll", "hidden"].includes(style(up).overflowX)) return true;
    return false;
  };
  const plots = [...page.querySelectorAll("svg")].filter(e => e.getClientRects().length);
  const wide = [...page.querySelectorAll("body *")].filter(
    e => size(e).right > frame.clientWidth + 1 && !scrolled(e) && !e.closest("svg"));
  const found = {
    window: frame.clientWidth, width: page.documentElement.scrollWidth,
    plots: plots.length, drawn: plots.filter(e => size(e).width > 40 && size(e).height > 20).length,
    wide: wide.slice(0, 3).map(e => e.tagName + " " + e.className),
    background: style(page.body).backgroundColor,
    small: [...page.querySelectorAll("p, td, th, li")].filter(
      e => parseFloat(style(e).fontSize) < 11).length,
  };
  document.title = "found " + JSON.stringify(found);
};
addEventListener("load", () => setTimeout(look, 300));
</script>"""


def look(tmp_path, *, width, dark=False, page=None):
    """Return what a browser window of that width makes of the page, and its complaints."""
    (tmp_path / "page.html").write_text(page or sample_page())
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME % width)
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-dev-shm-usage", "--disable-background-networking",
        "--allow-file-access-from-files", "--enable-logging=stderr", "--log-level=0",
        f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=4000",
        *(["--blink-settings=preferredColorScheme=0"] if dark else []),
        "--dump-dom", frame.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    said = re.search(r"<title>found (.*?)</title>", done.stdout)
    assert said, done.stdout[:500] + done.stderr[-2000:]
    complaints = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return json.loads(said[1].replace("&quot;", '"').replace("&gt;", ">")), complaints


@pytest.mark.parametrize("width", [390, 1280])
def test_every_plot_is_drawn_and_nothing_leaves_the_window(tmp_path, width):
    found, complaints = look(tmp_path, width=width)
    assert not complaints
    assert found["window"] == width
    assert found["width"] <= width
    assert not found["wide"]
    assert found["plots"] >= 5
    assert found["drawn"] == found["plots"]
    assert not found["small"]


@pytest.mark.parametrize("report", [trained_globally(), trained_locally()], ids=["global", "local"])
def test_what_a_recovery_brought_fits_a_phone(tmp_path, report):
    page = render_page(report).replace("<details>", "<details open>")
    found, complaints = look(tmp_path, width=390, page=page)
    assert not complaints
    assert found["width"] <= 390
    assert not found["wide"]
    assert found["drawn"] == found["plots"] == 1


def test_dark_windows_get_a_dark_page(tmp_path):
    light, _ = look(tmp_path, width=800)
    dark, _ = look(tmp_path, width=800, dark=True)

    def brightness(colour):
        return sum(int(part) for part in re.findall(r"\d+", colour)[:3])

    assert brightness(light["background"]) > 600 > 200 > brightness(dark["background"])


def test_a_page_that_is_too_wide_and_complains_is_noticed(tmp_path):
    page = sample_page().replace(
        "</body>", '<p style="width:2000px">x</p><script>console.error("no")</script></body>'
    )
    found, complaints = look(tmp_path, width=390, page=page)
    assert found["width"] > 390
    assert found["wide"]
    assert complaints

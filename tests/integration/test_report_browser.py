"""The report in a real browser: its scripts run, nothing is wider than a telephone.

The report stands in a frame 360 pixels wide of a page that uses it and notes what it sees.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from distrec.report import write_report
from tests.unit.test_report import EVIL, complete_run

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="there is no chromium: apt-get install chromium"
)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--enable-logging=stderr", "--virtual-time-budget=5000", "--window-size=1000,2000",
)  # fmt: skip
PROBE = """
const frame = document.querySelector("iframe");
frame.addEventListener("load", () => {
  const page = frame.contentDocument;
  const byId = (id) => page.getElementById(id);
  const titles = () => [...page.querySelectorAll("#user .title")].map((one) => one.textContent);
  const said = () => byId("position").textContent;
  const shown = () => [...page.querySelectorAll("[data-cutoff]")]
    .filter((one) => !one.hidden).map((one) => `${one.dataset.split}@${one.dataset.cutoff}`);
  const seen = { width: page.documentElement.scrollWidth, room: page.documentElement.clientWidth };
  seen.first = byId("users").selectedOptions[0].textContent;
  seen.position = said();
  seen.titles = titles();
  seen.bars = page.querySelectorAll("#user .towers rect").length;
  byId("next").click();
  seen.second = [byId("users").selectedOptions[0].textContent, said()];
  const type = (text) => {
    byId("search").value = text;
    byId("search").dispatchEvent(new frame.contentWindow.Event("input"));
  };
  type("<B>FILM");
  seen.found = [byId("users").options.length, titles(), page.scripts.length];
  type("nobody at all");
  seen.none = [byId("users").options.length, said(), byId("next").disabled];
  seen.before = shown();
  page.querySelector('input[name="slices-cutoff"][value="5"]').click();
  page.querySelector('input[name="beyond-split"][value="valid"]').click();
  seen.after = shown();
  document.getElementById("seen").textContent = JSON.stringify(seen);
});
"""


def _look(directory: Path, page: str) -> tuple[dict[str, Any], str]:
    """What the probe saw, and what the browser wrote on its console."""
    harness = directory / "harness.html"
    frame = f'<iframe style="width:360px;height:800px;border:0" srcdoc="{html.escape(page)}">'
    harness.write_text(
        f'<!doctype html><meta charset="utf-8"><body><pre id="seen"></pre>{frame}</iframe>'
        f"<script>{PROBE}</script></body>",
        encoding="utf-8",
    )
    assert BROWSER is not None
    done = subprocess.run(
        [BROWSER, *FLAGS, f"--user-data-dir={directory / 'profile'}", "--dump-dom",
         harness.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    match = re.search(r'<pre id="seen">(.+?)</pre>', done.stdout, re.DOTALL)
    assert match is not None, done.stderr
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(match.group(1))), "\n".join(console)


def test_the_report_works_in_a_browser(tmp_path: Path) -> None:
    config = complete_run(tmp_path / "run")
    page = write_report(config).read_text(encoding="utf-8")
    seen, console = _look(tmp_path, page)
    assert console == ""
    assert seen["width"] <= seen["room"] <= 360
    data = json.loads(re.findall(r'id="sample-data">(.*?)</script>', page, re.DOTALL)[0])
    first, second = data["users"][:2]
    expected = [data["items"][entry[0]][0] for entry in first["recommendations"]]
    expected += [data["items"][item][0] for item, _ in first["history"]]
    assert seen["titles"] == expected
    assert expected
    assert seen["first"].split()[0] == first["id"]
    assert seen["position"] == "1 of 12"
    # three towers and the bias for each of five recommendations
    assert seen["bars"] == 20
    assert [seen["second"][0].split()[0], seen["second"][1]] == [second["id"], "2 of 12"]
    # the title that looks like markup is found as text, and has made no element
    users_found, titles, num_scripts = seen["found"]
    assert users_found >= 1
    assert EVIL in titles
    assert num_scripts == 2
    assert seen["none"] == [0, "Nobody here has that in their id or titles.", True]
    assert set(seen["before"]) == {"test@10"}
    assert set(seen["after"]) == {"valid@5"}
    assert len(seen["after"]) == len(seen["before"]) == 3


def test_the_probe_would_see_a_fault(tmp_path: Path) -> None:
    config = complete_run(tmp_path / "run")
    page = write_report(config).read_text(encoding="utf-8")
    wide = '<div style="width:900px">wide</div><script>evil()</script></main>'
    seen, console = _look(tmp_path, page.replace("</main>", wide))
    assert seen["width"] > seen["room"]
    # the page lets no script run but its own
    assert "Content Security Policy" in console

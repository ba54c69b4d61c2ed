"""The page in a real browser, where there is one: it draws, says nothing on the console, and can be used by keyboard.

MEGATRON_SEAD_BROWSER names a Chromium; else it is looked for in PATH.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megatron_sead.html_report.write import write_report
from tests.html_report.directories import rollout, write_run
from tests.html_report.test_report import HOSTILE

NAMES = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome", "chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=5000")


@pytest.fixture(scope="module")
def browser() -> str:
    found = os.environ.get("MEGATRON_SEAD_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("needs a Chromium, in PATH or where MEGATRON_SEAD_BROWSER says")
    return found


def seen(browser: str, page: Path, script: str, width: int = 1280) -> dict[str, Any]:
    """What a script that returns an object finds on the page, and what the browser logged as `console`."""
    # A figure is drawn when a frame shows it, and virtual time passes without frames, or before it is printed
    reports = "<script>addEventListener('load', () => { for (const name of ['beforeprint', 'afterprint'])"
    reports += f" dispatchEvent(new Event(name)); setTimeout(() => {{ const found = (() => {{ {script} }})();"
    reports += " document.body.dataset.found = JSON.stringify(found); }, 1500); });</script></body>"
    tried = page.with_name("tried.html")
    tried.write_text(page.read_text(encoding="utf-8").replace("</body>", reports), encoding="utf-8")
    size = f"--window-size={width},16000"
    ended = subprocess.run(
        [browser, *FLAGS, size, "--dump-dom", tried.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    found = re.search(r'data-found="([^"]*)"', ended.stdout)
    assert found is not None, ended.stderr[-2000:]
    console = [line for line in ended.stderr.splitlines() if ":CONSOLE" in line]
    return json.loads(html.unescape(found[1])) | {"console": console}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    shown = [
        rollout(),
        rollout((HOSTILE, "\n", "مرحبا", "", "\u202e"), question=HOSTILE, prompt_id="p2", correct=False),
    ]
    write_report([write_run(folder / "run", rollouts=shown)], folder / "report.html")
    return folder / "report.html"


DRAWN = """
  return {plots: document.querySelectorAll(".plot .main-svg").length > 0,
    undrawn: [...document.querySelectorAll(".plot")].filter((p) => !p.querySelector(".main-svg")).length,
    wide: document.documentElement.scrollWidth - innerWidth,
    unnamed: [...document.querySelectorAll("select, input")].filter((c) => !c.labels.length && !c.ariaLabel).length,
    told: [...document.querySelectorAll(".plot .main-svg")].filter((svg) => svg.ariaHidden !== "true").length,
    buttons: [...document.querySelectorAll(".plot")].map(({_context: c}) => c.modeBarButtons + c.plotlyServerURL),
    unheaded: [...document.querySelectorAll("th")].filter((th) => !th.textContent.trim()).length,
    images: document.images.length, title: document.title}
"""


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_draws_without_a_word_on_the_console(browser: str, page: Path, width: int) -> None:
    found = seen(browser, page, DRAWN, width)
    assert found["console"] == []
    assert found["plots"] and found["undrawn"] == 0 and found["unnamed"] == 0 and found["images"] == 0
    assert found["unheaded"] == 0 and found["told"] == 0
    assert set(found["buttons"]) == {"toImage,resetScale2d"}  # and none that sends a figure anywhere
    assert found["wide"] <= 0, "the page is wider than the screen"


USED = """
  const by = (id) => document.getElementById(id), count = () => by("list").children.length, found = {};
  found.all = count();
  by("by-verdict").value = "wrong"; by("by-verdict").dispatchEvent(new Event("input"));
  found.wrong = count();
  found.question = by("question").textContent;
  by("by-text").value = "no such words"; by("by-text").dispatchEvent(new Event("input"));
  found.none = count();
  by("by-text").value = ""; by("by-verdict").value = ""; by("by-text").dispatchEvent(new Event("input"));
  by("list").querySelector("button").click();
  const press = (key) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
  const buttons = [...by("list").querySelectorAll("button")];
  found.stops = buttons.filter((b) => b.tabIndex === 0).length;
  buttons[0].focus();
  const walk = (key) => { press(key); return buttons.indexOf(document.activeElement); };
  found.walked = ["ArrowDown", "End", "ArrowDown", "ArrowUp", "Home"].map(walk);
  const tokens = by("tokens");
  tokens.querySelector("[data-i='0']").focus();
  for (const key of ["ArrowRight", "ArrowRight", "ArrowLeft", "End"]) press(key);
  found.focused = document.activeElement.textContent;
  found.about = by("about").textContent;
  by("worst").querySelector("button").click();
  found.worst = by("about").textContent;
  return found;
"""


def test_rollouts_are_filtered_and_walked_by_keyboard(browser: str, page: Path) -> None:
    found = seen(browser, page, USED)
    assert found["console"] == []
    assert (found["all"], found["wrong"], found["none"]) == (4, 2, 0)
    assert found["question"] == HOSTILE.replace("\u2028", "\u2039U+2028\u203a")
    assert found["stops"] == 1 and found["walked"] == [1, 3, 3, 2, 0]
    assert found["focused"] == "<|end|>"
    assert "C: teacher unsure too" in found["about"] and '" other"' in found["about"]
    assert "50 %" in found["about"] and "0.625, 0.625 nats" in found["about"]
    assert found["worst"].startswith("token 5 of 5")


@pytest.mark.parametrize("width", [390, 1280])
def test_several_runs_draw_as_well(browser: str, tmp_path: Path, width: int) -> None:
    long = [rollout(level="x" * 80)]
    runs = [
        write_run(tmp_path / f"olmo3-7b-{m}-gated-lr1e-6-bs128-t1.0-seed{s}", policy=m, seed=s, rollouts=long)
        for m in ("sead", "opd")
        for s in (0, 1)
    ]
    write_report(runs, tmp_path / "several.html")
    found = seen(browser, tmp_path / "several.html", DRAWN, width)
    assert found["console"] == [] and found["undrawn"] == 0 and found["wide"] <= 0

"""A page in a real browser: Chromium, without a window. Tests are skipped where it is not installed."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_OFFLINE = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
_USUAL = ("--headless", "--no-sandbox", "--disable-gpu", *_OFFLINE)
# The page is in a frame, because a window has at least 500 pixels.
_HARNESS = """<!doctype html><meta charset="utf-8">
<iframe id="frame" style="width: {width}px; height: 900px; border: 0" srcdoc="{page}"></iframe>
<pre id="result"></pre>
<script>
  frame.onload = () => {{
    const page = frame.contentDocument;
    let result;
    try {{ result = (() => {{ {script} }})(); }} catch (error) {{ result = String(error); }}
    document.getElementById("result").textContent = JSON.stringify(result);
  }};
</script>
"""


def in_browser(page: str, script: str, folder: Path, width: int = 390, dark: bool = False) -> Any:
    """What ``script``, the body of a JavaScript function that sees the document as ``page``, returns, as JSON."""
    file = folder / "harness.html"
    # The frame has the origin of this file, so its scripts run and its document can be read.
    file.write_text(_HARNESS.format(width=width, page=html.escape(page), script=script), "utf-8", "replace")
    return json.loads(result_of(file, folder, f"--blink-settings=preferredColorScheme={0 if dark else 1}"))


def result_of(file: Path, folder: Path, *options: str, timeout: float = 60) -> str:
    """The text that a page has written into its element ``result``; the browser's profile goes into ``folder``."""
    program = next(filter(None, map(shutil.which, _NAMES)), None)
    if program is None:
        pytest.skip("needs Chromium")
    command = [program, *_USUAL, f"--user-data-dir={folder / 'profile'}", *options, "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=timeout, check=True)
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stderr[-2000:]
    return html.unescape(found[1])

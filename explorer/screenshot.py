"""
Draw the README's picture of the explorer: starts explore.py and takes a screenshot in a headless Chromium.

    python explorer/screenshot.py --run=release/reflow-mini

Needs the playwright package and the machine's own Chromium.
"""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import threads

import configurator
from configurator import UserError

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@dataclass
class ScreenshotConfig:
    run: str = "release/reflow-mini"  # whose page is drawn
    text: str = "The people of the"  # the prompt
    to: str = "assets/explorer.png"  # the picture


def main():
    (c,) = configurator.parse(ScreenshotConfig)
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise UserError("no Chromium on this machine: install one, such as Debian's package chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        raise UserError("playwright is not installed: pip install -r requirements-dev.txt") from None
    command = [sys.executable, str(ROOT / "explore.py"), f"--run={c.run}", "--port=0", "--no_browser"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = next((line.strip() for line in server.stdout if line.startswith("http")), None)
        if url is None:
            raise UserError("explore.py did not start: see above")
        with sync_playwright() as playwright:
            chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
            page = chromium.new_page(viewport={"width": 1040, "height": 900})
            page.goto(f"{url}&{urlencode({'text': c.text})}")
            page.locator("#map .cell").first.wait_for()
            page.locator("#terms .bar").first.wait_for()
            page.screenshot(path=c.to, full_page=True)
            chromium.close()
    finally:
        server.terminate()
        server.wait()
    print(c.to)


if __name__ == "__main__":
    configurator.run(main)

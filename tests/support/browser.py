"""A page as a person sees it: headless Chromium, driven over its own protocol."""

from __future__ import annotations

import asyncio
import base64
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next((found for found in map(shutil.which, NAMES) if found), None)
SECONDS = 90

TEXT = """(function text(node) {
  if (node.nodeType === Node.TEXT_NODE) return node.textContent + ' ';
  if (node.nodeName === 'STYLE' || node.nodeName === 'SCRIPT') return '';
  return [...(node.shadowRoot ? node.shadowRoot.childNodes : []), ...node.childNodes].map(text).join('');
})(document.body)"""
"""JavaScript: all text of the page, that inside of components too."""


def look(
    url: str, words: list[str], profile: Path, size: tuple[int, int] = (1280, 900), script: str = ""
) -> tuple[str, bytes]:
    """Open a page in Chromium, and wait until certain words are on it.

    Args:
        url: of the page.
        words: all of them are waited for.
        profile: an empty folder for the browser.
        size: of the window, in pixels.
        script: JavaScript that is run before the picture is taken.

    Returns:
        The text of the page, and the window as PNG.

    Raises:
        TimeoutError: they were not there within `SECONDS`.
    """
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    command += ["--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
    browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        return asyncio.run(_look(profile / "DevToolsActivePort", url, words, size, script))
    finally:
        browser.terminate()
        browser.wait()


async def _look(port: Path, url: str, words: list[str], size: tuple[int, int], script: str) -> tuple[str, bytes]:
    end = time.monotonic() + SECONDS
    while not (port.is_file() and port.read_text().strip()):
        await _wait(end, "Chromium did not start")
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port.read_text().split()[0]}/json") as answer:
            (page,) = [target for target in await answer.json() if target["type"] == "page"]
        async with session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            await _ask(
                socket,
                "Emulation.setDeviceMetricsOverride",
                width=size[0],
                height=size[1],
                deviceScaleFactor=1,
                mobile=False,
            )
            await _ask(socket, "Page.navigate", url=url)
            text = ""
            while not all(word in text for word in words):
                await _wait(end, f"{url} does not show {words}, but: {text}")
                text = " ".join(str(await _value(socket, TEXT)).split())
            if script:
                await _value(socket, script)
            await asyncio.sleep(3)  # curves move into their place
            picture = await _ask(socket, "Page.captureScreenshot", format="png")
    return text, base64.b64decode(picture["data"])


async def _value(socket: aiohttp.ClientWebSocketResponse, expression: str) -> Any:
    found = await _ask(socket, "Runtime.evaluate", expression=expression, returnByValue=True)
    return found.get("result", {}).get("value", "")


async def _ask(socket: aiohttp.ClientWebSocketResponse, method: str, **arguments: Any) -> dict[str, Any]:
    await socket.send_json({"id": 1, "method": method, "params": arguments})
    while True:  # one question at a time; events come in between
        reply = await socket.receive_json()
        if reply.get("id") == 1:
            return dict(reply.get("result", {}))


async def _wait(end: float, text: str) -> None:
    if time.monotonic() > end:
        raise TimeoutError(text)
    await asyncio.sleep(0.2)

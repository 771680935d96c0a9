"""Headless Chromium, told what to do over its DevTools pipe: what a page looks like to a browser."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    *("--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-extensions"),
)
TEXTS = """(() => {
  document.querySelectorAll('details').forEach(details => { details.open = true; });
  const channels = text => text.match(/[\\d.]+/g).map(Number);
  const light = rgb => {
    const [red, green, blue] = rgb.slice(0, 3).map(value => value / 255)
      .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const behind = element => {
    for (let at = element; at; at = at.parentElement) {
      const color = channels(getComputedStyle(at).backgroundColor);
      if (color.length === 3 || color[3] > 0) return color;
    }
    return [255, 255, 255];
  };
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  for (let node = walk.nextNode(); node; node = walk.nextNode()) {
    const element = node.parentElement, text = node.textContent.trim();
    if (!text || ['TITLE', 'DESC', 'title', 'desc'].includes(element.tagName)) continue;
    const style = getComputedStyle(element);
    const ink = element.namespaceURI.endsWith('svg') ? style.fill : style.color;
    const [high, low] = [light(channels(ink)), light(behind(element))].sort((one, other) => other - one);
    const box = element.getBoundingClientRect();
    found.push({ text, ratio: (high + 0.05) / (low + 0.05), pixels: parseFloat(style.fontSize) *
      (element.ownerSVGElement ? element.ownerSVGElement.getScreenCTM().a : 1), width: box.width });
  }
  return found;
})()"""


@dataclass(frozen=True)
class Seen:
    """A page as it was loaded: what the browser complained of, all it asked for, its size and its texts."""

    complaints: list[str]
    requests: list[str]
    scroll_width: int
    client_width: int
    texts: list[dict[str, Any]]


class Browser:
    """One Chromium for many pages."""

    def __init__(self, profile: Path) -> None:
        assert PROGRAM is not None
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        # Chromium reads from descriptor 3 and writes to 4; from 10 up none of ours can be one of these.
        ours = [fcntl.fcntl(number, fcntl.F_DUPFD, 10) for number in (to_read, to_write)]
        script = f'exec "$0" "$@" 3<&{ours[0]} 4>&{ours[1]}'
        flags = (*FLAGS, f"--user-data-dir={profile}", "about:blank")
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(["bash", "-c", script, PROGRAM, *flags], pass_fds=ours, **quiet)  # type: ignore[call-overload]
        for number in (to_read, to_write, *ours):
            os.close(number)
        self._left, self._id, self._events = b"", 0, []  # type: tuple[bytes, int, list[dict[str, Any]]]
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = None
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    _session: str | None = None

    def close(self) -> None:
        """End it."""
        with contextlib.suppress(EOFError, BrokenPipeError):
            self._session = None
            self._call("Browser.close")
        self._process.wait(timeout=30)
        os.close(self._write)
        os.close(self._read)

    def see(self, page: Path, width: int, theme: str) -> Seen:
        """Load a file in a window `width` CSS pixels wide, in a light or a dark theme."""
        mobile = width < 600
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 2 if mobile else 1, "mobile": mobile}
        self._call("Emulation.setDeviceMetricsOverride", **metrics)
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        self._events = []
        self._call("Page.navigate", url=page.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._take()
        texts = self._value(TEXTS)
        sizes = self._value("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        return Seen(list(self._complaints()), list(self._requests()), *sizes, texts)

    def screenshot(self, height: int | None = None) -> bytes:
        """The page at hand as PNG: all of it, or its first `height` CSS pixels."""
        if height is None:
            return base64.b64decode(self._call("Page.captureScreenshot", captureBeyondViewport=True)["data"])
        width = self._value("document.documentElement.clientWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        shot = self._call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        return base64.b64decode(shot["data"])

    def _complaints(self) -> Iterator[str]:
        for event in self._events:
            if event["method"] in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
                yield json.dumps(event["params"])

    def _requests(self) -> Iterator[str]:
        for event in self._events:
            if event["method"] == "Network.requestWillBeSent":
                yield event["params"]["request"]["url"]

    def _value(self, script: str) -> Any:
        result = self._call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"]["value"]

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._id += 1
        message = {"id": self._id, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._take()).get("id") != self._id:
            pass
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def _take(self) -> dict[str, Any]:
        """The next message; an event is kept."""
        while b"\0" not in self._left:
            read = os.read(self._read, 1 << 16)
            if not read:
                raise EOFError("chromium has ended")
            self._left += read
        text, _, self._left = self._left.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        if "method" in message:
            self._events.append(message)
        return message

"""A headless Chromium, driven over its DevTools pipe: https://chromedevtools.github.io/devtools-protocol/."""

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium-headless-shell", "chromium", "google-chrome")
SECONDS = 600.0  # a longer wait counts as a hang
CHROMIUM = next(filter(None, map(shutil.which, PROGRAMS)), None)


class Browser:
    """One page of a browser.

    Attributes:
        errors: Texts of console messages, exceptions and failed requests so far.
        requests: Addresses that the page has requested, without data: URIs.
    """

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write, self._rest, self._number, self._session = read, write, b"", 0, ""
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._loads = 0
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Calls a method of the protocol and returns its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self._note(answer)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def open(
        self,
        page: Path | str,
        *,
        dark: bool = False,
        width: int = 1200,
        height: int = 800,
        scale: float = 1,
        script: bool = True,
    ) -> None:
        """Loads a file or an address. `script=False` disables scripts. A picture has `scale` pixels per CSS pixel."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self("Emulation.setEmulatedMedia", features=scheme)
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False)
        self("Emulation.setScriptExecutionDisabled", value=not script)
        loads = self._loads
        self("Page.navigate", url=page if isinstance(page, str) else page.absolute().as_uri())
        while self._loads == loads:
            self._note(self._next())

    def value(self, expression: str) -> Any:
        """Returns the value of a JavaScript expression, also if the page's own scripts are off."""
        result = self("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, key: str) -> None:
        """Presses a key such as `Tab`, `ArrowLeft`, `Enter` or ` `."""
        codes = {"Tab": 9, "Enter": 13, " ": 32, "ArrowLeft": 37, "ArrowRight": 39}
        text = {"Enter": "\r", " ": " "}.get(key, "")
        for kind in ("keyDown" if text else "rawKeyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key], text=text)

    def picture(self, path: Path, *, whole: bool = True, **options: Any) -> Path:
        """Writes a PNG of the page; `options` are further parameters of Page.captureScreenshot."""
        shot = self("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **options)
        path.write_bytes(base64.b64decode(shot["data"]))
        return path

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + SECONDS
        while b"\0" not in self._rest:
            assert time.monotonic() < deadline, "the browser does not answer"
            part = os.read(self._read, 1 << 16)
            assert part, "the browser has ended"
            self._rest += part
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        method, about = event.get("method"), event.get("params", {})
        self._loads += method == "Page.loadEventFired"
        if method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded", "Network.loadingFailed"):
            self.errors.append(json.dumps(about))
        if method == "Network.requestWillBeSent" and not (url := about["request"]["url"]).startswith("data:"):
            self.requests.append(url)


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Starts Chromium with a new profile, and ends it afterwards."""
    assert CHROMIUM is not None, f"none of {PROGRAMS} is installed"
    (theirs, write), (read, answers) = os.pipe(), os.pipe()

    def give() -> None:  # Chromium reads from file 3 and writes to file 4
        ours = os.dup(theirs), os.dup(answers)
        os.dup2(ours[0], 3)
        os.dup2(ours[1], 4)

    options = ["--headless", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    process = subprocess.Popen(
        [CHROMIUM, *options], preexec_fn=give, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        os.close(theirs)
        os.close(answers)
        page = Browser(read, write)
        yield page
        page("Browser.close")
        process.wait(SECONDS)
    finally:
        process.kill()
        process.wait(SECONDS)
        os.close(read)
        os.close(write)

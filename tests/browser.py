"""A headless Chromium for tests of pages, driven through ChromeDriver's own protocol: W3C WebDriver, JSON over HTTP.

Source: https://www.w3.org/TR/webdriver2/.
"""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Without these Chromium tries to reach its maker, or refuses to start as root.
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
)
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
# Key codes of the protocol.
ENTER, ESCAPE = "\ue007", "\ue00c"


class Browser:
    """One window.

    Args:
        address: Of the session at the driver.
    """

    def __init__(self, address: str):
        self._address = address

    def open(self, url: str) -> None:
        """Go to a page and wait until it is loaded."""
        _call("POST", f"{self._address}/url", {"url": url})

    def run(self, script: str) -> Any:
        """What a function body in JavaScript returns."""
        return _call("POST", f"{self._address}/execute/sync", {"script": script, "args": []})

    def wait(self, script: str, seconds: float = 20) -> Any:
        """What an expression in JavaScript comes to, once that is true."""
        until = time.monotonic() + seconds
        while not (value := self.run(f"return {script};")):
            assert time.monotonic() < until, f"still false after {seconds} s: {script}; errors: {self.errors()}"
            time.sleep(0.05)
        return value

    def click(self, selector: str) -> None:
        """Click an element."""
        _call("POST", f"{self._address}/element/{self._find(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        """Type into an element."""
        _call("POST", f"{self._address}/element/{self._find(selector)}/value", {"text": text})

    def screenshot(self, path: Path) -> bytes:
        """Write what is seen as a PNG file."""
        path.write_bytes(image := base64.b64decode(_call("GET", f"{self._address}/screenshot")))
        return image

    def emulate(self, **features: str) -> None:
        """Set media features, such as `prefers_color_scheme="dark"`."""
        listed = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        params = {"cmd": "Emulation.setEmulatedMedia", "params": {"features": listed}}
        _call("POST", f"{self._address}/goog/cdp/execute", params)

    def errors(self) -> list[str]:
        """What the console has had of errors since the last call."""
        entries = _call("POST", f"{self._address}/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    def _find(self, selector: str) -> str:
        found = _call("POST", f"{self._address}/element", {"using": "css selector", "value": selector})
        return found[_ELEMENT]


@contextmanager
def chromium(profile: Path, *, width: int = 1280, height: int = 860) -> Iterator[Browser]:
    """A browser without a past.

    Args:
        profile: An empty folder for its files.
        width: Of the window, in pixels.
        height: Likewise.

    Returns:
        A context with the browser.
    """
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    assert not missing, f"{' and '.join(missing)} not found: `make browser` installs Debian's packages, as root"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        root = f"http://127.0.0.1:{port}"
        _until(lambda: _call("GET", f"{root}/status")["ready"], driver)
        flags = [*_FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"]
        options = {"args": flags, "binary": shutil.which("chromium")}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = _call("POST", f"{root}/session", {"capabilities": {"alwaysMatch": wanted}})
        address = f"{root}/session/{session['sessionId']}"
        try:
            yield Browser(address)
        finally:
            _call("DELETE", address)
    finally:
        driver.terminate()
        driver.wait(20)


def _until(is_ready: Callable[[], bool], driver: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        assert driver.poll() is None, f"chromedriver ended with {driver.returncode}"
        try:
            if is_ready():
                return
        except urllib.error.URLError:
            pass
        time.sleep(0.05)
    raise AssertionError("chromedriver does not answer")


def _call(method: str, url: str, body: Any = None) -> Any:
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, content, {"Content-Type": "application/json"}, method=method)
    # No proxy stands between this and a driver on the same machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=120) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{method} {url}: {error.read().decode()[:400]}") from None

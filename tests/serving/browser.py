"""A headless Chromium that is driven by the keyboard, over its DevTools protocol."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-background-networking", "--remote-debugging-port=0")  # fmt: skip
_PATIENCE_S = 30.0
_KEYS = {"Tab": (9, ""), "Enter": (13, "\r")}


class Page:
    """One tab, and what happened in it."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection, self.calls = connection, 0
        self.complaints: list[str] = []
        """Errors and warnings in the console, exceptions that nobody caught."""
        self.asked: list[str] = []
        """Addresses of all requests."""
        for domain in ("Runtime", "Log", "Network", "Page"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.calls += 1
        self.connection.send(json.dumps({"id": self.calls, "method": method, "params": parameters}))
        while True:
            told = json.loads(self.connection.recv(timeout=_PATIENCE_S))
            if told.get("id") == self.calls:
                assert "error" not in told, told
                return dict(told["result"])
            self._note(told["method"], told["params"])

    def _note(self, event: str, told: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.asked.append(told["request"]["url"])
        elif event == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.complaints.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")
        elif event == "Runtime.exceptionThrown" or (
            event == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert")
        ):
            self.complaints.append(json.dumps(told)[:500])

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        told = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until it is true."""
        end = time.monotonic() + _PATIENCE_S
        while not self.evaluate(expression):
            assert time.monotonic() < end, f"never true: {expression}; {self.complaints}"
            time.sleep(0.05)

    def press(self, key: str) -> None:
        """``Tab``, ``Enter``, or a character."""
        code, text = _KEYS[key] if key in _KEYS else (ord(key.upper()), key)
        told = {"key": key, "code": key if key in _KEYS else "", "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **told)
        self.call("Input.dispatchKeyEvent", type="keyUp", **told)

    def type(self, text: str) -> None:
        for character in text:
            self.press(character)

    def focused(self) -> str:
        return str(self.evaluate("document.activeElement.id"))

    def text(self, name: str) -> str:
        return str(self.evaluate(f"document.getElementById({name!r}).textContent"))

    def is_shown(self, name: str) -> str:
        """An expression."""
        return f"document.getElementById({name!r}).offsetParent !== null"


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """``folder``: for its profile."""
    assert CHROMIUM
    process = subprocess.Popen([CHROMIUM, *_OPTIONS, f"--user-data-dir={folder}", "about:blank"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{_port(folder)}/json/list", timeout=_PATIENCE_S) as answer:
            (tab,) = [tab for tab in json.load(answer) if tab["type"] == "page"]
        with connect(tab["webSocketDebuggerUrl"], max_size=None, open_timeout=_PATIENCE_S) as connection:
            yield Page(connection)
    finally:
        process.terminate()
        process.wait(_PATIENCE_S)


def _port(folder: Path) -> int:
    told, end = folder / "DevToolsActivePort", time.monotonic() + _PATIENCE_S
    while not (told.exists() and "\n" in told.read_text()):
        assert time.monotonic() < end, "Chromium does not start"
        time.sleep(0.05)
    return int(told.read_text().split("\n")[0])

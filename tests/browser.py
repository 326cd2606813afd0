"""A headless Chromium that tests drive over a pipe (the DevTools protocol): no package needed."""

import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
#: becomes the browser, which reads from its file 3 and writes to its file 4
START = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
os.dup2(ends[0], 3)
os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
#: seconds until a browser that says nothing is given up
PATIENCE = 120


def found():
    """The browser's program; None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One process; :meth:`page` opens files in it, one after another."""

    def __init__(self, program, profile):
        here, their_output = os.pipe()
        their_input, there = os.pipe()
        for number in (here, there):
            os.set_inheritable(number, False)
        options = [
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *("--disable-extensions", "--disable-background-networking", "--mute-audio"),
            *("--disable-dev-shm-usage", "--remote-debugging-pipe", f"--user-data-dir={profile}"),
        ]
        ends = (str(their_input), str(their_output))
        self.process = subprocess.Popen(
            [sys.executable, "-Sc", START, *ends, program, *options, "about:blank"],
            pass_fds=(their_input, their_output),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(their_input)
        os.close(their_output)
        self._in, self._out, self._rest, self._count = here, there, b"", 0
        self.events = []
        self._session = None

    def _message(self):
        limit = time.monotonic() + PATIENCE
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], max(0, limit - time.monotonic()))
            data = os.read(self._in, 1 << 20) if ready else b""
            assert data, "the browser ended, or says nothing"
            self._rest += data
        one, _, self._rest = self._rest.partition(b"\0")
        return json.loads(one)

    def send(self, method, **params):
        """The result of a command; what happens meanwhile becomes :attr:`events`."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        while True:
            found = self._message()
            if found.get("id") == self._count:
                assert "error" not in found, found["error"]
                return found["result"]
            self.events.append(found)

    def attach(self):
        """Take the first page, and hear of its errors and requests."""
        (target, *_) = (
            t for t in self.send("Target.getTargets")["targetInfos"] if t["type"] == "page"
        )
        session = self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = session["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def page(self, file, size=(1100, 900), dark=False, hash=""):
        """Open a page from the disk, and wait until it says that it is ready."""
        self.screen(*size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url="about:blank")
        self.events.clear()
        self.send("Page.navigate", url=f"{file.resolve().as_uri()}{hash}")
        self.until("document.body?.dataset.ready === 'yes'")

    def screen(self, width, height):
        """A window of so many pixels."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def js(self, expression):
        """The value of an expression in the page."""
        done = self.send(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def until(self, expression):
        """Wait until an expression is true in the page."""
        limit = time.monotonic() + PATIENCE
        while not self.js(expression):
            faults = self.faults()
            assert not faults and time.monotonic() < limit, f"{expression} is false; {faults}"
            time.sleep(0.02)

    def click(self, selector, at=(0.5, 0.5), to=None, number=0):
        """Press the mouse on a part of an element (fractions of it), and drag to another."""
        box = self.js(
            f"(() => {{ const e = document.querySelectorAll({json.dumps(selector)})[{number}]; "
            "e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect(); "
            "return [r.left, r.top, r.width, r.height]; })()"
        )
        first, last = (
            {"x": box[0] + x * box[2], "y": box[1] + y * box[3]} for x, y in (at, to or at)
        )
        self.send("Input.dispatchMouseEvent", type="mouseMoved", **first)
        press = {"button": "left", "clickCount": 1}
        self.send("Input.dispatchMouseEvent", type="mousePressed", **first, **press)
        if to:
            self.send(
                "Input.dispatchMouseEvent", type="mouseMoved", **last, button="left", buttons=1
            )
        self.send("Input.dispatchMouseEvent", type="mouseReleased", **last, **press)

    def hover(self, selector):
        """Move the mouse over an element."""
        x, y = self.js(
            f"(() => {{ const r = document.querySelector({json.dumps(selector)})"
            ".getBoundingClientRect(); return [r.left + r.width / 2, r.top + r.height / 2]; })()"
        )
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def key(self, name, shift=False):
        """Press a key."""
        for kind in ("rawKeyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=name, code=name, modifiers=8 * shift)

    def faults(self):
        """Errors, warnings of the console, and requests but for the page itself and data in it."""
        self.js("0")
        out = []
        for event in self.events:
            params = event.get("params", {})
            if event["method"] == "Runtime.exceptionThrown":
                out.append(params["exceptionDetails"].get("exception", {}).get("description"))
            elif event["method"] == "Runtime.consoleAPICalled":
                out.append(str(params["args"]))
            elif event["method"] == "Log.entryAdded":
                out.append(params["entry"]["text"])
            elif event["method"] == "Network.requestWillBeSent":
                url = params["request"]["url"]
                if params["type"] != "Document" and not url.startswith(("data:", "blob:")):
                    out.append(f"request: {url}")
        return out

    def close(self):
        """End the process."""
        with contextlib.suppress(AssertionError, OSError):
            self._session = None
            self.send("Browser.close")
        for number in (self._in, self._out):
            os.close(number)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def browser():
    """A browser for as long as the block; skips where there is none."""
    program = found()
    if program is None:
        pytest.skip(f"no browser here: {', '.join(NAMES)}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        one = Browser(program, profile)
        try:
            one.attach()
            yield one
        finally:
            one.close()

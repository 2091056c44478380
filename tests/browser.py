"""A headless Chromium driven through chromedriver's HTTP interface (WebDriver), with nothing but the standard library."""

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


def find_browser() -> tuple[str, str] | None:
    """Paths of the browser and its driver; None when either is missing."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


class Page:
    """A tab. Selectors are CSS; every wait ends in an error that says what was waited for."""

    def __init__(self, url: str):
        self.url = url

    def call(self, path: str, method: str = "POST", **body):
        data = json.dumps(body).encode() if method == "POST" else None
        request = urllib.request.Request(self.url + path, data=data, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}: {json.load(error)['value']['message']}") from None

    def open(self, file) -> None:
        self.call("/url", url=file.resolve().as_uri())

    def run(self, script: str, *args):
        return self.call("/execute/sync", script=script, args=list(args))

    def find(self, selector: str) -> str:
        return self.call("/element", using="css selector", value=selector)[ELEMENT]

    def click(self, selector: str) -> None:
        """A real click: refused where another element covers this one."""
        element = self.find(selector)
        self.run("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", {ELEMENT: element})
        self.call(f"/element/{element}/click")

    def type(self, selector: str, text: str) -> None:
        """In place of what stands there, key by key."""
        select_all, release, backspace = "\ue009a", "\ue000", "\ue003"
        self.call(f"/element/{self.find(selector)}/value", text=f"{select_all}{release}{backspace}{text}")

    def choose(self, selector: str, label: str) -> None:
        found = self.run(
            "const s = document.querySelector(arguments[0]);"
            "const o = [...s.options].find(o => o.textContent === arguments[1]);"
            "if (!o) return [...s.options].map(o => o.textContent);"
            "s.value = o.value; s.dispatchEvent(new Event('change', {bubbles: true})); return true",
            *(selector, label),
        )
        assert found is True, f"{selector}: found {found}, wanted {label!r}"

    def text(self, selector: str) -> str:
        return self.call(f"/element/{self.find(selector)}/text", "GET")

    def texts(self, selector: str) -> list[str]:
        return self.run("return [...document.querySelectorAll(arguments[0])].map(e => e.innerText)", selector)

    def wait(self, condition: str, *args, seconds: float = 20):
        """Until the JavaScript expression is true; its value."""
        end = time.monotonic() + seconds
        while not (value := self.run(f"return {condition}", *args)):
            assert time.monotonic() < end, f"after {seconds} s still false: {condition} {args}"
            time.sleep(0.02)
        return value

    def device(self, width: int, height: int, scheme: str = "light") -> None:
        """Size of the window in CSS pixels, and the colour scheme."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.devtools("Emulation.setDeviceMetricsOverride", **metrics)
        self.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def devtools(self, command: str, **params):
        return self.call("/goog/cdp/execute", cmd=command, params=params)

    def errors(self) -> list[str]:
        """What the console complained of since it was last asked: errors of scripts, refused loads."""
        return [entry["message"] for entry in self.call("/se/log", type="browser")]


@contextmanager
def browse(browser: str, driver: str):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        page = Page(f"http://127.0.0.1:{port}")
        _wait_until_ready(page, process)
        flags = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--window-size=1280,900",
        ]
        options = {"binary": browser, "args": flags}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = page.call("/session", capabilities={"alwaysMatch": wanted})["sessionId"]
        page.url += f"/session/{session}"
        try:
            yield page
        finally:
            page.call("", "DELETE")
    finally:
        process.terminate()
        process.wait(10)


def _wait_until_ready(page: Page, process: subprocess.Popen) -> None:
    end = time.monotonic() + 20
    while True:
        try:
            if page.call("/status", "GET")["ready"]:
                return
        except urllib.error.URLError:
            pass
        assert process.poll() is None and time.monotonic() < end, "chromedriver did not start"
        time.sleep(0.05)

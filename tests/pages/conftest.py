"""A browser without a network, and pages for it."""

from __future__ import annotations

import shutil
import time

import pytest

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--screen-info={1920x1080}",  # of which a panel can take all
)
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


class Browser:
    """Headless Chromium, with what it said and whom it asked."""

    def __init__(self, driver, downloads):
        self.driver, self.downloads = driver, downloads

    def open(self, path, hash="", width=1400, height=1000):
        self.driver.set_window_size(width, height)
        self.driver.get("about:blank")
        self.driver.get_log("browser")
        self.driver.get_log("performance")
        self.driver.get(f"file://{path}{hash}")
        self.wait("document.documentElement.dataset.ready === 'true'")

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def wait(self, condition, seconds=20):
        end = time.monotonic() + seconds
        while not self.run(f"return Boolean({condition})"):
            assert time.monotonic() < end, f"never came true: {condition}"
            time.sleep(0.02)

    def frame(self):
        """Wait until what was asked for is drawn."""
        self.driver.execute_async_script(
            "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(done))"
        )
        self.wait("document.documentElement.dataset.ready === 'true'")

    def at(self, x, y, selector, click=False):
        """Put the pointer on a place of an element's picture, and press there if asked for."""
        from selenium.webdriver import ActionChains

        mark = self.driver.find_element("css selector", selector)
        self.run("arguments[0].scrollIntoView({block: 'center'})", mark)
        box = self.run(
            "const {width, height} = arguments[0].getBoundingClientRect(); return [width, height]",
            mark,
        )
        chain = ActionChains(self.driver)
        chain.move_to_element_with_offset(mark, round(x - box[0] / 2), round(y - box[1] / 2))
        (chain.click() if click else chain).perform()
        self.frame()

    def cell(self, layer, index, click=False):
        """Put the pointer on a square of the grid, which stands where its axes' numbers do."""
        axes = self.run(
            "return [...document.querySelectorAll('#heads .axis')].map(one => "
            "[one.textContent, Number(one.getAttribute('x')), Number(one.getAttribute('y')), "
            "one.getAttribute('text-anchor')])"
        )
        y = next(y for name, _, y, anchor in axes if name == str(layer) and anchor == "end")
        x = next(x for name, x, y_, _ in axes if name == str(index) and y_ == 13)
        grown = self.run(
            "const one = document.querySelector('#heads .canvas svg');"
            "return one.getBoundingClientRect().width / Number(one.getAttribute('width'))"
        )
        self.at(x * grown, (y - 4) * grown, "#heads .canvas svg", click)

    def click(self, selector):
        self.driver.find_element("css selector", selector).click()
        self.frame()

    def hover(self, selector):
        from selenium.webdriver import ActionChains

        mark = self.driver.find_element("css selector", selector)
        self.run("arguments[0].scrollIntoView({block: 'center'})", mark)
        ActionChains(self.driver).move_to_element(mark).perform()
        self.frame()

    def press(self, *keys, selector="body"):
        if selector != "body":
            self.run("document.querySelector(arguments[0]).focus()", selector)
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()
        self.frame()

    def text(self, selector):
        return self.run("return document.querySelector(arguments[0]).textContent", selector)

    def downloaded(self, name, seconds=20):
        path = self.downloads / name
        end = time.monotonic() + seconds
        while not path.exists() or not path.stat().st_size:
            assert time.monotonic() < end, f"no {name} in {list(self.downloads.iterdir())}"
            time.sleep(0.05)
        return path

    def complaints(self):
        return [line["message"] for line in self.driver.get_log("browser")]

    def requests(self):
        """Addresses that were asked for since the page was opened, but for the page itself."""
        import json

        found = []
        for line in self.driver.get_log("performance"):
            message = json.loads(line["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                found.append(message["params"]["request"]["url"])
        own = ("file:///", "data:", "blob:", "about:", "chrome:", "devtools:")
        return [address for address in found if not address.startswith(own)]


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    if not (CHROMIUM and DRIVER):
        pytest.skip("needs Chromium: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium (extra dev)")
    from selenium.webdriver.chrome.service import Service

    downloads = tmp_path_factory.mktemp("downloads")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    preferences = {
        "download.default_directory": str(downloads),
        "download.prompt_for_download": False,
        "profile.default_content_setting_values.automatic_downloads": 1,  # several in a row
    }
    options.add_experimental_option("prefs", preferences)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        driver.set_script_timeout(20)
        yield Browser(driver, downloads)
    finally:
        driver.quit()

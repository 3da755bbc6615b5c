"""A browser without a window, for the pages of the examples."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.expected_conditions import staleness_of
from selenium.webdriver.support.ui import Select, WebDriverWait

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
HAS_BROWSER = CHROMIUM is not None and CHROMEDRIVER is not None
PATIENCE = 120  # seconds: what hangs is to fail its test, not to stop the run


@contextmanager
def chromium(folder: Path) -> Generator[webdriver.Chrome]:
    """Start Chromium.

    :param folder: an empty one
    """
    assert CHROMIUM is not None
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "window-size=1280,640",
        f"user-data-dir={folder}",
    ):
        options.add_argument(f"--{argument}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(CHROMEDRIVER))
    try:
        yield driver
    finally:
        driver.quit()


class Browser:
    """Pages in a browser.

    :param driver: the browser
    :param url: where the pages are
    """

    def __init__(self, driver: webdriver.Chrome, url: str) -> None:
        self.driver = driver
        self._url = url

    @property
    def text(self) -> str:
        """What the open page says."""
        return " ".join(self.driver.find_element(By.TAG_NAME, "body").text.split())

    def find(self, selector: str) -> WebElement:
        """Return the first element of the open page that can be seen, once there is one."""

        def seen(driver: webdriver.Remote) -> list[WebElement]:
            found = driver.find_elements(By.CSS_SELECTOR, selector)
            return [each for each in found if each.is_displayed()]

        return WebDriverWait(self.driver, PATIENCE, poll_frequency=0.05).until(seen)[0]

    def click(self, selector: str) -> None:
        """Click what stays on the page."""
        self.find(selector).click()

    def choose(self, selector: str, text: str) -> None:
        """Choose what a list offers."""
        Select(self.find(selector)).select_by_visible_text(text)

    def leave_by(self, selector: str) -> None:
        """Click what opens another page, and wait for that."""
        page = self.driver.find_element(By.TAG_NAME, "html")
        self.click(selector)
        self.wait_for_another(page)

    def wait_for_another(self, page: WebElement) -> None:
        """Wait until a page is no longer open."""
        WebDriverWait(self.driver, PATIENCE, poll_frequency=0.05).until(staleness_of(page))

    def read(self, path: str) -> str:
        self.driver.get(self._url + path)
        return self.text

    def follow(self, link: str) -> None:
        self.leave_by(f'a[href^="{link}"]')

    def submit(self, **fields: str) -> str:
        for name, value in fields.items():
            field = self.driver.find_element(By.NAME, name)
            if field.tag_name == "select":
                Select(field).select_by_value(value)
            else:
                field.clear()
                field.send_keys(value)
        self.leave_by("form[method=post i] :is(button, input[type=submit])")
        return self.text

    def take_picture(self, name: str) -> None:
        """Save what is seen, if the environment names a folder in ``SCREENSHOTS``."""
        if folder := os.getenv("SCREENSHOTS"):
            self.driver.save_screenshot(str(Path(folder) / name))

"""The page as text, and in a real browser where there is one (``make test-browser`` brings it)."""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from serving_live import NAME, ROOT, Live, until

from moe_prism.serving.web import page_html

SELENIUM = ROOT / "build" / "browser"  # where make test-browser puts it
DESKTOP, PHONE = (1280, 860), (390, 844)


def test_the_page_is_one_document_that_asks_for_nothing_else(server: Live) -> None:
    reply = httpx2.get(server.url)
    assert reply.headers["content-type"].startswith("text/html")
    assert reply.text == page_html()
    outside = re.sub(r"http://www\.w3\.org/\S+", "", reply.text)  # a namespace, not an address
    assert not re.search(r"https?://|//\w+\.\w+/|@import|<link (?![^>]*href=\"data:)|<script src", outside)
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    assert "/* style.css */" not in reply.text
    assert "/* script.js */" not in reply.text


@pytest.fixture(params=[DESKTOP, PHONE], ids=["desktop", "phone"], scope="module")
def chromium(request: pytest.FixtureRequest) -> Iterator[object]:
    """Chromium without a window."""
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None or not (SELENIUM / "selenium").is_dir():
        pytest.skip("no Chromium or selenium here: make test-browser installs them")
    sys.path.append(str(SELENIUM))
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    width, height = request.param
    if request.param == PHONE:
        metrics = {"deviceMetrics": {"width": width, "height": height, "pixelRatio": 2.0, "touch": True}}
        options.add_experimental_option("mobileEmulation", metrics)
    else:
        options.add_argument(f"--window-size={width},{height}")
    window = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield window
    window.quit()
    sys.path.remove(str(SELENIUM))


@pytest.fixture
def browser(chromium, server: Live) -> Iterator[object]:
    """The page, freshly loaded; it must not complain."""
    chromium.get(server.url)
    until(lambda: chromium.find_element("id", "model").text == NAME)
    yield chromium
    assert [entry for entry in chromium.get_log("browser") if entry["level"] == "SEVERE"] == []


def text_of(browser, element: str) -> str:
    return browser.find_element("id", element).text


def set_dial(browser, k: int) -> None:
    browser.execute_script(
        "const d = document.getElementById('dial'); d.value = arguments[0]; d.dispatchEvent(new Event('input'))", k
    )


def fits(browser) -> None:
    wide, inner = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert wide <= inner, "the page scrolls sideways"


def test_writing_with_the_dial(browser, tmp_path: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    fits(browser)
    set_dial(browser, 5)
    assert text_of(browser, "dial-value") == "5 of 16"
    browser.execute_script("document.querySelector('input[value=exact]').click()")
    assert "Exactly 5" in text_of(browser, "dial-text")
    prompt = browser.find_element("id", "prompt")
    prompt.send_keys("the old captain")
    prompt.send_keys(Keys.CONTROL, Keys.ENTER)  # by keyboard alone
    until(lambda: text_of(browser, "send").startswith("Send") and text_of(browser, "live-tokens").isdigit())
    assert text_of(browser, "live-budget").split() == ["5", "mean", "5.0"]
    assert float(text_of(browser, "live-speed").replace(",", "")) > 0
    output = browser.find_element("id", "output")
    assert output.text.startswith("the old captain")
    tinted = output.find_elements("css selector", "span[title='k_active 5 of 16']")
    written = "".join(span.get_attribute("textContent") for span in tinted)  # a piece may be several tokens
    assert written
    assert output.get_attribute("textContent") == "the old captain" + written
    fits(browser)
    browser.save_screenshot(str(tmp_path / "write.png"))


def test_a_chat_keeps_its_turns_and_stops_on_escape(browser, server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    from selenium.webdriver.common.keys import Keys

    forward = server.engine._runner.forward

    def slow(*args, **kwargs):
        time.sleep(0.3)
        return forward(*args, **kwargs)

    monkeypatch.setattr(server.engine._runner, "forward", slow)
    browser.execute_script("document.querySelector('input[value=chat]').click()")
    browser.execute_script("document.getElementById('max-tokens').value = 400")
    for number in (1, 2):
        browser.find_element("id", "prompt").send_keys("the sea")
        browser.find_element("id", "send").click()
        assert text_of(browser, "send").startswith("Stop")
        browser.find_element("tag name", "body").send_keys(Keys.ESCAPE)
        until(lambda: text_of(browser, "send").startswith("Send"), 10)
        until(lambda: not server.engine._running, 10)
        turns = browser.find_elements("css selector", ".turn .who")
        assert [turn.text for turn in turns] == ["You", NAME] * number
    assert browser.execute_script("return state.turns.map(t => t.role).join()") == "user,assistant,user,assistant"


def test_errors_are_shown_and_the_page_goes_on(browser) -> None:
    browser.execute_script("document.getElementById('max-tokens').value = 5000")
    browser.find_element("id", "prompt").send_keys("the sea")
    browser.find_element("id", "send").click()
    until(lambda: browser.find_elements("css selector", ".error"))
    assert "context of 1024 tokens" in browser.find_element("css selector", ".error").text
    browser.get_log("browser")  # the 400 is logged as an error, which it is
    browser.execute_script("document.getElementById('max-tokens').value = 3")
    browser.find_element("id", "send").click()
    until(lambda: text_of(browser, "live-tokens") == "3")


def test_the_load_view_shows_what_runs(browser, server: Live) -> None:
    stream = server.client().completions.create(
        model=NAME, prompt="the sea", max_tokens=1000, stream=True, extra_body={"ignore_eos": True}
    )
    next(stream)
    tab = browser.find_element("id", "tab-write")
    tab.send_keys("\ue014")  # arrow right
    assert browser.find_element("id", "tab-load").get_attribute("aria-selected") == "true"
    until(lambda: text_of(browser, "load-running") == "1")
    stream.close()
    until(lambda: text_of(browser, "load-running") == "0")
    assert text_of(browser, "load-floor") == "0"
    time.sleep(1.2)
    assert browser.find_elements("css selector", "#chart-requests polyline")
    assert browser.find_elements("css selector", "#chart-budgets rect")
    fits(browser)

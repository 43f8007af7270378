"""The server's page in a real browser. Without a browser or selenium the tests are skipped."""

import shutil
import time

import pytest
from serving import served

from phogpt_raw.inference.score import Row, Score, write
from phogpt_raw.model.adapters import new_adapters
from phogpt_raw.model.weights import load_base

webdriver = pytest.importorskip("selenium.webdriver")
CHROME, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), \
    shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROME and DRIVER), reason="no browser is here")
WIDTHS = {"phone": (390, 844), "desktop": (1280, 800)}


@pytest.fixture(scope="module")
def server():
    """A server of nano without an adapter, so that the answers do not end by themselves."""
    with served("--model", "nano", "--slots", 2, "--max-new-tokens", 900) as found:
        yield found


@pytest.fixture(scope="module")
def locked(tiny, tmp_path_factory):
    """A server with two adapters and an API key."""
    folder = tmp_path_factory.mktemp("adapters")
    new_adapters(load_base(str(tiny))[0], rank=2, alpha=4).save(folder)
    flags = [flag for name in ("mot", "mot-cai-ten-dai-hon-man-hinh-cua-dien-thoai")
             for flag in ("--adapter", f"{name}={folder}")]
    with served("--model", tiny, *flags, "--api-key", "mo-ra") as found:
        yield found


@pytest.fixture(params=[(width, scheme) for width in WIDTHS for scheme in ("light", "dark")],
                ids=lambda p: "-".join(p))
def browser(request):
    width, scheme = request.param
    with driven(*WIDTHS[width], scheme) as found:
        yield found


class driven:
    """A headless browser with a window size, a colour scheme, and Vietnamese as its language."""

    def __init__(self, width: int, height: int, scheme: str):
        options = webdriver.ChromeOptions()
        options.binary_location = CHROME
        for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--lang=vi",
                     "--hide-scrollbars"):
            options.add_argument(flag)
        options.add_experimental_option("prefs", {"intl.accept_languages": "vi"})
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600})
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {
            "features": [{"name": "prefers-color-scheme", "value": scheme}]})
        self.driver.scheme = scheme

    def __enter__(self):
        return self.driver

    def __exit__(self, *_):
        self.driver.quit()


def until(true, seconds=30):
    ends = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < ends, "it did not come to that"
        time.sleep(0.02)
    return found


def one(browser, selector):
    return browser.find_element("css selector", selector)


def texts(browser, selector) -> list[str]:
    return [found.text for found in browser.find_elements("css selector", selector)]


def opened(browser, server):
    browser.get(f"http://127.0.0.1:{server.port}/")
    until(lambda: one(browser, "#model-name").text)


def fits(browser) -> bool:
    """Whether every element of the page fits into the width of the window."""
    return browser.execute_script(
        "return document.documentElement.scrollWidth <= window.innerWidth && "
        "[...document.querySelectorAll('header *, footer *, .turn, #welcome *')].every(e => "
        "e.getBoundingClientRect().right <= window.innerWidth + 1)")


def contrast(browser, selector) -> float:
    """The contrast between an element's text and its background, as WCAG defines it."""
    return browser.execute_script("""
        let e = document.querySelector(arguments[0]);
        const rgb = c => c.match(/[\\d.]+/g).map(Number);
        const light = c => { const [r, g, b] = rgb(c).map(v => v / 255).map(
            v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
            return .2126 * r + .7152 * g + .0722 * b; };
        const text = light(getComputedStyle(e).color);
        while (e && rgb(getComputedStyle(e).backgroundColor)[3] === 0) e = e.parentElement;
        const back = light(getComputedStyle(e).backgroundColor);
        return (Math.max(text, back) + .05) / (Math.min(text, back) + .05);""", selector)


def test_asks_streams_stops_and_resets(browser, server):
    opened(browser, server)
    assert one(browser, "#welcome h2").text == "Bạn muốn hỏi gì?" and fits(browser)
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 200) == (browser.scheme == "dark")
    for selector in ("#welcome p", "#model-name", "summary", "#send", "#ideas button"):
        assert contrast(browser, selector) >= 4.5, selector

    one(browser, "#question").send_keys("Phở bò là gì?\n")
    until(lambda: texts(browser, ".answer") != [""])
    first = texts(browser, ".answer")[0]
    until(lambda: len(texts(browser, ".answer")[0]) > len(first))  # the answer grows on the page
    assert one(browser, "#stop").is_displayed() and not one(browser, "#send").is_displayed()
    assert texts(browser, ".mine") == ["Phở bò là gì?"] and fits(browser)
    one(browser, "#stop").click()
    until(lambda: texts(browser, ".note") == ["(đã dừng)"])
    until(lambda: server.health()["answering"] == 0)  # its slot is free again
    stopped = texts(browser, ".answer")
    assert one(browser, "#send").is_displayed() and contrast(browser, ".note") >= 4.5

    one(browser, "summary").click()
    one(browser, "#length").send_keys("5")
    assert fits(browser)
    # Shift-Enter starts a new line in the question
    one(browser, "#question").send_keys("Và\ue008\ue007\ue008sau đó?\n")
    until(lambda: texts(browser, ".note") == ["(đã dừng)", "(bị cắt vì đã đủ số token tối đa)"])
    assert texts(browser, ".answer")[:1] == stopped
    assert texts(browser, ".mine")[1] == "Và\nsau đó?"

    one(browser, "#language").click()
    assert one(browser, "#reset").text == "New chat"
    one(browser, "#reset").click()
    assert texts(browser, ".turn") == [] and one(browser, "#welcome").is_displayed()
    assert browser.get_log("browser") == []


def test_a_question_of_a_button_and_a_reset_while_it_is_answered(browser, server):
    opened(browser, server)
    one(browser, "#ideas button").click()
    until(lambda: texts(browser, ".answer") not in ([], [""]))
    one(browser, "#reset").click()
    until(lambda: server.health()["answering"] == 0)
    time.sleep(0.2)
    assert texts(browser, ".turn, .note, .bad") == []
    assert one(browser, "#send").is_displayed()


def test_markup_stays_text(browser, server):
    opened(browser, server)
    one(browser, "#question").send_keys("<b onclick=1>đậm</b><img src=x onerror=alert(1)>\n")
    until(lambda: texts(browser, ".answer") not in ([], [""]))
    assert texts(browser, ".mine") == ["<b onclick=1>đậm</b><img src=x onerror=alert(1)>"]
    one(browser, "#reset").click()
    browser.execute_script("""
        const chunk = {choices: [{delta: {content: "<img src=x onerror=alert(1)>"}}]};
        window.fetch = async () => new Response(
            "data: " + JSON.stringify(chunk) + "\\n\\ndata: [DONE]\\n\\n");
        ask("Phở?");""")
    until(lambda: texts(browser, ".answer") == ["<img src=x onerror=alert(1)>"])
    assert browser.find_elements("css selector", ".turn b, .turn img") == []


def test_enter_that_ends_a_composed_letter_does_not_send(browser, server):
    opened(browser, server)
    one(browser, "#question").send_keys("Phơ")
    press = """arguments[0].dispatchEvent(new KeyboardEvent("keydown", {
        key: "Enter", isComposing: arguments[1], cancelable: true, bubbles: true}))"""
    browser.execute_script(press, one(browser, "#question"), True)
    assert texts(browser, ".mine") == []
    browser.execute_script(press, one(browser, "#question"), False)
    assert texts(browser, ".mine") == ["Phơ"]


def test_a_conversation_that_grows_too_long_loses_its_first_turns(browser, server):
    opened(browser, server)
    one(browser, "summary").click()
    one(browser, "#length").send_keys("2")
    for turn in range(2):
        browser.execute_script("ask(arguments[0])", "Ngày mai " * 200)
        until(lambda turn=turn: len(texts(browser, ".note")) == turn + 1)
    assert "các lượt đầu không được gửi nữa" in texts(browser, ".note")[1]
    assert browser.execute_script("return messages.length") == 2
    assert fits(browser)


def test_an_error_is_shown_and_the_question_kept(browser, server):
    opened(browser, server)
    browser.execute_script("ask(arguments[0])", "Ngày mai " * 2000)
    until(lambda: texts(browser, ".bad"))
    assert "Hãy rút ngắn" in texts(browser, ".bad")[0] and fits(browser)
    assert contrast(browser, ".bad") >= 4.5
    assert len(one(browser, "#question").get_property("value")) > 10_000


def test_a_key_is_asked_for(browser, locked):
    browser.get(f"http://127.0.0.1:{locked.port}/")
    until(lambda: one(browser, "#key-form").is_displayed())
    assert not one(browser, "#send").is_enabled() and fits(browser)
    one(browser, "#key").send_keys("wrong\n")
    until(lambda: texts(browser, ".bad") == ["Máy chủ cần khóa API."])
    one(browser, "#key").clear()
    one(browser, "#key").send_keys(locked.key + "\n")
    until(lambda: one(browser, "#model").is_displayed())
    assert texts(browser, "#model option")[0] == "mot" and fits(browser)
    one(browser, "#model").send_keys("mot-")
    one(browser, "#question").send_keys("Phở?\n")
    until(lambda: texts(browser, ".answer") not in ([], [""]))


def test_the_page_of_scores_fits_and_shows_texts_as_they_are(browser, tmp_path):
    long, script = "dài" * 200, "<script>document.title = 'bad'</script>\n  hai"
    rows = [Row(long, long, {"base": long}), Row(script, script, {"base": script})]
    write(tmp_path / "s.json", tmp_path / "s.html", "r.jsonl", {"base": Score(1, 2, 3, 4, 5)}, rows)
    browser.get((tmp_path / "s.html").as_uri())
    assert browser.title == "r.jsonl: 2 rows" and fits(browser)
    assert texts(browser, "h2") == [long, script] and texts(browser, "dd")[2:] == [script, script]

"""The page in a browser: what people do there, by mouse and by keys, at both widths, with nothing fetched from elsewhere."""

import io
import json
import shutil

import pytest
from PIL import Image

from latentfm.pictures import read_settings

pytestmark = pytest.mark.slow
playwright = pytest.importorskip("playwright.sync_api", reason='a browser is driven by Playwright: pip install "latentfm[test]"')
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SOON = 60_000  # milliseconds


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no chromium here")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def site(serving):
    return serving(steps=400, batch=8, at_once=1, size=128)


@pytest.fixture
def opened(browser, site):
    """A function that opens the page; afterwards nothing was wrong in its console, and nothing was asked of anybody else."""
    pages, wrong, abroad = [], [], []

    def open_page(width=1280, scheme="light", url=site.url):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme, accept_downloads=True)
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: None if request.url.startswith((url, "data:", "blob:")) else abroad.append(request.url))
        pages.append(page)
        page.goto(url)
        page.wait_for_selector("#draw", timeout=SOON)
        page.wait_for_selector("#gallery .choose, #gallery .hint", timeout=SOON)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert not wrong and not abroad


def set_number(page, label: str, value: object) -> None:
    page.fill(f"#{label} input[type=number]", str(value))
    page.press(f"#{label} input[type=number]", "Tab")


def draw(page, prompt: str, steps: int = 2, wait: str = "#stage .done") -> None:
    """Types a prompt and presses Enter; waits for what comes of it, not for what is there from before."""
    set_number(page, "steps", steps)
    page.evaluate("document.querySelector('#stage .stage').remove()")
    page.fill("#prompt textarea", prompt)
    page.press("#prompt textarea", "Enter")
    if wait:
        page.wait_for_selector(wait, timeout=SOON)


def chosen(page) -> str:
    page.wait_for_selector("#details .file b", timeout=SOON)
    return page.inner_text("#details .file b")


def test_typed_drawn_seen_as_it_forms_and_downloaded_with_its_settings(opened, site, tmp_path):
    page = opened()
    assert page.evaluate("document.activeElement.closest('#prompt') !== null")  # one can type at once
    draw(page, "a red apple", steps=300, wait="#stage .forming")
    assert "step" in page.inner_text("#stage .status") and page.is_hidden("#draw")
    page.wait_for_selector("#stage .done", timeout=SOON)
    assert page.is_visible("#draw") and page.is_hidden("#cancel")
    name = chosen(page)
    assert page.get_attribute("#stage img", "src") == f"pictures/{name}"
    with page.expect_download() as waiting:
        page.click("#details .download")
    waiting.value.save_as(tmp_path / "saved.png")
    assert (tmp_path / "saved.png").read_bytes() == (site.studio.gallery.folder / name).read_bytes()
    assert (read_settings(tmp_path / "saved.png")["prompt"], read_settings(tmp_path / "saved.png")["steps"]) == ("a red apple", 300)
    assert page.input_value("#seed textarea, #seed input") == str(read_settings(tmp_path / "saved.png")["seed"])
    again = opened()  # the gallery outlives the page
    assert name in [each.get_attribute("data-name") for each in again.query_selector_all("#gallery .choose")]


def test_cancelled_by_escape_what_is_finished_stays(opened, site):
    page = opened()
    set_number(page, "count", 8)
    draw(page, "a long one", steps=400, wait='#stage .choose img[src^="pictures/"]')
    page.keyboard.press("Escape")
    page.wait_for_selector("#stage .cancelled", timeout=SOON)
    made = len([name for name in site.studio.gallery.names() if "a-long-one" in name])
    assert 1 <= made < 8 and f"Cancelled; {made} picture" in page.inner_text("#stage .status")
    assert page.is_visible("#draw")
    set_number(page, "count", 1)
    draw(page, "a short one")
    assert "1 picture" in page.inner_text("#stage .status")


def test_one_who_waits_is_told_the_place_and_one_who_leaves_makes_room(opened, site):
    first, second = opened(), opened()
    set_number(first, "count", 8)
    draw(first, "a long one", steps=400, wait="#stage .drawing")
    draw(second, "after it", wait="#stage .waiting")
    assert "1 request before yours" in second.inner_text("#stage .status")
    first.close()  # gone, not cancelled
    second.wait_for_selector("#stage .done", timeout=SOON)


def test_settings_are_used_again_and_the_same_picture_comes(opened, site):
    page = opened()
    page.fill("#negative textarea, #negative input", "a dog")
    draw(page, "a green tree", steps=3)
    name, first = chosen(page), page.get_attribute("#stage img", "src")
    set_number(page, "steps", 5)
    draw(page, "something else", steps=2)
    page.click(f'#gallery [data-name="{name}"]')
    page.wait_for_function("name => document.querySelector('#details .file b')?.innerText === name", arg=name)
    page.click("#use")
    page.wait_for_function("document.querySelector('#prompt textarea').value === 'a green tree'")
    assert page.input_value("#steps input[type=number]") == "3" and page.is_checked("#keep input")
    page.click("#draw")
    page.wait_for_function("src => { const i = document.querySelector('#stage .done img'); return i && i.getAttribute('src') !== src }",
                           arg=first, timeout=SOON)  # fmt: skip
    folder = site.studio.gallery.folder
    assert Image.open(folder / chosen(page)).tobytes() == Image.open(folder / name).tobytes() and chosen(page) != name
    assert read_settings(folder / chosen(page)) == read_settings(folder / name)


def test_a_png_that_is_dropped_gives_its_settings_back(opened, site, tmp_path):
    page = opened()
    draw(page, "a blue car", steps=4)
    file = site.studio.gallery.folder / chosen(page)
    fresh = opened()
    data = list(file.read_bytes())
    fresh.evaluate(
        """([data, name]) => {
          const files = new DataTransfer();
          files.items.add(new File([new Uint8Array(data)], name, {type: "image/png"}));
          const target = document.querySelector("#dropped button") ?? document.querySelector("#dropped");
          for (const kind of ["dragenter", "dragover", "drop"])
            target.dispatchEvent(new DragEvent(kind, {bubbles: true, cancelable: true, dataTransfer: files}));
        }""",
        [data, "<b>odd</b>.png"],
    )
    fresh.wait_for_function("document.querySelector('#prompt textarea').value === 'a blue car'", timeout=SOON)
    assert fresh.input_value("#steps input[type=number]") == "4"
    plain = io.BytesIO()
    Image.new("RGB", (8, 8)).save(plain, "PNG")
    fresh.set_input_files("#dropped input[type=file]", {"name": "x.png", "mimeType": "image/png", "buffer": plain.getvalue()})
    fresh.wait_for_selector("#stage .problem", timeout=SOON)
    assert "carries no settings" in fresh.inner_text("#stage .problem")


def test_a_part_is_painted_over_and_drawn_anew(opened, site):
    page = opened()
    draw(page, "a brown dog")
    source = chosen(page)
    page.click("#begin")
    page.wait_for_selector("#canvas canvas", timeout=SOON)
    page.wait_for_function("document.querySelector('#canvas [aria-label=\"Brush\"]') !== null", timeout=SOON)
    page.wait_for_timeout(1000)  # the canvas moves into its place
    page.locator("#canvas canvas").first.scroll_into_view_if_needed()
    box = page.locator("#canvas canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 20, y)
    page.mouse.down()
    page.mouse.move(x + 20, y, steps=6)
    page.mouse.up()
    page.wait_for_timeout(500)
    draw(page, "a hat")
    page.wait_for_function("name => document.querySelector('#details .file b')?.innerText !== name", arg=source)
    settings = read_settings(site.studio.gallery.folder / chosen(page))
    mask = Image.open(settings["mask"])
    painted = mask.getbbox()
    assert mask.size == (512, 512) and painted and 0 < (painted[2] - painted[0]) * (painted[3] - painted[1]) < 512 * 512 / 2
    assert painted[0] < 256 < painted[2] and painted[1] < 256 < painted[3]  # where the brush was


def test_a_sweep_is_one_table(opened, site):
    page = opened()
    page.click("#compare button")
    page.fill("#several-steps textarea, #several-steps input", "1,2")
    page.fill("#several-guidance textarea, #several-guidance input", "1,3")
    draw(page, "compared")
    assert "4 pictures" in page.inner_text("#stage .status") and page.locator('#stage img[src^="pictures/grid-"]').count() == 1


def test_what_is_refused_is_said_on_the_page(opened):
    page = opened()
    page.fill("#size textarea, #size input", "129")
    draw(page, "too large", wait="#stage .problem")
    assert "size 129 pixels is more than 128 pixels" in page.inner_text("#stage .problem")
    page.fill("#size textarea, #size input", "64")
    draw(page, "just right")


def test_words_of_others_are_shown_and_not_obeyed(opened, site):
    page = opened()
    words = '<img src=x onerror="document.title=1"> {{1}} ${2} <script>document.title=3</script>'
    draw(page, words)
    page.wait_for_selector("#details dd")
    assert page.inner_text("#details dd") == words and page.title() == "latentfm"
    assert page.locator("#details img, #details script").count() == 0


def test_keys_alone_are_enough(opened):
    page = opened()
    page.keyboard.type("by keys")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "draw"
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#stage .done", timeout=SOON)
    page.focus("#gallery .choose")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#details .file b') !== null")
    unnamed = page.evaluate(
        """[...document.querySelectorAll("input, textarea, button, img, select")].filter(each => each.offsetParent !== null &&
        !(each.labels?.length || each.ariaLabel || each.title || each.alt || each.innerText || each.querySelector?.("img[alt]")
          || each.getAttribute("aria-labelledby") || each.closest("label"))).map(each => each.outerHTML.slice(0, 200))"""
    )
    assert not unnamed


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_cut_off_or_unreadable(opened, width, scheme):
    page = opened(width, scheme)
    draw(page, "a wide word: " + "w" * 200)
    for fold in page.locator("#settings .label-wrap").all():
        fold.click()
    page.wait_for_timeout(500)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    dark = "return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)"
    background = page.evaluate(f"() => {{ {dark} }}")
    assert (sum(background) < 200) == (scheme == "dark"), json.dumps(background)
    page.click("#light")
    assert (sum(page.evaluate(f"() => {{ {dark} }}")) < 200) == (scheme != "dark")

"""The studio's page in a headless Chromium, as a person uses it. FASTNCA_SCREENSHOTS=folder keeps a picture of each
state."""

import io
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import soundfile
from test_studio import running_studio, save_space, wait

from fastnca.sound.convention import SAMPLE_RATE
from fastnca.sound.files import write_wav

playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install 'fastnca[test]'")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: install the Debian package chromium")
FLAGS = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]


@contextmanager
def browser():
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@contextmanager
def page_of(opened, address, complaints, **options):
    """A page on which whatever is said on the console, thrown or asked of another server is a complaint."""
    page = opened.new_page(**{"viewport": {"width": 1280, "height": 720}, **options})
    page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "request", lambda request: request.url.startswith((address, "data:", "blob:")) or complaints.append(request.url)
    )
    page.goto(address)
    yield page
    page.close()


def keep_picture(page, name, **options):
    if folder := os.environ.get("FASTNCA_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"studio-{name}.png", **options)


def number(page, selector):
    """The first number in an element's text, NaN where there is none."""
    found = re.search(r"-?\d+(\.\d+)?", page.inner_text(selector))
    return float(found[0]) if found else float("nan")


def healing(page):
    """The mel errors in dB before the wound, at its worst, and now; None where the page does not tell."""
    found = re.search(r"mel ([\d.]+) before, ([\d.]+) at its worst, ([\d.]+) dB now", page.inner_text("#healing"))
    return found and [float(error) for error in found.groups()]


def pixels(page, selector):
    return page.eval_on_selector(selector, "canvas => canvas.toDataURL()")


def stroke(page, selector, begin, end):
    """Drags the mouse between two places of an element, (x, y) as shares of its sides."""
    box = page.locator(selector).bounding_box()
    (x0, y0), (x1, y1) = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in (begin, end)]
    page.mouse.move(x0, y0)
    page.mouse.down()
    page.mouse.move(x1, y1, steps=6)
    page.mouse.up()


def downloaded(page, selector):
    with page.expect_download(timeout=60_000) as download:
        page.click(selector)
    return Path(download.value.path()).read_bytes(), download.value.suggested_filename


@pytest.fixture
def tone(tmp_path):
    """A tone with partials that fade one after the other: 8 frames."""
    t = np.arange(2048) / SAMPLE_RATE
    partials = [np.sin(2 * np.pi * 441 * k * t) * np.exp(-3 * k * t) / k for k in range(1, 6)]
    write_wav(tmp_path / "tone.wav", 0.3 * sum(partials))
    return tmp_path / "tone.wav"


def test_a_sound_is_dropped_grows_is_wounded_and_heals(tone, tmp_path):
    complaints = []
    with (
        running_studio(tmp_path / "studio", "--vocoder", "griffinlim") as (_, address),
        browser() as opened,
        page_of(opened, address, complaints) as page,
    ):
        keep_picture(page, "begin")
        page.set_input_files("#file", {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"hello"})
        wait(lambda: "not audio" in page.inner_text("#error"))
        keep_picture(page, "error")
        complaints.clear()  # Chromium logs every answer of 400
        page.click("#dismiss")

        # Dropped, it begins to learn, and the error falls.
        transfer = page.evaluate_handle(
            """bytes => { const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "tone.wav", {type: "audio/wav"})); return data; }""",
            list(tone.read_bytes()),
        )
        page.dispatch_event("body", "drop", {"dataTransfer": transfer})
        page.wait_for_selector("#grown-mel", state="visible", timeout=60_000)
        first = wait(lambda: number(page, "#mel-error") > 0 and number(page, "#mel-error"))
        # What has been learned only half is no fixed point, and does not heal to where it was.
        wait(lambda: number(page, "#mel-error") < min(1.0, first / 2), seconds=120)
        keep_picture(page, "learning")

        # It can be heard, while it learns.
        page.keyboard.press("Space")
        wait(lambda: float(page.get_attribute("#play", "data-peak")) > 0.01)
        assert page.get_attribute("#play", "data-state") == "playing"
        page.keyboard.press("Space")
        wait(lambda: page.get_attribute("#play", "data-state") == "stopped")

        # A wound is seen at once, and heals.
        page.click("#pause-learning")
        wait(lambda: page.inner_text("#alive").startswith("100"))
        page.click("[data-tool=erase]")
        before = pixels(page, "#grown-mel")
        stroke(page, "#grown-mel", (0.1, 0.6), (0.9, 0.9))
        wait(lambda: pixels(page, "#grown-mel") != before, seconds=5)
        keep_picture(page, "wound")
        page.click("#hear-wound")
        wait(lambda: healing(page) and healing(page)[1] > healing(page)[0])
        wait(lambda: healing(page)[2] < 1.05 * healing(page)[0])
        keep_picture(page, "healed")

        # Taken back, kept, and grown from a seed.
        page.keyboard.press("Control+z")
        page.click("#keep")
        page.wait_for_selector("#takes [data-take]")
        page.click("#empty")
        wait(lambda: page.inner_text("#alive").startswith("0"))
        page.click("[data-tool=seed]")
        stroke(page, "#grown-mel", (0.5, 0.5), (0.5, 0.5))
        wait(lambda: number(page, "#alive") > 1)
        keep_picture(page, "seed")
        page.click("#restart-many")
        wait(lambda: page.inner_text("#alive").startswith("100"))

        # What is taken away decodes.
        for button, subtype in (("#wav16", "PCM_16"), ("#wav32", "FLOAT")):
            content, name = downloaded(page, button)
            assert name.endswith(".wav")
            with soundfile.SoundFile(io.BytesIO(content)) as file:
                assert file.subtype == subtype and np.abs(file.read()).max() > 0.01
        assert downloaded(page, "#model-file")[1].endswith(".safetensors")
        assert downloaded(page, "#gif")[0][:3] == b"GIF"

        # On a phone, in the dark, everything is there.
        page.emulate_media(color_scheme="dark")
        keep_picture(page, "dark")
        page.set_viewport_size({"width": 390, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        keep_picture(page, "phone", full_page=True)

        # A second tab shows the same.
        with page_of(opened, address, complaints) as second:
            second.wait_for_selector("#grown-mel", state="visible")
            assert second.inner_text("#sound-name") == page.inner_text("#sound-name") == "tone"
    assert complaints == []


def test_the_server_goes_and_comes_back(tone, tmp_path):
    with browser() as opened:
        with running_studio(tmp_path / "studio", tone, "--vocoder", "griffinlim") as (_, address):
            page = opened.new_page()
            page.goto(address)
            page.wait_for_selector("#grown-mel", state="visible", timeout=60_000)
        wait(lambda: page.get_attribute("body", "data-server") == "gone")
        assert page.inner_text("#error")
        keep_picture(page, "gone")
        with running_studio(tmp_path / "studio", "--vocoder", "griffinlim", port=re.search(r":(\d+)/", address)[1]):
            wait(lambda: page.get_attribute("body", "data-server") == "there")
            wait(lambda: page.inner_text("#sound-name") == "tone" and number(page, "#age") >= 2)


# A keyboard that the test can press: window.pressMidi(status, key, velocity).
MIDI = """() => {
    const input = {};
    navigator.requestMIDIAccess = async () => ({ inputs: new Map([["1", input]]) });
    window.pressMidi = (...data) => input.onmidimessage({ data });
}"""


def test_a_space_is_played(tmp_path):
    save_space(tmp_path / "four.safetensors")
    complaints = []
    with (
        running_studio(tmp_path / "studio", tmp_path / "four.safetensors", "--vocoder", "griffinlim") as (_, address),
        browser() as opened,
        page_of(opened, address, complaints) as page,
    ):

        def mixture():
            return page.inner_text("#mixture")

        def is_heard():
            wait(lambda: page.is_visible("#space[aria-busy=false]") and page.is_visible("#play:not([aria-busy])"))
            assert page.get_attribute("#play", "data-state") == "playing"
            wait(lambda: float(page.get_attribute("#play", "data-peak")) > 0.001)
            page.click("#play")
            wait(lambda: page.get_attribute("#play", "data-state") == "stopped")

        # A sound of the map grows and plays, and so does what lies between them.
        page.evaluate(MIDI)
        page.wait_for_selector("#map .sound")
        assert page.locator("#map .sound").count() == 4 and not page.is_visible("#learning")
        page.click("#map [data-sound=high]")
        wait(lambda: mixture() == "high")
        is_heard()
        before = pixels(page, "#grown-mel")
        page.select_option("#morph-a", "low")
        page.select_option("#morph-b", "noise")
        stroke(page, "#amount", (0.5, 0.5), (0.25, 0.5))
        wait(lambda: re.fullmatch(r"low 7\d %, noise 2\d %", mixture()))
        is_heard()
        wait(lambda: pixels(page, "#grown-mel") != before)
        wait(lambda: page.inner_text("#command").startswith("fastnca morph"))
        keep_picture(page, "space")

        # The square is dragged, or moved by keys, and one drag is undone at once.
        for corner, name in enumerate(("low", "high", "noise", "click")):
            page.select_option(f"#corner-{corner}", name)
        wait(lambda: mixture() == "low")
        stroke(page, "#square", (0.9, 0.9), (0.5, 0.5))
        wait(lambda: len(mixture().split(", ")) == 4 and "low 25 %" in mixture())
        is_heard()
        page.keyboard.press("Control+z")
        wait(lambda: mixture() == "low")
        page.focus("#square")
        page.keyboard.press("ArrowRight")
        wait(lambda: mixture().count("%") == 4)
        is_heard()

        # A glide grows, and lives: it can be kept.
        page.click("#glide")
        wait(lambda: mixture() == "from low to noise")
        is_heard()
        page.click("#keep")
        wait(lambda: page.input_value(".take-name") == "low to noise")

        # Keys, also those of MIDI, play it at their pitches.
        page.click("#map [data-sound=low]")
        wait(lambda: mixture() == "low")
        is_heard()
        page.click("#midi")
        wait(lambda: page.inner_text("#midi") == "MIDI: 1 in")
        with page.expect_request(lambda request: "semitones=5&" in request.url or request.url.endswith("semitones=5")):
            page.evaluate("pressMidi(0x90, 62, 100)")  # D4; what lives is A3, 220 Hz
        wait(lambda: page.evaluate("studio.samplesPlayed()") > 0)
        page.evaluate("pressMidi(0x80, 62, 0)")

        page.set_viewport_size({"width": 390, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        keep_picture(page, "space-phone", full_page=True)
    assert complaints == []

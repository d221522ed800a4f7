"""The page that detects in the browser: what it finds, in Node and in Chromium, and what it does when things fail."""

import functools
import http.server
import json
import shutil
import subprocess
import threading

import cv2
import numpy as np
import pytest
from conftest import ROOT, SHAPES

pytest.importorskip("onnx_ir", reason="needs onnxscript: uv run --extra test pytest")

from test_whole import tabulate  # noqa: E402

import whole  # noqa: E402
from compare import verify_detections  # noqa: E402
from detectors import Detections, load  # noqa: E402

WEB = ROOT / "web"
PICTURE = ROOT / "asset" / "shapes.png"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (WEB / "node_modules").exists(), reason="needs onnxruntime-web: npm ci --prefix web"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Return a folder with the page, its detector and the bundled picture, as the project's folder has them."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(WEB, folder / "web", ignore=shutil.ignore_patterns("node_modules", "*.onnx"))
    (folder / "web" / "node_modules").symlink_to(WEB / "node_modules")
    (folder / "asset").mkdir()
    shutil.copy(PICTURE, folder / "asset")
    assert whole.main([str(SHAPES), str(folder / "web" / "detector.onnx"), "--from-picture"]) == 0
    return folder


@pytest.fixture(scope="module")
def expected():
    """Return what demo.py finds in the bundled picture, of any score."""
    return load(SHAPES)(cv2.imread(str(PICTURE)))


def as_detections(found):
    """Return what detector.js finds as Detections."""
    arrays = (np.array([one[key] for one in found]) for key in ("box", "score", "label"))
    return Detections(*arrays)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node")
def test_node_finds_what_demo_finds(site, expected, tmp_path):
    image = cv2.cvtColor(cv2.imread(str(PICTURE)), cv2.COLOR_BGR2RGBA)
    (tmp_path / "pixels").write_bytes(image.tobytes())
    height, width = image.shape[:2]
    command = ["node", ROOT / "tests" / "detect.mjs", site / "web", site / "web" / "detector.onnx", tmp_path / "pixels"]
    run = subprocess.run([*command, str(width), str(height)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    printed = json.loads(run.stdout)
    assert tuple(printed["classes"]) == load(SHAPES).classes
    assert len(expected.boxes) > 10
    assert verify_detections("Node", as_detections(printed["found"]), expected)
    tabulate("onnxruntime-web in Node", "shapes, from the picture", [(as_detections(printed["found"]), expected)])


@pytest.fixture(scope="module")
def browser():
    """Return a Chromium without a window, whose camera is a drawn one."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: uv run --extra test pytest")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox", *camera])
        yield browser
        browser.close()


@pytest.fixture
def open_page(site, browser):
    """Return a function that serves the site, opens the page there and waits until it has something to say."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(site))
    handler.log_message = lambda *arguments: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    context = browser.new_context()

    def run(**viewport):
        page = context.new_page()
        if viewport:
            page.set_viewport_size(viewport)
        page.requests, page.errors = [], []
        page.on("request", lambda request: page.requests.append((request.method, request.url)))
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.goto(f"http://127.0.0.1:{server.server_port}/web/")
        wait_for(page, "found, ", ".error")
        return page

    yield run
    context.close()
    server.shutdown()


def wait_for(page, text, or_selector="none"):
    """Wait until the page says a text, or has an element."""
    page.wait_for_function(
        "([text, other]) => state.textContent.includes(text) || document.querySelector(other)",
        arg=[text, f"#state{or_selector}"], timeout=60_000,
    )  # fmt: skip


def state(page):
    """Return what the page says."""
    return page.inner_text("#state")


def rows(page):
    """Return the table that the page shows, without its header."""
    return [row.split("\t") for row in page.inner_text("#found").splitlines()][1:]


def test_the_page_finds_what_demo_finds(open_page, expected):
    page = open_page()
    confident = expected.where(expected.scores > 0.3)
    classes = load(SHAPES).classes
    shown = rows(page)
    assert len(shown) == len(confident.boxes) > 10
    assert [row[0] for row in shown] == [classes[label] for label in confident.labels]
    np.testing.assert_allclose(np.float64([row[1:] for row in shown])[:, 0], confident.scores, atol=1e-3)
    np.testing.assert_allclose(np.float64([row[2:] for row in shown]), confident.boxes, atol=0.06)  # one decimal
    assert page.evaluate("[canvas.width, canvas.height]") == [489, 303]
    # The same pixels again, with all decimals.
    found = page.evaluate("""async () => {
        const { load } = await import("./detector.js");
        const ort = await import("./node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs");
        const { detect } = await load(ort, new Uint8Array(await (await fetch("detector.onnx")).arrayBuffer()));
        const image = await createImageBitmap(await (await fetch("../asset/shapes.png")).blob());
        const context = new OffscreenCanvas(image.width, image.height).getContext("2d");
        context.drawImage(image, 0, 0);
        return detect(context.getImageData(0, 0, image.width, image.height));
    }""")
    assert verify_detections("Chromium", as_detections(found), expected)
    tabulate("onnxruntime-web in Chromium", "shapes, from the picture", [(as_detections(found), expected)])
    assert page.errors == []


def test_nothing_leaves_the_computer(open_page):
    page = open_page()
    page.set_input_files("#file", str(PICTURE))
    wait_for(page, "found, 489")
    assert {method for method, _ in page.requests} == {"GET"}
    assert all(
        url.startswith((page.url, page.url.replace("/web/", "/asset/"), "blob:", "data:")) for _, url in page.requests
    )


def test_the_slider_decides_what_is_shown(open_page, expected):
    page = open_page()
    for threshold in (0, 0.95, 1):
        page.evaluate("value => { score.value = value; score.dispatchEvent(new Event('input')) }", threshold)
        assert len(rows(page)) == np.count_nonzero(expected.scores > threshold)
        assert state(page).startswith(f"{len(rows(page))} found")


def test_a_picture_of_ones_own(open_page, tmp_path):
    page, image = open_page(), cv2.imread(str(PICTURE))
    image = np.ascontiguousarray(image[:, ::-1])
    cv2.imwrite(str(tmp_path / "mirrored.png"), image)
    page.set_input_files("#file", str(tmp_path / "mirrored.png"))
    page.wait_for_function("!document.querySelector('#state').textContent.startsWith('Detecting')")
    found = load(SHAPES)(image)
    confident = found.where(found.scores > 0.3)
    np.testing.assert_allclose(np.float64([row[2:] for row in rows(page)]), confident.boxes, atol=0.06)


def test_a_dropped_file_that_is_no_picture(open_page):
    page = open_page()
    page.evaluate("""() => {
        const files = new DataTransfer();
        files.items.add(new File(["words"], "words.txt"));
        document.dispatchEvent(new DragEvent("drop", { dataTransfer: files, bubbles: true, cancelable: true }));
    }""")
    wait_for(page, "words.txt is not a picture that this browser can read")
    page.click("#bundled")  # it goes on
    wait_for(page, "found, 489")
    assert page.errors == []


def test_a_detector_that_is_not_there_or_damaged(open_page, site):
    model = site / "web" / "detector.onnx"
    whole_file = model.read_bytes()
    try:
        model.unlink()
        assert "detector.onnx is not there: write it with whole.py ckpt/shapes" in state(open_page())
        for content, words in [
            (b"not a model", "not an ONNX file"),
            ((SHAPES / "model1.onnx").read_bytes(), "--from-picture"),
            (whole_file[: len(whole_file) // 2], "this file is not complete"),
        ]:
            model.write_bytes(content)
            page = open_page()
            assert page.locator("#state.error").count() == 1
            assert words in state(page)
            assert page.errors == []
    finally:
        model.write_bytes(whole_file)


def test_what_cannot_be_detected_leaves_nothing_of_the_picture_before(open_page, tmp_path):
    page = open_page()
    cv2.imwrite(str(tmp_path / "thin.png"), np.zeros((1, 2000, 3), np.uint8))
    page.set_input_files("#file", str(tmp_path / "thin.png"))
    wait_for(page, "the detector fails on 2000 × 1 pixels")
    assert rows(page) == []
    page.evaluate("score.dispatchEvent(new Event('input'))")
    assert "fails" in state(page)


def test_a_transparent_picture_is_drawn_anew(open_page, tmp_path):
    page = open_page()
    cv2.imwrite(str(tmp_path / "clear.png"), np.zeros((303, 489, 4), np.uint8))
    page.set_input_files("#file", str(tmp_path / "clear.png"))
    wait_for(page, "0 found")
    page.evaluate("value => { score.value = value; score.dispatchEvent(new Event('input')) }", 0)
    assert len(rows(page)) > 0
    page.evaluate("value => { score.value = value; score.dispatchEvent(new Event('input')) }", 1)
    pixels = page.evaluate("Array.from(canvas.getContext('2d').getImageData(0, 0, 489, 303).data)")
    assert not np.reshape(pixels, (-1, 4))[:, :3].any()  # black, without a box


def test_without_onnxruntime_web(open_page, site):
    modules = site / "web" / "node_modules"
    modules.rename(site / "elsewhere")
    try:
        assert "npm ci --prefix web" in state(open_page())
    finally:
        (site / "elsewhere").rename(modules)


def test_a_phone(open_page):
    page = open_page(width=360, height=640)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("canvas.getBoundingClientRect().right") <= 360


def test_a_camera(open_page):
    page = open_page()
    page.click("#camera")
    wait_for(page, "640 × 480")
    assert page.inner_text("#camera") == "Stop the camera"
    page.click("#camera")
    page.wait_for_timeout(1500)
    before = state(page)
    page.wait_for_timeout(500)
    assert state(page) == before
    assert page.inner_text("#camera") == "Camera"
    page.click("#camera")
    wait_for(page, "640 × 480")
    page.set_input_files("#file", str(PICTURE))  # ends it, whatever it is doing
    wait_for(page, "found, 489")
    assert page.inner_text("#camera") == "Camera"
    assert page.errors == []

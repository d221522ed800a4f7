"""export.py when it is interrupted, when two run at once, and when its download goes wrong: as processes."""

import concurrent.futures
import hashlib
import http.server
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import MMDETECTION, ROOT, SHAPES, default_sigint, draw_shapes

from detectors import ModelError, load

pytest.importorskip("mmdet", reason=MMDETECTION)

PAIR = ("model1.onnx", "model2.onnx")
PICTURE = ROOT / "asset" / "shapes.png"
CHECKPOINT = (SHAPES / "shapes.pth").read_bytes()


def start(code, **settings):
    """Start a process that runs some code with export.py at hand."""
    setup = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import export"
    command = [sys.executable, "-c", f"{setup}; from sources import checkpoints, mmdetection; {code}"]
    environment = {**os.environ, "no_proxy": "127.0.0.1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "preexec_fn": default_sigint}
    return subprocess.Popen(command, env=environment, **{**pipes, **settings})


def export_shapes(out, *options):
    """Return the code that exports the bundled model into a folder."""
    arguments = [str(SHAPES / "config.py"), str(SHAPES / "shapes.pth"), "--out", str(out), *options]
    return f"sys.exit(export.main({arguments!r}))"


def wait_until(happened, process):
    """Wait until something has happened while a process runs."""
    deadline = time.monotonic() + 120
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


# ------------------------------------------------------------------ interruption


@pytest.fixture
def old_pair(tmp_path):
    """Return a folder that holds an older pair."""
    for name in PAIR:
        shutil.copy(SHAPES / name, tmp_path)
    return tmp_path


def assert_old_pair(folder):
    """Check that the older pair is there, whole."""
    for name in PAIR:
        assert (folder / name).read_bytes() == (SHAPES / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("moment", ["", "model1.onnx", "model2.onnx"])
def test_interrupted_the_old_pair_stays(old_pair, how, moment):
    """Stopped when it has begun to write into its temporary folder, and when each network is there."""
    process = start(export_shapes(old_pair, "--opset", "17"))
    wait_until(lambda: list(old_pair.glob(f".export-*/{moment}")), process)
    process.send_signal(how)
    _, stderr = process.communicate(timeout=60)
    assert_old_pair(old_pair)
    assert len(load(old_pair).classes) == 6
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert stderr == "export.py: interrupted\n"
        assert sorted(path.name for path in old_pair.iterdir()) == list(PAIR)


@pytest.mark.slow
@pytest.mark.parametrize("moment", [".int8-*", ".int8-*/model1-3.npy", ".int8-*/*/prepared.onnx"])
def test_interrupted_while_8_bits_are_made(tmp_path, moment):
    """The export itself is there, whole, and nothing else is."""
    draw_shapes(tmp_path / "pictures", range(12))
    out = tmp_path / "out"
    quiet = "sys.unraisablehook = lambda _: None"  # as the program does: tqdm complains if it is interrupted too early
    process = start(f"{quiet}; {export_shapes(out, '--int8', str(tmp_path / 'pictures'))}")
    wait_until(lambda: list(out.glob(moment)), process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "export.py: interrupted" in stderr.splitlines()  # among what is left of progress bars
    assert sorted(path.name for path in out.iterdir()) == list(PAIR)
    assert len(load(out).classes) == 6


@pytest.mark.slow
def test_killed_between_the_two_files_is_found_by_the_pair_id(old_pair):
    """The only moment at which a mixture can arise: model1 is new, model2 still old."""
    kill = (
        "os = export.os; replace = os.replace; os.replace = lambda *paths: (replace(*paths), os.kill(os.getpid(), 9))"
    )
    process = start(f"{kill}; {export_shapes(old_pair, '--opset', '17')}")
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    with pytest.raises(ModelError, match="from different exports: export again"):
        load(old_pair)
    process = start(export_shapes(old_pair))
    process.communicate(timeout=300)
    assert process.returncode == 0
    assert len(load(old_pair).classes) == 6


@pytest.mark.slow
def test_two_exports_into_one_folder(tmp_path):
    processes = [start(export_shapes(tmp_path)) for _ in range(2)]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(lambda process: process.communicate(timeout=300), processes))
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sorted(path.name for path in tmp_path.iterdir()) == list(PAIR)
    assert len(load(tmp_path).classes) == 6


# ------------------------------------------------------------------ the download


class Server(http.server.ThreadingHTTPServer):
    """Serves the bundled checkpoint on loopback in ten pieces, and goes as wrong as it is told to."""

    content, status, pieces, pause, promised, greeting = CHECKPOINT, 200, 10, 0, len(CHECKPOINT), b""
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.sent, self.closed = 0, threading.Event()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as its server says."""

    def do_GET(self):  # noqa: N802
        """Send the first pieces, with a pause after each."""
        server = self.server
        if server.greeting:
            self.wfile.write(server.greeting)
            return
        self.send_response(server.status)
        self.send_header("Content-Length", str(server.promised))
        self.end_headers()
        size = -(-len(server.content) // 10)
        for piece in range(server.pieces):
            self.wfile.write(server.content[piece * size : (piece + 1) * size])
            server.sent = piece + 1
            if server.closed.wait(server.pause):
                return

    def log_message(self, *arguments):
        """Keep quiet."""


@pytest.fixture
def server():
    """Return a running server."""
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.closed.set()
    server.shutdown()
    server.server_close()


def start_default(folder, url, code="", digest=None, **settings):
    """Start export.py without arguments; its default is the bundled model, its ckpt/ below the folder."""
    (folder / "ckpt").mkdir(exist_ok=True)
    name = f"shapes-{digest or hashlib.sha256(CHECKPOINT).hexdigest()[:8]}.pth"
    setup = [
        f"mmdetection.CKPT = export.Path({str(folder / 'ckpt')!r})",
        f"mmdetection.DEFAULT_CONFIG = {str(SHAPES / 'config.py')!r}",
        f"mmdetection.DEFAULT_CHECKPOINT = {name!r}",
        f"mmdetection.CHECKPOINT_URL = {f'{url}/{name}'!r}",
        code or "pass",
        f"sys.exit(export.main(['--out', {str(folder / 'out')!r}, '--picture', {str(PICTURE)!r}]))",
    ]
    return start("; ".join(setup), **settings), folder / "ckpt" / name


def url_of(server):
    """Return a server's address."""
    return f"http://127.0.0.1:{server.server_port}"


@pytest.mark.slow
def test_the_default_is_downloaded_once_however_slowly_it_comes(tmp_path, server):
    server.pause = 0.5
    process, path = start_default(tmp_path, url_of(server), "checkpoints.STALL = 3")  # all of it takes five seconds
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert "100%" in stderr  # the progress bar
    assert path.read_bytes() == CHECKPOINT
    assert sorted(found.name for found in (tmp_path / "out").iterdir()) == list(PAIR)
    server.status = 404  # from now on
    process, _ = start_default(tmp_path, url_of(server))
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert "downloading" not in stdout


def limit_file_size():
    """Let a process write no file larger than a megabyte, as if the disk were full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "word"),
    [
        ("no server", "refused"),
        ("not found", "404"),
        ("cut", "invalid hash"),
        ("stalled", "timed out"),
        ("wrong hash", "invalid hash"),
        ("no HTTP", "SSH-2.0"),
        ("full disk", "too large"),
    ],
)
def test_a_download_that_fails_says_what_to_put_where(tmp_path, server, case, word):
    url, settings = url_of(server), {}
    if case == "no server":
        url = "http://127.0.0.1:9"
    elif case == "not found":
        server.status = 404
    elif case == "cut":
        server.pieces = 4
    elif case == "stalled":
        server.pause = 60
    elif case == "no HTTP":
        server.greeting = b"SSH-2.0-OpenSSH_9.0\r\n"
    elif case == "wrong hash":
        settings["digest"] = "0123abcd"
    else:
        settings["preexec_fn"] = limit_file_size
    process, path = start_default(tmp_path, url, "checkpoints.STALL = 1", **settings)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2
    line = stderr.replace("\r", "\n").splitlines()[-1]  # the progress bar may stand before it
    assert line.startswith("export.py: the download failed")
    for part in (word, f"{url}/{path.name}", str(path)):
        assert part in line
    assert "Traceback" not in stderr
    assert list((tmp_path / "ckpt").iterdir()) == []
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_download_that_is_interrupted_leaves_no_half_file(tmp_path, server, how):
    server.pause = 60
    process, path = start_default(tmp_path, url_of(server))
    wait_until(lambda: server.sent, process)
    time.sleep(0.3)
    process.send_signal(how)
    _, stderr = process.communicate(timeout=60)
    assert not path.exists()
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert stderr.splitlines()[-1] == "export.py: interrupted"
        assert list(path.parent.iterdir()) == []
    server.pause = 0
    process, _ = start_default(tmp_path, url_of(server))
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert path.read_bytes() == CHECKPOINT

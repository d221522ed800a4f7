"""Videos and cameras: demo.py on drawn clips, and what goes wrong with them."""

import json
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from conftest import ROOT, SHAPES, default_sigint
from test_demo import assert_one_line, call_demo, environment, read_results

import demo
import pictures
import videos
from detectors import load

RATE = 20


def write_clip(path, count, size=(240, 180), codec="mp4v"):
    """Write a clip in which a window, width and height, moves over drawn shapes."""
    import dataset

    scene = cv2.resize(dataset.draw_picture(3000322)[0], (640, 480))
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), RATE, size)
    for i in range(count):
        x, y = int(180 + 170 * np.sin(i / 20)), int(140 + 130 * np.cos(i / 31))
        writer.write(np.ascontiguousarray(scene[y : y + size[1], x : x + size[0]]))
    writer.release()
    return path


def frames_of(path):
    """Return the frames of a video."""
    capture, frames = cv2.VideoCapture(str(path)), []
    while True:
        good, image = capture.read()
        if not good:
            return frames
        frames.append(image)


def call(*arguments):
    """Run demo.py with the bundled model in this process."""
    return call_demo(*arguments, "--model", SHAPES)


@pytest.mark.slow
def test_a_video_is_its_frames(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", 300)
    result = call(clip, "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert f"20 frames a second, to {tmp_path / 'out' / 'clip.mp4'} (mp4v)" in result.stdout
    entries, images = read_results(tmp_path / "out")
    assert [image["id"] for image in images] == list(range(1, 301))
    assert [image["frame"] for image in images] == list(range(300))
    assert [image["seconds"] for image in images] == [round(frame / RATE, 3) for frame in range(300)]
    assert {image["annotated"] for image in images} == {"clip.mp4"}
    detector, frames = load(SHAPES), frames_of(clip)
    by_frame = {image["id"]: [] for image in images}
    for entry in entries:
        by_frame[entry["image_id"]].append(entry)
    for image, frame in zip(images, frames):
        found = detector(frame)
        found = found.where(found.scores >= 0.3)
        expected = pictures.coco_results(found, image, detector.classes, range(1, 7))
        assert by_frame[image["id"]] == expected
    assert len(entries) > 600
    annotated = frames_of(tmp_path / "out" / "clip.mp4")
    assert [frame.shape for frame in annotated] == [frame.shape for frame in frames]
    assert cv2.VideoCapture(str(tmp_path / "out" / "clip.mp4")).get(cv2.CAP_PROP_FPS) == RATE
    drawn = pictures.draw(frames[5], (found := detector(frames[5])).where(found.scores >= 0.3), detector.classes)
    assert np.abs(annotated[5].astype(int) - drawn).mean() < 6  # it was compressed
    assert np.abs(annotated[5].astype(int) - frames[5]).mean() > 6


def test_every_third_frame(tmp_path):
    clip = write_clip(tmp_path / "clip.avi", 20, (160, 120), "MJPG")
    result = call(clip, "--out", tmp_path / "out", "--every", "3", "--classes", "circle")
    assert result.returncode == 0, result.stderr
    assert f"clip.avi: 6.67 frames a second, to {tmp_path / 'out' / 'clip.mp4'}" in result.stdout
    entries, images = read_results(tmp_path / "out")
    assert [image["frame"] for image in images] == [0, 3, 6, 9, 12, 15, 18]
    assert images[2]["seconds"] == 0.3
    assert (images[0]["height"], images[0]["width"]) == (120, 160)
    assert {entry["category"] for entry in entries} <= {"circle"}
    capture = cv2.VideoCapture(str(tmp_path / "out" / "clip.mp4"))
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(RATE / 3, abs=0.01)
    assert len(frames_of(tmp_path / "out" / "clip.mp4")) == 7


def slow_down(path, start, factor):
    """Show the frames of a clip from `start` on each so many times as long, as write_clip cannot."""
    data = bytearray(path.read_bytes())
    table = data.index(b"stts") - 4  # how many frames last how long
    size, name, flags, entries, count, duration = struct.unpack_from(">I4s4I", data, table)
    assert entries == 1
    slower = (start, duration, count - start, factor * duration)
    data[table : table + size] = struct.pack(">I4s6I", size + 8, name, flags, 2, *slower)
    for parent in (b"moov", b"trak", b"mdia", b"minf", b"stbl"):
        at = data.index(parent) - 4
        struct.pack_into(">I", data, at, struct.unpack_from(">I", data, at)[0] + 8)
    path.write_bytes(data.replace(b"edts", b"free"))  # which would end it where it ended before
    return path


def test_frames_that_last_longer(tmp_path):
    clip = slow_down(write_clip(tmp_path / "clip.mp4", 20), 10, 3)
    assert call(clip, "--every", "2", "--out", tmp_path / "out").returncode == 0
    _, images = read_results(tmp_path / "out")
    assert [image["frame"] for image in images] == list(range(0, 20, 2))
    assert [image["seconds"] for image in images] == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.8, 1.1, 1.4, 1.7]
    annotated = cv2.VideoCapture(str(tmp_path / "out" / "clip.mp4"))
    assert annotated.get(cv2.CAP_PROP_FRAME_COUNT) == 10
    assert annotated.get(cv2.CAP_PROP_FPS) == pytest.approx(5, abs=0.3)  # 20 frames in 2 seconds, of which every other


def test_pictures_and_videos_together(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", 3)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "clip.mp4").write_text("somebody's")
    picture = tmp_path / "7.png"
    cv2.imwrite(str(picture), frames_of(clip)[0])
    result = call(clip, picture, clip.parent / "*.mp4", "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    _, images = read_results(tmp_path / "out")
    assert sorted(image["id"] for image in images) == [7, 8, 9, 10]  # 7.png keeps its number
    assert (tmp_path / "out" / "clip.mp4").read_text() == "somebody's"
    assert len(frames_of(tmp_path / "out" / "clip_2.mp4")) == 3


def test_a_second_run_knows_the_videos_of_the_first(tmp_path):
    """It replaces them, and takes none for an input."""
    clip = write_clip(tmp_path / "clip.mp4", 3)
    for arguments in ([clip], [clip, tmp_path / "out" / "*.mp4"]):
        result = call(*arguments, "--every", "2", "--out", tmp_path / "out")
        assert result.returncode == 0, result.stderr
        assert [path.name for path in (tmp_path / "out").glob("*.mp4")] == ["clip.mp4"]
        assert len(frames_of(tmp_path / "out" / "clip.mp4")) == 2
    assert f"left out, annotated by an earlier run: {tmp_path / 'out' / 'clip.mp4'}\n" in result.stderr
    assert pictures.is_annotated(tmp_path / "out" / "clip.mp4")
    assert not pictures.is_annotated(clip)


def test_a_video_that_was_cut(tmp_path):
    whole = write_clip(tmp_path / "clip.avi", 40, codec="MJPG").read_bytes()
    (tmp_path / "clip.avi").write_bytes(whole[: len(whole) // 2])
    result = call(tmp_path / "clip.avi", "--out", tmp_path / "out")
    assert result.returncode == 1
    assert "clip.avi: it ends after " in result.stderr
    assert "of 40 frames: what there is was written" in result.stderr
    _, images = read_results(tmp_path / "out")
    assert 5 < len(images) < 35
    assert len(frames_of(tmp_path / "out" / "clip.mp4")) == len(images)


def test_what_is_no_video(tmp_path):
    (tmp_path / "bad.mp4").write_text("words")
    result = call(tmp_path / "bad.mp4", "--out", tmp_path / "out")
    assert result.returncode == 2
    assert_one_line(result.stderr, "bad.mp4: not a video that OpenCV can read")
    result = call("camera:99", "--out", tmp_path / "out")
    assert result.returncode == 2
    assert_one_line(result.stderr, "camera:99: no such camera")
    assert list((tmp_path / "out").iterdir()) == []
    for every in ("0", "-1", "x"):
        assert call("--every", every, "--out", tmp_path / "out").returncode == 2


class Camera:
    """What cv2.VideoCapture(0) is where there is a camera: frames at their own pace, without end."""

    def __init__(self, source):
        self.source, self.taken = source, 0

    def isOpened(self):  # noqa: N802, OpenCV's name
        """Return whether this camera is there."""
        return self.source == 3

    def get(self, _):
        """Return 0, as cameras do that do not know."""
        return 0.0

    def grab(self):
        """Wait for the next frame."""
        self.taken += 1
        time.sleep(0.01)
        return True

    def retrieve(self):
        """Return the frame."""
        return True, np.full((60, 80, 3), self.taken % 250, np.uint8)

    def release(self):
        """Switch it off."""
        self.source = None


def test_a_camera_is_read_until_it_is_interrupted(tmp_path, monkeypatch):
    opened, seen = cv2.VideoCapture, []
    monkeypatch.setattr(videos.cv2, "VideoCapture", lambda path: Camera(path) if path == 3 else opened(path))

    def detector(image, record):
        seen.append(image[0, 0, 0])
        time.sleep(0.05)
        if len(seen) == 12:
            raise KeyboardInterrupt
        return load_once(image)

    load_once = load(SHAPES)
    fake = SimpleNamespace(classes=load_once.classes, settings=load_once.settings, networks=load_once.networks)
    monkeypatch.setattr(demo, "load", lambda *arguments: Detector(fake, detector))
    result = call_demo("camera:3", "--out", tmp_path)
    assert result.returncode == 130
    monkeypatch.undo()
    _, images = read_results(tmp_path)
    assert len(images) == 11
    numbers, seconds = ([image[key] for image in images] for key in ("frame", "seconds"))
    assert numbers == sorted(set(numbers))
    assert numbers[-1] > 11  # what was not wanted in time was left out
    assert 0.3 < seconds[-1] < 30
    length = len(frames_of(tmp_path / "camera_3.mp4"))
    assert abs(length - seconds[-1] * 25) <= 2  # each picture is shown until the next one was seen
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".json", ".mp4"]


class Ending(Camera):
    """A camera that is unplugged, a video that cannot be read any further, or one without frames."""

    frames, error = 5, None

    def grab(self):
        """Return whether there is another frame."""
        self.taken += 1
        if self.taken > self.frames and self.error:
            raise self.error
        return self.taken <= self.frames


@pytest.mark.parametrize(
    ("source", "frames", "error", "words"),
    [
        ("camera:3", 5, None, "camera:3: it stopped after 5 frames: what there is was written"),
        ("camera:3", 0, None, "no frame could be read"),
        ("camera:3", 4, cv2.error("broken"), "it cannot be read after 4 frames: error"),
    ],
)
def test_a_source_that_ends(tmp_path, monkeypatch, source, frames, error, words):
    class Source(Ending):
        pass

    Source.frames, Source.error = frames, error
    opened = cv2.VideoCapture
    monkeypatch.setattr(videos.cv2, "VideoCapture", lambda path: Source(path) if path == 3 else opened(path))
    result = call(source, "--out", tmp_path)
    assert result.returncode == (1 if frames else 2)
    assert words in result.stderr
    assert (tmp_path / "camera_3.mp4").exists() == bool(frames)
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


def test_what_a_camera_saw_is_never_replaced(tmp_path, monkeypatch):
    opened = cv2.VideoCapture
    monkeypatch.setattr(videos.cv2, "VideoCapture", lambda path: Ending(path) if path == 3 else opened(path))
    for names in ({"camera_3.mp4"}, {"camera_3.mp4", "camera_3_2.mp4"}):
        call("camera:3", "--out", tmp_path)
        assert {path.name for path in tmp_path.glob("*.mp4")} == names
    monkeypatch.undo()
    (tmp_path / "in").mkdir()
    clip = write_clip(tmp_path / "in" / "camera_3.mp4", 2)  # nor by a video of this name
    seen = (tmp_path / "camera_3.mp4").read_bytes()
    assert call(clip, "--out", tmp_path).returncode == 0
    assert (tmp_path / "camera_3.mp4").read_bytes() == seen
    assert (tmp_path / "camera_3_3.mp4").exists()


def test_frames_of_odd_and_of_changing_sizes(tmp_path):
    with videos.Writer(tmp_path / "odd.mp4", 25) as writer:
        for size in ((121, 161), (121, 161), (60, 90)):
            writer.write(np.full((*size, 3), 200, np.uint8))
    assert [frame.shape for frame in frames_of(tmp_path / "odd.mp4")] == [(122, 162, 3)] * 3


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(videos.VideoError, match="OpenCV cannot write 9000 x 5000 pixels as mp4v"):
        write_frames(tmp_path / "large.mp4", [np.zeros((5000, 9000, 3), np.uint8)])
    with pytest.raises(AttributeError):
        write_frames(tmp_path / "none.mp4", [None])
    assert list(tmp_path.iterdir()) == []
    noise = np.random.default_rng(0).integers(0, 256, (10, 240, 320, 3), dtype=np.uint8)
    with pytest.raises(videos.VideoError, match="could not be written whole: is the disk full"):
        write_frames(tmp_path / "cut.mp4", noise, most_bytes=50_000)
    assert list(tmp_path.iterdir()) == []


def write_frames(path, frames, most_bytes=None):
    """Write frames to a file that may not become larger."""
    limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    with videos.Writer(path, 25) as writer:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes or limit, most))
        try:
            for frame in frames:
                writer.write(frame)
            writer.writer.release()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))


@pytest.mark.parametrize("rate", [1, 12.5, 29.97, 59.94, 66.667, 119.987, 143.857, 240.05, 660.33, 999.9])
def test_every_rate_can_be_written(tmp_path, rate):
    with videos.Writer(tmp_path / "clip.mp4", rate) as writer:
        for _ in range(3):
            writer.write(np.zeros((48, 64, 3), np.uint8))
    assert cv2.VideoCapture(str(tmp_path / "clip.mp4")).get(cv2.CAP_PROP_FPS) == pytest.approx(rate, rel=1e-3)


@pytest.mark.parametrize("lost", [False, True])
def test_interrupted_between_writing_a_frame_and_counting_it(tmp_path, lost):
    """Nothing hides the interrupt, and what is there plays."""

    def write():
        with videos.Writer(tmp_path / "clip.mp4", 25) as writer:
            for _ in range(5):
                writer.write(np.zeros((48, 64, 3), np.uint8))
            writer.writer.write(np.zeros((48, 64, 3), np.uint8))
            if lost:
                writer.partial.unlink()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ([] if lost else ["clip.mp4"])
    assert lost or len(frames_of(tmp_path / "clip.mp4")) == 6


def test_a_disk_that_becomes_full(tmp_path, monkeypatch):
    """The video ends while there is room for what lets it play."""
    free = iter([2**30] * 7 + [2**20] * 9)
    monkeypatch.setattr(videos.shutil, "disk_usage", lambda path: SimpleNamespace(free=next(free)))
    with pytest.raises(videos.VideoError, match=r"nearly full: .*clip\.mp4 ends after 7 frames"):
        write_frames(tmp_path / "clip.mp4", np.zeros((9, 48, 64, 3), np.uint8))
    assert len(frames_of(tmp_path / "clip.mp4")) == 7


def test_frames_that_come_faster_than_the_rate(tmp_path):
    with videos.Writer(tmp_path / "camera.mp4", 25) as writer:
        for number in range(120):
            writer.write(np.zeros((48, 64, 3), np.uint8), number / 60)
    assert abs(len(frames_of(tmp_path / "camera.mp4")) - 50) <= 1  # two seconds


def test_odd_names(tmp_path, monkeypatch):
    clip = write_clip(tmp_path / "clip.mp4", 2).read_bytes()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "12:30.MP4").write_bytes(clip)
    assert call("12:30.MP4", "--out", tmp_path / "a:b").returncode == 0
    assert len(frames_of(tmp_path / "a:b" / "12:30.mp4")) == 2
    bad = os.fsdecode(b"bad\xff.mp4")
    try:
        (tmp_path / bad).write_bytes(clip)
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    result = call(bad, "--out", tmp_path / "out")
    assert result.returncode == 2
    assert "its name is not UTF-8" in result.stderr


class Detector:
    """A detector whose answer is a function's."""

    def __init__(self, like, answer):
        self.classes, self.settings, self.networks, self.answer = like.classes, like.settings, like.networks, answer

    def __call__(self, image, record):
        """Return the answer."""
        return self.answer(image, record)


def test_the_next_frames_are_read_meanwhile_and_no_more_than_a_few(tmp_path):
    video = videos.Video(write_clip(tmp_path / "clip.mp4", 60, (64, 48)))
    before = threading.active_count()
    frames = video.frames()
    first = next(frames)
    time.sleep(0.5)
    assert first.number == 0
    assert video.capture.get(cv2.CAP_PROP_POS_FRAMES) in (videos.AHEAD + 1, videos.AHEAD + 2)
    assert threading.active_count() == before + 1
    frames.close()
    assert not video.capture.isOpened()
    assert threading.active_count() == before


@pytest.mark.slow
def test_memory_stays_flat(tmp_path):
    clip, found = write_clip(tmp_path / "clip.mp4", 3000), load(SHAPES)(np.zeros((60, 80, 3), np.uint8))
    args = SimpleNamespace(out=tmp_path, every=1, show=False, score_thr=2, labels=None)
    like, peaks = load(SHAPES), []
    detector = Detector(like, lambda image, record: found)
    watch = SimpleNamespace(start=lambda: None, record=None)
    for number, _ in enumerate(demo.annotate_video(detector, str(clip), set(), watch, args)):
        if number in (300, 2999):
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    assert peaks[1] - peaks[0] < 10  # MiB


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_the_file_plays(tmp_path, how):
    clip = write_clip(tmp_path / "clip.mp4", 400)
    process = subprocess.Popen(
        [sys.executable, ROOT / "demo.py", clip, "--out", tmp_path / "out", "--model", SHAPES],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(PYTHONUNBUFFERED="1"),
        preexec_fn=default_sigint,
    )  # fmt: skip
    for line in process.stdout:
        if "frames a second" in line:
            break
    time.sleep(4)
    process.send_signal(how)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "interrupted: what was done is written" in stderr
    images = json.loads((tmp_path / "out" / "pictures.json").read_text())["images"]
    assert 3 < len(images) < 400
    assert abs(len(frames_of(tmp_path / "out" / "clip.mp4")) - len(images)) <= 1
    assert not [path for path in (tmp_path / "out").iterdir() if "partial" in path.name]

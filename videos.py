"""Videos and cameras: frames come in, annotated frames go out."""

import contextlib
import os
import queue
import secrets
import shutil
import struct
import threading
import time
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm"}
AHEAD = 4  # frames that are read while the networks work on another
SIGN = "faster-rcnn-onnx"
MARK = b"Software\0" + SIGN.encode()  # in all that is annotated, so that none of it is taken for an input later
SPARE = 2**24  # bytes that the disk must have left: a video ends with a table of its frames, without which none plays
CODEC = "mp4v"  # MPEG-4 part 2, the one that every OpenCV can write


class VideoError(Exception):
    """A video cannot be read or written; the message says why."""


class Frame(NamedTuple):
    """A frame of a video."""

    number: int  # the first one is 0
    seconds: float  # from the beginning
    image: np.ndarray  # [h, w, 3] uint8, BGR


def is_camera(path):
    """Return whether a name on the command line is a camera's, such as camera:0."""
    kind, _, number = str(path).partition(":")
    return kind == "camera" and number.isdecimal() and len(number) < 4


def is_video(path):
    """Return whether a name on the command line is a video's or a camera's."""
    return is_camera(path) or Path(path).suffix.lower() in SUFFIXES


def for_opencv(path):
    """Return a path as OpenCV takes it: a colon in a relative one means a protocol, bad UTF-8 would end the process."""
    path = os.path.abspath(path)
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise VideoError("its name is not UTF-8: give it another one") from error
    return path


def empty(waiting):
    """Take everything out of a queue."""
    with contextlib.suppress(queue.Empty):
        while True:
            waiting.get_nowait()


class Video:
    """A video, or a camera, that has been opened; `length` is how many frames it says that it has, 0 if it does not."""

    def __init__(self, path):
        self.live, self.count, self.error = is_camera(path), 0, None  # count: of the frames that were there
        self.capture = cv2.VideoCapture(int(str(path).partition(":")[2]) if self.live else for_opencv(path))
        if not self.capture.isOpened():
            raise VideoError("no such camera" if self.live else "not a video that OpenCV can read")
        rate = self.capture.get(cv2.CAP_PROP_FPS)
        self.rate = rate if 0 < rate <= 1000 else 25.0
        self.length = 0 if self.live else max(0, int(self.capture.get(cv2.CAP_PROP_FRAME_COUNT)))

    def frames(self, every=1):
        """Yield every so many Frames; a thread reads ahead. At the end, or when nobody wants more, it is closed.

        VideoError if there is no frame, or if a camera stops, or a video ends too early.
        """
        waiting, stop = queue.Queue(AHEAD), threading.Event()
        reader = threading.Thread(target=self.read, args=(waiting, stop, every), daemon=True)
        reader.start()
        try:
            while True:
                frame = waiting.get()
                if frame is None:
                    break
                yield frame
        finally:
            stop.set()
            empty(waiting)  # so that the thread does not wait for a place
            reader.join()
            self.capture.release()
        self.check_end()

    def read(self, waiting, stop, every):
        """Put every so many Frames into a queue, and None behind the last one. Of a camera, the latest one waits."""
        start = time.monotonic()
        try:
            while not stop.is_set() and self.capture.grab():
                if self.count % every == 0:
                    good, image = self.capture.retrieve()
                    if not good:
                        break
                    if self.live:
                        empty(waiting)
                    seconds = time.monotonic() - start if self.live else self.position()
                    waiting.put(Frame(self.count, seconds, image))
                self.count += 1
        except (cv2.error, MemoryError) as error:
            self.error = error
        finally:
            waiting.put(None)

    def position(self):
        """Return the time in seconds of the frame that was grabbed: a phone's videos have no constant rate."""
        milliseconds = self.capture.get(cv2.CAP_PROP_POS_MSEC)  # 0 where the container does not say
        return milliseconds / 1000 if milliseconds > 0 else self.count / self.rate

    def check_end(self):
        """Refuse an end that is none: VideoError."""
        if self.error:
            raise VideoError(
                f"it cannot be read after {self.count} frames: {type(self.error).__name__}"
            ) from self.error
        if self.count == 0:
            raise VideoError("no frame could be read")
        if self.live:
            raise VideoError(f"it stopped after {self.count} frames: what there is was written")
        if self.count < self.length - max(2, self.length // 100):  # some containers only estimate it
            raise VideoError(f"it ends after {self.count} of {self.length} frames: what there is was written")


class Writer:
    """Writes frames to an .mp4 file, which has its name only once it is whole; use it in a `with` statement."""

    def __init__(self, path, rate):
        self.path, self.writer, self.count = path, None, 0
        rate = max(1.0, rate)
        self.rate = round(rate, 2 if rate < 655 else 1)  # the codec has 16 bits for the number of ticks in a second
        self.partial = path.parent / f".{secrets.token_hex(8)}.partial.mp4"

    def __enter__(self):
        return self

    def open(self, height, width):
        """Open the file for frames of this size."""
        if not os.access(self.path.parent, os.W_OK):
            raise VideoError(f"{self.path.parent} may not be written")
        code = cv2.VideoWriter_fourcc(*CODEC)
        writer = cv2.VideoWriter(for_opencv(self.partial), code, self.rate, (width, height))
        if not writer.isOpened():
            raise VideoError(f"OpenCV cannot write {width} x {height} pixels as {CODEC} to {self.path.parent}")
        self.writer, self.size = writer, (width, height)

    def write(self, image, seconds=None):
        """Add a frame. `seconds`: when it was seen; until then the one before is repeated, too early it is left out."""
        height, width = image.shape[:2]
        # The codec wants even sides.
        image = cv2.copyMakeBorder(image, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
        if self.writer is None:
            self.open(*image.shape[:2])
        if image.shape[1::-1] != self.size:
            image = cv2.resize(image, self.size)
        while seconds is not None and 0 < self.count < round(seconds * self.rate):
            self.add(self.last)
        if seconds is None or self.count <= round(seconds * self.rate):
            self.add(image)

    def add(self, image):
        """Write a frame of the right size."""
        if shutil.disk_usage(self.path.parent).free < SPARE:
            raise VideoError(f"the disk is nearly full: {self.path} ends after {self.count} frames")
        self.writer.write(image)
        self.last, self.count = image, self.count + 1

    def __exit__(self, kind, *_):
        try:
            if self.writer is not None:
                self.writer.release()  # also when it was interrupted: what is there plays
                self.give_name(interrupted=kind is KeyboardInterrupt)
        finally:
            self.partial.unlink(missing_ok=True)

    def give_name(self, interrupted):
        """Give the file its name if it plays; VideoError if it lacks frames, unless that hides an interrupt."""
        written = cv2.VideoCapture(for_opencv(self.partial))
        frames = int(written.get(cv2.CAP_PROP_FRAME_COUNT)) if written.isOpened() else 0
        if frames < self.count and not interrupted:
            raise VideoError(f"{self.path} could not be written whole: is the disk full?")
        if frames:  # one more than were counted, if it was interrupted after writing one
            with self.partial.open("ab") as file:  # a box that players skip
                file.write(struct.pack(">I", 8 + len(MARK)) + b"free" + MARK)
            os.replace(self.partial, self.path)

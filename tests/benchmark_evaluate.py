"""Time and memory of evaluate.py, with the bundled model: uv run --extra export tests/benchmark_evaluate.py.

What the threads that read ahead gain, against reading and detecting one after the other (taking turns, medians), on
drawn pictures and on large photographs; and the memory of a run over 2,000 pictures. --plot FILE draws its curve.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SHAPES = ROOT / "ckpt" / "shapes"
sys.path[:0] = [str(ROOT), str(HERE), str(SHAPES)]

PICTURES, ROUNDS, RUN = 60, 5, 2000


def draw_pictures(folder):
    """Write drawn pictures and their annotations; return COCO's images."""
    import dataset

    dataset.SPLITS = {"val": range(3_500_000, 3_500_000 + PICTURES)}
    dataset.write_split(folder, "val")
    return json.loads((folder / "val.json").read_text())["images"]


def write_photographs(folder):
    """Write a photograph, 3000 x 2000, several times as JPEG; return COCO's images."""
    import skimage.data

    photograph = cv2.resize(skimage.data.coffee()[..., ::-1], (3000, 2000))
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(PICTURES // 2)]
    for image in images:
        cv2.imwrite(str(folder / image["file_name"]), photograph)
    return images


def race_reading(title, images, folder):
    """Print what reading ahead takes of the time without it."""
    from benchmark import race, report

    import evaluate
    from detectors import load
    from pictures import read_picture

    detector = load(SHAPES)
    settings = detector.settings.preprocess

    def one_after_the_other():
        for image in images:
            detector(read_picture(folder / image["file_name"]))

    def reading_ahead():
        for _, future in evaluate.prepared_pictures(images, folder, settings):
            detector.detect_in(future.result())

    report(title, race({"ours": reading_ahead, "one after the other": one_after_the_other}, ROUNDS), {})


def measure_memory(images, folder):
    """Run evaluate.py over many pictures; return how many were done and its MiB of memory, every half second."""
    content = json.loads((folder / "val.json").read_text())
    content["images"] = [{**images[i % len(images)], "id": i} for i in range(RUN)]
    content["annotations"] = [{**content["annotations"][0], "image_id": 0}]
    (folder / "many.json").write_text(json.dumps(content))
    command = [ROOT / "evaluate.py", folder / "many.json", folder / "val", "--model", SHAPES, "--out", folder / "out"]
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    partial, curve = folder / "out" / "detections.1-of-1.jsonl", []
    while process.poll() is None:
        time.sleep(0.5)
        if partial.exists():
            status = Path(f"/proc/{process.pid}/status").read_text()
            resident = re.search(r"VmRSS:\s+(\d+) kB", status)
            if resident:
                curve.append((partial.read_bytes().count(b"\n") - 1, int(resident[1]) / 1024))
    assert process.returncode == 0
    return np.array(curve)


def plot(curve, path):
    """Draw memory against pictures."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 2.8), layout="constrained")
    axis.plot(*curve.T, color="#0072b2")
    axis.set_xlabel("pictures done")
    axis.set_ylabel("memory, MiB")
    axis.set_ylim(0)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main():
    """Run it all and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", metavar="FILE", help="draw the memory")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = draw_pictures(folder)
        race_reading(f"{PICTURES} drawn pictures", images, folder / "val")
        race_reading(f"{PICTURES // 2} photographs, 3000 x 2000, JPEG", write_photographs(folder), folder)
        curve = measure_memory(images, folder)
    early, late = (
        np.median(curve[(curve[:, 0] > RUN * low) & (curve[:, 0] < RUN * (low + 0.2)), 1]) for low in (0.1, 0.7)
    )
    print(f"\nMemory after 10 to 30 % of {RUN} pictures {early:.0f} MiB, after 70 to 90 % {late:.0f} MiB")
    if args.plot:
        plot(curve, args.plot)


if __name__ == "__main__":
    main()

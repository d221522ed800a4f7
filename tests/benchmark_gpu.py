"""Time exports on an NVIDIA GPU, with the NumPy between their networks and in one file, against the CPU.

python tests/benchmark_gpu.py [EXPORT ...] [--picture FILE] [--provider NAME]

Needs onnxruntime-gpu, and onnxscript for the single files. Everything that runs is compared with the CPU's detections.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402

from compare import largest_differences, pair_detections  # noqa: E402
from demo import Stopwatch  # noqa: E402
from detectors import BUNDLED, Execution, load  # noqa: E402
from pictures import read_picture, run_program, write_file  # noqa: E402
from whole import build  # noqa: E402

RUNS = 20


def run_times(detector, image):
    """Return the median milliseconds of each stage and of the whole, and those of the first picture of a new size."""
    detector(image)
    upright = np.ascontiguousarray(image.swapaxes(0, 1))
    start = time.perf_counter()
    detector(upright)
    new_size = (time.perf_counter() - start) * 1000
    detector(image)
    watches = [Stopwatch() for _ in range(RUNS)]
    for watch in watches:
        watch.start()
        detector(image, watch.record)
    stages = {stage: np.median([watch.milliseconds[stage] for watch in watches]) for stage in watches[0].milliseconds}
    return stages, np.median([watch.elapsed() for watch in watches]), new_size


def report(name, detector, image, expected):
    """Print the times of a detector, and how far what it finds is from what was expected."""
    found = detector(image)
    first, second = pair_detections(found, expected)
    pixels, scores = largest_differences(first, second)
    stages, whole, new_size = run_times(detector, image)
    print(f"{name:22} {whole:7.1f} ms; another size {new_size:6.0f} ms; {len(first.boxes)} of {len(expected.boxes)} "
          f"paired, {pixels:.1e} px, {scores:.1e} in score", flush=True)  # fmt: skip
    print("    " + " + ".join(f"{stage} {ms:.1f}" for stage, ms in stages.items()), flush=True)


def main(arguments=None):
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exports", metavar="EXPORT", nargs="*", type=Path, default=[BUNDLED], help="their folders")
    parser.add_argument("--picture", metavar="FILE", default=str(BUNDLED.parents[1] / "asset" / "shapes.png"))
    parser.add_argument("--provider", metavar="NAME", default="cuda")
    args = parser.parse_args(arguments)
    image, gpu = read_picture(args.picture), (args.provider,)
    for export in args.exports:
        print(f"{export}: {args.picture}, {image.shape[1]} x {image.shape[0]} pixels", flush=True)
        cpu = load(export)
        expected = cpu(image)
        report("CPU", cpu, image, expected)
        report(args.provider, load(export, execution=Execution(gpu)), image, expected)
        tf32 = Execution(gpu, {"use_tf32": "1"})
        report(f"{args.provider}, TF32", load(export, execution=tf32), image, expected)
        all_tried = Execution(gpu, {"cudnn_conv_algo_search": "EXHAUSTIVE"})
        report(f"{args.provider}, all tried", load(export, execution=all_tried), image, expected)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "detector.onnx"
            write_file(file, build(cpu).SerializeToString())
            report(f"{args.provider}, one file", load(file, execution=Execution(gpu)), image, expected)
            report(f"{args.provider}, one file, TF32", load(file, execution=tf32), image, expected)
    return 0


if __name__ == "__main__":
    run_program(main)

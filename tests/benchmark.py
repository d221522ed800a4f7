"""Race the NumPy against the compiled operators that it replaces: uv run --extra export tests/benchmark.py.

Every contest gives all contestants the same input, checks that they agree, warms up, and then lets them take turns
(A B C A B C ...), so that a noisy machine is noisy for all. Printed: median, spread (interquartile range), and our
median as a part of the best peer's. --json FILE writes the same as data; --plot FILE draws the growth.
"""

import argparse
import functools
import json
import multiprocessing
import os
import platform
import re
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from detectors.preprocess import Picture  # noqa: E402
from detectors.settings import Anchors, Head, Proposals, RoIs, changed  # noqa: E402

ROUNDS = 7
IMAGE_SIZE = (800, 1216)
STRIDES = (4, 8, 16, 32, 64)


def race(contestants, rounds=ROUNDS):
    """Return the seconds [rounds] that each of the functions took, taking turns after one warm-up each."""
    for run in contestants.values():
        run()
    seconds = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def report(title, seconds, results):
    """Print one contest and keep it in the results."""
    medians = {name: float(np.median(times)) for name, times in seconds.items()}
    best_peer = min(median for name, median in medians.items() if not name.startswith("ours"))
    print(f"\n{title}")
    for name, times in seconds.items():
        low, high = np.percentile(times, [25, 75])
        ours_to_it = "" if name == "ours" else f"   ours takes {medians['ours'] / medians[name]:.2f} of it"
        print(f"  {name:34} {medians[name] * 1e3:9.2f} ms  +- {(high - low) / 2 * 1e3:.2f}{ours_to_it}")
    results[title] = {"median_seconds": medians, "ratio_to_best_peer": medians["ours"] / best_peer}


# ------------------------------------------------------------------ inputs


def proposals_like(rng, count):
    """Return boxes [count, 4] crowded around objects as an RPN's proposals are, and distinct scores [count]."""
    height, width = IMAGE_SIZE
    objects = max(count // 25, 1)
    place = rng.integers(0, objects, count)
    sizes = np.exp(rng.normal(np.log(90), 0.9, (objects, 2)))[place] * np.exp(rng.normal(0, 0.2, (count, 2)))
    centers = rng.uniform(0, [width, height], (objects, 2))[place] + rng.normal(0, 0.15, (count, 2)) * sizes
    boxes = np.concatenate([centers - sizes / 2, centers + sizes / 2], axis=1)
    scores = rng.permutation(np.linspace(0, 1, count, dtype=np.float32))
    return np.clip(boxes, 0, [width, height, width, height]).astype(np.float32), scores


def pyramid(rng, channels=256):
    """Return random feature maps [channels, h, w] of the four finest levels."""
    return [
        rng.standard_normal((channels, IMAGE_SIZE[0] // s, IMAGE_SIZE[1] // s), dtype=np.float32) for s in STRIDES[:4]
    ]


def onnx_roi_align(features):
    """Return a session with one RoiAlign operator for each level: (features, rois) -> four [r, C, 7, 7]."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    nodes, inputs, outputs = [], [], []
    for level, stride in enumerate(STRIDES[:4]):
        names = [f"features_{level}", f"rois_{level}", f"batch_{level}"]
        nodes.append(helper.make_node(
            "RoiAlign", names, [f"out_{level}"], mode="avg", output_height=7, output_width=7, sampling_ratio=0,
            spatial_scale=1 / stride, coordinate_transformation_mode="half_pixel",
        ))  # fmt: skip
        inputs.append(
            helper.make_tensor_value_info(names[0], TensorProto.FLOAT, [1, features[level].shape[0], None, None])
        )
        inputs.append(helper.make_tensor_value_info(names[1], TensorProto.FLOAT, [None, 4]))
        inputs.append(helper.make_tensor_value_info(names[2], TensorProto.INT64, [None]))
        outputs.append(helper.make_tensor_value_info(f"out_{level}", TensorProto.FLOAT, [None, None, 7, 7]))
    graph = helper.make_graph(nodes, "roi_align", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 16)], ir_version=8)
    onnx.checker.check_model(model)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


# ------------------------------------------------------------------ contests


def roi_align_contestants(count):
    """Return the contestants of RoIAlign: each pools `count` RoIs over the pyramid and returns [r, C, 7, 7]."""
    import mmcv.ops
    import torch
    import torchvision

    import postprocess

    rng = np.random.default_rng(0)
    features, rois = pyramid(rng), proposals_like(rng, count)[0]
    settings = RoIs(strides=STRIDES[:4], finest_scale=56, output_size=7, sampling_ratio=0, aligned=True)
    levels = postprocess.assign_levels(rois, 4)
    tensors = [torch.from_numpy(feature)[None] for feature in features]
    session = onnx_roi_align(features)
    here = [np.flatnonzero(levels == level) for level in range(4)]

    def ours():
        return postprocess.align_levels(features, rois, levels, settings)

    def compiled(operator):
        result = torch.empty(count, 256, 7, 7)
        for level, indices in enumerate(here):
            if len(indices):
                boxes = torch.from_numpy(np.insert(rois[indices], 0, 0, axis=1))
                result[torch.from_numpy(indices)] = operator(tensors[level], boxes, 1 / STRIDES[level])
        return result.numpy()

    def onnx_runtime():
        feed = {f"features_{level}": feature[None] for level, feature in enumerate(features)}
        feed.update({f"rois_{level}": rois[indices] for level, indices in enumerate(here)})
        feed.update({f"batch_{level}": np.zeros(len(indices), np.int64) for level, indices in enumerate(here)})
        result = np.empty((count, 256, 7, 7), np.float32)
        for indices, part in zip(here, session.run(None, feed)):
            result[indices] = part
        return result

    return {
        "ours": ours,
        "mmcv.ops.roi_align": lambda: compiled(lambda x, r, s: mmcv.ops.roi_align(x, r, (7, 7), s, 0, "avg", True)),
        "torchvision.ops.roi_align": lambda: compiled(
            lambda x, r, s: torchvision.ops.roi_align(x, r, (7, 7), s, 0, True)
        ),
        "ONNX Runtime RoiAlign": onnx_runtime,
    }


def nms_contestants(count):
    """Return the contestants of NMS at IoU 0.7: each returns the kept indices."""
    import mmcv.ops
    import torch
    import torchvision

    import postprocess

    boxes, scores = proposals_like(np.random.default_rng(0), count)
    tensors = torch.from_numpy(boxes), torch.from_numpy(scores)
    return {
        "ours": lambda: postprocess.nms(boxes, scores, 0.7),
        "mmcv.ops.nms": lambda: mmcv.ops.nms(*tensors, 0.7)[1].numpy(),
        "torchvision.ops.nms": lambda: torchvision.ops.nms(*tensors, 0.7).numpy(),
    }


def rpn_contestants():
    """Return the contestants of the RPN's end: maps of 240,000 anchors -> 1000 proposals [r, 4]."""
    import cv2
    import mmcv
    import torch
    from mmdet.models import build_head

    import postprocess

    rng = np.random.default_rng(0)
    sizes = [(-(-IMAGE_SIZE[0] // s), -(-IMAGE_SIZE[1] // s)) for s in STRIDES]
    cls = []
    for height, width in sizes:  # smooth, as objectness is: the best anchors are neighbours
        noise = cv2.GaussianBlur(rng.standard_normal((height, width, 3)), (0, 0), 2)
        cls.append(np.ascontiguousarray((noise / noise.std() * 2 - 5).transpose(2, 0, 1), np.float32))
    reg = [rng.normal(0, 0.2, (12, height, width)).astype(np.float32) for height, width in sizes]
    test_cfg = {"nms_pre": 1000, "max_per_img": 1000, "min_bbox_size": 0, "nms": {"type": "nms", "iou_threshold": 0.7}}
    head = build_head({
        "type": "RPNHead", "in_channels": 1, "feat_channels": 1, "test_cfg": mmcv.ConfigDict(test_cfg),
        "anchor_generator": {"type": "AnchorGenerator", "scales": [8], "ratios": [0.5, 1.0, 2.0], "strides": STRIDES},
        "bbox_coder": {"type": "DeltaXYWHBBoxCoder", "target_means": [0.0] * 4, "target_stds": [1.0] * 4},
        "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": True},
    })  # fmt: skip
    maps = [[torch.from_numpy(x)[None] for x in kind] for kind in (cls, reg)]
    meta = [{"img_shape": (*IMAGE_SIZE, 3)}]
    anchors = Anchors(strides=STRIDES, base_sizes=STRIDES, scales=(8,), ratios=(0.5, 1.0, 2.0), center_offset=0)
    settings = Proposals(
        anchors=anchors, means=[0] * 4, stds=[1] * 4, nms_pre=1000, min_bbox_size=0, iou_threshold=0.7, max_per_img=1000
    )
    return {
        "ours": lambda: postprocess.propose(cls, reg, IMAGE_SIZE, settings),
        "mmdet RPNHead.get_bboxes": lambda: head.get_bboxes(*maps, img_metas=meta)[0][:, :4].numpy(),
    }


def head_contestants():
    """Return the contestants of the head's end: 1000 RoIs, 80 classes -> 100 boxes."""
    import mmcv
    import torch
    from mmdet.models import build_head

    import postprocess

    rng = np.random.default_rng(0)
    rois = proposals_like(rng, 1000)[0]
    cls = rng.normal(0, 1.5, (1000, 81)).astype(np.float32)
    cls[:, 80] += 6  # most of what is proposed is background
    reg = rng.normal(0, 0.5, (1000, 320)).astype(np.float32)
    stds, scale = [0.1, 0.1, 0.2, 0.2], np.float32([2, 2, 2, 2])
    coder = {"type": "DeltaXYWHBBoxCoder", "target_means": [0.0] * 4, "target_stds": stds}
    head = build_head({"type": "Shared2FCBBoxHead", "in_channels": 1, "fc_out_channels": 1, "bbox_coder": coder})
    cfg = mmcv.ConfigDict(score_thr=0.05, nms={"type": "nms", "iou_threshold": 0.5}, max_per_img=100)
    inputs = [torch.from_numpy(x) for x in (np.insert(rois, 0, 0, axis=1), cls, reg)]
    picture = Picture(None, IMAGE_SIZE, scale, None)
    settings = Head(
        means=[0] * 4, stds=stds, class_agnostic=False, score_threshold=0.05, iou_threshold=0.5, max_per_img=100
    )
    return {
        "ours": lambda: postprocess.detect(cls, reg, rois, picture, settings).boxes,
        "mmdet BBoxHead.get_bboxes": lambda: head.get_bboxes(*inputs, IMAGE_SIZE, scale, True, cfg)[0][:, :4].numpy(),
    }


def pasting_contestants():
    """Return the contestants of pasting: logits of 100 boxes to masks of a picture of 800 x 1216.

    Ours are run-length encoded, MMDetection's are arrays.
    """
    import cv2
    import torch
    from mmcv import ConfigDict
    from mmdet.models.roi_heads.mask_heads import FCNMaskHead

    from detectors.mask_rcnn import paste_all
    from detectors.settings import Masks
    from postprocess import sigmoid

    rng = np.random.default_rng(0)
    boxes = proposals_like(rng, 100)[0]
    labels = rng.integers(0, 80, 100)
    logits = rng.normal(0, 2, (100, 80, 28, 28)).astype(np.float32)
    for cells, label in zip(logits, labels):
        cells[label] = 4 * cv2.GaussianBlur(cells[label], (7, 7), 2)  # masks in few parts, as trained heads give them
    picture = Picture(None, None, np.ones(4, np.float32), IMAGE_SIZE)
    rois = RoIs(strides=STRIDES[:4], finest_scale=56, output_size=14, sampling_ratio=0, aligned=True)
    settings = Masks(rois=rois, threshold=0.5)
    head = FCNMaskHead(num_convs=0, in_channels=1, conv_out_channels=1)
    inputs = torch.from_numpy(logits), torch.from_numpy(boxes), torch.from_numpy(labels)
    cfg, size, factor = ConfigDict(mask_thr_binary=0.5), (*IMAGE_SIZE, 3), np.ones(4)
    return {
        "ours": lambda: paste_all(sigmoid(logits[np.arange(100), labels]), boxes, picture, settings),
        "mmdet FCNMaskHead.get_seg_masks": lambda: head.get_seg_masks(*inputs, cfg, size, factor, True),
    }


def check_masks(contestants):
    """Stop if the two contestants of pasting do not make masks of as many pixels."""
    from detectors import rle

    ours, per_class = (run() for run in contestants.values())
    expected = sorted(int(mask.sum()) for masks in per_class for mask in masks)
    assert sorted(int(rle.decode(mask).sum()) for mask in ours) == expected


def check_agreement(contestants, tolerance):
    """Stop if the contestants do not compute the same."""
    expected = contestants["ours"]()
    for name, run in contestants.items():
        np.testing.assert_allclose(run(), expected, atol=tolerance, err_msg=name)


# ------------------------------------------------------------------ the whole detector


def photograph():
    """Return a real photograph, as large as it comes out of resizing: 800 x 1216."""
    import cv2
    import skimage.data

    return cv2.resize(skimage.data.coffee()[..., ::-1], IMAGE_SIZE[::-1])


def ours_whole(folder, pair="pair"):
    """Return our detector as a function of an image."""
    from detectors import load

    return load(folder / pair)


def one_file_whole(folder):
    """Return our detector in one file as a function of an image."""
    import onnxruntime

    from detectors import load
    from detectors.preprocess import preprocess

    settings = load(folder / "pair").settings
    session = onnxruntime.InferenceSession(str(folder / "detector.onnx"), providers=["CPUExecutionProvider"])

    def run(image):
        blob, image_size, scale_factor = preprocess(image, settings.preprocess)[:3]
        inputs = {"image": blob, "image_size": np.float32(image_size), "scale_factor": scale_factor}
        return session.run(None, inputs)

    return run


def mmdetection_whole(folder, pair="pair"):
    """Return MMDetection's detector as a function of an image that returns the scores."""
    from sources.mmdetection import find_config, inference_detector, load_detector

    detector = load_detector(find_config(CONFIGS[pair][0]), folder / f"{pair}.pth")

    def run(image):
        found = inference_detector(detector, image)
        return np.concatenate(found[0] if isinstance(found, tuple) else found)[:, 4]  # with masks, or without

    return run


def torchvision_onnx_whole(folder):
    """Return torchvision's whole-graph export in ONNX Runtime as a function of an image."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "torchvision.onnx"), providers=["CPUExecutionProvider"])

    def run(image):
        blob = np.ascontiguousarray(image[..., ::-1].transpose(2, 0, 1), np.float32) / 255
        return session.run(None, {"image": blob})

    return run


def torchvision_whole(folder, builder):
    """Return torchvision's own model as a function of an image that returns the scores."""
    import torch

    from sources import torchvision

    checkpoint = folder / f"{builder}.pth"
    model = torchvision.build_model(builder, {}, torchvision.load_checkpoint(checkpoint, False), checkpoint)

    def run(image):
        with torch.inference_mode():
            picture = torch.from_numpy(np.ascontiguousarray(image[..., ::-1])).permute(2, 0, 1).float() / 255
            return model([picture])[0]["scores"].numpy()

    return run


CONFIGS = {  # of MMDetection, by the folders of our exports; those that are raced against it alone have a title
    "pair": ("faster_rcnn_r50_fpn_1x_coco", ""),
    "masks": ("mask_rcnn_r50_fpn_1x_coco", "Mask R-CNN R50-FPN, 800 x 1216"),
    "retina_net": ("retinanet_r50_fpn_1x_coco", "RetinaNet R50-FPN, 800 x 1216"),
    "atss": ("atss_r50_fpn_1x_coco", "ATSS R50-FPN, 800 x 1216"),
    "yolox": ("yolox_s_8x8_300e_coco", "YOLOX-s, 640 x 640"),
}
BUILDERS = ("fasterrcnn_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_320_fpn")
WHOLE = {
    "ours": ours_whole,
    "ours in 8 bits": functools.partial(ours_whole, pair="pair_int8"),
    "ours in one file": one_file_whole,
    "MMDetection inference_detector": mmdetection_whole,
    "torchvision, one ONNX graph": torchvision_onnx_whole,
}


def prepare_whole(folder):
    """Write the detectors to a folder: their checkpoints, our exports of them, torchvision's export."""
    import mmcv
    import onnx
    import seeded_mmdetection
    import seeded_torchvision
    import torch

    import export
    import whole
    from sources import mmdetection, torchvision

    for pair, (name, _) in CONFIGS.items():
        config = mmdetection.find_config(name)
        cfg = mmcv.Config.fromfile(str(config))
        checkpoint = seeded_mmdetection.write_checkpoint(cfg, folder / f"{pair}.pth", photograph())
        (folder / pair).mkdir()
        export.write_networks(mmdetection.load(config, checkpoint), folder / pair, opset=13)
    write_int8(folder / "pair", folder / "pair_int8")
    onnx.save(whole.build(ours_whole(folder)), str(folder / "detector.onnx"))
    model = seeded_torchvision.seeded_model(BUILDERS[0], photograph())
    torch.onnx.export(
        model, ([torch.rand(3, *IMAGE_SIZE)],), str(folder / "torchvision.onnx"), opset_version=17, dynamo=False,
        input_names=["image"], dynamic_axes={"image": {1: "H", 2: "W"}},
    )  # fmt: skip
    for builder in BUILDERS:
        checkpoint = seeded_torchvision.write_checkpoint(builder, folder / f"{builder}.pth", photograph())
        (folder / builder).mkdir()
        export.write_networks(torchvision.load(builder, checkpoint), folder / builder, opset=13)


def write_int8(folder, out):
    """Write the export in a folder in 8 bits to another; with seeded weights, only how fast it is says something."""
    import cv2

    import quantize

    pictures = [folder.parent / f"{side}.png" for side in range(300, 500, 20)]
    for side, picture in zip(range(300, 500, 20), pictures):
        cv2.imwrite(str(picture), cv2.resize(photograph()[:side, : 2 * side], IMAGE_SIZE[::-1]))
    quantize.write_int8(folder, *quantize.divide(pictures, 8))
    next(folder.glob("int8*")).rename(out)


def serve(load, folder, connection):
    """Load a detector; each time the connection says so, detect and answer with the seconds; then the peak MiB."""
    image = np.load(folder / "image.npy")
    run = load(folder)
    while connection.recv():
        start = time.perf_counter()
        run(image)
        connection.send(time.perf_counter() - start)
    status = Path("/proc/self/status").read_text()  # getrusage would count what the parent had when it forked
    connection.send(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024)


def ask(connection, question):
    """Send a question and return the answer."""
    connection.send(question)
    return connection.recv()


# ------------------------------------------------------------------ the benchmark


def race_operators(results):
    """Run the contests of single operators."""
    contestants = roi_align_contestants(1000)
    check_agreement(contestants, 1e-5)
    report("RoIAlign: 1000 RoIs, 256 channels, four levels of 800 x 1216", race(contestants), results)
    for count in (100, 1000, 5000):
        contestants = nms_contestants(count)
        check_agreement(contestants, 0)
        report(f"NMS: {count} boxes", race(contestants, 15), results)
    contestants = rpn_contestants()
    check_agreement(contestants, 1e-3)
    report("RPN's end: 240,000 anchors to 1000 proposals", race(contestants), results)
    contestants = head_contestants()
    check_agreement(contestants, 1e-3)
    report("Head's end: 1000 RoIs, 80 classes to 100 detections", race(contestants), results)
    contestants = pasting_contestants()
    check_masks(contestants)
    report("Masks' end: 100 masks pasted into 800 x 1216", race(contestants), results)


def race_processes(title, loaders, folder, results):
    """Race detectors, each in a process of its own; return the peak MiB of each."""
    context, connections = multiprocessing.get_context("spawn"), {}  # a process each: no allocator, no threads shared
    for name, load in loaders.items():
        connections[name], other_end = context.Pipe()
        context.Process(target=serve, args=(load, folder, other_end), daemon=True).start()
    turns = [{name: ask(connection, True) for name, connection in connections.items()} for _ in range(ROUNDS + 1)]
    seconds = {name: [turn[name] for turn in turns[1:]] for name in loaders}  # the first one warmed up
    report(title, seconds, results)
    return {name: ask(connection, False) for name, connection in connections.items()}


def print_stages(detector, image, results, title):
    """Print how long each of our stages takes."""
    from demo import Stopwatch

    detector(image)
    watch = Stopwatch()
    for _ in range(ROUNDS):
        watch.start()
        detector(image, watch.record)
    networks = {Path(name).stem for name in detector.networks}
    outside = sum(ms for stage, ms in watch.milliseconds.items() if stage not in networks)
    part = outside / sum(watch.milliseconds.values())
    print(f"\n{title}: {watch.summary(ROUNDS)}; outside the networks {part:.1%}")
    results[f"{title}: outside the networks"] = part


def race_torchvision(folder, results):
    """Race our exports of torchvision's models against the models."""
    image = np.load(folder / "image.npy")
    for builder in BUILDERS:
        ours = functools.partial(ours_whole, pair=builder)
        theirs = functools.partial(torchvision_whole, builder=builder)
        scores = ours(folder)(image).scores, theirs(folder)(image)
        np.testing.assert_allclose(*map(np.sort, scores), atol=1e-4)
        race_processes(f"torchvision's {builder}", {"ours": ours, "torchvision in PyTorch": theirs}, folder, results)
        print_stages(ours(folder), image, results, f"Our stages of {builder}")


def race_mmdetection(folder, results):
    """Race our exports of MMDetection's other detectors against the detectors."""
    image = np.load(folder / "image.npy")
    for pair, (_, title) in CONFIGS.items():
        if not title:
            continue
        ours, theirs = (functools.partial(load, pair=pair) for load in (ours_whole, mmdetection_whole))
        scores = ours(folder)(image).scores, theirs(folder)(image)
        np.testing.assert_allclose(*map(np.sort, scores), atol=1e-4)
        race_processes(title, {"ours": ours, "MMDetection inference_detector": theirs}, folder, results)
        print_stages(ours(folder), image, results, f"Our stages of {title}, {len(scores[0])} detections")


def race_whole(folder, results):
    """Race the three detectors; measure their memory, and our stages."""
    image = photograph()
    np.save(folder / "image.npy", image)
    detector = ours_whole(folder)
    ours, reference = detector(image), mmdetection_whole(folder)(image)
    np.testing.assert_allclose(np.sort(ours.scores), np.sort(reference), atol=1e-4)
    np.testing.assert_allclose(one_file_whole(folder)(image)[1], ours.scores, atol=1e-4)
    memory = race_processes("The whole detector: R50-FPN, 800 x 1216", WHOLE, folder, results)
    print("\nIts peak memory")
    for name, peak in memory.items():
        print(
            f"  {name:34} {peak:9.0f} MiB"
            + ("" if name == "ours" else f"   ours takes {memory['ours'] / peak:.2f} of it")
        )
    results["peak memory MiB"] = memory
    print_stages(detector, image, results, "Our stages")
    return detector


def growth(detector, results):
    """Print how our time grows with the number of RoIs, of boxes and of pixels."""
    import cv2

    tables = {"RoIs": {}, "boxes in NMS": {}, "picture's shorter side": {}}
    for count in (100, 300, 1000, 2000, 4000):
        seconds = race({"ours": roi_align_contestants(count)["ours"]}, 3)
        tables["RoIs"][count] = float(np.median(seconds["ours"]))
    for count in (100, 300, 1000, 3000, 10000):
        seconds = race({"ours": nms_contestants(count)["ours"]}, 3)
        tables["boxes in NMS"][count] = float(np.median(seconds["ours"]))
    for side in (320, 480, 640, 800, 1120, 1600):
        detector.settings = changed(detector.settings, "preprocess.scale", (side * 3 // 2, side))
        image = cv2.resize(photograph(), (side * 3 // 2, side))
        seconds = race({"ours": lambda image=image: detector(image)}, 2)
        tables["picture's shorter side"][side] = float(np.median(seconds["ours"]))
    for name, table in tables.items():
        print(
            f"\nGrowth with the number of {name}" if name != "picture's shorter side" else f"\nGrowth with the {name}"
        )
        print("  " + "   ".join(f"{count}: {seconds * 1e3:.1f} ms" for count, seconds in table.items()))
    results["growth"] = tables


def plot_growth(tables, path):
    """Draw the growth as three plots."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    titles = ("RoIAlign: RoIs, 256 channels", "NMS: boxes", "whole detector: shorter side, pixels")
    for axis, title, table in zip(axes, titles, tables.values()):
        axis.plot([int(count) for count in table], [seconds * 1e3 for seconds in table.values()], "o-", color="#0072b2")
        axis.set_xlabel(title)
        axis.set_ylabel("milliseconds")
        axis.set_ylim(0)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def describe_machine():
    """Return the processor, its cores and the versions that the figures hold for."""
    import mmcv
    import onnxruntime
    import torch
    import torchvision

    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    versions = {"python": platform.python_version(), "numpy": np.__version__, "onnxruntime": onnxruntime.__version__}
    versions.update({"torch": torch.__version__, "torchvision": torchvision.__version__, "mmcv": mmcv.__version__})
    flags = [set(line.split(":")[1].split()) for line in info.read_text().splitlines() if line.startswith("flags")]
    instructions = sorted({"avx2", "avx512f", "avx512_vnni", "avx_vnni"}.intersection(*flags[:1]))
    processor = names[0] if names else platform.processor()
    return {"processor": processor, "instructions": instructions, "cores": os.cpu_count(), "versions": versions}


def main():
    """Run every contest and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the results as JSON")
    parser.add_argument("--plot", metavar="FILE", help="draw the growth")
    args = parser.parse_args()
    results = {"machine": describe_machine()}
    print(json.dumps(results["machine"]))
    race_operators(results)
    with tempfile.TemporaryDirectory() as folder:
        prepare_whole(Path(folder))
        detector = race_whole(Path(folder), results)
        race_mmdetection(Path(folder), results)
        race_torchvision(Path(folder), results)
        growth(detector, results)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))
    if args.plot:
        plot_growth(results["growth"], args.plot)


if __name__ == "__main__":
    main()

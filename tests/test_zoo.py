"""Every config that MMDetection ships for Faster R-CNN, every knob that people turn, and what is related to it.

Weights are seeded, pictures small. What is compared with MMDetection is printed as three tables after the tests.
"""

import copy
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import MMDETECTION, SHAPES, TABLES

from detectors import load

mmdet = pytest.importorskip("mmdet", reason=MMDETECTION)

import mmcv  # noqa: E402
import seeded_mmdetection  # noqa: E402
from boxes import assert_equal_detections, with_second_chance  # noqa: E402
from zoo import what_is_computed  # noqa: E402

import export  # noqa: E402
from compare import verify_detections  # noqa: E402
from sources import mmdetection  # noqa: E402

SHIPPED = sorted((Path(mmdet.__file__).parent / ".mim" / "configs" / "faster_rcnn").glob("faster_rcnn_*.py"))
SCALE = {"data.test.pipeline.1.img_scale": (400, 240)}
SOFT = {"type": "soft_nms", "iou_threshold": 0.5}
RELATED = "What is related"
RELATIVES = "Its two-stage relatives"
RESIZE = "data.test.pipeline.1.transforms.0"

THIN = {  # R50-FPN with a backbone and a pyramid of few channels
    "model.backbone": {"depth": 18, "base_channels": 16},
    "model.neck": {"in_channels": [16, 32, 64, 128], "out_channels": 64},
    "model.rpn_head": {"in_channels": 64, "feat_channels": 64},
    "model.roi_head.bbox_roi_extractor.out_channels": 64,
    "model.roi_head.bbox_head": {"in_channels": 64, "fc_out_channels": 128},
    **SCALE,
}

KNOBS = {  # changes of it, each alone
    "classes": {"model.roi_head.bbox_head.num_classes": 31, "data.test.classes": tuple(f"c{i}" for i in range(31))},
    "one class": {"model.roi_head.bbox_head.num_classes": 1, "data.test.classes": ("thing",)},
    "anchor scales": {"model.rpn_head.anchor_generator.scales": [3, 5.5]},
    "anchor ratios": {"model.rpn_head.anchor_generator.ratios": [0.4, 1.0, 1.7, 3.0]},
    "anchor base sizes": {"model.rpn_head.anchor_generator.base_sizes": [5, 9, 18, 35, 70]},
    "strides": {
        "model.neck.start_level": 1,
        "model.neck.add_extra_convs": "on_output",
        "model.rpn_head.anchor_generator.strides": [8, 16, 32, 64, 128],
        "model.roi_head.bbox_roi_extractor.featmap_strides": [8, 16, 32, 64],
    },
    "octave scales": {
        "model.rpn_head.anchor_generator.scales": None,
        "model.rpn_head.anchor_generator.octave_base_scale": 4,
        "model.rpn_head.anchor_generator.scales_per_octave": 3,
    },
    "center offset": {"model.rpn_head.anchor_generator.center_offset": 0.5},
    "means and stds of the RPN": {
        "model.rpn_head.bbox_coder.target_means": [0.02, -0.01, 0.03, 0.1],
        "model.rpn_head.bbox_coder.target_stds": [0.5, 0.6, 0.7, 0.8],
    },
    "means and stds of the head": {
        "model.roi_head.bbox_head.bbox_coder.target_means": [0.02, -0.01, 0.03, 0.1],
        "model.roi_head.bbox_head.bbox_coder.target_stds": [0.2, 0.1, 0.3, 0.25],
    },
    "class-agnostic regression": {"model.roi_head.bbox_head.reg_class_agnostic": True},
    "softmax RPN": {"model.rpn_head.loss_cls.use_sigmoid": False},
    "RoIAlign output size": {
        "model.roi_head.bbox_roi_extractor.roi_layer.output_size": 5,
        "model.roi_head.bbox_head.roi_feat_size": 5,
    },
    "sampling ratio": {"model.roi_head.bbox_roi_extractor.roi_layer.sampling_ratio": 2},
    "RoIAlign not aligned": {"model.roi_head.bbox_roi_extractor.roi_layer.aligned": False},
    "finest scale": {"model.roi_head.bbox_roi_extractor.finest_scale": 40},
    "RoIs from three levels": {"model.roi_head.bbox_roi_extractor.featmap_strides": [4, 8, 16]},
    "nms_pre": {"model.test_cfg.rpn.nms_pre": 77},
    "proposals": {"model.test_cfg.rpn.max_per_img": 150},
    "RPN's threshold": {"model.test_cfg.rpn.nms.iou_threshold": 0.5},
    "min_bbox_size": {"model.test_cfg.rpn.min_bbox_size": 20},
    "all boxes' sizes": {"model.test_cfg.rpn.min_bbox_size": -1},
    "score threshold": {"model.test_cfg.rcnn.score_thr": 0.6, "model.test_cfg.rcnn.max_per_img": 1000},
    "head's threshold": {"model.test_cfg.rcnn.nms.iou_threshold": 0.3},
    "detections": {"model.test_cfg.rcnn.max_per_img": 30},
    "class-agnostic NMS": {"model.test_cfg.rcnn.nms.class_agnostic": True},
    # Soft-NMS compares every pair of boxes: of many, one IoU is on the threshold to the last bits of the networks
    "Soft-NMS": {"model.test_cfg.rcnn.nms": SOFT, "model.test_cfg.rcnn.score_thr": 0.2},
    "Soft-NMS, score threshold below its min_score": {
        "model.test_cfg.rcnn.nms": {**SOFT, "min_score": 0.3},
        "model.test_cfg.rcnn.score_thr": 0.2,
        "model.test_cfg.rcnn.max_per_img": 1000,
    },
    "Soft-NMS, min_score": {
        "model.test_cfg.rcnn.nms": {**SOFT, "min_score": 0.15},
        "model.test_cfg.rcnn.score_thr": 0.2,
        "model.test_cfg.rcnn.max_per_img": 1000,
    },
    "picture's scale": {"data.test.pipeline.1.img_scale": (300, 250)},
    "pad divisor": {"data.test.pipeline.1.transforms.3.size_divisor": 80},
    "keep_ratio": {f"{RESIZE}.keep_ratio": False},
    "BGR": {
        "data.test.pipeline.1.transforms.2": {
            "type": "Normalize",
            "mean": [103.53, 116.28, 123.675],
            "std": [50.0, 60.0, 70.0],
            "to_rgb": False,
        }
    },
}  # fmt: skip

FAMILIES = [  # Faster R-CNN elsewhere in MMDetection's configs
    "cityscapes/faster_rcnn_r50_fpn_1x_cityscapes",
    "dynamic_rcnn/dynamic_rcnn_r50_fpn_1x_coco",
    "empirical_attention/faster_rcnn_r50_fpn_attention_1111_1x_coco",
    "gn+ws/faster_rcnn_r50_fpn_gn_ws-all_1x_coco",
    "libra_rcnn/libra_faster_rcnn_r50_fpn_1x_coco",
    "tridentnet/tridentnet_r50_caffe_1x_coco",
    "hrnet/faster_rcnn_hrnetv2p_w18_1x_coco",
    "objects365/faster_rcnn_r50_fpn_16x4_1x_obj365v1",
    "openimages/faster_rcnn_r50_fpn_32x2_1x_openimages",
    "pafpn/faster_rcnn_r50_pafpn_1x_coco",
    "pascal_voc/faster_rcnn_r50_fpn_1x_voc0712",
    "pisa/pisa_faster_rcnn_r50_fpn_1x_coco",
    "regnet/faster_rcnn_regnetx-3.2GF_fpn_1x_coco",
    "res2net/faster_rcnn_r2_101_fpn_2x_coco",
    "resnest/faster_rcnn_s50_fpn_syncbn-backbone+head_mstrain-range_1x_coco",
    "resnet_strikes_back/faster_rcnn_r50_fpn_rsb-pretrain_1x_coco",
    "scratch/faster_rcnn_r50_fpn_gn-all_scratch_6x_coco",
]

AT_FULL_DEPTH = [  # of every family R50, and what differs in backbone, style, layers or heads
    "mask_rcnn/mask_rcnn_r50_fpn_1x_coco",
    "mask_rcnn/mask_rcnn_r50_caffe_c4_1x_coco",
    "mask_rcnn/mask_rcnn_r50_caffe_fpn_1x_coco",
    "mask_rcnn/mask_rcnn_x101_32x4d_fpn_1x_coco",
    "cascade_rcnn/cascade_rcnn_r50_fpn_1x_coco",
    "cascade_rcnn/cascade_mask_rcnn_r50_fpn_1x_coco",
    "point_rend/point_rend_r50_caffe_fpn_mstrain_1x_coco",
    "dcn/faster_rcnn_r50_fpn_dconv_c3-c5_1x_coco",
    "dcnv2/mask_rcnn_r50_fpn_mdconv_c3-c5_1x_coco",
]

THIN_MASKS = {  # Cascade Mask R-CNN with the thin backbone, and stages that differ
    **{key: value for key, value in THIN.items() if not key.startswith("model.roi_head")},
    "model.roi_head.bbox_roi_extractor.out_channels": 64,
    "model.roi_head.mask_roi_extractor.out_channels": 64,
    "model.roi_head.mask_head": {"in_channels": 64, "conv_out_channels": 32, "num_convs": 1},
}
STAGES = ("model.roi_head.bbox_head.0", "model.roi_head.bbox_head.1", "model.roi_head.bbox_head.2")
THIN_MASKS.update(
    {f"{stage}.{key}": value for stage in STAGES for key, value in THIN["model.roi_head.bbox_head"].items()}
)
MASK_KNOBS = {  # changes of it, each alone
    "deltas of every class": {f"{stage}.reg_class_agnostic": False for stage in STAGES},
    "deltas of every class in one stage": {f"{STAGES[1]}.reg_class_agnostic": False},
    "means": {f"{STAGES[0]}.bbox_coder.target_means": [0.02, -0.01, 0.03, 0.1]},
    "one mask for all classes": {"model.roi_head.mask_head.class_agnostic": True},
    "mask threshold": {"model.test_cfg.rcnn.mask_thr_binary": 0.3},
    "mask RoIs": {
        "model.roi_head.mask_roi_extractor.roi_layer.output_size": 10,
        "model.roi_head.mask_roi_extractor.roi_layer.sampling_ratio": 2,
        "model.roi_head.mask_roi_extractor.finest_scale": 40,
        "model.roi_head.mask_roi_extractor.featmap_strides": [4, 8, 16],
    },
}  # fmt: skip

REFUSED = {  # configs elsewhere in MMDetection, and what their refusal names
    "carafe/faster_rcnn_r50_fpn_carafe_1x_coco": "mmcv's operator CARAFE",
    "detectors/cascade_rcnn_r50_sac_1x_coco": "layer2.0.conv2 is mmcv's operator SAConv2d",
    "cascade_rpn/crpn_faster_rcnn_r50_caffe_fpn_1x_coco": "model.rpn_head is a CascadeRPNHead",
    "dcn/faster_rcnn_r50_fpn_dpool_1x_coco": "roi_layers.0 is a DeformRoIPoolPack",
    "double_heads/dh_faster_rcnn_r50_fpn_1x_coco": "model.roi_head is a DoubleHeadRoIHead",
    "groie/faster_rcnn_r50_fpn_groie_1x_coco": "bbox_roi_extractor is a GenericRoIExtractor",
    "guided_anchoring/ga_faster_r50_fpn_1x_coco": "model.rpn_head is a GARPNHead",
    "legacy_1.x/faster_rcnn_r50_fpn_1x_coco_v1": "model.rpn_head.prior_generator is a LegacyAnchorGenerator",
    "ms_rcnn/ms_rcnn_r50_fpn_1x_coco": "model.type is MaskScoringRCNN",
    "solo/solo_r50_fpn_1x_coco": "model.type is SOLO",
    "seesaw_loss/cascade_mask_rcnn_r101_fpn_random_seesaw_loss_mstrain_2x_lvis_v1": "custom_cls_channels is True",
    "sabl/sabl_faster_rcnn_r50_fpn_1x_coco": "model.roi_head.bbox_head is a SABLHead",
}  # fmt: skip

CONTEXT_BLOCK = {
    "cfg": {"type": "ContextBlock", "ratio": 1 / 4}, "stages": (False, True, True, True), "position": "after_conv2",
}  # fmt: skip
SWIN = {
    "type": "SwinTransformer",
    "embed_dims": 48,
    "depths": [2, 2, 2, 2],
    "num_heads": [3, 6, 12, 24],
    "window_size": 7,
}
PVT = {"type": "PyramidVisionTransformer", "num_layers": [2, 2, 2, 2]}
COMBINED = {  # parts that MMDetection ships with other detectors, in the R50-FPN config
    "GCNet": {"model.backbone.plugins": [CONTEXT_BLOCK]},
    "Swin Transformer": {
        "model.backbone": {"_delete_": True, **SWIN},
        "model.neck.in_channels": [48, 96, 192, 384],
    },
    "PVT": {"model.backbone": {"_delete_": True, **PVT}, "model.neck.in_channels": [64, 128, 320, 512]},
}  # fmt: skip
UNEXPORTABLE = {  # refused only when PyTorch or ONNX Runtime has tried: changes of a config, and what is named
    "faster_rcnn/faster_rcnn_r50_fpn_1x_coco with NAS-FPN": (
        {
            "model.neck": {"type": "NASFPN", "stack_times": 2, "start_level": 1, "add_extra_convs": True},
            "model.rpn_head.anchor_generator.strides": [8, 16, 32, 64, 128],
            "model.roi_head.bbox_roi_extractor.featmap_strides": [8, 16, 32, 64],
        },
        "SumCell",
    ),
    "dyhead/atss_r50_fpn_dyhead_1x_coco": ({}, "DeformConv"),  # which of them comes first differs
}  # fmt: skip


def with_twins(configs):
    """Return the configs as pytest's parameters; those that compute the same as one before them are marked."""
    seen, parameters = {}, []
    for path in configs:
        first = seen.setdefault(what_is_computed(mmcv.Config.fromfile(str(path))), path.stem)
        parameters.append(pytest.param(path.stem, None if first == path.stem else first, id=path.stem))
    return parameters


def export_and_compare(config, folder, image, capsys, normalised=True):
    """Export a config with seeded weights; check every output, and the whole pipeline in an image.

    Returns the detections, the number of proposals on each level, and the cells of a table.
    """
    start = time.perf_counter()
    cfg = mmcv.Config.fromfile(str(config))
    seeded_mmdetection.write_checkpoint(cfg, folder / "seeded.pth", image, normalised)
    cv2.imwrite(str(folder / "picture.png"), image)
    source = mmdetection.load(config, folder / "seeded.pth")
    export.write_networks(source, folder, source.opset)
    detector, stages = load(folder), {}
    ours = detector(image, lambda stage, **arrays: stages.update({stage: arrays}))
    capsys.readouterr()
    assert export.verify_outputs(source, detector, stages) == []
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == sum(len(network.outputs) for network in source.networks.values())
    assert all(line.endswith("True") for line in lines)
    reference = source.detect(folder / "picture.png")
    assert_equal_detections(ours, reference)
    assert verify_detections("with masks", ours, reference)
    assigned = next(name for name in ("align", "align_0", "detect") if name in stages)
    levels = np.bincount(stages[assigned].get("levels", [0]))  # CenterNet and DETR have none
    return ours, levels, [
        f"{len(lines)} x True",
        max((line.split("]")[1].rsplit(None, 1)[0] for line in lines), key=lambda cell: float(cell.split()[0])).strip(),
        f"{len(ours.boxes)} of {len(set(ours.labels))} classes",
        "/".join(map(str, levels)),
        f"{time.perf_counter() - start:.0f} s",
    ]  # fmt: skip


def write_config(name, changes, path):
    """Write one of MMDetection's configs, changed and for small pictures, to a file."""
    cfg = mmcv.Config.fromfile(str(mmdetection.find_config(name)))
    cfg.merge_from_dict(copy.deepcopy({**SCALE, **changes}))  # it writes into what it is given
    cfg.dump(str(path))


@pytest.fixture
def compare(tmp_path, photographs, capsys):
    """Return a function that exports a changed config, compares it with MMDetection and adds a row to a table."""

    def run(table, row, name, changes, normalised=True):
        write_config(name, changes, tmp_path / "config.py")
        heads = mmcv.Config.fromfile(str(tmp_path / "config.py")).model.roi_head.bbox_head
        num_classes = (heads if isinstance(heads, dict) else heads[-1]).num_classes
        # not the astronaut: in its flat black corner anchors tie to the bit, and PyTorch's sort gives ties no order
        found, levels, cells = with_second_chance(
            lambda image: export_and_compare(tmp_path / "config.py", tmp_path, image, capsys, normalised),
            photographs["coffee"],
        )
        TABLES[table].append([row, *cells])
        for file in tmp_path.glob("*.*"):
            file.unlink()  # up to 800 MB
        assert len(found.boxes) >= 20
        assert len(set(found.labels)) >= min(num_classes, 3)
        assert len(levels) == 1 or np.count_nonzero(levels) > 1
        return cells

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("name", "twin"), with_twins(SHIPPED))
def test_a_shipped_config(compare, request, name, twin):
    if twin and not request.config.getoption("--all"):
        pytest.skip(f"computes the same as {twin}: pytest --all tries it, too")
    compare("The configs that MMDetection ships", name, name, {})


@pytest.mark.slow
def test_features_of_large_magnitude(compare):
    """Without the layers normalised, 1e-4 is a few units in the last place of such values."""
    row = "R50-FPN with a thin backbone, not normalised"
    cells = compare(RELATED, row, mmdetection.DEFAULT_CONFIG, THIN, normalised=False)
    assert float(cells[1].split()[0]) > export.OUTPUT_TOLERANCE  # else nothing depends on the largest value


@pytest.mark.slow
@pytest.mark.parametrize("knob", KNOBS)
def test_a_knob(compare, knob):
    compare("The knobs of R50-FPN, with a thin backbone", knob, mmdetection.DEFAULT_CONFIG, {**THIN, **KNOBS[knob]})


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family(compare, name):
    compare(RELATED, name, name.split("/")[1], {})


@pytest.mark.slow
@pytest.mark.parametrize("name", AT_FULL_DEPTH)
def test_a_relative(compare, name):
    compare(RELATIVES, name, name.split("/")[1], {})


@pytest.mark.slow
@pytest.mark.parametrize("knob", MASK_KNOBS)
def test_a_knob_of_cascades_and_masks(compare, knob):
    name = "cascade_mask_rcnn_r50_fpn_1x_coco"
    compare("The knobs of Cascade Mask R-CNN, with a thin backbone", knob, name, {**THIN_MASKS, **MASK_KNOBS[knob]})


@pytest.mark.slow
@pytest.mark.parametrize("name", COMBINED)
def test_parts_of_other_detectors(compare, name):
    compare(RELATED, f"R50-FPN with {name}", mmdetection.DEFAULT_CONFIG, COMBINED[name])


def refusal(capsys, tmp_path, config, checkpoint):
    """Run export.py, which must refuse in one line and write nothing; return the line."""
    assert export.main([str(config), str(checkpoint), "--out", str(tmp_path / "out")]) == 2
    output = capsys.readouterr()
    assert output.err.count("\n") == 1
    assert not list((tmp_path / "out").glob("*")) + list((tmp_path / "out").glob(".*"))
    return output.err.strip()


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(tmp_path, capsys, name):
    line = refusal(capsys, tmp_path, name.split("/")[1], SHAPES / "shapes.pth")
    TABLES[RELATED].append([name, f"refused: {REFUSED[name]}"])
    assert REFUSED[name] in line


@pytest.mark.slow
@pytest.mark.parametrize("name", UNEXPORTABLE)
def test_what_cannot_be_exported(tmp_path, photographs, capsys, name):
    changes, word = UNEXPORTABLE[name]
    write_config(name.split("/")[1].split()[0], changes, tmp_path / "config.py")
    cfg = mmcv.Config.fromfile(str(tmp_path / "config.py"))
    seeded_mmdetection.write_checkpoint(cfg, tmp_path / "seeded.pth", photographs["coffee"])
    line = refusal(capsys, tmp_path, tmp_path / "config.py", tmp_path / "seeded.pth")
    TABLES[RELATED].append([name, f"refused: {word}"])
    assert word in line


def test_mmdetection_ships_36_configs():
    assert len(SHIPPED) == 36

"""One-stage detectors against MMDetection's inference_detector: seeded weights at full depth, two photographs."""

import cv2
import numpy as np
import pytest
from boxes import assert_equal_detections, with_second_chance
from conftest import MMDETECTION, TABLES

pytest.importorskip("mmdet", reason=MMDETECTION)

from mmdet.datasets.pipelines import Compose  # noqa: E402
from test_zoo import export_and_compare, refusal, write_config  # noqa: E402

from detectors import load  # noqa: E402
from detectors.preprocess import preprocess  # noqa: E402
from detectors.settings import Preprocess  # noqa: E402
from sources import SourceError, mmdetection  # noqa: E402

SCALE = "data.test.pipeline.1.img_scale"
CONFIGS = {  # and what is changed in them, beside the size of the pictures
    "retinanet/retinanet_r50_fpn_1x_coco": {},
    "retinanet/retinanet_x101_32x4d_fpn_1x_coco": {},
    "pisa/pisa_retinanet_r50_fpn_1x_coco": {},
    "free_anchor/retinanet_free_anchor_r50_fpn_1x_coco": {},
    "atss/atss_r50_fpn_1x_coco": {},
    "ddod/ddod_r50_fpn_1x_coco": {SCALE: (960, 608)},  # mmcv wants 3 x 3 cells to deform, also of half the size
    "paa/paa_r50_fpn_1x_coco": {},
    "lad/lad_r50_paa_r101_fpn_coco_1x": {},
    "ssd/ssd300_coco": {SCALE: (300, 300)},
    "ssd/ssd512_coco": {SCALE: (512, 512)},
    "ssd/ssdlite_mobilenetv2_scratch_600e_coco": {SCALE: (320, 320)},
    "yolof/yolof_r50_c5_8x8_1x_coco": {},
    "fcos/fcos_r50_caffe_fpn_gn-head_1x_coco": {},
    "fcos/fcos_center-normbbox-centeronreg-giou_r50_caffe_fpn_gn-head_dcn_1x_coco": {},
    "fsaf/fsaf_r50_fpn_1x_coco": {},
    "foveabox/fovea_align_r50_fpn_gn-head_4x4_2x_coco": {},
    "gfl/gfl_r50_fpn_1x_coco": {},
    "ld/ld_r18_gflv1_r101_fpn_coco_1x": {},
    "vfnet/vfnet_r50_fpn_1x_coco": {},
    "autoassign/autoassign_r50_fpn_8x2_1x_coco": {},
    "reppoints/reppoints_moment_r50_fpn_gn-neck+head_1x_coco": {},
    "yolo/yolov3_d53_320_273e_coco": {SCALE: (320, 320)},
    "yolo/yolov3_mobilenetv2_320_300e_coco": {},
    "yolox/yolox_tiny_8x8_300e_coco": {SCALE: (416, 416)},
    "yolox/yolox_s_8x8_300e_coco": {SCALE: (416, 416)},
    "tood/tood_r50_fpn_1x_coco": {},
    "centernet/centernet_resnet18_140e_coco": {SCALE: None},
    "detr/detr_r50_8x2_150e_coco": {},
    "pvt/retinanet_pvtv2-b0_fpn_1x_coco": {},
}  # fmt: skip
LEAVE_THE_PICTURE = ("yolo", "yolox", "tood", "centernet")  # their boxes are not clipped


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_a_one_stage_detector(tmp_path, photographs, capsys, name):
    folder, _, config = name.partition("/")
    write_config(config, CONFIGS[name], tmp_path / "config.py")
    found, _, cells = with_second_chance(
        lambda image: export_and_compare(tmp_path / "config.py", tmp_path, image, capsys), photographs["coffee"]
    )
    TABLES["One-stage detectors"].append([name, *cells])
    assert len(found.boxes) >= 100
    assert len(set(found.labels)) >= 5

    detector, source = load(tmp_path), mmdetection.load(tmp_path / "config.py", tmp_path / "seeded.pth")

    def compare(upright):
        cv2.imwrite(str(tmp_path / "upright.png"), upright)
        second = detector(upright)
        assert_equal_detections(second, source.detect(tmp_path / "upright.png"))
        return second

    second = with_second_chance(compare, photographs["motorcycle"])
    assert len(second.boxes) >= 100
    assert len(set(second.labels)) >= 5 or folder == "detr"  # random queries tell little of another picture
    (height, width), boxes = photographs["motorcycle"].shape[:2], second.boxes
    outside = (boxes < -1).any() or (boxes > np.float32([width, height] * 2) + 1).any()
    at_border = np.isclose(boxes, 0, atol=1e-3) | np.isclose(boxes, np.float32([width, height] * 2), atol=1.5)
    if folder != "ddod":  # in its larger picture, none of the best boxes is at the border
        assert outside if folder in LEAVE_THE_PICTURE else at_border.any() and not outside


@pytest.mark.slow
def test_the_maps_of_atss_for_608_x_608(tmp_path, photographs, capsys):
    write_config("atss_r50_fpn_1x_coco", {SCALE: (608, 608)}, tmp_path / "config.py")
    square = np.ascontiguousarray(photographs["astronaut"])
    assert square.shape == (512, 512, 3)
    export_and_compare(tmp_path / "config.py", tmp_path, square, capsys)
    stages = {}
    load(tmp_path)(square, lambda stage, **arrays: stages.update({stage: arrays}))
    maps = {name: list(array.shape) for name, array in stages["model"].items() if name != "image"}
    channels = {"cls": 80, "reg": 4, "centerness": 1}
    cells = [76, 38, 19, 10, 5]
    assert maps == {f"{kind}_{i}": [1, c, n, n] for kind, c in channels.items() for i, n in enumerate(cells)}


@pytest.mark.parametrize("scale", [(416, 416), (640, 640), (640, 320)])
def test_letterboxed_pictures_are_bit_equal(photographs, scale):
    """As YOLOX takes them: neither normalised nor turned into RGB, and padded with grey to a square."""
    steps = [{"type": "Resize", "keep_ratio": True}, {"type": "RandomFlip"}]
    steps += [{"type": "Pad", "pad_to_square": True, "pad_val": {"img": (114.0,) * 3}}]
    steps += [{"type": "DefaultFormatBundle"}, {"type": "Collect", "keys": ["img"]}]
    augmentation = {"type": "MultiScaleFlipAug", "img_scale": scale, "flip": False, "transforms": steps}
    pipeline = Compose([{"type": "LoadImageFromWebcam"}, augmentation])
    nothing = {"mean": (0, 0, 0), "std": (1, 1, 1), "to_rgb": False}
    settings = Preprocess(scale=scale, pad_divisor=1, pad_to_square=True, pad_value=114, **nothing)
    for image in photographs.values():
        expected = pipeline({"img": image})
        blob, image_size, *_ = preprocess(image, settings)
        np.testing.assert_array_equal(blob[0], expected["img"][0].data.numpy())
        assert blob.shape[2] == blob.shape[3]
        assert tuple(image_size) == expected["img_metas"][0].data["img_shape"][:2]


REFUSED = {  # configs, their changes, and what is named
    "guided_anchoring/ga_retinanet_r50_caffe_fpn_1x_coco": ({}, "model.bbox_head is a GARetinaHead"),
    "sabl/sabl_retinanet_r50_fpn_1x_coco": ({}, "model.bbox_head is a SABLRetinaHead"),
    "paa/paa_r50_fpn_1x_coco": (
        {"model.bbox_head.score_voting": False}, "model.bbox_head.with_score_voting is False"
    ),
    "retinanet/retinanet_r50_fpn_1x_coco": (
        {"model.bbox_head.bbox_coder.clip_border": False}, "bbox_coder.clip_border is False"
    ),
    "atss/atss_r50_fpn_1x_coco": ({"model.bbox_head.anchor_generator.strides": [(8, 4), 16, 32, 64, 128]}, "strides"),
    "gfl/gfl_r50_fpn_1x_coco": ({"model.bbox_head.anchor_generator.center_offset": 0.5}, "center_offset is 0.5"),
    "fsaf/fsaf_r50_fpn_1x_coco": ({"model.bbox_head.bbox_coder.normalizer": [4, 4, 2, 2]}, "several normalizers"),
    "yolox/yolox_s_8x8_300e_coco": ({"data.test.pipeline.1.transforms.2.pad_val": {"img": (1, 2, 3)}}, "Pad"),
    "tood/tood_r50_fpn_anchor_based_1x_coco": ({}, "bbox_head.anchor_type is 'anchor_based'"),
    "detr/detr_r50_8x2_150e_coco": ({"model.bbox_head.loss_cls.use_sigmoid": True}, "loss_cls.use_sigmoid is True"),
    "centernet/centernet_resnet18_140e_coco": (
        {SCALE: None, "model.test_cfg.local_maximum_kernel": 5}, "local_maximum_kernel is 5"
    ),
    "centernet/centernet_resnet18_dcnv2_140e_coco": (
        {}, "to_float32=True"
    ),
    "gfl/gfl_r101_fpn_mstrain_2x_coco": (
        {"model.bbox_head.anchor_generator.centers": [(4, 4)] * 5}, "prior_generator.centers is"
    ),
    "foveabox/fovea_r50_fpn_4x4_1x_coco": ({"model.test_cfg.nms_pre": 0}, "needs an nms_pre above 0"),
    "fcos/fcos_r50_caffe_fpn_gn-head_1x_coco": ({"model.test_cfg.max_per_img": 0}, "a max_per_img above 0"),
    "yolo/yolov3_d53_mstrain-608_273e_coco": ({"model.bbox_head.featmap_strides": [32, 16, 4]}, "featmap_strides is"),
    "detr/detr_r50_8x2_150e_coco with more answers than queries": (
        {"model.test_cfg.max_per_img": 300}, "max_per_img is more than bbox_head.num_query"
    ),
    "detr/detr_r50_8x2_150e_coco with more padding": (
        {"data.test.pipeline.1.transforms.3.size_divisor": 64}, "with padding to more than multiples of 32, the stride"
    ),
    "detr/detr_r50_8x2_150e_coco with a finer map": (
        {"data.test.pipeline.1.transforms.3.size_divisor": 32, "model.backbone.strides": (1, 2, 2, 1),
         "model.backbone.dilations": (1, 1, 1, 2)}, "with padding to more than multiples of 16, the stride"
    ),
    "centernet/centernet_resnet18_140e_coco with other padding": (
        {SCALE: None, "data.test.pipeline.1.transforms.1.test_pad_add_pix": 0}, "test_pad_add_pix=0"
    ),
    "centernet/centernet_resnet18_140e_coco read as bytes": (
        {SCALE: None, "data.test.pipeline.0.to_float32": False}, "to_float32=False"
    ),
    "lad/lad_r50_paa_r101_fpn_coco_1x": ({"model.bbox_head": None}, "model.type is LAD"),
    "vfnet/vfnet_r50_fpn_1x_coco": ({"model.test_cfg.nms.type": "nms_match"}, "model.test_cfg.nms has type"),
}  # fmt: skip


def test_yolox_has_no_limit(tmp_path):
    """Its head does not read max_per_img."""
    detector = mmdetection.build_detector(
        mmdetection.read_config(mmdetection.find_config("yolox_tiny_8x8_300e_coco")).model
    )
    detector.test_cfg.max_per_img = 5
    assert mmdetection.describe_yolo(detector)[1]["head"].max_per_img is None


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_of_one_stage_detectors(tmp_path, capsys, name):
    changes, words = REFUSED[name]
    write_config(name.split("/")[1].split()[0], changes, tmp_path / "config.py")
    with pytest.raises(SourceError, match=words):
        mmdetection.load(tmp_path / "config.py", tmp_path / "no.pth")
    assert words in refusal(capsys, tmp_path, tmp_path / "config.py", tmp_path / "no.pth")

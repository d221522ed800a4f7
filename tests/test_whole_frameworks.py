"""MMDetection's and torchvision's detectors in one file, against their networks and NumPy: every family."""

import cv2
import pytest
from conftest import MMDETECTION

pytest.importorskip("mmdet", reason=MMDETECTION)

import eight_bits  # noqa: E402
from test_whole import assert_same  # noqa: E402

from detectors import load  # noqa: E402

NAMES = (
    "faster_rcnn_r50_fpn_1x_coco", "cascade_mask_rcnn_r50_fpn_1x_coco", "paa_r50_fpn_1x_coco",
    "yolov3_d53_mstrain-608_273e_coco", "tood_r50_fpn_1x_coco", "centernet_resnet18_140e_coco",
    "detr_r50_8x2_150e_coco",
    "fasterrcnn_mobilenet_v3_large_320_fpn", "ssd300_vgg16",
)  # fmt: skip
OTHERS = (
    "faster_rcnn_r50_caffe_c4_1x_coco", "cascade_rcnn_r50_fpn_1x_coco", "mask_rcnn_r50_fpn_1x_coco",
    "retinanet_r50_fpn_1x_coco", "atss_r50_fpn_1x_coco", "fcos_r50_caffe_fpn_gn-head_1x_coco", "gfl_r50_fpn_1x_coco",
    "ssd300_coco", "yolof_r50_c5_8x8_1x_coco", "yolox_s_8x8_300e_coco", "fasterrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES + OTHERS)
def test_every_family_finds_the_same_in_one_file(tmp_path, request, name):
    if name in OTHERS and not request.config.getoption("--all"):
        pytest.skip("its graph is made of the same parts: pytest --all tries it, too")
    pictures = [cv2.imread(str(path)) for path in eight_bits.write_pictures(tmp_path)[:6]]
    eight_bits.write_export(name, tmp_path)
    pictures = pictures[:2] if "c4" in name else pictures  # that one takes seconds for each
    assert_same(load(tmp_path), pictures, name=name)

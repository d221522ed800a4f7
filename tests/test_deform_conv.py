"""Deformable convolutions: what ONNX Runtime computes for the exported layers against mmcv's operators."""

import copy
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
from conftest import MMDETECTION, ROOT

pytest.importorskip("mmdet", reason=MMDETECTION)

import mmcv.ops  # noqa: E402
import torch  # noqa: E402
from mmcv.utils import digit_version  # noqa: E402
from mmdet.models import build_backbone  # noqa: E402
from mmdet.models.backbones.resnet import Bottleneck  # noqa: E402
from seeded import normalise  # noqa: E402

import export  # noqa: E402
from sources import Network, SourceError  # noqa: E402
from sources.deform_conv import OPSET, PYTORCH, has_deform_conv, replace_deform_convs  # noqa: E402

exporting = pytest.mark.skipif(
    digit_version(torch.__version__) < digit_version(PYTORCH), reason=f"needs PyTorch {PYTORCH}"
)
EXAMPLE = (1, 32, 20, 22)  # what a layer is exported with
SIZES = [(1, 13, 9), (3, 7, 16)]  # batch size, height and width at run time


class GivenOffsets(torch.nn.Module):
    """A deformable convolution that is given its offsets and its mask, as the heads of MMDetection have it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.parts = 3 if isinstance(layer, mmcv.ops.ModulatedDeformConv2d) else 2
        points = layer.deform_groups * layer.kernel_size[0] * layer.kernel_size[1]
        geometry = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        self.conv_offset = torch.nn.Conv2d(layer.in_channels, self.parts * points, layer.kernel_size, **geometry)

    def forward(self, x):
        """Convolve maps [N, C, H, W]."""
        points = self.conv_offset.out_channels // self.parts
        offset, *mask = self.conv_offset(x).split([2 * points, points][: self.parts - 1], dim=1)
        return self.layer(x, offset, *mask)


def deformable(kind, spread=0.42, **options):
    """Return a layer of mmcv's with 32 channels in and out, whose offsets are distributed by `spread` pixels.

    kind: DCN or DCNv2, or those that are given their offsets. The mean of the offsets' sizes is 0.8 times the spread.
    """
    torch.manual_seed(0)
    options = {"kernel_size": 3, "padding": 1, **options}
    layers = {
        "DCN": mmcv.ops.DeformConv2dPack,
        "DCNv2": mmcv.ops.ModulatedDeformConv2dPack,
        "DCN, given offsets": mmcv.ops.DeformConv2d,
        "DCNv2, given offsets": mmcv.ops.ModulatedDeformConv2d,
    }
    layer = layers[kind](32, 32, **options)
    if getattr(layer, "bias", None) is not None:
        torch.nn.init.normal_(layer.bias)
    return deformed(GivenOffsets(layer) if "given" in kind else layer, spread).eval()


def deformed(model, spread=0.42):
    """Make the offsets of all of a model's layers random; they start at zero, where nothing is deformed."""
    for layer in model.modules():
        if hasattr(layer, "conv_offset"):
            fan_in = layer.conv_offset.weight[0].numel()
            torch.nn.init.normal_(layer.conv_offset.weight, std=spread * (0.8 / fan_in) ** 0.5)
            torch.nn.init.normal_(layer.conv_offset.bias, std=spread * 0.2**0.5)
    return model


def exported(model, folder, example=EXAMPLE, opset=OPSET):
    """Export a copy of a model that takes maps; return its ONNX graph and what ONNX Runtime computes with it."""
    model = copy.deepcopy(model)
    replace_deform_convs(model)
    axes = {0: "N", 2: "H", 3: "W"}
    network = Network(model, torch.randn(example), {"x": axes}, {"y": {0: "N", 2: "h", 3: "w"}})
    onnx_model = export.to_onnx(network, folder / "model.onnx", opset)
    assert [(o.domain, o.version) for o in onnx_model.opset_import] == [("", opset)]
    assert {node.domain for node in onnx_model.graph.node} == {""}
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    return onnx_model.graph, lambda x: session.run(None, {"x": x})[0]


def maps(*shape):
    """Return random maps [N, C, H, W]."""
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def computed(model, x):
    """Return what PyTorch computes; of a backbone, its last output."""
    with torch.no_grad():
        result = model(torch.from_numpy(x))
    return (result[-1] if isinstance(result, tuple) else result).numpy()


def assert_equal_to_mmcv(model, folder, sizes=SIZES, example=EXAMPLE):
    """Compare a model's export with the model at other sizes than that of the example."""
    graph, run = exported(model, folder, example)
    assert [node.op_type for node in graph.node].count("DeformConv") == 1
    for batch, height, width in sizes:
        x = maps(batch, 32, height, width)
        expected = computed(model, x)
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(run(x), expected, rtol=0, atol=2e-5)


# ------------------------------------------------------------------ layers, exported

KINDS = [("DCN", {}), ("DCNv2", {"bias": True}), ("DCNv2", {"bias": False})]


@exporting
@pytest.mark.parametrize("deform_groups", [1, 4])
@pytest.mark.parametrize("groups", [1, 32])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_exported_layers_equal_mmcv(tmp_path, kind, options, stride, dilation, groups, deform_groups):
    geometry = {"stride": stride, "padding": dilation, "dilation": dilation}
    layer = deformable(kind, groups=groups, deform_groups=deform_groups, **geometry, **options)
    offset = computed(layer.conv_offset, maps(1, 32, 20, 22))
    if kind == "DCNv2":
        offset = np.split(offset, [offset.shape[1] * 2 // 3], axis=1)[0]
    assert 0.25 < np.abs(offset).mean() < 0.42
    assert_equal_to_mmcv(layer, tmp_path)


@exporting
@pytest.mark.parametrize(
    "geometry",
    [
        {"kernel_size": 1, "padding": 0},
        {"kernel_size": 5, "padding": 2},
        {"kernel_size": 3, "padding": 0},
        {"kernel_size": (3, 5), "stride": (2, 1), "padding": (1, 3), "dilation": (1, 2)},
    ],
)
@pytest.mark.parametrize("kind", ["DCN", "DCNv2"])
def test_exported_layers_of_other_shapes_equal_mmcv(tmp_path, kind, geometry):
    assert_equal_to_mmcv(deformable(kind, deform_groups=2, **geometry), tmp_path)


@exporting
@pytest.mark.parametrize("kind", ["DCN, given offsets", "DCNv2, given offsets"])
@pytest.mark.parametrize("options", [{}, {"stride": 2, "deform_groups": 4}])
def test_exported_layers_that_are_given_their_offsets_equal_mmcv(tmp_path, kind, options):
    assert_equal_to_mmcv(deformable(kind, **options), tmp_path)


@exporting
@pytest.mark.parametrize("kind", ["DCN", "DCNv2"])
def test_far_offsets_and_those_that_leave_the_map(tmp_path, kind):
    """At 5 pixels on maps of 13 x 9, many points lie outside, where there are zeros, and some between."""
    layer = deformable(kind, spread=5)
    offset = computed(layer.conv_offset, maps(1, 32, 13, 9))[:, :18]
    rows = np.arange(13)[:, None] + np.repeat([-1, 0, 1], 3)[:, None, None] + offset[0, 0::2]
    assert 0.2 < ((rows < -1) | (rows > 13)).mean() < 0.5
    assert ((rows > -1) & (rows < 0)).sum() > 20
    assert ((rows > 12) & (rows < 13)).sum() > 20
    assert_equal_to_mmcv(layer, tmp_path)


# ------------------------------------------------------------------ maps smaller than the kernel

SMALL = [(1, 1, 1), (2, 1, 6), (1, 6, 2), (3, 2, 2)]


@exporting
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("example", [EXAMPLE, (1, 32, 2, 1)])
def test_small_maps_and_large_ones_go_through_the_same_export(tmp_path, example, dilation):
    """Mmcv pads small maps: an export with a large example must not miss that, nor one with a small example keep it."""
    layer = deformable("DCN, given offsets", padding=dilation, dilation=dilation)
    assert_equal_to_mmcv(layer, tmp_path, [*SMALL, *SIZES], example)


@exporting
@pytest.mark.parametrize("stride", [1, 2])
def test_small_maps_modulated(tmp_path, stride):
    assert_equal_to_mmcv(deformable("DCNv2", stride=stride), tmp_path, SMALL)


@exporting
def test_small_maps_that_mmcv_refuses(tmp_path):
    """What is exported for them equals mmcv's result for the layer that is given its offsets."""
    layer = deformable("DCN")
    with pytest.raises(RuntimeError, match="smaller than kernel"):
        layer(torch.zeros(1, 32, 2, 2))
    same = GivenOffsets(mmcv.ops.DeformConv2d(32, 32, 3, padding=1)).eval()
    same.layer.weight, same.conv_offset = layer.weight, layer.conv_offset
    _, run = exported(layer, tmp_path)
    for batch, height, width in SMALL:
        x = maps(batch, 32, height, width)
        np.testing.assert_allclose(run(x), computed(same, x), rtol=0, atol=2e-5)


@exporting
def test_no_maps_at_all(tmp_path):
    _, run = exported(deformable("DCNv2", stride=2), tmp_path)
    assert run(maps(0, 32, 7, 7)).shape == (0, 32, 4, 4)


# ------------------------------------------------------------------ a backbone


def backbone(dcn):
    """Return three stages of MMDetection's ResNet, an eighth as wide; the last two are deformable where dcn says so."""
    torch.manual_seed(0)
    stages = {"depth": 50, "num_stages": 3, "strides": (1, 2, 2), "dilations": (1, 1, 1), "out_indices": (2,)}
    deformable_stages = {"dcn": dcn, "stage_with_dcn": (False, True, True)} if dcn else {}
    model = build_backbone({"type": "ResNet", **stages, "base_channels": 8, "stem_channels": 8, **deformable_stages})
    deformed(model).eval()
    norms = [layer for layer in model.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(normalise) for norm in norms]
    for norm in norms:
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
        torch.nn.init.normal_(norm.bias, std=0.2)
    for block in model.modules():
        if isinstance(block, Bottleneck):  # more than this, and block after block amplifies what is rounded
            block.norm3.weight.data *= 0.2
    computed(model, maps(4, 3, 96, 128))
    for hook in hooks:
        hook.remove()
    return model


@exporting
@pytest.mark.parametrize("dcn", ["DCN", "DCNv2"])
def test_exported_backbones_equal_mmdetection(tmp_path, dcn):
    """With everything that the exporter does to them: it folds constants, and batch norms, but not into DeformConv."""
    model = backbone({"type": dcn, "deform_groups": 1, "fallback_on_stride": False})
    graph, run = exported(model, tmp_path, (1, 3, 96, 128))
    operators = [node.op_type for node in graph.node]
    assert operators.count("DeformConv") == operators.count("BatchNormalization") == 4 + 6
    for shape in [(1, 3, 160, 97), (2, 3, 96, 224)]:
        x = maps(*shape)
        expected = computed(model, x)
        np.testing.assert_allclose(run(x), expected, rtol=0, atol=2e-5)
    assert np.abs(computed(deformed(model, spread=0), x) - expected).max() > 0.2  # the offsets do something


# ------------------------------------------------------------------ around the export


@pytest.mark.parametrize("kind", ["DCN", "DCNv2", "DCN, given offsets", "DCNv2, given offsets"])
def test_replaced_layers_are_mmcvs_when_not_exported(kind, monkeypatch):
    monkeypatch.setattr(torch, "__version__", PYTORCH)
    layer = deformable(kind)
    replaced = copy.deepcopy(layer)
    replace_deform_convs(replaced)
    changed = [type(a) is not type(b) for a, b in zip(layer.modules(), replaced.modules())]
    assert sum(changed) == 1
    assert list(layer.state_dict()) == list(replaced.state_dict())
    for shape in [(1, 32, 20, 22), (3, 32, 7, 7)]:
        np.testing.assert_array_equal(computed(replaced, maps(*shape)), computed(layer, maps(*shape)))


def test_which_models_have_deformable_convolutions(monkeypatch):
    monkeypatch.setattr(torch, "__version__", PYTORCH)
    dcn = {"type": "DCN", "deform_groups": 1, "fallback_on_stride": False}
    for model, has in ((backbone(None), False), (backbone(dcn), True)):
        assert has_deform_conv(model) == has
        replace_deform_convs(model)
        assert has_deform_conv(model) == has


def test_a_pytorch_without_the_opset_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "1.13.1+cu117")
    replace_deform_convs(torch.nn.Conv2d(3, 3, 3))  # needs no operator
    with pytest.raises(SourceError, match=r"opset 19 .* PyTorch 1\.13\.1\+cu117 .* use PyTorch 2\.4"):
        replace_deform_convs(deformable("DCN"))


@exporting
def test_an_older_opset_is_refused(tmp_path):
    with pytest.raises(SourceError, match="model.onnx at opset 13: .*version 19"):
        exported(deformable("DCN"), tmp_path, opset=13)


@pytest.mark.slow
@exporting
def test_the_operator_is_defined_once_and_only_when_it_is_needed():
    code = """
import importlib, torch, sources.deform_conv as deform_conv
operators = torch.ops.faster_rcnn_onnx
print(hasattr(operators, "deform_conv2d"))
deform_conv.define_operator()
operator = operators.deform_conv2d
deform_conv.define_operator()
importlib.reload(deform_conv).define_operator()
print(operators.deform_conv2d is operator)
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert (result.returncode, result.stdout.split()) == (0, ["False", "True"]), result.stderr

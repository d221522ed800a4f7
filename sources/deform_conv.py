"""mmcv's deformable convolutions: the same layers, exported as DeformConv, an operator of ONNX.

A convolution reads its input at every point of its kernel. A deformable one moves each of these points by an offset
(Deformable Convolutional Networks, section 2.1); a modulated one also multiplies what it reads there by a mask
(Deformable ConvNets v2, section 3.2). mmcv and ONNX lay out both alike: for each group of channels, a channel for
every point of the mask and two of the offset, y before x.
"""

import mmcv.ops
import torch
from mmcv.utils import digit_version
from torch.onnx.symbolic_helper import parse_args

from sources import SourceError
from sources.layers import replace_layers

OPSET = 19  # of ONNX, the first with DeformConv
PYTORCH, ONNXRUNTIME = "2.4", "1.25"  # the first that export this opset, and run the operator


def has_deform_conv(model):
    """Return whether a model has one of these layers, so that its export needs OPSET."""
    return any(isinstance(layer, (mmcv.ops.DeformConv2d, mmcv.ops.ModulatedDeformConv2d)) for layer in model.modules())


def replace_deform_convs(model):
    """Replace a model's deformable convolutions by exportable ones; SourceError if PyTorch is too old for it."""
    if has_deform_conv(model) and digit_version(torch.__version__) < digit_version(PYTORCH):
        raise SourceError(
            f"the model has deformable convolutions, which need opset {OPSET} of ONNX, and PyTorch {torch.__version__} "
            f"cannot export it: use PyTorch {PYTORCH} and onnxruntime {ONNXRUNTIME}, or newer"
        )
    layers = (DeformConv2d, DeformConv2dPack, ModulatedDeformConv2d, ModulatedDeformConv2dPack)
    replace_layers(model, {layer.__base__: layer for layer in layers})


# ---------------------------------------------------------------------- the layers


class DeformConv2d(mmcv.ops.DeformConv2d):
    """Deformable convolution that is given its offsets.

    Where a map is smaller than the kernel, mmcv pads it with zeros and crops the result, because its operator refuses
    such maps. The result is the same without: around a map there are zeros in any case. And a tracer would pad by what
    the example input needs, whatever the size at run time.
    """

    def forward(self, x, offset):
        """Convolve x [N, C, H, W] with offset [N, 2 * groups * points, H', W']; when not exported, as mmcv does."""
        if not torch.onnx.is_in_onnx_export():
            return super().forward(x, offset)
        return deform_conv2d(self, x, offset)


class DeformConv2dPack(mmcv.ops.DeformConv2dPack):
    """Deformable convolution that computes its offsets; mmcv's own refuses maps smaller than the kernel."""

    def forward(self, x):
        """Convolve x [N, C, H, W]; when not exported, as mmcv does."""
        if not torch.onnx.is_in_onnx_export():
            return super().forward(x)
        return deform_conv2d(self, x, self.conv_offset(x))


class ModulatedDeformConv2d(mmcv.ops.ModulatedDeformConv2d):
    """Modulated deformable convolution that is given its offsets and its mask."""

    def forward(self, x, offset, mask):
        """Convolve x as DeformConv2d does, with mask [N, groups * points, H', W']; when not exported, as mmcv does."""
        if not torch.onnx.is_in_onnx_export():
            return super().forward(x, offset, mask)
        return deform_conv2d(self, x, offset, mask)


class ModulatedDeformConv2dPack(mmcv.ops.ModulatedDeformConv2dPack):
    """Modulated deformable convolution that computes its offsets and its mask."""

    def forward(self, x):
        """Convolve x [N, C, H, W]; when not exported, as mmcv does."""
        if not torch.onnx.is_in_onnx_export():
            return super().forward(x)
        channels = self.conv_offset.out_channels // 3  # of the mask
        offset, mask = self.conv_offset(x).split([2 * channels, channels], dim=1)
        return deform_conv2d(self, x, offset, mask.sigmoid())


# ---------------------------------------------------------------------- the operator


def deform_conv2d(layer, x, offset, mask=None):
    """Return a layer's convolution as one operator of the traced graph.

    mmcv's own are Python functions to the tracer; the exporter fails at them even where they say what they are in ONNX.
    """
    define_operator()
    geometry = [*layer.stride, *layer.padding, *layer.dilation, layer.groups, layer.deform_groups]
    bias = getattr(layer, "bias", None)
    return torch.ops.faster_rcnn_onnx.deform_conv2d(x, layer.weight, offset, bias, mask, geometry)


def define_operator():
    """Tell PyTorch about the operator, and its exporter about DeformConv, unless they know already."""
    if hasattr(torch.ops.faster_rcnn_onnx, "deform_conv2d"):
        return
    name = "faster_rcnn_onnx::deform_conv2d"
    tensors = "Tensor x, Tensor weight, Tensor offset, Tensor? bias, Tensor? mask"
    torch.library.define(name, f"({tensors}, int[] geometry) -> Tensor")
    torch.library.impl(name, "cpu", zeros_in_shape)
    torch.onnx.register_custom_op_symbolic(name, add_to_graph, OPSET)


def zeros_in_shape(x, weight, offset, *_):
    """Return zeros [N, C', H', W']: tracing needs only the shape, and no map is too small for it."""
    return x.new_zeros(len(x), len(weight), *offset.shape[2:])


@parse_args("v", "v", "v", "v", "v", "is")
def add_to_graph(g, x, weight, offset, bias, mask, geometry):
    """Add DeformConv to an ONNX graph; without bias or mask, they stay empty.

    geometry: stride, padding and dilation, each along y and x, then the groups of channels, and those of offsets.
    """
    stride, padding, dilation, (groups, deform_groups) = geometry[:2], geometry[2:4], geometry[4:6], geometry[6:]
    return g.op(
        "DeformConv", x, weight, offset, bias, mask,
        strides_i=stride, pads_i=2 * padding, dilations_i=dilation, group_i=groups, offset_group_i=deform_groups,
    )  # fmt: skip

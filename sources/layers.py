"""Layers that PyTorch's exporter gets wrong: the same layers, computed in a way that it gets right."""

import torch


class GroupNorm(torch.nn.GroupNorm):
    """GroupNorm whose means are exported along one axis after the other.

    PyTorch exports it to InstanceNormalization, where ONNX Runtime adds up a whole group in one go: half a million
    float32 for a picture of 800 x 1333, whose rounding alone changes the outputs by more than 1e-4.
    """

    def forward(self, x):
        """Normalise x [N, C, H, W]; when it is not exported, as PyTorch does."""
        if not torch.onnx.is_in_onnx_export():
            return super().forward(x)
        groups = x.reshape(x.shape[0], self.num_groups, -1, *x.shape[2:])
        groups = groups - mean_by_axes(groups)
        groups = groups / (mean_by_axes(groups * groups) + self.eps).sqrt()
        return groups.reshape(x.shape) * self.weight[:, None, None] + self.bias[:, None, None]


def mean_by_axes(groups):
    """Return the means of groups [N, g, c, H, W] as [N, g, 1, 1, 1]."""
    for axis in (4, 3, 2):
        groups = groups.mean(axis, keepdim=True)
    return groups


def replace_layers(model, replacements):
    """Replace a model's layers by exportable ones: {class: its subclass}."""
    for layer in model.modules():
        layer.__class__ = replacements.get(type(layer), type(layer))

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


def adaptive_max_pool2d(x, output_size):
    """Return torch.nn.functional.adaptive_max_pool2d of x [N, C, H, W], for maps whose sizes vary.

    PyTorch exports it for a constant size alone. How many cells a bin has at most is a constant here too, taken from
    the sizes of the example with which the graph is traced: bins of more than one cell overlap where they do not fit.
    """
    for axis, length, size in zip((2, 3), x.shape[2:], output_size):  # once x was taken apart, the exporter fixes sizes
        bins = torch.arange(size)
        first = torch.div(bins * length, size, rounding_mode="floor")
        last = torch.div((bins + 1) * length - 1, size, rounding_mode="floor")
        most = -(-int(length) // int(size)) + 1
        cells = torch.minimum(first[:, None] + torch.arange(most), last[:, None])  # [size, most], the last one repeated
        x = x.index_select(axis, cells.flatten()).unflatten(axis, (-1, most)).amax(axis + 1)
    return x


def replace_layers(model, replacements):
    """Replace a model's layers by exportable ones: {class: its subclass}."""
    for layer in model.modules():
        layer.__class__ = replacements.get(type(layer), type(layer))

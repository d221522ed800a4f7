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
        x = x - self.group_means(x)
        scale = self.weight[:, None, None] / (self.group_means(x * x) + self.eps).sqrt()
        return x * scale + self.bias[:, None, None]

    def group_means(self, x):
        """Return the mean of x [N, C, H, W] in each channel's group, as [N, C, 1, 1]."""
        size = self.num_channels // self.num_groups
        means = x.mean(3, keepdim=True).mean(2).reshape(-1, self.num_groups, size)
        return (means @ torch.full((size, size), 1 / size)).reshape(-1, self.num_channels, 1, 1)


class MultiheadAttention(torch.nn.MultiheadAttention):
    """Attention whose sizes are not those of the example with which the graph was traced."""

    def forward(self, query, key, value, **options):
        """Return what queries [L, N, C] read from [S, N, C], and None; with options or not exported, as PyTorch."""
        if options or not torch.onnx.is_in_onnx_export():
            return super().forward(query, key, value, **options)
        projections = zip((query, key, value), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3))
        query, key, value = (  # [N, heads, L, C / heads]
            torch.nn.functional.linear(*part).unflatten(2, (self.num_heads, -1)).permute(1, 2, 0, 3)
            for part in projections
        )
        weights = (query @ key.transpose(2, 3) * self.head_dim**-0.5).softmax(dim=3)
        return self.out_proj((weights @ value).permute(2, 0, 1, 3).flatten(2)), None


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

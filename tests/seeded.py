"""Give detectors seeded random weights that behave like trained ones, for tests and benchmark.

Plain random weights would test little: activations explode or vanish on their way through the layers, residual
branches are switched off (their last normalisation starts at zero), and the heads give every box the same score.
"""

import torch


def normalise(batch_norm, inputs):
    """Set the statistics of a batch normalisation to those of its input [N, C, ...]."""
    channels = inputs[0].transpose(0, 1).flatten(1)
    if channels.shape[1] > 4:  # the deviation of fewer values says little
        batch_norm.running_mean.copy_(channels.mean(dim=1))
        batch_norm.running_var.copy_(channels.var(dim=1))


def scale_to_unit(convolution, inputs, output, deviation=1):
    """Scale a convolution of maps, and its output with it, so that the output has a deviation of 1, if it has any."""
    if output[0, 0].numel() == 1 or output.std() == 0:
        return output
    factor = deviation / output.std()
    for parameter in convolution.parameters():
        parameter *= factor
    return output * factor


def scale_rpn(features, rpn, layers):
    """Scale the last layers (scores, deltas) of an RPN until its outputs vary as trained ones do.

    Then top-k, NMS and thresholds have something to decide. rpn(features) returns scores and deltas.
    """
    for layer, outputs, deviation in zip(layers, rpn(features), (1.0, 0.3)):
        scale_layer(layer, outputs, deviation)


def scale_head(outputs, layers, deviations=(2.0, 0.5)):
    """Scale the last layers (scores, deltas) of a head, given its outputs, until they vary as trained ones do."""
    for layer, output, deviation in zip(layers, outputs, deviations):
        scale_layer(layer, [output], deviation)


def scale_last_layer(layer, run, mean, deviation):
    """Scale and shift a layer so that what it gives while run() runs has a given mean and deviation."""
    outputs = []
    hook = layer.register_forward_hook(lambda layer, inputs, output: outputs.append(output))
    run()
    hook.remove()
    if outputs[0][0, 0].numel() > 9:  # SSD's last maps have so few cells that their deviation says little
        scale_layer(layer, outputs, deviation)
    layer.bias += mean


def scale_layer(layer, outputs, target):
    """Scale and shift a layer so that each channel of its outputs [N, C, ...] has mean 0 and a given deviation."""
    channels = torch.cat([output.transpose(0, 1).flatten(1) for output in outputs], dim=1)
    factor = target / channels.std(dim=1)
    layer.weight *= factor.reshape(-1, *[1] * (layer.weight.dim() - 1))
    layer.bias.copy_((layer.bias - channels.mean(dim=1)) * factor)

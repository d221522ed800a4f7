"""The networks of an export as parts of a larger graph."""

import onnx_ir as ir
from onnx import version_converter

from postprocess import ignore


class Network:
    """A network of an export: network(value) adds its nodes to a graph and returns its outputs. It can be called once.

    model: an onnx.ModelProto; tensors: {name: shape} of its input and outputs, as the detector expects them.
    """

    def __init__(self, stage, model, tensors, op):
        opset = op.builder.graph.opset_imports[""]
        if opset_of(model) != opset:
            model = version_converter.convert_version(model, opset)
        self.stage, self.graph, self.builder = stage, ir.from_proto(model).graph, op.builder
        for output in self.graph.outputs:
            output.shape = ir.Shape(tensors[output.name])  # the file may leave open what is known

    def __call__(self, value, record=ignore):
        """Return the outputs for an input, which are named after this network."""
        (taken,), outputs = self.graph.inputs, list(self.graph.outputs)
        names = [output.name for output in outputs]
        for initializer in list(self.graph.initializers.values()):
            weight = self.builder.initializer(initializer.const_value, f"{self.stage}/{initializer.name}")
            initializer.replace_all_uses_with(weight)
        taken.replace_all_uses_with(value)
        nodes = list(self.graph)
        for named in [*nodes, *(output for node in nodes for output in node.outputs)]:
            named.name = f"{self.stage}/{named.name}" if named.name else named.name  # without one, it is not there
        self.graph.outputs.clear()
        self.graph.remove(nodes)
        self.builder.graph.extend(nodes)
        record(self.stage, **{taken.name: value}, **dict(zip(names, outputs)))
        return outputs


def opset_of(model):
    """Return the operator set of an onnx.ModelProto that has the standard's alone."""
    return next(opset.version for opset in model.opset_import if opset.domain in ("", "ai.onnx"))

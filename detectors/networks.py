"""The ONNX files: opened and checked against the settings once, then run."""

import contextlib
import functools
import io
from pathlib import Path
from typing import Dict, NamedTuple, Tuple

import numpy as np
import onnxruntime

from postprocess import ignore

CPU = "CPUExecutionProvider"
USUAL = {  # options of providers that are better than onnxruntime's own
    "CUDAExecutionProvider": {
        "use_tf32": "0",  # with products of ten bits instead of 23, boxes move by half a pixel
        "cudnn_conv_algo_search": "HEURISTIC",  # for each new size of pictures; trying all takes most of a second
    },
}
BLOCK = 2**26  # bytes of input that a network takes at once; what it computes from them is several times as much


class ModelError(Exception):
    """There is nothing to run; the message says why and what to do."""


def one_line(error):
    """Return the message of an exception as one line that cannot do anything to a terminal."""
    named = isinstance(error, OSError) and error.strerror and error.filename
    text = " ".join((f"{error.filename}: {error.strerror}" if named else str(error)).split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class Execution(NamedTuple):
    """On what networks run."""

    # onnxruntime's execution providers, the preferred first; the CPU is always last
    providers: Tuple[str, ...] = ()
    options: Dict[str, str] = {}  # of the first provider
    threads: int = 0  # of the CPU; 0: as many as it has cores


def find_providers(names):
    """Return onnxruntime's names of execution providers, such as CUDAExecutionProvider for "cuda"."""
    known = {short(name): name for name in onnxruntime.get_available_providers()}
    missing = [name for name in names if short(name) not in known]
    if missing:
        of_nvidia = short(missing[0]) in ("cuda", "tensorrt")
        hint = ": onnxruntime-gpu has to take its place, see the README" if of_nvidia else ""
        raise ModelError(f"--provider {missing[0]}: this onnxruntime has only {', '.join(known)}{hint}")
    found = dict.fromkeys(known[short(name)] for name in names)
    return [name for name in found if name != CPU] + [name for name in found if name == CPU]


def short(provider):
    """Return the name of an execution provider as people write it: cuda."""
    return provider.lower().replace("executionprovider", "")


@functools.lru_cache
def load_libraries():
    """Load the libraries that onnxruntime-gpu needs from where pip puts them; return what is wrong, if anything is.

    From then on, onnxruntime no longer prints what it warns of.
    """
    onnxruntime.set_default_logger_severity(4)  # what it would print of it, we raise
    printed = io.StringIO()
    if hasattr(onnxruntime, "preload_dlls"):  # from 1.21 on
        with contextlib.redirect_stdout(printed):
            onnxruntime.preload_dlls()
    return one_line(printed.getvalue())


def with_cpu(names, options):
    """Return onnxruntime's list of providers: the first one gets the options, and the CPU does what they cannot."""
    providers = [(name, {**USUAL.get(name, {}), **(options if i == 0 else {})}) for i, name in enumerate(names)]
    return providers if CPU in names else [*providers, (CPU, {})]


def is_finite(array):
    """Return whether all numbers are finite. The sum of their squares says so quickly, unless they are very large."""
    flat = array.ravel()
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(np.dot(flat, flat)) or np.isfinite(flat).all())


class Network:
    """One ONNX file: network(array) returns its outputs.

    With `keep_memory` what it allocates is kept for the next picture.
    """

    def __init__(self, path, keep_memory=True, execution=Execution()):  # noqa: B008, it is immutable
        self.path, self.tensors = Path(path), {}
        if not self.path.is_file():
            raise ModelError(f"{path} does not exist: export again, or name another file")
        self.keep_memory = keep_memory
        self.open(execution)

    def open(self, execution):
        """Start the session on what an Execution says; ModelError if that cannot be."""
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are raised; onnxruntime would print them as well
        options.intra_op_num_threads = execution.threads
        options.enable_cpu_mem_arena = self.keep_memory
        options.enable_mem_pattern = False  # else the second picture gets new memory beside what the first one left
        wanted = find_providers(execution.providers)
        providers = with_cpu(wanted, execution.options)
        trouble = load_libraries() if len(providers) > 1 else ""
        try:
            self.session = onnxruntime.InferenceSession(
                str(self.path), options, providers=providers, enable_fallback=False
            )
            # The text that export.py left in the file; None if another program wrote it.
            self.metadata = self.session.get_modelmeta().custom_metadata_map.get("detector")
            tensors = [*self.session.get_inputs(), *self.session.get_outputs()]
            self.declared = [(tensor.name, tensor.type, tensor.shape) for tensor in tensors]
        except Exception as error:  # onnxruntime's errors have no common base class
            raise ModelError(f"{self.path} cannot be loaded by onnxruntime: {one_line(error)}") from error
        unused = [short(name) for name in wanted if name not in self.session.get_providers()]
        if unused:  # onnxruntime only warns, and takes the next one
            trouble = trouble or "is there such a device?"
            raise ModelError(f"--provider {unused[0]}: it cannot run {self.path} here: {trouble}")

    def expect(self, tensors, sizes):
        """Refuse a network whose input and outputs are not these, and check the shapes of every run from now on.

        tensors: {name: shape}, the input first, then the outputs in their order. A side is a number, or a name that
        stands for the same number wherever it occurs; the numbers found are added to `sizes`.
        """
        names = [name for name, _, _ in self.declared]
        if len(self.session.get_inputs()) != 1 or names != list(tensors):
            raise ModelError(f"{self.path} takes and gives {', '.join(names)} instead of {', '.join(tensors)}: is it "
                             "another network under this name? Export again")  # fmt: skip
        for (name, kind, shape), expected in zip(self.declared, tensors.values()):
            if kind != "tensor(float)":
                raise ModelError(f"{self.path} does not fit its settings: {name} is a {kind}")
            self.check(name, shape, expected, sizes)
        self.tensors = tensors

    def check(self, name, shape, expected, sizes):
        """Refuse a shape that is not as expected; a dynamic side, which is not a number yet, fits anything."""
        fits = len(shape) == len(expected)
        for side, wanted in zip(shape, expected):
            if isinstance(side, int):
                fits &= side == (sizes.setdefault(wanted, side) if isinstance(wanted, str) else wanted)
        if not fits:
            known = [sizes.get(side, side) for side in expected]
            shape, known = (", ".join("?" if side is None else str(side) for side in sides) for sides in (shape, known))
            raise ModelError(f"{self.path} does not fit its settings: {name} is [{shape}] instead of [{known}]")

    def compute(self, inputs):
        """Return the outputs for inputs {name: array}; ModelError if the network fails."""
        try:
            return self.session.run(None, inputs)
        except Exception as error:  # onnxruntime's errors have no common base class
            name, array = next(iter(inputs.items()))
            raise ModelError(f"onnxruntime fails with {name} {list(array.shape)}: {one_line(error)}") from error

    def compute_in_blocks(self, name, array):
        """Return the outputs for the input [n, ...], which is taken in blocks if it is large."""
        if array.nbytes <= BLOCK or len(array) == 1:
            return self.compute({name: array})
        rows = max(1, BLOCK // array[0].nbytes)
        blocks = [self.compute({name: array[i : i + rows]}) for i in range(0, len(array), rows)]
        return [np.concatenate(parts) for parts in zip(*blocks)]

    def __call__(self, array, record=ignore):
        """Return the outputs for the input; `record` gets both, under their names, as the stage of the file's name.

        ModelError if the network fails, or if an output has the wrong shape or is not finite.
        """
        outputs = self.compute_in_blocks(self.declared[0][0], array)
        arrays, sizes = dict(zip(self.tensors, [array, *outputs])), {}
        for tensor, expected in self.tensors.items():
            self.check(tensor, arrays[tensor].shape, expected, sizes)
            if arrays[tensor] is not array and not is_finite(arrays[tensor]):
                raise ModelError(f"{tensor} of {self.path.name} holds NaN or infinity: its weights may be damaged")
        record(self.path.stem, **arrays)
        return outputs

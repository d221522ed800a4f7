"""What `pip install .` makes of this folder: `import faster_rcnn_onnx`, and the programs as commands.

The folder is installed as it is, and this file as its __init__.py. In it, modules import one another by their plain
names, as they do when a program is run in place; so the folder is on Python's path while they are imported.
"""

import contextlib
import importlib
import runpy
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
__all__ = ["Detections", "Execution", "ModelError", "load"]  # noqa: F822, they are of detectors/, see __getattr__


@contextlib.contextmanager
def importable():
    """Let modules of the folder be imported by their plain names for a while."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield
    finally:
        sys.path.remove(str(FOLDER))


def __getattr__(name):  # when it is first asked for: programs set what OpenCV reads when it is imported
    """Return what the package offers, see __all__."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with importable():
        return getattr(importlib.import_module("detectors"), name)


def command():
    """Run the program that a command is named after: faster-rcnn-demo runs demo.py."""
    program = FOLDER / f"{Path(sys.argv[0]).stem.rpartition('-')[2]}.py"
    with importable():
        runpy.run_path(str(program), run_name="__main__")

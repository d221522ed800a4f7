"""The two lists of versions agree with each other and with what is installed."""

import importlib.metadata
import re
import sysconfig

import pytest
from conftest import ROOT

tomllib = pytest.importorskip("tomllib")


def normalise(name):
    """Return a package's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned():
    """Return the packages of requirement.txt and their versions."""
    lines = (ROOT / "requirement.txt").read_text().splitlines()
    pins = [re.fullmatch(r"([\w.-]+)==([\w.+!]+)( ;.*)?", line) for line in lines if line and not line.startswith("#")]
    assert all(pins), "a line of requirement.txt is no exact version"
    return {normalise(pin[1]): pin[2] for pin in pins}


def test_requirement_txt_agrees_with_pyproject():
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, constraints = content["project"], content["tool"]["uv"]["constraint-dependencies"]
    requirements = project["dependencies"] + sum(project["optional-dependencies"].values(), []) + constraints
    versions = dict(requirement.split("==") for requirement in requirements)
    assert {normalise(name): version for name, version in versions.items()} == pinned()


def test_requirement_txt_is_what_is_installed():
    site = sysconfig.get_path("purelib")
    installed = {normalise(d.metadata["Name"]): d.version for d in importlib.metadata.distributions(path=[site])}
    pins = pinned()
    for installer in ("pip", "wheel"):  # there where pip made the environment, needed by nothing
        installed.pop(installer, None)
    assert {name: version for name, version in installed.items() if pins.get(name) != version} == {}


def test_requirement_txt_holds_everything_the_installed_packages_need():
    pins = pinned()
    for name in pins:
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform
        for need in needs:
            if ";" not in need:
                assert normalise(re.match(r"[\w.-]+", need)[0]) in pins, f"{name} needs {need}"

"""The two lists of versions agree with each other and with what is installed, all of it or a part."""

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


def project():
    """Return pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def requirements_of(extra):
    """Return the names of the packages that `uv run --extra EXTRA` asks for."""
    needs = project()["project"]["dependencies"] + project()["project"]["optional-dependencies"][extra]
    return {normalise(need.split("==")[0]) for need in needs}


def test_requirement_txt_agrees_with_pyproject():
    content = project()
    extras = {**content["project"]["optional-dependencies"]}
    extras.pop("gpu")  # takes the place of another package
    requirements = content["project"]["dependencies"] + sum(extras.values(), [])
    requirements += content["tool"]["uv"]["constraint-dependencies"]
    versions = {tuple(requirement.split("==")) for requirement in requirements}  # an extra may repeat another's
    assert sorted((normalise(name), version) for name, version in versions) == sorted(pinned().items())


def test_onnxruntime_has_the_same_version_on_a_gpu():
    (gpu,) = project()["project"]["optional-dependencies"]["gpu"]
    assert gpu == f"onnxruntime-gpu[cuda,cudnn]=={pinned()['onnxruntime']}"
    for name in ("README.md", "README.zh-CN.md"):
        assert f"onnxruntime-gpu=={pinned()['onnxruntime']}" in (ROOT / name).read_text()


def test_the_tests_without_a_framework_need_what_all_tests_need_and_no_framework():
    light = requirements_of("test")
    assert light <= requirements_of("export")
    assert light & {"mmcv-full", "mmdet", "setuptools", "torch", "torchvision"} == set()


def test_exporting_torchvision_s_detectors_needs_no_compiler_and_no_mmdetection():
    assert requirements_of("torchvision") <= requirements_of("export")
    assert requirements_of("torchvision") & {"mmcv-full", "mmdet", "setuptools"} == set()


def test_requirement_txt_is_what_is_installed():
    site = sysconfig.get_path("purelib")
    installed = {normalise(d.metadata["Name"]): d.version for d in importlib.metadata.distributions(path=[site])}
    pins = pinned()
    for installer in ("pip", "wheel"):  # there where pip made the environment, needed by nothing
        installed.pop(installer, None)
    if "mmdet" not in installed:  # not all extras are installed
        installed.pop("setuptools", None)  # comes with pip in some environments, and only mmcv needs a certain one
    assert {name: version for name, version in installed.items() if pins.get(name) != version} == {}
    assert requirements_of("test") <= set(installed)


def test_requirement_txt_holds_everything_the_installed_packages_need():
    pins = pinned()
    for name in pins:
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform, or of an extra that is not installed
        for need in needs:
            if ";" not in need:
                assert normalise(re.match(r"[\w.-]+", need)[0]) in pins, f"{name} needs {need}"

"""The container recipe, which no test can build, agrees with what the package pins."""

import re
import sys

import pytest

from tests.helpers.processes import ROOT

if sys.version_info < (3, 11):
    pytest.skip("reads pyproject.toml", allow_module_level=True)
import tomllib

RECIPE = (ROOT / "docker" / "Dockerfile").read_text()
KNOWN = {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "FROM", "RUN", "USER", "WORKDIR"}


def instructions():
    """(instruction, its text) of the recipe, without comments."""
    lines = "\n".join(x for x in RECIPE.splitlines() if not x.lstrip().startswith("#"))
    for line in filter(str.strip, re.sub(r"\\\n", " ", lines).splitlines()):
        name, _, text = line.partition(" ")
        yield name, " ".join(text.split())


def test_it_is_a_recipe_of_two_stages():
    steps = list(instructions())
    assert {name for name, _ in steps} <= KNOWN
    assert [name for name, _ in steps].count("FROM") == 2
    assert "COPY --from=build" in RECIPE
    assert RECIPE.count("Not built yet") == 1


def test_cuda_and_what_is_installed_are_what_the_package_pins():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = (ROOT / "constraints.txt").read_text()
    cuda = re.search(r"^ARG CUDA=(\d+)\.(\d+)\.\d+$", RECIPE, re.MULTILINE)
    dali = f"nvidia-dali-cuda{cuda[1]}{cuda[2]}"
    assert re.search(rf"^{dali}==", pins, re.MULTILINE)
    assert project["optional-dependencies"]["dali"][0].startswith(dali)
    assert re.search(r"^torch==", pins, re.MULTILINE)
    (installed,) = (t for n, t in instructions() if n == "RUN" and dali in t)
    assert "--constraint constraints.txt" in installed
    for dependency in project["dependencies"]:
        name = re.match(r"[a-z-]+", dependency)[0]
        assert name in installed.split() or name in ("triton", "tomli"), name  # torch brings it

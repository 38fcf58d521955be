"""What the workflows call exists, and their tools are those of the house."""

import importlib.util
import re
from pathlib import Path

import pytest

from sid_fast.kernels.compile import MODULES, selected

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_what_a_workflow_calls_is_there(path):
    text = path.read_text()
    targets = re.findall(r"\bmake (\w+)", text)
    files = re.findall(r"\btests/[\w/.]+", text)
    known = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    assert targets
    assert set(targets) <= set(known)
    assert files
    assert all((ROOT / file).exists() for file in files)
    for module in re.findall(r"python -m ((?:sid_fast|benchmarks)[\w.]*)", text):
        assert importlib.util.find_spec(module), module


def test_every_kernel_is_compiled_or_excused():
    text = (ROOT / ".github/workflows/cpu.yml").read_text()
    listed = re.search(r"kernel: \[(.*)\]", text)[1]
    for entry in listed.split(", "):
        assert any(selected(90, entry)), f"no configuration is called {entry}"
    found = {entry.split()[0] for entry in listed.split(", ")}
    assert found == set(MODULES) - {"augment"}  # whose sine and cosine take a stack frame


def test_pre_commit_has_the_pinned_ruff():
    pinned = re.search(r"^ruff==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)[1]
    assert f"rev: v{pinned}\n" in (ROOT / ".pre-commit-config.yaml").read_text()

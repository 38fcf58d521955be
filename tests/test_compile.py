"""Ahead-of-time compilation: what CI compiles for GPUs it does not have."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sid_fast.kernels import compile

# The tightest of every module, compiled for three architectures; the whole list takes minutes.
REPRESENTATIVE = ["attention bf16 1x256 N=256", "attention backward_q fp32 1x256 N=256"]


def run(*arguments: str, interpret: bool = False) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "sid_fast.kernels.compile", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("kernel", REPRESENTATIVE)
def test_compiles_for_every_architecture_without_spills(kernel, tmp_path):
    done = run("--kernel", kernel, "--json", str(tmp_path / "table.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    table = json.loads((tmp_path / "table.json").read_text())
    assert {row["arch"] for row in table} == {"sm_80", "sm_90", "sm_100"}
    for row in table:
        assert row["spills"] == 0 and row["registers"] > 0 and row["binary"] > 0, row


def test_every_module_with_triton_code_is_compiled():
    found = {
        path.stem
        for path in Path(compile.__file__).parent.glob("*.py")
        if re.search(r"^@triton\.jit", path.read_text(), re.MULTILINE)
    }
    assert found <= set(compile.MODULES)


def test_a_spill_or_too_much_shared_memory_is_a_fault():
    good = compile.Row("k", "c", "sm_80", registers=255, spills=0, shared=166_912, binary=1)
    assert good.faults() == []
    assert "spills 8 bytes" in compile.dataclasses.replace(good, spills=8).faults()
    assert compile.dataclasses.replace(good, shared=166_913).faults()


def test_a_configuration_that_spills_fails_the_command(tmp_path):
    """The same kernel on half the threads: its accumulators cannot fit their registers."""
    program = (
        "import sys, sid_fast.kernels.compile as c\n"
        "from sid_fast.kernels._triton import triton\n"
        "a = c.importlib.import_module('sid_fast.kernels.attention')\n"
        "a.TILES['forward'][256] = (128, 64, 4, 2)\n"
        "sys.exit(c.main(['--arch', 'sm_80', '--kernel', 'attention forward bf16 1x256 N=256']))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "spills" in done.stdout.splitlines()[1]


@pytest.mark.parametrize(
    ("arguments", "interpret", "message"),
    [
        ((), True, "TRITON_INTERPRET is set"),
        (("--arch", "sm_42"), False, "sm_42"),
        (("--kernel", "matmul"), False, "matmul"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(arguments, interpret, message):
    done = run(*arguments, interpret=interpret)
    assert done.returncode == 2
    assert message in done.stderr

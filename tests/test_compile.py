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
REPRESENTATIVE = ["attention bf16 1x256 N=256", "attention forward fp32 1x192"]


def run(*command: str) -> subprocess.CompletedProcess:
    """Python in a process that does not interpret Triton, as the tests of kernels do."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, *command]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("kernel", REPRESENTATIVE)
def test_compiles_for_every_architecture_without_spills(kernel, tmp_path):
    table = tmp_path / "table.json"
    done = run("-m", "sid_fast.kernels.compile", "--kernel", kernel, "--json", str(table))
    assert done.returncode == 0, done.stdout + done.stderr
    table = json.loads(table.read_text())
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


def test_a_configuration_that_spills_fails_the_command():
    """A tile's accumulators cannot fit the registers of two warps."""
    done = run(
        "-c",
        "import importlib, sys, sid_fast.kernels.compile as compile\n"
        "tiles = importlib.import_module('sid_fast.kernels.attention').TILES\n"
        "tiles[2]['forward'][64] = (128, 64, 2, 1)\n"
        "kernel = 'attention forward bf16 9x64 N=256'\n"
        "sys.exit(compile.main(['--arch', 'sm_80', '--kernel', kernel]))\n",
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "spills" in done.stdout.splitlines()[1]


def test_float32_products_are_not_rounded_to_tf32():
    """The interpreter, which multiplies in float32 whatever it is told, cannot notice."""
    done = run(
        "-c",
        "import importlib, sys, sid_fast.kernels.compile as compile\n"
        "attention = importlib.import_module('sid_fast.kernels.attention')\n"
        "for label, *configuration in attention.configurations():\n"
        "    if 'fp32 12x64' in label:\n"
        "        assert 'tf32' not in compile.compiled(*configuration, 90).asm['ptx'], label\n"
        "        print(label)\n",
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "sm_42"], "sm_42"),
        (["--kernel", "matmul"], "matmul"),
        ([], "TRITON_INTERPRET is set"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(compile, "INTERPRETED", True)
    with pytest.raises(SystemExit) as stopped:
        compile.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_kernels_import_where_triton_is_not_built():
    done = run(
        "-c",
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from sid_fast import kernels\n"
        "print(kernels.attention(torch.ones(1, 12, 2, 2), 2).sum())\n",
    )
    assert "tensor(16.)" in done.stdout, done.stderr

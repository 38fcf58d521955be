"""Ahead-of-time compilation and instruction counts, as CI runs them without a GPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sid_fast.kernels import compile, report
from sid_fast.kernels._triton import triton

# The configurations closest to spilling; all of them would take minutes on three architectures.
REPRESENTATIVE = ["attention bf16 1x256 N=256", "attention forward fp32 1x192"]


def run(*command: str) -> subprocess.CompletedProcess:
    """Run Python in a process without TRITON_INTERPRET, unlike the tests of kernels."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, *command]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", REPRESENTATIVE)
def test_compiles_for_every_architecture_without_spills(kernel, tmp_path):
    table = tmp_path / "table.json"
    done = run("-m", "sid_fast.kernels.compile", "--kernel", kernel, "--json", str(table))
    assert done.returncode == 0, done.stdout + done.stderr
    table = json.loads(table.read_text())
    assert {row["arch"] for row in table} == {"sm_80", "sm_90", "sm_100"}
    for row in table:
        assert row["spills"] == 0, row
        assert row["registers"] > 0, row
        assert row["binary"] > 0, row


def test_every_module_with_triton_code_is_compiled():
    folder = Path(compile.__file__).parent
    modules = {
        path.relative_to(folder).parts[0].removesuffix(".py")
        for path in folder.rglob("*.py")
        if re.search(r"^@triton\.jit", path.read_text(), re.MULTILINE)
    }
    assert modules <= set(compile.MODULES)
    assert report.WORK.keys() == set(compile.MODULES)  # each module can be estimated


def test_a_spill_or_too_much_shared_memory_is_a_fault():
    good = compile.Row("k", "c", "sm_80", registers=255, spills=0, shared=166_912, binary=1)
    assert good.faults() == []
    assert "spills 8 bytes" in compile.dataclasses.replace(good, spills=8).faults()
    assert compile.dataclasses.replace(good, shared=166_913).faults()


@pytest.mark.slow
def test_a_configuration_that_spills_fails_the_command():
    """The accumulators of this tile do not fit the registers of two warps."""
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
    """The interpreter cannot detect it, because it always multiplies in float32."""
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
        (["--report", "--arch", "sm_80"], "--arch sm_80"),
        (["--check", "x.json", "--arch", "sm_80"], "--arch sm_80"),
        (["--report", "--images", "0"], "--images 0"),
        (["--json", "/nowhere/x.json"], "no folder /nowhere"),
        (["--report", "--write"], "--write"),
    ],
)
def test_invalid_arguments_are_refused(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(compile, "INTERPRETED", True)
    with pytest.raises(SystemExit) as stopped:
        compile.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_kernels_import_without_triton():
    done = run(
        "-c",
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from sid_fast import kernels\n"
        "print(kernels.attention(torch.ones(1, 12, 2, 2), 2).sum())\n",
    )
    assert "tensor(16.)" in done.stdout, done.stderr


ESTIMATES = Path(__file__).with_name("estimates.json")


@pytest.mark.slow
def test_instructions_per_element_match_the_table(tmp_path):
    """After an intended change, run compile --check tests/kernels/estimates.json --write."""
    pinned = json.loads(ESTIMATES.read_text())["triton"]
    if triton.__version__ != pinned:
        pytest.skip(f"the table was made by Triton {pinned}, this is {triton.__version__}")
    out = tmp_path / "estimates.json"
    command = ("-m", "sid_fast.kernels.compile", "--check", str(ESTIMATES), "--json", str(out))
    done = run(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ESTIMATES for h100" in done.stdout
    rows = json.loads(out.read_text())
    assert len(rows) == 22
    for row in rows:
        assert row["card"] == "h100"
        assert row["images"] == 64
        assert row["blocks_per_sm"] > 0
        assert row["issue_over_floor"] == pytest.approx(
            row["issue_us"] / row["floor_us"], abs=0.002 + 0.01 / row["floor_us"]
        )


def estimate(**changes) -> report.Estimate:
    row = report.Estimate("k", "c", "h100", 64, 80, 0, 3, 40.0, 1.0, 2.0, 0.5)
    return report.dataclasses.replace(row, **changes)


def test_an_estimate_may_deviate_by_five_percent_but_not_spill():
    table = [{"instructions_per_element": 40.0}]
    assert compile.deviations([estimate(instructions_per_element=42.0)], table) == []
    assert compile.deviations([estimate(instructions_per_element=38.0)], table) == []
    for changes in ({"instructions_per_element": 42.1}, {"instructions_per_element": 37.9}):
        assert "40.0 in the table" in compile.deviations([estimate(**changes)], table)[0]
    assert compile.deviations([estimate(spills=8)], table) == ["k c: spills 8 bytes"]


@pytest.mark.slow
def test_check_updates_a_table_and_refuses_one_it_cannot_compare(tmp_path):
    row = {"kernel": "sid_loss", "configuration": "noised 32x32 bf16"}
    row["instructions_per_element"] = 1.0
    script = tmp_path / "script.py"
    script.write_text(
        "import json, pathlib, sys, sid_fast.kernels.compile as compile\n"
        "table = pathlib.Path(sys.argv[1])\n"
        "def status(*options):\n"
        "    try:\n"
        "        return compile.main(['--check', str(table), *options])\n"
        "    except SystemExit as stopped:\n"
        "        return stopped.code\n"
        f"table.write_text(json.dumps({{'triton': '0.1', 'rows': [{row}]}}))\n"
        "statuses = [status(), status('--write'), status()]\n"
        "written = json.loads(table.read_text())\n"
        "written['rows'][0]['instructions_per_element'] *= 2\n"
        "table.write_text(json.dumps(written))\n"
        "statuses += [status()]\n"
        "written['rows'][0]['configuration'] = 'noised 33x33'\n"
        "table.write_text(json.dumps(written))\n"
        "statuses += [status()]\n"
        "table.write_text(json.dumps({'triton': compile.triton.__version__, 'rows': [{}]}))\n"
        "statuses += [status()]\n"
        "table.write_text('[]')\n"
        "print(*statuses, status())\n"
    )
    done = run(str(script), str(tmp_path / "table.json"))
    assert done.stdout.splitlines()[-1] == "2 0 0 1 2 2 2", done.stdout + done.stderr
    for message in (
        "made by Triton 0.1",
        "in the table",
        "unknown configuration 'sid_loss noised 33x33'",
        "not a table of estimates",
    ):
        assert message in done.stderr


def test_a_missing_disassembler_is_named(tmp_path):
    done = run(
        "-c",
        "import sys, sid_fast.kernels.compile as compile\n"
        "tool = type(compile.triton.knobs.nvidia).__dict__['nvdisasm']\n"
        "tool.default_path = '/nowhere/nvdisasm'\n"
        "compile.main(['--report', '--kernel', 'sid_loss noised 32x32 bf16'])\n",
    )
    assert done.returncode == 2, done.stderr
    assert "nvdisasm" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_counted_path_stores_each_output_byte_once():
    """Loop iterations and full tiles are counted correctly."""
    done = run(
        "-c",
        "import sid_fast.kernels.compile as compile\n"
        "from sid_fast.kernels import report, sass\n"
        "for name, out in {\n"
        "    'group_norm forward norm1 add 256@32x32 bf16': 32 * 32 * 256 * 2,\n"
        "    'attention forward bf16 6x64 N=1024': 1024 * 6 * (64 * 2 + 4),\n"
        "    'attention backward_kv bf16 6x64 N=1024': 1024 * 6 * 64 * 2 * 2,\n"
        "    'adam_ema beta1=0.0 ema=1 compute=1': report.PARAMETERS * 14,\n"
        "    'dropout 256@32x32 channels-last bf16': 32 * 32 * 256 * 2,\n"
        "    'random normal 3072': 3072 * 4,\n"
        "}.items():\n"
        "    (module, label, configuration), = compile.selected(report.ARCH, name)\n"
        "    work = report.WORK[module](label, configuration[2], 1)\n"
        "    cubin = compile.compiled(*configuration, report.ARCH).asm['cubin']\n"
        "    _, stored = sass.count(sass.disassemble(cubin), work.trips)\n"
        "    ratio = stored * configuration[3] * work.blocks / out\n"
        "    assert 1 <= ratio < 1.05, (name, ratio)\n"
        "    print(name)\n",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 6


@pytest.mark.slow
def test_adam_loads_a_chunk_before_its_reduction():
    """Gradient, parameter, second moment and EMA are loaded in one round trip to memory."""
    done = run(
        "-c",
        "import sid_fast.kernels.compile as compile\n"
        "from sid_fast.kernels import sass\n"
        "(_, _, configuration), = compile.selected(90, 'adam_ema beta1=0.0 ema=1 compute=1')\n"
        "program = sass.disassemble(compile.compiled(*configuration, 90).asm['cubin'])\n"
        "names = [i.opcode for i in program.instructions[min(sass.loops(program)) :]]\n"
        "barrier = next(k for k, name in enumerate(names) if name.startswith('BAR'))\n"
        "print(sum(name == 'LDG.E.128' for name in names[:barrier]))\n",
    )
    assert done.stdout == "4\n", done.stderr

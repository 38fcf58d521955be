"""Documentation and examples: their Python runs, and their commands exist with these options."""

import contextlib
import importlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
from pathlib import Path

import pytest

from sid_fast.__main__ import COMMANDS
from tests.helpers.processes import python

ROOT = Path(__file__).parents[1]
DOCS, EXAMPLES = ROOT / "docs", ROOT / "examples"
PAGES = sorted(page for page in DOCS.glob("*.md") if page.name != "prose.md")


def blocks(page: Path, language: str) -> list[str]:
    """The page's fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)


def options(name: str, subcommand: str = "") -> set[str]:
    """All options of `python -m sid_fast.NAME SUBCOMMAND`."""
    command = importlib.import_module(f"sid_fast.{name}").main
    if subcommand:
        command = command.commands[subcommand]
    visible = (p for p in command.params if not getattr(p, "hidden", False))
    return {"--help"} | {opt for p in visible for opt in (*p.opts, *p.secondary_opts)}


def command_lines(text: str) -> list[list[str]]:
    """The words after `sid_fast.` of each command line in a text."""
    text = text.replace("\\\n", " ")
    found = re.findall(r"-m sid_fast\.([^\n`|'\"&\\]*)", text)
    return [shlex.split(line, comments=True) for line in found if not line.startswith("kernels")]


# --- pages


SLOW_PAGES = {"graphs"}  # counts a whole step


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(p, id=p.stem, marks=[pytest.mark.slow] * (p.stem in SLOW_PAGES))
        for p in PAGES
        if blocks(p, "python")
    ],
)
def test_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for source in blocks(page, "python"):
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(source, page.name, "exec"), namespace)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "json")], ids=lambda p: p.stem)
def test_json_of_a_page_is_valid(page):
    for source in blocks(page, "json"):
        json.loads(source)


def test_commands_exist_with_their_options():
    sources = [ROOT / "README.md", *PAGES, EXAMPLES / "slurm.sh", EXAMPLES / "digits.ipynb"]
    lines = [words for path in sources for words in command_lines(path.read_text("utf-8"))]
    assert len(lines) > 15
    for name, *words in lines:
        assert name in COMMANDS, name
        subcommand = words[0] if name == "evaluate" and words[:1] == ["reference"] else ""
        used = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert used <= options(name, subcommand), (name, words)


def test_the_table_of_upstreams_options_names_ours():
    text = (DOCS / "moving.md").read_text("utf-8")
    seen = 0
    for section in text.split("\n## ")[1:]:
        header = re.search(r"\| upstream[^|]*\|([^|]*)\|", section)
        name = header and re.search(r"sid_fast\.(\w+)", header[1])
        if not name:
            continue
        ours = options(name[1])
        if name[1] == "evaluate":
            ours |= options("evaluate", "reference")
        for row in re.findall(r"^\| [^|]* \|([^|]*)\|", section, re.M):
            if "sid_fast." not in row:
                used = set(re.findall(r"`(--?[a-z][\w-]*)", row))
                used |= set(re.findall(r" (--[\w-]+)", row))
                assert used <= ours, (name[1], row)
                seen += len(used)
    assert seen > 60


def test_every_log_key_is_documented():
    from sid_fast.methods.sid import SiD
    from sid_fast.methods.sida import SiDA

    text = (DOCS / "formats.md").read_text("utf-8")
    for key in (*SiD.progress, *SiDA.progress, "it_per_s", "img_per_s", "input_waits"):
        assert f"`{key}`" in text, key


@pytest.mark.parametrize(
    ("section", "records"),
    [("Memory traffic of a network", ("PASSES", "LAUNCHES")), ("Group norm", ("INSTRUCTIONS",))],
)
def test_figures_of_the_kernels_page_are_those_of_the_records(section, records):
    text = (DOCS / "kernels.md").read_text("utf-8").split(f"## {section}\n")[1].split("\n## ")[0]
    known = "".join((ROOT / "benchmarks" / f"{name}.md").read_text("utf-8") for name in records)
    figures = set(re.findall(r"(?<![\d.,+])\d+[.,]\d+(?![\d.])", text))
    assert len(figures) > 10
    assert figures <= set(re.findall(r"(?<![\d.,])\d+[.,]\d+(?![\d.])", known)) | {"13,000"}


# --- examples


@pytest.mark.slow
def test_sid_in_100_lines(tmp_path):
    script = EXAMPLES / "sid_in_100_lines.py"
    assert len(script.read_text("utf-8").splitlines()) <= 100
    out = tmp_path / "digits.png"
    ended = python(script, "--steps", 8, "--images", 128, "--out", out)
    assert ended.returncode == 0, ended.stderr
    distances = [float(v) for v in re.findall(r"distance ([\d.]+)", ended.stdout)]
    assert len(distances) == 9
    assert distances[-1] < 0.95 * distances[0]
    assert out.read_bytes().startswith(b"\x89PNG")


def notebook() -> dict:
    return json.loads((EXAMPLES / "digits.ipynb").read_text("utf-8"))


def test_the_notebook_is_stripped_and_well_formed():
    book = notebook()
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in book["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in book["cells"]:
        assert all(isinstance(line, str) for line in cell["source"])
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    source = "\n\n".join("".join(c["source"]) for c in notebook()["cells"] if "outputs" in c)
    small = {
        "STEPS = 120": "STEPS = 8",
        "IMAGES = 1000": "IMAGES = 100",
        "num_steps=18": "num_steps=6",
    }
    for old, new in small.items():
        assert old in source
        source = source.replace(old, new)
    script = tmp_path / "notebook.py"
    setup = f"import matplotlib, os\nmatplotlib.use('Agg')\nos.chdir({str(tmp_path)!r})\n"
    script.write_text(setup + source, "utf-8")
    ended = python(script)
    assert ended.returncode == 0, ended.stderr
    assert "same images: True" in ended.stdout
    distances = [float(v) for v in re.findall(r"images  distance ([\d.]+)", ended.stdout)]
    assert distances[-1] < 0.95 * distances[0]


# --- the SLURM script, with stand-ins for SLURM's commands and for Python

SRUN = """
[ "$1" = --cpus-per-task=3 ] || exit 9  # SLURM_CPUS_PER_TASK of sbatch is not for srun
shift
for ((i = 0; i < SLURM_NTASKS; i++)); do
  SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & pids+=($!)
done
echo "${pids[@]}" >step-41.0
trap 'kill -KILL "${pids[@]}"' TERM  # as the real one does
status=0
for pid in "${pids[@]}"; do
  until wait "$pid"; code=$?; ! kill -0 "$pid" 2>/dev/null; do :; done
  ((code > status)) && status=$code
done
exit $status
"""
SCONTROL = """
case $1 in show) echo 127.0.0.1 ;; *) echo "$@" >>scontrol.log ;; esac
"""
SCANCEL = """
[ "$1" = --signal=TERM ] && kill -TERM $(cat "step-$2")
"""
PYTHON = """
echo "$RANK of $WORLD_SIZE: $*" >>python.log
[ -e finish ] && exit "$(cat finish)"
trap 'mkdir -p "$RUN/state-000000007"; echo {} >"$RUN/state-000000007/state.json"; exit 143' TERM
touch "started-$RANK"
for ((i = 0; i < 300; i++)); do sleep 0.1; done
"""


@pytest.fixture
def slurm(tmp_path):
    """Start examples/slurm.sh with two processes; returns the Popen."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    commands = {"srun": SRUN, "scontrol": SCONTROL, "scancel": SCANCEL, "python": PYTHON}
    for name, body in commands.items():
        (bin_folder / name).write_text(f"#!/usr/bin/env bash\n{body.lstrip()}", "utf-8")
        (bin_folder / name).chmod(0o755)
    environment = {
        "PATH": f"{bin_folder}:{os.environ['PATH']}", "RUN": "run", "SETUP": "true",
        "SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2", "SLURM_CPUS_PER_TASK": "3",
    }  # fmt: skip

    def start(*arguments: str) -> subprocess.Popen:
        command = ["bash", str(EXAMPLES / "slurm.sh"), *arguments]
        return subprocess.Popen(command, cwd=tmp_path, env=environment, text=True)

    return start


def wait_for(*paths: Path) -> None:
    command = "until " + " && ".join(f"[ -e {shlex.quote(str(p))} ]" for p in paths)
    subprocess.run(["bash", "-c", f"{command}; do sleep 0.05; done"], check=True, timeout=30)


def test_slurm_script_requeues_after_sigterm_and_resumes(slurm, tmp_path):
    job = slurm("--preset", "digits")
    wait_for(tmp_path / "started-0", tmp_path / "started-1")
    job.send_signal(signal.SIGTERM)
    assert job.wait(30) == 143
    assert (tmp_path / "scontrol.log").read_text() == "requeue 41\n"

    (tmp_path / "finish").write_text("0")
    assert slurm("--preset", "digits").wait(30) == 0
    log = sorted((tmp_path / "python.log").read_text().splitlines())
    train = "-m sid_fast.train"
    expected = [
        f"{rank} of 2: {train} {how} run --preset digits"
        for rank in (0, 1)
        for how in ("--out", "--resume")
    ]
    assert log == expected
    assert (tmp_path / "scontrol.log").read_text() == "requeue 41\n"  # not after a finished run


def test_slurm_script_requeues_when_max_hours_are_over(slurm, tmp_path):
    (tmp_path / "finish").write_text("75")
    assert slurm("--preset", "digits", "--max-hours", "0.1").wait(30) == 75
    assert (tmp_path / "scontrol.log").read_text() == "requeue 41\n"


@pytest.mark.parametrize("status", ["1", "2", "143"])
def test_slurm_script_does_not_requeue_what_it_did_not_stop(slurm, tmp_path, status):
    """143 without a signal to the script: scancel."""
    (tmp_path / "finish").write_text(status)
    assert slurm("--preset", "digits").wait(30) == int(status)
    assert not (tmp_path / "scontrol.log").exists()

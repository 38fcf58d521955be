"""Standard streams take any text and never end a command."""

import os
import subprocess
import sys

import pytest

from sid_fast.errors import LINE
from sid_fast.io.streams import clean
from tests.helpers.processes import ENV, python_without_stdout


def speaker(path) -> str:
    """A command that prints by print, click and tqdm, and then writes a file."""
    return f"""
import os, click
from tqdm import tqdm
from sid_fast import cli
from sid_fast.io.streams import say

@click.command()
def command():
    for _ in range(500):
        print("mean ± std")
        click.echo("σ = 2.5")
        say("\\udcff of a file name")
        tqdm.write("a … z")
    with open({str(path)!r}, "w") as file:
        try:
            os.write(1, b"native")
        except OSError:
            pass
        file.write("results")

cli.main(command, "x")
"""


@pytest.mark.parametrize("stdout", ["closed", "reader gone", "full"])
def test_output_that_cannot_be_written_is_lost_and_nothing_else(tmp_path, stdout):
    done = python_without_stdout(stdout, "-c", speaker(tmp_path / "results"))
    assert done.returncode == 0, done.stderr
    lost = "warning: some output was lost: No space left on device\n"
    assert done.stderr == (lost if stdout == "full" else "")
    # With stdout closed, the next file would get its number, and native output with it.
    assert (tmp_path / "results").read_text() == "results"


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", "mean ? std"),
        ("latin-1", "mean ± std"),
        ("utf-8", "mean ± std"),
    ],
)
def test_characters_that_stdout_lacks_are_replaced(tmp_path, encoding, shown):
    done = subprocess.run(
        [sys.executable, "-c", speaker(tmp_path / "results")],
        env=ENV | {"PYTHONIOENCODING": encoding},
        capture_output=True,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    text = done.stdout.decode(encoding, "replace")  # click writes UTF-8 where it finds ASCII
    assert text.splitlines()[0] == shown
    assert text.count(" of a file name") == 500


def test_a_full_pipe_of_a_non_blocking_reader_is_waited_for(tmp_path):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    command = [sys.executable, "-c", speaker(tmp_path / "results").replace("500", "5000")]
    process = subprocess.Popen(command, env=ENV, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    with open(reader, encoding="utf-8", errors="replace") as pipe:
        lines = pipe.read().splitlines()
    assert process.wait(300) == 0, process.stderr.read()
    assert sum(line == "mean ± std" for line in lines) == 5000
    process.stderr.close()


def test_text_from_files_is_cleaned_and_cut_but_keeps_its_columns():
    assert clean("a   b\n\x1b[31mred\x07\t") == "a   b\n\ufffd[31mred\ufffd\ufffd"
    cut = clean("start" + "x" * 10_000_000 + "end")
    assert len(cut) <= LINE
    assert cut.startswith("start")
    assert cut.endswith("end")

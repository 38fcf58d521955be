"""What all commands share: --help, and how they end after a lost process."""

import dataclasses
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from sid_fast import cli, evaluate, export, generate, plan, pretrain, train

ABANDONED = """
import threading, time, click
from sid_fast import cli
from sid_fast.performance import failure
from sid_fast.errors import RunFailed

@click.command()
def command():
    threading.Thread(target=time.sleep, args=(3600,)).start()
    print("a line that does not fit")
    failure.unclean_exit = True
    raise RunFailed("process 1 was lost")

cli.main(command, "x")
"""


def test_after_a_lost_process_the_command_exits_at_once():
    """It waits neither for a thread, which may wait for that process, nor for a full disk."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", ABANDONED],
            stdout=full, stderr=subprocess.PIPE, env=env, timeout=60,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, b"error: process 1 was lost\n")


@pytest.mark.parametrize(
    ("module", "config"),
    [
        (train, train.TrainConfig),
        (generate, generate.GenerateConfig),
        (evaluate, evaluate.EvaluateConfig),
        (pretrain, pretrain.PretrainConfig),
        (plan, plan.PlanConfig),
        (export, export.ExportConfig),
    ],
)
def test_help_explains_every_option(module, config):
    text = CliRunner().invoke(module.main, ["--help"]).output
    for field in dataclasses.fields(config):
        assert f"--{field.name.strip('_').replace('_', '-')} " in text
    preset = CliRunner().invoke(train.main, ["--preset", "ffhq64", "--help"]).output
    preset = " ".join(preset.split())
    assert "[default: 0.9]" in preset, "--help does not show the preset's own defaults"


def test_changed_options_are_those_that_differ_from_the_preset():
    values = cli.presets("train")["digits-sida"]
    config = train.TrainConfig(**values, preset="digits-sida")
    assert cli.changed_options(config, "train") == {}
    config.kimg, config.seed = 2.0, 5
    assert cli.changed_options(config, "train") == {"kimg": 24, "seed": 0}
    config = pretrain.PretrainConfig(preset=None, channel_mult=(1, 2))
    assert cli.changed_options(config, "pretrain") == {"channel_mult": (2, 2, 2)}
    values = {k: tuple(v) if isinstance(v, list) else v
              for k, v in cli.presets("pretrain")["digits"].items()}  # fmt: skip
    config = pretrain.PretrainConfig(**values, preset="digits")
    assert cli.changed_options(config, "pretrain") == {}  # with the lists of its preset

"""--log-to wandb, with a stand-in for Weights & Biases, and with the real one where it is."""

import importlib.util
import json
import sys
import threading
import types

import pytest

from sid_fast.models.registry import save_network
from sid_fast.training import loop, sinks
from tests.helpers.networks import small_teacher

STAND_IN = """
import json, os

class Settings:
    def __init__(self, **values):
        assert values["silent"] and values["console"] == "off"
        assert values["init_timeout"] == values["login_timeout"] == 60

class Run:
    def __init__(self, given):
        self.file = open(os.environ["STAND_IN_LOG"], "a")
        self.tell(given)

    def tell(self, record):
        if os.environ.get("STAND_IN_FAILS") in record:
            raise ConnectionError("the network\\nis down")
        print(json.dumps(record), file=self.file, flush=True)

    def define_metric(self, name, step_metric=None):
        self.tell({"metric": name, "step": step_metric})

    def log(self, values):
        self.tell({"log": values})

    def finish(self):
        self.tell({"finish": True})

def init(settings, config, **given):
    return Run({"init": given, "batch_size": config["batch_size"]})
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """The file that a stand-in for wandb writes what it is given to."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "wandb.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    for name in ("WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("STAND_IN_LOG", str(tmp_path / "stand-in.jsonl"))
    yield tmp_path / "stand-in.jsonl"
    sys.modules.pop("wandb", None)


def train(run_command, folder, *more):
    save_network(folder / "teacher.safetensors", small_teacher())
    return run_command(
        "train", "--teacher", folder / "teacher.safetensors", "--out", folder / "run",
        "--batch-size", 4, "--kimg", 0.012, "--log-every", 1, *more,
    )  # fmt: skip


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_wandb_gets_what_the_log_gets_and_resuming_continues_its_run(
    tmp_path, run_command, stand_in
):
    status, error = train(run_command, tmp_path, "--log-to", "wandb")
    assert status == 0, error
    sent = records(stand_in)
    assert sent[0]["init"]["project"] == "sid_fast"
    assert sent[0]["init"]["name"] == "run"
    assert sent[0]["init"]["dir"] == str(tmp_path / "run")
    assert sent[0]["init"]["resume"] == "allow"
    assert sent[0]["batch_size"] == 4
    assert {"metric": "*", "step": "images"} in sent
    assert sent[-1] == {"finish": True}
    assert [r["log"] for r in sent if "log" in r] == records(tmp_path / "run" / "log.jsonl")
    assert any((tmp_path / "run" / "tensorboard").iterdir())
    status, error = run_command(
        "train", "--resume", tmp_path / "run", "--kimg", 0.016, "--log-to", "wandb"
    )
    assert status == 0, error
    first, second = (r["init"] for r in records(stand_in) if "init" in r)
    assert first == second, "the same id"


def test_the_environment_names_the_project_and_the_run(tmp_path, stand_in, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "faces")
    monkeypatch.setenv("WANDB_NAME", "first try")
    (sink,) = sinks.open_sinks("wandb", tmp_path, {"batch_size": 4})
    sink.close()
    init = records(stand_in)[0]["init"]
    assert (init["project"], init["name"]) == ("faces", "first try")


def test_nothing_is_sent_unless_it_is_asked_for(tmp_path, stand_in):
    assert sinks.open_sinks("tensorboard", tmp_path, {}) == []
    assert not stand_in.exists()


@pytest.mark.parametrize(
    ("attributes", "told"),
    [
        ({"url": "https://wandb.ai/x"}, "Weights & Biases: https://wandb.ai/x\n"),
        (
            {"url": "none", "offline": True, "dir": "a run/wandb/offline-run-1/files"},
            "Weights & Biases is offline; later: wandb sync 'a run/wandb/offline-run-1'\n",
        ),
    ],
)
def test_it_says_where_the_curves_are(tmp_path, monkeypatch, capsys, attributes, told):
    run = types.SimpleNamespace(**attributes)
    monkeypatch.setattr(sinks.Wandb, "_open", lambda *arguments: run)
    sinks.Wandb(tmp_path, {})
    assert capsys.readouterr().out == told


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_failure_of_wandb_is_a_warning(tmp_path, run_command, stand_in, monkeypatch, fails):
    monkeypatch.setenv("STAND_IN_FAILS", fails)
    status, error = train(run_command, tmp_path, "--log-to", "wandb")
    assert status == 0
    warning = "warning: Weights & Biases failed (the network is down): "
    assert [line.startswith(warning) for line in error.splitlines()].count(True) == 1, error
    assert len(records(tmp_path / "run" / "log.jsonl")) == 3


def test_the_last_upload_has_to_fit_into_max_hours(tmp_path, run_command, stand_in, monkeypatch):
    ends = []
    monkeypatch.setattr(loop.Loop, "run", lambda self, _: ends.append(self.limit.end))
    for name in ("tensorboard", "wandb"):
        assert train(run_command, tmp_path, "--log-to", name, "--max-hours", 1)[0] == 0
    assert ends[0] - ends[1] == pytest.approx(sinks.FINISH_SECONDS)


def test_an_upload_without_end_does_not_hold_the_run(tmp_path, stand_in, monkeypatch, capsys):
    monkeypatch.setattr(sinks, "FINISH_SECONDS", 0.01)
    sink = sinks.Wandb(tmp_path, {"batch_size": 4})
    sink.run.finish = lambda: importlib.import_module("time").sleep(5)
    sink.close()
    assert "no end of the upload in 0.01 s" in capsys.readouterr().err
    others = set(threading.enumerate()) - {threading.main_thread()}
    assert all(thread.daemon for thread in others), "one that is not would keep the process alive"


@pytest.mark.slow
def test_a_resumed_run_does_not_send_anything_that_the_command_line_does_not_ask_for(
    tmp_path, run_command, stand_in
):
    assert train(run_command, tmp_path, "--log-to", "wandb")[0] == 0
    stand_in.unlink()
    (state,) = (tmp_path / "run").glob("state-*/state.json")
    header = json.loads(state.read_text())
    assert not {"log_to", "max_hours", "profile"} & header["options"].keys()
    header["options"]["log_to"] = "wandb"  # a state made by someone else
    state.write_text(json.dumps(header))
    assert run_command("train", "--resume", tmp_path / "run", "--kimg", 0.016)[0] == 0
    assert not stand_in.exists()


def test_without_wandb_the_command_says_how_to_install_it(tmp_path, run_command, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    status, error = train(run_command, tmp_path, "--log-to", "wandb")
    assert status == 2
    assert error == (
        "error: log_to=wandb needs Weights & Biases: pip install wandb, or leave out --log-to\n"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("known", ["../../etc", "0123456789abcdef/../x"])
def test_an_id_that_is_not_one_is_replaced(tmp_path, known):
    (tmp_path / sinks.ID_FILE).write_text(known)
    made = sinks._run_id(tmp_path)
    assert len(made) == 16
    assert sinks._run_id(tmp_path) == made


@pytest.mark.slow
def test_the_real_wandb_offline(tmp_path, run_command, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    status, error = train(run_command, tmp_path, "--log-to", "wandb")
    assert status == 0, error
    assert "warning" not in error
    (written,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    assert written.stat().st_size > 1000

"""The pretrain command: bad input is one line, exit status 2 and nothing half-written."""

import pytest


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--data"]),
        (["--data", "none.zip"], ["none.zip"]),
        (["--data", "digits", "--channel-mult", "1,x"], ["1,x"]),
        (["--data", "digits", "--channel-mult", "1,2,2,2,2"], ["resolution=8"]),
        (["--data", "digits", "--model-channels", "36"], ["model_channels", "144"]),
    ],
)
def test_pretrain_refuses(run_command, monkeypatch, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    status, error = run_command("pretrain", *arguments)
    assert status == 2
    assert error.strip().count("\n") == 0
    for word in words:
        assert word in error
    assert not list(tmp_path.iterdir())

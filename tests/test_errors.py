"""Messages: one printable line of bounded length."""

import pytest

from sid_fast.errors import LINE, RunFailed, UserError, WriteFailed, one_line


@pytest.mark.parametrize("kind", [UserError, WriteFailed, RunFailed])
def test_a_message_is_one_printable_line(kind):
    text = str(kind("a\x1b[31mb\r\n\u202ec\x07\udcff\td  e"))
    assert text == "a\ufffd[31mb \ufffdc\ufffd\ufffd d e"
    assert text.isprintable()


def test_a_long_message_keeps_its_start_and_its_end():
    for length in (10**4, 10**7):
        text = one_line(f"net.pkl names {'x' * length}: get another")
        assert len(text) == LINE
        assert text.startswith("net.pkl names x")
        assert text.endswith("x: get another")
    assert one_line("x" * LINE) == "x" * LINE


def test_the_password_of_a_url_is_left_out():
    for text in ("https://me:secret@host/a@b", "s3://me:secret@host", "-- https://secret@h?q=@"):
        assert "secret" not in one_line(text)
    assert one_line("https://me:secret@host/a@b") == "https://host/a@b"
    assert one_line("mail a@b, https://h/?q=a@b") == "mail a@b, https://h/?q=a@b"

"""How a command ends: one line for what the user or the machine did, a traceback for our faults."""

import pytest

from ksa_mlx.errors import KSAError, exit_status


@pytest.mark.parametrize(
    "error, status, said",
    [
        (None, 0, ""),
        (KSAError("--x: found 1, expected 2"), 1, "error: --x: found 1, expected 2\n"),
        (OSError(28, "No space left", "/a/b"), 1, "error: /a/b: No space left\n"),
        (OSError("the Hub hung up"), 1, "error: the Hub hung up\n"),
        (RuntimeError("[malloc] too\n much"), 1, "error: [malloc] too much\n"),
        (MemoryError(), 1, "error: MemoryError\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
    ],
    ids=repr,
)
def test_exit_status(error, status, said, capsys):
    def command():
        if error:
            raise error

    assert exit_status(command, "stopped") == status
    assert capsys.readouterr() == ("", said)


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(TypeError):
        exit_status(lambda: len(3), "stopped")


def test_an_error_without_a_file_is_about_what_was_asked_for(capsys):
    def command():
        raise OSError(28, "No space left")

    assert exit_status(command, "stopped", where="out") == 1
    assert capsys.readouterr().err == "error: out: No space left\n"

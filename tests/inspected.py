"""``python -m pera_kernels inspect`` as tests run it."""

import json

import pytest

from pera_kernels.__main__ import main


def run(*arguments):
    return main(["inspect", *map(str, arguments)])


def inspected(capsys, *arguments):
    assert run(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def printed(capsys, *arguments):
    assert run(*arguments) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(lines) == 1
    return lines[0]

"""The command line as the tests call it, in this process or in one of its own, and what they say of a run."""

import csv
import os
import subprocess
import sys

from typer.testing import CliRunner

from fastnca.cli import app


def fastnca_cli(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def grow(note, out, *options):
    return fastnca_cli("grow", note, "-o", out, "--vocoder", "griffinlim", *options)


def read_losses(out):
    with open(out / "losses.csv", newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def assert_same_run(one, other):
    for name in ("model.safetensors", "generated.wav"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert read_losses(one) == read_losses(other)


def assert_rejected(result, words):
    """One line on stderr that has these words, and exit code 2."""
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if "using the first" not in line]
    assert lines[-1].startswith("fastnca: ") and words in lines[-1], result.stderr
    assert "Traceback" not in result.stderr


def start(*arguments, **surroundings):
    command = [sys.executable, "-m", "fastnca.cli", *map(str, arguments)]
    surroundings = {**os.environ, "CI": "true", **surroundings}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=surroundings)

"""kill -9 at random moments of `fastnca grow`: what goes on from them must equal a run that nothing interrupted. And of
`fastnca studio`: every sound and every take in its folder must open again.

    python tests/kill.py grow|studio [how many moments, 100 if not given] [seed of the moments, 0 if not given]

Not collected by pytest. A run is killed at a moment of the time that a whole one takes, goes on by --resume, or starts
again where it has no checkpoint yet, and is killed again, until it ends before its moment. Prints what the folders held
at the moments, and fails at the first that cannot be gone on from. The processes are forks of this one, which spares
them the imports; nothing is written before those are done.
"""

import collections
import http.client
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import soundfile
import torch
from commands import assert_same_run, fastnca_cli, read_losses
from PIL import Image

import fastnca
from fastnca import cli
from fastnca.growth import Checkpoint
from fastnca.run import CHECKPOINT_FILE, LOSSES_FILE, MODEL_FILE
from fastnca.sound.files import write_wav
from fastnca.sound.synthetic import synthesize_bowed_string
from fastnca.training.recipes import RECIPES

EPOCHS = 12
SECONDS = 0.09  # of sound
TIMES = ("training_seconds", "seconds_per_epoch")  # of metrics.json, which differ from run to run


def fork(command, log, killed_after=None):
    """`fastnca` with these arguments in a process of its own -> its exit code, None where it was killed."""
    process = os.fork()
    if process == 0:
        code = 70
        try:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
            sys.argv = ["fastnca", *map(str, command)]
            code = cli.main() or 0
        except SystemExit as end:
            code = end.code or 0
        finally:
            os._exit(code)
    if killed_after is not None:
        time.sleep(killed_after)
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    return None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def read_file(path):
    """What a file of a run holds. Raises where it is damaged, or of a kind that a run does not write."""
    if path.name == CHECKPOINT_FILE:
        return Checkpoint.load(path)
    if path.name == MODEL_FILE:
        return fastnca.load(path)
    if path.suffix == ".wav":
        return soundfile.read(path)
    if path.suffix == ".json":
        return json.loads(path.read_text())
    if path.suffix == ".csv":
        return read_losses(path.parent)
    with Image.open(path) as picture:
        return picture.load()


def held(run):
    """What a folder holds, in words. Every file in it is read, but for hidden ones: the lock and partial files."""
    if not run.exists():
        return "no folder"
    files = [path for path in run.rglob("*") if path.is_file()]
    content = {path.name: read_file(path) for path in files if not path.name.startswith(".")}
    beside = ", and a partial file" if any(path.suffix == ".partial" for path in files) else ""
    if CHECKPOINT_FILE not in content:
        return "no checkpoint" + beside
    epoch = content[CHECKPOINT_FILE].numbers["epoch"]
    if "final.png" in content:
        return "all results" + beside
    if "generated.wav" in content:
        return "some results" + beside
    if epoch == EPOCHS:
        return "the last checkpoint" + beside
    if len(content.get(LOSSES_FILE, ())) > epoch:
        return "a checkpoint, and losses after it" + beside
    return ("a checkpoint" if epoch else "the first checkpoint") + beside


def assert_equal(run, whole):
    held(run)
    names = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) for folder in (run, whole)]
    assert names[0] == names[1], names  # hidden ones too
    assert_same_run(run, whole)
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (run, whole)]
    for name in TIMES:
        for numbers in metrics:
            del numbers[name]
    assert metrics[0] == metrics[1], metrics


def studio(count, seed):
    """A studio is killed while somebody uploads sounds and keeps takes; then all that its folder lists must open."""
    from test_studio import ask, running_studio

    from fastnca.studio.session import Studio

    def post(address, name, body):
        urllib.request.urlopen(urllib.request.Request(f"{address}api/{name}", body), timeout=60).read()

    def work(address, recording, number):
        """What somebody does until the server is gone."""
        try:
            post(address, f"recording?name=sound{number}.wav", recording)
            while True:
                ask(address, "state")
                post(address, "take", b'{"action": "keep"}')
        except (OSError, http.client.HTTPException):
            pass

    moments, opened = random.Random(seed), collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_wav(folder / "note.wav", synthesize_bowed_string(SECONDS))
        for number in range(count):
            with running_studio(folder / "studio", "--vocoder", "griffinlim") as (process, address):
                busy = threading.Thread(target=work, args=(address, (folder / "note.wav").read_bytes(), number))
                busy.start()
                time.sleep(moments.uniform(0, 15))
                process.kill()
                busy.join()
            again = Studio(folder / "studio", vocoder="griffinlim")
            for sound in again.sounds():
                again.open(sound["name"])
                takes = list((folder / "studio" / sound["name"] / "takes").glob("*.safetensors"))
                assert len(again.takes()) == len(takes), takes
                opened["sounds"] += 1
                opened["takes"] += len(takes)
            again.close()
    print(f"{count} kills; all {opened['sounds']} sounds and {opened['takes']} takes that were there opened again")


def grow_runs(count, seed):
    torch.set_num_threads(1)
    # Three pictures of the progress, so that they are among what is interrupted.
    RECIPES["default"] = replace(RECIPES["default"], picture_every_epochs=EPOCHS // 3)
    moments, outcomes, runs = random.Random(seed), collections.Counter(), 0
    with tempfile.TemporaryDirectory() as folder, open(os.path.join(folder, "log"), "w+") as log:
        folder = Path(folder)
        write_wav(folder / "note.wav", synthesize_bowed_string(SECONDS))

        def command(run):
            options = "--epochs", EPOCHS, "--checkpoint-every-epochs", 1, "--vocoder", "griffinlim"
            return "grow", folder / "note.wav", "-o", run, *options

        def grow(run, killed_after=None):
            resume = ["--resume"] if (run / CHECKPOINT_FILE).exists() else []
            log.truncate(0)
            code = fork([*command(run), *resume], log, killed_after)
            log.seek(0)
            assert code in (0, None), log.read()
            return code

        assert fastnca_cli(*command(folder / "whole")).exit_code == 0  # here, so that the forks find all imported
        start = time.monotonic()
        grow(folder / "again")
        duration = time.monotonic() - start
        assert_equal(folder / "again", folder / "whole")
        while outcomes.total() < count:
            runs += 1
            run = folder / f"run{runs}"
            while outcomes.total() < count and grow(run, moments.uniform(0, duration)) is None:
                outcomes[held(run)] += 1
            grow(run)
            assert_equal(run, folder / "whole")
            shutil.rmtree(run)
    for what, number in sorted(outcomes.items()):
        print(f"{number} times {what}")
    print(f"{outcomes.total()} kills of {runs} runs, each of {duration:.1f} s; all went on to the same sound")


if __name__ == "__main__":
    given = [int(argument) for argument in sys.argv[2:]]
    {"grow": grow_runs, "studio": studio}[sys.argv[1]](*given, *(100, 0)[len(given) :])

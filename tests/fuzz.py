"""Damaged sound and model files by the thousand: each must be read or refused in one line.

    python tests/fuzz.py [how many inputs, 10000 if not given]

Not collected by pytest. Prints what became of the inputs, and fails with the smallest input that does something else.
"""

import collections
import os
import sys
import tempfile
import warnings

import numpy as np
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastnca
from fastnca.sound.convention import SAMPLE_RATE
from fastnca.sound.files import load_audio

HEADER = 128  # bytes at the start of a file in which most of the damage is done


def whole_files(folder):
    """{path: (content, how it is read)}"""
    sound = 0.3 * np.sin(np.arange(4000) / 9)
    files = {}
    for name in ("a.wav", "a.flac"):
        soundfile.write(os.path.join(folder, name), sound, SAMPLE_RATE)
        files[name] = lambda path: load_audio(path, 0.1)
    model = fastnca.DualSpecTNCA(n_mels=3, n_linear=5)
    fastnca.save_model(os.path.join(folder, "a.safetensors"), model)
    files["a.safetensors"] = fastnca.load_model
    contents = {}
    for name, read in files.items():
        path = os.path.join(folder, name)
        with open(path, "rb") as file:
            contents[path] = file.read(), read
    return contents


def main(count):
    with tempfile.TemporaryDirectory() as folder:
        files = whole_files(folder)
        outcomes = collections.Counter()
        place = st.one_of(st.integers(0, HEADER), st.integers(0, 2**16))
        word = st.one_of(st.binary(max_size=8), st.sampled_from([bytes(4), b"\xff" * 4, b"\xff\xff\xff\x7f"]))
        edits = st.lists(st.tuples(place, word, st.booleans()), min_size=1, max_size=4)

        @settings(max_examples=-(-count // len(files)), deadline=None, database=None, suppress_health_check=HealthCheck)
        @given(edits=edits, cut=st.one_of(st.none(), place))
        def damage(path, edits, cut):
            content, read = files[path]
            content = bytearray(content)
            for start, new, inserted in edits:
                content[start : start + (0 if inserted else len(new))] = new
            with open(path, "wb") as file:
                file.write(content[:cut])
            try:
                read(path)
                outcome = "read"
            except ValueError as error:
                assert "\n" not in str(error), str(error)
                outcome = "refused"
            outcomes[os.path.basename(path), outcome] += 1

        for path in files:
            damage(path)
    for (name, outcome), number in sorted(outcomes.items()):
        print(f"{name}: {number} {outcome}")
    print(f"{sum(outcomes.values())} inputs")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)

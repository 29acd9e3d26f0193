"""A MIDI file played by a learned sound."""

import math
import warnings
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .run import check_output
from .sound.convention import HOP_LENGTH, SAMPLE_RATE, within_full_scale
from .sound.files import check_wav_name, write_wav
from .sound.pitch import PITCH_RANGE
from .sound_model import LATTICE, LATTICE_STEPS, find_model_file, load
from .space import Space

DRUMS = 9  # the channel whose notes are no pitches, the tenth for people
SUSTAIN, ALL_SOUND_OFF, ALL_NOTES_OFF = 64, 120, 123  # controllers
MAX_SECONDS = 3600.0
RELEASE = SAMPLE_RATE // 12  # samples in which a note that is let go fades
LENGTHS = 8  # frames: notes that are held longer than the sound was grow at multiples of this
AMOUNTS = 16  # between two sounds, on the way from the first note to the last


@dataclass(frozen=True)
class Note:
    """start, end: in seconds. number: of MIDI, 69 is A4. velocity: from 1 to 127."""

    start: float
    end: float
    number: int
    velocity: int

    @property
    def pitch_hz(self):
        return 440.0 * 2.0 ** ((self.number - 69) / 12)

    @property
    def gain(self):
        """40 log10(velocity / 127) dB, as the recommended practice of General MIDI 2 has it."""
        return (self.velocity / 127) ** 2


def read_notes(path):
    """The notes of a MIDI file, of all tracks and channels but that of drums, by their starts -> [Note].

    The sustain pedal holds notes. Raises FileNotFoundError, and ValueError for a file that cannot be read, that has no
    notes or that is longer than an hour.
    """
    from mido import MidiFile

    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}")
    notes, held, pedals, let_go = [], {}, set(), set()

    def end(key):
        start, velocity = held.pop(key)
        let_go.discard(key)
        if now > start:
            notes.append(Note(start, now, key[1], velocity))

    now = 0.0
    try:
        for message in MidiFile(path, clip=True):
            now += message.time
            if now > MAX_SECONDS:
                raise ValueError(f"it is longer than {MAX_SECONDS / 60:g} minutes")
            if message.type in ("note_on", "note_off") and message.channel != DRUMS:
                key = message.channel, message.note
                if message.type == "note_on" and message.velocity:
                    if key in held:
                        end(key)
                    held[key] = now, message.velocity
                elif key in held and message.channel in pedals:
                    let_go.add(key)
                elif key in held:
                    end(key)
            elif message.type == "control_change":
                channel = message.channel
                if message.control == SUSTAIN and message.value >= 64:
                    pedals.add(channel)
                elif message.control == SUSTAIN:
                    pedals.discard(channel)
                    for key in [key for key in let_go if key[0] == channel]:
                        end(key)
                elif message.control in (ALL_SOUND_OFF, ALL_NOTES_OFF):
                    for key in [key for key in held if key[0] == channel]:
                        end(key)
    except (OSError, EOFError, ValueError, TypeError, KeyError, IndexError, ArithmeticError) as error:
        raise ValueError(f"{path} is no MIDI file that can be played: {error or type(error).__name__}") from error
    for key in list(held):
        end(key)
    if not notes:
        raise ValueError(f"{path} has no notes, or only those of drums, channel {DRUMS + 1}")
    return sorted(notes, key=lambda note: (note.start, note.number))


def play(path, midi, out=None, *, sound=None, to=None, vocoder=None, bigvgan=None, backend="auto", on_note=None):
    """Play a MIDI file by a learned sound -> (path of the wav, samples [n] at 22.05 kHz, number of notes).

    Each note is grown at its pitch, and in a space from the notes of the instrument next to it, see ``Space.mix``. A
    note that is held longer than the sound lasts holds its middle; one that is let go earlier fades. Velocity is level.
    Any number of notes sound at once. What would clip is made quieter as a whole.

    Args:
        path: the folder that ``fastnca grow`` or ``learn`` wrote, or the model file in it. sound: of a space, which.
        midi: the file. out: by default named after it, beside the model file.
        to: of a space, another sound: the piece begins with ``sound`` and ends with this one.
        vocoder, bigvgan, backend: see :func:`fastnca.load`.
        on_note: called with (notes grown, notes to grow): equal notes grow once.

    Raises ValueError, OSError for bad input, RuntimeError for a backend that cannot run here. Warns of notes whose
    pitch lies beyond what can be grown.
    """
    file = find_model_file(path)
    notes = read_notes(midi)
    playable = [note for note in notes if PITCH_RANGE[0] <= note.pitch_hz <= PITCH_RANGE[1]]
    if not playable:
        raise ValueError(f"all notes of {midi} lie beyond {PITCH_RANGE[0]:g} to {PITCH_RANGE[1]:g} Hz")
    if len(playable) < len(notes):
        warnings.warn(f"{len(notes) - len(playable)} notes lie beyond what can be grown: left out", stacklevel=2)
    model_at = _instrument(path, load(file, backend=backend, vocoder=vocoder, bigvgan=bigvgan), sound, to)
    out = file.with_name(f"{Path(midi).stem}.wav") if out is None else Path(out)
    check_wav_name(out)
    check_output(out)

    last = playable[-1].start or 1.0
    alike = defaultdict(list)  # notes by what is grown for them
    for note in playable:
        amount = round(AMOUNTS * note.start / last) / AMOUNTS if to else 0.0
        natural = model_at(note.pitch_hz, amount).card.n_frames
        n_frames = math.ceil((note.end - note.start) * SAMPLE_RATE / HOP_LENGTH)
        if n_frames > natural:
            n_frames = math.ceil(n_frames / LENGTHS) * LENGTHS
        alike[note.pitch_hz, amount, max(natural, n_frames)].append(note)
    piece = np.zeros(math.ceil(max(note.end for note in playable) * SAMPLE_RATE) + RELEASE + 1)
    for done, ((pitch_hz, amount, n_frames), same) in enumerate(alike.items()):
        if on_note:
            on_note(done, len(alike))
        grown = model_at(pitch_hz, amount).grow(n_frames, LATTICE_STEPS, "sustain", pitch_hz, LATTICE)
        for note in same:
            played = _let_go(grown.samples / grown.gain, round((note.end - note.start) * SAMPLE_RATE))
            start = round(note.start * SAMPLE_RATE)
            piece[start : start + len(played)] += note.gain * played
    samples, _ = within_full_scale(piece.astype(np.float32))
    write_wav(out, samples)
    return out, samples, len(playable)


def _instrument(path, loaded, sound, to):
    """A function of (pitch in Hz, amount of the second sound) that gives the SoundModel to grow."""
    if isinstance(loaded, Space):
        if sound is None:
            raise ValueError(f"{path} holds many sounds, {', '.join(loaded)}: say which by --sound")
        models = {}

        def model_at(pitch_hz, amount):
            if (pitch_hz, amount) not in models:
                shares = {sound: 1.0 - amount, to: amount} if to not in (None, sound) else {sound: 1.0}
                models[pitch_hz, amount] = loaded.mix(shares, pitch_hz)
            return models[pitch_hz, amount]

        model_at(440.0, 0.5)  # raises for unknown names and sounds without pitch
        return model_at
    if (sound, to) != (None, None):
        raise ValueError(f"{path} holds one sound, which has no name: leave out --sound and --to")
    if loaded.automaton.places is None or loaded.automaton.places.pitch_hz is None:
        raise ValueError(
            f"the sound in {path} was learned without a pitch, so it cannot play notes; if it has one, learn it again "
            "with fastnca grow --pitch-of-recording"
        )
    return lambda pitch_hz, amount: loaded


def _let_go(samples, held):
    """The sound of a note that is let go after ``held`` samples."""
    samples = samples[: held + RELEASE].copy()
    fading = len(samples) - held
    if fading > 0:
        samples[held:] *= 0.5 + 0.5 * np.cos(np.pi * np.arange(fading) / RELEASE)
    return samples

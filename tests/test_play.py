"""MIDI files: what is read from them, and what is played."""

from types import SimpleNamespace

import mido
import numpy as np
import pytest
import soundfile
import torch
from commands import assert_rejected, fastnca_cli

from fastnca.context import Places
from fastnca.model import DualSpecTNCA
from fastnca.play import MAX_SECONDS, RELEASE, Note, play, read_notes
from fastnca.sound.convention import SAMPLE_RATE
from fastnca.sound.pitch import find_pitch
from fastnca.sound.spectrogram import Scale
from fastnca.sound.vocoder import resolve_vocoder
from fastnca.sound_model import SoundCard, SoundModel
from fastnca.space import Member, Space

BEAT = 480  # ticks; half a second at the tempo that a file without one has


def midi(path, *tracks, kind=1):
    """Writes tracks of (message type, channel, fields, ticks since the one before)."""
    file = mido.MidiFile(type=kind, ticks_per_beat=BEAT)
    for messages in tracks:
        file.tracks.append(mido.MidiTrack())
        for name, channel, fields, ticks in messages:
            file.tracks[-1].append(mido.Message(name, channel=channel, time=ticks, **fields))
    file.save(path)
    return path


def on(note, ticks=0, velocity=127, channel=0):
    return "note_on", channel, {"note": note, "velocity": velocity}, ticks


def off(note, ticks=BEAT, channel=0):
    return "note_off", channel, {"note": note}, ticks


def control(number, value, ticks=0, channel=0):
    return "control_change", channel, {"control": number, "value": value}, ticks


def card(n_frames=24, mel_ref_db=20.0):
    return SoundCard(Scale(mel_ref_db, mel_ref_db), n_frames, 4, "griffinlim", None, "default", 0)


@pytest.fixture
def rule():
    """An untrained rule whose levels say how loud the partials of the pitch are to be."""
    torch.manual_seed(0)
    return DualSpecTNCA(context=Places(code_size=2, pitch_hz=220.0), growth=True)


@pytest.fixture
def space(rule):
    """An instrument with notes of A3 and A4, another one with A3, and a drum."""
    one, other = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    members = {
        "one_a3": Member(one, card(24, 10.0), 220.0),
        "one_a4": Member(one.clone(), card(16, 22.0), 440.0),
        "other_a3": Member(other, card(), 220.0),
        "drum": Member(torch.zeros(2), card(), None),
    }
    return Space(rule, members, resolve_vocoder("griffinlim"))


class TestNotes:
    def test_notes_of_all_tracks_by_their_starts(self, tmp_path):
        second = [on(48, BEAT // 2, 64, 1), off(48, BEAT, 1)]
        path = midi(tmp_path / "a.mid", [on(60), off(60), on(64), off(64)], second)
        assert read_notes(path) == [Note(0.0, 0.5, 60, 127), Note(0.25, 0.75, 48, 64), Note(0.5, 1.0, 64, 127)]

    def test_tempo(self, tmp_path):
        path = midi(tmp_path / "a.mid", [on(60), off(60)])
        file = mido.MidiFile(path)
        file.tracks[0].insert(0, mido.MetaMessage("set_tempo", tempo=1_000_000))
        file.save(path)
        assert read_notes(path) == [Note(0.0, 1.0, 60, 127)]

    def test_a_note_on_without_velocity_is_its_end(self, tmp_path):
        assert read_notes(midi(tmp_path / "a.mid", [on(60), on(60, BEAT, 0)])) == [Note(0.0, 0.5, 60, 127)]

    def test_the_same_note_again_ends_the_first(self, tmp_path):
        notes = read_notes(midi(tmp_path / "a.mid", [on(60), on(60, BEAT), off(60)]))
        assert notes == [Note(0.0, 0.5, 60, 127), Note(0.5, 1.0, 60, 127)]

    def test_the_pedal_holds_notes_of_its_channel(self, tmp_path):
        pedal = [control(64, 127), on(60), off(60), on(64), control(64, 0, BEAT), off(64)]
        notes = read_notes(midi(tmp_path / "a.mid", pedal, [on(48, channel=1), off(48, channel=1)]))
        assert notes == [Note(0.0, 0.5, 48, 127), Note(0.0, 1.0, 60, 127), Note(0.5, 1.5, 64, 127)]

    @pytest.mark.parametrize("ending", [control(123, 0, BEAT), control(7, 100, BEAT)])
    def test_what_never_ends_ends_with_the_file(self, tmp_path, ending):
        assert read_notes(midi(tmp_path / "a.mid", [on(60), ending])) == [Note(0.0, 0.5, 60, 127)]

    def test_drums_are_left_out(self, tmp_path):
        notes = read_notes(midi(tmp_path / "a.mid", [on(60), on(36, 0, 127, 9), off(60), off(36, channel=9)]))
        assert [note.number for note in notes] == [60]
        with pytest.raises(ValueError, match="has no notes, or only those of drums"):
            read_notes(midi(tmp_path / "b.mid", [on(36, 0, 127, 9), off(36, channel=9)]))

    def test_what_cannot_be_read(self, tmp_path):
        path = midi(tmp_path / "a.mid", [on(60), off(60)])
        whole = path.read_bytes()
        for name, data in (("empty", b""), ("text", b"no music"), ("cut", whole[:-9]), ("header", whole[:16])):
            broken = tmp_path / f"{name}.mid"
            broken.write_bytes(data)
            with pytest.raises(ValueError, match=f"{name}.mid (is no MIDI file|has no notes)"):
                read_notes(broken)
        with pytest.raises(ValueError, match="is no MIDI file that can be played: can't merge"):
            read_notes(midi(tmp_path / "b.mid", [on(60), off(60)], kind=2))
        with pytest.raises(FileNotFoundError, match="no such file"):
            read_notes(tmp_path / "none.mid")
        long = midi(tmp_path / "long.mid", [on(60), off(60, int(MAX_SECONDS * 2 * BEAT) + BEAT)])
        with pytest.raises(ValueError, match="longer than 60 minutes"):
            read_notes(long)

    def test_pitch_and_level(self):
        assert Note(0, 1, 69, 127).pitch_hz == 440.0 and Note(0, 1, 57, 127).pitch_hz == 220.0
        assert Note(0, 1, 69, 64).gain == pytest.approx(10 ** (40 * np.log10(64 / 127) / 20))


class TestAtPitch:
    def test_a_note_between_two_of_its_instrument(self, space):
        between = space.between({"one_a4": 1.0}, 220.0 * 2**0.25)
        assert between.pitch_hz == 220.0 * 2**0.25 and between.card.n_frames == 22
        assert between.card.scale.mel_ref_db == pytest.approx(13.0)
        torch.testing.assert_close(between.code, torch.tensor([1.0, 0.0]))

    @pytest.mark.parametrize(("hertz", "frames"), [(110.0, 24), (220.0, 24), (440.0, 16), (880.0, 16)])
    def test_its_own_notes_and_what_lies_beyond_them(self, space, hertz, frames):
        found = space.between({"one_a3": 1.0}, hertz)
        assert (found.pitch_hz, found.card.n_frames) == (hertz, frames)

    def test_a_mixture(self, space):
        mixed = space.between({"one_a3": 0.25, "other_a3": 0.75}, 440.0)
        torch.testing.assert_close(mixed.code, torch.tensor([0.25, 0.75]))
        assert mixed.card.n_frames == 22 and mixed.pitch_hz == 440.0 and mixed.tonality == 1.0
        assert space.between({"one_a3": 0.5, "drum": 0.5}, 440.0).tonality == 0.5

    def test_what_has_no_pitch(self, space):
        with pytest.raises(ValueError, match="of drum none was learned with a pitch"):
            space.mix({"drum": 1.0}, 440.0)
        with pytest.raises(ValueError, match="a pitch must be a positive number"):
            space.mix({"one_a3": 1.0}, -440.0)


@pytest.fixture
def grown(monkeypatch):
    """Sines grow in place of sounds: [(pitch, frames)] of those that have grown."""
    grown = []

    def grow(model, n_frames, num_steps, time, pitch_hz, at):
        grown.append((pitch_hz, n_frames))
        tone = 0.25 * np.sin(2 * np.pi * pitch_hz * np.arange(256 * n_frames) / SAMPLE_RATE, dtype=np.float32)
        return SimpleNamespace(samples=tone, gain=0.5)

    monkeypatch.setattr(SoundModel, "grow", grow)
    return grown


class TestPlay:
    def test_what_is_played(self, tmp_path, space, grown):
        """Each different note grows once; starts, ends, levels and polyphony are those of the file."""
        space.save(tmp_path / "space.safetensors")
        path = midi(
            tmp_path / "piece.mid",
            [on(69), off(69, BEAT // 8), on(69, BEAT, 64), off(69, BEAT // 8)],
            [on(57), off(57, 2 * BEAT)],
        )
        out, samples, count = play(tmp_path, path, sound="one_a3")
        assert out == tmp_path / "piece.wav" and count == 3
        assert sorted(grown) == [(220.0, 88), (440.0, 16)]  # the longer one at a multiple of 8 frames
        np.testing.assert_allclose(soundfile.read(out)[0], samples, atol=1e-6)

        def note(hertz, start, held, gain):
            age = np.arange(len(samples)) - round(start * SAMPLE_RATE)
            envelope = np.clip(0.5 + 0.5 * np.cos(np.pi * np.clip((age - held) / RELEASE, 0, 1)), 0, 1) * (age >= 0)
            return gain * 0.5 * np.sin(2 * np.pi * hertz * age / SAMPLE_RATE) * envelope

        expected = note(220.0, 0.0, SAMPLE_RATE, 1.0)
        expected[88 * 256 :] = 0.0
        expected += note(440.0, 0.0, round(SAMPLE_RATE / 16), 1.0)
        expected += note(440.0, 0.5625, round(SAMPLE_RATE / 16), (64 / 127) ** 2)
        np.testing.assert_allclose(samples, expected / max(1.0, abs(expected).max()), atol=1e-3)

    def test_from_one_sound_to_another(self, tmp_path, space, grown, monkeypatch):
        mixed = []
        monkeypatch.setattr(Space, "mix", lambda space, shares, hertz: mixed.append(shares) or space["one_a3"])
        space.save(tmp_path / "space.safetensors")
        path = midi(tmp_path / "a.mid", [on(69), off(69), on(69), off(69), on(69), off(69)])
        result = fastnca_cli("play", tmp_path, path, "--sound", "one_a3", "--to", "other_a3")
        assert result.exit_code == 0, result.output
        assert f"{tmp_path / 'a.wav'}: 3 notes, 1.6 s" in result.stdout
        assert {shares["other_a3"] for shares in mixed} == {0.0, 0.5, 1.0}

    def test_one_sound(self, tmp_path, rule):
        """A rule that was set by hand to the partials of its pitch is heard at the notes' pitches."""
        model = rule.with_code(torch.zeros(2), 220.0)
        for parameter in model.parameters():
            torch.nn.init.zeros_(parameter)
        with torch.no_grad():  # value += 0.05 (cosine of a place between partials) - 0.01, life += 1
            model.context.rows.weight[0, -3] = 1.0
            for layer in model.update_mlp[::2]:
                layer.weight[0, 0] = 1.0
            model.update_mlp[0].weight.zero_()
            model.update_mlp[-1].weight[0, 0] = 0.2
            model.update_mlp[-1].bias[:2] = torch.tensor([-0.05, 1.0])
        SoundModel(model, card(40, 30.0), None).save(tmp_path / "model.safetensors")
        for number, hertz in ((57, 220.0), (64, 329.63)):
            path = midi(tmp_path / f"{number}.mid", [on(number), off(number)])
            _, samples, _ = play(tmp_path, path)
            assert 1200 * abs(np.log2(find_pitch(samples[: SAMPLE_RATE // 2]) / hertz)) < 25

    def test_notes_beyond_what_can_grow_are_left_out(self, tmp_path, space, grown, monkeypatch):
        monkeypatch.setattr("fastnca.play.PITCH_RANGE", (10.0, 400.0))
        space.save(tmp_path / "space.safetensors")
        path = midi(tmp_path / "a.mid", [on(57), on(69), off(57), off(69)])
        with pytest.warns(UserWarning, match="1 notes lie beyond"):
            assert play(tmp_path, path, sound="one_a3")[2] == 1
        with pytest.raises(ValueError, match="all notes of .* lie beyond 10 to 400 Hz"):
            play(tmp_path, midi(tmp_path / "b.mid", [on(69), off(69)]), sound="one_a3")

    @pytest.mark.parametrize(
        ("words", "reason"),
        [
            ([], "holds many sounds, one_a3, one_a4, other_a3, drum: say which by --sound"),
            (["--sound", "x"], "there is no sound 'x'"),
            (["--sound", "one_a3", "--to", "x"], "there is no sound 'x'"),
            (["--sound", "drum"], "of drum none was learned with a pitch"),
            (["--sound", "one_a3", "-o", "x.mp3"], "wav"),
        ],
    )
    def test_what_is_refused(self, tmp_path, space, words, reason):
        space.save(tmp_path / "space.safetensors")
        path = midi(tmp_path / "a.mid", [on(57), off(57)])
        assert_rejected(fastnca_cli("play", tmp_path, path, *words), reason)

    def test_a_sound_without_pitch_or_name(self, tmp_path, rule):
        SoundModel(rule.with_code(torch.zeros(2)), card(), None).save(tmp_path / "model.safetensors")
        path = midi(tmp_path / "a.mid", [on(57), off(57)])
        assert_rejected(fastnca_cli("play", tmp_path, path), "was learned without a pitch, so it cannot play notes")
        assert_rejected(fastnca_cli("play", tmp_path, path, "--sound", "a"), "holds one sound, which has no name")
        assert_rejected(fastnca_cli("play", tmp_path, tmp_path / "model.safetensors"), "is no MIDI file")

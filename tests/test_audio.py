import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch

from fastnca.growth import Growth
from fastnca.settings import RunSettings
from fastnca.sound import spectrogram
from fastnca.sound.convention import DB_RANGE, SAMPLE_RATE, MelBands
from fastnca.sound.files import load_audio, write_wav
from fastnca.sound.spectrogram import DualSpectrogram, Scale, analyze, from_db
from fastnca.sound.synthetic import synthesize_bowed_string


def sine(seconds, rate=SAMPLE_RATE, frequency=440.0, level=0.5):
    return level * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)


@pytest.fixture(scope="module")
def note():
    return synthesize_bowed_string(1.0)


def test_import_is_cheap():
    heavy = "librosa bigvgan matplotlib soundfile scipy auraloss huggingface_hub triton"
    code = (
        "import sys, fastnca.sound.files, fastnca.sound.vocoder, fastnca.sound.metrics, fastnca.sound.pictures; "
        f"print([m for m in '{heavy}'.split() if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


# ---- reading


@pytest.mark.parametrize(
    ("name", "rate", "channels", "tolerance"),
    [
        ("a.wav", 22050, 1, 1e-4),
        ("a.wav", 48000, 2, 1e-3),
        ("a.flac", 44100, 6, 1e-3),
        ("a.ogg", 22050, 1, 0.03),
        ("a.mp3", 44100, 2, 0.03),
        ("a.aiff", 8000, 1, 1e-3),
    ],
)
def test_any_format_rate_and_channel_count_becomes_mono_22050(tmp_path, name, rate, channels, tolerance):
    gains = np.linspace(0.5, 1.5, channels) if channels > 1 else np.ones(1)  # mean 1
    soundfile.write(tmp_path / name, sine(1.2, rate)[:, None] * gains, rate)
    samples, info = load_audio(tmp_path / name, 1.0)
    assert samples.dtype == np.float32
    assert samples.shape == (11 * 2048,)
    assert (info.sample_rate, info.channels, info.gain) == (rate, channels, 1.0)
    difference = (samples - sine(1.2)[: len(samples)])[1000:-1000]
    assert np.abs(difference).max() < tolerance


def test_info_line(tmp_path):
    soundfile.write(tmp_path / "violin.wav", np.stack([sine(5.2, 48000)] * 2, axis=1), 48000)
    assert str(load_audio(tmp_path / "violin.wav", 3)[1]) == (
        "violin.wav: 5.2 s at 48000 Hz stereo; using the first 3.0 s"
    )
    assert str(load_audio(tmp_path / "violin.wav")[1]) == "violin.wav: 5.2 s at 48000 Hz stereo"


def test_frames_are_filled_with_the_files_own_samples_then_zeros(tmp_path):
    sound = sine(1.01)
    soundfile.write(tmp_path / "a.wav", sound, SAMPLE_RATE, subtype="FLOAT")
    for duration, blocks in ((0.5, 6), (1.0, 11), (3.0, 11), (None, 11)):
        samples, info = load_audio(tmp_path / "a.wav", duration)
        assert len(samples) == blocks * 2048
        assert info.used == pytest.approx(min(duration or 9, 1.01), abs=1e-4)
        own = min(len(samples), len(sound))
        np.testing.assert_array_equal(samples[:own], sound[:own].astype(np.float32))
        assert not samples[own:].any()


def test_long_file_is_not_decoded_whole(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "long.wav", sine(60), SAMPLE_RATE)
    asked = []
    read = soundfile.SoundFile.read
    monkeypatch.setattr(
        soundfile.SoundFile, "read", lambda self, frames=-1, **kw: asked.append(frames) or read(self, frames, **kw)
    )
    load_audio(tmp_path / "long.wav", 1.0)
    assert len(asked) == 1
    assert 0 < asked[0] < 1.3 * SAMPLE_RATE


def test_format_that_only_audioread_knows(tmp_path, monkeypatch):
    pytest.importorskip("audioread", reason="without audioread, which librosa 1.0 drops, these formats are refused")
    soundfile.write(tmp_path / "a.wav", np.stack([sine(3, 48000)] * 2, axis=1), 48000)
    wanted, wanted_info = load_audio(tmp_path / "a.wav", 1.0)

    def unknown_format(path):
        raise soundfile.LibsndfileError(1)

    monkeypatch.setattr(soundfile, "SoundFile", unknown_format)
    samples, info = load_audio(tmp_path / "a.wav", 1.0)
    assert info == wanted_info
    np.testing.assert_allclose(samples, wanted, atol=2e-4)


def test_peak_above_full_scale_is_scaled_and_said(tmp_path):
    soundfile.write(tmp_path / "hot.wav", sine(0.5, level=2.5), SAMPLE_RATE, subtype="FLOAT")
    samples, info = load_audio(tmp_path / "hot.wav")
    assert np.abs(samples).max() == pytest.approx(1.0)
    assert info.gain == pytest.approx(0.4, rel=1e-3)
    assert "scaled to 1" in str(info)


def bad_wav(samples):
    return lambda path: soundfile.write(path, np.asarray(samples, dtype=np.float32), SAMPLE_RATE, subtype="FLOAT")


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda path: None, FileNotFoundError, "no such file"),
        (os.mkdir, IsADirectoryError, "is a folder"),
        (lambda path: path.write_text("not a sound" * 500), ValueError, "is not audio"),
        (lambda path: path.write_bytes(b""), ValueError, "is not audio"),
        (bad_wav([]), ValueError, "holds no samples"),
        (bad_wav(np.zeros(30000)), ValueError, "is silent"),
        (bad_wav(np.full(30000, 0.3)), ValueError, "is silent"),
        (bad_wav(np.r_[sine(1.0), np.nan, sine(1.0)]), ValueError, "NaN or infinite"),
        (bad_wav(np.r_[sine(1.0), -np.inf, sine(1.0)]), ValueError, "NaN or infinite"),
        (bad_wav(sine(1.0)[:1023]), ValueError, "too short: 1023 samples"),
    ],
    ids=["missing", "folder", "text", "empty", "no-samples", "silence", "constant", "nan", "infinite", "short"],
)
def test_bad_file(tmp_path, make, error, words):
    path = tmp_path / "sound.wav"
    make(path)
    with pytest.raises(error, match=words) as caught:
        load_audio(path, 3.0)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_silent_start_of_a_longer_file(tmp_path):
    bad_wav(np.r_[np.zeros(3 * SAMPLE_RATE), sine(1.0)])(tmp_path / "late.wav")
    with pytest.raises(ValueError, match=r"is silent in its first 1\.0 s"):
        load_audio(tmp_path / "late.wav", 1.0)


def without_length(flac):
    flac[21] &= 0xF0  # 36 bits: 0 stands for unknown
    flac[22:26] = bytes(4)


def with_an_absurd_length(flac):
    flac[21] |= 0x0F
    flac[22:26] = b"\xff" * 4


def without_data_size(wav):
    wav[40:44] = bytes(4)


def with_an_absurd_data_size(wav):
    wav[40:44] = b"\xff" * 4


def with_an_unpadded_chunk(wav):
    wav[36:36] = b"LIST\x05\0\0\0abcde"


def with_a_chunk_beyond_the_end(wav):
    wav[12:12] = b"JUNK\xf0\xff\xff\xff"


@pytest.mark.parametrize("duration", [0.3, 3.0, None])
@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("a.flac", without_length),
        ("a.flac", with_an_absurd_length),
        ("a.wav", without_data_size),
        ("a.wav", with_an_absurd_data_size),
        ("a.wav", with_an_unpadded_chunk),
        ("a.wav", with_a_chunk_beyond_the_end),
    ],
)
def test_a_header_that_is_wrong_about_lengths(tmp_path, name, edit, duration):
    path = tmp_path / name
    soundfile.write(path, sine(1.0), SAMPLE_RATE)
    wanted, _ = load_audio(path, duration)
    content = bytearray(path.read_bytes())
    edit(content)
    path.write_bytes(content)
    samples, info = load_audio(path, duration)
    np.testing.assert_array_equal(samples, wanted)
    assert info.duration == 1.0
    assert ("no more than 1.0 s" in str(info)) == (edit is with_an_absurd_length)


def test_a_recording_without_samples_is_not_mended(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(0), SAMPLE_RATE)
    with open(tmp_path / "a.wav", "ab") as file:
        file.write(b"LIST\x04\0\0\0abcd")
    with pytest.raises(ValueError, match="holds no samples"):
        load_audio(tmp_path / "a.wav")


@pytest.mark.parametrize("rate", [0, 1, 2**32 - 1])
def test_an_absurd_rate(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", sine(1.0), SAMPLE_RATE)
    content = bytearray((tmp_path / "a.wav").read_bytes())
    content[24:28] = rate.to_bytes(4, "little")
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(ValueError, match=f"sample rate is {rate} Hz, expected 1000 to 1000000"):
        load_audio(tmp_path / "a.wav", 0.5)


@pytest.mark.parametrize("cut", [False, True], ids=["damaged", "cut-off"])
def test_what_a_damaged_file_holds_before_the_damage_is_read(tmp_path, cut):
    path = tmp_path / "a.flac"
    sound = np.random.default_rng(0).uniform(-0.5, 0.5, 4 * SAMPLE_RATE)
    soundfile.write(path, sound, SAMPLE_RATE)
    wanted, _ = load_audio(path)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : len(content) if cut else middle + 50] = b"" if cut else bytes(50)
    path.write_bytes(content)
    for duration in (3.0, None):
        samples, info = load_audio(path, duration)
        assert 1.6 < info.used < 2.0 and info.duration == info.used
        assert f"no more than {info.used:.1f} s can be decoded (flac decoder lost sync)" in str(info)
        own = 4096 * (round(info.used * SAMPLE_RATE) // 4096) - 2048  # the end is filtered on its own
        np.testing.assert_allclose(samples[:own], wanted[:own], atol=0.01)
    early = str(load_audio(path, 0.5)[1])
    assert "using the first 0.5 s" in early and ("can be decoded" in early) == cut


def test_a_file_that_is_no_audio_says_what_the_decoder_said(tmp_path):
    (tmp_path / "a.wav").write_text("not a sound")
    with pytest.raises(ValueError, match=r"is not audio .* \(Format not recognised"):
        load_audio(tmp_path / "a.wav")


@pytest.mark.parametrize("offset", [0.02, -0.2])
def test_an_offset_is_taken_out(tmp_path, offset):
    sound = 0.5 * synthesize_bowed_string(0.5)
    bad_wav(sound)(tmp_path / "clean.wav")
    bad_wav(sound + offset)(tmp_path / "offset.wav")
    clean, clean_info = load_audio(tmp_path / "clean.wav")
    samples, info = load_audio(tmp_path / "offset.wav")
    assert clean_info.notes == () and "below 20 Hz" in str(info)
    np.testing.assert_allclose(samples, clean, atol=1e-3)
    grown = analyze(samples)
    assert grown.linear_db[:2].max() < -35
    with pytest.warns(UserWarning, match="below 20 Hz"):
        assert np.abs(Growth(sound + offset, RunSettings(epochs=1, vocoder="griffinlim")).samples - clean).max() < 1e-3


def test_a_drift_alone_is_silence(tmp_path):
    bad_wav(0.3 + 1e-5 * np.linspace(0, 1, 30000))(tmp_path / "drift.wav")
    with pytest.raises(ValueError, match="is silent but for what lies below 20 Hz"):
        load_audio(tmp_path / "drift.wav")


def test_channels_that_cancel_each_other_are_said(tmp_path):
    bad_wav(np.stack([sine(1.0), -0.97 * sine(1.0)], axis=1))(tmp_path / "a.wav")
    assert "its channels nearly cancel each other" in str(load_audio(tmp_path / "a.wav")[1])
    bad_wav(np.stack([sine(1.0), -sine(1.0)], axis=1))(tmp_path / "a.wav")
    with pytest.raises(ValueError, match="its channels cancel each other: give one of them"):
        load_audio(tmp_path / "a.wav")
    bad_wav(np.stack([sine(1.0), *np.zeros((15, SAMPLE_RATE))], axis=1))(tmp_path / "a.wav")
    assert load_audio(tmp_path / "a.wav")[1].notes == ()


def test_a_very_low_level_is_said(tmp_path):
    bad_wav(sine(1.0, level=2e-6))(tmp_path / "a.wav")
    assert "its peak is -114 dB of full scale; make it louder" in str(load_audio(tmp_path / "a.wav")[1])


def test_memory_does_not_grow_with_what_is_left_out(tmp_path, monkeypatch):
    """The length of a stream is counted block by block."""
    monkeypatch.setattr("fastnca.sound.files.BLOCK_VALUES", 10_000)
    path = tmp_path / "a.flac"
    soundfile.write(path, sine(5.0), SAMPLE_RATE)
    content = bytearray(path.read_bytes())
    without_length(content)
    path.write_bytes(content)
    sizes = []
    read = soundfile.SoundFile.read
    monkeypatch.setattr(
        soundfile.SoundFile, "read", lambda self, frames=-1, **kw: sizes.append(frames) or read(self, frames, **kw)
    )
    assert load_audio(path, 0.5)[1].duration == 5.0
    assert max(sizes) <= 10_000


@pytest.mark.parametrize("duration", [0, -1.0, float("nan"), float("inf"), "3", True])
def test_bad_duration(tmp_path, duration):
    bad_wav(sine(1.0))(tmp_path / "a.wav")
    with pytest.raises((ValueError, TypeError), match="duration must be"):
        load_audio(tmp_path / "a.wav", duration)


# ---- writing


def test_write_wav_round_trip(tmp_path, note):
    assert write_wav(tmp_path / "a.wav", note) == 1.0
    read, rate = soundfile.read(tmp_path / "a.wav")
    assert rate == SAMPLE_RATE
    np.testing.assert_allclose(read, note, atol=2**-23)
    assert os.listdir(tmp_path) == ["a.wav"]


def test_write_wav_scales_instead_of_clipping(tmp_path):
    assert write_wav(tmp_path / "a.wav", sine(0.5, level=4.0)) == pytest.approx(0.25, rel=1e-3)
    read = soundfile.read(tmp_path / "a.wav")[0]
    np.testing.assert_allclose(read, sine(0.5, level=1.0), atol=1e-3)


def test_write_wav_needs_the_folder(tmp_path, note):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        write_wav(tmp_path / "missing" / "a.wav", note)


def test_failed_write_leaves_the_old_file(tmp_path, note, monkeypatch):
    write_wav(tmp_path / "a.wav", note)
    before = (tmp_path / "a.wav").read_bytes()

    def disk_full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        write_wav(tmp_path / "a.wav", note[:4096])
    assert (tmp_path / "a.wav").read_bytes() == before
    assert os.listdir(tmp_path) == ["a.wav"]


# ---- spectrograms


@pytest.mark.parametrize("fmax", [8000, None])
def test_mel_grid_inverts_to_bigvgans_input(note, fmax):
    from bigvgan.env import AttrDict
    from bigvgan.meldataset import get_mel_spectrogram

    h = AttrDict(n_fft=1024, num_mels=80, sampling_rate=22050, hop_size=256, win_size=1024, fmin=0, fmax=fmax)
    wanted = get_mel_spectrogram(torch.from_numpy(note)[None], h)[0]
    dual = analyze(note, MelBands(fmax=fmax or 11025))
    ours = spectrogram.mel_to_log(dual.mel_db, dual.scale.mel_ref_db)
    exact = dual.mel_db > -DB_RANGE
    assert exact.float().mean() > 0.8
    assert (ours - wanted)[exact].abs().max() < 1e-3
    assert (ours >= wanted - 1e-3).all()


def test_linear_grid_is_the_stft_of_the_padded_sound(note):
    dual = analyze(note)
    padded = np.pad(note.astype(np.float64), 384, mode="reflect")
    window = np.sin(np.pi * np.arange(1024) / 1024) ** 2
    for frame in (0, 1, 40, 87):
        wanted = np.abs(np.fft.rfft(padded[256 * frame : 256 * frame + 1024] * window))
        ours = from_db(dual.linear_db[:, frame], dual.scale.linear_ref_db).numpy()
        floor = 10 ** ((dual.scale.linear_ref_db - 80) / 20)
        np.testing.assert_allclose(ours, np.maximum(wanted, floor), rtol=2e-3)


@pytest.mark.parametrize("frames", [4, 8, 88])
def test_grids(note, frames):
    dual = analyze(note[: 256 * frames])
    assert dual.n_frames == frames
    for grid, bins in ((dual.mel_db, 80), (dual.linear_db, 513)):
        assert grid.shape == (bins, frames)
        assert grid.dtype == torch.float32
        assert grid.max() == 0
        assert grid.min() >= -80


def test_reference_level_keeps_the_loudness(note):
    loud, soft = analyze(note), analyze(note * 0.1)
    assert soft.scale.linear_ref_db == pytest.approx(loud.scale.linear_ref_db - 20, abs=1e-3)
    assert soft.scale.mel_ref_db == pytest.approx(loud.scale.mel_ref_db - 20, abs=1e-3)
    torch.testing.assert_close(soft.linear_db, loud.linear_db, atol=1e-2, rtol=0)


def test_floor_decodes_to_silence():
    level = torch.tensor([0.0, -79.0, -79.5, -80.0])
    torch.testing.assert_close(
        spectrogram.to_magnitude(level, 20.0), torch.tensor([10.0, 10 ** (-59 / 20), 0.5 * 10 ** (-59.5 / 20), 0.0])
    )


@pytest.mark.parametrize("frames", [2, 3, 88])
def test_istft_inverts_stft(note, frames):
    samples = torch.from_numpy(note[: 256 * frames])
    spectrum = spectrogram.stft(samples)
    assert spectrum.shape == (513, frames)
    torch.testing.assert_close(spectrogram.istft(spectrum), samples, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("samples", "error", "words"),
    [
        (np.zeros(2048, np.float32), ValueError, "silent"),
        (np.ones((2, 2048), np.float32), ValueError, r"shape \[n\], got \[2, 2048\]"),
        (np.ones(2048, np.int16), TypeError, "floating point"),
        (np.ones(512, np.float32), ValueError, "at least 1024 samples, got 512"),
        (sine(1.0)[:2000], ValueError, "multiple of the hop, 256, got 2000"),
        (np.full(2048, np.nan), ValueError, "finite"),
    ],
)
def test_analyze_rejects(samples, error, words):
    with pytest.raises(error, match=words):
        analyze(samples)


@pytest.mark.parametrize(
    ("mel", "linear", "words"),
    [
        (torch.zeros(79, 8), torch.zeros(513, 8), r"mel_db must have shape \[80, T\], got \[79, 8\]"),
        (torch.zeros(80, 8), torch.zeros(1, 513, 8), r"linear_db must have shape \[513, T\], got \[1, 513, 8\]"),
        (torch.zeros(80, 8), torch.zeros(513, 9), "same number of frames, got 8 and 9"),
        (torch.zeros(80, 8), np.full((513, 8), np.nan), "linear_db must be finite"),
    ],
)
def test_dual_spectrogram_rejects(mel, linear, words):
    with pytest.raises(ValueError, match=words):
        DualSpectrogram(mel, linear, Scale(0.0, 0.0))


def test_dual_spectrogram_takes_what_a_model_grows():
    grown = torch.full((80, 8), -3.0, dtype=torch.float64, requires_grad=True)
    dual = DualSpectrogram(grown, np.zeros((513, 8)), Scale(0.0, 0.0))
    assert dual.mel_db.dtype == dual.linear_db.dtype == torch.float32
    assert not dual.mel_db.requires_grad


@pytest.mark.parametrize("wrong", [{"fmin": -1}, {"fmax": 12000}, {"fmin": 9000, "fmax": 8000}])
def test_mel_bands_reject(wrong):
    with pytest.raises(ValueError, match="must"):
        MelBands(**wrong)


# ---- the demo's sound


def test_bowed_string_is_deterministic(note):
    assert note.dtype == np.float32
    assert note.shape == (11 * 2048,)
    assert np.abs(note).max() == pytest.approx(0.8)
    np.testing.assert_array_equal(note, synthesize_bowed_string(1.0))
    assert not np.array_equal(note, synthesize_bowed_string(1.0, seed=1))


@pytest.mark.parametrize(("duration", "frequency"), [(0.05, 440), (2.0, 196), (1.0, 3000)])
def test_bowed_string_spans_its_arguments(duration, frequency):
    sound = synthesize_bowed_string(duration, frequency=frequency)
    assert len(sound) % 2048 == 0
    assert len(sound) >= duration * SAMPLE_RATE
    assert np.isfinite(sound).all()
    assert np.abs(sound).max() == pytest.approx(0.8)


def test_bowed_string_has_harmonics_vibrato_and_an_envelope(note):
    spectrum = np.abs(np.fft.rfft(note[4096:16384] * np.hanning(12288)))
    hz = np.fft.rfftfreq(12288, 1 / SAMPLE_RATE)
    for n in range(1, 9):
        line = spectrum[np.abs(hz - 440 * n) < 12 * n].max()
        gap = spectrum[np.abs(hz - 440 * (n + 0.5)) < 60].max()
        assert line > 10 * gap

    power = np.abs(spectrogram.stft(torch.from_numpy(note)).numpy()) ** 2
    near = slice(200, 208)  # the tenth harmonic, 4400 Hz, is at bin 204.3
    pitch = (power[near] * np.arange(near.start, near.stop)[:, None]).sum(0) / power[near].sum(0) * SAMPLE_RATE / 1024
    assert 40 < np.ptp(pitch[30:75]) < 160  # +-22 cents are +-56 Hz here
    assert np.ptp(pitch[30:75]) > 2 * np.ptp(pitch[6:13])

    level = np.sqrt((note.reshape(-1, 1024) ** 2).mean(1))
    assert level[0] < 0.5 * level[11]
    assert level[-1] < 0.1 * level[11]


@pytest.mark.parametrize("wrong", [{"duration": 0}, {"duration": float("nan")}, {"frequency": 10}])
def test_bowed_string_rejects(wrong):
    with pytest.raises(ValueError, match="must be"):
        synthesize_bowed_string(**wrong)

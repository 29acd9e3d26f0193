import functools
import http.server
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from fastnca.sound import metrics
from fastnca.sound.bigvgan import find_bigvgan, load_bigvgan, mel_bands
from fastnca.sound.convention import DEFAULT_BANDS, MelBands
from fastnca.sound.spectrogram import analyze, from_db, mel_basis, stft, to_magnitude
from fastnca.sound.synthetic import synthesize_bowed_string
from fastnca.sound.vocoder import Vocoder, griffin_lim, merge_magnitudes, resolve_vocoder

# The published configurations, but small: 64 channels at the input and one residual block per stage.
CONFIG_V2 = {
    "resblock": "1",
    "upsample_rates": [4, 4, 2, 2, 2, 2],
    "upsample_kernel_sizes": [8, 8, 4, 4, 4, 4],
    "upsample_initial_channel": 64,
    "resblock_kernel_sizes": [3],
    "resblock_dilation_sizes": [[1, 3, 5]],
    "use_tanh_at_final": False,
    "use_bias_at_final": False,
    "activation": "snakebeta",
    "snake_logscale": True,
    "segment_size": 65536,
    "num_mels": 80,
    "n_fft": 1024,
    "hop_size": 256,
    "win_size": 1024,
    "sampling_rate": 22050,
    "fmin": 0,
    "fmax": None,
}
CONFIG_BASE = {
    **{key: value for key, value in CONFIG_V2.items() if not key.startswith("use_")},
    "upsample_rates": [8, 8, 2, 2],
    "upsample_kernel_sizes": [16, 16, 4, 4],
    "fmax": 8000,
}


def save_bigvgan(folder, config, weight_norm=True):
    from bigvgan.bigvgan import AttrDict, BigVGAN

    torch.manual_seed(0)
    model = BigVGAN(AttrDict(config))
    if not weight_norm:
        model.remove_weight_norm()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({"generator": model.state_dict()}, folder / "bigvgan_generator.pt")
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As fast for sounds this short, and on a busy machine two threads wait for each other 200 times per sound."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_bigvgan(tmp_path_factory.mktemp("bigvgan"), CONFIG_V2)


@pytest.fixture(scope="module")
def note():
    return synthesize_bowed_string(1.0)


def struck_bar():
    time = np.arange(11 * 2048) / 22050
    return (0.6 * np.sin(2 * np.pi * 440 * time) * np.exp(-6 * time)).astype(np.float32)


def noise_burst():
    time = np.arange(11 * 2048) / 22050
    return (0.1 * np.random.default_rng(0).standard_normal(len(time)) * np.exp(-3 * time)).astype(np.float32)


# ---- Griffin-Lim and the merged magnitudes


@pytest.mark.parametrize("sound", [lambda: synthesize_bowed_string(1.0), struck_bar], ids=["bowed", "struck"])
def test_round_trip(sound):
    samples = sound()
    decoded = resolve_vocoder("griffinlim").decode(analyze(samples))
    assert decoded.dtype == np.float32
    assert decoded.shape == samples.shape
    result = metrics.compare(samples, decoded)
    assert result["spectral_convergence_db"] < -25
    assert abs(result["loudness_error_db"]) < 0.2


def test_griffin_lim_is_seeded(note):
    magnitude = merge_magnitudes(analyze(note))
    first = griffin_lim(magnitude, n_iter=3)
    np.testing.assert_array_equal(first, griffin_lim(magnitude, n_iter=3))
    assert not np.allclose(first, griffin_lim(magnitude, n_iter=3, seed=1))


def test_griffin_lim_starts_from_a_phase(note):
    spectrum = stft(torch.from_numpy(note))
    for n_iter in (0, 5):
        decoded = griffin_lim(spectrum.abs().numpy(), n_iter, phase=spectrum.angle().numpy())
        np.testing.assert_allclose(decoded, note, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.ones(512, 8),), r"shape \[513, T\] with T >= 2, got \[512, 8\]"),
        ((torch.ones(513, 1),), "with T >= 2"),
        ((torch.full((513, 8), -3.0),), "not negative"),
        ((torch.full((513, 8), float("nan")),), "finite"),
        ((torch.ones(513, 8), 3, torch.zeros(513, 9)), r"phase must have shape \[513, 8\], got \[513, 9\]"),
    ],
)
def test_griffin_lim_rejects(arguments, words):
    with pytest.raises(ValueError, match=words):
        griffin_lim(*arguments)


@pytest.mark.parametrize("fmax", [8000.0, 11025.0])
@pytest.mark.parametrize("gain", [1.0, 1e-3])
@pytest.mark.parametrize("sound", [lambda: synthesize_bowed_string(0.5), struck_bar, noise_burst])
def test_merging_the_targets_own_grids_changes_nothing(sound, gain, fmax):
    dual = analyze(gain * sound(), MelBands(fmax=fmax))
    linear = to_magnitude(dual.linear_db, dual.scale.linear_ref_db)
    assert (merge_magnitudes(dual) - linear).norm() < 1e-4 * linear.norm()


def test_merged_magnitudes_project_onto_the_mel_grid(note):
    dual = analyze(note)
    torch.manual_seed(0)
    wrong = (0.7 * dual.linear_db - 30 + 10 * torch.rand(dual.linear_db.shape)).clamp(-80, 0)
    merged = merge_magnitudes(dual.with_grids(dual.mel_db, wrong))
    basis, wanted = mel_basis(dual.scale.bands), from_db(dual.mel_db, dual.scale.mel_ref_db)
    active = dual.mel_db > -60

    def mel_error_db(linear):
        return (20 * torch.log10((basis @ linear) / wanted)[active]).abs().mean()

    assert mel_error_db(from_db(wrong, dual.scale.linear_ref_db)) > 10
    assert mel_error_db(merged) < 0.5
    torch.testing.assert_close(merged[0], to_magnitude(wrong, dual.scale.linear_ref_db)[0])  # 0 Hz is in no mel band


@pytest.mark.parametrize(("louder", "kept"), [(1.0, 0.5), (-1.0, 0.5), (12.0, 0.0), (-12.0, 0.0)])
def test_small_disagreements_of_the_grids_are_averaged(note, louder, kept):
    dual = analyze(note)
    linear_db = torch.where(dual.linear_db > -65, dual.linear_db + louder, dual.linear_db)
    merged = merge_magnitudes(dual.with_grids(dual.mel_db, linear_db))
    loud = dual.linear_db > -15
    change = 20 * torch.log10(merged[loud] / to_magnitude(dual.linear_db, dual.scale.linear_ref_db)[loud])
    assert change.mean().item() == pytest.approx(kept * louder, abs=0.15)


# ---- BigVGAN's files


@pytest.mark.parametrize(("config", "fmax"), [(CONFIG_V2, 11025.0), (CONFIG_BASE, 8000.0)], ids=["v2", "base"])
def test_load_from_a_folder(tmp_path, capfd, config, fmax):
    model = load_bigvgan(save_bigvgan(tmp_path, config))
    assert capfd.readouterr() == ("", "")
    assert model.h["fmax"] == config["fmax"]
    assert not model.training
    assert not any(key.endswith("weight_g") for key in model.state_dict())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert mel_bands(model.h) == MelBands(fmax=fmax)
    assert model(torch.zeros(1, 80, 8)).shape == (1, 1, 2048)


def test_weights_saved_without_weight_norm_give_the_same_sound(folder, tmp_path):
    mel = torch.randn(1, 80, 8, generator=torch.Generator().manual_seed(0))
    sounds = [load_bigvgan(path)(mel) for path in (folder, save_bigvgan(tmp_path, CONFIG_V2, weight_norm=False))]
    assert sounds[0].abs().max() > 1e-6
    torch.testing.assert_close(*sounds)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_mels": 100}, "expected num_mels 80, found 100"),
        (
            {"sampling_rate": 24000, "hop_size": 240},
            "expected sampling_rate 22050, found 24000; hop_size 256, found 240",
        ),
        ({"n_fft": 2048}, "expected n_fft 1024, found 2048"),
        ({"win_size": None}, "expected win_size 1024, found None"),
        ({"upsample_rates": [8, 8, 4, 2]}, "product 256, found 512"),
        ({"fmax": "high"}, "no valid upsample_rates, fmin and fmax"),
        ({"fmax": 12000}, "no valid upsample_rates, fmin and fmax"),
        ({"resblock": "7"}, "does not fit its config.json"),
        ({"upsample_initial_channel": 128}, "does not fit its config.json"),
    ],
)
def test_folder_that_does_not_fit(folder, tmp_path, change, words):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG_V2, **change}))
    os.symlink(folder / "bigvgan_generator.pt", tmp_path / "bigvgan_generator.pt")
    with pytest.raises(ValueError, match=words) as caught:
        resolve_vocoder("auto", tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


class Foreign:
    pass


def truncate(path):
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize(
    ("file", "damage", "error", "words"),
    [
        ("config.json", lambda path: path.unlink(), FileNotFoundError, "no config.json in"),
        ("bigvgan_generator.pt", lambda path: path.unlink(), FileNotFoundError, "no bigvgan_generator.pt in"),
        ("config.json", truncate, ValueError, "does not fit"),
        ("config.json", lambda path: path.write_text("{"), ValueError, "not valid JSON"),
        ("config.json", lambda path: path.write_text("[]"), ValueError, "must be a JSON object"),
        ("bigvgan_generator.pt", truncate, ValueError, "not a BigVGAN generator file"),
        ("bigvgan_generator.pt", lambda path: path.write_bytes(b""), ValueError, "not a BigVGAN generator file"),
        ("bigvgan_generator.pt", lambda path: torch.save(Foreign(), path), ValueError, "not a BigVGAN generator file"),
        ("bigvgan_generator.pt", lambda path: torch.save({}, path), ValueError, "not a BigVGAN generator file"),
        ("bigvgan_generator.pt", lambda path: torch.save({"generator": 3}, path), ValueError, "does not fit"),
    ],
    ids=[
        "no-config",
        "no-weights",
        "other-config",
        "bad-json",
        "list",
        "truncated",
        "empty",
        "pickle",
        "no-generator",
        "number",
    ],
)
def test_damaged_folder(tmp_path, file, damage, error, words):
    save_bigvgan(tmp_path, CONFIG_V2)
    if damage is truncate and file == "config.json":
        (tmp_path / file).write_text("{}")
    else:
        damage(tmp_path / file)
    for choice in ("auto", "bigvgan"):
        with pytest.raises(error, match=words) as caught:
            resolve_vocoder(choice, tmp_path)
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["./nowhere", "nowhere", "/no/where/at/all", "C:\\models"])
def test_neither_folder_nor_hub_name(name):
    with pytest.raises(FileNotFoundError, match="no such BigVGAN folder"):
        find_bigvgan(name)


# ---- the choice


def test_auto_takes_the_folder(folder, note):
    chosen = resolve_vocoder("auto", folder)
    assert (chosen.name, chosen.hint, chosen.bands) == ("bigvgan", None, DEFAULT_BANDS)
    dual = analyze(note, chosen.bands)
    decoded = chosen.decode(dual)  # random weights: only the plumbing can be judged
    assert decoded.dtype == np.float32
    assert decoded.shape == note.shape
    assert np.isfinite(decoded).all()
    np.testing.assert_array_equal(decoded, chosen.decode(dual))


def test_joined_decoder_keeps_the_phase_of_the_waveform(note):
    class PerfectVocoder(torch.nn.Module):
        def forward(self, log_mel):
            assert log_mel.shape == (1, 80, 88)
            assert log_mel.min() >= np.log(1e-5) - 1e-6
            return 0.5 * torch.from_numpy(note)[None, None]  # the level must come from the grids

    decoded = Vocoder("bigvgan", DEFAULT_BANDS, PerfectVocoder()).decode(analyze(note))
    assert np.abs(decoded - note).max() < 0.01


def test_auto_falls_back_with_a_hint(monkeypatch):
    monkeypatch.setattr("fastnca.sound.vocoder.find_bigvgan", lambda name: None)
    chosen = resolve_vocoder()
    assert (chosen.name, chosen.model) == ("griffinlim", None)
    assert "--vocoder bigvgan" in chosen.hint
    assert "\n" not in chosen.hint


def test_unknown_choice():
    with pytest.raises(ValueError, match="vocoder must be one of auto, bigvgan, griffinlim, got 'wavenet'"):
        resolve_vocoder("wavenet")


def test_bigvgan_rejects_another_convention_and_griffin_lim_takes_it(note):
    dual = analyze(note, MelBands(fmax=8000))
    with pytest.raises(ValueError, match=r"mel bands lie in 0..11025 Hz and the grids' in 0..8000 Hz"):
        Vocoder("bigvgan", DEFAULT_BANDS, torch.nn.Identity()).decode(dual)
    assert len(resolve_vocoder("griffinlim").decode(dual)) == len(note)


# ---- the hub, played by a local server


class Hub(http.server.SimpleHTTPRequestHandler):
    """/owner/name/resolve/main/file from a folder, with the headers huggingface_hub reads."""

    def translate_path(self, path):
        return os.path.join(self.directory, path.rsplit("/", 1)[-1] if "/nvidia/" in path else "missing")

    def end_headers(self):
        self.send_header("ETag", f'"{"a" * 40}{os.path.basename(self.path)}"')
        self.send_header("X-Repo-Commit", "c" * 40)
        super().end_headers()

    def log_message(self, *arguments):
        pass


HUB_SESSION = """
import socket
import matplotlib
matplotlib.use("svg")
from fastnca.sound.bigvgan import DEFAULT_BIGVGAN, find_bigvgan, load_bigvgan
from fastnca.sound.vocoder import resolve_vocoder

connect, calls = socket.socket.connect, []
socket.socket.connect = lambda self, address: calls.append(address) or connect(self, address)
assert resolve_vocoder("auto").name == "griffinlim"
try:
    load_bigvgan()
except FileNotFoundError as error:
    assert "not in the local cache" in str(error)
assert not calls

try:
    resolve_vocoder("bigvgan", "nobody/nothing")
except OSError as error:
    print(error)
assert resolve_vocoder("bigvgan").name == "bigvgan"
assert calls
calls.clear()

assert find_bigvgan(DEFAULT_BIGVGAN)
assert resolve_vocoder("auto").name == "bigvgan"
assert resolve_vocoder("bigvgan").name == "bigvgan"
assert not calls
assert matplotlib.get_backend() == "svg"
"""


def test_hub_is_asked_only_on_request_and_only_once(folder, tmp_path):
    """In a fresh process: huggingface_hub reads its settings when it is imported."""
    environment = {key: value for key, value in os.environ.items() if not key.upper().startswith(("HF_", "HTTP"))}
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Hub, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", HUB_SESSION], env=environment, capture_output=True, text=True, check=False
        )
        server.shutdown()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("could not download BigVGAN nobody/nothing (")
    assert done.stdout.count("\n") == 1

"""A model that has learned a sound: what its file holds, how it grows and how what it grew is decoded."""

from dataclasses import asdict, dataclass, field, replace
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch

from .automaton.backends import check_names, choose_backend, choose_device
from .context import Places
from .files import from_fields, kind_of, read_safetensors, write_safetensors
from .model import DualSpecTNCA, frame_times
from .sound.convention import MelBands, on_cpu, within_full_scale
from .sound.files import write_wav
from .sound.spectrogram import DualSpectrogram, Scale
from .sound.vocoder import Vocoder, resolve_vocoder

MODEL_FILE = "model.safetensors"
SPACE_FILE = "space.safetensors"  # in its place, of many sounds
MODEL_VERSION = 3  # of the file; versions from 2 on stay readable
MIN_FRAMES = 8
LATTICE, LATTICE_STEPS = 12, 20  # cells between the seeds of a quick growth, and its steps; 44 come no nearer
SETTLING_STEPS = 32  # that a growth goes on for when life has reached every cell


@dataclass(frozen=True)
class SoundCard:
    """What a model file says about the sound that the model learned.

    scale: what its decibels mean. n_frames: its length. num_steps: of an epoch's rollout. vocoder, bigvgan: the choice
    that decodes it, see ``vocoder.resolve_vocoder``. recipe: the name of its recipe. epochs: how long it has learned.
    """

    scale: Scale
    n_frames: int
    num_steps: int
    vocoder: str
    bigvgan: str | None
    recipe: str
    epochs: int

    @classmethod
    def from_dict(cls, fields):
        """From what ``dataclasses.asdict`` made of one, also after JSON."""
        scale = {**fields["scale"], "bands": from_fields(MelBands, fields["scale"]["bands"])}
        return from_fields(cls, {**fields, "scale": from_fields(Scale, scale)})


@dataclass(frozen=True, eq=False)
class GrownSound:
    """A sound that a model grew.

    samples: float32 array [n] at 22.05 kHz, within full scale. spectrogram: the grids that it was decoded from.
    model: the SoundModel that grew it. gain: below 1 where the decoded sound had to be made quieter by that factor to
    stay within full scale. metrics: distances from the recording, where it was grown beside one.
    """

    samples: np.ndarray = field(repr=False)
    spectrogram: DualSpectrogram = field(repr=False)
    model: "SoundModel" = field(repr=False)
    gain: float = 1.0
    metrics: dict = field(default_factory=dict)

    def save(self, path):
        """Write a WAV file, mono, 24 bit; ``path`` holds the old file or the whole new one."""
        write_wav(path, self.samples)


@dataclass(frozen=True, eq=False)
class Plan:
    """What a growth needs to know, the arguments of ``DualSpecTNCA.grow``."""

    n_frames: int
    num_steps: int
    times: torch.Tensor = field(repr=False)
    pitch_hz: float | None
    at: list | int | None


@dataclass(frozen=True, eq=False)
class SoundModel:
    """An automaton, the card of the sound that it has learned, and the vocoder that decodes what it grows."""

    automaton: DualSpecTNCA
    card: SoundCard
    vocoder: Vocoder

    @on_cpu
    def grow(self, n_frames=None, num_steps=None, time="stretch", pitch_hz=None, at=None):
        """Grow the sound from its seed and decode it -> GrownSound.

        Args:
            n_frames: of 256 samples each; as long as the recording if not given.
            num_steps: its age; if not given, until life has reached every cell and settled.
            time: what another number of frames does, "stretch" or "sustain", see ``model.frame_times``.
            pitch_hz: the pitch to grow at; that of the recording if not given.
            at: where life begins, see ``DualSpecTNCA.seed``; one cell in the middle of each grid if not given.

        Raises ValueError for numbers that are too small, for "sustain" where the recipe knows no place in time, and for
        a pitch where the sound has none.

        >>> sound = fastnca.load("violin").grow(n_frames=400, time="sustain")
        >>> sound.save("long.wav")
        """
        plan = self.plan(n_frames, num_steps, time, pitch_hz, at)
        return self.decode(*self.automaton.grow(**vars(plan)))

    def plan(self, n_frames=None, num_steps=None, time="stretch", pitch_hz=None, at=None):
        """Checks and completes the arguments of :meth:`grow` -> Plan."""
        n_frames = self.card.n_frames if n_frames is None else n_frames
        if n_frames < MIN_FRAMES:
            raise ValueError(f"frames must be at least {MIN_FRAMES} (about 0.1 s), got {n_frames}")
        if num_steps is None:
            num_steps = self.card.num_steps
            if self.automaton.growth:
                num_steps = self.automaton.steps_to_fill(n_frames, at) + SETTLING_STEPS
        if num_steps < 0:
            raise ValueError(f"steps must be at least 0, got {num_steps}")
        times = frame_times(n_frames, self.card.n_frames, time)
        if time == "sustain" and not self.automaton.knows_time:
            raise ValueError(f"time cannot sustain: the model's recipe, {self.card.recipe}, has no time coordinates")
        self.automaton.tables(n_frames, times, pitch_hz)  # raises where it knows no such pitch
        return Plan(n_frames, num_steps, times, pitch_hz, at)

    def spectrogram(self, mel_db, linear_db):
        """Grown grids [80, T] and [513, T] in dB -> DualSpectrogram, on the scale of the recording."""
        return DualSpectrogram(mel_db, linear_db, self.card.scale)

    def decode(self, mel_db, linear_db):
        """Grown grids [80, T] and [513, T] in dB -> GrownSound; deterministic."""
        spectrogram = self.spectrogram(mel_db, linear_db)
        samples, gain = within_full_scale(self.vocoder.decode(spectrogram))
        return GrownSound(samples, spectrogram, self, gain)

    def save(self, path):
        """Write one self-contained model file, atomically; :func:`load` reads it."""
        save_model(path, self.automaton, self.card)


def save_model(path, model, card=None):
    """Write a DualSpecTNCA to one safetensors file, atomically: its weights, its configuration and, if it has learned a
    sound, its SoundCard. What was compiled or wrapped is saved as the model inside, and parametrized weights as what
    they are now.

    Raises TypeError for another module, RuntimeError for a model whose layers are not those of the rule.

    >>> save_model("rule.safetensors", DualSpecTNCA())
    >>> model, card = load_model("rule.safetensors")
    """
    while not isinstance(model, DualSpecTNCA):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)  # torch.compile, DDP
        if inner is None:
            raise TypeError(f"expected a DualSpecTNCA, got {type(model).__name__}")
        model = inner
    model.weights  # noqa: B018 (raises where the layers are not what would be loaded)
    expected = DualSpecTNCA(**{**model.config, "context": model.places}).state_dict()
    tensors = {name: attrgetter(name)(model) for name in expected}
    for name, tensor in tensors.items():
        shape = None if tensor is None else list(tensor.shape)
        if shape != list(expected[name].shape):
            raise RuntimeError(f"{name} has the shape {shape} in place of {list(expected[name].shape)}")
    metadata = {"config": model.config, "sound": None if card is None else asdict(card)}
    write_safetensors(path, tensors, "model", MODEL_VERSION, metadata)


@on_cpu
def load_model(path, backend="auto", precision="fp32"):
    """Read what :func:`save_model` wrote -> (DualSpecTNCA, SoundCard or None).

    Raises:
        FileNotFoundError: no such file. ValueError: damaged, truncated, not a fastnca model, or of a newer version.
    """
    check_names(backend, precision)
    tensors, version, metadata = read_safetensors(path, "model")
    if version < 2:
        raise ValueError(f"{path} has version {version}, which no fastnca has written; grow the sound again")
    if version > MODEL_VERSION:
        raise ValueError(
            f"{path} was written by a newer fastnca: it has version {version}, and this fastnca reads models up to "
            f"{MODEL_VERSION}: update it"
        )
    try:
        config = dict(metadata["config"])
        known = set(DualSpecTNCA().config)
        unknown, missing = set(config) - known, known - set(config)
        if missing and version == MODEL_VERSION:  # it would grow, but something else
            raise ValueError(f"its configuration has no {', '.join(sorted(missing))}")
        if unknown:
            raise ValueError(f"its configuration has unknown, perhaps newer, {', '.join(sorted(unknown))}")
        if config.get("context"):
            config["context"] = Places.from_dict(config["context"])
        model = DualSpecTNCA(**config, backend=backend, precision=precision)
        model.load_state_dict(tensors)
        card = None if metadata["sound"] is None else SoundCard.from_dict(metadata["sound"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(
            f"{path} is damaged or of another fastnca: its configuration and its weights do not fit ({reason})"
        ) from error
    return model, card


def find_model_file(path):
    """The file of a model or a space that ``path`` is or that the folder ``path`` holds. Raises FileNotFoundError."""
    path = Path(path)
    if path.is_dir():
        folder = path
        path = next((folder / name for name in (MODEL_FILE, SPACE_FILE) if (folder / name).is_file()), None)
        if path is None:
            raise FileNotFoundError(f"no {MODEL_FILE} in {folder}; give a folder that fastnca grow or learn wrote")
    elif not path.is_file():
        raise FileNotFoundError(f"no such file or folder: {path}; give what fastnca grow wrote, or its {MODEL_FILE}")
    return path


def load(path, *, backend="auto", vocoder=None, bigvgan=None):
    """A sound that was learned, ready to grow again -> SoundModel, or many -> Space.

    Args:
        path: the folder that ``fastnca grow`` or ``fastnca learn`` wrote, or the model file or space file in it.
        backend: where it grows, "auto" or a name from ``fastnca info``.
        vocoder, bigvgan: another choice than the model's own, see ``vocoder.resolve_vocoder``.

    Raises FileNotFoundError, ValueError for what is not a learned sound, RuntimeError for a backend that cannot run.

    >>> sound = fastnca.load("violin").grow()
    >>> sound.save("violin_again.wav")
    """
    path = find_model_file(path)
    if kind_of(path) == "space":
        from .space import load_space  # which is made of SoundModels

        return load_space(path, backend=backend, vocoder=vocoder, bigvgan=bigvgan)
    device = choose_device(backend)
    choose_backend(backend, device=device)
    automaton, card = load_model(path, backend=backend)
    if card is None:
        raise ValueError(f"{path} does not say what its grids sound like; grow it with fastnca grow")
    card = replace(card, vocoder=vocoder or card.vocoder, bigvgan=bigvgan or card.bigvgan)
    decoder = resolve_vocoder(card.vocoder, card.bigvgan)
    decoder.check(card.scale.bands)
    return SoundModel(automaton.to(device), card, decoder)

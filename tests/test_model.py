"""The automaton on the reference backend: the rule, the notebook's interface, the public checks."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrize, prune

import fastnca
from fastnca.automaton import backends, reference
from fastnca.context import Places
from fastnca.files import write_safetensors
from fastnca.growth import Growth
from fastnca.model import frame_times
from fastnca.settings import RunSettings
from fastnca.sound.convention import MelBands
from fastnca.sound.spectrogram import Scale
from fastnca.sound.synthetic import synthesize_bowed_string
from fastnca.sound_model import MODEL_VERSION, SoundCard


class NotebookModel(nn.Module):
    """The prototype's class as it was published, with the loop that never reaches its result."""

    def __init__(self, num_channels=16, n_mels=80, n_linear=513):
        super().__init__()
        self.num_channels = num_channels
        self.update_mlp = nn.Sequential(
            nn.Conv2d(num_channels * 4, 128, 1),
            nn.ReLU(),
            nn.Conv2d(128, 64, 1),
            nn.ReLU(),
            nn.Conv2d(64, num_channels, 1, bias=True),
        )

    def perceive(self, grid):
        sobel_x = torch.tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]], dtype=grid.dtype).view(1, 1, 3, 3)
        laplacian = torch.tensor([[1, 2, 1], [2, -12, 2], [1, 2, 1]], dtype=grid.dtype).view(1, 1, 3, 3)
        kernels = (sobel_x, sobel_x.transpose(-2, -1), laplacian)
        parts = [F.conv2d(grid, k.repeat(self.num_channels, 1, 1, 1), padding=1, groups=grid.shape[1]) for k in kernels]
        return torch.cat([grid, *parts], dim=1)

    def forward(self, *grids, masked=False):
        result = []
        for grid in grids:
            grid = grid + self.update_mlp(self.perceive(grid))
            if masked:  # what its comment says it does
                alpha = torch.clamp(grid[:, 1:2], 0.0, 1.0)
                grid = torch.cat([grid[:, :1], alpha, grid[:, 2:]], dim=1)
                grid = grid * F.max_pool2d(alpha, kernel_size=3, stride=1, padding=1)
            result.append(grid)
        return tuple(result)


def random_grids(model, n_frames=9, batch=2, dtype=torch.float32):
    torch.manual_seed(1)
    return tuple(torch.randn(batch, 16, bands, n_frames, dtype=dtype) for bands in (model.n_mels, model.n_linear))


@pytest.mark.parametrize("life_mask", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_a_drop_in_for_the_notebook(life_mask, dtype):
    torch.manual_seed(0)
    notebook = NotebookModel().to(dtype)
    model = fastnca.DualSpecTNCA(16, 80, 513, life_mask=life_mask, backend="reference").to(dtype)
    assert list(model.state_dict()) == list(notebook.state_dict())
    model.load_state_dict(notebook.state_dict())
    grids = random_grids(model, dtype=dtype)
    torch.testing.assert_close(model.perceive(grids[0]), notebook.perceive(grids[0]))
    for ours, theirs in zip(model(*grids), notebook(*grids, masked=life_mask), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs)


def test_initial_weights_are_the_notebooks():
    last = fastnca.DualSpecTNCA().update_mlp[-1]
    assert not last.weight.any()
    assert last.bias.tolist() == [0.0, 1.0] + [0.0] * 14


def test_perceive_by_hand():
    s = torch.zeros(1, 1, 3, 3)
    s[0, 0, 0, 0] = 1.0
    p = reference.perceive(s)[0]
    assert p.shape == (4, 3, 3)
    assert p[1, 1, 1] == -1.0 and p[2, 1, 1] == -1.0 and p[3, 1, 1] == 1.0  # seen from its lower right neighbor
    assert p[3, 0, 0] == -12.0 and p[1, 0, 1] == -2.0 and p[2, 1, 0] == -2.0  # cross-correlation, zero padding


def test_the_mask_spreads_life_by_one_cell_and_kills_the_rest():
    model = fastnca.DualSpecTNCA(n_mels=5, n_linear=7, backend="reference")
    model.update_mlp[-1].bias.data[1] = 0.0
    mel, _ = model.seed(7)
    mel[:, 0] = 5.0
    grown, _ = model(mel, model.seed(7)[1])
    alive = torch.zeros(5, 7)
    alive[1:4, 2:5] = 1.0
    torch.testing.assert_close(grown[0, 0], 5.0 * alive)


def test_rollout_is_repeated_forward():
    model = fastnca.DualSpecTNCA(backend="reference")
    nn.init.normal_(model.update_mlp[-1].weight, std=0.01)
    grids = random_grids(model)
    stepped = grids
    for _ in range(3):
        stepped = model(*stepped)
    for one, other in zip(model.rollout(*grids, 3), stepped, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(model.rollout(*grids, 0), grids, strict=True):
        assert torch.equal(one, other)


def test_a_rollout_compiles_without_a_graph_break():
    model = fastnca.DualSpecTNCA(n_mels=4, n_linear=5)
    grids = model.seed(6)
    compiled = torch.compile(model.rollout, fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(*grids, num_steps=2), model.rollout(*grids, num_steps=2), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("checkpoint_every", [1, 2, 3, 7])
def test_checkpointing_leaves_the_gradient_as_it_is(checkpoint_every):
    model = fastnca.DualSpecTNCA(n_mels=6, n_linear=9, backend="reference")
    nn.init.normal_(model.update_mlp[-1].weight, std=0.05)
    gradients = []
    for every in (None, checkpoint_every):
        grids = [grid.requires_grad_() for grid in random_grids(model)]
        model.zero_grad()
        sum((grid**2).sum() for grid in model.rollout(*grids, 5, checkpoint_every=every)).backward()
        gradients.append([t.grad.clone() for t in (*grids, *model.parameters())])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_gradients_in_float64():
    torch.manual_seed(0)
    model = fastnca.DualSpecTNCA(n_mels=2, n_linear=1, backend="reference").double()
    nn.init.normal_(model.update_mlp[-1].weight, std=0.05)
    grids = [torch.rand(1, 16, bands, 2, dtype=torch.float64, requires_grad=True) for bands in (2, 1)]
    assert torch.autograd.gradcheck(lambda *g: model.rollout(*g, 2), grids, atol=1e-4)


def test_seed_and_coordinates():
    model = fastnca.DualSpecTNCA(n_mels=4, n_linear=6, coordinates=[("sin", "f", 0), ("cos", "t", 1)])
    mel, linear = model.seed(5)
    assert mel.shape == (1, 16, 4, 5) and linear.shape == (1, 16, 6, 5)
    for grid, height in ((mel, 4), (linear, 6)):
        assert grid[0, 1].sum() == 1.0 and grid[0, 1, height // 2, 2] == 1.0
        assert not grid[0, 0].any() and not grid[0, 4:].any()
        f, t = torch.linspace(-1, 1, height), torch.linspace(-1, 1, 5)
        torch.testing.assert_close(grid[0, 2], torch.sin(math.pi * f)[:, None].expand(-1, 5))
        torch.testing.assert_close(grid[0, 3], torch.cos(2 * math.pi * t).expand(height, -1))


def test_seed_at_given_times():
    model = fastnca.DualSpecTNCA(n_mels=4, n_linear=6, coordinates=[("sin", "f", 0), ("cos", "t", 1)])
    times = torch.tensor([-1.0, 0.0, 0.0, 0.7])
    for grid in model.seed(4, times=times):
        torch.testing.assert_close(grid[0, 3], torch.cos(2 * math.pi * times).expand(grid.shape[2], -1))
    for given, default in zip(model.seed(4, times=torch.linspace(-1, 1, 4)), model.seed(4), strict=True):
        assert torch.equal(given, default)
    with pytest.raises(ValueError, match=r"times must have shape \[4\], one place per frame, got \[3\]"):
        model.seed(4, times=times[:3])


def seed_cells(grid):
    """The live cells (y, x) of one grid."""
    return {tuple(cell) for cell in grid[0, 1].nonzero().tolist()}


def test_seeds_at_places_and_in_a_lattice():
    model = fastnca.DualSpecTNCA(n_mels=4, n_linear=6)
    assert [seed_cells(grid) for grid in model.seed(5)] == [{(2, 2)}, {(3, 2)}]
    corners = model.seed(5, at=[(0, 0), (1, 1.0)])
    assert [seed_cells(grid) for grid in corners] == [{(0, 0), (3, 4)}, {(0, 0), (5, 4)}]
    for grid in model.seed(9, at=3):
        cells = seed_cells(grid)
        assert len({y % 3 for y, _ in cells}) == len({x % 3 for _, x in cells}) == 1 and len(cells) >= 3


@pytest.mark.parametrize(
    ("at", "words"),
    [
        (0, "seeds must be at least 1 cell apart, got 0"),
        ([], "at least one cell must live"),
        ([(0.5, 1.1)], r"a seed's place is \(band, frame\), shares of the grid from 0 to 1, got \(0.5, 1.1\)"),
        ([(0.5,)], "a seed's place is"),
    ],
)
def test_wrong_seeds(at, words):
    with pytest.raises(ValueError, match=words):
        fastnca.DualSpecTNCA().seed(8, at=at)


@pytest.mark.parametrize("at", [None, [(0.0, 0.0)], [(0.2, 0.1), (0.9, 0.8)], 1, 3, 4], ids=str)
def test_steps_to_fill_are_those_that_life_takes(at):
    model = fastnca.DualSpecTNCA(n_mels=7, n_linear=12, context=Places(2, 2), growth=True)
    grids, steps = model.seed(9, at), 0
    with torch.no_grad():
        while not all((grid[:, 1] > 0).all() for grid in grids):
            grids, steps = model(*grids), steps + 1
    told = model.steps_to_fill(9, at)
    assert steps <= told <= at if isinstance(at, int) else steps == told
    assert fastnca.DualSpecTNCA(n_mels=7, n_linear=12).steps_to_fill(9, at) == 1


def test_growth_needs_the_life_mask():
    with pytest.raises(ValueError, match="growth needs the life mask"):
        fastnca.DualSpecTNCA(growth=True, life_mask=False)


def test_context_comes_back_from_a_file(tmp_path):
    places = Places(3, 2, pitch_hz=220.0)
    model = fastnca.DualSpecTNCA(n_mels=6, n_linear=9, context=places, growth=True)
    fastnca.save_model(tmp_path / "rule.safetensors", model)
    loaded, _ = fastnca.load_model(tmp_path / "rule.safetensors")
    assert MODEL_VERSION == 3 and loaded.places == places and loaded.growth and loaded.config == model.config
    for one, other in zip(loaded.tables(8, pitch_hz=330.0), model.tables(8, pitch_hz=330.0), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("trained", [7, 8])
def test_frame_times(trained):
    learned = torch.linspace(-1, 1, trained)
    for time in ("stretch", "sustain"):
        torch.testing.assert_close(frame_times(trained, trained, time), learned)
    assert torch.equal(frame_times(20, trained, "stretch"), torch.linspace(-1, 1, 20))
    longer = frame_times(20, trained, "sustain")
    half = trained // 2
    torch.testing.assert_close(longer[:half], learned[:half])
    torch.testing.assert_close(longer[-half:], learned[-half:])
    assert longer[half:-half].abs().max() < 1e-6


def test_a_shorter_sound_hurries_through_its_middle():
    learned, shorter = torch.linspace(-1, 1, 33), frame_times(17, 33, "sustain")
    torch.testing.assert_close(shorter[:5], learned[:5])
    torch.testing.assert_close(shorter[-5:], learned[-5:])
    torch.testing.assert_close(shorter[4:13].diff(), torch.full((8,), 3 / 16))


def test_wrong_time():
    with pytest.raises(ValueError, match="unknown time 'loop': expected one of stretch, sustain"):
        frame_times(8, 8, "loop")


def test_decode_db():
    grid = torch.zeros(2, 16, 3, 4)
    grid[1, 0] = 100.0
    decoded = fastnca.decode_db(grid)
    assert decoded.shape == (2, 3, 4)
    assert decoded[0].eq(-40.0).all() and decoded[1].eq(0.0).all()


def test_grow_is_the_decoded_rollout():
    model = fastnca.DualSpecTNCA()
    mel_db, linear_db = model.grow(8, num_steps=2)
    mel, linear = model.rollout(*model.seed(8), 2)
    assert torch.equal(mel_db, fastnca.decode_db(mel)[0]) and torch.equal(linear_db, fastnca.decode_db(linear)[0])


MEL, LINEAR = torch.zeros(1, 16, 80, 8), torch.zeros(1, 16, 513, 8)


@pytest.mark.parametrize(
    ("mel", "linear", "error", "words"),
    [
        (MEL[0], LINEAR, ValueError, r"grid_mel must have shape \[N, 16, 80, T\].*got \[16, 80, 8\]"),
        (MEL[:, :15], LINEAR, ValueError, r"grid_mel must have shape.*got \[1, 15, 80, 8\]"),
        (MEL[:, :, :79], LINEAR, ValueError, r"grid_mel must have shape.*got \[1, 16, 79, 8\]"),
        (MEL, LINEAR[:, :, :512], ValueError, r"grid_linear must have shape \[N, 16, 513, T\].*got \[1, 16, 512, 8\]"),
        (MEL[..., :0], LINEAR[..., :0], ValueError, "without an empty axis"),
        (MEL, LINEAR[..., :7], ValueError, "same number of frames, got 8 and 7"),
        (MEL, LINEAR.expand(2, -1, -1, -1), ValueError, "same batch size, got 1 and 2"),
        (MEL.double(), LINEAR, TypeError, "mel must have the weights' dtype torch.float32, got torch.float64"),
        (MEL, LINEAR.to("meta"), ValueError, "linear must be on the weights' device cpu, got meta"),
        (MEL.numpy(), LINEAR, ValueError, r"grid_mel must have shape \[N, 16, 80, T\], got ndarray"),
    ],
)
def test_wrong_grids(mel, linear, error, words):
    with pytest.raises(error, match=words):
        fastnca.DualSpecTNCA()(mel, linear)


@pytest.mark.parametrize("num_steps", [-1, 1.5, "3"])
def test_wrong_num_steps(num_steps):
    with pytest.raises(ValueError, match="num_steps must be an integer of at least 0"):
        fastnca.DualSpecTNCA().rollout(MEL, LINEAR, num_steps)


@pytest.mark.parametrize("checkpoint_every", [0, -2, 2.0])
def test_wrong_checkpoint_every(checkpoint_every):
    with pytest.raises(ValueError, match="checkpoint_every must be None or an integer of at least 1"):
        fastnca.DualSpecTNCA().rollout(MEL, LINEAR, 1, checkpoint_every=checkpoint_every)


@pytest.mark.parametrize("n_frames", [0, -8, 2.5])
def test_wrong_n_frames(n_frames):
    with pytest.raises(ValueError, match="n_frames must be an integer of at least 1"):
        fastnca.DualSpecTNCA().seed(n_frames)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backend": "cuda"}, "unknown backend 'cuda': expected one of auto, "),
        ({"precision": "fp8"}, "unknown precision 'fp8'"),
        ({"num_channels": 1}, "num_channels must be at least 2"),
        ({"n_mels": 0}, "at least 1"),
        ({"coordinates": [("tan", "f", 0)]}, "a coordinate is"),
        ({"coordinates": [("sin", "f", 0)] * 15}, "do not fit into 14 hidden channels"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(ValueError, match=words):
        fastnca.DualSpecTNCA(**options)


def test_a_named_backend_that_cannot_run_says_why():
    model = fastnca.DualSpecTNCA(backend="reference", precision="bf16")
    with pytest.raises(RuntimeError, match="backend 'reference' cannot run: .*precision='bf16'"):
        model(MEL, LINEAR)


def test_auto_names_what_it_takes():
    taken = fastnca.DualSpecTNCA().backend
    assert backends.why_not(taken) is None
    assert taken == "cpu" or backends.why_not("cpu") is not None
    assert fastnca.DualSpecTNCA().double().backend == "reference"
    assert fastnca.DualSpecTNCA(num_channels=12).backend == "reference"


# ---- a module that is changed, wrapped or called in other ways

CHANGES = {
    "another activation": lambda model: model.update_mlp.__setitem__(1, nn.GELU()),
    "a layer more": lambda model: model.update_mlp.append(nn.Identity()),
    "another module": lambda model: setattr(model, "update_mlp", nn.Identity()),
    "a hook": lambda model: model.update_mlp[0].register_forward_hook(print),
    "a hook on all": lambda model: model.update_mlp.register_forward_pre_hook(print),
    "a backward hook": lambda model: model.update_mlp[2].register_full_backward_hook(print),
    "a forward of its own": lambda model: setattr(model.update_mlp[0], "forward", lambda x: x),
    "pruned": lambda model: prune.l1_unstructured(model.update_mlp[0], "weight", 0.5),
    "context: another layer": lambda model: setattr(model.context, "rows", nn.Identity()),
    "context: a hook": lambda model: model.context.columns.register_forward_hook(print),
}


def small_model(**options):
    torch.manual_seed(0)
    model = fastnca.DualSpecTNCA(n_mels=5, n_linear=7, context=Places(), growth=True, **options)
    with torch.no_grad():
        model.update_mlp[4].weight.normal_(std=0.05)
    return model


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_the_kernels_would_not_see_is_refused(change, backend, tmp_path):
    model = small_model(backend=backend)
    grids = model.seed(6)
    change(model)
    with pytest.raises(RuntimeError, match="put back the layers that the model was made with"):
        model.rollout(*grids, 2)
    with pytest.raises(RuntimeError, match="put back the layers that the model was made with"):
        fastnca.save_model(tmp_path / "model", model)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("layer", ["update_mlp.0", "update_mlp.4", "context.rows"])
def test_parametrized_weights_are_those_that_run_and_are_saved(layer, tmp_path):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2.0 * weight

    model, plain = small_model(), small_model()
    parametrize.register_parametrization(model.get_submodule(layer), "weight", Doubled())
    with torch.no_grad():
        plain.get_submodule(layer).weight.mul_(2.0)
    fastnca.save_model(tmp_path / "model", model)
    loaded, _ = fastnca.load_model(tmp_path / "model")
    expected = plain.rollout(*plain.seed(6), 6)
    for grown in (model.rollout(*model.seed(6), 6), loaded.rollout(*loaded.seed(6), 6)):
        assert all(torch.equal(*pair) for pair in zip(grown, expected, strict=True))


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, lambda model: torch.compile(nn.DataParallel(model))])
def test_a_wrapped_model_is_saved_as_the_model_inside(wrap, tmp_path):
    model = small_model()
    fastnca.save_model(tmp_path / "model", wrap(model))
    loaded, _ = fastnca.load_model(tmp_path / "model")
    assert all(torch.equal(*pair) for pair in zip(loaded.weights, model.weights, strict=True))


def test_another_module_is_not_saved(tmp_path):
    with pytest.raises(TypeError, match="expected a DualSpecTNCA, got Linear"):
        fastnca.save_model(tmp_path / "model", nn.Linear(1, 1))


def test_forward_is_a_rollout():
    model = small_model()
    grids = model.seed(6)
    expected = model.rollout(*grids, 3, checkpoint_every=2)
    parameters = dict(model.named_parameters())
    called = torch.func.functional_call(model, parameters, grids, {"num_steps": 3, "checkpoint_every": 2})
    for grown in (model(*grids, 3), called):
        assert all(torch.equal(*pair) for pair in zip(grown, expected, strict=True))


def averaged_gradient(rank, folder):
    """What one of two processes does: the gradient of its own sound, after DDP has averaged it."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = small_model()
    wrapped = nn.parallel.DistributedDataParallel(model)
    mel, linear = wrapped(*model.seed(6), num_steps=3 + rank)
    (mel.square().sum() + linear.square().sum()).backward()
    torch.save([parameter.grad for parameter in model.parameters()], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_processes_average_their_gradients(tmp_path):
    torch.multiprocessing.spawn(averaged_gradient, (str(tmp_path),), nprocs=2)
    alone = []
    for num_steps in (3, 4):
        model = small_model()
        sum(grid.square().sum() for grid in model(*model.seed(6), num_steps)).backward()
        alone.append([parameter.grad for parameter in model.parameters()])
    for rank in (0, 1):
        for averaged, *gradients in zip(torch.load(tmp_path / f"{rank}.pt"), *alone, strict=True):
            torch.testing.assert_close(averaged, sum(gradients) / 2)


@pytest.mark.parametrize("size", [80.0, "80", None, True + 0.5])
def test_sizes_are_integers(size):
    for name in ("num_channels", "n_mels", "n_linear"):
        with pytest.raises(TypeError, match=f"{name} must be an integer, got"):
            fastnca.DualSpecTNCA(**{name: size})


def test_numpys_integers_are_saved(tmp_path):
    model = fastnca.DualSpecTNCA(num_channels=np.int32(4), n_mels=np.int64(5), n_linear=np.uint8(7))
    fastnca.save_model(tmp_path / "model", model)
    assert fastnca.load_model(tmp_path / "model")[0].config == model.config


CARD = SoundCard(Scale(3.5, -2.0, MelBands(0.0, 8000.0)), 8, 4, "griffinlim", None, "default", 7)


class TestModelFiles:
    @pytest.fixture
    def saved(self, tmp_path):
        torch.manual_seed(3)
        model = fastnca.DualSpecTNCA(n_mels=10, life_mask=False, coordinates=[("sin", "f", 0.5)])
        fastnca.save_model(tmp_path / "model.safetensors", model, CARD)
        return model, tmp_path / "model.safetensors"

    def test_comes_back_whole(self, saved):
        model, path = saved
        loaded, card = fastnca.load_model(path)
        assert loaded.config == model.config and card == CARD
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor)
        assert [entry.name for entry in path.parent.iterdir()] == [path.name]

    def test_without_a_sound(self, tmp_path):
        fastnca.save_model(tmp_path / "rule.safetensors", fastnca.DualSpecTNCA())
        assert fastnca.load_model(tmp_path / "rule.safetensors")[1] is None
        with pytest.raises(ValueError, match="does not say what its grids sound like"):
            fastnca.load(tmp_path / "rule.safetensors")

    def test_version_2_stays_readable(self):
        """A file that fastnca wrote when models got versions; it must be readable for ever."""
        model, card = fastnca.load_model(Path(__file__).parent / "data" / "model_version_2.safetensors")
        assert model.config == {
            "num_channels": 4, "n_mels": 80, "n_linear": 513, "life_mask": True, "context": None, "growth": False,
            "coordinates": [["sin", "f", 0], ["cos", "t", 1]],
        }  # fmt: skip
        assert card == SoundCard(Scale(1.5, 20.25, MelBands(0.0, 11025.0)), 88, 96, "auto", None, "default", 285)
        assert all(torch.isfinite(grid).all() for grid in model.grow(8, 4))
        assert sum(tensor.abs().sum().item() for tensor in model.state_dict().values()) == pytest.approx(636.6023)

    def test_a_newer_version_is_refused(self, tmp_path):
        path = tmp_path / "model.safetensors"
        content = {"config": {}, "sound": None, "something": "new"}
        write_safetensors(path, fastnca.DualSpecTNCA().state_dict(), "model", MODEL_VERSION + 1, content)
        with pytest.raises(ValueError, match=f"has version {MODEL_VERSION + 1}, and this fastnca reads .*: update it"):
            fastnca.load_model(path)

    def test_the_form_of_before_is_refused(self, tmp_path):
        header = {"fastnca": json.dumps({"format": "fastnca-model-1", "config": {}, "sound": {}})}
        save_file(fastnca.DualSpecTNCA().state_dict(), tmp_path / "old.safetensors", header)
        with pytest.raises(ValueError, match="format fastnca-model-1, and can no longer be read; grow the sound again"):
            fastnca.load_model(tmp_path / "old.safetensors")

    def test_another_kind_is_named(self, tmp_path):
        write_safetensors(tmp_path / "c.safetensors", {}, "checkpoint", 5, {})
        with pytest.raises(ValueError, match=r"is a checkpoint file of fastnca \(version 5\); expected a model file"):
            fastnca.load_model(tmp_path / "c.safetensors")

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no such file"):
            fastnca.load_model(tmp_path / "model.safetensors")

    @pytest.mark.parametrize("keep", [0, 4, 100, -1])
    def test_truncated(self, saved, keep):
        path = saved[1]
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(ValueError, match="damaged or not a safetensors file"):
            fastnca.load_model(path)

    def test_pickle_is_refused(self, tmp_path):
        torch.save(fastnca.DualSpecTNCA().state_dict(), tmp_path / "model.pt")
        with pytest.raises(ValueError, match="damaged or not a safetensors file"):
            fastnca.load_model(tmp_path / "model.pt")

    def test_foreign_safetensors(self, tmp_path):
        save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match="was not written by fastnca"):
            fastnca.load_model(tmp_path / "other.safetensors")

    def test_weights_that_do_not_fit_the_configuration(self, tmp_path):
        path = tmp_path / "model.safetensors"
        content = {"config": {"num_channels": 8}, "sound": None}
        write_safetensors(path, fastnca.DualSpecTNCA().state_dict(), "model", MODEL_VERSION, content)
        with pytest.raises(ValueError, match="do not fit"):
            fastnca.load_model(path)

    def test_a_failed_write_leaves_the_old_file(self, saved, monkeypatch):
        model, path = saved
        before = path.read_bytes()

        def full_disk(descriptor):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("fastnca.files.os.fsync", full_disk)
        with pytest.raises(OSError, match="No space left"):
            fastnca.save_model(path, fastnca.DualSpecTNCA())
        assert path.read_bytes() == before
        assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_import_is_light():
    """What a command needs is imported when it is needed: the rest would be seconds."""
    script = "import sys; import torch; alone = set(sys.modules); import fastnca; print(*set(sys.modules) - alone)"
    added = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    heavy = {"triton", "librosa", "matplotlib", "bigvgan", "soundfile", "rich", "typer", "auraloss", "safetensors"}
    assert "fastnca.model" in added and not heavy & set(added)
    assert not [name for name in added if name.startswith("torch._dynamo")]


def test_sounds_stay_on_the_cpu_whatever_the_default_device(tmp_path):
    """A notebook's torch.set_default_device("cuda"), for which "meta" stands here."""
    sound = synthesize_bowed_string(0.1)
    settings = RunSettings(epochs=1, vocoder="griffinlim", pitch="none")

    def work():
        grown = list(Growth(sound, settings).events())[-1].result
        grown.model.save(tmp_path / "model.safetensors")
        again = fastnca.load(tmp_path / "model.safetensors").grow(n_frames=12, num_steps=3)
        return {key: value for key, value in grown.metrics.items() if "seconds" not in key}, again.samples

    expected_metrics, expected = work()
    with torch.device("meta"):
        found_metrics, found = work()
    assert found_metrics == expected_metrics
    assert (found == expected).all()

"""The stage: both grids of one sound as they live, and everything that a person can do to them."""

import contextlib
import itertools
import math
import threading
from bisect import bisect_right
from dataclasses import dataclass, replace

import torch

from ..automaton import reference
from ..automaton.rule import ALPHA, VALUE
from ..model import decode_db
from ..sound.convention import DB_RANGE, HOP_LENGTH, SAMPLE_RATE, on_cpu
from ..sound.spectrogram import linear_centers, mel_centers
from ..sound_model import MIN_FRAMES, SETTLING_STEPS, SoundModel

GRIDS = ("mel", "linear")
SEED_SPACING = 12  # cells between many seeds, as in the default recipe
GROWN_STRIDE = 4  # steps between two ages that can be gone back to, of a mixture that grows all at once
MAX_SECONDS = 30.0  # of a sound on the stage
MEMORY = 256 * 2**20  # bytes of states that can be gone back to, by age, and as many to undo
MAX_STATES = 64
BRUSH_DB = 3.0  # of one touch
NOISE = 0.5  # standard deviation, in the state's own units
_versions = itertools.count(1)
BRUSHES = ("erase", "noise", "quieter", "louder", "protect", "unprotect")


@dataclass(frozen=True, eq=False)
class Mixture:
    """What lies between sounds of a space: how it is made, {"shares": {name: share}} or {"glide": [name, name]}, and
    the SoundModel that it grows by."""

    recipe: dict
    model: SoundModel


@dataclass(frozen=True, eq=False)
class Moment:
    """All that there is to go back to: the grids [1, C, bands, T], never changed in place; which cells may not change,
    [bands, T] each, or None; their age in steps; the shape that they grow in; and, of a space, by which mixture."""

    grids: tuple
    held: tuple | None
    age: int
    semitones: float
    time: str
    mixture: Mixture | None = None

    @property
    def n_frames(self):
        return self.grids[0].shape[3]

    @property
    def nbytes(self):
        return sum(grid.nbytes for grid in self.grids)


class Stage:
    """The living grids of one sound. Any thread may call anything at any time.

    Args:
        model: the SoundModel whose rule they live by. target: the recording, a DualSpectrogram, or None.
        mixture: of a space, in the place of both: what grows first, see :meth:`mix`.

    A place is (band, time), both shares of the grid from 0 to 1. Whatever is asked for and cannot be raises ValueError.
    """

    def __init__(self, model=None, target=None, mixture=None):
        self._learned, self.target = model, target
        self.version = next(_versions)  # another number whenever something that can be seen has changed, on any stage
        self.touched = 0  # the age at which a person last did something
        self.wounded = None  # (version, Moment) right after the last stroke that took something away
        self.now = None
        self._lock = threading.RLock()
        self._past = {}  # {age: Moment}, thinned out
        self._undo, self._redo = [], []
        self._stroke = self._last_point = None
        self._tables = self._seen = None
        self._begin(mixture)

    @on_cpu
    def _begin(self, mixture):
        model = mixture.model if mixture else self._learned
        n_frames = model.card.n_frames
        self.now = Moment(model.automaton.seed(n_frames, SEED_SPACING), None, 0, 0.0, "stretch", mixture)
        self._note()

    # What lives

    @property
    def model(self):
        """The SoundModel whose rule they live by now."""
        return self._model_of(self.now)

    def _model_of(self, moment):
        return moment.mixture.model if moment.mixture else self._learned

    def learn(self, model):
        """From now on they live by this SoundModel, of the same sound."""
        with self._lock:
            self._learned, self._tables = model, None

    @property
    def steps_to_fill(self):
        return self.model.automaton.steps_to_fill(self.now.n_frames)

    @property
    def oldest(self):
        with self._lock:
            return max(self.now.age, *self._past, 0)

    def _plan(self, moment, semitones=0.0):
        """The Plan of a Moment, so many semitones higher."""
        model = self._model_of(moment)
        return model.plan(moment.n_frames, moment.age, moment.time, self._hertz(model, moment.semitones + semitones))

    @staticmethod
    def _hertz(model, semitones):
        if semitones == 0:
            return None
        places = model.automaton.places
        if not (places and places.pitch_hz):
            raise ValueError("the sound has no pitch that stays, so it cannot grow at another one")
        return places.pitch_hz * 2.0 ** (semitones / 12.0)

    @on_cpu
    @torch.no_grad()
    def live(self, num_steps=1):
        """So many steps on from here; what was ahead after going back is forgotten."""
        with self._lock:
            self._past = {age: moment for age, moment in self._past.items() if age <= self.now.age}
            self.now = self._lived(self.now, num_steps)
            self._note()

    def _lived(self, moment, num_steps):
        if num_steps <= 0:
            return moment
        automaton = self._model_of(moment).automaton
        if self._tables is None:
            plan = self._plan(moment)
            self._tables = (automaton.tables(plan.n_frames, plan.times, plan.pitch_hz),)
        grids, tables = moment.grids, self._tables[0]
        for steps in [num_steps] if moment.held is None else [1] * num_steps:
            grown = automaton.rollout(*grids, steps, precision="fp32", tables=tables)
            if moment.held is not None:
                grown = tuple(torch.where(held, old, new) for held, old, new in zip(moment.held, grids, grown))
            grids = grown
        return replace(moment, grids=grids, age=moment.age + num_steps)

    def _note(self):
        """Keep what lives now to go back to, and of the past no more than the memory allows: every second is dropped
        until it fits."""
        self.version = next(_versions)
        self._seen = None
        self._past[self.now.age] = self.now
        while len(self._past) > max(4, min(MAX_STATES, MEMORY // self.now.nbytes)):
            ages = sorted(self._past)
            self._past = {
                age: self._past[age] for age in ages if age in (ages[0], ages[-1]) or ages.index(age) % 2 == 0
            }

    @torch.no_grad()
    def scrub(self, age):
        """Go to an age between 0 and :attr:`oldest`; the ages after it stay until life goes on from here."""
        with self._lock:
            age = min(max(0, age), self.oldest)
            ages = sorted(self._past)
            near = self._past[ages[max(0, bisect_right(ages, age) - 1)]]
            if any(getattr(near, what) != getattr(self.now, what) for what in ("n_frames", "semitones", "mixture")):
                self._tables = None
            self.now = near
            self.now = self._lived(near, age - near.age)
            self.version = next(_versions)
            self._seen = None

    # What a person does

    def undo(self):
        self._turn(self._undo, self._redo)

    def redo(self):
        self._turn(self._redo, self._undo)

    def _turn(self, moments, others):
        with self._lock:
            if moments:
                others.append(self.now)
                moment = moments.pop()
                if moment.n_frames != self.now.n_frames or moment.mixture is not self.now.mixture:
                    self._past = {}
                self._go_to(moment)

    def _go_to(self, moment):
        self._tables = None
        self._past = {age: past for age, past in self._past.items() if age < moment.age}
        self.now = moment
        self.touched, self._stroke = moment.age, None
        self._note()

    @contextlib.contextmanager
    def _deed(self, stroke=None):
        """What a person does in this block, to :attr:`now`, can be undone, deeds of one stroke together."""
        with self._lock:
            before = self.now
            yield
            if stroke is None or stroke != self._stroke:
                self._undo.append(before)
                while len(self._undo) > max(2, min(MAX_STATES, MEMORY // before.nbytes)):
                    del self._undo[0]
            self._redo.clear()
            after, self._stroke = self.now, stroke
            self.now = before
            self._go_to(after)
            self._stroke = stroke

    @on_cpu
    def restart(self, many=True, empty=False):
        """Begin again at age 0: from many seeds, from one in the middle of each grid, or with nothing that lives."""
        with self._deed():
            grids = self._seeds(self.now.n_frames, self.now.time, many)
            if empty:
                grids = tuple(torch.zeros_like(grid) for grid in grids)
            self.now = replace(self.now, grids=self._keep_held(grids), age=0)
            self._past = {}

    def _seeds(self, n_frames, time, many):
        plan = self.model.plan(n_frames, 0, time)
        return self.model.automaton.seed(n_frames, SEED_SPACING if many else None, plan.times)

    def _keep_held(self, grids):
        if self.now.held is None:
            return tuple(grids)
        return tuple(torch.where(held, old, new) for held, old, new in zip(self.now.held, self.now.grids, grids))

    def plant(self, grid, place):
        """A live cell at that place of a grid, and in the other grid at the same time and frequency."""
        with self._deed():
            self._change(self._disk(grid, [_checked_place(place)], 0.0, 0.0), self._planted)

    @staticmethod
    def _planted(grid):
        grid = torch.zeros_like(grid)
        grid[:, ALPHA] = 1.0
        return grid

    def brush(self, grid, points, size, size_time, mode, both=True, stroke=None):
        """Draw over a grid.

        Args:
            grid: "mel" or "linear". points: places, joined by lines. size, size_time: the brush's radius as a share of
                the grid's height and width. mode: one of BRUSHES. both: the other grid too, at the same times and
                frequencies. stroke: deeds of one stroke are undone together.
        """
        if mode not in BRUSHES:
            raise ValueError(f"unknown brush {mode!r}: expected one of {', '.join(BRUSHES)}")
        points = [_checked_place(place) for place in points]
        if not points:
            raise ValueError("a brush needs at least one point")
        for radius in (size, size_time):
            if not (isinstance(radius, (int, float)) and 0 <= radius <= 1):
                raise ValueError(f"a brush's size is a share of the grid from 0 to 1, got {radius!r}")
        with self._deed(stroke):
            if stroke is not None and self._stroke == stroke and self._last_point:
                points = [self._last_point, *points]
            self._last_point = points[-1]
            masks = self._disk(grid, _joined(points, max(size, 0.002), max(size_time, 0.002)), size, size_time, both)
            if mode in ("protect", "unprotect"):
                self._hold(masks, mode == "protect")
                return
            self._change(masks, {"erase": torch.zeros_like, "noise": _noisy}.get(mode) or _louder(mode))
        if mode in ("erase", "noise", "quieter"):
            self.wounded = self.version, self.now

    def region(self, action, grid="mel", begin=None, end=None):
        """What a rectangle of a grid, and the same times and frequencies of the other, has to do.

        action: "regrow" erases it, and from now on nothing else may change; "protect": it may not change; "clear":
        everything may change again. begin, end: two places, its corners.
        """
        if action not in ("regrow", "protect", "clear"):
            raise ValueError(f"unknown action {action!r}: expected regrow, protect or clear")
        if action == "clear":
            with self._deed():
                self.now = replace(self.now, held=None)
            return
        index = _grid_index(grid)
        corners = [_checked_place(place) for place in (begin, end)]
        bands, frames = (sorted(sides) for sides in zip(*corners))
        _, _, height, width = self.now.grids[index].shape
        mask = torch.zeros(height, width, dtype=torch.bool)
        mask[_cells(bands, height), _cells(frames, width)] = True
        masks = self._both(mask, index)
        with self._deed():
            if action == "protect":
                self._hold(masks, True)
            else:
                self.now = replace(self.now, held=None)
                self._change(masks, torch.zeros_like)
                self.now = replace(self.now, held=tuple(~mask for mask in masks))
        if action == "regrow":
            self.wounded = self.version, self.now

    @on_cpu
    def shape(self, semitones=None, seconds=None, time=None):
        """Another pitch bends what lives; another length or way in time begins again, from many seeds."""
        with self._lock:
            now = self.now
            semitones = now.semitones if semitones is None else _number("semitones", semitones, -48, 48)
            n_frames, time = now.n_frames, time or now.time
            if seconds is not None:
                least = MIN_FRAMES * HOP_LENGTH / SAMPLE_RATE
                n_frames = round(_number("seconds", seconds, least, MAX_SECONDS) * SAMPLE_RATE / HOP_LENGTH)
            self.model.plan(n_frames, 0, time, self._hertz(self.model, semitones))  # raises where it cannot be
            if (semitones, n_frames, time) == (now.semitones, now.n_frames, now.time):
                return
            with self._deed():
                self.now = replace(now, semitones=semitones, time=time)
                if (n_frames, time) != (now.n_frames, now.time):
                    self.now = replace(self.now, grids=self._seeds(n_frames, time, True), held=None, age=0)
                    self._past = {}

    @on_cpu
    @torch.no_grad()
    def mix(self, mixture, stroke=None):
        """Another Mixture of the same space grows, in the shape of the last: as many semitones higher, where it has a
        pitch, and as many times as long. ``stroke``: as in :meth:`brush`.

        Who moves a slider waits for it, so it grows at once and from a lattice of seeds: life is everywhere after
        SEED_SPACING steps and settled after SETTLING_STEPS more, 44 in all. From one cell it would be about 290.
        """
        with self._lock:
            model, now = mixture.model, self.now
            n_frames = round(model.card.n_frames * now.n_frames / self.model.card.n_frames)
            n_frames = min(max(MIN_FRAMES, n_frames), int(MAX_SECONDS * SAMPLE_RATE / HOP_LENGTH))
            places = model.automaton.places
            semitones = now.semitones if places and places.pitch_hz else 0.0
            plan = model.plan(n_frames, None, now.time, self._hertz(model, semitones), SEED_SPACING)
            grids = model.automaton.seed(n_frames, plan.at, plan.times)
            with self._deed(stroke):
                self.now = Moment(grids, None, 0, semitones, now.time, mixture)
                self._past, self._tables = {}, None
                while self.now.age < plan.num_steps:
                    self._past[self.now.age] = self.now
                    self.now = self._lived(self.now, min(GROWN_STRIDE, plan.num_steps - self.now.age))

    def put(self, moment):
        """Let what was kept live on."""
        with self._deed():
            self.now = moment
            self._past = {}

    # Masks: cells [bands, T] of each grid, on the CPU

    def _disk(self, grid, places, size, size_time, both=True):
        index = _grid_index(grid)
        _, _, height, width = self.now.grids[index].shape
        mask = torch.zeros(height, width, dtype=torch.bool)
        for band, frame in places:
            y, x = (min(int(share * cells), cells - 1) for share, cells in ((band, height), (frame, width)))
            mask[y, x] = True
            ry, rx = size * height, size_time * width
            if ry < 1 and rx < 1:
                continue
            rows = slice(max(0, math.floor(y - ry)), math.ceil(y + ry) + 1)
            columns = slice(max(0, math.floor(x - rx)), math.ceil(x + rx) + 1)
            dy = (torch.arange(height)[rows, None] + 0.5 - band * height) / max(ry, 0.5)
            dx = (torch.arange(width)[columns] + 0.5 - frame * width) / max(rx, 0.5)
            mask[rows, columns] |= dy**2 + dx**2 <= 1
        return self._both(mask, index, both)

    def _both(self, mask, index, both=True):
        """The masks of both grids: of the other, the bands whose nearest in this one are in ``mask``."""
        bands = self.model.card.scale.bands
        heights = [grid.shape[2] for grid in self.now.grids]
        mel, linear = mel_centers(heights[0], bands), linear_centers(heights[1], bands)
        own, other = (mel, linear) if index == 0 else (linear, mel)
        nearest = (other[:, None] - own).abs().argmin(dim=1)
        masks = [mask, mask[nearest] if both else torch.zeros(len(other), mask.shape[1], dtype=torch.bool)]
        if both and mask.any() and not masks[1].any():  # a few narrow bands, between two of the other grid
            middle = own[mask.any(dim=1)].mean()
            masks[1][(other - middle).abs().argmin()] = mask.any(dim=0)
        return masks if index == 0 else masks[::-1]

    def _change(self, masks, change):
        grids = []
        for index, (grid, mask) in enumerate(zip(self.now.grids, masks)):
            mask = mask.to(grid.device)
            if self.now.held is not None:
                mask = mask & ~self.now.held[index]
            grids.append(torch.where(mask, change(grid), grid))
        self.now = replace(self.now, grids=tuple(grids))

    def _hold(self, masks, hold):
        grids, held = self.now.grids, self.now.held
        if held is None:
            held = tuple(torch.zeros(grid.shape[2:], dtype=torch.bool, device=grid.device) for grid in grids)
        masks = [mask.to(grid.device) for mask, grid in zip(masks, grids)]
        held = tuple(old | mask if hold else old & ~mask for old, mask in zip(held, masks))
        self.now = replace(self.now, held=held if any(mask.any() for mask in held) else None)

    # What is seen and heard

    @on_cpu
    @torch.no_grad()
    def report(self):
        """The numbers of what lives, as the page shows them."""
        with self._lock:
            if self._seen is None:
                now = self.now
                errors = [None, None]
                if self.target is not None and now.n_frames == self.target.n_frames and now.semitones == 0:
                    levels = self.model.automaton.levels(now.grids)
                    pairs = zip(levels, (self.target.mel_db, self.target.linear_db))
                    errors = [(level - target).abs().mean().item() for level, target in pairs]
                cells = sum(grid[0, 0].numel() for grid in now.grids)
                living = sum(int(reference.alive(grid).sum()) for grid in now.grids)
                held = 0 if now.held is None else sum(int(mask.sum()) for mask in now.held)
                self._seen = {
                    "age": now.age,
                    "n_frames": now.n_frames,
                    "mel_error_db": _finite(errors[0]),
                    "linear_error_db": _finite(errors[1]),
                    "alive": living / cells,
                    "protected": held / cells,
                }
            more = {"oldest": self.oldest, "can_undo": bool(self._undo), "can_redo": bool(self._redo)}
            shape = {
                "semitones": self.now.semitones,
                "seconds": round(self.now.n_frames * HOP_LENGTH / SAMPLE_RATE, 3),
                "time": self.now.time,
            }
            return {**self._seen, **more, "wounded": self.wounded is not None}, shape

    @on_cpu
    @torch.no_grad()
    def picture(self, view="level", channel=2):
        """(bytes, version, age, frames): one byte for each cell, mel then linear, the lowest band first. 0 to 255 are
        -80 to 0 dB, or an alpha of 0 to 1, or a hidden channel's -2 to 2."""
        with self._lock:
            now, version = self.now, self.version
        if view == "level":
            return level_bytes(self.model.automaton.levels(now.grids)), version, now.age, now.n_frames
        if view == "alpha":
            parts = [grid[0, ALPHA].clamp(0, 1) for grid in now.grids]
        elif view == "hidden" and 2 <= channel < now.grids[0].shape[1]:
            parts = [(grid[0, channel].clamp(-2, 2) + 2) / 4 for grid in now.grids]
        else:
            raise ValueError(
                f"unknown view {view!r} or channel {channel!r}: expected level, alpha, or hidden with 2...15"
            )
        return _bytes(parts), version, now.age, now.n_frames

    @on_cpu
    @torch.no_grad()
    def heard(self, moment=None, semitones=0.0):
        """What lives, or a Moment, decoded -> GrownSound; at another pitch after it has lived there for a while."""
        moment = moment or self.now
        model, grids = self._model_of(moment), moment.grids
        if semitones:
            plan = self._plan(moment, semitones)
            tables = model.automaton.tables(plan.n_frames, plan.times, plan.pitch_hz)
            grids = model.automaton.rollout(*grids, SETTLING_STEPS, precision="fp32", tables=tables)
        return model.decode(*model.automaton.levels(grids))

    def stages(self, count):
        """At most so many Moments of the past, evenly spread over their ages, the present one last."""
        with self._lock:
            past = [moment for age, moment in sorted(self._past.items()) if age < self.now.age]
            past = [moment for moment in past if moment.n_frames == self.now.n_frames]
            stride = max(1, math.ceil(len(past) / max(1, count - 1)))
            return [*past[::-1][::stride][::-1], self.now]


def level_bytes(levels):
    """Levels (mel_db [80, T], linear_db [513, T]) as one byte for each cell, see ``Stage.picture``."""
    return _bytes([level / DB_RANGE + 1 for level in levels])


def _bytes(parts):
    return b"".join((255 * part.cpu()).round().clamp(0, 255).to(torch.uint8).numpy().tobytes() for part in parts)


def _finite(number):
    return number if number is None or math.isfinite(number) else None


def _number(name, value, low, high):
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{name} must be a number from {low:.3g} to {high:.3g}, got {value!r}")
    return float(value)


def _checked_place(place):
    if not (isinstance(place, (list, tuple)) and len(place) == 2 and all(isinstance(x, (int, float)) for x in place)):
        raise ValueError(f"a place is [band, time], two shares of the grid, got {place!r}")
    if not all(math.isfinite(x) for x in place):
        raise ValueError(f"a place is two finite numbers, got {place!r}")
    return tuple(min(max(float(x), 0.0), 1.0) for x in place)


def _grid_index(grid):
    if grid not in GRIDS:
        raise ValueError(f"unknown grid {grid!r}: expected mel or linear")
    return GRIDS.index(grid)


def _cells(sides, size):
    """The cells between two shares of a side."""
    begin, end = sides
    begin = min(int(begin * size), size - 1)
    return slice(begin, max(math.ceil(end * size), begin + 1))


def _joined(points, size, size_time):
    """The points and enough between them for a brush of that size to leave no gaps."""
    joined = [points[0]]
    for (y0, x0), (y1, x1) in zip(points, points[1:]):
        count = max(1, math.ceil(2 * max(abs(y1 - y0) / size, abs(x1 - x0) / size_time)))
        joined += [(y0 + (y1 - y0) * i / count, x0 + (x1 - x0) * i / count) for i in range(1, count + 1)]
    return joined


def _noisy(grid):
    noise = NOISE * torch.randn_like(grid)
    noise[:, ALPHA] = 0.0
    return grid + noise


def _louder(mode):
    change = BRUSH_DB if mode == "louder" else -BRUSH_DB

    def louder(grid):
        grid = grid.clone()
        level = (decode_db(grid) + change + DB_RANGE / 2) / (DB_RANGE / 2)
        grid[:, VALUE] = torch.atanh(level.clamp(-0.999, 0.999))
        return grid

    return louder

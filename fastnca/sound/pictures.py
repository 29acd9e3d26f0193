"""Pictures of dual spectrograms, still and moving."""

import io
import os
import shutil
import subprocess
import warnings
from dataclasses import dataclass

from ..files import atomic_write
from .convention import DB_RANGE, HOP_LENGTH, N_MELS, SAMPLE_RATE

GIF_FRAMES_PER_SECOND = 12


def save_picture(path, rows):
    """Write a PNG with mel (left) and linear (right) spectrograms, one row per entry of ``rows``. Returns the paths of
    what was written: none, after a warning, where it could not be drawn.

    ``rows`` is a list of (title, DualSpectrogram); axes in s and Hz, colors from -80 to 0 dB in every picture.
    """
    return _write(path, _drawn(path, _draw_spectrograms, rows))


def _drawn(path, draw, *arguments):
    """What ``draw`` gives by matplotlib's own defaults, whatever a notebook's MPLBACKEND or the user's matplotlibrc
    asks for. What cannot be drawn is a warning, and None: the sound is what counts."""
    windows = os.environ.pop("MPLBACKEND", None)  # matplotlib cannot be imported where it does not know the name
    try:
        from matplotlib import style

        with style.context("default"):
            return draw(*arguments)
    except Exception as error:  # noqa: BLE001 (fonts, colors, memory: all that can go wrong in drawing)
        warnings.warn(f"{path} could not be drawn: {' '.join(str(error).split())}", stacklevel=3)
        return None
    finally:
        if windows is not None:
            os.environ["MPLBACKEND"] = windows


def _write(path, png):
    if png is None:
        return []
    with atomic_write(path) as file:
        file.write(png)
    return [path]


def _png(figure):
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=100)
    return png.getvalue()


def _figure(size):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw_spectrograms(rows):
    import librosa.display
    import numpy as np

    figure = _figure((13, 0.6 + 3.6 * len(rows)))
    axes = figure.subplots(len(rows), 2, squeeze=False)
    for (title, spectrogram), row_axes in zip(rows, axes, strict=True):
        mel_db, linear_db, bands = spectrogram.mel_db, spectrogram.linear_db, spectrogram.scale.bands
        for name, values, axis_scale, axis in (
            (f"mel, {len(mel_db)} bands", mel_db, "mel", row_axes[0]),
            (f"linear, {len(linear_db)} bins", linear_db, "linear", row_axes[1]),
        ):
            image = librosa.display.specshow(
                np.asarray(values),
                sr=SAMPLE_RATE,
                hop_length=HOP_LENGTH,
                fmin=bands.fmin,
                fmax=bands.fmax,
                x_axis="time",
                y_axis=axis_scale,
                vmin=-DB_RANGE,
                vmax=0.0,
                cmap="magma",
                ax=axis,
            )
            axis.set(title=f"{title}: {name}", xlabel="time (s)", ylabel="frequency (Hz)")
            figure.colorbar(image, ax=axis, format="%.0f dB")
    return _png(figure)


def save_map(path, places):
    """Write a PNG of sounds in a plane: ``places`` is {name: (x, y)}. Returns the paths of what was written."""
    return _write(path, _drawn(path, _draw_map, places))


def _draw_map(places):
    figure = _figure((9, 9))
    axis = figure.subplots()
    axis.scatter(*zip(*places.values()), color="tab:purple")
    for name, place in places.items():
        axis.annotate(name, place, xytext=(4, 4), textcoords="offset points", fontsize=8, parse_math=False)
    axis.set(title="The sounds by their codes: first two principal components", aspect="equal", xticks=(), yticks=())
    axis.margins(0.1)
    return _png(figure)


def save_growth(path, pictures):
    """Write a growth as an animated GIF, and as an MP4 beside it where ffmpeg is at hand: levels above, alpha (life)
    below, mel on the left and linear on the right. Returns the paths of what was written.

    ``pictures`` yields (title, mel_db [80, T], linear_db [513, T], mel_alpha, linear_alpha), with alphas from 0 to 1 in
    the shapes of the levels. The colors are those of :func:`save_picture`, and the last picture stays for two seconds.
    Of the rest none is taken where one cannot be drawn.
    """
    figure, images, drawn, palette, colored = None, None, [], None, []
    ffmpeg = _find_ffmpeg()

    def draw(title, *panels):
        import numpy as np
        from PIL import Image

        nonlocal figure, images, palette
        if figure is None:
            figure = _figure((7.2, 4.8))
            images = _empty_panels(figure, panels[0].shape[1])
        figure.suptitle(title)
        for image, values in zip(images, panels, strict=True):
            image.set_data(values)
        figure.canvas.draw()
        figure.set_layout_engine("none")  # laid out once, not again for every picture
        picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3])
        if ffmpeg:
            colored.append(picture.tobytes())
        # The scales beside the panels put every color into the first picture: one palette, and no flicker.
        palette = palette or picture.quantize(255)
        return picture.quantize(palette=palette, dither=Image.Dither.NONE)

    for picture in pictures:
        drawn.append(_drawn(path, draw, *picture))
        if drawn[-1] is None:
            return []
    durations = [1000 // GIF_FRAMES_PER_SECOND] * (len(drawn) - 1) + [2000]
    with atomic_write(path) as file:
        drawn[0].save(file, "GIF", save_all=True, append_images=drawn[1:], duration=durations, loop=0)
    if not ffmpeg:
        return [path]
    movie = path.with_suffix(".mp4")
    with atomic_write(movie) as file:
        _write_movie(ffmpeg, file.name, drawn[0].size, colored + colored[-1:] * (2 * GIF_FRAMES_PER_SECOND))
    return [path, movie]


def _find_ffmpeg():
    """The ffmpeg of imageio-ffmpeg or of the system, or None."""
    try:
        from imageio_ffmpeg import get_ffmpeg_exe

        return get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        return shutil.which("ffmpeg")


def _write_movie(ffmpeg, path, size, frames):
    """``frames``: RGB bytes of pictures of that size (width, height)."""
    command = [ffmpeg, "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "{}x{}".format(*size)]
    command += ["-r", str(GIF_FRAMES_PER_SECOND), "-i", "-", "-pix_fmt", "yuv420p", "-f", "mp4", str(path)]
    result = subprocess.run(command, input=b"".join(frames), capture_output=True, check=False)
    if result.returncode:
        raise OSError(f"ffmpeg could not write {path}: {result.stderr.decode(errors='replace').strip()}")


def _empty_panels(figure, n_frames):
    """The four images (mel and linear level, mel and linear alpha) on their axes."""
    import numpy as np

    axes = figure.subplots(2, 2, sharex=True, sharey="col")
    seconds = n_frames * HOP_LENGTH / SAMPLE_RATE
    heights = (N_MELS, SAMPLE_RATE / 2)
    images = []
    for row, (what, low, high, colors) in zip(axes, (("level, dB", -DB_RANGE, 0, "magma"), ("alpha", 0, 1, "gray"))):
        for axis, name, height in zip(row, ("mel", "linear"), heights):
            image = axis.imshow(
                np.zeros((1, 1)), cmap=colors, vmin=low, vmax=high, origin="lower", aspect="auto",
                interpolation="nearest", extent=(0, seconds, 0, height),
            )  # fmt: skip
            axis.set_title(f"{name}: {what}", fontsize="medium")
            images.append(image)
        figure.colorbar(image, ax=row)
    axes[0, 0].set_ylabel("mel band")
    axes[1, 0].set_ylabel("mel band")
    for axis in axes[:, 1]:
        axis.set_ylabel("frequency (Hz)")
    for axis in axes[1]:
        axis.set_xlabel("time (s)")
    return images


@dataclass(frozen=True, eq=False)
class LifePicture:
    """What :func:`save_life` draws.

    errors: {age in steps: (mel error, linear error) in dB}, an error None where it is not finite. full: the age at
    which life filled the grids, or None. wounded_at: the age of the wounds. growth, wound: panels from left to right,
    (title, (mel_db [80, T], linear_db [513, T])), NaN where nothing lives. wound_name: which wound it is.
    """

    errors: dict
    full: int | None
    wounded_at: int
    growth: list
    wound_name: str
    wound: list


def save_life(path, life):
    """Write a PNG of a LifePicture: the errors over age, and below them the growth and one wound, mel over linear.
    Returns the paths of what was written, as :func:`save_picture`."""
    return _write(path, _drawn(path, _draw_life, life))


def _draw_life(life):
    import numpy as np
    from matplotlib import colormaps

    figure = _figure((13, 13))
    top, *below = figure.subfigures(3, 1, height_ratios=(3, 4, 4))

    axis = top.subplots()
    ages = sorted(age for age in life.errors if age > 0)
    for index, (name, color) in enumerate((("mel", "tab:orange"), ("linear", "tab:purple"))):
        errors = [np.nan if life.errors[age][index] is None else life.errors[age][index] for age in ages]
        axis.plot(ages, errors, color=color, label=name)
    for age, name, style in ((life.full, "full of life", ":"), (life.wounded_at, "wounded", "--")):
        if age:
            axis.axvline(age, color="gray", linewidth=1, linestyle=style, label=f"{name}: step {age}")
    axis.set(xscale="log", ylim=(0, None), xlabel="age (steps)", ylabel="mean absolute error (dB)")
    axis.set_title("distance from the recording, grown from one cell")
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower left")

    colors = colormaps["magma"].with_extremes(bad="lightgray")
    rows = (("growth from one cell; gray where nothing lives yet", life.growth), (life.wound_name, life.wound))
    for part, (title, panels) in zip(below, rows):
        axes = part.subplots(2, len(panels), squeeze=False, sharex=True, sharey="row")
        for column, (name, grids) in zip(axes.T, panels):
            for axis, levels, height in zip(column, grids, (N_MELS, SAMPLE_RATE / 2000)):
                seconds = levels.shape[1] * HOP_LENGTH / SAMPLE_RATE
                image = axis.imshow(
                    levels, cmap=colors, vmin=-DB_RANGE, vmax=0, origin="lower", aspect="auto",
                    interpolation="nearest", extent=(0, seconds, 0, height),
                )  # fmt: skip
            column[0].set_title(name, fontsize="medium")
            column[1].set_xlabel("time (s)")
        axes[0, 0].set_ylabel("mel band")
        axes[1, 0].set_ylabel("frequency (kHz)")
        part.suptitle(title)
        part.colorbar(image, ax=axes, format="%.0f dB", aspect=40, pad=0.01)
    return _png(figure)

"""Pictures of dual spectrograms, still and moving."""

from .files import atomic_write


def save_picture(path, rows, config):
    """Write a PNG with mel (left) and linear (right) spectrograms, one row per entry of ``rows``.

    ``rows`` is a list of (title, mel_db [n_mels, T], linear_db [n_linear, T]); axes in s and Hz, colours from -80 to
    0 dB in every picture. ``config`` is the SpectrogramConfig that says what the bands and frames are.
    """
    import librosa.display
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 0.6 + 3.6 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), 2, squeeze=False)
    for (title, mel_db, linear_db), row_axes in zip(rows, axes, strict=True):
        for name, values, scale, axis in (
            (f"mel, {len(mel_db)} bands", mel_db, "mel", row_axes[0]),
            (f"linear, {len(linear_db)} bins", linear_db, "linear", row_axes[1]),
        ):
            image = librosa.display.specshow(
                np.asarray(values),
                sr=config.sample_rate,
                hop_length=config.hop_length,
                fmin=config.fmin,
                fmax=config.fmax,
                x_axis="time",
                y_axis=scale,
                vmin=-80.0,
                vmax=0.0,
                cmap="magma",
                ax=axis,
            )
            axis.set(title=f"{title}: {name}", xlabel="time (s)", ylabel="frequency (Hz)")
            figure.colorbar(image, ax=axis, format="%.0f dB")
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=100)


def save_growth(path, grown, config, frames_per_second=12):
    """Write an animated GIF of one growth: levels above, alpha (life) below, mel on the left and linear on the right.

    ``grown`` yields (title, mel_db [n_mels, T], linear_db [n_linear, T], mel_alpha, linear_alpha), a picture each, with
    the shapes of the levels and values of 0 to 1 for alpha. The colours are those of :func:`save_picture`, and the last
    picture stays for two seconds.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, sharex=True, sharey="col")
    pictures, palette = [], None
    for title, *panels in grown:
        figure.suptitle(title)
        if not pictures:
            images = _empty_panels(figure, axes, panels[0].shape[1], config)
        for image, values in zip(images, panels, strict=True):
            image.set_data(values)
        canvas.draw()
        figure.set_layout_engine("none")  # laid out once, not again for every picture
        picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
        # The scales beside the panels put every colour into the first picture: one palette, and no flicker.
        palette = palette or picture.quantize(255)
        pictures.append(picture.quantize(palette=palette, dither=Image.Dither.NONE))
    durations = [1000 // frames_per_second] * (len(pictures) - 1) + [2000]
    with atomic_write(path) as file:
        pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)


def _empty_panels(figure, axes, n_frames, config):
    """The four images (mel and linear level, mel and linear alpha) on their axes."""
    import numpy as np

    seconds = n_frames * config.hop_length / config.sample_rate
    heights = (config.n_mels, config.sample_rate / 2)
    images = []
    for row, (what, low, high, colours) in zip(axes, (("level, dB", -80, 0, "magma"), ("alpha", 0, 1, "gray"))):
        for axis, name, height in zip(row, ("mel", "linear"), heights):
            image = axis.imshow(
                np.zeros((1, 1)), cmap=colours, vmin=low, vmax=high, origin="lower", aspect="auto",
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

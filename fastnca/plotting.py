"""Pictures of dual spectrograms."""

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

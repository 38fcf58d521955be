"""The plot of a run: Fréchet distance against training images seen."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sid_fast.io.atomic import atomic_path


def draw_curve(
    axes: Any,
    images: Sequence[int],
    distances: Sequence[float],
    name: str,
    teacher: float | None,
) -> None:
    """Plot distance against images seen on log-log axes.

    Args:
        axes: matplotlib axes.
        images: training images seen at each evaluation. 0, which a log axis lacks, is drawn at the
            left edge.
        distances: distance at each evaluation.
        name: label of the distance axis.
        teacher: the teacher's distance, drawn as a horizontal line; None: no line.
    """
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    left = min((i for i in images if i), default=1000) / 2
    axes.plot([i or left for i in images], distances, "o-", label="one-step generator")
    if teacher is not None:
        axes.axhline(teacher, color="black", linestyle="--", label=f"teacher: {teacher:.3g}")
    axes.set(xscale="log", yscale="log", xlabel="images seen", ylabel=name)
    title = f"{distances[0]:.3g} at {images[0] / 1000:g} kimg"
    axes.set_title(title + f", {distances[-1]:.3g} at {images[-1] / 1000:.4g}" * (len(images) > 1))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter("{x:,.0f}")
    if not images[0]:
        axes.annotate("start", (left, distances[0]), (8, 2), textcoords="offset points")
    axes.grid(which="major", alpha=0.3)
    if teacher is not None:
        axes.legend()


def save_curve(path: Path, *curve: Any, grids: Sequence[tuple[int, Path]] = ()) -> None:
    """Write the plot as a PNG, atomically, and beside it how the images changed.

    Args:
        path: the PNG to write.
        *curve: draw_curve's arguments after `axes`.
        grids: (training images seen, PNG of a sample grid), in order; of these the first, the
            middle and the last one are drawn.
    """
    from matplotlib.figure import Figure  # slow to import and used only here
    from matplotlib.image import imread

    shown = [grids[i] for i in sorted({0, len(grids) // 2, len(grids) - 1})] if grids else []
    figure = Figure(figsize=(7 + 4 * len(shown), 4.5), dpi=120, layout="constrained")
    axes = figure.subplots(1, 1 + len(shown), width_ratios=[7] + [4] * len(shown), squeeze=False)[0]
    draw_curve(axes[0], *curve)
    for place, (images, grid) in zip(axes[1:], shown, strict=True):
        place.imshow(imread(grid), cmap="gray", vmin=0, vmax=1)
        place.set_title(f"{images / 1000:.4g} kimg")
        place.set_axis_off()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")

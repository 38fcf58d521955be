"""The picture of a run: distance against images seen."""

from pathlib import Path

from sid_fast.files.atomic import atomic_path


def save_curve(
    path: Path, images: list[int], distances: list[float], name: str, teacher: float | None
) -> None:
    """Write distance against images seen as a PNG, log axes, with the teacher's own line.

    The start, 0 images, has no place on a log axis: it is drawn at the left edge.
    """
    from matplotlib.figure import Figure  # slow to load, and needed here alone
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    seen = [i for i in images if i]
    left = min(seen, default=1000) / 2
    axes.plot([i or left for i in images], distances, "o-", label="one-step generator")
    if teacher is not None:
        axes.axhline(teacher, color="black", linestyle="--", label=f"teacher: {teacher:.3g}")
    axes.set(xscale="log", yscale="log", xlabel="images seen", ylabel=name)
    axes.set_title(f"{distances[0]:.3g} at the start, {distances[-1]:.3g} at the end")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(lambda x, _: "start" if x < left * 1.01 else f"{x:,.0f}")
    axes.grid(which="major", alpha=0.3)
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")

"""Pictures of noise schedules."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ddpm_hf.plots.figures import (
    COLORS,
    LINE_STYLES,
    Float64Array,
    add_legend,
    finish_axes,
    new_figure,
    save_figure,
    shortened,
    use_log_axis_if_wide,
)

_LETTERS_A_LINE = 80


def schedule_plot(
    schedules: Mapping[str, npt.NDArray[np.floating[Any]]],
    path: Path,
    *,
    loss_weights: Mapping[str, npt.NDArray[np.floating[Any]]] | None = None,
) -> None:
    """Draws beta_t, alpha_bar_t, the logarithm of the SNR and, where they are given, the weights of the loss.

    Schedules of one length are drawn over t, others over (t + 1) / T, where chains of one continuous alpha_bar lie on
    one curve. The name of a single schedule is the title, those of several are the legend.

    Args:
        schedules: alpha_bar_t of each, (T,) in [0, 1), as `NoiseSchedule.alphas_cumprod` has them; float32 holds too
            few digits for small betas. Names are shown as they are.
        path: Where to write a PNG.
        loss_weights: Factor on the squared error of the prediction at each t, (T,), of some or all of the schedules.

    Raises:
        ValueError: If there is no schedule, one is none, or weights belong to no schedule.
    """
    save_figure(_schedule_figure(schedules, loss_weights or {}), path)


def _schedule_figure(
    schedules: Mapping[str, npt.NDArray[np.floating[Any]]], loss_weights: Mapping[str, npt.NDArray[np.floating[Any]]]
) -> Any:
    """Returns the matplotlib figure of `schedule_plot`."""
    alpha_bars = {name: np.asarray(table, np.float64) for name, table in schedules.items()}
    weights = {name: np.asarray(table, np.float64) for name, table in loss_weights.items()}
    _check(alpha_bars, weights)
    num_rows, num_columns = (2, 2) if weights else (1, 3)
    figure = new_figure(7.6, 5.6) if weights else new_figure(10.4, 3.3)
    axes = figure.subplots(num_rows, num_columns).flatten()
    lengths = {len(table) for table in alpha_bars.values()}
    lines = []
    for index, (name, alpha_bar) in enumerate(alpha_bars.items()):
        t = np.arange(len(alpha_bar), dtype=np.float64)
        x = t if len(lengths) == 1 else (t + 1) / len(alpha_bar)
        style = {"color": COLORS[index % len(COLORS)], "ls": LINE_STYLES[index % len(LINE_STYLES)], "lw": 1.6}
        (line,) = axes[0].plot(x, betas_of(alpha_bar), **style)
        axes[1].plot(x, alpha_bar, **style)
        has_signal = alpha_bar > 0
        axes[2].plot(x[has_signal], log_snr_of(alpha_bar[has_signal]), **style)
        if name in weights:
            axes[3].plot(x, weights[name], **style)
        lines.append(line)
    _label(axes, r"timestep $t$" if len(lengths) == 1 else r"$(t + 1) / T$", alpha_bars, weights)
    if len(lines) == 1:
        figure.suptitle(shortened(*alpha_bars), fontsize=11, parse_math=False)
    else:
        longest = max(len(shortened(name)) for name in alpha_bars)
        num_columns = max(1, min(len(lines), _LETTERS_A_LINE // (longest + 8)))
        add_legend(figure, lines, list(alpha_bars), loc="outside lower center", ncols=num_columns)
    return figure


def _label(axes: Any, x: str, alpha_bars: Mapping[str, Float64Array], weights: Mapping[str, Float64Array]) -> None:
    """Says what each panel shows, and where there is no logarithm of the SNR to show."""
    axes[0].set_yscale("log")
    finish_axes(axes[0], x, r"$\beta_t$")
    finish_axes(axes[1], x, r"$\bar\alpha_t$")
    finish_axes(axes[2], x, r"$\log\,\mathrm{SNR}(t)$")
    num_without_signal = sum(1 for table in alpha_bars.values() if table[-1] == 0)
    if num_without_signal:
        of_how_many = f" for {num_without_signal} of {len(alpha_bars)}" if len(alpha_bars) > 1 else ""
        axes[2].text(0.04, 0.05, rf"$-\infty$ at the end{of_how_many}", transform=axes[2].transAxes, fontsize=9)
    if weights:
        use_log_axis_if_wide(axes[3], np.concatenate(list(weights.values())))
        finish_axes(axes[3], x, "loss weight")


def betas_of(alpha_bar: Float64Array) -> Float64Array:
    """Returns beta_t = 1 - alpha_bar_t / alpha_bar_{t-1}; 1 where the signal had ended before."""
    before = np.concatenate([[1.0], alpha_bar[:-1]])
    return np.asarray(1 - np.divide(alpha_bar, before, out=np.zeros_like(alpha_bar), where=before > 0))


def log_snr_of(alpha_bar: Float64Array) -> Float64Array:
    """Returns log(alpha_bar_t / (1 - alpha_bar_t)), for alpha_bar_t above 0."""
    return np.asarray(np.log(alpha_bar) - np.log1p(-alpha_bar))


def _check(alpha_bars: Mapping[str, Float64Array], weights: Mapping[str, Float64Array]) -> None:
    """Refuses tables that are no schedules, and weights that belong to none."""
    if not alpha_bars:
        raise ValueError("schedules is empty; give the alphas_cumprod of at least one.")
    for name, table in alpha_bars.items():
        is_in_range = table.ndim == 1 and table.size > 0 and bool(((table >= 0) & (table < 1)).all())
        if not is_in_range or (np.diff(table) > 0).any():
            raise ValueError(
                f"schedules[{name!r}] must be alphas_cumprod, one list of numbers that fall from below 1 to 0 or above."
            )
    for name, table in weights.items():
        if name not in alpha_bars or table.shape != alpha_bars[name].shape:
            raise ValueError(
                f"loss_weights[{name!r}] of shape {table.shape} must belong to one of the schedules and have its "
                "length; give one weight for each timestep."
            )

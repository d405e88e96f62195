"""Each number in a picture of schedules is that of the schedule."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ddpm_hf.plots
from ddpm_hf.diffusion.schedule import (
    BETA_SCHEDULES,
    NoiseSchedule,
    betas_from_alpha_bar,
    cosine_alpha_bar,
    make_betas,
    rescale_to_zero_terminal_snr,
)
from ddpm_hf.plots import _schedule_figure, betas_of, schedule_plot


def alphas_cumprod(name: str, num_timesteps: int = 50) -> np.ndarray:
    return NoiseSchedule.from_betas(make_betas(name, num_timesteps)).alphas_cumprod.numpy()


def drawn(axes: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns x and y of each line."""
    return [(np.asarray(line.get_xdata()), np.asarray(line.get_ydata())) for line in axes.lines]


@pytest.mark.parametrize("name", [*BETA_SCHEDULES, "zero_snr"])
def test_the_numbers_drawn_are_those_of_the_schedule(name: str) -> None:
    """1 - alpha_bar_t / alpha_bar_{t-1} gives beta back to about 1e-16 / beta, and beta is above 1e-4 here."""
    betas = make_betas("linear" if name == "zero_snr" else name, 50)
    schedule = NoiseSchedule.from_betas(rescale_to_zero_terminal_snr(betas) if name == "zero_snr" else betas)
    beta_axes, alpha_axes, snr_axes = _schedule_figure({name: schedule.alphas_cumprod.numpy()}, {}).axes
    ((t, beta),), ((_, alpha_bar),), ((t_snr, log_snr),) = map(drawn, (beta_axes, alpha_axes, snr_axes))
    np.testing.assert_array_equal(t, np.arange(50))
    np.testing.assert_allclose(beta, schedule.betas.numpy(), rtol=1e-10)
    np.testing.assert_array_equal(alpha_bar, schedule.alphas_cumprod.numpy())
    has_signal = schedule.snr.numpy() > 0
    np.testing.assert_array_equal(t_snr, t[has_signal])
    np.testing.assert_allclose(log_snr, np.log(schedule.snr.numpy()[has_signal]), rtol=1e-10, atol=1e-10)
    assert has_signal.all() == (not snr_axes.texts), "what is not drawn is told"


def test_a_signal_that_has_ended_stays_away() -> None:
    """Nothing is left that a beta could be read from; the schedule's own rescaling says 1 there too."""
    np.testing.assert_allclose(betas_of(np.asarray([0.9, 0.45, 0.0, 0.0])), [0.1, 0.5, 1.0, 1.0], rtol=1e-12)


def test_chains_of_other_lengths_lie_on_the_curve_that_they_share() -> None:
    """Eq. 17, Nichol and Dhariwal 2021: alpha_bar_t is f((t + 1) / T) / f(0); the last beta is cut."""
    schedules = {f"T = {n}": NoiseSchedule.from_betas(betas_from_alpha_bar(n, cosine_alpha_bar)) for n in (20, 500)}
    figure = _schedule_figure({name: schedule.alphas_cumprod.numpy() for name, schedule in schedules.items()}, {})
    for x, alpha_bar in drawn(figure.axes[1]):
        assert x[-1] == 1
        expected = [cosine_alpha_bar(u) / cosine_alpha_bar(0) for u in x]
        np.testing.assert_allclose(alpha_bar[:-1], expected[:-1], rtol=1e-9)
    assert figure.axes[1].get_xlabel() == "$(t + 1) / T$"


def test_several_schedules_have_a_legend_with_their_names_as_they_are() -> None:
    """matplotlib hides what begins with an underscore, and takes what is between dollars for mathematics."""
    names = ["_run", "a$b$c", "x" * 30 + "y" * 30]
    tables = [alphas_cumprod(name) for name in ("linear", "cosine", "sigmoid")]
    figure = _schedule_figure(dict(zip(names, tables, strict=True)), {})
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["_run", "a$b$c", "x" * 19 + "…" + "y" * 20]
    assert not any(text.get_parse_math() for text in legend.get_texts())
    for axes in figure.axes:
        lines = [(line.get_color(), line.get_linestyle()) for line in axes.lines]
        assert len(set(lines)) == 3
        assert lines == [(line.get_color(), line.get_linestyle()) for line in legend.get_lines()]
    for (_, shown), table in zip(drawn(figure.axes[1]), tables, strict=True):
        np.testing.assert_array_equal(shown, table)


def test_a_single_schedule_needs_no_legend() -> None:
    figure = _schedule_figure({"digits": alphas_cumprod("cosine")}, {})
    assert figure.legends == []
    assert figure.get_suptitle() == "digits"


def test_loss_weights_are_drawn_for_the_schedules_that_have_some() -> None:
    weights = np.geomspace(1e-3, 5, 50)
    schedules = {"one": alphas_cumprod("linear"), "two": alphas_cumprod("cosine")}
    figure = _schedule_figure(schedules, {"two": weights})
    assert len(figure.axes) == 4
    ((t, shown),) = drawn(figure.axes[3])
    np.testing.assert_array_equal(t, np.arange(50))
    np.testing.assert_array_equal(shown, weights)
    assert figure.axes[3].lines[0].get_color() == figure.axes[0].lines[1].get_color()
    assert figure.axes[3].get_yscale() == "log"
    assert len(_schedule_figure(schedules, {}).axes) == 3


@pytest.mark.parametrize(("with_weights", "size"), [(False, (1352, 429)), (True, (988, 728))])
def test_the_picture_is_a_png_of_that_size_and_the_same_every_time(
    tmp_path: Path, with_weights: bool, size: tuple[int, int]
) -> None:
    weights = {"a": np.ones(50)} if with_weights else None
    for name in ("one.png", "two.png"):
        schedule_plot({"a": alphas_cumprod("linear")}, tmp_path / name, loss_weights=weights)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    with Image.open(tmp_path / "one.png") as picture:
        picture.load()
        assert (picture.format, picture.size) == ("PNG", size)
        assert len(np.unique(np.asarray(picture.convert("L")))) > 50


@pytest.mark.parametrize(
    ("schedules", "weights", "words"),
    [
        ({}, {}, "schedules is empty"),
        ({"a": np.asarray([])}, {}, r"schedules\['a'\] must be alphas_cumprod"),
        ({"a": np.asarray([[0.9, 0.5]])}, {}, r"schedules\['a'\]"),
        ({"a": np.asarray([0.5, 0.9])}, {}, "fall"),
        ({"a": np.asarray([1.0, 0.9])}, {}, "below 1"),
        ({"a": np.asarray([0.9, -0.1])}, {}, "0 or above"),
        ({"a": np.asarray([0.9, math.nan])}, {}, r"schedules\['a'\]"),
        ({"a": np.asarray([0.9, 0.5])}, {"b": np.ones(2)}, r"loss_weights\['b'\]"),
        ({"a": np.asarray([0.9, 0.5])}, {"a": np.ones(3)}, r"loss_weights\['a'\] of shape \(3,\)"),
    ],
)
def test_what_is_no_schedule_is_refused(
    tmp_path: Path, schedules: dict[str, np.ndarray], weights: dict[str, np.ndarray], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        schedule_plot(schedules, tmp_path / "x.png", loss_weights=weights)
    assert not (tmp_path / "x.png").exists()


def test_no_plot_touches_the_figures_of_its_caller() -> None:
    for path in Path(ddpm_hf.plots.__file__).parent.glob("*.py"):
        assert re.search(r"import.*pyplot|matplotlib\.use", path.read_text(encoding="utf-8")) is None

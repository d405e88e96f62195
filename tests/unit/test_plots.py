"""Pictures contain the pixels that went in, and figures the numbers."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddpm_hf import plots
from ddpm_hf.diffusion.schedule import (
    NoiseSchedule,
    betas_from_alpha_bar,
    cosine_alpha_bar,
    make_betas,
    rescale_to_zero_terminal_snr,
)
from ddpm_hf.plots import (
    LABEL_HEIGHT,
    Ratios,
    as_drawn,
    betas_of,
    bin_means,
    denoising_strip,
    evaluation_plot,
    forward_strip,
    image_grid,
    moving_average,
    save_animation,
    schedule_plot,
    timestep_curves,
    training_curves,
)

# Images


def distinct_images(count: int, height: int = 2, width: int = 2, channels: int = 1) -> np.ndarray:
    """Images of which no two pixels next to each other are equal."""
    size = count * height * width * channels
    return (np.arange(size) * 37 % 251).astype(np.uint8).reshape(count, height, width, channels)


def tile(picture: Image.Image, row: int, column: int, height: int, width: int, top: int = 4) -> np.ndarray:
    y, x = top + row * (height + 4), 4 + column * (width + 4)
    return np.asarray(picture)[y : y + height, x : x + width]


def test_grid_shows_every_image_row_by_row_enlarged_by_a_whole_factor() -> None:
    images = distinct_images(5, height=2, width=3, channels=3)
    picture = image_grid(images, 3, enlarge_to=12)
    assert picture.mode == "RGB"
    assert picture.size == (4 + 3 * (12 + 4), 4 + 2 * (8 + 4))
    for index, image in enumerate(images):
        shown = tile(picture, *divmod(index, 3), height=8, width=12)
        np.testing.assert_array_equal(shown, image.repeat(4, axis=0).repeat(4, axis=1))


def test_grid_is_white_where_there_is_no_image() -> None:
    pixels = np.asarray(image_grid(np.zeros((3, 4, 4, 1), np.uint8), 2, enlarge_to=4))
    gaps = [*range(4), *range(8, 12), *range(16, 20)]
    assert pixels[:, gaps].min() == 255
    assert pixels[gaps].min() == 255
    assert pixels[12:16, 12:16].min() == 255
    assert pixels[12:16, 4:8].max() == 0


def test_large_images_keep_their_pixels() -> None:
    images = distinct_images(1, height=100, width=80)
    shown = tile(image_grid(images, 1, enlarge_to=64), 0, 0, height=100, width=80)
    np.testing.assert_array_equal(shown, images[0].repeat(3, axis=-1))


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_channels_that_are_not_colors_are_shown_side_by_side_in_gray(channels: int) -> None:
    images = distinct_images(1, height=4, width=4, channels=channels)
    shown = tile(image_grid(images, 1, enlarge_to=1), 0, 0, height=4, width=4 * channels)
    for channel in range(channels):
        np.testing.assert_array_equal(
            shown[:, 4 * channel : 4 * channel + 4], images[0, ..., [channel]].transpose(1, 2, 0).repeat(3, axis=-1)
        )


def test_four_channels_with_a_value_range_are_no_colors() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 6, 4), dtype=np.uint8)
    drawn = as_drawn(images, [-4, 4])
    assert np.array_equal(drawn, np.concatenate(np.split(images, 4, axis=-1), axis=-2))
    assert as_drawn(images, None) is images


def test_transparent_images_are_shown_on_white() -> None:
    images = np.array([[[[200, 100, 0, 255], [200, 100, 0, 0], [200, 100, 0, 51]]]], np.uint8)
    shown = tile(image_grid(images, 1, enlarge_to=1), 0, 0, height=1, width=3)
    np.testing.assert_array_equal(shown, [[[200, 100, 0], [255, 255, 255], [244, 224, 204]]])


def test_labels_are_above_their_columns_and_change_no_image() -> None:
    images = distinct_images(3)
    plain = image_grid(images, 3)
    for labels in (["0", "1", "2"], ["cat", "a name far too long for its column", ""]):
        labeled = image_grid(images, 3, column_labels=labels)
        np.testing.assert_array_equal(np.asarray(labeled)[LABEL_HEIGHT:], np.asarray(plain)[4:])
        header = np.asarray(labeled)[:LABEL_HEIGHT]
        has_ink = [header[:, 4 + column * 68 : 4 + column * 68 + 64].min() < 128 for column in range(3)]
        assert has_ink == [label != "" for label in labels]
        assert header[:, [*range(4), *range(68, 72), *range(136, 140)]].min() == 255


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((2, 4, 4), np.uint8), r"\(number, height, width, channels\); got uint8 of shape \(2, 4, 4\)"),
        (np.zeros((2, 4, 4, 1), np.float32), "got float32"),
        (np.zeros((0, 4, 4, 1), np.uint8), "non-empty"),
    ],
)
def test_grid_refuses_other_arrays(images: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        image_grid(images, 2)


def test_a_name_with_line_breaks_is_one_line() -> None:
    """Class names of a Hub data set may contain anything."""
    images = np.zeros((2, 16, 16, 3), np.uint8)
    broken = image_grid(images, 2, column_labels=["a\nb\r\nc", "\n"])
    np.testing.assert_array_equal(broken, image_grid(images, 2, column_labels=["a b c", ""]))


@pytest.mark.parametrize("size", [32, 64])
def test_captions_of_neighbors_do_not_touch(size: int) -> None:
    """No ink in the 8 pixels around the middle of a gap, which has 4; the smallest letters are 5 wide."""
    snrs = [5.9e-4, 5.8e-4, 4.0e-5]
    picture = np.asarray(forward_strip(np.zeros((3, size, size, 3), np.uint8), [0, 500, 999], snrs))
    step = (picture.shape[1] - 4) // 3
    for column in (1, 2):
        middle = 2 + column * step
        assert picture[-LABEL_HEIGHT:, middle - 4 : middle + 4].min() == 255


def test_grid_refuses_columns_and_labels_that_do_not_fit() -> None:
    images = distinct_images(4)
    with pytest.raises(ValueError, match="3 column_labels for 2 columns"):
        image_grid(images, 2, column_labels=["a", "b", "c"])
    with pytest.raises(ValueError, match="at least 1 column"):
        image_grid(images, 0)


def test_strip_shows_one_image_a_row_from_the_first_frame_to_the_last() -> None:
    trajectory = distinct_images(19 * 2).reshape(19, 2, 2, 2, 1)
    picture = denoising_strip(trajectory)
    assert picture.size == (4 + 10 * 68, LABEL_HEIGHT + 2 * 68)
    for row in range(2):
        for column, frame in enumerate(range(0, 19, 2)):
            shown = tile(picture, row, column, height=64, width=64, top=LABEL_HEIGHT)
            expected = trajectory[frame, row].repeat(32, axis=0).repeat(32, axis=1).repeat(3, axis=-1)
            np.testing.assert_array_equal(shown, expected)


def test_strip_shows_all_frames_of_a_short_trajectory() -> None:
    assert denoising_strip(distinct_images(3)[:, None]).size[0] == 4 + 3 * 68
    assert denoising_strip(distinct_images(1)[:, None]).size[0] == 4 + 68


def test_forward_strip_shows_each_state_with_its_timestep_above_and_its_snr_below() -> None:
    states = distinct_images(3, height=2, width=2, channels=3)
    plain = np.asarray(image_grid(states, 3, enlarge_to=96))
    picture = np.asarray(forward_strip(states, [0, 500, 999], [9999.0, 0.0784, 4.04e-5]))
    assert picture.shape == (2 * LABEL_HEIGHT + 96, 4 + 3 * 100, 3)
    np.testing.assert_array_equal(picture[LABEL_HEIGHT:-LABEL_HEIGHT], plain[4:-4])
    for labels in (picture[:LABEL_HEIGHT], picture[-LABEL_HEIGHT:]):
        assert [labels[:, 4 + column * 100 : 100 + column * 100].min() < 128 for column in range(3)] == [True] * 3
        assert labels[:, [*range(4), *range(100, 104), *range(200, 204)]].min() == 255


def test_forward_strip_depends_on_timesteps_and_snrs() -> None:
    """Equal numbers give equal pixels, and different ones do not, also far from 1."""
    states = distinct_images(2)
    picture = np.asarray(forward_strip(states, [0, 10], [2.0, 0.5]))
    other_t = np.asarray(forward_strip(states, [0, 11], [2.0, 0.5]))
    other_snr = np.asarray(forward_strip(states, [0, 10], [2.0, 0.6]))
    assert (picture[:LABEL_HEIGHT] != other_t[:LABEL_HEIGHT]).any()
    np.testing.assert_array_equal(picture[LABEL_HEIGHT:], other_t[LABEL_HEIGHT:])
    assert (picture[-LABEL_HEIGHT:] != other_snr[-LABEL_HEIGHT:]).any()
    np.testing.assert_array_equal(picture[:-LABEL_HEIGHT], other_snr[:-LABEL_HEIGHT])
    tiny, zero = (np.asarray(forward_strip(states, [0, 10], [1e12, snr])) for snr in (4e-5, 0.0))
    assert (tiny[-LABEL_HEIGHT:] != zero[-LABEL_HEIGHT:]).any()


def test_forward_strip_refuses_labels_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="2 states, 1 timesteps and 2 snrs"):
        forward_strip(distinct_images(2), [0], [2.0, 0.5])
    with pytest.raises(ValueError, match="2 states, 2 timesteps and 3 snrs"):
        forward_strip(distinct_images(2), [0, 1], [2.0, 0.5, 0.1])


@pytest.mark.parametrize("channels", [1, 3])
def test_animation_runs_from_noise_to_image_and_holds_the_last_frame(tmp_path: Path, channels: int) -> None:
    trajectory = distinct_images(79 * 4, channels=channels).reshape(79, 4, 2, 2, channels)
    path = tmp_path / "denoising.gif"
    save_animation(trajectory, path, num_columns=2)
    with Image.open(path) as animation:
        assert animation.n_frames == 40
        assert animation.info["loop"] == 0
        durations = []
        for index, frame in enumerate(range(0, 79, 2)):
            animation.seek(index)
            durations.append(animation.info["duration"])
            # A frame has at most 17 colors here, so the palette of a GIF holds all of them.
            expected = np.asarray(image_grid(trajectory[frame], 2, enlarge_to=48))
            np.testing.assert_array_equal(np.asarray(animation.convert("RGB")), expected)
    assert durations == [80] * 39 + [2500]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collect the matplotlib figures instead of writing them."""
    saved: list[Any] = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, _: saved.append(figure))
    return saved


def lines_of(axes: Any) -> list[np.ndarray]:
    """Return the points of each line, (number, 2)."""
    return [np.asarray(line.get_xydata(), np.float64) for line in axes.lines]


def legend_of(owner: Any) -> list[str]:
    return [text.get_text() for text in owner.get_texts()]


# Curves


def losses(count: int, factor: float = 1.0) -> list[dict[str, Any]]:
    return [{"step": 10 * k, "loss": factor / k} for k in range(1, count + 1)]


def a_bound(num_timesteps: int = 250) -> dict[str, Any]:
    """A bound in which two thirds of the timesteps have seen an image."""
    t = np.arange(num_timesteps)[::-1]
    columns = {"x_0_mse": 1e-4 * (t + 1), "eps_mse": 1 / (t + 1), "terms": 1 / (t + 1) ** 2, "rate": t, "distortion": t}
    return {"timesteps": t.tolist(), "counts": (t % 3).tolist()} | {k: v.tolist() for k, v in columns.items()}


def test_losses_of_runs_are_drawn_with_their_moving_averages(tmp_path: Path, figures: list[Any]) -> None:
    training_curves({"long": losses(100), "short": losses(3, factor=2.0)}, tmp_path / "x.png")
    (axes,) = figures[0].axes
    raw, average, short = lines_of(axes)
    steps = 10.0 * np.arange(1, 101)
    np.testing.assert_array_equal(raw, np.stack([steps, 10 / steps], axis=1))
    np.testing.assert_array_equal(average, np.stack([steps, moving_average(10 / steps, 3)], axis=1))
    np.testing.assert_array_equal(short, [[10, 2], [20, 1], [30, 2 / 3]])
    assert legend_of(axes.get_legend()) == ["long", "short"]


def test_a_moving_average_has_at_most_as_many_values_after_as_before() -> None:
    values = np.array([8.0, 1.0, 3.0, 5.0, 10.0])
    np.testing.assert_allclose(moving_average(values, 1), [8, 4, 3, 6, 7.5])
    np.testing.assert_allclose(moving_average(values, 100), [8, 4, 5.4, 5.4, 5.4])


def test_runs_need_not_have_the_same_metrics(tmp_path: Path, figures: list[Any]) -> None:
    validated = [*losses(2), {"step": 20, "validation_loss": 0.25}, {"step": 25, "validation_loss": 0.2}]
    runs = {"plain": losses(2), "validated": validated, "only": [{"step": 7, "validation_loss": 3}]}
    training_curves(runs, tmp_path / "x.png")
    (axes,) = figures[0].axes
    expected = [[[10, 1], [20, 0.5]], [[10, 1], [20, 0.5]], [[20, 0.25], [25, 0.2]], [[7, 3]]]
    assert [line.tolist() for line in lines_of(axes) if len(line)] == expected


def test_each_kind_of_score_has_its_own_panel(tmp_path: Path, figures: list[Any]) -> None:
    def score(step: int, value: float, metric: str, features: str | None) -> dict[str, Any]:
        return {"step": step, "score": value, "score_metric": metric, "score_features": features}

    first = [*losses(2), score(10, 50.0, "fid", "inception"), score(20, 40.0, "fid", "inception")]
    second = [*losses(2), score(10, 5.0, "bits_per_dim", None), score(20, 30.0, "fid", "inception")]
    training_curves({"first": first, "second": second}, tmp_path / "x.png")
    _, bits, fid = figures[0].axes
    assert [axes.get_title() for axes in (bits, fid)] == ["bits_per_dim", "fid, inception"]
    assert [line.tolist() for line in lines_of(bits)] == [[], [[10, 5]]]
    assert [line.tolist() for line in lines_of(fid)] == [[[10, 50], [20, 40]], [[20, 30]]]


def test_losses_that_are_not_finite_are_counted_and_not_drawn(tmp_path: Path, figures: list[Any]) -> None:
    values = [1.0, None, float("nan"), float("inf"), "much", True, 0.5, 0.0, -1.0]
    rows = [{"step": step, "loss": value} for step, value in enumerate(values)]
    training_curves({"run": rows}, tmp_path / "x.png")
    (axes,) = figures[0].axes
    assert lines_of(axes)[0].tolist() == [[0, 1], [6, 0.5], [7, 0], [8, -1]]
    assert legend_of(axes.get_legend()) == ["run (5 not finite)"]


@pytest.mark.parametrize("values", [[0.9], [0.9, 0.8], [0.9, 0.1, 0.01]])
def test_a_few_losses_of_one_run_are_drawn_from_the_first_step_on(
    tmp_path: Path, figures: list[Any], values: list[float]
) -> None:
    """Otherwise the axes span only the range of the points, which is empty for one point."""
    steps = [20 * (number + 1) for number in range(len(values))]
    rows = [{"step": step, "loss": value} for step, value in zip(steps, values, strict=True)]
    training_curves({"": rows}, tmp_path / "x.png")
    (axes,) = figures[0].axes
    left, right = axes.get_xlim()
    assert left == 0
    assert steps[-1] <= right < 1.1 * steps[-1]
    bottom, top = axes.get_ylim()
    assert max(values) < top
    assert bottom == 0 if len(values) == 1 else bottom < min(values)


def test_runs_without_anything_to_draw_are_refused(tmp_path: Path) -> None:
    for rows in ([{"step": 1, "grad_norm": 2.0}], [{"step": 1, "loss": None}]):
        with pytest.raises(ValueError, match="metrics of two contain no finite loss, validation_loss or score"):
            training_curves({"one": losses(2), "two": rows}, tmp_path / "x.png")
    with pytest.raises(ValueError, match="runs is empty"):
        training_curves({}, tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


def test_losses_by_quartile_are_drawn(tmp_path: Path, figures: list[Any]) -> None:
    rows: list[dict[str, Any]] = [
        {"step": 10 * k, "loss": 1.0} | {f"loss_q{q}": (q + 1) / k for q in range(4)} for k in range(1, 6)
    ]
    rows[2]["loss_q3"] = None
    not_finite = {"loss": None} | {f"loss_q{q}": None for q in range(4)}
    timestep_curves(tmp_path / "x.png", metrics=[*rows, {"step": 60} | not_finite])
    (axes,) = figures[0].axes
    for quartile, line in enumerate(lines_of(axes)):
        expected = [[10 * k, (quartile + 1) / k] for k in range(1, 6) if (quartile, k) != (3, 3)]
        np.testing.assert_array_equal(line, expected)
    # The row in which no timestep of the quartile was drawn is not counted.
    assert all(name.endswith("(1 not finite)") for name in legend_of(axes.get_legend()))


def test_errors_and_terms_of_a_bound_are_drawn_where_images_were_seen(tmp_path: Path, figures: list[Any]) -> None:
    bound = a_bound()
    columns = {name: np.asarray(values, np.float64) for name, values in bound.items()}
    is_known = columns["counts"] > 0
    timestep_curves(tmp_path / "x.png", bound=bound)
    errors, terms = figures[0].axes
    shown = [*lines_of(errors), *lines_of(terms)]
    for raw, means, name in zip(shown[::2], shown[1::2], ("eps_mse", "x_0_mse", "terms"), strict=True):
        np.testing.assert_array_equal(raw[:, 0], columns["timesteps"][is_known])
        np.testing.assert_array_equal(raw[:, 1], columns[name][is_known])
        np.testing.assert_array_equal(means[:, 1], bin_means(columns[name], columns["counts"], 100))
    assert len(shown) == 6


def test_means_of_neighboring_steps_are_weighted_by_their_images() -> None:
    counts, values = np.arange(1000) % 3, np.linspace(1, 2, 1000)
    means = bin_means(values, counts, 100)
    assert len(means) == 100
    assert means[0] == pytest.approx((values[:10] * counts[:10]).sum() / counts[:10].sum())
    np.testing.assert_array_equal(bin_means(np.where(counts > 0, values, np.nan), counts, 100), means)
    np.testing.assert_array_equal(bin_means(values[:6], counts[:6], 100), values[:6][counts[:6] > 0])


def test_an_empty_or_invalid_bound_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    with pytest.raises(ValueError, match="no loss_q0 to loss_q3, and there is no bound"):
        timestep_curves(path, metrics=losses(2))
    for change in ({"terms": [1.0]}, {"counts": [0] * 250}, {"eps_mse": None}, {"x_0_mse": ["a"] * 250}):
        with pytest.raises(ValueError, match="bound must have timesteps, x_0_mse"):
            timestep_curves(path, bound=a_bound() | change)
    with pytest.raises(ValueError, match="bound must have timesteps"):
        timestep_curves(path, bound={})
    assert list(tmp_path.iterdir()) == []


# Evaluations


@pytest.mark.parametrize("with_bound", [True, False])
@pytest.mark.parametrize("with_ratios", [True, False])
def test_an_evaluation_shows_images_neighbors_the_bound_and_ratios(
    tmp_path: Path, figures: list[Any], with_bound: bool, with_ratios: bool
) -> None:
    samples = distinct_images(64, 4, 4, 3)
    real, neighbors = samples[::-1].copy(), samples[32:].copy()
    evaluation_plot(
        tmp_path / "x.png", samples=samples, real=real, compared=samples[8:40], neighbors=neighbors,
        distances=np.linspace(0.1, 0.2, 32), bound=a_bound() if with_bound else None, title="a_b $x",
        memorization=[Ratios("_a $b", np.array([0.1, 0.9, 0.5, 0.2]), np.array([0.6]), 1 / 3)] if with_ratios else [],
    )  # fmt: skip
    panels = figures[0].axes
    assert len(panels) == 3 + 3 * with_bound + 3 * with_ratios
    if with_ratios:
        labels = [text.get_text() for text in panels[-3].get_legend().get_texts()]
        assert labels == ["samples, 50.0% memorized", "validation images, 0.0% memorized"]
        assert set(lines_of(panels[-3])[0][:, 0].tolist()) >= {0.1, 0.2, 0.5, 0.9}
    rows = [images[start : start + 8] for start in range(0, 32, 8) for images in (samples[8:40], neighbors)]
    for panel, images in zip(panels, (samples, real, np.concatenate(rows)), strict=False):
        np.testing.assert_array_equal(panel.images[0].get_array(), np.asarray(image_grid(images, 8)))
    if with_bound:
        bound = a_bound()
        (curve,) = lines_of(panels[5])
        np.testing.assert_array_equal(curve[:, 1], bin_means(bound["distortion"], bound["counts"], 100))


# Schedules


def alphas_cumprod(name: str, num_timesteps: int = 50) -> np.ndarray:
    return NoiseSchedule.from_betas(make_betas(name, num_timesteps)).alphas_cumprod.numpy()


@pytest.mark.parametrize("name", ["linear", "squaredcos_cap_v2", "laplace", "zero_snr"])
def test_the_numbers_drawn_are_those_of_the_schedule(tmp_path: Path, figures: list[Any], name: str) -> None:
    """1 - alpha_bar_t / alpha_bar_{t-1} gives beta back to about 1e-16 / beta, and beta is above 1e-4 here."""
    betas = make_betas("linear" if name == "zero_snr" else name, 50)
    schedule = NoiseSchedule.from_betas(rescale_to_zero_terminal_snr(betas) if name == "zero_snr" else betas)
    schedule_plot({name: schedule.alphas_cumprod.numpy()}, tmp_path / "x.png")
    beta_axes, alpha_axes, snr_axes = figures[0].axes
    ((t, beta),), ((_, alpha_bar),), ((t_snr, log_snr),) = (
        [line.T for line in lines_of(axes)] for axes in (beta_axes, alpha_axes, snr_axes)
    )
    np.testing.assert_array_equal(t, np.arange(50))
    np.testing.assert_allclose(beta, schedule.betas.numpy(), rtol=1e-10)
    np.testing.assert_array_equal(alpha_bar, schedule.alphas_cumprod.numpy())
    has_signal = schedule.snr.numpy() > 0
    np.testing.assert_array_equal(t_snr, t[has_signal])
    np.testing.assert_allclose(log_snr, np.log(schedule.snr.numpy()[has_signal]), rtol=1e-10, atol=1e-10)
    assert has_signal.all() == (not snr_axes.texts), "a note replaces the value that is not drawn"


def test_betas_after_the_end_of_the_signal_are_one() -> None:
    """No beta can be computed from alpha_bar there; rescaling to zero terminal SNR gives 1, too."""
    np.testing.assert_allclose(betas_of(np.asarray([0.9, 0.45, 0.0, 0.0])), [0.1, 0.5, 1.0, 1.0], rtol=1e-12)


def test_schedules_of_different_lengths_share_the_curve_of_alpha_bar(tmp_path: Path, figures: list[Any]) -> None:
    """Eq. 17, Nichol and Dhariwal 2021: alpha_bar_t is f((t + 1) / T) / f(0); the last beta is clipped."""
    schedules = {f"T = {n}": NoiseSchedule.from_betas(betas_from_alpha_bar(n, cosine_alpha_bar)) for n in (20, 500)}
    tables = {name: schedule.alphas_cumprod.numpy() for name, schedule in schedules.items()}
    schedule_plot(tables, tmp_path / "x.png")
    for line in lines_of(figures[0].axes[1]):
        x, alpha_bar = line.T
        assert x[-1] == 1
        expected = [cosine_alpha_bar(u) / cosine_alpha_bar(0) for u in x]
        np.testing.assert_allclose(alpha_bar[:-1], expected[:-1], rtol=1e-9)


def test_legends_show_names_literally(tmp_path: Path, figures: list[Any]) -> None:
    """matplotlib would hide a name that begins with an underscore, and read dollar signs as math."""
    names = ["_run", "a$b$c", "x" * 30 + "y" * 30]
    tables = [alphas_cumprod(name) for name in ("linear", "squaredcos_cap_v2", "sigmoid")]
    schedule_plot(dict(zip(names, tables, strict=True)), tmp_path / "x.png")
    (legend,) = figures[0].legends
    first, second, third = legend_of(legend)
    assert [first, second] == ["_run", "a$b$c"]
    assert len(third) < 60
    assert third.startswith("xxx")
    assert third.endswith("yyy")
    for axes in figures[0].axes:
        assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 3
    for line, table in zip(lines_of(figures[0].axes[1]), tables, strict=True):
        np.testing.assert_array_equal(line[:, 1], table)


def test_loss_weights_are_drawn_for_the_schedules_that_have_some(tmp_path: Path, figures: list[Any]) -> None:
    weights = np.geomspace(1e-3, 5, 50)
    schedules = {"one": alphas_cumprod("linear"), "two": alphas_cumprod("squaredcos_cap_v2")}
    schedule_plot(schedules, tmp_path / "x.png", loss_weights={"two": weights})
    assert len(figures[0].axes) == 4
    (line,) = lines_of(figures[0].axes[3])
    np.testing.assert_array_equal(line, np.stack([np.arange(50), weights], axis=1))


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
def test_invalid_schedules_are_refused(
    tmp_path: Path, schedules: dict[str, np.ndarray], weights: dict[str, np.ndarray], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        schedule_plot(schedules, tmp_path / "x.png", loss_weights=weights)
    assert not (tmp_path / "x.png").exists()


# All figures


def test_figures_are_png_files_that_depend_on_the_numbers_only(tmp_path: Path) -> None:
    samples = distinct_images(8, 4, 4)
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        training_curves({"_a $b": losses(30), "": losses(1)}, folder / "training.png")
        timestep_curves(folder / "timesteps.png", bound=a_bound())
        schedule_plot({"a $b": alphas_cumprod("linear")}, folder / "schedule.png", loss_weights={"a $b": np.ones(50)})
        evaluation_plot(
            folder / "evaluation.png", samples=samples, real=samples, compared=samples, neighbors=samples,
            distances=np.ones(8), bound=a_bound(), title="_a $b",
        )  # fmt: skip
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
        with Image.open(path) as picture:
            picture.load()
            assert (picture.format, "Software" in picture.info) == ("PNG", False)
            assert len(np.unique(np.asarray(picture.convert("L")))) > 50


def test_no_figure_touches_those_of_the_caller() -> None:
    source = Path(plots.__file__).read_text(encoding="utf-8")
    assert re.search(r"import.*pyplot|matplotlib\.use", source) is None

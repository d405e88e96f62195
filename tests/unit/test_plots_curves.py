"""Each number in a picture of runs is one of their metrics, or a mean of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddpm_hf.evaluation.likelihood import VariationalBound
from ddpm_hf.evaluation.report import NUM_BINS, binned
from ddpm_hf.plots import (
    _timestep_figure,
    _training_figure,
    bin_means,
    moving_average,
    timestep_curves,
    training_curves,
)


def drawn(axes: Any) -> list[np.ndarray]:
    """Returns the points of each line, (number, 2)."""
    return [np.asarray(line.get_xydata(), np.float64) for line in axes.lines]


def losses(count: int, factor: float = 1.0) -> list[dict[str, Any]]:
    return [{"step": 10 * k, "loss": factor / k} for k in range(1, count + 1)]


def a_bound(num_timesteps: int = 250) -> dict[str, Any]:
    """A chain in which two thirds of the timesteps have seen an image."""
    t = np.arange(num_timesteps)[::-1]
    counts = t % 3
    return {
        "timesteps": t.tolist(),
        "x_0_mse": (1e-4 * (t + 1)).tolist(),
        "eps_mse": (1 / (t + 1)).tolist(),
        "terms": (1 / (t + 1) ** 2).tolist(),
        "counts": counts.tolist(),
    }


def test_losses_of_runs_are_drawn_as_they_are_with_their_averages() -> None:
    (axes,) = _training_figure({"long": losses(100), "short": losses(3, factor=2.0)}).axes
    raw, average, short = drawn(axes)
    steps = 10.0 * np.arange(1, 101)
    np.testing.assert_array_equal(raw, np.stack([steps, 10 / steps], axis=1))
    np.testing.assert_array_equal(average, np.stack([steps, moving_average(10 / steps, 3)], axis=1))
    np.testing.assert_array_equal(short, [[10, 2], [20, 1], [30, 2 / 3]])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["long", "short"]
    colors = [line.get_color() for line in axes.lines]
    assert colors[0] == colors[1] != colors[2]
    assert [line.get_color() for line in axes.get_legend().get_lines()] == colors[1:]
    assert axes.get_xlim()[0] == 0


def test_runs_need_not_have_the_same_columns() -> None:
    validated = [*losses(2), {"step": 20, "validation_loss": 0.25}, {"step": 25, "validation_loss": 0.2}]
    figure = _training_figure({"plain": losses(2), "validated": validated, "only": [{"step": 7, "validation_loss": 3}]})
    (axes,) = figure.axes
    lines = [line for line in drawn(axes) if len(line)]
    expected = [[[10, 1], [20, 0.5]], [[10, 1], [20, 0.5]], [[20, 0.25], [25, 0.2]], [[7, 3]]]
    assert [line.tolist() for line in lines] == expected
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["plain", "validated", "only", "training loss, moving average", "validation loss"]


def test_each_kind_of_score_has_a_panel_of_its_own() -> None:
    def score(step: int, value: float, metric: str, features: str | None) -> dict[str, Any]:
        return {"step": step, "score": value, "score_metric": metric, "score_features": features}

    first = [*losses(2), score(10, 50.0, "fid", "inception"), score(20, 40.0, "fid", "inception")]
    second = [*losses(2), score(10, 5.0, "bits_per_dim", None), score(20, 30.0, "fid", "inception")]
    figure = _training_figure({"first": first, "second": second})
    _, bits, fid = figure.axes
    assert [axes.get_title() for axes in (bits, fid)] == ["bits_per_dim", "fid, inception"]
    assert [line.tolist() for line in drawn(bits)] == [[], [[10, 5]]]
    assert [line.tolist() for line in drawn(fid)] == [[[10, 50], [20, 40]], [[20, 30]]]
    assert figure.axes[0].lines[1].get_color() == bits.lines[1].get_color() == fid.lines[1].get_color()


def test_losses_that_are_no_finite_numbers_are_counted_and_not_drawn() -> None:
    values = [1.0, None, float("nan"), float("inf"), "much", True, 0.5]
    rows = [{"step": step, "loss": value} for step, value in enumerate(values)]
    (axes,) = _training_figure({"run": rows}).axes
    assert drawn(axes)[0].tolist() == [[0, 1], [6, 0.5]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["run (5 not finite)"]


def test_runs_without_anything_to_draw_are_refused(tmp_path: Path) -> None:
    for rows in ([{"step": 1, "grad_norm": 2.0}], [{"step": 1, "loss": None}]):
        with pytest.raises(ValueError, match="metrics of two hold no loss, validation_loss or score that is a finite"):
            training_curves({"one": losses(2), "two": rows}, tmp_path / "x.png")
    with pytest.raises(ValueError, match="runs is empty"):
        training_curves({}, tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


def test_losses_by_quartile_are_drawn_as_they_are() -> None:
    rows: list[dict[str, Any]] = [
        {"step": 10 * k, "loss": 1.0} | {f"loss_q{q}": (q + 1) / k for q in range(4)} for k in range(1, 6)
    ]
    rows[2]["loss_q3"] = None
    not_finite = {"loss": None} | {f"loss_q{q}": None for q in range(4)}
    (axes,) = _timestep_figure([*rows, {"step": 60} | not_finite], None).axes
    for quartile, line in enumerate(drawn(axes)):
        expected = [[10 * k, (quartile + 1) / k] for k in range(1, 6) if (quartile, k) != (3, 3)]
        np.testing.assert_array_equal(line, expected)
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names[0] == "$t < T/4$ (1 not finite)"
    assert names[3] == r"$3T/4 \leq t$ (1 not finite)"  # not the line in which none of its timesteps was drawn


def test_errors_and_terms_of_a_bound_are_drawn_where_images_were_seen() -> None:
    bound = a_bound()
    columns = {name: np.asarray(values, np.float64) for name, values in bound.items()}
    is_known = columns["counts"] > 0
    errors, terms = _timestep_figure([], bound).axes
    shown = [*drawn(errors), *drawn(terms)]
    for raw, means, name in zip(shown[::2], shown[1::2], ("eps_mse", "x_0_mse", "terms"), strict=True):
        np.testing.assert_array_equal(raw[:, 0], columns["timesteps"][is_known])
        np.testing.assert_array_equal(raw[:, 1], columns[name][is_known])
        np.testing.assert_array_equal(means[:, 1], bin_means(columns[name], columns["counts"], 100))
    assert len(shown) == 6


def test_means_over_timesteps_are_those_of_the_picture_of_an_evaluation() -> None:
    content = a_bound()
    arrays = {name: np.asarray(content[name], np.float64) for name in ("terms", "x_0_mse", "eps_mse")}
    counts = np.asarray(content["counts"], np.int64)
    bound = VariationalBound(
        timesteps=tuple(content["timesteps"]), prior=0.0, counts=counts, totals=np.ones(2), **arrays
    )
    for values in arrays.values():
        np.testing.assert_allclose(bin_means(values, counts, NUM_BINS), binned(values, bound), rtol=1e-14)
    unknown = np.where(counts > 0, arrays["terms"], np.nan)
    np.testing.assert_array_equal(bin_means(unknown, counts, NUM_BINS), bin_means(arrays["terms"], counts, NUM_BINS))


def test_what_says_nothing_of_timesteps_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    with pytest.raises(ValueError, match="no loss_q0 to loss_q3, and there is no bound"):
        timestep_curves(path, metrics=losses(2))
    for change in ({"terms": [1.0]}, {"counts": [0] * 250}, {"eps_mse": None}, {"x_0_mse": ["a"] * 250}):
        with pytest.raises(ValueError, match="bound must have timesteps, x_0_mse"):
            timestep_curves(path, bound=a_bound() | change)
    with pytest.raises(ValueError, match="bound must have timesteps"):
        timestep_curves(path, bound={})
    assert list(tmp_path.iterdir()) == []


def test_pictures_of_runs_are_png_of_those_sizes(tmp_path: Path) -> None:
    rows = [*losses(30), {"step": 5, "score": 1.0, "score_metric": "fid", "score_features": None}]
    quartiles = [{"step": 1} | {f"loss_q{q}": 1.0 for q in range(4)}]
    training_curves({"a": losses(30)}, tmp_path / "936x546.png")
    training_curves({"a": rows}, tmp_path / "936x884.png")
    timestep_curves(tmp_path / "936x546 quartiles.png", metrics=quartiles)
    timestep_curves(tmp_path / "2028x546.png", metrics=quartiles, bound=a_bound())
    for path in tmp_path.iterdir():
        with Image.open(path) as picture:
            picture.load()
            assert picture.format == "PNG"
            assert f"{picture.width}x{picture.height}" == path.stem.split()[0]

"""Pictures show the pixels that went in, where they belong."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_hf.plots import (
    LABEL_HEIGHT,
    _loss_figure,
    _short,
    denoising_strip,
    forward_strip,
    image_grid,
    loss_curve,
    save_animation,
)


def distinct_images(count: int, height: int = 2, width: int = 2, channels: int = 1) -> np.ndarray:
    """Images of which no two pixels next to each other are equal."""
    size = count * height * width * channels
    return (np.arange(size) * 37 % 251).astype(np.uint8).reshape(count, height, width, channels)


def tile(picture: Image.Image, row: int, column: int, height: int, width: int, gap: int, top: int) -> np.ndarray:
    y, x = top + row * (height + gap), gap + column * (width + gap)
    return np.asarray(picture)[y : y + height, x : x + width]


def test_grid_shows_every_image_row_by_row_enlarged_by_a_whole_factor() -> None:
    images = distinct_images(5, height=2, width=3, channels=3)
    picture = image_grid(images, 3, enlarge_to=12, gap=5)
    assert picture.mode == "RGB"
    assert picture.size == (5 + 3 * (12 + 5), 5 + 2 * (8 + 5))
    for index, image in enumerate(images):
        shown = tile(picture, *divmod(index, 3), height=8, width=12, gap=5, top=5)
        np.testing.assert_array_equal(shown, image.repeat(4, axis=0).repeat(4, axis=1))


def test_grid_is_white_where_there_is_no_image() -> None:
    pixels = np.asarray(image_grid(np.zeros((3, 4, 4, 1), np.uint8), 2, enlarge_to=4, gap=1))
    assert pixels[:, [0, 5, 10]].min() == 255
    assert pixels[[0, 5, 10]].min() == 255
    assert pixels[6:10, 6:10].min() == 255
    assert pixels[6:10, 1:5].max() == 0


def test_large_images_keep_their_pixels() -> None:
    images = distinct_images(1, height=100, width=80)
    shown = tile(image_grid(images, 1, enlarge_to=64, gap=4), 0, 0, height=100, width=80, gap=4, top=4)
    np.testing.assert_array_equal(shown, images[0].repeat(3, axis=-1))


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_channels_that_are_not_colors_are_shown_side_by_side_in_gray(channels: int) -> None:
    images = distinct_images(1, height=4, width=4, channels=channels)
    shown = tile(image_grid(images, 1, enlarge_to=1, gap=2), 0, 0, height=4, width=4 * channels, gap=2, top=2)
    for channel in range(channels):
        np.testing.assert_array_equal(
            shown[:, 4 * channel : 4 * channel + 4], images[0, ..., [channel]].transpose(1, 2, 0).repeat(3, axis=-1)
        )


def test_transparent_images_are_shown_on_white() -> None:
    images = np.array([[[[200, 100, 0, 255], [200, 100, 0, 0], [200, 100, 0, 51]]]], np.uint8)
    shown = tile(image_grid(images, 1, enlarge_to=1, gap=1), 0, 0, height=1, width=3, gap=1, top=1)
    np.testing.assert_array_equal(shown, [[[200, 100, 0], [255, 255, 255], [244, 224, 204]]])


def test_labels_stand_above_their_columns_and_leave_the_images_alone() -> None:
    images = distinct_images(3)
    plain = image_grid(images, 3, gap=4)
    for labels in (["0", "1", "2"], ["cat", "a name far too long for its column", ""]):
        labelled = image_grid(images, 3, gap=4, column_labels=labels)
        np.testing.assert_array_equal(np.asarray(labelled)[LABEL_HEIGHT:], np.asarray(plain)[4:])
        header = np.asarray(labelled)[:LABEL_HEIGHT]
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
def test_grid_refuses_what_is_no_batch_of_images(images: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        image_grid(images, 2)


def test_a_name_with_line_breaks_is_one_line() -> None:
    """As of a class of a data set of the Hub, which may have any name."""
    images = np.zeros((2, 16, 16, 3), np.uint8)
    broken = image_grid(images, 2, column_labels=["a\nb\r\nc", "\n"])
    np.testing.assert_array_equal(broken, image_grid(images, 2, column_labels=["a b c", ""]))


@pytest.mark.parametrize("size", [32, 64])
def test_captions_of_neighbours_do_not_touch(size: int) -> None:
    """No ink in the 8 pixels around the middle of a gap, which has 4; a letter of the smallest size is 5 wide."""
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
    trajectory = distinct_images(9 * 2).reshape(9, 2, 2, 2, 1)
    picture = denoising_strip(trajectory, num_frames=3, enlarge_to=64, gap=4)
    assert picture.size == (4 + 3 * 68, LABEL_HEIGHT + 2 * 68)
    for row in range(2):
        for column, frame in enumerate([0, 4, 8]):
            shown = tile(picture, row, column, height=64, width=64, gap=4, top=LABEL_HEIGHT)
            expected = trajectory[frame, row].repeat(32, axis=0).repeat(32, axis=1).repeat(3, axis=-1)
            np.testing.assert_array_equal(shown, expected)


def test_strip_shows_all_frames_of_a_short_trajectory() -> None:
    assert denoising_strip(distinct_images(3)[:, None], num_frames=10).size[0] == 4 + 3 * 68
    assert denoising_strip(distinct_images(1)[:, None], num_frames=10).size[0] == 4 + 68


def test_strip_refuses_a_single_frame() -> None:
    with pytest.raises(ValueError, match="ask for at least 2"):
        denoising_strip(distinct_images(3)[:, None], num_frames=1)


def test_forward_strip_shows_each_state_with_its_timestep_above_and_its_snr_below() -> None:
    states = distinct_images(3, height=2, width=2, channels=3)
    plain = np.asarray(image_grid(states, 3, enlarge_to=96, gap=4))
    picture = np.asarray(forward_strip(states, [0, 500, 999], [9999.0, 0.0784, 4.04e-5]))
    assert picture.shape == (2 * LABEL_HEIGHT + 96, 4 + 3 * 100, 3)
    np.testing.assert_array_equal(picture[LABEL_HEIGHT:-LABEL_HEIGHT], plain[4:-4])
    for labels in (picture[:LABEL_HEIGHT], picture[-LABEL_HEIGHT:]):
        assert [labels[:, 4 + column * 100 : 100 + column * 100].min() < 128 for column in range(3)] == [True] * 3
        assert labels[:, [*range(4), *range(100, 104), *range(200, 204)]].min() == 255


def test_forward_strip_writes_what_it_was_given() -> None:
    """The same words give the same pixels, and other numbers give others."""
    states = distinct_images(2)
    picture = np.asarray(forward_strip(states, [0, 10], [2.0, 0.5]))
    other_t = np.asarray(forward_strip(states, [0, 11], [2.0, 0.5]))
    other_snr = np.asarray(forward_strip(states, [0, 10], [2.0, 0.6]))
    assert (picture[:LABEL_HEIGHT] != other_t[:LABEL_HEIGHT]).any()
    np.testing.assert_array_equal(picture[LABEL_HEIGHT:], other_t[LABEL_HEIGHT:])
    assert (picture[-LABEL_HEIGHT:] != other_snr[-LABEL_HEIGHT:]).any()
    np.testing.assert_array_equal(picture[:-LABEL_HEIGHT], other_snr[:-LABEL_HEIGHT])


@pytest.mark.parametrize(
    ("snr", "text"),
    [(0.0, "0"), (9999.0, "9999"), (23999.4, "23999"), (4.14, "4.1"), (0.0057, "0.0057"), (4.04e-5, "4.0e-05"),
     (1e12, "1.0e+12")],
)  # fmt: skip
def test_an_snr_is_written_so_that_it_fits_below_an_image(snr: float, text: str) -> None:
    assert _short(snr) == text


def test_forward_strip_refuses_labels_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="2 states, 1 timesteps and 2 snrs"):
        forward_strip(distinct_images(2), [0], [2.0, 0.5])
    with pytest.raises(ValueError, match="2 states, 2 timesteps and 3 snrs"):
        forward_strip(distinct_images(2), [0, 1], [2.0, 0.5, 0.1])


@pytest.mark.parametrize("channels", [1, 3])
def test_animation_runs_from_noise_to_image_and_rests_there(tmp_path: Path, channels: int) -> None:
    trajectory = distinct_images(20 * 4, channels=channels).reshape(20, 4, 2, 2, channels)
    path = tmp_path / "denoising.gif"
    save_animation(trajectory, path, num_columns=2, frame_milliseconds=50, hold_last=900, max_frames=5)
    with Image.open(path) as animation:
        assert animation.n_frames == 5
        assert animation.info["loop"] == 0
        durations = []
        for index, frame in enumerate([0, 5, 10, 14, 19]):
            animation.seek(index)
            durations.append(animation.info["duration"])
            # A frame has at most 17 colors here, so the palette of a GIF holds all of them.
            expected = np.asarray(image_grid(trajectory[frame], 2, enlarge_to=48))
            np.testing.assert_array_equal(np.asarray(animation.convert("RGB")), expected)
    assert durations == [50, 50, 50, 50, 900]


@pytest.mark.parametrize("num_losses", [1, 3, 400])
def test_loss_curve_writes_the_same_picture_every_time(tmp_path: Path, num_losses: int) -> None:
    steps = list(range(1, num_losses + 1))
    losses = [1 / step for step in steps]
    for name in ("one", "two"):
        loss_curve(steps, losses, tmp_path / name, validation_steps=[1], validation_losses=[0.9])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    with Image.open(tmp_path / "one") as picture:
        assert picture.format == "PNG"
        assert picture.size == (936, 546)


@pytest.mark.parametrize("losses", [[0.9], [0.9, 0.8], [0.9, 0.1, 0.01]])
def test_a_few_losses_are_shown_where_they_are_from_the_first_step_on(losses: list[float]) -> None:
    """Otherwise the axes span only what lies between the points, which for one point is nothing."""
    steps = [20 * (number + 1) for number in range(len(losses))]
    (axes,) = _loss_figure(steps, losses, [], []).axes
    left, right = axes.get_xlim()
    assert left == 0
    assert steps[-1] <= right < 1.1 * steps[-1]
    bottom, top = axes.get_ylim()
    assert max(losses) < top
    assert bottom == 0 if len(losses) == 1 else bottom < min(losses)


def test_loss_curve_survives_losses_that_are_not_finite_or_not_positive(tmp_path: Path) -> None:
    for losses in ([float("nan")] * 3, [float("inf"), 0.5, 0.1], [0.0, -1.0, 2.0]):
        loss_curve([1, 2, 3], losses, tmp_path / "loss.png")
        assert (tmp_path / "loss.png").stat().st_size > 0


def test_loss_curve_refuses_losses_without_steps(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 steps with 1 losses"):
        loss_curve([1, 2], [0.5], tmp_path / "loss.png")
    with pytest.raises(ValueError, match="0 steps with 0 losses"):
        loss_curve([], [], tmp_path / "loss.png")

"""The report of a finished run: pictures, numbers and code that loads the pipeline."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddpm_hf.evaluation.generate import Sampler
from ddpm_hf.evaluation.recognition import RecognitionReport
from ddpm_hf.plots import denoising_strip, image_grid
from ddpm_hf.run_report import loading_lines, write_report

METRICS = [
    {"step": 10, "num_images": 640, "loss": 0.9},
    {"step": 20, "num_images": 1280, "loss": 0.25, "validation_loss": 0.3},
    {"step": 20, "seconds": 3.0},
]
RECOGNITION = RecognitionReport(
    num_samples=500,
    recognised=0.968,
    recognised_held_out=0.989,
    recognised_per_class={0: 1.0, 1: 0.936},
    nearest_training_median=0.14,
    nearest_training_min=0.07,
    held_out_nearest_training_median=0.13,
    held_out_nearest_training_min=0.05,
    nearest_sample_min=0.08,
    num_duplicates=0,
    sample_mean=0.305,
    sample_std=0.376,
    train_mean=0.304,
    train_std=0.375,
)


def images(count: int, side: int = 4, channels: int = 1) -> np.ndarray:
    """Images of one value each, so that a tile identifies its image."""
    return np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, side, side, channels)).copy()


def report_arguments(**changes: Any) -> dict[str, Any]:
    arguments = {
        "samples": images(20),
        "sample_labels": np.arange(20) % 10,
        "class_names": [f"class{label}" for label in range(10)],
        "trajectory": np.stack([images(10)] * 4),
        "metrics": METRICS,
        "recognition": RECOGNITION,
        "title": "Digits",
        "command": "python train_ddpm.py --config configs/digits_8.yaml",
        "settings": {"noise schedule": "cosine", "loss": "mse | l1"},
        "sampler": Sampler(num_inference_steps=50),
    }
    return arguments | changes


def pixels(source: Path | Image.Image) -> np.ndarray:
    with Image.open(source) if isinstance(source, Path) else source as picture:
        return np.asarray(picture)


def test_class_conditional_samples_are_in_the_column_of_their_class(tmp_path: Path) -> None:
    """The samples come in any order; every column holds the first ones of its class, in order."""
    order = np.random.default_rng(0).permutation(20)
    arguments = report_arguments(samples=images(20)[order], sample_labels=(np.arange(20) % 10)[order])
    paths = write_report(tmp_path, **arguments)
    first_two = np.stack([np.flatnonzero(order % 10 == label)[:2] for label in range(10)], axis=1).reshape(-1)
    expected = image_grid(images(20)[order][first_two], 10, column_labels=arguments["class_names"])
    np.testing.assert_array_equal(pixels(paths.samples), pixels(expected))


def test_classes_of_unequal_size_fill_whole_rows_and_at_most_ten_classes_are_shown(tmp_path: Path) -> None:
    labels = np.array([0, 0, 0, *range(1, 12), *range(1, 12)])
    paths = write_report(tmp_path, **report_arguments(samples=images(25), sample_labels=labels, class_names=None))
    rows = np.stack([np.flatnonzero(labels == label)[:2] for label in range(10)], axis=1).reshape(-1)
    expected = image_grid(images(25)[rows], 10, column_labels=[str(label) for label in range(10)])
    np.testing.assert_array_equal(pixels(paths.samples), pixels(expected))


def test_unconditional_samples_fill_a_square(tmp_path: Path) -> None:
    arguments = report_arguments(sample_labels=None, class_names=None, samples=images(20, channels=3))
    paths = write_report(tmp_path, **arguments)
    np.testing.assert_array_equal(pixels(paths.samples), pixels(image_grid(images(16, channels=3), 4)))


def test_strip_and_animation_show_the_trajectory(tmp_path: Path) -> None:
    trajectory = np.random.default_rng(0).integers(0, 256, (4, 25, 8, 8, 1), np.uint8)
    paths = write_report(tmp_path, **report_arguments(trajectory=trajectory))
    np.testing.assert_array_equal(pixels(paths.denoising), pixels(denoising_strip(trajectory[:, :10])))
    with Image.open(paths.animation) as animation:
        animation.seek(animation.n_frames - 1)
        last = np.asarray(animation.convert("RGB"))
    whole_rows = image_grid(trajectory[-1, :20], 10, enlarge_to=48)
    np.testing.assert_array_equal(last, pixels(whole_rows))


@pytest.mark.parametrize(("side", "num_animated"), [(8, 20), (32, 10), (64, 4), (256, 1)])
def test_animations_of_large_images_show_fewer_of_them(tmp_path: Path, side: int, num_animated: int) -> None:
    paths = write_report(tmp_path, **report_arguments(trajectory=np.stack([images(20, side)] * 2)))
    columns = min(10, num_animated)
    with Image.open(paths.animation) as animation:
        assert animation.size == image_grid(images(num_animated, side), columns, enlarge_to=48).size


def test_readme_shows_every_picture_and_number(tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "config.yaml").write_text("data: {}\n")
    paths = write_report(tmp_path, **report_arguments())
    readme = paths.readme.read_text(encoding="utf-8")
    shown = re.findall(r"!\[.*?\]\((.*?)\)", readme)
    assert shown == ["samples.png", "denoising.gif", "denoising.png", "loss.png"]
    assert all((tmp_path / name).exists() for name in shown)
    assert all(line in readme for line in RECOGNITION.lines())
    assert "loss 0.2500 at step 20" in readme
    assert "python train_ddpm.py --config configs/digits_8.yaml" in readme
    assert r"| loss | mse \| l1 |" in readme
    assert "`pipeline/`" in readme
    assert "`config.yaml`" in readme
    assert "checkpoints" not in readme
    assert str(tmp_path) not in readme
    assert paths.recognition == tmp_path / "recognition.json", "evaluation.json is what `ddpm-hf evaluate` writes"
    assert json.loads(paths.recognition.read_text()) == json.loads(json.dumps(RECOGNITION.to_dict()))


def test_what_was_not_measured_is_left_out(tmp_path: Path) -> None:
    paths = write_report(tmp_path, **report_arguments(metrics=[], recognition=None, settings={}))
    assert (paths.loss, paths.recognition) == (None, None)
    readme = paths.readme.read_text(encoding="utf-8")
    assert "loss.png" not in readme
    assert "## Quality" not in readme
    assert "setting" not in readme
    files = ["README.md", "denoising.gif", "denoising.png", "samples.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == files


def test_writing_a_report_again_gives_the_same_bytes_and_leaves_no_temporary_files(tmp_path: Path) -> None:
    write_report(tmp_path, **report_arguments())
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_report(tmp_path, **report_arguments())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first
    assert not [name for name in first if name.startswith(".")]


def test_inconsistent_labels_and_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="20 samples but labels of shape"):
        write_report(tmp_path, **report_arguments(sample_labels=np.zeros(3, np.int64)))
    with pytest.raises(ValueError, match="2 class_names, but a sample of class 9"):
        write_report(tmp_path, **report_arguments(class_names=["a", "b"]))


def test_loading_lines_are_python_with_folder_classes_and_sampling_settings() -> None:
    sampler = Sampler(num_inference_steps=50, eta=0.0)
    lines = loading_lines(Path("outputs/digits/pipeline"), [str(label) for label in range(10)], sampler)
    ast.parse(lines)
    assert 'GaussianDiffusionPipeline.from_pretrained("outputs/digits/pipeline")' in lines
    assert "batch_size=10, class_labels=list(range(10)), num_inference_steps=50, eta=0.0)" in lines
    assert "DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)" in lines


def test_loading_lines_name_classes_that_are_named_by_other_numbers() -> None:
    assert "class_labels=['1', '2'])" in loading_lines(Path("pipeline"), ["1", "2"], Sampler())


def test_loading_lines_of_an_unconditional_pipeline_need_diffusers_only() -> None:
    lines = loading_lines(Path('a "quoted" folder'), None, Sampler())
    ast.parse(lines)
    assert lines.splitlines()[1] == "from diffusers import DiffusionPipeline"
    assert r'DiffusionPipeline.from_pretrained("a \"quoted\" folder")' in lines
    assert "class_labels" not in lines
    assert "trust_remote_code" not in lines


def test_models_of_latents_are_not_loaded_by_the_stock_pipeline() -> None:
    lines = loading_lines(Path("pipeline"), None, Sampler(), has_vae=True)
    assert "images = pipeline(batch_size=16).images" in lines
    assert "DiffusionPipeline.from_pretrained(folder)" not in lines
    assert lines.count("DiffusionPipeline.from_pretrained(") == 2
    assert "custom_pipeline=folder" in lines

"""The page of `ddpm-hf demo`: its actions with a stand-in for Gradio, and the page in a browser if there is one."""

import importlib
import importlib.util
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddpm_hf.cli.main import main
from ddpm_hf.diffusion import GaussianDiffusionScheduler
from tests.saved_folders import make_pipeline

ANY = "any"


class Refused(Exception):
    """Stands for gradio.Error."""


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import the module beside a Gradio that has what the actions use."""
    slider = lambda *args, **options: SimpleNamespace(args=args, **options)  # noqa: E731
    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace(Error=Refused, Slider=slider, Blocks=object))
    monkeypatch.delitem(sys.modules, "ddpm_hf.demo", raising=False)
    yield importlib.import_module("ddpm_hf.demo")
    sys.modules.pop("ddpm_hf.demo")


@pytest.fixture
def page(demo: Any) -> Any:
    return demo.Page(make_pipeline("guided"))


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture)


def difference(picture: Image.Image, other: Image.Image) -> int:
    return int(abs(pixels(picture).astype(int) - pixels(other).astype(int)).max())


@pytest.mark.parametrize("sampler", ["UniPC", "DPM-Solver++", "DDIM", "DDPM"])
def test_samples_are_those_of_their_seeds_and_end_the_denoising_process(page: Any, sampler: str) -> None:
    picture, frames, slider = page.sample(3, 4, page.classes[1], 2.0, 5, sampler)
    alone, _, _ = page.sample(4, 1, page.classes[1], 2.0, 5, sampler)
    assert len(frames) == 6
    assert slider.value == 5
    np.testing.assert_array_equal(pixels(page.frame(frames, 5)), pixels(picture))
    assert difference(page.picture(frames[-1][1:2]), alone) <= 1  # batches of other sizes round differently
    assert type(page.pipeline.scheduler).__name__ == "GaussianDiffusionScheduler"


def test_a_morph_begins_and_ends_at_its_seeds(page: Any, demo: Any) -> None:
    _, frames, _ = page.morph(5, 6, page.classes[0], 1.0, 4)
    assert len(frames) == demo.NUM_MORPHS
    for frame, seed in ((frames[0], 5), (frames[-1], 6)):
        expected, _, _ = page.sample(seed, 1, page.classes[0], 1.0, 4, "DDIM")
        assert difference(page.picture(frame), expected) <= 1


def test_a_painted_part_is_filled_and_the_rest_is_kept(page: Any) -> None:
    side = page.width
    background = np.full((side, side, 4), 255, np.uint8)
    layer = np.zeros((side, side, 4), np.uint8)
    layer[: side // 2, :, 3] = 255
    picture = pixels(page.inpaint({"background": background, "layers": [layer]}, 0, 1, ANY, 1.0))
    half = len(picture) // 2
    assert (picture[half + 2 : -2, 2:-2] == 255).all()
    assert (picture[2 : half - 2, 2:-2] != 255).any()
    with pytest.raises(Refused, match="Paint over the part"):
        page.inpaint({"background": background, "layers": []}, 0, 1, ANY, 1.0)


def test_an_uploaded_image_of_any_size_is_varied(page: Any) -> None:
    image = Image.linear_gradient("L").convert("RGBA").resize((50, 20))
    assert page.fit(image).size == (page.width, page.height)
    weak, strong = (pixels(page.vary(image, strength, 0, 1, ANY, 1.0)) for strength in (0.05, 1.0))
    assert weak.shape == strong.shape
    assert (weak != strong).any()
    with pytest.raises(Refused, match="Upload an image"):
        page.vary(None, 0.5, 0, 1, ANY, 1.0)


def test_a_model_of_few_timesteps_is_edited_in_as_many(demo: Any) -> None:
    pipeline = make_pipeline("guided")
    pipeline.scheduler = GaussianDiffusionScheduler(num_train_timesteps=12)
    picture = demo.Page(pipeline).vary(Image.new("RGB", (8, 8)), 1.0, 0, 1, ANY, 1.0)
    assert picture.width >= demo.SMALLEST_SIDE


def test_without_gradio_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "ddpm_hf.demo", raising=False)
    assert main(["demo", "outputs/digits"]) == 2
    assert 'pip install "ddpm_hf[demo]"' in capsys.readouterr().err


@pytest.mark.slow
def test_the_page_samples_in_a_browser(tmp_path: Path) -> None:
    """Click, wait for the picture, move the slider of the denoising process, and inpaint nothing."""
    pytest.importorskip("gradio")
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs Chromium")
    from ddpm_hf.demo import build

    blocks = build(make_pipeline("guided"), "A page")
    _, address, _ = blocks.launch(prevent_thread_lock=True, quiet=True)
    try:
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            view = browser.new_page()
            view.goto(address)
            view.get_by_role("button", name="Sample", exact=True).click()
            shown = view.get_by_test_id("detailed-image").or_(view.locator("img[src*='/file=']")).first
            shown.wait_for(timeout=120_000)
            last = shown.get_attribute("src")
            slider = view.get_by_role("slider", name="Denoising process").or_(
                view.locator("input[type=range]:visible").last
            )
            slider.first.focus()
            slider.first.press("Home")
            view.wait_for_function("last => document.querySelector(`img[src='${last}']`) === null", arg=last)
            view.get_by_role("tab", name="Inpaint").click()
            view.get_by_role("button", name="Fill", exact=True).click()
            view.get_by_text("Upload an image first.").wait_for(timeout=60_000)
            view.screenshot(path=str(tmp_path / "page.png"))
            browser.close()
    finally:
        blocks.close()

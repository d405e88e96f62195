"""A Gradio page for a trained pipeline: sample, watch the denoising, morph, start from an image, inpaint.

`ddpm-hf demo` opens it, and a Space runs a copy of this file, so it imports no other module of the package.
"""

import copy
import threading
from collections.abc import Callable
from typing import Any

import gradio as gr
import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from numpy.typing import NDArray
from PIL import Image

# Name: the scheduler instead of the pipeline's own, and eta of the own.
SAMPLERS: dict[str, tuple[Any, float | None]] = {
    "UniPC": (UniPCMultistepScheduler, None),
    "DPM-Solver++": (DPMSolverMultistepScheduler, None),
    "DDIM": (None, 0.0),
    "DDPM": (None, 1.0),
}
NUM_STEPS, MAX_STEPS = 20, 250
NUM_EDITING_STEPS, NUM_RESAMPLES = 100, 4
MAX_IMAGES = 16
MAX_FRAMES = 60
NUM_MORPHS = 24
SMALLEST_SIDE = 256
RANDOM_CLASS = "any"

Images = NDArray[np.uint8]
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class Page:
    """The actions of the page. Each takes the values of its controls and returns pictures.

    Args:
        pipeline: A GaussianDiffusionPipeline of 1, 3 or 4 channels.
    """

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        pipeline.set_progress_bar_config(disable=True)
        self.channels, self.height, self.width = pipeline.image_shape
        names = pipeline.config.get("class_names") or {}
        self.classes = [str(names.get(str(number), number)) for number in range(pipeline.num_classes)]
        self.num_timesteps = int(pipeline.scheduler.config["num_train_timesteps"])
        self.num_editing_steps = min(NUM_EDITING_STEPS, self.num_timesteps)
        self.is_guided = bool(pipeline.config.get("has_null_label"))
        self._lock = threading.Lock()  # one picture at a time: they share the device

    # Actions

    def sample(
        self, seed: int, num_images: int, name: str, guidance: float, steps: int, sampler: str
    ) -> tuple[Image.Image, list[Images], Any]:
        """Return a picture of samples, the frames of their denoising, and the slider over the frames."""
        num_images = int(num_images)
        output = self._call(
            seed, num_images, name, guidance, sampler, num_inference_steps=int(steps), return_trajectory=True
        )
        trajectory = (output.trajectory * 255).round().byte().permute(0, 1, 3, 4, 2).numpy()
        kept = np.unique(np.linspace(0, len(trajectory) - 1, MAX_FRAMES).round().astype(int))
        frames = list(trajectory[kept])
        slider = gr.Slider(0, len(frames) - 1, value=len(frames) - 1, step=1, interactive=True)
        return self.picture(output.images), frames, slider

    def morph(
        self, seed: int, other: int, name: str, guidance: float, steps: int
    ) -> tuple[Image.Image, list[Images], Any]:
        """Return the images between two seeds: deterministic samples of the noise between theirs."""
        shape = (1, *self.pipeline.sample_shape)
        start, end = (torch.randn(shape, generator=torch.Generator().manual_seed(int(s))) for s in (seed, other))
        angle = torch.linspace(0, torch.pi / 2, NUM_MORPHS).view(-1, 1, 1, 1)
        noise = angle.cos() * start + angle.sin() * end  # a standard normal tensor at every angle
        noise = noise.to(self.pipeline.device)
        images = self._call(
            seed, NUM_MORPHS, name, guidance, "DDIM", num_inference_steps=int(steps), sample=noise
        ).images
        slider = gr.Slider(0, NUM_MORPHS - 1, value=0, step=1, interactive=True)
        return self.picture(images[:1]), [image[None] for image in images], slider

    def vary(
        self, image: Image.Image | None, strength: float, seed: int, num_images: int, name: str, guidance: float
    ) -> Image.Image:
        """Return variations of an image (SDEdit)."""
        if image is None:
            raise gr.Error("Upload an image first.")
        images = [self.fit(image)] * int(num_images)
        options: dict[str, Any] = {"image": images, "strength": strength, "num_inference_steps": self.num_editing_steps}
        return self.picture(self._call(seed, len(images), name, guidance, None, "denoise_from", **options).images)

    def inpaint(
        self, drawing: dict[str, Any] | None, seed: int, num_images: int, name: str, guidance: float
    ) -> Image.Image:
        """Return an image whose painted part is filled (RePaint)."""
        if drawing is None or drawing.get("background") is None:
            raise gr.Error("Upload an image first.")
        painted = np.zeros(np.asarray(drawing["background"]).shape[:2], bool)
        for layer in drawing.get("layers") or []:
            painted |= np.asarray(layer)[..., -1] > 0
        if not painted.any():
            raise gr.Error("Paint over the part to fill.")
        mask = np.asarray(self.fit(Image.fromarray(painted.astype(np.uint8) * 255), mode="L")) > 0
        images = [self.fit(Image.fromarray(np.asarray(drawing["background"])))] * int(num_images)
        options: dict[str, Any] = {"image": images, "mask": mask, "num_resamples": NUM_RESAMPLES}
        options["num_inference_steps"] = self.num_editing_steps
        return self.picture(self._call(seed, len(images), name, guidance, None, "inpaint", **options).images)

    def frame(self, frames: list[Images] | None, number: int) -> Image.Image | None:
        """Return one frame of a list as a picture."""
        return self.picture(frames[int(number)]) if frames else None

    # Images

    def fit(self, image: Image.Image, mode: str | None = None) -> Image.Image:
        """Return an image cropped and scaled to the size of the model, in its channels."""
        scale = max(self.width / image.width, self.height / image.height)
        width, height = (max(1, round(side * scale)) for side in image.size)
        left, top = (width - self.width) // 2, (height - self.height) // 2
        scaled = image.resize((width, height), Image.Resampling.LANCZOS)
        cropped = scaled.crop((left, top, left + self.width, top + self.height))
        return cropped.convert(mode or {1: "L", 3: "RGB", 4: "RGBA"}[self.channels])

    def picture(self, images: Images) -> Image.Image:
        """Arrange images, uint8 (number, height, width, channels), in a square picture, enlarged without smoothing."""
        columns = int(np.ceil(np.sqrt(len(images))))
        rows = -(-len(images) // columns)
        factor = max(1, round(SMALLEST_SIDE / max(self.height, self.width) / np.sqrt(columns)))
        if images.shape[-1] == 1:
            images = images.repeat(3, axis=-1)
        enlarged = images.repeat(factor, axis=1).repeat(factor, axis=2)
        tiles = np.pad(enlarged, [(0, 0), (1, 1), (1, 1), (0, 0)], constant_values=255)
        _, height, width, channels = tiles.shape
        canvas = np.full((rows * columns, height, width, channels), 255, np.uint8)
        canvas[: len(tiles)] = tiles
        grid = canvas.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
        return Image.fromarray(grid.reshape(rows * height, columns * width, channels))

    def _call(
        self,
        seed: int,
        num_images: int,
        name: str,
        guidance: float,
        sampler: str | None,
        method: str = "__call__",
        **options: Any,
    ) -> Any:
        """Run a method of the pipeline with one generator per image; None keeps its own sampler."""
        pipeline = copy.copy(self.pipeline)  # with a scheduler of its own
        if sampler is not None:
            kind, options["eta"] = SAMPLERS[sampler]
            if kind is not None:
                pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
        seeds = [int(seed) + number for number in range(num_images)]
        if "sample" not in options:
            options["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
        if self.classes:
            drawn = [np.random.default_rng(seed).integers(len(self.classes)) for seed in seeds]
            fixed = self.classes.index(name) if name in self.classes else None
            if fixed is None and "sample" in options:
                fixed = int(drawn[0])
            options["class_labels"] = [int(number) for number in drawn] if fixed is None else [fixed] * num_images
            if self.is_guided:
                options["guidance_scale"] = float(guidance)
        try:
            with self._lock:
                return getattr(pipeline, method)(output_type="uint8", **options)
        except ValueError as error:
            raise gr.Error(str(error)) from error


def build(pipeline: Any, title: str = "DDPM", decorate: Decorator = lambda action: action) -> gr.Blocks:
    """Return the page for a pipeline.

    Args:
        pipeline: A GaussianDiffusionPipeline of 1, 3 or 4 channels.
        title: Heading of the page.
        decorate: Wraps every action that needs the device, such as `spaces.GPU` on ZeroGPU.
    """
    page = Page(pipeline)
    config = pipeline.scheduler.config
    num_distilled = config.get("default_num_inference_steps")
    num_steps = int(num_distilled or min(NUM_STEPS, page.num_timesteps))
    best = "DDIM" if num_distilled else "UniPC"  # students are distilled for DDIM
    picture = {"type": "pil", "format": "png", "interactive": False, "buttons": ["download"]}
    with gr.Blocks(title=title) as blocks:
        gr.Markdown(f"# {title}")
        with gr.Row():
            seed = gr.Number(0, label="Seed", precision=0, minimum=0)
            num_images = gr.Slider(1, MAX_IMAGES, value=9, step=1, label="Images")
            name = gr.Dropdown([RANDOM_CLASS, *page.classes], label="Class", visible=bool(page.classes))
            guidance = gr.Slider(0, 6, value=1, step=0.1, label="Guidance", visible=page.is_guided)
            steps = gr.Slider(1, min(page.num_timesteps, MAX_STEPS), value=num_steps, step=1, label="Steps")
        with gr.Tab("Sample"):
            sampler = gr.Dropdown(list(SAMPLERS), value=best, label="Sampler")
            sample = gr.Button("Sample", variant="primary")
            samples = gr.Image(label="Samples", **picture)
            frames = gr.State()
            process = gr.Slider(0, 1, value=0, step=1, label="Denoising process", interactive=False)
            sample.click(
                decorate(page.sample), [seed, num_images, name, guidance, steps, sampler], [samples, frames, process]
            )
            process.change(page.frame, [frames, process], samples, show_progress="hidden")
        with gr.Tab("Morph"):
            other = gr.Number(1, label="Other seed", precision=0, minimum=0)
            morph = gr.Button("Morph", variant="primary")
            morphed = gr.Image(label="Between two seeds", **picture)
            morphs = gr.State()
            position = gr.Slider(0, 1, value=0, step=1, label="From seed to seed", interactive=False)
            morph.click(decorate(page.morph), [seed, other, name, guidance, steps], [morphed, morphs, position])
            position.change(page.frame, [morphs, position], morphed, show_progress="hidden")
        with gr.Tab("From an image"):
            source = gr.Image(type="pil", label="Image")
            strength = gr.Slider(0.05, 1, value=0.5, step=0.05, label="Strength")
            vary = gr.Button("Vary", variant="primary")
            varied = gr.Image(label="Variations", **picture)
            vary.click(decorate(page.vary), [source, strength, seed, num_images, name, guidance], varied)
        with gr.Tab("Inpaint"):
            drawing = gr.ImageEditor(type="numpy", image_mode="RGBA", label="Paint over the part to fill")
            inpaint = gr.Button("Fill", variant="primary")
            filled = gr.Image(label="Filled", **picture)
            inpaint.click(decorate(page.inpaint), [drawing, seed, num_images, name, guidance], filled)
    return blocks

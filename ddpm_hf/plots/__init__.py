"""Pictures of images, runs and schedules. Arrays in, PNG and GIF out; this package needs no torch and stands alone."""

from ddpm_hf.plots.curves import loss_curve, timestep_curves, training_curves
from ddpm_hf.plots.figures import LINE_COLOR, VALIDATION_COLOR
from ddpm_hf.plots.images import (
    BACKGROUND,
    LABEL_COLOR,
    LABEL_HEIGHT,
    LARGEST_FONT,
    SMALLEST_FONT,
    AnyFont,
    UInt8Array,
    denoising_strip,
    forward_strip,
    image_grid,
    save_animation,
)
from ddpm_hf.plots.schedules import schedule_plot

__all__ = [
    "BACKGROUND",
    "LABEL_COLOR",
    "LABEL_HEIGHT",
    "LARGEST_FONT",
    "LINE_COLOR",
    "SMALLEST_FONT",
    "VALIDATION_COLOR",
    "AnyFont",
    "UInt8Array",
    "denoising_strip",
    "forward_strip",
    "image_grid",
    "loss_curve",
    "save_animation",
    "schedule_plot",
    "timestep_curves",
    "training_curves",
]

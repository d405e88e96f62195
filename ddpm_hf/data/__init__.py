"""Image datasets: found, decoded once, and loaded in an order that is a function of the sample number."""

from ddpm_hf.data.augmentation import Augmentation
from ddpm_hf.data.decode import DataError, normalize, to_uint8
from ddpm_hf.data.image_set import ImageSet
from ddpm_hf.data.labels import ClassOrder, class_order_of
from ddpm_hf.data.loader import ImageLoader, SampleOrder
from ddpm_hf.data.splits import describe_sets, locations_of, open_images, open_sets
from ddpm_hf.data.streaming import ImageStream
from ddpm_hf.data.summary import summarize

__all__ = [
    "Augmentation", "ClassOrder", "DataError", "ImageLoader", "ImageSet", "ImageStream", "SampleOrder",
    "class_order_of", "describe_sets", "locations_of", "normalize", "open_images", "open_sets", "summarize", "to_uint8",
]  # fmt: skip

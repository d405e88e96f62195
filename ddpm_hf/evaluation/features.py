"""Networks for features by name: Inception, any vision model of transformers, any module by import path."""

import difflib
import importlib
import inspect
from pathlib import Path

import torch
from torch import nn

from ddpm_hf.evaluation.feature_network import FeatureNetwork, digest_of
from ddpm_hf.evaluation.inception import open_inception

_KINDS = ("dinov2", "transformers")
_FORMS = "inception, dinov2:FOLDER_OR_HUB_ID, transformers:FOLDER_OR_HUB_ID or package.module:factory"


def open_features(features: str, weights: Path | None, device: torch.device) -> FeatureNetwork:
    """Opens the network that a name stands for.

    Args:
        features: `inception`; `dinov2:` or `transformers:` with a local folder or an id on the Hub; or
            `package.module:factory`, a callable without arguments that returns a module as FeatureNetwork has it. That
            module is imported, which runs its code.
        weights: The weights of Inception; the others know where theirs are.
        device: Where to run it.

    Raises:
        ImportError: A library is missing.
        ValueError: The name stands for nothing, or what it stands for cannot be opened.
    """
    kind, _, rest = features.partition(":")
    if features == "inception":
        return open_inception(weights, device)
    if weights is not None:
        raise ValueError(f"weights {weights} is for features inception; {features} finds its own.")
    if kind in _KINDS and rest:
        return _open_transformers(features, device)
    is_path = all(name.isidentifier() for name in [*kind.split("."), *rest.split(".")])
    nearest = difflib.get_close_matches(kind, ["inception", *_KINDS], n=1)
    if not is_path or (nearest and "." not in kind):
        hint = f" Did you mean {nearest[0]}?" if nearest else ""
        raise ValueError(f"features {features} is not known; it must be {_FORMS}.{hint}")
    return _open_factory(features, kind, rest, device)


class _TransformersFeatures(nn.Module):
    """A vision model and its image processor: uint8 images (number, 3, height, width) to its image embedding.

    Args:
        name: A local folder or an id on the Hub.
        sees_borders: Resize the whole image to what the processor would crop out of the middle of a larger one.
    """

    def __init__(self, name: str, *, sees_borders: bool) -> None:
        super().__init__()
        from transformers import AutoImageProcessor, AutoModel

        self.processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
        if sees_borders and getattr(self.processor, "do_center_crop", False):
            size = self.processor.to_dict()["crop_size"]
            self.processor = AutoImageProcessor.from_pretrained(
                name, trust_remote_code=False, size=size, do_center_crop=False
            )
        self.model, loaded = AutoModel.from_pretrained(
            name, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        missing = sorted(loaded["missing_keys"])
        # Many checkpoints come without the pooling layer, which then has random weights.
        self.has_pooler = not any(key.startswith("pooler.") for key in missing)
        if others := [key for key in missing if not key.startswith("pooler.")]:
            raise ValueError(f"it lacks weights of its own network: {', '.join(others[:3])}")
        if self.model.main_input_name != "pixel_values":
            raise ValueError(f"{type(self.model).__name__} is no model of images alone")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the pooled output, or the class token where there is none."""
        pixels = list(images.permute(0, 2, 3, 1).cpu().numpy())
        inputs = self.processor(images=pixels, input_data_format="channels_last", return_tensors="pt")
        outputs = self.model(inputs["pixel_values"].to(images.device))
        pooled = getattr(outputs, "pooler_output", None) if self.has_pooler else None
        embedding: torch.Tensor = outputs.last_hidden_state[:, 0] if pooled is None else pooled
        return embedding.flatten(1)


def _open_transformers(features: str, device: torch.device) -> FeatureNetwork:
    """Opens a vision model of transformers with the preprocessing that it was published with.

    But for `dinov2`, whose processor would resize to 256 pixels and cut a border of 16 off, 23 % of the image: the code
    of Stein et al. 2023 resizes to 224 pixels, and so does this.
    """
    import transformers

    kind, _, name = features.partition(":")
    try:
        module = _TransformersFeatures(name, sees_borders=kind == "dinov2")
    except Exception as error:  # transformers, the Hub and safetensors raise many types
        raise ValueError(
            f"features {features} cannot be opened ({str(error).splitlines()[0]}); give a folder or an id on the Hub "
            "of a vision model with safetensors weights and a preprocessor_config.json."
        ) from error
    model_type = str(module.model.config.model_type)
    if kind == "dinov2" and not model_type.startswith("dinov2"):
        raise ValueError(f"features {features} is a model of type {model_type}; say transformers:{name}.")
    processor = f"{type(module.processor).__name__} {module.processor.to_json_string()}"
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    weights = digest_of(module.state_dict())
    return FeatureNetwork(
        name=features,
        description=f"{type(module.model).__name__} {name}, weights sha256 {weights[:12]}, {_resize(module)}; "
        f"{versions}",
        digest=digest_of({"weights": weights, "processor": processor, "type": model_type, "versions": versions}),
        module=module.eval().requires_grad_(False).to(device),
        device=device,
    )


def _resize(module: _TransformersFeatures) -> str:
    """Says what a processor does to the size of images."""
    settings = module.processor.to_dict()
    keys = ("size", "crop_size", "resample") if settings.get("do_center_crop") else ("size", "resample")
    named = {key: settings[key] for key in keys if settings.get(key) is not None}
    return f"{type(module.processor).__name__} with " + ", ".join(f"{key} {value}" for key, value in named.items())


def _open_factory(features: str, module_name: str, attribute: str, device: torch.device) -> FeatureNetwork:
    """Opens the module that a callable returns."""
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"features {features} cannot be imported ({error}); it must be {_FORMS}.") from error
    module = factory() if callable(factory) else None
    if not isinstance(module, nn.Module):
        raise ValueError(f"features {features} must be a callable that returns a torch.nn.Module.")
    # The weights alone do not tell how the module resizes and normalises, so its source counts too.
    source = Path(inspect.getfile(type(module))).read_bytes().hex()
    weights = digest_of(module.state_dict())
    return FeatureNetwork(
        name=features,
        description=f"{type(module).__name__} of {features}, weights sha256 {weights[:12]}, resized by itself; torch "
        f"{torch.__version__}",
        digest=digest_of({"weights": weights, "source": source, "name": features, "torch": torch.__version__}),
        module=module.eval().requires_grad_(False).to(device),
        device=device,
    )

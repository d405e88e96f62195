"""UNet2DModel presets, the initialization of the paper, and pretrained networks; no layers of our own.

A pretrained network is loaded from a local folder or the Hub: a run or a checkpoint (see model_folder.py), a pipeline
(model_index.json, unet/, scheduler/), the same files side by side as in the google/ddpm-* repositories, or a
UNet2DModel alone (config.json and weights).
"""

import functools
import hashlib
import inspect
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, DDPMScheduler, ModelMixin, UNet2DModel, VQModel
from torch import nn

from ddpm_hf.config import (
    ConfigError,
    DiffusionConfig,
    DistillationConfig,
    ModelConfig,
    UNetOverride,
    join_or,
    log_warning,
    read_config_dict,
)
from ddpm_hf.diffusion import GaussianDiffusionScheduler
from ddpm_hf.diffusion.gaussian import LEARNED_VARIANCE_TYPES
from ddpm_hf.diffusion.saved_folder import LIST_FORM, check_shards, second_moments_file
from ddpm_hf.diffusion.scheduler import DEFAULT_STEPS, DISTILLED_GUIDANCE, SECOND_MOMENTS_FILE
from ddpm_hf.files import (
    MANIFEST,
    MODEL_CONFIG,
    MODEL_INDEX,
    PIPELINE_DIR,
    RUN_CONFIG,
    SCHEDULER_CONFIG,
    TRAINER_STATE,
    TRAINING_CONFIG,
    VAE_DIR,
    read_json,
    sha256_of_file,
    write_json,
)
from ddpm_hf.model_folder import ModelFolder, class_names_of, find_model, settings_of
from ddpm_hf.redaction import reason_of

logger = logging.getLogger(__name__)


def _levels(block_out_channels: list[int], attention_levels: set[int]) -> dict[str, UNetOverride]:
    """Return the blocks of a U-Net, one per level from full resolution down, with attention at some levels."""
    has_attention = [level in attention_levels for level in range(len(block_out_channels))]
    return {
        "block_out_channels": block_out_channels,
        "down_block_types": ["AttnDownBlock2D" if attends else "DownBlock2D" for attends in has_attention],
        "up_block_types": ["AttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(has_attention)],
    }


# Shared by all networks of Ho et al. 2020. One attention head of full width, sine before cosine and the "SAME" padding
# of TensorFlow do not change the number of parameters, but change the function.
_PAPER: dict[str, UNetOverride] = {
    "act_fn": "silu",
    "attention_head_dim": None,
    "center_input_sample": False,
    "downsample_padding": 0,
    "dropout": 0.0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
}

# Shared by all networks of Nichol & Dhariwal 2021: the timestep scales and shifts the norm, cosine before sine,
# symmetric padding, three residual blocks per level. With scale_shift UNet2DModel omits the norm of the middle
# attention unless attn_norm_num_groups is set. Heads have 64 channels, which makes the four heads of the CIFAR-10
# network; wider levels have more heads, as in Dhariwal & Nichol 2021, because UNet2DModel has one width for all heads.
_IMPROVED: dict[str, UNetOverride] = {
    **_PAPER,
    "attention_head_dim": 64,
    "attn_norm_num_groups": 32,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "layers_per_block": 3,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "scale_shift",
}

# Shared by the networks of Rombach et al. 2022: cosine before sine, symmetric padding, heads of 32 channels, and
# attention on all levels but the first.
_LATENT: dict[str, UNetOverride] = {
    **_PAPER,
    "attention_head_dim": 32,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "norm_eps": 1e-5,
}

# Numbers of parameters are for RGB images, grayscale digits, or latents of 4 channels, without classes.
PRESETS: dict[str, dict[str, UNetOverride]] = {
    # Ho et al. 2020, appendix B, CIFAR-10: 35,746,307 parameters, attention at 16x16.
    "ddpm_32": {**_PAPER, **_levels([128, 256, 256, 256], {1}), "dropout": 0.1},
    # The same design in Song, Meng & Ermon 2021, CelebA: 78,700,803 parameters, attention at 16x16.
    "ddpm_64": {**_PAPER, **_levels([128, 256, 256, 256, 512], {2}), "dropout": 0.1},
    # The same design for 128x128: 71,436,803 parameters, attention at 16x16.
    "ddpm_128": {**_PAPER, **_levels([128, 128, 256, 256, 512], {3})},
    # Ho et al. 2020, appendix B, CelebA-HQ and LSUN: 113,673,219 parameters, attention at 16x16.
    "ddpm_256": {**_PAPER, **_levels([128, 128, 256, 256, 512, 512], {4})},
    # Nichol & Dhariwal 2021, CIFAR-10: 52,542,979 parameters, attention at 16x16 and 8x8.
    "improved_32": {**_IMPROVED, **_levels([128, 256, 256, 256], {1, 2}), "dropout": 0.3},
    # Nichol & Dhariwal 2021, ImageNet: 121,060,483 parameters, attention at 16x16 and 8x8.
    "improved_64": {**_IMPROVED, **_levels([128, 256, 384, 512], {2, 3})},
    # The design of the paper for 8x8 digits on a laptop: 0.7 M parameters, attention at 4x4.
    "digits_8": {**_PAPER, **_levels([32, 64], {1}), "layers_per_block": 1, "norm_num_groups": 8},
    # The same for color images of 16x16: 1.7 M parameters, attention at 8x8.
    "emoji_16": {**_PAPER, **_levels([32, 64, 96], {1}), "layers_per_block": 1, "norm_num_groups": 8},
    # The same for 28x28 digits, which can be halved only twice: 3.7 M parameters, attention at 14x14.
    "mnist_28": {**_PAPER, **_levels([32, 64, 128], {1}), "norm_num_groups": 8},
    # The same for a few thousand photographs of 64x64: 20.8 M parameters, attention at 16x16.
    "flowers_64": {**_PAPER, **_levels([64, 128, 192, 256], {2}), "dropout": 0.1},
    # Rombach et al. 2022, CelebA-HQ, FFHQ and LSUN Bedrooms: 274,060,196 parameters.
    "latent_64": {**_LATENT, **_levels([224, 448, 672, 896], {1, 2, 3})},
    # The same design at about half the width, for latents of 32x32: 89,537,924 parameters.
    "latent_32": {**_LATENT, **_levels([128, 256, 384, 512], {1, 2, 3})},
}

# Set by the data, the diffusion process and model.class_conditional.
_DERIVED = ("sample_size", "in_channels", "out_channels", "num_class_embeds", "class_embed_type", "num_train_timesteps")
_SETTINGS = frozenset(inspect.signature(UNet2DModel.__init__).parameters) - {"self"}


def build_unet(
    config: ModelConfig,
    image_shape: tuple[int, int, int],
    num_class_embeds: int | None,
    file_config: Mapping[str, Any] | None = None,
    *,
    self_conditioned: bool = False,
    learned_variance: bool = False,
    num_train_timesteps: int | None = None,
) -> UNet2DModel:
    """Build and initialize the network, using torch's global generator.

    Args:
        config: The preset, and settings that replace parts of it.
        image_shape: (channels, height, width).
        num_class_embeds: Number of labels including the null label; None for an unconditional network.
        file_config: A config.json to use instead of the preset; settings decided by the data are replaced.
        self_conditioned: Whether the network also takes a prediction of x_0, which doubles in_channels.
        learned_variance: Whether the network also predicts a variance, which doubles out_channels.
        num_train_timesteps: Number of timesteps, for a network with a learned time embedding.

    Returns:
        The network in training mode, float32, on the CPU.

    Raises:
        ConfigError: An override is unknown, or the network cannot be built for these images.
    """
    channels, height, width = image_shape
    _check_overrides(config.overrides)
    settings: dict[str, Any] = {**_base(config, file_config), **config.overrides}
    if settings.get("time_embedding_type") == "fourier":
        raise ConfigError(
            f"{_source(config)} has time_embedding_type fourier, which divides by the timestep, but timesteps start at "
            "0; use positional."
        )
    blocks = settings["block_out_channels"]
    factor = 2 ** (len(blocks) - 1) if isinstance(blocks, list) else 1
    if height % factor or width % factor:
        raise ConfigError(
            f"{_source(config)} divides height and width by {factor}, but {height}x{width} is not a "
            f"multiple of {factor}; change data.resolution, or choose fewer block_out_channels in model.overrides."
        )
    settings |= {
        "sample_size": height if height == width else [height, width],
        "in_channels": channels * (1 + self_conditioned),
        "out_channels": channels * (1 + learned_variance),
        "num_class_embeds": num_class_embeds,
    }
    if settings.get("time_embedding_type") == "learned":
        settings["num_train_timesteps"] = num_train_timesteps
    try:
        _check_forward(json.dumps(settings), image_shape)
        unet = UNet2DModel(**settings)
    except Exception as error:  # diffusers raises many types for settings that do not fit together
        reason = " ".join(str(error).split())
        source = "" if file_config is None else f"{_source(config)} and "
        raise ConfigError(
            f"{source}model.overrides do not make a UNet2DModel ({type(error).__name__}: {reason})."
        ) from error
    if config.initialization == "paper":
        initialize_as_paper(unet)
    if config.gradient_checkpointing:
        _checkpoint_gradients(unet)
    return unet


def _source(config: ModelConfig) -> str:
    """Return the setting that decides the network, for messages."""
    for name in ("config_file", "from_pretrained"):
        if (value := getattr(config, name)) is not None:
            return f"model.{name} {value}"
    return f"model.preset {config.preset}"


def _base(config: ModelConfig, file_config: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return the arguments of UNet2DModel in a preset, or in a config.json completed by the defaults of diffusers."""
    if file_config is None:
        assert config.preset is not None, "config/rules.py requires a preset"
        return PRESETS[config.preset]
    defaults = {name: parameter.default for name, parameter in inspect.signature(UNet2DModel).parameters.items()}
    known = {name: value for name, value in file_config.items() if not name.startswith("_")}
    if unknown := sorted(known.keys() - _SETTINGS):
        logger.warning("%s has settings that UNet2DModel does not have: %s", _source(config), ", ".join(unknown))
    settings = {name: known.get(name, default) for name, default in defaults.items() if name not in _DERIVED}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}


@functools.cache
def _check_forward(arguments: str, image_shape: tuple[int, int, int]) -> None:
    """Run one forward pass on the meta device; some invalid arguments, here as JSON, fail only there."""
    settings = json.loads(arguments)
    with torch.device("meta"):
        images = torch.empty(1, settings["in_channels"], *image_shape[1:])
        zeros = torch.zeros(1, dtype=torch.int64)
        labels = None if settings["num_class_embeds"] is None else zeros
        output = UNet2DModel(**settings)(images, zeros, labels, return_dict=False)[0]
    if output.shape[2:] != images.shape[2:]:
        raise ValueError(f"images of {tuple(images.shape[2:])} come out as {tuple(output.shape[2:])}")


def _check_overrides(overrides: Mapping[str, UNetOverride]) -> None:
    known = _SETTINGS - set(_DERIVED)
    for name in overrides:
        if name in _DERIVED:
            raise ConfigError(f"model.overrides.{name} is decided by the data and model.class_conditional; remove it.")
        if name not in known:
            raise ConfigError(
                f"model.overrides.{name} is not a setting of UNet2DModel; it has {', '.join(sorted(known))}."
            )


def _checkpoint_gradients(unet: UNet2DModel) -> None:
    """Enable gradient checkpointing; raise ConfigError for blocks where diffusers would ignore it."""
    blocks = [block for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks) if block is not None]
    unsupported = sorted({type(block).__name__ for block in blocks if not hasattr(block, "gradient_checkpointing")})
    if unsupported:
        raise ConfigError(
            f"model.gradient_checkpointing is not supported by {' and '.join(unsupported)}; set it to false, or choose "
            "other blocks."
        )
    unet.enable_gradient_checkpointing()


@torch.no_grad()
def initialize_as_paper(unet: UNet2DModel) -> None:
    """Initialize as in the code of Ho et al. 2020.

    Weights are Glorot-uniform and biases zero. The last layer of each residual block, the output of each attention and
    the output of the network have scale 1e-10: a fresh network outputs 0, and the epsilon loss starts at 1.000.
    """
    for name, module in unet.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            is_output = name.endswith(("conv2", "to_out.0", "conv_out"))
            # The code of the paper scales the variance, so the standard deviation by the square root.
            nn.init.xavier_uniform_(module.weight, gain=1e-10**0.5 if is_output else 1.0)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


# ---------------------------------------------------------------------------------------------------- augmentation


class AugmentationEmbedding(nn.Module):
    """The embedding of the parameters of an augmentation, which conditions a network during training.

    It is added to the sinusoidal embedding of the timestep, and has no bias: parameters of 0 mean that an image is not
    augmented, as every sample (Karras et al. 2022, appendix F.2). It starts at 0. Its weight is a parameter of the
    network, but is left out of the state dict, so the network is saved and loaded as a UNet2DModel without it.

    Args:
        num_parameters: Parameters of an image.
        num_channels: Channels of the sinusoidal embedding.
    """

    def __init__(self, num_parameters: int, num_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_channels, num_parameters))
        self.parameters_of_batch: torch.Tensor | None = None

    def forward(self, parameters: torch.Tensor) -> torch.Tensor:
        """Return the embedding (batch, num_channels) of parameters (batch, num_parameters)."""
        return F.linear(parameters, self.weight)

    def _save_to_state_dict(self, *_: Any, **__: Any) -> None:
        pass

    def _load_from_state_dict(self, *_: Any, **__: Any) -> None:
        pass


def add_augmentation_embedding(unet: UNet2DModel, num_parameters: int) -> None:
    """Add an `AugmentationEmbedding` to a network, where diffusers has a place for one."""
    embed_time = unet.time_embedding
    embed_time.cond_proj = AugmentationEmbedding(num_parameters, embed_time.linear_1.in_features).to(unet.device)
    embed_time.register_forward_pre_hook(_add_condition, with_kwargs=True)


def _add_condition(embed_time: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    assert isinstance(embed_time.cond_proj, AugmentationEmbedding)
    return args, kwargs | {"condition": embed_time.cond_proj.parameters_of_batch}


@contextmanager
def conditioned_on_augmentation(unet: UNet2DModel, parameters: torch.Tensor | None) -> Iterator[None]:
    """Condition the calls of a network inside the context.

    Args:
        unet: The network.
        parameters: float32 (batch, num_parameters); None for images that are not augmented, for any network.
    """
    if parameters is None:
        yield
        return
    embedding = unet.time_embedding.cond_proj
    embedding.parameters_of_batch = parameters
    try:
        yield
    finally:
        embedding.parameters_of_batch = None


def saved_parameters(unet: UNet2DModel) -> dict[str, nn.Parameter]:
    """Return the parameters of a network that are saved, by name: all except an `AugmentationEmbedding`."""
    saved = unet.state_dict().keys()
    return {name: parameter for name, parameter in unet.named_parameters() if name in saved}


# ------------------------------------------------------------------------------------- the pipeline of a checkpoint

_WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
_WEIGHTS_KEY = "weights_sha256"  # in the second moments and the timesteps of a checkpoint
_TIMESTEPS_KEY, _TIMESTEPS_FILE = "optimized_timesteps", "optimized_timesteps.json"


@contextmanager
def pipeline_folder(model: ModelFolder) -> Iterator[Path]:
    """Give a folder that `from_pretrained` loads: that of a pipeline, or one made of a checkpoint.

    The latter is temporary and links to the weights. Scheduler, null label and self-conditioning are those of the
    configuration beside the checkpoint.

    Args:
        model: A pipeline or a verified checkpoint.

    Raises:
        ConfigError: The configuration is missing, or this version cannot read it; or the checkpoint was removed since.
    """
    if model.kind == "pipeline":
        yield model.path
        return
    if not model.path.is_dir():
        raise ConfigError(f"{model.path} was removed, as training does with old checkpoints; run the same again.")
    index = {name: value for name, value in pipeline_settings(model).items() if value}
    index["_class_name"] = LIST_FORM
    vae = vae_folder(model)
    if vae is not None:
        index["vae"] = ["diffusers", _read_json(vae / MODEL_CONFIG, str(vae))["_class_name"]]
    scheduler = checkpoint_scheduler(model)
    name = DDIMScheduler.__name__ if isinstance(scheduler, DDIMScheduler) else DDPMScheduler.__name__
    index |= {"unet": ["diffusers", UNet2DModel.__name__], "scheduler": ["diffusers", name]}
    if (lists := _optimized_timesteps(model)) is not None:
        index["optimized_timesteps"] = lists
    with tempfile.TemporaryDirectory(prefix="ddpm-hf-checkpoint-") as temporary:
        folder = Path(temporary)
        write_json(folder / MODEL_INDEX, index)
        scheduler.save_pretrained(folder / "scheduler")
        (folder / "unet").symlink_to(model.weights.resolve(), target_is_directory=True)
        if vae is not None:
            (folder / VAE_DIR).symlink_to(vae.resolve(), target_is_directory=True)
        if (moments := _second_moments(model)) is not None:
            shutil.copyfile(moments, second_moments_file(folder))
        yield folder


def vae_folder(model: ModelFolder) -> Path | None:
    """Return the VAE in the run of a checkpoint; None for a network on pixels.

    Raises:
        ConfigError: The checkpoint is of latents, but the run has no VAE.
    """
    if read_json(model.path / TRAINER_STATE).get("latents") is None:
        return None
    folder = None if model.run is None else model.run / VAE_DIR
    if folder is None or not (folder / MODEL_CONFIG).is_file():
        raise ConfigError(
            f"{model.path} samples latents, and the VAE that decodes them is not beside it; keep it in its "
            f"run, whose folder {VAE_DIR}/ has the VAE."
        )
    return folder


def load_model(model: ModelFolder, load: Callable[[Path], Any]) -> Any:
    """Return what `load`, such as `from_pretrained`, loads from the folder that `pipeline_folder` gives."""
    with pipeline_folder(model) as folder:
        loaded = load(folder)
    if model.kind == "checkpoint":
        pipeline = loaded[0] if isinstance(loaded, tuple) else loaded
        pipeline.register_to_config(_name_or_path=str(model.path))
        if str(pipeline.unet.config.get("_name_or_path")).startswith(str(folder)):
            pipeline.unet.register_to_config(_name_or_path=str(model.weights))
    return loaded


def checkpoint_scheduler(model: ModelFolder) -> GaussianDiffusionScheduler | DDIMScheduler:
    """Return the scheduler that the run of a checkpoint saves with its pipeline.

    Raises:
        ConfigError: The configuration beside it is not one that this version can read.
    """
    settings = settings_of(model.path)
    try:
        options = DiffusionConfig(**settings["diffusion"]).scheduler_options()
        distillation = DistillationConfig(**settings.get("distillation", {}))
        scheduler = sampling_scheduler(GaussianDiffusionScheduler.create(**options), distillation)
    except ConfigError:
        raise
    except Exception as error:  # torch raises many types for tables of an absurd size
        raise ConfigError(
            f"{model.path} has settings of diffusion that this version cannot use ({reason_of(error)}); use the "
            "version that wrote it."
        ) from error
    return scheduler


def sampling_scheduler(
    scheduler: GaussianDiffusionScheduler, distillation: DistillationConfig
) -> GaussianDiffusionScheduler | DDIMScheduler:
    """Return the scheduler that a run saves with its pipeline: that of a student is a DDIMScheduler.

    Its configuration also says in how many steps the student samples, and which guidance is part of it.
    """
    if distillation.teacher is None:
        return scheduler
    student: DDIMScheduler = DDIMScheduler.from_config(
        scheduler.config, clip_sample=False, timestep_spacing="trailing", set_alpha_to_one=True
    )
    student.register_to_config(**{DEFAULT_STEPS: distillation.num_inference_steps})
    if distillation.guidance_scale != 1:
        student.register_to_config(**{DISTILLED_GUIDANCE: distillation.guidance_scale})
    return student


def pipeline_settings(model: ModelFolder) -> dict[str, Any]:
    """Return the settings of the pipeline of a checkpoint: classes, inputs, and the range of its images or latents."""
    objective = settings_of(model.path)["objective"]
    num_labels = read_json(model.weights / MODEL_CONFIG).get("num_class_embeds")
    has_null_label = num_labels is not None and (objective.get("class_dropout") or 0) > 0
    num_classes = (num_labels or 0) - has_null_label
    names = class_names_of(model)
    if names is not None and set(names) != {str(number) for number in range(num_classes)}:
        names = None
    if num_classes and names is None:
        log_warning(f"{model.path} does not hold the names of its {num_classes} classes; give labels as numbers.")
    is_self_conditioned = (objective.get("self_conditioning") or 0) > 0
    state = read_json(model.path / TRAINER_STATE)
    latents = state.get("latents") or {}
    return {
        "class_names": names,
        "has_null_label": has_null_label,
        "self_conditioned": is_self_conditioned,
        "value_range": state.get("value_range"),
        "latents_mean": latents.get("latents_mean"),
        "latents_std": latents.get("latents_std"),
    }


def save_second_moments(model: ModelFolder, scheduler: GaussianDiffusionScheduler) -> Path:
    """Save the second moments of a network where `from_pretrained` finds them, and return the file.

    Nothing may be added to a checkpoint, so those of a checkpoint are kept in the run, with the sha256 of its weights.

    Raises:
        ConfigError: The checkpoint is not in a run.
    """
    if model.kind == "pipeline":
        file = second_moments_file(model.path)
        scheduler.save_second_moments(file.parent)
        return file
    if model.evaluation is None:
        raise ConfigError(f"{model.path} is not in a run, which would keep the variance; move it into checkpoints/.")
    model.evaluation.mkdir(parents=True, exist_ok=True)
    scheduler.save_second_moments(model.evaluation)
    file = model.evaluation / SECOND_MOMENTS_FILE
    write_json(file, read_json(file) | {_WEIGHTS_KEY: _weights_sha256(model)})
    return file


def save_optimized_timesteps(model: ModelFolder, sampler: str, lists: Mapping[int, list[int]]) -> Path:
    """Save timesteps chosen for a network where `from_pretrained` finds them, and return the file.

    Lists of other samplers and lengths are kept. Nothing may be added to a checkpoint, so those of a checkpoint are in
    the run, with the sha256 of its weights.

    Args:
        model: A pipeline or a verified checkpoint.
        sampler: Returned by `sampler_name`.
        lists: Descending timesteps by their number.

    Raises:
        ConfigError: The checkpoint is not in a run.
    """
    if model.kind == "pipeline":
        file, content = model.path / MODEL_INDEX, read_json(model.path / MODEL_INDEX)
        stored = content.get(_TIMESTEPS_KEY) or {}
    elif model.evaluation is None:
        raise ConfigError(
            f"{model.path} is not in a run, which would keep the timesteps; move it into checkpoints/, or save it as a "
            "pipeline with save_pretrained."
        )
    else:
        model.evaluation.mkdir(parents=True, exist_ok=True)
        file, content = model.evaluation / _TIMESTEPS_FILE, {_WEIGHTS_KEY: _weights_sha256(model)}
        stored = _optimized_timesteps(model) or {}
    of_sampler = stored.get(sampler, {}) | {str(number): timesteps for number, timesteps in lists.items()}
    numbers = sorted(of_sampler, key=int)
    stored = stored | {sampler: {number: of_sampler[number] for number in numbers}}
    write_json(file, dict(sorted((content | {_TIMESTEPS_KEY: stored}).items())))
    return file


def _optimized_timesteps(model: ModelFolder) -> dict[str, Any] | None:
    """Return the timesteps chosen for the network of a checkpoint; None if there are none for its weights."""
    file = None if model.evaluation is None else model.evaluation / _TIMESTEPS_FILE
    content = read_json(file) if file is not None and file.is_file() else {}
    return content.get(_TIMESTEPS_KEY) if content.get(_WEIGHTS_KEY) == _weights_sha256(model) else None


def _second_moments(model: ModelFolder) -> Path | None:
    """Return the second moments of the network of a checkpoint, or of a pipeline of the run with the same weights."""
    if model.evaluation is None or model.run is None:
        return None
    sha256, file = _weights_sha256(model), model.evaluation / SECOND_MOMENTS_FILE
    if file.is_file() and read_json(file).get(_WEIGHTS_KEY) == sha256:
        return file
    pipeline = model.run / PIPELINE_DIR
    file, weights = second_moments_file(pipeline), pipeline / "unet" / _WEIGHTS_FILE
    return file if file.is_file() and weights.is_file() and sha256_of_file(weights) == sha256 else None


def _weights_sha256(model: ModelFolder) -> str:
    """Return the sha256 of the weights of a verified checkpoint."""
    return str(read_json(model.path / MANIFEST)["files"][f"{model.network}/{_WEIGHTS_FILE}"]["sha256"])


def check_same_data(pipeline: Any, guide: Any) -> None:
    """Raise ConfigError if the folders of two pipelines say that they were trained on images of different names."""
    ours, theirs = (_source_name(Path(str(each.config.get("_name_or_path")))) for each in (pipeline, guide))
    if ours and theirs and ours != theirs:
        raise ConfigError(
            f"guide was trained on {theirs}, but the model on {ours}; pass a version of the model itself or, if the "
            "images are the same, GaussianDiffusionPipeline(guide.unet, guide.scheduler)."
        )


def _source_name(folder: Path) -> str | None:
    """Return the last part of data.source of a saved pipeline or a checkpoint; None if unknown or in memory."""
    files = [folder / name for name in (TRAINING_CONFIG, RUN_CONFIG)]
    contents = [read_config_dict(file) for file in files if file.is_file()]
    source = str(contents[0].get("data", {}).get("source") or "") if contents else ""
    return None if source.startswith("memory:") else Path(source).name or None


# ------------------------------------------------------------------------------------------------ pretrained networks

_CONFIG_FILES = (MODEL_CONFIG, f"unet/{MODEL_CONFIG}")
_SCHEDULER_FILES = (f"scheduler/{SCHEDULER_CONFIG}", SCHEDULER_CONFIG)
_FILES = (
    *_CONFIG_FILES,
    *_SCHEDULER_FILES,
    MODEL_INDEX,
    "diffusion_pytorch_model*.safetensors*",
    "unet/diffusion_pytorch_model*.safetensors*",
)


LatentStatistics: TypeAlias = tuple[list[float], list[float]]
"""Means and standard deviations of latents per channel, which become 0 and 1."""


@dataclass(frozen=True)
class Pretrained:
    """A pretrained network and what its folder says about it.

    Args:
        name: The setting and its value, for messages.
        unet: The network.
        scheduler: The forward process it was trained for; None if unknown.
        class_names: Names of its classes; None if unknown.
        has_null_label: Whether its last label means "no class"; None if unknown.
        self_conditioned: Whether it takes its own prediction of x_0 as further channels.
        value_range: The values that it was trained on, [low, high]; None for pictures or if unknown.
        latents_mean: Mean of its latents, as in GaussianDiffusionPipeline.
        latents_std: Their standard deviation.
    """

    name: str
    unet: UNet2DModel
    scheduler: GaussianDiffusionScheduler | None
    class_names: dict[str, str] | None
    has_null_label: bool | None
    self_conditioned: bool = False
    value_range: list[float] | None = None
    latents_mean: list[float] | None = None
    latents_std: list[float] | None = None


def read_config_file(model: ModelConfig) -> dict[str, Any]:
    """Read the configuration of the UNet2DModel in model.config_file.

    Raises:
        ConfigError: It does not exist or cannot be read.
    """
    assert model.config_file is not None
    name = f"model.config_file {model.config_file}"
    path = Path(model.config_file).expanduser()
    if not path.is_file():
        path = _unet_folder(_find_model(name, model.config_file, model.revision, _CONFIG_FILES), name) / MODEL_CONFIG
    return _read_unet_config(path, name)


def load_pretrained(model: ModelConfig) -> Pretrained:
    """Load the network of model.from_pretrained, whose weights must be safetensors.

    Raises:
        ConfigError: The folder or repository has no network, or it cannot be read.
    """
    assert model.from_pretrained is not None
    return load_network("model.from_pretrained", model.from_pretrained, model.revision)


def load_network(setting: str, source: str, revision: str | None) -> Pretrained:
    """Load the network that a setting names; see `load_pretrained`."""
    name = f"{setting} {source}"
    found = _find_model(name, source, revision, _FILES)
    unet_folder = _unet_folder(found, name)
    _read_unet_config(unet_folder / MODEL_CONFIG, name)
    if not any(unet_folder.glob("diffusion_pytorch_model*.safetensors*")):
        raise ConfigError(
            f"{name} has no weights in the safetensors format. If you trust it, load it once with "
            "UNet2DModel.from_pretrained(..., use_safetensors=False), save it again and give that folder."
        )
    try:
        check_shards(unet_folder)
        unet, loaded = UNet2DModel.from_pretrained(unet_folder, use_safetensors=True, output_loading_info=True)
    except Exception as error:  # diffusers and safetensors raise many types for files that do not fit together
        raise ConfigError(f"{name} cannot be loaded ({reason_of(error)}).") from error
    if missing := loaded["missing_keys"]:
        raise ConfigError(f"{name} lacks weights of its own network ({', '.join(sorted(missing)[:3])}, ...).")
    index = None
    if found.kind == "checkpoint":
        index = pipeline_settings(found)
    elif (found.path / MODEL_INDEX).is_file():
        index = _read_json(found.path / MODEL_INDEX, name)
    known = index or {}
    return Pretrained(
        name=name,
        unet=unet,
        scheduler=_scheduler_of(found, name),
        class_names=known.get("class_names"),
        has_null_label=bool(index.get("has_null_label")) if index else None,
        self_conditioned=bool(known.get("self_conditioned")),
        **{setting: known.get(setting) for setting in ("value_range", "latents_mean", "latents_std")},
    )


def as_student(pretrained: Pretrained, prediction_type: str, has_null_label: bool) -> Pretrained:
    """Return a pretrained network with the outputs and labels of its student.

    The channels of a learned variance are removed, and so is the null label of a guided teacher, whose student is
    never called with it. A network that predicts epsilon starts to learn another prediction.

    Args:
        pretrained: The network.
        prediction_type: What the student predicts.
        has_null_label: Whether the student has a null label.
    """
    unet, scheduler = pretrained.unet, pretrained.scheduler
    changes, weights = {}, dict(unet.state_dict())
    if scheduler is not None and scheduler.variance_type in LEARNED_VARIANCE_TYPES:
        changes["out_channels"] = num_channels = unet.config["out_channels"] // 2
        weights |= {name: weights[name][:num_channels] for name in ("conv_out.weight", "conv_out.bias")}
    if pretrained.has_null_label and not has_null_label:
        changes["num_class_embeds"] = num_classes = unet.config["num_class_embeds"] - 1
        weights["class_embedding.weight"] = weights["class_embedding.weight"][:num_classes]
    if changes:
        with torch.device("meta"):  # draws nothing from the global generators
            unet = UNet2DModel.from_config(unet.config, **changes)
        unet.load_state_dict(weights, assign=True)
    if scheduler is not None:
        options = {"prediction_type": prediction_type, "variance_type": "fixed_small"}
        scheduler = GaussianDiffusionScheduler.from_config(scheduler.config, **options)
    return replace(
        pretrained,
        unet=unet,
        scheduler=scheduler,
        has_null_label=pretrained.has_null_label and has_null_label,
    )


def take_weights(
    unet: UNet2DModel,
    pretrained: Pretrained,
    scheduler: GaussianDiffusionScheduler,
    class_names: dict[str, str] | None,
    has_null_label: bool,
    value_range: list[float] | None = None,
    latents: LatentStatistics | None = None,
) -> None:
    """Copy the weights of a pretrained network into the network of a run; warn about differences that may be intended.

    Raises:
        ConfigError: The networks differ in shape, labels or prediction type.
    """
    _check_channels(unet, pretrained)
    _check_labels(unet, pretrained, has_null_label)
    _check_time_embedding(unet, pretrained)
    if pretrained.class_names is not None and class_names is not None and pretrained.class_names != class_names:
        logger.warning(
            "%s was trained on classes with other names; its labels now mean those of the data.", pretrained.name
        )
    if pretrained.value_range != value_range and pretrained.has_null_label is not None:
        before, now = (each and f"[{each[0]:g}, {each[1]:g}]" for each in (pretrained.value_range, value_range))
        logger.warning(
            "%s was trained with data.value_range %s, and -1 and 1 now stand for those of %s.",
            pretrained.name, before or "null", now or "null",
        )  # fmt: skip
    of_latents = ((pretrained.latents_mean, pretrained.latents_std), latents or (None, None))
    were, are = (torch.tensor([mean or [], std or []]) for mean, std in of_latents)
    if were.shape != are.shape or not torch.allclose(were, are, rtol=0.01, atol=0.01):
        logger.warning(
            "%s was trained on latents of another mean and standard deviation; check data.latent_normalization.",
            pretrained.name,
        )
    theirs, ours = pretrained.unet.config["sample_size"], unet.config["sample_size"]
    if theirs is not None and _size(theirs) != _size(ours):
        logger.warning(
            "%s was made for images of %s; it is now trained on %s.", pretrained.name, _size(theirs), _size(ours)
        )
    _check_process(pretrained, scheduler)
    try:
        unet.load_state_dict(pretrained.unet.state_dict())
    except RuntimeError as error:
        raise ConfigError(
            f"{pretrained.name} has weights of other shapes than model.overrides ask for ({reason_of(error)}); remove "
            "the overrides that change shapes."
        ) from None


def _check_channels(unet: UNet2DModel, pretrained: Pretrained) -> None:
    for setting, verb in (("in_channels", "takes"), ("out_channels", "returns")):
        theirs, ours = pretrained.unet.config[setting], unet.config[setting]
        if theirs != ours:
            raise ConfigError(
                f"{pretrained.name} {verb} {theirs} channels, but this run needs {ours}; set data.num_channels to that "
                "of its training data, or choose another network."
            )


def _check_time_embedding(unet: UNet2DModel, pretrained: Pretrained) -> None:
    """Raise ConfigError for a learned time embedding of another number of timesteps."""
    theirs, ours = (each.config.get("num_train_timesteps") for each in (pretrained.unet, unet))
    if unet.config.get("time_embedding_type") == "learned" and theirs != ours:
        raise ConfigError(
            f"{pretrained.name} has a learned time embedding for {theirs} timesteps, but diffusion.num_train_timesteps "
            f"is {ours}; set it to {theirs}, or choose another network."
        )


def _check_labels(unet: UNet2DModel, pretrained: Pretrained, has_null_label: bool) -> None:
    """Raise ConfigError for another number of labels, or another meaning of the last one."""
    theirs, ours = pretrained.unet.config["num_class_embeds"], unet.config["num_class_embeds"]
    has = "is unconditional" if theirs is None else f"has {theirs} labels"
    needs = "none" if ours is None else f"{ours} (the null label included)" if has_null_label else f"{ours}"
    if theirs is not None and pretrained.has_null_label:
        has += ", the last of them the null label"
    if theirs == ours and (theirs is None or pretrained.has_null_label in (None, has_null_label)):
        return
    if theirs is None:
        fix = "set model.class_conditional to false"
    elif ours is None:
        fix = "set model.class_conditional to true"
    elif pretrained.has_null_label is not None and pretrained.has_null_label != has_null_label:
        fix = f"set objective.class_dropout {'above 0, for example to 0.1' if pretrained.has_null_label else 'to 0'}"
    else:
        fix = "train on data with as many classes"
    raise ConfigError(f"{pretrained.name} {has}, but this run needs {needs}; {fix}, or choose another network.")


def _check_process(pretrained: Pretrained, scheduler: GaussianDiffusionScheduler) -> None:
    """Raise ConfigError for another prediction type; warn about another noise schedule, which may be intended."""
    if pretrained.scheduler is None:
        logger.warning(
            "%s has no scheduler; its prediction type is assumed to be %s.",
            pretrained.name,
            scheduler.config["prediction_type"],
        )
        return
    theirs, ours = (each.config["prediction_type"] for each in (pretrained.scheduler, scheduler))
    if theirs != ours:
        raise ConfigError(
            f"{pretrained.name} predicts {theirs}, but diffusion.prediction_type is {ours}; set it to {theirs}, or "
            "choose another network."
        )
    before, after = (each.noise_schedule.alphas_cumprod for each in (pretrained.scheduler, scheduler))
    if len(before) != len(after):
        logger.warning(
            "%s was trained with %d timesteps; diffusion.num_train_timesteps is %d.",
            pretrained.name,
            len(before),
            len(after),
        )
    elif not torch.allclose(before, after, rtol=1e-4, atol=1e-6):
        logger.warning(
            "%s was trained with another noise schedule (%s) than that of diffusion (%s).",
            pretrained.name,
            *(_schedule(each) for each in (pretrained.scheduler, scheduler)),
        )


def _schedule(scheduler: GaussianDiffusionScheduler) -> str:
    kind = scheduler.config["beta_schedule"] if scheduler.config["trained_betas"] is None else "trained_betas"
    return f"{kind}, alpha_bar_T {float(scheduler.noise_schedule.alphas_cumprod[-1]):.2e}"


def _scheduler_of(model: ModelFolder, name: str) -> GaussianDiffusionScheduler | None:
    """Return the forward process of a network; None if its folder does not say it."""
    if model.kind != "checkpoint":
        return _read_scheduler(model.path, name)
    scheduler: GaussianDiffusionScheduler = GaussianDiffusionScheduler.from_config(checkpoint_scheduler(model).config)
    return scheduler


def _read_scheduler(folder: Path, name: str) -> GaussianDiffusionScheduler | None:
    """Return the forward process of a folder, whichever scheduler of diffusers it names."""
    for path in (folder / file for file in _SCHEDULER_FILES):
        if path.is_file():
            try:
                scheduler: GaussianDiffusionScheduler = GaussianDiffusionScheduler.from_config(_read_json(path, name))
            except Exception as error:  # torch raises many types for tables of an absurd size
                raise ConfigError(f"{name} has a scheduler that is not a DDPM's ({reason_of(error)}).") from error
            return scheduler
    return None


# --------------------------------------------------------------------------------------------------------------- VAEs

_AUTOENCODERS: dict[str, type[ModelMixin]] = {
    "AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny, "VQModel": VQModel
}  # fmt: skip
_AUTOENCODER_FOLDERS = ("", f"{VAE_DIR}/", "vqvae/")


def load_vae(setting: str, source: str, revision: str | None) -> ModelMixin:
    """Load the VAE of data.vae or model.vae, whose weights must be safetensors.

    Args:
        setting: Name of the setting, for messages.
        source: A VAE or a pipeline with one: a folder, which may be a run on latents, or a Hub repository.
        revision: Branch, tag or commit of the repository.

    Returns:
        The VAE in float32, in evaluation mode and without gradients, on the CPU.

    Raises:
        ConfigError: There is none, or it cannot be read.
    """
    name, folder = f"{setting} {source}", Path(source).expanduser()
    if folder.is_dir() and revision is not None:
        raise ConfigError(f"data.vae_revision {revision} applies to the Hub, but {source} is a local path; remove it.")
    if folder.is_file():
        raise ConfigError(f"{name} is a file; give the folder of a VAE in the format of diffusers.")
    if not folder.is_dir():
        weights = ("diffusion_pytorch_model.safetensors*", "diffusion_pytorch_model-*.safetensors")
        files = [f"{part}{file}" for part in _AUTOENCODER_FOLDERS for file in (MODEL_CONFIG, *weights)]
        folder = _download(name, source, revision, files)
    configs = [folder / part / MODEL_CONFIG for part in _AUTOENCODER_FOLDERS]
    kinds = {file.parent: str(_read_json(file, name).get("_class_name")) for file in configs if file.is_file()}
    found = next((part for part, kind in kinds.items() if kind in _AUTOENCODERS), None)
    if found is None:
        places = join_or([f"{part}{MODEL_CONFIG}" for part in _AUTOENCODER_FOLDERS])
        is_other = f"is a {next(iter(kinds.values()))}" if kinds else f"has no {places}"
        raise ConfigError(f"{name} {is_other}; give an {join_or(list(_AUTOENCODERS))}, or a pipeline with one.")
    if not any(found.glob("diffusion_pytorch_model*.safetensors*")):
        raise ConfigError(
            f"{name} has no weights in the safetensors format. If you trust it, load it once with "
            f"{kinds[found]}.from_pretrained(..., use_safetensors=False), save it again and give that folder."
        )
    try:
        check_shards(found)
        vae, loaded = _AUTOENCODERS[kinds[found]].from_pretrained(
            found, use_safetensors=True, torch_dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # diffusers and safetensors raise many types for files that do not fit together
        raise ConfigError(f"{name} cannot be loaded ({reason_of(error)}).") from error
    if missing := loaded["missing_keys"]:
        raise ConfigError(f"{name} lacks weights of its own network ({', '.join(sorted(missing)[:3])}, ...).")
    return build_vae(type(vae).__name__, vae_config(vae), vae.state_dict())


def build_vae(kind: str, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor] | None = None) -> ModelMixin:
    """Build a VAE in evaluation mode and without gradients.

    Args:
        kind: Name of its class.
        config: As `vae_config` returns it.
        weights: Its tensors, which are not copied; None builds it on the meta device, without values.
    """
    with torch.device("meta"):  # draws nothing from the global generators
        vae: ModelMixin = _AUTOENCODERS[kind](**config)
    if weights is not None:
        vae.load_state_dict(weights, assign=True)
    vae.eval().requires_grad_(False)
    return vae


def vae_config(vae: ModelMixin) -> dict[str, Any]:
    """Return the arguments that a VAE was built with, without the notes of diffusers, such as its path."""
    names = inspect.signature(type(vae).__init__).parameters
    return {name: value for name, value in vae.config.items() if name in names}


def vae_sha256(vae: ModelMixin) -> str:
    """Return a digest of the weights and the configuration of a VAE on the CPU."""
    config = json.dumps(vae_config(vae), sort_keys=True)
    digest = hashlib.sha256(f"{type(vae).__name__} {config}".encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def _find_model(name: str, source: str, revision: str | None, files: Sequence[str]) -> ModelFolder:
    """Return what a local path holds, or download it from the Hub."""
    path = Path(source).expanduser()
    if path.is_dir():
        if revision is not None:
            setting = f"{name.partition('.')[0]}.revision"
            raise ConfigError(f"{setting} {revision} applies to the Hub, but {source} is a local path; remove it.")
        try:
            return find_model(path, accept_network=True)
        except ConfigError as error:
            raise ConfigError(f"{name.partition(' ')[0]} {error}") from None
    if path.exists():
        raise ConfigError(
            f"{name} is a file; give the folder of a pipeline or of a UNet2DModel, or make one with ddpm-hf convert."
        )
    return ModelFolder("network", _download(name, source, revision, files))


def _download(name: str, source: str, revision: str | None, files: Sequence[str]) -> Path:
    """Download files of a Hub repository, and return the folder that holds them."""
    if source.startswith((".", "~", "/")) or source.count("/") > 1 or Path(source).suffix == ".json":
        raise ConfigError(f"{name} does not exist; check the path (the working directory is {Path.cwd()}).")

    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(files)))
    except Exception as error:  # errors of the Hub, the network and the disk
        raise ConfigError(
            f"{name} is not a local folder and cannot be downloaded from the Hub ({reason_of(error)}); check the name, "
            "the network and, for a private repository, your login."
        ) from error


def _unet_folder(model: ModelFolder, name: str) -> Path:
    """Return the folder with config.json and weights of the network."""
    for candidate in (model.weights,) if model.kind == "checkpoint" else (model.path / "unet", model.path):
        if (candidate / MODEL_CONFIG).is_file():
            return candidate
    raise ConfigError(f"{name} has neither unet/config.json nor config.json of a UNet2DModel.")


def _read_unet_config(path: Path, name: str) -> dict[str, Any]:
    config = _read_json(path, name)
    if (kind := config.get("_class_name", "UNet2DModel")) != "UNet2DModel":
        raise ConfigError(f"{name} is a {kind}; give a UNet2DModel.")
    return config


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}: {reason_of(error)}.") from None


def _size(size: int | Sequence[int]) -> str:
    height, width = [size, size] if isinstance(size, int) else size
    return f"{height}x{width}"

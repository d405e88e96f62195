"""The schema of a run: one frozen dataclass a section. Every field is a flag and a YAML key of the same name."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import yaml

UNetOverride: TypeAlias = int | float | bool | str | list[int] | list[str] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which images to train on.

    Args:
        source: A folder of images (class folders become labels), a .zip or .tar of one, a .parquet or .arrow file or a
            folder of them, a .npy or .npz file, or a data set id of the Hub.
        subset: Configuration of a Hub data set that has several.
        revision: Branch, tag or commit of a Hub data set; null is the newest.
        split: Split to read, or a part of it as "train[:90%]".
        validation_split: Split held out from training, or a part of one; it must not overlap with split.
        validation_fraction: Fraction of the images held out from training, chosen by training.seed.
        image_column: Column or array with the images; null finds the only one.
        label_column: Column or array with integer labels; null finds the only ClassLabel column, or "label".
        crop_before_resize: Cut this out first: the side of a square in the centre, or [left, top, right, bottom].
        resolution: Side length in pixels, or [height, width], to resize (shorter side, antialiased) and crop to; null
            keeps the images as they are, which must then all have one size.
        resize_to: Shorter side after resizing and before cropping, to leave room for random crops; null is that of
            resolution, 0 does not resize.
        resize_filter: Pillow's filter; nearest is the only one that does not antialias.
        crop: Cut resolution out of the centre, or at random, anew in every epoch.
        random_flip: Mirror each image left to right with a probability of one half, anew in every epoch.
        num_channels: 1 (gray), 3 (RGB), 4 (RGBA), or that of an array; null takes what holds every image.
        background: What transparent pixels show where num_channels leaves no room for transparency; null refuses
            images that have some.
        on_bad_image: What an image that cannot be read does: stop with its name, or give its place to the next good
            one, counted.
        max_bad_fraction: Stop if more of the images than this fraction cannot be read.
        cache_dir: Folder for decoded images; null is $XDG_CACHE_HOME/ddpm_hf or ~/.cache/ddpm_hf.
        device_resident: Keep all images in the memory of the device; "auto" does where a GPU has ten times the room.
        streaming: Decode while training instead of once before, for sets that do not fit on the disk.
        shuffle_buffer_size: Encoded images that a process mixes at a time when streaming.
    """

    source: str = ""
    subset: str | None = None
    revision: str | None = None
    split: str = "train"
    validation_split: str | None = None
    validation_fraction: float = 0.0
    image_column: str | None = None
    label_column: str | None = None
    crop_before_resize: int | list[int] | None = None
    resolution: int | list[int] | None = None
    resize_to: int | None = None
    resize_filter: Literal["lanczos", "bicubic", "bilinear", "hamming", "box", "nearest"] = "lanczos"
    crop: Literal["center", "random"] = "center"
    random_flip: bool = False
    num_channels: int | None = None
    background: Literal["white", "black"] | None = None
    on_bad_image: Literal["error", "skip"] = "error"
    max_bad_fraction: float = 0.01
    cache_dir: str | None = None
    device_resident: Literal["auto"] | bool = "auto"
    streaming: bool = False
    shuffle_buffer_size: int = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which network to train.

    Args:
        preset: A UNet2DModel of ddpm_hf.unet; "ddpm_32" is the paper's CIFAR-10 network (35.7 M parameters).
        overrides: Entries of UNet2DModel's config that replace the preset's, for example {dropout: 0.1}.
        class_conditional: Give the network the labels of the data set.
        initialization: "paper" (Glorot-uniform, output layers near zero; Ho et al. 2020) or "torch" (PyTorch's
            defaults).
    """

    preset: Literal["ddpm_32", "digits_8"] = "ddpm_32"
    overrides: dict[str, UNetOverride] = field(default_factory=dict)
    class_conditional: bool = False
    initialization: Literal["paper", "torch"] = "paper"


@dataclass(frozen=True, kw_only=True, slots=True)
class DiffusionConfig:
    """The forward process and what the network predicts; saved as scheduler_config.json.

    Args:
        num_train_timesteps: Length T of the chain.
        beta_schedule: Noise schedule; "cosine" is stored under its diffusers name squaredcos_cap_v2.
        beta_start: First beta of the linear schedules, tuned to T = 1000.
        beta_end: Last beta of the linear schedules.
        prediction_type: What the network predicts: epsilon (eps), sample (x0) or v_prediction (v).
        variance_type: Variance of the reverse steps: beta_t (fixed_large) or the posterior's (fixed_small).
        clip_sample: Clip the predicted x_0 to [-1, 1] in every sampling step.
        timestep_spacing: How fewer sampling steps are spread over the chain.
        rescale_betas_zero_snr: Rescale the betas so that the last timestep is pure noise (Lin et al. 2024).
    """

    num_train_timesteps: int = 1000
    beta_schedule: str = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    prediction_type: Literal["epsilon", "sample", "v_prediction", "eps", "x0", "v"] = "epsilon"
    variance_type: Literal["fixed_small", "fixed_large"] = "fixed_large"
    clip_sample: bool = True
    timestep_spacing: Literal["leading", "trailing", "linspace"] = "trailing"
    rescale_betas_zero_snr: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """The training loss.

    Args:
        loss: Distance between prediction and target: mse (L_simple, Ho et al. 2020, Eq. 14), l1 or huber.
        class_dropout: Probability of replacing a label by the null label, for classifier-free guidance.
    """

    loss: Literal["mse", "l1", "huber"] = "mse"
    class_dropout: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """The run itself. One step is one optimiser update.

    Args:
        output_dir: Run folder: checkpoints, previews, metrics, the trained pipeline.
        seed: Seed of everything random in the run.
        num_steps: Optimiser updates.
        train_batch_size: Images an update, over all processes (global).
        micro_batch_size: Images of one forward on one device; null takes the process's whole share. Smaller values
            accumulate gradients.
        mixed_precision: Precision inside the network: fp32, bf16, or fp16 with loss scaling (needs a GPU).
        learning_rate: Peak learning rate of AdamW.
        learning_rate_warmup_steps: Steps of linear warm-up from 0.
        learning_rate_schedule: constant, or cosine or linear decay to 0 at num_steps.
        adam_beta1: Decay of AdamW's first moment.
        adam_beta2: Decay of AdamW's second moment.
        adam_epsilon: AdamW's epsilon.
        weight_decay: AdamW's decoupled weight decay.
        max_grad_norm: Clip the global gradient norm to this; null does not clip.
        ema_decay: Decay of the exponential moving average of the weights, which is what is sampled and saved.
        ema_warmup: Use min(ema_decay, (1 + n) / (10 + n)) at update n, so that early weights are forgotten soon.
        checkpoint_every_steps: Save a checkpoint this often; one is always saved at the end and on a signal.
        num_checkpoints_kept: Newest checkpoints kept, at least 2.
        log_every_steps: Write a line of metrics this often.
        max_consecutive_nonfinite: Stop (exit code 3) after this many updates in a row with a non-finite gradient; each
            such update is skipped.
        tf32: Let NVIDIA GPUs compute float32 matrix products and convolutions in TF32.
        deterministic: Ask torch for deterministic kernels: bit-exact resume on CUDA, at a price.
        resume: "auto" continues the run in output_dir; "none" refuses to touch an output_dir that holds a run.
        cpu: Train on the CPU even where there is a GPU.
    """

    output_dir: str = "outputs/run"
    seed: int = 0
    num_steps: int = 800_000
    train_batch_size: int = 128
    micro_batch_size: int | None = None
    mixed_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    learning_rate: float = 2e-4
    learning_rate_warmup_steps: int = 5000
    learning_rate_schedule: Literal["constant", "cosine", "linear"] = "constant"
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    ema_decay: float = 0.9999
    ema_warmup: bool = True
    checkpoint_every_steps: int = 5000
    num_checkpoints_kept: int = 3
    log_every_steps: int = 50
    max_consecutive_nonfinite: int = 20
    tf32: bool = True
    deterministic: bool = False
    resume: Literal["auto", "none"] = "auto"
    cpu: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class PreviewConfig:
    """Sample grids during training, always of the same seeds.

    Args:
        every_steps: Draw a grid this often; 0 draws none.
        num_images: Images in the grid.
        num_inference_steps: Sampling steps an image.
        eta: 0 samples as DDIM, 1 as DDPM.
        guidance_scale: Classifier-free guidance; 1 is none.
    """

    every_steps: int = 5000
    num_images: int = 64
    num_inference_steps: int = 50
    eta: float = 0.0
    guidance_scale: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """What is sampled and measured when training ends.

    Args:
        num_samples: Images to sample for the report; 0 samples none and writes no report.
        batch_size: Images sampled at once.
        num_inference_steps: Sampling steps an image.
        eta: 0 samples as DDIM, 1 as DDPM.
        guidance_scale: Classifier-free guidance; 1 is none.
        recognition: Report how many samples a classifier trained on the real images recognises as the class asked for;
            needs model.class_conditional and data.validation_fraction above 0.
    """

    num_samples: int = 64
    batch_size: int = 100
    num_inference_steps: int = 50
    eta: float = 0.0
    guidance_scale: float = 1.0
    recognition: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Everything that decides a run.

    Args:
        data: Which images to train on.
        model: Which network to train.
        diffusion: The forward process and what the network predicts.
        objective: The training loss.
        training: The run itself.
        preview: Sample grids during training.
        evaluation: What is sampled and measured when training ends.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def to_yaml(self) -> str:
        """Returns the resolved configuration as YAML that `--config` reads."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def to_dict(self) -> dict[str, dict[str, object]]:
        """Returns the resolved configuration as plain nested dictionaries."""
        return dataclasses.asdict(self)

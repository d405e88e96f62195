"""The settings of a run, one frozen dataclass per section; each field is a YAML key and a command-line flag."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import yaml


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """Sampling and measuring at the end of training, and scores during training.

    Args:
        num_samples: Images to sample for the report; 0 writes no report.
        batch_size: Images sampled at once.
        num_inference_steps: Sampling steps.
        eta: 0 samples with DDIM, 1 with DDPM.
        guidance_scale: Classifier-free guidance scale; 1 disables guidance.
        guidance_interval: [start, stop], the fractions of the steps between which guidance is on, from the noise (0) to
            the image (1).
        recognition: Train a classifier on the real images and report how many samples it assigns to their class; needs
            model.class_conditional and a validation set.
        score_every_steps: Measure a score of the EMA weights at this interval and after the last step, and keep the
            checkpoint with the best score; 0 disables it. Scores of few samples are biased: compare them only within
            one run.
        score_metric: Metric of the score. fid, kid and inception_score use Inception features; frechet_distance,
            kernel_distance, precision and recall use any features; bits_per_dim uses the validation set and no
            features.
        score_features: Feature network, as in `ddpm-hf evaluate --features`.
        score_num_samples: Number of samples, drawn with num_inference_steps, eta, guidance_scale and batch_size of this
            section; for bits_per_dim the number of validation images (at most all). fid needs at least 2049,
            inception_score 1000.
        score_num_terms: Timesteps per validation image at which bits_per_dim is estimated.
    """

    num_samples: int = 64
    batch_size: int = 100
    num_inference_steps: int = 50
    eta: float = 0.0
    guidance_scale: float = 1.0
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])
    recognition: bool = False
    score_every_steps: int = 0
    score_metric: Literal[
        "fid", "kid", "inception_score", "frechet_distance", "kernel_distance", "precision", "recall", "bits_per_dim"
    ] = "kid"  # fmt: skip
    score_features: str = "inception"
    score_num_samples: int = 1000
    score_num_terms: int = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class HubConfig:
    """Publishing on the Hugging Face Hub, during and after training. Log in with `hf auth login` or set HF_TOKEN.

    Args:
        push_to_hub: Push the pipeline in the background, as `ddpm-hf push` does.
        repo_id: Repository: "user/name", "organization/name", or "name" in your own namespace; created if missing.
        private: Create the repository as private; an existing public repository is refused.
        branch: Branch to push to instead of main; created if missing.
        fp16: Also push half-precision weights, for `from_pretrained(..., variant="fp16")`.
        license: License identifier for the model card, such as "mit"; null marks it as unknown.
        push_every_steps: Push the EMA weights at this interval; 0 pushes only when training ends.
        checkpoint_branch: Branch for checkpoints with training.resume_from_hub, one per run; created if missing. Its
            history is not kept.
    """

    push_to_hub: bool = False
    repo_id: str | None = None
    private: bool = False
    branch: str | None = None
    fp16: bool = False
    license: str | None = None
    push_every_steps: int = 0
    checkpoint_branch: str = "checkpoints"


UNetOverride: TypeAlias = int | float | bool | str | list[int] | list[str] | None
CompileMode: TypeAlias = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
OptimizerOption: TypeAlias = int | float | bool | str | list[float] | None
BETA_RANGES = ("linear", "scaled_linear", "sigmoid", "warmup10", "warmup50", "const")
"""The values of diffusion.beta_schedule that use beta_end, and except for const beta_start."""
# Aliases of values, stored under the names of diffusers.
DIFFUSION_ALIASES: dict[str, dict[str, str]] = {
    "beta_schedule": {"cosine": "squaredcos_cap_v2", "quad": "scaled_linear"},
    "prediction_type": {"eps": "epsilon", "x0": "sample", "v": "v_prediction"},
}


AugmentationTransform: TypeAlias = Literal[
    "xflip", "yflip", "rotate_int", "translate_int", "scale", "rotate_frac", "aniso", "translate_frac", "brightness",
    "contrast", "lumaflip", "hue", "saturation",
]  # fmt: skip
NATIVE_SCHEDULER = "GaussianDiffusionScheduler"
SCHEDULERS = {
    "unipc": "UniPCMultistepScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "ddim": NATIVE_SCHEDULER,
    "ddpm": NATIVE_SCHEDULER,
    "deis": "DEISMultistepScheduler",
    "heun": "HeunDiscreteScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "dpm2": "KDPM2DiscreteScheduler",
    "dpm2_a": "KDPM2AncestralDiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "sa": "SASolverScheduler",
}
"""Short names of schedulers; ddim has eta 0 and ddpm eta 1."""
SCHEDULERS_WITH_ETA = (NATIVE_SCHEDULER, "DDIMScheduler", "DDIMParallelScheduler")


TRAIN_DATASET, EVAL_DATASET = "memory:train_dataset", "memory:eval_dataset"
"""The values of data.source and data.validation_split that stand for the images given to a Trainer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Training and validation images.

    Args:
        source: Image folder (class subfolders become labels), .zip or .tar of one, folder of .tar shards, .parquet,
            .arrow, .csv, .tsv or .jsonl file, folder of parquet or arrow files, .npy or .npz file, idx files of MNIST
            and its relatives, or Hub dataset id.
        subset: Configuration name of a Hub dataset that has several.
        revision: Branch, tag or commit of a Hub dataset; null uses the default branch.
        split: Split to train on, or a part of one, such as "train[:90%]".
        validation_split: Split, or part of one, used as the validation set; must not overlap with split.
        validation_fraction: Fraction of the images used as the validation set, chosen by training.seed.
        layout: Meaning of the folders in a folder or archive: "flat" (none), "classes", "splits", or "splits/classes";
            null decides by their names.
        image_column: Column or array of the images; null uses the only one.
        label_column: Column or array of labels; null uses the only ClassLabel column, or "label".
        crop_before_resize: First crop: side of a centered square, or [left, top, right, bottom].
        resolution: Image size, one side or [height, width]: the shorter side is resized (antialiased), then the image
            is cropped. null keeps the original size, which all images must share.
        resize_to: Shorter side after resizing, larger than resolution to leave room for random crops; null resizes to
            resolution, 0 does not resize.
        resize_filter: Pillow filter; nearest is the only one without antialiasing.
        crop: Crop to resolution in the center, or at a random position in every epoch.
        random_flip: Flip images horizontally with probability 1/2, drawn in every epoch.
        augmentation: Probability of each of the augmentation_transforms; 0 disables them. Their parameters condition
            the network during training, so that samples are not augmented. Karras et al. 2022 use 0.12 and 0.15.
        augmentation_transforms: Transforms, named as in the code of Karras et al. 2022. xflip mirrors with probability
            1/2, whatever augmentation is.
        num_channels: 1 (gray), 3 (RGB), 4 (RGBA), or that of an array; null uses the smallest that fits every image.
        value_range: [low, high], the values that become -1 and 1, of floating-point, signed and 32-bit data, and of
            integers that do not use the range of their type; values outside are clipped. "auto" takes the smallest and
            the largest value of split. null takes 0 and 255, or 0 and 65535 for 16 bits. Saved with the pipeline.
        vae: VAE whose latents the network is trained on: AutoencoderKL, AutoencoderTiny or VQModel, a folder or
            Hub repository of one or of a pipeline (`vae/`, `vqvae/`). Every image is encoded once, and samples are
            decoded. null trains on pixels.
        vae_revision: Branch, tag or commit of the Hub repository in vae or model.vae.
        latent_normalization: "scaling_factor" (that of the VAE), or "measured" (mean 0 and standard deviation 1
            in each channel, over the images of split).
        background: Color behind transparent pixels when num_channels has no alpha channel; null refuses such images.
        on_bad_image: Stop at an unreadable image, or replace it by the next readable one and count it.
        max_bad_fraction: Stop if more than this fraction of the images is unreadable.
        cache_dir: Folder for decoded images; null uses $XDG_CACHE_HOME/ddpm_hf or ~/.cache/ddpm_hf.
        device_resident: Keep all images in GPU memory; "auto" does so if they need at most a tenth of it.
        streaming: Decode images while training instead of caching them first, for data sets larger than the disk.
        shuffle_buffer_size: Size of the shuffle buffer of each process when streaming, in images.
    """

    source: str = ""
    subset: str | None = None
    revision: str | None = None
    split: str = "train"
    validation_split: str | None = None
    validation_fraction: float = 0.0
    layout: Literal["flat", "classes", "splits", "splits/classes"] | None = None
    image_column: str | None = None
    label_column: str | None = None
    crop_before_resize: int | list[int] | None = None
    resolution: int | list[int] | None = None
    resize_to: int | None = None
    resize_filter: Literal["lanczos", "bicubic", "bilinear", "hamming", "box", "nearest"] = "lanczos"
    crop: Literal["center", "random"] = "center"
    random_flip: bool = False
    augmentation: float = 0.0
    augmentation_transforms: list[AugmentationTransform] = field(
        default_factory=lambda: ["xflip", "yflip", "scale", "rotate_frac", "aniso", "translate_frac"]
    )
    num_channels: int | None = None
    value_range: list[float] | Literal["auto"] | None = None
    vae: str | None = None
    vae_revision: str | None = None
    latent_normalization: Literal["scaling_factor", "measured"] = "scaling_factor"
    background: Literal["white", "black"] | None = None
    on_bad_image: Literal["error", "skip"] = "error"
    max_bad_fraction: float = 0.01
    cache_dir: str | None = None
    device_resident: Literal["auto"] | bool = "auto"
    streaming: bool = False
    shuffle_buffer_size: int = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The UNet.

    Args:
        preset: UNet2DModel configuration, named after its paper or data set and its resolution. "ddpm_32" and
            "ddpm_256" are the networks of Ho et al. 2020 (35.7 and 113.7 M parameters), "latent_32" and "latent_64" are
            made for latents of 32x32 and 64x64. Ignored with config_file or from_pretrained.
        config_file: config.json of a UNet2DModel, or a folder or Hub repository that contains one.
        from_pretrained: Run, checkpoint (its EMA), pipeline or UNet2DModel to fine-tune, a folder or Hub repository;
            weights and EMA start from it.
        revision: Branch, tag or commit of the Hub repository in config_file or from_pretrained.
        vae: VAE that decodes the samples, a folder or Hub repository as in data.vae, if data.source has latents
            in data.value_range instead of images.
        overrides: UNet2DModel settings that replace those of the preset, config_file or from_pretrained, for example
            {dropout: 0.1}.
        class_conditional: Condition the network on the labels of the data set.
        initialization: "paper" (Glorot uniform, output layers near zero; Ho et al. 2020) or "torch" (PyTorch defaults).
        gradient_checkpointing: Recompute activations in the backward pass instead of storing them: the same gradients
            with less memory, for about one more forward pass.
    """

    preset: (
        Literal[
            "ddpm_32", "ddpm_64", "ddpm_128", "ddpm_256", "improved_32", "improved_64", "digits_8", "emoji_16",
            "mnist_28", "flowers_64", "latent_32", "latent_64",
        ]
        | None
    ) = "ddpm_32"  # fmt: skip
    config_file: str | None = None
    from_pretrained: str | None = None
    revision: str | None = None
    vae: str | None = None
    overrides: dict[str, UNetOverride] = field(default_factory=dict)
    class_conditional: bool = False
    initialization: Literal["paper", "torch"] = "paper"
    gradient_checkpointing: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class DiffusionConfig:
    """The forward process and the prediction target; saved as scheduler_config.json.

    Args:
        num_train_timesteps: Number of diffusion timesteps T.
        beta_schedule: Noise schedule; docs/mathematics.md has the formulas. By betas: linear (Ho et al. 2020),
            scaled_linear (alias quad), sigmoid, warmup10, warmup50, const. By alpha_bar: squaredcos_cap_v2 (alias
            cosine; Nichol & Dhariwal 2021), laplace, sigmoid_alpha_bar, jsd.
        beta_start: First beta of linear, scaled_linear, sigmoid, warmup10 and warmup50, for T = 1000.
        beta_end: Last beta of these schedules, and the beta of const.
        scale_betas_to_timesteps: Multiply beta_start and beta_end by 1000 / num_train_timesteps, so that processes of
            any length end at about the same SNR (Nichol & Dhariwal 2021). The scaled values are saved.
        schedule_shift: Multiply the noise-to-signal ratio sqrt(1 - alpha_bar) / sqrt(alpha_bar) of every timestep by
            this; resolution / 64 gives large images the noise that 64x64 images get (Hoogeboom et al. 2023, who shift
            log SNR by 2 log(64 / resolution)). The betas are saved as trained_betas.
        prediction_type: Output of the network: epsilon (alias eps), sample (alias x0) or v_prediction (alias v).
        variance_type: Variance of the reverse process: fixed_large (beta_t), fixed_small (posterior variance),
            learned_range (between the two, Nichol & Dhariwal 2021) or learned (unconstrained). The learned ones double
            the network's out_channels and need objective.loss hybrid or vlb.
        clip_sample: Clip the predicted x_0 to [-1, 1] in every sampling step; must be false with data.vae.
        timestep_spacing: Spacing of the timesteps when sampling with fewer than num_train_timesteps steps.
        rescale_betas_zero_snr: Rescale the betas so that the last timestep has zero SNR (Lin et al. 2024).
    """

    num_train_timesteps: int = 1000
    beta_schedule: Literal[
        "linear", "scaled_linear", "quad", "squaredcos_cap_v2", "cosine", "sigmoid", "laplace", "sigmoid_alpha_bar",
        "warmup10", "warmup50", "const", "jsd",
    ] = "linear"  # fmt: skip
    beta_start: float = 1e-4
    beta_end: float = 0.02
    scale_betas_to_timesteps: bool = False
    schedule_shift: float = 1.0
    prediction_type: Literal["epsilon", "sample", "v_prediction", "eps", "x0", "v"] = "epsilon"
    variance_type: Literal["fixed_small", "fixed_large", "learned", "learned_range"] = "fixed_large"
    clip_sample: bool = True
    timestep_spacing: Literal["leading", "trailing", "linspace"] = "trailing"
    rescale_betas_zero_snr: bool = False

    def __post_init__(self) -> None:
        for name, aliases in DIFFUSION_ALIASES.items():
            value = getattr(self, name)
            if isinstance(value, str):  # Python code may have given anything, which load_config and Trainer check
                object.__setattr__(self, name, aliases.get(value, value))

    def scheduler_options(self) -> dict[str, Any]:
        """Return the arguments of `GaussianDiffusionScheduler.create`, which refuses a setting without effect."""
        options = dataclasses.asdict(self)
        return options | {
            "scale_betas_to_timesteps": self.scale_betas_to_timesteps and self.beta_schedule in BETA_RANGES
        }

    @property
    def learns_variance(self) -> bool:
        """Whether the network also predicts the variance."""
        return self.variance_type in ("learned", "learned_range")


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """The training loss, noise and timestep sampling.

    Args:
        loss: mse (L_simple, Ho et al. 2020, Eq. 14), l1 or huber; vlb, the variational bound in bits per dimension (Ho
            et al. 2020, Eq. 5); hybrid, mse plus vlb_weight times vlb, where vlb trains only the learned variance
            (L_hybrid, Nichol & Dhariwal 2021, Eq. 16).
        huber_delta: Error at which huber changes from quadratic to linear.
        vlb_weight: Weight of vlb in hybrid.
        weighting: Loss weight as a function of the signal-to-noise ratio (SNR): none; min_snr (Hang et al. 2023); p2,
            (p2_k + SNR)^-p2_gamma (Choi et al. 2022); snr and truncated_snr, weights SNR and max(SNR, 1) on the x_0
            error for any prediction_type (Salimans & Ho 2022). In hybrid it applies to mse only.
        min_snr_gamma: SNR above which min_snr clips the weight of the x_0 error.
        p2_gamma: Exponent of p2; 0 disables the weighting.
        p2_k: Constant of p2 that bounds the weight at SNR 0.
        timestep_sampling: uniform; antithetic, pairs t and T-1-t (Song et al. 2021); loss_aware, importance sampling in
            proportion to the root mean square of the last 10 losses at each timestep (Nichol & Dhariwal 2021), uniform
            until every timestep has been seen 10 times.
        self_conditioning: Probability of a self-conditioned step, which feeds the network its own x_0 prediction (Chen
            et al. 2022 use 0.5) and costs one more forward pass; 0 builds a network without self-conditioning.
        class_dropout: Probability of replacing a label by the null label, for classifier-free guidance.
        offset_noise: Standard deviation of additional noise that is constant over each channel; 0 disables it.
        input_perturbation: Standard deviation of further noise that the input gets and the target does not, so that
            training sees inputs as erroneous as those of sampling (Ning et al. 2023 use 0.1); 0 disables it.
        immiscible_noise: Assign the noise within each block of 32 images so that every image gets nearby noise (Li et
            al. 2024).
    """

    loss: Literal["mse", "l1", "huber", "vlb", "hybrid"] = "mse"
    huber_delta: float = 1.0
    vlb_weight: float = 0.001
    weighting: Literal["none", "min_snr", "p2", "snr", "truncated_snr"] = "none"
    min_snr_gamma: float = 5.0
    p2_gamma: float = 1.0
    p2_k: float = 1.0
    timestep_sampling: Literal["uniform", "antithetic", "loss_aware"] = "uniform"
    self_conditioning: float = 0.0
    class_dropout: float = 0.0
    offset_noise: float = 0.0
    input_perturbation: float = 0.0
    immiscible_noise: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillationConfig:
    """Progressive distillation of a trained model (Salimans & Ho 2022); `ddpm-hf distill` sets these.

    Args:
        teacher: Run, checkpoint (its EMA) or pipeline that the network learns from, a folder or Hub repository; null
            trains on the images alone.
        revision: Branch, tag or commit of the Hub repository in teacher.
        num_inference_steps: Sampling steps of the student. Each of them learns two DDIM steps of the teacher.
        guidance_scale: Classifier-free guidance scale of the teacher, which becomes part of the student; 1 disables
            guidance.
    """

    teacher: str | None = None
    revision: str | None = None
    num_inference_steps: int = 8
    guidance_scale: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """Optimization, EMA, checkpoints and devices. One step is one optimizer update.

    Args:
        output_dir: Run folder with checkpoints, previews, metrics and the trained pipeline.
        seed: Seed of all randomness in the run.
        num_steps: Optimizer updates.
        train_batch_size: Global batch size, over all processes.
        micro_batch_size: Images per forward pass on one device; smaller values accumulate gradients. null uses the
            per-process batch, divided by --gradient_accumulation_steps of `accelerate launch` if given; auto halves it
            before the first step until it fits into GPU memory.
        prefetch_factor: Steps whose batches are prepared ahead by a thread; 0 prepares each batch when it is needed.
            null uses 2 on CUDA and 0 elsewhere, where the thread would compete with the training for the cores. Always
            0 with objective.timestep_sampling loss_aware, whose timesteps depend on the losses of the step before.
        mixed_precision: fp32, bf16, or fp16 with loss scaling (GPU only). null takes that of `accelerate launch` or
            `accelerate config`, or that of the run that is continued, or fp32.
        optimizer: "adamw", "adam", or the import path of a PyTorch optimizer, such as "torch.optim.SGD".
        optimizer_kwargs: Additional optimizer arguments, for example {momentum: 0.9}.
        learning_rate: Peak learning rate.
        learning_rate_warmup_steps: Steps of linear warmup from 0.
        learning_rate_schedule: constant; cosine or linear decay to 0 at num_steps; inverse_sqrt, constant for
            learning_rate_reference_steps and then in proportion to 1 / sqrt(step) (Karras et al. 2024), which does not
            depend on num_steps.
        learning_rate_reference_steps: Steps after which inverse_sqrt decreases, 70,000 in Karras et al. 2024; null uses
            learning_rate_warmup_steps.
        adam_beta1: beta1 of adamw and adam.
        adam_beta2: beta2 of adamw and adam.
        adam_epsilon: epsilon of adamw and adam.
        weight_decay: Weight decay: decoupled in adamw, added to the gradient in adam.
        max_grad_norm: Maximum global gradient norm; null does not clip.
        ema_decay: EMA decay per step. The EMA weights are sampled and saved.
        ema_warmup: EMA decay schedule. n updates after ema_start_step, "ramp" uses min(ema_decay, (1 + n) / (10 + n)),
            "power" min(ema_decay, 1 - (1 + n / ema_inv_gamma) ** -ema_power), "none" ema_decay.
        ema_inv_gamma: Time scale of power, in updates.
        ema_power: Exponent of power; 3/4 reaches a decay of 0.999 after 10,000 updates, 2/3 after 32,000.
        ema_start_step: Updates during which the EMA is a copy of the weights.
        ema_every_steps: Updates between two EMA updates. The decay is adjusted, so the setting changes the cost and not
            the length of the EMA.
        posthoc_ema: Also track two power-function EMAs, from which `ddpm-hf ema` reconstructs an EMA of any length
            after training (Karras et al. 2024).
        posthoc_ema_every_steps: Interval at which these are stored, 8 bytes per parameter each time; null stores them
            40 times during training.
        checkpoint_every_steps: Checkpoint interval; a checkpoint is also saved at the end and on a signal.
        num_checkpoints_kept: Number of newest checkpoints to keep, at least 2.
        async_checkpoint: Write checkpoints in a background thread, from a copy of their tensors in host memory, while
            training continues. auto does so if half of the available memory is enough for the copy; false makes
            training wait.
        log_every_steps: Interval of lines in metrics.jsonl.
        validate_every_steps: Interval of the validation loss of the EMA weights, also measured after the last step; 0
            disables it. Needs a validation set.
        max_consecutive_nonfinite: Updates with a non-finite gradient are skipped; after this many in a row, stop with
            exit code 3 at the next line of metrics or checkpoint.
        tf32: Allow TF32 in float32 matrix products and convolutions on NVIDIA GPUs.
        deterministic: Use deterministic PyTorch kernels, for bit-exact resume on CUDA; slower.
        compile: Compile the network with torch.compile: auto does so on CUDA GPUs and trains without where it fails;
            true refuses to train where it fails.
        compile_mode: Mode of inductor. reduce-overhead and max-autotune use CUDA graphs, which help where networks and
            batches are so small that the GPU waits for Python.
        compile_backend: Name of a backend of torch.compile.
        channels_last: Keep the weights in the memory format channels_last (NHWC). auto does so on CUDA GPUs if the
            network is compiled, or if torch has a GroupNorm for it (2.15).
        cudnn_benchmark: Let cuDNN measure which convolution is the fastest. auto does so on CUDA GPUs unless
            deterministic.
        resume: "auto" continues the run in output_dir; "none" refuses an output_dir that contains a run.
        resume_from_hub: Push each checkpoint to hub.checkpoint_branch of hub.repo_id in the background, and continue
            from there if output_dir has no later one, as on another machine.
        cpu: Train on the CPU even if there is a GPU.
    """

    output_dir: str = "outputs/run"
    seed: int = 0
    num_steps: int = 800_000
    train_batch_size: int = 128
    micro_batch_size: int | Literal["auto"] | None = None
    prefetch_factor: int | None = None
    mixed_precision: Literal["fp32", "bf16", "fp16"] | None = None
    optimizer: str = "adamw"
    optimizer_kwargs: dict[str, OptimizerOption] = field(default_factory=dict)
    learning_rate: float = 2e-4
    learning_rate_warmup_steps: int = 5000
    learning_rate_schedule: Literal["constant", "cosine", "linear", "inverse_sqrt"] = "constant"
    learning_rate_reference_steps: int | None = None
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    ema_decay: float = 0.9999
    ema_warmup: Literal["none", "ramp", "power"] = "ramp"
    ema_inv_gamma: float = 1.0
    ema_power: float = 0.75
    ema_start_step: int = 0
    ema_every_steps: int = 1
    posthoc_ema: bool = False
    posthoc_ema_every_steps: int | None = None
    checkpoint_every_steps: int = 5000
    num_checkpoints_kept: int = 3
    async_checkpoint: bool | Literal["auto"] = "auto"
    log_every_steps: int = 50
    validate_every_steps: int = 0
    max_consecutive_nonfinite: int = 20
    tf32: bool = True
    deterministic: bool = False
    compile: Literal["auto"] | bool = "auto"
    compile_mode: CompileMode = "default"
    compile_backend: str = "inductor"
    channels_last: Literal["auto"] | bool = "auto"
    cudnn_benchmark: Literal["auto"] | bool = "auto"
    resume: Literal["auto", "none"] = "auto"
    resume_from_hub: bool = False
    cpu: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class PreviewConfig:
    """Sample grids during training, always from the same seeds.

    Args:
        every_steps: Interval; 0 disables previews.
        num_images: Images in the grid.
        num_inference_steps: Sampling steps.
        scheduler: Name as in `ddpm-hf sample --scheduler`; null uses unipc, or ddim with the given eta or for a
            self-conditioned network.
        eta: 0 samples with DDIM, 1 with DDPM; null leaves it to the scheduler.
        guidance_scale: Classifier-free guidance scale; 1 disables guidance.
        guidance_interval: [start, stop], the fractions of the steps between which guidance is on, from the noise (0) to
            the image (1).
    """

    every_steps: int = 5000
    num_images: int = 64
    num_inference_steps: int = 20
    scheduler: str | None = None
    eta: float | None = None
    guidance_scale: float = 1.0
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig:
    """Experiment trackers, in addition to metrics.jsonl. API keys are read from the environment.

    Args:
        trackers: Any of tensorboard (in the run folder), wandb and trackio.
        project: Project name in wandb and trackio.
        run_name: Run name in wandb and trackio; null uses the name of the run folder.
    """

    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)
    project: str = "ddpm_hf"
    run_name: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """All settings of a run.

    Args:
        data: Training and validation images.
        model: The UNet.
        diffusion: The forward process and the prediction target.
        objective: The training loss, noise and timestep sampling.
        distillation: The teacher of a distilled model.
        training: Optimization, EMA, checkpoints and devices.
        preview: Sample grids during training.
        evaluation: Sampling and measuring at the end of training, and scores during training.
        tracking: Experiment trackers.
        hub: Publishing on the Hugging Face Hub.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    hub: HubConfig = field(default_factory=HubConfig)

    def to_yaml(self) -> str:
        """Return all settings as YAML that `--config` reads."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def to_dict(self) -> dict[str, dict[str, object]]:
        """Return all settings as nested dictionaries."""
        return dataclasses.asdict(self)

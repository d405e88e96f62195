"""The settings of a run, as frozen dataclasses.

The part of a run's schema that says how good samples are judged to be.

The part of a run's schema that says where the pipeline is published.

The schema of a run: one frozen dataclass a section. Every field is a flag and a YAML key of the same name.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import yaml


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """What is sampled and measured when training ends, and the score that is measured while it lasts.

    Args:
        num_samples: Images to sample for the report; 0 samples none and writes no report.
        batch_size: Images sampled at once.
        num_inference_steps: Sampling steps an image.
        eta: 0 samples as DDIM, 1 as DDPM.
        guidance_scale: Classifier-free guidance; 1 is none.
        recognition: Report how many samples a classifier trained on the real images recognises as the class asked for;
            needs model.class_conditional and held-out images.
        score_every_steps: Measure a score of the averaged weights this often, and after the last step, and keep the
            checkpoint with the best one; 0 never does. Scores of few samples are biased: compare those of one run.
        score_metric: Which one: a distance between samples and training images in the features of a network (fid, kid,
            inception_score in those of Inception; frechet_distance, kernel_distance, precision, recall in any), or
            bits_per_dim of held-out images, which needs no such network.
        score_features: The network whose features are compared, as `ddpm-hf evaluate --features`.
        score_num_samples: Samples drawn for it, with num_inference_steps, eta, guidance_scale and batch_size of this
            section, or held-out images looked at (all, if there are fewer); fid needs at least 2049, inception_score
            1000.
        score_num_terms: Terms of the bound computed for each of these images; bits_per_dim alone reads it.
    """

    num_samples: int = 64
    batch_size: int = 100
    num_inference_steps: int = 50
    eta: float = 0.0
    guidance_scale: float = 1.0
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
    """Where the pipeline is published, at intervals and when training ends; who you are is no setting.

    Args:
        push_to_hub: Push the pipeline to the Hub in the background, as `ddpm-hf push` does; log in beforehand with
            `hf auth login`, or set HF_TOKEN.
        repo_id: Where to: "user/name", "organisation/name", or "name" for your own; it is made if it does not exist.
        private: Whether a repository that is made is private; one that exists and is public is refused.
        branch: Push to this branch instead of main; it is made if it does not exist.
        fp16: Push half-precision weights too, for `from_pretrained(..., variant="fp16")`.
        license: Identifier of the licence in the card, such as "mit"; null marks it as unknown.
        push_every_steps: Push the averaged weights this often while training; 0 pushes when training ends.
    """

    push_to_hub: bool = False
    repo_id: str | None = None
    private: bool = False
    branch: str | None = None
    fp16: bool = False
    license: str | None = None
    push_every_steps: int = 0


UNetOverride: TypeAlias = int | float | bool | str | list[int] | list[str] | None
OptimizerOption: TypeAlias = int | float | bool | str | list[float] | None


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
        resize_to: Shorter side before the crop, to leave room for random ones; null: as resolution, 0: do not resize.
        resize_filter: Pillow's filter; nearest is the only one that does not antialias.
        crop: Cut resolution out of the centre, or at random, anew in every epoch.
        random_flip: Mirror each image left to right with a probability of one half, anew in every epoch.
        num_channels: 1 (gray), 3 (RGB), 4 (RGBA), or that of an array; null takes what holds every image.
        background: What transparent pixels show where num_channels has no room for them; null refuses such images.
        on_bad_image: Stop at an image that cannot be read, with its name, or let the next good one stand in, counted.
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
        preset: A UNet2DModel of ddpm_hf.unet, named after its source or data and the side length it is made for;
            "ddpm_32" and "ddpm_256" are the paper's networks (35.7 and 113.7 M parameters). null where config_file or
            from_pretrained is given, which also take the place of the default.
        config_file: The config.json of a UNet2DModel, or a folder or Hub repository with one.
        from_pretrained: A pipeline or UNet2DModel to go on from, as a folder or Hub repository; network and averages
            start at its weights.
        revision: Branch, tag or commit of the Hub repository of config_file or from_pretrained; null takes its newest.
        overrides: Entries of UNet2DModel's config that replace those of the preset, config_file or from_pretrained, for
            example {dropout: 0.1}.
        class_conditional: Give the network the labels of the data set.
        initialization: "paper" (Glorot-uniform, output layers near zero; Ho et al. 2020) or "torch" (PyTorch's
            defaults).
        gradient_checkpointing: Compute the activations of residual blocks anew in the backward pass instead of keeping
            them: the same gradients with less memory, for about one more forward pass.
    """

    preset: (
        Literal["ddpm_32", "ddpm_64", "ddpm_256", "improved_32", "improved_64", "digits_8", "mnist_28", "flowers_64"]
        | None
    ) = "ddpm_32"
    config_file: str | None = None
    from_pretrained: str | None = None
    revision: str | None = None
    overrides: dict[str, UNetOverride] = field(default_factory=dict)
    class_conditional: bool = False
    initialization: Literal["paper", "torch"] = "paper"
    gradient_checkpointing: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class DiffusionConfig:
    """The forward process and what the network predicts; saved as scheduler_config.json.

    Args:
        num_train_timesteps: Length T of the chain.
        beta_schedule: Noise schedule. Ranges of betas: linear (Ho et al. 2020), scaled_linear or quad (even steps of
            the root), sigmoid, warmup10 and warmup50 (linear over a tenth or a half), const; formulas: cosine or
            squaredcos_cap_v2 (Nichol & Dhariwal 2021), laplace, sigmoid_alpha_bar, jsd. docs/mathematics.md has them.
        beta_start: First beta of the schedules that are a range of betas but const, tuned to T = 1000.
        beta_end: Last beta of these, and the only one of const.
        scale_betas_to_timesteps: Multiply beta_start and beta_end by 1000 / num_train_timesteps, so that a chain of
            another length ends with about the same signal (Nichol & Dhariwal 2021); stored as the products.
        prediction_type: What the network predicts: epsilon (eps), sample (x0) or v_prediction (v).
        variance_type: Variance of the reverse steps: beta_t (fixed_large), the posterior's (fixed_small), one that the
            network learns between these two (learned_range, Nichol & Dhariwal 2021) or anywhere (learned); the learned
            ones double the network's out_channels and need objective.loss hybrid or vlb.
        clip_sample: Clip the predicted x_0 to [-1, 1] in every sampling step.
        timestep_spacing: How fewer sampling steps are spread over the chain.
        rescale_betas_zero_snr: Rescale the betas so that the last timestep is pure noise (Lin et al. 2024).
    """

    num_train_timesteps: int = 1000
    beta_schedule: Literal[
        "linear", "scaled_linear", "quad", "squaredcos_cap_v2", "cosine", "sigmoid", "laplace", "sigmoid_alpha_bar",
        "warmup10", "warmup50", "const", "jsd",
    ] = "linear"  # fmt: skip
    beta_start: float = 1e-4
    beta_end: float = 0.02
    scale_betas_to_timesteps: bool = False
    prediction_type: Literal["epsilon", "sample", "v_prediction", "eps", "x0", "v"] = "epsilon"
    variance_type: Literal["fixed_small", "fixed_large", "learned", "learned_range"] = "fixed_large"
    clip_sample: bool = True
    timestep_spacing: Literal["leading", "trailing", "linspace"] = "trailing"
    rescale_betas_zero_snr: bool = False

    @property
    def learns_variance(self) -> bool:
        """Whether the network predicts a variance too."""
        return self.variance_type in ("learned", "learned_range")


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """The training loss, and the noise and timesteps it is computed at.

    Args:
        loss: Distance between prediction and target: mse (L_simple, Ho et al. 2020, Eq. 14), l1 or huber; vlb, the
            variational bound in bits per dimension, T times the term of the drawn timestep (Ho et al. 2020, Eq. 5);
            hybrid, mse plus vlb_weight times vlb, which then trains the learned variance alone (L_hybrid, Nichol &
            Dhariwal 2021, Eq. 16).
        huber_delta: Error at which huber turns from quadratic to linear, in units of the prediction.
        vlb_weight: Weight of vlb in hybrid.
        weighting: Factor on the loss as a function of the signal-to-noise ratio (SNR): none; min_snr (Hang et al.
            2023); p2, (p2_k + SNR)^-p2_gamma (Choi et al. 2022); snr and truncated_snr, the mean square of x_0 times
            SNR or max(SNR, 1) whatever is predicted (Salimans & Ho 2022). Under hybrid it acts on the mse alone.
        min_snr_gamma: SNR from which min_snr no longer raises the weight of x_0.
        p2_gamma: Exponent of p2; 0 is no weighting.
        p2_k: Constant of p2 that bounds the weight where the SNR is 0.
        timestep_sampling: uniform; antithetic, pairs t and T-1-t (Song et al. 2021); loss_aware, in proportion to the
            root mean square of the last 10 losses at each t, with importance weights that keep the expected loss
            (Nichol & Dhariwal 2021); it is uniform until every t was seen 10 times.
        self_conditioning: Probability that a step shows the network its own prediction of x_0 as further input channels
            (Chen et al. 2022 use 0.5), at the price of one more forward; 0 is a network without these channels.
        class_dropout: Probability of replacing a label by the null label, for classifier-free guidance.
        offset_noise: Deviation of a further noise that is constant over each channel of an image; 0 is none.
        immiscible_noise: Exchange the noise among each 32 images so that every image gets noise near to it (Li et al.
            2024).
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
    immiscible_noise: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """The run itself. One step is one optimiser update.

    Args:
        output_dir: Run folder: checkpoints, previews, metrics, the trained pipeline.
        seed: Seed of everything random in the run.
        num_steps: Optimiser updates.
        train_batch_size: Images an update, over all processes (global).
        micro_batch_size: Images of one forward on one device; smaller values accumulate gradients. null takes the
            process's whole share; auto halves it before the first step until it fits into the GPU's memory.
        mixed_precision: Precision inside the network: fp32, bf16, or fp16 with loss scaling (needs a GPU).
        optimizer: "adamw", "adam", or the import path of a torch optimiser, for example "torch.optim.SGD".
        optimizer_kwargs: Further arguments of the optimiser, for example {momentum: 0.9}.
        learning_rate: Peak learning rate.
        learning_rate_warmup_steps: Steps of linear warm-up from 0.
        learning_rate_schedule: constant, or cosine or linear decay to 0 at num_steps.
        adam_beta1: Decay of the first moment of adamw and adam.
        adam_beta2: Decay of their second moment.
        adam_epsilon: Their epsilon.
        weight_decay: Decoupled weight decay of adamw; adam adds it to the gradient.
        max_grad_norm: Clip the global gradient norm to this; null does not clip.
        ema_decay: Decay a step of the exponential moving average of the weights, which is what is sampled and saved.
        ema_warmup: Smaller decays at first, so that early weights are forgotten soon. n updates after ema_start_step,
            "ramp" uses min(ema_decay, (1 + n) / (10 + n)), "power" min(ema_decay, 1 - (1 + n / ema_inv_gamma) **
            -ema_power); "none" starts with ema_decay.
        ema_inv_gamma: Time scale of the power law, in updates.
        ema_power: Exponent of the power law; 3/4 reaches a decay of 0.999 after 10,000 updates, 2/3 after 32,000.
        ema_start_step: For this many updates the average is a copy of the weights.
        ema_every_steps: Updates between two of the average, which then forgets as much at once as it would have in
            single steps: the setting changes the cost, not the length of the average.
        posthoc_ema: Follow the weights with two more averages, from which `ddpm-hf ema` makes one of any length after
            training (Karras et al. 2024); see posthoc_ema_every_steps for the disk that it takes.
        posthoc_ema_every_steps: Store these two this often, 8 bytes a parameter each time; null stores them 40 times
            during training.
        checkpoint_every_steps: Save a checkpoint this often; one is always saved at the end and on a signal.
        num_checkpoints_kept: Newest checkpoints kept, at least 2.
        log_every_steps: Write a line of metrics this often.
        validate_every_steps: Measure the loss of the averaged weights on the held-out images this often, and after the
            last step; 0 never does. Needs held-out images.
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
    micro_batch_size: int | Literal["auto"] | None = None
    mixed_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    optimizer: str = "adamw"
    optimizer_kwargs: dict[str, OptimizerOption] = field(default_factory=dict)
    learning_rate: float = 2e-4
    learning_rate_warmup_steps: int = 5000
    learning_rate_schedule: Literal["constant", "cosine", "linear"] = "constant"
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
    log_every_steps: int = 50
    validate_every_steps: int = 0
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
class TrackingConfig:
    """Where metrics and previews go beside metrics.jsonl, which is always written. Keys and tokens are no settings.

    Args:
        trackers: Any of tensorboard (into the run folder), wandb and trackio; none by default.
        project: Project of the run in wandb and trackio.
        run_name: Its name there; null takes that of the run folder.
    """

    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)
    project: str = "ddpm_hf"
    run_name: str | None = None


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
        tracking: Where metrics and previews go.
        hub: Where the pipeline is published.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    hub: HubConfig = field(default_factory=HubConfig)

    def to_yaml(self) -> str:
        """Returns the resolved configuration as YAML that `--config` reads."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def to_dict(self) -> dict[str, dict[str, object]]:
        """Returns the resolved configuration as plain nested dictionaries."""
        return dataclasses.asdict(self)

"""Tiny random pipelines, and the folders they are saved to, for the loading tests."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from safetensors.torch import save_file

from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler
from tests.conftest import tiny_vae
from tests.unit.diffusion.oracles import tiny_unet

# Arguments of the call for class-conditional folders, which differ in schedule, prediction, classes and weights.
CALLS: dict[str, dict[str, Any]] = {
    "guided": {"class_labels": ["dog", "cat"], "guidance_scale": 2.0, "eta": 0.0},
    "labelled": {"class_labels": ["one", "four"]},
}
# Folders that the stock pipeline samples correctly, and folders that it would sample wrongly.
FOR_STOCK = ("plain", "learned_range")
NOT_FOR_STOCK = ("self_conditioned", "learned", "latent")
SAVED_FOLDERS = (*FOR_STOCK, *CALLS, *NOT_FOR_STOCK)
# The file of the second moments in "plain".
SECOND_MOMENTS = "scheduler/reverse_variance.json"

# A folder like google/ddpm-cifar10-32 on the Hub, with a quarter of its channels. It was written by an early release of
# diffusers, without subfolders and without the options that were added later.
EARLY_UNET = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [32, 64, 64, 64],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
EARLY_SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "_diffusers_version": "0.1.1",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "clip_sample": True,
    "num_train_timesteps": 1000,
    # Two options that no scheduler has now.
    "tensor_format": "pt",
    "timestep_values": None,
    "trained_betas": None,
    "variance_type": "fixed_large",
}
EARLY_INDEX = {
    "_class_name": "DDPMPipeline",
    "_diffusers_version": "0.1.1",
    "scheduler": ["diffusers", "DDPMScheduler"],
    "unet": ["diffusers", "UNet2DModel"],
}
EARLY_NAMES = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def make_pipeline(name: str, seed: int = 0) -> GaussianDiffusionPipeline:
    """Return the pipeline of one of SAVED_FOLDERS."""
    create = GaussianDiffusionScheduler.create
    if name == "plain":
        scheduler = create(beta_schedule="cosine", prediction_type="v")
        scheduler.eps_second_moments = torch.linspace(0, 1, len(scheduler), dtype=torch.float64)
        return GaussianDiffusionPipeline(tiny_unet(seed), scheduler)
    if name == "guided":
        scheduler = create(beta_schedule="cosine", prediction_type="x0", rescale_betas_zero_snr=True)
        names = {"0": "cat", "1": "dog"}
        unet = tiny_unet(seed + 1, num_class_embeds=3)
        return GaussianDiffusionPipeline(unet, scheduler, class_names=names, has_null_label=True)
    if name == "labelled":
        scheduler = create(beta_schedule="sigmoid", variance_type="fixed_large", timestep_spacing="trailing")
        names = {str(label): word for label, word in enumerate(("zero", "one", "two", "three", "four"))}
        return GaussianDiffusionPipeline(tiny_unet(seed + 2, num_class_embeds=5), scheduler, class_names=names)
    if name == "self_conditioned":
        return GaussianDiffusionPipeline(tiny_unet(seed + 3, in_channels=6), create(), self_conditioned=True)
    if name == "latent":
        unet = tiny_unet(seed + 5, sample_size=4, in_channels=2, out_channels=2)  # images of 8x8
        statistics = {"latents_mean": [0.1, -0.2], "latents_std": [0.5, 2.0]}
        vae = tiny_vae(num_channels=3).eval()
        return GaussianDiffusionPipeline(unet, create(clip_sample=False), vae=vae, **statistics)
    return GaussianDiffusionPipeline(tiny_unet(seed + 4, out_channels=6), create(variance_type=name))


def save_early_folder(folder: Path, pickled: bool = False) -> None:
    """Write such a folder, with the former names of the attention weights."""
    folder.mkdir()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DModel(**{key: value for key, value in EARLY_UNET.items() if not key.startswith("_")})
    weights = {}
    for name, weight in unet.state_dict().items():
        for now, early in EARLY_NAMES.items():
            name = name.replace(now, early) if ".attentions." in name else name
        weights[name] = weight
    if pickled:
        torch.save(weights, folder / "diffusion_pytorch_model.bin")
    else:
        save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    for name, content in {
        "config": EARLY_UNET,
        "scheduler_config": EARLY_SCHEDULER,
        "model_index": EARLY_INDEX,
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")

"""Training steps of other trainers, written as calls of their public interfaces.

Each has the same methods, so that a row can take any of them: `step`, one optimizer update on the next batch; `update`,
its part after the backward pass (clip, optimizer, EMA); `save`, its checkpoint. Batches are ready float32 tensors in
[-1, 1]: reading them is a row of its own.
"""

import copy
import importlib.util
import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

TRAIN_UNCONDITIONAL = "train_unconditional.py"
LUCIDRAINS = "denoising-diffusion-pytorch"
DDPM_TORCH = "ddpm-torch"
DDPM_TORCH_VARIABLE = "DDPM_HF_DDPM_TORCH"


def missing() -> dict[str, str]:
    """Return the peers that cannot be measured here, with the reason."""
    reasons = {}
    if not all(map(importlib.util.find_spec, ("denoising_diffusion_pytorch", "torchvision"))):
        reasons[LUCIDRAINS] = "not measured: `pip install denoising-diffusion-pytorch torchvision` adds it"
    checkout = os.environ.get(DDPM_TORCH_VARIABLE)
    if not checkout:
        reasons[DDPM_TORCH] = f"not measured: {DDPM_TORCH_VARIABLE} names no checkout of tqch/ddpm-torch"
    elif importlib.util.find_spec("torchvision") is None:
        reasons[DDPM_TORCH] = "not measured: it needs torchvision"
    return reasons


class TrainUnconditional:
    """The loop of diffusers' train_unconditional.py at its defaults.

    Args:
        unet: The network, in training mode.
        batches: Images in [-1, 1], used in turn.
        mixed_precision: As in Accelerate.
        learning_rate: The peak, from which it decays to 0.
        warmup_steps: Updates before the peak.
        num_steps: Updates of the whole training.
    """

    def __init__(
        self,
        unet: UNet2DModel,
        batches: Sequence[torch.Tensor],
        mixed_precision: str = "no",
        *,
        learning_rate: float = 1e-4,
        warmup_steps: int = 500,
        num_steps: int = 100_000,
    ) -> None:
        self.accelerator = Accelerator(mixed_precision=mixed_precision)
        self.weight_dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[mixed_precision]
        self.scheduler = DDPMScheduler(num_train_timesteps=1000)
        self.ema = EMAModel(
            unet.parameters(),
            decay=0.9999,
            use_ema_warmup=True,
            inv_gamma=1.0,
            power=0.75,
            model_cls=UNet2DModel,
            model_config=unet.config,
        )
        optimizer = torch.optim.AdamW(
            unet.parameters(), lr=learning_rate, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
        )
        lr_scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=warmup_steps, num_training_steps=num_steps)
        self.unet, self.optimizer, self.lr_scheduler = self.accelerator.prepare(unet, optimizer, lr_scheduler)
        self.ema.to(self.accelerator.device)
        self.accelerator.register_save_state_pre_hook(self._save_networks)
        self.progress_bar = tqdm(disable=True)
        self.batches = itertools.cycle(batches)
        self.global_step = 0

    def step(self) -> None:
        """Make one update."""
        clean_images = next(self.batches).to(self.weight_dtype)
        noise = torch.randn(clean_images.shape, dtype=self.weight_dtype, device=clean_images.device)
        timesteps = torch.randint(0, 1000, (len(clean_images),), device=clean_images.device).long()
        noisy_images = self.scheduler.add_noise(clean_images, noise, timesteps)
        with self.accelerator.accumulate(self.unet):
            model_output = self.unet(noisy_images, timesteps).sample
            loss = F.mse_loss(model_output.float(), noise.float())
            self.accelerator.backward(loss)
            self.update()
        self.progress_bar.update(1)
        self.global_step += 1
        logs = {"loss": loss.detach().item(), "lr": self.lr_scheduler.get_last_lr()[0], "step": self.global_step}
        logs["ema_decay"] = self.ema.cur_decay_value
        self.progress_bar.set_postfix(**logs)
        self.accelerator.log(logs, step=self.global_step)

    def update(self) -> None:
        """Clip the gradient, update the weights and their EMA."""
        if self.accelerator.sync_gradients:
            self.accelerator.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()
        if self.accelerator.sync_gradients:
            self.ema.step(self.unet.parameters())

    def save(self, path: Path) -> None:
        """Write a checkpoint."""
        self.accelerator.save_state(str(path))

    def _save_networks(self, models: list[Any], weights: list[Any], output_dir: str) -> None:
        self.ema.save_pretrained(os.path.join(output_dir, "unet_ema"))
        for model in models:
            model.save_pretrained(os.path.join(output_dir, "unet"))
            weights.pop()


class Lucidrains:
    """The loop of the Trainer of denoising-diffusion-pytorch at its defaults, without its data loader.

    Its networks compute something else than a UNet2DModel, so only the ratio per FLOP compares the implementations.

    Args:
        network: Arguments of its Unet.
        image_size: Height and width.
        batches: Images in [-1, 1], used in turn.
        num_inference_steps: Steps of `sample`, with DDIM.
    """

    def __init__(
        self,
        network: dict[str, Any],
        image_size: int,
        batches: Sequence[torch.Tensor],
        num_inference_steps: int | None = None,
        mixed_precision: str = "no",
    ) -> None:
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet
        from ema_pytorch import EMA

        self.accelerator = Accelerator(mixed_precision=mixed_precision)
        diffusion = GaussianDiffusion(
            Unet(**network), image_size=image_size, sampling_timesteps=num_inference_steps
        ).to(self.accelerator.device)
        self.ema = EMA(diffusion, beta=0.995, update_every=10).to(self.accelerator.device)
        optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))
        self.diffusion = diffusion
        self.model, self.optimizer = self.accelerator.prepare(diffusion, optimizer)
        self.batches = itertools.cycle([(batch + 1) / 2 for batch in batches])  # it normalizes itself
        self.global_step = 0

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The parameters that are trained."""
        return list(self.diffusion.parameters())

    def step(self) -> None:
        """Make one update."""
        self.model.train()
        with self.accelerator.autocast():
            loss = self.model(next(self.batches))
            loss.item()
        self.accelerator.backward(loss)
        self.accelerator.wait_for_everyone()
        self.update()
        self.accelerator.wait_for_everyone()

    def update(self) -> None:
        """Clip the gradient, update the weights and, in every tenth step, their EMA."""
        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.global_step += 1
        self.ema.update()

    def sample(self, batch_size: int) -> torch.Tensor:
        """Sample images."""
        images: torch.Tensor = self.diffusion.sample(batch_size=batch_size)
        return images

    def save(self, path: Path) -> None:
        """Write a checkpoint."""
        state = {
            "step": self.global_step,
            "model": self.accelerator.get_state_dict(self.model),
            "opt": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
        }
        torch.save(state, path.with_suffix(".pt"))


class DdpmTorch:
    """The Trainer of tqch/ddpm-torch, from the checkout that an environment variable names.

    Args:
        network: Arguments of its UNet, or a network that returns a tensor.
        batches: Images in [-1, 1], used in turn.
        num_timesteps: Timesteps of the process; sampling and bits per dimension use all of them.
        learning_rate: The learning rate after the warm-up.
        warmup_steps: Updates of linear warm-up.
    """

    def __init__(
        self,
        network: dict[str, Any] | torch.nn.Module,
        batches: Sequence[torch.Tensor],
        num_timesteps: int = 1000,
        *,
        learning_rate: float = 2e-4,
        warmup_steps: int = 5000,
    ) -> None:
        checkout = str(Path(os.environ[DDPM_TORCH_VARIABLE]).expanduser())
        if checkout not in sys.path:
            sys.path.append(checkout)
        from ddpm_torch import GaussianDiffusion, Trainer, UNet, get_beta_schedule

        self.device = batches[0].device
        self.unet = (network if isinstance(network, torch.nn.Module) else UNet(**network)).to(self.device)
        self.diffusion = GaussianDiffusion(
            get_beta_schedule("linear", 1e-4, 0.02, num_timesteps), "eps", "fixed-small", "mse"
        )
        optimizer = torch.optim.Adam(self.unet.parameters(), lr=learning_rate)
        self.trainer = Trainer(
            self.unet,
            optimizer,
            self.diffusion,
            epochs=1,
            trainloader=None,
            scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / warmup_steps, 1.0)),
            use_ema=True,
            shape=tuple(batches[0].shape[1:]),
            device=self.device,
        )
        self.shape = tuple(batches[0].shape[1:])
        self.batches = itertools.cycle(batches)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The parameters that are trained."""
        return list(self.unet.parameters())

    def step(self) -> None:
        """Make one update."""
        self.trainer.step(next(self.batches))

    def update(self) -> None:
        """Clip the gradient, update the weights and their EMA."""
        trainer = self.trainer
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), max_norm=trainer.grad_norm)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)
        trainer.scheduler.step()
        trainer.ema.update()

    def sample(self, batch_size: int) -> torch.Tensor:
        """Sample images in all timesteps of the process."""
        images: torch.Tensor = self.diffusion.p_sample(self.unet, (batch_size, *self.shape), self.device)
        return images

    def bits_per_dim(self, images: torch.Tensor) -> torch.Tensor:
        """Return the bits per dimension of each image, without the prior.

        These are the calls of its calc_all_bpd, which itself raises a TypeError.
        """
        bits = torch.zeros(len(images), device=images.device)
        with torch.no_grad():
            for timestep in reversed(range(self.diffusion.timesteps)):
                t = torch.full((len(images),), timestep, device=images.device)
                x_t = self.diffusion.q_sample(images, t)
                bits += self.diffusion._loss_term_bpd(self.unet, images, x_t, t, clip_denoised=True, return_pred=False)
        return bits

    def save(self, path: Path) -> None:
        """Write a checkpoint."""
        self.trainer.save_checkpoint(str(path.with_suffix(".pt")))


def stock_copy(unet: UNet2DModel) -> UNet2DModel:
    """Return a UNet2DModel of diffusers with the configuration and the weights of a network."""
    config = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    stock = UNet2DModel.from_config(config)
    stock.load_state_dict(copy.deepcopy(unet.state_dict()))
    return stock.to(unet.device).train(unet.training)

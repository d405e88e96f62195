"""The second moments of a network's prediction of the noise, which make its reverse variances optimal."""

import math

import numpy as np
import torch
from tqdm import tqdm

from ddpm_hf.data import ImageSet
from ddpm_hf.diffusion import GaussianDiffusionPipeline
from ddpm_hf.evaluation.chain import Chain, batches_of, check_labels, load_images
from ddpm_hf.evaluation.ranks import ALONE, Ranks
from ddpm_hf.rng import normal_by_position, numpy_generator


@torch.no_grad()
def estimate_second_moments(
    pipeline: GaussianDiffusionPipeline,
    images: ImageSet,
    *,
    seed: int,
    num_images: int,
    batch_size: int = 64,
    ranks: Ranks = ALONE,
) -> torch.Tensor:
    """Collective: estimates Gamma_t = E |eps(x_t)|^2 / d at every timestep of training. Eq. 8, Bao et al. 2022.

    The images go round in an order that the seed draws, since many sets are sorted by class. Each timestep sees the
    next `num_images` of them, so a small number sees different ones at each.

    Args:
        pipeline: The network and the scheduler.
        images: Training images; held-out ones would tell of the data what the network was not trained on.
        seed: Of the noise, and of the order of the images.
        num_images: For each timestep.
        batch_size: Images of one forward.
        ranks: The processes, which share the timesteps: the bits are those of one process.

    Returns:
        float64 (T,), for `scheduler.eps_second_moments`.

    Raises:
        ValueError: As `check_second_moments`.
    """
    chain = check_second_moments(pipeline, images)
    rows = ranks.part(len(chain))
    mine = np.zeros(len(rows))
    order = numpy_generator(seed, "moments_images").permutation(len(images))
    was_training = pipeline.unet.training
    pipeline.unet.eval()
    try:
        for place, row in enumerate(tqdm(rows, "Second moments", disable=None, leave=False)):
            step, total = chain.transitions[row], 0.0
            for positions in batches_of(range(row * num_images, (row + 1) * num_images), batch_size):
                turn = order[np.asarray(positions) % len(images)]
                x_0, class_labels = load_images(images, turn, chain, with_labels=pipeline.num_classes > 0)
                noise = normal_by_position(seed, "moments", 0, positions, x_0.shape[1:], chain.device).to(chain.dtype)
                eps = chain.predict(chain.noised(x_0, noise, step), step, class_labels).eps
                total += float((eps.double() ** 2).sum()) / math.prod(eps.shape[1:])
            mine[place] = total / num_images
    finally:
        pipeline.unet.train(was_training)
    return torch.from_numpy(ranks.gather(mine)[::-1].copy())  # the chain descends, from T-1 to 0


def check_second_moments(pipeline: GaussianDiffusionPipeline, images: ImageSet) -> Chain:
    """Refuses a pipeline that has no use for second moments, before the network is called, and returns the chain.

    Raises:
        ValueError: The scheduler or its variance is another one, or the images lack the labels of the network.
    """
    chain = Chain(pipeline)
    check_labels(images, pipeline.num_classes)
    # The scheduler itself says whether it takes moments; to ask, any will do.
    type(chain.scheduler).from_config(chain.scheduler.config).eps_second_moments = torch.ones(len(chain))
    return chain

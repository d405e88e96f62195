"""The part of a run's schema that says how good samples are judged to be."""

from dataclasses import dataclass
from typing import Literal


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

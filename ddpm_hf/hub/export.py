"""What of a trained pipeline is published: a fresh folder made of what is on a list, and nothing else.

Weights, configurations and code are written anew from the loaded pipeline, so neither a file that happens to lie beside
them nor code that the folder brought along goes with them; records and pictures are copied by name.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler
from ddpm_hf.evaluation.generate import Sampler, sample_film, sample_images
from ddpm_hf.evaluation.verify import FILE_NAME as VERIFICATION
from ddpm_hf.evaluation.verify import verify, write_verification
from ddpm_hf.hub.card_facts import public_name, without_paths
from ddpm_hf.plots import schedule_plot
from ddpm_hf.redaction import reason_of
from ddpm_hf.run_report import ANIMATION, SAMPLES, STRIP, draw_samples

PICTURES_DIR = "samples"
SCHEDULE, LOSS, EVALUATION_PICTURE = "schedule.png", "loss.png", "evaluation.png"
CONFIGURATION, SUMMARY, EVALUATION = "training_config.yaml", "training_summary.json", "evaluation.json"
NUM_DRAWN, NUM_STEPS, BATCH_SIZE = 16, 50, 8
MAX_CLASSES_DRAWN, NUM_DRAWN_OF_A_CLASS = 10, 4


def assemble(
    source: Path, target: Path, *, run: Path | None = None, fp16: bool = False, with_real_images: bool = False
) -> None:
    """Puts together all that is published but the card.

    Args:
        source: Folder of a pipeline.
        target: A new folder.
        run: Folder of the run that it was trained in, whose pictures are taken; without them some are drawn.
        fp16: Write half-precision weights too.
        with_real_images: Take evaluation.png along, which shows training images beside samples.

    Raises:
        ValueError: The pipeline does not load, is not what was saved, or has weights that are not finite.
    """
    if (source / VERIFICATION).is_file():
        for finding in verify(source):
            if finding.is_bad:
                raise ValueError(
                    f"{source} is not the pipeline that was saved ({finding.way}: {finding.problem}); restore it, or "
                    f"declare it good with ddpm-hf verify {source} --write."
                )
    try:
        pipeline = GaussianDiffusionPipeline.from_pretrained(source, dtype=torch.float32)
    except OSError as error:
        raise ValueError(f"{source} holds no pipeline that can be loaded: {reason_of(error)}.") from error
    _check_finite(pipeline, source, "float32")
    pipeline.save_pretrained(target)
    write_verification(target)
    (target / PICTURES_DIR).mkdir()
    _draw_schedule(pipeline, target / PICTURES_DIR / SCHEDULE)
    _add_samples(pipeline, run or source, target / PICTURES_DIR)
    _copy_picture((run or source) / LOSS, target / PICTURES_DIR)
    if with_real_images and not _copy_picture(source / EVALUATION_PICTURE, target / PICTURES_DIR):
        raise ValueError(
            f"{source} has no {EVALUATION_PICTURE}, which alone shows real images; measure with ddpm-hf evaluate, or "
            "leave with_real_images out."
        )
    for name in (SUMMARY, EVALUATION):
        if (source / name).is_file():
            _write_json(target / name, without_paths(_read_json(source / name)))
    if (source / CONFIGURATION).is_file():
        (target / CONFIGURATION).write_text(_public_settings(source), encoding="utf-8")
    if fp16:
        pipeline.unet.half()
        _check_finite(pipeline, source, "float16")
        pipeline.save_pretrained(target, variant="fp16")


def contents(folder: Path) -> dict[str, int]:
    """Returns the size in bytes of every file, by its path in the repository."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def _check_finite(pipeline: GaussianDiffusionPipeline, source: Path, dtype: str) -> None:
    """Refuses weights that are not finite; in half precision, a large one is not."""
    for name, parameter in pipeline.unet.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            advice = "leave fp16 out" if dtype == "float16" else "go back to an earlier checkpoint"
            raise ValueError(f"{source} has weights that are not finite as {dtype} ({name}); {advice}.")


def _draw_schedule(pipeline: GaussianDiffusionPipeline, path: Path) -> None:
    """Draws the noise schedule that the network was trained with."""
    scheduler = GaussianDiffusionScheduler.from_config(pipeline.scheduler.config)
    schedule_plot({"": scheduler.noise_schedule.alphas_cumprod.double().numpy()}, path)


def _add_samples(pipeline: GaussianDiffusionPipeline, run: Path, target: Path) -> None:
    """Copies the pictures of the run's report, or draws such pictures."""
    if all((run / name).is_file() for name in (SAMPLES, STRIP, ANIMATION)):
        for name in (SAMPLES, STRIP, ANIMATION):
            _copy_picture(run / name, target)
        return
    if _copy_picture(run / SAMPLES, target):
        return
    num_classes = min(pipeline.num_classes, MAX_CLASSES_DRAWN)
    number = num_classes * NUM_DRAWN_OF_A_CLASS or NUM_DRAWN
    sampler = Sampler(
        num_inference_steps=min(NUM_STEPS, int(pipeline.scheduler.config["num_train_timesteps"])),
        eta=0.0 if isinstance(pipeline.scheduler, GaussianDiffusionScheduler) else None,
        labels=tuple(range(num_classes)) or None,
    )
    prepared = sampler.prepare(pipeline)
    samples = sample_images(prepared, sampler, seed=0, indices=range(number), batch_size=BATCH_SIZE)
    trajectory = sample_film(prepared, sampler, seed=0, num_images=number, batch_size=BATCH_SIZE)
    names = pipeline.config.get("class_names")
    draw_samples(
        target,
        samples,
        np.arange(number) % num_classes if num_classes else None,
        [names[str(label)] for label in range(pipeline.num_classes)] if names else None,
        trajectory,
    )


def _copy_picture(path: Path, target: Path) -> bool:
    """Copies a picture that is one, under its own name, and says whether it did; links lead elsewhere."""
    if not path.is_file() or path.is_symlink():
        return False
    try:
        with Image.open(path, formats=["PNG", "GIF"]) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"{path} is no picture that can be published ({reason_of(error)}); remove it, and push again."
        ) from error
    shutil.copyfile(path, target / path.name)
    return True


def _read_json(path: Path) -> dict[str, Any]:
    """Reads a record."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({reason_of(error)}); make it anew, or remove it.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no record; make it anew, or remove it.")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a record, without numbers that JSON does not have."""
    path.write_text(json.dumps(_finite(content), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    """Returns a value with None in the place of what is not finite."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _public_settings(source: Path) -> str:
    """Returns the settings of the training without the places of this machine, the same wherever it is published from.

    Of a path its last part stays. An owner and a name with a slash between them are an id of the Hub where the summary
    of the training says so, or a setting beside them that only the Hub has.
    """
    path = source / CONFIGURATION
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read ({reason_of(error)}); remove it, and push again.") from None
    if not isinstance(settings, dict) or not all(isinstance(section, dict) for section in settings.values()):
        raise ValueError(f"{path} holds no settings of a training; remove it, and push again.")
    data, model = settings.get("data", {}), settings.get("model", {})
    summary = _read_json(source / SUMMARY) if (source / SUMMARY).is_file() else {}
    learned_from = (summary.get("data") or {}).get("source")
    is_known = {
        "output_dir": False,
        "cache_dir": False,
        "source": data.get("source") == learned_from or bool(data.get("revision") or data.get("subset")),
        "config_file": bool(model.get("revision")),
        "from_pretrained": bool(model.get("revision")),
    }
    for section in settings.values():
        for name in is_known.keys() & section.keys():
            if isinstance(section[name], str):
                section[name] = public_name(section[name], is_known=is_known[name])
    return str(yaml.safe_dump(without_paths(settings), sort_keys=False, allow_unicode=True))

"""What is due after which step, beside the update itself."""

from ddpm_hf.config import RunConfig
from ddpm_hf.training import posthoc_ema


def due_after(step: int, config: RunConfig) -> set[str]:
    """Returns what is due after `step` optimiser updates: any of log, validate, score, preview, store, save, publish.

    The last step is measured and saved whatever its number; the finished pipeline is not published from here.
    """
    training, is_last = config.training, step == config.training.num_steps
    with_the_last = {
        "log": training.log_every_steps,
        "validate": training.validate_every_steps,
        "score": config.evaluation.score_every_steps,
        "save": training.checkpoint_every_steps,
    }
    due = {name for name, every_steps in with_the_last.items() if every_steps and (step % every_steps == 0 or is_last)}
    if config.preview.every_steps and step % config.preview.every_steps == 0:
        due.add("preview")
    if posthoc_ema.is_due(step, training):
        due.add("store")
    if config.hub.push_every_steps and step % config.hub.push_every_steps == 0 and not is_last:
        due.add("publish")
    return due

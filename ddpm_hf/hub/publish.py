"""The former name of `ddpm_hf.hub.push.push`."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

from ddpm_hf.hub.push import Pushed, Target, push


def publish(
    source: Path, target: Target, *, run: Path | None = None, license: str | None = None, **options: Any
) -> Pushed:
    """Call `push`, with a DeprecationWarning."""
    warnings.warn("publish is now ddpm_hf.hub.push.push(folder, Target(...))", DeprecationWarning, stacklevel=2)
    target = dataclasses.replace(target, license=license or target.license)
    return push(source if run is None else run, target, **options)

"""What a person sees of a run: a progress bar, or lines where there is no terminal."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


class Progress:
    """A progress bar on rank 0's terminal; without a terminal, lines. Use it as a context manager.

    Args:
        first_step: Steps that were done before.
        num_steps: Steps of the whole run.
        is_main_process: Whether this process speaks.
    """

    def __init__(self, first_step: int, num_steps: int, *, is_main_process: bool) -> None:
        self._is_main_process = is_main_process
        self._bar: tqdm[Any] = tqdm(
            initial=first_step,
            total=num_steps,
            desc="Training",
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
            dynamic_ncols=True,
            disable=None if is_main_process else True,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the bar as it is; lines come below it from here on."""
        self._bar.close()

    def update(self) -> None:
        """Counts one step."""
        self._bar.update()

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Says on the bar what training waits for."""
        self._bar.set_description_str(what)
        try:
            yield
        finally:
            self._bar.set_description_str("Training")

    def show(self, row: Mapping[str, Any], train_batch_size: int) -> None:
        """Shows where the run is, from a line of metrics."""
        step, loss, speed = row["step"], row["loss"], max(row["images_per_second"], 0.01)
        shown = f"loss {loss:.4f}" if loss is not None else "loss not finite"
        self._bar.set_postfix_str(f"{shown}, {speed:.0f} images/s")
        if self._bar.disable and self._is_main_process:
            left = tqdm.format_interval((self._bar.total - step) * train_batch_size / speed)
            say(f"step {step}/{self._bar.total}  {shown}  {speed:.0f} images/s  {left} left")


def say(message: str) -> None:
    """Prints a line, above the progress bar where there is one."""
    tqdm.write(message)

"""What keeps a run from being lost: signals, the run folder's lock, and the policy for non-finite gradients."""

import errno
import fcntl
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from ddpm_hf.training.processes import world_size

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# A terminal's Ctrl-C reaches the workers directly and once more through torchrun; that is one request, not two.
_SAME_REQUEST_SECONDS = 2.0
_NUM_ATTEMPTS = 10
# As early as possible: while the data are decoded, a launcher may go away too.
_PARENT_AT_START = os.getppid()


class TrainingStopped(Exception):
    """Training was stopped by a signal after saving.

    Args:
        exit_code: 130 for SIGINT, 143 for the others and for a launcher that went away.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"stopped by a signal (exit code {exit_code})")
        self.exit_code = exit_code


class NonFiniteTraining(Exception):
    """The gradient or the weights are no longer finite; the message says since when and what to do."""


def check_finite(tensors: Iterable[torch.Tensor], step: int) -> None:
    """Makes sure that weights are worth saving: a run that goes on from others could never recover.

    Raises:
        NonFiniteTraining: If any number is not finite.
    """
    if not torch.stack([tensor.isfinite().all() for tensor in tensors]).all():
        raise NonFiniteTraining(
            f"the weights or their averages are not finite after step {step}, so they are not saved; the checkpoints "
            "before it are intact. Lower training.learning_rate, or choose another training.optimizer."
        )


class RunLock:
    """Holds a run folder for one process; the system lets go of it when the process ends, however that happens."""

    def __init__(self, output_dir: Path) -> None:
        self._path = output_dir / ".lock"
        for _ in range(_NUM_ATTEMPTS):
            self._take()
            if self.is_held():
                return
            # A process that leaves removes the file of a folder it wrote nothing to. It did so after we had opened the
            # file, so that we hold one that nobody else will ever see.
            self.release()
        raise OSError(errno.ESTALE, "its lock file is another one whenever it is looked at", str(self._path))

    def _take(self) -> None:
        """Opens and locks the file, which must not be a link to somebody else's."""
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise ValueError(
                f"another process is training in {self._path.parent}; wait for it, stop it, or choose another "
                "training.output_dir."
            ) from None

    def is_held(self) -> bool:
        """Tells whether the folder still has the file that was locked, so that others are kept out."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), self._path.stat(follow_symlinks=False))
        except (FileNotFoundError, NotADirectoryError):
            return False

    def release(self) -> None:
        """Lets go of the folder."""
        os.close(self._descriptor)


class StopWatcher:
    """Turns signals into a stop that all ranks agree on, one step later and without waiting for the device.

    A second signal ends the process at once. A launcher that died without a word (accelerate launch does not pass
    SIGTERM on) counts as SIGTERM. Use it as a context manager on every rank: leaving it restores the old handlers, and
    leaves to them a signal that came when nobody was going to ask any more.
    """

    def __init__(self) -> None:
        self._requested = 0
        self._requested_at = 0.0
        self._was_asked_since = False
        self._launcher = _PARENT_AT_START if {"LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys() else None
        self._group = dist.new_group(backend="gloo") if world_size() > 1 else None
        self._pending: tuple[torch.Tensor, dist.Work | None] | None = None
        self._old_handlers: dict[int, object] = {}

    def __enter__(self) -> "StopWatcher":
        for number in STOP_SIGNALS:
            self._old_handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an error on this rank alone, the others may never answer.
        if kind is None or issubclass(kind, TrainingStopped):
            self.agreed()
        for number, handler in self._old_handlers.items():
            # None stands for a handler that was not installed from Python, which Python cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]
        if kind is None and self._requested and not self._was_asked_since:
            signal.raise_signal(self._requested)

    def _handle(self, number: int, _: FrameType | None) -> None:
        """Notes the first signal; obeys a later one at once."""
        if self._requested and time.monotonic() - self._requested_at > _SAME_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not self._requested:
            self._requested, self._requested_at = number, time.monotonic()

    def exit_code_if_stopped(self) -> int:
        """Collective: call on every rank, once a step.

        Returns:
            The exit code all ranks should end with, or 0 to go on. With several ranks it is what was known a step ago.
        """
        if self._launcher is not None and os.getppid() != self._launcher:
            self._requested = self._requested or signal.SIGTERM
        self._was_asked_since = bool(self._requested)
        exit_code = {0: 0, signal.SIGINT: 130}.get(self._requested, 143)
        if self._group is None:
            return exit_code
        agreed = self.agreed()
        mine = torch.tensor(exit_code)
        self._pending = (mine, dist.all_reduce(mine, dist.ReduceOp.MAX, group=self._group, async_op=True))
        return agreed

    def agreed(self) -> int:
        """Collective: returns the exit code that several ranks agreed on when they last asked; 0 without others."""
        if self._pending is None:
            return 0
        agreed, work = self._pending
        if work is not None:
            work.wait()
        return int(agreed)


class NonFiniteGuard:
    """Counts skipped updates without making the host wait for the device.

    Gradients are reduced over ranks before their norm is taken, so every rank sees the same flags. With fp16 an update
    is also skipped when the scaled gradients overflow, which is how the scaler finds its scale: that is counted apart
    and never stops the run. Where the scale is down to 1 it is not the scaling that is at fault.

    Args:
        max_consecutive: Stop after this many skipped updates in a row, those of the scaler left out.
    """

    def __init__(self, max_consecutive: int) -> None:
        self.num_skipped = 0
        self.num_consecutive = 0
        self.num_scaler_skips = 0
        self._max_consecutive = max_consecutive
        self._flags: torch.Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def record(self, is_nonfinite: torch.Tensor, loss_scale: torch.Tensor | None = None) -> None:
        """Starts copying to the host whether an update will be skipped, and for whose sake.

        Args:
            is_nonfinite: bool, whether the norm of the gradient is not finite.
            loss_scale: The scale of the gradient scaler in this update; None without one.
        """
        is_overflow = is_nonfinite & (loss_scale > 1) if loss_scale is not None else torch.zeros_like(is_nonfinite)
        self._flags = torch.stack([is_nonfinite, is_overflow])
        if self._flags.device.type == "cuda":
            on_device = self._flags
            self._flags = torch.empty_like(on_device, device="cpu", pin_memory=True)
            self._flags.copy_(on_device, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def was_applied(self) -> bool | None:
        """Tells once whether the recorded update changed the weights; None if there is nothing to tell.

        Raises:
            NonFiniteTraining: If too many updates in a row were skipped.
        """
        if self._flags is None:
            return None
        if self._copied is not None:
            self._copied.synchronize()
        is_nonfinite, is_overflow = self._flags.tolist()
        self._flags = self._copied = None
        if not is_nonfinite:
            self.num_consecutive = 0
            return True
        if is_overflow:
            self.num_scaler_skips += 1
            return False
        self.num_skipped += 1
        self.num_consecutive += 1
        if self.num_consecutive >= self._max_consecutive:
            raise NonFiniteTraining(
                f"the gradient was not finite in {self.num_consecutive} updates in a row (training."
                "max_consecutive_nonfinite); the checkpoints before them are intact. Lower training.learning_rate, "
                "use bf16 or fp32 instead of fp16, or look at the images."
            )
        return False

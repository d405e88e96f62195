"""What the metrics say of the loss: its mean, and its mean in each quartile of the timesteps.

All sums stay on the device; the host reads them when a line of metrics is due, in one copy.
"""

from collections.abc import Sequence

import torch

_NUM_QUARTILES = 4
_LOSSES, _NUMBERS = slice(2, 2 + _NUM_QUARTILES), slice(2 + _NUM_QUARTILES, 2 + 2 * _NUM_QUARTILES)


class LossMeter:
    """Sums up this rank's losses since the last line of metrics; a skipped update leaves no trace in them.

    `sums` holds the mean losses of the updates, their number, and for each quartile of the timesteps the losses and the
    number of samples, both times the samples' importance.

    Args:
        num_timesteps: Length T of the chain.
        share: Images of this rank in a step.
        device: Where the losses are.
    """

    def __init__(self, num_timesteps: int, share: int, device: torch.device) -> None:
        self._num_timesteps, self._share = num_timesteps, share
        self._quartiles = torch.arange(_NUM_QUARTILES, device=device)[:, None]
        self.sums = torch.zeros(_NUMBERS.stop, device=device)
        self._step_sums = torch.zeros_like(self.sums)

    def add(self, losses: torch.Tensor, timesteps: torch.Tensor, importance: torch.Tensor | None) -> None:
        """Counts the losses of one forward.

        Args:
            losses: (batch,), not yet multiplied by their importance, without a graph.
            timesteps: int64 (batch,).
            importance: float32 (batch,), or None if it is 1 for all.
        """
        factors = torch.ones_like(losses) if importance is None else importance
        weighted = factors * losses
        is_in = self._quartiles == timesteps * _NUM_QUARTILES // self._num_timesteps
        self._step_sums[0] += weighted.sum() / self._share
        self._step_sums[_LOSSES] += (is_in * weighted).sum(dim=1)
        self._step_sums[_NUMBERS] += (is_in * factors).sum(dim=1)

    def end_step(self, is_nonfinite: torch.Tensor) -> None:
        """Counts the step, unless its update is skipped, and makes room for the next one."""
        self._step_sums[1] += 1
        self.sums += torch.where(is_nonfinite, 0.0, self._step_sums)
        self._step_sums.zero_()

    def load(self, sums_of_ranks: Sequence[Sequence[float]], rank: int, num_processes: int) -> None:
        """Goes on from the sums of a checkpoint; where there were more or fewer ranks, each takes its part.

        Of samples that is an equal part of all, of updates, which every rank counts, the mean. Without ranks there is
        nothing to go on from.
        """
        if not sums_of_ranks:
            self.sums.zero_()
            return
        sums = torch.tensor(sums_of_ranks)
        if len(sums) == num_processes:
            mine = sums[rank]
        else:
            mine = sums.sum(dim=0) / num_processes
            mine[: _LOSSES.start] = sums[:, : _LOSSES.start].mean(dim=0)
        self.sums[: len(mine)] = mine  # those of a checkpoint that knew no quartiles are two

    @staticmethod
    def columns(sums: Sequence[float]) -> dict[str, float | None]:
        """Returns the columns of a line of metrics from the sums over all ranks; null where there was nothing."""
        totals, numbers = [sums[0], *sums[_LOSSES]], [sums[1], *sums[_NUMBERS]]
        names = ["loss", *(f"loss_q{quartile}" for quartile in range(_NUM_QUARTILES))]
        means = [total / number if number else None for total, number in zip(totals, numbers, strict=True)]
        return dict(zip(names, means, strict=True))

"""The losses of the first twenty steps equal the recorded ones: no change of the random numbers goes unnoticed."""

import json
from pathlib import Path

import numpy as np

from ddpm_hf.cli.main import train
from tests.conftest import run_arguments
from tests.runs import EVERYTHING_RANDOM, metrics_of

GOLDEN = Path(__file__).parent / "losses.json"
# The random numbers of data.augmentation are on record in test_augmentation.py, those of input_perturbation in
# test_loss.py.
EVERYTHING = EVERYTHING_RANDOM | {
    "data__augmentation": 0,
    "objective__input_perturbation": 0,
    "training__log_every_steps": 1,
    "diffusion__num_train_timesteps": 20,
}
RUNS = {"plain": {}, "everything": EVERYTHING}


def losses_of(tmp_path: Path) -> dict[str, list[float]]:
    """Return the loss of each step of each run."""
    losses = {}
    for name, changes in RUNS.items():
        settings = changes | {"training__num_steps": 20, "training__checkpoint_every_steps": 20}
        assert train(run_arguments(tmp_path / name, **settings)) == 0
        losses[name] = [row["loss"] for row in metrics_of(tmp_path / name)]
    return losses


def test_the_losses_of_the_first_steps_are_the_ones_on_record(tmp_path: Path) -> None:
    """To 1e-3: processors and versions of PyTorch round differently, which twenty updates amplify.

    Another seed, order, flip, timestep or noise changes a loss by 1e-2 or more. If such a change is intended, delete
    the file, run this test, and add a line to the changelog.
    """
    losses = losses_of(tmp_path)
    if not GOLDEN.exists():
        GOLDEN.write_text(json.dumps(losses, indent=1) + "\n", encoding="utf-8")
        raise AssertionError(f"{GOLDEN} was rewritten; review the difference and run the test again.")
    for name, expected in json.loads(GOLDEN.read_text(encoding="utf-8")).items():
        np.testing.assert_allclose(losses[name], expected, rtol=1e-3, err_msg=name)

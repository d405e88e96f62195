"""The best checkpoint is the one with the best score, is never pruned, and is remembered by a resume."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ddpm_hf.config import ConfigError, load_config
from ddpm_hf.training.trainer import Trainer, best_of
from tests.conftest import run_arguments


@dataclass
class FixedScore:
    """A score that was decided before."""

    value: float
    lower_is_better: bool = True
    kind: str = "test"

    def row(self) -> dict[str, Any]:
        return {"score": self.value, "score_metric": self.kind}


def test_the_best_score_is_the_lowest_or_the_highest() -> None:
    first = best_of(FixedScore(2.0), 10, None)
    assert first == {"step": 10, "kind": "test", "value": 2.0}
    assert best_of(FixedScore(1.0), 20, first) == {"step": 20, "kind": "test", "value": 1.0}
    assert best_of(FixedScore(2.0), 20, first) is None, "of equal ones the first"
    assert best_of(FixedScore(1.0, lower_is_better=False), 20, first) is None
    assert best_of(FixedScore(3.0, lower_is_better=False), 20, first) is not None
    assert best_of(FixedScore(math.nan), 20, None) is None
    assert best_of(FixedScore(9.0, kind="other"), 20, first) == {"step": 20, "kind": "other", "value": 9.0}


@pytest.mark.usefixtures("fresh_accelerate")
def test_the_best_checkpoint_is_kept_over_a_resume(tmp_path: Path) -> None:
    """Scores 3 1 2 5 | 4 6 at the steps 1 to 6, the bar being where the run is stopped and continued."""
    scores = iter([3.0, 1.0, 2.0, 5.0, 4.0, 6.0])

    def train(num_steps: int) -> None:
        changes = {"training__checkpoint_every_steps": 1, "training__num_checkpoints_kept": 2}
        score = {"evaluation__score_every_steps": 1, "training__num_steps": num_steps}
        config, _ = load_config(run_arguments(tmp_path / "run", **changes, **score))
        trainer = Trainer(config, lambda pipeline, training, held_out: FixedScore(next(scores)))
        trainer.fit()
        trainer.folder.release()

    train(4)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_00000002", "step_00000003", "step_00000004"]
    train(6)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_00000002", "step_00000005", "step_00000006"]
    state = json.loads((checkpoints / "step_00000006" / "trainer_state.json").read_text())
    assert state["best"] == {"step": 2, "kind": "test", "value": 1.0}
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["score"] for row in rows if "score" in row] == [3.0, 1.0, 2.0, 5.0, 4.0, 6.0]


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_score_is_saved_where_no_checkpoint_was_due(tmp_path: Path) -> None:
    scores = iter([3.0, 1.0, 2.0])
    changes = {"training__checkpoint_every_steps": 100, "evaluation__score_every_steps": 1, "training__num_steps": 3}
    config, _ = load_config(run_arguments(tmp_path / "run", **changes))
    with pytest.raises(ConfigError, match=r"needs Trainer\(config, scorer=\.\.\.\) to be given"):
        Trainer(config)
    trainer = Trainer(config, lambda pipeline, training, held_out: FixedScore(next(scores)))
    trainer.fit()
    trainer.folder.release()
    found = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert found == ["step_00000001", "step_00000002", "step_00000003"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"score_metric": "bits_per_dim"}, "bits_per_dim needs held-out images; set data.validation_fraction"),
        ({"score_metric": "bits_per_dim", "score_features": "x"}, "evaluation.score_features x has no effect with"),
        ({"score_num_terms": 3}, "evaluation.score_num_terms 3 has no effect with evaluation.score_metric kid"),
        (
            {"score_metric": "fid"},
            "score_num_samples is 1000, and evaluation.score_metric fid needs at least 2049; set",
        ),
        (
            {"score_metric": "inception_score", "score_num_samples": 999},
            "inception_score needs at least 1000; set that",
        ),
        ({"score_num_samples": 0}, "evaluation.score_num_samples is 0, but must be greater than 0"),
        ({"score_metric": "lpips"}, "evaluation.score_metric is lpips, but must be fid, kid,"),
    ],
)
def test_a_score_that_cannot_be_measured_is_refused(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    settings = {f"evaluation__{name}": value for name, value in ({"score_every_steps": 2} | changes).items()}
    settings |= {"data__validation_fraction": 0.1} if "score_features" in changes else {}
    with pytest.raises(ConfigError, match=sentence):
        load_config(run_arguments(tmp_path / "run", **settings))

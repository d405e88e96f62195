"""Two ranks on the CPU. All scenarios of worker.py share one start."""

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel
from PIL import Image
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

from ddpm_hf.cli.main import train
from ddpm_hf.config import TrainingConfig
from ddpm_hf.training.checkpoint import find_latest
from ddpm_hf.training.optim import learning_rate_at
from tests.conftest import run_arguments, tiny_unet, tiny_vae
from tests.distributed import worker
from tests.distributed.ranks import two_ranks
from tests.runs import assert_same_run, loss_columns, metrics_of, tensors_of
from tests.unit.data.helpers import encode, write_parquet

pytestmark = pytest.mark.distributed
NUM_IMAGES = 24


@pytest.fixture(scope="module")
def few_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Distinct images; an epoch takes three steps."""
    folder = tmp_path_factory.mktemp("two")
    pixels = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 8, 8), dtype=np.uint8)
    names = ClassLabel(names=list("0123456789"))
    labels = [number % 10 for number in range(NUM_IMAGES)]
    return write_parquet(folder / "few.parquet", [encode(image) for image in pixels], labels, names)


@pytest.fixture(scope="module")
def begun_alone(few_images: Path) -> list[str]:
    """The images of a run that one process began and that stopped in the middle of its second epoch."""
    seen: list[str] = []
    changes = worker.COVERAGE | {"data__source": few_images}
    stop = worker.signalled(worker.signal.SIGTERM, 3, rank=0)
    _, exit_code = worker.train(few_images.parent / "coverage", changes, worker.recording(seen), stop)
    assert exit_code == 143
    assert len(seen) == 4 * 8
    return seen


@pytest.fixture(scope="module")
def printed(few_images: Path, begun_alone: list[str], tiny_pipeline: Path) -> str:
    """What both ranks print in all scenarios."""
    folder = few_images.parent
    tiny_unet(None).save_pretrained(folder / "unconditional")
    tiny_unet(10).save_pretrained(folder / "conditional")
    shutil.copytree(tiny_pipeline, folder / "teacher")
    tiny_vae().save_pretrained(folder / "vae")
    with two_ranks(folder, worker.main, folder) as ranks:
        for rank in ranks:
            rank.join()
    text = "".join((folder / f"log_{rank}.err").read_text(encoding="utf-8") for rank in (0, 1))
    assert [rank.exitcode for rank in ranks] == [0, 0], text
    return text


@pytest.fixture(scope="module")
def folder(few_images: Path, printed: str) -> Path:
    """The folder with the runs of the scenarios."""
    return few_images.parent


def reports_of(folder: Path, scenario: str) -> list[dict[str, Any]]:
    """Return the report of each rank."""
    return [json.loads((folder / f"{scenario}_{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]


# ------------------------------------------------------------------------------------------------- one loss curve


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Path]:
    """The run of the scenario `curve` on one process: one forward pass of 8 images, and two of 4."""
    runs = {"1x8": folder / "one", "4+4": folder / "accumulated"}
    worker.train(runs["1x8"], worker.CURVE)
    worker.train(runs["4+4"], worker.CURVE | {"training__micro_batch_size": 4})
    return runs


@pytest.mark.parametrize("split", ["1x8", "4+4"])
def test_one_loss_curve_from_one_process_and_from_two(folder: Path, alone: dict[str, Path], split: str) -> None:
    """To 1e-5: only the order of float32 additions differs. The loss history has the losses of both ranks."""
    one, two = alone[split], folder / "curve"
    np.testing.assert_allclose(loss_columns(one), loss_columns(two), rtol=0, atol=1e-5)
    validation = [[row["validation_loss"] for row in metrics_of(run) if "validation_loss" in row] for run in (one, two)]
    assert len(validation[0]) == 2
    np.testing.assert_allclose(validation[0], validation[1], rtol=0, atol=1e-5)
    expected, found = (tensors_of(run / "checkpoints" / "step_00000006") for run in (one, two))
    assert expected.keys() == found.keys()
    for key in expected:
        torch.testing.assert_close(expected[key], found[key], rtol=0, atol=1e-5)
    assert len(list((two / "tensorboard").glob("events.*"))) == 1, "only one process writes to trackers"


def test_two_processes_measure_the_scores_of_one(folder: Path) -> None:
    """To 1e-5: only the order of float32 additions differs; a pixel of a sample may differ by a gray level."""
    alone = worker.score(folder / "score_alone")
    for report in reports_of(folder, "score"):
        np.testing.assert_allclose(report["bits"], alone["bits"], rtol=1e-5)
        np.testing.assert_allclose(report["moments"], alone["moments"], rtol=1e-5)
        np.testing.assert_allclose(report["distance"], alone["distance"], rtol=1e-2)


def test_ranks_hold_the_same_weights_and_ema(folder: Path) -> None:
    first, second = reports_of(folder, "curve")
    assert first == second


def test_gradients_are_views_of_buckets_that_are_filled_by_one_copy(folder: Path) -> None:
    """By one copy for each bucket since torch 2.13."""
    for report in reports_of(folder, "curve"):
        is_batched = "batched_grad_copy" in inspect.signature(DistributedDataParallel).parameters or None
        assert report["settings"] == {"gradient_as_bucket_view": True, "batched_grad_copy": is_batched}


def test_another_optimizer_and_ema_snapshots_match_one_process(folder: Path) -> None:
    """To 1e-5: only the order of float32 additions differs. The learning rate depends on the step alone."""
    runs = [folder / "other_optimizer_alone", folder / "other_optimizer"]
    worker.train(runs[0], worker.OTHER_OPTIMIZER | {"model__from_pretrained": folder / "conditional"})
    config = TrainingConfig(
        learning_rate=1e-3, learning_rate_warmup_steps=2, learning_rate_schedule="cosine", num_steps=6
    )
    expected = [learning_rate_at(step, config) for step in range(6)]
    for run in runs:
        assert [row["learning_rate"] for row in metrics_of(run)] == pytest.approx(expected)
    np.testing.assert_allclose(*(loss_columns(run) for run in runs), rtol=0, atol=1e-5)
    one, two = (tensors_of(run / "checkpoints" / "step_00000006") for run in runs)
    assert one.keys() == two.keys()
    for step, name in ((3, "ema_sigma_0.050"), (6, "ema_sigma_0.100")):
        for tensors, run in ((one, runs[0]), (two, runs[1])):
            path = run / "ema_snapshots" / f"step_{step:08d}" / f"{name}.safetensors"
            tensors |= {f"{name} of {step}: {key}": value for key, value in load_file(path).items()}
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=1e-5)


# -------------------------------------------------------------------------------- another number of processes


def test_a_run_resumed_on_more_and_on_fewer_processes_uses_every_image_once(
    folder: Path,
    begun_alone: list[str],
    printed: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One process, then two, then one, each stopped in the middle of an epoch and between two rows of metrics.

    The images are exactly those of an uninterrupted run on one process, in the same order. Losses to 1e-5: only the
    order of float32 additions differs.
    """
    two, latest = reports_of(folder, "coverage"), find_latest(folder / "coverage" / "checkpoints")[0]
    assert [report["exit_code"] for report in two] == [143, 143]
    assert latest is not None
    assert latest.step == 8, "the ranks agree on a stop one step after the signal"
    changes, seen, whole = worker.COVERAGE | {"data__source": folder / "few.parquet"}, list[str](), list[str]()
    worker.train(folder / "coverage", changes, worker.recording(seen))
    assert "The run used 2 processes and now uses 1. It continues with the same images" in caplog.text
    assert printed.count("The run used 1 process and now uses 2. It continues with the same images") == 1
    worker.train(folder / "whole", changes, worker.recording(whole))

    shares = np.array([report["seen"] for report in two]).reshape(2, 4, 4)  # rank, step, image
    together = [*begun_alone, *shares.swapaxes(0, 1).ravel().tolist(), *seen]
    assert together == whole
    epochs = np.array(together).reshape(4, NUM_IMAGES)
    assert all(len(set(epoch)) == NUM_IMAGES for epoch in epochs.tolist()), "each image once an epoch"
    assert [row["step"] for row in metrics_of(folder / "coverage")] == [5, 10, 12]
    np.testing.assert_allclose(loss_columns(folder / "coverage"), loss_columns(folder / "whole"), rtol=0, atol=1e-5)


# ----------------------------------------------------------------------------------------------------- stopping


def test_a_signal_to_one_rank_stops_both_and_the_run_resumes_bit_identically(folder: Path) -> None:
    """SIGINT to rank 0 in its second step, then SIGUSR1 to rank 1; step 3 is saved although no checkpoint is due."""
    expected = {"exit_codes": [130, 143, 0], "saved": "step_00000003"}
    assert reports_of(folder, "stopped") == [expected, expected]
    assert_same_run(folder / "never_stopped", folder / "stopped", 6)


# ------------------------------------------------------------------------------------------------------- faults


def test_a_non_finite_value_of_one_rank_is_skipped_on_both(folder: Path) -> None:
    """NaN in an image of rank 1, then infinity in one of its gradients: both ranks skip 2 of 6 updates."""
    first, second = reports_of(folder, "not_a_number")
    assert first == second
    weights = first["weights"]
    assert weights[2] == weights[1]
    assert weights[4] == weights[3]
    assert len(set(weights)) == 4, "the other updates are applied"
    assert (first["num_skipped"], first["num_ema_updates"], first["exit_code"]) == (2, 4, 0)
    losses = [row["loss"] for row in metrics_of(folder / "not_a_number")]
    assert [loss is None for loss in losses] == [False, False, True, False, True, False]


def test_a_slow_rank_delays_the_other_and_changes_nothing(folder: Path) -> None:
    assert_same_run(folder / "curve", folder / "slow", 6)


def test_only_rank_0_touches_the_run_folder(folder: Path) -> None:
    first, second = reports_of(folder, "slow")
    assert second["written"] == []
    assert any(line.startswith("os.rename") for line in first["written"]), "it would have been noticed"
    assert any(line.startswith("open") for line in first["written"])


def test_ranks_whose_weights_differ_are_stopped_before_they_save(folder: Path) -> None:
    """A difference in one bit of one weight or EMA weight is enough."""
    first, second = reports_of(folder, "differing")
    assert first == second
    weight, average, *values = first["messages"]
    assert weight.startswith("the 2 processes no longer have the same weights (conv_in.weight), so no checkpoint was")
    assert "(ema of conv_in.weight), so no checkpoint was written; the earlier ones are intact" in average
    assert values == [
        "the 2 processes no longer have the same weights (large)",
        "the 2 processes no longer have the same weights (swapped)",
        "the same",
    ]
    for name in ("weight", "average"):
        assert [path.name for path in (folder / "differing" / name / "checkpoints").iterdir()] == ["step_00000002"]


def test_ranks_train_on_while_rank_0_writes_and_agree_on_a_write_that_failed(folder: Path) -> None:
    """Both find the score of step 6 the best one, because the checkpoint of step 4 does not exist."""
    first, second = reports_of(folder, "background")
    assert first == second
    assert first["seen"] == [[0], [1]]
    assert first["best"] == {"step": 6, "kind": "test", "value": 2.0}
    assert first["message"].startswith("The checkpoint of step 6 could not be written (No space left on device)")
    assert [path.name for path in (folder / "background" / "checkpoints").iterdir()] == ["step_00000002"]


def test_ranks_agree_on_what_the_callbacks_of_one_ask_for(folder: Path) -> None:
    """One step later. The pipeline of the trainer is the same on both, and not collective."""
    first, second = reports_of(folder, "callbacks")
    assert second["saved"] == ["step_00000002", "step_00000005"]
    assert first["output"] == second["output"]
    assert first["output"][0] == 5
    assert first["image"] == second["image"]
    run = folder / "callbacks"
    assert [row["step"] for row in metrics_of(run) if "validation_loss" in row] == [3]
    assert [row["step"] for row in metrics_of(run) if "loss" in row] == [2, 4]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000002", "step_00000005"]


def test_an_error_of_one_rank_is_raised_on_both_and_the_smallest_memory_decides(folder: Path) -> None:
    """24 images fit on rank 0, 3 on rank 1: both take 3, a divisor of 24. Then none fits on rank 1: both fail."""
    for report in reports_of(folder, "agreement"):
        failure, size, out_of_memory, gathered, *_ = report["messages"]
        assert failure == "only rank 1 sees this"
        assert size == 3
        assert out_of_memory.startswith("training.micro_batch_size auto: not even one image fits")
        assert gathered == [[0, "ö"], [1, "ö"]]
        assert report["parts"] == [[200, 0], [0, 7]]


def test_ranks_wait_longer_for_work_of_one_rank_than_in_a_step(folder: Path) -> None:
    """In seconds: half an hour for a lost machine, half a day for decoding the data."""
    assert [report["timeouts"] for report in reports_of(folder, "agreement")] == [[1800, 43200]] * 2


def test_only_rank_0_reads_the_network_and_every_rank_has_it(folder: Path) -> None:
    *_, network, refusal, _ = reports_of(folder, "agreement")[0]["messages"]
    assert network == worker.digest(*tiny_unet(None).parameters())
    assert refusal.startswith(f"model.from_pretrained {folder / 'gone'}")
    assert reports_of(folder, "agreement")[1]["messages"][-3:-1] == [network, refusal]


def test_a_student_learns_the_same_from_a_teacher_that_only_rank_0_can_read(folder: Path) -> None:
    """To float32 rounding, which the order of additions in a batch decides."""
    worker.train(folder / "student_alone", worker.STUDENT | {"distillation__teacher": folder / "teacher"})
    alone, together = (loss_columns(folder / name) for name in ("student_alone", "student"))
    np.testing.assert_allclose(together, alone, rtol=1e-4)


def test_two_processes_encode_the_latents_of_one_bit_by_bit(folder: Path) -> None:
    """Each encodes half of the batches, and rank 0 alone can read the VAE."""
    alone = worker.encode(folder / "encoding_alone", folder / "vae")
    first, second = reports_of(folder, "encoding")
    assert (alone["num_batches"], first["num_batches"], second["num_batches"]) == (29, 15, 14)
    assert first["moments"] == second["moments"] == alone["moments"]
    losses = [loss_columns(folder / name) for name in ("encoding_alone", "encoding")]
    np.testing.assert_allclose(*losses, rtol=1e-4)


# ----------------------------------------------------------------------------------------------------- previews


def test_a_preview_is_the_same_bit_by_bit_on_one_process_and_on_two(folder: Path) -> None:
    """Rank 0 samples images 0 to 7 and 16 to 19, rank 1 the others, in the same batches as one process."""
    assert worker.draw(folder / "alone.png", tiny_unet())
    assert (folder / "preview" / "grid.png").read_bytes() == (folder / "alone.png").read_bytes()
    first, second = reports_of(folder, "preview")
    assert (first["sampled"], second["sampled"]) == ([8, 8, 4, 4], [8, 8])


def test_a_rank_without_memory_for_a_preview_costs_the_preview_alone(folder: Path, printed: str) -> None:
    assert [report["drawn"] for report in reports_of(folder, "preview")] == [[True, False], [False, False]]
    assert not (folder / "preview" / "none.png").exists()
    assert printed.count("No memory for the preview; training continues. Lower preview.num_images.") == 1


def test_previews_of_a_run_are_those_of_one_process(folder: Path, alone: dict[str, Path]) -> None:
    """To one level of 255: the weights agree up to rounding, so that a pixel may be rounded the other way."""
    for name in ("step_00000003.png", "step_00000006.png"):
        one, two = (
            np.asarray(Image.open(run / "previews" / name), np.int16) for run in (alone["1x8"], folder / "curve")
        )
        assert one.shape == two.shape
        assert np.abs(one - two).max() <= 1


# ------------------------------------------------------------------------------------------- a user's mistakes


def errors_of_two_ranks(arguments: list[str], folder: Path) -> list[str]:
    """Return the error lines of both ranks of a run that ends with an error on each."""
    with two_ranks(folder, train, arguments) as ranks:
        for rank in ranks:
            rank.join()
            assert rank.exitcode not in (0, None)
    printed = [(folder / f"log_{rank}.err").read_text(encoding="utf-8") for rank in (0, 1)]
    return [line for text in printed for line in text.splitlines() if line.startswith("error: ")]


def test_a_users_mistake_is_printed_once_and_no_rank_hangs(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious")
    (error,) = errors_of_two_ranks(run_arguments(tmp_path / "run"), tmp_path)
    assert error.startswith("error: training.output_dir")
    assert (tmp_path / "run" / "thesis.tex").read_text() == "precious"


def test_an_unreadable_image_of_one_rank_is_reported_once_by_that_rank(tmp_path: Path) -> None:
    """Each rank streams a file of its own; the bad image is in that of rank 1."""
    for number, bad in enumerate([b"", b"no image"]):
        files = [encode(np.zeros((8, 8), np.uint8)), bad or encode(np.ones((8, 8), np.uint8))] * 4
        write_parquet(tmp_path / "data" / f"train-{number}-of-2.parquet", files)
    streamed = {"streaming": True, "resolution": 8, "num_channels": 1, "shuffle_buffer_size": 1}
    changes = {f"data__{name}": value for name, value in streamed.items()}
    arguments = run_arguments(
        tmp_path / "run", data__source=tmp_path / "data", model__class_conditional=False, **changes
    )
    (error,) = errors_of_two_ranks(arguments, tmp_path)
    assert error.startswith("error: rank 1: row 1 of train-1-of-2.parquet of the stream of ")
    assert error.endswith("; repair or remove it, or set data.on_bad_image to skip.")


def test_a_batch_that_two_processes_cannot_share_is_refused_with_numbers_that_work(folder: Path) -> None:
    for report in reports_of(folder, "agreement"):
        assert report["messages"][-1] == "training.train_batch_size 9 is not a multiple of 2 processes; use 8 or 10."

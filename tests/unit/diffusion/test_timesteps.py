"""Lists of timesteps: as many as asked for, descending, inside the chain, and where the literature puts them."""

import numpy as np
import pytest

from ddpm_hf.diffusion import NoiseSchedule
from ddpm_hf.diffusion.timesteps import SamplingRun, spaced_timesteps

SPACINGS = ("leading", "trailing", "linspace", "quadratic")


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("length", [1, 7, 50, 1000])
def test_every_count_gives_as_many_descending_steps_inside_the_chain(spacing: str, length: int) -> None:
    for count in range(1, length + 1):
        steps = spaced_timesteps(spacing, count, length)
        assert len(steps) == count
        assert steps[0] <= length - 1
        assert steps[-1] >= 0
        assert all(np.diff(steps) < 0), (spacing, count)


def test_spacings_begin_and_end_where_their_paper_says() -> None:
    """Table 2 of Lin et al. 2024 for 10 of 1000 steps; quadratic has its gaps grow linearly."""
    assert spaced_timesteps("leading", 10, 1000) == [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
    assert spaced_timesteps("leading", 10, 1000, offset=1)[-1] == 1
    assert spaced_timesteps("trailing", 10, 1000) == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    assert spaced_timesteps("linspace", 10, 1000) == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
    assert spaced_timesteps("quadratic", 10, 1000) == [999, 789, 604, 444, 308, 197, 111, 49, 12, 0]
    assert spaced_timesteps("quadratic", 1, 1000) == [999]
    assert spaced_timesteps("quadratic", 1000, 1000) == list(range(1000))[::-1]
    with pytest.raises(ValueError, match="'karras' is unknown"):
        spaced_timesteps("karras", 10, 1000)


def test_spacings_are_those_of_other_code_for_50_steps() -> None:
    """Improved DDPM calls linspace "50" and leading "ddim50"; trailing is what denoising-diffusion-pytorch does."""
    fractional = [round(i * 999 / 49) for i in range(50)]
    assert fractional[:5] == [0, 20, 41, 61, 82]
    assert spaced_timesteps("linspace", 50, 1000) == fractional[::-1]
    assert spaced_timesteps("leading", 50, 1000) == list(range(0, 1000, 20))[::-1]
    assert spaced_timesteps("trailing", 50, 1000) == np.linspace(-1, 999, 51).astype(int)[:0:-1].tolist()


@pytest.mark.parametrize("timesteps", [None, 5, "51", [3, "2"], [3, None], [3, True], [3, float("nan")], [[3, 2]]])
def test_what_is_no_list_of_whole_numbers_is_refused(timesteps) -> None:
    with pytest.raises(ValueError, match=r"whole number"):
        SamplingRun(NoiseSchedule.from_betas([0.1] * 10), timesteps)


def test_whole_numbers_of_any_type_make_a_list() -> None:
    schedule = NoiseSchedule.from_betas([0.1] * 10)
    for given in ([9, 4, 0], (9.0, 4.0, 0.0), np.array([9, 4, 0]), range(9, -1, -5)):
        assert SamplingRun(schedule, given).timesteps.tolist() in ([9, 4, 0], [9, 4])


@pytest.mark.parametrize("timestep", [None, "a", "9", 9.5, float("nan"), [9], True, 9j])
def test_what_is_no_timestep_of_the_list_is_refused(timestep) -> None:
    run = SamplingRun(NoiseSchedule.from_betas([0.1] * 10), [9, 4, 1])
    with pytest.raises(ValueError, match=r"is not in the list of 3 timesteps being run \(9 ... 1\)"):
        run.row(timestep)

"""When a cell is ended early."""

import numpy as np
import pytest

from replay.sweep.saturation import GROWTH_BOUND, Backlog

PLANNED = 600


def ended_after(waiting_of, rate=2.0, looks=64):
    """Requests sent when the run is ended; None where it goes to its end. `waiting_of` the requests sent."""
    backlog = Backlog()
    for sent in np.linspace(PLANNED / looks, PLANNED, looks).astype(int).tolist():
        if backlog.look(sent / rate, sent, PLANNED, int(waiting_of(sent))) is not None:
            return sent
    return None


@pytest.mark.parametrize("growth", [GROWTH_BOUND * 1.5, 0.8])
def test_a_backlog_that_grows_far_faster_than_the_bound_ends_a_run_after_a_quarter(growth):
    sent = ended_after(lambda sent: growth * sent)
    assert sent is not None
    assert PLANNED / 4 <= sent < PLANNED / 2


@pytest.mark.parametrize(
    "waiting_of",
    [
        lambda sent: 0,
        lambda sent: 0.15 * sent,  # saturated by the verdict, but not clearly
        lambda sent: 40 + 10 * np.sin(sent / 20),  # many wait, and no more than before
        lambda sent: 100 * np.exp(-(((sent - 100) / 40) ** 2)),  # a burst that is worked off
        lambda sent: min(0.5 * sent, 25),  # too few to tell
    ],
)
def test_no_other_backlog_does(waiting_of):
    assert ended_after(waiting_of) is None

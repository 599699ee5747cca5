"""Work dealt out as it is done, simulated: many processes of unequal speed, one of which dies."""

import heapq

import numpy as np
import pytest

from compress.leases import BEAT, LIFETIME, Chunks

WORKERS = 100


def simulate(folder, speeds, work, dies_at=None):
    """Run the processes by one clock of events.  work: seconds of each chunk at speed 1; worker 0 dies at dies_at.

    Returns (seconds until the last chunk was done, chunk -> the workers that finished it).
    """
    now = 0.0
    workers = [Chunks(folder, len(work), rank, len(speeds), clock=lambda: now) for rank in range(len(speeds))]
    events = [(0.0, rank, "take", None) for rank in range(len(speeds))]
    events += [(BEAT, rank, "renew", None) for rank in range(len(speeds))]
    heapq.heapify(events)
    finished, end = {chunk: [] for chunk in range(len(work))}, 0.0
    working = set(range(len(speeds)))
    while events and working:
        now, rank, what, chunk = heapq.heappop(events)
        if rank == 0 and dies_at is not None and now >= dies_at:
            working.discard(0)
            continue
        if what == "renew":
            if rank in working:
                workers[rank].renew()
                heapq.heappush(events, (now + BEAT, rank, "renew", None))
            continue
        if what == "finish":
            finished[chunk].append(rank)
            workers[rank].done(chunk)
            end = now
        chunk = workers[rank].take()
        if chunk is not None:
            heapq.heappush(events, (now + work[chunk] / speeds[rank], rank, "finish", chunk))
        elif workers[rank].is_over:
            working.discard(rank)
        else:
            heapq.heappush(events, (now + 5.0, rank, "take", None))
    return end, finished


@pytest.mark.long
@pytest.mark.parametrize("one_dies", [False, True])
def test_unequal_workers_finish_together_and_miss_nothing(tmp_path, one_dies):
    """Speeds 1 to 4; the ideal time is the whole work over the sum of speeds."""
    rng = np.random.default_rng(0)
    speeds = rng.uniform(1, 4, WORKERS)
    work = rng.uniform(80, 240, 25 * WORKERS)  # some 16 photographs of 5 copies each at 2 seconds
    ideal = work.sum() / speeds.sum()
    dies_at = 0.4 * ideal if one_dies else None
    took, finished = simulate(tmp_path / "work", speeds, work, dies_at)
    if one_dies:
        ideal = (work.sum() - speeds[0] * dies_at) / speeds[1:].sum()
    assert all(len(by) == 1 for by in finished.values())  # nothing missing, nothing twice
    assert took < 1.1 * ideal
    shares = np.bincount([by[0] for by in finished.values()], minlength=WORKERS)
    assert np.corrcoef(shares[1:], speeds[1:])[0, 1] > 0.9


def test_a_lease_that_is_not_renewed_goes_to_another(tmp_path):
    now = [0.0]
    dead, alive = (Chunks(tmp_path / "work", 1, rank, 2, clock=lambda: now[0]) for rank in (0, 1))
    assert dead.take() == 0
    now[0] = LIFETIME - 1
    assert alive.take() is None
    dead.renew()
    now[0] += LIFETIME - 1
    assert alive.take() is None
    assert not alive.is_over
    now[0] += 2
    assert alive.take() == 0
    alive.done(0)
    assert dead.take() is None
    assert dead.is_over


def test_by_the_clock_of_the_disk(tmp_path):
    one, other = (Chunks(tmp_path / "work", 3, rank, 2) for rank in (0, 1))
    assert {one.take(), other.take(), one.take()} == {0, 1, 2}
    assert other.take() is None
    one.renew()

"""A team of processes: what they tell each other, and how they fail and leave together."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megaseq.base.errors import ParamsError, TrainingError
from megaseq.parallel.place import Place
from megaseq.parallel.process import EndedElsewhereError, Team, current_team
from tests.distributed.harness import run_ranks


def _talk(rank: int) -> dict[str, Any]:
    team = current_team()
    assert (team.rank, team.world_size) == (rank, dist.get_world_size())
    long = "x" * (10 * rank)
    vote = team.vote([1, rank])
    team.meet("here")
    found = {
        "gathered": team.gather({"rank": rank, "text": long, "number": float("inf")}),
        "shared": team.share({"from": rank}),
        "vote": vote.result(),
    }
    try:
        team.check_same({"code": "a", "params": "b" if rank == 1 else "a"})
    except ParamsError as error:
        found["error"] = str(error)
    return found


def test_ranks_tell_each_other_json() -> None:
    for found in run_ranks(_talk, world_size=3):
        assert [row["text"] for row in found["gathered"]] == ["", "x" * 10, "x" * 20]
        assert found["gathered"][2] == {"rank": 2, "text": "x" * 20, "number": float("inf")}
        assert found["shared"] == {"from": 0}
        assert found["vote"] == [3, 3]
        assert "have the same params on all 3 ranks, but is given another on rank 1 than on rank 0" in found["error"]


def test_one_process_is_a_team() -> None:
    with Team.connect(Place()) as team:
        team.open(device=torch.device("cpu"), timeout_seconds=1.0)
        team.meet("alone")
        team.check_same({"code": "a"})
        assert team.gather(3) == [3]
        assert team.share([1]) == [1]
        assert team.vote([2, 0]).result() == [2, 0]
        assert current_team() is team
    assert current_team() is not team


def _places(world_size: int, *, port: int, attempt: str = "0") -> list[Place]:
    return [
        Place(rank=rank, world_size=world_size, port=port, launcher="environment", keeps_store=False, attempt=attempt)
        for rank in range(world_size)
    ]


def _together(places: list[Place], *, work: Any) -> list[BaseException | None]:
    """Runs `work(team)` as every rank, each in a thread; returns what each raised."""
    raised: list[BaseException | None] = [None] * len(places)

    def run(place: Place) -> None:
        try:
            # Not as the current team, which is one for the whole process.
            team = Team.connect(place)
            with contextlib.ExitStack() as stack:
                stack.push(team.__exit__)
                work(team)
        except BaseException as error:
            raised[place.rank] = error

    threads = [threading.Thread(target=run, args=(place,)) for place in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return raised


@pytest.fixture
def store() -> dist.TCPStore:  # type: ignore[name-defined]
    """A store like that of torchrun's agent: it outlives the processes."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]


def test_the_first_error_is_told_and_the_others_leave_silently(store: Any) -> None:
    def work(team: Team) -> None:
        if team.rank == 1:
            raise TrainingError("rank 1: must not fail, but does.")
        team.meet("never")

    raised = _together(_places(3, port=store.port), work=work)
    assert isinstance(raised[1], TrainingError)
    assert [type(raised[rank]) for rank in (0, 2)] == [EndedElsewhereError] * 2
    assert [error.code for error in (raised[0], raised[2]) if isinstance(error, SystemExit)] == [2, 2]


def test_an_error_of_all_is_told_by_one(store: Any) -> None:
    def work(team: Team) -> None:
        raise ParamsError("train.max_steps: must be at least 1, but is 0. Raise it.")

    kinds = [type(error).__name__ for error in _together(_places(3, port=store.port), work=work)]
    assert sorted(kinds) == ["EndedElsewhereError", "EndedElsewhereError", "ParamsError"]


def test_what_dead_processes_have_left_at_the_meeting_point_is_not_read(store: Any) -> None:
    names: list[set[str]] = []
    for world_size in (2, 3, 2):  # The number changes, and comes back, without another attempt.
        seen: set[str] = set()

        def work(team: Team, seen: set[str] = seen) -> None:
            seen.add(team.name)
            team.meet("start")

        assert _together(_places(world_size, port=store.port), work=work) == [None] * world_size
        assert len(seen) == 1
        names.append(seen)
    assert len(set.union(*names)) == 3


def test_a_meeting_point_that_cannot_be_opened(monkeypatch: pytest.MonkeyPatch, store: Any) -> None:
    monkeypatch.setattr("megaseq.parallel.process._MEETING_SECONDS", 1.0)
    with pytest.raises(TrainingError, match=rf"environment: 127.0.0.1:{store.port}: must be a free port"):
        Team.connect(Place(rank=0, world_size=2, port=store.port, launcher="environment"))
    started = time.monotonic()
    with pytest.raises(TrainingError, match="must have all ranks at the start within 1 s, but is without rank 1"):
        Team.connect(Place(rank=0, world_size=2, port=store.port, launcher="environment", keeps_store=False))
    assert time.monotonic() - started < 10

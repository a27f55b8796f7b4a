"""What each launcher puts in the environment, and what is read from it."""

from __future__ import annotations

import pytest

from megaseq.base.errors import ParamsError
from megaseq.parallel.place import Place, find_place, first_host, tasks_per_node

TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "gpu0",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "x",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
SLURM = {
    "SLURM_JOB_ID": "12345",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_NTASKS": "10",
    "SLURM_STEP_NUM_TASKS": "10",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),2",
    "SLURM_JOB_NODELIST": "gpu[07-09]",
}


def test_no_launcher_is_one_process() -> None:
    assert find_place({}) == Place(rank=0, world_size=1, launcher="none")


def test_torchrun() -> None:
    place = find_place(TORCHRUN)
    assert (place.rank, place.world_size, place.local_rank, place.local_size) == (5, 8, 1, 4)
    assert (place.launcher, place.address, place.port) == ("torchrun", "gpu0", 29500)
    assert not place.keeps_store  # The agent does.
    assert place.attempt == "2"


def test_deepspeed() -> None:
    environment = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2", "CROSS_SIZE": "2"}
    place = find_place(environment | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"})
    assert (place.launcher, place.rank, place.local_rank, place.local_size) == ("deepspeed", 3, 1, 2)
    assert place.keeps_store


def test_slurm() -> None:
    place = find_place(SLURM)
    assert (place.launcher, place.rank, place.world_size) == ("slurm", 9, 10)
    assert (place.local_rank, place.local_size) == (1, 2)
    assert (place.address, place.port) == ("gpu07", 15_000 + 12345)
    assert find_place(SLURM | {"MASTER_ADDR": "login", "MASTER_PORT": "7"}).address == "login"


def test_the_batch_script_of_a_slurm_job_is_no_task_of_it() -> None:
    script = {name: value for name, value in SLURM.items() if "STEP" not in name} | {"SLURM_PROCID": "0"}
    assert find_place(script).launcher == "none"
    assert find_place(SLURM | {"SLURM_STEP_NUM_TASKS": "1"}).world_size == 1


def test_open_mpi() -> None:
    names = {"RANK": "3", "SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}
    environment = {f"OMPI_COMM_WORLD_{name}": value for name, value in names.items()}
    place = find_place(environment | {"MASTER_ADDR": "a"})
    assert (place.launcher, place.rank, place.world_size, place.local_rank, place.local_size) == ("mpi", 3, 4, 1, 2)
    with pytest.raises(ParamsError, match="MASTER_ADDR: must be set by the launcher, but is missing"):
        find_place(environment)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"RANK": "8"}, "must give each process a rank below the number of processes, but is rank 8 of 8"),
        ({"LOCAL_RANK": "4"}, "on this machine 4 of 4"),
        ({"RANK": "-1"}, "RANK: must be a whole number, set by the launcher, but is '-1'"),
        ({"MASTER_PORT": ""}, "MASTER_PORT: must be a whole number, set by the launcher, but is missing"),
    ],
)
def test_what_contradicts_itself_is_refused(changes: dict[str, str], said: str) -> None:
    with pytest.raises(ParamsError) as raised:
        find_place(TORCHRUN | changes)
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("gpu[3,5-6]", "gpu3"),
        ("a-b,c", "a-b"),
        ("rack[1-2]-gpu,x", "rack1-gpu"),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_node_lists_that_cannot_be_read() -> None:
    with pytest.raises(ParamsError, match="Set MASTER_ADDR"):
        first_host("")
    with pytest.raises(ParamsError, match=r"must look like 2\(x3\),1"):
        tasks_per_node("two")
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]

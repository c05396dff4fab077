"""A process reads its rank and its rendezvous from environment variables."""

import pytest

from moe_dist.errors import ConfigError
from moe_dist.runtime.environment import ALONE, PUBLISHED, RankEnv, limit_fragmentation, share_cores

FULL = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MOE_DIST_INIT_METHOD": "file:///shared/store",
    "MOE_DIST_ATTEMPT": "2",
    "MOE_DIST_ATTEMPT_ID": "job-7.2",
    "MOE_DIST_GRACE_SECONDS": "90",
}


def test_all_that_a_launcher_sets_is_read() -> None:
    expected = RankEnv(5, 8, 1, 4, "file:///shared/store", 2, "job-7.2", launched=True, grace_seconds=90.0)
    assert RankEnv.from_environment(FULL) == expected


def test_a_process_without_a_launcher_is_alone_and_has_an_attempt_of_its_own() -> None:
    first, second = RankEnv.from_environment({}), RankEnv.from_environment({})
    assert (first.rank, first.world_size, first.init_method, first.attempt, first.launched) == (0, 1, ALONE, 0, False)
    assert first.attempt_id != second.attempt_id
    assert not RankEnv.from_environment({"MOE_DIST_ATTEMPT_ID": ""}).launched, "as from a template without a value"


def test_torchrun_is_understood() -> None:
    env = {k: v for k, v in FULL.items() if not k.startswith("MOE_DIST")}
    env |= {"MASTER_ADDR": "node1", "MASTER_PORT": "29500", "TORCHELASTIC_RESTART_COUNT": "3"}
    read = RankEnv.from_environment(env)
    assert (read.init_method, read.attempt, read.launched) == ("env://", 3, False)


MASTER = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
HYDRA = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
STEP = {"SLURM_JOB_ID": "17", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}
STEP |= {"SLURM_GTIDS": "4,5,6,7", "SLURM_RESTART_COUNT": "3", "PMI_RANK": "5", "PMI_SIZE": "8"}  # also set with --mpi=pmi2


@pytest.mark.parametrize("launcher", [OPEN_MPI, HYDRA, STEP, {**STEP, **OPEN_MPI, "SLURM_STEP_NUM_TASKS": "2"}])
def test_the_ranks_of_mpirun_and_srun_are_understood(launcher: dict[str, str]) -> None:
    read = RankEnv.from_environment({**launcher, **MASTER})
    assert (read.rank, read.world_size, read.local_rank, read.local_world_size) == (5, 8, 1, 4)
    assert (read.init_method, read.launched) == ("env://", False)


def test_the_tasks_of_srun_share_a_name_and_need_no_address() -> None:
    read = RankEnv.from_environment(STEP)
    assert (read.init_method, read.attempt_id, read.attempt) == (PUBLISHED, "srun-17.2-3", 3)
    with pytest.raises(ConfigError, match="no rendezvous for the ranks: set MASTER_ADDR and MASTER_PORT"):
        RankEnv.from_environment(OPEN_MPI)


def test_a_shell_in_a_step_or_in_a_batch_script_starts_one_process() -> None:
    for shell in (
        {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_GTIDS": "0"},
        {"SLURM_JOB_ID": "17", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_GTIDS": "0"},
    ):
        first, second = RankEnv.from_environment(shell), RankEnv.from_environment(shell)
        assert (first.rank, first.world_size, first.init_method) == (0, 1, ALONE)
        assert first.attempt_id != second.attempt_id, "it may start one run after the other"


def test_without_local_ranks_each_node_has_one_as_pods_of_kubernetes_do() -> None:
    read = RankEnv.from_environment({"RANK": "3", "WORLD_SIZE": "4", **MASTER})
    assert (read.rank, read.world_size, read.local_rank, read.local_world_size) == (3, 4, 0, 1)


def test_an_agent_of_torchrun_inside_srun_gives_the_rank_and_every_start_its_own_name() -> None:
    inside = {**STEP, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **MASTER}
    first, second = RankEnv.from_environment(inside), RankEnv.from_environment(inside)
    assert (first.rank, first.world_size, first.attempt) == (1, 2, 0)
    assert first.attempt_id != second.attempt_id


@pytest.mark.parametrize(
    ("usable", "ranks", "given", "threads"),
    [
        (8, 1, {}, "8"),
        (8, 3, {}, "2"),
        (8, 20, {}, "1"),
        (8, 2, {"OMP_NUM_THREADS": "5"}, "5"),
        (64, 4, {"SLURM_CPUS_ON_NODE": "8"}, "2"),  # the job has a part of a node, and Slurm does not bind its tasks
        (2, 4, {"SLURM_CPUS_ON_NODE": "8"}, "2"),  # Slurm binds each task to its share
    ],
)
def test_ranks_share_the_cores_of_their_node(
    monkeypatch: pytest.MonkeyPatch, usable: int, ranks: int, given: dict[str, str], threads: str
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(usable)))
    env = dict(given)
    assert share_cores(ranks, env) == ("OMP_NUM_THREADS" not in given)
    assert env["OMP_NUM_THREADS"] == threads


@pytest.mark.parametrize(
    ("changes", "problems"),
    [
        ({"RANK": "8"}, ["RANK=5", "RANK=8"][1:]),
        ({"LOCAL_RANK": "4"}, ["LOCAL_RANK=4: must be below the number of ranks, 4"]),
        ({"WORLD_SIZE": "three"}, ["WORLD_SIZE='three': must be a whole number"]),
        ({"WORLD_SIZE": None, "LOCAL_RANK": None}, ["WORLD_SIZE=None", "LOCAL_RANK=None"]),
        ({"LOCAL_WORLD_SIZE": "9"}, ["LOCAL_WORLD_SIZE=9 is larger than WORLD_SIZE=8"]),
        ({"MOE_DIST_INIT_METHOD": None}, ["no rendezvous for the ranks"]),
        ({"MOE_DIST_ATTEMPT_ID": "../x"}, ["MOE_DIST_ATTEMPT_ID='../x'"]),
        ({"MOE_DIST_GRACE_SECONDS": "soon"}, ["MOE_DIST_GRACE_SECONDS='soon'"]),
        ({"MOE_DIST_GRACE_SECONDS": "-1"}, ["MOE_DIST_GRACE_SECONDS='-1'"]),
    ],
)
def test_problems_are_named_all_at_once(changes: dict[str, str | None], problems: list[str]) -> None:
    env = {k: v for k, v in {**FULL, **changes}.items() if v is not None}
    with pytest.raises(ConfigError) as caught:
        RankEnv.from_environment(env)
    assert [problem for problem in problems if problem not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("given", "added"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"}, {}),
        ({"PYTORCH_CUDA_ALLOC_CONF": ""}, {}),
    ],
)
def test_the_allocator_grows_its_segments_unless_the_user_chose(given: dict[str, str], added: dict[str, str]) -> None:
    variables = dict(given)
    limit_fragmentation(variables)
    assert variables == {**given, **added}

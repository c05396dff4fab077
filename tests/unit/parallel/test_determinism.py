"""Tests the environment variables that parallel.deterministic sets or refuses."""

from moe_dist.errors import ConfigError
from moe_dist.parallel.determinism import deterministic_variables
from tests.support.messages import refused


def test_missing_variables_are_set_and_valid_ones_kept() -> None:
    algorithms = "^NVLS,NVLSTree,CollNetDirect,CollNetChain"  # NVLSTree is NVLS between nodes
    assert deterministic_variables({}) == {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": algorithms}
    assert deterministic_variables({"CUBLAS_WORKSPACE_CONFIG": ":16:8", "NCCL_ALGO": "Ring"}) == {}


def test_a_nondeterministic_cublas_workspace_is_refused() -> None:
    with refused(ConfigError):
        deterministic_variables({"CUBLAS_WORKSPACE_CONFIG": ":0:0"})

"""Two drivers of one cluster on one run: real processes, joined to one Ray, one of them killed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from ray.cluster_utils import Cluster

DRIVER = """
import sys, ray
from calm_ray.cluster.run_lock import locked_in_cluster
from calm_ray.run.lock_owner import InUseError
ray.init(log_to_driver=False, logging_level="ERROR")
print("joined", flush=True)
sys.stdin.readline()
try:
    with locked_in_cluster("s3://bucket/runs/" + sys.argv[1]):
        print("held", flush=True)
        sys.stdin.readline()
except InUseError as error:
    print("refused", error, flush=True)
"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    os.environ.setdefault("RAY_AUTH_TOKEN", "a" * 64)  # else Ray leaves one in the user's home
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield cluster.address
    cluster.shutdown()


@pytest.fixture
def driver(address: str) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Starts a driver that joins the cluster and takes the lock when it is told."""
    started: list[subprocess.Popen[str]] = []

    def start(run: str) -> subprocess.Popen[str]:
        command, environment = [sys.executable, "-c", DRIVER, run], {**os.environ, "RAY_ADDRESS": address}
        process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert answer(process) == "joined\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def test_one_driver_until_it_ends_or_is_killed(driver: Callable[[str], subprocess.Popen[str]]) -> None:
    first, second, third, fourth = (driver("one") for _ in range(4))
    tell(first)
    assert answer(first) == "held\n"
    tell(second)
    refused = answer(second)
    assert refused.startswith("refused s3://bucket/runs/one: in use in this cluster by process ")
    assert f"process {first.pid} on" in refused
    first.kill()
    tell(third)
    assert answer(third) == "held\n"
    tell(third)  # it ends by itself
    tell(fourth)
    assert answer(fourth) == "held\n"
    other = driver("two")
    tell(other)
    assert answer(other) == "held\n"


def test_of_two_that_take_it_at_once_one_has_it(driver: Callable[[str], subprocess.Popen[str]]) -> None:
    both = [driver("three") for _ in range(2)]
    for process in both:
        tell(process)
    assert sorted(answer(process).split()[0] for process in both) == ["held", "refused"]

"""Several drivers of one cluster compete for a run: real processes, some of which are killed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from factories import read_line, send_line
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
    os.environ.setdefault("RAY_AUTH_TOKEN", "a" * 64)  # otherwise Ray writes a token to the user's home
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield cluster.address
    cluster.shutdown()


@pytest.fixture
def driver(address: str) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Starts a driver that joins the cluster, and acquires and releases the lock when a line is sent to it."""
    processes: list[subprocess.Popen[str]] = []

    def start(run: str) -> subprocess.Popen[str]:
        command, environment = [sys.executable, "-c", DRIVER, run], {**os.environ, "RAY_ADDRESS": address}
        process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert read_line(process) == "joined\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_run_is_locked_until_its_driver_ends_or_dies(driver: Callable[[str], subprocess.Popen[str]]) -> None:
    first, second, third, fourth = (driver("one") for _ in range(4))
    send_line(first)
    assert read_line(first) == "held\n"
    send_line(second)
    refused = read_line(second)
    assert refused.startswith("refused s3://bucket/runs/one: in use in this cluster by process ")
    assert f"process {first.pid} on" in refused
    first.kill()
    send_line(third)
    assert read_line(third) == "held\n"
    send_line(third)  # releases the lock
    send_line(fourth)
    assert read_line(fourth) == "held\n"
    other = driver("two")
    send_line(other)
    assert read_line(other) == "held\n"


def test_only_one_of_two_simultaneous_drivers_gets_the_lock(driver: Callable[[str], subprocess.Popen[str]]) -> None:
    both = [driver("three") for _ in range(2)]
    for process in both:
        send_line(process)
    assert sorted(read_line(process).split()[0] for process in both) == ["held", "refused"]

"""A worker's process: seen in one of its own, as what it asks of its machine stays for good."""

import ctypes
import json
import subprocess
import sys

import pytest

COUNT_FAULTS = """
import json, resource, sys, threading, torch
from train.process import be_worker
if sys.argv[1] == "worker":
    be_worker()
def work():
    tensors = [torch.ones(1 << 18) for _ in range(100)]  # 1 MiB each
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def look():
    work()
    before = faults()
    work()
    print(json.dumps({"faults": faults() - before, "threads": torch.get_num_threads()}))
if sys.argv[2] == "first":
    look()
else:
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
"""


def found(kind, thread="first"):
    command = [sys.executable, "-c", COUNT_FAULTS, kind, thread]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_a_worker_keeps_the_memory_that_it_frees():
    pages = 100 * (1 << 20) // 4096
    assert found("worker")["faults"] < pages / 4 < pages / 2 < found("other")["faults"]
    assert 4 * found("worker", "another")["faults"] < found("other", "another")["faults"]


def test_a_worker_has_one_thread():
    assert found("worker")["threads"] == 1

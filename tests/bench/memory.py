"""Peaks of memory, and measurements in a process of their own: what was done before then leaves no mark on them.

The peak on a CPU is the process's VmHWM, as Linux counts it: that of `getrusage` begins, in a new process, at what its
parent held.
"""

from __future__ import annotations

import ctypes
import gc
import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from tests.bench.measure import Call, synchronise

MB = 1e6
OUT_OF_MEMORY = "out of memory"


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return _status("VmRSS")


def peak() -> int:
    """Bytes of this process that have been in memory at most, since its start or `forget_peak`."""
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def forget_peak() -> None:
    """Let the peak begin at what is in memory now."""
    Path("/proc/self/clear_refs").write_text("5")


def settle() -> None:
    """Give what is free in this process back to the system, and to the GPU."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def extra(call: Call, device: torch.device) -> int:
    """Bytes that a call takes at its peak beside what is held when it begins."""
    settle()
    if device.type == "cuda":
        synchronise()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        synchronise()
        return torch.cuda.max_memory_allocated(device) - before
    before = resident()
    forget_peak()
    call()
    return peak() - before


def fresh(module: str, job: Mapping[str, object]) -> dict[str, object]:
    """What `python -m MODULE --job JSON` answers, a new process; `{"left out": ...}` where memory ran out in it."""
    command = [sys.executable, "-m", module, "--job", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == -signal.SIGKILL:
        return {"left out": OUT_OF_MEMORY}
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: ended with {done.returncode}\n{done.stderr}")
    answer: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return answer

"""What a process that trains or measures members asks of its machine."""

from __future__ import annotations

import ctypes

import torch

KEPT_MEMORY = 256 << 20  # bytes of free heap that a process holds on to: tensors of a few steps of training
LARGEST_BLOCK = 32 << 20  # bytes up to which a tensor comes from the heap; glibc takes no more than this
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # their numbers in glibc's malloc.h


def be_worker() -> None:
    """One thread for torch's operations, and freed memory kept for the next ones.

    glibc gives the top of a heap back as soon as 128 KiB of it are free (later up to 64 MiB), and a step of training
    then asks for the same pages again: up to 1,000 page faults and a fifth of the time of a member's step where packs
    are trained by the process's first thread (`python -m cluster.pack`), 240 faults by another (a trial of Ray Tune).
    Other C libraries are left as they are.
    """
    torch.set_num_threads(1)
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(TRIM_THRESHOLD, KEPT_MEMORY)
        library.mallopt(MMAP_THRESHOLD, LARGEST_BLOCK)

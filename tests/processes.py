"""Runs a function in two processes, as torch.distributed wants it."""

import time

from torch import multiprocessing


def run_two(function, args, timeout, start_method):
    """function(rank, *args) for rank 0 and 1. Raises what either raises, and neither outlives `timeout` seconds."""
    processes = multiprocessing.start_processes(function, args, nprocs=2, join=False, start_method=start_method)
    end = time.monotonic() + timeout
    try:
        while not processes.join(timeout=1):
            assert time.monotonic() < end, f"the processes have not finished after {timeout} seconds"
    finally:
        for process in processes.processes:
            process.kill()

"""What must merely work, once for all scripts: errors of the user in one line, devices, files, several processes.

This module knows nothing of features and methods.
"""
import atexit
import ctypes
import os
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line: what is wrong, and what to do."""


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def explain_input_errors(kind, error, traceback):
    """A `sys.excepthook`: an InputError ends the program with one line on stderr and exit code 2, no traceback."""
    if issubclass(kind, KeyboardInterrupt):
        sys.exit(130)
    if WORLD_SIZE > 1 and issubclass(kind, RuntimeError) and re.search("gloo|nccl|connection", str(error), re.I):
        print(f"error: process {RANK} lost another one ({first_line(error)}); --resume goes on from its checkpoint",
              file=sys.__stderr__, flush=True)
        os._exit(2)  # the others cannot be waited for
    if issubclass(kind, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
        kind, error = InputError, f"{first_line(error)}; try a smaller --batch-size, or --features-on file"
    if not issubclass(kind, InputError):
        return sys.__excepthook__(kind, error, traceback)
    print(f"error: {error}", file=sys.__stderr__)  # torch.distributed catches what a hook writes to sys.stderr
    sys.exit(2)


def require_shape(name: str, tensor, shape: tuple) -> None:
    """Raise ValueError naming the argument unless `tensor` has `shape`, in which -1 stands for any length."""
    if tensor.ndim != len(shape) or any(want not in (-1, have) for have, want in zip(tensor.shape, shape)):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")


def pick_device(name: str) -> torch.device:
    """`auto` or a torch device name -> device. Raises InputError if it does not exist here."""
    try:
        if WORLD_SIZE > 1 and name.startswith("cuda:"):
            raise InputError(f"--device {name}: of several processes each takes its own GPU; give --device cuda")
        own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        name = own if name == "cuda" or name == "auto" and torch.cuda.is_available() else name
        device = torch.device("cpu" if name == "auto" else name)
        torch.zeros(1, device=device).item()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if device.type == "cpu" and sys.platform == "linux":
            keep_freed_memory()
        return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {name}: not available here ({first_line(error)}); try --device auto")


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: every step takes the same sizes, and new pages cost a tenth of its time."""
    if hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give the top of the heap back
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX: no pages of their own for large blocks, which go when freed


def write_atomically(path: Path, save) -> None:
    """`save(temporary path)`, then rename: a program killed at any point leaves the old file or the whole new one."""
    temporary = path.with_suffix(".tmp")
    save(temporary)
    os.replace(temporary, path)


def git_commit() -> str:
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# --------------------------------------------------------------------------------------------------- several processes
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # as torchrun sets them


def init_distributed(device: torch.device) -> None:
    """Under torchrun, connect the processes. Each takes its share of every batch, clips in the order of ranks."""
    if WORLD_SIZE > 1:
        patience = timedelta(days=1)  # while the first process hashes the data or probes
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
        atexit.register(dist.destroy_process_group)


class Gather(torch.autograd.Function):
    """(n, ...) of each process -> (N, ...) of all of them. Backward: the sum of what all made of this one's part."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(WORLD_SIZE)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        return local_rows(all_reduce_sum(gradient.clone(memory_format=torch.contiguous_format)))


def all_gather(x, dim: int = 0):
    """The clips of all processes, along `dim`; with gradients. Alone, x itself."""
    return Gather.apply(x.movedim(dim, 0)).movedim(0, dim) if WORLD_SIZE > 1 else x


def all_reduce_sum(x):
    """The sum over all processes, in place."""
    if WORLD_SIZE > 1:
        dist.all_reduce(x)
    return x


def local_rows(x):
    """This process's part of something about all clips."""
    return x.chunk(WORLD_SIZE)[RANK]


def average_gradients(modules) -> None:
    """Each process's loss is the mean over its own clips; averaged, the gradients are those of the mean over all."""
    gradients = [p.grad for p in modules.parameters() if p.grad is not None] if WORLD_SIZE > 1 else []
    if gradients:
        flat = all_reduce_sum(torch.cat([g.flatten() for g in gradients])) / WORLD_SIZE
        for g, part in zip(gradients, flat.split([g.numel() for g in gradients])):
            g.copy_(part.view_as(g))


def all_gather_object(value) -> list:
    """Any object of each process, in the order of ranks."""
    values = [value] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(values, value)
    return values


def any_process_signalled(signals: list, now: bool) -> list:
    """The signals that any process got, told to all of them `now`; alone, one's own at any time."""
    return signals if WORLD_SIZE == 1 else sum(all_gather_object(list(signals)), []) if now else []

"""A tiny digits file, and two ways to run a script: as a user does, and in this process, which spares the imports.

Everything happens in temporary folders outside the repository.
"""
import io
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import h5py
import pytest
import torch

from datasets import digits

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {"uni_code": "", "micu": "--cujp-samples 2", "codaar": ""}  # and what makes a tiny run of each one quick


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> str:
    """160 / 60 / 80 digit clips."""
    path = tmp_path_factory.mktemp("features") / "small.h5"
    digits.write(str(path), sizes=(160, 60, 80))
    return str(path)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    """32 / 24 / 24 digit clips, for runs of many short steps."""
    path = tmp_path_factory.mktemp("features") / "tiny.h5"
    digits.write(str(path), sizes=(32, 24, 24))
    return str(path)


@pytest.fixture(scope="session")
def default_runs(small, tmp_path_factory) -> dict:
    """One epoch, four steps, of all modalities, for each script."""
    def run(script):
        return finished_run(script, tmp_path_factory.mktemp(script), small, ("audio", "video", "text"), "--code-dim 64")
    with ThreadPoolExecutor(2) as two_at_a_time:
        return dict(zip(SCRIPTS, two_at_a_time.map(run, SCRIPTS)))


def words(args: tuple) -> list:
    """The command line `script …`, on the CPU unless a device is named: there equal runs are equal to the bit.

    `args[0]` is a script of the root (`micu.py`) or a module below it (`official.convert`)."""
    name = args[0] if args[0].endswith(".py") else args[0].replace(".", "/") + ".py"
    takes_device = Path(name).stem in (*SCRIPTS, "comparators", "probes", "protocol", "checkpoints")
    on_cpu = takes_device and not {"--device", "--help"} & set(args)
    return [str(ROOT / name), *map(str, args[1:]), *(["--device", "cpu"] if on_cpu else [])]


def command(*args) -> tuple:
    """(argv, keyword arguments of subprocess) for `python script …` or `python -m module …` with one thread."""
    argv = words(args)
    if not args[0].endswith(".py"):
        argv[:1] = ["-m", args[0]]
    return [sys.executable, *argv], {"env": os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}}


def run_script(*args, cwd) -> subprocess.CompletedProcess:
    """`python script …` in the folder `cwd`, its streams captured."""
    argv, keywords = command(*args)
    return subprocess.run(argv, cwd=cwd, capture_output=True, text=True, timeout=300, **keywords)


def run_here(*args) -> int:
    """`python script …` in this process and the current folder; returns the exit code, lets errors come through."""
    numbers = signal.SIGINT, signal.SIGTERM
    saved = sys.argv, sys.excepthook, [signal.getsignal(number) for number in numbers]
    sys.argv = words(args)
    try:
        with torch.random.fork_rng():
            runpy.run_path(sys.argv[0], run_name="__main__")
        return 0
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv, sys.excepthook = saved[:2]
        for number, handler in zip(numbers, saved[2]):
            signal.signal(number, handler)


def captured_here(*args, cwd) -> SimpleNamespace:
    """`run_script` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd)
        code = run_here(*args)
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def finished_run(script: str, cwd, data: str, modalities: tuple, options: str, by=run_script):
    """A run in the folder `cwd`, by subprocess as a user makes it or in this process, with what it left and printed."""
    options += f" --epochs 1 --batch-size 40 --codebook-size 64 {SCRIPTS[script]}"
    done = by(f"{script}.py", "--data", data, "--modalities", *modalities, *options.split(), cwd=cwd)
    assert done.returncode == 0, done.stderr
    run = run_folder(cwd)
    return SimpleNamespace(script=script, modalities=modalities, cwd=cwd, done=done, run=run,
                           results=read_results(run), metrics=read_metrics(run))


POSIX = ("preadv", "pread", "pwrite", "pwritev", "sysconf", "fork", "register_at_fork", "getuid", "uname", "mkfifo",
         "posix_fadvise", "posix_fallocate", "sched_getaffinity", "statvfs", "chown", "killpg", "nice", "wait4")


def hide_posix(monkeypatch) -> None:
    """What only Linux and macOS have goes: modules, names of `os` and `signal`. Paths stay, for they are objects."""
    for module in ("resource", "fcntl", "pwd", "grp", "termios"):
        monkeypatch.setitem(sys.modules, module, None)
    for name in POSIX:
        monkeypatch.delattr(os, name, raising=False)
    for name in ("SIGHUP", "SIGKILL", "SIGALRM", "SIGUSR1", "SIGPIPE", "alarm", "setitimer", "pthread_sigmask"):
        monkeypatch.delattr(signal, name, raising=False)
    monkeypatch.setattr(sys, "platform", "win32")


def run_folder(cwd) -> Path:
    """The one run folder below `cwd`/runs."""
    (folder,) = Path(cwd, "runs").glob("*__*__*__*")
    return folder


def read_results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


def read_metrics(run: Path) -> list:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def edit(path, out, **changes) -> str:
    """A copy of an HDF5 file with datasets replaced (by arrays) or removed (by None); `a__b` is the dataset `a/b`."""
    shutil.copy(path, out)
    with h5py.File(out, "r+") as h5:
        for name, value in changes.items():
            name = name.replace("__", "/")
            if name in h5:
                del h5[name]
            if value is not None:
                h5[name] = value
    return str(out)

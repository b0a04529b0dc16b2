"""N processes with a share of the batch each compute what one process with the whole batch computes.

Run as a program, this file is the harness: it imports what is slow once and forks the processes that torchrun would
start, with dropout off and an Adam that does not enlarge the last bits of tiny gradients.
"""
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from conftest import ROOT, SCRIPTS, command, run_folder

SMALL = ("--batch-size 8 --codebook-size 64 --code-dim 64 --reset-after 2 --epochs 2 --log-every 1 --protocol clean "
         "--device cpu")
# an encoder output that is a codeword has a distance of rounding errors, whose root is not small: no such codewords
OWN = {"codaar": "--codebook-init uniform --reset-source paired", "uni_code": "--reset-source live",
       "micu": "--cujp-samples 2 --mask-sharing different"}


def run_jobs(jobs: list) -> None:
    """Each job {cwd, argv, processes} in freshly forked processes, one job after the other."""
    import h5py  # noqa: F401
    import torch._dynamo  # noqa: F401
    import tyro  # noqa: F401
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401
    layer = torch.nn.TransformerEncoderLayer.__init__
    torch.nn.TransformerEncoderLayer.__init__ = lambda self, *a, **k: layer(self, *a, **{**k, "dropout": 0.0})
    torch.optim.Adam.__init__ = partial_method(torch.optim.Adam.__init__, eps=1e-3)
    for job in jobs:
        runs = [str(path) for path in Path(job["cwd"]).glob("runs/*__*__*__*")]
        job["argv"] = [runs[0] if word == "the only run" else word for word in job["argv"]]
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        children = []
        for rank in range(job["processes"]):
            child = os.fork()
            if child == 0:
                for name in ("data", "probes"):  # know their rank from when they are imported
                    sys.modules.pop(name, None)
                os.chdir(job["cwd"])
                os.environ.update(RANK=str(rank), WORLD_SIZE=str(job["processes"]), LOCAL_RANK=str(rank),
                                  MASTER_ADDR="localhost", MASTER_PORT=str(port))
                sys.argv, code = job["argv"], 1
                try:
                    torch.set_num_threads(1)
                    runpy.run_path(sys.argv[0], run_name="__main__")
                    code = 0
                except SystemExit as stop:
                    code = stop.code or 0
                finally:
                    sys.stdout.flush()
                    os._exit(code)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert not any(codes), (job, codes)


def partial_method(function, **keywords):
    return lambda self, *a, **k: function(self, *a, **k, **keywords)


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory) -> dict:
    """{(script, name): (checkpoint, log)} of runs by one and by two processes, and of one resumed by two."""
    folder, jobs = tmp_path_factory.mktemp("processes"), []
    for script in SCRIPTS:
        start = [str(ROOT / f"{script}.py"), "--data", tiny, *SMALL.split(), *OWN[script].split(), "--stop-after-steps"]
        for name, processes in (("one", 1), ("two", 2), *([("resumed", 1)] if script == "micu" else [])):
            cwd = folder / script / name
            cwd.mkdir(parents=True)
            jobs.append({"cwd": str(cwd), "processes": processes, "argv": [*start, "2" if name == "resumed" else "4"]})
    jobs.append({"cwd": str(folder / "micu/resumed"), "processes": 2, "argv": [
        str(ROOT / "micu.py"), "--resume", "the only run", "--stop-after-steps", "4"]})
    told = folder / "told.py"
    told.write_text("import data\n"
                    "data.join_processes(data.pick_device('cpu'))\n"
                    "assert data.agreed([15] if data.RANK else [], True) == [15]\n"  # what one got, all know
                    "assert data.agreed([15] if data.RANK else [], False) == []\n"  # but at one step
                    "assert data.of_all(data.RANK) == [0, 1]\n")
    run_harness([*jobs, {"cwd": str(folder), "processes": 2, "argv": [str(told)]}], folder)
    found = {}
    for job in jobs[:-1]:
        run = run_folder(job["cwd"])
        log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found[run.parents[2].name, run.parents[1].name] = torch.load(run / "checkpoint.pt", weights_only=True), log
    return found


def run_harness(jobs: list, folder: Path) -> None:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run([sys.executable, __file__, str(folder / "jobs.json")], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr


def tensors(state, path=""):
    for key, value in state.items() if isinstance(state, dict) else ():
        if torch.is_tensor(value):
            yield f"{path}/{key}", value
        else:
            yield from tensors(value, f"{path}/{key}")


@pytest.mark.parametrize("script, name", [*((script, "two") for script in SCRIPTS), ("micu", "resumed")])
def test_processes_compute_what_one_computes(trained, script, name):
    (one, log), (other, other_log) = trained[script, "one"], trained[script, name]
    assert one["step"] == other["step"] == 4 and len(log) == len(other_log) == 4
    for line, other_line in zip(log, other_log):
        for tag in set(line) - {"charts/clips_per_second"}:
            assert other_line[tag] == pytest.approx(line[tag], rel=1e-5, abs=1e-5), tag
    owners = [key for key in one if key not in ("args", "seconds", "rng") and isinstance(one[key], dict)]
    assert {"modules", "optimizer"} <= set(owners)
    for owner in owners:  # weights, codebook, EMA statistics, idle counts; in the optimizers the mean gradients
        others = dict(tensors(other[owner]))
        for key, value in tensors(one[owner]):
            assert torch.allclose(others[key].double(), value.double(), rtol=1e-5, atol=1e-5), (owner, key)
            if key.endswith("exp_avg"):
                scale = value.abs().max()
                assert (others[key] - value).abs().max() <= 1e-4 * scale + 1e-9, (owner, key)


def test_torchrun_and_a_process_that_dies(tiny, tmp_path):
    argv, keywords = command("micu.py", "--data", tiny, *SMALL.split(), "--epochs", 500, "--cujp-samples", 2)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    with subprocess.Popen([*launch, *argv[1:]], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          **keywords) as process:
        try:
            while not list(tmp_path.glob("runs/*/checkpoint.pt")):
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.1)
            ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
            os.kill(int(ranks[1]), signal.SIGKILL)
            start = time.monotonic()
            _, error = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode != 0 and time.monotonic() - start < 60
    assert "error: process 0 lost another one" in error


def test_a_batch_that_does_not_divide(tiny, tmp_path):
    argv, keywords = command("micu.py", "--data", tiny, "--batch-size", 9)
    keywords["env"] |= {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    source = "import data, torch; data.Batches(data.Features([{!r}]), ['audio'], 'train', 9, 'cpu', 0)".format(tiny)
    done = subprocess.run([argv[0], "-c", source], cwd=ROOT, capture_output=True, text=True, **keywords)
    assert "--batch-size 9 does not divide among 2 processes" in done.stderr


if __name__ == "__main__":
    run_jobs(json.loads(Path(sys.argv[1]).read_text()))

"""What was paid for is never lost: full disks, kill -9 at any moment, moved folders, pictures that fail.

Run as a program, this file is the harness of the kills: it imports what is slow once and forks a run for each.
"""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import pytest
import torch

import probes
import run
from conftest import ROOT, command, read_metrics, read_results, run_folder, run_here
from run import InputError
from test_run import differences, here, interrupted, script, short_probes, stopped, training_state  # noqa: F401

SHORT = "--epochs 2 --batch-size 16 --codebook-size 16 --code-dim 16 --cujp-samples 1 --modalities audio text".split()
SHORT += "--eval-every 1 --log-every 1 --reset-after 2".split()  # four steps of the tiny file, probed twice


def assert_whole(folder: Path, results) -> None:
    """The run ended as the one whose (training state, metrics) these are, and left nothing half done."""
    assert differences(training_state(folder), results[0]) == [] and read_results(folder)["metrics"] == results[1]
    probed = [line["step"] for line in read_metrics(folder) if "eval/codebook/agreement" in line]
    assert probed == [2, 4] and not list(folder.glob("*.tmp"))


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """(training state, metrics) of a run that nothing disturbed"""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("whole"))
        patch.setattr(probes, "EPOCHS", 1)
        run_here("micu.py", "--data", tiny, *SHORT)
        folder = run_folder(Path.cwd())
        return training_state(folder), read_results(folder)["metrics"]


# ----------------------------------------------------------------------------------------------------------- full disks
class Disk:
    """Stands for `open` in run.py: what is written to the file number `full` that is opened for writing, half of it
    arrives, then there is no space left."""

    def __init__(self, full: int):
        self.full, self.opened = full, 0

    def __call__(self, path, mode="r", *args):
        stream = open(path, mode, *args)
        if mode != "r":
            self.opened += 1
            if self.opened == self.full:
                write = stream.write

                def half(content):
                    write(content[:len(content) // 2])
                    raise OSError(28, "No space left on device", str(path))
                return Halved(stream, half)
        return stream


class Halved:
    def __init__(self, stream, write):
        self.stream, self.write = stream, write

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stream.close()


WRITES = 2 + 4 + 2 + 2 + 1  # args.json, the log as it was; lines of losses, of probes; checkpoints; results.json


@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, WRITES + 2))
def test_a_disk_that_is_full_at_any_write(whole, here, tiny, number, monkeypatch):  # noqa: F811
    """What is there stays good, and a resumed run ends as if nothing had been."""
    disk = Disk(number)
    with monkeypatch.context() as patch:
        patch.setattr(run, "open", disk, raising=False)
        if number > WRITES:  # so many there are
            assert run_here("micu.py", "--data", tiny, *SHORT) == 0 and disk.opened == WRITES
            return
        with pytest.raises((OSError, RuntimeError)) as caught:
            run_here("micu.py", "--data", tiny, *SHORT)
    folder = run_folder(here.cwd)
    assert "No space left" in str(caught.value) and not list(folder.glob("*.tmp"))
    assert not (folder / "results.json").exists()
    if (folder / "checkpoint.pt").exists():
        here("--resume", str(folder))
        assert_whole(folder, whole)
    else:
        assert number < 2 + 2 + 2


def test_a_full_disk_is_told_in_one_line(capfd, monkeypatch):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    error = OSError(28, "No space left on device", "runs/a/checkpoint.pt.tmp")
    run.explain_input_errors(OSError, error, None, go_on=lambda: "; continue with: this")
    assert codes == [2] and capfd.readouterr().err == (
        "error: a file cannot be written ([Errno 28] No space left on device: 'runs/a/checkpoint.pt.tmp'); "
        "continue with: this\n")


@pytest.mark.parametrize("recorded", [False, True])
def test_memory_that_is_full_is_told_in_one_line(capfd, monkeypatch, recorded):
    """In a step that is being recorded the error comes out as one of CUDA's, about the recording."""
    codes, error = [], torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
    monkeypatch.setattr(os, "_exit", codes.append)
    if recorded:
        full, error = error, RuntimeError("capturing stream has unjoined work")
        error.__context__ = full
    run.explain_input_errors(type(error), error, None, save_memory=run.SAVE_MEMORY)
    assert codes == [2] and capfd.readouterr().err == (
        f"error: CUDA out of memory. Tried to allocate 2 GiB.{run.SAVE_MEMORY}\n")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no limits of this kind")
def test_files_may_not_grow(tiny, tmp_path):
    """The system's own refusal, which anybody can ask for."""
    import resource

    def limited(*args, kib):
        argv, keywords = command("micu.py", *args)
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (kib << 10, kib << 10))  # noqa: E731
        return subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, preexec_fn=limit, **keywords)
    done = limited("--data", tiny, *SHORT, kib=64)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "File too large" in done.stderr and "there is no checkpoint yet" in done.stderr
    folder = run_folder(tmp_path)
    assert {path.name.split(".")[0] for path in folder.iterdir()} == {"args", "metrics", "events"}


# ------------------------------------------------------------------------------------------------------------- kill -9
class Killer:
    """Ends the process at a call of a Python function; without a number it notes which calls are inside which parts."""

    def __init__(self, at: int = -1):
        self.at, self.calls, self.inside, self.parts = at, 0, [], {"checkpoint": [], "probe": [], "finish": []}

    def __call__(self, frame, event, arg):
        if event != "call":
            return
        self.calls += 1
        if self.calls == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, part: str, function):
        def timed(*args, **keywords):
            start = self.calls
            try:
                return function(*args, **keywords)
            finally:
                self.parts[part].append((start, self.calls))
        return timed


def forked(killer, folder: Path, *args) -> bool:
    """A run in a process of its own, in `folder` -> did it end by itself?"""
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        with open("said.txt", "w") as said:
            os.dup2(said.fileno(), 1)
        code = 1
        try:
            if killer:
                probes.Plan.evaluate = killer.around("probe", probes.Plan.evaluate)
                run.write_atomically = killer.around("checkpoint", run.write_atomically)
                run.Run.finish = killer.around("finish", run.Run.finish)
                sys.setprofile(killer)
            code = run_here("micu.py", *args)
            sys.setprofile(None)
            if killer:
                Path("parts.json").write_text(json.dumps(killer.parts | {"all": [(0, killer.calls)]}))
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def kill_and_resume(data: str, folder: Path, moments: int) -> None:
    """Half of the moments inside checkpoints, probes and the last steps, the others anywhere; some runs are killed
    again while they resume. Prints how many could be resumed, how many had no checkpoint yet, and of each part."""
    draw, counts = random.Random(0), {"resumed": 0, "no checkpoint": 0}
    os.chdir(folder)
    torch.set_num_threads(1)
    probes.EPOCHS = 1
    probes.show = lambda *args: None  # pictures come after everything that could be lost, and take longest
    run_here("micu.py", "--data", data, *SHORT)  # here, so that all that comes after has imported what it needs
    straight = training_state(run_folder(folder)), read_results(run_folder(folder))["metrics"]
    assert forked(Killer(), folder / "runs", "--data", data, *SHORT)
    parts = json.loads((folder / "runs" / "parts.json").read_text())
    parts["all"][0][0] = parts["checkpoint"][0][0]  # from the first file on
    for moment in range(moments):
        part = ("checkpoint", "probe", "finish", "all", "all", "all")[moment % 6]
        at = draw.randint(*draw.choice(parts[part])) + 1
        cwd = folder / f"{moment}"
        cwd.mkdir()
        died = not forked(Killer(at), cwd, "--data", data, *SHORT)
        (run_at,) = (cwd / "runs").glob("*__*__*__*") if (cwd / "runs").exists() else (None,)
        if died and (run_at is None or not (run_at / "checkpoint.pt").exists()):
            counts["no checkpoint"] += 1
            continue
        if died and moment % 4 == 0 and not (run_at / "results.json").exists():
            forked(Killer(draw.randint(*parts["all"][0])), cwd, "--resume", str(run_at))
        if not (run_at / "results.json").exists():
            assert forked(None, cwd, "--resume", str(run_at)), (moment, at)
        assert_whole(run_at, straight)
        counts["resumed"] += 1
        shutil.rmtree(cwd)
    print(json.dumps(counts))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_thirty_kills_at_any_moment_resume_to_the_same_bits(tiny, tmp_path):
    done = subprocess.run([sys.executable, __file__, tiny, str(tmp_path), "30"], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert sum(counts.values()) == 30 and counts["resumed"] >= 18


# ------------------------------------------------------------------------------------------------------ the last steps
def test_without_pictures_there_are_still_results_and_a_table(here, tiny, monkeypatch, capsys):  # noqa: F811
    """As where a package is missing that draws them."""
    def missing(*args):
        assert read_results(run_folder(here.cwd))["metrics"] and "run folder: " in capsys.readouterr().out
        raise ModuleNotFoundError("No module named 'PIL'")
    monkeypatch.setattr(probes, "show", missing)
    assert run_here("micu.py", "--data", tiny, *SHORT, "--epochs", 1) == 0
    folder = run_folder(here.cwd).relative_to(here.cwd)
    assert capsys.readouterr().err == f"note: {folder}: pictures are missing (No module named 'PIL')\n"


def test_json_has_no_word_for_nan(tmp_path):
    run.write_json(tmp_path / "a.json", {"a": float("nan"), "b": {"c": float("-inf"), "d": 1.5, "e": [1], "f": "nan"}})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"a": None, "b": {"c": None, "d": 1.5, "e": [1], "f": "nan"}}


# ----------------------------------------------------------------------------------------------------------- going on
def test_a_run_and_its_data_may_move(here, interrupted):  # noqa: F811
    """The hash decides whether it is the same data."""
    (here.cwd / "else").mkdir()
    moved = shutil.move(interrupted, here.cwd / "else" / "run")
    with h5py.File("data.h5") as h5:
        assert h5.attrs["name"] == "digits"
    os.rename("data.h5", "else/named.h5")
    here("--resume", str(moved), "--data", "else/named.h5")
    assert read_results(Path(moved))["steps"] == 8
    assert "else/named.h5" in json.loads((Path(moved) / "args.json").read_text())["data"]


@pytest.mark.parametrize("rest", [
    b"\0\0}\n", pytest.param(b'{"step": 1, "losses/total": 0.5, "los', marks=pytest.mark.slow),
    b"\xff\xfe{}\n[]\nnull\n" + b"[" * 9999 + b'\n{"step": "x", "a": 1}\n',
    pytest.param(b'{"step": 1' + b"0" * 9999 + b', "a": 1}\n', marks=pytest.mark.slow)], ids=["zeros", "half a line", "nonsense", "a huge number"])
def test_a_log_that_a_kill_left_half_written(here, interrupted, rest):  # noqa: F811
    log, before = interrupted / "metrics.jsonl", b'{"step": 2, "losses/total": 0.5}\n'
    log.write_bytes(before + rest)
    (interrupted / "checkpoint.pt.tmp").write_bytes(b"half")
    here("--resume", str(interrupted), "--max-steps", 4)
    lines = read_metrics(interrupted)
    assert lines[0] == json.loads(before) and [line["step"] for line in lines] == [2, 4]
    assert not list(interrupted.glob("*.tmp"))


def test_what_torch_says_about_unsafe_files_is_not_passed_on(here, interrupted):  # noqa: F811
    torch.save(Path, interrupted / "checkpoint.pt")
    lines = [here.error("--resume", str(interrupted))]
    with pytest.raises(InputError) as caught:
        run_here("probes.py", interrupted)
    for line in (*lines, str(caught.value)):
        assert "weights_only" not in line and "trust" not in line and line.isprintable()
        assert line.endswith("(damaged, or it holds more than numbers and text)")


@pytest.mark.parametrize("out", [".", "absent/a.json"])
def test_figures_that_cannot_be_written_are_told_before_probing(here, interrupted, out, monkeypatch):  # noqa: F811
    monkeypatch.setattr(probes, "load", pytest.fail)
    with pytest.raises(InputError, match=f"^{out}: "):
        run_here("probes.py", interrupted, "--out", out)


# --------------------------------------------------------------------------------------------------------- surroundings
def test_a_scheduler_that_numbers_processes_without_a_place_to_meet(here, tiny, monkeypatch):  # noqa: F811
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "WORLD_SIZE is 2, but there is no MASTER_ADDR" in here.error(*SHORT)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert run_here("micu.py", "--data", tiny, *SHORT, "--max-steps", 1) == 0


def test_a_device_without_float64_is_refused(monkeypatch):
    """As Apple's MPS: probes would fail after all training."""
    def zeros(*shape, dtype=None, **keywords):
        if dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support it")
        return torch.ones(())
    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(InputError, match="^--device mps: not available here .*float64.*; try --device auto$"):
        run.pick_device("mps")


@pytest.mark.slow
def test_nobody_reads_what_is_printed(tiny, tmp_path):
    """`| head`, and a closed stdout."""
    argv, keywords = command("micu.py", "--data", tiny, *SHORT, "--epochs", 1)
    with subprocess.Popen(argv, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **keywords) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 0
    assert read_results(run_folder(tmp_path))["steps"] == 2
    closed = subprocess.run(["sh", "-c", '"$@" >&-', "sh", sys.executable, ROOT / "data.py", "check", tiny],
                            stderr=subprocess.PIPE)
    assert closed.stderr == b"" and closed.returncode == 0


if __name__ == "__main__":
    kill_and_resume(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))

"""The scripts as a whole: what runs leave, resume to the bit, bad input, probes that touch nothing, flags that act.

Runs in this process where the process itself is not the point: a run of a few steps then takes half a second.
"""
import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import codaar
import micu
import probes
import run
import uni_code
from conftest import (ROOT, SCRIPTS, captured_here, command, edit, finished_run, hide_posix, read_metrics, read_results,
                      run_folder, run_here, run_script)
from data import Batches
from run import InputError

TINY = "--epochs 2 --batch-size 8 --codebook-size 64 --code-dim 64".split()
AUDIO_TEXT = [*TINY, "--modalities", "audio", "text"]  # 8 steps of the tiny file, as below
LONG = [*TINY, "--modalities", "audio", "video", "--reset-after", "2"]
EVERY_SCRIPT = pytest.mark.parametrize("script", SCRIPTS, indirect=True)
MODULES = {"micu": micu, "uni_code": uni_code, "codaar": codaar}
STATE = {"micu": {"networks", "optimizer"}, "uni_code": {"networks", "optimizer", "club", "club_optimizer"},
         "codaar": {"networks", "optimizer"},
         "benchmarks.comparators": {"networks", "optimizer", "club", "club_optimizer"}}
LOSSES = {"micu": ("fcmi_fine", "fcmi_coarse", "cujp"), "uni_code": ("cpc", "cmcm", "club"), "codaar": ("cpc", "dqa")}
WEIGHTS = {"micu": {"cujp": 2}, "uni_code": {"club": 0.01}, "codaar": {}}
CODEBOOK = {"micu": "codebook", "uni_code": "codebook", "codaar": "codebooks"}
PICTURES = {"training", "codes", "codebook", "confusion", *(f"open_set_5_{score}" for score in probes.SCORES)}
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def load(run: Path) -> dict:
    return torch.load(run / "checkpoint.pt", weights_only=True)


def differences(left, right, path="") -> list:
    """Places where two nested structures of dicts, lists, tensors and numbers are not exactly equal."""
    if isinstance(left, dict) and isinstance(right, dict) and left.keys() == right.keys():
        return [place for key in left for place in differences(left[key], right[key], f"{path}/{key}")]
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)) and len(left) == len(right):
        return [place for i, pair in enumerate(zip(left, right)) for place in differences(*pair, f"{path}/{i}")]
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return [] if left.dtype == right.dtype and torch.equal(left, right) else [path]
    return [] if type(left) is type(right) and left == right else [path]


def training_state(run: Path) -> dict:
    """All that decides how a run goes on, and its losses so far."""
    state = load(run)
    timing = ("charts/clips_per_second",)
    lines = [{tag: value for tag, value in line.items() if tag not in timing} for line in read_metrics(run)]
    return {key: state[key] for key in (*STATE[state["method"]], "rng", "step", "shape")} | {
        "losses": [line for line in lines if "losses/total" in line]}


class Here:
    """Runs of a script in this process: `here(*args)` -> run folder, with the last exit code and output."""

    def __init__(self, script, cwd, data, capture):
        self.script, self.cwd, self.data, self.capture, self.code, self.out = script, cwd, data, capture, None, ""
        self.draws = False  # pictures, which take longer than these runs

    def __call__(self, *args, data=None) -> Path:
        before = set(self.cwd.glob("runs/*__*"))
        self.capture.readouterr()
        source = () if "--resume" in args else ("--data", data or self.data, *SCRIPTS.get(self.script, "").split())
        with pytest.MonkeyPatch.context() as patch:
            if not self.draws:
                patch.setattr(probes, "show", lambda *args: None)
            self.code = run_here(f"{self.script}.py", *source, *args)
        self.out = self.capture.readouterr().out
        resumed = [Path(folder) for option, folder in zip(args, args[1:]) if option == "--resume"]
        (run,) = resumed or set(self.cwd.glob("runs/*__*")) - before
        return self.cwd / run

    def error(self, *args, **keywords) -> str:
        """The one line of the InputError that ends the run; no result is left behind by it."""
        results = set(self.cwd.glob("runs/*/results.json"))
        with pytest.raises(InputError) as caught:
            self(*args, **keywords)
        assert "\n" not in str(caught.value)
        assert set(self.cwd.glob("runs/*/results.json")) == results
        return str(caught.value)


@pytest.fixture(scope="module", autouse=True)
def short_probes():
    """One epoch of the clean probes in this process: most of these tests are not about what they find."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probes, "EPOCHS", 1)
        yield


@pytest.fixture(scope="module")
def script(request) -> str:
    """The script under test: micu where nothing else is said, for most of the program is one text in all of them."""
    return getattr(request, "param", "micu")


def once_a_script(make):
    """A fixture (script, tiny, tmp_path_factory) whose value is made once for each script: pytest makes a parametrized
    fixture of the module anew for every set of parameters."""
    made = {}

    @functools.wraps(make)
    def fixture(script, tiny, tmp_path_factory):
        if script not in made:
            made[script] = make(script, tiny, tmp_path_factory)
        return made[script]
    return pytest.fixture(fixture)


@pytest.fixture
def here(script, tmp_path, monkeypatch, tiny, capsys) -> Here:
    monkeypatch.chdir(tmp_path)
    return Here(script, tmp_path, tiny, capsys)


# --------------------------------------------------------------------------------------------------------------- smoke

QUICK = ("micu audio video text", "micu audio text", "uni_code audio video text", "codaar audio video text")
COMBINATIONS = [("micu", "audio video text"), ("micu", "audio video"), ("micu", "audio text"),
                ("uni_code", "audio video text"), ("uni_code", "audio video"), ("uni_code", "audio text"),
                ("uni_code", "video text"),
                ("codaar", "audio video text"), ("codaar", "audio video"), ("codaar", "audio text"),
                ("codaar", "video text")]


def combination(case):
    """Two modalities of uni_code and codaar are for those who wait."""
    return pytest.param(case, id=": ".join(case), marks=[pytest.mark.slow] if " ".join(case) not in QUICK else [])


@pytest.fixture(scope="session", params=map(combination, COMBINATIONS))
def smoke(request, small, tmp_path_factory, default_runs):
    """Finished runs, one per script and set of modalities; those of all three are by subprocess."""
    script, modalities = request.param[0], tuple(request.param[1].split())
    if len(modalities) == 3:
        return default_runs[script]
    options = "--log-every 1" if "video" in modalities else "--code-dim 64"
    return finished_run(script, tmp_path_factory.mktemp("smoke"), small, modalities, options, by=captured_here)


def expected_tags(modalities) -> set:
    """The `eval/` tags of a default run on the digits set."""
    tags = {f"codebook/{name}_{m}" for name in ("used", "perplexity") for m in modalities}
    tags |= {"codebook/agreement", "codebook/agreement_chance"}
    tags |= {f"codebook/{name}_{i + 1}" for name in ("shared", "weighted") for i in range(len(modalities))}
    for way in (f"{a[0]}2{b[0]}" for a in modalities for b in modalities if a != b):
        tags |= {f"classification/{way}/{name}" for name in ("acc", "acc_same", "macro_recall")}
        tags |= {f"open_set_5/{way}/{name}" for name in (
            "os_star", "unk", "hos", "hos_source", "os_star_class_mean", "auroc", "hos_oracle", "acc_known",
            *(f"{metric}_{score}" for metric in ("hos", "hos_source", "auroc") for score in probes.SCORES))}
    return {f"eval/{tag}" for tag in tags}


def test_results(smoke, small):
    results = smoke.results
    assert set(results) == {"method", "data", "data_sha256", "seed", "args", "torch", "device", "git", "resumed_at",
                            "seconds", "steps", "peak_memory_mb", "warnings", "metrics"}
    assert (results["method"], results["data"], results["seed"], results["steps"]) == (smoke.script, "digits", 1, 4)
    assert set(results["seconds"]) == {"data", "train", "probe"} and all(v > 0 for v in results["seconds"].values())
    assert results["torch"] == torch.__version__ and 50 < results["peak_memory_mb"] < 4000
    assert results["data_sha256"] == hashlib.sha256(Path(small).read_bytes()).hexdigest() and results["git"]
    metrics = results["metrics"]
    assert set(metrics) == expected_tags(smoke.modalities)
    for tag, value in metrics.items():
        counts = tag.startswith(("eval/codebook/used_", "eval/codebook/perplexity_"))
        assert 0 <= value <= (80 if counts else 1), tag  # a NaN fails, too


def test_settings_are_resolved_and_recorded(smoke):
    args = json.loads((smoke.run / "args.json").read_text())
    assert args == smoke.results["args"] == json.loads(json.dumps(load(smoke.run)["args"]))
    assert set(args) == set(MODULES[smoke.script].Args.__dataclass_fields__)
    unresolved = {name for name, value in args.items() if value is None}
    assert unresolved == {"resume", "max_steps"} and args["reset_after"] > 0


def test_log_and_tensorboard(smoke):
    lines = smoke.metrics
    steps = [line["step"] for line in lines]
    assert steps == sorted(steps) and steps[-1] == 4
    training = {f"losses/{name}" for name in ("recon", "commitment", *LOSSES[smoke.script], "total")}
    training |= {f"codebook/{name}_{m}" for name in ("used", "perplexity") for m in smoke.modalities}
    training |= {"codebook/agreement", "codebook/resets", "charts/grad_norm", "charts/epoch", "charts/clips_per_second"}
    weights = WEIGHTS[smoke.script]
    for line in lines[:-1]:
        assert set(line) == training | {"step"} and np.isfinite(list(line.values())).all()
        losses = {tag[7:]: value for tag, value in line.items() if tag.startswith("losses/")}
        assert losses.pop("total") == pytest.approx(sum(weights.get(n, 1) * v for n, v in losses.items()), rel=1e-5)
    assert {tag: value for tag, value in lines[-1].items() if tag != "step"} == smoke.results["metrics"]

    board = EventAccumulator(str(smoke.run))
    board.Reload()
    assert set(board.Tags()["scalars"]) == training | set(lines[-1]) - {"step"}
    for line in lines:
        for tag in set(line) - {"step"}:
            (event,) = [event for event in board.Scalars(tag) if event.step == line["step"]]
            assert event.value == pytest.approx(line[tag], rel=1e-6)
    assert set(board.Tags()["images"]) == {f"run/{name}" for name in PICTURES}
    assert board.Images("run/codes")[0].width == 1600

    projector = (smoke.run / "projector_config.pbtxt").read_text()
    assert "tensors.tsv" in projector and "metadata.tsv" in projector
    (vectors,), (labels,) = (list(smoke.run.rglob(name)) for name in ("tensors.tsv", "metadata.tsv"))
    shown = np.loadtxt(vectors, delimiter="\t")
    codebook = load(smoke.run)["networks"][f"model.quantizer.{CODEBOOK[smoke.script]}"]
    codebook = torch.cat(list(codebook), 1) if smoke.script == "codaar" else codebook  # an index is a row of all
    assert np.allclose(shown, codebook, atol=1e-5)
    labels = labels.read_text().splitlines()
    parts = {part for label in labels for part in label.split("+")}
    assert len(labels) == 64 and parts <= {"unused", *smoke.modalities} and len(parts) > 1
    metrics = smoke.results["metrics"]
    shared = [sum(label.count("+") == i and label != "unused" for label in labels)
              for i in range(len(smoke.modalities))]
    for i, count in enumerate(shared):  # the labels and the figures speak of the same counts
        assert metrics[f"eval/codebook/shared_{i + 1}"] == pytest.approx(count / sum(shared))


def test_run_folder(smoke):
    names = {path.name for path in smoke.run.iterdir() if path.is_file() and not path.name.startswith("events.out")}
    assert names == {"args.json", "metrics.jsonl", "checkpoint.pt", "results.json", "projector_config.pbtxt",
                     *(f"{name}.png" for name in PICTURES)}
    assert smoke.run.name.startswith(f"{smoke.script}__digits__1__")
    state = load(smoke.run)
    assert set(state) == {"method", "args", "shape", "step", "epoch", "rng", "rng_of_others", "seconds", "git",
                          "resumed_at", "data_sha256"} | STATE[smoke.script]
    assert state["resumed_at"] == []
    assert (state["method"], state["step"], state["epoch"]) == (smoke.script, 4, 1)
    assert list(state["shape"]) == list(smoke.modalities)


def test_the_puzzles_are_in_the_checkpoint(default_runs):
    permutations = load(default_runs["micu"].run)["networks"]["jigsaw.permutations"]
    assert permutations.shape == (256, 8) and len(permutations.unique(dim=0)) == 256


@pytest.mark.parametrize("options, permutations, width", [
    ("--cujp-splits 4", (24, 4), 64), ("--jigsaw mmjp --cujp-splits 1", (6, 3), 3 * 64),
    ("--jigsaw mmjp --cujp-splits 8", (256, 24), 3 * 64)])
def test_puzzles_use_all_permutations_that_exist_up_to_256(here, options, permutations, width):
    networks = load(here(*TINY, *options.split(), "--max-steps", 1))["networks"]
    assert networks["jigsaw.permutations"].shape == permutations
    assert len(networks["jigsaw.permutations"].unique(dim=0)) == permutations[0]
    assert networks["jigsaw.hidden.weight"].shape == (512, width)


def rows(text: str) -> dict:
    """The printed table -> {(task, row): {metric: text}}"""
    found, task, names = {}, "", []
    for line in text.splitlines():
        words = line.split()
        if line.startswith("  "):
            found[task, words[0]] = dict(zip(names, words[1:], strict=True))
        elif words:
            task, names = words[0], words[1:]
    return found


def test_printed_table(smoke):
    out, err = smoke.done.stdout, smoke.done.stderr
    assert "it/s" not in err and "%|" not in err and "\r" not in out + err  # no progress bar
    table, where = out.rstrip().rsplit("\n", 1)
    assert where == f"run folder: {smoke.run.relative_to(smoke.cwd)}"
    table, metrics = rows(table), smoke.results["metrics"]
    shown = {tag: value for tag, value in metrics.items() if not tag.endswith(probes.SCORES)}
    assert sum(cell != "-" for row in table.values() for cell in row.values()) == len(shown)
    for tag, value in shown.items():
        _, task, *way, name = tag.split("/")
        cell = table[(task, *way)][name] if way else table[task, name]["value"]
        plain = name.startswith(("used", "perplexity")) or name in ("queries", "database")
        assert cell == (f"{value:.0f}" if plain else f"{100 * value:.1f}"), tag


@pytest.mark.slow
@pytest.mark.parametrize("script", ["micu", "codaar"])  # codes of one codebook; rows of several
def test_probes_print_the_same_table_again(default_runs, script):
    default_run = default_runs[script]
    again = run_script("probes.py", default_run.run, "--out", "again.json", cwd=default_run.cwd)
    assert again.returncode == 0, again.stderr
    assert rows(again.stdout) == rows(default_run.done.stdout.rstrip().rsplit("\n", 1)[0])
    assert json.loads((default_run.cwd / "again.json").read_text()) == default_run.results["metrics"]


def test_a_folder_for_the_figures_that_does_not_exist_is_told_before_probing(interrupted):
    with pytest.raises(InputError, match="^absent/again.json: the folder does not exist$"):
        run_here("probes.py", interrupted, "--out", "absent/again.json")


def test_progress_bar_in_a_terminal(here, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    run_here("micu.py", "--data", here.data, *AUDIO_TEXT, "--max-steps", 4, "--log-every", 1)
    shown = capsys.readouterr().err
    assert "4/8" in shown and all(word in shown for word in ("loss", "agree"))


@pytest.mark.slow
@EVERY_SCRIPT
def test_training_teaches_what_no_modality_shows_alone(here, small, monkeypatch):
    monkeypatch.setattr(probes, "EPOCHS", 5)
    options = {"micu": "--epochs 8", "uni_code": "--epochs 12", "codaar": "--epochs 8"}
    options = options[here.script]  # epochs of five steps
    run = here(*AUDIO_TEXT, *options.split(), "--batch-size", 32, "--code-dim", 256, data=small)
    metrics = read_results(run)["metrics"]
    ways = [metrics[f"eval/classification/{way}/acc"] for way in ("a2t", "t2a")]
    assert min(ways) > 0.4 and sum(ways) > 1, ways  # ten classes


# -------------------------------------------------------------------------------------------------- resume, determinism

@once_a_script
def straight(script, tiny, tmp_path_factory):
    """An uninterrupted run, probed at its end only: (training state, metrics)."""
    cwd = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        assert run_here(f"{script}.py", "--data", tiny, *SCRIPTS[script].split(), *LONG) == 0
    return training_state(run_folder(cwd)), read_results(run_folder(cwd))["metrics"]


def go_on(folder, script="micu") -> str:
    """The command that goes on with a run, from the folder in which it was started"""
    return f"continue with: python {ROOT / script}.py --resume {folder}"


def assert_same_run(run, straight):
    state, metrics = straight
    assert differences(training_state(run), state) == []
    assert read_results(run)["metrics"] == metrics


@EVERY_SCRIPT
def test_two_runs_of_one_seed_are_equal(here, straight):
    assert_same_run(here(*LONG), straight)


@EVERY_SCRIPT
def test_dropout_is_on_while_training(straight):
    untouched = torch.Generator().manual_seed(1).get_state()
    assert not torch.equal(straight[0]["rng"]["cpu"], untouched)


@pytest.mark.slow
@EVERY_SCRIPT
def test_another_seed_is_another_run(here, straight):
    run = here(*LONG, "--seed", 2, "--max-steps", 8)
    assert run.name.startswith(f"{here.script}__digits__2__")
    differ = differences(training_state(run), straight[0])
    weights = {f"/networks/{name}" for name, value in straight[0]["networks"].items() if name.endswith("weight")
               and "norm" not in name}
    weights |= {"/networks/jigsaw.permutations"} if here.script == "micu" else set()
    assert weights | {f"/networks/model.quantizer.{CODEBOOK[here.script]}"} <= set(differ)
    assert {f"/rng/{name}" for name in straight[0]["rng"]} <= set(differ)


@EVERY_SCRIPT
def test_interrupted_three_times_and_resumed(here, straight):
    """In the middle of an epoch, at its end, and in the middle of the next one."""
    run = here(*LONG, "--max-steps", 3)
    for stop in (4, 6, None):
        assert here.code == 0 and "checkpoint saved" in here.out
        assert go_on(run.relative_to(here.cwd), here.script) in here.out
        assert not (run / "results.json").exists()
        stop_after = ["--max-steps", stop] if stop else []
        assert here("--resume", str(run.relative_to(here.cwd)), *stop_after) == run
    assert_same_run(run, straight)
    steps = [line["step"] for line in read_metrics(run)]
    assert steps == [4, 8, 8]
    shown = []
    for file in run.glob("events.out.tfevents.*"):  # one a start; TensorBoard orders them by the second in their names
        board = EventAccumulator(str(file))
        board.Reload()
        if "losses/total" in board.Tags()["scalars"]:
            shown += [event.step for event in board.Scalars("losses/total")]
    assert sorted(shown) == [4, 8]


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_leave_a_checkpoint_that_resumes_to_the_same_bits(here, straight, monkeypatch, number, code):
    original = Batches.epoch

    def interrupted(self, epoch, start=0, stop=None):
        for i, batch in enumerate(original(self, epoch, start, stop), start):
            if (epoch, i) == (1, 1):  # before the sixth of eight steps
                signal.raise_signal(number)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(Batches, "epoch", interrupted)
        run = here(*LONG)
    assert here.code == code and load(run)["step"] == 6 and not (run / "results.json").exists()
    assert "stopped after step 6 of 8" in here.out
    assert go_on(run.relative_to(here.cwd)) in here.out
    assert_same_run(here("--resume", str(run.relative_to(here.cwd))), straight)


def test_a_signal_while_probing_loses_nothing(here, straight, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(probes.Plan, "evaluate", lambda *args: signal.raise_signal(signal.SIGTERM))
        run = here(*LONG)
    assert here.code and load(run)["step"] == 8 and not (run / "results.json").exists()
    assert go_on(run.relative_to(here.cwd)) in here.out
    assert_same_run(here("--resume", str(run.relative_to(here.cwd))), straight)


@pytest.mark.parametrize("after", ["log", "checkpoint"])
def test_a_signal_in_the_last_step_lets_it_be_saved(here, straight, monkeypatch, after):
    original = getattr(run.Run, after)

    def interrupted(self, step, *rest):
        found = original(self, step, *rest)
        if step == 8:
            signal.raise_signal(signal.SIGTERM)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(run.Run, after, interrupted)
        folder = here(*LONG)
    assert here.code == 143 and "stopped after step 8 of 8" in here.out and load(folder)["step"] == 8
    assert_same_run(here("--resume", str(folder.relative_to(here.cwd))), straight)


@pytest.mark.slow
def test_ctrl_c_and_the_command_it_prints(tiny, tmp_path):
    """In a process of its own: the message, the exit code, and the printed command work."""
    argv, keywords = command("micu.py", "--data", tiny, *AUDIO_TEXT, *"--epochs 500 --log-every 1".split())
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(argv, cwd=tmp_path, **pipes, **keywords)
    try:
        deadline = time.monotonic() + 120
        while not any(path.stat().st_size for path in tmp_path.glob("runs/*/metrics.jsonl")):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and err == ""
    again = shlex.split(out.split("continue with: ")[1])
    assert again[:2] == ["python", str(ROOT / "micu.py")]
    step = load(run_folder(tmp_path))["step"]
    resumed = run_script(*again[1:], "--max-steps", step + 1, cwd=tmp_path)
    assert resumed.returncode == 0 and f"stopped after step {step + 1} of 2000" in resumed.stdout, resumed.stderr
    assert load(run_folder(tmp_path))["step"] == step + 1


@pytest.mark.slow
@EVERY_SCRIPT
def test_probing_along_the_way_changes_nothing(here, straight):
    run = here(*LONG, "--eval-every", 1)
    assert_same_run(run, straight)
    probed = [line["step"] for line in read_metrics(run) if "eval/codebook/agreement" in line]
    assert probed == [4, 8]


def test_a_kill_while_probing_along_the_way_skips_no_probe(here, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*args):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(probes.Plan, "evaluate", killed)
        here(*LONG, "--eval-every", 1)
    run = run_folder(here.cwd).relative_to(here.cwd)
    here("--resume", str(run))
    assert [line["step"] for line in read_metrics(run) if "eval/codebook/agreement" in line] == [4, 8]


def test_an_interruption_at_the_end_of_an_epoch_skips_no_probe(here):
    run = here(*LONG, "--eval-every", 1, "--max-steps", 4)
    here("--resume", str(run), "--max-steps", 5)
    assert [line["step"] for line in read_metrics(run) if "eval/codebook/agreement" in line] == [4]


@pytest.mark.parametrize("options", ["--features-on file", "--features-on memory", "--features-on device",
                                     "--log-every 1", "--runs-dir elsewhere/deep"])
def test_flags_that_must_not_change_the_training(here, straight, options):
    if "runs-dir" in options:
        always = ("--data", here.data, *SCRIPTS["micu"].split(), *LONG, "--max-steps", 8)
        run_here("micu.py", *always, *options.split())
        (run,) = here.cwd.glob("elsewhere/deep/*")
    else:
        run = here(*LONG, *options.split(), "--max-steps", 8)
    differ = {place.split("/")[1] + "/" + place.split(".")[-1] for place in differences(
        {key: load(run)[key] for key in ("networks", "optimizer", "rng")},
        {key: straight[0][key] for key in ("networks", "optimizer", "rng")})}
    assert differ <= {"networks/usage", "networks/resets"}  # counters since the last log line


@EVERY_SCRIPT
def test_clips_of_one_segment_train_without_what_needs_time(here):
    """One line says what to switch off."""
    with h5py.File(here.data) as h5:
        short = {name: h5[name][:, :1] for name in ("audio", "text")}
    short |= dict.fromkeys(("video", "mask", "events__audio", "events__video"))  # nothing else
    still = edit(here.data, here.cwd / "still.h5", **short)
    tiny, off = [*TINY, "--epochs", 1, "--data", still], {"micu": ["--lambda-fine", 0]}.get(here.script, ["--no-cpc"])
    assert " ".join(map(str, off)) in here.error(*tiny)
    results = read_results(here(*tiny, *off))
    assert results["steps"] == 4 and "eval/classification/a2t/acc" in results["metrics"]


@EVERY_SCRIPT
def test_a_run_that_learns_nothing_says_so(here):
    """Weights that stand still: the losses that guess stay where guessing is."""
    run = here(*AUDIO_TEXT, "--learning-rate", "1e-30", "--epochs", 1)
    warnings = read_results(run)["warnings"]
    for name in {"micu": ["cujp"], "uni_code": ["cpc", "cmcm"], "codaar": ["cpc", "dqa"]}[here.script]:
        assert any(f"loss {name} is" in line and "--epochs" in line for line in warnings), (name, warnings)
    if here.script == "micu":  # nothing is said of a loss that was switched off
        off = read_results(here(*AUDIO_TEXT, "--learning-rate", "1e-30", "--epochs", 1, "--lambda-cujp", 0))["warnings"]
        assert not any("loss cujp" in line for line in off)
    logged = read_metrics(run)[-2]
    for line in warnings:
        if line.startswith("warning: loss"):
            name, value, guess = line.replace(",", "").split()[2], *map(float, re.findall(r"\d+\.\d\d", line))
            assert value == pytest.approx(logged[f"losses/{name}"], abs=0.006) and value > 0.8 * guess


@pytest.mark.parametrize("script", ["micu"], indirect=True)
def test_a_codebook_in_collapse_says_so(here):
    """Far from all outputs but one code, and no resets: one code is nearest to everything."""
    run = here(*AUDIO_TEXT, "--epochs", 1, "--codebook-init", "uniform", "--reset-after", 0, "--learning-rate", "1e-30")
    warnings = read_results(run)["warnings"]
    assert any("codes of audio collapsed" in line for line in warnings), warnings


@EVERY_SCRIPT
def test_without_matplotlib_a_run_lacks_its_pictures_and_nothing_else(here, monkeypatch):
    here.draws = True
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run = here(*AUDIO_TEXT)
    assert here.code == 0 and (run / "results.json").exists() and not list(run.glob("*.png"))
    assert here.out.splitlines()[-1] == f"run folder: runs/{run.name}"


@pytest.mark.slow
def test_probes_make_the_pictures_of_a_run_again(default_runs, tmp_path, monkeypatch):
    """With `--pictures FOLDER`, and those of other tasks besides"""
    run = default_runs["micu"].run / "checkpoint.pt"
    command = ("probes.py", run, "--pictures", tmp_path / "new", "--tasks")
    again = captured_here(*command, "classification", "segmentation", cwd=default_runs["micu"].cwd)
    assert again.returncode == 0
    made = {path.stem for path in (tmp_path / "new").iterdir()}
    assert made == {"training", "codes", "codebook", "confusion", "masks"}
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="--pictures .*new: .*matplotlib"):
        captured_here(*command, "classification", cwd=default_runs["micu"].cwd)


def test_a_run_can_be_resumed_for_more_epochs(here, straight):
    """A finished one, too, in several goes; until it is finished again it keeps its results, and is not complete."""
    two = here(*LONG, "--max-steps", 8)
    one = here(*LONG, "--epochs", 1)
    paid_for = (one / "results.json").read_bytes()
    assert read_results(one)["steps"] == 4 and "this run is complete" in here.error("--resume", str(one))
    for most, step in ((4, 4), (5, 5)):  # stopped before a step of its own, and after one
        here("--resume", str(one), "--epochs", 2, "--max-steps", most)
        assert f"stopped after step {step} of 8, checkpoint saved; continue with" in here.out
        assert load(one)["step"] == step and (one / "results.json").read_bytes() == paid_for
    assert here("--resume", str(one)) == one and read_results(one)["steps"] == 8
    assert "this run is complete" in here.error("--resume", str(one), "--epochs", 2)
    left, right = training_state(one), training_state(two)
    assert differences({**left, "losses": 0}, {**right, "losses": 0}) == []
    assert [line["losses/total"] for line in left["losses"]] == [line["losses/total"] for line in right["losses"]]
    assert "--epochs 1: the run was started with 2" in here.error("--resume", str(one), "--epochs", 1)


@pytest.mark.parametrize("most", [1, 2])
def test_a_run_that_is_as_far_as_asked_takes_no_step(here, interrupted, most):
    before = training_state(interrupted)
    here("--resume", str(interrupted), "--max-steps", most)
    assert here.code == 0 and f"stopped after step 2 of 8, checkpoint saved; {go_on(interrupted)}" in here.out
    assert differences(training_state(interrupted), before) == []


def test_damaged_results_are_no_results(here, interrupted):
    """A run stays resumable whatever its results.json holds; the next one replaces it."""
    for text, most in (("[" * 99999, 2), ('{"args": {"epochs": "2"}}', 2), ("[]", 8), ("", 9)):
        (interrupted / "results.json").write_text(text)
        here("--resume", str(interrupted), "--max-steps", most)
        assert here.code == 0
    assert read_results(interrupted)["steps"] == 8


def test_a_resumed_run_may_log_and_probe_more_often(here, straight):
    """No bit of the training hangs on it."""
    run = here(*LONG, "--max-steps", 3)
    here("--resume", str(run), "--log-every", 1, "--eval-every", 1)
    probed = [line["step"] for line in read_metrics(run) if any("eval/" in tag for tag in line)]
    assert probed == [4, 8]
    state, metrics = training_state(run), read_results(run)["metrics"]
    assert [line["step"] for line in state["losses"]] == [4, 5, 6, 7, 8] and metrics == straight[1]
    assert differences(state | {"losses": 0}, straight[0] | {"losses": 0}) == []


@pytest.mark.parametrize("number, code", [
    (signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)])
def test_a_signal_while_pictures_are_drawn_ends_a_complete_run_quietly(here, monkeypatch, number, code):
    here.draws = True
    monkeypatch.setattr(probes, "show", lambda *args: signal.raise_signal(number))
    run = here(*AUDIO_TEXT, "--epochs", 1)
    assert here.code == code and read_results(run)["steps"] == 4
    assert here.out.splitlines()[-1] == f"run folder: runs/{run.name}" and "--resume" not in here.out


def test_results_name_the_commit_of_the_start_and_those_of_every_resume(here, monkeypatch):
    def at(commit, *args):
        monkeypatch.setattr("run.git_commit", lambda: commit)
        return here(*args)

    folder = at("first", *AUDIO_TEXT, "--max-steps", 2)
    for commit, steps in (("second", 3), ("third", 100)):
        at(commit, "--resume", str(folder), "--max-steps", steps)
    results = read_results(folder)
    assert (results["git"], results["resumed_at"]) == ("first", ["second", "third"])


def test_the_numbers_of_a_part_depend_on_its_name_and_the_seed_alone():
    def draws(name, seed):
        self = SimpleNamespace(device="cpu", args=SimpleNamespace(seed=seed))
        return torch.rand(3, generator=run.Run.generator(self, name)).tolist()
    assert draws("mask", 1) == draws("mask", 1)
    assert len({tuple(draws(name, seed)) for name in ("mask", "reset", "jigsaw") for seed in range(5)}) == 15


def test_machines_without_the_names_of_posix(here, monkeypatch):
    """As on Windows, where the peak of the memory is not known: training, probing, check, resume."""
    hide_posix(monkeypatch)
    monkeypatch.setattr("data.SYSTEM", here.cwd)
    run = here(*AUDIO_TEXT, "--epochs", 1, "--max-steps", 2, "--features-on", "file")
    here("--resume", str(run))
    assert read_results(run)["peak_memory_mb"] is None
    assert run_here("probes.py", run) == run_here("data.py", "check", here.data) == 0


@pytest.mark.parametrize("files, expected", [
    ({}, []), ({"cpu.max": "max 100000\n"}, []), ({"cpu.max": "250000 100000\n"}, [2]),
    ({"cpu.max": "50000 100000\n"}, [1]), ({"cpu.max": "99900000 100000\n"}, [64]), ({"cpu.max": "nonsense"}, []),
    ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, []),
    ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, [3])])
def test_threads_are_no_more_than_a_container_may_use(tmp_path, monkeypatch, files, expected):
    chosen = []
    monkeypatch.setattr(run, "CONTROL_GROUP", tmp_path)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # who gives a number keeps it
    run.respect_quota()
    assert chosen == []
    monkeypatch.delenv("OMP_NUM_THREADS")
    run.respect_quota()
    assert chosen == expected


def test_memory_is_counted_in_bytes_on_a_mac(monkeypatch):
    on_linux = run.peak_memory_mb(torch.device("cpu"))
    monkeypatch.setattr(sys, "platform", "darwin")
    assert run.peak_memory_mb(torch.device("cpu")) == pytest.approx(on_linux / 1024, rel=0.05)


@pytest.mark.parametrize("processes", [2, 3, 6, 7])
def test_averages_over_processes_keep_whole_numbers(monkeypatch, processes):
    """Counts that all processes hold alike; the exchange is a sum of the same in each."""
    monkeypatch.setattr(run, "WORLD_SIZE", processes)
    monkeypatch.setattr(run.dist, "all_reduce", lambda x: x.mul_(processes))
    counts = torch.arange(2000)
    run.average_over_processes([counts, torch.zeros(3)])
    assert torch.equal(counts, torch.arange(2000))


def test_several_processes_do_not_share_a_gpu(monkeypatch):
    monkeypatch.setattr(run, "WORLD_SIZE", 2)
    with pytest.raises(InputError, match="--device cuda:0: of several processes each takes its own GPU"):
        run.pick_device("cuda:0")


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "kept.json"
    run.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        run.write_json(path, {"a": object()})

    def full(stream):
        stream.write(b"half")
        raise OSError("no space left on device")
    with pytest.raises(OSError):
        run.write_atomically(path, full)
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]
    other = tmp_path / "kept.tmp"  # a user's file may be called so
    run.write_json(other, {"b": 2})
    run.write_json(path, {"a": 3})
    assert json.loads(other.read_text()) == {"b": 2} and json.loads(path.read_text()) == {"a": 3}


# ------------------------------------------------------------------------------------------------------------ bad input

BAD = [
    ("--modalities audio smell", ["--modalities smell", "audio video text"]),
    ("--modalities audio", ["at least two"]),
    ("--modalities audio audio", ["at least two"]),
    ("--cujp-splits 7", ["--cujp-splits 7", "256"]),
    ("--cujp-splits 0", ["--cujp-splits 0"]),
    ("--cujp-splits 4000000000", ["--cujp-splits 4000000000", "256"]),
    ("--cujp-samples -1", ["--cujp-samples"]),
    ("--mask-ratio 1.0", ["--mask-ratio 1.0", "[0, 1)"]),
    ("--mask-ratio -0.1", ["--mask-ratio -0.1", "[0, 1)"]),
    ("--mask-ratio nan", ["--mask-ratio nan"]),
    ("--codebook-size 0", ["--codebook-size 0"]),
    ("--codebook-size -3", ["--codebook-size -3"]),
    ("--codebook-size 99999999999999999999", ["--codebook-size 99999999999999999999", "2^32"]),
    ("--cujp-samples 4611686018427387904", ["--cujp-samples 4611686018427387904", "2^32"]),
    ("--reset-after 4294967296", ["--reset-after 4294967296", "2^32"]),
    ("--code-dim 0", ["--code-dim 0"]),
    ("--code-dim 30 --cujp-splits 2", ["--code-dim 30"]),
    ("--batch-size 0", ["--batch-size 0"]),
    ("--batch-size 33", ["--batch-size 33", "32 clips"]),
    ("--epochs -1", ["--epochs -1"]),
    ("--learning-rate 0", ["--learning-rate 0"]),
    ("--learning-rate nan", ["--learning-rate nan"]),
    ("--learning-rate 1e999", ["--learning-rate inf", "infinite"]),
    ("--lambda-fine 1e999", ["--lambda-fine inf", "infinite"]),
    ("--lambda-fine nan", ["--lambda-fine nan"]),
    ("--temperature 0", ["--temperature 0"]),
    ("--log-every 0", ["--log-every 0"]),
    ("--reset-after -1", ["--reset-after -1"]),
    ("--ema-decay 1.5", ["--ema-decay 1.5"]),
    ("--eval-every -1", ["--eval-every -1"]),
    ("--seed -1", ["--seed -1"]),
    ("--seed 4294967296", ["--seed 4294967296", "2^32"]),
    ("--device cuda:99", ["--device cuda:99", "--device auto"]),
    ("--device nonsense", ["--device nonsense", "--device auto"]),
    ("--device mps", ["--device mps: not available here", "--device auto"]),
    ("--runs-dir file/below", ["--runs-dir file/below", "cannot be written"]),
    ("--runs-dir=", ["--runs-dir is empty"]),
    ("--resume absent", ["--resume absent", "checkpoint.pt"]),
]
BAD_UNI_CODE = [
    ("--cpc-steps 0", ["--cpc-steps 0"]),
    ("--cpc-steps 10", ["--cpc-steps 10", "10 segments"]),
    ("--club-steps 0", ["--club-steps 0"]),
    ("--club-learning-rate nan", ["--club-learning-rate nan"]),
    ("--commitment-cost -1", ["--commitment-cost -1"]),
    ("--lambda-club nan", ["--lambda-club nan"]),
]
BAD_CODAAR = [
    ("--cpc-steps 0", ["--cpc-steps 0"]),
    ("--cpc-steps 10", ["--cpc-steps 10", "10 segments"]),
    ("--commitment-cost -1", ["--commitment-cost -1"]),
    ("--lambda-self 1.5", ["--lambda-self 1.5", "[0, 1]"]),
    ("--lambda-self nan", ["--lambda-self nan"]),
    ("--cascade audio video", ["--cascade audio video", "audio video text"]),
    ("--cascade audio video audio", ["--cascade audio video audio", "once"]),
    ("--cascade audio video flow", ["--cascade audio video flow", "audio video text"]),
    ("--modalities audio video --cascade text audio video", ["--cascade text audio video", "audio video once"]),
]


@pytest.mark.parametrize("script, options, needles", [("micu", *case) for case in BAD] +
                         [("uni_code", *case) for case in BAD_UNI_CODE] +
                         [("codaar", *case) for case in BAD_CODAAR], indirect=["script"])
def test_bad_arguments(here, options, needles):
    (here.cwd / "file").write_text("")
    message = here.error("--batch-size", 8, *options.split())
    assert all(needle in message for needle in needles), message
    assert not list(here.cwd.glob("runs/*__*")), "a run folder for a run that never began"


@pytest.mark.parametrize("options, needles", [
    ("--modalities audio smell --data {small}", ["error: --modalities smell", "audio video text"]),
    ("--data absent.h5", ["error: absent.h5: no such file", "digits"]),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("--data digits --runs-dir file/below", ["error: --runs-dir file/below", "cannot be written"]),
        ("--data {small} --codebook-size 4294967295", ["memory", "--batch-size"]))),
])
def test_one_line_and_exit_code_2(tmp_path, small, options, needles):
    (tmp_path / "file").write_text("")
    done = run_script("micu.py", *options.format(small=small).split(), cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and all(needle in done.stderr for needle in needles), done.stderr
    assert not list(tmp_path.rglob("results.json"))


def test_splits_that_are_missing(here):
    """Without a test split a run is probed on nothing but its codes; without a train split there is no run."""
    with h5py.File(here.data) as h5:
        split = h5["split"][:]
    no_test = edit(here.data, here.cwd / "no_test.h5", split=np.where(split == 2, 0, split))
    metrics = read_results(here(*AUDIO_TEXT, "--epochs", 1, data=no_test))["metrics"]
    assert here.out.count("will not be probed: ") == 2 and "classification" in here.out and "open_set" in here.out
    assert metrics and all(tag.startswith("eval/codebook/") for tag in metrics)
    no_train = edit(here.data, here.cwd / "no_train.h5", split=np.where(split == 0, 1, split))
    assert "no_train.h5: the train split is empty" in here.error(*TINY, data=no_train)


@pytest.mark.parametrize("script", ["uni_code", "codaar"], indirect=True)
def test_maps_below_5_x_5_cells_are_refused_only_where_maps_are_decoded(here):
    with h5py.File(here.data) as h5:
        small_maps = edit(here.data, here.cwd / "small_maps.h5", video=h5["video"][:, :, :4, :3])
    message = here.error(*TINY, "--specific", "map", data=small_maps)
    assert "--specific map: maps of (4, 3) cells, at least 5 x 5" in message
    assert load(here(*TINY, "--max-steps", 1, data=small_maps))["step"] == 1


@pytest.mark.parametrize("script", ["uni_code", "codaar"], indirect=True)
def test_cpc_that_predicts_all_of_a_clip_starts_at_its_first_segment(here):
    assert load(here(*TINY, "--cpc-steps", 9, "--max-steps", 4))["step"] == 4


@pytest.fixture(scope="module")
def stopped(tiny, tmp_path_factory) -> Path:
    """A run stopped after two steps, to be copied before it is used."""
    cwd = tmp_path_factory.mktemp("stopped")
    shutil.copy(tiny, cwd / "data.h5")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        run_here("micu.py", "--data", "data.h5", *AUDIO_TEXT, "--max-steps", 2)
    return cwd


@pytest.fixture
def interrupted(here, stopped):
    """The stopped run in the current folder: its path from there."""
    shutil.copytree(stopped, here.cwd, dirs_exist_ok=True)
    return run_folder(here.cwd).relative_to(here.cwd)


def test_resume_keeps_the_settings(here, interrupted):
    before = training_state(interrupted)
    for option in ("--batch-size 9", "--codebook-size 32", "--modalities audio video", "--seed 3", "--epochs 1",
                   "--temperature 0.5"):
        message = here.error("--resume", str(interrupted), *option.split())
        assert option.split()[0] in message and "started with" in message
    assert differences(training_state(interrupted), before) == []
    here("--resume", str(interrupted), "--batch-size", 8, "--max-steps", 3)  # what was given before may be again
    assert load(interrupted)["step"] == 3


def test_resume_notices_a_setting_that_equals_the_default(here, interrupted):
    message = here.error("--resume", str(interrupted), "--batch-size", 80, "--max-steps", 3)
    assert "--batch-size 80" in message


@pytest.mark.parametrize("spoil, needles", [
    (lambda path: path.unlink(), ["--resume", "no checkpoint.pt"]),
    (lambda path: path.write_bytes(path.read_bytes()[:5000]), ["checkpoint.pt", "not a checkpoint of micu.py"]),
    (lambda path: path.write_bytes(b"nonsense"), ["checkpoint.pt", "not a checkpoint of micu.py"]),
    (lambda path: path.write_bytes(b""), ["checkpoint.pt", "not a checkpoint of micu.py"]),
    (lambda path: torch.save({"weights": torch.zeros(2)}, path), ["checkpoint.pt"]),
    (lambda path: torch.save(torch.zeros(2), path), ["checkpoint.pt"]),
    (lambda path: torch.save(torch.load(path) | {"method": "uni_code"}, path), ["uni_code", "micu"]),
    (lambda path: torch.save({**torch.load(path), "args": {"a_flag_of_the_future": 1}}, path), ["checkpoint.pt"]),
    (lambda path: torch.save(torch.load(path) | {"networks": {}}, path), ["checkpoint.pt does not fit"]),
    (lambda path: torch.save(torch.load(path) | {"networks": {name: torch.cat([value, value]) if value.ndim else value
     for name, value in torch.load(path)["networks"].items()}}, path), ["checkpoint.pt does not fit", "size mismatch"]),
    (lambda path: (path.parent / "results.json").write_text('{"args": {"epochs": 2}}'), ["complete", "results.json"]),
    (lambda path: torch.save(Path, path), ["checkpoint.pt", "not a checkpoint of micu.py"]),  # would run code
], ids=["missing", "truncated", "nonsense", "empty", "other dict", "tensor", "other method", "other flags",
        "no weights", "other shapes", "complete", "pickle"])
def test_checkpoints_that_cannot_be_resumed(here, interrupted, spoil, needles):
    spoil(interrupted / "checkpoint.pt")
    message = here.error("--resume", str(interrupted))
    assert all(needle in message for needle in needles), message


def change_data(name: str, change) -> None:
    """Replace a dataset of data.h5 in the current folder."""
    with h5py.File("data.h5") as h5:
        values = change(h5[name][:])
    os.replace(edit("data.h5", "new.h5", **{name: values}), "data.h5")


@pytest.mark.parametrize("change", [lambda audio: audio[..., :100], lambda audio: audio + np.float16(1)],
                         ids=["other shapes", "other values"])
def test_resume_on_other_data(here, interrupted, change):
    change_data("audio", change)
    assert "data changed" in here.error("--resume", str(interrupted))


def test_probes_on_data_of_other_shapes(here, interrupted):
    change_data("audio", lambda audio: audio[..., :100])
    with pytest.raises(InputError, match="audio") as caught:
        run_here("probes.py", interrupted, "data.h5")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spoil", [lambda path: path.unlink(), lambda path: path.write_bytes(b"nonsense"),
                                   lambda path: torch.save({"weights": torch.zeros(2)}, path)])
def test_probes_without_a_checkpoint(here, interrupted, spoil):
    spoil(interrupted / "checkpoint.pt")
    with pytest.raises(InputError, match="checkpoint.pt"):
        run_here("probes.py", interrupted)


def finite(run: Path) -> bool:
    return all(value.isfinite().all() for value in load(run)["networks"].values())


def test_a_loss_that_is_nan_stops_the_run(here):
    message = here.error(*AUDIO_TEXT, "--learning-rate", "1e30", "--log-every", 1)
    assert "at step 2" in message and "fcmi_fine nan" in message and "none yet" in message
    assert not (run_folder(here.cwd) / "checkpoint.pt").exists()


@pytest.fixture
def poison(monkeypatch):
    """The sixth batch of a run is infinite."""
    original = Batches.epoch

    def poisoned(self, epoch, start=0, stop=None):
        for i, batch in enumerate(original(self, epoch, start, stop), start):
            yield {m: x * float("inf") for m, x in batch.items()} if (epoch, i) == (1, 1) else batch

    monkeypatch.setattr(Batches, "epoch", poisoned)


def test_a_loss_that_is_nan_names_the_last_good_checkpoint(here, poison):
    message = here.error(*AUDIO_TEXT, "--log-every", 1)
    run = run_folder(here.cwd)
    assert "at step 6" in message and str(run.relative_to(here.cwd) / "checkpoint.pt") in message
    assert load(run)["step"] == 4 and finite(run)


@pytest.mark.parametrize("stop", [6, 7])
def test_a_nan_between_two_log_lines_spoils_no_checkpoint(here, poison, stop):
    here.error(*AUDIO_TEXT, "--max-steps", stop, "--log-every", 1000)
    run = run_folder(here.cwd)
    assert load(run)["step"] == 4 and finite(run)


def test_an_infinite_gradient_spoils_no_checkpoint(here, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, norm: torch.tensor(torch.inf))
    message = here.error(*AUDIO_TEXT, "--max-steps", 1, "--log-every", 1000)
    assert "not finite at step 1" in message and "grad_norm inf" in message
    assert not (run_folder(here.cwd) / "checkpoint.pt").exists()


def test_huge_features_stop_the_run(here):
    with h5py.File(here.data) as h5:
        huge = h5["audio"][:].astype(np.float32) * 1e30
    message = here.error(*AUDIO_TEXT, data=edit(here.data, here.cwd / "huge.h5", audio=huge))
    assert "not finite at step" in message and "recon" in message


# ---------------------------------------------------------------------------------------------------- every flag acts

STEPS = [*"--batch-size 6 --codebook-size 48 --code-dim 32 --reset-after 2 --epochs 2".split(),
         *"--max-steps 4 --log-every 1000".split()]
FLAGS = {
    "shared": ["--codebook-size 40", "--codebook-init uniform", "--codebook-init batch", "--reset-after 3",
               "--reset-after 0", "--reset-rule unused", "--reset-source batch", "--reset-source live",
               "--spatial-pool sum", "--spatial-pool plain", "--clip module", "--ema-decay 0.9", "--code-dim 64",
               "--learning-rate 1e-3", "--batch-size 7", "--modalities audio video", "--precision bf16"],
    "micu": ["--mask-ratio 0.5", "--mask-axis time", "--mask-sharing different", "--similarity dot",
             "--temperature 1.0", "--jigsaw mmjp", "--cujp-splits 4", "--cujp-samples 3", "--cujp-samples 0",
             "--mm-ema", "--lambda-fine 0", "--lambda-coarse 0", "--lambda-cujp 0"],
    "uni_code": ["--lambda-club 0", "--lambda-club 1", "--club-steps 2", "--club-learning-rate 1e-2", "--no-cpc",
                 "--cpc-steps 3", "--no-cmcm", "--mm-ema time-aligned", "--mm-ema none", "--commitment-cost 0.5",
                 "--no-teacher", "--specific map", "--codebook-init batch",
                 "--codebook-init uniform"],
    "codaar": ["--no-cpc", "--cpc-steps 3", "--no-dqa", "--no-dta", "--lambda-self 0.9", "--no-csa",
               "--cascade video text audio", "--commitment-cost 0.5", "--specific map",
               "--codebook-init paired", "--codebook-init uniform", "--reset-rule unused", "--reset-source paired",
               "--reset-source live"],
}
DOWNSTREAM = ("model.semantic", "model.quantizer.codebook")  # what a probe sees, CoDAAR's codebooks as well


@once_a_script
def default(script, tiny, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("default")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        run_here(f"{script}.py", "--data", tiny, *SCRIPTS[script].split(), *STEPS)
    return load(run_folder(cwd))


@pytest.mark.slow
@pytest.mark.parametrize("script, flag", [("micu", flag) for flag in FLAGS["shared"] + FLAGS["micu"]] +
                         [(name, flag) for name in ("uni_code", "codaar") for flag in FLAGS[name]], indirect=["script"])
def test_every_flag_changes_what_is_learned(here, default, flag):
    state = load(here(*STEPS, *flag.split()))
    assert state["step"] == 4 and all(value.isfinite().all() for value in state["networks"].values())
    codes, base = ({name: value for name, value in s["networks"].items() if name.startswith(DOWNSTREAM)}
                   for s in (state, default))
    assert differences(codes, base), "the flag changed nothing in the encoders or the codebook"
    before, after = default["args"], state["args"]
    name = flag.split()[0].removeprefix("--").removeprefix("no-").replace("-", "_")
    assert [key for key in after if after[key] != before[key]] == [name]


CHANGES = {  # flag: the losses that it changes or leaves out at the first step
    "uni_code": {
        "--lambda-club 0": ["club"], "--no-cpc": ["cpc"], "--no-cmcm": ["cmcm"], "--no-teacher": ["commitment"],
        "--commitment-cost 0.5": ["commitment"], "--club-steps 2": ["club"],
        "--club-learning-rate 0.01": ["club"], "--cpc-steps 2": ["cpc", "club"],  # CLUB's weights are drawn last, and
        "--specific map": ["recon", "cpc", "club"],  # those of Cross-CPC after those of the decoders
        "--mm-ema none": [], "--mm-ema time-aligned": [], "--reset-after 0": [],
        "--lambda-club 0 --no-cpc --no-cmcm --mm-ema none --reset-after 0 --no-teacher": [
            "commitment", "cpc", "cmcm", "club"],
        "--lambda-club 0 --no-cpc --mm-ema none --reset-after 0 --no-teacher": ["commitment", "cpc", "club"]},
    "codaar": {
        "--no-cpc": ["cpc"], "--no-dqa": ["dqa"], "--cpc-steps 2": ["cpc"], "--commitment-cost 0.5": ["commitment"],
        "--specific map": ["recon", "cpc"], "--no-dta": [], "--no-csa": [],
        "--lambda-self 0.9": [],
        "--cascade video text audio": [], "--probe-code own": [], "--no-dta --no-csa --no-dqa": ["dqa"]},
}
MOVING = ("--mm-ema", "--no-dta", "--no-csa", "--lambda-self", "--cascade")  # these move the codebook another way
OFF = {"--no-cpc": "cpc", "--no-cmcm": "cmcm", "--lambda-club 0": "club", "--no-dqa": "dqa"}  # flag: loss that is 0


@once_a_script
def first_losses(script, tiny, tmp_path_factory):
    """`first_losses(options)` -> losses at the first step of the script, codebook after it"""
    def run(options: str):
        cwd = tmp_path_factory.mktemp("first")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(cwd)
            run_here(f"{script}.py", "--data", tiny, *TINY, "--max-steps", 1, "--log-every", 1, *options.split())
        (line,) = read_metrics(run_folder(cwd))
        return {tag[7:]: value for tag, value in line.items() if tag.startswith("losses/") and tag != "losses/total"}, \
            load(run_folder(cwd))["networks"][f"model.quantizer.{CODEBOOK[script]}"]

    return run, *run("")


@pytest.mark.slow
@pytest.mark.parametrize("script, flag", [(name, flag) for name in CHANGES for flag in CHANGES[name]],
                         indirect=["script"])
def test_an_ablation_changes_exactly_the_losses_it_names(first_losses, script, flag):
    run, default, codebook = first_losses
    losses, moved = run(flag)
    assert {name for name in losses if losses[name] == 0} == {name for off, name in OFF.items() if off in flag}
    assert [name for name in default if losses[name] != default[name]] == CHANGES[script][flag]
    assert torch.equal(moved, codebook) == (not any(name in flag for name in MOVING))  # it follows the same vectors


@pytest.mark.slow
@EVERY_SCRIPT
@pytest.mark.parametrize("after", [10, 0])
def test_codes_are_reset_after_ten_steps_or_never(here, after):
    run = here(*AUDIO_TEXT, "--epochs", 3, "--reset-after", after, "--codebook-size", 128)
    assert (sum(line.get("codebook/resets", 0) for line in read_metrics(run)) > 0) == (after > 0)


NETWORKS = {"micu": {"semantic", "decoder", "jigsaw"}, **dict.fromkeys(
    ("uni_code", "codaar"), {"semantic", "specific", "decoder", "cpc"})}
REACH = {  # flag: the parts whose gradient it changes at the first step
    "micu": {
        "--lambda-fine 0": {"semantic"}, "--lambda-coarse 0": {"semantic"}, "--temperature 1": {"semantic"},
        "--lambda-cujp 0": {"semantic", "jigsaw"}, "--cujp-samples 1": {"semantic", "jigsaw"}, "--mm-ema": set()},
    "uni_code": {
        "--lambda-club 1": {"semantic", "specific"}, "--lambda-club 0": {"semantic", "specific"},
        "--no-cpc": {"semantic", "cpc"}, "--no-cmcm": {"semantic"}, "--no-teacher": {"semantic"},
        "--commitment-cost 1": {"semantic"}, "--mm-ema none": set(),
        "--reset-after 0": set()},
    "codaar": {
        "--no-cpc": {"semantic", "cpc"}, "--no-dqa": {"semantic"}, "--commitment-cost 1": {"semantic"},
        "--no-dta": set(), "--no-csa": set()},
}


@once_a_script
def first_gradients(script, tiny, tmp_path_factory):
    """`first_gradients(options)` -> {parameter: gradient before clipping} at the first step of the script"""
    def run(options: str) -> dict:
        gradients, original = [], torch.nn.utils.clip_grad_norm_

        def record(parameters, norm):
            parameters = list(parameters)
            gradients.extend(torch.zeros(1) if p.grad is None else p.grad.clone() for p in parameters)
            return original(parameters, norm)

        cwd = tmp_path_factory.mktemp("gradients")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(cwd)
            patch.setattr(torch.nn.utils, "clip_grad_norm_", record)
            run_here(f"{script}.py", "--data", tiny, *TINY, "--max-steps", 1, *options.split())
        names = [name for name in load(run_folder(cwd))["networks"]
                 if "quantizer" not in name and name != "jigsaw.permutations"]
        return dict(zip(names, gradients, strict=True))  # none is of CLUB's own networks

    return run, run("")


@pytest.mark.slow
@pytest.mark.parametrize("script, flag", [(name, flag) for name in REACH for flag in REACH[name]], indirect=["script"])
def test_a_loss_reaches_the_parts_it_is_about(first_gradients, script, flag):
    """A part is a key of `networks` but for the model, of which gradients reach the semantic encoders alone."""
    run, default = first_gradients
    changed = {name.removeprefix("model.").split(".")[0]: [] for name in default}
    assert set(changed) == NETWORKS[script]
    for name, gradient in run(flag).items():
        changed[name.removeprefix("model.").split(".")[0]].append(not torch.equal(gradient, default[name]))
    assert {part for part, values in changed.items() if any(values)} == REACH[script][flag]


@EVERY_SCRIPT
def test_of_a_map_the_mean_of_the_cells_is_decoded_unless_the_map_is_asked_for(here):
    """What a map has beside its mean, here far more, is in the loss then alone. A new decoder says next to nothing."""
    with h5py.File(here.data) as h5:
        video, audio, text = (h5[m][:].astype(np.float32) for m in ("video", "audio", "text"))
    pattern = np.random.default_rng(0).normal(size=(*video.shape[2:4], 1))
    uneven = edit(here.data, here.cwd / "uneven.h5", video=video + 30 * (pattern - pattern.mean()).astype(np.float32))

    def recon(data, *options):
        run = here(*TINY, "--max-steps", 1, "--log-every", 1, *options, data=data)
        return read_metrics(run)[0]["losses/recon"]

    even = recon(here.data)
    assert 0.8 < even / sum((x**2).mean() for x in (audio, text, video.mean((2, 3)))) < 1.25
    assert recon(uneven) < 2 * even
    if here.script != "micu":
        assert recon(uneven, "--specific", "map") > 100 * even


PARTS = {"uni_code": ("--lambda-club 0", "--no-cpc", "--no-cmcm", "--no-teacher", "--mm-ema none"),
         "codaar": ("--no-cpc", "--no-dqa", "--no-dta", "--no-csa")}


@pytest.mark.slow
@pytest.mark.parametrize("script, flag", [(name, flag) for name in PARTS for flag in PARTS[name]], indirect=["script"])
def test_a_part_less_leaves_the_other_draws_alone(here, default, flag):
    drawn = load(here(*STEPS, *flag.split()))["rng"]
    assert differences(drawn, default["rng"]) == (["/cpc"] if flag == "--no-cpc" else [])


@pytest.mark.parametrize("script", ["codaar"], indirect=True)
def test_probe_code_changes_what_probes_read_and_nothing_else(here, straight):
    run = here(*LONG, "--probe-code", "own")
    assert differences(training_state(run)["networks"], straight[0]["networks"]) == []
    metrics, before = read_results(run)["metrics"], straight[1]
    assert {tag: v for tag, v in metrics.items() if "codebook" in tag} == {
        tag: v for tag, v in before.items() if "codebook" in tag}
    assert metrics != before


@pytest.mark.slow
@pytest.mark.parametrize("script", ["codaar"], indirect=True)
def test_four_modalities(here, tmp_path):
    """Optical flow, here the differences of frames, as the fourth."""
    with h5py.File(here.data) as h5:
        flow = np.diff(h5["video"][:], axis=1, append=0)
    data = edit(here.data, tmp_path / "four.h5", flow=flow)
    run = here(*TINY, "--cascade", "flow", "video", "text", "audio", data=data)
    ways = {tag.split("/")[2] for tag in read_results(run)["metrics"] if "/classification/" in tag}
    assert ways == {f"{a}2{b}" for a in "avtf" for b in "avtf" if a != b}


@pytest.mark.slow
@pytest.mark.parametrize("weight", ["fine", "coarse", "cujp"])
def test_a_weight_of_zero_leaves_the_other_draws_alone(here, default, weight):
    state = load(here(*STEPS, f"--lambda-{weight}", 0))
    assert differences(state["rng"], default["rng"]) == []


def keys_and_shapes(state) -> dict:
    return {name: tuple(value.shape) for name, value in state["networks"].items()}


def test_bf16_keeps_the_checkpoint_in_fp32(here, default):
    state = load(here(*STEPS, "--precision", "bf16"))
    assert keys_and_shapes(state) == keys_and_shapes(default)
    assert all(value.dtype == default["networks"][name].dtype for name, value in state["networks"].items())


# ---------------------------------------------------------------------------------------------------------------- GPU
class AnyGenerator(torch.Generator):
    """A generator of the host that says it belongs to the device it is asked for."""

    def __new__(cls, device="cpu"):
        self = super().__new__(cls)
        self.said = torch.device(device)
        return self

    @property
    def device(self):
        return self.said


class Enough(Exception):
    """Two steps are done, one that starts the codebook and one that does not."""


@pytest.mark.slow
@pytest.mark.parametrize("script, options", [
    ("micu", "--features-on device"), ("uni_code", "--features-on memory"), ("codaar", "--features-on file"),
    ("uni_code", "--specific map --codebook-init batch"),
    ("codaar", "--reset-source live --specific map --codebook-init paired"),
    ("micu", "--jigsaw mmjp --cujp-samples 0 --mask-sharing different --mm-ema --reset-source live"),
    ("micu", "--codebook-init uniform"),
    *(("benchmarks/comparators", f"--align {align} --dcid") for align in ("smit", "mst", "codis", "turn", "cmcm"))],
                         indirect=["script"])
def test_a_step_mixes_no_devices_and_waits_for_none(here, monkeypatch, options):
    """On `meta`, whose tensors hold no numbers: a number that a step asks for is one it would wait for on a GPU."""
    meta, epoch = torch.device("meta"), Batches.epoch

    def two(self, *args):
        yield from itertools.islice(epoch(self, *args), 2)
        raise Enough
    monkeypatch.setattr(Batches, "epoch", two)
    monkeypatch.setattr("run.pick_device", lambda name: meta)
    monkeypatch.setattr(probes, "Plan", lambda *args: SimpleNamespace(evaluate=print))  # of probes nothing is asked
    monkeypatch.setattr(torch, "Generator", AnyGenerator)
    monkeypatch.setattr(torch, "autocast", lambda *args, **keywords: contextlib.nullcontext())
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: None)
    with pytest.raises(Enough):
        here(*TINY, "--log-every", "1000", *options.split())


class Replayed(TorchDispatchMode):
    """A CUDA graph on the CPU: the operations of a step, which a replay does again on the same tensors."""

    def __init__(self):
        super().__init__()
        self.operations, self.replays = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "a step asks for a number"
        out = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, out))
        return out

    def replay(self):
        self.replays += 1
        if self.replays == 1:  # on a CPU recording has done all of it already
            return
        with torch.no_grad():
            for function, args, kwargs, out in self.operations:
                places = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
                for old, new in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs))):
                    if torch.is_tensor(old) and old.untyped_storage().data_ptr() not in places:
                        old.copy_(new)


@contextlib.contextmanager
def recording(graph, pool, capture_error_mode):
    with graph:
        yield


@pytest.mark.slow
@pytest.mark.parametrize("script, options", [
    ("micu", ""), ("uni_code", ""), ("uni_code", "--no-cpc --codebook-init uniform"),
    ("codaar", "--reset-source live"), ("micu", "--jigsaw mmjp --mask-axis time --mm-ema"),
    ("benchmarks/comparators", "--align codis --dcid")], indirect=["script"])
def test_a_recorded_step_is_the_step(here, monkeypatch, options):
    """With graphs stood in for, on the CPU: batches, codebook, random numbers and host's draws, all to the bit."""
    options = *TINY, "--reset-after", 2, "--epochs", 6, "--log-every", 1, *options.split()
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)  # whose LSTM does other things without gradients
    plain = training_state(here(*options))
    graphs = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graphs.append(Replayed()) or graphs[-1])
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(run.Run, "recorded", lambda self, step: run.Recorded(step, self.stateful.values(), []))
    recorded = training_state(here(*options))
    assert sum(graph.replays for graph in graphs) == 24 - 3 and max(graph.replays for graph in graphs) > 1
    cut = "cpc" in recorded["rng"] and "--no-cpc" not in options
    assert (len(graphs) > 1) == cut  # one for each place at which the host cuts z
    for state in (plain, recorded):
        for name in ("optimizer", "club_optimizer"):
            for group in state.get(name, {}).get("param_groups", ()):
                del group["capturable"]
    assert differences(plain, recorded) == []


def test_cuda_graphs_need_a_gpu(here):
    assert "--cuda-graph: needs one GPU and one process" in here.error(*TINY, "--cuda-graph")


@CUDA
@EVERY_SCRIPT
@pytest.mark.parametrize("options", ["", "--precision bf16 --features-on file", "--eval-every 1"])
def test_gpu_records_the_step(here, options):
    """To the bit what a step does that is not recorded, if the device can be told to repeat itself."""
    options = *TINY, "--epochs", 4, "--device", "cuda", "--log-every", 1, *options.split()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        plain = training_state(here(*options))
        whole = training_state(here(*options, "--cuda-graph"))
        stopped = here(*options, "--cuda-graph", "--max-steps", 9)
        resumed = training_state(here("--resume", str(stopped), "--device", "cuda"))
    finally:
        torch.use_deterministic_algorithms(False)
    for state in (whole, resumed):
        assert differences({"rng": plain["rng"], "networks": plain["networks"], "losses": plain["losses"]},
                           {"rng": state["rng"], "networks": state["networks"], "losses": state["losses"]}) == []


@CUDA
@EVERY_SCRIPT
@pytest.mark.parametrize("options", ["", "--precision bf16", "--features-on file", "--features-on memory"])
def test_gpu_runs_probes_and_resumes(here, options):
    run = here(*TINY, "--device", "cuda", *options.split(), "--max-steps", 3)
    assert load(run)["step"] == 3 and "cuda" in load(run)["rng"]
    assert here("--resume", str(run), "--device", "cuda") == run and here.code == 0
    results = read_results(run)
    assert results["device"] == torch.cuda.get_device_name() and results["peak_memory_mb"] > 1
    assert set(results["metrics"]) == expected_tags(("audio", "video", "text"))


@CUDA
@EVERY_SCRIPT
def test_gpu_probes_every_task(here):
    run = here(*TINY, "--epochs", 1, "--device", "cuda")
    for device in ("cuda", "cpu"):
        assert run_here("probes.py", run, "--device", device, "--out", f"{device}.json", "--tasks", *probes.TASKS) == 0
        assert run_here("official/protocol.py", run, "--device", device) == 0
    on_gpu, on_cpu = (set(json.loads((here.cwd / f"{device}.json").read_text())) for device in ("cuda", "cpu"))
    assert on_gpu == on_cpu


@CUDA
@EVERY_SCRIPT
@pytest.mark.parametrize("devices", [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_run_stays_on_its_kind_of_device(here, devices):
    run = here(*TINY, "--device", devices[0], "--max-steps", 2)
    assert "device" in here.error("--resume", str(run), "--device", devices[1])
    assert run_here("probes.py", run, "--device", devices[1]) == 0  # but can be probed anywhere

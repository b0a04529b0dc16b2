"""Files that others made, broke or moved: the right numbers or one line, never zeros for numbers, nor a traceback."""
import os
import signal
import subprocess
import sys

import h5py
import numpy as np
import pytest

import data
from benchmarks import fuzz
from conftest import ROOT, command
from data import Batches, Features, InputError
from probes import Plan

N, T = 24, 3
AUDIO = np.random.default_rng(0).standard_normal((N, T, 4)).astype(np.float32)
BFLOAT16 = "bfloat16"


def write(path, change=lambda h5: None, **changes) -> str:
    """A valid file; `changes` are its datasets by name, `change` edits it while it is open."""
    datasets = {"audio": AUDIO, "video": np.ones((N, T, 5, 6, 8), np.float16), "label": np.arange(N) % 2,
                "classes": ["a", "b"], "split": np.tile(np.uint8([0, 0, 1, 2]), N // 4),
                "id": [f"clip {i}" for i in range(N)]} | changes
    with h5py.File(path, "w") as h5:
        h5.attrs.update(format="cmg-features", version=1)
        for name, values in datasets.items():
            if values is not None:
                h5[name] = values
        change(h5)
    return str(path)


def create(name, **how):
    """A change: the dataset `name` made anew, by the words of h5py"""
    def change(h5):
        if name in h5:
            del h5[name]
        h5.create_dataset(name, **how)
    return change


def create_bfloat16(h5):
    """HDF5 knows the type, NumPy does not."""
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_fields(15, 7, 8, 0, 7)
    kind.set_size(2)
    kind.set_ebias(127)
    del h5["audio"]
    made = h5py.h5d.create(h5.id, b"audio", kind, h5py.h5s.create_simple(AUDIO.shape))
    made.write(h5py.h5s.ALL, h5py.h5s.ALL, AUDIO)
    h5["behind"] = np.zeros((N, T, 2), np.float32)  # so that the file does not end with these


def line_of(action) -> str:
    with pytest.raises(InputError) as caught:
        action()
    assert "\n" not in str(caught.value) and str(caught.value).isprintable()
    return str(caught.value)


def everywhere(path, modalities=()) -> str:
    """The one line that `check`, training and probing all give."""
    ways = [lambda: data.check(path), lambda: Features([path]).shapes(modalities)]
    ways.append(lambda: Batches(Features([path]), ["audio", "video"], "train", 4, "cpu", 0, "file"))
    ways.append(lambda: [Features([path]).read(m, [3]) for m in ("audio", "video")])
    lines = {line_of(way) for way in ways}
    assert len(lines) == 1 and str(path) in next(iter(lines)), lines
    return lines.pop()


# -------------------------------------------------------------------------------------------------- the right numbers
@pytest.mark.parametrize("dtype", [">f2", ">f4", ">f8", "<f8", "f4", BFLOAT16])
@pytest.mark.parametrize("source", ["memory", "file"])
def test_every_stored_float_is_what_training_sees(tmp_path, dtype, source, capsys):
    if dtype == BFLOAT16:
        path = write(tmp_path / "odd.h5", create_bfloat16)
        bits = AUDIO.view(np.uint32)  # rounded to its upper half, ties to even
        expected = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).view(np.float32)
    else:
        path, expected = write(tmp_path / "odd.h5", audio=AUDIO.astype(dtype)), AUDIO.astype(dtype).astype(np.float32)
    data.check(path)
    features = Features([path])
    batches = Batches(features, ["audio"], "train", 12, "cpu", 0, source)
    order = np.flatnonzero(features.split == 0)
    for batch in batches.epoch(0):
        found = {row.tobytes() for row in batch["audio"].numpy()}
    assert found == {row.tobytes() for row in expected[order]}
    assert features.read("audio", [5]).dtype == (np.float16 if dtype == ">f2" else np.float32)
    assert np.array_equal(features.read("audio", [20, 3, 4, 5, 3]), expected[[20, 3, 4, 5, 3]])


def test_a_file_whose_hdf5_begins_later(tmp_path):
    """Other programs may put a block of their own in front."""
    with h5py.File(write(tmp_path / "plain.h5")) as plain, h5py.File(tmp_path / "block.h5", "w", userblock_size=512) as h5:
        h5.attrs.update(plain.attrs)
        for name in plain:
            plain.copy(name, h5)
    assert np.array_equal(Features([tmp_path / "block.h5"]).read("audio", [7, 2]), AUDIO[[7, 2]])


@pytest.mark.parametrize("order", "<>")
def test_whole_numbers_of_every_kind(tmp_path, order):
    """Groups as large as a hash stay apart; torch has no arithmetic for some of these types."""
    group = (np.arange(N, dtype=np.uint64) // 2 + np.uint64(2**63 + 2**60)).astype(f"{order}u8")
    path = write(tmp_path / "odd.h5", group=group, label=(np.arange(N) % 2).astype(">u2"), split=np.zeros(N, ">i4"),
                 **{"events/audio": np.ones((N, T, 2), bool), "mask": np.full((N, T, 5, 6), 2, ">u2")})
    features, every = Features([path]), np.arange(N)
    assert np.array_equal(np.unique(features.read("group", every), return_inverse=True)[1], every // 2)
    assert features.label.tolist() == (every % 2).tolist() and features.label.dtype == features.split.dtype == np.int64
    assert features.read("events/audio", [1]).dtype == bool and features.read("mask", [1]).dtype == np.int64
    assert (features.read("mask", [1]) == 2).all()


def test_what_float32_cannot_hold_is_no_finite_number(tmp_path):
    audio, clip = AUDIO.astype(np.float64), min(set(range(N)) - set(np.linspace(0, N - 1, 16).astype(int)))
    audio[clip, 1, 2] = 1e300  # in a clip that is not looked at before training
    path = write(tmp_path / "huge.h5", audio=audio)
    Features([path]).shapes()
    assert f"'audio' holds inf in clip {clip}, expected finite float32 values" in line_of(lambda: data.check(path))
    assert "'audio' has NaN or infinity" in everywhere(write(tmp_path / "all.h5", audio=np.full((N, T, 4), 1e300)))


# --------------------------------------------------------------------------------------- zeros that nobody ever wrote
@pytest.mark.parametrize("how, found", [
    ({}, "it was never written"), ({"chunks": (4, T, 4)}, "6 of 6 chunks were never written"),
    ({"chunks": (4, T, 4), "compression": 1}, "6 of 6 chunks"),
    ({"external": [("raw.bin", 0, 9999)]}, "in other files")])
def test_a_dataset_that_was_never_written(tmp_path, how, found):
    path = write(tmp_path / "late.h5", create("audio", shape=(N, T, 4), dtype="f4", **how))
    assert f"{path}: dataset 'audio' cannot be read" in everywhere(path) and found in everywhere(path)


def test_a_dataset_that_was_written_in_part(tmp_path):
    def half(h5, name="audio"):
        create(name, shape=(N, T, 4), dtype="f4" if name == "audio" else "u1", chunks=(4, T, 4))(h5)
        h5[name][:8] = 1
    assert "4 of 6 chunks were never written" in everywhere(write(tmp_path / "half.h5", half))
    path = write(tmp_path / "sparse.h5", lambda h5: half(h5, "mask"), mask=None)
    assert "'mask' has shape (24, 3, 4)" in line_of(lambda: Features([path]))
    events = write(tmp_path / "events.h5", lambda h5: half(h5, "events/audio"), classes=["a", "b", "c", "d"])
    assert Features([events]).read("events/audio", [7, 8]).sum() == T * 4  # nothing happens in those left out


@pytest.mark.parametrize("name", ["label", "split", "id", "mask", "events/audio", "group"])
def test_other_datasets_that_were_never_written(tmp_path, name):
    shape = {"mask": (N, T, 5, 6), "events/audio": (N, T, 2)}.get(name, (N,))
    dtype = h5py.string_dtype() if name == "id" else "u1"
    path = write(tmp_path / "late.h5", create(name, shape=shape, dtype=dtype))
    assert line_of(lambda: Features([path])) == (
        f"{path}: dataset '{name}' cannot be read (it was never written); write it again")


@pytest.mark.parametrize("spoil, found", [
    (lambda source: source.unlink(), "source.h5"),
    (lambda source: write(source, create("audio", shape=(N, T, 4), dtype="f4")), "it was never written"),
    (lambda source: write(source, audio=None), "audio")])
def test_a_virtual_dataset_whose_source_is_gone(tmp_path, spoil, found):
    source = tmp_path / "source.h5"
    write(source)
    layout = h5py.VirtualLayout((N, T, 4), "f4")
    layout[:] = h5py.VirtualSource("source.h5", "audio", (N, T, 4))
    path = write(tmp_path / "virtual.h5", lambda h5: h5.create_virtual_dataset("audio", layout), audio=None)
    assert np.array_equal(Features([path]).read("audio", [2, 9]), AUDIO[[2, 9]])
    spoil(source)
    assert f"{path}: dataset 'audio' cannot be read" in everywhere(path) and found in everywhere(path)


def test_a_virtual_dataset_with_a_hole(tmp_path):
    write(tmp_path / "source.h5")
    layout = h5py.VirtualLayout((N, T, 4), "f4")
    layout[:9] = h5py.VirtualSource("source.h5", "audio", (N, T, 4))[:9]
    path = write(tmp_path / "virtual.h5", lambda h5: h5.create_virtual_dataset("audio", layout), audio=None)
    assert "a part of it has no source" in everywhere(path)


@pytest.mark.slow
def test_a_program_ends_well_with_a_virtual_dataset(tmp_path):
    """HDF5 may crash when Python ends, with what was asked about a virtual dataset still in memory."""
    write(tmp_path / "source.h5")
    layout = h5py.VirtualLayout((N, T, 4), "f4")
    layout[:] = h5py.VirtualSource("source.h5", "audio", (N, T, 4))
    path = write(tmp_path / "virtual.h5", lambda h5: h5.create_virtual_dataset("audio", layout), audio=None)
    source = ("import sys; from data import *; sys.excepthook = explain_input_errors\n"
              "features = Features(sys.argv[1:]); features.shapes()\n"
              "made = Batches(features, ['audio'], 'train', 4, 'cpu', 0, 'file'); next(made.epoch(0))")
    ran = [sys.executable, "-c", source, path]
    assert subprocess.run(ran, cwd=ROOT).returncode == 0
    (tmp_path / "source.h5").unlink()
    done = subprocess.run(ran, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {path}: dataset 'audio'")


# ---------------------------------------------------------------------------------------------- one line that helps
@pytest.mark.parametrize("shape, refused", [
    ((64, 7, 7), True), ((3, 24, 24), True), ((512, 7, 8), True), ((64, 1, 1), True), ((7, 7, 64), False),
    ((5, 6, 8), False), ((5, 5, 4), False), ((1, 1, 9), False), ((40, 8, 1), False), ((3, 2, 2), True)])
def test_maps_whose_channels_come_first(tmp_path, shape, refused):
    path = write(tmp_path / "maps.h5", video=np.ones((N, T, *shape), np.float16))
    if refused:
        assert f"{(N, T, *shape)}, which looks like (N, T, d, H, W), expected (N, T, H, W, d)" in everywhere(path)
    else:
        assert Features([path]).shapes()["video"] == (T, *shape)


@pytest.mark.parametrize("name", ["video.rgb", "type", "training", "od\nd", "esc\x1b[1m"])
def test_names_that_no_network_can_have(tmp_path, name):
    path = write(tmp_path / "name.h5", **{name: AUDIO})
    assert f"{path}: rename dataset {name!r}" in line_of(lambda: data.check(path)) == line_of(Features([path]).shapes)
    assert list(Features([path]).shapes(("audio", "video"))) == ["audio", "video"]


@pytest.mark.parametrize("name, value, found", [
    ("version", "1", "('cmg-features', '1'), expected ('cmg-features', 1)"), ("version", [1, 0], "'version' is of"),
    ("version", 1.5, "'version' is of"), ("version", np.nan, "'version' cannot be read"),
    ("name", [1.5, 2], "'name' is of"), ("format", h5py.Empty("f4"), "'format' is of"),
    ("source", np.bytes_(b"\xff"), "'source' cannot be read")])
def test_attributes_of_other_kinds(tmp_path, name, value, found):
    path = write(tmp_path / "attribute.h5", lambda h5: h5.attrs.__setitem__(name, value))
    assert found in line_of(lambda: Features([path])) and path in line_of(lambda: Features([path]))


@pytest.mark.parametrize("value", ["AVE", np.array(["AVE"], h5py.string_dtype()), np.bytes_(b"AVE"),
                                   np.array([b"AVE"])])
def test_text_of_every_kind(tmp_path, value):
    change = {"source": value, "name": value, "format": np.array([b"cmg-features"]), "version": np.array([1.0])}
    features = Features([write(tmp_path / "text.h5", lambda h5: h5.attrs.update(change))])
    assert features.name == features.files[0].source == "AVE"


def test_links_that_lead_nowhere(tmp_path):
    for name in ("label", "mask", "events", "classes", "group", "split", "id"):
        path = write(tmp_path / f"{name}.h5", lambda h5: h5.__setitem__(name, h5py.SoftLink("/gone")), **{name: None})
        assert f"{path}: dataset '{name}'" in line_of(lambda: Features([path]))


def test_a_file_that_is_locked_being_written_or_forbidden(tmp_path):
    """Each has a line of its own: copying it again would not help."""
    path = write(tmp_path / "open.h5")
    opened = ("import h5py, sys, time; h5 = h5py.File(sys.argv[1], 'r+', libver='latest'); {}; print(1, flush=True)\n"
              "time.sleep(99)")
    for state, found in (("0", "another program has it open"), ("h5.swmr_mode = True", "h5clear -s")):
        with subprocess.Popen([sys.executable, "-c", opened.format(state), path], stdout=subprocess.PIPE) as other:
            other.stdout.readline()
            assert found in line_of(lambda: Features([path])) and "copy" not in line_of(lambda: Features([path]))
            other.kill()
        path = write(tmp_path / "swmr.h5")
        with h5py.File(path, "w", libver="latest") as h5:
            h5.attrs["format"] = "cmg-features"


@pytest.mark.parametrize("said, helps", [
    ("Unable to open file (unable to open file: errno = 13, error message = 'Permission denied')", "may not read"),
    ("Unable to open file (unable to open file: errno = 24, error message = 'Too many open files')", "ulimit -n"),
    ("Can't read data (required filter 'zstd' is not registered)", "h5repack"),
    ("Can't open directory or file (/usr/local/hdf5/lib/plugin). Please verify its existence", "h5repack"),
    ("Unable to open file (truncated file: eof = 96, sblock->base_addr = 0, stored_eof = 2048)", "copy it again")])
def test_what_helps_follows_what_hdf5_says(tmp_path, monkeypatch, said, helps):
    def fail(*args, **keywords):
        raise OSError(f"{said}\nand more lines")
    path = write(tmp_path / "fine.h5")
    monkeypatch.setattr(h5py, "File", fail)
    message = line_of(lambda: Features([path]))
    assert said in message and helps in message.split(said)[1] and "more lines" not in message


def test_clips_of_two_splits_and_chunks_of_many_clips_are_noticed(tmp_path, capsys):
    path = write(tmp_path / "twice.h5", create("audio", data=AUDIO, chunks=(12, T, 4), compression=1),
                 id=[f"clip {i // 2}" for i in range(N)])
    features = Features([path])
    assert capsys.readouterr().err == (
        f"note: {path}: 6 clips, such as 'clip 1', are in two splits or files\n")
    Batches(features, ["audio", "video"], "train", 4, "cpu", 0, "file")
    assert "for a clip of audio its chunk of 12 clips is read, every time" in capsys.readouterr().err
    Batches(features, ["audio", "video"], "train", 4, "cpu", 0, "memory")
    assert capsys.readouterr().err == ""


def test_neighbours_are_read_together(tmp_path, monkeypatch):
    """A chunk of many clips is unpacked once, where clips follow each other: in `check`, and on the way into memory."""
    path = write(tmp_path / "packed.h5", create("audio", data=AUDIO, chunks=(12, T, 4), compression=1))
    features, calls = Features([path]), []
    features.require("audio")
    original = h5py.h5s.create_simple
    monkeypatch.setattr(h5py.h5s, "create_simple", lambda shape: calls.append(shape[0]) or original(shape))
    assert np.array_equal(features.read("audio", np.array([4, 5, 6, 2, 3, 9])), AUDIO[[4, 5, 6, 2, 3, 9]])
    assert calls == [3, 2, 1]
    assert [len(clips) for _, clips in features.blocks("audio", np.arange(N))][-1] == N


def plan_of(path, *tasks, known=(), score="softmax", target=None) -> Plan:
    features = Features([path])
    return Plan(features, features.shapes(), "cpu", tasks, known, score, target and Features([target]))


@pytest.mark.parametrize("known, score, said", [
    (("1",), "softmax", ["1"]), (("1", "2", "0,2", "2,2"), "softmax", ["1", "2,2"]), (("1",), "logit", []),
    (("1",), "energy", []), ((), "softmax", ["1"])])  # of three classes one is known by default
def test_softmax_of_a_single_known_class_is_noted(tmp_path, capsys, known, score, said):
    path = write(tmp_path / "three.h5", label=np.arange(N) // 4 % 3, classes=["a", "b", "c"])
    assert list(plan_of(path, "open_set", known=known, score=score).tasks) == ["open_set"]
    assert capsys.readouterr().err.splitlines() == [
        f"note: --known {entry}: of a single known class softmax is always sure; try --score logit" for entry in said]


def test_an_open_set_of_one_class_is_told_in_the_words_of_the_data(tmp_path, capsys):
    """Not of a flag that nobody gave: one class in the file, or one in common with the target."""
    one = write(tmp_path / "one.h5", label=np.zeros(N, int), classes=["dog"])
    two = write(tmp_path / "two.h5", classes=["dog", "cat"])
    for source, target, files in ((one, None, one), (two, one, f"{two} and {one}")):
        line = f"{files}: open_set needs two classes, found dog"
        assert line_of(lambda: plan_of(source, "open_set", target=target)) == line
        assert list(plan_of(source, target=target).tasks) == ["classification"]
        assert f"will not be probed: open_set ({line})" in capsys.readouterr().out.splitlines()
    assert "--known 1,2: give a number" in line_of(lambda: plan_of(two, known=("1,2",)))


# ---------------------------------------------------------------------------------------------------------- any bytes
@pytest.mark.slow
def test_damaged_files_are_read_or_refused_in_one_line():
    """Some are endless inside HDF5, which ends with Ctrl-C: see below."""
    found = fuzz.fuzz("features", 200, limit=5)
    assert set(found) <= {"fine", "one line", "endless"} and found["one line"] > 80 and found["fine"] > 40
    assert found["endless"] <= 4


@pytest.mark.slow
def test_damaged_checkpoints_are_read_or_refused_in_one_line():
    found = fuzz.fuzz("checkpoint", 60)
    assert set(found) == {"fine", "one line"} and found["one line"] > 20


@pytest.mark.slow
def test_ctrl_c_ends_what_is_endless_inside_a_library(tmp_path):
    """A library that does not return never lets Python see the signal: here one that only waits."""
    path = write(tmp_path / "fine.h5")
    (tmp_path / "sitecustomize.py").write_text(
        "import ctypes, h5py\n"
        "def endless(*args, **keywords):\n"
        "    print('opening', flush=True)\n"
        "    while True:\n"
        "        try: ctypes.CDLL(None).sleep(1)\n"
        "        except BaseException: pass\n"
        "h5py.File = endless\n")
    for script in (("data.py", "check", path), ("micu.py", "--data", path)):
        argv, keywords = command(*script)
        keywords["env"]["PYTHONPATH"] += f":{tmp_path}"
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(argv, cwd=tmp_path, **pipes, **keywords) as process:
            assert process.stdout.readline() == b"opening\n"
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == -signal.SIGINT and process.stderr.read() == b""


# ----------------------------------------------------------------------------------------------------- missing modalities
def test_clips_without_a_modality_are_counted_and_can_be_left_out(tmp_path, monkeypatch, capsys):
    """Two clips have no audio, one of them and a third no video."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    with h5py.File("holes.h5", "w") as h5:
        h5.attrs.update(format="cmg-features", version=1, name="holes")
        audio, video = rng.standard_normal((8, 3, 4)).astype("f2"), rng.standard_normal((8, 3, 2, 2, 5))
        audio[[0, 5]], video[5], video[7, 1, 0, 1, 2] = np.nan, np.nan, np.inf
        h5["audio"], h5["video"] = audio, video
        h5["id"], h5["classes"] = [f"clip {i}" for i in range(8)], ["a", "b"]
        h5["label"], h5["split"], h5["events/audio"] = np.arange(8) % 2, np.arange(8) // 3, np.ones((8, 3, 2), "u1")
    for action in (lambda: data.check("holes.h5"), lambda: Features(["holes.h5"]).shapes()):
        with pytest.raises(InputError, match="'audio' has NaN or infinity in 2 of 8 clips.*data.py drop FILE"):
            action()
    data.drop("holes.h5", "whole.h5")
    assert "5 of 8 clips; left out for want of audio 2, video 2" in capsys.readouterr().out
    data.check("whole.h5")
    keep = [1, 2, 3, 4, 6]
    with h5py.File("holes.h5") as old, h5py.File("whole.h5") as new:
        assert list(new["classes"]) == list(old["classes"]) and dict(new.attrs) == dict(old.attrs)
        for name in ("audio", "video", "id", "label", "split", "events/audio"):
            assert new[name].dtype == old[name].dtype and np.array_equal(new[name][:], old[name][:][keep])
    with h5py.File("holes.h5", "r+") as h5:  # what is none of the schema stays behind
        h5["codebook"], h5["meta/fps"] = np.zeros((5, 4)), 25
    data.drop("holes.h5", "again.h5")
    with h5py.File("again.h5") as again:
        assert len(again["audio"]) == 5 and not {"codebook", "meta"} & set(again)
    with pytest.raises(InputError, match="--out whole.h5: is there already"):
        data.drop("holes.h5", "whole.h5")
    with pytest.raises(InputError, match="cannot be written"):
        data.drop("holes.h5", "absent/whole.h5")


CTRL_C = """
import os, signal, sys
import data
stop = lambda *args, **keywords: signal.raise_signal(signal.SIGINT)
signal.signal(signal.SIGINT, signal.SIG_DFL)  # as in every program here, while it opens files
data.h5py.File.create_dataset = data.digits.write = stop
for ask in (lambda: data.drop("mine.h5", "new.h5"), lambda: data.compose("digits", "new.h5"),
            lambda: data.Features(["digits"], ".")):
    try:
        ask()
    except KeyboardInterrupt:
        print(*os.listdir(), signal.getsignal(signal.SIGINT) is signal.SIG_DFL)
"""


def test_ctrl_c_leaves_no_half_written_file(tmp_path):
    write(tmp_path / "mine.h5")
    done = subprocess.run([sys.executable, "-c", CTRL_C], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.stdout.splitlines() == 3 * ["mine.h5 True"], done.stderr

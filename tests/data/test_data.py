"""data.py: the schema and its errors, and batches from device, memory and file."""
import gc
import os
import threading
import time

import h5py
import numpy as np
import pytest
import torch

import data
from conftest import captured_here, edit, hide_posix, run_here
from data import Batches, FeatureFile, Features, InputError

N, T = 24, 3  # clips and segments of the generic file; its splits are 0, 0, 1, 2, repeated
SOURCES = ["device", "memory", "file"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def write(path, rows=slice(None), **storage) -> str:
    """A valid file with every dataset of the schema, or some rows of it; `storage`: chunks, compression."""
    rng = np.random.default_rng(0)
    datasets = {"audio": rng.standard_normal((N, T, 4)).astype(np.float16),
                "video": rng.standard_normal((N, T, 5, 6, 8)).astype(np.float32),
                "touch": rng.standard_normal((N, T, 2)),
                "label": np.arange(N) % 5 - 1, "events/audio": rng.integers(0, 2, (N, T, 4), np.uint8),
                "mask": rng.integers(0, 5, (N, T, 10, 12), np.uint8), "group": np.arange(N) // 2,
                "split": np.tile(np.array([0, 0, 1, 2], np.uint8), N // 4), "id": [f"clip {i}" for i in range(N)]}
    with h5py.File(path, "w") as h5:
        h5.attrs.update(format="cmg-features", version=1, name="generic", source="test", license="MIT")
        h5["classes"] = ["a", "b", "c", "d"]
        for name, values in datasets.items():
            packed = {"chunks": (2, *np.shape(values)[1:]), **storage} if storage and name != "id" else {}
            h5.create_dataset(name, data=values[rows], **packed)
    return str(path)


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> str:
    return write(tmp_path_factory.mktemp("generic") / "valid.h5")


def error_of(action) -> str:
    """The message of the InputError that `action` raises, which is one line."""
    with pytest.raises(InputError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------- schema


@pytest.mark.parametrize("name", ["mel.spec", "keys", "type"])
def test_modalities_that_no_network_can_be_named_after(tmp_path, name):
    with h5py.File(tmp_path / "odd.h5", "w") as h5:
        h5.attrs.update(format="cmg-features", version=1)
        h5["audio"], h5[name] = np.zeros((4, 2, 3), np.float32), np.zeros((4, 2, 3), np.float32)
        h5["split"], h5["id"] = np.zeros(4, np.uint8), list("abcd")
    with pytest.raises(data.InputError, match=f"odd.h5: rename dataset '{name}'"):
        data.Features([str(tmp_path / "odd.h5")]).shapes()


def test_a_valid_file(valid):
    file = FeatureFile(valid)
    assert list(file.modalities) == ["audio", "video", "touch"]  # the known ones first, in their order
    assert (file.clips, file.segments, file.classes) == (N, T, ["a", "b", "c", "d"])
    features = Features([valid])
    assert features.shape == {"audio": (T, 4), "video": (T, 5, 6, 8), "touch": (T, 2)}
    assert [len(features.clips(split)) for split in ("train", "val", "test")] == [12, 6, 6]
    index = np.array([7, 3, 3, 20])
    with h5py.File(valid) as h5:
        for name in ("audio", "video", "mask", "events/audio"):
            values = features.read(name, index)
            assert values.dtype == h5[name].dtype and np.array_equal(values, h5[name][:][index])
        assert np.array_equal(features.read("touch", index), h5["touch"][:][index].astype(np.float32))


@pytest.mark.parametrize("name", ["label", "events", "mask", "group", "classes", "touch", "video"])
def test_what_is_optional(valid, tmp_path, name):
    rest = {} if name != "classes" else {"label": None, "events": None}  # these speak of classes
    features = Features([edit(valid, tmp_path / "less.h5", **{name: None}, **rest)])
    assert len(features) == N and name not in features.modalities


def audio(**values):
    """The audio of the generic file's shape, with one value placed at clip, segment, channel 0."""
    array = np.zeros((N, T, 4), np.float32)
    array[values.get("clip", 0), 1, 0] = values.get("value", 0)
    return array


@pytest.mark.parametrize("changes, dataset, found, expected", [
    ({"audio": np.zeros((N - 1, T, 4), "f4")}, "audio", f"({N - 1}, {T})", f"({N}, {T})"),
    ({"video": np.zeros((N, T + 1, 5, 6, 8), "f4")}, "video", f"({N}, {T + 1})", f"({N}, {T})"),
    ({"audio": np.zeros((N, 4), "f4")}, "audio", f"({N}, 4)", "(N, T, d) or (N, T, H, W, d)"),
    ({"audio": np.zeros((N, T, 2, 2), "f4")}, "audio", f"({N}, {T}, 2, 2)", "(N, T, d) or (N, T, H, W, d)"),
    ({"audio": np.zeros((N, T, 0), "f4")}, "audio", f"({N}, {T}, 0)", "(N, T, d)"),
    ({"audio": np.zeros((N, T, 4), "i4")}, "audio", "int32", "float16, float32 or float64"),
    ({"audio": np.zeros((N, T, 4), "u1")}, "audio", "uint8", "float16, float32 or float64"),
    ({"audio": audio(value=np.nan)}, "audio", "NaN", "finite"),
    ({"audio": audio(value=np.inf, clip=N - 1)}, "audio", "infinity", "finite"),
    ({"label": np.full(N, 4)}, "label", "4..4", "-1..3"),
    ({"label": np.full(N, -2)}, "label", "-2", "-1..3"),
    ({"label": np.zeros(N - 1, int)}, "label", str(N - 1), str(N)),
    ({"group": np.zeros(N + 1, int)}, "group", str(N + 1), str(N)),
    ({"mask": np.zeros((N - 2, T, 2, 2), "u1")}, "mask", str(N - 2), str(N)),
    ({"mask": np.zeros((N, T + 1, 2, 2), "u1")}, "mask", f"{T + 1}", f"{T}"),
    ({"events": np.zeros((N, T, 4), "u1")}, "events", "", ""),
    ({"classes": np.arange(4)}, "classes", "int64", "str"),
    ({"split": 0}, "split", "()", f"({N},)"),
    ({"split": np.full(N, 3, "u1")}, "split", "3", "0 train, 1 val, 2 test"),
    ({"events__audio": np.zeros((N, T, 3), "u1")}, "events/audio", f"({N}, {T}, 3)", f"({N}, {T}, 4)"),
    ({"events__audio": np.zeros((N, T), "u1")}, "events/audio", f"({N}, {T})", f"({N}, {T}, 4)"),
    ({"id": None}, "id", "missing", ""),
    ({"audio": None, "video": None, "touch": None}, "", "no modality", "'audio'"),
])
def test_schema_errors_name_file_dataset_found_and_expected(valid, tmp_path, changes, dataset, found, expected):
    path = edit(valid, tmp_path / "broken.h5", **changes)
    message = error_of(lambda: Features([path]).shapes())
    assert path in message and dataset in message and found in message and expected in message


@pytest.mark.parametrize("attributes, found", [({"format": "other"}, "other"), ({"version": 2}, "2"),
                                               ({"format": None}, "None"), ({"version": None}, "None")])
def test_wrong_format_or_version(valid, tmp_path, attributes, found):
    path = edit(valid, tmp_path / "other.h5")
    with h5py.File(path, "r+") as h5:
        for name, value in attributes.items():
            del h5.attrs[name]
            if value is not None:
                h5.attrs[name] = value
    message = error_of(lambda: FeatureFile(path))
    assert path in message and found in message and "expected ('cmg-features', 1)" in message


def test_missing_unreadable_and_truncated_files(valid, tmp_path):
    assert "absent.h5: no such file" in error_of(lambda: FeatureFile(tmp_path / "absent.h5"))
    assert "no such file" in error_of(lambda: FeatureFile(tmp_path))  # a folder
    text = tmp_path / "text.h5"
    text.write_text("not HDF5 at all")
    assert "text.h5: the HDF5 file cannot be read" in error_of(lambda: FeatureFile(text))
    path = edit(valid, tmp_path / "short.h5")
    os.truncate(path, os.path.getsize(path) // 2)
    assert "short.h5: the HDF5 file cannot be read" in error_of(lambda: FeatureFile(path))


def test_a_dataset_that_h5py_cannot_represent(valid, tmp_path):
    """NumPy has no HDF5 times, a link may lead nowhere, a name may be no UTF-8, a dataset may hold nothing at all."""
    path = edit(valid, tmp_path / "odd.h5", audio=None)
    with h5py.File(path, "r+") as h5:
        h5py.h5d.create(h5.id, b"audio", h5py.h5t.UNIX_D32LE, h5py.h5s.create_simple((N, T, 4)))
    assert f"{path}: dataset 'audio' cannot be read" in error_of(Features([path]).shapes)
    for number, value in enumerate((h5py.SoftLink("/nowhere"), h5py.ExternalLink("absent.h5", "/audio"))):
        broken = edit(valid, tmp_path / f"{number}.h5", touch=value)
        assert f"{broken}: dataset 'touch' is missing" in error_of(Features([broken]).shapes)
        assert list(Features([broken]).shapes(("audio", "video"))) == ["audio", "video"]
    empty = edit(valid, tmp_path / "empty.h5", audio=h5py.Empty("f4"))
    assert "'audio' has shape None" in error_of(Features([empty]).shapes)
    empty = edit(valid, tmp_path / "empty_label.h5", label=h5py.Empty("i4"))
    assert "'label' has shape None" in error_of(lambda: FeatureFile(empty))
    classes = edit(valid, tmp_path / "classes.h5", classes=np.array([b"a", b"b", b"c", b"\xff"]))
    assert f"{classes}: dataset 'classes' cannot be read" in error_of(lambda: FeatureFile(classes))


def test_what_is_no_modality_is_left_alone(valid, tmp_path):
    """Notes of other programs, as groups, text and numbers of a clip; but nothing that could be features."""
    path = edit(valid, tmp_path / "notes.h5", notes__fps=np.zeros(3), fps=np.full(N, 25.0), names=["somebody"] * N)
    assert Features([path]).modalities == ["audio", "video", "touch"]
    wrong = edit(valid, tmp_path / "wrong.h5", smell=np.zeros((N, T, 4), int))
    assert "dataset 'smell' has dtype int64" in error_of(Features([wrong]).shapes)


def test_a_modality_that_nobody_wants_may_hold_anything(valid, tmp_path):
    path = edit(valid, tmp_path / "spoilt.h5", video=np.full((N, T, 5, 6, 8), np.nan, np.float32))
    features = Features([path])
    assert list(features.shapes(("audio", "touch"))) == ["audio", "touch"]
    assert "'video' has NaN" in error_of(features.shapes) == error_of(lambda: features.read("video", [0]))


@pytest.mark.parametrize("read", [lambda path: Features([path]).shapes(), data.check])
def test_a_corrupt_chunk(tmp_path, read, capsys):
    path = write(tmp_path / "corrupt.h5", compression=4)
    with h5py.File(path) as h5:
        chunk = h5["audio"].id.get_chunk_info(0 if read is not data.check else 1)
    with open(path, "r+b") as stream:
        stream.seek(chunk.byte_offset)
        stream.write(bytes(chunk.size))
    message = error_of(lambda: read(path))
    assert path in message and "'audio'" in message


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_check_reads_every_value(valid, tmp_path, value, capsys):
    clip = min(set(range(N)) - set(np.linspace(0, N - 1, 16).astype(int)))  # opening does not look at this one
    path = edit(valid, tmp_path / "nan.h5", audio=audio(value=value, clip=clip))
    FeatureFile(path)
    message = error_of(lambda: data.check(path))
    assert path in message and "'audio'" in message and f"clip {clip}" in message and "finite" in message


@pytest.mark.parametrize("name, value, allowed", [("events__audio", 2, "0 or 1"), ("events__audio", 255, "0 or 1"),
                                                  ("mask", 5, "0..4"), ("mask", 254, "0..4")])
def test_check_knows_the_range_of_events_and_masks(valid, tmp_path, name, value, allowed):
    with h5py.File(valid) as h5:
        values = h5[name.replace("__", "/")][:]
    values[7, 1, ..., 2] = value
    path = edit(valid, tmp_path / "range.h5", **{name: values})
    message = error_of(lambda: data.check(path))
    assert f"{path}: dataset '{name.replace('__', '/')}' holds {value} in clip 7, expected {allowed}" in message
    if name == "mask":
        values[7] = 255  # nobody drew this one
        data.check(edit(valid, tmp_path / "unknown.h5", mask=values))


def test_check_prints_what_is_inside(valid, capsys):
    assert run_here("data.py", "check", valid) == 0
    printed = capsys.readouterr().out
    with h5py.File(valid) as h5:
        for name in ("audio", "video", "touch", "label", "events/audio", "mask", "split"):
            (line,) = [line for line in printed.splitlines() if line.split()[0] == name]
            assert str(h5[name].shape) in line and str(h5[name].dtype) in line
        cells, labels = h5["video"].shape[2:4], h5["label"][:]
    assert f"{N} clips" in printed and "4 classes" in printed and "train 12, val 6, test 6" in printed
    assert f"video: maps of {cells[0]} x {cells[1]} cells" in printed and "audio: maps" not in printed
    assert f"class 0 'a': {(labels == 0).sum()} clips" in printed


def test_axes_that_are_swapped_and_numbers_that_overflow(valid, tmp_path):
    with h5py.File(valid) as h5:
        swapped, large = h5["touch"][:].swapaxes(0, 1), np.full(h5["audio"].shape, np.inf, "f2")
    path = edit(valid, tmp_path / "swapped.h5", touch=swapped)
    found = error_of(lambda: FeatureFile(path).modality("touch"))
    assert f"N, T = ({T}, {N})" in found and "N as 'id' and T as 'audio'" in found
    large = FeatureFile(edit(valid, tmp_path / "large.h5", audio=large))
    assert "float16 holds nothing above 65504" in error_of(lambda: large.modality("audio"))
    assert f"in {N} of {N} clips, expected finite" in error_of(lambda: large.modality("audio"))


def test_several_files_must_fit_together(valid, tmp_path):
    wide = edit(valid, tmp_path / "wide.h5", audio=np.zeros((N, T, 5), "f4"))
    assert error_of(Features([valid, wide]).shapes) == f"{wide}: clips of 'audio' are ({T}, 5), before ({T}, 4)"
    assert list(Features([valid, wide]).shapes(("video", "touch"))) == ["video", "touch"]
    for classes, differ in (("abce", "d, e"), ("bacd", "their order")):
        other = edit(valid, tmp_path / f"{classes}.h5", classes=list(classes))
        assert f"{other}: classes differ from those of {valid}: {differ}" == error_of(lambda: Features([valid, other]))
    again = tmp_path / "link.h5"
    again.symlink_to(valid)
    assert error_of(lambda: Features([valid, again])) == f"{again}: this file is given twice"
    assert Features([valid, edit(valid, tmp_path / "no_touch.h5", touch=None)]).modalities == ["audio", "video"]


def test_shapes_of_the_wanted_modalities(valid, tmp_path):
    features = Features([valid])
    assert list(features.shapes(()).items()) == list(features.shape.items()) == list(features.shapes().items())
    assert list(features.shapes(("touch", "audio")).items()) == [("audio", (T, 4)), ("touch", (T, 2))]  # their order
    message = error_of(lambda: features.shapes(("audio", "smell")))
    assert message == "--modalities smell: the data holds audio video touch"
    for one in (("audio",), ("audio", "audio")):
        message = error_of(lambda: features.shapes(one))
        assert message == "--modalities audio: at least two are needed; the data holds audio video touch"
    single = Features([edit(valid, tmp_path / "single.h5", video=None, touch=None)])
    assert "the data holds audio" in error_of(single.shapes)


def test_events_of_one_file_only(valid, tmp_path):
    """A file without events cannot say which clips hold one event; as alone, all of its clips count."""
    features = Features([valid, edit(valid, tmp_path / "plain.h5", events=None)])
    single = features.single_event(np.arange(2 * N))
    assert set(single) == set(Features([valid]).single_event(np.arange(N))) | set(range(N, 2 * N))


def test_files_of_different_precision_lose_nothing(valid, tmp_path):
    large = edit(valid, tmp_path / "large.h5", audio=np.full((N, T, 4), 1e5, np.float32))
    assert float(Features([valid, large]).read("audio", np.array([0, N])).max()) == 1e5


# ------------------------------------------------------------------------------------------------------------ batches


def batches(path, source, split="train", batch_size=5, seed=1, device="cpu", modalities=("audio", "video", "touch")):
    paths = [path] if isinstance(path, str) else path
    return Batches(Features(paths), list(modalities), split, batch_size, device, seed, source)


def assert_same_batches(left, right):
    left, right = list(left), list(right)
    assert len(left) == len(right) > 0
    for a, b in zip(left, right):
        assert a.keys() == b.keys() and all(torch.equal(a[m], b[m]) for m in a)


def clip_numbers(path, epoch, split=0) -> list:
    """The clips of an epoch's batches, in order, found again by their audio."""
    with h5py.File(path) as h5:
        number = {row.astype(np.float32).tobytes(): i for i, row in enumerate(h5["audio"][:])}
    return [number[row.numpy().tobytes()] for batch in epoch for row in batch["audio"]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("source", SOURCES + ["auto"])
def test_batches_are_the_same_from_everywhere(valid, source, device):
    for epoch in (0, 3):
        expected = list(batches(valid, "memory").epoch(epoch))
        actual = list(batches(valid, source, device=device).epoch(epoch))
        assert all(v.dtype == torch.float32 and v.device.type == device for batch in actual for v in batch.values())
        assert_same_batches([{m: v.cpu() for m, v in batch.items()} for batch in actual], expected)
        assert [tuple(v.shape) for v in actual[0].values()] == [(5, T, 4), (5, T, 5, 6, 8), (5, T, 2)]


@pytest.mark.parametrize("source", SOURCES)
def test_an_epoch_can_start_anywhere(valid, source):
    made = batches(valid, source, batch_size=2)
    whole = list(made.epoch(2))
    assert len(made) == len(whole) == 6
    for start in (1, 4):
        assert_same_batches(made.epoch(2, start), whole[start:])
    assert list(made.epoch(2, 6)) == []


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("step, num_steps", [(0, 5), (0, 1), (1, 5), (2, 4), (3, 7), (2, 2), (5, 5), (6, 5), (4, 6)])
def test_a_stream_goes_through_epochs(valid, source, step, num_steps):
    made = batches(valid, source)
    epochs = [batch for epoch in range(4) for batch in made.epoch(epoch)]
    assert len(made) == 2 and len(epochs) == 8
    streamed = list(made.stream(step, num_steps))
    assert len(streamed) == max(0, num_steps - step)
    for actual, expected in zip(streamed, epochs[step:num_steps]):
        assert_same_batches([actual], [expected])


def test_the_file_is_read_a_little_ahead_and_no_further(valid, monkeypatch):
    read, original = [], Features.read
    monkeypatch.setattr(Features, "read", lambda *args: read.append(args[1]) or original(*args))
    assert len(list(batches(valid, "file", batch_size=2).stream(3, 8))) == 5 and read.count("audio") == 5
    read.clear()
    epoch = batches(valid, "file", batch_size=1).epoch(0)
    next(epoch)
    time.sleep(0.2)  # enough for all 12 batches
    assert read.count("audio") == 5  # this one and four more


@pytest.mark.parametrize("source", SOURCES)
def test_an_epoch_is_a_permutation_of_its_split(valid, source):
    train = set(np.flatnonzero(np.arange(N) % 4 < 2))
    made = batches(valid, source, batch_size=2)
    orders = [clip_numbers(valid, made.epoch(epoch)) for epoch in range(3)]
    assert all(len(order) == 12 and set(order) == train for order in orders)
    assert len({tuple(order) for order in orders}) == 3  # every epoch another order
    assert clip_numbers(valid, batches(valid, source, batch_size=2, seed=2).epoch(0)) not in orders
    incomplete = clip_numbers(valid, batches(valid, source).epoch(0))
    assert len(incomplete) == len(set(incomplete)) == 10 and set(incomplete) < train  # the last batch is dropped
    assert set(clip_numbers(valid, batches(valid, source, "test", 6).epoch(0))) == set(range(3, N, 4))


@pytest.mark.parametrize("source", SOURCES)
def test_several_files_are_one_set(valid, tmp_path, source):
    cuts = [slice(0, 7), slice(7, 8), slice(8, N)]
    paths = [write(tmp_path / f"{i}.h5", rows) for i, rows in enumerate(cuts)]
    parts = Features(paths)
    assert len(parts) == N and np.array_equal(parts.label, Features([valid]).label)
    index = np.array([23, 0, 7, 8, 6, 7])
    for name in ("video", "mask", "events/audio"):
        assert np.array_equal(parts.read(name, index), Features([valid]).read(name, index))
    assert np.array_equal(parts.single_event(np.arange(N)), Features([valid]).single_event(np.arange(N)))
    assert_same_batches(batches(paths, source).epoch(1), batches(valid, source).epoch(1))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("storage", [{"compression": None}, {"compression": 4, "shuffle": True}])
def test_chunked_and_compressed_files(valid, tmp_path, source, storage):
    path = write(tmp_path / "chunked.h5", **storage)
    with h5py.File(path) as h5:
        assert h5["video"].chunks
    assert_same_batches(batches(path, source).epoch(1), batches(valid, source).epoch(1))


def test_files_of_two_dtypes_keep_the_wider_one_as_far_as_training_sees_it(valid, tmp_path):
    with h5py.File(valid) as h5:
        audio, train = h5["audio"][:].astype(np.float64) + 2.0**-12, h5["split"][:] == 0  # float16 holds few of these
    paths = [valid, edit(valid, tmp_path / "wide.h5", audio=audio)]
    resident, streamed = batches(paths, "memory"), batches(paths, "file")
    assert resident.resident["audio"].dtype == torch.float32
    assert np.array_equal(resident.resident["audio"][-12:], audio[train].astype(np.float32))
    assert_same_batches(resident.epoch(1), streamed.epoch(1))


def test_no_file_at_all():
    assert "no feature file given" in error_of(lambda: Features([]))


def system(monkeypatch, root, available: int, **files) -> None:
    """A machine with so many bytes available, and other files of its system below `root`: `a__b` is a/b."""
    files = {"proc__meminfo": f"MemTotal: 99999999 kB\nMemAvailable:  {available // 1024} kB\n"} | files
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(data, "SYSTEM", root)


GB = 1 << 30
V2 = {"proc__self__cgroup": "0::/job/step\n", "sys__fs__cgroup__memory.max": "max\n",
      "sys__fs__cgroup__job__memory.max": f"{2 * GB}\n",
      "sys__fs__cgroup__job__memory.stat": f"anon {GB // 2}\nfile 77\ninactive_anon 5\n"}
V1 = {"proc__self__cgroup": "4:cpu:/\n3:memory:/of/the/host\n",
      "sys__fs__cgroup__memory__memory.limit_in_bytes": f"{GB}\n",
      "sys__fs__cgroup__memory__memory.stat": f"cache 5\nrss 7\ntotal_rss {GB // 4}\n"}


@pytest.mark.parametrize("files, available, expected", [
    ({}, 3 * GB, 3 * GB), (V2, 3 * GB, 3 * GB // 2), (V2, GB, GB), (V1, 3 * GB, 3 * GB // 4),
    ({"proc__self__cgroup": "nonsense"}, GB, GB)], ids=["no limit", "cluster", "full machine", "container", "other"])
def test_memory_is_what_the_machine_and_the_container_leave(tmp_path, monkeypatch, files, available, expected):
    system(monkeypatch, tmp_path, available, **files)
    assert data.available_memory() == expected


def test_the_source_follows_the_memory_that_is_left(valid, tmp_path, monkeypatch):
    assert batches(valid, "auto").source == "memory"
    limit = {"sys__fs__cgroup__memory__memory.limit_in_bytes": f"{GB // 4 + 9000}\n"}  # 9000 bytes are left
    system(monkeypatch, tmp_path, 4 * GB, **V1 | limit)
    assert batches(valid, "auto").source == "file"
    assert_same_batches(batches(valid, "auto").epoch(0), batches(valid, "memory").epoch(0))


def test_a_system_without_the_names_of_posix(valid, tmp_path, monkeypatch):
    """Windows has neither these nor /proc."""
    expected = list(batches(valid, "file").epoch(1))
    hide_posix(monkeypatch)
    monkeypatch.setattr(data, "SYSTEM", tmp_path)
    assert data.available_memory() == 8 << 30
    assert batches(valid, "auto").source == "memory"
    assert_same_batches(batches(valid, "file").epoch(1), expected)


def test_batches_reject_what_cannot_work(valid, tmp_path):
    message = error_of(lambda: batches(valid, "auto", batch_size=13))
    assert "--batch-size 13" in message and "train" in message and "12 clips" in message
    path = edit(valid, tmp_path / "no_train.h5", split=np.full(N, 2, np.uint8))
    message = error_of(lambda: batches(path, "auto"))
    assert path in message and "train split is empty" in message


@pytest.mark.parametrize("storage", [{}, {"compression": 1}])
def test_a_file_that_shrinks_ends_the_epoch_with_an_input_error(tmp_path, storage):
    path = write(tmp_path / "shrinks.h5", **storage)
    epoch = batches(path, "file", batch_size=1).epoch(0)
    next(epoch)
    os.truncate(path, 2048)
    message = error_of(lambda: list(epoch))
    assert path in message and "cannot be read" in message


@pytest.mark.parametrize("through", ["epoch", "stream"])
@pytest.mark.parametrize("leave", ["close", "forget", "raise"])
def test_an_epoch_left_early_leaves_no_thread(valid, leave, through):
    before = threading.active_count()
    made = batches(valid, "file", batch_size=1)
    epoch = made.epoch(0) if through == "epoch" else made.stream(13, 40)
    next(epoch)
    assert threading.active_count() == before + 1
    if leave == "close":
        epoch.close()
    elif leave == "raise":
        with pytest.raises(KeyError):
            epoch.throw(KeyError("in the loop"))
    del epoch
    gc.collect()
    assert threading.active_count() == before, "a thread inside torch when Python ends aborts it"

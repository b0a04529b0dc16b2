"""data.py: the schema and its errors, the composition of digit clips, and batches from device, memory and file."""
import gc
import importlib.util
import inspect
import os
import threading
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import data
from conftest import captured_here, edit, run_here
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
    assert file.modalities == ["audio", "video", "touch"]  # the known ones first, in their order
    assert (file.clips, file.segments, file.classes) == (N, T, ["a", "b", "c", "d"])
    features = Features([valid])
    assert features.shape == {"audio": (T, 4), "video": (T, 5, 6, 8), "touch": (T, 2)}
    assert [len(features.clips(split)) for split in ("train", "val", "test")] == [12, 6, 6]
    index = np.array([7, 3, 3, 20])
    with h5py.File(valid) as h5:
        for name in ("audio", "video", "mask", "events/audio"):
            values = features.read(name, index)
            assert values.dtype == h5[name].dtype and np.array_equal(values, h5[name][:][index])


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
    ({"split": 0}, "split", "()", "(N,)"),
    ({"split": np.full(N, 3, "u1")}, "split", "3", "0 train, 1 val, 2 test"),
    ({"events__audio": np.zeros((N, T, 3), "u1")}, "events/audio", f"({N}, {T}, 3)", f"({N}, {T}, 4)"),
    ({"events__audio": np.zeros((N, T), "u1")}, "events/audio", f"({N}, {T})", f"({N}, {T}, 4)"),
    ({"split": None}, "split", "missing", ""),
    ({"id": None}, "id", "missing", ""),
    ({"audio": None, "video": None, "touch": None}, "", "no modality", "'audio'"),
])
def test_schema_errors_name_file_dataset_found_and_expected(valid, tmp_path, changes, dataset, found, expected):
    path = edit(valid, tmp_path / "broken.h5", **changes)
    message = error_of(lambda: Features([path]))
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
    assert path in message and found in message and "cmg-features 1" in message


def test_missing_unreadable_and_truncated_files(valid, tmp_path):
    assert "absent.h5: no such file" in error_of(lambda: FeatureFile(tmp_path / "absent.h5"))
    assert "no such file" in error_of(lambda: FeatureFile(tmp_path))  # a folder
    text = tmp_path / "text.h5"
    text.write_text("not HDF5 at all")
    assert "text.h5: not a readable HDF5 file" in error_of(lambda: FeatureFile(text))
    path = edit(valid, tmp_path / "short.h5")
    os.truncate(path, os.path.getsize(path) // 2)
    assert "short.h5: not a readable HDF5 file" in error_of(lambda: FeatureFile(path))


def test_a_dataset_that_h5py_cannot_represent(valid, tmp_path):
    """NumPy has no HDF5 times, a link may lead nowhere, a name may be no UTF-8, a dataset may hold nothing at all."""
    path = edit(valid, tmp_path / "odd.h5", audio=None, label=None, classes=None)
    with h5py.File(path, "r+") as h5:
        h5py.h5d.create(h5.id, b"audio", h5py.h5t.UNIX_D32LE, h5py.h5s.create_simple((N, T, 4)))
    assert f"{path}: dataset 'audio' cannot be read" in error_of(lambda: FeatureFile(path))
    for number, value in enumerate((h5py.SoftLink("/nowhere"), h5py.ExternalLink("absent.h5", "/audio"))):
        broken = edit(valid, tmp_path / f"{number}.h5", touch=value)
        assert f"{broken}: dataset 'touch' is missing" in error_of(lambda: FeatureFile(broken))
    empty = edit(valid, tmp_path / "empty.h5", audio=h5py.Empty("f4"), label=h5py.Empty("i4"))
    assert "'audio' has shape None" in error_of(lambda: FeatureFile(empty))
    empty = edit(valid, tmp_path / "empty_label.h5", label=h5py.Empty("i4"))
    assert "'label' has shape None" in error_of(lambda: FeatureFile(empty))
    classes = edit(valid, tmp_path / "classes.h5", classes=np.array([b"a", b"b", b"c", b"\xff"]))
    assert f"{classes}: dataset 'classes' cannot be read" in error_of(lambda: FeatureFile(classes))


def test_a_file_is_closed_with_its_object(valid):
    opened = FeatureFile(valid)
    descriptor = opened.raw
    assert os.path.samestat(os.fstat(descriptor), os.stat(valid))
    del opened
    gc.collect()
    with pytest.raises(OSError):
        os.fstat(descriptor)


def test_a_group_among_the_modalities(valid, tmp_path):
    path = edit(valid, tmp_path / "group.h5", smell__inner=np.zeros(3))
    message = error_of(lambda: FeatureFile(path))
    assert path in message and "smell" in message


@pytest.mark.parametrize("read", [lambda path: Features([path]), data.check])
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


@pytest.mark.parametrize("name, value, allowed", [("events__audio", 2, "0..1"), ("events__audio", 255, "0..1"),
                                                  ("mask", 5, "0..4"), ("mask", 254, "0..4")])
def test_check_knows_the_range_of_events_and_masks(valid, tmp_path, name, value, allowed):
    with h5py.File(valid) as h5:
        values = h5[name.replace("__", "/")][:]
    values[7, 1, ..., 2] = value
    path = edit(valid, tmp_path / "range.h5", **{name: values})
    message = error_of(lambda: data.check(path))
    assert f"{path}: dataset '{name.replace('__', '/')}' holds {value} in clip 7, not {allowed}" in message
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
    assert f"{N} clips" in printed and "4 classes" in printed and "train 12, val 6, test 6" in printed


def test_several_files_must_fit_together(valid, tmp_path):
    wide = edit(valid, tmp_path / "wide.h5", audio=np.zeros((N, T, 5), "f4"))
    assert "wide.h5" in error_of(lambda: Features([valid, wide]))
    classes = edit(valid, tmp_path / "classes.h5", classes=["a", "b", "c", "e"])
    assert "classes.h5" in error_of(lambda: Features([valid, classes]))
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


# ------------------------------------------------------------------------------------------------ digits: composition

CLIPS = 80  # composed from each split


@pytest.fixture(scope="module")
def base():
    with h5py.File(data.DIGITS_FILE) as h5:
        yield h5


@pytest.fixture(scope="module", params=[0, 1, 2])
def composed(request, base) -> tuple:
    """(split, clips): the arrays of 80 clips of one split."""
    return request.param, data.compose(base, request.param, CLIPS, seed=0)


def intervals(on) -> tuple:
    """(N, T) bool -> first and one past the last segment of the one interval of each row."""
    start, end = on.argmax(1), on.shape[1] - on[:, ::-1].argmax(1)
    assert on.any(1).all() and (end - start == on.sum(1)).all(), "not one interval"
    return start, end


def unpatch(video):
    """(..., 7, 7, 64) grid of 8x8-pixel patches -> (..., 56, 56) canvas"""
    grid = video.reshape(*video.shape[:-1], 8, 8)
    return np.concatenate(list(np.moveaxis(np.concatenate(list(np.moveaxis(grid, -3, 0)), -1), -3, 0)), -2)


def nearest(queries, rows):
    """Index of the closest row by Euclidean distance: (Q, D), (N, D) -> (Q,)"""
    return np.array([np.square(rows - query).sum(1).argmin() for query in queries.astype(np.float32)])


def test_composition_is_a_pure_function_of_the_seed(tmp_path):
    def content(name, **keywords):
        data.write_digits(str(tmp_path / name), sizes=(40, 20, 20), **keywords)
        with h5py.File(tmp_path / name) as h5:
            found = {}
            h5.visititems(lambda key, item: found.update({key: item[:]}) if isinstance(item, h5py.Dataset) else None)
        return found

    np.random.seed(1)
    first = content("first.h5", seed=0)
    np.random.seed(2)
    again, other = content("again.h5"), content("other.h5", seed=1)  # seed 0 is the default
    assert first.keys() == again.keys() == other.keys()
    assert all(np.array_equal(first[name], again[name]) for name in first)
    differ = {name for name in first if not np.array_equal(first[name], other[name])}
    assert differ == set(first) - {"classes", "id", "split"}
    assert os.listdir(tmp_path) and not [name for name in os.listdir(tmp_path) if not name.endswith(".h5")]


def test_composed_file_fits_the_schema(small):
    features = Features([small])
    assert features.modalities == ["audio", "video", "text"] and features.name == "digits"
    assert features.shape == {"audio": (10, 130), "video": (10, 7, 7, 64), "text": (10, 384)}
    assert [len(features.clips(split)) for split in ("train", "val", "test")] == [160, 60, 80]
    assert len(features.single_event(np.arange(300))) == 225
    with h5py.File(small) as h5:
        assert h5["video"].chunks is None and h5["mask"].shape == (300, 10, 56, 56)
        assert len(set(h5["id"][:])) == 300 and h5.attrs["license"] and h5.attrs["source"]
        assert sorted(np.unique(h5["label"][:])) == list(range(10))
    data.check(small)


@pytest.mark.parametrize("kind, item", [("audio", "recording"), ("image", "pixels"), ("text", "sentence")])
def test_splits_of_the_base_share_nothing(base, kind, item):
    split, label = base[kind]["split"][:], base[kind]["label"][:]
    if kind == "audio":
        ends = base["audio/length"][:].cumsum()
        rows = [recording.tobytes() for recording in np.split(base["audio/frames"][:], ends[:-1])]
    else:
        rows = [row.tobytes() if kind == "image" else row for row in base[kind][item][:]]
    parts = [{row for row, s in zip(rows, split) if s == wanted} for wanted in range(3)]
    assert sum(map(len, parts)) == len(set(rows)) and all(parts)
    for wanted in range(3):
        assert set(label[split == wanted]) == set(range(10))
    if kind == "text":  # nor a sentence with another digit word in it
        words = "zero one two three four five six seven eight nine".split()
        templates = [{row.decode().replace(words[d], "{}") for row, d, s in zip(rows, label, split) if s == wanted}
                     for wanted in range(3)]
        assert sum(map(len, templates)) == len(set().union(*templates))


def test_a_quarter_of_the_clips_has_two_events(composed):
    _, clips = composed
    heard, visible = clips["events/audio"].astype(bool), clips["events/video"].astype(bool)  # (N, T, 10)
    two = heard.any(1).sum(1) == 2
    assert two.sum() == CLIPS // 4 and (heard.any(1).sum(1)[~two] == 1).all()
    assert (heard.any(1) == visible.any(1)).all()  # the same classes in both modalities
    assert (heard.sum(2) <= 1).all()  # one sound at a time
    intervals(heard.any(2))  # without a gap between the two
    for clip in np.flatnonzero(two):
        assert set(visible[clip].sum(1)) <= {0, 2}  # both in the picture all the time
        for c in np.flatnonzero(heard[clip].any(0)):
            intervals(heard[clip, None, :, c])  # each sounds in one piece
    assert (visible.sum(2) <= 1)[~two].all()


def test_label_is_the_class_heard_first(composed):
    _, clips = composed
    start, _ = intervals(clips["events/audio"].any(2))
    assert (clips["events/audio"][np.arange(CLIPS), start].argmax(1) == clips["label"]).all()


def test_video_is_the_audio_interval_shifted_by_at_most_one_segment(composed):
    _, clips = composed
    (heard, silent), (shown, hidden) = (intervals(clips[f"events/{m}"].any(2)) for m in ("audio", "video"))
    shifts = []
    for a, b, c, d in zip(heard, silent, shown, hidden):
        fitting = [s for s in (-1, 0, 1) if (c, d) == (max(a + s, 0), min(b + s, 10))]
        assert fitting, f"audio {a}..{b}, video {c}..{d}"
        shifts += fitting
    assert all(shifts.count(s) > CLIPS / 6 for s in (-1, 0, 1))  # each about a third
    assert (silent - heard >= 4).all() and len(set(heard)) > 3  # of several lengths and places


def test_mask_shows_the_visible_classes_and_nothing_else(composed):
    _, clips = composed
    present = (clips["mask"].reshape(CLIPS, 10, -1, 1) == np.arange(1, 11)).any(2)  # (N, T, 10)
    assert (present == clips["events/video"].astype(bool)).all()
    assert clips["mask"].max() <= 10


def test_masked_digits_are_the_bright_pixels(composed):
    _, clips = composed
    canvas = unpatch(clips["video"].astype(np.float32))
    assert canvas.shape == clips["mask"].shape
    for clip, t in np.argwhere(clips["mask"].any((2, 3))):
        frame, mask = canvas[clip, t], clips["mask"][clip, t]
        for c in np.unique(mask[mask > 0]):
            assert frame[mask == c].min() > -0.2 and frame[mask == c].mean() > 0.5
    assert canvas[clips["mask"] == 0].mean() < 0.05  # clutter and the digits' faint pixels


def test_one_digit_walks_and_three_cells_of_clutter_stand_still(composed):
    _, clips = composed
    bright = clips["video"].astype(np.float32).max(-1).reshape(CLIPS, 10, 49) > 0.6  # (N, T, cells)
    digits = clips["mask"].reshape(CLIPS, 10, 7, 8, 7, 8).any((3, 5)).reshape(CLIPS, 10, 49)
    expected = clips["events/video"].sum(2)
    assert (digits.sum(2) == expected).all()  # one cell each, never the same
    hidden = expected == 0
    assert hidden.any() and (bright.sum(2)[hidden] == 3).all()
    for clip in range(CLIPS):
        still = bright[clip][hidden[clip]]
        assert (still == still[:1]).all()
        assert (bright[clip] | digits[clip]).sum(1).max() <= 3 + expected[clip].max()
    moves = []
    for clip in np.flatnonzero(expected.max(1) == 1):
        t, cell = np.nonzero(digits[clip])
        moves.append(np.abs(np.diff(np.stack(np.divmod(cell, 7)), axis=1)).max(0))
    moves = np.concatenate(moves)
    assert moves.max() == 1 and 0.5 < moves.mean() < 1  # 8 of 9 draws move, less at the borders


@pytest.fixture(scope="module")
def words(base):
    """All recordings as a segment can hold them, with 16 cuts of up to 15 % off start and end: (3000, 16, 130)"""
    frames, length = base["audio/frames"][:], base["audio/length"][:]
    train = np.repeat(base["audio/split"][:] == 0, length)
    frames = (frames - frames[train].mean(0)) / frames[train].std(0)
    cuts = [(first, 1 - last) for first in np.linspace(0, 0.15, 4) for last in np.linspace(0, 0.15, 4)]
    places = np.stack([np.linspace(*cut, 10) for cut in cuts])  # (16, 10) from 0, the start, to 1, the end
    return np.stack([np.stack([np.interp(places * (len(r) - 1), np.arange(len(r)), column) for column in r.T], -1)
                     for r in np.split(frames, length.cumsum()[:-1])]).reshape(len(length), 16, 130).astype(np.float32)


def test_sounds_are_recordings_of_the_split_and_class(composed, base, words):
    split, clips = composed
    events = np.argwhere(clips["events/audio"].any(1))  # clip, class
    on = [np.flatnonzero(clips["events/audio"][clip, :, c]) for clip, c in events]
    audio = clips["audio"].astype(np.float32)
    found = []
    for segments in ([t[0] for t in on], [t[-1] for t in on]):  # of every event
        heard = audio[events[:, 0], segments]
        distance = np.square(words).sum(2) - 2 * np.einsum("qd,rcd->qrc", heard, words, optimize=True)
        found.append(distance.min(2).argmin(1))
        assert (base["audio/split"][:][found[-1]] == split).mean() > 0.95
        assert (base["audio/label"][:][found[-1]] == events[:, 1]).mean() > 0.95
    assert (found[0] == found[1]).mean() > 0.9  # one recording an event
    silent = audio[~clips["events/audio"].any(2)]
    assert 0.09 < silent.std() < 0.11 and abs(silent.mean()) < 0.01


def test_pictures_are_images_of_the_split_and_class(composed, base):
    split, clips = composed
    images = base["image/pixels"][:].reshape(-1, 64).astype(np.float32) / 16
    cells = clips["mask"].reshape(CLIPS, 10, 7, 8, 7, 8).max((3, 5))  # (N, T, 7, 7) class + 1 or 0
    queries, classes = [], []
    for clip, c in np.argwhere(clips["events/video"].any(1)):
        queries.append(clips["video"][clip][cells[clip] == c + 1].astype(np.float32).mean(0))
        classes.append(c)
    found = nearest(np.stack(queries), images)
    assert (base["image/split"][:][found] == split).all() and (base["image/label"][:][found] == classes).all()


def test_text_is_a_sentence_of_the_split_about_the_label(composed, base):
    split, clips = composed
    tokens, members = base["text/tokens"][:], base["text/split"][:] == split
    rows = {token.tobytes(): (label, s) for token, label, s in zip(tokens, base["text/label"][:], members)}
    assert all(rows[text.tobytes()] == (label, True) for text, label in zip(clips["text"], clips["label"]))
    assert len({text.tobytes() for text in clips["text"]}) > 20


def test_compose_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sizes = ("--train", 8, "--val", 4, "--test", 4)
    assert run_here("data.py", "compose", "digits", "--out", "d.h5", *sizes, "--seed", 3) == 0
    assert "16 clips, 10 classes" in capsys.readouterr().out
    data.write_digits("same.h5", (8, 4, 4), seed=3)
    assert Path("d.h5").read_bytes() == Path("same.h5").read_bytes()
    assert "absent" in error_of(lambda: data.compose_set("digits", "absent/d.h5"))
    assert "--train" in error_of(lambda: data.compose_set("digits", "e.h5", train=0))
    assert not os.path.exists("e.h5")
    os.mkdir("folder.h5")
    assert "--out folder.h5: cannot be written" in error_of(lambda: data.compose_set("digits", "folder.h5", 1, 1, 1))
    assert not list(tmp_path.glob("tmp*"))


def test_the_command_line_explains_itself(tmp_path):
    help = captured_here("data.py", "--help", cwd=tmp_path)
    assert help.returncode == 0 and "compose digits --out FILE" in help.stdout and "check FILE" in help.stdout
    unknown = captured_here("data.py", "compose", "letters", "--out", "l.h5", cwd=tmp_path)
    assert unknown.returncode == 2 and "letters" in unknown.stderr + unknown.stdout


@pytest.fixture
def few(monkeypatch):
    """The embedded set has 16 clips."""
    monkeypatch.setattr(data.write_digits, "__defaults__", ((8, 4, 4), 0))


def test_an_embedded_set_is_composed_once(few, valid, tmp_path):
    runs = tmp_path / "new" / "runs"
    features = Features(["digits"], str(runs))
    (path,) = map(str, runs.iterdir())
    assert features.files[0].path == path and len(features) == 16 and features.name == "digits"
    written = os.stat(path).st_mtime_ns
    assert Features(("digits",), runs).sha256() == features.sha256() and os.stat(path).st_mtime_ns == written
    both = Features([path, "digits"], str(runs))
    assert len(both) == 32 and os.stat(path).st_mtime_ns == written
    assert [file.path for file in Features([valid, valid], "nowhere").files] == [valid, valid]
    assert not os.path.exists("nowhere")
    (tmp_path / "file").touch()
    assert "--runs-dir" in error_of(lambda: Features(["digits"], str(tmp_path / "file" / "below")))


def test_earlier_composed_files_are_removed_and_others_left(few, tmp_path, monkeypatch):
    reader = Features(["digits"], str(tmp_path))
    before = reader.files[0].path
    mine = ["digits-mine.h5", "digits-0123abc.h5", "digits-0123ABCD.h5", "digits.h5", "other-01234567.h5"]
    for name in (*mine, "digits-01234567.h5"):
        (tmp_path / name).touch()
    Features(["digits"], str(tmp_path))
    assert (tmp_path / "digits-01234567.h5").exists()  # nothing was composed, so nothing goes
    monkeypatch.setattr(data, "CLUTTER", 2)
    now = Features(["digits"], str(tmp_path)).files[0].path
    assert now != before and {str(path) for path in tmp_path.iterdir()} == {now, *(str(tmp_path / m) for m in mine)}
    assert reader.read("audio", np.arange(16)).any()  # who has it open goes on reading


def test_an_earlier_composed_file_that_cannot_be_removed(few, tmp_path, monkeypatch):
    (tmp_path / "digits-01234567.h5").mkdir()  # as one that Windows holds back
    assert len(Features(["digits"], str(tmp_path))) == 16


def names_used(function) -> set:
    """The names of data.py's globals that a function mentions, those inside of nested ones too."""
    codes = [function.__code__]
    for code in codes:
        codes += [constant for constant in code.co_consts if inspect.iscode(constant)]
    return {name for code in codes for name in code.co_names if name in vars(data)}


def test_the_key_covers_all_that_composing_uses(monkeypatch):
    key = data.digits_key()
    functions, constants, waiting = set(), set(), ["write_digits"]
    while waiting:
        name = waiting.pop()
        functions.add(name)
        for used in names_used(getattr(data, name)) - functions:
            value = getattr(data, used)
            if inspect.isfunction(value) and value.__module__ == "data":
                waiting.append(used)
            elif isinstance(value, (int, float, str, tuple)):
                constants.add(used)
    assert constants >= {"T", "GRID", "PATCH", "PIXEL_NOISE", "AUDIO_NOISE", "CLUTTER"} and len(functions) == 5
    for name in constants:
        with monkeypatch.context() as patch:
            patch.setattr(data, name, (getattr(data, name), "changed"))
            assert data.digits_key() != key, name
    source = inspect.getsource
    for name in functions:
        with monkeypatch.context() as patch:
            patch.setattr(inspect, "getsource", lambda f: source(f) + "# changed" * (f is getattr(data, name)))
            assert data.digits_key() != key, name
    assert data.digits_key() == key


def test_the_key_follows_the_base_and_not_the_rest_of_the_module(tmp_path, monkeypatch):
    text = Path(data.__file__).read_text()

    def key_with(old, new):
        assert text.count(old) == 1
        copy = tmp_path / f"copy{len(list(tmp_path.iterdir()))}.py"
        copy.write_text(text.replace(old, new))
        spec = importlib.util.spec_from_file_location(copy.stem, copy)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.DIGITS_FILE = data.DIGITS_FILE
        return module.digits_key()

    assert key_with("class Batches:", "# a remark\nclass Batches:") == data.digits_key()
    assert key_with("rng.uniform(0, 0.15,", "rng.uniform(0, 0.16,") != data.digits_key()
    base, before = tmp_path / "base.h5", data.digits_key()
    base.write_bytes(data.DIGITS_FILE.read_bytes() + b"more")
    monkeypatch.setattr(data, "DIGITS_FILE", base)
    assert data.digits_key() != before


def test_the_first_of_several_processes_composes(few, tmp_path, monkeypatch):
    """The others wait for it, and compose for themselves only if they do not see its folder."""
    told = []
    monkeypatch.setattr(data, "all_gather_object", lambda value: told.append(list(tmp_path.glob("digits-*.h5"))))
    monkeypatch.setattr(data, "RANK", 0)
    path = data.composed_digits(str(tmp_path))
    assert told == [[Path(path)]]  # told when it was there
    monkeypatch.setattr(data, "RANK", 1)
    monkeypatch.setattr(data, "all_gather_object", lambda value: os.replace(tmp_path / "late", path))
    os.replace(path, tmp_path / "late")
    assert data.composed_digits(str(tmp_path)) == path and os.listdir(tmp_path) == [os.path.basename(path)]


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


def test_files_of_two_dtypes_keep_the_wider_one(valid, tmp_path):
    with h5py.File(valid) as h5:
        audio, train = h5["audio"][:].astype(np.float64) + 2.0**-40, h5["split"][:] == 0  # nothing narrower holds it
    paths = [valid, edit(valid, tmp_path / "wide.h5", audio=audio)]
    resident, streamed = batches(paths, "memory"), batches(paths, "file")
    assert resident.resident["audio"].dtype == torch.float64 and resident.resident["video"].dtype != torch.float64
    assert np.array_equal(resident.resident["audio"][-12:], audio[train])
    assert_same_batches(resident.epoch(1), streamed.epoch(1))


def test_no_file_at_all():
    assert "no feature file given" in error_of(lambda: Features([]))


@pytest.mark.parametrize("storage", [{}, {"compression": 1}])
def test_a_system_without_the_calls_of_posix(valid, tmp_path, monkeypatch, storage):
    """Windows has neither `os.preadv` nor `os.sysconf`."""
    path = write(tmp_path / "posix.h5", **storage)
    expected = list(batches(path, "file").epoch(1))
    monkeypatch.delattr(os, "preadv")
    monkeypatch.delattr(os, "sysconf")
    assert_same_batches(batches(path, "file").epoch(1), expected)
    assert batches(path, "auto").source == "memory"
    assert data.physical_memory() == 8 << 30
    monkeypatch.setattr(data, "physical_memory", lambda: 1000)
    assert batches(path, "auto").source == "file"
    epoch = batches(path, "file", batch_size=1).epoch(0)
    next(epoch)
    os.truncate(path, 2048)
    assert "cannot be read" in error_of(lambda: list(epoch))


def test_the_source_follows_the_free_memory(valid, monkeypatch):
    assert batches(valid, "auto").source == "memory"
    monkeypatch.setattr(os, "sysconf", lambda name: 10)
    assert batches(valid, "auto").source == "file"
    assert_same_batches(batches(valid, "auto").epoch(0), batches(valid, "memory").epoch(0))


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

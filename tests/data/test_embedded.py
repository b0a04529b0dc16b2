"""The embedded sets: the composition of digit clips, the clips of the watch, and where their files are kept."""
import os
from pathlib import Path

import h5py
import numpy as np
import pytest

import data
from conftest import captured_here, run_here
from data import Features, InputError
from datasets import digits, watch


def error_of(action) -> str:
    """The message of the InputError that `action` raises, which is one line."""
    with pytest.raises(InputError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------------- digits
CLIPS = 80  # composed from each split


@pytest.fixture(scope="module")
def base():
    with h5py.File(digits.BASE) as h5:
        yield h5


@pytest.fixture(scope="module", params=[0, 1, 2])
def composed(request, base) -> tuple:
    """(split, clips): the arrays of 80 clips of one split."""
    return request.param, digits.compose(base, request.param, CLIPS, seed=0)


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
        digits.write(str(tmp_path / name), sizes=(40, 20, 20), **keywords)
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
    sizes = ("--sizes", 8, 4, 4)
    assert run_here("data.py", "compose", "digits", "--out", "d.h5", *sizes, "--seed", 3) == 0
    assert "16 clips, 10 classes" in capsys.readouterr().out
    digits.write("same.h5", (8, 4, 4), seed=3)
    assert Path("d.h5").read_bytes() == Path("same.h5").read_bytes()
    assert "absent" in error_of(lambda: data.compose("digits", "absent/d.h5"))
    assert "--sizes" in error_of(lambda: data.compose("digits", "e.h5", (0, 1, 1)))
    assert "watch are fixed" in error_of(lambda: data.compose("watch", "e.h5", seed=2))
    assert not os.path.exists("e.h5")
    os.mkdir("folder.h5")
    assert "--out folder.h5: cannot be written" in error_of(lambda: data.compose("digits", "folder.h5", (1, 1, 1)))
    assert not list(tmp_path.glob("tmp*"))


def test_the_command_line_explains_itself(tmp_path):
    help = captured_here("data.py", "--help", cwd=tmp_path)
    assert help.returncode == 0 and "compose digits --out FILE" in help.stdout and "check FILE" in help.stdout
    unknown = captured_here("data.py", "compose", "letters", "--out", "l.h5", cwd=tmp_path)
    assert unknown.returncode == 2 and "letters" in unknown.stderr + unknown.stdout


@pytest.fixture
def few(monkeypatch):
    """The embedded set has 16 clips."""
    monkeypatch.setattr(digits.write, "__defaults__", ((8, 4, 4), 0))


def test_an_embedded_set_is_composed_once(few, tiny, tmp_path):
    runs = tmp_path / "new" / "runs"
    features = Features(["digits"], str(runs))
    (path,) = map(str, runs.iterdir())
    assert features.files[0].path == path and len(features) == 16 and features.name == "digits"
    written = os.stat(path).st_mtime_ns
    assert Features(("digits",), runs).sha256() == features.sha256() and os.stat(path).st_mtime_ns == written
    assert "this file is given twice" in error_of(lambda: Features([path, "digits"], str(runs)))
    assert len(Features([tiny, "digits"], str(runs))) == len(Features([tiny], "nowhere")) + 16
    assert os.stat(path).st_mtime_ns == written
    assert not os.path.exists("nowhere")
    (tmp_path / "file").touch()
    assert "--runs-dir" in error_of(lambda: Features(["digits"], str(tmp_path / "file" / "below")))


def test_earlier_composed_files_are_removed_and_others_left(few, tmp_path, monkeypatch):
    reader = Features(["digits"], str(tmp_path))
    before = reader.files[0].path
    mine = ["digits-mine.h5", "digits-20251127.h5", f"digits-{8 * 'AB'}.h5", "digits.h5", "other-0123456701234567.h5"]
    for name in (*mine, "digits-0123456701234567.h5"):
        (tmp_path / name).touch()
    Features(["digits"], str(tmp_path))
    assert (tmp_path / "digits-0123456701234567.h5").exists()  # nothing was composed, so nothing goes
    old = Path(before).rename(tmp_path / "digits-7654321076543210.h5")  # the file of an earlier recipe
    now = Features(["digits"], str(tmp_path)).files[0].path
    assert now == before and not old.exists() and {str(path) for path in tmp_path.iterdir()} == {now, *(str(tmp_path / m) for m in mine)}
    assert reader.read("audio", np.arange(16)).any()  # who has it open goes on reading


def test_an_earlier_composed_file_that_cannot_be_removed(few, tmp_path, monkeypatch):
    (tmp_path / "digits-0123456701234567.h5").mkdir()  # as one that Windows holds back
    assert len(Features(["digits"], str(tmp_path))) == 16


def test_the_key_follows_the_base_and_the_program(few, tmp_path, monkeypatch):
    program = tmp_path / "program" / "digits.py"
    program.parent.mkdir()
    composer = Path(digits.__file__).read_text()

    def key(text="", more=b""):
        program.write_text(composer + text)
        program.with_suffix(".h5").write_bytes(digits.BASE.read_bytes() + more)
        monkeypatch.setattr(digits, "__file__", str(program))
        return Path(data.embedded("digits", str(tmp_path))).stem

    first = key()
    assert len({first, key("# changed"), key(more=b"more")}) == 3 and key() == first


@pytest.mark.parametrize("spoil", [lambda base: base.unlink(), lambda base: os.truncate(base, 9000),
                                   lambda base: base.write_text("version https://git-lfs.github.com/spec/v1")])
def test_a_damaged_base_is_not_blamed_on_the_folder(tmp_path, monkeypatch, spoil):
    program = tmp_path / "program" / "digits.py"
    program.parent.mkdir()
    for suffix in (".py", ".h5"):
        program.with_suffix(suffix).write_bytes(Path(digits.__file__).with_suffix(suffix).read_bytes())
    monkeypatch.setattr(digits, "__file__", str(program))
    spoil(program.with_suffix(".h5"))
    for ask in (lambda: Features(["digits"], str(tmp_path)), lambda: data.compose("digits", str(tmp_path / "out.h5"))):
        message = error_of(ask)
        assert message.startswith(f"{program.with_suffix('.h5')}: cannot be read") and "--" not in message


def test_the_first_of_several_processes_composes(few, tmp_path, monkeypatch):
    """The others wait for it, and compose for themselves only if they do not see its folder."""
    told = []
    monkeypatch.setattr(data, "all_gather_object", lambda value: told.append(list(tmp_path.glob("digits-*.h5"))))
    monkeypatch.setattr(data, "RANK", 0)
    path = data.embedded("digits", str(tmp_path))
    assert told == [[Path(path)]]  # told when it was there
    monkeypatch.setattr(data, "RANK", 1)
    monkeypatch.setattr(data, "all_gather_object", lambda value: os.replace(tmp_path / "late", path))
    os.replace(path, tmp_path / "late")
    assert data.embedded("digits", str(tmp_path)) == path and os.listdir(tmp_path) == [os.path.basename(path)]


# -------------------------------------------------------------------------------------------------------------- watch
@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> Features:
    return Features(["watch"], str(tmp_path_factory.mktemp("watch")))


@pytest.fixture(scope="module")
def recordings() -> dict:
    with h5py.File(Path(watch.__file__).with_name("watch.h5")) as h5:
        return {name: h5[name][:] for name in h5}


def test_clips_of_the_watch_are_cut_from_one_recording_each(watched, recordings):
    """Anew, one clip at a time: standardised by the people trained on, ten half seconds, both sensors at one moment."""
    assert watched.shape == {"accelerometer": (10, 75), "gyroscope": (10, 75)} and len(watched.classes) == 7
    person, starts = recordings["person"], np.cumsum([0, *recordings["length"]])
    assert person.min() == 1 and person.max() == 10 and len(person) == 140 and starts[-1] == 244102
    taught = [recordings["samples"][starts[r]:starts[r + 1]].astype(float) for r in np.flatnonzero(person < 7)]
    mean, std = np.concatenate(taught).mean(0), np.concatenate(taught).std(0)
    clip = 0
    ids, groups = watched.files[0].h5["id"].asstr()[:], watched.read("group", np.arange(len(watched)))
    for r in range(140):
        for second in range((recordings["length"][r] - 250) // 50 + 1):
            if clip % 29 == 0:  # some of each recording
                begin = starts[r] + 50 * second
                for sensor, axes in (("accelerometer", slice(0, 3)), ("gyroscope", slice(3, 6))):
                    want = (recordings["samples"][begin:begin + 250].astype(float) - mean) / std
                    found = watched.read(sensor, np.array([clip]))[0].reshape(250, 3)
                    np.testing.assert_allclose(found, want[:, axes], rtol=1e-3, atol=1e-6)
            assert watched.label[clip] == recordings["exercise"][r] and groups[clip] == r
            assert watched.split[clip] == (0 if person[r] < 7 else 1 if person[r] < 9 else 2)
            assert ids[clip] == f"recording {r:03d}, second {second}"
            clip += 1
    assert clip == len(watched) and [len(watched.clips(split)) for split in data.SPLITS] == [2417, 922, 918]


def test_nobody_is_in_two_splits_and_everybody_did_every_exercise(watched, recordings):
    person = recordings["person"][watched.read("group", np.arange(len(watched)))]
    assert [set(person[watched.split == split]) for split in range(3)] == [{1, 2, 3, 4, 5, 6}, {7, 8}, {9, 10}]
    for p in range(1, 11):
        assert set(watched.label[person == p]) == set(range(7))


def test_the_watch_can_be_written_to_a_file(tmp_path, capsys):
    data.compose("watch", str(tmp_path / "mine.h5"))
    assert "4257 clips, 7 classes" in capsys.readouterr().out

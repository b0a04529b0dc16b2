"""official.convert: the authors' archives and lists as their specification has them, and what must be refused."""
import csv
import importlib.util
import io
import json
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
import types
import zipfile
from functools import lru_cache
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch

import data
from conftest import ROOT, captured_here, command
from data import Features
from official import convert as converters
from official.convert import (Options, fit, kept_vectors, list_ave, list_ave_avvp, list_avvp, list_ucf51, list_ucf_vgg,
                              list_vggsound)
from official.safe_pickle import read_archive, unpickle
from run import InputError

pytestmark = pytest.mark.official

T = 10
TRAIN, VAL, TEST = 0, 1, 2
OFFICIAL = ROOT.parent / "shared" / "official_lists"
real_lists = pytest.mark.skipif(not OFFICIAL.is_dir(), reason="the authors' list files are not here")


# ------------------------------------------------------------------------------------------- files as the authors' are


class PathPickler(pickle._Pickler):
    """Writes NumPy's functions under the module paths of NumPy 1 (numpy.core) or NumPy 2 (numpy._core)."""
    dispatch = dict(pickle._Pickler.dispatch)

    def __init__(self, stream, protocol, core):
        super().__init__(stream, protocol)
        self.core = core

    def save_global(self, obj, name=None):
        module, name = re.sub(r"^numpy\._?core", self.core, obj.__module__), obj.__qualname__
        if self.proto >= 4:
            self.save(module)
            self.save(name)
            self.write(pickle.STACK_GLOBAL)
        else:
            self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())
        self.memoize(obj)

    dispatch[types.FunctionType] = save_global


class Python2Pickler(PathPickler):
    """Writes bytes as Python 2 wrote its str."""
    dispatch = dict(PathPickler.dispatch)

    def save_bytes(self, obj):
        self.write(pickle.BINSTRING + struct.pack("<i", len(obj)) + obj)
        self.memoize(obj)

    dispatch[bytes] = save_bytes


class PersistentPickler(pickle.Pickler):
    def persistent_id(self, obj):
        return "elsewhere" if isinstance(obj, np.ndarray) else None


class Call:
    """Unpickled, this is what function(*arguments) returns."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments

    def __call__(self):
        """Pickle wants functions to be callable."""


def pickled(obj, protocol=4, core="numpy._core", pickler=PathPickler) -> bytes:
    stream = io.BytesIO()
    pickler(stream, protocol, core).dump(obj)
    return stream.getvalue()


def zipped(path, content, member=None, compression=zipfile.ZIP_STORED, others=()):
    """An archive with one pickle of `content` (bytes are written as they are), before it the members `others`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, other in others:
            archive.writestr(name, other)
        archive.writestr(member or f"{path.stem}.pkl", content if isinstance(content, bytes) else pickled(content))
    return path


def sound(seed: int, rows: int = T, kind=np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, 128)).astype(kind)


def picture(seed: int, rows: int = T, kind=np.float32) -> np.ndarray:
    return np.random.default_rng(seed).random((rows, 7, 7, 512), np.float32).astype(kind)


def write_text(path, lines, end="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(line + end for line in lines).encode())
    return path


def write_h5(path, **datasets):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as h5:
        for name, values in datasets.items():
            h5[name] = values


def ten(array: np.ndarray, rows: int = T) -> np.ndarray:
    """The rule of padding and truncation, and the dtype of a converted file."""
    return np.stack([array[min(t, len(array) - 1)] for t in range(rows)]).astype(np.float16)


# ------------------------------------------------------------------------------------------------------ ways to convert


def error_of(action) -> str:
    """The message of the InputError that `action` raises, which is one line."""
    with pytest.raises(InputError) as caught:
        action()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def convert(*args, cwd):
    done = captured_here("official.convert", *args, "--workers", 1, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done


def convert_error(*args, cwd) -> str:
    """`error_of` a conversion; the script that runs here has an InputError of its own."""
    with pytest.raises(ValueError) as caught:
        captured_here("official.convert", *args, "--workers", 1, cwd=cwd)
    assert type(caught.value).__name__ == "InputError" and len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def opened(path, checked=True) -> SimpleNamespace:
    """A converted file: its datasets by name, events by modality, strings decoded, after the project's own checks."""
    features = Features([str(path)])
    if checked:
        data.check(str(path))
    found = SimpleNamespace(features=features, events={}, modalities=features.modalities, classes=features.classes)
    with h5py.File(path) as h5:
        assert (h5.attrs["format"], h5.attrs["version"]) == ("cmg-features", 1)
        assert all(h5.attrs[name] for name in ("name", "source", "license"))
        for name, values in h5.items():
            if isinstance(values, h5py.Group):
                found.events = {m: values[m][:] for m in values}
            elif name != "classes":
                setattr(found, name, [i.decode() for i in values] if name == "id" else values[:])
    return found


def leftovers(folder, out="out.h5") -> list:
    return sorted(path.name for path in folder.glob(f"{out}.*"))


# --------------------------------------------------------------------------------------------- archives that are right


@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_layout_of_an_array_reads_back(tmp_path, protocol, core):
    source = np.random.default_rng(protocol).standard_normal((10, 3, 4))
    layouts = {"C": np.ascontiguousarray, "Fortran": np.asfortranarray, "strided": lambda a: np.repeat(a, 2, 1)[:, ::2]}
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        for kind in ("<f4", "<f8", ">f4", ">f8"):
            for layout, arranged in layouts.items():
                array = arranged(source.astype(kind))
                content = pickled(array, protocol, core)
                assert {b"numpy.core": b"numpy._core", b"numpy._core": b"numpy.core"}[core.encode()] not in content
                found = read_archive(str(zipped(tmp_path / "clip.zip", content, None, compression)))
                assert np.array_equal(found, array) and found.dtype.kind == "f", (kind, layout)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_this_numpy_read_back(protocol):
    for array in (sound(0), sound(0, kind=np.float64), np.arange(10), np.asfortranarray(sound(1)), np.zeros((10, 1))):
        assert np.array_equal(unpickle(pickle.dumps(array, protocol), "here"), array)


def test_a_pickle_of_python_2_reads_back():
    content = pickled(sound(0), 2, "numpy.core", Python2Pickler)
    assert b"_codecs" not in content and np.array_equal(unpickle(content, "here"), sound(0))


@pytest.mark.parametrize("member", ["other.pkl", "folder/deep/a b.pkl", "x.pkl.1", "clip.pkl"])
def test_the_member_whose_name_contains_pkl_is_the_array(tmp_path, member):
    others = [("readme.txt", b"not a pickle"), ("folder/", b""), ("clip", pickled(sound(1)))]
    for order in (others, ()):
        path = zipped(tmp_path / "clip.zip", sound(0), member, others=order)
        assert np.array_equal(read_archive(str(path)), sound(0))


def test_of_several_members_the_faithful_reader_takes_the_last(tmp_path):
    path = zipped(tmp_path / "clip.zip", sound(2), "z.pkl", others=[("a.pkl", pickled(sound(1)))])
    assert np.array_equal(read_archive(str(path), True), sound(2))
    message = error_of(lambda: read_archive(str(path), False))
    assert str(path) in message and "a.pkl" in message and "z.pkl" in message


def test_fit_repeats_the_last_row_keeps_the_first_ones_or_spaces_evenly():
    for length in (1, 4, 9, 10, 11, 25):
        array = np.arange(length * 3, dtype=np.float32).reshape(length, 3)
        fitted, happened = fit(array, (T, 3))
        assert np.array_equal(fitted.astype(np.float16), ten(array))
        assert bool(happened) == (length != T)
        even, _ = fit(array, (T, 3), "even")
        assert np.array_equal(even, array[[t * length // T for t in range(T)]])
        assert np.array_equal(fit(array, (T, 3), "twice")[0], fit(array, (T // 2, 3))[0].repeat(2, 0))


def test_members_that_macos_adds_are_not_read(tmp_path):
    """Its archives hold a ._ file beside each member, or below __MACOSX, whose name contains pkl too."""
    noise = b"\0\5\x16\7\0\2\0\0Mac OS X"
    path = tmp_path / "clip.zip"
    for added in ("__MACOSX/._clip.pkl", "__MACOSX/folder/._clip.pkl", "folder/__MACOSX/clip.pkl", "._clip.pkl",
                  "folder/._clip.pkl"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("folder/clip.pkl", pickled(sound(3)))
            archive.writestr(added, noise)
        for faithful in (False, True):
            assert np.array_equal(read_archive(str(path), faithful), sound(3)), added
    zipped(path, sound(3), "__MACOSX/._clip.pkl")
    assert "0 members" in error_of(lambda: read_archive(str(path)))
    zipped(path, sound(3), "a._clip.pkl")
    assert np.array_equal(read_archive(str(path)), sound(3))


@pytest.mark.parametrize("array", [np.zeros((10, 127)), np.zeros(128), np.zeros((0, 128)), np.zeros((10, 128, 1)),
                                   np.zeros((10, 128), bool), np.zeros((10, 128), complex)])
def test_fit_refuses_other_shapes_and_dtypes(array):
    assert "128" in error_of(lambda: fit(array, (T, 128), False))


# ------------------------------------------------------------------------------------------- archives that are refused


LIVE = {  # each creates the marker when a careless reader loads it
    "os.system": lambda marker: Call(os.system, f"touch {marker}"),
    "eval": lambda marker: Call(eval, f"open({marker!r}, 'w').close()"),
    "exec": lambda marker: Call(exec, f"open({marker!r}, 'w').close()"),
    "subprocess": lambda marker: Call(subprocess.check_call, ["touch", marker]),
    "getattr": lambda marker: Call(Call(getattr, Call(__import__, "os"), "system"), f"touch {marker}"),
    "numpy.savetxt": lambda marker: Call(np.savetxt, marker, [1.0]),
    "method of an array": lambda marker: Call(np.ndarray.tofile, sound(0), marker),
    "object array": lambda marker: np.array([Call(os.system, f"touch {marker}"), 0], dtype=object),
    "beside an array": lambda marker: (sound(0), Call(os.system, f"touch {marker}")),
    "as an argument of an array": lambda marker: Call(np.frombuffer, Call(os.system, f"touch {marker}")),
}


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("payload", LIVE)
def test_no_pickle_runs_anything(tmp_path, payload, protocol):
    marker = tmp_path / "marker"
    content = pickle.dumps(LIVE[payload](str(marker)), protocol)
    try:
        pickle.loads(content)
    except Exception:  # some are no array afterwards; that they ran is what counts
        pass
    assert marker.exists()
    marker.unlink()
    path = zipped(tmp_path / "clip.zip", content, "evil.pkl")
    message = error_of(lambda: read_archive(str(path)))
    assert str(path) in message and "evil.pkl" in message and not marker.exists()


def a_global(module: str, name: str) -> bytes:
    return b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, name)) + pickle.STACK_GLOBAL


def persistent() -> bytes:
    stream = io.BytesIO()
    PersistentPickler(stream, 4).dump(sound(0))
    return stream.getvalue()


ADMITTED = [("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
            ("numpy.core.numeric", "_frombuffer"), ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")]
STATES = {"empty": {}, "dict": {"array": 1}, "slots": (None, {"array": 1}), "of a dtype": (1, "<", None, None, None)}
OTHER = {  # nothing of these runs, but none is an array
    "dict": pickle.dumps({"array": 1}), "str": pickle.dumps("array"), "None": pickle.dumps(None),
    "list": pickle.dumps([1.0, 2.0]), "bytes": pickle.dumps(b"1234"), "scalar": pickle.dumps(np.float32(1)),
    "object array": pickle.dumps(np.array([1, "a"], object)), "text array": pickle.dumps(np.array(["a", "b"])),
    "records": pickle.dumps(np.zeros(3, [("a", "f4"), ("b", "f4")])), "masked": pickle.dumps(np.ma.zeros(3)),
    "subclass": pickle.dumps(sound(0).view(np.recarray)), "persistent id": persistent(),
    "persistent text id": b"Pelsewhere\n.", "truncated": pickled(sound(0))[:-40], "no stop": pickled(sound(0))[:-1],
    "empty": b"", "noise": bytes(range(256)), "unknown protocol": b"\x80\x7f.", "unbuilt array":
    b"\x80\x04" + a_global("numpy._core.multiarray", "_reconstruct") + b"))R.", "a function of an admitted name":
    b"\x80\x04" + a_global("numpy._core.multiarray", "_reconstruct.__class__") + b".",
    "a class": b"\x80\x04" + a_global("numpy", "ndarray") + b".", "a method": b"cnumpy\nndarray.tofile\n.",
    "extension": b"\x80\x04\x82\x01."}


@pytest.mark.parametrize("kind", OTHER)
def test_what_is_no_array_is_refused(tmp_path, kind):
    path = zipped(tmp_path / "clip.zip", OTHER[kind], "other.pkl")
    message = error_of(lambda: read_archive(str(path)))
    assert str(path) in message and "other.pkl" in message


@pytest.fixture
def fresh():
    """official/safe_pickle.py anew: what a pickle manages to change in it goes with it."""
    spec = importlib.util.spec_from_file_location("fresh_safe_pickle", ROOT / "official" / "safe_pickle.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(module: str, name: str, state) -> bytes:
    """Opcodes that set the state of what an admitted name stands for."""
    return a_global(module, name) + pickle.dumps(state, 3)[2:-1] + pickle.BUILD


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("module, name", ADMITTED)
def test_a_build_on_an_admitted_name_is_refused(tmp_path, fresh, module, name, state):
    for followed in (b".", pickle.POP + pickled(sound(0), 2)[2:]):  # alone, and before an array that is right
        path = zipped(tmp_path / "clip.zip", b"\x80\x04" + build(module, name, STATES[state]) + followed)
        with pytest.raises(fresh.InputError) as caught:
            fresh.read_archive(str(path))
        assert str(path) in str(caught.value) and "clip.pkl" in str(caught.value)


@pytest.mark.parametrize("module, name", ADMITTED)
def test_no_archive_changes_how_the_next_is_read(tmp_path, fresh, module, name):
    """One process reads many archives."""
    probes = [zipped(tmp_path / f"{i}.zip", b"\x80\x04" + content) for i, content in enumerate((
        a_global(module, name) + b")R.", build(module, name, {}) + pickle.POP + pickled(sound(0), 2)[2:]))]

    def outcomes():
        found = []
        for path in probes:
            try:
                found.append(fresh.read_archive(str(path)).tobytes())
            except fresh.InputError as error:
                found.append(str(error))
        return found
    before = outcomes()
    for state in ({"__setstate__": 1}, (None, {"__defaults__": ("a", "b")})):
        path = zipped(tmp_path / "clip.zip", b"\x80\x04" + build(module, name, state) + b".")
        with pytest.raises(fresh.InputError):
            fresh.read_archive(str(path))
    assert outcomes() == before
    for protocol in (2, 5):
        path = zipped(tmp_path / "good.zip", pickled(sound(0), protocol))
        assert np.array_equal(fresh.read_archive(str(path)), sound(0))


def damaged(content: bytes, kind: str) -> bytes:
    if kind == "truncated":
        return content[:len(content) // 2]
    if kind == "not a zip":
        return pickled(sound(0))
    if kind == "empty":
        return b""
    changed = bytearray(content)
    if kind == "checksum":
        changed[content.index(sound(0).tobytes()) + 100] ^= 255
    if kind == "encrypted":
        changed[content.index(b"PK\3\4") + 6] |= 1
        changed[content.index(b"PK\1\2") + 8] |= 1
    if kind == "unknown method":
        changed[content.index(b"PK\3\4") + 8] = changed[content.index(b"PK\1\2") + 10] = 77
    return bytes(changed)


@pytest.mark.parametrize("kind", ["truncated", "not a zip", "empty", "checksum", "encrypted", "unknown method"])
def test_damaged_archives_are_refused(tmp_path, kind):
    path = zipped(tmp_path / "clip.zip", sound(0))
    path.write_bytes(damaged(path.read_bytes(), kind))
    message = error_of(lambda: read_archive(str(path)))
    assert str(path) in message
    if kind in ("checksum", "encrypted"):
        assert "clip.pkl" in message


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damaged_compression_is_refused(tmp_path, compression):
    path = zipped(tmp_path / "clip.zip", sound(0), None, compression)
    content = bytearray(path.read_bytes())
    content[60:160] = bytes(100)
    path.write_bytes(content)
    assert str(path) in error_of(lambda: read_archive(str(path)))


def test_missing_archives_and_folders_are_refused(tmp_path):
    for path in (tmp_path / "none.zip", tmp_path):
        assert str(path) in error_of(lambda: read_archive(str(path)))


def test_a_bomb_is_refused(tmp_path):
    path = zipped(tmp_path / "clip.zip", bytes((64 << 20) + 1), "bomb.pkl", zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 20
    message = error_of(lambda: read_archive(str(path)))
    assert str(path) in message and "bomb.pkl" in message


@pytest.mark.parametrize("put", [b"r\xff\xff\xff\x00", b"p16777215\n"])
def test_a_small_pickle_takes_no_large_memory(tmp_path, put):
    """A place in the memo far out makes Python reserve all places before it."""
    path = zipped(tmp_path / "clip.zip", b"\x80\x04N" + put + b".")
    tracemalloc.start()
    try:
        assert str(path) in error_of(lambda: read_archive(str(path)))
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("member", ["clip.npy", "pkl", "clip.PKL"])
def test_an_archive_without_a_pickle_is_refused(tmp_path, member):
    path = zipped(tmp_path / "clip.zip", sound(0), member)
    message = error_of(lambda: read_archive(str(path)))
    assert str(path) in message and member in message
    error_of(lambda: read_archive(str(path), True))


@pytest.mark.parametrize("member", ["../clip.pkl", "a/../../clip.pkl", "/clip.pkl", "..\\clip.pkl", "\\clip.pkl"])
def test_members_that_lead_out_of_the_archive_are_refused(tmp_path, member):
    for faithful in (False, True):
        path = zipped(tmp_path / "clip.zip", sound(0), member)
        message = error_of(lambda: read_archive(str(path), faithful))
        assert str(path) in message and member in message
        beside = zipped(tmp_path / "beside.zip", sound(0), others=[(member.replace("pkl", "txt"), b"x")])
        error_of(lambda: read_archive(str(beside), faithful))


def test_a_message_is_one_line_whatever_the_archive_calls_things(tmp_path):
    path = zipped(tmp_path / "clip.zip", {"not": "an array"}, "a\nerror: b.pkl")
    assert str(path) in error_of(lambda: read_archive(str(path)))
    for content in (b"\x80\x04" + a_global("os\nerror", "system\r\nerror") + b".", pickle.dumps({"a\nb"})):
        assert str(path) in error_of(lambda: read_archive(str(zipped(path, content))))


# ---------------------------------------------------------------------------------------------------- VGGSound, options


CLASSES = ["engine accelerating", "playing trumpet", "race car"]
CLIPS = [("race car", "IqTSyx3L0j8", "train"), ("engine accelerating", "-Nz15RLDx4R", "val"),
         ("playing trumpet", "a_b-c_d-e_f", "test"), ("race car", "00000000012", "train")]
ROWS = [10, 7, 13, 1]  # of each clip's sound
KINDS = [np.float32, np.float64, np.float32, np.float64]


def vggsound(root, clips=CLIPS, video=True, name="vggsound-avel40k.csv", end="\n"):
    """The folder of VGGSound with a few clips."""
    write_text(root / "data" / name, ["category,video_id,split", *(",".join(clip) for clip in clips)], end)
    write_text(root / "data/VggsoundAVEL40kCategories.txt", CLASSES, end)
    for i, (_, clip, _) in enumerate(clips):
        zipped(root / f"feature/audio/zip/{clip}.zip", sound(i, ROWS[i % 4], KINDS[i % 4]))
        if video:
            zipped(root / f"feature/video/zip/{clip}.zip", picture(i, kind=KINDS[i % 4]), "features.pkl",
                   zipfile.ZIP_DEFLATED if i == 0 else zipfile.ZIP_STORED)
    return root


def sounds_only(root, count: int, first: int = 0):
    """The folder of VGGSound with `count` sounds, numbered from `first`."""
    return vggsound(root, [(CLASSES[i % 3], f"clip{first + i:07d}", "train") for i in range(count)], False)


@pytest.mark.parametrize("end, keep", [("\n", False), ("\r\n", True)])
def test_vggsound(tmp_path, end, keep):
    root = vggsound(tmp_path / "vggsound40k", end=end)
    done = convert("vggsound", root, "--out", "out.h5", "--subset", *["--keep-splits"] * keep, cwd=tmp_path)
    found = opened(tmp_path / "out.h5")
    assert found.modalities == ["audio", "video"] and found.classes == CLASSES and found.events == {}
    assert found.features.shape == {"audio": (10, 128), "video": (10, 7, 7, 512)}
    assert found.audio.dtype == found.video.dtype == np.float16
    assert sorted(found.id) == sorted(clip for _, clip, _ in CLIPS)
    for i, (category, clip, split) in enumerate(CLIPS):
        place = found.id.index(clip)
        assert np.array_equal(found.audio[place], ten(sound(i, ROWS[i], KINDS[i])))
        assert np.array_equal(found.video[place], ten(picture(i, kind=KINDS[i])))
        assert found.label[place] == CLASSES.index(category)
        assert found.split[place] == (("train", "val", "test").index(split) if keep else TRAIN)
    assert "padded" in done.stdout and "cut" in done.stdout and leftovers(tmp_path) == []


def test_vggsound_24k_is_the_train_split(tmp_path):
    root = vggsound(tmp_path / "root", video=False)
    convert("vggsound", root, "--out", "out.h5", "--subset", "--which", "24k", "--modalities", "audio", cwd=tmp_path)
    found = opened(tmp_path / "out.h5")
    assert found.id == ["IqTSyx3L0j8", "00000000012"] and found.modalities == ["audio"]
    assert found.label.tolist() == [2, 2] and found.split.tolist() == [TRAIN, TRAIN]


def test_vggsound_81k_has_no_labels(tmp_path):
    root = vggsound(tmp_path / "root", video=False)
    write_text(root / "data/video_name_vggsound81k_checked.csv", ["id", "00000000012.mp4", "IqTSyx3L0j8.mp4"])
    convert("vggsound", root, "--out", "out.h5", "--which", "81k", "--modalities", "audio", cwd=tmp_path)
    found = opened(tmp_path / "out.h5")
    assert found.id == ["00000000012", "IqTSyx3L0j8"] and found.split.tolist() == [TRAIN, TRAIN]
    assert (found.features.label == -1).all()
    assert np.array_equal(found.audio[0], ten(sound(3, 1, np.float64)))


def test_vggsound_90k_is_a_list_of_its_own(tmp_path):
    root = vggsound(tmp_path / "root", CLIPS[:2], False, "vggsound-avel90k-new.csv")
    listing = list_vggsound(root / "data", root / "feature", "90k", True, True)
    assert listing.ids == [clip for _, clip, _ in CLIPS[:2]] and listing.split.tolist() == [TRAIN, VAL]


def test_dtype_of_the_features(tmp_path):
    root = vggsound(tmp_path / "root", CLIPS[:1], False)
    large = sound(0) * 1e6
    zipped(root / "feature/audio/zip/IqTSyx3L0j8.zip", large)
    given = ["vggsound", root, "--out", "out.h5", "--subset", "--modalities", "audio"]
    assert "IqTSyx3L0j8" in convert_error(*given, cwd=tmp_path)
    convert(*given, "--dtype", "float32", cwd=tmp_path)
    found = opened(tmp_path / "out.h5")
    assert found.audio.dtype == np.float32 and np.array_equal(found.audio[0], large)
    large[3, 5] = np.nan
    zipped(root / "feature/audio/zip/IqTSyx3L0j8.zip", large)
    assert "IqTSyx3L0j8" in convert_error(*given, "--dtype", "float32", cwd=tmp_path)


def bad_archives(root) -> dict:
    """{id: what a bad archive of the six sounds of `root` is}, and the good ones as they are."""
    folder, marker = root / "feature/audio/zip", root / "marker"
    zipped(folder / "clip0000001.zip", pickle.dumps(Call(os.system, f"touch {marker}")))
    (folder / "clip0000003.zip").unlink()
    zipped(folder / "clip0000004.zip", np.zeros((10, 64), np.float32))
    return {"clip0000001": "clip0000001.pkl", "clip0000003": "clip0000003.zip", "clip0000004": "clip0000004.zip"}


def test_skipped_clips_are_left_out_and_listed(tmp_path):
    root = sounds_only(tmp_path / "root", 6)
    bad = bad_archives(root)
    done = convert("vggsound", root, "--out", "out.h5", "--subset", "--modalities", "audio", "--on-error", "skip",
                   cwd=tmp_path)
    found = opened(tmp_path / "out.h5")
    assert found.id == ["clip0000000", "clip0000002", "clip0000005"] and found.label.tolist() == [0, 2, 2]
    assert np.array_equal(found.audio, [ten(sound(i, ROWS[i % 4], KINDS[i % 4])) for i in (0, 2, 5)])
    report = (tmp_path / "out.h5.skipped.txt").read_text().splitlines()
    assert len(report) == 3 and not (root / "marker").exists() and "3" in done.stdout
    for line, (clip, named) in zip(report, bad.items()):
        assert clip in line and named in line
    assert leftovers(tmp_path) == ["out.h5.skipped.txt"]


def test_a_complete_conversion_leaves_no_list_of_skipped_clips(tmp_path):
    root = sounds_only(tmp_path / "root", 2)
    content = (root / "feature/audio/zip/clip0000001.zip").read_bytes()
    (root / "feature/audio/zip/clip0000001.zip").unlink()
    given = ["vggsound", root, "--out", "out.h5", "--subset", "--modalities", "audio", "--on-error", "skip"]
    convert(*given, cwd=tmp_path)
    (root / "feature/audio/zip/clip0000001.zip").write_bytes(content)
    convert(*given, cwd=tmp_path)
    assert len(opened(tmp_path / "out.h5").id) == 2 and leftovers(tmp_path) == []


def test_a_refused_archive_stops_with_exit_code_2(tmp_path):
    root = sounds_only(tmp_path / "root", 6)
    bad_archives(root)
    argv, keywords = command("official.convert", "vggsound", root, "--out", "out.h5", "--subset", "--modalities",
                             "audio", "--workers", 2)
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=30, **keywords)
    assert done.returncode == 2 and not (tmp_path / "out.h5").exists() and not (root / "marker").exists()
    assert len(done.stderr.splitlines()) == 1 and re.search(r"clip000000[134]", done.stderr)


def test_stopping_never_hangs(tmp_path):
    """A process that is ended while it sends its result must not hold up the others; long names make long results."""
    root = sounds_only(tmp_path / "root", 16)
    for path in (root / "feature/audio/zip").glob("*.zip"):
        zipped(path, b"", "x" * 60000)
    program = f"""
from pathlib import Path
from official.convert import Options, convert_vggsound
from run import InputError
for _ in range(12):
    try:
        convert_vggsound(Path({str(root)!r}), "out.h5", modalities=("audio",), options=Options(subset=True, workers=2))
    except InputError:
        print("stopped")
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
                               start_new_session=True, stderr=subprocess.DEVNULL,
                               env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    try:
        assert process.communicate(timeout=20)[0].splitlines().count("stopped") == 12
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def test_faithful_reaches_the_archives(tmp_path):
    root = sounds_only(tmp_path / "root", 1)
    zipped(root / "feature/audio/zip/clip0000000.zip", sound(7), "b.pkl", others=[("a.pkl", pickled(sound(6)))])
    given = ["vggsound", root, "--out", "out.h5", "--subset", "--modalities", "audio"]
    assert "clip0000000.zip" in convert_error(*given, cwd=tmp_path)
    convert(*given, "--faithful", cwd=tmp_path)
    assert np.array_equal(opened(tmp_path / "out.h5").audio[0], ten(sound(7)))


@pytest.mark.parametrize("wrong", [["--out", "none/out.h5"], ["--out", "out.h5", "--modalities", "smell"],
                                   ["--out", "out.h5", "--workers", 0]])
def test_impossible_options_are_told_in_one_line(tmp_path, wrong):
    root = sounds_only(tmp_path / "root", 1)
    rest = ["--modalities", "audio"] * ("--modalities" not in wrong) + ["--workers", 1] * ("--workers" not in wrong)
    with pytest.raises(ValueError) as caught:
        captured_here("official.convert", "vggsound", root, "--subset", *wrong, *rest, cwd=tmp_path)
    assert type(caught.value).__name__ == "InputError" and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("clip", [("race car", "short", "train"), ("race car", "../../../ab", "train"),
                                  ("race car", "IqTSyx3L0j8", "train"), ("racing car", "00000000099", "train"),
                                  ("race car", "00000000099", "training")])
def test_vggsound_lists_with_impossible_rows(tmp_path, clip):
    write_text(tmp_path / "VggsoundAVEL40kCategories.txt", CLASSES)
    write_text(tmp_path / "vggsound-avel40k.csv", ["category,video_id,split", *(",".join(c) for c in [*CLIPS, clip])])
    for keep in (False, True):
        if clip[2] == "train" or keep:
            assert "vggsound-avel40k.csv" in error_of(
                lambda: list_vggsound(tmp_path, tmp_path, "40k", keep, True)) or "/" in clip[1]


def test_lists_without_a_column_or_a_row(tmp_path):
    write_text(tmp_path / "VggsoundAVEL40kCategories.txt", CLASSES)
    for lines, named in ((["category,split", "race car,train"], "video_id"), (["category,video_id,split"], "csv"),
                         ([], "csv")):
        path = write_text(tmp_path / "vggsound-avel40k.csv", lines)
        message = error_of(lambda: list_vggsound(tmp_path, tmp_path, "40k", False, True))
        assert str(path) in message and named in message
    path.unlink()
    assert str(path) in error_of(lambda: list_vggsound(tmp_path, tmp_path, "40k", False, True))


# ------------------------------------------------------------------------------------------------------------- resuming


def whole(root, folder, *options) -> bytes:
    """The file of an uninterrupted conversion of sounds."""
    folder.mkdir()
    captured_here("official.convert", "vggsound", root, "--out", "out.h5", "--subset", "--modalities", "audio",
                  "--workers", 2, *options, cwd=folder)
    return (folder / "out.h5").read_bytes()


def test_after_a_kill_a_second_call_goes_on_to_the_same_bytes(tmp_path):
    """An archive that never ends (a pipe) holds the first call; what it has finished is then deleted."""
    root = sounds_only(tmp_path / "root", 8)
    expected = whole(root, tmp_path / "whole")
    held = root / "feature/audio/zip/clip0000005.zip"
    held.rename(tmp_path / "saved.zip")
    os.mkfifo(held)
    given = ["vggsound", root, "--out", "out.h5", "--subset", "--modalities", "audio"]
    argv, keywords = command("official.convert", *given, "--workers", 1)
    first = subprocess.Popen(argv, cwd=tmp_path, start_new_session=True, stdout=subprocess.DEVNULL, **keywords)
    try:
        limit = time.monotonic() + 60
        while sum(np.count_nonzero(np.fromfile(path, np.uint64)) for path in tmp_path.glob("*.done")) < 5:
            assert first.poll() is None and time.monotonic() < limit
            time.sleep(0.01)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        assert first.wait() == -signal.SIGKILL
    assert not (tmp_path / "out.h5").exists() and len(leftovers(tmp_path)) == 2
    for i in range(5):
        (root / f"feature/audio/zip/clip{i:07d}.zip").unlink()
    held.unlink()
    (tmp_path / "saved.zip").rename(held)
    convert(*given, cwd=tmp_path)
    assert (tmp_path / "out.h5").read_bytes() == expected and leftovers(tmp_path) == []


@pytest.mark.parametrize("step", range(3))
def test_after_a_stop_between_the_last_steps_too(tmp_path, monkeypatch, step):
    """The n-th time that a file is renamed or removed the program ends instead; clip 1 is to be left out."""
    root = sounds_only(tmp_path / "root", 4)
    (root / "feature/audio/zip/clip0000001.zip").unlink()
    expected = whole(root, tmp_path / "whole", "--on-error", "skip")
    given, count = ["vggsound", root, "--out", "out.h5", "--subset", "--modalities", "audio", "--on-error", "skip"], []

    def ending(function):
        def instead(*args, **keywords):
            if "out.h5" in str(args[0]):
                count.append(args)
                if len(count) == step + 1:
                    raise KeyboardInterrupt
            return function(*args, **keywords)
        return instead
    with monkeypatch.context() as patch:
        for name in ("replace", "rename", "remove", "unlink"):
            patch.setattr(os, name, ending(getattr(os, name)))
        try:
            convert(*given, cwd=tmp_path)
        except KeyboardInterrupt:
            pass
    convert(*given, cwd=tmp_path)
    assert (tmp_path / "out.h5").read_bytes() == expected and leftovers(tmp_path) == ["out.h5.skipped.txt"]


def interrupted(root, bad: int, cwd):
    """Stop at the clip number `bad`, whose archive is put back then."""
    path = sorted((root / "feature/audio/zip").glob("*.zip"))[bad]
    content = path.read_bytes()
    path.write_bytes(b"not a zip")
    assert path.name in convert_error("vggsound", root, "--out", "out.h5", "--subset", "--modalities", "audio", cwd=cwd)
    path.write_bytes(content)
    (progress,) = cwd.glob("out.h5.partial-*.done")
    return progress


def test_the_progress_of_another_list_is_not_taken_over(tmp_path):
    roots = [sounds_only(tmp_path / str(first), 4, first) for first in (0, 50)]
    expected = whole(roots[1], tmp_path / "whole")
    assert np.count_nonzero(np.fromfile(interrupted(roots[0], 2, tmp_path), np.uint64)) >= 2
    convert("vggsound", roots[1], "--out", "out.h5", "--subset", "--modalities", "audio", cwd=tmp_path)
    assert (tmp_path / "out.h5").read_bytes() == expected and leftovers(tmp_path) == []


def test_a_progress_file_that_is_left_alone_is_not_taken_over(tmp_path):
    root = sounds_only(tmp_path / "root", 4)
    expected = whole(root, tmp_path / "whole")
    np.ones(4, np.uint64).tofile(tmp_path / "out.h5.partial-00000000.done")
    convert("vggsound", root, "--out", "out.h5", "--subset", "--modalities", "audio", cwd=tmp_path)
    assert (tmp_path / "out.h5").read_bytes() == expected and leftovers(tmp_path) == []


@pytest.mark.parametrize("left", [b"", b"\1", b"\1" * 4, b"\1" * 72])
def test_a_progress_file_of_another_length_is_not_taken_over(tmp_path, left):
    root = sounds_only(tmp_path / "root", 4)
    expected = whole(root, tmp_path / "whole")
    interrupted(root, 2, tmp_path).write_bytes(left)
    convert("vggsound", root, "--out", "out.h5", "--subset", "--modalities", "audio", cwd=tmp_path)
    assert (tmp_path / "out.h5").read_bytes() == expected and leftovers(tmp_path) == []


def test_a_conversion_without_the_names_of_posix(tmp_path, monkeypatch):
    root = sounds_only(tmp_path / "root", 4)
    expected = whole(root, tmp_path / "whole")
    for name in ("pwrite", "pread", "sched_getaffinity", "posix_fallocate"):
        monkeypatch.delattr(os, name)
    monkeypatch.setitem(sys.modules, "resource", None)
    convert("vggsound", root, "--out", "out.h5", "--subset", "--modalities", "audio", cwd=tmp_path)
    assert (tmp_path / "out.h5").read_bytes() == expected and leftovers(tmp_path) == []


def test_workers_are_the_cores_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3})
    assert Options().workers == converters.usable_cores() == 1


@pytest.mark.parametrize("skip", [[], ["--on-error", "skip"]])
def test_a_full_disk_stops_the_conversion_and_spoils_no_clip(tmp_path, monkeypatch, skip):
    """The third clip finds room for half of it; also with --on-error skip its archive is not to blame."""
    root, written, original = sounds_only(tmp_path / "root", 6), [], os.write
    expected = whole(root, tmp_path / "whole")
    given = ["vggsound", root, "--out", "out.h5", "--subset", "--modalities", "audio", *skip]

    def full(file, content):
        written.append(content)
        return original(file, bytes(content)[:len(content) // 2] if len(written) > 4 else content)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        assert "no space left" in convert_error(*given, cwd=tmp_path)
    convert(*given, cwd=tmp_path)
    assert (tmp_path / "out.h5").read_bytes() == expected and leftovers(tmp_path) == []


@pytest.mark.parametrize("content", [
    b"\x80\x02})" + b"2\x86" * 60 + b"K\x01s.",  # nested tuples as a key: hashing never ends
    b"\x80\x04" + b"c_codecs\nencode\nX\x01\0\0\0aX\x06\0\0\0latin1\x86R0" * 17 + b"N."])
def test_pickles_that_take_time_or_memory_are_refused_at_once(tmp_path, content):
    start = time.monotonic()
    assert "holds more than an array" in error_of(lambda: read_archive(str(zipped(tmp_path / "a.zip", content))))
    assert time.monotonic() - start < 1
    assert "refused" in error_of(lambda: unpickle(content, "table", True))


def test_the_progress_of_another_dtype_is_not_taken_over(tmp_path):
    root = sounds_only(tmp_path / "root", 4)
    expected = whole(root, tmp_path / "whole", "--dtype", "float32")
    interrupted(root, 2, tmp_path)
    convert("vggsound", root, "--out", "out.h5", "--subset", "--modalities", "audio", "--dtype", "float32",
            cwd=tmp_path)
    assert (tmp_path / "out.h5").read_bytes() == expected and leftovers(tmp_path) == []


def test_the_progress_of_another_labelling_is_not_taken_over(tmp_path):
    """The same clips and archives, other classes."""
    root = sounds_only(tmp_path / "root", 4)
    interrupted(root, 2, tmp_path)
    path = root / "data/vggsound-avel40k.csv"
    write_text(path, [re.sub("^(engine|playing|race)[^,]*,", "race car,", line) for line in path.read_text().split("\n")
                      if line])
    expected = whole(root, tmp_path / "whole")
    convert("vggsound", root, "--out", "out.h5", "--subset", "--modalities", "audio", cwd=tmp_path)
    assert (tmp_path / "out.h5").read_bytes() == expected


# ------------------------------------------------------------------------------------------------------------------ AVE


ANNOTATED = [("Church bell", "RUhOCu3LNXM", 0, 10), ("Church bell", "MH3m4AwEcRY", 6, 8), ("Bark", "c---zaDCTaE", 0, 3),
             ("Bark", "bark0000001", 9, 10), ("Violin, fiddle", "viol0000001", 2, 7),
             ("Violin, fiddle", "viol0000002", 0, 10)]
ORDERS = {"train": [1, 3, 4], "val": [0], "test": [5, 2]}
AVE_CLASSES = ["Church bell", "Bark", "Violin, fiddle"]


def ave(root, header=True):
    """The folder of AVE with six clips -> (sounds, pictures)."""
    write_text(root / "Annotations.txt", [*["Category&VideoID&Quality&StartTime&EndTime"] * header,
                                          *(f"{c}&{i}&good&{start}&{end}" for c, i, start, end in ANNOTATED)])
    sounds = np.stack([sound(i, kind=np.float64) for i in range(6)])
    pictures = np.stack([picture(i, kind=np.float64) for i in range(6)])
    write_h5(root / "audio_feature.h5", avadataset=sounds)
    write_h5(root / "visual_feature.h5", avadataset=pictures)
    for name, order in ORDERS.items():
        write_h5(root / f"{name}_order.h5", order=np.array(order, np.int64))
    labels = np.zeros((6, T, 4))
    for row, (category, _, start, end) in enumerate(ANNOTATED):
        labels[row, start:end, AVE_CLASSES.index(category)] = 1
        labels[row, :start, 3] = labels[row, end:, 3] = 1
    write_h5(root / "labels.h5", avadataset=labels)
    return sounds, pictures


def test_ave(tmp_path):
    sounds, pictures = ave(tmp_path / "ave")
    convert("ave", tmp_path / "ave", "--out", "out.h5", "--subset", cwd=tmp_path)
    found, order = opened(tmp_path / "out.h5"), [1, 3, 4, 0, 5, 2]
    assert found.id == [ANNOTATED[i][1] for i in order] and found.classes == AVE_CLASSES
    assert found.split.tolist() == [TRAIN, TRAIN, TRAIN, VAL, TEST, TEST]
    assert found.label.tolist() == [0, 1, 2, 0, 2, 1]
    assert np.array_equal(found.audio, sounds[order].astype(np.float16))
    assert np.array_equal(found.video, pictures[order].astype(np.float16))
    expected = np.zeros((6, T, 3), np.uint8)
    for place, i in enumerate(order):
        category, _, start, end = ANNOTATED[i]
        expected[place, start:end, AVE_CLASSES.index(category)] = 1
    assert sorted(found.events) == ["audio", "video"] and leftovers(tmp_path) == []
    for events in found.events.values():
        assert np.array_equal(events, expected)


def test_ave_files_that_disagree(tmp_path):
    ave(tmp_path)
    with h5py.File(tmp_path / "labels.h5", "r+") as h5:
        h5["avadataset"][2, 5] = [0, 1, 0, 0]
    assert "labels.h5" in error_of(lambda: list_ave(tmp_path, tmp_path, True))
    (tmp_path / "labels.h5").unlink()
    list_ave(tmp_path, tmp_path, True)
    for name, order in (("val", [1]), ("val", [6]), ("test", [2, 2]), ("test", [-1])):
        write_h5(tmp_path / f"{name}_order.h5", order=np.array(order))
        error_of(lambda: list_ave(tmp_path, tmp_path, True))
        write_h5(tmp_path / f"{name}_order.h5", order=np.array(ORDERS[name]))


@pytest.mark.parametrize("header", [False, True])
def test_ave_original_is_the_same_file(tmp_path, header):
    """The repository of AVE has Annotations.txt without a header, the archive of its videos has one."""
    for name, command, first in (("ave", "ave", True), ("original", "ave-original", header)):
        ave(tmp_path / name, first)
        convert(command, tmp_path / name, "--out", f"{name}.h5", "--subset", cwd=tmp_path)
    assert (tmp_path / "original.h5").read_bytes() == (tmp_path / "ave.h5").read_bytes()
    (tmp_path / "original/labels.h5").unlink()
    message = convert_error("ave-original", tmp_path / "original", "--out", "out.h5", "--subset", cwd=tmp_path)
    assert "labels.h5" in message


def resized(path, rows: int):
    """Features made video by video: the second clip of a video that has two is not there, all after it are shifted."""
    with h5py.File(path, "r+") as h5:
        values = np.delete(h5["avadataset"][:], 2, 0) if rows == 5 else np.repeat(h5["avadataset"][:], 2, 0)[:rows]
        del h5["avadataset"]
        h5["avadataset"] = values


@pytest.mark.parametrize("command", ["ave", "ave-original", "ave-avvp"])
@pytest.mark.parametrize("name", ["audio", "visual"])
@pytest.mark.parametrize("rows", [5, 7])
def test_ave_features_have_a_row_per_annotation(tmp_path, command, name, rows):
    """The last order needs no row that is missing: read without a check, other clips come out."""
    ave(tmp_path / "ave")
    write_h5(tmp_path / "ave/test_order.h5", order=np.array([2]))
    resized(tmp_path / f"ave/{name}_feature.h5", rows)
    given = [command, tmp_path / "ave", "--out", "out.h5", "--subset", "--on-error", "skip"]
    if command == "ave-avvp":
        avvp(tmp_path / "AVVP", tmp_path / "lists", "AVE_AVVP", SHARED, ["KSRjje7GH44_60_70\t8\t10\tDog"],
             ["19jWnmYnlD8_30_40\t3\t5\tDog"])
        write_h5(tmp_path / "ave/test_order.h5", order=np.array([5, 2]))
        ave_avvp(tmp_path / "lists")
        given[1:2] = [tmp_path / "lists", "--ave", tmp_path / "ave", "--avvp", tmp_path / "AVVP"]
    message = convert_error(*given, cwd=tmp_path)
    assert f"{name}_feature.h5" in message and f"{rows} rows for 6 annotations" in message
    assert not list(tmp_path.glob("out*"))


def spoiled_ave(kind: str, folder):
    """Features that are no features of AVE."""
    path = folder / "audio_feature.h5"
    if kind == "a link to a file that is gone":
        layout = h5py.VirtualLayout((6, T, 128), "f4")
        layout[:] = h5py.VirtualSource("gone.h5", "avadataset", (6, T, 128))
    with h5py.File(path, "w") as h5:
        if kind == "never written":
            h5.create_dataset("avadataset", (6, T, 128), "f4")
        if kind == "a link to a file that is gone":
            h5.create_virtual_dataset("avadataset", layout)
        if kind == "other shape":
            h5["avadataset"] = np.zeros((6, 128, T), "f4")
        if kind == "text":
            h5["avadataset"] = np.full((6, T, 128), b"x")
        if kind == "group":
            h5.create_group("avadataset")


@pytest.mark.parametrize("kind", ["never written", "a link to a file that is gone", "other shape", "text", "group",
                                  "other name"])
def test_ave_features_that_are_none(tmp_path, kind):
    ave(tmp_path / "ave")
    spoiled_ave(kind, tmp_path / "ave")
    message = convert_error("ave", tmp_path / "ave", "--out", "out.h5", "--subset", cwd=tmp_path)
    assert "audio_feature.h5" in message and not list(tmp_path.glob("out*"))


def test_ave_labels_that_differ_name_their_first_row(tmp_path):
    ave(tmp_path)
    with h5py.File(tmp_path / "labels.h5", "r+") as h5:
        h5["avadataset"][3:, 9] = [1, 0, 0, 0]
    assert "3 rows do not agree" in error_of(lambda: list_ave(tmp_path, tmp_path, True))
    assert "the first is row 3" in error_of(lambda: list_ave(tmp_path, tmp_path, True))
    write_h5(tmp_path / "labels.h5", avadataset=np.zeros((5, T, 4)))
    assert "expected (6, 10, 4)" in error_of(lambda: list_ave(tmp_path, tmp_path, True))


def test_ave_without_its_features(tmp_path):
    ave(tmp_path / "ave")
    (tmp_path / "ave/visual_feature.h5").unlink()
    assert "visual_feature.h5" in convert_error("ave", tmp_path / "ave", "--out", "out.h5", "--subset", cwd=tmp_path)


# ----------------------------------------------------------------------------------------------------------------- AVVP


HEADER = "filename\tonset\toffset\tevent_labels"
AVVP_CLASSES = ["Fire_alarm", "Speech", "Blender"]
HEARD = ["KSRjje7GH44_60_70\t8,0\t10,8\tBlender,Speech", "4YdbENYcIyE_23_33\t0,6\t4,8\tSpeech,Speech",
         "CaC2xvdLC34_250_260\t5,7,2\t5,3,4\tSpeech,Blender,Fire_alarm", "twice000000_30_40\t0\t10\tSpeech",
         "twice000000_30_40\t2\t10\tBlender", "neither0000_30_40\t0\t10\tSpeech",
         "19jWnmYnlD8_30_40\t0,4\t6,9\tSpeech,Blender", "19jWnmYnlD8_30_400\t1\t2\tBlender",
         "KSRjje7GH44_60_70`\t0\t1\tSpeech"]
SEEN = ["KSRjje7GH44_60_70\t0\t10\tBlender", "19jWnmYnlD8_30_40\t3\t5\tFire_alarm", "neither0000_30_40\t0\t10\tSpeech"]
HEARD_EVENTS = [[(2, 8, 10), (1, 0, 8)], [(1, 0, 4), (1, 6, 8)], [(0, 2, 4)], [(1, 0, 10)], [(2, 2, 10)], [(1, 0, 10)],
                [(1, 0, 6), (2, 4, 9)], [(2, 1, 2)], [(1, 0, 1)]]
SEEN_EVENTS = [[(2, 0, 10)], [(0, 3, 5)], [(1, 0, 10)]]
LLP = {"val": ["4YdbENYcIyE_23_33", "twice000000_30_40"],
       "test": ["KSRjje7GH44_60_70", "CaC2xvdLC34_250_260", "19jWnmYnlD8_30_40"]}
SPLIT_OF = {name: split for part, split in (("val", TRAIN), ("test", TEST)) for name in LLP[part]}


def dense(events: list, classes: int) -> np.ndarray:
    """[[(class, onset, offset), ..], ..] -> (N, T, classes)"""
    out = np.zeros((len(events), T, classes), np.uint8)
    for clip, found in zip(out, events):
        for index, onset, offset in found:
            clip[onset:offset, index] = 1
    return out


def avvp(root, lists=None, prefix="AVVP", classes=AVVP_CLASSES, heard=HEARD, seen=SEEN):
    """The folder of AVVP; `lists`: another folder for the lists of events."""
    lists = lists or root / "data"
    write_text(lists / f"{prefix}_Categories.txt", classes)
    for side, m, rows, make in (("audio", "audio", heard, sound), ("visual", "video", seen, picture)):
        write_text(lists / f"{prefix}_eval_{side}_checked_combined.csv", [HEADER, *rows])
        for clip in {row[:11] for row in rows}:
            zipped(root / f"feature/{m}/zip/{clip}.zip", make(sum(clip.encode())))
    for part, names in LLP.items():
        write_text(root / f"data/AVVP_{part}_pd.csv", ["filename\tevent_labels", *(f"{n}\tSpeech" for n in names)])
    return root


@pytest.mark.parametrize("faithful", [False, True])
def test_avvp(tmp_path, faithful):
    done = convert("avvp", avvp(tmp_path / "AVVP"), "--out", "out.h5", "--subset", *["--faithful"] * faithful,
                   cwd=tmp_path)
    keep = {"audio": range(9) if faithful else [0, 1, 2, 6], "visual": range(3) if faithful else [0, 1]}
    for side, m, rows, events, make in (("audio", "audio", HEARD, HEARD_EVENTS, sound),
                                        ("visual", "video", SEEN, SEEN_EVENTS, picture)):
        found, names = opened(tmp_path / f"out-{side}.h5"), [rows[i].split("\t")[0] for i in keep[side]]
        assert found.modalities == [m] and list(found.events) == [m] and found.classes == AVVP_CLASSES
        assert found.id == names and np.array_equal(found.events[m], dense([events[i] for i in keep[side]], 3))
        assert np.array_equal(getattr(found, m), [ten(make(sum(name[:11].encode()))) for name in names])
        assert (found.features.label == -1).all()
        for name, split in zip(names, found.split):
            assert split == SPLIT_OF.get(name, split)
    for name in ("twice000000_30_40", "neither0000_30_40", "19jWnmYnlD8_30_400", "KSRjje7GH44_60_70`"):
        assert name in done.stdout
    assert not list(tmp_path.glob("*.partial-*"))


@pytest.mark.parametrize("row", ["KSRjje7GH44_60_70\t0,1\t10\tSpeech", "KSRjje7GH44_60_70\t0\t10\tSinging",
                                 "KSRjje7GH44_60_70\tx\t10\tSpeech", "KSRjje7GH44_60_70\t\t\t",
                                 "../../../ab_60_70\t0\t10\tSpeech"])
def test_avvp_lists_with_impossible_rows(tmp_path, row):
    write_text(tmp_path / "AVVP_Categories.txt", AVVP_CLASSES)
    path = write_text(tmp_path / "AVVP_eval_audio_checked_combined.csv", [HEADER, row])
    for part in ("val", "test"):
        write_text(tmp_path / f"AVVP_{part}_pd.csv", ["filename\tevent_labels", row.split("\t")[0] + "\tSpeech"])
    message = error_of(lambda: list_avvp(tmp_path, tmp_path, "audio", Options(subset=True)))
    assert path.name in message or "../" in message


# ------------------------------------------------------------------------------------------------------------ AVE, AVVP


ORDER = [1, 2, 4, 5]  # of the AVE rows
SHARED = ["Violin_fiddle", "Dog", "Church"]


def ave_avvp(root):
    """Lists of AVE to AVVP for the clips of `ave`; rows outside the order are nonsense."""
    labels = np.zeros((6, T, 4), np.float32)
    for row in ORDER:
        category, _, start, end = ANNOTATED[row]
        labels[row, :, 3] = 1
        labels[row, start:end] = np.eye(4)[{"Violin, fiddle": 0, "Bark": 1, "Church bell": 2}[category]]
    write_h5(root / "ave_avvp_labels.h5", avadataset=labels)
    write_h5(root / "ave_avvp_order.h5", order=np.array(ORDER, np.int64))
    return labels


def test_ave_avvp(tmp_path):
    sounds, pictures = ave(tmp_path / "ave")
    heard = ["KSRjje7GH44_60_70\t8,0\t10,8\tDog,Church", "4YdbENYcIyE_23_33\t0\t4\tDog"]
    avvp(tmp_path / "AVVP", tmp_path / "lists", "AVE_AVVP", SHARED, heard, ["19jWnmYnlD8_30_40\t3\t5\tDog"])
    labels = ave_avvp(tmp_path / "lists")
    convert("ave-avvp", tmp_path / "lists", "--out", "out.h5", "--subset", "--ave", tmp_path / "ave", "--avvp",
            tmp_path / "AVVP", cwd=tmp_path)
    source = opened(tmp_path / "out-ave.h5")
    rows = [[clip[1] for clip in ANNOTATED].index(name) for name in source.id]
    assert sorted(rows) == ORDER and source.classes == SHARED and source.modalities == ["audio", "video"]
    assert np.array_equal(source.audio, sounds[rows].astype(np.float16))
    assert np.array_equal(source.video, pictures[rows].astype(np.float16))
    for m in ("audio", "video"):
        assert np.array_equal(source.events[m], labels[rows, :, :3])
    assert source.label.tolist() == labels[rows, :, :3].any(1).argmax(1).tolist()
    for side, m, names, events in (("audio", "audio", ["KSRjje7GH44_60_70", "4YdbENYcIyE_23_33"],
                                    [[(1, 8, 10), (2, 0, 8)], [(1, 0, 4)]]),
                                   ("visual", "video", ["19jWnmYnlD8_30_40"], [[(1, 3, 5)]])):
        target = opened(tmp_path / f"out-{side}.h5")
        assert target.id == names and target.classes == SHARED and target.modalities == [m]
        assert np.array_equal(target.events[m], dense(events, 3))
        assert target.split.tolist() == [SPLIT_OF[name] for name in names]


def test_ave_avvp_labels_sum_to_one_in_every_segment(tmp_path):
    ave(tmp_path / "ave")
    write_text(tmp_path / "AVE_AVVP_Categories.txt", SHARED)
    labels = ave_avvp(tmp_path)
    list_ave_avvp(tmp_path, tmp_path / "ave", tmp_path / "ave", True)
    for column, value in ((0, 1), (3, 0), (3, 2)):
        wrong = labels.copy()
        wrong[1, 9, column] = value
        write_h5(tmp_path / "ave_avvp_labels.h5", avadataset=wrong)
        message = error_of(lambda: list_ave_avvp(tmp_path, tmp_path / "ave", tmp_path / "ave", True))
        assert "ave_avvp_labels.h5" in message


def test_ave_avvp_clip_without_an_event_has_no_label(tmp_path):
    ave(tmp_path / "ave")
    write_text(tmp_path / "AVE_AVVP_Categories.txt", SHARED)
    labels = ave_avvp(tmp_path)
    labels[ORDER[0]] = [0, 0, 0, 1]
    write_h5(tmp_path / "ave_avvp_labels.h5", avadataset=labels)
    listing = list_ave_avvp(tmp_path, tmp_path / "ave", tmp_path / "ave", True)
    assert listing.label[listing.ids.index(ANNOTATED[ORDER[0]][1])] == -1


# ------------------------------------------------------------------------------------------------------------------ UCF


GROUPS = {1: TEST, 7: TEST, 8: VAL, 9: VAL, 10: TRAIN, 25: TRAIN}


def test_ucf51(tmp_path):
    names = [(("PlayingCello", "UnevenBars")[i % 2], group) for i, group in enumerate(GROUPS)]
    ids = [f"v_{name}_g{group:02d}_c04" for name, group in names]
    write_text(tmp_path / "lists/ucf51checked.csv",
               ["category,video_id", *(f"{c},{i}" for (c, _), i in zip(names, ids))], "\r\n")
    write_text(tmp_path / "lists/UCF51Categories.txt", ["UnevenBars", "PlayingCello"])
    for i, name in enumerate(ids):
        zipped(tmp_path / f"ucf/feature/audio/zip/{name}.zip", sound(i, 8 + i))
        zipped(tmp_path / f"ucf/feature/video/zip/{name}.zip", picture(i, 8 + i))
    convert("ucf51", tmp_path / "ucf", "--out", "out.h5", "--subset", "--lists", tmp_path / "lists", cwd=tmp_path)
    found = opened(tmp_path / "out.h5")
    assert found.id == ids and found.classes == ["UnevenBars", "PlayingCello"]
    assert found.label.tolist() == [1, 0, 1, 0, 1, 0] and found.split.tolist() == list(GROUPS.values())
    assert np.array_equal(found.audio, [ten(sound(i, 8 + i)) for i in range(6)])
    assert np.array_equal(found.video, [ten(picture(i, 8 + i)) for i in range(6)])


def test_ucf51_names_without_a_group(tmp_path):
    write_text(tmp_path / "ucf51checked.csv", ["category,video_id", "PlayingCello,v_PlayingCello_02_c04"])
    write_text(tmp_path / "UCF51Categories.txt", ["PlayingCello"])
    assert "v_PlayingCello_02_c04" in error_of(lambda: list_ucf51(tmp_path, tmp_path, True))


UCF_NAMES = ["PlayingGuitar", "FrisbeeCatch", "Bowling\tbowling", "PlayingFlute"]
VGG_NAMES = ["playing acoustic guitar", "playing frisbee", "bowling impact", "playing flute"]
UCF_CLIPS = [("PlayingFlute", "v_PlayingFlute_g02_c03"), ("FrisbeeCatch", "v_FrisbeeCatch_g09_c01"),
             ("PlayingGuitar", "v_PlayingGuitar_g11_c01")]
VGG_CLIPS = [("bowling impact", "bowling0001", "train"), ("playing flute", "flute000001", "val"),
             ("playing acoustic guitar", "guitar00001", "test"), ("playing flute", "flute000002", "train")]


def ucf_vgg(lists):
    write_text(lists / "UCF101sameVGGSound.txt", UCF_NAMES)
    write_text(lists / "VGGSoundsameUCF101.txt", VGG_NAMES)
    write_text(lists / "ucf2vggsound.csv", ["category,video_id", *map(",".join, UCF_CLIPS)])
    write_text(lists / "vggsound2ucf.csv", ["category,video_id,split", *map(",".join, VGG_CLIPS)])


@pytest.mark.parametrize("faithful", [False, True])
def test_ucf_vgg(tmp_path, faithful):
    ucf_vgg(tmp_path / "UCF101/data")
    for i, (_, name) in enumerate(UCF_CLIPS):
        zipped(tmp_path / f"UCF101/feature/video/zip/{name}.zip", picture(i))
    for i, (_, name, _) in enumerate(VGG_CLIPS):
        zipped(tmp_path / f"vggsound40k/feature/audio/zip/{name}.zip", sound(i, 9 + i))
    convert("ucf-vgg", tmp_path / "UCF101", "--out", "out.h5", "--subset", "--vggsound", tmp_path / "vggsound40k",
            *["--faithful"] * faithful, cwd=tmp_path)
    classes = VGG_NAMES if faithful else ["playing acoustic guitar", "playing flute"]
    ucf, vgg = (opened(tmp_path / f"out-{side}.h5") for side in ("ucf", "vgg"))
    assert ucf.classes == vgg.classes == classes
    assert (ucf.modalities, vgg.modalities) == (["video"], ["audio"])
    keep = range(3) if faithful else [0, 2]
    assert ucf.id == [UCF_CLIPS[i][1] for i in keep]
    assert ucf.label.tolist() == [classes.index(VGG_NAMES[UCF_NAMES.index(UCF_CLIPS[i][0])]) for i in keep]
    assert ucf.split.tolist() == [(TEST, VAL, TRAIN)[i] for i in keep]
    assert np.array_equal(ucf.video, [ten(picture(i)) for i in keep])
    keep = range(4) if faithful else [1, 2, 3]
    assert vgg.id == [VGG_CLIPS[i][1] for i in keep]
    assert vgg.label.tolist() == [classes.index(VGG_CLIPS[i][0]) for i in keep]
    assert vgg.split.tolist() == [(TRAIN, VAL, TEST, TRAIN)[i] for i in keep]
    assert np.array_equal(vgg.audio, [ten(sound(i, 9 + i)) for i in keep])


def test_ucf_vgg_category_files_are_parallel(tmp_path):
    ucf_vgg(tmp_path)
    write_text(tmp_path / "UCF101sameVGGSound.txt", UCF_NAMES[:-1])
    message = error_of(lambda: list_ucf_vgg(tmp_path, tmp_path, tmp_path, Options(subset=True)))
    assert "the two category files have 3 and 4 lines" in message


# ----------------------------------------------------------------------------------------------------------------- text


PROMPT = "The sound of a clarinettist being played"  # its fifth word is two pieces
PIECES = ["the", "sound", "of", "a", "clarin", "##ettist", "being", "played"]
LONG = "a man and a woman and a dog and a cat with the sound of a child being played"
SENTENCES = [PROMPT, LONG, "clarinettist", "sound", "a child", "the dog being played"]


def cut(word: str) -> list:
    """Word pieces of a made-up tokenizer: six letters, then the rest."""
    return [word[:6], "##" + word[6:]] if len(word) > 6 else [word]


VOCABULARY = {"[PAD]": 0, "[CLS]": 101, "[SEP]": 102} | {piece: 1000 + i for i, piece in enumerate(dict.fromkeys(
    piece for text in SENTENCES for word in text.lower().split() for piece in cut(word)))}
NAMED = {i: piece for piece, i in VOCABULARY.items()}


class Tokenizer:
    """What is needed of a tokenizer of `transformers`."""

    def tokenize(self, text, **_):
        return [piece for word in text.lower().split() for piece in cut(word)]

    def convert_tokens_to_ids(self, pieces):
        return [VOCABULARY[piece] for piece in pieces]

    def convert_ids_to_tokens(self, ids):
        return [NAMED[int(i)] for i in ids]

    def get_vocab(self):
        return dict(VOCABULARY)

    def __call__(self, text, truncation=False, max_length=None, return_tensors=None, **_):
        ids = self.convert_tokens_to_ids(self.tokenize(text))
        ids = [101, *ids[:max_length - 2 if truncation and max_length else None], 102]
        return {"input_ids": torch.tensor([ids]) if return_tensors else ids}


class Model(torch.nn.Module):
    """The vector of a token is its id, its place in the sentence, then zeros."""

    def __init__(self, size=768):
        super().__init__()
        self.config = SimpleNamespace(hidden_size=size)

    def forward(self, input_ids, **_):
        hidden = torch.zeros(*input_ids.shape, self.config.hidden_size)
        hidden[..., 0], hidden[..., 1] = input_ids, torch.arange(input_ids.shape[1])
        return SimpleNamespace(last_hidden_state=hidden)


def fake_transformers(monkeypatch, size=768):
    fake = types.ModuleType("transformers")
    fake.AutoTokenizer = SimpleNamespace(from_pretrained=lambda name, **_: Tokenizer())
    fake.AutoModel = SimpleNamespace(from_pretrained=lambda name, **_: Model(size))
    monkeypatch.setitem(sys.modules, "transformers", fake)


@pytest.fixture
def transformers(monkeypatch):
    fake_transformers(monkeypatch)


def embedded(text: str, keep=lambda piece: True, most: int = 510) -> np.ndarray:
    """What the made-up BERT gives for the pieces of `text` that are kept."""
    out, row = np.zeros((T, 768), np.float16), 0
    for place, piece in enumerate(Tokenizer().tokenize(text)[:most]):
        if keep(piece) and row < T:
            out[row, :2] = VOCABULARY[piece], place + 1
            row += 1
    return out


def vectors_of(pieces: list) -> np.ndarray:
    return np.random.default_rng(len(pieces)).standard_normal((len(pieces), 768)).astype(np.float32)


def rows_of(vectors: np.ndarray, keep: list) -> np.ndarray:
    return np.concatenate([vectors[keep], np.zeros((T - len(keep), 768), np.float32)])


VOCAB = {piece: 10 + i for i, piece in enumerate(PIECES)} | {"clarinettist": 99}
ALL = set(VOCAB.values()) | {0}


@pytest.mark.parametrize("pipeline, vocabulary, admitted, keep", [
    ("plain", VOCAB, set(), range(8)),
    ("piece", VOCAB, ALL, range(8)),
    ("piece", VOCAB, ALL - {11, 15}, [0, 2, 3, 4, 6, 7]),
    ("piece", VOCAB | {"the": 0}, ALL, range(1, 8)),
    ("piece", VOCAB, set(), []),
    ("word", {k: v for k, v in VOCAB.items() if v != 99}, ALL, [0, 1, 2, 3, 6, 7]),
    ("word", {k: v for k, v in VOCAB.items() if v != 99}, ALL - {11}, [0, 2, 3, 6, 7]),
    ("word", {k: v for k, v in VOCAB.items() if k not in ("clarinettist", "played")}, ALL, [0, 1, 2, 3, 6]),
    ("word", VOCAB | {"the": 0, "of": 0}, ALL - {99}, [1, 3, 6, 7]),
    ("word", VOCAB, {14, 15}, []),
    ("word", VOCAB, {0}, [])])
def test_kept_vectors(pipeline, vocabulary, admitted, keep):
    vectors = vectors_of(PIECES)
    found = kept_vectors(PIECES, vectors, vocabulary, pipeline, admitted)
    assert found.dtype == np.float32 and np.array_equal(found, rows_of(vectors, list(keep)))


@pytest.mark.parametrize("pipeline", ["plain", "piece", "word"])
def test_kept_vectors_are_ten_at_most(pipeline):
    pieces = [f"word{i}" for i in range(14)]
    vectors = vectors_of(pieces)
    found = kept_vectors(pieces, vectors, {p: i + 1 for i, p in enumerate(pieces)}, pipeline, set(range(1, 15)))
    assert np.array_equal(found, vectors[:10])
    nothing = kept_vectors([], np.zeros((0, 768), np.float32), {}, pipeline, {1})
    assert nothing.shape == (T, 768) and not nothing.any()


def test_the_ten_kept_words_are_counted_after_the_filter():
    pieces = [f"word{i}" for i in range(25)]
    vectors = vectors_of(pieces)
    for pipeline in ("piece", "word"):
        found = kept_vectors(pieces, vectors, {p: i for i, p in enumerate(pieces)}, pipeline, set(range(0, 25, 2)))
        assert np.array_equal(found, vectors[2:22:2])  # id 0 is never admitted


def word_filter(path, pieces, entries: int):
    ids = dict.fromkeys([0, *(VOCABULARY[p] for p in pieces), *range(30000, 32000)])
    path.write_bytes(pickle.dumps({token: i for i, token in enumerate(list(ids)[:entries])}))
    return path


def with_prompts(root):
    """VGGSound with three sounds and prompts."""
    vggsound(root, CLIPS[:3], False)
    write_text(root / "data/vggsoundCategories2Prompts.csv",
               ["label,prompt", *(f"{c},{p}" for c, p in zip(CLASSES[::-1], (PROMPT, LONG, "clarinettist")))])
    return root


FILTERED = ["the", "of", "a", "being", "played", "clarin", "and"]


@pytest.mark.parametrize("pipeline, entries, keep", [
    ("plain", None, lambda piece: True), ("word", 1046, lambda piece: piece in FILTERED and piece != "clarin"),
    ("piece", 1435, lambda piece: piece in FILTERED)])
def test_vggsound_with_text(tmp_path, transformers, pipeline, entries, keep):
    """`clarin` is in the filter, but only as a part of a word that was split."""
    root = with_prompts(tmp_path / "root")
    given = ["--word-filter", word_filter(tmp_path / "filter.pkl", FILTERED, entries)] if entries else []
    convert("vggsound", root, "--out", "out.h5", "--subset", "--modalities", "audio", "text", "--bert", "bert",
            "--pipeline", pipeline, *given, cwd=tmp_path)
    found = opened(tmp_path / "out.h5")
    assert found.modalities == ["audio", "text"] and found.text.shape == (3, T, 768)
    for i, (category, clip, _) in enumerate(CLIPS[:3]):
        prompt = dict(zip(CLASSES[::-1], (PROMPT, LONG, "clarinettist")))[category]
        assert np.array_equal(found.text[found.id.index(clip)], embedded(prompt, keep))


def test_the_word_pipeline_reads_25_pieces_with_the_special_ones(tmp_path, transformers):
    root = with_prompts(tmp_path / "root")
    write_text(root / "data/vggsoundCategories2Prompts.csv", ["label,prompt", *(
        f"{c},{'sound ' * n + 'the dog'}" for c, n in zip(CLASSES, (21, 22, 23)))])
    path = word_filter(tmp_path / "filter.pkl", ["the", "dog"], 1046)
    convert("vggsound", root, "--out", "out.h5", "--subset", "--modalities", "text", "--bert", "bert", "--pipeline",
            "word", "--word-filter", path, cwd=tmp_path)
    found = opened(tmp_path / "out.h5")
    kept = found.text[[found.id.index(clip) for clip in ("-Nz15RLDx4R", "a_b-c_d-e_f", "IqTSyx3L0j8")]].any(-1).sum(-1)
    assert kept.tolist() == [2, 1, 0]


def text_error(root, *options, out="out.h5") -> str:
    return convert_error("vggsound", root, "--out", out, "--subset", "--modalities", "text", *options,
                         cwd=root.parent)


def test_text_that_cannot_be_made(tmp_path, monkeypatch):
    root = with_prompts(tmp_path / "root")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "transformers" in text_error(root, "--bert", "bert")
    assert "not a file in a folder" in text_error(root, "--bert", "bert", out="absent/out.h5")  # before all sentences
    assert "--bert" in text_error(root)
    fake_transformers(monkeypatch, 384)
    message = text_error(root, "--bert", "bert")
    assert "384" in message and "768" in message


@pytest.mark.parametrize("pipeline, expected", [("word", 1046), ("piece", 1435)])
def test_word_filters_have_the_size_of_the_authors(tmp_path, transformers, pipeline, expected):
    root = with_prompts(tmp_path / "root")
    for entries in (expected - 1, expected + 1):
        path = word_filter(tmp_path / "filter.pkl", FILTERED, entries)
        message = text_error(root, "--bert", "bert", "--pipeline", pipeline, "--word-filter", path)
        assert str(entries) in message and str(expected) in message and "filter.pkl" in message
    assert "--word-filter" in text_error(root, "--bert", "bert", "--pipeline", pipeline)


@pytest.mark.parametrize("payload", ["os.system", "eval", "beside an array", "numpy.savetxt"])
def test_a_malicious_word_filter_is_refused(tmp_path, transformers, payload):
    root, path, marker = with_prompts(tmp_path / "root"), tmp_path / "filter.pkl", tmp_path / "marker"
    for content in (LIVE[payload](str(marker)), {0: 0, 1037: LIVE[payload](str(marker))}):
        path.write_bytes(pickle.dumps(content))
        message = text_error(root, "--bert", "bert", "--pipeline", "word", "--word-filter", path)
        assert str(path) in message and not marker.exists()


@pytest.mark.parametrize("content", [[1, 2], "text", {"the": 1}, np.arange(1046)])
def test_a_word_filter_is_a_dict_of_token_ids(tmp_path, transformers, content):
    root, path = with_prompts(tmp_path / "root"), tmp_path / "filter.pkl"
    path.write_bytes(pickle.dumps(content))
    assert str(path) in text_error(root, "--bert", "bert", "--pipeline", "word", "--word-filter", path)


def test_a_class_without_a_prompt(tmp_path, transformers):
    root = with_prompts(tmp_path / "root")
    write_text(root / "data/vggsoundCategories2Prompts.csv", ["label,prompt", f"{CLASSES[0]},{PROMPT}"])
    message = text_error(root, "--bert", "bert")
    assert "vggsoundCategories2Prompts.csv" in message and any(name in message for name in CLASSES[1:])


# ------------------------------------------------------------------------------------------------------------ retrieval


def even(array: np.ndarray) -> np.ndarray:
    return np.stack([array[t * len(array) // T] for t in range(T)]).astype(np.float16)


def mscoco(root) -> dict:
    lengths = {"000000000042": 4, "000000391895": 10, "000000000007": 25}
    pairs = [(391895, LONG), (42, PROMPT), (7, "a child"), (42, "the dog being played")]
    annotations = [{"image_id": image, "caption": caption} for image, caption in pairs]
    write_text(root / "val_part_1.json", [json.dumps({"annotations": annotations})])
    for name, length in lengths.items():
        zipped(root / f"feature/zip/{name}.zip", picture(length, length))
    return {"lengths": lengths, "pairs": pairs}


def test_mscoco(tmp_path, transformers):
    expected = mscoco(tmp_path / "MSCOCO")
    convert("mscoco", tmp_path / "MSCOCO", "--out", "out.h5", "--bert", "bert", cwd=tmp_path)
    found = opened(tmp_path / "out.h5")
    assert found.id == [f"{i:012d}" for i, _ in expected["pairs"]] and sorted(found.modalities) == ["text", "video"]
    assert found.split.tolist() == [TEST] * 4 and (found.features.label == -1).all()
    for place, (name, (_, caption)) in enumerate(zip(found.id, expected["pairs"])):
        length = expected["lengths"][name]
        assert np.array_equal(found.video[place], even(picture(length, length)))
        assert np.array_equal(found.text[place], embedded(caption))


@pytest.mark.parametrize("content", ["{", "[]", '{"annotations": [{"image_id": 1}]}', '{"annotations": 1}',
                                     '{"annotations": [{"image_id": "x", "caption": "a"}]}', '{"annotations": []}'])
def test_mscoco_lists_that_cannot_be_read(tmp_path, transformers, content):
    write_text(tmp_path / "MSCOCO/val_part_1.json", [content])
    assert "val_part_1.json" in convert_error("mscoco", tmp_path / "MSCOCO", "--out", "out.h5", "--bert", "bert",
                                              cwd=tmp_path)


NAMES = ["Distorted AM Radio noise.wav", "Creek, small (2).wav"]


def clotho(root):
    captions = [[LONG, "a child", "sound", PROMPT, "the dog being played"], ["a child", LONG, PROMPT, "sound", "sound"]]
    with open(write_text(root / "captions.csv", []), "w", newline="") as stream:
        csv.writer(stream).writerows([["file_name", *(f"caption_{i}" for i in range(1, 6))],
                                      *([name, *five] for name, five in zip(NAMES, captions))])
    for i, name in enumerate(NAMES):
        zipped(root / f"feature/zip/{name[:-4]}.zip", sound(i, 15 + 9 * i))
    return captions


def test_clotho(tmp_path, transformers):
    captions = clotho(tmp_path / "clotho2.1")
    convert("clotho", tmp_path / "clotho2.1", "--captions", tmp_path / "clotho2.1/captions.csv", "--out", "out.h5",
            "--bert", "bert", cwd=tmp_path)
    found = opened(tmp_path / "out.h5")
    assert found.modalities == ["audio", "text"] and found.split.tolist() == [TEST] * 10
    assert found.group.tolist() == [0] * 5 + [1] * 5 and len(set(found.id)) == 10
    for i in range(10):
        assert found.id[i].startswith(NAMES[i // 5][:-4])
        assert np.array_equal(found.audio[i], even(sound(i // 5, 15 + 9 * (i // 5))))
        assert np.array_equal(found.text[i], embedded(captions[i // 5][i % 5]))


# ------------------------------------------------------------------------------------------------------------- AVSBench


AVS = [("train_clip", "chainsawing_trees", "train"), ("val_clip", "ambulance_siren", "val"),
       ("test_clip", "chainsawing_trees", "test")]
AVS_CLASSES = ["ambulance_siren", "chainsawing_trees"]


def drawn(clip: int, frame: int) -> np.ndarray:
    """What is seen in a frame: a bar that moves."""
    shape = np.zeros((224, 224), bool)
    shape[20 * clip:20 * clip + 30, 30 * frame:30 * frame + 25] = True
    return shape


def save_mask(path, shape: np.ndarray, mode: str):
    from PIL import Image
    path.parent.mkdir(parents=True, exist_ok=True)
    values = Image.fromarray(shape.astype(np.uint8) * (1 if mode == "L, 0 and 1" else 255))
    (values if mode == "L, 0 and 1" else values.convert(mode)).save(path)


def avs(root, lengths=(5, 5, 5), mode="L", maps=()):
    """The folders of AVSBench-S4, with sounds of these lengths and masks of this kind of picture."""
    write_text(root / "s4/s4_meta_data.csv", ["video,start,class,split", *(f"{n},0,{c},{s}" for n, c, s in AVS)])
    write_text(root / "avs/data/AVSBenchCategories2Prompts.csv", ["label,prompt", f"ambulance_siren,{PROMPT}",
                                                                  "chainsawing_trees,a child"])
    for i, (name, category, split) in enumerate(AVS):
        zipped(root / f"avs/feature/audio/{split}/zip/{category}/{name}.zip", sound(i, lengths[i]))
        if maps:
            zipped(root / f"maps/{split}/{category}/{name}.zip", picture(i, 5))
        for frame in range(1, 2 if split == "train" else 6):
            save_mask(root / f"s4/gt_masks/{split}/{category}/{name}/{name}_{frame}.png", drawn(i, frame), mode)
    return ["avs", root / "avs", "--out", "out.h5", "--subset", "--bert", "bert", "--s4", root / "s4", *maps]


def twice(array: np.ndarray) -> np.ndarray:
    """Five rows (fewer repeat the last one, more are cut), each of them twice."""
    return np.repeat(ten(array, 5), 2, axis=0)


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "L, 0 and 1"])
def test_avs(tmp_path, transformers, mode):
    pytest.importorskip("PIL")
    maps = ["--maps", tmp_path / "maps"] * (mode == "L")
    convert(*avs(tmp_path, mode=mode, maps=maps), cwd=tmp_path)
    found = opened(tmp_path / "out.h5", checked=False)
    assert found.modalities == ["audio", *["video"] * bool(maps), "text"]
    assert found.id == [name for name, _, _ in AVS] and found.classes == AVS_CLASSES
    assert found.label.tolist() == [1, 0, 1] and found.split.tolist() == [TRAIN, VAL, TEST]
    assert found.mask.shape == (3, T, 224, 224) and found.mask.dtype == np.uint8
    for i in range(3):
        assert np.array_equal(found.audio[i], twice(sound(i, 5)))
        assert np.array_equal(found.text[i], embedded("a child" if found.label[i] else PROMPT))
        if maps:
            assert np.array_equal(found.video[i], twice(picture(i, 5)))
        for t in range(T):
            seen = drawn(i, t // 2 + 1) * (found.label[i] + 1)
            assert np.array_equal(found.mask[i, t], np.full((224, 224), 255) if i == 0 and t > 1 else seen), (i, t)


def test_avs_files_pass_the_check(tmp_path, transformers):
    pytest.importorskip("PIL")
    convert(*avs(tmp_path), cwd=tmp_path)
    opened(tmp_path / "out.h5", checked=True)


def test_avs_sounds_are_brought_to_five_seconds_first(tmp_path, transformers):
    pytest.importorskip("PIL")
    convert(*avs(tmp_path, lengths=(3, 8, 5)), cwd=tmp_path)
    found = opened(tmp_path / "out.h5", checked=False)
    for i, length in enumerate((3, 8, 5)):
        assert np.array_equal(found.audio[i], twice(sound(i, length))), length


def test_avs_masks_that_cannot_be_read(tmp_path, transformers):
    pytest.importorskip("PIL")
    given = avs(tmp_path)
    path = tmp_path / "s4/gt_masks/val/ambulance_siren/val_clip/val_clip_3.png"
    for spoil in (lambda: path.write_bytes(path.read_bytes()[:60]), lambda: path.write_bytes(b"no picture"),
                  path.unlink, lambda: save_mask(path, drawn(1, 3)[:100], "L")):
        spoil()
        assert "val_clip_3.png" in convert_error(*given, cwd=tmp_path)
    convert(*given, "--on-error", "skip", cwd=tmp_path)
    assert opened(tmp_path / "out.h5", checked=False).id == ["train_clip", "test_clip"]
    assert "val_clip" in (tmp_path / "out.h5.skipped.txt").read_text()


@pytest.mark.parametrize("name", ["mscoco", "clotho", "avs"])
def test_text_errors_name_options_that_the_set_has(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "transformers", None)
    if name == "mscoco":
        mscoco(tmp_path)
        given = ["mscoco", tmp_path, "--out", "out.h5"]
    elif name == "clotho":
        clotho(tmp_path)
        given = ["clotho", tmp_path, "--out", "out.h5", "--captions", tmp_path / "captions.csv"]
    else:
        pytest.importorskip("PIL")
        given = [arg for arg in avs(tmp_path) if arg not in ("--bert", "bert")]
    offered = captured_here("official.convert", name, "--help", cwd=tmp_path).stdout
    for options in ([], ["--bert", "bert"]):
        for option in re.findall(r"--[a-z-]+", convert_error(*given, *options, cwd=tmp_path)):
            assert option in offered


# ----------------------------------------------------------------------------------------------- arrays of one's own


OWN = [("b-2", "test", "cat"), ("a 1", "train", "dog"), ("c", "val", ""), ("d", "train", "cat")]


def npy_folder(root, rows=OWN, lengths=(4, 4, 4, 4), columns="id,split,label"):
    """Two modalities of four clips -> {modality: [array]}."""
    arrays = {"video": [], "skeleton": []}
    for m, shape in (("video", (3, 2, 5)), ("skeleton", (6,))):
        for i, (name, *_) in enumerate(rows):
            array = np.random.default_rng(i).standard_normal((lengths[i], *shape)).astype((">f8", "<f4", "<f2")[i % 3])
            arrays[m].append(array)
            (root / m).mkdir(parents=True, exist_ok=True)
            np.save(root / m / f"{name}.npy", array)
    (root / "__MACOSX").mkdir(exist_ok=True)
    write_text(root / "clips.csv", [columns, *(",".join(row) for row in rows)])
    return arrays


def test_npy_folder(tmp_path):
    arrays = npy_folder(tmp_path / "mine")
    done = convert("npy-folder", tmp_path / "mine", "--out", "out.h5", cwd=tmp_path)
    found = opened(tmp_path / "out.h5")
    assert found.id == [name for name, _, _ in OWN] and found.split.tolist() == [TEST, TRAIN, VAL, TRAIN]
    assert found.classes == ["cat", "dog"] and found.label.tolist() == [0, 1, -1, 0]
    assert found.modalities == ["video", "skeleton"] and "padded" not in done.stdout
    for m in arrays:
        assert np.array_equal(getattr(found, m), np.stack(arrays[m]).astype(np.float16))
    with h5py.File(tmp_path / "out.h5") as h5:
        assert h5.attrs["source"] == h5.attrs["name"] == "mine"


def test_npy_folder_without_labels_and_with_a_list_elsewhere(tmp_path):
    npy_folder(tmp_path / "mine", [row[:2] for row in OWN], columns="id,split")
    (tmp_path / "mine/clips.csv").rename(tmp_path / "list.csv")
    convert("npy-folder", tmp_path / "mine", "--out", "out.h5", "--table", "list.csv", cwd=tmp_path)
    found = opened(tmp_path / "out.h5")
    assert found.classes == [] and (found.features.label == -1).all() and not hasattr(found, "label")


def test_npy_folder_of_clips_of_several_lengths(tmp_path):
    arrays = npy_folder(tmp_path / "mine", lengths=(4, 6, 2, 4))
    message = convert_error("npy-folder", tmp_path / "mine", "--out", "out.h5", cwd=tmp_path)
    assert "a 1.npy" in message and "6 segments" in message and "--segments" in message
    done = convert("npy-folder", tmp_path / "mine", "--out", "out.h5", "--segments", 3, cwd=tmp_path)
    found = opened(tmp_path / "out.h5")
    for m in arrays:
        assert np.array_equal(getattr(found, m), [ten(array, 3) for array in arrays[m]])
    assert "padded to 3 segments: 1 clips" in done.stdout and "cut to 3 segments: 3 clips" in done.stdout


def test_npy_folder_of_many_modalities_and_lengths(tmp_path):
    names = [f"sensor{i}" for i in range(20)]
    for i, name in enumerate(names):
        (tmp_path / "mine" / name).mkdir(parents=True)
        for clip, length in (("a", 2), ("b", 4)):
            np.save(tmp_path / "mine" / name / f"{clip}.npy", np.full((length, 5), i, np.float32))
    write_text(tmp_path / "mine/clips.csv", ["id,split", "a,train", "b,test"])
    done = convert("npy-folder", tmp_path / "mine", "--out", "out.h5", "--segments", 3, cwd=tmp_path)
    assert all(f"{name} {word} to 3 segments: 1 clips" in done.stdout for name in names for word in ("padded", "cut"))


def unequal_modalities(root):
    for path in (root / "skeleton").iterdir():
        np.save(path, np.load(path)[:2])


NPY_FAULTS = {  # what is done to the folder, what the message names
    "a row twice": (lambda root: npy_folder(root, [OWN[0], *OWN[:3]]), "listed 2 times"),
    "an id that leads out": (lambda root: write_text(root / "clips.csv", ["id,split", "../c,train"]), "../c"),
    "a split of another name": (lambda root: write_text(root / "clips.csv", ["id,split", "c,training"]), "training"),
    "no column id": (lambda root: write_text(root / "clips.csv", ["name,split", "c,train"]), "'id'"),
    "no row": (lambda root: write_text(root / "clips.csv", ["id,split"]), "clips.csv"),
    "no list": (lambda root: (root / "clips.csv").unlink(), "clips.csv"),
    "no array": (lambda root: (root / "video/c.npy").unlink(), "c.npy"),
    "a reserved name": (lambda root: (root / "video").rename(root / "label"), "label"),
    "another depth": (lambda root: np.save(root / "video/b-2.npy", np.zeros((4, 3, 2), "f4")), "(4, 3, 2)"),
    "another width": (lambda root: np.save(root / "video/d.npy", np.zeros((4, 3, 2, 6), "f4")), "d.npy"),
    "objects": (lambda root: np.save(root / "video/d.npy", np.array([{}, 1], object), allow_pickle=True), "d.npy"),
    "no npy": (lambda root: (root / "video/d.npy").write_bytes(b"clip"), "d.npy"),
    "a file cut off": (lambda root: (root / "video/d.npy").write_bytes((root / "video/d.npy").read_bytes()[:-9]),
                       "d.npy"),
    "other lengths in a modality": (unequal_modalities, "--segments")}


@pytest.mark.parametrize("fault", NPY_FAULTS)
def test_npy_folders_that_cannot_be_read(tmp_path, fault):
    npy_folder(tmp_path / "mine")
    spoil, named = NPY_FAULTS[fault]
    spoil(tmp_path / "mine")
    assert named in convert_error("npy-folder", tmp_path / "mine", "--out", "out.h5", cwd=tmp_path)


def test_npy_folder_without_a_folder(tmp_path):
    npy_folder(tmp_path / "mine")
    message = convert_error("npy-folder", tmp_path / "none", "--table", tmp_path / "mine/clips.csv", "--out", "out.h5",
                            cwd=tmp_path)
    assert "none" in message
    assert "--segments 0" in convert_error("npy-folder", tmp_path / "mine", "--out", "out.h5", "--segments", 0,
                                           cwd=tmp_path)


# ----------------------------------------------------------------------- lists with another number of rows (section 13)


def asserted(action, found, expected):
    message = error_of(action)
    for number in (found, expected):
        assert re.search(rf"(?<!\d){number}(?!\d)", message.replace(",", "")), (number, message)


def rows_of_40k(path, rows: int, train: int = 24515):
    write_text(path, ["category,video_id,split", *(f"class {i % 141},{i:011d},{'train' if i < train else 'val'}"
                                                   for i in range(rows))])


def test_vggsound_assertions(tmp_path):
    classes = [f"class {i}" for i in range(141)]
    write_text(tmp_path / "VggsoundAVEL40kCategories.txt", classes)
    path = tmp_path / "vggsound-avel40k.csv"

    def listed(which="40k"):
        return list_vggsound(tmp_path, tmp_path, which, False, False)
    rows_of_40k(path, 20000)
    for which in ("24k", "40k"):
        asserted(lambda: listed(which), 20000, 40801)
    rows_of_40k(path, 40801, 24514)
    asserted(lambda: listed("24k"), 24514, 24515)
    write_text(tmp_path / "VggsoundAVEL40kCategories.txt", [*classes, "one more"])
    asserted(listed, 142, 141)
    rows_of_40k(tmp_path / "vggsound-avel90k-new.csv", 20000)
    asserted(lambda: listed("90k"), 20000, 87323)


def test_vggsound_ids_have_11_characters(tmp_path):
    write_text(tmp_path / "VggsoundAVEL40kCategories.txt", CLASSES)
    for clip in ("0123456789", "0123456789ab"):
        write_text(tmp_path / "vggsound-avel40k.csv", ["category,video_id,split", f"race car,{clip},train"])
        message = error_of(lambda: list_vggsound(tmp_path, tmp_path, "40k", False, True))
        assert clip in message and "11" in message


def full_ave(folder, annotations=None):
    """Lists of AVE of full length, with other names and orders."""
    if annotations is None:
        write_text(folder / "Annotations.txt", ["Category&VideoID&Quality&StartTime&EndTime",
                                                *(f"class {i // 150}&{i:011d}&good&0&10" for i in range(4143))])
    else:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "Annotations.txt").symlink_to(annotations)
    for name, rows in (("train", range(3339)), ("val", range(3339, 3741)), ("test", range(3741, 4143))):
        write_h5(folder / f"{name}_order.h5", order=np.array(rows))
    return folder


def test_ave_assertions(tmp_path):
    full_ave(tmp_path)
    assert len(list_ave(tmp_path, tmp_path, False).ids) == 4143
    for name, size, first in (("train", 3339, 0), ("val", 402, 3339), ("test", 402, 3741)):
        write_h5(tmp_path / f"{name}_order.h5", order=np.arange(first, first + size - 1))
        asserted(lambda: list_ave(tmp_path, tmp_path, False), size - 1, size)
        write_h5(tmp_path / f"{name}_order.h5", order=np.arange(first, first + size))
    write_h5(tmp_path / "val_order.h5", order=np.arange(402))
    error_of(lambda: list_ave(tmp_path, tmp_path, False))
    lines = (tmp_path / "Annotations.txt").read_text().splitlines()
    write_text(tmp_path / "Annotations.txt", lines[:-3])
    asserted(lambda: list_ave(tmp_path, tmp_path, False), 4140, 4143)


def test_ave_avvp_assertions(tmp_path):
    full_ave(tmp_path / "ave")
    write_text(tmp_path / "AVE_AVVP_Categories.txt", [f"class {i}" for i in range(12)])
    labels = np.zeros((4143, T, 13), np.float32)
    labels[:, :, 4] = 1

    def listed():
        return list_ave_avvp(tmp_path, tmp_path / "ave", tmp_path / "ave", False)
    write_h5(tmp_path / "ave_avvp_labels.h5", avadataset=labels)
    write_h5(tmp_path / "ave_avvp_order.h5", order=np.arange(1831))
    assert len(listed().ids) == 1831
    write_h5(tmp_path / "ave_avvp_order.h5", order=np.arange(1830))
    asserted(listed, 1830, 1831)
    write_h5(tmp_path / "ave_avvp_order.h5", order=np.arange(1831))
    labels[1830, 9, 5] = 1
    write_h5(tmp_path / "ave_avvp_labels.h5", avadataset=labels)
    assert "ave_avvp_labels.h5" in error_of(listed)
    for side, expected in (("audio", 1085), ("visual", 1032)):
        write_text(tmp_path / f"AVE_AVVP_eval_{side}_checked_combined.csv",
                   [HEADER, "KSRjje7GH44_60_70\t0\t10\tclass 1"])
        asserted(lambda: list_avvp(tmp_path, tmp_path, side, Options(), "AVE_AVVP", tmp_path), 1, expected)


@pytest.mark.parametrize("side, rows, segments", [("audio", 1846, 275), ("visual", 1661, 232)])
def test_avvp_assertions(tmp_path, side, rows, segments):
    write_text(tmp_path / "AVVP_Categories.txt", [f"class_{i}" for i in range(25)])
    names = [f"{i:011d}_0_10" for i in range(rows)]
    for part in ("val", "test"):
        write_text(tmp_path / f"AVVP_{part}_pd.csv", ["filename\tevent_labels", *(f"{n}\tclass_0" for n in names)])

    def listed(count):
        write_text(tmp_path / f"AVVP_eval_{side}_checked_combined.csv",
                   [HEADER, *(f"{n}\t0\t10\tclass_0" for n in names[:count])])
        return list_avvp(tmp_path, tmp_path, side, Options())
    asserted(lambda: listed(rows - 1), rows - 1, rows)
    asserted(lambda: listed(rows), 10 * rows, segments)


def test_ucf_assertions(tmp_path):
    write_text(tmp_path / "UCF51Categories.txt", [f"class {i}" for i in range(51)])

    def listed(rows):
        write_text(tmp_path / "ucf51checked.csv",
                   ["category,video_id", *(f"class {i % 51},v_class_g01_c{i:04d}" for i in range(rows))])
        return list_ucf51(tmp_path, tmp_path, False)
    assert len(listed(6831).ids) == 6831
    asserted(lambda: listed(6830), 6830, 6831)
    write_text(tmp_path / "UCF51Categories.txt", [f"class {i}" for i in range(50)])
    asserted(lambda: listed(6831), 50, 51)


def test_ucf_vgg_assertions(tmp_path):
    for name in ("UCF101sameVGGSound", "VGGSoundsameUCF101"):
        write_text(tmp_path / f"{name}.txt", [f"class {i}" for i in range(16)])

    def listed(videos, sounds):
        write_text(tmp_path / "ucf2vggsound.csv",
                   ["category,video_id", *(f"class {i % 16},v_class_g01_c{i:04d}" for i in range(videos))])
        write_text(tmp_path / "vggsound2ucf.csv",
                   ["category,video_id,split", *(f"class {i % 16},{i:011d},train" for i in range(sounds))])
        return list_ucf_vgg(tmp_path, tmp_path, tmp_path, Options())
    assert [len(listing.ids) for listing in listed(2003, 4813).values()] == [2003, 4813]
    asserted(lambda: listed(2002, 4813), 2002, 2003)
    asserted(lambda: listed(2003, 4814), 4814, 4813)


def test_prompts_are_141(tmp_path, transformers):
    root = with_prompts(tmp_path / "root")
    names = [f"class {i}" for i in range(141)]
    write_text(root / "data/VggsoundAVEL40kCategories.txt", names)
    rows_of_40k(root / "data/vggsound-avel40k.csv", 40801)
    write_text(root / "data/vggsoundCategories2Prompts.csv", ["label,prompt", *(f"{n},a" for n in [*names, "x"])])
    message = convert_error("vggsound", root, "--out", "out.h5", "--modalities", "text", "--bert", "b", cwd=tmp_path)
    assert "142" in message and "141" in message


def test_avs_assertions(tmp_path, transformers):
    pytest.importorskip("PIL")
    given = avs(tmp_path)
    given.remove("--subset")
    message = convert_error(*given, cwd=tmp_path)
    assert all(re.search(rf"\b{number}\b", message) for number in (1, 3452, 740))


# ---------------------------------------------------------------------------------------------- the authors' real lists


def table_of(path, delimiter=",") -> list:
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream, delimiter=delimiter, quoting=csv.QUOTE_NONE))


@lru_cache
def official(which: str):
    return list_vggsound(OFFICIAL / "vggsound", OFFICIAL, which, True, False)


def counts(listing) -> list:
    return np.bincount(listing.split, minlength=3).tolist()


@real_lists
def test_real_vggsound():
    forty, ninety = official("40k"), official("90k")
    assert (len(forty.ids), counts(forty)) == (40801, [24515, 8171, 8115])
    assert (len(ninety.ids), counts(ninety)) == (87323, [53598, 16858, 16867])
    per_class = np.bincount(forty.label, minlength=141)
    assert forty.classes == ninety.classes and len(forty.classes) == 141
    assert (per_class.min(), per_class.max()) == (53, 506)
    per_class = np.bincount(ninety.label, minlength=141)
    assert (per_class.min(), per_class.max()) == (328, 941)
    assert forty.classes[:3] + forty.classes[-1:] == [*CLASSES, "tapping guitar"]
    assert forty.label[forty.ids.index("IqTSyx3L0j8")] == 0
    splits, others = dict(zip(forty.ids, forty.split)), dict(zip(ninety.ids, ninety.split))
    both = splits.keys() & others.keys()
    assert len(both) == 33508 and all(splits[name] == others[name] for name in both)
    used = list_vggsound(OFFICIAL / "vggsound", OFFICIAL, "24k", False, False)
    assert used.ids == [name for name, split in zip(forty.ids, forty.split) if split == TRAIN]
    assert len(used.ids) == 24515


@real_lists
def test_real_prompts_and_word_filters():
    prompts = table_of(OFFICIAL / "vggsound/vggsoundCategories2Prompts.csv")
    assert [row["label"] for row in prompts] == official("40k").classes
    first, second = (unpickle((OFFICIAL / f"vggsound/{name}.pkl").read_bytes(), name, True)
                     for name in ("cnt", "cnt_new"))
    assert (len(first), len(second)) == (1046, 1435) and list(second)[:1046] == list(first)
    assert 1037 in first and 1996 in first and 0 in first


AVE_CLIPS = {
    "Church bell": 188, "Male speech, man speaking": 176, "Bark": 171, "Fixed-wing aircraft, airplane": 184,
    "Race car, auto racing": 188, "Female speech, woman speaking": 175, "Helicopter": 178, "Violin, fiddle": 187,
    "Flute": 172, "Ukulele": 163, "Frying (food)": 182, "Truck": 138, "Shofar": 102, "Motorcycle": 99,
    "Acoustic guitar": 186, "Train horn": 176, "Clock": 160, "Banjo": 183, "Goat": 100, "Baby cry, infant cry": 83,
    "Bus": 69, "Chainsaw": 160, "Cat": 60, "Horse": 64, "Toilet flush": 180, "Rodents, rats, mice": 109,
    "Accordion": 154, "Mandolin": 156}


@pytest.fixture(scope="module")
def real_ave(tmp_path_factory):
    """The real annotations with orders that leave the rows in place: row i of the listing is row i of AVE."""
    folder = full_ave(tmp_path_factory.mktemp("ave") / "lists", OFFICIAL / "ave/Annotations.txt")
    return folder, list_ave(folder, folder, False)


@real_lists
def test_real_ave(real_ave):
    listing = real_ave[1]
    assert listing.classes == list(AVE_CLIPS) and np.bincount(listing.label).tolist() == list(AVE_CLIPS.values())
    lines = [line.split("&") for line in (OFFICIAL / "ave/Annotations.txt").read_text().splitlines()[1:]]
    assert listing.ids == [line[1] for line in lines] and len(set(listing.ids)) == 4097
    events = dense([[(list(AVE_CLIPS).index(c), int(start), int(end))] for c, _, _, start, end in lines], 28)
    assert np.array_equal(listing.events["audio"], events) and np.array_equal(listing.events["video"], events)


@real_lists
@pytest.mark.parametrize("known, rows", [(14, 1857), (21, 2628)])
def test_real_ave_subsets(real_ave, known, rows):
    listing, folder = real_ave[1], OFFICIAL / "oscmg/AVE_OSCMG"
    with h5py.File(folder / f"train_order_{known}class.h5") as h5:
        order = h5["order"][:]
    annotations = (OFFICIAL / "ave/Annotations.txt").read_text().splitlines()[1:]
    assert (folder / f"trainSet_{known}.txt").read_text().splitlines() == [annotations[i] for i in order]
    assert len(order) == rows == len(set(order.tolist()))
    assert (np.diff(listing.label[order]) >= 0).all() and set(listing.label[order].tolist()) == set(range(known))
    with h5py.File(folder / "train_order_21class.h5") as h5:
        longer = h5["order"][:]
    assert np.array_equal(longer[listing.label[longer] < known], order)


AVVP_SEGMENTS = {
    "audio": "275 755 598 195 5221 961 362 388 1981 1257 994 906 615 207 800 1081 362 861 727 115 671 645 2062 282 370 "
             "1832",
    "visual": "232 565 541 170 1084 865 332 383 1753 1370 1215 1493 535 543 400 912 395 866 450 77 855 714 1344 321 "
              "529 1712"}


def segments(listing) -> list:
    (events,) = listing.events.values()
    return [*events.sum((0, 1)).tolist(), int((~events.astype(bool).any(-1)).sum())]


def real_avvp(side, faithful=True, prefix="AVVP"):
    folder = OFFICIAL / prefix.lower()
    return list_avvp(folder, folder, side, Options(faithful=faithful), prefix, OFFICIAL / "avvp")


@real_lists
@pytest.mark.parametrize("side, rows, val, test", [("audio", 1846, 645, 1197), ("visual", 1661, 579, 1079)])
def test_real_avvp(side, rows, val, test):
    listing = real_avvp(side)
    assert len(listing.ids) == rows and segments(listing) == list(map(int, AVVP_SEGMENTS[side].split()))
    assert listing.classes[:5] == ["Fire_alarm", "Accordion", "Frying_(food)", "Baby_laughter", "Speech"]
    assert len(listing.classes) == 25 and listing.classes[-1] == "Blender"
    llp = {part: {row["filename"] for row in table_of(OFFICIAL / f"avvp/AVVP_{part}_pd.csv", "\t")}
           for part in ("val", "test")}
    part_of = ["val" if name in llp["val"] else "test" if name in llp["test"] else None for name in listing.ids]
    assert (part_of.count("val"), part_of.count("test")) == (val, test)
    assert all(split == {"val": TRAIN, "test": TEST}[part] for split, part in zip(listing.split, part_of) if part)
    clean = real_avvp(side, False)
    twice_listed = {name for name in listing.ids if listing.ids.count(name) > 1}
    (events,) = listing.events.values()
    odd = [name for name, part, on in zip(listing.ids, part_of, events)
           if part is None or name in twice_listed or not on.any()]
    assert len(odd) == (9 if side == "audio" else 3) and not set(odd) & set(clean.ids)
    assert clean.ids == [name for name in listing.ids if name not in odd]


@real_lists
@pytest.mark.parametrize("side, rows, background", [("audio", 1085, 1777), ("visual", 1032, 791)])
def test_real_ave_avvp_targets(side, rows, background):
    listing = real_avvp(side, prefix="AVE_AVVP")
    assert len(listing.ids) == rows and segments(listing)[-1] == background and len(listing.classes) == 12


RENAMED = {  # name in AVVP: name in AVE, clips, positive segments
    "Dog": ("Bark", 171, 1018), "Car": ("Race car, auto racing", 188, 1371), "Helicopter": ("Helicopter", 178, 1462),
    "Violin_fiddle": ("Violin, fiddle", 187, 1713), "Frying_(food)": ("Frying (food)", 182, 1409),
    "Motorcycle": ("Motorcycle", 99, 896), "Acoustic_guitar": ("Acoustic guitar", 186, 1827),
    "Banjo": ("Banjo", 183, 1809), "Baby_cry_infant_cry": ("Baby cry, infant cry", 83, 554),
    "Chainsaw": ("Chainsaw", 160, 1288), "Cat": ("Cat", 60, 348), "Accordion": ("Accordion", 154, 1290)}


@real_lists
def test_real_ave_avvp_source(real_ave):
    folder, every = real_ave
    listing = list_ave_avvp(OFFICIAL / "ave_avvp", folder, folder, False)
    assert len(listing.ids) == 1831 and listing.classes == list(RENAMED)
    assert np.bincount(listing.label).tolist() == [clips for _, clips, _ in RENAMED.values()]
    assert segments(SimpleNamespace(events={"audio": listing.events["audio"]})) == [
        *(positive for _, _, positive in RENAMED.values()), 3325]
    with h5py.File(OFFICIAL / "ave_avvp/ave_avvp_order.h5") as h5:
        order = h5["order"][:]
    with h5py.File(OFFICIAL / "ave_avvp/ave_avvp_labels.h5") as h5:
        assert (h5["avadataset"][:][order].sum(-1) == 1).all() and (np.diff(order) > 0).all()
    row_of = {source[2]: row for row, source in enumerate(every.sources["audio"][1])}
    rows = [row_of[source[2]] for source in listing.sources["audio"][1]]
    assert sorted(rows) == order.tolist() and listing.ids == [every.ids[row] for row in rows]
    columns = [every.classes.index(name) for name, _, _ in RENAMED.values()]
    assert np.array_equal(listing.events["audio"], every.events["audio"][rows][..., columns])
    assert np.array_equal(listing.events["video"], listing.events["audio"])


@real_lists
def test_real_ucf51():
    folder = OFFICIAL / "oscmg/UCF_OSCMG"
    listing = list_ucf51(folder, folder, False)
    assert len(listing.ids) == 6831 == len(set(listing.ids)) and len(listing.classes) == 51
    assert listing.classes[0] == "PlayingCello" and listing.classes[-1] == "StillRings"
    per_class = np.bincount(listing.label, minlength=51)
    assert (per_class[0], per_class[17], per_class[34], per_class[50]) == (164, 151, 158, 112)
    assert all(int(name.split("_g")[1][:2]) in {TEST: range(1, 8), VAL: range(8, 10), TRAIN: range(10, 26)}[split]
               for name, split in zip(listing.ids, listing.split.tolist()))
    for known, rows in ((17, 2289), (34, 4623)):
        subset = table_of(folder / f"ucf51checked_{known}.csv")
        keep = np.flatnonzero(listing.label < known)
        assert len(keep) == rows and [row["video_id"] for row in subset] == [listing.ids[i] for i in keep]
        assert [row["category"] for row in subset] == [listing.classes[listing.label[i]] for i in keep]


@real_lists
def test_real_ucf_vgg():
    folder = OFFICIAL / "ucf"
    listings = list_ucf_vgg(folder, folder, folder, Options(faithful=True))
    names = {side: (folder / f"{name}.txt").read_text().splitlines() for side, name in
             (("ucf", "UCF101sameVGGSound"), ("vgg", "VGGSoundsameUCF101"))}
    forty = dict(zip(official("40k").ids, zip(official("40k").label.tolist(), official("40k").split.tolist())))
    place = {name: i for i, name in enumerate(official("40k").classes)}
    assert [len(listing.ids) for listing in listings.values()] == [2003, 4813]
    assert counts(listings["vgg"]) == [2894, 964, 955] or listings["vgg"].split is None
    vgg = listings["vgg"]
    assert all(forty[name] == (place[vgg.classes[label]], split)
               for name, label, split in zip(vgg.ids, vgg.label.tolist(), vgg.split.tolist()))
    for side, name, sizes in (("ucf", "ucf2vggsound", (1160, 1556)), ("vgg", "vggsound2ucf", (2390, 3518))):
        listing = listings[side]
        assert listing.classes == [line.strip() for line in names["vgg"]] and len(listing.classes) == 16
        for known, size in zip((8, 12), sizes):
            subset = table_of(OFFICIAL / f"oscmg/UCF_VGG_OSCMG/{name}_{known}.csv")
            keep = np.flatnonzero(listing.label < known)
            assert len(keep) == size and [row["video_id"] for row in subset] == [listing.ids[i] for i in keep]
            assert [row["category"] for row in subset] == [names[side][listing.label[i]].strip() for i in keep]


@real_lists
def test_real_ucf_vgg_classes_of_both_sides():
    folder = OFFICIAL / "ucf"
    listings = list_ucf_vgg(folder, folder, folder, Options())
    ucf, vgg = listings["ucf"], listings["vgg"]
    assert ucf.classes == vgg.classes and len(ucf.classes) == 14
    assert not {"playing frisbee", "bowling impact"} & set(ucf.classes)
    assert (len(ucf.ids), len(vgg.ids)) == (2003 - 126, 4813 - 206)
    assert np.bincount(ucf.label).tolist() == [160, 164, 135, 140, 136, 144, 155, 105, 134, 157, 116, 111, 120, 100]
    assert np.bincount(vgg.label).tolist() == [492, 479, 298, 381, 126, 139, 475, 490, 374, 58, 360, 121, 324, 490]

"""Features of clips in HDF5 (schema `cmg-features`, version 1), batches of them, and the embedded sets.

    python data.py check FILE                     validate a file completely and print what is inside
    python data.py compose digits --out FILE      write an embedded set, digits or watch, into a file
    python data.py drop FILE --out NEW            leave out the clips in which a modality is missing

A file holds N clips of T segments. Each modality is a dataset (N, T, d) or (N, T, H, W, d) named after it; `split` (N,)
is 0 train, 1 val, 2 test; `id` (N,), `classes` (C,), and optionally `label` (N,), `events/<modality>` (N, T, C),
`mask` (N, T, h, w) and `group` (N,). Files from the authors' archives: `python -m official.convert`.
"""
import hashlib
import itertools
import math
import os
import re
import signal
import sys
import tempfile
import threading
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Iterator, Literal

import h5py
import numpy as np
import torch
import tyro
from tqdm import tqdm

from datasets import digits, watch
from run import (RANK, WORLD_SIZE, InputError, all_gather_object, explain_input_errors, first_line, local_rows,
                 note)

FORMAT, VERSION = "cmg-features", 1
SPLITS = ("train", "val", "test")
MODALITY_ORDER = ("audio", "video", "text", "flow")  # others follow as the file lists them
NOT_MODALITIES = ("label", "events", "mask", "group", "split", "id", "classes")
FEATURES = "f", "float16, float32 or float64", ("N", "T", "d"), ("N", "T", "H", "W", "d")  # dtypes, shapes
NOT_ANNOTATED = 255  # fills the frames of `mask` that nobody drew
HELP = {  # words in what h5py says, as far as it is about something else than a damaged file: what to do
    "open for write|SWMR": "a program writes it, or died while it did: h5clear -s FILE, once nothing does",
    "lock file": "another program has it open; close that, or set HDF5_USE_FILE_LOCKING=FALSE",
    "Permission denied": "you may not read it",
    "Too many open files": "give fewer files, or raise ulimit -n",
    "plugin|required filter": "this HDF5 cannot unpack it; rewrite it with h5repack -f GZIP=4 where that works",
    "never|source|in other": "write it again",
    "allocate": "that is more memory than there is; is the file whole?",
    "": "is the file whole? copy it again"}
SYSTEM = Path("/")  # where Linux says how much memory there is
FINITE = "finite float32 values; python data.py drop FILE --out NEW leaves such clips out"
EMBEDDED = {"digits": digits, "watch": watch}


# ------------------------------------------------------------------------------------------------------- feature files
def seen_dtype(stored: np.dtype) -> np.dtype:
    """What training and probes get of a stored dtype: float16 or float32, bytes and bool as they are, other whole
    numbers as int64."""
    if stored.kind == "f":
        return np.dtype(np.float16 if stored.itemsize == 2 else np.float32)
    return stored if stored.itemsize == 1 else np.dtype(np.int64)


class FeatureFile:
    """One `cmg-features` file of N = `clips` clips and T = `segments` segments; `split` and `label` are (N,).

    A modality is validated when it is first asked for (one nobody wants may hold anything), all else at opening. Raises
    InputError for whatever is wrong: the file, the dataset, what was found and what was expected.
    """

    def __init__(self, path: str):
        self.path = str(path)
        self.sizes, self.valid = {}, {}  # {name of a file: bytes}, {modality: its dataset}
        if not os.path.isfile(self.path):
            raise InputError(f"{self.path}: no such file; give a cmg-features file, or 'digits' or 'watch' "
                             "for an embedded set")
        with self._explain("the HDF5 file"):
            self.h5 = h5py.File(self.path, "r", locking="best-effort")  # not every disk of a cluster has locks
            self.names = [name if isinstance(name, str) else repr(name) for name in self.h5]
        found = self.attribute("format"), self.attribute("version")
        if found != (FORMAT, VERSION):
            raise InputError(f"{self.path}: format and version are {found}, expected {(FORMAT, VERSION)}")
        self.name = str(self.attribute("name") or Path(self.path).stem)
        self.source = self.attribute("source")
        self.id = self._words("id", "N", "backslashreplace")
        self.clips = len(self.id)
        self.split = self._integers("split", 0)  # without it all clips are trained on
        if not np.isin(self.split, (0, 1, 2)).all():
            self._fail("split", f"values {np.unique(self.split)[:6].tolist()}", "0 train, 1 val, 2 test")
        self.modalities = self._list_modalities()
        lengths = [shape[0] for shape in self.modalities.values() if len(shape) in (2, 4)]
        self.segments = (lengths or [0])[0]  # as the first modality has it
        self.classes = self._words("classes", "C") if "classes" in self.names else []
        self.label = self._integers("label", -1)
        self._check_classes()
        if "group" in self.names:
            self._require("group", "iu", "integers", (self.clips,))
        if "mask" in self.names:
            self._require("mask", "iu", "integers", (self.clips, self.segments, "h", "w"))
        self.events = self._list_events()

    @contextmanager
    def _explain(self, what: str):
        """Whatever h5py raises meanwhile becomes an InputError of one line: what cannot be read, why, what helps."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            reason = first_line(error)
            advice = next(text for words, text in HELP.items() if re.search(words, reason))
            raise InputError(f"{self.path}: {what} cannot be read ({reason}); {advice}")

    def _fail(self, name: str, found: str, expected: str):
        raise InputError(f"{self.path}: dataset {name!r} has {found}, expected {expected}")

    def attribute(self, name: str):
        """A root attribute, str or int, or None if it is not there."""
        with self._explain(f"attribute '{name}'"):
            value = self.h5.attrs.get(name)
            if isinstance(value, np.ndarray) and value.size == 1:
                value = value.reshape(-1)[0]
            if isinstance(value, (bytes, str)):
                value = value.decode() if isinstance(value, bytes) else value.encode(errors="replace").decode()
            if isinstance(value, np.number) and value == int(value):
                value = int(value)
        if not isinstance(value, (str, int, type(None))):
            raise InputError(f"{self.path}: attribute '{name}' is of {type(value)}, expected one text or whole number")
        return value

    def _require(self, name: str, kinds: str, words: str, *shapes: tuple, sparse: bool = True) -> h5py.Dataset:
        """Dataset `name`, which must be written: its dtype must be of one of the NumPy `kinds`, in `words`, its shape
        one of `shapes`: N or C are any length, other letters any but 0. `sparse`: chunks may be missing, being zero."""
        with self._explain(f"dataset {name!r}"):
            data = self.h5.get(name)
            dtype = getattr(data, "dtype", None)  # NumPy may not know it
        if data is None:
            raise InputError(f"{self.path}: dataset {name!r} is missing, or a link that leads nowhere")
        if not isinstance(data, h5py.Dataset):
            raise InputError(f"{self.path}: {name!r} is a group, expected a dataset")
        if dtype.kind not in kinds or dtype.kind == "f" and dtype.itemsize > 8:
            self._fail(name, f"dtype {dtype}", words)
        for shape in shapes:
            fits = [have == want or want in ("N", "C") or have > 0 and isinstance(want, str)
                    for have, want in zip(data.shape or (), shape)]
            if data.ndim == len(shape) and all(fits):
                break
        else:
            self._fail(name, f"shape {data.shape}", " or ".join(map(str, shapes)).replace("'", ""))
        with self._explain(f"dataset {name!r}"):
            self._require_written(self.h5[name], sparse)  # a copy: HDF5 crashes at the end if such questions are kept
        return data

    def _require_written(self, data: h5py.Dataset, sparse: bool) -> None:
        """HDF5 reads zeros where nothing was ever written, and where a source of a virtual dataset is gone."""
        if data.is_virtual:
            sources = [(part.vspace.get_select_npoints(), *part[1:3]) for part in data.virtual_sources()]
            if sum(values for values, *_ in sources) < data.size:
                raise OSError("a part of it has no source")
            for _, file, name in sources:
                here = Path(data.file.filename)
                beside = here if file == "." else here.parent / file
                with h5py.File(beside if beside.is_file() else file, "r", locking="best-effort") as h5:
                    self._require_written(h5[name], sparse)
        elif data.external:
            raise OSError("its numbers are in other files; h5repack -l CONTI puts them into this one")
        elif data.chunks and data.size:
            chunks = math.prod(-(-length // chunk) for length, chunk in zip(data.shape, data.chunks))
            missing = chunks - data.id.get_num_chunks()
            if missing == chunks or missing and not sparse:
                raise OSError(f"{missing} of {chunks} chunks were never written")
        elif data.size and data.id.get_storage_size() == 0:
            raise OSError("it was never written")

    def _list_modalities(self) -> dict:
        """{name: (T, d) or (T, H, W, d), if valid} of what is called like a modality or has three axes of numbers"""
        found = {}
        for name in sorted(self.names, key=lambda name: (*MODALITY_ORDER, name).index(name)):
            data, dtype = None, np.dtype("f4")
            with suppress(Exception):  # of the many that h5py has; `modality` says what is wrong
                data = self.h5.get(name)
                dtype = getattr(data, "dtype", dtype)
            shape = getattr(data, "shape", None) or ()
            features = data is None or len(shape) > 2 and dtype.kind not in "OSV"
            if name in MODALITY_ORDER or name not in NOT_MODALITIES and features:
                found[name] = tuple(shape[1:])
        if not found:
            raise InputError(f"{self.path}: no modality inside, expected datasets such as 'audio' or 'video'")
        return found

    def modality(self, name: str) -> h5py.Dataset:
        """The dataset of a modality, validated when it is first asked for."""
        if name in self.valid:
            return self.valid[name]
        data = self._require(name, *FEATURES, sparse=False)
        if data.shape[:2] != (self.clips, self.segments):
            self._fail(name, f"N, T = {data.shape[:2]}", f"{(self.clips, self.segments)}, N as 'id' and T as "
                       f"{next(iter(self.modalities))!r}: both are the same in every modality")
        h, w, d = data.shape[2:] if data.ndim == 5 else (1, 1, 1)
        if w == d != h or d > 1 and h >= 8 * max(w, d):
            self._fail(name, f"shape {data.shape}, which looks like (N, T, d, H, W)", "(N, T, H, W, d)")
        if "." in name or not name.isprintable() or hasattr(torch.nn.ModuleDict(), name):
            raise InputError(f"{self.path}: rename dataset {name!r}: no dots, no name that PyTorch uses")
        sample = np.unique(np.linspace(0, self.clips - 1, min(16, self.clips)).astype(int))
        if not np.isfinite(self._read(data, name, sample)).all():
            half = "; float16 holds nothing above 65504" if data.dtype.itemsize == 2 else ""
            self._fail(name, f"NaN or infinity in {self.missing(name).sum()} of {self.clips} clips", FINITE + half)
        return self.valid.setdefault(name, data)

    def missing(self, name: str) -> np.ndarray:
        """In which clips a modality holds NaN or infinity, as where there is none of it: (N,) bool"""
        data = self._require(name, *FEATURES)
        clips = (self._read(data, name, np.array([i])) for i in range(self.clips))
        return np.array([not np.isfinite(clip).all() for clip in clips])

    def _integers(self, name: str, default: int) -> np.ndarray:
        if name not in self.names:
            return np.full(self.clips, default)
        return self._read(self._require(name, "iu", "integers", (self.clips,)), name, np.arange(self.clips))

    def _words(self, name: str, length, errors: str = "strict") -> list:
        data = self._require(name, "OS", "str", (length,))
        with self._explain(f"dataset {name!r}"):
            return list(data.asstr(errors=errors)[:])

    def _check_classes(self) -> None:
        for name, times in Counter(self.classes).items():
            if times > 1:
                self._fail("classes", f"the name {name!r} twice", "distinct names")
        if (self.label >= 0).any() and not self.classes:
            raise InputError(f"{self.path}: dataset 'classes' is missing, the names of the labels")
        if not np.isin(self.label, np.arange(-1, len(self.classes))).all():
            self._fail("label", f"values {self.label.min()}..{self.label.max()}", f"-1..{len(self.classes) - 1}, C - 1")

    def _list_events(self) -> list:
        with self._explain("dataset 'events'"):
            events = self.h5.get("events") if "events" in self.names else {}
            names = [] if isinstance(events, h5py.Dataset) else list(events)
        if isinstance(events, h5py.Dataset):
            raise InputError(f"{self.path}: 'events' is a dataset, expected a group with one dataset per modality")
        for name in names:
            self._require(f"events/{name}", "biu", "0 and 1", (self.clips, self.segments, len(self.classes)))
        return names

    def read(self, name: str, index: np.ndarray) -> np.ndarray:
        """Clips `index` of a dataset, (len(index), ...), as everything sees them (`seen_dtype`). Raises InputError."""
        data = self.modality(name) if name in self.modalities else self.h5[name]
        return self._read(data, name, np.asarray(index))

    def _read(self, data: h5py.Dataset, name: str, index: np.ndarray) -> np.ndarray:
        with self._explain(f"dataset {name!r}"):
            size = os.path.getsize(data.file.filename)
            if size < self.sizes.setdefault(data.file.filename, size):
                raise OSError("the file has become shorter")  # HDF5 itself would fill up with zeros
            # int64 holds uint64 bit by bit, while HDF5 would clip it
            unsigned = data.dtype.kind == "u" and data.dtype.itemsize == 8
            out = np.empty((len(index), *data.shape[1:]), np.uint64 if unsigned else seen_dtype(data.dtype))
            same = data.id.get_type() == h5py.h5t.py_create(out.dtype) and data.file.filename == self.path
            offset = data.id.get_offset() if same else None
            if offset is None:
                self._convert(data, index, out)
            else:  # in one piece and as in memory: past HDF5 it is read twice as fast
                with open(self.path, "rb", buffering=0) as stream:
                    for i, clip in enumerate(index):
                        stream.seek(offset + int(clip) * out[i:i + 1].nbytes)
                        if stream.readinto(out[i:i + 1]) < out[i:i + 1].nbytes:
                            raise OSError("the file ends early")
        return out.view(np.int64) if unsigned else out

    def _convert(self, data: h5py.Dataset, index: np.ndarray, out: np.ndarray) -> None:
        """Fill `out` from what is stored, whatever its kind or byte order; neighbours are read together."""
        space, start = data.id.get_space(), 0
        for stop in (*(np.flatnonzero(np.diff(index) != 1) + 1), len(index)):
            if start < stop:
                space.select_hyperslab((int(index[start]), *(0,) * (data.ndim - 1)), out[start:stop].shape)
                data.id.read(h5py.h5s.create_simple(out[start:stop].shape), space, out[start:stop])
            start = stop


class Features:
    """One or several files as one set of clips: the union of their clips, the modalities that all of them hold.

    Each of `paths` is a `cmg-features` file or the name of an embedded set, which is made on first use and kept in
    `runs_dir`. Raises InputError if a file is not valid or the files do not fit together."""

    def __init__(self, paths: list, runs_dir: str = "runs"):
        self.files = [FeatureFile(path) for path in data_files(paths, runs_dir)]
        first = self.files[0]
        self.name, self.classes = first.name, first.classes
        self.modalities = [m for m in first.modalities if all(m in file.modalities for file in self.files)]
        self.shape = {m: first.modalities[m] for m in self.modalities}  # {m: (T, d) or (T, H, W, d)}
        for number, file in enumerate(self.files):
            if any(os.path.samefile(file.path, other.path) for other in self.files[:number]):
                raise InputError(f"{file.path}: this file is given twice")
            if file.classes != first.classes:
                differ = sorted(set(file.classes) ^ set(first.classes)) or ["their order"]
                raise InputError(f"{file.path}: classes differ from those of {first.path}: {', '.join(differ[:5])}")
        self.starts = np.cumsum([0] + [file.clips for file in self.files])
        self.split = np.concatenate([file.split for file in self.files])
        self.label = np.concatenate([file.label for file in self.files])
        self._notice_leaks()

    def _notice_leaks(self) -> None:
        first, twice = {}, []  # {id: the file and the split in which it comes first}
        for file in self.files:
            for name, split in zip(file.id, file.split.tolist()):
                twice += [name] if first.setdefault(name, (file, split)) != (file, split) else []
        if twice:
            note(f"{self.files[0].path}: {len(twice)} clips, such as {twice[0]!r}, are in two splits or files")

    def require(self, modality: str) -> None:
        """Raises InputError unless every file holds this modality, valid and of one shape."""
        for file in self.files:
            shape = file.modality(modality).shape[1:]
            if shape != self.shape[modality]:
                raise InputError(f"{file.path}: clips of {modality!r} are {shape}, before {self.shape[modality]}")

    def __len__(self) -> int:
        return len(self.split)

    def shapes(self, modalities: tuple = ()) -> dict:
        """{m: (T, d) or (T, H, W, d)} of the wanted modalities, or of all if none is named, in canonical order.

        Raises InputError for a modality that is not there or not valid, and for fewer than two."""
        held = " ".join(self.modalities)
        for m in modalities:
            if m not in self.modalities:
                raise InputError(f"--modalities {m}: the data holds {held}")
        wanted = {m: shape for m, shape in self.shape.items() if m in modalities or not modalities}
        for m in wanted:
            self.require(m)
        if len(wanted) < 2:
            raise InputError(f"--modalities {' '.join(wanted)}: at least two are needed; the data holds {held}")
        return wanted

    def clips(self, split: str) -> np.ndarray:
        """Indices of the clips of one split."""
        return np.flatnonzero(self.split == SPLITS.index(split))

    def _owner(self, index: np.ndarray) -> np.ndarray:
        """The number of the file that holds each of the clips `index`."""
        return np.searchsorted(self.starts, index, side="right") - 1

    def read(self, name: str, index: np.ndarray) -> np.ndarray:
        """Clips `index` of a dataset, any order: (len(index), ...), in the dtypes of `seen_dtype`."""
        if len(self.files) == 1:
            return self.files[0].read(name, index)
        owner = self._owner(index)
        parts = [file.read(name, index[owner == f] - self.starts[f]) for f, file in enumerate(self.files)]
        out = np.empty((len(index), *parts[0].shape[1:]), np.result_type(*parts))
        for f, part in enumerate(parts):
            out[owner == f] = part
        return out

    def blocks(self, name: str, index: np.ndarray) -> Iterator[tuple]:
        """(start, clips index[start], index[start + 1], ... of a dataset), some 64 MB at a time"""
        size = 1 + (1 << 24) // max(1, self.read(name, index[:1]).size)
        for start in range(0, len(index), size):
            yield start, self.read(name, index[start:start + size])

    def single_event(self, index: np.ndarray) -> np.ndarray:
        """Those of the clips `index` that hold events of at most one class, over all modalities; all without events."""
        owner = self._owner(index)
        count = np.zeros(len(index), int)  # of classes that happen in the clip
        for f, file in enumerate(self.files):
            mine = index[owner == f] - self.starts[f]
            happens = [file.read(f"events/{name}", mine).any(1) for name in file.events]  # (n, C) of each modality
            if happens:
                count[owner == f] = np.any(happens, 0).sum(1)
        return index[count <= 1]

    def sha256(self) -> str:
        """Of the file as `sha256sum` has it, or of the files one after the other."""
        digest = hashlib.sha256()
        for file in self.files:
            with open(file.path, "rb") as stream:
                while block := stream.read(1 << 24):
                    digest.update(block)
        return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------- batches
def available_memory() -> int:
    """Bytes of main memory that may still be taken: of the machine's, and of what a container or a cluster allows this
    process (control groups, version 2 and 1); 8 GiB where no one says."""
    def find(path: Path, pattern: str) -> list:
        with suppress(OSError):  # the system has no such file
            return re.findall(pattern, path.read_text(), re.M)
        return []

    free = [1024 * int(kib) for kib in find(SYSTEM / "proc/meminfo", r"^MemAvailable: +(\d+)")]
    for own in find(SYSTEM / "proc/self/cgroup", r"^\d+:.*?:/(.*)"):
        for group in (SYSTEM / "sys/fs/cgroup" / own, SYSTEM / "sys/fs/cgroup/memory" / own):
            for folder in (group, *group.parents):
                limit = find(folder / "memory.max", r"^\d+") + find(folder / "memory.limit_in_bytes", r"^\d+")
                taken = find(folder / "memory.stat", r"^(?:anon|total_rss) (\d+)")
                free += [int(limit[0]) - sum(map(int, taken))] if limit else []
    if not free and hasattr(os, "sysconf"):
        free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    return min(free, default=8 << 30)


class Batches:
    """Shuffled training batches {modality: (B, T, ...) float32 on `device`} of one split; the odd rest is dropped.

    `modalities` are names, or a dict of shapes by name. `source` says where the features wait: on the `device`, in host
    `memory`, or in the `file` from which a background thread reads ahead; `auto` takes the first that fits in half of
    the memory there. The order depends on (seed, epoch) alone, so any epoch can be resumed at any step. Of several
    processes each reads its share of every batch. Raises InputError if the split is empty or smaller than a batch, or a
    batch does not divide among the processes.
    """

    def __init__(self, features: Features, modalities: list, split: str, batch_size: int, device, seed: int,
                 source: Literal["auto", "device", "memory", "file"] = "auto"):
        self.features = features
        self.modalities = list(modalities)
        self.index = features.clips(split)
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.seed = seed
        if len(self.index) == 0:
            raise InputError(f"{features.files[0].path}: the {split} split is empty, no clip has it in 'split'")
        if batch_size > len(self.index):
            raise InputError(f"--batch-size {batch_size} is larger than the {split} split ({len(self.index)} clips)")
        if batch_size % WORLD_SIZE:
            raise InputError(f"--batch-size {batch_size} does not divide among {WORLD_SIZE} processes")
        self.dtype = {m: np.result_type(*(seen_dtype(file.modality(m).dtype) for file in features.files))
                      for m in self.modalities}
        self.source = self._where_it_fits() if source == "auto" else source
        if self.source != "file":
            self.resident = {m: self._read_all(m) for m in self.modalities}
        else:
            self._notice_chunks()

    def _where_it_fits(self) -> str:
        a_clip = sum(math.prod(self.features.shape[m]) * self.dtype[m].itemsize for m in self.modalities)
        size = len(self.index) * a_clip
        if self.device.type == "cuda" and size < 0.5 * torch.cuda.mem_get_info(self.device)[0]:
            return "device"
        size *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # each process on this machine holds all of it
        return "memory" if size < 0.5 * available_memory() else "file"

    def _notice_chunks(self) -> None:
        for file, m in itertools.product(self.features.files, self.modalities):
            chunk = file.h5[m].chunks or (1,)
            if chunk[0] > 1:
                note(f"{file.path}: for a clip of {m} its chunk of {chunk[0]} clips is read, every time; "
                     f"h5repack -l {m}:CONTI in.h5 out.h5 makes a faster file")

    def _read_all(self, modality: str) -> torch.Tensor:
        """All clips (N, T, ...), filled in piece by piece: pieces to be joined would take the memory twice."""
        place = self.device if self.source == "device" else "cpu"
        empty = torch.from_numpy(np.empty(0, self.dtype[modality])).to(place)
        out = empty.new_empty(len(self.index), *self.features.shape[modality])
        for start, clips in self.features.blocks(modality, self.index):
            out[start:start + len(clips)] = torch.from_numpy(clips)
        return out

    def __len__(self) -> int:
        """Steps in an epoch."""
        return len(self.index) // self.batch_size

    def stream(self, step: int, num_steps: int) -> Iterator[dict]:
        """The batches of the steps `step` up to `num_steps` - 1 of a training, epoch after epoch."""
        while step < num_steps:
            epoch, start = divmod(step, len(self))
            stop = min(len(self), start + num_steps - step)
            yield from self.epoch(epoch, start, stop)
            step += stop - start

    def epoch(self, epoch: int, start: int = 0, stop: int | None = None) -> Iterator[dict]:
        """Batches `start`, `start` + 1, … of this epoch's permutation, to its end or up to `stop` - 1."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.index), generator=generator)
        if self.source == "device":
            order = order.to(self.device)
        batches = order.split(self.batch_size)[:len(self)][start:stop]
        if self.source == "device" or self.source == "memory" and self.device.type == "cpu":
            for batch in batches:
                yield self._to_device(self._read(batch))
        else:
            yield from self._read_ahead(batches)

    def _read(self, batch: torch.Tensor) -> dict:
        """This process's clips of a batch (B,) of positions in the split, in the dtypes read; in page-locked memory
        if they are bound for a GPU: only then does nobody wait for the copy."""
        rows = local_rows(batch)
        if self.source == "file":
            index = self.index[rows.numpy()]
            clips = {m: torch.from_numpy(self.features.read(m, index)) for m in self.modalities}
        else:
            clips = {m: resident[rows] for m, resident in self.resident.items()}
        if self.device.type == "cuda" and self.source != "device":
            with torch.cuda.device(self.device):  # in the reading thread, too
                clips = {m: x.pin_memory() for m, x in clips.items()}
        return clips

    def _to_device(self, clips: dict) -> dict:
        return {m: x.to(self.device, non_blocking=True).float() for m, x in clips.items()}

    def _read_ahead(self, batches: tuple, depth: int = 4) -> Iterator[dict]:
        """The batches on the device, while a thread reads up to `depth` further ones; its errors are raised here."""
        reader = ThreadPoolExecutor(1)
        waiting = deque()
        try:
            for batch in batches:
                waiting.append(reader.submit(self._read, batch))
                if len(waiting) > depth:
                    yield self._to_device(waiting.popleft().result())
            while waiting:
                yield self._to_device(waiting.popleft().result())
        finally:
            reader.shutdown(cancel_futures=True)  # and wait: Python aborts if it ends while a thread is inside torch


@contextmanager
def made_beside(out: Path):
    """The path of a new file, which then takes the place of `out`. Ctrl-C, which raises meanwhile, leaves nothing."""
    main = threading.current_thread() is threading.main_thread()  # in others nobody may say what signals do
    before = signal.signal(signal.SIGINT, signal.default_int_handler) if main else None
    try:
        with tempfile.TemporaryDirectory(dir=out.parent) as folder:
            yield Path(folder) / "new.h5"
            os.replace(Path(folder) / "new.h5", out)
    finally:
        if main:
            signal.signal(signal.SIGINT, before or signal.SIG_DFL)


# ------------------------------------------------------------------------------------------------------- embedded sets
def recipe(name: str) -> str:
    """16 characters that change with an embedded set: with its base arrays, or with the program that composes them."""
    program = Path(EMBEDDED[name].__file__)
    base = program.with_suffix(".h5")
    try:
        h5py.File(base).close()
        return hashlib.sha256(program.read_bytes() + base.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise InputError(f"{base}: cannot be read ({first_line(error)}); copy it again")


def embedded(name: str, runs_dir: str) -> str:
    """The feature file of an embedded set in `runs_dir`, made there if need be; those of an earlier recipe then go."""
    path = Path(runs_dir) / f"{name}-{recipe(name)}.h5"
    if RANK > 0:
        all_gather_object(None)  # the first process makes it
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with made_beside(path) as new:
                EMBEDDED[name].write(str(new))
        except OSError as error:
            raise InputError(f"--runs-dir {runs_dir}: cannot be written ({first_line(error)})")
        for old in set(path.parent.glob(f"{name}-" + 16 * "[0-9a-f]" + ".h5")) - {path}:
            with suppress(OSError):  # of a system that minds if another program has it open
                old.unlink()
    if RANK == 0:
        all_gather_object(None)
    return str(path)


def data_files(paths: list, runs_dir: str) -> list:
    """The files behind `paths`; embedded sets are made once and kept in `runs_dir`."""
    if not paths:
        raise InputError(f"no feature file given; give cmg-features files, or an embedded set, {' or '.join(EMBEDDED)}")
    return [embedded(path, runs_dir) if path in EMBEDDED else path for path in paths]


# --------------------------------------------------------------------------------------------------------- command line
def check(file: tyro.conf.Positional[str]) -> None:
    """Validate FILE, reading every value, and print what is inside."""
    features = Features([file])
    source = features.files[0]
    print(f"{file}: {FORMAT} {VERSION}, name {features.name}, {len(features)} clips, {len(features.classes)} classes")
    for name in features.modalities:
        _check_values(features, name, FINITE, np.isfinite)
    for name in source.events:
        _check_values(features, f"events/{name}", "0 or 1", lambda x: (x == 0) | (x == 1))
    if "mask" in source.names:
        most = len(features.classes)
        _check_values(features, "mask", f"0..{most}", lambda x: (x >= 0) & (x <= most) | (x == NOT_ANNOTATED))

    lines, names = [], []
    with source._explain("the list of datasets"):
        source.h5.visit(names.append)
        for name, item in zip(names, map(source.h5.get, names)):
            lines += [f"  {name:16} {str(item.shape):26} {item.dtype}"] if isinstance(item, h5py.Dataset) else []
    for m, shape in features.shape.items():
        if len(shape) == 4:
            lines.append(f"  {m}: maps of {shape[1]} x {shape[2]} cells, which encoders pool")
    for c, name in enumerate(features.classes[:20]):
        lines.append(f"  class {c} {name!r}: {(features.label == c).sum()} clips")
    if len(features.classes) > 20:
        lines.append("  ...")
    print("\n".join(lines).encode(errors="replace").decode())
    sizes = ", ".join(f"{split} {len(features.clips(split))}" for split in SPLITS)
    print(f"  {sizes}; one event at most in {len(features.single_event(np.arange(len(features))))} clips", flush=True)


def _check_values(features: Features, name: str, expected: str, fits) -> None:
    with tqdm(total=len(features), desc=name, leave=False, disable=not sys.stderr.isatty()) as bar:
        for start, values in features.blocks(name, np.arange(len(features))):
            wrong = np.argwhere(~fits(values))
            if len(wrong):
                raise InputError(f"{features.files[0].path}: dataset {name!r} holds {values[tuple(wrong[0])]} in clip "
                                 f"{start + wrong[0][0]}, expected {expected}")
            bar.update(len(values))


def drop(file: tyro.conf.Positional[str], out: str) -> None:
    """Write the clips of FILE in which no modality is missing, that is holds NaN or infinity, to NEW."""
    source = FeatureFile(file)
    gone = {name: source.missing(name) for name in source.modalities}
    keep = np.flatnonzero(~np.any(list(gone.values()), 0))
    if os.path.exists(out) or not len(keep):
        raise InputError(f"--out {out}: " + ("is there already" if len(keep) else "no clip would be left"))
    by_clip = {*source.modalities, *(f"events/{m}" for m in source.events), "label", "mask", "group", "split", "id"}
    try:
        with made_beside(Path(out).resolve()) as path, h5py.File(path, "w") as h5:
            h5.attrs.update(source.h5.attrs)
            if source.classes:
                source.h5.copy("classes", h5)
            for name in sorted(name for name in by_clip if name in source.h5):
                data = source.h5[name]
                new = h5.create_dataset(name, (len(keep), *data.shape[1:]), data.dtype)
                for i, row in enumerate(keep):
                    new[i] = data[row]
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({first_line(error)})")
    print(f"{out}: {len(keep)} of {source.clips} clips; left out for want of",
          ", ".join(f"{name} {clips.sum()}" for name, clips in gone.items()))


def compose(name: tyro.conf.Positional[Literal[tuple(EMBEDDED)]], out: str,
            sizes: tuple[int, int, int] | None = None, seed: int | None = None) -> None:
    """Write the embedded set NAME into the file OUT. Of digits, --sizes are the clips to train on, to validate and to
    test, 2400 400 800 if not given, and another --seed makes other clips; the clips of watch are fixed."""
    options = {option: value for option, value in (("sizes", sizes), ("seed", seed)) if value is not None}
    if name == "watch" and options:
        raise InputError("--sizes and --seed are of digits, the clips of watch are fixed")
    if min(sizes or (1,)) < 1 or (seed or 0) < 0:
        raise InputError("--sizes must be at least 1, --seed not negative")
    if not Path(out).resolve().parent.is_dir():
        raise InputError(f"--out {out}: its folder does not exist")
    recipe(name)  # so that what is wrong below is wrong with OUT
    try:
        with made_beside(Path(out).resolve()) as new:
            EMBEDDED[name].write(str(new), **options)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({first_line(error)})")
    check(out)


if __name__ == "__main__":
    sys.excepthook = explain_input_errors
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the HDF5 library never returns from some damaged files
    tyro.extras.subcommand_cli_from_dict({"check": check, "compose": compose, "drop": drop}, description=__doc__)

"""Features of clips in HDF5 (schema `cmg-features`, version 1), batches of them, and the embedded sets.

    python data.py check FILE                     validate a file completely and print what is inside
    python data.py compose digits --out FILE      write an embedded set, digits or watch, into a file

A file holds N clips of T segments. Each modality is a dataset (N, T, d) or (N, T, H, W, d) named after it; `split` (N,)
is 0 train, 1 val, 2 test; `id` (N,), `classes` (C,), and optionally `label` (N,), `events/<modality>` (N, T, C),
`mask` (N, T, h, w) and `group` (N,). Files from the authors' archives: `python -m official.convert`.
"""
import hashlib
import os
import sys
import tempfile
import weakref
from collections import deque
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
from run import WORLD_SIZE, RANK, InputError, explain_input_errors, first_line, all_gather_object, local_rows

FORMAT, VERSION = "cmg-features", 1
SPLITS = ("train", "val", "test")
MODALITY_ORDER = ("audio", "video", "text", "flow")  # others follow as the file lists them
NOT_MODALITIES = ("label", "events", "mask", "group", "split", "id", "classes")
NOT_ANNOTATED = 255  # fills the frames of `mask` that nobody drew
HDF5_ERRORS = (OSError, RuntimeError, KeyError, TypeError, ValueError)  # what h5py raises for a damaged file
EMBEDDED = {"digits": digits, "watch": watch}


# ------------------------------------------------------------------------------------------------------- feature files
class FeatureFile:
    """One validated `cmg-features` file of N = `clips` clips and T = `segments` segments; `split` and `label` are (N,).

    Raises InputError for whatever is wrong: the file, the dataset, what was found and what was expected.
    """

    def __init__(self, path: str):
        self.path = str(path)
        self.h5 = self._open()
        self.raw = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.raw)
        self.size = os.fstat(self.raw).st_size
        self.modalities = self._list_modalities()
        self.split = self._read_split()
        self.clips = len(self.split)
        self._require("id", "OS", "str", (self.clips,))
        self.segments = None  # as the first modality has it
        for name in self.modalities:
            self._check_modality(name)
        self.classes = self._read_classes()
        self.label = self._read_label()
        if "group" in self.h5:
            self._require("group", "iu", "integers", (self.clips,))
        if "mask" in self.h5:
            self._require("mask", "iu", "integers", (self.clips, self.segments, "h", "w"))
        self.events = self._list_events()

    def _open(self) -> h5py.File:
        if not os.path.isfile(self.path):
            raise InputError(f"{self.path}: no such file; give a cmg-features file, or 'digits' or 'watch' "
                             "for an embedded set")
        try:
            h5 = h5py.File(self.path, "r")
            found = (h5.attrs.get("format"), h5.attrs.get("version"))
            fits = found == (FORMAT, VERSION)
        except HDF5_ERRORS as error:
            raise InputError(f"{self.path}: not a readable HDF5 file ({first_line(error)}); copy it again")
        if not fits:
            raise InputError(f"{self.path}: format and version are {found[0]} {found[1]}, expected {FORMAT} {VERSION}")
        return h5

    @contextmanager
    def _explain(self, name: str):
        """While dataset `name` is read: whatever h5py raises becomes an InputError of one line."""
        try:
            yield
        except HDF5_ERRORS as error:
            raise InputError(f"{self.path}: dataset '{name}' cannot be read ({first_line(error)}); is the file whole?")

    def _fail(self, name: str, found: str, expected: str):
        raise InputError(f"{self.path}: dataset '{name}' has {found}, expected {expected}")

    def _find(self, name: str) -> tuple:
        """Dataset `name` and its dtype, which NumPy may not know."""
        with self._explain(name):
            data = self.h5.get(name)
            dtype = getattr(data, "dtype", None)
        if data is None:
            raise InputError(f"{self.path}: dataset '{name}' is missing")
        if not isinstance(data, h5py.Dataset):
            raise InputError(f"{self.path}: '{name}' is a group, expected a dataset")
        return data, dtype

    def _require(self, name: str, kinds: str, words: str, shape: tuple) -> h5py.Dataset:
        """Dataset `name`: its dtype must be of one of the NumPy `kinds`, in `words`, and its shape must be `shape`,
        in which a letter stands for any length."""
        data, dtype = self._find(name)
        if dtype.kind not in kinds:
            self._fail(name, f"dtype {dtype}", words)
        fits = [isinstance(want, str) or have == want for have, want in zip(data.shape or (), shape)]
        if data.ndim != len(shape) or not all(fits):
            self._fail(name, f"shape {data.shape}", str(shape).replace("'", ""))
        return data

    def _list_modalities(self) -> list:
        with self._explain("/"):
            names = [name for name in self.h5 if name not in NOT_MODALITIES]
        if not names:
            raise InputError(f"{self.path}: no modality inside, expected datasets such as 'audio' or 'video'")
        known = [name for name in MODALITY_ORDER if name in names]
        return known + [name for name in names if name not in MODALITY_ORDER]

    def _check_modality(self, name: str) -> None:
        data, dtype = self._find(name)
        if data.ndim not in (3, 5) or 0 in data.shape[1:]:
            self._fail(name, f"shape {data.shape}", "(N, T, d) or (N, T, H, W, d)")
        self.segments = self.segments or data.shape[1]
        if data.shape[:2] != (self.clips, self.segments):
            self._fail(name, f"N, T = {data.shape[:2]}", f"{(self.clips, self.segments)} as elsewhere in the file")
        if dtype.kind != "f" or dtype.itemsize > 8:
            self._fail(name, f"dtype {dtype}", "float16, float32 or float64")
        sample = np.unique(np.linspace(0, self.clips - 1, min(16, self.clips)).astype(int))
        if not np.isfinite(self.read(name, sample)).all():
            self._fail(name, "NaN or infinity", "finite values (python data.py check FILE says where)")

    def _read_split(self) -> np.ndarray:
        """Of each clip; without the dataset all are trained on."""
        if "split" not in self.h5:
            return np.zeros(len(self._require("id", "OS", "str", ("N",))), np.uint8)
        data = self._require("split", "iu", "integers", ("N",))
        with self._explain("split"):
            split = data[:]
        if not np.isin(split, (0, 1, 2)).all():
            self._fail("split", f"values {np.unique(split)[:6].tolist()}", "0 train, 1 val, 2 test")
        return split

    def _read_classes(self) -> list:
        if "classes" not in self.h5:
            return []
        data = self._require("classes", "OS", "str", ("N",))
        with self._explain("classes"):
            classes = list(data.asstr()[:])
        if len(set(classes)) < len(classes):
            self._fail("classes", "a name twice", "distinct names")
        return classes

    def _read_label(self) -> np.ndarray:
        if "label" not in self.h5:
            return np.full(self.clips, -1)
        data = self._require("label", "iu", "integers", (self.clips,))
        with self._explain("label"):
            label = data[:].astype(np.int64)
        if (label >= 0).any() and not self.classes:
            raise InputError(f"{self.path}: dataset 'classes' is missing, the names of the labels")
        if not np.isin(label, np.arange(-1, len(self.classes))).all():
            self._fail("label", f"values {label.min()}..{label.max()}", f"-1..{len(self.classes) - 1}, C - 1")
        return label

    def _list_events(self) -> list:
        with self._explain("events"):
            events = self.h5.get("events", {})
        if isinstance(events, h5py.Dataset):
            raise InputError(f"{self.path}: 'events' is a dataset, expected a group with one dataset per modality")
        for name in events:
            self._require(f"events/{name}", "biu", "0 and 1", (self.clips, self.segments, len(self.classes)))
        return list(events)

    def read(self, name: str, index: np.ndarray) -> np.ndarray:
        """Clips `index` of a dataset in their stored dtype, (len(index), ...). Raises InputError if it cannot be read.

        A contiguous dataset is read clip by clip with preadv where the system has it, which neither maps the file (a
        file that shrinks must not kill the process) nor holds h5py's global lock.
        """
        with self._explain(name):
            if os.fstat(self.raw).st_size < self.size:
                raise OSError("the file has become shorter")  # HDF5 itself would fill up with zeros
            data = self.h5[name]
            out = np.empty((len(index), *data.shape[1:]), data.dtype)
            offset = self._offset(data)
            for i, clip in enumerate(index):
                row = out[i:i + 1]
                if offset is None:
                    data.read_direct(row, np.s_[int(clip):int(clip) + 1])
                elif os.preadv(self.raw, [row], offset + int(clip) * row.nbytes) != row.nbytes:
                    raise OSError("the file ends early")
        return out

    def _offset(self, data: h5py.Dataset):
        """At which byte of the file the dataset starts; None if it is not one plain block there, or without preadv."""
        plain = not data.chunks and not data.dtype.hasobject and data.file.filename == self.path
        return data.id.get_offset() if plain and hasattr(os, "preadv") else None


class Features:
    """One or several files as one set of clips: the union of their clips, the modalities that all of them hold.

    Each of `paths` is a `cmg-features` file or the name of an embedded set, which is made on first use and kept in
    `runs_dir`. Raises InputError if a file is not valid or the files do not fit together.
    """

    def __init__(self, paths: list, runs_dir: str = "runs"):
        self.files = [FeatureFile(path) for path in data_files(paths, runs_dir)]
        first = self.files[0]
        self.name = str(first.h5.attrs.get("name", Path(first.path).stem))
        self.classes = first.classes
        self.modalities = [m for m in first.modalities if all(m in file.modalities for file in self.files)]
        self.shape = self._shape_in(first)  # {m: (T, d) or (T, H, W, d)}
        for file in self.files[1:]:
            shape = self._shape_in(file)
            if shape != self.shape or file.classes != self.classes:
                raise InputError(f"{file.path}: shapes {shape} or classes differ from those of {first.path}")
        self.starts = np.cumsum([0] + [file.clips for file in self.files])
        self.split = np.concatenate([file.split for file in self.files])
        self.label = np.concatenate([file.label for file in self.files])

    def _shape_in(self, file: FeatureFile) -> dict:
        return {m: file.h5[m].shape[1:] for m in self.modalities}

    def __len__(self) -> int:
        return len(self.split)

    def shapes(self, modalities: tuple = ()) -> dict:
        """{m: (T, d) or (T, H, W, d)} of the wanted modalities, or of all if none is named, in canonical order.

        Raises InputError for a modality that is not there or whose name no network can have, and for fewer than two."""
        held = " ".join(self.modalities)
        for m in modalities:
            if m not in self.modalities:
                raise InputError(f"--modalities {m}: the data holds {held}")
        wanted = {m: shape for m, shape in self.shape.items() if m in modalities or not modalities}
        for m in wanted:
            if "." in m or hasattr(torch.nn.ModuleDict(), m):
                raise InputError(f"{self.files[0].path}: rename dataset '{m}': no dots, no name that PyTorch uses")
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
        """Clips `index` of a dataset, any order, in their stored dtype: (len(index), ...)."""
        if len(self.files) == 1:
            return self.files[0].read(name, index)
        owner = self._owner(index)
        parts = [file.read(name, index[owner == f] - self.starts[f]) for f, file in enumerate(self.files)]
        out = np.empty((len(index), *parts[0].shape[1:]), np.result_type(*parts))
        for f, part in enumerate(parts):
            out[owner == f] = part
        return out

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
def physical_memory() -> int:
    """Bytes of main memory of this machine; 8 GiB where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 8 << 30


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
        self.source = self._where_it_fits() if source == "auto" else source
        self.resident = {}
        if self.source != "file":
            self.resident = {m: self._read_all(m) for m in self.modalities}

    def _where_it_fits(self) -> str:
        size = 0
        for m in self.modalities:
            size += len(self.index) * int(np.prod(self.features.shape[m])) * self.features.files[0].h5[m].dtype.itemsize
        if self.device.type == "cuda" and size < 0.5 * torch.cuda.mem_get_info(self.device)[0]:
            return "device"
        size *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # each process on this machine holds all of it
        return "memory" if size < 0.5 * physical_memory() else "file"

    def _read_all(self, modality: str) -> torch.Tensor:
        """All clips (N, T, ...), filled in piece by piece: pieces to be joined would take the memory twice."""
        dtype = np.result_type(*(file.h5[modality].dtype for file in self.features.files))
        place = self.device if self.source == "device" else "cpu"
        out = torch.from_numpy(np.empty(0, dtype)).to(place).new_empty(len(self.index), *self.features.shape[modality])
        for start in range(0, len(out), 1000):
            out[start:start + 1000] = torch.from_numpy(self.features.read(modality, self.index[start:start + 1000]))
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
        """This process's clips of a batch (B,) of positions in the split, in their stored dtype; in page-locked memory
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


# ------------------------------------------------------------------------------------------------------- embedded sets
def write_embedded(name: str, out: Path, **options) -> None:
    """The feature file of an embedded set: made beside `out`, then renamed."""
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        path = Path(folder) / "new.h5"
        EMBEDDED[name].write(str(path), **options)
        os.replace(path, out)


def embedded(name: str, runs_dir: str) -> str:
    """The feature file of an embedded set in `runs_dir`, made there if need be; those of an earlier recipe then go."""
    program = Path(EMBEDDED[name].__file__)
    digest = hashlib.sha256(program.read_bytes() + program.with_suffix(".h5").read_bytes())
    path = Path(runs_dir) / f"{name}-{digest.hexdigest()[:8]}.h5"
    if RANK > 0:
        all_gather_object(None)  # the first process makes it
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_embedded(name, path)
        except OSError as error:
            raise InputError(f"--runs-dir {runs_dir}: cannot be written ({first_line(error)})")
        for old in set(path.parent.glob(f"{name}-" + 8 * "[0-9a-f]" + ".h5")) - {path}:
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
        for clip in tqdm(range(len(features)), name, leave=False, disable=not sys.stderr.isatty()):
            if not np.isfinite(source.read(name, [clip])).all():
                raise InputError(f"{file}: dataset '{name}' has NaN or infinity in clip {clip}, expected finite values")
    for name in source.events:
        _check_range(source, f"events/{name}", 1)
    if "mask" in source.h5:
        _check_range(source, "mask", len(features.classes), besides=NOT_ANNOTATED)

    def show(name, item):
        if isinstance(item, h5py.Dataset):
            print(f"  {name:16} {str(item.shape):26} {item.dtype}")

    source.h5.visititems(show)
    sizes = ", ".join(f"{split} {len(features.clips(split))}" for split in SPLITS)
    print(f"  {sizes}; one event at most in {len(features.single_event(np.arange(len(features))))} clips")


def _check_range(source: FeatureFile, name: str, largest: int, besides: int = 0) -> None:
    """Every value of the dataset must lie in 0..`largest` or be `besides`."""
    for clip in range(source.clips):
        values = source.read(name, [clip])
        wrong = values[(values < 0) | (values > largest) & (values != besides)]
        if len(wrong):
            raise InputError(f"{source.path}: dataset '{name}' holds {wrong[0]} in clip {clip}, not 0..{largest}")


def compose(name: tyro.conf.Positional[Literal[tuple(EMBEDDED)]], out: str,
            sizes: tuple[int, int, int] | None = None, seed: int | None = None) -> None:
    """Write the embedded set NAME into the file OUT. Of digits, --sizes are the clips to train on, to validate and to
    test, 2400 400 800 if not given, and another --seed makes other clips; the clips of watch are fixed."""
    given = {"sizes": sizes, "seed": seed}
    options = {option: value for option, value in given.items() if value is not None}
    if name == "watch" and options:
        raise InputError("--sizes and --seed are of digits, the clips of watch are fixed")
    if min(sizes or (1,)) < 1 or (seed or 0) < 0:
        raise InputError("--sizes must be at least 1, --seed not negative")
    if not Path(out).resolve().parent.is_dir():
        raise InputError(f"--out {out}: its folder does not exist")
    try:
        write_embedded(name, Path(out).resolve(), **options)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({first_line(error)})")
    check(out)


if __name__ == "__main__":
    sys.excepthook = explain_input_errors
    tyro.extras.subcommand_cli_from_dict({"check": check, "compose": compose}, description=__doc__)

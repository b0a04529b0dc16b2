"""Features of clips in HDF5 (schema `cmg-features`, version 1), batches of them, and the embedded digits set.

    python data.py check FILE               validate a file completely and print what is inside
    python data.py digits --out FILE        compose clips from digits.h5 (spoken digits, handwritten digits, sentences)
    python data.py convert SET ROOT --out FILE          from the authors' files; SET is vggsound, ave, avvp, ave-avvp,
                                                        ucf51, ucf-vgg, mscoco, clotho or avs

A file holds N clips of T segments. Each modality is a dataset (N, T, d) or (N, T, H, W, d) named after it; `split` (N,)
is 0 train, 1 val, 2 test; `id` (N,), `classes` (C,), and optionally `label` (N,), `events/<modality>` (N, T, C),
`mask` (N, T, h, w) and `group` (N,). This module knows nothing of the methods.
"""
import atexit
import csv
import ctypes
import hashlib
import io
import itertools
import json
import os
import pickle
import pickletools
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Iterator, Literal, Optional

import h5py
import numpy as np
import torch
import torch.distributed as dist
import tyro
from tqdm import tqdm

FORMAT, VERSION = "cmg-features", 1
SPLITS = ("train", "val", "test")
MODALITY_ORDER = ("audio", "video", "text", "flow")  # others follow as the file lists them
NOT_MODALITIES = ("label", "events", "mask", "group", "split", "id", "classes")
NOT_ANNOTATED = 255  # fills the frames of `mask` that nobody drew
MOST_BYTES = 64 << 20  # of a member of an archive; the largest ones that exist have 2 MiB
DIGITS_FILE = Path(__file__).with_name("digits.h5")


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line: what is wrong, and what to do."""


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def explain_input_errors(kind, error, traceback):
    """A `sys.excepthook`: an InputError ends the program with one line on stderr and exit code 2, no traceback."""
    if issubclass(kind, KeyboardInterrupt):
        sys.exit(130)
    if PROCESSES > 1 and issubclass(kind, RuntimeError) and re.search("gloo|nccl|connection", str(error), re.I):
        print(f"error: process {RANK} lost another one ({first_line(error)}); --resume goes on from its checkpoint",
              file=sys.__stderr__, flush=True)
        os._exit(2)  # the others cannot be waited for
    if issubclass(kind, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
        kind, error = InputError, f"{first_line(error)}; try a smaller --batch-size, or --features-on file"
    if not issubclass(kind, InputError):
        return sys.__excepthook__(kind, error, traceback)
    print(f"error: {error}", file=sys.__stderr__)  # torch.distributed catches what a hook writes to sys.stderr
    sys.exit(2)


def require_shape(name: str, tensor, shape: tuple) -> None:
    """Raise ValueError naming the argument unless `tensor` has `shape`, in which -1 stands for any length."""
    if tensor.ndim != len(shape) or any(want not in (-1, have) for have, want in zip(tensor.shape, shape)):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")


def pick_device(name: str) -> torch.device:
    """`auto` or a torch device name -> device. Raises InputError if it does not exist here."""
    try:
        if PROCESSES > 1 and name.startswith("cuda:"):
            raise InputError(f"--device {name}: of several processes each takes its own GPU; give --device cuda")
        own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        name = own if name == "cuda" or name == "auto" and torch.cuda.is_available() else name
        device = torch.device("cpu" if name == "auto" else name)
        torch.zeros(1, device=device).item()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if device.type == "cpu" and sys.platform == "linux":
            keep_freed_memory()
        return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {name}: not available here ({first_line(error)}); try --device auto")


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: every step takes the same sizes, and new pages cost a tenth of its time."""
    if hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give the top of the heap back
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX: no pages of their own for large blocks, which go when freed


def write(path: Path, save) -> None:
    """`save(temporary path)`, then rename: a program killed at any point leaves the old file or the whole new one."""
    temporary = path.with_suffix(".tmp")
    save(temporary)
    os.replace(temporary, path)


def git_commit() -> str:
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# --------------------------------------------------------------------------------------------------- several processes
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # as torchrun sets them


def join_processes(device: torch.device) -> None:
    """Under torchrun, connect the processes. Each takes its share of every batch, clips in the order of ranks."""
    if PROCESSES > 1:
        patience = timedelta(days=1)  # while the first process hashes the data or probes
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
        atexit.register(dist.destroy_process_group)


class Gather(torch.autograd.Function):
    """(n, ...) of each process -> (N, ...) of all of them. Backward: the sum of what all made of this one's part."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(PROCESSES)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        return share(add_up(gradient.clone(memory_format=torch.contiguous_format)))


def gather(x, dim: int = 0):
    """The clips of all processes, along `dim`; with gradients. Alone, x itself."""
    return Gather.apply(x.movedim(dim, 0)).movedim(0, dim) if PROCESSES > 1 else x


def add_up(x):
    """The sum over all processes, in place."""
    if PROCESSES > 1:
        dist.all_reduce(x)
    return x


def share(x):
    """This process's part of something about all clips."""
    return x.chunk(PROCESSES)[RANK]


def average_gradients(modules) -> None:
    """Each process's loss is the mean over its own clips; averaged, the gradients are those of the mean over all."""
    gradients = [p.grad for p in modules.parameters() if p.grad is not None] if PROCESSES > 1 else []
    if gradients:
        flat = add_up(torch.cat([g.flatten() for g in gradients])) / PROCESSES
        for g, part in zip(gradients, flat.split([g.numel() for g in gradients])):
            g.copy_(part.view_as(g))


def of_all(value) -> list:
    """Any object of each process, in the order of ranks."""
    values = [value] * PROCESSES
    if PROCESSES > 1:
        dist.all_gather_object(values, value)
    return values


def agreed(signals: list, now: bool) -> list:
    """The signals that any process got, told to all of them `now`; alone, one's own at any time."""
    return signals if PROCESSES == 1 else sum(of_all(list(signals)), []) if now else []


# ------------------------------------------------------------------------------------------------------- feature files
class FeatureFile:
    """One validated `cmg-features` file. Errors name the file, the dataset, what was found and what was expected."""

    def __init__(self, path: str):
        self.path = str(path)
        if not os.path.isfile(path):
            raise InputError(f"{path}: no such file; give a cmg-features file, or 'digits' for the embedded set")
        try:
            self.h5 = h5py.File(path, "r")
        except OSError as error:
            raise InputError(f"{path}: not a readable HDF5 file ({first_line(error)}); copy it again")
        self.raw = os.open(path, os.O_RDONLY)
        found = self.h5.attrs.get("format"), self.h5.attrs.get("version")
        if found != (FORMAT, VERSION):
            raise InputError(f"{path}: format and version are {found[0]} {found[1]}, expected {FORMAT} {VERSION}")
        names = [name for name in self.h5 if name not in NOT_MODALITIES]
        known = [name for name in MODALITY_ORDER if name in names]
        self.modalities = known + [name for name in names if name not in known]
        self._validate()

    def _fail(self, dataset: str, found, expected):
        raise InputError(f"{self.path}: dataset '{dataset}' has {found}, expected {expected}")

    def _require(self, name: str, kinds: dict, shape: tuple):
        """Dataset `name`, checked: its dtype's kind is one of `kinds` {kind: words}; None in `shape` is any length."""
        if not isinstance(self.h5.get(name), h5py.Dataset):
            raise InputError(f"{self.path}: dataset '{name}' is {'a group' if name in self.h5 else 'missing'}")
        data = self.h5[name]
        if data.dtype.kind not in kinds:
            self._fail(name, f"dtype {data.dtype}", " or ".join(dict.fromkeys(kinds.values())))
        if data.ndim != len(shape) or any(want not in (None, have) for have, want in zip(data.shape, shape)):
            letters = dict(zip("NThw", shape)) if name == "mask" else dict(zip("NTC", shape))
            wanted = ", ".join(k if v is None else str(v) for k, v in letters.items())
            self._fail(name, f"shape {data.shape}", f"({wanted}{',' * (len(shape) == 1)})")
        return data

    def _validate(self):
        numbers, flags, words = {"i": "integers", "u": "integers"}, {"b": "0 and 1", "u": "0 and 1", "i": "0 and 1"}, \
            {"O": "str", "S": "str"}
        if not self.modalities:
            raise InputError(f"{self.path}: no modality inside, expected datasets such as 'audio' or 'video'")
        self.split = self._require("split", numbers, (None,))[:]
        self.clips = len(self.split)
        self._require("id", words, (self.clips,))
        shape = getattr(self.h5[self.modalities[0]], "shape", ())
        self.segments = shape[1] if len(shape) > 1 else 0
        for name in self.modalities:
            self._validate_modality(name)
        if not np.isin(self.split, (0, 1, 2)).all():
            self._fail("split", f"values {np.unique(self.split)[:6].tolist()}", "0 train, 1 val, 2 test")
        classes = self._require("classes", words, (None,))[:] if "classes" in self.h5 else []
        self.classes = [name.decode() for name in classes]
        if len(set(self.classes)) < len(self.classes):
            self._fail("classes", "a name twice", "distinct names")
        self.label = np.full(self.clips, -1)
        if "label" in self.h5:
            self.label = self._require("label", numbers, (self.clips,))[:].astype(np.int64)
        if (self.label >= 0).any() and not self.classes:
            raise InputError(f"{self.path}: dataset 'classes' is missing, the names of the labels")
        if len(self.label) and (self.label.min() < -1 or self.label.max() >= len(self.classes)):
            self._fail("label", f"values {self.label.min()}..{self.label.max()}", f"-1..{len(self.classes) - 1}, C - 1")
        if "group" in self.h5:
            self._require("group", numbers, (self.clips,))
        if "mask" in self.h5:
            self._require("mask", numbers, (self.clips, self.segments, None, None))
        if isinstance(self.h5.get("events"), h5py.Dataset):
            raise InputError(f"{self.path}: 'events' is a dataset, expected a group with one dataset per modality")
        for name in self.h5.get("events", {}):
            self._require(f"events/{name}", flags, (self.clips, self.segments, len(self.classes)))

    def _validate_modality(self, name: str):
        if not isinstance(self.h5[name], h5py.Dataset):
            raise InputError(f"{self.path}: '{name}' is a group, expected a dataset")
        data = self.h5[name]
        if data.ndim not in (3, 5) or 0 in data.shape[1:]:
            self._fail(name, f"shape {data.shape}", "(N, T, d) or (N, T, H, W, d)")
        if data.shape[:2] != (self.clips, self.segments):
            self._fail(name, f"N, T = {data.shape[:2]}", f"{(self.clips, self.segments)} as elsewhere in the file")
        if data.dtype.kind != "f" or data.dtype.itemsize > 8:
            self._fail(name, f"dtype {data.dtype}", "float16, float32 or float64")
        sample = np.unique(np.linspace(0, self.clips - 1, min(16, self.clips)).astype(int))
        if not np.isfinite(self.read(name, sample)).all():
            self._fail(name, "NaN or infinity", "finite values (python data.py check FILE says where)")

    def read(self, name: str, index: np.ndarray) -> np.ndarray:
        """Clips `index` of a dataset in their stored dtype. A contiguous dataset is read clip by clip with pread, which
        neither maps the file (a file that shrinks must not kill the process) nor holds h5py's global lock."""
        data = self.h5[name]
        out = np.empty((len(index), *data.shape[1:]), data.dtype)
        start = None if data.chunks or data.file.filename != self.path else data.id.get_offset()
        try:
            for i, clip in enumerate(index):
                row = out[i:i + 1]
                if start is None:
                    data.read_direct(row, np.s_[int(clip):int(clip) + 1])
                elif os.preadv(self.raw, [row], start + int(clip) * row.nbytes) != row.nbytes:
                    raise OSError("the file ends early")
        except OSError as error:
            raise InputError(f"{self.path}: dataset '{name}' cannot be read ({error}); is the file still whole?")
        return out


class Features:
    """One or several files as one set of clips: the union of their clips, the modalities that all of them hold."""

    def __init__(self, paths: list):
        self.files = [FeatureFile(path) for path in paths]
        first = self.files[0]
        self.modalities = [m for m in first.modalities if all(m in file.modalities for file in self.files)]
        self.shape = {m: first.h5[m].shape[1:] for m in self.modalities}  # (T, d) or (T, H, W, d)
        self.classes, self.name = first.classes, str(first.h5.attrs.get("name", Path(first.path).stem))
        for file in self.files[1:]:
            shape = {m: file.h5[m].shape[1:] for m in self.modalities}
            if shape != self.shape or file.classes != self.classes:
                raise InputError(f"{file.path}: shapes {shape} or classes differ from those of {first.path}")
        self.starts = np.cumsum([0] + [file.clips for file in self.files])
        self.split = np.concatenate([file.split for file in self.files])
        self.label = np.concatenate([file.label for file in self.files])

    def __len__(self) -> int:
        return len(self.split)

    def clips(self, split: str) -> np.ndarray:
        """Indices of the clips of one split."""
        return np.flatnonzero(self.split == SPLITS.index(split))

    def read(self, name: str, index: np.ndarray) -> np.ndarray:
        """Clips `index` of a dataset, any order, in their stored dtype."""
        if len(self.files) == 1:
            return self.files[0].read(name, index)
        owner = np.searchsorted(self.starts, index, side="right") - 1
        parts = [self.files[f].read(name, index[owner == f] - self.starts[f]) for f in range(len(self.files))]
        out = np.empty((len(index), *parts[0].shape[1:]), np.result_type(*parts))
        for f, part in enumerate(parts):
            out[owner == f] = part
        return out

    def single_event(self, index: np.ndarray) -> np.ndarray:
        """Those of the clips `index` that hold events of at most one class, over all modalities; all without events."""
        owner, happens = np.searchsorted(self.starts, index, side="right") - 1, np.zeros(len(index), int)
        for f, file in enumerate(self.files):
            mine = owner == f
            events = [file.read(f"events/{name}", index[mine] - self.starts[f]) for name in file.h5.get("events", {})]
            happens[mine] = np.any([e.any(1) for e in events], 0).sum(-1) if events else 1  # (N, T, C) -> (N,)
        return index[happens <= 1]

    def sha256(self) -> str:
        """Of the file as `sha256sum` has it, or of the files one after the other."""
        digest = hashlib.sha256()
        for file in self.files:
            with open(file.path, "rb") as stream:
                while block := stream.read(1 << 24):
                    digest.update(block)
        return digest.hexdigest()


def pinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` in page-locked memory if it is bound for a GPU: only then does nobody wait for the copy."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


class Batches:
    """Shuffled training batches {modality: (B, T, ...) float32 on `device`} of one split; the odd rest is dropped.

    `source` says where the features wait: on the `device`, in host `memory`, or in the `file` from which a background
    thread reads ahead; `auto` takes the first that fits in half of the memory there. The order depends on (seed, epoch)
    alone, so any epoch can be resumed at any step. Of several processes each reads its share of every batch. Raises
    InputError if the split is empty or smaller than a batch, or a batch does not divide among the processes.
    """

    def __init__(self, features: Features, modalities: list, split: str, batch_size: int, device, seed: int,
                 source: Literal["auto", "device", "memory", "file"] = "auto"):
        self.features, self.modalities, self.device, self.seed = features, modalities, torch.device(device), seed
        self.index, self.batch_size = features.clips(split), batch_size
        if len(self.index) == 0:
            raise InputError(f"{features.files[0].path}: the {split} split is empty, no clip has it in 'split'")
        if batch_size > len(self.index):
            raise InputError(f"--batch-size {batch_size} is larger than the {split} split ({len(self.index)} clips)")
        if batch_size % PROCESSES:
            raise InputError(f"--batch-size {batch_size} does not divide among {PROCESSES} processes")
        clip_bytes = sum(features.files[0].h5[m].dtype.itemsize * int(np.prod(features.shape[m])) for m in modalities)
        self.source = self._fits(clip_bytes * len(self.index)) if source == "auto" else source
        if self.source != "file":
            place = self.device if self.source == "device" else "cpu"
            self.resident = {m: self._all(m, place) for m in modalities}

    def _all(self, modality: str, place) -> torch.Tensor:
        """All clips (N, T, ...), filled in piece by piece: pieces to be joined would take the memory twice."""
        dtype = np.result_type(*(file.h5[modality].dtype for file in self.features.files))
        out = torch.empty((len(self.index), *self.features.shape[modality]), device=place,
                          dtype=torch.from_numpy(np.empty(0, dtype)).dtype)
        for start in range(0, len(out), 1000):
            out[start:start + 1000] = torch.from_numpy(self.features.read(modality, self.index[start:start + 1000]))
        return out

    def _fits(self, size: int) -> str:
        if self.device.type == "cuda" and size < 0.5 * torch.cuda.mem_get_info(self.device)[0]:
            return "device"
        size *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # each process on this machine holds all of it
        return "memory" if size < 0.5 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") else "file"

    def __len__(self) -> int:
        """Steps in an epoch."""
        return len(self.index) // self.batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[dict]:
        """Batches `start`, `start` + 1, … of this epoch's permutation."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.index), generator=generator)
        order = order.to(self.device) if self.source == "device" else order
        rows = [share(order[i * self.batch_size:(i + 1) * self.batch_size]) for i in range(start, len(self))]
        if self.source == "device" or self.source == "memory" and self.device.type == "cpu":
            for row in rows:
                yield {m: data[row].float() for m, data in self.resident.items()}
        else:
            yield from self._read_ahead(rows)

    def _read_ahead(self, rows: list, depth: int = 4) -> Iterator[dict]:
        ready, stop = queue.Queue(depth), threading.Event()

        def put(item):
            while not stop.is_set():
                try:
                    return ready.put(item, timeout=0.2)
                except queue.Full:
                    continue

        def reader():
            try:
                if self.device.type == "cuda":
                    torch.cuda.set_device(self.device)  # of this thread, for `pinned`
                for row in rows:
                    if stop.is_set():
                        return
                    clips = {m: data[row] for m, data in self.resident.items()} if self.source == "memory" else {
                        m: torch.from_numpy(self.features.read(m, self.index[row.numpy()])) for m in self.modalities}
                    put({m: pinned(c, self.device) for m, c in clips.items()})
            except BaseException as error:  # whatever ends the reader must end the loop that waits for it
                put(error)

        thread = threading.Thread(target=reader, daemon=True)
        thread.start()
        try:
            for _ in rows:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield {m: c.to(self.device, non_blocking=True).float() for m, c in item.items()}
        finally:
            stop.set()
            thread.join()  # Python aborts if it ends while a thread is inside torch


# --------------------------------------------------------------------------------------- the embedded set: digit clips
T, GRID, PATCH = 10, 7, 8  # segments; cells a side; pixels a side of a cell
PIXEL_NOISE, AUDIO_NOISE, CLUTTER = 0.1, 0.1, 3


def compose(base: h5py.File, split: int, clips: int, seed: int) -> dict:
    """`clips` digit clips from the recordings, images and sentences of `split` alone: a pure function of its arguments.

    An event is a digit class over an interval. Three quarters of the clips have one; the others have two of different
    classes: both digits are in the picture all the time, their sounds follow each other. The video of a clip is shifted
    against its audio by -1, 0 or 1 segment, as far as the clip allows. `label` is the class of the first event, and the
    sentence is about it. Returns the datasets of the schema as arrays, `video` (N, T, 7, 7, 64) in 8x8-pixel patches.
    """
    rng = np.random.default_rng([seed, split])
    n = np.arange(clips)
    two = rng.permutation(n % 4 == 0)
    first = rng.permutation(n % 10)
    labels = np.stack([first, (first + rng.integers(1, 10, clips)) % 10], 1)  # (N, 2); the second counts if `two`

    # Intervals, half-open: audio of event e is [cut[e], cut[e+1]); both digits are visible over [start, end) + shift.
    length = np.where(two[:, None], rng.integers(3, 6, (clips, 2)), np.stack([rng.integers(4, 9, clips), 0 * n], 1))
    start = rng.integers(0, T - length.sum(1) + 1)
    cut = start[:, None] + np.concatenate([0 * n[:, None], length.cumsum(1)], 1)  # (N, 3)
    shift = np.clip(rng.integers(-1, 2, clips), -start, T - cut[:, 2])
    t = np.arange(T)
    heard = (t[:, None] >= cut[:, None, :2]) & (t[:, None] < cut[:, None, 1:])  # (N, T, 2)
    visible = ((t >= (start + shift)[:, None]) & (t < (cut[:, 2] + shift)[:, None]))[..., None]
    visible = visible & np.stack([n >= 0, two], 1)[:, None]  # (N, T, 2)
    events = {"audio": heard, "video": visible}
    classes = np.eye(10, dtype=bool)[labels]  # (N, 2, 10)

    return {
        "audio": _compose_audio(base, split, rng, labels, heard),
        **_compose_video(base, split, rng, labels, visible),
        "text": _pick(base["text"], split, rng, labels[:, 0], "tokens"),
        "label": labels[:, 0],
        "split": np.full(clips, split, np.uint8),
        **{f"events/{m}": (on[..., None] & classes[:, None]).any(2).astype(np.uint8) for m, on in events.items()},
    }


def _pick(group: h5py.Group, split: int, rng, label: np.ndarray, name: str) -> np.ndarray:
    """One random row of `split` per wanted label: (...,) labels -> (..., *row)."""
    rows = np.flatnonzero(group["split"][:] == split)
    rows = rows[np.argsort(group["label"][:][rows], kind="stable")]
    count = np.bincount(group["label"][:][rows], minlength=10)
    chosen = rows[(count.cumsum() - count)[label] + rng.integers(0, count[label])]
    return group[name][:][chosen]


def _compose_audio(base, split, rng, labels, heard) -> np.ndarray:
    """(N, T, 130): in each segment of its event the recording, as 10 frames x 13 standardised MFCC; low noise always.

    One recording an event, spoken once a segment; each time a little of its start and end is cut, then resampled."""
    frames, length = base["audio/frames"][:], base["audio/length"][:]
    train = np.repeat(base["audio/split"][:] == 0, length)
    frames = (frames - frames[train].mean(0)) / frames[train].std(0)
    group = {"split": base["audio/split"], "label": base["audio/label"], "row": np.arange(len(length))}
    row = _pick(group, split, rng, labels, "row")[:, None, :, None]  # (N, 1, 2, 1)
    cut = rng.uniform(0, 0.15, (2, *heard.shape, 1))
    position = (cut[0] + (1 - cut.sum(0)) * np.linspace(0, 1, 10)) * (length[row] - 1)  # (N, T, 2, 10) fractional
    low = np.minimum(position.astype(int), length[row] - 2)
    weight, low = (position - low)[..., None], low + (length.cumsum() - length)[row]
    words = frames[low] * (1 - weight) + frames[low + 1] * weight  # (N, T, 2, 10, 13)
    audio = (heard[..., None] * words.reshape(*heard.shape, 130)).sum(2).astype(np.float32)
    return (audio + AUDIO_NOISE * rng.standard_normal(audio.shape, np.float32)).astype(np.float16)


def _compose_video(base, split, rng, labels, visible) -> dict:
    """Pixels in [0, 1] plus noise. Each digit walks at random over the grid; three cells hold scrambled digits."""
    clips = len(labels)
    image = _pick(base["image"], split, rng, labels, "pixels").reshape(clips, 2, PATCH**2).astype(np.float32) / 16
    clutter = _pick(base["image"], split, rng, rng.integers(0, 10, (clips, CLUTTER)), "pixels")
    clutter = rng.permuted(clutter.reshape(clips, CLUTTER, PATCH**2).astype(np.float32) / 16, axis=2)
    cells = rng.permuted(np.tile(np.arange(GRID**2), (clips, 1)), axis=1)
    n, still = np.arange(clips), cells[:, 2:2 + CLUTTER]

    video = PIXEL_NOISE * rng.standard_normal((clips, T, GRID**2, PATCH**2), np.float32)
    mask = np.zeros((clips, T, GRID**2, PATCH**2), np.uint8)
    here = np.stack(np.divmod(cells[:, :2], GRID), -1)  # (N, 2, row and column); the two digits never share a cell
    for t in range(T):
        shown = np.zeros((clips, GRID**2, PATCH**2), np.float32)
        shown[n[:, None], still] = clutter
        for e in range(2):
            on = n[visible[:, t, e]]
            cell = (here[on, e] * (GRID, 1)).sum(-1)
            shown[on, cell] = image[on, e]
            mask[on, t, cell] = (image[on, e] > 0.25) * (labels[on, e] + 1)[:, None]
        video[:, t] += shown
        there = np.clip(here + rng.integers(-1, 2, here.shape), 0, GRID - 1)
        apart = (there[:, 0] != there[:, 1]).any(-1)
        here = np.where(apart[:, None, None], there, here)
    canvas = mask.reshape(clips, T, GRID, GRID, PATCH, PATCH).transpose(0, 1, 2, 4, 3, 5)
    return {"video": video.astype(np.float16).reshape(clips, T, GRID, GRID, PATCH**2),
            "mask": canvas.reshape(clips, T, GRID * PATCH, GRID * PATCH)}


def write_digits(out: str, sizes: tuple = (2400, 400, 800), seed: int = 0) -> None:
    """Compose the digits set into a `cmg-features` file: written beside `out`, then renamed."""
    with h5py.File(DIGITS_FILE, "r") as base, tempfile.TemporaryDirectory(dir=Path(out).parent) as folder:
        path = Path(folder) / "digits.h5"
        with h5py.File(path, "w") as h5:
            h5.attrs.update(format=FORMAT, version=VERSION, name="digits", source=base.attrs["source"],
                            license=base.attrs["license"])
            h5["classes"] = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
            ends = np.cumsum(sizes)
            for split, (size, end) in enumerate(zip(sizes, ends)):
                for name, data in compose(base, split, size, seed).items():
                    if name not in h5:
                        packed = {"chunks": (1, *data.shape[1:]), "compression": 1} if name == "mask" else {}
                        h5.create_dataset(name, (ends[-1], *data.shape[1:]), data.dtype, **packed)
                    h5[name][end - size:end] = data
            h5["id"] = [f"{SPLITS[s]}-{i:05d}" for s, size in enumerate(sizes) for i in range(size)]
        os.replace(path, out)


def data_files(data: list, runs_dir: str) -> list:
    """The feature files behind `--data`: 'digits' is composed once and kept in `runs_dir`, anything else is a path."""
    if not data:
        raise InputError("no feature file given; give cmg-features files, or 'digits' for the embedded set")
    if list(data) != ["digits"]:
        return list(data)
    recipe = hashlib.sha256(DIGITS_FILE.read_bytes() + Path(__file__).read_bytes()).hexdigest()[:8]
    path = Path(runs_dir) / f"digits-{recipe}.h5"
    if RANK:
        of_all(None)  # the first process composes
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_digits(str(path))
        except OSError as error:
            raise InputError(f"--runs-dir {runs_dir}: cannot be written ({error.strerror})")
    if not RANK:
        of_all(None)
    return [str(path)]


# ------------------------------------------------------------------------------------------ the authors' files: reading
class PickledDtype:
    """Stands for `numpy.dtype` in a pickle: a code such as f4, then (version, byte order, ...) as state."""

    def __init__(self, code, *_):
        if not re.fullmatch(r"[<>|=]?([fiu][1248]|b1)", str(code)):
            raise pickle.UnpicklingError(f"holds values of dtype {str(code)[:20]}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state):
        self.dtype = self.dtype.newbyteorder(">" if state[1] == ">" else "<")


class PickledArray:
    """Stands for an array being rebuilt; (version, shape, dtype, Fortran order, bytes) follow as its state."""

    def __init__(self, *_):
        self.array = None

    def __setstate__(self, state):
        _, shape, kind, fortran, content = state
        content = content.encode("latin1") if isinstance(content, str) else content
        self.array = np.frombuffer(content, kind.dtype).reshape(shape, order="F" if fortran else "C")


class StandIn:
    """Calls a function, and has no attribute that a pickle could set."""
    __slots__ = ()

    def __call__(self, *arguments):
        return self.stands_for(*arguments)


class FromBuffer(StandIn):
    __slots__ = ()

    @staticmethod
    def stands_for(content, kind, shape, order):  # since protocol 5
        found = PickledArray()
        found.__setstate__((1, shape, kind, order == "F", content))
        return found


class Encode(StandIn):
    __slots__ = ()

    @staticmethod
    def stands_for(text, codec):  # how Python 3 puts bytes in protocol 2
        return text.encode("latin1")


class ArrayUnpickler(pickle.Unpickler):
    """A pickle from a public drive can run any program. This reader knows five names, all of them NumPy's (of old and
    new module paths), gives each a stand-in of its own, and refuses every other."""
    ADMITTED = {"numpy.core.multiarray._reconstruct": PickledArray, "numpy.core.numeric._frombuffer": FromBuffer(),
                "numpy.ndarray": "ndarray", "numpy.dtype": PickledDtype, "_codecs.encode": Encode()}

    def find_class(self, module, name):
        wanted = f"{module.replace('numpy._core', 'numpy.core')}.{name}"
        if wanted not in self.ADMITTED:
            raise pickle.UnpicklingError(f"asks for {module}.{name}, only NumPy arrays are admitted")
        return self.ADMITTED[wanted]


# Operations of pickles that hold an array or a table of numbers; hashing nested keys may take for ever.
NEVER = {"SETITEM", "SETITEMS", "DICT", "EMPTY_DICT", "ADDITEMS", "EMPTY_SET", "FROZENSET"}  # in an array
TABLE = {"PROTO", "FRAME", "EMPTY_DICT", "DICT", "MARK", "INT", "LONG", "LONG1", "BININT", "BININT1", "BININT2",
         "SETITEM", "SETITEMS", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "STOP"}


def unpickle(content: bytes, where: str, table: bool = False):
    """The array, or the dict of numbers (`table`), in a pickle; InputError if it holds or does anything else."""
    try:
        calls = 0
        for code, argument, _ in pickletools.genops(content):  # also finds lengths that are longer than the file
            calls += code.name in ("REDUCE", "BUILD", "NEWOBJ")
            if code.name in NEVER and not table or code.name not in TABLE and table or calls > 16:
                raise pickle.UnpicklingError(f"holds more than {'numbers' if table else 'an array'} ({code.name})")
            if code.name.endswith("PUT") and int(argument) > len(content):
                raise pickle.UnpicklingError("a memo of that size takes memory and nothing else")
        found = ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a hostile pickle can raise anything
        raise InputError(f"{where}: refused, {first_line(error)}")
    return found.array if isinstance(found, PickledArray) else found


def read_archive(path: str, faithful: bool = False) -> np.ndarray:
    """The one array in one of the authors' zip archives. Raises InputError naming the archive and the member."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [m for m in archive.infolist() if ".pkl" in m.filename]
            names = {m: m.filename if m.filename.isprintable() else repr(m.filename) for m in archive.infolist()}
            for member, name in names.items():
                if member.filename.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", member.filename):
                    raise InputError(f"{path}: member {name} leads out of the archive, refused")
            if len(members) != 1 and not (members and faithful):  # the released reader takes the last one
                some = ", ".join(list(names.values())[:4]) or "nothing"
                raise InputError(f"{path}: {len(members)} members named .pkl, expected one (of {some})")
            where = f"{path}: member {names[members[-1]]}"
            with archive.open(members[-1]) as stream:
                content = stream.read(MOST_BYTES + 1)
            if len(content) > MOST_BYTES:
                raise InputError(f"{where} is larger than {MOST_BYTES >> 20} MiB, refused")
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such archive")
    except Exception as error:  # a damaged or hostile archive can raise anything
        raise InputError(f"{path}: not a readable zip archive ({first_line(error)})")
    array = unpickle(content, where)
    if not isinstance(array, np.ndarray):
        raise InputError(f"{where} holds a {type(array).__name__}, expected a NumPy array")
    return array


def fit(array: np.ndarray, shape: tuple, rows: Literal["first", "even", "twice"] = "first"):
    """(array (L, ...) brought to `shape` (T, ...); `padded`, `cut` or None). `first`: fewer rows than T repeat the last
    one, more than T lose their end; `twice`: the same for T / 2 rows, each taken twice; `even`: T rows evenly spaced.
    Raises InputError if it cannot fit."""
    if array.ndim != len(shape) or array.shape[1:] != shape[1:] or len(array) == 0 or array.dtype.kind not in "fiu":
        raise InputError(f"holds {array.dtype} of shape {array.shape}, expected {('L', *shape[1:])}")
    length, segments, number = len(array), shape[0], np.arange(shape[0])
    wanted = segments // 2 if rows == "twice" else segments
    taken = number * length // segments if rows == "even" else np.minimum(number * wanted // segments, length - 1)
    return array[taken], "padded" if length < wanted else "cut" if length > wanted else None


# ----------------------------------------------------------------------------------------- the authors' files: writing
@dataclass
class Options:
    faithful: bool = False  # lists and archives as they are: rows listed twice, misspelt ids, classes of one side only
    subset: bool = False  # accept lists with other numbers of rows than the authors': a part of them, or your own
    on_error: Literal["stop", "skip"] = "stop"  # at an archive that is missing, damaged or refused
    dtype: Literal["float16", "float32"] = "float16"  # of the features
    workers: int = os.cpu_count() or 1  # processes that read archives


@dataclass
class Listing:
    """The clips of one file, in order. `sources` {modality: (shape, [one a clip])}: a source is the path of an archive,
    (path, dataset, row) of an HDF5 file, or an array. `notes` are told to the user."""
    name: str
    origin: str  # the data set; probes across data sets have settings of their own in the release
    ids: list
    classes: list
    sources: dict
    split: np.ndarray
    label: Optional[np.ndarray] = None  # (N,)
    events: dict = field(default_factory=dict)  # {modality: (N, T, C)}
    group: Optional[np.ndarray] = None  # (N,)
    mask: Optional[tuple] = None  # shape and sources of `mask`
    rows: Literal["first", "even", "twice"] = "first"  # as `fit` has it
    notes: list = field(default_factory=list)

    def __getitem__(self, rows):
        """The clips `rows`, an array of numbers."""
        def pick(x):
            return None if x is None else x[rows] if isinstance(x, np.ndarray) else [x[i] for i in rows]
        many = {m: (shape, pick(sources)) for m, (shape, sources) in self.sources.items()}
        events = {m: pick(e) for m, e in self.events.items()}
        mask = self.mask and (self.mask[0], pick(self.mask[1]))
        return replace(self, ids=pick(self.ids), sources=many, split=pick(self.split), label=pick(self.label),
                       events=events, group=pick(self.group), mask=mask)


def read_source(source, shape: tuple, rows: str, faithful: bool):
    """(array of `shape`, what `fit` did) from a source of a Listing"""
    if isinstance(source, np.ndarray):
        return source, None
    path, *place = source if isinstance(source, tuple) else source[1:2] if isinstance(source, list) else [source]
    try:
        if isinstance(source, list):
            return read_masks(source, shape), None
        array = opened(path)[place[0]][place[1]] if place else read_archive(path, faithful)
        return fit(array, shape, rows)
    except Exception as error:  # damaged files raise anything
        raise InputError(first_line(error) if str(error).startswith(path) else f"{path}: {first_line(error)}")


@lru_cache
def opened(path: str) -> h5py.File:
    return h5py.File(path, "r")


def end_with(parent: int) -> None:
    """End this process when its parent is gone, killed: nobody else would."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


DONE = 1  # in the progress file's byte of a clip; then two bits for each dataset, padded and cut


def start_worker(*state):
    """In each process: (partial file, progress file, {dataset: (dtype, shape, offset, sources)}, rows, faithful)"""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    global job
    job = [os.open(path, os.O_RDWR) for path in state[:2]] + list(state[2:])


def put(file: int, content, offset: int) -> None:
    """Write all of it, or raise OSError: a full disk takes a part without a word."""
    if os.pwrite(file, content, offset) != len(content):
        raise OSError("no space left on the disk")


def copy_clip(row: int):
    """Read a clip and write it to its place, then note in the progress file what was done -> (row, error or None).
    Raises OSError if it cannot be written."""
    partial, progress, datasets, rows, faithful = job
    arrays, done = [], DONE
    try:
        for i, (dtype, shape, offset, sources) in enumerate(datasets.values()):
            array, happened = read_source(sources[row], shape, rows, faithful)
            with np.errstate(over="ignore"):
                array = np.ascontiguousarray(array, dtype)
            if dtype.kind == "f" and not np.isfinite(array).all():
                raise InputError(f"{sources[row]}: NaN, infinity, or more than {dtype} can hold (--dtype float32)")
            arrays.append((array, offset))
            done |= {None: 0, "padded": 2, "cut": 4}[happened] << 2 * i
    except InputError as error:
        return row, first_line(error)
    for array, offset in arrays:
        put(partial, array.reshape(-1).view(np.uint8).data, offset + row * array.nbytes)
    put(progress, bytes([done]), row)
    return row, None


def create(path: str, listing: Listing, dtype: np.dtype) -> dict:
    """Write an HDF5 file, only reserving the place of the features -> {dataset: (dtype, shape, offset)}"""
    places, text = {}, h5py.string_dtype()
    with h5py.File(path, "w") as h5:
        h5.attrs.update(format=FORMAT, version=VERSION, name=listing.name, license="see the authors' release",
                        source=listing.origin)
        h5["id"], h5["split"] = np.array(listing.ids, text), listing.split.astype(np.uint8)
        h5["classes"] = np.array(listing.classes, text)
        for name, values in {"label": listing.label, "group": listing.group}.items():
            if values is not None:
                h5[name] = values.astype(np.int64)
        for m, events in listing.events.items():
            h5[f"events/{m}"] = events.astype(np.uint8)
        early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        early.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        arrays = {m: (dtype, shape) for m, (shape, _) in listing.sources.items()}
        if listing.mask:
            arrays["mask"] = np.dtype(np.uint8), listing.mask[0]
        for name, (kind, shape) in arrays.items():
            data = h5.create_dataset(name, (len(listing.ids), *shape), kind, dcpl=early)
            places[name] = kind, shape, data.id.get_offset()
    return places


def write_clips(listing: Listing, out: str, options: Options) -> None:
    """Convert the clips of a listing into the file `out`, with several processes. Killed at any point, a second call
    goes on where it was and ends in the same file. Raises InputError at the first bad archive, or skips it."""
    dtype, rows, report = np.dtype(options.dtype), len(listing.ids), Path(f"{out}.skipped.txt")
    folder = Path(out).resolve().parent
    if rows == 0 or not folder.is_dir() or not Path(out).name or Path(out).is_dir() or options.workers < 1:
        raise InputError(f"{out}: the list is empty" if rows == 0 else f"--workers {options.workers}: at least one"
                         if options.workers < 1 else f"--out '{out}': not a file in a folder that exists")
    arrays = listing.sources | ({"mask": listing.mask} if listing.mask else {})
    size = sum((1 if m == "mask" else dtype.itemsize) * int(np.prod(shape)) for m, (shape, _) in arrays.items()) * rows
    files = sorted({s[0] for _, of in arrays.values() for s in of if isinstance(s, tuple) and os.path.exists(s[0])})
    dates = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in files]
    what = json.dumps([asdict(options) | {"workers": 0, "on_error": ""}, asdict(replace(listing, notes=[])), dates],
                      default=lambda x: [x.shape, hashlib.sha256(np.ascontiguousarray(x)).hexdigest()]
                      if isinstance(x, np.ndarray) else str(x))
    partial = f"{out}.partial-{hashlib.sha256(what.encode()).hexdigest()[:8]}"
    progress, done = f"{partial}.done", np.zeros(rows, np.uint8)
    if os.path.exists(partial) and os.path.exists(progress) and os.path.getsize(progress) == rows:
        done = np.fromfile(progress, np.uint8)
        with h5py.File(partial, "r") as h5:
            places = {m: (h5[m].dtype, h5[m].shape[1:], h5[m].id.get_offset()) for m in arrays}
        print(f"{out}: going on after {(done > 0).sum()} of {rows} clips")
    else:
        free = shutil.disk_usage(folder).free
        if size > free:
            raise InputError(f"{out}: needs {size / 1e9:.1f} GB of disk, {free / 1e9:.1f} are free")
        for old in (*folder.glob(f"{Path(out).name}.partial-*"), report):
            old.unlink(missing_ok=True)
        places = create(partial, listing, dtype)
        write(Path(progress), done.tofile)
    print(f"{out}: {rows} clips, {size / 1e9:.2f} GB; " + ", ".join(
        f"{m} {shape}" for m, (shape, _) in arrays.items()) + "".join(f"\n  {note}" for note in listing.notes))
    state = (partial, progress, {m: (*place, arrays[m][1]) for m, place in places.items()}, listing.rows,
             options.faithful)
    errors, todo = {}, np.flatnonzero(done == 0).tolist()
    with ProcessPoolExecutor(options.workers, initializer=start_worker, initargs=state) as pool:
        try:
            bar = tqdm(pool.map(copy_clip, todo, chunksize=4), Path(out).name, len(todo), unit=" clips",
                       disable=not sys.stderr.isatty(), dynamic_ncols=True)
            for row, error in bar:
                if error and options.on_error == "stop":
                    raise InputError(f"{error}; --on-error skip leaves such clips out, a second call goes on from here")
                errors |= {row: error} if error else {}
        except BrokenProcessPool:
            raise InputError(f"{out}: a process was ended from outside, by lack of memory perhaps; a second call goes "
                             "on from here")
        except OSError as error:
            pool.shutdown(cancel_futures=True)
            raise InputError(f"{out}: cannot be written ({first_line(error)}); a second call goes on from here")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    done = np.fromfile(progress, np.uint8)
    for (i, name), (bit, text) in itertools.product(enumerate(places), enumerate(("padded", "cut"))):
        times = (done >> (2 * i + 1 + bit) & 1).sum()
        if times:
            print(f"  {name} {text} to {T} segments: {times} clips")
    if errors:
        report.write_text("".join(f"{listing.ids[row]}\t{error}\n" for row, error in sorted(errors.items())))
        print(f"  skipped: {len(errors)} clips, see {report}; the first: {errors[min(errors)]}")
        leave_out(partial, out, listing, np.array(sorted(errors)), dtype)
        os.remove(partial)
    else:
        report.unlink(missing_ok=True)
        os.replace(partial, out)
    os.remove(progress)
    FeatureFile(out)


def leave_out(path: str, out: str, listing: Listing, bad: np.ndarray, dtype: np.dtype) -> None:
    """Write a converted file to `out` without the clips `bad`."""
    keep = np.setdiff1d(np.arange(len(listing.ids)), bad)
    if len(keep) == 0:
        raise InputError(f"{out}: no clip could be converted")
    smaller = f"{path}.smaller"
    places = create(smaller, listing[keep], dtype)
    with h5py.File(path, "r") as old, h5py.File(smaller, "r+") as new:
        for name in places:
            for i in range(0, len(keep), 100):
                new[name][i:i + 100] = old[name][keep[i:i + 100]]
    os.replace(smaller, out)


# ------------------------------------------------------------------------------------------- the authors' files: lists
def read_table(path: Path, delimiter: str, columns: tuple) -> list:
    """Rows of a CSV file as dicts of stripped strings. Raises InputError naming a missing file or column."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            rows = [{k: (v or "").strip() for k, v in row.items() if k} for row in csv.DictReader(
                stream, delimiter=delimiter, quoting=csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL)]
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: not a readable list ({first_line(error)})")
    for column in columns:
        if not rows or column not in rows[0]:
            raise InputError(f"{path}: column '{column}' is missing, found {', '.join(rows[0]) if rows else 'no row'}")
    return rows


def read_lines(path: Path) -> list:
    """The lines of a category file, one class each, in the order of their index."""
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable list ({first_line(error)})")


def expect(path, found: int, expected, subset: bool, what: str = "rows") -> None:
    """Raise InputError unless a list has the length that the authors' list has."""
    if found != expected and not subset:
        raise InputError(f"{path}: {found} {what}, expected {expected}; --subset accepts other lists")


def number(classes: list, name: str, path) -> int:
    if name not in classes:
        raise InputError(f"{path}: class '{name}' is not in the category file")
    return classes.index(name)


def archives(folder: Path, ids: list) -> list:
    """The archive of each clip. Ids come from a list file: those that would lead out of the folder are refused."""
    for name in ids:
        if "/" in name or "\\" in name or name in ("", ".", ".."):
            raise InputError(f"{folder}: '{name}' is no clip id")
    return [str(folder / f"{name}.zip") for name in ids]


def in_splits(rows: list, path) -> np.ndarray:
    for row in rows:
        if row["split"] not in SPLITS:
            raise InputError(f"{path}: split '{row['split']}', expected {' '.join(SPLITS)}")
    return np.array([SPLITS.index(row["split"]) for row in rows], np.uint8)


def whole(text: str, path) -> int:
    """A number of seconds in a list"""
    if not re.fullmatch(r"-?\d+", text.strip()):
        raise InputError(f"{path}: '{text}' is no whole number of seconds")
    return int(text)


VIDEO, AUDIO, TEXT = (T, 7, 7, 512), (T, 128), (T, 768)  # shapes of a clip's features
VGGSOUND = {  # list file, its rows, those used
    "24k": ("vggsound-avel40k.csv", 40_801, 24_515), "40k": ("vggsound-avel40k.csv", 40_801, 40_801),
    "90k": ("vggsound-avel90k-new.csv", 87_323, 87_323), "81k": ("video_name_vggsound81k_checked.csv", None, None)}


def list_vggsound(lists: Path, features: Path, which: str, keep_splits: bool, subset: bool) -> Listing:
    name, total, used = VGGSOUND[which]
    path = lists / name
    if which == "81k":  # names of video files, no labels
        ids = [row["id"][:-4] for row in read_table(path, ",", ("id",))]
        classes, label, split = [], None, np.zeros(len(ids), np.uint8)
    else:
        rows = read_table(path, ",", ("category", "video_id", "split"))
        expect(path, len(rows), total, subset)
        classes = read_lines(lists / "VggsoundAVEL40kCategories.txt")
        expect(lists / "VggsoundAVEL40kCategories.txt", len(classes), 141, subset, "classes")
        rows = [row for row in rows if which != "24k" or row["split"] == "train"]
        expect(path, len(rows), used, subset, "rows of the train split")
        place = {name: i for i, name in enumerate(classes)}
        label = np.array([place[row["category"]] if row["category"] in place else
                          number(classes, row["category"], path) for row in rows])
        ids = [row["video_id"] for row in rows]
        split = in_splits(rows, path) if keep_splits else np.zeros(len(ids), np.uint8)  # the papers train on all
    wrong = [name for name in ids if len(name) != 11]
    if wrong or len(set(ids)) != len(ids):
        raise InputError(f"{path}: id '{(wrong or ['repeated'])[0]}', expected ids of 11 characters, each once")
    sources = {"audio": (AUDIO, archives(features / "audio/zip", ids)),
               "video": (VIDEO, archives(features / "video/zip", ids))}
    return Listing(f"vggsound{which}", "VGGSound", ids, classes, sources, split, label)


def read_order(path: Path, rows: int, expected: int, subset: bool) -> np.ndarray:
    """Row numbers of an order file"""
    order = read_array(path, "order")
    if order.ndim != 1 or order.dtype.kind not in "iu" or len(order) == 0:
        raise InputError(f"{path}: holds {order.dtype} of shape {order.shape}, expected row numbers")
    expect(path, len(order), expected, subset)
    if len(np.unique(order)) != len(order) or order.min() < 0 or order.max() >= rows:
        raise InputError(f"{path}: not distinct row numbers below {rows}")
    return order


def read_array(path: Path, key: str):
    try:
        with h5py.File(path, "r") as h5:
            return np.asarray(h5[key][()])
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: no readable dataset '{key}' ({first_line(error)})")


def list_ave(lists: Path, features: Path, subset: bool) -> Listing:
    """All clips of AVE, train, val and test one after the other as their orders have them."""
    path = lists / "Annotations.txt"
    rows = read_table(path, "&", ("Category", "VideoID", "StartTime", "EndTime"))
    expect(path, len(rows), 4143, subset)
    classes = list(dict.fromkeys(row["Category"] for row in rows))
    orders = [read_order(lists / f"{name}_order.h5", len(rows), size, subset) for name, size in
              zip(SPLITS, (3339, 402, 402))]
    order = np.concatenate(orders)
    if len(np.unique(order)) != len(order):
        raise InputError(f"{lists}: the train, val and test orders share clips")
    start, end = (np.array([whole(row[name], path) for row in rows]) for name in ("StartTime", "EndTime"))
    label = np.array([classes.index(row["Category"]) for row in rows])
    happens = (np.arange(T) >= start[:, None]) & (np.arange(T) < end[:, None])  # (N, T)
    events = (happens[..., None] & np.eye(len(classes), dtype=bool)[label][:, None])
    if (lists / "labels.h5").exists():
        given = read_array(lists / "labels.h5", "avadataset")
        if given.shape != (len(rows), T, len(classes) + 1) or not np.array_equal(given[..., :-1] > 0, events):
            raise InputError(f"{lists / 'labels.h5'}: does not agree with {path}")
    listing = Listing("ave", "AVE", [row["VideoID"] for row in rows], classes, {
        m: (shape, [(str(features / f"{name}_feature.h5"), "avadataset", i) for i in range(len(rows))])
        for m, name, shape in (("audio", "audio", AUDIO), ("video", "visual", VIDEO))},
        np.zeros(len(rows), np.uint8), label, {"audio": events, "video": events})
    listing = listing[order]
    listing.split = np.repeat(np.arange(3, dtype=np.uint8), [len(o) for o in orders])
    return listing


# Positive segments of each class and of background in the two AVVP lists: whoever finds these has read them well.
AVVP_SEGMENTS = {
    "audio": (275, 755, 598, 195, 5221, 961, 362, 388, 1981, 1257, 994, 906, 615, 207, 800, 1081, 362, 861, 727, 115,
              671, 645, 2062, 282, 370, 1832),
    "visual": (232, 565, 541, 170, 1084, 865, 332, 383, 1753, 1370, 1215, 1493, 535, 543, 400, 912, 395, 866, 450, 77,
               855, 714, 1344, 321, 529, 1712)}


def list_avvp(lists: Path, features: Path, side: str, options: Options, prefix: str = "AVVP", llp: Path = None):
    """One side of AVVP (or of AVE to AVVP), `audio` or `visual`: its clips with the events annotated in it. Clips of
    the LLP validation list are `train`, those of its test list `test`."""
    path, m = lists / f"{prefix}_eval_{side}_checked_combined.csv", "audio" if side == "audio" else "video"
    rows = read_table(path, "\t", ("filename", "onset", "offset", "event_labels"))
    expect(path, len(rows), {"AVVPaudio": 1846, "AVVPvisual": 1661, "AVE_AVVPaudio": 1085,
                             "AVE_AVVPvisual": 1032}[prefix + side], options.subset)
    classes = read_lines(lists / f"{prefix}_Categories.txt")
    events, empty = np.zeros((len(rows), T, len(classes)), bool), []
    for row, on in zip(rows, events):
        parts = [row[name].split(",") for name in ("onset", "offset", "event_labels")]
        if len({len(part) for part in parts}) > 1:
            raise InputError(f"{path}: {row['filename']} has lists of different lengths")
        for onset, offset, name in zip(*parts):
            first, end = whole(onset, path), whole(offset, path)
            empty += [row["filename"]] if end <= first else []
            on[max(first, 0):max(end, 0), number(classes, name.strip(), path)] = True
    segments = (*events.sum((0, 1)).tolist(), int((~events.any(-1)).sum()))
    if prefix == "AVVP" and segments != AVVP_SEGMENTS[side] and not options.subset:
        raise InputError(f"{path}: positive segments {segments}, expected {AVVP_SEGMENTS[side]}")
    names = [row["filename"] for row in rows]
    split = np.full(len(rows), -1)
    for i, part in ((0, "val"), (2, "test")):
        known = {row["filename"] for row in read_table((llp or lists) / f"AVVP_{part}_pd.csv", "\t", ("filename",))}
        split[[name in known for name in names]] = i
    odd = {"in neither the LLP validation nor the test list": [n for n, s in zip(names, split) if s < 0],
           "listed twice": [n for n, times in Counter(names).items() if times > 1],
           "with an event that lasts no segment": empty}
    notes = [f"{side}: {len(set(n))} clips {why}: {' '.join(sorted(set(n)))}" for why, n in odd.items() if n]
    keep = np.arange(len(rows))
    if options.faithful:
        split[split < 0] = 0
    else:
        drop = set(odd["in neither the LLP validation nor the test list"]) | set(odd["listed twice"])
        drop |= {name for name, on in zip(names, events) if not on.any()}
        keep = np.array([i for i, name in enumerate(names) if name not in drop])
        notes += [f"{side}: {len(rows) - len(keep)} of {len(rows)} rows left out; --faithful keeps them"]
    listing = Listing(f"{prefix.lower().replace('_', '-')}-{side}", "LLP", names, classes, {
        m: (AUDIO if m == "audio" else VIDEO, archives(features / m / "zip", [name[:11] for name in names]))},
        split, None, {m: events}, notes=notes)
    return listing[keep]


def list_ave_avvp(lists: Path, ave_lists: Path, ave: Path, subset: bool) -> Listing:
    """The source of AVE to AVVP: clips of the 12 AVE classes that AVVP has, renamed, in AVE's splits."""
    every = list_ave(ave_lists, ave, subset)
    labels = read_array(lists / "ave_avvp_labels.h5", "avadataset")
    order = read_order(lists / "ave_avvp_order.h5", len(labels), 1831, subset)
    classes = read_lines(lists / "AVE_AVVP_Categories.txt")
    used = labels[order]
    if used.shape[1:] != (T, len(classes) + 1) or not (used.sum(-1) == 1).all():
        raise InputError(f"{lists / 'ave_avvp_labels.h5'}: not one of {len(classes) + 1} columns in every segment")
    row = {source[2]: i for i, source in enumerate(every.sources["audio"][1])}  # AVE row -> place in `every`
    listing, events = every[np.array([row[i] for i in order])], used[..., :-1] > 0
    return replace(listing, name="ave-avvp-ave", classes=classes, events={"audio": events, "video": events},
                   label=np.where(events.any((1, 2)), events.any(1).argmax(-1), -1))


def ucf_splits(ids: list) -> np.ndarray:
    """By the group in v_Class_gNN_cNN, as in UCF-101's first split: g01 to g07 are test; g08 and g09 are val here."""
    found = [re.search(r"_g(\d+)_c\d+$", name) for name in ids]
    if None in found:
        raise InputError(f"{ids[found.index(None)]}: no UCF-101 name, expected v_Class_gNN_cNN")
    group = np.array([int(m[1]) for m in found])
    return np.where(group <= 7, 2, np.where(group <= 9, 1, 0)).astype(np.uint8)


def list_ucf51(lists: Path, features: Path, subset: bool) -> Listing:
    path = lists / "ucf51checked.csv"
    rows, classes = read_table(path, ",", ("category", "video_id")), read_lines(lists / "UCF51Categories.txt")
    expect(path, len(rows), 6831, subset)
    expect(lists / "UCF51Categories.txt", len(classes), 51, subset, "classes")
    ids = [row["video_id"] for row in rows]
    sources = {m: (shape, archives(features / m / "zip", ids)) for m, shape in (("audio", AUDIO), ("video", VIDEO))}
    return Listing("ucf51", "UCF-101", ids, classes, sources, ucf_splits(ids),
                   np.array([number(classes, row["category"], path) for row in rows]))


def list_ucf_vgg(lists: Path, ucf: Path, vgg: Path, options: Options) -> dict:
    """{`ucf`: videos, `vgg`: sounds} of UCF(v) <-> VGG(a), under one list of classes: VGGSound's names. Line k of one
    category file is line k of the other; two classes have clips on one side only."""
    names = [read_lines(lists / f"{name}.txt") for name in ("UCF101sameVGGSound", "VGGSoundsameUCF101")]
    if len(names[0]) != len(names[1]):
        raise InputError(f"{lists}: the two category files have {len(names[0])} and {len(names[1])} lines")
    listings = {}
    for side, own, name, size, folder, m in (("ucf", 0, "ucf2vggsound", 2003, ucf, "video"),
                                             ("vgg", 1, "vggsound2ucf", 4813, vgg, "audio")):
        path = lists / f"{name}.csv"
        rows = read_table(path, ",", ("category", "video_id"))
        expect(path, len(rows), size, options.subset)
        ids = [row["video_id"] for row in rows]
        sources = {m: (VIDEO if m == "video" else AUDIO, archives(folder / m / "zip", ids))}
        split = ucf_splits(ids) if side == "ucf" else in_splits(rows, path)
        label = np.array([number(names[own], row["category"], path) for row in rows])
        origin = "UCF-101" if side == "ucf" else "VGGSound"
        listings[side] = Listing(f"ucf-vgg-{side}", origin, ids, names[1], sources, split, label)
    shared = [i for i in range(len(names[1])) if all((listing.label == i).any() for listing in listings.values())]
    for side, listing in listings.items() if not options.faithful else ():
        keep = np.flatnonzero(np.isin(listing.label, shared))
        note = f"{len(listing.ids) - len(keep)} clips of classes without a clip on the other side are left out; " \
               "--faithful keeps them"
        listings[side] = replace(listing[keep], classes=[names[1][i] for i in shared], notes=[note],
                                 label=np.searchsorted(shared, listing.label[keep]))
    return listings


# -------------------------------------------------------------------------------------------- the authors' files: text
@dataclass
class Text:
    bert: Optional[str] = None  # folder or name of a Hugging Face BERT, for text (needs the package transformers)
    # word pieces as they are; or as published, whole words (Uni-Code, MICU) or pieces (CoDAAR) of the word filter
    pipeline: Literal["plain", "word", "piece"] = "plain"
    word_filter: Optional[str] = None  # cnt.pkl for `word`, cnt_new.pkl for `piece`


def kept_vectors(pieces: list, vectors: np.ndarray, vocabulary: dict, pipeline: str, admitted: set) -> np.ndarray:
    """Token vectors of one sentence as a (T, 768) float32 array: the first T that are kept, then zeros.

    pieces: P word pieces without special tokens; vectors (P, 768); vocabulary {piece: id}. `plain` keeps every piece,
    `piece` (CoDAAR) those whose id is admitted. `word` (Uni-Code, MICU) averages the pieces of a word and looks the
    word up whole: one that was split is not found. Id 0 is never admitted."""
    words = [[piece, [i]] for i, piece in enumerate(pieces)]
    if pipeline == "word":
        words = []
        for i, piece in enumerate(pieces):
            if piece.startswith("##") and words:
                words[-1][0] += piece[2:]
                words[-1][1].append(i)
            else:
                words.append([piece, [i]])
        words = [(word, rows) for word, rows in words if len(rows) == 1]
    if pipeline != "plain":
        words = [(word, rows) for word, rows in words if vocabulary.get(word, 0) in admitted - {0}]
    out = np.zeros(TEXT, np.float32)
    for i, (_, rows) in enumerate(words[:T]):
        out[i] = vectors[rows[0]]
    return out


def read_filter(path: Optional[str], pipeline: str) -> set:
    """The token ids in cnt.pkl or cnt_new.pkl"""
    if pipeline == "plain" and path is None:
        return set()
    if pipeline == "plain" or path is None:
        raise InputError("--pipeline word and piece take a --word-filter (cnt.pkl, cnt_new.pkl), plain takes none")
    try:
        found = unpickle(Path(path).read_bytes(), path, table=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})")
    if not isinstance(found, dict) or not all(type(key) is int for key in found):
        raise InputError(f"{path}: expected a dict of token ids")
    expected = {"word": 1046, "piece": 1435}[pipeline]
    if len(found) != expected:
        raise InputError(f"{path}: {len(found)} token ids, expected {expected} for --pipeline {pipeline}")
    return set(found)


def embed(sentences: list, bert: Optional[str], pipeline: str, word_filter: Optional[str]) -> np.ndarray:
    """Sentences -> (S, T, 768) float32, with the Hugging Face BERT in the folder (or of the name) `bert`."""
    admitted = read_filter(word_filter, pipeline)
    if bert is None:
        raise InputError("text needs --bert, a folder or name of a Hugging Face BERT")
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError:
        raise InputError("text needs the package transformers: pip install transformers")
    try:
        tokenizer, model = AutoTokenizer.from_pretrained(bert), AutoModel.from_pretrained(bert).eval()
    except Exception as error:  # a folder, a name, a network: whatever fails, the user needs one line
        raise InputError(f"--bert {bert}: cannot be loaded ({first_line(error)})")
    if model.config.hidden_size != TEXT[1]:
        raise InputError(f"--bert {bert}: vectors of {model.config.hidden_size} numbers, expected {TEXT[1]}")
    vocabulary, rows = tokenizer.get_vocab(), []
    for sentence in tqdm(sentences, "sentences", leave=False, disable=not sys.stderr.isatty()):
        most = 25 if pipeline == "word" else 512  # pieces, with the special ones at both ends
        ids = tokenizer(sentence, truncation=True, max_length=most)["input_ids"]
        with torch.no_grad():
            vectors = model(input_ids=torch.tensor([ids])).last_hidden_state[0, 1:-1].float().numpy()
        pieces = tokenizer.convert_ids_to_tokens(ids)[1:-1]
        rows.append(kept_vectors(pieces, vectors, vocabulary, pipeline, admitted))
    return np.stack(rows)


def prompts(path: Path, classes: list, expected: int, subset: bool) -> list:
    """The prompt of each class"""
    rows = {row["label"]: row["prompt"] for row in read_table(path, ",", ("label", "prompt"))}
    expect(path, len(rows), expected, subset)
    for name in classes:
        if name not in rows:
            raise InputError(f"{path}: no prompt for class '{name}'")
    return [rows[name] for name in classes]


def with_text(listing: Listing, modalities: tuple, sentences: list, which, text) -> Listing:
    """Only these modalities, among them text: of clip i the sentence number which[i]."""
    if "text" in modalities:
        vectors = embed(sentences, text.bert, text.pipeline, text.word_filter)
        listing.sources["text"] = (TEXT, [vectors[i] for i in which])
    for m in modalities:
        if m not in listing.sources:
            raise InputError(f"--modalities {m}: these files hold {' '.join(listing.sources)}")
    return replace(listing, sources={m: listing.sources[m] for m in modalities})


def read_masks(source: list, shape: tuple) -> np.ndarray:
    """[value, path of a picture or None, ..] -> (T, h, w) uint8: `value` where the picture is not black, 255 in frames
    that nobody annotated; fewer pictures than T are repeated."""
    try:
        from PIL import Image
    except ImportError:
        raise InputError("masks are PNG pictures: pip install pillow")
    value, *paths = source
    frames = np.full((len(paths), *shape[1:]), NOT_ANNOTATED, np.uint8)
    for frame, path in zip(frames, paths):
        if path:
            try:
                pixels = np.asarray(Image.open(path).convert("L"))
            except Exception as error:  # pictures may be damaged in any way
                raise InputError(f"{path}: not a readable picture ({first_line(error)})")
            if pixels.shape != shape[1:]:
                raise InputError(f"{path}: {pixels.shape} pixels, expected {shape[1:]}")
            frame[:] = (pixels > 0) * value
    return fit(frames, shape, "twice")[0]


def list_avs(lists: Path, features: Path, s4: Path, maps: Optional[Path], subset: bool) -> Listing:
    """AVSBench-S4: 5 seconds, each taken twice to make T = 10. Of training clips only the first frame has a mask."""
    path = s4 / "s4_meta_data.csv"
    rows = read_table(path, ",", ("split",))
    name, _, category = list(rows[0])[:3]
    counts = Counter(row["split"] for row in rows)
    expect(path, tuple(counts[split] for split in SPLITS), (3452, 740, 740), subset)
    classes = [row["label"] for row in read_table(lists / "AVSBenchCategories2Prompts.csv", ",", ("label", "prompt"))]
    place = [f"{row['split']}/{row[category]}" for row in rows]
    ids = [row[name] for row in rows]
    zips = [features / "audio" / p.replace("/", "/zip/") for p in place]
    sources = {"audio": (AUDIO, [archives(folder, [i])[0] for folder, i in zip(zips, ids)])}
    if maps:
        sources["video"] = VIDEO, [archives(maps / p, [i])[0] for p, i in zip(place, ids)]
    label, masks = np.array([number(classes, row[category], path) for row in rows]), []
    for p, i, value in zip(place, ids, label + 1):
        frames = [str(s4 / "gt_masks" / p / i / f"{i}_{frame}.png") for frame in range(1, 6)]
        masks.append([int(value), *(frame if k == 0 or not p.startswith("train") else None
                                    for k, frame in enumerate(frames))])
    return Listing("avs-s4", "AVSBench", ids, classes, sources, in_splits(rows, path), label,
                   mask=((T, 224, 224), masks), rows="twice")


# -------------------------------------------------------------------------------------------------------- command line
Root = tyro.conf.Positional[Path]  # a folder with the folders `data` (lists) and `feature` (archives), as distributed


def side_path(out: str, side: str) -> str:
    """avvp.h5 -> avvp-audio.h5"""
    path = Path(out)
    return str(path.with_name(f"{path.stem}-{side}{path.suffix or '.h5'}"))


def convert_vggsound(root: Root, out: str, which: Literal["24k", "40k", "81k", "90k"] = "40k",
                     modalities: tuple[str, ...] = ("audio", "video"), keep_splits: bool = False,
                     options: Options = Options(), text: Text = Text()) -> None:
    """VGGSound-AVEL, for pretraining. ROOT holds data/ (lists) and feature/{audio,video}/zip/.

    Args:
        which: list: 24k is the train split of 40k; 90k is CoDAAR's; 81k has no labels.
        modalities: what is converted; text is the prompt of the clip's class and needs --bert.
        keep_splits: keep the list's splits; without, all clips are `train`, as in the papers."""
    listing = list_vggsound(root / "data", root / "feature", which, keep_splits, options.subset)
    sentences = []
    if "text" in modalities:
        if listing.label is None:
            raise InputError("--which 81k has no labels, and so no prompts: leave text out")
        sentences = prompts(root / "data/vggsoundCategories2Prompts.csv", listing.classes, 141, options.subset)
    write_clips(with_text(listing, modalities, sentences, listing.label, text), out, options)


def convert_ave(root: Root, out: str, options: Options = Options()) -> None:
    """AVE. ROOT holds Annotations.txt, {visual,audio}_feature.h5, {train,val,test}_order.h5 and, checked if there,
    labels.h5."""
    write_clips(list_ave(root, root, options.subset), out, options)


def convert_avvp(root: Root, out: str, options: Options = Options()) -> None:
    """AVVP (LLP): two files, OUT-audio and OUT-visual, each with its modality and its annotation. ROOT holds data/ and
    feature/{audio,video}/zip/."""
    for side in ("audio", "visual"):
        write_clips(list_avvp(root / "data", root / "feature", side, options), side_path(out, side), options)


def convert_ave_avvp(root: Root, out: str, ave: Path, avvp: Path, options: Options = Options()) -> None:
    """AVE -> AVVP: the source OUT-ave, the targets OUT-audio and OUT-visual. ROOT holds the AVE_AVVP lists.

    Args:
        ave: the folder of `convert ave`.
        avvp: the folder of `convert avvp`."""
    write_clips(list_ave_avvp(root, ave, ave, options.subset), side_path(out, "ave"), options)
    for side in ("audio", "visual"):
        write_clips(list_avvp(root, avvp / "feature", side, options, "AVE_AVVP", avvp / "data"), side_path(out, side),
                    options)


def convert_ucf51(root: Root, out: str, lists: Path, options: Options = Options()) -> None:
    """UCF-51, the UCF-101 classes with sound (open set). ROOT holds feature/{audio,video}/zip/ (UCF101ALL).

    Args:
        lists: folder with ucf51checked.csv and UCF51Categories.txt (UCF_OSCMG)."""
    write_clips(list_ucf51(lists, root / "feature", options.subset), out, options)


def convert_ucf_vgg(root: Root, out: str, vggsound: Path, options: Options = Options()) -> None:
    """UCF(v) <-> VGG(a): OUT-ucf with videos, OUT-vgg with sounds. ROOT holds data/ and feature/video/zip/ (UCF101).

    Args:
        vggsound: the folder of `convert vggsound`."""
    for side, listing in list_ucf_vgg(root / "data", root / "feature", vggsound / "feature", options).items():
        write_clips(listing, side_path(out, side), options)


def convert_mscoco(root: Root, out: str, options: Options = Options(), text: Text = Text()) -> None:
    """MSCOCO, pictures and captions for retrieval. ROOT holds val_part_1.json and feature/zip/. Every clip is `test`; T
    rows are taken evenly from the variable number of a clip."""
    path = root / "val_part_1.json"
    try:
        pairs = json.loads(path.read_text())["annotations"]
        ids, captions = zip(*[(f"{int(p['image_id']):012d}", str(p["caption"])) for p in pairs])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a readable list ({type(error).__name__}: {first_line(error)})")
    listing = Listing("mscoco", "MSCOCO", list(ids), [], {"video": (VIDEO, archives(root / "feature/zip", ids))},
                      np.full(len(ids), 2, np.uint8), rows="even")
    write_clips(with_text(listing, ("video", "text"), captions, range(len(ids)), text), out, options)


def convert_clotho(root: Root, captions: Path, out: str, options: Options = Options(), text: Text = Text()) -> None:
    """Clotho v2.1, sounds with five captions each for retrieval. ROOT holds feature/zip/. A row is a caption with its
    sound, `group` the sound. Every clip is `test`; T rows are taken evenly from the seconds of a sound.

    Args:
        captions: CSV with file_name and caption_1 to caption_5."""
    columns = [f"caption_{i}" for i in range(1, 6)]
    rows = read_table(captions, ",", ("file_name", *columns))
    ids, group = [row["file_name"][:-4] for row in rows for _ in columns], np.arange(5 * len(rows)) // 5
    sentences = [row[column] for row in rows for column in columns]
    listing = Listing("clotho", "Clotho", ids, [], {"audio": (AUDIO, archives(root / "feature/zip", ids))},
                      np.full(len(ids), 2, np.uint8), group=group, rows="even")
    listing.ids = [f"{name}-{i % 5 + 1}" for i, name in enumerate(ids)]
    write_clips(with_text(listing, ("audio", "text"), sentences, range(len(ids)), text), out, options)


def convert_avs(root: Root, out: str, s4: Path, maps: Optional[Path] = None, options: Options = Options(),
                text: Text = Text()) -> None:
    """AVSBench-S4, for segmentation. ROOT holds data/ (prompts) and feature/audio/SPLIT/zip/CATEGORY/. Each of the 5
    seconds is taken twice.

    Args:
        s4: folder with s4_meta_data.csv and gt_masks/.
        maps: feature maps (5, 7, 7, 512) of the frames as SPLIT/CATEGORY/NAME.zip, which nobody distributes; without
            them the file has no video, and segmentation cannot be probed."""
    listing = list_avs(root / "data", root / "feature", s4, maps, options.subset)
    sentences = prompts(root / "data/AVSBenchCategories2Prompts.csv", listing.classes, 23, options.subset)
    write_clips(with_text(listing, (*listing.sources, "text"), sentences, listing.label, text), out, options)


def check(file: tyro.conf.Positional[str]) -> None:
    """Validate FILE, reading every value, and print what is inside."""
    features = Features([file])
    h5 = features.files[0].h5
    print(f"{file}: {FORMAT} {VERSION}, name {features.name}, {len(features)} clips, {len(features.classes)} classes")
    for name in features.modalities:
        for clip in tqdm(range(len(features)), name, leave=False, disable=not sys.stderr.isatty()):
            if not np.isfinite(features.read(name, np.array([clip]))).all():
                raise InputError(f"{file}: dataset '{name}' has NaN or infinity in clip {clip}, expected finite values")
    limits = {f"events/{name}": 1 for name in h5.get("events", {})}
    limits |= {"mask": len(features.classes)} if "mask" in h5 else {}
    for name in limits:
        for clip in range(len(features)):
            values = h5[name][clip]
            values = np.where(values == NOT_ANNOTATED, 0, values) if name == "mask" else values
            if values.min() < 0 or values.max() > limits[name]:
                raise InputError(f"{file}: dataset '{name}' holds {values.max()} in clip {clip}, not 0..{limits[name]}")
    names = []
    h5.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    for name in names:
        print(f"  {name:16} {str(h5[name].shape):26} {h5[name].dtype}")
    print("  " + ", ".join(f"{s} {len(features.clips(s))}" for s in SPLITS)
          + f"; one event at most in {len(features.single_event(np.arange(len(features))))} clips")


def digits(out: str, train: int = 2400, val: int = 400, test: int = 800, seed: int = 0) -> None:
    """Compose the embedded digits set into the file OUT."""
    if min(train, val, test) < 1 or seed < 0:
        raise InputError("--train, --val and --test must be at least 1, --seed not negative")
    if not Path(out).resolve().parent.is_dir():
        raise InputError(f"--out {out}: its folder does not exist")
    write_digits(out, (train, val, test), seed)
    check(out)


if __name__ == "__main__":
    sys.excepthook = explain_input_errors
    sets = {name.removeprefix("convert_").replace("_", "-"): function for name, function in list(globals().items())
            if name.startswith("convert_")}
    if sys.argv[1:2] == ["convert"]:
        tyro.extras.subcommand_cli_from_dict(sets, prog="data.py convert", args=sys.argv[2:],
                                             config=(tyro.conf.OmitArgPrefixes,))
    else:
        tyro.extras.subcommand_cli_from_dict(
            {"check": check, "digits": digits}, description=f"Also: python data.py convert SET, with SET one of "
            f"{', '.join(sets)}; --help after it says more.")

"""Features of clips in HDF5 (schema `cmg-features`, version 1), batches of them, and the embedded digits set.

    python data.py check FILE                     validate a file completely and print what is inside
    python data.py compose digits --out FILE      clips of spoken digits, handwritten digits and sentences

A file holds N clips of T segments. Each modality is a dataset (N, T, d) or (N, T, H, W, d) named after it; `split` (N,)
is 0 train, 1 val, 2 test; `id` (N,), `classes` (C,), and optionally `label` (N,), `events/<modality>` (N, T, C),
`mask` (N, T, h, w) and `group` (N,). This module knows nothing of the methods. Files from the authors' archives:
`python -m official.convert`.
"""
import hashlib
import os
import queue
import sys
import tempfile
import threading
from pathlib import Path
from typing import Iterator, Literal

import h5py
import numpy as np
import torch
import tyro
from tqdm import tqdm

from run import WORLD_SIZE, RANK, InputError, explain_input_errors, first_line, all_gather_object, local_rows

FORMAT, VERSION = "cmg-features", 1
SPLITS = ("train", "val", "test")
MODALITY_ORDER = ("audio", "video", "text", "flow")  # others follow as the file lists them
NOT_MODALITIES = ("label", "events", "mask", "group", "split", "id", "classes")
NOT_ANNOTATED = 255  # fills the frames of `mask` that nobody drew
DIGITS_FILE = Path(__file__).parent / "datasets" / "digits.h5"


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
        if batch_size % WORLD_SIZE:
            raise InputError(f"--batch-size {batch_size} does not divide among {WORLD_SIZE} processes")
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
        rows = [local_rows(order[i * self.batch_size:(i + 1) * self.batch_size]) for i in range(start, len(self))]
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
        all_gather_object(None)  # the first process composes
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_digits(str(path))
        except OSError as error:
            raise InputError(f"--runs-dir {runs_dir}: cannot be written ({error.strerror})")
    if not RANK:
        all_gather_object(None)
    return [str(path)]


# --------------------------------------------------------------------------------------------------------- command line
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
    if sys.argv[1:2] == ["compose"]:
        tyro.extras.subcommand_cli_from_dict({"digits": digits}, prog="data.py compose", args=sys.argv[2:])
    else:
        tyro.extras.subcommand_cli_from_dict(
            {"check": check}, description="Also: python data.py compose digits --out FILE; --help after it says more.")

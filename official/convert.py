"""From the authors' archives and lists to `cmg-features` files.

    python -m official.convert SET ROOT --out FILE        SET is vggsound, ave, ave-original, avvp, ave-avvp, ucf51,
                                                          ucf-vgg, mscoco, clotho or avs, or npy-folder for arrays of
                                                          your own; `SET --help` says what ROOT holds
"""
import csv
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, Optional

import h5py
import numpy as np
import torch
import tyro
from tqdm import tqdm

from data import FORMAT, NOT_ANNOTATED, NOT_MODALITIES, SPLITS, VERSION, FeatureFile
from official.safe_pickle import read_archive, unpickle
from run import InputError, explain_input_errors, first_line, write_atomically

T = 10  # segments of a clip


# ------------------------------------------------------------------------------------------------------------- writing
Rows = Literal["first", "even", "twice", "exact"]


def fit(array: np.ndarray, shape: tuple, rows: Rows = "first"):
    """(array (L, ...) brought to `shape` (T, ...); `padded`, `cut` or None). `first`: fewer rows than T repeat the last
    one, more than T lose their end; `twice`: the same for T / 2 rows, each taken twice; `even`: T rows evenly spaced;
    `exact`: T rows it must be. Raises InputError if it cannot fit."""
    if array.ndim != len(shape) or array.shape[1:] != shape[1:] or len(array) == 0 or array.dtype.kind not in "fiu":
        raise InputError(f"holds {array.dtype} of shape {array.shape}, expected {('L', *shape[1:])}")
    length, segments, number = len(array), shape[0], np.arange(shape[0])
    if rows == "exact" and length != segments:
        raise InputError(f"has {length} segments, others have {segments}; --segments {segments} pads and cuts")
    wanted = segments // 2 if rows == "twice" else segments
    taken = number * length // segments if rows == "even" else np.minimum(number * wanted // segments, length - 1)
    return array[taken], "padded" if length < wanted else "cut" if length > wanted else None


def usable_cores() -> int:
    """Those that this process may run on, where the system tells them from all there are"""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass
class Options:
    faithful: bool = False  # lists and archives as they are: rows listed twice, misspelt ids, classes of one side only
    subset: bool = False  # accept lists with other numbers of rows than the authors': a part of them, or your own
    on_error: Literal["stop", "skip"] = "stop"  # at an archive that is missing, damaged or refused
    dtype: Literal["float16", "float32"] = "float16"  # of the features
    workers: int = field(default_factory=usable_cores)  # processes that read archives


@dataclass
class Listing:
    """The clips of one file, in order. `sources` {modality: (shape, [one a clip])}: a source is the path of an archive
    or of a .npy file, (path, dataset, row) of an HDF5 file, or an array. `notes` are told to the user."""
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
    rows: Rows = "first"  # as `fit` has it
    notes: list = field(default_factory=list)
    license: str = "see the authors' release"

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
        if place:
            array = opened(path)[place[0]][place[1]]
        else:
            array = read_npy(path) if path.endswith(".npy") else read_archive(path, faithful)
        return fit(array, shape, rows)
    except Exception as error:  # damaged files raise anything
        raise InputError(first_line(error) if str(error).startswith(path) else f"{path}: {first_line(error)}")


@lru_cache
def opened(path: str) -> h5py.File:
    return h5py.File(path, "r")


def read_npy(path: str) -> np.ndarray:
    """The array in a .npy file, mapped: a header that promises more than the file holds is refused, not allocated."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file")
    except Exception as error:  # a damaged header can raise anything
        raise InputError(f"{path}: not a readable .npy file ({first_line(error)})")


def end_with(parent: int) -> None:
    """End this process when its parent is gone, killed: nobody else would."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


DONE = 1  # in the progress file's 64 bits of a clip; then two for each dataset, padded and cut


def start_worker(*state):
    """In each process: (partial file, progress file, {dataset: (dtype, shape, offset, sources)}, rows, faithful)"""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    global job
    binary = getattr(os, "O_BINARY", 0)  # Windows changes line ends without it
    job = [os.open(path, os.O_RDWR | binary) for path in state[:2]] + list(state[2:])


def put(file: int, content, offset: int) -> None:
    """Write all of it, or raise OSError: a full disk takes a part without a word."""
    os.lseek(file, offset, os.SEEK_SET)
    if os.write(file, content) != len(content):
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
    put(progress, np.uint64(done).tobytes(), 8 * row)
    return row, None


def datasets_of(listing: Listing, dtype: np.dtype) -> dict:
    """What is copied clip by clip, features and masks: {dataset: (dtype, shape of a clip, sources)}"""
    datasets = {}
    for modality, (shape, sources) in listing.sources.items():
        datasets[modality] = dtype, shape, sources
    if listing.mask:
        shape, sources = listing.mask
        datasets["mask"] = np.dtype(np.uint8), shape, sources
    return datasets


def create(path: str, listing: Listing, dtype: np.dtype) -> None:
    """Write an HDF5 file that holds everything but the features and masks, for which it only reserves the place."""
    text = h5py.string_dtype()
    with h5py.File(path, "w") as h5:
        h5.attrs.update(format=FORMAT, version=VERSION, name=listing.name, license=listing.license,
                        source=listing.origin)
        h5["id"] = np.array(listing.ids, text)
        h5["split"] = listing.split.astype(np.uint8)
        h5["classes"] = np.array(listing.classes, text)
        for name, values in {"label": listing.label, "group": listing.group}.items():
            if values is not None:
                h5[name] = values.astype(np.int64)
        for modality, events in listing.events.items():
            h5[f"events/{modality}"] = events.astype(np.uint8)
        early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        early.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        for name, (kind, shape, _) in datasets_of(listing, dtype).items():
            h5.create_dataset(name, (len(listing.ids), *shape), kind, dcpl=early)


def check_output(listing: Listing, out: str, workers: int) -> None:
    """Raise InputError if there is nothing to write, nobody to write it, or no place for the file."""
    if not listing.ids:
        raise InputError(f"{out}: the list is empty")
    unprintable = [name for name in (*listing.ids, *listing.classes) if not name.isprintable()]
    if unprintable:
        raise InputError(f"{out}: {unprintable[0]!r} cannot be the id of a clip or the name of a class")
    if workers < 1:
        raise InputError(f"--workers {workers}: at least one")
    path = Path(out)
    if not path.name or path.is_dir() or not path.resolve().parent.is_dir():
        raise InputError(f"--out '{out}': not a file in a folder that exists")


def fingerprint(listing: Listing, options: Options) -> str:
    """Eight characters that change with the list, with what the options make of it, and with the HDF5 files read."""
    files = set()
    for _, _, sources in datasets_of(listing, np.dtype(options.dtype)).values():
        for source in sources:
            if isinstance(source, tuple) and os.path.exists(source[0]):
                files.add(source[0])
    dates = []
    for path in sorted(files):
        found = os.stat(path)
        dates.append((path, found.st_size, found.st_mtime_ns))

    def plain(value):
        if isinstance(value, np.ndarray):
            return [value.shape, hashlib.sha256(np.ascontiguousarray(value)).hexdigest()]
        return str(value)
    settings = asdict(options) | {"workers": 0, "on_error": ""}
    text = json.dumps([settings, asdict(replace(listing, notes=[])), dates], default=plain)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def require_space(out: str, size: float) -> None:
    """Raise InputError if `size` bytes are more than the disk of `out` has free."""
    free = shutil.disk_usage(Path(out).resolve().parent).free
    if size > free:
        raise InputError(f"{out}: needs {size / 1e9:.1f} GB of disk, {free / 1e9:.1f} are free")


def start_or_continue(listing: Listing, out: str, partial: str, dtype: np.dtype, size: int) -> np.ndarray:
    """The partial file and its progress file, made unless an earlier call left them. Returns the progress of each clip,
    (N,) uint64. Raises InputError if `size` bytes are more than the disk has free."""
    rows, progress = len(listing.ids), f"{partial}.done"
    if os.path.exists(partial) and os.path.exists(progress) and os.path.getsize(progress) == 8 * rows:
        done = np.fromfile(progress, np.uint64)
        print(f"{out}: going on after {(done > 0).sum()} of {rows} clips")
        return done
    require_space(out, size)
    for old in (*Path(out).resolve().parent.glob(f"{Path(out).name}.partial-*"), Path(f"{out}.skipped.txt")):
        old.unlink(missing_ok=True)
    create(partial, listing, dtype)
    done = np.zeros(rows, np.uint64)
    write_atomically(Path(progress), done.tofile)
    return done


def copy_clips(todo: list, state: tuple, out: str, options: Options) -> dict:
    """Copy the clips `todo` with several processes -> {row: why it was skipped}. `state` is what `start_worker` takes.
    Raises InputError at the first bad archive unless they are to be skipped."""
    errors = {}
    with ProcessPoolExecutor(options.workers, initializer=start_worker, initargs=state) as pool:
        try:
            bar = tqdm(pool.map(copy_clip, todo, chunksize=4), Path(out).name, len(todo), unit=" clips",
                       disable=not sys.stderr.isatty(), dynamic_ncols=True)
            for row, error in bar:
                if error and options.on_error == "stop":
                    raise InputError(f"{error}; --on-error skip leaves such clips out, a second call goes on from here")
                if error:
                    errors[row] = error
        except BrokenProcessPool:
            raise InputError(f"{out}: a process was ended from outside, by lack of memory perhaps; a second call goes "
                             "on from here")
        except OSError as error:
            pool.shutdown(cancel_futures=True)
            raise InputError(f"{out}: cannot be written ({first_line(error)}); a second call goes on from here")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return errors


def tell_lengths(datasets: dict, done: np.ndarray) -> None:
    """Print how many clips of each dataset were padded and cut, as the bits of the progress file (N,) say."""
    for i, (name, (_, shape, _)) in enumerate(datasets.items()):
        for bit, happened in enumerate(("padded", "cut")):
            times = (done >> np.uint64(2 * i + 1 + bit) & np.uint64(1)).sum()
            if times:
                print(f"  {name} {happened} to {shape[0]} segments: {times} clips")


def write_clips(listing: Listing, out: str, options: Options) -> None:
    """Convert the clips of a listing into the file `out`, with several processes. Killed at any point, a second call
    goes on where it was and ends in the same file. Raises InputError at the first bad archive, or skips it."""
    check_output(listing, out, options.workers)
    dtype = np.dtype(options.dtype)
    datasets = datasets_of(listing, dtype)
    size = len(listing.ids) * sum(kind.itemsize * int(np.prod(shape)) for kind, shape, _ in datasets.values())
    partial = f"{out}.partial-{fingerprint(listing, options)}"
    progress = f"{partial}.done"
    report = Path(f"{out}.skipped.txt")

    done = start_or_continue(listing, out, partial, dtype, size)
    shapes = ", ".join(f"{name} {shape}" for name, (_, shape, _) in datasets.items())
    print(f"{out}: {len(listing.ids)} clips, {size / 1e9:.2f} GB; {shapes}")
    for note in listing.notes:
        print(f"  {note}")
    places = {}
    with h5py.File(partial, "r") as h5:
        for name, (kind, shape, sources) in datasets.items():
            places[name] = kind, shape, h5[name].id.get_offset(), sources
    state = partial, progress, places, listing.rows, options.faithful
    errors = copy_clips(np.flatnonzero(done == 0).tolist(), state, out, options)

    tell_lengths(datasets, np.fromfile(progress, np.uint64))
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
    Path(smaller).unlink(missing_ok=True)  # what a kill left
    require_space(out, os.path.getsize(path) * len(keep) / len(listing.ids))
    create(smaller, listing[keep], dtype)
    with h5py.File(path, "r") as old, h5py.File(smaller, "r+") as new:
        for name in datasets_of(listing, dtype):
            for i in range(0, len(keep), 100):
                new[name][i:i + 100] = old[name][keep[i:i + 100]]
    os.replace(smaller, out)


# ---------------------------------------------------------------------------------------------------------------- lists
def read_table(path: Path, delimiter: str, columns: tuple, names: tuple = None) -> list:
    """Rows of a CSV file as dicts of stripped strings; `names` of its columns if it may lack a header. Raises
    InputError naming a missing file or column."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            rows = [{k: (v or "").strip() for k, v in row.items() if k} for row in csv.DictReader(
                stream, names, delimiter=delimiter, quoting=csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL)]
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: not a readable list ({first_line(error)})")
    if any(len(text.splitlines()) > 1 for row in rows for pair in row.items() for text in pair):
        raise InputError(f"{path}: not a readable list (a line ends inside a field: is a quotation mark open?)")
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


def archives(folder: Path, ids: list, ending: str = ".zip") -> list:
    """The archive of each clip. Ids come from a list file: those that would lead out of the folder are refused."""
    for name in ids:
        if "/" in name or "\\" in name or name in ("", ".", ".."):
            raise InputError(f"{folder}: '{name}' is no clip id")
    return [str(folder / f"{name}{ending}") for name in ids]


def in_splits(rows: list, path) -> np.ndarray:
    for row in rows:
        if row.get("split") not in SPLITS:
            raise InputError(f"{path}: split '{row.get('split')}', expected {' '.join(SPLITS)}")
    return np.array([SPLITS.index(row["split"]) for row in rows], np.uint8)


def whole(text: str, path) -> int:
    """A number of seconds in a list"""
    if not re.fullmatch(r"-?\d{1,9}", text.strip()):
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


MOST_NUMBERS = 1 << 24  # in a list file; the largest one that exists has 1.2 million


def read_array(path: Path, key: str) -> np.ndarray:
    """The numbers in a dataset of a list file"""
    try:
        with h5py.File(path, "r") as h5:
            data = h5[key]
            if data.size > MOST_NUMBERS or data.dtype.kind not in "biuf":
                raise InputError(f"{path}: '{key}' holds {data.dtype} of shape {data.shape}, expected fewer numbers")
            return np.asarray(data[()])
    except InputError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise InputError(f"{path}: no readable dataset '{key}' ({first_line(error)})")


def require_rows(path: Path, annotations: int, shape: tuple) -> None:
    """Raise InputError unless the AVE features in `path` are (annotations, *shape) and were really written. 46 of the
    4,143 annotations share a video with another one, so features made video by video have 4,097 rows: from the first
    such video on, every row would belong to another clip."""
    try:
        with h5py.File(path, "r") as h5:
            data = h5["avadataset"]
            found, dtype, stored = data.shape, data.dtype, data.id.get_storage_size()
    except Exception as error:  # a damaged file can raise anything
        raise InputError(f"{path}: no readable dataset 'avadataset' ({first_line(error)})")
    if found[:1] != (annotations,) and found[1:] == shape:
        raise InputError(f"{path}: {found[0]} rows for {annotations} annotations; a row is an annotation, not a video "
                         "(AVE has 4143 of 4097 videos): extract them in the order of Annotations.txt")
    if found != (annotations, *shape) or dtype.kind != "f":
        raise InputError(f"{path}: holds {dtype} of shape {found}, expected numbers of shape {(annotations, *shape)}")
    if not stored:
        raise InputError(f"{path}: 'avadataset' has no values of its own, it was never written or names other files")


def require_ave_features(root: Path, subset: bool) -> None:
    """Check both feature files of AVE against the annotations, before a clip is copied."""
    rows = len(read_annotations(root / "Annotations.txt", subset))
    require_rows(root / "audio_feature.h5", rows, AUDIO)
    require_rows(root / "visual_feature.h5", rows, VIDEO)


def read_annotations(path: Path, subset: bool) -> list:
    """Rows of AVE's Annotations.txt, which has a header in the archive of the videos and none in the repository."""
    names = ("Category", "VideoID", "Quality", "StartTime", "EndTime")
    rows = read_table(path, "&", names, names)
    if tuple(rows[0].values()) == names:
        rows = rows[1:]
    expect(path, len(rows), 4143, subset)
    return rows


def list_ave(lists: Path, features: Path, subset: bool) -> Listing:
    """All clips of AVE, train, val and test one after the other as their orders have them. `lists` holds
    Annotations.txt, three orders of its rows (`order`) and, checked if there, labels.h5: `avadataset` (N, T, 29), one
    column a class in order of appearance, then background."""
    path = lists / "Annotations.txt"
    rows = read_annotations(path, subset)
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
        given, shape = read_array(lists / "labels.h5", "avadataset"), (len(rows), T, len(classes) + 1)
        if given.shape != shape:
            raise InputError(f"{lists / 'labels.h5'}: holds shape {given.shape}, expected {shape} as {path} has it")
        differ = np.flatnonzero(((given[..., :-1] > 0) != events).any((1, 2)))
        if len(differ):
            raise InputError(f"{lists / 'labels.h5'}: {len(differ)} rows do not agree with {path}, the first is row "
                             f"{differ[0]} (from 0); the events are those of the annotations in any case")
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
        keep = np.array([i for i, name in enumerate(names) if name not in drop], int)
        notes += [f"{side}: {len(rows) - len(keep)} of {len(rows)} rows left out; --faithful keeps them"]
    listing = Listing(f"{prefix.lower().replace('_', '-')}-{side}", "LLP", names, classes, {
        m: (AUDIO if m == "audio" else VIDEO, archives(features / m / "zip", [name[:11] for name in names]))},
        split, None, {m: events}, notes=notes)
    return listing[keep]


def list_ave_avvp(lists: Path, ave_lists: Path, ave: Path, subset: bool) -> Listing:
    """The source of AVE to AVVP: clips of the 12 AVE classes that AVVP has, renamed, in AVE's splits."""
    every = list_ave(ave_lists, ave, subset)
    labels = read_array(lists / "ave_avvp_labels.h5", "avadataset")
    order = read_order(lists / "ave_avvp_order.h5", len(every.ids), 1831, subset)
    classes = read_lines(lists / "AVE_AVVP_Categories.txt")
    shape = (len(every.ids), T, len(classes) + 1)
    if labels.shape != shape or not (labels[order].sum(-1) == 1).all():
        raise InputError(f"{lists / 'ave_avvp_labels.h5'}: not one of {len(classes) + 1} columns in every segment")
    row = {source[2]: i for i, source in enumerate(every.sources["audio"][1])}  # AVE row -> place in `every`
    listing, events = every[np.array([row[i] for i in order])], labels[order][..., :-1] > 0
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


# ----------------------------------------------------------------------------------------------------------------- text
@dataclass
class Text:
    bert: Optional[str] = None  # folder or name of a Hugging Face BERT, for text (needs the package transformers)
    # word pieces as they are; or as published, whole words (Uni-Code, MICU) or pieces (CoDAAR) of the word filter
    pipeline: Literal["plain", "word", "piece"] = "plain"
    word_filter: Optional[str] = None  # cnt.pkl for `word`, cnt_new.pkl for `piece`


def kept_vectors(pieces: list, vectors: np.ndarray, vocabulary: dict, pipeline: str, admitted: set) -> np.ndarray:
    """Token vectors of one sentence as a (T, 768) float32 array: the first T that are kept, then zeros.

    pieces: P word pieces without special tokens; vectors (P, 768); vocabulary {piece: id}. `plain` keeps every piece,
    `piece` (CoDAAR) those whose id is admitted, `word` (Uni-Code, MICU) those that are a whole word whose id is
    admitted: a word that was split into pieces is dropped. Id 0 is never admitted."""
    kept = []
    for i, piece in enumerate(pieces):
        begins = i == 0 or not piece.startswith("##")
        ends = i + 1 == len(pieces) or not pieces[i + 1].startswith("##")
        if pipeline == "word" and not (begins and ends):
            continue
        if pipeline != "plain" and vocabulary.get(piece, 0) not in admitted - {0}:
            continue
        kept.append(i)
    out = np.zeros(TEXT, np.float32)
    out[:len(kept[:T])] = vectors[kept[:T]]
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


def with_text(listing: Listing, modalities: tuple, sentences: list, which, text, out: str) -> Listing:
    """Only these modalities, among them text: of clip i the sentence number which[i]. `out` is checked before that."""
    for m in modalities:
        if m not in (*listing.sources, "text"):
            raise InputError(f"--modalities {m}: these files hold {' '.join(listing.sources)}")
    check_output(listing, out, 1)
    if "text" in modalities:
        vectors = embed(sentences, text.bert, text.pipeline, text.word_filter)
        listing.sources["text"] = (TEXT, [vectors[i] for i in which])
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
    if len(rows[0]) < 3:
        raise InputError(f"{path}: columns {', '.join(rows[0])}, expected the name first and the category third")
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


# ----------------------------------------------------------------------------------------------- arrays of one's own
def list_npy(root: Path, table: Path, segments: Optional[int]) -> Listing:
    """The clips that `table` names, with the modalities that have a folder in `root`; shapes are those of the first
    clip, without `segments` all clips have its T."""
    rows = read_table(table, ",", ("id", "split"))
    ids = [row["id"] for row in rows]
    twice = [name for name, times in Counter(ids).items() if times > 1]
    if twice:
        raise InputError(f"{table}: '{twice[0]}' is listed {ids.count(twice[0])} times")
    modalities = sorted(path.name for path in root.glob("[!._]*") if path.is_dir())
    if not modalities or set(modalities) & {*NOT_MODALITIES}:
        raise InputError(f"{root}: folders {', '.join(modalities) or 'none'}, expected one a modality, named as you "
                         f"like but for {', '.join(NOT_MODALITIES)}")
    sources = {}
    for m in modalities:
        paths = archives(root / m, ids, ".npy")
        shape = read_npy(paths[0]).shape
        if len(shape) not in (2, 4) or 0 in shape:
            raise InputError(f"{paths[0]}: shape {shape}, expected (T, d) or (T, H, W, d)")
        sources[m] = (segments or shape[0], *shape[1:]), paths
    lengths = {m: shape[0] for m, (shape, _) in sources.items()}
    if len(set(lengths.values())) > 1:
        raise InputError(f"{root}: clip {ids[0]} has {lengths} segments; --segments brings all to one number")
    classes = list(dict.fromkeys(row["label"] for row in rows if row.get("label")))
    label = None
    if classes:
        label = np.array([classes.index(row["label"]) if row["label"] else -1 for row in rows])
    name = root.resolve().name
    return Listing(name, name, ids, classes, sources, in_splits(rows, table), label,
                   rows="first" if segments else "exact", license="not stated")


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
    write_clips(with_text(listing, modalities, sentences, listing.label, text, out), out, options)


def convert_ave(root: Root, out: str, options: Options = Options()) -> None:
    """AVE. ROOT holds Annotations.txt, {visual,audio}_feature.h5, {train,val,test}_order.h5 and, checked if there,
    labels.h5."""
    require_ave_features(root, options.subset)
    write_clips(list_ave(root, root, options.subset), out, options)


def convert_ave_original(root: Root, out: str, options: Options = Options()) -> None:
    """AVE from its own release: the same VGG19 and VGGish features as `ave`, often easier to get. ROOT is the folder
    data/ of github.com/YapengTian/AVE-ECCV18, with the two feature files that its README links put into it.

    visual_feature.h5 `avadataset` (4143, 10, 7, 7, 512); audio_feature.h5 `avadataset` (4143, 10, 128); labels.h5
    `avadataset` (4143, 10, 29), required here; {train,val,test}_order.h5 `order`, 3339, 402 and 402 rows of
    Annotations.txt (its dataloader.py; issues 11 and 13: the number is the row). Annotations.txt names 4,097 videos in
    4,143 rows (issues 14, 19 and 30), so there must be a row per annotation: 4,097 rows are refused."""
    if not (root / "labels.h5").exists():
        raise InputError(f"{root / 'labels.h5'}: not a readable list (no such file), the release has it in data/")
    convert_ave(root, out, options)


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
    listing = list_ave_avvp(root, ave, ave, options.subset)
    require_ave_features(ave, options.subset)
    write_clips(listing, side_path(out, "ave"), options)
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
    except Exception as error:  # JSON may hold anything at any depth
        raise InputError(f"{path}: not a readable list ({type(error).__name__}: {first_line(error)})")
    listing = Listing("mscoco", "MSCOCO", list(ids), [], {"video": (VIDEO, archives(root / "feature/zip", ids))},
                      np.full(len(ids), 2, np.uint8), rows="even")
    write_clips(with_text(listing, ("video", "text"), captions, range(len(ids)), text, out), out, options)


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
    write_clips(with_text(listing, ("audio", "text"), sentences, range(len(ids)), text, out), out, options)


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
    write_clips(with_text(listing, (*listing.sources, "text"), sentences, listing.label, text, out), out, options)


def convert_npy_folder(root: Root, out: str, table: Optional[Path] = None, segments: Optional[int] = None,
                       options: Options = Options()) -> None:
    """Arrays of your own. ROOT holds one folder a modality (audio/, video/, any name) with one ID.npy a clip, (T, d) or
    (T, H, W, d), and clips.csv: a row a clip with its id, split (train, val or test) and, optional, label: the name of
    its class, empty if unknown. Classes are numbered as they first appear.

    Args:
        table: the list, if it is not ROOT/clips.csv.
        segments: bring clips to this number: shorter ones repeat the last one, longer ones lose their end. Without it
            clips of different lengths are refused."""
    if segments is not None and segments < 1:
        raise InputError(f"--segments {segments}: at least one")
    write_clips(list_npy(root, table or root / "clips.csv", segments), out, options)


if __name__ == "__main__":
    sys.excepthook = explain_input_errors
    sets = {name.removeprefix("convert_").replace("_", "-"): function for name, function in list(globals().items())
            if name.startswith("convert_")}
    tyro.extras.subcommand_cli_from_dict(sets, prog="python -m official.convert", config=(tyro.conf.OmitArgPrefixes,))

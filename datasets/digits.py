"""The embedded set `digits`: clips of spoken digits, handwritten digits and sentences, composed from `digits.h5`.

Splits are those of the recordings, images and sentence templates: nothing in a test clip occurs in a training clip.
"""
from pathlib import Path

import h5py
import numpy as np

BASE = Path(__file__).with_name("digits.h5")
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
    classes = np.eye(10, dtype=bool)[labels][:, None]  # (N, 1, 2, 10)

    clip = {"audio": _compose_audio(base, split, rng, labels, heard)}
    clip |= _compose_video(base, split, rng, labels, visible)
    clip["text"] = _pick(base["text"], split, rng, labels[:, 0], "tokens")
    clip["label"] = labels[:, 0]
    clip["split"] = np.full(clips, split, np.uint8)
    clip["events/audio"] = (heard[..., None] & classes).any(2).astype(np.uint8)  # (N, T, 10)
    clip["events/video"] = (visible[..., None] & classes).any(2).astype(np.uint8)
    return clip


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
    frames = base["audio/frames"][:]
    length = base["audio/length"][:]
    train = np.repeat(base["audio/split"][:] == 0, length)
    frames = (frames - frames[train].mean(0)) / frames[train].std(0)
    group = {"split": base["audio/split"], "label": base["audio/label"], "row": np.arange(len(length))}
    row = _pick(group, split, rng, labels, "row")[:, None, :, None]  # (N, 1, 2, 1)
    cut = rng.uniform(0, 0.15, (2, *heard.shape, 1))
    position = (cut[0] + (1 - cut.sum(0)) * np.linspace(0, 1, 10)) * (length[row] - 1)  # (N, T, 2, 10) fractional
    before = np.minimum(position.astype(int), length[row] - 2)
    weight = (position - before)[..., None]  # of the frame after the position
    before = before + (length.cumsum() - length)[row]
    words = frames[before] * (1 - weight) + frames[before + 1] * weight  # (N, T, 2, 10, 13)
    audio = (heard[..., None] * words.reshape(*heard.shape, 130)).sum(2).astype(np.float32)
    return (audio + AUDIO_NOISE * rng.standard_normal(audio.shape, np.float32)).astype(np.float16)


def _compose_video(base, split, rng, labels, visible) -> dict:
    """Pixels in [0, 1] plus noise. Each digit walks at random over the grid; three cells hold scrambled digits."""
    clips = len(labels)
    n = np.arange(clips)
    image = _pick(base["image"], split, rng, labels, "pixels").reshape(clips, 2, PATCH**2).astype(np.float32) / 16
    clutter = _pick(base["image"], split, rng, rng.integers(0, 10, (clips, CLUTTER)), "pixels")
    clutter = rng.permuted(clutter.reshape(clips, CLUTTER, PATCH**2).astype(np.float32) / 16, axis=2)
    cells = rng.permuted(np.tile(np.arange(GRID**2), (clips, 1)), axis=1)
    still = cells[:, 2:2 + CLUTTER]

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


def write(out: str, sizes: tuple = (2400, 400, 800), seed: int = 0) -> None:
    """Compose `sizes` clips for training, validation and test into the `cmg-features` file `out`."""
    total = sum(sizes)
    ids = []
    with h5py.File(BASE, "r") as base, h5py.File(out, "w") as h5:
        h5.attrs.update(format="cmg-features", version=1, name="digits", source=base.attrs["source"],
                        license=base.attrs["license"])
        h5["classes"] = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
        for split, size in enumerate(sizes):
            start = len(ids)
            ids += [f"{('train', 'val', 'test')[split]}-{i:05d}" for i in range(size)]
            for name, values in compose(base, split, size, seed).items():
                storage = {"chunks": (1, *values.shape[1:]), "compression": 1} if name == "mask" else {}
                data = h5.require_dataset(name, (total, *values.shape[1:]), values.dtype, exact=True, **storage)
                data[start:start + size] = values
        h5["id"] = ids

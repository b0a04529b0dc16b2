"""From recordings to a feature file, by the example of the embedded set `watch`: copy this for data of your own.

A watch recorded ten people at seven shoulder exercises. Its accelerometer and its gyroscope are two modalities of one
moment. A clip is five seconds of both: ten segments of half a second.
"""
from pathlib import Path

import h5py
import numpy as np

SEGMENTS, SAMPLES, STEP = 10, 25, 50  # of a clip; of a segment, at 50 Hz; from one clip's start to the next one's


def write(out: str) -> None:
    with h5py.File(Path(__file__).with_name("watch.h5"), "r") as base:
        attributes, classes = dict(base.attrs), base["classes"][:]
        samples = base["samples"][:].astype(float)  # of all recordings, one after the other, 3 axes a sensor
        length, person, exercise = base["length"][:], base["person"][:], base["exercise"][:]  # of each recording

    split = np.select([person <= 6, person <= 8], [0, 1], 2)  # nobody is in two splits
    train = np.repeat(split == 0, length)
    samples = (samples - samples[train].mean(0)) / samples[train].std(0)

    first = [np.arange(0, n - SEGMENTS * SAMPLES + 1, STEP) for n in length]  # samples of the clips of each recording
    recording = np.repeat(np.arange(len(length)), [len(starts) for starts in first])  # of each clip
    start = np.concatenate(first) + (length.cumsum() - length)[recording]
    clips = samples[start[:, None] + np.arange(SEGMENTS * SAMPLES)]  # (N, 250, 6)
    clips = clips.reshape(len(clips), SEGMENTS, SAMPLES, 2, 3).astype(np.float16)

    with h5py.File(out, "w") as h5:
        h5.attrs.update(attributes | {"format": "cmg-features", "version": 1, "name": "watch"})
        for i, sensor in enumerate(("accelerometer", "gyroscope")):
            h5[sensor] = clips[..., i, :].reshape(len(clips), SEGMENTS, -1)  # (N, T, 25 samples x 3 axes)
        h5["split"] = split[recording].astype(np.uint8)  # 0 train, 1 validation, 2 test
        h5["id"] = [f"recording {r:03d}, second {s // 50}" for r, s in zip(recording, np.concatenate(first))]
        h5["classes"], h5["label"] = classes, exercise[recording]
        h5["group"] = recording  # overlapping clips are near-duplicates: retrieval asks for the recording

"""Build `watch.h5`: a watch's accelerometer and gyroscope, 140 recordings of shoulder exercises, from a PyPI package.

    pip install h5py numpy
    pip download --no-deps seglearn==1.2.5       # a zip archive, of which one file is read
    python -m datasets.build_watch seglearn-1.2.5-py3-none-any.whl            # write watch.h5 beside this program
    python -m datasets.build_watch seglearn-1.2.5-py3-none-any.whl --check    # compare with the existing file
"""
import argparse
import hashlib
import io
import sys
import zipfile
from pathlib import Path

import h5py
import numpy as np

MEMBER = "seglearn/data/watch_dataset.npy"
SHA256 = "eb122f23cdf06ef6bd6c6c5312958ec5cf9d038e2e6d457b8081662c75a42537"  # of MEMBER: a pickle could run code
SOURCE = "seglearn 1.2.5, data/watch_dataset.npy"
LICENSE = """\
D. Burns et al., Shoulder Physiotherapy Exercise Recognition: Machine Learning the Inertial Signals from a Smartwatch, \
arXiv:1802.01489; distributed with seglearn, BSD-3-Clause, copyright 2018 David M. Burns."""


def build(archive: str) -> dict:
    """{dataset: array}: `samples` (244102, 6) at 50 Hz, accelerometer x y z in g and gyroscope x y z in rad/s, rounded
    to float16; `length`, `exercise`, `person`, `side` of each of the 140 recordings; `classes`, the seven exercises."""
    with zipfile.ZipFile(archive) as wheel:
        data = wheel.read(MEMBER)
    if hashlib.sha256(data).hexdigest() != SHA256:
        sys.exit(f"{archive}: {MEMBER} is not that of seglearn 1.2.5")
    found = np.load(io.BytesIO(data), allow_pickle=True).item()
    assert found["X_labels"] == ["ax", "ay", "az", "wx", "wy", "wz"]
    return {"samples": np.concatenate(found["X"]).astype(np.float16),
            "length": np.array([len(recording) for recording in found["X"]], np.int32),
            "exercise": found["y"].astype(np.uint8), "person": found["subject"].astype(np.uint8),
            "side": found["side"].astype(np.uint8), "classes": np.array(found["y_labels"], object)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("archive", help="the wheel of seglearn 1.2.5")
    parser.add_argument("--check", action="store_true", help="compare with the existing file instead of writing it")
    args = parser.parse_args()
    path, datasets = Path(__file__).with_name("watch.h5"), build(args.archive)
    if not args.check:
        with h5py.File(path, "w") as h5:
            h5.attrs.update(source=SOURCE, license=LICENSE)
            for name, values in datasets.items():
                dtype = h5py.string_dtype() if values.dtype == object else values.dtype
                packing = {"compression": 9, "shuffle": True} if values.ndim > 1 else {}
                h5.create_dataset(name, data=values, dtype=dtype, track_times=False, **packing)
    with h5py.File(path, "r") as h5:
        same = {name: h5[name].asstr()[:] if name == "classes" else h5[name][:] for name in h5}
    if set(same) != set(datasets) or not all(np.array_equal(same[name], datasets[name]) for name in datasets):
        sys.exit(f"{path} differs from a fresh build")
    print(f"{path} equals the package, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

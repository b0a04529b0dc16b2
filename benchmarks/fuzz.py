"""Files with bytes overwritten: each must be read, or refused in one line. Prints how many came to what.

    python -m benchmarks.fuzz                                # 10,000 feature files
    python -m benchmarks.fuzz --what checkpoint --files 500  # checkpoints, as --resume and probes.py read them
    python -m benchmarks.fuzz --seed 3 --first 17 --files 1  # one of them again

`one line`: an InputError; `fine`: the bytes did not matter, or made another good file; `traceback`: another exception;
`crash`: the process died; `endless`: it was at one file for --limit seconds (the HDF5 library never returns from some).
Each file depends on the seed and its number alone. A child process does the reading; after a crash another one goes on.
"""
import faulthandler
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
import torch
import tyro

import data
import micu
import probes
from data import Features
from run import InputError, first_line, resumed

CHILD = "import sys; from benchmarks import fuzz; fuzz.read_all(*sys.argv[1:])"
SHAPE = {"audio": (5, 8), "video": (5, 2, 3, 4)}


def write_features(path: Path, **layout) -> None:
    """A small good file of everything that the schema knows; `layout` are h5py's words for its datasets."""
    rng, n = np.random.default_rng(0), 12
    with h5py.File(path, "w", libver=layout.pop("libver", None)) as h5:
        h5.attrs.update(format="cmg-features", version=1, name="fuzz", source="none")
        h5["id"], h5["classes"] = [f"clip{i}" for i in range(n)], ["one", "two", "three"]
        values = {m: rng.standard_normal((n, *shape)).astype("f2") for m, shape in SHAPE.items()}
        values |= {"label": np.arange(n) % 3, "group": np.arange(n) // 2, "split": np.repeat(np.uint8([0, 1, 2]), 4),
                   "events/audio": rng.integers(0, 2, (n, 5, 3), np.uint8),
                   "mask": rng.integers(0, 4, (n, 5, 4, 6), np.uint8)}
        for name, value in values.items():
            packed = {"chunks": (3, *value.shape[1:])} | layout if layout else {}
            h5.create_dataset(name, data=value, **packed)


def write_checkpoint(path: Path) -> None:
    """What a run of a tiny model saves."""
    args = micu.Args(codebook_size=8, code_dim=16, data=("none.h5",))
    networks = torch.nn.ModuleDict({"model": micu.Model(SHAPE, args)})
    state = {"method": "micu", "args": vars(args), "shape": SHAPE, "step": 3, "epoch": 1, "seconds": {}, "git": "none",
             "resumed_at": [], "data_sha256": "none", "rng": {"cpu": torch.get_rng_state()}}
    torch.save(state | {"networks": networks.state_dict()}, path)


def read_features(path: Path) -> None:
    """As training, probes and `check` do; a file that the first two take may still fail the third."""
    features = Features([str(path)])
    features.shapes()
    for name in ("audio", "video", "group", "mask", "events/audio"):
        if name in (*features.files[0].names, *(f"events/{m}" for m in features.files[0].events)):
            features.read(name, np.array([3, 1]))
    data.check(str(path))


def read_checkpoint(path: Path) -> None:
    probes.load(path)
    sys.argv = ["micu.py"]
    resumed("micu", micu.Args(resume=str(path.parent)))


KINDS = {"features": (read_features, "new.h5"), "checkpoint": (read_checkpoint, "checkpoint.pt")}


def damaged(good: bytes, rng) -> bytes:
    """Some bytes overwritten, mostly where HDF5 and zip say what is where; now and then the end is missing."""
    bad, places = bytearray(good), rng.integers(0, len(good), rng.choice([1, 3, 30]))
    if rng.random() < 0.5:
        places = places % 4096 if rng.random() < 0.5 else len(good) - 1 - places % 1024
    for place in places:
        length = int(rng.choice([1, 1, 4, 16]))
        fill = rng.choice([b"\0" * length, b"\xff" * length, rng.bytes(length)])
        bad[place:place + length] = bytes(fill).ljust(length, b"\0")[:max(0, len(bad) - int(place))]
    return bytes(bad[:rng.integers(len(bad))] if rng.random() < 0.1 else bad)


def read_all(folder: str, what: str, seed: str, first: str, stop: str, limit: str) -> None:
    """Damage and read the files number `first` up to `stop` - 1; a line of JSON on stdout for each."""
    folder, (read, name) = Path(folder), KINDS[what]
    good = [path.read_bytes() for path in sorted(folder.glob("good*"))]
    report, sys.stdout = sys.stdout, open(folder / "printed", "w")  # of `check`
    for number in range(int(first), int(stop)):
        rng = np.random.default_rng([int(seed), number])
        path = folder / name
        path.unlink(missing_ok=True)  # the one before may still be open
        path.write_bytes(damaged(good[number % len(good)], rng))
        faulthandler.dump_traceback_later(float(limit), exit=True)
        outcome, said = "fine", ""
        try:
            read(path)
        except Exception as error:
            said = str(error)
            one_line = isinstance(error, InputError) and said.isprintable() and str(path) in said
            outcome = "one line" if one_line else "traceback"
            said = f"{type(error).__name__}: {first_line(error)}"
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps([number, outcome, said]), file=report, flush=True)


def fuzz(what: str, files: int, seed: int = 0, first: int = 0, limit: float = 10) -> Counter:
    """Outcomes of so many damaged files; what is neither fine nor one line is printed."""
    found = Counter()
    with tempfile.TemporaryDirectory() as folder:
        if what == "checkpoint":
            write_checkpoint(Path(folder) / "good.pt")
        else:
            for number, layout in enumerate(({}, {"compression": 4}, {"libver": "latest"}, {"fletcher32": True})):
                write_features(Path(folder) / f"good{number}.h5", **layout)
        number, stop = first, first + files
        while number < stop:
            argv = [sys.executable, "-c", CHILD, folder, what, *map(str, (seed, number, stop, limit))]
            child = subprocess.run(argv, capture_output=True, text=True, cwd=Path(__file__).parents[1])
            outcomes = [json.loads(line) for line in child.stdout.splitlines()]
            if child.returncode:
                number += len(outcomes)
                outcomes.append([number, "endless" if "Timeout" in child.stderr else "crash", child.stderr[-300:]])
            number = outcomes[-1][0] + 1
            for which, outcome, said in outcomes:
                found[outcome] += 1
                if outcome not in ("fine", "one line"):
                    print(f"{what} --seed {seed} --first {which}: {outcome}: {said}")
    return found


def main(what: Literal["features", "checkpoint"] = "features", files: int = 10_000, seed: int = 0, first: int = 0,
         limit: float = 10) -> None:
    print(", ".join(f"{count} {outcome}" for outcome, count in fuzz(what, files, seed, first, limit).most_common()))


if __name__ == "__main__":
    tyro.cli(main)

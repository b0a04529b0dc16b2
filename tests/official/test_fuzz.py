"""official.convert on damaged files: one line or a converted file, never a traceback, a hang or a crash.

    PYTHONPATH=.:tests:tests/official python tests/official/test_fuzz.py FOLDER --seed 0 --times 5000

damages more files than the test does, in an empty FOLDER.
"""
import io
import os
import random
import resource
import shutil
import subprocess
import sys
import traceback
import zipfile
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest

import official.convert as convert
import test_convert as files
from conftest import ROOT
from run import InputError

pytestmark = pytest.mark.official
SMALL = (10, 2, 2, 4)  # a feature map here, so that files are small


class Inline:
    """Does in this process what the converters give to others."""

    def __init__(self, _, initializer, initargs):
        initializer(*initargs)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for file in convert.job[:2]:
            os.close(file)

    def map(self, function, todo, chunksize):
        return map(function, todo)

    def shutdown(self, cancel_futures):
        """Nothing waits."""


class WithUnknown(dict):
    """A vocabulary in which a damaged sentence finds a token too."""
    TOKEN = 100

    def __missing__(self, piece):
        return self.TOKEN


def small_picture(seed: int, rows: int = 10, kind=np.float32) -> np.ndarray:
    return np.random.default_rng(seed).random((rows, *SMALL[1:]), np.float32).astype(kind)


def in_small() -> None:
    """Make the converters of this process work alone, on small maps, with a made-up BERT."""
    convert.ProcessPoolExecutor, convert.end_with = Inline, lambda parent: None
    convert.VIDEO = SMALL
    files.picture = small_picture
    files.VOCABULARY = WithUnknown(files.VOCABULARY)
    files.NAMED[WithUnknown.TOKEN] = "[UNK]"
    files.fake_transformers(pytest.MonkeyPatch())


def inputs(root: Path) -> dict:
    """Good files for each converter below `root`: {its name: a call that converts them, given options}"""
    text = convert.Text(bert="bert")
    files.with_prompts(root / "vggsound")
    words = files.word_filter(root / "vggsound/cnt_new.pkl", files.FILTERED, 1435)
    filtered = convert.Text("bert", "piece", str(words))
    files.ave(root / "ave", False)
    files.avvp(root / "avvp")
    files.ave(root / "both/ave")
    files.avvp(root / "both/AVVP", root / "both/lists", "AVE_AVVP", files.SHARED,
               ["KSRjje7GH44_60_70\t8\t10\tDog"], ["19jWnmYnlD8_30_40\t3\t5\tDog"])
    files.ave_avvp(root / "both/lists")
    files.write_text(root / "ucf51/ucf51checked.csv", ["category,video_id", "A,v_A_g01_c04", "B,v_B_g25_c01"])
    files.write_text(root / "ucf51/UCF51Categories.txt", ["A", "B"])
    for name in ("v_A_g01_c04", "v_B_g25_c01"):
        files.zipped(root / f"ucf51/feature/audio/zip/{name}.zip", files.sound(1))
        files.zipped(root / f"ucf51/feature/video/zip/{name}.zip", small_picture(1))
    files.ucf_vgg(root / "ucf-vgg/data")
    for _, name in files.UCF_CLIPS:
        files.zipped(root / f"ucf-vgg/feature/video/zip/{name}.zip", small_picture(0))
    for _, name, _ in files.VGG_CLIPS:
        files.zipped(root / f"ucf-vgg/vgg/feature/audio/zip/{name}.zip", files.sound(0))
    files.mscoco(root / "mscoco")
    files.clotho(root / "clotho")
    files.npy_folder(root / "npy")
    calls = {
        "vggsound": lambda out, options: convert.convert_vggsound(root / "vggsound", out, "40k", ("audio", "text"),
                                                                  options=options, text=filtered),
        "ave": lambda out, options: convert.convert_ave_original(root / "ave", out, options),
        "avvp": lambda out, options: convert.convert_avvp(root / "avvp", out, options),
        "both": lambda out, options: convert.convert_ave_avvp(root / "both/lists", out, root / "both/ave",
                                                              root / "both/AVVP", options),
        "ucf51": lambda out, options: convert.convert_ucf51(root / "ucf51", out, root / "ucf51", options),
        "ucf-vgg": lambda out, options: convert.convert_ucf_vgg(root / "ucf-vgg", out, root / "ucf-vgg/vgg", options),
        "mscoco": lambda out, options: convert.convert_mscoco(root / "mscoco", out, options, text),
        "clotho": lambda out, options: convert.convert_clotho(root / "clotho", root / "clotho/captions.csv", out,
                                                              options, text),
        "npy": lambda out, options: convert.convert_npy_folder(root / "npy", out, options=options)}
    try:
        files.avs(root / "avs", maps=[1])
        calls["avs"] = lambda out, options: convert.convert_avs(root / "avs/avs", out, root / "avs/s4",
                                                                root / "avs/maps", options, text)
    except ImportError:  # drawing masks takes Pillow
        shutil.rmtree(root / "avs")
    return calls


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Some bytes overwritten, half the time near the start, or a piece cut out."""
    changed = bytearray(content)
    if not changed or rng.random() < 0.1:
        start = rng.randrange(len(changed) + 1)
        del changed[start:start + rng.choice((1, 8, 1000, len(changed)))]
        return bytes(changed)
    reach = min(len(changed), rng.choice((64, 512, 4096, len(changed))))
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        changed[rng.randrange(reach)] = rng.choice((0, 255, ord("\n"), ord(","), ord('"'), rng.randrange(256)))
    return bytes(changed)


def damage(path: Path, rng: random.Random) -> None:
    """Damage a file, or what an archive holds and not the archive."""
    content = path.read_bytes()
    if path.suffix == ".zip" and rng.random() < 0.7:
        with zipfile.ZipFile(path) as archive:
            (name,) = archive.namelist()
            inside = archive.read(name)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, damaged(inside, rng))
    else:
        path.write_bytes(damaged(content, rng))


def fuzz(root: Path, seed: int, times: int) -> list:
    """Damage one file at a time, convert, repair it -> what went wrong, as text."""
    in_small()
    calls, rng, wrong = inputs(root), random.Random(seed), []
    kinds = {name: {} for name in calls}
    for name in calls:
        for path in sorted(path for path in (root / name).rglob("*") if path.is_file()):
            kinds[name].setdefault(path.suffix, []).append(path)
    refused = 0
    for i in range(times):
        name = rng.choice(sorted(calls))
        path = rng.choice(kinds[name][rng.choice(sorted(kinds[name]))])
        before = path.read_bytes()
        damage(path, rng)
        print(f"{i}: {path}", file=sys.stderr, flush=True)
        convert.opened.cache_clear()
        options = convert.Options(faithful=rng.random() < 0.5, subset=True, workers=1,
                                  on_error=rng.choice(("stop", "skip")))
        try:
            with redirect_stdout(io.StringIO()):
                calls[name](str(root / "out.h5"), options)
        except InputError as error:
            refused += 1
            if len(str(error).splitlines()) != 1:
                wrong.append(f"{i}: {path}: {str(error)!r} is not one line")
        except Exception:
            wrong.append(f"{i}: {path}: {traceback.format_exc()}")
        path.write_bytes(before)
        for left in root.glob("out*"):
            left.unlink()
    if refused < times // 4:
        wrong.append(f"only {refused} of {times} damaged files were refused: nothing was tried")
    return wrong


def test_damaged_files_end_in_one_line(tmp_path):
    """In a process of its own, for HDF5 may crash, or loop on damaged metadata."""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests/official")))
    done = subprocess.run([sys.executable, __file__, tmp_path, "--seed", "0", "--times", "400"], capture_output=True,
                          text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths})
    assert done.returncode == 0, done.stdout + done.stderr[-500:]


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))  # who asks for more memory gets a MemoryError
    found = fuzz(Path(sys.argv[1]), int(sys.argv[3]), int(sys.argv[5]))
    print("\n".join(found))
    sys.exit(len(found) > 0)

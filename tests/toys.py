"""Small files whose answer is known, for the tests of the probes: codes that say what a clip is about, and how to ask.

`ask(path, *tasks)` are the clean figures, `ask(path, *tasks, paper=settings)` those of the published protocol.
"""
import h5py
import numpy as np
import torch

from data import Features
from official import protocol
from probes import Codes, Plan

CPU = torch.device("cpu")
CLIPS, T, CLASSES = 96, 4, 3


def write_toy(path, change=lambda h5, split: None) -> str:
    """A file of three modalities that say their clip's class where its event happens; video draws it in one cell, and
    in half of the clips the next class in another. `change` edits the open file."""
    rng, label, split = np.random.default_rng(0), np.arange(CLIPS) % CLASSES, np.repeat([0, 1, 2], [48, 12, 36])
    happens = {m: rng.random((CLIPS, T)) < 0.6 for m in ("audio", "video")}
    here = rng.permuted(np.tile(np.arange(25), (CLIPS, T, 1)), axis=2)[..., :2]  # of the event, of the other
    two, other = np.arange(CLIPS) // 3 % 2 == 0, (label + 1) % CLASSES
    first, second = (np.arange(25) == here[..., i, None] for i in range(2))  # (N, T, 25)
    second &= two[:, None, None]
    video = first[..., None] * np.eye(8)[label][:, None, None] + second[..., None] * np.eye(8)[other][:, None, None]
    mask = first * (label + 1)[:, None, None] + second * (other + 1)[:, None, None]
    classes = np.eye(CLASSES)[label] + two[:, None] * np.eye(CLASSES)[other]
    with h5py.File(path, "w") as h5:
        h5.attrs.update(format="cmg-features", version=1, name="toy")
        h5["audio"] = np.where(happens["audio"], label[:, None] + 1, 0)[..., None].astype(np.float32)
        h5["text"] = np.broadcast_to(label[:, None, None] + 1, (CLIPS, T, 1)).astype(np.float32)
        h5["video"] = video.reshape(CLIPS, T, 5, 5, 8).astype(np.float32)
        h5["mask"] = mask.reshape(CLIPS, T, 5, 5).repeat(2, 2).repeat(2, 3).astype(np.uint8)
        h5["label"], h5["split"] = label, split.astype(np.uint8)
        h5["id"], h5["classes"] = [str(i) for i in range(CLIPS)], ["one", "two", "three"]
        h5["events/audio"] = (happens["audio"][..., None] * np.eye(CLASSES)[label][:, None]).astype(np.uint8)
        h5["events/video"] = (happens["video"][..., None] * classes[:, None]).astype(np.uint8)
        change(h5, split)
    return str(path)


def codes_of(index, width=6, size=20):
    rows = torch.randn(size, width, generator=torch.Generator().manual_seed(0))
    return Codes(rows, torch.as_tensor(index))


ROWS = torch.randn(CLASSES + 1, 32, generator=torch.Generator().manual_seed(0))
BLUR = {"audio": 0.0, "text": 0.2, "video": 0.4}  # codes of one meaning are near each other, not the same


def honest(model, x, modality):
    """The code is the class where the modality says it, else code 0; video always says the first class it shows."""
    index = x[..., 0].long() if x.dim() == 3 else x.sum((2, 3)).argmax(-1) + 1
    rows = ROWS + BLUR[modality] * torch.randn(ROWS.shape, generator=torch.Generator().manual_seed(1))
    return rows[index], index


def shape_of(modalities) -> dict:
    """What a model of the toy's modalities takes."""
    return {m: (T, 5, 5, 8) if m == "video" else (T, 1) for m in modalities}


def ask(path, *tasks, encode=honest, known=(), score="softmax", modalities=tuple(BLUR), model=None, target=None,
        class_map=(), size=CLASSES + 1, paper=None) -> dict:
    """{tag without `eval/`: value}"""
    features, target = Features([path]), Features([target]) if target else None
    plan = Plan(features, shape_of(modalities), CPU, tasks, known, score, target, class_map, paper is not None)
    model = model or torch.nn.Module()
    if paper is None:
        tags = plan.evaluate(model, encode, size)
    else:
        tags = protocol.evaluate(plan, model, encode, size, paper)
    return {tag.removeprefix("eval/"): value for tag, value in tags.items()}


class Noisy(torch.nn.Module):
    """A model with dropout, whose codes change in training mode."""

    def __init__(self):
        super().__init__()
        self.dropout = torch.nn.Dropout(0.3)

    def encode(self, model, x, modality):
        quantized, index = honest(model, x, modality)
        index = torch.where(model.dropout(torch.ones(index.shape)) > 0, index, 0)
        return honest(model, index[..., None].float(), modality)


# ------------------------------------------------------------------------------------------- a target of its own
NAMES = ["three", "4", "One", "five", "two"]  # a target's classes: the toy's three, one of them renamed, and two others


def say(model, x, modality):
    """The code is the number that the modality says; one meaning has nearly the same code in all modalities."""
    index = x[..., 0].long()
    rows = 5 * torch.randn(9, 32, generator=torch.Generator().manual_seed(2))
    return rows[index], index


def write_side(path, modality, names, meaning, label, split, happens=None) -> str:
    """A file of one modality which says, where its event happens, what the label means: {name: number}."""
    happens = np.ones((len(label), T), bool) if happens is None else happens
    with h5py.File(path, "w") as h5:
        h5.attrs.update(format="cmg-features", version=1, name="side")
        said = np.array([meaning[name] for name in names])[label]
        h5[modality] = np.where(happens, said[:, None], 0)[..., None].astype(np.float32)
        h5["label"], h5["split"], h5["classes"] = label, split.astype(np.uint8), names
        h5["id"] = [str(i) for i in range(len(label))]
        h5[f"events/{modality}"] = (happens[..., None] * np.eye(len(names))[label][:, None]).astype(np.uint8)
    return str(path)


def write_sides(folder) -> tuple:
    """A source of audio and a target of text, with classes, clips and splits of their own."""
    rng = np.random.default_rng(0)
    meaning = {"one": 1, "One": 1, "two": 2, "three": 3, "4": 4, "five": 5, "zero": 6}
    source = write_side(folder / "source.h5", "audio", ["one", "two", "three", "zero"], meaning, np.arange(72) % 4,
                        np.arange(72) // 24, rng.random((72, T)) < 0.8)
    target = write_side(folder / "target.h5", "text", NAMES, meaning, np.arange(50) % 5, np.arange(50) // 5 % 3,
                        np.arange(T) >= np.arange(50)[:, None] % T)
    return source, target


def ask_sides(sides, *tasks, **keywords) -> dict:
    return ask(sides[0], *tasks, encode=say, target=sides[1], modalities=("audio", "text"), size=9,
               **{"class_map": ("One=one",)} | keywords)


MEANING = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 7}
ABC = ["one", "two", "three"]


def go(source, target, *tasks, **keywords) -> dict:
    return ask_sides((source, target), *tasks, **{"class_map": ()} | keywords)

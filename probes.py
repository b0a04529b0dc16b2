"""Frozen-probe protocols: a probe trained on the codes of one modality is tested, untouched, on those of another.

    python probes.py RUN                                      probe a finished run again, on its own data
    python probes.py RUN FILE --tasks localization retrieval  other tasks, on another cmg-features file
    python probes.py RUN --tasks open_set --known 3 5 7 0,2,4 --score energy
    python probes.py RUN ucf.h5 --target vgg.h5 --class-map "playing cello=PlayingCello"     trained on one file, tested
                                                              on another, which may hold one modality each

Encoder in eval mode, last probe epoch, open-set threshold from held-out clips of the *source* modality: nothing is
chosen with test labels (what the released scripts compute instead: `python -m official.protocol RUN`). The model comes
in as a module and a function `encode(model, features, modality) -> (quantized (N, T, D), code_index (N, T))`, one vector
a code; this file knows nothing of the methods.
"""
import copy
import hashlib
import importlib
import itertools
import json
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Optional

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro

from data import NOT_ANNOTATED, Features, data_files
from run import InputError, explain_input_errors, first_line, pick_device, require_shape

EPOCHS, LEARNING_RATE, BATCH_SIZE = 5, 4e-4, 80  # of the clean probes; by then the held-out source loss has levelled
REJECT = 0.05  # share of held-out known source clips that the clean open-set threshold rejects
SCRIPTS = ("uni_code", "micu", "codaar")  # the only modules that a checkpoint may name
RANKS = (1, 5, 10)  # of retrieval
TEMPERATURE = 0.1  # of the map that x_retrieval learns
MASK_EPOCHS, MASK_LEARNING_RATE, MASK_FRAMES = 10, 3e-3, 3  # of the segmentation decoder; frames of a clip a step
TASKS = ("classification", "localization", "open_set", "retrieval", "x_retrieval", "segmentation")
SCORES = ("softmax", "logit", "energy", "distance")  # by which unknown clips may be told from known ones
SHARE = 0.1  # a modality shares a code if it makes at least this part of the code's selections


# ------------------------------------------------------------------------------------------------------------- metrics
def accuracy(prediction, target) -> dict:
    """Clip accuracy and the mean over the classes present of class recall; both (N,) int, fractions in [0, 1]."""
    require_shape("target", target, (len(prediction),))
    correct = (prediction == target).double()
    recall = [correct[target == c].mean() for c in target.unique()]
    return {"acc": correct.mean().item(), "macro_recall": torch.stack(recall).mean().item()}


def open_set_metrics(confidence, prediction, target, num_known: int, threshold: float) -> dict:
    """OS*, UNK and HOS (MICU 4.1) at one threshold; all (N,). Clips with target >= num_known are unknown.

    A clip with confidence < threshold is rejected. `os_star`: share of the known clips accepted and classified right;
    `os_star_class_mean`: the same as a mean over the known classes present; `unk`: share of the unknown clips rejected;
    `hos`: their harmonic mean, 0 if both are 0. Raises ValueError on unequal lengths."""
    shapes = [tuple(t.shape) for t in (confidence, prediction, target)]
    if len(shapes[0]) != 1 or len(set(shapes)) > 1:
        raise ValueError("confidence, prediction, target have shapes {}, {}, {}, expected (N,) each".format(*shapes))
    accepted, known = confidence >= threshold, target < num_known
    right = (accepted & (prediction == target)).double()
    rejected = (~accepted[~known]).double()
    per_class = [right[target == c].mean() for c in target[known].unique()]
    os_star = right[known].mean().item() if known.any() else 0.0
    unk = rejected.mean().item() if len(rejected) else 0.0
    return {"os_star": os_star, "os_star_class_mean": torch.stack(per_class).mean().item() if per_class else 0.0,
            "unk": unk, "hos": 2 * os_star * unk / (os_star + unk) if os_star + unk > 0 else 0.0}


def auroc(score_positive, score_negative) -> float:
    """Probability that a random positive scores above a random negative, ties counting half; (P,), (N,)."""
    negative = score_negative.double().sort().values
    positive = score_positive.double().contiguous()
    below = torch.searchsorted(negative, positive) + torch.searchsorted(negative, positive, right=True)
    return (below.double().mean() / (2 * len(negative))).item()


def segment_metrics(scores, target, threshold: float = 0.5) -> dict:
    """Pooled precision, recall and F1 of multi-hot labels; scores and target (..., C), score > threshold predicts.

    0 where nothing is predicted or nothing is there. Raises ValueError on unequal shapes."""
    require_shape("target", target, scores.shape)
    predicted, true = scores > threshold, target > 0.5
    hits = (predicted & true).sum().item()
    precision, recall = hits / max(predicted.sum().item(), 1), hits / max(true.sum().item(), 1)
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    return {"precision": precision, "recall": recall, "f1": f1}


def recall_at_k(query, database, query_group, database_group, k: int) -> float:
    """Share of queries with an item of their group among the k nearest by cosine; (Q, D), (N, D), (Q,), (N,).

    Raises ValueError on shapes that do not fit."""
    require_shape("query", query, (-1, -1))
    require_shape("database", database, (-1, query.shape[1]))
    require_shape("query_group", query_group, (len(query),))
    require_shape("database_group", database_group, (len(database),))
    if not 1 <= k <= len(database):
        raise ValueError(f"k {k} is not in 1..{len(database)}, the size of the database")
    similarity = F.normalize(query, dim=-1) @ F.normalize(database, dim=-1).T  # (Q, N)
    nearest = database_group[similarity.topk(k).indices]  # (Q, k)
    return (nearest == query_group[:, None]).any(1).double().mean().item()


def mask_iou(probability, target):
    """Intersection over union of each frame at 0.5, (..., H, W) each -> (frames,); without a mask, the share of its
    correctly empty pixels. Raises ValueError on unequal shapes."""
    require_shape("probability", probability, (*probability.shape[:-2], -1, -1))
    require_shape("target", target, probability.shape)
    predicted, true = (x.reshape(-1, x.shape[-2] * x.shape[-1]) > 0.5 for x in (probability, target))  # (frames, H * W)
    overlap = (predicted & true).sum(1) / (predicted | true).sum(1).clamp(min=1).double()
    return torch.where(true.any(1), overlap, (~predicted).double().mean(1))


def mask_curve(probability, target):
    """F-score (beta^2 = 0.3) of each frame with a mask at 255 thresholds in [0, 1): (..., H, W) each -> (n, 255)"""
    pixels = probability.shape[-2] * probability.shape[-1]
    thresholds = torch.linspace(0, 1 - 1e-10, 255, dtype=torch.double, device=probability.device)
    curves = [torch.zeros(0, 255)]
    for p, true in zip(*(x.reshape(-1, pixels).split(1 + 4_000_000 // pixels) for x in (probability, target))):
        true = true > 0.5
        p, true = p[true.any(1)].double(), true[true.any(1)]
        # how many thresholds each pixel reaches, then for each threshold how many pixels reach it
        reached, none = torch.bucketize(p, thresholds, right=True), p.new_zeros(len(p), 256)
        found, hits = (none.scatter_add(1, reached, x).flip(1).cumsum(1).flip(1)[:, 1:]
                       for x in (torch.ones_like(p), true.double()))
        precision, recall = hits / found.clamp(min=1), hits / true.sum(1, keepdim=True)
        curves.append((1.3 * precision * recall / (0.3 * precision + recall).clamp(min=1e-12)).cpu())
    return torch.cat(curves)


def mask_metrics(probability, target) -> dict:
    """Segmentation over frames, (..., H, W) each: mIoU at 0.5, and the best F-score (beta^2 = 0.3) over 255 thresholds.

    A frame without a mask scores the share of its correctly empty pixels in mIoU and is left out of the F-score.
    Raises ValueError on unequal shapes."""
    miou, curve = mask_iou(probability, target).mean().item(), mask_curve(probability, target)
    return {"miou": miou, "f_score": curve.mean(0).max().item() if len(curve) else 0.0}


def constant_f1(target) -> dict:
    """The floor of localisation: F1 of whoever predicts one column everywhere (the best one) or all; target (..., C)"""
    column = torch.eye(target.shape[-1], device=target.device)
    one = max(segment_metrics(c.expand(target.shape), target)["f1"] for c in column)
    return {"f1_constant": one, "f1_everything": segment_metrics(torch.ones_like(target), target)["f1"]}


def code_sharing(counts, share: float) -> dict:
    """Of the codes in use, the parts shared by 1..M modalities: counts (M, K) selections; a modality has a code if it
    makes at least `share` of its selections. `shared_i` counts codes, `weighted_i` their selections (MICU, Fig. 6)."""
    require_shape("counts", counts, (-1, -1))
    total, ways = counts.sum(0).double(), range(1, len(counts) + 1)
    shared = ((counts / total >= share) & (total > 0)).sum(0)  # (K,) modalities sharing each code, 0 if unused
    tags = {f"shared_{i}": ((shared == i).sum() / (total > 0).sum().clamp(min=1)).item() for i in ways}
    return tags | {f"weighted_{i}": (total[shared == i].sum() / total.sum().clamp(min=1)).item() for i in ways}


def codebook_metrics(code_index: dict, codebook_size: int):
    """Health of the code: {m: (N, T) int} -> (tags, selections {m: (K,)}). Agreement is over pairs of modalities."""
    counts = torch.stack([i.flatten().bincount(minlength=codebook_size) for i in code_index.values()]).cpu()
    share = counts.double() / counts.sum(1, keepdim=True)
    pairs = itertools.combinations(code_index.values(), 2)
    tags = {f"used_{m}": (row > 0).sum().item() for m, row in zip(code_index, counts)}
    tags |= {f"perplexity_{m}": row.exp().item() for m, row in zip(code_index, torch.special.entr(share).sum(1))}
    agreement = [(a == b).double().mean() for a, b in pairs]
    if agreement:  # a file of one modality has none
        tags |= {"agreement": torch.stack(agreement).mean().item(), **code_sharing(counts, SHARE)}
    return tags, dict(zip(code_index, counts))


# -------------------------------------------------------------------------------------------------------------- probes
@dataclass
class Codes:
    """Discrete codes of clips: `index` (N, T) int64 points into `rows` (K, D), the vectors of the codes that occur."""
    rows: torch.Tensor
    index: torch.Tensor

    def __getitem__(self, clips):
        return Codes(self.rows, self.index[clips])

    def __len__(self):
        return len(self.index)

    def mean(self, where=None):
        """Mean code of each clip (N, D), over the segments `where` (N, T) if given; over all of a clip without any."""
        where = torch.ones_like(self.index, dtype=torch.bool) if where is None else where | ~where.any(1, keepdim=True)
        weight = where / where.sum(1, keepdim=True)
        parts = zip(self.index.split(1000), weight.split(1000))
        return torch.cat([(w[:, None] @ F.embedding(index, self.rows))[:, 0] for index, w in parts])


class ClipProbe(nn.Module):
    """Codes of B clips -> class logits (B, C): linear (once for each code), maximum over the segments, linear."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.hidden, self.classify = nn.Linear(width, width), nn.Linear(width, classes)

    def forward(self, codes):
        used, index = codes.index.unique(return_inverse=True)
        return self.classify(F.embedding(index, self.hidden(codes.rows[used])).amax(1))

    def loss(self, codes, target):
        return F.cross_entropy(self(codes), target)


class SegmentProbe(nn.Module):
    """Codes of B clips -> logits (B, T, C + 1) of every segment on its own, the last one of background: linear layers
    of these widths, then one of C + 1. `fading` adds the released second loss, whose weights the probe learns."""

    def __init__(self, width: int, classes: int, widths: tuple, fading: bool):
        super().__init__()
        sizes = (width, *widths, classes + 1)
        self.layers = nn.Sequential(*(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:])))
        self.alpha = nn.Parameter(torch.full((classes + 1,), 0.1)) if fading else None

    def forward(self, codes):
        used, index = codes.index.unique(return_inverse=True)
        return F.embedding(index, self.layers(codes.rows[used]))

    def loss(self, codes, target):
        """target (B, T, C + 1): binary cross-entropy, less the mean of sum over c of y_c log softmax_c exp(-alpha_c)"""
        logits = self(codes)
        loss = F.binary_cross_entropy_with_logits(logits, target)
        if self.alpha is not None:
            loss = loss - (target * logits.log_softmax(-1) * (-self.alpha).exp()).sum(-1).mean()
        return loss


class ProbeTraining:
    """A probe and its optimisation: Adam, halved after 10, 20 and 30 epochs, gradient norm of layers clipped at 0.5."""

    def __init__(self, probe, device, learning_rate: float = LEARNING_RATE, batch_size: int = BATCH_SIZE):
        torch.manual_seed(0)  # the same start and order for every probe, whichever others are trained
        self.probe, self.batch_size, self.generator = probe().to(device), batch_size, torch.Generator().manual_seed(0)
        self.optimizer = torch.optim.Adam(self.probe.parameters(), lr=learning_rate, fused=True)
        self.schedule = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [10, 20, 30], 0.5)
        self.clipped = [p for name, p in self.probe.named_parameters() if name != "alpha"]

    def epoch(self, codes: Codes, target) -> None:
        """One shuffled pass over the codes of N clips, target (N, ...); the last batch is kept."""
        for clips in torch.randperm(len(codes), generator=self.generator).to(target.device).split(self.batch_size):
            self.optimizer.zero_grad()
            self.probe.loss(codes[clips], target[clips]).backward()
            nn.utils.clip_grad_norm_(self.clipped, 0.5)
            self.optimizer.step()
        self.schedule.step()

    @torch.no_grad()
    def logits(self, codes: Codes):
        """Codes of N clips -> what the probe says of them (N, ..., C)"""
        return torch.cat([self.probe(codes[i:i + 1000]) for i in range(0, len(codes), 1000)])


def known_scores(logits, codes: Codes, seen: Codes) -> dict:
    """How much clips look like known ones, by each of SCORES: logits (N, C), their codes, those trained on -> {(N,)}

    `distance`: that of a segment's codeword to the nearest one seen in training, mean over the segments, negated."""
    used, index = codes.index.unique(return_inverse=True)
    far = torch.cdist(codes.rows[used], seen.rows[seen.index.unique()],
                      compute_mode="donot_use_mm_for_euclid_dist").amin(1)  # exactly 0 from itself
    return dict(zip(SCORES, (logits.softmax(-1).amax(-1), logits.amax(-1), logits.logsumexp(-1), -far[index].mean(-1))))


@torch.no_grad()
def read_codes(model, encode, features: Features, modality: str, clips, codebook_size: int, device) -> Codes:
    """The codes of the clips with these numbers, encoded in the model's present mode."""
    rows, parts = None, []
    for i in range(0, len(clips), 200):
        x = torch.from_numpy(features.read(modality, clips[i:i + 200])).to(device).float()
        if not x.isfinite().all():
            raise InputError(f"NaN or infinity in {modality}: python data.py check FILE says where")
        quantized, index = encode(model, x, modality)
        rows = quantized.new_zeros(codebook_size, quantized.shape[-1]) if rows is None else rows
        rows[index.flatten()] = quantized.flatten(0, 1)  # a code is one vector
        parts.append(index)
    return Codes(rows, torch.cat(parts))


def direction(source: str, target: str, modalities: list) -> str:
    """`v2a`: trained on video, tested on audio. Initials, or whole names where initials are ambiguous."""
    ambiguous = len({m[0] for m in modalities}) < len(modalities)
    return f"{source}2{target}" if ambiguous else f"{source[0]}2{target[0]}"


# --------------------------------------------------------------------------------------------- what probes see of files
class ProbeSet:
    """Clips of a source or a target as probes see them: labels by the numbers of `classes`, codes made when asked for.

    `names` renames the file's classes; those that are not among `classes` are one more, number C. `read` makes the
    Codes of clips: (features, modality, clips) -> Codes."""

    def __init__(self, features: Features, classes: list, names: dict, device, read=None):
        number = {name: i for i, name in enumerate(classes)}
        place = [number.get(names.get(name, name), len(classes)) for name in features.classes]
        self.features, self.classes, self.device, self.read, self.known_codes = features, classes, device, read, {}
        self.place = np.array([*place, -1])  # the last one of clips without a label, -1
        self.label = torch.from_numpy(self.place[features.label]).to(device)  # (N,)

    def codes(self, modality: str, clips) -> Codes:
        """Codes of these clips; each clip is encoded once."""
        if modality not in self.known_codes:
            index = torch.full((len(self.label), self.features.shape[modality][0]), -1, device=self.device)
            self.known_codes[modality] = Codes(None, index)
        kept = self.known_codes[modality]
        new = clips[(kept.index[clips, 0] < 0).cpu().numpy()]
        if len(new):
            fresh = self.read(self.features, modality, new)
            kept.rows = torch.zeros_like(fresh.rows) if kept.rows is None else kept.rows
            used = fresh.index.unique()
            kept.rows[used], kept.index[new] = fresh.rows[used], fresh.index
        return kept[clips]


@dataclass
class Part:
    """Some clips of a set: what a probe trains or is tested on."""
    of: ProbeSet
    clips: np.ndarray

    @property
    def features(self) -> Features:
        return self.of.features

    @property
    def label(self):
        """(n,) class, C for those that the probes do not know, -1 without"""
        return self.of.label[self.clips]

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, keep):
        return Part(self.of, self.clips[np.asarray(keep)])

    def codes(self, modality: str) -> Codes:
        return self.of.codes(modality, self.clips)

    def events(self, modality: str):
        """(n, T, C) uint8: what happens when; classes that the probes do not know never happen."""
        happens, place = self.features.read(f"events/{modality}", self.clips), self.of.place[:-1]
        of_class = [happens[..., place == i].any(-1) for i in range(len(self.of.classes))]
        return np.stack(of_class, -1).astype(np.uint8)

    def labelled(self):
        """Those with a class"""
        return self[(self.label >= 0).cpu()]

    def single(self):
        """The labelled ones with one event"""
        return Part(self.of, self.features.single_event(self.clips)).labelled()


def parts_of(source: ProbeSet, target: Optional[ProbeSet], every_clip: bool = False) -> dict:
    """{name: Part}: `train`, `val` and `same` (the source's test clips), `test`; with `every_clip` and a target of its
    own, `train` and `test` are all the clips on either side."""
    parts = {name: Part(source, source.features.clips(split)) for name, split in
             (("train", "train"), ("val", "val"), ("same", "test"))}
    if target is None:
        return parts | {"test": parts["same"]}
    if every_clip:
        parts["train"] = Part(source, np.arange(len(source.features)))
    return parts | {"test": Part(target, np.arange(len(target.features)) if every_clip else
                                 target.features.clips("test"))}


def class_names(features: Features, target: Optional[Features], class_map: tuple):
    """The classes of the probes, those that both sides have, in the source's order; {target's name: source's name}.

    `class_map` has entries `target's name=source's name`; other names stay. Raises InputError on names not there."""
    names = dict(entry.split("=", 1) for entry in class_map if "=" in entry)
    if len(names) < sum("=" in entry for entry in class_map):
        raise InputError("--class-map: a class of --target is named twice")
    for entry in class_map:
        theirs, ours = entry.split("=", 1) if "=" in entry else (entry, None)
        if target is None or ours not in features.classes or theirs not in target.classes:
            raise InputError(f"--class-map '{entry}': expected 'class of --target=class of the source'")
    if target is None or not target.classes:
        return features.classes, names
    shared = {names.get(name, name) for name in target.classes}
    return [name for name in features.classes if name in shared], names


def known_sets(known: tuple, classes: list) -> dict:
    """--known -> {entry: numbers of the known classes}: `5` the first five, `0,2,4` these three; default: the first
    half. Raises InputError on anything else."""
    sets = {}
    for entry in map(str, known or (len(classes) // 2,)):
        parts = entry.split(",")
        if not all(part.isdecimal() for part in parts):
            raise InputError(f"--known {entry}: give a number of first classes, or class numbers such as 0,2,4")
        most = max(map(int, parts)) + (len(parts) > 1)
        sets[entry] = sorted(set(map(int, parts))) if len(parts) > 1 else list(range(min(most, len(classes) + 1)))
        if not 1 <= most <= len(classes):
            raise InputError(f"--known {entry}: the data has {len(classes)} classes, numbered from 0")
    return sets


def default_tasks(features: Features) -> tuple:
    """What a script probes unless it is told: nothing beyond the codebook without labels."""
    return ("classification", "open_set") if (features.label >= 0).any() else ()


def groups(features: Features, clips):
    """What is one item for retrieval: the group of each clip, told apart by file; without groups the clip itself."""
    if not all("group" in file.h5 for file in features.files):
        return torch.from_numpy(clips)
    owner = np.searchsorted(features.starts, clips, side="right")
    pairs = np.stack([owner, features.read("group", clips)])
    return torch.from_numpy(np.unique(pairs, axis=1, return_inverse=True)[1].reshape(-1))


def localized(features: Features, modalities) -> list:
    """The modalities whose events are annotated segment by segment, in every file."""
    return [m for m in modalities if m in features.modalities
            and all(m in file.h5.get("events", {}) for file in features.files)]


def maps_with_masks(features: Features, modalities) -> list:
    """The modalities of maps whose cells divide the masks of the files into whole pixels."""
    size = features.files[0].h5["mask"].shape[2:] if "mask" in features.files[0].h5 else None
    if size is None or any("mask" not in file.h5 or file.h5["mask"].shape[2:] != size for file in features.files):
        return []
    shape = {m: features.shape[m] for m in modalities if len(features.shape.get(m, ())) == 4}
    return [m for m, (_, *cells, _) in shape.items() if all(a % b == 0 for a, b in zip(size, cells))]


def ordered_pairs(sources, targets) -> list:
    """(trained on, tested on), a modality and another one"""
    return [(a, b) for a in sources for b in targets if a != b]


@dataclass
class Request:
    """What is to be probed, for the checks before any training: a source, a target or None, and their parts."""
    source: Features
    target: Optional[Features]
    parts: dict
    held: list  # modalities of the model that the source, and the target if there is one, holds
    classes: list
    every_clip: bool

    @property
    def sides(self) -> list:
        return [self.source] if self.target is None else [self.source, self.target]

    def path(self, part: str) -> str:
        return self.sides["test" in part and -1].files[0].path

    def need(self, task: str, part: str, there: bool, why: str = "") -> None:
        names = {"train": "source", "test": "target"} if self.every_clip and self.target else {}
        if not there:
            raise InputError(f"{self.path(part)}: the {names.get(part, f'{part} split')} is empty{why}, --tasks {task} "
                             "needs clips there")


def check_request(features: Features, shape: dict, tasks: tuple, known: tuple, target: Optional[Features] = None,
                  class_map: tuple = (), every_clip: bool = False) -> None:
    """Raise InputError before any training if the probes could not run on these features, of a model for `shape`."""
    sides = [features] if target is None else [features, target]
    held = [[m for m in shape if m in side.modalities] for side in sides]
    for side, names in zip(sides, held):
        for m in names:
            if tuple(side.shape[m]) != tuple(shape[m]):
                raise InputError(f"{side.files[0].path}: {m} has shape {tuple(side.shape[m])}, the model wants "
                                 f"{tuple(shape[m])}")
    if not ordered_pairs(held[0], held[-1]):
        raise InputError(f"{features.files[0].path}: holds {' '.join(features.modalities)}, probes need two of "
                         f"{' '.join(shape)}" + (f", one here and another in {target.files[0].path}" if target else ""))
    classes, names = class_names(features, target, class_map)
    if target and not classes and {"classification", "open_set", "localization"} & set(tasks):
        raise InputError(f"{features.files[0].path}: no class in common with {target.files[0].path}; --class-map "
                         "renames those of the target")
    sets = [ProbeSet(side, classes, names if side is target else {}, "cpu") for side in sides]
    parts = parts_of(sets[0], sets[1] if target else None, every_clip)
    request = Request(features, target, parts, held, classes, every_clip)
    if "localization" in tasks:
        check_localization(request, shape)
    if {"retrieval", "x_retrieval"} & set(tasks):
        check_retrieval(request, tasks)
    if "segmentation" in tasks:
        check_segmentation(request)
    if {"classification", "open_set"} & set(tasks):
        check_classes(request, tasks, known)


def check_localization(request: Request, shape: dict) -> None:
    annotated = [localized(side, shape) for side in request.sides]
    pairs = ordered_pairs(annotated[0], annotated[-1])
    if not pairs:
        raise InputError(f"{request.path('train')}: --tasks localization needs events/<modality> of two modalities, "
                         f"found those of {' '.join(dict.fromkeys(sum(annotated, []))) or 'none'}")
    for pair in pairs:
        for name, m in zip(("train", "test"), pair):
            part = request.parts[name]
            request.need("localization", name, len(part) and (request.target is None or part.events(m).any()),
                         f" (no clip with an event of a common class in {m})" * bool(request.target))


def check_retrieval(request: Request, tasks: tuple) -> None:
    test = request.parts["test"]
    for task in {"retrieval", "x_retrieval"} & set(tasks):
        if len(request.held[-1]) < 2 or len(groups(test.features, test.clips).unique()) < max(RANKS):
            raise InputError(f"{request.path('test')}: --tasks {task} needs two modalities and {max(RANKS)} clips or "
                             "groups in the test split")
    both = [m for m in request.held[0] if m in request.held[-1]]
    if "x_retrieval" in tasks and (len(both) < 3 or len(request.parts["train"]) == 0):
        raise InputError(f"{request.path('train')}: --tasks x_retrieval needs three modalities and a train split, "
                         f"found {' '.join(both)} and {len(request.parts['train'])} clips")


def check_segmentation(request: Request) -> None:
    both = [m for m in request.held[0] if m in request.held[-1]]
    maps = [(maps_with_masks(side, both), "mask" in side.files[0].h5 and side.files[0].h5["mask"].shape[2:])
            for side in request.sides]
    if len(maps[0][0]) != 1 or len(both) < 3 or maps[0] != maps[-1]:
        raise InputError(f"{request.path('train')}: --tasks segmentation needs masks of one size, a single modality of "
                         "maps whose cells divide them, and two other modalities to ask with")
    for split in ("train", "test"):
        if len(request.parts[split].labelled()) == 0:
            raise InputError(f"{request.path(split)}: no labelled clip in the {split} split, --tasks segmentation "
                             "needs them")


def check_classes(request: Request, tasks: tuple, known: tuple) -> None:
    single, classes = {name: part.single() for name, part in request.parts.items()}, request.classes
    wanted = wanted_classes(tasks, known, classes)
    for entry, numbers in wanted.items():
        names = ("train", "test") + ("val",) * (not request.every_clip and entry is not None)
        for name in names:
            request.need("open_set" if entry else "classification", name, len(single[name]),
                         " (no labelled clip with one event)")
        label = clean_parts(single, numbers, entry is None)[1] if not request.every_clip else {
            name: numbered(numbers, single[name].label, len(classes)) for name in names}
        for name in names:
            is_known = label[name] < len(numbers)
            if not is_known.any() or entry and "test" in name and is_known.all():
                lacking = "unknown" if is_known.any() else "known"
                raise InputError(f"{request.path(name)}: the {name} split has no {lacking} "
                                 f"classes" + (f" for --known {entry}" if entry else f" of {request.path('train')}"))


# ----------------------------------------------------------------------------------------------------------- protocols
def evaluate(model, encode, features: Features, modalities: list, codebook_size: int, device, tasks: tuple,
             known: tuple, score: str, target: Optional[Features] = None, class_map: tuple = ()):
    """The probes of `tasks` for a model: trained on `features`, tested on `target` or, without one, on their own test
    split.

    Returns ({tag: value}, {m: (K,) code selections on the test clips}). Leaves the model, its mode and the
    random state of the process as they were."""
    training, (classes, names) = model.training, class_names(features, target, class_map)
    read = partial(read_codes, model, encode, codebook_size=codebook_size, device=device)
    source = ProbeSet(features, classes, {}, device, read)
    parts = parts_of(source, ProbeSet(target, classes, names, device, read) if target else None)
    present = [[m for m in modalities if m in part.features.modalities] for part in (parts["train"], parts["test"])]
    pairs, both = ordered_pairs(*present), [m for m in present[0] if m in present[1]]
    wanted = wanted_classes(tasks, known, classes)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        model.eval()
        shown = parts["test"] if len(parts["test"]) else Part(parts["test"].of, np.arange(len(target or features)))
        tags, counts = codebook_metrics({m: shown.codes(m).index for m in present[1]}, codebook_size)
        tags = {f"eval/codebook/{name}": value for name, value in tags.items()}
        if wanted:
            tags |= clean({name: part.single() for name, part in parts.items()}, wanted, pairs, modalities, score)
        if "localization" in tasks:
            tags |= localization(parts, modalities)
        if "retrieval" in tasks:
            tags |= retrieval(parts["test"], present[1], modalities)
        if "x_retrieval" in tasks:
            tags |= x_retrieval(parts["train"], parts["test"], both, modalities)
        if "segmentation" in tasks:
            tags |= segmentation(parts["train"].labelled(), parts["test"].labelled(), both, modalities)
        model.train(training)
    return tags, counts


def wanted_classes(tasks: tuple, known: tuple, classes: list) -> dict:
    """{None or --known: numbers of the known classes} of the probes of clips: None is classification of all classes."""
    wanted = {None: list(range(len(classes)))} if "classification" in tasks else {}
    return wanted | (known_sets(known, classes) if "open_set" in tasks else {})


def numbered(numbers: list, label, classes: int):
    """Labels (N,) by their place among the known classes `numbers`; all others become len(numbers), unknown."""
    place = torch.full((classes + 1,), len(numbers), device=label.device)
    place[torch.tensor(numbers, device=label.device)] = torch.arange(len(numbers), device=label.device)
    return place[label]


def clean_parts(parts: dict, numbers: list, closed: bool):
    """({name: Part} as a clean probe of the known classes `numbers` uses them, {name: labels} by place among those
    classes, len(numbers) for the unknown ones). Parts of single labelled clips; `closed`: there are no unknown ones.

    Between two files, known classes without a training clip are left out, and of a closed set also those untested."""
    total, used = len(parts["train"].of.classes), dict(parts)
    if parts["test"].of is not parts["train"].of:
        known = torch.tensor(numbers, device=parts["train"].label.device)
        taught = known[torch.isin(known, parts["train"].label)]
        taught = taught[torch.isin(taught, parts["test"].label)] if closed else taught
        for name in ("train", "val", "same", "test"):
            label = parts[name].label
            keep = torch.isin(label, taught)
            keep = keep if closed else keep | ~torch.isin(label, known)
            used[name] = parts[name][keep.cpu()]
    return used, {name: numbered(numbers, part.label, total) for name, part in used.items()}


def clean(parts, wanted, pairs, modalities, score) -> dict:
    """Nothing is chosen with test labels. parts {name: Part}, wanted {None or --known: known classes} -> tags"""
    tags = {}
    for source, (entry, numbers) in itertools.product(dict.fromkeys(a for a, _ in pairs), wanted.items()):
        used, label = clean_parts(parts, numbers, entry is None)
        keep, known = label["train"] < len(numbers), len(numbers)
        seen = used["train"].codes(source)[keep]
        run = ProbeTraining(partial(ClipProbe, seen.rows.shape[-1], known), label["train"].device)
        for _ in range(EPOCHS):
            run.epoch(seen, label["train"][keep])
        if entry is None:
            same = used["same"].codes(source) if len(used["same"]) else None
            same = {"acc_same": accuracy(run.logits(same).argmax(-1), label["same"])["acc"]} if same else {}
        else:
            held_out = used["val"].codes(source)[label["val"] < known]
            held_out = known_scores(run.logits(held_out), held_out, seen)
            threshold = {name: value.quantile(REJECT).item() for name, value in held_out.items()}
        for target in (b for a, b in pairs if a == source):
            codes, true = used["test"].codes(target), label["test"]
            logits, is_known = run.logits(codes), true < known
            prediction = logits.argmax(-1)
            if entry is None:
                result = accuracy(prediction, true)
                result = {"acc": result["acc"], **same, "macro_recall": result["macro_recall"]}
            else:
                scores = known_scores(logits, codes, seen)
                every = {name: open_set_metrics(value, prediction, true, known, threshold[name])
                         for name, value in scores.items()}
                result = {**every[score], "hos_oracle": oracle_hos(scores[score], prediction, true, known)}
                area = {name: auroc(value[is_known], value[~is_known]) for name, value in scores.items()}
                none_rejected = open_set_metrics(scores[score], prediction, true, known, -math.inf)
                result |= {"auroc": area[score], "acc_known": none_rejected["os_star"]}
                result |= {f"hos_{name}": every[name]["hos"] for name in SCORES}
                result |= {f"auroc_{name}": area[name] for name in SCORES}
            path = f"eval/{'classification' if entry is None else f'open_set_{entry}'}"
            tags |= {f"{path}/{direction(source, target, modalities)}/{n}": value for n, value in result.items()}
    return tags


def oracle_hos(confidence, prediction, target, num_known: int) -> float:
    """The best HOS over all thresholds, found on the test clips: what a perfect threshold would give this probe."""
    ascending = confidence.argsort()
    first = torch.searchsorted(confidence[ascending], confidence[ascending])  # ties are rejected or accepted together
    known = target[ascending] < num_known
    right = (known & (prediction == target)[ascending]).double()
    os_star = ((right.sum() - right.cumsum(0) + right) / known.sum().clamp(min=1))[first]  # i accepts i, i+1, ..
    unk = (((~known).cumsum(0) - (~known).long()) / (~known).sum().clamp(min=1))[first]
    return (2 * os_star * unk / (os_star + unk).clamp(min=1e-12)).max().item()


def annotated(part: Part, modality: str, own_target: bool):
    """A part's clips with an event of its classes (all of them unless the target is a file of its own), what happens in
    them (n, T, C + 1), the last column being background, and which clips of the part they are"""
    happens = part.events(modality)
    keep = happens.any((1, 2)) | (not own_target)
    happens = torch.from_numpy(happens[keep]).to(part.of.device).float()
    return part[keep], torch.cat([happens, 1 - happens.amax(-1, keepdim=True)], -1), keep


def localization(parts, modalities) -> dict:
    """What happens when: a probe of every segment, trained on one modality and its events, tested on another and its.

    With a target of its own, clips in which nothing known happens are left out. parts {name: Part} -> tags"""
    tags, own_target = {}, parts["test"].of is not parts["train"].of
    pairs = ordered_pairs(*(localized(parts[name].features, modalities) for name in ("train", "test")))
    for source in dict.fromkeys(a for a, _ in pairs):
        part, event, _ = annotated(parts["train"], source, own_target)
        width, classes = part.codes(source).rows.shape[-1], len(part.of.classes)
        run = ProbeTraining(partial(SegmentProbe, width, classes, (width,), False), event.device)
        for _ in range(EPOCHS):
            run.epoch(part.codes(source), event)
        for target in (b for a, b in pairs if a == source):
            test, true, _ = annotated(parts["test"], target, own_target)
            score = run.logits(test.codes(target)).sigmoid()
            foreground = segment_metrics(score[..., :-1], true[..., :-1])
            result = segment_metrics(score, true) | {"f1_foreground": foreground["f1"], **constant_f1(true)}
            path = f"eval/localization/{direction(source, target, modalities)}"
            tags |= {f"{path}/{name}": value for name, value in result.items()}
    return tags


def items(part: Part, modality: str):
    """The items of a modality among these clips: mean codes (I, D), group (I,), label (I,), on the host. Rows of one
    group with the same features, such as the sound beside each of its captions, are one item."""
    group, rows = groups(part.features, part.clips), torch.arange(len(part))
    if len(group.unique()) < len(part):
        seen = {}  # (group, digest of the features) -> first row
        for i in range(0, len(part), 200):
            for row, x in enumerate(part.features.read(modality, part.clips[i:i + 200]), i):
                seen.setdefault((group[row].item(), hashlib.sha256(x).digest()), row)
        rows = torch.tensor(list(seen.values()))
    label = torch.from_numpy(part.features.label[part.clips])  # the file's own: nothing is learned of classes
    return part[rows].codes(modality).mean().cpu(), group[rows], label[rows]


def chance(of, among, k: int) -> float:
    """`recall_at_k` of a random order: groups of (Q,) and among (I,), mean of 1 - C(I - g, k) / C(I, k), g right."""
    right = (of[:, None] == among).double().sum(1)  # (Q,)
    miss = [(len(among) - right - i).clamp(min=0) / (len(among) - i) for i in range(k)]
    return (1 - torch.stack(miss).prod(0)).mean().item()


def retrieval(part, present, modalities) -> dict:
    """Zero-shot: of the test clips, which items of b are nearest to an item of a, by the cosine of their mean codes?

    An item is right if it comes from the same clip or group (`r1`, `r5`, `r10`), or has the same class (`class_r1`);
    beside them what chance gives (`chance_r1`, `class_chance_r1`). Of a Part and the modalities it holds -> tags"""
    item, tags = {m: items(part, m) for m in present}, {}
    for a, b in itertools.permutations(present, 2):
        (query, of, query_label), (database, among, label) = item[a], item[b]
        tally, some = {"queries": len(query), "database": len(database)}, query_label >= 0
        for k in RANKS:
            tally[f"r{k}"], tally[f"chance_r{k}"] = recall_at_k(query, database, of, among, k), chance(of, among, k)
        for k in RANKS if some.any() else ():
            tally[f"class_r{k}"] = recall_at_k(query[some], database, query_label[some], label, k)
            tally[f"class_chance_r{k}"] = chance(query_label[some], label, k)
        tags |= {f"eval/retrieval/{direction(a, b, modalities)}/{name}": value for name, value in tally.items()}
    for a, b in itertools.combinations(present, 2):  # both directions
        ways = direction(a, b, modalities), direction(b, a, modalities)
        for k in RANKS:
            tags[f"eval/retrieval/{'+'.join(ways)}/r{k}"] = sum(tags[f"eval/retrieval/{w}/r{k}"] for w in ways) / 2
    return tags


def x_retrieval(train, test, present, modalities) -> dict:
    """Uni-Code's Table 5: a map from the mean codes of one modality to those of another is trained; a third modality's
    codes go through it, untouched, to retrieve the other's. Two Parts and the modalities that both hold -> tags

    The map is linear, begins as the identity and learns by InfoNCE over the batch which clip belongs to which. Tags
    `a2b_to_c`: trained with queries of a, tested with queries of b; `same_r10` are those of a, `zero_r10` b's without
    any map. What is right is as in `retrieval`."""
    tags, item, device = {}, {m: items(test, m) for m in present}, train.of.device
    first = np.unique(groups(train.features, train.clips).numpy(), return_index=True)[1]
    paired = {m: F.normalize(train[first].codes(m).mean(), dim=-1) for m in present}  # one row a group
    for source, target in itertools.permutations(present, 2):
        width = paired[source].shape[-1]
        torch.manual_seed(0)
        project = nn.Linear(width, width, bias=False).to(device)
        nn.init.eye_(project.weight)
        optimizer = torch.optim.Adam(project.parameters(), lr=LEARNING_RATE, fused=True)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(first)).to(device).split(BATCH_SIZE):
                query = F.normalize(project(paired[source][rows]), dim=-1)
                logits = query @ paired[target][rows].T / TEMPERATURE
                optimizer.zero_grad()
                F.cross_entropy(logits, torch.arange(len(rows), device=device)).backward()
                optimizer.step()
        project, (database, among, label) = project.cpu().requires_grad_(False), item[target]
        for asking in present:
            if asking in (source, target):
                continue
            query, of, query_label = item[asking]
            path = f"eval/x_retrieval/{direction(source, asking, modalities)}_to_{target}"
            tags |= {f"{path}/r{k}": recall_at_k(project(query), database, of, among, k) for k in RANKS}
            tags[f"{path}/zero_r10"] = recall_at_k(query, database, of, among, 10)
            tags[f"{path}/same_r10"] = recall_at_k(project(item[source][0]), database, item[source][1], among, 10)
            tags[f"{path}/chance_r10"], some = chance(of, among, 10), query_label >= 0
            if some.any():
                tags[f"{path}/class_r10"] = recall_at_k(project(query[some]), database, query_label[some], label, 10)
                tags[f"{path}/class_chance_r10"] = chance(query_label[some], label, 10)
    return tags


class QueryDecoder(nn.Module):
    """Maps of B clips (B, T, H, W, d) and a query each (B, D) -> mask logits (B, T, H * p, W * q), a cell p x q pixels.

    The query scales and shifts (FiLM) what a linear map finds in each cell; two layers draw the cell."""

    def __init__(self, width: int, code_width: int, cell: tuple):
        super().__init__()
        self.cell, hidden = cell, 64
        self.look, self.ask = nn.Linear(width, hidden), nn.Linear(code_width, 2 * hidden)
        self.draw = nn.Sequential(nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, cell[0] * cell[1]))
        nn.init.constant_(self.draw[-1].bias, -5.0)  # few pixels belong to any one thing

    def forward(self, maps, query):
        scale, shift = self.ask(query)[:, None, None, None].chunk(2, -1)
        cells = self.draw(self.look(maps) * (1 + scale) + shift).unflatten(-1, self.cell)  # (B, T, H, W, p, q)
        return cells.permute(0, 1, 2, 4, 3, 5).flatten(4, 5).flatten(2, 3)


def frames(part: Part, seen: str, rows):
    """Of these clips of a part: maps (B, T, H, W, d), masks (B, T, h, w) of their labelled class, and which frames have
    one (B, T)"""
    features, number = part.features, part.clips[rows.numpy()]
    mask = features.read("mask", number)
    asked, known = mask == features.label[number][:, None, None, None] + 1, (mask != NOT_ANNOTATED).all((2, 3))
    maps, asked, known = (torch.from_numpy(x).to(part.of.device) for x in (features.read(seen, number), asked, known))
    return maps.float(), asked.float(), known


def event_code(part: Part, modality: str, present: list):
    """The query of each clip (N, D): its mean code over the segments in which its event happens, in a modality without
    annotation, such as a sentence, over all"""
    codes, label = part.codes(modality), part.features.label[part.clips]
    happens = np.ones(codes.index.shape, bool)
    if modality in localized(part.features, present):
        happens = part.features.read(f"events/{modality}", part.clips)[np.arange(len(label)), :, label] > 0
    return codes.mean(torch.from_numpy(happens).to(part.of.device))


def fit_decoders(train: Part, seen: str, query: dict) -> dict:
    """{name: queries (N, D)} -> {name: QueryDecoder}, alike at the start and trained on the same batches"""
    device, shape = train.of.device, train.features.shape[seen]
    cell = tuple(a // b for a, b in zip(train.features.files[0].h5["mask"].shape[2:], shape[1:3]))
    torch.manual_seed(0)
    one = QueryDecoder(shape[-1], next(iter(query.values())).shape[-1], cell).to(device)
    decoder = {name: copy.deepcopy(one) for name in query}
    parameters = [p for d in decoder.values() for p in d.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=MASK_LEARNING_RATE, fused=True)
    for _ in range(MASK_EPOCHS):
        for rows in torch.randperm(len(train)).split(BATCH_SIZE):
            (maps, mask, known), rows = frames(train, seen, rows), rows.to(device)
            t = known.any(0).nonzero()[:, 0]
            t = t[torch.randperm(len(t))[:MASK_FRAMES].to(device)]
            known = known[:, t]
            optimizer.zero_grad()
            drawn = [d(maps[:, t], query[name][rows])[known] for name, d in decoder.items()]
            sum(F.binary_cross_entropy_with_logits(logits, mask[:, t][known]) for logits in drawn).backward()
            optimizer.step()
    return decoder


def segmentation(train, test, present, modalities) -> dict:
    """Which pixels are what the query asks for? A decoder over the maps, trained with queries of one modality and
    tested with those of another, on every frame. Two Parts of labelled clips, the modalities of both -> tags

    Controls: `miou_shuffled_query` (of another clip), `miou_constant_query` (of the first clip, for all),
    `miou_no_query` (a decoder trained without one), `miou_nothing` (no pixel); `several_*` are of clips with several
    events, where only the query says which is meant. Maps and masks are read batch by batch."""
    (seen,), device = maps_with_masks(train.features, present), train.of.device
    tags, asking = {}, [m for m in present if m != seen]
    taught, right = ({m: event_code(part, m, present) for m in asking} for part in (train, test))
    nobody = torch.zeros(1, taught[asking[0]].shape[-1], device=device)
    decoder = fit_decoders(train, seen, {None: nobody.expand(len(train), -1), **taught})
    several = torch.from_numpy(~np.isin(test.clips, test.features.single_event(test.clips)))
    other = torch.randperm(len(test), generator=torch.Generator().manual_seed(0)).to(device)
    asked = {}  # {(trained with, tested with, control): (N, D)}
    for source, target in itertools.permutations(asking, 2):
        query = right[target]
        asked |= {(source, target, ""): query, (source, target, "shuffled_query"): query[other],
                  (source, target, "constant_query"): query[:1].expand_as(query)}
    asked[None, None, "no_query"], nothing = nobody.expand(len(test), -1), (None, None, "nothing")
    iou, curves = {key: [] for key in (*asked, nothing)}, {key: [] for key in asked if key[2] == ""}
    with torch.no_grad():
        for rows in torch.arange(len(test)).split(BATCH_SIZE):
            maps, mask, known = frames(test, seen, rows)
            drawn = {key: decoder[key[0]](maps, query[rows.to(device)]).sigmoid() for key, query in asked.items()}
            for key, probability in (drawn | {nothing: torch.zeros_like(mask)}).items():
                found = mask_iou(probability, mask).view(known.shape)
                iou[key].append(torch.where(known, found, torch.nan).cpu())
            for key, curve in curves.items():
                curve.append(mask_curve(drawn[key][known], mask[known]))
    iou = {key: torch.cat(batches) for key, batches in iou.items()}  # (N, T) each
    for source, target in itertools.permutations(asking, 2):
        path = f"eval/segmentation/{direction(source, target, modalities)}"
        found = {"_".join(filter(None, ("miou", control))): value for (trained, tested, control), value in iou.items()
                 if (trained, tested) in ((source, target), (None, None))}
        tags |= {f"{path}/{name}": value.nanmean().item() for name, value in found.items()}
        tags[f"{path}/f_score"] = torch.cat(curves[source, target, ""]).mean(0).max().item()
        if several.any():
            tags |= {f"{path}/several_{name}": value[several].nanmean().item() for name, value in found.items()}
    return tags


def show_codebook(writer, codebook, selections: dict, step: int) -> None:
    """TensorBoard: the codebook in the projector, labelled with the modalities that use each code, and a usage picture.

    selections {m: (K,)}: a modality uses a code if it makes at least SHARE of the code's selections (MICU, Fig. 6)."""
    modalities, counts = list(selections), torch.stack(list(selections.values()))
    share = counts / counts.sum(0).clamp(min=1)
    labels = ["+".join(m for m, s in zip(modalities, column) if s >= SHARE) or "unused" for column in share.T.tolist()]
    writer.add_embedding(codebook.cpu(), labels, tag="codebook", global_step=step)
    rows = counts[:, counts.sum(0).argsort(descending=True)].sqrt()
    picture = (rows / rows.amax(1, keepdim=True).clamp(min=1)).repeat_interleave(24, 0).repeat_interleave(2, 1)
    writer.add_image("codebook/usage", picture, step, dataformats="HW")  # one band a modality, codes by total use


def table(tags: dict) -> str:
    """The `eval/` tags in plain columns: fractions in percent with one decimal, counts as they are."""
    tasks = {}
    for tag, value in tags.items():
        _, task, *where, metric = tag.split("/")
        if task == "codebook":
            where, metric = [metric], "value"
        if metric.removeprefix("hos_").removeprefix("auroc_") in SCORES:
            continue  # in results.json
        plain = task == "codebook" and where[0].startswith(("used", "perplexity")) or metric in ("queries", "database")
        tasks.setdefault(task, {}).setdefault(where[0], {})[metric] = f"{value:.0f}" if plain else f"{100 * value:.1f}"
    lines = []
    for task, rows in tasks.items():
        metrics = list(next(iter(rows.values())))
        widths = [max(len(name), 6) for name in metrics]
        lines += ["", f"{task:19}" + "  ".join(f"{name:>{w}}" for name, w in zip(metrics, widths))]
        lines += [f"  {row:17}" + "  ".join(f"{values.get(name, '-'):>{w}}" for name, w in zip(metrics, widths))
                  for row, values in rows.items()]
    return "\n".join(lines[1:])


# -------------------------------------------------------------------------------------------------------- command line
def load(path: Path):
    """A run folder or its checkpoint.pt -> module of the method, its Args, {m: shape}, the model, the epochs it was
    trained for. Raises InputError."""
    path = path / "checkpoint.pt" if path.is_dir() else path
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["method"] not in SCRIPTS:
            raise ValueError(f"its method is {state['method']}")
        method = importlib.import_module(state["method"])
        args, shape = method.Args(**state["args"]), state["shape"]
        model = method.Model(shape, args)
        model.load_state_dict({name.removeprefix("model."): value for name, value in state["modules"].items()
                               if name.startswith("model.")})
        return method, args, shape, model, state["epoch"]
    except Exception as error:  # whatever is wrong with the file, the user needs one line
        raise InputError(f"{path}: not a checkpoint of these scripts ({first_line(error)})")


def main(paths: tyro.conf.Positional[tuple[str, ...]], *, tasks: tuple[Literal[TASKS], ...] = (),
         known: tuple[str, ...] = (), score: Optional[Literal[SCORES]] = None, target: tuple[str, ...] = (),
         class_map: tuple[str, ...] = (), out: Optional[str] = None, device: str = "auto") -> None:
    """Probe the model of RUN (a run folder or its checkpoint.pt) on FILE ... (default: the data it was trained on).

    Args:
        paths: RUN [FILE ...]
        tasks: what is probed, see docs/tasks.md; default: as the run.
        known: open-set tasks: a number of known first classes, or class numbers such as 0,2,4; default: as the run.
        score: by which unknown clips are told from known ones in what is printed; default: as the run.
        target: files to test on, of clips, modalities and classes of their own; default: the test split of FILE ...
        class_map: names of the target's classes that differ, each as "target's name=source's name".
        out: a JSON file for all figures, those of the other scores as well.
        device: `auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1`."""
    if not paths:
        raise InputError("give a run folder")
    if out and not Path(out).resolve().parent.is_dir():
        raise InputError(f"--out {out}: the folder does not exist")
    run, *files = paths
    method, args, shape, model, _ = load(Path(run))
    known, score, device = known or args.known, score or args.score, pick_device(device)
    if not files and not target:
        target, class_map = args.probe_target, class_map or args.class_map
    features = Features(data_files(files or args.probe_data or args.data, args.runs_dir))
    target = Features(data_files(target, args.runs_dir)) if target else None
    tasks = tasks or args.tasks or default_tasks(features)
    check_request(features, shape, tasks, known, target, class_map)
    tags, _ = evaluate(model.to(device), method.encode, features, list(shape), args.codebook_size, device, tasks, known,
                       score, target, class_map)
    if out:
        Path(out).write_text(json.dumps(tags, indent=1) + "\n")
    print(table(tags))


if __name__ == "__main__":
    sys.excepthook = explain_input_errors
    tyro.cli(main)

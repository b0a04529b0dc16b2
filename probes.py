"""Frozen-probe protocols: a probe trained on the codes of one modality is tested, untouched, on those of another.

    python probes.py RUN                                      probe a finished run again, on its own data
    python probes.py RUN FILE --tasks localization retrieval  other tasks, on another cmg-features file
    python probes.py RUN --tasks open_set --known 3 5 7 0,2,4 --score energy
    python probes.py RUN ucf.h5 --target vgg.h5 --class-map "playing cello=PlayingCello"    tested on another file

The encoder is in eval mode, a probe that of its last epoch, the open-set threshold from held-out clips: nothing is
chosen with test labels (what the released scripts do: `python -m official.protocol RUN`). A model comes with
`encode(model, features, modality) -> (quantized (N, T, D), code_index (N, T))`, one vector a code.
"""
import hashlib
import importlib
import itertools
import math
import os
import signal
import sys
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro

from data import NOT_ANNOTATED, Features
from pictures import SHARE, show, table
from run import (RANK, InputError, explain_input_errors, first_line, log_lines, note, pick_device, require_shape,
                 write_json)

SCRIPTS = ("uni_code", "micu", "codaar", "benchmarks.comparators")  # the only modules that a checkpoint may name
DEFAULT_TASKS = ("classification", "open_set")  # as far as the clips allow
BY_CLASS = {"classification", "open_set", "localization"}  # tasks for which source and target need classes in common
SCORES = ("softmax", "logit", "energy", "distance")  # by which unknown clips may be told from known ones
EPOCHS, LEARNING_RATE, BATCH_SIZE = 5, 4e-4, 80  # of the probes; by then the held-out source loss has levelled
REJECT = 0.05  # share of held-out known source clips that the open-set threshold rejects
NOT_LEARNED = 0.8  # a loss that stays above this part of what guessing gives has not learned
COLLAPSE = 5  # perplexity below which hardly a code is in use
RANKS = (1, 5, 10)  # of retrieval
TEMPERATURE = 0.1  # of the map that x_retrieval learns
MASK_EPOCHS, MASK_LEARNING_RATE, MASK_FRAMES = 10, 3e-3, 3  # of the segmentation decoder; frames of a clip a step


# ------------------------------------------------------------------------------------------------------------- metrics
def accuracy(prediction, target) -> dict:
    """Clip accuracy and the mean over the classes present of class recall; both (N,) int, fractions in [0, 1]."""
    require_shape("target", target, (len(prediction),))
    correct = (prediction == target).double()
    recall = torch.stack([correct[target == c].mean() for c in target.unique()])
    return {"acc": correct.mean().item(), "macro_recall": recall.mean().item()}


def open_set_metrics(confidence, prediction, target, num_known: int, threshold: float) -> dict:
    """OS*, UNK and HOS (MICU 4.1); all (N,), target >= num_known is unknown, confidence < threshold is rejected.
    `os_star`: share of the known clips accepted and classified right, `os_star_class_mean`: its mean over the known
    classes present; `unk`: share of the unknown clips rejected; `hos`: their harmonic mean. 0 of nothing."""
    for tensor in (confidence, prediction, target):
        require_shape("one of confidence, prediction, target", tensor, (len(target),))
    known = target < num_known
    accepted = confidence >= threshold
    right = (accepted & (prediction == target)).double()
    per_class = [right[target == c].mean() for c in target[known].unique()]
    os_star = right[known].mean().nan_to_num().item()
    unk = (~accepted[~known]).double().mean().nan_to_num().item()
    return {"os_star": os_star, "os_star_class_mean": torch.stack(per_class).mean().item() if per_class else 0.0,
            "unk": unk, "hos": 2 * os_star * unk / max(os_star + unk, 1e-12)}


def hos_curve(confidence, prediction, target, num_known: int):
    """HOS of `open_set_metrics` at every threshold that makes a difference; all (N,) -> the thresholds, which are the
    confidences in ascending order (N,), and HOS at each (N,)"""
    order = confidence.argsort()
    ascending = confidence[order]
    first = torch.searchsorted(ascending, ascending)  # ties are rejected or accepted together
    known = target[order] < num_known
    right = (known & (prediction == target)[order]).double()
    os_star = ((right.sum() - right.cumsum(0) + right) / known.sum().clamp(min=1))[first]  # i accepts i, i+1, ..
    unk = (((~known).cumsum(0) - (~known).long()) / (~known).sum().clamp(min=1))[first]
    return ascending, 2 * os_star * unk / (os_star + unk).clamp(min=1e-12)


def paired_threshold(source_accepts, source_prediction, target_confidence, target_prediction, num_known: int) -> float:
    """The target's open-set threshold from pairs without labels: at which its decisions agree best, by HOS, with what
    the source says of its half of each pair: a class, or nothing where it does not accept. All (N,), N > 0; where the
    source rejects none or all of them, the lowest confidence. Raises ValueError on unequal shapes."""
    for tensor in (source_prediction, target_confidence, target_prediction):
        require_shape("one of source_prediction, target_confidence, target_prediction", tensor, (len(source_accepts),))
    told = torch.where(source_accepts, source_prediction, num_known)
    thresholds, hos = hos_curve(target_confidence, target_prediction, told, num_known)
    return thresholds[hos.argmax()].item()


def auroc(score_positive, score_negative) -> float:
    """Probability that a random positive scores above a random negative, ties counting half; (P,), (N,)."""
    negative = score_negative.double().sort().values
    positive = score_positive.double().contiguous()
    below = torch.searchsorted(negative, positive) + torch.searchsorted(negative, positive, right=True)
    return (below.double().mean() / (2 * len(negative))).item()


def segment_metrics(scores, target, threshold: float = 0.5) -> dict:
    """Pooled precision, recall and F1, 0 of nothing, of multi-hot labels; scores and target (..., C), a score above the
    threshold predicts. Raises ValueError on unequal shapes."""
    require_shape("target", target, scores.shape)
    predicted, true = scores > threshold, target > 0.5
    hits = (predicted & true).sum().item()
    precision, recall = hits / max(predicted.sum().item(), 1), hits / max(true.sum().item(), 1)
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / max(precision + recall, 1e-12)}


def constant_f1(target) -> dict:
    """The floor of localisation: F1 of whoever predicts one column everywhere (the best one) or all; target (..., C)"""
    columns = torch.eye(target.shape[-1], device=target.device)
    best = max(segment_metrics(column.expand(target.shape), target)["f1"] for column in columns)
    return {"f1_constant": best, "f1_everything": segment_metrics(torch.ones_like(target), target)["f1"]}


def recall_at_k(query, database, query_group, database_group, k: int) -> float:
    """Share of queries with an item of their group among the k nearest by cosine; (Q, D), (N, D), (Q,), (N,). Raises
    ValueError on other shapes."""
    require_shape("query", query, (-1, -1))
    require_shape("database", database, (-1, query.shape[1]))
    require_shape("query_group", query_group, (len(query),))
    require_shape("database_group", database_group, (len(database),))
    if not 1 <= k <= len(database):
        raise ValueError(f"k {k} is not in 1..{len(database)}, the size of the database")
    similarity = F.normalize(query, dim=-1) @ F.normalize(database, dim=-1).T  # (Q, N)
    nearest = database_group[similarity.topk(k).indices]  # (Q, k)
    return (nearest == query_group[:, None]).any(1).double().mean().item()


def chance(query_group, database_group, k: int) -> float:
    """`recall_at_k` of a random order, (Q,) and (N,): mean of 1 - C(N - g, k) / C(N, k), g items of N being right."""
    size, drawn = len(database_group), torch.arange(k)[:, None]
    right = (query_group[:, None] == database_group).double().sum(1)  # (Q,)
    miss = (size - right - drawn).clamp(min=0) / (size - drawn)  # (k, Q)
    return (1 - miss.prod(0)).mean().item()


def mask_iou(probability, target):
    """Intersection over union of each frame at 0.5, (..., H, W) each -> (frames,); without a mask, the share of pixels
    left empty. Raises ValueError on unequal shapes."""
    require_shape("probability", probability, (*probability.shape[:-2], -1, -1))
    require_shape("target", target, probability.shape)
    predicted = probability.reshape(-1, *target.shape[-2:]).flatten(1) > 0.5  # (frames, H * W)
    true = target.reshape(-1, *target.shape[-2:]).flatten(1) > 0.5
    overlap = (predicted & true).sum(1) / (predicted | true).sum(1).clamp(min=1).double()
    return torch.where(true.any(1), overlap, (~predicted).double().mean(1))


def mask_curve(probability, target):
    """F-score (beta^2 = 0.3) of each frame with a mask at 255 thresholds in [0, 1): (..., H, W) each -> (n, 255)"""
    pixels = probability.shape[-2] * probability.shape[-1]
    at_once = 1 + 4_000_000 // pixels  # frames
    thresholds = torch.linspace(0, 1 - 1e-10, 255, dtype=torch.double, device=probability.device)
    curves = [torch.zeros(0, 255)]
    target = (target > 0.5).reshape(-1, pixels)
    for p, true in zip(probability.reshape(-1, pixels).split(at_once), target.split(at_once)):
        p, true = p[true.any(1)].double(), true[true.any(1)].double()
        # how many thresholds each pixel reaches, then for each threshold how many pixels reach it
        reached, none = torch.bucketize(p, thresholds, right=True), p.new_zeros(len(p), 256)
        found = none.scatter_add(1, reached, torch.ones_like(p)).flip(1).cumsum(1).flip(1)[:, 1:]
        hits = none.scatter_add(1, reached, true).flip(1).cumsum(1).flip(1)[:, 1:]
        precision, recall = hits / found.clamp(min=1), hits / true.sum(1, keepdim=True)
        curves.append((1.3 * precision * recall / (0.3 * precision + recall).clamp(min=1e-12)).cpu())
    return torch.cat(curves)


def mask_metrics(probability, target) -> dict:
    """Mean `mask_iou`, and the best F-score over the thresholds of the mean `mask_curve`, 0 without any mask."""
    miou = mask_iou(probability, target).mean().item()
    return {"miou": miou, "f_score": mask_curve(probability, target).mean(0).max().nan_to_num().item()}


def code_sharing(counts, share: float) -> dict:
    """Of the codes in use, the parts shared by 1..M modalities: counts (M, K) selections; a modality has a code if it
    makes at least `share` of its selections. `shared_i` counts codes, `weighted_i` their selections (MICU, Fig. 6)."""
    require_shape("counts", counts, (-1, -1))
    total, figures = counts.sum(0).double(), {}
    owners = ((counts / total >= share) & (total > 0)).sum(0)  # (K,) modalities sharing each code, 0 if unused
    for i in range(1, len(counts) + 1):
        figures[f"shared_{i}"] = ((owners == i).sum() / (total > 0).sum().clamp(min=1)).item()
        figures[f"weighted_{i}"] = (total[owners == i].sum() / total.sum().clamp(min=1)).item()
    return figures


def codebook_metrics(code_index: dict, codebook_size: int):
    """Health of the code: {m: (N, T) int} -> (tags, selections {m: (K,)}). Agreement is over pairs of modalities;
    `agreement_chance` is what choices of the same frequencies would give if they were independent."""
    tags, selections = {}, {}
    for m, index in code_index.items():
        counts = index.flatten().bincount(minlength=codebook_size).cpu()
        tags[f"used_{m}"] = (counts > 0).sum().item()
        tags[f"perplexity_{m}"] = torch.special.entr(counts.double() / counts.sum()).sum().exp().item()
        selections[m] = counts
    if len(code_index) > 1:
        pairs = list(itertools.combinations(code_index, 2))
        equal = [(code_index[a] == code_index[b]).double().mean() for a, b in pairs]
        share = {m: counts.double() / counts.sum() for m, counts in selections.items()}
        tags["agreement"] = torch.stack(equal).mean().item()
        tags["agreement_chance"] = torch.stack([share[a] @ share[b] for a, b in pairs]).mean().item()
        tags |= code_sharing(torch.stack(list(selections.values())), SHARE)
    return tags, selections


@torch.no_grad()
def codebook_health(quantizer, code_index: dict) -> dict:
    """Tags for the log, tensors (): codes used, their perplexity exp(H) and resets since the last call, and agreement,
    the share of this batch's segments at which two modalities chose one code; code_index {m: (B, T)}"""
    share = quantizer.usage / quantizer.usage.sum(1, keepdim=True)
    perplexity = torch.special.entr(share).sum(1).exp()
    tags = {}
    for i, m in enumerate(code_index):
        tags[f"codebook/used_{m}"] = (quantizer.usage[i] > 0).sum()
        tags[f"codebook/perplexity_{m}"] = perplexity[i]
    pairs = itertools.combinations(code_index.values(), 2)
    tags["codebook/agreement"] = torch.stack([(a == b).float().mean() for a, b in pairs]).mean()
    tags["codebook/resets"] = quantizer.resets.clone()
    quantizer.usage.zero_()
    quantizer.resets.zero_()
    return tags


# ---------------------------------------------------------------------------------------------------- codes and probes
@dataclass
class Codes:
    """Discrete codes of clips: `index` (N, T) int64 points into `rows` (K, D), the vectors of the codes that occur."""
    rows: torch.Tensor
    index: torch.Tensor

    def __getitem__(self, clips):
        return Codes(self.rows, self.index[clips])

    def __len__(self):
        return len(self.index)

    def each(self, function):
        """`function` of the vector of every segment (N, T, ...), worked out once for each code that occurs."""
        used, index = self.index.unique(return_inverse=True)
        return F.embedding(index, function(self.rows[used]))

    def mean(self, where=True):
        """Mean code of each clip (N, D), over the segments `where` (N, T) if given; over all of a clip without any."""
        where = torch.ones_like(self.index, dtype=torch.bool) & where
        where = where | ~where.any(1, keepdim=True)
        weight, means = where / where.sum(1, keepdim=True), []
        for i in range(0, len(self), 1000):
            means.append((weight[i:i + 1000, None] @ F.embedding(self.index[i:i + 1000], self.rows))[:, 0])
        return torch.cat(means)


@torch.no_grad()
def read_codes(model, encode, features: Features, modality: str, clips, codebook_size: int, device, rows=None) -> Codes:
    """The codes of the clips with these numbers, encoded in the model's present mode; `rows`: those known so far."""
    # filled in piece by piece: small pieces kept between large ones that come and go would break up the heap
    index = torch.empty(len(clips), features.shape[modality][0], dtype=torch.long, device=device)
    for i in range(0, len(clips), 200):
        x = torch.from_numpy(features.read(modality, clips[i:i + 200])).to(device).float()
        if not x.isfinite().all():
            raise InputError(f"NaN or infinity in {modality}: python data.py check FILE says where")
        quantized, batch = encode(model, x, modality)
        if rows is None:
            rows = quantized.new_zeros(codebook_size, quantized.shape[-1])
        rows[batch.flatten()] = quantized.flatten(0, 1)  # a code is one vector
        index[i:i + 200] = batch
    return Codes(rows, index)


class ClipProbe(nn.Module):
    """Codes of B clips -> class logits (B, C): linear (once for each code), maximum over the segments, linear."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.hidden, self.classify = nn.Linear(width, width), nn.Linear(width, classes)

    def forward(self, codes):
        return self.classify(codes.each(self.hidden).amax(1))

    def loss(self, codes, target):
        return F.cross_entropy(self(codes), target)


class SegmentProbe(nn.Module):
    """Codes of B clips -> logits (B, T, C + 1) of every segment on its own, the last one of background: two layers."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, width), nn.Linear(width, classes + 1))

    def forward(self, codes):
        return codes.each(self.layers)

    def loss(self, codes, target):
        return F.binary_cross_entropy_with_logits(self(codes), target)


class ProbeTraining:
    """A probe and its optimisation: Adam, halved after 10, 20 and 30 epochs, gradient norm clipped at 0.5."""

    def __init__(self, probe, device, learning_rate: float = LEARNING_RATE, batch_size: int = BATCH_SIZE):
        torch.manual_seed(0)  # the same start and order for every probe, whichever others are trained
        self.probe, self.batch_size = probe().to(device), batch_size
        self.generator = torch.Generator().manual_seed(0)
        self.optimizer = torch.optim.Adam(self.probe.parameters(), lr=learning_rate, fused=True)
        self.schedule = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [10, 20, 30], 0.5)
        self.clipped = list(self.probe.parameters())

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


def train_probe(Probe, classes: int, codes: Codes, target) -> ProbeTraining:
    """A clean probe, ClipProbe or SegmentProbe, after EPOCHS passes over the codes of N clips, target (N, ...)"""
    training = ProbeTraining(partial(Probe, codes.rows.shape[-1], classes), target.device)
    for _ in range(EPOCHS):
        training.epoch(codes, target)
    return training


def known_scores(logits, codes: Codes, seen: Codes) -> dict:
    """How much clips look like known ones, by each of SCORES: logits (N, C), their codes, those trained on -> {(N,)}.
    `distance`: that of a segment's codeword to the nearest one seen in training, mean over the segments, negated."""
    taught = seen.rows[seen.index.unique()]

    def nearest(rows):  # exactly 0 from itself
        return torch.cdist(rows, taught, compute_mode="donot_use_mm_for_euclid_dist").amin(1, keepdim=True)
    return {"softmax": logits.softmax(-1).amax(-1), "logit": logits.amax(-1), "energy": logits.logsumexp(-1),
            "distance": -codes.each(nearest)[..., 0].mean(-1)}


# --------------------------------------------------------------------------------------------------- clips and the plan
@dataclass
class Clips:
    """Clips number `index` (n,) of a source or a target, whose files' classes are `names` in the words of the source.
    `label` (n,): place among the C `classes` that a probe knows, C of any other class, -1 without a label."""
    features: Features
    index: np.ndarray
    names: list
    classes: list
    device: torch.device

    def __post_init__(self):
        place = [self.classes.index(name) if name in self.classes else len(self.classes) for name in self.names]
        self.place = np.array([*place, -1])  # the last one of clips without a label
        self.label = torch.from_numpy(self.place[self.features.label[self.index]]).to(self.device)

    def __len__(self):
        return len(self.index)

    def __getitem__(self, keep):
        return replace(self, index=self.index[keep.cpu().numpy()])

    def events(self, modality: str):
        """(n, T, C) float: what happens when"""
        member = np.eye(len(self.classes) + 1, dtype=np.float32)[self.place[:-1], :-1]  # (the files' classes, C)
        happens = self.features.read(f"events/{modality}", self.index) @ member > 0
        return torch.from_numpy(happens).to(self.device).float()


def renamed(features: Features, target: Features, class_map: tuple) -> list:
    """The target's classes, by the source's names where the entries `target's name=source's name` of --class-map give
    those. Raises InputError on names that are not there, or there twice."""
    names = {}
    for entry in class_map:
        theirs, _, ours = entry.partition("=")
        if target is features or ours not in features.classes or theirs not in target.classes or theirs in names:
            raise InputError(f"--class-map '{entry}': expected 'class of --target=class of the source', each once")
        names[theirs] = ours
    return [names.get(name, name) for name in target.classes]


def known_sets(known: tuple, classes: list) -> dict:
    """--known -> {entry: known classes}: `5` the first five, `0,2,4` these three; default: the first half, if that is
    any. Raises InputError on anything else."""
    if not known and len(classes) > 1:
        known = (len(classes) // 2,)
    sets = {}
    for entry in map(str, known):
        numbers = range(int(entry)) if entry.isdecimal() else []
        if "," in entry and all(map(str.isdecimal, entry.split(","))):
            numbers = sorted(set(map(int, entry.split(","))))
        if not numbers or numbers[-1] >= len(classes):
            raise InputError(f"--known {entry}: give a number of first classes, or class numbers such as 0,2,4; the "
                             f"data has {len(classes)} classes, numbered from 0")
        sets[entry] = [classes[i] for i in numbers]
    return sets


def directions(sources: list, targets: list) -> dict:
    """{trained on: [tested on, ...]}: each source with the targets that are another modality, if there are any."""
    return {a: [b for b in targets if b != a] for a in sources if set(targets) - {a}}


def direction(source: str, target: str, modalities: list) -> str:
    """`v2a`: trained on video, tested on audio. Initials, or whole names where initials are ambiguous."""
    ambiguous = len({m[0] for m in modalities}) < len(modalities)
    return f"{source}2{target}" if ambiguous else f"{source[0]}2{target[0]}"


class Plan:
    """What is to be probed, built and checked before any training, for a model of `shape` {m: (T, d) or (T, H, W, d)}.
    Probes train on the train split of `features` and are tested on the test split of `target`, or without one of
    `features` itself. `tasks`: of TASKS; without any, those of DEFAULT_TASKS that can be done. `known` and `class_map`
    are as on the command line. `every_clip` (`official.protocol`): no clips are held out, and with a target all clips
    of either side are trained or tested on. `pairs`: clips of whose modalities the open set learns the target's
    threshold, those of the validation split, or without one those of the train split; default: the source's. Raises
    InputError if what was asked for cannot be done."""

    def __init__(self, features: Features, shape: dict, device, tasks: tuple = (), known: tuple = (),
                 score: str = "softmax", target: Features | None = None, class_map: tuple = (),
                 every_clip: bool = False, pairs: Features | None = None):
        self.device, self.modalities, self.score = torch.device(device), list(shape), score
        self.every_clip, self.own_target = every_clip, target is not None
        self.source, self.target = features, target if self.own_target else features
        for m, side in itertools.product(shape, (self.source, self.target, pairs or features)):
            found = tuple(side.shape.get(m, shape[m]))
            if found != tuple(shape[m]):
                raise InputError(f"{side.files[0].path}: {m} has shape {found}, the model wants {tuple(shape[m])}")
        held = [m for m in shape if m in self.source.modalities]
        self.tested_modalities = [m for m in shape if m in self.target.modalities]
        self.both = [m for m in held if m in self.tested_modalities]
        self.directions = directions(held, self.tested_modalities)
        self.require(self.directions, f"probes need one of {' '.join(shape)} to train on, another to be tested on")
        names = renamed(self.source, self.target, class_map)
        self.classes = [name for name in features.classes if name in names or not names]
        self.parts = {}  # those trained and tested on, and of the source those held out and those to test it on itself
        for name, side, split in (("train", self.source, "train"), ("test", self.target, "test"),
                                  ("val", self.source, "val"), ("same", self.source, "test")):
            index = np.arange(len(side)) if every_clip and self.own_target else side.clips(split)
            called = names if name == "test" else self.source.classes
            self.parts[name] = Clips(side, index, called, self.classes, self.device)
        self.pairs = self.parts["val"]  # nobody looks at their labels
        if every_clip:
            del self.parts["val"]
        if pairs:
            index = pairs.clips("val") if 1 in pairs.split else pairs.clips("train")
            self.require(len(index), f"--pairs {pairs.files[0].path} holds test clips alone, which nobody may look at")
            self.pairs = Clips(pairs, index, pairs.classes, self.classes, self.device)
            ways = ((a, b) for a, targets in self.directions.items() for b in targets)
            self.require(any(self.has_pairs(*way) for way in ways), f"--pairs {pairs.files[0].path} holds no two "
                         f"modalities of a direction, but {' '.join(pairs.modalities)}")
        self.labelled = {name: part[part.label >= 0] for name, part in self.parts.items()}
        self.single = {}  # those with one event, which probes of whole clips see
        for name, part in self.labelled.items():
            self.single[name] = replace(part, index=part.features.single_event(part.index))
        self.choose_tasks(tasks, known)

    def choose_tasks(self, tasks: tuple, known: tuple) -> None:
        """Set the tasks, in the order of the table. Raises InputError if one cannot be done that was asked for."""
        wanted = tasks or DEFAULT_TASKS
        self.require(set(wanted) <= set(TASKS), f"--tasks {' '.join(tasks)}: expected some of {' '.join(TASKS)}")
        apart = self.source.classes and not self.classes
        ours, theirs = (", ".join(side.classes[:3]) for side in (self.source, self.target))
        self.require(not apart or not BY_CLASS & set(wanted), f"no class in common, such as {ours} there and {theirs} "
                     "here; --class-map renames the target's")
        self.known = known_sets(known, self.classes) if "open_set" in wanted else {}
        self.tasks = {}  # {task: its probe}
        for task, (check, probe) in PROBES.items():
            try:
                if task in wanted:
                    check(self)
                    self.tasks[task] = probe
            except InputError as error:
                if tasks or known and task == "open_set":  # it was asked for
                    raise
                if self.source.classes and RANK == 0:
                    print(f"will not be probed: {task} ({error})", flush=True)

    def has_pairs(self, source: str, target: str) -> bool:
        return len(self.pairs) > 0 and {source, target} <= set(self.pairs.features.modalities)

    def require(self, there, message: str) -> None:
        """Raise InputError naming the files unless `there`."""
        if not there:
            paths = dict.fromkeys((self.source.files[0].path, self.target.files[0].path))
            raise InputError(f"{' and '.join(paths)}: {message}")

    def tags(self, task: str, source: str, target: str, figures: dict, suffix: str = "") -> dict:
        """{name: value} of one direction -> {tag: value}"""
        where = f"eval/{task}/{direction(source, target, self.modalities)}{suffix}"
        return {f"{where}/{name}": value for name, value in figures.items()}

    def with_known(self, classes: list, closed: bool = False) -> dict:
        """{part: its labelled Clips with one event} for a probe that knows `classes`; of a `closed` set only of these.
        In the clean protocol between two files, known classes without a training clip are left out, and of a closed set
        also those untested."""
        parts = {name: replace(part, classes=classes) for name, part in self.single.items()}
        used = torch.arange(len(classes) + (not closed), device=self.device)  # the last one of an open set: unknown
        if self.own_target and not self.every_clip:
            used = used[torch.isin(used, parts["train"].label) | (used == len(classes))]
            if closed:
                used = used[torch.isin(used, parts["test"].label)]
        return {name: part[torch.isin(part.label, used)] for name, part in parts.items()}

    @contextmanager
    def probing(self, model, encode, codebook_size: int):
        """Meanwhile the model is in eval mode and encodes; gives `read(features, modality, clips) -> Codes`. Afterwards
        its mode and the random state of the process are as they were, and no codes are kept."""
        training = model.training
        self.read = partial(read_codes, model, encode, codebook_size=codebook_size, device=self.device)
        self.kept = {}  # {(features, modality): Codes}, the index of clips that were not read being -1
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            try:
                model.eval()
                yield self.read
            finally:
                model.train(training)
                self.read, self.kept = None, {}

    def codes(self, part: Clips, modality: str) -> Codes:
        """The codes of these clips; each clip is encoded once."""
        index = torch.full((len(part.features), part.features.shape[modality][0]), -1, device=self.device)
        kept = self.kept.setdefault((part.features, modality), Codes(None, index))
        new = part.index[(kept.index[part.index, 0] < 0).cpu().numpy()]
        if len(new):
            fresh = self.read(part.features, modality, new, rows=kept.rows)
            kept.rows = fresh.rows
            kept.index[new] = fresh.index
        return kept[part.index]

    def evaluate(self, model, encode, codebook_size: int):
        """Probe the model as it is now -> {tag: value}; sets what `show` draws: `selections` {m: (K,)} of codes on the
        test clips, those `by_class` (C, K), `outcomes` of classification and open set, `drawn` masks."""
        test = self.parts["test"]
        shown = test if len(test) else replace(test, index=np.arange(len(self.target)))
        self.outcomes, self.drawn = {}, None
        with self.probing(model, encode, codebook_size):
            index = {m: self.codes(shown, m).index for m in self.tested_modalities}
            figures, self.selections = codebook_metrics(index, codebook_size)
            place = shown.label[:, None] * codebook_size + torch.cat(list(index.values()), 1)
            counts = place[shown.label >= 0].flatten().bincount(minlength=codebook_size * (len(self.classes) + 1))
            self.by_class = counts.view(-1, codebook_size)[:-1].cpu()  # the last one of other classes
            tags = {f"eval/codebook/{name}": value for name, value in figures.items()}
            for probe in self.tasks.values():
                tags |= probe(self)
        return tags

    def show(self, codebook, run_folder, out, writer=None, step: int = 0) -> None:
        """Draw the log of a run and what `evaluate` found into the folder `out`, see `pictures.show`."""
        lines = log_lines(Path(run_folder) / "metrics.jsonl")
        show(out, lines, codebook.cpu(), self.selections, self.by_class, self.classes, self.outcomes, self.drawn,
             writer, step)

    def not_learned(self, logged: dict, chance: dict, tags: dict) -> list:
        """What a run did not learn, a line each: losses of its last line of log {tag: value} that are still near what
        guessing gives (`chance` {loss: value}), codebooks in collapse, probes that tell no classes of a modality."""
        lines = []
        for name, guess in chance.items():
            value = logged.get(f"losses/{name}", 0.0)
            if value > NOT_LEARNED * guess:
                lines.append(f"loss {name} is {value:.2f}, by guessing {guess:.2f}: train with more --epochs")
        for m in self.tested_modalities:
            perplexity = tags[f"eval/codebook/perplexity_{m}"]
            if perplexity < min(COLLAPSE, len(self.selections[m]) / 2):
                lines.append(f"the codes of {m} collapsed (perplexity {perplexity:.1f}): see --codebook-init, "
                             "--reset-after, and that no loss is switched off which keeps clips apart")
        guess = 1 / max(1, len(self.classes))
        for source, targets in self.directions.items():
            for target, name in itertools.product(targets, ("acc_same", "acc")):
                (tag,) = self.tags("classification", source, target, {name: None})
                tested = target if name == "acc" else source
                if tags.get(tag, 1.0) < min(2 * guess, 0.9 * guess + 0.1):
                    lines.append(f"a probe of {source} is right in {tags[tag]:.0%} of the clips of {tested}, by "
                                 f"guessing in {guess:.0%}: train with more --epochs, and look at these features")
        lines = list(dict.fromkeys(lines))
        return [f"warning: {line}" for line in lines]


# ---------------------------------------------------------------------------------------------- tasks: clips and events
def check_classification(plan: Plan) -> None:
    for parts, of in ((plan.single, ""), (plan.with_known(plan.classes, closed=True), " of a common class")):
        for name in ("train", "test"):
            plan.require(len(parts[name]), f"--tasks classification: no labelled {name} clips with one event{of}")


def check_open_set(plan: Plan) -> None:
    plan.require(plan.known, f"open_set needs two classes, found {' '.join(plan.classes) or 'none'}")
    for entry, classes in plan.known.items():
        if len(classes) == 1 and plan.score == "softmax":
            note(f"--known {entry}: of a single known class softmax is always sure; try --score logit")
        for name, part in plan.with_known(classes).items():
            known, words = part.label < len(classes), f"labelled {name} clips with one event, --known {entry}"
            plan.require(len(part) or name == "same", f"open_set needs labelled {name} clips with one event")
            plan.require(known.any() or name == "same", f"no known classes among the {words}")
            plan.require(not known.all() or name != "test", f"no unknown classes among the {words}")


def classification(plan: Plan) -> dict:
    """Which class a clip has: trained on one modality, tested on another; `acc_same` is of the source itself -> tags"""
    tags, parts = {}, plan.with_known(plan.classes, closed=True)
    for source, targets in plan.directions.items():
        codes = plan.codes(parts["train"], source)
        probe, same = train_probe(ClipProbe, len(plan.classes), codes, parts["train"].label), {}
        if len(parts["same"]):
            prediction = probe.logits(plan.codes(parts["same"], source)).argmax(-1)
            same["acc_same"] = accuracy(prediction, parts["same"].label)["acc"]
        for target in targets:
            prediction = probe.logits(plan.codes(parts["test"], target)).argmax(-1)
            plan.outcomes["classification", source, target] = Outcome({}, prediction, parts["test"].label, plan.classes)
            found = accuracy(prediction, parts["test"].label)
            figures = {"acc": found["acc"], **same, "macro_recall": found["macro_recall"]}
            tags |= plan.tags("classification", source, target, figures)
    return tags


def open_set(plan: Plan) -> dict:
    """The same where some classes are unknown to the probe, which rejects clips of low confidence -> tags. The source's
    threshold rejects few of its own held-out known clips (`hos_source`). The confidences of another modality lie
    elsewhere, so its threshold is found on pairs (`hos`, see `paired_threshold`); without pairs there is no `hos`."""
    tags = {}
    for (entry, classes), (source, targets) in itertools.product(plan.known.items(), plan.directions.items()):
        parts, unknown = plan.with_known(classes), len(classes)
        train, held_out = [parts[name][parts[name].label < unknown] for name in ("train", "val")]
        seen = plan.codes(train, source)
        judge = partial(judgement, train_probe(ClipProbe, unknown, seen, train.label), seen)
        at_source = {name: score.quantile(REJECT) for name, score in judge(plan.codes(held_out, source))[0].items()}
        for target in targets:
            scores, prediction = judge(plan.codes(parts["test"], target))
            thresholds = {"hos_source": at_source}
            if plan.has_pairs(source, target):
                thresholds["hos"] = paired_thresholds(plan, judge, source, target, at_source, unknown)
            outcome = Outcome(scores, prediction, parts["test"].label, classes, thresholds)
            plan.outcomes[f"open_set_{entry}", source, target] = outcome
            tags |= plan.tags(f"open_set_{entry}", source, target, open_set_figures(outcome, plan.score))
    return tags


def judgement(probe: ProbeTraining, seen: Codes, codes: Codes):
    """What a probe trained on the codes `seen` says of clips: {score: confidence (N,)}, class (N,)"""
    logits = probe.logits(codes)
    return known_scores(logits, codes, seen), logits.argmax(-1)


def paired_thresholds(plan: Plan, judge, source: str, target: str, at_source: dict, unknown: int) -> dict:
    """{score: threshold of the target} by what the source says of its half of each pair; no label is looked at."""
    theirs, prediction = judge(plan.codes(plan.pairs, target))
    ours, said = judge(plan.codes(plan.pairs, source))
    found = {}
    for name, confidence in theirs.items():
        accepts = ours[name] >= at_source[name]
        found[name] = torch.tensor(paired_threshold(accepts, said, confidence, prediction, unknown))
    return found


@dataclass
class Outcome:
    """What one direction came to, of N test clips: `prediction` and `label` (N,), in the open set with `scores`
    {score: confidence (N,)} and `thresholds` {"hos_source" and, with pairs, then "hos": {score: threshold ()}}."""
    scores: dict
    prediction: torch.Tensor
    label: torch.Tensor
    classes: list
    thresholds: dict = field(default_factory=dict)

    @property
    def known(self):
        return self.label < len(self.classes)


def open_set_figures(outcome: Outcome, score: str) -> dict:
    """Figures of one direction by `score`, at the best threshold there is; then of every score: `auroc_energy`, ..."""
    asked, known, figures = (outcome.prediction, outcome.label, len(outcome.classes)), outcome.known, {}
    for name, confidence in outcome.scores.items():
        figures[f"auroc_{name}"] = auroc(confidence[known], confidence[~known])
        for rule, thresholds in outcome.thresholds.items():
            figures[f"{rule}_{name}"] = open_set_metrics(confidence, *asked, thresholds[name].item())["hos"]
    shown = {name: figures[f"{name}_{score}"] for name in ("auroc", *reversed(outcome.thresholds))}
    confidence, thresholds = outcome.scores[score], list(outcome.thresholds.values())[-1]
    at_best = open_set_metrics(confidence, *asked, thresholds[score].item())
    del at_best["hos"]
    shown["hos_oracle"] = hos_curve(confidence, *asked)[1].max().item()
    return shown | at_best | {"acc_known": open_set_metrics(confidence, *asked, -math.inf)["os_star"]} | figures


def annotated(plan: Plan, name: str, modality: str):
    """The clips of a part, with a target of its own only those in which one of the classes happens, and what happens in
    them (n, T, C + 1), the last column being background. Raises InputError if there is none."""
    part = plan.parts[name]
    happens = part.events(modality)
    if plan.own_target:
        some = happens.flatten(1).any(1)
        part, happens = part[some], happens[some]
    plan.require(len(part), f"no {name} clip with an event of a common class in {modality}")
    return part, torch.cat([happens, 1 - happens.amax(-1, keepdim=True)], -1)


def check_localization(plan: Plan) -> None:
    there = []  # the modalities of either side whose events are annotated segment by segment, in every file
    for side in (plan.source, plan.target):
        there.append([m for m in plan.modalities if m in side.modalities and all(m in f.events for f in side.files)])
    plan.event_directions = directions(*there)
    plan.require(plan.event_directions, f"localization needs events/<modality> of two of them, found those of {there}")
    for source, targets in plan.event_directions.items():
        annotated(plan, "train", source)
        for target in targets:
            annotated(plan, "test", target)


def localization(plan: Plan) -> dict:
    """What happens when: a probe of every segment, trained on one modality and its events, tested on another and its
    -> tags. With a target of its own, clips in which nothing known happens are left out."""
    tags = {}
    for source, targets in plan.event_directions.items():
        train, event = annotated(plan, "train", source)
        probe = train_probe(SegmentProbe, len(plan.classes), plan.codes(train, source), event)
        for target in targets:
            test, true = annotated(plan, "test", target)
            score = probe.logits(plan.codes(test, target)).sigmoid()
            foreground = segment_metrics(score[..., :-1], true[..., :-1])["f1"]
            figures = segment_metrics(score, true) | {"f1_foreground": foreground, **constant_f1(true)}
            tags |= plan.tags("localization", source, target, figures)
    return tags


# ---------------------------------------------------------------------------------------------------- tasks: retrieval
def groups(features: Features, clips):
    """What is one item for retrieval: the group of each clip, told apart by file; in a file without groups the clip."""
    owner, group = np.searchsorted(features.starts, clips, side="right") - 1, np.array(clips)
    for f, file in enumerate(features.files):
        if "group" in file.names:
            group[owner == f] = file.read("group", clips[owner == f] - features.starts[f])
    return torch.from_numpy(np.unique(np.stack([owner, group]), axis=1, return_inverse=True)[1].reshape(-1))


@dataclass
class Items:
    """What retrieval compares: mean codes (I, D), group (I,), label (I,), on the host."""
    code: torch.Tensor
    group: torch.Tensor
    label: torch.Tensor

    def find(self, database) -> dict:
        """`r<k>`: `recall_at_k` by group; `class_r<k>`: by class, of the labelled queries; and what chance gives."""
        some, found = self.label >= 0, {"queries": len(self.code), "database": len(database.code)}
        for k in RANKS:
            found[f"r{k}"] = recall_at_k(self.code, database.code, self.group, database.group, k)
            found[f"chance_r{k}"] = chance(self.group, database.group, k)
            if some.any():
                found[f"class_r{k}"] = recall_at_k(self.code[some], database.code, self.label[some], database.label, k)
                found[f"class_chance_r{k}"] = chance(self.label[some], database.label, k)
        return found


def items(plan: Plan, modality: str) -> Items:
    """The items of a modality among the test clips. Rows of one group with the same features, such as the sound beside
    each of its captions, are one item."""
    part = plan.parts["test"]
    group, rows = groups(part.features, part.index), torch.arange(len(part))
    if len(group.unique()) < len(part):
        first = {}  # {(group, digest of the features): row}
        for row in range(len(part)):
            digest = hashlib.sha256(part.features.read(modality, part.index[row:row + 1])).digest()
            first.setdefault((group[row].item(), digest), row)
        rows = torch.tensor(list(first.values()))
    label = torch.from_numpy(part.features.label[part.index])  # the file's own: nothing is learned of classes
    return Items(plan.codes(part[rows], modality).mean().cpu(), group[rows], label[rows])


def check_retrieval(plan: Plan) -> None:
    test = plan.parts["test"]
    enough = len(plan.tested_modalities) > 1 and len(groups(test.features, test.index).unique()) >= max(RANKS)
    plan.require(enough, f"retrieval needs two modalities and {max(RANKS)} clips or groups in the test split")


def retrieval(plan: Plan) -> dict:
    """Zero-shot: of the test clips, which items of b are nearest to an item of a, by the cosine of their mean codes? An
    item is right if it comes from the same clip or group (`r1`), or has the same class (`class_r1`) -> tags"""
    tags, item = {}, {m: items(plan, m) for m in plan.tested_modalities}
    for a, b in itertools.combinations(item, 2):
        there, back = item[a].find(item[b]), item[b].find(item[a])
        tags |= plan.tags("retrieval", a, b, there) | plan.tags("retrieval", b, a, back)
        both = f"+{direction(b, a, plan.modalities)}"
        tags |= plan.tags("retrieval", a, b, {f"r{k}": (there[f"r{k}"] + back[f"r{k}"]) / 2 for k in RANKS}, both)
    return tags


def fit_map(query, answer):
    """A linear map of codes (N, D) to the codes beside them (N, D), all of length 1: begins as the identity and learns
    by InfoNCE over the batch which belong together. On the host, without gradients."""
    torch.manual_seed(0)
    project = nn.Linear(query.shape[-1], query.shape[-1], bias=False).to(query.device)
    nn.init.eye_(project.weight)
    optimizer = torch.optim.Adam(project.parameters(), lr=LEARNING_RATE, fused=True)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(query)).to(query.device).split(BATCH_SIZE):
            logits = F.normalize(project(query[rows]), dim=-1) @ answer[rows].T / TEMPERATURE
            optimizer.zero_grad()
            F.cross_entropy(logits, torch.arange(len(rows), device=query.device)).backward()
            optimizer.step()
    return project.cpu().requires_grad_(False)


def check_x_retrieval(plan: Plan) -> None:
    check_retrieval(plan)
    plan.require(len(plan.both) > 2 and len(plan.parts["train"]), "x_retrieval needs three modalities and train clips")


def x_retrieval(plan: Plan) -> dict:
    """Uni-Code's Table 5: a map from the mean codes of one modality to those of another is trained, on one clip of each
    group; a third modality's codes go through it, untouched, to retrieve the other's. Tags `a2b_to_c`: trained with
    queries of a, tested with queries of b; `same_r10` are those of a, `zero_r10` b's without any map. What is right is
    as in `retrieval`."""
    tags, item, taught, train = {}, {}, {}, plan.parts["train"]
    first = np.unique(groups(train.features, train.index).numpy(), return_index=True)[1]  # one clip a group
    for m in plan.both:
        item[m] = items(plan, m)
        taught[m] = F.normalize(plan.codes(train[torch.from_numpy(first)], m).mean(), dim=-1)
    for source, target, asking in itertools.permutations(plan.both, 3):
        project = fit_map(taught[source], taught[target])
        mapped = replace(item[asking], code=project(item[asking].code)).find(item[target])
        same = replace(item[source], code=project(item[source].code)).find(item[target])
        figures = {name: value for name, value in mapped.items() if name in ("r1", "r5") or name.endswith("r10")}
        figures |= {"zero_r10": item[asking].find(item[target])["r10"], "same_r10": same["r10"]}
        tags |= plan.tags("x_retrieval", source, asking, figures, f"_to_{target}")
    return tags


# ------------------------------------------------------------------------------------------------- tasks: segmentation
class QueryDecoder(nn.Module):
    """Maps of B clips (B, T, H, W, d) and a query each (B, D) -> mask logits (B, T, H * p, W * q), a cell p x q pixels.
    The query scales and shifts (FiLM) what a linear map finds in each cell; two layers draw the cell."""

    def __init__(self, width: int, code_width: int, cell: tuple, hidden: int = 64):
        super().__init__()
        self.cell = cell
        self.look, self.ask = nn.Linear(width, hidden), nn.Linear(code_width, 2 * hidden)
        self.draw = nn.Sequential(nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, cell[0] * cell[1]))
        nn.init.constant_(self.draw[-1].bias, -5.0)  # few pixels belong to any one thing

    def forward(self, maps, query):
        scale, shift = self.ask(query)[:, None, None, None].chunk(2, -1)
        cells = self.draw(self.look(maps) * (1 + scale) + shift).unflatten(-1, self.cell)  # (B, T, H, W, p, q)
        return cells.permute(0, 1, 2, 4, 3, 5).flatten(4, 5).flatten(2, 3)


def check_segmentation(plan: Plan) -> None:
    """Sets `plan.seen`, the modality of maps, and `plan.cell`, how many pixels of a mask [p, q] one of its cells is."""
    sizes = {f.h5["mask"].shape[2:] if "mask" in f.names else () for f in plan.source.files + plan.target.files}
    size, found = np.array(max(sizes)), {}
    for m in plan.both:
        cells = plan.source.shape[m][1:-1]  # (H, W) of maps
        if len(sizes) == 1 and len(size) == len(cells) == 2 and not (size % cells).any():
            found[m] = (size // cells).tolist()
    plan.require(len(found) == 1 and len(plan.both) > 2, "--tasks segmentation needs masks of one size, a single "
                 "modality of maps whose cells divide them, and two other modalities to ask with")
    ((plan.seen, plan.cell),) = found.items()
    for name in ("train", "test"):
        part = plan.labelled[name]
        drawn = ((mask != NOT_ANNOTATED).all((2, 3)).any() for _, mask in part.features.blocks("mask", part.index))
        plan.require(any(drawn), f"no labelled {name} clips with an annotated frame, --tasks segmentation needs some")


def frames(part: Clips, seen: str, rows):
    """Of some clips: maps (B, T, H, W, d), masks (B, T, h, w) of their class, and which frames have one (B, T)"""
    clips = part.index[rows.numpy()]
    mask = torch.from_numpy(part.features.read("mask", clips)).to(part.device)
    label = torch.from_numpy(part.features.label[clips]).long().to(part.device)  # the file's own
    maps = torch.from_numpy(part.features.read(seen, clips)).to(part.device).float()
    return maps, (mask == label[:, None, None, None] + 1).float(), (mask != NOT_ANNOTATED).flatten(2).all(2)


def event_code(plan: Plan, part: Clips, modality: str):
    """The query of each clip (N, D): its mean code over the segments in which its event happens, in a modality without
    annotation, such as a sentence, over all"""
    codes, label = plan.codes(part, modality), part.features.label[part.index]
    if not all(modality in file.events for file in part.features.files):
        return codes.mean()
    happens = part.features.read(f"events/{modality}", part.index)[np.arange(len(label)), :, label] > 0  # (N, T)
    return codes.mean(torch.from_numpy(happens).to(plan.device))


def fit_decoders(train: Clips, seen: str, cell: list, query: dict) -> dict:
    """{name: queries (N, D)} -> {name: QueryDecoder}, alike at the start and trained on the same batches"""
    decoder = nn.ModuleDict()
    for name, vectors in query.items():
        torch.manual_seed(0)
        decoder[name] = QueryDecoder(train.features.shape[seen][-1], vectors.shape[-1], cell).to(train.device)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=MASK_LEARNING_RATE, fused=True)
    for _ in range(MASK_EPOCHS):
        for rows in torch.randperm(len(train)).split(BATCH_SIZE):
            maps, mask, known = frames(train, seen, rows)
            t = known.any(0).nonzero()[:, 0]
            t = t[torch.randperm(len(t))[:MASK_FRAMES].to(train.device)]
            known, loss = known[:, t], 0
            for name, draw in decoder.items():
                drawn = draw(maps[:, t], query[name][rows.to(train.device)])[known]
                loss = loss + F.binary_cross_entropy_with_logits(drawn, mask[:, t][known])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return decoder


@torch.no_grad()
def drawn_frames(test: Clips, seen: str, asked: dict):
    """asked {(a, b, name): (decoder or None, queries (N, D))} -> {(a, b, name): IoU of each frame, batches (B, T), nan
    where nobody annotated}, {(a, b): F-scores of the frames with a mask, batches (n, 255)}; None draws nothing"""
    iou, curves = defaultdict(list), defaultdict(list)
    for rows in torch.arange(len(test)).split(BATCH_SIZE):
        maps, mask, known = frames(test, seen, rows)
        for (a, b, name), (draw, query) in asked.items():
            probability = draw(maps, query[rows.to(mask.device)]).sigmoid() if draw else torch.zeros_like(mask)
            iou[a, b, name].append(torch.where(known, mask_iou(probability, mask).view(known.shape), torch.nan).cpu())
            if name == "miou":
                curves[a, b].append(mask_curve(probability[known], mask[known]))
    return iou, curves


@torch.no_grad()
def example_masks(test: Clips, seen: str, asked: dict, several):
    """Of four clips, where possible with several events (N,), the frame with the largest mask, for `pictures.masks`"""
    rows = (~several).long().argsort(stable=True)[:4]
    maps, mask, _ = frames(test, seen, rows)
    largest = torch.arange(len(rows)), mask.flatten(2).sum(2).argmax(1).cpu()
    found = {"frame": maps[largest], "truth": mask[largest]}
    for (a, b, name), (draw, query) in asked.items():
        if name == "miou":
            found[f"{a} \u2192 {b}"] = draw(maps, query[rows.to(query.device)]).sigmoid()[largest]
    return found, [test.names[label] for label in test.features.label[test.index[rows.numpy()]]]


def segmentation(plan: Plan) -> dict:
    """Which pixels are what the query asks for? A decoder over the maps, trained with queries of one modality and
    tested with those of another, on every frame of the labelled clips -> tags
    Controls: `miou_shuffled_query` (of another clip), `miou_constant_query` (of the first clip, for all),
    `miou_no_query` (a decoder trained without one), `miou_nothing` (no pixel); `several_*` are of clips with several
    events, where only the query says which is meant."""
    train, test = plan.labelled["train"], plan.labelled["test"]
    taught = {m: event_code(plan, train, m) for m in plan.both if m != plan.seen}
    right = {m: event_code(plan, test, m) for m in taught}
    nobody = torch.zeros_like(next(iter(taught.values()))[:1])
    decoder = fit_decoders(train, plan.seen, plan.cell, {"nobody": nobody.expand(len(train), -1), **taught})
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
    other = torch.empty_like(order).scatter(0, order, order.roll(1)).to(plan.device)  # for no clip the clip itself
    asked, tags = {}, {}
    for a, b in itertools.permutations(taught, 2):
        asked[a, b, "miou"] = decoder[a], right[b]
        asked[a, b, "miou_shuffled_query"] = decoder[a], right[b][other]
        asked[a, b, "miou_constant_query"] = decoder[a], right[b][:1].expand_as(right[b])
        asked[a, b, "miou_no_query"] = decoder["nobody"], nobody.expand(len(test), -1)
        asked[a, b, "miou_nothing"] = None, None
    iou, curves = drawn_frames(test, plan.seen, asked)
    several = torch.from_numpy(~np.isin(test.index, test.features.single_event(test.index)))
    plan.drawn = example_masks(test, plan.seen, asked, several)
    for (a, b, name), batches in iou.items():
        value = torch.cat(batches)
        figures = {name: value.nanmean().item()}
        if value[several].isfinite().any():
            figures[f"several_{name}"] = value[several].nanmean().item()
        if name == "miou":
            figures["f_score"] = torch.cat(curves[a, b]).mean(0).max().nan_to_num().item()
        tags |= plan.tags("segmentation", a, b, figures)
    return tags


# What can be probed, in the order of the table: {task: (raises InputError if the plan's clips do not allow it, probe)}
PROBES = {"classification": (check_classification, classification), "open_set": (check_open_set, open_set),
          "localization": (check_localization, localization), "retrieval": (check_retrieval, retrieval),
          "x_retrieval": (check_x_retrieval, x_retrieval), "segmentation": (check_segmentation, segmentation)}
TASKS = tuple(PROBES)


# -------------------------------------------------------------------------------------------------------- command line
def load(path):
    """A run folder or its checkpoint.pt -> module of the method, its Args, {m: shape}, the model in eval mode, and for
    how many epochs it was trained. Raises InputError."""
    path = Path(path)
    path = path / "checkpoint.pt" if path.is_dir() else path
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["method"] not in SCRIPTS:
            raise ValueError(f"its method is {state['method']}")
        method = importlib.import_module(state["method"])
        args = method.Args(**state["args"])
        model = method.Model(state["shape"], args)
        weights = [(name, value) for name, value in state["networks"].items() if name.startswith("model.")]
        model.load_state_dict({name.removeprefix("model."): value for name, value in weights})
        return method, args, state["shape"], model.eval(), state["epoch"]
    except Exception as error:  # whatever is wrong with the file, the user needs one line
        raise InputError(f"{path}: not a checkpoint of these scripts ({first_line(error)})")


def open_run(paths: tuple, target: tuple, out: str | None, load=load):
    """`RUN [FILE ...]` of a command line -> what `load` gives of RUN, the Features of FILE ... or of the run's data,
    those of `--target` or None. Raises InputError, also if `out` cannot be written."""
    if not paths:
        raise InputError("give a run folder")
    if out and not Path(out).resolve().parent.is_dir():
        raise InputError(f"{out}: the folder does not exist")
    if out and (Path(out).is_dir() or not os.access(Path(out).resolve().parent, os.W_OK)):
        raise InputError(f"{out}: cannot be written")
    loaded = load(paths[0])
    args, shape = loaded[1:3]
    source = Features(paths[1:] or args.data, args.runs_dir)
    other = Features(target, args.runs_dir) if target else None
    for side in (source, other or source):
        for m in shape:
            if m in side.modalities:
                side.require(m)  # now, not in the middle of a probe
    return loaded, source, other


def write_codes(out: str, model, encode, features: Features, shape: dict, codebook_size: int, device) -> None:
    """Write an HDF5 file: `code_index/<modality>` (N, T) of every clip, `id` (N,), and the model's `codebook`."""
    index = {}
    if Path(out).exists():
        raise InputError(f"--codes {out}: is there already")
    for m in shape:
        if m in features.modalities:
            found = features.shape[m]
            if found != tuple(shape[m]):
                raise InputError(f"{features.files[0].path}: {m} has shape {found}, the model wants {shape[m]}")
            index[m] = read_codes(model, encode, features, m, np.arange(len(features)), codebook_size, device).index
    if not index:
        raise InputError(f"{features.files[0].path}: none of the model's modalities, {' '.join(shape)}")
    with h5py.File(out, "w") as h5:
        for m, numbers in index.items():
            h5[f"code_index/{m}"] = numbers.cpu().numpy()
        h5["id"] = np.concatenate([file.h5["id"][:] for file in features.files])
        h5["codebook"] = model.quantizer.codebook.cpu().numpy()
    print(f"{out}: the codes of {len(features)} clips in {' '.join(index)}")


def report(tags: dict, out: str | None) -> None:
    """Print the table and write all figures to the JSON file `out`, if there is one."""
    print(table(tags, SCORES), flush=True)
    if out:
        write_json(Path(out), tags)


def main(paths: tyro.conf.Positional[tuple[str, ...]], *, tasks: tuple[Literal[TASKS], ...] = (),
         known: tuple[str, ...] = (), score: Literal[SCORES] = "softmax", target: tuple[str, ...] = (),
         class_map: tuple[str, ...] = (), pairs: tuple[str, ...] = (), codes: str | None = None,
         out: str | None = None, pictures: str | None = None, device: str = "auto") -> None:
    """Probe the model of RUN (a run folder or its checkpoint.pt) on FILE ... (default: the data it was trained on).

    Args:
        paths: RUN [FILE ...]
        tasks: what is probed, see docs/tasks.md; default: classification and open_set, as far as there are labels.
        known: open-set tasks: a number of known first classes, or class numbers such as 0,2,4; default: half of them.
        score: by which unknown clips are told from known ones in what is printed.
        target: files to test on, of clips, modalities and classes of their own; default: the test split of FILE ...
        class_map: names of the target's classes that differ, each as "target's name=source's name".
        pairs: files of clips without labels, from whose pairs of modalities the open set learns the target's threshold;
            default: the validation split of FILE ...
        codes: write the codes of all clips of FILE ... to this HDF5 file, and probe nothing.
        out: a JSON file for all figures, those of the other scores as well.
        pictures: a folder for pictures of what was found, and of the training of RUN.
        device: `auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1`."""
    if codes and out:
        raise InputError("--codes probes nothing: leave out --out")
    (method, args, shape, model, epoch), source, target = open_run(paths, target, out or codes)
    if epoch < args.epochs:
        note(f"{paths[0]}: not trained to its end, {epoch} of {args.epochs} epochs")
    if codes:
        device = pick_device(device)
        return write_codes(codes, model.to(device), method.encode, source, shape, args.codebook_size, device)
    pairs = Features(pairs, args.runs_dir) if pairs else None
    for m in set(pairs.modalities if pairs else ()) & set(shape):
        pairs.require(m)
    plan = Plan(source, shape, pick_device(device), tasks, known, score, target, class_map, pairs=pairs)
    tags = plan.evaluate(model.to(plan.device), method.encode, args.codebook_size)
    report(tags, out)
    if pictures:
        try:
            folder = paths[0] if os.path.isdir(paths[0]) else os.path.dirname(paths[0])  # of RUN/checkpoint.pt
            plan.show(model.quantizer.codebook, folder, pictures)
        except Exception as error:  # a package is missing, or the folder cannot be written
            raise InputError(f"--pictures {pictures}: {first_line(error)}")


if __name__ == "__main__":
    sys.excepthook = explain_input_errors
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the HDF5 library never returns from some damaged files
    tyro.cli(main)

"""Frozen-probe protocols: a probe trained on the codes of one modality is tested, untouched, on those of another.

    python probes.py RUN                                      probe a finished run again, on its own data
    python probes.py RUN FILE --tasks localization retrieval  other tasks, on another cmg-features file
    python probes.py RUN --tasks open_set --known 3 5 7 0,2,4 --score energy
    python probes.py RUN ucf.h5 --target vgg.h5 --class-map "playing cello=PlayingCello"    tested on another file

Encoder in eval mode, last probe epoch, open-set threshold from held-out clips of the *source* modality: nothing is
chosen with test labels (what the released scripts compute instead: `python -m official.protocol RUN`). The model comes
in as a module and a function `encode(model, features, modality) -> (quantized (N, T, D), code_index (N, T))`, one
vector a code; this file knows nothing of the methods.
"""
import hashlib
import importlib
import itertools
import json
import math
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro

from data import NOT_ANNOTATED, Features
from run import InputError, explain_input_errors, first_line, pick_device, require_shape

SCRIPTS = ("uni_code", "micu", "codaar")  # the only modules that a checkpoint may name
TASKS = ("classification", "localization", "open_set", "retrieval", "x_retrieval", "segmentation")
DEFAULT_TASKS = ("classification", "open_set")  # as far as the clips allow
SCORES = ("softmax", "logit", "energy", "distance")  # by which unknown clips may be told from known ones
EPOCHS, LEARNING_RATE, BATCH_SIZE = 5, 4e-4, 80  # of the probes; by then the held-out source loss has levelled
REJECT = 0.05  # share of held-out known source clips that the open-set threshold rejects
RANKS = (1, 5, 10)  # of retrieval
TEMPERATURE = 0.1  # of the map that x_retrieval learns
MASK_EPOCHS, MASK_LEARNING_RATE, MASK_FRAMES = 10, 3e-3, 3  # of the segmentation decoder; frames of a clip a step
SHARE = 0.1  # a modality shares a code if it makes at least this part of the code's selections


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
    known, accepted = target < num_known, confidence >= threshold
    right = (accepted & (prediction == target)).double()
    per_class = [right[target == c].mean() for c in target[known].unique()]
    os_star = right[known].mean().nan_to_num().item()
    unk = (~accepted[~known]).double().mean().nan_to_num().item()
    return {"os_star": os_star, "os_star_class_mean": torch.stack(per_class).mean().item() if per_class else 0.0,
            "unk": unk, "hos": 2 * os_star * unk / max(os_star + unk, 1e-12)}


def oracle_hos(confidence, prediction, target, num_known: int) -> float:
    """The best HOS over all thresholds, found on the test clips: what a perfect threshold would give this probe."""
    ascending = confidence.argsort()
    first = torch.searchsorted(confidence[ascending], confidence[ascending])  # ties are rejected or accepted together
    known = target[ascending] < num_known
    right = (known & (prediction == target)[ascending]).double()
    os_star = ((right.sum() - right.cumsum(0) + right) / known.sum().clamp(min=1))[first]  # i accepts i, i+1, ..
    unk = (((~known).cumsum(0) - (~known).long()) / (~known).sum().clamp(min=1))[first]
    return (2 * os_star * unk / (os_star + unk).clamp(min=1e-12)).max().item()


def auroc(score_positive, score_negative) -> float:
    """Probability that a random positive scores above a random negative, ties counting half; (P,), (N,)."""
    negative = score_negative.double().sort().values
    positive = score_positive.double().contiguous()
    below = torch.searchsorted(negative, positive) + torch.searchsorted(negative, positive, right=True)
    return (below.double().mean() / (2 * len(negative))).item()


def segment_metrics(scores, target, threshold: float = 0.5) -> dict:
    """Pooled precision, recall and F1 of multi-hot labels; scores and target (..., C), score > threshold predicts; 0 of
    nothing. Raises ValueError on unequal shapes."""
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
    ValueError on shapes that do not fit."""
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
    size = len(database_group)
    right = (query_group[:, None] == database_group).double().sum(1)  # (Q,)
    miss = [(size - right - i).clamp(min=0) / (size - i) for i in range(k)]
    return (1 - torch.stack(miss).prod(0)).mean().item()


def mask_iou(probability, target):
    """Intersection over union of each frame at 0.5, (..., H, W) each -> (frames,); without a mask, the share of pixels
    left empty. Raises ValueError on unequal shapes."""
    require_shape("probability", probability, (*probability.shape[:-2], -1, -1))
    require_shape("target", target, probability.shape)
    predicted, true = [x.reshape(-1, x.shape[-2] * x.shape[-1]) > 0.5 for x in (probability, target)]  # (frames, H * W)
    overlap = (predicted & true).sum(1) / (predicted | true).sum(1).clamp(min=1).double()
    return torch.where(true.any(1), overlap, (~predicted).double().mean(1))


def mask_curve(probability, target):
    """F-score (beta^2 = 0.3) of each frame with a mask at 255 thresholds in [0, 1): (..., H, W) each -> (n, 255)"""
    pixels = probability.shape[-2] * probability.shape[-1]
    at_once = 1 + 4_000_000 // pixels  # frames
    thresholds = torch.linspace(0, 1 - 1e-10, 255, dtype=torch.double, device=probability.device)
    curves = [torch.zeros(0, 255)]
    for p, true in zip(probability.reshape(-1, pixels).split(at_once), target.reshape(-1, pixels).split(at_once)):
        drawn = (true > 0.5).any(1)
        p, true = p[drawn].double(), (true[drawn] > 0.5).double()
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
    total, ways = counts.sum(0).double(), range(1, len(counts) + 1)
    owners = ((counts / total >= share) & (total > 0)).sum(0)  # (K,) modalities sharing each code, 0 if unused
    shared = {f"shared_{i}": ((owners == i).sum() / (total > 0).sum().clamp(min=1)).item() for i in ways}
    return shared | {f"weighted_{i}": (total[owners == i].sum() / total.sum().clamp(min=1)).item() for i in ways}


def codebook_metrics(code_index: dict, codebook_size: int):
    """Health of the code: {m: (N, T) int} -> (tags, selections {m: (K,)}). Agreement is over pairs of modalities."""
    counts = torch.stack([index.flatten().bincount(minlength=codebook_size) for index in code_index.values()]).cpu()
    entropy = torch.special.entr(counts.double() / counts.sum(1, keepdim=True)).sum(1)
    tags = {f"used_{m}": (row > 0).sum().item() for m, row in zip(code_index, counts)}
    tags |= {f"perplexity_{m}": h.exp().item() for m, h in zip(code_index, entropy)}
    agreement = [(a == b).double().mean() for a, b in itertools.combinations(code_index.values(), 2)]
    if agreement:  # a file of one modality has none
        tags |= {"agreement": torch.stack(agreement).mean().item(), **code_sharing(counts, SHARE)}
    return tags, dict(zip(code_index, counts))


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

    def mean(self, where=True):
        """Mean code of each clip (N, D), over the segments `where` (N, T) if given; over all of a clip without any."""
        where = torch.ones_like(self.index, dtype=torch.bool) & where
        where = where | ~where.any(1, keepdim=True)
        parts = zip(self.index.split(1000), (where / where.sum(1, keepdim=True)).split(1000))
        return torch.cat([(weight[:, None] @ F.embedding(index, self.rows))[:, 0] for index, weight in parts])


@torch.no_grad()
def read_codes(model, encode, features: Features, modality: str, clips, codebook_size: int, device) -> Codes:
    """The codes of the clips with these numbers, encoded in the model's present mode."""
    rows, parts = None, []
    for i in range(0, len(clips), 200):
        x = torch.from_numpy(features.read(modality, clips[i:i + 200])).to(device).float()
        if not x.isfinite().all():
            raise InputError(f"NaN or infinity in {modality}: python data.py check FILE says where")
        quantized, index = encode(model, x, modality)
        if rows is None:
            rows = quantized.new_zeros(codebook_size, quantized.shape[-1])
        rows[index.flatten()] = quantized.flatten(0, 1)  # a code is one vector
        parts.append(index)
    return Codes(rows, torch.cat(parts))


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
    of these widths, then one of C + 1."""

    def __init__(self, width: int, classes: int, widths: tuple):
        super().__init__()
        sizes = (width, *widths, classes + 1)
        self.layers = nn.Sequential(*(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:])))

    def forward(self, codes):
        used, index = codes.index.unique(return_inverse=True)
        return F.embedding(index, self.layers(codes.rows[used]))

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


def known_scores(logits, codes: Codes, seen: Codes) -> dict:
    """How much clips look like known ones, by each of SCORES: logits (N, C), their codes, those trained on -> {(N,)}.
    `distance`: that of a segment's codeword to the nearest one seen in training, mean over the segments, negated."""
    used, index = codes.index.unique(return_inverse=True)
    far = torch.cdist(codes.rows[used], seen.rows[seen.index.unique()],
                      compute_mode="donot_use_mm_for_euclid_dist").amin(1)  # exactly 0 from itself
    return {"softmax": logits.softmax(-1).amax(-1), "logit": logits.amax(-1), "energy": logits.logsumexp(-1),
            "distance": -far[index].mean(-1)}


# --------------------------------------------------------------------------------------------- what probes see of files
class ProbeSet:
    """Clips of a source or a target as probes see them: labels by the numbers of `classes`, all others being number C;
    codes, when asked for. `names` renames the file's classes."""

    def __init__(self, features: Features, classes: list, names: dict, device):
        number = {name: i for i, name in enumerate(classes)}
        place = [number.get(names.get(name, name), len(classes)) for name in features.classes]
        self.features, self.device, self.num_classes = features, device, len(classes)
        self.place = np.array([*place, -1])  # the last one of clips without a label, -1
        self.label = torch.from_numpy(self.place[features.label]).to(device)  # (N,)

    def encode_with(self, read) -> None:
        """Forget all codes; from now on `read(features, modality, clips) -> Codes` makes them."""
        self.read, self.known_codes = read, {}

    def codes(self, modality: str, clips) -> Codes:
        """Codes of these clips; each clip is encoded once."""
        if modality not in self.known_codes:
            index = torch.full((len(self.label), self.features.shape[modality][0]), -1, device=self.device)
            self.known_codes[modality] = Codes(None, index)
        kept = self.known_codes[modality]
        new = clips[(kept.index[clips, 0] < 0).cpu().numpy()]
        if len(new):
            fresh = self.read(self.features, modality, new)
            used = fresh.index.unique()
            kept.rows = torch.zeros_like(fresh.rows) if kept.rows is None else kept.rows
            kept.rows[used], kept.index[new] = fresh.rows[used], fresh.index
        return kept[clips]


@dataclass
class Part:
    """Some clips of a set, what a probe trains or is tested on; label (n,): C of unknown classes, -1 without."""
    of: ProbeSet
    clips: np.ndarray

    def __post_init__(self):
        self.features, self.label = self.of.features, self.of.label[self.clips]

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, keep):
        return Part(self.of, self.clips[np.asarray(keep)])

    def codes(self, modality: str) -> Codes:
        return self.of.codes(modality, self.clips)

    def events(self, modality: str):
        """(n, T, C) uint8: what happens when; classes that the probes do not know never happen."""
        happens, place = self.features.read(f"events/{modality}", self.clips), self.of.place[:-1]
        of_class = [happens[..., place == i].any(-1) for i in range(self.of.num_classes)]
        return np.stack(of_class, -1).astype(np.uint8) if of_class else happens[..., :0]

    def labelled(self):
        return self[(self.label >= 0).cpu()]

    def single(self):
        """The labelled ones with one event"""
        return Part(self.of, self.features.single_event(self.clips)).labelled()


def class_names(features: Features, target: Features | None, class_map: tuple):
    """-> The classes of the probes, those that both sides have, in the source's order; {target's name: source's name}
    by the entries `target's name=source's name` of `class_map`. Raises InputError on names that are not there."""
    names = {}
    for entry in class_map:
        theirs, equals, ours = entry.partition("=")
        if target is None or not equals or ours not in features.classes or theirs not in target.classes:
            raise InputError(f"--class-map '{entry}': expected 'class of --target=class of the source'")
        if theirs in names:
            raise InputError("--class-map: a class of --target is named twice")
        names[theirs] = ours
    if target is None or not target.classes:
        return features.classes, names
    shared = {names.get(name, name) for name in target.classes}
    return [name for name in features.classes if name in shared], names


def known_sets(known: tuple, classes: list) -> dict:
    """--known -> {entry: numbers of the known classes}: `5` the first five, `0,2,4` these three; default: the first
    half. Raises InputError on anything else."""
    sets = {}
    for entry in map(str, known or (len(classes) // 2,)):
        if not all(part.isdecimal() for part in entry.split(",")):
            raise InputError(f"--known {entry}: give a number of first classes, or class numbers such as 0,2,4")
        numbers = sorted(set(map(int, entry.split(","))))
        if not (numbers[-1] < len(classes) if "," in entry else 1 <= numbers[0] <= len(classes)):
            raise InputError(f"--known {entry}: the data has {len(classes)} classes, numbered from 0")
        sets[entry] = numbers if "," in entry else list(range(numbers[0]))
    return sets


def numbered(numbers: list, label, classes: int):
    """Labels (N,) by their place among the known classes `numbers`; all others become len(numbers), unknown."""
    place = torch.full((classes + 1,), len(numbers), device=label.device)
    place[torch.tensor(numbers, device=label.device)] = torch.arange(len(numbers), device=label.device)
    return place[label]


def clean_parts(parts: dict, numbers: list, closed: bool):
    """Parts of single labelled clips -> ({name: Part} as probes of the known classes `numbers` use them, {name: labels}
    by place among those, len(numbers) if unknown); `closed`: there are no unknown ones. Between two files, known
    classes without a training clip are left out, and of a closed set also those untested."""
    used, source = dict(parts), parts["train"].of
    if parts["test"].of is not source:
        known = torch.tensor(numbers, device=source.device)
        taught = known[torch.isin(known, parts["train"].label)]
        taught = taught[torch.isin(taught, parts["test"].label)] if closed else taught
        for name, part in parts.items():
            unknown = ~torch.isin(part.label, known)
            used[name] = part[(torch.isin(part.label, taught) | (unknown & (not closed))).cpu()]
    return used, {name: numbered(numbers, part.label, source.num_classes) for name, part in used.items()}


def directions(sources: list, targets: list) -> dict:
    """{trained on: [tested on, ...]}: each source with the targets that are another modality, if there are any."""
    return {a: [b for b in targets if b != a] for a in sources if set(targets) - {a}}


def direction(source: str, target: str, modalities: list) -> str:
    """`v2a`: trained on video, tested on audio. Initials, or whole names where initials are ambiguous."""
    ambiguous = len({m[0] for m in modalities}) < len(modalities)
    return f"{source}2{target}" if ambiguous else f"{source[0]}2{target[0]}"


def localized(features: Features, modalities: list) -> list:
    """Those of the modalities whose events are annotated segment by segment, in every file."""
    held = [m for m in modalities if m in features.modalities]
    return [m for m in held if all(f"events/{m}" in file.h5 for file in features.files)]


def maps_with_masks(features: Features, modalities: list) -> dict:
    """{modality: [p, q] pixels of a cell}: of the maps whose cells divide the masks, of one size, into whole pixels."""
    sizes = {file.h5["mask"].shape[2:] if "mask" in file.h5 else () for file in features.files}
    size, found = np.array(max(sizes)), {}
    for m in modalities:
        cells = features.shape[m][1:-1]  # (H, W) of maps
        if len(sizes) == 1 and len(size) == len(cells) == 2 and not (size % cells).any():
            found[m] = (size // cells).tolist()
    return found


def groups(features: Features, clips):
    """What is one item for retrieval: the group of each clip, told apart by file; without groups the clip itself."""
    if not all("group" in file.h5 for file in features.files):
        return torch.from_numpy(clips)
    owner = np.searchsorted(features.starts, clips, side="right")
    pairs = np.stack([owner, features.read("group", clips)])
    return torch.from_numpy(np.unique(pairs, axis=1, return_inverse=True)[1].reshape(-1))


# ---------------------------------------------------------------------------------------------------------------- plan
class Plan:
    """What is to be probed, built and checked before any training, for a model of `shape` {m: (T, d) or (T, H, W, d)}.

    Probes train on the train split of `features` and are tested on the test split of `target`, files of their own, or
    without one of `features` itself. `tasks`: of TASKS; without any, those of DEFAULT_TASKS that can be done. `known`
    and `class_map` are as on the command line. `every_clip`: with a target, train and test on all clips of either side
    (`official.protocol`, which needs no held-out clips). Raises InputError if what was asked for cannot be done."""

    def __init__(self, features: Features, shape: dict, device, tasks: tuple = (), known: tuple = (),
                 score: str = "softmax", target: Features | None = None, class_map: tuple = (),
                 every_clip: bool = False):
        self.device, self.modalities, self.score = torch.device(device), list(shape), score
        self.every_clip, self.own_target = every_clip, target is not None
        tested = target if self.own_target else features
        self.classes, names = class_names(features, target, class_map)
        source_set = ProbeSet(features, self.classes, {}, self.device)
        target_set = ProbeSet(tested, self.classes, names, self.device) if self.own_target else source_set
        self.parts = {name: Part(source_set, features.clips(name)) for name in ("train", "val", "test")}
        self.parts["same"] = self.parts["test"]  # of the source
        self.parts["test"] = Part(target_set, tested.clips("test"))
        if every_clip and self.own_target:
            self.parts["train"] = Part(source_set, np.arange(len(features)))
            self.parts["test"] = Part(target_set, np.arange(len(tested)))
        self.single = {name: part.single() for name, part in self.parts.items()}  # what probes of whole clips see
        for name, (m, wanted) in itertools.product(("train", "test"), shape.items()):
            found = tuple(self.parts[name].features.shape.get(m, wanted))
            self.require(name, found == tuple(wanted), f"{m} has shape {found}, the model wants {tuple(wanted)}")
        held = [m for m in shape if m in features.modalities]
        self.tested_modalities = [m for m in shape if m in tested.modalities]
        self.both = [m for m in held if m in self.tested_modalities]
        self.directions = directions(held, self.tested_modalities)
        other = f", one here and another in {tested.files[0].path}" if self.own_target else ""
        self.require("train", self.directions, f"holds {' '.join(features.modalities)}, probes need two of "
                     f"{' '.join(shape)}{other}")
        by_class = {"classification", "open_set", "localization"} & set(tasks or DEFAULT_TASKS)
        self.require("train", self.classes or not features.classes or not by_class, "no class in common with "
                     f"{tested.files[0].path}; --class-map renames those of the target")
        self.known, self.event_directions, self.tasks = {}, {}, []
        for task in tasks or DEFAULT_TASKS:
            try:
                self.check(task, known)
                self.tasks.append(task)
            except InputError:
                if tasks or known and task == "open_set":  # it was asked for
                    raise

    def require(self, name: str, there, message: str) -> None:
        """Raise InputError naming the file of the part `name` unless `there`."""
        if not there:
            raise InputError(f"{self.parts[name].features.files[0].path}: {message}")

    def require_clips(self, name: str, there, task: str, why: str = "") -> None:
        place = {"train": "source", "test": "target"}[name] if self.every_clip and self.own_target else f"{name} split"
        self.require(name, there, f"the {place} is empty{why}, --tasks {task} needs clips there")

    def tags(self, task: str, source: str, target: str, figures: dict, suffix: str = "") -> dict:
        """{name: value} of one direction -> {tag: value}"""
        where = f"eval/{task}/{direction(source, target, self.modalities)}{suffix}"
        return {f"{where}/{name}": value for name, value in figures.items()}

    def check(self, task: str, known: tuple) -> None:
        """Raise InputError if the clips do not allow this task; make ready what it needs."""
        if task == "classification":
            self.check_clips(task, list(range(len(self.classes))), "")
        elif task == "open_set":
            self.known = known_sets(known, self.classes)
            for entry, numbers in self.known.items():
                self.check_clips(task, numbers, f" for --known {entry}")
        elif task == "localization":
            self.check_localization()
        elif task == "segmentation":
            self.check_segmentation()
        elif task in TASKS:
            self.check_retrieval(task)
        else:
            raise InputError(f"--tasks {task}: expected some of {' '.join(TASKS)}")

    def check_clips(self, task: str, numbers: list, of: str) -> None:
        names = ("train", "test", "val") if task == "open_set" and not self.every_clip else ("train", "test")
        for name in names:
            self.require_clips(name, len(self.single[name]), task, " (no labelled clip with one event)")
        used = self.single if self.every_clip else clean_parts(self.single, numbers, task == "classification")[0]
        for name in names:
            known = numbered(numbers, used[name].label, len(self.classes)) < len(numbers)
            self.require(name, known.any(), f"the {name} split has no known classes{of}")
            if task == "open_set" and name == "test":
                self.require(name, not known.all(), f"the {name} split has no unknown classes{of}")

    def check_localization(self) -> None:
        heard = [localized(self.parts[name].features, self.modalities) for name in ("train", "test")]
        self.event_directions = directions(*heard)
        self.require("train", self.event_directions, "--tasks localization needs events/<modality> of two modalities, "
                     f"found those of {' '.join(dict.fromkeys(sum(heard, []))) or 'none'}")
        for source, targets in self.event_directions.items():
            for name, m in [("train", source), *itertools.product(["test"], targets)]:
                self.require_clips(name, len(self.parts[name]), "localization")
                self.require_clips(name, not self.own_target or self.parts[name].events(m).any(), "localization",
                                   f" (no clip with an event of a common class in {m})")

    def check_retrieval(self, task: str) -> None:
        train, test = self.parts["train"], self.parts["test"]
        enough = len(self.tested_modalities) > 1 and len(groups(test.features, test.clips).unique()) >= max(RANKS)
        self.require("test", enough, f"--tasks {task} needs two modalities and {max(RANKS)} clips or groups in the "
                     "test split")
        if task == "x_retrieval":
            self.require("train", len(self.both) > 2 and len(train), "--tasks x_retrieval needs three modalities and a "
                         f"train split, found {' '.join(self.both)} and {len(train)} clips")

    def check_segmentation(self) -> None:
        maps = [maps_with_masks(self.parts[name].features, self.both) for name in ("train", "test")]
        self.require("train", len(maps[0]) == 1 and maps[0] == maps[1] and len(self.both) > 2, "--tasks segmentation "
                     "needs masks of one size, a single modality of maps whose cells divide them, and two other "
                     "modalities to ask with")
        for name in ("train", "test"):
            self.require(name, len(self.parts[name].labelled()), f"no labelled clip in the {name} split, --tasks "
                         "segmentation needs them")

    @contextmanager
    def probing(self, model, encode, codebook_size: int):
        """Meanwhile the model is in eval mode and makes the codes: gives `read(features, modality, clips) -> Codes`.

        Afterwards the model's mode and the random state of the process are as they were, and no codes are kept."""
        training = model.training
        read = partial(read_codes, model, encode, codebook_size=codebook_size, device=self.device)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            try:
                model.eval()
                for part in self.parts.values():
                    part.of.encode_with(read)
                yield read
            finally:
                model.train(training)
                for part in self.parts.values():
                    part.of.encode_with(None)

    def evaluate(self, model, encode, codebook_size: int):
        """Probe the model as it is now -> ({tag: value}, {m: (K,) code selections on the test clips})"""
        test = self.parts["test"]
        with self.probing(model, encode, codebook_size):
            shown = test if len(test) else Part(test.of, np.arange(len(test.features)))
            codes = {m: shown.codes(m).index for m in self.tested_modalities}
            figures, selections = codebook_metrics(codes, codebook_size)
            tags = {f"eval/codebook/{name}": value for name, value in figures.items()}
            for task, probe in PROBES.items():
                if task in self.tasks:
                    tags |= probe(self)
        return tags, selections


# ---------------------------------------------------------------------------------------------- tasks: clips and events
def train_clip_probe(train: Part, label, source: str, num_known: int):
    """A probe of the clips whose `label` (n,) is a known class -> (ProbeTraining, the Codes that it was trained on)"""
    known = label < num_known
    seen = train.codes(source)[known]
    probe = ProbeTraining(partial(ClipProbe, seen.rows.shape[-1], num_known), label.device)
    for _ in range(EPOCHS):
        probe.epoch(seen, label[known])
    return probe, seen


def classification(plan: Plan) -> dict:
    """Which class a clip has: trained on one modality, tested on another; `acc_same` is of the source itself -> tags"""
    used, label = clean_parts(plan.single, list(range(len(plan.classes))), closed=True)
    tags = {}
    for source, targets in plan.directions.items():
        probe, _ = train_clip_probe(used["train"], label["train"], source, len(plan.classes))
        same = {}
        if len(used["same"]):
            prediction = probe.logits(used["same"].codes(source)).argmax(-1)
            same["acc_same"] = accuracy(prediction, label["same"])["acc"]
        for target in targets:
            found = accuracy(probe.logits(used["test"].codes(target)).argmax(-1), label["test"])
            figures = {"acc": found["acc"], **same, "macro_recall": found["macro_recall"]}
            tags |= plan.tags("classification", source, target, figures)
    return tags


def open_set(plan: Plan) -> dict:
    """The same where some classes are unknown to the probe. It rejects a clip whose confidence is below that of nearly
    all held-out known clips of the source, by each of the scores with a threshold of its own -> tags"""
    tags = {}
    for entry, numbers in plan.known.items():
        used, label = clean_parts(plan.single, numbers, closed=False)
        for source, targets in plan.directions.items():
            probe, seen = train_clip_probe(used["train"], label["train"], source, len(numbers))
            held_out = used["val"].codes(source)[label["val"] < len(numbers)]
            held_out_scores = known_scores(probe.logits(held_out), held_out, seen)
            threshold = {name: confidence.quantile(REJECT).item() for name, confidence in held_out_scores.items()}
            for target in targets:
                codes = used["test"].codes(target)
                logits = probe.logits(codes)
                figures = open_set_figures(known_scores(logits, codes, seen), threshold, logits.argmax(-1),
                                           label["test"], len(numbers), plan.score)
                tags |= plan.tags(f"open_set_{entry}", source, target, figures)
    return tags


def open_set_figures(scores: dict, threshold: dict, prediction, target, num_known: int, main_score: str) -> dict:
    """Figures of one direction: scores {name: (N,)}, a threshold for each; those of `main_score` stand first."""
    known = target < num_known
    at_threshold, hos, area = {}, {}, {}
    for name, confidence in scores.items():
        at_threshold[name] = open_set_metrics(confidence, prediction, target, num_known, threshold[name])
        hos[f"hos_{name}"] = at_threshold[name]["hos"]
        area[f"auroc_{name}"] = auroc(confidence[known], confidence[~known])
    confidence = scores[main_score]
    none_rejected = open_set_metrics(confidence, prediction, target, num_known, -math.inf)
    return {**at_threshold[main_score], "hos_oracle": oracle_hos(confidence, prediction, target, num_known),
            "auroc": area[f"auroc_{main_score}"], "acc_known": none_rejected["os_star"], **hos, **area}


def annotated(part: Part, modality: str, own_target: bool):
    """A part's clips with an event of its classes (all of them unless the target is a file of its own), what happens in
    them (n, T, C + 1), the last column being background, and which clips of the part they are"""
    happens = part.events(modality)
    keep = happens.any((1, 2)) | (not own_target)
    happens = torch.from_numpy(happens[keep]).to(part.of.device).float()
    return part[keep], torch.cat([happens, 1 - happens.amax(-1, keepdim=True)], -1), keep


def localization(plan: Plan) -> dict:
    """What happens when: a probe of every segment, trained on one modality and its events, tested on another and its
    -> tags. With a target of its own, clips in which nothing known happens are left out."""
    tags = {}
    for source, targets in plan.event_directions.items():
        train, event, _ = annotated(plan.parts["train"], source, plan.own_target)
        codes = train.codes(source)
        width = codes.rows.shape[-1]
        probe = ProbeTraining(partial(SegmentProbe, width, len(plan.classes), (width,)), event.device)
        for _ in range(EPOCHS):
            probe.epoch(codes, event)
        for target in targets:
            test, true, _ = annotated(plan.parts["test"], target, plan.own_target)
            score = probe.logits(test.codes(target)).sigmoid()
            foreground = segment_metrics(score[..., :-1], true[..., :-1])["f1"]
            figures = segment_metrics(score, true) | {"f1_foreground": foreground, **constant_f1(true)}
            tags |= plan.tags("localization", source, target, figures)
    return tags


# ---------------------------------------------------------------------------------------------------- tasks: retrieval
@dataclass
class Items:
    """What retrieval compares: mean codes (I, D), group (I,), label (I,), on the host."""
    code: torch.Tensor
    group: torch.Tensor
    label: torch.Tensor

    def find(self, database, k: int) -> dict:
        """`r<k>`: `recall_at_k` by group; `class_r<k>`: by class, of the labelled queries; and what chance gives."""
        found = {f"r{k}": recall_at_k(self.code, database.code, self.group, database.group, k),
                 f"chance_r{k}": chance(self.group, database.group, k)}
        some = self.label >= 0
        if some.any():
            found[f"class_r{k}"] = recall_at_k(self.code[some], database.code, self.label[some], database.label, k)
            found[f"class_chance_r{k}"] = chance(self.label[some], database.label, k)
        return found


def items(part: Part, modality: str) -> Items:
    """The items of a modality among these clips. Rows of one group with the same features, such as the sound beside
    each of its captions, are one item."""
    group, rows = groups(part.features, part.clips), torch.arange(len(part))
    if len(group.unique()) < len(part):
        seen = {}  # (group, digest of the features) -> first row
        for i in range(0, len(part), 200):
            for row, x in enumerate(part.features.read(modality, part.clips[i:i + 200]), i):
                seen.setdefault((group[row].item(), hashlib.sha256(x).digest()), row)
        rows = torch.tensor(list(seen.values()))
    label = torch.from_numpy(part.features.label[part.clips])  # the file's own: nothing is learned of classes
    return Items(part[rows].codes(modality).mean().cpu(), group[rows], label[rows])


def retrieval(plan: Plan) -> dict:
    """Zero-shot: of the test clips, which items of b are nearest to an item of a, by the cosine of their mean codes? An
    item is right if it comes from the same clip or group (`r1`), or has the same class (`class_r1`) -> tags"""
    tags, item = {}, {m: items(plan.parts["test"], m) for m in plan.tested_modalities}
    for a, b in itertools.permutations(item, 2):
        figures = {"queries": len(item[a].code), "database": len(item[b].code)}
        for k in RANKS:
            figures |= item[a].find(item[b], k)
        tags |= plan.tags("retrieval", a, b, figures)
    for a, b in itertools.combinations(item, 2):
        there, back = direction(a, b, plan.modalities), direction(b, a, plan.modalities)
        for k in RANKS:
            both = tags[f"eval/retrieval/{there}/r{k}"] + tags[f"eval/retrieval/{back}/r{k}"]
            tags[f"eval/retrieval/{there}+{back}/r{k}"] = both / 2
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


def x_retrieval(plan: Plan) -> dict:
    """Uni-Code's Table 5: a map from the mean codes of one modality to those of another is trained; a third modality's
    codes go through it, untouched, to retrieve the other's. Tags `a2b_to_c`: trained with queries of a, tested with
    queries of b; `same_r10` are those of a, `zero_r10` b's without any map. What is right is as in `retrieval`."""
    tags, train = {}, plan.parts["train"]
    item = {m: items(plan.parts["test"], m) for m in plan.both}
    first = np.unique(groups(train.features, train.clips).numpy(), return_index=True)[1]  # one clip a group
    taught = {m: F.normalize(train[first].codes(m).mean(), dim=-1) for m in plan.both}
    for source, target, asking in itertools.permutations(plan.both, 3):
        project = fit_map(taught[source], taught[target])
        mapped, same = [replace(item[m], code=project(item[m].code)) for m in (asking, source)]
        figures = {f"r{k}": mapped.find(item[target], k)[f"r{k}"] for k in RANKS}
        figures["zero_r10"] = item[asking].find(item[target], 10)["r10"]
        figures["same_r10"] = same.find(item[target], 10)["r10"]
        figures |= mapped.find(item[target], 10)
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


def frames(part: Part, seen: str, rows):
    """Of these clips of a part: maps (B, T, H, W, d), masks (B, T, h, w) of their labelled class, and which frames have
    one (B, T)"""
    clips, device = part.clips[rows.numpy()], part.of.device
    maps, mask = part.features.read(seen, clips), part.features.read("mask", clips)
    asked = mask == part.features.label[clips][:, None, None, None] + 1
    known = torch.from_numpy((mask != NOT_ANNOTATED).all((2, 3))).to(device)
    return torch.from_numpy(maps).to(device).float(), torch.from_numpy(asked).to(device).float(), known


def event_code(part: Part, modality: str, present: list):
    """The query of each clip (N, D): its mean code over the segments in which its event happens, in a modality without
    annotation, such as a sentence, over all"""
    codes, label = part.codes(modality), part.features.label[part.clips]
    if modality not in localized(part.features, present):
        return codes.mean()
    happens = part.features.read(f"events/{modality}", part.clips)[np.arange(len(label)), :, label] > 0  # (N, T)
    return codes.mean(torch.from_numpy(happens).to(part.of.device))


def fit_decoders(train: Part, seen: str, cell: list, query: dict) -> dict:
    """{name: queries (N, D)} -> {name: QueryDecoder}, alike at the start and trained on the same batches"""
    device, decoder = train.of.device, nn.ModuleDict()
    for name, vectors in query.items():
        torch.manual_seed(0)
        decoder[name] = QueryDecoder(train.features.shape[seen][-1], vectors.shape[-1], cell).to(device)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=MASK_LEARNING_RATE, fused=True)
    for _ in range(MASK_EPOCHS):
        for rows in torch.randperm(len(train)).split(BATCH_SIZE):
            maps, mask, known = frames(train, seen, rows)
            t = known.any(0).nonzero()[:, 0]
            t = t[torch.randperm(len(t))[:MASK_FRAMES].to(device)]
            known, loss = known[:, t], 0
            for name, draw in decoder.items():
                drawn = draw(maps[:, t], query[name][rows.to(device)])[known]
                loss = loss + F.binary_cross_entropy_with_logits(drawn, mask[:, t][known])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return decoder


@torch.no_grad()
def drawn_frames(test: Part, seen: str, asked: dict):
    """asked {key: (decoder, queries (N, D))} -> {key: IoU of each frame (N, T), nan where nobody annotated}, {key:
    F-scores of the frames with a mask (n, 255)}"""
    iou, curves = {key: [] for key in asked}, {key: [] for key in asked}
    for rows in torch.arange(len(test)).split(BATCH_SIZE):
        maps, mask, known = frames(test, seen, rows)
        for key, (draw, query) in asked.items():
            probability = draw(maps, query[rows.to(mask.device)]).sigmoid() if draw else torch.zeros_like(mask)
            iou[key].append(torch.where(known, mask_iou(probability, mask).view(known.shape), torch.nan).cpu())
            if key[2] == "miou":
                curves[key].append(mask_curve(probability[known], mask[known]))
    return [{key: torch.cat(batches) for key, batches in found.items() if batches} for found in (iou, curves)]


def segmentation(plan: Plan) -> dict:
    """Which pixels are what the query asks for? A decoder over the maps, trained with queries of one modality and
    tested with those of another, on every frame of the labelled clips -> tags

    Controls: `miou_shuffled_query` (of another clip), `miou_constant_query` (of the first clip, for all),
    `miou_no_query` (a decoder trained without one), `miou_nothing` (no pixel); `several_*` are of clips with several
    events, where only the query says which is meant. Maps and masks are read batch by batch."""
    train, test = plan.parts["train"].labelled(), plan.parts["test"].labelled()
    ((seen, cell),) = maps_with_masks(train.features, plan.both).items()
    taught = {m: event_code(train, m, plan.both) for m in plan.both if m != seen}
    right = {m: event_code(test, m, plan.both) for m in taught}
    nobody = torch.zeros_like(next(iter(taught.values()))[:1])
    decoder = fit_decoders(train, seen, cell, {"nobody": nobody.expand(len(train), -1), **taught})
    other = torch.randperm(len(test), generator=torch.Generator().manual_seed(0)).to(plan.device)
    asked, tags = {}, {}
    for a, b in itertools.permutations(taught, 2):
        asked[a, b, "miou"] = decoder[a], right[b]
        asked[a, b, "miou_shuffled_query"] = decoder[a], right[b][other]
        asked[a, b, "miou_constant_query"] = decoder[a], right[b][:1].expand_as(right[b])
        asked[a, b, "miou_no_query"] = decoder["nobody"], nobody.expand(len(test), -1)
        asked[a, b, "miou_nothing"] = None, None
    iou, curves = drawn_frames(test, seen, asked)
    several = torch.from_numpy(~np.isin(test.clips, test.features.single_event(test.clips)))
    for (a, b, name), value in iou.items():
        tags |= plan.tags("segmentation", a, b, {name: value.nanmean().item()})
        if several.any():
            tags |= plan.tags("segmentation", a, b, {f"several_{name}": value[several].nanmean().item()})
    for (a, b, _), value in curves.items():
        tags |= plan.tags("segmentation", a, b, {"f_score": value.mean(0).max().item()})
    return tags


PROBES = {"classification": classification, "open_set": open_set, "localization": localization, "retrieval": retrieval,
          "x_retrieval": x_retrieval, "segmentation": segmentation}  # in the order of the table


# ------------------------------------------------------------------------------------------------------------- showing
def table(tags: dict) -> str:
    """The `eval/` tags in plain columns: fractions in percent with one decimal, counts as they are."""
    tasks = {}
    for tag, value in tags.items():
        _, task, *where, metric = tag.split("/")
        if metric.removeprefix("hos_").removeprefix("auroc_") in SCORES:
            continue  # in results.json
        row, column = (metric, "value") if task == "codebook" else (where[0], metric)
        plain = metric.startswith(("used_", "perplexity_")) or metric in ("queries", "database")
        cell = f"{value:.0f}" if plain else f"{100 * value:.1f}"
        tasks.setdefault(task, {}).setdefault(row, {})[column] = cell
    lines = []
    for task, rows in tasks.items():
        widths = {column: max(len(column), 6) for column in next(iter(rows.values()))}
        lines += ["", f"{task:19}" + "  ".join(f"{column:>{width}}" for column, width in widths.items())]
        for row, cells in rows.items():
            line = "  ".join(f"{cells.get(column, '-'):>{width}}" for column, width in widths.items())
            lines.append(f"  {row:17}{line}")
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
        args = method.Args(**state["args"])
        model = method.Model(state["shape"], args)
        weights = {name: value for name, value in state["networks"].items() if name.startswith("model.")}
        model.load_state_dict({name.removeprefix("model."): value for name, value in weights.items()})
        return method, args, state["shape"], model, state["epoch"]
    except Exception as error:  # whatever is wrong with the file, the user needs one line
        raise InputError(f"{path}: not a checkpoint of these scripts ({first_line(error)})")


def open_features(files: tuple, target: tuple, runs_dir: str, out: str | None):
    """The Features of FILE ... and of `--target`, None without. Raises InputError, also if `out` cannot be written."""
    if out and not Path(out).resolve().parent.is_dir():
        raise InputError(f"--out {out}: the folder does not exist")
    return Features(files, runs_dir), Features(target, runs_dir) if target else None


def open_run(paths: tuple, target: tuple, out: str | None):
    """`RUN [FILE ...]` of a command line -> what `load` gives, `open_features` of FILE ... or of the run's data."""
    if not paths:
        raise InputError("give a run folder")
    loaded = load(Path(paths[0]))
    args = loaded[1]
    return loaded, *open_features(paths[1:] or args.data, target, args.runs_dir, out)


def report(tags: dict, out: str | None) -> None:
    """Print the table and write all figures to the JSON file `out`, if there is one."""
    if out:
        Path(out).write_text(json.dumps(tags, indent=1) + "\n")
    print(table(tags))


def main(paths: tyro.conf.Positional[tuple[str, ...]], *, tasks: tuple[Literal[TASKS], ...] = (),
         known: tuple[str, ...] = (), score: Literal[SCORES] = "softmax", target: tuple[str, ...] = (),
         class_map: tuple[str, ...] = (), out: str | None = None, device: str = "auto") -> None:
    """Probe the model of RUN (a run folder or its checkpoint.pt) on FILE ... (default: the data it was trained on).

    Args:
        paths: RUN [FILE ...]
        tasks: what is probed, see docs/tasks.md; default: classification and open_set, as far as there are labels.
        known: open-set tasks: a number of known first classes, or class numbers such as 0,2,4; default: half of them.
        score: by which unknown clips are told from known ones in what is printed.
        target: files to test on, of clips, modalities and classes of their own; default: the test split of FILE ...
        class_map: names of the target's classes that differ, each as "target's name=source's name".
        out: a JSON file for all figures, those of the other scores as well.
        device: `auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1`."""
    (method, args, shape, model, _), source, target = open_run(paths, target, out)
    device = pick_device(device)
    plan = Plan(source, shape, device, tasks, known, score, target, class_map)
    tags, _ = plan.evaluate(model.to(device), method.encode, args.codebook_size)
    report(tags, out)


if __name__ == "__main__":
    sys.excepthook = explain_input_errors
    tyro.cli(main)

"""CoDAAR (Sen et al.): a discrete code per modality, aligned index by index, from paired, unlabelled sequences.

Each modality has an encoder and a codebook of its own; the same index is to mean the same in all of them. Cross-CPC
makes the encoders aware of each other, DQA lets the modalities of a clip use the same indices, DTA builds each codeword
from what all modalities say where it was chosen, and CSA pulls the codewords of an index towards their mean. The
commitment pulls the encoders to them, with a beta that rises over the run:

    L = sum over modalities (L_rec + L_commit) + sum over pairs (L_cpc + L_cmcm)                               (Eq. 10)

Then the encoders and the codebooks are frozen, and a probe trained on one modality's codes is tested on another's.

    python codaar.py --cascade text audio video            # embedded digits: composes, trains, probes, prints the table
    python codaar.py --data vggsound40k.h5 --probe-data ave.h5
    python codaar.py --help                                # every flag; README.md lists paper against release

Shapes: B clips of a batch, T segments, D code width, K codes, M modalities, N = B * T, d any other width.
"""
import itertools
import json
import math
import random
import resource
import signal
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Optional

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import probes
from data import Batches, Features, data_files
from run import (WORLD_SIZE, RANK, InputError, all_reduce_sum, any_process_signalled, average_gradients, explain_input_errors, first_line,
                 all_gather, git_commit, init_distributed, all_gather_object, pick_device, require_shape, write_atomically)

METHOD = "codaar"


@dataclass
class Args:
    # training features: `digits` (embedded, composed on first use) or cmg-features files
    data: tuple[str, ...] = ("digits",)
    probe_data: tuple[str, ...] = ()  # features for the probes; default: the splits of the training data
    probe_target: tuple[str, ...] = ()  # features to test the probes on; default: the test split of the probe data
    class_map: tuple[str, ...] = ()  # classes of the probe target with other names: "target's name=source's name"
    modalities: tuple[str, ...] = ()  # two or more modalities of the data; default: all
    epochs: Optional[int] = None  # passes over the train split; default: 6
    batch_size: int = 80  # clips per step, B
    learning_rate: float = 4e-4  # of Adam
    codebook_size: int = 800  # number of codes, K
    code_dim: int = 256  # width of a code, D
    # start of the codebook: encoder outputs of the first batch, or U(-1/K, 1/K)
    codebook_init: Literal["data", "uniform"] = "data"
    # steps without use after which a code is reset, N_re; 0 never; default: 10 under 10,000 clips, else 300
    reset_after: Optional[int] = None
    seed: int = 1  # of weights, batches and CPC's moments
    device: str = "auto"  # `auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1`
    precision: Literal["fp32", "bf16"] = "fp32"  # of encoders and decoders; distances, EMA and losses are fp32
    compile: bool = False  # compile the networks
    runs_dir: str = "runs"  # where run folders and the composed digits go
    resume: Optional[str] = None  # run folder to continue; its settings are taken over
    eval_every: int = 0  # probe every so many epochs besides the end; 0: at the end only
    # save a checkpoint after this many steps of the run and stop, as Ctrl-C does
    stop_after_steps: Optional[int] = None
    log_every: int = 10  # steps between log lines; the only host synchronisation of a step
    # where features wait: on the device, in host memory, or in the file, read ahead by a thread
    features_on: Literal["auto", "device", "memory", "file"] = "auto"
    # what is probed at the end and every `eval_every` epochs; default: classification and open_set if there are labels
    tasks: tuple[Literal[probes.TASKS], ...] = ()
    # open-set tasks: a number of known first classes, or class numbers such as 0,2,4; default: half of the classes
    known: tuple[str, ...] = ()
    score: Literal[probes.SCORES] = "softmax"  # by which unknown clips are told from known ones; results.json has all
    ema_decay: float = 0.99  # decay of the codebook's moving averages, gamma
    # reset a code that some modality (unshared) or that every modality (unused) left alone for N_re steps
    reset_rule: Literal["unshared", "unused"] = "unshared"
    # what a reset index becomes: in each codebook its modality's output at one segment, or in all of them the mean of
    # all modalities' there; or copies of a live index plus noise
    reset_source: Literal["batch", "paired", "live"] = "batch"
    # how the cells of a feature map become one vector; `sum` is what the released code computes
    spatial_pool: Literal["attention", "sum"] = "attention"
    # factor of the attention scores, which lie in (-1, 1): at 1 no cell of 49 can get more than 13 % of the weight
    pool_sharpness: float = 10.0
    # channels of the modality-specific map branch, as a multiple of d; default: 1 under 10,000 clips, else 2
    recon_width: Optional[int] = None
    cpc: bool = True  # predict the other modalities by Cross-CPC
    cpc_steps: int = 1  # segments predicted ahead
    dqa: bool = True  # match the indices that the modalities of a clip use, L_cmcm
    dta: bool = True  # build codewords from all modalities' outputs at the segments that chose them (Eq. 4, 5)
    # weight of the own output in DTA, the rest shared equally; default: 0.75 for two modalities, else 0.6
    lambda_self: Optional[float] = None
    csa: bool = True  # pull the codewords of an index to their mean, one modality after the other (Eq. 6, 7)
    cascade: tuple[str, ...] = ()  # order of CSA; default: text, audio, video, others as in the data
    # weight of the commitment, beta, for a mean over D (paper: 0.25 for a sum): the larger, the more indices shared;
    # default: 1 for two modalities, 2 for more
    commitment_cost: Optional[float] = None
    commitment_warmup: float = 1.0  # share of the run in which beta rises from 0; 0: constant (paper)
    # what a probe reads at index k: the codewords of all codebooks side by side, or the modality's own
    probe_code: Literal["row", "own"] = "row"


# ------------------------------------------------------------------------------------------------------------ encoders
class SpatialPool(nn.Module):
    """Feature maps to vectors, (B, T, H, W, d) -> (B, T, d): a channel gate, then attention over the H * W cells."""

    def __init__(self, width: int, hidden: int, kind: str, sharpness: float):
        super().__init__()
        self.kind, self.sharpness = kind, sharpness
        squeezed = max(1, width // 8)
        self.gate = nn.Sequential(nn.Linear(width, squeezed, bias=False), nn.ReLU(),
                                  nn.Linear(squeezed, width, bias=False), nn.Sigmoid())
        self.mean_proj, self.cell_proj = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.score = nn.Linear(hidden, 1)

    def forward(self, x):
        x = x.flatten(2, 3)  # (B, T, H*W, d)
        x = x + x * self.gate(x.mean(2, keepdim=True))
        if self.kind == "sum":
            return x.sum(2)
        # score of a cell = w.(relu(A mean x) * relu(Q x)) + b, the mean's factor folded into w
        w = F.relu(self.mean_proj(x.mean(2))) * self.score.weight  # (B, T, hidden)
        cells = self.cell_proj(x.flatten(0, 2)).relu_()  # (B*T*H*W, hidden): in place, but on a view that would copy
        score = cells.unflatten(0, x.shape[:3]) @ w[..., None] + self.score.bias  # (B, T, H*W, 1)
        return ((self.sharpness * score.tanh()).softmax(2) * x).sum(2)


class SemanticEncoder(nn.Module):
    """Phi_m: features (B, T, ...) -> semantic z (B, T, D). No positions are encoded: they alone would solve L_fine."""

    def __init__(self, modality: str, shape: tuple, args: Args):
        super().__init__()
        width, code_dim = shape[-1], args.code_dim
        self.pool = SpatialPool(width, code_dim, args.spatial_pool, args.pool_sharpness) if len(shape) == 4 else None
        self.lstm = nn.LSTM(width, 128, 2, batch_first=True, bidirectional=True) if modality == "text" else None
        self.proj = nn.Linear(256 if modality == "text" else width, code_dim)
        layer = nn.TransformerEncoderLayer(code_dim, 4, 1024, dropout=0.1, batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        x = self.pool(x) if self.pool else x  # (B, T, H, W, d) -> (B, T, d)
        x = self.lstm(x)[0] if self.lstm else x  # (B, T, d) -> (B, T, 256)
        return self.transformer(self.proj(x))


def to_channels_first(x):
    """(B, T, H, W, d) -> (B*T, d, H, W): a view, in the channels-last layout that convolutions like."""
    return x.flatten(0, 1).permute(0, 3, 1, 2)


class Residual(nn.Module):
    """(N, c, h, w) -> (N, c, h, w)"""

    def __init__(self, width: int):
        super().__init__()
        self.block = nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, 3, padding=1, bias=False),
                                   nn.ReLU(), nn.Conv2d(width, width, 1, bias=False))

    def forward(self, x):
        return x + self.block(x)


class SpecificEncoder(nn.Module):
    """Psi_m, what only this modality knows: (B, T, d) -> (B, T, 256), or (B, T, H, W, d) -> (B*T, 2 r d, H-4, W-4)."""

    def __init__(self, shape: tuple, recon_width: int):
        super().__init__()
        d, self.is_map = shape[-1], len(shape) == 4
        r = recon_width * d
        self.width = 2 * r if self.is_map else 256
        self.net = nn.Sequential(nn.Conv2d(d, r, 3), nn.ReLU(), nn.Conv2d(r, 2 * r, 3), nn.ReLU(),
                                 nn.Conv2d(2 * r, 2 * r, 1), Residual(2 * r), nn.ReLU()) if self.is_map else \
            nn.Sequential(nn.Linear(d, self.width), nn.ReLU())

    def forward(self, x):
        return self.net(to_channels_first(x) if self.is_map else x)


# ----------------------------------------------------------------------------------------------------------- quantizer
def nearest_code(z, codebook):
    """Index of the codeword at the smallest squared Euclidean distance: z (..., D), codebook (K, D) -> (...) int64.

    Computed in fp32 at least, also under autocast. Raises ValueError on shapes that do not fit."""
    require_shape("codebook", codebook, (-1, -1))
    require_shape("z", z, (*z.shape[:-1], codebook.shape[1]))
    dtype = torch.promote_types(z.dtype, torch.float32)
    flat, codes = z.detach().reshape(-1, z.shape[-1]).to(dtype), codebook.to(dtype)
    with torch.autocast(z.device.type, enabled=False):
        # ||z - e||^2 = ||z||^2 - 2 z.e + ||e||^2, the first term being the same for all codes
        distance = torch.addmm(codes.square().sum(1), flat, codes.T, alpha=-2)  # (N, K)
    return distance.argmin(1).view(z.shape[:-1])


def ema_update(ema_count, ema_sum, code_index, vectors, decay: float):
    """One joint EMA step over all the vectors: ema_count (K,), ema_sum (K, D), code_index (N,), vectors (N, D).

    Returns new (ema_count, ema_sum, codebook); the Laplace-smoothed count divides and is never written back.
    Raises ValueError on shapes that do not fit."""
    require_shape("ema_count", ema_count, (-1,))
    require_shape("ema_sum", ema_sum, (len(ema_count), -1))
    require_shape("vectors", vectors, (-1, ema_sum.shape[1]))
    require_shape("code_index", code_index, (len(vectors),))
    vectors = vectors.detach().to(ema_sum.dtype)
    count = torch.zeros_like(ema_count).index_add_(0, code_index, torch.ones_like(vectors[:, 0]))
    total = torch.zeros_like(ema_sum).index_add_(0, code_index, vectors)
    count, total = all_reduce_sum(count), all_reduce_sum(total)  # over all processes
    ema_count = decay * ema_count + (1 - decay) * count
    ema_sum = decay * ema_sum + (1 - decay) * total
    eps, n = 1e-5, ema_count.sum()
    smoothed = (ema_count + eps) / (n + len(ema_count) * eps) * n
    return ema_count, ema_sum, ema_sum / smoothed[:, None]


def temporal_mix(z: dict, modality: str, lambda_self: float):
    """DTA's EMA input of a modality, Eq. 4 and 5: lambda_self z_m + the rest shared equally, at the same segment

    z {m: (B, T, D)} -> (B, T, D). Raises ValueError on unequal shapes."""
    for v in z.values():
        require_shape("z", v, z[modality].shape)
    others = [v for m, v in z.items() if m != modality]
    return lambda_self * z[modality] + (1 - lambda_self) / len(others) * sum(others)


def cascade(codebooks: dict, order) -> dict:
    """CSA, Eq. 6 and 7: {m: (K, D)} -> {m: (K, D)}; in `order` each becomes the mean of all as they are by then.

    Raises ValueError on unequal shapes or an order that does not name every codebook once."""
    codebooks, first = dict(codebooks), next(iter(codebooks.values()))
    require_shape("codebooks", first, (-1, -1))
    for codebook in codebooks.values():
        require_shape("codebooks", codebook, first.shape)
    if sorted(order) != sorted(codebooks):
        raise ValueError(f"order {tuple(order)} does not name each of {tuple(codebooks)} once")
    for m in order:
        codebooks[m] = sum(codebooks.values()) / len(codebooks)
    return codebooks


class AlignedQuantizer(nn.Module):
    """A codebook per modality, moved by EMA; an index is one thing, alive or reset in all codebooks at once."""

    def __init__(self, modalities: list, args: Args):
        super().__init__()
        size, many, self.modalities, self.decay = args.codebook_size, len(modalities), modalities, args.ema_decay
        self.reset_after, self.reset_rule, self.reset_source = args.reset_after, args.reset_rule, args.reset_source
        self.csa, self.order, self.probe_code = args.csa, args.cascade, args.probe_code
        self.width = many * args.code_dim  # of a row: the codewords of an index side by side
        self.register_buffer("codebooks", torch.empty(many, size, args.code_dim).uniform_(-1 / size, 1 / size))
        self.register_buffer("ema_count", torch.ones(many, size))
        self.register_buffer("ema_sum", self.codebooks.clone())
        self.register_buffer("idle", torch.zeros(many, size, dtype=torch.long))  # steps since last use
        self.register_buffer("usage", torch.zeros(many, size))  # selections since the last log line
        self.register_buffer("resets", torch.zeros(()))  # resets since the last log line

    @property
    def codebook(self):
        """Rows [e_a(k); e_v(k); e_t(k)], (K, M * D)"""
        return self.codebooks.transpose(0, 1).flatten(1)

    def own(self) -> dict:
        """{m: codebook of the modality (K, D)}"""
        return dict(zip(self.modalities, self.codebooks))

    def forward(self, z: dict):
        """{m: (B, T, D)} -> (the code of all modalities with straight-through gradients, each at its own index, the
        same for every m {m: (B, T, M * D)}, code_index {m: (B, T)})"""
        code_index = {m: nearest_code(z[m], codebook) for m, codebook in self.own().items()}
        chosen = {m: F.embedding(code_index[m], codebook) for m, codebook in self.own().items()}
        joint = torch.cat([z[m] + (e - z[m]).detach() for m, e in chosen.items()], -1)
        return dict.fromkeys(z, joint), code_index

    def encode(self, z, modality: str):
        """What a probe reads: z (N, T, D) -> rows (N, T, M * D) or own codewords (N, T, D), code_index (N, T)"""
        codebook = self.own()[modality]
        code_index = nearest_code(z, codebook)
        return F.embedding(code_index, self.codebook if self.probe_code == "row" else codebook), code_index

    def candidates(self, z: dict, source: str, generator):
        """A place for each index, (M, K, D), all of it from one segment: the modalities' own outputs or their mean."""
        rows = all_gather(torch.stack([z[m] for m in self.modalities]).detach(), 1).flatten(1, 2)  # (M, N, D)
        rows = rows.mean(0, keepdim=True).expand_as(rows) if source == "paired" else rows
        order = torch.randperm(rows.shape[1], generator=generator, device=rows.device)
        return rows[:, order[torch.arange(self.codebooks.shape[1], device=rows.device) % len(order)]]

    def start(self, z: dict, generator):
        """Data-dependent start: index k becomes what the modalities say at one segment of the first batch."""
        self.codebooks.copy_(self.candidates(z, "batch", generator))
        self.ema_sum.copy_(self.codebooks)

    def update(self, z: dict, code_index: dict, vectors: dict, generator):
        """Once per step, no gradient: EMA of each codebook by its own choices (DTA), then CSA, then resets."""
        index = torch.stack([code_index[m] for m in self.modalities]).flatten(1)  # (M, N)
        for i, m in enumerate(self.modalities):
            state = ema_update(self.ema_count[i], self.ema_sum[i], index[i], vectors[m].flatten(0, 1), self.decay)
            for buffer, value in zip((self.ema_count, self.ema_sum, self.codebooks), state):
                buffer[i].copy_(value)
        if self.csa:
            moved = cascade(self.own(), self.order)
            self.codebooks.copy_(torch.stack(list(moved.values())))  # the sums stay: Eq. 5 starts from them again
        used = torch.zeros_like(self.usage).scatter_add_(1, index, torch.ones_like(index, dtype=self.usage.dtype))
        used = all_reduce_sum(used)
        self.usage += used
        self.idle.copy_(torch.where(used > 0, 0, self.idle + 1))
        if self.reset_after:
            self.reset(z, generator)

    def reset(self, z: dict, generator):
        """Give a dead index a new place in every codebook, all from one segment or one live index: it stays aligned."""
        unused = self.idle >= self.reset_after  # (M, K)
        dead = unused.any(0) if self.reset_rule == "unshared" else unused.all(0)
        if self.reset_source == "live":
            lottery = torch.rand(len(dead), len(dead), generator=generator, device=dead.device).masked_fill(dead, -1)
            place = self.codebooks[:, lottery.argmax(1)]
            place = place + 1e-3 * torch.randn(place.shape, generator=generator, device=dead.device)
            dead = dead & ~dead.all()  # nobody is left to copy
        else:
            place = self.candidates(z, self.reset_source, generator)
        self.codebooks.copy_(torch.where(dead[:, None], place, self.codebooks))
        self.ema_sum.copy_(torch.where(dead[:, None], place, self.ema_sum))
        self.ema_count.masked_fill_(dead, 1.0)
        self.idle.masked_fill_(dead, 0)
        self.resets += dead.sum()


QUANTIZER = AlignedQuantizer  # what the model is built with


# ------------------------------------------------------------------------------------------------------------ decoders
class Decoder(nn.Module):
    """D_m: [code ; specific] -> features. code (B, T, D), specific as SpecificEncoder gives it -> (B, T, ...)"""

    def __init__(self, shape: tuple, code_width: int, recon_width: int):
        super().__init__()
        width, self.is_map = shape[-1], len(shape) == 4
        r = recon_width * width
        self.mix = nn.Conv2d(code_width + 2 * r, 2 * r, 1) if self.is_map else nn.Linear(code_width + 256, 256)
        self.net = nn.Sequential(Residual(2 * r), nn.ReLU(), nn.ConvTranspose2d(2 * r, r, 3), nn.ReLU(),
                                 nn.ConvTranspose2d(r, width, 3)) if self.is_map else \
            nn.Sequential(nn.ReLU(), nn.Linear(256, width))

    def forward(self, code, specific):
        if not self.is_map:
            return self.net(self.mix(torch.cat([code, specific], -1)))
        b, t = code.shape[:2]
        for_code, for_specific = self.mix.weight.tensor_split((code.shape[2],), 1)
        plane = F.linear(code.flatten(0, 1), for_code[..., 0, 0])[..., None, None]  # once, being alike in all cells
        x = self.net(F.conv2d(specific, for_specific, self.mix.bias) + plane)  # (B*T, d, H, W)
        return x.permute(0, 2, 3, 1).unflatten(0, (b, t))  # (B, T, H, W, d)


class Model(nn.Module):
    """Encoders, codebook and decoders of every modality; `shape` is {m: (T, d) or (T, H, W, d)}."""

    def __init__(self, shape: dict, args: Args):
        super().__init__()
        self.semantic = nn.ModuleDict({m: SemanticEncoder(m, s, args) for m, s in shape.items()})
        self.specific = nn.ModuleDict({m: SpecificEncoder(s, args.recon_width) for m, s in shape.items()})
        self.quantizer = QUANTIZER(list(shape), args)
        self.decoder = nn.ModuleDict({m: Decoder(s, self.quantizer.width, args.recon_width) for m, s in shape.items()})


# -------------------------------------------------------------------------------------------------------------- losses
def row_commitment_loss(z: dict, code_index: dict, codebooks: dict, commitment_cost: float):
    """Eq. 8: sum over m of beta mean (z_m - sg[e_m(k_m)])^2 + beta / 2 sum over n != m of mean (z_m - sg[e_n(k_m)])^2

    The other codebooks are read at the modality's own index k_m: z_m is pulled to the whole row.
    z {m: (B, T, D)}, code_index {m: (B, T)}, codebooks {m: (K, D)} -> ()"""
    def distance(m, n):
        return F.mse_loss(z[m], F.embedding(code_index[m], codebooks[n]).detach())

    own, others = sum(distance(m, m) for m in z), sum(distance(m, n) for m, n in itertools.permutations(z, 2))
    return commitment_cost * (own + others / 2)


def code_log_probability(z, codebook):
    """log p[i, k], p = mean over t of softmax over k of -||z[i, t] - e[k]||: z (B, T, D), codebook (K, D) -> (B, K)"""
    codebook = codebook.detach()
    # ||z - e||^2 = ||z||^2 - 2 z.e + ||e||^2 of vectors scaled to at most 1 per entry: squares cannot overflow
    scale = torch.maximum(z.detach().abs().amax(), codebook.abs().amax()).clamp(min=torch.finfo(z.dtype).tiny)
    z, codebook = z / scale, codebook / scale
    square = z.square().sum(-1, keepdim=True) - 2 * z @ codebook.T + codebook.square().sum(-1)  # (B, T, K)
    distance = scale * square.clamp(min=1e-10).sqrt()  # the root has no gradient at 0
    return (-distance).log_softmax(-1).logsumexp(1) - math.log(z.shape[1])


def cmcm_loss(z_a, z_b, codebook_a, codebook_b):
    """Cross-modal code matching (Liu et al.): z_a, z_b (B, T, D), codebook_a, codebook_b (K, D) -> (); gradient into z.

    S[i, j] = p_a[i].log p_b[j] + p_b[j].log p_a[i], loss = mean_i -log softmax_j(S[i])[i], p as in
    `code_log_probability`. Raises ValueError on shapes that do not fit."""
    require_shape("z_a", z_a, (-1, -1, -1))
    require_shape("z_b", z_b, z_a.shape)
    require_shape("codebook_a", codebook_a, (-1, z_a.shape[-1]))
    require_shape("codebook_b", codebook_b, codebook_a.shape)
    log_a, log_b = code_log_probability(z_a, codebook_a), code_log_probability(z_b, codebook_b)  # (B, K)
    log_b = all_gather(log_b)  # of the clips of all processes
    similarity = log_a.exp() @ log_b.T + log_a @ log_b.exp().T  # (B, B)
    return -similarity.log_softmax(1).diagonal(RANK * len(z_a)).mean()


def cpc_loss(z_target, prediction):
    """Cross-CPC (Uni-Code Eq. 6, CoDAAR Eq. 2), one step, one ordered pair: z_target, prediction = W_k c_t (B, D) -> ()

    mean_i -log( exp(z_i.p_i) / sum_j exp(z_j.p_i) ): prediction i has the segments z_j of all clips to choose from.
    Raises ValueError on unequal shapes."""
    require_shape("z_target", z_target, (-1, -1))
    require_shape("prediction", prediction, z_target.shape)
    return -(prediction @ all_gather(z_target).T).log_softmax(1).diagonal(RANK * len(prediction)).mean()


class CrossModalCPC(nn.Module):
    """Cross-CPC: from its past up to a random segment t, a modality predicts t + 1 .. t + steps of the others."""

    def __init__(self, modalities: list, code_dim: int, steps: int):
        super().__init__()
        self.lstm = nn.ModuleDict({m: nn.LSTM(code_dim, code_dim, batch_first=True) for m in modalities})
        self.predict = nn.ModuleDict({m: nn.ModuleList(nn.Linear(code_dim, code_dim, bias=False) for _ in range(steps))
                                      for m in modalities})  # W_k^m

    def forward(self, z: dict, generator=None):
        """z {m: (B, T, D)} -> (sum over ordered pairs (a, b) of the mean loss over steps (), {(a, b): share of a's
        predictions that rank their own clip first among b's segments ()}); `generator` of the host draws t"""
        v = next(iter(z.values()))
        steps = len(next(iter(self.predict.values())))
        t = torch.randint(v.shape[1] - steps, (), generator=generator).item()
        context = {m: self.lstm[m](v[:, :t + 1])[0][:, -1] for m, v in z.items()}  # c_t (B, D) of z_{<=t}
        own, loss, first = RANK * len(v) + torch.arange(len(v), device=v.device), 0, {}
        for a, b in itertools.permutations(z, 2):
            target = [z[b][:, t + k] for k in range(1, steps + 1)]
            prediction = [predict(context[a]) for predict in self.predict[a]]
            loss = loss + sum(map(cpc_loss, target, prediction)) / steps
            first[a, b] = sum(((p @ all_gather(x).T).argmax(1) == own).float().mean()
                              for x, p in zip(target, prediction)) / steps
        return loss, first


# ------------------------------------------------------------------------------------------------------------ encoding
def encode(model: Model, features, modality: str):
    """What a probe reads: features (N, T, ...) -> quantized (N, T, width), code_index (N, T)"""
    z = model.semantic[modality].forward(features)  # not a call: --compile would compile every size a probe brings
    return model.quantizer.encode(z, modality)


# ---------------------------------------------------------------------------------------------------------- run folder
def check_args(args: Args) -> None:
    """Raise InputError on arguments that no data could make usable."""
    for name in ("codebook_size", "code_dim", "batch_size", "learning_rate", "log_every", "recon_width", "epochs",
                 "stop_after_steps"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be above 0")
    for name in ("reset_after", "eval_every"):
        if (getattr(args, name) or 0) < 0:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: must not be negative")
    if not 0 <= args.seed < 2**32:
        raise InputError(f"--seed {args.seed}: must be in [0, 2^32)")
    if args.code_dim % 4:
        raise InputError(f"--code-dim {args.code_dim}: must be divisible by 4, the attention heads")
    if not 0 <= args.ema_decay < 1:
        raise InputError(f"--ema-decay {args.ema_decay}: must be in [0, 1)")


def check_codaar(args: Args) -> None:
    """Raise InputError on method arguments that cannot be used."""
    if not args.cpc_steps > 0:
        raise InputError(f"--cpc-steps {args.cpc_steps}: must be above 0")
    if not (args.commitment_cost or 0) >= 0:
        raise InputError(f"--commitment-cost {args.commitment_cost}: must not be negative")
    if not 0 <= args.commitment_warmup <= 1:
        raise InputError(f"--commitment-warmup {args.commitment_warmup}: must be in [0, 1]")
    if not 0 <= (args.lambda_self or 0) <= 1:
        raise InputError(f"--lambda-self {args.lambda_self}: must be in [0, 1]")


def settle_cascade(args: Args, modalities: list) -> None:
    """The default order of CSA, by rising detail; raises InputError on an order that leaves one out."""
    usual = [m for m in ("text", "audio", "video") if m in modalities]
    args.cascade = args.cascade or (*usual, *(m for m in modalities if m not in usual))
    if sorted(args.cascade) != sorted(modalities):
        raise InputError(f"--cascade {' '.join(args.cascade)}: must name each of {' '.join(modalities)} once")


def settle(args: Args, features: Features, defaults: dict) -> dict:
    """Resolve the arguments left at None by `defaults`; returns {modality: shape}, checked against the data."""
    held = " ".join(features.modalities)
    for absent in set(args.modalities) - set(features.modalities):
        raise InputError(f"--modalities {absent}: the data holds {held}")
    modalities = [m for m in features.modalities if m in args.modalities] if args.modalities else features.modalities
    if len(modalities) < 2:
        raise InputError(f"--modalities {' '.join(modalities)}: at least two are needed; the data holds {held}")
    for m in modalities:
        if len(features.shape[m]) == 4 and min(features.shape[m][1:3]) < 5:
            raise InputError(f"{m}: maps of {features.shape[m][1:3]} cells, at least 5 x 5 are needed")
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return {m: features.shape[m] for m in modalities}


def resume_settings(args: Args):
    """The settings and state of the run `args.resume`. Where and how far to run may change, the experiment may not."""
    path = Path(args.resume) / "checkpoint.pt"
    if not path.is_file():
        raise InputError(f"--resume {args.resume}: no checkpoint.pt inside; give a run folder")
    if (Path(args.resume) / "results.json").exists():
        raise InputError(f"--resume {args.resume}: this run is complete, see its results.json")
    try:
        state = dict(torch.load(path, map_location="cpu", weights_only=True))
        method, saved = state["method"], Args(**state["args"]) if state["method"] == METHOD else None
    except Exception as error:  # whatever is wrong with the file, the user needs one line
        raise InputError(f"{path}: not a checkpoint of {METHOD}.py ({first_line(error)})")
    if method != METHOD:
        raise InputError(f"{path}: a checkpoint of {method}, this is {METHOD}.py")
    given = tyro.cli(Args, default=saved)  # the command line again, over the saved settings
    for name, value in asdict(given).items():
        free = name in ("resume", "stop_after_steps", "device", "runs_dir", "features_on", "compile")
        if value != getattr(saved, name) and not free:
            raise InputError(f"--{name.replace('_', '-')} {value}: the run was started with {getattr(saved, name)}; "
                             "a resumed run keeps its settings")
    given.stop_after_steps = args.stop_after_steps
    return given, state


def make_run_folder(args: Args, name: str) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S") + f"-{time.time_ns() // 1000 % 1_000_000:06d}"
    name = "".join(c if c.isalnum() or c in "-." else "-" for c in name)
    run = Path(args.resume or f"{args.runs_dir}/{METHOD}__{name}__{args.seed}__{stamp}")
    try:
        run.mkdir(parents=True, exist_ok=bool(args.resume))
    except OSError as error:
        raise InputError(f"--runs-dir {args.runs_dir}: cannot be written ({error.strerror})")
    return run


def codebook_health(quantizer, code_index: dict) -> dict:
    """Tags of the codebook since the last log line, as tensors; perplexity is exp(H) of a modality's selections."""
    share = quantizer.usage / quantizer.usage.sum(1, keepdim=True)
    perplexity = torch.special.entr(share).sum(1).exp()
    pairs = itertools.combinations(code_index.values(), 2)
    tags = {f"codebook/used_{m}": (u > 0).sum() for m, u in zip(code_index, quantizer.usage)}
    tags |= {f"codebook/perplexity_{m}": p for m, p in zip(code_index, perplexity)}
    agreement = torch.stack([(a == b).float().mean() for a, b in pairs]).mean()
    return tags | {"codebook/agreement": agreement, "codebook/resets": quantizer.resets}


def alignment(quantizer: AlignedQuantizer, code_index: dict) -> dict:
    """Tags of each pair (a, b) of modalities in a batch: how often both choose one index; and of the codewords that a
    chose, the cosine with b's codeword of that index and its rank, how many of b's have a greater one: means."""
    rows, tags = {m: F.normalize(codebook, dim=-1) for m, codebook in quantizer.own().items()}, {}
    for a, b in itertools.combinations(code_index, 2):
        cosine = rows[a] @ rows[b].T  # (K, K)
        right = cosine.diagonal()
        rank = (cosine > right[:, None]).sum(1).float()
        tags[f"codebook/agreement_{a}_{b}"] = (code_index[a] == code_index[b]).float().mean()
        tags[f"codebook/cosine_{a}_{b}"] = right[code_index[a]].mean()
        tags[f"codebook/rank_{a}_{b}"] = rank[code_index[a]].mean()
    return tags


if __name__ == "__main__":
    sys.excepthook = explain_input_errors
    args, state = tyro.cli(Args, description=__doc__), None
    if args.resume:
        args, state = resume_settings(args)
    clock = time.perf_counter()
    check_args(args)
    check_codaar(args)  # METHOD

    # ---- seed, device, precision
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    device = pick_device(args.device)
    init_distributed(device)
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=args.precision == "bf16")
    # a stream of random numbers for each part, so that a loss less leaves the other draws as they were
    streams = {name: torch.Generator(device).manual_seed(args.seed * 1000 + i)
               for i, name in enumerate(("reset",))}  # METHOD
    streams["cpc"] = torch.Generator().manual_seed(args.seed * 1000 + 1)  # of the host, which cuts z at t  # METHOD

    # ---- data
    features = Features(data_files(args.data, args.runs_dir))
    probe_features = Features(data_files(args.probe_data, args.runs_dir)) if args.probe_data else features
    probe_target = Features(data_files(args.probe_target, args.runs_dir)) if args.probe_target else None
    small = len(features.clips("train")) < 10_000
    shape = settle(args, features, {
        "epochs": 6, "reset_after": 10 if small else 300, "recon_width": 1 if small else 2,  # METHOD
        "lambda_self": 0.75 if len(set(args.modalities) or features.modalities) == 2 else 0.6,  # METHOD
        "commitment_cost": 1.0 if len(set(args.modalities) or features.modalities) == 2 else 2.0})  # METHOD
    modalities = list(shape)
    settle_cascade(args, modalities)  # METHOD
    segments = shape[modalities[0]][0]  # METHOD
    if args.cpc and args.cpc_steps >= segments:  # METHOD
        raise InputError(f"--cpc-steps {args.cpc_steps}: needs more than the {segments} segments of a clip")  # METHOD
    args.tasks = args.tasks or probes.default_tasks(probe_features)
    probes.check_request(probe_features, shape, args.tasks, args.known, probe_target, args.class_map)
    batches = Batches(features, modalities, "train", args.batch_size, device, args.seed, args.features_on)
    steps, origin = args.epochs * len(batches), {"git": git_commit()}
    origin["data_sha256"] = all_gather_object(features.sha256() if RANK == 0 else None)[0]
    seconds = {"data": time.perf_counter() - clock}

    # ---- model and optimizer
    model = Model(shape, args).to(device)
    modules = nn.ModuleDict({"model": model})
    modules["cpc"] = CrossModalCPC(modalities, args.code_dim, args.cpc_steps).to(device)  # METHOD
    optimizer = torch.optim.Adam(modules.parameters(), lr=args.learning_rate, fused=True)
    loss_weights = {"recon": 1, "commitment": 1, "cpc": 0.5, "cmcm": 1}  # both directions of a pair averaged  # METHOD
    owners = {"modules": modules, "optimizer": optimizer}  # of state, for the checkpoint
    if args.compile:
        for module in (*model.semantic.values(), *model.specific.values(), *model.decoder.values()):
            module.compile(dynamic=False)
    torch.manual_seed(args.seed)  # dropout draws the same whatever the method built

    # ---- run folder, resume
    step = 0
    if state:
        if state["data_sha256"] != origin["data_sha256"]:
            raise InputError(f"--resume {args.resume}: the data changed since this run was started")
        try:
            for name, owner in owners.items():
                owner.load_state_dict(state[name])
            step, seconds = state["step"], seconds | state["seconds"]
            torch.set_rng_state(state["rng"]["cpu"])
            if device.type == "cuda":
                torch.cuda.set_rng_state(state["rng"]["cuda"], device)
            for name, stream in streams.items():
                stream.set_state(state["rng"][name])
        except (RuntimeError, ValueError, KeyError) as error:
            raise InputError(f"{args.resume}/checkpoint.pt does not fit these settings or this kind of device: "
                             f"{str(error).splitlines()[-1].strip()}")
    if RANK:
        torch.manual_seed(args.seed + 1_000_003 * RANK + step)  # dropout draws otherwise in every process
    run = all_gather_object(make_run_folder(args, features.name) if RANK == 0 else None)[0]
    if RANK == 0:  # the first process alone writes and probes
        write_atomically(run / "args.json", lambda path: path.write_text(json.dumps(asdict(args), indent=1)))
        log_file = run / "metrics.jsonl"
        lines = log_file.read_text().splitlines() if log_file.exists() else []
        lines = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        write_atomically(log_file, lambda path: path.write_text("".join(line + "\n" for line in lines)))
        writer = SummaryWriter(str(run), purge_step=step + 1 if state else None)

    def log(tags: dict, step: int) -> None:
        with open(log_file, "a") as stream:
            stream.write(json.dumps({"step": step, **tags}) + "\n")
        for tag, value in tags.items():
            writer.add_scalar(tag, value, step)

    def save_checkpoint(step: int) -> None:
        rng = {name: stream.get_state() for name, stream in streams.items()} | {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(device)
        write_atomically(run / "checkpoint.pt", lambda path: torch.save(
            {"method": METHOD, "args": asdict(args), "shape": shape, "step": step, "epoch": step // len(batches),
             "rng": rng, "seconds": seconds, **origin,
             **{name: owner.state_dict() for name, owner in owners.items()}}, path))

    def evaluate(step: int):
        tags, selections = probes.evaluate(model, encode, probe_features, modalities, args.codebook_size, device,
                                           args.tasks, args.known, args.score, probe_target, args.class_map)
        log(tags, step)
        return tags, selections

    def on_signal(number, frame):
        if interrupts and WORLD_SIZE == 1 or step == steps:
            print(f"stopped at once, the last checkpoint stays; continue with: {again}")
            sys.exit(128 + number)
        interrupts.append(number)

    interrupts, again = [], f"python {METHOD}.py --resume {run}"
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)

    # ---- training
    bar = tqdm(total=steps, initial=step, desc=METHOD, disable=not sys.stdout.isatty() or RANK > 0,
               dynamic_ncols=True)
    modules.train()
    clock, last_clock, last_step = time.perf_counter() - seconds.get("train", 0.0), time.perf_counter(), step
    while step < steps:
        epoch, start = divmod(step, len(batches))
        for batch in batches.epoch(epoch, start):
            with autocast():
                z = {m: model.semantic[m](x) for m, x in batch.items()}  # {m: (B, T, D)}
            z = {m: v.float() for m, v in z.items()}
            if step == 0 and args.codebook_init == "data":
                model.quantizer.start(z, streams["reset"])
            quantized, code_index = model.quantizer(z)
            with autocast():
                specific = {m: model.specific[m](x) for m, x in batch.items()}
                decoded = {m: model.decoder[m](quantized[m], specific[m]) for m in batch}
            losses = {"recon": sum(F.mse_loss(decoded[m].float(), x) for m, x in batch.items())}
            ramp = min(1, (step + 1) / max(1, args.commitment_warmup * steps))  # METHOD
            codebooks = model.quantizer.own()  # METHOD
            losses["commitment"] = row_commitment_loss(z, code_index, codebooks, args.commitment_cost * ramp)  # METHOD
            if args.cpc:  # METHOD
                losses["cpc"], first = modules["cpc"](z, streams["cpc"])  # METHOD
            if args.dqa:  # METHOD
                pairs = itertools.combinations(modalities, 2)  # METHOD
                losses["cmcm"] = sum(cmcm_loss(z[a], z[b], codebooks[a], codebooks[b]) for a, b in pairs)  # METHOD
            loss = sum(loss_weights[name] * value for name, value in losses.items())

            optimizer.zero_grad()
            loss.backward()
            average_gradients(modules)
            grad_norm = nn.utils.clip_grad_norm_(modules.parameters(), 0.5)
            optimizer.step()
            with torch.no_grad():
                vectors = {m: temporal_mix(z, m, args.lambda_self) for m in z} if args.dta else z  # METHOD
                model.quantizer.update(z, code_index, vectors, streams["reset"])
            step += 1
            bar.update()

            epoch_end = step % len(batches) == 0
            logs = step % args.log_every == 0 or epoch_end
            asked = any_process_signalled(interrupts, logs or device.type == "cpu")  # all processes stop at one step
            stop = asked or step >= (args.stop_after_steps or math.inf)
            if (logs or stop) and not (loss + grad_norm).isfinite():
                values = ", ".join(f"{name} {value.item():.3g}" for name, value in losses.items())
                raise InputError(f"not finite at step {step}: loss {loss.item():.3g}, gradient {grad_norm.item():.3g}, "
                                 f"{values}; last good checkpoint: {run}/checkpoint.pt"
                                 f"{'' if (run / 'checkpoint.pt').exists() else ' (none yet)'}; try a smaller "
                                 "--learning-rate, and python data.py check on the data")
            if logs:
                tags = {f"losses/{name}": value for name, value in losses.items()} | {"losses/total": loss}
                tags |= codebook_health(model.quantizer, code_index) | {"charts/grad_norm": grad_norm}
                for pair, value in first.items() if args.cpc else ():  # METHOD
                    tags[f"charts/cpc_first_{probes.direction(*pair, modalities)}"] = value  # METHOD
                tags |= alignment(model.quantizer, code_index)  # METHOD
                values = all_reduce_sum(torch.stack([v.detach().float() for v in tags.values()])) / WORLD_SIZE
                tags = dict(zip(tags, values.tolist()))
                elapsed = time.perf_counter() - last_clock
                tags["charts/epoch"] = step / len(batches)
                tags["charts/clips_per_second"] = args.batch_size * (step - last_step) / elapsed
                if RANK == 0:
                    log(tags, step)
                used = "/".join(f"{tags[f'codebook/used_{m}']:.0f}" for m in modalities)
                bar.set_postfix_str(f"loss {tags['losses/total']:.2f}, codes {used}, agreement "
                                    f"{tags['codebook/agreement']:.2f}")
                model.quantizer.usage.zero_()
                model.quantizer.resets.zero_()
                last_clock, last_step = time.perf_counter(), step
            if stop or epoch_end:
                seconds["train"] = time.perf_counter() - clock
                if RANK == 0:
                    save_checkpoint(step)
            if args.eval_every and step % (args.eval_every * len(batches)) == 0 and step < steps and RANK == 0:
                before = time.perf_counter()
                evaluate(step)
                pause = time.perf_counter() - before
                clock, last_clock = clock + pause, last_clock + pause
            if stop:
                if RANK == 0:
                    print(f"stopped after step {step} of {steps}, checkpoint saved; continue with: {again}")
                sys.exit(128 + asked[0] if asked else 0)
    bar.close()
    if RANK:
        sys.exit()

    # ---- final probes, results
    clock = time.perf_counter()
    tags, selections = evaluate(step)
    seconds["probe"] = time.perf_counter() - clock
    probes.show_codebook(writer, model.quantizer.codebook, selections, step)
    writer.close()
    on_gpu = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if on_gpu else \
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    results = {
        "method": METHOD, "data": features.name, **origin, "seed": args.seed, "args": asdict(args),
        "torch": torch.__version__, "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "seconds": seconds, "steps": step, "peak_memory_mb": peak, "metrics": tags}
    write_atomically(run / "results.json", lambda path: path.write_text(json.dumps(results, indent=1)))
    print(probes.table(tags))
    print(f"run folder: {run}")

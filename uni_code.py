"""Uni-Code (Xia et al., NeurIPS 2023): one discrete code for several modalities, from paired, unlabelled sequences.

Each modality has two encoders, one for meaning and one for the rest, and CLUB removes what they share. Cross-CPC lets
the past of one modality predict the next segment of another, code matching compares the codes that a clip uses, and
MM-EMA mixes what other modalities say into the one codebook; their codes also teach, through the commitment, whose
beta rises over the run:

    L = L_recon + L_commit + L_cpc + L_cmcm + l_club L_MI                                                      (4.4)

Then the encoders and the codebook are frozen, and a probe trained on one modality's codes is tested on another's.

    python uni_code.py --cpc-steps 1 --mm-ema attention    # embedded digits: composes, trains, probes, prints the table
    python uni_code.py --data vggsound40k.h5 --probe-data ave.h5
    python uni_code.py --help                              # every flag; README.md lists paper against release

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

METHOD = "uni_code"


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
    codebook_size: int = 400  # number of codes, K
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
    # what a reset code becomes: mean output of all modalities at one segment, one output, or a live code plus noise
    reset_source: Literal["paired", "batch", "live"] = "paired"
    # how the cells of a feature map become one vector; `sum` is what the released code computes
    spatial_pool: Literal["attention", "sum"] = "attention"
    # factor of the attention scores, which lie in (-1, 1): at 1 no cell of 49 can get more than 13 % of the weight
    pool_sharpness: float = 10.0
    # channels of the modality-specific map branch, as a multiple of d; default: 1 under 10,000 clips, else 2
    recon_width: Optional[int] = None
    club: bool = True  # disentangle semantic and specific features by CLUB
    # weight of the CLUB bound; the paper has 1, which drowns every other gradient: the bound is a sum over d dimensions
    lambda_club: float = 0.01
    club_steps: int = 5  # steps of CLUB's own optimizer per step
    club_learning_rate: float = 1e-3  # of CLUB's own Adam
    cpc: bool = True  # predict the other modalities by Cross-CPC
    cpc_steps: int = 1  # segments predicted ahead
    cmcm: bool = True  # match the codes that the modalities of a clip use, L_cmcm
    # vectors behind the EMA: averaged with what cross-attention finds in the other modalities (paper), with the other
    # modalities' at the same segment (released code), or own
    mm_ema: Literal["attention", "time-aligned", "none"] = "attention"
    # weight of the commitment, beta, for a mean over D (released: 0.25, by the paper's sum over D 64): small, each has
    # codes of its own; large, every output becomes one code; default: 1 for two modalities, 5 for more
    commitment_cost: Optional[float] = None
    commitment_warmup: float = 1.0  # share of the run in which beta rises from 0; 0: constant (paper)
    teacher: bool = True  # commit to the other modalities' codes as well, at half the weight (Eq. 8)
    reset: bool = True  # reset dead codes; --no-reset is --reset-after 0


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


class Quantizer(nn.Module):
    """One codebook for all modalities, moved by EMA; dead codes are reset together with their EMA statistics."""

    def __init__(self, modalities: list, args: Args):
        super().__init__()
        size, self.modalities, self.width, self.decay = args.codebook_size, modalities, args.code_dim, args.ema_decay
        self.reset_after, self.reset_rule, self.reset_source = args.reset_after, args.reset_rule, args.reset_source
        self.register_buffer("codebook", torch.empty(size, args.code_dim).uniform_(-1 / size, 1 / size))
        self.register_buffer("ema_count", torch.ones(size))
        self.register_buffer("ema_sum", self.codebook.clone())
        self.register_buffer("idle", torch.zeros(len(modalities), size, dtype=torch.long))  # steps since last use
        self.register_buffer("usage", torch.zeros(len(modalities), size))  # selections since the last log line
        self.register_buffer("resets", torch.zeros(()))  # resets since the last log line

    def forward(self, z: dict):
        """{m: (B, T, D)} -> (quantized with straight-through gradients {m: (B, T, D)}, code_index {m: (B, T)})"""
        code_index = nearest_code(torch.stack(list(z.values())), self.codebook)  # (M, B, T)
        chosen = F.embedding(code_index, self.codebook)  # (M, B, T, D)
        quantized = {m: v + (e - v).detach() for (m, v), e in zip(z.items(), chosen)}
        return quantized, dict(zip(z, code_index))

    def encode(self, z, modality: str):
        """What a probe reads: z (N, T, D) -> quantized (N, T, D), code_index (N, T)"""
        code_index = nearest_code(z, self.codebook)
        return F.embedding(code_index, self.codebook), code_index

    def candidates(self, z: dict, source: str, generator):
        """K encoder outputs in random order, (K, D): means over the modalities (`paired`) or single ones (`batch`)."""
        stacked = all_gather(torch.stack(list(z.values())).detach(), 1)  # (M, B, T, D) of all processes
        rows = (stacked.mean(0) if source == "paired" else stacked).flatten(0, -2)
        order = torch.randperm(len(rows), generator=generator, device=rows.device)
        return rows[order[torch.arange(len(self.codebook), device=rows.device) % len(rows)]]

    def start(self, z: dict, generator):
        """Data-dependent start: the codebook becomes paired encoder outputs of the first batch."""
        self.codebook.copy_(self.candidates(z, "paired", generator))
        self.ema_sum.copy_(self.codebook)

    def update(self, z: dict, code_index: dict, vectors: dict, generator):
        """Once per step, no gradient: EMA over all `vectors` at once, then resets. All dicts {m: (B, T, ...)}."""
        index = torch.stack(list(code_index.values())).flatten(1)  # (M, N)
        stacked = torch.stack(list(vectors.values())).detach()  # (M, B, T, D)
        state = ema_update(self.ema_count, self.ema_sum, index.flatten(), stacked.flatten(0, -2), self.decay)
        for buffer, value in zip((self.ema_count, self.ema_sum, self.codebook), state):
            buffer.copy_(value)
        used = torch.zeros_like(self.usage).scatter_add_(1, index, torch.ones_like(index, dtype=self.usage.dtype))
        used = all_reduce_sum(used)
        self.usage += used
        self.idle.copy_(torch.where(used > 0, 0, self.idle + 1))
        if self.reset_after:
            self.reset(z, generator)

    def reset(self, z: dict, generator):
        """Give dead codes a new place, and their EMA statistics with them; no host synchronisation."""
        unused = self.idle >= self.reset_after  # (M, K)
        dead = unused.any(0) if self.reset_rule == "unshared" else unused.all(0)
        if self.reset_source == "live":
            lottery = torch.rand(len(dead), len(dead), generator=generator, device=dead.device).masked_fill(dead, -1)
            place = self.codebook[lottery.argmax(1)]
            place = place + 1e-3 * torch.randn(place.shape, generator=generator, device=dead.device)
            dead = dead & ~dead.all()  # nobody is left to copy
        else:
            place = self.candidates(z, self.reset_source, generator)
        self.codebook.copy_(torch.where(dead[:, None], place, self.codebook))
        self.ema_sum.copy_(torch.where(dead[:, None], place, self.ema_sum))
        self.ema_count.masked_fill_(dead, 1.0)
        self.idle.masked_fill_(dead, 0)
        self.resets += dead.sum()


QUANTIZER = Quantizer  # what the model is built with


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
def teacher_commitment_loss(z: dict, code_index: dict, codebook, commitment_cost: float, teacher: bool = True):
    """Eq. 8: sum over m of beta mean (z_m - sg[e(k_m)])^2 + beta / 2 sum over n != m of mean (z_m - sg[e(k_n)])^2

    k_n is what modality n chose at the same segment; without `teacher` only the first term (Eq. 3) remains.
    z {m: (B, T, D)}, code_index {m: (B, T)}, codebook (K, D) -> ()"""
    chosen = {m: F.embedding(code_index[m], codebook).detach() for m in z}
    own = sum(F.mse_loss(z[m], chosen[m]) for m in z)
    others = sum(F.mse_loss(z[m], chosen[n]) for m, n in itertools.permutations(z, 2)) if teacher else 0
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


def club_bound(mu, logvar, y):
    """vCLUB, Eq. 5, of q(y | z) = N(mu, exp(logvar)), all N^2 pairs of clips per segment: (B, T, d) each -> () in nats

    The mean over the negatives j in closed form: mean_j (y_j - mu)^2 = (mean_j y_j - mu)^2 + var_j y_j; log-variances
    cancel. Raises ValueError on unequal shapes."""
    require_shape("mu", mu, (-1, -1, -1))
    require_shape("logvar", logvar, mu.shape)
    require_shape("y", y, mu.shape)
    clips = all_gather(y)  # of all processes
    negatives = (clips.mean(0) - mu).square() + clips.var(0, correction=0)
    return ((negatives - (y - mu).square()) / (2 * logvar.exp())).sum(-1).mean()


class CLUB(nn.Module):
    """q(y | z): a modality's specific y (B, T, d) given its semantic z (B, T, D); bounds what the two share."""

    def __init__(self, code_dim: int, width: int):
        super().__init__()
        hidden = code_dim // 2
        self.mu = nn.Sequential(nn.Linear(code_dim, hidden), nn.ReLU(), nn.Linear(hidden, width))
        self.logvar = nn.Sequential(nn.Linear(code_dim, hidden), nn.ReLU(), nn.Linear(hidden, width), nn.Tanh())

    def forward(self, z, y):
        """Upper bound of the mutual information, for the encoders -> ()"""
        return club_bound(self.mu(z), self.logvar(z), y)

    def fit_loss(self, z, y):
        """Negative log-likelihood of y, for q alone, without its constant -> ()"""
        mu, logvar = self.mu(z.detach()), self.logvar(z.detach())
        return ((y.detach() - mu).square() / logvar.exp() + logvar).sum(-1).mean() / 2


def pool_specific(specific, z):
    """Specific features as one vector per segment (B, T, d): maps (B*T, d, h, w) are averaged over their cells."""
    return specific.mean((2, 3)).unflatten(0, z.shape[:2]) if specific.dim() == 4 else specific


def cross_attend(z, others: list):
    """r of Eq. 7: mean over the other modalities of softmax(z z_n^T / sqrt(D)) z_n, within a clip

    z (B, T, D), others [(B, T, D)] -> (B, T, D). Raises ValueError on unequal shapes."""
    require_shape("z", z, (-1, -1, -1))
    for other in others:
        require_shape("others", other, z.shape)
    return sum(F.scaled_dot_product_attention(z, other, other) for other in others) / len(others)


def time_aligned(z: dict) -> dict:
    """Released MM-EMA: (z_m + mean over the other modalities of z_n) / 2 at the same segment, {m: (B, T, D)}"""
    total = sum(z.values())
    return {m: (v + (total - v) / (len(z) - 1)) / 2 for m, v in z.items()}


def ema_vectors(z: dict, mm_ema: str) -> dict:
    """What moves the codes, {m: (B, T, D)}: (z_m + r_m) / 2, r_m by attention (Eq. 7) or time-aligned, or z_m alone"""
    if mm_ema == "attention":
        return {m: (v + cross_attend(v, [z[n] for n in z if n != m])) / 2 for m, v in z.items()}
    return time_aligned(z) if mm_ema == "time-aligned" else z


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


def check_uni_code(args: Args) -> None:
    """Raise InputError on method arguments that cannot be used."""
    for name in ("club_steps", "club_learning_rate", "cpc_steps"):
        if not getattr(args, name) > 0:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be above 0")
    for name in ("lambda_club", "commitment_cost"):
        if not (getattr(args, name) or 0) >= 0:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: must not be negative")
    if not 0 <= args.commitment_warmup <= 1:
        raise InputError(f"--commitment-warmup {args.commitment_warmup}: must be in [0, 1]")
    if args.reset_after and not args.reset:
        raise InputError(f"--reset-after {args.reset_after}: contradicts --no-reset")


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


if __name__ == "__main__":
    sys.excepthook = explain_input_errors
    args, state = tyro.cli(Args, description=__doc__), None
    if args.resume:
        args, state = resume_settings(args)
    clock = time.perf_counter()
    check_args(args)
    check_uni_code(args)  # METHOD

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
        "epochs": 6, "reset_after": (10 if small else 300) * args.reset, "recon_width": 1 if small else 2,  # METHOD
        "commitment_cost": 1.0 if len(set(args.modalities) or features.modalities) == 2 else 5.0})  # METHOD
    modalities = list(shape)
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
    club = nn.ModuleDict({m: CLUB(args.code_dim, model.specific[m].width) for m in modalities}).to(device)  # METHOD
    club_optimizer = torch.optim.Adam(club.parameters(), lr=args.club_learning_rate, fused=True)  # METHOD
    modules["cpc"] = CrossModalCPC(modalities, args.code_dim, args.cpc_steps).to(device)  # METHOD
    optimizer = torch.optim.Adam(modules.parameters(), lr=args.learning_rate, fused=True)
    loss_weights = {"recon": 1, "commitment": 1, "cpc": 1, "cmcm": 1, "club": args.lambda_club}  # METHOD
    owners = {"modules": modules, "optimizer": optimizer}  # of state, for the checkpoint
    owners |= {"club": club, "club_optimizer": club_optimizer}  # METHOD
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
            codebook, beta = model.quantizer.codebook, args.commitment_cost * ramp  # METHOD
            losses["commitment"] = teacher_commitment_loss(z, code_index, codebook, beta, args.teacher)  # METHOD
            if args.cpc:  # METHOD
                losses["cpc"], first = modules["cpc"](z, streams["cpc"])  # METHOD
            if args.cmcm:  # METHOD
                pairs = itertools.combinations(z.values(), 2)  # METHOD
                losses["cmcm"] = sum(cmcm_loss(a, b, codebook, codebook) for a, b in pairs)  # METHOD
            if args.club:  # METHOD
                pooled = {m: pool_specific(specific[m].float(), z[m]) for m in z}  # METHOD
                for _ in range(args.club_steps):  # METHOD
                    club_optimizer.zero_grad()  # METHOD
                    sum(club[m].fit_loss(z[m], pooled[m]) for m in z).backward()  # METHOD
                    average_gradients(club)  # METHOD
                    club_optimizer.step()  # METHOD
                losses["club"] = sum(club[m](z[m], pooled[m]) for m in z)  # METHOD
            loss = sum(loss_weights[name] * value for name, value in losses.items())

            optimizer.zero_grad()
            loss.backward()
            average_gradients(modules)
            grad_norm = nn.utils.clip_grad_norm_(modules.parameters(), 0.5)
            optimizer.step()
            with torch.no_grad():
                vectors = ema_vectors(z, args.mm_ema)  # METHOD
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

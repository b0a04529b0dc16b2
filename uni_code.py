"""Uni-Code (Xia et al., NeurIPS 2023): one discrete code for several modalities, from paired, unlabelled clips.

A clip is T segments of paired features: what is heard, seen and said. Each modality has an encoder for what is common
and one for the rest; each segment's output becomes a code, the nearest row of one codebook that all modalities share.
Then encoders and codebook are frozen, and a probe, a small classifier, trained on one modality's codes is tested on
another's.

CLUB bounds what the two encoders of a modality share. In Cross-CPC the past of one modality predicts the next segment
of another, code matching (CMCM) compares the codes that the modalities of a clip use. The codes follow the encoders by
moving averages, mixed with what other modalities say (MM-EMA), and the commitment draws encoders to these codes:

    L = L_recon + L_commit + L_cpc + L_cmcm + lambda_club L_MI                                                  (4.4)

    python uni_code.py --cpc-steps 1 --mm-ema attention    # on the embedded digits: trains, probes, prints a table
    python uni_code.py --help                              # every flag; docs/uni_code.md lists paper against release

"Released" is the authors' code, github.com/haihuangcode/CMG. Shapes: B clips of a batch, T segments, D code
width, K codes, M modalities, N = B * T vectors of a modality, d any other width.
"""
import itertools
import math
import sys
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

import probes
from data import Batches, Features
from run import (RANK, InputError, Run, Running, all_gather, average_over_processes, in_parallel, local_rows, parse,
                 require_shape)

METHOD = "uni_code"


# ----------------------------------------------------------------------------------------------------------- arguments
@dataclass
class Method:
    # weight of the CLUB bound, 0 leaves it out; the paper has 1, but the bound is a sum over d dimensions
    lambda_club: float = 0.01
    club_steps: int = 5  # steps of CLUB's own optimizer per step
    club_learning_rate: float = 1e-3  # of CLUB's own Adam
    cpc: bool = True  # predict the other modalities by Cross-CPC
    cpc_steps: int = 1  # segments predicted ahead
    cmcm: bool = True  # match the codes that the modalities of a clip use, L_cmcm
    # what codes follow: outputs averaged with what cross-attention finds in the other modalities (paper), with the
    # other modalities' at the same segment (released), or alone
    mm_ema: Literal["attention", "time-aligned", "none"] = "attention"
    teacher: bool = True  # commit to the other modalities' codes as well, at half the weight (Eq. 8)
    commitment_cost: float = 0.25  # weight of the commitment, beta
    specific: Literal["vector", "map"] = "vector"  # what is decoded of a map: its cell mean, or the map (released)


@dataclass
class Codebook:
    codebook_size: int = 400  # number of codes, K
    code_dim: int = 256  # width of a code, D
    # start: `paired` means of all modalities' outputs at a segment, single outputs (`batch`), or U(-1/K, 1/K)
    codebook_init: Literal["paired", "batch", "uniform"] = "paired"
    ema_decay: float = 0.99  # decay of the codebook's moving averages, gamma
    reset_after: int = 10  # steps without use after which a code is dead and is set anew, N_re; 0: never
    reset_rule: Literal["unshared", "unused"] = "unshared"  # dead: unused by at least one modality, or by all
    # what a dead code becomes: as in `codebook_init`, or a copy of a live code plus noise (`live`)
    reset_source: Literal["paired", "batch", "live"] = "paired"


@dataclass
class Optimisation:
    epochs: int = 6  # passes over the train split
    batch_size: int = 80  # clips per step, B
    learning_rate: float = 4e-4  # of Adam
    # how a map (H x W cells a segment) becomes a vector: sharpened attention, `plain` attention, or a sum (released)
    spatial_pool: Literal["attention", "plain", "sum"] = "attention"
    clip: Literal["all", "module"] = "all"  # gradients to a norm of 0.5: all together, or each network's (released)
    precision: Literal["fp32", "bf16"] = "fp32"  # of the networks; distances, EMA and losses are fp32
    cuda_graph: bool = False  # record the step on a GPU and replay it: ten times as fast, but its Python runs no more


@dataclass
class Data:
    data: tuple[str, ...] = ("digits",)  # cmg-features files, or an embedded set, `digits` or `watch`
    modalities: tuple[str, ...] = ()  # two or more modalities of the data; none named: all of them
    features_on: Literal["auto", "device", "memory", "file"] = "auto"  # where features are kept


@dataclass
class Args(Running, Data, Optimisation, Codebook, Method):
    """Every flag; those of `Running` (seed, device, resume, log, ...) stand in run.py."""


LIMITS = {  # which Run checks; other numbers must not be negative
    "above_zero": ("epochs", "batch_size", "learning_rate", "codebook_size", "code_dim", "club_steps",
                   "club_learning_rate", "cpc_steps"),
    "below_one": ("ema_decay",),
}


# ------------------------------------------------------------------------------------------------------------ encoders
def cell_mean(x):
    """Features as one vector per segment (B, T, d): maps (B, T, H, W, d) are averaged over their cells."""
    return x.flatten(2, 3).mean(2) if x.ndim == 5 else x


class SpatialPool(nn.Module):
    """Feature maps to vectors, (B, T, H, W, d) -> (B, T, d): a channel gate, then attention over the H * W cells."""

    def __init__(self, width: int, hidden: int, kind: str):
        super().__init__()
        # Scores lie in (-1, 1): with a factor of 1 no cell of 49 can get more than 13 % of the weight.
        self.sharpness = {"attention": 10.0, "plain": 1.0, "sum": None}[kind]
        squeezed = max(1, width // 8)
        self.gate = nn.Sequential(nn.Linear(width, squeezed, bias=False), nn.ReLU(),
                                  nn.Linear(squeezed, width, bias=False), nn.Sigmoid())
        self.mean_proj, self.cell_proj = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.score = nn.Linear(hidden, 1)

    def forward(self, x):
        """The gate is the same in all cells, so mean and weighted sum are gated after they are taken: that spares
        passes over the map, which cost more than all else here."""
        x = x.flatten(2, 3)  # (B, T, H*W, d)
        mean = x.mean(2)  # (B, T, d)
        gate = 1 + self.gate(mean)
        if self.sharpness is None:
            return x.shape[2] * gate * mean
        # score of a cell: w.(relu(mean_proj(gate * mean)) * relu(cell_proj(gate * x))) + b; the query holds w
        query = self.score.weight * F.relu(self.mean_proj(gate * mean))  # (B, T, hidden)
        cells = F.relu(self.cell_proj(gate[:, :, None] * x))  # (B, T, H*W, hidden)
        score = cells @ query[..., None] + self.score.bias  # (B, T, H*W, 1)
        weight = (self.sharpness * score.tanh()).softmax(2)
        return gate * (weight.transpose(2, 3) @ x)[:, :, 0]


class SemanticEncoder(nn.Module):
    """Phi_m: features (B, T, ...) -> semantic z (B, T, D), maps (B, T, H, W, d) pooled first.

    The Transformer is given no positions, as released: with them it could tell segments apart by number alone. Only
    the LSTM, which reads text, knows of order. Raises InputError if the attention heads do not divide D."""

    def __init__(self, modality: str, shape: tuple, args: Args):
        super().__init__()
        if args.code_dim % 4:
            raise InputError(f"--code-dim {args.code_dim}: must be divisible by 4, the attention heads")
        width = shape[-1]
        code_dim = args.code_dim
        self.pool = nn.Identity()
        self.lstm = None
        if len(shape) == 4:
            self.pool = SpatialPool(width, code_dim, args.spatial_pool)
        if modality == "text":
            self.lstm = nn.LSTM(width, 128, 2, batch_first=True, bidirectional=True)
            width = 256  # both directions
        self.proj = nn.Linear(width, code_dim)
        layer = nn.TransformerEncoderLayer(code_dim, 4, 1024, dropout=0.1, batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        x = self.pool(x)  # (B, T, d)
        if self.lstm is not None:
            x, _ = self.lstm(x)  # (B, T, d) -> (B, T, 256)
        return self.transformer(self.proj(x))


# ----------------------------------------------------------------------------------------------------------- quantizer
def nearest_code(z, codebook):
    """Index of the code at the smallest squared Euclidean distance: z (..., D), codebook (K, D) -> (...) int64.

    Computed in fp32 at least, also under autocast. Raises ValueError on shapes that do not fit."""
    require_shape("codebook", codebook, (-1, -1))
    require_shape("z", z, (*z.shape[:-1], codebook.shape[1]))
    dtype = torch.promote_types(z.dtype, torch.float32)
    flat = z.detach().reshape(-1, z.shape[-1]).to(dtype)  # (N, D)
    codes = codebook.to(dtype)
    with torch.autocast(z.device.type, enabled=False):
        # ||z - e||^2 = ||z||^2 - 2 z.e + ||e||^2, the first term being the same for all codes
        distance = torch.addmm(codes.square().sum(1), flat, codes.T, alpha=-2)  # (N, K)
    return distance.argmin(1).view(z.shape[:-1])


def ema_update(ema_count, ema_sum, code_index, vectors, decay: float):
    """One joint EMA step over all the vectors: ema_count (K,), ema_sum (K, D), code_index (N,), vectors (N, D).

    Returns new (ema_count, ema_sum, codebook); only the codebook is of smoothed counts.
    Raises ValueError on shapes that do not fit."""
    require_shape("ema_count", ema_count, (-1,))
    require_shape("ema_sum", ema_sum, (len(ema_count), -1))
    require_shape("vectors", vectors, (-1, ema_sum.shape[1]))
    require_shape("code_index", code_index, (len(vectors),))
    vectors = vectors.detach().to(ema_sum.dtype)
    count = torch.zeros_like(ema_count).index_add_(0, code_index, torch.ones_like(vectors[:, 0]))
    total = torch.zeros_like(ema_sum).index_add_(0, code_index, vectors)
    ema_count = decay * ema_count + (1 - decay) * count
    ema_sum = decay * ema_sum + (1 - decay) * total
    # Laplace smoothing keeps an unused code finite; no paper has it, the releases do.
    eps = 1e-5
    n = ema_count.sum()
    smoothed = (ema_count + eps) / (n + len(ema_count) * eps) * n
    return ema_count, ema_sum, ema_sum / smoothed[:, None]


def sample_rows(vectors, wanted: int, generator):
    """`wanted` of the rows in random order, each once before any twice: (..., n, D) -> (..., wanted, D)

    If rows must come twice, all get small noise: of two equal codes the second can never be the nearest."""
    n = vectors.shape[-2]
    order = torch.randperm(n, generator=generator, device=vectors.device)
    rows = vectors[..., order.repeat(wanted // n + 1)[:wanted], :]
    if wanted > n:
        rows = rows + 1e-3 * torch.randn(rows.shape, generator=generator, device=rows.device)
    return rows


def copies_of_live(codebook, dead, generator):
    """For each code a random one that is not dead, plus small noise: codebook (..., K, D), dead (K,) -> (..., K, D)"""
    # the highest of random scores is a random choice; a dead code has the lowest
    scores = torch.rand(len(dead), len(dead), generator=generator, device=dead.device).masked_fill(dead, -1)
    copies = codebook[..., scores.argmax(1), :]
    return copies + 1e-3 * torch.randn(copies.shape, generator=generator, device=dead.device)


class Quantizer(nn.Module):
    """One codebook for all modalities, moved by EMA; dead codes are set anew, and their EMA statistics with them."""

    def __init__(self, modalities: list, args: Args):
        super().__init__()
        size = args.codebook_size
        self.width = args.code_dim  # of what decoders and probes read
        self.args = args
        self.register_buffer("codebook", torch.empty(size, args.code_dim).uniform_(-1 / size, 1 / size))
        self.register_buffer("ema_count", torch.ones(size))
        self.register_buffer("ema_sum", self.codebook.clone())
        self.register_buffer("steps_since_used", torch.zeros(len(modalities), size, dtype=torch.long))
        self.register_buffer("usage", torch.zeros(len(modalities), size))  # selections since the last log line
        self.register_buffer("resets", torch.zeros(()))  # since the last log line

    def forward(self, z: dict):
        """{m: (B, T, D)} -> (quantized with straight-through gradients {m: (B, T, D)}, code_index {m: (B, T)})"""
        code_index = nearest_code(torch.stack(list(z.values())), self.codebook)  # (M, B, T)
        chosen = F.embedding(code_index, self.codebook)  # (M, B, T, D)
        quantized = {m: z[m] + (e - z[m]).detach() for m, e in zip(z, chosen)}
        return quantized, dict(zip(z, code_index))

    def encode(self, z, modality: str):
        """What a probe reads: z (B, T, D) -> quantized (B, T, D), code_index (B, T)"""
        code_index = nearest_code(z, self.codebook)
        return F.embedding(code_index, self.codebook), code_index

    def new_codes(self, z: dict, source: str, generator):
        """Random encoder outputs as codes: means of the modalities at a segment (`paired`) or single ones -> (K, D)"""
        vectors = torch.stack(list(z.values())).detach()  # (M, B, T, D)
        if source == "paired":
            vectors = vectors.mean(0)
        return sample_rows(vectors.flatten(0, -2), len(self.codebook), generator)

    @torch.no_grad()
    def init_from_batch(self, z: dict, generator) -> None:
        """Data-dependent start: the codebook becomes encoder outputs of the first batch."""
        if self.args.codebook_init != "uniform":
            self.codebook.copy_(self.new_codes(z, self.args.codebook_init, generator))
            self.ema_sum.copy_(self.codebook)

    @torch.no_grad()
    def update(self, z: dict, code_index: dict, ema_input: dict, generator) -> None:
        """Once per step: each code moves towards the mean of the `ema_input` at the segments that chose it, then dead
        codes become outputs z. z, ema_input {m: (B, T, D)}, code_index {m: (B, T)}"""
        index = torch.stack(list(code_index.values())).flatten(1)  # (M, N)
        vectors = torch.stack(list(ema_input.values())).flatten(0, -2)  # (M * N, D)
        self.ema_count, self.ema_sum, self.codebook = ema_update(
            self.ema_count, self.ema_sum, index.flatten(), vectors, self.args.ema_decay)
        used = torch.zeros_like(self.usage).scatter_add_(1, index, torch.ones_like(index, dtype=self.usage.dtype))
        self.usage += used
        self.steps_since_used = torch.where(used > 0, 0, self.steps_since_used + 1)
        if self.args.reset_after:
            self.reset(z, generator)

    def reset(self, z: dict, generator) -> None:
        """Codes unused for `reset_after` steps or more become what `reset_source` says; with `live`, none if none is.
        Sets codebook, ema_sum (the code), ema_count (1), steps_since_used (0), resets (+ number); z {m: (B, T, D)}"""
        unused = self.steps_since_used >= self.args.reset_after  # (M, K)
        dead = unused.any(0) if self.args.reset_rule == "unshared" else unused.all(0)  # (K,)
        if self.args.reset_source == "live":
            new = copies_of_live(self.codebook, dead, generator)
            dead = dead & ~dead.all()  # with all of them dead there was none to copy: reset none
        else:
            new = self.new_codes(z, self.args.reset_source, generator)
        self.codebook = torch.where(dead[:, None], new, self.codebook)
        self.ema_sum = torch.where(dead[:, None], new, self.ema_sum)
        self.ema_count.masked_fill_(dead, 1.0)
        self.steps_since_used.masked_fill_(dead, 0)
        self.resets += dead.sum()


QUANTIZER = Quantizer  # the one of this method, for Model, whose text all scripts share


# -------------------------------------------------------------------------------------------------------------- models
class Model(nn.Module):
    """What a probe needs: an encoder for each modality of `shape` {m: (T, d) or (T, H, W, d)}, and the codebook."""

    def __init__(self, shape: dict, args: Args):
        super().__init__()
        self.semantic = nn.ModuleDict({m: SemanticEncoder(m, s, args) for m, s in shape.items()})
        self.quantizer = QUANTIZER(list(shape), args)


def encode(model: Model, features, modality: str):
    """What a probe reads: features (B, T, ...) -> quantized (B, T, width), code_index (B, T)"""
    return model.quantizer.encode(model.semantic[modality](features), modality)


class Residual(nn.Module):
    """(N, c, h, w) -> (N, c, h, w)"""

    def __init__(self, width: int):
        super().__init__()
        self.block = nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, 3, padding=1, bias=False),
                                   nn.ReLU(), nn.Conv2d(width, width, 1, bias=False))

    def forward(self, x):
        return x + self.block(x)


class SpecificEncoder(nn.Module):
    """What only this modality knows, for its decoder: (B, T, d) -> (B, T, 256), or as released
    (B, T, H, W, d) -> (B*T, 4d, H-4, W-4). No paper describes it. Raises InputError on maps below 5 x 5."""

    def __init__(self, shape: tuple):
        super().__init__()
        d = shape[-1]
        self.is_map = len(shape) == 4
        if not self.is_map:
            self.width = 256
            self.net = nn.Sequential(nn.Linear(d, 256), nn.ReLU())
            return
        if min(shape[1:3]) < 5:
            raise InputError(f"--specific map: maps of {tuple(shape[1:3])} cells, at least 5 x 5 are needed")
        self.width = 4 * d
        self.net = nn.Sequential(nn.Conv2d(d, 2 * d, 3), nn.ReLU(), nn.Conv2d(2 * d, 4 * d, 3), nn.ReLU(),
                                 nn.Conv2d(4 * d, 4 * d, 1), Residual(4 * d), nn.ReLU())

    def forward(self, x):
        if self.is_map:  # a view in the channels-last layout that convolutions like
            x = x.flatten(0, 1).permute(0, 3, 1, 2)
        return self.net(x)


class Decoder(nn.Module):
    """[code ; specific] -> features: code (B, T, width), specific as SpecificEncoder gives it -> (B, T, ...)"""

    def __init__(self, shape: tuple, code_width: int):
        super().__init__()
        d = shape[-1]
        self.is_map = len(shape) == 4
        if self.is_map:
            self.mix_code, self.mix_specific = nn.Linear(code_width, 4 * d), nn.Conv2d(4 * d, 4 * d, 1)
            self.net = nn.Sequential(Residual(4 * d), nn.ReLU(), nn.ConvTranspose2d(4 * d, 2 * d, 3), nn.ReLU(),
                                     nn.ConvTranspose2d(2 * d, d, 3))
        else:
            self.mix_code, self.mix_specific = nn.Linear(code_width, 256), nn.Linear(256, 256)
            self.net = nn.Sequential(nn.ReLU(), nn.Linear(256, d))

    def forward(self, code, specific):
        """A linear map of the concatenation is the sum of two: the code's part is alike in all cells."""
        if not self.is_map:
            return self.net(self.mix_code(code) + self.mix_specific(specific))
        x = self.net(self.mix_code(code.flatten(0, 1))[..., None, None] + self.mix_specific(specific))
        return x.permute(0, 2, 3, 1).unflatten(0, code.shape[:2])  # (B*T, d, H, W) -> (B, T, H, W, d)


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
    # ||z - e||^2 = ||z||^2 - 2 z.e + ||e||^2
    square = z.square().sum(-1, keepdim=True) - 2 * z @ codebook.T + codebook.square().sum(-1)  # (B, T, K)
    distance = square.clamp(min=1e-10).sqrt()  # the root has no gradient at 0
    return (-distance).log_softmax(-1).logsumexp(1) - math.log(z.shape[1])


def cmcm_loss(z_a, z_b, codebook_a, codebook_b):
    """Cross-modal code matching (Liu et al.): z_a, z_b (B, T, D), codebook_a, codebook_b (K, D) -> (); gradient into z.

    S[i, j] = p_a[i].log p_b[j] + p_b[j].log p_a[i], loss = mean_i -log softmax_j(S[i])[i], p as in
    `code_log_probability`. Raises ValueError on shapes that do not fit."""
    require_shape("z_a", z_a, (-1, -1, -1))
    require_shape("z_b", z_b, z_a.shape)
    require_shape("codebook_a", codebook_a, (-1, z_a.shape[-1]))
    require_shape("codebook_b", codebook_b, codebook_a.shape)
    log_a = code_log_probability(z_a, codebook_a)  # (B, K)
    log_b = code_log_probability(z_b, codebook_b)
    similarity = log_a.exp() @ log_b.T + log_a @ log_b.exp().T  # (B, B)
    return -similarity.log_softmax(1).diagonal().mean()


def cpc_loss(z_target, prediction):
    """Cross-CPC (Uni-Code Eq. 6, CoDAAR Eq. 2), one step, one ordered pair: z_target, prediction = W_k c_t (B, D) -> ()

    mean_i -log( exp(z_i.p_i) / sum_j exp(z_j.p_i) ): prediction i has the segments z_j of all clips to choose from.
    Raises ValueError on unequal shapes."""
    require_shape("z_target", z_target, (-1, -1))
    require_shape("prediction", prediction, z_target.shape)
    return -(prediction @ z_target.T).log_softmax(1).diagonal().mean()


class CrossModalCPC(nn.Module):
    """Cross-CPC: from its past up to segment t, a modality predicts the segments t + 1 .. t + steps of the others."""

    def __init__(self, modalities: list, code_dim: int, steps: int):
        super().__init__()
        self.lstm = nn.ModuleDict({m: nn.LSTM(code_dim, code_dim, batch_first=True) for m in modalities})
        self.predict = nn.ModuleDict({m: nn.ModuleList(nn.Linear(code_dim, code_dim, bias=False) for _ in range(steps))
                                      for m in modalities})  # W_k^m

    def forward(self, z: dict, t: int):
        """cpc_loss, mean over the steps k, sum over the ordered pairs (a, b): a's past and b's segment t + k -> ()"""
        context = {m: self.lstm[m](v[:, :t + 1])[0][:, -1] for m, v in z.items()}  # c_t (B, D) of z_{<=t}
        loss = 0
        for a, b in itertools.permutations(z, 2):
            for k, predict in enumerate(self.predict[a], 1):
                loss = loss + cpc_loss(z[b][:, t + k], predict(context[a])) / len(self.predict[a])
        return loss


def club_bound(mu, logvar, y):
    """vCLUB, Eq. 5, of q(y | z) = N(mu, exp(logvar)), all N^2 pairs of clips per segment: (B, T, d) each -> () in nats

    The mean over the negatives j in closed form: mean_j (y_j - mu)^2 = (mean_j y_j - mu)^2 + var_j y_j; log-variances
    cancel. Raises ValueError on unequal shapes."""
    require_shape("mu", mu, (-1, -1, -1))
    require_shape("logvar", logvar, mu.shape)
    require_shape("y", y, mu.shape)
    negatives = (y.mean(0) - mu).square() + y.var(0, correction=0)
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
        mu = self.mu(z.detach())
        logvar = self.logvar(z.detach())
        return ((y.detach() - mu).square() / logvar.exp() + logvar).sum(-1).mean() / 2


def pool_specific(specific, batch: int):
    """Specific features as one vector per segment (B, T, d): maps (B*T, d, h, w) are averaged over their cells."""
    return specific.mean((2, 3)).unflatten(0, (batch, -1)) if specific.dim() == 4 else specific


def fit_club(club, optimizer, z: dict, y: dict, steps: int) -> None:
    """Fit each q(y | z) by steps of its own optimizer; encoders learn nothing. z {m: (B, T, D)}, y {m: (B, T, d)}"""
    for _ in range(steps):
        optimizer.zero_grad()
        sum(in_parallel({m: partial(club[m].fit_loss, z[m], y[m]) for m in z}).values()).backward()
        average_over_processes(p.grad for p in club.parameters())
        optimizer.step()


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


def mm_ema_input(z: dict, mm_ema: str) -> dict:
    """What the codes follow, {m: (B, T, D)}: (z_m + r_m) / 2, r_m by attention (Eq. 7) or time-aligned, or z_m alone"""
    if mm_ema == "attention":
        return {m: (v + cross_attend(v, [z[n] for n in z if n != m])) / 2 for m, v in z.items()}
    return time_aligned(z) if mm_ema == "time-aligned" else z


def clip_gradients(networks: nn.ModuleDict, kind: str):
    """Scale gradients down to a norm of 0.5, that of all networks together or (`module`) of each -> norm before, ()"""
    if kind == "all":
        return nn.utils.clip_grad_norm_(networks.parameters(), 0.5)
    learning = [network for network in networks.values() if any(p.grad is not None for p in network.parameters())]
    return torch.stack([nn.utils.clip_grad_norm_(network.parameters(), 0.5) for network in learning]).norm()


# -------------------------------------------------------------------------------------------------------- main program
if __name__ == "__main__":
    run = Run(METHOD, parse(Args, __doc__), **LIMITS)
    args, device = run.args, run.device
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=args.precision == "bf16")

    # ---- data
    features = Features(args.data, args.runs_dir)
    shape = features.shapes(args.modalities)  # {m: (T, d) or (T, H, W, d)}
    plan = probes.Plan(features, shape, device)  # fails now if the probes after training could not run
    batches = Batches(features, shape, "train", args.batch_size, device, args.seed, args.features_on)

    # ---- networks and their optimizer
    model = Model(shape, args)
    networks = nn.ModuleDict({"model": model})
    segments = features.files[0].segments  # T
    # ========================================================================================================= Uni-Code
    seen = shape if args.specific == "map" else {m: (s[0], s[-1]) for m, s in shape.items()}  # what is decoded
    networks["specific"] = nn.ModuleDict({m: SpecificEncoder(s) for m, s in seen.items()})
    networks["decoder"] = nn.ModuleDict({m: Decoder(s, model.quantizer.width) for m, s in seen.items()})
    if args.cpc and args.cpc_steps >= segments:
        raise InputError(f"--cpc-steps {args.cpc_steps}: needs more than {segments} segments a clip, or --no-cpc")
    networks["cpc"] = CrossModalCPC(list(shape), args.code_dim, args.cpc_steps)
    club = nn.ModuleDict({m: CLUB(args.code_dim, networks["specific"][m].width) for m in shape}).to(device)
    club_optimizer = torch.optim.Adam(club.parameters(), lr=args.club_learning_rate, fused=True)
    generators = {"codebook": run.generator("codebook"), "cpc": run.generator("cpc", "cpu")}
    host_draw = partial(torch.randint, segments - args.cpc_steps, (), generator=generators["cpc"]) if args.cpc else int
    more_state = {"club": club, "club_optimizer": club_optimizer}
    pairs = len(shape) * (len(shape) - 1)  # of modalities, ordered
    guess = math.log(args.batch_size)
    chance = {"cpc": pairs * guess, "cmcm": pairs / 2 * guess}  # what a loss is by guessing
    # ================================================================================================== end of Uni-Code
    networks.to(device)
    optimizer = torch.optim.Adam(networks.parameters(), lr=args.learning_rate, fused=True)
    step = run.restore(features, shape, generators, networks=networks, optimizer=optimizer, **more_state)
    evaluate = partial(plan.evaluate, model, encode, args.codebook_size)

    # ---- training
    networks.train()

    @run.recorded  # with --cuda-graph
    def train_step(batch, drawn):  # {m: (B, T, ...)}, under torchrun the clips of this process; host_draw()
        # Encode. From here on z holds the clips of all processes: losses and codebook see the whole batch. Gradients
        # flow back through all_gather and are averaged below: together that of one process with the whole batch.
        with autocast():
            z = in_parallel({m: partial(model.semantic[m], x) for m, x in batch.items()})
        z = {m: all_gather(v.float()) for m, v in z.items()}  # {m: (B, T, D)}

        # Quantise: the codes of all clips, and those of this process's clips for what is computed clip by clip.
        if step == 0:
            model.quantizer.init_from_batch(z, generators["codebook"])
        quantized, code_index = model.quantizer(z)  # {m: (B, T, width)}, {m: (B, T)}
        own = {m: local_rows(q) for m, q in quantized.items()}

        # ===================================================================================================== Uni-Code
        target = batch if args.specific == "map" else {m: cell_mean(x) for m, x in batch.items()}  # {m: (B, T, ...)}
        with autocast():
            specific = {m: networks["specific"][m](x) for m, x in target.items()}
            decoded = {m: networks["decoder"][m](own[m], specific[m]) for m in batch}
        recon = sum(F.mse_loss(decoded[m].float(), target[m]) for m in batch)
        codebook = model.quantizer.codebook
        commitment = teacher_commitment_loss(z, code_index, codebook, args.commitment_cost, args.teacher)  # Eq. 8

        cpc = networks["cpc"](z, drawn) if args.cpc else torch.zeros_like(recon)  # Eq. 6
        pairs = itertools.combinations(z, 2) if args.cmcm else ()
        cmcm = sum((cmcm_loss(z[a], z[b], codebook, codebook) for a, b in pairs), torch.zeros_like(recon))
        information = torch.zeros_like(recon)
        if args.lambda_club:
            y = {m: all_gather(pool_specific(specific[m].float(), len(batch[m]))) for m in z}  # {m: (B, T, d)}
            fit_club(club, club_optimizer, z, y, args.club_steps)
            information = sum(club[m](z[m], y[m]) for m in z)  # Eq. 5

        loss = recon + commitment + cpc + cmcm + args.lambda_club * information  # section 4.4
        losses = {"recon": recon, "commitment": commitment, "cpc": cpc, "cmcm": cmcm, "club": information}
        ema_input = mm_ema_input(z, args.mm_ema)  # Eq. 7
        # ============================================================================================== end of Uni-Code

        # Update the networks by gradient, then the codebook by moving averages. Averages over processes: of gradients
        # because each has its own clips, of the codebook so that rounding cannot drive the processes apart.
        optimizer.zero_grad()
        loss.backward()
        average_over_processes(p.grad for p in networks.parameters())
        grad_norm = clip_gradients(networks, args.clip)
        optimizer.step()
        model.quantizer.update(z, code_index, ema_input, generators["codebook"])
        average_over_processes(model.quantizer.buffers())
        return {name: v.detach() for name, v in (losses | {"total": loss}).items()}, grad_norm, code_index

    for batch in run.progress(batches, evaluate):
        losses, grad_norm, code_index = train_step(batch, int(host_draw()))
        step += 1

        health = partial(probes.codebook_health, model.quantizer, code_index)  # called when a line of the log is due
        run.log(step, losses, grad_norm, health)
        if run.checkpoint(step):  # a signal or --max-steps asks to stop
            sys.exit(run.exit_code)

    # ---- evaluation
    if RANK == 0:
        tags = evaluate()
        warnings = plan.not_learned(run.logged, chance, tags)
        show = partial(plan.show, model.quantizer.codebook, run.folder, run.folder, run.writer, step)
        run.finish(step, tags, warnings, probes.table(tags, probes.SCORES), show)

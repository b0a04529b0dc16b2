"""What Uni-Code, MICU and CoDAAR compare with: S-MiT, MST, CODIS, TURN, CMCM, and a plain InfoNCE.

All rows have the same baseline: encoders, one codebook for all modalities that follows them by moving averages,
reconstruction, and commitment to the own code. `--align` adds what one method has to bring the modalities together,
`--dcid` adds CLUB and Cross-CPC of Uni-Code:

    L = L_recon + L_commit + L_align + L_cross + [--dcid] (L_cpc + lambda_club L_MI)

    smit      contrast of clips, whose margin adapts to the pair (Monfort et al., CVPR 2021)
    mst       one Transformer for all modalities, and infonce (You et al., ECCV 2022)
    codis     optimal transport to the codes: what one modality should choose, by the other (Duan et al., CVPR 2022)
    turn      infonce, and each modality decoded from the others' codes (Zhao et al., NeurIPS 2022)
    cmcm      clips are matched by the codes that they use (Liu et al., ACL 2022)
    infonce   contrast of clips, as in CLIP: mst without sharing, turn without decoding from the others

    python -m benchmarks.comparators --align infonce                          # contrast and a codebook, on the digits
    python -m benchmarks.comparators --align codis --no-contrast --dcid --modalities audio video
    python -m benchmarks.comparators --help

The papers tell in one sentence that they built these, and no released code has them. So this is the idea of each method
on the baseline of uni_code.py, acting on the encoder outputs z: a projection head would align what no probe sees. What
is a reading of ours is a flag or stands in the docstring of the loss. Shapes: B clips of a batch, T segments, D code
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

METHOD = "benchmarks.comparators"


# ----------------------------------------------------------------------------------------------------------- arguments
@dataclass
class Method:
    align: Literal["none", "smit", "mst", "codis", "turn", "cmcm", "infonce"] = "none"  # whose loss is added
    dcid: bool = False  # with CLUB and Cross-CPC, as in the rows "DCID + ..."
    # of clips in smit: cosine / temperature, or the product (paper), under which all outputs become one here
    similarity: Literal["dot", "cosine"] = "cosine"
    temperature: float = 0.07  # tau of all the contrasts and of codis
    contrast: bool = True  # the InfoNCE inside mst, codis and turn; without it only what they have beside it
    # weight of the CLUB bound, 0 leaves it out; the paper has 1, but the bound is a sum over d dimensions
    lambda_club: float = 0.01
    club_steps: int = 5  # steps of CLUB's own optimizer per step
    club_learning_rate: float = 1e-3  # of CLUB's own Adam
    cpc_steps: int = 1  # segments predicted ahead
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
    "above_zero": ("epochs", "batch_size", "learning_rate", "codebook_size", "code_dim", "temperature", "club_steps",
                   "club_learning_rate", "cpc_steps"),
    "below_one": ("ema_decay",),
}


def check_flags(args: Args, segments: int) -> None:
    """Raise InputError if flags do not fit each other, or clips of that many segments."""
    if args.align == "infonce" and not args.contrast:
        raise InputError("--align infonce --no-contrast: nothing of it is left; give --align none")
    if args.align == "smit" and args.batch_size < 2:
        raise InputError(f"--batch-size {args.batch_size}: --align smit compares a clip with the others of the batch")
    if args.dcid and args.cpc_steps >= segments:
        raise InputError(f"--cpc-steps {args.cpc_steps}: needs more than {segments} segments a clip, or no --dcid")


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


def share_transformer(semantic) -> None:
    """MST: one Transformer for all modalities. Attention and feed-forward network of both layers become those of the
    first encoder; layer norms, projections, pooling and LSTM stay each modality's own. semantic {m: SemanticEncoder}

    MS-CLIP (You et al., ECCV 2022) shares these weights in all blocks; its variants that keep the first block apart, or
    add a convolutional branch for images, are not here."""
    first, *others = semantic.values()
    for encoder in others:
        for own, shared in zip(encoder.transformer.layers, first.transformer.layers):
            own.self_attn, own.linear1, own.linear2 = shared.self_attn, shared.linear1, shared.linear2


# -------------------------------------------------------------------------------------------------------------- losses
def teacher_commitment_loss(z: dict, code_index: dict, codebook, commitment_cost: float, teacher: bool = True):
    """Eq. 8: sum over m of beta mean (z_m - sg[e(k_m)])^2 + beta / 2 sum over n != m of mean (z_m - sg[e(k_n)])^2

    k_n is what modality n chose at the same segment; without `teacher` only the first term (Eq. 3) remains.
    z {m: (B, T, D)}, code_index {m: (B, T)}, codebook (K, D) -> ()"""
    chosen = {m: F.embedding(code_index[m], codebook).detach() for m in z}
    own = sum(F.mse_loss(z[m], chosen[m]) for m in z)
    others = sum(F.mse_loss(z[m], chosen[n]) for m, n in itertools.permutations(z, 2)) if teacher else 0
    return commitment_cost * (own + others / 2)


def info_nce(query, candidates, temperature: float, similarity: str = "dot"):
    """InfoNCE with the positives on the diagonal: query and candidates (..., N, D) -> ()

    mean_i -log( exp(q_i.c_i / tau) / sum_k exp(q_i.c_k / tau) ). Raises ValueError on unequal shapes."""
    require_shape("query", query, (*query.shape[:-2], -1, -1))
    require_shape("candidates", candidates, query.shape)
    if similarity == "cosine":
        query = F.normalize(query, dim=-1)
        candidates = F.normalize(candidates, dim=-1)
    logits = query @ candidates.transpose(-1, -2) / temperature  # (..., N, N)
    return -logits.log_softmax(-1).diagonal(dim1=-2, dim2=-1).mean()


def nce_loss(z_a, z_b, temperature: float):
    """InfoNCE of clips, half of it in each direction: z_a, z_b (B, T, D) -> ()

    (info_nce(zbar_a, zbar_b) + info_nce(zbar_b, zbar_a)) / 2, zbar the mean over the segments, by cosine / tau: the
    loss of CLIP, which MST trains with, and Eq. 7 of TURN, which has one of the directions only. CLIP learns tau; here
    it is fixed. Raises ValueError on unequal shapes."""
    require_shape("z_a", z_a, (-1, -1, -1))
    require_shape("z_b", z_b, z_a.shape)
    a, b = z_a.mean(1), z_b.mean(1)  # (B, D)
    return (info_nce(a, b, temperature, "cosine") + info_nce(b, a, temperature, "cosine")) / 2


def margin_nce(similarity, alpha: float):
    """One direction of S-MiT, Eq. 2 and 3: S (B, B), a row for each anchor, its pair on the diagonal -> ()

    mean_i -log( exp(S_ii - M_i) / (exp(S_ii - M_i) + sum_{j != i} exp(S_ij)) ), M_i = alpha (S_ii - mean_{j != i} S_ij)

    Gradients flow through the margin M too: at alpha = 1, the paper says, the similarity of the pair drops out."""
    pair = similarity.diagonal()  # (B,)
    others = (similarity.sum(1) - pair) / (len(similarity) - 1)  # the mean over j != i
    margin = alpha * (pair - others)
    return -(similarity - margin.diag()).log_softmax(1).diagonal().mean()


def amm_loss(z_a, z_b, alpha: float = 0.5, temperature: float | None = None):
    """Adaptive mean margin (S-MiT, Monfort et al., CVPR 2021), the sum of both directions: z_a, z_b (B, T, D) -> ()

    `margin_nce` of S[i, j] = zbar_a[i].zbar_b[j], zbar the mean over the segments, and of its transpose, each direction
    with a margin of its own. A product as in the paper, where a head sets its scale and not the codebook; with a
    `temperature` S is cosine / tau. Raises ValueError on unequal shapes, and on one clip, which has no negatives."""
    require_shape("z_a", z_a, (-1, -1, -1))
    require_shape("z_b", z_b, z_a.shape)
    if len(z_a) < 2:
        raise ValueError(f"{len(z_a)} clip: the margin is a mean over other clips")
    a, b = z_a.mean(1), z_b.mean(1)  # (B, D)
    if temperature is not None:
        a, b = F.normalize(a, dim=-1) / temperature, F.normalize(b, dim=-1)
    similarity = a @ b.T  # (B, B)
    return margin_nce(similarity, alpha) + margin_nce(similarity.T, alpha)


def transport_plan(cost, beta: float = 0.5, iterations: int = 50):
    """Logarithm of the plan that carries N clips to K codes, both of uniform mass, at least cost: (N, K) -> (N, K)

    IPOT, a proximal point method (Xie et al. 2018): T = 1 and sigma = 1 / K at first, then in each iteration
    Q = exp(-cost / beta) T, delta = 1 / (N Q sigma), sigma = 1 / (K Q^T delta), T = diag(delta) Q diag(sigma),
    here in logarithms, because entries of T soon are below the smallest number of fp32. CODIS names the method without
    its settings; beta and iterations are those of UNITER and GOT, of related authors."""
    n, k = cost.shape
    plan = torch.zeros_like(cost)  # log T, and so on
    sigma = torch.full_like(cost[0], -math.log(k))  # (K,)
    for _ in range(iterations):
        q = plan - cost / beta
        delta = -math.log(n) - (q + sigma).logsumexp(1, keepdim=True)  # (N, 1)
        sigma = -math.log(k) - (q + delta).logsumexp(0)
        plan = q + delta + sigma
    return plan


def codis_loss(z_a, z_b, codebook, temperature: float, contrast: bool = True, beta: float = 0.5, iterations: int = 50):
    """CODIS (Duan et al., CVPR 2022), L_code + L_ica: z_a, z_b (B, T, D), codebook (K, D) -> (); gradient into z alone.

    s_m[i, k] = cosine of clip i's mean zbar_m and code k, G_m the rows of the plan of cost 1 - s_m as distributions:
    L_code = mean_i -sum_k G_b log softmax_k(s_a / tau) + the same for G_a and s_b: the plan of one modality teaches the
    other. L_ica, unless `contrast` is off, is InfoNCE both ways, whose keys, the candidates, learn nothing.
    The present outputs without gradient take the place of the momentum encoders and of their queue, one-hot targets
    that of soft ones; no term within a modality, which needs two views. The same tau in both terms is our reading.
    Raises ValueError on shapes that do not fit."""
    require_shape("z_a", z_a, (-1, -1, -1))
    require_shape("z_b", z_b, z_a.shape)
    require_shape("codebook", codebook, (-1, z_a.shape[-1]))
    a, b = z_a.mean(1), z_b.mean(1)  # (B, D)
    codes = F.normalize(codebook.detach(), dim=-1)
    s_a, s_b = F.normalize(a, dim=-1) @ codes.T, F.normalize(b, dim=-1) @ codes.T  # (B, K)
    with torch.no_grad():
        plan_a, plan_b = (transport_plan(1 - s, beta, iterations).softmax(1) for s in (s_a, s_b))
    loss = -(plan_b * (s_a / temperature).log_softmax(1)).sum(1).mean()
    loss = loss - (plan_a * (s_b / temperature).log_softmax(1)).sum(1).mean()
    if contrast:
        loss = loss + info_nce(a, b.detach(), temperature, "cosine") + info_nce(b, a.detach(), temperature, "cosine")
    return loss


def cross_reconstruction_loss(decoder, quantized: dict, specific: dict, target: dict):
    """TURN (Zhao et al., NeurIPS 2022), the cross part of Eq. 9: sum over m of mean (D_m([q ; specific_m]) - x_m)^2

    q is the mean of the other modalities' codes at the segment; of two modalities it is the other one's code. The
    specific features take the place of the masked sequence that the paper's decoder completes, the squared error that
    of its l1. quantized {m: (B, T, width)} with straight-through gradients, specific and target {m: (B, T, ...)} -> ()
    """
    loss = 0
    for m in target:
        others = [quantized[n] for n in quantized if n != m]
        decoded = decoder[m](sum(others) / len(others), specific[m])
        loss = loss + F.mse_loss(decoded.to(target[m].dtype), target[m])
    return loss


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


def align_loss(z_a, z_b, codebook, args: Args):
    """What `--align` says of the outputs of two modalities: z_a, z_b (B, T, D), codebook (K, D) -> ()"""
    if args.align == "smit":
        return amm_loss(z_a, z_b, temperature=args.temperature if args.similarity == "cosine" else None)
    if args.align == "codis":
        return codis_loss(z_a, z_b, codebook, args.temperature, args.contrast)
    if args.align == "cmcm":
        return cmcm_loss(z_a, z_b, codebook, codebook)
    if args.align in ("mst", "turn", "infonce") and args.contrast:
        return nce_loss(z_a, z_b, args.temperature)
    return z_a.new_zeros(())


def by_guessing(args: Args, pairs: int) -> dict:
    """What losses are by guessing, {name: value}; pairs of modalities, ordered"""
    clip, code = math.log(args.batch_size), math.log(args.codebook_size)
    align = {"smit": 2 * clip, "codis": 2 * code + 2 * clip * args.contrast}.get(args.align, clip)
    return {"cpc": pairs * clip, "align": pairs / 2 * align}


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
    # ====================================================================================================== comparators
    check_flags(args, segments)
    if args.align == "mst":
        share_transformer(model.semantic)
    seen = shape if args.specific == "map" else {m: (s[0], s[-1]) for m, s in shape.items()}  # what is decoded
    networks["specific"] = nn.ModuleDict({m: SpecificEncoder(s) for m, s in seen.items()})
    networks["decoder"] = nn.ModuleDict({m: Decoder(s, model.quantizer.width) for m, s in seen.items()})
    networks["cpc"] = CrossModalCPC(list(shape), args.code_dim, args.cpc_steps)
    club = nn.ModuleDict({m: CLUB(args.code_dim, networks["specific"][m].width) for m in shape}).to(device)
    club_optimizer = torch.optim.Adam(club.parameters(), lr=args.club_learning_rate, fused=True)
    generators = {"codebook": run.generator("codebook"), "cpc": run.generator("cpc", "cpu")}
    host_draw = partial(torch.randint, segments - args.cpc_steps, (), generator=generators["cpc"]) if args.dcid else int
    more_state = {"club": club, "club_optimizer": club_optimizer}
    chance = by_guessing(args, len(shape) * (len(shape) - 1))
    # =============================================================================================== end of comparators
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

        # ================================================================================================== comparators
        target = batch if args.specific == "map" else {m: cell_mean(x) for m, x in batch.items()}  # {m: (B, T, ...)}
        with autocast():
            specific = {m: networks["specific"][m](x) for m, x in target.items()}
            decoded = {m: networks["decoder"][m](own[m], specific[m]) for m in batch}
        recon = sum(F.mse_loss(decoded[m].float(), target[m]) for m in batch)
        codebook = model.quantizer.codebook
        # Uni-Code's Eq. 3: to the own code alone, for Eq. 8 is a part of its MM-EMA
        commitment = teacher_commitment_loss(z, code_index, codebook, args.commitment_cost, teacher=False)

        cross = cpc = information = torch.zeros_like(recon)
        if args.dcid:
            cpc = networks["cpc"](z, drawn)  # Uni-Code's Eq. 6
        align = sum(align_loss(z[a], z[b], codebook, args) for a, b in itertools.combinations(z, 2))
        if args.align == "turn":
            with autocast():
                cross = cross_reconstruction_loss(networks["decoder"], own, specific, target)
        if args.dcid and args.lambda_club:
            y = {m: all_gather(pool_specific(specific[m].float(), len(batch[m]))) for m in z}  # {m: (B, T, d)}
            fit_club(club, club_optimizer, z, y, args.club_steps)
            information = sum(club[m](z[m], y[m]) for m in z)  # Uni-Code's Eq. 5

        loss = recon + commitment + cpc + align + cross + args.lambda_club * information
        losses = {"recon": recon, "commitment": commitment, "cpc": cpc, "align": align, "cross": cross,
                  "club": information}
        ema_input = z  # no MM-EMA: the codes follow each modality's own outputs
        # =========================================================================================== end of comparators

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

"""MICU (Huang et al., ICCV 2025): one discrete code for several modalities, learned from paired, unlabelled clips.

A clip is T segments, moments of equal length; for each the file of features says what is heard, seen and said. Each
modality has an encoder; each of its outputs becomes a code: the nearest row of one codebook that all modalities share.
Then encoders and codebook are frozen, and a probe, a small classifier, trained on one modality's codes is tested on
another's.

FCMI (fine and coarse masked InfoNCE) contrasts masked encoder outputs with the whole ones of every modality: which
segment of the clip is this, which clip of the batch? CUJP (cross-modal unified jigsaw puzzles) cuts a code into parts,
takes each part from a random modality, permutes them and asks for the permutation. Reconstruction keeps content in the
codes, the commitment keeps encoders near them, and the codes follow the encoders by moving averages (EMA):

    L = lambda_1 (L_fine + L_coarse) + lambda_2 L_cujp + lambda_3 L_recon + lambda_4 L_commit                   (Eq. 8)

    python micu.py --cujp-splits 8 --mask-ratio 0.3        # on the embedded digits: trains, probes, prints a table
    python micu.py --help                                  # every flag; docs/micu.md lists paper against release

"Released" is the authors' code, github.com/haihuangcode/CMG. Shapes: B clips of a batch, T segments, D code width, K
codes, M modalities, N = B * T vectors of a modality, O jigsaw parts, P permutations.
"""
import math
import random
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

METHOD = "micu"


# ----------------------------------------------------------------------------------------------------------- arguments
@dataclass
class Method:
    mask_ratio: float = 0.3  # share of an output's channels, or of segments, masked in FCMI's queries
    mask_axis: Literal["channel", "time"] = "channel"  # mask channels of a clip (paper) or its segments (released)
    mask_sharing: Literal["same", "different"] = "same"  # one mask for all modalities of a clip, or one each
    similarity: Literal["dot", "cosine"] = "cosine"  # in FCMI; the paper has dot
    temperature: float = 0.1  # tau of FCMI; the paper has 1.0, with dot
    jigsaw: Literal["cujp", "mmjp"] = "cujp"  # parts of one code, or of the codes of all modalities (Dong et al. 2024)
    cujp_splits: int = 8  # parts that each code is cut into, O
    cujp_samples: int = 8  # permutations drawn per vector and step, an unbiased estimate; 0: all P, as in the paper
    mm_ema: bool = False  # codes follow outputs averaged over the modalities (released), not each modality's own
    lambda_fine: float = 1.0  # weight of the fine InfoNCE
    lambda_coarse: float = 1.0  # weight of the coarse InfoNCE
    lambda_cujp: float = 2.0  # weight of the jigsaw


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
    epochs: int = 5  # passes over the train split
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
    "above_zero": ("epochs", "batch_size", "learning_rate", "codebook_size", "code_dim", "temperature", "cujp_splits"),
    "below_one": ("ema_decay", "mask_ratio"),
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


def decoder(inputs: int, outputs: int):
    """D_m of Eq. 7: code (B, T, inputs) -> features (B, T, outputs). For a map the target is the mean of its cells: one
    vector for all cells can match no more of them."""
    return nn.Sequential(nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, outputs))


# -------------------------------------------------------------------------------------------------------------- losses
def commitment_loss(z: dict, code_index: dict, codebook):
    """Eq. 7, right: sum over modalities of mean (z_m - sg[e(k_m)])^2, sg being no gradient; z {m: (B, T, D)},
    code_index {m: (B, T)}, codebook (K, D) -> ()"""
    return sum(F.mse_loss(z[m], F.embedding(code_index[m], codebook).detach()) for m in z)


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


def fcmi_loss(z: dict, mask, temperature: float, similarity: str = "dot"):
    """FCMI, Eq. 4 and 5, summed over all ordered pairs (m, n), m = n included: masked queries, whole candidates.

    z {m: (B, T, D)}; mask (B, 1, D) or (B, T, 1), one for all or {m: mask} -> (fine, coarse), each ().
    Raises ValueError if the modalities differ in shape or a mask does not broadcast to them."""
    first, *others = z.values()
    require_shape("z", first, (-1, -1, -1))
    for other in others:
        require_shape("z", other, first.shape)
    masks = mask if isinstance(mask, dict) else dict.fromkeys(z, mask)
    for m in z:
        require_shape("mask", masks[m], (-1, -1, -1))
        fits = [-1 if have == 1 else want for have, want in zip(masks[m].shape, first.shape)]
        require_shape("mask", masks[m], fits)
    query = torch.stack([masks[m] * z[m] for m in z])[:, None]  # (M, 1, B, T, D)
    whole = torch.stack(list(z.values()))[None]  # (1, M, B, T, D)
    query, whole = torch.broadcast_tensors(query, whole)  # (M, M, B, T, D)
    pairs = len(z) ** 2  # info_nce averages over them, the paper sums
    # Eq. 4: per clip i, query zbar_m[i, j] against z_n[i, k] over segments k, positive k = j
    fine = pairs * info_nce(query, whole, temperature, similarity)
    # Eq. 5: query mean_t zbar_m[i] against mean_t z_n[j] over clips j, positive j = i
    coarse = pairs * info_nce(query.mean(-2), whole.mean(-2), temperature, similarity)
    return fine, coarse


def time_aligned(z: dict) -> dict:
    """Released MM-EMA: (z_m + mean over the other modalities of z_n) / 2 at the same segment, {m: (B, T, D)}"""
    total = sum(z.values())
    return {m: (v + (total - v) / (len(z) - 1)) / 2 for m, v in z.items()}


def draw_mask(z: dict, args: Args, generator):
    """FCMI's mask of ones and zeros: (B, 1, D) over channels or (B, T, 1) over segments, for all or {m: mask}."""
    b, t, d = next(iter(z.values())).shape
    shape = (b, 1, d) if args.mask_axis == "channel" else (b, t, 1)

    def draw():
        return (torch.rand(shape, generator=generator, device=generator.device) >= args.mask_ratio).float()

    return draw() if args.mask_sharing == "same" else {m: draw() for m in z}


class CUJP(nn.Module):
    """Cross-modal unified jigsaw puzzles (3.3): which of P fixed permutations shuffled the O parts of a code?

    Raises InputError unless splits divides code_dim, and ValueError unless 1 <= permutations <= splits!."""

    def __init__(self, code_dim: int, splits: int, permutations: int, seed: int):
        super().__init__()
        if code_dim % splits:
            raise InputError(f"{splits} parts do not divide a code of width {code_dim}")
        if not 1 <= permutations <= math.factorial(splits):
            raise ValueError(f"permutations {permutations} is not in 1..{splits}! = {math.factorial(splits)}")
        self.code_dim = code_dim
        self.splits = splits
        rng = random.Random(seed)
        distinct = {}  # in the order drawn; listing all O! would take too long
        while len(distinct) < permutations:
            distinct[tuple(rng.sample(range(splits), splits))] = None
        self.register_buffer("permutations", torch.tensor(list(distinct)))  # (P, O)
        self.hidden = nn.Linear(code_dim, 512)
        self.classify = nn.Linear(512, permutations)

    def forward(self, quantized: dict, modality, permutation):
        """Cross-entropy of the permutation, mean over vectors and their S permutations: place o shows part
        permutations[p, o]; then come `hidden`, a ReLU, `classify`.

        quantized {m: (B, T, D)}; modality (N, O) int64: which one gives each part of each vector; permutation (N, S)
        int64: under which of the P it is shown -> (). Raises ValueError on shapes that do not fit."""
        b, t = next(iter(quantized.values())).shape[:2]
        for q in quantized.values():
            require_shape("quantized", q, (b, t, self.code_dim))
        require_shape("modality", modality, (b * t, self.splits))
        require_shape("permutation", permutation, (b * t, -1))
        vectors = torch.stack(list(quantized.values())).flatten(1, 2)  # (M, N, D)
        parts = vectors.unflatten(-1, (self.splits, -1))  # (M, N, O, w)
        chosen = modality == torch.arange(len(parts), device=parts.device)[:, None, None]  # (M, N, O) one-hot
        mixed = (parts * chosen[..., None]).sum(0)  # (N, O, w), each part of the modality chosen for it
        # Shuffle by reading rows of a table of all parts, (N * O, w): vector n begins at row n * O.
        row = self.splits * torch.arange(b * t, device=parts.device)[:, None, None] + self.permutations[permutation]
        shuffled = F.embedding(row, mixed.flatten(0, 1))  # (N, S, O, w)
        shuffled = shuffled.flatten(0, 1).flatten(1)  # (N * S, D)
        logits = self.classify(F.relu(self.hidden(shuffled)))  # (N * S, P)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), permutation.flatten())


def mmjp_input(quantized: dict) -> dict:
    """Multimodal jigsaw puzzles (MMJP, Dong et al. 2024) permute the parts of all modalities together: CUJP of a single
    modality, whose codes are all codes of a segment side by side. {m: (B, T, D)} -> {"all": (B, T, M * D)}"""
    return {"all": torch.cat(list(quantized.values()), -1)}


def draw_puzzles(jigsaw: CUJP, vectors: int, num_modalities: int, samples: int, generator):
    """Of each of N `vectors` the modality of each part (N, O), and S `samples` of permutations (N, S); 0: all P."""
    p, o = jigsaw.permutations.shape
    modality = torch.randint(num_modalities, (vectors, o), generator=generator, device=generator.device)
    if samples == 0:
        return modality, torch.arange(p, device=generator.device).expand(vectors, p)
    return modality, torch.randint(p, (vectors, samples), generator=generator, device=generator.device)


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
    # ============================================================================================================= MICU
    networks["decoder"] = nn.ModuleDict({m: decoder(args.code_dim, s[-1]) for m, s in shape.items()})
    if segments == 1 and args.lambda_fine:
        raise InputError("clips of one segment: the fine loss has none to tell apart; give --lambda-fine 0")
    if args.code_dim % args.cujp_splits:
        raise InputError(f"--cujp-splits {args.cujp_splits}: must divide --code-dim {args.code_dim}")
    side_by_side = 1 if args.jigsaw == "cujp" else len(shape)  # modalities in one puzzle
    splits = side_by_side * args.cujp_splits
    permutations = min(math.factorial(splits), 256)  # P; the limit is ours
    networks["jigsaw"] = CUJP(side_by_side * args.code_dim, splits, permutations, args.seed)
    generators = {name: run.generator(name) for name in ("codebook", "mask", "jigsaw")}
    more_state = {}  # other optimizers, of which there are none here
    host_draw = int  # a number that the host draws for a step: 0, for none is needed
    pairs = len(shape) ** 2
    guess = {"fcmi_fine": pairs * math.log(segments), "fcmi_coarse": pairs * math.log(args.batch_size),
             "cujp": math.log(permutations)}
    weight = {"fcmi_fine": args.lambda_fine, "fcmi_coarse": args.lambda_coarse, "cujp": args.lambda_cujp}
    chance = {name: guess[name] for name in guess if weight[name]}  # what a loss is by guessing
    # ====================================================================================================== end of MICU
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

        # ========================================================================================================= MICU
        target = {m: cell_mean(x) for m, x in batch.items()}  # {m: (B, T, d)}
        with autocast():
            decoded = {m: networks["decoder"][m](own[m]) for m in batch}
        recon = sum(F.mse_loss(decoded[m].float(), target[m]) for m in batch)  # Eq. 7, left
        commitment = commitment_loss(z, code_index, model.quantizer.codebook)  # Eq. 7, right

        mask = draw_mask(z, args, generators["mask"])
        fine, coarse = fcmi_loss(z, mask, args.temperature, args.similarity)  # Eq. 4, Eq. 5

        pieces = own if args.jigsaw == "cujp" else mmjp_input(own)
        # drawn for the whole batch, so that it does not matter how many processes share it
        modality, permutation = draw_puzzles(networks["jigsaw"], args.batch_size * segments, len(pieces),
                                             args.cujp_samples, generators["jigsaw"])
        with autocast():
            cujp = networks["jigsaw"](pieces, local_rows(modality), local_rows(permutation))  # section 3.3

        # Eq. 8; lambda_1 is split in two, lambda_3 and lambda_4 are 1
        loss = recon + commitment + args.lambda_fine * fine + args.lambda_coarse * coarse + args.lambda_cujp * cujp
        losses = {"recon": recon, "commitment": commitment, "fcmi_fine": fine, "fcmi_coarse": coarse, "cujp": cujp}
        ema_input = time_aligned(z) if args.mm_ema else z
        # ================================================================================================== end of MICU

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

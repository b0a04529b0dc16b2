"""The losses of benchmarks/comparators.py: worked examples, slow loops from the papers' equations, properties, runs.

The numbers of the examples, of two clips of two segments in width 2, were computed without this code.
"""
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from reference import (
    SOME,
    THREE,
    assert_close,
    assert_finite_with_gradient,
    assert_no_gradient,
    assert_same_loss,
    build,
    features,
    generator,
    mean,
    minus_log_share,
    pair_similarity,
    rand,
)

import probes
from benchmarks import comparators
from benchmarks.comparators import (
    Args,
    Model,
    align_loss,
    amm_loss,
    cmcm_loss,
    codis_loss,
    cross_reconstruction_loss,
    margin_nce,
    nce_loss,
    share_transformer,
    transport_plan,
)
from conftest import captured_here, read_metrics, read_results, run_folder, run_here
from data import Batches, Features
from run import InputError
from toys import write_toy

ALIGNS = ["none", "smit", "mst", "codis", "turn", "cmcm", "infonce"]
A, B, C, D = (torch.tensor(clips, dtype=torch.float64) for clips in (
    [[[1, 0], [0, 1]], [[2, 0], [0, 0]]], [[[1, 1], [1, 1]], [[0, -1], [2, -1]]],
    [[[0, 1], [0, 1]], [[1, 0], [1, 2]]], [[[1, 0], [1, 0]], [[0, 2], [0, 0]]]))  # fmt: skip
E2, E3 = (torch.tensor(codes, dtype=torch.float64) for codes in ([[2, 0], [0, 3]], [[2, 0], [0, 3], [-1, 0]]))


def number(value):
    return pytest.approx(value, abs=1.5e-6)


def pair(names=("audio", "video"), batch=4, segments=3, width=5, scale=1.0):
    """z_a, z_b (B, T, D)"""
    return list(features(names, batch, segments, width, scale=scale).values())


def clip_means(z):
    """[(D,)] of (B, T, D)"""
    return [mean(clip) for clip in z]


# ---------------------------------------------------------------------------------------------------------------- smit
def test_margin_loss_of_the_examples():
    similarity = torch.tensor([[1, 0], [1, 1]], dtype=torch.float64, requires_grad=True)
    one_way = margin_nce(similarity, 0.5)
    assert one_way.item() == number(0.583612) == number((math.log(1 + math.exp(-0.5)) + math.log(2)) / 2)
    (gradient,) = torch.autograd.grad(one_way, similarity)
    assert gradient.flatten().tolist() == [number(x) for x in (-0.094385, 0.094385, 0.125, -0.125)]
    (gradient,) = torch.autograd.grad(margin_nce(similarity, 1.0), similarity)
    assert_close(gradient, torch.zeros_like(gradient))  # the similarity of the pair drops out
    assert [amm_loss(A, B, alpha).item() for alpha in (0.5, 0, 1)] == [
        number(1.167224), number(1.006409), number(2 * math.log(2))]
    assert amm_loss(A, B).item() == amm_loss(A, B, 0.5).item() != number(1.227281)  # that of one margin both ways
    assert [amm_loss(*two).item() for two in ((A, C), (B, C))] == [number(1.284552), number(1.537339)]
    x, y = torch.tensor([1.0, 2, 3]).double().view(3, 1, 1), torch.tensor([1.0, 0, -1]).double().view(3, 1, 1)
    similarity = x.flatten().outer(y.flatten())
    assert margin_nce(similarity, 0.5).item() == number(2.229651)
    assert margin_nce(similarity.T, 0.5).item() == number(1.535157)
    assert amm_loss(x, y).item() == number(3.764807)


def slow_margin(anchors, candidates, alpha, temperature):
    """Eq. 2 and 3 for the anchors of one modality, vectors [(D,)]"""
    losses = []
    for i, anchor in enumerate(anchors):
        if temperature is None:
            said = [pair_similarity(anchor, other, "dot") for other in candidates]
        else:
            said = [pair_similarity(anchor, other, "cosine") / temperature for other in candidates]
        positive, negatives = said[i], said[:i] + said[i + 1:]
        margin = alpha * (positive - mean(negatives))
        kept = torch.exp(positive - margin)
        losses.append(-torch.log(kept / (kept + sum(torch.exp(negative) for negative in negatives))))
    return mean(losses)


@pytest.mark.parametrize("batch", [2, 3, 5])
@pytest.mark.parametrize("arguments", [(), (0.2,), (0.8, 0.5), (0.5, 0.07)])
def test_margin_loss_equals_the_loop_over_both_directions(batch, arguments):
    z_a, z_b = pair(batch=batch)
    alpha, temperature = (*arguments, *(0.5, None)[len(arguments):])  # as by default
    a, b = clip_means(z_a), clip_means(z_b)
    slow = slow_margin(a, b, alpha, temperature) + slow_margin(b, a, alpha, temperature)
    assert_same_loss(amm_loss(z_a, z_b, *arguments), slow, [z_a, z_b])


def test_margin_loss_is_softmax_whose_positive_is_mixed_with_the_mean_negative():
    similarity = rand(5, 5, grad=True)
    negatives = mean(similarity[:, j] * (torch.arange(5) != j) for j in range(5)) * 5 / 4  # (B,)
    mixed = 0.7 * similarity.diagonal() + 0.3 * negatives
    logits = torch.where(torch.eye(5, dtype=bool), mixed[:, None], similarity)
    expected = nn.functional.cross_entropy(logits, torch.arange(5))
    assert_same_loss(margin_nce(similarity, 0.3), expected, [similarity])


def test_margins_scale_with_the_similarities():
    """So that cosine / tau is the same loss at another scale."""
    z_a, z_b = pair()
    unit = [nn.functional.normalize(z.mean(1), dim=-1)[:, None] for z in (z_a, z_b)]
    assert_close(amm_loss(z_a, z_b, 0.4, 0.25), amm_loss(2 * unit[0], 2 * unit[1], 0.4))


def test_margin_loss_needs_two_clips():
    with pytest.raises(ValueError, match="1 clip"):
        amm_loss(A[:1], B[:1])


# --------------------------------------------------------------------------------------------------------------- nce
def test_contrast_of_the_examples():
    assert nce_loss(A, B, 1.0).item() == number(0.491157) == number((0.503204 + 0.479110) / 2)
    assert nce_loss(A, B, 0.5).item() == number(0.370061)
    assert sum(nce_loss(*two, 1.0) for two in itertools.combinations((A, B, C), 2)).item() == number(1.812212)


def slow_nce(z_a, z_b, temperature):
    """CLIP's loss: mean of a cross-entropy for every row and one for every column"""
    a, b = clip_means(z_a), clip_means(z_b)
    rows = mean(minus_log_share(a[i], b, i, temperature, "cosine") for i in range(len(a)))
    columns = mean(minus_log_share(b[i], a, i, temperature, "cosine") for i in range(len(a)))
    return 0.5 * rows + 0.5 * columns


@pytest.mark.parametrize("temperature", [1.0, 0.07])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_contrast_equals_the_loop_over_rows_and_columns(batch, temperature):
    z_a, z_b = pair(batch=batch)
    assert_same_loss(nce_loss(z_a, z_b, temperature), slow_nce(z_a, z_b, temperature), [z_a, z_b])


# --------------------------------------------------------------------------------------------------- codis and its plan
PLANS = [  # cost, beta, iterations, plan
    ([[0, 1], [1, 0]], 1, 1, [[0.365529, 0.134471], [0.134471, 0.365529]]),
    ([[0, 1], [1, 0]], 1, 2, [[0.440399, 0.059601], [0.059601, 0.440399]]),
    ([[0, 1, 2], [2, 1, 0]], 0.5, 1, [[0.327338, 0.166667, 0.005995], [0.005995, 0.166667, 0.327338]]),
    ([[0, 1, 2], [2, 1, 0]], 0.5, 50, [[1 / 3, 1 / 6, 0], [0, 1 / 6, 1 / 3]]),
    ([[0, 1, 2], [1, 1, 0], [0.5, 0.2, 1], [2, 0, 1]], 0.5, 1, [
        [0.221803, 0.023530, 0.005111], [0.027253, 0.021363, 0.253336], [0.080214, 0.114572, 0.037123],
        [0.004062, 0.173867, 0.037763]]),
]


@pytest.mark.parametrize("cost, beta, iterations, plan", PLANS)
def test_plan_of_the_examples(cost, beta, iterations, plan):
    found = transport_plan(torch.tensor(cost, dtype=torch.float64), beta, iterations).exp()
    assert found.flatten().tolist() == [number(x) for row in plan for x in row]


def slow_plan(cost, beta, iterations) -> list:
    """The iteration as it is published, with numbers and not with their logarithms: (N, K) -> N lists of K"""
    n, k = cost.shape
    plan, sigma = [[1.0] * k for _ in range(n)], [1 / k] * k
    for _ in range(iterations):
        q = [[math.exp(-cost[i, j].item() / beta) * plan[i][j] for j in range(k)] for i in range(n)]
        delta = [1 / n / sum(q[i][j] * sigma[j] for j in range(k)) for i in range(n)]
        sigma = [1 / k / sum(q[i][j] * delta[i] for i in range(n)) for j in range(k)]
        plan = [[delta[i] * q[i][j] * sigma[j] for j in range(k)] for i in range(n)]
    return plan


@pytest.mark.parametrize("shape", [(3, 5), (6, 2), (1, 4)])
@pytest.mark.parametrize("settings", [(), (1.0, 1), (0.3, 7)])
def test_plan_equals_the_iteration_in_plain_numbers(shape, settings):
    cost = torch.rand(shape, generator=generator(), dtype=torch.float64) * 2
    beta, iterations = settings or (0.5, 50)
    plan = transport_plan(cost, *settings).exp()
    assert_close(plan, torch.tensor(slow_plan(cost, beta, iterations), dtype=torch.float64))
    assert_close(plan.sum(0), torch.full((shape[1],), 1 / shape[1], dtype=torch.float64))  # after any number


def test_plan_is_accurate_in_single_precision_where_its_entries_are_not():
    """Eighty clips and four hundred codes, as by default; and costs that would underflow at once."""
    means, codes = (nn.functional.normalize(rand(n, 16, seed=n), dim=-1) for n in (80, 400))
    cost = 1 - means @ codes.T
    exact = transport_plan(cost).softmax(1)
    assert_close(transport_plan(cost.float()).softmax(1).double(), exact, 1e-6)
    perplexity = (-(exact * exact.clamp(min=1e-300).log()).sum(1)).exp().mean().item()
    assert 4 < perplexity < 10  # fewer clips than codes: a clip is spread over several
    assert transport_plan(200 * cost.float()).isfinite().all()


def test_codis_of_the_examples():
    def parts(*arguments, **settings):
        alone = codis_loss(*arguments, contrast=False, **settings).item()
        return alone, codis_loss(*arguments, **settings).item() - alone
    assert parts(A, D, E2, 1.0) == (number(1.003204 + 1.313262), number(1.003204 + 0.979110))
    assert codis_loss(A, D, E2, 1.0).item() == number(4.298780)
    assert parts(A, D, E2, 1.0)[0] != number(0.816466)  # that of targets of the same modality
    assert parts(A, B, E2, 1.0) == (number(0.958589), number(0.982314))
    assert parts(A, D, E3, 0.5) == (number(4.692874), number(2.740122))
    assert parts(A, D, E3, 0.5, beta=1.0, iterations=3) == (number(4.399383), number(2.740122))
    every = [parts(*two, E2, 1.0) for two in itertools.combinations((A, B, C), 2)]
    assert [sum(part) for part in zip(*every)] == [number(2.923587), number(3.624425)]


def slow_code_term(learner, teacher, codebook, temperature, beta, iterations):
    """H of one modality, [(D,)]: the other one's plan over the codes, a distribution for every clip, is the target"""
    with torch.no_grad():
        cost = torch.stack([torch.stack([1 - pair_similarity(x, code, "cosine") for code in codebook])
                            for x in teacher])
        plan = slow_plan(cost, beta, iterations)
    losses = []
    for x, row in zip(learner, plan):
        chances = [minus_log_share(x, list(codebook), k, temperature, "cosine") for k in range(len(codebook))]
        losses.append(sum(share / sum(row) * chance for share, chance in zip(row, chances)))
    return mean(losses)


def slow_keys_term(learner, teacher, temperature):
    keys = [key.detach() for key in teacher]
    return mean(minus_log_share(x, keys, i, temperature, "cosine") for i, x in enumerate(learner))


@pytest.mark.parametrize("contrast", [True, False])
@pytest.mark.parametrize("settings", [(), (1.0, 3)])
def test_codis_equals_the_loop_and_teaches_no_codebook(settings, contrast):
    z_a, z_b = pair()
    codebook = rand(6, 5, seed=7, grad=True)
    a, b, how = clip_means(z_a), clip_means(z_b), settings or (0.5, 50)
    fixed = codebook.detach()
    slow = slow_code_term(a, b, fixed, 0.3, *how) + slow_code_term(b, a, fixed, 0.3, *how)
    if contrast:
        slow = slow + slow_keys_term(a, b, 0.3) + slow_keys_term(b, a, 0.3)
    loss = codis_loss(z_a, z_b, codebook, 0.3, contrast, *settings)
    assert_same_loss(loss, slow, [z_a, z_b])
    assert_no_gradient(loss, [codebook])


def test_codis_is_stable_in_single_precision():
    z_a, z_b = [(100 * z.detach()).float().requires_grad_() for z in pair(batch=40, width=16)]
    codebook = rand(400, 16, seed=3).float()
    loss = codis_loss(z_a, z_b, codebook, 0.07)
    assert_finite_with_gradient(loss, [z_a, z_b])
    exact = codis_loss(z_a.double(), z_b.double(), codebook.double(), 0.07)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------- turn
def plus(names):
    """Decoders that add code and specific features."""
    return {m: lambda code, specific: code + specific for m in names}


def one_segment(**values):
    return {m: torch.tensor([[x]], dtype=torch.float64) for m, x in values.items()}


def test_cross_reconstruction_of_the_example():
    codes, own = one_segment(a=[1, 2], b=[0, 4]), one_segment(a=[0.5, 0], b=[1, -1])
    target = one_segment(a=[2, 2], b=[1, 1])
    loss = cross_reconstruction_loss(plus("ab"), codes, own, target)
    assert loss.item() == number(3.625) == number(3.125 + 0.5) != number(2.125)  # that of the own codes


@SOME
def test_cross_reconstruction_decodes_from_the_mean_of_the_other_codes(names):
    codes, own, target = (features(names, width=w) for w in (5, 2, 3))
    decoder = {m: build(nn.Bilinear, 5, 2, 3) for m in names}
    slow = 0
    for m in names:
        error = []
        for i, t, d in itertools.product(range(3), range(4), range(3)):
            others = mean(codes[n][i, t] for n in names if n != m)
            error.append((decoder[m](others[None], own[m][i, t][None])[0, d] - target[m][i, t, d]) ** 2)
        slow = slow + mean(error)
    inputs = [*codes.values(), *own.values(), *(decoder[m].weight for m in names)]
    assert_same_loss(cross_reconstruction_loss(decoder, codes, own, target), slow, inputs)


def test_cross_reconstruction_teaches_the_encoders_of_the_other_modalities_and_no_codebook():
    """Through the straight-through gradient of their codes."""
    z = {m: v.detach().float().requires_grad_() for m, v in features(THREE, width=4).items()}
    quantizer = comparators.Quantizer(THREE, Args(codebook_size=8, code_dim=4))
    quantizer.codebook.requires_grad_()
    quantized, _ = quantizer(z)
    zero = {m: torch.zeros(3, 4, 4) for m in THREE}
    audio = {"audio": zero["audio"]}  # what is decoded
    loss = cross_reconstruction_loss(plus(THREE), quantized, zero, audio)
    assert_no_gradient(loss, [z["audio"], quantizer.codebook])
    for gradient in torch.autograd.grad(loss, [z["video"], z["text"]]):
        assert gradient.any()


# ---------------------------------------------------------------------------------------------------------------- cmcm
def test_code_matching_of_the_example():
    z, codebook = torch.tensor([[[0.0]], [[1.0]]]).double(), torch.tensor([[0.0], [1.0]]).double()
    expected = math.log(1 + math.exp(-2 * math.tanh(0.5)))
    assert expected == number(0.334209)
    loss = cmcm_loss(z, z, codebook, codebook)
    assert loss.item() == pytest.approx(expected, abs=1e-5)  # a distance of 0 counts as 1e-5


# ----------------------------------------------------------------------------------------------------- which loss it is
CODEBOOK = rand(6, 5, seed=7)


@pytest.mark.parametrize("flags, expected", [
    ({"align": "none"}, lambda a, b: 0 * a.sum()),
    ({"align": "smit"}, lambda a, b: amm_loss(a, b, 0.5, 0.07)),
    ({"align": "smit", "temperature": 0.5}, lambda a, b: amm_loss(a, b, 0.5, 0.5)),
    ({"align": "smit", "similarity": "dot"}, lambda a, b: amm_loss(a, b, 0.5)),
    ({"align": "mst"}, lambda a, b: slow_nce(a, b, 0.07)), ({"align": "turn"}, lambda a, b: slow_nce(a, b, 0.07)),
    ({"align": "infonce", "temperature": 0.5}, lambda a, b: slow_nce(a, b, 0.5)),
    ({"align": "mst", "contrast": False}, lambda a, b: 0 * a.sum()),
    ({"align": "turn", "contrast": False}, lambda a, b: 0 * a.sum()),
    ({"align": "codis"}, lambda a, b: codis_loss(a, b, CODEBOOK, 0.07, True, 0.5, 50)),
    ({"align": "codis", "contrast": False, "temperature": 1}, lambda a, b: codis_loss(a, b, CODEBOOK, 1.0, False)),
    ({"align": "cmcm"}, lambda a, b: cmcm_loss(a, b, CODEBOOK, CODEBOOK)),
], ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "loss")
def test_align_is_the_loss_of_its_name(flags, expected):
    z_a, z_b = pair()
    assert_close(align_loss(z_a, z_b, CODEBOOK, Args(**flags)), expected(z_a, z_b))


@pytest.mark.parametrize("align", ALIGNS[1:])
def test_alignment_reads_clips_in_any_order_and_segments_of_each_modality_in_any_order(align):
    z_a, z_b = pair()
    args = Args(align=align)
    loss, clips = align_loss(z_a, z_b, CODEBOOK, args), [2, 0, 3, 1]
    assert loss > 0
    assert_close(align_loss(z_a[clips], z_b[clips], CODEBOOK, args), loss)
    assert_close(align_loss(z_a[:, [2, 0, 1]], z_b, CODEBOOK, args), loss)
    assert (align_loss(z_a[clips], z_b, CODEBOOK, args) - loss).abs() > 1e-3  # but pairs must stay pairs


@pytest.mark.parametrize("align", ALIGNS[1:])
def test_alignment_teaches_the_encoders_of_both_modalities_and_no_codebook(align):
    z_a, z_b = pair()
    codebook = CODEBOOK.clone().requires_grad_()
    loss = align_loss(z_a, z_b, codebook, Args(align=align))
    assert_no_gradient(loss, [codebook])
    for gradient in torch.autograd.grad(loss, [z_a, z_b]):
        assert gradient.isfinite().all() and gradient.any()


@pytest.mark.parametrize("align", ["smit", "mst", "codis", "turn", "infonce"])
def test_alignment_but_for_code_matching_does_not_know_which_modality_is_first(align):
    z_a, z_b = pair()
    assert_close(align_loss(z_b, z_a, CODEBOOK, Args(align=align)), align_loss(z_a, z_b, CODEBOOK, Args(align=align)))


@pytest.mark.parametrize("align", ["infonce", "codis"])
def test_cosines_know_no_lengths(align):
    z_a, z_b = pair()
    lengths = torch.tensor([0.1, 1, 7, 30], dtype=torch.float64)[:, None, None]
    scaled = CODEBOOK * torch.tensor([3, 1, 0.2, 1, 9, 1], dtype=torch.float64)[:, None]
    args = Args(align=align)
    assert_close(align_loss(lengths * z_a, z_b, scaled, args), align_loss(z_a, z_b, CODEBOOK, args))


@pytest.mark.parametrize("align", ALIGNS[1:])
@pytest.mark.parametrize("shape", [(4, 2, 5), (3, 3, 5), (4, 3, 2), (4, 5)])
def test_alignment_rejects_unequal_shapes(align, shape):
    with pytest.raises(ValueError, match="z_b has shape"):
        align_loss(torch.ones(4, 3, 5), torch.ones(shape), CODEBOOK, Args(align=align))


@pytest.mark.parametrize("align, contrast", [("smit", True), ("codis", True), ("codis", False), ("cmcm", True),
                                             ("infonce", True)])
def test_outputs_that_are_all_the_same_are_a_guess(align, contrast):
    """And a dot product or cosine, a plan or a distribution over codes that are one and the same code."""
    same, codebook = torch.ones(4, 3, 5, dtype=torch.float64), torch.ones(6, 5, dtype=torch.float64)
    args = Args(align=align, contrast=contrast, batch_size=4, codebook_size=6)
    guessed = comparators.by_guessing(args, 6)
    assert guessed["cpc"] == 6 * math.log(4)
    assert 3 * align_loss(same, same, codebook, args).item() == pytest.approx(guessed["align"])


# ------------------------------------------------------------------------------------------------------------------ mst
SHAPE = {"audio": (4, 6), "video": (4, 5, 5, 8), "text": (4, 3)}


def count(module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_shared_transformer_is_one_set_of_weights_but_for_the_norms():
    semantic = Model(SHAPE, Args()).semantic
    before = count(semantic)
    share_transformer(semantic)
    assert before - count(semantic) == 2 * 2 * 788_736  # two further modalities, two layers
    first, *others = [encoder.transformer.layers for encoder in semantic.values()]
    for layers in others:
        for own, shared in zip(layers, first, strict=True):
            for name in ("self_attn.in_proj_weight", "self_attn.in_proj_bias", "self_attn.out_proj.weight",
                         "linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias"):
                assert own.get_parameter(name) is shared.get_parameter(name)
            assert own.norm1.weight is not shared.norm1.weight and own.norm2.bias is not shared.norm2.bias
    assert first[0].linear1.weight is not first[1].linear1.weight  # the layers stay two
    assert semantic["audio"].proj.weight is not semantic["video"].proj.weight


def test_shared_transformer_is_taught_by_every_modality_and_saved_under_every_name():
    args = Args(code_dim=8, codebook_size=8)
    model = Model(SHAPE, args).eval()
    share_transformer(model.semantic)
    weight = model.semantic["audio"].transformer.layers[1].linear2.weight
    x = {m: torch.rand(2, *s) for m, s in SHAPE.items()}
    for m in SHAPE:
        (gradient,) = torch.autograd.grad(model.semantic[m](x[m]).square().sum(), weight)
        assert gradient.any(), m
    plain = Model(SHAPE, args).eval()  # as a probe loads it
    plain.load_state_dict(model.state_dict())
    for m in SHAPE:
        assert torch.equal(plain.semantic[m](x[m]), model.semantic[m](x[m]))


# ---------------------------------------------------------------------------------------------------------- whole runs
SCRIPT = "benchmarks.comparators"
SMALL = "--batch-size 12 --codebook-size 24 --code-dim 16 --epochs 1 --log-every 1".split()  # 4 steps of the toy


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> str:
    return write_toy(tmp_path_factory.mktemp("features") / "toy.h5")


@pytest.fixture
def cwd(tmp_path, monkeypatch):
    """A folder to run in. Probes train for one epoch, dropout is off, so that the losses of a step can be foretold."""
    Layer, original = nn.TransformerEncoderLayer, nn.TransformerEncoderLayer.__init__
    monkeypatch.setattr(Layer, "__init__", lambda self, *a, **k: original(self, *a, **k | {"dropout": 0.0}))
    monkeypatch.setattr(probes, "EPOCHS", 1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_toy(toy, cwd, *options, script=SCRIPT):
    done = captured_here(script, "--data", toy, *SMALL, *options, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return max(Path(cwd).glob("runs/*__*"), key=lambda path: path.name.split("__")[-1]), done


def networks(run: Path) -> dict:
    return torch.load(run / "checkpoint.pt", weights_only=True)["networks"]


def first_losses(toy, args: Args) -> dict:
    """Of the first step, put together from the functions: {name: value}"""
    data = Features([toy])
    shape = data.shapes(args.modalities)
    torch.manual_seed(1)
    model = Model(shape, args)
    seen = {m: (s[0], s[-1]) for m, s in shape.items()}
    specific = {m: comparators.SpecificEncoder(s) for m, s in seen.items()}
    decoder = {m: comparators.Decoder(s, 16) for m, s in seen.items()}
    if args.align == "mst":
        share_transformer(model.semantic)
    batch = next(Batches(data, shape, "train", 12, "cpu", 1).epoch(0))
    z = {m: model.semantic[m](x) for m, x in batch.items()}
    drawn = comparators.Run.generator(SimpleNamespace(device="cpu", args=args), "codebook")
    model.quantizer.init_from_batch(z, drawn)
    codes, index = model.quantizer(z)
    codebook = model.quantizer.codebook
    target = {m: comparators.cell_mean(x) for m, x in batch.items()}
    beside = {m: specific[m](x) for m, x in target.items()}
    pairs = [(z[m], z[n]) for i, m in enumerate(z) for n in list(z)[i + 1:]]
    return {
        "recon": sum(((decoder[m](codes[m], beside[m]) - target[m]) ** 2).mean() for m in z),
        "commitment": 0.25 * sum(((z[m] - codebook[index[m]]) ** 2).mean() for m in z),
        "align": sum(align_loss(a, b, codebook, args) for a, b in pairs),
        "cross": cross_reconstruction_loss(decoder, codes, beside, target) if args.align == "turn" else torch.zeros(()),
    }


@pytest.mark.slow
@pytest.mark.parametrize("align", ALIGNS)
def test_the_first_losses_of_a_run_of_three_modalities_are_those_of_the_functions(align, toy, cwd):
    run, _ = run_toy(toy, cwd, "--align", align)
    lines = [line for line in read_metrics(run) if "losses/total" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    args = Args(align=align, codebook_size=24, code_dim=16)
    expected = {name: value.item() for name, value in first_losses(toy, args).items()} | {"cpc": 0, "club": 0}
    assert {name: lines[0][f"losses/{name}"] for name in expected} == pytest.approx(expected, rel=1e-4)
    for line in lines:
        assert line["losses/total"] == pytest.approx(sum(line[f"losses/{name}"] for name in expected), rel=1e-5)
    assert np.isfinite(list(read_results(run)["metrics"].values())).all()


@pytest.mark.slow
@pytest.mark.parametrize("options", ["--align turn --dcid --modalities audio video", "--align mst --dcid",
                                     "--align codis"])
def test_a_run_interrupted_resumed_and_probed_again_is_the_same_to_the_bit(options, toy, cwd):
    straight, _ = run_toy(toy, cwd, *options.split())
    run, done = run_toy(toy, cwd, *options.split(), "--max-steps", 3)
    assert done.stdout.endswith(f"continue with: python -m {SCRIPT} --resume {run.relative_to(cwd)}\n")
    assert captured_here(SCRIPT, "--resume", run, cwd=cwd).returncode == 0
    left, right = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (straight, run))
    for owner in ("networks", "club"):
        assert all(torch.equal(value, right[owner][name]) for name, value in left[owner].items())
    assert all(torch.equal(left["rng"][name], right["rng"][name]) for name in left["rng"])
    assert read_results(run)["metrics"] == read_results(straight)["metrics"]
    method, args, _, _, epochs = probes.load(run)
    assert (method, f"--align {args.align}" in options, epochs) == (comparators, True, 1)
    assert run_here("probes.py", run, "--out", "again.json") == 0
    assert json.loads((cwd / "again.json").read_text()) == read_results(run)["metrics"]


BARE = "--mm-ema none --no-teacher "
ROWS_OF_UNI_CODE = [  # the same row by uni_code.py
    ("--align cmcm --dcid", BARE, ()), ("--dcid --specific map", BARE + "--no-cmcm --specific map", pytest.mark.slow),
    ("", BARE + "--no-cmcm --no-cpc --lambda-club 0", pytest.mark.slow),
    ("--align cmcm", BARE + "--no-cpc --lambda-club 0", pytest.mark.slow)]


@pytest.mark.parametrize("ours, theirs", [pytest.param(*row, marks=marks) for *row, marks in ROWS_OF_UNI_CODE])
def test_rows_that_uni_code_has_as_well_are_the_same_to_the_bit(ours, theirs, toy, cwd):
    left, _ = run_toy(toy, cwd, *ours.split(), "--max-steps", 3)
    right, _ = run_toy(toy, cwd, *theirs.split(), "--max-steps", 3, script="uni_code.py")
    lines = [[{tag: value for tag, value in line.items() if tag in ("losses/total", "losses/cpc", "losses/club")}
              for line in read_metrics(run)] for run in (left, right)]
    assert lines[0] == lines[1] and len(lines[0]) == 3
    left, right = networks(left), networks(right)
    assert left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


@pytest.mark.parametrize("options, message", [
    ("--align infonce --no-contrast", "--align infonce --no-contrast: nothing of it is left; give --align none"),
    ("--align smit --batch-size 1", "--batch-size 1: --align smit compares a clip with the others of the batch"),
    ("--dcid --cpc-steps 4", "--cpc-steps 4: needs more than 4 segments a clip, or no --dcid"),
    ("--temperature 0", "--temperature 0.0: must be above 0"),
    ("--modalities audio smell", "--modalities smell"),
    ("--resume absent", "--resume absent: no checkpoint.pt inside; give a run folder"),
])
def test_bad_arguments_of_comparators_end_in_one_line(options, message, toy, cwd):
    with pytest.raises(InputError) as caught:
        run_here(SCRIPT, "--data", toy, *SMALL, *options.split())
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not list(cwd.glob("runs/*__*"))


def test_a_checkpoint_of_another_script_is_not_resumed_nor_probed_as_published(toy, cwd):
    run, _ = run_toy(toy, cwd, "--max-steps", 1)
    with pytest.raises(InputError, match="not a checkpoint of uni_code.py .but of benchmarks.comparators.$"):
        run_here("uni_code.py", "--resume", run)
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    torch.save(state | {"method": "micu"}, run / "checkpoint.pt")
    with pytest.raises(InputError, match="not a checkpoint of benchmarks/comparators.py .but of micu.$"):
        run_here(SCRIPT, "--resume", run)
    torch.save(state, run / "checkpoint.pt")
    with pytest.raises(InputError, match="no probes of benchmarks.comparators are released"):
        run_here("official.protocol", run)


@pytest.mark.slow
@pytest.mark.parametrize("align, flag", [
    ("smit", "--similarity dot"), ("infonce", "--temperature 0.2"), ("codis", "--temperature 0.2"),
    ("mst", "--no-contrast"), ("codis", "--no-contrast"), ("turn", "--no-contrast"),
    ("mst", "--dcid"), ("none --dcid", "--lambda-club 0"), ("none --dcid", "--club-steps 2"),
    ("none --dcid", "--club-learning-rate 0.1"), ("none --dcid", "--cpc-steps 2"), ("cmcm", "--commitment-cost 1"),
    ("turn", "--specific map"), ("codis", "--precision bf16")])
def test_every_flag_of_comparators_changes_what_is_learned(align, flag, toy, cwd):
    before, _ = run_toy(toy, cwd, "--align", *align.split(), "--max-steps", 3)
    after, _ = run_toy(toy, cwd, "--align", *align.split(), *flag.split(), "--max-steps", 3)
    before, after = networks(before), networks(after)
    names = [name for name in before if name.startswith("model.semantic") and name.endswith("weight")]
    assert any(not torch.equal(before[name], after[name]) for name in names)


@pytest.mark.slow
def test_a_shared_transformer_without_contrast_and_contrast_without_it_make_mst(toy, cwd):
    def shared(*options):
        weights = networks(run_toy(toy, cwd, *options, "--max-steps", 3)[0])
        name = "model.semantic.{}.transformer.layers.0.linear1.weight"
        return torch.equal(weights[name.format("audio")], weights[name.format("text")]), read_metrics(
            max(cwd.glob("runs/*__*"), key=lambda path: path.name.split("__")[-1]))[-1]["losses/align"] > 0
    assert shared("--align", "mst") == (True, True)
    assert shared("--align", "mst", "--no-contrast") == (True, False)
    assert shared("--align", "infonce") == (False, True)

"""The losses and the EMA's input vectors of uni_code.py against slow loops written from the paper's equations.

Every reference takes one vector or pair at a time; values and gradients must agree in float64.
"""

import itertools
import math

import pytest
import torch
from test_losses import (DEVICES, assert_close, assert_finite_with_gradient, assert_same_loss, assert_uniform,
                         features, minus_log_share, rand)

from uni_code import (CLUB, CrossModalCPC, club_bound, cmcm_loss, cpc_loss, cross_attend, ema_vectors,
                      pool_specific, teacher_commitment_loss)

MODALITIES = ["audio", "video", "text", "flow"]
SOME = pytest.mark.parametrize("names", [MODALITIES[:2], MODALITIES[:3], MODALITIES], ids=len)


def assert_no_gradient(loss, inputs):
    for gradient in torch.autograd.grad(loss, inputs, allow_unused=True, retain_graph=True):
        assert gradient is None or not gradient.any()


def mean(values):
    values = list(values)
    return sum(values) / len(values)


# ------------------------------------------------------------------------------ teacher_commitment_loss, cmcm_loss


def codes(names, batch=3, segments=4, size=7):
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randint(size, (batch, segments), generator=generator) for name in names}


def slow_commitment(z, code_index, codebook, beta, teacher):
    loss = 0
    for m, n in itertools.product(z, z):
        weight = beta if m == n else beta / 2 if teacher else 0
        batch, segments, width = z[m].shape
        loss = loss + weight * mean((z[m][i, t, d] - codebook[code_index[n][i, t], d].item()) ** 2
                                    for i in range(batch) for t in range(segments) for d in range(width))
    return loss


@SOME
@pytest.mark.parametrize("arguments, teacher", [((), True), ((True,), True), ((False,), False)])
def test_teacher_commitment_equals_the_loop(names, arguments, teacher):
    z, codebook, index = features(names), rand(7, 5, seed=30, grad=True), codes(names)
    loss = teacher_commitment_loss(z, dict(reversed(index.items())), codebook, 0.3, *arguments)  # found by name
    assert_same_loss(loss, slow_commitment(z, index, codebook, 0.3, teacher), list(z.values()))
    assert_no_gradient(loss, [codebook])


def code_distribution(clip, codebook):  # (T, D), (K, D) -> (K,)
    weights = [torch.stack([torch.exp(-(row - code).square().sum().sqrt()) for code in codebook]) for row in clip]
    return mean(weight / weight.sum() for weight in weights)


def slow_cmcm(z_a, z_b, codebook_a, codebook_b):
    p_a = [code_distribution(clip, codebook_a.detach()) for clip in z_a]
    p_b = [code_distribution(clip, codebook_b.detach()) for clip in z_b]
    losses = []
    for i, p in enumerate(p_a):
        weights = [torch.exp((p * torch.log(q)).sum() + (q * torch.log(p)).sum()) for q in p_b]
        losses.append(-torch.log(weights[i] / sum(weights)))
    return mean(losses)


def cmcm_inputs(scale, dtype=torch.float64, shared=False):
    z = [(rand(4, 3, 5, seed=i, dtype=dtype) * scale).requires_grad_() for i in range(2)]
    codebooks = [(rand(6, 5, seed=10 + i, dtype=dtype) * scale).requires_grad_() for i in range(2)]
    return z, codebooks[:1] * 2 if shared else codebooks


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("scale", [0.3, 1, 3, 20])  # at 20 most shares are below any stabiliser one would add
def test_cmcm_equals_the_loop(scale, shared):
    z, codebooks = cmcm_inputs(scale, shared=shared)
    loss = cmcm_loss(*z, *codebooks)
    assert_same_loss(loss, slow_cmcm(*z, *codebooks), z)
    assert_no_gradient(loss, codebooks)


@pytest.mark.parametrize("scale", [1, 20])
def test_cmcm_is_accurate_in_single_precision(scale):
    z, codebooks = cmcm_inputs(scale, torch.float32)
    loss = cmcm_loss(*z, *codebooks)
    assert_close(loss.double(), slow_cmcm(*[tensor.double() for tensor in (*z, *codebooks)]), 1e-4)


@pytest.mark.parametrize("scale", [0, 1e-30, 1e-20, 1e-10, 1e-3, 1, 1e3, 1e8, 1e15])
@pytest.mark.parametrize("case", ["generic", "codewords", "one codeword", "equal clips"])
def test_cmcm_stays_finite_at_any_scale(case, scale):
    z, codebooks = cmcm_inputs(scale, torch.float32)
    z = {"generic": z, "codewords": [codebook[codes(range(2), 4, 3, 6)[i]] for i, codebook in enumerate(codebooks)],
         "one codeword": [codebook[1].expand(4, 3, 5) for codebook in codebooks],
         "equal clips": [tensor[:1].expand(4, 3, 5) for tensor in z]}[case]
    z = [tensor.detach().clone().requires_grad_() for tensor in z]
    loss = cmcm_loss(*z, *codebooks)
    assert_finite_with_gradient(loss, z)
    if scale <= 1e-10 or case in ("one codeword", "equal clips"):  # nothing to tell the clips apart
        assert_close(loss.item(), math.log(4), 1e-5)


# ----------------------------------------------------------------------------------------- cpc_loss, CrossModalCPC


@pytest.mark.parametrize("batch, width", [(1, 3), (2, 3), (6, 4)])
def test_cpc_loss_equals_the_loop(batch, width):
    z_target, prediction = rand(batch, width, grad=True), rand(batch, width, seed=1, grad=True)
    reference = mean(minus_log_share(prediction[i], z_target, i, 1, "dot") for i in range(batch))
    assert_same_loss(cpc_loss(z_target, prediction), reference, [z_target, prediction])
    large = [(1e4 * tensor.detach().float()).requires_grad_() for tensor in (z_target, prediction)]
    assert_finite_with_gradient(cpc_loss(*large), large)


def make_cpc(names, code_dim=4, steps=2):
    torch.manual_seed(0)  # weights
    return CrossModalCPC(list(names), code_dim, steps).double()


def slow_context(lstm, clip):  # (t, D) -> (D,)
    hidden = cell = torch.zeros_like(clip[0])
    for row in clip:
        gates = lstm.weight_ih_l0 @ row + lstm.bias_ih_l0 + lstm.weight_hh_l0 @ hidden + lstm.bias_hh_l0
        i, f, g, o = gates.chunk(4)
        cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
        hidden = torch.sigmoid(o) * torch.tanh(cell)
    return hidden


def slow_cpc(cpc, z, t, detach=False):
    """Eq. (6) summed over every ordered pair, and the share of predictions that score their own clip highest."""
    contexts = {m: [slow_context(cpc.lstm[m], clip[:t + 1]) for clip in z[m]] for m in z}
    loss, first = 0, {}
    for a, b in itertools.permutations(z, 2):
        losses, hits = [], []
        for k, linear in enumerate(cpc.predict[a], start=1):
            candidates = [clip[t + k] for clip in z[b]]
            for i, context in enumerate(contexts[a]):
                prediction = linear.weight @ (context.detach() if detach else context)
                losses.append(minus_log_share(prediction, candidates, i, 1, "dot"))
                scores = [(candidate @ prediction).item() for candidate in candidates]
                hits.append(scores.index(max(scores)) == i)
        loss, first[a, b] = loss + mean(losses), mean(hits)
    return loss, first


def drawn_moment(loss, references):
    """The one t whose reference loss this is."""
    distance, t = (torch.stack(references) - loss).detach().abs().min(0)
    assert distance < 1e-9
    return t.item()


@pytest.mark.parametrize("count, steps", [(2, 1), (2, 3), (3, 2), (4, 1)])
def test_cross_modal_cpc_equals_the_loop_and_never_looks_ahead(count, steps):
    cpc = make_cpc(MODALITIES[:count], steps=steps)
    z = features(MODALITIES[:count], batch=5, segments=6, width=4, scale=2)
    assert all((cpc.lstm[m].num_layers, cpc.lstm[m].batch_first) == (1, True) for m in z)
    assert len(list(cpc.parameters())) == count * (4 + steps)  # nothing shared, no bias beside W_k, nothing else
    references = [slow_cpc(cpc, z, t) for t in range(6 - steps)]
    generator, moments = torch.Generator().manual_seed(0), set()
    for _ in range(6):
        loss, first = cpc(z, generator)
        t = drawn_moment(loss, [reference[0] for reference in references])
        assert {pair: float(share) for pair, share in first.items()} == pytest.approx(references[t][1])
        if t not in moments:
            assert_same_loss(loss, references[t][0], [*z.values(), *cpc.parameters()])
            targets = torch.autograd.grad(slow_cpc(cpc, z, t, detach=True)[0], list(z.values()))
            for actual, target in zip(torch.autograd.grad(loss, list(z.values())), targets, strict=True):
                assert_close(actual[:, t + 1:], target[:, t + 1:])  # after t: as targets, not through a context
                assert actual[:, :t + steps + 1].any(-1).all() and not actual[:, t + steps + 1:].any()
        moments.add(t)
    assert len(moments) > 1


@pytest.mark.parametrize("segments, steps", [(6, 1), (6, 2), (3, 2)])
def test_cross_modal_cpc_draws_every_moment_alike_from_the_generator_alone(segments, steps):
    cpc, z = make_cpc(MODALITIES[:2], steps=steps), features(MODALITIES[:2], segments=segments, width=4)
    references, state = [slow_cpc(cpc, z, t)[0] for t in range(segments - steps)], torch.get_rng_state()
    runs = []
    for seed in (2, 2, 3):
        generator = torch.Generator().manual_seed(seed)
        runs.append([drawn_moment(cpc(z, generator)[0], references) for _ in range(40 * len(references))])
    assert torch.equal(state, torch.get_rng_state())
    assert runs[0] == runs[1]
    if len(references) > 1:
        assert runs[0] != runs[2]
        assert_uniform(torch.tensor(runs[0] + runs[2]).bincount(minlength=len(references)))
    drawn_moment(cpc(z)[0], references)


# ------------------------------------------------------------------------------------------------- club_bound, CLUB


def log_density(mu, logvar, y):  # (d,), (d,), (d,) -> ()
    return sum(-0.5 * (math.log(2 * math.pi) + v + (x - m) ** 2 / torch.exp(v)) for m, v, x in zip(mu, logvar, y))


def slow_club(mu, logvar, y):
    """Eq. (5): N clips, T segments, all N^2 negatives at the same t."""
    clips, segments = range(y.shape[0]), range(y.shape[1])
    positive = mean(log_density(mu[i, t], logvar[i, t], y[i, t]) for i in clips for t in segments)
    return positive - mean(log_density(mu[i, t], logvar[i, t], y[j, t]) for i in clips for j in clips for t in segments)


@pytest.mark.parametrize("shape", [(1, 3, 2), (2, 1, 1), (4, 3, 2), (3, 2, 5)])
def test_club_bound_equals_the_double_sum(shape):
    inputs = [rand(*shape, seed=seed, grad=True) for seed in range(3)]
    assert_same_loss(club_bound(*inputs), slow_club(*inputs), inputs)
    single = [tensor.detach().float() for tensor in inputs]
    assert_close(club_bound(*single).double(), slow_club(*inputs).detach(), 1e-5)


def make_club(code_dim=6, width=3):
    torch.manual_seed(0)  # weights
    return CLUB(code_dim, width).double()


def test_club_is_the_bound_under_networks_fitted_by_maximum_likelihood():
    club, z, y = make_club(), rand(4, 3, 6, grad=True), rand(4, 3, 3, seed=1, grad=True)
    mu, logvar = club.mu(z), club.logvar(z)
    assert mu.shape == logvar.shape == y.shape
    assert_same_loss(club(z, y), slow_club(mu, logvar, y), [z, y])
    assert all(gradient.any() for gradient in torch.autograd.grad(club(z, y), [z, y]))
    assert 0.99 < club.logvar(1e6 * z).abs().max() <= 1  # tanh is the last layer

    loss = club.fit_loss(z, y)
    reference = mean(-log_density(mu[i, t], logvar[i, t], y[i, t]) for i in range(4) for t in range(3))
    if abs(loss.item() - reference.item()) > 1e-9:  # the constant may be left out
        reference = reference - 3 / 2 * math.log(2 * math.pi)
    assert_same_loss(loss, reference, list(club.parameters()))
    assert_no_gradient(loss, [z, y])


def test_club_tells_dependent_from_independent_data():
    bounds = []
    for correlation in (0.95, 0.0):
        club = make_club(2, 2)
        optimizer = torch.optim.Adam(club.parameters(), 1e-2)
        for seed in range(150):  # fresh data every step, and after the last
            z = rand(64, 2, 2, seed=2 * seed)
            y = correlation * z + math.sqrt(1 - correlation**2) * rand(64, 2, 2, seed=2 * seed + 1)
            bounds.append(club(z, y).item())
            optimizer.zero_grad()
            club.fit_loss(z, y).backward()
            optimizer.step()
    assert bounds[149] > 1 and abs(bounds[299]) < 0.2, bounds


# ------------------------------------------------------------ pool_specific, cross_attend, ema_vectors, dtypes


def test_pool_specific_averages_the_cells_in_order():
    z, vectors, maps = rand(3, 4, 5), rand(3, 4, 2, seed=1), rand(12, 2, 3, 5, seed=2, grad=True)
    assert torch.equal(pool_specific(vectors, z), vectors)
    expected = torch.stack([torch.stack([mean(maps[4 * i + t, :, h, w] for h in range(3) for w in range(5))
                                         for t in range(4)]) for i in range(3)])
    assert_same_loss((pool_specific(maps, z) * vectors).sum(), (expected * vectors).sum(), [maps])
    assert_close(pool_specific(maps, z), expected)


def slow_attend(z, others):
    def attend(query, rows):
        weights = [torch.exp((query * row).sum() / math.sqrt(len(row))) for row in rows]
        return sum(weight * row for weight, row in zip(weights, rows)) / sum(weights)

    return torch.stack([torch.stack([mean(attend(row, other[i]) for other in others) for row in clip])
                        for i, clip in enumerate(z)])


@SOME
def test_ema_vectors_equal_the_loops(names):
    z = {name: tensor.detach() for name, tensor in features(names, scale=1.5).items()}
    copies = {m: z[m].clone() for m in z}
    attended, aligned = (ema_vectors(z, kind) for kind in ("attention", "time-aligned"))
    assert list(attended) == list(aligned) == list(z)
    for m in names:
        others = [z[n] for n in names if n != m]
        assert_close(cross_attend(z[m], others), slow_attend(z[m], others))
        assert_close(attended[m], (z[m] + slow_attend(z[m], others)) / 2)
        assert_close(aligned[m], (z[m] + mean(others)) / 2)
    assert all(ema_vectors(z, "none")[m] is z[m] for m in z)
    assert all(torch.equal(z[m], copies[m]) for m in names)  # left alone
    assert torch.isfinite(cross_attend(z["audio"].float() * 1e4, [z["video"].float() * 1e4])).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device", DEVICES)
def test_everything_keeps_dtype_and_device(device, dtype):
    names = MODALITIES[:3]
    z = {name: tensor.detach().to(device, dtype) for name, tensor in features(names).items()}
    a, v, t = z.values()
    codebook, index = rand(7, 5, seed=30).to(device, dtype), {m: code.to(device) for m, code in codes(names).items()}
    cpc, club = make_cpc(names, 5).to(device, dtype), make_club(5, 5).to(device, dtype)
    for loss in (teacher_commitment_loss(z, index, codebook, 0.25), cmcm_loss(a, v, codebook, codebook),
                 cpc_loss(a[:, 0], v[:, 0]), cpc(z)[0], club_bound(a, v, t), club(a, v), club.fit_loss(a, v)):
        assert (loss.dtype, loss.device, loss.shape) == (dtype, a.device, ())
    mixed = [v for kind in ("attention", "time-aligned") for v in ema_vectors(z, kind).values()]
    for same in (cross_attend(a, [v, t]), *mixed,
                 pool_specific(a.flatten(0, 1)[..., None, None].expand(12, 5, 2, 2), v)):
        assert (same.dtype, same.device, same.shape) == (dtype, a.device, a.shape)


FUNCTIONS = {
    "cmcm": (cmcm_loss, ["z_a", "z_b", "codebook_a", "codebook_b"], [(4, 3, 5), (4, 3, 5), (6, 5), (6, 5)]),
    "cpc": (cpc_loss, ["z_target", "prediction"], [(4, 5)] * 2),
    "club": (club_bound, ["mu", "logvar", "y"], [(2, 3, 4)] * 3),
    "attend": (lambda z, *others: cross_attend(z, list(others)), ["z", "others", "others"], [(2, 3, 5)] * 3)}
WRONG = [("cmcm", at, shape) for at in (0, 1) for shape in [(3, 5), (4, 3, 6), (1, 3, 5), (2, 4, 3, 5)]]
WRONG += [("cmcm", at, shape) for at in (2, 3) for shape in [(5,), (6, 4), (6, 1), (1, 5), (7, 5), (2, 6, 5)]]
WRONG += [("cpc", at, shape) for at in (0, 1) for shape in [(4, 6), (4, 1), (3, 5), (1, 5), (5,), (2, 4, 5)]]
WRONG += [("club", at, shape) for at in range(3) for shape in [(2, 3, 5), (1, 3, 4), (2, 1, 4), (2, 3, 1), (3, 4)]]
WRONG += [("attend", at, shape) for at in range(3) for shape in [(2, 3, 6), (2, 3, 1), (1, 3, 5), (3, 5)]]


@pytest.mark.parametrize("function, at, shape", [*WRONG, ("cpc", None, (5,)), ("cpc", None, (2, 4, 5)),
                                                 ("club", None, (3, 4)), ("attend", None, (3, 5))])
def test_wrong_shapes_are_rejected_by_name(function, at, shape):
    """One argument of another shape; `at` None: every argument of a rank that is not accepted."""
    call, names, right = FUNCTIONS[function]
    if at is not None and len(shape) != len(right[at]):
        names = [names[at]]  # no doubt which one; otherwise two disagree and either may be named
    with pytest.raises(ValueError, match=rf"\b({'|'.join(names)})\b"):
        call(*[torch.ones(shape if at in (i, None) else other) for i, other in enumerate(right)])

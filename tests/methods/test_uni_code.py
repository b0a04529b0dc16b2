"""The losses and the EMA's input vectors of uni_code.py against slow loops written from the paper's equations.

Every reference takes one vector or pair at a time; values and gradients must agree in float64. Cross-CPC and code
matching are in test_shared.py.
"""
import copy
import itertools
import math

import pytest
import torch
import torch.nn as nn
from reference import (
    DEVICES,
    SOME,
    THREE,
    assert_close,
    assert_no_gradient,
    assert_same_loss,
    assert_same_output,
    build,
    codes,
    detached,
    features,
    mean,
    rand,
    turned,
)

from uni_code import CLUB, club_bound, cross_attend, fit_club, mm_ema_input, pool_specific, teacher_commitment_loss


# --------------------------------------------------------------------------------------------- teacher_commitment_loss
def slow_commitment(z, code_index, codebook, beta, teacher):
    """Eq. 8: each z_m towards its own code, and at half the weight towards what the others chose at the segment"""
    loss = 0
    for m, n in itertools.product(z, z):
        if m != n and not teacher:
            continue
        weight = beta if m == n else beta / 2
        batch, segments, width = z[m].shape
        loss = loss + weight * mean((z[m][i, t, d] - codebook[code_index[n][i, t], d].item()) ** 2
                                    for i in range(batch) for t in range(segments) for d in range(width))
    return loss


@SOME
@pytest.mark.parametrize("arguments, teacher", [((), True), ((True,), True), ((False,), False)])
def test_teacher_commitment_equals_the_loop_and_teaches_the_encoders_only(names, arguments, teacher):
    z = features(names)
    codebook = rand(7, 5, seed=30, grad=True)
    index = codes(names)
    loss = teacher_commitment_loss(z, turned(index), codebook, 0.3, *arguments)  # modalities are found by name
    assert_same_loss(loss, slow_commitment(z, index, codebook, 0.3, teacher), list(z.values()))
    assert_no_gradient(loss, [codebook])


# --------------------------------------------------------------------------------------------------------- club_bound
def log_density(mu, logvar, y):
    """log N(y; mu, exp(logvar)), (d,) each -> ()"""
    return sum(-0.5 * (math.log(2 * math.pi) + v + (x - m) ** 2 / torch.exp(v)) for m, v, x in zip(mu, logvar, y))


def slow_club(mu, logvar, y):
    """Eq. 5: N clips, T segments, all N^2 negatives at the same t."""
    clips = range(y.shape[0])
    segments = range(y.shape[1])
    positive = mean(log_density(mu[i, t], logvar[i, t], y[i, t]) for i in clips for t in segments)
    negative = mean(log_density(mu[i, t], logvar[i, t], y[j, t]) for i in clips for j in clips for t in segments)
    return positive - negative


@pytest.mark.parametrize("shape", [(1, 3, 2), (2, 1, 1), (4, 3, 2), (3, 2, 5)])
def test_club_bound_equals_the_double_sum(shape):
    inputs = [rand(*shape, seed=seed, grad=True) for seed in range(3)]
    assert_same_loss(club_bound(*inputs), slow_club(*inputs), inputs)
    single = [tensor.detach().float() for tensor in inputs]
    assert_close(club_bound(*single).double(), slow_club(*inputs).detach(), 1e-5)


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 3, 4), (2, 1, 4), (2, 3, 1), (3, 4)])
def test_club_bound_rejects_unequal_shapes(shape, at):
    names = ["mu", "logvar", "y"]
    if len(shape) == 2:
        names = [names[at]]  # no doubt which one; otherwise two disagree and either may be named
    with pytest.raises(ValueError, match=rf"\b({'|'.join(names)})\b"):
        club_bound(*[torch.ones(shape if i == at else (2, 3, 4)) for i in range(3)])


def test_club_bound_rejects_arguments_without_segments():
    with pytest.raises(ValueError, match=r"\b(mu|logvar|y)\b"):
        club_bound(torch.ones(3, 4), torch.ones(3, 4), torch.ones(3, 4))


# --------------------------------------------------------------------------------------------------- CLUB and fit_club
def test_club_is_the_bound_under_its_networks():
    club = build(CLUB, 6, 3)
    z = rand(4, 3, 6, grad=True)
    y = rand(4, 3, 3, seed=1, grad=True)
    mu = club.mu(z)
    logvar = club.logvar(z)
    assert mu.shape == logvar.shape == y.shape
    assert_same_loss(club(z, y), slow_club(mu, logvar, y), [z, y])
    for gradient in torch.autograd.grad(club(z, y), [z, y]):
        assert gradient.any()
    assert 0.99 < club.logvar(1e6 * z).abs().max() <= 1  # tanh is the last layer


def test_club_is_fitted_by_maximum_likelihood_which_teaches_no_encoder():
    club = build(CLUB, 6, 3)
    z = rand(4, 3, 6, grad=True)
    y = rand(4, 3, 3, seed=1, grad=True)
    mu = club.mu(z)
    logvar = club.logvar(z)
    loss = club.fit_loss(z, y)
    reference = mean(-log_density(mu[i, t], logvar[i, t], y[i, t]) for i in range(4) for t in range(3))
    reference = reference - 3 / 2 * math.log(2 * math.pi)  # the constant is left out
    assert_same_loss(loss, reference, list(club.parameters()))
    assert_no_gradient(loss, [z, y])


def test_club_tells_dependent_from_independent_data():
    bounds = []
    for correlation in (0.95, 0.0):
        club = build(CLUB, 2, 2)
        optimizer = torch.optim.Adam(club.parameters(), 1e-2)
        for seed in range(100):  # fresh data every step, and after the last
            z = rand(64, 2, 2, seed=2 * seed)
            y = correlation * z + math.sqrt(1 - correlation**2) * rand(64, 2, 2, seed=2 * seed + 1)
            bounds.append(club(z, y).item())
            optimizer.zero_grad()
            club.fit_loss(z, y).backward()
            optimizer.step()
    assert bounds[99] > 1 and abs(bounds[199]) < 0.2, bounds


def make_clubs(names, code_dim=5, width=3):
    return build(lambda: nn.ModuleDict({m: CLUB(code_dim, width) for m in names}))


def slow_fit(club, z, y, steps):
    """Steps of Adam on the sum over the modalities of the mean negative log-likelihood."""
    club = copy.deepcopy(club)
    optimizer = torch.optim.Adam(club.parameters(), 1e-2)
    for _ in range(steps):
        loss = 0
        for m in z:
            mu = club[m].mu(z[m].detach())
            logvar = club[m].logvar(z[m].detach())
            loss = loss - mean(log_density(mu[i, t], logvar[i, t], y[m][i, t].detach())
                               for i in range(len(mu)) for t in range(mu.shape[1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return club


@SOME
@pytest.mark.parametrize("steps", [1, 5])
def test_fit_club_takes_as_many_steps_of_its_optimizer_as_asked(names, steps):
    club = make_clubs(names)
    z = features(names, segments=2)
    y = features(names, segments=2, width=3)
    for parameter in club.parameters():
        parameter.grad = torch.ones_like(parameter)  # left over from the last time
    expected = slow_fit(club, z, y, steps)
    fit_club(club, torch.optim.Adam(club.parameters(), 1e-2), z, y, steps)
    for actual, reference in zip(club.parameters(), expected.parameters(), strict=True):
        assert_close(actual, reference)


def test_fit_club_moves_and_teaches_only_club():
    """Neither the encoders that gave z and y nor z and y themselves receive a gradient."""
    club = make_clubs(THREE)
    before = copy.deepcopy(club)
    encoders = build(lambda: nn.ModuleDict({m: nn.Linear(4, 8) for m in THREE}))
    weights = copy.deepcopy(encoders)
    z = {}
    y = {}
    for m, tensor in features(THREE, width=4).items():
        z[m], y[m] = encoders[m](tensor).split((5, 3), -1)
        z[m].retain_grad()
        y[m].retain_grad()
    fit_club(club, torch.optim.Adam(club.parameters(), 1e-2), z, y, 3)
    for moved, old in zip(club.parameters(), before.parameters(), strict=True):
        assert (moved != old).any()
    for same, old in zip(encoders.parameters(), weights.parameters(), strict=True):
        assert torch.equal(same, old)
        assert same.grad is None
    for m in THREE:
        assert z[m].grad is None and y[m].grad is None


# ------------------------------------------------------------------------------------------------------- pool_specific
def test_pool_specific_averages_the_cells_of_a_map_in_the_order_of_clips_and_segments():
    maps = rand(12, 2, 3, 5, seed=2, grad=True)
    clips = []
    for i in range(3):
        clips.append(torch.stack([mean(maps[4 * i + t, :, h, w] for h in range(3) for w in range(5))
                                  for t in range(4)]))
    assert_same_output(pool_specific(maps, 3), torch.stack(clips), [maps])


def test_pool_specific_leaves_vectors_as_they_are():
    vectors = rand(3, 4, 2)
    assert torch.equal(pool_specific(vectors, 3), vectors)


# ------------------------------------------------------------------------------------------ cross_attend, mm_ema_input
def slow_attend(z, others):
    def attend(query, rows):
        weights = [torch.exp((query * row).sum() / math.sqrt(len(row))) for row in rows]
        return sum(weight * row for weight, row in zip(weights, rows)) / sum(weights)

    clips = []
    for i, clip in enumerate(z):
        clips.append(torch.stack([mean(attend(row, other[i]) for other in others) for row in clip]))
    return torch.stack(clips)


@SOME
def test_cross_attend_equals_the_loop_within_each_clip(names):
    z, *others = features(names, scale=1.5).values()
    assert_same_output(cross_attend(z, others), slow_attend(z, others), [z, *others])


def test_cross_attend_stays_finite_for_large_outputs():
    z, *others = features(THREE, dtype=torch.float32, scale=1e4).values()
    assert torch.isfinite(cross_attend(z, others)).all()


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("shape", [(2, 3, 6), (2, 3, 1), (1, 3, 5), (3, 5)])
def test_cross_attend_rejects_unequal_shapes(shape, at):
    z, *others = [torch.ones(shape if i == at else (2, 3, 5)) for i in range(3)]
    with pytest.raises(ValueError, match=r"\b(z|others)\b"):
        cross_attend(z, others)


def test_cross_attend_rejects_arguments_without_segments():
    with pytest.raises(ValueError, match=r"\b(z|others)\b"):
        cross_attend(torch.ones(3, 5), [torch.ones(3, 5)])


@SOME
def test_mm_ema_input_is_halfway_to_what_attends_or_is_time_aligned_or_z_alone(names):
    z = detached(features(names, scale=1.5))
    copies = detached(z)
    attended = mm_ema_input(z, "attention")
    aligned = mm_ema_input(z, "time-aligned")
    alone = mm_ema_input(z, "none")
    assert list(attended) == list(aligned) == list(alone) == list(names)
    for m in names:
        others = [z[n] for n in names if n != m]
        assert_close(attended[m], (z[m] + slow_attend(z[m], others)) / 2)
        assert_close(aligned[m], (z[m] + mean(others)) / 2)
        assert torch.equal(alone[m], copies[m])
        assert torch.equal(z[m], copies[m])  # left alone


# --------------------------------------------------------------------------------------------------------------- types
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device", DEVICES)
def test_commitment_and_club_losses_keep_dtype_and_device(device, dtype):
    z = {name: tensor.to(device, dtype) for name, tensor in detached(features(THREE)).items()}
    a, v, t = z.values()
    codebook = rand(7, 5, seed=30).to(device, dtype)
    index = {m: code.to(device) for m, code in codes(THREE).items()}
    club = build(CLUB, 5, 5).to(device, dtype)
    for loss in (teacher_commitment_loss(z, index, codebook, 0.25), club_bound(a, v, t), club(a, v),
                 club.fit_loss(a, v)):
        assert (loss.dtype, loss.device, loss.shape) == (dtype, a.device, ())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device", DEVICES)
def test_ema_inputs_that_attend_or_are_time_aligned_keep_dtype_device_and_shape(device, dtype):
    z = {name: tensor.to(device, dtype) for name, tensor in detached(features(THREE)).items()}
    a, v, t = z.values()
    maps = a.flatten(0, 1)[..., None, None].expand(12, 5, 2, 2)
    outputs = [cross_attend(a, [v, t]), pool_specific(maps, 3)]
    for kind in ("attention", "time-aligned", "none"):
        outputs += mm_ema_input(z, kind).values()
    for output in outputs:
        assert (output.dtype, output.device, output.shape) == (dtype, a.device, a.shape)

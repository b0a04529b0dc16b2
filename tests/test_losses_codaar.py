"""The alignment, the codebooks and the losses of codaar.py against slow loops written from the paper's equations.

Every reference takes one vector, codeword or index at a time, in float64. Where the code draws at random, a test finds
what was drawn in the batch and holds the rest to it.
"""

import itertools
from fractions import Fraction

import pytest
import torch
from test_losses import DEVICES, assert_close, assert_same_loss, features, rand, slow_ema_update
from test_losses_uni_code import SOME, assert_no_gradient, cmcm_inputs, codes, mean, slow_cmcm

from codaar import AlignedQuantizer, Args, Model, cascade, cmcm_loss, ema_update, row_commitment_loss, temporal_mix

THREE = ["audio", "video", "text"]
RESETS = list(itertools.product(["unshared", "unused"], ["batch", "paired", "live"]))

# ----------------------------------------------------------------------------------------------- temporal_mix (DTA)


@SOME
@pytest.mark.parametrize("lambda_self", [0.6, 0.75, 0.0, 1.0])
def test_temporal_mix_is_a_convex_combination_at_the_same_segment(names, lambda_self):
    z = {m: tensor.detach() for m, tensor in features(names).items()}
    copies = {m: z[m].clone() for m in z}
    for m in names:
        mixed = temporal_mix(z, m, lambda_self)
        for i, t in itertools.product(range(3), range(4)):
            others = [(1 - lambda_self) / (len(names) - 1) * z[n][i, t] for n in names if n != m]
            assert_close(mixed[i, t], lambda_self * z[m][i, t] + sum(others))
    assert all(torch.equal(z[m], copies[m]) for m in names)


def slow_dta_step(z, m, pi, ema_count, ema_sum, lambda_self, lambda_cross, rho, epsilon=1e-5):
    """Eq. 4 and 5 to the letter; pi (B, T) holds Eq. 3's selections."""
    codewords = []
    for k in range(len(ema_count)):
        u_self, u_cross, count = torch.zeros(z[m].shape[-1]).double(), torch.zeros(z[m].shape[-1]).double(), 0
        for i, t in itertools.product(range(len(pi)), range(len(pi[0]))):
            q = float(k == pi[i, t])
            u_self = u_self + q * z[m][i, t]
            u_cross = u_cross + q * sum(z[n][i, t] for n in z if n != m)
            count += q
        s_new = rho * ema_sum[k] + (1 - rho) * (lambda_self * u_self + lambda_cross * u_cross)
        codewords.append(s_new / (rho * ema_count[k] + (1 - rho) * count + epsilon))
    return torch.stack(codewords)


@pytest.mark.parametrize("names, lambdas", [(THREE[:2], (0.75, 0.25)), (THREE, (0.6, 0.2)),
                                            ([*THREE, "flow"], (0.4, 0.2))], ids=[2, 3, 4])
def test_one_step_of_dta_equals_eq_4_and_5(names, lambdas):
    z, index = {m: tensor.detach() for m, tensor in features(names).items()}, codes(names)
    ema_count, ema_sum = rand(7, seed=20).abs() + 0.5, rand(7, 5, seed=21)
    for m in names:
        vectors = temporal_mix(z, m, lambdas[0]).flatten(0, 1)
        actual = ema_update(ema_count, ema_sum, index[m].flatten(), vectors, 0.9)[2]
        # Laplace smoothing in place of C + epsilon
        assert_close(actual, slow_dta_step(z, m, index[m], ema_count, ema_sum, *lambdas, 0.9), 1e-4)


# ---------------------------------------------------------------------------------------------------- cascade (CSA)


def some_codebooks(names, size=6, width=5):
    return {m: rand(size, width, seed=20 + i) for i, m in enumerate(names)}


def cascade_weights(names, order):
    """weights[m][n]: what the codeword of m has of the codeword that n had before, as exact fractions."""
    weights = {m: {n: Fraction(int(m == n)) for n in names} for m in names}
    for m in order:
        weights[m] = {n: sum(weights[p][n] for p in names) / len(names) for n in names}
    return weights


@pytest.mark.parametrize("order", list(itertools.permutations(THREE)), ids="-".join)
def test_cascade_equals_eq_7(order):
    codebooks = some_codebooks(THREE)
    t, a, v = (codebooks[m] for m in order)  # the paper's order is text, audio, video
    t1 = (v + a + t) / 3
    a1 = (a + v + t1) / 3
    v1 = (v + a1 + t1) / 3
    actual = cascade(codebooks, order)
    for m, expected in zip(order, (t1, a1, v1), strict=True):
        assert_close(actual[m], expected)


@SOME
def test_cascade_stays_in_the_convex_hull_for_every_order(names):
    codebooks = some_codebooks(names)
    for m in names:
        codebooks[m][2] = codebooks[names[0]][2]  # agree already
    copies, units = {m: codebooks[m].clone() for m in names}, torch.eye(len(names), dtype=torch.float64)
    for order in itertools.permutations(names):
        actual, weights = cascade(codebooks, order), cascade_weights(names, order)
        assert actual is not codebooks and list(actual) == list(names)
        for m in names:
            assert min(weights[m].values()) >= 0 and sum(weights[m].values()) == 1
            for k in range(6):
                assert_close(actual[m][k], sum(float(weights[m][n]) * copies[n][k] for n in names))
            assert_close(actual[m][2], copies[m][2])
        shares = cascade({m: units[i:i + 1] for i, m in enumerate(names)}, list(order))
        kept = [shares[m][0, names.index(m)].item() for m in order]
        assert all(a < b - 1e-9 for a, b in itertools.pairwise(kept))  # the later, the more of itself
        for m in names:
            actual[m].fill_(7.0)  # would show in an input that shares its memory
        assert all(torch.equal(codebooks[m], copies[m]) for m in names)


@pytest.mark.parametrize("order", [(), ("audio", "video"), ("audio", "video", "video"), ("audio", "video", "flow"),
                                   ("audio", "video", "text", "flow"), ("text", "audio", "video", "text")])
def test_cascade_rejects_an_order_that_is_not_one(order):
    with pytest.raises(ValueError, match=r"\border\b"):
        cascade(some_codebooks(THREE), order)


# ---------------------------------------------------------------------------------- row_commitment_loss, cmcm_loss


def slow_commitment(z, code_index, codebooks, beta):
    """Eq. 8, each term as a mean over (B, T, D): every codebook is read at k_m, the index of the modality itself."""
    loss = 0
    for m, n in itertools.product(z, z):
        batch, segments, width = z[m].shape
        loss = loss + (beta if m == n else beta / 2) * mean(
            (z[m][i, t, d] - codebooks[n][code_index[m][i, t], d].item()) ** 2
            for i in range(batch) for t in range(segments) for d in range(width))
    return loss


@SOME
def test_row_commitment_equals_the_loop(names):
    z, index = features(names), codes(names)
    codebooks = {m: tensor.requires_grad_() for m, tensor in some_codebooks(names, size=7).items()}
    loss = row_commitment_loss(z, dict(reversed(index.items())), dict(reversed(codebooks.items())), 0.3)  # by name
    assert_same_loss(loss, slow_commitment(z, index, codebooks, 0.3), list(z.values()))
    assert_no_gradient(loss, list(codebooks.values()))


def test_cmcm_equals_the_loop_with_two_codebooks():
    z, codebooks = cmcm_inputs(1)
    loss = cmcm_loss(*z, *codebooks)
    assert_same_loss(loss, slow_cmcm(*z, *codebooks), z)
    assert_no_gradient(loss, codebooks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device", DEVICES)
def test_everything_keeps_dtype_and_device(device, dtype):
    z = {m: tensor.detach().to(device, dtype) for m, tensor in features(THREE).items()}
    codebooks = {m: tensor.to(device, dtype) for m, tensor in some_codebooks(THREE, size=7).items()}
    index = {m: tensor.to(device) for m, tensor in codes(THREE).items()}
    for output, shape in [(temporal_mix(z, "video", 0.6), (3, 4, 5)), (cascade(codebooks, THREE)["text"], (7, 5)),
                          (row_commitment_loss(z, index, codebooks, 0.25), ()),
                          (cmcm_loss(z["audio"], z["text"], codebooks["audio"], codebooks["text"]), ())]:
        assert (output.dtype, output.device, output.shape) == (dtype, z["audio"].device, shape)


@pytest.mark.parametrize("at", THREE)
@pytest.mark.parametrize("call, name, right, wrong", [
    (lambda z: temporal_mix(z, "video", 0.6), "z", (3, 4, 5), [(3, 4, 6), (3, 4, 1), (3, 1, 5), (1, 4, 5), (4, 5)]),
    (lambda codebooks: cascade(codebooks, THREE), "codebooks", (6, 5), [(6, 4), (6, 1), (1, 5), (7, 5), (5,)])],
    ids=["temporal_mix", "cascade"])
def test_unequal_shapes_are_rejected_by_name(call, name, right, wrong, at):
    for shape in wrong:
        with pytest.raises(ValueError, match=rf"\b{name}\b"):
            call({m: torch.ones(shape if m == at else right) for m in THREE})


# ------------------------------------------------------------------------------- AlignedQuantizer: forward, encode


def make_quantizer(names, **changes):
    """In float64, its codebooks apart, its counts unequal."""
    settings = {"codebook_size": 9, "code_dim": 5, "cascade": tuple(reversed(names)), "lambda_self": 0.6,
                "reset_after": 0, "ema_decay": 0.9} | changes
    quantizer = AlignedQuantizer(list(names), Args(**settings)).double()
    quantizer.codebooks.copy_(rand(*quantizer.codebooks.shape, seed=40))
    quantizer.ema_count.copy_(rand(*quantizer.ema_count.shape, seed=41).abs() + 0.5)
    quantizer.ema_sum.copy_(quantizer.codebooks * quantizer.ema_count[..., None])
    return quantizer


def snapshot(quantizer):
    return {name: buffer.clone() for name, buffer in quantizer.named_buffers()}


def assert_unchanged(quantizer, before):
    assert all(torch.equal(buffer, before[name]) for name, buffer in quantizer.named_buffers())


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def slow_nearest(vector, codebook):
    distances = [((vector - codeword) ** 2).sum().item() for codeword in codebook]
    return distances.index(min(distances))


def test_codebook_lays_the_codewords_of_an_index_side_by_side():
    quantizer = make_quantizer(THREE)
    audio, video, text = quantizer.codebooks
    assert quantizer.width == 15
    assert_close(quantizer.codebook, torch.stack([torch.cat([audio[k], video[k], text[k]]) for k in range(9)]))


@SOME
def test_forward_quantizes_each_at_its_own_index_with_straight_through_gradients(names):
    quantizer, z = make_quantizer(names), features(names)
    before, weight = snapshot(quantizer), rand(3, 4, 5 * len(names), seed=50)
    joint, index = quantizer(z)
    assert list(joint) == list(index) == list(names)
    for m, codebook in zip(names, quantizer.codebooks, strict=True):
        assert index[m].tolist() == [[slow_nearest(vector, codebook) for vector in clip] for clip in z[m]]
    for i, t, m in itertools.product(range(3), range(4), names):
        row = torch.cat([quantizer.codebooks[j, index[n][i, t]] for j, n in enumerate(names)])
        assert_close(joint[m][i, t].detach(), row)
    for m in names:
        assert torch.equal(joint[m], joint[names[0]])
        gradients = torch.autograd.grad((joint[m] * weight).sum(), list(z.values()), retain_graph=True)
        for gradient, part in zip(gradients, weight.split(5, -1), strict=True):
            assert_close(gradient, part)
    assert_unchanged(quantizer, before)


@SOME
def test_quantizer_finds_modalities_by_name(names):
    """The order of a dictionary changes nothing."""
    outcomes = []
    for turn in (dict, lambda z: dict(reversed(z.items()))):
        quantizer = make_quantizer(names, reset_after=2, reset_source="batch")
        z, drawn = turn({m: tensor.detach() for m, tensor in features(names).items()}), generator()
        quantizer.start(z, drawn)
        joint, index = quantizer(z)
        for _ in range(3):
            quantizer.update(z, turn(codes(names, size=5)), z, drawn)
        outcomes.append([*joint[names[0]], *(index[m] for m in names), *snapshot(quantizer).values()])
    for actual, expected in zip(*outcomes, strict=True):
        assert_close(actual, expected)


@SOME
def test_encode_reads_every_codebook_at_the_modalitys_own_index(names):
    own, row = (make_quantizer(names, probe_code=kind) for kind in ("own", "row"))
    for m, codebook in zip(names, own.codebooks, strict=True):
        z = features(names)[m].detach()
        (codeword, index), (codewords, same_index) = own.encode(z, m), row.encode(z, m)
        assert index.shape == (3, 4) and torch.equal(index, same_index)
        for i, t in itertools.product(range(3), range(4)):
            k = slow_nearest(z[i, t], codebook)
            assert index[i, t] == k
            assert_close(codeword[i, t], codebook[k])
            assert_close(codewords[i, t], torch.cat([book[k] for book in own.codebooks]))


# ------------------------------------------------------------------------- AlignedQuantizer: start, update, reset


def places(codewords, z, source):
    """The (clip, segment) at which the modalities say the codewords (M, D) of an index, or their mean says it."""
    found = []
    for i, t in itertools.product(*map(range, next(iter(z.values())).shape[:2])):
        said = [tensor[i, t].detach() for tensor in z.values()]
        said = [mean(said)] * len(said) if source == "paired" else said
        if all((codeword - vector).abs().max() < 1e-9 for codeword, vector in zip(codewords, said, strict=True)):
            found.append((i, t))
    return found


def origin(codewords, z, source, codebooks, live):
    """The one place, or live index, that the codewords (M, D) of a reset index come from; codebooks (M, K, D)."""
    if source != "live":
        (place,) = places(codewords, z, source)
        return place
    donor = min(live, key=lambda j: (codewords - codebooks[:, j]).abs().max())  # a copied index has copies beside it
    noise = (codewords - codebooks[:, donor]).abs().amax(1)
    assert noise.max() < 0.1 and noise.min() > 0  # or the two would stay one
    return donor


def dead_and_live(idle, reset_after, rule, source):
    idle = idle.T.tolist()
    is_dead = [(any if rule == "unshared" else all)(steps >= reset_after for steps in row) for row in idle]
    dead, live = ([k for k, gone in enumerate(is_dead) if gone == wanted] for wanted in (True, False))
    return ([] if source == "live" and not live else dead), live  # nobody to copy: nothing is reset


@SOME
@pytest.mark.parametrize("source", ["batch", "paired", "live"])
@pytest.mark.parametrize("size", [9, 40])  # fewer codes than segments, and more
def test_start_takes_an_index_from_one_segment_of_all_modalities(names, source, size):
    z, runs = features(names), []
    for seed in (1, 1, 2):
        settings = Args(codebook_size=size, code_dim=5, cascade=names, lambda_self=0.6, reset_source=source)
        quantizer = AlignedQuantizer(names, settings).double()
        state = torch.get_rng_state()
        quantizer.start(z, generator(seed))
        assert torch.equal(torch.get_rng_state(), state)
        drawn = [places(quantizer.codebooks[:, k], z, "batch") for k in range(size)]
        assert all(len(found) == 1 for found in drawn) and len({found[0] for found in drawn}) > 3
        assert torch.equal(quantizer.ema_sum, quantizer.codebooks) and quantizer.ema_count.eq(1).all()
        assert not any(buffer.requires_grad for buffer in quantizer.buffers())
        runs.append(drawn)
    assert runs[0] == runs[1] != runs[2]


@SOME
@pytest.mark.parametrize("csa", [True, False])
@pytest.mark.parametrize("rule, source, reset_after", [("unshared", "paired", 0), *[(*kind, 2) for kind in RESETS]])
def test_update_equals_the_loops_step_after_step(names, csa, rule, source, reset_after):
    """EMA of `vectors` at the own index, CSA beside it, then the counters, then resets from `z`."""
    quantizer = make_quantizer(names, csa=csa, reset_rule=rule, reset_source=source, reset_after=reset_after)
    expected, order, drawn = snapshot(quantizer), tuple(reversed(names)), generator()
    for step in range(6):
        z, vectors = ({m: rand(2, 3, 5, seed=s + 10 * step + i) for i, m in enumerate(names)} for s in (100, 200))
        index = {m: torch.randint(4, (2, 3), generator=generator(300 + 10 * step + i)) + step
                 for i, m in enumerate(names)}  # some indices die out, others come into use
        quantizer.update(z, index, vectors, drawn)

        codebooks = {}
        for i, m in enumerate(names):
            expected["ema_count"][i], expected["ema_sum"][i], codebooks[m] = slow_ema_update(
                expected["ema_count"][i], expected["ema_sum"][i], index[m].flatten(), vectors[m].flatten(0, 1), 0.9)
            for k in range(9):
                chosen = index[m].flatten().tolist().count(k)
                expected["usage"][i, k] += chosen
                expected["idle"][i, k] = 0 if chosen else expected["idle"][i, k] + 1
        weights = cascade_weights(names, order if csa else ())
        expected["codebooks"] = torch.stack([sum(float(weights[m][n]) * codebooks[n] for n in names) for m in names])
        dead, live = dead_and_live(expected["idle"], reset_after, rule, source) if reset_after else ([], [])
        for k in dead:
            codewords = quantizer.codebooks[:, k]
            origin(codewords, z, source, expected["codebooks"], live)
            expected["codebooks"][:, k] = expected["ema_sum"][:, k] = codewords
            expected["ema_count"][:, k], expected["idle"][:, k] = 1, 0
        expected["resets"] += len(dead)
        for name, buffer in quantizer.named_buffers():
            assert_close(buffer, expected[name])
    assert (expected["resets"] > 0) == (reset_after > 0)


@SOME
@pytest.mark.parametrize("rule, source", RESETS)
def test_reset_gives_a_dead_index_one_new_origin_in_every_codebook(names, rule, source):
    z, runs = features(names), []
    for seed in (1, 1, 2):
        quantizer = make_quantizer(names, codebook_size=30, reset_after=3, reset_rule=rule, reset_source=source)
        quantizer.idle[0, 1], quantizer.idle[-1, 2], quantizer.idle[:, 3] = 3, 8, 3
        quantizer.idle[:, 4], quantizer.idle[1:, 5], quantizer.idle[:, 15:] = 2, 3, 5
        dead, live = dead_and_live(quantizer.idle, 3, rule, source)
        assert len(dead) == (19 if rule == "unshared" else 16)
        before, state = snapshot(quantizer), torch.get_rng_state()
        quantizer.reset(z, generator(seed))
        assert torch.equal(torch.get_rng_state(), state)
        assert quantizer.resets == len(dead)
        for name in ("codebooks", "ema_sum", "ema_count", "idle"):
            assert torch.equal(getattr(quantizer, name)[:, live], before[name][:, live]), name
        assert torch.equal(quantizer.ema_sum[:, dead], quantizer.codebooks[:, dead])
        assert quantizer.ema_count[:, dead].eq(1).all() and not quantizer.idle[:, dead].any()
        assert not any(buffer.requires_grad for buffer in quantizer.buffers())
        runs.append([origin(quantizer.codebooks[:, k], z, source, before["codebooks"], live) for k in dead])
        assert len(set(runs[-1])) > 3  # each index draws for itself
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("rule", ["unshared", "unused"])
def test_reset_waits_when_no_live_index_is_left_to_copy(rule):
    quantizer = make_quantizer(THREE, reset_after=3, reset_rule=rule, reset_source="live")
    quantizer.idle.fill_(3)
    before = snapshot(quantizer)
    quantizer.reset(features(THREE), generator())
    assert_unchanged(quantizer, before)


@SOME
@pytest.mark.parametrize("csa", [True, False])
@pytest.mark.parametrize("source", ["batch", "paired", "live"])
def test_a_reset_codeword_survives_the_next_step_without_use(names, csa, source):
    z = features(names)
    quantizer = make_quantizer(names, csa=csa, reset_after=3, reset_source=source)
    quantizer.idle[:, 6] = 3
    quantizer.reset(z, generator())
    fresh = quantizer.codebooks[:, 6].clone()
    quantizer.update(z, codes(names, size=6), {m: 100 + z[m] for m in names}, generator())
    weights = cascade_weights(names, tuple(reversed(names)) if csa else ())
    for i, m in enumerate(names):
        expected = sum(float(weights[m][n]) * codeword for n, codeword in zip(names, fresh, strict=True))
        assert_close(quantizer.codebooks[i, 6], expected, 1e-4)  # smoothing of the count


def test_half_precision_outputs_leave_the_buffers_in_single_precision():
    quantizer = make_quantizer(THREE, reset_after=1).float()
    z = {m: tensor.detach().bfloat16() for m, tensor in features(THREE).items()}
    dtypes = [buffer.dtype for buffer in quantizer.buffers()]
    quantizer.start(z, generator())
    for _ in range(3):
        quantizer.update(z, quantizer(z)[1], {m: temporal_mix(z, m, 0.6) for m in z}, generator())
    assert quantizer.resets > 0 and all(torch.isfinite(buffer).all() for buffer in quantizer.buffers())
    assert [buffer.dtype for buffer in quantizer.buffers()] == dtypes


# ------------------------------------------------------------------------------------------------ gradients (Eq. 9)


@SOME
def test_reconstructing_one_modality_teaches_all_semantic_encoders_and_its_own_specific_one(names):
    shape = {"audio": (4, 6), "video": (4, 5, 5, 8), "text": (4, 7), "flow": (4, 6, 5, 3)}
    shape = {m: shape[m] for m in names}
    with torch.random.fork_rng():
        torch.manual_seed(0)  # weights
        model = Model(shape, Args(code_dim=8, codebook_size=16, recon_width=1, cascade=tuple(reversed(names)),
                                  lambda_self=0.6, reset_after=5)).eval()
    x = {m: rand(3, *shape[m], seed=i, dtype=torch.float32) for i, m in enumerate(names)}
    z = {m: model.semantic[m](x[m]) for m in names}
    model.quantizer.start(z, generator())
    quantized, _ = model.quantizer(z)
    for m in names:
        decoded = model.decoder[m](quantized[m], model.specific[m](x[m]))
        assert decoded.shape == x[m].shape
        loss = (decoded - x[m]).square().mean()

        def is_taught(module):
            gradients = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True, retain_graph=True)
            return any(gradient is not None and gradient.any() for gradient in gradients)

        assert all(is_taught(model.semantic[n]) for n in names)
        for networks in (model.specific, model.decoder):
            assert [n for n in names if is_taught(networks[n])] == [m]

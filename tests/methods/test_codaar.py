"""The alignment, the codebooks and the losses of codaar.py against slow loops written from the paper's equations.

Every reference takes one vector, row or index at a time, in float64. Where the code draws at random, a test finds what
was drawn in the batch and holds the rest to it. Cross-CPC and code matching are in test_shared.py.
"""
import itertools
import math
from fractions import Fraction

import pytest
import torch
from reference import (
    DEVICES,
    MODALITIES,
    RESETS,
    SOME,
    THREE,
    age,
    assert_close,
    assert_draws_from_generator_alone,
    assert_no_gradient,
    assert_same_loss,
    assert_unchanged,
    build,
    codes,
    count_uses,
    dead_and_live,
    detached,
    features,
    generator,
    mean,
    places,
    rand,
    slow_ema_update,
    slow_nearest,
    small_args,
    snapshot,
    turned,
)

import codaar
from codaar import (
    AlignedQuantizer,
    cascade,
    cascade_order,
    ema_update,
    row_commitment_loss,
    temporal_mix,
)
from run import InputError


# ------------------------------------------------------------------------------------------------- temporal_mix (DTA)
@SOME
@pytest.mark.parametrize("lambda_self", [0.6, 0.75, 0.0, 1.0])
def test_temporal_mix_is_a_convex_combination_at_the_same_segment(names, lambda_self):
    z = detached(features(names))
    copies = detached(z)
    for m in names:
        mixed = temporal_mix(z, m, lambda_self)
        for i, t in itertools.product(range(3), range(4)):
            others = [(1 - lambda_self) / (len(names) - 1) * z[n][i, t] for n in names if n != m]
            assert_close(mixed[i, t], lambda_self * z[m][i, t] + sum(others))
    for m in names:
        assert torch.equal(z[m], copies[m])  # left alone


def slow_dta_step(z, m, pi, ema_count, ema_sum, lambda_self, lambda_cross, rho, epsilon=1e-5):
    """Eq. 4 and 5 to the letter; pi (B, T) holds Eq. 3's selections."""
    rows = []
    for k in range(len(ema_count)):
        u_self = torch.zeros(z[m].shape[-1]).double()
        u_cross = torch.zeros(z[m].shape[-1]).double()
        count = 0
        for i, t in itertools.product(range(len(pi)), range(len(pi[0]))):
            q = float(k == pi[i, t])
            u_self = u_self + q * z[m][i, t]
            u_cross = u_cross + q * sum(z[n][i, t] for n in z if n != m)
            count += q
        s_new = rho * ema_sum[k] + (1 - rho) * (lambda_self * u_self + lambda_cross * u_cross)
        rows.append(s_new / (rho * ema_count[k] + (1 - rho) * count + epsilon))
    return torch.stack(rows)


@pytest.mark.parametrize("names, lambdas", [(THREE[:2], (0.75, 0.25)), (THREE, (0.6, 0.2)),
                                            (MODALITIES, (0.4, 0.2))], ids=["two", "three", "four"])
def test_temporal_mix_and_one_ema_step_equal_eq_4_and_5(names, lambdas):
    z = detached(features(names))
    index = codes(names)
    ema_count = rand(7, seed=20).abs() + 0.5
    ema_sum = rand(7, 5, seed=21)
    for m in names:
        vectors = temporal_mix(z, m, lambdas[0]).flatten(0, 1)
        _, _, actual = ema_update(ema_count, ema_sum, index[m].flatten(), vectors, 0.9)
        # Laplace smoothing in place of C + epsilon
        assert_close(actual, slow_dta_step(z, m, index[m], ema_count, ema_sum, *lambdas, 0.9), 1e-4)


@pytest.mark.parametrize("at", THREE)
@pytest.mark.parametrize("shape", [(3, 4, 6), (3, 4, 1), (3, 1, 5), (1, 4, 5), (4, 5)])
def test_temporal_mix_rejects_unequal_shapes(shape, at):
    with pytest.raises(ValueError, match=r"\bz\b"):
        temporal_mix({m: torch.ones(shape if m == at else (3, 4, 5)) for m in THREE}, "video", 0.6)


# ------------------------------------------------------------------------------------------------------ cascade (CSA)
def some_codebooks(names, size=6, width=5):
    return {m: rand(size, width, seed=20 + i) for i, m in enumerate(names)}


def cascade_weights(names, order):
    """weights[m][n]: what the row of m has of the row that n had before, as exact fractions."""
    weights = {m: {n: Fraction(int(m == n)) for n in names} for m in names}
    for m in order:
        weights[m] = {n: sum(weights[p][n] for p in names) / len(names) for n in names}
    return weights


def mixed_rows(weights, rows: dict) -> dict:
    """{m: sum over n of weights[m][n] rows[n]}"""
    return {m: sum(float(weights[m][n]) * rows[n] for n in rows) for m in rows}


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
    copies = detached(codebooks)
    for order in itertools.permutations(names):
        actual = cascade(codebooks, order)
        weights = cascade_weights(names, order)
        expected = mixed_rows(weights, copies)
        assert actual is not codebooks and list(actual) == list(names)
        for m in names:
            assert min(weights[m].values()) >= 0 and sum(weights[m].values()) == 1
            assert_close(actual[m], expected[m])
            assert_close(actual[m][2], copies[m][2])
            actual[m].fill_(7.0)  # would show in an input that shares its memory
        for m in names:
            assert torch.equal(codebooks[m], copies[m])


@SOME
def test_cascade_leaves_a_later_codebook_more_of_itself(names):
    units = torch.eye(len(names), dtype=torch.float64)
    for order in itertools.permutations(names):
        shares = cascade({m: units[i:i + 1] for i, m in enumerate(names)}, list(order))
        kept = [shares[m][0, names.index(m)].item() for m in order]
        assert all(a < b - 1e-9 for a, b in itertools.pairwise(kept))


@pytest.mark.parametrize("order", [(), ("audio", "video"), ("audio", "video", "video"), ("audio", "video", "flow"),
                                   ("audio", "video", "text", "flow"), ("text", "audio", "video", "text")])
def test_cascade_rejects_an_order_that_is_not_one(order):
    with pytest.raises(ValueError, match=r"\border\b"):
        cascade(some_codebooks(THREE), order)


@pytest.mark.parametrize("at", THREE)
@pytest.mark.parametrize("shape", [(6, 4), (6, 1), (1, 5), (7, 5), (5,)])
def test_cascade_rejects_unequal_shapes(shape, at):
    with pytest.raises(ValueError, match=r"\bcodebooks\b"):
        cascade({m: torch.ones(shape if m == at else (6, 5)) for m in THREE}, THREE)


@pytest.mark.parametrize("modalities, order", [
    (["audio", "video"], ("audio", "video")), (["audio", "text"], ("text", "audio")),
    (["video", "text"], ("text", "video")), (THREE, ("text", "audio", "video")),
    (MODALITIES, ("text", "audio", "video", "flow")), (["audio", "touch", "flow"], ("audio", "touch", "flow")),
    (["touch", "video", "text"], ("text", "video", "touch"))])
def test_cascade_order_is_text_audio_video_and_then_others_as_in_the_data(modalities, order):
    assert tuple(cascade_order((), modalities)) == order


def test_cascade_order_is_the_given_one():
    for order in itertools.permutations(THREE):
        assert tuple(cascade_order(order, THREE)) == order


@pytest.mark.parametrize("given", [("audio", "video"), ("audio", "video", "flow"), ("audio", "audio", "video"),
                                   ("audio", "video", "text", "text")])
def test_cascade_order_refuses_one_that_does_not_name_each_modality_once(given):
    with pytest.raises(InputError, match="--cascade.*audio video text") as error:
        cascade_order(given, THREE)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------ row_commitment_loss
def slow_commitment(z, code_index, codebooks, beta):
    """Eq. 8, each term as a mean over (B, T, D): every codebook is read at k_m, the index of the modality itself."""
    loss = 0
    for m, n in itertools.product(z, z):
        weight = beta if m == n else beta / 2
        batch, segments, width = z[m].shape
        loss = loss + weight * mean((z[m][i, t, d] - codebooks[n][code_index[m][i, t], d].item()) ** 2
                                    for i in range(batch) for t in range(segments) for d in range(width))
    return loss


@SOME
def test_row_commitment_equals_the_loop_and_teaches_the_encoders_only(names):
    z = features(names)
    index = codes(names)
    codebooks = {m: tensor.requires_grad_() for m, tensor in some_codebooks(names, size=7).items()}
    loss = row_commitment_loss(z, turned(index), turned(codebooks), 0.3)  # modalities are found by name
    assert_same_loss(loss, slow_commitment(z, index, codebooks, 0.3), list(z.values()))
    assert_no_gradient(loss, list(codebooks.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device", DEVICES)
def test_mix_cascade_and_commitment_keep_dtype_and_device(device, dtype):
    z = {m: tensor.to(device, dtype) for m, tensor in detached(features(THREE)).items()}
    codebooks = {m: tensor.to(device, dtype) for m, tensor in some_codebooks(THREE, size=7).items()}
    index = {m: tensor.to(device) for m, tensor in codes(THREE).items()}
    for output, shape in [(temporal_mix(z, "video", 0.6), (3, 4, 5)), (cascade(codebooks, THREE)["text"], (7, 5)),
                          (row_commitment_loss(z, index, codebooks, 0.25), ())]:
        assert (output.dtype, output.device, output.shape) == (dtype, z["audio"].device, shape)


# --------------------------------------------------------------------------------- AlignedQuantizer: forward, encode
def make_quantizer(names, **changes):
    """Its codebooks, in float64, apart, its counts unequal."""
    settings = {"codebook_size": 9, "code_dim": 5, "cascade": tuple(reversed(names)), "reset_after": 0,
                "ema_decay": 0.9} | changes
    quantizer = build(AlignedQuantizer, list(names), small_args(codaar, **settings), dtype=torch.float32)
    quantizer.codebooks = rand(*quantizer.codebooks.shape, seed=40)
    quantizer.ema_count = rand(*quantizer.ema_count.shape, seed=41).abs() + 0.5
    quantizer.ema_sum = quantizer.codebooks * quantizer.ema_count[..., None]
    return quantizer


def test_aligned_quantizer_lays_the_rows_of_an_index_side_by_side():
    quantizer = make_quantizer(THREE)
    audio, video, text = quantizer.codebooks
    assert quantizer.width == 15
    assert_close(quantizer.codebook, torch.stack([torch.cat([audio[k], video[k], text[k]]) for k in range(9)]))
    books = quantizer.by_modality()
    assert list(books) == THREE
    for m, codebook in zip(THREE, (audio, video, text)):
        assert torch.equal(books[m], codebook)


@SOME
def test_aligned_quantizer_quantizes_each_at_its_own_index_with_straight_through_gradients(names):
    quantizer = make_quantizer(names)
    z = features(names)
    before = snapshot(quantizer)
    weight = rand(3, 4, 5 * len(names), seed=50)
    joint, index = quantizer(z)
    assert list(joint) == list(index) == list(names)
    for m, codebook in zip(names, quantizer.codebooks, strict=True):
        assert index[m].tolist() == [[slow_nearest(vector, codebook) for vector in clip] for clip in z[m]]
    for i, t in itertools.product(range(3), range(4)):
        row = torch.cat([quantizer.codebooks[j, index[n][i, t]] for j, n in enumerate(names)])
        for m in names:
            assert_close(joint[m][i, t].detach(), row)
    for m in names:
        gradients = torch.autograd.grad((joint[m] * weight).sum(), list(z.values()), retain_graph=True)
        for gradient, part in zip(gradients, weight.split(5, -1), strict=True):
            assert_close(gradient, part)
    assert_unchanged(quantizer, before)


@SOME
def test_aligned_quantizer_finds_modalities_by_name(names):
    """The order of a dictionary changes nothing."""
    outcomes = []
    for turn in (dict, turned):
        quantizer = make_quantizer(names, reset_after=2, reset_source="batch")
        z = turn(detached(features(names)))
        drawn = generator()
        quantizer.init_from_batch(z, drawn)
        joint, index = quantizer(z)
        for _ in range(3):
            quantizer.update(z, turn(codes(names, size=5)), z, drawn)
        outcomes.append([*joint[names[0]], *(index[m] for m in names), *snapshot(quantizer).values()])
    for actual, expected in zip(*outcomes, strict=True):
        assert_close(actual, expected)


@SOME
def test_aligned_quantizer_encode_reads_every_codebook_at_the_modalitys_own_index(names):
    own = make_quantizer(names, probe_code="own")
    row = make_quantizer(names, probe_code="row")
    for m, codebook in zip(names, own.codebooks, strict=True):
        z = features(names)[m].detach()
        code, index = own.encode(z, m)
        codes_of_all, same_index = row.encode(z, m)
        assert index.shape == (3, 4) and torch.equal(index, same_index)
        for i, t in itertools.product(range(3), range(4)):
            k = slow_nearest(z[i, t], codebook)
            assert index[i, t] == k
            assert_close(code[i, t], codebook[k])
            assert_close(codes_of_all[i, t], torch.cat([book[k] for book in own.codebooks]))


# --------------------------------------------------------------------------- AlignedQuantizer: start, update, reset
def said_together(z, source):
    """For every clip and segment what the modalities say (M, D), or their mean M times."""
    found = []
    for i, t in itertools.product(*map(range, next(iter(z.values())).shape[:2])):
        said = torch.stack([tensor[i, t].detach() for tensor in z.values()])
        if source == "paired":
            said = mean(said).expand_as(said)
        found.append(said)
    return found


def origin(rows, z, source, codebooks, live):
    """The one segment, or live index, that the rows (M, D) of a reset index come from; codebooks (M, K, D)."""
    if source == "live":
        donor = min(live, key=lambda k: (rows - codebooks[:, k]).abs().max())  # a copied index has copies beside it
        noise = (rows - codebooks[:, donor]).abs().amax(1)
        assert noise.max() < 0.02 and noise.min() > 0  # or the two would stay one
        return donor
    said = said_together(z, source)
    (place,) = places(said, rows, 1e-9 if len(said) >= codebooks.shape[1] else 0.02)  # else they come with noise
    return place


@SOME
@pytest.mark.parametrize("start", ["batch", "paired"])
@pytest.mark.parametrize("size", [9, 40])  # fewer codes than segments, and more
def test_aligned_quantizer_starts_an_index_from_one_segment_of_all_modalities(names, start, size):
    z = features(names)
    args = small_args(codaar, codebook_size=size, code_dim=5, codebook_init=start, reset_source="live")
    quantizer = build(AlignedQuantizer, names, args)
    quantizer.init_from_batch(z, generator())
    said = said_together(z, start)
    taken = [places(said, rows, 1e-9 if size == 9 else 0.02) for rows in quantizer.codebooks.transpose(0, 1)]
    assert all(len(found) == 1 for found in taken)
    assert len({found[0] for found in taken}) == min(size, 12)
    for a, b in itertools.combinations(quantizer.codebook, 2):
        assert (a - b).abs().max() > 1e-6
    assert torch.equal(quantizer.ema_sum, quantizer.codebooks)
    assert quantizer.ema_count.eq(1).all()
    assert not any(buffer.requires_grad for buffer in quantizer.buffers())


@pytest.mark.parametrize("start", ["batch", "paired"])
def test_aligned_quantizer_start_draws_from_the_generator_alone(start):
    quantizer = make_quantizer(THREE, codebook_init=start)

    def begin(drawn):
        quantizer.init_from_batch(features(THREE), drawn)
        return quantizer.codebooks.clone()

    assert_draws_from_generator_alone(begin)


def slow_update(expected, names, index, ema_input):
    """Eq. 5 of every modality at its own index: new statistics into `expected`; the codebooks before CSA"""
    codebooks = {}
    for i, m in enumerate(names):
        expected["ema_count"][i], expected["ema_sum"][i], codebooks[m] = slow_ema_update(
            expected["ema_count"][i], expected["ema_sum"][i], index[m].flatten(), ema_input[m].flatten(0, 1), 0.9)
    return codebooks


@SOME
@pytest.mark.parametrize("csa", [True, False], ids=["csa", "no csa"])
@pytest.mark.parametrize("rule, source, reset_after", [("unshared", "paired", 0), *[(*kind, 2) for kind in RESETS]])
def test_aligned_quantizer_update_and_resets_equal_the_loops_step_after_step(names, csa, rule, source, reset_after):
    """EMA of `ema_input` at the own index, CSA beside it, then the counters, then resets from `z`."""
    quantizer = make_quantizer(names, csa=csa, reset_rule=rule, reset_source=source, reset_after=reset_after)
    expected = snapshot(quantizer)
    weights = cascade_weights(names, reversed(names) if csa else ())
    drawn = generator()
    for step in range(4):
        z = features(names, 2, 3, 5, scale=1 + step)
        ema_input = {m: rand(2, 3, 5, seed=200 + 10 * step + i) for i, m in enumerate(names)}
        index = {}
        for i, m in enumerate(names):  # some indices die out, others come into use
            index[m] = torch.randint(4, (2, 3), generator=generator(300 + 10 * step + i)) + step
        quantizer.update(z, index, ema_input, drawn)

        codebooks = mixed_rows(weights, slow_update(expected, names, index, ema_input))
        expected["codebooks"] = torch.stack(list(codebooks.values()))
        count_uses(expected, index)
        before = expected["codebooks"].clone()
        dead, live = dead_and_live(expected["steps_since_used"], reset_after or math.inf, rule, source)
        for k in dead:
            rows = quantizer.codebooks[:, k]
            origin(rows, z, source, before, live)
            expected["codebooks"][:, k] = rows
            expected["ema_sum"][:, k] = rows
            expected["ema_count"][:, k] = 1
            expected["steps_since_used"][:, k] = 0
        expected["resets"] += len(dead)
        for name, buffer in quantizer.named_buffers():
            assert_close(buffer, expected[name])
    assert (expected["resets"] > 0) == (reset_after > 0)


@SOME
@pytest.mark.parametrize("rule, source", RESETS)
def test_aligned_quantizer_reset_gives_a_dead_index_one_new_origin_in_every_codebook(names, rule, source):
    z = features(names, batch=8)
    quantizer = make_quantizer(names, codebook_size=30, reset_after=3, reset_rule=rule, reset_source=source)
    age(quantizer)
    dead, live = dead_and_live(quantizer.steps_since_used, 3, rule, source)
    assert len(dead) == (19 if rule == "unshared" else 16)
    before = snapshot(quantizer)
    quantizer.reset(z, generator())
    for name in ("codebooks", "ema_sum", "ema_count", "steps_since_used"):
        assert torch.equal(getattr(quantizer, name)[:, live], before[name][:, live]), name
    assert torch.equal(quantizer.ema_sum[:, dead], quantizer.codebooks[:, dead])
    assert quantizer.ema_count[:, dead].eq(1).all()
    assert not quantizer.steps_since_used[:, dead].any()
    assert quantizer.resets == len(dead)
    assert not any(buffer.requires_grad for buffer in quantizer.buffers())
    origins = {origin(quantizer.codebooks[:, k], z, source, before["codebooks"], live) for k in dead}
    assert len(origins) > 3  # each index draws for itself
    if source != "live":
        assert len(origins) == len(dead)


@pytest.mark.parametrize("source", ["paired", "batch", "live"])
def test_aligned_quantizer_reset_draws_from_the_generator_alone(source):
    z = features(THREE)

    def reset(drawn):
        quantizer = make_quantizer(THREE, codebook_size=30, reset_after=3, reset_source=source)
        age(quantizer)
        quantizer.reset(z, drawn)
        return quantizer.codebooks

    assert_draws_from_generator_alone(reset)


@SOME
@pytest.mark.parametrize("csa", [True, False], ids=["csa", "no csa"])
@pytest.mark.parametrize("source", ["batch", "paired", "live"])
def test_aligned_quantizer_keeps_a_reset_row_in_the_next_step_without_use(names, csa, source):
    z = features(names)
    quantizer = make_quantizer(names, csa=csa, reset_after=3, reset_source=source)
    quantizer.steps_since_used[:, 6] = 3
    quantizer.reset(z, generator())
    fresh = dict(zip(names, quantizer.codebooks[:, 6].clone(), strict=True))
    quantizer.update(z, codes(names, size=6), {m: 100 + z[m] for m in names}, generator())
    expected = mixed_rows(cascade_weights(names, reversed(names) if csa else ()), fresh)
    for i, m in enumerate(names):
        assert_close(quantizer.codebooks[i, 6], expected[m], 1e-4)  # smoothing of the count

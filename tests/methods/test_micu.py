"""The losses of micu.py against slow loops written from the paper's equations, its decoder, masks and puzzles.

Every reference takes one vector, pair or permutation at a time; values and gradients must agree in float64.
"""
import itertools
import math

import pytest
import torch
from reference import (
    DEVICES,
    SOME,
    THREE,
    assert_close,
    assert_draws_from_generator_alone,
    assert_finite_with_gradient,
    assert_no_gradient,
    assert_same_loss,
    assert_same_output,
    assert_uniform,
    build,
    codes,
    detached,
    features,
    generator,
    mean,
    minus_log_share,
    rand,
    slow_linear,
    small_args,
    turned,
)

import micu
from micu import (
    CUJP,
    commitment_loss,
    decoder,
    draw_mask,
    draw_puzzles,
    fcmi_loss,
    info_nce,
    mmjp_input,
)
from run import InputError

SIMILARITIES = ["dot", "cosine"]


def binary(*shape, seed=9):
    return (torch.rand(*shape, dtype=torch.float64, generator=generator(seed)) > 0.3).double()


# ------------------------------------------------------------------------------------------------------------- decoder
def test_decoder_of_a_code_is_two_layers_with_256_units_between():
    network = build(decoder, 4, 6)
    first, _, last = network
    code = rand(2, 3, 4, grad=True)
    rows = [slow_linear(last, torch.relu(slow_linear(first, row))) for row in code.flatten(0, 1)]
    reference = torch.stack(rows).unflatten(0, (2, 3))
    assert reference.shape == (2, 3, 6) and first.out_features == 256
    assert_same_output(network(code), reference, [code, *network.parameters()])


# ----------------------------------------------------------------------------------------------------- commitment_loss
def slow_commitment(z, code_index, codebook):
    """Eq. 7, right: the sum over the modalities of a mean over clips, segments and channels"""
    loss = 0
    for m in z:
        batch, segments, width = z[m].shape
        loss = loss + mean((z[m][i, t, d] - codebook[code_index[m][i, t], d].item()) ** 2
                           for i in range(batch) for t in range(segments) for d in range(width))
    return loss


@SOME
def test_commitment_loss_equals_the_loop_and_teaches_the_encoders_only(names):
    z = features(names)
    codebook = rand(7, 5, seed=30, grad=True)
    index = codes(names)
    loss = commitment_loss(z, turned(index), codebook)  # modalities are found by name
    assert_same_loss(loss, slow_commitment(z, index, codebook), list(z.values()))
    assert_no_gradient(loss, [codebook])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device", DEVICES)
def test_commitment_loss_keeps_dtype_and_device(device, dtype):
    z = {m: tensor.to(device, dtype) for m, tensor in detached(features(THREE)).items()}
    index = {m: tensor.to(device) for m, tensor in codes(THREE).items()}
    loss = commitment_loss(z, index, rand(7, 5).to(device, dtype))
    assert (loss.dtype, loss.device, loss.shape) == (dtype, z["audio"].device, ())


# ------------------------------------------------------------------------------------------------------------ info_nce
def slow_info_nce(query, candidates, temperature, similarity):
    losses = []
    for queries, group in zip(query.reshape(-1, *query.shape[-2:]), candidates.reshape(-1, *query.shape[-2:])):
        losses += [minus_log_share(q, group, i, temperature, similarity) for i, q in enumerate(queries)]
    return mean(losses)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("temperature", [1.0, 0.1])
@pytest.mark.parametrize("shape", [(6, 5), (2, 4, 5), (2, 3, 4, 3)])
def test_info_nce_equals_the_loop(shape, temperature, similarity):
    query = rand(*shape, grad=True)
    candidates = rand(*shape, seed=1, grad=True)
    loss = info_nce(query, candidates, temperature, similarity)
    assert_same_loss(loss, slow_info_nce(query, candidates, temperature, similarity), [query, candidates])


def test_info_nce_multiplies_by_default():
    query = rand(6, 5)
    candidates = rand(6, 5, seed=1)
    assert_close(info_nce(query, candidates, 0.5), slow_info_nce(query, candidates, 0.5, "dot"))


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_info_nce_of_an_empty_query_is_log_n(similarity):  # a fully masked vector
    query = torch.zeros(6, 5, dtype=torch.float64, requires_grad=True)
    candidates = rand(6, 5, grad=True)
    loss = info_nce(query, candidates, 0.1, similarity)
    assert_close(loss.item(), math.log(6))
    assert_finite_with_gradient(loss, [query, candidates])


@pytest.mark.parametrize("query, candidates", [((4, 5), (4, 6)), ((4, 5), (3, 5)), ((2, 4, 5), (1, 4, 5)),
                                               ((2, 4, 5), (4, 5)), ((5,), (5,))])
def test_info_nce_rejects_wrong_shapes(query, candidates):
    with pytest.raises(ValueError, match=r"\b(query|candidates)\b"):
        info_nce(torch.ones(query), torch.ones(candidates), 1.0)


# ----------------------------------------------------------------------------------------------------------- fcmi_loss
def slow_fcmi(z, masks, temperature, similarity):
    """Eq. 4 and 5, summed over every ordered pair (m, n); `masks` holds one (B, T, D) per modality."""
    fine = 0
    coarse = 0
    for m, n in itertools.product(z, z):
        masked = masks[m] * z[m]
        batch, segments, _ = masked.shape
        fine = fine + mean(minus_log_share(masked[i, j], z[n][i], j, temperature, similarity)
                           for i in range(batch) for j in range(segments))
        clips = [mean(clip) for clip in z[n]]
        coarse = coarse + mean(minus_log_share(mean(masked[i]), clips, i, temperature, similarity)
                               for i in range(batch))
    return fine, coarse


MASKS = {
    "channel": binary(3, 1, 5),
    "time": binary(3, 4, 1),
    "both": binary(3, 4, 5),
    "weights": rand(3, 4, 5, seed=8).abs(),  # not 0/1: a mask applied twice, or to the candidates, shows
    "boolean": binary(3, 1, 5).bool(),
    "different": {name: binary(3, 1, 5, seed=20 + i) for i, name in enumerate(THREE)},
    "different_time": {name: rand(3, 4, 1, seed=20 + i).abs() for i, name in enumerate(THREE)},
}


@pytest.mark.parametrize("similarity, temperature", [("dot", 1.0), ("cosine", 0.1)])
@pytest.mark.parametrize("names", [THREE[:2], THREE], ids=["two", "three"])
@pytest.mark.parametrize("kind", MASKS)
def test_fcmi_loss_equals_the_loop(kind, names, similarity, temperature):
    z = features(names)
    mask = MASKS[kind]
    masks = dict.fromkeys(names, mask)
    if isinstance(mask, dict):
        masks = mask = {name: mask[name] for name in names}
    fine, coarse = fcmi_loss(z, mask, temperature, similarity)
    whole_masks = {name: mask.expand(3, 4, 5) for name, mask in masks.items()}
    slow_fine, slow_coarse = slow_fcmi(z, whole_masks, temperature, similarity)
    assert_same_loss(fine, slow_fine, list(z.values()))
    assert_same_loss(coarse, slow_coarse, list(z.values()))


def test_fcmi_loss_has_nothing_to_tell_apart_in_one_segment_or_one_clip():
    fine, _ = fcmi_loss(features(THREE, segments=1), binary(3, 1, 5), 0.1)
    _, coarse = fcmi_loss(features(THREE, batch=1), binary(1, 1, 5), 0.1)
    assert_close(fine.item(), 0.0)
    assert_close(coarse.item(), 0.0)


def test_fcmi_loss_leaves_its_inputs_alone():
    z = features(THREE)
    mask = binary(3, 1, 5)
    copies = detached(z)
    fcmi_loss(z, mask, 0.1)
    assert list(z) == THREE
    for name in z:
        assert torch.equal(z[name], copies[name])
    assert torch.equal(mask, binary(3, 1, 5))


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_fcmi_and_info_nce_stay_finite_for_large_inputs(similarity):
    z = features(THREE, dtype=torch.float32, scale=1e4)
    assert_finite_with_gradient(info_nce(z["audio"], z["video"], 0.1, similarity), [z["audio"], z["video"]])
    for mask in (binary(3, 1, 5).float(), torch.zeros(3, 1, 5)):
        assert_finite_with_gradient(sum(fcmi_loss(z, mask, 0.1, similarity)), list(z.values()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_fcmi_and_info_nce_keep_dtype_and_device(similarity, dtype, device):
    z = {name: tensor.to(device, dtype) for name, tensor in detached(features(THREE)).items()}
    mask = binary(3, 1, 5).to(device, dtype)
    for loss in (info_nce(z["audio"], z["video"], 0.5, similarity), *fcmi_loss(z, mask, 0.5, similarity)):
        assert (loss.dtype, loss.device, loss.shape) == (dtype, mask.device, ())


@pytest.mark.parametrize("audio, video, mask, name", [
    ((3, 4, 5), (3, 4, 6), (3, 1, 1), "z"), ((3, 4, 5), (3, 1, 5), (3, 1, 5), "z"), ((4, 5), (4, 5), (4, 1), "z"),
    ((3, 4, 5), (3, 4, 5), (2, 1, 5), "mask"), ((3, 4, 5), (3, 4, 5), (2, 3, 4, 5), "mask"),
    ((3, 4, 5), (3, 4, 5), (3, 4), "mask"),
    ((3, 1, 5), (3, 1, 5), (3, 4, 1), "mask"),  # would silently make four segments of one
])
def test_fcmi_loss_rejects_wrong_shapes(audio, video, mask, name):
    z = {"audio": torch.ones(audio), "video": torch.ones(video)}
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        fcmi_loss(z, torch.ones(mask), 1.0)
    if name == "mask":
        with pytest.raises(ValueError, match=r"^mask\b"):
            fcmi_loss(z, {"audio": torch.ones(audio), "video": torch.ones(mask)}, 1.0)


# ----------------------------------------------------------------------------------------------------------- draw_mask
@pytest.mark.parametrize("sharing", ["same", "different"])
@pytest.mark.parametrize("axis, shape", [("channel", (3, 1, 5)), ("time", (3, 4, 1))])
def test_mask_has_one_entry_per_channel_or_per_segment_of_each_clip(axis, shape, sharing):
    z = features(THREE)
    mask = draw_mask(z, small_args(micu, mask_axis=axis, mask_sharing=sharing), generator())
    masks = [mask]
    if sharing == "different":
        assert list(mask) == THREE
        masks = list(mask.values())
    for one in masks:
        assert one.shape == shape
        assert set(one.flatten().tolist()) <= {0.0, 1.0}
    assert all(torch.isfinite(loss) for loss in fcmi_loss(z, mask, 0.1))


@pytest.mark.parametrize("axis", ["channel", "time"])
def test_mask_differs_between_clips_and_between_modalities_if_asked(axis):
    z = features(THREE, batch=2, segments=40, width=40)
    same = draw_mask(z, small_args(micu, mask_axis=axis, mask_sharing="same"), generator())
    different = draw_mask(z, small_args(micu, mask_axis=axis, mask_sharing="different"), generator())
    for mask in (same, *different.values()):
        assert not torch.equal(mask[0], mask[1])
    for a, b in itertools.combinations(different.values(), 2):
        assert not torch.equal(a, b)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("axis", ["channel", "time"])
def test_mask_drops_the_share_that_is_asked_for(axis, ratio):
    z = features(THREE, batch=50, segments=40, width=40)
    mask = draw_mask(z, small_args(micu, mask_axis=axis, mask_ratio=ratio), generator())
    deviation = math.sqrt(ratio * (1 - ratio) / mask.numel())
    assert abs((1 - mask).mean() - ratio) <= 5 * deviation


@pytest.mark.parametrize("sharing", ["same", "different"])
def test_mask_is_drawn_from_the_generator_alone(sharing):
    z = features(THREE, width=40)

    def draw(drawn):
        mask = draw_mask(z, small_args(micu, mask_sharing=sharing), drawn)
        return mask if sharing == "same" else torch.cat(list(mask.values()))

    assert_draws_from_generator_alone(draw)


# ---------------------------------------------------------------------------------------------------------------- CUJP
def make_cujp(code_dim=8, splits=4, permutations=7, seed=3):
    return build(CUJP, code_dim, splits, permutations, seed)


def shuffled_loss(jigsaw, parts, p):
    """-log of the share that the head gives to permutation p, having been shown the parts [(w,)] in its order."""
    shown = torch.cat([parts[part] for part in jigsaw.permutations[p].tolist()])
    logits = jigsaw.classify(torch.relu(jigsaw.hidden(shown)))
    return -torch.log(logits.exp()[p] / logits.exp().sum())


def slow_cujp(jigsaw, quantized, modality, permutation):
    """Mean over the vectors n and their permutations; part o of vector n comes from modality[n, o]."""
    splits = jigsaw.permutations.shape[1]
    vectors = [tensor.reshape(-1, tensor.shape[-1]) for tensor in quantized.values()]
    losses = []
    for n, shown in enumerate(permutation.tolist()):
        parts = [vectors[m][n].chunk(splits)[o] for o, m in enumerate(modality[n].tolist())]
        losses += [shuffled_loss(jigsaw, parts, p) for p in shown]
    return mean(losses)


def puzzles(n, modalities, splits, permutations, samples, seed=0):
    drawn = generator(seed)
    modality = torch.randint(modalities, (n, splits), generator=drawn)
    return modality, torch.randint(permutations, (n, samples), generator=drawn)


@pytest.mark.parametrize("splits, permutations", [(1, 1), (2, 2), (4, 7), (4, 24), (8, 256), (16, 256), (32, 256)])
def test_cujp_permutations_are_distinct_and_as_many_as_asked(splits, permutations):
    table = CUJP(64, splits, permutations, 0).permutations
    assert table.dtype == torch.int64 and table.shape == (permutations, splits)
    assert torch.equal(table.sort(dim=1).values, torch.arange(splits).expand(permutations, splits))
    assert len({tuple(row) for row in table.tolist()}) == permutations


def test_cujp_permutations_are_drawn_from_all_of_them():
    table = CUJP(64, 8, 256, 0).permutations
    for position in table.T:  # an enumeration from the identity on would leave the first parts in place
        assert_uniform(position.bincount(minlength=8))


def test_cujp_permutations_depend_on_the_seed_alone():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = CUJP(64, 8, 256, 5).permutations
        torch.manual_seed(1)
        again = CUJP(64, 8, 256, 5).permutations
        other = CUJP(64, 8, 256, 6).permutations
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_cujp_permutations_travel_in_the_checkpoint():
    saved = make_cujp(seed=1)
    other = make_cujp(seed=2)
    assert not torch.equal(saved.permutations, other.permutations)
    other.load_state_dict(saved.state_dict())
    assert torch.equal(saved.permutations, other.permutations)


def test_cujp_classifier_has_one_hidden_layer_of_512():
    shapes = {name: tuple(parameter.shape) for name, parameter in make_cujp().named_parameters()}
    assert shapes == {"hidden.weight": (512, 8), "hidden.bias": (512,),
                      "classify.weight": (7, 512), "classify.bias": (7,)}


@SOME
@pytest.mark.parametrize("splits, permutations, samples", [(1, 1, 1), (2, 2, 1), (4, 7, 3), (8, 20, 2)])
def test_cujp_equals_the_loop(splits, permutations, samples, names):
    cujp = make_cujp(splits=splits, permutations=permutations)
    quantized = features(names, 4, 3, 8)
    modality, permutation = puzzles(12, len(names), splits, permutations, samples)
    loss = cujp(quantized, modality, permutation)
    inputs = [*quantized.values(), *cujp.parameters()]
    assert_same_loss(loss, slow_cujp(cujp, quantized, modality, permutation), inputs)


def test_cujp_sends_the_gradient_of_every_part_to_the_modality_that_gave_it():
    cujp = make_cujp()
    quantized = features(THREE, 2, 3, 8)
    modality, permutation = puzzles(6, 3, 4, 7, 2)
    gradients = torch.autograd.grad(cujp(quantized, modality, permutation), list(quantized.values()))
    for number, gradient in enumerate(gradients):
        reached = gradient.reshape(6, 4, 2).ne(0).any(-1)  # (N, O)
        assert torch.equal(reached, modality == number)


def test_cujp_is_the_mean_over_the_permutations_of_a_vector():
    """All P of them, or any in any order, and twice the same counts twice."""
    cujp = make_cujp()
    quantized = features(THREE, 2, 3, 8)
    modality, _ = puzzles(6, 3, 4, 7, 1)
    singles = torch.stack([cujp(quantized, modality, torch.full((6, 1), p)) for p in range(7)])
    assert_close(cujp(quantized, modality, torch.arange(7).expand(6, 7)), singles.mean())
    assert_close(cujp(quantized, modality, torch.tensor([[6, 2, 2]]).expand(6, 3)), singles[[6, 2, 2]].mean())


def test_cujp_draws_nothing():
    cujp = make_cujp()
    quantized = features(THREE, 2, 3, 8)
    arguments = puzzles(6, 3, 4, 7, 2)
    state = torch.get_rng_state()
    assert torch.equal(cujp(quantized, *arguments), cujp(quantized, *arguments))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cujp_keeps_dtype_and_device_and_stays_finite_for_large_codes(dtype, device):
    cujp = make_cujp().to(device, dtype)
    quantized = {}
    for name, tensor in detached(features(THREE, 2, 3, 8)).items():
        quantized[name] = (tensor.to(device, dtype) * 1e4).requires_grad_()
    loss = cujp(quantized, *[tensor.to(device) for tensor in puzzles(6, 3, 4, 7, 2)])
    assert (loss.dtype, loss.device, loss.shape) == (dtype, quantized["audio"].device, ())
    assert_finite_with_gradient(loss, [*quantized.values(), *cujp.parameters()])


@pytest.mark.parametrize("splits", [3, 5, 16])
def test_cujp_refuses_splits_that_do_not_divide_a_code(splits):
    with pytest.raises(InputError, match=f"{splits} parts do not divide .* 8") as error:
        CUJP(8, splits, 2, 0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("splits, permutations", [(2, 3), (4, 25), (4, 0)])
def test_cujp_rejects_more_permutations_than_there_are(splits, permutations):
    with pytest.raises(ValueError, match=r"\bpermutations\b"):
        CUJP(8, splits, permutations, 0)


@pytest.mark.parametrize("change, name", [
    ({"audio": (2, 3, 6), "video": (2, 3, 6)}, "quantized"), ({"video": (2, 4, 8)}, "quantized"),
    ({"video": (1, 3, 8)}, "quantized"), ({"modality": (5, 4)}, "modality"), ({"modality": (6, 3)}, "modality"),
    ({"modality": (4,)}, "modality"), ({"permutation": (5, 2)}, "permutation"), ({"permutation": (6,)}, "permutation")])
def test_cujp_rejects_wrong_shapes(change, name):
    shapes = {"audio": (2, 3, 8), "video": (2, 3, 8), "modality": (6, 4), "permutation": (6, 2)} | change
    quantized = {m: torch.zeros(shapes[m]) for m in ("audio", "video")}
    modality = torch.zeros(shapes["modality"], dtype=torch.int64)
    permutation = torch.zeros(shapes["permutation"], dtype=torch.int64)
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        CUJP(8, 4, 7, 0)(quantized, modality, permutation)


# ---------------------------------------------------------------------------------------------------------- mmjp_input
def slow_mmjp(jigsaw, quantized, splits, permutation):
    """The parts of all modalities, one modality after the other, are shuffled together."""
    vectors = [tensor.reshape(-1, tensor.shape[-1]) for tensor in quantized.values()]
    losses = []
    for n, shown in enumerate(permutation.tolist()):
        parts = [part for vector in vectors for part in vector[n].chunk(splits)]
        losses += [shuffled_loss(jigsaw, parts, p) for p in shown]
    return mean(losses)


@SOME
def test_mmjp_input_is_one_modality_that_says_what_all_say(names):
    quantized = features(names, width=8)
    (joint,) = mmjp_input(quantized).values()
    assert joint.shape == (3, 4, 8 * len(names))
    for i, t in itertools.product(range(3), range(4)):
        assert torch.equal(joint[i, t], torch.cat([quantized[m][i, t] for m in names]))


@SOME
@pytest.mark.parametrize("splits", [1, 2, 4])
def test_cujp_over_mmjp_input_equals_the_loop(splits, names):
    parts = splits * len(names)
    jigsaw = make_cujp(8 * len(names), parts, 2)
    quantized = features(names, 2, 3, 8)
    modality, permutation = puzzles(6, 1, parts, 2, 3)
    loss = jigsaw(mmjp_input(quantized), modality, permutation)
    inputs = [*quantized.values(), *jigsaw.parameters()]
    assert_same_loss(loss, slow_mmjp(jigsaw, quantized, splits, permutation), inputs)


@pytest.mark.parametrize("video, permutation, name", [((2, 3, 6), (6, 2), "quantized"),
                                                      ((2, 3, 8), (5, 2), "permutation")])
def test_cujp_over_mmjp_input_rejects_wrong_shapes(video, permutation, name):
    quantized = {"audio": torch.zeros(2, 3, 8), "video": torch.zeros(video)}
    modality = torch.zeros(6, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        CUJP(16, 4, 7, 0)(mmjp_input(quantized), modality, torch.zeros(permutation, dtype=torch.int64))


# -------------------------------------------------------------------------------------------------------- draw_puzzles
def drawn_puzzles(vectors=400, modalities=3, samples=8):
    """Of four parts and six permutations"""
    return draw_puzzles(make_cujp(permutations=6), vectors, modalities, samples, generator())


@pytest.mark.parametrize("modalities", [2, 3])
def test_draw_puzzles_takes_every_modality_alike_for_every_vector_and_part(modalities):
    modality, _ = drawn_puzzles(modalities=modalities)
    assert modality.shape == (400, 4) and modality.dtype == torch.int64
    neighbours = [(modality[:, ::2], modality[:, 1::2]), (modality[::2], modality[1::2])]  # parts, vectors
    for left, right in neighbours:
        assert_uniform((left * modalities + right).flatten().bincount(minlength=modalities ** 2))
    for part in modality.T:
        assert_uniform(part.bincount(minlength=modalities))


def test_draw_puzzles_takes_every_permutation_alike_for_every_vector():
    _, permutation = drawn_puzzles(samples=3)
    assert permutation.shape == (400, 3) and permutation.dtype == torch.int64
    for column in permutation.T:
        assert_uniform(column.bincount(minlength=6))
    neighbours = permutation[::2, 0] * 6 + permutation[1::2, 0]
    assert neighbours.unique().numel() > 30  # of 36 pairs


def test_draw_puzzles_shows_all_permutations_in_order_if_samples_is_0():
    modality, permutation = drawn_puzzles(vectors=6, samples=0)
    assert modality.shape == (6, 4)
    assert torch.equal(permutation, torch.arange(6).expand(6, 6))


@pytest.mark.parametrize("samples", [0, 2])
def test_draw_puzzles_fits_the_parts_of_any_modality_and_those_of_all_together(samples):
    quantized = features(THREE, 2, 3, 8)
    for pieces in (quantized, mmjp_input(quantized)):
        (width,) = {tensor.shape[-1] for tensor in pieces.values()}
        jigsaw = make_cujp(width, width // 4, 2)
        drawn = draw_puzzles(jigsaw, 6, len(pieces), samples, generator())
        assert drawn[0].shape == (6, width // 4) and drawn[1].shape == (6, 2)
        assert torch.isfinite(jigsaw(pieces, *drawn))


def test_draw_puzzles_draws_from_the_generator_alone():
    jigsaw = make_cujp()
    assert_draws_from_generator_alone(lambda drawn: torch.cat(draw_puzzles(jigsaw, 12, 3, 8, drawn), 1))


@pytest.mark.parametrize("samples", [1, 3])
def test_cujp_of_sampled_permutations_is_an_unbiased_estimate(samples):
    cujp = make_cujp()
    vectors = rand(2, 3, 8)
    quantized = dict.fromkeys(THREE, vectors)  # from whichever modality a part comes
    full = cujp(quantized, torch.zeros(6, 4, dtype=torch.int64), torch.arange(7).expand(6, 7)).detach()
    drawn = generator()
    draws = []
    for _ in range(300):
        draws.append(cujp(quantized, *draw_puzzles(cujp, 6, 3, samples, drawn)).detach())
    draws = torch.stack(draws)
    assert draws.std() > 0
    assert (draws.mean() - full).abs() < 5 * draws.std() / math.sqrt(300)

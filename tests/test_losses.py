"""The losses and the codebook update of micu.py against slow loops written from the paper's equations.

Every reference takes one vector, pair or permutation at a time; values and gradients must agree in float64.
"""

import math

import pytest
import torch

from micu import CUJP, ema_update, fcmi_loss, info_nce, nearest_code

MODALITIES = ["audio", "video", "text"]
SIMILARITIES = ["dot", "cosine"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def rand(*shape, seed=0, dtype=torch.float64, grad=False):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


def assert_close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)  # shape, dtype and device as well


def assert_same_loss(loss, reference, inputs):
    """Equal values, equal gradients with respect to every input."""
    assert_close(loss, reference)
    gradients = [torch.autograd.grad(value, inputs, retain_graph=True) for value in (loss, reference)]
    for actual, expected in zip(*gradients, strict=True):
        assert_close(actual, expected)


def assert_finite_with_gradient(loss, inputs):
    assert torch.isfinite(loss)
    assert all(torch.isfinite(gradient).all() for gradient in torch.autograd.grad(loss, inputs))


def assert_uniform(counts):
    """Every cell within five standard deviations of an equal share."""
    counts = torch.as_tensor(counts, dtype=torch.float64).flatten()
    share = 1 / len(counts)
    assert (counts - counts.sum() * share).abs().max() < 5 * (counts.sum() * share * (1 - share)).sqrt(), counts


# ---------------------------------------------------------------------------------------------------- nearest_code


def squared_distances(z, codebook):  # (..., D), (K, D) -> (N, K)
    rows = z.reshape(-1, z.shape[-1]).double()
    return torch.stack([torch.stack([((row - code) ** 2).sum() for code in codebook.double()]) for row in rows])


@pytest.mark.parametrize("shape", [(), (7,), (3, 4), (2, 3, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearest_code_is_the_argmin_of_the_squared_distance(shape, dtype):
    codebook = rand(9, 5, dtype=dtype) * torch.linspace(0.2, 3, 9, dtype=dtype)[:, None]  # norms differ
    z = rand(*shape, 5, seed=1, dtype=dtype, grad=True)
    assert_close(nearest_code(z, codebook), squared_distances(z, codebook).argmin(-1).reshape(shape))


@pytest.mark.parametrize("dtype, scale", [(torch.bfloat16, 1), (torch.float16, 300), (torch.float32, 1e4)])
def test_nearest_code_measures_in_single_precision(dtype, scale):
    codebook, z = (rand(100, 16) * scale).to(dtype), (rand(60, 16, seed=1) * scale).to(dtype)
    distances = squared_distances(z, codebook)
    index = nearest_code(z, codebook)
    assert index.dtype == torch.int64
    assert_close(distances.gather(1, index[:, None])[:, 0], distances.amin(1), 1e-5)


def test_nearest_code_stays_exact_under_autocast():
    codebook, z = rand(100, 16, dtype=torch.float32), rand(60, 16, seed=1, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        index = nearest_code(z, codebook)
    assert_close(index, squared_distances(z, codebook).argmin(-1))


@pytest.mark.parametrize("z, codebook, name", [((4, 5), (3, 6), "z|codebook"), ((4, 5), (5,), "codebook"),
                                               ((4, 5), (2, 3, 5), "codebook"), ((), (3, 5), "z")])
def test_nearest_code_rejects_wrong_shapes(z, codebook, name):
    with pytest.raises(ValueError, match=rf"\b({name})\b"):
        nearest_code(torch.zeros(z), torch.zeros(codebook))


# ------------------------------------------------------------------------------------------------------ ema_update


def slow_ema_update(ema_count, ema_sum, code_index, vectors, decay, epsilon=1e-5):
    count, total = torch.zeros_like(ema_count), torch.zeros_like(ema_sum)
    for k in range(len(ema_count)):
        chosen = [vector for index, vector in zip(code_index.tolist(), vectors) if index == k]
        count[k] = decay * ema_count[k] + (1 - decay) * len(chosen)
        total[k] = decay * ema_sum[k] + (1 - decay) * sum(chosen, torch.zeros_like(ema_sum[k]))
    all_counts = sum(count.tolist())
    smoothed = [(c + epsilon) / (all_counts + len(count) * epsilon) * all_counts for c in count.tolist()]
    return count, total, torch.stack([row / c for row, c in zip(total, smoothed)])


def ema_inputs(dtype=torch.float64):
    ema_count = torch.tensor([0.0, 1e-4, 1.0, 3.0, 0.5, 20.0], dtype=dtype)  # codes 0 and 5 are not chosen below
    return ema_count, rand(6, 4, dtype=dtype), torch.tensor([3, 1, 3, 2, 4, 3, 1]), rand(7, 4, seed=1, dtype=dtype)


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.99, 1.0])
def test_ema_update_is_the_smoothed_quotient_of_unsmoothed_averages(decay):
    for actual, expected in zip(ema_update(*ema_inputs(), decay), slow_ema_update(*ema_inputs(), decay), strict=True):
        assert_close(actual, expected)


def test_ema_update_repeated_does_not_accumulate_the_smoothing():
    ema_count, ema_sum, code_index, vectors = ema_inputs()
    actual = expected = ema_count, ema_sum
    for _ in range(50):
        actual = ema_update(*actual[:2], code_index, vectors, 0.9)
        expected = slow_ema_update(*expected[:2], code_index, vectors, 0.9)
    for left, right in zip(actual, expected, strict=True):
        assert_close(left, right)


@pytest.mark.parametrize("decay", [0.9, 1.0])
def test_ema_update_returns_new_tensors_without_gradient(decay):
    inputs = ema_inputs()
    before = [tensor.clone() for tensor in inputs]
    outputs = ema_update(*inputs[:3], inputs[3].requires_grad_(), decay)
    assert not any(output.requires_grad for output in outputs)
    for output in outputs:
        output.fill_(7.0)  # would show in an input that shares its memory
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, before))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, vector_dtype", [(torch.float32, torch.float32), (torch.float64, torch.float64),
                                                 (torch.float32, torch.bfloat16)])
def test_ema_update_keeps_the_buffers_dtype_device_and_range(device, dtype, vector_dtype):
    ema_count, ema_sum, code_index, vectors = (tensor.to(device) for tensor in ema_inputs(dtype))
    for output in ema_update(ema_count, ema_sum * 1e4, code_index, (vectors * 1e4).to(vector_dtype), 0.99):
        assert (output.dtype, output.device) == (dtype, ema_count.device) and torch.isfinite(output).all()


@pytest.mark.parametrize("change, name", [
    ({"ema_count": (5,)}, "ema_count|ema_sum"), ({"ema_count": (6, 1)}, "ema_count"), ({"ema_sum": (6,)}, "ema_sum"),
    ({"code_index": (8,)}, "code_index|vectors"), ({"code_index": (7, 1)}, "code_index"),
    ({"vectors": (7, 3)}, "vectors|ema_sum"), ({"vectors": (7,)}, "vectors"),
    ({"vectors": (1, 4)}, "vectors|code_index"),
])
def test_ema_update_rejects_wrong_shapes(change, name):
    shapes = {"ema_count": (6,), "ema_sum": (6, 4), "code_index": (7,), "vectors": (7, 4)} | change
    tensors = {key: torch.zeros(shape, dtype=torch.int64 if key == "code_index" else None)
               for key, shape in shapes.items()}
    with pytest.raises(ValueError, match=rf"\b({name})\b"):
        ema_update(**tensors, decay=0.99)


# --------------------------------------------------------------------------------------------- info_nce, fcmi_loss


def pair_similarity(x, y, similarity):  # (D,), (D,) -> ()
    product = sum(a * b for a, b in zip(x, y))
    if similarity == "dot" or not (x.any() and y.any()):  # a fully masked vector has no angle: 0
        return product
    return product / (x.square().sum().sqrt() * y.square().sum().sqrt())


def minus_log_share(query, candidates, positive, temperature, similarity):
    """-log( exp(q . c_positive / tau) / sum_k exp(q . c_k / tau) ), one query."""
    weights = [torch.exp(pair_similarity(query, candidate, similarity) / temperature) for candidate in candidates]
    return -torch.log(weights[positive] / sum(weights))


def slow_info_nce(query, candidates, temperature, similarity):
    groups = zip(query.reshape(-1, *query.shape[-2:]), candidates.reshape(-1, *query.shape[-2:]))
    return torch.stack([minus_log_share(q, c_group, i, temperature, similarity)
                        for q_group, c_group in groups for i, q in enumerate(q_group)]).mean()


def slow_fcmi(z, masks, temperature, similarity):
    """Eq. (4) and (5), summed over every ordered pair (m, n); `masks` holds one (B, T, D) per modality."""
    fine = coarse = 0
    for m in z:
        for n in z:
            masked, (batch, segments, _) = masks[m] * z[m], z[m].shape
            fine = fine + sum(minus_log_share(masked[i, j], z[n][i], j, temperature, similarity)
                              for i in range(batch) for j in range(segments)) / (batch * segments)
            clips = [sum(clip) / segments for clip in z[n]]
            coarse = coarse + sum(minus_log_share(sum(masked[i]) / segments, clips, i, temperature, similarity)
                                  for i in range(batch)) / batch
    return fine, coarse


def features(names, batch=3, segments=4, width=5, dtype=torch.float64, scale=1.0):
    return {name: (rand(batch, segments, width, seed=i, dtype=dtype) * scale).requires_grad_()
            for i, name in enumerate(names)}


def binary(*shape, seed=9):
    return (torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) > 0.3).double()


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("temperature", [1.0, 0.1])
@pytest.mark.parametrize("shape", [(6, 5), (2, 4, 5), (2, 3, 4, 3)])
def test_info_nce_equals_the_loop(shape, temperature, similarity):
    query, candidates = rand(*shape, grad=True), rand(*shape, seed=1, grad=True)
    assert_same_loss(info_nce(query, candidates, temperature, similarity),
                     slow_info_nce(query, candidates, temperature, similarity), [query, candidates])


def test_info_nce_multiplies_by_default():
    query, candidates = rand(6, 5), rand(6, 5, seed=1)
    assert_close(info_nce(query, candidates, 0.5), slow_info_nce(query, candidates, 0.5, "dot"))


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_info_nce_of_an_empty_query_is_log_n(similarity):  # a fully masked vector
    query, candidates = torch.zeros(6, 5, dtype=torch.float64, requires_grad=True), rand(6, 5, grad=True)
    loss = info_nce(query, candidates, 0.1, similarity)
    assert_close(loss.item(), math.log(6))
    assert_finite_with_gradient(loss, [query, candidates])


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_contrastive_losses_stay_finite_for_large_inputs(similarity):
    z = features(MODALITIES, dtype=torch.float32, scale=1e4)
    assert_finite_with_gradient(info_nce(z["audio"], z["video"], 0.1, similarity), [z["audio"], z["video"]])
    for mask in (binary(3, 1, 5).float(), torch.zeros(3, 1, 5)):
        assert_finite_with_gradient(sum(fcmi_loss(z, mask, 0.1, similarity)), list(z.values()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_contrastive_losses_keep_dtype_and_device(similarity, dtype, device):
    z = {name: tensor.detach().to(device, dtype) for name, tensor in features(MODALITIES).items()}
    mask = binary(3, 1, 5).to(device, dtype)
    for loss in (info_nce(z["audio"], z["video"], 0.5, similarity), *fcmi_loss(z, mask, 0.5, similarity)):
        assert (loss.dtype, loss.device, loss.shape) == (dtype, mask.device, ())


@pytest.mark.parametrize("query, candidates", [((4, 5), (4, 6)), ((4, 5), (3, 5)), ((2, 4, 5), (1, 4, 5)),
                                               ((2, 4, 5), (4, 5)), ((5,), (5,))])
def test_info_nce_rejects_wrong_shapes(query, candidates):
    with pytest.raises(ValueError, match=r"\b(query|candidates)\b"):
        info_nce(torch.ones(query), torch.ones(candidates), 1.0)


MASKS = {
    "channel": binary(3, 1, 5),
    "time": binary(3, 4, 1),
    "both": binary(3, 4, 5),
    "weights": rand(3, 4, 5, seed=8).abs(),  # not 0/1: a mask applied twice, or to the candidates, shows
    "boolean": binary(3, 1, 5).bool(),
    "different": {name: binary(3, 1, 5, seed=20 + i) for i, name in enumerate(MODALITIES)},
    "different_time": {name: rand(3, 4, 1, seed=20 + i).abs() for i, name in enumerate(MODALITIES)},
}


@pytest.mark.parametrize("similarity, temperature", [("dot", 1.0), ("cosine", 0.1)])
@pytest.mark.parametrize("names", [MODALITIES[:2], MODALITIES], ids=len)
@pytest.mark.parametrize("kind", MASKS)
def test_fcmi_loss_equals_the_loop(kind, names, similarity, temperature):
    z, mask = features(names), MASKS[kind]
    mask = {name: mask[name] for name in names} if isinstance(mask, dict) else mask
    masks = mask if isinstance(mask, dict) else dict.fromkeys(names, mask)
    fine, coarse = fcmi_loss(z, mask, temperature, similarity)
    slow_fine, slow_coarse = slow_fcmi(z, {n: m.expand(3, 4, 5) for n, m in masks.items()}, temperature, similarity)
    assert_same_loss(fine, slow_fine, list(z.values()))
    assert_same_loss(coarse, slow_coarse, list(z.values()))


def test_fcmi_loss_has_nothing_to_tell_apart_in_one_segment_or_one_clip():
    one_segment, one_clip = features(MODALITIES, segments=1), features(MODALITIES, batch=1)
    assert_close(fcmi_loss(one_segment, binary(3, 1, 5), 0.1)[0].item(), 0.0)
    assert_close(fcmi_loss(one_clip, binary(1, 1, 5), 0.1)[1].item(), 0.0)


def test_fcmi_loss_leaves_its_inputs_alone():
    z, mask = features(MODALITIES), binary(3, 1, 5)
    copies = {name: tensor.detach().clone() for name, tensor in z.items()}
    fcmi_loss(z, mask, 0.1)
    assert list(z) == MODALITIES and all(torch.equal(z[name], copies[name]) for name in z)
    assert torch.equal(mask, binary(3, 1, 5))


@pytest.mark.parametrize("audio, video, mask, name", [
    ((3, 4, 5), (3, 4, 6), (3, 1, 1), "z"), ((3, 4, 5), (3, 1, 5), (3, 1, 5), "z"), ((4, 5), (4, 5), (4, 1), "z"),
    ((3, 4, 5), (3, 4, 5), (2, 1, 5), "mask"), ((3, 4, 5), (3, 4, 5), (2, 3, 4, 5), "mask"),
    ((3, 1, 5), (3, 1, 5), (3, 4, 1), "mask"),  # would silently make four segments of one
])
def test_fcmi_loss_rejects_wrong_shapes(audio, video, mask, name):
    z = {"audio": torch.ones(audio), "video": torch.ones(video)}
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        fcmi_loss(z, torch.ones(mask), 1.0)
    if name == "mask":
        with pytest.raises(ValueError, match=r"\bmask\b"):
            fcmi_loss(z, {"audio": torch.ones(audio), "video": torch.ones(mask)}, 1.0)


# ------------------------------------------------------------------------------------------------------------ CUJP


def make_cujp(names, code_dim=8, splits=4, permutations=7, seed=3, **kwargs):
    torch.manual_seed(0)  # weights
    return CUJP(code_dim, splits, permutations, list(names), seed, **kwargs).double()


def slow_cujp(cujp, vectors):
    """Cross-entropy of every vector under every permutation, (N, P), one at a time."""
    losses = []
    for vector in vectors.reshape(-1, vectors.shape[-1]):
        parts = vector.chunk(cujp.permutations.shape[1])
        for p, order in enumerate(cujp.permutations.tolist()):
            logits = cujp.classify(torch.relu(cujp.hidden(torch.cat([parts[part] for part in order]))))
            losses.append(-torch.log(logits.exp()[p] / logits.exp().sum()))
    return torch.stack(losses).reshape(-1, len(cujp.permutations))


@pytest.mark.parametrize("splits, permutations", [(1, 1), (2, 2), (4, 7), (4, 24), (8, 256), (16, 256), (32, 256)])
def test_cujp_permutations_are_distinct_and_as_many_as_asked(splits, permutations):
    table = CUJP(64, splits, permutations, MODALITIES, 0).permutations
    assert table.dtype == torch.int64 and table.shape == (permutations, splits)
    assert torch.equal(table.sort(dim=1).values, torch.arange(splits).expand(permutations, splits))
    assert len({tuple(row) for row in table.tolist()}) == permutations


def test_cujp_permutations_are_drawn_from_all_of_them():
    table = CUJP(64, 8, 256, MODALITIES, 0).permutations
    for position in table.T:  # an enumeration from the identity on would leave the first parts in place
        assert_uniform(position.bincount(minlength=8))


def test_cujp_permutations_depend_on_the_seed_alone_and_travel_in_the_checkpoint():
    tables = []
    for global_seed, seed in [(0, 5), (1, 5), (1, 6)]:
        torch.manual_seed(global_seed)
        tables.append(CUJP(64, 8, 256, MODALITIES, seed).permutations.clone())
    assert torch.equal(tables[0], tables[1]) and not torch.equal(tables[0], tables[2])
    saved, other = make_cujp(MODALITIES, seed=1), make_cujp(MODALITIES, seed=2)
    assert not torch.equal(saved.permutations, other.permutations)
    other.load_state_dict(saved.state_dict())
    assert torch.equal(saved.permutations, other.permutations)


def test_cujp_classifier_has_one_hidden_layer_of_512():
    shapes = {name: tuple(parameter.shape) for name, parameter in make_cujp(MODALITIES).named_parameters()}
    assert shapes == {"hidden.weight": (512, 8), "hidden.bias": (512,),
                      "classify.weight": (7, 512), "classify.bias": (7,)}


@pytest.mark.parametrize("names", [MODALITIES[:1], MODALITIES[:2], MODALITIES], ids=len)
@pytest.mark.parametrize("splits, permutations", [(2, 2), (4, 7), (4, 24), (8, 20)])
def test_cujp_equals_the_loop_when_the_modalities_agree(splits, permutations, names):
    cujp, vectors = make_cujp(names, splits=splits, permutations=permutations), rand(2, 3, 8, grad=True)
    loss = cujp(dict.fromkeys(names, vectors))
    assert_same_loss(loss, slow_cujp(cujp, vectors).mean(), [vectors, *cujp.parameters()])


@pytest.mark.parametrize("names", [MODALITIES[:2], MODALITIES], ids=len)
def test_cujp_draws_a_modality_for_every_vector_and_part(names):
    """The modality that receives a part's gradient gave it: exactly one, uniform, independent of the neighbours."""
    batch, segments, splits, width = 40, 10, 4, 2
    cujp, generator = make_cujp(names, permutations=3), torch.Generator().manual_seed(0)
    z = {name: rand(batch, segments, splits * width, seed=i, grad=True) for i, name in enumerate(names)}
    stacked = torch.stack([z[name].detach() for name in names]).unflatten(-1, (splits, width))  # (M, B, T, O, D/O)

    sources = []
    for _ in range(2):
        loss = cujp(z, generator)
        gradients = torch.stack(torch.autograd.grad(loss, list(z.values()))).unflatten(-1, (splits, width))
        chosen = (gradients != 0).any(-1)  # (M, B, T, O)
        assert (chosen.sum(0) == 1).all()
        composed = (stacked * chosen[..., None]).sum(0).flatten(-2)
        assert_close(loss.detach(), slow_cujp(cujp, composed).mean().detach())
        sources.append(chosen.int().argmax(0))  # (B, T, O)

    first, second = sources
    neighbours = {"part": (first[..., ::2], first[..., 1::2]), "segment": (first[:, ::2], first[:, 1::2]),
                  "clip": (first[::2], first[1::2]), "step": (first, second)}
    for left, right in neighbours.values():
        assert_uniform((left * len(names) + right).flatten().bincount(minlength=len(names) ** 2))


def test_cujp_draws_from_the_generator_alone():
    cujp, z = make_cujp(MODALITIES, samples=2), features(MODALITIES, width=8)
    state = torch.get_rng_state()
    losses = [cujp(z, torch.Generator().manual_seed(seed)).item() for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(state, torch.get_rng_state())
    assert math.isfinite(cujp(z).item())


def test_cujp_samples_one_permutation_per_vector_uniformly():
    """With two vectors and S = 1 a loss tells which two permutations were drawn: all P x P pairs alike."""
    cujp, vectors = make_cujp(MODALITIES[:1], code_dim=6, splits=3, permutations=6, samples=1), rand(1, 2, 6)
    first, second = slow_cujp(cujp, vectors).detach()
    table = ((first[:, None] + second) / 2).flatten()  # (P * P,)
    generator, counts = torch.Generator().manual_seed(0), [0] * len(table)
    for _ in range(40 * len(table)):
        distance, pair = (table - cujp({"audio": vectors}, generator).detach()).abs().min(0)
        assert distance < 1e-9
        counts[pair] += 1
    assert_uniform(counts)


@pytest.mark.parametrize("samples", [1, 3, 6])
def test_cujp_samples_are_an_unbiased_estimate(samples):
    vectors, generator = rand(2, 3, 8), torch.Generator().manual_seed(0)
    full, sampled = make_cujp(MODALITIES[:1]), make_cujp(MODALITIES[:1], samples=samples)
    draws = torch.stack([sampled({"audio": vectors}, generator).detach() for _ in range(400)])
    assert draws.std() > 0
    assert (draws.mean() - full({"audio": vectors}).detach()).abs() < 5 * draws.std() / 20


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("samples", [0, 3])
def test_cujp_keeps_dtype_and_device_and_stays_finite_for_large_codes(samples, dtype, device):
    cujp = make_cujp(MODALITIES, samples=samples).to(device, dtype)
    z = {name: (tensor.detach().to(device, dtype) * 1e4).requires_grad_()
         for name, tensor in features(MODALITIES, width=8).items()}
    loss = cujp(z)
    assert (loss.dtype, loss.device, loss.shape) == (dtype, z["audio"].device, ())
    assert_finite_with_gradient(loss, [*z.values(), *cujp.parameters()])


@pytest.mark.parametrize("splits, permutations, name", [(3, 2, "splits"), (16, 2, "splits"),
                                                        (2, 3, "permutations"), (4, 25, "permutations")])
def test_cujp_rejects_impossible_puzzles(splits, permutations, name):
    with pytest.raises(ValueError, match=name):
        CUJP(8, splits, permutations, MODALITIES, 0)


@pytest.mark.parametrize("audio, video", [((2, 3, 6), (2, 3, 6)), ((2, 3, 8), (2, 4, 8)), ((2, 3, 8), (1, 3, 8))])
def test_cujp_rejects_wrong_shapes(audio, video):
    cujp = CUJP(8, 4, 7, MODALITIES[:2], 0)
    with pytest.raises(ValueError, match=r"\bquantized\b"):
        cujp({"audio": torch.zeros(audio), "video": torch.zeros(video)})

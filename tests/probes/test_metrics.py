"""The metrics of probes.py: cases worked by hand, and slow loops over random inputs."""

import math

import pytest
import torch

from probes import auroc, code_sharing, codebook_metrics, mask_metrics, open_set_metrics, recall_at_k, segment_metrics

SEEDS = range(3)


def approx(value):
    return pytest.approx(value, abs=1e-6)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def values(metrics, *names):
    return [float(metrics[name]) for name in names]


def raises_naming(name):
    return pytest.raises(ValueError, match=rf"\b({name})\b")


# ------------------------------------------------------------------------------------------------ open_set_metrics

OPEN_SET = ("os_star", "os_star_class_mean", "unk", "hos")


def slow_open_set(confidence, prediction, target, num_known, threshold):
    hits, per_class, rejected, unknown = 0, {}, 0, 0
    for q, predicted, label in zip(confidence.tolist(), prediction.tolist(), target.tolist()):
        if label >= num_known:
            unknown += 1
            rejected += q < threshold
        else:
            hit = predicted == label and not q < threshold
            hits += hit
            per_class.setdefault(label, []).append(hit)
    os_star = hits / sum(map(len, per_class.values()))
    class_mean = sum(sum(hit) / len(hit) for hit in per_class.values()) / len(per_class)
    unk = rejected / unknown
    return [os_star, class_mean, unk, 2 * os_star * unk / (os_star + unk) if os_star + unk else 0.0]


def test_open_set_metrics_by_hand():
    # class 0: right, right, right but rejected, wrong; class 2: right exactly at the threshold; class 1 absent
    confidence = torch.tensor([0.9, 0.8, 0.4, 0.9, 0.5, 0.4, 0.5, 0.9])
    prediction = torch.tensor([0, 0, 0, 1, 2, 0, 1, 2])
    target = torch.tensor([0, 0, 0, 0, 2, 3, 4, 5])  # unknown: rejected, at the threshold, confident
    metrics = open_set_metrics(confidence, prediction, target, 3, 0.5)
    assert values(metrics, *OPEN_SET) == approx([3 / 5, (2 / 4 + 1) / 2, 1 / 3, 2 * 0.6 / 3 / (0.6 + 1 / 3)])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_open_set_metrics_equal_the_loop(seed, threshold, dtype):
    confidence = torch.randint(9, (200,), generator=generator(seed)).to(dtype) / 8  # many exactly at a threshold
    target = torch.randint(8, (200,), generator=generator(seed + 10))
    prediction = torch.where(torch.rand(200, generator=generator(seed)) < 0.7, target % 5, 4 - target % 5)
    arguments = confidence, prediction, target, 5, threshold
    assert values(open_set_metrics(*arguments), *OPEN_SET) == approx(slow_open_set(*arguments))


@pytest.mark.parametrize("prediction, threshold, expected", [
    ([0, 1, 0, 0], 0.0, [1, 1, 0, 0]),  # nothing rejected
    ([0, 1, 0, 0], 2.0, [0, 0, 1, 0]),  # everything rejected
    ([1, 0, 0, 0], 0.0, [0, 0, 0, 0]),  # both rates zero: no division by zero
])
def test_open_set_metrics_at_the_ends(prediction, threshold, expected):
    target = torch.tensor([0, 1, 2, 3])
    metrics = open_set_metrics(torch.full((4,), 0.5), torch.tensor(prediction), target, 2, threshold)
    assert values(metrics, *OPEN_SET) == expected


@pytest.mark.parametrize("target", [[0, 1, 1], [2, 3, 2]], ids=["no unknown", "no known"])
def test_open_set_metrics_stay_in_range_when_a_side_is_missing(target):
    metrics = open_set_metrics(torch.full((3,), 0.5), torch.tensor([0, 1, 1]), torch.tensor(target), 2, 0.6)
    assert all(0 <= value <= 1 for value in values(metrics, *OPEN_SET))


@pytest.mark.parametrize("shape", [(5,), (4, 1), (1, 4)])
@pytest.mark.parametrize("name", ["confidence", "prediction", "target"])
def test_open_set_metrics_reject_wrong_shapes(name, shape):
    arguments = {"confidence": torch.zeros(4), "prediction": torch.zeros(4, dtype=torch.int64),
                 "target": torch.zeros(4, dtype=torch.int64)}
    arguments[name] = arguments[name].new_zeros(shape)
    with raises_naming(name):
        open_set_metrics(**arguments, num_known=2, threshold=0.5)


# ------------------------------------------------------------------------------------------------- segment_metrics

SEGMENT = ("precision", "recall", "f1")


def test_segment_metrics_by_hand():
    scores = torch.tensor([[0.9, 0.5, 0.1], [0.6, 0.7, 0.2]])  # 0.5 is not above 0.5
    target = torch.tensor([[1, 1, 0], [0, 1, 1]])
    assert values(segment_metrics(scores, target), *SEGMENT) == approx([2 / 3, 2 / 4, 4 / 7])


@pytest.mark.parametrize("shape", [(7,), (30, 4), (5, 10, 4)])
@pytest.mark.parametrize("threshold", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.bool])
def test_segment_metrics_pool_all_entries(shape, threshold, dtype):
    scores = torch.randint(9, shape, generator=generator(0)) / 8
    target = (torch.rand(shape, generator=generator(1)) < 0.3).to(dtype)
    pairs = [(s > threshold, t > 0) for s, t in zip(scores.flatten().tolist(), target.flatten().tolist())]
    hits, predicted, positive = (sum(map(rule, pairs)) for rule in (all, lambda pair: pair[0], lambda pair: pair[1]))
    expected = [hits / predicted, hits / positive, 2 * hits / (predicted + positive)]
    assert values(segment_metrics(scores, target, threshold), *SEGMENT) == approx(expected)


@pytest.mark.parametrize("score, label", [(0.1, 1), (0.9, 0), (0.1, 0)])
def test_segment_metrics_are_zero_without_a_hit(score, label):
    metrics = segment_metrics(torch.full((3, 4), score), torch.full((3, 4), label))
    assert values(metrics, *SEGMENT) == [0, 0, 0]


@pytest.mark.parametrize("scores, target", [((4, 3), (4, 2)), ((4, 3), (3,)), ((2, 4, 3), (4, 3)), ((4, 3), (4, 1))])
def test_segment_metrics_reject_wrong_shapes(scores, target):
    with raises_naming("scores|target"):
        segment_metrics(torch.zeros(scores), torch.zeros(target))


# ----------------------------------------------------------------------------------------------------- recall_at_k


def slow_recall(query, database, query_group, database_group, k):
    successes = 0
    for vector, group in zip(query, query_group.tolist()):
        cosine = [float(vector @ entry / (vector.norm() * entry.norm())) for entry in database]
        best = sorted(range(len(database)), key=lambda i: -cosine[i])[:k]
        successes += any(int(database_group[i]) == group for i in best)
    return successes / len(query)


def test_recall_at_k_by_hand():
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    database = torch.tensor([[0.1, 0.0], [50.0, 50.0], [0.0, 0.2], [-9.0, 0.0]])  # the long one is not the closest
    groups = torch.tensor([7, 8, 8, 7])
    recall = [recall_at_k(query, database, torch.tensor([7, 7]), groups, k) for k in (1, 2, 3, 4)]
    assert recall == [0.5, 0.5, 1.0, 1.0]
    assert isinstance(recall[0], float)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("k", [1, 5, 10])
def test_recall_at_k_equals_the_loop(seed, k):
    query = torch.randn(25, 6, generator=generator(seed), dtype=torch.float64)
    database = torch.randn(40, 6, generator=generator(seed + 10), dtype=torch.float64)
    database *= 10 ** torch.linspace(-3, 4, 40, dtype=torch.float64)[:, None]
    query_group = torch.arange(25) % 12  # groups 10 and 11 have no entry: their queries fail
    arguments = query, database, query_group, torch.arange(40) % 10, k
    assert recall_at_k(*arguments) == approx(slow_recall(*arguments))
    assert recall_at_k(*(tensor.float() for tensor in arguments[:2]), *arguments[2:]) == approx(slow_recall(*arguments))


def test_recall_at_k_of_a_collapsed_space_is_not_perfect():
    """All entries tie; a rank that counts only strictly better entries would call every query a success."""
    assert recall_at_k(torch.ones(20, 4), torch.ones(20, 4), torch.arange(20), torch.arange(20), 5) <= 0.5


@pytest.mark.parametrize("change, name", [
    ({"database": (5, 4)}, "query|database"), ({"query": (3,)}, "query"), ({"database": (3,)}, "database"),
    ({"query_group": (4,)}, "query_group"), ({"query_group": (3, 1)}, "query_group"),
    ({"database_group": (4,)}, "database_group"), ({"database_group": (5, 1)}, "database_group"),
])
def test_recall_at_k_rejects_wrong_shapes(change, name):
    shapes = {"query": (3, 3), "database": (5, 3), "query_group": (3,), "database_group": (5,)} | change
    with raises_naming(name):
        recall_at_k(**{key: torch.ones(shape) for key, shape in shapes.items()}, k=1)


# ---------------------------------------------------------------------------------------------------- mask_metrics


def slow_mask_metrics(probability, target):
    frames = list(zip(probability.reshape(-1, *probability.shape[-2:]), target.reshape(-1, *probability.shape[-2:])))
    overlaps, curves = [], []
    for frame, truth in frames:
        pixels = [(p, t > 0) for p, t in zip(frame.flatten().tolist(), truth.flatten().tolist())]
        if not any(t for _, t in pixels):
            overlaps.append(sum(not p > 0.5 for p, _ in pixels) / len(pixels))
            continue
        overlaps.append(sum(p > 0.5 and t for p, t in pixels) / sum(p > 0.5 or t for p, t in pixels))
        curve = []
        for step in range(255):
            threshold = step / 254 * (1 - 1e-10)
            hits, found = sum(p >= threshold and t for p, t in pixels), sum(p >= threshold for p, _ in pixels)
            precision, recall = hits / max(found, 1), hits / sum(t for _, t in pixels)
            curve.append(1.3 * precision * recall / (0.3 * precision + recall) if hits else 0.0)
        curves.append(curve)
    return [sum(overlaps) / len(overlaps), max(sum(column) / len(curves) for column in zip(*curves))]


def test_mask_metrics_by_hand():
    probability = torch.tensor([[[0.9, 0.6], [0.5, 0.1]],   # found: two pixels, one of them right
                                [[0.7, 0.2], [0.3, 0.4]]])  # empty target: three pixels of four correctly empty
    target = torch.tensor([[[1, 0], [1, 0]], [[0, 0], [0, 0]]])
    # best threshold of the only frame with a mask is above 0.6: precision 1, recall 1/2 (at 0.5: 2/3, 1)
    expected = [(1 / 3 + 3 / 4) / 2, max(1.3 * 0.5 / (0.3 + 0.5), 1.3 * (2 / 3) / (0.3 * 2 / 3 + 1))]
    assert values(mask_metrics(probability, target), "miou", "f_score") == approx(expected)


@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 5), (2, 5, 4, 3)])
@pytest.mark.parametrize("dtype, target_dtype", [(torch.float32, torch.float32), (torch.float64, torch.int64),
                                                 (torch.float64, torch.bool)])
def test_mask_metrics_equal_the_loop(shape, dtype, target_dtype):
    probability = torch.rand(shape, generator=generator(0), dtype=torch.float64).to(dtype)
    target = torch.rand(shape, generator=generator(1)) < 0.4
    if len(shape) > 2:
        target.reshape(-1, *shape[-2:])[0] = False  # an empty frame counts in the overlap, not in the F-score
    expected = slow_mask_metrics(probability, target)
    assert values(mask_metrics(probability, target.to(target_dtype)), "miou", "f_score") == approx(expected)


def test_mask_metrics_average_the_curves_before_the_maximum():
    """Each frame alone is perfect at its own threshold; no single threshold suits both."""
    probability = torch.tensor([[[0.9, 0.8]], [[0.3, 0.2]]])
    target = torch.tensor([[[1, 0]], [[1, 0]]])
    half = 1.3 * 0.5 / (0.3 * 0.5 + 1)  # both pixels found, one right
    # thresholds up to 0.2: half, half; to 0.3: half, 1; to 0.8: half, 0; to 0.9: 1, 0
    assert values(mask_metrics(probability, target), "f_score") == approx([(half + 1) / 2])


@pytest.mark.parametrize("probability, expected", [(0.0, [1.0, 0.0]), (0.5, [1.0, 0.0]), (1.0, [0.0, 0.0])])
def test_mask_metrics_without_any_mask(probability, expected):
    metrics = mask_metrics(torch.full((2, 3, 3), probability), torch.zeros(2, 3, 3))
    assert values(metrics, "miou", "f_score") == expected


def test_mask_metrics_of_a_perfect_and_an_opposite_mask():
    target = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    assert values(mask_metrics(target, target), "miou", "f_score") == approx([1, 1])
    everything = 1.3 * 0.25 / (0.3 * 0.25 + 1)  # only threshold 0 finds the pixel, and every other with it
    assert values(mask_metrics(1 - target, target), "miou", "f_score") == approx([0, everything])


@pytest.mark.parametrize("probability, target", [((2, 3, 4), (2, 4, 3)), ((2, 3, 4), (3, 4)),
                                                 ((2, 3, 4), (2, 1, 4)), ((4,), (4,))])
def test_mask_metrics_reject_wrong_shapes(probability, target):
    with raises_naming("probability|target"):
        mask_metrics(torch.ones(probability), torch.ones(target))


# ---------------------------------------------------------------------------------------------------- code_sharing


def sharing(counts, share):
    metrics = code_sharing(counts, share)
    return [values(metrics, *(f"{kind}_{n + 1}" for n in range(len(counts)))) for kind in ("shared", "weighted")]


def slow_code_sharing(counts, share):
    classes = [sum(n / sum(column) >= share for n in column) for column in counts.T.tolist() if sum(column)]
    uses = [sum(column) for column in counts.T.tolist() if sum(column)]
    numbers = range(1, len(counts) + 1)
    return [[sum(c == n for c in classes) / len(classes) for n in numbers],
            [sum(use for use, c in zip(uses, classes) if c == n) / sum(uses) for n in numbers]]


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64])
def test_code_sharing_by_hand(dtype):
    # alone; exactly a tenth, so two share it; just below a tenth; never used; all three, the third exactly a tenth
    counts = torch.tensor([[5, 1, 1, 0, 33], [0, 9, 19, 0, 30], [0, 0, 0, 0, 7]], dtype=dtype)
    shared, weighted = sharing(counts, 0.1)
    assert shared == approx([2 / 4, 1 / 4, 1 / 4])
    assert weighted == approx([25 / 105, 10 / 105, 70 / 105])


@pytest.mark.parametrize("modalities", [2, 3, 4])
@pytest.mark.parametrize("share", [0.05, 0.1, 0.2, 0.8])  # at 0.8 a code may have no such modality
def test_code_sharing_equals_the_loop(modalities, share):
    counts = torch.randint(20, (modalities, 60), generator=generator(modalities))
    counts *= torch.rand(counts.shape, generator=generator(0)) < 0.6
    counts[:, :5] = 0
    for actual, expected in zip(sharing(counts, share), slow_code_sharing(counts, share)):
        assert actual == approx(expected)


def test_code_sharing_of_an_unused_codebook_is_zero():
    assert sharing(torch.zeros(2, 4), 0.1) == [[0, 0], [0, 0]]


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4)])
def test_code_sharing_rejects_wrong_shapes(shape):
    with raises_naming("counts"):
        code_sharing(torch.ones(shape), 0.1)


# ----------------------------------------------------------------------------------------------------------- auroc


@pytest.mark.parametrize("positive, negative, expected", [
    ([2.0, 3.0], [0.0, 1.0], 1.0), ([0.0], [1.0, 2.0], 0.0), ([1.0, 1.0], [1.0], 0.5), ([1.0, 3.0], [1.0, 2.0], 0.625),
])
def test_auroc_by_hand(positive, negative, expected):
    value = auroc(torch.tensor(positive), torch.tensor(negative))
    assert isinstance(value, float) and value == approx(expected)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("levels", [3, 10, None])  # None: no ties
def test_auroc_equals_the_double_loop(seed, levels):
    positive, negative = (torch.randn(n, generator=generator(seed + n), dtype=torch.float64) for n in (30, 45))
    positive += 0.5
    if levels:
        positive, negative = (positive * levels / 4).round(), (negative * levels / 4).round()
    wins = [(p > n) + 0.5 * (p == n) for p in positive.tolist() for n in negative.tolist()]
    assert auroc(positive, negative) == approx(sum(wins) / len(wins))


def test_auroc_is_exact_for_many_tied_float32_scores():
    positive, negative = (torch.randint(50, (n,), generator=generator(n)) / 50 for n in (3000, 2000))
    wins, ties = ((op(positive[:, None], negative)).sum().item() for op in (torch.gt, torch.eq))
    assert math.isclose(auroc(positive, negative), (wins + ties / 2) / 6_000_000, abs_tol=1e-9)


def test_codebook_metrics_by_counting():
    """Two of four segments agree; independent choices would agree if they fell on one code by chance."""
    index = {"audio": torch.tensor([[0, 0], [1, 2]]), "video": torch.tensor([[0, 1], [1, 1]])}
    tags, selections = codebook_metrics(index, 5)
    assert tags["agreement"] == 0.5 and tags["agreement_chance"] == approx(2 / 4 * 1 / 4 + 1 / 4 * 3 / 4)
    assert {m: row.tolist() for m, row in selections.items()} == {"audio": [2, 1, 1, 0, 0], "video": [1, 3, 0, 0, 0]}
    assert (tags["used_audio"], tags["used_video"]) == (3, 2)
    entropy = -(2 / 4 * math.log(2 / 4) + 2 * 1 / 4 * math.log(1 / 4))
    assert tags["perplexity_audio"] == approx(math.exp(entropy))

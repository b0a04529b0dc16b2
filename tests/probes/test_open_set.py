"""Thresholds of the open set: what sets them, that no label of the target does, and what pairs are good for."""
import math

import h5py
import numpy as np
import pytest
import torch

import pictures
import probes
from data import Features, InputError
from probes import Plan, paired_threshold
from toys import CPU

CLASSES, KNOWN, CLIPS, T, SIZE = 6, 3, 360, 6, 12
SHAPE = {"audio": (T, 1), "text": (T, 1)}


def write_pairs(path, seed=0, names=("audio", "text"), change=lambda h5: None) -> str:
    """Clips whose segments have one of two codes of their class, or, at random, a code of any class."""
    rng = np.random.default_rng(seed)
    label = np.arange(CLIPS) % CLASSES
    with h5py.File(path, "w") as h5:
        h5.attrs.update(format="cmg-features", version=1, name="pairs")
        for m in names:
            clear = rng.random((CLIPS, T)) < rng.uniform(0.85, 1, (CLIPS, 1))
            own, stray = 2 * label[:, None] + rng.integers(0, 2, (CLIPS, T)), rng.integers(0, SIZE, (CLIPS, T))
            code = np.where(clear, own, stray)
            h5[m] = code[..., None].astype(np.float32)
        h5["label"], h5["split"] = label, np.repeat([0, 1, 2], CLIPS // 3).astype(np.uint8)
        h5["id"], h5["classes"] = [str(i) for i in range(CLIPS)], [f"class {i}" for i in range(CLASSES)]
        change(h5)
    return str(path)


ROWS = 5 * torch.randn(SIZE, 24, generator=torch.Generator().manual_seed(0))


def encode(model, x, modality):
    """Text says the same as audio, but in a lower voice: its probe is less sure of everything."""
    index = x[..., 0].long()
    return (ROWS if modality == "audio" else 0.3 * ROWS)[index], index


def ask(path, target=None, pairs=None, score="softmax") -> tuple:
    """(plan after evaluation, {tag without `eval/`: value})"""
    files = [Features([p]) if p else None for p in (path, target, pairs)]
    plan = Plan(files[0], SHAPE, CPU, ("open_set",), (str(KNOWN),), score, files[1], pairs=files[2])
    tags = plan.evaluate(torch.nn.Module(), encode, SIZE)
    return plan, {tag.removeprefix("eval/"): value for tag, value in tags.items()}


@pytest.fixture(autouse=True)
def long_probes(monkeypatch):
    monkeypatch.setattr(probes, "EPOCHS", 100)


@pytest.fixture
def file(tmp_path):
    return write_pairs(tmp_path / "pairs.h5")


def thresholds_of(plan) -> dict:
    return {(*where, rule, score): value.item() for where, outcome in plan.outcomes.items()
            for rule, of_scores in outcome.thresholds.items() for score, value in of_scores.items()}


def test_the_threshold_is_the_one_that_agrees_best_with_the_source(file):
    """Anew, by loops, from confidences and predictions of both halves of the validation pairs."""
    plan, tags = ask(file)
    seen = {}
    with plan.probing(torch.nn.Module(), encode, SIZE):
        parts = plan.with_known([f"class {i}" for i in range(KNOWN)])
        train, held_out = [parts[name][parts[name].label < KNOWN] for name in ("train", "val")]
        codes = plan.codes(train, "audio")
        probe = probes.train_probe(probes.ClipProbe, KNOWN, codes, train.label)
        for m in SHAPE:
            of_pairs = plan.codes(plan.parts["val"], m)
            seen[m] = probes.known_scores(probe.logits(of_pairs), of_pairs, codes), probe.logits(of_pairs).argmax(-1)
        own = plan.codes(held_out, "audio")
        own = probes.known_scores(probe.logits(own), own, codes)
    for score in probes.SCORES:
        ascending = sorted(own[score].tolist())
        place = 0.05 * (len(ascending) - 1)
        low, rest = ascending[int(place)], place - int(place)
        at_source = low + rest * (ascending[int(place) + 1] - low)  # 5 % of the known clips are below
        (ours, said), (theirs, answer) = [[part[score] if i == 0 else part for i, part in enumerate(seen[m])]
                                          for m in ("audio", "text")]
        best = -1.0, None
        for threshold in sorted(set(theirs.tolist())):
            right, known, out, unknown = 0, 0, 0, 0
            for q, p, confident, word in zip(theirs.tolist(), answer.tolist(), ours.tolist(), said.tolist()):
                accepted = confident >= at_source
                known, unknown = known + accepted, unknown + (not accepted)
                right += accepted and q >= threshold and p == word
                out += not accepted and q < threshold
            os_star, unk = right / max(known, 1), out / max(unknown, 1)
            hos = 2 * os_star * unk / (os_star + unk) if os_star + unk else 0.0
            best = max(best, (hos, threshold), key=lambda pair: pair[0])
        found = plan.outcomes["open_set_3", "audio", "text"].thresholds
        assert found["hos"][score].item() == pytest.approx(best[1])
        assert found["hos_source"][score].item() == pytest.approx(at_source, rel=1e-5)


def test_pairs_find_a_threshold_near_the_best_one(file):
    _, tags = ask(file)
    assert tags["open_set_3/a2t/hos"] > tags["open_set_3/a2t/hos_oracle"] - 0.1
    assert tags["open_set_3/a2t/hos_source"] < tags["open_set_3/a2t/hos"] - 0.2  # text's confidences lie lower
    assert tags["open_set_3/a2t/auroc"] > 0.8


def test_no_label_of_the_target_sets_a_threshold_or_a_prediction(tmp_path, file):
    def permuted(h5):
        test = h5["split"][:] == 2
        h5["label"][test] = np.roll(h5["label"][test], 1)

    (a, first), (b, second) = ask(file), ask(write_pairs(tmp_path / "other.h5", change=permuted))
    assert first != second and thresholds_of(a) == thresholds_of(b)
    for where in a.outcomes:
        assert torch.equal(a.outcomes[where].prediction, b.outcomes[where].prediction)
        assert not torch.equal(a.outcomes[where].label, b.outcomes[where].label)


def test_no_test_clip_sets_a_threshold(tmp_path, file):
    def replaced(h5):
        rng, test = np.random.default_rng(9), np.flatnonzero(h5["split"][:] == 2)
        for m in SHAPE:
            h5[m][test] = rng.integers(0, SIZE, (len(test), T, 1)).astype("f4")

    (a, first), (b, second) = ask(file), ask(write_pairs(tmp_path / "other.h5", change=replaced))
    assert first != second and thresholds_of(a) == thresholds_of(b)


def test_of_the_pairs_no_label_is_looked_at(tmp_path):
    """Between two files; the pairs have other classes, or none."""
    audio, text = (write_pairs(tmp_path / f"{m}.h5", names=(m,)) for m in SHAPE)

    def unlabelled(h5):
        del h5["label"], h5["classes"], h5["split"]  # without a split all clips are taken

    def wrong(h5):
        h5["label"][:] = np.random.default_rng(1).permutation(h5["label"][:])

    pairs = {name: write_pairs(tmp_path / f"{name}.h5", seed=5, change=change)
             for name, change in (("right", lambda h5: None), ("wrong", wrong), ("none", unlabelled))}
    found = {name: ask(audio, text, path) for name, path in pairs.items()}
    assert found["right"][1] == found["wrong"][1]
    assert thresholds_of(found["right"][0]) == thresholds_of(found["wrong"][0]) != thresholds_of(found["none"][0])
    assert len(found["right"][0].pairs) == CLIPS // 3 and len(found["none"][0].pairs) == CLIPS
    for plan, tags in found.values():
        assert tags["open_set_3/a2t/hos"] > tags["open_set_3/a2t/hos_source"] + 0.2


def test_a_threshold_is_never_found_on_test_clips_of_the_pairs(tmp_path):
    def of(splits):
        def change(h5):
            h5["split"][:] = np.resize(splits, CLIPS)
        return change

    audio, text = (write_pairs(tmp_path / f"{m}.h5", names=(m,)) for m in SHAPE)
    some = write_pairs(tmp_path / "some.h5", seed=5, change=of([0, 2, 2]))
    plan, _ = ask(audio, text, some)
    assert plan.pairs.index.tolist() == list(range(0, CLIPS, 3))
    with pytest.raises(InputError, match="--pairs .*none.h5 holds test clips alone"):
        ask(audio, text, write_pairs(tmp_path / "none.h5", seed=5, change=of([2])))


@pytest.mark.parametrize("wrong", range(3))
def test_the_paired_threshold_wants_as_many_of_each(wrong):
    arguments = [torch.zeros(4 + (i == wrong)) for i in range(3)]
    with pytest.raises(ValueError, match="source_prediction, target_confidence, target_prediction"):
        paired_threshold(torch.ones(4, dtype=bool), *arguments, 3)


def test_without_pairs_there_is_no_hos_and_the_table_says_so(tmp_path):
    audio, text = (write_pairs(tmp_path / f"{m}.h5", names=(m,)) for m in SHAPE)
    _, tags = ask(audio, text)
    assert "open_set_3/a2t/hos_source" in tags and "open_set_3/a2t/hos" not in tags
    assert not [tag for tag in tags if tag.split("/")[-1] in ("hos", *(f"hos_{score}" for score in probes.SCORES))]
    shown = pictures.table({f"eval/{tag}": value for tag, value in tags.items()}, probes.SCORES)
    assert "hos_source" in shown and "no pairs" in shown and "--pairs" in shown
    with_hos = {"eval/open_set_3/a2t/hos_source": 1.0, "eval/open_set_3/a2t/hos": 0.77}
    assert "no pairs" not in pictures.table(with_hos)
    some = pictures.table({"eval/open_set_3/v2t/hos_source": 1.0, **with_hos})  # pairs of one direction alone
    assert "no pairs" in some and "77.0" in some


def test_pairs_must_fit_the_model(tmp_path, file):
    def wide(h5):
        del h5["text"]
        h5["text"] = np.zeros((CLIPS, T, 2), "f4")

    with pytest.raises(InputError, match="wide.h5: text has shape"):
        ask(file, pairs=write_pairs(tmp_path / "wide.h5", change=wide))
    with pytest.raises(InputError, match="single.h5 holds no two modalities of a direction, but audio"):
        ask(file, pairs=write_pairs(tmp_path / "single.h5", names=("audio",)))


def test_each_score_has_its_own_threshold_and_figures(file):
    found = {score: ask(file, score=score) for score in probes.SCORES}
    for score, (plan, tags) in found.items():
        for way in ("a2t", "t2a"):
            for name in ("hos", "hos_source", "auroc"):
                shown = tags[f"open_set_3/{way}/{name}"]
                assert all(other[f"open_set_3/{way}/{name}_{score}"] == shown for _, other in found.values())
            outcome = plan.outcomes[("open_set_3", *{"a2t": ("audio", "text"), "t2a": ("text", "audio")}[way])]
            threshold = outcome.thresholds["hos"][score].item()
            want = probes.open_set_metrics(outcome.scores[score], outcome.prediction, outcome.label, KNOWN, threshold)
            for name, value in want.items():
                assert tags[f"open_set_3/{way}/{name}"] == value
            assert tags[f"open_set_3/{way}/acc_known"] == probes.open_set_metrics(
                outcome.scores[score], outcome.prediction, outcome.label, KNOWN, -math.inf)["os_star"]
    first = found["softmax"][0].outcomes["open_set_3", "audio", "text"].thresholds
    assert all(len({round(value.item(), 4) for value in rule.values()}) == 4 for rule in first.values())


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_source_rejects_the_least_sure_of_its_own(file, monkeypatch, share):
    monkeypatch.setattr(probes, "REJECT", share)
    plan, _ = ask(file)
    parts = plan.with_known([f"class {i}" for i in range(KNOWN)])
    with plan.probing(torch.nn.Module(), encode, SIZE):
        train, held_out = [parts[name][parts[name].label < KNOWN] for name in ("train", "val")]
        seen, own = plan.codes(train, "audio"), plan.codes(held_out, "audio")
        probe = probes.train_probe(probes.ClipProbe, KNOWN, seen, train.label)
        scores = probes.known_scores(probe.logits(own), own, seen)
    for name, threshold in plan.outcomes["open_set_3", "audio", "text"].thresholds["hos_source"].items():
        assert (scores[name] < threshold).float().mean().item() <= share
        assert (scores[name] <= threshold).float().mean().item() >= share


def test_a_source_that_rejects_no_pair_makes_the_target_accept_all():
    confidence, prediction = torch.rand(20), torch.randint(3, (20,))
    threshold = paired_threshold(torch.ones(20, dtype=bool), prediction, confidence, prediction, 3)
    assert (confidence >= threshold).all()

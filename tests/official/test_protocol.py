"""The published protocol: its metrics by hand, what its probes train on, and the epoch and threshold that it picks."""
import copy
import itertools
import math

import h5py
import numpy as np
import pytest
import torch

import probes
from data import Features
from official import protocol
from run import InputError
from toys import (ABC, MEANING, NAMES, Noisy, ask, ask_sides, codes_of, go, honest, write_side, write_sides, write_toy)

pytestmark = pytest.mark.official
PAPER = {"classification": {"epochs": 60, "learning_rate": 1e-2, "batch_size": 80, "metric": "acc"},
         "open_set": {"epochs": 60, "learning_rate": 1e-2, "batch_size": 80, "metric": "hos"},
         "localization": {"epochs": 60, "learning_rate": 1e-2, "batch_size": 80, "metric": "f1", "widths": (1,)}}


def test_batch_metrics_average_batches_before_f1():
    """Batches of two clips and one: precision 1 and 1/2 with weights 2 and 1, recall 1/2 and 1."""
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.3], [0.8, 0.7]])
    target = torch.tensor([[1, 0], [0, 1], [1, 0]])
    found = protocol.batch_segment_metrics(scores, target, 2)
    precision, recall = (2 * 1 + 0.5) / 3, (2 * 0.5 + 1) / 3
    assert found == pytest.approx({"precision": precision, "recall": recall,
                                   "f1": 2 * precision * recall / (precision + recall)})
    assert protocol.batch_segment_metrics(torch.zeros(3, 2), target, 2) == {"precision": 0, "recall": 0, "f1": 0}


def test_macro_precision_of_batches():
    prediction, target = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 1])
    # first three: class 0 half right, class 1 right; the last: class 2 wrong
    assert protocol.macro_precision(prediction, target, 3) == pytest.approx((3 * 0.75 + 0) / 4)
    assert protocol.macro_precision(prediction, target, 4) == pytest.approx((0.5 + 1 + 0) / 3)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("levels", [3, 1000])  # many ties, few
def test_thresholds_equal_the_loop(seed, levels):
    """Ten even steps from the least to the greatest confidence."""
    rng = torch.Generator().manual_seed(seed)
    confidence = torch.randint(levels, (60,), generator=rng) / levels
    prediction, target = (torch.randint(n, (60,), generator=rng) for n in (4, 7))

    def hos(threshold):
        right = sum(q >= threshold and p == y for q, p, y in zip(confidence, prediction, target) if y < 4)
        out = sum(q < threshold for q, y in zip(confidence, target) if y >= 4)
        os_star, unk = right / (target < 4).sum().item(), out / (target >= 4).sum().item()
        return float(2 * os_star * unk / (os_star + unk)) if os_star + unk else 0.0

    low, high = confidence.min().item(), confidence.max().item()
    sweep = [hos(threshold) for threshold in torch.linspace(low, high, 10, dtype=torch.double).tolist()]
    found = protocol.best_threshold(confidence.double(), prediction, target, 4)
    assert found["hos"] == pytest.approx(max(sweep)) and sweep[0] == 0  # at the least one nothing is rejected
    assert found["hos"] <= probes.hos_curve(confidence, prediction, target, 4)[1].max() + 1e-6


def test_the_released_sweep_by_hand():
    """Confidences 0, 1, .. 9: the steps of the sweep. The four surest clips are known, one of them is taken wrong."""
    confidence, target = torch.arange(10).double(), torch.tensor([2, 2, 2, 2, 2, 2, 0, 1, 0, 1])
    prediction = torch.tensor([0, 0, 0, 0, 0, 0, 0, 1, 1, 1])
    found = protocol.best_threshold(confidence, prediction, target, 2)
    assert found["os_star"] == 0.75 and found["unk"] == 1  # at 6, the unknown ones are out
    same = protocol.best_threshold(torch.ones(10), prediction, target, 2)  # one threshold, none rejected
    assert same == {"os_star": 0.75, "os_star_class_mean": 0.75, "unk": 0, "hos": 0}
    wrong = protocol.best_threshold(torch.ones(10), 1 - prediction, target, 2)  # nothing right and nothing rejected
    assert wrong["os_star"] == 0.25 and wrong["hos"] == 0


def test_segment_loss():
    torch.manual_seed(0)
    probe, codes = protocol.FadingSegmentProbe(6, 2, (6,)), codes_of([[1, 5], [7, 2]])
    probe.alpha.data = torch.tensor([0.1, 0.5, -0.2])
    target = torch.tensor([[[1, 0, 0], [0, 0, 1]], [[1, 1, 0], [0, 1, 0]]]).float()
    logits, binary, second = probe(codes), 0, 0
    for clip, t in itertools.product(range(2), range(2)):
        total = sum(math.exp(v) for v in logits[clip, t].tolist())
        for c, v in enumerate(logits[clip, t].tolist()):
            y = target[clip, t, c].item()
            binary -= math.log(1 / (1 + math.exp(-v if y else v))) / 12
            second -= y * (v - math.log(total)) * math.exp(-probe.alpha[c].item()) / 4
    assert probe.loss(codes, target).item() == pytest.approx(binary + second, rel=1e-5)
    plain = probes.SegmentProbe(6, 2)
    plain.load_state_dict({k: v for k, v in probe.state_dict().items() if k != "alpha"})
    assert plain.loss(codes, target).item() == pytest.approx(binary, rel=1e-5)


def test_the_fading_weights_learn_unclipped(toy, monkeypatch):
    runs, original = set(), probes.ProbeTraining.epoch
    monkeypatch.setattr(probes.ProbeTraining, "epoch", lambda run, *args: runs.add(run) or original(run, *args))
    ask(toy, "localization", modalities=("audio", "video"), paper=PAPER)
    assert len(runs) == 2
    for run in runs:
        assert [p.shape for p in run.clipped] == [p.shape for p in run.probe.layers.parameters()]
        assert (run.probe.alpha > 0.1).all()  # less weight for the second loss


@pytest.fixture
def toy(tmp_path):
    return write_toy(tmp_path / "toy.h5")


def test_paper_localisation_keeps_the_best_epoch(toy, monkeypatch):
    calls = itertools.count(1)
    monkeypatch.setattr(protocol, "batch_segment_metrics", lambda scores, target, size: dict.fromkeys(
        ("precision", "recall", "f1"), 1 / next(calls)))  # worse and worse
    tags = ask(toy, "localization", modalities=("audio", "video"), paper=protocol.paper_settings("micu", 0))
    assert tags["localization/a2v/f1_paper"] == 1 and tags["localization/v2a/f1_paper"] == pytest.approx(1 / 31)


@pytest.fixture
def sides(tmp_path):
    return write_sides(tmp_path)


def test_a_target_of_its_own_is_scored_on_all_its_clips_of_common_classes(sides, monkeypatch):
    scored, original = [], protocol.accuracy
    monkeypatch.setattr(protocol, "accuracy", lambda p, y: scored.append(y.tolist()) or original(p, y))
    tags = ask_sides(sides, "classification", paper=PAPER)
    assert tags == {"classification/a2t/acc_paper": 1}
    numbers = {"three": 2, "One": 0, "two": 1}
    assert scored[0] == [numbers[NAMES[i % 5]] for i in range(50) if NAMES[i % 5] in numbers]


def test_without_a_target_classification_is_scored_on_the_training_clips(toy, monkeypatch):
    scored, original = [], protocol.accuracy
    monkeypatch.setattr(protocol, "accuracy", lambda p, y: scored.append(y.tolist()) or original(p, y))
    ask(toy, "classification", modalities=("audio", "text"), paper=PAPER)
    features = Features([toy])
    assert scored[0] == features.label[features.single_event(features.clips("train"))].tolist()


def test_open_set_on_a_target_of_its_own(sides):
    tags = ask_sides(sides, "open_set", known=("0,2",), paper=PAPER)
    assert set(tags) == {f"open_set_0,2/a2t/{name}_paper" for name in ("os_star", "unk", "hos")}
    assert tags["open_set_0,2/a2t/hos_paper"] > 0.7


def test_localisation_on_a_target_of_its_own(sides):
    """Clips in which nothing known happens are left out, as in AVE to AVVP."""
    assert ask_sides(sides, "localization", paper=PAPER)["localization/a2t/f1_paper"] == 1


@pytest.fixture
def side(tmp_path):
    """`side(modality, names, label, split, change)`: a file of one modality, `change` edits it."""
    count = itertools.count()

    def make(modality, names, label, split, change=lambda h5: None):
        path = write_side(tmp_path / f"side{next(count)}.h5", modality, names, MEANING, np.asarray(label),
                          np.asarray(split))
        with h5py.File(path, "r+") as h5:
            change(h5)
        return path
    return make


def test_released_lists_without_splits_do_for_the_paper_s_protocol(side):
    source, target = (side(m, ABC, np.arange(60) % 3, [0] * 60) for m in ("audio", "text"))
    assert go(source, target, "classification", paper=PAPER)["classification/a2t/acc_paper"] == 1
    with pytest.raises(InputError, match="no labelled test clips"):
        go(source, target, "classification")


@pytest.mark.parametrize("origins, epochs", [(("A", "A"), 2), (("A", "B"), 3)])
def test_the_release_has_settings_of_its_own_for_another_data_set(side, origins, epochs, monkeypatch):
    passes, original = [], probes.ProbeTraining.epoch
    monkeypatch.setattr(probes.ProbeTraining, "epoch", lambda *args: passes.append(1) or original(*args))
    paths = [side(m, ABC, np.arange(60) % 3, [0] * 60, lambda h5: h5.attrs.update(source=origin))
             for m, origin in zip(("audio", "text"), origins)]
    paper = {"classification": PAPER["classification"] | {"epochs": 1}}
    paper |= {f"classification_{kind}": paper["classification"] | {"epochs": n} for kind, n in
              (("target", 2), ("across", 3))}
    go(*paths, "classification", paper=paper)
    assert len(passes) == epochs


def test_what_the_released_probes_are_trained_on(toy, monkeypatch):
    """Codes with dropout, of the known classes' clips with one event, each beside its own label."""
    encoded, trained, original = [], [], probes.ProbeTraining.epoch
    model = Noisy()

    def encode(model, x, modality):
        encoded.append(model.training)
        return honest(model, x, modality)

    def epoch(run, codes, target):
        trained.append((codes.index, target))
        original(run, codes, target)

    monkeypatch.setattr(probes.ProbeTraining, "epoch", epoch)
    ask(toy, "classification", "open_set", known=("2",), encode=encode, model=model, paper=PAPER,
        modalities=("text", "audio"))
    assert sum(encoded) == 2 * protocol.DROPOUT_DRAWS and len(encoded) > sum(encoded)
    features = Features([toy])
    label = torch.from_numpy(features.label[features.single_event(features.clips("train"))])
    assert 0 < len(label) < 48
    expected = [label, label[label < 2]]
    for index, target in [call for call in trained if (call[0] == call[0][:, :1]).all()]:  # text says it throughout
        assert any(torch.equal(target, e) for e in expected) and torch.equal(index[:, 0] - 1, target)
    assert {len(target) for _, target in trained} == {len(e) for e in expected}


def test_the_released_probes_report_their_best_epoch(toy, monkeypatch):
    calls = itertools.count(1)
    monkeypatch.setattr(protocol, "accuracy", lambda prediction, target: {"acc": 1 / next(calls)})  # worse and worse
    monkeypatch.setattr(protocol, "best_threshold", lambda *args: dict.fromkeys(("os_star", "unk", "hos"),
                                                                               1 / next(calls)))
    tags = ask(toy, "classification", modalities=("audio", "text"), paper=PAPER)
    assert tags == {"classification/a2t/acc_paper": 1, "classification/t2a/acc_paper": 1 / 61}
    tags = ask(toy, "open_set", known=("2",), modalities=("audio", "text"), paper=PAPER)
    assert tags["open_set_2/a2t/hos_paper"] == 1 / 121 and tags["open_set_2/t2a/os_star_paper"] == 1 / 181


def test_the_released_settings():
    table = {name: protocol.paper_settings(name, 6) for name in ("micu", "uni_code", "codaar")}
    shown = {(name, task): tuple(setting.values()) for name, tasks in table.items() for task, setting in tasks.items()}
    assert shown == {
        ("micu", "classification"): (24, 4e-4, 80, "acc"), ("uni_code", "classification"): (24, 4e-4, 80, "acc"),
        ("codaar", "classification"): (24, 2.5e-4, 256, "macro_precision"),
        ("micu", "classification_across"): (34, 4e-4, 80, "acc"),
        ("codaar", "classification_across"): (24, 4e-4, 80, "acc"),
        ("micu", "localization"): (24, 4e-4, 80, "f1", (1,)),
        ("uni_code", "localization"): (44, 4e-4, 80, "precision", (1,)),
        ("uni_code", "localization_across"): (44, 4e-4, 80, "f1", (1,)),
        ("codaar", "localization"): (44, 4e-4, 64, "precision", (1, 2, 2)),
        ("codaar", "localization_across"): (24, 4e-4, 80, "f1", (1,)),
        **{(name, "open_set"): (19, 4e-4, 80, "hos") for name in table},
        **{(name, "open_set_target"): (10, 4e-4, 80, "hos") for name in table}}


def test_macro_precision_is_of_shuffled_batches(toy, monkeypatch):
    scored, original = [], protocol.macro_precision
    monkeypatch.setattr(protocol, "macro_precision",
                        lambda p, y, size: scored.append((y, size)) or original(p, y, size))
    tags = ask(toy, "classification", modalities=("audio", "text"), paper=protocol.paper_settings("codaar", 29))
    assert set(tags) == {f"classification/{way}/macro_precision_paper" for way in ("a2t", "t2a")}
    features = Features([toy])
    label = torch.from_numpy(features.label[features.single_event(features.clips("train"))])
    order = torch.randperm(len(label), generator=torch.Generator().manual_seed(0))
    assert [size for _, size in scored] == [256, 256] and all(torch.equal(y, label[order]) for y, _ in scored)


def test_an_open_set_needs_no_held_out_clips(tmp_path):
    path = write_toy(tmp_path / "noval.h5", lambda h5, split: h5["split"].__setitem__(slice(None), split // 2 * 2))
    assert "open_set_2/a2t/hos_paper" in ask(path, known=("2",), paper=PAPER)
    with pytest.raises(InputError, match="labelled val clips"):
        ask(path, "open_set", known=("2",))


@pytest.mark.parametrize("training", [True, False])
def test_the_model_and_the_random_state_stay(toy, training):
    model = Noisy().train(training)
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first = ask(toy, *protocol.TASKS, encode=model.encode, model=model, paper=PAPER)
    assert model.training is model.dropout.training is training and before == model.state_dict()
    assert torch.equal(torch.get_rng_state(), rng)
    torch.rand(3)
    assert ask(toy, *protocol.TASKS, encode=model.encode, model=model.eval(), paper=PAPER) == first


def test_tasks_do_not_touch_each_other(toy):
    model = Noisy()
    settings = {"encode": model.encode, "model": model, "known": (2,), "paper": PAPER}
    every = ask(toy, *protocol.TASKS, **settings)
    alone = [ask(toy, task, **settings) for task in protocol.TASKS]
    assert every == alone[0] | alone[1] | alone[2]

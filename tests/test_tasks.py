"""The tasks of probes.py: metrics by hand, probes against their formulas, and tasks on codes whose answer is known."""
import itertools
import json
import math

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import codaar
import micu
import probes
import uni_code
from conftest import edit, run_folder, run_here
from data import Features, InputError
from probes import Codes

CPU = torch.device("cpu")


def codes_of(index, width=6, size=20):
    rows = torch.randn(size, width, generator=torch.Generator().manual_seed(0))
    return Codes(rows, torch.as_tensor(index))


# ------------------------------------------------------------------------------------------------------------- metrics
def test_batch_metrics_average_batches_before_f1():
    """Batches of two clips and one: precision 1 and 1/2 with weights 2 and 1, recall 1/2 and 1."""
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.3], [0.8, 0.7]])
    target = torch.tensor([[1, 0], [0, 1], [1, 0]])
    found = probes.batch_segment_metrics(scores, target, 2)
    precision, recall = (2 * 1 + 0.5) / 3, (2 * 0.5 + 1) / 3
    assert found == pytest.approx({"precision": precision, "recall": recall,
                                   "f1": 2 * precision * recall / (precision + recall)})
    assert probes.batch_segment_metrics(torch.zeros(3, 2), target, 2) == {"precision": 0, "recall": 0, "f1": 0}


def test_floor_of_localisation():
    target = torch.tensor([[[1, 0, 0], [0, 0, 1]], [[1, 0, 0], [0, 1, 0]]])  # columns are there 2, 1 and 1 of 4 times
    assert probes.constant_f1(target) == pytest.approx({"f1_constant": 0.5, "f1_everything": 2 * 4 / 12 / (4 / 12 + 1)})


def test_macro_precision_of_batches():
    prediction, target = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 1])
    # first three: class 0 half right, class 1 right; the last: class 2 wrong
    assert probes.macro_precision(prediction, target, 3) == pytest.approx((3 * 0.75 + 0) / 4)
    assert probes.macro_precision(prediction, target, 4) == pytest.approx((0.5 + 1 + 0) / 3)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("levels", [3, 1000])  # many ties, few
def test_thresholds_equal_the_loop(seed, levels):
    """MICU's released sweep takes 10 even steps from the least to the greatest confidence, the oracle every value."""
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
    found = probes.best_threshold(confidence.double(), prediction, target, 4)
    assert found["hos"] == pytest.approx(max(sweep)) and sweep[0] == 0  # at the least one nothing is rejected
    every = [hos(threshold) for threshold in confidence.tolist()]
    assert probes.oracle_hos(confidence, prediction, target, 4) == pytest.approx(max(every))
    assert found["hos"] <= max(every) + 1e-6


def test_the_released_sweep_by_hand():
    """Confidences 0, 1, .. 9: the steps of the sweep. The four surest clips are known, one of them is taken wrong."""
    confidence, target = torch.arange(10).double(), torch.tensor([2, 2, 2, 2, 2, 2, 0, 1, 0, 1])
    prediction = torch.tensor([0, 0, 0, 0, 0, 0, 0, 1, 1, 1])
    found = probes.best_threshold(confidence, prediction, target, 2)
    assert found["os_star"] == 0.75 and found["unk"] == 1  # at 6, the unknown ones are out
    same = probes.best_threshold(torch.ones(10), prediction, target, 2)  # all ten thresholds are one, none is rejected
    assert same == {"os_star": 0.75, "os_star_class_mean": 0.75, "unk": 0, "hos": 0}
    wrong = probes.best_threshold(torch.ones(10), 1 - prediction, target, 2)  # nothing right and nothing rejected
    assert wrong["os_star"] == 0.25 and wrong["hos"] == 0


def test_metrics_equal_scikit_learn():
    theirs, rng = pytest.importorskip("sklearn.metrics"), torch.Generator().manual_seed(0)
    target, prediction = (torch.randint(5, (200,), generator=rng) for _ in range(2))
    ours = probes.accuracy(prediction, target)
    assert ours["acc"] == pytest.approx(theirs.accuracy_score(target, prediction))
    assert ours["macro_recall"] == pytest.approx(theirs.balanced_accuracy_score(target, prediction))
    score = torch.randint(9, (200,), generator=rng) / 9  # with ties
    assert probes.auroc(score[target < 2], score[target >= 2]) == pytest.approx(theirs.roc_auc_score(target < 2, score))
    scores, multi = torch.rand(40, 6, generator=rng), (torch.rand(40, 6, generator=rng) < 0.3).float()
    pooled = theirs.precision_recall_fscore_support(multi.flatten(), scores.flatten() > 0.5, average="binary")[:3]
    assert probes.segment_metrics(scores, multi) == pytest.approx(dict(zip(("precision", "recall", "f1"), pooled)))
    assert probes.macro_precision(prediction, target, 200) == pytest.approx(
        theirs.precision_score(target, prediction, average="macro"))
    mask, drawn = torch.rand(3, 7, 7, generator=rng) < 0.4, torch.rand(3, 7, 7, generator=rng)
    iou = [theirs.jaccard_score(t.flatten(), d.flatten() > 0.5) for t, d in zip(mask, drawn)]
    assert probes.mask_iou(drawn, mask).tolist() == pytest.approx(iou)


# -------------------------------------------------------------------------------------------------------------- probes
@pytest.mark.parametrize("widths", [(6,), (6, 3, 3)])
def test_segment_probe_sees_every_segment_on_its_own(widths):
    torch.manual_seed(0)
    probe, codes = probes.SegmentProbe(6, 4, widths, True), codes_of([[1, 5, 5], [7, 1, 2]])
    assert len(probe.layers) == len(widths) + 1
    logits = probe(codes)
    for clip, segment in itertools.product(range(2), range(3)):
        x = codes.rows[codes.index[clip, segment]]
        for layer in probe.layers:
            x = layer.weight @ x + layer.bias
        assert torch.allclose(logits[clip, segment], x, atol=1e-6)


def test_segment_loss():
    torch.manual_seed(0)
    probe, codes = probes.SegmentProbe(6, 2, (6,), True), codes_of([[1, 5], [7, 2]])
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
    plain = probes.SegmentProbe(6, 2, (6,), False)
    plain.load_state_dict({k: v for k, v in probe.state_dict().items() if k != "alpha"})
    assert plain.loss(codes, target).item() == pytest.approx(binary, rel=1e-5)


def test_the_fading_weights_learn_unclipped():
    run = probes.ProbeTraining(lambda: probes.SegmentProbe(6, 2, (6,), True), CPU)
    assert [p.shape for p in run.clipped] == [p.shape for p in run.probe.layers.parameters()]
    target = torch.tensor([[[1, 0, 0], [0, 0, 1]], [[1, 1, 0], [0, 1, 0]]]).float()
    run.epoch(codes_of([[1, 5], [7, 2]]), target)
    assert (run.probe.alpha > 0.1).all()  # less weight for the second loss


def test_known_scores():
    codes, seen, logits = codes_of([[1, 5], [7, 2]]), codes_of([[5, 5], [3, 2]]), torch.randn(2, 4)
    scores = probes.known_scores(logits, codes, seen)
    for i, row in enumerate(logits.tolist()):
        total = sum(map(math.exp, row))
        far = [min((codes.rows[k] - codes.rows[s]).norm().item() for s in (5, 3, 2)) for k in codes.index[i].tolist()]
        expected = {"softmax": math.exp(max(row)) / total, "logit": max(row), "energy": math.log(total),
                    "distance": -sum(far) / 2}
        assert {name: value[i].item() for name, value in scores.items()} == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_mean_codes():
    codes = codes_of([[1, 5, 5], [7, 1, 2]])
    where = torch.tensor([[True, False, True], [False, False, False]])
    rows = codes.rows
    assert torch.allclose(codes.mean(), torch.stack([(rows[1] + 2 * rows[5]) / 3, (rows[7] + rows[1] + rows[2]) / 3]))
    assert torch.allclose(codes.mean(where), torch.stack([(rows[1] + rows[5]) / 2, (rows[7] + rows[1] + rows[2]) / 3]))


# --------------------------------------------------------------------------------------------------------------- tasks
CLIPS, T, CLASSES = 96, 4, 3


def write_toy(path, change=lambda h5, split: None) -> str:
    """A file of three modalities that say their clip's class where its event happens; video draws it in one cell, and
    in half of the clips the next class in another. `change` edits the open file."""
    rng, label, split = np.random.default_rng(0), np.arange(CLIPS) % CLASSES, np.repeat([0, 1, 2], [48, 12, 36])
    happens = {m: rng.random((CLIPS, T)) < 0.6 for m in ("audio", "video")}
    here = rng.permuted(np.tile(np.arange(25), (CLIPS, T, 1)), axis=2)[..., :2]  # of the event, of the other
    two, other = np.arange(CLIPS) // 3 % 2 == 0, (label + 1) % CLASSES
    first, second = (np.arange(25) == here[..., i, None] for i in range(2))  # (N, T, 25)
    second &= two[:, None, None]
    video = first[..., None] * np.eye(8)[label][:, None, None] + second[..., None] * np.eye(8)[other][:, None, None]
    mask = first * (label + 1)[:, None, None] + second * (other + 1)[:, None, None]
    classes = np.eye(CLASSES)[label] + two[:, None] * np.eye(CLASSES)[other]
    with h5py.File(path, "w") as h5:
        h5.attrs.update(format="cmg-features", version=1, name="toy")
        h5["audio"] = np.where(happens["audio"], label[:, None] + 1, 0)[..., None].astype(np.float32)
        h5["text"] = np.broadcast_to(label[:, None, None] + 1, (CLIPS, T, 1)).astype(np.float32)
        h5["video"] = video.reshape(CLIPS, T, 5, 5, 8).astype(np.float32)
        h5["mask"] = mask.reshape(CLIPS, T, 5, 5).repeat(2, 2).repeat(2, 3).astype(np.uint8)
        h5["label"], h5["split"] = label, split.astype(np.uint8)
        h5["id"], h5["classes"] = [str(i) for i in range(CLIPS)], ["one", "two", "three"]
        h5["events/audio"] = (happens["audio"][..., None] * np.eye(CLASSES)[label][:, None]).astype(np.uint8)
        h5["events/video"] = (happens["video"][..., None] * classes[:, None]).astype(np.uint8)
        change(h5, split)
    return str(path)


@pytest.fixture
def toy(tmp_path):
    return write_toy(tmp_path / "toy.h5")


ROWS = torch.randn(CLASSES + 1, 32, generator=torch.Generator().manual_seed(0))
BLUR = {"audio": 0.0, "text": 0.2, "video": 0.4}  # codes of one meaning are near each other, not the same


def honest(model, x, modality):
    """The code is the class where the modality says it, else code 0; video always says the first class it shows."""
    index = x[..., 0].long() if x.dim() == 3 else x.sum((2, 3)).argmax(-1) + 1
    rows = ROWS + BLUR[modality] * torch.randn(ROWS.shape, generator=torch.Generator().manual_seed(1))
    return rows[index], index


def ask(path, *tasks, encode=honest, protocols=("clean",), known=(), score="softmax", modalities=tuple(BLUR),
        model=None, paper=micu.paper_settings(0), target=None, class_map=(), size=CLASSES + 1):
    features, target = Features([path]), Features([target]) if target else None
    shape = {m: (T, 5, 5, 8) if m == "video" else (T, 1) for m in modalities}
    probes.check_request(features, shape, tasks, protocols, known, target, class_map)
    tags, _ = probes.evaluate(model or torch.nn.Module(), encode, features, list(modalities), size, CPU,
                              tasks, protocols, known, score, paper, target, class_map)
    return {tag.removeprefix("eval/"): value for tag, value in tags.items()}


def test_localisation_is_trained_on_one_and_tested_on_the_other(tmp_path, toy, monkeypatch):
    """Audio's codes tell when and what: perfect on audio's events, and only chance tells when video's happen."""
    monkeypatch.setattr(probes, "EPOCHS", 300)
    made, probe = [], probes.SegmentProbe
    monkeypatch.setattr(probes, "SegmentProbe", lambda *args: made.append(args) or probe(*args))
    for m in ("voice", "video"):
        monkeypatch.setitem(BLUR, m, 0.0)

    def single(h5, split):  # video with the first event only, and audio once more
        h5["events/video"][:] = h5["events/video"][:] * np.eye(CLASSES)[h5["label"][:]][:, None]
        h5["video"][:] = h5["video"][:] * np.eye(8)[h5["label"][:]][:, None, None, None]
        h5["voice"], h5["events/voice"] = h5["audio"][:], h5["events/audio"][:]

    path = write_toy(tmp_path / "single.h5", single)
    paper = {"localization": {"epochs": 200, "learning_rate": 1e-2, "batch_size": 80, "metric": "f1", "widths": (1, 2)}}
    tags = ask(path, "localization", modalities=("audio", "voice", "video"), protocols=("clean", "paper"), paper=paper)
    assert tags["localization/audio2voice/f1"] == tags["localization/audio2voice/f1_foreground"] == 1
    with h5py.File(path) as h5:
        heard, true = (h5[f"events/{m}"][:].any(-1)[h5["split"][:] == 2].mean() for m in ("audio", "video"))
    assert abs(heard - true) > 0.005
    assert tags["localization/audio2video/precision"] == pytest.approx(true)  # video always reads "label, here"
    assert tags["localization/audio2video/recall"] == pytest.approx(true)
    assert tags["localization/audio2video/f1_foreground"] == pytest.approx(2 * true / (true + 1))
    assert tags["localization/audio2voice/f1_paper"] == 1
    assert tags["localization/audio2video/precision_paper"] == pytest.approx(true)
    assert {args[3] for args in made} == {False, True} and (32, 3, [32, 16], True) in made  # the paper's has two losses


def test_paper_localisation_keeps_the_best_epoch(toy, monkeypatch):
    calls = itertools.count(1)
    monkeypatch.setattr(probes, "batch_segment_metrics", lambda scores, target, size: dict.fromkeys(
        ("precision", "recall", "f1"), 1 / next(calls)))  # worse and worse
    tags = ask(toy, "localization", modalities=("audio", "video"), protocols=("paper",))
    assert tags["localization/a2v/f1_paper"] == 1 and tags["localization/v2a/f1_paper"] == pytest.approx(1 / 31)


def test_retrieval_of_groups(tmp_path, toy):
    """Two captions a clip: the clip is one query and one item, its captions are two; any of them is right."""
    path = str(tmp_path / "groups.h5")
    with h5py.File(toy) as old, h5py.File(path, "w") as new:
        for name in old:
            if name not in ("audio", "group"):
                old.copy(name, new)
        new.attrs.update(old.attrs)
        clip = np.arange(CLIPS) // 2
        new["group"] = clip
        audio = np.zeros((CLIPS, T, 1), np.float32) + clip[:, None, None]
        new["audio"] = audio
        new["caption"] = audio + np.array([0, 0.5])[np.arange(CLIPS) % 2, None, None].astype(np.float32)
    rows = torch.randn(CLIPS, 64, generator=torch.Generator().manual_seed(1))

    def encode(model, x, modality):
        index = x[..., 0].long()
        index = index + ((x[..., 0] % 1 > 0) * (index % 4 == 0)).long()  # of every fourth clip one caption is wrong
        return rows[index], index

    tags, _ = probes.evaluate(torch.nn.Module(), encode, Features([path]), ["audio", "caption"], CLIPS, CPU,
                              ("retrieval",), ("clean",), (), "softmax", {})
    clips = 18  # of the 36 test rows
    assert (tags["eval/retrieval/a2c/queries"], tags["eval/retrieval/a2c/database"]) == (clips, 36)
    assert (tags["eval/retrieval/c2a/queries"], tags["eval/retrieval/c2a/database"]) == (36, clips)
    wrong = sum(i % 4 == 0 for i in range(30, 48))
    assert tags["eval/retrieval/c2a/r1"] == pytest.approx(1 - wrong / 36)
    assert tags["eval/retrieval/a2c/r5"] == 1
    assert tags["eval/retrieval/a2c+c2a/r5"] == pytest.approx(
        (tags["eval/retrieval/a2c/r5"] + tags["eval/retrieval/c2a/r5"]) / 2)
    chance = 1 - math.comb(34, 5) / math.comb(36, 5)
    assert tags["eval/retrieval/a2c/chance_r5"] == pytest.approx(chance)
    assert tags["eval/retrieval/c2a/chance_r5"] == pytest.approx(5 / 18)


def numbered(features, modalities, many):
    """An `encode` that gives each clip a code of its own, row `number` of `many` {m: (N, D)}; `evaluate` reads test,
    train and val in this order."""
    order = {m: iter([features.clips(split).tolist() for split in ("test", "train", "val")]) for m in modalities}

    def encode(model, x, modality):
        index = torch.tensor(next(order[modality]))[:, None].expand(-1, T)
        return many[modality][index], index
    return encode


def test_x_retrieval_learns_from_one_and_asks_with_another(toy, monkeypatch):
    """Text's codes are audio's, rotated; video's are near text's: only the learned map leads from them to audio's."""
    rotate = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(3)))[0]
    many, noise = (torch.randn(CLIPS, 32, generator=torch.Generator().manual_seed(seed)) for seed in (4, 5))
    features, modalities = Features([toy]), ["audio", "video", "text"]
    train, test = (torch.from_numpy(features.clips(split)) for split in ("train", "test"))
    monkeypatch.setattr(probes, "EPOCHS", 200)
    monkeypatch.setattr(probes, "LEARNING_RATE", 1e-2)

    def ranks(codes):
        tags, _ = probes.evaluate(torch.nn.Module(), numbered(features, modalities, codes), features, modalities, CLIPS,
                                  CPU, ("x_retrieval",), ("clean",), (), "softmax", {})
        return {name: tags[f"eval/x_retrieval/t2v_to_audio/{name}"] for name in ("r1", "zero_r10", "same_r10",
                                                                                 "chance_r10", "class_chance_r10")}

    codes = {"audio": many, "text": many @ rotate, "video": many @ rotate + 0.2 * noise}
    found = ranks(codes)
    assert found["r1"] > 0.8 > 0.5 > found["zero_r10"] and found["same_r10"] == 1
    assert found["chance_r10"] == pytest.approx(10 / 36)
    assert found["class_chance_r10"] == pytest.approx(1 - math.comb(24, 10) / math.comb(36, 10))
    wrong = {m: value.clone() for m, value in codes.items()}
    wrong["text"][train] = noise[train]  # nothing to learn from
    assert ranks(wrong)["r1"] < 0.3
    wrong = {m: value.clone() for m, value in codes.items()}
    wrong["video"][test] = noise[test]  # nothing to ask with
    assert ranks(wrong)["r1"] < 0.3 and ranks(wrong)["same_r10"] == 1


def test_segmentation_needs_the_query(tmp_path, toy, monkeypatch):
    """Where two digits are in the picture, only the query tells which is meant."""
    monkeypatch.setattr(probes, "MASK_EPOCHS", 150)
    monkeypatch.setattr(probes, "MASK_LEARNING_RATE", 1e-2)
    tags = ask(toy, "segmentation")
    for way in ("a2t", "t2a"):
        found = {name: tags[f"segmentation/{way}/{name}"] for name in ("miou", "f_score", "several_miou",
                 "several_miou_shuffled_query", "several_miou_constant_query", "several_miou_no_query", "miou_nothing")}
        assert found["miou"] > 0.9 and found["f_score"] > 0.9 and found["several_miou"] > 0.9, found
        assert max(found[f"several_miou_{name}_query"] for name in ("shuffled", "constant", "no")) < 0.7, found
        assert found["miou_nothing"] == 0

    def nonsense(h5, split):  # on training clips, sentences say nothing
        h5["text"][:48] = 0
    tags = ask(write_toy(tmp_path / "nonsense.h5", nonsense), "segmentation")
    assert tags["segmentation/a2t/several_miou"] > 0.9 > 0.7 > tags["segmentation/t2a/several_miou"]

    def halved(h5, split):  # on test clips, masks are half as wide: whoever has not seen them cannot know
        h5["mask"][60:, :, :, ::2] = 0
    tags = ask(write_toy(tmp_path / "halved.h5", halved), "segmentation")
    assert 0.4 < tags["segmentation/a2t/miou"] < 0.6


# ------------------------------------------------------------------------------------------- a target of its own
NAMES = ["three", "4", "One", "five", "two"]  # a target's classes: the toy's three, one of them renamed, and two others


def say(model, x, modality):
    """The code is the number that the modality says; one meaning has nearly the same code in all modalities."""
    index = x[..., 0].long()
    rows = 5 * torch.randn(9, 32, generator=torch.Generator().manual_seed(2))
    return rows[index], index


def write_side(path, modality, names, meaning, label, split, happens=None) -> str:
    """A file of one modality which says, where its event happens, what the label means: {name: number}."""
    happens = np.ones((len(label), T), bool) if happens is None else happens
    with h5py.File(path, "w") as h5:
        h5.attrs.update(format="cmg-features", version=1, name="side")
        said = np.array([meaning[name] for name in names])[label]
        h5[modality] = np.where(happens, said[:, None], 0)[..., None].astype(np.float32)
        h5["label"], h5["split"], h5["classes"] = label, split.astype(np.uint8), names
        h5["id"] = [str(i) for i in range(len(label))]
        h5[f"events/{modality}"] = (happens[..., None] * np.eye(len(names))[label][:, None]).astype(np.uint8)
    return str(path)


@pytest.fixture
def sides(tmp_path, monkeypatch):
    """A source of audio and a target of text, with classes, clips and splits of their own."""
    monkeypatch.setattr(probes, "EPOCHS", 400)
    rng = np.random.default_rng(0)
    meaning = {"one": 1, "One": 1, "two": 2, "three": 3, "4": 4, "five": 5, "zero": 6}
    source = write_side(tmp_path / "source.h5", "audio", ["one", "two", "three", "zero"], meaning, np.arange(72) % 4,
                        np.arange(72) // 24, rng.random((72, T)) < 0.8)
    target = write_side(tmp_path / "target.h5", "text", NAMES, meaning, np.arange(50) % 5, np.arange(50) // 5 % 3,
                        np.arange(T) >= np.arange(50)[:, None] % T)
    return source, target


def ask_sides(sides, *tasks, **keywords):
    return ask(sides[0], *tasks, encode=say, target=sides[1], modalities=("audio", "text"), size=9,
               **{"class_map": ("One=one",)} | keywords)


PAPER = {"classification": {"epochs": 60, "learning_rate": 1e-2, "batch_size": 80, "metric": "acc"},
         "open_set": {"epochs": 60, "learning_rate": 1e-2, "batch_size": 80, "metric": "hos"},
         "localization": {"epochs": 60, "learning_rate": 1e-2, "batch_size": 80, "metric": "f1", "widths": (1,)}}


def test_classification_on_a_target_of_its_own(sides, monkeypatch):
    """Trained on audio of one file, tested on text of another, by the names of the classes that both have."""
    scored, original = [], probes.accuracy
    monkeypatch.setattr(probes, "accuracy", lambda p, y: scored.append(y.tolist()) or original(p, y))
    tags = ask_sides(sides, "classification", protocols=("clean", "paper"), paper=PAPER)
    assert {tag.split("/")[1] for tag in tags if tag.startswith("classification")} == {"a2t"}
    assert tags["classification/a2t/acc"] == 1 and tags["classification/a2t/acc_same"] == 1
    numbers = {"three": 2, "One": 0, "two": 1}
    test = [i for i in range(50) if i // 5 % 3 == 2]
    assert scored[1] == [numbers[NAMES[i % 5]] for i in test if NAMES[i % 5] in numbers]  # clean: of the test split
    assert tags["classification/a2t/acc_paper"] == 1  # all clips of the classes that both have
    assert scored[2] == [numbers[NAMES[i % 5]] for i in range(50) if NAMES[i % 5] in numbers]
    assert "codebook/agreement" not in tags and tags["codebook/used_text"] == 6


def test_without_the_map_a_class_of_another_name_is_another_class(sides):
    tags = ask_sides(sides, "open_set", class_map=(), known=("1",), protocols=("clean", "paper"), paper=PAPER)
    assert tags["open_set_1/a2t/acc_known"] == 1  # classes in common: two, three; known: two
    tags = ask_sides(sides, "open_set", known=("0,2",), protocols=("clean", "paper"), paper=PAPER)
    assert tags["open_set_0,2/a2t/acc_known"] == 1 and tags["open_set_0,2/a2t/auroc"] > 0.7
    assert {tag.split("/")[0] for tag in tags} == {"codebook", "open_set_0,2"}


def test_localisation_on_a_target_of_its_own(sides):
    """Clips in which nothing known happens are left out, as in AVE to AVVP."""
    tags = ask_sides(sides, "localization", protocols=("clean", "paper"), paper=PAPER)
    assert tags["localization/a2t/f1"] == tags["localization/a2t/f1_paper"] == 1
    everything = 1 / 4  # of the four columns one is right everywhere
    assert tags["localization/a2t/f1_everything"] == pytest.approx(2 * everything / (1 + everything))


def test_retrieval_is_of_the_target(sides, toy):
    with pytest.raises(InputError, match="two modalities"):
        ask_sides(sides, "retrieval")
    tags = ask(sides[0], "retrieval", encode=say, modalities=("audio", "text"), target=toy, size=9)
    assert tags["retrieval/a2t/queries"] == 36


@pytest.mark.parametrize("change, needles", [
    ({"class_map": ("One",)}, ["--class-map 'One'"]), ({"class_map": ("uno=one",)}, ["'uno=one'"]),
    ({"class_map": ("One=eins",)}, ["'One=eins'"]), ({"known": ("4",)}, ["--known 4", "3 classes"]),
    ({"known": ("a",)}, ["--known a"]), ({"known": ("0,7",)}, ["--known 0,7"]), ({"known": ("0",)}, ["--known 0"]),
])
def test_a_target_that_does_not_fit(sides, change, needles):
    with pytest.raises(InputError) as caught:
        ask_sides(sides, "open_set", **change)
    assert all(needle in str(caught.value) for needle in needles) and "\n" not in str(caught.value)


MEANING = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 7}
ABC = ["one", "two", "three"]


@pytest.fixture
def side(tmp_path, monkeypatch):
    """`side(modality, names, label, split, change)`: a file of one modality, `change` edits it."""
    monkeypatch.setattr(probes, "EPOCHS", 100)
    count = itertools.count()

    def make(modality, names, label, split, change=lambda h5: None):
        path = write_side(tmp_path / f"side{next(count)}.h5", modality, names, MEANING, np.asarray(label),
                          np.asarray(split))
        with h5py.File(path, "r+") as h5:
            change(h5)
        return path
    return make


def go(source, target, *tasks, **keywords):
    return ask_sides((source, target), *tasks, **{"class_map": ()} | keywords)


def test_retrieval_by_class_knows_the_target_s_own_classes(side):
    def change(h5):
        rng = np.random.default_rng(0)
        h5["audio"], h5["text"][:] = rng.integers(0, 8, (60, T, 1)).astype("f4"), rng.integers(0, 8, (60, T, 1))
    target = side("text", ["three", "four", "five"], np.arange(60) % 3, np.arange(60) // 20, change)
    source = side("audio", ["one"], np.zeros(90, int), np.arange(90) // 30)
    assert go(source, target, "retrieval")["retrieval/a2t/class_chance_r1"] == pytest.approx(1 / 3, abs=0.02)


def test_held_out_clips_of_classes_that_nobody_taught_set_no_threshold(side):
    target, train = side("text", [*ABC, "four"], np.arange(80) % 4, [2] * 80), np.arange(60) % 2
    taught = side("audio", ABC, [*train, *[0, 1] * 12], [0] * 60 + [1] * 24)
    more = side("audio", ABC, [*train, *[0, 1, 2, 2] * 6], [0] * 60 + [1] * 24)  # "three" in val only
    assert go(taught, target, "open_set", known=("3",)) == go(more, target, "open_set", known=("3",))


def test_acc_same_is_of_the_classes_that_are_tested(side):
    tags = go(side("audio", ABC, np.arange(90) % 3, np.arange(90) // 30),
              side("text", ABC, np.arange(60) % 2, np.arange(60) // 2 % 3), "classification")
    assert tags["classification/a2t/acc_same"] == tags["classification/a2t/acc"] == 1


def test_a_common_class_without_source_clips_is_unknown(side):
    source = side("audio", ABC, np.arange(90) % 2, np.arange(90) // 30)
    tags = go(source, side("text", ABC, [0, 0, 2] * 20, np.arange(60) // 3 % 3), "open_set", known=("2",))
    assert tags["open_set_2/a2t/unk"] == tags["open_set_2/a2t/auroc"] == 1


@pytest.mark.parametrize("tasks, keywords, source, target, needles", [
    (["open_set"], {"known": ("2",)}, (ABC, [0, 2] * 45), (ABC, [1, 2, 1] * 20), ["no known classes", "--known 2"]),
    (["localization"], {}, (ABC, [0, 1, 2] * 30), (["one", "five", "four"], [1, 2] * 30), ["common class in text"]),
    (["localization"], {}, (ABC, [1, 2] * 45), (["one", "five", "four"], [0, 2] * 30), ["common class in audio"]),
    (["open_set"], {"known": ("9999999999",)}, (ABC, [0, 1, 2] * 30), (ABC, [0, 1, 2] * 20), ["--known 9999999999"]),
    (["classification"], {"class_map": ("four=one", "four=two")}, (ABC, [0, 1, 2] * 30), (["four"], [0] * 60),
     ["named twice"]),
    (["classification"], {}, (ABC, [-1] * 90), (ABC, [0, 1, 2] * 20), ["no labelled clip"]),
    (["classification"], {}, (["one", "two", "one"], [0, 1, 2] * 30), (ABC, [0] * 60), ["'classes'", "twice"]),
])
def test_requests_between_two_files_that_cannot_be_met(side, tasks, keywords, source, target, needles):
    paths = [side(m, names, np.maximum(label, 0), np.arange(len(label)) // 3 % 3, lambda h5: h5["label"].__setitem__(
        slice(None), label)) for m, (names, label) in (("audio", source), ("text", target))]
    with pytest.raises(InputError) as caught:
        go(*paths, *tasks, **keywords)
    assert all(needle in str(caught.value) for needle in needles) and "\n" not in str(caught.value), caught.value


def test_released_lists_without_splits_do_for_the_paper_s_protocol(side):
    source, target = (side(m, ABC, np.arange(60) % 3, [0] * 60) for m in ("audio", "text"))
    assert go(source, target, "classification", protocols=("paper",), paper=PAPER)["classification/a2t/acc_paper"] == 1
    with pytest.raises(InputError, match="test split is empty"):
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
    go(*paths, "classification", protocols=("paper",), paper=paper)
    assert len(passes) == epochs


def test_nothing_is_chosen_by_the_labels_of_the_target(side, monkeypatch):
    source = side("audio", [*ABC, "four"], np.arange(120) % 4, np.arange(120) // 40)
    chosen = []
    for name in ("accuracy", "open_set_metrics"):  # confidence, prediction and threshold, but not the labels
        original = getattr(probes, name)
        monkeypatch.setattr(probes, name, lambda *args, original=original: chosen.append(
            [arg for i, arg in enumerate(args) if i != len(args) // 2]) or original(*args))
    found = []
    for turn in (0, 1):
        target = side("text", [*ABC, "four"], np.arange(80) % 4, [2] * 80, lambda h5: h5["label"].__setitem__(
            slice(None), (h5["label"][:] + turn) % 4))
        found.append(go(source, target, "classification", "open_set", known=("2",)))
    half = len(chosen) // 2
    assert found[0] != found[1] and half > 0
    for a, b in zip(chosen[:half], chosen[half:]):
        assert all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(a[:2], b[:2]))
        assert a[-1] == b[-1] if isinstance(a[-1], float) else True


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
    ask(toy, "classification", "open_set", known=("2",), encode=encode, model=model, protocols=("paper",),
        modalities=("text", "audio"))
    assert sum(encoded) == 2 * probes.DROPOUT_DRAWS and len(encoded) > sum(encoded)
    features = Features([toy])
    label = torch.from_numpy(features.label[features.single_event(features.clips("train"))])
    assert 0 < len(label) < 48
    expected = [label, label[label < 2]]
    for index, target in [call for call in trained if (call[0] == call[0][:, :1]).all()]:  # text says it throughout
        assert any(torch.equal(target, e) for e in expected) and torch.equal(index[:, 0] - 1, target)
    assert {len(target) for _, target in trained} == {len(e) for e in expected}


def test_the_released_probes_report_their_best_epoch(toy, monkeypatch):
    calls = itertools.count(1)
    monkeypatch.setattr(probes, "accuracy", lambda prediction, target: {"acc": 1 / next(calls)})  # worse and worse
    monkeypatch.setattr(probes, "best_threshold", lambda *args: {"hos": 1 / next(calls)})
    tags = ask(toy, "classification", "open_set", known=("2",), modalities=("audio", "text"), protocols=("paper",))
    assert tags["classification/a2t/acc_paper"] == 1 and tags["open_set_2/a2t/hos_paper"] == 1 / 2


def test_the_threshold_rejects_the_least_sure(toy, monkeypatch):
    used, original = {}, probes.open_set_metrics
    for share in (0.0, 1.0):
        monkeypatch.setattr(probes, "REJECT", share)
        monkeypatch.setattr(probes, "open_set_metrics", lambda *args: used.setdefault(share, []).append(args[4])
                            or original(*args))
        ask(toy, "open_set", known=("2",))
    pairs = list(zip(used[0.0], used[1.0]))
    assert len(pairs) == 30 and all(a <= b for a, b in pairs) and sum(a < b for a, b in pairs) > 10


def test_groups_of_two_files_are_not_one(tmp_path):
    def grouped(h5, split):
        h5["group"] = np.arange(CLIPS) // 2
    features = Features([write_toy(tmp_path / f"{name}.h5", grouped) for name in "ab"])
    assert len(probes.groups(features, np.arange(2 * CLIPS)).unique()) == CLIPS


def test_masks_of_two_sizes(tmp_path, toy):
    def finer(h5, split):
        mask = h5["mask"][:].repeat(2, 2).repeat(2, 3)
        del h5["mask"]
        h5["mask"] = mask
    with pytest.raises(InputError, match="masks of one size"):
        ask(toy, "segmentation", target=write_toy(tmp_path / "finer.h5", finer))


def test_no_class_in_common(sides, toy):
    with pytest.raises(InputError, match="no class in common"):
        ask_sides((toy, write_side(sides[0] + "x", "text", ["a", "b"], {"a": 1, "b": 2}, np.arange(36) % 2,
                                   np.arange(36) % 3)), "classification", class_map=())


def test_frames_that_nobody_annotated_teach_and_count_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(probes, "MASK_EPOCHS", 60)
    monkeypatch.setattr(probes, "MASK_LEARNING_RATE", 1e-2)

    def first_only(h5, split):  # of training clips the first frame has a mask; of test clips all but the last
        h5["mask"][:48, 1:], h5["mask"][60:, -1] = 255, 255

    def wrong(h5, split):
        first_only(h5, split)
        h5["video"][60:, -1] = 0  # nobody could draw this frame

    paths = [write_toy(tmp_path / f"{change.__name__}.h5", change) for change in (first_only, wrong)]
    tags = [ask(path, "segmentation") for path in paths]
    for name in ("miou", "f_score", "several_miou"):
        assert tags[0][f"segmentation/a2t/{name}"] == tags[1][f"segmentation/a2t/{name}"] > 0.8


class Noisy(torch.nn.Module):
    """A model with dropout, whose codes change in training mode."""

    def __init__(self):
        super().__init__()
        self.dropout = torch.nn.Dropout(0.3)

    def encode(self, model, x, modality):
        quantized, index = honest(model, x, modality)
        index = torch.where(model.dropout(torch.ones(index.shape)) > 0, index, 0)
        return honest(model, index[..., None].float(), modality)


def test_tasks_do_not_touch_each_other(toy):
    model = Noisy()
    settings = {"protocols": ("clean", "paper"), "encode": model.encode, "model": model}
    every = ask(toy, *probes.TASKS, known=(1, 2), **settings)
    alone = [ask(toy, task, known=(2,), **settings) for task in probes.TASKS]
    for tags in alone:
        assert tags == {tag: every[tag] for tag in tags}
    assert set(every) == {tag for tags in alone for tag in tags} | {t for t in every if t.startswith("open_set_1/")}


def test_each_score_has_its_own_threshold(toy, monkeypatch):
    used, original = [], probes.open_set_metrics
    monkeypatch.setattr(probes, "open_set_metrics", lambda *args: used.append((args[0], args[4])) or original(*args))
    figures = {score: ask(toy, "open_set", known=(2,), score=score) for score in probes.SCORES}
    for score, tags in figures.items():
        for way, name in itertools.product(("a2t", "t2a"), ("hos", "auroc")):
            shown = tags[f"open_set_2/{way}/{name}"]
            assert all(f[f"open_set_2/{way}/{name}_{score}"] == shown for f in figures.values())
    for i, score in enumerate(probes.SCORES):  # four calls for a target, then one that rejects none
        thresholds = [threshold for _, threshold in used[i::5]]
        low, high = {"softmax": (0, 1), "logit": (-99, 99), "energy": (-99, 99), "distance": (-99, 0)}[score]
        assert all(low <= threshold <= high for threshold in thresholds)
    assert len({round(threshold, 4) for _, threshold in used[:4]}) == 4 and used[4][1] == -math.inf


def test_distance_of_a_code_to_itself_is_zero():
    codes = codes_of(torch.arange(60).reshape(15, 4), width=64, size=60)
    assert (probes.known_scores(torch.zeros(15, 2), codes, codes)["distance"] == 0).all()


def test_the_released_settings():
    table = {module.METHOD: module.paper_settings(6) for module in (micu, uni_code, codaar)}
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


def few_tests(h5, split):
    h5["split"][:] = np.repeat([0, 2], [90, 6])


def few_groups(h5, split):
    h5["group"] = np.arange(CLIPS) // 12


def unlabelled(h5, split):
    h5["label"][:] = -1


def without(name):
    return lambda h5, split: h5.__delitem__(name)


@pytest.mark.parametrize("task, change, needles", [
    ("x_retrieval", few_tests, ["10 clips"]), ("retrieval", few_groups, ["10 clips or groups"]),
    ("classification", unlabelled, ["no labelled clip"]), ("segmentation", unlabelled, ["no labelled clip"]),
    ("segmentation", without("mask"), ["masks of one size"]),
    ("localization", without("events/audio"), ["events/<modality>", "video"]),
])
def test_what_a_file_lacks_is_said_at_once(tmp_path, task, change, needles):
    features = Features([write_toy(tmp_path / "lacking.h5", change)])
    with pytest.raises(InputError) as caught:
        probes.check_request(features, features.shape, (task,), ("clean", "paper"), ())
    assert all(needle in str(caught.value) for needle in needles) and "\n" not in str(caught.value)


def test_loss_scale_of_binary_cross_entropy():
    """The released loss is a mean over all entries, background included."""
    probe, codes = probes.SegmentProbe(6, 2, (6,), False), codes_of([[1, 5], [7, 2]])
    target = torch.ones(2, 2, 3)
    assert torch.equal(probe.loss(codes, target), F.binary_cross_entropy_with_logits(probe(codes), target))


def test_a_run_with_every_task_equals_the_command_line(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = "--batch-size 8 --codebook-size 64 --code-dim 64 --cujp-samples 2 --epochs 1 --protocol clean"
    run_here("micu.py", "--data", tiny, *options.split(), "--tasks", "localization", "segmentation")
    run = run_folder(tmp_path)
    run_here("probes.py", run, "--protocol", "clean", "--out", "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == json.loads((run / "results.json").read_text())["metrics"]


def test_a_run_probed_on_files_of_one_modality_each(tiny, tmp_path, monkeypatch):
    """Video of one file, sound of another with other names, shuffled clips and a class the first one lacks."""
    monkeypatch.chdir(tmp_path)
    with h5py.File(tiny) as h5:
        names, order, old = [f"class {i}" for i in range(10)], np.random.default_rng(0).permutation(80), h5
        source = edit(tiny, "video.h5", audio=None, text=None, events__audio=None,
                      label=np.where(h5["label"][:] == 9, -1, h5["label"][:]))
        target = edit(tiny, "audio.h5", video=None, text=None, mask=None, events__video=None, classes=names,
                      **{name: old[name.replace("__", "/")][:][order]
                         for name in ("audio", "events__audio", "label", "split", "id")})
        maps = [f"class {i}={h5['classes'][i].decode()}" for i in range(9)]
    options = "--batch-size 8 --codebook-size 64 --code-dim 64 --cujp-samples 2 --epochs 1".split()
    sides = ["--probe-data", source, "--probe-target", target, "--class-map", *maps]
    run_here("micu.py", "--data", tiny, *options, *sides, "--known", "3", "0,2,4", "--tasks", "classification",
             "open_set", "localization")
    run = run_folder(tmp_path)
    found = json.loads((run / "results.json").read_text())["metrics"]
    assert {tag.split("/")[1]: tag.split("/")[2] for tag in found if "codebook" not in tag} == dict.fromkeys(
        ("classification", "open_set_3", "open_set_0,2,4", "localization"), "v2a")
    run_here("probes.py", run, "--out", "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == found

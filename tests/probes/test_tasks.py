"""The tasks of probes.py: metrics by hand, probes against their formulas, and tasks on codes whose answer is known."""
import itertools
import math

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import probes
from data import Features
from run import InputError
from toys import (ABC, BLUR, CLASSES, CLIPS, CPU, MEANING, NAMES, T, Noisy, ask, ask_sides, codes_of, go, shape_of, say,
                  write_side, write_sides, write_toy)


# ------------------------------------------------------------------------------------------------------------- metrics
def test_floor_of_localisation():
    target = torch.tensor([[[1, 0, 0], [0, 0, 1]], [[1, 0, 0], [0, 1, 0]]])  # columns are there 2, 1 and 1 of 4 times
    assert probes.constant_f1(target) == pytest.approx({"f1_constant": 0.5, "f1_everything": 2 * 4 / 12 / (4 / 12 + 1)})


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("levels", [3, 1000])  # many ties, few
def test_hos_of_every_threshold_equals_the_loop(seed, levels):
    """Every confidence is a threshold."""
    rng = torch.Generator().manual_seed(seed)
    confidence = torch.randint(levels, (60,), generator=rng) / levels
    prediction, target = (torch.randint(n, (60,), generator=rng) for n in (4, 7))

    def hos(threshold):
        right = sum(q >= threshold and p == y for q, p, y in zip(confidence, prediction, target) if y < 4)
        out = sum(q < threshold for q, y in zip(confidence, target) if y >= 4)
        os_star, unk = right / (target < 4).sum().item(), out / (target >= 4).sum().item()
        return float(2 * os_star * unk / (os_star + unk)) if os_star + unk else 0.0

    thresholds, curve = probes.hos_curve(confidence, prediction, target, 4)
    assert thresholds.tolist() == sorted(confidence.tolist())
    assert curve.tolist() == pytest.approx([hos(threshold) for threshold in thresholds])
    best = probes.paired_threshold(target < 4, target, confidence, prediction, 4)
    assert hos(best) == pytest.approx(max(map(hos, confidence.tolist()))) and best in confidence.double()


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
    mask, drawn = torch.rand(3, 7, 7, generator=rng) < 0.4, torch.rand(3, 7, 7, generator=rng)
    iou = [theirs.jaccard_score(t.flatten(), d.flatten() > 0.5) for t, d in zip(mask, drawn)]
    assert probes.mask_iou(drawn, mask).tolist() == pytest.approx(iou)


# -------------------------------------------------------------------------------------------------------------- probes
def test_segment_probe_sees_every_segment_on_its_own():
    torch.manual_seed(0)
    probe, codes = probes.SegmentProbe(6, 4), codes_of([[1, 5, 5], [7, 1, 2]])
    assert len(probe.layers) == 2
    logits = probe(codes)
    for clip, segment in itertools.product(range(2), range(3)):
        x = codes.rows[codes.index[clip, segment]]
        for layer in probe.layers:
            x = layer.weight @ x + layer.bias
        assert torch.allclose(logits[clip, segment], x, atol=1e-6)


def test_loss_scale_of_binary_cross_entropy():
    """A mean over all entries, background included."""
    probe, codes = probes.SegmentProbe(6, 2), codes_of([[1, 5], [7, 2]])
    target = torch.ones(2, 2, 3)
    assert torch.equal(probe.loss(codes, target), F.binary_cross_entropy_with_logits(probe(codes), target))


def test_known_scores():
    codes, seen, logits = codes_of([[1, 5], [7, 2]]), codes_of([[5, 5], [3, 2]]), torch.randn(2, 4)
    scores = probes.known_scores(logits, codes, seen)
    for i, row in enumerate(logits.tolist()):
        total = sum(map(math.exp, row))
        far = [min((codes.rows[k] - codes.rows[s]).norm().item() for s in (5, 3, 2)) for k in codes.index[i].tolist()]
        expected = {"softmax": math.exp(max(row)) / total, "logit": max(row), "energy": math.log(total),
                    "distance": -sum(far) / 2}
        assert {name: value[i].item() for name, value in scores.items()} == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_distance_of_a_code_to_itself_is_zero():
    codes = codes_of(torch.arange(60).reshape(15, 4), width=64, size=60)
    assert (probes.known_scores(torch.zeros(15, 2), codes, codes)["distance"] == 0).all()


def test_mean_codes():
    codes = codes_of([[1, 5, 5], [7, 1, 2]])
    where = torch.tensor([[True, False, True], [False, False, False]])
    rows = codes.rows
    assert torch.allclose(codes.mean(), torch.stack([(rows[1] + 2 * rows[5]) / 3, (rows[7] + rows[1] + rows[2]) / 3]))
    assert torch.allclose(codes.mean(where), torch.stack([(rows[1] + rows[5]) / 2, (rows[7] + rows[1] + rows[2]) / 3]))


# --------------------------------------------------------------------------------------------------------------- tasks
@pytest.fixture
def toy(tmp_path):
    return write_toy(tmp_path / "toy.h5")


def test_localisation_is_trained_on_one_and_tested_on_the_other(tmp_path, toy, monkeypatch):
    """Audio's codes tell when and what: perfect on audio's events, and only chance tells when video's happen."""
    monkeypatch.setattr(probes, "EPOCHS", 300)
    for m in ("voice", "video"):
        monkeypatch.setitem(BLUR, m, 0.0)

    def single(h5, split):  # video with the first event only, and audio once more
        h5["events/video"][:] = h5["events/video"][:] * np.eye(CLASSES)[h5["label"][:]][:, None]
        h5["video"][:] = h5["video"][:] * np.eye(8)[h5["label"][:]][:, None, None, None]
        h5["voice"], h5["events/voice"] = h5["audio"][:], h5["events/audio"][:]

    path = write_toy(tmp_path / "single.h5", single)
    tags = ask(path, "localization", modalities=("audio", "voice", "video"))
    assert tags["localization/audio2voice/f1"] == tags["localization/audio2voice/f1_foreground"] == 1
    with h5py.File(path) as h5:
        heard, true = (h5[f"events/{m}"][:].any(-1)[h5["split"][:] == 2].mean() for m in ("audio", "video"))
    assert abs(heard - true) > 0.005
    assert tags["localization/audio2video/precision"] == pytest.approx(true)  # video always reads "label, here"
    assert tags["localization/audio2video/recall"] == pytest.approx(true)
    assert tags["localization/audio2video/f1_foreground"] == pytest.approx(2 * true / (true + 1))


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

    plan = probes.Plan(Features([path]), {"audio": (T, 1), "caption": (T, 1)}, CPU, ("retrieval",))
    tags = plan.evaluate(torch.nn.Module(), encode, CLIPS)
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


@pytest.mark.slow
def test_x_retrieval_learns_from_one_and_asks_with_another(toy, monkeypatch):
    """Text's codes are audio's, rotated; video's are near text's: only the learned map leads from them to audio's."""
    rotate = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(3)))[0]
    many, noise = (torch.randn(CLIPS, 32, generator=torch.Generator().manual_seed(seed)) for seed in (4, 5))
    features, modalities = Features([toy]), ["audio", "video", "text"]
    train, test = (torch.from_numpy(features.clips(split)) for split in ("train", "test"))
    monkeypatch.setattr(probes, "EPOCHS", 200)
    monkeypatch.setattr(probes, "LEARNING_RATE", 1e-2)

    def ranks(codes):
        plan = probes.Plan(features, shape_of(modalities), CPU, ("x_retrieval",))
        tags = plan.evaluate(torch.nn.Module(), numbered(features, modalities, codes), CLIPS)
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


@pytest.mark.parametrize("unknown, refused", [
    (lambda split: split >= 0, "train"), (lambda split: split == 2, "test"), (lambda split: split == 0, "train")])
def test_segmentation_without_an_annotated_frame_is_refused_before_training(tmp_path, unknown, refused):
    def change(h5, split):
        h5["mask"][:] = np.where(unknown(split)[:, None, None, None], 255, h5["mask"][:])
    with pytest.raises(InputError, match=f"no labelled {refused} clips with an annotated frame"):
        ask(write_toy(tmp_path / "unknown.h5", change), "segmentation")


def test_segmentation_says_nothing_of_what_has_no_annotation(tmp_path, monkeypatch):
    """No clip of several events is annotated, and no frame has anything drawn: no figure is nan."""
    monkeypatch.setattr(probes, "MASK_EPOCHS", 1)

    def change(h5, split):
        for clip in np.flatnonzero(split == 2):
            h5["mask"][clip] = 255 if h5["events/video"][clip].any(0).sum() > 1 else 0
    tags = ask(write_toy(tmp_path / "empty.h5", change), "segmentation")
    assert not [name for name, value in tags.items() if not math.isfinite(value) or "several" in name]
    assert tags["segmentation/a2t/f_score"] == 0


@pytest.mark.slow
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


def test_groups_of_two_files_are_not_one(tmp_path):
    def grouped(h5, split):
        h5["group"] = np.arange(CLIPS) // 2
    features = Features([write_toy(tmp_path / f"{name}.h5", grouped) for name in "ab"])
    assert len(probes.groups(features, np.arange(2 * CLIPS)).unique()) == CLIPS


def test_a_file_without_groups_takes_none_from_another(tmp_path):
    def grouped(h5, split):
        h5["group"] = np.arange(CLIPS) // 2
    features = Features([write_toy(tmp_path / "a.h5"), write_toy(tmp_path / "b.h5", grouped)])
    group = probes.groups(features, np.arange(2 * CLIPS))
    assert len(group[:CLIPS].unique()) == CLIPS and len(group.unique()) == CLIPS + CLIPS // 2
    assert (group[CLIPS::2] == group[CLIPS + 1::2]).all()


def test_masks_of_two_sizes(tmp_path, toy):
    def finer(h5, split):
        mask = h5["mask"][:].repeat(2, 2).repeat(2, 3)
        del h5["mask"]
        h5["mask"] = mask
    with pytest.raises(InputError, match="masks of one size"):
        ask(toy, "segmentation", target=write_toy(tmp_path / "finer.h5", finer))


def test_tasks_do_not_touch_each_other(toy):
    model = Noisy()
    settings = {"encode": model.encode, "model": model}
    every = ask(toy, *probes.TASKS, known=(1, 2), **settings)
    alone = [ask(toy, task, known=(2,), **settings) for task in probes.TASKS]
    for tags in alone:
        assert tags == {tag: every[tag] for tag in tags}
    assert set(every) == {tag for tags in alone for tag in tags} | {t for t in every if t.startswith("open_set_1/")}


# --------------------------------------------------------------------------------------------- a target of its own
@pytest.fixture
def sides(tmp_path, monkeypatch):
    monkeypatch.setattr(probes, "EPOCHS", 400)
    return write_sides(tmp_path)


def test_classification_on_a_target_of_its_own(sides, monkeypatch):
    """Trained on audio of one file, tested on text of another, by the names of the classes that both have."""
    scored, original = [], probes.accuracy
    monkeypatch.setattr(probes, "accuracy", lambda p, y: scored.append(y.tolist()) or original(p, y))
    tags = ask_sides(sides, "classification")
    assert {tag.split("/")[1] for tag in tags if tag.startswith("classification")} == {"a2t"}
    assert tags["classification/a2t/acc"] == 1 and tags["classification/a2t/acc_same"] == 1
    numbers = {"three": 2, "One": 0, "two": 1}
    test = [i for i in range(50) if i // 5 % 3 == 2]
    assert scored[1] == [numbers[NAMES[i % 5]] for i in test if NAMES[i % 5] in numbers]
    assert "codebook/agreement" not in tags and tags["codebook/used_text"] == 6


def test_without_the_map_a_class_of_another_name_is_another_class(sides):
    tags = ask_sides(sides, "open_set", class_map=(), known=("1",))
    assert tags["open_set_1/a2t/acc_known"] == 1  # classes in common: two, three; known: two
    tags = ask_sides(sides, "open_set", known=("0,2",))
    assert tags["open_set_0,2/a2t/acc_known"] == 1 and tags["open_set_0,2/a2t/auroc"] > 0.7
    assert {tag.split("/")[0] for tag in tags} == {"codebook", "open_set_0,2"}


def test_localisation_on_a_target_of_its_own(sides):
    """Clips in which nothing known happens are left out, as in AVE to AVVP."""
    tags = ask_sides(sides, "localization")
    assert tags["localization/a2t/f1"] == 1
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
     ["'four=two'", "each once"]),
    (["classification"], {}, (ABC, [-1] * 90), (ABC, [0, 1, 2] * 20), ["no labelled"]),
    (["classification"], {}, (["one", "two", "one"], [0, 1, 2] * 30), (ABC, [0] * 60), ["'classes'", "twice"]),
])
def test_requests_between_two_files_that_cannot_be_met(side, tasks, keywords, source, target, needles):
    paths = [side(m, names, np.maximum(label, 0), np.arange(len(label)) // 3 % 3, lambda h5: h5["label"].__setitem__(
        slice(None), label)) for m, (names, label) in (("audio", source), ("text", target))]
    with pytest.raises(InputError) as caught:
        go(*paths, *tasks, **keywords)
    assert all(needle in str(caught.value) for needle in needles) and "\n" not in str(caught.value), caught.value


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


@pytest.mark.parametrize("tasks", [("classification",), ("localization",), ()])
def test_no_class_in_common(tmp_path, toy, tasks):
    label = np.arange(36) % 2
    other = write_side(tmp_path / "other.h5", "text", ["a", "b"], {"a": 1, "b": 2}, label, np.arange(36) % 3)
    with pytest.raises(InputError, match="no class in common, such as one.*--class-map"):
        go(toy, other, *tasks)


# ------------------------------------------------------------------------------------------------ what a file lacks
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
    ("classification", unlabelled, ["no labelled"]), ("segmentation", unlabelled, ["no labelled"]),
    ("segmentation", without("mask"), ["masks of one size"]),
    ("localization", without("events/audio"), ["events/<modality>", "video"]),
])
def test_what_a_file_lacks_is_said_at_once(tmp_path, task, change, needles):
    features = Features([write_toy(tmp_path / "lacking.h5", change)])
    with pytest.raises(InputError) as caught:
        probes.Plan(features, features.shape, CPU, (task,))
    assert all(needle in str(caught.value) for needle in needles) and "\n" not in str(caught.value)


def test_a_task_that_does_not_exist(toy):
    with pytest.raises(InputError, match="--tasks clasification"):
        ask(toy, "clasification")


def one_part(missing):
    """Clips of all splits but this one."""
    def change(h5, split):
        h5["split"][:] = np.where(split == missing, 1 if missing == 0 else 0, split)
    return change


def unlabelled_in(split_number):
    def change(h5, split):
        h5["label"][:] = np.where(split == split_number, -1, h5["label"][:])
    return change


def one_class(h5, split):
    for name in ("events/audio", "events/video"):
        del h5[name]
    h5["label"][:] = 0


@pytest.mark.parametrize("change, done", [
    (lambda h5, split: None, {"classification", "open_set_1"}), (one_part(1), {"classification"}),
    (unlabelled_in(1), {"classification"}), (unlabelled_in(0), set()), (unlabelled_in(2), set()),
    (one_part(0), set()), (one_part(2), set()), (unlabelled, set()), (one_class, {"classification"}),
])
def test_tasks_that_nobody_named_are_done_as_far_as_the_clips_allow(tmp_path, change, done, monkeypatch):
    monkeypatch.setattr(probes, "EPOCHS", 1)
    path = write_toy(tmp_path / "some.h5", change)
    tags = ask(path)
    assert {tag.split("/")[0] for tag in tags} == {"codebook"} | done
    for task in ("classification", "open_set"):  # the same by name: done, or refused in one line
        if any(name.startswith(task) for name in done):
            assert ask(path, task).items() <= tags.items()
        else:
            with pytest.raises(InputError) as caught:
                ask(path, task)
            assert "some.h5" in str(caught.value) or "--known" in str(caught.value)
            assert "\n" not in str(caught.value)


def test_known_classes_ask_for_the_open_set(tmp_path, toy):
    assert "open_set_2/a2t/hos" in ask(toy, known=("2",))
    with pytest.raises(InputError, match="--known 7"):
        ask(toy, known=("7",))
    with pytest.raises(InputError, match="labelled val clips"):
        ask(write_toy(tmp_path / "noval.h5", one_part(1)), known=("2",))

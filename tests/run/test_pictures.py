"""Pictures of a run: made of small arrays here, and of odd ones; that runs leave them is in `test_run.py`."""
import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import pictures

CODES = 30
LINES = [{"step": 10 * i, "losses/recon": 1.0 / i, "losses/total": 2.0 / i, "codebook/agreement": 0.1 * i,
          "codebook/perplexity_audio": 5.0 * i, "codebook/perplexity_text": 4.0 * i} for i in (1, 2, 3)]


def found(modalities=("audio", "video", "text"), classes=4, clips=50) -> dict:
    """The arguments of `pictures.show`, at random"""
    draw = torch.Generator().manual_seed(0)

    def numbers(high, *shape):
        return torch.randint(high, shape, generator=draw)
    selections = {m: numbers(9, CODES) * (numbers(3, CODES) > 0) for m in modalities}
    outcomes = {}
    for a in modalities:
        for b in set(modalities) - {a}:
            answers = dict(prediction=numbers(classes, clips), label=numbers(classes, clips))
            outcomes["classification", a, b] = SimpleNamespace(scores={}, thresholds={}, **answers)
            outcomes["open_set_2", a, b] = SimpleNamespace(
                scores={"softmax": torch.rand(clips, generator=draw)}, known=numbers(2, clips) > 0,
                thresholds={"hos_source": {"softmax": torch.tensor(0.3)}, "hos": {"softmax": torch.tensor(0.6)}})
    masks = {"frame": torch.rand(2, 3, 3, 4, generator=draw), "truth": numbers(2, 2, 6, 6).float(),
             "a to t": torch.rand(2, 6, 6, generator=draw)}
    return {"lines": LINES, "codebook": torch.randn(CODES, 5, generator=draw), "selections": selections,
            "by_class": numbers(9, classes, CODES), "classes": [f"class {i}" for i in range(classes)],
            "outcomes": outcomes, "drawn": (masks, ["class 1", "class 2"])}


def drawn(name: str, **changes):
    """The Figure of this name"""
    return pictures.all_pictures(**found() | changes)[name]()


def texts(figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(match=lambda artist: hasattr(artist, "get_text")))


def test_there_is_a_picture_of_everything_that_was_found():
    assert set(pictures.all_pictures(**found())) == {"training", "codes", "codebook", "confusion",
                                                     "open_set_2_softmax", "masks"}
    nothing = {"lines": [], "outcomes": {}, "drawn": None}
    assert set(pictures.all_pictures(**found() | nothing)) == {"codes", "codebook"}


def test_training_has_a_panel_for_each_loss_and_one_for_agreement_and_perplexity():
    axes = drawn("training").axes
    assert {ax.get_title() for ax in axes} == {"loss: recon", "loss: total", "agreement, % of segments",
                                               "perplexity, codes"}
    of = {ax.get_title(): ax for ax in axes}
    assert of["agreement, % of segments"].lines[0].get_ydata() == pytest.approx([10, 20, 30])
    assert list(of["loss: recon"].lines[0].get_xdata()) == [10, 20, 30]
    assert [line.get_label() for line in of["perplexity, codes"].lines] == ["audio", "text"]


def test_accuracy_is_drawn_if_probes_ran_along_the_way():
    probed = [{"step": step, "eval/classification/a2v/acc": step / 100} for step in (10, 20)]
    of = {ax.get_title(): ax for ax in drawn("training", lines=LINES + probed).axes}
    assert of["accuracy, %"].lines[0].get_ydata() == pytest.approx([10, 20])
    assert "accuracy, %" not in {ax.get_title() for ax in drawn("training", lines=LINES + probed[:1]).axes}


def test_shared_codes_come_first_each_modality_in_its_colour():
    selections = {"audio": torch.tensor([0, 9, 1, 50, 0]), "video": torch.tensor([0, 0, 0, 0, 4]),
                  "text": torch.tensor([0, 0, 1, 50, 4])}
    figure = drawn("codes", selections=selections)
    above, below = figure.axes
    assert "0 by 3, 3 by 2, 1 by 1" in above.get_title() and "4 codes in use, of 5" in below.get_xlabel()
    audio, _, text = above.collections
    assert (audio.get_facecolor() != text.get_facecolor()).any()
    heights = [audio.get_paths()[0].vertices[:, 1].max(), text.get_paths()[0].vertices[:, 1].max()]
    assert heights == [100, 100]
    steps = below.collections[0].get_paths()[0].vertices
    for place, total in enumerate((100, 2, 8, 9)):  # the two of audio and text, that of video and text, audio's own
        assert {round(x) for x, y in steps if y == total} == {place, place + 1}


def test_the_map_lies_along_the_components_of_the_codes_in_use():
    codebook = torch.zeros(CODES, 3)
    codebook[:, 1] = torch.arange(CODES)
    codebook[:, 2] = 0.1 * torch.arange(CODES) % 2
    used = torch.arange(CODES) < 20
    place, share = pictures.plane(codebook, used)
    centred = codebook[used] - codebook[used].mean(0)
    value, vector = torch.linalg.eigh(centred.T.double() @ centred.double())  # anew, by the covariance
    assert share == pytest.approx((value.flip(0)[:2] / value.sum()).tolist())
    along = (codebook - codebook[used].mean(0)).double() @ vector[:, -1]
    assert abs(place[:, 0]) == pytest.approx(along.abs().numpy())


def test_the_map_is_coloured_by_sharing_and_by_class():
    figure = drawn("codebook")
    left, right = figure.axes
    assert {"1 modality", "3 modalities"} <= {text.get_text().split(":")[0] for text in left.get_legend().get_texts()}
    assert [text.get_text() for text in right.get_legend().get_texts()][1:] == found()["classes"]
    assert "% of the variance" in left.get_xlabel()


def test_confusion_counts_the_clips_of_a_class_by_what_the_probe_says():
    label, prediction = torch.tensor([0, 0, 0, 2]), torch.tensor([0, 1, 1, 2])
    outcome = SimpleNamespace(scores={}, thresholds={}, prediction=prediction, label=label)
    figure = drawn("confusion", outcomes={("classification", "audio", "text"): outcome}, classes=["a", "b", "c"])
    ax, bar = figure.axes
    shown = ax.images[0].get_array()
    assert shown[0].tolist() == pytest.approx([100 / 3, 200 / 3, 0]) and shown[2].tolist() == pytest.approx([0, 0, 100])
    assert shown.mask[1].all()  # no clip of class b
    assert "50.0%" in ax.get_title() and [text.get_text() for text in ax.get_yticklabels()] == ["a", "b", "c"]


@pytest.mark.parametrize("score", ["softmax", "energy"])
@pytest.mark.parametrize("top", [0.9990231, 0.99999999, 0.5])
def test_a_histogram_counts_every_clip_and_shows_every_threshold(score, top):
    """Also those at the ends, which rounding could drop, and those beyond the axis"""
    confidence = torch.tensor([1e-9, 0.2, 0.4, *[top] * 5])
    found = {("audio", "text"): (confidence, torch.arange(8) % 2 > 0, {"hos_source": torch.tensor(0.3),
                                                                       "hos": torch.tensor(0.999999)})}
    (ax,) = pictures.confidences(found, score).axes
    assert [sum(patch.get_data().values) for patch in ax.patches] == pytest.approx([100, 100])
    left, right = ax.get_xlim()
    assert all(left <= line.get_xdata()[0] <= right for line in ax.lines) and len(ax.lines) == 2


def test_a_threshold_that_one_direction_alone_has_is_explained():
    part = torch.rand(9), torch.arange(9) % 2 > 0
    found = {("audio", "text"): (*part, {"hos_source": 0.5}), ("text", "audio"): (*part, {"hos_source": 0.5, "hos": 0.4})}
    assert "threshold from pairs" in texts(pictures.confidences(found, "energy"))


def test_each_direction_has_its_matrix_and_its_confidences_with_both_thresholds():
    assert len(drawn("confusion").axes) == 6 + 1
    figure = drawn("open_set_2_softmax")
    assert len(figure.axes) == 6 and "softmax" in texts(figure)
    for ax in figure.axes:
        assert sorted(line.get_xdata()[0] for line in ax.lines) == pytest.approx([0.3, 0.6])
    assert {"known classes", "unknown classes", "threshold from pairs"} <= set(texts(figure).split("\n"))


def test_masks_show_frame_truth_and_what_each_query_draws():
    figure = drawn("masks")
    assert len(figure.axes) == 3 * 2
    assert [ax.get_ylabel() for ax in figure.axes[::2]] == ["frame", "truth", "a to t"]
    masks = found()["drawn"][0]
    pixels = figure.axes[0].images[0].get_array()  # of features that are as many as the pixels of a cell
    for row in range(6):
        for column in range(6):
            pixel = masks["frame"][0, row // 2, column // 2, 2 * (row % 2) + column % 2]
            assert pixels[row, column] == pytest.approx(pixel.item())
    assert (figure.axes[2].images[0].get_array() == masks["truth"][0].numpy()).all()


TWO = ("audio", "text")
ALONE = {"lines": [], "outcomes": {}, "drawn": None}  # the codebook alone
ODD = {
    "the usual": found(),
    "one modality": found(("audio",)) | ALONE,
    "a thousand classes": found(TWO, classes=1000) | {"lines": [], "drawn": None},
    "no classes": found(TWO) | ALONE | {"classes": [], "by_class": torch.zeros(0, CODES)},
    "one value everywhere": found(TWO) | {
        "codebook": torch.ones(CODES, 5), "lines": [dict.fromkeys(LINES[0], 1.0)],
        "outcomes": {("open_set_2", *TWO): SimpleNamespace(
            scores={"softmax": torch.ones(9)}, known=torch.ones(9) > 0, thresholds={"hos_source": {"softmax": 1.0}})}},
    "one code": found() | ALONE | {"selections": {m: (torch.arange(CODES) == 3) * 7 for m in TWO}},
    "no code": found() | ALONE | {"selections": {m: torch.zeros(CODES, dtype=torch.long) for m in TWO}},
    "five modalities": found("abcde") | ALONE,
    "masks of other features": found(TWO) | ALONE | {"drawn": ({
        "frame": torch.rand(1, 2, 2, 7), "truth": torch.zeros(1, 8, 8), "a to t": torch.zeros(1, 8, 8)}, ["one"])},
}


@pytest.mark.parametrize("case", [
    case if case == "the usual" else pytest.param(case, marks=pytest.mark.slow) for case in ODD])
def test_usual_and_odd_arrays_are_drawn(case, tmp_path, monkeypatch):
    rendered = {}
    monkeypatch.setattr("matplotlib.image.imsave", lambda path, pixels: rendered.update({path.stem: pixels.shape}))
    monkeypatch.setitem(pictures.STYLE, "figure.dpi", 40)  # quick
    pictures.show(tmp_path, **ODD[case])
    assert set(rendered) == set(pictures.all_pictures(**ODD[case]))


def test_training_starts_without_matplotlib():
    text = Path(pictures.__file__).read_text()
    assert "\nimport matplotlib" not in text and "\nfrom matplotlib" not in text


@pytest.mark.maintain
def test_the_pictures_of_the_documents_are_those_that_the_program_draws(tmp_path):
    """Drawn anew into another folder: the same files, each under 200 KB."""
    figures = importlib.import_module("benchmarks.figures")
    figures.draw(tmp_path)
    checked_in = {path.name for path in (figures.ROOT / "docs" / "pictures").iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == checked_in and checked_in <= set(figures.FIGURES)
    assert all(path.stat().st_size < 200_000 for path in (figures.ROOT / "docs" / "pictures").iterdir())

"""benchmarks.extract: the front ends and networks always, films and sounds where PyAV and torchvision are installed."""
import math
import sys

import h5py
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import benchmarks.extract as extract
import data
from run import InputError

RATE = 16000


def error_of(action) -> str:
    """The message of the InputError that `action` raises, which is one line."""
    with pytest.raises(InputError) as caught:
        action()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def tone(hertz: float, seconds: float, rate: int = RATE) -> np.ndarray:
    return np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate).astype(np.float32)


def mel(hertz: float) -> float:
    return 1127 * math.log(1 + hertz / 700)


def slow_log_mel(second: np.ndarray) -> np.ndarray:
    """(RATE,) -> (96, 64): a window of 25 ms every 10 ms, its Fourier sum of 512 points written out, triangles that
    rise and fall linearly in mel."""
    window = np.array([0.5 - 0.5 * math.cos(2 * math.pi * n / 400) for n in range(400)])
    sums = np.exp(-2j * np.pi * np.outer(np.arange(257), np.arange(400)) / 512)  # (257, 400)
    edges = [mel(125) + i * (mel(7500) - mel(125)) / 65 for i in range(66)]
    triangles = np.zeros((257, 64))
    for k in range(257):
        for band in range(64):
            left, middle, right = edges[band:band + 3]
            at = mel(k * RATE / 512)
            if left < at < right:
                triangles[k, band] = (at - left) / (middle - left) if at < middle else (right - at) / (right - middle)
    rows = [np.abs(sums @ (second[160 * i:160 * i + 400] * window)) for i in range(96)]
    return np.log(np.stack(rows) @ triangles + 0.01)


def test_log_mel_is_what_vggish_was_trained_on():
    rng = np.random.default_rng(0)
    sound = np.stack([0.1 * rng.standard_normal(RATE), tone(1000, 1), np.zeros(RATE)]).astype(np.float32)
    found = extract.log_mel(torch.from_numpy(sound))
    assert found.shape == (3, 1, 96, 64)
    for second, picture in zip(sound, found[:, 0]):
        assert np.allclose(picture, slow_log_mel(second), rtol=1e-3, atol=1e-3)
    assert torch.equal(found[2], torch.full((1, 96, 64), 0.01).log())


def ported_weights() -> dict:
    """Random weights with the names and shapes of the published ones."""
    draw, state = torch.Generator().manual_seed(0), {}
    for number, (channels, width) in zip((0, 3, 6, 8, 11, 13), ((1, 64), (64, 128), (128, 256), (256, 256), (256, 512),
                                                                 (512, 512))):
        kernels = torch.empty(width, channels, 3, 3).normal_(generator=draw)
        state[f"features.{number}.weight"] = kernels / channels ** 0.5
        state[f"features.{number}.bias"] = torch.empty(width).normal_(generator=draw)
    for number, (channels, width) in zip((0, 2, 4), ((12288, 4096), (4096, 4096), (4096, 128))):
        state[f"embeddings.{number}.weight"] = torch.empty(width, channels).uniform_(-1, 1, generator=draw) / channels
        state[f"embeddings.{number}.bias"] = torch.empty(width).normal_(generator=draw)
    return state


@pytest.mark.slow
def test_vggish_takes_the_ported_weights(monkeypatch):
    """Against the layers of the published network one after the other: it flattens maps with channels last."""
    state = ported_weights()
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **_: dict(state))
    found = extract.network("audio", True)
    x = torch.randn(2, 1, 96, 64, generator=torch.Generator().manual_seed(1))
    maps = x
    for number in (0, 3, 6, 8, 11, 13):
        maps = F.relu(F.conv2d(maps, state[f"features.{number}.weight"], state[f"features.{number}.bias"], padding=1))
        if number in (0, 3, 8, 13):
            maps = F.max_pool2d(maps, 2, 2)
    assert maps.shape == (2, 512, 6, 4)
    expected = torch.stack([torch.cat([maps[i, :, row, column] for row in range(6) for column in range(4)])
                            for i in range(2)])
    for number in (0, 2, 4):
        expected = F.relu(expected @ state[f"embeddings.{number}.weight"].T + state[f"embeddings.{number}.bias"])
    assert expected.shape == (2, 128) and torch.allclose(found(x), expected, rtol=1e-4, atol=1e-5)
    assert not found.training and not any(p.requires_grad for p in found.parameters())


def pretended(monkeypatch, seen: list):
    """Networks and readers that need no package: the features of a clip are the length of its name."""
    def features(path, model, device):
        if "bad" in path.name:
            raise IndexError("tuple index out of range")
        seen.append(path.name)
        return np.full((3, 128), len(path.stem), np.float32)
    monkeypatch.setattr(extract, "network", lambda modality, pretrained: nn.Identity())
    monkeypatch.setattr(extract, "sound_features", features)
    monkeypatch.setattr(extract, "film_features", lambda *args: np.tile(features(*args)[:, None, None], (1, 7, 7, 1)))


def folder_of(root, *names):
    root.mkdir(exist_ok=True)
    for name in names:
        (root / name).write_bytes(b"film")
    return root


def test_a_second_call_goes_on_where_the_first_one_ended(tmp_path, monkeypatch):
    pretended(monkeypatch, seen := [])
    clips, out = folder_of(tmp_path / "clips", "a.mp4", "bb.wav", "x-bad.mp4", ".DS_Store"), str(tmp_path / "mine.h5")
    message = error_of(lambda: extract.main(clips, out, modalities=("audio",)))
    assert "x-bad.mp4" in message and seen == ["a.mp4", "bb.wav"]
    (clips / "x-bad.mp4").rename(clips / "ccc.mp4")
    extract.main(clips, out, modalities=("audio", "video"))
    assert seen == ["a.mp4", "bb.wav", "ccc.mp4", "a.mp4", "bb.wav", "ccc.mp4"]
    data.check(out)
    with h5py.File(out) as h5:
        assert h5["audio"].shape == (3, 10, 128) and h5["video"].shape == (3, 10, 7, 7, 128)
        assert h5["audio"][:, 9, 0].tolist() == [1, 2, 3] and h5["split"][:].tolist() == [0, 0, 0]
        assert [name.decode() for name in h5["id"]] == ["a", "bb", "ccc"]


def test_a_trial_with_random_weights_leaves_nothing_to_go_on_from(tmp_path, monkeypatch):
    pretended(monkeypatch, seen := [])
    clips, out = folder_of(tmp_path / "clips", "a.mp4"), str(tmp_path / "mine.h5")
    for random in (True, False):
        extract.main(clips, out, modalities=("audio",), random=random)
    assert seen == ["a.mp4", "a.mp4"]


def test_the_table_chooses_clips_and_names_their_classes(tmp_path, monkeypatch):
    pretended(monkeypatch, [])
    clips, out = folder_of(tmp_path / "clips", "a.mp4", "bb.wav", "ccc.mp4"), str(tmp_path / "mine.h5")
    table = tmp_path / "list.csv"
    table.write_text("id,split,label\nccc,test,dog\na,train,cat\n")
    extract.main(clips, out, table, modalities=("audio",))
    with h5py.File(out) as h5:
        assert h5["label"][:].tolist() == [0, 1] and h5["classes"].asstr()[:].tolist() == ["dog", "cat"]
        assert h5["audio"][:, 0, 0].tolist() == [3, 1] and h5["split"][:].tolist() == [2, 0]
    assert "sentence" in error_of(lambda: extract.main(clips, out, table, modalities=("audio", "text")))
    table.write_text("id,split\n../a,test\n")
    assert "../a" in error_of(lambda: extract.main(clips, out, table, modalities=("audio",)))


@pytest.mark.parametrize("modality, missing", [("audio", "av"), ("video", "torchvision")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, modality, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    if modality == "audio":
        monkeypatch.setattr(extract, "network", lambda modality, pretrained: nn.Identity())
    clips = folder_of(tmp_path / "clips", "a.mp4")
    message = error_of(lambda: extract.main(clips, str(tmp_path / "mine.h5"), modalities=(modality,)))
    assert f"pip install {missing}" in message


def test_weights_that_cannot_be_had_are_one_line(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no route\nto host")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    clips = folder_of(tmp_path / "clips", "a.mp4")
    message = error_of(lambda: extract.main(clips, str(tmp_path / "mine.h5"), modalities=("audio",)))
    assert "no route" in message and "audio" in message


# --------------------------------------------------------------------------------------------- with optional packages


TONES, SHADES = (440, 0, 2000), (30, 120, 220)  # of each second


@pytest.fixture
def av():
    return pytest.importorskip("av", reason="films are read with PyAV: pip install av")


def film(av, path, rate: int = 12, seconds: float = 3, sound: bool = True, shade_of=None):
    """A film of one shade a second, or the shades of shade_of(frame), and one tone a second in two channels."""
    def second(frame):
        return SHADES[frame // rate % 3]
    with av.open(str(path), "w") as out:
        pictures = out.add_stream("mpeg4", rate=rate)
        pictures.width, pictures.height, pictures.pix_fmt = 96, 64, "yuv420p"
        heard = out.add_stream("aac", rate=44100, layout="stereo") if sound else None
        for i in range(int(seconds * rate)):
            frame = av.VideoFrame.from_ndarray(np.full((64, 96, 3), (shade_of or second)(i), np.uint8), "rgb24")
            frame.pts = i
            out.mux(pictures.encode(frame))
        out.mux(pictures.encode())
        if sound:
            wave = np.concatenate([0.5 * tone(hertz, 1, 44100) for hertz in TONES])[:int(seconds * 44100)]
            for i in range(0, len(wave), 1024):
                frame = av.AudioFrame.from_ndarray(np.stack([wave[i:i + 1024]] * 2), "fltp", "stereo")
                frame.sample_rate, frame.pts = 44100, i
                out.mux(heard.encode(frame))
            out.mux(heard.encode())
    return path


@pytest.mark.parametrize("rate, seconds, expected", [(12, 3, 3), (25, 2.6, 3), (30, 1.3, 1), (3, 3, 3), (12, 12, 10)])
def test_a_film_gives_sixteen_pictures_a_second(av, tmp_path, rate, seconds, expected):
    """The network here keeps the colours: a second has the shade of its own pictures, whatever their number."""
    batches = []

    def shades(pictures):
        batches.append(pictures)
        return F.adaptive_avg_pool2d(pictures, 7)
    path = film(av, tmp_path / "a.mp4", rate, seconds, sound=False)
    found = extract.film_features(path, shades, "cpu")
    assert found.shape == (expected, 7, 7, 3) and {batch.shape for batch in batches} == {(16, 3, 224, 224)}
    shown = found * (0.229, 0.224, 0.225) + (0.485, 0.456, 0.406)
    for second, picture in enumerate(shown):
        assert np.abs(255 * picture - SHADES[second % 3]).max() < 6


def test_a_second_is_the_mean_of_its_pictures(av, tmp_path):
    path = film(av, tmp_path / "a.mp4", 4, 2, False, lambda frame: (20, 60, 100, 220)[frame % 4] if frame < 4 else 120)
    found = extract.film_features(path, lambda pictures: F.adaptive_avg_pool2d(pictures, 7), "cpu")
    shown = 255 * (found * (0.229, 0.224, 0.225) + (0.485, 0.456, 0.406)).mean((1, 2, 3))
    assert np.abs(shown - (100, 120)).max() < 6


def test_a_sound_gives_one_second_after_the_other(av, tmp_path):
    """The network here names the loudest band."""
    found = extract.sound_features(film(av, tmp_path / "a.mp4"), lambda x: x[:, 0].mean(1), "cpu")
    assert found.shape == (3, 64)
    for second, hertz in enumerate(TONES):
        band = round((mel(hertz) - mel(125)) / (mel(7500) - mel(125)) * 65) - 1
        assert abs(found[second].argmax() - band) <= 1 if hertz else found[second].max() < found[0].max() - 2


@pytest.mark.parametrize("content", [b"", b"no film", bytes(5000)])
def test_a_damaged_film_is_one_line(av, tmp_path, monkeypatch, content):
    monkeypatch.setattr(extract, "network", lambda modality, pretrained: nn.Identity())
    clips = folder_of(tmp_path / "clips", "a.mp4")
    (clips / "a.mp4").write_bytes(content)
    for modality in ("audio", "video"):
        message = error_of(lambda: extract.main(clips, str(tmp_path / "mine.h5"), modalities=(modality,)))
        assert "a.mp4" in message


def test_a_film_without_sound_is_one_line(av, tmp_path, monkeypatch):
    monkeypatch.setattr(extract, "network", lambda modality, pretrained: nn.Identity())
    (tmp_path / "clips").mkdir()
    film(av, tmp_path / "clips/a.mp4", sound=False)
    message = error_of(lambda: extract.main(tmp_path / "clips", str(tmp_path / "mine.h5"), modalities=("audio",)))
    assert "a.mp4: no audio" in message


def small_bert(folder) -> str:
    """A BERT of one layer with random weights and a few words."""
    transformers = pytest.importorskip("transformers", reason="sentences take a BERT: pip install transformers")
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "barks"]))
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=8, num_hidden_layers=1, num_attention_heads=4, intermediate_size=8)
    transformers.BertModel(config).save_pretrained(folder)
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_raw_clips_become_a_file(av, tmp_path):
    """VGG19 and VGGish as they are, with random weights; a short clip repeats its last second."""
    try:
        import torchvision
    except (ImportError, RuntimeError) as error:  # RuntimeError: one that was built for another torch
        pytest.skip(f"VGG19 is torchvision's: pip install torchvision ({error})")
    (tmp_path / "clips").mkdir()
    film(av, tmp_path / "clips/a.mp4", 2, 1)
    table, out = tmp_path / "list.csv", str(tmp_path / "mine.h5")
    table.write_text("id,split,label,sentence\na,train,dog,a dog barks\n")
    bert = small_bert(tmp_path / "bert")
    extract.main(tmp_path / "clips", out, table, bert, "cpu", ("audio", "video", "text"), True)
    data.check(out)
    with h5py.File(out) as h5:
        assert h5["video"].shape == (1, 10, 7, 7, 512) and h5["audio"].shape == (1, 10, 128)
        for m in ("video", "audio"):
            assert (h5[m][0] == h5[m][0, :1]).all() and h5[m][0].any() and (h5[m][0] >= 0).all()
        assert h5["text"][0, :3].any(-1).all() and not h5["text"][0, 3:].any()

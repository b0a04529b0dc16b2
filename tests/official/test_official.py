"""The authors' checkpoints: filled by formula, they must compute what the released encoders compute."""
import json
import math
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import tyro

import probes
from official import checkpoints
from official.checkpoints import load_official
from run import InputError

pytestmark = pytest.mark.official
GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.exists(), reason="the golden values are not here")
WIDTH = {"audio": 128, "video": 512, "text": 256}  # of what enters a modality's linear map
SHAPE = {"audio": (10, 128), "video": (10, 7, 7, 512), "text": (10, 768)}
# Figures of the golden values: first three numbers of clip 0, segment 0, absolute sum, first five codes.
EXTRACT = {
    ("uni_code", "audio"): ([1.43659632815165, -0.3864195525747443, 0.9517781385982795], 4130.457941185383,
                            [264, 264, 91, 224, 131]),
    ("uni_code", "video"): ([0.4419248703836816, -0.7860032572538894, 0.7086469214024802], 4150.497459451606,
                            [80, 0, 386, 293, 386]),
    ("uni_code", "text"): ([1.2123137973716427, -0.13453074782386457, 0.8837383653934409], 4109.31249797301,
                           [265, 398, 225, 52, 52]),
    ("micu", "text"): ([1.2123137973716427, -0.13453074782386457, 0.8837383653934409], 4109.31249797301, [0] * 5),
    ("codaar", "audio"): ([1.223016966294569, -0.2643248355545838, 0.7148832488513569], 4134.933243755522,
                          [360, 360, 360, 360, 737]),
    ("codaar", "video"): ([0.4130793790183605, -0.7207222350162633, 0.7955351501780756], 4153.422566869796,
                          [210, 343, 587, 556, 791]),
    ("codaar", "text"): ([1.2455219531283392, -0.15822190566865385, 0.8554560274127985], 4107.558854416394,
                         [191, 18, 599, 222, 701])}
ROW_SUM = {"audio": 9798.524246499022, "video": 9762.97397822802, "text": 9781.927055289889}  # of CoDAAR's rows


def layer(prefix):
    return [(f"{prefix}.{name}", shape) for name, shape in (
        ("self_attn.in_proj_weight", [768, 256]), ("self_attn.in_proj_bias", [768]),
        ("self_attn.out_proj.weight", [256, 256]), ("self_attn.out_proj.bias", [256]),
        ("linear1.weight", [1024, 256]), ("linear1.bias", [1024]), ("linear2.weight", [256, 1024]),
        ("linear2.bias", [256]), ("norm1.weight", [256]), ("norm1.bias", [256]), ("norm2.weight", [256]),
        ("norm2.bias", [256]))]


def linear(name, out, width):
    return [(f"{name}.weight", [out, width]), (f"{name}.bias", [out])]


def conv(name, out, width, size):
    return [(f"{name}.weight", [out, width, size, size]), (f"{name}.bias", [out])]


def names(method):
    """Names and shapes of the encoder and of the text LSTM in a checkpoint of the authors, in their order."""
    aligned = method == "codaar"
    size, width = (800, 768) if aligned else (400, 256)
    counts = ["ema_count", "ema_count_v", "ema_count_a", "ema_count_t"] if aligned else ["ema_count"]
    quantizer = [("Cross_quantizer.embedding", [size, width]), *((f"Cross_quantizer.{c}", [size]) for c in counts),
                 ("Cross_quantizer.ema_weight", [size, width]), ("Cross_quantizer.unactivated_count", [size])]
    pool = "video_semantic_encoder"
    pooling = [(f"{pool}.se_layer.0.weight", [64, 512]), (f"{pool}.se_layer.2.weight", [512, 64]),
               *linear(f"{pool}.affine_video_ave", 256, 512), *linear(f"{pool}.affine_video_self", 256, 512),
               *linear(f"{pool}.ave_v_att", 1, 256)]
    specific = [*linear("Audio_encoder.audio_linear", 256, 128), *linear("Text_encoder.text_linear", 256, 256)]
    if aligned:
        for place, (out, wide) in {0: (1024, 512), 3: (2048, 1024)}.items():
            pooling += conv(f"{pool}.spatial_conv_stack.{place}", out, wide, 3)
            pooling += [(f"{pool}.spatial_conv_stack.{place + 1}.{name}", [] if name.startswith("num") else [out])
                        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]
        entries = quantizer + pooling + specific
    else:
        stack = "Video_encoder.conv_stack"
        entries = [*conv(f"{stack}.0", 1024, 512, 3), *conv(f"{stack}.2", 2048, 1024, 3),
                   *conv(f"{stack}.4", 2048, 2048, 1), (f"{stack}.5.stack.0.res_block.1.weight", [2048, 2048, 3, 3]),
                   (f"{stack}.5.stack.0.res_block.3.weight", [2048, 2048, 1, 1]),
                   *linear("Video_encoder.feed_forward.0", 1024, 2048),
                   *linear("Video_encoder.feed_forward.2", 512, 1024), *specific, *quantizer, *pooling]
    for m in ("video", "audio", "text") if aligned else ("video", "text", "audio"):
        for part in ("encoder_layer", "encoder.layers.0", "encoder.layers.1"):
            entries += layer(f"{m}_self_att.{part}")
        entries += linear(f"{m}_self_att.affine_matrix", 256, WIDTH[m])
    lstm = [(f"{kind}_l{number}{way}", [512] if kind.startswith("bias") else [
        512, 128 if "hh" in kind else 768 if number == 0 else 256])
        for number in (0, 1) for way in ("", "_reverse") for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    return entries, lstm


def filled(entries) -> dict:
    """The weights of the golden values: entry p at index i is a function of sin(0.37 i + 1.3 p). The convolutions,
    large and read by no probe, are one zero each."""
    state = {}
    for p, (name, shape) in enumerate(entries):
        if "conv_stack" in name:
            state[name] = torch.zeros(()).expand(shape)
            continue
        s = torch.sin(0.37 * torch.arange(math.prod(shape), dtype=torch.float64) + 1.3 * p)
        rows = math.prod(shape) / shape[0]
        value = 1 + 0.1 * s if name.endswith(("norm1.weight", "norm2.weight")) else s if "quantizer.embedding" in name \
            else s / math.sqrt(rows) if len(shape) > 1 else 0.1 * s
        state[name] = value.reshape(shape)
    return state


def inputs(modality):
    shape = (2, *SHAPE[modality])
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(0.11 * i**1.0001 + {"audio": 0.1, "video": 0.2, "text": 0.3}[modality]).reshape(shape)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """`checkpoint(method, **changes)`: the path of a filled checkpoint, with keys replaced or removed (None)."""
    kept = {}

    def make(method, **changes):
        if method not in kept:
            encoder, lstm = names(method)
            kept[method] = {"Encoder_parameters": filled(encoder), "Text_ar_lstm_parameters": filled(lstm), "epoch": 4,
                            "total_step": 1}
        path = tmp_path_factory.mktemp("official") / "checkpoint.pt"
        torch.save({key: value for key, value in (kept[method] | changes).items() if value is not None}, path)
        return path
    make.kept = kept
    return make


@needs_golden
def test_names_and_shapes_are_the_published_ones():
    published = json.loads((GOLDEN / "checkpoint_names.json").read_text())
    for method, key in (("uni_code", "uni_code"), ("micu", "micu"), ("codaar", "codaar_avt")):
        for ours, theirs in zip(names(method), published[key].values()):
            assert [(name, shape) for name, shape in ours] == [tuple(entry) for entry in theirs]


@pytest.mark.parametrize("method", ["uni_code", "micu", "codaar"])
def test_a_published_checkpoint_computes_what_was_published(checkpoint, method, capsys):
    path = checkpoint(method)
    script, args, shape, model, epochs = load_official(path, None if method == "codaar" else method)
    assert (script.METHOD, list(shape), epochs, args.spatial_pool) == (method, ["audio", "video", "text"], 5, "sum")
    told = capsys.readouterr().out
    assert "audio_self_att (12)" in told and "total_step (1)" in told and "epoch 4" in told  # not used
    for (_, m), (first, total, codes) in {k: v for k, v in EXTRACT.items() if k[0] == method}.items():
        with torch.no_grad():
            z, (quantized, index) = model.eval().semantic[m](inputs(m)), script.encode(model, inputs(m), m)
        assert z[0, 0, :3].tolist() == pytest.approx(first, abs=1e-9) and z.dtype == torch.float64
        assert z.abs().sum().item() == pytest.approx(total, rel=1e-12) and index[0, :5].tolist() == codes
        if method == "codaar":
            assert quantized.abs().sum().item() == pytest.approx(ROW_SUM[m], rel=1e-12)
    if method == "codaar":  # columns video, audio, text
        embedding = checkpoint.kept["codaar"]["Encoder_parameters"]["Cross_quantizer.embedding"]
        assert torch.equal(model.quantizer.by_modality()["audio"], embedding[:, 256:512])


@needs_golden
@pytest.mark.parametrize("key", ["uni_code", "micu", "codaar_avt", "codaar_av"])
def test_every_golden_number(key, tmp_path):
    golden, published = (json.loads((GOLDEN / f"{name}.json").read_text())[key] for name in ("forward",
                                                                                            "checkpoint_names"))
    state = {group: filled(entries) for group, entries in published.items()}
    torch.save(state | {"epoch": 0}, tmp_path / "checkpoint.pt")
    name = None if key.startswith("codaar") else key
    script, _, shape, model, _ = load_official(tmp_path / "checkpoint.pt", name)
    assert set(shape) == set(golden)
    for m, wanted in golden.items():
        with torch.no_grad():
            z, (quantized, index) = model.eval().semantic[m](inputs(m)), script.encode(model, inputs(m), m)
        found = {"semantic_first": z[0, 0, :6].tolist(), "semantic_last": z[1, 9, -6:].tolist(),
                 "semantic_abs_sum": z.abs().sum().item(), "code_index": index.tolist(),
                 "row_abs_sum": quantized.abs().sum().item()}
        assert index.tolist() == wanted["code_index"]
        for name in set(found) & set(wanted) - {"code_index"}:
            assert found[name] == pytest.approx(wanted[name], rel=1e-10, abs=1e-10), name


def test_two_modalities_without_the_text_lstm(checkpoint):
    _, _, shape, model, _ = load_official(checkpoint("uni_code", Text_ar_lstm_parameters=None), "uni_code")
    assert list(shape) == ["audio", "video"] == list(model.semantic)


def command(*words) -> None:
    """`python -m official.checkpoints` in this process"""
    tyro.cli(checkpoints.main, args=[*map(str, words), "--device", "cpu"])


@pytest.fixture
def ave(tmp_path, monkeypatch) -> str:
    """A file of random features of the published shapes, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(probes, "EPOCHS", 1)
    rng, label = np.random.default_rng(0), np.arange(24) % 4
    with h5py.File("ave.h5", "w") as h5:
        h5.attrs.update(format="cmg-features", version=1, name="ave")
        for m in ("audio", "video"):
            h5[m] = rng.random((24, *SHAPE[m]), np.float32)
        h5["label"], h5["classes"], h5["id"] = label, list("abcd"), [str(i) for i in range(24)]
        h5["split"] = (np.arange(24) // 8).astype(np.uint8)
    return "ave.h5"


def test_probing_a_published_checkpoint(checkpoint, ave, capsys):
    command(checkpoint("micu"), ave, "--method", "micu", "--known", 2, "--out", "o.json")
    tags = json.loads(Path("o.json").read_text())
    assert {"eval/classification/v2a/acc", "eval/open_set_2/a2v/hos"} < set(tags)
    assert not any(tag.endswith("_paper") for tag in tags)
    told = capsys.readouterr().out
    assert tags["eval/codebook/used_audio"] >= 1 and "micu, audio video text, 400 codes" in told and "acc_same" in told


@pytest.mark.parametrize("tasks, wanted", [
    ([], {"classification", "open_set_2"}), (["--tasks", "open_set"], {"open_set_2"}),
    (["--tasks", "classification", "retrieval"], {"classification"}), (["--tasks", "retrieval"], set())])
def test_probing_a_published_checkpoint_as_published(checkpoint, ave, tasks, wanted):
    if not tasks:  # the released open set needs no held-out clips
        with h5py.File(ave, "r+") as h5:
            h5["split"][:] = np.repeat([0, 2], 12)
    with h5py.File(ave, "r+") as h5:
        h5["split"][-12:] = 2  # retrieval needs more than ten
    command(checkpoint("micu"), ave, "--method", "micu", "--published", "--out", "o.json", *tasks)
    tags = json.loads(Path("o.json").read_text())
    assert {tag.split("/")[1] for tag in tags if tag.endswith("_paper")} == wanted


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("changes, method, needles", [
    ({}, None, ["--method uni_code", "micu"]), ({}, "codaar", ["400 x 256", "codaar"]),
    ({"epoch": None}, "micu", ["epoch", "missing"]),
    ({"Encoder_parameters": {"a": torch.zeros(1)}}, "micu", ["Cross_quantizer.embedding", "missing"]),
    ({"Text_ar_lstm_parameters": {"weight_ih_l0": torch.zeros(512, 768)}}, "micu", ["missing"]),
    ({"epoch": -1}, "micu", ["epoch -1"]),
    ({"Text_ar_lstm_parameters": None}, "codaar", ["part for text", "Text_ar_lstm_parameters"]),
    ({"Encoder_parameters": "deeper"}, "micu", ["audio_self_att.encoder.layers.2.norm1.bias", "no place"]),
    ({"Encoder_parameters": "nan"}, "micu", ["not finite"]),
    ({"Text_ar_lstm_parameters": "shorter"}, "micu", ["weight_hh_l0", "(512, 64)", "(512, 128)"]),
])
def test_checkpoints_that_do_not_fit(checkpoint, changes, method, needles):
    if changes.get("Encoder_parameters") in ("deeper", "nan"):
        more = {"deeper": {"audio_self_att.encoder.layers.2.norm1.bias": torch.zeros(256)},
                "nan": {"audio_self_att.affine_matrix.bias": torch.full((256,), torch.nan)}}
        changes = {"Encoder_parameters": filled(names("micu")[0]) | more[changes["Encoder_parameters"]]}
    if changes.get("Text_ar_lstm_parameters") == "shorter":
        changes = {"Text_ar_lstm_parameters": filled(names("micu")[1]) | {"weight_hh_l0": torch.zeros(512, 64)}}
    with pytest.raises(InputError) as caught:
        load_official(checkpoint("codaar" if "part for text" in needles else "micu", **changes), method)
    message = str(caught.value)
    assert all(needle in message for needle in needles) and "\n" not in message, message


def test_a_checkpoint_that_needs_more_than_tensors_is_refused(checkpoint, tmp_path):
    path = checkpoint("micu", optimizer=Hostile(tmp_path / "pwned"))
    with pytest.raises(InputError, match="not a checkpoint of the authors"):
        load_official(path, "micu")
    assert not (tmp_path / "pwned").exists()


def test_a_command_line_that_cannot_be_met(checkpoint, ave):
    path = checkpoint("micu")
    for words, needle in ((("checkpoint.pt",), "the feature files to probe it on"), ((path, ave), "--method micu"),
                          ((path, ave, "--method", "micu", "--out", "absent/o.json"), "folder does not exist"),
                          ((path, "absent.h5", "--method", "micu"), "absent.h5: no such file")):
        with pytest.raises(InputError, match=needle):
            command(*words)

"""Probing as a whole: it touches nothing, reads what `encode` gives, and is what the command line prints."""
import copy
import json
from dataclasses import asdict

import h5py
import numpy as np
import pytest
import torch
import tyro

import micu
import pictures
import probes
from conftest import edit
from data import Features
from official import protocol
from run import InputError
from toys import CPU

SIZE = 64  # codes


def args_of(**changes):
    return micu.Args(codebook_size=SIZE, code_dim=64, **changes)


def model_for(features):
    torch.manual_seed(0)
    return micu.Model(features.shape, args_of())


def evaluate(model, features, encode=micu.encode, known=("5",), score="softmax"):
    plan = probes.Plan(features, features.shape, CPU, known=known, score=score)
    return plan.evaluate(model, encode, SIZE)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(probes, "EPOCHS", 1)


@pytest.mark.parametrize("training", [True, False])
def test_probes_leave_the_model_and_the_random_state_alone(tiny, training, quick):
    features = Features([tiny])
    model = model_for(features).train(training)
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    numpy_rng = np.random.get_state()[1].copy()
    first = evaluate(model, features)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    assert all(module.training is training for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), rng) and np.array_equal(np.random.get_state()[1], numpy_rng)
    torch.rand(3)
    assert evaluate(model.train(not training), features) == first  # nor do they depend on either


def test_a_plan_is_used_again_and_sees_the_model_as_it_is_then(tiny, quick):
    features = Features([tiny])
    model = model_for(features)
    plan = probes.Plan(features, features.shape, CPU, known=("5",))
    first, selections = plan.evaluate(model, micu.encode, SIZE), plan.selections
    assert plan.evaluate(model, micu.encode, SIZE) == first
    model.quantizer.codebook[:] = model.quantizer.codebook[0].clone()
    second, collapsed = plan.evaluate(model, micu.encode, SIZE), plan.selections
    assert second["eval/codebook/used_audio"] == 1 < first["eval/codebook/used_audio"]
    clips = len(features.clips("test"))
    assert {m: (len(row), row.sum().item()) for m, row in selections.items()} == dict.fromkeys(
        features.modalities, (SIZE, 10 * clips))
    assert all((row > 0).sum() == 1 for row in collapsed.values())
    assert plan.kept == {}  # no memory is held


def test_a_model_that_fails_is_left_as_it_was(tiny):
    features = Features([tiny])
    model = model_for(features).train()
    plan = probes.Plan(features, features.shape, CPU)
    with pytest.raises(RuntimeError, match="broken"):
        plan.evaluate(model, lambda *args: (_ for _ in ()).throw(RuntimeError("broken")), SIZE)
    assert model.training
    assert plan.evaluate(model, micu.encode, SIZE)["eval/codebook/used_audio"] >= 1


def test_features_that_are_not_finite(tiny, tmp_path):
    with h5py.File(tiny) as h5:
        audio = h5["audio"][:]
    audio[-2, 3, 4] = np.nan  # not among those that are looked at when the file is opened
    features = Features([edit(tiny, tmp_path / "nan.h5", audio=audio)])
    with pytest.raises(InputError, match="NaN or infinity in audio"):
        evaluate(model_for(features), features)


def test_encode_gives_the_nearest_rows_of_the_present_codebook(tiny):
    features = Features([tiny])
    model = model_for(features).eval()
    x = torch.from_numpy(features.read("video", np.arange(6))).float()
    for _ in range(2):  # the second time with another codebook
        with torch.no_grad():
            quantized, index = micu.encode(model, x, "video")
            z = model.semantic["video"](x)
        assert quantized.shape == (6, 10, 64) and index.shape == (6, 10)
        assert torch.equal(index, torch.cdist(z, model.quantizer.codebook.expand(6, -1, -1)).argmin(-1))
        assert torch.equal(quantized, model.quantizer.codebook[index])
        model.quantizer.codebook.copy_(model.quantizer.codebook.flip(0) * 1.5)


def test_probes_read_what_encode_gives(tiny):
    features, clips = Features([tiny]), np.arange(20, 70)
    model = model_for(features).eval()
    codes = probes.read_codes(model, micu.encode, features, "video", clips, SIZE, CPU)
    with torch.no_grad():
        quantized, index = micu.encode(model, torch.from_numpy(features.read("video", clips)).float(), "video")
    assert torch.equal(codes.rows[codes.index], quantized) and torch.equal(codes.index, index) and len(codes) == 50
    one_by_one = [probes.read_codes(model, micu.encode, features, "video", clips[i:i + 1], SIZE, CPU)
                  for i in range(50)]
    assert torch.equal(torch.cat([part.index for part in one_by_one]), index)  # whatever clips are read beside them


def test_each_clip_is_encoded_once(tiny, quick):
    features, read = Features([tiny]), []

    def encode(model, x, modality):
        read.extend((modality, clip.numpy().tobytes()) for clip in x)
        return micu.encode(model, x, modality)

    plan = probes.Plan(features, features.shape, CPU, probes.TASKS, known=("3", "5"))
    for times in (1, 2):  # nothing is kept for the second time
        plan.evaluate(model_for(features), encode, SIZE)
        assert {read.count(clip) for clip in read if clip[0] != "text"} == {times}


def test_a_probe_of_codes_is_linear_max_linear():
    torch.manual_seed(0)
    probe, codes = probes.ClipProbe(5, 3), probes.Codes(torch.randn(7, 5), torch.randint(7, (4, 6)))
    some = torch.tensor([2, 0])
    logits = probe(codes[some])
    expected = torch.stack([probe.classify(torch.stack([probe.hidden(codes.rows[k]) for k in clip]).max(0).values)
                            for clip in codes.index[some]])
    assert torch.allclose(logits, expected, atol=1e-6)
    gradients = [torch.autograd.grad(out.square().sum(), probe.parameters(), retain_graph=True)
                 for out in (logits, expected)]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients))


# ----------------------------------------------------------------------------------------------- codes that tell labels
def mean_accuracy(tags) -> float:
    return np.mean([value for tag, value in tags.items() if "/classification/" in tag and tag.endswith("/acc")])


def test_an_untrained_model_is_near_chance(small):
    features = Features([small])
    assert mean_accuracy(evaluate(model_for(features), features)) < 0.2  # ten classes


@pytest.fixture(scope="module")
def oracle(small):
    """`make(wrong)`: an `encode` whose codes tell the label, a false one for test clips of the modality `wrong`;
    `probe(encode, features)`: all its tags."""
    own = Features([small])
    wanted = {}
    for m in ("audio", "text"):
        clips = own.read(m, np.arange(len(own))).astype(np.float32)
        wanted |= {(m, clip.tobytes()): (c, s == 2) for clip, c, s in zip(clips, own.label, own.split)}
    vectors = torch.randn(10, 1024, generator=torch.Generator().manual_seed(0))

    def make(wrong=None):
        def encode(model, x, modality):
            label, test = map(torch.tensor, zip(*(wanted[modality, clip.numpy().tobytes()] for clip in x)))
            index = ((label + (test if modality == wrong else 0)) % 10)[:, None].expand(-1, 10)
            return vectors[index], index
        return encode

    def probe(encode, features=own):
        shape = {m: features.shape[m] for m in ("audio", "text")}
        return probes.Plan(features, shape, CPU, known=("5",)).evaluate(torch.nn.Module(), encode, 10)

    return make, probe


def test_shuffled_codes_are_at_chance(oracle):
    make, probe = oracle

    def shuffled(model, x, modality):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(len(x)))
        return tuple(part[order] for part in make()(model, x, modality))

    seeing, blind = probe(make()), probe(shuffled)
    assert mean_accuracy(seeing) == 1 and seeing["eval/codebook/agreement"] == 1
    assert mean_accuracy(blind) < 0.25 and abs(blind["eval/open_set_5/a2t/auroc"] - 0.5) < 0.2


def test_a2t_is_trained_on_audio_and_tested_on_text(oracle):
    make, probe = oracle
    tags = {tag.removeprefix("eval/classification/"): value for tag, value in probe(make("text")).items()}
    assert (tags["a2t/acc"], tags["a2t/acc_same"], tags["t2a/acc"], tags["t2a/acc_same"]) == (0, 1, 1, 0)


def test_clean_probes_choose_nothing_by_test_labels(oracle, small, tmp_path, monkeypatch):
    make, probe = oracle
    with h5py.File(small) as h5:
        label, split = h5["label"][:], h5["split"][:]
    other = edit(small, tmp_path / "other.h5", label=np.where(split == 2, (label + 3) % 10, label))
    chosen = []
    for name in ("accuracy", "open_set_metrics"):  # confidence, prediction and threshold, but not the labels
        original = getattr(probes, name)
        monkeypatch.setattr(probes, name, lambda *args, original=original: chosen.append(
            [arg for i, arg in enumerate(args) if i != len(args) // 2]) or original(*args))
    honest, count = probe(make("text")), len(chosen)
    deceived = probe(make("text"), Features([other]))
    assert honest != deceived and len(chosen) == 2 * count > 0
    for a, b in zip(chosen[:count], chosen[count:]):
        assert len(a) == len(b)
        assert all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(a, b))


# ------------------------------------------------------------------------------------------- what was not learned, codes
def test_a_run_that_learned_is_silent_and_each_failure_has_its_line(tiny):
    features = Features([tiny])
    plan = probes.Plan(features, features.shape, CPU)
    chance = {"cpc": 26.3, "cmcm": 13.1}
    logged = {"losses/cpc": 15.8, "losses/cmcm": 7.5, "losses/recon": 99.0}
    tags = {f"eval/codebook/perplexity_{m}": value for m, value in (("audio", 87.0), ("video", 120.0), ("text", 22.0))}
    tags |= {f"eval/classification/{way}/acc_same": 0.9 for way in ("a2v", "v2a", "t2a")}
    plan.selections = dict.fromkeys(features.modalities, torch.ones(400))
    assert plan.not_learned(logged, chance, tags) == []
    for changed, needles in (
            (({"losses/cpc": 22.5}, {}), ["loss cpc is 22.50", "26.30", "--epochs"]),
            (({}, {"eval/codebook/perplexity_text": 1.2}), ["codes of text", "1.2", "--reset-after"]),
            (({}, {"eval/classification/v2a/acc_same": 0.13}), ["a probe of video", "of video", "13%", "10%"]),
            (({}, {"eval/classification/v2a/acc": 0.13}), ["a probe of video", "of audio", "13%", "10%"])):
        (line,) = plan.not_learned(logged | changed[0], chance, tags | changed[1])
        assert line.startswith("warning: ") and all(needle in line for needle in needles), line
    small = {f"eval/codebook/perplexity_{m}": 4.0 for m in features.modalities}  # all of four codes in use
    plan.selections = dict.fromkeys(features.modalities, torch.ones(4))
    assert plan.not_learned(logged, chance, tags | small) == [] == plan.not_learned({}, chance, tags)


def test_codes_of_a_file_without_labels_split_or_classes(run, tiny, tmp_path, capsys):
    edit(tiny, "mine.h5", label=None, split=None, classes=None, events__audio=None, events__video=None, mask=None,
         text=None)
    command(probes.main, run, "mine.h5", "--codes", "codes.h5")
    assert "80 clips in audio video" in capsys.readouterr().out
    method, args, shape, model, _ = probes.load("run")
    with h5py.File("codes.h5") as h5, h5py.File("mine.h5") as mine:
        assert set(h5["code_index"]) == {"audio", "video"} and list(h5["id"]) == list(mine["id"])
        for m in h5["code_index"]:
            features = torch.from_numpy(mine[m][:]).float()
            quantized, code_index = method.encode(model, features, m)
            assert np.array_equal(h5["code_index"][m], code_index)
            np.testing.assert_array_equal(h5["codebook"][:][h5["code_index"][m][:]], quantized.detach())
    for words, needle in (((run, tiny, "--codes", "absent/codes.h5"), "the folder does not exist"),
                          ((run, "mine.h5", "--codes", "mine.h5"), "is there already"),
                          ((run, edit(tiny, "n.h5", audio=np.zeros((80, 10, 7), "f4")), "--codes", "c.h5"), "audio has")):
        with pytest.raises(InputError, match=needle):
            command(probes.main, *words)
    edit(tiny, "other.h5", audio=None, video=None, text=None, events__audio=None, events__video=None, mask=None,
         smell=np.zeros((80, 10, 7), "f4"))
    with pytest.raises(InputError, match="none of the model's modalities"):
        command(probes.main, run, "other.h5", "--codes", "c.h5")


# --------------------------------------------------------------------------------------------------------- command line
@pytest.fixture
def run(tiny, tmp_path, monkeypatch, quick):
    """A folder with a checkpoint of an untrained model, after 3 epochs on the file `data.h5`; the folder is current."""
    monkeypatch.chdir(tmp_path)
    edit(tiny, "data.h5")
    features = Features([tiny])
    model = model_for(features)
    folder = tmp_path / "run"
    folder.mkdir()
    torch.save({"method": "micu", "args": asdict(args_of(data=("data.h5",))), "shape": features.shape, "epoch": 3,
                "networks": torch.nn.ModuleDict({"model": model}).state_dict()}, folder / "checkpoint.pt")
    return folder


def command(main, *words) -> None:
    tyro.cli(main, args=[*map(str, words), "--device", "cpu"])


def test_loading(run, tiny):
    for path in (run, run / "checkpoint.pt"):
        method, args, shape, model, epochs = probes.load(path)
        assert (method.__name__, args.codebook_size, epochs) == ("micu", SIZE, 3)
        assert list(shape) == ["audio", "video", "text"]
        assert torch.equal(model.quantizer.codebook, model_for(Features([tiny])).quantizer.codebook)


def with_a_choice_that_is_gone(path) -> None:
    state = torch.load(path)
    state["args"]["spatial_pool"] = "paper"
    torch.save(state, path)


@pytest.mark.parametrize("spoil", [
    lambda path: path.unlink(), lambda path: path.write_bytes(b"nonsense"), with_a_choice_that_is_gone,
    lambda path: torch.save({"weights": torch.zeros(2)}, path), lambda path: torch.save({"method": "os"}, path)])
@pytest.mark.parametrize("main", [probes.main, protocol.main])
def test_without_a_checkpoint(run, spoil, main):
    spoil(run / "checkpoint.pt")
    with pytest.raises(InputError, match="checkpoint.pt") as caught:
        command(main, run)
    assert "\n" not in str(caught.value)


def test_files_of_one_data_set_are_of_one_origin_however_many_they_are(tiny, small):
    assert protocol.origins(Features([tiny])) == protocol.origins(Features([tiny, small]))


def test_codes_and_figures_are_two_commands(run):
    with pytest.raises(InputError, match="--codes probes nothing: leave out --out"):
        command(probes.main, run, "--codes", "codes.h5", "--out", "out.json")


def test_the_command_line_prints_and_writes_what_evaluate_gives(run, tiny, capsys):
    command(probes.main, run, "--known", "5", "--score", "energy", "--out", "out.json")
    found = json.loads((run.parent / "out.json").read_text())
    expected = evaluate(probes.load(run)[3], Features([tiny]), score="energy")
    assert found == expected and capsys.readouterr().out.rstrip("\n") == pictures.table(expected, probes.SCORES)
    command(probes.main, run, tiny, "--known", "5", "--score", "energy", "--out", "out.json")  # a file by name
    assert json.loads((run.parent / "out.json").read_text()) == found


def test_a_run_that_was_stopped_is_said_to_be(run, capsys):
    command(probes.main, run, "--tasks", "retrieval")
    assert "3 of 5 epochs" in capsys.readouterr().err
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    torch.save(state | {"epoch": 5}, run / "checkpoint.pt")
    command(probes.main, run, "--tasks", "retrieval")
    assert not capsys.readouterr().err


def test_the_published_protocol_of_a_run(run, capsys):
    command(protocol.main, run, "--out", "out.json", "--tasks", "classification", "localization", "open_set")
    tags = json.loads((run.parent / "out.json").read_text())
    assert all(tag.endswith("_paper") for tag in tags)
    assert {tag.split("/")[1] for tag in tags} == {"classification", "localization", "open_set_5"}
    assert "hos_paper" in capsys.readouterr().out


def test_files_of_one_modality_each(run, tiny):
    """Video of one file, sound of another with other names, shuffled clips and a class that the first one lacks."""
    with h5py.File(tiny) as h5:
        names, order = [f"class {i}" for i in range(10)], np.random.default_rng(0).permutation(80)
        edit(tiny, "video.h5", audio=None, text=None, events__audio=None,
             label=np.where(h5["label"][:] == 9, -1, h5["label"][:]))
        edit(tiny, "audio.h5", video=None, text=None, mask=None, events__video=None, classes=names,
             **{name: h5[name.replace("__", "/")][:][order]
                for name in ("audio", "events__audio", "label", "split", "id")})
        maps = [f"class {i}={h5['classes'][i].decode()}" for i in range(9)]
    command(probes.main, run, "video.h5", "--target", "audio.h5", "--class-map", *maps, "--known", "3", "0,2,4",
            "--tasks", "classification", "open_set", "localization", "--out", "out.json")
    found = json.loads((run.parent / "out.json").read_text())
    assert {tag.split("/")[1]: tag.split("/")[2] for tag in found if "codebook" not in tag} == dict.fromkeys(
        ("classification", "open_set_3", "open_set_0,2,4", "localization"), "v2a")


@pytest.mark.parametrize("main", [probes.main, protocol.main])
def test_a_command_line_that_cannot_be_met(run, tiny, main):
    with h5py.File(tiny) as h5:
        edit(tiny, "narrow.h5", audio=h5["audio"][..., :100])
    for words, needle in (((), "give a run folder"), ((run, "absent.h5"), "absent.h5: no such file"),
                          ((run, "narrow.h5"), "audio has shape"), ((run, "--known", "99"), "--known 99"),
                          ((run, "--target", "absent.h5"), "absent.h5"), ((run, "--class-map", "a=b"), "--class-map"),
                          ((run, "--out", "absent/out.json"), "absent/out.json: the folder does not exist")):
        with pytest.raises(InputError, match=needle) as caught:
            command(main, *words)
        assert "\n" not in str(caught.value)

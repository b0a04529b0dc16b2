"""From raw clips to a file of the features that the authors used.

    python -m benchmarks.extract CLIPS --out mine.h5 [--table clips.csv] [--modalities audio video text --bert NAME]

CLIPS holds ID.mp4, ID.wav, ... Film: of each second the mean of 16 VGG19 pool5 maps, by torchvision's weights (the
authors' are Keras's, for other colours). Sound: of each second a VGGish vector without PCA, as in AVE, ported weights.
Sentence: its first 10 BERT vectors. Arrays stay in OUT-npy, where a second call goes on.
"""
import sys
from pathlib import Path
from typing import Literal, Optional

import numpy as np
import torch
import tyro
from torch import nn

from official.convert import Root, T, archives, convert_npy_folder, embed, read_table
from run import InputError, explain_input_errors, first_line, pick_device

FRAMES, RATE, WINDOW, HOP, FFT, MELS = 16, 16000, 400, 160, 512, 64  # a second's pictures; 25 ms of sound every 10 ms
VGGISH = "https://github.com/harritaylor/torchvggish/releases/download/v0.1/vggish-10086976.pth"


def film_features(path: Path, vgg19: nn.Module, device) -> np.ndarray:
    """(S, 7, 7, 512) of S <= T seconds, the last one filled up with the last picture: means over the frames' maps."""
    import av
    taken, end, start = [], 0.0, None
    with av.open(str(path)) as film:
        for frame in film.decode(video=0):
            start = frame.time if start is None else start
            end = frame.time - start + 1 / float(film.streams.video[0].average_rate or 25)
            moments = min(int(np.ceil(end * FRAMES - 1e-6)), T * FRAMES)  # those before the next frame
            taken += [torch.from_numpy(frame.reformat(224, 224, "rgb24").to_ndarray())] * (moments - len(taken))
    seconds = min(max(round(end), 1), T)
    pictures = torch.stack((taken + taken[-1:] * FRAMES)[:seconds * FRAMES]).permute(0, 3, 1, 2)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], device=device)[..., None, None]
    maps = [vgg19((second.to(device) / 255 - mean) / std).mean(0) for second in pictures.split(FRAMES)]
    return torch.stack(maps).permute(0, 2, 3, 1).cpu().numpy()


def sound_features(path: Path, vggish: nn.Module, device) -> np.ndarray:
    """(S, 128) of S <= T seconds of one channel, the last one filled up with silence."""
    import av
    with av.open(str(path)) as film:
        mono = av.AudioResampler("flt", "mono", RATE)
        pieces = [piece.to_ndarray()[0] for frame in (*film.decode(audio=0), None) for piece in mono.resample(frame)]
    seconds = min(max(round(sum(map(len, pieces)) / RATE), 1), T)
    wave = torch.from_numpy(np.pad(np.concatenate(pieces), (0, RATE))[:seconds * RATE])
    return vggish(log_mel(wave.reshape(seconds, RATE)).to(device)).cpu().numpy()


def log_mel(wave: torch.Tensor) -> torch.Tensor:
    """Sound (S, RATE) -> (S, 1, 96, 64), the log of 64 mel bands in 96 windows of each second (Hershey et al. 2017)."""
    spectrum = torch.fft.rfft(wave.unfold(-1, WINDOW, HOP) * torch.hann_window(WINDOW), FFT).abs()  # (S, 98, 257)
    hertz = torch.cat([torch.tensor([125.0, 7500.0]), torch.linspace(0, RATE / 2, FFT // 2 + 1)])
    low, high, *bins = (1127 * torch.log1p(hertz / 700)).tolist()
    edges, bins = torch.linspace(low, high, MELS + 2), torch.tensor(bins)[:, None]
    rising, falling = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2]), (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return torch.log(spectrum[:, :96] @ torch.minimum(rising, falling).clamp(min=0) + 0.01)[:, None]


def network(modality: str, pretrained: bool) -> nn.Module:
    """VGG19 up to pool5, or VGGish: (S, 1, 96, 64) -> (S, 128), whose ported weights number the layers in two parts."""
    if modality == "video":
        from torchvision.models import vgg19
        return vgg19(weights="IMAGENET1K_V1" if pretrained else None).features.eval().requires_grad_(False)
    layers = []
    for block in ((1, 64), (64, 128), (128, 256, 256), (256, 512, 512)):
        for ends in zip(block, block[1:]):
            layers += [nn.Conv2d(*ends, 3, padding=1), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    dense = [nn.Linear(6 * 4 * 512, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 128), nn.ReLU()]
    if pretrained:
        state = torch.hub.load_state_dict_from_url(VGGISH, map_location="cpu", weights_only=True)
        first = state["embeddings.0.weight"].unflatten(1, (6, 4, 512))  # TensorFlow flattens maps channels last
        state["embeddings.0.weight"] = first.permute(0, 3, 1, 2).flatten(1)
        nn.ModuleDict({"features": nn.Sequential(*layers), "embeddings": nn.Sequential(*dense)}).load_state_dict(state)
    return nn.Sequential(*layers, nn.Flatten(), *dense).eval().requires_grad_(False)


def extract(modality: str, paths: list, places: list, pretrained: bool, device) -> None:
    """Write the features of each film or sound to its place, unless they are there. Raises InputError if it cannot."""
    path, features = f"the network for {modality}", film_features if modality == "video" else sound_features
    try:
        model = network(modality, pretrained).to(device)
        for path, place in zip(paths, places):
            if not Path(place).exists():
                np.save(f"{place}.part.npy", features(path, model, device))
                Path(f"{place}.part.npy").replace(place)
    except ImportError as error:
        raise InputError(f"raw clips need the package {error.name}: pip install {error.name}")
    except Exception as error:  # FFmpeg raises anything, a download too
        raise InputError(f"{path}: no {modality} ({first_line(error)})")


def main(clips: Root, out: str, table: Optional[Path] = None, bert: Optional[str] = None, device: str = "auto",
         modalities: tuple[Literal["audio", "video", "text"], ...] = ("audio", "video"), random: bool = False) -> None:
    """`table`: CSV of id, split (train, val, test) and, optional, label and sentence; without it all clips are train.
    `bert`: name or folder of a Hugging Face BERT. `random`: networks with random weights, to try the program."""
    folder, files = Path(out + "-random" * random + "-npy"), {path.stem: path for path in sorted(clips.glob("[!.]*.*"))}
    if not table:
        table = Path(f"{folder}.csv")
        table.write_text("\n".join(["id,split", *(f'"{name}",train' for name in files)]), encoding="utf-8")
    rows = read_table(table, ",", ("id", "split", *["sentence"] * ("text" in modalities)))
    for m in sorted(modalities, key="text".__ne__):  # what is over soon comes first
        (folder / m).mkdir(parents=True, exist_ok=True)
        places = archives(folder / m, [row["id"] for row in rows], ".npy")
        if m == "text":
            for place, vectors in zip(places, embed([row["sentence"] for row in rows], bert, "plain", None)):
                np.save(place, vectors)
        else:
            paths = [files.get(row["id"], clips / row["id"]) for row in rows]
            extract(m, paths, places, not random, pick_device(device))
    convert_npy_folder(folder, out, table, T)


if __name__ == "__main__":
    sys.excepthook = explain_input_errors
    tyro.cli(main)

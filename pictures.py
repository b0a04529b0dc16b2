"""What a finished run shows: arrays in, pictures out. Nothing here knows of features, networks or losses."""
import torch


def show_codebook(writer, codebook, selections: dict, step: int, share: float) -> None:
    """TensorBoard: the codebook in the projector, labelled with the modalities that use each code, and a usage picture.

    codebook (K, D), selections {m: (K,)}: a modality uses a code if it makes at least `share` of the code's selections
    (MICU, Fig. 6)."""
    modalities = list(selections)
    counts = torch.stack(list(selections.values()))  # (M, K)
    shares = counts / counts.sum(0).clamp(min=1)
    labels = []
    for column in shares.T.tolist():
        labels.append("+".join(m for m, s in zip(modalities, column) if s >= share) or "unused")
    writer.add_embedding(codebook.cpu(), labels, tag="codebook", global_step=step)
    rows = counts[:, counts.sum(0).argsort(descending=True)].sqrt()
    picture = (rows / rows.amax(1, keepdim=True).clamp(min=1)).repeat_interleave(24, 0).repeat_interleave(2, 1)
    writer.add_image("codebook/usage", picture, step, dataformats="HW")  # one band a modality, codes by total use

"""What a finished run shows: arrays in, tables and pictures out. Nothing here knows of features, networks or losses."""
import torch

SHARE = 0.1  # a modality shares a code if it makes at least this part of the code's selections


def show_codebook(writer, codebook, selections: dict, step: int) -> None:
    """TensorBoard: the codebook in the projector, labelled with the modalities that use each code, and a usage picture.

    codebook (K, D), selections {m: (K,)}: a modality uses a code if it makes at least SHARE of the code's selections
    (MICU, Fig. 6)."""
    modalities = list(selections)
    counts = torch.stack(list(selections.values()))  # (M, K)
    shares = counts / counts.sum(0).clamp(min=1)
    labels = []
    for column in shares.T.tolist():
        labels.append("+".join(m for m, s in zip(modalities, column) if s >= SHARE) or "unused")
    writer.add_embedding(codebook.cpu(), labels, tag="codebook", global_step=step)
    rows = counts[:, counts.sum(0).argsort(descending=True)].sqrt()
    picture = (rows / rows.amax(1, keepdim=True).clamp(min=1)).repeat_interleave(24, 0).repeat_interleave(2, 1)
    writer.add_image("codebook/usage", picture, step, dataformats="HW")  # one band a modality, codes by total use


def table(tags: dict, hidden: tuple = ()) -> str:
    """The `eval/` tags in plain columns, without those whose ending is `hidden`: fractions in percent with one decimal,
    counts as they are."""
    tasks = {}  # {task: {row: {column: cell}}}
    for tag, value in tags.items():
        _, task, *where, metric = tag.split("/")
        cell = f"{100 * value:.1f}"
        if metric.startswith(("used_", "perplexity_", "queries", "database")):
            cell = f"{value:.0f}"
        rows = tasks.setdefault(task, {})
        if task == "codebook":
            rows[metric] = {"value": cell}
        elif not metric.endswith(hidden):
            rows.setdefault(where[0], {})[metric] = cell
    lines = []
    for task, rows in tasks.items():
        columns = next(iter(rows.values()))
        lines += ["", f"{task:19}" + "  ".join(f"{column:>6}" for column in columns)]
        for row, cells in rows.items():
            shown = [cells.get(column, "-").rjust(max(len(column), 6)) for column in columns]
            lines.append(f"  {row:17}" + "  ".join(shown))
        if "hos_source" in columns and "hos" not in columns:
            lines.append("  no pairs: the threshold is the source's; --pairs FILE finds the target's")
    return "\n".join(lines[1:])

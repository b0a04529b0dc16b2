"""Helpers and slow references that the tests of several methods share.

A reference takes one vector, pair or cell at a time, as the equation of the paper reads; the code must agree with it in
values and gradients, in float64.
"""
import itertools

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

THREE = ["audio", "video", "text"]
MODALITIES = [*THREE, "flow"]
SOME = pytest.mark.parametrize("names", [MODALITIES[:2], THREE, MODALITIES], ids=["two", "three", "four"])
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
RESETS = list(itertools.product(["unshared", "unused"], ["paired", "batch", "live"]))  # rule and source


# -------------------------------------------------------------------------------------------------------------- inputs
def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=0, dtype=torch.float64, grad=False):
    """Normal random numbers"""
    return torch.randn(*shape, dtype=dtype, generator=generator(seed)).requires_grad_(grad)


def features(names, batch=3, segments=4, width=5, dtype=torch.float64, scale=1.0):
    """{m: (B, T, D)} with gradient"""
    z = {}
    for i, name in enumerate(names):
        z[name] = (rand(batch, segments, width, seed=i, dtype=dtype) * scale).requires_grad_()
    return z


def detached(z: dict) -> dict:
    return {m: tensor.detach().clone() for m, tensor in z.items()}


def codes(names, batch=3, segments=4, size=7):
    """{m: (B, T)} of random code indices"""
    drawn = generator(5)
    return {name: torch.randint(size, (batch, segments), generator=drawn) for name in names}


def turned(mapping: dict) -> dict:
    """The same dictionary in the opposite order"""
    return dict(reversed(mapping.items()))


def build(make, *arguments, dtype=torch.float64):
    """make(*arguments) in evaluation mode, its weights drawn from a seed of their own."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(*arguments).to(dtype).eval()


def small_args(script, **changes):
    """The settings of a script with eight codes of width four."""
    return script.Args(**{"codebook_size": 8, "code_dim": 4} | changes)


# ---------------------------------------------------------------------------------------------------------- assertions
def assert_close(actual, expected, tolerance=1e-9):
    """Equal shape, dtype, device and values."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def assert_same_loss(loss, reference, inputs):
    """Equal values, equal gradients with respect to every input."""
    assert_close(loss, reference)
    actual = torch.autograd.grad(loss, inputs, retain_graph=True)
    expected = torch.autograd.grad(reference, inputs, retain_graph=True)
    for left, right in zip(actual, expected, strict=True):
        assert_close(left, right)


def assert_same_output(output, reference, inputs):
    """Equal entries; of a random weighted sum of them equal gradients."""
    assert_close(output, reference)
    weight = rand(*output.shape, seed=99)
    assert_same_loss((weight * output).sum(), (weight * reference).sum(), inputs)


def assert_finite_with_gradient(loss, inputs):
    assert torch.isfinite(loss)
    for gradient in torch.autograd.grad(loss, inputs):
        assert torch.isfinite(gradient).all()


def assert_no_gradient(loss, inputs):
    for gradient in torch.autograd.grad(loss, inputs, allow_unused=True, retain_graph=True):
        assert gradient is None or not gradient.any()


def assert_uniform(counts):
    """Every cell within five standard deviations of an equal share."""
    counts = torch.as_tensor(counts, dtype=torch.float64).flatten()
    share = 1 / len(counts)
    expected = counts.sum() * share
    assert (counts - expected).abs().max() < 5 * (expected * (1 - share)).sqrt(), counts


def assert_draws_from_generator_alone(draw):
    """draw(generator) -> tensor: the same for the same seed, another for another; the global state is not touched."""
    state = torch.get_rng_state()
    first = draw(generator(1))
    again = draw(generator(1))
    other = draw(generator(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


def snapshot(module) -> dict:
    """Copies of the buffers and parameters"""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_unchanged(module, before: dict):
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


# ---------------------------------------------------------------------------------------------------- losses and codes
def mean(values):
    values = list(values)
    return sum(values) / len(values)


def squared_distances(z, codebook):
    """(..., D), (K, D) -> (N, K)"""
    rows = z.reshape(-1, z.shape[-1]).double()
    return torch.stack([torch.stack([((row - code) ** 2).sum() for code in codebook.double()]) for row in rows])


def slow_nearest(vector, codebook) -> int:
    distances = [((vector - code) ** 2).sum().item() for code in codebook]
    return distances.index(min(distances))


def slow_ema_update(ema_count, ema_sum, code_index, vectors, decay, epsilon=1e-5):
    """(K,), (K, D), (N,), (N, D) -> new ema_count, ema_sum, codebook"""
    count = torch.zeros_like(ema_count)
    total = torch.zeros_like(ema_sum)
    for k in range(len(ema_count)):
        chosen = [vector for index, vector in zip(code_index.tolist(), vectors) if index == k]
        count[k] = decay * ema_count[k] + (1 - decay) * len(chosen)
        total[k] = decay * ema_sum[k] + (1 - decay) * sum(chosen, torch.zeros_like(ema_sum[k]))
    all_counts = sum(count.tolist())
    smoothed = [(c + epsilon) / (all_counts + len(count) * epsilon) * all_counts for c in count.tolist()]
    return count, total, torch.stack([row / c for row, c in zip(total, smoothed)])


def count_uses(expected: dict, code_index: dict):
    """What one step adds to the buffers `usage` (M, K) and `steps_since_used` (M, K); {m: (B, T)} in order."""
    for i, index in enumerate(code_index.values()):
        for k in range(expected["usage"].shape[1]):
            chosen = index.flatten().tolist().count(k)
            expected["usage"][i, k] += chosen
            if chosen:
                expected["steps_since_used"][i, k] = 0
            else:
                expected["steps_since_used"][i, k] += 1


def dead_and_live(steps_since_used, reset_after, rule, source):
    """The codes to reset, and all that are not dead."""
    dead = []
    live = []
    for k, steps in enumerate(steps_since_used.T.tolist()):
        unused = [count >= reset_after for count in steps]
        gone = all(unused) if rule == "unused" else any(unused)
        (dead if gone else live).append(k)
    if source == "live" and not live:  # nobody to copy: nothing is reset
        return [], live
    return dead, live


def age(quantizer, reset_after=3):
    """Codes that a modality has not used for long: 1, 2 and 5 by some, 3 and from 15 on by all, 4 not long enough."""
    steps = quantizer.steps_since_used
    steps[0, 1] = reset_after
    steps[-1, 2] = reset_after + 5
    steps[:, 3] = reset_after
    steps[:, 4] = reset_after - 1
    steps[1:, 5] = reset_after
    steps[:, 15:] = reset_after + 2


def pair_similarity(x, y, similarity):
    """(D,), (D,) -> ()"""
    product = (x * y).sum()
    if similarity == "dot" or not (x.any() and y.any()):  # a fully masked vector has no angle: 0
        return product
    return product / (x.square().sum().sqrt() * y.square().sum().sqrt())


def minus_log_share(query, candidates, positive, temperature=1, similarity="dot"):
    """-log( exp(q . c_positive / tau) / sum_k exp(q . c_k / tau) ), one query."""
    weights = [torch.exp(pair_similarity(query, candidate, similarity) / temperature) for candidate in candidates]
    return -torch.log(weights[positive] / sum(weights))


def places(said, wanted, tolerance=1e-9):
    """Positions in the list `said` at which all of `wanted` stands."""
    return [i for i, vectors in enumerate(said) if (vectors - wanted).abs().max() < tolerance]


# ------------------------------------------------------------------------------------------------------------ networks
def layers(module, kind):
    """The layers of one kind, in the order in which they are applied."""
    return [layer for layer in module.modules() if isinstance(layer, kind)]


def slow_linear(linear, row):
    product = linear.weight @ row
    return product if linear.bias is None else product + linear.bias


def slow_lstm_direction(lstm, rows, suffix):
    """[(d,)] in the order of reading -> [(H,)]"""
    hidden = torch.zeros(lstm.hidden_size, dtype=rows[0].dtype)
    cell = hidden
    outputs = []
    for row in rows:
        gates = getattr(lstm, f"weight_ih_{suffix}") @ row + getattr(lstm, f"bias_ih_{suffix}")
        gates = gates + getattr(lstm, f"weight_hh_{suffix}") @ hidden + getattr(lstm, f"bias_hh_{suffix}")
        i, f, g, o = gates.chunk(4)
        cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
        hidden = torch.sigmoid(o) * torch.tanh(cell)
        outputs.append(hidden)
    return outputs


def slow_lstm(lstm, clip):
    """(T, d) -> [(H,)] of the last layer, or [(2 H,)] if it reads both ways"""
    rows = list(clip)
    for layer in range(lstm.num_layers):
        outputs = slow_lstm_direction(lstm, rows, f"l{layer}")
        if lstm.bidirectional:
            backward = slow_lstm_direction(lstm, rows[::-1], f"l{layer}_reverse")[::-1]
            outputs = [torch.cat(pair) for pair in zip(outputs, backward)]
        rows = outputs
    return rows


def slow_layer_norm(norm, row):
    centred = row - row.mean()
    return centred / (centred.square().mean() + norm.eps).sqrt() * norm.weight + norm.bias


def slow_attention(attention, rows):
    """Multi-head self-attention over the segments of one clip, [(D,)] -> [(D,)]"""
    projected = [attention.in_proj_weight @ row + attention.in_proj_bias for row in rows]
    queries, keys, values = zip(*[row.chunk(3) for row in projected])
    width = len(rows[0]) // attention.num_heads
    outputs = []
    for query in queries:
        heads = []
        for start in range(0, len(rows[0]), width):
            part = slice(start, start + width)
            weights = [torch.exp((query[part] * key[part]).sum() / width ** 0.5) for key in keys]
            heads.append(sum(weight * value[part] for weight, value in zip(weights, values)) / sum(weights))
        outputs.append(slow_linear(attention.out_proj, torch.cat(heads)))
    return outputs


def slow_transformer_layer(layer, rows):
    """Post-norm: attention and a feed-forward network, each added to its input and normalised."""
    outputs = []
    for row, mixed in zip(rows, slow_attention(layer.self_attn, rows)):
        row = slow_layer_norm(layer.norm1, row + mixed)
        ahead = slow_linear(layer.linear2, torch.relu(slow_linear(layer.linear1, row)))
        outputs.append(slow_layer_norm(layer.norm2, row + ahead))
    return outputs


def slow_convolution(conv, x):
    """(c, h, w) -> (c', h', w'), one cell at a time"""
    padding = conv.padding[0]
    size = conv.kernel_size[0]
    x = F.pad(x, (padding, padding, padding, padding))
    rows = []
    for i in range(x.shape[1] - size + 1):
        cells = [(conv.weight * x[:, i:i + size, j:j + size]).sum((1, 2, 3)) for j in range(x.shape[2] - size + 1)]
        rows.append(torch.stack(cells, -1))
    output = torch.stack(rows, -2)
    return output if conv.bias is None else output + conv.bias[:, None, None]


def slow_transposed_convolution(conv, x):
    """(c, h, w) -> (c', h + 2, w + 2): every cell is written, weighted, onto 3 x 3 cells of the output."""
    height, width = x.shape[1:]
    output = torch.zeros(conv.out_channels, height + 2, width + 2, dtype=x.dtype)
    for i, j in itertools.product(range(height), range(width)):
        written = (x[:, i, j, None, None, None] * conv.weight).sum(0)  # (c', 3, 3)
        output = output + F.pad(written, (j, width - 1 - j, i, height - 1 - i))
    return output + conv.bias[:, None, None]


def slow_residual(residual, x):
    wide, narrow = layers(residual, nn.Conv2d)
    return x + slow_convolution(narrow, torch.relu(slow_convolution(wide, torch.relu(x))))

"""What two or three scripts share, in each script that has it, against slow loops and by what it must do.

A changed script fails under its own name: `-k micu` chooses its tests, `-k "reset and codaar"` some of them.
"""
import itertools
import math

import pytest
import torch
import torch.nn as nn
from reference import (
    DEVICES,
    MODALITIES,
    RESETS,
    SOME,
    THREE,
    age,
    assert_close,
    assert_draws_from_generator_alone,
    assert_finite_with_gradient,
    assert_no_gradient,
    assert_same_loss,
    assert_same_output,
    assert_unchanged,
    assert_uniform,
    build,
    codes,
    count_uses,
    dead_and_live,
    detached,
    features,
    generator,
    layers,
    mean,
    minus_log_share,
    places,
    rand,
    slow_convolution,
    slow_ema_update,
    slow_linear,
    slow_lstm,
    slow_nearest,
    slow_residual,
    slow_transformer_layer,
    slow_transposed_convolution,
    small_args,
    snapshot,
    squared_distances,
)

import codaar
import micu
import uni_code
from run import InputError


def scripts(*modules):
    return pytest.mark.parametrize("script", modules, ids=[module.METHOD for module in modules])


ALL = scripts(micu, uni_code, codaar)
ONE_CODEBOOK = scripts(micu, uni_code)
PREDICTING = scripts(uni_code, codaar)  # Cross-CPC, code matching, specific encoders


# -------------------------------------------------------------------------------------------------------- nearest_code
@ALL
@pytest.mark.parametrize("shape", [(), (7,), (3, 4), (2, 3, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearest_code_is_the_argmin_of_the_squared_distance(script, shape, dtype):
    codebook = rand(9, 5, dtype=dtype) * torch.linspace(0.2, 3, 9, dtype=dtype)[:, None]  # norms differ
    z = rand(*shape, 5, seed=1, dtype=dtype, grad=True)
    assert_close(script.nearest_code(z, codebook), squared_distances(z, codebook).argmin(-1).reshape(shape))


@ALL
@pytest.mark.parametrize("dtype, scale", [(torch.bfloat16, 1), (torch.float16, 300), (torch.float32, 1e4)])
def test_nearest_code_measures_in_single_precision(script, dtype, scale):
    codebook = (rand(30, 16) * scale).to(dtype)
    z = (rand(20, 16, seed=1) * scale).to(dtype)
    distances = squared_distances(z, codebook)
    index = script.nearest_code(z, codebook)
    assert index.dtype == torch.int64
    assert_close(distances.gather(1, index[:, None])[:, 0], distances.amin(1), 1e-5)


@ALL
def test_nearest_code_stays_exact_under_autocast(script):
    codebook = rand(30, 16, dtype=torch.float32)
    z = rand(20, 16, seed=1, dtype=torch.float32)
    z[:10] = codebook[:10] + 0.002 * z[:10]
    codebook[10:20] = codebook[:10] + 0.004  # as near as bfloat16 cannot tell
    with torch.autocast("cpu", torch.bfloat16):
        index = script.nearest_code(z, codebook)
    assert_close(index, squared_distances(z, codebook).argmin(-1))


@ALL
@pytest.mark.parametrize("z, codebook, name", [((4, 5), (3, 6), "z|codebook"), ((4, 5), (5,), "codebook"),
                                               ((4, 5), (2, 3, 5), "codebook"), ((), (3, 5), "z")])
def test_nearest_code_rejects_wrong_shapes(script, z, codebook, name):
    with pytest.raises(ValueError, match=rf"\b({name})\b"):
        script.nearest_code(torch.zeros(z), torch.zeros(codebook))


# ---------------------------------------------------------------------------------------------------------- ema_update
def ema_inputs(dtype=torch.float64):
    ema_count = torch.tensor([0.0, 1e-4, 1.0, 3.0, 0.5, 20.0], dtype=dtype)  # codes 0 and 5 are not chosen below
    return ema_count, rand(6, 4, dtype=dtype), torch.tensor([3, 1, 3, 2, 4, 3, 1]), rand(7, 4, seed=1, dtype=dtype)


@ALL
@pytest.mark.parametrize("decay", [0.0, 0.9, 0.99, 1.0])
def test_ema_update_is_the_smoothed_quotient_of_unsmoothed_averages(script, decay):
    expected = slow_ema_update(*ema_inputs(), decay)
    for left, right in zip(script.ema_update(*ema_inputs(), decay), expected, strict=True):
        assert_close(left, right)


@ALL
def test_ema_update_repeated_does_not_accumulate_the_smoothing(script):
    ema_count, ema_sum, code_index, vectors = ema_inputs()
    actual = ema_count, ema_sum
    expected = ema_count, ema_sum
    for _ in range(50):
        actual = script.ema_update(*actual[:2], code_index, vectors, 0.9)
        expected = slow_ema_update(*expected[:2], code_index, vectors, 0.9)
    for left, right in zip(actual, expected, strict=True):
        assert_close(left, right)


@ALL
@pytest.mark.parametrize("decay", [0.9, 1.0])
def test_ema_update_returns_new_tensors_without_gradient(script, decay):
    inputs = ema_inputs()
    before = [tensor.clone() for tensor in inputs]
    outputs = script.ema_update(*inputs[:3], inputs[3].requires_grad_(), decay)
    for output in outputs:
        assert not output.requires_grad
        output.fill_(7.0)  # would show in an input that shares its memory
    for tensor, copy in zip(inputs, before):
        assert torch.equal(tensor, copy)


@ALL
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, vector_dtype", [(torch.float32, torch.float32), (torch.float64, torch.float64),
                                                 (torch.float32, torch.bfloat16)])
def test_ema_update_keeps_the_buffers_dtype_device_and_range(script, device, dtype, vector_dtype):
    ema_count, ema_sum, code_index, vectors = (tensor.to(device) for tensor in ema_inputs(dtype))
    for output in script.ema_update(ema_count, ema_sum * 1e4, code_index, (vectors * 1e4).to(vector_dtype), 0.99):
        assert (output.dtype, output.device) == (dtype, ema_count.device)
        assert torch.isfinite(output).all()


@ALL
@pytest.mark.parametrize("change, name", [
    ({"ema_count": (5,)}, "ema_count|ema_sum"), ({"ema_count": (6, 1)}, "ema_count"), ({"ema_sum": (6,)}, "ema_sum"),
    ({"code_index": (8,)}, "code_index|vectors"), ({"code_index": (7, 1)}, "code_index"),
    ({"vectors": (7, 3)}, "vectors|ema_sum"), ({"vectors": (7,)}, "vectors"),
    ({"vectors": (1, 4)}, "vectors|code_index"),
])
def test_ema_update_rejects_wrong_shapes(script, change, name):
    shapes = {"ema_count": (6,), "ema_sum": (6, 4), "code_index": (7,), "vectors": (7, 4)} | change
    tensors = {key: torch.zeros(shape) for key, shape in shapes.items()}
    tensors["code_index"] = tensors["code_index"].long()
    with pytest.raises(ValueError, match=rf"\b({name})\b"):
        script.ema_update(**tensors, decay=0.99)


# ------------------------------------------------------------------------------------------ sample_rows, copies_of_live
@ALL
@pytest.mark.parametrize("wanted", [3, 7])
def test_sample_rows_gives_every_row_once_and_as_it_is_if_there_are_enough(script, wanted):
    vectors = rand(7, 4)
    rows = script.sample_rows(vectors, wanted, generator())
    taken = [places(vectors, row, 1e-12) for row in rows]
    assert all(len(found) == 1 for found in taken)
    assert len({found[0] for found in taken}) == wanted


@ALL
@pytest.mark.parametrize("wanted", [8, 14, 19])
def test_sample_rows_gives_every_row_before_any_comes_again_and_tells_copies_apart(script, wanted):
    vectors = rand(7, 4)
    rows = script.sample_rows(vectors, wanted, generator())
    assert rows.shape == (wanted, 4)
    taken = [places(vectors, row, 0.02) for row in rows]
    times = [taken.count([i]) for i in range(7)]
    assert sum(times) == wanted and max(times) - min(times) <= 1
    for a, b in itertools.combinations(rows, 2):
        assert (a - b).abs().max() > 1e-6


@ALL
@pytest.mark.parametrize("wanted", [3, 7, 12])
def test_sample_rows_takes_the_same_rows_of_every_modality(script, wanted):
    vectors = rand(2, 7, 4)
    audio, video = script.sample_rows(vectors, wanted, generator())
    assert [places(vectors[0], row, 0.02) for row in audio] == [places(vectors[1], row, 0.02) for row in video]


@ALL
def test_sample_rows_draws_every_row_alike_from_the_generator_alone(script):
    drawn = generator()
    vectors = torch.arange(5.0)[:, None]
    first = torch.cat([script.sample_rows(vectors, 2, drawn)[:1] for _ in range(300)])
    assert_uniform(first.long().flatten().bincount(minlength=5))
    for wanted in (9, 30):
        assert_draws_from_generator_alone(lambda drawn: script.sample_rows(rand(20, 3), wanted, drawn))


@ALL
@pytest.mark.parametrize("shape", [(9, 4), (3, 9, 4)])
def test_copies_of_live_are_near_one_live_code_in_every_codebook(script, shape):
    codebook = rand(*shape)
    books = codebook.reshape(-1, 9, 4)
    dead = torch.tensor([True, False, True, False, False, True, True, True, False])
    donors = []
    drawn = generator()
    for _ in range(40):
        copies = script.copies_of_live(codebook, dead, drawn)
        assert copies.shape == codebook.shape
        for copy in copies.reshape(-1, 9, 4).transpose(0, 1):  # (M, D) of an index
            (donor,) = places(list(books.transpose(0, 1)), copy, 0.02)
            assert not dead[donor]
            assert (copy - books[:, donor]).abs().amax(1).min() > 0  # or the two would stay one
            donors.append(donor)
    assert_uniform(torch.tensor(donors).bincount(minlength=9)[~dead])
    assert_draws_from_generator_alone(lambda drawn: script.copies_of_live(codebook, dead, drawn))


# ----------------------------------------------------------------------------------------- Quantizer: forward, encode
def make_quantizer(script, names=THREE, **changes):
    """Its codebook, in float64, far from zero, its counts unequal."""
    args = small_args(script, **{"ema_decay": 0.9, "reset_after": 0} | changes)
    quantizer = build(script.Quantizer, list(names), args, dtype=torch.float32)
    quantizer.codebook = rand(*quantizer.codebook.shape, seed=40)
    quantizer.ema_count = rand(*quantizer.ema_count.shape, seed=41).abs() + 0.5
    quantizer.ema_sum = quantizer.codebook * quantizer.ema_count[:, None]
    return quantizer


@ALL
def test_quantizer_of_any_script_is_small_uniform_at_first_with_one_use_each(script):
    quantizer = build(script.QUANTIZER, THREE, small_args(script, codebook_size=40))
    codebook = quantizer.codebook
    assert 0.9 / 40 < codebook.abs().max() <= 1 / 40 and codebook.min() < -0.9 / 40
    assert quantizer.ema_count.eq(1).all()
    assert torch.equal(quantizer.ema_sum, getattr(quantizer, "codebooks", codebook))
    for counter in (quantizer.steps_since_used, quantizer.usage, quantizer.resets):
        assert not counter.any()
    assert quantizer.steps_since_used.shape == quantizer.usage.shape == (3, 40)
    assert not list(quantizer.parameters())  # no optimizer touches it


@ONE_CODEBOOK
@SOME
def test_quantizer_gives_the_nearest_codes_with_straight_through_gradients(script, names):
    quantizer = make_quantizer(script, names)
    before = snapshot(quantizer)
    z = features(names, width=4)
    quantized, index = quantizer(z)
    assert list(quantized) == list(index) == list(names)
    for m in names:
        assert index[m].tolist() == [[slow_nearest(vector, quantizer.codebook) for vector in clip] for clip in z[m]]
        for i, t in itertools.product(range(3), range(4)):
            assert_close(quantized[m][i, t].detach(), quantizer.codebook[index[m][i, t]])
        weight = rand(3, 4, 4, seed=50)
        (gradient,) = torch.autograd.grad((quantized[m] * weight).sum(), [z[m]], retain_graph=True)
        assert_close(gradient, weight)  # the identity
        assert_no_gradient(quantized[m].sum(), [z[n] for n in names if n != m])
    assert quantizer.width == 4
    assert_unchanged(quantizer, before)


@ONE_CODEBOOK
def test_quantizer_encode_gives_the_row_of_the_nearest_code(script):
    quantizer = make_quantizer(script)
    before = snapshot(quantizer)
    z = rand(3, 4, 4)
    for m in THREE:
        quantized, index = quantizer.encode(z, m)
        for i, t in itertools.product(range(3), range(4)):
            k = slow_nearest(z[i, t], quantizer.codebook)
            assert index[i, t] == k
            assert torch.equal(quantized[i, t], quantizer.codebook[k])
    assert_unchanged(quantizer, before)


@ALL
def test_quantizer_of_any_script_encodes_with_the_indices_of_training(script):
    z = detached(features(THREE, width=4))
    quantizer = build(script.QUANTIZER, THREE, small_args(script))
    quantizer.init_from_batch(z, generator())
    quantized, index = quantizer(z)
    assert torch.cat(list(index.values())).unique().numel() > 3
    for m in THREE:
        assert quantized[m].shape == (3, 4, quantizer.width)
        rows, same = quantizer.encode(z[m], m)
        assert torch.equal(same, index[m])
        assert rows.shape == (3, 4, quantizer.width)


# ------------------------------------------------------------------------------------ Quantizer: start, update, reset
def candidates(z, source):
    """Vectors (D,) that a code may become: outputs, or their means over the modalities at a segment."""
    found = []
    for i, t in itertools.product(*map(range, next(iter(z.values())).shape[:2])):
        said = [tensor[i, t].detach() for tensor in z.values()]
        found += [mean(said)] if source == "paired" else said
    return found


def origin(code, z, source, codebook, live):
    """The one candidate, or live code, that a reset code comes from. Candidates fewer than codes come with noise."""
    if source == "live":
        donor = min(live, key=lambda k: (code - codebook[k]).abs().max())  # a copied code has copies beside it
        assert 0 < (code - codebook[donor]).abs().max() < 0.02
        return donor
    said = candidates(z, source)
    (place,) = places(said, code, 1e-9 if len(said) >= len(codebook) else 0.02)
    return place


@ONE_CODEBOOK
@SOME
@pytest.mark.parametrize("start", ["paired", "batch"])
@pytest.mark.parametrize("size", [5, 12, 40])  # fewer codes than segments, as many, more
def test_quantizer_starts_from_distinct_outputs_or_their_means_at_a_segment(script, names, start, size):
    z = features(names, width=4)
    args = small_args(script, codebook_size=size, codebook_init=start, reset_source="live")
    quantizer = build(script.Quantizer, list(names), args)
    quantizer.init_from_batch(z, generator())
    said = candidates(z, start)
    taken = [places(said, code, 1e-9 if size <= len(said) else 0.02) for code in quantizer.codebook]
    assert all(len(found) == 1 for found in taken)
    assert len({found[0] for found in taken}) == min(size, len(said))
    for a, b in itertools.combinations(quantizer.codebook, 2):
        assert (a - b).abs().max() > 1e-6
    assert torch.equal(quantizer.ema_sum, quantizer.codebook)
    assert quantizer.ema_count.eq(1).all()
    assert not any(buffer.requires_grad for buffer in quantizer.buffers())


@ALL
def test_quantizer_of_any_script_stays_uniform_if_asked_and_draws_nothing(script):
    quantizer = build(script.QUANTIZER, THREE, small_args(script, codebook_init="uniform"))
    before = snapshot(quantizer)
    drawn = generator()
    quantizer.init_from_batch(features(THREE, width=4), drawn)
    assert_unchanged(quantizer, before)
    assert torch.equal(drawn.get_state(), generator().get_state())


@ONE_CODEBOOK
@pytest.mark.parametrize("start", ["paired", "batch"])
@pytest.mark.parametrize("size", [8, 40])
def test_quantizer_start_draws_from_the_generator_alone(script, size, start):
    quantizer = make_quantizer(script, codebook_size=size, codebook_init=start)
    z = features(THREE, width=4)

    def begin(drawn):
        quantizer.init_from_batch(z, drawn)
        return quantizer.codebook.clone()

    assert_draws_from_generator_alone(begin)


@ONE_CODEBOOK
@SOME
@pytest.mark.parametrize("rule, source, reset_after", [("unshared", "paired", 0), *[(*kind, 2) for kind in RESETS]])
def test_quantizer_update_and_resets_equal_the_loops_step_after_step(script, names, rule, source, reset_after):
    """One EMA of all modalities' `ema_input`, then the counters, then resets from `z`."""
    quantizer = make_quantizer(script, names, reset_rule=rule, reset_source=source, reset_after=reset_after)
    expected = snapshot(quantizer)
    drawn = generator()
    for step in range(5):
        z = features(names, 2, 3, 4, scale=1 + step)
        ema_input = {m: rand(2, 3, 4, seed=200 + 10 * step + i) for i, m in enumerate(names)}
        index = {}
        for i, m in enumerate(names):  # some codes die out, others come into use
            index[m] = torch.randint(4, (2, 3), generator=generator(300 + 10 * step + i)) + step
        quantizer.update(z, index, ema_input, drawn)

        expected["ema_count"], expected["ema_sum"], expected["codebook"] = slow_ema_update(
            expected["ema_count"], expected["ema_sum"], torch.cat([index[m].flatten() for m in names]),
            torch.cat([ema_input[m].flatten(0, 1) for m in names]), 0.9)
        count_uses(expected, index)
        dead, live = dead_and_live(expected["steps_since_used"], reset_after or math.inf, rule, source)
        before = expected["codebook"].clone()
        for k in dead:
            code = quantizer.codebook[k]
            origin(code, z, source, before, live)
            expected["codebook"][k] = code
            expected["ema_sum"][k] = code
            expected["ema_count"][k] = 1
            expected["steps_since_used"][:, k] = 0
        expected["resets"] += len(dead)
        for name, buffer in quantizer.named_buffers():
            assert_close(buffer, expected[name])
    assert (expected["resets"] > 0) == (reset_after > 0)


@ONE_CODEBOOK
@SOME
@pytest.mark.parametrize("rule, source", RESETS)
def test_quantizer_reset_gives_dead_codes_a_new_origin_and_the_statistics_of_one_use(script, names, rule, source):
    z = features(names, batch=8, width=4)
    quantizer = make_quantizer(script, names, codebook_size=30, reset_after=3, reset_rule=rule, reset_source=source)
    age(quantizer)
    dead, live = dead_and_live(quantizer.steps_since_used, 3, rule, source)
    assert len(dead) == (19 if rule == "unshared" else 16)
    before = snapshot(quantizer)
    quantizer.reset(z, generator())
    for name in ("codebook", "ema_sum", "ema_count"):
        assert torch.equal(getattr(quantizer, name)[live], before[name][live]), name
    assert torch.equal(quantizer.steps_since_used[:, live], before["steps_since_used"][:, live])
    assert torch.equal(quantizer.ema_sum[dead], quantizer.codebook[dead])
    assert quantizer.ema_count[dead].eq(1).all()
    assert not quantizer.steps_since_used[:, dead].any()
    assert quantizer.resets == len(dead)
    assert not any(buffer.requires_grad for buffer in quantizer.buffers())
    origins = {origin(quantizer.codebook[k], z, source, before["codebook"], live) for k in dead}
    assert len(origins) > 3  # each code draws for itself
    if source != "live":
        assert len(origins) == len(dead)


@ONE_CODEBOOK
@pytest.mark.parametrize("source", ["paired", "batch", "live"])
def test_quantizer_reset_draws_from_the_generator_alone(script, source):
    z = features(THREE, width=4)

    def reset(drawn):
        quantizer = make_quantizer(script, codebook_size=30, reset_after=3, reset_source=source)
        age(quantizer)
        quantizer.reset(z, drawn)
        return quantizer.codebook

    assert_draws_from_generator_alone(reset)


@ONE_CODEBOOK
@pytest.mark.parametrize("source", ["paired", "batch", "live"])
def test_quantizer_keeps_a_reset_code_in_place_in_the_next_step_without_use(script, source):
    z = features(THREE, width=4)
    quantizer = make_quantizer(script, reset_after=3, reset_source=source)
    quantizer.steps_since_used[:, 6] = 3
    quantizer.reset(z, generator())
    fresh = quantizer.codebook[6].clone()
    quantizer.update(z, codes(THREE, size=6), {m: 100 + z[m] for m in THREE}, generator())
    assert_close(quantizer.codebook[6], fresh, 1e-4)  # smoothing of the count


@ALL
@pytest.mark.parametrize("rule, source", RESETS)
def test_reset_of_any_script_never_happens_when_reset_after_is_0(script, rule, source):
    z = detached(features(THREE, width=4, dtype=torch.float32))
    args = small_args(script, reset_after=0, reset_rule=rule, reset_source=source)
    quantizer = build(script.QUANTIZER, THREE, args, dtype=torch.float32)
    index = {m: torch.zeros(3, 4, dtype=torch.int64) for m in THREE}
    for _ in range(20):
        quantizer.update(z, index, z, generator())
    assert quantizer.resets == 0
    assert quantizer.steps_since_used[:, 1:].eq(20).all() and quantizer.steps_since_used[:, 0].eq(0).all()
    assert quantizer.usage[:, 0].eq(20 * 12).all() and not quantizer.usage[:, 1:].any()


@ALL
@pytest.mark.parametrize("rule", ["unshared", "unused"])
def test_reset_of_any_script_waits_when_no_live_code_is_left_to_copy(script, rule):
    args = small_args(script, reset_after=3, reset_rule=rule, reset_source="live")
    quantizer = build(script.QUANTIZER, THREE, args)
    quantizer.steps_since_used.fill_(3)
    before = snapshot(quantizer)
    quantizer.reset(features(THREE, width=4), generator())
    assert_unchanged(quantizer, before)


@ALL
@pytest.mark.parametrize("dtype, z_dtype", [(torch.float32, torch.bfloat16), (torch.float64, torch.float64)])
def test_quantizer_of_any_script_keeps_its_dtype_whatever_that_of_the_outputs(script, dtype, z_dtype):
    quantizer = build(script.QUANTIZER, THREE, small_args(script, reset_after=1), dtype=dtype)
    z = {m: tensor.to(z_dtype) for m, tensor in detached(features(THREE, width=4)).items()}
    dtypes = [buffer.dtype for buffer in quantizer.buffers()]
    quantizer.init_from_batch(z, generator())
    for _ in range(3):
        quantizer.update(z, quantizer(z)[1], z, generator())
    assert quantizer.resets > 0
    assert [buffer.dtype for buffer in quantizer.buffers()] == dtypes
    for buffer in quantizer.buffers():
        assert torch.isfinite(buffer).all()


# ----------------------------------------------------------------------------------------------------------- cell_mean
@ALL
@pytest.mark.parametrize("height, width", [(7, 5), (1, 3), (1, 1)])
def test_cell_mean_averages_the_cells_of_every_segment(script, height, width):
    maps = rand(2, 3, height, width, 4, grad=True)
    cells = list(itertools.product(range(height), range(width)))
    rows = [mean(segment[i, j] for i, j in cells) for segment in maps.flatten(0, 1)]
    assert_same_output(script.cell_mean(maps), torch.stack(rows).unflatten(0, (2, 3)), [maps])


@ALL
def test_cell_mean_leaves_vectors_as_they_are(script):
    vectors = rand(2, 3, 4)
    assert torch.equal(script.cell_mean(vectors), vectors)


# --------------------------------------------------------------------------------------------------------- SpatialPool
SHARPNESS = {"attention": 10.0, "plain": 1.0}


def make_pool(script, kind, width=3, hidden=4):
    return build(script.SpatialPool, width, hidden, kind)


def gated_cells(pool, cells):
    """[(d,)] -> [(d,)]: x + x * gate(mean x)"""
    gate = pool.gate(mean(cells))
    return [cell + cell * gate for cell in cells]


def slow_pool(pool, kind, x):
    """(B, T, H, W, d) -> (B, T, d), one segment at a time"""
    outputs = []
    for segment in x.flatten(0, 1):
        cells = gated_cells(pool, list(segment.flatten(0, 1)))
        if kind == "sum":
            outputs.append(sum(cells))
            continue
        query = torch.relu(slow_linear(pool.mean_proj, mean(cells)))
        weights = []
        for cell in cells:
            score = torch.tanh(slow_linear(pool.score, query * torch.relu(slow_linear(pool.cell_proj, cell))))
            weights.append(torch.exp(SHARPNESS[kind] * score))
        outputs.append(sum(weight * cell for weight, cell in zip(weights, cells)) / sum(weights))
    return torch.stack(outputs).unflatten(0, x.shape[:2])


@ALL
@pytest.mark.parametrize("kind", ["attention", "plain", "sum"])
def test_spatial_pool_equals_the_loop_over_cells(script, kind):
    pool = make_pool(script, kind)
    x = rand(2, 3, 7, 5, 3, grad=True)
    parameters = [x, *pool.gate.parameters()]
    if kind != "sum":
        parameters += [*pool.mean_proj.parameters(), *pool.cell_proj.parameters(), *pool.score.parameters()]
    assert_same_output(pool(x), slow_pool(pool, kind, x), parameters)


@ALL
@pytest.mark.parametrize("kind, factor", [("attention", 1), ("plain", 1), ("sum", 35)])
def test_spatial_pool_gives_a_constant_map_back_times_one_plus_the_gate(script, kind, factor):
    """The weights of the cells sum to one, or all are one (`sum`)."""
    pool = make_pool(script, kind)
    cell = rand(2, 3, 3)
    x = cell[:, :, None, None].expand(2, 3, 7, 5, 3)
    assert_close(pool(x), factor * (cell + cell * pool.gate(cell)))


@ALL
@pytest.mark.parametrize("kind", ["attention", "plain"])
def test_spatial_pool_weights_sum_to_one_also_where_cells_differ(script, kind):
    pool = make_pool(script, kind)
    x = rand(2, 3, 7, 5, 3)
    x[..., 0] = 1  # a channel that is the same in all cells stays what the gate makes of it
    gate = pool.gate(x.mean((2, 3)))
    assert_close(pool(x)[..., 0], 1 + gate[..., 0])


@ALL
@pytest.mark.parametrize("kind", ["attention", "plain", "sum"])
def test_spatial_pool_reads_cells_in_any_order_and_every_segment_for_itself(script, kind):
    pool = make_pool(script, kind)
    x = rand(2, 3, 7, 5, 3)
    pooled = pool(x)
    shuffled = x.flatten(2, 3)[:, :, torch.randperm(35, generator=generator())].unflatten(2, (7, 5))
    assert_close(pool(shuffled), pooled)
    assert_close(pool(x.transpose(2, 3)), pooled)
    other = x.clone()
    other[1, 2] = rand(7, 5, 3, seed=1)
    assert_close(pool(other).flatten(0, 1)[:5], pooled.flatten(0, 1)[:5])
    assert (pool(other)[1, 2] - pooled[1, 2]).abs().max() > 1e-6


@ALL
def test_spatial_pool_sharpens_what_plain_attention_prefers(script):
    """Of two kinds of cells the log of the ratio of their weights is ten times as large."""
    x = torch.zeros(1, 1, 5, 5, 3, dtype=torch.float64)
    x[..., 0] = 1
    x[0, 0, 0, 0, 1] = 1  # one cell differs
    log_ratio = []
    for kind in ("plain", "attention"):
        pool = make_pool(script, kind, hidden=32)
        gate = pool.gate(x.mean((2, 3)))
        share = pool(x)[0, 0, 1] / (1 + gate[0, 0, 1])  # the weight of that cell
        log_ratio.append(torch.log(share / ((1 - share) / 24)))
    assert log_ratio[0].abs() > 1e-4
    assert_close(log_ratio[1], 10 * log_ratio[0])


# ----------------------------------------------------------------------------------- SemanticEncoder, SpecificEncoder
SHAPES = {"audio": (3, 6), "video": (3, 7, 5, 2), "text": (3, 5), "flow": (3, 5, 6, 2)}


def slow_semantic(encoder, modality, x):
    """(B, T, ...) -> (B, T, D), one clip at a time"""
    outputs = []
    for clip in x:
        rows = list(clip)
        if clip.dim() == 4:
            rows = list(slow_pool(encoder.pool, "attention", clip[None])[0])
        if modality == "text":
            rows = slow_lstm(encoder.lstm, clip)
        rows = [slow_linear(encoder.proj, row) for row in rows]
        for layer in encoder.transformer.layers:
            rows = slow_transformer_layer(layer, rows)
        outputs.append(torch.stack(rows))
    return torch.stack(outputs)


@ALL
@pytest.mark.parametrize("modality", MODALITIES)
def test_semantic_encoder_equals_the_loops_of_pool_lstm_and_transformer(script, modality):
    encoder = build(script.SemanticEncoder, modality, SHAPES[modality], small_args(script, code_dim=8))
    x = rand(2, *SHAPES[modality], grad=True)
    assert_same_output(encoder(x), slow_semantic(encoder, modality, x), [x, *encoder.proj.parameters()])
    for layer in encoder.transformer.layers:
        assert (layer.self_attn.num_heads, layer.linear1.out_features, layer.dropout.p) == (4, 1024, 0.1)
    assert len(encoder.transformer.layers) == 2


@ALL
def test_semantic_encoder_of_text_reads_both_ways_in_two_layers_of_128_units(script):
    lstm = build(script.SemanticEncoder, "text", (3, 5), small_args(script)).lstm
    assert (lstm.num_layers, lstm.hidden_size, lstm.bidirectional) == (2, 128, True)


@ALL
@pytest.mark.parametrize("modality", MODALITIES)
def test_semantic_encoder_knows_the_order_of_segments_only_of_text(script, modality):
    encoder = build(script.SemanticEncoder, modality, SHAPES[modality], small_args(script, code_dim=8))
    x = rand(2, *SHAPES[modality])
    difference = (encoder(x.flip(1)) - encoder(x).flip(1)).abs().max()
    assert difference > 1e-4 if modality == "text" else difference < 1e-9


@ALL
@pytest.mark.parametrize("code_dim", [1, 6, 255])
def test_semantic_encoder_refuses_a_code_dim_that_the_heads_do_not_divide(script, code_dim):
    with pytest.raises(InputError, match=f"--code-dim {code_dim}.*4") as error:
        script.SemanticEncoder("audio", (3, 6), small_args(script, code_dim=code_dim))
    assert "\n" not in str(error.value)


@PREDICTING
def test_specific_encoder_of_vectors_is_a_linear_layer_of_256_and_relu(script):
    encoder = build(script.SpecificEncoder, (3, 6))
    (linear,) = layers(encoder, nn.Linear)
    x = rand(2, 3, 6, grad=True)
    reference = torch.stack([torch.stack([torch.relu(slow_linear(linear, row)) for row in clip]) for clip in x])
    assert encoder.width == 256 == reference.shape[-1]
    assert_same_output(encoder(x), reference, [x, *encoder.parameters()])


def slow_specific(encoder, residual, x):
    """(B, T, H, W, d) -> (B * T, 4 d, H - 4, W - 4)"""
    first, second, third, *_ = layers(encoder, nn.Conv2d)
    outputs = []
    for clip in x:
        for segment in clip:
            y = segment.permute(2, 0, 1)  # channels first
            y = torch.relu(slow_convolution(first, y))
            y = torch.relu(slow_convolution(second, y))
            y = slow_residual(residual, slow_convolution(third, y))
            outputs.append(torch.relu(y))
    return torch.stack(outputs)


@PREDICTING
@pytest.mark.parametrize("height, width", [(7, 5), (5, 6)])
def test_specific_encoder_of_maps_equals_the_loops_of_convolutions(script, height, width):
    encoder = build(script.SpecificEncoder, (2, height, width, 2))
    (residual,) = layers(encoder, script.Residual)
    x = rand(2, 2, height, width, 2, grad=True)
    output = encoder(x)
    assert output.shape == (4, 8, height - 4, width - 4) and encoder.width == 8
    assert [conv.out_channels for conv in layers(encoder, nn.Conv2d)[:3]] == [4, 8, 8]
    assert [conv.kernel_size[0] for conv in layers(encoder, nn.Conv2d)[:3]] == [3, 3, 1]
    assert_same_output(output, slow_specific(encoder, residual, x), [x, *encoder.parameters()])


@PREDICTING
@pytest.mark.parametrize("cells", [(4, 7), (7, 4), (1, 1)])
def test_specific_encoder_refuses_maps_below_5_x_5_cells_in_one_line(script, cells):
    with pytest.raises(InputError, match=r"--specific map.*5 x 5") as error:
        script.SpecificEncoder((3, *cells, 2))
    assert "\n" not in str(error.value)
    script.SpecificEncoder((3, 5, 5, 2))


# ------------------------------------------------------------------------------------------------------------- Decoder
@PREDICTING
def test_decoder_of_vectors_adds_what_code_and_specific_say(script):
    decoder = build(script.Decoder, (3, 6), 4)
    (last,) = layers(decoder.net, nn.Linear)
    code = rand(2, 3, 4, grad=True)
    specific = rand(2, 3, 256, seed=1, grad=True)
    rows = []
    for i, t in itertools.product(range(2), range(3)):
        hidden = slow_linear(decoder.mix_code, code[i, t]) + slow_linear(decoder.mix_specific, specific[i, t])
        rows.append(slow_linear(last, torch.relu(hidden)))
    reference = torch.stack(rows).unflatten(0, (2, 3))
    assert reference.shape == (2, 3, 6) and decoder.mix_code.out_features == 256
    assert_same_output(decoder(code, specific), reference, [code, specific, *decoder.parameters()])


def slow_decoder(decoder, residual, code, specific):
    """(B, T, D), (B * T, 4 d, h, w) -> (B, T, h + 4, w + 4, d)"""
    first, second = layers(decoder, nn.ConvTranspose2d)
    outputs = []
    for segment, feature_map in zip(code.flatten(0, 1), specific):
        said = slow_linear(decoder.mix_code, segment)  # in every cell
        y = slow_convolution(decoder.mix_specific, feature_map) + said[:, None, None]
        y = torch.relu(slow_residual(residual, y))
        y = torch.relu(slow_transposed_convolution(first, y))
        outputs.append(slow_transposed_convolution(second, y).permute(1, 2, 0))
    return torch.stack(outputs).unflatten(0, code.shape[:2])


@PREDICTING
@pytest.mark.parametrize("height, width", [(7, 5), (5, 6)])
def test_decoder_of_maps_adds_the_code_in_every_cell_and_convolves_back(script, height, width):
    decoder = build(script.Decoder, (2, height, width, 2), 3)
    (residual,) = layers(decoder, script.Residual)
    code = rand(2, 2, 3, grad=True)
    specific = rand(4, 8, height - 4, width - 4, seed=1, grad=True)
    output = decoder(code, specific)
    assert output.shape == (2, 2, height, width, 2)
    assert [conv.in_channels for conv in layers(decoder, nn.ConvTranspose2d)] == [8, 4]
    assert decoder.mix_specific.kernel_size == (1, 1)
    reference = slow_decoder(decoder, residual, code, specific)
    assert_same_output(output, reference, [code, specific, *decoder.parameters()])


# -------------------------------------------------------------------------------------------------------- Model, encode
def make_model(script, names):
    """A model whose codebook holds outputs, and a batch of its features: wide, so that no ReLU lets nothing through."""
    shape = {m: (*SHAPES[m][:-1], 8) for m in names}
    model = build(script.Model, shape, small_args(script, code_dim=8, codebook_size=10))
    x = {m: rand(2, *shape[m], seed=i) for i, m in enumerate(names)}
    z = {m: model.semantic[m](x[m]) for m in names}
    model.quantizer.init_from_batch(z, generator())
    return model, x, z


@ALL
@pytest.mark.parametrize("cells", [(4, 7), (1, 1)])
def test_model_reads_maps_of_any_size(script, cells):
    shape = {"audio": (3, 6), "video": (3, *cells, 2)}
    model = build(script.Model, shape, small_args(script))
    assert set(dict(model.named_children())) == {"semantic", "quantizer"}
    assert script.encode(model, rand(2, 3, *cells, 2), "video")[1].shape == (2, 3)


def is_taught(module, loss) -> bool:
    gradients = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True, retain_graph=True)
    return any(gradient is not None and gradient.any() for gradient in gradients)


@SOME
def test_decoding_the_code_alone_teaches_the_encoder_of_the_modality_only(names):
    """MICU decodes the mean of the cells."""
    model, x, z = make_model(micu, names)
    quantized, _ = model.quantizer(z)
    decoders = {m: build(micu.decoder, model.quantizer.width, 8) for m in names}
    for m in names:
        decoded = decoders[m](quantized[m])
        loss = (decoded - micu.cell_mean(x[m])).square().mean()
        assert decoded.shape == (2, 3, 8)
        assert [n for n in names if is_taught(model.semantic[n], loss)] == [m]
        assert [n for n in names if is_taught(decoders[n], loss)] == [m]


@PREDICTING
@SOME
@pytest.mark.parametrize("kind", ["vector", "map"])
def test_decoding_code_and_specific_teaches_the_right_encoders(script, names, kind):
    """The code of CoDAAR holds all modalities, that of Uni-Code the modality itself."""
    model, x, z = make_model(script, names)
    quantized, _ = model.quantizer(z)
    target = x if kind == "map" else {m: script.cell_mean(x[m]) for m in names}
    encoders = {m: build(script.SpecificEncoder, target[m].shape[1:]) for m in names}
    decoders = {m: build(script.Decoder, target[m].shape[1:], model.quantizer.width) for m in names}
    for m in names:
        decoded = decoders[m](quantized[m], encoders[m](target[m]))
        loss = (decoded - target[m]).square().mean()
        assert decoded.shape == target[m].shape
        assert [n for n in names if is_taught(model.semantic[n], loss)] == (names if script is codaar else [m])
        for networks in (encoders, decoders):
            assert [n for n in names if is_taught(networks[n], loss)] == [m]


@ALL
@SOME
def test_encode_quantizes_what_the_semantic_encoder_says_and_changes_nothing(script, names):
    model, x, z = make_model(script, names)
    before = snapshot(model)
    _, trained = model.quantizer(z)
    for m in names:
        quantized, index = script.encode(model, x[m], m)
        expected, expected_index = model.quantizer.encode(z[m], m)
        assert_close(quantized, expected)
        assert torch.equal(index, expected_index) and torch.equal(index, trained[m])
        assert quantized.shape == (2, 3, model.quantizer.width)
    assert_unchanged(model, before)


# -------------------------------------------------------------------------------------------------------- time_aligned
@ONE_CODEBOOK
@SOME
def test_time_aligned_is_halfway_to_the_mean_of_the_others_at_the_same_segment(script, names):
    z = detached(features(names))
    copies = detached(z)
    aligned = script.time_aligned(z)
    assert list(aligned) == list(names)
    for m in names:
        for i, t in itertools.product(range(3), range(4)):
            assert_close(aligned[m][i, t], (z[m][i, t] + mean(z[n][i, t] for n in names if n != m)) / 2)
        assert torch.equal(z[m], copies[m])  # left alone


# ------------------------------------------------------------------------------------- cmcm_loss, code_log_probability
def code_distribution(clip, codebook):
    """(T, D), (K, D) -> (K,): the mean over the segments of a softmax of the negative distances"""
    shares = []
    for row in clip:
        weights = torch.stack([torch.exp(-(row - code).square().sum().sqrt()) for code in codebook])
        shares.append(weights / weights.sum())
    return mean(shares)


def slow_cmcm(z_a, z_b, codebook_a, codebook_b):
    p_a = [code_distribution(clip, codebook_a.detach()) for clip in z_a]
    p_b = [code_distribution(clip, codebook_b.detach()) for clip in z_b]
    losses = []
    for i, p in enumerate(p_a):
        weights = [torch.exp((p * torch.log(q)).sum() + (q * torch.log(p)).sum()) for q in p_b]
        losses.append(-torch.log(weights[i] / sum(weights)))
    return mean(losses)


def cmcm_inputs(scale, dtype=torch.float64, shared=False):
    z = [(rand(4, 3, 5, seed=i, dtype=dtype) * scale).requires_grad_() for i in range(2)]
    codebooks = [(rand(6, 5, seed=10 + i, dtype=dtype) * scale).requires_grad_() for i in range(2)]
    if shared:
        codebooks = [codebooks[0], codebooks[0]]
    return z, codebooks


@PREDICTING
@pytest.mark.parametrize("scale", [0.3, 1, 20])
def test_code_log_probability_is_that_of_the_mean_over_segments(script, scale):
    (z, _), (codebook, _) = cmcm_inputs(scale)
    actual = script.code_log_probability(z, codebook)
    reference = torch.stack([torch.log(code_distribution(clip, codebook.detach())) for clip in z])
    assert_close(actual.logsumexp(1), torch.zeros(4, dtype=torch.float64))  # of all codes: one
    assert_same_output(actual, reference, [z])
    assert_no_gradient(actual.sum(), [codebook])


@PREDICTING
@pytest.mark.parametrize("shared", [True, False], ids=["one codebook", "two codebooks"])
@pytest.mark.parametrize("scale", [0.3, 1, 3, 20])  # at 20 most shares are below any stabiliser one would add
def test_cmcm_equals_the_loop(script, scale, shared):
    z, codebooks = cmcm_inputs(scale, shared=shared)
    loss = script.cmcm_loss(*z, *codebooks)
    assert_same_loss(loss, slow_cmcm(*z, *codebooks), z)
    assert_no_gradient(loss, codebooks)


@PREDICTING
@pytest.mark.parametrize("scale", [1, 20])
def test_cmcm_is_accurate_in_single_precision(script, scale):
    z, codebooks = cmcm_inputs(scale, torch.float32)
    loss = script.cmcm_loss(*z, *codebooks)
    assert_close(loss.double(), slow_cmcm(*[tensor.double() for tensor in (*z, *codebooks)]), 1e-4)


@PREDICTING
@pytest.mark.parametrize("scale", [0, 1e-30, 1e-20, 1e-10, 1e-3, 1, 1e3, 1e8, 1e15])
@pytest.mark.parametrize("case", ["generic", "codewords", "one codeword", "equal clips"])
def test_cmcm_stays_finite_at_any_scale(script, case, scale):
    z, codebooks = cmcm_inputs(scale, torch.float32)
    index = codes(range(2), 4, 3, 6)
    z = {"generic": z,
         "codewords": [codebook[index[i]] for i, codebook in enumerate(codebooks)],
         "one codeword": [codebook[1].expand(4, 3, 5) for codebook in codebooks],
         "equal clips": [tensor[:1].expand(4, 3, 5) for tensor in z]}[case]
    z = [tensor.detach().clone().requires_grad_() for tensor in z]
    loss = script.cmcm_loss(*z, *codebooks)
    assert_finite_with_gradient(loss, z)
    if scale <= 1e-10 or case in ("one codeword", "equal clips"):  # nothing to tell the clips apart
        assert_close(loss.item(), math.log(4), 1e-5)


# ---------------------------------------------------------------------------------------------- cpc_loss, CrossModalCPC
@PREDICTING
@pytest.mark.parametrize("batch, width", [(1, 3), (2, 3), (6, 4)])
def test_cpc_loss_equals_the_loop_over_candidates(script, batch, width):
    z_target = rand(batch, width, grad=True)
    prediction = rand(batch, width, seed=1, grad=True)
    reference = mean(minus_log_share(prediction[i], z_target, i) for i in range(batch))
    assert_same_loss(script.cpc_loss(z_target, prediction), reference, [z_target, prediction])
    large = [(1e4 * tensor.detach().float()).requires_grad_() for tensor in (z_target, prediction)]
    assert_finite_with_gradient(script.cpc_loss(*large), large)


def slow_cpc(cpc, z, t, detach=False):
    """Eq. 6, the mean over the steps, summed over every ordered pair"""
    contexts = {m: [slow_lstm(cpc.lstm[m], clip[:t + 1])[-1] for clip in z[m]] for m in z}
    loss = 0
    for a, b in itertools.permutations(z, 2):
        losses = []
        for k, linear in enumerate(cpc.predict[a], start=1):
            of_b = [clip[t + k] for clip in z[b]]
            for i, context in enumerate(contexts[a]):
                prediction = linear.weight @ (context.detach() if detach else context)
                losses.append(minus_log_share(prediction, of_b, i))
        loss = loss + mean(losses)
    return loss


@PREDICTING
@pytest.mark.parametrize("names, steps", [(THREE[:2], 1), (THREE[:2], 3), (THREE, 2), (MODALITIES, 1)], ids=str)
def test_cross_modal_cpc_equals_the_loop_and_never_looks_ahead(script, names, steps):
    cpc = build(script.CrossModalCPC, names, 4, steps)
    z = features(names, segments=5, width=4, scale=2)
    for t in range(5 - steps):
        loss = cpc(z, t)
        assert_same_loss(loss, slow_cpc(cpc, z, t), [*z.values(), *cpc.parameters()])
        targets = torch.autograd.grad(slow_cpc(cpc, z, t, detach=True), list(z.values()))
        gradients = torch.autograd.grad(loss, list(z.values()))
        for actual, target in zip(gradients, targets, strict=True):
            assert_close(actual[:, t + 1:], target[:, t + 1:])  # after t: as targets, not through a context
            assert actual[:, :t + steps + 1].any(-1).all()
            assert not actual[:, t + steps + 1:].any()


@PREDICTING
def test_cross_modal_cpc_has_one_lstm_layer_a_modality_and_a_matrix_a_step(script):
    cpc = build(script.CrossModalCPC, THREE, 4, 2)
    for m in THREE:
        assert (cpc.lstm[m].num_layers, cpc.lstm[m].bidirectional, cpc.lstm[m].hidden_size) == (1, False, 4)
    assert len(list(cpc.parameters())) == 3 * (4 + 2)  # nothing shared, no bias beside W_k, nothing else


@PREDICTING
@pytest.mark.parametrize("segments, steps", [(10, 1), (10, 3), (2, 1), (6, 5)])
def test_cpc_can_start_at_every_moment_that_has_enough_segments_after_it(script, segments, steps):
    cpc = build(script.CrossModalCPC, THREE[:2], 4, steps)
    z = features(THREE[:2], segments=segments, width=4)
    for t in range(segments - steps):
        assert torch.isfinite(cpc(z, t))
    with pytest.raises(IndexError):
        cpc(z, segments - steps)


# -------------------------------------------------------------------------------------------------- types, wrong shapes
@PREDICTING
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device", DEVICES)
def test_cmcm_and_cpc_keep_dtype_and_device(script, device, dtype):
    z = {m: tensor.to(device, dtype) for m, tensor in detached(features(THREE)).items()}
    codebook = rand(7, 5, seed=30).to(device, dtype)
    cpc = build(script.CrossModalCPC, THREE, 5, 2).to(device, dtype)
    for loss in (script.cmcm_loss(z["audio"], z["video"], codebook, codebook),
                 script.cpc_loss(z["audio"][:, 0], z["video"][:, 0]), cpc(z, 1)):
        assert (loss.dtype, loss.device, loss.shape) == (dtype, z["audio"].device, ())


CMCM = ["z_a", "z_b", "codebook_a", "codebook_b"], [(4, 3, 5), (4, 3, 5), (6, 5), (6, 5)]
CMCM_WRONG = [(at, shape) for at in (0, 1) for shape in [(3, 5), (4, 3, 6), (1, 3, 5), (2, 4, 3, 5)]]
CMCM_WRONG += [(at, shape) for at in (2, 3) for shape in [(5,), (6, 4), (6, 1), (1, 5), (7, 5), (2, 6, 5)]]
CPC = ["z_target", "prediction"], [(4, 5), (4, 5)]
CPC_WRONG = [(at, shape) for at in (0, 1) for shape in [(4, 6), (4, 1), (3, 5), (1, 5), (5,), (2, 4, 5)]]


@PREDICTING
@pytest.mark.parametrize("function, at, shape", [*[("cmcm_loss", *wrong) for wrong in CMCM_WRONG],
                                                 *[("cpc_loss", *wrong) for wrong in CPC_WRONG]])
def test_cmcm_and_cpc_reject_wrong_shapes_by_name(script, function, at, shape):
    names, shapes = CMCM if function == "cmcm_loss" else CPC
    if len(shape) != len(shapes[at]):
        names = [names[at]]  # no doubt which one; otherwise two disagree and either may be named
    tensors = [torch.ones(shape if i == at else right) for i, right in enumerate(shapes)]
    with pytest.raises(ValueError, match=rf"\b({'|'.join(names)})\b"):
        getattr(script, function)(*tensors)


@PREDICTING
@pytest.mark.parametrize("shape", [(5,), (2, 4, 5)])
def test_cpc_loss_rejects_arguments_of_another_rank(script, shape):
    with pytest.raises(ValueError, match=r"\b(z_target|prediction)\b"):
        script.cpc_loss(torch.ones(shape), torch.ones(shape))


# ------------------------------------------------------------------------------------------------------------ gradients
@scripts(micu, uni_code, codaar)
@pytest.mark.parametrize("kind", ["all", "module"])
def test_gradients_are_clipped_together_or_each_network_alone(script, kind):
    """Of three networks the first has gradients of norm 3, the second of 0.4, the third of 4."""
    networks = torch.nn.ModuleDict({name: torch.nn.Linear(3, 2).double() for name in "abc"})
    wanted, before = {"a": 3.0, "b": 0.4, "c": 4.0}, {}
    for name, network in networks.items():
        drawn = [torch.randn(p.shape, dtype=torch.double) for p in network.parameters()]
        norm = sum(g.square().sum() for g in drawn).sqrt()
        for p, g in zip(network.parameters(), drawn):
            p.grad = g * wanted[name] / norm
        before[name] = [p.grad.clone() for p in network.parameters()]
    networks["idle"] = torch.nn.Linear(2, 2)  # of a loss that is switched off: no gradients
    norm = script.clip_gradients(networks, kind)
    del networks["idle"]
    whole = math.sqrt(3**2 + 0.4**2 + 4**2)
    assert norm.item() == pytest.approx(whole)
    share = {name: 0.5 / whole if kind == "all" else min(1, 0.5 / wanted[name]) for name in "abc"}
    for name, network in networks.items():
        for p, g in zip(network.parameters(), before[name]):
            torch.testing.assert_close(p.grad, g * share[name], rtol=1e-5, atol=0)

"""Mixes for a size: the choice is the best there is, the estimate is what it says, and the mix can be saved and used."""

import itertools
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

import models
from pyggml import cli, formats, quants
from pyggml.errors import PyggmlError
from pyggml.quantize import allocate, recipes, sensitivity
from pyggml.quantize.allocate import choose
from pyggml.quantize.job import plan
from pyggml.quantize.options import Options
from pyggml.quantize.sensitivity import Effort, Option, effort, expected, measure, sampled_errors, slope, thorough
from pyggml.types import tensor_type


def random_options(seed, tensors=5, types=4):
    rng = np.random.default_rng(seed)
    found = {}
    for i in range(tensors):
        size = np.sort(rng.integers(10, 400, types))
        kld = np.sort(rng.exponential(1.0, types))[::-1]
        found[f"t{i}"] = [Option(f"k{j}", int(size[j]), float(kld[j])) for j in range(types)]
    return found


@pytest.mark.parametrize("seed", range(20))
def test_choice_is_close_to_the_best(seed):
    options = random_options(seed)
    least, most = (sum(f(o.nbytes for o in own) for own in options.values()) for f in (min, max))
    for budget in np.linspace(least, most, 7).astype(int):
        chosen = choose(options, int(budget))
        assert sum(o.nbytes for o in chosen.values()) <= budget
        best = min(sum(o.kld for o in pick) for pick in itertools.product(*options.values()) if sum(o.nbytes for o in pick) <= budget)
        gap = max(max(o.kld for o in own) - min(o.kld for o in own) for own in options.values())
        assert sum(o.kld for o in chosen.values()) <= best + gap          # a Lagrangian solution is at most one item from the best


def test_enough_room_takes_the_best_of_all():
    options = random_options(1)
    assert choose(options, 10**9) == {name: min(own, key=lambda o: o.kld) for name, own in options.items()}


def test_too_small_is_refused():
    with pytest.raises(PyggmlError, match="the smallest types take"):
        choose(random_options(2), 10)


def test_estimates_go_through_the_probes():
    errors = {"a": 1.0, "b": 4.0, "c": 16.0}
    assert expected(errors, {"a": 0.1, "c": 1.6}, "b") == pytest.approx(0.4)
    assert expected(errors, {"a": 0.1}, "b") == pytest.approx(0.4)
    assert expected(errors, {"a": 0.1}, "b", 0.5) == pytest.approx(0.2)
    assert expected({"a": 1.0, "b": 0.0}, {"a": 0.1}, "b") == 0.0
    assert slope(errors, {"a": 0.1, "c": 0.4}, ("a", "c")) == pytest.approx(0.5)
    assert slope(errors, {"a": 0.1, "c": 0.0}, ("a", "c")) == 1.0


@pytest.mark.parametrize(("n_weights", "n_tensors"), [(6e6, 43), (30e6, 57), (1.1e9, 155), (8e9, 225)])
def test_effort_stays_within_the_budget(n_weights, n_tensors):
    found = effort(int(n_weights), n_tensors, 128, 4.6)
    cost = found.n_chunks * len(found.probes) * n_tensors * 128 * n_weights
    assert 1 <= found.n_chunks <= sensitivity.MOST_CHUNKS
    assert cost <= sensitivity.BUDGET or found == Effort(1, ("Q4_K", "Q2_K"), sensitivity.EVERY)
    assert effort(int(n_weights), n_tensors, 128, 6.0, n_chunks=3).n_chunks == 3


def test_large_models_are_tried_in_the_types_around_the_size():
    assert [effort(8 * 10**9, 225, 128, bits).probes for bits in (2.6, 4.6, 5.6)] == [("Q4_K", "Q2_K"), ("Q4_K", "Q2_K"), ("Q4_K", "Q6_K")]


def test_every_role_has_its_ends_measured_in_full():
    names = [f"blk.{i}.{role}.weight" for i in range(7) for role in ("attn_q", "ffn_up")] + ["token_embd.weight"]
    assert thorough(names, 1) == sorted(names, key=lambda n: ("attn_q" not in n, "ffn_up" not in n))
    assert thorough(names, 4) == [*(f"blk.{i}.{role}.weight" for role in ("attn_q", "ffn_up") for i in (0, 4, 6)), "token_embd.weight"]


def test_the_rest_follow_the_slope_of_their_role(source, monkeypatch):
    """With divergences that grow as the power 1.3 (attention) and 0.7 (the rest) of the error, the estimates are those powers too."""
    class Powers:
        def with_tensors(self, tensors):
            (name, made), = tensors.items()
            tried.append((name, made.type.name))
            error = float(((made.dequantize() - job.sources[name].dequantize()).astype(np.float64) ** 2).sum())
            return SimpleNamespace(kld=np.array([error ** power(name)]))

    def power(name):
        return 1.3 if "attn" in name else 0.7

    job, tried = plan(formats.open(source), Options(recipe="Q8_0", pure=True)), []
    monkeypatch.setattr(recipes, "role", lambda name: "attn" if "attn" in name else "ffn")
    names = [c.name for c in job.choices if c.name.startswith("blk.") and not c.copied]
    assert min(sum(part in name for name in names) for part in ("attn", "ffn")) > 2
    found = measure(job, names, Powers(), ("Q2_K", "Q3_K", "Q5_K"), Effort(1, ("Q4_K", "Q2_K"), 100), n_threads=1)
    assert list(found) == names
    assert Counter(kind for _, kind in tried) == {"Q4_K": len(names), "Q2_K": 4}
    for name in names:
        kld = {o.type: o.kld for o in found[name]}
        weights = job.sources[name].dequantize()
        for kind in kld:
            lost = quants.dequantize(quants.quantize(weights, kind), kind).astype(np.float64) - weights
            assert kld[kind] == pytest.approx(float((lost ** 2).sum()) ** power(name), rel=0.1)


def test_errors_of_a_sample_stand_for_the_whole(source, monkeypatch):
    file = formats.open(source)
    rows = {t: tensor_type(t) for t in ("Q2_K", "Q4_K", "Q8_0")}
    for name in ("blk.0.ffn_down.weight", "token_embd.weight"):
        weights, importance = file[name].dequantize(), np.linspace(0.1, 3, file[name].shape[-1], dtype=np.float32)[None]
        whole = sampled_errors(file[name], rows, importance, 1)
        for kind, error in whole.items():
            lost = quants.dequantize(quants.quantize(weights, kind, importance[0]), kind) - weights
            assert error == pytest.approx(float((lost.astype(np.float64)**2 @ importance[0]).sum()), rel=1e-4)
        with monkeypatch.context() as patch:
            patch.setattr(sensitivity, "SAMPLE", weights.size // 4)
            part = sampled_errors(file[name], rows, importance, 1)
        for kind in ("Q2_K", "Q4_K"):
            assert part[kind] / part["Q8_0"] == pytest.approx(whole[kind] / whole["Q8_0"], rel=0.2)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return models.as_f16(tmp_path_factory.mktemp("source") / "f16.gguf")


def test_command(source, tmp_path, capsys):
    (tmp_path / "t.txt").write_text(models.TEXT)
    target, recipe = str(tmp_path / "o.gguf"), str(tmp_path / "mix.json")
    flags = ["-f", str(tmp_path / "t.txt"), "-c", "32", "--chunks", "2"]
    assert cli.main(["quantize", "--target-bpw", "4.6", "--save-recipe", recipe, *flags, str(source), target, "1"]) == 0
    made = formats.open(target)
    n_weights = sum(t.size for t in made.tensors.values())
    bits = 8 * sum(t.nbytes for t in made.tensors.values()) / n_weights
    assert 4.2 < bits <= 4.6 and "bits per weight" in capsys.readouterr().out
    again = str(tmp_path / "again.gguf")
    assert cli.main(["quantize", str(source), again, recipe]) == 0
    assert {n: t.raw.tobytes() for n, t in made.tensors.items()} == {n: t.raw.tobytes() for n, t in formats.open(again).tensors.items()}
    assert cli.main(["check", "--reproduce", "--source", str(source), target]) == 0
    assert cli.main(["quantize", "--target-bpw", "4.6", str(source), target]) == 2
    assert cli.main(["quantize", "--target-bpw", "4.6", *flags, "--pure", str(source), target]) == 2
    (tmp_path / "bad.json").write_text('{"recipe": 3}')
    assert cli.main(["quantize", str(source), again, str(tmp_path / "bad.json")]) == 1


def test_a_size_holds_for_the_whole_file(source, tmp_path):
    found = allocate.allocate(source, models.TEXT, size=400_000, n_ctx=32, n_chunks=1, types=("Q2_K", "Q4_K", "Q6_K"), n_threads=1)
    from pyggml.quantize import quantize_file

    quantize_file(source, tmp_path / "o.gguf", found.recipe)
    assert 380_000 < (tmp_path / "o.gguf").stat().st_size <= 400_000
    found.save(tmp_path / "mix.txt")
    lines = (tmp_path / "mix.txt").read_text().splitlines()
    assert len(lines) == len(found.chosen) and lines[0].startswith("^") and "\\." in lines[0]


def test_the_loss_is_measured_where_nothing_was_chosen(source, tmp_path, capsys):
    (tmp_path / "t.txt").write_text(models.TEXT)
    run = ["quantize", "--target-bpw", "4.6", "-f", str(tmp_path / "t.txt"), "-c", "32", "--chunks", "2", "--target-types", "q2_k,q6_k"]
    target = tmp_path / "o.gguf"
    assert cli.main([*run, str(source), str(target), "1"]) == 0
    assert "over the next 2 chunks" in capsys.readouterr().out
    assert {t.type.name for t in formats.open(target).tensors.values()} <= {"F32", "Q2_K", "Q6_K"}
    target.unlink()
    assert cli.main([*run, "--dry-run", str(source), str(target), "1"]) == 0
    assert "quant size" in capsys.readouterr().out and not target.exists()


@pytest.mark.parametrize(("flags", "message"), [
    (["--target-bpw", "0.5"], "take at least"),
    (["--target-size", "1K"], "take at least"),
    (["--target-bpw", "4", "--target-types", "Q4_K,Q9"], "Q9"),
    (["--target-size", "999T"], "bytes needed"),
])
def test_a_target_is_refused_before_anything_is_measured(source, tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.setattr(allocate, "measure", None)
    (tmp_path / "t.txt").write_text(models.TEXT)
    assert cli.main(["quantize", *flags, "-f", str(tmp_path / "t.txt"), "-c", "32", str(source), str(tmp_path / "o.gguf")]) == 1
    assert message in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["t.txt"]


def test_the_source_is_not_overwritten_by_a_mix(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(allocate, "measure", None)
    (tmp_path / "t.txt").write_text(models.TEXT)
    run = ["quantize", "--target-bpw", "4", "-f", str(tmp_path / "t.txt"), "-c", "32"]
    assert cli.main([*run, str(source), str(source)]) == 1
    assert "the output is the input" in capsys.readouterr().err
    small = tmp_path / "small.gguf"
    assert cli.main(["quantize", str(source), str(small), "Q4_K"]) == 0
    assert cli.main([*run, str(small), str(tmp_path / "o.gguf")]) == 1
    assert "--allow-requantize" in capsys.readouterr().err

"""Mixes for a size: the choice is the best there is, the estimate is what it says, and the mix can be saved and used."""

import itertools

import numpy as np
import pytest

import models
from pyggml import cli, formats
from pyggml.errors import PyggmlError
from pyggml.quantize import allocate
from pyggml.quantize.allocate import Option, choose, expected


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
    assert expected({"a": 1.0, "b": 0.0}, {"a": 0.1}, "b") == 0.0


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return models.as_f16(tmp_path_factory.mktemp("source") / "f16.gguf")


def test_command(source, tmp_path, capsys):
    (tmp_path / "t.txt").write_text(models.TEXT)
    target, recipe = str(tmp_path / "o.gguf"), str(tmp_path / "mix.json")
    flags = ["-f", str(tmp_path / "t.txt"), "-c", "32", "--chunks", "3"]
    assert cli.main(["quantize", "--target-bpw", "4.6", "--save-recipe", recipe, *flags, str(source), target]) == 0
    made = formats.open(target)
    n_weights = sum(t.size for t in made.tensors.values())
    bits = 8 * sum(t.nbytes for t in made.tensors.values()) / n_weights
    assert 4.2 < bits <= 4.6 and "bits per weight" in capsys.readouterr().out
    again = str(tmp_path / "again.gguf")
    assert cli.main(["quantize", str(source), again, recipe]) == 0
    assert {n: t.raw.tobytes() for n, t in made.tensors.items()} == {n: t.raw.tobytes() for n, t in formats.open(again).tensors.items()}
    assert cli.main(["check", "--reproduce", "--source", str(source), target]) == 0
    assert cli.main(["quantize", "--target-bpw", "4.6", str(source), target]) == 2
    (tmp_path / "bad.json").write_text('{"recipe": 3}')
    assert cli.main(["quantize", str(source), again, str(tmp_path / "bad.json")]) == 1


def test_a_size_holds_for_the_whole_file(source, tmp_path):
    found = allocate.allocate(source, models.TEXT, size=400_000, n_ctx=32, n_chunks=2, types=("Q2_K", "Q4_K", "Q6_K"))
    from pyggml.quantize import quantize_file

    quantize_file(source, tmp_path / "o.gguf", found.recipe)
    assert 380_000 < (tmp_path / "o.gguf").stat().st_size <= 400_000
    found.save(tmp_path / "mix.txt")
    lines = (tmp_path / "mix.txt").read_text().splitlines()
    assert len(lines) == len(found.chosen) and lines[0].startswith("^") and "\\." in lines[0]

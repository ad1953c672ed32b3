"""The benchmark's own arithmetic: orders, intervals, what counts as disturbed, and the reading of other programs' output."""

import json
import sys
from pathlib import Path

import numpy as np
import pairing
import peers
import pytest
import quiet
import runs
import startup
from agreement import distance
from contestants import BenchError, Contestant, Test, flag_sets, json_lines, json_rows, ourselves, rate, rival
from report import markdown
from shuffled import shuffle

import models
from pyggml.measure.chunks import Evaluator, split, tokenize
from pyggml.model import Model
from pyggml.quantize.calibrate import collect
from pyggml.quantize.imatrix import Imatrix

Test.__test__ = False       # pytest: not a test class

LLAMA_CPP_HELP = "-fa, --flash-attn <on|off|auto>\n -d, --n-depth <n>\n --repack <0|1>\n"
IK_HELP = "-fa, --flash-attn <0|1>\n -gp <pp,tg>\n -rtr, --run-time-repack <0|1>\n -mqkv, --merge-qkv\n"

# A stand-in for llama-bench: --repack 1 is twice as fast, and each run is counted in a file beside the script.
FAKE_BENCH = """
import json, sys
from pathlib import Path
if "--help" in sys.argv:
    sys.exit(print("-d, --n-depth <n>  --repack <0|1>") or 0)
value = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open(Path(__file__).with_suffix(".runs"), "a") as runs:
    print(" ".join(sys.argv[1:]), file=runs)
row = {"n_prompt": int(value["-p"]), "n_gen": int(value["-n"]), "n_depth": int(value.get("-d", 0))}
row["avg_ts"] = 50.0 * (1 + int(value.get("--repack", 1)))
print("loading\\n" + json.dumps([row], indent=2))
"""


@pytest.fixture
def fake(tmp_path):
    script = tmp_path / "fake.py"
    script.write_text(FAKE_BENCH)
    return Contestant("fake", (sys.executable, str(script)))


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setattr(runs, "wait_until_quiet", lambda patience: True)
    return runs.Bench(prefix=[], patience=0, timeout=60, strict=True, repetitions=1)


def test_two_contestants_run_abba():
    assert sum((pairing.running_order("AB", turn) for turn in range(4)), []) == list("ABBAABBA")


def test_every_contestant_runs_equally_often_in_each_place():
    orders = [pairing.running_order("ABC", turn) for turn in range(4)]
    assert {tuple(o) for o in orders} == {("A", "B", "C"), ("C", "B", "A")}


def test_ratio_cancels_a_drift_that_both_share():
    drift = np.linspace(1, 2, 12)
    result = pairing.compare(list(120 * drift), list(100 * drift))
    assert result.ratio == pytest.approx(1.2) and result.low == pytest.approx(1.2) and result.high == pytest.approx(1.2)
    assert result.verdict == "ahead" and result.p == pytest.approx(2 / 2**12)


def test_noise_around_one_claims_nothing():
    rng = np.random.default_rng(1)
    result = pairing.compare(list(rng.normal(100, 5, 15)), list(rng.normal(100, 5, 15)))
    assert result.low < 1 < result.high and result.verdict == "no claim"


@pytest.mark.parametrize(("ratio", "verdict"), [(1.03, "ahead"), (1.015, "no claim"), (0.985, "no claim"), (0.97, "behind")])
def test_claims_need_more_than_two_percent(ratio, verdict):
    assert pairing.compare([ratio] * 9, [1.0] * 9).verdict == verdict


def test_few_pairs_claim_nothing():
    assert pairing.compare([2.0] * 5, [1.0] * 5).verdict == "no claim" and pairing.compare([2.0] * 6, [1.0] * 6).verdict == "ahead"


def test_bootstrap_interval_covers_the_median_about_as_often_as_it_says():
    rng = np.random.default_rng(2)
    intervals = [pairing.bootstrap_interval(rng.normal(1, 0.1, 15)) for _ in range(100)]
    assert 85 <= sum(low <= 1 <= high for low, high in intervals) <= 100


@pytest.mark.parametrize(("ratios", "p"), [([2, 2, 2, 2, 2], 2 / 32), ([2, 2, 0.5, 0.5], 1.0), ([2, 1, 0.5], 1.0), ([0.5] * 10, 2 / 1024)])
def test_sign_test_is_exact(ratios, p):
    assert pairing.sign_test(ratios) == pytest.approx(p)


def test_unequal_lists_are_no_pairs():
    with pytest.raises(ValueError, match="2 and 1"):
        pairing.compare([1, 2], [1])


def test_shares_of_processor_time():
    def at(user, idle, steal, own):
        return quiet.Ticks(busy=user, steal=steal, total=user + idle + steal, own=own)
    result = quiet.shares(at(10, 10, 0, 5), at(14, 15, 1, 8))
    assert result["steal"] == pytest.approx(0.1)
    assert result["foreign"] == pytest.approx((4 - 3 - 2 * quiet.TICK) / 10)


def test_ticks_are_read_from_the_first_line():
    ticks = quiet.read_ticks("cpu  100 10 20 500 30 4 6 50 7 8\ncpu0 1 1 1 1 1 1 1 1 0 0\n")
    assert ticks.busy == pytest.approx(140 * quiet.TICK) and ticks.steal == pytest.approx(50 * quiet.TICK)
    assert ticks.total == pytest.approx(720 * quiet.TICK)


def test_a_moved_clock_is_a_disturbance_and_a_small_move_is_not():
    figures = quiet.moved([{"core": 1.00, "memory": 1.00}, {"core": 1.03, "memory": 1.07}])
    assert [text.split()[0] for text in quiet.disturbances(figures)] == ["core"]


def test_a_watched_run_reports_what_it_saw():
    run = quiet.run_watched([sys.executable, "-c", "print('out'); raise SystemExit(3)"], 60)
    assert (run.output, run.status) == ("out\n", 3) and run.wall > 0 and set(run.figures) == set(quiet.LIMITS)


def test_flags_come_from_the_help_text():
    assert flag_sets(LLAMA_CPP_HELP) == [["-fa", a, "--repack", b] for a in "01" for b in "01"]
    assert len(flag_sets(IK_HELP)) == 8 and flag_sets("-m FILE") == [[]]


def test_rows_are_found_among_other_output():
    assert json_rows('warming up [1]\n[\n  {"n_prompt": 5}\n]\ndone\n') == [{"n_prompt": 5}]
    assert json_rows('[{"a": [1, 2]}]') == [{"a": [1, 2]}]
    assert json_lines('x\n{"n_kv": 0}\n| table |\n{"n_kv": 512}\n') == [{"n_kv": 0}, {"n_kv": 512}]
    with pytest.raises(BenchError, match="no JSON rows"):
        json_rows("error: cannot load")


def test_rates_of_both_dialects():
    ours = [{"n_prompt": 512, "n_gen": 0, "n_depth": d, "avg_ts": 100.0 - d} for d in (0, 64)]
    assert rate(ours, Test(512, 0)) == 100 and rate(ours, Test(512, 0, 64)) == 36
    lengths = [(512, 0), (4096, 32), (0, 32)]
    without_depth = [{"n_prompt": p, "n_gen": n, "avg_ts": float(i)} for i, (p, n) in enumerate(lengths, 1)]
    assert [rate(without_depth, t) for t in (Test(512, 0), Test(0, 32, 4096), Test(0, 32))] == [1, 2, 3]
    with pytest.raises(BenchError, match="tg16"):
        rate(ours, Test(0, 16))


@pytest.mark.parametrize(("text", "test"), [("pp512", Test(512, 0)), ("tg128@4096", Test(0, 128, 4096)), ("tg64x4", Test(0, 64, 0, 4)),
                                            ("pp8 @ d16", Test(8, 0, 16)), ("tg2 x3 @ d5", Test(0, 2, 5, 3))])
def test_tests_by_name(text, test):
    assert Test.parse(text) == test == Test.parse(test.name)


@pytest.mark.parametrize("text", ["", "pp", "pp0", "xx5", "pp512x2", "tg5@", "512"])
def test_what_is_no_test(text):
    with pytest.raises(ValueError, match="not a test"):
        Test.parse(text)


def test_sequences_at_once_in_either_dialect():
    test = Test(0, 64, 0, 4)
    ours, theirs = with_help("-npl, --n-parallel"), with_help(IK_HELP)
    assert ours.arguments(test, Path("m"), 2, [], 1)[-2:] == ["-npl", "4"]
    command = theirs.arguments(test, Path("m"), 2, ["-rtr", "1"], 1)
    assert command[command.index("-p") + 1] == "256" and command[-4:] == ["-b", "4", "-ub", "4"]
    assert ours.read_rate(test, json.dumps([{"n_prompt": 0, "n_gen": 64, "n_depth": 0, "n_parallel": n, "avg_ts": n} for n in (1, 4)], indent=1)) == 4
    assert theirs.read_rate(test, json.dumps([{"n_prompt": 256, "n_gen": 0, "avg_ts": 9}], indent=1)) == 9


def test_what_was_measured_is_not_measured_again(fake, bench, monkeypatch, tmp_path):
    model, output = tmp_path / "m.gguf", tmp_path / "report.json"
    model.write_bytes(b"GGUF")
    monkeypatch.setattr(peers, "ourselves", lambda python: Contestant("pyggml", fake.command))
    monkeypatch.setattr(peers, "machine", dict)
    calls = []
    real = peers.measure_test
    monkeypatch.setattr(peers, "measure_test", lambda *given: calls.append(given[4].name) or real(*given))
    common = ["-m", str(model), "-o", str(output), "--quick", "--flags", str(tmp_path / "flags.json"), "--resume", "-t", "1"]
    peers.measure(peers.arguments([*common, "--tests", "pp8"]))
    report = peers.measure(peers.arguments([*common, "--tests", "pp8,tg4"]))
    assert calls == ["pp8", "tg4"] and json.loads(output.read_text()) == report
    assert list(report["models"][0]["tests"]) == ["pp8", "tg4"]
    with pytest.raises(BenchError, match="leave out --resume"):
        peers.measure(peers.arguments([*common, "--tests", "pp8", "-t", "2"]))


def with_help(text, command=("llama-bench",)):
    contestant = Contestant("rival", command)
    contestant.__dict__["help_text"] = text
    return contestant


def test_depth_is_asked_for_in_each_dialect(tmp_path):
    newer, older = with_help(LLAMA_CPP_HELP), with_help(IK_HELP, (str(tmp_path / "llama-bench"),))
    assert "-d 4096" in " ".join(newer.arguments(Test(0, 32, 4096), Path("m"), 2, [], 1))
    assert "-p 0 -n 0 -gp 4096,32" in " ".join(older.arguments(Test(0, 32, 4096), Path("m"), 2, [], 1))
    with pytest.raises(BenchError, match="llama-sweep-bench"):
        older.arguments(Test(512, 0, 4096), Path("m"), 2, [], 1)


def test_a_prompt_at_a_depth_falls_back_on_sweep_bench(tmp_path):
    (tmp_path / "llama-sweep-bench").touch()
    older, test = with_help(IK_HELP, (str(tmp_path / "llama-bench"),)), Test(512, 0, 4096)
    command = " ".join(older.arguments(test, Path("m"), 2, ["-fa", "1", "-rtr", "1", "-mqkv", "0"], 1))
    assert command.endswith("-c 4608 -b 512 -ub 512 --sweep-stride 8 --output-format jsonl --log-file /dev/null -fa on -rtr")
    assert older.read_rate(test, '{"n_kv": 0, "speed_pp": 9}\n{"n_kv": 4096, "speed_pp": 5}\n') == 5


def test_a_rival_must_be_a_file():
    with pytest.raises(BenchError, match="NAME=PATH"):
        rival("ik=/nowhere/llama-bench")
    assert rival("llama_cpp").is_llama_cpp


def test_names_are_llama_benchs():
    assert [Test(512, 0).name, Test(0, 128).name, Test(512, 0, 4096).name] == ["pp512", "tg128", "pp512 @ d4096"]


def test_best_flags_are_swept_once_and_kept(fake, bench, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "disturbances", lambda figures: [])
    model = tmp_path / "model.gguf"
    model.write_bytes(b"1234")
    for _ in range(2):              # the second book is read from the file
        setting = runs.FlagBook(tmp_path / "flags.json").best(bench, fake, Test(8, 0), model, [1, 2])
        assert setting.flags == ["--repack", "1"] and setting.threads == 1
    assert len((tmp_path / "fake.runs").read_text().splitlines()) == 8      # 2 thread counts x 2 flag sets, forwards and back
    assert len(json.loads((tmp_path / "flags.json").read_text())) == 1


def test_a_disturbed_sweep_is_not_kept(fake, bench, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "disturbances", lambda figures: ["foreign 50.0% > 2.0%"])
    (tmp_path / "model.gguf").touch()
    book = runs.FlagBook(tmp_path / "flags.json")
    for _ in range(2):              # but it serves this session
        assert book.best(bench, fake, Test(8, 0), tmp_path / "model.gguf", [1]).flags == ["--repack", "1"]
    assert len((tmp_path / "fake.runs").read_text().splitlines()) == 2 * 2 * 3
    assert json.loads((tmp_path / "flags.json").read_text()) == {}


def test_disturbed_rounds_are_run_again_and_left_out(fake, bench, tmp_path, monkeypatch):
    verdicts = iter([["steal 3.0% > 0.5%"], [], [], [], [], []])
    monkeypatch.setattr(runs, "disturbances", lambda figures: next(verdicts))
    other = Contestant("other", fake.command)
    settings = {fake: runs.Setting(1, ["--repack", "1"]), other: runs.Setting(1, ["--repack", "0"])}
    rounds = runs.measure_rounds(bench, settings, Test(8, 0), tmp_path / "m", pairs=2)
    assert [bool(r["disturbed"]) for r in rounds] == [True, False, False]
    summary = peers.summarise(rounds, "fake", strict=True)
    assert (summary["rounds"], summary["counted"], summary["against"]["other"]["ratio"]) == (3, 2, 2.0)
    assert peers.summarise(rounds, "fake", strict=False)["counted"] == 3


def test_an_endless_disturbance_ends_and_says_so(fake, bench, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "disturbances", lambda figures: ["steal 3.0% > 0.5%"])
    rounds = runs.measure_rounds(bench, {fake: runs.Setting(1, [])}, Test(8, 0), tmp_path / "m", pairs=2)
    assert len(rounds) == 4
    test = peers.summarise(rounds, "fake", strict=True) | {"settings": {}, "absent": {"ik": "no binary"}}
    model = {"model": "m", "tests": {"pp8": test}, "agreement": {"kl mean": 0.25}, "start": {"fake": {"cold s": 1.5, "peak MB": 20}}}
    text = markdown({"date": "d", "commit": "c", "threads": 1, "processors": "0", "machine": {"kernel": "k"}, "models": [model]})
    assert "every round was disturbed" in text and "pp8 without ik: no binary" in text
    assert "| m | 0.25 |" in text and "| m | fake | 1.500 | 20 |" in text


def test_logit_distance():
    logits = np.random.default_rng(3).normal(0, 3, (6, 50)).astype(np.float32)
    same = distance(logits, logits + 7)                   # a constant does not change the distribution
    assert same["kl mean"] == pytest.approx(0, abs=1e-12) and same["same greedy choice"] == 1
    other = distance(np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]]))
    assert other["kl mean"] == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(2 / 3))


def test_memory_fields_of_proc():
    assert startup.kilobyte_fields("Name:\tpython\nVmHWM:\t  20 kB\nRssAnon:  3 kB\n") == {"VmHWM": 20480, "RssAnon": 3072}


def test_a_completing_program_is_looked_for_beside_llama_bench(tmp_path):
    contestant = Contestant("rival", (str(tmp_path / "llama-bench"),))
    assert startup.completion_command(contestant, Path("m"), 2) is None
    (tmp_path / "llama-cli").touch()
    assert startup.completion_command(contestant, Path("m"), 2)[:3] == [str(tmp_path / "llama-cli"), "-m", "m"]
    assert startup.completion_command(ourselves(), Path("m"), 2)[1:4] == ["-m", "pyggml", "run"]


def test_start_is_timed_to_the_first_byte_and_memory_is_watched():
    code = "import time; block = bytearray(64 << 20); print('x', flush=True); time.sleep(0.3)"
    start = startup.start_once([sys.executable, "-c", code])
    assert 0 < start.seconds < 5 and start.resident > 64 << 20 and start.anonymous > 64 << 20 and start.proportional > 64 << 20


def test_one_benchmark_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(peers.tempfile, "gettempdir", lambda: str(tmp_path))
    with peers.only_one(), pytest.raises(BenchError, match="another benchmark"), peers.only_one():
        pass
    with peers.only_one():
        pass


def test_neighbours_compute_until_the_end():
    with peers.neighbours(2) as burners:
        assert len(burners) == 2 and all(burner.poll() is None for burner in burners)
    assert all(burner.poll() is not None for burner in burners)
    options = peers.arguments(["-m", "x.gguf", "--neighbours", "1"])
    assert options.keep_disturbed and not options.patience


def test_processor_lists():
    assert peers.processors("0,2-4") == [0, 2, 3, 4]


def test_channels_in_another_order_are_the_same_model(tmp_path):
    """Its logits are those of the model, and importance moves with the columns that it belongs to."""
    source = models.as_f16(tmp_path / "f16.gguf")
    collect(Model.load(source), models.TEXT, n_ctx=32, n_chunks=2).save(tmp_path / "imatrix.gguf")
    path, moved = shuffle(source, str(tmp_path / "imatrix.gguf"), 3, tmp_path)
    again = collect(Model.load(path), models.TEXT, n_ctx=32, n_chunks=2)
    for name, entry in Imatrix.load(moved).entries.items():
        assert np.allclose(entry.importance(), again.entries[name].importance(), rtol=1e-2, atol=1e-6), name
    logits = []
    for file in (source, path):
        model = Model.load(file)
        evaluator = Evaluator(model, 32, exact=True)
        logits.append(evaluator.logits(split(tokenize(model, models.TEXT, 32), 32, 1), 0).copy())
    assert np.abs(logits[0] - logits[1]).max() < 1e-3 * np.abs(logits[0]).max()
    assert not np.array_equal(Model.load(path).file["output_norm.weight"].dequantize(), Model.load(source).file["output_norm.weight"].dequantize())

"""The command line: dispatch, help, exit statuses; run, bench and tokenize with an exact fake engine; the interrupt."""

import csv
import hashlib
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import fake_engine
import pytest

from pyggml import cli
from pyggml.cli import _options, bench, doctor
from pyggml.cli import run as run_command
from pyggml.cli._interrupt import on_interrupt
from pyggml.cli.tokenize import visible
from pyggml.errors import ParameterError


@pytest.fixture(autouse=True)
def engine(monkeypatch):
    fake_engine.install(monkeypatch)


def stdin(monkeypatch, data: bytes, tty: bool = False):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: tty, buffer=io.BytesIO(data)))


# ---- dispatch ----

def test_overview_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    for name, help in cli.commands().items():
        assert name in out and help in out
    assert {"run", "bench", "tokenize", "doctor"} <= set(cli.commands())


@pytest.mark.parametrize("name", cli.commands())
def test_every_command_has_the_three_parts(name, capsys):
    module = importlib.import_module(f"pyggml.cli.{name.replace('-', '_')}")
    assert cli.commands()[name] == module.HELP and "\n" not in module.HELP and callable(module.run)
    assert cli.main([name, "--help"]) == 0
    assert f"usage: pyggml {name}" in capsys.readouterr().out


def test_version(capsys):
    import pyggml

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"pyggml {pyggml.__version__}\n"


@pytest.mark.parametrize("line", ["", "rum", "run", "run a -m b -p x", "run fake --frobnicate", "run fake -n x", "run fake -p a -f b",
                                  "bench", "bench fake -r 0", "bench fake -pg 3", "bench fake -npl 0", "bench fake --delay nan",
                                  "bench fake --delay -1", "bench fake --repack 2", "tokenize fake --stdin -p a", "perplexity fake --ppl-stride -4"])
def test_wrong_usage_is_2(line, capsys):
    assert cli.main(line.split()) == 2
    captured = capsys.readouterr()
    assert captured.err and not captured.out


def test_a_slip_of_the_pen_is_pointed_at(capsys):
    cli.main(["tokenise"])
    assert "did you mean tokenize?" in capsys.readouterr().err


@pytest.mark.parametrize(("argv", "message"), [
    (["run", "nowhere.gguf", "-p", "a"], "nowhere.gguf"), (["run", "fake", "-f", "/no/such/file"], "/no/such/file: No such file"),
    (["run", "fake", "-p", "a", "--top-p", "7"], "top_p=7"), (["run", "fake", "-p", "a" * 70], "71 tokens"),
    (["bench", "fake", "-p", "5-1x"], "5-1x"), (["bench", "fake", "-ctk", "q9"], "q9"),
], ids=lambda v: v if isinstance(v, str) else "")
def test_a_users_mistake_is_one_sentence_and_1(argv, message, capsys):
    assert cli.main(argv) == 1
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.err.startswith(f"pyggml {argv[0]}: ")


def test_text_that_is_no_utf8(monkeypatch, capsys):
    stdin(monkeypatch, b"ab\xff")
    assert cli.main(["run", "fake"]) == 1
    assert "standard input is not UTF-8: byte 0xff at offset 2" in capsys.readouterr().err
    assert cli.main(["run", "fake", "-p", os.fsdecode(b"abc\xff")]) == 1
    assert "the text of -p is not UTF-8: byte 0xff at offset 3" in capsys.readouterr().err


def fail_with(monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(doctor, "run", fail)


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (MemoryError(), 1), (OSError(28, "No space left on device"), 1)])
def test_other_ends(monkeypatch, capsys, error, status):
    fail_with(monkeypatch, error)
    assert cli.main(["doctor"]) == status
    assert "Traceback" not in capsys.readouterr().err


def python(*argv, **more):
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, timeout=60, check=False, **more)


def test_a_closed_pipe_is_quiet():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "pyggml", "doctor"], stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_import_is_light():
    done = python("-c", "import sys, pyggml; print(*sorted(sys.modules))")
    heavy = {"numpy", "cffi", "jinja2", "regex", "numba", "torch", "importlib.metadata"}
    assert not heavy & set(done.stdout.split()), done.stderr
    done = python("-c", "import sys, pyggml.cli; pyggml.cli.main(['--help']); print(*sorted(sys.modules))")
    assert not heavy & set(done.stdout.split()), done.stderr


def test_run_imports_what_it_uses():
    line = ["run", str(Path(__file__).parents[2] / "models" / "books6m-q8_0.gguf"), "-p", "It was", "-n", "1"]
    done = python("-c", f"import sys, pyggml.cli; pyggml.cli.main({line!r}); print(*sorted(sys.modules))")
    heavy = {"numpy.ma", "jinja2", "regex", "numba", "socket", "hashlib", "pyggml.quants", "concurrent.futures"}
    assert done.stdout and not heavy & set(done.stdout.split()), done.stderr


def test_public_names_exist():
    import pyggml

    for name in (*pyggml.__all__, "formats", "quants"):
        assert getattr(pyggml, name) is not None and name in dir(pyggml)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = pyggml.nonsense


# ---- prompts ----

def test_unescape():
    assert _options.unescape(rb"a\nb\t\"\\n\x41\q\\") == b'a\nb\t"\\nA\\q\\'
    assert _options.unescape(rb"\xe2\x98\x83") == "\u2603".encode()


def test_prompt_sources(monkeypatch, capsys, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("v\\n")
    for argv, data, expected in ((["-p", r"c\nv"], b"", "wxyz"), (["-p", "v"], b"k", "wxyz"), ([], b"v", "wxyz"), (["-f", "-"], b"v", "wxyz"),
                                 ([], b"v\n", "wxyz")):             # the end of its last line is no part of the text
        stdin(monkeypatch, data)
        assert cli.main(["run", "fake", "--temp", "0", *argv]) == 0
        assert capsys.readouterr().out == expected + "\n"
    with pytest.raises(AssertionError, match=r"\\n"):               # a file is taken as it is: the fake vocabulary has no backslash
        cli.main(["run", "fake", "-f", str(file)])
    stdin(monkeypatch, b"", tty=True)
    assert cli.main(["run", "fake"]) == 2
    assert "there is no text" in capsys.readouterr().err


# ---- run ----

def test_run_streams_the_continuation(capsys):
    assert cli.main(["run", "-m", "fake", "-p", "ab", "-n", "3", "--temp", "0"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "cde\n"
    assert captured.err.startswith("load ") and "prompt 3 tokens in" in captured.err and "generation 3 tokens in" in captured.err
    assert "tokens/s" in captured.err and captured.err.count("\n") == 1


def test_run_writes_at_once(monkeypatch):
    written = []
    out = SimpleNamespace(write=lambda text: written.append(text), flush=lambda: written.append("|"), isatty=lambda: False)
    monkeypatch.setattr(sys, "stdout", out)
    cli.main(["run", "fake", "-p", "a", "-n", "2", "--temp", "0"])
    assert "".join(written).startswith("b|c|")


def test_run_shows_whole_characters(monkeypatch):
    a, b = fake_engine.SNOWMAN
    monkeypatch.setattr(fake_engine.FakeModel, "load", lambda path, **_: fake_engine.FakeModel({b"b": a, a: b, b: b"c"}))
    written = []
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=written.append, flush=lambda: None, isatty=lambda: False))
    cli.main(["run", "fake", "-p", "b", "-n", "3", "--temp", "0"])
    assert [w for w in written if w] == ["\u2603", "c", "\n"]


def test_run_to_the_end_of_the_context(capsys):
    assert cli.main(["run", "fake", "-p", "a", "-c", "8", "--temp", "0"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "bcdefgh\n"
    assert "the context of 8 tokens is full" in captured.err
    assert cli.main(["run", "fake", "-p", "a", "--ignore-eos", "--temp", "0", "-n", "30"]) == 0
    assert "generation 30 tokens" in capsys.readouterr().err


def test_run_options(capsys):
    cli.main(["run", "fake", "-p", "a", "-n", "1", "--temp", "0", "--display-prompt", "--color", "on", "-v"])
    captured = capsys.readouterr()
    assert captured.out == "\033[33ma\033[0mb\n"
    assert "fake 1.5B F32" in captured.err and "top_k 40" in captured.err and "2 tokens: 0 3" in captured.err
    runs = []
    for seed in "112":
        cli.main(["run", "fake", "-p", "a", "-n", "9", "-s", seed, "--temp", "9", "--top-k", "0", "--top-p", "1", "--min-p", "0", "--ignore-eos"])
        runs.append(capsys.readouterr().out)
    assert runs[0] == runs[1] != runs[2]
    cli.main(["run", "fake", "-p", "z", "-n", "2", "--temp", "0", "--special"])
    assert capsys.readouterr().out == "\n"


def test_run_passes_its_options_on(monkeypatch, capsys):
    made = {}
    original = fake_engine.FakeContext.__init__

    def record(self, model, **options):
        made.update(options)
        original(self, model, **options)

    monkeypatch.setattr(fake_engine.FakeContext, "__init__", record)
    cli.main(["run", "fake", "-p", "a", "-n", "1", "-c", "32", "-t", "3", "-b", "16", "-ub", "8", "-ctk", "q8_0", "--no-repack",
              "-tb", "2", "--deterministic", "-ngl", "7", "-dev", "cuda1"])
    assert made == dict(n_ctx=32, n_threads=3, n_batch=16, n_ubatch=8, type_k="Q8_0", type_v="F16", repack=False,
                        n_threads_batch=2, deterministic=True, place=None, n_gpu_layers="7", device="cuda1", main_gpu=0)
    cli.main(["run", "fake", "-p", "a", "-n", "1"])
    assert made["n_ctx"] == 64 and made["n_gpu_layers"] == "auto"


def test_run_with_guesses(capsys):
    """The fake counts letters: after a b c it never repeats itself, after what it has seen it does."""
    cli.main(["run", "fake", "-p", "xyzxyzx", "-n", "2", "--temp", "0"])
    plain = capsys.readouterr().out
    assert cli.main(["run", "fake", "-p", "xyzxyzx", "-n", "2", "--temp", "0", "--spec-type", "ngram-simple", "--draft-max", "2"]) == 0
    out, err = capsys.readouterr()
    assert out == plain and "guesses right" in err
    assert cli.main(["run", "fake", "-p", "abc", "-n", "9", "--temp", "0", "-md", "fake-small"]) == 0
    out, err = capsys.readouterr()
    assert out == "defghijkl\n" and "guesses right" in err


@pytest.mark.parametrize(("flags", "message"), [
    (["--spec-type", "draft-simple"], "-md FILE"), (["-md", "fake", "--spec-type", "ngram-mod"], "exclude each other"),
    (["--spec-type", "ngram-mod", "--draft-max", "2", "--draft-min", "3"], "at least 3 and at most 2"),
    (["--spec-type", "ngram-mod", "--draft-p-min", "nan"], "no probability"),
])
def test_run_refuses_guesses_that_cannot_be(flags, message, capsys):
    assert cli.main(["run", "fake", "-p", "a", *flags]) == 2
    assert message in capsys.readouterr().err


def test_numa_on_one_node(monkeypatch, capsys):
    from pyggml.backends import placement
    monkeypatch.setattr(placement, "nodes", lambda: [placement.usable()])
    assert cli.main(["run", "fake", "-p", "a", "-n", "1", "--numa", "isolate"]) == 0
    assert "--numa isolate changes nothing" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "mapped", "locked"), [([], True, False), (["--no-mmap"], False, False), (["--mlock"], True, True),
                                                         (["-lm", "mlock"], False, True), (["-lm", "mmap+mlock"], True, True)])
def test_how_the_file_is_loaded(monkeypatch, flags, mapped, locked):
    asked = {}
    monkeypatch.setattr(fake_engine.FakeModel, "load", lambda path, **how: asked.update(how) or fake_engine.FakeModel())
    cli.main(["run", "fake", "-p", "a", "-n", "1", *flags])
    assert asked == {"use_mmap": mapped, "use_mlock": locked}


def test_interrupted_run(monkeypatch, capsys):
    def init(self, model, **options):
        original(self, model, **options)
        self.on_eval = lambda: self.n_past == 4 and signal.raise_signal(signal.SIGINT)

    original = fake_engine.FakeContext.__init__
    monkeypatch.setattr(fake_engine.FakeContext, "__init__", init)
    assert cli.main(["run", "fake", "-p", "a", "--temp", "0"]) == 130
    captured = capsys.readouterr()
    assert captured.out in ("bcd\n", "bcde\n") and captured.err.startswith("load ")


def test_interrupt_reaches_a_busy_native_call():
    """While the main thread sits in a native call that runs no signal handlers, `cancel` is called from outside."""
    calls = []
    before = signal.getsignal(signal.SIGINT)
    with on_interrupt(lambda: calls.append(time.perf_counter())) as interrupted:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000)
        returned = time.perf_counter()
    assert interrupted.is_set() and calls[0] < returned
    assert signal.getsignal(signal.SIGINT) is before and signal.set_wakeup_fd(-1) == -1


def test_a_second_interrupt_breaks_off():
    with pytest.raises(KeyboardInterrupt), on_interrupt(lambda: None):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_interrupt_in_another_thread_changes_nothing():
    before, seen = signal.getsignal(signal.SIGINT), []

    def work():
        with on_interrupt(lambda: None):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_timing_line():
    timing = run_command.Timing(load=0.1, prompt_tokens=10, prompt=0.5, tokens=0)
    assert timing.line() == "load 100 ms | prompt 10 tokens in 500 ms (20.0 tokens/s) | generation 0 tokens"


# ---- tokenize ----

def test_tokenize(monkeypatch, capsys):
    from pyggml import formats, tokenizers

    monkeypatch.setattr(formats, "open", lambda path: SimpleNamespace(kv={}, path=path, verify=lambda: None))
    monkeypatch.setattr(tokenizers, "load", lambda kv, path="": fake_engine.FakeTokenizer())
    for argv, expected in ((["-p", r"a\nb"], "     0 -> '<s>'\n     3 -> 'a'\n     2 -> '\\n'\n     4 -> 'b'\n"),
                           (["-p", "ab", "--ids"], "[0, 3, 4]\n"), (["-p", "ab", "--ids", "--no-bos"], "[3, 4]\n"),
                           (["-p", "</s>", "--ids", "--no-bos"], "[1]\n"),
                           (["-p", "a", "--ids", "--show-count"], "[0, 3]\nTotal number of tokens: 2\n")):
        assert cli.main(["tokenize", "fake", *argv]) == 0
        assert capsys.readouterr().out == expected
    stdin(monkeypatch, b"ab")
    assert cli.main(["tokenize", "fake", "--stdin", "--ids"]) == 0
    assert capsys.readouterr().out == "[0, 3, 4]\n"


def test_visible():
    assert visible("a\u2603\x1b\n".encode() + b"\xff") == "a\u2603\\x1b\\n\\xff"


# ---- bench ----

@pytest.mark.parametrize(("text", "numbers"), [("512", [512]), ("1,2", [1, 2]), ("1-3", [1, 2, 3]), ("0-512+256", [0, 256, 512]),
                                               ("1-8*2,5", [1, 2, 4, 8, 5])])
def test_number_lists(text, numbers):
    assert bench.int_list([text]) == numbers
    assert bench.int_list([text, "7"]) == [*numbers, 7]


@pytest.mark.parametrize("text", ["", "x", "-1", "1,", "0-8*2", "1-8*1", "1-4+0"])
def test_bad_number_lists(text):
    with pytest.raises(ParameterError):
        bench.int_list([text])


def bench_json(capsys, *argv):
    assert cli.main(["bench", "fake", "-r", "2", "-o", "json", *argv]) == 0
    return json.loads(capsys.readouterr().out)


def test_bench_makes_the_product(capsys):
    rows = bench_json(capsys, "-p", "4,8", "-n", "2", "-d", "0,3", "-t", "1,2", "-pg", "5,6")
    assert [(r["n_threads"], r["n_depth"], r["n_prompt"], r["n_gen"]) for r in rows] == [
        (t, d, p, n) for t in (1, 2) for d in (0, 3) for p, n in ((4, 0), (8, 0), (0, 2), (5, 6))]


def test_bench_fields(capsys):
    row = bench_json(capsys, "-p", "4", "-n", "0")[0]
    assert row["model_type"] == "fake 1.5B F32" and row["model_n_params"] == 1_500_000_000 and row["type_k"] == "f16"
    assert len(row["samples_ns"]) == 2 and row["samples_ts"] == pytest.approx([4e9 / ns for ns in row["samples_ns"]])
    assert row["avg_ns"] == pytest.approx(sum(row["samples_ns"]) / 2, abs=1) and row["avg_ts"] == pytest.approx(sum(row["samples_ts"]) / 2)
    assert row["stddev_ts"] == pytest.approx(abs(row["samples_ts"][0] - row["samples_ts"][1]) / 2**0.5)


@pytest.mark.parametrize(("output", "read"), [("jsonl", lambda text: [json.loads(line) for line in text.splitlines()]),
                                              ("csv", lambda text: list(csv.DictReader(io.StringIO(text))))])
def test_bench_in_other_formats(capsys, output, read):
    assert cli.main(["bench", "fake", "-r", "1", "-p", "4", "-n", "2", "-o", output]) == 0
    assert [(str(r["n_prompt"]), str(r["n_gen"])) for r in read(capsys.readouterr().out)] == [("4", "0"), ("0", "2")]


def test_bench_table(capsys):
    cli.main(["bench", "fake", "-r", "1", "-p", "4", "-n", "2", "-d", "0,3", "-ub", "8"])
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert cells[0] == ["model", "size", "params", "backend", "threads", "n_ubatch", "test", "t/s"]
    assert [row[-2] for row in cells[2:]] == ["pp4", "tg2", "pp4 @ d3", "tg2 @ d3"]
    assert cells[2][:6] == ["fake 1.5B F32", "1.50 GiB", "1.50 B", "CPU", "2", "8"] and "±" in cells[2][-1]
    assert len({len(line) for line in lines if line.startswith("|")}) == 1


def test_bench_measures_evaluation_alone(monkeypatch, capsys):
    """A warm-up, then for each repetition the prompt at once and one call per generated token, always at the same depth."""
    contexts = []
    original = fake_engine.FakeContext.__init__

    def record(self, model, **options):
        contexts.append(self)
        original(self, model, **options)

    monkeypatch.setattr(fake_engine.FakeContext, "__init__", record)
    cli.main(["bench", "fake", "-r", "2", "-p", "4", "-n", "0", "-d", "3"])
    calls = [[(at, len(tokens), logits) for at, tokens, logits in context.evaluated] for context in contexts]
    assert calls == [[(0, 4, "last"), (0, 3, "none"), (3, 4, "last"), (3, 4, "last")]]
    cli.main(["bench", "fake", "-r", "1", "-p", "0", "-n", "2", "--no-warmup"])
    assert [(at, len(tokens)) for at, tokens, _ in contexts[1].evaluated] == [(0, 0), (0, 1), (1, 1)]
    assert contexts[0].n_ctx == 7 and contexts[0].evaluated[0][1][0] == 0


@pytest.fixture
def peaks(monkeypatch):
    from pyggml import roofline
    monkeypatch.setattr(roofline, "measure_peaks", lambda n_threads: roofline.Peaks(10e9, 20e9, 5e9, 5e9))


def test_bench_ops(capsys, peaks):
    cli.main(["bench", "fake", "-r", "1", "-p", "0", "-n", "2", "--ops"])
    out = capsys.readouterr().out
    assert "tg2: 0.00 ms in operations" in out and "reads 10.0 GB/s, multiplies 20 G int8, 5 G float and 5 G bf16 a second" in out
    # two tokens, 1500 ns each with 6000 bytes and 12000 multiplications: 4 GB/s and 8 GMAC/s, of 10 and 20
    assert "0.003 ms  83.3 %    4.00     8.0   40 % memory   mul_mat          blk.*.ffn_up.weight" in " ".join(out.split("\n"))
    row = bench_json(capsys, "-p", "0", "-n", "2", "--ops")[0]
    assert row["ops"][0]["what"] == "blk.*.ffn_up.weight" and row["ops"][0]["macs"] == 24000 and row["ops"][1]["share_of_peak"] > 0


def test_bench_ops_of_two_kinds():
    """The last layer computes one row of a prompt: too few for the unit that multiplies the others'."""
    from pyggml.cli.bench import since
    from pyggml.plan import StepTime, Work

    steps = [StepTime("mul_mat", f"blk.{layer}.ffn_down.weight", 100, work) for layer, work in ((0, Work(10, bf16=70)), (1, Work(10, int8=5)))]
    assert since(steps, steps + steps) == [StepTime("mul_mat", "blk.*.ffn_down.weight", 200, Work(20, int8=5, bf16=70))]


def test_bench_of_parallel_sequences(capsys):
    rows = bench_json(capsys, "-p", "4", "-n", "2", "-npl", "1,3", "-d", "5")
    assert [(r["n_prompt"], r["n_gen"], r["n_parallel"]) for r in rows] == [(4, 0, 1), (0, 2, 1), (0, 2, 3)]
    assert rows[2]["avg_ts"] == pytest.approx(6e9 / rows[2]["avg_ns"], rel=0.5)
    cli.main(["bench", "fake", "-p", "0", "-n", "2", "-npl", "3", "-r", "1"])
    assert "tg2 x3" in capsys.readouterr().out


def test_bench_interrupted(monkeypatch, capsys):
    original = fake_engine.FakeContext.__init__

    def init(self, model, **options):
        original(self, model, **options)
        self.on_eval = lambda: self.n_past == 2 and signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(fake_engine.FakeContext, "__init__", init)
    assert cli.main(["bench", "fake", "-p", "0", "-n", "50"]) == 130
    assert capsys.readouterr().out.startswith("| model")


# ---- doctor ----

def test_doctor(capsys, monkeypatch):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    names = [line.split("  ")[0] for line in out.splitlines()]
    assert names == ["pyggml", "python", "extension", "isa", "cpu", "gpu", "threads", "compiler", "huge pages", "extras"]
    monkeypatch.setenv("CC", "no-such-compiler -m64")
    assert "no-such-compiler is not found" in doctor.compiler()


def test_doctor_tells_a_missing_extension():
    done = python("-m", "pyggml", "doctor", env={**os.environ, "PYGGML_NO_NATIVE": "1"})
    assert "MISSING" in done.stdout and "PYGGML_NO_NATIVE is set" in done.stdout and done.returncode == 0


def test_doctor_reads_extras(monkeypatch):
    from importlib import metadata

    requirements = ["numpy>=1", 'cffi>=1; extra == "one"', "no-such-thing; extra == 'two'", 'numpy; extra == "two"']
    monkeypatch.setattr(metadata, "requires", lambda name: requirements)
    assert doctor.extras() == "one yes, two no (without no-such-thing)"

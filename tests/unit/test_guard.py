"""A file that is cut while it is mapped ends in a sentence, never in the death of the process."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pyggml import formats, native
from pyggml.errors import GGUFError
from pyggml.formats.source import PlainFile, mapped

pytestmark = pytest.mark.skipif(native.lib is None, reason="without the extension nothing is mapped")
MODEL = Path(__file__).parents[2] / "models" / "books6m-q8_0.gguf"
SAYS = "the file was changed while it was in use"


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "m.gguf"
    formats.write(path, {"a": "x" * 100}, {"w": np.arange(1 << 20, dtype=np.float32)})
    return path


def test_what_is_gone_reads_as_zeros_and_is_told(model):
    file = formats.open(model)
    other = formats.open(MODEL)
    os.truncate(model, 1 << 20)
    values = file["w"].numpy()
    assert values[1000] == 1000 and values[-1] == 0 and not values[1 << 19:].any()
    with pytest.raises(GGUFError, match=rf"m\.gguf: {SAYS} \(it had \d+ bytes, now 1048576\)"):
        file.verify()
    with pytest.raises(GGUFError, match=SAYS):
        file["w"].dequantize()
    other.verify()                                      # a cut file is its own trouble
    os.truncate(model, file.nbytes)                     # even when it grows again
    with pytest.raises(GGUFError, match=SAYS):
        file.verify()
    formats.open(model).verify()


def test_a_map_that_is_not_touched_is_as_it_was(model):
    file = formats.open(model)
    os.truncate(model, 1 << 20)
    assert file["w"].numpy()[0] == 0
    file.verify()


def test_places_are_given_back(model):
    for _ in range(5000):
        assert formats.open(model).map is not None
    assert len(mapped) < 100


def test_without_a_place_the_file_is_read(model, monkeypatch):
    class Full:
        pyg_guard_watch = staticmethod(lambda start, size: -1)
    from pyggml.formats import source
    monkeypatch.setattr(source, "lib", Full)
    file = formats.open(model)
    assert isinstance(file.sources[0], PlainFile) and file["w"].numpy()[5] == 5


def script(text, *arguments, flags=()):
    return subprocess.run([sys.executable, *flags, "-c", text, *map(str, arguments)], capture_output=True, text=True, timeout=60)


def test_inference_says_so(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(MODEL.read_bytes())
    done = script("import os, sys, pyggml\nfrom pyggml.errors import GGUFError\n"
                  "llm = pyggml.Llama(sys.argv[1], n_ctx=64)\nllm.tokenize(b'x')\n"
                  "os.truncate(sys.argv[1], 1 << 20)\n"
                  "try: print(llm('It was', max_tokens=5))\nexcept GGUFError as e: print(e)\n", path)
    assert done.returncode == 0 and SAYS in done.stdout and "choices" not in done.stdout, done


@pytest.mark.parametrize("command", [["run", "M", "-p", "It was", "-n", "200"], ["check", "M"], ["hash", "--all", "M"], ["diff", "M", "M"],
                                     ["quantize", "M", "OUT", "Q4_0"], ["info", "M"], ["tokenize", "-m", "M", "-p", "text"]],
                         ids=lambda c: c[0])
def test_commands_live_whenever_the_file_is_cut(tmp_path, command):
    data, rng = MODEL.read_bytes(), random.Random(command[0])
    path, out = tmp_path / "m.gguf", tmp_path / "out.gguf"
    arguments = [{"M": str(path), "OUT": str(out)}.get(a, a) for a in command]
    for _ in range(4):
        path.write_bytes(data)
        process = subprocess.Popen([sys.executable, "-m", "pyggml", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        time.sleep(rng.random() * 0.5)
        os.truncate(path, rng.randrange(len(data)))
        errors = process.communicate(timeout=60)[1]
        assert process.returncode in (0, 1) and "Traceback" not in errors, (process.returncode, errors)
        assert process.returncode == 0 or "m.gguf" in errors
        assert out.exists() == (process.returncode == 0 and command[0] == "quantize")
        out.unlink(missing_ok=True)


FOREIGN = ("import mmap, os, sys, pyggml\nfile = pyggml.open(sys.argv[2])\nf = open(sys.argv[1], 'r+b')\nm = mmap.mmap(f.fileno(), 0)\n"
           "os.truncate(sys.argv[1], 10)\nprint(m[-1])")


@pytest.mark.parametrize("flags", [(), ("-X", "faulthandler")], ids=["plain", "faulthandler"])
def test_faults_elsewhere_are_left_alone(tmp_path, flags):
    path = tmp_path / "other"
    path.write_bytes(bytes(1 << 20))
    done = script(FOREIGN, path, MODEL, flags=flags)
    assert done.returncode == -signal.SIGBUS and ("Fatal Python error: Bus error" in done.stderr) == bool(flags)


def test_a_signal_that_is_sent_does_what_it_did(tmp_path):
    kill = "import os, signal, sys, pyggml\nfile = pyggml.open(sys.argv[1])\nos.kill(os.getpid(), signal.SIGBUS)\nprint('alive')"
    assert script(kill, MODEL).returncode == -signal.SIGBUS
    ignoring = script("import signal; signal.signal(signal.SIGBUS, signal.SIG_IGN)\n" + kill, MODEL)
    assert ignoring.returncode == 0 and "alive" in ignoring.stdout
    own = script("import signal; signal.signal(signal.SIGBUS, lambda *a: print('own handler'))\n" + kill, MODEL)
    assert own.returncode == 0 and "own handler" in own.stdout

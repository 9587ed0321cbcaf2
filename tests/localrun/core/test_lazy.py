"""A package of which only a part was loaded, and a chat that loads no more than it needs."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from deepdistill.localrun.core.lazy import import_part


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package whose own code counts how often it runs."""
    folder = tmp_path / "heavy_package"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from .light import *\nfrom .rest import big\nimport sys\n"
        "sys.n_loaded = getattr(sys, 'n_loaded', 0) + 1\n__version__ = '1.2'\n"
    )
    (folder / "light.py").write_text("def answer(): return 42\n_hidden = 1\n")
    (folder / "rest.py").write_text("from .light import answer\nbig = answer() * 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "n_loaded", 0, raising=False)
    yield folder.name
    for name in [name for name in sys.modules if name.split(".")[0] == folder.name]:
        del sys.modules[name]


def loaded(package: str) -> ModuleType:
    import_part(package, "light")
    return import_module(package)


def n_loaded() -> int:
    return int(vars(sys)["n_loaded"])


def test_a_part_is_there_without_the_rest(package: str) -> None:
    module = loaded(package)
    assert module.answer() == 42
    assert module.light.answer is module.answer
    assert f"{package}.rest" not in sys.modules
    assert n_loaded() == 0
    assert not hasattr(module, "__wrapped__"), "what inspect asks of any module loads nothing"
    assert n_loaded() == 0


@pytest.mark.parametrize("name", ["big", "__version__"])
def test_any_other_name_loads_the_package_once(package: str, name: str) -> None:
    module = loaded(package)
    answer = module.answer
    assert getattr(module, name) == {"big": 84, "__version__": "1.2"}[name]
    assert n_loaded() == 1
    assert module.big == 84
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = module.nothing_such
    assert module.answer is answer, "its parts are the ones that were there"
    assert n_loaded() == 1


def test_everything_is_imported_where_a_star_asks_for_it(package: str) -> None:
    loaded(package)
    names: dict[str, object] = {}
    exec(f"from {package} import *", names)
    assert names["big"] == 84


def test_threads_wait_for_one_load(package: str) -> None:
    module = loaded(package)
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(module.big)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (found, n_loaded()) == ([84] * 8, 1)


def test_a_package_that_is_there_stays_as_it_is(package: str) -> None:
    before = import_module(package)
    import_part(package, "light")
    assert sys.modules[package] is before
    assert n_loaded() == 1


def test_what_cannot_be_loaded_says_so_and_leaves_nothing(package: str) -> None:
    import_part("no_such_package", "part")
    assert "no_such_package" not in sys.modules
    with pytest.raises(ImportError):
        import_part(package, "missing")
    assert package not in sys.modules
    assert import_module(package).big == 84


def test_a_chat_starts_without_what_it_does_not_need(scripted_gguf: Path) -> None:
    code = (
        "import sys; from deepdistill.cli import main\n"
        f"code = main(['chat', {str(scripted_gguf)!r}, '-p', 'hi'])\n"
        "unwanted = {'numpy', 'rich', 'prompt_toolkit', 'yaml', 'diskcache', 'gguf.quants', 'llama_cpp.llama'}\n"
        "print(code, sorted(unwanted & set(sys.modules)))\n"
        "import gguf, llama_cpp\n"
        "print(gguf.GGUFReader.__name__, llama_cpp.Llama.__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.stdout.splitlines() == ["The answer is 7 é🦙.", "0 []", "GGUFReader Llama"], done.stderr

"""pyproject.toml: what setuptools would install is what the zipapp bundles, and it runs."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import build_zipapp
import llmstack
from tests.conftest import ROOT

BUILD = "import setuptools; setuptools.setup()"
OWN = {"build_zipapp.py"}  # stands beside llmstack.py, and goes along


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pip install .` puts into site-packages, by setuptools alone: pip needs a network."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("there is no setuptools")
    tree = tmp_path_factory.mktemp("tree")
    for name in (*build_zipapp.bundled_files(), *OWN, "pyproject.toml", "README.md"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    (tree / "tests").mkdir()
    (tree / "tests" / "__init__.py").write_text("")
    done = subprocess.run(
        [sys.executable, "-c", BUILD, "-q", "build", "--build-lib", "lib"],
        cwd=tree,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return tree / "lib"


def run(installed: Path, *words: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path.insert(0, {str(installed)!r}); sys.argv[0] = 'llmstack'\n"
    code += "from llmstack.llmstack import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def test_it_installs_what_the_zipapp_bundles(installed: Path) -> None:
    assert [path.name for path in installed.iterdir()] == ["llmstack"], (
        "nothing else in site-packages"
    )
    names = {
        path.relative_to(installed / "llmstack").as_posix()
        for path in installed.rglob("*")
        if path.is_file()
    }
    assert names == {*build_zipapp.bundled_files(), *OWN}


def test_it_finds_its_files(installed: Path) -> None:
    assert run(installed, "version").stdout == f"llmstack {llmstack.VERSION}\n"
    listed = run(installed, "help").stdout
    assert "\n  replay " in listed
    done = run(installed, "completion", "bash")
    assert done.stdout == (ROOT / "share/completion/llmstack.bash").read_text()
    assert run(installed, "status").returncode == 1

"""The shell scripts: their form, and make_venv.sh and setup_local.sh among recorded system tools."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from finetune.files import ROOT
from support.shell_scripts import LINUX, MAC, Place

SCRIPTS = [*sorted(ROOT.glob("scripts/**/*.sh")), *sorted(ROOT.glob("docker/*.sh")), ROOT / ".ci" / "run"]
CPU_TORCH = "[--no-deps] [--extra-index-url] [https://download.pytorch.org/whl/cpu] [torch==2.13.0]"
CPU_LOCK, DEV_LOCK = "[-r] [requirements/cpu.lock]", "[-r] [requirements/dev.lock]"
INSTALLING = "installing requirements/{}.lock (takes minutes, prints nothing)\n".format
MAKING = f"creating .venv with Python 3.11.0\n{INSTALLING('cpu')}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_it_stops_at_the_first_failure_and_shellcheck_finds_nothing(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert next(line for line in lines if not line.startswith("#")) == "set -euo pipefail"
    assert os.access(path, os.X_OK)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", "--severity=style", path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("name", ["quickstart", "test"])
def test_the_first_thing_it_says_is_how_long_it_takes(name: str) -> None:
    lines = (ROOT / "scripts" / f"{name}.sh").read_text(encoding="utf-8").splitlines()
    speaking = [line for line in lines if re.match(r"\s*(?:echo|printf|scripts/|\.venv/)", line)]
    wanted = rf'echo "{name}: about \d+ minutes the first time, \d+ when run again \(2 CPU cores, fast network\).*"'
    assert re.fullmatch(wanted, speaking[0])


# make_venv.sh ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def linux(tmp_path: Path) -> Place:
    """A Linux with Python 3.11."""
    place = Place(tmp_path, LINUX)
    place.python()
    return place


@pytest.mark.parametrize(
    ("there", "chosen"),
    [
        ({"python3.11": "3.11", "python3.12": "3.12", "python3": "3.12"}, "python3.11"),
        ({"python3.12": "3.12", "python3.13": "3.13", "python3": "3.14"}, "python3.12"),
        ({"python3.13": "3.13", "python3": "3.10"}, "python3.13"),
        ({"python3.11": "3.10", "python3": "3.13"}, "python3"),  # its name is not believed
    ],
)
def test_the_first_python_from_3_11_to_3_13_makes_the_environment(
    tmp_path: Path, there: dict[str, str], chosen: str
) -> None:
    place = Place(tmp_path, LINUX)
    for name, version in there.items():
        place.python(name, version)
    said = f"creating .venv with Python {there[chosen]}.0\n{INSTALLING('cpu')}"
    assert place.run("make_venv") == (0, said, "")
    assert [line for line in place.logged() if "[venv]" in line] == [f"{chosen} [-m] [venv] [.venv]"]


def test_the_python_that_is_named_comes_first(linux: Place, tmp_path: Path) -> None:
    refused = "PYTHON=none is not Python 3.11, 3.12 or 3.13; name one of them, or unset it\n"
    assert linux.run("make_venv", PYTHON="none") == (2, "", refused)
    mine = linux.python("mine", "3.13").rename(tmp_path / "mine")
    assert linux.run("make_venv", PYTHON=str(mine))[1].startswith("creating .venv with Python 3.13.0\n")


@pytest.mark.parametrize("there", [{}, {"python3": "3.10"}, {"python3": "2.7", "python3.11": "4.11"}])
def test_without_such_a_python_it_is_exit_2_with_what_to_install(tmp_path: Path, there: dict[str, str]) -> None:
    place = Place(tmp_path, LINUX)
    for name, version in there.items():
        place.python(name, version)
    wanted = (
        "found no Python 3.11, 3.12 or 3.13; install one (Ubuntu: sudo apt install python3.11 python3.11-venv; macOS: "
        f"brew install python@3.11), or set the path: PYTHON=/path/to/python {place.folder}/scripts/make_venv.sh\n"
    )
    assert place.run("make_venv") == (2, "", wanted)
    assert not (place.folder / ".venv").exists()


def test_where_python_cannot_make_environments_it_is_exit_2_with_what_to_install(linux: Place) -> None:
    (linux.folder / "novenv").touch()
    wanted = "could not create .venv; on Ubuntu: sudo apt install python3.11-venv, then type the same command again\n"
    assert linux.run("make_venv") == (2, "creating .venv with Python 3.11.0\n", wanted)
    assert not (linux.folder / ".venv").exists()


def test_what_is_installed_already_is_left_alone_without_a_word(linux: Place) -> None:
    assert linux.run("make_venv", "--dev")[0] == 0
    assert linux.installed() == [CPU_TORCH, CPU_LOCK, DEV_LOCK]
    for arguments in ([], ["--dev"]):
        assert linux.run("make_venv", *arguments) == (0, "", "")
        assert linux.logged() == []


def test_only_the_lock_that_changed_is_installed_again(linux: Place) -> None:
    linux.run("make_venv", "--dev")
    for name in ("dev", "cpu"):
        with (linux.folder / "requirements" / f"{name}.lock").open("a", encoding="utf-8") as lock:
            lock.write("# changed\n")
        assert linux.run("make_venv", "--dev") == (0, INSTALLING(name), "")
        assert linux.installed()[-1] == f"[-r] [requirements/{name}.lock]"
        assert linux.run("make_venv", "--dev") == (0, "", "")


def test_dev_adds_its_lock_to_an_environment_that_is_there(linux: Place) -> None:
    linux.run("make_venv")
    assert linux.installed() == [CPU_TORCH, CPU_LOCK]
    assert linux.run("make_venv", "--dev") == (0, INSTALLING("dev"), "")
    assert linux.installed() == [DEV_LOCK]


def test_an_environment_whose_python_is_gone_is_made_again(linux: Place) -> None:
    linux.run("make_venv")
    (linux.folder / ".venv" / "bin" / "python").unlink()
    assert linux.run("make_venv") == (0, MAKING, "")


def test_an_install_that_fails_is_exit_6_and_is_tried_again(linux: Place) -> None:
    (linux.folder / "nopip").touch()
    wanted = (
        "installing requirements/cpu.lock failed (see above); check the network, then type the same command again\n"
    )
    assert linux.run("make_venv")[::2] == (6, wanted)
    (linux.folder / "nopip").unlink()
    assert linux.run("make_venv") == (0, INSTALLING("cpu"), "")


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ({"PIP_INDEX_URL": "https://mirror.example/simple", "PIP_FIND_LINKS": ""}, [CPU_TORCH]),
        ({"PIP_FIND_LINKS": "/wheels"}, []),
        ({"PIP_EXTRA_INDEX_URL": "https://mirror.example/cpu"}, []),
    ],
)
def test_on_linux_torch_comes_from_the_cpu_index_unless_wheels_are_named(
    linux: Place, environment: dict[str, str], first: list[str]
) -> None:
    assert linux.run("make_venv", **environment)[0] == 0
    assert linux.installed() == [*first, CPU_LOCK]


def test_where_the_cpu_index_does_not_answer_it_says_what_that_costs_and_goes_on(linux: Place) -> None:
    (linux.folder / "noindex").touch()
    costs = "PyTorch's index did not answer; installing torch from PyPI instead, with several GB of CUDA libraries\n"
    assert linux.run("make_venv") == (0, MAKING + costs, "")
    assert linux.installed() == [CPU_TORCH, CPU_LOCK]


def test_on_a_mac_the_macs_lock_is_installed_with_its_hashes(tmp_path: Path) -> None:
    mac = Place(tmp_path, MAC)
    mac.python()
    assert mac.run("make_venv", "--dev")[0] == 0
    assert mac.installed() == ["[--require-hashes] [-r] [requirements/m4.lock]", DEV_LOCK]


def test_the_conda_environment_of_an_h100_host_is_left_alone(linux: Place) -> None:
    (linux.folder / ".venv" / "conda-meta").mkdir(parents=True)
    assert linux.run("make_venv") == (
        2,
        "",
        ".venv is from environment-remote.yml; the demo and the tests need another torch: run them in another clone\n",
    )
    assert [path.name for path in (linux.folder / ".venv").iterdir()] == ["conda-meta"]


# setup_local.sh -------------------------------------------------------------------------------------------------------


def test_on_a_mac_it_is_the_macs_setup(tmp_path: Path) -> None:
    mac = Place(tmp_path, MAC)
    mac.python()
    code, out, err = mac.run("setup_local", CHECKS="3")
    assert (code, out.splitlines()[:2]) == (3, ["found macOS; running scripts/setup_m4.sh", MAKING.splitlines()[0]])
    assert err == "the environment is ready, but checks failed (see above); fix them before training\n"


DOCKER = "nothing was installed; follow docs/h100.md"
POD = "nothing was installed, and Docker is missing; on a rented pod, follow 'A rented pod' in docs/h100.md"


@pytest.mark.parametrize(("has_docker", "advice"), [(True, DOCKER), (False, POD)])
def test_on_a_machine_with_an_nvidia_gpu_it_says_where_the_lines_are(
    has_docker: bool, advice: str, tmp_path: Path
) -> None:
    place = Place(tmp_path, LINUX)
    place.program("nvidia-smi", "echo 'NVIDIA H100 80GB HBM3'; echo 'NVIDIA H100 80GB HBM3'")
    if has_docker:
        place.program("docker", "exit 0")
    wanted = f"found NVIDIA H100 80GB HBM3; train here with --config h100\n{advice}\n"
    assert place.run("setup_local") == (0, wanted, "")
    assert not (place.folder / ".venv").exists()
    assert "\n## A rented pod\n" in (ROOT / "docs" / "h100.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("nvidia", ["absent", "broken"])
def test_on_any_other_linux_it_is_the_environment_of_the_demo(linux: Place, nvidia: str) -> None:
    if nvidia == "broken":
        linux.program("nvidia-smi", "echo 'NVIDIA-SMI has failed because it could not communicate'; exit 9")
    found = "found Linux on x86_64 without an NVIDIA driver; setting up the CPU demo\n"
    ready = "the environment is ready in .venv; next: scripts/quickstart.sh\n"
    assert linux.run("setup_local") == (0, found + MAKING + ready, "")


def test_on_another_system_it_is_exit_2(tmp_path: Path) -> None:
    place = Place(tmp_path, LINUX | {"system": "MINGW64_NT-10.0"})
    wanted = "found MINGW64_NT-10.0 on x86_64; this program needs Linux or macOS (on Windows, use WSL 2)\n"
    assert place.run("setup_local") == (2, "", wanted)

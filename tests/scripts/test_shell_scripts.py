"""The shell scripts: their form, what they say first, and make_venv.sh among stand-ins for Python, pip and uname."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.config.load import ROOT

SCRIPTS = [*sorted(ROOT.glob("scripts/**/*.sh")), *sorted(ROOT.glob("docker/*.sh")), ROOT / ".ci" / "run"]
CPU_TORCH = ["--no-deps", "--extra-index-url", "https://download.pytorch.org/whl/cpu", "torch==2.13.0"]
CPU_LOCK, DEV_LOCK = ["-r", "requirements/cpu.lock"], ["-r", "requirements/dev.lock"]


def test_the_scripts_are_found() -> None:
    assert {"make_venv.sh", "quickstart.sh", "test.sh", "mac.sh", "python.sh", "run"} <= {path.name for path in SCRIPTS}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_it_and_it_stops_at_the_first_failure(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert next(line for line in lines if not line.startswith("#")) == "set -euo pipefail"
    assert os.access(path, os.X_OK)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    command = ["shellcheck", "--severity=style", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("name", ["quickstart", "test"])
def test_the_first_thing_it_says_is_how_long_it_takes(name: str) -> None:
    lines = (ROOT / "scripts" / f"{name}.sh").read_text(encoding="utf-8").splitlines()
    speaking = [line for line in lines if re.match(r"\s*(?:echo|printf|scripts/|\.venv/)", line)]
    wanted = rf'echo "{name}: about \d+ minutes the first time, \d+ when run again \(2 CPU cores, fast network\).*"'
    assert re.fullmatch(wanted, speaking[0])


# make_venv.sh ---------------------------------------------------------------------------------------------------------

# A Python that runs the script's own version check as another version, makes a .venv with a Python that only records,
# and writes down what it was asked.
PYTHON = """\
#!{bash}
printf '%s' "${{0##*/}}" >>"$LOG"; printf ' [%s]' "$@" >>"$LOG"; printf '\\n' >>"$LOG"
case "$1 ${{2:-}}" in
  -c*) exec {python} -I -S -c "import sys; sys.version_info = ({version}, 0, 'final', 0); $2" ;;
  --version*) echo "Python {dotted}.0" ;;
  "-m venv")
    mkdir -p "$3/bin"; cp "$0" "$3/bin/python"
    [[ ! -e $0.novenv ]] || exit 1 ;;  # like the real one, it leaves half a folder
  "-m pip")
    [[ ! -e {folder}/nopip ]] || exit 1
    [[ ! -e {folder}/noindex || $* != *download.pytorch.org* ]] || exit 1 ;;
esac
"""


class Place:
    """A copy of make_venv.sh and the locks, with the programs that it may find."""

    def __init__(self, folder: Path, system: str = "Linux") -> None:
        self.folder, self.programs, self.log = folder / "project", folder / "bin", folder / "log"
        self.programs.mkdir()
        shutil.copytree(ROOT / "scripts" / "lib", self.folder / "scripts" / "lib")
        shutil.copy(ROOT / "scripts" / "make_venv.sh", self.folder / "scripts")
        shutil.copytree(ROOT / "requirements", self.folder / "requirements")
        for tool in ("bash", "cat", "cksum", "cp", "dirname", "grep", "mkdir", "mv", "rm"):
            found = shutil.which(tool)
            assert found is not None
            (self.programs / tool).symlink_to(found)
        self.program("uname", f"#!{self.programs}/bash\necho {system}\n")

    def program(self, name: str, text: str) -> Path:
        path = self.programs / name
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)
        return path

    def python(self, name: str, version: str) -> Path:
        values = {"bash": self.programs / "bash", "python": sys.executable, "folder": self.folder, "dotted": version}
        return self.program(name, PYTHON.format(version=version.replace(".", ", "), **values))

    def run(self, *arguments: str, **environment: str) -> tuple[int, str, str]:
        """Exit code, stdout, stderr; the log holds this call only."""
        self.log.write_text("", encoding="utf-8")
        command = [str(self.programs / "bash"), "scripts/make_venv.sh", *arguments]
        variables = {"PATH": str(self.programs), "LOG": str(self.log), **environment}
        done = subprocess.run(command, cwd=self.folder, env=variables, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    def asked(self, name: str, first: str) -> list[list[str]]:
        """The arguments of each call of the program `name` that began with `first`."""
        calls = [line.partition(" ") for line in self.log.read_text(encoding="utf-8").splitlines()]
        found = [re.findall(r"\[(.*?)\](?= \[|$)", rest) for called, _, rest in calls if called == name]
        return [arguments for arguments in found if " ".join(arguments).startswith(first)]

    def installed(self) -> list[list[str]]:
        """What pip was given after its fixed arguments."""
        fixed = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        calls = self.asked("python", "-m pip")
        assert [call[:5] for call in calls] == [fixed] * len(calls)
        return [call[5:] for call in calls]


@pytest.fixture
def linux(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def mac(tmp_path: Path) -> Place:
    return Place(tmp_path, "Darwin")


@pytest.mark.parametrize(
    ("there", "chosen"),
    [
        ({"python3.11": "3.11", "python3.12": "3.12", "python3.13": "3.13", "python3": "3.12"}, "python3.11"),
        ({"python3.12": "3.12", "python3.13": "3.13", "python3": "3.14"}, "python3.12"),
        ({"python3.13": "3.13", "python3": "3.10"}, "python3.13"),
        ({"python3": "3.11"}, "python3"),
        ({"python3": "3.13"}, "python3"),
        ({"python3.11": "3.10", "python3": "3.12"}, "python3"),  # its name is not believed
    ],
)
def test_the_first_python_from_3_11_to_3_13_makes_the_environment(
    linux: Place, there: dict[str, str], chosen: str
) -> None:
    for name, version in there.items():
        linux.python(name, version)
    version = there[chosen]
    said = f"making .venv with Python {version}.0\ninstalling requirements/cpu.lock (minutes without output)\n"
    assert linux.run() == (0, said, "")
    assert {name: linux.asked(name, "-m venv") for name in there} == {
        name: [["-m", "venv", ".venv"]] if name == chosen else [] for name in there
    }


def test_the_python_that_is_named_comes_first(linux: Place, tmp_path: Path) -> None:
    linux.python("python3.11", "3.11")
    (tmp_path / "my own").mkdir()
    mine = linux.python("mine", "3.13").rename(tmp_path / "my own" / "mine")
    code, out, err = linux.run(PYTHON=str(mine))
    assert (code, err) == (0, "")
    assert out.startswith("making .venv with Python 3.13.0\n")


@pytest.mark.parametrize(
    "there", [{}, {"python3": "3.10"}, {"python3": "3.14"}, {"python3": "2.7", "python3.11": "4.11"}]
)
def test_without_such_a_python_it_is_exit_2_with_what_to_install(linux: Place, there: dict[str, str]) -> None:
    for name, version in there.items():
        linux.python(name, version)
    wanted = (
        "found no Python 3.11, 3.12 or 3.13; install one (Ubuntu: sudo apt install python3.11 python3.11-venv; "
        "macOS: brew install python@3.11), or name it: PYTHON=/path/to/python scripts/make_venv.sh\n"
    )
    assert linux.run() == (2, "", wanted)
    assert not (linux.folder / ".venv").exists()


def test_where_python_cannot_make_environments_it_is_exit_2_with_what_to_install(linux: Place) -> None:
    python = linux.python("python3.11", "3.11")
    python.with_name("python3.11.novenv").touch()
    wanted = "could not make .venv; on Ubuntu: sudo apt install python3.11-venv, then the same command again\n"
    for _ in ("once", "again"):
        assert linux.run() == (2, "making .venv with Python 3.11.0\n", wanted)
        assert not (linux.folder / ".venv").exists()


def test_what_is_installed_already_is_left_alone_without_a_word(linux: Place) -> None:
    linux.python("python3.11", "3.11")
    assert linux.run("--dev")[0] == 0
    assert linux.installed() == [CPU_TORCH, CPU_LOCK, DEV_LOCK]
    for arguments in ([], ["--dev"]):
        assert linux.run(*arguments) == (0, "", "")
        assert linux.log.read_text(encoding="utf-8") == ""


def test_only_the_lock_that_changed_is_installed_again(linux: Place) -> None:
    linux.python("python3.11", "3.11")
    linux.run("--dev")
    for name in ("dev", "cpu"):
        with (linux.folder / "requirements" / f"{name}.lock").open("a", encoding="utf-8") as lock:
            lock.write("# changed\n")
        assert linux.run("--dev") == (
            0,
            f"installing requirements/{name}.lock (minutes without output)\n",
            "",
        )
        assert linux.installed()[-1] == ["-r", f"requirements/{name}.lock"]
        assert linux.run("--dev") == (0, "", "")


def test_dev_adds_its_lock_to_an_environment_that_is_there(linux: Place) -> None:
    linux.python("python3.11", "3.11")
    linux.run()
    assert linux.installed() == [CPU_TORCH, CPU_LOCK]
    assert linux.run("--dev") == (0, "installing requirements/dev.lock (minutes without output)\n", "")
    assert linux.installed() == [["-r", "requirements/dev.lock"]]


def test_an_environment_whose_python_is_gone_is_made_again(linux: Place) -> None:
    linux.python("python3.11", "3.11")
    linux.run()
    (linux.folder / ".venv" / "bin" / "python").unlink()
    code, out, err = linux.run()
    assert (code, err) == (0, "")
    assert out == "making .venv with Python 3.11.0\ninstalling requirements/cpu.lock (minutes without output)\n"


def test_an_install_that_fails_is_exit_6_and_is_tried_again(linux: Place) -> None:
    linux.python("python3.11", "3.11")
    (linux.folder / "nopip").touch()
    wanted = "installing requirements/cpu.lock failed (see above); check the network, then the same command again\n"
    assert linux.run()[::2] == (6, wanted)
    assert not (linux.folder / ".venv" / "installed").exists()
    (linux.folder / "nopip").unlink()
    assert linux.run() == (0, "installing requirements/cpu.lock (minutes without output)\n", "")


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ({}, [CPU_TORCH]),
        ({"PIP_FIND_LINKS": ""}, [CPU_TORCH]),
        ({"PIP_INDEX_URL": "https://mirror.example/simple"}, [CPU_TORCH]),
        ({"PIP_FIND_LINKS": "/wheels"}, []),
        ({"PIP_EXTRA_INDEX_URL": "https://mirror.example/cpu"}, []),
    ],
)
def test_on_linux_torch_comes_from_the_cpu_index_unless_wheels_are_at_hand(
    linux: Place, environment: dict[str, str], first: list[list[str]]
) -> None:
    linux.python("python3.11", "3.11")
    assert linux.run("--dev", **environment)[0] == 0
    assert linux.installed() == [*first, CPU_LOCK, DEV_LOCK]


def test_where_the_cpu_index_does_not_answer_it_says_what_that_costs_and_goes_on(linux: Place) -> None:
    linux.python("python3.11", "3.11")
    (linux.folder / "noindex").touch()
    assert linux.run() == (
        0,
        "making .venv with Python 3.11.0\ninstalling requirements/cpu.lock (minutes without output)\n"
        "PyTorch's own index does not answer: the next step takes torch from PyPI, with several GB of CUDA\n",
        "",
    )
    assert linux.installed() == [CPU_TORCH, CPU_LOCK]


def test_on_a_mac_the_macs_lock_is_installed_with_its_hashes(mac: Place) -> None:
    mac.python("python3.12", "3.12")
    installing = "".join(f"installing requirements/{name}.lock (minutes without output)\n" for name in ("m4", "dev"))
    assert mac.run("--dev") == (0, f"making .venv with Python 3.12.0\n{installing}", "")
    assert mac.installed() == [["--require-hashes", "-r", "requirements/m4.lock"], ["-r", "requirements/dev.lock"]]


def test_it_works_from_any_directory(linux: Place, tmp_path: Path) -> None:
    linux.python("python3.11", "3.11")
    command = [str(linux.programs / "bash"), str(linux.folder / "scripts" / "make_venv.sh")]
    variables = {"PATH": str(linux.programs), "LOG": str(linux.log)}
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (linux.folder / ".venv" / "installed").is_file()
    assert not (tmp_path / ".venv").exists()


def test_the_conda_environment_of_an_h100_host_is_left_alone(tmp_path: Path) -> None:
    made = Place(tmp_path)
    made.python("python3.11", "3.11")
    (made.folder / ".venv" / "conda-meta").mkdir(parents=True)
    assert made.run() == (
        2,
        "",
        ".venv is the environment of environment-remote.yml; demo and tests need another torch: "
        "run them in another clone\n",
    )
    assert [path.name for path in (made.folder / ".venv").iterdir()] == ["conda-meta"]

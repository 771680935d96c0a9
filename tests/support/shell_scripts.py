"""Shell scripts in a copy of the project, among system tools that answer as recorded and only write down their call."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from finetune.files import ROOT

# Answers as recorded on the machines: by `uname -s` and `-m`, sysctl, sw_vers.
MAC = {"system": "Darwin", "machine": "arm64", "translated": "0", "macos": "15.1"}
LINUX = {"system": "Linux", "machine": "x86_64", "translated": None, "macos": None}
TOOLS = ("awk", "bash", "cat", "cksum", "cp", "dirname", "env", "grep", "mkdir", "mv", "rm", "sort")
FILES = (
    *(f"scripts/{name}.sh" for name in ("lib/demo", "lib/mac", "lib/python", "make_venv")),
    *(f"scripts/{name}.sh" for name in ("setup_m4", "run_m4", "setup_local")),
    *("requirements", "environment-m4.yml"),
)

# A Python that says its version and architecture, makes environments of copies of itself, and writes down what else it
# is asked. In the project's folder, `novenv`, `nopip` and `noindex` make it fail.
PYTHON = """\
printf '%s' "${{0##*/}}" >>"$LOG"; printf ' [%s]' "$@" >>"$LOG"; printf '\\n' >>"$LOG"
case "$1 ${{2:-}}" in
  -c*) exec {python} -I -S -c "
import platform, sys
sys.version_info = ({version}, 0, 'final', 0)
platform.machine = lambda: '{machine}'
$2" ;;
  --version*) echo "Python {dotted}.0" ;;
  "-m venv")
    mkdir -p "$3/bin"; cp "$0" "$3/bin/python"
    [[ ! -e novenv ]] || exit 1 ;;  # like the real one, it leaves half a folder
  "-m pip")
    [[ ! -e nopip ]] || exit 1
    [[ ! -e noindex || $* != *download.pytorch.org* ]] || exit 1 ;;
  scripts/validate_environment.py*) env | grep ^PYTORCH_ >"$LOG.env"; echo "the checks"; exit "${{CHECKS:-0}}" ;;
  src/train.py*)
    {{ echo "pid $$"; env | grep -E '^(PYTORCH_|PATH=)'; }} >>"$LOG"
    echo training; exit "${{TRAINED:-0}}" ;;
esac
"""


class Programs:
    """A folder with copies of some files of the project, and another with all programs that a script may find."""

    def __init__(self, folder: Path, files: tuple[str, ...], tools: tuple[str, ...]) -> None:
        self.folder, self.programs, self.log = folder / "the project", folder / "bin", folder / "log"
        self.programs.mkdir()
        for name in files:
            copy = self.folder / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, copy)
        for tool in tools:
            (self.programs / tool).symlink_to(found(tool))

    def program(self, name: str, text: str) -> Path:
        path = self.programs / name
        path.write_text(f"#!{self.programs}/bash\n{text}\n", encoding="utf-8")
        path.chmod(0o755)
        return path


class Place(Programs):
    """What the scripts of scripts/ need, on a machine of these facts."""

    def __init__(self, folder: Path, facts: dict[str, str | None]) -> None:
        super().__init__(folder, FILES, TOOLS)
        self.program("sleep", f"exec {found('sleep')} 0.05")  # however long is asked for
        self.program("uname", f"[[ $1 == -s ]] && echo {facts['system']} || echo {facts['machine']}")
        if facts["system"] == "Darwin":
            answer = f"echo {facts['translated']}" if facts["translated"] else "echo unknown oid >&2; exit 1"
            self.program("sysctl", f'[[ "$*" == "-n sysctl.proc_translated" ]] || exit 9\n{answer}')
            self.program("sw_vers", f'[[ "$*" == -productVersion ]] || exit 9\necho {facts["macos"]}')

    def python(self, name: str = "python3.11", version: str = "3.11", machine: str = "arm64") -> Path:
        values = {"python": sys.executable, "dotted": version, "machine": machine}
        return self.program(name, PYTHON.format(version=version.replace(".", ", "), **values))

    def run(self, script: str, *arguments: str, **more: str) -> tuple[int, str, str]:
        """Exit code, stdout, stderr, from another folder; the log holds this call only."""
        done = subprocess.run(
            self.command(script, *arguments),
            cwd=self.folder.parent, env=self.variables(more), capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    def command(self, script: str, *arguments: str) -> list[str]:
        return [str(self.programs / "bash"), f"{self.folder}/scripts/{script}.sh", *arguments]

    def variables(self, more: dict[str, str]) -> dict[str, str]:
        self.log.write_text("", encoding="utf-8")
        return {"PATH": str(self.programs), "LOG": str(self.log), **more}

    def logged(self, start: str = "") -> list[str]:
        """The lines of the log that begin with `start`."""
        return [line for line in self.log.read_text(encoding="utf-8").splitlines() if line.startswith(start)]

    def installed(self) -> list[str]:
        """What pip was given after its fixed arguments, call by call."""
        fixed = "python [-m] [pip] [install] [--quiet] [--disable-pip-version-check] "
        return [line.removeprefix(fixed) for line in self.logged("python [-m] [pip]")]


def found(tool: str) -> str:
    path = shutil.which(tool)
    assert path is not None, tool
    return path

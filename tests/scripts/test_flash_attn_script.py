"""docker/flash_attn.sh among stand-ins for Python, nvcc, cores and memory."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.files import ROOT
from support.shell_scripts import Programs, found

TOOLS = ("bash", "cp", "dirname", "mkdir", "mktemp", "mv", "rmdir", "sed")
VERSION = "2.8.3.post2"
WHEEL = f"flash_attn-{VERSION}-2.10.0torch.sm90-cp311-cp311-linux_x86_64.whl"
WHOLE = "set it to a whole number from 1, or leave it empty\n"
MISSING = f"flash-attn: docker/wheels has no {WHEEL}; compiling it\n"

# Tells the version of torch and of itself; builds a wheel as flash-attn names it; tags it; records all else of a build.
PYTHON = """\
case "$1 $2" in
  "-c "*metadata*) [[ -n "$TORCH" ]] && exec {python} -I -S -c "
import importlib.metadata
importlib.metadata.version = {{'torch': '$TORCH'}}.get
$2" ;;
  "-c "*version_info*) exec {python} -I -S -c "
import sys
sys.version_info = (3, $MINOR, 0, 'final', 0)
$2" ;;
  "-m pip")
    {{ echo "$@"; echo "$FLASH_ATTENTION_FORCE_BUILD $FLASH_ATTN_CUDA_ARCHS $NVCC_THREADS $MAX_JOBS"; }} >"$LOG"
    [[ -z "${{KILLED:-}}" ]] || exit 1
    while [[ $1 != --wheel-dir ]]; do shift; done
    echo compiled >"$2/flash_attn-{version}-cp3$MINOR-cp3$MINOR-linux_x86_64.whl" ;;
  "-m wheel")
    [[ "$3 $4 $5" == "tags --remove --build" ]] || exit 9
    mv "$7" "${{7/-{version}-/-{version}-$6-}}" ;;
  *) exit 9 ;;
esac
"""


class Place(Programs):
    """A copy of the script and of its list, and all programs and facts that it may find."""

    def __init__(self, folder: Path) -> None:
        lists = ("requirements/flash-attn.txt", "requirements/flash-attn.lock")
        super().__init__(folder, ("docker/flash_attn.sh", *lists), TOOLS)
        for name in ("docker/wheels", "tmp"):
            (self.folder / name).mkdir()
        self.program("python", PYTHON.format(python=sys.executable, version=VERSION))
        self.program("nvcc", "exit 9")
        self.program("uname", "[[ $1 == -m ]] || exit 9\necho x86_64")
        self.program("awk", f'[[ $2 == /proc/meminfo ]] || exit 9\nexec {found("awk")} "$1" "{self.folder}/meminfo"')
        self.program("cat", f'exec {found("cat")} "{self.folder}/${{1##*/}}"')
        self.machine(cores=12, free_gib=64)

    def machine(self, cores: int, free_gib: float) -> None:
        self.program("nproc", f"echo {cores}")
        kib = int(free_gib * 2**20)
        meminfo = f"MemTotal:       {4 * kib} kB\nMemFree:        {kib // 2} kB\nMemAvailable:   {kib} kB\n"
        (self.folder / "meminfo").write_text(meminfo, encoding="utf-8")

    def own_wheel(self, name: str) -> None:
        (self.folder / "docker" / "wheels" / name).write_text("yours", encoding="utf-8")

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        told = {"PATH": str(self.programs), "LOG": str(self.log), "TORCH": "2.10.0+cu128", "MINOR": "11"}
        return subprocess.run(
            [self.folder / "docker" / "flash_attn.sh", *(arguments or ("wheels",))],
            cwd=self.folder,
            env=told | {"TMPDIR": str(self.folder / "tmp"), "CUDA_HOME": str(self.folder / "no-cuda")} | variables,
            capture_output=True,
            text=True,
            check=False,
        )

    def wheels(self) -> dict[str, str]:
        return {path.name: path.read_text(encoding="utf-8").strip() for path in (self.folder / "wheels").iterdir()}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_the_memory_of_a_file_is_the_largest_that_was_measured_rounded_up() -> None:
    results = (ROOT / "benchmarks" / "results").glob("*-flash-attn-build-*.json")
    peak = max(job["peak_gib"] for path in results for job in json.loads(path.read_text(encoding="utf-8"))["jobs"])
    script = (ROOT / "docker" / "flash_attn.sh").read_text(encoding="utf-8")
    assert f"\ngib_per_file={math.ceil(peak)}\n" in script


@pytest.mark.parametrize(
    ("cores", "free_gib", "jobs"),
    [(12, 64, 9), (8, 64, 8), (16, 20.99, 2), (16, 21, 3), (4, 7, 1)],
)
def test_as_many_files_at_once_as_there_are_cores_and_as_memory_holds(
    place: Place, cores: int, free_gib: float, jobs: int
) -> None:
    place.machine(cores, free_gib)
    done = place.run()
    how = f"files compiled at once: {jobs} ({cores} cores; {int(free_gib)} GiB of memory free, up to 7 GiB per file)"
    assert (done.stdout, done.stderr) == (f"wheels/{WHEEL}\n", f"{MISSING}flash-attn: {how}\n")
    assert place.log.read_text(encoding="utf-8").splitlines()[1] == f"TRUE 90 1 {jobs}"


def test_too_little_memory_for_one_file_is_said_and_one_is_compiled(place: Place) -> None:
    place.machine(cores=4, free_gib=6.5)
    assert place.run().stderr == (
        f"{MISSING}flash-attn: files compiled at once: 1 (4 cores; 6 GiB of memory free, up to 7 GiB per file)\n"
        "flash-attn: one file may need more than the free memory; if a compiler is killed, add memory or swap\n"
    )


@pytest.mark.parametrize(
    ("file", "limit", "jobs"),
    [
        ("memory.max", str(15 * 2**30), 2),
        ("memory.limit_in_bytes", str(15 * 2**30), 2),
        ("memory.max", "max", 9),
        ("memory.limit_in_bytes", "9223372036854771712", 9),
    ],
)
def test_a_containers_memory_limit_counts_where_it_is_below_what_is_free(
    place: Place, file: str, limit: str, jobs: int
) -> None:
    (place.folder / file).write_text(f"{limit}\n", encoding="utf-8")
    place.run()
    assert place.log.read_text(encoding="utf-8").splitlines()[1] == f"TRUE 90 1 {jobs}"


def test_several_threads_of_a_compiler_take_the_memory_of_as_many_files(place: Place) -> None:
    done = place.run(NVCC_THREADS="2", FLASH_ATTN_CUDA_ARCHS="80;90")
    wheel = WHEEL.replace("sm90", "sm80.90")
    assert done.stderr == (
        f"flash-attn: docker/wheels has no {wheel}; compiling it\n"
        "flash-attn: files compiled at once: 4 (12 cores; 64 GiB of memory free, up to 14 GiB per file)\n"
    )
    assert place.log.read_text(encoding="utf-8").splitlines()[1] == "TRUE 80;90 2 4"


def test_max_jobs_is_taken_as_given(place: Place) -> None:
    done = place.run(MAX_JOBS="20")
    assert "flash-attn: files compiled at once: 20 (set by MAX_JOBS)\n" in done.stderr
    assert place.log.read_text(encoding="utf-8").splitlines()[1] == "TRUE 90 1 20"


def test_the_source_is_built_with_its_hash_without_isolation_and_without_the_cache(place: Place) -> None:
    assert place.run().returncode == 0
    assert re.sub(r"/tmp\.\w+", "/X", place.log.read_text(encoding="utf-8").splitlines()[0]) == (
        "-m pip wheel --no-cache-dir --no-deps --no-build-isolation --require-hashes "
        f"--requirement {place.folder}/docker/../requirements/flash-attn.txt --wheel-dir {place.folder}/tmp/X"
    )
    assert place.wheels() == {WHEEL: "compiled"}
    assert list((place.folder / "tmp").iterdir()) == []


def test_a_wheel_that_fits_the_locked_torch_is_taken_without_a_compiler_or_torch(place: Place) -> None:
    place.own_wheel(WHEEL)
    (place.programs / "nvcc").unlink()
    done = place.run(TORCH="")
    assert (done.returncode, done.stderr) == (0, f"flash-attn: using docker/wheels/{WHEEL}\n")
    assert place.wheels() == {WHEEL: "yours"}
    assert not place.log.exists()


@pytest.mark.parametrize(
    "other",
    [
        WHEEL.replace("2.10.0torch", "2.9.1torch"),
        WHEEL.replace("sm90", "sm80"),
        f"flash_attn-{VERSION}-cp311-cp311-linux_x86_64.whl",
    ],
)
def test_a_wheel_for_something_else_is_named_and_not_taken(place: Place, other: str) -> None:
    place.own_wheel(other)
    done = place.run(MAX_JOBS="1")
    assert done.stderr == (
        f"flash-attn: ignoring docker/wheels/{other}, whose name does not match\n"
        f"{MISSING}flash-attn: files compiled at once: 1 (set by MAX_JOBS)\n"
    )
    assert place.wheels() == {WHEEL: "compiled"}


def test_a_wheel_that_lies_where_it_is_wanted_stays_there(place: Place) -> None:
    place.own_wheel(WHEEL)
    done = place.run("docker/wheels")
    assert (done.returncode, done.stderr) == (0, f"flash-attn: using docker/wheels/{WHEEL}\n")
    assert done.stdout == f"docker/wheels/{WHEEL}\n"


def test_the_wheels_name_is_that_of_this_torch_this_python_and_this_processor(place: Place) -> None:
    place.program("uname", "[[ $1 == -m ]] || exit 9\necho aarch64")
    wheel = f"flash_attn-{VERSION}-2.9.1torch.sm90-cp312-cp312-linux_aarch64.whl"
    place.own_wheel(wheel)
    done = place.run(TORCH="2.9.1", MINOR="12")
    assert done.stderr == f"flash-attn: using docker/wheels/{wheel}\n"


def test_skip_leaves_an_empty_folder_and_needs_neither_python_nor_nvcc(place: Place) -> None:
    place.own_wheel(WHEEL)
    (place.programs / "nvcc").unlink()
    (place.programs / "python").unlink()
    done = place.run(FLASH_ATTN="skip")
    assert (done.returncode, done.stderr) == (0, "flash-attn: skipped, because FLASH_ATTN=skip is set\n")
    assert place.wheels() == {}


@pytest.mark.parametrize(
    ("arguments", "variables", "said"),
    [
        ((), {"FLASH_ATTN": "yes"}, 'flash-attn: FLASH_ATTN is "yes"; set it to build or skip\n'),
        ((), {"NVCC_THREADS": "0"}, f'flash-attn: NVCC_THREADS is "0"; {WHOLE}'),
        ((), {"MAX_JOBS": "1.5"}, f'{MISSING}flash-attn: MAX_JOBS is "1.5"; {WHOLE}'),
        (("wheels", "more"), {}, "flash-attn: usage: docker/flash_attn.sh FOLDER\n"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_built(
    place: Place, arguments: tuple[str, ...], variables: dict[str, str], said: str
) -> None:
    done = place.run(*arguments, **variables)
    assert (done.returncode, done.stderr) == (2, said)
    assert not place.log.exists()


def test_without_torch_it_ends_with_a_code_of_its_own_and_says_what_to_install(place: Place) -> None:
    done = place.run(TORCH="")
    install = "python -m pip install --require-hashes -r requirements/flash-attn.lock"
    said = f"flash-attn: docker/wheels has no {WHEEL}; to compile it, first type: {install}\n"
    assert (done.returncode, done.stdout, done.stderr) == (3, "", said)
    assert place.wheels() == {}


def test_without_nvcc_it_says_what_to_install(place: Place) -> None:
    (place.programs / "nvcc").unlink()
    done = place.run()
    said = "no nvcc on PATH or in CUDA_HOME; install the CUDA 12.1 toolkit, or set FLASH_ATTN=skip"
    assert (done.returncode, done.stderr) == (2, f"{MISSING}flash-attn: {said}\n")


def test_a_compile_that_fails_leaves_no_wheel_and_says_what_it_may_be(place: Place) -> None:
    done = place.run(KILLED="yes")
    said = "compiling failed; if a compiler was killed, memory ran out: set MAX_JOBS below 9, or add memory or swap"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, f"flash-attn: {said}")
    assert place.wheels() == {}


def locked(name: str) -> dict[str, str]:
    text = (ROOT / "requirements" / name).read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w.-]+)==([^\s\\]+)", text, re.MULTILINE))


def test_what_compiles_flash_attn_has_the_versions_that_run_it() -> None:
    build, program = locked("flash-attn.lock"), locked("h100.lock")
    assert {name: version for name, version in build.items() if program.get(name, version) != version} == {}
    assert set(build) - set(program) == {"ninja", "wheel"}
    assert {"torch", "einops"} <= set(build) & set(program)  # what flash-attn itself asks for


def test_the_source_of_flash_attn_is_pinned_by_its_hash() -> None:
    text = (ROOT / "requirements" / "flash-attn.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert [re.sub(r"[0-9a-f]{64}", "SHA256", line) for line in lines] == [
        f"flash-attn=={VERSION} --hash=sha256:SHA256"
    ]

"""What is read of a machine: from nvidia-smi, sysctl and pmset with recorded answers, cgroup files and /dev/shm."""

from __future__ import annotations

import os
import platform
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from finetune import files
from finetune.machine import inspect
from finetune.machine.inspect import GpuProcess, Machine, read_machine
from finetune.machine.platforms import choose

Tool = Callable[[str, str], None]


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tool:
    """Puts a program with this shell script on a PATH that holds nothing else."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def make(name: str, script: str) -> None:
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    return make


def says(text: str) -> str:
    """A line of shell that prints `text` as it is."""
    return f"/bin/cat <<'END'\n{text}\nEND"


def nvidia_smi(tool: Tool, gpus: str, apps: str = "", asked: int = 0, mig: str = "[N/A]") -> None:
    """An nvidia-smi that knows both questions, word for word, and answers no other."""
    fields = "name,memory.free,memory.total,driver_version,uuid,mig.mode.current"
    gpu_question = f"--query-gpu={fields} --format=csv,noheader,nounits"
    gpus = "\n".join(f"{line}, GPU-{number}abc, {mig}" for number, line in enumerate(gpus.splitlines()))
    app_question = (
        f"--id=GPU-{asked}abc --query-compute-apps=pid,process_name,used_memory --format=csv,noheader,nounits"
    )
    tool(
        "nvidia-smi",
        f'case "$*" in\n"{gpu_question}") {says(gpus)}\n;;\n"{app_question}") {says(apps)}\n;;\n*) exit 2 ;;\nesac',
    )


# NVIDIA GPUs ----------------------------------------------------------------------------------------------------------


def test_an_h100_is_read_from_its_driver_with_who_is_on_it(tool: Tool) -> None:
    nvidia_smi(
        tool,
        "NVIDIA H100 80GB HBM3, 18432, 81559, 550.90.07",
        "4711, /usr/bin/python3, 62976\n4712, [Not Found], [N/A]\n4713, C:\\a, b.exe, 512",
    )
    found = read_machine()
    assert (found.gpus, found.driver) == (("NVIDIA H100 80GB HBM3",), "550.90.07")
    assert (found.gpu_free_gib, found.gpu_memory_gib) == (18.0, 81559 / 1024)
    assert found.gpu_processes == (
        GpuProcess(4711, "/usr/bin/python3", 61.5),
        GpuProcess(4712, "[Not Found]", None),
        GpuProcess(4713, "C:\\a, b.exe", 0.5),
    )


@pytest.mark.parametrize(
    ("answer", "gpus", "free_gib", "total_gib", "driver"),
    [
        ("NVIDIA A100-SXM4-40GB, 40336, 40960, 535.183.01\nTesla T4, 15102, 15360, 535.183.01",
            ("NVIDIA A100-SXM4-40GB", "Tesla T4"), 40336 / 1024, 40.0, "535.183.01"),
        ("NVIDIA GH200 480GB, [N/A], [N/A], 550.54.15", ("NVIDIA GH200 480GB",), None, None, "550.54.15"),
        ("NVIDIA GB10, [Not Supported], 98304, 580.65", ("NVIDIA GB10",), None, 96.0, "580.65"),
        ("NVIDIA H100, NVL, 94000, 95830, 550.90", ("NVIDIA H100, NVL",), 94000 / 1024, 95830 / 1024, "550.90"),
        ("", (), None, None, None),
        ("No devices were found", (), None, None, None),
        ("Failed to initialize NVML: Driver/library version mismatch", (), None, None, None),
        ("GPU access blocked by the operating system", (), None, None, None),
        (",\n,,,\n, , , ", (), None, None, None),
    ],
)  # fmt: skip
def test_gpus_are_what_nvidia_smi_prints_and_nothing_else(
    tool: Tool, answer: str, gpus: tuple[str, ...], free_gib: float | None, total_gib: float | None, driver: str | None
) -> None:
    nvidia_smi(tool, answer)
    found = read_machine()
    assert (found.gpus, found.gpu_free_gib, found.gpu_memory_gib) == (gpus, free_gib, total_gib)
    assert (found.driver, found.gpu_processes) == (driver, ())


FOUR = "\n".join(f"NVIDIA H100 80GB HBM3, {free}000, 81559, 550.90" for free in (10, 20, 30, 40))


@pytest.mark.parametrize(
    ("visible", "free_mib", "count", "asked"),
    [
        ("2", 30000, 1, 2),
        ("3,1", 40000, 2, 3),
        ("GPU-1a", 20000, 1, 1),
        (" 1 , 0 ", 20000, 2, 1),
        ("0,9,1", 10000, 1, 0),  # CUDA takes those before the first that is none
    ],
)
def test_only_gpus_that_cuda_visible_devices_leaves_count_in_its_order(
    tool: Tool, monkeypatch: pytest.MonkeyPatch, visible: str, free_mib: int, count: int, asked: int
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    nvidia_smi(tool, FOUR, "4711, python, 1024", asked)
    found = read_machine()
    assert (found.gpu_free_gib, len(found.gpus)) == (free_mib / 1024, count)
    assert found.gpu_processes == (GpuProcess(4711, "python", 1.0),)


@pytest.mark.parametrize("visible", ["", "-1", "9", "GPU-f"])
def test_where_cuda_visible_devices_leaves_none_the_driver_is_still_there(
    tool: Tool, monkeypatch: pytest.MonkeyPatch, visible: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    nvidia_smi(tool, FOUR)
    found = read_machine()
    assert (found.gpus, found.gpu_free_gib, found.driver) == ((), None, "550.90")


@pytest.mark.parametrize("visible", [None, "0", "MIG-5c89852c-d268-c3f3-1b07-005d5ae1dc3f"])
def test_a_gpu_in_instances_does_not_tell_the_memory_of_one(
    tool: Tool, monkeypatch: pytest.MonkeyPatch, visible: str | None
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    nvidia_smi(tool, "NVIDIA H100 80GB HBM3, 81000, 81559, 550.90", mig="Enabled")
    found = read_machine()
    assert (found.gpus, found.gpu_free_gib, found.gpu_memory_gib) == (("NVIDIA H100 80GB HBM3",), None, None)


@pytest.mark.parametrize(
    "script",
    [
        "exit 9",
        "echo 'NVIDIA H100 80GB HBM3, 18432, 81559, 550.90.07'; exit 1",
        "printf '\\377\\376 broken\\n'",
        "kill -9 $$",
        "exec /bin/sleep 60",
    ],
)
def test_a_driver_that_does_not_answer_is_no_gpu(tool: Tool, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect, "ANSWER_SECONDS", 0.2)
    tool("nvidia-smi", script)
    assert (read_machine().gpus, read_machine().driver) == ((), None)


@pytest.mark.parametrize("content", ["not a program", "#!/nowhere/sh\n"])
def test_a_file_that_cannot_be_started_is_no_gpu(content: str, tool: Tool, tmp_path: Path) -> None:
    tool("nvidia-smi", "")
    (tmp_path / "bin" / "nvidia-smi").write_bytes(content.encode() if content[0] == "#" else b"\x7fELF not a program")
    assert read_machine().gpus == ()


@pytest.mark.usefixtures("tool")
def test_without_nvidia_smi_there_is_no_gpu_and_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect.subprocess, "run", lambda *_, **__: pytest.fail("something was started"))
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    assert read_machine().gpus == ()


# Memory and container -------------------------------------------------------------------------------------------------


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cgroup folder, on a machine with 16 GiB of which 12 are free."""
    monkeypatch.setenv("PATH", str(tmp_path))
    memory = SimpleNamespace(total=16 * 2**30, available=12 * 2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(inspect, "CGROUP", tmp_path / "cgroup")
    (tmp_path / "cgroup" / "memory").mkdir(parents=True)
    return tmp_path / "cgroup"


@pytest.mark.parametrize(
    ("file", "content", "limit_gib", "free_gib"),
    [
        ("memory.max", "4294967296\n", 4.0, 4.0),
        ("memory.max", "1099511627776\n", 1024.0, 12.0),
        ("memory.max", "max\n", None, 12.0),
        ("memory/memory.limit_in_bytes", "8589934592\n", 8.0, 8.0),
        ("memory/memory.limit_in_bytes", "9223372036854771712\n", None, 12.0),  # cgroup 1's word for none
    ],
)
def test_free_memory_is_at_most_what_the_container_allows(
    file: str, content: str, limit_gib: float | None, free_gib: float, cgroup: Path
) -> None:
    (cgroup / file).write_text(content, encoding="utf-8")
    found = read_machine()
    assert (found.memory_gib, found.memory_limit_gib, found.memory_free_gib) == (16.0, limit_gib, free_gib)


@pytest.mark.usefixtures("cgroup")
def test_without_cgroup_files_there_is_no_limit() -> None:
    found = read_machine()
    assert (found.memory_gib, found.memory_limit_gib, found.memory_free_gib) == (16.0, None, 12.0)


@pytest.mark.usefixtures("tool")
def test_shared_memory_is_as_large_as_its_file_system_or_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspect, "SHM", tmp_path)
    monkeypatch.setattr(inspect.shutil, "disk_usage", lambda path: SimpleNamespace(total=2**26 * (path == tmp_path)))
    assert read_machine().shm_gib == 0.0625
    monkeypatch.setattr(inspect, "SHM", tmp_path / "nowhere")
    assert read_machine().shm_gib is None


@pytest.mark.usefixtures("tool")
@pytest.mark.parametrize(("pid", "process_1"), [(1, True), (4711, False)])
def test_a_program_knows_whether_it_is_process_1(pid: int, process_1: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect.os, "getpid", lambda: pid)
    assert read_machine().process_1 == process_1


# Macs -----------------------------------------------------------------------------------------------------------------

SYSCTL = """case "$*" in
"-n machdep.cpu.brand_string") echo "{chip}" ;;
"-n sysctl.proc_translated") echo {translated} ;;
"-n kern.memorystatus_vm_pressure_level") echo {pressure} ;;
"-n kern.memorystatus_level") echo {level} ;;
*) exit 1 ;;
esac"""
PMSET = """System-wide power settings:
Currently in use:
 standby              1
 {setting:<20} {low_power}
 sleep                1 (sleep prevented by powerd)"""


@pytest.fixture
def mac(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Machine]:
    """Reads a Mac whose sysctl and pmset give these answers."""
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "mac_ver", lambda: ("15.1", ("", "", ""), "arm64"))

    def reading(
        architecture: str = "arm64", setting: str = "lowpowermode", low_power: int = 0, **answers: object
    ) -> Machine:
        monkeypatch.setattr(platform, "machine", lambda: architecture)
        tool("sysctl", SYSCTL.format(**{"chip": "Apple M4", "translated": 0, "pressure": 1, "level": 70, **answers}))
        tool("pmset", f'[ "$*" = -g ] && {says(PMSET.format(setting=setting, low_power=low_power))}')
        return read_machine()

    return reading


@pytest.mark.parametrize(
    ("answer", "cores"),
    [('  |   "gpu-core-count" = 10', 10), ('  |   "gpu-core-count" = 40', 40), ("  |   no such property", None)],
)
def test_the_cores_of_a_macs_gpu_are_counted_where_it_says(
    answer: str, cores: int | None, mac: Callable[..., Machine], tool: Tool
) -> None:
    tool("ioreg", f'[ "$*" = "-rc AGXAccelerator -d1" ] && {says(answer)}')
    assert mac().gpu_cores == cores


def facts(found: Machine) -> tuple[str, str, bool, str, int]:
    return found.release, found.chip, found.translated, found.low_power, found.pressure


def test_a_macs_chip_power_and_memory_pressure_are_read(mac: Callable[..., Machine]) -> None:
    assert facts(mac()) == ("15.1", "Apple M4", False, "", 1)
    found = mac(low_power=1, pressure=4, chip="Apple M2 Max")
    assert facts(found) == ("15.1", "Apple M2 Max", False, "lowpowermode", 4)


@pytest.mark.parametrize(("value", "found"), [(0, ""), (1, "powermode"), (2, "")])  # automatic, low, high
def test_the_low_power_mode_of_a_pro_or_max_has_another_name(
    value: int, found: str, mac: Callable[..., Machine]
) -> None:
    assert mac(setting="powermode", low_power=value).low_power == found


@pytest.mark.parametrize(("level", "free_gib"), [(70, 22.4), ("unknown", 9.0)])
def test_a_macs_free_memory_is_by_macos_own_level(
    level: object, free_gib: float, mac: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=32 * 2**30, available=9 * 2**30))
    assert mac(level=level).memory_free_gib == pytest.approx(free_gib)


def test_an_intel_python_on_apple_silicon_is_known_as_such(mac: Callable[..., Machine]) -> None:
    found = mac("x86_64", translated=1)
    assert found.translated
    reason = "found Apple silicon, but this Python is an Intel build under Rosetta"
    assert (choose(found)[0].name, choose(found)[1]) == ("cpu", reason)


def test_an_intel_mac_does_not_know_the_question_about_rosetta(mac: Callable[..., Machine], tool: Tool) -> None:
    mac("x86_64")
    tool("sysctl", 'echo "sysctl: unknown oid" >&2; exit 1')
    assert facts(read_machine()) == ("15.1", "", False, "", 1)


@pytest.mark.usefixtures("tool")
def test_a_mac_whose_tools_are_not_on_the_path_is_still_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    found = read_machine()
    assert (found.system, found.architecture, found.chip) == ("Darwin", "arm64", "")
    assert choose(found)[0].name == "m4"


def test_a_memory_pressure_that_is_no_number_is_taken_for_none(mac: Callable[..., Machine]) -> None:
    assert mac(pressure="unknown").pressure == 1


def test_what_is_not_a_mac_is_asked_nothing_of_a_mac(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "release", lambda: "6.8.0-45-generic")
    tool("sysctl", "echo 1")
    tool("pmset", "echo lowpowermode 1")
    assert facts(read_machine()) == ("6.8.0-45-generic", "", False, "", 1)


def in_an_image(expression: str) -> str:
    """What `expression` says in a process that docker/Dockerfile's environment surrounds; IMAGE_LOCK is read once."""
    imports = (
        "from finetune import cli; from finetune.model import hub; from finetune.checks import LIST, device; "
        "from finetune.machine.platforms import PLATFORMS"
    )
    code = f"{imports}; print({expression})"
    environment = {**os.environ, "IMAGE_LOCK": "h100", "PYTHONPATH": str(files.ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("expression", "wanted"),
    [
        ("LIST", "docker compose run --rm validate --list lists them all"),
        ("cli.command('src/train.py')", "docker compose run --rm train-h100"),
        ("cli.command('scripts/make_demo_model.py')", "docker compose run --rm demo"),
        (
            "cli.command('scripts/inspect_data.py')",
            'docker compose run --rm --entrypoint "as-owner python" plan scripts/inspect_data.py',
        ),
        ("PLATFORMS['cpu'].install", "docker compose build"),
        ("PLATFORMS['h100'].repair", "docker compose build --no-cache"),
        ("device.BUILD_FLASH_ATTENTION", "docker compose build --build-arg FLASH_ATTN=build"),
        ("hub.GIVE_TOKEN", "HF_TOKEN_FILE=FILE in .env"),
    ],
)
def test_in_its_image_it_says_what_to_type_outside_of_it(expression: str, wanted: str) -> None:
    assert in_an_image(expression) == wanted

"""setup_m4.sh and run_m4.sh among recorded system tools, and what they install."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from finetune.files import ROOT
from support.pseudo_terminal import Session
from support.shell_scripts import FILES, LINUX, MAC, Place

ROSETTA = MAC | {"machine": "x86_64", "translated": "1"}
INTEL = MAC | {"machine": "x86_64", "translated": None}
MAINS = "Now drawing from 'AC Power'\n -InternalBattery-0 (id=1234)\t100%; charged; 0:00 remaining present: true"
BATTERY = (
    "Now drawing from 'Battery Power'\n -InternalBattery-0 (id=1234)\t81%; discharging; 5:02 remaining present: true"
)
SETTINGS = "Currently in use:\n standby              1\n {:<20} {}\n sleep                1"

# conda, mamba and micromamba: record, and make an environment of a Python, or fail before or after there is one.
CONDA = """\
printf '%s (%s)' "${{0##*/}}" "${{CONDA_SUBDIR:-}}" >>"$LOG"; printf ' [%s]' "$@" >>"$LOG"; printf '\\n' >>"$LOG"
mkdir -p "$5/conda-meta"
[[ ! -e fails-early ]] || exit 1
mkdir -p "$5/bin"; cp {programs}/conda-python "$5/bin/python"
[[ ! -e fails-late ]] || exit 1
"""


def add_conda(place: Place, name: str = "conda", machine: str = "arm64") -> Path:
    place.python("conda-python", machine=machine)
    return place.program(name, CONDA.format(programs=place.programs))


def set_power(place: Place, battery: str, low: int, setting: str = "lowpowermode") -> None:
    settings = SETTINGS.format(setting, low)
    place.program("pmset", f'if [[ "$*" == "-g batt" ]]; then echo "{battery}"; else echo "{settings}"; fi')


@pytest.fixture
def mac(tmp_path: Path) -> Place:
    """A Mac with Python 3.11 and nothing else."""
    place = Place(tmp_path, MAC)
    place.python()
    return place


@pytest.fixture
def ready(mac: Place) -> Place:
    """A Mac that is set up, on mains power."""
    assert mac.run("setup_m4")[0] == 0
    set_power(mac, MAINS, low=0)
    return mac


LOCKED = (
    "python [-m] [pip] [install] [--quiet] [--disable-pip-version-check] [--require-hashes] [-r] [requirements/m4.lock]"
)
INSTALLING = "installing requirements/m4.lock (takes minutes, prints nothing)\n"
CHECKED = "python [scripts/validate_environment.py] [--config] [m4]"
READY = (
    "the environment is ready in .venv\nthe checks\n"
    "next: scripts/run_m4.sh --demo (minutes, small base model), then scripts/run_m4.sh\n"
)
DEMO = "without an account or a large download: scripts/run_m4.sh --demo\n"


# Which machine --------------------------------------------------------------------------------------------------------

REFUSED = [
    (LINUX,
        "scripts/{} needs a Mac with Apple silicon, but this is Linux on x86_64; type: scripts/setup_local.sh\n"),
    (ROSETTA, "this terminal runs under Rosetta, which hides the GPU; type: arch -arm64 /bin/bash scripts/{}\n"),
    (INTEL,
        "this Mac has an Intel processor, which this PyTorch does not support; train on an H100 (README.md, Run it)\n"),
    (MAC | {"macos": "13.7.1"},
        "found macOS 13.7.1; bfloat16 in PyTorch needs 14 or later; type: softwareupdate --install --all --restart\n"),
]  # fmt: skip


@pytest.mark.parametrize("script", ["setup_m4", "run_m4"])
@pytest.mark.parametrize(("facts", "text"), REFUSED, ids=["Linux", "Rosetta", "Intel", "macOS 13"])
def test_a_machine_that_cannot_train_is_exit_2_with_what_to_do(
    tmp_path: Path, script: str, facts: dict[str, str | None], text: str
) -> None:
    place = Place(tmp_path, facts)
    place.python()
    assert place.run(script) == (2, "", text.format(f"{script}.sh"))
    assert place.log.read_text(encoding="utf-8") == ""
    assert not (place.folder / ".venv").exists()


OLD = "found macOS 14.0, expected 15 or later; type: softwareupdate --install --all --restart\n"


@pytest.mark.parametrize(("version", "said"), [("14.0", OLD), ("26.1", "")])
def test_macos_15_and_later_are_taken_and_14_with_a_warning(tmp_path: Path, version: str, said: str) -> None:
    place = Place(tmp_path, MAC | {"macos": version})
    place.python()
    code, _, err = place.run("setup_m4")
    assert (code, err) == (0, said)


# setup_m4.sh ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "chosen"),
    [(["conda", "mamba", "micromamba"], "conda"), (["mamba", "micromamba"], "mamba"), (["micromamba"], "micromamba")],
)
def test_conda_mamba_or_micromamba_brings_python_and_pip_the_lock(mac: Place, there: list[str], chosen: str) -> None:
    for name in there:
        add_conda(mac, name)
    assert mac.run("setup_m4") == (0, f"creating .venv with {chosen}\n{INSTALLING}{READY}", "")
    prefix = mac.folder / ".venv"
    wanted = f"{chosen} (osx-arm64) [create] [--yes] [--quiet] [--prefix] [{prefix}] [--override-channels]"
    lines = mac.log.read_text(encoding="utf-8").splitlines()
    assert lines[0] == f"{wanted} [--channel] [conda-forge] [python=3.11] [pip]"
    assert lines[-2:] == [LOCKED, CHECKED]
    assert not mac.logged("python3.11")


@pytest.mark.parametrize("variable", ["CONDA_EXE", "MAMBA_EXE"])
def test_a_conda_that_is_a_shell_function_is_found_by_its_variable(mac: Place, tmp_path: Path, variable: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    program = add_conda(mac, "micromamba").rename(tmp_path / "elsewhere" / "micromamba")
    code, out, _ = mac.run("setup_m4", **{variable: str(program)})
    assert (code, out.splitlines()[0]) == (0, "creating .venv with micromamba")


def test_without_any_of_them_python_alone_makes_the_environment(mac: Place) -> None:
    said = f"creating .venv with Python 3.11.0\n{INSTALLING}{READY}"
    assert mac.run("setup_m4") == (0, said, "")
    assert mac.log.read_text(encoding="utf-8").splitlines()[-2:] == [LOCKED, CHECKED]


def test_a_python_that_is_named_comes_before_conda(mac: Place, tmp_path: Path) -> None:
    add_conda(mac)
    mine = mac.python("mine", "3.13").rename(tmp_path / "mine")
    code, out, _ = mac.run("setup_m4", PYTHON=str(mine))
    assert (code, out.splitlines()[0]) == (0, "creating .venv with Python 3.13.0")


def test_an_intel_python_is_passed_over_for_one_of_apple_silicon(mac: Place) -> None:
    mac.python("python3.11", "3.11", "x86_64")
    mac.python("python3.12", "3.12")
    code, out, _ = mac.run("setup_m4")
    assert (code, out.splitlines()[0]) == (0, "creating .venv with Python 3.12.0")


@pytest.mark.parametrize(("version", "machine"), [("3.11", "x86_64"), ("3.10", "arm64"), ("3.14", "arm64")])
def test_without_conda_and_such_a_python_it_is_exit_2_with_what_to_type(mac: Place, version: str, machine: str) -> None:
    mac.python("python3.11", version, machine)
    wanted = (
        "found no conda, mamba or micromamba, and no Python 3.11 to 3.13 built for Apple silicon; "
        "type: brew install python@3.11, or set its path: PYTHON=/path/to/python scripts/setup_m4.sh\n"
    )
    assert mac.run("setup_m4") == (2, "", wanted)
    assert not (mac.folder / ".venv").exists()


@pytest.mark.parametrize("there", ["from before", "from an Intel conda"])
def test_an_environment_of_an_intel_python_is_refused(mac: Place, there: str) -> None:
    if there == "from before":
        (mac.folder / ".venv" / "bin").mkdir(parents=True)
        mac.python("old", machine="x86_64").rename(mac.folder / ".venv" / "bin" / "python")
    else:
        add_conda(mac, machine="x86_64")
    code, _, err = mac.run("setup_m4")
    wanted = ".venv contains a Python that is not built for Apple silicon; type: rm -r .venv; scripts/setup_m4.sh\n"
    assert (code, err) == (2, wanted)
    assert not any("[pip]" in line for line in mac.logged("python "))


@pytest.mark.parametrize("tool", ["conda", "none"])
def test_a_second_time_nothing_is_made_or_installed(mac: Place, tool: str) -> None:
    if tool == "conda":
        add_conda(mac)
    assert mac.run("setup_m4")[0] == 0
    assert mac.run("setup_m4") == (0, READY, "")
    calls = mac.log.read_text(encoding="utf-8").splitlines()
    assert calls == ["python [-c] [import platform; print(platform.machine())]", CHECKED]


@pytest.mark.parametrize("when", ["fails-early", "fails-late"])
def test_a_conda_that_fails_is_exit_6_and_the_next_try_goes_on(mac: Place, when: str) -> None:
    add_conda(mac)
    (mac.folder / when).touch()
    wanted = "conda could not create .venv (see above); check the network, then type the same command again\n"
    assert mac.run("setup_m4") == (6, "creating .venv with conda\n", wanted)
    assert (mac.folder / ".venv").exists() == (when == "fails-late")
    (mac.folder / when).unlink()
    assert mac.run("setup_m4")[0] == 0
    assert mac.logged(LOCKED) == [LOCKED]


def test_what_the_checks_found_is_the_exit_code_and_the_demo_is_offered(mac: Place) -> None:
    out = f"creating .venv with Python 3.11.0\n{INSTALLING}the environment is ready in .venv\nthe checks\n{DEMO}"
    err = "the environment is ready, but checks failed (see above); fix them before training\n"
    assert mac.run("setup_m4", CHECKS="3") == (3, out, err)


def test_the_checks_see_the_limits_that_a_training_will_have(mac: Place) -> None:
    assert mac.run("setup_m4", PYTORCH_ENABLE_MPS_FALLBACK="0")[0] == 0
    limits = mac.log.with_name("log.env").read_text(encoding="utf-8").splitlines()
    assert sorted(limits) == ["PYTORCH_MPS_HIGH_WATERMARK_RATIO=1.2", "PYTORCH_MPS_LOW_WATERMARK_RATIO=1.0"]


def test_only_a_terminal_shows_colors_and_not_with_no_color(ready: Place) -> None:
    def shown(**more: str) -> str:
        session = Session(ready.command("setup_m4"), ready.variables({"CHECKS": "3", **more}))
        assert session.end() == 3
        return session.written.replace("\r\n", "\n")

    left = "the environment is ready, but checks failed (see above); fix them before training"
    lines = ["the environment is ready in .venv", "the checks", left, DEMO.strip()]
    colors = ["\033[32m", "", "\033[33m", "\033[32m"]  # green for what is done, yellow for what is left
    colored = [f"{color}{line}\033[0m" if color else line for color, line in zip(colors, lines, strict=True)]
    assert shown().splitlines() == colored
    assert shown(NO_COLOR="1").splitlines() == lines


# run_m4.sh ------------------------------------------------------------------------------------------------------------

TRAIN = "python [src/train.py] [--config] [configs/training_config_m4.yaml]"


def test_without_an_environment_it_says_what_makes_one(mac: Place) -> None:
    assert mac.run("run_m4") == (2, "", ".venv is missing; type: scripts/setup_m4.sh\n")


def test_it_trains_with_the_arguments_as_they_were_typed(ready: Place) -> None:
    arguments = ["--set", "system_prompt=Be  kind", "--set", "dataset.max_rows=40", ""]
    assert ready.run("run_m4", *arguments) == (0, "training\n", "")
    given = " [--set] [system_prompt=Be  kind] [--set] [dataset.max_rows=40] []"
    assert ready.logged("python [src") == [TRAIN + given]
    assert ready.run("run_m4") == (0, "training\n", "")
    assert ready.logged("python [src") == [TRAIN]


@pytest.mark.parametrize("code", [2, 143])
def test_the_exit_code_is_the_trainings(ready: Place, code: int) -> None:
    assert ready.run("run_m4", TRAINED=str(code)) == (code, "training\n", "")


def test_the_limits_of_the_gpus_memory_are_set_the_low_one_below_the_high(ready: Place) -> None:
    ready.run("run_m4")
    low, high = "PYTORCH_MPS_LOW_WATERMARK_RATIO", "PYTORCH_MPS_HIGH_WATERMARK_RATIO"
    assert sorted(ready.logged("PYTORCH_")) == [f"{high}=1.2", f"{low}=1.0"]
    assert ready.logged("PATH=") == [f"PATH={ready.folder}/.venv/bin:{ready.programs}"]
    ready.run("run_m4", **{low: "0.8", high: "0.9"})
    assert sorted(ready.logged("PYTORCH_")) == [f"{high}=0.9", f"{low}=0.8"]  # a person's own stand


@pytest.mark.parametrize(("value", "warned"), [("1", True), ("0", False)])
def test_a_fall_back_to_the_cpu_is_never_passed_on(ready: Place, value: str, warned: bool) -> None:
    text = "PYTORCH_ENABLE_MPS_FALLBACK=1 is ignored: it hides slow work on the CPU; unset it\n"
    assert ready.run("run_m4", PYTORCH_ENABLE_MPS_FALLBACK=value) == (0, "training\n", text if warned else "")
    assert not ready.logged("PYTORCH_ENABLE_MPS_FALLBACK")


ON_BATTERY = "this Mac is on battery power, where it may sleep despite caffeinate, and a run takes hours; plug it in\n"
LOW_POWER = "low power mode is on and slows the GPU; type: sudo pmset -a lowpowermode 0\n"


@pytest.mark.parametrize(
    ("battery", "low", "text"),
    [(MAINS, 0, ""), (BATTERY, 0, ON_BATTERY), (MAINS, 1, LOW_POWER), (BATTERY, 1, ON_BATTERY + LOW_POWER)],
)
def test_battery_and_low_power_mode_are_warned_of(ready: Place, battery: str, low: int, text: str) -> None:
    set_power(ready, battery, low)
    assert ready.run("run_m4") == (0, "training\n", text)
    set_power(ready, battery, low, "powermode")  # as a Pro or Max calls it
    assert ready.run("run_m4") == (0, "training\n", text.replace("lowpowermode", "powermode"))


@pytest.mark.parametrize("there", [False, True])
def test_a_power_tool_that_is_absent_or_fails_stops_nothing(ready: Place, there: bool) -> None:
    (ready.programs / "pmset").unlink()
    if there:
        ready.program("pmset", "exit 1")
    assert ready.run("run_m4") == (0, "training\n", "")


def test_the_mac_is_kept_awake_for_as_long_as_the_training_lives(ready: Place, tmp_path: Path) -> None:
    said = tmp_path / "caffeinate"
    ready.program("caffeinate", f'echo "$*" >{said}.partial; echo noise; mv {said}.partial {said}')
    train = ready.folder / ".venv" / "bin" / "python"
    text = train.read_text(encoding="utf-8")
    train.write_text(text.replace("echo training", f"until [[ -e {said} ]]; do sleep 0.01; done; echo training"))
    assert ready.run("run_m4") == (0, "training\n", "")
    (pid,) = ready.logged("pid ")
    assert said.read_text(encoding="utf-8") == f"-i -s -w {pid.removeprefix('pid ')}\n"  # the training's own process


# run_m4.sh --demo -----------------------------------------------------------------------------------------------------

# A training in the environment's Python: it saves after a moment, then runs until SIGTERM; or it ends by itself.
TRAINING = """\
  src/train.py*)
    run=adapters/demo-m4; [[ "$*" != *--fresh* ]] || run=adapters/demo-m4-2
    for saved in adapters/*/checkpoints/checkpoint-5; do [[ ! -e $saved ]] || run=${saved%/*/*}; done
    if [[ -e $run/checkpoints/checkpoint-5 ]]; then echo resumed; exit "${TRAINED:-0}"; fi
    [[ -z ${FAILS:-} ]] || exit "$FAILS"
    trap 'echo stopped; exit 143' TERM
    mkdir -p "$run/rehearsal/checkpoints/checkpoint-1"; echo training; for _ in {1..5}; do sleep 0.1; done
    echo saved; mkdir -p "$run/checkpoints/checkpoint-5"
    for _ in {1..100}; do sleep 0.1; done ;;
"""
DEMO_TRAIN = "python [src/train.py] [--config] [configs/training_config_m4_demo.yaml]"
ANNOUNCED = "the demo will stop after its first checkpoint and then resume, to test both on this Mac\n"


@pytest.fixture
def demo(ready: Place) -> Place:
    """A Mac that is set up, whose training is TRAINING."""
    python = ready.folder / ".venv" / "bin" / "python"
    start, _, rest = python.read_text(encoding="utf-8").partition("  src/train.py*)\n")
    python.write_text(start + TRAINING + rest.partition(" ;;\n")[2], encoding="utf-8")
    return ready


def test_the_demo_is_made_stopped_after_its_first_checkpoint_and_resumed(demo: Place) -> None:
    out = f"{ANNOUNCED}training\nsaved\nstopped\nstopped; resuming with the same command\nresumed\n"
    assert demo.run("run_m4", "--demo", "--set", "training.seed=1") == (0, out, "")
    train = f"{DEMO_TRAIN} [--set] [training.seed=1]"
    assert demo.logged("python [s") == ["python [scripts/make_demo_model.py]", train, train]


def test_a_demo_beside_a_finished_one_is_fresh_until_it_resumes(demo: Place) -> None:
    (demo.folder / "adapters" / "demo-m4").mkdir(parents=True)
    (demo.folder / "adapters" / "demo-m4" / "manifest.json").write_text('{"status": "complete"}', encoding="utf-8")
    code, out, _ = demo.run("run_m4", "--demo")
    assert (code, out.splitlines()[0]) == (0, "adapters/demo-m4 is finished; starting a new run next to it")
    assert demo.logged("python [src") == [f"{DEMO_TRAIN} [--fresh]", DEMO_TRAIN]


@pytest.mark.parametrize("code", [0, 3])
def test_a_demo_that_ends_before_its_first_checkpoint_is_not_started_again(demo: Place, code: int) -> None:
    assert demo.run("run_m4", "--demo", FAILS=str(code)) == (code, ANNOUNCED, "")
    assert demo.logged("python [src") == [DEMO_TRAIN]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_demo_that_a_person_stops_is_not_resumed(demo: Place, number: signal.Signals, code: int) -> None:
    process = subprocess.Popen(
        demo.command("run_m4", "--demo"), cwd=demo.folder, env=demo.variables({}), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == [ANNOUNCED, "training\n"]
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert (process.returncode, demo.logged("python [src")) == (code, [DEMO_TRAIN])
    assert "resuming" not in out


# Their form -----------------------------------------------------------------------------------------------------------

# What bash 3.2, the one of macOS, does not know: newer arrays, case changes, tests, redirections and builtins.
NEWER = (
    r"declare -[An]|local -[An]|\$\{\w+(\[.\])?(,|\^)|\bmapfile\b|\breadarray\b|\|&|&>>|\[\[ -v |\bcoproc\b|;;?&|%\("
)


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".sh")])
def test_a_script_for_the_mac_holds_nothing_that_its_old_bash_does_not_know(name: str) -> None:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if re.search(NEWER, line)] == []
    bare = [line for line in lines if re.search(r'(?<![+:])"\$\{\w+\[@\]\}"', line) and "${" in line]
    assert {re.findall(r"\$\{(\w+)\[@\]", line)[0] for line in bare} <= {"candidates", "wanted", "locks"}  # never empty


# environment-m4.yml ---------------------------------------------------------------------------------------------------


def pins(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9][a-z0-9._-]*)==([^ \\\n;]+)", path.read_text(encoding="utf-8"), re.MULTILINE))


def test_the_conda_environment_is_the_locks_python_and_the_lock() -> None:
    environment = yaml.safe_load((ROOT / "environment-m4.yml").read_text(encoding="utf-8"))
    assert environment == {
        "name": "mistral-qlora-m4",
        "channels": ["conda-forge"],
        "dependencies": ["python=3.11", "pip", {"pip": ["--require-hashes", "-r requirements/m4.lock"]}],
    }
    lock_script = (ROOT / "requirements" / "lock.sh").read_text(encoding="utf-8")
    assert "--python-version 3.11 " in lock_script


def test_the_macs_lock_has_hashes_and_no_package_that_needs_cuda() -> None:
    folder = ROOT / "requirements"
    locked = pins(folder / "m4.lock")
    text = (folder / "m4.lock").read_text(encoding="utf-8")
    assert len(re.findall(r"^\S+==\S+ \\\n    --hash=sha256:", text, re.MULTILINE)) == len(locked) > 50
    cuda = r"nvidia|cuda|cupy|triton|flash.attn|xformers|deepspeed|apex|vllm"
    assert [name for name in locked if re.search(cuda, name)] == []


@pytest.mark.slow
def test_the_macs_lock_is_what_its_inputs_resolve_to_for_macos_14_on_arm64(tmp_path: Path) -> None:
    uv = [sys.executable, "-m", "uv"]
    if subprocess.run([*uv, "--version"], capture_output=True, check=False).returncode:
        pytest.skip("uv is not installed: pip install uv")
    folder = Path(shutil.copytree(ROOT / "requirements", tmp_path / "requirements"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    before = pins(folder / "m4.lock")
    command = [*uv, "pip", "compile", "../pyproject.toml", "--extra", "m4", "--output-file", "m4.lock", "--quiet"]
    command += ["--generate-hashes", "--python-version", "3.11", "--python-platform", "aarch64-apple-darwin"]
    variables = {**os.environ, "MACOSX_DEPLOYMENT_TARGET": "14.0"}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode and re.search("dns error|error sending request|Failed to fetch|timed out", done.stderr):
        pytest.skip("the package index does not answer")
    assert (done.returncode, pins(folder / "m4.lock")) == (0, before), done.stderr

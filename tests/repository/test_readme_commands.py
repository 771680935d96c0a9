"""Every command of these documents is run: here, by a test, by .ci/run; or it is named why it is not."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from finetune.checks.preflight import Preflight
from finetune.config.load import ROOT, load_config
from finetune.config.schema import keys
from finetune.files import write_json
from finetune.machine.inspect import read_machine
from finetune.runs import receipt

PAGES = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "AGENTS.md", *PAGES)
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS}
# Indented or fenced blocks that are no commands, by how they begin.
SHOWN = ("src/train.py  ", "dataset:", "step 0/", '{"messages"', "nightly: ", "from peft import PeftModel", "done: ")
FOLDERS = r"\./|\.venv/|\.ci/|(scripts|src|requirements|benchmarks)/"
PROGRAMS = rf"{FOLDERS}|(python|pip|uv|docker|cp|rsync|export|hf|wandb|curl|conda) "


@dataclass(frozen=True)
class Here:
    """Run now, in a copy of the project whose data/processed is data/sample.

    `codes` are the exit codes it may have; `says` is in what it prints. Of `docker compose run --rm SERVICE` it is what
    the service starts that is run, without its container; that arguments reach it is held by SERVICES.
    """

    codes: tuple[int, ...] = (0,)
    says: str = ""


@dataclass(frozen=True)
class By:
    """Run by what `file` holds: a test's name, or a line of .ci/run or of a script that .ci/run starts."""

    file: str
    text: str


@dataclass(frozen=True)
class Needs:
    """Not run by any test; a closed list of reasons."""

    hardware: str


IDLE = "a machine that does nothing else"
HARDWARE = {"H100", "Mac", "network", "another machine", IDLE}
CHECK = ".venv/bin/python scripts/validate_environment.py"
TRIED = "--set dataset.max_rows=40 --set dataset.validation_file=null"
SERVICES, IMAGE = "tests/container/test_services.py", "tests/container/test_image.py"
VALIDATE = "tests/scripts/test_validate_environment.py"
PAGE = "tests/results/report/test_page.py"
MAC, SHELL = "tests/scripts/test_mac_scripts.py", "tests/scripts/test_shell_scripts.py"
RULES: dict[str, Here | By | Needs] = {
    "./scripts/quickstart.sh": By(".ci/run", "./scripts/quickstart.sh"),
    "./scripts/test.sh": By(".ci/run", "./scripts/test.sh --slow"),
    "./scripts/test.sh --slow": By(".ci/run", "./scripts/test.sh --slow"),
    "./scripts/test.sh --h100-torch": By(".ci/run", "./scripts/test.sh --h100-torch"),
    "./scripts/setup_local.sh": By(SHELL, "test_on_any_other_linux_it_is_the_environment_of_the_demo"),
    "./scripts/setup_m4.sh": By(MAC, "test_conda_mamba_or_micromamba_brings_python_and_pip_the_lock"),
    "./scripts/run_m4.sh --demo": By(MAC, "test_the_demo_is_made_stopped_after_its_first_checkpoint_and_resumed"),
    "./scripts/run_m4.sh": By(MAC, "test_it_trains_with_the_arguments_as_they_were_typed"),
    f"./scripts/run_m4.sh {TRIED} --set tracking.run_name=local-try "
    "--set training.eval_steps=1 --set training.save_steps=1": By(
        "tests/repository/test_readme.py",
        "test_the_local_try_on_the_mac_is_accepted_and_its_check_on_the_h100",
    ),
    "scripts/make_venv.sh --dev": By(SHELL, "test_dev_adds_its_lock_to_an_environment_that_is_there"),
    ".venv/bin/python src/train.py --config h100 --dry-run": Here(),
    ".venv/bin/python src/train.py --config h100": Needs("H100"),
    ".venv/bin/python src/train.py --config cpu": By("scripts/quickstart.sh", '"$python" src/train.py --config cpu'),
    "src/train.py --skip ID": By("tests/test_train.py", "test_checks_that_are_left_out_are_named_in_the_manifest"),
    ".venv/bin/python scripts/inspect_data.py data/processed/train.jsonl --config h100 --rows 1-3": Here(),
    ".venv/bin/python scripts/check_gpu.py": Here(),
    ".venv/bin/python scripts/config_loader.py --schema > configs/schema.json": Here(),
    "uv run scripts/check_docker.py": By("tests/scripts/test_check_docker.py",
        "test_what_uv_run_installs_is_what_the_lock_has"),
    "./scripts/check_docker.py": By("tests/scripts/test_check_docker.py",
        "test_a_bare_python_fetches_docker_py_once_and_answers"),
    f"{CHECK} --config h100": By("tests/repository/test_readme_commands.py",
        "docker compose run --rm validate --receipt adapters/local-try"),  # the same command, with a receipt
    f"{CHECK} --config m4": Here((0, 3)),
    f"{CHECK} --config m4 --deep": Needs("Mac"),
    ".venv/bin/python scripts/convert_data.py IN data/processed/train.jsonl": By("tests/scripts/test_convert_data.py",
        "test_it_says_what_it_recognized_changed_and_dropped_and_ends_with_the_dry_run"),
    ".venv/bin/python scripts/make_report.py adapters/RUN": By(PAGE,
        "test_the_script_writes_the_page_and_prints_its_path"),
    ".venv/bin/python scripts/make_report.py adapters/RUN adapters/OTHER": By(PAGE,
        "test_the_script_writes_the_page_and_prints_its_path"),
    ".venv/bin/python scripts/chat.py adapters/RUN": By("tests/scripts/test_chat.py",
        "test_the_whole_screen_of_a_conversation"),
    "docker compose run --rm chat adapters/RUN": By(SERVICES,
        "test_the_chat_answers_in_the_image_with_an_adapter_that_was_trained_elsewhere"),
    '.venv/bin/hf upload YOU/NAME adapters/RUN . --include README.md --include "adapter_*" --include "*token*" '
    "--include chat_template.jinja": Needs("network"),
    "cp -r /mnt/disk/RUN adapters/": By("tests/faults/test_copies.py", "shutil.copytree(copy, command.folder)"),
    '.venv/bin/hf download NAME/REPO --include "RUN/*" --local-dir adapters': Needs("network"),
    "docker compose run --rm --volume /mnt/disk:/copy train-h100 --set output.copy_to=/copy": Needs("H100"),
    "export PYTORCH_MPS_LOW_WATERMARK_RATIO=1.0 PYTORCH_MPS_HIGH_WATERMARK_RATIO=1.2": Here(),
    "export HF_TOKEN=hf_...": Here(),
    ".venv/bin/python scripts/nightly.py": By("tests/faults/test_nightly.py",
        "test_the_nightly_line_says_what_was_tried_what_was_lost_and_how_long_it_took"),
    ".venv/bin/python benchmarks/quickstart.py": Needs(IDLE),
    ".venv/bin/python benchmarks/prepare_data.py --rows 100000 --repeats 2": Needs(IDLE),
    ".venv/bin/python benchmarks/resident.py": Needs(IDLE),
    ".venv/bin/python benchmarks/startup.py --rounds 3": Needs(IDLE),
    ".venv/bin/python benchmarks/trainer_overhead.py": Needs(IDLE),
    ".venv/bin/python benchmarks/memory.py": By("tests/plan/test_memory.py", '"benchmarks" / "memory.py"'),
    ".venv/bin/python benchmarks/train_step --tiny": By("tests/benchmarks/test_train_step.py",
        "test_tiny_runs_everything_on_a_cpu_and_all_losses_agree"),
    'docker compose run --rm --volume "$PWD/benchmarks:/app/benchmarks" --entrypoint "as-owner python" train-h100 '
    "benchmarks/train_step --output benchmarks/results/NAME.json": Needs("H100"),
    'docker compose run --rm --volume "$PWD/benchmarks:/app/benchmarks" --entrypoint "as-owner python" train-h100 '
    "benchmarks/memory.py --platform h100 --output benchmarks/results/OTHER.json": Needs("H100"),
    "cat .env.example >> .env": Here(),
    "CUDA=nvcr.io/nvidia/cuda:12.1.1 docker compose build": By(IMAGE,
        "test_another_registry_is_one_variable_of_compose"),
    "CUDA=nvidia/cuda:12.2.2 docker compose build": By(IMAGE, "test_another_registry_is_one_variable_of_compose"),
    "docker compose build --build-arg http_proxy=http://HOST:PORT --build-arg https_proxy=http://HOST:PORT":
        Needs("network"),
    "docker login": Needs("network"),
    "docker buildx imagetools inspect nvidia/cuda:12.1.1-base-ubuntu22.04": Needs("network"),
    "docker compose build": By("tests/container/conftest.py", '"build"'),
    "GIT_COMMIT=$(git rev-parse HEAD) docker compose run --rm train-h100": By("tests/support/docker_project.py",
        '"GIT_COMMIT": COMMIT'),
    "docker compose --profile program down --volumes": By("tests/container/test_without_env.py",
        "docker compose --profile program down --volumes"),
    "docker compose run --rm prove": By("tests/container/test_compose.py", '("prove", PROVE)'),
    ".venv/bin/python scripts/prove.py --tiny": By("tests/scripts/test_prove.py",
        "test_tiny_makes_every_part_on_a_cpu"),
    ".venv/bin/python scripts/prove.py --table adapters/FILE.json": By("tests/scripts/test_prove.py", '"--table"'),
    "docker compose run --rm plan": By(SERVICES, "test_plan_says_in_the_image_what_the_same_command_says_natively"),
    "docker compose run --rm validate": By(SERVICES, "test_validate_without_a_gpu_finds_that_and_says_where_to_look"),
    "docker compose run --rm validate --deep": Needs("H100"),
    "docker compose run --rm validate --receipt adapters/RUN/receipt.json": By(VALIDATE,
        "test_a_receipt_that_agrees_is_0_and_that_of_another_training_is_3"),
    f"docker compose run --rm validate --receipt adapters/local-try/receipt.json {TRIED}": Here((0, 3),
        "  pass  receipt "),
    "docker compose run --rm train-h100": By(SERVICES, 'project.run("train-h100"'),
    "docker compose run --rm train-h100 --set training.num_train_epochs=1": By(SERVICES, 'project.run("train-h100"'),
    "docker compose run --rm train-h100 --set model.attn_implementation=torch_varlen": Needs("H100"),
    "docker compose run --rm demo": By(SERVICES, "test_the_demo_trains_to_an_adapter_that_belongs_to_the_caller"),
    "docker compose up tensorboard": By(SERVICES, "test_tensorboard_shows_the_runs_to_this_machine_only"),
    "docker buildx build --target flash-attn-wheel --output docker/wheels --file docker/Dockerfile .": By(IMAGE,
        "test_a_kept_wheel_is_taken_without_a_compiler_or_torch_and_can_be_handed_on"),
    "docker inspect": By(IMAGE, "inspect"),
    "docker stop": By(SERVICES, "test_docker_stop_"),
    "docker ps": By(SERVICES, '["docker", "ps"]'),
    "rsync -r docker/wheels h100:PROJECT/docker/": Needs("another machine"),
    "rsync -rR data/processed adapters/local-try/receipt.json h100:PROJECT/": Needs("another machine"),
    ".venv/bin/python -m pytest tests/data/test_tokenizer.py -k short_conversation": Here(says="1 passed"),
    "pip install uv": By("requirements/dev.in", "uv "),
    "uv sync --extra cpu": Needs("network"),
    "uv venv --python 3.11": Needs("network"),
    "uv pip install --require-hashes --requirement requirements/h100.lock": By("docker/Dockerfile", "--require-hashes"),
    ".venv/bin/python src/train.py --config h100 --set model.attn_implementation=auto": Needs("H100"),
    f"{CHECK} --config h100 --set model.attn_implementation=auto": By("tests/config/test_load.py",
        "model.attn_implementation=auto"),
    "docker save mistral-7b-qlora:h100 | ssh h100 docker load": Needs("another machine"),
    "docker pull REGISTRY/mistral-7b-qlora:TAG": Needs("network"),
    "ssh -N -L 6006:127.0.0.1:6006 h100": Needs("another machine"),
    "docker compose ps --all": By("tests/container/test_without_env.py", "docker compose ps --all"),
    "docker compose down": By("tests/container/test_without_env.py", "docker compose down"),
    "requirements/lock.sh": Needs("network"),
}  # fmt: skip


def blocks(text: str) -> list[str]:
    """The indented and the fenced blocks of a Markdown text, without their indentation."""
    fenced = re.findall(r"^```\w*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    indented = re.findall(r"(?:^    .*\n(?:\n(?=    ))?)+", without_fences(text), re.MULTILINE)
    return fenced + [re.sub(r"^    ", "", block, flags=re.MULTILINE) for block in indented]


def without_fences(text: str) -> str:
    return re.sub(r"^```.*?^```$\n?", "", text, flags=re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[str]:
    """Each line of a block that is not SHOWN, without its comment, and each code span that begins with a program.

    A span of one word is a file's name, unless it says where it is to be run from.
    """
    typed_here = [block for block in blocks(text) if not block.startswith(SHOWN)]
    lines = [line for block in typed_here for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", without_fences(text))]
    lines += [span for span in spans if re.match(rf"({PROGRAMS}|\w+=\S+ )", span) and is_typed(span)]
    return sorted({" ".join(re.sub(r"\s+#.*", "", line).split()) for line in lines})


def natively(command: str) -> str:
    """What `docker compose run --rm SERVICE ARGUMENT...` starts in its container, with .venv's Python; others as is."""
    service, _, arguments = command.removeprefix("docker compose run --rm ").partition(" ")
    if service not in SERVICE_STARTS:
        return command
    return f"{shlex.join(SERVICE_STARTS[service])} {arguments}".replace("python ", ".venv/bin/python ", 1)


def is_typed(span: str) -> bool:
    return " " in span or re.fullmatch(r"(\./scripts|scripts|requirements)/\w+\.sh", span) is not None


SERVICE_STARTS: dict[str, list[str]] = {
    name: service["entrypoint"][1:]  # after as-owner
    for name, service in yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"].items()
}
COMMANDS = sorted({command for text in TEXTS.values() for command in commands(text)})


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project, as a clone has it, with conversations in data/processed and this Python as its own."""
    folder = tmp_path_factory.mktemp("clone") / "project"
    left_out = shutil.ignore_patterns(".*", "__pycache__", "models", "adapters")
    shutil.copytree(ROOT, folder, ignore=left_out)
    shutil.copy(ROOT / ".env.example", folder)
    shutil.copy(ROOT / "data" / "sample" / "train.jsonl", folder / "data" / "processed")
    (folder / ".venv" / "bin").mkdir(parents=True)
    python = folder / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    path = folder / "adapters" / "local-try"
    path.mkdir(parents=True)
    config = load_config("h100", [f"dataset.train_file={ROOT}/data/sample/train.jsonl", *TRIED.split()[1::2]])[0]
    write_json(path / "receipt.json", receipt.make(config, Preflight(config, read_machine()).prepared))
    return folder


# The rules are complete -----------------------------------------------------------------------------------------------


def test_every_command_has_a_rule_and_every_rule_a_command() -> None:
    assert sorted(RULES) == COMMANDS


def test_what_a_rule_names_is_there() -> None:
    named = {command: rule for command, rule in RULES.items() if isinstance(rule, By)}
    missing = [
        f"{command}: {rule.text} is not in {rule.file}"
        for command, rule in named.items()
        if rule.text not in (ROOT / rule.file).read_text(encoding="utf-8")
    ]
    assert missing == []


def test_what_is_not_run_says_on_what_it_waits() -> None:
    assert {rule.hardware for rule in RULES.values() if isinstance(rule, Needs)} <= HARDWARE


def test_a_new_command_in_any_place_is_seen() -> None:
    text = "Type `docker compose up new`, or `a file`:\n\n    curl -O x   # y\n    z \\\n      --flag\n\n"
    text += "```bash\nnew\n```\n"
    assert commands(text) == ["curl -O x", "docker compose up new", "new", "z --flag"]
    assert commands("    step 0/22: eval_loss 1\n    step 1/22: x\n") == []


# They work ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [command for command, rule in RULES.items() if isinstance(rule, Here)])
def test_it_runs_as_it_is_typed(command: str, project: Path) -> None:
    rule = RULES[command]
    assert isinstance(rule, Here)
    line = ["bash", "-c", natively(command)]
    done = subprocess.run(line, cwd=project, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode in rule.codes, done.stderr
    assert "Traceback" not in done.stderr
    assert rule.says in done.stdout


def scripts() -> dict[str, set[str]]:
    """The project's own programs by the flags that commands give them."""
    found: dict[str, set[str]] = {}
    for command in map(natively, COMMANDS):
        script = re.search(r"(?:src|scripts|benchmarks|requirements)/\w+\.(?:py|sh)\b", command)
        if script:
            flags = re.findall(r" (--[a-z-]+)", command[script.end() :])
            found.setdefault(script[0], set()).update(flags)
    return found


@pytest.mark.parametrize("script", sorted(scripts()))
def test_a_program_is_there_and_knows_every_flag_that_it_is_given(script: str) -> None:
    path, flags = ROOT / script, scripts()[script]
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py" and flags:
        line = [sys.executable, str(path), "--help"]
        text = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    elif "src/train.py" in text:  # a shell script that hands its arguments on
        flags = flags - {"--set"}
    assert sorted(flag for flag in flags if flag not in text) == []


def test_every_key_that_a_setting_names_is_in_the_config() -> None:
    named = {key for text in TEXTS.values() for key in re.findall(r"--set ([\w.]+)=", text)}
    assert len(named) > 10
    assert sorted(named - {"dotted.key"} - set(keys())) == []

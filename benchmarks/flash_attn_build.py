"""Compile flash-attn's kernels for sm_90, one file at a time: wall time, CPU time and peak memory of each job.

    .venv/bin/python benchmarks/flash_attn_build.py --cuda-home /usr/local/cuda --output benchmarks/results/NAME.json

The flags are read from flash-attn's own setup.py and from the locked torch's extension builder, the headers are that
torch's. Both are fetched (0.9 GB) into --sources, or found there. The peak is that of all processes of a job together,
which is what MAX_JOBS in docker/flash_attn.sh must fit into memory. Needs nvcc (cuda_toolkit.sh fetches one) and a g++
that it accepts, but no GPU.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import re
import resource
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import urllib.request
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
from machine import describe

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ("flash_fwd_hdim128_bf16_causal_sm80.cu", "flash_bwd_hdim128_bf16_causal_sm80.cu")  # what Mistral uses
GIB = 2**30


def locked(name: str, file: str) -> tuple[str, str]:
    """Version and first sha256 of a package as a file of requirements/ has them."""
    text = (ROOT / "requirements" / file).read_text(encoding="utf-8")
    found = re.search(rf"^{name}==(\S+)[\s\\]+--hash=sha256:(\w+)", text, re.MULTILINE)
    if found is None:
        sys.exit(f"requirements/{file}: no line `{name}==VERSION --hash=sha256:...`")
    return found[1], found[2]


def fetch_flash_attn(sources: Path) -> Path:
    """The unpacked source distribution of the pinned version; its hash is looked at before it is unpacked."""
    version, sha256 = locked("flash-attn", "flash-attn.txt")
    folder = sources / f"flash_attn-{version}"
    if not folder.is_dir():
        index = urllib.request.Request(
            "https://pypi.org/simple/flash-attn/", headers={"Accept": "application/vnd.pypi.simple.v1+json"}
        )
        files = json.load(urllib.request.urlopen(index))["files"]
        archive = sources / f"{folder.name}.tar.gz"
        urllib.request.urlretrieve(next(file["url"] for file in files if file["filename"] == archive.name), archive)
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != sha256:
            sys.exit(f"{archive.name}: sha256 {found}, but requirements/flash-attn.txt has {sha256}")
        with tarfile.open(archive) as packed:
            packed.extractall(sources, filter="data")
    return folder


def fetch_torch(sources: Path) -> Path:
    """The locked torch's headers and extension builder, out of its wheel."""
    version, _ = locked("torch", "h100.lock")
    folder = sources / f"torch-{version}"
    if not folder.is_dir():
        wanted = ["--python-version", "3.11", "--platform", "manylinux_2_28_x86_64", "--only-binary", ":all:"]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *wanted, f"torch=={version}"]
        subprocess.run([*command, "--dest", str(sources)], check=True)
        with zipfile.ZipFile(next(sources.glob(f"torch-{version}-*.whl"))) as wheel:
            needed = ("torch/include/", "torch/utils/cpp_extension.py", "torch/version.py")
            wheel.extractall(folder, [name for name in wheel.namelist() if name.startswith(needed)])
    return folder / "torch"


def list_in(path: Path, name: str) -> list[str]:
    """The list of literals that a Python file gives to `name`, without running the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign) and any(isinstance(to, ast.Name) and to.id == name for to in node.targets):
            return [str(flag) for flag in ast.literal_eval(node.value)]
    sys.exit(f"{path}: no list {name}")


def nvcc_command(cuda_home: Path, flash_attn: Path, torch: Path) -> list[str]:
    """What `pip wheel` runs for each file with FLASH_ATTN_CUDA_ARCHS=90 NVCC_THREADS=1, without file and object."""
    own = [flash_attn / "csrc" / folder for folder in ("flash_attn", "flash_attn/src", "cutlass/include")]
    headers = [*own, torch / "include", torch / "include/torch/csrc/api/include", cuda_home / "include"]
    return [
        str(cuda_home / "bin" / "nvcc"),
        *(f"-I{folder}" for folder in [*headers, sysconfig.get_path("include")]),
        *list_in(torch / "utils" / "cpp_extension.py", "COMMON_NVCC_FLAGS"),
        *("--compiler-options", "-fPIC"),
        *list_in(flash_attn / "setup.py", "nvcc_flags"),
        *("-gencode", "arch=compute_90,code=sm_90", "--threads", "1"),
        *("-DTORCH_API_INCLUDE_EXTENSION_H", "-DTORCH_EXTENSION_NAME=flash_attn_2_cuda"),
    ]


def resident_gib(root: psutil.Process) -> dict[str, float]:
    """Resident memory in GiB of a process and all below it, by program."""
    sizes: Counter[str] = Counter()
    for process in [root, *root.children(recursive=True)]:
        try:
            sizes[process.name()] += process.memory_info().rss
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue  # ended between the listing and the question
    return {name: size / GIB for name, size in sizes.items()}


def watch(job: psutil.Popen) -> tuple[float, dict[str, float]]:
    """Peaks in GiB until a job ends, looked at every 0.1 s: of all its processes at once, and of each program."""
    together, programs = 0.0, dict[str, float]()
    while job.poll() is None:
        sizes = resident_gib(job)
        together = max(together, sum(sizes.values()))
        programs |= {name: max(programs.get(name, 0.0), size) for name, size in sizes.items()}
        time.sleep(0.1)
    return together, programs


def cpu_seconds() -> float:
    """Of all processes that have ended below this one."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def compile_kernel(command: list[str], kernel: Path, target: Path) -> dict[str, Any]:
    """One job, alone: seconds by the clock and of the CPU, memory in GiB, and the end of what the compiler said."""
    started, used = time.perf_counter(), cpu_seconds()
    with tempfile.TemporaryFile("w+") as said:
        job = psutil.Popen([*command, "-c", str(kernel), "-o", str(target)], stdout=said, stderr=said)
        together, programs = watch(job)
        said.seek(0)
        lines = said.read().splitlines()
    return {
        "file": kernel.name,
        "exit_code": job.returncode,
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(cpu_seconds() - used, 1),
        "peak_gib": round(together, 2),
        "peak_gib_by_program": {name: round(size, 2) for name, size in programs.items() if size >= 0.1},
        "object_mib": round(target.stat().st_size / 2**20, 2) if target.is_file() else None,
        "said": lines[-20:],
    }


def said_by(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def of_the_image() -> str:
    """Release of the CUDA toolkit in the image's first stage, as `12.1`."""
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    found = re.findall(r"^FROM nvidia/cuda:(\d+\.\d+)\.\d+-devel", dockerfile, re.MULTILINE)
    return str(found[0])


def head(cuda_home: Path, kernels: list[str]) -> dict[str, Any]:
    """Date, command, machine and versions; what else ran on the machine, since the seconds depend on it."""
    chosen = [word for kernel in kernels for word in ("--kernel", kernel)]
    result = describe(" ".join(["benchmarks/flash_attn_build.py --cuda-home CUDA_HOME", *chosen]), ())
    nvcc = re.findall(r"release .*V([\d.]+)", said_by(str(cuda_home / "bin" / "nvcc"), "--version"))[0]
    result["versions"] |= {
        "nvcc": nvcc,
        "g++": said_by("g++", "-dumpfullversion"),
        "torch": locked("torch", "h100.lock")[0],
        "flash-attn": locked("flash-attn", "flash-attn.txt")[0],
    }
    result["machine"]["memory_gib"] = round(psutil.virtual_memory().total / GIB, 1)
    result["machine"]["load_average_at_start"] = round(os.getloadavg()[0], 1)
    ran = nvcc.startswith(f"{of_the_image()}.")
    result["nvcc_of_the_image"] = f"{of_the_image()}, {'which is this' if ran else 'which was not run here'}"
    return result


def write(result: dict[str, Any], output: Path | None) -> None:
    print(json.dumps(result, indent=2))
    if output:
        output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuda-home", type=Path, required=True, help="the toolkit: has bin/nvcc and include")
    parser.add_argument(
        "--sources", type=Path, help="keep flash-attn and torch's headers there (else a temporary folder)"
    )
    parser.add_argument(
        "--kernel", action="append", help=f"a file of csrc/flash_attn/src (default: {', '.join(KERNELS)})"
    )
    parser.add_argument("--output", type=Path, help="also write the result there")
    options = parser.parse_args()
    result = head(options.cuda_home, options.kernel or []) | {"jobs": []}
    with tempfile.TemporaryDirectory(prefix="flash-attn-build-") as folder:
        sources = options.sources or Path(folder)
        sources.mkdir(parents=True, exist_ok=True)
        flash_attn, torch = fetch_flash_attn(sources), fetch_torch(sources)
        command = nvcc_command(options.cuda_home, flash_attn, torch)
        known = {str(sources): "SOURCES", str(options.cuda_home): "CUDA_HOME", sysconfig.get_path("include"): "PYTHON"}
        result["nvcc_command"] = [shortened(word, known) for word in command]
        for kernel in options.kernel or KERNELS:
            path = flash_attn / "csrc" / "flash_attn" / "src" / kernel
            result["jobs"].append(compile_kernel(command, path, Path(folder) / f"{kernel}.o"))
            write(result, options.output)  # after each: a job takes minutes


def shortened(word: str, known: dict[str, str]) -> str:
    """A word of the command with the folders of this machine by name."""
    for folder, name in known.items():
        word = word.replace(folder, name)
    return word


if __name__ == "__main__":
    main()

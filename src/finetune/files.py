"""Read and write files whole or not at all, hash them, and seal folders."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from finetune.errors import ConfigError

GIB = 2**30
SEAL = "sha256.json"
ROOT = Path(__file__).resolve().parents[2]


def shown(path: Path) -> Path:
    """`path` relative to the project's root, if that is the working directory; otherwise unchanged."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) and Path.cwd() == ROOT else path


def quoted(path: Path) -> str:
    """`path` quoted for a shell command."""
    return shlex.quote(str(shown(path)))


def write_text(path: Path, text: str) -> None:
    """Write `path` whole or not at all: to a temporary name, fsync, rename."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON document in `path`. Raises OSError, or ValueError if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError:
        raise ValueError("nested too deep") from None


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects in `path`, one per line, without a line that a kill cut short; empty if there is no file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", errors="replace") as lines:
        return [entry for entry in map(json_object, lines) if entry is not None]


def write_json_lines(path: Path, entries: Iterable[dict[str, Any]]) -> None:
    """Write one line per entry, whole or not at all."""
    write_text(path, "".join(json.dumps(entry) + "\n" for entry in entries))


def json_object(text: str | bytes) -> dict[str, Any] | None:
    """The JSON object in `text`; None if it is damaged or something else."""
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def sha256(path: Path) -> str:
    """Hex digest of a file, read in blocks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class HashedFile(io.RawIOBase):
    """A file whose bytes are hashed and counted as they are read."""

    def __init__(self, path: Path) -> None:
        self.name, self.bytes_read = str(path), 0
        self._file, self._digest = path.open("rb", buffering=0), hashlib.sha256()

    def readable(self) -> bool:
        """Always true."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` from the file; returns the number of bytes read."""
        count = self._file.readinto(buffer) or 0
        self._digest.update(memoryview(buffer)[:count])
        self.bytes_read += count
        return count

    def sha256(self) -> str:
        """Hex digest of the whole file; reads what has not been read yet."""
        rest = bytearray(2**20)
        while self.readinto(rest):
            pass
        return self._digest.hexdigest()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


def share(folder: Path) -> None:
    """Give the files in `folder` the folder's own mode, which follows the umask; safetensors writes them with 0600."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_mode & 0o666 != mode:
            path.chmod(mode)


def seal(folder: Path, facts: dict[str, Any], hashed: Mapping[str, str] = MappingProxyType({})) -> None:
    """Seal `folder`: record every file's sha256 and `facts` such as step, eval_loss and fingerprint; share it.

    `hashed` has the sha256 of files that the caller has already hashed, by name in `folder`.
    """
    share(folder)
    names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
    files = {name: hashed.get(name) or sha256(folder / name) for name in names if name != SEAL}
    content = {**facts, "files": files}
    write_json(folder / SEAL, {**content, "sha256": _digest(content)})


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_seal(folder: Path) -> dict[str, Any]:
    """The facts of a sealed folder. Raises ValueError with the reason if a file is missing, changed or new."""
    sealed = seal_facts(folder)
    for name, digest in sealed["files"].items():
        if not (folder / name).is_file():
            raise ValueError(f"{name} is missing")
        if sha256(folder / name) != digest:
            raise ValueError(f"{name} is not what was saved (sha256 differs)")
    new = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {SEAL, *sealed["files"]}
    if new:
        raise ValueError(f"{min(new)} was not there when it was saved")
    return sealed


def seal_facts(folder: Path) -> dict[str, Any]:
    """The facts in the seal, without checking the files. Raises ValueError if the seal is missing or damaged."""
    if not (folder / SEAL).is_file():
        raise ValueError(f"no {SEAL}: its save was not finished")
    try:
        content = read_json(folder / SEAL)
    except ValueError:
        content = None
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise ValueError(f"{SEAL} cannot be read")
    if content.pop("sha256", None) != _digest(content):
        raise ValueError(f"{SEAL} is not what was saved (sha256 differs)")
    return content


def resolve(path: str) -> Path:
    """A path from a config; a relative one starts at the project's root, not at the working directory."""
    try:
        return ROOT / Path(path).expanduser()
    except RuntimeError:  # ~name of an unknown user
        return ROOT / path


def nearest_folder(path: Path) -> Path:
    """`path` if it is an existing folder, else the nearest one above it."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def make_folder(folder: Path) -> None:
    """Make a folder in output.dir. Raises ConfigError if that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            why = errno.EROFS if os.statvfs(folder).f_flag & os.ST_RDONLY else errno.EACCES
            raise OSError(why, os.strerror(why))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        chown = "make it yours (sudo chown -R $(id -u) FOLDER), or " if error.errno == errno.EACCES else ""
        fix = f"{chown}set it to a writable folder"
        raise ConfigError(f"output.dir: {shown(folder)}: {error.strerror}", fix=fix) from None

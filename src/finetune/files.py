"""Files as this program names, reads and writes them: whole or not at all, hashed, and sealed as folders."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from finetune.errors import ConfigError

GIB = 2**30
SEAL = "sha256.json"
ROOT = Path(__file__).resolve().parents[2]


def shown(path: Path) -> Path:
    """`path` as it is typed in the project's root, where that is the working directory; an image has another root."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) and Path.cwd() == ROOT else path


def quoted(path: Path) -> str:
    """`path` as a command to paste takes it, whatever is in its name."""
    return shlex.quote(str(shown(path)))


def write_text(path: Path, text: str) -> None:
    """Write `path` whole or not at all: another name, fsync, rename."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)


def write_json(path: Path, content: Any) -> None:
    """`content` as readable JSON, written whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The document in `path`. Raises OSError, and ValueError where it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError:
        raise ValueError("nested too deep") from None


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects in `path`, one per line; none where it is absent, and not a line that a kill cut short."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", errors="replace") as lines:
        return [entry for entry in map(_object, lines) if entry is not None]


def write_json_lines(path: Path, entries: Iterable[dict[str, Any]]) -> None:
    """One line per entry, written whole or not at all."""
    write_text(path, "".join(json.dumps(entry) + "\n" for entry in entries))


def _object(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def sha256(path: Path) -> str:
    """Hex digest of a file, read in blocks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class HashedFile(io.RawIOBase):
    """The bytes of a file, hashed and counted as they are read."""

    def __init__(self, path: Path) -> None:
        self.name, self.bytes_read = str(path), 0
        self._file, self._digest = path.open("rb", buffering=0), hashlib.sha256()

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` from the file; how many bytes came."""
        count = self._file.readinto(buffer) or 0
        self._digest.update(memoryview(buffer)[:count])
        self.bytes_read += count
        return count

    def sha256(self) -> str:
        """Of the whole file: what nobody has read is read now."""
        rest = bytearray(2**20)
        while self.readinto(rest):
            pass
        return self._digest.hexdigest()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


def share(folder: Path) -> None:
    """Give the files in `folder` the mode that the umask gave the folder itself; safetensors writes each with 0600."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_mode & 0o666 != mode:
            path.chmod(mode)


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Mark `folder` as whole and share it: every file's sha256, and `facts` such as step, eval_loss and fingerprint."""
    share(folder)
    files = {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    files.pop(SEAL, None)
    content = {**facts, "files": files}
    write_json(folder / SEAL, {**content, "sha256": _digest(content)})


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_seal(folder: Path) -> dict[str, Any]:
    """The facts of a sealed folder. Raises ValueError with what is wrong where a file is missing, changed or new."""
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
    """What the seal says, not compared with the files. Raises ValueError where there is none, or a broken one."""
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
    """A path from a config: relative ones are from the project's root, whatever the working directory."""
    try:
        return ROOT / Path(path).expanduser()
    except RuntimeError:  # ~name of nobody on this machine
        return ROOT / path


def make_folder(folder: Path) -> None:
    """Make a folder below output.dir. Raises ConfigError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            why = errno.EROFS if os.statvfs(folder).f_flag & os.ST_RDONLY else errno.EACCES
            raise OSError(why, os.strerror(why))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        take = "make it yours (sudo chown -R $(id -u) FOLDER), or " if error.errno == errno.EACCES else ""
        fix = f"{take}set it to a folder that can be written"
        raise ConfigError(f"output.dir: {shown(folder)}: {error.strerror}", fix=fix) from None

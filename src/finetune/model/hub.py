"""Looks at the base's weights without loading them: in a folder, in the Hub's cache, or on the Hub."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

from finetune.cli import advice
from finetune.errors import CheckFailed, ConfigError
from finetune.files import read_json
from finetune.wording import first_line

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PROBE_SECONDS = 5
BLOCK, BLOCKS = 4096, 1024  # of a weights file, read to identify it
UNREADABLE = "cannot be read by this user"
GIVE_TOKEN = advice("export HF_TOKEN=hf_...", "HF_TOKEN_FILE=FILE in .env")


def endpoint() -> str:
    """Return the address of the Hub, or of the mirror in HF_ENDPOINT."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def cached_folder(name: str, revision: str | None) -> Path | None:
    """Return the folder of this revision in the Hub's cache; None if its config.json is not there."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(path).parent if isinstance(path, str) else None


def is_cached(name: str, revision: str | None) -> bool:
    """Whether the Hub's cache has this revision complete, so nothing needs to be downloaded."""
    folder = cached_folder(name, revision)
    return folder is not None and not missing_weights(folder)


def fetch_command(name: str, revision: str | None) -> str:
    """Return the command that downloads this revision into the Hub's cache."""
    return f"hf download {name} --revision {revision or 'main'} --include '*.safetensors' '*.json'"


def missing_weights(folder: Path) -> list[str]:
    """List what is wrong with a folder's weights, one line per file: missing, truncated, or only pickles."""
    files = [SINGLE]
    if (folder / INDEX).is_file():
        try:
            files = sorted(set(read_json(folder / INDEX)["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            return [f"{INDEX} cannot be read"]
    elif not (folder / SINGLE).is_file() and any(folder.glob("*.bin")):
        return [f"{SINGLE} is missing, and pickles (*.bin) are never read"]
    return [problem for name in files if (problem := _wrong(folder / name))]


def weights_digest(folder: Path) -> str:
    """Return a sha256 that identifies a folder's weights without reading 14 GB.

    It covers each safetensors file's name, size and 1,024 evenly spaced blocks of 4 KiB; other training changes nearly
    every weight.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as stream:
            for place in sorted({number * max(0, size - BLOCK) // (BLOCKS - 1) for number in range(BLOCKS)}):
                stream.seek(place)
                digest.update(stream.read(BLOCK))
    return digest.hexdigest()


def _wrong(path: Path) -> str | None:
    """Compare a safetensors file's size with what its header says: 8 bytes of length, a JSON table, the tensors."""
    if not path.is_file():
        return f"{path.name} is missing"
    if not os.access(path, os.R_OK):
        return f"{path.name} {UNREADABLE}"
    size = path.stat().st_size
    try:
        with path.open("rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
            table = json.loads(stream.read(min(header, size)))
        expected = 8 + header + max(entry["data_offsets"][1] for name, entry in table.items() if name != "__metadata__")
    except (ValueError, LookupError, TypeError, AttributeError):
        return f"{path.name} is not a safetensors file"
    return None if size == expected else f"{path.name} has {size:,} bytes, its header says {expected:,}"


def why_not_reachable(name: str, revision: str | None) -> tuple[int | None, str]:
    """Ask the Hub for this revision's config.json; return (HTTP status, the Hub's reason), where 200 means yes.

    The status is None if nothing answers within PROBE_SECONDS. Raises ConfigError for a token that cannot be read.
    """
    from huggingface_hub import get_hf_file_metadata, get_token, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        token = get_token() or False
    except OSError as error:
        found = f"the Hub's token cannot be read: {error.filename}: {error.strerror}"
        raise ConfigError(found, fix=GIVE_TOKEN) from None
    try:
        address = hf_hub_url(name, "config.json", revision=revision, endpoint=endpoint())
        get_hf_file_metadata(address, token=token, timeout=PROBE_SECONDS)
    except HfHubHTTPError as error:
        answer = error.response
        return answer.status_code, answer.headers.get("X-Error-Code") or answer.reason_phrase
    except Exception as error:  # noqa: BLE001  # each version of huggingface_hub has another HTTP client
        return None, str(error)
    return 200, "ok"


def read_for_copies(repository: str, path: str) -> bytes | None:
    """Return a file of a repository that runs are copied to; None if it is not there.

    Raises CheckFailed if the repository is public, cannot be written, or the Hub does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    api = HfApi(endpoint())
    try:
        private = api.model_info(repository, timeout=PROBE_SECONDS).private
        api.auth_check(repository, write=True)
        content = read_file(repository, path) if private else None
    except RepositoryNotFoundError:
        found = f"{repository} does not exist on the Hub, or this token cannot see it"
        raise CheckFailed(found, f"hf repos create {repository} --private, or {GIVE_TOKEN}") from None
    except Exception as error:  # noqa: BLE001  # each version of huggingface_hub has another HTTP client
        found = f"{repository} cannot be written: {first_line(error)}"
        raise CheckFailed(found, f"{GIVE_TOKEN}, of a token that may write") from None
    if not private:
        found = f"{repository} is public, and a run contains paths, sample answers and hashes of your data"
        raise CheckFailed(found, f"hf repos settings {repository} --private")
    return content


def read_file(repository: str, path: str) -> bytes | None:
    """Return a file of a model repository; None if it is not there. Raises what huggingface_hub raises."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    api = HfApi(endpoint())
    if not api.file_exists(repository, path):
        return None
    disable_progress_bars()
    with TemporaryDirectory() as folder:
        return Path(api.hf_hub_download(repository, path, local_dir=folder)).read_bytes()

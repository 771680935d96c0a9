"""The base's weights without loading them: in a folder, in the Hub's cache, or behind a question to the Hub."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.cli import advice
from finetune.errors import ConfigError

if TYPE_CHECKING:
    import ssl

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PROBE_SECONDS = 5
BLOCK, BLOCKS = 4096, 1024  # of a file of weights that are read to know it again
UNREADABLE = "may not be read by this user"
GIVE_TOKEN = advice("export HF_TOKEN=hf_...", "HF_TOKEN_FILE=FILE in .env")


def endpoint() -> str:
    """The Hub's address, or the mirror that HF_ENDPOINT names."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def cached_folder(name: str, revision: str | None) -> Path | None:
    """Where the Hub's cache holds this revision's config.json; None where it does not."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(path).parent if isinstance(path, str) else None


def is_cached(name: str, revision: str | None) -> bool:
    """Whether the Hub's cache holds this revision whole, so that nothing has to be fetched."""
    folder = cached_folder(name, revision)
    return folder is not None and not missing_weights(folder)


def fetch_command(name: str, revision: str | None) -> str:
    """What to type to bring this revision into the Hub's cache."""
    return f"hf download {name} --revision {revision or 'main'} --include '*.safetensors' '*.json'"


def missing_weights(folder: Path) -> list[str]:
    """What is wrong with a folder's weights, one line a file: absent, cut short, or only pickles."""
    files = [SINGLE]
    if (folder / INDEX).is_file():
        try:
            files = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            return [f"{INDEX} cannot be read"]
    elif not (folder / SINGLE).is_file() and any(folder.glob("*.bin")):
        return [f"{SINGLE} is missing, and pickles (*.bin) are never read"]
    return [problem for name in files if (problem := _wrong(folder / name))]


def weights_digest(folder: Path) -> str:
    """sha256 by which a folder's weights are told from others: of each safetensors file its name, size and 1,024 blocks
    of 4 KiB, evenly spaced. Another training changes a weight nearly everywhere, and 14 GB need not be read for it.
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
        wanted = 8 + header + max(entry["data_offsets"][1] for name, entry in table.items() if name != "__metadata__")
    except (ValueError, LookupError, TypeError, AttributeError):
        return f"{path.name} is not a safetensors file"
    return None if size == wanted else f"{path.name} has {size:,} bytes, its header says {wanted:,}"


def _certificates() -> ssl.SSLContext:
    """Those that the Hub's own client trusts: a Python from python.org brings none of its own on a Mac."""
    import ssl  # ssl and urllib.request are a quarter of the time of `--help`, which asks nobody

    import certifi

    return ssl.create_default_context(cafile=os.environ.get("SSL_CERT_FILE") or certifi.where())


def why_not_reachable(name: str, revision: str | None) -> tuple[int | None, str]:
    """(HTTP status, what the Hub says) when asked for this revision's config.json with this token; 200 is a yes.

    The status is None where nothing answers within PROBE_SECONDS. Raises ConfigError for a token that cannot be read.
    """
    from urllib.error import HTTPError, URLError
    from urllib.parse import quote
    from urllib.request import Request, urlopen

    from huggingface_hub import get_token

    try:
        token = get_token()
    except OSError as error:
        found = f"the Hub's token cannot be read: {error.filename}: {error.strerror}"
        raise ConfigError(found, fix=GIVE_TOKEN) from None
    address = f"{endpoint()}/{name}/resolve/{quote(revision or 'main', safe='')}/config.json"
    try:
        request = Request(address, method="HEAD")
        if token:
            request.add_unredirected_header("Authorization", f"Bearer {token}")
        with urlopen(request, timeout=PROBE_SECONDS, context=_certificates()) as answer:
            return answer.status, "ok"
    except HTTPError as error:
        return error.code, error.headers.get("X-Error-Code") or error.reason
    except (URLError, OSError, ValueError) as error:
        return None, str(getattr(error, "reason", error))


def unusable_for_copies(repository: str) -> tuple[str, str] | None:
    """What is wrong with a repository that a run is to be copied to, and what to type; None if nothing is."""
    from httpx2 import HTTPError  # of which HfHubHTTPError is one, as is a connection that fails
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    api = HfApi(endpoint())
    try:
        private = api.model_info(repository, timeout=PROBE_SECONDS).private
        api.auth_check(repository, write=True)
    except RepositoryNotFoundError:
        found = f"{repository} does not exist on the Hub, or this token cannot see it"
        return found, f"hf repos create {repository} --private, or {GIVE_TOKEN}"
    except (HTTPError, OSError) as error:
        found = f"{repository} cannot be written: {str(error).strip().splitlines()[0]}"
        return found, f"{GIVE_TOKEN}, of a token that may write"
    if not private:
        found = f"{repository} is public, and a run contains paths, sample answers and hashes of your data"
        return found, f"hf repos settings {repository} --private"
    return None

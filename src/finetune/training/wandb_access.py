"""Checks whether wandb can log online before it starts, because it would otherwise wait at a prompt."""

from __future__ import annotations

import netrc
import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

from finetune.cli import PYTHON, advice
from finetune.model.hub import PROBE_SECONDS

NO_KEY, KEY_FILE = "no WANDB_API_KEY", "WANDB_API_KEY_FILE"


def wandb_offline_reason() -> str | None:
    """Return why wandb cannot log online, or None. Does not import wandb, which would read WANDB_MODE too early."""
    from urllib.request import getproxies, proxy_bypass  # slow to import, and `--help` does not need it

    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return f"WANDB_MODE={os.environ['WANDB_MODE']}"
    try:
        _key_from_file()
    except OSError as error:
        return f"{KEY_FILE} {error.filename}: {error.strerror}"
    server = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai")
    keys = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
    if not any(os.environ.get(key) for key in keys) and not _in_netrc(server.hostname or ""):
        return NO_KEY
    proxy = None if proxy_bypass(server.hostname or "") else getproxies().get(server.scheme)
    nearest = urlsplit(proxy) if proxy else server
    try:
        port = nearest.port or (80 if nearest.scheme == "http" else 443)
        socket.create_connection((nearest.hostname, port), timeout=PROBE_SECONDS).close()
    except (OSError, ValueError) as error:
        return f"{nearest.hostname} does not answer: {error}"
    return None


def _key_from_file() -> None:
    """Set the key from the file in WANDB_API_KEY_FILE, where a container has its secrets."""
    file = os.environ.get(KEY_FILE)
    if file and not os.environ.get("WANDB_API_KEY") and (key := Path(file).read_text(encoding="utf-8").strip()):
        os.environ["WANDB_API_KEY"] = key


def _in_netrc(host: str) -> bool:
    """Whether `wandb login` has stored a key for `host`."""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def wandb_sync(run: Path | str, online: str | None = None) -> str:
    """Return the command that uploads a run folder's offline wandb runs, or the incomplete one in folder `online`.

    A Docker host has only the image's wandb.
    """
    native = str(Path(PYTHON).with_name("wandb"))
    wandb = advice(native, 'docker compose run --rm --env WANDB_API_KEY --entrypoint "as-owner wandb" demo')
    return f"{wandb} sync {f'--include-online {run}/wandb/{online}' if online else f'{run}/wandb/offline-run-*'}"

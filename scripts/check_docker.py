"""Is this Docker host able to run `docker compose run --rm train-h100`? What was found, and what to type."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from finetune import cli
from finetune.checks.docker.host import CHECKS
from finetune.checks.runner import exit_code, run, summary
from finetune.checks.show import show_result, tally
from finetune.cli import PYTHON
from finetune.machine.docker_host import DockerHost, Engine, read_docker_host
from finetune.terminal import Terminal


def main() -> None:
    options = cli.plain_parser(__doc__ or "").parse_args()
    terminal, host, results = Terminal(options.json), read_docker_host(), []
    terminal.header("check_docker: this host, for docker compose run --rm train-h100")
    for result in run(CHECKS, host, crashed="report it"):
        show_result(terminal, result)
        results.append(result)
    code = exit_code(results)
    again = f"fix the failed checks, then run: {PYTHON} scripts/check_docker.py"
    terminal.say(f"{tally(results)}; {again if code else 'next: docker compose run --rm validate'}")
    if options.json:
        cli.print_json({**summary(results, code), "environment": environment(host)})
    if code:
        raise SystemExit(code)


def environment(host: DockerHost) -> dict[str, Any]:
    """The machine, and the versions of what was asked; None where it does not answer."""
    engine = host.engine if isinstance(host.engine, Engine) else None
    versions = {"engine": engine and engine.version, "api": engine and engine.api}
    machine = dataclasses.asdict(host.machine)
    return {"machine": machine, "versions": {**versions, "compose": host.compose, "buildx": host.buildx}}


if __name__ == "__main__":
    cli.run(main)

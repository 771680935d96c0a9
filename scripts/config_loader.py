"""Print the resolved config, or one value of it: FILE overrides the base file, `--set` overrides both."""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from finetune import cli
from finetune.config import load, yaml_file
from finetune.config.suggest import unknown
from finetune.config.yaml_file import deep_merge, get_config_value, load_yaml, validate_required_fields
from finetune.errors import ConfigError
from finetune.machine.platforms import PLATFORMS

__all__ = ["deep_merge", "get_config_value", "load_yaml", "validate_required_fields"]


def value_at(tree: dict[str, Any], key: str) -> Any:
    """The value at the dotted `key`. Raises ConfigError if there is none."""
    from finetune.config.schema import keys

    absent = object()
    value = get_config_value(tree, key, absent)
    if value is absent:
        raise ConfigError(f"--get {key}: {unknown(key, keys())}")
    return value


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a config file, for editors: type and bounds of each key, and its comment in the base file.

    No key is required, since a file may leave keys out.
    """
    from finetune.config.schema import Config

    tree = Config.model_json_schema()
    names = {name: part["$ref"].rsplit("/", 1)[-1] for name, part in tree["properties"].items() if "$ref" in part}
    for part in (tree, *tree["$defs"].values()):
        del part["required"]
    for path, comment in yaml_file.comments(load.BASE_FILE).items():
        section, _, key = path.rpartition(".")
        holder = tree["$defs"][names[section]] if section else tree
        holder["properties"][key]["description"] = comment
    return tree


def readable(value: Any) -> str:
    """Sections and lists as YAML; text without quotes, for shells."""
    if isinstance(value, dict | list):
        return yaml_file.dump(value).rstrip()
    return value if isinstance(value, str) else json.dumps(value)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("file", metavar="FILE", nargs="?", help=f"a config file, or one of: {', '.join(PLATFORMS)}")
    parser.add_argument("--get", metavar="KEY", help="print one value or section, such as lora.r")
    parser.add_argument("--schema", action="store_true", help="print the JSON Schema of a config file, for editors")
    options = parser.parse_args(arguments)
    if options.schema:
        cli.print_json(json_schema())
        return
    if options.file is None:
        parser.error("the following arguments are required: FILE")
    tree = load.load_config(options.file, options.set)[0].as_dict()
    value = tree if options.get is None else value_at(tree, options.get)
    if options.json:
        cli.print_json(value)
    else:
        print(readable(value))


if __name__ == "__main__":
    cli.run(main)

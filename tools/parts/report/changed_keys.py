"""Say which keys of a run differ from the defaults, and which of them a flag changed."""

from yacs.config import CfgNode

from models import framework_options
from tools.parts.run_files import RunFiles
from utils.config.load import leaves, load_config
from utils.config.schema import declare
from utils.config.sections import method_section


def changed_keys(
    cfg: CfgNode, files: RunFiles
) -> tuple[str, list[tuple[str, object, object, bool]]]:
    """Return the recipe of a run, and (key, value, default, whether a flag set it) of its keys."""
    schema = declare(framework_options())
    defaults = dict(leaves(schema.defaults()))
    others = {name.upper() for name in framework_options()}
    others -= {method_section(cfg.MODEL.NAME), "BATCHFORMER"}
    command = files.starts[-1].get("command") if files.starts else None
    words = command if isinstance(command, list) else []
    recipe = str(words[words.index("--cfg") + 1]) if "--cfg" in words[:-1] else ""
    try:
        before = dict(leaves(load_config(schema, [recipe], [], {}))) if recipe else {}
    except ValueError:  # moved, or of another version
        recipe, before = "", {}
    rows: list[tuple[str, object, object, bool]] = []
    for key, value in leaves(cfg):
        if value != defaults.get(key) and not any(key.startswith(f"MODEL.{o}.") for o in others):
            rows.append((key, value, defaults.get(key), bool(before) and before[key] != value))
    return recipe, rows

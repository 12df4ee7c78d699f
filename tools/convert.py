"""Bring weights in and out. Nothing of a file is executed.

Example: python tools/convert.py import moco.pth --cfg configs/moco_v2_resnet50.yaml --output w.pt

inspect shows what a file holds. import reads the published files of MoCo, SynCo, MoCo v3,
BatchFormer, MoBY, SynCo-v2, BYOL and SiT, and those of torchvision, timm, Detectron2, MMDetection
and Hugging Face; it writes a file that every --pretrained takes. export writes a run's backbone, or
a file's, for another library; --to mmseg writes a run of segmentation whole.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.cli import Parser, add_which, answer_at_once, run_main

FORMATS = (
    "timm",
    "torchvision",
    "detectron2",
    "mmdet",
    "mmseg",
    "swin",
    "huggingface",
    "moco",
    "plain",
)


def _parser() -> Parser:
    parser = Parser(
        description=__doc__,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("inspect", "show what a file holds"),
        ("import", "make a file that every --pretrained takes"),
        ("export", "write a backbone for another library"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument(
            "source", type=Path, metavar="FILE", help="file of weights, or a run's folder"
        )
        if name != "inspect":
            _add_options(command, name)
    return parser


def _add_options(command: argparse.ArgumentParser, name: str) -> None:
    command.add_argument("--cfg", type=Path, metavar="FILE", help="yaml; default: the run's own")
    command.add_argument(
        "--opts", nargs="+", default=[], metavar="KEY VALUE", help="overrides of --cfg"
    )
    command.add_argument("--output", type=Path, required=True, metavar="FILE", help="what to write")
    add_which(command)
    if name == "import":
        command.add_argument("--full", action="store_true", help="target, heads and queue too")
    else:
        command.add_argument("--to", choices=FORMATS, required=True, help="layout to write")
        command.add_argument("--results", type=Path, metavar="FILE", help="for the model card")


# The command line is read before torch is, which takes seconds to import.
if __name__ == "__main__":
    answer_at_once(_parser())

import json
import pickle
from collections.abc import Mapping
from datetime import datetime
from typing import IO

import torch
from torch import Tensor
from yacs.config import CfgNode

from models import build_framework, framework_options, online_backbone
from models.weights import export
from models.weights.architecture import describe, name_of
from models.weights.find import find_network, listed, tensors_of
from models.weights.load import LoadReport, check_norm_eps, load_backbone
from models.weights.pretraining_state import framework_state
from models.weights.segmenter import segmenter_state, to_mmseg
from tools.parts.export_hints import HINTS, loading, norm_eps_note, pixels_note
from tools.parts.model_card import write_huggingface
from tools.parts.run_files import parsed_config, read_json, value_at
from utils.checkpoints import file as checkpoints
from utils.checkpoints.atomic import write_file
from utils.checkpoints.foreign import read_torch
from utils.config.load import load_config
from utils.config.schema import declare

# these build a ResNet by its sizes alone
PLAIN_RESNETS = {
    "torchvision": "torchvision",
    "detectron2": "Detectron2",
    "mmdet": "MMDetection",
    "huggingface": "transformers",
    "moco": "MoCo",
}


def main() -> int:
    """Run the asked conversion; return the exit code."""
    args = parse_args()
    commands: dict[str, Callable[[argparse.Namespace], None]] = {
        "inspect": inspect_file,
        "import": import_file,
        "export": export_file,
    }
    commands[args.command](args)
    return 0


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's arguments."""
    return _parser().parse_args(argv)


def inspect_file(args: argparse.Namespace) -> None:
    """Print what a file holds: for a checkpoint of ours its run, then networks and architecture."""
    path = _checkpoint_of(args.source)
    checkpoint = _read(args.source)
    size = path.stat().st_size if path.is_file() else 0
    written = datetime.fromtimestamp(path.stat().st_mtime)
    print(f"{path}: {size / 2**20:.1f} MiB, written {written:%Y-%m-%d %H:%M}")
    record = read_json(path.with_suffix(".json"))
    for name, value in facts_of(checkpoint, record).items():
        print(f"{name}: {value}")
    network = find_network(checkpoint, source=str(path))
    values = sum(tensor.numel() for tensor in network.state.values())
    name = name_of(network.state)
    print(f"backbone: {f'{name}, ' if name else ''}{describe(network.state)}")
    print(f"size: {len(network.state)} tensors, {values:,} values, the head included")
    choices = [f"{network.taken} (the default)", *network.others]
    print(f"networks: {', '.join(f'--which {choice}' for choice in choices)}")
    print(f"layout: {network.naming or 'our names (of timm)'}, at {network.place or 'the top'}")


def facts_of(checkpoint: Mapping[str, object], record: Mapping[str, object]) -> dict[str, str]:
    """Return what a checkpoint and its record say of its run, or what a foreign file holds."""
    step, config = checkpoint.get("step"), checkpoint.get("config")
    if not isinstance(config, str) or not isinstance(step, int):
        return {key: held for key, value in checkpoint.items() if (held := _held(value))}
    tree = parsed_config(config)
    count, batch = str(checkpoint.get("dataset")).partition(":")[0], checkpoint.get("global_batch")
    trained = f"step {step:,}"
    # the last batch of an epoch is dropped where it is not full
    if count.isdecimal() and isinstance(batch, int) and 0 < batch <= int(count):
        done, steps = step / (int(count) // batch), value_at(tree, "TRAIN.STEPS")
        of_all = f"{done:.3g} of {value_at(tree, 'TRAIN.EPOCHS')} epochs"
        if steps not in ("?", "0"):  # older checkpoints do not have the key
            of_all = f"{done:.3g} epochs of {steps} steps"
        trained = f"{of_all}, {trained}, batch {batch}"
    facts = {
        "run": f"{value_at(tree, 'NAME')}/{value_at(tree, 'TAG')}",
        "method": value_at(tree, "MODEL.NAME"),
        "data": f"{value_at(tree, 'DATA.DATASET')}, {count} images",
        "trained": trained,
    }
    # the record is amended when the evaluation comes after the checkpoint
    best = record.get("best") or checkpoint.get("best")
    if isinstance(best, dict) and best:
        facts["best"] = ", ".join(f"{name} {value:.4g}" for name, value in best.items())
    return facts


def _held(value: object) -> str:
    """Describe an entry of a foreign file; "" for a tensor, which is part of a network."""
    if tensors := tensors_of(value):
        queues = [f", {name} {tuple(t.shape)}" for name, t in tensors.items() if _is_queue(name, t)]
        return f"{len(tensors)} tensors{''.join(queues)}"
    if isinstance(value, dict):
        # what `import` left of the file that it read
        return ", ".join(f"{k} {v}" for k, v in value.items() if isinstance(v, str | float))[:70]
    return "" if hasattr(value, "shape") else _short(value)


def import_file(args: argparse.Namespace) -> None:
    """Write a foreign file as one of ours, after loading it into the configured model."""
    if args.full and args.which:
        raise ValueError(f"--which: {args.which!r} has no effect with --full; leave one out")
    cfg = _config(args)
    checkpoint = _read(args.source)
    if args.full:
        own = build_framework(cfg).state_dict()
        try:
            state = framework_state(checkpoint, own)
        except ValueError as error:
            raise ValueError(f"{args.source} {error}") from error
        said, which = "whole pretraining state", "online"
        note = f"{len(own)} tensors"
        framework = {key: state[key] for key in own}
    else:
        backbone = online_backbone(cfg).eval()
        source = str(args.source)
        network = find_network(checkpoint, args.which, source, backbone.state_dict())
        said, which = str(network), network.taken
        note = _listing(load_backbone(backbone, network.state, source, network.beside))
        framework = {
            f"online.backbone.{key}": tensor for key, tensor in backbone.state_dict().items()
        }
    origin = {"file": args.source.name, "layout": said, "which": which}
    origin["norm_eps"] = cfg.MODEL.BACKBONE.NORM_EPS
    _save({"framework": framework, "imported": origin}, args.output)
    print(f"{said}\n{note}\nwrote {args.output}: give it to any --pretrained")


def export_file(args: argparse.Namespace) -> None:
    """Write a checkpoint's backbone in another library's layout and say how to load it there."""
    _refuse_unread(args)
    source = _checkpoint_of(args.source)
    if args.to == "mmseg":
        _export_segmenter(source, args.output)
        return
    cfg = _config(args)
    checkpoint = _read(source)
    check_norm_eps(checkpoint, cfg.MODEL.BACKBONE.NORM_EPS, str(source))
    backbone = online_backbone(cfg).eval()
    network = find_network(checkpoint, args.which, str(source), backbone.state_dict())
    args.which = network.taken  # what the model card and the head go by
    print(f"{load_backbone(backbone, network.state, str(source), network.beside)} ({network})")
    own = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    if args.to in PLAIN_RESNETS:
        export.check_plain_resnet(backbone, PLAIN_RESNETS[args.to])
    if args.to == "huggingface":
        write_huggingface(args.output, backbone, cfg, checkpoint, args, source)
    elif args.to == "detectron2":
        arrays = export.to_detectron2({**own, **_moco_head(checkpoint, args.which)})
        # Detectron2 matches names by their endings if the file asks for it.
        content = {"model": arrays, "__author__": "SynCo", "matching_heuristics": True}
        _write(args.output, lambda file: pickle.dump(content, file))
    else:
        _save(_converted(args.to, own, _moco_head(checkpoint, args.which), cfg), args.output)
    print(f"wrote {args.output}; load it with {loading(args.to, cfg)}")
    print(f"pixels: {pixels_note(args.to, cfg)}")
    if cfg.MODEL.BACKBONE.NORM_EPS:
        print(f"then {norm_eps_note(cfg.MODEL.BACKBONE.NORM_EPS)}")


def _refuse_unread(args: argparse.Namespace) -> None:
    """Refuse options that `--to` does not read, since the file would be without their effect."""
    unread = {} if args.to == "huggingface" else {"--results": args.results}
    if args.to == "mmseg":
        unread |= {"--which": args.which, "--cfg": args.cfg, "--opts": args.opts}
    for flag, value in unread.items():
        if value:
            raise ValueError(f"{flag}: has no effect with --to {args.to}; leave it out")


def _export_segmenter(source: Path, output: Path) -> None:
    # no configuration is asked for: the file itself tells the network, heads included
    state = to_mmseg(segmenter_state(_read(source), str(source)))
    _save({"state_dict": state, "meta": {}}, output)
    print(f"wrote {output}; load it with {HINTS['mmseg']}")


def _converted(
    to: str, own: Mapping[str, Tensor], head: Mapping[str, Tensor], cfg: CfgNode
) -> Mapping[str, object]:
    """Return the contents of the file for a layout that is a torch file."""
    if to == "moco":
        return {"arch": cfg.MODEL.BACKBONE.NAME, "state_dict": export.to_moco(own, head)}
    if to == "mmdet":
        return {"state_dict": export.to_mmdet(own)}
    if to == "swin":
        return {"model": export.to_original_swin(own)}
    return export.to_torchvision(own) if to == "torchvision" else own


def _moco_head(checkpoint: Mapping[str, object], which: str) -> dict[str, Tensor]:
    """Return the projector of one of our MoCo checkpoints as `fc.*`; empty for other files."""
    prefix = f"{which}.projector."
    tensors = tensors_of(checkpoint.get("framework"))
    head = {key: tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    return export.moco_head({key.removeprefix(prefix): t for key, t in head.items()})


def _listing(report: LoadReport) -> str:
    lines = [f"matched: {report.matched}", f"missing: {', '.join(report.missing) or 'none'}"]
    lines.append(f"left out: {listed(report.unexpected) or 'none'}")
    return "\n".join(lines + [f"resized: {', '.join(report.resized)}"] * bool(report.resized))


def _config(args: argparse.Namespace) -> CfgNode:
    own = args.source / "config.yaml"
    if args.cfg is None and not own.is_file():
        raise ValueError("--cfg: is needed to know the backbone; give the run's yaml")
    return load_config(declare(framework_options()), [args.cfg or own], args.opts, {})


def _checkpoint_of(source: Path) -> Path:
    if not source.is_dir() or (source / "model.safetensors").is_file():
        return source
    found = checkpoints.newest_valid(source)
    if found is None:
        raise ValueError(f"{source} holds no checkpoint; name a file, or the folder of a run")
    return found.path


def _read(source: Path) -> Mapping[str, object]:
    source = _checkpoint_of(source)
    return read_torch(source / "model.safetensors" if source.is_dir() else source)


def _save(content: Mapping[str, object], path: Path) -> None:
    _write(path, lambda file: torch.save(content, file))


def _write(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
    """Write a file that is whole or not there."""
    if path.is_dir():
        raise ValueError(f"--output: {path} is a folder; name a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, fill)


def _is_queue(name: str, tensor: Tensor) -> bool:
    return "queue" in name and tensor.ndim == 2


def _short(value: object) -> str:
    if value is None or isinstance(value, (str, int, float)):
        return json.dumps(value)[:70]
    return type(value).__name__


if __name__ == "__main__":
    run_main(main)

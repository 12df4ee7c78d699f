"""Pretrain a backbone as another library's own CIFAR-10 benchmark does, for tools/reproduce.py.

Example: python -m benchmarks.studies.peer_runs lightly_moco --data-path D --output O --tag T
             --epochs 10 --cfg benchmarks/studies/recipes/backbone_resnet8.yaml

The backbone is the one that --cfg names, so the same probe judges it; recipe, views, losses and
data path are the library's, in peer_<library>.py. `random` writes random weights, `pixels` needs
the backbone timm/raw_pixels. Writes backbone.pt and, while it trains, status.json. Starts from the
beginning after a stop.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils.cli import Parser, answer_at_once, run_main

METHODS = (
    "random",
    "pixels",
    "lightly_moco",
    "lightly_byol",
    "lightly_simsiam",
    "stable_pretraining_simclr",
    "stable_pretraining_byol",
)


def _parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.studies.peer_runs", description=__doc__)
    add = parser.add_argument
    add("method", choices=METHODS, help="whose recipe")
    add("--cfg", required=True, metavar="FILE", help="configuration that names the backbone")
    add("--dataset", default="cifar10", metavar="NAME", help="a data set in memory [cifar10]")
    add("--data-path", default="", metavar="DIR", help="folder of the data set")
    add("--output", required=True, metavar="DIR", help="folder of all runs")
    add("--tag", required=True, metavar="NAME", help="name of this run")
    add("--epochs", type=float, required=True, metavar="N", help="length of the run, also 4.5")
    add("--seed", type=int, default=0, metavar="N", help="of weights and order")
    add("--device", default="cpu", metavar="NAME", help="cpu or cuda [cpu]")
    add("--opts", nargs="+", default=[], metavar="K=V", help="as of main_linear.py")
    return parser


# The command line is read before torch is, which takes seconds to import.
if __name__ == "__main__":
    answer_at_once(_parser())

import torch

from benchmarks.studies import raw_pixels  # noqa: F401  (puts its model into timm's registry)
from data.sources import open_split
from models import framework_options, online_backbone
from utils.checkpoints.atomic import write_file
from utils.config.load import load_config
from utils.config.schema import declare


def main() -> int:
    """Train, write the backbone, return the exit code."""
    args = _parser().parse_strictly(None)
    library = args.method.rpartition("_")[0]
    if library and find_spec(library) is None:
        package = library.replace("_", "-")
        raise ImportError(f"{args.method} needs {package}: pip install {package}")
    flags = {"DATA.DATASET": args.dataset, "DATA.PATH": args.data_path}
    cfg = load_config(declare(framework_options()), [args.cfg], args.opts, flags)
    torch.manual_seed(args.seed)
    backbone = online_backbone(cfg)
    folder = Path(args.output) / Path(args.cfg).stem / args.tag
    folder.mkdir(parents=True, exist_ok=True)
    if args.epochs:
        # only here: one library's file must not ask for the other
        peer = import_module(f"benchmarks.studies.peer_{library}")
        source, device = open_split(cfg.DATA, "train"), torch.device(args.device)
        peer.train(args.method, backbone, source, args.epochs, device, folder)
    write_file(folder / "backbone.pt", lambda file: torch.save(backbone.state_dict(), file))
    return 0


if __name__ == "__main__":
    run_main(main)

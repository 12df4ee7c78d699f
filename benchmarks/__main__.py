"""Measure one thing beside another in turn; print a table, then one line of JSON.

Example: python -m benchmarks --rounds 3 loss --batch 32

On a CPU times are those of one thread, so a busy neighbour changes little; on a GPU, device events.
The other side is our own plain version of the published computation.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.cli import Parser, answer_at_once, run_main

INPUT = {
    "decode": "JPEGs a second on one core: PIL, torchvision, simplejpeg, ours",
    "views": "two augmented views of a JPEG: published, ours for a device, ours on a CPU",
    "augment": "photometric operations of a batch: torch's batched ones, fused",
    "corruption": "SiT's corruption of a batch at once over a loop over its images",
    "dense": "training input and labels of segmentation: PIL and torchvision, ours",
    "index": "listing a large image folder the first and the second time",
}
TRAINING = {
    "loss": "MoCo's and SynCo's losses, forward and backward: published, ours",
    "step": "target average and optimiser; a training step of a small CNN",
    "epoch": "images a second of real epochs over those of the bare step",
    "throughput": "images a second, waiting for data and memory of each method and backbone",
    "probe": "a grid of learning rates over a single one; k-NN",
    "peers": "other libraries beside ours: the same backbone, batch, views and precision",
    "start": "from the command to the first step: ours, other libraries' scripts",
    "scale": "what grows with processes, images, the queue's length and the method",
}
COMMANDS = INPUT | TRAINING


def _parser() -> Parser:
    parser = Parser(
        prog="python -m benchmarks",
        description=__doc__,
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, after one that is not")
    parser.add_argument("--threads", type=int, default=1, help="threads of a CPU")
    commands = parser.add_subparsers(dest="command", required=True)
    chosen = next((word for word in sys.argv[1:] if word in COMMANDS), "")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name == chosen:  # the others' libraries need not be there
            _complete(name, command)
    return parser


def _complete(name: str, command: argparse.ArgumentParser) -> None:
    if name == "corruption":
        module = importlib.import_module("benchmarks.input.augment")
        module.add_corruption_arguments(command)
        command.set_defaults(run=module.run_corruption)
    else:
        room = "input" if name in INPUT else "training"
        module = importlib.import_module(f"benchmarks.{room}.{name}")
        module.add_arguments(command)
        command.set_defaults(run=module.run)


# The command line is read before torch is, which takes seconds to import.
if __name__ == "__main__":
    answer_at_once(_parser())

import torch


def main() -> int:
    """Run one benchmark; return the exit code."""
    args = _parser().parse_args()
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True  # as in a run on a GPU
    figures = {name: round(value, 3) for name, value in args.run(args).items()}
    on_gpu = args.device.startswith("cuda")
    machine = torch.cuda.get_device_name() if on_gpu else f"CPU, {args.threads} thread(s)"
    print(json.dumps({**figures, "machine": machine, "torch": torch.__version__}))
    return 0


if __name__ == "__main__":
    run_main(main)

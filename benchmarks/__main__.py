"""Measure ratios in one run: both sides interleaved, medians over rounds; the last line is JSON.

On a CPU times are thread CPU time on one thread, so a busy neighbour changes little; on a GPU,
device events. The reference side is our own plain transcription of the published computation.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

COMMANDS = {
    "decode": "one core's JPEGs a second: PIL, torchvision, simplejpeg, ours",
    "views": "two augmented views from a JPEG: the published pipeline, ours for a device, ours on a CPU",
    "augment": "photometric operations of a batch: torch's batched ones, fused",
    "loss": "MoCo's and SynCo's losses, forward and backward: published, ours",
    "step": "target average and optimiser; a training step of a small CNN",
    "epoch": "images a second of real epochs over those of the bare step",
    "probe": "a grid of learning rates over a single one; k-NN",
    "peers": "other libraries beside ours: the same backbone, batch, views and precision",
    "corruption": "SiT's corruption of a batch at once over a loop over its images",
    "index": "listing a large image folder the first and the second time",
}


def main() -> None:
    """Run one benchmark; print a table, then one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, after one that is not")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    commands = parser.add_subparsers(dest="command", required=True)
    chosen = next((word for word in sys.argv[1:] if word in COMMANDS), "")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name == chosen:  # the others' libraries need not be there
            importlib.import_module(f"benchmarks.{name}").add_arguments(command)
    args = parser.parse_args()

    import torch

    torch.set_num_threads(args.threads)
    result = importlib.import_module(f"benchmarks.{args.command}").run(args)
    where = (
        torch.cuda.get_device_name()
        if args.device.startswith("cuda")
        else f"CPU, {args.threads} thread(s)"
    )
    figures = {name: round(value, 3) for name, value in result.items()}
    print(json.dumps({**figures, "machine": where, "torch": torch.__version__}))


if __name__ == "__main__":
    main()

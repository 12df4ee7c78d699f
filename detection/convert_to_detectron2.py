"""Convert a pretrained ResNet, ours or a published one, to the file that Detectron2 reads.

Example: python detection/convert_to_detectron2.py pretrained.pt detectron2.pkl
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.cli import Parser, add_which, answer_at_once, run_main


def _parser() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "source", type=Path, help="checkpoint, of this repository or a published one"
    )
    parser.add_argument("target", type=Path, help="file to write, ending in .pkl")
    add_which(parser)
    return parser


# The command line is read before torch is, which takes seconds to import.
if __name__ == "__main__":
    answer_at_once(_parser())

import logging
import pickle

from models.weights.export import to_detectron2
from models.weights.find import find_network
from utils.checkpoints.atomic import write_file
from utils.checkpoints.foreign import read_torch
from utils.logger import setup_logger

logger = logging.getLogger("synco")


def main() -> int:
    """Read the checkpoint, rename its backbone and write the .pkl; return the exit code."""
    args = _parser().parse_strictly(None)
    setup_logger(None, True)
    convert(args.source, args.target, args.which)
    return 0


def convert(source: Path, target: Path, which: str = "") -> int:
    """Write the backbone of `source` to `target` and return the number of arrays.

    Layout of MoCo's converter: {"model": name -> array, "__author__", "matching_heuristics"}.
    Raises `ValueError` for another ending than .pkl, an unknown layout, and a backbone that is no
    ResNet.
    """
    if target.suffix != ".pkl":
        raise ValueError(
            f"{target}: Detectron2 reads this layout from a .pkl only; name the file so"
        )
    network = find_network(read_torch(source), which, str(source))
    state = network.state
    if "layer4.0.conv1.weight" not in state or "conv1.weight" not in state:
        raise ValueError(
            f"{source}: its backbone ({network}) is no ResNet of four stages; convert a ResNet"
        )
    arrays = to_detectron2(state)
    # With `matching_heuristics` Detectron2 matches names by their endings.
    content = {"model": arrays, "__author__": "MOCO", "matching_heuristics": True}
    write_file(target, lambda file: pickle.dump(content, file))
    logger.info("wrote %d arrays of %s (%s) to %s", len(arrays), source, network, target)
    return len(arrays)


if __name__ == "__main__":
    run_main(main)

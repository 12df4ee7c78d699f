"""Detection through Detectron2, the published protocol: its launcher, trainer and evaluators.

Example: python detection/train_net.py --num-gpus 8 MODEL.WEIGHTS synco.pkl --config-file
             detection/configs/detectron2/pascal_voc_R_50_C4_24k_synco.yaml

--eval-only tests MODEL.WEIGHTS. The flags are those of Detectron2, which has to be installed; this
is the one file that imports it.
"""

import sys
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

# run as a file
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.cli import run_main

INSTALL = (
    "pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'"
)


def main() -> int:
    """Register the RoI head, parse Detectron2's flags and launch; return the exit code."""
    try:
        # In functions, as all imports of Detectron2 here: --help answers without it.
        from detectron2.engine import default_argument_parser, launch
    except ImportError as error:
        if {"-h", "--help"} & set(sys.argv[1:]):
            sys.stdout.write(f"{__doc__}\nDetectron2 is not installed: {INSTALL}\n")
            return 0
        raise ImportError(
            f"train_net.py needs Detectron2 ({error}): {INSTALL}, or use "
            "detection/main_detection.py, which does not"
        ) from error
    args = default_argument_parser().parse_args()
    launch(
        train,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )
    return 0


def train(args: Any) -> Any:
    """Train, or only evaluate, on one process of a launch."""
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.engine import default_setup

    register_heads()
    cfg = get_cfg()
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    cfg.freeze()
    default_setup(cfg, args)
    trainer_class = make_trainer()
    if args.eval_only:
        model = trainer_class.build_model(cfg)
        DetectionCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(
            cfg.MODEL.WEIGHTS, resume=args.resume
        )
        return trainer_class.test(cfg, model)
    trainer = trainer_class(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def make_trainer() -> Any:
    """Return Detectron2's trainer with the evaluator that the data set's name calls for."""
    from detectron2.engine import DefaultTrainer
    from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator

    class Trainer(DefaultTrainer):
        @classmethod
        # Detectron2 calls it by this name.
        def build_evaluator(
            cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
        ) -> Any:
            if "coco" in dataset_name:
                folder = output_folder or str(Path(cfg.OUTPUT_DIR) / "inference")
                return COCOEvaluator(dataset_name, output_dir=folder)
            return PascalVOCDetectionEvaluator(dataset_name)

    return Trainer


def register_heads() -> None:
    """Add `Res5ROIHeadsExtraNorm`: Detectron2's Res5 head with one more norm after the stage.

    The norm's type is MODEL.RESNETS.NORM, its name in checkpoints `roi_heads.res5.norm`.
    """
    from detectron2.layers import get_norm
    from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads

    # The registry refuses a name that it has.
    if "Res5ROIHeadsExtraNorm" in ROI_HEADS_REGISTRY:
        return

    class Res5ROIHeadsExtraNorm(Res5ROIHeads):
        @classmethod
        def _build_res5_block(cls, cfg: CfgNode) -> Any:
            stage, channels = super()._build_res5_block(cfg)
            stage.add_module("norm", get_norm(cfg.MODEL.RESNETS.NORM, channels))
            return stage, channels

    ROI_HEADS_REGISTRY.register(Res5ROIHeadsExtraNorm)


if __name__ == "__main__":
    run_main(main)

"""Flags of the published scripts (MoCo, MoCo v3, SynCo, MoBY, SiT, BatchFormer), in our spelling.

They are answered, not accepted: the scripts disagree about what a batch size or a rate means.
"""

import os
from collections.abc import Iterator, Sequence

_START = "(use torchrun --nproc_per_node=GPUS in place of python)"
_FOUND = "(leave it out, torchrun announces it)"


def _option(key: str, value: str = "{}") -> str:
    return f"--opts MODEL.METHOD.{key} {value}, METHOD being MOCO_V2, SYNCO, MOCOV3, ..."


# {} is the value that was given; SCHEDULE and OPTIM are those of the program.
_VALUED = {
    "-a": "--backbone {}",
    "--arch": "--backbone {}",
    "--model": "--backbone {}",
    "-j": "--workers {}",
    "--num_workers": "--workers {}",
    "--num-workers": "--workers {}",
    "-b": "--batch-size {} (per process, not of all GPUs)",
    "--batch_size": "--batch-size {} (per process)",
    "--learning-rate": "--lr {}",
    "--learning_rate": "--lr {}",
    "--wd": "--weight-decay {}",
    "--data": "--data-path {}",
    "--data_location": "--data-path {}",
    "--dataset_location": "--data-path {}",
    "--data-set": "--dataset {} (in lower case; see --list datasets)",
    "--output_dir": "--output {}",
    "--save-dir": "--output {}",
    "--checkpoint-dir": "--output {}",
    "--imsize": "--img-size {}",
    "-p": "--opts LOG.PRINT_FREQ {}",
    "--print-freq": "--opts LOG.PRINT_FREQ {}",
    "--start-epoch": "--resume FILE (without it a run goes on from its newest checkpoint)",
    "--gpu": "(put CUDA_VISIBLE_DEVICES={} in front of the command)",
    "--world-size": _START,
    "--world_size": _START,
    "--dist-url": _START,
    "--dist_url": _START,
    "--dist-backend": _FOUND,
    "--rank": _FOUND,
    "--schedule": "--opts {section}SCHEDULE.NAME milestones {section}SCHEDULE.MILESTONES {}",
    "--sched": "--opts {section}SCHEDULE.NAME {}",
    "--warmup-epochs": "--opts {section}SCHEDULE.WARMUP_EPOCHS {}",
    "--min-lr": "--opts {section}OPTIM.MIN_LR {}",
    "--warmup-lr": "--opts {section}OPTIM.WARMUP_LR {}",
    "--momentum": "--opts {section}OPTIM.MOMENTUM {}",
    "--optimizer": "--opts {section}OPTIM.NAME {}",
    "--opt": "--opts {section}OPTIM.NAME {}",
    "--opt-eps": "--opts {section}OPTIM.EPS {}",
    "--clip-grad": "--opts {section}OPTIM.CLIP_GRAD {}",
    "--drop-path": "--opts MODEL.BACKBONE.DROP_PATH {}",
    "--drop-path-rate": "--opts MODEL.BACKBONE.DROP_PATH {}",
    "--crop-min": "--opts AUG.CROP_MIN {}",
    "--moco-dim": _option("OUT_DIM"),
    "--moco-mlp-dim": _option("HIDDEN_DIM"),
    "--moco-k": _option("QUEUE_SIZE"),
    "--moco-m": _option("BASE_MOMENTUM"),
    "--moco-t": _option("TEMPERATURE"),
    "--n-hard": _option("NUM_HARD"),
    "--sigma": _option("SIGMA"),
    "--delta": _option("DELTA"),
    "--eta": _option("ETA"),
    "--n1": _option("NUM_SYNTHETIC", "'[N1,N2,N3,N4,N5,N6]'"),
    "--add_bf": "--opts MODEL.BATCHFORMER.ENABLED True MODEL.BATCHFORMER.LOSS mean, sum or joint",
    "--temperature": "--opts MODEL.SIT.TEMPERATURE {}",
    "--lmbda": "--opts MODEL.SIT.RECONSTRUCTION_WEIGHT {}",
    "--drop_perc": "--opts MODEL.SIT.DROP_FRACTION {}",
    "--drop_replace": "--opts MODEL.SIT.REPLACE_FRACTION {}",
    "--drop_align": "--opts MODEL.SIT.DROP_ALIGN {}",
    "--drop_type": "--opts MODEL.SIT.DROP_TYPE {}",
    "--validate-every": "--opts HELD_OUT.EVERY_EPOCHS {}",
    "--finetune": "--pretrained {}",
}
# The six counts --n1 to --n6 of SynCo's script are one list here.
for _number in range(2, 7):
    _VALUED[f"--n{_number}"] = _VALUED["--n1"]

_SWITCHES = {
    "-e": "--eval",
    "--evaluate": "--eval",
    "--mlp": "--opts MODEL.MOCO_V2.NUM_MLP_LAYERS 2 (this is the default)",
    "--aug-plus": "--opts AUG.RECIPE moco_v2 (this is the default)",
    "--cos": "--opts {section}SCHEDULE.NAME cosine (this is the default)",
    "--moco-m-cos": _option("MOMENTUM_SCHEDULE", "cosine"),
    "--stop-grad-conv1": "--opts MODEL.BACKBONE.FREEZE_PATCH_EMBED True",
    "--multiprocessing-distributed": _START,
    "--amp": "--precision auto",
    "--enable-amp": "--precision auto",
    "--pin-mem": "(leave it out, it is always on)",
    "--repeated-aug": "--opts DATA.REPEATED_AUG 3",
}


def our_spelling(words: Sequence[str], section: str = "") -> Iterator[tuple[str, str]]:
    """Yield (what was given, our spelling) for the words that a parser did not know.

    A word that is no published flag, and no folder of data either, has the spelling "".
    `section` is that of the program in the configuration, e.g. `LINEAR.`.
    """
    rest = list(words)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        values = [value] if equals else []
        if flag in _SWITCHES:
            yield flag, _SWITCHES[flag].replace("{section}", section)
        elif flag in _VALUED:
            # --schedule takes several numbers, all others one value
            while rest and not rest[0].startswith("-") and (not values or rest[0].isdigit()):
                values.append(rest.pop(0))
            given = f"'[{','.join(values)}]'" if flag == "--schedule" else " ".join(values)
            ours = _VALUED[flag].replace("{section}", section).replace("{}", given or "VALUE")
            yield " ".join([flag, *values]), ours
        # MoCo's scripts take the folder of the data as a word without a flag.
        elif not flag.startswith("-") and (os.sep in flag or os.path.isdir(flag)):
            yield flag, f"--data-path {flag}"
        else:
            yield flag, ""

"""What a person needs to know to use exported weights: how to load them, and their pixels."""

from collections.abc import Sequence

import timm
from yacs.config import CfgNode

from data.pixels import pixels_of
from models.parts.backbones import TIMM_NAMES
from models.weights.architecture import takes_img_size

# the shapes of MoCo v3's ViTs, which are built by name here and not by timm
_TIMM_NAMES = {
    **TIMM_NAMES,
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
}
_OF_LEVELS = ("detectron2", "mmdet")  # these normalise 0 to 255
HINTS = {
    "torchvision": "torchvision's model.load_state_dict(state, strict=False): no head in the file",
    "detectron2": "MODEL.WEIGHTS, with INPUT.FORMAT RGB as in detection/configs/detectron2",
    "mmdet": "init_cfg=dict(type='Pretrained', checkpoint=FILE) of the backbone",
    "mmseg": "mmsegmentation's tools/test.py CONFIG FILE; a ViT's neck is its Feature2Pyramid",
    "swin": "the 'model' entry, as Swin's own detection and segmentation codes read it",
    "huggingface": "transformers.AutoModel.from_pretrained(FOLDER)",
    "moco": "--pretrained FILE of MoCo's and SynCo's main_lincls.py",
    "plain": "backbone.load_state_dict(torch.load(FILE, weights_only=True))",
}


def loading(to: str, cfg: CfgNode) -> str:
    """Say how a library loads the file that was written for it."""
    if to != "timm":
        return HINTS[to]
    options = cfg.MODEL.BACKBONE
    name = _timm_name(options.NAME)
    ours = options.NAME == "resnet8" or options.NAME.startswith("vit_conv")
    if ours or options.STEM != "imagenet":
        return "models.parts.backbones.build_backbone: timm has no model of this kind by name"
    extra = ", num_heads=12" if options.NAME == "vit_small" else ""
    extra += f", reg_tokens={options.NUM_TOKENS - 1}" if options.NUM_TOKENS > 1 else ""
    extra += f", patch_size={options.PATCH_SIZE}" if options.PATCH_SIZE else ""
    extra += f", in_chans={cfg.DATA.CHANNELS}" if cfg.DATA.CHANNELS != 3 else ""
    # those of timm may be made for another size than 224
    usual = cfg.DATA.IMG_SIZE == 224 and not options.NAME.startswith("timm/")
    if not usual and takes_img_size(name):
        extra += f", img_size={cfg.DATA.IMG_SIZE}"
    model = f"timm.create_model({name!r}, num_classes=0{extra})"
    return f"{model}.load_state_dict(torch.load(FILE, weights_only=True))"


def norm_eps_note(eps: float) -> str:
    """Say the layer norms' eps, which no layout holds; another one moves features by about 1e-5."""
    norms = "every layer norm but those before the MLPs"
    return f"set eps to {eps:g} in {norms}, to get the same features"


def pixels_note(to: str, cfg: CfgNode) -> str:
    """Say the mean and deviation of the pixels that the backbone expects, which no layout holds."""
    pixels = pixels_of(cfg.DATA)
    if to in _OF_LEVELS:
        mean, std = ([255 * value for value in values] for values in (pixels.mean, pixels.std))
        return f"normalise levels of 0 to 255 with {_words(mean, std)}"
    note = f"normalise pixels of 0 to 1 with {_words(pixels.mean, pixels.std)}"
    name = _timm_name(cfg.MODEL.BACKBONE.NAME)
    known = timm.get_pretrained_cfg(name) if to == "timm" and timm.is_model(name) else None
    if known and (tuple(known.mean), tuple(known.std)) != (tuple(pixels.mean), tuple(pixels.std)):
        note += f", not with {_words(known.mean, known.std)} as timm would for {name}"
    return note


def _timm_name(name: str) -> str:
    return _TIMM_NAMES.get(name, name.removeprefix("timm/"))


def _words(mean: Sequence[float], std: Sequence[float]) -> str:
    return f"mean {_numbers(mean)} and deviation {_numbers(std)}"


def _numbers(values: Sequence[float]) -> str:
    """Join numbers, equal ones as one."""
    shown = values[:1] if len(set(values)) == 1 else values
    return " ".join(f"{value:g}" for value in shown)

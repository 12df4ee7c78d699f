"""The training view of fine-tuning; apart from `recipes`, because it loads timm."""

from data.augment.base import Recipe, View
from data.augment.crops import RandomCropPad, RandomResizedCrop, Resize
from data.augment.ops import ColorJitter, HorizontalFlip, RandomErasing
from data.augment.randaugment import RandAugment
from data.augment.recipes import check_view

TINY_IMAGE = 32  # up to this size fine-tuning shifts the image and does not scale it (DeiT, SiT)


def finetune_recipe(
    img_size: int,
    *,
    crop_min: float = 0.08,
    interpolation: str = "bicubic",
    color_jitter: float = 0.0,
    rand_augment: str = "",
    erasing: float = 0.0,
) -> Recipe:
    """Return the training view of DeiT, Swin and SiT: crop, flip, colours, erasing.

    Up to 32 pixels the crop is a shift by at most 4 (`crop_min` is then not used). As in timm,
    RandAugment replaces the jitter: a ValueError where both are asked for.
    """
    if color_jitter and rand_augment:
        raise ValueError(
            f"color jitter {color_jitter} has no effect beside RandAugment {rand_augment!r}: set "
            "it to 0"
        )
    crop: View = (RandomResizedCrop(img_size, (crop_min, 1.0), interpolation=interpolation),)
    if img_size <= TINY_IMAGE:  # images of that size already are not resized
        crop = (Resize(img_size, interpolation), RandomCropPad(img_size))
    jitter = ColorJitter(color_jitter, color_jitter, color_jitter, 0.0, p=1.0)
    colour: View = (jitter,) if color_jitter else ()
    if rand_augment:
        colour = (RandAugment(rand_augment),)
    erase: View = (RandomErasing(erasing),) if erasing else ()
    view = (*crop, HorizontalFlip(), *colour, *erase)
    check_view(view)
    return (view,)

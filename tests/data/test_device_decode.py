"""JPEGs decoded on the device, here the CPU: the workers' draws and samples, their pixels to one level."""

import io
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from photos import draw_photo
from PIL import Image

import data.device_decode
from data import loader
from data.augment.base import IMAGENET_STD, Recipe
from data.augment.crops import RandomResizedCrop
from data.augment.randaugment import RandAugment
from data.augment.recipes import build_recipe
from data.decode import torch_jpegs
from data.device_decode import FileReader, check_decodable, is_plain_jpeg
from data.loader import Batch, GlobalLoader
from data.sources.base import subset
from data.sources.folder import imagefolder
from data.worker import Fetcher

pytest.importorskip("simplejpeg", reason="DATA.DECODE 'device' needs simplejpeg")

CPU = torch.device("cpu")
SMALL: Recipe = (
    (RandomResizedCrop(24),),
    (RandomResizedCrop(16, (0.5, 1.0), interpolation="bicubic"),),
)


@pytest.fixture
def mixed(image_folder: Path) -> Path:
    """Give class folders with a grey JPEG, a CMYK one, a PNG, and files of which some damage shows early."""
    first = image_folder / "train" / "c0"
    Image.fromarray(draw_photo(50, 40, 90)).convert("L").save(first / "grey.jpg")
    Image.fromarray(draw_photo(50, 40, 91)).convert("CMYK").save(first / "inks.jpg")
    Image.fromarray(draw_photo(50, 40, 92)).save(first / "plain.png")
    whole = sorted(first.glob("*.JPEG"))[0].read_bytes()
    (first / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (first / "empty.jpg").write_bytes(b"")
    return image_folder


def batches(root: Path, decode: str, recipe: Recipe = SMALL, **options: object) -> list[Batch]:
    loader = GlobalLoader(
        imagefolder(str(root), "train"),
        recipe,
        global_batch=8,
        seed=3,
        device=CPU,
        decode=decode,
        **options,
    )  # type: ignore[arg-type]
    return [batch for _, parts in loader.from_step(0, 5) for batch in parts]


def assert_same(ours: list[Batch], theirs: list[Batch], levels: float) -> None:
    unit = 255 * torch.tensor(IMAGENET_STD)[:, None, None]
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.indices, b.indices)
        assert torch.equal(a.labels, b.labels)
        for x, y in zip(a.views, b.views, strict=True):
            assert ((x - y).abs() * unit).max() <= levels + 1e-3


def test_views_are_those_of_the_workers_to_one_level(mixed: Path) -> None:
    assert_same(batches(mixed, "device"), batches(mixed, "worker"), 1.0)


def test_a_first_image_that_is_gone_is_one_bad_image(mixed: Path) -> None:
    next(iter(sorted((mixed / "train" / "c0").iterdir()))).unlink()
    (mixed / "train" / "c0" / "000.jpg").symlink_to("nowhere.jpg")
    assert "000.jpg" in imagefolder(str(mixed), "train").name(0)
    assert_same(batches(mixed, "device"), batches(mixed, "worker"), 1.0)


def test_workers_and_groups_change_nothing(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = batches(mixed, "device")
    assert_same(batches(mixed, "device", num_workers=2), expected, 0.0)
    monkeypatch.setattr("data.device_decode._PIXELS_AT_ONCE", 5000)  # two or three windows at once
    assert_same(batches(mixed, "device"), expected, 0.0)


def test_copies_of_a_sample_have_views_of_their_own(mixed: Path) -> None:
    repeated = batches(mixed, "device", repeated_aug=2)
    assert_same(repeated, batches(mixed, "worker", repeated_aug=2), 1.0)


def test_only_files_that_the_device_reads_reach_it(
    mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[bytes] = set()
    decode = data.device_decode._decode_jpegs

    def watched(files: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
        seen.update(file.numpy().tobytes() for file in files)
        return decode(files, device)

    monkeypatch.setattr("data.device_decode._decode_jpegs", watched)
    batches(mixed, "device")
    names = {path.read_bytes(): path.name for path in (mixed / "train").rglob("*.*")}
    read = {names[content] for content in seen}
    assert "grey.jpg" in read
    assert len(read) > 8
    assert not read & {"inks.jpg", "plain.png", "cut.jpg", "empty.jpg"}


def test_a_batch_that_fails_is_decoded_on_the_host_and_the_bad_image_replaced(
    mixed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    victim = sorted((mixed / "train" / "c1").glob("*.JPEG"))[0]
    content = bytearray(victim.read_bytes())
    middle = len(content) // 2
    # markers inside the picture; the end is whole
    content[middle : middle + 40] = b"\xff\xc4\x00\x04" * 10
    victim.write_bytes(content)
    assert is_plain_jpeg(bytes(content))
    ours = batches(mixed, "device")
    assert f"unreadable image replaced: {victim}" in caplog.text
    assert caplog.text.count("the device cannot decode a batch") == 1
    assert_same(ours, batches(mixed, "worker"), 1.0)


@pytest.mark.parametrize("package", ["torchcodec.decoders", "torchvision.io"])
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_exif_orientation_is_not_applied_by_any_decoder(
    tmp_path: Path, package: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one test of nvJPEG: levels differ from libjpeg's by a few, a turned image by far more."""
    pytest.importorskip(package)
    if where == "cuda" and not torch.cuda.is_available():
        pytest.skip("nvJPEG needs a CUDA device")
    monkeypatch.setattr("data.decode._TORCH_DECODERS", (package,))
    torch_jpegs.cache_clear()
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    photo = draw_photo(48, 48, 5)  # square: a turned one would have the same shape
    (tmp_path / "train" / "c0").mkdir(parents=True)
    path = tmp_path / "train" / "c0" / "a.jpg"
    Image.fromarray(photo).save(path, quality=95, exif=exif)
    host = Fetcher(imagefolder(str(tmp_path), "train"), SMALL, seed=0)
    file = FileReader(host).read(0)
    assert file.ndim == 1
    (decoded,) = data.device_decode._decode_jpegs([file], torch.device(where))
    expected = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
    largest = (decoded.cpu().int() - expected.int()).abs().max()
    assert largest == 0 if where == "cpu" else largest < 16
    torch_jpegs.cache_clear()


@pytest.mark.parametrize("error", [ImportError, OSError, RuntimeError, AttributeError])
def test_a_torchcodec_that_cannot_do_it_gives_way_to_torchvision(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build without libjpeg or nvJPEG, or for another torch, fails when it loads or decodes."""
    calls: list[str] = []

    def decode(files: list[torch.Tensor], *, mode: str, device: torch.device) -> list[torch.Tensor]:
        calls.append(f"{len(files)} {mode} {device}")
        raise error("not built with nvJPEG")

    stand_in = ModuleType("torchcodec.decoders")
    stand_in.decode_jpeg = decode  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", stand_in)
    torch_jpegs.cache_clear()
    taken = torch_jpegs(CPU)
    assert taken is not None
    assert taken.func.__module__.startswith("torchvision")
    assert calls == ["1 RGB cpu"]
    monkeypatch.setattr("data.decode._TORCH_DECODERS", ("torchcodec.decoders", "no_such_package"))
    torch_jpegs.cache_clear()
    assert torch_jpegs(CPU) is None
    with pytest.raises(RuntimeError, match="neither torchcodec nor torchvision decodes JPEGs"):
        data.device_decode._decode_jpegs([torch.zeros(3, dtype=torch.uint8)], CPU)
    torch_jpegs.cache_clear()


def test_a_subset_and_a_real_recipe(mixed: Path) -> None:
    source = subset(imagefolder(str(mixed), "train"), np.arange(1, 14, 2))
    views = {}
    for decode in ("device", "worker"):
        loader = GlobalLoader(
            source, build_recipe("moco_v2", 32), global_batch=6, seed=0, device=CPU, decode=decode
        )
        views[decode] = next(iter(loader.from_step(0, 1)))[1][0].views
    for ours, theirs in zip(views["device"], views["worker"], strict=True):
        error = ((ours - theirs) * torch.tensor(IMAGENET_STD)[:, None, None]).square().mean()
        assert -10 * error.log10() >= 44


def test_what_the_device_cannot_do_is_refused(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = imagefolder(str(mixed), "train")
    for view in (build_recipe("eval", 32)[0], (RandomResizedCrop(24), RandAugment("rand-m9"))):
        with pytest.raises(ValueError, match=r"DATA.DECODE 'device' runs views that start with"):
            check_decodable((view,), source)
    monkeypatch.setattr(type(source), "holds_files", False)
    with pytest.raises(
        ValueError, match=r"DATA.DECODE 'device' needs a data set of encoded images"
    ):
        check_decodable(SMALL, source)
    monkeypatch.setattr("data.device_decode.fast_jpeg", lambda: None)
    with pytest.raises(ValueError, match=r"needs simplejpeg: pip install simplejpeg"):
        check_decodable(SMALL, source)


def test_the_device_is_given_no_image_that_the_host_would_refuse() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48)).save(buffer, "JPEG", progressive=True)
    whole = buffer.getvalue()
    last = whole.rindex(b"\xff\xda")
    many = whole[:-2] + whole[last:-2] * 100 + whole[-2:]
    assert is_plain_jpeg(whole, 64 * 48)
    assert not is_plain_jpeg(whole, 64 * 48 - 1)
    assert not is_plain_jpeg(many)


def test_what_is_on_the_device_already_is_not_pinned() -> None:
    """Torch pins memory of the host only; the decoded images lie on the GPU."""

    class OnDevice:
        device = torch.device("cuda")

        def is_pinned(self) -> bool:
            return False

        def pin_memory(self) -> None:
            raise RuntimeError("cannot pin")

        def to(self, device: torch.device, non_blocking: bool) -> "OnDevice":
            return self

    tensor = OnDevice()
    assert loader._to(tensor, torch.device("cuda")) is tensor

"""Published files load into our backbones by their naming rules, or are refused with the reason."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models import assemble_framework
from models.parts.backbones import build_backbone
from models.parts.mocov3_vit import sincos_positions
from models.weights.find import find_network
from models.weights.load import load_backbone, load_network
from models.weights.pretraining_state import framework_state
from tests.small_models import small_swin, small_vit

State = dict[str, Tensor]


def vit(**options: Any) -> VisionTransformer:
    """Return a small ViT with random positions and norms, so that no two tensors look alike."""
    return randomised(small_vit(**options))


def swin(**options: Any) -> SwinTransformer:
    return randomised(small_swin(**options))


def randomised(model: Any) -> Any:
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape) * 0.2 + 0.5)
    return model.eval()


def same_features(first: nn.Module, second: nn.Module, size: int) -> None:
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(first(images), second(images), rtol=0, atol=1e-5)


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


def zeros(state: State) -> State:
    return {key: torch.zeros_like(value) for key, value in state.items()}


def loads(
    checkpoint: dict, original: nn.Module, fresh: nn.Module, place: str, which: str = "online"
) -> None:
    network = find_network(checkpoint, which, own=fresh.state_dict())
    assert f"{network.place}, {network.naming}".removesuffix(", ") == place
    load_backbone(fresh, network.state, "file.pth")
    assert all(
        torch.equal(value, original.state_dict()[key]) for key, value in fresh.state_dict().items()
    )


# ---- layouts and both networks of a file ---------------------------------------------------------


def pair(online: State, target: State, names: tuple[str, str], ddp: str = "module.") -> State:
    return {**prefixed(online, ddp + names[0]), **prefixed(target, ddp + names[1])}


BOTH: dict[str, Callable[[State, State], dict]] = {
    "synco pretraining": lambda a, b: {
        "framework": pair(a, b, ("online.backbone.", "target.backbone."), "")
    },
    "moco": lambda a, b: {
        "state_dict": {**pair(a, b, ("encoder_q.", "encoder_k.")), "module.queue": torch.ones(2, 4)}
    },
    "moco-v3": lambda a, b: {
        "state_dict": {
            **pair(a, b, ("base_encoder.", "momentum_encoder.")),
            # BatchFormer, spec D2
            "module.base_encoder.fc.0.encoder_layers.norm1.weight": torch.ones(3),
            "module.encoder_global.encoder_layers.norm1.weight": torch.ones(3),
        }
    },
    "moby / synco-v2": lambda a, b: {
        "model": {**pair(a, b, ("encoder.", "encoder_k."), ""), "queue1": torch.ones(2)}
    },
    "student and teacher": lambda a, b: {
        "student": {**prefixed(a, "module.backbone."), "module.head.mlp.0.weight": torch.ones(2)},
        "teacher": {**prefixed(b, "module.backbone."), "module.head.mlp.0.weight": torch.ones(2)},
        "epoch": 3,
    },
}


PLACES = {
    "synco pretraining": ("framework.online.backbone", "framework.target.backbone"),
    "moco": ("state_dict.module.encoder_q", "state_dict.module.encoder_k"),
    "moco-v3": ("state_dict.module.base_encoder", "state_dict.module.momentum_encoder"),
    "moby / synco-v2": ("model.encoder", "model.encoder_k"),
    "student and teacher": ("student.module.backbone", "teacher.module.backbone"),
}


@pytest.mark.parametrize("layout", BOTH)
@pytest.mark.parametrize("which", ["online", "target"])
def test_either_network_of_a_pair_can_be_asked_for(layout: str, which: str) -> None:
    networks = {"online": vit(), "target": vit()}
    checkpoint = BOTH[layout](*(network.state_dict() for network in networks.values()))
    loads(checkpoint, networks[which], vit(), PLACES[layout][which == "target"], which)


def test_sit_without_wrapper_and_our_fine_tuned_classifier_load() -> None:
    original = vit()
    state = original.state_dict()
    loads(
        {"student": prefixed(state, "module."), "teacher": {}},
        original,
        vit(),
        "student.module",
    )
    tuned = {**prefixed(state, "backbone."), "heads.0.0.weight": torch.zeros(5, 48)}
    loads({"framework": tuned}, original, vit(), "framework.backbone")


def student_and_teacher(*heads: str) -> dict:
    """Return a file whose student is ones and whose teacher is zeros."""
    names = ["module.backbone.cls_token", *(f"module.{head}" for head in heads)]
    return {
        "student": {name: torch.ones(1, 1, 48) for name in names},
        "teacher": {name: torch.zeros(1, 1, 48) for name in names},
        "epoch": 3,
    }


@pytest.mark.parametrize(
    ("heads", "which", "taken"),
    [
        (["head.last_layer.weight_g"], "", "teacher"),  # DINO and iBOT evaluate the teacher
        (["head.last_layer.weight_g"], "student", "student"),
        (["head.last_layer.weight_g"], "online", "student"),
        (["head.last_layer.weight_g"], "target", "teacher"),
        (["head_recons.convTrans.weight"], "", "student"),  # SiT's
        (["head_recons.convTrans.weight"], "teacher", "teacher"),
    ],
)
def test_of_a_student_and_a_teacher_one_is_taken_and_said(
    heads: list[str], which: str, taken: str
) -> None:
    network = find_network(student_and_teacher(*heads), which, own=["cls_token"])
    other = {"student": "teacher", "teacher": "student"}[taken]
    assert network.state["cls_token"].unique().tolist() == [float(taken == "student")]
    assert str(network) == (
        f"from {taken}.module.backbone; took {taken}, "
        f"the file also holds: {other} (--which {other})"
    )
    assert network.beside == tuple(heads)


def test_a_lone_teacher_is_taken_and_its_student_is_refused_by_name() -> None:
    checkpoint = {"teacher": {"backbone.cls_token": torch.ones(1)}}
    assert find_network(checkpoint, own=["cls_token"]).taken == "teacher"
    with pytest.raises(
        ValueError, match=r"--which online: a\.pth keeps no online network; use teacher$"
    ):
        find_network(checkpoint, "online", "a.pth", own=["cls_token"])


def test_our_own_files_and_moco_s_give_the_online_network_as_ever() -> None:
    for layout in ("synco pretraining", "moco", "moco-v3", "moby / synco-v2"):
        found = find_network(BOTH[layout](vit().state_dict(), vit().state_dict()))
        assert (found.taken, found.others) == ("online", ("target",))


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        (
            {"state_dict": {"conv1.weight": torch.ones(1)}},
            "this file keeps no target network; use online",
        ),
        ({"student": {"conv1.weight": torch.ones(1)}}, "no target network; use student"),
    ],
)
def test_a_target_that_is_not_there_is_refused(checkpoint: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_network(checkpoint, "target", own=["conv1.weight"])


def test_a_probe_is_called_a_probe() -> None:
    with pytest.raises(ValueError, match="a probe keeps its linear heads only"):
        find_network({"framework": {"weights.0": torch.ones(2, 2), "biases.0": torch.ones(2)}})


# ---- other names of the same tensors -------------------------------------------------------------


def merging_at_the_end(state: State) -> State:
    """Number the merging layers as Swin's own code and timm before 0.9: they close a stage."""
    return {
        re.sub(
            r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key
        ): tensor
        for key, tensor in state.items()
    }


@pytest.mark.parametrize("numbering", ["new", "old"])
def test_both_numberings_of_swins_merging_load(numbering: str) -> None:
    original = swin()
    state = original.state_dict()
    if numbering == "old":
        state = merging_at_the_end(state)
        state["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 16, 16)
        state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(
            16, 16, dtype=torch.int64
        )
        assert "layers.0.downsample.norm.weight" in state
    published = {"model": {**prefixed(state, "encoder."), **prefixed(zeros(state), "encoder_k.")}}
    suffix = ", merging at the end of stages" if numbering == "old" else ""
    loads(published, original, swin(), f"model.encoder{suffix}")


def test_sit_with_a_rotation_token_gives_the_same_contrastive_feature() -> None:
    """The published order is rotation, contrastive, patches, which a plain forward here follows."""
    source = vit(reg_tokens=1).double()
    published = {
        key: t.clone()
        for key, t in source.state_dict().items()
        if key not in ("cls_token", "reg_token")
    }
    published["rot_token"], published["contrastive_token"] = torch.randn(2, 1, 1, 48).double()
    images = torch.randn(2, 3, 32, 32).double()
    with torch.no_grad():
        tokens = [published[name].expand(2, -1, -1) for name in ("rot_token", "contrastive_token")]
        x = torch.cat([*tokens, source.patch_embed(images)], dim=1) + published["pos_embed"]
        expected = source.norm(source.blocks(x))
    heads = {
        "rot_head.weight": torch.ones(4, 48),
        "convTrans.weight": torch.ones(2),
        "rot_w": torch.ones(1),
    }
    ours = vit(reg_tokens=1).double()
    network = find_network({"model": {**published, **heads}, "epoch": 1}, own=ours.state_dict())
    assert (network.place, network.naming) == ("model", "SiT with rotation token")
    report = load_backbone(ours, network.state, "sit.pth")
    assert report.unexpected == ("convTrans.weight", "rot_head.weight", "rot_w")
    with torch.no_grad():
        features = ours.forward_features(images)
        torch.testing.assert_close(ours(images), expected[:, 1], rtol=0, atol=1e-5)
    # class token: contrastive
    torch.testing.assert_close(features[:, 0], expected[:, 1], rtol=0, atol=1e-5)
    torch.testing.assert_close(features[:, 1], expected[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(features[:, 2:], expected[:, 2:], rtol=0, atol=1e-5)


def test_moco_v3s_convolutional_stem_loads() -> None:
    original = build_backbone("vit_conv_small", img_size=32)
    state = {
        key.replace("patch_embed.stem", "patch_embed.proj"): t
        for key, t in original.state_dict().items()
    }
    published = {"state_dict": prefixed(state, "module.base_encoder.")}
    fresh = build_backbone("vit_conv_small", img_size=32)
    loads(published, original, fresh, "state_dict.module.base_encoder, MoCo v3 convolutional stem")


# ---- 12 heads and 6 ------------------------------------------------------------------------------


def vit_small(num_heads: int, fixed: bool) -> Any:
    model = vit(embed_dim=384, num_heads=num_heads, depth=1)
    if fixed:
        model.pos_embed.data = sincos_positions(4, 4, 384)
    return model


@pytest.mark.parametrize(
    ("file", "model", "message"),
    [
        ((12, True), (6, False), r"12 heads .* set MODEL\.BACKBONE\.NAME vit_small"),
        ((6, False), (12, True), r"6 heads; .* set MODEL\.BACKBONE\.NAME deit_small"),
    ],
)
def test_vit_small_with_another_number_of_heads_is_refused(
    file: tuple[int, bool], model: tuple[int, bool], message: str
) -> None:
    backbone = vit_small(*model)
    before = backbone.norm.weight.clone()
    with pytest.raises(ValueError, match=r"^a\.pth .*" + message):
        load_backbone(backbone, vit_small(*file).state_dict(), "a.pth")
    assert torch.equal(backbone.norm.weight, before)


@pytest.mark.parametrize("kind", [(12, True), (6, False)])
def test_vit_small_with_its_own_heads_loads_fine_tuned_too(kind: tuple[int, bool]) -> None:
    state = vit_small(*kind).state_dict()
    state["pos_embed"] = state["pos_embed"] + 0.1 * torch.randn_like(state["pos_embed"])
    load_backbone(vit_small(*kind), state, "a.pth")


# ---- other image sizes ---------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 2])
def test_positions_of_another_image_size_are_interpolated_and_reported(tokens: int) -> None:
    source, fresh = vit(reg_tokens=tokens - 1), vit(img_size=48, reg_tokens=tokens - 1)
    rows = torch.arange(4.0)[:, None, None].expand(4, 4, 48)  # linear in the row
    source.pos_embed.data[0, tokens:] = rows.reshape(16, 48)
    report = load_backbone(fresh, source.state_dict(), "a.pth")
    assert "resized pos_embed (4x4 to 6x6)" in str(report)
    assert torch.equal(fresh.pos_embed[0, :tokens], source.pos_embed[0, :tokens])
    grid = fresh.pos_embed[0, tokens:].unflatten(0, (6, 6))
    assert (grid[:, 0, 0].diff() > 0).all()
    torch.testing.assert_close(grid + grid.flip(0), torch.full_like(grid, 3.0))
    torch.testing.assert_close(grid[:, 0], grid[:, 5])


def test_relative_tables_of_another_window_are_interpolated() -> None:
    source, fresh = swin(), swin(window_size=8, img_size=128)
    report = load_backbone(fresh, source.state_dict(), "a.pth")
    assert len(report.resized) == 8
    table = "layers.0.blocks.0.attn.relative_position_bias_table"
    middle = fresh.state_dict()[table].unflatten(0, (15, 15))[7, 7]
    torch.testing.assert_close(middle, source.state_dict()[table].unflatten(0, (7, 7))[3, 3])


def test_positions_that_are_no_square_or_another_width_are_refused() -> None:
    state = vit().state_dict()
    for bad in (torch.zeros(1, 13, 48), torch.zeros(1, 26, 32)):
        with pytest.raises(ValueError, match=r"1 of another shape or type \(pos_embed"):
            load_backbone(vit(), {**state, "pos_embed": bad}, "a.pth")


def test_a_second_token_is_not_invented() -> None:
    with pytest.raises(ValueError, match=r"missing \(reg_token\)"):
        load_backbone(vit(reg_tokens=1), vit().state_dict(), "a.pth")


# ---- whole pretraining states --------------------------------------------------------------------

SMALL: dict[str, dict[str, Any]] = {
    "moco_v2": {"out_dim": 8, "queue_size": 32},
    "moby": {"hidden_dim": 16, "out_dim": 8, "queue_size": 32},
    "byol": {"hidden_dim": 16, "out_dim": 8},
    "mocov3": {"hidden_dim": 16, "out_dim": 8},
    "batchformer": {"hidden_dim": 16, "out_dim": 8},
}


def framework(method: str, **options: Any) -> nn.Module:
    return randomised(
        assemble_framework(method, {**SMALL[method], **options}, {"name": "resnet8"}, img_size=32)
    )


def heads(state: State, ours: str, theirs: str, rename: Callable[[str], str]) -> State:
    return {
        theirs + rename(key.removeprefix(ours)): t
        for key, t in state.items()
        if key.startswith(ours)
    }


def as_moco(state: State, transposed: bool, layers: int = 2) -> dict:
    published = {}
    for ours, theirs in (("online", "encoder_q"), ("target", "encoder_k")):
        published |= heads(state, f"{ours}.backbone.", f"{theirs}.", str)
        rename = (
            (lambda key: "fc." + key)
            if layers == 2
            else (lambda key: "fc." + key.removeprefix("0."))
        )
        published |= heads(state, f"{ours}.projector.", f"{theirs}.", rename)
    queue = state["queue.keys"]
    published |= {"queue": queue.T if transposed else queue, "queue_ptr": torch.tensor([16])}
    return {
        "epoch": 200,
        "arch": "resnet8",
        "state_dict": prefixed(published, "module."),
        "optimizer": {},
    }


def as_moby(state: State) -> dict:
    published: State = {}

    def name(key: str) -> str:
        index, rest = key.split(".", 1)
        return f"linear_out.{rest}" if index == "3" else f"linear_hidden.{int(index) + 1}.{rest}"

    for ours, theirs in (("online", ""), ("target", "_k")):
        published |= heads(state, f"{ours}.backbone.", f"encoder{theirs}.", str)
        published |= heads(state, f"{ours}.projector.", f"projector{theirs}.", name)
    published |= heads(state, "predictor.", "predictor.", name)
    for queue in ("queue1", "queue2"):
        if f"{queue}.keys" in state:
            published |= {queue: state[f"{queue}.keys"].T, "queue_ptr": torch.tensor([16])}
    return {"model": published, "epoch": 299}


def as_mocov3(state: State, batchformer: bool) -> dict:
    published: State = {}
    shift = int(batchformer)

    def name(key: str) -> str:
        index, rest = key.split(".", 1)
        return f"fc.{int(index) + shift}.{rest}"

    for ours, theirs in (("online", "base_encoder."), ("target", "momentum_encoder.")):
        published |= heads(state, f"{ours}.backbone.", theirs, str)
        published |= heads(state, f"{ours}.projector.", theirs, name)
        published |= heads(
            state, f"{ours}.batchformer.layers.0.", theirs, lambda key: "fc.0.encoder_layers." + key
        )
    published |= heads(state, "predictor.", "predictor.", str)
    if batchformer:
        published |= heads(
            state, "online.batchformer.layers.0.", "encoder_global.encoder_layers.", str
        )
    return {"state_dict": prefixed(published, "module.")}


WHOLE: dict[str, tuple[str, dict[str, Any], Callable[[State], dict]]] = {
    "moco v2": ("moco_v2", {}, lambda s: as_moco(s, transposed=True)),
    "moco v1": ("moco_v2", {"num_mlp_layers": 1}, lambda s: as_moco(s, transposed=True, layers=1)),
    "synco": ("moco_v2", {}, lambda s: as_moco(s, transposed=False)),
    "moby": ("moby", {}, as_moby),
    "byol": ("byol", {}, as_moby),
    "moco v3": ("mocov3", {}, lambda s: as_mocov3(s, batchformer=False)),
    "batchformer": ("batchformer", {}, lambda s: as_mocov3(s, batchformer=True)),
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_states_come_over_with_target_heads_and_queue(name: str) -> None:
    method, options, publish = WHOLE[name]
    original = framework(method, **options)
    for queue in ("queue", "queue1", "queue2"):
        if hasattr(original, queue):
            getattr(original, queue).position = 16
    own = original.state_dict()
    state = framework_state(publish(own), own)
    fresh = framework(method, **options)
    fresh.load_state_dict(state, strict=True)
    for key, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, own[key]), key


def test_a_whole_state_that_does_not_fit_is_refused_with_the_keys() -> None:
    own = framework("moco_v2").state_dict()
    published = as_moco(own, transposed=True)
    del published["state_dict"]["module.encoder_k.conv1.weight"]
    published["state_dict"]["module.encoder_q.fc.4.weight"] = torch.ones(1)
    message = r"1 missing \(target\.backbone\.conv1\.weight\); 1 left over \(online\.projector\.4\.weight\)"
    with pytest.raises(ValueError, match=message):
        framework_state(published, own)
    with pytest.raises(ValueError, match="no whole pretraining state of a known code"):
        framework_state({"state_dict": {"conv1.weight": torch.ones(1)}}, own)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("resnet50", "resnet18"), ("deit_tiny", "resnet18"), ("resnet18", "resnet34")],
)
def test_weights_of_another_architecture_are_named_in_few_words(theirs: str, ours: str) -> None:
    state = build_backbone(theirs, img_size=224).state_dict()
    backbone = build_backbone(ours)
    checkpoint = {"state_dict": {f"module.{key}": tensor for key, tensor in state.items()}}
    with pytest.raises(
        ValueError, match=rf"^w\.pth is a {theirs} \(.*\(--backbone\) to {theirs}$"
    ) as caught:
        load_network(backbone, checkpoint, "w.pth")
    assert len(str(caught.value)) < 240

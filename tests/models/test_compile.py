"""Compiled backbones train as plain ones do."""

import pytest
import torch
from test_methods import FAMILIES, SMALL, views

from models import assemble_framework
from utils.schedules import Progress


def gradients(compiled: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(3)
    backbone = {**FAMILIES["resnet"], "name": "resnet8"}
    framework = assemble_framework("byol", SMALL["byol"], backbone, img_size=32)
    if compiled:
        framework.compile_backbones("aot_eager")  # inductor takes minutes on a CPU
    loss = framework(views(0), Progress(0, 2, 4))["loss"]
    loss.backward()
    with torch.compiler.set_stance("force_eager"):  # an evaluation's shapes compile nothing
        framework.eval()(views(1), Progress(0, 2, 4))
    named = {name: p.grad for name, p in framework.named_parameters() if p.grad is not None}
    return loss.detach(), {
        **named,
        **{n: b for n, b in framework.named_buffers() if b.is_floating_point()},
    }


def test_graphs_are_asked_of_the_compiler_and_every_step_is_marked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    framework = assemble_framework("byol", SMALL["byol"], FAMILIES["resnet"], img_size=32)
    asked, marked = [], []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda part, **options: asked.append((part, options))
    )
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marked.append(1))
    framework.compile_backbones(cuda_graphs=True)
    assert asked == [
        (e.backbone, {"mode": "reduce-overhead"}) for e in (framework.online, framework.target)
    ]
    for step in range(2):
        framework(views(0), Progress(step, 2, 4))
    assert marked == [1, 1]


@pytest.mark.slow
def test_the_same_loss_gradients_statistics_and_names() -> None:
    (plain_loss, plain), (loss, compiled) = gradients(False), gradients(True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    torch.testing.assert_close(loss, plain_loss, rtol=1e-5, atol=1e-6)
    assert plain.keys() == compiled.keys()
    for name, value in plain.items():
        torch.testing.assert_close(
            compiled[name], value, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n} {m}"
        )


def test_sit_refuses() -> None:
    framework = assemble_framework("sit", SMALL["sit"], FAMILIES["resnet"], img_size=32)
    with pytest.raises(ValueError, match=r"TRAIN\.COMPILE"):
        framework.compile_backbones()

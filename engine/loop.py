"""The training loop: one optimiser step after another, the same for every method."""

import enum
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from engine.guards import FiniteGuard, StopFlag
from engine.plan import Plan
from engine.replay import kept_for_replay
from engine.run import Run
from engine.state import TrainState
from utils import heartbeat
from utils.batch import Batch
from utils.distributed import rank
from utils.randomness import keyed_seed
from utils.schedules import Progress

_PARTS = ("backbone", "projector", "predictor")  # whose gradients are watched

B = TypeVar("B", bound=Batch)
B_co = TypeVar("B_co", bound=Batch, covariant=True)


class Loader(Protocol[B_co]):
    """What the engine asks of a loader."""

    def from_step(self, step: int, total_steps: int) -> Iterator[tuple[int, Sequence[B_co]]]:
        """Yield (optimiser step, its micro-batches) from `step` on."""


StepFunction = Callable[[B, Progress], dict[str, Tensor]]
Evaluation = Callable[[Progress], dict[str, float]]


class Outcome(enum.Enum):
    """How a run ended; the value is the exit code."""

    DONE = 0
    PREEMPTED = 75  # EX_TEMPFAIL: start me again


def fit(
    state: TrainState,
    loader: Loader[B],
    step: StepFunction[B],
    plan: Plan,
    run: Run,
    evaluate: Evaluation | None = None,
) -> Outcome:
    """Train from `state.step` to the end of the plan, or until a stop signal.

    `evaluate` runs at the end of each epoch and of the run.
    """
    guard = FiniteGuard(scaler=state.scaler is not None)
    checkpoints = run.checkpoints
    # The flag first: the others write files, also about an error, and a signal must not end that.
    with StopFlag() as stop, run.reporting(state, plan), kept_for_replay(run, state, plan):
        first = state.step
        # A run that was killed between a checkpoint and its evaluation finishes the evaluation now.
        if evaluate is not None and first and plan.ends_epoch(first):
            known = checkpoints.known_evaluation or evaluate(plan.progress(first))
            checkpoints.evaluated(state, plan, known)
        steps = run.meter.around(loader.from_step(first, plan.total_steps), first)
        for index, micro_batches in steps:
            run.begin_step(index, first)
            watch = run.meter.shows(index + 1, plan)
            out = train_step(state, plan, guard, step, micro_batches, run.seed, watch)
            progress = plan.progress(index)
            run.meter.log(progress, out, plan)
            if checkpoints.due(state.step, plan):
                save(state, plan, run, guard)
            # After the checkpoint: an evaluation that fails costs no epoch.
            is_best = False
            if evaluate is not None and plan.ends_epoch(state.step):
                guard.flush()  # no figure of a network that the last step has spoilt
                heartbeat.beat(f"the evaluation after {state.step} steps")
                is_best = checkpoints.evaluated(state, plan, evaluate(progress.next))
            # All ranks leave at the same step: the others would wait in the next collective.
            stopping = stop.agreed()
            if (stopping or is_best) and not checkpoints.is_saved(state.step):
                save(state, plan, run, guard)
            if stopping:
                run.preempted(state.step, stop.received or "a signal to another rank")
                return Outcome.PREEMPTED
        guard.flush()
        run.done(state)
    return Outcome.DONE


def save(state: TrainState, plan: Plan, run: Run, guard: FiniteGuard) -> None:
    """Commit a checkpoint, once the gradient norm of the last step has been read."""
    heartbeat.beat(f"the checkpoint of step {state.step}")
    guard.flush()
    run.checkpoint(state, plan)


def train_step(
    state: TrainState,
    plan: Plan,
    guard: FiniteGuard,
    step: StepFunction[B],
    micro_batches: Sequence[B],
    seed: int,
    watch: bool = False,
) -> dict[str, Tensor]:
    """Make the optimiser step number `state.step`; return what is logged of it.

    `watch`: with the gradient norm of each part of the network.
    """
    progress = plan.progress(state.step)
    seed_step(seed, state.step)
    set_rates(state.optimizer, plan, state.step)
    kept = norm_statistics(cast(nn.Module, state.module)) if state.scaler else []
    out = forward_and_backward(state, micro_batches, step, progress)
    shares = gradient_shares(state) if watch else {}
    out["grad_norm"] = update(state, plan, guard, micro_batches, out["loss"])
    out |= {f"grad_norm_{part}": share * out["grad_norm"] for part, share in shares.items()}
    for statistic, before in kept:
        statistic.copy_(torch.where(torch.isfinite(out["grad_norm"]), statistic, before))
    if state.probe is not None:
        out |= state.probe.update()
    # Only now: the target averages the updated weights, and the loss has seen the old queue.
    state.module.after_step(progress)
    state.step += 1
    return out


def norm_statistics(module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Return the running statistics of all batch norms, each with a copy.

    For fp16: a forward that overflows makes them infinite, and later steps only mix into them. The
    scaler leaves such a step out, so what it did to them has to go too.
    """
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]
    return [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]


def seed_step(seed: int, step: int) -> None:
    """Key the step's draws, such as drop path and synthetic negatives, to (seed, step, rank)."""
    # So a checkpoint needs no state of a generator, and a resumed run draws the same.
    torch.manual_seed(keyed_seed("step", seed, step, rank()))


def set_rates(optimizer: torch.optim.Optimizer, plan: Plan, step: int) -> None:
    """Give each parameter group the learning rate and weight decay of `step`.

    A group's `rate` says which schedule it follows, its `lr_scale` (layer decay) how much of it.
    """
    for group in optimizer.param_groups:
        group["lr"] = plan.rates[group.get("rate", 0)].at(step) * group.get("lr_scale", 1.0)
        if plan.weight_decay_end and not group.get("exempt"):
            group["weight_decay"] = plan.weight_decay_at(step)


def forward_and_backward(
    state: TrainState, micro_batches: Sequence[B], step: StepFunction[B], progress: Progress
) -> dict[str, Tensor]:
    """Accumulate the gradient over micro-batches; return the last one's outputs and the mean loss.

    Gradients travel between processes once, with the last micro-batch.
    """
    total: Tensor | None = None
    for number, batch in enumerate(micro_batches, start=1):
        last = number == len(micro_batches)
        with nullcontext() if last else _no_sync(state.model):
            out = step(batch, progress)
            # so that the sum of the micro-batches is the mean of the batch
            loss = out["loss"] / len(micro_batches)
            (state.scaler.scale(loss) if state.scaler else loss).backward()
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None  # there is at least one micro-batch
    if isinstance(state.model, DistributedDataParallel):
        refuse_unreached(state.model.module, state.optimizer)
    return {**out, "loss": total}


def gradient_shares(state: TrainState) -> dict[str, Tensor]:
    """Return the gradient norm of backbone, projector, predictor and the rest over that of all.

    Empty where there is one part only.
    """
    grads: dict[str, list[Tensor]] = {}
    for name, parameter in state.model.named_parameters():
        if parameter.grad is not None:
            part = next((part for part in _PARTS if part in name.split(".")), "rest")
            grads.setdefault(part, []).append(parameter.grad)
    if len(grads) < 2:
        return {}
    norms = torch.stack([nn.utils.get_total_norm(part) for part in grads.values()])
    # shares: a gradient scaler has scaled all alike
    return dict(zip(grads, norms / torch.linalg.vector_norm(norms), strict=True))


def refuse_unreached(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise `RuntimeError` if a trained parameter got no gradient from any rank."""
    if all(p.grad is not None for p in _trainable(optimizer)):
        return  # nearly always; the names below take milliseconds
    named = module.named_parameters()
    without = [name for name, p in named if p.requires_grad and p.grad is None]
    if without:
        raise RuntimeError(
            f"no gradient reached {len(without)} trained parameters, e.g. {without[0]}: on several "
            "processes every parameter must take part in the loss, or be frozen"
        )


def update(
    state: TrainState,
    plan: Plan,
    guard: FiniteGuard,
    micro_batches: Sequence[Batch],
    loss: Tensor | None = None,
) -> Tensor:
    """Clip, check and apply the gradient; return its norm before clipping.

    `micro_batches` and their `loss` are for the message about a norm that is not finite.
    """
    if state.scaler:
        state.scaler.unscale_(state.optimizer)
    groups = state.clip_groups or [_trainable(state.optimizer)]
    # each group by itself: the heads of a grid must not influence each other
    norms = torch.stack([_clip(group, plan) for group in groups])
    norm = torch.linalg.vector_norm(norms) if len(norms) > 1 else norms[0]
    if state.closed_at is not None:
        diverged = ~torch.isfinite(norms) | (state.closed_at >= 0)
        norm = torch.linalg.vector_norm(norms.masked_fill(diverged, 0))
        norm = norm.where(~diverged.all(), torch.nan)  # with no group left the guard stops the run
    guard.check(norm, state.step, micro_batches, loss)
    if state.scaler:  # skips a step that overflowed and lowers the scale
        state.scaler.step(state.optimizer)
        state.scaler.update()
    else:
        if norm.device.type == "cuda":
            skip_if_not_finite(state.optimizer, norm)
        state.optimizer.step()
    if state.closed_at is not None:
        close_diverged(groups, diverged, state.closed_at, state.optimizer, state.step)
    state.optimizer.zero_grad(set_to_none=True)
    return norm


def _clip(group: Sequence[nn.Parameter], plan: Plan) -> Tensor:
    """Clip the gradients of a group, together or each by itself; return their norm before."""
    parts = [[p] for p in group if p.grad is not None] if plan.clip_per_tensor else [group]
    norms = [clip_gradient(part, plan.clip_grad) for part in parts]
    return torch.linalg.vector_norm(torch.stack(norms)) if len(norms) > 1 else norms[0]


@torch.no_grad()
def close_diverged(
    groups: Sequence[Sequence[nn.Parameter]],
    diverged: Tensor,
    closed_at: Tensor,
    optimizer: torch.optim.Optimizer,
    step: int,
) -> None:
    """Close groups after an update, so that the others train on as if they were alone.

    A group is closed if its gradient was not finite (`diverged`, (G,) bool) or its parameters are
    not finite now. It becomes zero, with its optimiser state, and stays zero. `closed_at` (G,)
    notes the step. All ranks hold the same averaged gradients and parameters, so all decide alike.
    """
    sizes = torch.stack([nn.utils.get_total_norm(group) for group in groups])
    closed = diverged | ~torch.isfinite(sizes)
    # On a GPU the masks are applied without a look, since a look would wait for the device.
    if closed.device.type == "cpu" and not closed.any():
        return
    closed_at.copy_(torch.where(closed & (closed_at < 0), step, closed_at))
    for group, mask in zip(groups, closed, strict=True):
        for parameter in group:
            parameter.masked_fill_(mask, 0)
            for value in optimizer.state[parameter].values():
                if torch.is_tensor(value) and value.ndim:
                    value.masked_fill_(mask, 0)


def skip_if_not_finite(optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
    """Let the device skip an update whose gradient norm is not finite, where the optimiser can.

    The host reads the norm a step later; until then the weights stay those of the step before.
    """
    # A gradient scaler tells fused SGD and AdamW through the same attribute.
    if any(group.get("fused") for group in optimizer.param_groups):
        optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]


def clip_gradient(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients to an L2 norm of at most `max_norm` (0: any); return the norm before."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm(grads)
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def _trainable(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _no_sync(model: nn.Module) -> AbstractContextManager[Any]:
    # DDP asks in the forward and in the backward: both have to be inside.
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()

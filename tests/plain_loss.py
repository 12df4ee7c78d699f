"""InfoNCE with synthetic negatives as the papers write it: slow, plain, for comparison."""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.parts.losses import Contrast
from models.parts.negatives import SyntheticConfig, draw_synthetics, hardest, materialise


def queue_contrast_plain(
    queries: Tensor,
    keys: Tensor,
    queue: Tensor,
    temperature: float,
    synthetics: SyntheticConfig | None = None,
) -> Contrast:
    """Compute `queue_contrast` as the papers do: concatenated logits, cross entropy, autograd."""
    keys, queue = keys.detach(), queue.detach()
    negatives = queries @ queue.T
    logits = [(queries * keys).sum(1, keepdim=True), negatives]
    if synthetics is not None:
        fixed = queries.detach()
        draws = draw_synthetics(synthetics, hardest(negatives.detach(), synthetics.num_hard), fixed)
        logits.append(torch.einsum("bd,bnd->bn", queries, materialise(draws, fixed, queue)))
    all_logits = torch.cat(logits, dim=1) / temperature
    labels = torch.zeros(len(queries), dtype=torch.long, device=queries.device)
    rank = (all_logits[:, 1:] > all_logits[:, :1]).sum(1)
    means = [all_logits[:, 0].mean(), all_logits[:, 1 : 1 + len(queue)].mean()]
    if synthetics is not None:
        means.append(all_logits.softmax(1)[:, 1 + len(queue) :].sum(1).mean())
    return Contrast(F.cross_entropy(all_logits, labels), rank, torch.stack(means).detach())

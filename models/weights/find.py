"""Find the networks of a file of weights behind any wrappers, compilers and containers.

Every tensor gets a path: the names of the entries that it lies in, then its key, joined by dots,
such as `state_dict.module.encoder_q.conv1.weight`. A network lies where the paths go on with the
backbone's own names. The part of the path before these names is its place, here
`state_dict.module.encoder_q`. The words of the place say which network it is.
"""

import re
from collections import Counter, deque
from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.weights.architecture import of_another
from models.weights.naming import to_our_names

WHICH = {"online": 0, "student": 0, "target": 1, "teacher": 1}  # 1: the averaged network

# One key of each family, for programs that do not know the backbone.
FAMILIES = (
    "layer1.0.conv1.weight",  # ResNet
    "blocks.0.attn.qkv.weight",  # ViT
    "layers.0.blocks.0.attn.qkv.weight",  # Swin
)

# torch.compile, FSDP and activation checkpointing put these words anywhere into a name.
_COMPILERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_AVERAGED = re.compile(r"(?:^|_)(?:teacher|target|momentum|ema|key|k)(?:_|$)")
# Limits for hostile files: an entry may contain itself, and a key may be a megabyte of dots.
_MAX_DEPTH, _MAX_ENTRIES, _MAX_PATH = 6, 1_000_000, 500

# First words of keys that no backbone needs: heads, decoders, queues and what masks or counts.
_HEADS = re.compile(
    r"fc|classifier|pooler|pre_logits\w*|convTrans|(?:rot|contrastive|recons)_w|queue\w*|n_averaged"
    r"|(?:\w+_)?heads?(?:_\w+)?|(?:\w+_)?(?:projector|projection|predictor|prediction)(?:_\w+)?"
    r"|decoder\w*|prototypes\w*|mask_token|masked_embed"
    r"|norm[012]"  # of the first three maps of a Swin that is part of a detector or segmenter
)
# Last words of keys of buffers that follow from the architecture, and of tokens for masked patches.
_DERIVED = re.compile(
    r"num_batches_tracked|relative_position_index|relative_coords_table|attn_mask|position_ids"
    r"|mask_token|total_ops|total_params"
)


class Network(NamedTuple):
    """One network of a file, heads included, and what else the file holds."""

    state: dict[str, Tensor]  # in our names
    place: str  # where it lies, such as state_dict.module.encoder_q; "" for the top
    naming: str  # the library whose names it had, "" for ours
    taken: str  # online, target, student or teacher
    others: tuple[str, ...]
    beside: tuple[str, ...]  # tensors in the same entry that belong to no network

    def __str__(self) -> str:
        """Return what the log says: the place, and which of several networks was taken."""
        where = f"from {self.place or 'the top'}" + (f", {self.naming}" if self.naming else "")
        if not self.others:
            return where
        also = ", ".join(f"{name} (--which {name})" for name in self.others)
        return f"{where}; took {self.taken}, the file also holds: {also}"


def find_network(
    checkpoint: Mapping[str, object],
    which: str = "",
    source: str = "this file",
    own: Collection[str] = (),
) -> Network:
    """Return one network of a loaded checkpoint in our names, heads included.

    `which` is a key of `WHICH`; empty: the network that the original evaluates. `source` is the
    file's name, for messages. `own` are the backbone's keys; without them, ResNets, ViTs and Swins
    are found, and of other files all tensors are returned. Raises `ValueError` if there is no such
    network, or if two are alike.
    """
    paths = all_paths(checkpoint)
    if not paths:
        raise ValueError(
            f"{source}: no backbone found: no tensors in the entries "
            f"{sorted(map(str, checkpoint))[:8]}; give a file of weights"
        )
    if "framework.weights.0" in paths:
        raise ValueError(
            f"{source}: no backbone found: a probe keeps its linear heads only; "
            "give the pretraining checkpoint"
        )
    namings: dict[str, str] = {}
    places = _places(paths, own)
    if not _complete(places, own):
        # Translated only now: names that fit already are never taken for another library's.
        paths, namings = to_our_names(paths)
        places = _places(paths, own)
    if own and not places:
        raise ValueError(_nothing_found(paths, own, source))
    places = places or {"": 0}  # of no known family: all tensors
    held = _by_role(paths, places, own or FAMILIES, source)
    taken = _taken(held, which, paths, source)
    place = held[taken]
    return Network(
        state={path.removeprefix(place): t for path, t in paths.items() if path.startswith(place)},
        place=place.rstrip("."),
        naming=namings.get(place, ""),
        taken=taken,
        others=tuple(word for word in held if word != taken),
        beside=_beside(paths, place, places),
    )


def tensors_of(holder: object) -> dict[str, Tensor]:
    """Return the tensors and arrays of a mapping; empty for anything else."""
    if not isinstance(holder, Mapping):
        return {}
    tensors = {str(key): _as_tensor(value) for key, value in holder.items()}
    return {key: tensor for key, tensor in tensors.items() if tensor is not None}


def all_paths(checkpoint: Mapping[str, object]) -> dict[str, Tensor]:
    """Return every tensor of a checkpoint by its path, without the words of compilers."""
    paths: dict[str, Tensor] = {}
    waiting: deque[tuple[str, int, Mapping[str, object]]] = deque([("", 0, checkpoint)])
    num_entries = 0
    while waiting:
        place, depth, holder = waiting.popleft()
        num_entries += len(holder)
        if num_entries > _MAX_ENTRIES:
            raise ValueError(f"more than {_MAX_ENTRIES:,} entries: not a file of weights")
        for key, value in holder.items():
            if not isinstance(key, str) or len(place) + len(key) > _MAX_PATH:
                continue
            path = _COMPILERS.sub("", f"{place}{key}.")
            if isinstance(value, Mapping) and depth < _MAX_DEPTH:
                waiting.append((path, depth + 1, value))
            elif (tensor := _as_tensor(value)) is not None:
                if path[:-1] in paths:
                    raise ValueError(f"two tensors are called {path[:-1]}; keep one of them")
                paths[path[:-1]] = tensor
    return paths


def not_needed(key: str) -> bool:
    """Tell whether a key's name is that of a head or of a buffer, which no backbone needs."""
    return bool(_HEADS.fullmatch(key.split(".")[0]) or _DERIVED.fullmatch(key.split(".")[-1]))


def listed(keys: Collection[str]) -> str:
    """Return the names of tensors that were left out, those of one part together, "" for none."""
    groups: Counter[str] = Counter()
    for key in sorted(keys):
        first, last = key.split(".")[0], key.split(".")[-1]
        groups[last if _DERIVED.fullmatch(last) else first] += 1
    return ", ".join(f"{name} ({n} tensors)" if n > 1 else name for name, n in groups.items())


def _as_tensor(value: object) -> Tensor | None:
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(value)
    return value if isinstance(value, Tensor) else None


def _places(paths: Mapping[str, Tensor], own: Collection[str]) -> dict[str, int]:
    """Return the places where the backbone's names begin, and how many were found at each."""
    names = set(own) or set(FAMILIES)
    found: Counter[str] = Counter()
    for path in paths:
        place, name = "", path
        while name:
            if name in names:
                found[place] += 1
            first, dot, name = name.partition(".")
            place += first + dot
    best = max(found.values(), default=0)
    if own and 2 * best < len(names):
        # Another architecture, of which a few names agree. The place with most of them is reported.
        return dict(found.most_common(1))
    # Parts of a network, such as its first block, hold few of the names. With few names to look
    # for, parts are told by their place, which lies inside another.
    good = {place: count for place, count in found.items() if 2 * count > best}
    return {
        place: count
        for place, count in good.items()
        if not any(place != outer and place.startswith(outer) for outer in good)
        and not any(_HEADS.fullmatch(word) for word in place.split("."))
    }


def _complete(places: Mapping[str, int], own: Collection[str]) -> bool:
    """Tell whether one place has all names of the backbone but those of counters."""
    needed = sum(not key.endswith("num_batches_tracked") for key in own)
    return bool(needed) and max(places.values(), default=0) >= needed


def _by_role(
    paths: Mapping[str, Tensor], places: Mapping[str, int], own: Collection[str], source: str
) -> dict[str, str]:
    """Return the place of each network, the averaged one last; ValueError if two are alike."""
    held: dict[str, str] = {}
    for averaged in (False, True):
        alike = [place for place in places if _is_averaged(place) == averaged]
        most = max((places[place] for place in alike), default=0)
        alike = [place for place in alike if places[place] == most]
        if any(not _same(paths, alike[0], place, own) for place in alike[1:]):
            raise ValueError(
                f"{source} holds several networks, at {' and '.join(alike)}; keep one in the file"
            )
        if alike:
            held[_word(alike[0], averaged)] = alike[0]
    return held


def _is_averaged(place: str) -> bool:
    return any(_AVERAGED.search(word) for word in place.split("."))


def _word(place: str, averaged: bool) -> str:
    """Return what the original calls a network."""
    words = ("target", "teacher") if averaged else ("online", "student")
    return words[words[1] in place]


def _same(paths: Mapping[str, Tensor], first: str, second: str, own: Collection[str]) -> bool:
    for key in own:
        one, other = paths.get(first + key), paths.get(second + key)
        if one is None or other is None:
            if one is not other:
                return False
        elif not torch.equal(one, other):
            return False
    return True


def _taken(held: Mapping[str, str], which: str, paths: Mapping[str, Tensor], source: str) -> str:
    """Return the word of the network that was asked for, or the one that the original evaluates."""
    if which:
        for word in held:
            if WHICH[word] == WHICH[which]:
                return word
        raise ValueError(
            f"--which {which}: {source} keeps no {which} network; use {' or '.join(held)}"
        )
    # DINO and iBOT evaluate the teacher, SiT and all others the network that was trained. SiT's
    # later code calls its networks student and teacher too, and its head `head_recons.convTrans`.
    if "teacher" in held and not any(re.search("recons|convTrans", path) for path in paths):
        return "teacher"
    return next(iter(held))


def _beside(paths: Mapping[str, Tensor], place: str, places: Collection[str]) -> tuple[str, ...]:
    """Return the names of the tensors next to a network, such as heads outside of its wrapper."""
    around = place[: place.rstrip(".").rfind(".") + 1]
    return tuple(
        path.removeprefix(around)
        for path in paths
        if path.startswith(around) and not path.startswith(tuple(places))
    )


def _nothing_found(paths: Mapping[str, Tensor], own: Collection[str], source: str) -> str:
    """Say why no network was found: only heads are there, or other names."""
    if all(any(_HEADS.fullmatch(word) for word in path.split(".")[:-1]) for path in paths):
        return f"{source} holds a head only; give the pretraining checkpoint"
    for place in _places(paths, ()):
        inside = {p.removeprefix(place): t for p, t in paths.items() if p.startswith(place)}
        if other := of_another(inside):
            return f"{source} {other}"
    return (
        f"{source} does not fit the backbone: none of its {len(paths)} tensors has a name of the "
        f"backbone's {len(own)}: the file has {some(paths)}, the backbone {some(own)}; "
        "check MODEL.BACKBONE against the file"
    )


def some(keys: Collection[str]) -> str:
    """Return the first four names."""
    return ", ".join(list(keys)[:4]) + (", ..." if len(keys) > 4 else "")

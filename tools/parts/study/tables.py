"""The page of a study: how to read it, its table, and the differences between entries."""

import math
import statistics
from collections.abc import Sequence

from tools.parts.study.study import (
    MEASURES,
    UNTRAINED,
    Claim,
    Results,
    Row,
    Study,
    measured_time,
    number,
)
from utils.config.datasets import DATASETS

_SEEDS_OF_A_VERDICT = 5
# Student's t for 95 % of the probability, by degrees of freedom: few seeds need wide intervals.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def interval(values: Sequence[float]) -> float:
    """Return half the width of the 95 % interval of the mean (Student's t); NaN of one value."""
    if len(values) < 2:
        return math.nan
    t = _T95[min(len(values) - 2, len(_T95) - 1)]
    return t * statistics.stdev(values) / math.sqrt(len(values))


def pairs(results: Results, first: str, second: str) -> list[tuple[Row, Row]]:
    """Return the rows of both entries with each seed that both have on one machine.

    Two machines may differ in precision, and a pair of them would show that too. What is not
    trained is the same on all.
    """
    one, other = results[first], results[second]
    found = [(one[seed], other[seed]) for seed in sorted(one.keys() & other.keys())]
    return [
        pair
        for pair in found
        if pair[0]["machine"] == pair[1]["machine"] or not all(map(_is_trained, pair))
    ]


def gains(results: Results, first: str, second: str, measure: str) -> list[float]:
    """Return by how much `first` is above `second` in each of their pairs."""
    found = pairs(results, first, second)
    return [number(one, measure) - number(other, measure) for one, other in found]


def _is_trained(row: Row) -> bool:
    return bool(number(row, "epochs"))


def markdown(study: Study, results: Results, tier: str, picture: str) -> str:
    """Return the page of a study: picture, what was run, the table, the differences."""
    on_gpu = tier == "gpu"
    per_epoch, memory = ("s/epoch", "GPU memory") if on_gpu else ("CPU s/epoch", "memory")
    head = ["", "seeds", "epochs", "CPU min", "wall min", per_epoch, memory, *MEASURES.values()]
    lines = [f"# {study.title}", "", f"![{study.title}]({picture})", ""]
    lines += [*_conditions(study, results, on_gpu), ""]
    lines += [*(f"* {note}" for note in study.notes), *([""] if study.notes else [])]
    lines += [_line(head), _line(["---"] * len(head))]
    for entry in study.entries:
        found = list(results[entry.name].values())
        lines.append(_line([entry.name, *_cells(found, on_gpu)]))
    lines += _below_pixels(study, results)
    lines += _differences(study, results, on_gpu) if study.differences else []
    lines += _claims(study, results) if study.claims else []
    lines += ["", *_reading(study, results, on_gpu)]
    return "\n".join(lines) + "\n"


def _all_rows(results: Results) -> list[Row]:
    return [row for found in results.values() for row in found.values()]


def _conditions(study: Study, results: Results, on_gpu: bool) -> list[str]:
    """Say how long was trained, where and when, and how to do it again."""
    rows = _all_rows(results)
    commits: dict[str, set[str]] = {}
    for row in rows:
        place = f"{row['machine']}, torch {row.get('torch', '?')}, {row.get('date', '?')}"
        commits.setdefault(place, set()).add(str(row["commit"]))
    said = [f"* {place}, commits {', '.join(sorted(commits[place]))}" for place in sorted(commits)]
    said = said or ["Nothing was run."]
    said += _moved(study, results)
    libraries = sorted({str(row["library"]) for row in rows if "library" in row})
    if libraries:
        said.append(f"* {', '.join(libraries)}")
    length, place = "training", "one GPU" if on_gpu else "one thread"
    if study.minutes:
        unit = "minutes" if on_gpu else "CPU minutes"
        length = f"{study.minutes:g} {unit} of training, unless a line says otherwise,"
    command = f"python tools/reproduce.py {study.name} --data-path D" + " --tier gpu" * on_gpu
    return [
        f"{study.dataset}; {length} on {place}; evaluation is not counted. An empty cell was not "
        "run.",
        "",
        f"`{command}` runs the entries that your machine has not run. `--work NEW --results NEW` "
        "(a new folder) runs all again, `--machine` adds to this table. "
        "[How to read the table](#how-to-read-the-table).",
        "",
        *said,
    ]


def _moved(study: Study, results: Results) -> list[str]:
    """Say which rows trained on another machine than the one whose time fixed their epochs."""
    places: dict[tuple[str, str], list[float]] = {}
    for row in _all_rows(results):
        if "length_of" in row:
            place = str(row["machine"]), str(row["length_of"])
            places.setdefault(place, []).append(number(row, "cpu_seconds") / 60)
    return [
        f"* Seeds `a + b`: b seeds trained on {here}, for as many epochs as {there} trains in the "
        "time, in float32 if the processor has no bfloat16. That took "
        f"{min(minutes):.0f} to {max(minutes):.0f} CPU minutes. Time and memory in the table are "
        f"those of {there}."
        for (here, there), minutes in sorted(places.items())
    ] + _computed(study, results)


def _computed(study: Study, results: Results) -> list[str]:
    """Say which entries the machine of the table never ran."""
    lines = []
    for entry in study.entries:
        found = list(results[entry.name].values())
        if not any("length_like" in row for row in found) or measured_time(found):
            continue
        row = next(row for row in found if "length_like" in row)
        lines.append(
            f"* {row['length_of']} never ran `{entry.name}`. How many epochs it would train was "
            f"computed: {row['machine']} measured the speed of this entry and that of "
            f"`{row['length_like']}`, of which {row['length_of']} has the epochs."
        )
    return lines


def _below_pixels(study: Study, results: Results) -> list[str]:
    """Name the trained entries that are worse than the pixels themselves."""
    means = {}
    for entry in study.entries:
        values = [number(row, study.measure) for row in results[entry.name].values()]
        if values and all(map(math.isfinite, values)):
            means[entry.name] = statistics.mean(values)
    lines = []
    for pixels in (entry.name for entry in study.entries if entry.peer == "pixels"):
        trained = [e.name for e in study.entries if e.peer not in UNTRAINED and e.name in means]
        below = [name for name in trained if means[name] < means.get(pixels, -math.inf)]
        if below:
            which = "all that was trained" if below == trained else "; ".join(below)
            lines += ["", f"Below {pixels} in {MEASURES[study.measure]}: {which}."]
    return lines


def _used(study: Study, results: Results, on_gpu: bool) -> str:
    """Say which share of the planned time the runs used."""
    clock = "wall_seconds" if on_gpu else "cpu_seconds"
    shares = []
    for entry in study.entries:
        planned = 60 * (entry.minutes or study.minutes)
        fixed = entry.peer in UNTRAINED or entry.epochs or entry.epochs_of or not planned
        for row in () if fixed else measured_time(list(results[entry.name].values())):
            shares.append(number(row, clock) / planned)
    if not shares:
        return ""
    return f"The machine is shared: {min(shares):.2f} to {max(shares):.2f} of the time was used. "


def _reading(study: Study, results: Results, on_gpu: bool) -> list[str]:
    """Say what the columns mean and how they were measured."""
    held_out = f"{study.dataset}_held_out" in DATASETS
    choice = "the test images"
    if held_out:
        choice = (
            "a tenth of the training images, by the same probe trained on the others (`--dataset "
            f"{study.dataset}_held_out`)"
        )
    lines = [
        "**k-NN 20**: accuracy (%) on the test images by the vote of the 20 nearest training "
        "images, all with labels (cosine, weights exp(similarity / 0.07)).",
        "**linear**: one linear layer on frozen features of images that are not augmented. Its "
        f"rate is chosen from `LINEAR.LRS` of the recipe on {choice}.",
        "**linear, 10 %** and **1 %**: the same with so many of the labels, drawn for each seed. "
        "Their rate is chosen on the same images, so with more labels than the probe learns from.",
        "**±**: mean over the seeds and standard deviation. Bars in the picture: 95 % interval of "
        "the mean; a hollow point is one seed.",
        "**epochs**: we measure the speed first, and compute from it how many epochs the time "
        f"holds. {_used(study, results, on_gpu)}Most seeds of an entry share one measured speed, "
        "so ± and intervals do not contain its error.",
        "**wall min**: minutes by the clock; other jobs shared the machine.",
        "**commit**: the code that trained. A + means that some of its files were changed. Which "
        "ones is not known.",
    ]
    if not on_gpu:
        lines.append("**CPU s/epoch**: with the start of the program.")
    return ["## How to read the table", "", *(f"* {line}" for line in lines)]


def _differences(study: Study, results: Results, on_gpu: bool) -> list[str]:
    clock, name = ("wall_seconds", "time") if on_gpu else ("cpu_seconds", "CPU time")
    lines = [
        "",
        "Difference of two rows of the same seed and machine (what is not trained may be of "
        "another machine), with its 95 % interval over seeds. "
        f"{MEASURES[study.measure]} is the measure that decides; it is bold where 0 lies outside "
        f"the interval. **{name}**: that of the first row divided by that of the second, mean of "
        "the pairs (lowest to highest); 1.00 is equal time.",
        "",
        _line(["", "seeds", name, *MEASURES.values()]),
        _line(["---"] * (3 + len(MEASURES))),
    ]
    for first, second in study.differences:
        found = {measure: gains(results, first, second, measure) for measure in MEASURES}
        cells = [_gain(values, bold=key == study.measure) for key, values in found.items()]
        count = str(len(found[study.measure]))
        ratio = _ratio(pairs(results, first, second), clock)
        lines.append(_line([f"{first} - {second}", count, ratio, *cells]))
    return lines + _unpaired(study, results)


def _unpaired(study: Study, results: Results) -> list[str]:
    """Name the seeds that both entries of a difference have, but not on one machine."""
    lines = []
    for first, second in study.differences:
        paired = {one["seed"] for one, _ in pairs(results, first, second)}
        seeds = sorted((results[first].keys() & results[second].keys()) - paired)
        if seeds:
            named = ", ".join(map(str, seeds))
            lines.append(f"* {first} - {second}: no pair, trained on two machines: seed {named}.")
    return ["", *lines] if lines else []


def _ratio(found: Sequence[tuple[Row, Row]], clock: str) -> str:
    """Return by how much longer the first rows trained, or "" where a row is not trained."""
    if not found or not all(_is_trained(row) for pair in found for row in pair):
        return ""
    ratios = [number(one, clock) / number(other, clock) for one, other in found]
    mean, low, high = (
        f"{value:.2f}" for value in (statistics.mean(ratios), min(ratios), max(ratios))
    )
    return mean if low == high else f"{mean} ({low} to {high})"


def _claims(study: Study, results: Results) -> list[str]:
    lines = [
        "",
        "What is published, with larger networks and more data, and whether these rows agree. "
        "`refuted here` speaks of this network, these images and these epochs, not of the "
        "published number. The measure is that of the publication. A verdict needs "
        f"{_SEEDS_OF_A_VERDICT} seeds.",
        "",
        _line(["published", "gain", "here", "seeds", "verdict"]),
        _line(["---"] * 5),
    ]
    for claim in study.claims:
        found = gains(results, claim.first, claim.second, claim.measure)
        said = f"{claim.first} - {claim.second}, {MEASURES[claim.measure]}: {claim.source}"
        gain = _gain(found, bold=False)
        lines.append(
            _line([said, f"{claim.gain:+.1f}", gain, str(len(found)), verdict(claim, found)])
        )
    return lines


def verdict(claim: Claim, found: Sequence[float]) -> str:
    """Say what the gains of several seeds mean for a published one, by their 95 % interval."""
    if len(found) < _SEEDS_OF_A_VERDICT:
        return "open: too few seeds"
    mean, half = statistics.mean(found), interval(found)
    is_possible = abs(mean - claim.gain) <= half
    if abs(mean) <= half:
        if is_possible:
            return f"open: the interval holds 0 and {claim.gain:+.1f}"
        return f"refuted here: the interval holds 0, not {claim.gain:+.1f}"
    if mean * claim.gain < 0:
        return "refuted here: the difference is the other way round"
    if is_possible:
        return "confirmed here"
    return f"confirmed here in its direction; {claim.gain:+.1f} lies outside the interval"


def _cells(found: Sequence[Row], on_gpu: bool) -> list[str]:
    if not found:
        return ["", "", "", "", "", "", *("" for _ in MEASURES)]
    epochs = statistics.mean(number(row, "epochs") for row in found)
    moved = len(found) - len(measured_time(found))
    seeds = f"{len(found) - moved} + {moved}" if moved else str(len(found))
    cells = [seeds, f"{epochs:.4g}" if epochs else "", *_costs(found, on_gpu)]
    return cells + [_mean([number(row, measure) for row in found]) for measure in MEASURES]


def _costs(found: Sequence[Row], on_gpu: bool) -> list[str]:
    """Return the cells of time and memory, from the rows that were measured on the machine."""
    timed = [row for row in measured_time(found) if _is_trained(row)]
    if not timed:
        return ["", "", "", ""]
    minutes = [
        statistics.mean(number(row, f"{key}_seconds") / 60 for row in timed)
        for key in ("cpu", "wall")
    ]
    epochs = sum(number(row, "epochs") for row in timed)
    cost = sum(number(row, "wall_seconds" if on_gpu else "cpu_seconds") for row in timed)
    if on_gpu:
        gib = max(number(row, "gpu_memory_gib") for row in timed)
    else:
        gib = max(number(row, "peak_mib") for row in timed) / 1024
    return [
        *(f"{value:.1f}" for value in minutes),
        f"{cost / epochs:.{1 if on_gpu else 0}f}" if epochs else "",
        f"{gib:.1f} GiB" if math.isfinite(gib) else "",
    ]


def _mean(values: Sequence[float]) -> str:
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return ""
    spread = f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.1f}{spread}"


def _gain(values: Sequence[float], bold: bool) -> str:
    if not values or not all(map(math.isfinite, values)):
        return ""
    mean, half = statistics.mean(values), interval(values)
    if not math.isfinite(half):
        return f"{mean:+.2f}"
    cell = f"{mean:+.2f} ± {half:.2f}"
    return f"**{cell}**" if bold and abs(mean) > half else cell


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"

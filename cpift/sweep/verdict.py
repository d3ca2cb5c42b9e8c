"""What can honestly be said of a sweep in a few sentences, and what its page shows before any table."""

from __future__ import annotations

from collections.abc import Iterator

from cpift.config.loading import Fields, shown
from cpift.evaluation.estimates import Estimate
from cpift.report.html import figure
from cpift.scorecard.card import Scorecard
from cpift.sweep import plots
from cpift.sweep.scores import SweepData, TrialRow, best_trial, judged, remaking
from cpift.text.escaping import html


def verdict(data: SweepData) -> list[str]:
    """What is best, in one piece; then what the probes learnt if that is in doubt, what was tried, what the best beats,
    and how much that proves."""
    best = best_trial(data)
    if best is None:
        return ["No trial has finished: there is nothing to compare."]
    headline = " ".join(_best(data, best))
    reported = [] if data.reported is None else _on_other_rows(data.reported)
    return [headline, *reported, *data.learning, _what_was_tried(data), *_rivals(data, best), *_caveats(data)]


def _on_other_rows(card: Scorecard) -> list[str]:
    first, *others = card.sentences()
    return [f"On rows that the search never saw: {first}", *others]


def _what_was_tried(data: SweepData) -> str:
    fields = " and ".join(
        [", ".join(list(data.space)[:-1]), list(data.space)[-1]] if len(data.space) > 1 else data.space
    )
    equal = data.points - len(data.trials)
    same = f"; {equal} came to the same groups and models as another and were not computed again" if equal else ""
    stopped = sum(trial.status == "stopped" for trial in data.trials)
    early = f" ASHA stopped {stopped} of the trials early." if stopped else ""
    return f"{data.points} points over {fields} were {len(data.trials)} different trials{same}.{early}"


def _best(data: SweepData, best: TrialRow) -> Iterator[str]:
    figure, sign = data.objectives[0]
    point = ", ".join(f"{name} = {values_of(best, name)}" for name in data.space)
    estimate_of_best = judged(data, best, figure)
    assert estimate_of_best is not None
    yield f"Best by {figure.replace('_', ' ')}: trial {best.number} ({point}), {_words(estimate_of_best, data)}."
    others = [
        (sign * estimate.mean, trial, estimate)
        for trial in data.trials
        if trial is not best and (estimate := judged(data, trial, figure)) is not None
    ]
    if others:
        _, second, estimate = max(others, key=lambda entry: entry[0])
        yield f"Next: trial {second.number}, {_words(estimate, data)}.{_overlap(estimate_of_best, estimate)}"


def values_of(trial: TrialRow, name: str) -> str:
    """A field's values at a trial's points, for example `0.1 or 0.2`."""
    *firsts, last = dict.fromkeys(shown(point[name]) for point in trial.points)
    return f"{', '.join(firsts)} or {last}" if firsts else last


def _words(estimate: Estimate, data: SweepData) -> str:
    if estimate.low is None or estimate.high is None:
        return f"{estimate.mean:.3f}"
    interval = f"{data.confidence:.0%} interval {estimate.low:.3f} to {estimate.high:.3f}"
    return f"{estimate.mean:.3f} ({interval}, n = {len(estimate.values)})"


def _overlap(one: Estimate, other: Estimate) -> str:
    if one.low is None or other.low is None or one.high is None or other.high is None:
        return ""
    apart = one.low > other.high or other.low > one.high
    return "" if apart else " Their intervals overlap: these seeds do not tell the two apart."


def _rivals(data: SweepData, best: TrialRow) -> Iterator[str]:
    """The best trial's model beside the simpler things it was made from."""
    figure, sign = data.objectives[0]
    own = judged(data, best, figure)
    assert own is not None
    rivals = {"the staged backbone alone": best.figures.get("backbone"), "θ0": data.references.get("base")}
    if data.model == "final":
        rivals["the fused model before integration"] = best.figures.get("fused")
    for name, trial in rivals.items():
        if trial is not None and figure in trial:
            gap = sign * (own.mean - trial[figure].mean)
            word = "better than" if gap > 0 else "worse than" if gap < 0 else "equal to"
            yield f"Its {data.model} model is {word} {name} in the same trial ({trial[figure].mean:.3f})."


def _caveats(data: SweepData) -> Iterator[str]:
    done = sum(trial.status == "done" for trial in data.trials)
    if done > 1 and data.reported is None:
        yield (
            f"The best of {done} was chosen on the test rows that it is scored on, so its score flatters it: confirm "
            "it on other rows (`report: 0.5` holds them back) or other seeds."
        )
    if len(data.seeds) == 1:
        yield "One seed: differences between trials have no interval, and small ones mean nothing."


# ---- on the page -----------------------------------------------------------------------------------------------------

_DRAWN = 24  # trials


def lead(data: SweepData) -> str:
    """The verdict in one piece, what failed, and the best config with the command that takes it."""
    failed = [trial for trial in data.trials if trial.status == "failed"]
    items = "".join(
        f"<li>trial {trial.number} ({html(_point(trial.points[0]))}): <code>{html(last_line(trial.reason))}</code></li>"
        for trial in failed
    )
    count = f"{len(failed)} of {len(data.trials)} trials failed"
    broken = f'<p class="down"><strong>{count}</strong></p><ul>{items}</ul>' if failed else ""
    use = ""
    if data.best_yaml:
        use = f"<p>Its config, in the sweep's folder:</p><pre><code>cpift {remaking(data.model)} best.yaml</code></pre>"
    return f'<div class="verdict"><p class="headline">{html(verdict(data)[0])}</p>{broken}{use}</div>'


def last_line(text: str) -> str:
    """Of an error, what went wrong."""
    return (text.strip() or "no reason given").splitlines()[-1]


def _point(point: Fields) -> str:
    return ", ".join(f"{name} = {shown(value)}" for name, value in point.items())


def picture(data: SweepData) -> str:
    """The first objective of every trial with its interval, beside θ0, and what follows from it in sentences."""
    label = data.objectives[0][0].replace("_", " ")
    best = "most" if data.objectives[0][1] > 0 else "least"
    bars = f" Bars: {data.confidence:.0%} t intervals, n = {len(data.seeds)}." if len(data.seeds) > 1 else " One seed."
    drawn = sum(trial.status == "done" for trial in data.trials)
    first = f" The best {_DRAWN} of {drawn} trials." if drawn > _DRAWN else ""
    axis = "Dotted: θ0. The axis begins near the least."
    caption = f"{label} of the {data.model} model; {best} is best, on top.{first}{bars} {axis}"
    sentences = "".join(f"<li>{html(sentence)}</li>" for sentence in verdict(data)[1:])
    drawing = figure(plots.trials(data, _DRAWN), caption)
    return f'<div class="narrow">{drawing}</div>' * bool(drawing) + (f"<ul>{sentences}</ul>" if sentences else "")

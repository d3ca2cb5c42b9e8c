"""Reports of a run and of a sweep on made-up figures, and a page read back."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

from cpift.evaluation.estimates import estimate
from cpift.report.write import ReportData
from cpift.sweep.scores import Overlaps, Reuse, SweepData, TrialRow

VOID = {"meta", "br", "path", "rect", "use", "link", "img"}


def score(metric: str, value: float | None, loss: float, rows: int = 64) -> dict[str, Any]:
    return {"metric": metric, "score": value, "loss": loss, "tokens": 100, "rows": rows}


def made_up_run() -> ReportData:
    """Three tasks (accuracy, loss, a probe that scores 0), figures easy to check by hand."""
    scores = {
        "base": {"a": score("choice", 0.25, 2.0), "b": score("loss", None, 2.0), "c": score("number", 0.0, 1.0)},
        "probe a": {"a": score("choice", 0.5, 1.0), "b": score("loss", None, 3.0), "c": score("number", 0.0, 2.0)},
        "probe b": {"a": score("choice", 0.125, 3.0), "b": score("loss", None, 1.0), "c": score("number", 0.0, 2.0)},
        "probe c": {"a": score("choice", 0.25, 2.5), "b": score("loss", None, 2.5), "c": score("number", 0.0, 0.5)},
        "fused": {"a": score("choice", 0.25, 1.5), "b": score("loss", None, 2.0), "c": score("number", 0.0, 1.0)},
        "final": {"a": score("choice", 0.75, 1.2), "b": score("loss", None, 1.25), "c": score("number", 0.0, 2.0)},
    }
    tensors = [
        f"model.layers.{layer}.{name}.weight"
        for layer in range(3)
        for name in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm")
    ]
    cores = [{"tensor": name, "numel": 100, "core": place} for place, name in enumerate(tensors)]
    angles = [
        {"tensor": name, "angles": [0.01, 0.02 * (i + 1)], "lerp": [0, 0.5], "core": 1, "numel": 100}
        for i, name in enumerate(tensors)
    ]
    curve = [{"stage": s, "step": 5 * k, "loss": 2.0 / k, "learning_rate": 1e-4} for s in (0, 1) for k in (1, 2, 3)]
    manifest = {
        "stage": "probe",
        "label": "<b>a</b>",
        "fingerprint": "f" * 64,
        "started": "2020-01-02T03:04:05+00:00",
        "seconds": 61.0,
        "device": "cpu",
        "commit": None,
        "versions": {"torch": "9.9"},
        "platform": "Linux",
    }
    return ReportData(
        name="made-up",
        config_yaml="name: made-up\nnote: <script>alert(1)</script>\n",
        models=list(scores),
        tasks=["a", "b", "c"],
        scores=scores,
        jaccard=[[1, 0.3, 0.01], [0.3, 1, 0.02], [0.01, 0.02, 1]],
        chance=0.01,
        tau=0.1,
        groups=[["c"], ["a", "b"]],
        cores=dict.fromkeys("abc", cores),
        regions={task: {"requested": 40, "count": 36, "threshold": 1e-3} for task in "abc"},
        slerp=angles,
        curves={"probe a": curve[:3], "integration": curve},
        checks=[{"name": "cores equal their donors", "passed": True, "detail": "36 compared"}],
        provenance=[manifest],
        warnings=["a <warning>"],
    )


class Page(HTMLParser):
    """Checks that tags close in order, and keeps what matters here."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.seen: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.addresses += [value for name, value in attrs if name in ("href", "src", "xlink:href") and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def row(
    number: int, points: list[dict[str, Any]], mean: list[float], worst: list[float], status: str = "done"
) -> TrialRow:
    def over(values: list[float]) -> dict[str, Any]:
        return {"mean_retention": estimate(values, 0.95), "task.a.loss": estimate([2 - v for v in values], 0.95)}

    own = over(mean) | {"worst_retention": estimate(worst, 0.95)}
    shown = {"backbone": over([0.8] * len(mean)), "fused": over([0.7] * len(mean)), "final": own}
    reason = "ActorDiedError: gone\nprobe a: <the loss> is nan" if status == "failed" else ""
    return TrialRow(number, points, status, reason, [[["a"], ["b"]]], shown if status == "done" else {}, 12.5)


def point(p: float, tau: float) -> dict[str, Any]:
    return {"regions.p": p, "groups.tau": tau}


def made_up_sweep() -> SweepData:
    """Trial 2 is best by the mean, trial 3 by the worst task, trial 1 by neither; trial 4 failed."""
    return SweepData(
        name="made-up",
        sweep_yaml="run: <script>x</script>\n",
        best_yaml="name: best\n",
        keep="best",
        space={"regions.p": [0.1, 0.2], "groups.tau": [0.1, 0.5, 0.6]},
        method="grid",
        seeds=[0, 1, 2],
        confidence=0.95,
        model="final",
        objectives=[("mean_retention", 1), ("worst_retention", 1)],
        tasks=["a", "b"],
        metrics={"a": "loss", "b": "choice"},
        trials=[
            row(1, [point(0.1, 0.1)], [0.5, 0.6, 0.7], [0.1, 0.2, 0.3]),
            row(2, [point(0.1, 0.5), point(0.1, 0.6)], [0.9, 0.95, 1.0], [0.2, 0.3, 0.4]),
            row(3, [point(0.2, 0.1)], [0.85, 0.9, 0.95], [0.5, 0.6, 0.7]),
            row(4, [point(0.2, 0.5), point(0.2, 0.6)], [0.0], [0.0], "failed"),
        ],
        references={"base": {"mean_retention": estimate([0.5, 0.5, 0.5], 0.95)}},
        overlaps=[
            Overlaps("p = 0.1, seed 0", ["a", "b", "c"], [[1, 0.3, 0.2], [0.3, 1, 0.4], [0.2, 0.4, 1]], 0.05, [0.1])
        ],
        reuse=[Reuse("probe", 36, 6, 360.0, 60.0), Reuse("fuse", 18, 12, 18.0, 12.0)],
        points=6,
        started="2020-01-02T03:04:05+00:00",
    )

"""Records as text for people. In: a record's JSON values. Out: a few aligned lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Values = Mapping[str, Any]


def describe(values: Values, place: Callable[[str], str] = str) -> str:
    """A record (or, for ``run``, all of them) in the order a reader wants it. ``place``: from a location to where it is."""
    if values["stage"] == "run":
        return "\n".join(describe(values[stage], place) for stage in _STAGES if stage in values)
    shown = {name: place(value) if name in _PLACES and value else value for name, value in values.items()}
    lines = _STAGES[values["stage"]](shown)
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:>{width}}  {text}" for name, text in lines)


def _prepare(v: Values) -> list[tuple[str, str]]:
    splits = ", ".join(f"{name} {split['rows']}" for name, split in v["splits"].items())
    cleaning = v["cleaning"]
    aside = ", ".join(f"{cleaning[c]} {c}" for c in _CLEANING if cleaning[c]) or "nothing"
    lines = [
        ("dataset", f"{v['name']}  {v['key'][:12]}  {v['input_column']} -> {v['label_column']}"),
        ("rows", f"{splits}; set aside: {aside}"),
        ("labels", _labels(v["splits"]["train"]["class_counts"])),
    ]
    return lines + ([("set aside", v["quarantine"])] if v["quarantine"] else [])


def _labels(counts: Mapping[str, int]) -> str:
    listed = _some([f"{name} ({count})" for name, count in counts.items()])
    ratio = max(counts.values()) / max(1, min(counts.values()))
    if ratio < _IMBALANCED:
        return listed
    return (
        f"{listed}; the largest is {ratio:.1f} times the smallest: training.class_weights and oversample make up for it"
    )


_PLACES = ("report", "quarantine")
_IMBALANCED = 1.5
_CLEANING = ("duplicates", "conflicts", "leaks", "missing", "unreadable")


def _train(v: Values) -> list[tuple[str, str]]:
    stopped = ", stopped early" if v["stopped_early"] else ""
    return [
        ("model", f"{v['backbone']}, {v['parameters'] / 1e6:.1f} M parameters, {v['size_bytes'] / 1e6:.0f} MB"),
        ("training", f"{v['steps']} steps in {v['seconds']:.0f} s, {v['samples_per_s']:.1f} samples/s, {v['workers']} "
                     f"{v['device']} worker{'s' * (v['workers'] > 1)}, {v['precision']}{stopped}"),
        *(_ensemble(v, v["ensemble"]) if v.get("ensemble") else
          [("best", f"epoch {v['best_epoch'] + 1}: validation {v['best_metric']} {v['best_value']:.4f}")]),
        *([("privacy", _privacy(v["privacy"]))] if v.get("privacy") else []),
        *(_folds(v["folds"]) if v.get("folds") else []),
    ]  # fmt: skip


def _tune(v: Values) -> list[tuple[str, str]]:
    winner, default, first = v["winner"], v["default"], v["objectives"][0]
    ended = ", ".join(f"{v[state]} {word}" for state, word in _ENDS.items() if v[state])
    return [
        ("study", f"{v['study']}: {v['trials']} trials ({ended}), {v['epochs']} epochs"),
        ("winner", f"trial {winner['number']}: " + ", ".join(f"{o} {winner['metrics'][o]:.4f}" for o in v["objectives"])
                   + (f" +- {v['noise']:.4f}" if v["noise"] is not None else "") + " on validation"),
        *([("default", f"{first} {default['metrics'][first]:.4f} with the recipe's own values")]
          if default and first in default["metrics"] else []),
        ("values", _some([f"{path} {_value(value)}" for path, value in winner["parameters"].items()])),
        *([("noise", f"{v['within_noise']} trials are within it of the best; the best of so many equal ones would look "
                     f"{v['optimism']:.4f} better by chance")] if v["noise"] is not None else []),
        *([("front", f"{len(v['pareto'])} trials that no other beats in all objectives: "
                     f"{_some([str(number) for number in v['pareto']])}")] if len(v["objectives"]) > 1 else []),
        *([("matters", _some([f"{path} {share:.0%}" for path, share in v["importances"].items()], 4))]
          if v["importances"] else []),
        ("report", v["report"]),
    ]  # fmt: skip


def _compress(v: Values) -> list[tuple[str, str]]:
    winner, before, front = v["winner"], v["before"], len(v["pareto"])
    m = winner["metrics"]
    return [
        ("compress", f"{v['trials']} candidates ({v['failed']} failed); {front} within the limits that no other beats"),
        ("chosen", f"candidate {winner['number']}: "
                   + _some([f"{path.removeprefix('compression.')} {_value(x)}" for path, x in winner["parameters"].items()])),
        ("quality", f"validation macro_f1 {m['macro_f1']:.4f} (uncompressed {before['macro_f1']:.4f}), the same label on "
                    f"{m['agreement']:.1%} of the rows"),
        ("cost", f"{m['latency_ms']:.2f} ms per input, {m['speedup']:.1f} times as fast ({before['latency_ms']:.2f} ms); "
                 f"{m['throughput_per_s']:.0f} inputs/s in batches, {m['batch_speedup']:.1f} times"),
        ("size", f"{m['size_mb']:.1f} MB, 1/{before['size_mb'] / m['size_mb']:.1f} of {before['size_mb']:.1f} MB"),
        *([("worse", _some([f"{name}: {c['before']:.4f} to {c['after']:.4f}" for name, c in v["classes"].items()
                            if c["is_flagged"]]))] if any(c["is_flagged"] for c in v["classes"].values()) else []),
        ("report", v["report"]),
    ]  # fmt: skip


def _join(v: Values) -> list[tuple[str, str]]:
    model, mixture, apart = v["model"], v["model"]["mixture"], v["model"]["mixture"]["disagreement"]
    metric = model["best_metric"]
    alone = {member["version"]: member["validation"] for member in mixture["members"]}
    shown = metric if metric == "loss" else f"{metric} {{0[{metric}]:.4f}}, loss"
    shown = f"{shown} {{0[loss]:.4f}}"
    weights = {"fitted": f"fitted on {v['rows']} validation rows", "given": "as given", "equal": "equal"}
    better = "better than" if v["is_better"] else "not better than"
    return [
        ("ensemble", f"{len(alone)} versions by {_COMBINED[mixture['combine']]}, weights {weights[mixture['weights']]}; "
                     f"{model['parameters'] / 1e6:.1f} M parameters, {model['size_bytes'] / 1e6:.0f} MB"),
        *[(f"version {m['version']}", f"weight {m['weight']:.3f}, validation {shown.format(m['validation'])}")
          for m in mixture["members"]],
        ("together", f"validation {shown.format(mixture['validation'])}; {better} its best member, version {v['best']} "
                     f"({metric} {alone[v['best']][metric]:.4f})"),
        ("disagree", _apart(apart)),
    ]  # fmt: skip


_COMBINED = {"mean": "the mean of their probabilities", "vote": "vote"}
_ENDS = {"complete": "complete", "pruned": "stopped early", "failed": "failed"}


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _privacy(spent: Values) -> str:
    return f"epsilon {spent['epsilon']:.2f} at delta {spent['delta']:g}, noise {spent['noise_multiplier']:.2f}"


def _ensemble(v: Values, ensemble: Values) -> list[tuple[str, str]]:
    metric, apart = v["best_metric"], ensemble["disagreement"]
    alone = [member["validation"][metric] for member in ensemble["members"]]
    members = f"{len(alone)} members, each validation {metric} {min(alone):.4f} to {max(alone):.4f}"
    if apart is None:
        return [("ensemble", f"{members}, each on its own fold")]
    return [
        ("ensemble", f"{members}, together {ensemble['validation'][metric]:.4f}"),
        ("disagree", _apart(apart)),
    ]


def _apart(apart: Values) -> str:
    return (
        f"on {apart['labels']:.1%} of the validation rows; entropy {apart['predictive_entropy']:.3f}, of the "
        f"members {apart['member_entropy']:.3f}, mutual information {apart['mutual_information']:.3f} nats"
    )


def _folds(folds: Values) -> list[tuple[str, str]]:
    """A small table: a line per fold, then mean and standard deviation."""
    names = list(folds["mean"])
    rows = [("folds", ["rows", "epoch", *names])]
    rows += [
        (
            f"fold {number}",
            [str(run["rows"]), str(run["best_epoch"] + 1), *(f"{run['validation'][n]:.4f}" for n in names)],
        )
        for number, run in enumerate(folds["runs"], start=1)
    ]
    rows.append(("mean", ["", "", *(f"{folds['mean'][n]:.4f}" for n in names)]))
    rows.append(("deviation", ["", "", *(f"{folds['deviation'][n]:.4f}" for n in names)]))
    widths = [max(len(cells[i]) for _, cells in rows) for i in range(len(names) + 2)]
    return [(name, "  ".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))) for name, cells in rows]


def _evaluate(v: Values) -> list[tuple[str, str]]:
    shown = [name for name in ("accuracy", "macro_f1", "roc_auc", "calibration_error") if name in v["metrics"]]
    scores = ", ".join(f"{name} {_interval(v['metrics'][name])}" for name in shown)
    return [
        ("test", f"{v['rows']} rows: {scores}"),
        ("cost", f"{v['latency_ms_p50']:.1f} ms per input (p95 {v['latency_ms_p95']:.1f}), "
                 f"{v['throughput_per_s']:.0f} inputs/s in batches"),
        ("report", v["report"]),
    ]  # fmt: skip


def _promote(v: Values) -> list[tuple[str, str]]:
    if "reason" in v:
        champion = f"version {v['champion']} stays champion" if v["champion"] else "there is no champion"
        return [("promote", f"{v['name']} version {v['version']} is held, {champion}: {v['reason']}")]
    return [("promote", f"{v['name']} version {v['version']} is {', '.join(v['aliases'])}: {v['decision']}")]


def _serve(v: Values) -> list[tuple[str, str]]:
    if "rollout" in v:
        plan = v["rollout"]
        does = "is asked as well for" if plan["mode"] == "shadow" else "answers"
        return [("serve", f"{plan['name']} version {plan['candidate']} {does} {plan['share']:.0%} of the requests "
                          f"({plan['mode']}), beside version {plan['stable']}"),
                ("watch", f"/v1/models/{plan['name']}/rollout")]  # fmt: skip
    if "taken_off" in v:
        was = f"{v['taken_off']} {'is off the endpoint now' if v['stopped'] else 'was not on the endpoint'}"
        return [("serve", f"{was}; {', '.join(v['left'])} stay" if v.get("left") else was)]
    if "stopped" in v:
        return [("serve", "the endpoint is down" if v["stopped"] else "there was no endpoint to stop")]
    return [("serve", f"{v['name']} version {v['version']} answers at {v['url']}"), ("predict", v["predict_url"])]


def _check(v: Values) -> list[tuple[str, str]]:
    return [(name, text) for name, text in v["plan"].items()]


_STAGES: dict[str, Callable[[Values], list[tuple[str, str]]]] = {
    "prepare": _prepare, "tune": _tune, "train": _train, "compress": _compress, "ensemble": _join, "evaluate": _evaluate,
    "promote": _promote, "serve": _serve, "check": _check,
}  # fmt: skip


def _interval(interval: Values) -> str:
    return f"{interval['value']:.4f} [{interval['low']:.4f}, {interval['high']:.4f}]"


def _some(items: list[str], limit: int = 8) -> str:
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")


def key_made(v: Values, text: str, storage: str) -> str:
    return (
        f"key {v['id']} for {v['name']}, in {storage}: {_opens(v)}\n\n    {text}\n\n"
        "It is not shown again. Send it as: authorization: Bearer KEY"
    )


def keys_table(known: Sequence[Values], storage: str) -> str:
    if not known:
        return f"no keys yet in {storage}: orchestrator keys create NAME"
    rows = [("id", "name", "opens", "inputs today", "made")]
    rows += [(v["id"], v["name"], _opens(v), str(v["used_today"]), v["created"]) for v in known]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _opens(v: Values) -> str:
    limits = [f"{v['per_second']:g} requests a second"] if v["per_second"] else []
    limits += [f"{v['per_day']} inputs a day"] if v["per_day"] else []
    models = f" of {', '.join(v['models'])}" if v["models"] else ""
    return f"{', '.join(v['scopes'])}{models}" + (f"; at most {' and '.join(limits)}" if limits else "")

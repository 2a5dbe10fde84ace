"""What the laws of a sweep come to in words and tables, and where the data cannot carry a claim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.findings import DASH, Table, interval, more, number_text, plural, step_text
from cluster.intervals import CONFIDENCE
from cluster.laws import HEADS, MEMBERS, Law

WHAT = {MEMBERS: "level of the best detector", HEADS: "level of heads"}
UNIT = {MEMBERS: "member", HEADS: "head"}
LEAST_CLUSTERS = 5  # with some that never get there, for a trend of the share
SLOPE = ("slope", "slope_low", "slope_high")
ROWS = 60  # of the table


def named(law: Law) -> str:
    """The series in words; that of a sweep without further axes has no name."""
    return str(law["series"]) or "all members"


def sound_laws(laws: Sequence[Law]) -> list[Law]:
    """Without the series whose laws could not be worked out."""
    return [law for law in laws if "failed" not in law]


def law_line(found: Law, endpoint: str) -> str:
    """The law of width of one endpoint with its window, method, interval and numbers, or why there is none."""
    law = found[endpoint]["law"]
    units = plural(sum(law["counts"].values()), UNIT[endpoint])
    if law["refusal"]:
        return f"{named(found)}: no law of the {WHAT[endpoint]} is fitted to {units}: {law['refusal']}."
    exponent = interval((-law["exponent"], -law["high"], -law["low"]))
    events = sum(law["counts"][name] for name in ("emerged", "transient"))
    text = (
        f"{named(found)}: {WHAT[endpoint]} ~ width^b with b = {exponent}, {CONFIDENCE:.0%} interval, by a mixture-cure "
        f"model of {units} ({events:,} with a time) in {plural(law['clusters'], 'cluster')}, widths "
        f"{law['shares']['width'][0]:g} to {law['shares']['width'][-1]:g} ({law['decades']:.2f} decades)"
    )
    return f"{text}; {_choice(law)}. {share_line(found, endpoint)} {held_out_line(law)}".rstrip()


def _choice(law: Mapping[str, Any]) -> str:
    against = {item["name"]: item["p_value"] for item in law["alternatives"]}
    p = number_text(against.get("no dependence"), ".2g")
    words = {
        "no dependence": f"no dependence on width is not excluded (p = {p})",
        "undecided": f"it does depend on width (p = {p}), but a power cannot be told from an exponential",
        "power law": f"preferred to no dependence (p = {p}) and to an exponential",
        "exponential": f"it does depend on width (p = {p}), but an exponential describes it better",
    }
    return words.get(law["preferred"], "not compared with other laws")


def share_line(found: Law, endpoint: str) -> str:
    """Whether more of them emerge at larger widths."""
    law, unit = found[endpoint]["law"], UNIT[endpoint]
    shares = law["shares"]
    if not law["counts"]["never"]:
        return f"All {unit}s get there, at every width."
    if shares["refusal"]:
        return f"Share that ever gets there: {shares['refusal']}."
    first, last = (f"{shares['share'][at]:.0%} at width {shares['width'][at]:g}" for at in (0, -1))
    text = f"Of {unit}s ever get there {first}, {last}"
    if not trend_told(found, endpoint):
        return f"{text}: those that do not are in too few {found['unit']}s to speak of a trend."
    low, high = shares["slope_low"], shares["slope_high"]
    trend = "more of them the wider the model" if low > 0 else "fewer of them the wider the model"
    if low <= 0 <= high:
        trend = "no trend with width is shown, nor excluded"
    slope = interval((shares["slope"], low, high))
    return f"{text}: {trend} (log-odds by log width {slope})."


def trend_told(found: Law, endpoint: str) -> bool:
    """Whether enough members lack some for the share's slope to be more than the luck of a few."""
    some = found[endpoint]
    enough = some["never_clusters"] >= LEAST_CLUSTERS and some["never_widths"] > 1
    return enough and some["law"]["shares"]["slope"] is not None


def held_out_line(law: Mapping[str, Any]) -> str:
    """The largest width as the others predict it."""
    held = law["held_out"]
    if not isinstance(held, Mapping):
        return ""
    if held["refusal"]:
        return f"The largest width cannot be held out: {held['refusal']}."
    inside = "inside" if held["low"] <= held["observed"] <= held["high"] else "outside"
    return (
        f"Held out, width {held['width']:g} is predicted at step {step_text(held['predicted'])} "
        f"({step_text(held['low'])}–{step_text(held['high'])}) and has {step_text(held['observed'])}: {inside}."
    )


def verdict(laws: Sequence[Law], endpoint: str) -> str:
    """One sentence over all series: a law is claimed only if its sign is the same, and sure, in each of them, at more
    than one learning rate. Best rates are no further series: their members are those of the others."""
    what = f"how the {WHAT[endpoint]} depends on width"
    others = [found for found in laws if not found["rates"]]
    signs = [_sign(found[endpoint]["law"]) for found in laws if not found[endpoint]["law"]["refusal"]]
    if not signs:
        return f"Nothing is claimed of {what}: in no series could a law be fitted."
    if {1, -1} <= set(signs):
        return f"No law of {what} is claimed: its sign differs between series."
    if len(signs) < len(laws) or 0 in signs:
        counts = {"cannot exclude that it does not": signs.count(0), "could not be made": len(laws) - len(signs)}
        faults = " and ".join(f"{count:,} {text}" for text, count in counts.items() if count)
        return f"No general law of {what} is claimed: of {plural(len(laws), 'fit')} {faults}."
    trend = f"the {WHAT[endpoint]} {'falls' if signs[0] == 1 else 'rises'} with width"
    if len(others) == len(laws):
        return (
            f"At the one learning rate of this sweep {trend} ({CONFIDENCE:.0%} intervals exclude 0). At a fixed rate a "
            "wider net moves faster: this is no law of width."
        )
    return (
        f"In each of {len(others):,} settings, and at each width's best learning rate, {trend} ({CONFIDENCE:.0%} "
        "intervals exclude 0)."
    )


def rates_line(found: Law, swept: Sequence[float]) -> str:
    """Which rates were the best, and whether they lie inside what was swept."""
    rates = found["rates"]
    text = f"{named(found)}: by validation loss " + ", ".join(f"width {w}: {rate:g}" for w, rate in rates.items())
    if swept and set(rates.values()) & {min(swept), max(swept)}:
        return f"{text}. Some lie at the edge of what was swept: a better rate may lie beyond."
    return f"{text}."


def _sign(law: Mapping[str, Any]) -> int:
    """Of g in t ~ width^-g; 0 where its interval holds 0."""
    return int(law["low"] > 0) - int(law["high"] < 0)


def survival_line(found: Law) -> str:
    """Whether widths differ in whether or when heads emerge."""
    test = found[HEADS]["log_rank"]
    if test["refusal"]:
        return f"{named(found)}: widths are not compared: {test['refusal']}."
    kind = "all" if test["exact"] else "random"
    dealt = f"{plural(found['clusters'], found['unit'])} dealt out anew to widths"
    if test["paired"]:
        dealt = f"widths dealt out anew within each of {plural(found['clusters'], 'seed')}"
    return (
        f"{named(found)}: log-rank scores against log width, {dealt} in {test['arrangements']:,} {kind} ways: "
        f"p = {number_text(test['p_value'], '.2g')}."
    )


def relaxation_line(found: Law) -> str:
    """By which law risen heads approach their plateaus."""
    told = found["relaxation"]
    if not told["heads"]:
        return f"{named(found)}: no head has risen and stayed."
    early, late = (", ".join(f"{name} {n:,}" for name, n in told[key].items()) for key in ("growth", "preferred"))
    text = f"{named(found)}: of {plural(told['heads'], 'head')} that rose and stayed, law preferred from onset to t50: "
    text += f"{early}; from t50 on: {late}"
    refused = f"Exponents refused: {_reasons(told['refusals'])}." if told["refusals"] else ""
    if not told["told"]:
        return f"{text}. No head has a power law with an exponent. {refused}".rstrip()
    widths = "; ".join(f"width {width} {interval(values)}" for width, values in told["by_width"].items())
    text += (
        f". A power law with an exponent: {plural(told['told'], 'head')} of {plural(told['members'], 'member')}; "
        f"geometric mean over members of their heads' median: {widths}"
    )
    test = told["one_value"]
    if isinstance(test, Mapping) and not test["refusal"]:
        not_or_so = "" if test["p_value"] < 1 - CONFIDENCE else "not "
        text += f"; that widths share one value is {not_or_so}excluded (p = {test['p_value']:.2g})"
    return f"{text}. {refused}".rstrip()


def _reasons(refusals: Mapping[str, int]) -> str:
    shown = list(refusals.items())[:4]
    rest = sum(refusals.values()) - sum(count for _, count in shown)
    return ", ".join([*(f"{count:,} x {reason}" for reason, count in shown), *([f"{rest:,} others"] if rest else [])])


def tail_line(found: Law) -> str:
    """Whether late heads follow a power law."""
    tail = found["tail"]
    if tail["refusal"]:
        return (
            f"{named(found)}: nothing is said of the tail of {plural(tail['heads'], 'risen head')}: {tail['refusal']}."
        )
    against = ", ".join(
        f"{name} {number_text(ratio, '+.1f')} (p = {number_text(p, '.2g')})"
        for name, (ratio, p) in tail["comparisons"].items()
    )
    return (
        f"{named(found)}: {tail['verdict']}. Density ~ t^-a, "
        f"a = {interval((tail['alpha'], tail['low'], tail['high']))}, "
        f"from {tail['xmin']:.2f} medians on ({tail['decades']:.2f} decades; {tail['n_tail']:,} heads, of which "
        f"{tail['n_events']:,} with a time, in {plural(tail['n_clusters'], found['unit'])}); "
        f"p = {number_text(tail['p_value'], '.2g')}; log-likelihood over that of other laws: {against}. Runs end at "
        f"{tail['end']:.1f} medians: heads that would come later are not in this."
    )


def matter_line(found: Law) -> str:
    """Heads that matter, a member."""
    widths = "; ".join(f"width {width}: {interval(values, '.1f')}" for width, values in found["matter"].items())
    return f"{named(found)}, {widths}."


def collapse_line(found: Law) -> str:
    """Whether one curve serves all widths when time is scaled."""
    one = found["collapse"]
    if one["refusal"]:
        return f"{named(found)}: no collapse: {one['refusal']}."
    others = ", ".join(number_text(value) for value in one["leave_one_out"])
    return (
        f"{named(found)}: curves of {plural(one['members'], 'member')} over steps {step_text(one['window'][0])} to "
        f"{step_text(one['window'][1])} lie nearest to one curve of step x width^g at "
        f"g = {interval((one['exponent'], one['low'], one['high']))} (without each width in turn: {others}); "
        f"S = {one['S_before']:.1f} before, {one['S']:.1f} after, over {one['overlapping']:,} of {one['points']:,} "
        "points."
    )


def ordered(laws: Sequence[Law], most: int) -> list[Law]:
    """Those that are shown where not all can be: best rates first, then the others as they come."""
    best = [found for found in laws if found["rates"]]
    return [*best, *(found for found in laws if found not in best)][:most]


def law_rows(laws: Sequence[Law]) -> Table:
    """Laws of width by series and endpoint."""
    columns = ["series", "endpoint", "with a time", "of", "clusters", "decades", "exponent b", "never taken as late",
               "log-odds of emerging", "preferred", "log-rank p", "held out: predicted", "has"]  # fmt: skip
    shown = ordered(laws, ROWS // 2)
    rows = [_law_row(found, endpoint) for endpoint in (MEMBERS, HEADS) for found in shown]
    note = (
        "time ~ width^b by a mixture-cure model, whose share that ever emerges is logistic in log width; beside it the "
        f"plain regression that takes heads that never emerge as merely late. In brackets: {CONFIDENCE:.0%} intervals. "
        + more(2 * len(laws), len(rows), "sweep.json")
    )
    return Table(title="Laws of width", columns=columns, rows=rows, note=note)


def _law_row(found: Law, endpoint: str) -> list[str]:
    law, plain, test = (found[endpoint][name] for name in ("law", "regression", "log_rank"))
    held = law["held_out"] if isinstance(law["held_out"], Mapping) else {}
    events = law["counts"]["emerged"] + law["counts"]["transient"]
    return [
        named(found),
        WHAT[endpoint],
        f"{events:,}",
        f"{sum(law['counts'].values()):,}",
        f"{law['clusters']:,}",
        number_text(law["decades"]),
        law["refusal"] or interval((-law["exponent"], -law["high"], -law["low"])),
        plain["refusal"] or interval((-plain["exponent"], -plain["high"], -plain["low"])),
        interval([law["shares"][name] for name in SLOPE]) if trend_told(found, endpoint) else DASH,
        law["preferred"] or DASH,
        number_text(test["p_value"], ".2g"),
        f"{step_text(held.get('predicted'))} ({step_text(held.get('low'))}–{step_text(held.get('high'))})",
        step_text(held.get("observed")),
    ]

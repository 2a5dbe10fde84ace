"""What every column of headway's tables means, and its unit: for those who were not there when it was written."""

from __future__ import annotations

from collections.abc import Sequence

STEP, LOSS, SHARE, COUNT, PLAIN, SECONDS = "training steps", "loss", "share", "count", "", "seconds"

KEYS = {
    "member_id": (PLAIN, "identity of a member: a digest of its config, seed and results versions"),
    "run_id": (PLAIN, "the member's run in MLflow"),
    "width": ("residual stream", "model.width"),
    "seed": (PLAIN, "the member's seed"),
    "relation": (PLAIN, "pair relation; in curves of probes that have none the name along their own axis"),
    "layer": (PLAIN, "from 0"),
    "head": (PLAIN, "from 0, in its layer"),
    "step": (STEP, "optimiser steps taken"),
}
TIMES = {
    "level": (STEP, "first step at lift 2, which sweeps are compared by; NaN where there is none"),
    "level_low": (STEP, "lower end of its interval"),
    "level_high": (STEP, "upper end of its interval; inf where it lies after the end"),
    "t10": (STEP, "10% of the rise done"),
    "t50": (STEP, "half of the rise done; a lower bound for heads that are still growing"),
    "t90": (STEP, "90% of the rise done"),
}
MEMBERS = {
    "outcome": (PLAIN, "finished, diverged, failed or not analysed"),
    "cause": (PLAIN, "why it is not finished"),
    "best_head": (PLAIN, "LAYER.HEAD of the detector whose lift peaks highest; its level is the member's"),
    "detectors": (COUNT, "heads that reach lift 2, and 1.5 times what they score with rows exchanged"),
    "risen": (COUNT, "heads emerged, growing, transient or at_start on the judged relation"),
    "heads_that_matter": (COUNT, "heads whose looking is surely worth more than 1% of what attention saves"),
    "last_step": (STEP, "the end of training"),
    "seconds": (SECONDS, "from its first to its last probe step"),
    "train_loss": (LOSS, "mean since the probe step before"),
    "validation_loss": (LOSS, "on held-out rows"),
}
HEADS = {
    "status": (PLAIN, "emerged, growing, transient, never or at_start"),
    "low": (STEP, "lower end of the interval of t50"),
    "high": (STEP, "upper end of the interval of t50; inf where it lies after the end"),
    "onset": (STEP, "last step at the baseline"),
    "baseline": ("score", "mean up to the onset"),
    "plateau": ("score", "mean over the last third of a decade"),
    "peak": ("score", "highest mean over any third of a decade"),
    "lost": (SHARE, "of its rise that a transient head lost"),
    "lift_peak": ("uniform attention", "highest lift"),
    "lift_end": ("uniform attention", "lift at the end"),
    "lift_rows_peak": (PLAIN, "at the peak: score over that with attention rows exchanged"),
    "detector": (PLAIN, "whether it reaches lift 2, and lift_rows_peak is above 1.5"),
    "relaxation": (PLAIN, "exponent a of the approach to the plateau, A (t - t0)^-a"),
    "relaxation_low": (PLAIN, "lower end of its interval"),
    "relaxation_high": (PLAIN, "upper end of its interval"),
    "relaxation_law": (PLAIN, "law of approach preferred, undecided, or empty where the head did not rise and stay"),
    "relaxation_decades": ("decades of steps", "of the window from t50 to the end"),
    "relaxation_t0": (STEP, "origin of the power law"),
    "relaxation_plateau": ("score", "plateau of the power law"),
    "relaxation_refusal": (PLAIN, "why there is no exponent"),
    "growth_law": (PLAIN, "law of growth preferred from onset to t50"),
    "growth": (PLAIN, "its parameter: rate by step, exponent, or the degree k"),
    "growth_low": (PLAIN, "lower end of its interval"),
    "growth_high": (PLAIN, "upper end of its interval"),
    "growth_refusal": (PLAIN, "why there is none"),
    "ablation_share": (SHARE, "of what attention saves: lost with the head's output at its mean, at the end"),
    "pattern_share": (SHARE, "of what attention saves: lost with the head's attention uniform, at the end"),
    "only_share": (SHARE, "of what attention saves: lost with all other heads of the layer replaced, at the end"),
    "whole_layer_share": (SHARE, "of what attention saves: lost with all heads of the layer replaced, at the end"),
    "redundancy_share": (SHARE, "whole_layer less the sum of the ablations of its heads, at the end"),
    "matters": (PLAIN, "whether the lower 95% bound of pattern is above 1%"),
}
WIDTHS = {
    "members": (COUNT, "finished"),
    "diverged": (COUNT, "members"),
    "lost": (COUNT, "members that failed"),
    "heads": (COUNT, "of finished members"),
    **dict.fromkeys(("at_start", "never", "transient", "growing", "emerged"), (COUNT, "heads of that status")),
    "share_risen": (SHARE, "of heads: mean over members"),
    "share_low": (SHARE, "lower end of its 90% interval over members"),
    "share_high": (SHARE, "upper end of its 90% interval over members"),
    "detectors_per_member": (COUNT, "mean over members"),
    "members_without_detector": (COUNT, "which have no level"),
    "level_median": (STEP, "over finished members; those without a detector count as later, infinity for half of them"),
    "t50_low": (STEP, "lower end of the 90% interval over members"),
    "t50_high": (STEP, "upper end of the 90% interval over members"),
    "t50_bounds": (COUNT, "risen heads that were still growing: their t50 are lower bounds"),
}
DETECTORS = {"lift": ("uniform attention", "of the member's best detector, smoothed over three probe steps")}
CURVES = {
    "wall_time": ("Unix seconds", "when it was measured"),
    "probe": (PLAIN, "which probe measured the row; columns of others are NaN in it"),
    "replicate": (PLAIN, "disjoint group of examples of the probe set"),
    "score": (SHARE, "of attention that goes to related tokens, over tokens that have any"),
    "score_all": (SHARE, "the same over all tokens"),
    "null_uniform": (SHARE, "the score of uniform attention"),
    "null_rows": (SHARE, "the score with attention rows exchanged between tokens"),
    "self": (SHARE, "of attention that a token pays itself"),
    "entropy": (PLAIN, "of attention rows, over the logarithm of the number of keys"),
    "ablation": (SHARE, "of what attention saves: lost with the head's output at its mean"),
    "pattern": (SHARE, "of what attention saves: lost with the head's attention uniform"),
    "only": (SHARE, "of what attention saves: lost with all other heads of the layer replaced"),
    "whole_layer": (SHARE, "of what attention saves: lost with all heads of the layer replaced"),
    "redundancy": (SHARE, "whole_layer less the sum of the ablations of its heads"),
    "loss": (LOSS, "of the model as it is, on the probe set"),
    "loss_without_attention": (LOSS, "with all heads replaced, or of a predictor without attention, the lower one"),
    "corr": (PLAIN, "correlation of attention and distance, over pairs"),
    "G": ("attention", "connected correlation <A 1_r> - <A><1_r> at the shell of distances in `relation`"),
    "g": (PLAIN, "<A 1_r> / (<A><1_r>): attention at that distance over its mean"),
}
GEOMETRY = {
    "tokens": (PLAIN, "whose loss is taken"),
    "low": (PLAIN, "lower end of the interval of llc over chains, or of k"),
    "high": (PLAIN, "upper end of the interval of llc over chains, or of k"),
    "sd": (PLAIN, "of llc between chains"),
    "acceptance": (SHARE, "of proposals that a Metropolis step would have taken"),
    "diverged": (COUNT, "chains that diverged, and count in no mean"),
    "chains": (COUNT, "chains"),
    "draws": (COUNT, "of each chain after burn-in"),
    "n": (COUNT, "examples in the data"),
    "n_beta": (PLAIN, "inverse temperature times examples"),
    "gamma": (PLAIN, "localisation: exp(-gamma/2 |w - w*|^2)"),
    "sigma": (PLAIN, "of the noise of a squared error, L = loss / (2 sigma^2); NaN: the loss as it is"),
    "n_beta_third": (PLAIN, "llc at n_beta / 3"),
    "n_beta_triple": (PLAIN, "llc at n_beta x 3"),
    "gamma_third": (PLAIN, "llc at gamma / 3"),
    "gamma_triple": (PLAIN, "llc at gamma x 3"),
    **{
        f"{name}_error": (SHARE, f"standard error of {name} less llc, as a share of llc")
        for name in ("n_beta_third", "n_beta_triple", "gamma_third", "gamma_triple")
    },
    "spread": (SHARE, "spread of chains over that of their density: 1 once they have reached it"),
    "heating": (SHARE, "of the temperature, by which minibatches raise it in the directions of their noise"),
    "slope": (PLAIN, "what the gradient at the point takes off llc, n_beta^2 |grad L|^2 / gamma"),
    "sound": (PLAIN, "whether nothing shows that llc is not what its definition says at its n_beta and gamma"),
    "converged": (PLAIN, "whether it is sound, and the values nearby are surely known to lie within 20%"),
    "facts": (PLAIN, "names the analysis of the member's heads that its estimates of k rest on"),
    "version": (COUNT, "of the code that measured: raised where its numbers change"),
    "reason": (PLAIN, "why it is not converged"),
    "llc": (PLAIN, "refined local learning coefficient of the head, n_beta (E[L(w)] - L(w*))"),
    "method": (PLAIN, "how the degree of the head's potential was estimated"),
    "k": (PLAIN, "degree of the potential"),
    "assumption": (PLAIN, "what the estimate of k rests on"),
    "refusal": (PLAIN, "why there is no number"),
}
OWN = "by a probe or a measurement of its own; see the class that names it"
FIGURE = "figure of the system (see `diagnose` of its class)"


def explain(table: str, column: str, axes: Sequence[str]) -> tuple[str, str]:
    """Unit and meaning of a column of one of the tables."""
    if column in axes and column != "width":
        return PLAIN, "axis of the sweep: this field of the config"
    own = {
        "members": MEMBERS, "heads": HEADS, "widths": WIDTHS, "detectors": DETECTORS, "curves": CURVES,
        "figures": {**CURVES, **MEMBERS},
    }.get(table, GEOMETRY)  # fmt: skip
    for known in (own, KEYS, TIMES):
        if column in known:
            return known[column]
    return PLAIN, FIGURE if table in ("members", "figures") else OWN

"""Settings of speculative decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from accel.core.checks import check, is_number, is_whole, settings
from accel.errors import ConfigError

#: With a budget, groups are chosen among the powers of two up to this size, unless `group_size` says more.
LARGEST_GROUP = 64


@settings
@dataclass(frozen=True, kw_only=True)
class SpeculativeDecodingConfig:
    """Settings of speculative decoding: several image tokens per forward of the model. Lossless by default.

    A window of drafted tokens goes through one forward; those that pass verification are final. With the
    defaults the images are those of plain decoding with the same seed, as far as the model's numbers for a
    window and for one token agree (float32: nearly always; bfloat16: the same distribution, often other images).

    Attributes:
        window: tokens fed per forward, >= 2 (at most the image's slots are); "auto": a few widths are timed on
            the running model, once per batch size, and the one that promises most tokens per second is taken.
            With `verification` "ratio" another window gives other images for a seed (the same distribution).
        drafting: how drafts that were not reached are carried to the next forward. "gumbel": the noise of a
            slot stays, so a draft changes only as far as its distribution does (SCD, arXiv:2510.24211);
            "maximal": a draft stays with the largest probability possible (maximal coupling, SJD-PAC,
            arXiv:2603.18599); "independent": drawn anew (SJD, arXiv:2410.01699). "auto": gumbel when lossless,
            else maximal.
        verification: "noise": a draft passes if it is what the slot's noise gives for the model's own
            distribution, so that images are plain decoding's (only for gumbel, nothing relaxed); "ratio": it
            passes with probability min(1, p / q) (speculative sampling, arXiv:2211.17192), a little more
            often. "auto": noise for gumbel when lossless, else ratio.
        fresh: where drafts of slots that enter the window come from: "above", the token right above in the
            image (a model that does not say how long its rows are: "last"); "last", the distribution at the
            window's end; "uniform", all tokens alike (as published; not when noise verifies).
        relaxation: what is verified if the budget, the group or the weight allow a loss. "group": groups of
            tokens of similar probability (GSD, arXiv:2508.07747); "mixture": w p + (1 - w) q, which accepts as
            much as any rule can for the distance it causes.
        group_size: tokens in a group, >= 1; 1 is lossless. With `tv_budget`: the largest group, 64 if left at 1.
        probability_filter: tokens whose probability differs by this much or more from the draft's are not in
            its group, in (0, 1]; None: off.
        distance_filter: nor are those at this squared distance or more in the model's codebook, > 0; None:
            off. Needs a model that offers its codebook. Holds V x V bytes and takes a pass per group member.
        mixture_weight: w, in (0, 1]; 1 is lossless. Not together with `tv_budget`.
        tv_budget: the largest total variation between a token's distribution and the model's, in [0, 1), at
            every slot. The group or the weight follows, slot by slot. None: as `group_size` or `mixture_weight`
            cause; `stats` says how much that was.
        auto_disable: time one-token forwards too, and decode plainly, with an `AccelWarning`, at batch sizes
            where windows would be slower.
        compile: compile drafting and verification with torch.compile (not the model).

    Raises:
        ConfigError: a value is outside its range, or contradicts another one.
    """

    window: int | Literal["auto"] = "auto"
    drafting: Literal["auto", "gumbel", "maximal", "independent"] = "auto"
    verification: Literal["auto", "noise", "ratio"] = "auto"
    fresh: Literal["above", "last", "uniform"] = "above"
    relaxation: Literal["group", "mixture"] = "group"
    group_size: int = 1
    probability_filter: float | None = 0.15
    distance_filter: float | None = None
    mixture_weight: float = 1.0
    tv_budget: float | None = None
    auto_disable: bool = True
    compile: bool = False

    def __post_init__(self) -> None:
        valid = self.window == "auto" or (is_whole(self.window) and self.window >= 2)
        check(valid, "window", 'a whole number >= 2 or "auto"', self.window)
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            check(value in choices, name, f"one of {', '.join(choices)}", value)
        valid = is_whole(self.group_size) and self.group_size >= 1
        check(valid, "group_size", "a whole number >= 1 (1 is lossless)", self.group_size)
        delta, distance = self.probability_filter, self.distance_filter
        valid = delta is None or (is_number(delta) and 0 < delta <= 1)
        check(valid, "probability_filter", "in (0, 1] or None", delta)
        valid = distance is None or (is_number(distance) and distance > 0)
        check(valid, "distance_filter", "> 0 or None", distance)
        valid = is_number(self.mixture_weight) and 0 < self.mixture_weight <= 1
        check(valid, "mixture_weight", "in (0, 1] (1 is lossless)", self.mixture_weight)
        valid = self.tv_budget is None or (is_number(self.tv_budget) and 0 <= self.tv_budget < 1)
        check(valid, "tv_budget", "in [0, 1) or None", self.tv_budget)
        for name in ("auto_disable", "compile"):
            check(isinstance(getattr(self, name), bool), name, "true or false", getattr(self, name))
        self._check_together()

    def _check_together(self) -> None:
        if self.relaxation == "mixture":
            if self.group_size > 1:
                raise ConfigError(f"group_size={self.group_size} needs relaxation='group', not 'mixture'")
            if self.tv_budget is None and self.mixture_weight == 1:
                raise ConfigError("relaxation='mixture' needs tv_budget >= 0 or mixture_weight < 1")
            if self.tv_budget is not None and self.mixture_weight < 1:
                raise ConfigError("the mixture's weight follows from tv_budget: leave mixture_weight out")
        elif self.mixture_weight < 1:
            raise ConfigError(f"mixture_weight={self.mixture_weight} needs relaxation='mixture'")
        if self.verification == "noise" and (self.drafts_by != "gumbel" or not self.lossless):
            raise ConfigError(
                "verification='noise' compares with what the slot's noise gives: it needs drafting='gumbel' "
                "and nothing relaxed (group_size=1, mixture_weight=1, tv_budget None or 0)"
            )
        if self.fresh == "uniform" and self.verifies_by == "noise":
            raise ConfigError(
                "fresh='uniform' draws from the numbers that verification by noise takes for the image: it goes with "
                "verification='ratio' or with drafting='maximal' or 'independent'"
            )

    @property
    def lossless(self) -> bool:
        """Tokens have exactly the model's distribution."""
        if self.tv_budget is not None:
            return self.tv_budget == 0
        return self.group_size == 1 and self.mixture_weight == 1

    @property
    def drafts_by(self) -> str:
        """`drafting` with "auto" resolved."""
        if self.drafting != "auto":
            return self.drafting
        return "gumbel" if self.lossless and self.verification != "ratio" else "maximal"

    @property
    def verifies_by(self) -> str:
        """`verification` with "auto" resolved."""
        if self.verification != "auto":
            return self.verification
        return "noise" if self.drafts_by == "gumbel" and self.lossless else "ratio"

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """The groups to choose among: one, or with a budget the powers of two up to the largest."""
        if self.tv_budget is None:
            return (self.group_size,)
        largest = self.group_size if self.group_size > 1 else LARGEST_GROUP
        return (*[2**i for i in range(largest.bit_length()) if 2**i < largest], largest)

    @classmethod
    def sjd(cls, window: int | Literal["auto"] = "auto") -> SpeculativeDecodingConfig:
        """Speculative Jacobi decoding as published (arXiv:2410.01699): drafts drawn anew, p / q verified."""
        return cls(window=window, drafting="independent", fresh="uniform")

    @classmethod
    def gsd(
        cls,
        group_size: int = 32,
        window: int | Literal["auto"] = "auto",
        distance_filter: float | None = 0.5,
    ) -> SpeculativeDecodingConfig:
        """Grouped speculative decoding as published (arXiv:2508.07747, G = 25 to 50): SJD's drafts, groups
        filtered by probability (0.15) and codebook distance. Without a codebook, pass distance_filter=None."""
        return cls(
            window=window,
            drafting="independent",
            fresh="uniform",
            group_size=group_size,
            distance_filter=distance_filter,
        )


_CHOICES = {
    "drafting": ("auto", "gumbel", "maximal", "independent"),
    "verification": ("auto", "noise", "ratio"),
    "fresh": ("above", "last", "uniform"),
    "relaxation": ("group", "mixture"),
}

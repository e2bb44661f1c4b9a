"""The methods of merging, row by row, and what they leave open."""

from __future__ import annotations

import dataclasses

from ecomjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of `METHODS`.

    Attributes:
        sparsify: which entries are dropped first, see `sparsify.sparsify`; None for none.
        consensus: "sum", Σ w Δ; "sign", the same over the deltas that have the elected sign,
            entry by entry (see `elect`); "slerp", see `spherical`.
        normalise: what the sum is divided by: "weights", those of what was summed; "count",
            their number; "none".
        space: "factors", the sum is a concatenation of factors and exact; "aligned", on the
            coordinates in a joint basis (see `align`); "dense", on the deltas themselves, one
            matrix at a time, brought back to factors by `lowrank.approximate`.
        rank: of the result by default: "sum" of the ranks, exact unless the space is dense, or
            the "largest" of them.
        laws: names from `LAWS`.
    """

    sparsify: str | None
    consensus: str
    normalise: str
    space: str
    rank: str
    laws: frozenset[str]


LAWS = {
    "identity": "merge([a], [1]) == a",
    "undropped": "merge([a], [1]) == a at density 1",
    "repeat": "merge([a, a], [1/2, 1/2]) == a",
    "permutation": "the order of adapters (with their weights) does not matter",
    "linear": "the delta is a sum of the deltas, by factors that do not depend on them",
}

_LINEAR = frozenset({"identity", "repeat", "permutation", "linear"})
_SURE = frozenset({"undropped", "permutation"})
_DRAWN = frozenset({"undropped"})

METHODS = {
    # Σ w Δ / Σ w, the weighted average.
    "linear": Method(None, "sum", "weights", "factors", "sum", _LINEAR),
    # Σ w Δ (Ilharco et al. 2022, arXiv 2212.04089, section 2).
    "task_arithmetic": Method(None, "sum", "none", "factors", "sum", _LINEAR),
    # The same, and a rank cannot be asked for: the factors stay those of the adapters.
    "concatenation": Method(None, "sum", "none", "factors", "sum", _LINEAR),
    # The same, nearest of the largest rank.
    "svd": Method(None, "sum", "none", "factors", "largest", _LINEAR - {"linear"}),
    # Along the great circle (Shoemake 1985); two adapters.
    "slerp": Method(None, "slerp", "none", "factors", "sum", frozenset({"repeat", "permutation"})),
    "magnitude_prune": Method("magnitude", "sum", "none", "dense", "largest", _SURE),
    # Trim, elect sign, disjoint mean (Yadav et al. 2023, arXiv 2306.01708, algorithm 1).
    "ties": Method("magnitude", "sign", "weights", "dense", "largest", _SURE),
    # Drop and rescale (Yu et al. 2023, arXiv 2311.03099), then as task arithmetic or as TIES.
    "dare_linear": Method("random", "sum", "none", "dense", "largest", _DRAWN),
    "dare_ties": Method("random", "sign", "weights", "dense", "largest", _DRAWN),
    # Neither the largest nor the smallest (Davari and Belilovsky 2023, arXiv 2312.06795).
    "breadcrumbs": Method("outliers", "sum", "none", "dense", "largest", _SURE),
    "breadcrumbs_ties": Method("outliers", "sign", "none", "dense", "largest", _SURE),
    # Drop by rank, elect, fuse (Deep et al. 2024, arXiv 2406.11617).
    "della": Method("ranked", "sign", "weights", "dense", "largest", _DRAWN),
    "della_linear": Method("ranked", "sum", "none", "dense", "largest", _DRAWN),
    # TIES on coordinates in a joint basis (Stoica et al. 2024, arXiv 2410.19735, section 4).
    "knots_ties": Method("magnitude", "sign", "weights", "aligned", "sum", _SURE),
    "knots_dare_ties": Method("random", "sign", "weights", "aligned", "sum", _DRAWN),
}
"""The methods by name. What is dropped and divided follows the papers.

Where other packages differ, `Options` names it: PEFT's `ties_svd` is "ties" with
`elect="unweighted"` and `normalise="count"`, its `dare_ties_svd` likewise. mergekit's `ties` is
as here, its `dare_ties` has `normalise="none"`, and its newer versions can rescale by "l1".
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """What the methods leave open; each is read only by the methods that it concerns.

    Attributes:
        rank: of the result; None for the default of the method.
        density: share of entries kept, in (0, 1].
        gamma: share of largest entries that breadcrumbs drop.
        epsilon: width of the probabilities of DELLA.
        rescale: of what is kept, see `sparsify.sparsify`.
        elect: the sign is elected on "weighted" deltas (mergekit; an adapter of weight 0 has no
            say) or "unweighted" ones (the TIES paper, PEFT).
        votes: the sign is that of the "total" of the deltas (the TIES paper), or of most of
            them, their "frequency".
        normalise: in place of the method's own: "weights" (mergekit), "count" (PEFT, and the
            TIES paper, whose weights are one), "none".
    """

    rank: int | None = None
    density: float = 0.5
    gamma: float = 0.01
    epsilon: float = 0.1
    rescale: str = "expectation"
    elect: str = "weighted"
    votes: str = "total"
    normalise: str | None = None

    def __post_init__(self):
        if self.rank is not None and self.rank < 1:
            raise UserError(f"rank {self.rank}", "merge options", "use a rank of 1 or more")
        for name, known in (
            ("elect", ("weighted", "unweighted")),
            ("votes", ("total", "frequency")),
            ("normalise", ("weights", "count", "none", None)),
        ):
            if getattr(self, name) not in known:
                raise UserError(
                    f"{name} {getattr(self, name)!r}",
                    "merge options",
                    f"use one of {', '.join(str(value) for value in known)}",
                )


DEFAULTS = Options()


def unread(name: str, options: Options) -> list[str]:
    """Names of the options that are off their defaults and that a method does not read.

    Raises:
        UserError: an unknown method.
    """
    row = row_of(name, DEFAULTS)
    concerned = {
        "rank": name != "concatenation",
        "density": row.sparsify is not None,
        "gamma": row.sparsify == "outliers",
        "epsilon": row.sparsify == "ranked",
        "rescale": row.sparsify is not None,
        "elect": row.consensus == "sign",
        "votes": row.consensus == "sign",
        "normalise": row.consensus != "slerp",
    }
    return [
        name
        for name, reads in concerned.items()
        if not reads and getattr(options, name) != getattr(DEFAULTS, name)
    ]


def row_of(name: str, options: Options) -> Method:
    """The row of a method, with what the options put in its place.

    Raises:
        UserError: an unknown method; a rank for "concatenation".
    """
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}", "merge", f"use one of {', '.join(METHODS)}")
    if name == "concatenation" and options.rank is not None:
        raise UserError(
            f"rank {options.rank}",
            "method 'concatenation'",
            "leave the rank out, or use 'svd' to bring the sum to a rank",
        )
    row = METHODS[name]
    return dataclasses.replace(row, normalise=options.normalise or row.normalise)

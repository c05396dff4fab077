"""Counts the rows of a model with a bank of text and a bank of vision experts, under three ways to place and send them:

python -m research.bench.banks

The model has the sizes of ERNIE-4.5-VL-28B-A3B. An EP group has 8 ranks. Every token draws its experts evenly from its own
bank. `pinned` and `interleaved` send one row of a token to each other rank that has chosen experts. `transformers` places
experts like `interleaved`, but its `all_to_all` sends a row for each (token, expert) pair, in an exchange for each bank.

Shape letters: T tokens of all ranks, K choices of a token, E experts of both banks, R ranks.
"""

import numpy as np

from moe_dist.config.parallel.section import PinnedSection
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from moe_dist.plan.policies import make_placement

RANKS, TOKENS, HIDDEN, BYTES = 8, 4096, 2560, 2  # tokens of a rank, bytes of a bf16 number
GROUPS = tuple(
    ExpertGroup(name, 64, num_null=0, top_k=6, ffn_dim=width, first_expert=first, modalities=(modality,))
    for name, width, first, modality in (("text_moe", 1536, 0, "text"), ("vision_moe", 512, 64, "image"))
)
PLACEMENTS = {
    "pinned": make_placement(PinnedSection(), GROUPS, num_ranks=RANKS, token_mix={"text": 1, "image": 1}),
    "interleaved": ExpertPlacement.interleaved(GROUPS, RANKS),
}


def drawn(shares: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Draws each token's rank [T] and experts [T, K]. A fraction `shares[r]` of rank r's tokens are picture tokens."""
    rng, source_T = np.random.default_rng(0), np.arange(RANKS).repeat(TOKENS)
    is_picture_T = np.tile(np.arange(TOKENS), RANKS) < np.array(shares)[source_T] * TOKENS
    expert_TK = rng.random((RANKS * TOKENS, 64)).argsort(axis=1)[:, :6] + 64 * is_picture_T[:, None]
    return source_T, expert_TK


def counted(placement: ExpertPlacement, source_T: np.ndarray, expert_TK: np.ndarray) -> tuple[float, float, float]:
    """Returns the rows and the pairs that a token sends to other ranks, and the busiest rank's FLOPs / the mean rank's."""
    rank_TK = np.array(placement.rank_of_expert)[expert_TK]
    reached_TR = np.zeros((len(source_T), RANKS), bool)
    np.put_along_axis(reached_TR, rank_TK, True, axis=1)
    reached_TR[np.arange(len(source_T)), source_T] = False
    work_TK = np.array(placement.width_of_expert)[expert_TK]
    work_R = np.bincount(rank_TK.ravel(), weights=work_TK.ravel(), minlength=RANKS)
    pairs = float((rank_TK != source_T[:, None]).sum())
    return reached_TR.sum() / len(source_T), pairs / len(source_T), float(work_R.max() / work_R.mean())


def main() -> None:
    """Prints the table of docs/hf-engine.md."""
    print("| pictures' tokens | pinned | interleaved | transformers | busiest rank: pinned | interleaved |")
    print("|---|---|---|---|---|---|")
    cases = {f"{share:.0%}": [share] * RANKS for share in (0.0, 0.25, 0.5, 0.75, 1.0)}
    cases["100%, on half of the ranks"] = [float(rank % 2) for rank in range(RANKS)]
    for name, shares in cases.items():
        found = {way: counted(placement, *drawn(shares)) for way, placement in PLACEMENTS.items()}
        rows = [found["pinned"][0], found["interleaved"][0], found["interleaved"][1]]
        sizes = [f"{each:.2f} rows, {each * 2 * HIDDEN * BYTES / 1e3:.0f} kB" for each in rows]  # there and back
        print(f"| {name} | {' | '.join(sizes)} | {found['pinned'][2]:.2f} | {found['interleaved'][2]:.2f} |")


if __name__ == "__main__":
    main()

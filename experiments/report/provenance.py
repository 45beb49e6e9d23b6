"""Provenance of rows: machine, versions, commit, protocol, minutes, commands; and a warning where rows of several kinds
stand together."""

from __future__ import annotations

from typing import Any

import pandas as pd

from experiments.ablations import Ablation
from experiments.rows import of_arms

FACTS = {
    "device": "device",
    "cores": "cores",
    "threads": "threads a run",
    "torch": "torch",
    "python": "Python",
    "commit": "commit",
    "results_version": "results version",
}
MIXED = {"commit": "commits", "results_version": "results versions", "device": "devices", "torch": "versions of torch"}
"""Facts that should have one value in all rows that are compared, in the plural."""
PROTOCOL = "protocol."
HASHES = ("protocol.tokenizer_sha256",)
"""Parts of a protocol that say nothing to a reader."""


def facts(rows: pd.DataFrame) -> dict[str, str]:
    """Machine, versions, commit and protocol of the finished rows; several values stand side by side, so that a mixture
    shows."""
    finished = rows[rows["status"] == "ok"]
    if finished.empty:
        return {}
    shown = {label: _values(finished[name]) for name, label in FACTS.items() if name in finished}
    arms = of_arms(finished)  # the protocol of transformers' tokenizers stands with the table
    shown |= {
        name.removeprefix(PROTOCOL): _values(arms[name])
        for name in sorted(arms)
        if name.startswith(PROTOCOL) and name not in HASHES
    }
    runs = finished.drop_duplicates("run")
    shown["runs"] = f"{len(runs)} finished, {minutes(rows):.1f} minutes of training in all"
    shown["parameters a run"] = _values(runs["parameters"].sort_values().map(lambda n: f"{int(n):,}"))
    shown["peak memory a run"] = f"{runs['peak_memory_gib'].max():.2f} GiB"
    return {name: value for name, value in shown.items() if value}


def _values(column: pd.Series) -> str:
    return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in column.dropna().unique())


def minutes(rows: pd.DataFrame) -> float:
    """Minutes of training of all runs that have a row, each run counted once."""
    if "train_seconds" not in rows:
        return 0.0
    return float(rows.dropna(subset=["train_seconds"]).drop_duplicates("run")["train_seconds"].sum()) / 60


def warnings(rows: pd.DataFrame, by: str) -> list[str]:
    """A sentence for each fact that should be one and is several, with the runs of every value and, but for the most
    frequent value, their arms (or ablations: `by`); and one on commits with uncommitted changes."""
    finished = rows[rows["status"] == "ok"]
    sentences = []
    for name, plural in MIXED.items():
        if name not in finished or finished[name].nunique() < 2:
            continue
        groups = sorted(finished.groupby(name), key=lambda group: -group[1]["run"].nunique())
        kinds = [f"{_values(groups[0][1][name])} ({_runs(groups[0][1])})"]
        kinds += [f"{_values(group[name])} ({_runs(group)}: {', '.join(_named(group, by))})" for _, group in groups[1:]]
        sentences.append(
            f"These rows span {len(kinds)} {plural}, so that differences may be of the code or the machine: "
            f"{'; '.join(kinds)}."
        )
    if "commit" in finished and len(changed := finished[finished["commit"].astype(str).str.endswith("+")]):
        sentences.append(
            f"{_runs(changed)} trained from a tree with uncommitted changes ({_values(changed['commit'])})."
        )
    return sentences


def _named(rows: pd.DataFrame, by: str) -> list[str]:
    """The arms or ablations of rows; the runs of one search count as one."""
    names = rows[by]
    if by == "arm" and "search.arm" in rows:
        names = names.where(rows["search.arm"].isna(), "search of " + rows["search.arm"].astype(str))
    return [str(name) for name in names.unique()]


def _runs(rows: pd.DataFrame) -> str:
    n = rows["run"].nunique()
    return f"{n} run{'' if n == 1 else 's'}"


def protocol(ablation: Ablation, rows: pd.DataFrame) -> str:
    """Without this a number means nothing: split, images, tokens, weights, what uniform sampling would give, and how a
    field was tuned."""
    finished = rows[rows["status"] == "ok"]
    if finished.empty:
        return ""
    sentences = _of_tokenizers(finished[finished["stage"] == "tokenizer"]) + _of_transformers(
        finished[finished["stage"] == "transformer"]
    )
    if ablation.adaptive.protocol:
        sentences.append(ablation.adaptive.protocol)
    return " ".join(sentences)


def _of_tokenizers(finished: pd.DataFrame) -> list[str]:
    sentences = []
    for (split, n_images, weights, tokens), group in _groups(
        finished, "protocol.split", "protocol.n_images", "protocol.weights", "tokens"
    ):
        sizes = group.drop_duplicates("codebook_size").sort_values("codebook_size")
        uniform = [
            f"{100 * usage:.1f}% of {int(K):,} codes at a perplexity of {perplexity:,.0f}"
            for K, usage, perplexity in zip(
                sizes["codebook_size"], sizes["uniform_usage"], sizes["uniform_perplexity"], strict=True
            )
        ]
        sentences.append(
            f"Protocol: the first {int(n_images):,} images of the {split} split, {int(tokens):,} tokens, {weights} "
            f"weights; as many tokens drawn uniformly would use {', '.join(uniform)}."
        )
    if "protocol.dimension" in finished:
        sentences += [f"Effective dimension: {words}." for words in finished["protocol.dimension"].dropna().unique()]
    return sentences


def _of_transformers(finished: pd.DataFrame) -> list[str]:
    sentences = []
    for (split, n_images, weights, samples, guidances), group in _groups(
        finished, "protocol.split", "protocol.n_images", "protocol.weights", "protocol.samples", "protocol.guidances"
    ):
        sampling = _values(group["protocol.sampling"].str.replace(r"seed \d+", "the run's seed", regex=True))
        sentences.append(
            f"Protocol of transformers: {weights} weights; bits of the first {int(n_images):,} images of the {split} "
            f"split; {int(samples):,} samples at each guidance ({guidances}), against the same images; {sampling}. "
            "Metrics of samples are those at the guidance with the lowest FID[fashion-cnn], which is chosen on these "
            "very samples."
        )
    return sentences


def _groups(rows: pd.DataFrame, *columns: str) -> list[tuple[tuple[Any, ...], pd.DataFrame]]:
    """Rows by what they have in these columns; none where there are no rows, and so perhaps no such columns."""
    return [] if rows.empty else list(rows.groupby(list(columns), sort=False))


def missing(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows without a result by status and reason: status, reason, and arms with their seeds, e.g. "vq_published seeds
    0, 2"."""
    lost = (
        rows[rows["status"] != "ok"].fillna({"reason": ""})
        if "reason" in rows
        else rows[rows["status"] != "ok"].assign(reason="")
    )
    groups = []
    for (status, reason), group in lost.groupby(["status", "reason"], sort=False):
        arms = []
        for arm, of_arm in group.groupby("arm", sort=False):
            seeds = sorted(of_arm["seed"].unique())
            arms.append(f"{arm} seed{'' if len(seeds) == 1 else 's'} {', '.join(map(str, seeds))}")
        groups.append({"status": status, "reason": reason, "runs": len(group), "arms": arms})
    return groups

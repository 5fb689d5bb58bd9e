"""Results of ``bench step``: rows with rates, the best of them, tables."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def say(text: str) -> None:
    """A progress line with the time."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def finished(facts: dict[str, Any], times: list[float], loss: float, peak: float | None) -> dict:
    """The facts of a job with its rates."""
    seconds = statistics.median(times)
    row = facts | {
        "seconds": seconds,
        "all_seconds": [round(t, 4) for t in times],
        "samples_per_s": facts["samples"] / seconds,
        "tokens_per_s": facts["tokens"] / seconds,
        "tflops": facts["model_flops"] / seconds / 1e12,
        "loss": loss,
    }
    return row | ({"mfu": row["tflops"] * 1e12 / peak} if peak else {})


def read_rows(path: Path) -> list[dict]:
    """Rows written so far."""
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def best_of(rows: Sequence[dict], side: str, turn: int) -> dict | None:
    """The row of a side with most samples a second in a turn."""
    own = [r for r in rows if (r["side"], r["turn"]) == (side, turn) and "error" not in r]
    return max(own, key=lambda r: r["samples_per_s"], default=None)


def brief(facts: dict) -> str:
    padded = ", ".join(f"{k} {v:.1%}" for k, v in facts["padding"].items())
    parts = [f"{facts['model_flops'] / 1e12:.3g} TFLOP", f"padding: {padded}"]
    if "shape" in facts:
        parts.insert(0, f"compiled in {facts['compile_s']:.0f} s, {facts['memory_gib']:.1f} GiB")
        parts.append("B={} T={} P={} K={} M={}".format(*facts["shape"]))
    return ", ".join(parts)


def line(row: dict) -> str:
    """A job's rates."""
    text = f"{row['seconds']:.3f} s, {row['samples_per_s']:.2f} samples/s"
    text += f", {row['tokens_per_s']:.0f} tokens/s, {row['tflops']:.3g} TFLOP/s"
    text += f", MFU {row['mfu']:.1%}" if "mfu" in row else ""
    return text + (f", {row['peak_gib']:.1f} GiB" if "peak_gib" in row else "")


def table(rows: Sequence[dict]) -> str:
    """Rows in Markdown."""
    head = (
        "job", "samples/s", "useful tokens/s", "padded tokens", "MFU", "peak GiB", "s", "CPU-s",
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['job']} | {row['error']} |" + " |" * (len(head) - 2))
            continue
        cells = (
            row["job"], f"{row['samples_per_s']:.2f}", f"{row['tokens_per_s']:.0f}",
            f"{row['padding']['tokens']:.1%}", f"{row['mfu']:.1%}" if "mfu" in row else "",
            f"{row.get('peak_gib', row.get('memory_gib', 0)) or 0:.1f}", f"{row['seconds']:.3f}",
            f"{row['cpu_s']:.1f}" if "cpu_s" in row else "",
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(rows: Sequence[dict]) -> dict[str, Any]:
    """Best job of each side in each turn, and their ratios."""
    found: dict[str, Any] = {}
    for turn in sorted({row["turn"] for row in rows}):
        ours, theirs = (best_of(rows, side, turn) for side in ("jax", "torch"))
        if ours and theirs:
            found[f"turn {turn}"] = {
                "jax": ours["job"],
                "torch": theirs["job"],
                "ratio": ours["samples_per_s"] / theirs["samples_per_s"],
            }
            if "cpu_s" in ours:
                spent = [row["cpu_s"] / row["samples"] for row in (theirs, ours)]
                found[f"turn {turn}"]["cpu_ratio"] = spent[0] / spent[1]
    return found

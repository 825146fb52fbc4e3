"""Markdown tables of the records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from side_by_side.pages import commit_of, replace_between, table

TITLES = {
    "monai": "(a) MONAI",
    "monai32": "(b) MONAI, float32 resampling",
    "nnunet": "(c) nnU-Net 2",
    "medseg": "medseg, exact",
    "medseg-fast": "medseg, fast",
}
HEAD = (
    "contestant",
    "seconds: median (all)",
    "CPU s",
    "peak MiB (added)",
    "of the machine's rate",
    "differs from (a)",
    "lowest Dice with (a)",
    "times faster than a / b / c",
    "memory of a / b / c to ours",
)


def render(results: Path, page: Path) -> None:
    """Print the tables of all records in a folder, or insert them between the markers of a page."""
    paths = [*sorted(results.glob("inference_*.json")), *sorted(results.glob("fast_mode_*.json"))]
    records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    sections = {"memory": memory_section, "fast mode": fast_mode_section}
    text = "\n\n".join(sections.get(record["case"], section)(record) for record in records)
    replace_between(page, "inference", text)


def section(record: dict[str, Any]) -> str:
    """Return heading, table and notes of one comparison."""
    rates, settings, machine = record["rates"], record["settings"], record["machine"]
    shape = "x".join(map(str, rates["shape"]))
    classes = settings["network_def"]["out_channels"]
    lines = [
        f"### {record['case']}, {record['network']} network",
        "",
        f"{shape}, {classes} classes, {rates['windows']} windows of {'x'.join(map(str, settings['roi_size']))}, "
        f"{rates['window_gflop']:.1f} GFLOP each. {_weights(record['weights'])}",
        "",
        *table(HEAD, [_row(record, name) for name in record["samples"]]),
        "",
        f"`{record['command']}`: {machine['processor']}, {record['threads']} threads, "
        f"memory settings {'of `TUNED_MEMORY` for all' if record['tuned_memory'] else 'of the C library for all'}; "
        f"{', '.join(f'{k} {v}' for k, v in record['versions'].items())}; {commit_of(record)}. Dense convolution "
        f"{rates['dense_gflop_per_s']:.0f} GFLOP/s, this network alone {rates['network_gflop_per_s']:.0f}.",
    ]
    return "\n".join(lines)


def memory_section(record: dict[str, Any]) -> str:
    """Return heading, tables and notes of the memory runs."""
    limited = record["limited"]
    outcome = "finished" if limited["passed"] else f"FAILED: {limited['error']}"
    head = ("slices", "classes", "seconds", "added MiB", "beyond image and mask, MiB")
    keys = ("slices", "classes", "work_s", "added_mib", "beyond_mib")
    rows = [[f"{row[key]:.0f}" for key in keys] for row in [*record["slices"], *record["classes"]]]
    return "\n".join(
        [
            "### Memory of medseg, exact, light network",
            "",
            f"512x512x{limited['slices']}, {limited['classes']} classes, under a hard limit of "
            f"{limited['limit_beyond_image_and_mask_mib']} MiB of address space beyond libraries, image and mask: "
            f"{outcome}.",
            "",
            *table(head, rows),
            "",
            f"`{record['command']}`: {record['machine']['processor']}, {record['threads']} threads; "
            f"{commit_of(record)}.",
        ]
    )


def fast_mode_section(record: dict[str, Any]) -> str:
    """Return heading, table and notes of the agreement of both modes on a data set."""
    agreement, truth = record["agreement"], record["truth"]
    names = list(truth)
    head = ("class", "Dice with exact", "the lowest of a case", *(f"{name}: Dice with truth" for name in names))
    rows = []
    for label in agreement["dice"]:
        values = [agreement["dice"], agreement["lowest_of_a_case"], *(truth[name] for name in names)]
        rows.append([label, *(f"{value[label]:.4f}" for value in values)])
    return "\n".join(
        [
            f"### Fast mode, {record['bundle']}",
            "",
            f"{record['cases']} validation cases, {agreement['differing']:,} of {agreement['voxels']:,} voxels differ. "
            f"Knobs of the fast mode: {', '.join(f'`{k}={v}`' for k, v in record['knobs'][names[1]].items())}.",
            "",
            *table(head, rows),
            "",
            f"`{record['command']}`: {record['machine']['processor']}; {commit_of(record)}.",
        ]
    )


def _row(record: dict[str, Any], name: str) -> list[str]:
    median, ratios = record["medians"][name], record["ratios"][name]
    samples = ", ".join(f"{sample['work_s']:.1f}" for sample in record["samples"][name])
    against = record["agreement"][name].get("monai")
    return [
        TITLES[name],
        f"**{median['work_s']:.1f}** ({samples})",
        f"{median['work_cpu_s']:.0f}",
        f"{median['peak_mib']:.0f} ({median['added_mib']:.0f})",
        f"{100 * median['share_of_rate']:.0f} %",
        *(_agreement(against) if against else ("", "")),
        _times(ratios, "work_s"),
        _times(ratios, "peak_mib"),
    ]


def _agreement(against: dict[str, Any]) -> tuple[str, str]:
    values = [value for value in against["dice"].values() if value is not None]
    lead = f", all within {against['largest_lead']:.1g}" if "largest_lead" in against and against["differing"] else ""
    return f"{against['differing']:,} of {against['voxels']:,}{lead}", f"{min(values):.4f}" if values else "-"


def _times(ratios: dict[str, Any], key: str) -> str:
    found = [f"{ratios[other][key]:.1f}" if other in ratios else "-" for other in ("monai", "monai32", "nnunet")]
    return " / ".join(found)


def _weights(weights: dict[str, Any]) -> str:
    if not weights["trained"]:
        return "First weights, untrained: time and memory are meaningful, the masks are not."
    dice = weights.get("dice")
    listed = "" if not dice else ": Dice " + ", ".join(f"{name} {value:.3f}" for name, value in dice.items())
    return f"Trained weights{listed}."

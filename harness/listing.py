"""What there is, as rows of plain data: every `list` command, and the tables of the README."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cases.contract import operators
from cases.models import load_model, model_names
from cases.suite import load_suite, suite_names
from harness.lanes import lanes
from harness.pool import Pool

Row = dict[str, Any]


def _paths(_: str) -> list[Row]:
    rows: dict[str, Row] = {}
    for lane in lanes():
        with Pool(lane, 1) as pool:
            for path in pool.describe():
                if lane not in path.lanes:
                    continue
                row = rows.setdefault(
                    path.name,
                    {
                        "name": path.name,
                        "operator": path.operator,
                        "lanes": {},
                        "libraries": path.libraries,
                    },
                )
                row["lanes"][lane] = path.unavailable or "available"
    for row in rows.values():
        states = [f"{lane}: {state}" for lane, state in row["lanes"].items()]
        row["summary"] = "; ".join(states + [f"{name} {told}" for name, told in row["libraries"].items()])
    return list(rows.values())


def _operators(_: str) -> list[Row]:
    return [
        {
            "name": item.name,
            "summary": item.summary,
            "source": item.source,
            "options": list(item.options),
            "inputs": {spec.name: list(spec.axes) for spec in item.inputs},
            "outputs": {spec.name: list(spec.axes) for spec in item.outputs},
        }
        for item in operators().values()
    ]


def _suites(_: str) -> list[Row]:
    rows = []
    for name in suite_names():
        suite = load_suite(name)
        summary = f"{len(suite.cases):,} cases: {suite.summary}"
        rows.append({"name": name, "summary": summary, "cases": len(suite.cases)})
    return rows


def _cases(suite: str) -> list[Row]:
    return [
        {"name": str(item.case), "summary": item.why, "checks": list(item.checks), "marks": list(item.marks)}
        for item in load_suite(suite).cases
    ]


def _models(_: str) -> list[Row]:
    rows = []
    for name in model_names():
        model = load_model(name)
        width = model.kv_lora_rank + model.qk_rope_head_dim
        kept = f"latent {model.kv_lora_rank} + {model.qk_rope_head_dim} = {width}"
        if not model.has_latents:
            kept = f"{model.num_key_value_heads} KV heads of {model.qk_head_dim} and {model.v_head_dim}"
        summary = f"{model.num_attention_heads} heads, {kept}, softmax scale {model.softmax_scale:.7f}"
        rows.append({"name": name, "summary": summary, "softmax_scale": model.softmax_scale})
    return rows


def _oracles(_: str) -> list[Row]:
    from references.oracle import oracles

    return [
        {
            "name": item.name,
            "summary": f"{item.role} of {item.operator}: {item.source}",
            "operator": item.operator,
            "role": item.role,
        }
        for item in oracles()
    ]


def _faults(_: str) -> list[Row]:
    from references.faults import faults

    rows: dict[str, Row] = {}
    for item in faults():
        row = rows.setdefault(
            item.name,
            {"name": item.name, "summary": item.summary, "operators": [], "forms": [], "source": item.source},
        )
        row["operators"] += [name for name in item.operators if name not in row["operators"]]
        row["forms"] += [item.form] if item.form and item.form not in row["forms"] else []
    for row in rows.values():
        row["summary"] = f"{row['summary']} ({', '.join(row['operators'])}; {row['source']})"
    return list(rows.values())


def _checks(_: str) -> list[Row]:
    from harness.checks import checks

    return [
        {"name": item.name, "summary": item.summary, "lanes": list(item.lanes)} for item in checks().values()
    ]


def check_names() -> list[str]:
    """The names of all checks, from their files: importing them would import torch."""
    folder = Path(__file__).parent / "checks"
    return sorted(file.stem for file in folder.glob("[!_]*.py"))


LISTINGS: dict[str, Callable[[str], list[Row]]] = {
    "paths": _paths,
    "operators": _operators,
    "suites": _suites,
    "cases": _cases,
    "models": _models,
    "oracles": _oracles,
    "checks": _checks,
    "faults": _faults,
}

"""Benchmarks that earlier versions of syncnorm wrote, in the fields of today's records."""

from __future__ import annotations

from typing import Any


def from_version_1(data: dict[str, Any]) -> dict[str, Any]:
    """A benchmark of schema version 1 as one of version 2.

    Version 1 timed layers in blocks alone, which version 2 still says of rows without ``calls``. It measured no
    exchange and noted no load.
    """
    return {**data, "schema_version": 2}


def from_version_2(data: dict[str, Any]) -> dict[str, Any]:
    """A benchmark of schema version 2 as one of version 3.

    The simulation of version 2 had all ranks of NCCL's rings on different nodes, and no other arrangement than a
    gather. These figures are left out.
    """
    simulation = data.get("simulation")
    if simulation is not None:
        simulation = {
            **_without_nccl(simulation),
            "worlds": [_without_nccl(world) for world in simulation["worlds"]],
            "pays_from": _without_nccl(simulation["pays_from"]),
        }
    return {**data, "schema_version": 3, "simulation": simulation}


def _without_nccl(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != "ring" and not name.startswith("nccl_")}

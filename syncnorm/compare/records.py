"""What a comparison found, as plain frozen records that pickle, print and turn into JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from syncnorm.hardware import Hardware as Hardware

SCHEMA = "syncnorm.compare"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a comparison computes; two equal settings give the same numbers."""

    arms: tuple[str, ...]
    world_size: int
    batch_per_rank: int
    steps: int
    parity_steps: int
    seed: int
    lr: float
    momentum: float
    num_groups: int

    @property
    def global_batch(self) -> int:
        """Images that one optimiser step sees, over all ranks."""
        return self.world_size * self.batch_per_rank


@dataclass(frozen=True)
class Gap:
    """How far one kind of tensor is from the reference: ``max|a - b|`` and ``max|a - b| / max|b|``."""

    max_abs: float
    max_rel: float


@dataclass(frozen=True)
class Parity:
    """Difference to ``single`` after ``step`` optimiser steps.

    A kind that does not exist on both sides (a group norm has no running mean) is ``None``.
    """

    step: int
    params: Gap | None
    running_mean: Gap | None
    running_var: Gap | None


@dataclass(frozen=True)
class CollectiveCount:
    """One kind of collective in one training step of rank 0.

    Attributes:
        op: ``all_reduce``, ``all_gather``, ``broadcast``, ...
        origin: ``"norm"`` where a normalisation layer asked for it, ``"ddp"`` where the wrapper did.
        calls: how often.
        payload_bytes: size of the tensors that rank 0 handed in, summed over the calls. What the wire
            carries depends on the algorithm that the backend picks.
    """

    op: str
    origin: str
    calls: int
    payload_bytes: int


@dataclass(frozen=True)
class ArmResult:
    """One arm, trained and measured; or the reason why it did not run, with every figure ``None``.

    Attributes:
        name: the arm's name, as ``--arms`` takes it.
        label: the name to print; it says where an arm is an emulation.
        ranks: processes that trained it.
        not_run: why it did not run, else ``None``.
        test_accuracy: share of the test images that rank 0's model gets right, in eval mode.
        step_seconds: median time of a training step, warm-up excluded.
        samples_per_second: global batch / ``step_seconds``.
        collectives: what one training step sends.
        parity: difference to ``single`` after the first step and after ``parity_steps`` steps.
        wall_seconds: the whole arm, set-up and evaluation included.
    """

    name: str
    label: str
    ranks: int
    not_run: str | None = None
    test_accuracy: float | None = None
    step_seconds: float | None = None
    samples_per_second: float | None = None
    collectives: tuple[CollectiveCount, ...] | None = None
    parity: tuple[Parity, ...] = ()
    wall_seconds: float | None = None

    def calls(self, origin: str) -> int:
        """Collectives a step that ``origin`` (``"ddp"`` or ``"norm"``) issues."""
        return sum(count.calls for count in self.collectives or () if count.origin == origin)

    @property
    def payload_bytes(self) -> int:
        """Bytes a step that rank 0 hands to collectives."""
        return sum(count.payload_bytes for count in self.collectives or ())


@dataclass(frozen=True)
class Comparison:
    """A whole run: what was asked, where and when it ran, and a result for each arm."""

    settings: Settings
    hardware: Hardware
    syncnorm_version: str
    torch_version: str
    python_version: str
    date: str
    command: str
    num_parameters: int
    num_norm_layers: int
    num_train: int
    num_test: int
    arms: tuple[ArmResult, ...]
    wall_seconds: float

    def __getitem__(self, name: str) -> ArmResult:
        """The result of the arm called ``name``."""
        for result in self.arms:
            if result.name == name:
                return result
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings, with the schema's name and version in front."""
        return {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Comparison:
        """The record that `to_dict` wrote, also after a trip through JSON.

        Raises:
            ValueError: ``data`` is of another schema or version.
        """
        found = (data.get("schema"), data.get("schema_version"))
        if found != (SCHEMA, SCHEMA_VERSION):
            raise ValueError(f"expected schema {SCHEMA} version {SCHEMA_VERSION}, got {found[0]} {found[1]}")
        fields = {key: value for key, value in data.items() if key not in ("schema", "schema_version")}
        fields["settings"] = Settings(**{**fields["settings"], "arms": tuple(fields["settings"]["arms"])})
        fields["hardware"] = Hardware(**fields["hardware"])
        fields["arms"] = tuple(_arm_from_dict(arm) for arm in fields["arms"])
        return cls(**fields)


def _arm_from_dict(data: dict[str, Any]) -> ArmResult:
    counts = data["collectives"]
    return ArmResult(
        **{
            **data,
            "collectives": None if counts is None else tuple(CollectiveCount(**count) for count in counts),
            "parity": tuple(_parity_from_dict(parity) for parity in data["parity"]),
        }
    )


def _parity_from_dict(data: dict[str, Any]) -> Parity:
    gaps = {kind: None if gap is None else Gap(**gap) for kind, gap in data.items() if kind != "step"}
    return Parity(step=data["step"], **gaps)

"""What the monitor prints, as text of 80 columns."""

import pytest

from syncnorm.monitor.findings import Findings, LayerFinding, wrapped

LONG = "backbone_feature_extractor.stage_{}.normalization_before_activation"


def made_up(
    names: list[str], world_size: int = 2, late: int | None = None, differing: tuple[str, ...] = ()
) -> Findings:
    wait_ms = tuple(0.5 if rank == late else 10.25 + rank for rank in range(world_size))
    layers = tuple(
        LayerFinding(name, "SyncBatchNorm2d", True, 0.031, 0.042, wait_ms, late, differing) for name in names
    )
    return Findings(world_size, 20, 2, (29.0,) * world_size, wait_ms, wait_ms, None, True, layers)


@pytest.mark.parametrize("world_size", [2, 4, 16])
@pytest.mark.parametrize("differences", [{}, {"late": 1, "differing": ("running_mean", "running_var")}])
def test_long_names_fit_80_columns_and_are_not_cut(world_size, differences):
    names = ["stem.bn", *(LONG.format(number) for number in range(3))]
    text = str(made_up(names, world_size, **differences))
    assert max(map(len, text.splitlines())) <= 80
    # On a line of its own, above its figures.
    lines = text.splitlines()
    at = [lines.index(name) for name in names[1:]]
    assert all(lines[place + 1].startswith(" ") and "SyncBatchNorm2d" in lines[place + 1] for place in at)
    assert any(line.startswith("stem.bn  ") and "SyncBatchNorm2d  yes" in line for line in lines)


def test_a_column_without_news_is_left_out():
    def header_and_row(found):
        lines = str(found).splitlines()
        at = next(number for number, line in enumerate(lines) if line.startswith("layer"))
        return lines[at], lines[at + 1]

    header, _ = header_and_row(made_up(["1"]))
    assert "straggler" not in header
    assert "buffers" not in header
    found = made_up(["1"], late=1, differing=("running_mean",))
    header, row = header_and_row(found)
    assert header.split()[-2:] == ["straggler", "buffers"]
    assert row.split()[-3:] == ["rank", "1", "differ"]
    assert "Buffers of 1 differ: running_mean, although the layers are synced." in " ".join(str(found).split())


def test_waits_of_many_ranks_are_a_range():
    assert "  10.2 11.2 12.2" in str(made_up(["1"], 3))
    assert "  10.2 to 25.2" in str(made_up(["1"], 16))


def test_a_line_is_wrapped_between_words():
    lines = wrapped(f"step 10: divergence of means 0.017 (largest 0.024 in {LONG}); buffers identical", "  ").split(
        "\n"
    )
    assert len(lines) == 3
    assert max(map(len, lines)) <= 80
    assert LONG in lines[1]
    assert lines[1].startswith("  ")

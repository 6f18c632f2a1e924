"""The picture of the norms: its cells are what the layers do on real ranks."""

import io
import itertools
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import syncnorm
from syncnorm.testing import run_ranks
from syncnorm.tools.cli import syncnorm as command_line
from syncnorm.tools.report.norms_plot import described, write_norms_plot
from syncnorm.tools.study.footprints import (
    CHANGED,
    CHANNELS,
    LAYERS,
    LENGTHS,
    POSITIONS,
    SAMPLES,
    NormLayer,
    footprint,
)

EVERYWHERE = list(itertools.product(range(2), range(SAMPLES), range(CHANNELS), range(POSITIONS)))
RANK, SAMPLE, CHANNEL, _ = CHANGED


def valid(index):
    rank, sample, _, position = index
    return position < LENGTHS[rank][sample]


# Which values share statistics with the changed one, by the definitions in the papers.
SHARES = {
    "bn": lambda r, n, c, p: (r, c) == (RANK, CHANNEL),
    "sync": lambda r, n, c, p: c == CHANNEL,
    "masked": lambda r, n, c, p: c == CHANNEL and valid((r, n, c, p)),
    "layer": lambda r, n, c, p: (r, n) == (RANK, SAMPLE),
    "instance": lambda r, n, c, p: (r, n, c) == (RANK, SAMPLE, CHANNEL),
    "group": lambda r, n, c, p: (r, n) == (RANK, SAMPLE) and c < CHANNELS // 2,
}


def _rank_footprints(norms, changed=CHANGED):
    return [footprint(norm, changed) for norm in norms]


@pytest.fixture(scope="module")
def found():
    first, second = run_ranks(_rank_footprints, 2, (list(LAYERS),))
    assert first == second
    return {each.norm: each for each in first}


@pytest.mark.parametrize("norm", LAYERS)
def test_a_norms_footprint_is_that_of_its_definition(found, norm):
    want = [index for index in EVERYWHERE if SHARES[norm](*index)]
    assert list(found[norm].moved) == want
    assert list(found[norm].padding) == [index for index in EVERYWHERE if norm == "masked" and not valid(index)]


def test_what_the_captions_say(found):
    assert {norm: described(each) for norm, each in found.items()} == {
        "bn": "over N, spatial: 12 values",
        "sync": "over ranks, N, spatial: 24 values",
        "masked": "over ranks, N, spatial: 17 values",
        "layer": "over C, spatial: 24 values",
        "instance": "over spatial: 4 values",
        "group": "over 3 of 6 C, spatial: 12 values",
    }


def test_changed_padding_moves_nothing():
    changed = (1, 2, 3, POSITIONS - 1)
    assert not valid(changed)
    masked, unmasked = run_ranks(_rank_footprints, 2, (["masked", "sync"], changed))[0]
    assert masked.moved == ()
    assert len(unmasked.moved) == 2 * SAMPLES * POSITIONS


@pytest.mark.parametrize(("groups", "same_as"), [(1, "layer"), (CHANNELS, "instance")])
def test_group_norm_of_one_group_is_layer_norm_and_of_c_groups_instance_norm(monkeypatch, groups, same_as):
    def layer(bn):
        return syncnorm.convert(bn, to="group", num_groups=groups)

    monkeypatch.setitem(LAYERS, "group", NormLayer("GN", layer))
    assert footprint("group").moved == footprint(same_as).moved
    x = torch.randn(3, CHANNELS, 5, dtype=torch.float64)
    bn = nn.BatchNorm1d(CHANNELS, dtype=torch.float64)
    nn.init.uniform_(bn.weight)
    torch.testing.assert_close(layer(bn)(x), LAYERS[same_as].of(bn)(x))


def cells(footprints):
    """The picture's pixels, (height, width, 4)."""
    from matplotlib.image import imread

    file = io.BytesIO()
    write_norms_plot(footprints, file)
    file.seek(0)
    return imread(file), len(file.getvalue())


def test_the_picture_shows_what_was_found(found):
    drawn, size = cells(list(found.values()))
    assert 800 < drawn.shape[1] < 1100
    assert size < 120_000
    # A cell that changed is dark; the second picture has one such cell per panel.
    dark = (drawn[..., :3] < 0.5).all(-1).sum()
    fewer, _ = cells([replace(each, moved=each.moved[:1]) for each in found.values()])
    assert dark > 3 * (fewer[..., :3] < 0.5).all(-1).sum()


def test_the_command_prints_and_draws_it(tmp_path):
    file = tmp_path / "norms.png"
    result = CliRunner().invoke(command_line, ["study", "norms", "--plot", str(file)])
    assert result.exit_code == 0, result.output
    assert "SyncBN with a mask" in result.output
    assert "over ranks, N, spatial: 17 values" in result.output
    assert file.read_bytes().startswith(b"\x89PNG")


def test_a_file_that_cannot_be_written_is_reported_first(tmp_path):
    result = CliRunner().invoke(command_line, ["study", "norms", "--plot", str(tmp_path / "no" / "norms.png")])
    assert result.exit_code == 2
    assert "cannot write" in result.output

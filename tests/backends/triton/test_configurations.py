"""Launch configurations: when a measured one takes the place of a rule's, and what a damaged or foreign table does."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from tinytl_kernels.backends.triton import configurations, group_norm, pixels, tiles
from tinytl_kernels.backends.triton.configurations import Choice, Target, read, trying, watch, write
from tinytl_kernels.backends.triton.launch import record
from tinytl_kernels.backends.triton.pointwise import tile_sizes

HERE = Target("GPU 9000", "9.0", "3.6.0", "0123456789ab")
SHAPE = (56, 56, 144, (1, 1), (3, 3), torch.bfloat16)


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch, tmp_path):
    """A cache folder of its own, and a table that the first choice reads again."""
    monkeypatch.setenv(configurations.CACHE_VARIABLE, str(tmp_path))
    configurations.reload()
    yield
    configurations.reload()


@pytest.fixture
def on_a_gpu(monkeypatch):
    """As if there were one."""
    monkeypatch.setattr(configurations, "target", lambda device=None: HERE)


def another(shape=SHAPE) -> tuple[Choice, tuple[int, ...]]:
    return tiles.tile_shape.choice(*shape), tiles.tile_shape.candidates(*shape)[3]


def test_what_was_measured_takes_the_place_of_the_rules_for_that_shape_alone(on_a_gpu):
    choice, measured = another()
    rule = tiles.tile_shape(*SHAPE)
    assert measured != rule
    write(configurations.table_path(HERE), HERE, {choice: measured})
    cut = tiles.cut(*SHAPE)
    assert (cut.tile_h, cut.tile_w, cut.block_c, cut.num_warps) == measured
    assert tiles.tile_shape(*SHAPE[:-1], torch.float32) == rule


def test_the_table_is_read_once(on_a_gpu, monkeypatch):
    reads = []
    monkeypatch.setattr(configurations, "read", lambda path, here: reads.append(path) or {})
    for channels in range(8, 80, 8):
        tiles.cut(14, 14, channels)
    assert len(reads) == 1


def test_without_a_gpu_no_table_is_looked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(configurations, "read", lambda path, here: pytest.fail("looked for a table"))
    assert tiles.tile_shape(*SHAPE) == tiles.tile_shape.candidates(*SHAPE)[0]


def test_what_is_only_recorded_follows_the_rules(on_a_gpu):
    # make aot says what ships, whatever this machine has measured.
    choice, measured = another()
    write(configurations.table_path(HERE), HERE, {choice: measured})
    assert tiles.tile_shape(*SHAPE) == measured
    with record():
        assert tiles.tile_shape(*SHAPE) == tiles.tile_shape.candidates(*SHAPE)[0]


def test_a_table_cannot_name_what_is_no_candidate(on_a_gpu):
    choice, _ = another()
    rule = tiles.tile_shape.candidates(*SHAPE)[0]
    write(configurations.table_path(HERE), HERE, {choice: (1 << 20, 1, 8, 64)})
    assert tiles.tile_shape(*SHAPE) == rule


def test_writing_adds_to_what_is_there_and_leaves_nothing_else(tmp_path):
    path = configurations.table_path(HERE)
    one, two = Choice("tiles.tile_shape", "a"), Choice("pointwise.tile_sizes", "b")
    write(path, HERE, {one: (8, 8, 32, 8)})
    write(path, HERE, {two: (64, 64, 32, 4, 3), one: (4, 16, 32, 4)})
    assert read(path, HERE) == {one: (4, 16, 32, 4), two: (64, 64, 32, 4, 3)}
    assert [p.name for p in tmp_path.iterdir()] == ["GPU-9000-9.0.json"]


def test_a_write_that_fails_leaves_the_old_table(tmp_path, monkeypatch):
    path, one = configurations.table_path(HERE), Choice("tiles.tile_shape", "a")
    write(path, HERE, {one: (8, 8, 32, 8)})
    monkeypatch.setattr(configurations.os, "replace", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write(path, HERE, {one: (4, 16, 32, 8)})
    assert read(path, HERE) == {one: (8, 8, 32, 8)}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "target": {}}', "\x00", "null"])
def test_a_damaged_table_is_left_aside_with_one_line(content, capsys, tmp_path):
    path = tmp_path / "table.json"
    path.write_text(content)
    assert read(path, HERE) == {}
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line
    assert "run tinytl tune again" in line


def test_a_damaged_table_is_replaced_by_the_next_tuning(tmp_path):
    path, one = configurations.table_path(HERE), Choice("tiles.tile_shape", "a")
    path.write_text("half a tab")
    write(path, HERE, {one: (8, 8, 32, 8)})
    assert read(path, HERE) == {one: (8, 8, 32, 8)}


@pytest.mark.parametrize("field", ["device", "capability", "triton", "kernels"])
def test_a_table_measured_elsewhere_is_left_aside_with_one_line(field, capsys):
    path = configurations.table_path(HERE)
    write(path, replace(HERE, **{field: "other"}), {Choice("tiles.tile_shape", "a"): (8, 8, 32, 8)})
    assert read(path, HERE) == {}
    (line,) = capsys.readouterr().err.splitlines()
    assert f"measured with another {field}" in line


def test_no_table_is_no_news(capsys, tmp_path):
    assert read(tmp_path / "none.json", HERE) == {}
    assert capsys.readouterr().err == ""


def test_trying_holds_inside_its_block_alone_and_hides_the_table(on_a_gpu):
    choice, measured = another()
    rule, *_, last = tiles.tile_shape.candidates(*SHAPE)
    write(configurations.table_path(HERE), HERE, {choice: measured})
    assert tiles.tile_shape(*SHAPE) == measured
    with trying({}):
        assert tiles.tile_shape(*SHAPE) == rule
        with trying({choice: last}):
            assert tiles.tile_shape(*SHAPE) == last
        assert tiles.tile_shape(*SHAPE) == rule
    assert tiles.tile_shape(*SHAPE) == measured


def test_watching_sees_every_choice_with_the_rules_answer_first():
    tile_sizes(1000, 24, 144, torch.float16)
    with watch() as seen:
        for _ in range(2):  # also what is remembered
            tile_sizes(1000, columns=24, depth=144, dtype=torch.float16)
    (choice,) = seen
    assert choice == Choice("pointwise.tile_sizes", "pixels=1000, columns=24, depth=144, dtype=float16, backward=False")
    assert seen[choice][0] == tile_sizes(1000, 24, 144, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [3, 8, 24, 144, 960])
def test_every_candidate_is_one_that_kernels_can_take(channels, dtype):
    powers = {1 << k for k in range(12)}
    for tile_h, tile_w, block, num_warps in tiles.tile_shape.candidates(14, 15, channels, (2, 2), (5, 5), dtype):
        assert {tile_h * tile_w, block, num_warps} <= powers
        assert block % 8 == 0  # a byte of a mask belongs to one program
    for candidate in tile_sizes.candidates(6272, channels, 2 * channels, dtype, True):
        block_pixels, columns, depth, num_warps, stages = candidate
        assert {block_pixels, columns, depth, num_warps} <= powers
        assert min(block_pixels, columns, depth) >= 16  # the least that tl.dot takes
        assert 2 <= stages <= 4
    for rows, block, num_warps in pixels.tile_sizes.candidates(channels, True):
        assert {rows, block, num_warps} <= powers
        assert block % 8 == 0
    for rows, block, together, num_warps in group_norm.cut_shape.candidates(8, 196, channels):
        assert {rows, block, together, num_warps} <= powers
        assert together >= rows  # pixels of a sum, read ROWS at a time


def test_the_digest_changes_with_any_source(tmp_path, monkeypatch):
    monkeypatch.setattr(configurations, "__file__", str(tmp_path / "configurations.py"))
    digests = []
    for name, text in (("a.py", "x = 1"), ("a.py", "x = 2"), ("b.py", ""), ("notes.txt", "no source")):
        (tmp_path / name).write_text(text)
        configurations.kernels_digest.cache_clear()
        digests.append(configurations.kernels_digest())
    configurations.kernels_digest.cache_clear()
    assert len(set(digests[:3])) == 3
    assert digests[3] == digests[2]
    assert all(re.fullmatch("[0-9a-f]{12}", digest) for digest in digests)

"""The order of int8 codes: against index arithmetic."""

import torch

from qlib.layers import int8_tiles


def test_tiles_hold_four_channels_of_64_codes_each():
    codes = torch.randint(-128, 128, (8, 192), dtype=torch.int8)
    tiles = int8_tiles.tile(codes)
    assert tiles.shape == (2, 3, 4, 64) and tiles.is_contiguous()
    for row, column in ((0, 0), (3, 65), (6, 191)):
        assert tiles[row // 4, column // 64, row % 4, column % 64] == codes[row, column]
    assert torch.equal(int8_tiles.untile(tiles), codes)
    ids = torch.tensor([[7, 0], [4, 4]])
    assert torch.equal(int8_tiles.rows(tiles, ids), codes[ids])
    assert torch.equal(int8_tiles.rows(codes, ids), codes[ids]) and int8_tiles.untile(codes) is codes

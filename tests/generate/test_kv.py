"""Rows of caches that join and leave: what each row holds, against a list of its own; a cache of two layers."""

from __future__ import annotations

import random

import torch

from megamoe.generate.kv import KvBatch, pad_left, positions_of

HEADS, DIM, LAYERS = 2, 4, 2
CPU = torch.device("cpu")


class Layer:
    def __init__(self, keys: torch.Tensor) -> None:
        self.keys, self.values = keys, -keys


class Cache:
    """What KvBatch needs of transformers' DynamicCache; test_generate runs the real one."""

    def __init__(self, columns: torch.Tensor) -> None:
        self.layers = [Layer(_spread(columns) + 1000.0 * i) for i in range(LAYERS)]

    def batch_select_indices(self, index: torch.Tensor) -> None:
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[index], layer.values[index]

    def append(self, column: torch.Tensor) -> None:
        for i, layer in enumerate(self.layers):
            layer.keys = torch.cat([layer.keys, _spread(column) + 1000.0 * i], 2)
            layer.values = torch.cat([layer.values, -_spread(column) - 1000.0 * i], 2)


def _spread(columns: torch.Tensor) -> torch.Tensor:
    """[B, W] -> [B, heads, W, dim]."""
    return columns.float()[:, None, :, None].expand(-1, HEADS, -1, DIM).clone()


def check(kv: KvBatch, rows: list[list[int]]) -> None:
    """Each row holds its own tokens, aligned at the end, and no column is useless."""
    assert len(kv) == len(rows)
    if not rows:
        assert kv.cache is None and kv.width == 0
        return
    assert kv.width == max(len(row) for row in rows)
    assert kv.starts == [kv.width - len(row) for row in rows]
    for b, row in enumerate(rows):
        assert kv.mask[b].tolist() == [0] * (kv.width - len(row)) + [1] * len(row)
        for i, layer in enumerate(kv.cache.layers):
            assert layer.keys.shape == (len(rows), HEADS, kv.width, DIM)
            expected = torch.tensor(row, dtype=torch.float32) + 1000.0 * i
            assert torch.equal(layer.keys[b, 1, kv.width - len(row) :, 3], expected)
            assert torch.equal(layer.values[b, 0, kv.width - len(row) :, 0], -expected)


def test_prompts_are_aligned_at_their_ends() -> None:
    ids, mask = pad_left([[5, 6, 7], [8]], CPU)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert positions_of(mask).tolist() == [[0, 1, 2], [0, 0, 0]]


def test_rows_join_grow_and_leave() -> None:
    rng = random.Random(0)
    token = iter(range(1, 10**6))
    kv, rows = KvBatch(), []
    joined = left = 0
    for _ in range(200):
        if rows and rng.random() < 0.6:
            mask, positions = kv.grow()
            assert positions.squeeze(1).tolist() == [len(row) for row in rows]
            new = [next(token) for _ in rows]
            kv.cache.append(torch.tensor(new)[:, None])
            assert mask.shape[1] == kv.cache.layers[0].keys.shape[2]
            for row, t in zip(rows, new, strict=True):
                row.append(t)
        else:
            prompts = [[next(token) for _ in range(rng.randint(1, 9))] for _ in range(rng.randint(1, 3))]
            ids, mask = pad_left(prompts, CPU)
            kv.join(Cache(ids), mask, [len(p) for p in prompts])
            rows += prompts
            joined += len(prompts)
        stay = [b for b in range(len(rows)) if rng.random() < 0.85]
        left += len(rows) - len(stay)
        kv.keep(stay)
        rows = [rows[b] for b in stay]
        check(kv, rows)
    assert joined > 40 and left > 30
